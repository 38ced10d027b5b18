// What this machine's GPUs and driver can run of what was built.
#include <algorithm>
#include <initializer_list>

#include "cuda/kernels.h"
#include "cuda/launch.h"

namespace fusedvae {
namespace cuda {

namespace {

// As 8.0, from 80 or 800.
std::string dotted(int version, int unit) {
  return std::to_string(version / unit) + "." + std::to_string(version % unit / 10);
}

// Compute capabilities, a hundred times over: those that binaries were compiled for, those of them that are for one
// chip's own features (90a) and serve no other chip, and those that there is PTX for.
constexpr std::initializer_list<int> kBinaries = {__CUDA_ARCH_LIST__}, kOneChip = {FUSEDVAE_CUDA_ONE_CHIP},
                                     kPtx = {FUSEDVAE_CUDA_PTX};

// A binary serves its own generation from its own version on; PTX serves all that came after it.
bool serves(int capability) {
  for (const int ptx : kPtx)
    if (ptx <= capability) return true;
  for (const int built : kBinaries) {
    const bool is_own = std::find(kOneChip.begin(), kOneChip.end(), built) != kOneChip.end();
    if (is_own ? built == capability : built / 100 == capability / 100 && built <= capability) return true;
  }
  return false;
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
    reasons.push_back(serves(capability)
                          ? ""
                          : "GPU " + std::to_string(device) + " has compute capability " + dotted(capability, 100) +
                                ", which the CUDA kernels were not compiled for; install fusedvae again with "
                                "FUSEDVAE_CUDA_ARCHS=" +
                                dotted(capability, 100));
  }
  return reasons;
}

}  // namespace cuda
}  // namespace fusedvae
