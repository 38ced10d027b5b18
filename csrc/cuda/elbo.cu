// The bound: likelihood and divergence, their totals and gradients, in one launch.
#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/walk.h"

namespace fusedvae {
namespace cuda {
namespace {

// The sums of columns take a few registers more.
template <class A, bool by_column>
constexpr int kBlocks = by_column && kWalkBlocks<A> > 3 ? 3 : kWalkBlocks<A>;

// How a task is cut up, and what the last block adds up. Partial sums: of the likelihood's values, then (if it is
// summed) of the gradient of spread, a chunk each; then of the divergence.
struct Plan {
  Chunks nll, kl;
  ColumnChunks columns;  // instead of the likelihood's chunks, where they have the gradients of spread
  int64_t nll_blocks = 0, kl_blocks = 0;
  SpreadGradient spread = SpreadGradient::none;
  // The values that spread has along batch and outer, and the chunks that each gets a sum of.
  int64_t spread_batch = 1, spread_outer = 1, spread_chunks = 0;
  int64_t spread_partials = 0;
  bool has_values = false;  // there are totals, or values a sample

  __host__ __device__ bool is_finished_by_last_block() const { return has_values || spread_partials > 0; }
  int64_t partials() const { return nll.count + spread_partials + kl.count; }
};

// The segments that the likelihood's sums are of.
int64_t nll_segment(const NllTask& task, bool by_sample, Plan& plan) {
  const Extent& e = task.extent;
  const Operand& g = task.grad_spread;
  const int64_t whole = by_sample ? e.sample() : e.count();
  if (!g) return whole;
  const bool keeps_batch = g.stride[0] != 0 || e.batch == 1, keeps_outer = g.stride[1] != 0 || e.outer == 1;
  if ((g.stride[2] != 0 || e.inner == 1) && keeps_batch && keeps_outer) {
    plan.spread = SpreadGradient::element;
    return whole;
  }
  if (g.stride[2] != 0 && e.inner != 1) {
    plan.spread = SpreadGradient::by_column;
    return whole;
  }
  plan.spread = SpreadGradient::summed;
  plan.spread_batch = g.stride[0] != 0 ? e.batch : 1;
  plan.spread_outer = g.stride[1] != 0 ? e.outer : 1;
  if (g.stride[1] != 0) return e.inner;
  return g.stride[0] != 0 ? e.sample() : whole;
}

Plan plan_of(const ElboTask& task) {
  Plan plan;
  plan.has_values = task.values != Values::element;
  const bool by_sample = task.values == Values::sample;
  if (task.has_nll && task.nll.extent.count() > 0) {
    const Extent& e = task.nll.extent;
    const int64_t segment = nll_segment(task.nll, by_sample, plan);
    plan.nll = Chunks(e.count(), segment);
    if (plan.spread == SpreadGradient::by_column) {
      plan.columns = ColumnChunks(e.batch * e.outer, by_sample ? e.outer : e.batch * e.outer, e.inner);
      plan.nll.team = plan.columns.team;
      plan.nll.count = plan.columns.count();
      plan.spread_partials = plan.columns.groups * e.inner;
    } else if (plan.spread == SpreadGradient::summed) {
      plan.spread_partials = plan.nll.count;
      plan.spread_chunks = plan.nll.count / (plan.spread_batch * plan.spread_outer);
    }
    plan.nll_blocks = plan.nll.blocks();
  }
  if (task.has_kl) {
    const Extent& e = task.kl.extent;
    plan.kl = Chunks(e.count(), by_sample ? e.sample() : e.count());
    plan.kl_blocks = plan.kl.blocks();
  }
  return plan;
}

// The loss and its terms, one or one a sample, each by a team of threads.
__device__ __forceinline__ void finish_values(const ElboTask& task, const Plan& plan, const double* nll_partials,
                                              const double* kl_partials) {
  const bool by_sample = task.values == Values::sample;
  const Extent& e = task.has_nll ? task.nll.extent : task.kl.extent;
  const int64_t values = by_sample ? e.batch : 1;
  if (values == 0) return;
  const int64_t nlls = plan.nll.count / values;
  const int64_t kls = (task.has_kl ? plan.kl.count : task.kl_in_count) / values;
  const double constant = task.has_nll ? task.constant * static_cast<double>(by_sample ? e.sample() : e.count()) : 0;
  const double beta = get<double>(task.beta, 0);
  const int team = team_for(nlls > kls ? nlls : kls), lane = static_cast<int>(threadIdx.x) % team;
  for (int64_t first = 0; first < values; first += kThreads / team) {
    const int64_t b = first + static_cast<int>(threadIdx.x) / team;
    double nll = 0, kl = 0;
    if (b < values) {
      for (int64_t j = lane; j < nlls; j += team) nll += partial_at(nll_partials, b * nlls + j);
      for (int64_t j = lane; j < kls; j += team)
        kl += task.has_kl ? partial_at(kl_partials, b * kls + j)
                          : get<double>(task.kl_in, (b * kls + j) * task.kl_in.stride[0]);
    }
    nll = task.scale * (team_sum(nll, team) + constant);
    kl = task.scale * team_sum(kl, team);
    if (b >= values || lane != 0) continue;
    const bool has_kl = task.has_kl || task.kl_in.given;
    put(task.loss, b * task.loss.stride[0], has_kl ? nll + beta * kl : nll);
    if (task.nll_out.given) put(task.nll_out, b * task.nll_out.stride[0], nll);
    if (task.kl_out.given) put(task.kl_out, b * task.kl_out.stride[0], kl);
  }
}

// The gradient of a spread that is broadcast, each of its values by a team of threads.
__device__ __forceinline__ void finish_spread(const NllTask& task, const Plan& plan, const double* partials) {
  const Operand& g = task.grad_spread;
  const int64_t values = plan.spread_batch * plan.spread_outer, chunks = plan.spread_chunks;
  // With one value along batch, those along outer have their chunks in a row of each sample.
  const bool in_rows = plan.spread_batch == 1 && plan.spread_outer > 1;
  const int64_t in_row = in_rows ? plan.nll.per_segment : chunks;
  const int team = team_for(chunks), lane = static_cast<int>(threadIdx.x) % team;
  for (int64_t first = 0; first < values; first += kThreads / team) {
    const int64_t v = first + static_cast<int>(threadIdx.x) / team;
    double sum = 0;
    if (v < values)
      for (int64_t j = lane; j < chunks; j += team)
        sum += partial_at(partials, in_rows ? (j / in_row * values + v) * in_row + j % in_row : v * chunks + j);
    sum = team_sum(sum, team);
    if (v < values && lane == 0) put(g, v / plan.spread_outer * g.stride[0] + v % plan.spread_outer * g.stride[1], sum);
  }
}

// The same of one that has a value a column.
__device__ __forceinline__ void finish_columns(const NllTask& task, const Plan& plan, const double* partials) {
  const int64_t columns = task.extent.inner;
  for (int64_t column = threadIdx.x; column < columns; column += kThreads) {
    double sum = 0;
    for (int64_t group = 0; group < plan.columns.groups; ++group) sum += partial_at(partials, group * columns + column);
    put(task.grad_spread, column, sum);
  }
}

// A chunk of rows and columns; fills the partial sums of its columns.
template <class A>
__device__ __forceinline__ void run_columns(NllWalk<A, true>& walk, const NllTask& task, const ColumnChunks& columns,
                                            int64_t chunk, int lane, double* partials) {
  const int64_t group = chunk / columns.strips, inner = task.extent.inner;
  const int64_t segment = group / columns.groups_per_segment;
  const int64_t within = (group - segment * columns.groups_per_segment) * columns.rows;
  const int64_t first_row = segment * columns.segment + within, rest = columns.segment - within;
  const int64_t rows = rest < columns.rows ? rest : columns.rows;
  int64_t column = (chunk - group * columns.strips) * columns.team * ColumnChunks::kColumns + lane * A::V;
  for (int k = 0; k < ColumnChunks::kColumns / A::V; ++k, column += columns.team * A::V) {
    if (column >= inner) break;
    walk.column_sums = {};
    for (int64_t row = first_row; row < first_row + rows; ++row) {
      const Position at = position_of(row * inner + column, task.extent);
      walk.apply(at, walk.fetch(at));
    }
    FUSEDVAE_UNROLL
    for (int j = 0; j < A::V; ++j) partials[group * inner + column + j] = static_cast<double>(walk.column_sums.at[j]);
  }
}

template <class A, bool by_column>
__global__ void __launch_bounds__(kThreads, kBlocks<A, by_column>)
    elbo_kernel(const ElboTask task, const Plan plan, const Workspace workspace) {
  using T = typename A::T;
  const bool sums_spread = plan.spread == SpreadGradient::summed;
  double* const nll_partials = workspace.partials;
  double* const spread_partials = nll_partials + plan.nll.count;
  double* const kl_partials = spread_partials + plan.spread_partials;
  NllWalk<A, by_column> walk(task.nll, plan.spread);
  for (int64_t block = blockIdx.x; block < plan.nll_blocks; block += gridDim.x) {
    const Share share = share_of(plan.nll, block);
    walk.sum = walk.spread_sum = 0;
    const bool has_chunk = share.chunk < plan.nll.count, writes = has_chunk && share.lane == 0;
    if constexpr (!by_column)
      run<A>(walk, share, plan.nll.team, task.nll.extent);
    else if (has_chunk)
      run_columns<A>(walk, task.nll, plan.columns, share.chunk, share.lane, spread_partials);
    if (plan.has_values) {
      const T sum = team_sum(walk.sum, plan.nll.team);
      if (writes) nll_partials[share.chunk] = static_cast<double>(sum);
    }
    if (sums_spread) {
      const T sum = team_sum(walk.spread_sum, plan.nll.team);
      if (writes) spread_partials[share.chunk] = static_cast<double>(sum);
    }
  }
  if (task.has_kl) {
    // Blocks that the likelihood has no turn for in its last round begin with the divergence.
    const T factor = static_cast<T>(get<double>(task.beta, 0));
    const int64_t taken = plan.nll_blocks % gridDim.x;
    int64_t block = static_cast<int64_t>(blockIdx.x) - taken;
    if (block < 0) block += gridDim.x;
    LatentWalk<A, false> walk(task.kl, factor);
    for (; block < plan.kl_blocks; block += gridDim.x) {
      const Share share = share_of(plan.kl, block);
      walk.sum = 0;
      run<A>(walk, share, plan.kl.team, task.kl.extent);
      const T sum = team_sum(walk.sum, plan.kl.team);
      if (share.lane == 0 && share.length > 0) kl_partials[share.chunk] = static_cast<double>(sum);
    }
  }
  if (!plan.is_finished_by_last_block() || !is_last_block(workspace.done)) return;
  if (plan.has_values) finish_values(task, plan, nll_partials, kl_partials);
  if (sums_spread) finish_spread(task.nll, plan, spread_partials);
  if (by_column) finish_columns(task.nll, plan, spread_partials);
}

ElboTask as_elbo(const NllTask& nll) {
  ElboTask task;
  task.has_nll = true;
  task.nll = nll;
  task.values = Values::element;
  return task;
}

}  // namespace

int64_t workspace_bytes(const ElboTask& task) {
  const Plan plan = plan_of(task);
  return plan.is_finished_by_last_block() ? Workspace::bytes_for(plan.partials()) : 0;
}

int64_t workspace_bytes(const NllTask& task) {
  return workspace_bytes(as_elbo(task));
}

void nll(const NllTask& task, const Place& place) {
  elbo(as_elbo(task), place);
}

void elbo(const ElboTask& given, const Place& place) {
  ElboTask task = given;
  if (task.values != Values::element) {
    // The gradients are those of the loss: beta, which may be on the device, is the kernel's to multiply by.
    task.nll.weight = task.kl.grad_kl = Operand{};
    task.nll.weight.given = task.kl.grad_kl.given = true;
    task.nll.weight.value = task.kl.grad_kl.value = task.scale;
  }
  const Plan plan = plan_of(task);
  if (plan.nll_blocks + plan.kl_blocks == 0 && !plan.is_finished_by_last_block()) return;
  const DeviceGuard guard(place.device);
  Walked walked;
  if (task.has_nll) {
    const NllTask& n = task.nll;
    walked.add(n.extent, {&n.recon_x, &n.x, &n.spread, &n.weight, &n.value, &n.grad_recon_x, &n.grad_x});
    if (plan.spread == SpreadGradient::element) walked.add(n.extent, {&n.grad_spread});
  }
  if (task.has_kl) walked.add(task.kl.extent, {&task.kl.mu, &task.kl.logvar, &task.kl.grad_mu, &task.kl.grad_logvar});
  const auto launch_elbo = [&](auto access, auto by_column) {
    using A = decltype(access);
    const unsigned grid =
        grid_for(plan.nll_blocks + plan.kl_blocks, kBlocks<A, decltype(by_column)::value>, place.device);
    launch("elbo", elbo_kernel<A, decltype(by_column)::value>, grid, kThreads, 0,
           static_cast<cudaStream_t>(place.stream), task, plan, Workspace(place.workspace));
  };
  if (plan.columns.groups > 0)
    with_mixed_access(walked, [&](auto access) { launch_elbo(access, std::true_type{}); });
  else
    with_access(walked, [&](auto access) { launch_elbo(access, std::false_type{}); });
}

}  // namespace cuda
}  // namespace fusedvae
