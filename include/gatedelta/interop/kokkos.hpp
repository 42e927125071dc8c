// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <Kokkos_Core.hpp>
#include <array>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "gatedelta/interop/element.hpp"
#include "gatedelta/tensor.hpp"

/// @cond
#if defined(KOKKOS_HALF_T_IS_FLOAT) && !KOKKOS_HALF_T_IS_FLOAT
template <>
struct gatedelta::detail::dtype_of<Kokkos::Experimental::half_t> {
  static constexpr DType value = DType::f16;
};
#endif
#if defined(KOKKOS_BHALF_T_IS_FLOAT) && !KOKKOS_BHALF_T_IS_FLOAT
template <>
struct gatedelta::detail::dtype_of<Kokkos::Experimental::bhalf_t> {
  static constexpr DType value = DType::bf16;
};
#endif
/// @endcond

/// Views of Kokkos::View. Element type, rank, layout and memory space are known when a program is compiled, and a wrong one is
/// an error of the compiler with a message.
namespace gatedelta::interop {

namespace detail {

/// The dimensions of a View's data type, such as float**[4].
template <class T>
struct kokkos_rank : std::integral_constant<std::size_t, 0> {};
template <class T>
struct kokkos_rank<T*> : std::integral_constant<std::size_t, 1 + kokkos_rank<T>::value> {};
template <class T, std::size_t N>
struct kokkos_rank<T[N]> : std::integral_constant<std::size_t, 1 + kokkos_rank<T>::value> {};

/// Where a memory space lies; not supported unless specialised.
template <class Space>
struct kokkos_device {
  static constexpr bool supported = false;
  static Device get() { return {}; }
};
template <>
struct kokkos_device<Kokkos::HostSpace> {
  static constexpr bool supported = true;
  static Device get() { return {}; }
};
#ifdef KOKKOS_ENABLE_CUDA
/// The device of Kokkos's default instance.
template <>
struct kokkos_device<Kokkos::CudaSpace> {
  static constexpr bool supported = true;
  static Device get() { return {DeviceType::cuda, Kokkos::Cuda().cuda_device()}; }
};
template <>
struct kokkos_device<Kokkos::CudaUVMSpace> : kokkos_device<Kokkos::CudaSpace> {};
template <>
struct kokkos_device<Kokkos::CudaHostPinnedSpace> : kokkos_device<Kokkos::HostSpace> {};
#endif

}  // namespace detail

/// A View that from_kokkos takes: 1 to 5 dimensions of an Element in LayoutLeft, LayoutRight or LayoutStride, in HostSpace or a
/// space of Kokkos's CUDA backend.
template <class View>
concept KokkosView = Kokkos::is_view<View>::value && Element<typename View::value_type> &&
                         detail::kokkos_rank<typename View::data_type>::value >= 1 &&
                     detail::kokkos_rank<typename View::data_type>::value <= std::size_t{max_rank} &&
                     (std::is_same_v<typename View::array_layout, Kokkos::LayoutLeft> ||
                      std::is_same_v<typename View::array_layout, Kokkos::LayoutRight> ||
                      std::is_same_v<typename View::array_layout,
                                     Kokkos::LayoutStride>)&&detail::kokkos_device<typename View::memory_space>::supported;

/// A view of a Kokkos::View's memory, which it does not keep alive. Managed (UVM) memory counts as its GPU's, pinned memory as
/// the host's.
template <class... Arguments>
TensorView from_kokkos(const Kokkos::View<Arguments...>& array) {
  using View = Kokkos::View<Arguments...>;
  using T = typename View::non_const_value_type;
  static_assert(Element<T>, "gatedelta: a View's elements are float, a 16-bit floating type, int32_t or int64_t");
  static_assert(detail::kokkos_device<typename View::memory_space>::supported,
                "gatedelta: a View's memory is in HostSpace, CudaSpace, CudaUVMSpace or CudaHostPinnedSpace");
  static_assert(KokkosView<View>, "gatedelta: a View has 1 to 5 dimensions in LayoutLeft, LayoutRight or LayoutStride");
  constexpr std::size_t rank = detail::kokkos_rank<typename View::data_type>::value;
  std::array<std::int64_t, rank> shape{}, strides{};
  for (std::size_t i = 0; i < rank; ++i) {
    shape[i] = static_cast<std::int64_t>(array.extent(i));
    strides[i] = static_cast<std::int64_t>(array.stride(i));
  }
  return make_view(const_cast<T*>(array.data()), dtype_of<T>, shape, strides,
                   detail::kokkos_device<typename View::memory_space>::get());
}

}  // namespace gatedelta::interop
