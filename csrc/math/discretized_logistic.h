// The logistic distribution in 256 bins of [-1, 1], the likelihood of 8-bit images. Source: Salimans et al. 2017,
// "PixelCNN++" (arXiv:1701.05517), section 2.1.
#pragma once

#include "math/formula.h"
#include "math/scale.h"

namespace fusedvae {
namespace FUSEDVAE_NAMESPACE {

// -log(F(upper) - F(lower)) with the logistic function F of the edges of x's bin, (x +- 1/255 - recon_x) / s, where
// bins at -1 and 1 are open. With softplus that is
//
//   softplus(-upper) + softplus(lower) - log(1 - e^-width),   width = upper - lower = 2 / (255 s)
//
// (an open bin lacks what the absent edge has in it), which no narrow bin and no tail makes inaccurate: what PixelCNN++
// goes over to there, the density at the middle times the width, is its limit. Inputs: recon_x, x, log_scale.
struct DiscretizedLogisticNll {
  static constexpr const char* kName = "discretized_logistic_nll";
  static constexpr int kInputs = 3, kUniform = 2;
  static constexpr int kScales = 1, kScaleOf[] = {2}, kPowers[] = {-1};
  static constexpr double kHalf = 1.0 / 255, kLast = 0.999;  // of a bin's width; where the last begins

  template <class T>
  struct Spread {
    T inverse;     // 1 / s
    T log_mass;    // log(1 - e^-width)
    T d_log_mass;  // minus its derivative by log s: width / (e^width - 1)
  };
  template <class T>
  static FUSEDVAE_INLINE Spread<T> spread_of(T log_scale, T inverse) {
    const T width = inverse * number<T>(2 * kHalf), fall = exponential_minus_1(-width);
    const auto is_narrow = width < 1e-4f;
    const T series = (width * number<T>(1.0 / 24) - 0.5f) * width,
            d_series = (width * number<T>(1.0 / 12) - 0.5f) * width;
    const T log_width = number<T>(-4.8481163645984613) - log_scale;  // log(2 / 255)
    return {inverse, is_narrow ? log_width + series : logarithm(-fall),
            is_narrow        ? 1.0f + d_series
            : width > 100.0f ? number<T>(0)
                             : width * (fall + 1.0f) / -fall};
  }
  template <class T>
  static FUSEDVAE_INLINE Spread<T> plain(const T* inputs) {
    return spread_of(inputs[2], exponential(-inputs[2]));
  }
  template <class T>
  static FUSEDVAE_INLINE Spread<T> derive(const Scale<T>* scales) {
    return spread_of(scales[0].log, scales[0].power);
  }
  template <class T>
  static FUSEDVAE_INLINE Element<T, 3> element(const T* inputs, const Spread<T>& spread, T weight) {
    const T x = inputs[1], error = x - inputs[0], half = number<T>(kHalf), zero = number<T>(0);
    const auto is_first = x<number<T>(-kLast), is_last = x> number<T>(kLast);
    const T upper = (error + half) * spread.inverse, lower = (error - half) * spread.inverse;
    const Derived<T> above = softplus(-upper), below = softplus(lower);
    const T d_upper = is_last ? zero : above.slope, d_lower = is_first ? zero : below.slope;
    const T value = (is_last ? zero : above.value) + (is_first ? zero : below.value);
    const T d_recon = (weight * spread.inverse) * (d_upper - d_lower);
    const T moved = through(upper, d_upper) - through(lower, d_lower);
    const auto is_open = is_first | is_last;
    return {value - (is_open ? zero : spread.log_mass),
            {d_recon, -d_recon, weight * (moved + (is_open ? zero : spread.d_log_mass))}};
  }
};

}  // namespace FUSEDVAE_NAMESPACE
}  // namespace fusedvae
