// Of CUDA's language and runtime library, what the kernels use, for the host's compiler. See emulation.h.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "emulation.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
// See shared_memory_of in emulation.cpp.
#define __shared__ static thread_local

#define threadIdx (::emulation::current.thread)
#define blockIdx (::emulation::current.block)
#define blockDim (::emulation::current.block_size)
#define gridDim (::emulation::current.grid_size)
constexpr int warpSize = emulation::kWarpSize;

// --- vector types -----------------------------------------------------------------------------------------------

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) {
  return {x, y};
}
inline float4 make_float4(float x, float y, float z, float w) {
  return {x, y, z, w};
}
inline double2 make_double2(double x, double y) {
  return {x, y};
}
inline uint2 make_uint2(unsigned x, unsigned y) {
  return {x, y};
}
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) {
  return {x, y, z, w};
}

// --- barriers, shuffles and votes -------------------------------------------------------------------------------

inline void __syncthreads() {
  emulation::wait_for_block(false);
}
inline int __syncthreads_count(int predicate) {
  return emulation::wait_for_block(predicate != 0);
}
inline int __syncthreads_or(int predicate) {
  return emulation::wait_for_block(predicate != 0) != 0;
}
inline int __syncthreads_and(int predicate) {
  return emulation::wait_for_block(predicate == 0) == 0;
}
inline void __syncwarp(unsigned mask = 0xFFFFFFFFu) {
  emulation::trade("__syncwarp", mask, 0, 0);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return emulation::trade("__ballot_sync", mask, predicate != 0, 0).votes;
}
inline int __any_sync(unsigned mask, int predicate) {
  return emulation::trade("__any_sync", mask, predicate != 0, 0).votes != 0;
}
inline int __all_sync(unsigned mask, int predicate) {
  return emulation::trade("__all_sync", mask, predicate == 0, 0).votes == 0;
}

namespace emulation {

template <class T>
T shuffle(const char* operation, unsigned mask, T value, int source, int width) {
  static_assert(std::is_arithmetic<T>::value, "shuffles are of numbers");
  if (width < 1 || width > kWarpSize || (width & (width - 1))) fail("%s: width %d", operation, width);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = trade(operation, mask, bits, source).value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace emulation

// A segment of `width` lanes trades among itself; where the source would be outside, a lane gets its own value.
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize) {
  const int lane = emulation::current.lane, segment = lane & -width;
  return emulation::shuffle("__shfl_sync", mask, value, segment + (source & (width - 1)), width);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize) {
  const int lane = emulation::current.lane, source = lane - static_cast<int>(delta);
  return emulation::shuffle("__shfl_up_sync", mask, value, source < (lane & -width) ? lane : source, width);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize) {
  const int lane = emulation::current.lane, source = lane + static_cast<int>(delta);
  return emulation::shuffle("__shfl_down_sync", mask, value, source < (lane & -width) + width ? source : lane, width);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = warpSize) {
  const int lane = emulation::current.lane, source = lane ^ lanes;
  return emulation::shuffle("__shfl_xor_sync", mask, value, source < (lane & -width) + width ? source : lane, width);
}

// --- memory -----------------------------------------------------------------------------------------------------

inline void __threadfence() {}
inline void __threadfence_block() {}

namespace emulation {

template <class T>
T* aligned(T* address) {
  if (reinterpret_cast<uintptr_t>(address) % sizeof(T)) fail("%zu bytes at %p, misaligned", sizeof(T), address);
  return address;
}

}  // namespace emulation

// Loads and stores that advise the caches.
template <class T>
T __ldg(const T* address) {
  return *emulation::aligned(address);
}
template <class T>
T __ldcs(const T* address) {
  return *emulation::aligned(address);
}
template <class T>
T __ldcg(const T* address) {
  return *emulation::aligned(address);
}
template <class T>
void __stcs(T* address, T value) {
  *emulation::aligned(address) = value;
}

// Atomics: a thread loses the processor only at barriers. The race check need not look at them.
#define FUSEDVAE_ATOMIC \
  template <class T>    \
  __attribute__((no_sanitize("thread")))
FUSEDVAE_ATOMIC T atomicAdd(T* address, std::common_type_t<T> value) {
  const T old = *emulation::aligned(address);
  *address = old + value;
  return old;
}
FUSEDVAE_ATOMIC T atomicExch(T* address, std::common_type_t<T> value) {
  const T old = *emulation::aligned(address);
  *address = value;
  return old;
}
FUSEDVAE_ATOMIC T atomicInc(T* address, std::common_type_t<T> limit) {
  const T old = *emulation::aligned(address);
  *address = old >= limit ? 0 : old + 1;
  return old;
}
#undef FUSEDVAE_ATOMIC

// --- numbers ----------------------------------------------------------------------------------------------------

namespace emulation {

template <class To, class From>
To bits_as(From value) {
  static_assert(sizeof(To) == sizeof(From), "bits of one size");
  To bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

}  // namespace emulation

inline unsigned __float_as_uint(float v) {
  return emulation::bits_as<unsigned>(v);
}
inline float __uint_as_float(unsigned v) {
  return emulation::bits_as<float>(v);
}
inline int __float_as_int(float v) {
  return emulation::bits_as<int>(v);
}
inline float __int_as_float(int v) {
  return emulation::bits_as<float>(v);
}
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32);
}

// --- the runtime library ----------------------------------------------------------------------------------------

using cudaStream_t = struct CUstream_st*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = emulation::kInvalidConfiguration };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrMaxThreadsPerMultiProcessor };

inline cudaError_t cudaGetLastError() {
  const int error = emulation::error;
  emulation::error = cudaSuccess;
  return static_cast<cudaError_t>(error);
}
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "invalid configuration argument";
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int) {
  return cudaSuccess;
}
// A small GPU, so that grids are small too; with a number of multiprocessors that is no power of two.
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? 3 : 2048;
  return cudaSuccess;
}
