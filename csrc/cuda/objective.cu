// An objective: its terms, their totals and gradients, in one launch.
#include "cuda/objective.h"

#include <algorithm>

namespace fusedvae {
namespace cuda {
namespace {

// What the kernel makes of a term: of values that the objective has, sums.
Outputs outputs_of_term(const Term& term, Values values) {
  if (term.elements.formula < 0) return {};
  Outputs outputs = outputs_of(term.elements);
  if (values == Values::total) outputs.value = Output::total;
  if (values == Values::sample) outputs.value = Output::sample;
  return outputs;
}

// The same objective; the rows of an only sample are samples, unless samples have values.
ObjectiveTask arranged(const ObjectiveTask& given) {
  ObjectiveTask task = given;
  if (given.values == Values::sample) return task;
  for (Term& term : task.terms) term.elements = with_rows_for_samples(term.elements);
  return task;
}

Order order_of(const ObjectiveTask& task, bool is_flat) {
  if (is_flat) return Order::flat;
  for (int k = 0; k < task.count; ++k)
    if (outputs_of_term(task.terms[k], task.values).any(Output::column)) return Order::by_column;
  return Order::any;
}

// The factors of a term that are numbers, and whether all of them are.
void plan_factors(const ObjectiveTask& task, const Term& term, TermPlan& plan) {
  const auto times = [&](double& factor, const Operand& op) {
    plan.has_known_factors &= !op.given || op.is_number();
    if (op.is_number()) factor *= op.value;
  };
  plan.factor = term.factor;
  for (const Operand* op : {&term.normalizer, &term.coefficient}) times(plan.factor, *op);
  plan.gradient_factor = plan.factor;
  times(plan.gradient_factor, task.grad_scale);
}

// What there is of an objective's only value, if it needs nothing but partial sums and values in memory.
bool plan_total(const ObjectiveTask& task, const Plan& plan, Total& total) {
  if (!plan.has_values || plan.values != 1) return false;
  total.loss = task.loss.data;
  total.dtype = task.loss.dtype;
  for (int k = 0; k < task.count; ++k) {
    const Term& term = task.terms[k];
    const TermPlan& own = plan.terms[k];
    Total::Addends& addends = total.terms[k];
    const bool is_given = term.elements.formula < 0;
    const auto number = [](const Operand& op) { return op.is_number() ? op.value : 1; };
    if (is_given && !term.given.data) return false;
    addends.factor = term.factor * number(term.normalizer);
    addends.coefficient = number(term.coefficient);
    addends.normalizer_data = term.normalizer.data;
    addends.normalizer_dtype = term.normalizer.dtype;
    addends.coefficient_data = term.coefficient.data;
    addends.coefficient_dtype = term.coefficient.dtype;
    addends.constant = own.whole_constant;
    addends.first = static_cast<uint32_t>(own.first_value_partial);
    addends.count = static_cast<uint32_t>(own.addends);
    if (is_given) {
      addends.given = term.given.data;
      addends.given_dtype = term.given.dtype;
      addends.given_stride = term.given.stride[0];
    }
    if (term.out.given) {
      addends.out = term.out.data;
      addends.dtype = term.out.dtype;
    }
  }
  return true;
}

Plan plan_of(const ObjectiveTask& task, Order order) {
  Plan plan;
  plan.order = order;
  plan.has_values = task.values != Values::element;
  plan.values = plan.has_values ? task.values_count() : 0;
  for (int k = 0; k < task.count; ++k) {
    const Term& term = task.terms[k];
    TermPlan& own = plan.terms[k];
    const bool is_given = term.elements.formula < 0;
    if (!is_given) {
      // Those of an only term need not wait for another's.
      const bool is_loss = task.values == Values::sample && task.count == 1 && !term.out.given;
      const bool are_wanted = is_loss || (task.values == Values::element && term.elements.value);
      static_cast<PassPlan&>(own) =
          plan_of_pass(term.elements, outputs_of_term(term, task.values), order, are_wanted, plan.finish);
      if (is_loss && own.has_whole_values) plan.has_values = false;
      if (!term.elements.weight) own.constant = term.constant;
      const Extent& e = term.elements.extent;
      own.whole_constant = own.constant * static_cast<double>(task.values == Values::sample ? e.sample() : e.count());
      for (const Output grad : own.outputs.grads) own.has_gradients |= grad != Output::none;
    }
    plan_factors(task, term, own);
    if (plan.values > 0) own.addends = (is_given ? term.given_count : own.chunks.count) / plan.values;
    plan.most_addends = std::max(plan.most_addends, own.addends);
    own.blocks_before = plan.blocks;
    plan.blocks += own.blocks;
  }
  if (plan.has_values) plan.finish.add(plan.values, plan.values * plan.most_addends);
  plan.last_block_finishes = plan.finish.is_needed && !plan.finish.is_large();
  plan.has_total = plan_total(task, plan, plan.total);
  return plan;
}

// --- which kernel -----------------------------------------------------------------------------------------------

// Whether there are kernels for flat operands of a formula in the first place, or in the second.
template <class... Formula>
bool has_flat_kernel(int formula, bool is_first, List<Formula...>) {
  const bool found[] = {(is_first ? kIsLight<Formula> : std::is_same_v<Formula, UsualDivergence>)...};
  return found[formula];
}

constexpr int64_t kShortRow = 512;

// Whether there are for a term, if its operands are flat.
bool suits_flat(const Term& term, Values values, bool is_first) {
  const ElementwiseTask& task = term.elements;
  if (task.formula < 0) return !is_first;
  // Many rows that are short would leave more sums than it is worth, unless each is wanted.
  const Extent& e = task.extent;
  const bool are_wanted = values != Values::total && e.outer == 1;
  if (!are_wanted && e.batch * e.outer > Finish::kMany && e.inner < kShortRow) return false;
  return !task.in_double && !outputs_of_term(term, values).any(Output::column) &&
         has_flat_kernel(task.formula, is_first, FUSEDVAE_NAMESPACE::Formulas{});
}

// Whether there are for all terms.
bool suits_flat(const ObjectiveTask& task) {
  bool suits = true;
  for (int k = 0; k < task.count; ++k) suits &= suits_flat(task.terms[k], task.values, k == 0);
  return suits;
}

// Whether a term of flat operands is of those that the quicker kernels serve: plain, without weights, and of no sums of
// gradients but the uniform input's.
template <class Formula>
bool is_usual(const ElementwiseTask& task, const Outputs& outputs) {
  bool usual = task.is_plain() && !task.weight;
  if (outputs.value == Output::element)  // without gradients
    for (const Output grad : outputs.grads) usual = usual && grad == Output::none;
  for (int k = 0; k < Formula::kInputs; ++k) {
    const bool varies = task.inputs[k].stride[2] != 0, is_uniform = k == Formula::kUniform && !varies;
    usual = usual && (k >= 2 || varies || is_uniform) && (!is_summed(outputs.grads[k]) || is_uniform);
  }
  return usual;
}

template <class... Formula>
bool is_usual(const ElementwiseTask& task, const Outputs& outputs, List<Formula...>) {
  const bool found[] = {is_usual<Formula>(task, outputs)...};
  return found[task.formula];
}

// Whether all terms are.
bool is_usual(const ObjectiveTask& task) {
  bool usual = true;
  for (int k = 0; k < task.count; ++k) {
    const Term& term = task.terms[k];
    usual &= term.elements.formula < 0 ||
             is_usual(term.elements, outputs_of_term(term, task.values), FUSEDVAE_NAMESPACE::Formulas{});
  }
  return usual;
}

__global__ void __launch_bounds__(kThreads)
    finish_kernel(const __grid_constant__ ObjectiveTask task, const __grid_constant__ Plan plan,
                  const Workspace workspace) {
  finish(task, plan, workspace.partials, {blockIdx.x, gridDim.x});
}

}  // namespace

int64_t workspace_bytes(const ObjectiveTask& given) {
  const ObjectiveTask task = arranged(given);
  int64_t partials = 0;
  bool is_needed = false;
  // Addresses, which settle it, are not known yet.
  for (const bool is_flat : {false, suits_flat(task)}) {
    const Finish finish = plan_of(task, order_of(task, is_flat)).finish;
    is_needed |= finish.is_needed;
    partials = std::max(partials, finish.partials);
  }
  return is_needed ? Workspace::bytes_for(partials) : 0;
}

void objective(const ObjectiveTask& given, const Launch& on) {
  const ObjectiveTask task = arranged(given);
  bool in_double = false, is_general = false;
  for (int k = 0; k < task.count; ++k) {
    const ElementwiseTask& elements = task.terms[k].elements;
    in_double |= elements.in_double;
    is_general |= elements.formula >= 0 && (!elements.is_plain() || elements.weight);
  }
  Layouts layouts(in_double);
  for (int k = 0; k < task.count; ++k) {
    const Term& term = task.terms[k];
    if (term.elements.formula >= 0) add_layouts(layouts, term.elements, outputs_of_term(term, task.values), true);
  }
  const bool is_flat = suits_flat(task) && has_flat_access(layouts);
  Plan plan = plan_of(task, order_of(task, is_flat));
  plan.is_usual = is_flat && layouts.are_samples_rows() && layouts.are_alike() && is_usual(task);
  if (plan.blocks == 0 && !plan.finish.is_needed) return;
  if (is_flat)
    with_flat_access(layouts, [&](auto access) { launch_flat<decltype(access)>(task, plan, on); });
  else if (is_general || in_double)
    launch_general(task, plan, layouts, on);
  else if (plan.order == Order::by_column)
    launch_by_column(task, plan, layouts, on);
  else
    launch_mixed(task, plan, layouts, on);
  if (plan.finish.is_large())
    launch("finish", finish_kernel, static_cast<unsigned>(plan.finish.blocks), on, task, plan, Workspace(on));
}

}  // namespace cuda
}  // namespace fusedvae
