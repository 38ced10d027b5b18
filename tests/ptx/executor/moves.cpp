// Moves, selections, permutations of bytes, and what is known of the launch.
#include "decoder.h"

namespace ptx {

namespace {

struct Bytes16 {
  uint64_t word[2];
};

template <class F>
bool with_size(int bytes, F f) {
  switch (bytes) {
    case 1:
      return f(uint8_t{}), true;
    case 2:
      return f(uint16_t{}), true;
    case 4:
      return f(uint32_t{}), true;
    case 8:
      return f(uint64_t{}), true;
    case 16:
      return f(Bytes16{}), true;
    default:
      return false;
  }
}

// Registers side by side: from one wide value, or to one.
void pack(Warp& warp, const Instruction& i, Mask mask) {
  const int parts = i.number[0], bytes = i.number[1];
  for (int l = 0; l < kLanes; ++l) {
    if (!(mask >> l & 1)) continue;
    char whole[16];
    for (int k = 0; k < parts; ++k) std::memcpy(whole + k * bytes, warp.file + i.slot[k + 1] + l * bytes, bytes);
    std::memcpy(warp.file + i.slot[0] + l * parts * bytes, whole, static_cast<size_t>(parts * bytes));
  }
}
void unpack(Warp& warp, const Instruction& i, Mask mask) {
  const int parts = i.number[0], bytes = i.number[1];
  for (int l = 0; l < kLanes; ++l) {
    if (!(mask >> l & 1)) continue;
    char whole[16];
    std::memcpy(whole, warp.file + i.slot[0] + l * parts * bytes, static_cast<size_t>(parts * bytes));
    for (int k = 0; k < parts; ++k) std::memcpy(warp.file + i.slot[k + 1] + l * bytes, whole + k * bytes, bytes);
  }
}
// The usual ones: two halves of a word, two words of a double word.
template <class Part, class Whole>
void pack_two(Warp& warp, const Instruction& i, Mask mask) {
  Vector<Whole> results;
  for (int l = 0; l < kLanes; ++l)
    results.lane[l] = static_cast<Whole>(static_cast<Whole>(warp.at<Part>(i.slot[2]).lane[l]) << 8 * sizeof(Part) |
                                         warp.at<Part>(i.slot[1]).lane[l]);
  warp.put(i.slot[0], results, mask);
}
template <class Part, class Whole>
void unpack_two(Warp& warp, const Instruction& i, Mask mask) {
  Vector<Part> low, high;
  for (int l = 0; l < kLanes; ++l) {
    const Whole whole = warp.at<Whole>(i.slot[0]).lane[l];
    low.lane[l] = static_cast<Part>(whole);
    high.lane[l] = static_cast<Part>(whole >> 8 * sizeof(Part));
  }
  warp.put(i.slot[1], low, mask);
  warp.put(i.slot[2], high, mask);
}

bool decode_move(Decoder& d) {
  Instruction& i = d.instruction;
  if (d.type() == "pred") {
    i.slot[0] = d.predicate_destination(d.operand(0));
    i.slot[1] = d.predicate_source(d.operand(1));
    d.runs([](Warp& warp, const Instruction& i, Mask mask) {
      warp.put_predicate(i.slot[0], warp.predicate(i.slot[1]), mask);
    });
    return true;
  }
  const int bytes = bytes_of(d.type());
  const bool to_list = d.operand(0).kind == Operand::Kind::list;
  if (to_list || d.operand(1).kind == Operand::Kind::list) {
    const std::vector<Operand>& list = d.operand(to_list ? 0 : 1).list;
    const int parts = static_cast<int>(list.size()), part = bytes / parts;
    i.number[0] = parts;
    i.number[1] = part;
    i.slot[0] = to_list ? d.source(1, bytes) : d.destination(0, bytes);
    for (int k = 0; k < parts; ++k)
      i.slot[k + 1] =
          to_list ? d.destination(list[static_cast<size_t>(k)], part) : d.source(list[static_cast<size_t>(k)], part);
    if (parts == 2 && part == 2)
      d.runs(to_list ? unpack_two<uint16_t, uint32_t> : pack_two<uint16_t, uint32_t>);
    else if (parts == 2 && part == 4)
      d.runs(to_list ? unpack_two<uint32_t, uint64_t> : pack_two<uint32_t, uint64_t>);
    else
      d.runs(to_list ? unpack : pack);
    return true;
  }
  return with_size(bytes, [&](auto zero) {
    using T = decltype(zero);
    d.each_lane<T, T>([](T a) { return a; });
  });
}

bool decode_selection(Decoder& d) {
  return with_size(bytes_of(d.type()), [&](auto zero) {
    using T = decltype(zero);
    Instruction& i = d.instruction;
    i.slot[0] = d.destination(0, sizeof(T));
    i.slot[1] = d.source(1, sizeof(T));
    i.slot[2] = d.source(2, sizeof(T));
    i.slot[3] = d.predicate_source(d.operand(3));
    d.runs([](Warp& warp, const Instruction& i, Mask mask) {
      const Mask first = warp.predicate(i.slot[3]);
      Vector<T> results;
      for (int l = 0; l < kLanes; ++l)
        results.lane[l] = first >> l & 1 ? warp.at<T>(i.slot[1]).lane[l] : warp.at<T>(i.slot[2]).lane[l];
      warp.put(i.slot[0], results, mask);
    });
  });
}

// slct: by the sign of a third value.
bool decode_selection_by_sign(Decoder& d) {
  const std::string& by = d.type();
  const std::string& type = d.statement().opcode[d.statement().opcode.size() - 2];
  return with_size(bytes_of(type), [&](auto zero) {
    using T = decltype(zero);
    if (by == "f32")
      d.each_lane<T, T, T, float>([](T a, T b, float c) { return c >= 0 ? a : b; });
    else
      d.each_lane<T, T, T, int32_t>([](T a, T b, int32_t c) { return c >= 0 ? a : b; });
  });
}

uint8_t byte_of(uint64_t both, uint32_t selector) {
  const auto byte = static_cast<uint8_t>(both >> 8 * (selector & 7));
  return selector & 8 ? static_cast<uint8_t>(static_cast<int8_t>(byte) < 0 ? 0xFF : 0) : byte;
}

// prmt: four of eight bytes, or their signs. The modes are tables of selectors.
bool decode_permutation(Decoder& d) {
  struct Mode {
    const char* name;
    uint32_t selectors[4];
  };
  static constexpr Mode modes[] = {
      {"f4e", {0x3210, 0x4321, 0x5432, 0x6543}}, {"b4e", {0x5670, 0x6701, 0x7012, 0x0123}},
      {"rc8", {0x0000, 0x1111, 0x2222, 0x3333}}, {"ecl", {0x3210, 0x3211, 0x3222, 0x3333}},
      {"ecr", {0x0000, 0x1110, 0x2210, 0x3210}}, {"rc16", {0x1010, 0x3232, 0x1010, 0x3232}},
  };
  Instruction& i = d.instruction;
  i.slot[0] = d.destination(0, 4);
  for (size_t k = 1; k <= 3; ++k) i.slot[k] = d.source(k, 4);
  i.number[0] = -1;
  for (int k = 0; k < 6; ++k)
    if (d.has(modes[k].name)) i.number[0] = k;
  d.runs([](Warp& warp, const Instruction& i, Mask mask) {
    Vector<uint32_t> results;
    for (int l = 0; l < kLanes; ++l) {
      const uint64_t both = uint64_t{warp.at<uint32_t>(i.slot[2]).lane[l]} << 32 | warp.at<uint32_t>(i.slot[1]).lane[l];
      uint32_t selector = warp.at<uint32_t>(i.slot[3]).lane[l];
      if (i.number[0] >= 0) selector = modes[i.number[0]].selectors[selector & 3];
      uint32_t result = 0;
      for (int k = 0; k < 4; ++k) result |= uint32_t{byte_of(both, selector >> 4 * k & 15)} << 8 * k;
      results.lane[l] = result;
    }
    warp.put(i.slot[0], results, mask);
  });
  return true;
}

uint64_t window_of(const Decoder& d) {
  if (d.has("shared") || d.has("shared::cta") || d.has("shared::cluster")) return kSharedWindow;
  if (d.has("local")) return kLocalWindow;
  if (d.has("param") || d.has("param::entry")) return kParameterWindow;
  if (d.has("global") || d.has("const")) return 0;
  d.unknown();
}

// cvta: between the generic address space and another.
bool decode_address(Decoder& d) {
  const uint64_t window = window_of(d);
  Instruction& i = d.instruction;
  i.slot[0] = d.destination(0, 8);
  i.slot[1] = d.source(1, 8);
  i.offset = static_cast<int64_t>(d.has("to") ? 0 - window : window);
  d.runs([](Warp& warp, const Instruction& i, Mask mask) {
    Vector<uint64_t> results;
    for (int l = 0; l < kLanes; ++l)
      results.lane[l] = warp.at<uint64_t>(i.slot[1]).lane[l] + static_cast<uint64_t>(i.offset);
    warp.put(i.slot[0], results, mask);
  });
  return true;
}

// isspacep
bool decode_space_test(Decoder& d) {
  Instruction& i = d.instruction;
  i.offset = static_cast<int64_t>(window_of(d));
  i.slot[0] = d.predicate_destination(d.operand(0));
  i.slot[1] = d.source(1, 8);
  d.runs([](Warp& warp, const Instruction& i, Mask mask) {
    Mask results = 0;
    for (int l = 0; l < kLanes; ++l)
      results |= static_cast<Mask>((warp.at<uint64_t>(i.slot[1]).lane[l] & kWindows) == static_cast<uint64_t>(i.offset))
                 << l;
    warp.put_predicate(i.slot[0], results, mask);
  });
  return true;
}

}  // namespace

bool decode_moves(Decoder& d) {
  const std::string& name = d.name();
  if (name == "mov") return decode_move(d);
  if (name == "selp") return decode_selection(d);
  if (name == "slct") return decode_selection_by_sign(d);
  if (name == "prmt") return decode_permutation(d);
  if (name == "cvta") return decode_address(d);
  if (name == "isspacep") return decode_space_test(d);
  if (name == "createpolicy") {
    // Hints for the cache are taken, and of no effect.
    d.instruction.slot[0] = d.destination(0, 8);
    d.runs([](Warp& warp, const Instruction& i, Mask mask) { warp.put(i.slot[0], Vector<uint64_t>{}, mask); });
    return true;
  }
  return false;
}

}  // namespace ptx
