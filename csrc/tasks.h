// What the kernels compute, on every kind of processor: operations over operands in canonical form. Operands that are
// not given are skipped. Whatever a task points to lies where the kernel runs.
#pragma once

#include <cstdint>

#include "math/formula.h"
#include "operand.h"

namespace fusedvae {

// How many values an objective gives: one, one per sample, or one per element.
enum class Values : int { total = 0, sample = 1, element = 2 };

// The noise of a seed, in a contiguous array.
struct NormalTask {
  Operand out;
  int64_t count = 0;
  const int64_t* seed = nullptr;
};

// One pass over the latent. Noise comes from the seed (at `index`, the logical position of an element) or as an
// operand. Fills z, the KL per sample, and the gradients of sum(grad_z * z) + sum(grad_kl * kl).
struct LatentTask {
  bool in_double = false;  // the arithmetic
  Extent extent;
  IndexStrides index;
  Operand mu, logvar, noise, grad_z;
  Operand grad_kl;  // one value per sample
  const int64_t* seed = nullptr;
  Operand z, grad_mu, grad_logvar;
  Operand kl;  // one value per sample
};

// A formula over an extent: values, weighted, and the gradients of their weighted sum. A gradient is summed over what
// its input is broadcast along: broadcast.h says which sums there are.
struct ElementwiseTask {
  int formula = -1;        // its number in math/formulas.h; -1 for none
  bool in_double = false;  // the arithmetic
  double parameter = 0;    // the formula's
  Extent extent;
  Operand inputs[kMostInputs];
  Operand weight;  // of each element; 1 if not given
  Operand value;   // one per element
  Operand grads[kMostInputs];
};

// A term of an objective: the sum of a formula's values, or of values that are given.
struct Term {
  ElementwiseTask elements;
  Operand given;  // one value per sample, where there is no formula
  int64_t given_count = 0;
  double factor = 1;    // of the sum, and so of the gradients
  double constant = 0;  // added to each element's value
  Operand coefficient;  // what the loss has it times, and the gradients too; 1 if not given
  Operand out;          // factor * sum
};

// loss = sum of coefficient * term, the terms, and the gradients of the loss. With a value per element there is one
// term, whose task has the values.
struct ObjectiveTask {
  static constexpr int kMostTerms = 2;
  Term terms[kMostTerms];
  int count = 0;
  Values values = Values::total;
  Operand loss;
};

// Gradients times the incoming factor, in place; nothing is touched when it is 1.
struct ScaleTask {
  static constexpr int kMost = ObjectiveTask::kMostTerms * kMostInputs;
  Operand tensors[kMost];  // contiguous
  int64_t counts[kMost] = {};
  Operand factor;
};

}  // namespace fusedvae
