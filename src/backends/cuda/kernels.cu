// SPDX-License-Identifier: Apache-2.0
// All device code, and the launches.
#include "backends/cuda/generic.cuh"

namespace gatedelta::cuda {
namespace {

template <class Params>
cudaError_t launch(void (*kernel)(Params), std::int64_t blocks, std::size_t shared_bytes, const Params& params,
                   cudaStream_t stream) {
  if (blocks == 0) return cudaSuccess;
  void* arguments[] = {const_cast<Params*>(&params)};
  return cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(static_cast<unsigned>(blocks)), dim3(block_threads),
                          arguments, shared_bytes, stream);
}

}  // namespace

cudaError_t launch_stage(const ForwardParams& params, cudaStream_t stream) {
  return launch<ForwardParams>(stage_kernel, params.rows * params.heads, 0, params, stream);
}

cudaError_t launch_forward(const ForwardParams& params, cudaStream_t stream) {
  const std::int64_t rows = params.rows + (params.cu_seqlens.data != nullptr ? 1 : 0);
  const auto floats = static_cast<std::size_t>((params.slice_rows + 2) * params.key_dim);
  return launch<ForwardParams>(forward_kernel, rows * params.heads * params.slices, floats * sizeof(float), params, stream);
}

cudaError_t launch_commit(const CommitParams& params, cudaStream_t stream) {
  return launch<CommitParams>(commit_kernel, params.rows * params.heads, 0, params, stream);
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
