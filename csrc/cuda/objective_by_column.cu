// The objective's kernels for gradients that have a sum for each column.
#include "cuda/objective.h"

namespace fusedvae {
namespace cuda {

void launch_by_column(const ObjectiveTask& task, const Plan& plan, const Layouts& layouts, const Launch& on) {
  const auto launch = [&](auto access) { launch_objective<decltype(access), Sums::of_columns, false>(task, plan, on); };
  // Of flat operands in float32 a row is a sample.
  static_assert(ColumnChunks::kColumns == FlatFloat32::V, "a thread starts anew at each row");
  layouts.are_samples_rows() && has_flat_access(layouts) && layouts.are_all(DType::f32)
      ? launch(FlatFloat32{})
      : with_mixed_float_access(layouts, launch);
}

}  // namespace cuda
}  // namespace fusedvae
