// The objective's kernels for terms that are not plain, or have weights.
#include "cuda/objective.h"

namespace fusedvae {
namespace cuda {

void launch_general(const ObjectiveTask& task, const Plan& plan, const Layouts& layouts, const Launch& on) {
  plan.by_column ? launch_for_any_dtypes<Sums::of_columns, true>(task, plan, layouts, on)
                 : launch_for_any_dtypes<Sums::of_all, true>(task, plan, layouts, on);
}

}  // namespace cuda
}  // namespace fusedvae
