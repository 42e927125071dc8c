// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "backends/cuda/plan.hpp"

namespace gatedelta::cuda {

/// A kernel whose one parameter is `params`, which is copied.
template <class Params>
cudaError_t launch_kernel(const Launch& what, const Params& params, cudaStream_t stream) {
  cudaLaunchConfig_t config{};
  config.gridDim = what.grid;
  config.blockDim = dim3(what.threads);
  config.dynamicSmemBytes = what.shared_bytes;
  config.stream = stream;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &attribute;
  config.numAttrs = what.dependent ? 1 : 0;
  void* arguments[] = {const_cast<Params*>(&params)};
  return cudaLaunchKernelExC(&config, what.kernel, arguments);
}

}  // namespace gatedelta::cuda
