// What runs a kernel: warps of 32 lanes over decoded instructions. A register of a warp is 32 values side by side, so
// that an instruction is a loop that the compiler makes vector code of.
#pragma once

#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "memory.h"
#include "program.h"

namespace ptx {

constexpr int kLanes = 32;
// A set of lanes.
using Mask = uint32_t;
constexpr Mask kAllLanes = ~Mask{0};

template <class T>
struct alignas(64) Vector {
  T lane[kLanes];
};

struct Block;
struct Instruction;
class Warp;

using Handler = void (*)(Warp&, const Instruction&, Mask);

// How a warp goes on after an instruction.
enum class Flow : uint8_t {
  next,
  branch,
  indexed_branch,
  exit,
  block_barrier,
  warp_barrier,  // and whatever else is done by the lanes of a mask together
};

struct Instruction {
  static constexpr int kMostSlots = 12;

  Handler run = nullptr;
  Flow flow = Flow::next;
  bool guard_negated = false;
  bool is_counted = true;  // not a part that decoding has added
  int guard = -1;          // where in a register file; or none
  int target = -1;
  uint32_t slot[kMostSlots] = {};  // operands, the destination first: where in a register file
  int number[4] = {};              // what handlers have of their own
  int64_t offset = 0;
  int statement = 0;
  uint64_t issues = 0, lanes = 0;  // how often it ran: by a warp, by a lane
};

// A kernel in instructions, and the register files of its warps.
struct Program {
  const Module* module = nullptr;
  const Kernel* kernel = nullptr;
  std::vector<Instruction> code;
  std::vector<int> first_of;  // the first instruction of each statement, and the end
  struct Constant {
    uint32_t slot;
    int bytes;
    uint64_t bits;
  };
  std::vector<Constant> constants;
  struct Special {
    uint32_t slot;
    std::string name;
  };
  std::vector<Special> specials;
  uint32_t file_bytes = 0;
  std::vector<std::unique_ptr<char, void (*)(void*)>> files;  // a warp's
  uint64_t launches = 0, bytes_read = 0, bytes_written = 0;   // of global memory

  // At least so many register files, the constants in them.
  void prepare_files(size_t warps);
};

struct Group {
  int at;  // an instruction
  Mask lanes;
};

// One that waits for other lanes; of a barrier of the block, which.
struct Waiting {
  int at;
  Mask lanes;
  int barrier;
};

class Warp {
 public:
  Block* block = nullptr;
  Program* program = nullptr;
  char* file = nullptr;
  int number = 0;
  Mask live = 0;
  uint32_t barriers = 0;     // of the warp, that have been passed
  std::vector<Group> ready;  // the lowest instruction last
  std::vector<Waiting> at_warp_barrier, at_block_barrier;
  std::vector<char> local;  // memory of each lane, one after the other

  template <class T>
  Vector<T>& at(uint32_t slot) const {
    return *reinterpret_cast<Vector<T>*>(file + slot);
  }
  Mask& predicate(uint32_t slot) { return *reinterpret_cast<Mask*>(file + slot); }

  // Puts values into the lanes of a mask.
  template <class T>
  void put(uint32_t slot, const Vector<T>& values, Mask mask) {
    Vector<T>& destination = at<T>(slot);
    if (mask == kAllLanes) {
      destination = values;
      return;
    }
    for (int l = 0; l < kLanes; ++l) destination.lane[l] = mask >> l & 1 ? values.lane[l] : destination.lane[l];
  }
  void put_predicate(uint32_t slot, Mask values, Mask mask) {
    predicate(slot) = (predicate(slot) & ~mask) | (values & mask);
  }

  // Goes on until all lanes wait or have finished, or for so many instructions.
  void run(uint64_t budget);
  void make_ready(int at, Mask lanes);
  // The lanes that one waits for in vain, in words.
  std::string missing(const Waiting& waiting) const;
  // At the first instruction, with so many threads at most.
  void start(Block& block, Program& program, int number, int threads);

 private:
  void go_on(Group group, uint64_t& budget);
  void meet(Instruction& instruction, Group& group, Mask coming);

  int at_ = 0;  // the instruction under way
  Mask all_ = 0;
};

struct Size {
  uint32_t x = 1, y = 1, z = 1;
  uint64_t count() const { return uint64_t{x} * y * z; }
};

struct Block {
  Size index, size, grid;
  const char* parameters = nullptr;
  std::vector<Warp> warps;
  SharedMemory shared;
  uint64_t dynamic_bytes = 0;
  uint64_t clock = 0;
  uint32_t barriers = 0;  // that have been released

  int live_threads() const;
  // Lets those on who wait at a barrier for which all have come.
  void release_barriers();
};

struct Launch {
  Size grid, block;
  size_t dynamic_bytes = 0;
  uint64_t seed = 0;
  const char* parameters = nullptr;
};

// Throws Fault, which tells of the kernel, the instruction and the thread.
void run(Program& program, const Launch& launch);

// A Fault of one lane.
struct LaneFault : Fault {
  LaneFault(int lane_, const std::string& message) : Fault(message), lane(lane_) {}
  int lane;
};

// --- decoding ---------------------------------------------------------------------------------------------------

// Makes the instructions of a statement. Each decoder knows some opcodes, and says whether this was one.
class Decoder;
bool decode_integers(Decoder&);
bool decode_comparisons(Decoder&);
bool decode_floats(Decoder&);
bool decode_conversions(Decoder&);
bool decode_moves(Decoder&);
bool decode_memory(Decoder&);
bool decode_warp(Decoder&);
bool decode_control(Decoder&);

std::unique_ptr<Program> decode(const Module& module, const Kernel& kernel);

// By how many units in the last place approximate functions are off, at most; 0 rounds them correctly.
extern int approximation_error;

}  // namespace ptx
