// SPDX-License-Identifier: Apache-2.0
#include <cuda_runtime_api.h>

#include "verify/memory.hpp"

namespace gatedelta::verify {
namespace {

void require(cudaError_t status, const char* what) {
  if (status != cudaSuccess)
    throw Error(status == cudaErrorMemoryAllocation ? ErrorCode::out_of_memory : ErrorCode::device,
                std::string(what) + ": " + cudaGetErrorString(status));
}

/// Memory of the first device. Copies wait for the default stream, on which the tests run.
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

}  // namespace gatedelta::verify
