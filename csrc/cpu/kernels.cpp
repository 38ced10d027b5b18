// The CPU kernels. Compiled once an instruction set, with FUSEDVAE_ISA naming it; `table` is what dispatch.cpp picks.
//
// Every kernel goes tile by tile: read operands, run a formula over arrays, write results, leave partial sums in a
// slot of the tile's own. Slots are added up in order, in double, when all tiles are done, so that results are the
// same for every thread count.

#include "cpu/kernels.h"

#include <initializer_list>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "cpu/parallel.h"
#include "cpu/simd.h"
// (the arithmetic above, the formulas below)
#include "cpu/tile.h"
#include "math/gaussian.h"

namespace fusedvae {
namespace FUSEDVAE_NAMESPACE {
namespace {

// Elements that are worth waking another thread for.
constexpr int64_t kGrain = 16384;
// Bytes of outputs from which on they are written past the caches: more than a cache could keep for their reader.
constexpr int64_t kStreamBytes = int64_t{24} << 20;

int threads_for(int64_t elements, int threads) {
  return static_cast<int>(max_of(1, min_of(threads, elements / kGrain)));
}

// What runs a loop, given what its work amounts to, in elements of a likelihood.
using Run = Callable<const Loop&, int64_t>;

auto on_threads(int threads) {
  return [threads](const Loop& loop, int64_t elements) { parallel_for(threads_for(elements, threads), loop); };
}

// Bytes of an output from which on its pages are worth asking for: malloc maps anything of this size anew, while it
// serves smaller blocks from memory that has its pages already.
constexpr int64_t kHugePageBytes = int64_t{32} << 20;

int64_t bytes_of(const Operand& op, const Extent& e) {
  return op.data ? e.count() * size_of(op.dtype) : 0;
}

// Fresh memory costs a fault a page at its first touch, which for a large gradient takes longer than computing it.
// Ask for pages of 2 MiB; a hint, so that nothing depends on the answer.
void prefer_huge_pages(const Operand& op, const Extent& e) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = uintptr_t{2} << 20;
  if (bytes_of(op, e) < kHugePageBytes) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(op.data) + page - 1) & ~(page - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(op.data) + static_cast<uintptr_t>(bytes_of(op, e))) & ~(page - 1);
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)op, (void)e;
#endif
}

// Packs that are fetched before any of them is written. A processor that finds the low twelve bits of a load's address
// in a store under way takes the two for the same and has the load wait. Gradients often lie a few lines past their
// operands, up to multiples of 4096 bytes: then each store would hold up the next load.
constexpr int64_t kAhead = 4;

// Runs apply(i, fetch(i, load), store, keep) over [0, count), a pack at a time. For the last, partial pack, load and
// store are partial, and keep zeroes the lanes past the end.
template <class T, class Fetch, class Apply>
FUSEDVAE_INLINE void for_packs(int64_t count, const Fetch& fetch, const Apply& apply) {
  typedef typename Pack<T>::type P;
  constexpr int64_t w = Pack<T>::lanes, ahead = w > 1 ? kAhead : 1;
  const auto load_all = [](const T* p) FUSEDVAE_LAMBDA { return load<P>(p); };
  const auto store_all = [](T* p, P v) FUSEDVAE_LAMBDA { store(p, v); };
  const auto keep_all = [](P v) FUSEDVAE_LAMBDA { return v; };
  int64_t i = 0;
  for (; i + ahead * w <= count; i += ahead * w) {
    decltype(fetch(i, load_all)) fetched[ahead];
#pragma GCC unroll 4
    for (int64_t k = 0; k < ahead; ++k) fetched[k] = fetch(i + k * w, load_all);
#pragma GCC unroll 4
    for (int64_t k = 0; k < ahead; ++k) apply(i + k * w, fetched[k], store_all, keep_all);
  }
  for (; i + w <= count; i += w) apply(i, fetch(i, load_all), store_all, keep_all);
  const int64_t rest = count - i;
  if (rest > 0)
    apply(
        i, fetch(i, [rest](const T* p) FUSEDVAE_LAMBDA { return load_part<P>(p, rest); }),
        [rest](T* p, P v) FUSEDVAE_LAMBDA { store_part(p, v, rest); },
        [rest](P v) FUSEDVAE_LAMBDA {
          T lanes[sizeof(P) / sizeof(T)];
          store(lanes, v);
          return load_part<P>(lanes, rest);
        });
}

// --- likelihood -----------------------------------------------------------------------------------------------------

// Rows whose gradients of a spread a column are added up in float, before they are in double.
constexpr int64_t kRowsInFloat = 64;

// The formula over arrays.
template <class T>
struct NllArrays {
  const T *recon_x, *x, *spread, *weight;
  T *value, *grad_recon_x, *grad_x, *grad_spread;
  T eps, uniform_weight;
};

// Returns the sum of the values if `sums`; values and gradients go where the pointers are not null.
template <class T, bool is_variance, bool has_weights, bool uniform_spread, bool sums>
double nll_arrays(const NllArrays<T> a, int64_t count) {  // by value: no store can change it
  using P = typename Pack<T>::type;
  const P zero = {}, eps = zero + a.eps;
  P logvars = {}, half_squares = {};
  // logvar, precision where the spread is a variance, and half the precision times the weight.
  const auto take_spread = [eps](P spread, P half_weight, P* logvar, P* precision, P* half_precision) FUSEDVAE_LAMBDA {
    if (is_variance) {
      const P variance = spread < eps ? eps : spread;
      *logvar = logarithm(variance);
      *precision = 1.0f / variance;
      *half_precision = half_weight * *precision;
    } else {
      *logvar = spread;
      // Where values are summed the weight is the objective's scale, which is finite: the exponential takes it along.
      *half_precision = sums ? exponential(-spread, half_weight) : half_weight * exponential(-spread);
    }
  };
  const P half_weight = zero + 0.5f * a.uniform_weight;
  P logvar = {}, precision = {}, half_precision = {};
  // For a weight of 2 where each element has its own.
  if (uniform_spread)
    take_spread(zero + a.spread[0], has_weights ? zero + 1.0f : half_weight, &logvar, &precision, &half_precision);
  struct Fetched {
    P recon_x, x, spread, weight;
  };
  const auto fetch = [=](int64_t i, auto load) FUSEDVAE_LAMBDA -> Fetched {
    return {load(a.recon_x + i), load(a.x + i), uniform_spread ? P{} : load(a.spread + i),
            has_weights ? load(a.weight + i) : P{}};
  };
  const auto apply = [=, &logvars, &half_squares](int64_t i, const Fetched& in, auto store, auto keep) FUSEDVAE_LAMBDA {
    const P h = has_weights ? 0.5f * in.weight : half_weight;
    P l = logvar, p = precision, half_p = half_precision;
    if (!uniform_spread)
      take_spread(in.spread, h, &l, &p, &half_p);
    else if (has_weights)
      half_p = h * half_p;
    const GaussianNll<P> g = gaussian_nll(in.recon_x, in.x, l, h, half_p);
    if (sums) {
      logvars += keep(l);
      half_squares += keep(g.half_square);
    } else if (a.value) {
      store(a.value + i, g.value);
    }
    if (a.grad_recon_x) store(a.grad_recon_x + i, g.d_recon);
    if (a.grad_x) store(a.grad_x + i, -g.d_recon);
    if (a.grad_spread) store(a.grad_spread + i, is_variance ? g.d_logvar * p : g.d_logvar);
  };
  for_packs<T>(count, fetch, apply);
  return static_cast<double>(0.5f * a.uniform_weight) * static_cast<double>(sum_lanes(logvars)) +
         static_cast<double>(sum_lanes(half_squares));
}

// The instance of nll_arrays for a combination known at run time.
template <class T, bool... known>
double nll_arrays_for(const NllArrays<T>& a, int64_t count) {
  return nll_arrays<T, known...>(a, count);
}
template <class T, bool... known, class... Rest>
double nll_arrays_for(const NllArrays<T>& a, int64_t count, bool next, Rest... rest) {
  return next ? nll_arrays_for<T, known..., true>(a, count, rest...)
              : nll_arrays_for<T, known..., false>(a, count, rest...);
}

// What becomes of the gradient of spread: written an element at a time, or summed.
enum class Spread { none, element, tile, sample, row, column };

Spread spread_reduction(const NllTask& task) {
  const Operand& g = task.grad_spread;
  const Extent& e = task.extent;
  if (!g) return Spread::none;
  const bool batch = g.stride[0] != 0 || e.batch == 1, outer = g.stride[1] != 0 || e.outer == 1;
  if (g.stride[2] != 0 || e.inner == 1) {
    if (batch && outer) return Spread::element;
    if (g.stride[2] != 0) return Spread::column;
  }
  if (g.stride[1] != 0) return Spread::row;
  return g.stride[0] != 0 ? Spread::sample : Spread::tile;
}

// Whether a tile of the task takes none of run_nll's buffers.
template <class T>
bool is_unbuffered(const NllTask& task, Spread reduction, bool by_sample, bool stream) {
  if (by_sample || stream || (reduction != Spread::none && reduction != Spread::element)) return false;
  if (!task.spread.is_uniform() && !is_array<T>(task.spread, task.extent)) return false;
  if (!task.weight.is_uniform() && !is_array<T>(task.weight, task.extent)) return false;
  for (const Operand* op : {&task.recon_x, &task.x})
    if (!is_array<T>(*op, task.extent)) return false;
  for (const Operand* op : {&task.value, &task.grad_recon_x, &task.grad_x, &task.grad_spread})
    if (*op && !is_array<T>(*op, task.extent)) return false;
  return true;
}

// Runs the task, its loop by way of `run`; `totals`, unless null, receives the sum of the weighted values: one, or one
// a sample with `by_sample`. The weight is a number then, finite and not an element's.
template <class T>
void run_nll(const NllTask& task, double* totals, bool by_sample, const Run& run) {
  const Extent& e = task.extent;
  const Spread reduction = spread_reduction(task);
  const bool stream = bytes_of(task.grad_recon_x, e) + bytes_of(task.grad_x, e) +
                          (reduction == Spread::element ? bytes_of(task.grad_spread, e) : 0) >=
                      kStreamBytes;
  const Tiling tiling(e, is_unbuffered<T>(task, reduction, by_sample, stream) ? kUnbufferedTile : kTile);
  const int64_t tiles = tiling.count();

  for (const Operand* op : {&task.grad_recon_x, &task.grad_x}) prefer_huge_pages(*op, e);
  if (reduction == Spread::element) prefer_huge_pages(task.grad_spread, e);

  const int64_t value_slots = totals ? (by_sample ? tiling.max_samples() : 1) : 0;
  const int64_t spread_slots = reduction == Spread::row      ? tiling.max_rows()
                               : reduction == Spread::sample ? tiling.max_samples()
                               : reduction == Spread::tile   ? 1
                                                             : 0;
  Doubles values(tiles * value_slots), spreads(tiles * spread_slots);
  // Sums over columns need a row of accumulators; a few blocks of rows of tiles have one each.
  const bool by_column = reduction == Spread::column;
  const int64_t groups = by_column ? tiling.column_groups() : 1, rows = tiles / groups;
  const int64_t blocks = by_column ? max_of(1, min_of(16, min_of(rows, e.batch * e.outer / 8))) : tiles;
  Doubles columns(by_column ? blocks * e.inner : 0);

  const auto body = [&](int64_t first_block, int64_t last_block) {
    alignas(kLine) T recon_buffer[kTile], x_buffer[kTile], spread_buffer[kTile], weight_buffer[kTile];
    alignas(kLine) T value_buffer[kTile], d_recon_buffer[kTile], d_x_buffer[kTile], d_spread_buffer[kTile];
    alignas(kLine) T column_buffer[kTile];
    for (int64_t u = first_block * groups; u < last_block * groups; ++u) {
      // A group of columns of a block of rows; without sums over columns, one tile.
      const int64_t block = u / groups, group = u % groups;
      const int64_t first_row = rows * block / blocks, last_row = rows * (block + 1) / blocks;
      int64_t rows_in_buffer = 0;
      for (int64_t row = first_row; row < last_row; ++row) {
        const int64_t k = row * groups + group;
        const Tile t = tiling[k];
        NllArrays<T> a;
        a.recon_x = read(task.recon_x, t, recon_buffer);
        a.x = read(task.x, t, x_buffer);
        a.eps = static_cast<T>(task.eps);
        const bool one_spread = task.spread.is_uniform() || (t.nb == 1 && t.no == 1 && task.spread.stride[2] == 0);
        if (one_spread) {
          spread_buffer[0] = static_cast<T>(get(task.spread, task.spread.data ? offset_of(task.spread, t, 0, 0) : 0));
          a.spread = spread_buffer;
        } else {
          a.spread = read(task.spread, t, spread_buffer);
        }
        const bool one_weight =
            task.weight.is_uniform() || (t.nb == 1 && task.weight.stride[1] == 0 && task.weight.stride[2] == 0);
        a.uniform_weight =
            one_weight && task.weight ? static_cast<T>(get(task.weight, t.b0 * task.weight.stride[0])) : T(1);
        a.weight = one_weight ? nullptr : read(task.weight, t, weight_buffer);

        const bool one_sum = value_slots == 1 || (value_slots && t.nb == 1);
        a.value = task.value                ? place(task.value, t, value_buffer, false)
                  : value_slots && !one_sum ? value_buffer
                                            : nullptr;
        a.grad_recon_x = task.grad_recon_x ? place(task.grad_recon_x, t, d_recon_buffer, stream) : nullptr;
        a.grad_x = task.grad_x ? place(task.grad_x, t, d_x_buffer, stream) : nullptr;
        a.grad_spread = reduction == Spread::none      ? nullptr
                        : reduction == Spread::element ? place(task.grad_spread, t, d_spread_buffer, stream)
                                                       : d_spread_buffer;
        const int64_t n = t.count();
        const double total = nll_arrays_for<T>(a, n, task.is_variance, a.weight != nullptr, one_spread, one_sum);

        if (task.value) write(task.value, t, a.value, value_buffer, false);
        if (task.grad_recon_x) write(task.grad_recon_x, t, a.grad_recon_x, d_recon_buffer, stream);
        if (task.grad_x) write(task.grad_x, t, a.grad_x, d_x_buffer, stream);
        if (one_sum) {
          values[k * value_slots] = total;
        } else if (value_slots) {
          for (int64_t b = 0; b < t.nb; ++b) values[k * value_slots + b] = sum(a.value + b * e.sample(), e.sample());
        }
        switch (reduction) {
          case Spread::none:
            break;
          case Spread::element:
            write(task.grad_spread, t, a.grad_spread, d_spread_buffer, stream);
            break;
          case Spread::tile:
            spreads[k] = sum(a.grad_spread, n);
            break;
          case Spread::sample:
            for (int64_t b = 0; b < t.nb; ++b)
              spreads[k * spread_slots + b] = sum(a.grad_spread + b * t.no * t.ni, t.no * t.ni);
            break;
          case Spread::row:
            for (int64_t r = 0; r < t.nb * t.no; ++r)
              spreads[k * spread_slots + r] = sum(a.grad_spread + r * t.ni, t.ni);
            break;
          case Spread::column:
            for (int64_t r = 0; r < t.nb * t.no; ++r, ++rows_in_buffer) {
              const T* from = a.grad_spread + r * t.ni;
              if (rows_in_buffer == 0)
                for (int64_t i = 0; i < t.ni; ++i) column_buffer[i] = from[i];
              else
                for (int64_t i = 0; i < t.ni; ++i) column_buffer[i] += from[i];
            }
            if (rows_in_buffer >= kRowsInFloat || row + 1 == last_row) {
              double* into = columns.at(block * e.inner + t.i0);
              for (int64_t i = 0; i < t.ni; ++i) into[i] += static_cast<double>(column_buffer[i]);
              rows_in_buffer = 0;
            }
            break;
        }
      }
    }
  };
  run({blocks, body}, e.count());

  if (totals) {
    if (by_sample)
      for (int64_t b = 0; b < e.batch; ++b) totals[b] = 0;
    else
      *totals = 0;
    for (int64_t k = 0; k < tiles; ++k) {
      const Tile t = tiling[k];
      if (by_sample)
        for (int64_t b = 0; b < t.nb; ++b) totals[t.b0 + b] += values[k * value_slots + b];
      else
        *totals += values[k];
    }
  }
  const Operand& g = task.grad_spread;
  if (by_column) {
    double* const total = columns.at(0);
    for (int64_t block = 1; block < blocks; ++block) {
      const double* const more = columns.at(block * e.inner);
      for (int64_t i = 0; i < e.inner; ++i) total[i] += more[i];
    }
    with_type(g.dtype, [&](auto* type) { narrow_run(total, static_cast<decltype(type)>(g.data), e.inner); });
  } else if (spread_slots) {
    const int64_t size = (e.batch - 1) * g.stride[0] + (e.outer - 1) * g.stride[1] + 1;
    Doubles sums(size);
    for (int64_t k = 0; k < tiles; ++k) {
      const Tile t = tiling[k];
      const int64_t rows = reduction == Spread::row ? t.no : 1;
      const int64_t samples = reduction == Spread::tile ? 1 : t.nb;
      for (int64_t b = 0; b < samples; ++b)
        for (int64_t o = 0; o < rows; ++o)
          sums[(t.b0 + b) * g.stride[0] + (t.o0 + o) * g.stride[1]] += spreads[k * spread_slots + b * rows + o];
    }
    for (int64_t b = 0; b < (g.stride[0] ? e.batch : 1); ++b)
      for (int64_t o = 0; o < (g.stride[1] ? e.outer : 1); ++o) {
        const int64_t at = b * g.stride[0] + o * g.stride[1];
        put(g, at, sums[at]);
      }
  }
}

bool any_double(const Operand* const* operands, int count) {
  for (int i = 0; i < count; ++i)
    if (operands[i]->data && operands[i]->dtype == DType::f64) return true;
  return false;
}

void dispatch_nll(const NllTask& task, double* totals, bool by_sample, const Run& run) {
  const Operand* const operands[] = {&task.recon_x, &task.x, &task.spread};
  if (any_double(operands, 3))
    run_nll<double>(task, totals, by_sample, run);
  else
    run_nll<float>(task, totals, by_sample, run);
}

// --- latent ---------------------------------------------------------------------------------------------------------

template <class T>
struct LatentArrays {
  const T *mu, *logvar, *noise, *grad_z, *grad_kl;
  T *z, *kl, *grad_mu, *grad_logvar;
  T uniform_grad_kl;
};

// sigma = e^(logvar/2) and e^logvar - 1 from one exponential: expm1(l) = t^2 + 2t with t = expm1(l/2). What overflows
// in t^2 does so in e^logvar.
FUSEDVAE_INLINE void spread_of(vf logvar, vf* sigma, vf* expm1_logvar) {
  const ExpPair half = exp_pair(0.5f * logvar);
  *sigma = half.exp;
  *expm1_logvar = half.expm1 * half.expm1 + (half.expm1 + half.expm1);
}
FUSEDVAE_INLINE void spread_of(double logvar, double* sigma, double* expm1_logvar) {
  *sigma = std::exp(0.5 * logvar);
  *expm1_logvar = std::expm1(logvar);
}

// Returns the sum of the KL.
template <class T>
double latent_arrays(const LatentArrays<T> a, int64_t count) {  // by value: no store can change it
  using P = typename Pack<T>::type;
  P total = {};
  struct Fetched {
    P mu, logvar, noise, grad_z, grad_kl;
  };
  const auto fetch = [=](int64_t i, auto load) FUSEDVAE_LAMBDA -> Fetched {
    return {load(a.mu + i), load(a.logvar + i), a.noise ? load(a.noise + i) : P{}, a.grad_z ? load(a.grad_z + i) : P{},
            a.grad_kl ? load(a.grad_kl + i) : P{}};
  };
  const auto apply = [=, &total](int64_t i, const Fetched& in, auto store, auto keep) FUSEDVAE_LAMBDA {
    P sigma, expm1_logvar;
    spread_of(in.logvar, &sigma, &expm1_logvar);
    const KlStandardNormal<P> kl = kl_standard_normal(in.mu, in.logvar, expm1_logvar);
    total += keep(kl.value);
    if (a.kl) store(a.kl + i, kl.value);
    const Sample<P> z = sample(in.mu, sigma, in.noise);
    if (a.z) store(a.z + i, z.value);
    if (a.grad_mu || a.grad_logvar) {
      P d_mu = in.grad_z, d_logvar = in.grad_z * z.d_logvar;
      if (!a.grad_z) d_mu = d_logvar = P{};
      if (a.grad_kl) {
        d_mu += in.grad_kl * kl.d_mu;
        d_logvar += in.grad_kl * kl.d_logvar;
      } else if (!a.grad_z) {
        d_mu = a.uniform_grad_kl * kl.d_mu;
        d_logvar = a.uniform_grad_kl * kl.d_logvar;
      }
      if (a.grad_mu) store(a.grad_mu + i, d_mu);
      if (a.grad_logvar) store(a.grad_logvar + i, d_logvar);
    }
  };
  for_packs<T>(count, fetch, apply);
  return static_cast<double>(sum_lanes(total));
}

template <class T>
void run_latent(const LatentTask& task, double* totals, bool by_sample, const Run& run) {
  const Extent& e = task.extent;
  const Tiling tiling(e);
  const int64_t tiles = tiling.count();
  const int64_t slots = totals ? (by_sample ? tiling.max_samples() : 1) : 0;
  Doubles values(tiles * slots);
  const uint64_t seed = task.seed ? static_cast<uint64_t>(*task.seed) : 0;
  for (const Operand* op : {&task.z, &task.grad_mu, &task.grad_logvar}) prefer_huge_pages(*op, e);

  const auto body = [&](int64_t first, int64_t last) {
    alignas(kLine) T mu_buffer[kTile], logvar_buffer[kTile], noise_buffer[kTile], d_z_buffer[kTile], d_kl_buffer[kTile];
    alignas(kLine) T z_buffer[kTile], kl_buffer[kTile], d_mu_buffer[kTile], d_logvar_buffer[kTile];
    alignas(kLine) float scratch[kTile + kNoisePad], made[kTile + kNoisePad];
    for (int64_t k = first; k < last; ++k) {
      const Tile t = tiling[k];
      const int64_t n = t.count();
      LatentArrays<T> a{};
      a.mu = read(task.mu, t, mu_buffer);
      a.logvar = read(task.logvar, t, logvar_buffer);
      if (task.seed) {
        const float* run = read_noise(task.index, t, seed, scratch, made);
        if constexpr (sizeof(T) == sizeof(float)) {
          a.noise = run;
        } else {
          widen_run(run, noise_buffer, n);
          a.noise = noise_buffer;
        }
      } else if (task.noise) {
        a.noise = read(task.noise, t, noise_buffer);
      }
      if (task.grad_z) a.grad_z = read(task.grad_z, t, d_z_buffer);
      if (task.grad_kl && (task.grad_z || !task.grad_kl.is_uniform()))
        a.grad_kl = read(task.grad_kl, t, d_kl_buffer);
      else if (task.grad_kl)
        a.uniform_grad_kl = static_cast<T>(get(task.grad_kl, 0));
      if (task.z) a.z = place(task.z, t, z_buffer, false);
      const bool one_sum = slots == 1 || t.nb == 1;
      if (slots && !one_sum) a.kl = kl_buffer;
      if (task.grad_mu) a.grad_mu = place(task.grad_mu, t, d_mu_buffer, false);
      if (task.grad_logvar) a.grad_logvar = place(task.grad_logvar, t, d_logvar_buffer, false);
      const double total = latent_arrays(a, n);
      if (task.z) write(task.z, t, a.z, z_buffer, false);
      if (task.grad_mu) write(task.grad_mu, t, a.grad_mu, d_mu_buffer, false);
      if (task.grad_logvar) write(task.grad_logvar, t, a.grad_logvar, d_logvar_buffer, false);
      if (slots && one_sum) {
        values[k * slots] = total;
      } else if (slots) {
        for (int64_t b = 0; b < t.nb; ++b) values[k * slots + b] = sum(kl_buffer + b * e.sample(), e.sample());
      }
    }
  };
  run({tiles, body}, e.count() * (task.seed ? 4 : 1));

  if (!totals) return;
  for (int64_t b = 0; b < (by_sample ? e.batch : 1); ++b) totals[b] = 0;
  for (int64_t k = 0; k < tiles; ++k) {
    const Tile t = tiling[k];
    for (int64_t b = 0; b < (by_sample ? t.nb : 1); ++b) totals[(by_sample ? t.b0 : 0) + b] += values[k * slots + b];
  }
}

void dispatch_latent(const LatentTask& task, double* totals, bool by_sample, const Run& run) {
  const Operand* const operands[] = {&task.mu, &task.logvar, &task.noise};
  if (any_double(operands, 3))
    run_latent<double>(task, totals, by_sample, run);
  else
    run_latent<float>(task, totals, by_sample, run);
}

// --- the table's entries --------------------------------------------------------------------------------------------

void normal(const NormalTask& task, int threads) {
  const Extent flat{1, 1, task.count};
  const Tiling tiling(flat);
  const uint64_t seed = static_cast<uint64_t>(*task.seed);
  const auto body = [&](int64_t first, int64_t last) {
    alignas(kLine) float buffer[kTile + kNoisePad];
    for (int64_t k = first; k < last; ++k) {
      const Tile t = tiling[k];
      const float* run = noise_run(t.i0, t.ni, seed, buffer);
      with_type(task.out.dtype,
                [&](auto* type) { narrow_run(run, static_cast<decltype(type)>(task.out.data) + t.i0, t.ni); });
    }
  };
  on_threads(threads)({tiling.count(), body}, 4 * task.count);
}

void latent(const LatentTask& task, int threads) {
  if (!task.kl) return dispatch_latent(task, nullptr, false, on_threads(threads));
  Doubles totals(task.extent.batch);
  dispatch_latent(task, totals.at(0), true, on_threads(threads));
  for (int64_t b = 0; b < task.extent.batch; ++b) put(task.kl, b * task.kl.stride[0], totals[b]);
}

void nll(const NllTask& task, int threads) {
  dispatch_nll(task, nullptr, false, on_threads(threads));
}

void elbo(const ElboTask& task, int threads) {
  if (task.values == Values::element) {
    dispatch_nll(task.nll, nullptr, false, on_threads(threads));
    return;
  }
  const bool by_sample = task.values == Values::sample;
  const double beta = get(task.beta, 0);
  const int64_t batch = task.has_nll ? task.nll.extent.batch : task.kl.extent.batch;
  const int64_t count = by_sample ? batch : 1;
  Doubles nlls(count), kls(count);
  NllTask nll = task.nll;
  nll.weight.given = true;
  nll.weight.value = task.scale;
  LatentTask kl = task.kl;
  kl.grad_kl.given = true;
  kl.grad_kl.value = task.scale * beta;
  if (task.has_nll && task.has_kl) {
    // Both in one go of the threads: the KL alone is seldom worth waking them for.
    dispatch_nll(nll, nlls.at(0), by_sample, [&](const Loop& nll_loop, int64_t nll_elements) {
      dispatch_latent(kl, kls.at(0), by_sample, [&](const Loop& kl_loop, int64_t kl_elements) {
        parallel_for(threads_for(nll_elements + kl_elements, threads), nll_loop, &kl_loop);
      });
    });
  } else if (task.has_nll) {
    dispatch_nll(nll, nlls.at(0), by_sample, on_threads(threads));
  } else if (task.has_kl) {
    dispatch_latent(kl, kls.at(0), by_sample, on_threads(threads));
  }
  if (task.has_nll) {
    const double elements = static_cast<double>(by_sample ? nll.extent.sample() : nll.extent.count());
    for (int64_t b = 0; b < count; ++b) nlls[b] += task.scale * task.constant * elements;
  }
  if (task.has_kl) {
    for (int64_t b = 0; b < count; ++b) kls[b] *= task.scale;
  } else if (task.kl_in) {
    for (int64_t b = 0; b < task.kl_in_count; ++b) kls[by_sample ? b : 0] += get(task.kl_in, b * task.kl_in.stride[0]);
    if (!by_sample) kls[0] *= task.scale;
  }
  for (int64_t b = 0; b < count; ++b) {
    const bool has_kl = task.has_kl || task.kl_in;
    // Without a likelihood the objective is the divergence alone.
    put(task.loss, b * task.loss.stride[0], has_kl ? nlls[b] + beta * kls[b] : nlls[b]);
    if (task.nll_out) put(task.nll_out, b * task.nll_out.stride[0], nlls[b]);
    if (task.kl_out) put(task.kl_out, b * task.kl_out.stride[0], kls[b]);
  }
}

template <class T, class S>
void scale_run(S* data, int64_t count, T factor, int threads) {
  const auto body = [&](int64_t first, int64_t last) {
    for (int64_t i = first * kTile; i < min_of(count, last * kTile); ++i)
      narrow(static_cast<T>(widen(data[i])) * factor, data + i);
  };
  on_threads(threads)({ceil_div(count, kTile), body}, count);
}

void scale(const ScaleTask& task, int threads) {
  const double factor = get(task.factor, 0);
  if (factor == 1.0) return;
  for (int k = 0; k < ScaleTask::kMost; ++k) {
    const Operand& tensor = task.tensors[k];
    if (!tensor) continue;
    with_type(tensor.dtype, [&](auto* type) {
      auto* data = static_cast<decltype(type)>(tensor.data);
      if (tensor.dtype == DType::f64)
        scale_run<double>(data, task.counts[k], factor, threads);
      else
        scale_run<float>(data, task.counts[k], static_cast<float>(factor), threads);
    });
  }
}

}  // namespace

#define FUSEDVAE_NAME_(isa) #isa
#define FUSEDVAE_NAME(isa) FUSEDVAE_NAME_(isa)
extern const Kernels table;
const Kernels table = {FUSEDVAE_NAME(FUSEDVAE_ISA), normal, latent, nll, elbo, scale};

}  // namespace FUSEDVAE_NAMESPACE
}  // namespace fusedvae
