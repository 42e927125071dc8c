// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <functional>

#include "backends/cuda/plan.hpp"

// In place of src/backends/cuda/launch_kernel.hpp: the kernel runs at once, on the host.
namespace gatedelta::emulation {
/// All blocks of the grid. What is wrong with a launch or a kernel becomes the text of the error that this returns.
cudaError_t run_grid(const cuda::Launch& what, const std::function<void()>& kernel);
}  // namespace gatedelta::emulation

namespace gatedelta::cuda {

template <class Params>
cudaError_t launch_kernel(const Launch& what, const Params& params, cudaStream_t) {
  auto* const kernel = reinterpret_cast<void (*)(Params)>(const_cast<void*>(what.kernel));
  return emulation::run_grid(what, [&] { kernel(params); });
}

}  // namespace gatedelta::cuda
