// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "backends/cuda/elements.cuh"

// The state dtype that a translation unit is compiled for: GATEDELTA_STATE is f32, f16 or bf16.
namespace gatedelta::cuda {

constexpr DType state_dtype = DType::GATEDELTA_STATE;
using State = ElementOf<state_dtype>::Type;

}  // namespace gatedelta::cuda
