// A small emulation of the CUDA execution model, for kernels compiled by the host's compiler: what launches them.
//
// A block's threads are fibers of one CPU thread, and really stop at barriers, shuffles and votes; which thread goes
// on, and which block comes next, is drawn at random. Blocks run one after another. A seed, FUSEDVAE_EMULATION_SEED,
// chooses the order. Memory is the process's own, so the sanitizers watch every access. What a GPU leaves undefined is
// an error here: it is told on stderr, with the kernel, block and thread, and ends the process.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <tuple>

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
  constexpr unsigned long long count() const { return 1ULL * x * y * z; }
};

namespace emulation {

constexpr int kWarpSize = 32;
constexpr unsigned kMaxThreadsPerBlock = 1024;
constexpr size_t kSharedBytesPerBlock = 48 << 10;
constexpr size_t kParameterBytes = 4 << 10;

// What a lane gets where the hardware promises nothing: NaN, as a float and as a double.
constexpr uint64_t kPoison = 0x7FFBADBA7FFBADBAULL;

// The coordinates of the running thread.
struct Coordinates {
  uint3 thread;
  uint3 block;
  dim3 block_size;
  dim3 grid_size;
  int lane;  // its place in its warp
};
extern Coordinates current;

// Stops until every thread of the block is there, and counts those that came with `vote`.
int wait_for_block(bool vote);

// Stops until every lane of the mask has come with the same operation, then trades values.
struct Received {
  uint64_t value;  // what lane `source` gave; poison if the mask does not name that lane
  unsigned votes;  // the lanes that gave something other than zero
};
Received trade(const char* operation, unsigned mask, uint64_t value, int source);

// Ends the process with a message, as an error of the running thread.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// Runs the kernel to its end. False if a GPU would refuse a grid of that form.
bool run(const char* name, const void* kernel, dim3 grid, dim3 block, const std::function<void()>& thread);

// How kernels are launched, in place of the <<<...>>> that only CUDA compilers know. `error` is cudaGetLastError's.
extern int error;
constexpr int kInvalidConfiguration = 9;

template <class Stream, class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, Stream,
            Arguments&&... arguments) {
  static_assert((sizeof(Parameters) + ... + 0) <= kParameterBytes, "more parameters than a kernel can have");
  const std::tuple<Parameters...> parameters(std::forward<Arguments>(arguments)...);
  const bool dynamic_shared_memory = shared_bytes != 0;  // not emulated
  const auto thread = [&] { std::apply(kernel, parameters); };
  if (dynamic_shared_memory || !run(name, reinterpret_cast<const void*>(kernel), grid, block, thread))
    error = kInvalidConfiguration;
}

}  // namespace emulation
