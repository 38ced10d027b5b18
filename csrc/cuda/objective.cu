// An objective: its terms, their totals and gradients, in one launch.
#include "cuda/objective.h"

namespace fusedvae {
namespace cuda {
namespace {

// How many values an objective has.
int64_t values_of(const ObjectiveTask& task) {
  if (task.values != Values::sample) return 1;
  for (int k = 0; k < task.count; ++k)
    if (task.terms[k].elements.formula >= 0) return task.terms[k].elements.extent.batch;
  return task.terms[0].given_count;
}

// What the kernel makes of a term: of values that the objective has, sums.
Outputs outputs_of_term(const Term& term, Values values) {
  if (term.elements.formula < 0) return {};
  Outputs outputs = outputs_of(term.elements);
  if (values == Values::total) outputs.value = Output::total;
  if (values == Values::sample) outputs.value = Output::sample;
  return outputs;
}

Plan plan_of(const ObjectiveTask& task) {
  Plan plan;
  plan.has_values = plan.is_finished_by_last_block = task.values != Values::element;
  plan.values = values_of(task);
  for (int k = 0; k < task.count; ++k)
    plan.by_column |= outputs_of_term(task.terms[k], task.values).any(Output::column);
  for (int k = 0; k < task.count; ++k) {
    const Term& term = task.terms[k];
    TermPlan& own = plan.terms[k];
    const bool is_given = term.elements.formula < 0;
    if (!is_given) {
      static_cast<PassPlan&>(own) =
          plan_of_pass(term.elements, outputs_of_term(term, task.values), plan.by_column, &plan.partials);
      if (!term.elements.weight) own.constant = term.constant;
      plan.is_general |= !own.is_plain || term.elements.weight;
      plan.is_finished_by_last_block |= own.is_finished_by_last_block;
    }
    if (plan.values > 0) own.addends = (is_given ? term.given_count : own.chunks.count) / plan.values;
    if (own.addends > plan.most_addends) plan.most_addends = own.addends;
    own.blocks_before = plan.blocks;
    plan.blocks += own.blocks;
  }
  return plan;
}

// --- the order of the terms -------------------------------------------------------------------------------------

template <class... Formula>
bool is_divergence(int formula, FUSEDVAE_NAMESPACE::List<Formula...>) {
  const bool found[] = {kIsDivergence<Formula>...};
  return formula >= 0 && found[formula];
}

bool is_divergence(const Term& term) {
  return is_divergence(term.elements.formula, FUSEDVAE_NAMESPACE::Formulas{});
}

// The same objective, its divergence in the second place if it is alone.
ObjectiveTask arranged(const ObjectiveTask& given) {
  ObjectiveTask task = given;
  if (task.count == 1 && is_divergence(task.terms[0])) {
    task.terms[1] = task.terms[0];
    task.terms[0] = Term();
    task.count = 2;
  }
  return task;
}

bool has_usual_order(const ObjectiveTask& task) {
  return !is_divergence(task.terms[0]) && (task.terms[1].elements.formula < 0 || is_divergence(task.terms[1]));
}

}  // namespace

int64_t workspace_bytes(const ObjectiveTask& task) {
  const Plan plan = plan_of(arranged(task));
  return plan.is_finished_by_last_block ? Workspace::bytes_for(plan.partials) : 0;
}

void objective(const ObjectiveTask& given, const Launch& on) {
  const ObjectiveTask task = arranged(given);
  const Plan plan = plan_of(task);
  if (plan.blocks == 0 && !plan.is_finished_by_last_block) return;
  const DeviceGuard guard(on.device);
  bool in_double = false;
  for (int k = 0; k < task.count; ++k) in_double |= task.terms[k].elements.in_double;
  Layouts layouts(in_double);
  for (int k = 0; k < task.count; ++k)
    if (task.terms[k].elements.formula >= 0) add_layouts(layouts, task.terms[k].elements, plan.terms[k].outputs);
  if (plan.is_general || in_double) return launch_general(task, plan, layouts, on);
  if (plan.by_column) return launch_by_column(task, plan, layouts, on);
  const auto launch_single = [&](auto access) {
    launch_objective<decltype(access), Sums::of_all, false>(task, plan, on);
  };
  if (!has_usual_order(task) || !with_single_access(layouts, launch_single)) launch_mixed(task, plan, layouts, on);
}

}  // namespace cuda
}  // namespace fusedvae
