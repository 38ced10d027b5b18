// Integer arithmetic, logic, shifts and fields of bits.
#include <algorithm>
#include <cstdlib>
#include <limits>
#include <type_traits>

#include "decoder.h"

namespace ptx {

namespace {

bool is_integer(const std::string& type) {
  static const char* const types[] = {"u8", "s8", "b8", "u16", "s16", "b16", "u32", "s32", "b32", "u64", "s64", "b64"};
  return std::any_of(std::begin(types), std::end(types), [&](const char* known) { return type == known; });
}

// Of twice the size, for whole products.
template <class T>
struct Wide;
template <>
struct Wide<uint8_t> {
  using type = uint16_t;
};
template <>
struct Wide<int8_t> {
  using type = int16_t;
};
template <>
struct Wide<uint16_t> {
  using type = uint32_t;
};
template <>
struct Wide<int16_t> {
  using type = int32_t;
};
template <>
struct Wide<uint32_t> {
  using type = uint64_t;
};
template <>
struct Wide<int32_t> {
  using type = int64_t;
};
template <>
struct Wide<uint64_t> {
  using type = unsigned __int128;
};
template <>
struct Wide<int64_t> {
  using type = __int128;
};

template <class T>
constexpr int kBits = 8 * sizeof(T);
template <class T>
T high_product(T a, T b) {
  using W = typename Wide<T>::type;
  return static_cast<T>(static_cast<W>(a) * static_cast<W>(b) >> kBits<T>);
}
// Arithmetic that wraps around; in 64 bits, so that no small type is promoted to one that overflows.
template <class T>
T low_product(T a, T b) {
  return static_cast<T>(static_cast<uint64_t>(a) * static_cast<uint64_t>(b));
}
template <class T>
T sum_of(T a, T b) {
  using U = std::make_unsigned_t<T>;
  return static_cast<T>(static_cast<U>(static_cast<U>(a) + static_cast<U>(b)));
}
template <class T>
T difference_of(T a, T b) {
  using U = std::make_unsigned_t<T>;
  return static_cast<T>(static_cast<U>(static_cast<U>(a) - static_cast<U>(b)));
}
// As on the hardware, division by zero gives all ones.
template <class T>
T quotient(T a, T b) {
  if (b == 0) return static_cast<T>(~T{0});
  if (std::is_signed_v<T> && b == static_cast<T>(-1)) return difference_of<T>(0, a);
  return static_cast<T>(a / b);
}
template <class T>
T remainder_of(T a, T b) {
  if (b == 0) return a;
  if (std::is_signed_v<T> && b == static_cast<T>(-1)) return 0;
  return static_cast<T>(a % b);
}

int32_t saturated(int64_t value) {
  const int64_t low = std::numeric_limits<int32_t>::min(), high = std::numeric_limits<int32_t>::max();
  return static_cast<int32_t>(std::clamp(value, low, high));
}

// --- sums and products ------------------------------------------------------------------------------------------

// Both halves of 32 bits, by a function of halves.
template <class T, class F>
void each_half(Decoder& d, F) {
  d.each_lane<uint32_t, uint32_t, uint32_t>([](uint32_t a, uint32_t b) {
    const auto of = [&](int shift) {
      const auto value = F{}(static_cast<T>(a >> shift), static_cast<T>(b >> shift));
      return static_cast<uint32_t>(static_cast<uint16_t>(value)) << shift;
    };
    return of(0) | of(16);
  });
}

bool decode_pairs(Decoder& d) {
  const std::string& name = d.name();
  const bool is_signed = d.type() == "s16x2";
  if (!is_signed && d.type() != "u16x2") return false;
  if (name == "add") {
    each_half<uint16_t>(d, [](auto a, auto b) { return a + b; });
  } else if (name == "sub") {
    each_half<uint16_t>(d, [](auto a, auto b) { return a - b; });
  } else if (name == "min") {
    const auto f = [](auto a, auto b) { return std::min(a, b); };
    is_signed ? each_half<int16_t>(d, f) : each_half<uint16_t>(d, f);
  } else if (name == "max") {
    const auto f = [](auto a, auto b) { return std::max(a, b); };
    is_signed ? each_half<int16_t>(d, f) : each_half<uint16_t>(d, f);
  } else {
    return false;
  }
  return true;
}

// a·b (low or high) + c, or a + b, or a − b: with the carry taken in, put out, or both.
template <class T>
bool decode_with_carry(Decoder& d, T) {
  const std::string& name = d.name();
  const bool takes = name == "addc" || name == "subc" || name == "madc";
  const bool is_product = name == "mad" || name == "madc";
  Instruction& i = d.instruction;
  i.number[0] = takes;
  i.number[1] = d.has("cc");
  i.number[2] = is_product ? d.has("hi") ? 2 : 1 : 0;
  i.number[3] = name == "sub" || name == "subc";
  i.slot[0] = d.destination(0, sizeof(T));
  i.slot[1] = d.source(1, sizeof(T));
  i.slot[2] = d.source(2, sizeof(T));
  i.slot[3] = is_product ? d.source(3, sizeof(T)) : i.slot[2];
  i.slot[4] = d.carry();
  d.runs([](Warp& warp, const Instruction& i, Mask mask) {
    using U = std::make_unsigned_t<T>;
    Vector<T> results;
    Mask carries = 0;
    const Mask before = i.number[0] ? warp.predicate(i.slot[4]) : 0;
    for (int l = 0; l < kLanes; ++l) {
      const T x = warp.at<T>(i.slot[1]).lane[l], y = warp.at<T>(i.slot[2]).lane[l];
      const unsigned carry = before >> l & 1;
      unsigned __int128 whole = 0;
      if (i.number[3]) {
        const unsigned __int128 taken = static_cast<unsigned __int128>(static_cast<U>(y)) + carry;
        carries |= static_cast<Mask>(static_cast<U>(x) < taken) << l;
        whole = static_cast<U>(x) - taken;
      } else {
        const T addend = warp.at<T>(i.slot[3]).lane[l];
        const T first = i.number[2] == 2 ? high_product(x, y) : i.number[2] == 1 ? low_product(x, y) : x;
        whole = static_cast<unsigned __int128>(static_cast<U>(first)) + static_cast<U>(addend) + carry;
        carries |= static_cast<Mask>(whole >> kBits<T> & 1) << l;
      }
      results.lane[l] = static_cast<T>(whole);
    }
    warp.put(i.slot[0], results, mask);
    if (i.number[1]) warp.put_predicate(i.slot[4], carries, mask);
  });
  return true;
}

template <class T>
bool decode_product(Decoder& d, T) {
  using W = typename Wide<T>::type;
  const bool adds = d.name() == "mad";
  if (d.has("wide")) {
    if constexpr (sizeof(T) <= 4) {
      if (adds)
        d.each_lane<W, T, T, W>([](T a, T b, W c) { return sum_of<W>(low_product<W>(a, b), c); });
      else
        d.each_lane<W, T, T>([](T a, T b) { return low_product<W>(a, b); });
      return true;
    }
    return false;
  }
  if (d.has("hi")) {
    if (d.has("sat")) {
      if constexpr (std::is_same_v<T, int32_t>)
        d.each_lane<T, T, T, T>([](T a, T b, T c) { return saturated(int64_t{high_product(a, b)} + c); });
    } else if (adds) {
      d.each_lane<T, T, T, T>([](T a, T b, T c) { return sum_of(high_product(a, b), c); });
    } else {
      d.each_lane<T, T, T>([](T a, T b) { return high_product(a, b); });
    }
  } else if (d.has("lo")) {
    if (adds)
      d.each_lane<T, T, T, T>([](T a, T b, T c) { return sum_of(low_product(a, b), c); });
    else
      d.each_lane<T, T, T>([](T a, T b) { return low_product(a, b); });
  } else {
    return false;
  }
  return true;
}

// Products of 24 bits.
template <class T>
bool decode_product_of_24_bits(Decoder& d, T) {
  if constexpr (sizeof(T) == 4) {
    struct Product {
      static T cut(T value) { return static_cast<T>(static_cast<T>(static_cast<uint32_t>(value) << 8) >> 8); }
      static int64_t whole(T a, T b) { return static_cast<int64_t>(cut(a)) * static_cast<int64_t>(cut(b)); }
    };
    const bool adds = d.name() == "mad24";
    if (d.has("hi")) {
      if (adds)
        d.each_lane<T, T, T, T>([](T a, T b, T c) { return sum_of(static_cast<T>(Product::whole(a, b) >> 16), c); });
      else
        d.each_lane<T, T, T>([](T a, T b) { return static_cast<T>(Product::whole(a, b) >> 16); });
    } else if (adds) {
      d.each_lane<T, T, T, T>([](T a, T b, T c) { return sum_of(static_cast<T>(Product::whole(a, b)), c); });
    } else {
      d.each_lane<T, T, T>([](T a, T b) { return static_cast<T>(Product::whole(a, b)); });
    }
    return true;
  } else {
    return false;
  }
}

template <class T>
bool decode_arithmetic(Decoder& d, T zero) {
  const std::string& name = d.name();
  if (d.has("cc") || name == "addc" || name == "subc" || name == "madc") {
    if constexpr (sizeof(T) >= 4) return decode_with_carry(d, zero);
    return false;
  }
  if (name == "mul" || name == "mad") return decode_product(d, zero);
  if (name == "mul24" || name == "mad24") return decode_product_of_24_bits(d, zero);
  if (d.has("sat")) {
    if constexpr (std::is_same_v<T, int32_t>) {
      if (name == "add") return d.each_lane<T, T, T>([](T a, T b) { return saturated(int64_t{a} + b); }), true;
      if (name == "sub") return d.each_lane<T, T, T>([](T a, T b) { return saturated(int64_t{a} - b); }), true;
    }
    return false;
  }
  if (d.has("relu")) {
    if (name == "min")
      d.each_lane<T, T, T>([](T a, T b) { return std::max(std::min(a, b), T{0}); });
    else if (name == "max")
      d.each_lane<T, T, T>([](T a, T b) { return std::max(std::max(a, b), T{0}); });
    else
      return false;
    return true;
  }
  if (name == "add")
    d.each_lane<T, T, T>([](T a, T b) { return sum_of(a, b); });
  else if (name == "sub")
    d.each_lane<T, T, T>([](T a, T b) { return difference_of(a, b); });
  else if (name == "div")
    d.each_lane<T, T, T>([](T a, T b) { return quotient(a, b); });
  else if (name == "rem")
    d.each_lane<T, T, T>([](T a, T b) { return remainder_of(a, b); });
  else if (name == "min")
    d.each_lane<T, T, T>([](T a, T b) { return std::min(a, b); });
  else if (name == "max")
    d.each_lane<T, T, T>([](T a, T b) { return std::max(a, b); });
  else if (name == "abs")
    d.each_lane<T, T>([](T a) { return a < T{0} ? difference_of<T>(0, a) : a; });
  else if (name == "neg")
    d.each_lane<T, T>([](T a) { return difference_of<T>(0, a); });
  else if (name == "sad")
    d.each_lane<T, T, T, T>([](T a, T b, T c) { return sum_of(c, a < b ? difference_of(b, a) : difference_of(a, b)); });
  else
    return false;
  return true;
}

// Sums of four products of bytes, or two of 16 bits by bytes.
template <class A, class B>
void decode_dot(Decoder& d, A, B) {
  if (d.name() == "dp4a") {
    d.each_lane<uint32_t, uint32_t, uint32_t, uint32_t>([](uint32_t a, uint32_t b, uint32_t c) {
      for (int k = 0; k < 32; k += 8)
        c += static_cast<uint32_t>(int64_t{static_cast<A>(a >> k)} * int64_t{static_cast<B>(b >> k)});
      return c;
    });
    return;
  }
  using A16 = std::conditional_t<std::is_signed_v<A>, int16_t, uint16_t>;
  const auto decode_half = [&](auto first) {
    d.each_lane<uint32_t, uint32_t, uint32_t, uint32_t>([](uint32_t a, uint32_t b, uint32_t c) {
      b >>= 8 * decltype(first)::value;
      for (int k = 0; k < 2; ++k)
        c += static_cast<uint32_t>(int64_t{static_cast<A16>(a >> 16 * k)} * int64_t{static_cast<B>(b >> 8 * k)});
      return c;
    });
  };
  d.has("hi") ? decode_half(std::integral_constant<int, 2>{}) : decode_half(std::integral_constant<int, 0>{});
}

// --- logic ------------------------------------------------------------------------------------------------------

template <class F>
void each_predicate(Decoder& d, F) {
  Instruction& i = d.instruction;
  i.slot[0] = d.predicate_destination(d.operand(0));
  i.slot[1] = d.predicate_source(d.operand(1));
  i.slot[2] = d.operands() > 2 ? d.predicate_source(d.operand(2)) : i.slot[1];
  d.runs([](Warp& warp, const Instruction& i, Mask mask) {
    warp.put_predicate(i.slot[0], F{}(warp.predicate(i.slot[1]), warp.predicate(i.slot[2])), mask);
  });
}

bool decode_predicates(Decoder& d) {
  const std::string& name = d.name();
  if (d.type() != "pred") return false;
  if (name == "and")
    each_predicate(d, [](Mask a, Mask b) { return a & b; });
  else if (name == "or")
    each_predicate(d, [](Mask a, Mask b) { return a | b; });
  else if (name == "xor")
    each_predicate(d, [](Mask a, Mask b) { return a ^ b; });
  else if (name == "not")
    each_predicate(d, [](Mask a, Mask) { return ~a; });
  else
    return false;
  return true;
}

template <class T>
bool decode_logic(Decoder& d, T) {
  using U = std::make_unsigned_t<T>;
  const std::string& name = d.name();
  if (name == "and")
    d.each_lane<U, U, U>([](U a, U b) { return static_cast<U>(a & b); });
  else if (name == "or")
    d.each_lane<U, U, U>([](U a, U b) { return static_cast<U>(a | b); });
  else if (name == "xor")
    d.each_lane<U, U, U>([](U a, U b) { return static_cast<U>(a ^ b); });
  else if (name == "not")
    d.each_lane<U, U>([](U a) { return static_cast<U>(~a); });
  else if (name == "cnot")
    d.each_lane<U, U>([](U a) { return static_cast<U>(a == 0); });
  else if (name == "shl")
    d.each_lane<U, U, uint32_t>([](U a, uint32_t n) { return n >= kBits<U> ? U{0} : static_cast<U>(a << n); });
  else if (name == "shr")
    d.each_lane<T, T, uint32_t>([](T a, uint32_t n) {
      if (n >= kBits<T>) return static_cast<T>(a < T{0} ? -1 : 0);
      return static_cast<T>(a >> n);
    });
  else
    return false;
  return true;
}

// --- fields of bits ---------------------------------------------------------------------------------------------

template <class T>
int leading_zeros(T value) {
  return value == 0 ? kBits<T> : __builtin_clzll(static_cast<std::make_unsigned_t<T>>(value)) - (64 - kBits<T>);
}

// Where the most significant bit is that is not the sign; -1 if there is none.
template <class T>
uint32_t found_bit(T value) {
  if (value < T{0}) value = static_cast<T>(~value);
  return static_cast<uint32_t>(kBits<T> - 1 - leading_zeros(value));
}

template <class T>
T extracted(T value, uint32_t position, uint32_t length) {
  using U = std::make_unsigned_t<T>;
  position &= 255, length &= 255;
  if (length == 0) return 0;
  const uint32_t last = std::min<uint32_t>(position + length - 1, kBits<T> - 1);
  const bool sign = std::is_signed_v<T> && (static_cast<U>(value) >> last & 1);
  U result = position >= kBits<T> ? U{0} : static_cast<U>(static_cast<U>(value) >> position);
  const uint32_t held = position >= kBits<T> ? 0 : std::min<uint32_t>(length, kBits<T> - position);
  const U ones = held >= kBits<T> ? static_cast<U>(~U{0}) : static_cast<U>((U{1} << held) - 1);
  result &= ones;
  return static_cast<T>(sign ? result | static_cast<U>(~ones) : result);
}

template <class U>
U inserted(U field, U into, uint32_t position, uint32_t length) {
  position &= 255, length &= 255;
  if (position >= kBits<U> || length == 0) return into;
  const U ones = length >= kBits<U> ? static_cast<U>(~U{0}) : static_cast<U>((U{1} << length) - 1);
  return static_cast<U>((into & ~(ones << position)) | ((field & ones) << position));
}

template <class U>
U reversed(U value) {
  U result = 0;
  for (int k = 0; k < kBits<U>; ++k) result = static_cast<U>(result << 1 | (value >> k & 1));
  return result;
}

template <class T>
bool decode_fields(Decoder& d, T) {
  using U = std::make_unsigned_t<T>;
  const std::string& name = d.name();
  if (name == "popc")
    d.each_lane<uint32_t, U>([](U a) { return static_cast<uint32_t>(__builtin_popcountll(a)); });
  else if (name == "clz")
    d.each_lane<uint32_t, U>([](U a) { return static_cast<uint32_t>(leading_zeros(a)); });
  else if (name == "brev")
    d.each_lane<U, U>([](U a) { return reversed(a); });
  else if (name == "bfind" && d.has("shiftamt"))
    d.each_lane<uint32_t, T>([](T a) {
      const uint32_t found = found_bit(a);
      return found == ~0u ? found : static_cast<uint32_t>(kBits<T> - 1) - found;
    });
  else if (name == "bfind")
    d.each_lane<uint32_t, T>([](T a) { return found_bit(a); });
  else if (name == "bfe")
    d.each_lane<T, T, uint32_t, uint32_t>([](T a, uint32_t p, uint32_t n) { return extracted(a, p, n); });
  else if (name == "bfi")
    d.each_lane<U, U, U, uint32_t, uint32_t>([](U a, U b, uint32_t p, uint32_t n) { return inserted(a, b, p, n); });
  else
    return false;
  return true;
}

// A shift of two words, of which one is kept.
bool decode_funnel_shift(Decoder& d) {
  const auto decode_side = [&](auto is_left, auto clamps) {
    d.each_lane<uint32_t, uint32_t, uint32_t, uint32_t>([](uint32_t low, uint32_t high, uint32_t n) {
      const uint64_t both = uint64_t{high} << 32 | low;
      n = decltype(clamps)::value ? std::min<uint32_t>(n, 32) : n & 31;
      return static_cast<uint32_t>(decltype(is_left)::value ? both << n >> 32 : both >> n);
    });
  };
  const auto decode_mode = [&](auto is_left) {
    d.has("clamp") ? decode_side(is_left, std::true_type{}) : decode_side(is_left, std::false_type{});
  };
  d.has("l") ? decode_mode(std::true_type{}) : decode_mode(std::false_type{});
  return true;
}

// Any function of three bits, by its table of values.
bool decode_three_bits(Decoder& d) {
  if (d.operands() != 5) return false;
  d.each_lane<uint32_t, uint32_t, uint32_t, uint32_t, uint32_t>([](uint32_t a, uint32_t b, uint32_t c, uint32_t table) {
    uint32_t result = 0;
    for (uint32_t k = 0; k < 8; ++k) {
      const uint32_t meets = (k & 4 ? a : ~a) & (k & 2 ? b : ~b) & (k & 1 ? c : ~c);
      result |= table >> k & 1 ? meets : 0;
    }
    return result;
  });
  return true;
}

}  // namespace

bool decode_integers(Decoder& d) {
  const std::string& name = d.name();
  if (decode_predicates(d) || decode_pairs(d)) return true;
  if (name == "shf") return decode_funnel_shift(d);
  if (name == "lop3") return decode_three_bits(d);
  if (name == "dp4a" || name == "dp2a") {
    const bool a_signed = d.statement().opcode[d.statement().opcode.size() - 2] == "s32", b_signed = d.type() == "s32";
    a_signed ? (b_signed ? decode_dot(d, int8_t{}, int8_t{}) : decode_dot(d, int8_t{}, uint8_t{}))
             : (b_signed ? decode_dot(d, uint8_t{}, int8_t{}) : decode_dot(d, uint8_t{}, uint8_t{}));
    return true;
  }
  if (!is_integer(d.type())) return false;
  bool is_known = false;
  with_integer(d.type(), [&](auto zero) {
    is_known = decode_fields(d, zero) || decode_logic(d, zero) || decode_arithmetic(d, zero);
  });
  return is_known;
}

}  // namespace ptx
