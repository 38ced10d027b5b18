// A formula over the tiles of an extent: its values, their sums, and its gradients.
#pragma once

#include <cstdint>

#include "broadcast.h"
#include "cpu/memory.h"
#include "cpu/packs.h"
#include "cpu/parallel.h"
#include "cpu/sums.h"
#include "cpu/tile.h"
#include "math/formulas.h"
#include "tasks.h"

namespace fusedvae {
namespace FUSEDVAE_NAMESPACE {

// What a formula is applied to: a tile's operands as arrays of the working type.
template <class T>
struct Arrays {
  const T* inputs[kMostInputs];  // of the scale, if it is uniform, one element
  const T* weight;               // null for a weight of 1
  T* value;                      // null where only their sum is wanted, as are gradients that are not
  T* grads[kMostInputs];
  T factor;  // of the gradients
  T parameter, constant;
};

// float64 is here for exactness, not speed: it has one instance of `apply`, which takes weights for all elements and a
// scale for each, and sums and writes values.
template <class T>
constexpr bool kHasOneInstance = Pack<T>::lanes == 1;

// Returns the sum of the weighted values if `sums`; else they are written where there is a place for them.
template <class Formula, class T, bool has_weights, bool uniform_scale, bool sums>
double apply(const Arrays<T> a, int64_t count) {  // by value: no store can change it
  using P = typename Pack<T>::type;
  constexpr int n = Formula::kInputs;
  const P one = P{} + T(1), factor = P{} + a.factor, parameter = P{} + a.parameter;
  const P uniform = uniform_scale ? P{} + a.inputs[Formula::kScale][0] : P{};
  const auto uniform_derived = Formula::derive(uniform, parameter);
  struct Fetched {
    P inputs[n], weight;
  };
  const auto fetch = [=](int64_t i, const auto& load) FUSEDVAE_LAMBDA {
    Fetched fetched;
#pragma GCC unroll 4
    for (int k = 0; k < n; ++k)
      fetched.inputs[k] = uniform_scale && k == Formula::kScale ? uniform : load(a.inputs[k] + i);
    fetched.weight = has_weights ? load(a.weight + i) : one;
    return fetched;
  };
  const auto visit = [=](int64_t i, const Fetched& in, const auto& store) FUSEDVAE_LAMBDA {
    const auto derived = uniform_scale ? uniform_derived : Formula::derive(in.inputs[Formula::kScale], parameter);
    const Element<P, n> element = Formula::element(in.inputs, derived, has_weights ? factor * in.weight : factor);
    const P value = has_weights ? element.value * in.weight : element.value;
    if ((!sums || kHasOneInstance<T>) && a.value) store(a.value + i, value + a.constant);
#pragma GCC unroll 4
    for (int k = 0; k < n; ++k)
      if (a.grads[k]) store(a.grads[k] + i, element.grads[k]);
    return value;
  };
  return sum_of_packs<T, sums>(count, fetch, visit);
}

// The instance of `apply` for a combination known at run time.
template <class Formula, class T, bool... known>
double apply_for(const Arrays<T>& a, int64_t count) {
  return apply<Formula, T, known...>(a, count);
}
template <class Formula, class T, bool... known, class... Rest>
double apply_for(const Arrays<T>& a, int64_t count, bool next, Rest... rest) {
  if constexpr (kHasOneInstance<T>)
    return apply<Formula, T, true, false, true>(a, count);
  else
    return next ? apply_for<Formula, T, known..., true>(a, count, rest...)
                : apply_for<Formula, T, known..., false>(a, count, rest...);
}

// Whether a tile of the task takes none of the buffers of `run_elementwise`.
template <class Formula, class T>
bool is_unbuffered(const ElementwiseTask& task, const Gradients& gradients) {
  if (kHasOneInstance<T>) return false;
  const Extent& e = task.extent;
  for (int k = 0; k < Formula::kInputs; ++k) {
    if (!is_array<T>(task.inputs[k], e) && !(k == Formula::kScale && task.inputs[k].is_uniform())) return false;
    if (gradients.of[k] == Gradient::none) continue;
    if (gradients.of[k] != Gradient::element || !is_array<T>(task.grads[k], e)) return false;
  }
  return (!task.weight || is_array<T>(task.weight, e)) && (!task.value || is_array<T>(task.value, e));
}

// What runs a loop, given what its work amounts to, in elements of a likelihood.
using RunLoop = Callable<const Loop&, int64_t>;

// The buffers of a thread.
template <class T>
struct Buffers {
  alignas(kLine) T inputs[kMostInputs][kTile];
  alignas(kLine) T weight[kTile];
  alignas(kLine) T value[kTile];
  alignas(kLine) T grads[kMostInputs][kTile];
};

// Runs the task, its loop by way of `run_loop`. The gradients are times `factor`; `totals`, unless null, receives the
// sums of the weighted values: one, or with `by_sample` one for each.
template <class Formula, class T>
void run_elementwise(const ElementwiseTask& given, double factor, double constant, double* totals, bool by_sample,
                     const RunLoop& run_loop) {
  constexpr int n = Formula::kInputs;
  ElementwiseTask task = given;
  if (task.weight && task.weight.is_uniform() && !task.value && !totals) {  // then it is one of the gradients' factors
    factor *= get(task.weight, 0);
    task.weight = Operand{};
  }
  const Extent& e = task.extent;
  const Gradients gradients = gradients_of(e, task.grads);
  int64_t written = 0;
  for (int k = 0; k < n; ++k) {
    if (gradients.of[k] != Gradient::element) continue;
    written += bytes_of(task.grads[k], e);
    prefer_huge_pages(task.grads[k], e);
  }
  const bool past_caches = written >= kPastCachesBytes;
  const bool unbuffered = !past_caches && !(totals && by_sample) && is_unbuffered<Formula, T>(task, gradients);
  const Tiling tiling(e, unbuffered ? kUnbufferedTile : kTile);
  const Blocks blocks(e, tiling, gradients.any(Gradient::column));
  ValueSums<T> values(totals, by_sample, e, tiling);
  const auto sum_of = [&](int k) { return GradientSum<T>(gradients.of[k], task.grads[k], e, tiling, blocks); };
  GradientSum<T> grad_sums[kMostInputs] = {sum_of(0), sum_of(1), sum_of(2), sum_of(3)};

  const auto body = [&](int64_t first, int64_t last) {
    Buffers<T> buffers;
    Columns<T> columns[n];
    if (kHasOneInstance<T>)
      for (T& weight : buffers.weight) weight = 1;
    Arrays<T> a;
    a.factor = static_cast<T>(factor);
    a.parameter = static_cast<T>(task.parameter);
    a.constant = task.value ? static_cast<T>(constant) : T(0);  // to sums it is added at their end
    const auto visit = [&](int64_t k, int64_t block, bool is_last) {
      const Tile t = tiling[k];
      const Operand& scale = task.inputs[Formula::kScale];
      const bool uniform_scale =
          !kHasOneInstance<T> && (scale.is_uniform() || (t.nb == 1 && t.no == 1 && scale.stride[2] == 0));
      for (int j = 0; j < n; ++j) {
        if (j == Formula::kScale && uniform_scale)
          buffers.inputs[j][0] = static_cast<T>(get(scale, scale.data ? offset_of(scale, t, 0, 0) : 0));
        a.inputs[j] =
            j == Formula::kScale && uniform_scale ? buffers.inputs[j] : read(task.inputs[j], t, buffers.inputs[j]);
      }
      a.weight = task.weight ? read(task.weight, t, buffers.weight) : kHasOneInstance<T> ? buffers.weight : nullptr;
      const bool needs_values = values.needs_values(t);
      a.value = task.value ? array_for(task.value, t, buffers.value, false) : needs_values ? buffers.value : nullptr;
      for (int j = 0; j < n; ++j)
        a.grads[j] = gradients.of[j] == Gradient::element ? array_for(task.grads[j], t, buffers.grads[j], past_caches)
                     : grad_sums[j].wanted()              ? buffers.grads[j]
                                                          : nullptr;
      const double total =
          apply_for<Formula, T>(a, t.count(), a.weight != nullptr, uniform_scale, values.wanted() && !needs_values);
      if (task.value) write(task.value, t, a.value, buffers.value, false);
      values.take(k, t, total, a.value);
      for (int j = 0; j < n; ++j) {
        if (gradients.of[j] == Gradient::element)
          write(task.grads[j], t, a.grads[j], buffers.grads[j], past_caches);
        else
          grad_sums[j].take(k, t, a.grads[j], block, is_last, columns[j]);
      }
    };
    for (int64_t block = first; block < last; ++block)
      for (int64_t group = 0; group < blocks.groups; ++group)
        for (int64_t row = blocks.first_row(block), end = blocks.first_row(block + 1); row < end; ++row)
          visit(row * blocks.groups + group, block, row + 1 == end);
  };
  run_loop({blocks.count, body}, e.count());

  values.add_up();
  for (GradientSum<T>& sum : grad_sums) sum.add_up();
}

inline void dispatch_elementwise(const ElementwiseTask& task, double factor, double constant, double* totals,
                                 bool by_sample, const RunLoop& run_loop) {
  with_formula(task.formula, [&](auto tag) {
    using Formula = typename decltype(tag)::type;
    if (task.in_double)
      run_elementwise<Formula, double>(task, factor, constant, totals, by_sample, run_loop);
    else
      run_elementwise<Formula, float>(task, factor, constant, totals, by_sample, run_loop);
  });
}

}  // namespace FUSEDVAE_NAMESPACE
}  // namespace fusedvae
