// Chooses among the copies of the kernels, one an instruction set, when the extension is loaded.

#include <cstdlib>
#include <cstring>

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

const Kernels& choose() {
  const char* wanted = std::getenv("FUSEDVAE_CPU_ISA");
  auto allowed = [wanted](const char* isa) { return !wanted || !*wanted || std::strcmp(wanted, isa) == 0; };
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (allowed("avx512") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return avx512::table;
  // Every processor with AVX2 has F16C, about which Clang 14 cannot ask.
  if (allowed("avx2") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return avx2::table;
#else
  (void)allowed;
#endif
  return baseline::table;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace fusedvae
