// What the kernels compute, on every kind of processor: operations over operands in canonical form. Operands that are
// not given are skipped. Whatever a task points to lies where the kernel runs.
#pragma once

#include <cstdint>

#include "form.h"
#include "math/formula.h"
#include "operand.h"

namespace fusedvae {

// How many values an objective gives: one, one per sample, or those that its task has.
enum class Values : int { total = 0, sample = 1, element = 2 };

// The noise of a seed, in a contiguous array.
struct NormalTask {
  Operand out;
  int64_t count = 0;
  const int64_t* seed = nullptr;
};

// How a task differs from its formula.
template <class N>
struct Adaptation {
  FormIn<N> forms[kMostScales];         // of the inputs that are scales
  N gains[kMostInputs] = {1, 1, 1, 1};  // what each gradient of a divergence is multiplied by besides
};

// A formula over an extent: values, and the gradients of their sum, both weighted. A value or gradient that keeps less
// than the extent is summed over the rest: broadcast.h says which sums there are.
struct ElementwiseTask : Adaptation<double> {
  int formula = -1;        // its number in its list of math/formulas.h; -1 for none
  bool in_double = false;  // the arithmetic
  Extent extent;
  Operand inputs[kMostInputs];
  Operand weight;  // of each element; 1 if not given. Where it is 0, so are value and gradients, whatever the inputs
  // A further weight of each element, in gradients alone; there are no values then (but beside a sample).
  Operand incoming;
  Operand value;
  Operand grads[kMostInputs];

  FUSEDVAE_INLINE bool has_gains() const {
    bool found = false;
    for (const double gain : gains) found = found || gain != 1;
    return found;
  }
  // Whether scales are what formulas are written in, and gradients what formulas give.
  FUSEDVAE_INLINE bool is_plain() const {
    bool plain = true;
    for (const Form& form : forms) plain = plain && form.is_plain();
    return plain && !has_gains();
  }
};

// One pass over the latent: the sample z = mean + deviation * noise of a divergence's first two inputs, beside the
// divergence. Noise comes from the seed (at `index`, the logical position of an element, past `offset`) or as an
// operand. The gradients are those of sum(grad_z * z) + sum(incoming * divergence), each where it is given.
struct LatentTask {
  ElementwiseTask divergence;
  IndexStrides index;
  const int64_t* seed = nullptr;
  Operand offset;  // one number; 0 if not given
  Operand noise, grad_z, z;
};

// A term of an objective: the sum of a formula's values, or of values that are given.
struct Term {
  ElementwiseTask elements;
  Operand given;  // one value per sample, where there is no formula
  int64_t given_count = 0;
  double factor = 1;    // of the sum, and so of the gradients
  Operand normalizer;   // a further factor, one value; 1 if not given
  double constant = 0;  // added to each element's value, before that is weighted
  Operand coefficient;  // what the loss has it times, and the gradients too; 1 if not given
  Operand out;          // factor * normalizer * sum
};

// loss = sum of coefficient * term, the terms, and the gradients of the loss times grad_scale. With values of elements
// there is one term, whose task has them, perhaps summed over some dimensions.
struct ObjectiveTask {
  static constexpr int kMostTerms = 2;
  Term terms[kMostTerms];
  int count = 0;
  Values values = Values::total;
  Operand grad_scale;  // one value; 1 if not given
  Operand loss;

  // How many values there are, where they are not those of elements.
  FUSEDVAE_INLINE int64_t values_count() const {
    if (values != Values::sample) return 1;
    for (int k = 0; k < count; ++k)
      if (terms[k].elements.formula >= 0) return terms[k].elements.extent.batch;
    return terms[0].given_count;
  }
};

// Gradients times the incoming factor, in place; nothing is touched when it is 1.
struct ScaleTask {
  static constexpr int kMost = ObjectiveTask::kMostTerms * kMostInputs;
  Operand tensors[kMost];  // contiguous
  int64_t counts[kMost] = {};
  Operand factor;
  Operand coefficient, product;  // a number, and where its product with the factor goes, if that is wanted
};

}  // namespace fusedvae
