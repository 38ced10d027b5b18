// The divergence of the posterior from the standard normal. Source: Kingma & Welling 2014 (arXiv:1312.6114),
// appendix B.
#pragma once

#include "math/formula.h"
#include "math/sample.h"
#include "math/scale.h"

namespace fusedvae {
namespace FUSEDVAE_NAMESPACE {

// KL(N(mu, e^logvar) || N(0, 1)) = (mu^2 + expm1(logvar) - logvar) / 2. Inputs: mu, logvar.
struct KlStandardNormal {
  static constexpr const char* kName = "kl_standard_normal";
  static constexpr int kInputs = 2, kUniform = -1;
  static constexpr int kScales = 1, kScaleOf[] = {1}, kPowers[] = {0};
  static constexpr bool kIsAtSample = false;

  template <class T>
  struct Spread {
    T logvar, expm1_logvar;
  };
  template <class T>
  static FUSEDVAE_INLINE Spread<T> plain(const T* inputs) {
    return {inputs[1], exponential_minus_1(inputs[1])};
  }
  template <class T>
  static FUSEDVAE_INLINE Spread<T> derive(const Scale<T>* scales) {
    return {scales[0].log, scales[0].power};
  }
  template <class T>
  static FUSEDVAE_INLINE Element<T, 2> element(const T* inputs, const Spread<T>& spread, T weight) {
    const T mu = inputs[0];
    return {0.5f * (mu * mu + (spread.expm1_logvar - spread.logvar)),
            {weight * mu, (0.5f * weight) * spread.expm1_logvar}};
  }
};

// log q(z) - log p(z) = (z^2 - noise^2 - logvar) / 2 at the sample z = mu + sigma noise: what has the divergence for
// its mean. Source: Burda, Grosse & Salakhutdinov 2016 (arXiv:1509.00519). Inputs: mu, logvar.
struct KlStandardNormalAtSample {
  static constexpr const char* kName = "kl_standard_normal_at_sample";
  static constexpr int kInputs = 2, kUniform = -1;
  static constexpr int kScales = 1, kScaleOf[] = {1}, kPowers[] = {1};
  static constexpr bool kIsAtSample = true;

  template <class T>
  struct Spread {
    T logvar;
  };
  template <class T>
  static FUSEDVAE_INLINE Spread<T> plain(const T* inputs) {
    return {inputs[1]};
  }
  template <class T>
  static FUSEDVAE_INLINE Spread<T> derive(const Scale<T>* scales) {
    return {scales[0].log};
  }
  template <class T>
  static FUSEDVAE_INLINE AtSample<T, 2> at_sample(const T* /*inputs*/, const Spread<T>& spread, T z, T noise,
                                                  T weight) {
    return {{0.5f * ((z - noise) * (z + noise) - spread.logvar), {number<T>(0), -0.5f * weight}}, weight * z};
  }
};

}  // namespace FUSEDVAE_NAMESPACE
}  // namespace fusedvae
