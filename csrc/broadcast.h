// What becomes of a value or gradient that keeps less than the extent: the one place that says which sums the kernels
// can make.
#pragma once

#include <cstdint>

#include "operand.h"
#include "tasks.h"

namespace fusedvae {

// An output is written element by element, or has a sum for each ...
enum class Output : int { none, element, column, row, sample, total };

// By its strides over the extent: 0 along what it is summed over.
FUSEDVAE_INLINE Output output_of(const Extent& e, const Operand& operand) {
  const int64_t* const stride = operand.stride;
  if (!operand.given) return Output::none;
  const bool keeps_batch = stride[0] != 0 || e.batch == 1, keeps_outer = stride[1] != 0 || e.outer == 1;
  if (stride[2] != 0 || e.inner == 1) {
    if (keeps_batch && keeps_outer) return Output::element;
    if (stride[2] != 0) return Output::column;
  }
  if (stride[1] != 0) return Output::row;  // of each sample, or over the batch
  return stride[0] != 0 ? Output::sample : Output::total;
}

// A task's value, and the gradients of its inputs.
struct Outputs {
  Output value = Output::none;
  Output grads[kMostInputs] = {};

  FUSEDVAE_INLINE bool any(Output kind) const {
    bool found = value == kind;
    for (const Output grad : grads) found = found || grad == kind;
    return found;
  }
};

FUSEDVAE_INLINE Outputs outputs_of(const ElementwiseTask& task) {
  Outputs found;
  found.value = output_of(task.extent, task.value);
  for (int k = 0; k < kMostInputs; ++k) found.grads[k] = output_of(task.extent, task.grads[k]);
  return found;
}

// Whether the kernels can make all these sums on one way through the elements. A sum for each column is over batch and
// outer both; and where columns have sums, rows and samples have none.
FUSEDVAE_INLINE bool can_sum(const ElementwiseTask& task) {
  const Outputs outputs = outputs_of(task);
  const auto keeps_more = [](Output kind, const Operand& operand) {
    return kind == Output::column && (operand.stride[0] != 0 || operand.stride[1] != 0);
  };
  bool possible = !keeps_more(outputs.value, task.value);
  for (int k = 0; k < kMostInputs; ++k) possible = possible && !keeps_more(outputs.grads[k], task.grads[k]);
  return possible && (!outputs.any(Output::column) || !(outputs.any(Output::row) || outputs.any(Output::sample)));
}

}  // namespace fusedvae
