// The objective's kernels for any terms: also those that are not plain, or have weights, and those in float64.
#include "cuda/objective.h"

namespace fusedvae {
namespace cuda {

void launch_general(const ObjectiveTask& task, const Plan& plan, const Layouts& layouts, const Launch& on) {
  with_mixed_access(layouts, [&](auto access) {
    using A = decltype(access);
    plan.order == Order::by_column ? launch_objective<A, Sums::of_columns, true>(task, plan, on)
                                   : launch_objective<A, Sums::of_all, true>(task, plan, on);
  });
}

}  // namespace cuda
}  // namespace fusedvae
