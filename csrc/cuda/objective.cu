// An objective: its terms, their totals and gradients, in one launch.
#include "cuda/objective.h"

namespace fusedvae {
namespace cuda {
namespace {

bool is_summed(Gradient gradient) {
  return gradient != Gradient::none && gradient != Gradient::element;
}

// How many values an objective has.
int64_t values_of(const ObjectiveTask& task) {
  if (task.values != Values::sample) return 1;
  for (int k = 0; k < task.count; ++k)
    if (task.terms[k].elements.formula >= 0) return task.terms[k].elements.extent.batch;
  return task.terms[0].given_count;
}

// A segment is the elements whose sum some gradient, or the objective, has a value of its own for.
TermPlan plan_of(const Term& term, Values values, bool by_column) {
  TermPlan plan;
  const Extent& e = term.elements.extent;
  plan.gradients = gradients_of(e, term.elements.grads);
  const bool by_row = plan.gradients.any(Gradient::row);
  const bool by_sample = plan.gradients.any(Gradient::sample) || values == Values::sample;
  plan.chunks = Chunks(e.count(), by_row ? e.inner : by_sample ? e.sample() : e.count());
  if (by_column && e.count() > 0) {
    const int64_t rows = e.batch * e.outer;
    plan.columns = ColumnChunks(rows, by_row ? 1 : by_sample ? e.outer : rows, e.inner);
    plan.chunks.team = plan.columns.team;
    plan.chunks.per_segment = plan.columns.groups_per_segment * plan.columns.strips;
    plan.chunks.count = plan.columns.count();
  }
  plan.blocks = plan.chunks.blocks();
  return plan;
}

Plan plan_of(const ObjectiveTask& task) {
  Plan plan;
  plan.has_values = plan.is_finished_by_last_block = task.values != Values::element;
  plan.values = values_of(task);
  for (int k = 0; k < task.count; ++k) {
    const ElementwiseTask& elements = task.terms[k].elements;
    plan.by_column |= gradients_of(elements.extent, elements.grads).any(Gradient::column);
  }
  for (int k = 0; k < task.count; ++k) {
    const Term& term = task.terms[k];
    const bool is_given = term.elements.formula < 0;
    TermPlan& own = plan.terms[k];
    if (!is_given) own = plan_of(term, task.values, plan.by_column);
    if (plan.values > 0) own.addends = (is_given ? term.given_count : own.chunks.count) / plan.values;
    if (own.addends > plan.most_addends) plan.most_addends = own.addends;
    own.blocks_before = plan.blocks;
    plan.blocks += own.blocks;
    own.value_partials = plan.partials;
    if (plan.has_values) plan.partials += own.chunks.count;
    for (int i = 0; i < kMostInputs; ++i) {
      const Gradient gradient = own.gradients.of[i];
      if (!is_summed(gradient)) continue;
      plan.is_finished_by_last_block = true;
      own.grad_partials[i] = plan.partials;
      plan.partials +=
          gradient == Gradient::column ? own.columns.groups * term.elements.extent.inner : own.chunks.count;
    }
  }
  return plan;
}

}  // namespace

int64_t workspace_bytes(const ObjectiveTask& task) {
  const Plan plan = plan_of(task);
  return plan.is_finished_by_last_block ? Workspace::bytes_for(plan.partials) : 0;
}

void objective(const ObjectiveTask& task, const Launch& on) {
  const Plan plan = plan_of(task);
  if (plan.blocks == 0 && !plan.is_finished_by_last_block) return;
  const DeviceGuard guard(on.device);
  bool in_double = false;
  for (int k = 0; k < task.count; ++k) in_double |= task.terms[k].elements.in_double;
  Layouts layouts(in_double);
  for (int k = 0; k < task.count; ++k) {
    const ElementwiseTask& elements = task.terms[k].elements;
    if (elements.formula < 0) continue;
    layouts.add(elements.extent, {&elements.weight, &elements.value});
    for (int i = 0; i < kMostInputs; ++i) {
      layouts.add(elements.extent, {&elements.inputs[i]});
      if (plan.terms[k].gradients.of[i] == Gradient::element) layouts.add(elements.extent, {&elements.grads[i]});
    }
  }
  if (plan.by_column) return launch_by_column(task, plan, layouts, on);
  if (!with_single_access(layouts, [&](auto access) { launch_objective<decltype(access), false>(task, plan, on); }))
    launch_mixed(task, plan, layouts, on);
}

}  // namespace cuda
}  // namespace fusedvae
