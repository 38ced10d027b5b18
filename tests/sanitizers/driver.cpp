// Runs every CPU kernel on operands of every kind, for the sanitizers to watch: each array is a heap block that ends
// with its last element, so that reading or writing past it is seen. What the kernels make of them is compared with
// the formulas in plain double arithmetic, and memory between the elements of an output must stay as it was.
//
// Cases are drawn: which formula, operands of which layouts and dtypes, which outputs, summed over what.
//
//     driver CASES [small]      FUSEDVAE_CPU_ISA chooses the kernels; prints the instruction set that it got, and exits
//                               with 77 if there are none of that name for this machine. Beside those drawn there are
//                               cases of tensors that no cache holds, unless "small" is said: they take most of the
//                               time

#include <sanitizer/common_interface_defs.h>

#include <algorithm>
#include <cinttypes>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <iterator>
#include <memory>
#include <random>
#include <stdexcept>
#include <thread>
#include <utility>
#include <vector>

#include "broadcast.h"
#include "cpu/kernels.h"
#include "math/formulas.h"

#pragma weak __sanitizer_set_death_callback  // absent where no sanitizer watches

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
  if (exponent == (1 << exponent_bits) - 1) return mantissa ? NAN : bits & 0x8000 ? -INFINITY : INFINITY;
  const double magnitude = exponent ? std::ldexp((1 << mantissa_bits) + mantissa, exponent - bias - mantissa_bits)
                                    : std::ldexp(mantissa, 1 - bias - mantissa_bits);
  return bits & 0x8000 ? -magnitude : magnitude;
}

// Rounds towards zero, so that everything it makes is exact in the format; test data need no more.
uint16_t narrow16(double value, int exponent_bits) {
  if (std::isnan(value)) return 0x7FFF;
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
  // With multiples of 1/4 at times: what differs from another array's elements is then 0 for some.
  void fill(double low, double high) {
    const bool coarse = below(4) == 0;
    for (int64_t k = 0; k < size_; ++k) {
      const double value = uniform(low, high);
      set(k, coarse ? std::nearbyint(4 * value) / 4 : value);
    }
  }
  // Whether everything but the elements is as it was.
  bool gaps_untouched() const {
    std::vector<unsigned char> bytes(block_.get(), block_.get() + bytes_);
    unsigned char* const rest = bytes.data();
    for (int64_t b = 0; b < extent_.batch; ++b)
      for (int64_t o = 0; o < extent_.outer; ++o)
        for (int64_t i = 0; i < extent_.inner; ++i)
          std::memset(rest + (skip_ + offset(b, o, i)) * size_of(dtype_), kUntouched,
                      static_cast<size_t>(size_of(dtype_)));
    for (size_t k = 0; k < bytes_; ++k)
      if (rest[k] != kUntouched) return false;
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
  // Whether it has the kernels compute in double. A uniform operand does not, as a number does not.
  bool makes_double() const { return array && array->dtype() == DType::f64 && !array->operand().is_uniform(); }
  Operand operand() const {
    if (array) return array->operand();
    Operand op;
    op.given = given;
    op.value = number;
    return op;
  }
};
using OutputArray = std::unique_ptr<Array>;

const std::vector<DType> kFloats = {DType::f32, DType::f32, DType::f32, DType::bf16, DType::f16, DType::f64};

DType any_float(bool doubles) {
  const DType dtype = one_of(kFloats);
  return dtype == DType::f64 && !doubles ? DType::f32 : dtype;
}

int64_t at_least_one(int64_t n) {
  return std::max<int64_t>(n, 1);
}

// As tensors have them: no stride is 0 because the extent is.
Strides contiguous(const Extent& e) {
  return {at_least_one(e.outer) * at_least_one(e.inner), at_least_one(e.inner), 1};
}
Strides full(const Extent& e) {
  const auto [sample, inner, one] = contiguous(e);
  switch (below(3)) {
    case 0:
      return {sample, inner, one};
    case 1:
      return {2 * sample, inner, one};  // half of a packed tensor
    default:
      return {at_least_one(e.outer) * (inner + 3) + 1, inner + 3, one};  // a slice
  }
}
Strides any_strides(const Extent& e) {
  const int64_t outer = at_least_one(e.outer), inner = at_least_one(e.inner);
  const std::vector<Strides> broadcast = {{0, 0, 0}, {1, 0, 0}, {2, 0, 0},     {outer, 1, 0}, {outer + 2, 1, 0},
                                          {0, 1, 0}, {0, 0, 1}, {0, inner, 1}, {inner, 0, 1}};
  return coin() ? full(e) : one_of(broadcast);
}

// Those of a value or gradient. Few that several of them have at random are sums that go together: see can_sum.
Strides output_strides(const Extent& e, bool by_column) {
  const std::vector<Strides> columns = {{0, 0, 0}, {0, 0, 1}};
  const std::vector<Strides> rows = {{0, 0, 0}, {1, 0, 0}, {at_least_one(e.outer), 1, 0}, {0, 1, 0}};
  return coin() ? any_strides(e) : one_of(by_column ? columns : rows);
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
// A factor, which is 1 if not given.
Input any_factor() {
  if (coin()) return coin() ? number(uniform(0, 2)) : input({1, 1, 1}, any_float(true), {0, 0, 0}, 0, 2);
  Input none;
  none.number = 1;
  return none;
}
OutputArray output(const Extent& e, bool wanted) {
  return wanted ? std::make_unique<Array>(e, any_float(true), full(e)) : nullptr;
}
Operand operand(const OutputArray& array) {
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

// `size` is that of the terms an expected value was added up from: of nothing, exactly 0 comes. `working` is the
// precision that they were added in.
void compare(const char* name, const Array& actual, int64_t offset, double expected, double size, double working) {
  ++comparisons;
  double found = actual[offset];
  if (actual.dtype() == DType::f16) {  // which has infinity for what is larger
    found = std::clamp(found, -65536., 65536.);
    expected = std::clamp(expected, -65536., 65536.);
  }
  const double tolerance = size == 0 ? 0 : (working + precision_of(actual.dtype())) * size + 1e-7;
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

// --- formulas -------------------------------------------------------------------------------------------------------

// A value, or a sum of some, with the size of the terms that it was added up from.
struct Sum {
  double value = 0, size = 0;

  void add(const Sum& more, double factor = 1) {
    value += factor * more.value;
    size += std::fabs(factor) * more.size;
  }
};

// A scale's logarithm, and its derivative by what is given.
struct Scaled {
  double log, slope;
};

Scaled scaled(const Form& form, double given) {
  const double x = std::clamp(given, form.low, form.high), power = form.squared ? 2 : 1;
  double base = x, slope = 1;
  switch (form.map) {
    case Map::exponential:
      base = slope = std::exp(x);
      break;
    case Map::linear:
      break;
    case Map::softplus:
      base = std::log1p(std::exp(x));
      slope = 1 / (1 + std::exp(-x));
      break;
    case Map::bounded:
      base = std::max(x, form.eps);
  }
  if (form.map != Map::bounded) base += form.eps;
  return {power * std::log(base), x == given ? power * slope / base : 0};
}

// Numbers that both float and double have, so that there is no doubt about what is beyond them; multiples of 1/4, as
// operands often are.
Form any_form() {
  Form form;
  form.map = one_of<Map>({Map::exponential, Map::linear, Map::softplus, Map::bounded});
  form.squared = coin();
  const bool is_base = form.map == Map::linear || form.map == Map::bounded;
  if (below(3) == 0) form.low = is_base ? 0.5 : -0.5;
  if (below(3) == 0) form.high = is_base ? 1.25 : 0.75;
  if (form.map == Map::bounded || coin()) form.eps = 0.25;
  return form;
}

struct Range {
  double low, high;
};
constexpr Range kScale = {0, 0};  // of a scale: its form says what it may be

bool is_scale(const Range& range) {
  return range.low == range.high;
}

// What may be given of a scale.
Range range_of(const Form& form) {
  if (form.map == Map::bounded || (form.map == Map::linear && form.low > 0)) return {-1, 2};
  return form.map == Map::linear ? Range{0.25, 2} : Range{-1.5, 1.5};
}

// A formula's value at an element, and its derivatives (by a scale: by its logarithm); each with the size of the terms
// that it is made of.
struct Expected {
  double value, size, grads[kMostInputs], grads_size;
};

// A formula in plain double arithmetic, scales as logarithms, and the inputs to try it with. What is beside a sample
// depends on the noise, and its derivatives are those of all that z depends on.
struct Reference {
  const char* name;
  int inputs;
  Range ranges[kMostInputs];
  Expected (*at)(const double* inputs, double noise);
};

Expected absolute_error(double error) {
  const double sign = error > 0 ? 1 : error < 0 ? -1 : 0, size = std::fabs(error);
  return {size, 1 + size, {sign, -sign}, 1};
}

Expected divergence(double mu, double logvar, double prior_mu, double prior_logvar) {
  const double error = mu - prior_mu, precision = std::exp(-prior_logvar), ratio = std::exp(logvar - prior_logvar);
  const double pull = error * precision, square = error * pull;
  const double size = 4 + ratio + (1 + std::fabs(mu) + std::fabs(prior_mu)) * (precision + std::fabs(pull));
  const double value = ((prior_logvar - logvar) + std::expm1(logvar - prior_logvar) + square) / 2;
  return {value, size, {pull, (ratio - 1) / 2, -pull, (1 - ratio - square) / 2}, size};
}

Expected divergence_at_sample(double mu, double logvar, double prior_mu, double prior_logvar, double noise) {
  const double deviation = std::exp(logvar / 2), z = mu + deviation * noise, precision = std::exp(-prior_logvar);
  const double pull = (z - prior_mu) * precision, square = (z - prior_mu) * pull;
  const double reach = 1 + std::fabs(mu) + std::fabs(prior_mu) + deviation * (1 + std::fabs(noise));
  const double size = 4 + noise * noise + reach * reach * precision;
  return {(prior_logvar - logvar - noise * noise + square) / 2,
          size,
          {pull, (pull * deviation * noise - 1) / 2, -pull, (1 - square) / 2},
          size + reach * reach * precision};
}

// Of counts, by lgamma and its differences: those of digamma.
struct Counts {
  double value, d_mu, d_x, d_theta;
};
double digamma(double x) {
  double sum = 0;
  for (; x < 12; ++x) sum -= 1 / x;
  const double y = 1 / (x * x);
  return sum + std::log(x) - 1 / (2 * x) - y * (1. / 12 - y * (1. / 120 - y * (1. / 252 - y / 240)));
}
Counts negative_binomial(double mu, double x, double theta) {
  const double eps = 1e-8, s = theta + mu + eps;
  const double of_theta = std::log(s / (theta + eps)), of_x = std::log(s / (mu + eps));
  return {theta * of_theta + x * of_x - std::lgamma(x + theta) + std::lgamma(theta) + std::lgamma(x + 1),
          (theta + x) / s - x / (mu + eps), of_x - digamma(x + theta) + digamma(x + 1),
          of_theta + (theta + x) / s - theta / (theta + eps) - digamma(x + theta) + digamma(theta)};
}

const Reference kReferences[] = {
    {"gaussian_nll",
     3,
     {{-2, 2}, {-2, 2}, kScale},
     [](const double* in, double) {
       const double error = in[0] - in[1], precision = std::exp(-in[2]), square = error * error * precision;
       const double size = (2 + precision) * (1 + std::fabs(error) + square);
       return Expected{(in[2] + square) / 2, size, {error * precision, -error * precision, (1 - square) / 2}, size};
     }},
    {"laplace_nll",
     4,
     {{-2, 2}, {-2, 2}, kScale, {0, 1}},
     [](const double* in, double) {
       const Expected distance = absolute_error(in[0] - in[1]);
       const double inverse = std::exp(-in[2]), relative = (distance.value + in[3]) * inverse;
       const double d_recon = distance.grads[0] * inverse, size = 2 + inverse + relative;
       return Expected{relative + in[2], size, {d_recon, -d_recon, 1 - relative, inverse}, size};
     }},
    {"bernoulli_nll",
     3,
     {{-8, 8}, {0, 1}, {0, 3}},
     [](const double* in, double) {
       const double a = in[0], x = in[1], more = in[2] - 1, rest = 1 - x, share = 1 + more * x;
       const double miss = std::log1p(std::exp(-a)), slope = 1 / (1 + std::exp(a));
       const double size = 2 + std::fabs(a) + (1 + std::fabs(more)) * (1 + miss);
       return Expected{rest * a + share * miss, size, {rest - share * slope, more * miss - a, x * miss}, size};
     }},
    {"bernoulli_nll_of_probabilities",
     2,
     {{0, 1}, {0, 1}},
     [](const double* in, double) {
       const double p = in[0], x = in[1];
       const double hit = std::max(std::log(p), -100.), miss = std::max(std::log1p(-p), -100.);
       const double variance = std::max(p * (1 - p), 1e-12), size = 1 - hit - miss;
       return Expected{-x * hit - (1 - x) * miss, size, {(p - x) / variance, miss - hit}, size + 1 / variance};
     }},
    {"mse",
     2,
     {{-2, 2}, {-2, 2}},
     [](const double* in, double) {
       const double error = in[0] - in[1], size = 1 + std::fabs(error) + error * error;
       return Expected{error * error, size, {2 * error, -2 * error}, size};
     }},
    {"l1", 2, {{-2, 2}, {-2, 2}}, [](const double* in, double) { return absolute_error(in[0] - in[1]); }},
    {"poisson_nll",
     2,
     {kScale, {0, 6}},
     [](const double* in, double) {
       const double rate = std::exp(in[0]), x = in[1], size = 2 + rate + x * (1 + std::fabs(in[0]));
       return Expected{rate - x * in[0], size, {rate - x, -in[0]}, size};
     }},
    {"poisson_nll_in_full",
     2,
     {kScale, {0, 6}},
     [](const double* in, double) {
       const double rate = std::exp(in[0]), x = in[1], size = 8 + rate + x * (1 + std::fabs(in[0]));
       return Expected{rate - x * in[0] + std::lgamma(x + 1), size, {rate - x, digamma(x + 1) - in[0]}, size};
     }},
    {"negative_binomial_nll",
     3,
     {{0.2, 6}, {0, 6}, kScale},
     [](const double* in, double) {
       const double theta = std::exp(in[2]);
       const Counts nb = negative_binomial(in[0], in[1], theta);
       const double size = 40 * (1 + theta) * (1 + std::fabs(in[2])) + std::fabs(nb.value),
                    steep = size + std::fabs(nb.d_mu);
       return Expected{nb.value, size, {nb.d_mu, nb.d_x, theta * nb.d_theta}, steep};
     }},
    {"zero_inflated_negative_binomial_nll",
     4,
     {{0.2, 6}, {0, 6}, kScale, {-3, 3}},
     [](const double* in, double) {
       const double theta = std::exp(in[2]), x = in[1], kept = 1 / (1 + std::exp(in[3]));
       const Counts nb = negative_binomial(in[0], x, theta);
       const double size = 40 * (1 + theta) * (1 + std::fabs(in[2])) + std::fabs(nb.value),
                    steep = size + std::fabs(nb.d_mu);
       const double zero = std::exp(-nb.value), left = 1 - kept + kept * zero, share = kept * zero / left;
       if (x == 0)
         return Expected{-std::log(left), size, {share * nb.d_mu, 0, share * theta * nb.d_theta, share - kept}, steep};
       return Expected{nb.value - std::log(kept), size, {nb.d_mu, nb.d_x, theta * nb.d_theta, 1 - kept}, steep};
     }},
    {"discretized_logistic_nll",
     3,
     {{-1, 1}, {-1, 1}, kScale},
     [](const double* in, double) {
       const double inverse = std::exp(-in[2]), error = in[1] - in[0], width = 2 * inverse / 255;
       const double upper = error * inverse + width / 2, lower = error * inverse - width / 2;
       const bool is_first = in[1] < -0.999, is_last = in[1] > 0.999;
       const double above = is_last ? 0 : 1 / (1 + std::exp(upper)), below = is_first ? 0 : 1 / (1 + std::exp(-lower));
       const auto softplus = [](double t) { return std::max(t, 0.) + std::log1p(std::exp(-std::fabs(t))); };
       const double value = (is_last ? 0 : softplus(-upper)) + (is_first ? 0 : softplus(lower));
       const bool is_open = is_first || is_last;
       const double size = 12 * (1 + inverse) * (1 + inverse) + value;
       return Expected{is_open ? value : value - std::log(-std::expm1(-width)),
                       size,
                       {inverse * (above - below), inverse * (below - above),
                        upper * above - lower * below + (is_open ? 0 : width / std::expm1(width))},
                       size};
     }},
    {"kl_standard_normal",
     2,
     {{-2, 2}, kScale},
     [](const double* in, double) { return divergence(in[0], in[1], 0, 0); }},
    {"kl_normal",
     4,
     {{-2, 2}, kScale, {-2, 2}, kScale},
     [](const double* in, double) { return divergence(in[0], in[1], in[2], in[3]); }},
    {"kl_standard_normal_at_sample",
     2,
     {{-2, 2}, kScale},
     [](const double* in, double noise) { return divergence_at_sample(in[0], in[1], 0, 0, noise); }},
    {"kl_normal_at_sample",
     4,
     {{-2, 2}, kScale, {-2, 2}, kScale},
     [](const double* in, double noise) { return divergence_at_sample(in[0], in[1], in[2], in[3], noise); }},
};

// What the formula of that name should give.
const Reference& reference_of(const char* name) {
  for (const Reference& reference : kReferences)
    if (std::strcmp(reference.name, name) == 0) return reference;
  std::fprintf(stderr, "formula %s is in math/formulas.h, but not among kReferences of %s\n", name, __FILE__);
  std::_Exit(1);
}

// Has the references of these formulas tried with as many inputs, and with the same scales among them.
template <class... Formula>
void check_references(scalar::List<Formula...> list) {
  for (int number = 0; number < list.kSize; ++number)
    scalar::with_formula(
        number,
        [](auto tag) {
          using Found = typename decltype(tag)::type;
          const Reference& reference = reference_of(Found::kName);
          kernel = reference.name;
          int scales = 0;
          for (int k = 0; k < reference.inputs; ++k) {
            if (!is_scale(reference.ranges[k])) continue;
            if constexpr (Found::kScales > 0)
              if (scales < Found::kScales && Found::kScaleOf[scales] != k) fail("other scales than the formula has");
            ++scales;
          }
          if (Found::kInputs != reference.inputs || Found::kScales != scales)
            fail("other numbers of inputs or scales than the formula has");
        },
        list);
}

// --- a formula and its operands -------------------------------------------------------------------------------------

// How operands lie in memory. Plain ones are contiguous arrays of one dtype, which kernels can use as they are; shared
// ones are the same for the whole batch, as a posterior is for several samples from it, or a prior.
enum class Layout { plain, shared, any };

Layout any_layout() {
  return one_of<Layout>({Layout::plain, Layout::plain, Layout::shared, Layout::any, Layout::any, Layout::any});
}

// What there is of each element, or summed over some: the value, and the gradients behind it.
constexpr int kMostMade = 1 + kMostInputs;
struct Made {
  Sum of[kMostMade];
};

class Elements {
 public:
  Elements(const char* name, int number, Layout layout)
      : reference_(reference_of(name)),
        number_(number),
        layout_(layout),
        doubles_(below(4) == 0),
        in_double_(below(8) == 0) {
    const bool in_forms = coin();
    int scale = 0;
    for (int k = 0; k < reference_.inputs; ++k) {
      const Range& range = reference_.ranges[k];
      if (is_scale(range)) {
        Form& form = forms_[scale++];
        if (in_forms) form = any_form();
        inputs_[k] = any_scale(form, k > 1);
      } else {
        inputs_[k] = any_input(range, k > 1);
      }
      in_double_ |= inputs_[k].makes_double();
    }
    weight_.number = incoming_.number = 1;  // if not given
  }

  // The rest of a task. What comes in is there before the weight, for which it is spoilt too.
  void set_gains() {
    for (double& gain : gains_) gain = one_of<double>({1, 0.25, -0.5, 0});
  }
  void set_incoming() { incoming_ = any_input({-1, 1}); }
  // A weight that is 0 here and there. What other operands hold there must not matter.
  void set_weight() {
    weight_ = any_input({-1.9, 1.9});
    if (!weight_.array && below(4) == 0) weight_.number = 0;
    for (int64_t k = 0; weight_.array && k < weight_.array->size(); ++k)
      if (below(3) == 0) weight_.array->set(k, 0);
    if (below(4) == 0) return;
    for (Input* input : {&inputs_[0], &inputs_[1], &inputs_[2], &inputs_[3], &incoming_}) spoil(*input);
  }
  void set_outputs(bool value, bool grads = true) {
    do {
      const bool by_column = coin();
      for (int k = 0; k <= reference_.inputs; ++k)
        made_[k] = (k ? grads && below(3) : value) ? any_output(by_column) : nullptr;
    } while (!can_sum(task()));
  }
  // All in 16 bits, but for an input or two, and side by side, scales as formulas are written; or one number.
  void set_halves(DType half) {
    int scale = 0;
    for (int k = 0; k < reference_.inputs; ++k) {
      Range range = reference_.ranges[k];
      if (is_scale(range)) {
        forms_[scale] = Form{};
        range = range_of(forms_[scale++]);
      }
      const DType dtype = below(4) ? half : DType::f32;
      const bool is_one = k > 1 && below(3) == 0;
      inputs_[k] =
          is_one ? number(uniform(range.low, range.high)) : input(e_, dtype, contiguous(e_), range.low, range.high);
      made_[1 + k] = std::make_unique<Array>(e_, dtype, is_one && coin() ? Strides{0, 0, 0} : contiguous(e_));
    }
    in_double_ = false;
  }
  // Gradients that are written element by element, past the caches if they are large.
  void set_large_gradients() {
    for (int k = 1; k <= reference_.inputs; ++k) made_[k] = std::make_unique<Array>(e_, DType::f32, full(e_));
  }

  ElementwiseTask task() const {
    ElementwiseTask task;
    task.formula = number_;
    task.in_double = in_double_;
    task.extent = e_;
    task.weight = weight_.operand();
    task.incoming = incoming_.operand();
    task.value = operand(made_[0]);
    std::copy(std::begin(forms_), std::end(forms_), task.forms);
    std::copy(std::begin(gains_), std::end(gains_), task.gains);
    for (int k = 0; k < kMostInputs; ++k) {
      task.inputs[k] = inputs_[k].operand();
      task.grads[k] = operand(made_[1 + k]);
    }
    return task;
  }
  const Extent& e() const { return e_; }
  const char* name() const { return reference_.name; }
  double working() const { return working_precision(in_double_); }
  const Input& incoming() const { return incoming_; }

  // The inputs of an element, scales as logarithms, and the derivatives of these by what is given of them.
  struct Point {
    double in[kMostInputs], slopes[kMostInputs];
  };
  Point point(int64_t b, int64_t o, int64_t i) const {
    Point point;
    int scale = 0;
    for (int k = 0; k < reference_.inputs; ++k) {
      // Rounded as the kernels do: the sign of a difference is nothing to be a little off in.
      const double exact = inputs_[k].at(b, o, i);
      point.in[k] = in_double_ ? exact : static_cast<double>(static_cast<float>(exact));
      point.slopes[k] = 1;
      if (!is_scale(reference_.ranges[k])) continue;
      const auto [log, slope] = scaled(forms_[scale++], point.in[k]);
      point.in[k] = log;
      point.slopes[k] = slope;
    }
    return point;
  }
  // What the formula makes of them: the value, and the gradients that are times `factor`.
  Made at(const Point& point, double noise, double factor) const {
    const Expected expected = reference_.at(point.in, noise);
    Made made;
    made.of[0] = {expected.value, expected.size};
    for (int k = 0; k < reference_.inputs; ++k)
      made.of[1 + k].add({expected.grads[k], expected.grads_size}, factor * gains_[k] * point.slopes[k]);
    return made;
  }

  // Compares value and gradients with the sums of what `made_at` says of the elements.
  template <class MadeAt>
  void compare_with(double working, const MadeAt& made_at) const {
    static const char* const names[kMostMade] = {"value", "gradient 0", "gradient 1", "gradient 2", "gradient 3"};
    kernel = reference_.name;
    extent = e_;
    std::vector<Sum> sums[kMostMade];
    for (int k = 0; k < kMostMade; ++k)
      if (made_[k]) sums[k].resize(static_cast<size_t>(made_[k]->size()));
    for_elements(e_, [&](int64_t b, int64_t o, int64_t i) {
      const Made made = made_at(b, o, i);
      for (int k = 0; k < kMostMade; ++k)
        if (made_[k]) sums[k][static_cast<size_t>(made_[k]->offset(b, o, i))].add(made.of[k]);
    });
    for (int k = 0; k < kMostMade; ++k) {
      if (!made_[k]) continue;
      for_elements(made_[k]->extent(), [&](int64_t b, int64_t o, int64_t i) {
        const int64_t at = made_[k]->offset(b, o, i);
        const Sum& sum = sums[k][static_cast<size_t>(at)];
        compare(names[k], *made_[k], at, sum.value, sum.size, working);
      });
      if (!made_[k]->gaps_untouched()) fail("wrote between the elements of an output");
    }
  }

  // Compares values and gradients of a term: `constant` is added to each value, gradients are times `factor`. Returns
  // the sums of each sample's values.
  std::vector<Sum> check(double constant, double factor) const {
    std::vector<Sum> samples(static_cast<size_t>(e_.batch));
    compare_with(working(), [&](int64_t b, int64_t o, int64_t i) {
      Made made;
      const double weight = weight_.at(b, o, i);
      if (weight == 0) return made;  // whatever the inputs hold
      const Made element = at(point(b, o, i), 0, factor * incoming_.at(b, o, i));
      for (int k = 0; k < kMostMade; ++k) made.of[k].add(element.of[k], weight);
      made.of[0].add({constant, constant}, weight);
      samples[static_cast<size_t>(b)].add(made.of[0]);
      return made;
    });
    return samples;
  }

 private:
  DType dtype() const { return doubles_ ? DType::f64 : DType::f32; }

  // `often_one`: as those inputs are for which kernels have a way of their own if they are one number.
  Input any_input(const Range& range, bool often_one = false, bool integers = true) const {
    if (below(often_one ? 3 : 8) == 0) return number(uniform(range.low, range.high));
    if (layout_ == Layout::plain) return input(e_, dtype(), contiguous(e_), range.low, range.high);
    const DType dtype = integers && below(8) == 0 ? DType::u8 : any_float(doubles_);
    const Strides strides = layout_ == Layout::any ? any_strides(e_) : Strides{0, 0, below(4) ? 1 : 0};
    return input(e_, dtype, strides, range.low, range.high);
  }
  // A scale of that form, with what is infinitely far beyond its bounds.
  Input any_scale(const Form& form, bool often_one) const {
    Input scale = any_input(range_of(form), often_one, false);
    if (!scale.array || scale.array->size() == 0) return scale;
    if (form.low > -INFINITY) scale.array->set(0, -INFINITY);
    if (form.high < INFINITY) scale.array->set(scale.array->size() - 1, INFINITY);
    return scale;
  }
  OutputArray any_output(bool by_column) const {
    if (layout_ == Layout::plain) return std::make_unique<Array>(e_, dtype(), contiguous(e_));
    const bool shared = layout_ == Layout::shared && below(4);
    const Strides strides = shared ? Strides{0, 0, below(4) ? 1 : 0} : output_strides(e_, by_column);
    return std::make_unique<Array>(e_, any_float(true), strides);
  }
  // Puts anything where no element reads that has a weight.
  void spoil(Input& operand) const {
    if (!operand.array || operand.array->dtype() == DType::u8) return;
    Array& array = *operand.array;
    enum { unread, weightless, read };
    std::vector<char> use(static_cast<size_t>(array.size()), unread);
    for_elements(e_, [&](int64_t b, int64_t o, int64_t i) {
      char& found = use[static_cast<size_t>(array.offset(b, o, i))];
      found = std::max<char>(found, weight_.at(b, o, i) == 0 ? weightless : read);
    });
    for (int64_t k = 0; k < array.size(); ++k)
      if (use[static_cast<size_t>(k)] == weightless) array.set(k, one_of<double>({NAN, INFINITY, -INFINITY, 0}));
  }

  const Extent e_ = extent;
  const Reference& reference_;
  const int number_;
  const Layout layout_;
  const bool doubles_;  // whether there are any among the operands
  bool in_double_;
  Form forms_[kMostScales];
  double gains_[kMostInputs] = {1, 1, 1, 1};
  Input inputs_[kMostInputs], weight_, incoming_;
  OutputArray made_[kMostMade];
};

std::unique_ptr<Elements> elements_of(int number, Layout layout) {
  return std::make_unique<Elements>(scalar::Formulas::kNames[number], number, layout);
}

// Those of any formula, but for outputs.
std::unique_ptr<Elements> any_elements(bool has_incoming) {
  auto elements = elements_of(static_cast<int>(below(scalar::Formulas::kSize)), any_layout());
  if (has_incoming) elements->set_incoming();
  if (coin()) elements->set_weight();
  if (std::strncmp(elements->name(), "kl_", 3) == 0 && below(4) == 0) elements->set_gains();
  return elements;
}

// --- objectives -----------------------------------------------------------------------------------------------------

// A term: of a formula, or of values that are given.
struct AnyTerm {
  std::unique_ptr<Elements> elements;
  Input given;
  int64_t given_count = 0;
  double factor = coin() ? 1 : uniform(0.1, 1), constant = 0;
  Input normalizer = any_factor(), coefficient = any_factor();
  OutputArray out;

  explicit AnyTerm(std::unique_ptr<Elements> of) : elements(std::move(of)) {
    if (coin()) constant = 0.9189385;
  }
  explicit AnyTerm(int64_t count) : given_count(count) {
    given = input({count, 1, 1}, any_float(true), {below(3), 0, 0}, 0, 3);
  }

  Term task() const {
    Term term;
    if (elements) term.elements = elements->task();
    term.given = given.operand();
    term.given_count = given_count;
    term.factor = factor;
    term.normalizer = normalizer.operand();
    term.constant = constant;
    term.coefficient = coefficient.operand();
    term.out = operand(out);
    return term;
  }
  double working() const { return elements ? elements->working() : 1e-14; }

  // Compares what there is of each element, and returns the sums: one for each sample, or one.
  std::vector<Sum> check(bool by_sample, double grad_scale) const {
    const double times = factor * normalizer.at(0, 0, 0);
    std::vector<Sum> samples;
    if (elements) samples = elements->check(constant, times * coefficient.at(0, 0, 0) * grad_scale);
    for (int64_t b = 0; b < given_count; ++b) samples.push_back({given.at(b, 0, 0), given.at(b, 0, 0)});
    std::vector<Sum> sums(by_sample ? samples.size() : 1);
    for (size_t b = 0; b < samples.size(); ++b) sums[by_sample ? b : 0].add(samples[b], times);
    return sums;
  }
};

// Has the kernel make an objective of these terms, and compares everything that it gives.
void check_objective(std::vector<AnyTerm> terms, Values kind, int threads) {
  const bool by_sample = kind == Values::sample;
  const AnyTerm& first = terms.front();
  const int64_t values = !by_sample ? 1 : first.elements ? first.elements->e().batch : first.given_count;
  const auto result = [&](bool wanted) -> OutputArray {
    if (!wanted || kind == Values::element) return nullptr;
    return std::make_unique<Array>(Extent{values, 1, 1}, any_float(true), Strides{1 + below(2), 0, 0});
  };
  const Input grad_scale = any_factor();
  const OutputArray loss = result(true);
  ObjectiveTask task;
  for (AnyTerm& term : terms) {
    term.out = result(coin());
    task.terms[task.count++] = term.task();
  }
  task.values = kind;
  task.grad_scale = grad_scale.operand();
  task.loss = operand(loss);
  kernels().objective(task, threads);

  std::vector<Sum> losses(static_cast<size_t>(values));
  double working = 0;
  for (const AnyTerm& term : terms) {
    const std::vector<Sum> sums = term.check(by_sample, grad_scale.at(0, 0, 0));
    if (kind == Values::element) return;
    const double coefficient = term.coefficient.at(0, 0, 0);
    working = std::max(working, term.working());
    for (size_t b = 0; b < losses.size(); ++b) {
      losses[b].add(sums[b], coefficient);
      if (term.out)
        compare("term", *term.out, term.out->offset(static_cast<int64_t>(b), 0, 0), sums[b].value, sums[b].size,
                term.working());
    }
    if (term.out && !term.out->gaps_untouched()) fail("wrote between a term's values");
  }
  for (size_t b = 0; b < losses.size(); ++b)
    compare("loss", *loss, loss->offset(static_cast<int64_t>(b), 0, 0), losses[b].value, losses[b].size, working);
  if (!loss->gaps_untouched()) fail("wrote between the values of a loss");
}

std::vector<AnyTerm> one_term(std::unique_ptr<Elements> elements) {
  std::vector<AnyTerm> terms;
  terms.emplace_back(std::move(elements));
  return terms;
}

void test_elements(int threads) {
  const bool has_value = below(3);  // or else what comes in for it, perhaps
  auto elements = any_elements(!has_value && below(4));
  elements->set_outputs(has_value);
  check_objective(one_term(std::move(elements)), Values::element, threads);
}

void test_objective(int threads) {
  const bool by_sample = coin();
  const int64_t batch = extent.batch, count = 1 + below(ObjectiveTask::kMostTerms);
  std::vector<AnyTerm> terms;
  for (int64_t k = 0; k < count; ++k) {
    if (k) extent = any_extent();
    if (by_sample) extent.batch = batch;
    if (extent.count() > 50000) extent.outer = 1, extent.inner = 1 + below(40);
    if (below(6)) {
      terms.emplace_back(any_elements(false));
      terms.back().elements->set_outputs(false);
    } else {
      terms.emplace_back(by_sample ? batch : 1 + below(50));
    }
  }
  check_objective(std::move(terms), by_sample ? Values::sample : Values::total, threads);
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

// Noise that is made of a seed, or given, or neither.
struct AnyNoise {
  std::unique_ptr<int64_t> seed;
  IndexStrides index;
  Input offset, given;

  AnyNoise(const Extent& e, bool wanted, bool doubles) {
    // Where an element is in logical order: row-major, the channels_last of that, or anything.
    const std::vector<IndexStrides> orders = {
        {e.sample(), e.inner, 1}, {e.sample(), e.inner, 1}, {e.sample(), 1, e.outer}, {1, 7 * e.batch, e.batch}};
    index = one_of(orders);
    if (wanted && below(4) == 0) {
      given = input(e, any_float(doubles), any_strides(e), -3, 3);
    } else if (wanted) {
      seed = std::make_unique<int64_t>(static_cast<int64_t>(engine()));
      if (coin()) return;
      offset = number(one_of<double>({1, 4, 1023, 0x1p33 + 3}));
      if (below(4) == 0) {
        const double first = offset.number;
        offset = input({1, 1, 1}, DType::f64, {0, 0, 0}, 0, 1);
        offset.array->set(0, first);
      }
    }
  }
  double at(int64_t b, int64_t o, int64_t i) const {
    if (!seed) return given.at(b, o, i);
    const int64_t first = static_cast<int64_t>(offset.at(0, 0, 0));
    return noise_at(static_cast<uint64_t>(*seed), first + b * index.batch + o * index.outer + i * index.inner);
  }
};

// Has the kernel make one pass over the latent, and compares everything that it gives.
void check_latent(const Elements& divergence, const AnyNoise& noise, const Input& grad_z, const OutputArray& z,
                  int threads) {
  LatentTask task;
  task.divergence = divergence.task();
  task.index = noise.index;
  task.seed = noise.seed.get();
  task.offset = noise.offset.operand();
  task.noise = noise.given.operand();
  task.grad_z = grad_z.operand();
  task.z = operand(z);
  kernels().latent(task, threads);

  // The noise of a seed is single precision whatever the rest is.
  const double working = noise.seed ? 1e-5 : divergence.working();
  const Input& incoming = divergence.incoming();
  divergence.compare_with(working, [&](int64_t b, int64_t o, int64_t i) {
    const Elements::Point at = divergence.point(b, o, i);
    const double n = noise.at(b, o, i), gz = grad_z.at(b, o, i);
    const double deviation = std::exp(at.in[1] / 2), spread = deviation * (1 + std::fabs(n));
    if (z) compare("z", *z, z->offset(b, o, i), at.in[0] + deviation * n, 1 + std::fabs(at.in[0]) + spread, working);
    Made made = divergence.at(at, n, incoming.given ? incoming.at(b, o, i) : 0);
    made.of[1].add({gz, std::fabs(gz)});
    made.of[2].add({gz * n * deviation / 2, std::fabs(gz) * spread}, at.slopes[1]);
    return made;
  });
  if (z && !z->gaps_untouched()) fail("wrote between the elements of a sample");
}

void test_latent(int threads) {
  const int number = static_cast<int>(below(scalar::Divergences::kSize));
  const char* const name = scalar::Divergences::kNames[number];
  Elements divergence(name, number, any_layout());
  if (coin()) divergence.set_incoming();
  divergence.set_outputs(coin(), below(4));
  const bool doubles = divergence.task().in_double, noisy = std::strstr(name, "at_sample") || below(4);
  const AnyNoise noise(extent, noisy, doubles);
  Input grad_z;
  if (noisy && coin()) grad_z = input(extent, any_float(doubles), any_strides(extent), -1, 1);
  check_latent(divergence, noise, grad_z, output(extent, noisy && coin()), threads);
}

// Gradients so large that they are written past the caches: more than 24 MiB of them.
void test_past_caches(int threads) {
  extent = {1, 1, int64_t{26} << 17};  // of two gradients
  auto elements = elements_of(0, Layout::plain);
  elements->set_large_gradients();
  check_objective(one_term(std::move(elements)), Values::total, threads);
  extent = {3, 1, (int64_t{26} << 17) / 3};
  Elements divergence(scalar::Divergences::kNames[0], 0, Layout::shared);
  divergence.set_large_gradients();
  divergence.set_incoming();
  check_latent(divergence, AnyNoise(extent, false, false), {}, nullptr, threads);
}

// Operands in 16 bits that are read and written where they lie.
void check_halves(DType half, int threads) {
  auto elements = elements_of(static_cast<int>(below(scalar::Formulas::kSize)), Layout::plain);
  elements->set_halves(half);
  check_objective(one_term(std::move(elements)), Values::total, threads);
}

void test_halves(int threads) {
  check_halves(one_of<DType>({DType::bf16, DType::f16}), threads);
}

// In bfloat16, at least 12 MiB of them.
void test_large_halves(int threads) {
  extent = {1, 1, (int64_t{25} << 16) + 5};
  check_halves(DType::bf16, threads);
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
  const Input factor = input({1, 1, 1}, any_float(true), {0, 0, 0}, 0, 3);
  factor.array->set(0, one_of<double>({0, 1, 2.5}));
  ScaleTask task;
  task.factor = factor.operand();
  Input tensors[ScaleTask::kMost];
  std::vector<double> before[ScaleTask::kMost];
  for (int k = 0; k < ScaleTask::kMost; ++k) {
    if (coin()) continue;
    task.counts[k] = one_of(counts);
    tensors[k] = input({1, 1, task.counts[k]}, any_float(true), {0, 0, 1}, -2, 2);
    task.tensors[k] = tensors[k].operand();
    for (int64_t i = 0; i < task.counts[k]; ++i) before[k].push_back(tensors[k].at(0, 0, i));
  }
  extent = {1, 1, 1};
  const Array product(extent, any_float(true), {0, 0, 0});
  if (coin()) {
    task.coefficient.given = true;
    task.coefficient.value = one_of<double>({1, -0.75, 3});
    task.product = product.operand();
  }
  kernels().scale(task, threads);
  const double by = factor.at(0, 0, 0);
  if (task.product) compare("product", product, 0, by * task.coefficient.value, 8, 1e-7);
  for (int k = 0; k < ScaleTask::kMost; ++k) {
    extent = {1, 1, task.counts[k]};
    for (int64_t i = 0; i < task.counts[k]; ++i) {
      const double expected = by * before[k][static_cast<size_t>(i)];
      compare("scaled", *tensors[k].array, i, expected, by == 1 ? 0 : 6, 1e-6);
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  const int64_t cases = argc > 1 ? std::atoll(argv[1]) : 1000;
  const bool has_large = argc < 3 || std::strcmp(argv[2], "small") != 0;
  try {
    kernels();
  } catch (const std::runtime_error& reason) {
    std::fprintf(stderr, "%s\n", reason.what());
    return 77;
  }
  check_references(scalar::Formulas{});
  check_references(scalar::Divergences{});
  struct {
    const char* name;
    void (*test)(int threads);
  } const tests[] = {{"elements", test_elements}, {"objective", test_objective}, {"latent", test_latent},
                     {"halves", test_halves},     {"normal", test_normal},       {"scale", test_scale}};
  if (__sanitizer_set_death_callback) __sanitizer_set_death_callback([] { fail("stopped by the sanitizer"); });
  for (case_number = 0; case_number < cases; ++case_number) {
    engine.seed(static_cast<uint64_t>(case_number));  // a case is the same whatever came before it
    extent = any_extent();
    const auto& [name, test] = tests[case_number % static_cast<int64_t>(std::size(tests))];
    kernel = name;
    test(1 + static_cast<int>(below(3)));
  }
  if (has_large) {
    kernel = "past the caches";
    test_past_caches(2);
    test_large_halves(2);
  }
  if (most_threads < 3) fail("the kernels never used three threads");
  std::printf("%s: %" PRId64 " comparisons\n", kernels().isa, comparisons);
  return 0;
}
