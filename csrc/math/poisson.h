// The Poisson likelihood of counts, by the logarithm of the rate.
#pragma once

#include "math/formula.h"
#include "math/gamma.h"
#include "math/scale.h"

namespace fusedvae {
namespace FUSEDVAE_NAMESPACE {

// What is derived of a rate.
template <class T>
struct Rate {
  T log, value;
};

// rate - x log rate, torch.nn.functional.poisson_nll_loss. Inputs: recon_x (the rate, a scale), x.
struct PoissonNll {
  static constexpr const char* kName = "poisson_nll";
  static constexpr int kInputs = 2, kUniform = -1;
  static constexpr int kScales = 1, kScaleOf[] = {0}, kPowers[] = {1};

  template <class T>
  static FUSEDVAE_INLINE Rate<T> plain(const T* inputs) {
    return {inputs[0], exponential(inputs[0])};
  }
  template <class T>
  static FUSEDVAE_INLINE Rate<T> derive(const Scale<T>* scales) {
    return {scales[0].log, scales[0].power};
  }
  template <class T>
  static FUSEDVAE_INLINE Element<T, 2> element(const T* inputs, const Rate<T>& rate, T weight) {
    const T x = inputs[1];
    return {rate.value - x * rate.log, {weight * (rate.value - x), -(weight * rate.log)}};
  }
};

// rate - x log rate + log x!. Where x is near the rate these cancel, so they are put together from small terms, as
// Loader 2000 does it ("Fast and accurate computation of binomial probabilities"): (x + 1) gap + log r + log(2 pi (x +
// 1)) / 2 + Binet's function of x + 1, with the ratio r = rate / (x + 1) and the gap r - 1 - log r. NaN for x < 0 and
// for a rate < 0.
struct PoissonNllInFull {
  static constexpr const char* kName = "poisson_nll_in_full";
  static constexpr int kInputs = PoissonNll::kInputs, kUniform = PoissonNll::kUniform;
  static constexpr int kScales = 1, kScaleOf[] = {0}, kPowers[] = {1};

  template <class T>
  static FUSEDVAE_INLINE Rate<T> plain(const T* inputs) {
    return PoissonNll::plain(inputs);
  }
  template <class T>
  static FUSEDVAE_INLINE Rate<T> derive(const Scale<T>* scales) {
    return PoissonNll::derive(scales);
  }
  template <class T>
  static FUSEDVAE_INLINE Element<T, 2> element(const T* inputs, const Rate<T>& rate, T weight) {
    const T x = inputs[1], next = x + 1.0f, inverse = 1.0f / next, log_next = logarithm(next);
    const T t = (rate.value - next) * inverse;
    LogOfRatio<T> ratio = log_of_ratio(rate.value * inverse, t);
    // A rate that is next to nothing, or to infinity, has more left in its logarithm.
    const auto is_usual = (rate.value > 1e-30f) & (rate.value < 1e30f);
    ratio.log = is_usual ? ratio.log : rate.log - log_next;
    ratio.gap = is_usual ? ratio.gap : t - ratio.log;
    const Binet<T> rest = binet(inverse);
    const T value = (next * ratio.gap + ratio.log) + ((0.5f * log_next + number<T>(0.91893853320467274)) + rest.value);
    const T none = number<T>(NAN), known = x >= 0.0f ? value : none, of_0 = rate.value >= 0.0f ? rate.value : none;
    return {x == 0.0f ? of_0 : known,
            {weight * (rate.value - x), weight * ((rest.slope - 0.5f * inverse) - ratio.log)}};
  }
};

}  // namespace FUSEDVAE_NAMESPACE
}  // namespace fusedvae
