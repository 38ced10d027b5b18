// Warps and blocks in a random order. Lanes of a warp that are at different instructions form groups, of which the one
// at the lowest instruction goes on: so that lanes meet again as soon as they can.
#include <algorithm>
#include <climits>
#include <numeric>
#include <random>

#include "machine.h"

namespace ptx {

namespace {

// More instructions than any kernel here needs in a warp of a block: a loop without an end.
constexpr uint64_t kMostInstructions = uint64_t{1} << 32;
// A warp has its turn for up to so many instructions.
constexpr uint64_t kLongestTurn = 2000;

std::string thread_text(const Block& block, int thread) {
  const auto text = [](const Size& at) {
    return "(" + std::to_string(at.x) + ", " + std::to_string(at.y) + ", " + std::to_string(at.z) + ")";
  };
  const auto t = static_cast<uint32_t>(thread);
  return "block " + text(block.index) + ", thread " +
         text({t % block.size.x, t / block.size.x % block.size.y, t / block.size.x / block.size.y});
}

const Statement& statement_at(const Program& program, int at) {
  return program.kernel->statements[static_cast<size_t>(program.code[static_cast<size_t>(at)].statement)];
}

std::string place(const Program& program, int at) {
  const Statement& statement = statement_at(program, at);
  return statement.text + " (line " + std::to_string(statement.line) + " of the PTX)";
}

std::string lanes_text(Mask lanes) {
  std::string text = __builtin_popcount(lanes) == 1 ? "lane" : "lanes";
  for (Mask left = lanes; left; left &= left - 1) text += " " + std::to_string(__builtin_ctz(left));
  return text;
}

uint64_t special_value(const std::string& name, const Warp& warp, int lane, uint64_t clock) {
  const Block& block = *warp.block;
  const auto thread = static_cast<uint32_t>(warp.number * kLanes + lane);
  const auto along = [&](const std::string& prefix, const Size& size) -> const uint32_t* {
    if (name.compare(0, prefix.size(), prefix) != 0 || name.size() != prefix.size() + 2) return nullptr;
    return name.back() == 'x' ? &size.x : name.back() == 'y' ? &size.y : &size.z;
  };
  const Size of_thread = {thread % block.size.x, thread / block.size.x % block.size.y,
                          thread / block.size.x / block.size.y};
  if (const uint32_t* found = along("%tid", of_thread)) return *found;
  if (const uint32_t* found = along("%ntid", block.size)) return *found;
  if (const uint32_t* found = along("%ctaid", block.index)) return *found;
  if (const uint32_t* found = along("%nctaid", block.grid)) return *found;
  if (const uint32_t* found = along("%clusterid", block.index)) return *found;
  if (name == "%laneid") return static_cast<uint64_t>(lane);
  if (name == "%warpid") return static_cast<uint64_t>(warp.number);
  if (name == "%nwarpid") return block.warps.size();
  if (name == "WARP_SZ") return kLanes;
  if (name == "%lanemask_eq") return uint64_t{1} << lane;
  if (name == "%lanemask_lt") return (uint64_t{1} << lane) - 1;
  if (name == "%lanemask_le") return (uint64_t{2} << lane) - 1;
  if (name == "%lanemask_gt") return kAllLanes & ~((uint64_t{2} << lane) - 1);
  if (name == "%lanemask_ge") return kAllLanes & ~((uint64_t{1} << lane) - 1);
  if (name == "%nsmid" || name == "%cluster_nctarank" || name == "%cluster_nctaid.x") return 1;
  if (name == "%dynamic_smem_size") return block.dynamic_bytes;
  if (name == "%total_smem_size") return block.shared.size() - kSharedBegin;
  if (name.find("clock") != std::string::npos || name.find("timer") != std::string::npos) return clock;
  return 0;  // the number of a multiprocessor, a cluster's block, a grid
}

}  // namespace

// --- a warp -----------------------------------------------------------------------------------------------------

void Warp::start(Block& of, Program& runs, int at, int threads) {
  block = &of;
  program = &runs;
  number = at;
  file = runs.files[static_cast<size_t>(at)].get();
  live = threads >= kLanes ? kAllLanes : (Mask{1} << threads) - 1;
  all_ = live;
  ready.assign(1, {0, live});
  at_warp_barrier.clear();
  at_block_barrier.clear();
  local.assign(runs.kernel->local_bytes * kLanes, static_cast<char>(0xFF));
  for (const Program::Special& special : runs.specials)
    for (int l = 0; l < kLanes; ++l)
      this->at<uint64_t>(special.slot).lane[l] = special_value(special.name, *this, l, of.clock);
}

void Warp::make_ready(int at, Mask lanes) {
  auto place = ready.end();
  while (place != ready.begin() && (place - 1)->at < at) --place;
  if (place != ready.begin() && (place - 1)->at == at)
    (place - 1)->lanes |= lanes;
  else
    ready.insert(place, {at, lanes});
}

// The lanes that have come to an instruction that the lanes of a mask run together: it is run for those that are
// complete, the others wait. Those that go on are left.
void Warp::meet(Instruction& instruction, Group& group, Mask coming) {
  const Vector<uint32_t>& masks = at<uint32_t>(instruction.slot[Instruction::kMostSlots - 1]);
  const Mask passing = group.lanes & ~coming;
  group.lanes = passing;
  while (coming) {
    const int first = __builtin_ctz(coming);
    const Mask members = masks.lane[first];
    Mask part = 0;
    for (Mask left = coming; left; left &= left - 1)
      if (masks.lane[__builtin_ctz(left)] == members) part |= left & -left;
    coming &= ~part;
    if (part & ~members) throw LaneFault(__builtin_ctz(part & ~members), "a thread that is not in its own mask");
    if (members & ~all_)
      throw LaneFault(first, "the mask names " + lanes_text(members & ~all_) + ", which are not there");
    if (members & ~live)
      throw LaneFault(first, "the mask names " + lanes_text(members & ~live) + ", which have finished");
    Mask come = part;
    for (const Waiting& waiting : at_warp_barrier)
      if (waiting.at == group.at && !(waiting.lanes & ~members)) come |= waiting.lanes;
    if (come != members) {
      at_warp_barrier.push_back({group.at, part, 0});
      continue;
    }
    const auto has_come = [&](const Waiting& waiting) { return waiting.at == group.at && (waiting.lanes & come) != 0; };
    at_warp_barrier.erase(std::remove_if(at_warp_barrier.begin(), at_warp_barrier.end(), has_come),
                          at_warp_barrier.end());
    instruction.run(*this, instruction, come);
    barriers += static_cast<uint32_t>(instruction.number[3]);
    group.lanes |= come;
  }
}

std::string Warp::missing(const Waiting& waiting) const {
  const Instruction& instruction = program->code[static_cast<size_t>(waiting.at)];
  if (instruction.flow != Flow::warp_barrier) return "";
  const uint32_t slot = instruction.slot[Instruction::kMostSlots - 1];
  const Mask members = at<uint32_t>(slot).lane[__builtin_ctz(waiting.lanes)];
  return members & ~live ? ": the mask names " + lanes_text(members & ~live) + ", which have finished" : "";
}

void Warp::run(uint64_t budget) {
  Group group{0, 0};
  try {
    while (!ready.empty()) {
      group = ready.back();
      ready.pop_back();
      go_on(group, budget);
      if (budget == 0) return;
    }
  } catch (const LaneFault& fault) {
    throw Fault(std::string(fault.what()) + "\n  by: " + place(*program, at_) + "\n  in: " + program->kernel->name +
                ", " + thread_text(*block, number * kLanes + fault.lane));
  }
}

// Runs a group until it ends, waits, or another one is at a lower instruction.
void Warp::go_on(Group group, uint64_t& budget) {
  Instruction* const code = program->code.data();
  int next = ready.empty() ? INT_MAX : ready.back().at;
  while (group.lanes) {
    if (group.at >= next) {
      if (group.at > next) return make_ready(group.at, group.lanes);
      group.lanes |= ready.back().lanes;
      ready.pop_back();
      next = ready.empty() ? INT_MAX : ready.back().at;
    }
    if (budget == 0) return make_ready(group.at, group.lanes);
    --budget;
    at_ = group.at;
    Instruction& instruction = code[group.at];
    Mask active = group.lanes;
    if (instruction.guard >= 0) {
      const Mask guard = predicate(static_cast<uint32_t>(instruction.guard));
      active &= instruction.guard_negated ? ~guard : guard;
    }
    ++instruction.issues;
    instruction.lanes += static_cast<uint64_t>(__builtin_popcount(active));
    switch (instruction.flow) {
      case Flow::next:
        if (active) instruction.run(*this, instruction, active);
        ++group.at;
        break;
      case Flow::branch: {
        const Mask staying = group.lanes & ~active;
        if (staying && active) {
          make_ready(instruction.target, active);
          return make_ready(group.at + 1, staying);
        }
        group.at = active ? instruction.target : group.at + 1;
        break;
      }
      case Flow::indexed_branch: {
        const std::vector<int>& targets = statement_at(*program, group.at).targets;
        for (Mask left = active; left; left &= left - 1) {
          const uint32_t index = this->at<uint32_t>(instruction.slot[0]).lane[__builtin_ctz(left)];
          if (index >= targets.size()) throw LaneFault(__builtin_ctz(left), "a branch that has no such target");
          make_ready(program->first_of[static_cast<size_t>(targets[index])], left & -left);
        }
        const Mask staying = group.lanes & ~active;
        return staying ? make_ready(group.at + 1, staying) : void();
      }
      case Flow::exit:
        live &= ~active;
        group.lanes &= ~active;
        ++group.at;
        break;
      case Flow::block_barrier:
        if (active) at_block_barrier.push_back({group.at, active, instruction.number[0]});
        group.lanes &= ~active;
        ++group.at;
        break;
      case Flow::warp_barrier:
        if (active) meet(instruction, group, active);
        ++group.at;
        break;
    }
  }
}

// --- a block ----------------------------------------------------------------------------------------------------

int Block::live_threads() const {
  int count = 0;
  for (const Warp& warp : warps) count += __builtin_popcount(warp.live);
  return count;
}

void Block::release_barriers() {
  for (int barrier = 0; barrier < 16; ++barrier) {
    int come = 0, expected = 0, agreeing = 0;
    for (Warp& warp : warps)
      for (const Waiting& waiting : warp.at_block_barrier) {
        if (waiting.barrier != barrier) continue;
        const Instruction& instruction = warp.program->code[static_cast<size_t>(waiting.at)];
        come += __builtin_popcount(waiting.lanes);
        expected = instruction.number[1];
        if (instruction.number[2]) agreeing += __builtin_popcount(warp.predicate(instruction.slot[1]) & waiting.lanes);
      }
    if (expected == 0) expected = live_threads();
    if (come == 0 || come < expected) continue;
    ++barriers;
    for (Warp& warp : warps) {
      std::vector<Waiting> staying;
      for (const Waiting& waiting : warp.at_block_barrier) {
        if (waiting.barrier != barrier) {
          staying.push_back(waiting);
          continue;
        }
        const Instruction& instruction = warp.program->code[static_cast<size_t>(waiting.at)];
        if (instruction.number[2] == 1) {
          Vector<uint32_t> count;
          std::fill_n(count.lane, kLanes, static_cast<uint32_t>(agreeing));
          warp.put(instruction.slot[0], count, waiting.lanes);
        } else if (instruction.number[2]) {
          const bool holds = instruction.number[2] == 2 ? agreeing == come : agreeing > 0;
          warp.put_predicate(instruction.slot[0], holds ? kAllLanes : 0, waiting.lanes);
        }
        warp.make_ready(waiting.at + 1, waiting.lanes);
      }
      warp.at_block_barrier = std::move(staying);
    }
  }
}

namespace {

// Every thread waits, and for none that could come.
[[noreturn]] void report_deadlock(const Block& block) {
  for (const Warp& warp : block.warps)
    for (const std::vector<Waiting>& all : {warp.at_warp_barrier, warp.at_block_barrier})
      for (const Waiting& waiting : all)
        throw Fault("a thread waits for ever" + warp.missing(waiting) + "\n  at: " + place(*warp.program, waiting.at) +
                    "\n  in: " + warp.program->kernel->name + ", " +
                    thread_text(block, warp.number * kLanes + __builtin_ctz(waiting.lanes)));
  throw Fault("threads wait for ever");
}

void run_block(Block& block, std::mt19937_64& random) {
  uint64_t done = 0;
  std::vector<Warp*> able;
  while (block.live_threads() > 0) {
    able.clear();
    for (Warp& warp : block.warps)
      if (!warp.ready.empty()) able.push_back(&warp);
    if (able.empty()) report_deadlock(block);
    Warp& warp = *able[random() % able.size()];
    const uint64_t turn = 1 + random() % kLongestTurn;
    warp.run(turn);
    done += turn;
    if (done > kMostInstructions)
      throw Fault("a loop without an end in " + warp.program->kernel->name + ", " +
                  thread_text(block, warp.number * kLanes));
    if (warp.ready.empty()) block.release_barriers();
  }
}

}  // namespace

void run(Program& program, const Launch& launch) {
  std::mt19937_64 random(launch.seed);
  const uint64_t threads = launch.block.count(), blocks = launch.grid.count();
  if (threads == 0 || threads > 1024 || blocks == 0) throw Fault("a launch of an invalid size");
  const size_t warps = (threads + kLanes - 1) / kLanes;
  program.prepare_files(warps);
  std::vector<uint64_t> order(blocks);
  std::iota(order.begin(), order.end(), uint64_t{0});
  std::shuffle(order.begin(), order.end(), random);
  Block block;
  block.size = launch.block;
  block.grid = launch.grid;
  block.parameters = launch.parameters;
  block.dynamic_bytes = launch.dynamic_bytes;
  block.warps.resize(warps);
  const size_t shared = program.module->shared_bytes + launch.dynamic_bytes;
  for (const uint64_t number : order) {
    block.index = {static_cast<uint32_t>(number % launch.grid.x),
                   static_cast<uint32_t>(number / launch.grid.x % launch.grid.y),
                   static_cast<uint32_t>(number / launch.grid.x / launch.grid.y)};
    block.shared.start(shared);
    ++block.clock;
    for (size_t k = 0; k < warps; ++k)
      block.warps[k].start(block, program, static_cast<int>(k), static_cast<int>(threads - kLanes * k));
    run_block(block, random);
  }
}

}  // namespace ptx
