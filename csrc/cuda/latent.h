// The latent's kernel, and what it is given. It is compiled in several files, at the same time.
#pragma once

#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/noise.h"
#include "cuda/pass.h"
#include "cuda/plan.h"
#include "cuda/run.h"
#include "math/sample.h"

namespace fusedvae {
namespace cuda {

struct LatentPlan : PassPlan {
  Finish finish;
  bool last_block_finishes = false;
  bool has_gradients = false;
  int64_t offset = 0;  // of the noise stream, if it is a number
};

// What a pass makes, as far as its kernel is compiled for it: the sample and values of the divergence, the gradients of
// both, or those of the sample alone.
enum class LatentMakes { anything, values, gradients, sample_gradients };

// The sample beside its divergence, and their gradients. Where it is known what the pass makes, operands are flat,
// noise comes from the seed, and the task is a plain one with the usual divergence, but for bounds of the scale.
template <class A, Sums sums, LatentMakes makes, bool is_bounded>
class LatentPass {
 public:
  using T = typename A::T;
  static constexpr bool kIsUsual = makes != LatentMakes::anything, kTakesRows = false;
  static constexpr int kInputs = kIsUsual ? UsualDivergence::kInputs : kMostInputs, kAhead = A::V == 1 ? 2 : 1;
  struct Fetched {
    Bits inputs[kInputs], noise, grad_z;
  };
  Made<A, kInputs, sums> made;

  __device__ __forceinline__ LatentPass(const LatentTask& task, const LatentPlan& plan)
      : made(task.divergence, plan),
        task_(task),
        plan_(plan),
        adaptation_(adaptation_for<T>(task.divergence, plan)),
        is_plain_(kIsUsual || plan.is_plain) {
    if (task.seed) seed_ = static_cast<uint64_t>(*task.seed);
    FUSEDVAE_UNROLL
    for (int k = 0; k < kInputs; ++k) inputs_[k].open(task.divergence.inputs[k]);
    noise_.open(task.noise);
    grad_z_.open(task.grad_z);
    incoming_.open(task.divergence.incoming, T(1));
    z_.open(task.z, task.z.given);
  }

  __device__ __forceinline__ void start(const Position& begin) {
    made.start(begin);
    FUSEDVAE_UNROLL
    for (int k = 0; k < kInputs; ++k) inputs_[k].start(begin, kLie);
    if (!kIsUsual) noise_.start(begin);
    if (makes != LatentMakes::values) grad_z_.start(begin, kLie);
    if (makes == LatentMakes::gradients) incoming_.start(begin, Lie::one);
    if (!kIsUsual || makes == LatentMakes::values) z_.start(begin);
    if constexpr (A::kIsFlat) first_ = plan_.offset + begin.batch * task_.index.batch + begin.inner;
  }

  __device__ __forceinline__ void advance(int elements) {
    made.advance(elements);
    FUSEDVAE_UNROLL
    for (int k = 0; k < kInputs; ++k) inputs_[k].advance(elements);
    noise_.advance(elements);
    grad_z_.advance(elements);
    incoming_.advance(elements);
    z_.advance(elements);
    first_ += elements;
  }

  __device__ __forceinline__ Fetched fetch(const Place<A>& at) const {
    Fetched fetched;
    FUSEDVAE_UNROLL
    for (int k = 0; k < kInputs; ++k) fetched.inputs[k] = inputs_[k].fetch(at, kLie);
    if (makes != LatentMakes::values) fetched.grad_z = grad_z_.fetch(at, kLie);
    if (!kIsUsual && !task_.seed) fetched.noise = noise_.fetch(at);
    return fetched;
  }

  __device__ __forceinline__ void apply(const Place<A>& at, const Fetched& fetched) {
    // The noise first: it takes the most registers, and what is fetched is not there yet.
    const Lanes<A> noise = noise_at(at, fetched.noise);
    Lanes<A> inputs[kInputs], z;
    FUSEDVAE_UNROLL
    for (int k = 0; k < kInputs; ++k) inputs[k] = inputs_[k].unpack(fetched.inputs[k], kLie);
    if (is_bounded) {
      FUSEDVAE_UNROLL
      for (int j = 0; j < A::V; ++j) inputs[1].at[j] = within_bounds(inputs[1].at[j]).value;
    }
    const Lanes<A> grad_z = makes == LatentMakes::values ? Lanes<A>{} : grad_z_.unpack(fetched.grad_z, kLie);
    const Lanes<A> incoming = kIsUsual ? Lanes<A>::of(incoming_.one()) : incoming_.read(at);
    const bool has_values = kIsUsual ? makes == LatentMakes::values : plan_.outputs.value != Output::none;
    const bool has_gradients = kIsUsual ? makes != LatentMakes::values : plan_.has_gradients;
    const auto apply_divergence = [&](auto tag) {
      using Divergence = typename decltype(tag)::type;
      Beside<Divergence> beside[A::V];
      if constexpr (!kIsUsual) {
        Spreads<Divergence, T> spreads[A::V];
        get_spreads(adaptation_, is_plain_, inputs, spreads);
        FUSEDVAE_UNROLL
        for (int j = 0; j < A::V; ++j) beside[j].spreads = spreads[j];
      }
      FUSEDVAE_UNROLL
      for (int j = 0; j < A::V; ++j) {
        sample(beside[j], Inputs<A, kInputs>(inputs, j).of, noise.at[j], incoming.at[j]);
        z.at[j] = beside[j].z;
      }
      if (has_values) {
        FUSEDVAE_UNROLL
        for (int j = 0; j < A::V; ++j) made.take_value(j, beside[j].element.value);
      }
      if (has_gradients) {
        // Unpacked again, what is given takes no registers meanwhile.
        const Lanes<A> given = is_bounded ? inputs_[1].unpack(fetched.inputs[1], kLie) : Lanes<A>{};
        FUSEDVAE_UNROLL
        for (int j = 0; j < A::V; ++j) {
          Element<T, Divergence::kInputs> found{};
          add_gradients(beside[j], grad_z.at[j], found.grads);
          if (is_bounded)
            found.grads[1] = FUSEDVAE_NAMESPACE::through(found.grads[1], within_bounds(given.at[j]).slope);
          made.take_gradients(j, found.grads);
        }
      }
    };
    if constexpr (kIsUsual)
      apply_divergence(FUSEDVAE_NAMESPACE::Tag<UsualDivergence>{});
    else
      FUSEDVAE_NAMESPACE::with_formula(task_.divergence.formula, apply_divergence, FUSEDVAE_NAMESPACE::Divergences{});
    if (!kIsUsual || !has_gradients) z_.write(at, z);
    if (has_values) made.write_values(at);
    if (has_gradients) made.write_gradients(at);
  }

 private:
  static constexpr Lie kLie = kIsUsual ? Lie::elements : Lie::any;
  static constexpr Rounding kRounding =
      A::kIsFlat && kStorageBytes<A> == 2 ? Rounding::to_16_bits : Rounding::to_32_bits;

  __device__ __forceinline__ int64_t noise_index(const Place<A>& at) const {
    if constexpr (A::kIsFlat) {
      return first_ + at;
    } else {
      const IndexStrides& index = task_.index;
      int64_t first = plan_.offset + at.batch * index.batch + at.outer * index.outer + at.inner * index.inner;
      if (task_.offset.data) first += static_cast<int64_t>(get<double>(task_.offset, 0));
      return first;
    }
  }
  __device__ __forceinline__ Lanes<A> noise_at(const Place<A>& at, const Bits& fetched) const {
    if (!kIsUsual && !task_.seed) return noise_.unpack(fetched);
    Lanes<A> noise;
    float made[A::V];
    normals<A::V, kRounding>(noise_index(at), seed_, made);
    FUSEDVAE_UNROLL
    for (int j = 0; j < A::V; ++j) noise.at[j] = static_cast<T>(made[j]);
    return noise;
  }

  // An element's sample and what is beside it.
  template <class Divergence>
  struct Beside {
    T z, d_scale;  // d_scale: the derivative of z by the scale
    Spreads<Divergence, T> spreads;
    Element<T, Divergence::kInputs> element;
    T d_z;
  };
  // Fills it in but for the spreads, if any may be wanted.
  template <class Divergence>
  __device__ __forceinline__ void sample(Beside<Divergence>& beside, const T* in, T noise, T incoming) const {
    if constexpr (kIsUsual) {
      const auto [deviation, growth] = FUSEDVAE_NAMESPACE::deviation_and_growth<kRounding>(in[1]);
      beside.z = in[0] + deviation * noise;
      beside.d_scale = 0.5f * (deviation * noise);
      beside.spreads.derived = {in[1], growth};
    } else {
      const Derived<T> deviation = deviation_of(in[1]);
      beside.z = in[0] + deviation.value * noise;
      beside.d_scale = noise * deviation.slope;
    }
    const auto at =
        FUSEDVAE_NAMESPACE::divergence_at<Divergence>(in, beside.spreads.derived, beside.z, noise, incoming);
    beside.element = at.element;
    beside.d_z = at.d_z;
  }

  // Only what comes in is added: nothing times a mean that is infinite would be a NaN.
  template <class Divergence>
  __device__ __forceinline__ void add_gradients(const Beside<Divergence>& beside, T grad_z, T* grads) const {
    if (kIsUsual || task_.grad_z.given) {
      grads[0] = grad_z;
      grads[1] = through_scale(grad_z, beside.d_scale);
    }
    if (kIsUsual ? makes == LatentMakes::gradients : task_.divergence.incoming.given) {
      auto element = beside.element;
      if (!is_plain_) adapt<Divergence>(adaptation_, beside.spreads, element.grads);
      if (Divergence::kIsAtSample) {
        grads[0] += beside.d_z;
        grads[1] += through_scale(beside.d_z, beside.d_scale);
      }
      FUSEDVAE_UNROLL
      for (int k = 0; k < Divergence::kInputs; ++k) grads[k] += element.grads[k];
    }
  }

  // Beyond the bounds of a scale there is no gradient, whatever comes in.
  __device__ __forceinline__ T through_scale(T d_z, T d_scale) const {
    return kIsUsual ? d_z * d_scale : FUSEDVAE_NAMESPACE::through(d_z, d_scale);
  }

  __device__ __forceinline__ Derived<T> within_bounds(T given) const {
    return FUSEDVAE_NAMESPACE::bounded(adaptation_.forms[0], given);
  }

  __device__ __forceinline__ Derived<T> deviation_of(T given) const {
    if (!is_plain_) return FUSEDVAE_NAMESPACE::deviation_of(adaptation_.forms[0], given);
    const T deviation = FUSEDVAE_NAMESPACE::exp_pair(T(0.5) * given).exp;
    return {deviation, T(0.5) * deviation};
  }

  const LatentTask& task_;
  const LatentPlan& plan_;
  const Adaptation<T>& adaptation_;
  const bool is_plain_;
  Source<A> inputs_[kInputs], noise_, grad_z_, incoming_;
  Sink<A> z_;
  uint64_t seed_ = 0;
  int64_t first_ = 0;  // the index of the noise where the thread is
};

// Blocks on a multiprocessor. Four leave a thread 64 registers, and put half of the threads on it that it can hold:
// with three operands of 16 bytes a thread, 48 KB are on their way, more than twice what the multiprocessor's share of
// the memory's latency asks for. Any divergences need more registers, and with two blocks still have enough on their
// way; in float64, or with sums for each column and element of an access, they leave room for one.
template <class A, Sums sums, LatentMakes makes>
constexpr int kLatentBlocks = makes != LatentMakes::anything                              ? 4
                              : sums == Sums::of_columns && std::is_same_v<A, MixedFloat> ? 1
                              : std::is_same_v<A, MixedDoubleScalar>                      ? 1
                                                                                          : 2;

template <class A, Sums sums, LatentMakes makes, bool is_bounded>
__global__ void __launch_bounds__(kThreads, kLatentBlocks<A, sums, makes>)
    latent_kernel(const __grid_constant__ LatentTask task, const __grid_constant__ LatentPlan plan,
                  const Workspace workspace) {
  LatentPass<A, sums, makes, is_bounded> pass(task, plan);
  run_block<A>(pass, task.divergence, plan, blockIdx.x, workspace.partials, task.divergence.value, 1);
  if (!plan.last_block_finishes || !is_last_block(workspace.done)) return;
  finish_outputs(task.divergence, plan, workspace.partials, {0, 1});
}

template <class A, Sums sums, LatentMakes makes = LatentMakes::anything, bool is_bounded = false>
void launch_latent(const LatentTask& task, const LatentPlan& plan, const Launch& on) {
  launch("latent", latent_kernel<A, sums, makes, is_bounded>, grid_of(plan.blocks), on, task, plan, Workspace(on));
}

// Where the kernels for any task are: of operands of any dtypes.
void launch_general(const LatentTask&, const LatentPlan&, const Layouts&, const Launch&);

}  // namespace cuda
}  // namespace fusedvae
