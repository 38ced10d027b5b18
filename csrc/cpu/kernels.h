// The CPU kernels' interface.
#pragma once

#include "tasks.h"

namespace fusedvae {

// The kernels of one instruction set.
struct Kernels {
  const char* isa;
  void (*normal)(const NormalTask&, int threads);
  void (*latent)(const LatentTask&, int threads);
  void (*nll)(const NllTask&, int threads);
  void (*elbo)(const ElboTask&, int threads);
  void (*scale)(const ScaleTask&, int threads);
};

// The best instruction set of this machine, or the one that FUSEDVAE_CPU_ISA names, as far as the machine has it.
const Kernels& kernels();

}  // namespace fusedvae
