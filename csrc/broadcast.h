// What becomes of the gradient of an input that is broadcast: the one place that says which sums the kernels can make.
#pragma once

#include <cstdint>

#include "math/formula.h"
#include "operand.h"

namespace fusedvae {

// A gradient is written element by element, or has a sum for each ...
enum class Gradient : int { none, element, column, row, sample, total };

// By the strides of the gradient over the extent: 0 along what it is summed over.
inline Gradient gradient_of(const Extent& e, bool given, const int64_t stride[3]) {
  if (!given) return Gradient::none;
  const bool keeps_batch = stride[0] != 0 || e.batch == 1, keeps_outer = stride[1] != 0 || e.outer == 1;
  if (stride[2] != 0 || e.inner == 1) {
    if (keeps_batch && keeps_outer) return Gradient::element;
    if (stride[2] != 0) return Gradient::column;
  }
  if (stride[1] != 0) return Gradient::row;  // of each sample, or over the batch
  return stride[0] != 0 ? Gradient::sample : Gradient::total;
}

inline Gradient gradient_of(const Extent& e, const Operand& grad) {
  return gradient_of(e, grad.given, grad.stride);
}

// The gradients of a term's inputs.
struct Gradients {
  Gradient of[kMostInputs] = {};

  bool any(Gradient kind) const {
    for (const Gradient g : of)
      if (g == kind) return true;
    return false;
  }
};

inline Gradients gradients_of(const Extent& e, const Operand (&grads)[kMostInputs]) {
  Gradients found;
  for (int k = 0; k < kMostInputs; ++k) found.of[k] = gradient_of(e, grads[k]);
  return found;
}

// Whether the kernels can make all these sums on one way through the elements. A sum for each column is over batch and
// outer both; and where columns have sums, rows and samples have none.
inline bool can_sum(const Extent& e, const Operand (&grads)[kMostInputs]) {
  const Gradients gradients = gradients_of(e, grads);
  for (int k = 0; k < kMostInputs; ++k)
    if (gradients.of[k] == Gradient::column && (grads[k].stride[0] != 0 || grads[k].stride[1] != 0)) return false;
  return !gradients.any(Gradient::column) || !(gradients.any(Gradient::row) || gradients.any(Gradient::sample));
}

}  // namespace fusedvae
