// The Gaussian likelihood. Source: Kingma & Welling 2014 (arXiv:1312.6114), appendix B.
#pragma once

#include "math/formula.h"
#include "math/scale.h"

namespace fusedvae {
namespace FUSEDVAE_NAMESPACE {

// (l + (recon_x - x)^2 * e^-l) / 2 with l the logarithm of the variance. Inputs: recon_x, x, recon_logvar.
struct GaussianNll {
  static constexpr const char* kName = "gaussian_nll";
  static constexpr int kInputs = 3, kUniform = 2;
  static constexpr int kScales = 1, kScaleOf[] = {2}, kPowers[] = {-1};

  template <class T>
  struct Spread {
    T logvar, half_precision;
  };
  template <class T>
  static FUSEDVAE_INLINE Spread<T> plain(const T* inputs) {
    return {inputs[2], exponential(-inputs[2], 0.5f)};
  }
  template <class T>
  static FUSEDVAE_INLINE Spread<T> derive(const Scale<T>* scales) {
    return {scales[0].log, 0.5f * scales[0].power};
  }
  template <class T>
  static FUSEDVAE_INLINE Element<T, 3> element(const T* inputs, const Spread<T>& spread, T weight) {
    const T error = inputs[0] - inputs[1];
    const T half_pull = error * spread.half_precision;
    const T half_square = error * half_pull;
    const T d_recon = (weight + weight) * half_pull;
    return {0.5f * spread.logvar + half_square, {d_recon, -d_recon, half_square * -weight + 0.5f * weight}};
  }
};

}  // namespace FUSEDVAE_NAMESPACE
}  // namespace fusedvae
