// Puts the emulated CUDA kernels in the place of the CPU's, for the bindings: tensors on the CPU are all they need.
#include <cstdlib>
#include <cstring>
#include <memory>

#include "cpu/kernels.h"
#include "cuda/kernels.h"

namespace fusedvae {

namespace {

// A workspace of just the size asked for, so that the sanitizers know its end, and with nothing of use in it.
class Workspace {
 public:
  explicit Workspace(int64_t bytes) : bytes_(bytes > 0 ? std::aligned_alloc(16, rounded(bytes)) : nullptr, std::free) {
    if (bytes <= 0) return;
    place.workspace = bytes_.get();
    std::memset(place.workspace, 0xFF, rounded(bytes));
    std::memset(place.workspace, 0, counter_bytes);
  }
  // A launch leaves the counter as it found it.
  ~Workspace() {
    int32_t counter = 0;
    if (place.workspace) std::memcpy(&counter, place.workspace, counter_bytes);
    if (counter != 0) std::abort();
  }
  cuda::Place place;

 private:
  static constexpr size_t counter_bytes = 4;
  static size_t rounded(int64_t bytes) { return (static_cast<size_t>(bytes) + 15) / 16 * 16; }
  std::unique_ptr<void, void (*)(void*)> bytes_;
};

void normal(const NormalTask& task, int) {
  cuda::normal(task, {});
}
void latent(const LatentTask& task, int) {
  cuda::latent(task, Workspace(cuda::workspace_bytes(task)).place);
}
void nll(const NllTask& task, int) {
  cuda::nll(task, Workspace(cuda::workspace_bytes(task)).place);
}
void elbo(const ElboTask& task, int) {
  cuda::elbo(task, Workspace(cuda::workspace_bytes(task)).place);
}
void scale(const ScaleTask& task, int) {
  cuda::scale(task, {});
}

}  // namespace

const Kernels& kernels() {
  static const Kernels emulated = {"emulated", normal, latent, nll, elbo, scale};
  return emulated;
}

}  // namespace fusedvae
