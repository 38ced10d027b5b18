// The objective's kernels for operands of any dtypes.
#include "cuda/objective.h"

namespace fusedvae {
namespace cuda {

void launch_mixed(const ObjectiveTask& task, const Plan& plan, const Layouts& layouts, const Launch& on) {
  launch_for_any_dtypes<Sums::of_all, false>(task, plan, layouts, on);
}

}  // namespace cuda
}  // namespace fusedvae
