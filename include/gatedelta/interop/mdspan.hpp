// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <string>
#include <type_traits>
#if __has_include(<mdspan>) && __cplusplus > 202002L
#include <mdspan>
#endif

#include "gatedelta/error.hpp"
#include "gatedelta/interop/element.hpp"
#include "gatedelta/tensor.hpp"

namespace gatedelta::interop {

/// std::mdspan, the reference implementation that Kokkos publishes, and types with their interface, as long as their elements
/// are plain memory: an accessor that computes what it returns is none.
template <class Span>
concept MdspanLike = requires(const Span& span, typename Span::rank_type dim) {
  requires std::same_as<typename Span::reference, typename Span::element_type&>;
  { span.data_handle() } -> std::convertible_to<typename Span::element_type*>;
  { Span::rank() } -> std::convertible_to<std::size_t>;
  { span.extent(dim) } -> std::convertible_to<std::int64_t>;
  { span.stride(dim) } -> std::convertible_to<std::int64_t>;
  { span.is_strided() } -> std::convertible_to<bool>;
};

/// A view of an mdspan of 1 to 5 dimensions; `device` says where its memory is, as the span does not know it.
/// Throws Error(invalid_argument) for a layout that has no strides.
template <MdspanLike Span>
requires Element<typename Span::element_type> TensorView from_mdspan(const Span& span, Device device = {}) {
  using T = std::remove_cv_t<typename Span::element_type>;
  constexpr std::size_t rank = Span::rank();
  static_assert(rank >= 1 && rank <= std::size_t{max_rank}, "gatedelta: a view has 1 to 5 dimensions");
  if (!span.is_strided())
    throw Error(ErrorCode::invalid_argument,
                "mdspan: expected a layout with strides, got one without, of " + std::to_string(rank) + " dimensions");
  std::array<std::int64_t, rank> shape{}, strides{};
  for (std::size_t i = 0; i < rank; ++i) {
    const auto dim = static_cast<typename Span::rank_type>(i);
    shape[i] = static_cast<std::int64_t>(span.extent(dim));
    strides[i] = static_cast<std::int64_t>(span.stride(dim));
  }
  typename Span::element_type* data = span.data_handle();
  return make_view(const_cast<T*>(data), dtype_of<T>, shape, strides, device);
}

}  // namespace gatedelta::interop
