// SPDX-License-Identifier: Apache-2.0
#include "launch.hpp"

#include <stdexcept>

#include "device.hpp"
#include "machine.hpp"

namespace gatedelta::emulation {
namespace {

/// Calls a kernel with the parameters of its type.
using Caller = void (*)(const void* kernel, const void* params);
template <class Params>
void call(const void* kernel, const void* params) {
  reinterpret_cast<void (*)(Params)>(const_cast<void*>(kernel))(*static_cast<const Params*>(params));
}

Caller caller;
std::string fault;

}  // namespace

std::string launch(const cuda::Plan& plan, const cuda::ForwardParams& params) {
  caller = call<cuda::FastParams>, fault.clear();
  const cudaError_t status = launch_forward(plan, params, nullptr);
  return status == cudaSuccess || !fault.empty() ? fault : "status " + std::to_string(status);
}
std::string launch(const cuda::Plan& plan, const cuda::ReplayParams<cuda::ForwardParams>& params) {
  caller = call<cuda::ReplayParams<cuda::FastParams>>, fault.clear();
  const cudaError_t status = launch_replay(plan, params, nullptr);
  return status == cudaSuccess || !fault.empty() ? fault : "status " + std::to_string(status);
}

}  // namespace gatedelta::emulation

// What launches call of the CUDA runtime.
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* kernel, void** params) {
  using namespace gatedelta::emulation;
  if (kernel == nullptr) return cudaErrorInvalidDeviceFunction;
  if (config->dynamicSmemBytes > 227 * 1024) return cudaErrorInvalidValue;
  blockDim = config->blockDim;
  const dim3 grid = config->gridDim;
  try {
    for (unsigned z = 0; z < grid.z; ++z)
      for (unsigned y = 0; y < grid.y; ++y)
        for (unsigned x = 0; x < grid.x; ++x) {
          blockIdx = {x, y, z};
          run_block(blockDim.x, config->dynamicSmemBytes, [&] { caller(kernel, params[0]); });
        }
  } catch (const std::runtime_error& error) {
    fault = error.what();
    return cudaErrorLaunchFailure;
  }
  return cudaSuccess;
}

// The kernels for every case are plain C++ that needs no emulation: they are left out here.
namespace gatedelta::cuda {
const void* generic_kernel() { return nullptr; }
cudaError_t launch_generic_replay(const ReplayParams<ForwardParams>&, cudaStream_t) { return cudaErrorNotSupported; }
}  // namespace gatedelta::cuda
