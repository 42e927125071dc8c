// SPDX-License-Identifier: Apache-2.0
#include "gatedelta/interop/eigen.hpp"

#include <Eigen/Dense>
#include <type_traits>
#include <utility>
#include <vector>

#include "same.hpp"

using namespace gatedelta;
using interop::from_eigen;

namespace {

template <class T>
concept Accepted = requires(T&& object) {
  from_eigen(std::forward<T>(object));
};

template <class Scalar, int Rank, int Options = Eigen::ColMajor>
using Tensor = Eigen::Tensor<Scalar, Rank, Options>;

}  // namespace

TEST_CASE("tensors of both storage orders") {
  const Tensor<float, 3> columns(2, 3, 4);
  check_view(from_eigen(columns), columns.data(), DType::f32, {2, 3, 4}, {1, 2, 6});
  const Tensor<Eigen::half, 3, Eigen::RowMajor> rows(2, 3, 4);
  check_view(from_eigen(rows), rows.data(), DType::f16, {2, 3, 4}, {12, 4, 1});
  Tensor<Eigen::bfloat16, 1> one(7);
  check_view(from_eigen(one), one.data(), DType::bf16, {7}, {1});
  Eigen::TensorFixedSize<std::int32_t, Eigen::Sizes<2, 5>, Eigen::RowMajor> fixed;
  check_view(from_eigen(fixed), fixed.data(), DType::i32, {2, 5}, {5, 1});
}

TEST_CASE("tensor maps") {
  std::vector<float> memory(24);
  check_view(from_eigen(Eigen::TensorMap<Tensor<float, 4, Eigen::RowMajor>>(memory.data(), 1, 2, 3, 4)), memory.data(),
             DType::f32, {1, 2, 3, 4}, {24, 12, 4, 1});
  const Eigen::TensorMap<const Tensor<float, 2>> constant(memory.data(), 6, 4);
  check_view(from_eigen(constant), memory.data(), DType::f32, {6, 4}, {1, 6});
}

TEST_CASE("matrices, maps and blocks") {
  Eigen::MatrixXf matrix(6, 4);
  check_view(from_eigen(matrix), matrix.data(), DType::f32, {6, 4}, {1, 6});
  check_view(from_eigen(matrix.transpose()), matrix.data(), DType::f32, {4, 6}, {6, 1});
  check_view(from_eigen(matrix.block(1, 2, 3, 2)), &matrix(1, 2), DType::f32, {3, 2}, {1, 6});
  check_view(from_eigen(matrix.row(2)), &matrix(2, 0), DType::f32, {4}, {6});
  check_view(from_eigen(matrix.col(3)), &matrix(0, 3), DType::f32, {6}, {1});
  const Eigen::Matrix<std::int64_t, Eigen::Dynamic, 1> slots(5);
  check_view(from_eigen(slots), slots.data(), DType::i64, {5}, {1});
  Eigen::Array<float, 2, 3, Eigen::RowMajor> array;
  check_view(from_eigen(array), array.data(), DType::f32, {2, 3}, {3, 1});
  std::vector<float> memory(64);
  using Strides = Eigen::Stride<Eigen::Dynamic, Eigen::Dynamic>;
  check_view(from_eigen(Eigen::Map<Eigen::MatrixXf, 0, Strides>(memory.data(), 3, 4, Strides(16, 2))), memory.data(),
             DType::f32, {3, 4}, {2, 16});
  const Eigen::Ref<const Eigen::MatrixXf> ref(matrix);
  check_view(from_eigen(ref), matrix.data(), DType::f32, {6, 4}, {1, 6});
}

TEST_CASE("other scalars, expressions and temporaries do not compile") {
  CHECK(Accepted<Eigen::MatrixXf&>);
  CHECK(Accepted<const Eigen::MatrixXf&>);
  CHECK_FALSE(Accepted<Eigen::MatrixXf>);
  CHECK_FALSE(Accepted<Eigen::MatrixXd&>);
  CHECK_FALSE(Accepted<decltype(std::declval<Eigen::MatrixXf&>() + std::declval<Eigen::MatrixXf&>())>);
  CHECK(Accepted<Tensor<float, 3>&>);
  CHECK_FALSE(Accepted<Tensor<float, 3>>);
  CHECK_FALSE(Accepted<Tensor<double, 3>&>);
  CHECK_FALSE(Accepted<decltype(std::declval<Tensor<float, 3>&>() + std::declval<Tensor<float, 3>&>())>);
  CHECK(Accepted<Eigen::TensorMap<Tensor<float, 3>>>);
  CHECK_FALSE(Accepted<Eigen::TensorMap<Tensor<double, 3>>>);
}

TEST_CASE("a call on Eigen's tensors") {
  Tensor<float, 4> k(1, 1, 2, 2), o(1, 1, 2, 2);
  Tensor<Eigen::bfloat16, 4, Eigen::RowMajor> v(1, 1, 2, 2);
  Tensor<float, 3> b(1, 1, 2);
  k.setZero(), b.setZero();
  for (int head = 0; head < 2; ++head) {
    k(0, 0, head, head) = 1;
    for (int i = 0; i < 2; ++i) v(0, 0, head, i) = static_cast<Eigen::bfloat16>(static_cast<float>(2 + 4 * head + 2 * i));
  }
  check_step(from_eigen(k), from_eigen(k), from_eigen(v), from_eigen(o), from_eigen(b));
  for (int head = 0; head < 2; ++head)
    for (int i = 0; i < 2; ++i) CHECK(o(0, 0, head, i) == doctest::Approx(1 + 2 * head + i).epsilon(1e-5));
}
