// A pass over its elements: what a thread does with its share, a block with its chunks, and what the last block adds
// up. A pass fetches the operands of an element (or vector of elements), and later applies formulas to what it fetched;
// kAhead is how many fetches it has under way at a time. `made` are its outputs and sums.
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
__device__ __forceinline__ void run(Pass& pass, const Share& share, int team, const Extent& extent) {
  constexpr int kAhead = Pass::kAhead;
  for (int first = share.lane * A::V; first < share.length; first += kAhead * team * A::V) {
    typename Pass::Fetched fetched[kAhead];
    Position at[kAhead];
    FUSEDVAE_UNROLL
    for (int k = 0; k < kAhead; ++k) {
      const int offset = first + k * team * A::V;
      if (offset < share.length) fetched[k] = pass.fetch(at[k] = position_of(share.begin + offset, extent));
    }
    FUSEDVAE_UNROLL
    for (int k = 0; k < kAhead; ++k)
      if (first + k * team * A::V < share.length) pass.apply(at[k], fetched[k]);
  }
}

// A chunk of rows and columns; fills the partial sums of its columns.
template <class A, class Pass>
__device__ __forceinline__ void run_columns(Pass& pass, const PassPlan& plan, const Extent& extent, int64_t chunk,
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
    pass.made.start_columns();
    int64_t element = first_row * inner + column;
    for (int row = 0; row < rows; ++row, element += inner) {
      const Position at = position_of(element, extent);
      pass.apply(at, pass.fetch(at));
    }
    const auto leave = [&](Output output, const Lanes<A>& sums, typename A::T& sum, int64_t first) {
      FUSEDVAE_UNROLL
      for (int j = 0; j < A::V; ++j) {
        sum += sums.at[j];
        if (output == Output::column) partials[first + group * inner + column + j] = static_cast<double>(sums.at[j]);
      }
    };
    leave(plan.outputs.value, pass.made.value_columns, pass.made.value_sum, plan.value_partials);
    FUSEDVAE_UNROLL
    for (int k = 0; k < Pass::kInputs; ++k)
      leave(plan.outputs.grads[k], pass.made.grad_columns[k], pass.made.grad_sums[k], plan.grad_partials[k]);
  }
}

// The pass's blocks, from the given one on.
template <class A, class Pass>
__device__ __forceinline__ void run_blocks(Pass& pass, const ElementwiseTask& task, const PassPlan& plan, int64_t block,
                                           double* partials) {
  using T = typename A::T;
  constexpr Sums sums = decltype(pass.made)::kSums;
  const int team = plan.chunks.team;
  for (; block < plan.blocks; block += gridDim.x) {
    const Share share = share_of(plan.chunks, block);
    const bool has_chunk = share.chunk < plan.chunks.count, writes = has_chunk && share.lane == 0;
    pass.made.start_sums();
    if constexpr (sums != Sums::of_columns)
      run<A>(pass, share, team, task.extent);
    else if (has_chunk)
      run_columns<A>(pass, plan, task.extent, share.chunk, share.lane, partials);
    const auto leave = [&](Output output, T thread_sum, int64_t first, bool is_whole) {
      if (output == Output::none || output == Output::element || output == Output::column) return;
      const double sum = static_cast<double>(team_sum(thread_sum, team));
      if (!writes) return;
      if (is_whole)
        put(task.value, share.chunk * task.value.stride[0],
            sum + plan.constant * static_cast<double>(task.extent.sample()));
      else
        partials[first + share.chunk] = sum;
    };
    leave(plan.outputs.value, pass.made.value_sum, plan.value_partials, plan.has_whole_values);
    FUSEDVAE_UNROLL
    for (int k = 0; k < Pass::kInputs; ++k)
      if constexpr (sums != Sums::of_values)
        leave(plan.outputs.grads[k], pass.made.grad_sums[k], plan.grad_partials[k], false);
  }
}

// --- what the last block adds up --------------------------------------------------------------------------------

// An output that keeps batch or outer, or nothing, each of its values by a team of threads: of the chunks that agree
// with it along what it keeps.
__device__ __forceinline__ void finish_sums(const Operand& out, const Extent& e, const Chunks& chunks, double constant,
                                            const double* partials) {
  const int64_t batch = out.stride[0] != 0 ? e.batch : 1, outer = out.stride[1] != 0 ? e.outer : 1;
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
    sum = team_sum(sum, team) + constant * static_cast<double>(e.count() / values);
    if (v < values && lane == 0) put(out, v / outer * out.stride[0] + v % outer * out.stride[1], sum);
  }
}

// One that keeps inner alone.
__device__ __forceinline__ void finish_columns(const Operand& out, const Extent& e, int64_t groups, double constant,
                                               const double* partials) {
  for (int64_t column = threadIdx.x; column < e.inner; column += kThreads) {
    double sum = constant * static_cast<double>(e.batch * e.outer);
    for (int64_t group = 0; group < groups; ++group) sum += partial_at(partials, group * e.inner + column);
    put(out, column, sum);
  }
}

// Values, unless they were written before, and gradients.
template <Sums sums>
__device__ __forceinline__ void finish(const ElementwiseTask& task, const PassPlan& plan, const double* partials) {
  // Not unrolled: this is run once.
  FUSEDVAE_UNROLL_BY(1)
  for (int k = -1; k < (sums == Sums::of_values ? 0 : kMostInputs); ++k) {
    const bool is_value = k < 0;
    const Operand& out = is_value ? task.value : task.grads[k];
    const Output output = is_value ? plan.outputs.value : plan.outputs.grads[k];
    if (output == Output::none || output == Output::element) continue;
    if (is_value && (plan.has_whole_values || !out.given)) continue;
    const double* const addends = partials + (is_value ? plan.value_partials : plan.grad_partials[k]);
    const double each = is_value ? plan.constant : 0;
    if (sums == Sums::of_columns && output == Output::column)
      finish_columns(out, task.extent, plan.columns.groups, each, addends);
    else
      finish_sums(out, task.extent, plan.chunks, each, addends);
  }
}

}  // namespace cuda
}  // namespace fusedvae
