// The CPU kernels' interface.
#pragma once

#include "tasks.h"

namespace fusedvae {

// The kernels of one instruction set.
struct Kernels {
  const char* isa;
  void (*normal)(const NormalTask&, int threads);
  void (*latent)(const LatentTask&, int threads);
  void (*objective)(const ObjectiveTask&, int threads);
  void (*scale)(const ScaleTask&, int threads);
};

// The best instruction set of this machine, or the one that FUSEDVAE_CPU_ISA names. Throws std::runtime_error if that
// is none, or one that the machine has not.
const Kernels& kernels();

// Throws std::bad_alloc. In one place, since what the kernels' translation units share the linker picks from any.
[[noreturn]] void out_of_memory();

}  // namespace fusedvae
