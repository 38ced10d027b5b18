// How a pass's elements are cut up, and where its sums are left: worked out on the host.
#pragma once

#include <cstdint>
#include <stdexcept>

#include "broadcast.h"
#include "cuda/access.h"
#include "cuda/sums.h"
#include "tasks.h"

namespace fusedvae {
namespace cuda {

// A pass's chunks, and which of the workspace's partial sums are its own: of the values, and of each gradient that is
// summed. There is one for each chunk; with sums for each column, one for each of those and group of rows.
struct PassPlan {
  Chunks chunks;
  ColumnChunks columns;  // what the chunks are, in a kernel that goes by column
  Outputs outputs;
  bool is_plain = true;
  double constant = 0;  // what values have besides; weighted ones have it in them
  bool has_sums = false;
  bool has_whole_values = false;  // each is a chunk's, and written at once
  unsigned blocks = 0;
  int64_t first_value_partial = 0, first_grad_partial[kMostInputs] = {};
  // The task's, for arithmetic in float32: many GPUs take 64 times as long over a number in float64.
  Adaptation<float> adaptation;
};

// In the arithmetic of T.
template <class T>
__device__ __forceinline__ const Adaptation<T>& adaptation_for(const ElementwiseTask& task, const PassPlan& plan) {
  if constexpr (std::is_same_v<T, double>)
    return task;
  else
    return plan.adaptation;
}

// What there is to add up when all chunks are done.
struct Finish {
  static constexpr int64_t kMany = 4096;
  bool is_needed = false;
  bool has_outputs = false;  // of passes
  int64_t partials = 0;      // in all
  int64_t blocks = 1;        // that have values to add up at a time

  // So many values, of so many partial sums altogether.
  void add(int64_t values, int64_t addends) {
    is_needed = true;
    if (values == 0) return;
    if (addends / values > kMostAddends) throw std::runtime_error("fusedvae: more than 2^31 sums make one value");
    const int64_t teams = kThreads >> log_team_for(addends / values);
    const int64_t needed = (values + teams - 1) / teams;
    if (needed > blocks) blocks = needed;
  }
  // Whether it is too much for one block: then it has a launch of its own. Else the last block does it.
  bool is_large() const { return partials > kMany && blocks > 1; }
};

// --- the plan ---------------------------------------------------------------------------------------------------

// How many values an output has.
inline __host__ __device__ int64_t values_of(const Operand& out, const Extent& e) {
  return (out.stride[0] != 0 ? e.batch : 1) * (out.stride[1] != 0 ? e.outer : 1) * (out.stride[2] != 0 ? e.inner : 1);
}

inline __host__ __device__ bool is_summed(Output output) {
  return output != Output::none && output != Output::element;
}

// What a pass goes over: any operands, flat ones, or ones of which columns have sums of their own.
enum class Order { any, flat, by_column };

// Of a task with these outputs. A segment is the elements whose sum some output has a value of its own for, or, of
// flat operands, a row. Values of samples may be written at once, if they are wanted somewhere.
inline PassPlan plan_of_pass(const ElementwiseTask& task, const Outputs& outputs, Order order, bool are_values_wanted,
                             Finish& finish) {
  PassPlan plan;
  const Extent& e = task.extent;
  plan.outputs = outputs;
  plan.is_plain = task.is_plain();
  for (int k = 0; k < kMostScales; ++k) plan.adaptation.forms[k] = FormIn<float>(task.forms[k]);
  for (int k = 0; k < kMostInputs; ++k) plan.adaptation.gains[k] = static_cast<float>(task.gains[k]);
  const bool by_row = outputs.any(Output::row) || order == Order::flat, by_sample = outputs.any(Output::sample);
  plan.chunks = Chunks(e.count(), by_row ? e.inner : by_sample ? e.sample() : e.count());
  if (order == Order::by_column && e.count() > 0) {
    const int64_t rows = e.batch * e.outer;
    plan.columns = ColumnChunks(rows, by_row ? 1 : by_sample ? e.outer : rows, e.inner);
    plan.chunks.log_team = plan.columns.log_team;
    plan.chunks.per_segment = plan.columns.groups_per_segment * plan.columns.strips;
    plan.chunks.count = plan.columns.count();
  }
  if (plan.chunks.count > UINT32_MAX) throw std::runtime_error("fusedvae: more than 2^32 sums in one launch");
  plan.blocks = static_cast<unsigned>(plan.chunks.blocks());
  const auto place = [&](Output output, const Operand& out) {
    const int64_t first = finish.partials;
    if (is_summed(output)) {
      const int64_t partials = output == Output::column ? plan.columns.groups * e.inner : plan.chunks.count;
      if (out.given) {
        finish.has_outputs = true;
        finish.add(values_of(out, e), partials);
      }
      finish.partials += partials;
    }
    return first;
  };
  for (const Output output : {outputs.value, outputs.grads[0], outputs.grads[1], outputs.grads[2], outputs.grads[3]})
    plan.has_sums |= is_summed(output) && output != Output::column;
  const bool are_samples = plan.chunks.segment == e.sample() && plan.chunks.per_segment == 1;
  plan.has_whole_values = are_values_wanted && outputs.value == Output::sample && are_samples;
  if (!plan.has_whole_values) plan.first_value_partial = place(outputs.value, task.value);
  for (int k = 0; k < kMostInputs; ++k) plan.first_grad_partial[k] = place(outputs.grads[k], task.grads[k]);
  return plan;
}

// An operand of a task of one sample, that goes by its rows as if they were samples.
inline void take_rows_for_samples(Operand& op) {
  op.stride[0] = op.stride[1];
  op.stride[1] = 0;
}

// The same task with the rows of its only sample for samples, as flat operands have them.
inline ElementwiseTask with_rows_for_samples(const ElementwiseTask& given) {
  ElementwiseTask task = given;
  if (task.extent.batch != 1) return task;
  task.extent = {given.extent.outer, 1, given.extent.inner};
  for (Operand* op : {&task.weight, &task.incoming, &task.value}) take_rows_for_samples(*op);
  for (int k = 0; k < kMostInputs; ++k) {
    take_rows_for_samples(task.inputs[k]);
    take_rows_for_samples(task.grads[k]);
  }
  return task;
}

// What a pass reads and writes at each element. The weight and the second input, data if there are some, may have
// dtypes of their own, if there are passes for that.
inline void add_layouts(Layouts& layouts, const ElementwiseTask& task, const Outputs& outputs, bool may_differ) {
  layouts.add(task.extent, {&task.weight, &task.inputs[1]}, may_differ);
  layouts.add(task.extent, {&task.incoming, &task.inputs[0], &task.inputs[2], &task.inputs[3]});
  if (outputs.value == Output::element) layouts.add(task.extent, {&task.value});
  for (int k = 0; k < kMostInputs; ++k)
    if (outputs.grads[k] == Output::element) layouts.add(task.extent, {&task.grads[k]});
}

}  // namespace cuda
}  // namespace fusedvae
