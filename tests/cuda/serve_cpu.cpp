// Gives the bindings the emulated CUDA kernels instead of the CPU's: tensors on the CPU are all they need.
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

#include "cpu/kernels.h"
#include "cuda/kernels.h"

namespace fusedvae {

namespace {

// A launch, with a workspace of just the size asked for, and nothing of use in it.
class Emulated {
 public:
  explicit Emulated(int64_t bytes) : bytes_(bytes > 0 ? std::aligned_alloc(16, rounded(bytes)) : nullptr, std::free) {
    if (bytes <= 0) return;
    launch.workspace = bytes_.get();
    std::memset(launch.workspace, 0xFF, rounded(bytes));
    std::memset(launch.workspace, 0, counter_bytes);
  }
  // A launch leaves the counter as it found it.
  ~Emulated() {
    int32_t counter = 0;
    if (launch.workspace) std::memcpy(&counter, launch.workspace, counter_bytes);
    if (counter != 0) std::abort();
  }
  cuda::Launch launch;

 private:
  static constexpr size_t counter_bytes = 4;
  static size_t rounded(int64_t bytes) { return (static_cast<size_t>(bytes) + 15) / 16 * 16; }
  std::unique_ptr<void, void (*)(void*)> bytes_;
};

void normal(const NormalTask& task, int) {
  cuda::normal(task, {});
}
void latent(const LatentTask& task, int) {
  cuda::latent(task, Emulated(cuda::workspace_bytes(task)).launch);
}
void objective(const ObjectiveTask& task, int) {
  cuda::objective(task, Emulated(cuda::workspace_bytes(task)).launch);
}
void scale(const ScaleTask& task, int) {
  cuda::scale(task, {});
}

}  // namespace

const Kernels& kernels() {
  static const Kernels emulated = {"emulated", normal, latent, objective, scale};
  return emulated;
}

void out_of_memory() {
  throw std::bad_alloc();
}

}  // namespace fusedvae
