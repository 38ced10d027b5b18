// What a pass makes of its elements: formulas applied to an access at a time.
#pragma once

#include <cstdint>

#include "broadcast.h"
#include "cuda/access.h"
#include "cuda/arithmetic.h"
#include "cuda/plan.h"
// (the arithmetic above, the formulas below)
#include "math/formulas.h"
#include "tasks.h"

namespace fusedvae {
namespace cuda {

using FUSEDVAE_NAMESPACE::Derived;
using FUSEDVAE_NAMESPACE::Element;
using FUSEDVAE_NAMESPACE::Scale;

// --- what passes have in common ---------------------------------------------------------------------------------

// What a thread sums: values alone, gradients too, or both of them for each of the columns that it is at.
enum class Sums { of_values, of_all, of_columns };

// What a pass makes of an access's elements, and its sums.
template <class A, int inputs, Sums sums>
class Made {
 public:
  using T = typename A::T;
  static constexpr Sums kSums = sums;
  T value_sum = 0, grad_sums[inputs] = {};
  Lanes<A> value_columns{}, grad_columns[inputs]{};

  __device__ __forceinline__ Made(const ElementwiseTask& task, const PassPlan& plan) : task_(task), plan_(plan) {}

  __device__ __forceinline__ void start_sums() {
    value_sum = 0;
    FUSEDVAE_UNROLL
    for (int k = 0; k < inputs; ++k) grad_sums[k] = 0;
  }
  __device__ __forceinline__ void start_columns() {
    value_columns = {};
    FUSEDVAE_UNROLL
    for (int k = 0; k < inputs; ++k) grad_columns[k] = {};
  }

  // Takes what lane j has.
  __device__ __forceinline__ void take_value(int j, T value) {
    (sums == Sums::of_columns ? value_columns.at[j] : value_sum) += value;
    value_.at[j] = value;
  }
  template <int size>
  __device__ __forceinline__ void take_gradients(int j, const T (&values)[size]) {
    FUSEDVAE_UNROLL
    for (int k = 0; k < inputs; ++k) {
      const T grad = k < size ? values[k < size ? k : 0] : T(0);
      if (sums == Sums::of_all) grad_sums[k] += grad;
      if (sums == Sums::of_columns) grad_columns[k].at[j] += grad;
      grads_[k].at[j] = grad;
    }
  }

  // Writes what is not summed.
  __device__ __forceinline__ void write_at(const Position& at) {
    if (plan_.outputs.value == Output::element) {
      FUSEDVAE_UNROLL
      for (int j = 0; j < A::V; ++j) value_.at[j] += static_cast<T>(plan_.constant);
      write<A>(task_.value, at, value_);
    }
    FUSEDVAE_UNROLL
    for (int k = 0; k < inputs; ++k)
      if (plan_.outputs.grads[k] == Output::element) write<A>(task_.grads[k], at, grads_[k]);
  }

 private:
  const ElementwiseTask& task_;
  const PassPlan& plan_;
  Lanes<A> value_{}, grads_[inputs]{};
};

// What a formula derives from its scales, and the derivatives of the forms that these are in.
template <class Formula, class T>
struct Spreads {
  decltype(Formula::plain(static_cast<const T*>(nullptr))) of{};
  T slopes[kMostScales] = {T(1), T(1)};
};

template <class Formula, int k>
constexpr int kScaleAt = Formula::kScaleOf[k];

template <int k, class Formula, class T>
__device__ __forceinline__ Scale<T> scale_at(const ElementwiseTask& task, const T* inputs,
                                             Spreads<Formula, T>& spreads) {
  constexpr int kPower = Formula::kPowers[k];
  const Scale<T> scale = FUSEDVAE_NAMESPACE::scale_of<kPower>(task.forms[k], inputs[kScaleAt<Formula, k>]);
  spreads.slopes[k] = scale.slope;
  return scale;
}

template <class Formula, class T>
__device__ __forceinline__ Spreads<Formula, T> spreads_of(const ElementwiseTask& task, bool is_plain, const T* inputs) {
  Spreads<Formula, T> spreads;
  if (Formula::kScales == 0 || is_plain) {
    spreads.of = Formula::plain(inputs);
  } else if constexpr (Formula::kScales == 1) {
    const Scale<T> scales[] = {scale_at<0>(task, inputs, spreads)};
    spreads.of = Formula::derive(scales);
  } else if constexpr (Formula::kScales == 2) {
    const Scale<T> scales[] = {scale_at<0>(task, inputs, spreads), scale_at<1>(task, inputs, spreads)};
    spreads.of = Formula::derive(scales);
  }
  return spreads;
}

// A formula's gradients as those that the task asks for.
template <class Formula, class T>
__device__ __forceinline__ void adapt(const ElementwiseTask& task, const Spreads<Formula, T>& spreads, T* grads) {
  using FUSEDVAE_NAMESPACE::through;
  if constexpr (Formula::kScales > 0)
    grads[kScaleAt<Formula, 0>] = through(grads[kScaleAt<Formula, 0>], spreads.slopes[0]);
  if constexpr (Formula::kScales > 1)
    grads[kScaleAt<Formula, 1>] = through(grads[kScaleAt<Formula, 1>], spreads.slopes[1]);
  FUSEDVAE_UNROLL
  for (int k = 0; k < Formula::kInputs; ++k) grads[k] *= static_cast<T>(task.gains[k]);
}

// Inputs of one element, of lane j.
template <class A, int inputs>
struct Inputs {
  typename A::T of[inputs];
  __device__ __forceinline__ Inputs(const Lanes<A> (&lanes)[inputs], int j) {
    FUSEDVAE_UNROLL
    for (int k = 0; k < inputs; ++k) of[k] = lanes[k].at[j];
  }
};

// --- a formula's elements ---------------------------------------------------------------------------------------

// Values and gradients of a plain task without weights. The gradients are times the factor.
template <class A, class Formula, Sums sums>
class PlainPass {
 public:
  using T = typename A::T;
  static constexpr int kInputs = Formula::kInputs, kAhead = 1;
  struct Fetched {
    Bits inputs[kInputs];
  };
  Made<A, kInputs, sums> made;

  __device__ __forceinline__ PlainPass(const ElementwiseTask& task, const PassPlan& plan, double factor)
      : made(task, plan), task_(task), factor_(static_cast<T>(factor)) {
    if constexpr (kUniform >= 0) {
      if (!is_uniform_) return;
      uniform_[kUniform] = get<T>(task.inputs[kUniform], 0);
      if (kDerivesOnce) uniform_spread_ = Formula::plain(uniform_);
    }
  }

  __device__ __forceinline__ Fetched fetch(const Position& at) const {
    Fetched fetched;
    FUSEDVAE_UNROLL
    for (int k = 0; k < kInputs; ++k)
      fetched.inputs[k] = k == kUniform && is_uniform_ ? Bits{} : cuda::fetch<A>(task_.inputs[k], at);
    return fetched;
  }

  __device__ __forceinline__ void apply(const Position& at, const Fetched& fetched) {
    Lanes<A> inputs[kInputs];
    FUSEDVAE_UNROLL
    for (int k = 0; k < kInputs; ++k) inputs[k] = unpack<A>(task_.inputs[k], fetched.inputs[k]);
    const Lanes<A> incoming = incoming_.at(at);
    FUSEDVAE_UNROLL
    for (int j = 0; j < A::V; ++j) {
      Inputs<A, kInputs> in(inputs, j);
      if constexpr (kUniform >= 0 && !kDerivesOnce) {
        if (is_uniform_) in.of[kUniform] = uniform_[kUniform];
      }
      auto spread = uniform_spread_;
      if (!kDerivesOnce || !is_uniform_) spread = Formula::plain(in.of);
      const auto element = Formula::element(in.of, spread, incoming.at[j] * factor_);
      made.take_value(j, element.value);
      made.take_gradients(j, element.grads);
    }
    made.write_at(at);
  }

 private:
  static constexpr int kUniform = Formula::kUniform;
  static constexpr bool derives_once() {
    if constexpr (Formula::kScales == 1)
      return kScaleAt<Formula, 0> == kUniform;
    else
      return false;
  }
  // Of a scale that is one number, all that depends on it alone is derived once.
  static constexpr bool kDerivesOnce = derives_once();
  const ElementwiseTask& task_;
  const T factor_;
  const Factor<A> incoming_{task_.incoming};
  const bool is_uniform_ = kUniform >= 0 && task_.inputs[kUniform < 0 ? 0 : kUniform].is_uniform();
  T uniform_[kInputs] = {};
  decltype(Formula::plain(static_cast<const T*>(nullptr))) uniform_spread_{};
};

// Those of any task, whatever the formula. A constant is added to values before they are weighted.
template <class A, Sums sums>
class GeneralPass {
 public:
  using T = typename A::T;
  static constexpr int kInputs = kMostInputs, kAhead = 1;
  struct Fetched {
    Bits inputs[kInputs];
  };
  Made<A, kInputs, sums> made;

  __device__ __forceinline__ GeneralPass(const ElementwiseTask& task, const PassPlan& plan, double factor,
                                         double constant)
      : made(task, plan),
        task_(task),
        is_plain_(plan.is_plain),
        factor_(static_cast<T>(factor)),
        constant_(static_cast<T>(constant)) {}

  __device__ __forceinline__ Fetched fetch(const Position& at) const {
    Fetched fetched;
    FUSEDVAE_UNROLL
    for (int k = 0; k < kInputs; ++k) fetched.inputs[k] = cuda::fetch<A>(task_.inputs[k], at);
    return fetched;
  }

  __device__ __forceinline__ void apply(const Position& at, const Fetched& fetched) {
    Lanes<A> inputs[kInputs];
    FUSEDVAE_UNROLL
    for (int k = 0; k < kInputs; ++k) inputs[k] = unpack<A>(task_.inputs[k], fetched.inputs[k]);
    const Lanes<A> weight = weight_.at(at), incoming = incoming_.at(at);
    FUSEDVAE_NAMESPACE::with_formula(
        task_.formula,
        [&](auto tag) {
          using Formula = typename decltype(tag)::type;
          FUSEDVAE_UNROLL
          for (int j = 0; j < A::V; ++j) {
            const Inputs<A, kInputs> in(inputs, j);
            const auto spreads = spreads_of<Formula>(task_, is_plain_, in.of);
            auto element = Formula::element(in.of, spreads.of, weight.at[j] * incoming.at[j] * factor_);
            if (!is_plain_) adapt<Formula>(task_, spreads, element.grads);
            if (task_.weight.given) weigh(weight.at[j], element);
            made.take_value(j, element.value);
            made.take_gradients(j, element.grads);
          }
        },
        FUSEDVAE_NAMESPACE::Formulas{});
    made.write_at(at);
  }

 private:
  // Where the weight is 0, nothing is left of what may be no number.
  template <int size>
  __device__ __forceinline__ void weigh(T weight, Element<T, size>& element) const {
    const bool counts = weight != T(0);
    element.value = counts ? weight * (element.value + constant_) : T(0);
    FUSEDVAE_UNROLL
    for (int k = 0; k < size; ++k) element.grads[k] = counts ? element.grads[k] : T(0);
  }

  const ElementwiseTask& task_;
  const bool is_plain_;
  const T factor_, constant_;
  const Factor<A> weight_{task_.weight}, incoming_{task_.incoming};
};

}  // namespace cuda
}  // namespace fusedvae
