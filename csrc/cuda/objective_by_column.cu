// The objective's kernels for gradients that have a sum for each column.
#include "cuda/objective.h"

namespace fusedvae {
namespace cuda {

void launch_by_column(const ObjectiveTask& task, const Plan& plan, const Layouts& layouts, const Launch& on) {
  with_mixed_float_access(
      layouts, [&](auto access) { launch_objective<decltype(access), Sums::of_columns, false>(task, plan, on); });
}

}  // namespace cuda
}  // namespace fusedvae
