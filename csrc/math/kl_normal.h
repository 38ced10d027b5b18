// The divergence of one diagonal Gaussian from another, as of a posterior from a prior that is learned. Source: Kingma
// & Welling 2014 (arXiv:1312.6114), appendix B, for any two normal distributions.
#pragma once

#include "math/formula.h"
#include "math/sample.h"
#include "math/scale.h"

namespace fusedvae {
namespace FUSEDVAE_NAMESPACE {

// KL(N(mu, e^logvar) || N(prior_mu, e^prior_logvar)) = (expm1(d) - d + (mu - prior_mu)^2 * e^-prior_logvar) / 2, where
// d = logvar - prior_logvar. Inputs: mu, logvar, prior_mu, prior_logvar.
struct KlNormal {
  static constexpr const char* kName = "kl_normal";
  static constexpr int kInputs = 4, kUniform = 3;
  static constexpr int kScales = 2, kScaleOf[] = {1, 3}, kPowers[] = {1, kDivisor};
  static constexpr bool kIsAtSample = false;

  template <class T>
  struct Spread {
    T difference, growth;  // d, and e^d - 1
    T precision;           // of the prior
  };
  template <class T>
  static FUSEDVAE_INLINE Spread<T> plain(const T* inputs) {
    const T difference = inputs[1] - inputs[3];
    return {difference, exponential_minus_1(difference), exponential(-inputs[3])};
  }
  template <class T>
  static FUSEDVAE_INLINE Spread<T> derive(const Scale<T>* scales) {
    const T difference = scales[0].log - scales[1].log, divisor = scales[1].power;
    if (scales[0].has_log && scales[1].has_log) return {difference, exponential_minus_1(difference), divisor};
    const bool is_inverse = scales[1].has_log;
    const T ratio = is_inverse ? scales[0].power * divisor : scales[0].power / divisor;
    // Logarithms that were each rounded would not cancel what the ratio is more than 1.
    const auto is_usual = (ratio > 1e-30f) & (ratio < 1e30f);
    return {is_usual ? logarithm(ratio) : difference, ratio - 1.0f, is_inverse ? divisor : 1.0f / divisor};
  }
  template <class T>
  static FUSEDVAE_INLINE Element<T, 4> element(const T* inputs, const Spread<T>& spread, T weight) {
    const T error = inputs[0] - inputs[2];
    const T pull = error * spread.precision, square = error * pull;
    const T half_weight = 0.5f * weight;
    const T d_mu = weight * pull;
    return {0.5f * ((spread.growth - spread.difference) + square),
            {d_mu, half_weight * spread.growth, -d_mu, -(half_weight * (spread.growth + square))}};
  }
};

// log q(z) - log p(z) = (prior_logvar - logvar - noise^2 + (z - prior_mu)^2 * e^-prior_logvar) / 2 at the sample z =
// mu + sigma noise: what has the divergence for its mean. Source: Burda, Grosse & Salakhutdinov 2016
// (arXiv:1509.00519). Inputs: mu, logvar, prior_mu, prior_logvar.
struct KlNormalAtSample {
  static constexpr const char* kName = "kl_normal_at_sample";
  static constexpr int kInputs = 4, kUniform = 3;
  static constexpr int kScales = 2, kScaleOf[] = {1, 3}, kPowers[] = {1, -1};
  static constexpr bool kIsAtSample = true;

  template <class T>
  struct Spread {
    T difference;  // logvar - prior_logvar
    T precision;   // of the prior
  };
  template <class T>
  static FUSEDVAE_INLINE Spread<T> plain(const T* inputs) {
    return {inputs[1] - inputs[3], exponential(-inputs[3])};
  }
  template <class T>
  static FUSEDVAE_INLINE Spread<T> derive(const Scale<T>* scales) {
    return {scales[0].log - scales[1].log, scales[1].power};
  }
  template <class T>
  static FUSEDVAE_INLINE AtSample<T, 4> at_sample(const T* inputs, const Spread<T>& spread, T z, T noise, T weight) {
    const T error = z - inputs[2], pull = error * spread.precision, square = error * pull;
    const T half_weight = 0.5f * weight, d_z = weight * pull;
    return {{0.5f * ((square - noise * noise) - spread.difference),
             {number<T>(0), -half_weight, -d_z, half_weight - half_weight * square}},
            d_z};
  }
};

}  // namespace FUSEDVAE_NAMESPACE
}  // namespace fusedvae
