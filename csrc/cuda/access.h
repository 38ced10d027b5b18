// How threads read and write operands: V elements at a time, in accesses of up to 16 bytes.
//
// An Access names the working type T, the dtype in memory (void: looked up at run time), V, and whether operands are
// flat: each row of theirs lies in one stretch, or is one value. Then an offset within a row serves them all. A
// kernel is compiled for the few accesses that are chosen from below.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <initializer_list>
#include <type_traits>

#include "operand.h"

#define FUSEDVAE_PRAGMA(text) _Pragma(#text)
#define FUSEDVAE_UNROLL FUSEDVAE_PRAGMA(unroll)
#define FUSEDVAE_UNROLL_BY(times) FUSEDVAE_PRAGMA(unroll times)

namespace fusedvae {
namespace cuda {

template <class T_, class Storage_, int V_, bool is_flat_>
struct Access {
  using T = T_;
  using Storage = Storage_;
  static constexpr int V = V_;
  static constexpr bool kIsFlat = is_flat_;
};
using FlatFloat32 = Access<float, float, 4, true>;
using FlatBfloat16 = Access<float, __nv_bfloat16, 8, true>;
using FlatFloat16 = Access<float, __half, 8, true>;
using MixedFloat = Access<float, void, 4, false>;
using MixedFloatScalar = Access<float, void, 1, false>;
using MixedDoubleScalar = Access<double, void, 1, false>;

// --- bits and numbers -------------------------------------------------------------------------------------------

// Up to 16 bytes, as they are in memory.
struct Bits {
  uint32_t word[4];
};

template <class To, class From>
__host__ __device__ __forceinline__ To bits_as(From from) {
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

// V numbers as elements of type S. One instruction narrows two to a half precision.
template <class S, int V, class T>
__device__ __forceinline__ Bits narrowed(const T (&values)[V]) {
  Bits bits{};
  if constexpr (sizeof(S) == 2 && V % 2 == 0) {
    FUSEDVAE_UNROLL
    for (int j = 0; j < V; j += 2) {
      const float low = static_cast<float>(values[j]), high = static_cast<float>(values[j + 1]);
      if constexpr (std::is_same_v<S, __nv_bfloat16>)
        bits.word[j / 2] = bits_as<uint32_t>(__floats2bfloat162_rn(low, high));
      else
        bits.word[j / 2] = bits_as<uint32_t>(__floats2half2_rn(low, high));
    }
  } else {
    FUSEDVAE_UNROLL
    for (int j = 0; j < V; ++j) narrow<T, S>(values[j], bits, j);
  }
  return bits;
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

// Wider accesses are never chosen (see Layouts); this keeps them from being compiled.
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

// The same, for what a block seldom comes to, apart from all other code: that of a small problem takes longer to fetch
// than to run, and what is apart is fetched when it is run.
inline __device__ __noinline__ double load_apart(void* data, DType dtype, int64_t offset) {
  Operand op;
  op.data = data;
  op.dtype = dtype;
  return get<double>(op, offset);
}
__device__ __forceinline__ double get_apart(const Operand& op, int64_t offset) {
  return op.data == nullptr ? op.value : load_apart(op.data, op.dtype, offset);
}
inline __device__ __noinline__ void store_apart(void* data, DType dtype, int64_t offset, double value) {
  Operand op;
  op.data = data;
  op.dtype = dtype;
  put(op, offset, value);
}
__device__ __forceinline__ void put_apart(const Operand& op, int64_t offset, double value) {
  store_apart(op.data, op.dtype, offset, value);
}

// --- places -----------------------------------------------------------------------------------------------------

// Coordinates of an element.
struct Position {
  int64_t batch, outer, inner;
};

// Where elements are: coordinates; or, in flat operands, through which a thread advances, how far ahead of it.
template <class A>
using Place = std::conditional_t<A::kIsFlat, int, Position>;

// How often a number, which is not negative, has another in it. A 64-bit division takes a hundred instructions.
__device__ __forceinline__ int64_t quotient_of(int64_t number, int64_t divisor) {
  if (number <= UINT32_MAX && divisor <= UINT32_MAX)
    return static_cast<uint32_t>(number) / static_cast<uint32_t>(divisor);
  return number / divisor;
}

// An element of a row.
__device__ __forceinline__ Position in_row(int64_t row, int64_t inner, const Extent& extent) {
  if (extent.outer == 1) return {row, 0, inner};
  const int64_t batch = quotient_of(row, extent.outer);
  return {batch, row - batch * extent.outer, inner};
}

__device__ __forceinline__ Position position_of(int64_t element, const Extent& extent) {
  if (extent.batch == 1 && extent.outer == 1) return {0, 0, element};
  const int64_t row = quotient_of(element, extent.inner);
  return in_row(row, element - row * extent.inner, extent);
}

// The same column, a row further down.
__device__ __forceinline__ Position below(const Position& at, const Extent& extent) {
  const bool is_last = at.outer + 1 == extent.outer;
  return {at.batch + (is_last ? 1 : 0), is_last ? 0 : at.outer + 1, at.inner};
}

__device__ __forceinline__ int64_t offset_of(const Operand& op, const Position& at) {
  return at.batch * op.stride[0] + at.outer * op.stride[1] + at.inner * op.stride[2];
}

// --- operands ---------------------------------------------------------------------------------------------------

template <class A>
struct Lanes {
  typename A::T at[A::V];

  __device__ __forceinline__ static Lanes of(typename A::T value) {
    Lanes lanes;
    FUSEDVAE_UNROLL
    for (int j = 0; j < A::V; ++j) lanes.at[j] = value;
    return lanes;
  }
};

// The size of an element, where that is known when compiling.
template <class A>
constexpr int64_t kStorageBytes =
    sizeof(std::conditional_t<std::is_void_v<typename A::Storage>, char, typename A::Storage>);

// The address of an element of a flat operand, where a thread begins.
template <class A>
__device__ __forceinline__ char* begin_of(const Operand& op, const Position& at) {
  return static_cast<char*>(op.data) +
         (at.batch * op.stride[0] + at.outer * op.stride[1] + at.inner) * kStorageBytes<A>;
}

// How an operand lies in a chunk, as far as that is known when compiling.
enum class Lie { any, elements, one };

// An operand that is read. It is started at each chunk; then fetching and unpacking are apart, so that a thread can
// have several fetches under way. What is one value for all of a chunk is read at its start.
template <class A>
class Source {
 public:
  using T = typename A::T;

  __device__ __forceinline__ void open(const Operand& op, T absent = T(0)) {
    op_ = &op;
    is_one_ = A::kIsFlat ? op.stride[2] == 0 : op.is_uniform();
    one_ = absent;
    if (!A::kIsFlat && is_one_ && op.given) one_ = get<T>(op, 0);
  }
  __device__ __forceinline__ void start(const Position& at, Lie lie = Lie::any) {
    if constexpr (A::kIsFlat) {
      if (is_one(lie)) {
        if (op_->given) one_ = get<T>(*op_, at.batch * op_->stride[0] + at.outer * op_->stride[1]);
      } else {
        address_ = begin_of<A>(*op_, at);
      }
    }
  }
  __device__ __forceinline__ void advance(int elements) { address_ += elements * kStorageBytes<A>; }
  __device__ __forceinline__ bool is_one(Lie lie = Lie::any) const {
    return lie == Lie::any ? is_one_ : lie == Lie::one;
  }
  __device__ __forceinline__ T one() const { return one_; }

  __device__ __forceinline__ Bits fetch(const Place<A>& at, Lie lie = Lie::any) const {
    if (is_one(lie)) return Bits{};
    if constexpr (A::kIsFlat) {
      return load_bits<A::V * kStorageBytes<A>>(address_ + at * kStorageBytes<A>);
    } else {
      const char* const address = static_cast<const char*>(op_->data) + offset_of(*op_, at) * size_of(op_->dtype);
      return A::V == 1 || op_->stride[2] == 0 ? load<1>(address, op_->dtype) : load<A::V>(address, op_->dtype);
    }
  }
  __device__ __forceinline__ Lanes<A> unpack(const Bits& bits, Lie lie = Lie::any) const {
    if (is_one(lie)) return Lanes<A>::of(one_);
    Lanes<A> lanes{};
    if constexpr (A::kIsFlat) {
      FUSEDVAE_UNROLL
      for (int j = 0; j < A::V; ++j) lanes.at[j] = widen<T, typename A::Storage>(bits, j);
    } else {
      with_type(op_->dtype, [&](auto* type) {
        using S = std::remove_pointer_t<decltype(type)>;
        if (!kFits<A::V, S> || op_->stride[2] == 0) {
          lanes = Lanes<A>::of(widen<T, S>(bits, 0));
        } else if constexpr (kFits<A::V, S>) {
          FUSEDVAE_UNROLL
          for (int j = 0; j < A::V; ++j) lanes.at[j] = widen<T, S>(bits, j);
        }
      });
    }
    return lanes;
  }
  __device__ __forceinline__ Lanes<A> read(const Place<A>& at) const { return unpack(fetch(at)); }

 private:
  const Operand* op_;
  const char* address_ = nullptr;
  bool is_one_;
  T one_;
};

// An operand that is read which, where the others are flat and of one dtype, may have another: bytes, as masks have it,
// or float32, as data do whose reconstruction is in half precision.
template <class A>
class OtherSource {
  using T = typename A::T;

 public:
  __device__ __forceinline__ void open(const Operand& op, T absent = T(0)) {
    if (A::kIsFlat && op.stride[2] != 0) {
      are_bytes_ = op.dtype == DType::u8;
      are_floats_ = op.dtype == DType::f32 && kStorageBytes<A> < 4;
    }
    with_source([&](auto& source) { source.open(op, absent); });
  }
  __device__ __forceinline__ void start(const Position& at) {
    with_source([&](auto& source) { source.start(at); });
  }
  __device__ __forceinline__ void advance(int elements) {
    with_source([&](auto& source) { source.advance(elements); });
  }
  __device__ __forceinline__ Lanes<A> read(const Place<A>& at) const {
    if constexpr (A::kIsFlat) {
      if (are_bytes_) return read_flat(bytes_, at);
      if (are_floats_) return read_flat(floats_, at);
    }
    return source_.read(at);
  }

 private:
  template <class F>
  __device__ __forceinline__ void with_source(const F& f) {
    are_bytes_ ? f(bytes_) : are_floats_ ? f(floats_) : f(source_);
  }
  // In as many accesses as it takes.
  template <class B>
  __device__ __forceinline__ static Lanes<A> read_flat(const Source<B>& source, int at) {
    Lanes<A> lanes;
    FUSEDVAE_UNROLL
    for (int j = 0; j < A::V; j += B::V) {
      const Lanes<B> found = source.read(at + j);
      FUSEDVAE_UNROLL
      for (int k = 0; k < B::V; ++k) lanes.at[j + k] = found.at[k];
    }
    return lanes;
  }
  Source<A> source_;
  Source<Access<T, uint8_t, A::V, true>> bytes_;
  Source<Access<T, float, 4, true>> floats_;
  bool are_bytes_ = false, are_floats_ = false;
};

// An operand whose elements are written, if they are wanted.
template <class A>
class Sink {
 public:
  __device__ __forceinline__ void open(const Operand& op, bool is_wanted) {
    op_ = &op;
    is_wanted_ = is_wanted;
  }
  __device__ __forceinline__ void start(const Position& at) {
    if constexpr (A::kIsFlat) {
      if (is_wanted_) address_ = begin_of<A>(*op_, at);
    }
  }
  __device__ __forceinline__ void advance(int elements) { address_ += elements * kStorageBytes<A>; }
  __device__ __forceinline__ bool is_wanted() const { return is_wanted_; }
  __device__ __forceinline__ void write(const Place<A>& at, const Lanes<A>& lanes) const {
    if (!is_wanted_) return;
    if constexpr (A::kIsFlat) {
      store_bits<16>(address_ + at * kStorageBytes<A>, narrowed<typename A::Storage>(lanes.at));
    } else {
      with_type(op_->dtype, [&](auto* type) {
        using S = std::remove_pointer_t<decltype(type)>;
        if constexpr (!std::is_same_v<S, uint8_t> && kFits<A::V, S>) {
          char* const address = static_cast<char*>(op_->data) + offset_of(*op_, at) * static_cast<int64_t>(sizeof(S));
          store_bits<A::V * sizeof(S)>(address, narrowed<S>(lanes.at));
        }
      });
    }
  }

 private:
  const Operand* op_;
  char* address_ = nullptr;
  bool is_wanted_;
};

// --- the choice of an access, on the host -----------------------------------------------------------------------

// What an access must suit: the working type, and how the operands lie that a kernel goes over.
class Layouts {
 public:
  explicit Layouts(bool in_double) : in_double_(in_double) {}
  // What may have another dtype is read by an OtherSource.
  void add(const Extent& extent, std::initializer_list<const Operand*> operands, bool may_differ = false) {
    for (const Operand* op : operands) {
      if (op->data == nullptr || op->stride[2] == 0) continue;
      if (may_differ) {
        others_ |= bit(op->dtype);
      } else {
        all_one_ &= !some_ || op->dtype == dtype_;
        dtype_ = op->dtype;
        some_ = true;
      }
      if (op->dtype == DType::f64 && !in_double_) limit(1);  // four of them would be more than 16 bytes
      for (int v = 8; v > 1; v /= 2)
        if (reinterpret_cast<uintptr_t>(op->data) % static_cast<uintptr_t>(v * size_of(op->dtype))) limit(v / 2);
      limit_to_divisor(extent.batch, op->stride[0]);
      limit_to_divisor(extent.outer, op->stride[1]);
    }
    are_samples_rows_ &= extent.outer == 1;
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
  bool are_samples_rows() const { return are_samples_rows_; }
  // Whether all are of the dtype; or those are that must be, and there is an OtherSource for the rest.
  bool are_all(DType dtype) const { return suits(dtype) && (others_ & ~bit(dtype)) == 0; }
  bool suits(DType dtype) const {
    const unsigned others = others_ & ~(bit(dtype) | bit(DType::u8) | bit(DType::f32));
    return !in_double_ && all_one_ && (!some_ || dtype_ == dtype) && others == 0;
  }
  // Whether all are of one dtype.
  bool are_alike() const { return are_all(dtype_); }

 private:
  static unsigned bit(DType dtype) { return 1u << static_cast<int>(dtype); }
  void limit(int v) { width_ = v < width_ ? v : width_; }
  void limit_to_divisor(int64_t size, int64_t step) {
    for (int v = 8; v > 1; v /= 2)
      if (size > 1 && step % v) limit(v / 2);
  }
  const bool in_double_;
  bool all_one_ = true, some_ = false, are_samples_rows_ = true;
  DType dtype_ = DType::f32;
  unsigned others_ = 0;
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

// Whether there is an access to flat operands: such of one dtype, but for those that may have another.
inline bool has_flat_access(const Layouts& layouts) {
  const bool is_half = layouts.suits(DType::bf16) || layouts.suits(DType::f16);
  return is_half ? layouts.width() >= 8 : layouts.suits(DType::f32) && layouts.width() >= 4;
}

// Calls f with it.
template <class F>
void with_flat_access(const Layouts& layouts, const F& f) {
  if (layouts.suits(DType::bf16))
    f(FlatBfloat16{});
  else if (layouts.suits(DType::f16))
    f(FlatFloat16{});
  else
    f(FlatFloat32{});
}

}  // namespace cuda
}  // namespace fusedvae
