// What the kernels compute, on every kind of processor: operations over operands in canonical form. Operands that are
// not given are skipped. Whatever a task points to lies where the kernel runs.
#pragma once

#include <cstdint>

#include "operand.h"

namespace fusedvae {

// How many values an objective gives: one, one a sample, or one an element.
enum class Values : int { total = 0, sample = 1, element = 2 };

struct NormalTask {
  Operand out;  // contiguous
  int64_t count = 0;
  const int64_t* seed = nullptr;
};

// One pass over the latent. Noise comes from the seed (at `index`, the logical position of an element) or as an
// operand. Fills z, the per-sample kl, and the gradients of sum(grad_z * z) + sum(grad_kl * kl).
struct LatentTask {
  Extent extent;
  IndexStrides index;
  Operand mu, logvar, noise, grad_z;
  const int64_t* seed = nullptr;
  Operand grad_kl;  // one value a sample
  Operand z, grad_mu, grad_logvar;
  Operand kl;  // one value a sample
};

// The likelihood: `value` (one an element) and the gradients of sum(weight * nll).
// A grad_spread with strides 0 is summed over what it is broadcast along: along inner, or along batch and outer both.
struct NllTask {
  Extent extent;
  Operand recon_x, x, spread, weight;
  Operand value, grad_recon_x, grad_x, grad_spread;
  bool is_variance = false;  // spread is a variance, not its logarithm; at least eps
  double eps = 0;
};

// loss = nll + beta * kl, its terms, and the gradients of loss: scale times the total, or one value a sample.
// Either half may be absent; the KL may come as one value a sample.
struct ElboTask {
  bool has_nll = false, has_kl = false;
  NllTask nll;
  LatentTask kl;
  Operand kl_in, beta;
  int64_t kl_in_count = 0;
  Values values = Values::total;
  double scale = 1, constant = 0;  // constant: added to the NLL an element
  Operand loss, nll_out, kl_out;
};

// Gradients times the incoming factor, in place; nothing is touched when it is 1.
struct ScaleTask {
  static constexpr int kMost = 5;  // an objective's gradients: of recon_x, x, spread, mu and logvar
  Operand tensors[kMost];          // contiguous
  int64_t counts[kMost] = {};
  Operand factor;
};

}  // namespace fusedvae
