// Runs every CPU kernel on operands of every kind, for the sanitizers to watch: each array is a heap block that ends
// with its last element, so that reading or writing past it is seen. What the kernels make of them is compared with
// the formulas in plain double arithmetic, and memory between the elements of an output must stay as it was.
//
//     driver CASES      FUSEDVAE_CPU_ISA chooses the kernels; prints the instruction set that it got

#include <sanitizer/common_interface_defs.h>

#include <algorithm>
#include <cinttypes>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "cpu/kernels.h"

using namespace fusedvae;

// --- threads: an OpenMP runtime of a few lines, which the thread sanitizer understands, unlike libgomp --------------

static thread_local int thread_number = 0, thread_count = 1;
static int most_threads = 0;

extern "C" void GOMP_parallel(void (*body)(void*), void* data, unsigned count, unsigned) {
  most_threads = std::max(most_threads, static_cast<int>(count));
  std::vector<std::thread> team;
  for (unsigned i = 0; i < count; ++i)
    team.emplace_back([=] {
      thread_number = static_cast<int>(i);
      thread_count = static_cast<int>(count);
      body(data);
    });
  for (std::thread& thread : team) thread.join();
}
extern "C" int omp_get_thread_num() {
  return thread_number;
}
extern "C" int omp_get_num_threads() {
  return thread_count;
}
extern "C" int omp_in_parallel() {
  return thread_count > 1;
}

namespace {

// --- chance ---------------------------------------------------------------------------------------------------------

std::mt19937_64 engine;

int64_t below(int64_t n) {
  return static_cast<int64_t>(engine() % static_cast<uint64_t>(n));
}
bool coin() {
  return below(2) != 0;
}
double uniform(double low, double high) {
  return low + (high - low) * static_cast<double>(engine() >> 11) * 0x1p-53;
}

template <class T>
T one_of(const std::vector<T>& choices) {
  return choices[static_cast<size_t>(below(static_cast<int64_t>(choices.size())))];
}

// --- arrays ---------------------------------------------------------------------------------------------------------

double widen16(uint16_t bits, int exponent_bits) {
  const int mantissa_bits = 15 - exponent_bits, bias = (1 << (exponent_bits - 1)) - 1;
  const int exponent = (bits & 0x7FFF) >> mantissa_bits, mantissa = bits & ((1 << mantissa_bits) - 1);
  const double magnitude = exponent ? std::ldexp((1 << mantissa_bits) + mantissa, exponent - bias - mantissa_bits)
                                    : std::ldexp(mantissa, 1 - bias - mantissa_bits);
  return bits & 0x8000 ? -magnitude : magnitude;
}

// Rounds towards zero, so that everything it makes is exact in the format; test data need no more.
uint16_t narrow16(double value, int exponent_bits) {
  uint16_t best = 0;
  for (uint16_t bit = 0x4000; bit; bit = static_cast<uint16_t>(bit >> 1))
    if (widen16(best | bit, exponent_bits) <= std::fabs(value)) best = static_cast<uint16_t>(best | bit);
  return static_cast<uint16_t>(best | (value < 0 ? 0x8000 : 0));
}

// Relative precision, a little generous.
double precision_of(DType dtype) {
  switch (dtype) {
    case DType::f64:
      return 1e-14;
    case DType::f32:
      return 1.5e-7;
    case DType::f16:
      return 1.1e-3;
    default:
      return 8.5e-3;
  }
}

struct Strides {
  int64_t batch, outer, inner;
};

constexpr unsigned char kUntouched = 0xA5;

// An operand with memory of its own.
class Array {
 public:
  Array(const Extent& e, DType dtype, Strides s) : extent_(e), dtype_(dtype), strides_(s), skip_(below(3)) {
    // Along a stride of 0 there is one element, whatever the extent.
    if (!s.batch) extent_.batch = 1;
    if (!s.outer) extent_.outer = 1;
    if (!s.inner) extent_.inner = 1;
    size_ = extent_.count() ? offset(extent_.batch - 1, extent_.outer - 1, extent_.inner - 1) + 1 : 0;
    bytes_ = static_cast<size_t>((skip_ + size_) * size_of(dtype));
    block_.reset(static_cast<unsigned char*>(std::malloc(bytes_ ? bytes_ : 1)));
    std::memset(block_.get(), kUntouched, bytes_);
  }

  Operand operand() const {
    Operand op;
    op.given = true;
    op.data = block_.get() + skip_ * size_of(dtype_);
    op.dtype = dtype_;
    op.stride[0] = strides_.batch;
    op.stride[1] = strides_.outer;
    op.stride[2] = strides_.inner;
    return op;
  }
  DType dtype() const { return dtype_; }
  int64_t offset(int64_t b, int64_t o, int64_t i) const {
    return b * strides_.batch + o * strides_.outer + i * strides_.inner;
  }
  int64_t size() const { return size_; }
  const Extent& extent() const { return extent_; }

  double operator[](int64_t offset) const {
    const unsigned char* at = block_.get() + (skip_ + offset) * size_of(dtype_);
    switch (dtype_) {
      case DType::f32:
        return read<float>(at);
      case DType::f64:
        return read<double>(at);
      case DType::bf16:
        return widen16(read<uint16_t>(at), 8);
      case DType::f16:
        return widen16(read<uint16_t>(at), 5);
      default:
        return *at;
    }
  }
  void set(int64_t offset, double value) {
    unsigned char* at = block_.get() + (skip_ + offset) * size_of(dtype_);
    switch (dtype_) {
      case DType::f32:
        return put(at, static_cast<float>(value));
      case DType::f64:
        return put(at, value);
      case DType::bf16:
        return put(at, narrow16(value, 8));
      case DType::f16:
        return put(at, narrow16(value, 5));
      default:
        return put(at, static_cast<uint8_t>(std::fabs(value)));
    }
  }
  void fill(double low, double high) {
    for (int64_t k = 0; k < size_; ++k) set(k, uniform(low, high));
  }
  // Whether everything but the elements is as it was.
  bool gaps_untouched() const {
    std::vector<bool> element(bytes_);
    for (int64_t b = 0; b < extent_.batch; ++b)
      for (int64_t o = 0; o < extent_.outer; ++o)
        for (int64_t i = 0; i < extent_.inner; ++i) {
          const int64_t at = (skip_ + offset(b, o, i)) * size_of(dtype_);
          for (int64_t k = 0; k < size_of(dtype_); ++k) element[static_cast<size_t>(at + k)] = true;
        }
    for (size_t k = 0; k < bytes_; ++k)
      if (!element[k] && block_.get()[k] != kUntouched) return false;
    return true;
  }

 private:
  template <class T>
  static T read(const unsigned char* at) {
    T value;
    std::memcpy(&value, at, sizeof value);
    return value;
  }
  template <class T>
  static void put(unsigned char* at, T value) {
    std::memcpy(at, &value, sizeof value);
  }
  struct Free {
    void operator()(unsigned char* block) const { std::free(block); }
  };

  Extent extent_;
  DType dtype_;
  Strides strides_;
  int64_t skip_, size_;  // skip: the data start at any multiple of an element's size, as tensors' do
  size_t bytes_;
  std::unique_ptr<unsigned char, Free> block_;
};

// An operand that may be an array, a number or absent; and its value at an element.
struct Input {
  std::unique_ptr<Array> array;
  double number = 0;
  bool given = false;

  double at(int64_t b, int64_t o, int64_t i) const { return array ? (*array)[array->offset(b, o, i)] : number; }
  bool is_double() const { return array && array->dtype() == DType::f64; }
  Operand operand() const {
    if (array) return array->operand();
    Operand op;
    op.given = given;
    op.value = number;
    return op;
  }
};
using Output = std::unique_ptr<Array>;

const std::vector<DType> kFloats = {DType::f32, DType::f32, DType::f32, DType::bf16, DType::f16, DType::f64};

DType any_float(bool doubles) {
  const DType dtype = one_of(kFloats);
  return dtype == DType::f64 && !doubles ? DType::f32 : dtype;
}

int64_t at_least_one(int64_t n) {
  return std::max<int64_t>(n, 1);
}

// As tensors have them: no stride is 0 because the extent is.
Strides full(const Extent& e) {
  const int64_t inner = at_least_one(e.inner), sample = at_least_one(e.outer) * inner;
  switch (below(3)) {
    case 0:
      return {sample, inner, 1};
    case 1:
      return {2 * sample, inner, 1};  // half of a packed tensor
    default:
      return {at_least_one(e.outer) * (inner + 3) + 1, inner + 3, 1};  // a slice
  }
}
// What a gradient may be summed over: along inner, or along batch and outer both.
Strides summable(const Extent& e) {
  const std::vector<Strides> choices = {{0, 0, 0}, {1, 0, 0}, {at_least_one(e.outer), 1, 0}, {0, 1, 0}, {0, 0, 1}};
  return one_of(choices);
}
Strides any_strides(const Extent& e) {
  const std::vector<Strides> broadcast = {
      {0, at_least_one(e.inner), 1}, {at_least_one(e.inner), 0, 1}, summable(e), summable(e)};
  return coin() ? full(e) : one_of(broadcast);
}

Input input(const Extent& e, DType dtype, Strides strides, double low, double high) {
  Input made;
  made.array = std::make_unique<Array>(e, dtype, strides);
  made.array->fill(low, high);
  made.given = true;
  return made;
}
Input number(double value) {
  Input made;
  made.number = value;
  made.given = true;
  return made;
}
Output output(const Extent& e, bool wanted) {
  return wanted ? std::make_unique<Array>(e, any_float(true), full(e)) : nullptr;
}
Operand operand(const Output& array) {
  return array ? array->operand() : Operand{};
}

// --- comparisons ----------------------------------------------------------------------------------------------------

const char* kernel = "";
int64_t case_number = 0, comparisons = 0;
Extent extent;

void fail(const char* what) {
  std::fprintf(stderr, "case %" PRId64 " (%s, extent %" PRId64 " x %" PRId64 " x %" PRId64 "): %s\n", case_number,
               kernel, extent.batch, extent.outer, extent.inner, what);
  std::_Exit(1);
}

// `size` is that of the terms an expected value was added up from; `working`, the precision they were added in.
void compare(const char* name, const Array& actual, int64_t offset, double expected, double size, double working) {
  ++comparisons;
  const double found = actual[offset];
  const double tolerance = (working + precision_of(actual.dtype())) * size + 1e-7;
  if (std::fabs(found - expected) <= tolerance) return;
  char text[200];
  std::snprintf(text, sizeof text, "%s[%" PRId64 "]: expected %.9g, got %.9g", name, offset, expected, found);
  fail(text);
}

template <class Visit>
void for_elements(const Extent& e, const Visit& visit) {
  for (int64_t b = 0; b < e.batch; ++b)
    for (int64_t o = 0; o < e.outer; ++o)
      for (int64_t i = 0; i < e.inner; ++i) visit(b, o, i);
}

double working_precision(bool doubles) {
  return doubles ? 1e-12 : 1e-5;
}

Extent any_extent() {
  static const std::vector<Extent> choices = {
      {1, 1, 1},    {3, 1, 5},     {2, 3, 7},    {5, 1, 1},    {4, 6, 1},   {1, 1, 1023}, {1, 1, 1025}, {3, 1, 2049},
      {2, 37, 31},  {7, 129, 3},   {1, 5, 1500}, {4, 1, 64},   {33, 1, 17}, {0, 1, 5},    {2, 0, 3},    {2, 3, 0},
      {3, 1, 7001}, {2, 130, 129}, {40, 3, 300}, {1100, 2, 1}, {9, 1, 784}, {64, 1, 32},  {1, 1100, 2}};
  return one_of(choices);
}

// --- the likelihood -------------------------------------------------------------------------------------------------

struct Nll {
  Extent e = extent;
  Input recon_x, x, spread;
  Output value, grad_recon_x, grad_x, grad_spread;
  bool is_variance = coin();
  double eps = 1e-6;

  explicit Nll(bool gradients = true) {
    const bool doubles = below(4) == 0;
    recon_x = input(e, any_float(doubles), full(e), -2, 2);
    x = coin() ? input(e, any_float(doubles), any_strides(e), -2, 2) : input(e, DType::u8, full(e), 0, 3);
    const double low = is_variance ? 0.05 : -1.5;
    const Strides strides = coin() ? any_strides(e) : summable(e);
    spread = below(5) ? input(e, any_float(doubles), strides, low, 1.5) : number(uniform(low, 1.5));
    if (!gradients) return;
    grad_recon_x = output(e, below(4));
    grad_x = output(e, coin());
    if (below(4)) grad_spread = std::make_unique<Array>(e, any_float(true), coin() ? full(e) : summable(e));
  }
  bool doubles() const { return recon_x.is_double() || x.is_double() || spread.is_double(); }

  NllTask task() const {
    NllTask task;
    task.extent = e;
    task.recon_x = recon_x.operand();
    task.x = x.operand();
    task.spread = spread.operand();
    task.value = operand(value);
    task.grad_recon_x = operand(grad_recon_x);
    task.grad_x = operand(grad_x);
    task.grad_spread = operand(grad_spread);
    task.is_variance = is_variance;
    task.eps = eps;
    return task;
  }

  // Compares the gradients of sum(weight * nll), and adds each sample's value to `totals`.
  template <class Weight>
  void check(const Weight& weight, std::vector<double>* totals) const {
    const double working = working_precision(doubles());
    std::vector<double> sums(grad_spread ? static_cast<size_t>(grad_spread->size()) : 0), sizes(sums);
    for_elements(e, [&](int64_t b, int64_t o, int64_t i) {
      const double s = spread.at(b, o, i), w = weight(b, o, i);
      const double logvar = is_variance ? std::log(std::max(s, eps)) : s, precision = std::exp(-logvar);
      const double error = recon_x.at(b, o, i) - x.at(b, o, i), square = error * error * precision;
      if (totals) (*totals)[static_cast<size_t>(b)] += (logvar + square) / 2;
      const double size = std::fabs(w) * (1 + precision) * (1 + std::fabs(error) + square);
      if (value) compare("value", *value, value->offset(b, o, i), (logvar + square) / 2, 2 + square, working);
      const double d_recon = w * error * precision;
      if (grad_recon_x) compare("d recon", *grad_recon_x, grad_recon_x->offset(b, o, i), d_recon, size, working);
      if (grad_x) compare("d x", *grad_x, grad_x->offset(b, o, i), -d_recon, size, working);
      if (grad_spread) {
        const size_t at = static_cast<size_t>(grad_spread->offset(b, o, i));
        sums[at] += w * (1 - square) / 2 * (is_variance ? precision : 1);
        sizes[at] += size;
      }
    });
    if (grad_spread)
      for_elements(grad_spread->extent(), [&](int64_t b, int64_t o, int64_t i) {
        const size_t at = static_cast<size_t>(grad_spread->offset(b, o, i));
        compare("d spread", *grad_spread, grad_spread->offset(b, o, i), sums[at], sizes[at], working);
      });
    for (const Output* array : {&value, &grad_recon_x, &grad_x, &grad_spread})
      if (*array && !(*array)->gaps_untouched()) fail("wrote between the elements of an output");
  }
};

void test_nll(int threads) {
  Nll nll;
  NllTask task = nll.task();
  Input weight = below(4) ? input(nll.e, any_float(false), any_strides(nll.e), -1, 1) : number(uniform(-1, 1));
  task.weight = weight.operand();
  kernels().nll(task, threads);
  nll.check([&](int64_t b, int64_t o, int64_t i) { return weight.at(b, o, i); }, nullptr);
}

// --- the latent -----------------------------------------------------------------------------------------------------

// Philox4x32-10 and Box-Muller, an element at a time.
double noise_at(uint64_t seed, int64_t index) {
  const uint64_t counter = static_cast<uint64_t>(index) / 4;
  uint32_t c[4] = {static_cast<uint32_t>(counter), static_cast<uint32_t>(counter >> 32), 0, 0};
  uint32_t key[2] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53} * c[0], p1 = uint64_t{0xCD9E8D57} * c[2];
    const uint32_t next[4] = {static_cast<uint32_t>(p1 >> 32) ^ c[1] ^ key[0], static_cast<uint32_t>(p1),
                              static_cast<uint32_t>(p0 >> 32) ^ c[3] ^ key[1], static_cast<uint32_t>(p0)};
    std::memcpy(c, next, sizeof c);
    key[0] += 0x9E3779B9;
    key[1] += 0xBB67AE85;
  }
  const auto unit = [](uint32_t word) {
    return static_cast<double>(static_cast<float>(word >> 1) * 0x1p-31f + 0x1p-32f);
  };
  const int pair = static_cast<int>(index % 4) / 2 * 2;
  const double radius = std::sqrt(-2 * std::log(unit(c[pair]))), angle = 2 * 3.14159265358979324 * unit(c[pair + 1]);
  return radius * (index % 2 ? std::sin(angle) : std::cos(angle));
}

struct Latent {
  Extent e = extent;
  Input mu, logvar;
  Output grad_mu, grad_logvar;

  Latent() {
    const bool doubles = below(4) == 0;
    mu = input(e, any_float(doubles), full(e), -2, 2);
    logvar = input(e, any_float(doubles), full(e), -2, 2);
    grad_mu = output(e, below(4));
    grad_logvar = output(e, below(4));
  }

  LatentTask task() const {
    LatentTask task;
    task.extent = e;
    task.mu = mu.operand();
    task.logvar = logvar.operand();
    task.grad_mu = operand(grad_mu);
    task.grad_logvar = operand(grad_logvar);
    return task;
  }

  // Compares z and the gradients of sum(grad_z * z) + sum(grad_kl * kl), and adds each sample's KL to `totals`.
  template <class Noise, class GradZ, class GradKl>
  void check(const Output& z, const Noise& noise, const GradZ& grad_z, const GradKl& grad_kl, bool doubles,
             std::vector<double>* totals) const {
    for_elements(e, [&](int64_t b, int64_t o, int64_t i) {
      const double m = mu.at(b, o, i), l = logvar.at(b, o, i), n = noise(b, o, i), gz = grad_z(b, o, i),
                   gk = grad_kl(b);
      const double spread = std::exp(l / 2) * n, working = working_precision(doubles);
      if (totals) (*totals)[static_cast<size_t>(b)] += (m * m + std::expm1(l) - l) / 2;
      // The noise itself is single precision whatever the rest is.
      const double noise_error = 1e-5 * std::exp(l / 2);
      if (z)
        compare("z", *z, z->offset(b, o, i), m + spread, std::fabs(m) + std::fabs(spread) + 1, working + noise_error);
      const double size = 1 + std::fabs(gz) * (1 + std::fabs(spread)) + std::fabs(gk) * (std::fabs(m) + std::exp(l));
      const double error = working + std::fabs(gz) * noise_error;
      if (grad_mu) compare("d mu", *grad_mu, grad_mu->offset(b, o, i), gz + gk * m, size, error);
      if (grad_logvar)
        compare("d logvar", *grad_logvar, grad_logvar->offset(b, o, i), gz * spread / 2 + gk * std::expm1(l) / 2, size,
                error);
    });
    for (const Output* array : {&z, &grad_mu, &grad_logvar})
      if (*array && !(*array)->gaps_untouched()) fail("wrote between the elements of an output");
  }
};

void test_latent(int threads) {
  Latent latent;
  const Extent& e = latent.e;
  LatentTask task = latent.task();
  // Where an element is in logical order: row-major, the channels_last of that, or anything.
  const std::vector<IndexStrides> orders = {
      {e.sample(), e.inner, 1}, {e.sample(), e.inner, 1}, {e.sample(), 1, e.outer}, {1, 7 * e.batch, e.batch}};
  task.index = one_of(orders);

  const auto seed = std::make_unique<int64_t>(static_cast<int64_t>(engine()));
  const bool noisy = below(4), seeded = noisy && below(4);
  Input noise, grad_z, grad_kl;
  if (seeded) task.seed = seed.get();
  if (noisy && !seeded) noise = input(e, any_float(false), any_strides(e), -3, 3);
  if (noisy && coin()) grad_z = input(e, any_float(false), any_strides(e), -1, 1);
  const Extent samples{e.batch, 1, 1};
  if (coin()) grad_kl = input(samples, any_float(false), {below(3), 0, 0}, -1, 1);
  const Output z = output(e, noisy && coin());
  const Output kl = coin() ? std::make_unique<Array>(samples, any_float(true), Strides{1 + below(2), 0, 0}) : nullptr;
  task.noise = noise.operand();
  task.grad_z = grad_z.operand();
  task.grad_kl = grad_kl.operand();
  task.z = operand(z);
  task.kl = operand(kl);
  kernels().latent(task, threads);

  std::vector<double> totals(static_cast<size_t>(e.batch));
  const auto noise_of = [&](int64_t b, int64_t o, int64_t i) {
    const int64_t index = b * task.index.batch + o * task.index.outer + i * task.index.inner;
    return seeded ? noise_at(static_cast<uint64_t>(*seed), index) : noise.at(b, o, i);
  };
  const bool doubles = latent.mu.is_double() || latent.logvar.is_double();
  latent.check(
      z, noise_of, [&](int64_t b, int64_t o, int64_t i) { return grad_z.at(b, o, i); },
      [&](int64_t b) { return grad_kl.at(b, 0, 0); }, doubles, &totals);
  for (int64_t b = 0; kl && b < e.batch; ++b) {
    const double expected = totals[static_cast<size_t>(b)];
    compare("kl", *kl, kl->offset(b, 0, 0), expected, 1 + expected, working_precision(doubles));
  }
}

// --- the objective --------------------------------------------------------------------------------------------------

void test_elbo(int threads) {
  ElboTask task;
  task.values = one_of<Values>({Values::total, Values::total, Values::sample, Values::element});
  const bool by_sample = task.values == Values::sample, by_element = task.values == Values::element;
  const bool has_nll = by_element || below(4), has_kl = !by_element && (!has_nll || coin());

  const Extent likelihood = extent;
  Nll nll(!by_element);
  extent = by_sample ? Extent{likelihood.batch, 1, 1 + below(40)} : any_extent();
  Latent latent;
  const int64_t values = by_sample ? likelihood.batch : 1;

  if ((task.has_nll = has_nll)) {
    if (by_element) nll.value = output(likelihood, true);
    task.nll = nll.task();
  }
  if ((task.has_kl = has_kl)) task.kl = latent.task();
  const int64_t kl_in_count = by_sample ? likelihood.batch : 1 + below(50);
  Input kl_in;
  if (has_nll && !has_kl && !by_element && coin()) {
    kl_in = input({kl_in_count, 1, 1}, any_float(false), {1 + below(2), 0, 0}, 0, 3);
    task.kl_in_count = kl_in_count;
  }
  const Input beta = coin() ? number(uniform(0, 2)) : input({1, 1, 1}, any_float(true), {0, 0, 0}, 0, 2);
  const auto result = [&](bool wanted) -> Output {
    if (!wanted || by_element) return nullptr;
    return std::make_unique<Array>(Extent{values, 1, 1}, coin() ? DType::f32 : DType::f64, Strides{1 + below(2), 0, 0});
  };
  const Output loss = result(true), nll_out = result(coin()), kl_out = result(coin());
  task.kl_in = kl_in.operand();
  task.beta = beta.operand();
  task.scale = by_sample ? 1 : uniform(0.1, 1);
  task.constant = coin() ? 0.9189385 : 0;
  task.loss = operand(loss);
  task.nll_out = operand(nll_out);
  task.kl_out = operand(kl_out);
  kernels().elbo(task, threads);

  const double beta_value = beta.at(0, 0, 0);
  std::vector<double> nlls(static_cast<size_t>(likelihood.batch)), kls(static_cast<size_t>(latent.e.batch));
  if (has_nll) nll.check([&](int64_t, int64_t, int64_t) { return task.scale; }, &nlls);
  const bool doubles = latent.mu.is_double() || latent.logvar.is_double();
  const auto zero = [](int64_t, int64_t, int64_t) { return 0.0; };
  if (has_kl) latent.check(nullptr, zero, zero, [&](int64_t) { return task.scale * beta_value; }, doubles, &kls);
  if (by_element) return;

  const auto total = [&](const std::vector<double>& terms, int64_t value) {
    double sum = 0;
    for (size_t b = 0; b < terms.size(); ++b)
      if (!by_sample || static_cast<int64_t>(b) == value) sum += terms[b];
    return sum;
  };
  if (kl_in.given) {
    kls.assign(static_cast<size_t>(kl_in_count), 0);
    for (int64_t b = 0; b < kl_in_count; ++b) kls[static_cast<size_t>(b)] = kl_in.at(b, 0, 0);
  }
  for (int64_t value = 0; value < values; ++value) {
    const double elements = static_cast<double>(by_sample ? likelihood.sample() : likelihood.count());
    const double n = has_nll ? task.scale * (total(nlls, value) + task.constant * elements) : 0;
    const double k = has_kl || kl_in.given ? task.scale * total(kls, value) : 0;
    const double size = 1 + (has_nll ? 20 * elements : 0) + 2 * k;
    compare("loss", *loss, loss->offset(value, 0, 0), n + beta_value * k, size, 1e-5);
    if (nll_out) compare("nll", *nll_out, nll_out->offset(value, 0, 0), n, size, 1e-5);
    if (kl_out) compare("kl", *kl_out, kl_out->offset(value, 0, 0), k, size, 1e-5);
  }
}

// --- noise and scaling ----------------------------------------------------------------------------------------------

void test_normal(int threads) {
  static const std::vector<int64_t> counts = {0, 1, 2, 3, 4, 5, 15, 16, 17, 63, 65, 1023, 1024, 1025, 9001, 40001};
  extent = {1, 1, one_of(counts)};
  NormalTask task;
  const Array out(extent, any_float(true), {0, 0, 1});
  task.out = out.operand();
  task.count = extent.inner;
  const auto seed = std::make_unique<int64_t>(static_cast<int64_t>(engine()));
  task.seed = seed.get();
  kernels().normal(task, threads);
  for (int64_t i = 0; i < task.count; ++i) compare("noise", out, i, noise_at(static_cast<uint64_t>(*seed), i), 5, 3e-6);
}

void test_scale(int threads) {
  static const std::vector<int64_t> counts = {0, 1, 3, 17, 1023, 1025, 40001};
  extent = {1, 1, one_of(counts)};
  Array tensor(extent, any_float(true), {0, 0, 1});
  tensor.fill(-2, 2);
  std::vector<double> before;
  for (int64_t i = 0; i < extent.inner; ++i) before.push_back(tensor[i]);
  const Input factor = input({1, 1, 1}, any_float(true), {0, 0, 0}, 0, 3);
  factor.array->set(0, one_of<double>({0, 1, 2.5}));
  ScaleTask task;
  const int64_t place = below(ScaleTask::kMost);
  task.tensors[place] = tensor.operand();
  task.counts[place] = extent.inner;
  task.factor = factor.operand();
  kernels().scale(task, threads);
  const double by = factor.at(0, 0, 0);
  for (int64_t i = 0; i < extent.inner; ++i)
    compare("scaled", tensor, i, by * before[static_cast<size_t>(i)], by == 1 ? 0 : 6, 1e-6);
}

// Gradients so large that they are written past the caches.
void test_streaming(int threads) {
  for (const Extent& e : {Extent{1, 1, 2200003}, Extent{3, 1, 700001}}) {
    extent = e;
    Nll nll(false);
    nll.recon_x = input(e, DType::f32, full(e), -2, 2);
    nll.x = input(e, DType::f32, full(e), -2, 2);
    nll.spread = input(e, DType::f32, full(e), nll.is_variance ? 0.05 : -1.5, 1.5);
    for (Output* gradient : {&nll.grad_recon_x, &nll.grad_x, &nll.grad_spread})
      *gradient = std::make_unique<Array>(e, DType::f32, full(e));
    NllTask task = nll.task();
    task.weight = number(0.5).operand();
    kernels().nll(task, threads);
    nll.check([](int64_t, int64_t, int64_t) { return 0.5; }, nullptr);
  }
}

}  // namespace

int main(int argc, char** argv) {
  const int64_t cases = argc > 1 ? std::atoll(argv[1]) : 1000;
  struct {
    const char* name;
    void (*test)(int threads);
  } const tests[] = {
      {"nll", test_nll}, {"latent", test_latent}, {"elbo", test_elbo}, {"normal", test_normal}, {"scale", test_scale}};
  __sanitizer_set_death_callback([] { fail("stopped by the sanitizer"); });
  for (case_number = 0; case_number < cases; ++case_number) {
    engine.seed(static_cast<uint64_t>(case_number));  // a case is the same whatever came before it
    extent = any_extent();
    const auto& [name, test] = tests[case_number % 5];
    kernel = name;
    test(1 + static_cast<int>(below(3)));
  }
  kernel = "streaming";
  test_streaming(2);
  if (most_threads < 3) fail("the kernels never used three threads");
  std::printf("%s: %" PRId64 " comparisons\n", kernels().isa, comparisons);
  return 0;
}
