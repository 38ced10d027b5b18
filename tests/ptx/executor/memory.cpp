#include "memory.h"

#include <algorithm>
#include <cstdio>
#include <cstring>

namespace ptx {

Buffers buffers;

namespace {

std::string hexadecimal(uint64_t number) {
  char text[32];
  std::snprintf(text, sizeof text, "0x%llx", static_cast<unsigned long long>(number));
  return text;
}

}  // namespace

void Buffers::add(uint64_t address, uint64_t bytes) {
  if (bytes == 0) return;
  Buffer added{address, address + bytes};
  std::vector<Buffer> kept;
  for (const Buffer& buffer : sorted_) {
    if (buffer.end <= added.begin || added.end <= buffer.begin) {
      kept.push_back(buffer);
      continue;
    }
    added.begin = std::min(added.begin, buffer.begin);
    added.end = std::max(added.end, buffer.end);
  }
  const auto before = [](const Buffer& a, const Buffer& b) { return a.begin < b.begin; };
  kept.insert(std::upper_bound(kept.begin(), kept.end(), added, before), added);
  sorted_ = std::move(kept);
}

const Buffer* Buffers::at_or_before(uint64_t address) const {
  const auto after = std::upper_bound(sorted_.begin(), sorted_.end(), address,
                                      [](uint64_t value, const Buffer& buffer) { return value < buffer.begin; });
  return after == sorted_.begin() ? nullptr : &*(after - 1);
}

std::string Buffers::complaint(uint64_t address, uint64_t bytes) const {
  std::string text = std::to_string(bytes) + " bytes at " + hexadecimal(address) + " are out of bounds: ";
  const Buffer* const before = at_or_before(address);
  const Buffer* after = nullptr;
  for (const Buffer& buffer : sorted_)
    if (buffer.begin > address && (!after || buffer.begin < after->begin)) after = &buffer;
  if (!before && !after) return text + "the launch has no buffers";
  const auto described = [](const Buffer& buffer) {
    return "the buffer of " + std::to_string(buffer.end - buffer.begin) + " bytes at " + hexadecimal(buffer.begin);
  };
  if (before && (!after || address < before->end || address - before->end <= after->begin - address)) {
    if (address < before->end)
      return text + std::to_string(address + bytes - before->end) + " of them past the end of " + described(*before);
    return text + std::to_string(address - before->end) + " bytes behind the end of " + described(*before);
  }
  return text + std::to_string(after->begin - address) + " bytes before " + described(*after);
}

// --- shared memory ----------------------------------------------------------------------------------------------

namespace {

bool is_of_one_warp(int thread, int other) {
  return thread / 32 == other / 32;
}

}  // namespace

void SharedMemory::start(size_t bytes) {
  bytes_.assign(bytes, static_cast<char>(0xFF));  // NaN in every format
  history_.assign(bytes, Byte{});
}

bool SharedMemory::races(const Touch& earlier, int thread, Time time) {
  if (earlier.thread < 0 || earlier.time.barriers != time.barriers) return false;
  if (earlier.is_of_several_warps) return true;
  if (earlier.thread == thread && !earlier.is_of_several) return false;
  return !is_of_one_warp(earlier.thread, thread) || earlier.time.warp_barriers == time.warp_barriers;
}

void SharedMemory::note(Touch& touch, int thread, Time time) {
  const bool is_recent = touch.thread >= 0 && touch.time.barriers == time.barriers;
  const bool is_of_other_warp = is_recent && !is_of_one_warp(touch.thread, thread);
  const bool is_unordered = is_recent && !is_of_other_warp && touch.time.warp_barriers == time.warp_barriers;
  touch.is_of_several = is_unordered && (touch.is_of_several || touch.thread != thread);
  touch.is_of_several_warps = is_of_other_warp || (is_recent && touch.is_of_several_warps);
  touch.thread = thread;
  touch.time = time;
}

std::string SharedMemory::complaint(uint64_t address, uint64_t bytes, Access access, int thread, Time time,
                                    const char* value) {
  const bool is_same = value && std::memcmp(value, bytes_.data() + address, bytes) == 0;
  for (uint64_t k = address; k < address + bytes; ++k) {
    Byte& byte = history_[k];
    if (access != Access::write && byte.written.thread < 0) return "a read of shared memory that nothing has written";
    if (access == Access::atomic) continue;
    const bool is_write = access == Access::write;
    if (is_same && byte.written.thread >= 0) continue;
    if (races(byte.written, thread, time))
      return std::string(is_write ? "a write" : "a read") + " of shared memory that thread " +
             std::to_string(byte.written.thread) + " writes, with no barrier between";
    if (is_write && races(byte.read, thread, time))
      return "a write of shared memory that thread " + std::to_string(byte.read.thread) +
             " reads, with no barrier between";
    note(is_write ? byte.written : byte.read, thread, time);
  }
  return "";
}

}  // namespace ptx
