// Arithmetic in floating point.
#include <algorithm>
#include <cmath>
#include <limits>

#include "decoder.h"
#include "numbers.h"

namespace ptx {

int approximation_error = 0;

namespace {

// --- single and double precision --------------------------------------------------------------------------------

// A function of floats with the modifiers .ftz and .sat.
template <class F, bool flushes, bool saturates>
struct Single {
  template <class... A>
  float operator()(A... a) const {
    float result = flushes ? flushed(F{}(flushed(a)...)) : F{}(a...);
    result = canonical(result);
    return saturates ? between_0_and_1(result) : result;
  }
};

template <class... S, class F>
void each_single(Decoder& d, F) {
  const bool flushes = d.has("ftz"), saturates = d.has("sat");
  const Rounding rounding = rounding_of(d.statement().one_of({"rz", "rm", "rp"}));
  const auto with = [&](auto function) { d.each_lane_rounded<float, S...>(function, rounding); };
  if (flushes)
    saturates ? with(Single<F, true, true>{}) : with(Single<F, true, false>{});
  else
    saturates ? with(Single<F, false, true>{}) : with(Single<F, false, false>{});
}

// The same, but that the function takes operands of any kinds, as they are.
template <class... S, class F>
void each_single_of(Decoder& d, F) {
  if (d.has("ftz")) d.unknown();
  struct Saturating {
    float operator()(S... a) const { return between_0_and_1(canonical(F{}(a...))); }
  };
  struct Plain {
    float operator()(S... a) const { return canonical(F{}(a...)); }
  };
  const Rounding rounding = rounding_of(d.statement().one_of({"rz", "rm", "rp"}));
  if (d.has("sat"))
    d.each_lane_rounded<float, S...>(Saturating{}, rounding);
  else
    d.each_lane_rounded<float, S...>(Plain{}, rounding);
}

template <class... S, class F>
void each_double(Decoder& d, F f) {
  d.each_lane_rounded<double, S...>(f, rounding_of(d.statement().one_of({"rz", "rm", "rp"})));
}

// --- half precision ---------------------------------------------------------------------------------------------

// A function of values in a format of 16 bits, computed in double and rounded once.
template <class F, class T, bool flushes>
struct Narrow {
  static double taken(T number) {
    const float value = number.value();
    return flushes && std::fabs(value) < T::kLeastNormal ? std::copysign(0.0, value) : value;
  }
  template <class... A>
  static T compute(A... a) {
    const T result = T::of(static_cast<double>(F{}(taken(a)...)));
    if (flushes && std::fabs(result.value()) < T::kLeastNormal) return {static_cast<uint16_t>(result.bits & 0x8000)};
    return result;
  }
  template <class... A>
  uint16_t operator()(A... a) const {
    return compute(T{static_cast<uint16_t>(a)}...).bits;
  }
};
template <class F, class T, bool flushes>
struct NarrowPair {
  template <class... A>
  uint32_t operator()(A... a) const {
    const uint32_t low = Narrow<F, T, flushes>::compute(T{static_cast<uint16_t>(a)}...).bits;
    return low | uint32_t{Narrow<F, T, flushes>::compute(T{static_cast<uint16_t>(a >> 16)}...).bits} << 16;
  }
};

template <class F>
struct Saturated {
  template <class... A>
  double operator()(A... a) const {
    return between_0_and_1(static_cast<double>(F{}(a...)));
  }
};
template <class F>
struct Rectified {
  template <class... A>
  double operator()(A... a) const {
    const double result = static_cast<double>(F{}(a...));
    return result < 0 ? 0 : result;
  }
};

// Of so many operands.
template <int count, class T, bool flushes, class F>
void each_narrow_as(Decoder& d, F) {
  using One = Narrow<F, T, flushes>;
  using Two = NarrowPair<F, T, flushes>;
  using U = uint16_t;
  using W = uint32_t;
  const bool in_pairs = d.type().back() == '2';
  if constexpr (count == 1)
    in_pairs ? d.each_lane<W, W>(Two{}) : d.each_lane<U, U>(One{});
  else if constexpr (count == 2)
    in_pairs ? d.each_lane<W, W, W>(Two{}) : d.each_lane<U, U, U>(One{});
  else
    in_pairs ? d.each_lane<W, W, W, W>(Two{}) : d.each_lane<U, U, U, U>(One{});
}

template <int count, class F>
void each_narrow(Decoder& d, F f) {
  const auto with = [&](auto function) {
    if (d.type()[0] == 'b')
      each_narrow_as<count, Bfloat, false>(d, function);
    else if (d.has("ftz"))
      each_narrow_as<count, Half, true>(d, function);
    else
      each_narrow_as<count, Half, false>(d, function);
  };
  if (d.has("sat"))
    with(Saturated<F>{});
  else if (d.has("relu"))
    with(Rectified<F>{});
  else
    with(f);
}

bool is_narrow(const std::string& type) {
  return type == "f16" || type == "bf16" || type == "f16x2" || type == "bf16x2";
}

// --- operations that all formats have ---------------------------------------------------------------------------

// The smaller or larger one; a number rather than NaN, and minus zero below zero.
template <class T>
T least(T a, T b) {
  if (a != a) return b;
  if (b != b) return a;
  if (a == b) return std::signbit(a) ? a : b;
  return a < b ? a : b;
}
template <class T>
T greatest(T a, T b) {
  if (a != a) return b;
  if (b != b) return a;
  if (a == b) return std::signbit(a) ? b : a;
  return a > b ? a : b;
}
// NaN if one is NaN.
template <class T>
T least_or_nan(T a, T b) {
  return a != a || b != b ? std::numeric_limits<T>::quiet_NaN() : least(a, b);
}
template <class T>
T greatest_or_nan(T a, T b) {
  return a != a || b != b ? std::numeric_limits<T>::quiet_NaN() : greatest(a, b);
}

template <class F>
void binary(Decoder& d, F f) {
  if (d.type() == "f32")
    each_single<float, float>(d, f);
  else if (d.type() == "f64")
    each_double<double, double>(d, f);
  else
    each_narrow<2>(d, f);
}

bool decode_extremes(Decoder& d) {
  const bool is_least = d.name() == "min";
  if (d.has("xorsign")) {
    // Of the sizes, with the product's sign.
    const auto with = [&](auto of) {
      binary(d, [](auto a, auto b) {
        const auto sign = std::signbit(a) != std::signbit(b) ? -1 : 1;
        return std::copysign(decltype(of){}(std::fabs(a), std::fabs(b)), static_cast<decltype(a)>(sign));
      });
    };
    if (d.has("NaN"))
      is_least ? with([](auto a, auto b) { return least_or_nan(a, b); })
               : with([](auto a, auto b) { return greatest_or_nan(a, b); });
    else
      is_least ? with([](auto a, auto b) { return least(a, b); }) : with([](auto a, auto b) { return greatest(a, b); });
    return true;
  }
  if (d.operands() == 4) {
    const auto with = [&](auto of) {
      each_single<float, float, float>(
          d, [](float a, float b, float c) { return decltype(of){}(decltype(of){}(a, b), c); });
    };
    if (d.type() != "f32") return false;
    if (d.has("NaN"))
      is_least ? with([](auto a, auto b) { return least_or_nan(a, b); })
               : with([](auto a, auto b) { return greatest_or_nan(a, b); });
    else
      is_least ? with([](auto a, auto b) { return least(a, b); }) : with([](auto a, auto b) { return greatest(a, b); });
    return true;
  }
  if (d.has("NaN"))
    is_least ? binary(d, [](auto a, auto b) { return least_or_nan(a, b); })
             : binary(d, [](auto a, auto b) { return greatest_or_nan(a, b); });
  else
    is_least ? binary(d, [](auto a, auto b) { return least(a, b); })
             : binary(d, [](auto a, auto b) { return greatest(a, b); });
  return true;
}

bool decode_signs(Decoder& d) {
  const std::string& name = d.name();
  const std::string& type = d.type();
  if (is_narrow(type)) {
    const bool in_pairs = type.back() == '2';
    // On the bits: NaN keeps its own.
    if (name == "neg")
      in_pairs ? d.each_lane<uint32_t, uint32_t>([](uint32_t a) { return a ^ 0x80008000u; })
               : d.each_lane<uint16_t, uint16_t>([](uint16_t a) { return static_cast<uint16_t>(a ^ 0x8000); });
    else
      in_pairs ? d.each_lane<uint32_t, uint32_t>([](uint32_t a) { return a & 0x7FFF7FFFu; })
               : d.each_lane<uint16_t, uint16_t>([](uint16_t a) { return static_cast<uint16_t>(a & 0x7FFF); });
  } else if (type == "f32") {
    if (d.has("ftz"))
      name == "neg" ? d.each_lane<float, float>([](float a) { return -flushed(a); })
                    : d.each_lane<float, float>([](float a) { return std::fabs(flushed(a)); });
    else
      name == "neg" ? d.each_lane<float, float>([](float a) { return -a; })
                    : d.each_lane<float, float>([](float a) { return std::fabs(a); });
  } else {
    name == "neg" ? d.each_lane<double, double>([](double a) { return -a; })
                  : d.each_lane<double, double>([](double a) { return std::fabs(a); });
  }
  return true;
}

// The same function of both floats of a pair, as chips from sm_100 on have it.
bool decode_pair_of_singles(Decoder& d) {
  const auto with = [&](auto f) {
    using F = decltype(f);
    struct Both {
      static float low(uint64_t pair) { return bits_as<float>(static_cast<uint32_t>(pair)); }
      static float high(uint64_t pair) { return bits_as<float>(static_cast<uint32_t>(pair >> 32)); }
      uint64_t operator()(uint64_t a, uint64_t b, uint64_t c) const {
        const auto pair = [](float x, float y) {
          return uint64_t{bits_as<uint32_t>(canonical(y))} << 32 | bits_as<uint32_t>(canonical(x));
        };
        return pair(F{}(low(a), low(b), low(c)), F{}(high(a), high(b), high(c)));
      }
      uint64_t operator()(uint64_t a, uint64_t b) const { return (*this)(a, b, 0); }
    };
    const Rounding rounding = rounding_of(d.statement().one_of({"rz", "rm", "rp"}));
    if (d.operands() == 4)
      d.each_lane_rounded<uint64_t, uint64_t, uint64_t, uint64_t>(Both{}, rounding);
    else
      d.each_lane_rounded<uint64_t, uint64_t, uint64_t>(Both{}, rounding);
  };
  if (d.has("ftz")) d.unknown();
  if (d.name() == "add")
    with([](float a, float b, float) { return a + b; });
  else if (d.name() == "sub")
    with([](float a, float b, float) { return a - b; });
  else if (d.name() == "mul")
    with([](float a, float b, float) { return a * b; });
  else if (d.name() == "fma")
    with([](float a, float b, float c) { return std::fma(a, b, c); });
  else
    return false;
  return true;
}

bool decode_arithmetic(Decoder& d) {
  const std::string& name = d.name();
  if (name == "add") {
    binary(d, [](auto a, auto b) { return a + b; });
  } else if (name == "sub") {
    binary(d, [](auto a, auto b) { return a - b; });
  } else if (name == "mul") {
    binary(d, [](auto a, auto b) { return a * b; });
  } else if (name == "fma" || name == "mad") {
    const auto f = [](auto a, auto b, auto c) { return std::fma(a, b, c); };
    if (d.type() == "f32")
      each_single<float, float, float>(d, f);
    else if (d.type() == "f64")
      each_double<double, double, double>(d, f);
    else
      each_narrow<3>(d, f);
  } else {
    return false;
  }
  return true;
}

// Sums of a float and a number of half precision, as chips from sm_100 on have them.
bool decode_mixed(Decoder& d) {
  const std::vector<std::string>& opcode = d.statement().opcode;
  const bool is_known = d.name() == "add" || d.name() == "sub" || d.name() == "fma";
  if (!is_known || opcode[opcode.size() - 2] != "f32" || !is_narrow(d.type())) return false;
  const auto with = [&](auto type) {
    using T = decltype(type);
    if (d.name() == "add")
      each_single_of<uint16_t, float>(d, [](uint16_t a, float c) { return T{a}.value() + c; });
    else if (d.name() == "sub")
      each_single_of<uint16_t, float>(d, [](uint16_t a, float c) { return T{a}.value() - c; });
    else
      each_single_of<uint16_t, uint16_t, float>(
          d, [](uint16_t a, uint16_t b, float c) { return std::fma(T{a}.value(), T{b}.value(), c); });
  };
  d.type() == "bf16" ? with(Bfloat{}) : with(Half{});
  return true;
}

// --- functions --------------------------------------------------------------------------------------------------

// What an approximate function gives: the nearest float, or one nearby, which depends on the argument alone. Units are
// those of the last place; but below 1, if there is a grain, of that.
float approximate(double exact, uint32_t argument, double grain = 0) {
  const auto nearest = static_cast<float>(exact);
  if (approximation_error == 0 || !std::isfinite(nearest) || nearest == 0) return nearest;
  const auto choices = static_cast<uint32_t>(2 * approximation_error + 1);
  const int off = static_cast<int>((argument * 2654435761u >> 16) % choices) - approximation_error;
  if (grain > 0 && std::abs(nearest) < 1) return static_cast<float>(exact + off * grain);
  const auto bits = bits_as<uint32_t>(nearest) + static_cast<uint32_t>(off);
  const auto found = bits_as<float>(bits);
  return std::isfinite(found) && std::signbit(found) == std::signbit(nearest) ? found : nearest;
}

constexpr int kNoGrain = 1;  // among logarithms to base 2 of grains, which are negative

template <class F, int log_grain>
struct Approximate {
  float operator()(float a) const {
    const double exact = F{}(static_cast<double>(a));
    // Powers of two of zero are one on every chip.
    if (a == 0) return static_cast<float>(exact);
    return approximate(exact, bits_as<uint32_t>(a), log_grain == kNoGrain ? 0 : std::ldexp(1.0, log_grain));
  }
};

template <int log_grain = kNoGrain, class F>
bool decode_function(Decoder& d, F) {
  const std::string& type = d.type();
  if (type == "f32")
    each_single<float>(d, Approximate<F, log_grain>{});
  else if (is_narrow(type))
    each_narrow<1>(d, [](double a) { return F{}(a); });
  else
    return false;
  return true;
}

bool decode_roots_and_quotients(Decoder& d) {
  const std::string& name = d.name();
  const bool is_approximate = d.has("approx") || d.has("full");
  if (d.type() == "f64") {
    if (name == "div")
      each_double<double, double>(d, [](double a, double b) { return a / b; });
    else if (name == "sqrt")
      each_double<double>(d, [](double a) { return std::sqrt(a); });
    else if (name == "rcp" && !is_approximate)
      each_double<double>(d, [](double a) { return 1 / a; });
    else if (name == "rcp")  // the high word alone
      each_double<double>(d,
                          [](double a) { return bits_as<double>(bits_as<uint64_t>(1 / a) & ~uint64_t{0xFFFFFFFF}); });
    else if (name == "rsqrt")
      each_double<double>(d, [](double a) { return 1 / std::sqrt(a); });
    else
      return false;
    return true;
  }
  if (d.type() != "f32") return false;
  if (name == "div") {
    if (is_approximate)
      each_single<float, float>(d, [](float a, float b) {
        return approximate(static_cast<double>(a) / static_cast<double>(b),
                           bits_as<uint32_t>(a) ^ bits_as<uint32_t>(b));
      });
    else
      each_single<float, float>(d, [](float a, float b) { return a / b; });
  } else if (name == "sqrt") {
    if (is_approximate) return decode_function(d, [](double a) { return std::sqrt(a); });
    each_single<float>(d, [](float a) { return std::sqrt(a); });
  } else if (name == "rcp") {
    if (is_approximate) return decode_function(d, [](double a) { return 1 / a; });
    each_single<float>(d, [](float a) { return 1 / a; });
  } else if (name == "rsqrt") {
    return decode_function(d, [](double a) { return 1 / std::sqrt(a); });
  } else {
    return false;
  }
  return true;
}

bool decode_functions(Decoder& d) {
  const std::string& name = d.name();
  if (name == "ex2") return decode_function(d, [](double a) { return std::exp2(a); });
  // The errors of these do not get smaller with their results.
  if (name == "lg2") return decode_function<-23>(d, [](double a) { return std::log2(a); });
  if (name == "sin") return decode_function<-22>(d, [](double a) { return std::sin(a); });
  if (name == "cos") return decode_function<-22>(d, [](double a) { return std::cos(a); });
  if (name == "tanh") return decode_function(d, [](double a) { return std::tanh(a); });
  return decode_roots_and_quotients(d);
}

bool decode_copysign(Decoder& d) {
  if (d.type() == "f32")
    d.each_lane<float, float, float>([](float a, float b) { return std::copysign(b, a); });
  else
    d.each_lane<double, double, double>([](double a, double b) { return std::copysign(b, a); });
  return true;
}

}  // namespace

bool decode_floats(Decoder& d) {
  const std::string& name = d.name();
  const std::string& type = d.type();
  if (type == "f32x2") return decode_pair_of_singles(d);
  if (type != "f32" && type != "f64" && !is_narrow(type)) return false;
  if (decode_mixed(d)) return true;
  if (name == "min" || name == "max") return decode_extremes(d);
  if (name == "neg" || name == "abs") return decode_signs(d);
  if (name == "copysign") return decode_copysign(d);
  return decode_arithmetic(d) || decode_functions(d);
}

}  // namespace ptx
