// The latent's kernels for any task: any divergence, scales in any form, gradients that are summed, and float64.
#include "cuda/latent.h"

namespace fusedvae {
namespace cuda {

void launch_general(const LatentTask& task, const LatentPlan& plan, const Layouts& layouts, const Launch& on) {
  with_mixed_access(layouts, [&](auto access) {
    using A = decltype(access);
    plan.outputs.any(Output::column) ? launch_latent<A, Sums::of_columns>(task, plan, on)
                                     : launch_latent<A, Sums::of_all>(task, plan, on);
  });
}

}  // namespace cuda
}  // namespace fusedvae
