// The latent's kernels for any divergence, scales in any form, and gradients that are summed.
#include "cuda/latent.h"

namespace fusedvae {
namespace cuda {

namespace {

template <Sums sums>
void launch_for_any_dtypes(const LatentTask& task, const LatentPlan& plan, const Layouts& layouts, const Launch& on) {
  if (layouts.in_double()) return launch_latent<MixedDoubleScalar, sums>(task, plan, on);
  layouts.width() >= 4 ? launch_latent<MixedFloat, sums>(task, plan, on)
                       : launch_latent<MixedFloatScalar, sums>(task, plan, on);
}

}  // namespace

void launch_general(const LatentTask& task, const LatentPlan& plan, const Layouts& layouts, const Launch& on) {
  plan.outputs.any(Output::column) ? launch_for_any_dtypes<Sums::of_columns>(task, plan, layouts, on)
                                   : launch_for_any_dtypes<Sums::of_all>(task, plan, layouts, on);
}

}  // namespace cuda
}  // namespace fusedvae
