// The CPU kernels. Compiled once an instruction set, with FUSEDVAE_ISA naming it; `table` is what dispatch.cpp picks.
//
// Every kernel goes tile by tile: read operands, apply a formula to arrays, write results, leave partial sums in a slot
// of the tile's own. Slots are added up in order, in double, when all tiles are done, so that results are the same for
// every thread count.

#include "cpu/kernels.h"

// Formulas use elementary functions by name: those of simd.h, which must come before them.
#include "cpu/simd.h"

#include "cpu/elementwise.h"
#include "cpu/latent.h"

namespace fusedvae {
namespace FUSEDVAE_NAMESPACE {
namespace {

// Elements that are worth waking another thread for.
constexpr int64_t kGrain = 16384;

int threads_for(int64_t elements, int threads) {
  return static_cast<int>(max_of(1, min_of(threads, elements / kGrain)));
}

auto on_threads(int threads) {
  return [threads](const Loop& loop, int64_t elements) {
    const Loop* const loops[] = {&loop};
    parallel_for(threads_for(elements, threads), loops, 1);
  };
}

void normal(const NormalTask& task, int threads) {
  const Extent flat{1, 1, task.count};
  const Tiling tiling(flat);
  const uint64_t seed = static_cast<uint64_t>(*task.seed);
  const auto body = [&](int64_t first, int64_t last) {
    alignas(kLine) float buffer[kTile + kNoisePad];
    for (int64_t k = first; k < last; ++k) {
      const Tile t = tiling[k];
      const float* const noise = noise_span(t.i0, t.ni, seed, buffer);
      with_type(task.out.dtype,
                [&](auto* type) { narrow_array(noise, static_cast<decltype(type)>(task.out.data) + t.i0, t.ni); });
    }
  };
  on_threads(threads)({tiling.count(), body}, 4 * task.count);
}

void latent(const LatentTask& task, int threads) {
  dispatch_latent(task, on_threads(threads));
}

// An operand of one value, or 1.
double factor_at(const Operand& op) {
  return op ? get(op, 0) : 1;
}

// The terms of an objective, from the one numbered `k` on. Their loops go in one go of the threads: a divergence alone
// is seldom worth waking them for.
void run_terms(const ObjectiveTask& task, int k, Doubles* totals, const Loop** loops, int count, int64_t elements,
               int threads) {
  if (k == task.count) {
    parallel_for(threads_for(elements, threads), loops, count);
    return;
  }
  const Term& term = task.terms[k];
  if (term.elements.formula < 0) return run_terms(task, k + 1, totals, loops, count, elements, threads);
  const bool by_element = task.values == Values::element;
  const double factor =
      term.factor * factor_at(term.normalizer) * factor_at(term.coefficient) * factor_at(task.grad_scale);
  dispatch_elementwise(term.elements, factor, term.constant, by_element ? nullptr : totals[k].at(0),
                       task.values == Values::sample, [&](const Loop& loop, int64_t more) {
                         loops[count] = &loop;
                         run_terms(task, k + 1, totals, loops, count + 1, elements + more, threads);
                       });
}

// Some of the values that are given for a term, or what they are all summed to.
void sum_given(const Term& term, bool by_sample, double* totals, int64_t first, int64_t last) {
  for (int64_t b = first; b < last; ++b) totals[b] = by_sample ? get(term.given, b * term.given.stride[0]) : 0;
  if (by_sample) return;
  for (int64_t b = 0; b < term.given_count; ++b) totals[0] += get(term.given, b * term.given.stride[0]);
}

// Some of a term's values, from its sums or from the values that are given.
void finish_term(const Term& term, bool by_sample, double* totals, int64_t first, int64_t last) {
  if (term.elements.formula < 0) sum_given(term, by_sample, totals, first, last);
  const Extent& e = term.elements.extent;
  const double elements = static_cast<double>(by_sample ? e.sample() : e.count());
  const double constant = term.elements.weight ? 0 : term.constant * elements;  // what is weighted has it already
  const double factor = term.factor * factor_at(term.normalizer);
  if (factor != 1 || constant != 0)
    for (int64_t b = first; b < last; ++b) totals[b] = factor * (totals[b] + constant);
  if (term.out) put_array(term.out, first, term.out.stride[0], totals + first, last - first);
}

// Some of an objective's values, from the sums of its terms.
void finish(const ObjectiveTask& task, Doubles* totals, int64_t first, int64_t last) {
  for (int k = 0; k < task.count; ++k)
    finish_term(task.terms[k], task.values == Values::sample, totals[k].at(0), first, last);
  double* const loss = totals[0].at(0);
  for (int k = 0; k < task.count; ++k) {
    const double coefficient = factor_at(task.terms[k].coefficient);
    if (k == 0 && coefficient == 1) continue;
    for (int64_t b = first; b < last; ++b) loss[b] = (k ? loss[b] : 0) + coefficient * totals[k][b];
  }
  put_array(task.loss, first, task.loss.stride[0], loss + first, last - first);
}

// Whether the values of samples are just sums of a few of a term's, which a tile adds up: nothing more is made of them.
bool are_sums_of_few(const ObjectiveTask& task) {
  const Term& term = task.terms[0];
  return task.values == Values::sample && task.count == 1 && term.elements.formula >= 0 &&
         term.elements.extent.sample() <= kShort && !term.out &&
         term.factor * factor_at(term.normalizer) * factor_at(term.coefficient) == 1;
}

void objective(const ObjectiveTask& task, int threads) {
  if (are_sums_of_few(task)) {
    ObjectiveTask as_elements = task;
    as_elements.values = Values::element;
    Operand& value = as_elements.terms[0].elements.value = task.loss;
    value.stride[1] = value.stride[2] = 0;
    return objective(as_elements, threads);
  }
  const Loop* loops[ObjectiveTask::kMostTerms];
  if (task.values == Values::element) return run_terms(task, 0, nullptr, loops, 0, 0, threads);
  const int64_t values = task.values_count();
  Doubles totals[ObjectiveTask::kMostTerms] = {Doubles(values), Doubles(task.count > 1 ? values : 0)};
  run_terms(task, 0, totals, loops, 0, 0, threads);
  const auto body = [&](int64_t first, int64_t last) {
    finish(task, totals, first * kTile, min_of(values, last * kTile));
  };
  on_threads(threads)({ceil_div(values, kTile), body}, values);
}

template <class T, class S>
void scale_array(S* data, int64_t count, T factor, int threads) {
  const auto body = [&](int64_t first, int64_t last) {
    for (int64_t i = first * kTile; i < min_of(count, last * kTile); ++i)
      narrow(static_cast<T>(widen(data[i])) * factor, data + i);
  };
  on_threads(threads)({ceil_div(count, kTile), body}, count);
}

void scale(const ScaleTask& task, int threads) {
  const double factor = get(task.factor, 0);
  if (task.product) put(task.product, 0, factor * task.coefficient.value);
  if (factor == 1.0) return;
  for (int k = 0; k < ScaleTask::kMost; ++k) {
    const Operand& tensor = task.tensors[k];
    if (!tensor) continue;
    with_type(tensor.dtype, [&](auto* type) {
      auto* data = static_cast<decltype(type)>(tensor.data);
      if (tensor.dtype == DType::f64)
        scale_array<double>(data, task.counts[k], factor, threads);
      else
        scale_array<float>(data, task.counts[k], static_cast<float>(factor), threads);
    });
  }
}

}  // namespace

#define FUSEDVAE_NAME_(isa) #isa
#define FUSEDVAE_NAME(isa) FUSEDVAE_NAME_(isa)
extern const Kernels table;
const Kernels table = {FUSEDVAE_NAME(FUSEDVAE_ISA), normal, latent, objective, scale};

}  // namespace FUSEDVAE_NAMESPACE
}  // namespace fusedvae
