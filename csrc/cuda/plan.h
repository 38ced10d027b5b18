// How a pass's elements are cut up, and where its sums are left: worked out on the host.
#pragma once

#include <cstdint>

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
  double constant = 0;                     // what values have besides; weighted ones have it in them
  bool has_whole_values = false;           // each is a chunk's, and written at once
  bool is_finished_by_last_block = false;  // some output is not
  int64_t blocks = 0;                      // that have chunks
  int64_t value_partials = 0, grad_partials[kMostInputs] = {};  // where they begin
};

// --- the plan ---------------------------------------------------------------------------------------------------

inline bool is_summed(Output output) {
  return output != Output::none && output != Output::element;
}

// Of a task with these outputs. A segment is the elements whose sum some output has a value of its own for. `partials`
// counts those of passes before, and then its own too.
inline PassPlan plan_of_pass(const ElementwiseTask& task, const Outputs& outputs, bool by_column, int64_t* partials) {
  PassPlan plan;
  const Extent& e = task.extent;
  plan.outputs = outputs;
  plan.is_plain = task.is_plain();
  const bool by_row = outputs.any(Output::row), by_sample = outputs.any(Output::sample);
  plan.chunks = Chunks(e.count(), by_row ? e.inner : by_sample ? e.sample() : e.count());
  if (by_column && e.count() > 0) {
    const int64_t rows = e.batch * e.outer;
    plan.columns = ColumnChunks(rows, by_row ? 1 : by_sample ? e.outer : rows, e.inner);
    plan.chunks.team = plan.columns.team;
    plan.chunks.per_segment = plan.columns.groups_per_segment * plan.columns.strips;
    plan.chunks.count = plan.columns.count();
  }
  plan.blocks = plan.chunks.blocks();
  const auto place = [&](Output output) {
    const int64_t first = *partials;
    if (is_summed(output)) {
      plan.is_finished_by_last_block = true;
      *partials += output == Output::column ? plan.columns.groups * e.inner : plan.chunks.count;
    }
    return first;
  };
  plan.has_whole_values = task.value && outputs.value == Output::sample && !by_row && plan.chunks.per_segment == 1;
  if (!plan.has_whole_values) plan.value_partials = place(outputs.value);
  for (int k = 0; k < kMostInputs; ++k) plan.grad_partials[k] = place(outputs.grads[k]);
  return plan;
}

// What a pass reads and writes at each element.
inline void add_layouts(Layouts& layouts, const ElementwiseTask& task, const Outputs& outputs) {
  layouts.add(task.extent, {&task.weight, &task.incoming});
  if (outputs.value == Output::element) layouts.add(task.extent, {&task.value});
  for (int k = 0; k < kMostInputs; ++k) {
    layouts.add(task.extent, {&task.inputs[k]});
    if (outputs.grads[k] == Output::element) layouts.add(task.extent, {&task.grads[k]});
  }
}

}  // namespace cuda
}  // namespace fusedvae
