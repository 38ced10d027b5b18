// The formulas of the variational bound, one function a term: value and gradients of an element.
//
// T is a number or a SIMD vector of numbers; nothing here knows which. Source: Kingma & Welling 2014
// (arXiv:1312.6114), appendix B.
#pragma once

#include "math/target.h"

namespace fusedvae {
namespace FUSEDVAE_NAMESPACE {

// Negative log-likelihood of x under N(recon, e^logvar), without the constant log(2 pi) / 2, times a weight:
// weight * (logvar + (recon - x)^2 * precision) / 2, where precision = e^-logvar.
// It takes half the weight, and half the precision times the weight: loops can have both at less than two
// multiplications an element. Those that sum values may take `half_square`, the part that is not linear in logvar.
// The gradient with respect to x is -d_recon; with respect to the variance, precision * d_logvar.
template <class T>
struct GaussianNll {
  T value, d_recon, d_logvar, half_square;
};

template <class T>
FUSEDVAE_INLINE GaussianNll<T> gaussian_nll(T recon, T x, T logvar, T half_weight, T half_precision) {
  const T error = recon - x;
  const T half_d_recon = error * half_precision;
  const T half_square = error * half_d_recon;
  return {half_weight * logvar + half_square, half_d_recon + half_d_recon, half_weight - half_square, half_square};
}

// KL(N(mu, e^logvar) || N(0, 1)) = (mu^2 + expm1(logvar) - logvar) / 2.
template <class T>
struct KlStandardNormal {
  T value, d_mu, d_logvar;
};

template <class T>
FUSEDVAE_INLINE KlStandardNormal<T> kl_standard_normal(T mu, T logvar, T expm1_logvar) {
  return {0.5f * (mu * mu + (expm1_logvar - logvar)), mu, 0.5f * expm1_logvar};
}

// Reparameterised sample z = mu + sigma * noise, where sigma = e^(logvar / 2); d_logvar = dz/dlogvar, dz/dmu = 1.
template <class T>
struct Sample {
  T value, d_logvar;
};

template <class T>
FUSEDVAE_INLINE Sample<T> sample(T mu, T sigma, T noise) {
  const T spread = sigma * noise;
  return {mu + spread, 0.5f * spread};
}

}  // namespace FUSEDVAE_NAMESPACE
}  // namespace fusedvae
