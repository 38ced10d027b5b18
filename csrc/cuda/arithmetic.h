// The elementary functions of the formula headers for one number. To be included before those headers.
//
// Our own where CUDA's cost more than they need to, to an ulp or two: exponentials, what a normal is made of (these
// leave out what their arguments cannot be), and ln(1 + x) of a known inverse. Else CUDA's, at their full accuracy:
// nothing here is compiled with --use_fast_math.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>

#include "cuda/access.h"
#include "math/target.h"

namespace fusedvae {
namespace FUSEDVAE_NAMESPACE {

template <class T>
FUSEDVAE_INLINE T number(double value) {
  return static_cast<T>(value);
}

// What results are rounded to: those that take 16 bits keep 8 or 11 of them, and of what comes before some 18 are
// enough, which the chip's own functions have.
enum class Rounding { to_32_bits, to_16_bits };

// 2^x, to two ulp; what is subnormal becomes 0 if the result is rounded to 16 bits.
template <Rounding rounding = Rounding::to_32_bits>
FUSEDVAE_INLINE float power_of_2(float x) {
#if defined(__CUDA_ARCH__)
  float power;
  if constexpr (rounding == Rounding::to_32_bits)
    asm("ex2.approx.f32 %0, %1;" : "=f"(power) : "f"(x));
  else
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
#else
  return exp2f(x);
#endif
}

// The larger of x and a number; NaN stays NaN.
FUSEDVAE_INLINE float at_least(float low, float x) {
#if defined(__CUDA_ARCH__)
  float larger;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(larger) : "f"(x), "f"(low));
  return larger;
#else
  return x < low ? low : x;
#endif
}

// e^x = 2^t e^r, where t is x / ln 2, rounded, and r what that has lost: so little that e^r is 1 + r. t stops below
// 128, from where on that is what overflows.
FUSEDVAE_INLINE float exponential(float given) {
  const float x = at_least(-104.0f, given), t = fminf(x * 1.44269504f, 127.99999f);
  const float r = fmaf(t, 1.90465432e-9f, fmaf(t, -0.693147182f, x));  // ln 2 in two parts
  const float power = power_of_2(t);
  return fmaf(power, r, power);
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

// e^x and e^x - 1 of one range reduction: e^x = 2^n e^r with |r| below ln 2 / 2. n stops at 127, from where on e^r is
// what overflows.
template <class T>
struct ExpPair {
  T exp, expm1;
};
FUSEDVAE_INLINE ExpPair<float> exp_pair(float given) {
  constexpr float kRound = 12582912.0f;  // adding 1.5 * 2^23 rounds to an integer
  const float x = at_least(-104.0f, given), n = fminf(fmaf(x, 1.44269504f, kRound) - kRound, 127.0f);
  const float r = fmaf(n, 2.12194440e-4f, fmaf(n, -0.693359375f, x));
  float p = fmaf(r, 1.9875691500e-4f, 1.3981999507e-3f);
  p = fmaf(p, r, 8.3334519073e-3f);
  p = fmaf(p, r, 4.1665795894e-2f);
  p = fmaf(p, r, 1.6666665459e-1f);
  p = fmaf(p, r, 5.0000001201e-1f);
  p = fmaf(p, r * r, r);  // e^r - 1
  const float power = power_of_2(n);
  return {fmaf(p, power, power), fmaf(p, power, power - 1.0f)};
}
FUSEDVAE_INLINE ExpPair<double> exp_pair(double x) {
  return {exp(x), expm1(x)};
}

// The deviation e^(l / 2) of a log-variance l, and e^l - 1, of one exponential: with t = e^(l / 2) - 1 it is t^2 + 2 t.
struct DeviationAndGrowth {
  float deviation, growth;
};
template <Rounding rounding>
FUSEDVAE_INLINE DeviationAndGrowth deviation_and_growth(float logvar) {
  if constexpr (rounding == Rounding::to_32_bits) {
    const auto [exp, expm1] = exp_pair(0.5f * logvar);
    return {exp, fmaf(expm1, expm1, expm1 + expm1)};
  } else {
    const float deviation = power_of_2<rounding>(logvar * (0.5f * 1.44269504f));
    // Next to 0, where 1 would cancel: (e^l - 1 - l) / l^2 to 19 bits.
    float q = fmaf(logvar, 0.008345744f, 0.041753557f);
    q = fmaf(q, logvar, 0.16666657f);
    q = fmaf(q, logvar, 0.4999993f);
    const float near = fmaf(q * logvar, logvar, logvar), far = fmaf(deviation, deviation, -1.0f);
    return {deviation, fabsf(logvar) < 0.25f ? near : far};
  }
}

FUSEDVAE_INLINE float exponential_minus_1(float x) {
  return exp_pair(x).expm1;
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

FUSEDVAE_INLINE float root(float x) {
  return sqrtf(x);
}
FUSEDVAE_INLINE double root(double x) {
  return sqrt(x);
}

// ln u for a normal u > 0: u = 2^e (1 + m) with m in [-1/3, 1/3], and ln(1 + m) = m + m^2 q(m).
FUSEDVAE_INLINE float log_normal(float u) {
  const int bits = cuda::bits_as<int>(u), e = (bits - 0x3F2AAAAB) & static_cast<int>(0xFF800000);
  const float m = cuda::bits_as<float>(bits - e) - 1.0f;
  float q = fmaf(m, 0.140262708f, -0.153885782f);
  q = fmaf(q, m, 0.139958248f);
  q = fmaf(q, m, -0.164159536f);
  q = fmaf(q, m, 0.200111672f);
  q = fmaf(q, m, -0.250078201f);
  q = fmaf(q, m, 0.333331972f);
  q = fmaf(q, m, -0.499999374f);
  return fmaf(static_cast<float>(e), 0.693147182f * 0x1p-23f, fmaf(q * m, m, m));
}

// sqrt(-2 ln u) for u in [2^-32, 1]: an approximation of its inverse, and one step of Newton's. It is 1e-15 in the
// place of 0.
FUSEDVAE_INLINE float radius_of(float u) {
  const float square = fmaxf(-2.0f * log_normal(u), 1e-30f);
#if defined(__CUDA_ARCH__)
  float inverse;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(square));
  const float radius = square * inverse;
  return fmaf(fmaf(-radius, radius, square), 0.5f * inverse, radius);
#else
  return sqrtf(square);
#endif
}

// The same to 2^-20 of it, by the chip's own functions. The error of its logarithm stays the same next to 1, where
// -2 ln u is small: a polynomial of 1 - u has it there.
FUSEDVAE_INLINE float approximate_radius(float u) {
  const float rest = 1.0f - u;
  float q = fmaf(rest, 0.5538218f, 0.66451675f);
  q = fmaf(q, rest, 1.0000271f);
  const float near = fmaf(q, rest, 2.0f) * rest;
#if defined(__CUDA_ARCH__)
  float log_2, radius;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(log_2) : "f"(u));
  const float square = rest < 0x1p-4f ? near : log_2 * (-2.0f * 0.693147182f);
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(radius) : "f"(square));
  return radius;
#else
  return sqrtf(rest < 0x1p-4f ? near : -2.0f * logf(u));
#endif
}

// ln(1 + x) for x in [0, 1], with 1 / (1 + x): what the sum loses to rounding comes back as a correction.
FUSEDVAE_INLINE float logarithm_of_1_plus(float x, float inverse) {
  const float sum = 1.0f + x;
  return fmaf(x - (sum - 1.0f), inverse, log_normal(sum));
}
FUSEDVAE_INLINE double logarithm_of_1_plus(double x, double /*inverse*/) {
  return log1p(x);
}

// sin and cos of 2 pi u for u in [0, 1]: the nearest quarter turn comes off exactly, so no angle is ever rounded.
FUSEDVAE_INLINE void sincos_turns(float u, float* sine, float* cosine) {
  constexpr float kRound = 12582912.0f;                                       // adding 1.5 * 2^23 rounds to an integer,
  const float turned = fmaf(u, 4.0f, kRound);                                 // which is then
  const int quarter = cuda::bits_as<int>(turned);                             // in the last bits
  const float a = fmaf(turned - kRound, -0.25f, u) * 6.28318531f, z = a * a;  // a is within +-pi/4
  const float s = fmaf(fmaf(fmaf(z, -1.9515295891e-4f, 8.3321608736e-3f), z, -1.6666654611e-1f) * z, a, a);
  const float c = fmaf(fmaf(fmaf(z, 2.443315711809948e-5f, -1.388731625493765e-3f), z, 4.166664568298827e-2f) * z, z,
                       fmaf(-0.5f, z, 1.0f));
  const bool odd = quarter & 1;
  const auto with_sign = [](float size, int turns) {  // negative in the second and third of four turns
    return cuda::bits_as<float>(cuda::bits_as<uint32_t>(size) ^ (static_cast<uint32_t>(turns) << 30 & 0x80000000u));
  };
  *sine = with_sign(odd ? c : s, quarter);
  *cosine = with_sign(odd ? s : c, quarter + 1);
}

// The same of the angle word * 2 pi / 2^32 to 2^-20, by the chip's own functions: they are as exact as that from -pi
// to pi.
FUSEDVAE_INLINE void approximate_sincos(uint32_t word, float* sine, float* cosine) {
  const float angle = static_cast<float>(static_cast<int32_t>(word)) * (6.28318531f * 0x1p-32f);
#if defined(__CUDA_ARCH__)
  asm("sin.approx.ftz.f32 %0, %1;" : "=f"(*sine) : "f"(angle));
  asm("cos.approx.ftz.f32 %0, %1;" : "=f"(*cosine) : "f"(angle));
#else
  *sine = sinf(angle);
  *cosine = cosf(angle);
#endif
}

}  // namespace FUSEDVAE_NAMESPACE
}  // namespace fusedvae
