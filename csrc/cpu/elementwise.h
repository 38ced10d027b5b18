// A formula on the elements of a tile: its values, their sum, and its gradients.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cpu/packs.h"
#include "cpu/run.h"
#include "math/formulas.h"
#include "tasks.h"

namespace fusedvae {
namespace FUSEDVAE_NAMESPACE {

// Elements ahead of where it is that a loop asks for beside sums of columns, to which it goes back at every row: there
// processors do not look as far ahead by themselves as they do otherwise.
constexpr int64_t kAhead = 768;

// How scales come: as formulas are written (one input, it may be, the same for all elements), or in any form.
enum class Scales { plain, uniform, any };

// What a loop makes: all that is wanted, or one thing alone, without what the others would take.
enum class Makes { all, sum, values, gradients };

// What a formula derives of its scales, and the derivatives of their logarithms by what they are forms of.
template <class Formula, class P>
struct Spreads {
  decltype(Formula::plain(static_cast<const P*>(nullptr))) derived;
  P slopes[kMostScales];
};

// Of a formula's inputs if these are plain, else of the scales that they were mapped to.
template <class Formula, class P>
FUSEDVAE_INLINE Spreads<Formula, P> spreads_of(const P* inputs, const Scale<P>* scales, bool is_plain) {
  Spreads<Formula, P> spreads = {};
  if (is_plain) spreads.derived = Formula::plain(inputs);
  if constexpr (Formula::kScales > 0) {
    if (is_plain) return spreads;
    spreads.derived = Formula::derive(scales);
    for (int k = 0; k < Formula::kScales; ++k) spreads.slopes[k] = scales[k].slope;
  }
  return spreads;
}

// Gradients by what a formula is written in, as gradients by its inputs.
template <class Formula, class T, class P>
FUSEDVAE_INLINE void through_forms(const Arrays<T>& a, const P* slopes, P* grads) {
  if constexpr (Formula::kScales > 0) {
#pragma GCC unroll 2
    for (int k = 0; k < Formula::kScales; ++k) {
      P& grad = grads[Formula::kScaleOf[k]];
      grad = through(grad, slopes[k]);
    }
    if (a.has_gains) {
#pragma GCC unroll 4
      for (int k = 0; k < Formula::kInputs; ++k) grads[k] *= static_cast<T>(a.task->gains[k]);
    }
  }
}

// The scales that were mapped, at some elements.
template <class Formula, class T, class Load, class P>
FUSEDVAE_INLINE void fetch_scales(const Arrays<T>& a, int64_t i, const Load& load, Scale<P>* scales) {
#pragma GCC unroll 2
  for (int k = 0; k < Formula::kScales; ++k) {
    scales[k] = {load(a.logs[k] + i), load(a.powers[k] + i), load(a.slopes[k] + i), a.has_logs[k]};
  }
}

// A term's formula on the elements of a tile.
template <class F>
struct OfElements {
  using Formula = F;

  // Returns the sum of the weighted values, if it makes that. Gradients may be sums of columns if `adds`. Half is what
  // inputs that lie in 16 bits are.
  template <class T, bool has_weights, Scales kind, Makes makes, bool adds = false, class Half = T>
  static double apply(const Arrays<T> a, int64_t count) {  // by value: no store can change it
    using P = typename Pack<T>::type;
    constexpr int n = Formula::kInputs;
    constexpr bool is_uniform = kind == Scales::uniform, has_halves = !std::is_same_v<Half, T>;
    constexpr bool makes_sum = makes == Makes::all || makes == Makes::sum;
    constexpr bool makes_values = makes == Makes::all || makes == Makes::values;
    constexpr bool makes_gradients = makes == Makes::all || makes == Makes::gradients;
    const P zero = {}, one = number<P>(1), factor = P{} + a.factor, constant = P{} + a.constant;
    const P none = number<P>(a.selects ? 0.0 : NAN);  // the mark that does away with an element
    // (In an instance for all tasks it is not known before.)
    const bool is_plain = kind == Scales::any       ? kHasFewInstances<T> && a.is_plain
                          : kind == Scales::uniform ? Formula::kScales != 1 || a.is_plain
                                                    : true;
    struct Fetched {
      P inputs[n], weight, mark;
      Scale<P> scales[kMostScales];
    };
    Fetched uniform = {};
    if constexpr (is_uniform) uniform.inputs[Formula::kUniform] = P{} + a.inputs[Formula::kUniform][0];
    // A formula's only scale is derived here, if it is uniform. One of two is derived with the other: compilers take
    // out of the loop what does not change in it.
    constexpr bool is_derived_once = is_uniform && Formula::kScales == 1;
    Spreads<Formula, P> once = {};
    if constexpr (is_derived_once) {
      const Scale<P> scale = scale_of<Formula::kPowers[0]>(a.task->forms[0], uniform.inputs[Formula::kUniform]);
      once = spreads_of<Formula>(uniform.inputs, &scale, is_plain);
    }

    const auto fetch = [=](int64_t i, const auto& load) FUSEDVAE_LAMBDA {
      Fetched fetched = {};
#pragma GCC unroll 4
      for (int k = 0; k < n && adds; ++k) __builtin_prefetch(a.inputs[k] + i + kAhead);
#pragma GCC unroll 4
      for (int k = 0; k < n; ++k)
        fetched.inputs[k] = is_uniform && k == Formula::kUniform ? uniform.inputs[k]
                            : has_halves && a.are_halves[k]      ? load(reinterpret_cast<const Half*>(a.inputs[k]) + i)
                                                                 : load(a.inputs[k] + i);
      fetched.weight = has_weights ? load(a.weight + i) : one;
      fetched.mark = has_weights ? load(a.marks + i) : one;
      if (kind == Scales::any && !is_plain) fetch_scales<Formula>(a, i, load, fetched.scales);
      return fetched;
    };
    const auto visit = [=](int64_t i, const Fetched& in, const auto& store) FUSEDVAE_LAMBDA {
      const Spreads<Formula, P> spreads = is_derived_once ? once : spreads_of<Formula>(in.inputs, in.scales, is_plain);
      Element<P, n> element = Formula::element(in.inputs, spreads.derived, has_weights ? factor * in.weight : factor);
      if (!is_plain) through_forms<Formula>(a, spreads.slopes, element.grads);
      P value = element.value;
      if (has_weights) {
        const auto counts = in.mark != none;
        value = counts ? (value + constant) * in.weight : zero;
#pragma GCC unroll 4
        for (int k = 0; k < n; ++k) element.grads[k] = counts ? element.grads[k] : zero;
      }
      if (makes_values && a.value) store(a.value + i, has_weights ? value : value + constant);
#pragma GCC unroll 4
      for (int k = 0; k < n && makes_gradients; ++k) {
        if (!a.grads[k]) continue;
        if (has_halves && a.are_halves[k])
          store(reinterpret_cast<Half*>(a.grads[k]) + i, element.grads[k]);
        else if (adds && a.are_added[k])
          store.add(a.grads[k] + i, element.grads[k]);
        else
          store(a.grads[k] + i, element.grads[k]);
      }
      return value;
    };
    return sum_of_packs<T, makes_sum>(count, fetch, visit);
  }

  // The instance of `apply` for what is known at run time.
  template <class T>
  static double apply_for(const Arrays<T>& a, int64_t count, bool is_uniform, bool sums) {
    if constexpr (kHasFewInstances<T>) {
      Arrays<T> weighted = a;
      if (!a.weight) weighted.weight = weighted.marks = a.ones;
      if constexpr (Formula::kUniform >= 0)
        if (is_uniform)
          return sums && !a.weight ? apply<T, false, Scales::uniform, Makes::all>(a, count)
                                   : apply<T, true, Scales::uniform, Makes::all>(weighted, count);
      if (sums && a.is_plain && !a.weight) return apply<T, false, Scales::plain, Makes::all>(a, count);
      return apply<T, true, Scales::any, Makes::all>(weighted, count);
    } else {
      if (a.adds) return apply<T, false, Scales::plain, Makes::all, true>(a, count);
      if constexpr (kHasHalves) {
        if (a.half == DType::bf16) return with_halves<T, Bf16>(a, count, is_uniform);
        if (a.half == DType::f16) return with_halves<T, F16>(a, count, is_uniform);
      }
      if constexpr (Formula::kUniform >= 0)
        if (is_uniform) return with_scales<T, Scales::uniform>(a, count, sums);
      if constexpr (Formula::kScales > 0)
        if (!a.is_plain) return with_scales<T, Scales::any>(a, count, sums);
      return with_scales<T, Scales::plain>(a, count, sums);
    }
  }

 private:
  template <class T, class Half, Scales kind>
  static double with_halves(const Arrays<T>& a, int64_t count) {
    return a.has_gradients() ? apply<T, false, kind, Makes::all, false, Half>(a, count)
                             : apply<T, false, kind, Makes::sum, false, Half>(a, count);
  }
  template <class T, class Half>
  static double with_halves(const Arrays<T>& a, int64_t count, bool is_uniform) {
    if constexpr (Formula::kUniform >= 0)
      if (is_uniform) return with_halves<T, Half, Scales::uniform>(a, count);
    return with_halves<T, Half, Scales::plain>(a, count);
  }
  // Of those with weights there are two: masks, and the gradients of values per sample.
  template <class T, Scales kind>
  static double with_scales(const Arrays<T>& a, int64_t count, bool sums) {
    if (a.weight)
      return sums || a.value ? apply<T, true, kind, Makes::all>(a, count)
                             : apply<T, true, kind, Makes::gradients>(a, count);
    if (a.has_gradients()) return apply<T, false, kind, Makes::all>(a, count);
    return sums ? apply<T, false, kind, Makes::sum>(a, count) : apply<T, false, kind, Makes::values>(a, count);
  }
};

inline void dispatch_elementwise(const ElementwiseTask& task, double factor, double constant, double* totals,
                                 bool by_sample, const RunLoop& run_loop) {
  const auto visit = [&](auto tag) {
    using Elements = OfElements<typename decltype(tag)::type>;
    if (task.in_double)
      run_elementwise(work_of<Elements, double>(), task, nullptr, factor, constant, totals, by_sample, run_loop);
    else
      run_elementwise(work_of<Elements, float>(), task, nullptr, factor, constant, totals, by_sample, run_loop);
  };
  with_formula(task.formula, visit, Formulas{});
}

}  // namespace FUSEDVAE_NAMESPACE
}  // namespace fusedvae
