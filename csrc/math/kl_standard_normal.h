// The divergence of the posterior from the standard normal. Source: Kingma & Welling 2014 (arXiv:1312.6114),
// appendix B.
#pragma once

#include "math/formula.h"

namespace fusedvae {
namespace FUSEDVAE_NAMESPACE {

// KL(N(mu, e^logvar) || N(0, 1)) = (mu^2 + expm1(logvar) - logvar) / 2. Inputs: mu, logvar.
struct KlStandardNormal {
  static constexpr const char* kName = "kl_standard_normal";
  static constexpr int kInputs = 2, kScale = 1;
  static constexpr double kConstant = 0;

  template <class T>
  struct Scale {
    T expm1_logvar;
  };
  template <class T>
  static FUSEDVAE_INLINE Scale<T> derive(T logvar, T /*parameter*/) {
    return {exponential_minus_1(logvar)};
  }
  template <class T>
  static FUSEDVAE_INLINE Element<T, 2> element(const T* inputs, const Scale<T>& scale, T weight) {
    const T mu = inputs[0], logvar = inputs[1];
    return {0.5f * (mu * mu + (scale.expm1_logvar - logvar)), {weight * mu, (0.5f * weight) * scale.expm1_logvar}};
  }
};

}  // namespace FUSEDVAE_NAMESPACE
}  // namespace fusedvae
