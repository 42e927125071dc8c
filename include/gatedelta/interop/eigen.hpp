// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <Eigen/Core>
#include <array>
#include <cstdint>
#include <unsupported/Eigen/CXX11/Tensor>

#include "gatedelta/interop/element.hpp"
#include "gatedelta/tensor.hpp"

/// @cond
template <>
struct gatedelta::detail::dtype_of<Eigen::half> {
  static constexpr DType value = DType::f16;
};
template <>
struct gatedelta::detail::dtype_of<Eigen::bfloat16> {
  static constexpr DType value = DType::bf16;
};
/// @endcond

/// Views of Eigen's tensors, matrices, maps and blocks: the dimensions in Eigen's order, whatever the storage order is. The
/// scalar type must be an Element, and what has no memory of its own (an expression, a temporary) is not accepted: both are
/// errors of the compiler. A const object gives a view as well, for tensors that a call only reads.
namespace gatedelta::interop {

namespace detail {

template <int Layout, Element Scalar, class Sizes>
TensorView eigen_tensor(const Scalar* data, const Sizes& sizes) {
  constexpr int rank = static_cast<int>(Eigen::internal::array_size<Sizes>::value);
  static_assert(rank >= 1 && rank <= max_rank, "gatedelta: a view has 1 to 5 dimensions");
  std::array<std::int64_t, rank> shape{}, strides{};
  std::int64_t stride = 1;
  for (int i = 0; i < rank; ++i) {
    const int dim = Layout == Eigen::RowMajor ? rank - 1 - i : i;
    shape[dim] = sizes[dim];
    strides[dim] = stride;
    stride *= shape[dim];
  }
  return make_view(const_cast<Scalar*>(data), dtype_of<Scalar>, shape, strides);
}

}  // namespace detail

/// A view of a tensor.
template <Element Scalar, int Rank, int Options, class Index>
TensorView from_eigen(const Eigen::Tensor<Scalar, Rank, Options, Index>& tensor) {
  return detail::eigen_tensor<Eigen::Tensor<Scalar, Rank, Options, Index>::Layout>(tensor.data(), tensor.dimensions());
}

/// A view of a tensor whose sizes are part of its type.
template <Element Scalar, class Sizes, int Options, class Index>
TensorView from_eigen(const Eigen::TensorFixedSize<Scalar, Sizes, Options, Index>& tensor) {
  return detail::eigen_tensor<Eigen::TensorFixedSize<Scalar, Sizes, Options, Index>::Layout>(tensor.data(),
                                                                                             tensor.dimensions());
}

/// A view of what a tensor map shows.
template <class Plain, int Options, template <class> class Pointer>
requires Element<typename Plain::Scalar> TensorView from_eigen(const Eigen::TensorMap<Plain, Options, Pointer>& map) {
  const typename Plain::Scalar* data = map.data();
  return detail::eigen_tensor<Plain::Layout>(data, map.dimensions());
}

/// A view [rows, cols] of a matrix, array, Map, Ref or block; of a vector (one row or column at compile time) a view [size].
template <class Derived>
requires(bool(Derived::Flags& Eigen::DirectAccessBit) && Element<typename Derived::Scalar>) TensorView
    from_eigen(const Eigen::DenseBase<Derived>& dense) {
  using Scalar = typename Derived::Scalar;
  const Derived& object = dense.derived();
  auto* data = const_cast<Scalar*>(object.data());
  if constexpr (Derived::IsVectorAtCompileTime) {
    const std::int64_t shape[] = {object.size()}, strides[] = {object.innerStride()};
    return make_view(data, dtype_of<Scalar>, shape, strides);
  } else {
    const std::int64_t shape[] = {object.rows(), object.cols()}, strides[] = {object.rowStride(), object.colStride()};
    return make_view(data, dtype_of<Scalar>, shape, strides);
  }
}

/// @cond
// A temporary that owns its memory would leave a view of nothing.
template <class Derived>
TensorView from_eigen(Eigen::PlainObjectBase<Derived>&&) = delete;
template <class Scalar, int Rank, int Options, class Index>
TensorView from_eigen(Eigen::Tensor<Scalar, Rank, Options, Index>&&) = delete;
template <class Scalar, class Sizes, int Options, class Index>
TensorView from_eigen(Eigen::TensorFixedSize<Scalar, Sizes, Options, Index>&&) = delete;
/// @endcond

}  // namespace gatedelta::interop
