// What a thread does with the elements of its share. A pass fetches the operands of an element (or vector of elements),
// and later applies formulas to what it fetched; kAhead is how many fetches it has under way at a time.
#pragma once

#include <cstdint>

#include "broadcast.h"
#include "cuda/access.h"
#include "cuda/arithmetic.h"
#include "cuda/sums.h"
// (the arithmetic above, the formulas below)
#include "math/formulas.h"
#include "tasks.h"

namespace fusedvae {
namespace cuda {

// Blocks on a multiprocessor. Four leave a thread 64 registers, and put half of the threads on it that it can hold:
// with three operands of 16 bytes a thread, 48 KB are on their way, more than twice what the multiprocessor's share of
// the memory's latency asks for. Eight elements at a time need more registers, and with two blocks still have enough on
// their way. So do the elementary functions of float64, which is here for exactness, not speed.
template <class A>
constexpr int kPassBlocks = A::V == 8 || std::is_same_v<typename A::T, double> ? 2
                            : A::V == 4                                        ? 4
                                                                               : 3;

// Runs a pass over the thread's share.
template <class A, class Pass>
__device__ __forceinline__ void run(Pass& pass, const Share& share, int team, const Extent& extent) {
  constexpr int kAhead = Pass::kAhead;
  for (int first = share.lane * A::V; first < share.length; first += kAhead * team * A::V) {
    typename Pass::Fetched fetched[kAhead];
    Position at[kAhead];
    FUSEDVAE_UNROLL
    for (int k = 0; k < kAhead; ++k) {
      const int offset = first + k * team * A::V;
      if (offset < share.length) fetched[k] = pass.fetch(at[k] = position_of(share.begin + offset, extent));
    }
    FUSEDVAE_UNROLL
    for (int k = 0; k < kAhead; ++k)
      if (first + k * team * A::V < share.length) pass.apply(at[k], fetched[k]);
  }
}

// A formula's values and gradients, written an element at a time, and their sums. `by_column`: the gradients have a sum
// for each of the columns that the thread is at.
template <class A, class Formula, bool by_column>
class ElementwisePass {
 public:
  using T = typename A::T;
  static constexpr int kInputs = Formula::kInputs, kAhead = 1;
  struct Fetched {
    Bits inputs[kInputs];
  };
  T sum = 0;                        // of the weighted values
  T grad_sums[kInputs] = {};        // without by_column
  Lanes<A> column_sums[kInputs]{};  // with it

  // The gradients are times the factor; the constant is added to values that are written.
  __device__ __forceinline__ ElementwisePass(const ElementwiseTask& task, const Gradients& gradients, double factor,
                                             double constant)
      : task_(task), gradients_(gradients), factor_(static_cast<T>(factor)), constant_(static_cast<T>(constant)) {
    if (!uniform_) return;
    uniform_scale_ = get<T>(task.inputs[Formula::kScale], 0);
    uniform_derived_ = Formula::derive(uniform_scale_, parameter_);
  }

  __device__ __forceinline__ Fetched fetch(const Position& at) const {
    Fetched fetched;
    FUSEDVAE_UNROLL
    for (int k = 0; k < kInputs; ++k)
      fetched.inputs[k] = k == Formula::kScale && uniform_ ? Bits{} : cuda::fetch<A>(task_.inputs[k], at);
    return fetched;
  }

  __device__ __forceinline__ void apply(const Position& at, const Fetched& fetched) {
    Lanes<A> inputs[kInputs], value, grads[kInputs];
    FUSEDVAE_UNROLL
    for (int k = 0; k < kInputs; ++k) inputs[k] = unpack<A>(task_.inputs[k], fetched.inputs[k]);
    const Lanes<A> weight = weight_.at(at);
    FUSEDVAE_UNROLL
    for (int j = 0; j < A::V; ++j) {
      T in[kInputs];
      FUSEDVAE_UNROLL
      for (int k = 0; k < kInputs; ++k) in[k] = inputs[k].at[j];
      auto derived = uniform_derived_;
      if (uniform_)
        in[Formula::kScale] = uniform_scale_;
      else
        derived = Formula::derive(in[Formula::kScale], parameter_);
      const auto element = Formula::element(in, derived, weight.at[j] * factor_);
      const T weighted = weight.at[j] * element.value;
      sum += weighted;
      value.at[j] = weighted + constant_;
      FUSEDVAE_UNROLL
      for (int k = 0; k < kInputs; ++k) {
        grads[k].at[j] = element.grads[k];
        if constexpr (by_column)
          column_sums[k].at[j] += element.grads[k];
        else
          grad_sums[k] += element.grads[k];
      }
    }
    write<A>(task_.value, at, value);
    FUSEDVAE_UNROLL
    for (int k = 0; k < kInputs; ++k)
      if (gradients_.of[k] == Gradient::element) write<A>(task_.grads[k], at, grads[k]);
  }

 private:
  const ElementwiseTask& task_;
  const Gradients& gradients_;
  const T factor_, constant_, parameter_ = static_cast<T>(task_.parameter);
  const Factor<A> weight_{task_.weight};
  // Of a scale that is one number, all that depends on it alone is derived once.
  const bool uniform_ = task_.inputs[Formula::kScale].is_uniform();
  T uniform_scale_ = 0;
  decltype(Formula::derive(T(), T())) uniform_derived_{};
};

}  // namespace cuda
}  // namespace fusedvae
