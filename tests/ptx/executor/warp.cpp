// What the lanes of a warp do together: shuffles, votes, matches, reductions.
#include <algorithm>
#include <string>

#include "decoder.h"

namespace ptx {

namespace {

// The lanes of a mask come together; the mask is an operand.
void together(Decoder& d, const Operand& mask) {
  d.instruction.flow = Flow::warp_barrier;
  d.instruction.slot[Instruction::kMostSlots - 1] = d.source(mask, 4);
}

enum Shuffle { up, down, butterfly, by_index };

// Slots: the value, whether it came from elsewhere, the value given, a lane or distance, bounds.
template <Shuffle shuffle>
void trade(Warp& warp, const Instruction& i, Mask mask) {
  Vector<uint32_t> results;
  const Vector<uint32_t>& given = warp.at<uint32_t>(i.slot[2]);
  Mask in_range = 0;
  for (Mask left = mask; left; left &= left - 1) {
    const int l = __builtin_ctz(left);
    const auto b = static_cast<int>(warp.at<uint32_t>(i.slot[3]).lane[l] & 31);
    const uint32_t bounds = warp.at<uint32_t>(i.slot[4]).lane[l];
    const int segment = bounds >> 8 & 31, clamp = bounds & 31;
    const int most = (l & segment) | (clamp & ~segment), least = l & segment;
    int from = shuffle == up ? l - b : shuffle == down ? l + b : shuffle == butterfly ? l ^ b : least | (b & ~segment);
    const bool is_in_range = shuffle == up ? from >= most : from <= most;
    if (!is_in_range) from = l;
    if (!(mask >> from & 1))
      throw LaneFault(l, "a shuffle from lane " + std::to_string(from) + ", which takes no part in it");
    in_range |= static_cast<Mask>(is_in_range) << l;
    results.lane[l] = given.lane[from];
  }
  warp.put(i.slot[0], results, mask);
  if (i.slot[1] != Decoder::kNowhere) warp.put_predicate(i.slot[1], in_range, mask);
}

bool decode_shuffle(Decoder& d) {
  Instruction& i = d.instruction;
  i.slot[0] = d.destination(0, 4);
  i.slot[1] = d.second_destination(d.operand(0));
  for (size_t k = 1; k <= 3; ++k) i.slot[k + 1] = d.source(k, 4);
  if (d.has("sync")) together(d, d.operand(4));
  d.runs(d.has("up") ? trade<up> : d.has("down") ? trade<down> : d.has("bfly") ? trade<butterfly> : trade<by_index>);
  return true;
}

bool decode_vote(Decoder& d) {
  Instruction& i = d.instruction;
  i.slot[1] = d.predicate_source(d.operand(1));
  if (d.has("sync")) together(d, d.operand(2));
  if (d.has("ballot")) {
    i.slot[0] = d.destination(0, 4);
    d.runs([](Warp& warp, const Instruction& i, Mask mask) {
      Vector<uint32_t> results;
      std::fill_n(results.lane, kLanes, warp.predicate(i.slot[1]) & mask);
      warp.put(i.slot[0], results, mask);
    });
    return true;
  }
  i.slot[0] = d.predicate_destination(d.operand(0));
  i.number[0] = d.has("any") ? 0 : d.has("all") ? 1 : 2;
  d.runs([](Warp& warp, const Instruction& i, Mask mask) {
    const Mask votes = warp.predicate(i.slot[1]) & mask;
    const bool holds[] = {votes != 0, votes == mask, votes == 0 || votes == mask};
    warp.put_predicate(i.slot[0], holds[i.number[0]] ? kAllLanes : 0, mask);
  });
  return true;
}

template <class T>
void match(Warp& warp, const Instruction& i, Mask mask) {
  const Vector<T>& values = warp.at<T>(i.slot[2]);
  Vector<uint32_t> results{};
  Mask all_equal = kAllLanes;
  for (Mask left = mask; left; left &= left - 1) {
    const int l = __builtin_ctz(left);
    for (Mask other = mask; other; other &= other - 1) {
      const int k = __builtin_ctz(other);
      if (values.lane[k] == values.lane[l])
        results.lane[l] |= Mask{1} << k;
      else
        all_equal = 0;
    }
  }
  if (i.number[0]) std::fill_n(results.lane, kLanes, all_equal & mask);
  warp.put(i.slot[0], results, mask);
  if (i.slot[1] != Decoder::kNowhere) warp.put_predicate(i.slot[1], all_equal, mask);
}

bool decode_match(Decoder& d) {
  Instruction& i = d.instruction;
  const int bytes = bytes_of(d.type());
  i.number[0] = d.has("all");
  i.slot[0] = d.destination(0, 4);
  i.slot[1] = d.second_destination(d.operand(0));
  i.slot[2] = d.source(1, bytes);
  together(d, d.operand(2));
  d.runs(bytes == 8 ? match<uint64_t> : match<uint32_t>);
  return true;
}

template <class T, class F>
void reduce(Decoder& d, F) {
  Instruction& i = d.instruction;
  i.slot[0] = d.destination(0, sizeof(T));
  i.slot[1] = d.source(1, sizeof(T));
  together(d, d.operand(2));
  d.runs([](Warp& warp, const Instruction& i, Mask mask) {
    const Vector<T>& values = warp.at<T>(i.slot[1]);
    T result = values.lane[__builtin_ctz(mask)];
    for (Mask left = mask & (mask - 1); left; left &= left - 1) result = F{}(result, values.lane[__builtin_ctz(left)]);
    Vector<T> results;
    std::fill_n(results.lane, kLanes, result);
    warp.put(i.slot[0], results, mask);
  });
}

bool decode_reduction(Decoder& d) {
  const std::string operation = d.statement().one_of({"add", "min", "max", "and", "or", "xor"});
  if (d.type() == "f32") {
    const auto least = [](float a, float b) { return a != a || b < a ? b : a; };
    const auto greatest = [](float a, float b) { return a != a || a < b ? b : a; };
    if (d.has("NaN") || d.has("abs")) return false;
    if (operation == "min") return reduce<float>(d, least), true;
    if (operation == "max") return reduce<float>(d, greatest), true;
    return false;
  }
  return with_integer(d.type(), [&](auto zero) {
    using T = decltype(zero);
    if (operation == "add")
      reduce<T>(d, [](T a, T b) { return static_cast<T>(static_cast<uint64_t>(a) + static_cast<uint64_t>(b)); });
    else if (operation == "min")
      reduce<T>(d, [](T a, T b) { return std::min(a, b); });
    else if (operation == "max")
      reduce<T>(d, [](T a, T b) { return std::max(a, b); });
    else if (operation == "and")
      reduce<T>(d, [](T a, T b) { return static_cast<T>(a & b); });
    else if (operation == "or")
      reduce<T>(d, [](T a, T b) { return static_cast<T>(a | b); });
    else if (operation == "xor")
      reduce<T>(d, [](T a, T b) { return static_cast<T>(a ^ b); });
    else
      d.unknown();
  });
}

// elect.sync d|p, mask: one lane of the mask, the lowest.
bool decode_election(Decoder& d) {
  Instruction& i = d.instruction;
  i.slot[0] = d.destination(0, 4);
  i.slot[1] = d.second_destination(d.operand(0));
  together(d, d.operand(1));
  d.runs([](Warp& warp, const Instruction& i, Mask mask) {
    Vector<uint32_t> results;
    std::fill_n(results.lane, kLanes, static_cast<uint32_t>(__builtin_ctz(mask)));
    warp.put(i.slot[0], results, mask);
    if (i.slot[1] != Decoder::kNowhere) warp.put_predicate(i.slot[1], mask & -mask, mask);
  });
  return true;
}

}  // namespace

bool decode_warp(Decoder& d) {
  const std::string& name = d.name();
  if (name == "shfl") return decode_shuffle(d);
  if (name == "vote") return decode_vote(d);
  if (name == "match") return decode_match(d);
  if (name == "redux") return decode_reduction(d);
  if (name == "elect") return decode_election(d);
  if (name == "activemask") {
    d.instruction.slot[0] = d.destination(0, 4);
    d.runs([](Warp& warp, const Instruction& i, Mask mask) {
      Vector<uint32_t> results;
      std::fill_n(results.lane, kLanes, mask);
      warp.put(i.slot[0], results, mask);
    });
    return true;
  }
  return false;
}

}  // namespace ptx
