// bfloat16, as CUDA has it: storage, and conversions that round to nearest, ties to even.
#pragma once

#include "cuda_runtime.h"

struct __nv_bfloat16 {
  uint16_t bits;
};
struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};

inline float __bfloat162float(__nv_bfloat16 b) {
  return __uint_as_float(static_cast<unsigned>(b.bits) << 16);
}
inline __nv_bfloat16 __float2bfloat16_rn(float v) {
  if (std::isnan(v)) return {0x7FFF};
  const unsigned bits = __float_as_uint(v), odd = bits >> 16 & 1;
  return {static_cast<uint16_t>((bits + 0x7FFF + odd) >> 16)};
}
inline __nv_bfloat16 __float2bfloat16(float v) {
  return __float2bfloat16_rn(v);
}
inline __nv_bfloat162 __floats2bfloat162_rn(float low, float high) {
  return {__float2bfloat16_rn(low), __float2bfloat16_rn(high)};
}
