// Threads: torch's own, through the OpenMP runtime that torch has loaded.
//
// GOMP_parallel is the entry point behind `#pragma omp parallel` in libgomp; the runtimes of LLVM and Intel have it
// too. A weak reference binds to whichever one is in the process and needs none at link time; without any, the loops
// run on the calling thread.
#pragma once

#include <cstdint>

#include "math/target.h"

extern "C" {
__attribute__((weak)) void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned flags);
__attribute__((weak)) int omp_get_thread_num(void);
__attribute__((weak)) int omp_get_num_threads(void);
__attribute__((weak)) int omp_in_parallel(void);
}

namespace fusedvae {
namespace FUSEDVAE_NAMESPACE {

// A function by reference, whatever its type. To be called while the function lives.
template <class... Arguments>
class Callable {
 public:
  template <class F>
  Callable(const F& f)  // NOLINT: a conversion, so that lambdas may be passed
      : f_(&f), call_([](const void* f_, Arguments... given) { (*static_cast<const F*>(f_))(given...); }) {}
  void operator()(Arguments... given) const { call_(f_, given...); }

 private:
  const void* f_;
  void (*call_)(const void*, Arguments...);
};

// body(begin, end) over ranges that cover [0, tasks).
struct Loop {
  int64_t tasks;
  Callable<int64_t, int64_t> body;

  // The share of thread t of n.
  void share(int64_t t, int64_t n) const {
    const int64_t begin = tasks * t / n, end = tasks * (t + 1) / n;
    if (begin < end) body(begin, end);
  }
};

// Runs loops on at most `threads` threads, each of which takes an even share of every one.
inline void parallel_for(int threads, const Loop* const* loops, int count) {
  const auto share = [&](int64_t t, int64_t n) {
    for (int k = 0; k < count; ++k) loops[k]->share(t, n);
  };
  int64_t tasks = 0;
  for (int k = 0; k < count; ++k)
    if (loops[k]->tasks > tasks) tasks = loops[k]->tasks;
  if (tasks < threads) threads = static_cast<int>(tasks);
  if (threads <= 1 || !GOMP_parallel || !omp_get_thread_num || !omp_get_num_threads ||
      (omp_in_parallel && omp_in_parallel())) {
    share(0, 1);
    return;
  }
  Callable<int64_t, int64_t> callable = share;
  GOMP_parallel(
      [](void* data) {
        (*static_cast<const Callable<int64_t, int64_t>*>(data))(omp_get_thread_num(), omp_get_num_threads());
      },
      &callable, static_cast<unsigned>(threads), 0);
}

}  // namespace FUSEDVAE_NAMESPACE
}  // namespace fusedvae
