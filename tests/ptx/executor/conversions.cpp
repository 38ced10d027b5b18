// cvt: between formats, with every rounding.
#include <cmath>
#include <limits>

#include "decoder.h"

namespace ptx {

namespace {

// What a conversion heeds; packed into an instruction's numbers.
struct Options {
  Rounding rounding = Rounding::nearest;
  bool to_integral = false, flushes = false, saturates = false, rectifies = false;

  explicit Options(const Instruction& i)
      : rounding(static_cast<Rounding>(i.number[0])),
        to_integral(i.number[1]),
        flushes(i.number[2] & 1),
        saturates(i.number[2] & 2),
        rectifies(i.number[2] & 4) {}
};

template <class T>
struct As {  // a format's name, as a type
  using type = T;
};

inline double wide(Half a) {
  return a.value();
}
inline double wide(Bfloat a) {
  return a.value();
}
inline double wide(float a) {
  return a;
}
inline double wide(double a) {
  return a;
}

// --- from floats ------------------------------------------------------------------------------------------------

template <class To>
To float_as(double value, const Options& options) {
  if constexpr (std::is_same_v<To, Half> || std::is_same_v<To, Bfloat>) {
    return To::of(value, options.rounding);
  } else if constexpr (std::is_same_v<To, float>) {
    if (options.rounding == Rounding::nearest) return canonical(static_cast<float>(value));
    const MachineRounding changed(options.rounding);
    volatile double given = value;
    return canonical(static_cast<float>(given));
  } else {
    return value;
  }
}

template <class To, class From>
void convert_float(Warp& warp, const Instruction& i, Mask mask) {
  const Options options(i);
  Vector<To> results;
  for (int l = 0; l < kLanes; ++l) {
    double value = wide(warp.at<From>(i.slot[1]).lane[l]);
    if (options.flushes && std::is_same_v<From, float>) value = flushed(static_cast<float>(value));
    if (options.to_integral) value = integral(value, options.rounding);
    if (options.saturates) value = between_0_and_1(value);
    if (options.rectifies && value < 0) value = 0;
    results.lane[l] = float_as<To>(value, options);
    if constexpr (std::is_same_v<To, float>)
      if (options.flushes) results.lane[l] = flushed(results.lane[l]);
  }
  warp.put(i.slot[0], results, mask);
}

// The usual ones, without options: loops that become vector code.
template <class To, class From, class F>
void convert_plainly(Warp& warp, const Instruction& i, Mask mask) {
  Vector<To> results;
  for (int l = 0; l < kLanes; ++l) results.lane[l] = F{}(warp.at<From>(i.slot[1]).lane[l]);
  warp.put(i.slot[0], results, mask);
}

template <class To, class From>
Handler plain_conversion() {
  if constexpr (std::is_same_v<To, Bfloat> && std::is_same_v<From, float>)
    return convert_plainly<To, From, decltype([](float a) { return Bfloat::of(a); })>;
  if constexpr (std::is_same_v<To, Half> && std::is_same_v<From, float>)
    return convert_plainly<To, From, decltype([](float a) { return Half::of(a); })>;
  if constexpr (std::is_same_v<To, float> && (std::is_same_v<From, Half> || std::is_same_v<From, Bfloat>))
    return convert_plainly<To, From, decltype([](From a) { return canonical(a.value()); })>;
  if constexpr (std::is_same_v<To, double> && std::is_same_v<From, float>)
    return convert_plainly<To, From, decltype([](float a) { return static_cast<double>(a); })>;
  if constexpr (std::is_same_v<To, float> && std::is_same_v<From, double>)
    return convert_plainly<To, From, decltype([](double a) { return canonical(static_cast<float>(a)); })>;
  return nullptr;
}

template <class To, class From>
To integer_as(double value, const Options& options) {
  if (value != value) {
    if constexpr (std::is_same_v<From, double> || sizeof(To) == 8)
      return static_cast<To>(std::make_unsigned_t<To>{1} << (8 * sizeof(To) - 1));
    return 0;
  }
  value = integral(value, options.rounding);
  // Conversions clamp. The bounds as doubles: the upper one may be one too many.
  constexpr To least = std::numeric_limits<To>::min(), most = std::numeric_limits<To>::max();
  if (value <= static_cast<double>(least)) return least;
  if (value >= static_cast<double>(most)) return most;
  return static_cast<To>(value);
}

template <class To, class From>
void convert_to_integer(Warp& warp, const Instruction& i, Mask mask) {
  const Options options(i);
  Vector<To> results;
  for (int l = 0; l < kLanes; ++l) {
    double value = wide(warp.at<From>(i.slot[1]).lane[l]);
    if (options.flushes && std::is_same_v<From, float>) value = flushed(static_cast<float>(value));
    results.lane[l] = integer_as<To, From>(value, options);
  }
  warp.put(i.slot[0], results, mask);
}

// --- from integers ----------------------------------------------------------------------------------------------

// A double on the same side of all ties and values of 16-bit formats: what is cut off sets the last bit.
template <class From>
double odd_double(From value) {
  uint64_t size = value < From{0} ? 0 - static_cast<uint64_t>(value) : static_cast<uint64_t>(value);
  int shift = 0;
  for (; size >> shift >> 52; ++shift) {
  }
  const uint64_t kept = size >> shift;
  const bool is_exact = kept << shift == size;
  const double result = std::ldexp(static_cast<double>(is_exact ? kept : kept | 1), shift);
  return value < From{0} ? -result : result;
}

template <class To, class From>
void convert_integer_to_float(Warp& warp, const Instruction& i, Mask mask) {
  const Options options(i);
  Vector<To> results;
  if constexpr (std::is_same_v<To, Half> || std::is_same_v<To, Bfloat>) {
    for (int l = 0; l < kLanes; ++l)
      results.lane[l] = To::of(odd_double(warp.at<From>(i.slot[1]).lane[l]), options.rounding);
  } else {
    const MachineRounding changed(options.rounding);
    for (int l = 0; l < kLanes; ++l) {
      const volatile From value = warp.at<From>(i.slot[1]).lane[l];
      results.lane[l] = static_cast<To>(value);
      if (options.saturates) results.lane[l] = between_0_and_1(results.lane[l]);
    }
  }
  warp.put(i.slot[0], results, mask);
}

template <class To, class From>
void convert_integer(Warp& warp, const Instruction& i, Mask mask) {
  const bool saturates = Options(i).saturates;
  constexpr __int128 least = std::numeric_limits<To>::min(), most = std::numeric_limits<To>::max();
  Vector<To> results;
  for (int l = 0; l < kLanes; ++l) {
    const From value = warp.at<From>(i.slot[1]).lane[l];
    results.lane[l] = static_cast<To>(value);
    if (saturates && static_cast<__int128>(value) < least) results.lane[l] = static_cast<To>(least);
    if (saturates && static_cast<__int128>(value) > most) results.lane[l] = static_cast<To>(most);
  }
  warp.put(i.slot[0], results, mask);
}

// --- decoding ---------------------------------------------------------------------------------------------------

template <class F>
bool with_format(const std::string& type, F f) {
  if (type == "f16") return f(As<Half>{}), true;
  if (type == "bf16") return f(As<Bfloat>{}), true;
  if (type == "f32") return f(As<float>{}), true;
  if (type == "f64") return f(As<double>{}), true;
  return with_integer(type, [&](auto zero) { f(As<decltype(zero)>{}); });
}

template <class T>
constexpr bool kIsFloat = std::is_floating_point_v<T> || std::is_same_v<T, Half> || std::is_same_v<T, Bfloat>;

template <class To, class From>
Handler conversion(bool is_plain) {
  if constexpr (kIsFloat<To> && kIsFloat<From>) {
    const Handler plain = is_plain ? plain_conversion<To, From>() : nullptr;
    return plain ? plain : convert_float<To, From>;
  } else if constexpr (kIsFloat<From>) {
    return convert_to_integer<To, From>;
  } else if constexpr (kIsFloat<To>) {
    return convert_integer_to_float<To, From>;
  } else {
    return convert_integer<To, From>;
  }
}

// Two floats into one register, the first one above.
template <class T>
void convert_pair(Warp& warp, const Instruction& i, Mask mask) {
  const Options options(i);
  const auto narrowed = [&](float value) {
    if (options.rectifies && value < 0) value = 0;
    return options.rounding == Rounding::nearest ? T::of(value).bits
                                                 : T::of(static_cast<double>(value), options.rounding).bits;
  };
  Vector<uint32_t> results;
  for (int l = 0; l < kLanes; ++l)
    results.lane[l] =
        uint32_t{narrowed(warp.at<float>(i.slot[1]).lane[l])} << 16 | narrowed(warp.at<float>(i.slot[2]).lane[l]);
  warp.put(i.slot[0], results, mask);
}

}  // namespace

bool decode_conversions(Decoder& d) {
  if (d.name() != "cvt") return false;
  const std::vector<std::string>& opcode = d.statement().opcode;
  if (opcode.size() < 3) return false;
  const std::string &from = opcode.back(), &to = opcode[opcode.size() - 2];
  const std::string integral = d.statement().one_of({"rni", "rzi", "rmi", "rpi"});
  const std::string rounding = d.statement().one_of({"rn", "rz", "rm", "rp"});
  if (!d.statement().one_of({"rna", "rs", "pack", "satfinite"}).empty()) d.unknown();
  Instruction& i = d.instruction;
  i.number[0] = static_cast<int>(rounding_of(integral.empty() ? rounding : integral));
  i.number[1] = !integral.empty();
  i.number[2] = (d.has("ftz") ? 1 : 0) | (d.has("sat") ? 2 : 0) | (d.has("relu") ? 4 : 0);
  if (to == "f16x2" || to == "bf16x2") {
    if (from != "f32" || d.operands() != 3) d.unknown();
    i.slot[0] = d.destination(0, 4);
    i.slot[1] = d.source(1, 4);
    i.slot[2] = d.source(2, 4);
    d.runs(to == "f16x2" ? convert_pair<Half> : convert_pair<Bfloat>);
    return true;
  }
  const bool is_plain = i.number[0] == 0 && i.number[1] == 0 && i.number[2] == 0;
  bool is_known = false;
  with_format(to, [&](auto to_tag) {
    with_format(from, [&](auto from_tag) {
      using To = typename decltype(to_tag)::type;
      using From = typename decltype(from_tag)::type;
      i.slot[0] = d.destination(0, sizeof(To), to[0] == 's');
      i.slot[1] = d.source(1, sizeof(From));
      d.runs(conversion<To, From>(is_plain));
      is_known = true;
    });
  });
  return is_known;
}

}  // namespace ptx
