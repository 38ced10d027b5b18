// The Bernoulli likelihood of targets in [0, 1], by logits and by probabilities: the binary cross-entropies of
// torch.nn.functional. Source: Kingma & Welling 2014 (arXiv:1312.6114), appendix C.1.
#pragma once

#include "math/formula.h"
#include "math/scale.h"

namespace fusedvae {
namespace FUSEDVAE_NAMESPACE {

// softplus(a) - x a of logits a; the part of x counts pos_weight times: (1 - x) a + (1 + (pos_weight - 1) x)
// softplus(-a). For a < 0 that is -pos_weight x a + (1 + (pos_weight - 1) x) softplus(a): what is small then, as where
// x is 0, is no difference of what is not. Inputs: recon_x (a), x, pos_weight.
struct BernoulliNll {
  static constexpr const char* kName = "bernoulli_nll";
  static constexpr int kInputs = 3, kUniform = 2;
  static constexpr int kScales = 0;

  template <class T>
  static FUSEDVAE_INLINE Nothing plain(const T* /*inputs*/) {
    return {};
  }
  template <class T>
  static FUSEDVAE_INLINE Element<T, 3> element(const T* inputs, const Nothing& /*spread*/, T weight) {
    const T a = inputs[0], x = inputs[1], pos_weight = inputs[2];
    const T more = pos_weight - 1.0f, share = more * x + 1.0f, by_x = a < 0.0f ? -pos_weight : number<T>(-1);
    const T lead = a < 0.0f ? by_x * x : by_x * x + 1.0f;
    // softplus(-|a|), and its derivative by a.
    const T t = exponential(a < 0.0f ? a : -a), inverse = 1.0f / (1.0f + t), tail = logarithm_of_1_plus(t, inverse);
    const T slope = t * (a < 0.0f ? inverse : -inverse);
    const T hit = x * tail;
    return {
        lead * a + share * tail,
        {weight * (lead + share * slope), weight * (by_x * a + more * tail), weight * (a < 0.0f ? hit - x * a : hit)}};
  }
};

// -x log p - (1 - x) log(1 - p), no logarithm below -100, and p (1 - p) not below 1e-12 in the derivative, as PyTorch
// has it. Inputs: recon_x (p), x.
struct BernoulliNllOfProbabilities {
  static constexpr const char* kName = "bernoulli_nll_of_probabilities";
  static constexpr int kInputs = 2, kUniform = -1;
  static constexpr int kScales = 0;

  template <class T>
  static FUSEDVAE_INLINE Nothing plain(const T* /*inputs*/) {
    return {};
  }
  template <class T>
  static FUSEDVAE_INLINE Element<T, 2> element(const T* inputs, const Nothing& /*spread*/, T weight) {
    const T p = inputs[0], x = inputs[1], lowest = number<T>(-100), least = number<T>(1e-12);
    T hit = logarithm(p), miss = logarithm_of_1_plus(-p);
    hit = hit < lowest ? lowest : hit;
    miss = miss < lowest ? lowest : miss;
    const T both = (1.0f - p) * p;
    return {(x - 1.0f) * miss - x * hit, {weight * (p - x) / (both < least ? least : both), weight * (miss - hit)}};
  }
};

}  // namespace FUSEDVAE_NAMESPACE
}  // namespace fusedvae
