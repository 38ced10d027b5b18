// IEEE half precision, as CUDA has it: storage, and conversions that round to nearest, ties to even.
#pragma once

#include "cuda_runtime.h"

struct __half {
  uint16_t bits;
};
struct alignas(4) __half2 {
  __half x, y;
};

inline float __half2float(__half h) {
  const float sign = h.bits & 0x8000 ? -1.0f : 1.0f;
  const int exponent = h.bits >> 10 & 31, fraction = h.bits & 1023;
  if (exponent == 31 && fraction) return __uint_as_float((h.bits & 0x8000u) << 16 | 0x7F800000u | fraction << 13);
  if (exponent == 31) return sign * INFINITY;
  if (exponent == 0) return sign * std::ldexp(static_cast<float>(fraction), -24);
  return sign * std::ldexp(static_cast<float>(1024 + fraction), exponent - 25);
}

inline __half __float2half_rn(float v) {
  const unsigned sign = __float_as_uint(v) >> 16 & 0x8000u;
  const auto half = [sign](unsigned magnitude) { return __half{static_cast<uint16_t>(sign | magnitude)}; };
  if (std::isnan(v)) return {0x7FFF};
  if (std::isinf(v)) return half(0x7C00);
  if (v == 0) return half(0);
  // In units of the last place that a half of this size has; subnormal ones share that of the smallest normal.
  const int exponent = std::fmax(std::ilogb(v), -14);
  const unsigned units = static_cast<unsigned>(std::nearbyint(std::ldexp(std::fabs(v), 10 - exponent)));
  const unsigned rounded = (static_cast<unsigned>(exponent + 14) << 10) + units;  // units carry into the exponent
  return half(rounded < 0x7C00 ? rounded : 0x7C00);
}
inline __half __float2half(float v) {
  return __float2half_rn(v);
}
inline __half2 __floats2half2_rn(float low, float high) {
  return {__float2half_rn(low), __float2half_rn(high)};
}
