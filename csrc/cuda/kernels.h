// The CUDA kernels' interface. Nothing of CUDA's own is in it, so that the bindings need no CUDA headers.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "tasks.h"

namespace fusedvae {
namespace cuda {

// Where a kernel runs, and what its blocks share, which launches that may run at the same time must not.
struct Launch {
  int device = 0;
  void* stream = nullptr;
  // Memory for partial sums: at least as many bytes as the task's `workspace_bytes`, and aligned to 16.
  void* workspace = nullptr;
  // Where the blocks that are done are counted: 0 before the first launch; a launch leaves it so.
  unsigned* counter = nullptr;
};

// Counters of the current device's own, which are 0 to begin with and are there as long as the kernels are: for as
// long, that is, as a graph may be replayed that one of their launches was captured in.
struct Counters {
  unsigned* first;
  int64_t count;
};
Counters counters();

// On the current device, which must be the one that is named. None waits for it. They throw std::runtime_error.
void normal(const NormalTask&, const Launch&);
void latent(const LatentTask&, const Launch&);
void objective(const ObjectiveTask&, const Launch&);
void scale(const ScaleTask&, const Launch&);

// 0 where a launch needs no workspace.
int64_t workspace_bytes(const LatentTask&);
int64_t workspace_bytes(const ObjectiveTask&);

// Why these kernels cannot run on each of this machine's GPUs, in a sentence; empty if they can. One reason, where it
// is that of all of them.
std::vector<std::string> unavailable();

}  // namespace cuda
}  // namespace fusedvae
