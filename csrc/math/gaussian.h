// The Gaussian likelihood, its scale given as a log-variance or as a variance. Source: Kingma & Welling 2014
// (arXiv:1312.6114), appendix B.
#pragma once

#include "math/formula.h"

namespace fusedvae {
namespace FUSEDVAE_NAMESPACE {

// Of either: the logarithm of the variance, and half its inverse.
template <class T>
struct GaussianScale {
  T logvar, half_precision;
};

// logvar / 2 + (recon_x - x)^2 * half_precision, and its derivatives by recon_x, x and logvar.
template <class T>
FUSEDVAE_INLINE Element<T, 3> gaussian_element(const T* inputs, const GaussianScale<T>& scale, T weight) {
  const T error = inputs[0] - inputs[1];
  const T half_pull = error * scale.half_precision;
  const T half_square = error * half_pull;
  const T d_recon = (weight + weight) * half_pull;
  return {0.5f * scale.logvar + half_square, {d_recon, -d_recon, 0.5f * weight - weight * half_square}};
}

// Inputs: recon_x, x, recon_logvar.
struct GaussianNll {
  static constexpr const char* kName = "gaussian_nll";
  static constexpr int kInputs = 3, kScale = 2;
  static constexpr double kConstant = 0.91893853320467274;  // log(2 pi) / 2

  template <class T>
  static FUSEDVAE_INLINE GaussianScale<T> derive(T logvar, T /*parameter*/) {
    return {logvar, exponential(-logvar, 0.5f)};
  }
  template <class T>
  static FUSEDVAE_INLINE Element<T, 3> element(const T* inputs, const GaussianScale<T>& scale, T weight) {
    return gaussian_element(inputs, scale, weight);
  }
};

// Inputs: recon_x, x, variance. The parameter is the variance's lower bound, of which the derivatives know nothing.
struct GaussianNllOfVariance {
  static constexpr const char* kName = "gaussian_nll_of_variance";
  static constexpr int kInputs = 3, kScale = 2;
  static constexpr double kConstant = GaussianNll::kConstant;

  template <class T>
  static FUSEDVAE_INLINE GaussianScale<T> derive(T variance, T bound) {
    const T bounded = variance < bound ? bound : variance;
    return {logarithm(bounded), 0.5f / bounded};
  }
  template <class T>
  static FUSEDVAE_INLINE Element<T, 3> element(const T* inputs, const GaussianScale<T>& scale, T weight) {
    Element<T, 3> element = gaussian_element(inputs, scale, weight);
    element.grads[2] = (element.grads[2] + element.grads[2]) * scale.half_precision;
    return element;
  }
};

}  // namespace FUSEDVAE_NAMESPACE
}  // namespace fusedvae
