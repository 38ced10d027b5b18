// Chooses among the copies of the kernels, one for each instruction set, when one is first needed.

#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>

#include "cpu/kernels.h"

namespace fusedvae {

namespace baseline {
extern const Kernels table;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Kernels table;
}
namespace avx512 {
extern const Kernels table;
}
#endif

namespace {

struct Choice {
  const Kernels& kernels;
  bool runs_here;
};

const Kernels& choose() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  // Every processor with AVX2 has F16C, about which Clang 14 cannot ask.
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const Choice choices[] = {{avx512::table, has_avx512}, {avx2::table, has_avx2}, {baseline::table, true}};
#else
  const Choice choices[] = {{baseline::table, true}};
#endif
  const char* const wanted = std::getenv("FUSEDVAE_CPU_ISA");
  std::string names;
  for (const Choice& choice : choices) {
    if (!choice.runs_here) continue;
    if (!wanted || !*wanted || std::strcmp(wanted, choice.kernels.isa) == 0) return choice.kernels;
    names += (names.empty() ? "'" : ", '") + std::string(choice.kernels.isa) + "'";
  }
  throw std::runtime_error("FUSEDVAE_CPU_ISA: expected one of " + names + " on this machine; got '" + wanted + "'");
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

void out_of_memory() {
  throw std::bad_alloc();
}

}  // namespace fusedvae
