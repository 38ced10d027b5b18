// One pass over the latent: the sample and its divergence, or their gradients.
#include "cuda/latent.h"

namespace fusedvae {
namespace cuda {
namespace {

template <class... Divergence>
bool has_usual_divergence(const LatentTask& task, FUSEDVAE_NAMESPACE::List<Divergence...>) {
  const bool found[] = {std::is_same_v<Divergence, UsualDivergence>...};
  return found[task.divergence.formula];
}

// Whether the task is one that has kernels of its own.
bool is_usual(const LatentTask& task, const Outputs& outputs) {
  bool usual = !task.divergence.in_double && has_usual_divergence(task, FUSEDVAE_NAMESPACE::Divergences{}) &&
               task.divergence.is_plain();
  for (const Output grad : outputs.grads) usual = usual && !is_summed(grad);
  return usual && outputs.value != Output::column && !task.offset.data;
}

LatentPlan plan_of(const LatentTask& task, int64_t* partials) {
  const Outputs outputs = outputs_of(task.divergence);
  LatentPlan plan;
  static_cast<PassPlan&>(plan) = plan_of_pass(task.divergence, outputs, outputs.any(Output::column), partials);
  for (const Output grad : outputs.grads) plan.has_gradients |= grad != Output::none;
  if (task.offset && !task.offset.data) plan.offset = static_cast<int64_t>(task.offset.value);
  return plan;
}

}  // namespace

int64_t workspace_bytes(const LatentTask& task) {
  int64_t partials = 0;
  return plan_of(task, &partials).is_finished_by_last_block ? Workspace::bytes_for(partials) : 0;
}

void latent(const LatentTask& task, const Launch& on) {
  int64_t partials = 0;
  const LatentPlan plan = plan_of(task, &partials);
  if (plan.blocks == 0 && !plan.is_finished_by_last_block) return;
  const DeviceGuard guard(on.device);
  Layouts layouts(task.divergence.in_double);
  add_layouts(layouts, task.divergence, plan.outputs);
  layouts.add(task.divergence.extent, {&task.noise, &task.grad_z, &task.z});
  if (task.seed) layouts.add_noise(task.divergence.extent, task.index, task.offset);
  if (!is_usual(task, plan.outputs)) return launch_general(task, plan, layouts, on);
  const auto launch_usual = [&](auto access) { launch_latent<decltype(access), Sums::of_values>(task, plan, on); };
  if (!with_single_access(layouts, launch_usual)) with_mixed_float_access(layouts, launch_usual);
}

}  // namespace cuda
}  // namespace fusedvae
