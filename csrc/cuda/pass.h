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

// What a pass makes of an access's elements, and its sums. Beside values alone, one gradient may be summed.
template <class A, int inputs, Sums sums, int summed = -1>
class Made {
 public:
  using T = typename A::T;
  static constexpr Sums kSums = sums;
  static constexpr int kInputs = inputs;
  T value_sum = 0, grad_sums[inputs] = {};
  Lanes<A> value_columns{}, grad_columns[inputs]{};

  __device__ __forceinline__ Made(const ElementwiseTask& task, const PassPlan& plan)
      : constant_(static_cast<T>(plan.constant)) {
    values_.open(task.value, plan.outputs.value == Output::element);
    FUSEDVAE_UNROLL
    for (int k = 0; k < inputs; ++k) grads_[k].open(task.grads[k], plan.outputs.grads[k] == Output::element);
  }

  __host__ __device__ static constexpr bool sums_gradient(int k) { return sums != Sums::of_values || k == summed; }
  static constexpr int kSummed = sums != Sums::of_values ? inputs : summed >= 0 ? 1 : 0;

  __device__ __forceinline__ void start(const Position& begin) {
    value_sum = 0;
    values_.start(begin);
    FUSEDVAE_UNROLL
    for (int k = 0; k < inputs; ++k) {
      grad_sums[k] = 0;
      grads_[k].start(begin);
    }
  }
  __device__ __forceinline__ void advance(int elements) {
    values_.advance(elements);
    FUSEDVAE_UNROLL
    for (int k = 0; k < inputs; ++k) grads_[k].advance(elements);
  }
  // The sums of the gradients that are summed, one after the other.
  __device__ __forceinline__ void get_grad_sums(T* found) const {
    FUSEDVAE_UNROLL
    for (int k = 0; k < inputs; ++k)
      if (sums_gradient(k)) *found++ = grad_sums[k];
  }
  __device__ __forceinline__ void start_columns() {
    value_columns = {};
    FUSEDVAE_UNROLL
    for (int k = 0; k < inputs; ++k) grad_columns[k] = {};
  }

  // Takes what lane j has.
  __device__ __forceinline__ void take_value(int j, T value) {
    (sums == Sums::of_columns ? value_columns.at[j] : value_sum) += value;
    lanes_.at[j] = value;
  }
  template <int size>
  __device__ __forceinline__ void take_gradients(int j, const T (&values)[size]) {
    FUSEDVAE_UNROLL
    for (int k = 0; k < inputs; ++k) {
      const T grad = k < size ? values[k < size ? k : 0] : T(0);
      if (sums == Sums::of_columns)
        grad_columns[k].at[j] += grad;
      else if (sums_gradient(k))
        grad_sums[k] += grad;
      grad_lanes_[k].at[j] = grad;
    }
  }

  // Writes what is not summed.
  __device__ __forceinline__ void write_values(const Place<A>& at) {
    if (!values_.is_wanted()) return;
    FUSEDVAE_UNROLL
    for (int j = 0; j < A::V; ++j) lanes_.at[j] += constant_;
    values_.write(at, lanes_);
  }
  __device__ __forceinline__ void write_gradients(const Place<A>& at) const {
    FUSEDVAE_UNROLL
    for (int k = 0; k < inputs; ++k) grads_[k].write(at, grad_lanes_[k]);
  }

 private:
  const T constant_;
  Sink<A> values_, grads_[inputs];
  Lanes<A> lanes_{}, grad_lanes_[inputs]{};
};

// Inputs of one element, of lane j.
template <class A, int inputs>
struct Inputs {
  typename A::T of[inputs];
  __device__ __forceinline__ Inputs(const Lanes<A> (&lanes)[inputs], int j) {
    FUSEDVAE_UNROLL
    for (int k = 0; k < inputs; ++k) of[k] = lanes[k].at[j];
  }
};

// What a formula derives from its scales, and the derivatives of the forms that these are in.
template <class Formula, class T>
struct Spreads {
  decltype(Formula::plain(static_cast<const T*>(nullptr))) derived{};
  T slopes[kMostScales] = {T(1), T(1)};
};

template <class Formula, int k>
constexpr int kScaleAt = Formula::kScaleOf[k];

// Calls f with a form whose map is known when compiling.
template <class T, class F>
__device__ __forceinline__ void with_known_map(FormIn<T> form, const F& f) {
  switch (form.map) {
    case Map::exponential:
      return form.map = Map::exponential, f(form);
    case Map::linear:
      return form.map = Map::linear, f(form);
    case Map::softplus:
      return form.map = Map::softplus, f(form);
    default:
      return form.map = Map::bounded, f(form);
  }
}

// Scale k of all lanes: their form is looked at once.
template <int k, class Formula, class A>
__device__ __forceinline__ void get_scales(const Adaptation<typename A::T>& adaptation, const Lanes<A>* inputs,
                                           Scale<typename A::T> (&scales)[A::V][kMostScales]) {
  if constexpr (k < Formula::kScales) {
    constexpr int kPower = Formula::kPowers[k];
    const FormIn<typename A::T>& form = adaptation.forms[k];
    const Lanes<A>& given = inputs[kScaleAt<Formula, k>];
    if (form.has_log()) {
      FUSEDVAE_UNROLL
      for (int j = 0; j < A::V; ++j) scales[j][k] = FUSEDVAE_NAMESPACE::scale_of_log<kPower>(form, given.at[j]);
    } else {
      with_known_map(form, [&](const auto& known) {
        FUSEDVAE_UNROLL
        for (int j = 0; j < A::V; ++j) scales[j][k] = FUSEDVAE_NAMESPACE::scale_of_base<kPower>(known, given.at[j]);
      });
    }
  }
}

template <class Formula, class A, int inputs>
__device__ __forceinline__ void get_spreads(const Adaptation<typename A::T>& adaptation, bool is_plain,
                                            const Lanes<A> (&lanes)[inputs],
                                            Spreads<Formula, typename A::T> (&spreads)[A::V]) {
  if (Formula::kScales == 0 || is_plain) {
    FUSEDVAE_UNROLL
    for (int j = 0; j < A::V; ++j) spreads[j].derived = Formula::plain(Inputs<A, inputs>(lanes, j).of);
  } else if constexpr (Formula::kScales > 0) {
    Scale<typename A::T> scales[A::V][kMostScales];
    get_scales<0, Formula>(adaptation, lanes, scales);
    get_scales<1, Formula>(adaptation, lanes, scales);
    FUSEDVAE_UNROLL
    for (int j = 0; j < A::V; ++j) {
      spreads[j].derived = Formula::derive(scales[j]);
      FUSEDVAE_UNROLL
      for (int k = 0; k < Formula::kScales; ++k) spreads[j].slopes[k] = scales[j][k].slope;
    }
  }
}

// A formula's gradients as those that the task asks for.
template <class Formula, class T>
__device__ __forceinline__ void adapt(const Adaptation<T>& adaptation, const Spreads<Formula, T>& spreads, T* grads) {
  using FUSEDVAE_NAMESPACE::through;
  if constexpr (Formula::kScales > 0)
    grads[kScaleAt<Formula, 0>] = through(grads[kScaleAt<Formula, 0>], spreads.slopes[0]);
  if constexpr (Formula::kScales > 1)
    grads[kScaleAt<Formula, 1>] = through(grads[kScaleAt<Formula, 1>], spreads.slopes[1]);
  FUSEDVAE_UNROLL
  for (int k = 0; k < Formula::kInputs; ++k) grads[k] *= adaptation.gains[k];
}

// --- a formula's elements ---------------------------------------------------------------------------------------

// The formulas that are bound by memory: they have kernels of their own for flat operands of one dtype, and registers
// left for several fetches at a time.
using FUSEDVAE_NAMESPACE::List;
using LightFormulas = List<FUSEDVAE_NAMESPACE::GaussianNll,                  //
                           FUSEDVAE_NAMESPACE::LaplaceNll,                   //
                           FUSEDVAE_NAMESPACE::BernoulliNll,                 //
                           FUSEDVAE_NAMESPACE::BernoulliNllOfProbabilities,  //
                           FUSEDVAE_NAMESPACE::Mse,                          //
                           FUSEDVAE_NAMESPACE::L1,                           //
                           FUSEDVAE_NAMESPACE::KlStandardNormal,             //
                           FUSEDVAE_NAMESPACE::KlNormal>;
template <class Formula, class... Flat>
constexpr bool is_one_of(List<Flat...>) {
  return (std::is_same_v<Formula, Flat> || ...);
}
template <class Formula>
constexpr bool kIsLight = is_one_of<Formula>(LightFormulas{});

// The divergence that there are kernels for where operands are flat: beside the sample of the latent, and after an
// objective's first term.
using UsualDivergence = FUSEDVAE_NAMESPACE::KlStandardNormal;

// What a pass of a plain task makes, as far as its kernel is compiled for it: values; their sum and gradients; or
// gradients alone, that have an incoming factor each.
enum class Makes { anything, values, gradients, weighted_gradients };

// Values and gradients of a plain task without weights. The gradients are times the factor. Where it is known what the
// pass makes, operands are flat, the first two inputs vary within a chunk, and the uniform one does unless it is_one.
template <class A, class Formula, Sums sums, Makes makes = Makes::anything, bool is_one = false>
class PlainPass {
  static constexpr int kUniform = Formula::kUniform;
  static constexpr bool kIsKnown = makes != Makes::anything, kMakesValues = makes != Makes::weighted_gradients,
                        kMakesGradients = makes != Makes::values;

 public:
  using T = typename A::T;
  static constexpr bool kTakesRows = false;
  static constexpr int kInputs = Formula::kInputs,
                       kAhead = kIsLight<Formula> && kInputs < 4 && (A::V == 1 || (A::kIsFlat && A::V == 4)) ? 2 : 1;
  struct Fetched {
    Bits inputs[kInputs], incoming;
  };
  Made<A, kInputs, sums, is_one && kMakesGradients ? kUniform : -1> made;

  __device__ __forceinline__ PlainPass(const ElementwiseTask& task, const PassPlan& plan, double factor)
      : made(task, plan), factor_(static_cast<T>(factor)) {
    FUSEDVAE_UNROLL
    for (int k = 0; k < kInputs; ++k) inputs_[k].open(task.inputs[k]);
    incoming_.open(task.incoming, T(1));
  }

  __device__ __forceinline__ void start(const Position& begin) {
    made.start(begin);
    FUSEDVAE_UNROLL
    for (int k = 0; k < kInputs; ++k) inputs_[k].start(begin, lie_of(k));
    incoming_.start(begin, kIncoming);
    weight_ = incoming_.is_one(kIncoming) ? factor_ * incoming_.one() : factor_;
    if (is_derived_once()) {
      T one[kInputs] = {};
      one[kUniform < 0 ? 0 : kUniform] = inputs_[kUniform < 0 ? 0 : kUniform].one();
      uniform_spread_ = Formula::plain(one);
    }
  }

  __device__ __forceinline__ void advance(int elements) {
    made.advance(elements);
    FUSEDVAE_UNROLL
    for (int k = 0; k < kInputs; ++k) inputs_[k].advance(elements);
    incoming_.advance(elements);
  }

  __device__ __forceinline__ Fetched fetch(const Place<A>& at) const {
    Fetched fetched;
    FUSEDVAE_UNROLL
    for (int k = 0; k < kInputs; ++k) fetched.inputs[k] = inputs_[k].fetch(at, lie_of(k));
    if (kMakesGradients) fetched.incoming = incoming_.fetch(at, kIncoming);
    return fetched;
  }

  __device__ __forceinline__ void apply(const Place<A>& at, const Fetched& fetched) {
    Lanes<A> inputs[kInputs], weight = Lanes<A>::of(weight_);
    FUSEDVAE_UNROLL
    for (int k = 0; k < kInputs; ++k) inputs[k] = inputs_[k].unpack(fetched.inputs[k], lie_of(k));
    if (kMakesGradients && !incoming_.is_one(kIncoming)) {
      weight = incoming_.unpack(fetched.incoming, kIncoming);
      FUSEDVAE_UNROLL
      for (T& w : weight.at) w *= factor_;
    }
    FUSEDVAE_UNROLL
    for (int j = 0; j < A::V; ++j) {
      const Inputs<A, kInputs> in(inputs, j);
      auto spread = uniform_spread_;
      if (!is_derived_once()) spread = Formula::plain(in.of);
      const auto element = Formula::element(in.of, spread, weight.at[j]);
      if (kMakesValues) made.take_value(j, element.value);
      if (kMakesGradients) made.take_gradients(j, element.grads);
    }
    if (!kIsKnown || !kMakesGradients) made.write_values(at);
    if (kMakesGradients) made.write_gradients(at);
  }

 private:
  static constexpr Lie kIncoming = makes == Makes::anything             ? Lie::any
                                   : makes == Makes::weighted_gradients ? Lie::elements
                                                                        : Lie::one;
  __host__ __device__ static constexpr Lie lie_of(int k) {
    if (!kIsKnown) return Lie::any;
    if (k == kUniform) return is_one ? Lie::one : Lie::elements;
    return k < 2 ? Lie::elements : Lie::any;
  }
  // Whether there is one value that all of the spread depends on.
  __device__ __forceinline__ bool is_derived_once() const {
    if constexpr (Formula::kScales == 1 && kUniform >= 0)
      return kScaleAt<Formula, 0> == kUniform && inputs_[kUniform].is_one(lie_of(kUniform));
    else
      return false;
  }
  const T factor_;
  T weight_ = 1;  // of all gradients of the chunk
  Source<A> inputs_[kInputs], incoming_;
  decltype(Formula::plain(static_cast<const T*>(nullptr))) uniform_spread_{};
};

// How many inputs a formula has, or may have if it is void: one that is looked up.
template <class Formula>
constexpr int kInputsOf = Formula::kInputs;
template <>
constexpr int kInputsOf<void> = kMostInputs;

// Those of any task, of a formula that is known when compiling, or void. A constant is added to values before they are
// weighted.
template <class A, class Formula, Sums sums>
class GeneralPass {
 public:
  using T = typename A::T;
  static constexpr bool kTakesRows = true;
  static constexpr int kInputs = kInputsOf<Formula>, kAhead = 1;
  struct Fetched {
    Bits inputs[kInputs];  // but for the second
  };
  Made<A, kInputs, sums> made;

  __device__ __forceinline__ GeneralPass(const ElementwiseTask& task, const PassPlan& plan, double factor,
                                         double constant)
      : made(task, plan),
        task_(task),
        adaptation_(adaptation_for<T>(task, plan)),
        is_plain_(plan.is_plain),
        is_weighted_(task.weight.given),
        factor_(static_cast<T>(factor)),
        constant_(static_cast<T>(constant)) {
    FUSEDVAE_UNROLL
    for (int k = 0; k < kInputs; ++k)
      if (k != 1) inputs_[k].open(task.inputs[k]);
    second_.open(task.inputs[1]);
    weight_.open(task.weight, T(1));
    incoming_.open(task.incoming, T(1));
  }

  __device__ __forceinline__ void start(const Position& begin) {
    made.start(begin);
    FUSEDVAE_UNROLL
    for (int k = 0; k < kInputs; ++k)
      if (k != 1) inputs_[k].start(begin);
    second_.start(begin);
    weight_.start(begin);
    incoming_.start(begin);
  }

  __device__ __forceinline__ void advance(int elements) {
    made.advance(elements);
    FUSEDVAE_UNROLL
    for (int k = 0; k < kInputs; ++k)
      if (k != 1) inputs_[k].advance(elements);
    second_.advance(elements);
    weight_.advance(elements);
    incoming_.advance(elements);
  }

  __device__ __forceinline__ Fetched fetch(const Place<A>& at) const {
    Fetched fetched;
    FUSEDVAE_UNROLL
    for (int k = 0; k < kInputs; ++k)
      if (k != 1) fetched.inputs[k] = inputs_[k].fetch(at);
    return fetched;
  }

  __device__ __forceinline__ void apply(const Place<A>& at, const Fetched& fetched) {
    const Lanes<A> second = second_.read(at), weight = weight_.read(at), incoming = incoming_.read(at);
    Lanes<A> inputs[kInputs];
    FUSEDVAE_UNROLL
    for (int k = 0; k < kInputs; ++k) inputs[k] = k == 1 ? second : inputs_[k].unpack(fetched.inputs[k]);
    const auto apply_formula = [&](auto tag) {
      using Found = typename decltype(tag)::type;
      Spreads<Found, T> spreads[A::V];
      get_spreads(adaptation_, is_plain_, inputs, spreads);
      FUSEDVAE_UNROLL
      for (int j = 0; j < A::V; ++j) {
        const Inputs<A, kInputs> in(inputs, j);
        auto element = Found::element(in.of, spreads[j].derived, weight.at[j] * incoming.at[j] * factor_);
        if (!is_plain_) adapt<Found>(adaptation_, spreads[j], element.grads);
        if (is_weighted_) weigh(weight.at[j], element);
        made.take_value(j, element.value);
        made.take_gradients(j, element.grads);
      }
    };
    if constexpr (std::is_void_v<Formula>)
      FUSEDVAE_NAMESPACE::with_formula(task_.formula, apply_formula, FUSEDVAE_NAMESPACE::Formulas{});
    else
      apply_formula(FUSEDVAE_NAMESPACE::Tag<Formula>{});
    made.write_values(at);
    made.write_gradients(at);
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
  const Adaptation<T>& adaptation_;
  const bool is_plain_, is_weighted_;
  const T factor_, constant_;
  Source<A> inputs_[kInputs], incoming_;
  OtherSource<A> second_, weight_;
};

}  // namespace cuda
}  // namespace fusedvae
