// SPDX-License-Identifier: Apache-2.0
// Views, and the conversions between the element types.
#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "core/elements.hpp"
#include "gatedelta/gatedelta.hpp"

using namespace gatedelta;

namespace {

/// Rounding by the definition: the neighbours of |x| among all finite values of a format (ascending, exact in double), the
/// nearer one, the even one of a tie. Bit patterns of the positive values are 0, 1, 2, ...
class Format {
 public:
  template <class Decode>
  Format(int exponent_bits, int mantissa_bits, Decode decode) {
    const unsigned infinity = ((1u << exponent_bits) - 1) << mantissa_bits;
    for (unsigned bits = 0; bits < infinity; ++bits) values_.push_back(decode(static_cast<std::uint16_t>(bits)));
    // The tie between the largest value and infinity lies where the next exponent would begin.
    values_.push_back(2 * values_.back() - values_[values_.size() - 2]);
  }
  std::uint16_t round(double x) const {
    const std::uint16_t sign = std::signbit(x) ? 0x8000 : 0;
    const double magnitude = std::fabs(x);
    const auto above = static_cast<std::size_t>(std::lower_bound(values_.begin(), values_.end(), magnitude) - values_.begin());
    if (above == values_.size()) return static_cast<std::uint16_t>(sign | (values_.size() - 1));
    if (above == 0) return sign;
    const double up = values_[above] - magnitude, down = magnitude - values_[above - 1];
    const std::size_t nearest = up < down || (up == down && above % 2 == 0) ? above : above - 1;
    return static_cast<std::uint16_t>(sign | nearest);
  }
  const std::vector<double>& values() const { return values_; }

 private:
  std::vector<double> values_;
};

/// The value of a bit pattern by the definition of the formats.
double decoded(std::uint16_t bits, int exponent_bits, int mantissa_bits) {
  const int bias = (1 << (exponent_bits - 1)) - 1;
  const int exponent = (bits >> mantissa_bits) & ((1 << exponent_bits) - 1), mantissa = bits & ((1 << mantissa_bits) - 1);
  const double magnitude = exponent == 0 ? std::ldexp(mantissa, 1 - bias - mantissa_bits)
                                         : std::ldexp(mantissa + (1 << mantissa_bits), exponent - bias - mantissa_bits);
  return bits & 0x8000 ? -magnitude : magnitude;
}

struct Half {
  static constexpr int exponent = 5, mantissa = 10;
  static float decode(std::uint16_t bits) { return to_float(float16{bits}); }
  static std::uint16_t encode(float x) { return to_float16(x).bits; }
  static constexpr DType dtype = DType::f16;
};
struct Brain {
  static constexpr int exponent = 8, mantissa = 7;
  static float decode(std::uint16_t bits) { return to_float(bfloat16{bits}); }
  static std::uint16_t encode(float x) { return to_bfloat16(x).bits; }
  static constexpr DType dtype = DType::bf16;
};

}  // namespace

TEST_CASE_TEMPLATE("conversions of the 16-bit formats", F, Half, Brain) {
  const Format format(F::exponent, F::mantissa, [](std::uint16_t b) { return decoded(b, F::exponent, F::mantissa); });

  SUBCASE("all 65536 values decode to their definition and come back") {
    int wrong = 0, nans = 0;
    for (unsigned i = 0; i < 65536; ++i) {
      const auto bits = static_cast<std::uint16_t>(i);
      const float value = F::decode(bits);
      const std::uint16_t back = F::encode(value);
      if (((bits >> F::mantissa) & ((1 << F::exponent) - 1)) == (1 << F::exponent) - 1) {
        const bool infinite = (bits & ((1 << F::mantissa) - 1)) == 0;
        nans += !infinite;
        wrong += infinite ? !std::isinf(value) || back != bits : !std::isnan(value) || !std::isnan(F::decode(back));
        wrong += std::signbit(value) != (bits >= 0x8000);
      } else {
        wrong += static_cast<double>(value) != decoded(bits, F::exponent, F::mantissa) || back != bits;
      }
    }
    CHECK(wrong == 0);
    CHECK(nans == 2 * ((1 << F::mantissa) - 1));
  }

  SUBCASE("floats round to nearest, ties to even") {
    int wrong = 0;
    const auto try_value = [&](float x) {
      for (const float signed_x : {x, -x}) {
        wrong += F::encode(signed_x) != format.round(signed_x);
        std::uint16_t stored = 0;
        store_element(&stored, F::dtype, signed_x);
        wrong += stored != format.round(signed_x);
      }
    };
    // Around every value and every tie between two values, subnormal ones and the overflow to infinity included.
    for (std::size_t i = 1; i < format.values().size(); ++i) {
      const double low = format.values()[i - 1], high = format.values()[i];
      for (const double x : {high, low + (high - low) / 2}) {
        const auto near = static_cast<float>(x);
        if (!std::isfinite(near)) continue;
        for (const float y : {near, std::nextafter(near, 0.0f), std::nextafter(near, std::numeric_limits<float>::infinity())})
          if (std::isfinite(y)) try_value(y);
      }
    }
    CHECK(wrong == 0);
    CHECK(std::isinf(F::decode(F::encode(std::numeric_limits<float>::max()))));
    CHECK(F::encode(-0.0f) == 0x8000);
  }

  SUBCASE("doubles round once") {
    int wrong = 0;
    for (std::size_t i = 1; i < format.values().size(); ++i) {
      const double low = format.values()[i - 1], tie = low + (format.values()[i] - low) / 2;
      // A float cannot tell these from the tie, so rounding by way of a rounded float would go wrong.
      for (const double x : {std::nextafter(tie, 0.0), tie, std::nextafter(tie, 1e300)}) {
        std::uint16_t stored = 0;
        store_element(&stored, F::dtype, x);
        wrong += stored != format.round(x);
      }
    }
    CHECK(wrong == 0);
  }
}

TEST_CASE("dtype names") {
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16, DType::i32, DType::i64})
    CHECK(dtype_from_name(name_of(dtype)) == dtype);
  CHECK(!dtype_from_name("f64"));
  CHECK(!dtype_from_name(""));
  CHECK(size_of(DType::bf16) == 2);
  CHECK(size_of(DType::i64) == 8);
}

TEST_CASE("views") {
  std::array<float, 24> memory{};
  const TensorView dense = view(memory.data(), {2, 3, 4});
  CHECK(dense.rank == 3);
  CHECK(dense.elements() == 24);
  CHECK(dense.strides[0] == 12);
  CHECK(dense.strides[1] == 4);
  CHECK(dense.strides[2] == 1);
  CHECK(dense.dtype == DType::f32);
  CHECK(dense.defined());
  CHECK(!TensorView{}.defined());
  CHECK(TensorView{}.elements() == 0);

  SUBCASE("transposed exchanges two dimensions of the same memory") {
    const TensorView turned = dense.transposed(0, 2);
    CHECK(turned.shape[0] == 4);
    CHECK(turned.shape[2] == 2);
    CHECK(element_address(turned, 3, 1, 1) == element_address(dense, 1, 1, 3));
  }
  SUBCASE("slice moves the origin") {
    const TensorView part = dense.slice(1, 1, 2).slice(2, 2, 1);
    CHECK(part.shape[1] == 2);
    CHECK(part.elements() == 4);
    CHECK(element_address(part, 1, 1, 0) == element_address(dense, 1, 2, 2));
    CHECK(TensorView{dense}.slice(0, 0, 0).elements() == 0);
  }
  SUBCASE("negative strides walk backward") {
    const TensorView backward = view(memory.data() + 23, {24}, {-1});
    CHECK(element_address(backward, 23) == memory.data());
  }
  SUBCASE("a const pointer gives a view of the same type") {
    const std::int64_t slots[] = {1, 2};
    CHECK(view(slots, {2}).dtype == DType::i64);
  }
  SUBCASE("bad shapes are refused") {
    CHECK_THROWS_WITH_AS(view(memory.data(), {1, 1, 1, 1, 1, 1}), "view: expected 1 to 5 dimensions, got 6", Error);
    CHECK_THROWS_WITH_AS(make_view(memory.data(), DType::f32, {}), "view: expected 1 to 5 dimensions, got 0", Error);
    CHECK_THROWS_WITH_AS(view(memory.data(), {2, 2}, {1}), "view: expected 2 strides, got 1", Error);
    CHECK_THROWS_WITH_AS(view(memory.data(), {2, -1}), "view: dimension 1 has the negative size -1", Error);
  }
}
