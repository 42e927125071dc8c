// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "backends/cuda/arch.cuh"
#include "backends/cuda/params.hpp"

// Single elements of strided tensors on the device, every offset in 64 bits.
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
/// The other way round.
template <class Element>
constexpr DType element_dtype = sizeof(Element) == 4              ? DType::f32
                                : std::is_same_v<Element, __half> ? DType::f16
                                                                  : DType::bf16;

/// With index and stride of 32 bits this is one instruction.
__device__ inline std::int64_t product(std::uint32_t index, std::int32_t stride) {
  return multiply_wide(static_cast<std::int32_t>(index), stride);
}
__device__ inline std::int64_t product(std::int32_t index, std::int32_t stride) {
  return static_cast<std::int64_t>(index) * stride;
}
template <class Index, class Stride>
__device__ std::int64_t product(Index index, Stride stride) {
  return static_cast<std::int64_t>(index) * stride;
}

template <class Any, class... Index>
__device__ std::int64_t offset_of(const Any& tensor, Index... index) {
  std::int64_t offset = 0;
  int dim = 0;
  ((offset += product(index, tensor.strides[dim++])), ...);
  return offset;
}

/// h / group for any head.
__device__ inline unsigned head_of(unsigned h, const Group& group) {
  return group.reciprocal == 0 ? h : __umulhi(h, group.reciprocal);
}

/// Whether h is the first head of those that share one.
__device__ inline bool is_first(unsigned h, const Group& group) { return head_of(h, group) * group.count == h; }

/// An element as it lies in memory. Loads and conversions are apart, so that many loads can be under way: a conversion waits.
/// Halves of 16 bits, since two loads of which one happens would wait for each other if they had the same register.
struct RawElement {
  std::uint32_t low = 0, high = 0;

  template <class Any>
  __device__ void fetch(const Any& tensor, std::int64_t offset) {
    fetch(tensor, tensor.dtype, offset);
  }
  template <class Any>
  __device__ void fetch(const Any& tensor, DType dtype, std::int64_t offset) {
    const bool is_float = dtype == DType::f32;
    const std::uint16_t* const at = halves_at(tensor.data, is_float, offset);
    low = at[0];
    if (is_float) high = at[1];
  }
  /// Where there is no tensor, nothing is loaded.
  template <class Any>
  __device__ void fetch_if_there(const Any& tensor, std::int64_t offset) {
    const bool there = tensor.data != nullptr, is_float = tensor.dtype == DType::f32;
    const std::uint16_t* const at = halves_at(tensor.data, is_float, offset);
    load_if(there, low, at);
    load_if(there && is_float, high, at + 1);
  }
  __device__ std::uint32_t bits() const { return __byte_perm(low, high, 0x5410); }
  __device__ float value(DType dtype) const { return value_of(bits(), dtype); }
  __device__ static float value_of(std::uint32_t bits, DType dtype) {
    const float half = __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
    return dtype == DType::f16 ? half : __uint_as_float(dtype == DType::f32 ? bits : bits << 16);
  }

 private:
  __device__ static const std::uint16_t* halves_at(const void* data, bool is_float, std::int64_t offset) {
    return static_cast<const std::uint16_t*>(data) + (offset << (is_float ? 1 : 0));
  }
};

template <class Any>
__device__ float load_at(const Any& tensor, std::int64_t offset) {
  RawElement element;
  element.fetch(tensor, offset);
  return element.value(tensor.dtype);
}

template <class Any>
__device__ void store_at(const Any& tensor, DType dtype, std::int64_t offset, float value) {
  if (dtype == DType::f32) {
    static_cast<float*>(tensor.data)[offset] = value;
    return;
  }
  const std::uint16_t bits =
      dtype == DType::f16 ? __half_as_ushort(__float2half_rn(value)) : __bfloat16_as_ushort(__float2bfloat16_rn(value));
  static_cast<std::uint16_t*>(tensor.data)[offset] = bits;
}
template <class Any>
__device__ void store_at(const Any& tensor, std::int64_t offset, float value) {
  store_at(tensor, tensor.dtype, offset, value);
}

template <class Any, class... Index>
__device__ float load(const Any& tensor, Index... index) {
  return load_at(tensor, offset_of(tensor, index...));
}

/// An element of an index tensor, i32 or i64. Where there is no tensor, nothing is loaded.
struct RawIndex {
  std::int32_t low = 0, high = 0;

  template <class Any, class... Index>
  __device__ void fetch(const Any& tensor, Index... index) {
    const bool is_long = tensor.dtype == DType::i64;
    const auto* at = static_cast<const std::int32_t*>(tensor.data) + (offset_of(tensor, index...) << (is_long ? 1 : 0));
    const bool there = tensor.data != nullptr;
    load_if(there, low, at);
    load_if(there && is_long, high, at + 1);
  }
  __device__ std::int64_t value(DType dtype) const {
    if (dtype == DType::i32) return low;
    return static_cast<std::int64_t>(high) * (std::int64_t{1} << 32) + static_cast<std::uint32_t>(low);
  }
};

template <class Any, class... Index>
__device__ std::int64_t index_at(const Any& tensor, Index... index) {
  RawIndex raw;
  raw.fetch(tensor, index...);
  return raw.value(tensor.dtype);
}

/// Calls function(v, k) for the elements of `rows` x `columns`, spread over the block: neighbouring lanes take the dimension
/// with the smaller stride, warps the other one.
template <class Function>
__device__ void for_each_element(int rows, int columns, std::int64_t row_stride, std::int64_t column_stride,
                                 Function function) {
  const auto size = [](std::int64_t stride) { return stride < 0 ? -stride : stride; };
  const bool by_row = size(row_stride) < size(column_stride);
  const int outer = by_row ? columns : rows, inner = by_row ? rows : columns;
  const int lane = static_cast<int>(threadIdx.x % 32), warps = static_cast<int>(blockDim.x / 32);
  for (int i = static_cast<int>(threadIdx.x / 32); i < outer; i += warps)
#pragma unroll 4
    for (int j = lane; j < inner; j += 32) function(by_row ? j : i, by_row ? i : j);
}

}  // namespace gatedelta::cuda
