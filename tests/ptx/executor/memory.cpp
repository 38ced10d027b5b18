#include "memory.h"

#include <algorithm>
#include <cstdio>

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

}  // namespace ptx
