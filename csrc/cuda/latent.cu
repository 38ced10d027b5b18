// One pass over the latent: the sample and the KL per sample, or their gradients.
#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/noise.h"
#include "cuda/pass.h"
#include "math/sample.h"

namespace fusedvae {
namespace cuda {
namespace {

using Kl = FUSEDVAE_NAMESPACE::KlStandardNormal;

template <class A>
class LatentPass {
 public:
  using T = typename A::T;
  struct Fetched {
    Bits mu, logvar, noise, grad_z;
  };
  static constexpr int kAhead = A::V == 1 ? 2 : 1;
  T sum = 0;  // of the KL, in units of the formula's

  __device__ __forceinline__ explicit LatentPass(const LatentTask& task) : task_(task) {
    if (task.seed) seed_ = static_cast<uint64_t>(*task.seed);
  }

  __device__ __forceinline__ Fetched fetch(const Position& at) const {
    return {cuda::fetch<A>(task_.mu, at), cuda::fetch<A>(task_.logvar, at), cuda::fetch<A>(task_.noise, at),
            cuda::fetch<A>(task_.grad_z, at)};
  }

  __device__ __forceinline__ void apply(const Position& at, const Fetched& fetched) {
    const Lanes<A> mu = unpack<A>(task_.mu, fetched.mu), logvar = unpack<A>(task_.logvar, fetched.logvar);
    const Lanes<A> grad_z = unpack<A>(task_.grad_z, fetched.grad_z), grad_kl = grad_kl_.at(at);
    Lanes<A> noise{}, z, d_mu, d_logvar;
    if (task_.seed) {
      float made[A::V];
      const IndexStrides& index = task_.index;
      normals<A::V>(at.batch * index.batch + at.outer * index.outer + at.inner * index.inner, seed_, made);
      FUSEDVAE_UNROLL
      for (int j = 0; j < A::V; ++j) noise.at[j] = static_cast<T>(made[j]);
    } else {
      noise = unpack<A>(task_.noise, fetched.noise);
    }
    FUSEDVAE_UNROLL
    for (int j = 0; j < A::V; ++j) {
      const T l = logvar.at[j], inputs[] = {mu.at[j], l};
      const auto kl = Kl::element(inputs, Kl::derive(l, T(0)), grad_kl.at[j]);
      const auto s = FUSEDVAE_NAMESPACE::sample<T>(mu.at[j], FUSEDVAE_NAMESPACE::exponential(T(0.5) * l), noise.at[j]);
      sum += kl.value;
      z.at[j] = s.value;
      // Only what comes in is added: nothing times a mean that is infinite would be a NaN.
      d_mu.at[j] = d_logvar.at[j] = 0;
      if (task_.grad_z.given) {
        d_mu.at[j] = grad_z.at[j];
        d_logvar.at[j] = grad_z.at[j] * s.d_logvar;
      }
      if (task_.grad_kl.given) {
        d_mu.at[j] += kl.grads[0];
        d_logvar.at[j] += kl.grads[1];
      }
    }
    write<A>(task_.z, at, z);
    write<A>(task_.grad_mu, at, d_mu);
    write<A>(task_.grad_logvar, at, d_logvar);
  }

 private:
  const LatentTask& task_;
  const Factor<A> grad_kl_{task_.grad_kl};
  uint64_t seed_ = 0;
};

Chunks chunks_of(const LatentTask& task) {
  return {task.extent.count(), task.kl ? task.extent.sample() : task.extent.count()};
}

// Sums of several chunks per sample are the last block's to add up, and so are those of samples without elements.
bool is_finished_by_last_block(const LatentTask& task) {
  return task.kl && task.extent.batch > 0 && chunks_of(task).per_segment != 1;
}

template <class A>
__global__ void __launch_bounds__(kThreads, kPassBlocks<A>)
    latent_kernel(const LatentTask task, const Chunks chunks, int64_t blocks, bool finished_by_last_block,
                  const Workspace workspace) {
  LatentPass<A> pass(task);
  for (int64_t block = blockIdx.x; block < blocks; block += gridDim.x) {
    const Share share = share_of(chunks, block);
    pass.sum = 0;
    run<A>(pass, share, chunks.team, task.extent);
    if (!task.kl.given) continue;
    const double sum = static_cast<double>(team_sum(pass.sum, chunks.team));
    if (share.lane != 0 || share.length == 0) continue;
    if (finished_by_last_block)
      workspace.partials[share.chunk] = sum;
    else
      put(task.kl, share.chunk * task.kl.stride[0], sum);
  }
  if (!finished_by_last_block || !is_last_block(workspace.done)) return;
  const int team = team_for(chunks.per_segment), thread = static_cast<int>(threadIdx.x);
  for (int64_t first = 0; first < task.extent.batch; first += kThreads / team) {
    const int64_t b = first + thread / team;
    double sum = 0;
    if (b < task.extent.batch)
      for (int64_t j = thread % team; j < chunks.per_segment; j += team)
        sum += partial_at(workspace.partials, b * chunks.per_segment + j);
    sum = team_sum(sum, team);
    if (b < task.extent.batch && thread % team == 0) put(task.kl, b * task.kl.stride[0], sum);
  }
}

}  // namespace

int64_t workspace_bytes(const LatentTask& task) {
  return is_finished_by_last_block(task) ? Workspace::bytes_for(chunks_of(task).count) : 0;
}

void latent(const LatentTask& task, const Launch& on) {
  const Chunks chunks = chunks_of(task);
  const bool finished_by_last_block = is_finished_by_last_block(task);
  if (chunks.count == 0 && !finished_by_last_block) return;
  const DeviceGuard guard(on.device);
  Layouts layouts(task.in_double);
  layouts.add(task.extent, {&task.mu, &task.logvar, &task.noise, &task.grad_z, &task.grad_kl, &task.z, &task.grad_mu,
                            &task.grad_logvar});
  if (task.seed) layouts.add_noise(task.extent, task.index);
  with_access(layouts, [&](auto access) {
    using A = decltype(access);
    launch("latent", latent_kernel<A>, grid_for(chunks.blocks(), kPassBlocks<A>, on.device), kThreads, 0,
           static_cast<cudaStream_t>(on.stream), task, chunks, chunks.blocks(), finished_by_last_block,
           Workspace(on.workspace));
  });
}

}  // namespace cuda
}  // namespace fusedvae
