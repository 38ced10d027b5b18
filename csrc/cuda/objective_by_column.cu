// The objective's kernels for gradients that have a sum for each column.
#include "cuda/objective.h"

namespace fusedvae {
namespace cuda {

void launch_by_column(const ObjectiveTask& task, const Plan& plan, const Layouts& layouts, const Launch& on) {
  launch_for_any_dtypes<Sums::of_columns, false>(task, plan, layouts, on);
}

}  // namespace cuda
}  // namespace fusedvae
