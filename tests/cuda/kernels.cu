// Small kernels, right and wrong, that show what the emulation does and what it catches: `kernels NAME [COUNT]` runs
// one and prints what it wrote, a number a line. test_cuda_emulation.py says what each must give.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cinttypes>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <string>

#include "math/philox.h"

namespace {

constexpr unsigned kThreads = 96, kFull = 0xFFFFFFFFu;

// --- a block's sum through shared memory ------------------------------------------------------------------------

enum class Sum { right, no_barrier_before_reading, no_barrier_before_writing_again, mask_too_wide };

template <Sum how>
__global__ void block_sums(const float* in, float* out, int count) {
  __shared__ float partial[kThreads / warpSize];
  const int lane = static_cast<int>(threadIdx.x % warpSize), warp = static_cast<int>(threadIdx.x / warpSize);
  for (int round = 0; round < 2; ++round) {
    const int i = static_cast<int>((blockIdx.x * 2 + round) * blockDim.x + threadIdx.x);
    float sum = i < count ? in[i] : 0;
    if (how == Sum::mask_too_wide && lane == 31) return;
    for (unsigned step = warpSize / 2; step > 0; step /= 2) sum += __shfl_down_sync(kFull, sum, step);
    if (lane == 0) partial[warp] = sum;
    if (how != Sum::no_barrier_before_reading) __syncthreads();
    if (threadIdx.x == 0) {
      sum = 0;
      for (unsigned w = 0; w < kThreads / warpSize; ++w) sum += partial[w];
      out[blockIdx.x * 2 + round] = sum;
    }
    if (how != Sum::no_barrier_before_writing_again) __syncthreads();
  }
}

template <Sum how>
void sums(int count) {
  const unsigned blocks = (static_cast<unsigned>(count) + 2 * kThreads - 1) / (2 * kThreads);
  const std::unique_ptr<float[]> in(new float[static_cast<size_t>(count)]), out(new float[2 * blocks]);
  for (int i = 0; i < count; ++i) in[static_cast<size_t>(i)] = static_cast<float>(i % 7);
  emulation::launch("block_sums", block_sums<how>, blocks, kThreads, 0, cudaStream_t(), in.get(), out.get(), count);
  for (unsigned b = 0; b < 2 * blocks; ++b) std::printf("%g\n", out[b]);
}

// --- within a warp ----------------------------------------------------------------------------------------------

template <bool synchronised>
__global__ void reverse_in_warp(int* out) {
  __shared__ int lanes[warpSize];
  lanes[threadIdx.x] = static_cast<int>(threadIdx.x);
  if (synchronised) __syncwarp();
  out[threadIdx.x] = lanes[warpSize - 1 - threadIdx.x];
}

template <bool synchronised>
void reversed(int) {
  int out[warpSize];
  emulation::launch("reverse_in_warp", reverse_in_warp<synchronised>, 1, warpSize, 0, cudaStream_t(), out);
  for (const int v : out) std::printf("%d\n", v);
}

// A row of every lane's results for each operation.
__global__ void warp_operations(double* out) {
  const int lane = static_cast<int>(threadIdx.x);
  int row = 0;
  const auto put = [&](auto value) { out[row++ * warpSize + lane] = static_cast<double>(value); };
  for (const int width : {32, 8}) {
    put(__shfl_sync(kFull, lane, 5, width));
    put(__shfl_up_sync(kFull, lane + 0.5f, 3, width));
    put(__shfl_down_sync(kFull, lane + 0.25, 3, width));
    put(__shfl_xor_sync(kFull, static_cast<unsigned>(lane), 6, width));
  }
  put(__ballot_sync(kFull, lane % 3 == 0));
  put(__any_sync(kFull, lane == 7));
  put(__all_sync(kFull, lane != 7));
  // Halves of a warp apart, each with a mask of its own.
  put(__shfl_xor_sync(lane < 16 ? 0xFFFFu : 0xFFFF0000u, lane, 1));
  // From a lane that the mask does not name.
  put(__shfl_sync(lane < 16 ? 0xFFFFu : 0xFFFF0000u, static_cast<float>(lane), 20));
  put(__syncthreads_count(lane < 9));
  put(__syncthreads_or(lane == 3));
  put(__syncthreads_and(lane != 3));
}

void warp(int) {
  constexpr int kRows = 16;
  double out[kRows * warpSize];
  emulation::launch("warp_operations", warp_operations, 1, warpSize, 0, cudaStream_t(), out);
  for (const double v : out) std::printf("%.17g\n", v);
}

enum class Mask { of_another_lane, of_more_lanes, that_others_do_not_share };

template <Mask mask>
__global__ void masked() {
  const unsigned lane = threadIdx.x % warpSize;
  if (mask == Mask::of_another_lane) __shfl_sync(1u << ((lane + 1) % 32), 0, 0);
  if (mask == Mask::of_more_lanes) __shfl_sync(kFull, 0, 0);
  if (mask == Mask::that_others_do_not_share) __shfl_sync(lane < 16 ? kFull : 0xFFFF0000u, 0, 0);
}

template <Mask mask>
void mask_of(int threads) {
  emulation::launch("masked", masked<mask>, 1, static_cast<unsigned>(threads), 0, cudaStream_t());
}

// --- other mistakes ---------------------------------------------------------------------------------------------

__global__ void barrier_that_some_skip() {
  if (threadIdx.x < 40) __syncthreads();
}
void divergent(int) {
  emulation::launch("barrier_that_some_skip", barrier_that_some_skip, 1, 64, 0, cudaStream_t());
}

__global__ void read_what_nobody_wrote(float* out) {
  __shared__ float values[4];
  if (threadIdx.x > 0) values[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = values[threadIdx.x];
}
void unwritten(int) {
  float out[4];
  emulation::launch("read_what_nobody_wrote", read_what_nobody_wrote, 1, 4, 0, cudaStream_t(), out);
  for (const float v : out) std::printf("%g\n", v);
}

__global__ void vector_load(const float* in, float* out) {
  const float4 v = __ldg(reinterpret_cast<const float4*>(in));
  *out = v.x + v.y + v.z + v.w;
}
void vector(int offset) {
  alignas(16) const float in[8] = {1, 2, 3, 4, 5, 6, 7, 8};
  float out;
  emulation::launch("vector_load", vector_load, 1, 1, 0, cudaStream_t(), in + offset, &out);
  std::printf("%g\n", out);
}

// --- order, and the last block ----------------------------------------------------------------------------------

__global__ void tickets(int* counter, int* out) {
  const unsigned thread = blockIdx.x * blockDim.x + threadIdx.x;
  out[thread] = atomicAdd(counter, 1);
}
void order(int) {
  int counter = 0, out[4 * 64];
  emulation::launch("tickets", tickets, 4, 64, 0, cudaStream_t(), &counter, out);
  for (const int v : out) std::printf("%d\n", v);
}

__global__ void last_block(unsigned* counter, int* out) {
  __threadfence();
  if (atomicInc(counter, gridDim.x - 1) == gridDim.x - 1) ++*out;
}
void last(int) {
  unsigned counter = 0;
  int out = 0;
  for (int run = 0; run < 3; ++run)
    emulation::launch("last_block", last_block, 5, 1, 0, cudaStream_t(), &counter, &out);
  std::printf("%d\n%u\n", out, counter);
}

// --- grids and coordinates --------------------------------------------------------------------------------------

__global__ void coordinates(int* visits) {
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  ++visits[block * blockDim.x * blockDim.y * blockDim.z + thread];
}
void grid(int) {
  int visits[2 * 3 * 4 * 5 * 2 * 3] = {};
  emulation::launch("coordinates", coordinates, dim3(2, 3, 4), dim3(5, 2, 3), 0, cudaStream_t(), visits);
  for (const int v : visits) std::printf("%d\n", v);
}

void refused(int) {
  const struct {
    dim3 grid, block;
  } forms[] = {{0, 32}, {1, 1025}, {dim3(1, 65536), 32}, {1, 0}, {1, dim3(1, 1, 65)}};
  for (const auto& form : forms) {
    emulation::launch("coordinates", coordinates, form.grid, form.block, 0, cudaStream_t(), nullptr);
    std::printf("%d\n", cudaGetLastError());
  }
  std::printf("%d\n", cudaGetLastError());
}

// --- the noise's integers: counters and seeds on stdin, words on stdout
// -----------------------------------------------

__global__ void philox(const uint64_t* block_numbers, const uint64_t* seeds, uint32_t* words) {
  const unsigned i = threadIdx.x;
  const uint64_t low = block_numbers[i] & 0xFFFFFFFFu, high = block_numbers[i] >> 32;
  const auto w = fusedvae::FUSEDVAE_NAMESPACE::philox4x32<uint64_t>(low, high, 0, 0, seeds[i]);
  const uint64_t all[] = {w.w0, w.w1, w.w2, w.w3};
  for (int k = 0; k < 4; ++k) words[4 * i + k] = static_cast<uint32_t>(all[k]);
}
void philox_words(int count) {
  const auto n = static_cast<size_t>(count);
  const std::unique_ptr<uint64_t[]> numbers(new uint64_t[n]), seeds(new uint64_t[n]);
  const std::unique_ptr<uint32_t[]> words(new uint32_t[4 * n]);
  for (size_t i = 0; i < n; ++i)
    if (std::scanf("%" SCNu64 " %" SCNu64, &numbers[i], &seeds[i]) != 2) std::exit(2);
  const auto threads = static_cast<unsigned>(count);
  emulation::launch("philox", philox, 1, threads, 0, cudaStream_t(), numbers.get(), seeds.get(), words.get());
  for (size_t i = 0; i < 4 * n; ++i) std::printf("%" PRIu32 "\n", words[i]);
}

// --- conversions: bits on stdin, bits or values on stdout -------------------------------------------------------

template <class Convert>
void convert(Convert conversion) {
  unsigned bits;
  while (std::scanf("%u", &bits) == 1) std::printf("%u\n", conversion(bits));
}
void half_to_float(int) {
  convert([](unsigned bits) { return __float_as_uint(__half2float({static_cast<uint16_t>(bits)})); });
}
void float_to_half(int) {
  convert([](unsigned bits) -> unsigned { return __float2half_rn(__uint_as_float(bits)).bits; });
}
void bfloat16_to_float(int) {
  convert([](unsigned bits) { return __float_as_uint(__bfloat162float({static_cast<uint16_t>(bits)})); });
}
void float_to_bfloat16(int) {
  convert([](unsigned bits) -> unsigned { return __float2bfloat16_rn(__uint_as_float(bits)).bits; });
}

}  // namespace

int main(int argc, char** argv) {
  const std::map<std::string, void (*)(int)> kernels = {
      {"sums", sums<Sum::right>},
      {"sums, no barrier before reading", sums<Sum::no_barrier_before_reading>},
      {"sums, no barrier before writing again", sums<Sum::no_barrier_before_writing_again>},
      {"sums, mask too wide", sums<Sum::mask_too_wide>},
      {"reversed", reversed<true>},
      {"reversed, no barrier", reversed<false>},
      {"warp", warp},
      {"mask of another lane", mask_of<Mask::of_another_lane>},
      {"mask of more lanes", mask_of<Mask::of_more_lanes>},
      {"mask that others do not share", mask_of<Mask::that_others_do_not_share>},
      {"divergent barrier", divergent},
      {"unwritten", unwritten},
      {"vector by intrinsic", vector},
      {"order", order},
      {"last block", last},
      {"grid", grid},
      {"refused", refused},
      {"philox", philox_words},
      {"half to float", half_to_float},
      {"float to half", float_to_half},
      {"bfloat16 to float", bfloat16_to_float},
      {"float to bfloat16", float_to_bfloat16},
  };
  kernels.at(argv[1])(argc > 2 ? std::atoi(argv[2]) : 0);
  return 0;
}
