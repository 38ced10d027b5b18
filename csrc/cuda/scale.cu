// Gradients times the incoming factor, which is almost always 1: then none of them is read or written.
#include "cuda/access.h"
#include "cuda/kernels.h"
#include "cuda/launch.h"

namespace fusedvae {
namespace cuda {
namespace {

template <class T, class S>
__device__ __forceinline__ void scale_elements(char* data, int64_t count, T factor) {
  constexpr int V = 16 / sizeof(S);
  const int64_t thread = int64_t{blockIdx.x} * kThreads + threadIdx.x, threads = int64_t{kThreads} * gridDim.x;
  const int64_t vectors = reinterpret_cast<uintptr_t>(data) % 16 == 0 ? count / V : 0;
  for (int64_t i = thread; i < vectors; i += threads) {
    const Bits before = load_bits<16>(data + i * 16);
    Bits after{};
    FUSEDVAE_UNROLL
    for (int j = 0; j < V; ++j) narrow<T, S>(widen<T, S>(before, j) * factor, after, j);
    store_bits<16>(data + i * 16, after);
  }
  for (int64_t i = vectors * V + thread; i < count; i += threads) {
    char* const address = data + i * static_cast<int64_t>(sizeof(S));
    Bits after{};
    narrow<T, S>(widen<T, S>(load_bits<sizeof(S)>(address), 0) * factor, after, 0);
    store_bits<sizeof(S)>(address, after);
  }
}

// One wave of blocks goes over all tensors.
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    scale_kernel(const __grid_constant__ ScaleTask task) {
  const double factor = get<double>(task.factor, 0);
  if (task.product.given && blockIdx.x == 0 && threadIdx.x == 0) put(task.product, 0, factor * task.coefficient.value);
  if (factor == 1.0) return;
  FUSEDVAE_UNROLL_BY(1)
  for (int k = 0; k < ScaleTask::kMost; ++k) {
    if (!task.tensors[k].given) continue;
    with_type(task.tensors[k].dtype, [&](auto* type) {
      using S = std::remove_pointer_t<decltype(type)>;
      using T = std::conditional_t<std::is_same_v<S, double>, double, float>;
      if constexpr (!std::is_same_v<S, uint8_t>)
        scale_elements<T, S>(static_cast<char*>(task.tensors[k].data), task.counts[k], static_cast<T>(factor));
    });
  }
}

}  // namespace

void scale(const ScaleTask& task, const Launch& on) {
  int64_t elements = 0;
  for (int k = 0; k < ScaleTask::kMost; ++k)
    if (task.tensors[k]) elements += task.counts[k];
  if (elements == 0 && !task.product) return;
  // 16 elements a thread and more: with a factor of 1, a block is over as soon as it starts.
  const unsigned grid = grid_for((elements + 16 * kThreads - 1) / (16 * kThreads), kBlocksPerMultiprocessor, on.device);
  launch("scale", scale_kernel, grid, on, task);
}

}  // namespace cuda
}  // namespace fusedvae
