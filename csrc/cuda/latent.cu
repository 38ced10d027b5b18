// One pass over the latent: the sample and the per-sample KL, or their gradients.
#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/walk.h"

namespace fusedvae {
namespace cuda {
namespace {

Chunks chunks_of(const LatentTask& task) {
  return {task.extent.count(), task.kl ? task.extent.sample() : task.extent.count()};
}

// Sums of several chunks a sample are the last block's to add up, and so are those of samples without elements.
bool is_finished_by_last_block(const LatentTask& task) {
  return task.kl && task.extent.batch > 0 && chunks_of(task).per_segment != 1;
}

template <class A>
__global__ void __launch_bounds__(kThreads, kWalkBlocks<A>)
    latent_kernel(const LatentTask task, const Chunks chunks, int64_t blocks, bool finished_by_last_block,
                  const Workspace workspace) {
  using T = typename A::T;
  LatentWalk<A, true> walk(task, T(1));
  for (int64_t block = blockIdx.x; block < blocks; block += gridDim.x) {
    const Share share = share_of(chunks, block);
    walk.sum = 0;
    run<A>(walk, share, chunks.team, task.extent);
    if (!task.kl.given) continue;
    const T sum = team_sum(walk.sum, chunks.team);
    if (share.lane != 0 || share.length == 0) continue;
    if (finished_by_last_block)
      workspace.partials[share.chunk] = static_cast<double>(sum);
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

void latent(const LatentTask& task, const Place& place) {
  const Chunks chunks = chunks_of(task);
  const bool finished_by_last_block = is_finished_by_last_block(task);
  if (chunks.count == 0 && !finished_by_last_block) return;
  const DeviceGuard guard(place.device);
  Walked walked;
  walked.add(task.extent, {&task.mu, &task.logvar, &task.noise, &task.grad_z, &task.grad_kl, &task.z, &task.grad_mu,
                           &task.grad_logvar});
  if (task.seed) walked.add_noise(task.extent, task.index);
  with_access(walked, [&](auto access) {
    using A = decltype(access);
    launch("latent", latent_kernel<A>, grid_for(chunks.blocks(), kWalkBlocks<A>, place.device), kThreads, 0,
           static_cast<cudaStream_t>(place.stream), task, chunks, chunks.blocks(), finished_by_last_block,
           Workspace(place.workspace));
  });
}

}  // namespace cuda
}  // namespace fusedvae
