// setp, set and testp.
#include <cmath>
#include <type_traits>

#include "decoder.h"

namespace ptx {

namespace {

// A bit a lane, of bytes that are 0 or 1.
Mask mask_of(const uint8_t (&holds)[kLanes]) {
  Mask mask = 0;
  for (int k = 0; k < kLanes; k += 8) {
    uint64_t eight;
    std::memcpy(&eight, holds + k, sizeof eight);
    mask |= static_cast<Mask>(eight * 0x0102040810204080u >> 56) << k;
  }
  return mask;
}

enum class Comparison { eq, ne, lt, le, gt, ge, num, nan };

template <Comparison comparison, bool holds_for_nan, class T>
bool compare(T a, T b) {
  const bool has_nan = a != a || b != b;
  if constexpr (comparison == Comparison::num) return !has_nan;
  if constexpr (comparison == Comparison::nan) return has_nan;
  if (has_nan) return holds_for_nan;
  switch (comparison) {
    case Comparison::eq:
      return a == b;
    case Comparison::ne:
      return a != b;
    case Comparison::lt:
      return a < b;
    case Comparison::le:
      return a <= b;
    case Comparison::gt:
      return a > b;
    default:
      return a >= b;
  }
}

// What registers hold, as what is compared.
template <class T>
T taken(T value) {
  return value;
}
inline float taken(Half value) {
  return value.value();
}
inline float taken(Bfloat value) {
  return value.value();
}
template <class T>
struct Flushed {
  float number;
};
inline float taken(Flushed<float> value) {
  return flushed(value.number);
}

template <Comparison comparison, bool holds_for_nan, class T>
Mask compared(Warp& warp, const Instruction& i) {
  uint8_t holds[kLanes];
  const Vector<T>&a = warp.at<T>(i.slot[2]), &b = warp.at<T>(i.slot[3]);
  for (int l = 0; l < kLanes; ++l) holds[l] = compare<comparison, holds_for_nan>(taken(a.lane[l]), taken(b.lane[l]));
  return mask_of(holds);
}

// number[0]: how the result is combined with another predicate.
enum Combination { none, with_and, with_or, with_xor };

Mask combined(Warp& warp, const Instruction& i, Mask found) {
  if (i.number[0] == none) return found;
  const Mask other = warp.predicate(i.slot[4]);
  return i.number[0] == with_and ? found & other : i.number[0] == with_or ? found | other : found ^ other;
}

template <Comparison comparison, bool holds_for_nan, class T>
void set_predicate(Warp& warp, const Instruction& i, Mask mask) {
  const Mask found = compared<comparison, holds_for_nan, T>(warp, i);
  const Mask first = combined(warp, i, found);
  if (i.slot[1] != Decoder::kNowhere) warp.put_predicate(i.slot[1], combined(warp, i, ~found), mask);
  warp.put_predicate(i.slot[0], first, mask);
}

// Of a pair in one register: the first predicate tells of the lower one, the second of the upper one.
template <Comparison comparison, bool holds_for_nan, class T>
void set_predicates_of_pair(Warp& warp, const Instruction& i, Mask mask) {
  const Vector<uint32_t>&a = warp.at<uint32_t>(i.slot[2]), &b = warp.at<uint32_t>(i.slot[3]);
  Mask found[2];
  for (int half = 0; half < 2; ++half) {
    uint8_t holds[kLanes];
    for (int l = 0; l < kLanes; ++l) {
      const auto part = [&](uint32_t both) {
        const uint16_t bits = static_cast<uint16_t>(both >> 16 * half);
        T value;
        std::memcpy(&value, &bits, sizeof value);
        return taken(value);
      };
      holds[l] = compare<comparison, holds_for_nan>(part(a.lane[l]), part(b.lane[l]));
    }
    found[half] = combined(warp, i, mask_of(holds));
  }
  warp.put_predicate(i.slot[0], found[0], mask);
  warp.put_predicate(i.slot[1], found[1], mask);
}

template <class T>
struct Pair {
  T lower, upper;
};

// All ones, or 1.0, where it holds.
template <Comparison comparison, bool holds_for_nan, class T>
void set_value(Warp& warp, const Instruction& i, Mask mask) {
  const Mask found = combined(warp, i, compared<comparison, holds_for_nan, T>(warp, i));
  Vector<uint32_t> results;
  for (int l = 0; l < kLanes; ++l) results.lane[l] = found >> l & 1 ? static_cast<uint32_t>(i.number[1]) : 0;
  warp.put(i.slot[0], results, mask);
}

template <Comparison comparison, bool holds_for_nan, class T>
Handler handler_for(bool sets_value) {
  if constexpr (std::is_same_v<T, Pair<Half>>)
    return set_predicates_of_pair<comparison, holds_for_nan, Half>;
  else if constexpr (std::is_same_v<T, Pair<Bfloat>>)
    return set_predicates_of_pair<comparison, holds_for_nan, Bfloat>;
  else
    return sets_value ? set_value<comparison, holds_for_nan, T> : set_predicate<comparison, holds_for_nan, T>;
}

template <class T>
Handler handler_of(const std::string& name, bool sets_value) {
  struct Entry {
    const char* name;
    Handler (*handler)(bool);
  };
  using C = Comparison;
  static const Entry entries[] = {
      {"eq", handler_for<C::eq, false, T>},   {"ne", handler_for<C::ne, false, T>},
      {"lt", handler_for<C::lt, false, T>},   {"le", handler_for<C::le, false, T>},
      {"gt", handler_for<C::gt, false, T>},   {"ge", handler_for<C::ge, false, T>},
      {"lo", handler_for<C::lt, false, T>},   {"ls", handler_for<C::le, false, T>},
      {"hi", handler_for<C::gt, false, T>},   {"hs", handler_for<C::ge, false, T>},
      {"equ", handler_for<C::eq, true, T>},   {"neu", handler_for<C::ne, true, T>},
      {"ltu", handler_for<C::lt, true, T>},   {"leu", handler_for<C::le, true, T>},
      {"gtu", handler_for<C::gt, true, T>},   {"geu", handler_for<C::ge, true, T>},
      {"num", handler_for<C::num, false, T>}, {"nan", handler_for<C::nan, true, T>},
  };
  for (const Entry& entry : entries)
    if (name == entry.name) return entry.handler(sets_value);
  throw Fault("no comparison " + name);
}

bool decode_set(Decoder& d) {
  Instruction& i = d.instruction;
  const bool sets_value = d.name() == "set";
  const std::vector<std::string>& opcode = d.statement().opcode;
  const std::string& type = d.type();
  const std::string combination = d.statement().one_of({"and", "or", "xor"});
  i.number[0] = combination.empty() ? none : combination == "and" ? with_and : combination == "or" ? with_or : with_xor;
  if (i.number[0] != none) i.slot[4] = d.predicate_source(d.operand(3));
  if (sets_value) {
    const std::string& made = opcode[opcode.size() - 2];
    if (made != "f32" && made != "u32" && made != "s32") d.unknown();
    i.number[1] = made == "f32" ? 0x3F800000 : -1;
    i.slot[0] = d.destination(0, 4);
  } else {
    i.slot[0] = d.predicate_destination(d.operand(0));
    i.slot[1] = d.second_destination(d.operand(0));
  }
  const auto with = [&](auto zero) {
    using T = decltype(zero);
    i.slot[2] = d.source(1, sizeof(T));
    i.slot[3] = d.source(2, sizeof(T));
    d.runs(handler_of<T>(opcode[1], sets_value));
  };
  if (type == "f32")
    d.has("ftz") ? with(Flushed<float>{}) : with(0.0f);
  else if (type == "f64")
    with(0.0);
  else if (type == "f16")
    with(Half{});
  else if (type == "bf16")
    with(Bfloat{});
  else if (type == "f16x2" && !sets_value && i.slot[1] != Decoder::kNowhere)
    with(Pair<Half>{});
  else if (type == "bf16x2" && !sets_value && i.slot[1] != Decoder::kNowhere)
    with(Pair<Bfloat>{});
  else if (type == "f16x2" || type == "bf16x2")
    return false;
  else
    return with_integer(type, with);
  return true;
}

bool decode_test(Decoder& d) {
  Instruction& i = d.instruction;
  i.slot[0] = d.predicate_destination(d.operand(0));
  const char* const kinds[] = {"finite", "infinite", "number", "notanumber", "normal", "subnormal"};
  for (int k = 0; k < 6; ++k)
    if (d.has(kinds[k])) i.number[0] = k;
  const auto with = [&](auto zero) {
    using T = decltype(zero);
    i.slot[1] = d.source(1, sizeof(T));
    d.runs([](Warp& warp, const Instruction& i, Mask mask) {
      Mask results = 0;
      for (int l = 0; l < kLanes; ++l) {
        const T value = warp.at<T>(i.slot[1]).lane[l];
        const int kind = std::fpclassify(value);
        const bool holds[] = {std::isfinite(value), kind == FP_INFINITE, kind != FP_NAN,
                              kind == FP_NAN,       kind == FP_NORMAL,   kind == FP_SUBNORMAL};
        results |= static_cast<Mask>(holds[i.number[0]]) << l;
      }
      warp.put_predicate(i.slot[0], results, mask);
    });
  };
  d.type() == "f64" ? with(0.0) : with(0.0f);
  return true;
}

}  // namespace

bool decode_comparisons(Decoder& d) {
  if (d.name() == "setp" || d.name() == "set") return decode_set(d);
  if (d.name() == "testp") return decode_test(d);
  return false;
}

}  // namespace ptx
