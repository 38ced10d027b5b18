// The elementary functions of the formula headers for one number. To be included before those headers.
// CUDA's own, at their full accuracy: nothing here is compiled with --use_fast_math.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>

#include "math/target.h"

namespace fusedvae {
namespace FUSEDVAE_NAMESPACE {

template <class T>
FUSEDVAE_INLINE T number(double value) {
  return static_cast<T>(value);
}

FUSEDVAE_INLINE float exponential(float x) {
  return expf(x);
}
FUSEDVAE_INLINE double exponential(double x) {
  return exp(x);
}
FUSEDVAE_INLINE float exponential(float x, float factor) {
  return factor * exponential(x);
}
FUSEDVAE_INLINE double exponential(double x, float factor) {
  return static_cast<double>(factor) * exponential(x);
}
FUSEDVAE_INLINE float exponential_minus_1(float x) {
  return expm1f(x);
}
FUSEDVAE_INLINE double exponential_minus_1(double x) {
  return expm1(x);
}
FUSEDVAE_INLINE float logarithm(float x) {
  return logf(x);
}
FUSEDVAE_INLINE double logarithm(double x) {
  return log(x);
}

// ln(1 + x).
FUSEDVAE_INLINE float logarithm_of_1_plus(float x) {
  return log1pf(x);
}
FUSEDVAE_INLINE double logarithm_of_1_plus(double x) {
  return log1p(x);
}
// The same for x in [0, 1], with 1 / (1 + x), which CUDA's has no use for.
FUSEDVAE_INLINE float logarithm_of_1_plus(float x, float /*inverse*/) {
  return log1pf(x);
}
FUSEDVAE_INLINE double logarithm_of_1_plus(double x, double /*inverse*/) {
  return log1p(x);
}

FUSEDVAE_INLINE float root(float x) {
  return sqrtf(x);
}
FUSEDVAE_INLINE double root(double x) {
  return sqrt(x);
}

// ln u for u in [2^-32, 1].
FUSEDVAE_INLINE float log_unit(float u) {
  return logf(u);
}

// sin and cos of 2 pi u for u in [0, 1]: the nearest quarter turn comes off exactly, so no angle is ever rounded.
FUSEDVAE_INLINE void sincos_turns(float u, float* sine, float* cosine) {
  const int quarter = static_cast<int>(u * 4.0f + 0.5f);
  const float a = (u - static_cast<float>(quarter) * 0.25f) * 6.28318531f;  // within +-pi/4
  const float z = a * a;
  float s = z * -1.9515295891e-4f + 8.3321608736e-3f;
  s = s * z - 1.6666654611e-1f;
  s = s * z * a + a;
  float c = z * 2.443315711809948e-5f - 1.388731625493765e-3f;
  c = c * z + 4.166664568298827e-2f;
  c = c * z * z - 0.5f * z + 1.0f;
  const bool odd = quarter & 1;
  const float sine_size = odd ? c : s, cosine_size = odd ? s : c;
  *sine = quarter & 2 ? -sine_size : sine_size;
  *cosine = (quarter + 1) & 2 ? -cosine_size : cosine_size;
}

}  // namespace FUSEDVAE_NAMESPACE
}  // namespace fusedvae
