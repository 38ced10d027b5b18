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

// Where windows of other memory begin in the generic address space; no address of the process is as high.
constexpr uint64_t kSharedWindow = uint64_t{1} << 60, kLocalWindow = uint64_t{2} << 60,
                   kParameterWindow = uint64_t{3} << 60, kWindows = uint64_t{15} << 60;

extern Buffers buffers;

}  // namespace ptx
