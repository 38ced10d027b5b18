// Loops over arrays, a vector of numbers at a time.
#pragma once

#include <cstdint>

#include "cpu/convert.h"
#include "cpu/simd.h"

namespace fusedvae {
namespace FUSEDVAE_NAMESPACE {

// Writes whole packs, or adds them to what is there.
template <class P>
struct StoreAll {
  template <class T>
  FUSEDVAE_INLINE void operator()(T* p, P v) const {
    store(p, v);
  }
  template <class T>
  FUSEDVAE_INLINE void add(T* p, P v) const {
    store(p, load<P>(p) + v);
  }
};
// The first lanes of a pack.
template <class P>
struct StorePart {
  int64_t count;
  template <class T>
  FUSEDVAE_INLINE void operator()(T* p, P v) const {
    store_part(p, v, count);
  }
  template <class T>
  FUSEDVAE_INLINE void add(T* p, P v) const {
    store_part(p, load_part<P>(p, count) + v, count);
  }
};

// Calls fetch(i, load) and apply(i, fetched, store) for the packs of [i, end), and returns the sum of what apply gave
// back, in lanes. For the last, partial pack, load and store are partial, and lanes past the end are not summed.
//
// Four packs are fetched before any of them is written. A processor that finds the low twelve bits of a load's address
// in a store under way takes the two for the same and has the load wait. Gradients often lie a few lines past their
// operands, up to multiples of 4096 bytes: then each store would hold up the next load.
template <class T, bool sums, class Fetch, class Apply>
FUSEDVAE_INLINE typename Pack<T>::type for_packs(int64_t i, int64_t end, const Fetch& fetch, const Apply& apply) {
  typedef typename Pack<T>::type P;
  constexpr int64_t w = Pack<T>::lanes;
  const auto load_all = [](const auto* p) FUSEDVAE_LAMBDA { return load<P>(p); };
  const StoreAll<P> store_all;
  P total0 = {}, total1 = {}, total2 = {}, total3 = {};
  const auto add = [](P value, P* total) FUSEDVAE_LAMBDA {
    if constexpr (sums) *total += value;
  };
  for (; i + 4 * w <= end; i += 4 * w) {
    const auto first = fetch(i, load_all), second = fetch(i + w, load_all), third = fetch(i + 2 * w, load_all),
               fourth = fetch(i + 3 * w, load_all);
    add(apply(i, first, store_all), &total0);
    add(apply(i + w, second, store_all), &total1);
    add(apply(i + 2 * w, third, store_all), &total2);
    add(apply(i + 3 * w, fourth, store_all), &total3);
  }
  for (; i + w <= end; i += w) add(apply(i, fetch(i, load_all), store_all), &total0);
  const int64_t rest = end - i;
  if (rest > 0) {
    const auto fetched = fetch(i, [rest](const auto* p) FUSEDVAE_LAMBDA { return load_part<P>(p, rest); });
    const P value = apply(i, fetched, StorePart<P>{rest});
    T lanes[sizeof(P) / sizeof(T)];
    store(lanes, value);
    add(load_part<P>(lanes, rest), &total1);
  }
  return (total0 + total1) + (total2 + total3);
}

// The same for the packs of [0, count), a span at a time: 16 elements to a lane of each of the four totals, whose sum
// is then added to the others'. Sums of like terms would lose digits in longer rows of additions, the more the fewer
// lanes there are.
template <class T, bool sums, class Fetch, class Apply>
FUSEDVAE_INLINE double sum_of_packs(int64_t count, const Fetch& fetch, const Apply& apply) {
  constexpr int64_t span = 64 * Pack<T>::lanes;
  typename Pack<T>::type total = {};
  for (int64_t start = 0; start < count; start += span)
    total += for_packs<T, sums>(start, count - start < span ? count : start + span, fetch, apply);
  return sums ? static_cast<double>(sum_lanes<T>(total)) : 0;
}

// The sum of an array, in an order that depends on its length alone.
template <class T>
inline double sum(const T* v, int64_t count) {
  typedef typename Pack<T>::type P;
  if (count < 4 * Pack<T>::lanes) {
    double total = 0;
    for (int64_t i = 0; i < count; ++i) total += static_cast<double>(v[i]);
    return total;
  }
  return sum_of_packs<T, true>(
      count, [v](int64_t i, const auto& load) FUSEDVAE_LAMBDA { return load(v + i); },
      [](int64_t, P value, const auto&) FUSEDVAE_LAMBDA { return value; });
}

// Rows so short that a call for each would take longer than adding them up.
constexpr int64_t kShort = 8;

// The sums of four rows of eight, in pairs: what compilers make of such rows goes number by number with AVX2.
#if defined(__AVX2__) && !defined(__AVX512F__)
FUSEDVAE_INLINE void sum_four_rows_of_8(const float* v, double* sums) {
  const auto halves = [v](int row) FUSEDVAE_LAMBDA {
    return _mm256_cvtps_pd(_mm_loadu_ps(v + 8 * row)) + _mm256_cvtps_pd(_mm_loadu_ps(v + 8 * row + 4));
  };
  const __m256d first = _mm256_hadd_pd(halves(0), halves(1)), second = _mm256_hadd_pd(halves(2), halves(3));
  const __m256d low = _mm256_permute2f128_pd(first, second, 0x20), high = _mm256_permute2f128_pd(first, second, 0x31);
  _mm256_storeu_pd(sums, low + high);
}
#endif

// The sums of rows of `length` elements, at most `most`. To compilers, who go over many rows at a time where they can,
// each length is a constant.
template <int64_t most = kShort, class T>
inline void sum_short_rows(const T* v, int64_t rows, int64_t length, double* sums) {
  if constexpr (most > 1)
    if (length < most) return sum_short_rows<most - 1>(v, rows, length, sums);
  int64_t r = 0;
#if defined(__AVX2__) && !defined(__AVX512F__)
  if constexpr (most == 8 && std::is_same_v<T, float>)
    for (; r + 4 <= rows; r += 4) sum_four_rows_of_8(v + r * most, sums + r);
#endif
  for (; r < rows; ++r) {
    double total = static_cast<double>(v[r * most]);
#pragma GCC unroll 8
    for (int64_t i = 1; i < most; ++i) total += static_cast<double>(v[r * most + i]);
    sums[r] = total;
  }
}

}  // namespace FUSEDVAE_NAMESPACE
}  // namespace fusedvae
