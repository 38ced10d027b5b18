// The number formats of GPUs, and rounding to them.
#pragma once

#include <cfenv>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace ptx {

template <class To, class From>
To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "bits of one size");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

enum class Rounding { nearest, zero, down, up };

// Of modifiers such as rn and rni.
inline Rounding rounding_of(const std::string& modifier) {
  if (modifier.size() < 2) return Rounding::nearest;
  return modifier[1] == 'z'   ? Rounding::zero
         : modifier[1] == 'm' ? Rounding::down
         : modifier[1] == 'p' ? Rounding::up
                              : Rounding::nearest;
}

// The machine's rounding for as long as it lives.
class MachineRounding {
 public:
  explicit MachineRounding(Rounding rounding) : before_(std::fegetround()) {
    static constexpr int modes[] = {FE_TONEAREST, FE_TOWARDZERO, FE_DOWNWARD, FE_UPWARD};
    std::fesetround(modes[static_cast<int>(rounding)]);
  }
  ~MachineRounding() { std::fesetround(before_); }
  MachineRounding(const MachineRounding&) = delete;
  MachineRounding& operator=(const MachineRounding&) = delete;

 private:
  int before_;
};

inline double integral(double value, Rounding rounding) {
  switch (rounding) {
    case Rounding::nearest:
      return std::nearbyint(value);
    case Rounding::zero:
      return std::trunc(value);
    case Rounding::down:
      return std::floor(value);
    default:
      return std::ceil(value);
  }
}

// The bits of a format of 16 bits: a sign, an exponent of that bias, a mantissa of so many bits.
template <int mantissa, int bias>
uint16_t rounded_to_16_bits(double value, Rounding rounding) {
  constexpr int infinity = (2 * bias + 1) << mantissa;
  if (value != value) return 0x7FFF;
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const double size = std::fabs(value);
  if (size == 0) return sign;
  if (std::isinf(size)) return static_cast<uint16_t>(sign | infinity);
  int exponent = std::ilogb(size);
  if (exponent < 1 - bias) exponent = 1 - bias;
  if (exponent > bias + 1) exponent = bias + 1;
  // Of the size, which the sign may turn around.
  Rounding of_size = rounding;
  if (rounding == Rounding::down) of_size = sign ? Rounding::up : Rounding::zero;
  if (rounding == Rounding::up) of_size = sign ? Rounding::zero : Rounding::up;
  const double quanta = integral(std::ldexp(size, mantissa - exponent), of_size);
  const double bits = std::ldexp(exponent + bias - 1, mantissa) + quanta;
  if (bits < infinity) return static_cast<uint16_t>(sign | static_cast<uint16_t>(bits));
  return static_cast<uint16_t>(sign | (of_size == Rounding::zero ? infinity - 1 : infinity));
}

struct Half {
  uint16_t bits;

  static constexpr float kLeastNormal = 6.103515625e-05f;
  float value() const {
#if defined(__F16C__)
    return _cvtsh_ss(bits);
#else
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    float size = exponent == 31  ? (fraction ? NAN : INFINITY)
                 : exponent == 0 ? std::ldexp(static_cast<float>(fraction), -24)
                                 : std::ldexp(static_cast<float>(1024 + fraction), exponent - 25);
    return bits & 0x8000 ? -size : size;
#endif
  }
  static Half of(double value, Rounding rounding = Rounding::nearest) {
    return {rounded_to_16_bits<10, 15>(value, rounding)};
  }
  static Half of(float value) {
#if defined(__F16C__)
    return {value == value ? static_cast<uint16_t>(_cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT)) : uint16_t{0x7FFF}};
#else
    return of(static_cast<double>(value));
#endif
  }
};

struct Bfloat {
  uint16_t bits;

  static constexpr float kLeastNormal = 1.17549435e-38f;
  float value() const { return bits_as<float>(uint32_t{bits} << 16); }
  static Bfloat of(double value, Rounding rounding = Rounding::nearest) {
    return {rounded_to_16_bits<7, 127>(value, rounding)};
  }
  static Bfloat of(float value) {
    const auto whole = bits_as<uint32_t>(value);
    const uint32_t nearest = (whole + 0x7FFF + (whole >> 16 & 1)) >> 16;
    return {static_cast<uint16_t>(value == value ? nearest : 0x7FFF)};
  }
};

inline float flushed(float value) {
  return std::fabs(value) < 1.17549435e-38f ? std::copysign(0.0f, value) : value;
}
inline float canonical(float value) {
  return value == value ? value : bits_as<float>(uint32_t{0x7FFFFFFF});
}
inline float between_0_and_1(float value) {
  return value > 0 ? (value < 1 ? value : 1) : 0;  // NaN becomes 0
}
inline double between_0_and_1(double value) {
  return value > 0 ? (value < 1 ? value : 1) : 0;
}

}  // namespace ptx
