// The objective's kernel, and what it is given. It is compiled in several files, at the same time.
#pragma once

#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/pass.h"
#include "cuda/plan.h"
#include "cuda/run.h"

namespace fusedvae {
namespace cuda {

// A formula has up to four inputs, a gradient of each, and a sum of each of those: some registers more than the latent
// takes. Three blocks still have 36 KB on their way, with three inputs of 16 bytes for each thread. The sums of
// columns, one for each input and element of an access, leave room for two, and so do vectors of any dtypes and terms
// in general. Where all of that comes together, there is room for one.
template <class A, Sums sums, bool general>
constexpr int kBlocks = general && sums == Sums::of_columns && !std::is_same_v<A, MixedFloatScalar> ? 1
                        : general || sums == Sums::of_columns                                       ? 2
                        : std::is_same_v<A, AllFloat32> || std::is_same_v<A, MixedFloatScalar>      ? 3
                                                                                                    : 2;

struct TermPlan : PassPlan {
  int64_t blocks_before = 0;  // of the terms before it
  int64_t addends = 0;        // for each value of the objective: partial sums, or values that are given
};

struct Plan {
  TermPlan terms[ObjectiveTask::kMostTerms];
  int64_t partials = 0, blocks = 0;  // in all
  int64_t values = 0;                // of the objective: totals, or values per sample
  int64_t most_addends = 0;          // of a term
  bool has_values = false;           // not of the elements alone
  bool by_column = false;            // some output has a sum for each column
  bool is_general = false;           // some term is not plain, or has weights
  bool is_finished_by_last_block = false;
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

// --- what the last block adds up --------------------------------------------------------------------------------

// The loss and its terms, one or one per sample, each by a team of threads.
__device__ __forceinline__ void finish_values(const ObjectiveTask& task, const Plan& plan, const double* partials) {
  const bool by_sample = task.values == Values::sample;
  const int team = team_for(plan.most_addends), lane = static_cast<int>(threadIdx.x) % team;
  for (int64_t first = 0; first < plan.values; first += kThreads / team) {
    const int64_t value = first + static_cast<int>(threadIdx.x) / team;
    const bool writes = value < plan.values && lane == 0;
    double loss = 0;
    for (int k = 0; k < task.count; ++k) {
      const Term& term = task.terms[k];
      const Extent& e = term.elements.extent;
      const int64_t addends = plan.terms[k].addends;
      double sum = 0;
      if (value < plan.values)
        for (int64_t j = value * addends + lane; j < (value + 1) * addends; j += team)
          sum += term.elements.formula < 0 ? get<double>(term.given, j * term.given.stride[0])
                                           : partial_at(partials + plan.terms[k].value_partials, j);
      const double constant = plan.terms[k].constant * static_cast<double>(by_sample ? e.sample() : e.count());
      sum = factor_of(term) * (team_sum(sum, team) + constant);
      loss += value_of(term.coefficient) * sum;
      if (writes && term.out.given) put(term.out, value * term.out.stride[0], sum);
    }
    if (writes) put(task.loss, value * task.loss.stride[0], loss);
  }
}

// --- the kernel -------------------------------------------------------------------------------------------------

template <class Formula, class... Divergence>
constexpr bool is_one_of(FUSEDVAE_NAMESPACE::List<Divergence...>) {
  return (std::is_same_v<Formula, Divergence> || ...);
}
template <class Formula>
constexpr bool kIsDivergence = is_one_of<Formula>(FUSEDVAE_NAMESPACE::Divergences{});

// How many terms have code of their own. Operands of one dtype are the usual case: such code knows where in the
// constant bank the term's are described, and need not look. There likelihoods come first, divergences second. With
// operands of any dtypes there is code enough as it is.
template <class A>
constexpr int kTermsApart = std::is_void_v<typename A::Storage> ? 1 : ObjectiveTask::kMostTerms;

// The term's blocks, from the given one on.
template <class A, Sums sums, bool general>
__device__ __forceinline__ void run_term(const Term& term, const TermPlan& plan, const Operand& grad_scale,
                                         int64_t block, bool is_second, double* partials) {
  const double factor = factor_of(term) * value_of(term.coefficient) * value_of(grad_scale);
  if constexpr (general) {
    GeneralPass<A, sums> pass(term.elements, plan, factor, term.constant);
    run_blocks<A>(pass, term.elements, plan, block, partials);
  } else {
    const auto run_formula = [&](auto tag) {
      using Formula = typename decltype(tag)::type;
      if (kTermsApart<A> > 1 && kIsDivergence<Formula> != is_second) return;
      PlainPass<A, Formula, sums> pass(term.elements, plan, factor);
      run_blocks<A>(pass, term.elements, plan, block, partials);
    };
    FUSEDVAE_NAMESPACE::with_formula(term.elements.formula, run_formula, FUSEDVAE_NAMESPACE::Formulas{});
  }
}

template <class A, Sums sums, bool general>
__global__ void __launch_bounds__(kThreads, kBlocks<A, sums, general>)
    objective_kernel(const __grid_constant__ ObjectiveTask task, const __grid_constant__ Plan plan,
                     const Workspace workspace) {
  FUSEDVAE_UNROLL_BY(kTermsApart<A>)
  for (int k = 0; k < ObjectiveTask::kMostTerms; ++k) {
    // Blocks that the term before has no turn for in its last round begin with this one.
    int64_t block = static_cast<int64_t>(blockIdx.x) - plan.terms[k].blocks_before % gridDim.x;
    if (block < 0) block += gridDim.x;
    if (block >= plan.terms[k].blocks) continue;
    run_term<A, sums, general>(task.terms[k], plan.terms[k], task.grad_scale, block, k == 1, workspace.partials);
  }
  if (!plan.is_finished_by_last_block || !is_last_block(workspace.done)) return;
  if (plan.has_values) finish_values(task, plan, workspace.partials);
  for (int k = 0; k < task.count; ++k) finish<sums>(task.terms[k].elements, plan.terms[k], workspace.partials);
}

// Where the kernels for operands of any dtypes are, and those for any terms, in float64 too.
void launch_mixed(const ObjectiveTask&, const Plan&, const Layouts&, const Launch&);
void launch_by_column(const ObjectiveTask&, const Plan&, const Layouts&, const Launch&);
void launch_general(const ObjectiveTask&, const Plan&, const Layouts&, const Launch&);

template <class A, Sums sums, bool general>
void launch_objective(const ObjectiveTask& task, const Plan& plan, const Launch& on) {
  launch("objective", objective_kernel<A, sums, general>, grid_for(plan.blocks, kBlocks<A, sums, general>, on.device),
         kThreads, 0, static_cast<cudaStream_t>(on.stream), task, plan, Workspace(on.workspace));
}

}  // namespace cuda
}  // namespace fusedvae
