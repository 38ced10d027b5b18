// The latent over the tiles of an extent: its sample, a divergence beside it, and their gradients.
#pragma once

#include <cstdint>

#include "cpu/elementwise.h"
#include "math/sample.h"

namespace fusedvae {
namespace FUSEDVAE_NAMESPACE {

// A sample's standard deviation and its derivative by what the scale is a form of, and what the divergence derives of
// the scales.
template <class Divergence, class P>
FUSEDVAE_INLINE Derived<P> plain_deviation_and_spreads(const P* inputs, Spreads<Divergence, P>* spreads) {
  P deviation;
  if constexpr (std::is_same_v<P, vf>) {
    const ExpPair half = exp_pair(0.5f * inputs[1]);
    deviation = half.exp;
    // Both from one exponential: expm1(l) = t^2 + 2t with t = expm1(l/2). What overflows in t^2 does so in e^l.
    if constexpr (std::is_same_v<Divergence, KlStandardNormal>)
      *spreads = {{inputs[1], half.expm1 * half.expm1 + (half.expm1 + half.expm1)}, {}};
    else
      spreads->derived = Divergence::plain(inputs);
  } else {
    deviation = exponential(0.5f * inputs[1]);
    spreads->derived = Divergence::plain(inputs);
  }
  return {deviation, 0.5f * deviation};
}

// A divergence and the sample beside it, on the elements of a tile.
template <class Divergence>
struct BesideSample {
  using Formula = Divergence;

  // Returns the sum of the divergence's values.
  template <class T, bool plain>
  static double apply(const Arrays<T> a, int64_t count) {  // by value: no store can change it
    using P = typename Pack<T>::type;
    constexpr int n = Formula::kInputs;
    const P factor = P{} + a.factor;
    const bool is_plain = plain || (kHasFewInstances<T> && a.is_plain);
    const bool has_gradients = a.has_gradients();
    struct Fetched {
      P inputs[n], incoming, noise, grad_z;
      Scale<P> scales[kMostScales];
      Derived<P> deviation;
    };
    const auto fetch = [=](int64_t i, const auto& load) FUSEDVAE_LAMBDA {
      Fetched fetched = {};
#pragma GCC unroll 4
      for (int k = 0; k < n; ++k) fetched.inputs[k] = load(a.inputs[k] + i);
      fetched.incoming = a.weight ? load(a.weight + i) : P{};
      fetched.noise = a.noise ? load(a.noise + i) : P{};
      fetched.grad_z = a.grad_z ? load(a.grad_z + i) : P{};
      if (!is_plain) {
        fetch_scales<Formula>(a, i, load, fetched.scales);
        fetched.deviation = {load(a.deviation + i), load(a.deviation_slope + i)};
      }
      return fetched;
    };
    const auto visit = [=](int64_t i, const Fetched& in, const auto& store) FUSEDVAE_LAMBDA {
      Spreads<Formula, P> spreads;
      Derived<P> deviation = in.deviation;
      if (is_plain)
        deviation = plain_deviation_and_spreads<Formula>(in.inputs, &spreads);
      else
        spreads = spreads_of<Formula>(in.inputs, in.scales, false);
      const P z = in.inputs[0] + deviation.value * in.noise;
      AtSample<P, n> at = divergence_at<Formula>(in.inputs, spreads.derived, z, in.noise, factor * in.incoming);
      if (a.value) store(a.value + i, at.element.value);
      if (a.z) store(a.z + i, z);
      if (has_gradients) {
        // Only what comes in is added: nothing times a mean that is infinite would be a NaN.
        P* const grads = at.element.grads;
        if (!a.weight) {
          for (int k = 0; k < n; ++k) grads[k] = P{};
          at.d_z = P{};
        } else if (!is_plain) {
          through_forms<Formula>(a, spreads.slopes, grads);
        }
        if (a.grad_z || (a.weight && Formula::kIsAtSample)) {
          const P d_z = a.grad_z ? in.grad_z + at.d_z : at.d_z;
          grads[0] += d_z;
          const P d_deviation = d_z * in.noise;
          grads[1] += is_plain ? d_deviation * deviation.slope : through(d_deviation, deviation.slope);
        }
#pragma GCC unroll 4
        for (int k = 0; k < n; ++k)
          if (a.grads[k]) store(a.grads[k] + i, grads[k]);
      }
      return at.element.value;
    };
    return sum_of_packs<T, true>(count, fetch, visit);
  }

  template <class T>
  static double apply_for(const Arrays<T>& a, int64_t count, bool /*is_uniform*/, bool /*sums*/) {
    if constexpr (kHasFewInstances<T>) return apply<T, false>(a, count);
    return a.is_plain ? apply<T, true>(a, count) : apply<T, false>(a, count);
  }
};

inline void dispatch_latent(const LatentTask& task, const RunLoop& run_loop) {
  const auto visit = [&](auto tag) {
    using Elements = BesideSample<typename decltype(tag)::type>;
    const ElementwiseTask& divergence = task.divergence;
    if (divergence.in_double)
      run_elementwise(work_of<Elements, double>(), divergence, &task, 1, 0, nullptr, false, run_loop);
    else
      run_elementwise(work_of<Elements, float>(), divergence, &task, 1, 0, nullptr, false, run_loop);
  };
  with_formula(task.divergence.formula, visit, Divergences{});
}

}  // namespace FUSEDVAE_NAMESPACE
}  // namespace fusedvae
