// Branches, barriers and exits; what is of no effect here.
#include <algorithm>

#include "decoder.h"

namespace ptx {

namespace {

void nothing(Warp&, const Instruction&, Mask) {}

void trap(Warp&, const Instruction&, Mask mask) {
  throw LaneFault(__builtin_ctz(mask), "the kernel has stopped itself");
}

// bar.sync a{, b}; barrier.red.op d, a{, b}, p; of clusters, which are one block here, a wait is a barrier.
bool decode_barrier(Decoder& d) {
  Instruction& i = d.instruction;
  if (d.has("cluster")) {
    if (d.has("arrive")) return d.runs(nothing), true;
    i.flow = Flow::block_barrier;
    i.number[0] = 15;
    return d.runs(nothing), true;
  }
  if (d.has("warp")) {
    i.flow = Flow::warp_barrier;
    i.number[3] = 1;  // orders accesses to memory, as a shuffle does not
    i.slot[Instruction::kMostSlots - 1] = d.source(0, 4);
    return d.runs(nothing), true;
  }
  const bool reduces = d.has("red");
  if (!reduces && !d.has("sync")) d.unknown();
  const size_t first = reduces ? 1 : 0, last = d.operands() - (reduces ? 1 : 0);
  const auto number = [&](size_t k) {
    if (d.operand(k).kind != Operand::Kind::number) d.unknown();
    return static_cast<int>(d.operand(k).bits);
  };
  i.flow = Flow::block_barrier;
  i.number[0] = number(first);
  i.number[1] = last > first + 1 ? number(first + 1) : 0;  // threads; 0 for all
  if (i.number[0] < 0 || i.number[0] > 15) d.unknown();
  if (reduces) {
    i.number[2] = d.has("popc") ? 1 : d.has("and") ? 2 : 3;
    i.slot[0] = i.number[2] == 1 ? d.destination(0, 4) : d.predicate_destination(d.operand(0));
    i.slot[1] = d.predicate_source(d.operand(last));
  }
  return d.runs(nothing), true;
}

}  // namespace

bool decode_control(Decoder& d) {
  static const char* const idle[] = {"membar",    "fence",   "griddepcontrol", "nanosleep",     "prefetch",
                                     "prefetchu", "discard", "pmevent",        "applypriority", "setmaxnreg"};
  const std::string& name = d.name();
  Instruction& i = d.instruction;
  d.runs(nothing);
  if (name == "bra") {
    i.flow = Flow::branch;
  } else if (name == "brx") {
    i.flow = Flow::indexed_branch;
    i.slot[0] = d.source(0, 4);
  } else if (name == "ret" || name == "exit") {
    i.flow = Flow::exit;
  } else if (name == "bar" || name == "barrier") {
    return decode_barrier(d);
  } else if (name == "trap" || name == "brkpt") {
    d.runs(trap);
  } else {
    return std::any_of(std::begin(idle), std::end(idle), [&](const char* known) { return name == known; });
  }
  return true;
}

}  // namespace ptx
