// Arrays of one dtype to and from arrays of the working type (float or double).
#pragma once

#include <cstdint>

#include "cpu/simd.h"
#include "operand.h"

namespace fusedvae {
namespace FUSEDVAE_NAMESPACE {

struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

FUSEDVAE_INLINE float widen(float v) {
  return v;
}
FUSEDVAE_INLINE double widen(double v) {
  return v;
}
FUSEDVAE_INLINE float widen(uint8_t v) {
  return v;
}
FUSEDVAE_INLINE float as_float(uint32_t bits) {
  float v;
  __builtin_memcpy(&v, &bits, 4);
  return v;
}
FUSEDVAE_INLINE uint32_t as_bits(float v) {
  uint32_t bits;
  __builtin_memcpy(&bits, &v, 4);
  return bits;
}
FUSEDVAE_INLINE float widen(Bf16 v) {
  return as_float(static_cast<uint32_t>(v.bits) << 16);
}
FUSEDVAE_INLINE float widen(F16 v) {
#if defined(__F16C__)
  return _cvtsh_ss(v.bits);
#elif defined(__aarch64__)
  __fp16 half;
  __builtin_memcpy(&half, &v.bits, sizeof half);
  return half;
#else
  // Exponent and mantissa, rebased; subnormals by way of 1/2, which has them for its last bits; infinity and NaN apart.
  const uint32_t magnitude = static_cast<uint32_t>(v.bits & 0x7FFF) << 13;
  const uint32_t sign = static_cast<uint32_t>(v.bits & 0x8000) << 16;
  const uint32_t normal = magnitude + 0x38000000u;
  const uint32_t subnormal = as_bits(as_float(0x3F000000u | (v.bits & 0x7FFF)) - 0.5f);
  const uint32_t finite = magnitude < 0x00800000u ? subnormal : normal;
  const uint32_t special = magnitude | 0x7F800000u;
  return as_float(sign | (magnitude >= 0x0F800000u ? special : finite));
#endif
}

FUSEDVAE_INLINE void narrow(float v, float* out) {
  *out = v;
}
FUSEDVAE_INLINE void narrow(double v, double* out) {
  *out = v;
}
FUSEDVAE_INLINE void narrow(float v, double* out) {
  *out = v;
}
FUSEDVAE_INLINE void narrow(double v, float* out) {
  *out = static_cast<float>(v);
}
FUSEDVAE_INLINE void narrow(float v, Bf16* out) {
  // Round to nearest, ties to even; a NaN stays one.
  const uint32_t bits = as_bits(v);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1)) >> 16;
  out->bits = static_cast<uint16_t>(v == v ? rounded : (bits >> 16) | 0x40u);
}
FUSEDVAE_INLINE void narrow(float v, F16* out) {
#if defined(__F16C__)
  out->bits = static_cast<uint16_t>(_cvtss_sh(v, 0));
#elif defined(__aarch64__)
  const __fp16 half = static_cast<__fp16>(v);
  __builtin_memcpy(&out->bits, &half, sizeof half);
#else
  const uint32_t bits = as_bits(v), magnitude = bits & 0x7FFFFFFFu;
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  uint16_t half;
  if (magnitude > 0x7F800000u) {
    half = 0x7E00;
  } else if (magnitude >= 0x477FF000u) {  // 65520 and up round to infinity
    half = 0x7C00;
  } else if (magnitude < 0x38800000u) {  // subnormal: adding 1/2 leaves the rounded mantissa in the low bits
    half = static_cast<uint16_t>(as_bits(as_float(magnitude) + 0.5f) - 0x3F000000u);
  } else {
    half = static_cast<uint16_t>((magnitude - 0x38000000u + 0xFFFu + ((magnitude >> 13) & 1)) >> 13);
  }
  out->bits = static_cast<uint16_t>(sign | half);
#endif
}
// By way of float, as PyTorch converts.
FUSEDVAE_INLINE void narrow(double v, Bf16* out) {
  narrow(static_cast<float>(v), out);
}
FUSEDVAE_INLINE void narrow(double v, F16* out) {
  narrow(static_cast<float>(v), out);
}

// Outputs are never integers.
FUSEDVAE_INLINE void narrow(float, uint8_t*) {}
FUSEDVAE_INLINE void narrow(double, uint8_t*) {}

template <class T, class S>
FUSEDVAE_INLINE void widen_array(const S* in, T* out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = static_cast<T>(widen(in[i]));
}
template <class T, class S>
FUSEDVAE_INLINE void narrow_array(const T* in, S* out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) narrow(in[i], out + i);
}

// Loads and stores of vectors from and to 16 bits.
#if defined(__F16C__) || defined(__aarch64__)
typedef uint16_t vh __attribute__((vector_size(kLanes * 2)));

FUSEDVAE_INLINE vf widen(vh v, Bf16*) {
  return reinterpret_cast<vf>(__builtin_convertvector(v, vu) << 16);
}
// The upper 16 bits of each lane.
FUSEDVAE_INLINE vh upper_halves(vu v) {
#if defined(__AVX512F__)
  const __m512i odd = _mm512_set_epi16(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 31, 29, 27, 25, 23, 21, 19, 17,
                                       15, 13, 11, 9, 7, 5, 3, 1);
  return reinterpret_cast<vh>(_mm512_castsi512_si256(_mm512_permutexvar_epi16(odd, reinterpret_cast<__m512i>(v))));
#elif defined(__AVX2__)
  const __m256i odd = _mm256_setr_epi8(2, 3, 6, 7, 10, 11, 14, 15, -1, -1, -1, -1, -1, -1, -1, -1, 2, 3, 6, 7, 10, 11,
                                       14, 15, -1, -1, -1, -1, -1, -1, -1, -1);
  const __m256i in_halves = _mm256_shuffle_epi8(reinterpret_cast<__m256i>(v), odd);
  return reinterpret_cast<vh>(_mm256_castsi256_si128(_mm256_permute4x64_epi64(in_halves, 0x08)));
#else
  return __builtin_convertvector(v >> 16, vh);
#endif
}
// (A NaN that arithmetic made is quiet, and stays one when its lower bits are cut off.)
FUSEDVAE_INLINE vh narrow(vf v, Bf16*) {
  const vu bits = reinterpret_cast<vu>(v), half = 0x7FFFu + ((bits >> 16) & 1);
  return upper_halves(bits + (v == v ? half : vu{}));
}
FUSEDVAE_INLINE vf widen(vh v, F16*) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(reinterpret_cast<__m256i>(v));
#elif defined(__F16C__)
  return _mm256_cvtph_ps(reinterpret_cast<__m128i>(v));
#else
  return vcvt_f32_f16(reinterpret_cast<float16x4_t>(v));
#endif
}
FUSEDVAE_INLINE vh narrow(vf v, F16*) {
#if defined(__AVX512F__)
  return reinterpret_cast<vh>(_mm512_cvtps_ph(v, 0));
#elif defined(__F16C__)
  return reinterpret_cast<vh>(_mm256_cvtps_ph(v, 0));
#else
  return reinterpret_cast<vh>(vcvt_f16_f32(v));
#endif
}

template <class V>
FUSEDVAE_INLINE vf load(const Bf16* p) {
  return widen(load<vh>(&p->bits), static_cast<Bf16*>(nullptr));
}
template <class V>
FUSEDVAE_INLINE vf load(const F16* p) {
  return widen(load<vh>(&p->bits), static_cast<F16*>(nullptr));
}
FUSEDVAE_INLINE void store(Bf16* p, vf v) {
  store(&p->bits, narrow(v, p));
}
FUSEDVAE_INLINE void store(F16* p, vf v) {
  store(&p->bits, narrow(v, p));
}

// (Compilers find no vectors for F16 themselves, and longer ways to round to Bf16.)
template <class Half>
FUSEDVAE_INLINE void narrow_to_half(const float* in, Half* out, int64_t count) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(out + i, load<vf>(in + i));
  for (; i < count; ++i) narrow(in[i], out + i);
}
FUSEDVAE_INLINE void narrow_array(const float* in, Bf16* out, int64_t count) {
  narrow_to_half(in, out, count);
}
FUSEDVAE_INLINE void narrow_array(const float* in, F16* out, int64_t count) {
  narrow_to_half(in, out, count);
}
FUSEDVAE_INLINE void widen_array(const F16* in, float* out, int64_t count) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(out + i, load<vf>(in + i));
  for (; i < count; ++i) out[i] = widen(in[i]);
}
#endif

// Calls f with a null pointer of the C++ type behind a dtype.
template <class F>
FUSEDVAE_INLINE void with_type(DType dtype, const F& f) {
  switch (dtype) {
    case DType::f32:
      return f(static_cast<float*>(nullptr));
    case DType::f64:
      return f(static_cast<double*>(nullptr));
    case DType::bf16:
      return f(static_cast<Bf16*>(nullptr));
    case DType::f16:
      return f(static_cast<F16*>(nullptr));
    case DType::u8:
      return f(static_cast<uint8_t*>(nullptr));
  }
}

template <class T>
constexpr DType dtype_of();
template <>
constexpr DType dtype_of<float>() {
  return DType::f32;
}
template <>
constexpr DType dtype_of<double>() {
  return DType::f64;
}

// One element of an operand, for the handful of values that no loop is worth.
static inline double get(const Operand& op, int64_t offset) {
  if (!op.data) return op.value;
  double value = 0;
  with_type(op.dtype,
            [&](auto* type) { value = static_cast<double>(widen(static_cast<decltype(type)>(op.data)[offset])); });
  return value;
}
static inline void put(const Operand& op, int64_t offset, double value) {
  with_type(op.dtype, [&](auto* type) { narrow(value, static_cast<decltype(type)>(op.data) + offset); });
}
// The same for `count` values, the first at element `first * step`, and each `step` elements past the one before.
template <class T>
inline void put_array(const Operand& op, int64_t first, int64_t step, const T* values, int64_t count) {
  with_type(op.dtype, [&](auto* type) {
    auto* data = static_cast<decltype(type)>(op.data) + first * step;
    if (step == 1)
      narrow_array(values, data, count);
    else
      for (int64_t i = 0; i < count; ++i) narrow(values[i], data + i * step);
  });
}

}  // namespace FUSEDVAE_NAMESPACE
}  // namespace fusedvae
