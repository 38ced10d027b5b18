// The loop over the tiles of an extent: what a formula's elements come from, and where what is made of them goes. It is
// compiled once for all formulas, to which it comes by a function for the elements of a tile.
#pragma once

#include <cstdint>
#include <type_traits>

#include "broadcast.h"
#include "cpu/memory.h"
#include "cpu/packs.h"
#include "cpu/parallel.h"
#include "cpu/sums.h"
#include "cpu/tile.h"
#include "math/scale.h"
#include "tasks.h"

namespace fusedvae {
namespace FUSEDVAE_NAMESPACE {

// What a formula is applied to: a tile's operands as arrays of the working type.
template <class T>
struct Arrays {
  const ElementwiseTask* task;
  bool is_plain, has_gains;      // the task
  const T* inputs[kMostInputs];  // the uniform one has one element
  const T* weight;               // in value and gradients; null for a weight of 1
  const T* marks;                // beside it: 0 where an element is selected away, if `selects`
  const T* ones;                 // what an instance for all tasks takes then
  bool selects;                  // whether a mark of 0 does away with its element, whatever that is
  T* value;                      // null where only their sum is wanted, as are gradients that are not
  T* grads[kMostInputs];
  T factor;  // of the gradients
  T constant;
  bool adds, are_added[kMostInputs];  // whether gradients are sums of columns; which are added to what is there
  DType half;                         // of the inputs that lie in 16 bits, and their gradients likewise; else f32
  bool are_halves[kMostInputs];       // which these are: read and written where they lie, whatever the pointers say
  const T *logs[kMostScales], *powers[kMostScales], *slopes[kMostScales];  // of scales, unless the task is plain
  bool has_logs[kMostScales];                                              // likewise
  const T *deviation, *deviation_slope;                                    // beside a sample, likewise
  const T *noise, *grad_z;
  T* z;

  bool has_gradients() const {
    bool found = false;
    for (const T* grad : grads) found = found || grad;
    return found;
  }
};

// float64 is here for exactness more than speed: beside those of the usual loss it has an instance of `apply` for
// uniform scales and one for any, which take weights for all elements, and sum and write values.
template <class T>
constexpr bool kHasFewInstances = std::is_same_v<T, double>;

// Whether loops go over operands that lie in 16 bits: with four lanes arithmetic takes longer than memory does.
constexpr bool kHasHalves = kLanes >= 8;

// Bytes that a loop over such operands reads and writes, from which on it waits for memory that threads share.
constexpr int64_t kSharedMemoryBytes = int64_t{12} << 20;

// What a scale in some form is, for the elements of a tile.
template <class T>
struct ScaleBuffers {
  alignas(kLine) T log[kTile], power[kTile], slope[kTile];
};
template <class T>
struct DeviationBuffers {
  alignas(kLine) T value[kTile], slope[kTile];
};

// Calls visit(form, x, pack's position) for the packs of an array; what that stores may be more than the array has. In
// the form the map is a constant to the compiler.
template <class T, class Visit>
FUSEDVAE_INLINE void map_packs(const Form& form, const T* x, int64_t count, const Visit& visit) {
  using P = typename Pack<T>::type;
  constexpr int64_t w = Pack<T>::lanes;
  const auto over_all = [&](Map map) FUSEDVAE_LAMBDA {
    Form known = form;
    known.map = map;
    for (int64_t i = 0; i < count; i += w)
      visit(known, i + w <= count ? load<P>(x + i) : load_part<P>(x + i, count - i), i);
  };
  switch (form.map) {
    case Map::exponential:
      return over_all(Map::exponential);
    case Map::linear:
      return over_all(Map::linear);
    case Map::softplus:
      return over_all(Map::softplus);
    case Map::bounded:
      return over_all(Map::bounded);
  }
}

template <int power, class T>
void map_scale(const Form& form, const T* x, int64_t count, ScaleBuffers<T>* out) {
  using P = typename Pack<T>::type;
  map_packs(form, x, count, [=](const Form& known, P given, int64_t i) FUSEDVAE_LAMBDA {
    const Scale<P> scale = scale_of<power>(known, given);
    store(out->log + i, scale.log);
    store(out->power + i, scale.power);
    store(out->slope + i, scale.slope);
  });
}

template <class T>
void map_deviation(const Form& form, const T* x, int64_t count, DeviationBuffers<T>* out) {
  using P = typename Pack<T>::type;
  map_packs(form, x, count, [=](const Form& known, P given, int64_t i) FUSEDVAE_LAMBDA {
    const Derived<P> deviation = deviation_of(known, given);
    store(out->value + i, deviation.value);
    store(out->slope + i, deviation.slope);
  });
}

// A formula, as far as the loop over the tiles knows it.
template <class T>
struct Work {
  int inputs, uniform;  // how many, and which is most often the same for all elements (-1 for none)
  int scales, scale_of[kMostScales];
  void (*map_scale[kMostScales])(const Form&, const T*, int64_t, ScaleBuffers<T>*);
  // Makes what the arrays have room for, and returns the sum of the weighted values, if `sums`.
  double (*apply)(const Arrays<T>&, int64_t count, bool is_uniform, bool sums);
};

// Of a struct of functions for a formula's elements, such as OfElements.
template <class Elements, class T>
constexpr Work<T> work_of() {
  using Formula = typename Elements::Formula;
  Work<T> work = {Formula::kInputs, Formula::kUniform, Formula::kScales, {}, {}, Elements::template apply_for<T>};
  if constexpr (Formula::kScales > 0) work.map_scale[0] = map_scale<Formula::kPowers[0], T>;
  if constexpr (Formula::kScales > 1) work.map_scale[1] = map_scale<Formula::kPowers[1], T>;
  if constexpr (Formula::kScales > 0)
    for (int k = 0; k < Formula::kScales; ++k) work.scale_of[k] = Formula::kScaleOf[k];
  return work;
}

// What runs a loop, given what its work amounts to, in elements of a likelihood.
using RunLoop = Callable<const Loop&, int64_t>;

// The buffers of a thread.
template <class T>
struct Buffers {
  alignas(kLine) T inputs[kMostInputs][kTile];
  alignas(kLine) T weight[kTile], incoming[kTile];
  alignas(kLine) T value[kTile];
  alignas(kLine) T grads[kMostInputs][kTile];
};

// Of one that samples, besides.
template <class T>
struct SampleBuffers {
  DeviationBuffers<T> deviation;
  alignas(kLine) T noise[kTile], grad_z[kTile], z[kTile];
  alignas(kLine) float scratch[kTile + kNoisePad], made[kTile + kNoisePad];
};

// How many elements a tile of the task has if it takes no buffers, else 0. Its operands are arrays of the working type,
// or their rows are; then a tile is a row or a part of one, and what is summed over these is added up where it is made.
template <class T>
int64_t unbuffered_tile(const Work<T>& work, const ElementwiseTask& task, const Outputs& outputs) {
  if (kHasFewInstances<T> || (task.weight && task.incoming)) return 0;
  if (work.scales > 0 && !task.is_plain()) return 0;
  const Extent& e = task.extent;
  const bool adds = outputs.any(Output::column);
  if (adds && (task.weight || task.incoming || task.value)) return 0;
  bool are_arrays = !adds, are_rows = e.inner >= kTile / 2;
  const auto look_at = [&](const Operand& operand) {
    are_arrays = are_arrays && is_array<T>(operand, e);
    are_rows = are_rows && operand.data && operand.dtype == dtype_of<T>() && operand.stride[2] == 1;
  };
  for (int k = 0; k < work.inputs; ++k) {
    if (outputs.grads[k] > Output::column) return 0;
    if (outputs.grads[k] == Output::element) look_at(task.grads[k]);
    if (adds || k != work.uniform || !task.inputs[k].is_uniform()) look_at(task.inputs[k]);
  }
  if (outputs.value > Output::element) return 0;
  if (task.weight) look_at(task.weight);
  if (task.incoming) look_at(task.incoming);
  if (task.value) look_at(task.value);
  return are_arrays ? kUnbufferedTile : are_rows ? min_of(e.inner, kUnbufferedTile) : 0;
}

// Which inputs the loop reads where they lie in 16 bits, as it writes their gradients: those that are, with these,
// arrays of one type, where the rest of the task is that of the usual loss. Returns the type, f32 for none.
//
// By way of buffers, a thread would wait for memory while it fills these, and leave memory waiting while it computes.
// Near by that matters less than that bfloat16 is rounded in several steps: between a formula's they make its chains so
// long that a processor sees too few of them at a time. Float16 has an instruction for it.
template <class T>
DType find_halves(const Work<T>& work, const ElementwiseTask& task, const Outputs& outputs, bool is_near,
                  bool (&are_halves)[kMostInputs]) {
  DType half = DType::f32;
  if (!kHasHalves || kHasFewInstances<T>) return half;
  if (task.weight || task.incoming || outputs.value != Output::none) return half;
  if (work.scales > 0 && !task.is_plain()) return half;
  const Extent& e = task.extent;
  for (int k = 0; k < work.inputs; ++k) {
    const DType dtype = half == DType::f32 ? task.inputs[k].dtype : half;
    const Output kind = outputs.grads[k];
    are_halves[k] = (dtype == DType::f16 || (dtype == DType::bf16 && !is_near)) && is_array(task.inputs[k], dtype, e) &&
                    (kind == Output::none || (kind == Output::element && is_array(task.grads[k], dtype, e)));
    if (are_halves[k]) half = dtype;
  }
  return half;
}

// The weights of a tile, in value and gradients, and what says which of its elements count: the task's own, as a weight
// of 1 times what comes in may be 0 as well.
template <class T>
void read_weights(const ElementwiseTask& task, const Tile& t, Buffers<T>& buffers, Arrays<T>* a) {
  a->weight = a->marks = nullptr;
  if (task.weight) a->weight = a->marks = read(task.weight, t, buffers.weight);
  if (!task.incoming) return;
  const T* const incoming = read(task.incoming, t, buffers.incoming);
  if (!task.weight) {
    a->weight = a->marks = incoming;
    return;
  }
  const int64_t n = t.count();
  for (int64_t i = 0; i < n; ++i) buffers.incoming[i] = a->weight[i] * incoming[i];
  a->weight = buffers.incoming;
}

// Maps the scales of a tile.
template <class T>
void map_scales(const Work<T>& work, const ElementwiseTask& task, int64_t count, ScaleBuffers<T>* buffers,
                Arrays<T>* a) {
  for (int k = 0; k < work.scales; ++k) {
    work.map_scale[k](task.forms[k], a->inputs[work.scale_of[k]], count, &buffers[k]);
    a->logs[k] = buffers[k].log;
    a->powers[k] = buffers[k].power;
    a->slopes[k] = buffers[k].slope;
    a->has_logs[k] = task.forms[k].has_log();
  }
}

// A tile's noise, what comes in for the sample, and where the sample goes.
template <class T>
void sample_operands(const LatentTask& task, const Tile& t, SampleBuffers<T>& buffers, Arrays<T>* a) {
  a->noise = nullptr;
  if (task.noise) {
    a->noise = read(task.noise, t, buffers.noise);
  } else if (task.seed) {
    const int64_t offset = task.offset ? static_cast<int64_t>(get(task.offset, 0)) : 0;
    const float* const noise =
        read_noise(task.index, offset, t, static_cast<uint64_t>(*task.seed), buffers.scratch, buffers.made);
    if constexpr (sizeof(T) == sizeof(float)) {
      a->noise = noise;
    } else {
      widen_array(noise, buffers.noise, t.count());
      a->noise = buffers.noise;
    }
  }
  if (!a->is_plain) {
    map_deviation(task.divergence.forms[0], a->inputs[1], t.count(), &buffers.deviation);
    a->deviation = buffers.deviation.value;
    a->deviation_slope = buffers.deviation.slope;
  }
  a->grad_z = task.grad_z ? read(task.grad_z, t, buffers.grad_z) : nullptr;
  a->z = task.z ? array_for(task.z, t, buffers.z, false) : nullptr;
}

// Runs the task (beside a sample, if `latent` is given), its loop by way of `run_loop`. The gradients are times
// `factor`; `totals`, unless null, receives the sums of the weighted values: one, or with `by_sample` one for each.
template <class T>
void run_elementwise(const Work<T>& work, const ElementwiseTask& given, const LatentTask* latent, double factor,
                     double constant, double* totals, bool by_sample, const RunLoop& run_loop) {
  const int n = work.inputs;
  ElementwiseTask task = given;
  if (!latent && task.incoming && task.incoming.is_uniform()) {  // then it is one of the gradients' factors
    factor *= get(task.incoming, 0);
    task.incoming = Operand{};
  }
  const Extent& e = task.extent;
  const Outputs outputs = outputs_of(task);
  int64_t read_bytes = 0, written = 0;
  for (int k = 0; k < n; ++k) {
    read_bytes += bytes_of(task.inputs[k], e);
    if (outputs.grads[k] != Output::element) continue;
    written += bytes_of(task.grads[k], e);
    prefer_huge_pages(task.grads[k], e);
  }
  if (latent) prefer_huge_pages(latent->z, e);
  // The tiles, and so the order of sums, are those of sizes, strides, dtypes and what is wanted, whatever the threads;
  // what memory is like decides how it is written.
  const bool is_large = written >= kPastCachesBytes;
  const int64_t unbuffered = is_large || latent || (totals && by_sample) ? 0 : unbuffered_tile(work, task, outputs);
  bool are_halves[kMostInputs] = {};
  DType half = DType::f32;
  if (!latent && !(totals && by_sample))
    half = find_halves(work, task, outputs, read_bytes + written < kSharedMemoryBytes, are_halves);
  bool past_caches = kHasStreamingStores && is_large && half == DType::f32;
  for (int k = 0; k < n && past_caches; ++k)
    if (outputs.grads[k] == Output::element && is_untouched(task.grads[k], e)) past_caches = false;
  const Tiling tiling(e, unbuffered ? unbuffered : kTile);
  const Units units(e, tiling, outputs.any(Output::column));
  ValueSums<T> values(totals, by_sample, e, tiling);
  const auto sum_of = [&](Output kind, const Operand& out) { return OutputSum<T>(kind, out, e, tiling, units); };
  OutputSum<T> value_sum = sum_of(outputs.value, task.value);
  OutputSum<T> grad_sums[kMostInputs] = {
      sum_of(outputs.grads[0], task.grads[0]), sum_of(outputs.grads[1], task.grads[1]),
      sum_of(outputs.grads[2], task.grads[2]), sum_of(outputs.grads[3], task.grads[3])};

  const bool adds = unbuffered && outputs.any(Output::column);
  // Whether there is an instance for tiles that have one value of the input that is most often uniform.
  const bool may_be_uniform = work.uniform >= 0 && !latent && !adds && (work.scales < 2 || task.is_plain());

  const auto body = [&](int64_t first, int64_t last) {
    Buffers<T> buffers;
    SampleBuffers<T> sample_buffers;
    ScaleBuffers<T> scale_buffers[kMostScales];
    Arrays<T> a = {};
    if (kHasFewInstances<T> && !task.weight && !task.incoming) {
      for (T& weight : buffers.weight) weight = 1;
      a.ones = buffers.weight;
    }
    a.task = &task;
    a.is_plain = task.is_plain();
    a.has_gains = task.has_gains();
    a.selects = task.weight.given;
    a.adds = adds;
    a.half = half;
    for (int j = 0; j < n; ++j) a.are_halves[j] = are_halves[j];
    a.factor = static_cast<T>(factor);
    a.constant = task.value || task.weight ? static_cast<T>(constant) : T(0);  // to sums it is added at their end
    // Values and gradients are written where they belong, or summed from a buffer.
    const auto place = [&](Output kind, const Operand& out, const Tile& t, T* buffer, bool past) -> T* {
      return kind == Output::none ? nullptr : kind == Output::element ? array_for(out, t, buffer, past) : buffer;
    };
    const auto deliver = [&](OutputSum<T>& sum, const Operand& out, const Turn& turn, const Tile& t, T* array,
                             T* buffer, bool past) {
      if (sum.wanted())
        sum.take(turn, t, array);
      else if (array && out)
        write(out, t, array, buffer, past);
    };
    const auto visit = [&](const Turn& turn) {
      const Tile t = tiling[turn.tile];
      bool is_uniform = false;
      if (may_be_uniform) {
        const Operand& input = task.inputs[work.uniform];
        is_uniform = input.is_uniform() || (t.nb == 1 && t.no == 1 && input.stride[2] == 0);
        if (is_uniform)
          buffers.inputs[work.uniform][0] = static_cast<T>(get(input, input.data ? offset_of(input, t, 0, 0) : 0));
      }
      for (int j = 0; j < n; ++j)
        a.inputs[j] = is_uniform && j == work.uniform ? buffers.inputs[j]
                      : a.are_halves[j]               ? static_cast<const T*>(address_of(task.inputs[j], t))
                                                      : read(task.inputs[j], t, buffers.inputs[j]);
      if (latent) sample_operands(*latent, t, sample_buffers, &a);
      if (!a.is_plain && !is_uniform) map_scales(work, task, t.count(), scale_buffers, &a);
      read_weights(task, t, buffers, &a);
      const bool needs_values = values.needs_values(t);
      a.value = needs_values ? buffers.value : place(outputs.value, task.value, t, buffers.value, false);
      for (int j = 0; j < n; ++j) {
        const Output kind = outputs.grads[j];
        if (a.adds && kind == Output::column)
          a.grads[j] = grad_sums[j].sums_of_columns(turn, t, &a.are_added[j]);
        else if (a.are_halves[j] && kind == Output::element)
          a.grads[j] = static_cast<T*>(address_of(task.grads[j], t));
        else
          a.grads[j] = place(kind, task.grads[j], t, buffers.grads[j], past_caches);
      }
      const double total = work.apply(a, t.count(), is_uniform, values.wanted() && !needs_values);
      values.take(turn.tile, t, total, a.value);
      deliver(value_sum, task.value, turn, t, a.value, buffers.value, false);
      for (int j = 0; j < n; ++j)
        deliver(grad_sums[j], task.grads[j], turn, t, a.grads[j], buffers.grads[j], past_caches);
      if (a.z) write(latent->z, t, a.z, sample_buffers.z, false);
    };
    for (int64_t unit = first; unit < last; ++unit) units.visit_tiles(unit, visit);
  };
  run_loop({units.count(), body}, e.count() * (latent && latent->seed ? 4 : 1));

  values.add_up();
  value_sum.add_up();
  for (OutputSum<T>& sum : grad_sums) sum.add_up();
}

}  // namespace FUSEDVAE_NAMESPACE
}  // namespace fusedvae
