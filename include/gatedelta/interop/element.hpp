// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <type_traits>
#if __has_include(<stdfloat>) && __cplusplus > 202002L
#include <stdfloat>
#endif

#include "gatedelta/dtype.hpp"

/// Adapters from other libraries' arrays to views, without copies. Each header includes the library that it is for, and
/// nothing of it is part of the compiled library.
namespace gatedelta::interop {

/// A type that tensors of the library can have as elements: float, float16, bfloat16, int32_t, int64_t, and the 16-bit types of
/// C++23, Eigen and Kokkos, where gatedelta::detail::dtype_of is specialised for them.
template <class T>
concept Element = requires {
  gatedelta::detail::dtype_of<std::remove_cv_t<T>>::value;
};

/// The DType of an Element.
template <Element T>
inline constexpr DType dtype_of = gatedelta::detail::dtype_of<std::remove_cv_t<T>>::value;

}  // namespace gatedelta::interop

/// @cond
#ifdef __STDCPP_FLOAT16_T__
template <>
struct gatedelta::detail::dtype_of<std::float16_t> {
  static constexpr DType value = DType::f16;
};
#endif
#ifdef __STDCPP_BFLOAT16_T__
template <>
struct gatedelta::detail::dtype_of<std::bfloat16_t> {
  static constexpr DType value = DType::bf16;
};
#endif
/// @endcond
