// The Laplace likelihood. Source: Kotz, Kozubowski & Podgórski 2001, "The Laplace distribution and generalizations",
// section 2.1; with `extra` as in Esser et al. 2021 (arXiv:2012.09841), whose perceptual loss joins the absolute error
// before both are divided by the scale.
#pragma once

#include "math/formula.h"

namespace fusedvae {
namespace FUSEDVAE_NAMESPACE {

// (|recon_x - x| + extra) * e^-log_scale + log_scale. Inputs: recon_x, x, log_scale, extra.
struct LaplaceNll {
  static constexpr const char* kName = "laplace_nll";
  static constexpr int kInputs = 4, kScale = 2;
  static constexpr double kConstant = 0.69314718055994531;  // log 2

  template <class T>
  struct Scale {
    T log_scale, inverse;
  };
  template <class T>
  static FUSEDVAE_INLINE Scale<T> derive(T log_scale, T /*parameter*/) {
    return {log_scale, exponential(-log_scale)};
  }
  template <class T>
  static FUSEDVAE_INLINE Element<T, 4> element(const T* inputs, const Scale<T>& scale, T weight) {
    const T error = inputs[0] - inputs[1];
    const T distance = error < 0.0f ? -error : error;
    const T relative = (distance + inputs[3]) * scale.inverse, pull = weight * scale.inverse;
    // The sign of the error: 0 where there is none, and where it is NaN, as PyTorch has it.
    const T d_recon = error > 0.0f ? pull : error < 0.0f ? -pull : 0.0f * pull;
    return {relative + scale.log_scale, {d_recon, -d_recon, weight - weight * relative, pull}};
  }
};

}  // namespace FUSEDVAE_NAMESPACE
}  // namespace fusedvae
