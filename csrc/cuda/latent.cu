// One pass over the latent: the sample and the per-sample KL, or their gradients.
#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/walk.h"

namespace fusedvae {
namespace cuda {
namespace {

template <class A>
__global__ void __launch_bounds__(kThreads, kWalkBlocks<A>)
    latent_kernel(const LatentTask task, const Chunks chunks, int64_t blocks, const Workspace workspace) {
  using T = typename A::T;
  LatentWalk<A, true> walk(task, T(1));
  for (int64_t block = blockIdx.x; block < blocks; block += gridDim.x) {
    const Share share = share_of(chunks, block);
    walk.sum = 0;
    run<A>(walk, share, chunks.team, task.extent);
    if (!task.kl.given) continue;
    const T sum = team_sum(walk.sum, chunks.team);
    if (share.lane != 0 || share.length == 0) continue;
    if (chunks.per_segment == 1)
      put(task.kl, share.chunk * task.kl.stride[0], sum);
    else
      workspace.partials[share.chunk] = static_cast<double>(sum);
  }
  if (!task.kl.given || chunks.per_segment == 1) return;
  if (!is_last_block(workspace.done)) return;
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

// A KL of no elements is 0.
__global__ void __launch_bounds__(kThreads) zero_kernel(const Operand out, int64_t count) {
  for (int64_t i = threadIdx.x; i < count; i += kThreads) put(out, i * out.stride[0], 0.0);
}

Chunks chunks_of(const LatentTask& task) {
  return {task.extent.count(), task.kl ? task.extent.sample() : task.extent.count()};
}

}  // namespace

int64_t workspace_bytes(const LatentTask& task) {
  const Chunks chunks = chunks_of(task);
  return task.kl && chunks.per_segment > 1 ? Workspace::bytes_for(chunks.count) : 0;
}

void latent(const LatentTask& task, const Place& place) {
  const DeviceGuard guard(place.device);
  const auto stream = static_cast<cudaStream_t>(place.stream);
  if (task.extent.count() == 0) {
    if (task.kl && task.extent.batch > 0)
      launch("latent, empty", zero_kernel, 1, kThreads, 0, stream, task.kl, task.extent.batch);
    return;
  }
  Walked walked;
  walked.add(task.extent, {&task.mu, &task.logvar, &task.noise, &task.grad_z, &task.grad_kl, &task.z, &task.grad_mu,
                           &task.grad_logvar});
  if (task.seed) walked.add_noise(task.extent, task.index);
  const Chunks chunks = chunks_of(task);
  with_access(walked, [&](auto access) {
    using A = decltype(access);
    launch("latent", latent_kernel<A>, grid_for(chunks.blocks(), kWalkBlocks<A>, place.device), kThreads, 0, stream,
           task, chunks, chunks.blocks(), Workspace(place.workspace));
  });
}

}  // namespace cuda
}  // namespace fusedvae
