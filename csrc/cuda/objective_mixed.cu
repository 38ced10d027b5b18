// The objective's kernels for operands of any dtypes.
#include "cuda/objective.h"

namespace fusedvae {
namespace cuda {

void launch_mixed(const ObjectiveTask& task, const Plan& plan, const Layouts& layouts, const Launch& on) {
  with_mixed_float_access(
      layouts, [&](auto access) { launch_objective<decltype(access), Sums::of_all, false>(task, plan, on); });
}

}  // namespace cuda
}  // namespace fusedvae
