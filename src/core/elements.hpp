// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "gatedelta/tensor.hpp"

// Access to single elements of strided host tensors, for code where clarity counts and speed does not.
namespace gatedelta {

/// Rounds to float toward odd, so that a second rounding to a narrower format equals one rounding of the double.
inline float round_to_odd(double value) {
  float narrow = static_cast<float>(value);
  if (!std::isfinite(value) || static_cast<double>(narrow) == value) return narrow;
  if (std::isinf(narrow)) return narrow;
  std::uint32_t bits = std::bit_cast<std::uint32_t>(narrow);
  if (bits & 1u) return narrow;
  // The nearest float is even: the other neighbour of `value` is the odd one.
  const bool larger_magnitude = std::fabs(value) > std::fabs(static_cast<double>(narrow));
  bits = larger_magnitude ? bits + 1 : bits - 1;
  return std::bit_cast<float>(bits);
}

inline double load_element(const void* address, DType dtype) {
  switch (dtype) {
    case DType::f32: {
      float x;
      std::memcpy(&x, address, sizeof x);
      return x;
    }
    case DType::f16: {
      float16 x;
      std::memcpy(&x, address, sizeof x);
      return to_float(x);
    }
    case DType::bf16: {
      bfloat16 x;
      std::memcpy(&x, address, sizeof x);
      return to_float(x);
    }
    case DType::i32: {
      std::int32_t x;
      std::memcpy(&x, address, sizeof x);
      return x;
    }
    case DType::i64: {
      std::int64_t x;
      std::memcpy(&x, address, sizeof x);
      return static_cast<double>(x);
    }
  }
  return 0;
}

/// Rounds once, to nearest even.
inline void store_element(void* address, DType dtype, double value) {
  if (dtype == DType::f32) {
    const float x = static_cast<float>(value);
    std::memcpy(address, &x, sizeof x);
  } else if (dtype == DType::f16) {
    const float16 x = to_float16(round_to_odd(value));
    std::memcpy(address, &x, sizeof x);
  } else if (dtype == DType::bf16) {
    const bfloat16 x = to_bfloat16(round_to_odd(value));
    std::memcpy(address, &x, sizeof x);
  } else if (dtype == DType::i32) {
    const auto x = static_cast<std::int32_t>(value);
    std::memcpy(address, &x, sizeof x);
  } else {
    const auto x = static_cast<std::int64_t>(value);
    std::memcpy(address, &x, sizeof x);
  }
}

template <class... Index>
void* element_address(const TensorView& tensor, Index... index) {
  std::int64_t offset = 0;
  int dim = 0;
  ((offset += static_cast<std::int64_t>(index) * tensor.strides[dim++]), ...);
  return static_cast<char*>(tensor.data) + offset * static_cast<std::int64_t>(size_of(tensor.dtype));
}

template <class... Index>
double load(const TensorView& tensor, Index... index) {
  return load_element(element_address(tensor, index...), tensor.dtype);
}

template <class... Index>
void store(const TensorView& tensor, double value, Index... index) {
  store_element(element_address(tensor, index...), tensor.dtype, value);
}

}  // namespace gatedelta
