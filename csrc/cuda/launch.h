// How kernels are launched: all that knows of <<<...>>>.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cuda/kernels.h"

namespace fusedvae {
namespace cuda {

// Every kernel's block. Eight warps are enough to hide a block's barriers behind its neighbours' work.
constexpr int kLogThreads = 8, kThreads = 1 << kLogThreads;

// Of these, how many a multiprocessor holds: of threads 2048 on the chips of data centres, 1536 on all others.
#if defined(__CUDA_ARCH__) && ((__CUDA_ARCH__ > 800 && __CUDA_ARCH__ < 900) || __CUDA_ARCH__ >= 1100)
constexpr int kBlocksPerMultiprocessor = 6;
#else
constexpr int kBlocksPerMultiprocessor = 8;
#endif

inline void check(cudaError_t error, const char* what, const char* of = "") {
  if (error != cudaSuccess)
    throw std::runtime_error("fusedvae: " + std::string(what) + of + ": " + cudaGetErrorString(error));
}

// Asked once a device.
inline int multiprocessors(int device) {
  static std::mutex mutex;
  static std::vector<int> counts;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto index = static_cast<size_t>(device);
  if (counts.size() <= index) counts.resize(index + 1);
  if (counts[index] == 0)
    check(cudaDeviceGetAttribute(&counts[index], cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
  return counts[index];
}

// A block for each of so many.
inline unsigned grid_of(int64_t blocks) {
  return static_cast<unsigned>(blocks > 1 ? blocks : 1);
}

// Blocks for work that is not worth a block of its own: at most as many as the device holds at a time. They loop.
inline unsigned grid_for(int64_t blocks, int blocks_per_multiprocessor, int device) {
  const int64_t room = int64_t{blocks_per_multiprocessor} * multiprocessors(device);
  const int64_t grid = blocks < room ? blocks : room;
  return static_cast<unsigned>(grid > 1 ? grid : 1);
}

// In blocks of kThreads.
template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), unsigned grid, const Launch& on,
            Arguments&&... arguments) {
  kernel<<<grid, kThreads, 0, static_cast<cudaStream_t>(on.stream)>>>(std::forward<Arguments>(arguments)...);
  check(cudaGetLastError(), "launching the kernel ", name);
}

}  // namespace cuda
}  // namespace fusedvae
