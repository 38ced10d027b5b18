// The objective's kernels for flat operands of one dtype. Each dtype is compiled in a file of its own.
#pragma once

#include "cuda/objective.h"

namespace fusedvae {
namespace cuda {

// A formula's kernel, if it is light: for plain tasks, or for any.
template <class A, class Formula, bool is_plain>
constexpr ObjectiveKernel kernel_for() {
  if constexpr (!kIsLight<Formula>)
    return nullptr;
  else if constexpr (is_plain)
    return flat_objective_kernel<A, Formula>;
  else
    return adapted_objective_kernel<A, Formula>;
}

template <class A, class... Formula>
void launch_flat(const ObjectiveTask& task, const Plan& plan, const Launch& on, List<Formula...>) {
  static constexpr ObjectiveKernel kPlain[] = {kernel_for<A, Formula, true>()...};
  static constexpr ObjectiveKernel kAdapted[] = {kernel_for<A, Formula, false>()...};
  const int formula = task.terms[0].elements.formula;
  launch_kernel(plan.is_usual ? kPlain[formula] : kAdapted[formula], task, plan, on);
}

template <class A>
void launch_flat(const ObjectiveTask& task, const Plan& plan, const Launch& on) {
  launch_flat<A>(task, plan, on, FUSEDVAE_NAMESPACE::Formulas{});
}

}  // namespace cuda
}  // namespace fusedvae
