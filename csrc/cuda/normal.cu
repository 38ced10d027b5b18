// The noise of a seed, in memory.
#include "cuda/access.h"
#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/noise.h"

namespace fusedvae {
namespace cuda {
namespace {

// V elements a thread and step. `out` is aligned to all of them, or V is 1.
template <class S, int V>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    normal_kernel(char* out, int64_t count, const int64_t* seed_address) {
  const uint64_t seed = static_cast<uint64_t>(*seed_address);
  const int64_t step = int64_t{V} * kThreads * gridDim.x;
  for (int64_t i = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * V; i < count; i += step) {
    float values[V];
    normals<V>(i, seed, values);
    Bits bits{};
    FUSEDVAE_UNROLL
    for (int j = 0; j < V; ++j) narrow<float, S>(values[j], bits, j);
    char* const address = out + i * static_cast<int64_t>(sizeof(S));
    if (i + V <= count) {
      store_bits<V * sizeof(S)>(address, bits);
    } else {
      FUSEDVAE_UNROLL
      for (int j = 0; j < V; ++j)
        if (i + j < count) {
          Bits one{};
          narrow<float, S>(values[j], one, 0);
          store_bits<sizeof(S)>(address + j * static_cast<int>(sizeof(S)), one);
        }
    }
  }
}

template <class S, int V>
void launch_normal(const NormalTask& task, const Launch& on) {
  const int64_t threads = (task.count + V - 1) / V;
  const unsigned grid = grid_for((threads + kThreads - 1) / kThreads, kBlocksPerMultiprocessor, on.device);
  launch("normal", normal_kernel<S, V>, grid, on, static_cast<char*>(task.out.data), task.count, task.seed);
}

template <class S>
void launch_widest(const NormalTask& task, const Launch& on) {
  const bool aligned = reinterpret_cast<uintptr_t>(task.out.data) % 16 == 0;
  aligned ? launch_normal<S, 16 / sizeof(S)>(task, on) : launch_normal<S, 1>(task, on);
}

}  // namespace

void normal(const NormalTask& task, const Launch& on) {
  if (task.count == 0) return;
  switch (task.out.dtype) {
    case DType::f32:
      return launch_widest<float>(task, on);
    case DType::f64:
      return launch_widest<double>(task, on);
    case DType::bf16:
      return launch_widest<__nv_bfloat16>(task, on);
    case DType::f16:
      return launch_widest<__half>(task, on);
    case DType::u8:
      throw std::runtime_error("fusedvae: noise is not made as integers");
  }
}

}  // namespace cuda
}  // namespace fusedvae
