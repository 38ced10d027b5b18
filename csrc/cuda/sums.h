// Sums that are bitwise the same at every run and on every device: chunks of fixed size, each summed by a team of
// threads in a fixed tree, and the chunks' sums added up in order: by the last block to finish or, where they are many,
// by a launch of their own.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/access.h"
#include "cuda/launch.h"

namespace fusedvae {
namespace cuda {

constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;

// How elements, in row-major order, are cut into chunks: each within one segment (a sample, say), which has a sum of
// its own. It depends on the sizes alone. A team is a power of two, of a warp at most: so nobody waits for a block on
// the way. It takes a chunk of so many elements a thread.
struct Chunks {
  // Enough of them to go round the warps of a large device; few enough to be added up in no time.
  static constexpr int64_t kEnough = 4096, kMost = 4 * kEnough;
  // A thread's. Fewer where there are few, for they must go round all multiprocessors.
  static constexpr int kFewElements = 8, kSomeElements = 16, kManyElements = 128;
  static constexpr int64_t kFew = int64_t{1} << 18;

  int log_team = 0;
  int64_t capacity = 0;     // elements of a chunk
  int64_t segment = 0;      // elements
  int64_t per_segment = 0;  // chunks
  int64_t count = 0;        // chunks in all

  Chunks() = default;
  Chunks(int64_t elements, int64_t segment_size) : segment(segment_size) {
    if (elements == 0) return;
    while (team() < kWarp && team() * 4 < segment) ++log_team;
    int per_thread = elements <= kFew ? kFewElements : kSomeElements;
    const auto chunks = [&] { return (elements + team() * per_thread - 1) / (team() * per_thread); };
    while (chunks() > (per_thread < kManyElements ? kEnough : kMost) && team() * per_thread < segment) per_thread *= 2;
    capacity = team() * per_thread;
    per_segment = (segment + capacity - 1) / capacity;
    count = elements / segment * per_segment;
  }
  __host__ __device__ int team() const { return 1 << log_team; }
  __host__ __device__ int teams() const { return kThreads >> log_team; }  // in a block
  int64_t blocks() const { return (count + teams() - 1) / teams(); }
};

// The cut where columns have sums of their own: chunks of some rows and of a strip of columns. A group of rows is
// within one segment. A thread of a team goes down the rows, and has its columns to itself.
struct ColumnChunks {
  static constexpr int kColumns = 4;  // a thread
  static constexpr int kFewRows = 4;
  int log_team = 0;
  int64_t strips = 0, rows = kFewRows;  // rows in a group
  int64_t segment = 0;                  // rows
  int64_t groups_per_segment = 0, groups = 0;

  ColumnChunks() = default;
  ColumnChunks(int64_t all_rows, int64_t segment_rows, int64_t columns) : segment(segment_rows) {
    while ((1 << log_team) < kWarp && width() < columns) ++log_team;
    strips = (columns + width() - 1) / width();
    // A row at a time is on its way: few rows, so that many threads wait at the same time. But each group leaves a
    // partial sum for every column: no more of them than fill a device.
    while (rows < segment && (all_rows + rows - 1) / rows * strips > Chunks::kEnough) rows *= 2;
    groups_per_segment = (segment + rows - 1) / rows;
    groups = all_rows / segment * groups_per_segment;
  }
  __host__ __device__ int width() const { return kColumns << log_team; }
  int64_t count() const { return groups * strips; }
};

// The calling thread's share of a chunk: elements begin + offset with offset < length, in steps of the team.
struct Share {
  int64_t segment = 0;
  int64_t within = 0;  // where in the segment the chunk begins
  int length = 0;      // 0 for a team that has no chunk
};

__device__ __forceinline__ Share share_of(const Chunks& chunks, int64_t chunk) {
  Share share;
  if (chunk >= chunks.count) return share;
  // There are fewer than 2^32 chunks: their sums would take more memory than there is.
  const uint32_t c = static_cast<uint32_t>(chunk), per_segment = static_cast<uint32_t>(chunks.per_segment);
  const uint32_t segment = c / per_segment;
  share.segment = segment;
  share.within = static_cast<int64_t>(c - segment * per_segment) * chunks.capacity;
  const int64_t rest = chunks.segment - share.within;
  share.length = static_cast<int>(rest < chunks.capacity ? rest : chunks.capacity);
  return share;
}

// The sum of so many lanes of a warp, a power of two, known to each of them.
template <class T>
__device__ __forceinline__ T lanes_sum(T value, int lanes) {
  if (lanes == kWarp) {  // as it mostly is
    FUSEDVAE_UNROLL
    for (int step = kWarp / 2; step > 0; step /= 2) value += __shfl_xor_sync(0xFFFFFFFFu, value, step);
    return value;
  }
  FUSEDVAE_UNROLL_BY(1)
  for (int step = lanes / 2; step > 0; step /= 2) value += __shfl_xor_sync(0xFFFFFFFFu, value, step);
  return value;
}

// The sum over a team that may be larger than a warp, known to each of its threads. All threads of the block take part,
// in teams of one size.
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
  __syncthreads();  // what the block has to write is written
  if (threadIdx.x == 0) {
    __threadfence();
    before = atomicInc(done, gridDim.x - 1);
    __threadfence();
  }
  __syncthreads();
  return before == gridDim.x - 1;
}

// --- what is added up in the end --------------------------------------------------------------------------------

// Partial sums that a thread has on their way at a time.
constexpr int kLoads = 4;

// The power of two that a value's partial sums are added up by.
__host__ __device__ inline int team_for(int64_t addends) {
  int team = 1;
  while (team < kThreads && team * kLoads < addends) team *= 2;
  return team;
}

// Which blocks are at it: those of a launch, or the one that was done last with what came before.
struct Crew {
  int64_t block, blocks;
};

// Calls visit(v, lane) for each of so many values, with each lane of a team. In the end v may be past the last.
template <class Visit>
__device__ __forceinline__ void for_each_value(int64_t values, int team, const Crew& crew, const Visit& visit) {
  const int teams = kThreads / team, thread = static_cast<int>(threadIdx.x);
  FUSEDVAE_UNROLL_BY(1)
  for (int64_t first = crew.block * teams; first < values; first += crew.blocks * teams)
    visit(first + thread / team, thread % team);
}

// The sum of addend(j) over j < addends, `loads` of them at a time, known to each lane of the team. All threads of the
// block take part.
template <int loads, class Addend>
__device__ __forceinline__ double sum_of(int addends, int team, int lane, const Addend& addend) {
  double sum = 0;
  FUSEDVAE_UNROLL_BY(1)
  for (int j = lane; j < addends; j += loads * team) {
    double loaded[loads];
    FUSEDVAE_UNROLL
    for (int k = 0; k < loads; ++k) loaded[k] = j + k * team < addends ? addend(j + k * team) : 0;
    FUSEDVAE_UNROLL
    for (int k = 0; k < loads; ++k) sum += loaded[k];
  }
  return team_sum(sum, team);
}

// Partial sums come from other blocks: never from this multiprocessor's own cache.
__device__ __forceinline__ double partial_at(const double* partials, int64_t index) {
  return __ldcg(partials + index);
}

}  // namespace cuda
}  // namespace fusedvae
