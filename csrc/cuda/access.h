// How threads read and write operands: V elements at a time, in accesses of up to 16 bytes.
//
// An Access names the working type T, the dtype in memory (void: looked up at run time) and V. A kernel is compiled
// for the few of them that are chosen from below.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <initializer_list>
#include <type_traits>

#include "operand.h"

#if defined(__CUDACC__)
#define FUSEDVAE_PRAGMA(text) _Pragma(#text)
#define FUSEDVAE_UNROLL FUSEDVAE_PRAGMA(unroll)
#define FUSEDVAE_UNROLL_BY(times) FUSEDVAE_PRAGMA(unroll times)
#else
#define FUSEDVAE_UNROLL
#define FUSEDVAE_UNROLL_BY(times)
#endif

namespace fusedvae {
namespace cuda {

template <class T_, class Storage_, int V_>
struct Access {
  using T = T_;
  using Storage = Storage_;
  static constexpr int V = V_;
};
using AllFloat32 = Access<float, float, 4>;
using AllBfloat16 = Access<float, __nv_bfloat16, 8>;
using AllFloat16 = Access<float, __half, 8>;
using MixedFloat = Access<float, void, 4>;
using MixedFloatScalar = Access<float, void, 1>;
using MixedDoubleScalar = Access<double, void, 1>;

// --- bits and numbers -------------------------------------------------------------------------------------------

// Up to 16 bytes, as they are in memory.
struct Bits {
  uint32_t word[4];
};

template <class To, class From>
__device__ __forceinline__ To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "bits of one size");
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

template <int bytes>
__device__ __forceinline__ Bits load_bits(const char* address) {
  static_assert(bytes == 1 || bytes == 2 || bytes == 4 || bytes == 8 || bytes == 16, "one access");
  if constexpr (bytes == 16) {
    const uint4 q = *reinterpret_cast<const uint4*>(address);
    return {{q.x, q.y, q.z, q.w}};
  } else if constexpr (bytes == 8) {
    const uint2 q = *reinterpret_cast<const uint2*>(address);
    return {{q.x, q.y, 0, 0}};
  } else if constexpr (bytes == 4) {
    return {{*reinterpret_cast<const uint32_t*>(address), 0, 0, 0}};
  } else if constexpr (bytes == 2) {
    return {{*reinterpret_cast<const uint16_t*>(address), 0, 0, 0}};
  } else {
    return {{*reinterpret_cast<const uint8_t*>(address), 0, 0, 0}};
  }
}

template <int bytes>
__device__ __forceinline__ void store_bits(char* address, const Bits& bits) {
  if constexpr (bytes == 16)
    *reinterpret_cast<uint4*>(address) = make_uint4(bits.word[0], bits.word[1], bits.word[2], bits.word[3]);
  else if constexpr (bytes == 8)
    *reinterpret_cast<uint2*>(address) = make_uint2(bits.word[0], bits.word[1]);
  else if constexpr (bytes == 4)
    *reinterpret_cast<uint32_t*>(address) = bits.word[0];
  else if constexpr (bytes == 2)
    *reinterpret_cast<uint16_t*>(address) = static_cast<uint16_t>(bits.word[0]);
  else
    *reinterpret_cast<uint8_t*>(address) = static_cast<uint8_t>(bits.word[0]);
}

// Element j of the bits, of type S. `j` is known when compiling, once loops are unrolled.
template <class T, class S>
__device__ __forceinline__ T widen(const Bits& bits, int j) {
  if constexpr (std::is_same_v<S, double>) {
    const uint64_t high = bits.word[2 * j + 1];
    return static_cast<T>(bits_as<double>(high << 32 | bits.word[2 * j]));
  } else if constexpr (std::is_same_v<S, float>) {
    return __uint_as_float(bits.word[j]);
  } else if constexpr (std::is_same_v<S, __nv_bfloat16>) {
    return __uint_as_float(j % 2 ? bits.word[j / 2] & 0xFFFF0000u : bits.word[j / 2] << 16);
  } else if constexpr (std::is_same_v<S, __half>) {
    return __half2float(bits_as<__half>(static_cast<uint16_t>(bits.word[j / 2] >> (j % 2 * 16))));
  } else {
    return static_cast<T>(bits.word[j / 4] >> (j % 4 * 8) & 0xFFu);
  }
}

// Puts a number into element j of bits that are zero there.
template <class T, class S>
__device__ __forceinline__ void narrow(T value, Bits& bits, int j) {
  if constexpr (std::is_same_v<S, double>) {
    const uint64_t whole = bits_as<uint64_t>(static_cast<double>(value));
    bits.word[2 * j] = static_cast<uint32_t>(whole);
    bits.word[2 * j + 1] = static_cast<uint32_t>(whole >> 32);
  } else if constexpr (std::is_same_v<S, float>) {
    bits.word[j] = __float_as_uint(static_cast<float>(value));
  } else {
    uint32_t half = 0;
    if constexpr (std::is_same_v<S, __nv_bfloat16>)
      half = bits_as<uint16_t>(__float2bfloat16_rn(static_cast<float>(value)));
    else
      half = bits_as<uint16_t>(__float2half_rn(static_cast<float>(value)));
    bits.word[j / 2] |= half << (j % 2 * 16);
  }
}

// Calls f with a null pointer of the dtype's type.
template <class F>
__device__ __forceinline__ void with_type(DType dtype, const F& f) {
  switch (dtype) {
    case DType::f32:
      return f(static_cast<float*>(nullptr));
    case DType::f64:
      return f(static_cast<double*>(nullptr));
    case DType::bf16:
      return f(static_cast<__nv_bfloat16*>(nullptr));
    case DType::f16:
      return f(static_cast<__half*>(nullptr));
    case DType::u8:
      return f(static_cast<uint8_t*>(nullptr));
  }
}

// V elements that make more than 16 bytes do not occur: accesses are to fewer then.
template <int V, class S>
constexpr bool kFits = V * sizeof(S) <= 16;

template <int V>
__device__ __forceinline__ Bits load(const char* address, DType dtype) {
  Bits bits{};
  with_type(dtype, [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    if constexpr (kFits<V, S>) bits = load_bits<V * sizeof(S)>(address);
  });
  return bits;
}

// A single element of an operand, or the number that it is.
template <class T>
__device__ __forceinline__ T get(const Operand& op, int64_t offset) {
  if (op.data == nullptr) return static_cast<T>(op.value);
  T value{};
  with_type(op.dtype, [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    const char* const address = static_cast<const char*>(op.data) + offset * static_cast<int64_t>(sizeof(S));
    value = widen<T, S>(load_bits<sizeof(S)>(address), 0);
  });
  return value;
}

// Outputs are never integers.
template <class T>
__device__ __forceinline__ void put(const Operand& op, int64_t offset, T value) {
  with_type(op.dtype, [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    if constexpr (!std::is_same_v<S, uint8_t>) {
      Bits bits{};
      narrow<T, S>(value, bits, 0);
      store_bits<sizeof(S)>(static_cast<char*>(op.data) + offset * static_cast<int64_t>(sizeof(S)), bits);
    }
  });
}

// --- positions --------------------------------------------------------------------------------------------------

// Coordinates of an element.
struct Position {
  int64_t batch, outer, inner;
};

__device__ __forceinline__ Position position_of(int64_t element, const Extent& extent) {
  if (extent.batch == 1 && extent.outer == 1) return {0, 0, element};
  // A 64-bit division takes a hundred instructions.
  if (element <= UINT32_MAX && extent.inner <= UINT32_MAX && extent.outer <= UINT32_MAX) {
    const uint32_t e = static_cast<uint32_t>(element), inner = static_cast<uint32_t>(extent.inner);
    const uint32_t outer = static_cast<uint32_t>(extent.outer), row = e / inner, batch = row / outer;
    return {batch, row - batch * outer, e - row * inner};
  }
  const int64_t row = element / extent.inner, batch = row / extent.outer;
  return {batch, row - batch * extent.outer, element - row * extent.inner};
}

__device__ __forceinline__ int64_t offset_of(const Operand& op, const Position& at) {
  return at.batch * op.stride[0] + at.outer * op.stride[1] + at.inner * op.stride[2];
}

// --- operands ---------------------------------------------------------------------------------------------------

template <class A>
struct Lanes {
  typename A::T at[A::V];
};

// An operand's elements, as they are in memory. Fetching and unpacking are apart, so that a thread can have several
// fetches under way.
template <class A>
__device__ __forceinline__ Bits fetch(const Operand& op, const Position& at) {
  if (op.data == nullptr) return Bits{};
  const int64_t offset = offset_of(op, at);
  const char* const data = static_cast<const char*>(op.data);
  if (A::V == 1 || op.stride[2] == 0) return load<1>(data + offset * size_of(op.dtype), op.dtype);
  if constexpr (std::is_void_v<typename A::Storage>)
    return load<A::V>(data + offset * size_of(op.dtype), op.dtype);
  else
    return load_bits<16>(data + offset * static_cast<int64_t>(sizeof(typename A::Storage)));
}

// Their values; those of a number, if it is one, and 0 for an operand that was not given.
template <class A>
__device__ __forceinline__ Lanes<A> unpack(const Operand& op, const Bits& bits) {
  using T = typename A::T;
  Lanes<A> lanes{};
  if (op.data == nullptr || op.stride[2] == 0) {
    T value = static_cast<T>(op.value);
    if (op.data)
      with_type(op.dtype, [&](auto* type) { value = widen<T, std::remove_pointer_t<decltype(type)>>(bits, 0); });
    FUSEDVAE_UNROLL
    for (int j = 0; j < A::V; ++j) lanes.at[j] = value;
  } else if constexpr (std::is_void_v<typename A::Storage>) {
    with_type(op.dtype, [&](auto* type) {
      using S = std::remove_pointer_t<decltype(type)>;
      if constexpr (kFits<A::V, S>) {
        FUSEDVAE_UNROLL
        for (int j = 0; j < A::V; ++j) lanes.at[j] = widen<T, S>(bits, j);
      }
    });
  } else {
    FUSEDVAE_UNROLL
    for (int j = 0; j < A::V; ++j) lanes.at[j] = widen<T, typename A::Storage>(bits, j);
  }
  return lanes;
}

// Of an operand that is mostly one number: that is read once. 1 if it was not given.
template <class A>
class Factor {
 public:
  using T = typename A::T;
  __device__ __forceinline__ explicit Factor(const Operand& op)
      : op_(op),
        is_uniform_(op.is_uniform()),
        one_(!op.given     ? T(1)
             : is_uniform_ ? get<T>(op, 0)
                           : T(0)) {}
  __device__ __forceinline__ Lanes<A> at(const Position& position) const {
    T value = one_;
    if (!is_uniform_) {
      if (op_.stride[2] != 0) return unpack<A>(op_, fetch<A>(op_, position));
      value = get<T>(op_, offset_of(op_, position));
    }
    Lanes<A> lanes;
    FUSEDVAE_UNROLL
    for (int j = 0; j < A::V; ++j) lanes.at[j] = value;
    return lanes;
  }

 private:
  const Operand& op_;
  const bool is_uniform_;
  const T one_;
};

// Writes an operand's elements, unless it was not given.
template <class A>
__device__ __forceinline__ void write(const Operand& op, const Position& at, const Lanes<A>& lanes) {
  if (!op.given) return;
  const auto pack = [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    if constexpr (!std::is_same_v<S, uint8_t> && kFits<A::V, S>) {
      char* const address = static_cast<char*>(op.data) + offset_of(op, at) * static_cast<int64_t>(sizeof(S));
      Bits bits{};
      FUSEDVAE_UNROLL
      for (int j = 0; j < A::V; ++j) narrow<typename A::T, S>(lanes.at[j], bits, j);
      store_bits<A::V * sizeof(S)>(address, bits);
    }
  };
  if constexpr (std::is_void_v<typename A::Storage>)
    with_type(op.dtype, pack);
  else
    pack(static_cast<typename A::Storage*>(nullptr));
}

// --- the choice of an access, on the host -----------------------------------------------------------------------

// What an access must suit: the working type, and how the operands lie that a kernel goes over.
class Layouts {
 public:
  explicit Layouts(bool in_double) : in_double_(in_double) {}
  void add(const Extent& extent, std::initializer_list<const Operand*> operands) {
    for (const Operand* op : operands) {
      if (op->data == nullptr) continue;
      if (op->is_uniform() || op->stride[2] == 0) continue;
      all_one_ &= !some_ || op->dtype == dtype_;
      dtype_ = op->dtype;
      some_ = true;
      if (op->dtype == DType::f64 && !in_double_) limit(1);  // four of them would be more than 16 bytes
      for (int v = 8; v > 1; v /= 2)
        if (reinterpret_cast<uintptr_t>(op->data) % static_cast<uintptr_t>(v * size_of(op->dtype))) limit(v / 2);
      limit_to_divisor(extent.batch, op->stride[0]);
      limit_to_divisor(extent.outer, op->stride[1]);
    }
    limit_to_divisor(2, extent.inner);
  }
  // Noise that is made: V elements must be made together. Where an offset on the device leads to, nobody knows here.
  void add_noise(const Extent& extent, const IndexStrides& index, const Operand& offset) {
    if ((index.inner != 1 && extent.inner != 1) || offset.data) limit(1);
    const int64_t first = static_cast<int64_t>(offset.value);
    if (first % 4) limit(first % 2 ? 1 : 2);
    for (const int64_t step : {extent.batch > 1 ? index.batch : 0, extent.outer > 1 ? index.outer : 0})
      if (step % 4) limit(step % 2 ? 1 : 2);
  }
  bool in_double() const { return in_double_; }
  int width() const { return width_; }
  bool all(DType dtype) const { return !in_double_ && all_one_ && (!some_ || dtype_ == dtype); }

 private:
  void limit(int v) { width_ = v < width_ ? v : width_; }
  void limit_to_divisor(int64_t size, int64_t step) {
    for (int v = 8; v > 1; v /= 2)
      if (size > 1 && step % v) limit(v / 2);
  }
  const bool in_double_;
  bool all_one_ = true, some_ = false;
  DType dtype_ = DType::f32;
  int width_ = 8;
};

// Calls f with the widest access to operands of any dtypes, for arithmetic in float32.
template <class F>
void with_mixed_float_access(const Layouts& layouts, const F& f) {
  layouts.width() >= 4 ? f(MixedFloat{}) : f(MixedFloatScalar{});
}

// For any arithmetic: that in float64 is there for exactness, not speed, and goes one element at a time.
template <class F>
void with_mixed_access(const Layouts& layouts, const F& f) {
  layouts.in_double() ? f(MixedDoubleScalar{}) : with_mixed_float_access(layouts, f);
}

// Calls f with the widest access to operands of one dtype, and returns true, if that is what they are.
template <class F>
bool with_single_access(const Layouts& layouts, const F& f) {
  if (layouts.width() >= 8 && layouts.all(DType::bf16))
    f(AllBfloat16{});
  else if (layouts.width() >= 8 && layouts.all(DType::f16))
    f(AllFloat16{});
  else if (layouts.width() >= 4 && layouts.all(DType::f32))
    f(AllFloat32{});
  else
    return false;
  return true;
}

}  // namespace cuda
}  // namespace fusedvae
