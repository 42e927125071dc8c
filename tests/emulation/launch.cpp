// SPDX-License-Identifier: Apache-2.0
#include "launch.hpp"

namespace gatedelta::emulation {
namespace {

std::string text(cudaError_t status) { return status == cudaSuccess ? "" : cudaGetErrorString(status); }

}  // namespace

std::string launch(const cuda::Plan& plan, const cuda::ForwardParams& params) {
  return text(launch_forward(plan, params, nullptr));
}
std::string launch(const cuda::Plan& plan, const cuda::ReplayParams<cuda::ForwardParams>& params) {
  return text(launch_replay(plan, params, nullptr));
}

}  // namespace gatedelta::emulation
