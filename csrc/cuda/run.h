// A pass over its elements: what a thread does with its share, a block with its chunks, and what the last block adds
// up. A pass fetches the operands of an element (or vector of elements), and later applies formulas to what it fetched;
// kAhead is how many fetches it has under way at a time. `made` are its outputs and sums. kTakesRows is whether samples
// of flat operands may have several rows.
#pragma once

#include <cstdint>

#include "cuda/access.h"
#include "cuda/pass.h"
#include "cuda/plan.h"
#include "cuda/sums.h"

namespace fusedvae {
namespace cuda {

// --- the chunks -------------------------------------------------------------------------------------------------

// Runs a pass over the thread's share.
template <class A, class Pass>
__device__ __forceinline__ void run(Pass& pass, const Share& share, int lane, const Chunks& chunks,
                                    const Extent& extent) {
  constexpr int kAhead = Pass::kAhead;
  const int begin = lane * A::V;
  int step = A::V << chunks.log_team;
#if defined(__CUDA_ARCH__)
  asm("" : "+r"(step));  // or it would be worked out at every vector
#endif
  const auto place_of = [&](int offset, int ahead) -> Place<A> {
    if constexpr (A::kIsFlat)
      return ahead;
    else
      return position_of(share.segment * chunks.segment + share.within + offset, extent);
  };
  FUSEDVAE_UNROLL_BY(1)
  for (int first = begin; first < share.length; first += kAhead * step) {
    typename Pass::Fetched fetched[kAhead];
    Place<A> at[kAhead];
    FUSEDVAE_UNROLL
    for (int k = 0; k < kAhead; ++k) {
      const int offset = first + k * step;
      if (k == 0 || offset < share.length) fetched[k] = pass.fetch(at[k] = place_of(offset, k * step));
    }
    FUSEDVAE_UNROLL
    for (int k = 0; k < kAhead; ++k)
      if (k == 0 || first + k * step < share.length) pass.apply(at[k], fetched[k]);
    pass.advance(kAhead * step);
  }
}

// A chunk of rows and columns; fills the partial sums of its columns.
template <class A, class Pass>
__device__ __forceinline__ void run_columns(Pass& pass, const PassPlan& plan, const Extent& extent, uint32_t chunk,
                                            int lane, double* partials) {
  const ColumnChunks& columns = plan.columns;
  const uint32_t strips = static_cast<uint32_t>(columns.strips), group = chunk / strips;
  const uint32_t groups_per_segment = static_cast<uint32_t>(columns.groups_per_segment);
  const uint32_t segment = group / groups_per_segment;
  const int64_t inner = extent.inner, within = (group - segment * groups_per_segment) * columns.rows;
  const int64_t first_row = segment * columns.segment + within, rest = columns.segment - within;
  const int rows = static_cast<int>(rest < columns.rows ? rest : columns.rows);
  const int step = A::V << columns.log_team;
  int64_t column = (chunk - group * strips) * static_cast<int64_t>(columns.width()) + lane * A::V;
  for (int s = 0; s < ColumnChunks::kColumns / A::V; ++s, column += step) {
    if (column >= inner) break;
    pass.made.start_columns();
    if constexpr (A::kIsFlat) {  // a row is a sample
      for (int row = 0; row < rows; ++row) {
        pass.start({first_row + row, 0, column});
        pass.apply(0, pass.fetch(0));
      }
    } else {
      Position at = position_of(first_row * inner + column, extent);
      for (int row = 0; row < rows; ++row, at = below(at, extent)) pass.apply(at, pass.fetch(at));
    }
    const auto leave = [&](Output output, const Lanes<A>& sums, typename A::T& sum, int64_t first) {
      FUSEDVAE_UNROLL
      for (int j = 0; j < A::V; ++j) {
        sum += sums.at[j];
        if (output == Output::column) partials[first + group * inner + column + j] = static_cast<double>(sums.at[j]);
      }
    };
    leave(plan.outputs.value, pass.made.value_columns, pass.made.value_sum, plan.first_value_partial);
    FUSEDVAE_UNROLL
    for (int k = 0; k < Pass::kInputs; ++k)
      leave(plan.outputs.grads[k], pass.made.grad_columns[k], pass.made.grad_sums[k], plan.first_grad_partial[k]);
  }
}

// A block of the pass. Values that are written at once go to an output, times a factor.
template <class A, class Pass>
__device__ __forceinline__ void run_block(Pass& pass, const ElementwiseTask& task, const PassPlan& plan, unsigned block,
                                          double* partials, const Operand& out, double factor) {
  using T = typename A::T;
  using Made = decltype(pass.made);
  constexpr bool by_column = Made::kSums == Sums::of_columns;
  const Chunks& chunks = plan.chunks;
  const int thread = static_cast<int>(threadIdx.x), lane = thread & (chunks.team() - 1);
  const uint32_t chunk = (block << (kLogThreads - chunks.log_team)) + static_cast<uint32_t>(thread >> chunks.log_team);
  const Share share = share_of(chunks, chunk);
  const bool has_chunk = chunk < static_cast<uint32_t>(chunks.count);
  // A segment of flat operands is a row, of which a sample has one, if passes take no more.
  const int64_t begin = share.within + lane * A::V;
  pass.start(Pass::kTakesRows ? in_row(share.segment, begin, task.extent) : Position{share.segment, 0, begin});
  if constexpr (!by_column)
    run<A>(pass, share, lane, chunks, task.extent);
  else if (has_chunk)
    run_columns<A>(pass, plan, task.extent, chunk, lane, partials);
  if (!plan.has_sums) return;
  T sums[1 + Made::kSummed];
  sums[0] = pass.made.value_sum;
  pass.made.get_grad_sums(sums + 1);
  add_up_team(sums, chunks.team());
  if (!has_chunk || lane != 0) return;
  const auto leave = [&](Output output, T sum, int64_t first) {
    if (is_summed(output) && output != Output::column) partials[first + chunk] = static_cast<double>(sum);
  };
  if (plan.has_whole_values)
    put_apart(out, chunk * out.stride[0],
              factor * (static_cast<double>(sums[0]) + plan.constant * static_cast<double>(task.extent.sample())));
  else
    leave(plan.outputs.value, sums[0], plan.first_value_partial);
  int slot = 0;
  FUSEDVAE_UNROLL
  for (int k = 0; k < Made::kInputs; ++k)
    if (Made::sums_gradient(k)) leave(plan.outputs.grads[k], sums[++slot], plan.first_grad_partial[k]);
}

// --- what is added up in the end --------------------------------------------------------------------------------

// One output, of the chunks' sums.
__device__ __forceinline__ void finish_output(const Operand& out, Output kind, const ElementwiseTask& task,
                                              const PassPlan& plan, double constant, const double* partials,
                                              const Crew& crew) {
  const Extent& e = task.extent;
  const int64_t values = values_of(out, e);
  if (values == 0) return;
  const bool is_column = kind == Output::column;
  const int addends = static_cast<int>((is_column ? plan.columns.groups * e.inner : plan.chunks.count) / values);
  // The sums that make a value lie together; but a column's are one in each group of rows, and, where outer alone is
  // kept, a row's are some in each sample.
  const bool in_rows = out.stride[0] == 0 && out.stride[1] != 0;
  const int together = is_column ? 1 : in_rows ? static_cast<int>(plan.chunks.per_segment) : addends;
  const double added = constant * static_cast<double>(e.count() / values);
  const int64_t outer = out.stride[1] != 0 ? e.outer : 1;
  const int log_team = log_team_for(addends);
  for_each_value(values, log_team, crew, [&](int64_t v, int lane) {
    double sum[] = {share_of_sum<kLoads / 2>(v < values ? addends : 0, log_team, lane, [&](int j) {
      const int group = j < together ? 0 : j / together;
      return partial_at(partials, (group * values + v) * together + (j - group * together));
    })};
    add_up_team(sum, 1 << log_team);
    if (v < values && lane == 0)
      put(out, is_column ? v : v / outer * out.stride[0] + v % outer * out.stride[1], sum[0] + added);
  });
}

// Values, unless they were written before, and gradients. A task of an objective has no values of its own.
__device__ __forceinline__ void finish_outputs(const ElementwiseTask& task, const PassPlan& plan,
                                               const double* partials, const Crew& crew) {
  // Not unrolled: this is run once, and fetching code takes longer than running it.
  FUSEDVAE_UNROLL_BY(1)
  for (int k = -1; k < kMostInputs; ++k) {
    const bool is_value = k < 0;
    const Operand& out = is_value ? task.value : task.grads[k];
    const Output kind = is_value ? plan.outputs.value : plan.outputs.grads[k];
    if (!out.given || !is_summed(kind) || (is_value && plan.has_whole_values)) continue;
    finish_output(out, kind, task, plan, is_value ? plan.constant : 0,
                  partials + (is_value ? plan.first_value_partial : plan.first_grad_partial[k]), crew);
  }
}

}  // namespace cuda
}  // namespace fusedvae
