// The memory that kernels may touch: buffers of the process, by address and size.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace ptx {

struct Buffer {
  uint64_t begin = 0, end = 0;
  bool contains(uint64_t address, uint64_t bytes) const { return begin <= address && address + bytes <= end; }
};

// Buffers that lie in one another, such as a tensor and a view of it, are one. Those that only touch are not.
class Buffers {
 public:
  void add(uint64_t address, uint64_t bytes);
  void clear() { sorted_.clear(); }
  // The buffer of an address, or the nearest before it; null if there is none.
  const Buffer* at_or_before(uint64_t address) const;
  // What is wrong with an access.
  std::string complaint(uint64_t address, uint64_t bytes) const;

 private:
  std::vector<Buffer> sorted_;
};

// A block's shared memory, and who touched each byte of it last. Accesses of different threads must be ordered, by a
// barrier of the block or by a bar.warp.sync of their warp, unless all of them read.
class SharedMemory {
 public:
  enum class Access { read, write, atomic };
  // When an access is: how many barriers of the block, and of the thread's warp, have been before.
  struct Time {
    uint32_t barriers = 0, warp_barriers = 0;
  };

  // As a block finds it.
  void start(size_t bytes);
  size_t size() const { return bytes_.size(); }
  char* data() { return bytes_.data(); }
  // What is wrong with an access of a thread; empty if nothing is. Of a write, the value may be told: several threads
  // may write the same one, as Triton's do where there are more of them than elements.
  std::string complaint(uint64_t address, uint64_t bytes, Access access, int thread, Time time,
                        const char* value = nullptr);

 private:
  struct Touch {
    int thread = -1;
    bool is_of_several = false, is_of_several_warps = false;  // threads, since the last barrier that orders them
    Time time;
  };
  struct Byte {
    Touch written, read;
  };
  static bool races(const Touch& earlier, int thread, Time time);
  static void note(Touch& touch, int thread, Time time);

  std::vector<char> bytes_;
  std::vector<Byte> history_;
};

// Where windows of other memory begin in the generic address space; no address of the process is as high.
constexpr uint64_t kSharedWindow = uint64_t{1} << 60, kLocalWindow = uint64_t{2} << 60,
                   kParameterWindow = uint64_t{3} << 60, kWindows = uint64_t{15} << 60;

extern Buffers buffers;

}  // namespace ptx
