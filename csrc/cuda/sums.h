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
// its own. It depends on the sizes alone. A team is a power of two, of a block at most, and takes a chunk of so many
// elements a thread. Every block has its chunks and ends with them: the next one begins wherever there is room, so that
// no multiprocessor waits for another, and what is on its way at a time lies close together, as memory likes it.
struct Chunks {
  // Blocks: enough to go round the multiprocessors of a large device; so few that their sums are added up in no time.
  static constexpr int64_t kEnough = 1024, kMost = 16 * kEnough;
  // A thread's elements. Fewer where there are few, for they must go round all multiprocessors.
  static constexpr int kFewElements = 8, kSomeElements = 16, kManyElements = 32;
  static constexpr int64_t kFew = int64_t{1} << 18;

  int log_team = 0;
  uint32_t capacity = 0;    // elements of a chunk
  int64_t segment = 0;      // elements
  int64_t per_segment = 0;  // chunks
  int64_t count = 0;        // chunks in all: fewer than 2^32

  Chunks() = default;
  Chunks(int64_t elements, int64_t segment_size) : segment(segment_size) {
    if (elements == 0) return;
    while (team() < kThreads && team() * kFewElements < segment) ++log_team;
    int per_thread = elements <= kFew ? kFewElements : kSomeElements;
    const auto blocks = [&] { return elements / (kThreads * per_thread); };
    while (blocks() > (per_thread < kManyElements ? kEnough : kMost) && team() * per_thread < segment) per_thread *= 2;
    capacity = static_cast<uint32_t>(team() * per_thread);
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
  static constexpr int64_t kEnough = 4096;
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
    while (rows < segment && (all_rows + rows - 1) / rows * strips > kEnough) rows *= 2;
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

__device__ __forceinline__ Share share_of(const Chunks& chunks, uint32_t chunk) {
  Share share;
  if (chunk >= static_cast<uint32_t>(chunks.count)) return share;
  const uint32_t per_segment = static_cast<uint32_t>(chunks.per_segment), segment = chunk / per_segment;
  share.segment = segment;
  share.within = static_cast<int64_t>(uint64_t{chunk - segment * per_segment} * chunks.capacity);
  const int64_t rest = chunks.segment - share.within;
  share.length = static_cast<int>(rest < chunks.capacity ? rest : chunks.capacity);
  return share;
}

// The sums over a team that may be larger than a warp, known to its first thread. All threads of the block take part,
// in teams of one size, and wait for each other before they do so again.
template <class T, int N>
__device__ __forceinline__ void add_up_team(T (&sums)[N], int team) {
  const auto add_lanes = [&](int step) {
    FUSEDVAE_UNROLL
    for (T& sum : sums) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, step);
  };
  if (team < kWarp) {
    FUSEDVAE_UNROLL_BY(1)
    for (int step = team / 2; step > 0; step /= 2) add_lanes(step);
    return;
  }
  FUSEDVAE_UNROLL
  for (int step = kWarp / 2; step > 0; step /= 2) add_lanes(step);
  if (team == kWarp) return;
  __shared__ T of_warps[N][kWarps];
  const unsigned thread = threadIdx.x, warp = thread / kWarp;
  if (thread % kWarp == 0) {
    FUSEDVAE_UNROLL
    for (int k = 0; k < N; ++k) of_warps[k][warp] = sums[k];
  }
  __syncthreads();
  const unsigned lane = thread & static_cast<unsigned>(team - 1);
  if (lane >= kWarp) return;
  FUSEDVAE_UNROLL
  for (int k = 0; k < N; ++k) sums[k] = lane < static_cast<unsigned>(team / kWarp) ? of_warps[k][warp + lane] : T(0);
  FUSEDVAE_UNROLL
  for (int step = kWarps / 2; step > 0; step /= 2) add_lanes(step);
}

// Memory for the chunks' sums, and the count of the blocks that are done.
struct Workspace {
  unsigned* done;
  double* partials;

  // Never 0: what is added up of nothing needs the count.
  static int64_t bytes_for(int64_t partials) {
    return (partials > 0 ? partials : 1) * static_cast<int64_t>(sizeof(double));
  }
  explicit Workspace(const Launch& on) : done(on.counter), partials(static_cast<double*>(on.workspace)) {}
};

// Whether this block is the last of the grid to come here; it then sees what all others wrote. The count wraps around
// to zero by itself, ready for the next launch.
__device__ __forceinline__ bool is_last_block(unsigned* done) {
  __shared__ bool is_last;
  __syncthreads();  // what the block has to write is written
  if (threadIdx.x == 0) {
    const unsigned last = gridDim.x - 1;
    unsigned before = last;
#if defined(__CUDA_ARCH__)
    // What the block wrote is released, and what the others wrote is acquired. A fence would order far more.
    asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;"
                 : "=r"(before)
                 : "l"(__cvta_generic_to_global(done)), "r"(last)
                 : "memory");
#endif
    is_last = before == last;
  }
  __syncthreads();
  return is_last;
}

// --- what is added up in the end --------------------------------------------------------------------------------

// Partial sums that a thread has on their way at a time.
constexpr int kLoads = 8;

// Of so many at most is a value made: lanes count them in 32 bits, and look ahead.
constexpr int64_t kMostAddends = INT32_MAX - (kLoads << kLogThreads);

// The team that adds up a value's partial sums.
__host__ __device__ inline int log_team_for(int64_t addends) {
  int log_team = 0;
  while ((1 << log_team) < kThreads && (kLoads << log_team) < addends) ++log_team;
  return log_team;
}

// Which blocks are at it: those of a launch, or the one that was done last with what came before.
struct Crew {
  int64_t block, blocks;
};

// Calls visit(v, lane) for each of so many values, with each lane of a team. In the end v may be past the last.
template <class Visit>
__device__ __forceinline__ void for_each_value(int64_t values, int log_team, const Crew& crew, const Visit& visit) {
  const int teams = kThreads >> log_team, thread = static_cast<int>(threadIdx.x);
  FUSEDVAE_UNROLL_BY(1)
  for (int64_t first = crew.block * teams; first < values; first += crew.blocks * teams) {
    visit(first + (thread >> log_team), thread & ((1 << log_team) - 1));
    __syncthreads();
  }
}

// A lane's share of the sum of addend(j) over j < addends, `loads` of them at a time.
template <int loads, class Addend>
__device__ __forceinline__ double share_of_sum(int addends, int log_team, int lane, const Addend& addend) {
  double sum = 0;
  FUSEDVAE_UNROLL_BY(1)
  for (int j = lane; j < addends; j += loads << log_team) {
    double loaded[loads];
    FUSEDVAE_UNROLL
    for (int k = 0; k < loads; ++k) {
      const int at = j + (k << log_team);
      loaded[k] = at < addends ? addend(at) : 0;
    }
    FUSEDVAE_UNROLL
    for (int k = 0; k < loads; ++k) sum += loaded[k];
  }
  return sum;
}

// Partial sums come from other blocks: never from this multiprocessor's own cache.
__device__ __forceinline__ double partial_at(const double* partials, int64_t index) {
  return __ldcg(partials + index);
}

// A thread's share of the sum of so many of them that lie together, which all the block adds up.
__device__ __forceinline__ double share_of_partials(const double* partials, int count) {
  double sum = 0;
  const double* next = partials + threadIdx.x;
  FUSEDVAE_UNROLL_BY(1)
  for (int left = count - static_cast<int>(threadIdx.x); left > 0; left -= kLoads * kThreads) {
    double loaded[kLoads];
    FUSEDVAE_UNROLL
    for (int k = 0; k < kLoads; ++k) loaded[k] = left > k * kThreads ? __ldcg(next + k * kThreads) : 0;
    FUSEDVAE_UNROLL
    for (int k = 0; k < kLoads; ++k) sum += loaded[k];
    next += kLoads * kThreads;
  }
  return sum;
}

}  // namespace cuda
}  // namespace fusedvae
