// Tiles: the unit of work, of float accumulation and of conversion. The formula loops see a tile's operands as plain
// arrays of the working type, neither strides nor dtypes: where they lie if they are that already, else in buffers,
// which stay in the L1 cache.
#pragma once

#include <cstdint>

#include "cpu/convert.h"
#include "cpu/packs.h"
#include "math/philox.h"
#include "operand.h"

namespace fusedvae {
namespace FUSEDVAE_NAMESPACE {

// Elements of a tile: the most that buffers hold, and what a tile has that needs none, whose own costs (cutting it out,
// adding up lanes) count for less the larger it is.
constexpr int64_t kTile = 1024;
constexpr int64_t kUnbufferedTile = 4096;

static inline int64_t min_of(int64_t a, int64_t b) {
  return a < b ? a : b;
}
static inline int64_t max_of(int64_t a, int64_t b) {
  return a > b ? a : b;
}
static inline int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// A block of elements [b0, b0 + nb) x [o0, o0 + no) x [i0, i0 + ni), in row-major order of (b, o, i).
struct Tile {
  int64_t b0, nb, o0, no, i0, ni;
  int64_t count() const { return nb * no * ni; }
};

// Cuts an extent into tiles of at most `most` elements, each within a sample or made of whole samples. The cut never
// depends on threads, and with it no rounding does.
class Tiling {
 public:
  explicit Tiling(const Extent& e, int64_t most = kTile) : e_(e) {
    const int64_t sample = max_of(e.sample(), 1);
    samples_ = max_of(1, most / sample);
    rows_ = samples_ > 1 ? e.outer : max_of(1, min_of(e.outer, most / max_of(e.inner, 1)));
    columns_ = min_of(max_of(e.inner, 1), most);
    row_groups_ = ceil_div(e.outer, max_of(rows_, 1));
    column_groups_ = ceil_div(max_of(e.inner, 1), columns_);
    count_ = e.count() == 0 ? 0 : ceil_div(e.batch, samples_) * row_groups_ * column_groups_;
  }
  int64_t count() const { return count_; }
  // Tiles that a row is cut into; tile k has the columns of every other k that leaves the same remainder.
  int64_t column_groups() const { return column_groups_; }
  // Whether no sample is in several tiles.
  bool holds_whole_samples() const { return row_groups_ * column_groups_ == 1; }
  int64_t columns() const { return columns_; }  // of each but the last of a row
  int64_t max_samples() const { return samples_; }
  int64_t max_rows() const { return samples_ * rows_; }
  Tile operator[](int64_t k) const {
    Tile t;
    const int64_t column = k % column_groups_, row = k / column_groups_ % row_groups_;
    t.b0 = k / (column_groups_ * row_groups_) * samples_;
    t.nb = min_of(samples_, e_.batch - t.b0);
    t.o0 = row * rows_;
    t.no = min_of(rows_, e_.outer - t.o0);
    t.i0 = column * columns_;
    t.ni = min_of(columns_, e_.inner - t.i0);
    return t;
  }

 private:
  Extent e_;
  int64_t samples_, rows_, columns_, row_groups_, column_groups_, count_;
};

static inline int64_t offset_of(const Operand& op, const Tile& t, int64_t b, int64_t o) {
  return (t.b0 + b) * op.stride[0] + (t.o0 + o) * op.stride[1] + t.i0 * op.stride[2];
}

// Whether the tile's elements lie side by side.
static inline bool is_contiguous(const Operand& op, const Tile& t) {
  return (op.stride[2] == 1 || t.ni == 1) && (t.no == 1 || op.stride[1] == t.ni) &&
         (t.nb == 1 || (t.no == 1 ? op.stride[0] == t.ni : op.stride[0] == t.no * t.ni));
}

// Where the tile's first element lies.
static inline void* address_of(const Operand& op, const Tile& t) {
  return static_cast<char*>(op.data) + offset_of(op, t, 0, 0) * size_of(op.dtype);
}

// Whether an operand is an array of the type, so that every tile of it is one as well.
static inline bool is_array(const Operand& op, DType dtype, const Extent& e) {
  return op.data && op.dtype == dtype && is_contiguous(op, Tile{0, e.batch, 0, e.outer, 0, e.inner});
}
template <class T>
inline bool is_array(const Operand& op, const Extent& e) {
  return is_array(op, dtype_of<T>(), e);
}

// A tile's operand as an array; `buffer` holds it if it is not one already.
template <class T>
inline const T* read(const Operand& op, const Tile& t, T* buffer) {
  if (op.is_uniform()) {
    const T value = static_cast<T>(get(op, 0));
    const int64_t n = t.count();
    for (int64_t i = 0; i < n; ++i) buffer[i] = value;
    return buffer;
  }
  const bool contiguous = is_contiguous(op, t);
  if (contiguous && op.dtype == dtype_of<T>()) return static_cast<const T*>(op.data) + offset_of(op, t, 0, 0);
  with_type(op.dtype, [&](auto* type) {
    const auto* data = static_cast<decltype(type)>(op.data);
    if (contiguous) {
      widen_array(data + offset_of(op, t, 0, 0), buffer, t.count());
      return;
    }
    if (op.stride[2] == 0) {  // a number for each row, which is often short
      T numbers[kTile];
      const bool are_samples = t.no == 1;
      const int64_t groups = are_samples ? 1 : t.nb, rows = are_samples ? t.nb : t.no;
      const int64_t step = op.stride[are_samples ? 0 : 1];
      for (int64_t g = 0; g < groups; ++g) {
        const auto* in = data + offset_of(op, t, g, 0);
        for (int64_t r = 0; r < rows; ++r) numbers[g * rows + r] = static_cast<T>(widen(in[r * step]));
      }
      fill_rows(numbers, t.nb * t.no, t.ni, buffer);
      return;
    }
    T* out = buffer;
    for (int64_t b = 0; b < t.nb; ++b)
      for (int64_t o = 0; o < t.no; ++o, out += t.ni) widen_array(data + offset_of(op, t, b, o), out, t.ni);
  });
  return buffer;
}

// The array to compute a tile's output in: the output itself if it is one of the working type, else `buffer`, which
// `write` then copies there. What is to go past the caches always goes by way of the buffer.
template <class T>
inline T* array_for(const Operand& op, const Tile& t, T* buffer, bool past_caches) {
  if (!past_caches && op.dtype == dtype_of<T>() && is_contiguous(op, t))
    return static_cast<T*>(op.data) + offset_of(op, t, 0, 0);
  return buffer;
}

// Whether there are stores that go past the caches.
#if defined(__x86_64__)
constexpr bool kHasStreamingStores = true;

template <class T>
inline void copy_past_caches(const T* in, T* out, int64_t count) {
  constexpr int64_t w = sizeof(vf) / sizeof(T);
  int64_t i = 0;
  for (; i < count && (reinterpret_cast<uintptr_t>(out + i) & (sizeof(vf) - 1)); ++i) out[i] = in[i];
  for (; i + w <= count; i += w) {
    float* const to = reinterpret_cast<float*>(out + i);
    const vf bits = load<vf>(in + i);
#if defined(__AVX512F__)
    _mm512_stream_ps(to, bits);
#elif defined(__AVX2__)
    _mm256_stream_ps(to, bits);
#else
    _mm_stream_ps(to, bits);
#endif
  }
  for (; i < count; ++i) out[i] = in[i];
}
#else
constexpr bool kHasStreamingStores = false;

template <class T>
inline void copy_past_caches(const T* in, T* out, int64_t count) {
  __builtin_memcpy(out, in, static_cast<size_t>(count) * sizeof(T));
}
#endif

template <class T>
inline void write(const Operand& op, const Tile& t, const T* from, const T* buffer, bool past_caches) {
  if (from != buffer) return;
  const bool contiguous = is_contiguous(op, t);
  if (contiguous && past_caches && op.dtype == dtype_of<T>()) {
    copy_past_caches(from, static_cast<T*>(op.data) + offset_of(op, t, 0, 0), t.count());
    return;
  }
  with_type(op.dtype, [&](auto* type) {
    auto* data = static_cast<decltype(type)>(op.data);
    if (contiguous) {
      narrow_array(from, data + offset_of(op, t, 0, 0), t.count());
      return;
    }
    for (int64_t b = 0; b < t.nb; ++b)
      for (int64_t o = 0; o < t.no; ++o, from += t.ni) narrow_array(from, data + offset_of(op, t, b, o), t.ni);
  });
}

// --- noise --------------------------------------------------------------------------------------------------------

constexpr int64_t kNoisePad = 8 * kLanes;

// Some vectors of Philox's words, which take every step one after the other, so that none waits for itself.
template <int count>
struct Words {
  vq at[count];
};
template <int count>
FUSEDVAE_INLINE Words<count> operator^(const Words<count>& a, const Words<count>& b) {
  Words<count> out;
  for (int k = 0; k < count; ++k) out.at[k] = a.at[k] ^ b.at[k];
  return out;
}
template <int count>
FUSEDVAE_INLINE Words<count> operator^(const Words<count>& a, uint64_t b) {
  Words<count> out;
  for (int k = 0; k < count; ++k) out.at[k] = a.at[k] ^ b;
  return out;
}
template <int count>
FUSEDVAE_INLINE Words<count> operator>>(const Words<count>& a, int bits) {
  Words<count> out;
  for (int k = 0; k < count; ++k) out.at[k] = a.at[k] >> bits;
  return out;
}
template <int count>
FUSEDVAE_INLINE Words<count> mul32(const Words<count>& a, uint32_t m) {
  Words<count> out;
  for (int k = 0; k < count; ++k) out.at[k] = mul32(a.at[k], m);
  return out;
}

// What kLanes counters make: four vectors.
constexpr int64_t kQuad = 4 * kLanes;

// The uniforms of some quads from a counter on, a vector for each of the four words of a quad's counters.
template <int quads>
FUSEDVAE_INLINE void uniforms(uint64_t first, uint64_t seed, float* out) {
  constexpr int half = kLanes / 2;
  vq counters;
  for (int i = 0; i < half; ++i) counters[i] = static_cast<uint64_t>(i);
  Words<2 * quads> low;
  for (int k = 0; k < 2 * quads; ++k) low.at[k] = counters + (first + static_cast<uint64_t>(k * half));
  const auto words = philox4x32(low, low >> 32, Words<2 * quads>{}, Words<2 * quads>{}, seed);
  for (int k = 0; k < quads; ++k, out += kQuad) {
    const auto uniform = [k](const Words<2 * quads>& w) FUSEDVAE_LAMBDA {
      return unit_interval(to_float(half_words(w.at[2 * k], w.at[2 * k + 1])));
    };
    store(out, uniform(words.w0));
    store(out + kLanes, uniform(words.w1));
    store(out + 2 * kLanes, uniform(words.w2));
    store(out + 3 * kLanes, uniform(words.w3));
  }
}

// Their normals in their place, in the order of the stream.
FUSEDVAE_INLINE void uniforms_to_normals(float* at) {
  const NormalPair<vf> p = box_muller(load<vf>(at), load<vf>(at + kLanes));
  const NormalPair<vf> q = box_muller(load<vf>(at + 2 * kLanes), load<vf>(at + 3 * kLanes));
  vf even_low, even_high, odd_low, odd_high, v0, v1, v2, v3;
  interleave(p.cosine, q.cosine, &even_low, &even_high);
  interleave(p.sine, q.sine, &odd_low, &odd_high);
  interleave(even_low, odd_low, &v0, &v1);
  interleave(even_high, odd_high, &v2, &v3);
  store(at, v0);
  store(at + kLanes, v1);
  store(at + 2 * kLanes, v2);
  store(at + 3 * kLanes, v3);
}

// The stream's elements [start, start + count), somewhere in a buffer of count + kNoisePad floats. Both steps are long
// chains of instructions that wait for each other. A processor sees so few at a time that what follows a chain does not
// fill its gaps, but the next of the same kind does: so each step goes over some quads before the other.
inline const float* noise_span(int64_t start, int64_t count, uint64_t seed, float* buffer) {
  constexpr int64_t kSome = 4 * kQuad;
  const int64_t skip = start & 3, all = skip + count;
  uint64_t counter = static_cast<uint64_t>(start) >> 2;
  for (int64_t first = 0; first < all; first += kSome) {
    const int64_t end = min_of(first + kSome, all);
    int64_t i = first;
    for (; i + kQuad < end; i += 2 * kQuad, counter += 2 * kLanes) uniforms<2>(counter, seed, buffer + i);
    for (; i < end; i += kQuad, counter += kLanes) uniforms<1>(counter, seed, buffer + i);
    for (i = first; i < end; i += kQuad) uniforms_to_normals(buffer + i);
  }
  return buffer + skip;
}

// A tile's noise, of the positions past `offset`. Positions that follow each other along the rows, or (channels_last)
// along the columns, are made in spans; anything else an element at a time.
inline const float* read_noise(const IndexStrides& s, int64_t offset, const Tile& t, uint64_t seed, float* scratch,
                               float* buffer) {
  const int64_t start = offset + t.b0 * s.batch + t.o0 * s.outer + t.i0 * s.inner;
  const bool along_rows = t.ni == 1 || s.inner == 1;
  if (along_rows && (t.no == 1 || s.outer == t.ni) && (t.nb == 1 || s.batch == t.no * t.ni))
    return noise_span(start, t.count(), seed, buffer);
  for (int64_t b = 0; b < t.nb; ++b) {
    float* out = buffer + b * t.no * t.ni;
    const int64_t origin = start + b * s.batch;
    if (!along_rows && s.outer == 1) {
      for (int64_t i = 0; i < t.ni; ++i) {
        const float* span = noise_span(origin + i * s.inner, t.no, seed, scratch);
        for (int64_t o = 0; o < t.no; ++o) out[o * t.ni + i] = span[o];
      }
      continue;
    }
    for (int64_t o = 0; o < t.no; ++o)
      if (along_rows) {
        const float* span = noise_span(origin + o * s.outer, t.ni, seed, scratch);
        for (int64_t i = 0; i < t.ni; ++i) out[o * t.ni + i] = span[i];
      } else {
        for (int64_t i = 0; i < t.ni; ++i)
          out[o * t.ni + i] = *noise_span(origin + o * s.outer + i * s.inner, 1, seed, scratch);
      }
  }
  return buffer;
}

}  // namespace FUSEDVAE_NAMESPACE
}  // namespace fusedvae
