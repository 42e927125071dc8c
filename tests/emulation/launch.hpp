// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>

#include "backends/cuda/plan.hpp"

// The launches of the cuda backend, whose kernels then run on the host.
namespace gatedelta::emulation {

/// Returns what went wrong; empty if nothing. The plan must not be for the generic kernel.
std::string launch(const cuda::Plan& plan, const cuda::ForwardParams& params);
std::string launch(const cuda::Plan& plan, const cuda::ReplayParams<cuda::ForwardParams>& params);

}  // namespace gatedelta::emulation
