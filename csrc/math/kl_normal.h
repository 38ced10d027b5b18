// The divergence of one diagonal Gaussian from another, as of a posterior from a prior that is learned. Source: Kingma
// & Welling 2014 (arXiv:1312.6114), appendix B, for any two normal distributions.
#pragma once

#include "math/formula.h"

namespace fusedvae {
namespace FUSEDVAE_NAMESPACE {

// KL(N(mu, e^logvar) || N(prior_mu, e^prior_logvar)) = (expm1(d) - d + (mu - prior_mu)^2 * e^-prior_logvar) / 2, where
// d = logvar - prior_logvar. Inputs: mu, logvar, prior_mu, prior_logvar.
struct KlNormal {
  static constexpr const char* kName = "kl_normal";
  static constexpr int kInputs = 4, kScale = 3;
  static constexpr double kConstant = 0;

  template <class T>
  struct Scale {
    T logvar, precision;  // of the prior
  };
  template <class T>
  static FUSEDVAE_INLINE Scale<T> derive(T prior_logvar, T /*parameter*/) {
    return {prior_logvar, exponential(-prior_logvar)};
  }
  template <class T>
  static FUSEDVAE_INLINE Element<T, 4> element(const T* inputs, const Scale<T>& prior, T weight) {
    const T error = inputs[0] - inputs[2], difference = inputs[1] - prior.logvar;
    const T pull = error * prior.precision, square = error * pull;
    const T growth = exponential_minus_1(difference), half_weight = 0.5f * weight;
    const T d_mu = weight * pull;
    return {0.5f * ((growth - difference) + square),
            {d_mu, half_weight * growth, -d_mu, -(half_weight * (growth + square))}};
  }
};

}  // namespace FUSEDVAE_NAMESPACE
}  // namespace fusedvae
