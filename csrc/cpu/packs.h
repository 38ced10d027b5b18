// Loops over arrays, a vector of numbers at a time.
#pragma once

#include <cstdint>
#include <type_traits>

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

// Rows so short that a call for each would take longer than adding them up, and their elements so few that they may be
// added up in their own type.
constexpr int64_t kShort = 8;

// The sum of a row of a length that compilers know.
template <int64_t length, class T>
FUSEDVAE_INLINE T sum_of_row(const T* v) {
  if constexpr (length == 1) return v[0];
  if constexpr (length > 1) return sum_of_row<length - 1>(v) + v[length - 1];
}

// The sums of kLanes rows of a length that is a power of 2: of pairs, of pairs of these, and so on.
template <int64_t length>
FUSEDVAE_INLINE vf sums_of_rows(const float* v) {
  if constexpr (length == 1) return load<vf>(v);
  if constexpr (length > 1)
    return add_pairs(sums_of_rows<length / 2>(v), sums_of_rows<length / 2>(v + length / 2 * kLanes));
}

// The sums of rows of a length that compilers know. Each is a function of its own: they go over many rows at a time
// where they can, but not in all of several loops.
template <int64_t length, class T, class Sum>
FUSEDVAE_OUTLINE void sum_rows_of(const T* v, int64_t rows, Sum* sums) {
  int64_t r = 0;
  if constexpr (length == 8 && std::is_same_v<T, float> && std::is_same_v<Sum, float>)
    for (; r + kLanes <= rows; r += kLanes) store(sums + r, sums_of_rows<length>(v + r * length));
  for (; r < rows; ++r) sums[r] = static_cast<Sum>(sum_of_row<length>(v + r * length));
}

// Calls f with a row's length, at most `most`, as a constant.
template <int64_t most = kShort, class F>
FUSEDVAE_INLINE void with_known_length(int64_t length, const F& f) {
  if constexpr (most > 1)
    if (length < most) return with_known_length<most - 1>(length, f);
  f(std::integral_constant<int64_t, most>());
}

// The sums of rows of any length.
template <class T, class Sum>
inline void sum_rows(const T* v, int64_t rows, int64_t length, Sum* sums) {
  if (length > 0 && length <= kShort)
    return with_known_length(length, [=](auto known) FUSEDVAE_LAMBDA { sum_rows_of<known()>(v, rows, sums); });
  for (int64_t r = 0; r < rows; ++r) sums[r] = static_cast<Sum>(sum(v + r * length, length));
}

// Fills rows with a number each. A function of its own for each length that compilers know.
template <class Length, class T>
FUSEDVAE_OUTLINE void fill_rows_of(Length length, const T* numbers, int64_t rows, T* out) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t i = 0; i < length; ++i) out[r * length + i] = numbers[r];
}

// The same for rows of any length.
template <class T>
inline void fill_rows(const T* numbers, int64_t rows, int64_t length, T* out) {
  if (length > 0 && length <= kShort)
    return with_known_length(length, [=](auto known) FUSEDVAE_LAMBDA { fill_rows_of(known, numbers, rows, out); });
  fill_rows_of(length, numbers, rows, out);
}

}  // namespace FUSEDVAE_NAMESPACE
}  // namespace fusedvae
