// SPDX-License-Identifier: Apache-2.0
// The kernels for every case, and the fault record.
#include "backends/cuda/generic.cuh"
#include "backends/cuda/launch_kernel.hpp"
#include "backends/cuda/plan.hpp"

namespace gatedelta::cuda {
namespace {

/// Part of the module, so each device has its own and nothing is ever allocated for it.
__device__ Fault fault_record;

}  // namespace

const void* generic_kernel() { return reinterpret_cast<const void*>(forward_kernel); }

cudaError_t launch_commit(const CommitParams& params, cudaStream_t stream) {
  if (params.rows == 0) return cudaSuccess;
  Launch what;
  what.kernel = reinterpret_cast<const void*>(commit_kernel);
  what.grid = dim3(static_cast<unsigned>(params.rows * params.heads));
  what.threads = block_threads;
  return launch_kernel(what, params, stream);
}

cudaError_t find_fault_record(Fault*& out) {
  void* address = nullptr;
  const cudaError_t status = cudaGetSymbolAddress(&address, fault_record);
  out = static_cast<Fault*>(address);
  return status;
}

cudaError_t take_fault(Fault& fault, cudaStream_t stream) {
  const auto copy = [&](Fault& to, bool store) {
    const cudaError_t status = store
                                   ? cudaMemcpyToSymbolAsync(fault_record, &to, sizeof to, 0, cudaMemcpyHostToDevice, stream)
                                   : cudaMemcpyFromSymbolAsync(&to, fault_record, sizeof to, 0, cudaMemcpyDeviceToHost, stream);
    return status != cudaSuccess ? status : cudaStreamSynchronize(stream);
  };
  const cudaError_t status = copy(fault, false);
  if (status != cudaSuccess || fault.kind == 0) return status;
  Fault none{};
  return copy(none, true);
}

}  // namespace gatedelta::cuda
