// What this machine's GPUs and driver can run of what was built.
#include <climits>

#include "cuda/kernels.h"
#include "cuda/launch.h"

namespace fusedvae {
namespace cuda {

namespace {

// As 8.0, from 80 or 800.
std::string dotted(int version, int unit) {
  return std::to_string(version / unit) + "." + std::to_string(version % unit / 10);
}

// Compute capabilities, a hundred times over: those that binaries were compiled for, in ascending order, and the oldest
// that there is PTX for.
constexpr int kBuilt[] = {__CUDA_ARCH_LIST__};
constexpr int kNewestBuilt = kBuilt[sizeof kBuilt / sizeof *kBuilt - 1];
#if defined(FUSEDVAE_OLDEST_PTX)
constexpr int kOldestPtx = FUSEDVAE_OLDEST_PTX;
#else
constexpr int kOldestPtx = INT_MAX;
#endif

// Whether the newest is for one chip's own features (90a), of which neither binary nor PTX serves another chip.
#if defined(FUSEDVAE_NEWEST_ARCH_IS_ONE_CHIP)
constexpr bool kNewestIsOneChip = true;
#else
constexpr bool kNewestIsOneChip = false;
#endif

// A binary serves its own generation from its own version on.
bool has_binary(int capability) {
  if (capability == kNewestBuilt) return true;
  for (const int built : kBuilt)
    if (built / 100 == capability / 100 && built <= capability && !(kNewestIsOneChip && built == kNewestBuilt))
      return true;
  return false;
}

// PTX serves all that came after it, if the driver can compile it: one no older than the compiler that wrote it.
bool has_ptx(int capability) {
  return capability >= kOldestPtx;
}

}  // namespace

std::vector<std::string> unavailable() {
  int driver = 0;
  if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0) {
    cudaGetLastError();
    return {"there is no NVIDIA driver"};
  }
  if (driver / 1000 < CUDART_VERSION / 1000)
    return {"the driver is for CUDA up to " + dotted(driver, 1000) + ", and the CUDA kernels were compiled with " +
            dotted(CUDART_VERSION, 1000) + "; update the driver, or install fusedvae again with an older nvcc"};
  int devices = 0;
  const cudaError_t error = cudaGetDeviceCount(&devices);
  if (error != cudaSuccess) {
    cudaGetLastError();
    return {std::string("CUDA finds no GPU (") + cudaGetErrorString(error) + ")"};
  }
  std::vector<std::string> reasons;
  for (int device = 0; device < devices; ++device) {
    int major = 0, minor = 0;
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "cudaDeviceGetAttribute");
    check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "cudaDeviceGetAttribute");
    const int capability = 100 * major + 10 * minor;
    const std::string gpu = "GPU " + std::to_string(device) + " has compute capability " + dotted(capability, 100);
    if (has_binary(capability) || (has_ptx(capability) && driver >= CUDART_VERSION))
      reasons.emplace_back();
    else if (has_ptx(capability))
      reasons.push_back(
          gpu + ", for which the driver compiles the CUDA kernels, and it knows CUDA up to " + dotted(driver, 1000) +
          " alone, where they were written with " + dotted(CUDART_VERSION, 1000) +
          "; update the driver, or install fusedvae again with FUSEDVAE_CUDA_ARCHS=" + dotted(capability, 100));
    else
      reasons.push_back(gpu + ", which the CUDA kernels were not compiled for; install fusedvae again with " +
                        "FUSEDVAE_CUDA_ARCHS=" + dotted(capability, 100));
  }
  return reasons;
}

}  // namespace cuda
}  // namespace fusedvae
