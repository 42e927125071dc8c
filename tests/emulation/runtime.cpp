// SPDX-License-Identifier: Apache-2.0
// What the library and its tests call of the CUDA runtime: one device, whose memory is the host's, and where all is done when
// the call returns.
#include "device.hpp"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "backends/cuda/launch_kernel.hpp"
#include "machine.hpp"

namespace gatedelta::emulation {
namespace {

std::string fault;

}  // namespace

cudaError_t run_grid(const cuda::Launch& what, const std::function<void()>& kernel) {
  fault.clear();
  if (what.kernel == nullptr) return cudaErrorInvalidDeviceFunction;
  blockDim = dim3(what.threads);
  try {
    for (unsigned z = 0; z < what.grid.z; ++z)
      for (unsigned y = 0; y < what.grid.y; ++y)
        for (unsigned x = 0; x < what.grid.x; ++x) {
          blockIdx = {x, y, z};
          run_block(what.threads, what.shared_bytes, kernel);
        }
  } catch (const std::runtime_error& error) {
    fault = error.what();
    return cudaErrorLaunchFailure;
  }
  return cudaSuccess;
}

}  // namespace gatedelta::emulation

const char* cudaGetErrorString(cudaError_t status) {
  static std::string text;
  text = status == cudaErrorLaunchFailure ? gatedelta::emulation::fault : "status " + std::to_string(status);
  return text.c_str();
}
cudaError_t cudaGetLastError() { return cudaSuccess; }

cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  *properties = {};
  std::strcpy(properties->name, "emulated device");
  properties->major = 9;
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}

cudaError_t cudaMalloc(void** memory, std::size_t bytes) {
  constexpr std::size_t alignment = 256;
  *memory = std::aligned_alloc(alignment, (bytes + alignment) / alignment * alignment);
  return *memory == nullptr ? cudaErrorMemoryAllocation : cudaSuccess;
}
cudaError_t cudaFree(void* memory) {
  std::free(memory);
  return cudaSuccess;
}
cudaError_t cudaMemcpy(void* to, const void* from, std::size_t bytes, cudaMemcpyKind) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
