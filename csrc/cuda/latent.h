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

// The usual divergence; with its scale as it is written in, it has kernels of its own.
using UsualDivergence = FUSEDVAE_NAMESPACE::KlStandardNormal;

struct LatentPlan : PassPlan {
  bool has_gradients = false;
  int64_t offset = 0;  // of the noise stream, if it is a number
};

// The sample beside its divergence, and their gradients. Where values alone are summed, the task is a plain one with
// the usual divergence.
template <class A, Sums sums>
class LatentPass {
 public:
  using T = typename A::T;
  static constexpr bool kIsUsual = sums == Sums::of_values;
  static constexpr int kInputs = kIsUsual ? UsualDivergence::kInputs : kMostInputs, kAhead = A::V == 1 ? 2 : 1;
  struct Fetched {
    Bits inputs[kInputs], noise, grad_z;
  };
  Made<A, kInputs, sums> made;

  __device__ __forceinline__ LatentPass(const LatentTask& task, const LatentPlan& plan)
      : made(task.divergence, plan), task_(task), plan_(plan), is_plain_(kIsUsual || plan.is_plain) {
    if (task.seed) seed_ = static_cast<uint64_t>(*task.seed);
  }

  __device__ __forceinline__ Fetched fetch(const Position& at) const {
    Fetched fetched;
    FUSEDVAE_UNROLL
    for (int k = 0; k < kInputs; ++k) fetched.inputs[k] = cuda::fetch<A>(task_.divergence.inputs[k], at);
    fetched.noise = cuda::fetch<A>(task_.noise, at);
    fetched.grad_z = cuda::fetch<A>(task_.grad_z, at);
    return fetched;
  }

  __device__ __forceinline__ void apply(const Position& at, const Fetched& fetched) {
    Lanes<A> inputs[kInputs], z;
    FUSEDVAE_UNROLL
    for (int k = 0; k < kInputs; ++k) inputs[k] = unpack<A>(task_.divergence.inputs[k], fetched.inputs[k]);
    const Lanes<A> noise = noise_at(at, fetched.noise), grad_z = unpack<A>(task_.grad_z, fetched.grad_z);
    const Lanes<A> incoming = incoming_.at(at);
    const auto apply_divergence = [&](auto tag) {
      using Divergence = typename decltype(tag)::type;
      Beside<Divergence> beside[A::V];
      FUSEDVAE_UNROLL
      for (int j = 0; j < A::V; ++j) {
        beside[j] = sampled<Divergence>(Inputs<A, kInputs>(inputs, j).of, noise.at[j], incoming.at[j]);
        z.at[j] = beside[j].z;
      }
      // A pass has the one or the other, as a rule.
      if (plan_.outputs.value != Output::none) {
        FUSEDVAE_UNROLL
        for (int j = 0; j < A::V; ++j) made.take_value(j, beside[j].element.value);
      }
      if (plan_.has_gradients) {
        FUSEDVAE_UNROLL
        for (int j = 0; j < A::V; ++j) {
          Element<T, Divergence::kInputs> found{};
          add_gradients(beside[j], grad_z.at[j], found.grads);
          made.take_gradients(j, found.grads);
        }
      }
    };
    if constexpr (kIsUsual)
      apply_divergence(FUSEDVAE_NAMESPACE::Tag<UsualDivergence>{});
    else
      FUSEDVAE_NAMESPACE::with_formula(task_.divergence.formula, apply_divergence, FUSEDVAE_NAMESPACE::Divergences{});
    write<A>(task_.z, at, z);
    made.write_at(at);
  }

 private:
  __device__ __forceinline__ Lanes<A> noise_at(const Position& at, const Bits& fetched) const {
    if (!task_.seed) return unpack<A>(task_.noise, fetched);
    const IndexStrides& index = task_.index;
    Lanes<A> noise;
    float made[A::V];
    int64_t first = plan_.offset + at.batch * index.batch + at.outer * index.outer + at.inner * index.inner;
    if (!kIsUsual && task_.offset.data) first += static_cast<int64_t>(get<double>(task_.offset, 0));
    normals<A::V>(first, seed_, made);
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
  template <class Divergence>
  __device__ __forceinline__ Beside<Divergence> sampled(const T* in, T noise, T incoming) const {
    Beside<Divergence> beside;
    const Derived<T> deviation = deviation_of(in[1]);
    beside.z = in[0] + deviation.value * noise;
    beside.d_scale = noise * deviation.slope;
    beside.spreads = spreads_of<Divergence>(task_.divergence, is_plain_, in);
    const auto at = FUSEDVAE_NAMESPACE::divergence_at<Divergence>(in, beside.spreads.of, beside.z, noise, incoming);
    beside.element = at.element;
    beside.d_z = at.d_z;
    return beside;
  }

  // Only what comes in is added: nothing times a mean that is infinite would be a NaN.
  template <class Divergence>
  __device__ __forceinline__ void add_gradients(const Beside<Divergence>& beside, T grad_z, T* grads) const {
    if (task_.grad_z.given) {
      grads[0] = grad_z;
      grads[1] = grad_z * beside.d_scale;
    }
    if (task_.divergence.incoming.given) {
      auto element = beside.element;
      if (!is_plain_) adapt<Divergence>(task_.divergence, beside.spreads, element.grads);
      if (Divergence::kIsAtSample) {
        grads[0] += beside.d_z;
        grads[1] += beside.d_z * beside.d_scale;
      }
      FUSEDVAE_UNROLL
      for (int k = 0; k < Divergence::kInputs; ++k) grads[k] += element.grads[k];
    }
  }

  __device__ __forceinline__ Derived<T> deviation_of(T given) const {
    if (!is_plain_) return FUSEDVAE_NAMESPACE::deviation_of(task_.divergence.forms[0], given);
    const T deviation = FUSEDVAE_NAMESPACE::exponential(T(0.5) * given);
    return {deviation, T(0.5) * deviation};
  }

  const LatentTask& task_;
  const LatentPlan& plan_;
  const bool is_plain_;
  const Factor<A> incoming_{task_.divergence.incoming};
  uint64_t seed_ = 0;
};

// Blocks on a multiprocessor. Four leave a thread 64 registers, and put half of the threads on it that it can hold:
// with three operands of 16 bytes a thread, 48 KB are on their way, more than twice what the multiprocessor's share of
// the memory's latency asks for. Eight elements at a time need more registers, and with two blocks still have enough on
// their way. So do any divergences; with sums for each column and element of an access, they leave room for one.
template <class A, Sums sums>
constexpr int kLatentBlocks = sums == Sums::of_columns && std::is_same_v<A, MixedFloat> ? 1
                              : sums != Sums::of_values || A::V == 8                    ? 2
                              : A::V == 4                                               ? 4
                                                                                        : 3;

template <class A, Sums sums>
__global__ void __launch_bounds__(kThreads, kLatentBlocks<A, sums>)
    latent_kernel(const __grid_constant__ LatentTask task, const __grid_constant__ LatentPlan plan,
                  const Workspace workspace) {
  LatentPass<A, sums> pass(task, plan);
  run_blocks<A>(pass, task.divergence, plan, blockIdx.x, workspace.partials);
  if (!plan.is_finished_by_last_block || !is_last_block(workspace.done)) return;
  finish<sums>(task.divergence, plan, workspace.partials);
}

template <class A, Sums sums>
void launch_latent(const LatentTask& task, const LatentPlan& plan, const Launch& on) {
  launch("latent", latent_kernel<A, sums>, grid_for(plan.blocks, kLatentBlocks<A, sums>, on.device), kThreads, 0,
         static_cast<cudaStream_t>(on.stream), task, plan, Workspace(on.workspace));
}

// Where the kernels for any task are: of operands of any dtypes.
void launch_general(const LatentTask&, const LatentPlan&, const Layouts&, const Launch&);

}  // namespace cuda
}  // namespace fusedvae
