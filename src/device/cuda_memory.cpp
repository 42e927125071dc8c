// SPDX-License-Identifier: Apache-2.0
#include <cuda_runtime_api.h>

#include <string>

#include "device/memory.hpp"
#include "gatedelta/error.hpp"

namespace gatedelta::device {
namespace {

void require(cudaError_t status, const char* what) {
  if (status != cudaSuccess)
    throw Error(status == cudaErrorMemoryAllocation ? ErrorCode::out_of_memory : ErrorCode::device,
                std::string(what) + ": " + cudaGetErrorString(status));
}

/// Memory of the first device. Copies wait for the default stream, on which tests and tools run.
class CudaMemory final : public Memory {
 public:
  Device device() const override { return {DeviceType::cuda, 0}; }
  void* allocate(std::size_t bytes) override {
    void* memory = nullptr;
    require(cudaMalloc(&memory, bytes), "cudaMalloc");
    return memory;
  }
  void release(void* memory) override { (void)cudaFree(memory); }
  void copy_in(void* to, const void* from, std::size_t bytes) override {
    require(cudaMemcpy(to, from, bytes, cudaMemcpyHostToDevice), "cudaMemcpy");
  }
  void copy_out(void* to, const void* from, std::size_t bytes) override {
    require(cudaMemcpy(to, from, bytes, cudaMemcpyDeviceToHost), "cudaMemcpy");
  }
};

}  // namespace

Memory& cuda_memory() {
  static CudaMemory memory;
  return memory;
}

std::vector<CudaDevice> cuda_devices() {
  std::vector<CudaDevice> out;
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) {
    (void)cudaGetLastError();  // the backend says why there is none
    return out;
  }
  for (int i = 0; i < count; ++i) {
    cudaDeviceProp properties{};
    require(cudaGetDeviceProperties(&properties, i), "cudaGetDeviceProperties");
    out.push_back(
        {properties.name, properties.major, properties.minor, properties.multiProcessorCount, properties.totalGlobalMem});
  }
  return out;
}

CudaVersions cuda_versions() {
  int driver = 0, runtime = 0;
  require(cudaDriverGetVersion(&driver), "cudaDriverGetVersion");
  require(cudaRuntimeGetVersion(&runtime), "cudaRuntimeGetVersion");
  // CUDA counts 13000 for 13.0.
  const auto dotted = [](int number) { return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10); };
  return {driver == 0 ? "" : dotted(driver), dotted(runtime)};
}

}  // namespace gatedelta::device
