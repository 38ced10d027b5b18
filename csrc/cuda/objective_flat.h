// The objective's kernels for flat operands of one dtype. Each dtype is compiled in a file of its own.
#pragma once

#include "cuda/objective.h"

namespace fusedvae {
namespace cuda {

template <class A, class Formula>
void launch_flat_formula(const ObjectiveTask& task, const Plan& plan, const Launch& on) {
  if constexpr (kIsLight<Formula>)
    launch("objective", flat_objective_kernel<A, Formula>, grid_of(plan.blocks), kThreads, 0,
           static_cast<cudaStream_t>(on.stream), task, plan, Workspace(on.workspace));
}

template <class A, class... Formula>
void launch_flat_formula(const ObjectiveTask& task, const Plan& plan, const Launch& on, List<Formula...>) {
  using Launcher = void (*)(const ObjectiveTask&, const Plan&, const Launch&);
  static constexpr Launcher launchers[] = {&launch_flat_formula<A, Formula>...};
  launchers[task.terms[0].elements.formula](task, plan, on);
}

template <class A>
void launch_flat(const ObjectiveTask& task, const Plan& plan, const Launch& on) {
  launch_flat_formula<A>(task, plan, on, FUSEDVAE_NAMESPACE::Formulas{});
}

}  // namespace cuda
}  // namespace fusedvae
