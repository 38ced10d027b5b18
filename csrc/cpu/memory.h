// Memory: what the kernels need for themselves, and how large outputs are best written.
#pragma once

#include <cstdint>
#include <cstdlib>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include "cpu/kernels.h"
#include "operand.h"

namespace fusedvae {
namespace FUSEDVAE_NAMESPACE {

// Bytes of a cache line, and of the widest vectors.
constexpr int64_t kLine = 64;

// Scratch memory; not std::vector, whose code the linker would share between instruction sets.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t count = 0) {
    if (count <= kFew) return;
    const size_t lines = (static_cast<size_t>(count) * sizeof(T) + kLine - 1) / kLine;
    data_ = static_cast<T*>(std::aligned_alloc(kLine, lines * kLine));
    if (!data_) out_of_memory();
  }
  ~Scratch() {
    if (data_ != few_) std::free(data_);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T& operator[](int64_t i) { return data_[i]; }
  T* at(int64_t i) { return data_ + i; }
  void zero(int64_t count) { __builtin_memset(data_, 0, static_cast<size_t>(count) * sizeof(T)); }

 private:
  static constexpr int64_t kFew = 32;
  alignas(kLine) T few_[kFew];
  T* data_ = few_;
};
using Doubles = Scratch<double>;

// Bytes of outputs from which on they are written past the caches: more than a cache could keep for their reader.
constexpr int64_t kPastCachesBytes = int64_t{24} << 20;

// Bytes of an output from which on its pages are worth asking for: malloc maps what has 32 MiB anew, and what is a
// little smaller it often takes from memory that it gave back to the system after the last step.
constexpr int64_t kHugePageBytes = int64_t{8} << 20;

static inline int64_t bytes_of(const Operand& op, const Extent& e) {
  return op.data ? e.count() * size_of(op.dtype) : 0;
}

// Fresh memory costs a fault a page at its first touch, which for a large gradient takes longer than computing it.
// Ask for pages of 2 MiB; a hint, so that nothing depends on the answer.
static inline void prefer_huge_pages(const Operand& op, const Extent& e) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = uintptr_t{2} << 20;
  if (bytes_of(op, e) < kHugePageBytes) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(op.data) + page - 1) & ~(page - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(op.data) + static_cast<uintptr_t>(bytes_of(op, e))) & ~(page - 1);
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)op, (void)e;
#endif
}

// Whether a large output, by its middle, lies in memory that the system has yet to give. It clears each page at its
// first touch, by way of the caches: what is written then past these has to get it out of them, which takes a fifth
// longer than writing it where it is.
static inline bool is_untouched(const Operand& op, const Extent& e) {
#if defined(__linux__)
  const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t middle = reinterpret_cast<uintptr_t>(op.data) + static_cast<uintptr_t>(bytes_of(op, e)) / 2;
  unsigned char is_there = 1;
  return mincore(reinterpret_cast<void*>(middle & ~(page - 1)), 1, &is_there) == 0 && !(is_there & 1);
#else
  (void)op, (void)e;
  return false;
#endif
}

}  // namespace FUSEDVAE_NAMESPACE
}  // namespace fusedvae
