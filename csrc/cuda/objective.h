// The objective's kernel, and what it is given. It is compiled in several files, at the same time.
#pragma once

#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/pass.h"

namespace fusedvae {
namespace cuda {

// A formula has up to four inputs, a gradient of each, and a sum of each of those: some registers more than the latent
// takes. Three blocks still have 36 KB on their way, with three inputs of 16 bytes for each thread. The sums of
// columns, one for each input and element of an access, leave room for two, and so do vectors of any dtypes.
template <class A, bool by_column>
constexpr int kBlocks = !by_column && (std::is_same_v<A, AllFloat32> || std::is_same_v<A, MixedFloatScalar>) ? 3 : 2;

// How a term is cut up, and which of the workspace's partial sums are its own: of the values, and of each gradient that
// is summed. There is one for each chunk; with sums for each column, one for each of those and group of rows.
struct TermPlan {
  Chunks chunks;
  ColumnChunks columns;  // what the chunks are, in a kernel that goes by column
  Gradients gradients;
  int64_t blocks = 0, blocks_before = 0;                        // its own, and of the terms before it
  int64_t value_partials = 0, grad_partials[kMostInputs] = {};  // where they begin
  int64_t addends = 0;  // for each value of the objective: partial sums, or values that are given
};

struct Plan {
  TermPlan terms[ObjectiveTask::kMostTerms];
  int64_t partials = 0, blocks = 0;  // in all
  int64_t values = 0;                // of the objective: totals, or values per sample
  int64_t most_addends = 0;          // of a term
  bool has_values = false;           // not of the elements alone
  bool by_column = false;            // some gradient has a sum for each column
  bool is_finished_by_last_block = false;
};

// --- the chunks -------------------------------------------------------------------------------------------------

// What the loss has the term times; it may be on the device.
__device__ __forceinline__ double coefficient_of(const Term& term) {
  return term.coefficient.given ? get<double>(term.coefficient, 0) : 1;
}

// A chunk of rows and columns; fills the partial sums of its columns.
template <class A, class Pass>
__device__ __forceinline__ void run_columns(Pass& pass, const TermPlan& plan, const Extent& extent, int64_t chunk,
                                            int lane, double* partials) {
  const ColumnChunks& columns = plan.columns;
  const int64_t group = chunk / columns.strips, inner = extent.inner;
  const int64_t segment = group / columns.groups_per_segment;
  const int64_t within = (group - segment * columns.groups_per_segment) * columns.rows;
  const int64_t first_row = segment * columns.segment + within, rest = columns.segment - within;
  const int rows = static_cast<int>(rest < columns.rows ? rest : columns.rows);
  int64_t column = (chunk - group * columns.strips) * columns.team * ColumnChunks::kColumns + lane * A::V;
  for (int s = 0; s < ColumnChunks::kColumns / A::V; ++s, column += columns.team * A::V) {
    if (column >= inner) break;
    FUSEDVAE_UNROLL
    for (int k = 0; k < Pass::kInputs; ++k) pass.column_sums[k] = {};
    int64_t element = first_row * inner + column;
    for (int row = 0; row < rows; ++row, element += inner) {
      const Position at = position_of(element, extent);
      pass.apply(at, pass.fetch(at));
    }
    FUSEDVAE_UNROLL
    for (int k = 0; k < Pass::kInputs; ++k) {
      FUSEDVAE_UNROLL
      for (int j = 0; j < A::V; ++j) {
        const auto sum = pass.column_sums[k].at[j];
        pass.grad_sums[k] += sum;
        if (plan.gradients.of[k] == Gradient::column)
          partials[plan.grad_partials[k] + group * inner + column + j] = static_cast<double>(sum);
      }
    }
  }
}

// The term's blocks, from the given one on.
template <class A, bool by_column, class Formula>
__device__ __forceinline__ void run_term(const Term& term, const TermPlan& plan, bool has_values, int64_t block,
                                         double* partials) {
  using T = typename A::T;
  ElementwisePass<A, Formula, by_column> pass(term.elements, plan.gradients, term.factor * coefficient_of(term),
                                              term.constant);
  const int team = plan.chunks.team;
  for (; block < plan.blocks; block += gridDim.x) {
    const Share share = share_of(plan.chunks, block);
    const bool has_chunk = share.chunk < plan.chunks.count, writes = has_chunk && share.lane == 0;
    pass.sum = 0;
    FUSEDVAE_UNROLL
    for (int k = 0; k < Formula::kInputs; ++k) pass.grad_sums[k] = 0;
    if constexpr (!by_column)
      run<A>(pass, share, team, term.elements.extent);
    else if (has_chunk)
      run_columns<A>(pass, plan, term.elements.extent, share.chunk, share.lane, partials);
    if (has_values) {
      const T sum = team_sum(pass.sum, team);
      if (writes) partials[plan.value_partials + share.chunk] = static_cast<double>(sum);
    }
    FUSEDVAE_UNROLL
    for (int k = 0; k < Formula::kInputs; ++k) {
      const Gradient gradient = plan.gradients.of[k];
      if (gradient == Gradient::none || gradient == Gradient::element || gradient == Gradient::column) continue;
      const T sum = team_sum(pass.grad_sums[k], team);
      if (writes) partials[plan.grad_partials[k] + share.chunk] = static_cast<double>(sum);
    }
  }
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
      const double constant = term.constant * static_cast<double>(by_sample ? e.sample() : e.count());
      sum = term.factor * (team_sum(sum, team) + constant);
      loss += coefficient_of(term) * sum;
      if (writes && term.out.given) put(term.out, value * term.out.stride[0], sum);
    }
    if (writes) put(task.loss, value * task.loss.stride[0], loss);
  }
}

// A gradient that keeps batch or outer, or nothing, each of its values by a team of threads: of the chunks that agree
// with it along what it keeps.
__device__ __forceinline__ void finish_sums(const Operand& grad, const Extent& e, const Chunks& chunks,
                                            const double* partials) {
  const int64_t batch = grad.stride[0] != 0 ? e.batch : 1, outer = grad.stride[1] != 0 ? e.outer : 1;
  const int64_t values = batch * outer;
  if (values == 0) return;
  const int64_t addends = chunks.count / values;
  // Kept along outer alone, a value has some chunks of each sample.
  const bool in_rows = batch == 1 && outer > 1;
  const int64_t in_row = in_rows ? chunks.per_segment : addends;
  const int team = team_for(addends), lane = static_cast<int>(threadIdx.x) % team;
  for (int64_t first = 0; first < values; first += kThreads / team) {
    const int64_t v = first + static_cast<int>(threadIdx.x) / team;
    double sum = 0;
    if (v < values)
      for (int64_t j = lane; j < addends; j += team)
        sum += partial_at(partials, in_rows ? (j / in_row * values + v) * in_row + j % in_row : v * addends + j);
    sum = team_sum(sum, team);
    if (v < values && lane == 0) put(grad, v / outer * grad.stride[0] + v % outer * grad.stride[1], sum);
  }
}

// One that keeps inner alone.
__device__ __forceinline__ void finish_columns(const Operand& grad, int64_t columns, int64_t groups,
                                               const double* partials) {
  for (int64_t column = threadIdx.x; column < columns; column += kThreads) {
    double sum = 0;
    for (int64_t group = 0; group < groups; ++group) sum += partial_at(partials, group * columns + column);
    put(grad, column, sum);
  }
}

template <bool by_column>
__device__ __forceinline__ void finish_gradients(const ElementwiseTask& task, const TermPlan& plan,
                                                 const double* partials) {
  for (int i = 0; i < kMostInputs; ++i) {
    const Gradient gradient = plan.gradients.of[i];
    if (gradient == Gradient::none || gradient == Gradient::element) continue;
    const double* const addends = partials + plan.grad_partials[i];
    if (by_column && gradient == Gradient::column)
      finish_columns(task.grads[i], task.extent.inner, plan.columns.groups, addends);
    else
      finish_sums(task.grads[i], task.extent, plan.chunks, addends);
  }
}

// How many terms have code of their own. Operands of one dtype are the usual case: such code knows where in the
// constant bank the term's are described, and need not look. With operands of any dtypes there is code enough as it is.
template <class A>
constexpr int kTermsApart = std::is_void_v<typename A::Storage> ? 1 : ObjectiveTask::kMostTerms;

template <class A, bool by_column>
__global__ void __launch_bounds__(kThreads, kBlocks<A, by_column>)
    objective_kernel(const __grid_constant__ ObjectiveTask task, const __grid_constant__ Plan plan,
                     const Workspace workspace) {
  FUSEDVAE_UNROLL_BY(kTermsApart<A>)
  for (int k = 0; k < ObjectiveTask::kMostTerms; ++k) {
    // Blocks that the term before has no turn for in its last round begin with this one.
    int64_t block = static_cast<int64_t>(blockIdx.x) - plan.terms[k].blocks_before % gridDim.x;
    if (block < 0) block += gridDim.x;
    if (block >= plan.terms[k].blocks) continue;
    FUSEDVAE_NAMESPACE::with_formula(task.terms[k].elements.formula, [&](auto tag) {
      using Formula = typename decltype(tag)::type;
      run_term<A, by_column, Formula>(task.terms[k], plan.terms[k], plan.has_values, block, workspace.partials);
    });
  }
  if (!plan.is_finished_by_last_block || !is_last_block(workspace.done)) return;
  if (plan.has_values) finish_values(task, plan, workspace.partials);
  for (int k = 0; k < task.count; ++k)
    finish_gradients<by_column>(task.terms[k].elements, plan.terms[k], workspace.partials);
}

// Where the kernels for operands of any dtypes are.
void launch_mixed(const ObjectiveTask&, const Plan&, const Layouts&, const Launch&);
void launch_by_column(const ObjectiveTask&, const Plan&, const Layouts&, const Launch&);

template <class A, bool by_column>
void launch_objective(const ObjectiveTask& task, const Plan& plan, const Launch& on) {
  launch("objective", objective_kernel<A, by_column>, grid_for(plan.blocks, kBlocks<A, by_column>, on.device), kThreads,
         0, static_cast<cudaStream_t>(on.stream), task, plan, Workspace(on.workspace));
}

// Of float64 one element at a time: it is there for exactness, not speed, and sums of two for each column would take
// every register that there is.
template <bool by_column>
void launch_for_any_dtypes(const ObjectiveTask& task, const Plan& plan, const Layouts& layouts, const Launch& on) {
  if (layouts.in_double()) return launch_objective<MixedDoubleScalar, by_column>(task, plan, on);
  layouts.width() >= 4 ? launch_objective<MixedFloat, by_column>(task, plan, on)
                       : launch_objective<MixedFloatScalar, by_column>(task, plan, on);
}

}  // namespace cuda
}  // namespace fusedvae
