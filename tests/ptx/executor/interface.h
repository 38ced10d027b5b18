// What the executor offers to Python and to the CUDA runtime in its place. Functions that can fail give 0 or not, and
// leave the reason in ptx_error.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__GNUC__)
#define PTX_EXPORT __attribute__((visibility("default")))
#else
#define PTX_EXPORT
#endif

extern "C" {
PTX_EXPORT const char* ptx_error();

// Reads the PTX of a program, and keeps it; gives its number, or -1.
PTX_EXPORT int ptx_load(const char* text);
// Keeps the PTX of a program, to be read when one of its kernels is asked for: of many programs few may be launched.
PTX_EXPORT void ptx_offer(const char* text);
// The module that has a kernel of this name, loaded or offered; -1 if none has, or if it cannot be read.
PTX_EXPORT int ptx_module_of(const char* kernel);

// The memory that kernels may touch, until it is forgotten.
PTX_EXPORT void ptx_allow(uint64_t address, uint64_t bytes);
PTX_EXPORT void ptx_forget_all();

// Runs a kernel. `parameters` are the addresses of its arguments, which have the sizes that it declares. `given` is how
// many of them there are; the kernel's others, behind them, are zero.
PTX_EXPORT int ptx_launch(int module, const char* kernel, const uint32_t grid[3], const uint32_t block[3],
                          size_t dynamic_bytes, const void* const* parameters, int given);
// How many parameters a kernel has; -1 if there is none of the name. And the bytes of one.
PTX_EXPORT int ptx_parameters(int module, const char* kernel);
PTX_EXPORT size_t ptx_parameter_bytes(int module, const char* kernel, int parameter);

// The order of warps and blocks of the launches to come; each takes another one.
PTX_EXPORT void ptx_seed(uint64_t seed);
// Approximate functions are off by up to so many units in the last place.
PTX_EXPORT void ptx_approximate(int units);

// What was run since the start or the last reset, of all kernels: launches, instructions of warps, instructions of
// lanes, bytes of global memory read and written.
struct PtxCounts {
  uint64_t launches, instructions, lane_instructions, bytes_read, bytes_written;
};
PTX_EXPORT void ptx_reset_counts();
PTX_EXPORT void ptx_counts(PtxCounts* counts);
// The same of each instruction: a line of its kernel, its line in the PTX, instructions of warps and lanes, its text,
// with tabs between them. The text is there until the next call.
PTX_EXPORT const char* ptx_profile();
}
