// Runs every CPU kernel on operands of every kind, for the sanitizers to watch: each array is a heap block that ends
// with its last element, so that reading or writing past it is seen. What the kernels make of them is compared with
// the formulas in plain double arithmetic, and memory between the elements of an output must stay as it was.
//
//     driver CASES      FUSEDVAE_CPU_ISA chooses the kernels; prints the instruction set that it got, and exits with
//                       77 if there are none of that name for this machine

#include <sanitizer/common_interface_defs.h>

#include <algorithm>
#include <cinttypes>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <random>
#include <stdexcept>
#include <thread>
#include <utility>
#include <vector>

#include "broadcast.h"
#include "cpu/kernels.h"
#include "math/formulas.h"

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

// A gradient's. Few of those that several gradients have at random are sums that go together: see can_sum.
Strides gradient_strides(const Extent& e, bool by_column) {
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
  double found = actual[offset];
  if (actual.dtype() == DType::f16) {  // which has infinity for what is larger
    found = std::clamp(found, -65536., 65536.);
    expected = std::clamp(expected, -65536., 65536.);
  }
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

// --- formulas -------------------------------------------------------------------------------------------------------

// A value, or a sum of some, with the size of the terms that it was added up from.
struct Sum {
  double value = 0, size = 0;

  void add(double more, double more_size) {
    value += more;
    size += more_size;
  }
};

// A formula's value at an element, and its derivatives; `size` is that of the terms of any of these.
struct Expected {
  double value, size, grads[kMostInputs];
};

// A formula in plain double arithmetic, and the inputs to try it with.
struct Reference {
  const char* name;
  int inputs;
  struct {
    double low, high;
  } ranges[kMostInputs];
  Expected (*at)(const double* inputs, double parameter);
};

Expected gaussian(double error, double logvar, double precision) {
  const double square = error * error * precision, size = (2 + precision) * (1 + std::fabs(error) + square);
  return {(logvar + square) / 2, size, {error * precision, -error * precision, (1 - square) / 2}};
}

const Reference kReferences[] = {
    {"gaussian_nll",
     3,
     {{-2, 2}, {-2, 2}, {-1.5, 1.5}},
     [](const double* in, double) { return gaussian(in[0] - in[1], in[2], std::exp(-in[2])); }},
    {"gaussian_nll_of_variance",
     3,
     {{-2, 2}, {-2, 2}, {0.05, 1.5}},
     [](const double* in, double bound) {
       const double variance = std::max(in[2], bound);
       Expected expected = gaussian(in[0] - in[1], std::log(variance), 1 / variance);
       expected.grads[2] /= variance;
       expected.size *= 1 + 1 / variance;
       return expected;
     }},
    {"laplace_nll",
     4,
     {{-2, 2}, {-2, 2}, {-1.5, 1.5}, {0, 1}},
     [](const double* in, double) {
       const double error = in[0] - in[1], precision = std::exp(-in[2]);
       const double scaled = (std::fabs(error) + in[3]) * precision;
       const double sign = error > 0 ? 1 : error < 0 ? -1 : 0;
       const double size = 2 + precision + scaled;
       return Expected{scaled + in[2], size, {sign * precision, -sign * precision, 1 - scaled, precision}};
     }},
    {"kl_standard_normal",
     2,
     {{-2, 2}, {-1.5, 1.5}},
     [](const double* in, double) {
       const double excess = std::expm1(in[1]), square = in[0] * in[0];
       return Expected{(square + excess - in[1]) / 2, 2 + square + std::fabs(excess), {in[0], excess / 2}};
     }},
    {"kl_normal",
     4,
     {{-2, 2}, {-1.5, 1.5}, {-2, 2}, {-1.5, 1.5}},
     [](const double* in, double) {
       const double error = in[0] - in[2], precision = std::exp(-in[3]), ratio = std::exp(in[1] - in[3]);
       const double pull = error * precision, square = error * pull;
       return Expected{((in[3] - in[1]) + ratio - 1 + square) / 2,
                       4 + ratio + square + std::fabs(pull),
                       {pull, (ratio - 1) / 2, -pull, (1 - ratio - square) / 2}};
     }},
};

// What the formula of that number should give.
const Reference& reference_of(int number) {
  const char* const name = scalar::Formulas::kNames[number];
  for (const Reference& reference : kReferences)
    if (std::strcmp(reference.name, name) == 0) return reference;
  std::fprintf(stderr, "formula %s is in math/formulas.h, but not among kReferences of %s\n", name, __FILE__);
  std::_Exit(1);
}

// A formula and its operands.
struct Elements {
  Extent e = extent;
  int number;
  const Reference& reference = reference_of(number);
  double parameter = uniform(0.01, 0.3);
  Input inputs[kMostInputs], weight;
  Output value, grads[kMostInputs];
  bool in_double = below(8) == 0;

  // `plain`: contiguous arrays of one dtype, which kernels can use as they are.
  explicit Elements(int number, bool plain = below(4) == 0) : number(number) {
    const bool doubles = below(4) == 0;
    const DType dtype = doubles ? DType::f64 : DType::f32;
    const auto operand = [&](double low, double high) {
      if (below(8) == 0) return ::number(uniform(low, high));
      if (plain) return input(e, dtype, contiguous(e), low, high);
      return input(e, below(8) ? any_float(doubles) : DType::u8, any_strides(e), low, high);
    };
    for (int k = 0; k < reference.inputs; ++k) inputs[k] = operand(reference.ranges[k].low, reference.ranges[k].high);
    weight.number = 1;  // if not given
    if (coin()) weight = operand(-1, 1);
    for (const Input& input : inputs) in_double |= input.makes_double();
    in_double |= weight.makes_double();
    do {
      const bool by_column = coin();
      for (int k = 0; k < reference.inputs; ++k)
        grads[k] = below(3) == 0 ? nullptr
                   : plain       ? std::make_unique<Array>(e, dtype, contiguous(e))
                                 : std::make_unique<Array>(e, any_float(true), gradient_strides(e, by_column));
    } while (!can_sum(e, task().grads));
  }

  ElementwiseTask task() const {
    ElementwiseTask task;
    task.formula = number;
    task.in_double = in_double;
    task.parameter = parameter;
    task.extent = e;
    task.weight = weight.operand();
    task.value = operand(value);
    for (int k = 0; k < kMostInputs; ++k) {
      task.inputs[k] = inputs[k].operand();
      task.grads[k] = operand(grads[k]);
    }
    return task;
  }

  // Compares the values, to each of which `constant` is added, and the gradients, which are times `factor`. Returns the
  // sums of each sample's weighted values, without constants.
  std::vector<Sum> check(double constant, double factor) const {
    static const char* const names[kMostInputs] = {"gradient 0", "gradient 1", "gradient 2", "gradient 3"};
    kernel = reference.name;
    extent = e;
    const double working = working_precision(in_double);
    std::vector<Sum> samples(static_cast<size_t>(e.batch)), sums[kMostInputs];
    for (int k = 0; k < kMostInputs; ++k)
      if (grads[k]) sums[k].resize(static_cast<size_t>(grads[k]->size()));
    for_elements(e, [&](int64_t b, int64_t o, int64_t i) {
      double in[kMostInputs];
      for (int k = 0; k < reference.inputs; ++k) {
        // Rounded as the kernels do: the sign of a difference is nothing to be a little off in.
        const double exact = inputs[k].at(b, o, i);
        in[k] = in_double ? exact : static_cast<double>(static_cast<float>(exact));
      }
      const Expected expected = reference.at(in, parameter);
      const double w = weight.at(b, o, i), size = std::fabs(w) * expected.size;
      samples[static_cast<size_t>(b)].add(w * expected.value, size);
      if (value)
        compare("value", *value, value->offset(b, o, i), w * expected.value + constant, size + constant, working);
      for (int k = 0; k < reference.inputs; ++k)
        if (grads[k])
          sums[k][static_cast<size_t>(grads[k]->offset(b, o, i))].add(factor * w * expected.grads[k],
                                                                      std::fabs(factor) * size);
    });
    for (int k = 0; k < reference.inputs; ++k)
      if (grads[k])
        for_elements(grads[k]->extent(), [&](int64_t b, int64_t o, int64_t i) {
          const int64_t at = grads[k]->offset(b, o, i);
          const Sum& sum = sums[k][static_cast<size_t>(at)];
          compare(names[k], *grads[k], at, sum.value, sum.size, working);
        });
    for (const Output* array : {&value, &grads[0], &grads[1], &grads[2], &grads[3]})
      if (*array && !(*array)->gaps_untouched()) fail("wrote between the elements of an output");
    return samples;
  }
};

int any_formula() {
  return static_cast<int>(below(scalar::Formulas::kSize));
}

// --- objectives -----------------------------------------------------------------------------------------------------

// A term: of a formula, or of values that are given.
struct AnyTerm {
  std::unique_ptr<Elements> elements;
  Input given;
  int64_t given_count = 0;
  double factor = coin() ? 1 : uniform(0.1, 1), constant = 0;
  Input coefficient;
  Output out;

  explicit AnyTerm(std::unique_ptr<Elements> of) : elements(std::move(of)) {
    if (coin()) constant = 0.9189385;
    coefficient.number = 1;  // if not given
    if (below(3)) coefficient = coin() ? ::number(uniform(0, 2)) : input({1, 1, 1}, any_float(true), {0, 0, 0}, 0, 2);
  }
  explicit AnyTerm(int64_t count) : AnyTerm(nullptr) {
    constant = 0;
    given_count = count;
    given = input({count, 1, 1}, any_float(true), {below(3), 0, 0}, 0, 3);
  }

  Term task() const {
    Term term;
    if (elements) term.elements = elements->task();
    term.given = given.operand();
    term.given_count = given_count;
    term.factor = factor;
    term.constant = constant;
    term.coefficient = coefficient.operand();
    term.out = operand(out);
    return term;
  }
  double working() const { return elements ? working_precision(elements->in_double) : 1e-14; }

  // Compares what there is of each element, and returns the sums: one for each sample, or one.
  std::vector<Sum> check(bool by_sample) const {
    std::vector<Sum> samples;
    if (elements) {
      samples = elements->check(constant, factor * coefficient.at(0, 0, 0));
      const double added = constant * static_cast<double>(elements->e.sample());
      for (Sum& sum : samples) sum.add(added, added);
    } else {
      for (int64_t b = 0; b < given_count; ++b) samples.push_back({given.at(b, 0, 0), given.at(b, 0, 0)});
    }
    std::vector<Sum> sums(by_sample ? samples.size() : 1);
    for (size_t b = 0; b < samples.size(); ++b)
      sums[by_sample ? b : 0].add(factor * samples[b].value, factor * samples[b].size);
    return sums;
  }
};

// Has the kernel make an objective of these terms, and compares everything that it gives.
void check_objective(std::vector<AnyTerm> terms, Values kind, int threads) {
  const bool by_sample = kind == Values::sample;
  const AnyTerm& first = terms.front();
  const int64_t values = !by_sample ? 1 : first.elements ? first.elements->e.batch : first.given_count;
  const auto result = [&](bool wanted) -> Output {
    if (!wanted || kind == Values::element) return nullptr;
    return std::make_unique<Array>(Extent{values, 1, 1}, any_float(true), Strides{1 + below(2), 0, 0});
  };
  const Output loss = result(true);
  ObjectiveTask task;
  for (AnyTerm& term : terms) {
    term.out = result(coin());
    task.terms[task.count++] = term.task();
  }
  task.values = kind;
  task.loss = operand(loss);
  kernels().objective(task, threads);

  std::vector<Sum> losses(static_cast<size_t>(values));
  double working = 0;
  for (const AnyTerm& term : terms) {
    const std::vector<Sum> sums = term.check(by_sample);
    if (kind == Values::element) return;
    const double coefficient = term.coefficient.at(0, 0, 0);
    working = std::max(working, term.working());
    for (size_t b = 0; b < losses.size(); ++b) {
      losses[b].add(coefficient * sums[b].value, coefficient * sums[b].size);
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
  auto elements = std::make_unique<Elements>(any_formula());
  if (below(4)) elements->value = output(extent, true);
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
    if (below(6))
      terms.emplace_back(std::make_unique<Elements>(any_formula()));
    else
      terms.emplace_back(by_sample ? batch : 1 + below(50));
  }
  check_objective(std::move(terms), by_sample ? Values::sample : Values::total, threads);
}

// Gradients so large that they are written past the caches: more than 24 MiB of them.
void test_past_caches(int threads) {
  for (int number = 0; number < scalar::Formulas::kSize; ++number) {
    const int64_t count = (int64_t{26} << 18) / reference_of(number).inputs;
    extent = number % 2 ? Extent{3, 1, count / 3} : Extent{1, 1, count};
    auto elements = std::make_unique<Elements>(number, true);
    for (int k = 0; k < elements->reference.inputs; ++k)
      elements->grads[k] = std::make_unique<Array>(extent, DType::f32, full(extent));
    check_objective(one_term(std::move(elements)), Values::total, threads);
  }
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

void test_latent(int threads) {
  const Extent e = extent, samples{e.batch, 1, 1};
  const bool doubles = below(4) == 0;
  const Input mu = input(e, any_float(doubles), full(e), -2, 2);
  const Input logvar = input(e, any_float(doubles), full(e), -2, 2);
  const auto seed = std::make_unique<int64_t>(static_cast<int64_t>(engine()));
  const bool noisy = below(4), seeded = noisy && below(4);
  Input noise, grad_z, grad_kl;
  if (noisy && !seeded) noise = input(e, any_float(doubles), any_strides(e), -3, 3);
  if (noisy && coin()) grad_z = input(e, any_float(doubles), any_strides(e), -1, 1);
  if (coin()) grad_kl = input(samples, any_float(doubles), {below(3), 0, 0}, -1, 1);
  const Output z = output(e, noisy && coin()), grad_mu = output(e, below(4)), grad_logvar = output(e, below(4));
  const Output kl = coin() ? std::make_unique<Array>(samples, any_float(true), Strides{1 + below(2), 0, 0}) : nullptr;

  LatentTask task;
  task.extent = e;
  // Where an element is in logical order: row-major, the channels_last of that, or anything.
  const std::vector<IndexStrides> orders = {
      {e.sample(), e.inner, 1}, {e.sample(), e.inner, 1}, {e.sample(), 1, e.outer}, {1, 7 * e.batch, e.batch}};
  task.index = one_of(orders);
  task.in_double = below(8) == 0;
  for (const Input* input : std::initializer_list<const Input*>{&mu, &logvar, &noise, &grad_z, &grad_kl})
    task.in_double |= input->makes_double();
  if (seeded) task.seed = seed.get();
  task.mu = mu.operand();
  task.logvar = logvar.operand();
  task.noise = noise.operand();
  task.grad_z = grad_z.operand();
  task.grad_kl = grad_kl.operand();
  task.z = operand(z);
  task.kl = operand(kl);
  task.grad_mu = operand(grad_mu);
  task.grad_logvar = operand(grad_logvar);
  kernels().latent(task, threads);

  const double working = working_precision(task.in_double);
  std::vector<double> totals(static_cast<size_t>(e.batch));
  for_elements(e, [&](int64_t b, int64_t o, int64_t i) {
    const int64_t index = b * task.index.batch + o * task.index.outer + i * task.index.inner;
    const double n = seeded ? noise_at(static_cast<uint64_t>(*seed), index) : noise.at(b, o, i);
    const double m = mu.at(b, o, i), l = logvar.at(b, o, i), gz = grad_z.at(b, o, i), gk = grad_kl.at(b, 0, 0);
    const double deviation = std::exp(l / 2) * n;
    totals[static_cast<size_t>(b)] += (m * m + std::expm1(l) - l) / 2;
    // The noise of a seed is single precision whatever the rest is.
    const double noise_error = seeded ? 1e-5 * std::exp(l / 2) : 0;
    if (z)
      compare("z", *z, z->offset(b, o, i), m + deviation, std::fabs(m) + std::fabs(deviation) + 1,
              working + noise_error);
    const double size = 1 + std::fabs(gz) * (1 + std::fabs(deviation)) + std::fabs(gk) * (std::fabs(m) + std::exp(l));
    const double error = working + std::fabs(gz) * noise_error;
    if (grad_mu) compare("d mu", *grad_mu, grad_mu->offset(b, o, i), gz + gk * m, size, error);
    if (grad_logvar)
      compare("d logvar", *grad_logvar, grad_logvar->offset(b, o, i), gz * deviation / 2 + gk * std::expm1(l) / 2, size,
              error);
  });
  for (int64_t b = 0; kl && b < e.batch; ++b) {
    const double expected = totals[static_cast<size_t>(b)];
    compare("kl", *kl, kl->offset(b, 0, 0), expected, 1 + expected, working);
  }
  for (const Output* array : {&z, &kl, &grad_mu, &grad_logvar})
    if (*array && !(*array)->gaps_untouched()) fail("wrote between the elements of an output");
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
  kernels().scale(task, threads);
  const double by = factor.at(0, 0, 0);
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
  try {
    kernels();
  } catch (const std::runtime_error& reason) {
    std::fprintf(stderr, "%s\n", reason.what());
    return 77;
  }
  for (int number = 0; number < scalar::Formulas::kSize; ++number) {
    const Reference& reference = reference_of(number);
    scalar::with_formula(number, [&](auto tag) {
      kernel = reference.name;
      if (decltype(tag)::type::kInputs != reference.inputs) fail("another number of inputs than the formula has");
    });
  }
  struct {
    const char* name;
    void (*test)(int threads);
  } const tests[] = {{"elements", test_elements},
                     {"objective", test_objective},
                     {"latent", test_latent},
                     {"normal", test_normal},
                     {"scale", test_scale}};
  __sanitizer_set_death_callback([] { fail("stopped by the sanitizer"); });
  for (case_number = 0; case_number < cases; ++case_number) {
    engine.seed(static_cast<uint64_t>(case_number));  // a case is the same whatever came before it
    extent = any_extent();
    const auto& [name, test] = tests[case_number % 5];
    kernel = name;
    test(1 + static_cast<int>(below(3)));
  }
  kernel = "past the caches";
  test_past_caches(2);
  if (most_threads < 3) fail("the kernels never used three threads");
  std::printf("%s: %" PRId64 " comparisons\n", kernels().isa, comparisons);
  return 0;
}
