// The objective's kernel, and what it is given. It is compiled in several files, at the same time.
#pragma once

#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/pass.h"
#include "cuda/plan.h"
#include "cuda/run.h"

namespace fusedvae {
namespace cuda {

// Blocks on a multiprocessor. Passes over flat operands leave room for four, or for three where a formula has four
// inputs or a logistic function: with three inputs of 16 bytes for each thread, 48 KB or 36 KB are on their way. The
// sums of columns, one for each input and element of an access, leave room for two, and so do vectors of any dtypes and
// terms in general; those in float64 for one.
template <class A>
constexpr int kBlocks = std::is_same_v<A, MixedDoubleScalar> ? 1 : 2;

struct TermPlan : PassPlan {
  bool has_gradients = false;
  int64_t blocks_before = 0;  // of the terms before it
  int64_t addends = 0;        // for each value of the objective: partial sums, or values that are given
};

struct Plan {
  Order order = Order::any;
  TermPlan terms[ObjectiveTask::kMostTerms];
  Finish finish;
  int64_t blocks = 0;        // in all
  int64_t values = 0;        // of the objective: totals, or values per sample
  int64_t most_addends = 0;  // of a term
  bool has_values = false;   // not of the elements alone
};

// --- factors ----------------------------------------------------------------------------------------------------

// One value, a number or on the device.
__device__ __forceinline__ double value_of(const Operand& op) {
  return op.given ? get<double>(op, 0) : 1;
}

// What the term is times its sum.
__device__ __forceinline__ double factor_of(const Term& term) {
  return term.factor * value_of(term.normalizer);
}

// --- what is added up in the end --------------------------------------------------------------------------------

// The loss and its terms, one or one per sample.
__device__ __forceinline__ void finish_values(const ObjectiveTask& task, const Plan& plan, const double* partials,
                                              const Crew& crew) {
  const int team = team_for(plan.most_addends);
  for_each_value(plan.values, team, crew, [&](int64_t v, int lane) {
    const bool writes = v < plan.values && lane == 0;
    double loss = 0;
    FUSEDVAE_UNROLL_BY(1)
    for (int k = 0; k < task.count; ++k) {
      const Term& term = task.terms[k];
      const Extent& e = term.elements.extent;
      const int64_t count = task.values == Values::sample ? e.sample() : e.count(), addends = plan.terms[k].addends;
      const int there = v < plan.values ? static_cast<int>(addends) : 0;
      const double sum =
          term.elements.formula < 0
              ? sum_of<1>(
                    there, team, lane,
                    [&](int j) { return get<double>(term.given, (v * addends + j) * term.given.stride[0]); })
              : sum_of<kLoads>(
                    there, team, lane,
                    [&](int j) { return partial_at(partials + plan.terms[k].first_value_partial, v * addends + j); });
      const double value = factor_of(term) * (sum + plan.terms[k].constant * static_cast<double>(count));
      loss += value_of(term.coefficient) * value;
      if (writes && term.out.given) put(term.out, v * term.out.stride[0], value);
    }
    if (writes) put(task.loss, v * task.loss.stride[0], loss);
  });
}

__device__ __forceinline__ void finish(const ObjectiveTask& task, const Plan& plan, const double* partials,
                                       const Crew& crew) {
  if (plan.has_values) finish_values(task, plan, partials, crew);
  for (int k = 0; k < task.count; ++k) finish_outputs(task.terms[k].elements, plan.terms[k], partials, crew);
}

// --- the kernels ------------------------------------------------------------------------------------------------

template <class Formula>
constexpr int kFlatBlocks = Formula::kInputs > 3 || std::is_same_v<Formula, FUSEDVAE_NAMESPACE::BernoulliNll> ? 3 : 4;
// What comes second in such an objective.
using UsualDivergence = FUSEDVAE_NAMESPACE::KlStandardNormal;

// The term's first block for this one of the grid. Blocks that the term before has no turn for in its last round begin
// with this term.
__device__ __forceinline__ int64_t first_block(const TermPlan& plan) {
  const int64_t block = static_cast<int64_t>(blockIdx.x) - plan.blocks_before % gridDim.x;
  return block < 0 ? block + gridDim.x : block;
}

__device__ __forceinline__ double gradient_factor(const Term& term, const Operand& grad_scale) {
  return factor_of(term) * value_of(term.coefficient) * value_of(grad_scale);
}

template <class A, class Formula, Makes makes, bool is_one>
__device__ __forceinline__ void run_flat(const Term& term, const TermPlan& plan, int64_t block, double factor,
                                         double* partials) {
  PlainPass<A, Formula, Sums::of_values, makes, is_one> pass(term.elements, plan, factor);
  run_blocks<A>(pass, term.elements, plan, block, partials);
}

// In code for what the pass makes.
template <class A, class Formula, bool is_one>
__device__ __forceinline__ void run_flat(const Term& term, const TermPlan& plan, int64_t block, double factor,
                                         double* partials) {
  if (!plan.has_gradients)
    run_flat<A, Formula, Makes::values, is_one>(term, plan, block, factor, partials);
  else if (term.elements.incoming.stride[2] == 0)
    run_flat<A, Formula, Makes::gradients, is_one>(term, plan, block, factor, partials);
  else
    run_flat<A, Formula, Makes::weighted_gradients, is_one>(term, plan, block, factor, partials);
}

// A term of flat operands, whose uniform input is one value for each chunk, or varies.
template <class A, class Formula>
__device__ __forceinline__ void run_flat_term(const Term& term, const TermPlan& plan, const Operand& grad_scale,
                                              double* partials) {
  const int64_t block = first_block(plan);
  if (block >= plan.blocks) return;
  const double factor = gradient_factor(term, grad_scale);
  if constexpr (Formula::kUniform >= 0) {
    if (term.elements.inputs[Formula::kUniform].stride[2] == 0)
      return run_flat<A, Formula, true>(term, plan, block, factor, partials);
  }
  run_flat<A, Formula, false>(term, plan, block, factor, partials);
}

template <class A, class Formula>
__global__ void __launch_bounds__(kThreads, kFlatBlocks<Formula>)
    flat_objective_kernel(const __grid_constant__ ObjectiveTask task, const __grid_constant__ Plan plan,
                          const Workspace workspace) {
  run_flat_term<A, Formula>(task.terms[0], plan.terms[0], task.grad_scale, workspace.partials);
  run_flat_term<A, UsualDivergence>(task.terms[1], plan.terms[1], task.grad_scale, workspace.partials);
  if (!plan.finish.is_needed || plan.finish.is_large() || !is_last_block(workspace.done)) return;
  finish(task, plan, workspace.partials, {0, 1});
}

// The term's blocks, from the given one on, whatever it is.
template <class A, Sums sums, bool general>
__device__ __forceinline__ void run_term(const Term& term, const TermPlan& plan, const Operand& grad_scale,
                                         double* partials) {
  const int64_t block = first_block(plan);
  if (block >= plan.blocks) return;
  const double factor = gradient_factor(term, grad_scale);
  if constexpr (general) {
    GeneralPass<A, sums> pass(term.elements, plan, factor, term.constant);
    run_blocks<A>(pass, term.elements, plan, block, partials);
  } else {
    FUSEDVAE_NAMESPACE::with_formula(
        term.elements.formula,
        [&](auto tag) {
          PlainPass<A, typename decltype(tag)::type, sums> pass(term.elements, plan, factor);
          run_blocks<A>(pass, term.elements, plan, block, partials);
        },
        FUSEDVAE_NAMESPACE::Formulas{});
  }
}

template <class A, Sums sums, bool general>
__global__ void __launch_bounds__(kThreads, kBlocks<A>)
    objective_kernel(const __grid_constant__ ObjectiveTask task, const __grid_constant__ Plan plan,
                     const Workspace workspace) {
  FUSEDVAE_UNROLL_BY(1)
  for (int k = 0; k < ObjectiveTask::kMostTerms; ++k)
    run_term<A, sums, general>(task.terms[k], plan.terms[k], task.grad_scale, workspace.partials);
  if (!plan.finish.is_needed || plan.finish.is_large() || !is_last_block(workspace.done)) return;
  finish(task, plan, workspace.partials, {0, 1});
}

// Where the kernels are: for flat operands of one dtype, for operands of any dtypes, and for any terms, in float64 too.
template <class A>
void launch_flat(const ObjectiveTask&, const Plan&, const Launch&);
void launch_mixed(const ObjectiveTask&, const Plan&, const Layouts&, const Launch&);
void launch_by_column(const ObjectiveTask&, const Plan&, const Layouts&, const Launch&);
void launch_general(const ObjectiveTask&, const Plan&, const Layouts&, const Launch&);

template <class A, Sums sums, bool general>
void launch_objective(const ObjectiveTask& task, const Plan& plan, const Launch& on) {
  launch("objective", objective_kernel<A, sums, general>, grid_for(plan.blocks, kBlocks<A>, on.device), kThreads, 0,
         static_cast<cudaStream_t>(on.stream), task, plan, Workspace(on.workspace));
}

}  // namespace cuda
}  // namespace fusedvae
