// A formula over the tiles of an extent: its values, their sums, and its gradients.
#pragma once

#include <cstdint>
#include <type_traits>

#include "broadcast.h"
#include "cpu/memory.h"
#include "cpu/packs.h"
#include "cpu/parallel.h"
#include "cpu/sums.h"
#include "cpu/tile.h"
#include "math/formulas.h"
#include "tasks.h"

namespace fusedvae {
namespace FUSEDVAE_NAMESPACE {

// Elements ahead of where it is that a loop asks for beside sums of columns, to which it goes back at every row: there
// processors do not look as far ahead by themselves as they do otherwise.
constexpr int64_t kAhead = 768;

// What a formula is applied to: a tile's operands as arrays of the working type.
template <class T>
struct Arrays {
  const ElementwiseTask* task;
  bool is_plain, has_gains;      // the task
  const T* inputs[kMostInputs];  // the uniform one has one element
  const T* weight;               // in value and gradients; null for a weight of 1
  const T* ones;                 // what an instance for all tasks takes then
  bool selects;                  // whether a weight of 0 does away with what it weights, whatever that is
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

// How scales come: as formulas are written (one input, it may be, the same for all elements), or in any form.
enum class Scales { plain, uniform, any };

// What a loop makes: all that is wanted, or one thing alone, without what the others would take.
enum class Makes { all, sum, values, gradients };

// float64 is here for exactness more than speed: beside that of the usual loss it has one instance of `apply`, which
// takes weights for all elements and scales in any form, and sums and writes values.
template <class T>
constexpr bool kHasFewInstances = std::is_same_v<T, double>;

// Whether loops go over operands that lie in 16 bits: with four lanes arithmetic takes longer than memory does.
constexpr bool kHasHalves = kLanes >= 8;

// What a formula derives of its scales, and the derivatives of their logarithms by what they are forms of.
template <class Formula, class P>
struct Spreads {
  decltype(Formula::plain(static_cast<const P*>(nullptr))) derived;
  P slopes[kMostScales];
};

// Of a formula's inputs if these are plain, else of the scales that they were mapped to.
template <class Formula, class P>
FUSEDVAE_INLINE Spreads<Formula, P> spreads_of(const P* inputs, const Scale<P>* scales, bool is_plain) {
  Spreads<Formula, P> spreads = {};
  if (is_plain) spreads.derived = Formula::plain(inputs);
  if constexpr (Formula::kScales > 0) {
    if (is_plain) return spreads;
    spreads.derived = Formula::derive(scales);
    for (int k = 0; k < Formula::kScales; ++k) spreads.slopes[k] = scales[k].slope;
  }
  return spreads;
}

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

// Gradients by what a formula is written in, as gradients by its inputs.
template <class Formula, class T, class P>
FUSEDVAE_INLINE void through_forms(const Arrays<T>& a, const P* slopes, P* grads) {
  if constexpr (Formula::kScales > 0) {
#pragma GCC unroll 2
    for (int k = 0; k < Formula::kScales; ++k) {
      P& grad = grads[Formula::kScaleOf[k]];
      grad = through(grad, slopes[k]);
    }
    if (a.has_gains) {
#pragma GCC unroll 4
      for (int k = 0; k < Formula::kInputs; ++k) grads[k] *= static_cast<T>(a.task->gains[k]);
    }
  }
}

// The scales that were mapped, at some elements.
template <class Formula, class T, class Load, class P>
FUSEDVAE_INLINE void fetch_scales(const Arrays<T>& a, int64_t i, const Load& load, Scale<P>* scales) {
#pragma GCC unroll 2
  for (int k = 0; k < Formula::kScales; ++k) {
    scales[k] = {load(a.logs[k] + i), load(a.powers[k] + i), load(a.slopes[k] + i), a.has_logs[k]};
  }
}

// A term's formula on the elements of a tile.
template <class F>
struct OfElements {
  using Formula = F;
  static constexpr bool kSamples = false;

  // Returns the sum of the weighted values, if it makes that. Gradients may be sums of columns if `adds`. Half is what
  // inputs that lie in 16 bits are.
  template <class T, bool has_weights, Scales kind, Makes makes, bool adds = false, class Half = T>
  static double apply(const Arrays<T> a, int64_t count) {  // by value: no store can change it
    using P = typename Pack<T>::type;
    constexpr int n = Formula::kInputs;
    constexpr bool is_uniform = kind == Scales::uniform, has_halves = !std::is_same_v<Half, T>;
    constexpr bool makes_sum = makes == Makes::all || makes == Makes::sum;
    constexpr bool makes_values = makes == Makes::all || makes == Makes::values;
    constexpr bool makes_gradients = makes == Makes::all || makes == Makes::gradients;
    const P zero = {}, one = number<P>(1), factor = P{} + a.factor, constant = P{} + a.constant;
    const P none = number<P>(a.selects ? 0.0 : NAN);  // the weight that does away with an element
    // (In an instance for all tasks it is not known before.)
    const bool is_plain = kind == Scales::any       ? kHasFewInstances<T> && a.is_plain
                          : kind == Scales::uniform ? Formula::kScales != 1 || a.is_plain
                                                    : true;
    struct Fetched {
      P inputs[n], weight;
      Scale<P> scales[kMostScales];
    };
    Fetched uniform = {};
    if constexpr (is_uniform) uniform.inputs[Formula::kUniform] = P{} + a.inputs[Formula::kUniform][0];
    // A formula's only scale is derived here, if it is uniform. One of two is derived with the other: compilers take
    // out of the loop what does not change in it.
    constexpr bool is_derived_once = is_uniform && Formula::kScales == 1;
    Spreads<Formula, P> once = {};
    if constexpr (is_derived_once) {
      const Scale<P> scale = scale_of<Formula::kPowers[0]>(a.task->forms[0], uniform.inputs[Formula::kUniform]);
      once = spreads_of<Formula>(uniform.inputs, &scale, is_plain);
    }

    const auto fetch = [=](int64_t i, const auto& load) FUSEDVAE_LAMBDA {
      Fetched fetched = {};
#pragma GCC unroll 4
      for (int k = 0; k < n && adds; ++k) __builtin_prefetch(a.inputs[k] + i + kAhead);
#pragma GCC unroll 4
      for (int k = 0; k < n; ++k)
        fetched.inputs[k] = is_uniform && k == Formula::kUniform ? uniform.inputs[k]
                            : has_halves && a.are_halves[k]      ? load(reinterpret_cast<const Half*>(a.inputs[k]) + i)
                                                                 : load(a.inputs[k] + i);
      fetched.weight = has_weights ? load(a.weight + i) : one;
      if (kind == Scales::any && !is_plain) fetch_scales<Formula>(a, i, load, fetched.scales);
      return fetched;
    };
    const auto visit = [=](int64_t i, const Fetched& in, const auto& store) FUSEDVAE_LAMBDA {
      const Spreads<Formula, P> spreads = is_derived_once ? once : spreads_of<Formula>(in.inputs, in.scales, is_plain);
      Element<P, n> element = Formula::element(in.inputs, spreads.derived, has_weights ? factor * in.weight : factor);
      if (!is_plain) through_forms<Formula>(a, spreads.slopes, element.grads);
      P value = element.value;
      if (has_weights) {
        const auto counts = in.weight != none;
        value = counts ? (value + constant) * in.weight : zero;
#pragma GCC unroll 4
        for (int k = 0; k < n; ++k) element.grads[k] = counts ? element.grads[k] : zero;
      }
      if (makes_values && a.value) store(a.value + i, has_weights ? value : value + constant);
#pragma GCC unroll 4
      for (int k = 0; k < n && makes_gradients; ++k) {
        if (!a.grads[k]) continue;
        if (has_halves && a.are_halves[k])
          store(reinterpret_cast<Half*>(a.grads[k]) + i, element.grads[k]);
        else if (adds && a.are_added[k])
          store.add(a.grads[k] + i, element.grads[k]);
        else
          store(a.grads[k] + i, element.grads[k]);
      }
      return value;
    };
    return sum_of_packs<T, makes_sum>(count, fetch, visit);
  }

  // The instance of `apply` for what is known at run time.
  template <class T>
  static double apply_for(const Arrays<T>& a, int64_t count, bool is_uniform, bool sums) {
    if constexpr (kHasFewInstances<T>) {
      if (sums && a.is_plain && !a.weight) return apply<T, false, Scales::plain, Makes::all>(a, count);
      Arrays<T> weighted = a;
      if (!a.weight) weighted.weight = a.ones;
      return apply<T, true, Scales::any, Makes::all>(weighted, count);
    } else {
      if (a.adds) return apply<T, false, Scales::plain, Makes::all, true>(a, count);
      if constexpr (kHasHalves) {
        if (a.half == DType::bf16) return with_halves<T, Bf16>(a, count);
        if (a.half == DType::f16) return with_halves<T, F16>(a, count);
      }
      if constexpr (Formula::kUniform >= 0)
        if (is_uniform) return with_scales<T, Scales::uniform>(a, count, sums);
      if constexpr (Formula::kScales > 0)
        if (!a.is_plain) return with_scales<T, Scales::any>(a, count, sums);
      return with_scales<T, Scales::plain>(a, count, sums);
    }
  }

 private:
  template <class T, class Half>
  static double with_halves(const Arrays<T>& a, int64_t count) {
    return a.has_gradients() ? apply<T, false, Scales::plain, Makes::all, false, Half>(a, count)
                             : apply<T, false, Scales::plain, Makes::sum, false, Half>(a, count);
  }
  // Of those with weights there are two: masks, and the gradients of values per sample.
  template <class T, Scales kind>
  static double with_scales(const Arrays<T>& a, int64_t count, bool sums) {
    if (a.weight)
      return sums || a.value ? apply<T, true, kind, Makes::all>(a, count)
                             : apply<T, true, kind, Makes::gradients>(a, count);
    if (a.has_gradients()) return apply<T, false, kind, Makes::all>(a, count);
    return sums ? apply<T, false, kind, Makes::sum>(a, count) : apply<T, false, kind, Makes::values>(a, count);
  }
};

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
struct NoBuffers {};

// How many elements a tile of the task has if it takes no buffers, else 0. Its operands are arrays of the working type,
// or their rows are; then a tile is a row or a part of one, and what is summed over these is added up where it is made.
template <class Work, class T>
int64_t unbuffered_tile(const ElementwiseTask& task, const Outputs& outputs) {
  using Formula = typename Work::Formula;
  if (kHasFewInstances<T> || Work::kSamples || (task.weight && task.incoming)) return 0;
  if (Formula::kScales > 0 && !task.is_plain()) return 0;
  const Extent& e = task.extent;
  const bool adds = outputs.any(Output::column);
  if (adds && (task.weight || task.incoming || task.value)) return 0;
  bool are_arrays = !adds, are_rows = e.inner >= kTile / 2;
  const auto look_at = [&](const Operand& operand) {
    are_arrays = are_arrays && is_array<T>(operand, e);
    are_rows = are_rows && operand.data && operand.dtype == dtype_of<T>() && operand.stride[2] == 1;
  };
  for (int k = 0; k < Formula::kInputs; ++k) {
    if (outputs.grads[k] > Output::column) return 0;
    if (outputs.grads[k] == Output::element) look_at(task.grads[k]);
    if (adds || k != Formula::kUniform || !task.inputs[k].is_uniform()) look_at(task.inputs[k]);
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
// In caches that matters less than that bfloat16 is rounded in several steps: between a formula's they make its chains
// so long that a processor sees too few of them at a time. Float16 has an instruction for it.
template <class Work, class T>
DType find_halves(const ElementwiseTask& task, const Outputs& outputs, bool is_cached,
                  bool (&are_halves)[kMostInputs]) {
  using Formula = typename Work::Formula;
  DType half = DType::f32;
  if (!kHasHalves || kHasFewInstances<T> || Work::kSamples) return half;
  if (task.weight || task.incoming || outputs.value != Output::none) return half;
  if (Formula::kScales > 0 && !task.is_plain()) return half;
  const Extent& e = task.extent;
  for (int k = 0; k < Formula::kInputs; ++k) {
    const DType dtype = half == DType::f32 ? task.inputs[k].dtype : half;
    const Output kind = outputs.grads[k];
    are_halves[k] = (dtype == DType::f16 || (dtype == DType::bf16 && !is_cached)) &&
                    is_array(task.inputs[k], dtype, e) &&
                    (kind == Output::none || (kind == Output::element && is_array(task.grads[k], dtype, e)));
    if (are_halves[k]) half = dtype;
  }
  return half;
}

// The weights of a tile, null where there are none: a product, in which what is weighted with 0 stays away.
template <class T>
const T* read_weights(const ElementwiseTask& task, const Tile& t, Buffers<T>& buffers) {
  if (!task.weight && !task.incoming) return nullptr;
  const T* const weight = task.weight ? read(task.weight, t, buffers.weight) : nullptr;
  const T* const incoming = task.incoming ? read(task.incoming, t, buffers.incoming) : nullptr;
  if (!weight || !incoming) return weight ? weight : incoming;
  const int64_t n = t.count();
  for (int64_t i = 0; i < n; ++i) buffers.incoming[i] = weight[i] == 0 ? T(0) : weight[i] * incoming[i];
  return buffers.incoming;
}

// Maps the scales of a tile.
template <class Formula, class T>
void map_scales(const ElementwiseTask& task, int64_t count, ScaleBuffers<T>* buffers, Arrays<T>* a) {
  if constexpr (Formula::kScales > 0) {
    const auto map = [&](auto power, int k) {
      map_scale<decltype(power)::value>(task.forms[k], a->inputs[Formula::kScaleOf[k]], count, &buffers[k]);
      a->logs[k] = buffers[k].log;
      a->powers[k] = buffers[k].power;
      a->slopes[k] = buffers[k].slope;
      a->has_logs[k] = task.forms[k].has_log();
    };
    map(std::integral_constant<int, Formula::kPowers[0]>(), 0);
    if constexpr (Formula::kScales > 1) map(std::integral_constant<int, Formula::kPowers[1]>(), 1);
  }
}

// Runs the task (beside a sample, if `latent` is given), its loop by way of `run_loop`. The gradients are times
// `factor`; `totals`, unless null, receives the sums of the weighted values: one, or with `by_sample` one for each.
template <class Work, class T>
void run_elementwise(const ElementwiseTask& given, const LatentTask* latent, double factor, double constant,
                     double* totals, bool by_sample, const RunLoop& run_loop) {
  using Formula = typename Work::Formula;
  constexpr int n = Formula::kInputs;
  ElementwiseTask task = given;
  if (!Work::kSamples && task.incoming && task.incoming.is_uniform()) {  // then it is one of the gradients' factors
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
  // The tiles, and so the order of sums, are those of sizes alone; what memory is like decides how it is written.
  const bool is_large = written >= kPastCachesBytes;
  const int64_t unbuffered = is_large || (totals && by_sample) ? 0 : unbuffered_tile<Work, T>(task, outputs);
  bool are_halves[kMostInputs] = {};
  DType half = DType::f32;
  if (!(totals && by_sample))
    half = find_halves<Work, T>(task, outputs, read_bytes + written < kPastCachesBytes, are_halves);
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

  const auto body = [&](int64_t first, int64_t last) {
    Buffers<T> buffers;
    std::conditional_t<Work::kSamples, SampleBuffers<T>, NoBuffers> sample_buffers;
    ScaleBuffers<T> scale_buffers[Formula::kScales + 1];  // (none of a formula without: not an array of 0)
    Arrays<T> a = {};
    if (kHasFewInstances<T> && !task.weight && !task.incoming) {
      for (T& weight : buffers.weight) weight = 1;
      a.ones = buffers.weight;
    }
    a.task = &task;
    a.is_plain = task.is_plain();
    a.has_gains = task.has_gains();
    a.selects = task.weight.given;
    a.adds = unbuffered && outputs.any(Output::column);
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
      if constexpr (Formula::kUniform >= 0 && !Work::kSamples) {
        const Operand& input = task.inputs[Formula::kUniform];
        is_uniform = !kHasFewInstances<T> && half == DType::f32 && !a.adds && (Formula::kScales < 2 || a.is_plain) &&
                     (input.is_uniform() || (t.nb == 1 && t.no == 1 && input.stride[2] == 0));
        if (is_uniform)
          buffers.inputs[Formula::kUniform][0] = static_cast<T>(get(input, input.data ? offset_of(input, t, 0, 0) : 0));
      }
      for (int j = 0; j < n; ++j)
        a.inputs[j] = a.are_halves[j]                        ? static_cast<const T*>(address_of(task.inputs[j], t))
                      : is_uniform && j == Formula::kUniform ? buffers.inputs[j]
                                                             : read(task.inputs[j], t, buffers.inputs[j]);
      if constexpr (Work::kSamples) sample_operands(*latent, t, sample_buffers, &a);
      if (!a.is_plain && !is_uniform) map_scales<Formula>(task, t.count(), scale_buffers, &a);
      a.weight = read_weights(task, t, buffers);
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
      const double total = Work::template apply_for<T>(a, t.count(), is_uniform, values.wanted() && !needs_values);
      values.take(turn.tile, t, total, a.value);
      deliver(value_sum, task.value, turn, t, a.value, buffers.value, false);
      for (int j = 0; j < n; ++j)
        deliver(grad_sums[j], task.grads[j], turn, t, a.grads[j], buffers.grads[j], past_caches);
      if constexpr (Work::kSamples)
        if (a.z) write(latent->z, t, a.z, sample_buffers.z, false);
    };
    for (int64_t unit = first; unit < last; ++unit) units.visit_tiles(unit, visit);
  };
  run_loop({units.count(), body}, e.count() * (latent && latent->seed ? 4 : 1));

  values.add_up();
  value_sum.add_up();
  for (OutputSum<T>& sum : grad_sums) sum.add_up();
}

inline void dispatch_elementwise(const ElementwiseTask& task, double factor, double constant, double* totals,
                                 bool by_sample, const RunLoop& run_loop) {
  const auto visit = [&](auto tag) {
    using Work = OfElements<typename decltype(tag)::type>;
    if (task.in_double)
      run_elementwise<Work, double>(task, nullptr, factor, constant, totals, by_sample, run_loop);
    else
      run_elementwise<Work, float>(task, nullptr, factor, constant, totals, by_sample, run_loop);
  };
  with_formula(task.formula, visit, Formulas{});
}

}  // namespace FUSEDVAE_NAMESPACE
}  // namespace fusedvae
