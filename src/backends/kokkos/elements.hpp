// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <Kokkos_Core.hpp>
#include <cstdint>
#include <type_traits>

#include "gatedelta/tensor.hpp"

// Where the kernels run, and single elements of strided tensors there, every offset in 64 bits.
namespace gatedelta::kokkos {

using Space = Kokkos::DefaultExecutionSpace;

/// Serial, OpenMP and the like: tensors are host memory.
inline constexpr bool on_host = std::is_same_v<Space, Kokkos::DefaultHostExecutionSpace>;

/// Threads and vector lanes of a team; results depend on them, so they are fixed.
inline constexpr int team_threads = on_host ? 1 : 8;
inline constexpr int team_lanes = on_host ? 1 : 32;

/// At least four teams on a multiprocessor.
using Policy = Kokkos::TeamPolicy<Space, Kokkos::LaunchBounds<team_threads * team_lanes, 4>>;
using Team = Policy::member_type;

template <class... Index>
KOKKOS_INLINE_FUNCTION std::int64_t offset_of(const TensorView& tensor, Index... index) {
  std::int64_t offset = 0;
  int dim = 0;
  ((offset += static_cast<std::int64_t>(index) * tensor.strides[dim++]), ...);
  return offset;
}

/// Calls function(T{}) with the element type of a floating dtype.
template <class Function>
KOKKOS_INLINE_FUNCTION void with_element(DType dtype, const Function& function) {
  if (dtype == DType::f32)
    function(float{});
  else if (dtype == DType::f16)
    function(float16{});
  else
    function(bfloat16{});
}

template <class T>
KOKKOS_INLINE_FUNCTION float widened(T value) {
  if constexpr (std::is_same_v<T, float>)
    return value;
  else
    return to_float(value);
}

template <class T>
KOKKOS_INLINE_FUNCTION T narrowed(float value) {
  if constexpr (std::is_same_v<T, float>)
    return value;
  else if constexpr (std::is_same_v<T, float16>)
    return to_float16(value);
  else
    return to_bfloat16(value);
}

template <class... Index>
KOKKOS_INLINE_FUNCTION float load(const TensorView& tensor, Index... index) {
  const std::int64_t offset = offset_of(tensor, index...);
  float out = 0;
  with_element(tensor.dtype, [&](auto type) { out = widened(static_cast<const decltype(type)*>(tensor.data)[offset]); });
  return out;
}

template <class... Index>
KOKKOS_INLINE_FUNCTION void store(const TensorView& tensor, float value, Index... index) {
  const std::int64_t offset = offset_of(tensor, index...);
  with_element(tensor.dtype,
               [&](auto type) { static_cast<decltype(type)*>(tensor.data)[offset] = narrowed<decltype(type)>(value); });
}

/// An element of an index tensor, i32 or i64.
template <class... Index>
KOKKOS_INLINE_FUNCTION std::int64_t index_in(const TensorView& tensor, Index... index) {
  const std::int64_t offset = offset_of(tensor, index...);
  if (tensor.dtype == DType::i32) return static_cast<const std::int32_t*>(tensor.data)[offset];
  return static_cast<const std::int64_t*>(tensor.data)[offset];
}

/// Calls function(row, column) for the elements of a matrix, spread over the team; neighbouring lanes take the dimension with
/// the smaller stride.
template <class Function>
KOKKOS_INLINE_FUNCTION void for_each_element(const Team& team, int rows, int columns, std::int64_t row_stride,
                                             std::int64_t column_stride, const Function& function) {
  const auto size = [](std::int64_t stride) { return stride < 0 ? -stride : stride; };
  if (size(row_stride) < size(column_stride))
    Kokkos::parallel_for(Kokkos::TeamThreadRange(team, columns), [&](const int column) {
      Kokkos::parallel_for(Kokkos::ThreadVectorRange(team, rows), [&](const int row) { function(row, column); });
    });
  else
    Kokkos::parallel_for(Kokkos::TeamThreadRange(team, rows), [&](const int row) {
      Kokkos::parallel_for(Kokkos::ThreadVectorRange(team, columns), [&](const int column) { function(row, column); });
    });
}

}  // namespace gatedelta::kokkos
