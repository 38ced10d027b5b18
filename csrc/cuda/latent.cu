// One pass over the latent: the sample and its divergence, or their gradients.
#include "cuda/latent.h"

#include <algorithm>

namespace fusedvae {
namespace cuda {
namespace {

template <class... Divergence>
bool has_usual_divergence(const LatentTask& task, FUSEDVAE_NAMESPACE::List<Divergence...>) {
  const bool found[] = {std::is_same_v<Divergence, UsualDivergence>...};
  return found[task.divergence.formula];
}

// Whether the scale is what the formula is written in, but for bounds.
bool is_plain_within_bounds(const ElementwiseTask& task) {
  ElementwiseTask unbounded = task;
  unbounded.forms[0].low = -INFINITY;
  unbounded.forms[0].high = INFINITY;
  return unbounded.is_plain();
}

// What the kernel can be compiled to know that the task makes, if its operands are flat.
LatentMakes makes_of(const LatentTask& task, const Outputs& outputs) {
  const ElementwiseTask& divergence = task.divergence;
  bool is_usual = task.seed && !task.offset.data && !divergence.in_double && is_plain_within_bounds(divergence) &&
                  has_usual_divergence(task, FUSEDVAE_NAMESPACE::Divergences{});
  bool has_gradients = false;
  for (int k = 0; k < UsualDivergence::kInputs; ++k) {
    is_usual = is_usual && divergence.inputs[k].stride[2] != 0 && !is_summed(outputs.grads[k]);
    has_gradients |= outputs.grads[k] != Output::none;
  }
  // The index within a sample is that in memory.
  is_usual = is_usual && outputs.value != Output::column && outputs.value != Output::row && task.index.inner == 1;
  if (!is_usual) return LatentMakes::anything;
  if (!has_gradients) return LatentMakes::values;
  const bool makes_values = outputs.value != Output::none || task.z;
  if (makes_values || task.grad_z.stride[2] == 0 || divergence.incoming.stride[2] != 0) return LatentMakes::anything;
  return divergence.incoming ? LatentMakes::gradients : LatentMakes::sample_gradients;
}

// The same task with the rows of its only sample for samples.
LatentTask arranged(const LatentTask& given) {
  LatentTask task = given;
  if (given.divergence.extent.batch != 1) return task;
  task.divergence = with_rows_for_samples(given.divergence);
  task.index = {given.index.outer, 0, given.index.inner};
  for (Operand* op : {&task.noise, &task.grad_z, &task.z}) take_rows_for_samples(*op);
  return task;
}

LatentPlan plan_of(const LatentTask& task, const Outputs& outputs, bool is_flat) {
  LatentPlan plan;
  const Order order = is_flat ? Order::flat : outputs.any(Output::column) ? Order::by_column : Order::any;
  static_cast<PassPlan&>(plan) =
      plan_of_pass(task.divergence, outputs, order, task.divergence.value.given, plan.finish);
  for (const Output grad : outputs.grads) plan.has_gradients |= grad != Output::none;
  plan.last_block_finishes = plan.finish.is_needed && !plan.finish.is_large();
  if (task.offset && !task.offset.data) plan.offset = static_cast<int64_t>(task.offset.value);
  return plan;
}

__global__ void __launch_bounds__(kThreads)
    finish_kernel(const __grid_constant__ LatentTask task, const __grid_constant__ LatentPlan plan,
                  const Workspace workspace) {
  finish_outputs(task.divergence, plan, workspace.partials, {blockIdx.x, gridDim.x});
}

}  // namespace

int64_t workspace_bytes(const LatentTask& given) {
  const LatentTask task = arranged(given);
  const Outputs outputs = outputs_of(task.divergence);
  int64_t partials = 0;
  bool is_needed = false;
  for (const bool is_flat : {false, true}) {
    const Finish finish = plan_of(task, outputs, is_flat).finish;
    is_needed |= finish.is_needed;
    partials = std::max(partials, finish.partials);
  }
  return is_needed ? Workspace::bytes_for(partials) : 0;
}

void latent(const LatentTask& given, const Launch& on) {
  const LatentTask task = arranged(given);
  const Outputs outputs = outputs_of(task.divergence);
  Layouts layouts(task.divergence.in_double);
  add_layouts(layouts, task.divergence, outputs, false);
  layouts.add(task.divergence.extent, {&task.noise, &task.grad_z, &task.z});
  if (task.seed) layouts.add_noise(task.divergence.extent, task.index, task.offset);
  const LatentMakes makes = makes_of(task, outputs);
  const bool is_flat = makes != LatentMakes::anything && layouts.are_samples_rows() && has_flat_access(layouts);
  const LatentPlan plan = plan_of(task, outputs, is_flat);
  if (plan.blocks == 0 && !plan.finish.is_needed) return;
  const auto launch_within = [&](auto access, auto is_bounded) {
    using A = decltype(access);
    if (makes == LatentMakes::values)
      launch_latent<A, Sums::of_values, LatentMakes::values, is_bounded>(task, plan, on);
    else if (makes == LatentMakes::gradients)
      launch_latent<A, Sums::of_values, LatentMakes::gradients, is_bounded>(task, plan, on);
    else
      launch_latent<A, Sums::of_values, LatentMakes::sample_gradients, is_bounded>(task, plan, on);
  };
  const auto launch_flat = [&](auto access) {
    task.divergence.forms[0].is_bounded() ? launch_within(access, std::true_type())
                                          : launch_within(access, std::false_type());
  };
  is_flat ? with_flat_access(layouts, launch_flat) : launch_general(task, plan, layouts, on);
  if (plan.finish.is_large())
    launch("finish", finish_kernel, static_cast<unsigned>(plan.finish.blocks), on, task, plan, Workspace(on));
}

}  // namespace cuda
}  // namespace fusedvae
