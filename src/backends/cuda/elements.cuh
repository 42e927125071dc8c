// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "backends/cuda/params.hpp"

// Single elements of strided tensors on the device, every offset in 64 bits.
namespace gatedelta::cuda {

template <class... Index>
__device__ std::int64_t offset_of(const Strided& tensor, Index... index) {
  std::int64_t offset = 0;
  int dim = 0;
  ((offset += static_cast<std::int64_t>(index) * tensor.strides[dim++]), ...);
  return offset;
}

__device__ inline float load_at(const Strided& tensor, std::int64_t offset) {
  if (tensor.dtype == DType::f32) return static_cast<const float*>(tensor.data)[offset];
  if (tensor.dtype == DType::f16) return __half2float(static_cast<const __half*>(tensor.data)[offset]);
  return __bfloat162float(static_cast<const __nv_bfloat16*>(tensor.data)[offset]);
}

__device__ inline void store_at(const Strided& tensor, std::int64_t offset, float value) {
  if (tensor.dtype == DType::f32)
    static_cast<float*>(tensor.data)[offset] = value;
  else if (tensor.dtype == DType::f16)
    static_cast<__half*>(tensor.data)[offset] = __float2half_rn(value);
  else
    static_cast<__nv_bfloat16*>(tensor.data)[offset] = __float2bfloat16_rn(value);
}

template <class... Index>
__device__ float load(const Strided& tensor, Index... index) {
  return load_at(tensor, offset_of(tensor, index...));
}

/// An element of an index tensor, i32 or i64.
template <class... Index>
__device__ std::int64_t index_at(const Strided& tensor, Index... index) {
  const std::int64_t offset = offset_of(tensor, index...);
  return tensor.dtype == DType::i32 ? static_cast<const std::int32_t*>(tensor.data)[offset]
                                    : static_cast<const std::int64_t*>(tensor.data)[offset];
}

/// Calls function(v, k) for the elements of `rows` x `columns`, spread over the block; neighbouring threads take the dimension
/// with the smaller stride.
template <class Function>
__device__ void for_each_element(int rows, int columns, std::int64_t row_stride, std::int64_t column_stride,
                                 Function function) {
  const auto size = [](std::int64_t stride) { return stride < 0 ? -stride : stride; };
  const bool by_row = size(row_stride) < size(column_stride);
  for (int e = static_cast<int>(threadIdx.x); e < rows * columns; e += static_cast<int>(blockDim.x)) {
    if (by_row)
      function(e % rows, e / rows);
    else
      function(e / columns, e % columns);
  }
}

}  // namespace gatedelta::cuda
