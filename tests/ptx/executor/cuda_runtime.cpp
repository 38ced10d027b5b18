// As much of the CUDA runtime as the extension calls, over the executor: one device, of compute capability 9.0, whose
// memory is the process's. Linked into the extension in the real one's place, so that kernels are registered, found and
// launched as they are on a GPU. They run at once; a fault of theirs is the error of the launch.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "interface.h"

namespace {

struct Configuration {
  dim3 grid, block;
  size_t shared_bytes;
  cudaStream_t stream;
};

std::map<const void*, std::string>& kernels() {
  static std::map<const void*, std::string> by_host_function;
  return by_host_function;
}

std::map<const void*, std::vector<char>>& variables() {
  static std::map<const void*, std::vector<char>> by_host_variable;
  return by_host_variable;
}

thread_local std::vector<Configuration> configurations;
thread_local int device = 0;
thread_local cudaError_t last_error = cudaSuccess;
thread_local std::string fault;

// The stream that launches must name, if one is told.
cudaStream_t expected_stream = nullptr;
bool expects_stream = false;

cudaError_t failed(cudaError_t error, const std::string& message) {
  fault = message;
  return last_error = error;
}

cudaError_t launch(const void* function, dim3 grid, dim3 block, void** arguments, size_t shared_bytes,
                   cudaStream_t stream) {
  const auto found = kernels().find(function);
  if (found == kernels().end()) return failed(cudaErrorInvalidDeviceFunction, "a kernel that was not registered");
  if (expects_stream && stream != expected_stream)
    return failed(cudaErrorInvalidResourceHandle, "a launch on another stream than the current one");
  const std::string& name = found->second;
  const int module = ptx_module_of(name.c_str());
  if (module < 0) return failed(cudaErrorSymbolNotFound, ptx_error());
  const uint32_t sizes[2][3] = {{grid.x, grid.y, grid.z}, {block.x, block.y, block.z}};
  const int count = ptx_parameters(module, name.c_str());
  if (ptx_launch(module, name.c_str(), sizes[0], sizes[1], shared_bytes, arguments, count))
    return failed(cudaErrorLaunchFailure, ptx_error());
  return cudaSuccess;
}

}  // namespace

extern "C" {

// --- what nvcc's code calls

void** __cudaRegisterFatBinary(void* binary) {
  return static_cast<void**>(binary);
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterVar(void**, char* host_variable, char*, const char*, int, size_t bytes, int, int) {
  variables()[host_variable].resize(bytes);
}
void __cudaRegisterFunction(void**, const char* host_function, char*, const char* device_name, int, uint3*, uint3*,
                            dim3*, dim3*, int*) {
  kernels()[host_function] = device_name;
}
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream) {
  configurations.push_back({grid, block, shared_bytes, stream});
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared_bytes, void* stream) {
  if (configurations.empty()) return cudaErrorMissingConfiguration;
  const Configuration& top = configurations.back();
  *grid = top.grid;
  *block = top.block;
  *shared_bytes = top.shared_bytes;
  *static_cast<cudaStream_t*>(stream) = top.stream;
  configurations.pop_back();
  return cudaSuccess;
}
// The handle of a kernel is its function on the host.
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(function));
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, size_t shared_bytes,
                               cudaStream_t stream) {
  return launch(kernel, grid, block, arguments, shared_bytes, stream);
}

// --- the interface

cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** arguments, size_t shared_bytes,
                             cudaStream_t stream) {
  return launch(function, grid, block, arguments, shared_bytes, stream);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function, void** arguments) {
  return launch(function, config->gridDim, config->blockDim, arguments, config->dynamicSmemBytes, config->stream);
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) {
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int block, size_t) {
  *blocks = std::max(1, 1024 / std::max(block, 1));
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*, int block, size_t,
                                                                   unsigned) {
  *blocks = std::max(1, 1024 / std::max(block, 1));
  return cudaSuccess;
}

cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}
cudaError_t cudaPeekAtLastError() {
  return last_error;
}
const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : fault.c_str();
}
const char* cudaGetErrorName(cudaError_t error) {
  return error == cudaSuccess ? "cudaSuccess" : "an error of the executor";
}

cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* current) {
  *current = device;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int wanted) {
  if (wanted != 0) return failed(cudaErrorInvalidDevice, "there is one device, of the number 0");
  device = wanted;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int of) {
  if (of != 0) return failed(cudaErrorInvalidDevice, "there is one device, of the number 0");
  static const std::map<cudaDeviceAttr, int> values = {
      {cudaDevAttrMultiProcessorCount, 4},  // few, so that grids are small and blocks go round several times
      {cudaDevAttrComputeCapabilityMajor, 9},
      {cudaDevAttrComputeCapabilityMinor, 0},
      {cudaDevAttrWarpSize, 32},
      {cudaDevAttrMaxThreadsPerBlock, 1024},
      {cudaDevAttrMaxThreadsPerMultiProcessor, 2048},
      {cudaDevAttrMaxBlocksPerMultiprocessor, 32},
      {cudaDevAttrMaxSharedMemoryPerBlock, 48 << 10},
      {cudaDevAttrMaxSharedMemoryPerBlockOptin, 227 << 10},
      {cudaDevAttrMaxSharedMemoryPerMultiprocessor, 228 << 10},
      {cudaDevAttrMaxRegistersPerMultiprocessor, 65536},
      {cudaDevAttrL2CacheSize, 50 << 20},
  };
  const auto found = values.find(attribute);
  if (found == values.end()) return failed(cudaErrorInvalidValue, "an attribute that the executor's device lacks");
  *value = found->second;
  return cudaSuccess;
}

cudaError_t cudaGetSymbolAddress(void** address, const void* host_variable) {
  const auto found = variables().find(host_variable);
  if (found == variables().end()) return failed(cudaErrorInvalidSymbol, "a variable that was not registered");
  *address = found->second.data();
  return cudaSuccess;
}

cudaError_t cudaMalloc(void** address, size_t bytes) {
  *address = operator new(bytes, std::align_val_t(256));
  ptx_allow(reinterpret_cast<uint64_t>(*address), bytes);
  return cudaSuccess;
}
cudaError_t cudaFree(void* address) {
  operator delete(address, std::align_val_t(256));
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* address, int value, size_t bytes, cudaStream_t) {
  std::memset(address, value, bytes);
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t) {
  return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize() {
  return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

// Launches on other streams than this one are errors from now on.
PTX_EXPORT void ptx_expect_stream(uint64_t stream) {
  expects_stream = true;
  expected_stream = reinterpret_cast<cudaStream_t>(stream);
}

}  // extern "C"
