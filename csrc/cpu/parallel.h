// Threads: torch's own, through the OpenMP runtime that torch has loaded.
//
// GOMP_parallel is the entry point behind `#pragma omp parallel` in libgomp; the runtimes of LLVM and Intel have it
// too. A weak reference binds to whichever one is in the process and needs none at link time; without any, the loops
// run on the calling thread.
#pragma once

#include <cstdint>

extern "C" {
__attribute__((weak)) void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned flags);
__attribute__((weak)) int omp_get_thread_num(void);
__attribute__((weak)) int omp_get_num_threads(void);
__attribute__((weak)) int omp_in_parallel(void);
}

namespace fusedvae {

// Calls body(begin, end) over disjoint ranges that cover [0, tasks), on at most `threads` threads.
template <class Body>
void parallel_for(int64_t tasks, int threads, const Body& body) {
  if (tasks <= 0) return;
  if (tasks < threads) threads = static_cast<int>(tasks);
  if (threads <= 1 || !GOMP_parallel || !omp_get_thread_num || !omp_get_num_threads ||
      (omp_in_parallel && omp_in_parallel())) {
    body(int64_t{0}, tasks);
    return;
  }
  struct Share {
    const Body* body;
    int64_t tasks;
  } share{&body, tasks};
  GOMP_parallel(
      [](void* data) {
        const Share& s = *static_cast<Share*>(data);
        const int64_t t = omp_get_thread_num(), n = omp_get_num_threads();
        const int64_t begin = s.tasks * t / n, end = s.tasks * (t + 1) / n;
        if (begin < end) (*s.body)(begin, end);
      },
      &share, static_cast<unsigned>(threads), 0);
}

}  // namespace fusedvae
