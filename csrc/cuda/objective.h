// The objective's kernel, and what it is given. It is compiled in several files, at the same time.
#pragma once

#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/pass.h"
#include "cuda/plan.h"
#include "cuda/run.h"

namespace fusedvae {
namespace cuda {

// Blocks on a multiprocessor. The sums of columns, one for each input and element of an access, leave room for two, and
// so do vectors of any dtypes and terms in general; those in float64 for one.
template <class A>
constexpr int kBlocks = std::is_same_v<A, MixedDoubleScalar> ? 1 : 2;

struct TermPlan : PassPlan {
  bool has_gradients = false;
  unsigned blocks_before = 0;  // of the terms before it
  int64_t addends = 0;         // for each value of the objective: partial sums, or values that are given
  double whole_constant = 0;   // what each of these values has besides
  // What values and gradients are times, if that is known before the launch.
  bool has_known_factors = true;
  double factor = 1, gradient_factor = 1;
};

// What the last block makes of an only value, all in one place: each line of a kernel's parameters that was not read
// before takes as long to come as one of memory.
struct Total {
  struct Addends {
    double factor = 0, constant = 0, coefficient = 0;  // numbers
    uint32_t first = 0, count = 0;                     // partial sums
    DType given_dtype = DType::f32, dtype = DType::f32;
    void* given = nullptr;  // or values in memory
    int64_t given_stride = 0;
    void* out = nullptr;  // the term
    // What factor and coefficient are times, if these are in memory.
    void *normalizer_data = nullptr, *coefficient_data = nullptr;
    DType normalizer_dtype = DType::f32, coefficient_dtype = DType::f32;
  };
  Addends terms[ObjectiveTask::kMostTerms];
  void* loss = nullptr;
  DType dtype = DType::f32;
};

struct Plan {
  unsigned blocks = 0;  // in all
  bool last_block_finishes = false, has_total = false;
  bool has_values = false;  // not of the elements alone
  Total total;
  TermPlan terms[ObjectiveTask::kMostTerms];
  Order order = Order::any;
  bool is_usual = false;  // all terms are, of flat operands
  Finish finish;
  int64_t values = 0;        // of the objective: totals, or values per sample
  int64_t most_addends = 0;  // of a term
};

// --- factors ----------------------------------------------------------------------------------------------------

// One value, a number or on the device.
__device__ __forceinline__ double value_of(const Operand& op) {
  return op.given ? get_apart(op, 0) : 1;
}

// What the term is times its sum.
__device__ __forceinline__ double factor_of(const Term& term) {
  return term.factor * value_of(term.normalizer);
}

// --- what is added up in the end --------------------------------------------------------------------------------

// A thread's share of the sum of so many given values, which all the block adds up. Apart, like `load_apart`: a value a
// call would be one on its way at a time.
inline __device__ __noinline__ double share_of_given(const void* given, DType dtype, int64_t stride, int count) {
  double sum = 0;
  with_type(dtype, [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    sum = share_of_sum<kLoads>(count, kLogThreads, static_cast<int>(threadIdx.x), [&](int j) {
      const char* const address = static_cast<const char*>(given) + j * stride * static_cast<int64_t>(sizeof(S));
      return widen<double, S>(load_bits<sizeof(S)>(address), 0);
    });
  });
  return sum;
}

// The loss and its terms, of one value each.
__device__ __forceinline__ void finish_total(const Total& total, const double* partials) {
  constexpr int kMostTerms = ObjectiveTask::kMostTerms;
  const int thread = static_cast<int>(threadIdx.x);
  double sums[kMostTerms], factors[kMostTerms], coefficients[kMostTerms];
  FUSEDVAE_UNROLL
  for (int k = 0; k < kMostTerms; ++k) {
    const Total::Addends& term = total.terms[k];
    factors[k] = term.factor;
    coefficients[k] = term.coefficient;
    if (term.normalizer_data != nullptr) factors[k] *= load_apart(term.normalizer_data, term.normalizer_dtype, 0);
    if (term.coefficient_data != nullptr)
      coefficients[k] *= load_apart(term.coefficient_data, term.coefficient_dtype, 0);
    const int count = static_cast<int>(term.count);
    sums[k] = term.given == nullptr ? share_of_partials(partials + term.first, count)
                                    : share_of_given(term.given, term.given_dtype, term.given_stride, count);
  }
  add_up_team(sums, kThreads);
  if (thread != 0) return;
  double loss = 0;
  FUSEDVAE_UNROLL
  for (int k = 0; k < kMostTerms; ++k) {
    const Total::Addends& term = total.terms[k];
    const double value = factors[k] * (sums[k] + term.constant);
    loss += coefficients[k] * value;
    if (term.out != nullptr) store_apart(term.out, term.dtype, 0, value);
  }
  store_apart(total.loss, total.dtype, 0, loss);
}

// The same, one or one per sample, whatever they are.
__device__ __forceinline__ void finish_values(const ObjectiveTask& task, const Plan& plan, const double* partials,
                                              const Crew& crew) {
  constexpr int kMostTerms = ObjectiveTask::kMostTerms;
  const int log_team = log_team_for(plan.most_addends);
  double factors[kMostTerms], coefficients[kMostTerms];
  FUSEDVAE_UNROLL
  for (int k = 0; k < kMostTerms; ++k) {
    factors[k] = factor_of(task.terms[k]);
    coefficients[k] = value_of(task.terms[k].coefficient);
  }
  for_each_value(plan.values, log_team, crew, [&](int64_t v, int lane) {
    double sums[kMostTerms] = {};
    FUSEDVAE_UNROLL
    for (int k = 0; k < kMostTerms; ++k) {
      if (k >= task.count) break;
      const Term& term = task.terms[k];
      const int64_t addends = plan.terms[k].addends, first = v * addends;
      const int there = v < plan.values ? static_cast<int>(addends) : 0;
      if (term.elements.formula < 0)
        sums[k] = share_of_sum<1>(there, log_team, lane,
                                  [&](int j) { return get_apart(term.given, (first + j) * term.given.stride[0]); });
      else
        sums[k] = share_of_sum<kLoads / 2>(there, log_team, lane, [&](int j) {
          return partial_at(partials + plan.terms[k].first_value_partial, first + j);
        });
    }
    add_up_team(sums, 1 << log_team);
    if (v >= plan.values || lane != 0) return;
    double loss = 0;
    FUSEDVAE_UNROLL
    for (int k = 0; k < kMostTerms; ++k) {
      if (k >= task.count) break;
      const Term& term = task.terms[k];
      const double value = factors[k] * (sums[k] + plan.terms[k].whole_constant);
      loss += coefficients[k] * value;
      if (term.out.given) put_apart(term.out, v * term.out.stride[0], value);
    }
    put_apart(task.loss, v * task.loss.stride[0], loss);
  });
}

__device__ __forceinline__ void finish(const ObjectiveTask& task, const Plan& plan, const double* partials,
                                       const Crew& crew) {
  if (!plan.has_total && plan.has_values)
    finish_values(task, plan, partials, crew);
  else if (plan.has_total && crew.block == 0)
    finish_total(plan.total, partials);
  if (!plan.finish.has_outputs) return;
  for (int k = 0; k < task.count; ++k) finish_outputs(task.terms[k].elements, plan.terms[k], partials, crew);
}

// The end of a kernel: what is left to the block that is last to come here.
__device__ __forceinline__ void finish_if_last(const ObjectiveTask& task, const Plan& plan,
                                               const Workspace& workspace) {
  if (plan.last_block_finishes && is_last_block(workspace.done)) finish(task, plan, workspace.partials, {0, 1});
}

// --- the kernels ------------------------------------------------------------------------------------------------

using ObjectiveKernel = void (*)(ObjectiveTask, Plan, Workspace);

inline void launch_kernel(ObjectiveKernel kernel, const ObjectiveTask& task, const Plan& plan, const Launch& on) {
  launch("objective", kernel, grid_of(plan.blocks), on, task, plan, Workspace(on));
}

// Passes over flat operands leave room for four, or for three where a formula has four inputs or a logistic function:
// with three inputs of 16 bytes for each thread, 48 KB or 36 KB are on their way.
template <class Formula>
constexpr int kFlatBlocks = Formula::kInputs > 3 || std::is_same_v<Formula, FUSEDVAE_NAMESPACE::BernoulliNll> ? 3 : 4;
// Passes over flat operands that are adapted: two, or one of eight elements at a time and four inputs.
template <class A, class Formula>
constexpr int kAdaptedBlocks = Formula::kInputs > 3 && A::V > 4 ? 1 : 2;

// Which of a term's blocks this one is. Those of the grid are the first term's, then the second's.
__device__ __forceinline__ unsigned block_of(const TermPlan& plan) {
  return blockIdx.x - plan.blocks_before;
}

// What the values of a term are times, and what its gradients are.
struct Factors {
  double values, gradients;
  __device__ __forceinline__ Factors(const Term& term, const TermPlan& plan, const ObjectiveTask& task)
      : values(plan.factor), gradients(plan.gradient_factor) {
    if (plan.has_known_factors) return;
    values = factor_of(term) * value_of(term.coefficient);
    gradients = values * value_of(task.grad_scale);
  }
};

// Where a term's values go if they are written at once: those of samples are the loss, those of elements have no
// factor.
__device__ __forceinline__ const Operand& whole_values(const ObjectiveTask& task, const Term& term) {
  return task.values == Values::sample ? task.loss : term.elements.value;
}
__device__ __forceinline__ double whole_factor(const ObjectiveTask& task, const Factors& factors) {
  return task.values == Values::sample ? factors.values : 1;
}

template <class A, class Formula, Makes makes, bool is_one>
__device__ __forceinline__ void run_flat(const ObjectiveTask& task, const Term& term, const TermPlan& plan,
                                         double* partials) {
  const Factors factors(term, plan, task);
  PlainPass<A, Formula, Sums::of_values, makes, is_one> pass(term.elements, plan, factors.gradients);
  run_block<A>(pass, term.elements, plan, block_of(plan), partials, whole_values(task, term),
               whole_factor(task, factors));
}

// In code for what the pass makes.
template <class A, class Formula, bool is_one>
__device__ __forceinline__ void run_flat(const ObjectiveTask& task, const Term& term, const TermPlan& plan,
                                         double* partials) {
  if (!plan.has_gradients)
    run_flat<A, Formula, Makes::values, is_one>(task, term, plan, partials);
  else if (term.elements.incoming.stride[2] == 0)
    run_flat<A, Formula, Makes::gradients, is_one>(task, term, plan, partials);
  else
    run_flat<A, Formula, Makes::weighted_gradients, is_one>(task, term, plan, partials);
}

// A term of flat operands, whose uniform input is one value for each chunk, or varies.
template <class A, class Formula>
__device__ __forceinline__ void run_flat_term(const ObjectiveTask& task, const Term& term, const TermPlan& plan,
                                              double* partials) {
  if constexpr (Formula::kUniform >= 0) {
    if (term.elements.inputs[Formula::kUniform].stride[2] == 0)
      return run_flat<A, Formula, true>(task, term, plan, partials);
  }
  run_flat<A, Formula, false>(task, term, plan, partials);
}

template <class A, class Formula>
__global__ void __launch_bounds__(kThreads, kFlatBlocks<Formula>)
    flat_objective_kernel(const __grid_constant__ ObjectiveTask task, const __grid_constant__ Plan plan,
                          const Workspace workspace) {
  if (blockIdx.x < plan.terms[0].blocks)
    run_flat_term<A, Formula>(task, task.terms[0], plan.terms[0], workspace.partials);
  else if (blockIdx.x < plan.blocks)
    run_flat_term<A, UsualDivergence>(task, task.terms[1], plan.terms[1], workspace.partials);
  finish_if_last(task, plan, workspace);
}

// A term, whatever it is, of a formula that is known when compiling, or void.
template <class A, class Formula, Sums sums>
__device__ __forceinline__ void run_general(const ObjectiveTask& task, const Term& term, const TermPlan& plan,
                                            double* partials) {
  const Factors factors(term, plan, task);
  GeneralPass<A, Formula, sums> pass(term.elements, plan, factors.gradients, term.constant);
  run_block<A>(pass, term.elements, plan, block_of(plan), partials, whole_values(task, term),
               whole_factor(task, factors));
}

// Terms of flat operands, whatever they are.
template <class A, class Formula>
__global__ void __launch_bounds__(kThreads, kAdaptedBlocks<A, Formula>)
    adapted_objective_kernel(const __grid_constant__ ObjectiveTask task, const __grid_constant__ Plan plan,
                             const Workspace workspace) {
  if (blockIdx.x < plan.terms[0].blocks)
    run_general<A, Formula, Sums::of_all>(task, task.terms[0], plan.terms[0], workspace.partials);
  else if (blockIdx.x < plan.blocks)
    run_general<A, UsualDivergence, Sums::of_all>(task, task.terms[1], plan.terms[1], workspace.partials);
  finish_if_last(task, plan, workspace);
}

// A term, whatever it is.
template <class A, Sums sums, bool general>
__device__ __forceinline__ void run_term(const ObjectiveTask& task, const Term& term, const TermPlan& plan,
                                         double* partials) {
  if constexpr (general) {
    run_general<A, void, sums>(task, term, plan, partials);
  } else {
    const Factors factors(term, plan, task);
    FUSEDVAE_NAMESPACE::with_formula(
        term.elements.formula,
        [&](auto tag) {
          PlainPass<A, typename decltype(tag)::type, sums> pass(term.elements, plan, factors.gradients);
          run_block<A>(pass, term.elements, plan, block_of(plan), partials, whole_values(task, term),
                       whole_factor(task, factors));
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
    if (block_of(plan.terms[k]) < plan.terms[k].blocks)
      run_term<A, sums, general>(task, task.terms[k], plan.terms[k], workspace.partials);
  finish_if_last(task, plan, workspace);
}

// Where the kernels are: for flat operands of one dtype, for operands of any dtypes, and for any terms, in float64 too.
template <class A>
void launch_flat(const ObjectiveTask&, const Plan&, const Launch&);
void launch_mixed(const ObjectiveTask&, const Plan&, const Layouts&, const Launch&);
void launch_by_column(const ObjectiveTask&, const Plan&, const Layouts&, const Launch&);
void launch_general(const ObjectiveTask&, const Plan&, const Layouts&, const Launch&);

template <class A, Sums sums, bool general>
void launch_objective(const ObjectiveTask& task, const Plan& plan, const Launch& on) {
  launch_kernel(objective_kernel<A, sums, general>, task, plan, on);
}

}  // namespace cuda
}  // namespace fusedvae
