// SPDX-License-Identifier: Apache-2.0
// A type with the interface of std::mdspan, which compilers of C++20 do not have.
#include "gatedelta/interop/mdspan.hpp"

#include <array>
#include <cstddef>
#include <type_traits>
#include <vector>

#include "same.hpp"

using namespace gatedelta;
using interop::from_mdspan;

namespace {

template <class T, std::size_t Rank, class Reference = T&>
struct Span {
  using element_type = T;
  using reference = Reference;
  using rank_type = std::size_t;
  T* data = nullptr;
  std::array<int, Rank> sizes{}, steps{};
  bool strided = true;

  static constexpr rank_type rank() { return Rank; }
  T* data_handle() const { return data; }
  int extent(rank_type dim) const { return sizes[dim]; }
  int stride(rank_type dim) const { return steps[dim]; }
  bool is_strided() const { return strided; }
};

template <class T>
concept Accepted = requires(const T& span) {
  from_mdspan(span);
};

}  // namespace

TEST_CASE("spans") {
  std::vector<float> memory(64);
  check_view(from_mdspan(Span<float, 2>{memory.data(), {4, 3}, {1, 5}}), memory.data(), DType::f32, {4, 3}, {1, 5});
  check_view(from_mdspan(Span<const float, 1>{memory.data(), {4}, {-1}}, {DeviceType::cuda, 1}), memory.data(), DType::f32, {4},
             {-1}, {DeviceType::cuda, 1});
  std::vector<std::int64_t> index(5);
  check_view(from_mdspan(Span<std::int64_t, 5>{index.data(), {1, 1, 5, 1, 1}, {5, 5, 1, 1, 1}}), index.data(), DType::i64,
             {1, 1, 5, 1, 1}, {5, 5, 1, 1, 1});
  CHECK_THROWS_WITH_AS(from_mdspan(Span<float, 2>{memory.data(), {4, 3}, {1, 4}, false}),
                       "mdspan: expected a layout with strides, got one without, of 2 dimensions", Error);
}

TEST_CASE("what is no span of elements does not compile") {
  CHECK(Accepted<Span<float, 2>>);
  CHECK(Accepted<Span<const bfloat16, 2>>);
  CHECK_FALSE(Accepted<Span<double, 2>>);
  CHECK_FALSE(Accepted<Span<float, 2, float>>);  // an accessor that returns values, not memory
  CHECK_FALSE(Accepted<std::vector<float>>);
}

TEST_CASE("a call on spans") {
  // Heads outermost and the width strided: any mapping will do.
  std::vector<float> q = {1, 9, 0, 9, 0, 9, 1, 9}, v = {2, 4, 6, 8}, o(4), b(2);
  const Span<const float, 4> keys{q.data(), {1, 1, 2, 2}, {8, 8, 4, 2}};
  const Span<float, 4> values{v.data(), {1, 1, 2, 2}, {4, 4, 1, 2}}, out{o.data(), {1, 1, 2, 2}, {4, 4, 2, 1}};
  check_step(from_mdspan(keys), from_mdspan(keys), from_mdspan(values), from_mdspan(out),
             from_mdspan(Span<float, 3>{b.data(), {1, 1, 2}, {2, 2, 1}}));
  const std::vector<float> expected = {1, 3, 2, 4};
  for (std::size_t i = 0; i < 4; ++i) CHECK(o[i] == doctest::Approx(expected[i]).epsilon(1e-5));
}
