// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "gatedelta/dtype.hpp"

// The state dtype that a translation unit is compiled for: GATEDELTA_STATE is f32, f16 or bf16.
namespace gatedelta::cuda {

template <DType dtype>
struct ElementOf;
template <>
struct ElementOf<DType::f32> {
  using Type = float;
};
template <>
struct ElementOf<DType::f16> {
  using Type = __half;
};
template <>
struct ElementOf<DType::bf16> {
  using Type = __nv_bfloat16;
};

constexpr DType state_dtype = DType::GATEDELTA_STATE;
using State = ElementOf<state_dtype>::Type;

}  // namespace gatedelta::cuda
