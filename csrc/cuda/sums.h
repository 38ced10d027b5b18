// Sums that are bitwise the same at every run and on every device: chunks of fixed size, each summed by a team of
// threads in a fixed tree, and the chunks' sums added up in order by the last block to finish.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/access.h"
#include "cuda/launch.h"

namespace fusedvae {
namespace cuda {

constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;
// Elements that a thread takes of a chunk: fewer where there are few, for they must go round all multiprocessors.
constexpr int kElements = 16, kFewElements = 8;
constexpr int64_t kFew = int64_t{1} << 20;

// How elements, in row-major order, are cut into chunks: each within one segment (a sample, say), which has a sum of
// its own. It depends on the sizes alone. A team is a power of two; it takes a chunk of so many elements a thread.
struct Chunks {
  int team = 1, per_thread = kElements;
  int64_t segment = 0;      // elements
  int64_t per_segment = 0;  // chunks
  int64_t count = 0;        // chunks in all

  Chunks() = default;
  Chunks(int64_t elements, int64_t segment_size) : segment(segment_size) {
    if (elements == 0) return;
    if (elements <= kFew) per_thread = kFewElements;
    while (team < kThreads && team * 4 < segment) team *= 2;
    per_segment = (segment + capacity() - 1) / capacity();
    count = elements / segment * per_segment;
  }
  __host__ __device__ int capacity() const { return team * per_thread; }
  int64_t blocks() const { return (count + kThreads / team - 1) / (kThreads / team); }
};

// The cut where columns have sums of their own: chunks of some rows and of a strip of columns. A group of rows is
// within one segment. A thread of a team goes down the rows, and has its columns to itself.
struct ColumnChunks {
  static constexpr int kColumns = 8;  // a thread
  int team = 1;
  int64_t strips = 0, rows = 0;  // rows in a group
  int64_t segment = 0;           // rows
  int64_t groups_per_segment = 0, groups = 0;

  ColumnChunks() = default;
  ColumnChunks(int64_t all_rows, int64_t segment_rows, int64_t columns) : segment(segment_rows) {
    while (team < kThreads && team * kColumns < columns) team *= 2;
    strips = (columns + team * kColumns - 1) / (team * kColumns);
    // Enough groups to fill a device, few enough that adding them up is quick.
    rows = all_rows > 4 * 256 ? (all_rows + 255) / 256 : 4;
    groups_per_segment = (segment + rows - 1) / rows;
    groups = all_rows / segment * groups_per_segment;
  }
  int64_t count() const { return groups * strips; }
};

// The calling thread's share of a chunk: elements begin + offset with offset < length, in steps of the team.
struct Share {
  int64_t chunk = 0, begin = 0;
  int length = 0;  // 0 for a team that has no chunk
  int lane = 0;    // in the team
};

__device__ __forceinline__ Share share_of(const Chunks& chunks, int64_t block) {
  const int teams = kThreads / chunks.team, thread = static_cast<int>(threadIdx.x), team = thread / chunks.team;
  Share share;
  share.chunk = block * teams + team;
  share.lane = thread - team * chunks.team;
  if (share.chunk >= chunks.count) return share;
  const int64_t segment = chunks.per_segment == 1 ? share.chunk : share.chunk / chunks.per_segment;
  const int64_t within = (share.chunk - segment * chunks.per_segment) * chunks.capacity();
  const int64_t rest = chunks.segment - within;
  share.begin = segment * chunks.segment + within;
  share.length = rest < chunks.capacity() ? static_cast<int>(rest) : chunks.capacity();
  return share;
}

// The sum of so many lanes of a warp, a power of two, known to each of them.
template <class T>
__device__ __forceinline__ T lanes_sum(T value, int lanes) {
  FUSEDVAE_UNROLL_BY(1)
  for (int step = lanes / 2; step > 0; step /= 2) value += __shfl_xor_sync(0xFFFFFFFFu, value, step);
  return value;
}

// The team's sum, known to each of its threads. All threads of the block take part, in teams of one size.
template <class T>
__device__ __forceinline__ T team_sum(T value, int team) {
  value = lanes_sum(value, team < kWarp ? team : kWarp);
  if (team <= kWarp) return value;
  __shared__ T of_warp[kWarps];
  const int thread = static_cast<int>(threadIdx.x), warps = team / kWarp;
  __syncthreads();  // the sums of the time before have been read
  if (thread % kWarp == 0) of_warp[thread / kWarp] = value;
  __syncthreads();
  return lanes_sum(of_warp[thread / team * warps + thread % warps], warps);
}

// Memory for the chunks' sums, and the count of the blocks that are done.
struct Workspace {
  unsigned* done;
  double* partials;

  static constexpr int64_t kHeader = 16;
  static int64_t bytes_for(int64_t partials) { return kHeader + partials * static_cast<int64_t>(sizeof(double)); }
  explicit Workspace(void* memory)
      : done(static_cast<unsigned*>(memory)),
        partials(memory ? reinterpret_cast<double*>(static_cast<char*>(memory) + kHeader) : nullptr) {}
};

// Whether this block is the last of the grid to come here; it then sees what all others wrote. The count wraps around
// to zero by itself, ready for the next launch.
__device__ __forceinline__ bool is_last_block(unsigned* done) {
  __shared__ unsigned before;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) before = atomicInc(done, gridDim.x - 1);
  __syncthreads();
  __threadfence();
  return before == gridDim.x - 1;
}

// Partial sums come from other blocks: never from this multiprocessor's own cache.
__device__ __forceinline__ double partial_at(const double* partials, int64_t index) {
  return *const_cast<const volatile double*>(partials + index);
}

// The power of two that a group of so many partial sums is added up by.
__device__ __forceinline__ int team_for(int64_t partials) {
  int team = 1;
  while (team < kThreads && team < partials) team *= 2;
  return team;
}

}  // namespace cuda
}  // namespace fusedvae
