// Arithmetic on vectors of the instruction set this file is compiled for: the vector types of GCC and Clang, and the
// elementary functions as branch-free polynomials. Accurate to about an ulp; NaN and infinity come out as from libm.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "math/target.h"

// The lanes of two vectors that the indices name. Clang and GCC from 12 on have the one builtin, GCC before that the
// other.
#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define FUSEDVAE_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#endif
#endif
#if !defined(FUSEDVAE_SHUFFLE)
#define FUSEDVAE_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, vi{__VA_ARGS__})
#endif

namespace fusedvae {
namespace FUSEDVAE_NAMESPACE {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float vf __attribute__((vector_size(kLanes * 4)));
typedef int32_t vi __attribute__((vector_size(kLanes * 4)));
typedef uint32_t vu __attribute__((vector_size(kLanes * 4)));
typedef double vd __attribute__((vector_size(kLanes * 4)));  // half as many lanes, of 64 bits
typedef uint64_t vq __attribute__((vector_size(kLanes * 4)));

// The vector that a number type is processed in.
template <class T>
struct Pack;
template <>
struct Pack<float> {
  typedef vf type;
  static constexpr int lanes = kLanes;
};
template <>
struct Pack<double> {
  typedef vd type;
  static constexpr int lanes = kLanes / 2;
};
template <>
constexpr bool kIsDouble<vd> = true;

template <class V, class T>
FUSEDVAE_INLINE V load(const T* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
template <class V, class T>
FUSEDVAE_INLINE void store(T* p, V v) {
  __builtin_memcpy(p, &v, sizeof v);
}
// The same for the first `count` lanes, which are fewer than all.
template <class V, class T>
FUSEDVAE_INLINE V load_part(const T* p, int64_t count) {
  T lanes[sizeof(V) / sizeof(T)] = {};
  for (int64_t i = 0; i < count; ++i) lanes[i] = p[i];
  return load<V>(lanes);
}
template <class V, class T>
FUSEDVAE_INLINE void store_part(T* p, V v, int64_t count) {
  T lanes[sizeof(V) / sizeof(T)];
  store(lanes, v);
  for (int64_t i = 0; i < count; ++i) p[i] = lanes[i];
}

template <>
FUSEDVAE_INLINE vf number<vf>(double value) {
  return vf{} + static_cast<float>(value);
}
template <>
FUSEDVAE_INLINE vd number<vd>(double value) {
  return vd{} + value;
}

FUSEDVAE_INLINE vf bits_to_float(vi v) {
  return reinterpret_cast<vf>(v);
}
FUSEDVAE_INLINE vi float_to_bits(vf v) {
  return reinterpret_cast<vi>(v);
}
FUSEDVAE_INLINE vi to_int(vf v) {
  return __builtin_convertvector(v, vi);
}
FUSEDVAE_INLINE vf to_float(vi v) {
  return __builtin_convertvector(v, vf);
}

template <class T>
FUSEDVAE_INLINE T sum_lanes(typename Pack<T>::type v) {
  T lanes[Pack<T>::lanes];
  store(lanes, v);
  for (int step = Pack<T>::lanes / 2; step; step /= 2)
    for (int i = 0; i < step; ++i) lanes[i] += lanes[i + step];
  return lanes[0];
}

// A function of the C library, lane by lane: what float64 has for all that is not worth more.
template <class Function>
FUSEDVAE_INLINE vd by_lane(vd v, const Function& function) {
  double lanes[Pack<double>::lanes];
  store(lanes, v);
  for (double& lane : lanes) lane = function(lane);
  return load<vd>(lanes);
}

FUSEDVAE_INLINE vf root(vf v) {
#if defined(__AVX512F__)
  return _mm512_sqrt_ps(v);
#elif defined(__AVX2__)
  return _mm256_sqrt_ps(v);
#elif defined(__x86_64__)
  return _mm_sqrt_ps(v);
#elif defined(__aarch64__)
  return vsqrtq_f32(v);
#else
  for (int i = 0; i < kLanes; ++i) v[i] = __builtin_sqrtf(v[i]);
  return v;
#endif
}

FUSEDVAE_INLINE vd root(vd v) {
  return by_lane(v, [](double x) FUSEDVAE_LAMBDA { return __builtin_sqrt(x); });
}

// x between two bounds; NaN stays NaN (x86's minimum and maximum return their second operand if either is one).
FUSEDVAE_INLINE vf clamp(vf x, float low, float high) {
#if defined(__AVX512F__)
  return _mm512_min_ps(_mm512_set1_ps(high), _mm512_max_ps(_mm512_set1_ps(low), x));
#elif defined(__AVX2__)
  return _mm256_min_ps(_mm256_set1_ps(high), _mm256_max_ps(_mm256_set1_ps(low), x));
#elif defined(__x86_64__)
  return _mm_min_ps(_mm_set1_ps(high), _mm_max_ps(_mm_set1_ps(low), x));
#else
  x = x < low ? number<vf>(low) : x;
  return x > high ? number<vf>(high) : x;
#endif
}

// x = n ln 2 + r with |r| <= ln 2 / 2, and e^r - 1. Past the bounds that x is clamped to, e^x is 0 or infinity, also
// times a constant of a formula's.
struct ExpReduction {
  vf n, expm1_r;
};

FUSEDVAE_INLINE ExpReduction reduce_exp(vf x) {
  x = clamp(x, -104.0f, 130.0f);
  const vf magic = number<vf>(12582912.0f);  // adding 1.5 * 2^23 rounds to an integer
  const vf n = (x * 1.44269504f + magic) - magic;
  vf r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  vf p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  return {n, p * (r * r) + r};
}

// v * 2^n for an integer n: subnormal results and those next to the largest float included.
FUSEDVAE_INLINE vf scale_by_power(vf v, vf n) {
#if defined(__AVX512F__)
  return _mm512_scalef_ps(v, n);
#else
  const vi k = to_int(n), k1 = k >> 1, k2 = k - k1;
  return v * bits_to_float((k1 + 127) << 23) * bits_to_float((k2 + 127) << 23);
#endif
}

// e^x times a constant, for what e^x costs.
FUSEDVAE_INLINE vf exponential(vf x, float factor) {
#if defined(__AVX512F__)
  // x = n ln 2 + r with n a multiple of 1/16: the sixteenth is looked up, which leaves an r so small that a third of
  // the polynomial does, and the whole part of n is scalef's.
  x = clamp(x, -104.0f, 130.0f);
  const vf magic = number<vf>(786432.0f);  // adding 1.5 * 2^19 rounds to a sixteenth, counted by the low four bits
  const vf rounded = x * 1.44269504f + magic, n = rounded - magic;
  const vf sixteenths = {1.0f,        1.04427378f, 1.09050773f, 1.13878863f, 1.18920712f, 1.24185781f,
                         1.29683955f, 1.35425555f, 1.41421356f, 1.47682615f, 1.54221083f, 1.61049033f,
                         1.68179283f, 1.75625216f, 1.83400809f, 1.91520656f};  // 2^(k/16)
  const vf power = _mm512_permutexvar_ps(reinterpret_cast<__m512i>(rounded), sixteenths * factor);
  vf r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  const vf p = (r * 1.66666667e-1f + 0.5f) * r + 1.0f;
  return scale_by_power(power * (p * r) + power, n);
#else
  const ExpReduction e = reduce_exp(x);
  return scale_by_power(e.expm1_r * factor + factor, e.n);
#endif
}
FUSEDVAE_INLINE vf exponential(vf x) {
  return exponential(x, 1.0f);
}

// e^x and e^x - 1 of one range reduction: each accurate to about an ulp, near 0 and far from it.
struct ExpPair {
  vf exp, expm1;
};

FUSEDVAE_INLINE ExpPair exp_pair(vf x) {
  const ExpReduction e = reduce_exp(x);
  const vf exp = scale_by_power(e.expm1_r + 1.0f, e.n);
  const vf near = scale_by_power(e.expm1_r, e.n) + (scale_by_power(number<vf>(1.0f), e.n) - 1.0f);
  return {exp, x > 16.0f ? exp - 1.0f : near};
}

FUSEDVAE_INLINE vf exponential_minus_1(vf x) {
  return exp_pair(x).expm1;
}

// In float64: x = n ln 2 + r as above, with n counted by the low bits of `count`, and e^r - 1 by its series. Past the
// bounds e^x is 0 or infinity.
struct ExpReductionInDouble {
  vd count, expm1_r;
};

constexpr double kCountedFrom = 6755399441055744.0;  // adding 1.5 * 2^52 rounds to an integer

FUSEDVAE_INLINE ExpReductionInDouble reduce_exp(vd x) {
  x = x < -746.0 ? number<vd>(-746.0) : x;
  x = x > 710.0 ? number<vd>(710.0) : x;
  const vd count = x * 1.4426950408889634 + kCountedFrom, n = count - kCountedFrom;
  vd r = x - n * 0.693147180369123816490;  // ln 2 in two parts, of which the first times n is exact
  r = r - n * 1.90821492927058770002e-10;
  vd p = r * (1.0 / 6227020800) + 1.0 / 479001600;
  p = p * r + 1.0 / 39916800;
  p = p * r + 1.0 / 3628800;
  p = p * r + 1.0 / 362880;
  p = p * r + 1.0 / 40320;
  p = p * r + 1.0 / 5040;
  p = p * r + 1.0 / 720;
  p = p * r + 1.0 / 120;
  p = p * r + 1.0 / 24;
  p = p * r + 1.0 / 6;
  p = p * r + 0.5;
  return {count, p * (r * r) + r};
}

FUSEDVAE_INLINE vd scale_by_power(vd v, vd count) {
#if defined(__AVX512F__)
  return _mm512_scalef_pd(v, count - kCountedFrom);
#else
  // 2^n in two factors, as above: k is n + 2048, which is positive, and 1023 the exponent of 1.
  const vq k = reinterpret_cast<vq>(count) - reinterpret_cast<vq>(number<vd>(kCountedFrom)) + 2048;
  const vq k1 = k >> 1, k2 = k - k1;
  return v * reinterpret_cast<vd>((k1 - 1) << 52) * reinterpret_cast<vd>((k2 - 1) << 52);
#endif
}

FUSEDVAE_INLINE vd exponential(vd x) {
  const ExpReductionInDouble e = reduce_exp(x);
  return scale_by_power(e.expm1_r + 1.0, e.count);
}
FUSEDVAE_INLINE vd exponential(vd x, float factor) {
  return static_cast<double>(factor) * exponential(x);
}
FUSEDVAE_INLINE vd exponential_minus_1(vd x) {
  const ExpReductionInDouble e = reduce_exp(x);
  const vd far = scale_by_power(e.expm1_r + 1.0, e.count) - 1.0;
  const vd near = scale_by_power(e.expm1_r, e.count) + (scale_by_power(number<vd>(1.0), e.count) - 1.0);
  return x > 40.0 ? far : near;
}

#if defined(__AVX512F__)
// ln x = e ln 2 - ln c + ln(1 + r), where x = m 2^e with m in [3/4, 3/2), c is about 1 / m, of the sixteenth of that
// range that m is in (and 1 next to 1), and r = c m - 1 is so small that few terms do. What getmant and getexp make of
// zero, infinities, negative numbers and NaN is what comes out.
FUSEDVAE_INLINE vf logarithm(vf x) {
  const vf m = _mm512_getmant_ps(x, _MM_MANT_NORM_p75_1p5, _MM_MANT_SIGN_nan);
  const vf e = _mm512_getexp_ps(x) - static_cast<vf>(_mm512_getexp_ps(m));
  const vf c_of = {1.0f,         0.914285719f, 0.864864886f, 0.820512831f, 0.780487776f, 0.744186044f,
                   0.711111128f, 0.680851042f, 1.30612242f,  1.25490201f,  1.20754719f,  1.16363633f,
                   1.12280703f,  1.08474576f,  1.04918027f,  1.0f};
  const vf log_of = {0.0f,          0.0896121562f,  0.145181984f,   0.19782573f,   0.247836202f,  0.295464218f,
                     0.340926558f,  0.384411722f,   -0.267062753f,  -0.227057487f, -0.188591182f, -0.151549861f,
                     -0.115831822f, -0.0813456401f, -0.0480091646f, 0.0f};
  const __m512i sixteenth = _mm512_srli_epi32(reinterpret_cast<__m512i>(m), 19);
  const vf c = _mm512_permutexvar_ps(sixteenth, c_of), log_c = _mm512_permutexvar_ps(sixteenth, log_of);
  const vf r = m * c - 1.0f;
  vf p = r * -1.66666667e-1f + 2.0e-1f;
  p = p * r - 2.5e-1f;
  p = p * r + 3.33333333e-1f;
  p = p * r - 0.5f;
  p = p * (r * r) + (e * 1.42860677e-6f + log_c);
  return e * 6.93145752e-1f + (p + r);
}

// The same for normal x > 0.
FUSEDVAE_INLINE vf log_normal(vf x) {
  return logarithm(x);
}
#else
// ln x for normal x > 0, by Cephes' polynomial around 1. (Of a negative x the bits overflow, without harm.)
FUSEDVAE_INLINE vf log_normal(vf x) {
  const vu bits = (vu)float_to_bits(x);
  const vi k = (vi)(bits - 0x3F3504F3u) >> 23;  // x = m 2^k with m in [sqrt 1/2, sqrt 2)
  const vf f = bits_to_float((vi)(bits - ((vu)k << 23))) - 1.0f;
  const vf e = to_float(k);
  const vf z = f * f;
  vf p = f * 7.0376836292e-2f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  p = p * f * z - e * 2.12194440e-4f;
  p = p - 0.5f * z;
  return (f + p) + e * 0.693359375f;
}

FUSEDVAE_INLINE vf logarithm(vf x) {
  const vi tiny = x < 0x1p-126f;
  const vf scaled = tiny ? x * 0x1p23f : x;
  vf y = log_normal(scaled) - (tiny ? number<vf>(23 * 0.69314718056f) : number<vf>(0.0f));
  y = x == 0.0f ? number<vf>(-INFINITY) : y;
  y = x < 0.0f ? number<vf>(NAN) : y;
  y = x == INFINITY ? x : y;
  return x == x ? y : x;
}
#endif
FUSEDVAE_INLINE vd logarithm(vd x) {
  return by_lane(x, [](double lane) FUSEDVAE_LAMBDA { return std::log(lane); });
}

// sqrt(-2 ln u) for u in [2^-32, 1].
FUSEDVAE_INLINE vf radius_of(vf u) {
  return root(-2.0f * log_normal(u));
}

// ln(1 + x) for x in [-1, 1]: what the sum loses to rounding comes back as a correction.
FUSEDVAE_INLINE vf logarithm_of_1_plus(vf x) {
  const vf sum = 1.0f + x;
  const vf y = log_normal(sum) + (x - (sum - 1.0f)) / sum;
  return sum > 0.0f ? y : sum == 0.0f ? number<vf>(-INFINITY) : number<vf>(NAN);
}
FUSEDVAE_INLINE vd logarithm_of_1_plus(vd x) {
  return by_lane(x, [](double lane) FUSEDVAE_LAMBDA { return std::log1p(lane); });
}
// The same for x in [0, 1], with 1 / (1 + x).
FUSEDVAE_INLINE vf logarithm_of_1_plus(vf x, vf inverse) {
  const vf sum = 1.0f + x;
  return log_normal(sum) + (x - (sum - 1.0f)) * inverse;
}
FUSEDVAE_INLINE vd logarithm_of_1_plus(vd x, vd /*inverse*/) {
  return logarithm_of_1_plus(x);
}

// sin and cos of 2 pi u for u in [0, 1]: the nearest quarter turn comes off exactly, so no angle is ever rounded.
FUSEDVAE_INLINE void sincos_turns(vf u, vf* sine, vf* cosine) {
  const vi quarter = to_int(u * 4.0f + 0.5f);
  const vf a = (u - to_float(quarter) * 0.25f) * 6.28318531f;  // within +-pi/4
  const vf z = a * a;
  vf s = z * -1.9515295891e-4f + 8.3321608736e-3f;
  s = s * z - 1.6666654611e-1f;
  s = s * z * a + a;
  vf c = z * 2.443315711809948e-5f - 1.388731625493765e-3f;
  c = c * z + 4.166664568298827e-2f;
  c = c * z * z - 0.5f * z + 1.0f;
  const vi odd = (quarter << 31) >> 31;
  const vi s_bits = float_to_bits(s), c_bits = float_to_bits(c);
  const vi swap = (s_bits ^ c_bits) & odd;
  const vi negate_sine = (quarter << 30) & INT32_MIN;          // quarters 2 and 3
  const vi negate_cosine = ((quarter + 1) << 30) & INT32_MIN;  // quarters 1 and 2
  *sine = bits_to_float((s_bits ^ swap) ^ negate_sine);
  *cosine = bits_to_float((c_bits ^ swap) ^ negate_cosine);
}

// The full product of each 64-bit lane's low half and m.
FUSEDVAE_INLINE vq mul32(vq a, uint32_t m) {
  [[maybe_unused]] const vq b = vq{} + static_cast<uint64_t>(m);
#if defined(__AVX512F__)
  return reinterpret_cast<vq>(_mm512_mul_epu32(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#elif defined(__AVX2__)
  return reinterpret_cast<vq>(_mm256_mul_epu32(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
#elif defined(__x86_64__)
  return reinterpret_cast<vq>(_mm_mul_epu32(reinterpret_cast<__m128i>(a), reinterpret_cast<__m128i>(b)));
#elif defined(__aarch64__)
  return reinterpret_cast<vq>(vmull_u32(vmovn_u64(reinterpret_cast<uint64x2_t>(a)), vdup_n_u32(m)));
#else
  return (a & 0xFFFFFFFFu) * b;
#endif
}

// The low halves of two vectors of 64-bit lanes, shifted right by one: kLanes integers below 2^31.
FUSEDVAE_INLINE vi half_words(vq first, vq second) {
  const vi a = reinterpret_cast<vi>(first), b = reinterpret_cast<vi>(second);
#if defined(__AVX512F__)
  const vi words = FUSEDVAE_SHUFFLE(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
#elif defined(__AVX2__)
  const vi words = FUSEDVAE_SHUFFLE(a, b, 0, 2, 4, 6, 8, 10, 12, 14);
#else
  const vi words = FUSEDVAE_SHUFFLE(a, b, 0, 2, 4, 6);
#endif
  return reinterpret_cast<vi>(reinterpret_cast<vu>(words) >> 1);
}

// Lanes of a and b by turns: a0 b0 a1 b1 ..., in two vectors.
FUSEDVAE_INLINE void interleave(vf a, vf b, vf* low, vf* high) {
#if defined(__AVX512F__)
  *low = FUSEDVAE_SHUFFLE(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  *high = FUSEDVAE_SHUFFLE(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#elif defined(__AVX2__)
  *low = FUSEDVAE_SHUFFLE(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
  *high = FUSEDVAE_SHUFFLE(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
#else
  *low = FUSEDVAE_SHUFFLE(a, b, 0, 4, 1, 5);
  *high = FUSEDVAE_SHUFFLE(a, b, 2, 6, 3, 7);
#endif
}

// The sums of neighbours: a0 + a1, a2 + a3, ..., b0 + b1, ...
FUSEDVAE_INLINE vf add_pairs(vf a, vf b) {
#if defined(__AVX512F__)
  return FUSEDVAE_SHUFFLE(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
         FUSEDVAE_SHUFFLE(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
#elif defined(__AVX2__)
  return FUSEDVAE_SHUFFLE(a, b, 0, 2, 4, 6, 8, 10, 12, 14) + FUSEDVAE_SHUFFLE(a, b, 1, 3, 5, 7, 9, 11, 13, 15);
#else
  return FUSEDVAE_SHUFFLE(a, b, 0, 2, 4, 6) + FUSEDVAE_SHUFFLE(a, b, 1, 3, 5, 7);
#endif
}

}  // namespace FUSEDVAE_NAMESPACE
}  // namespace fusedvae
