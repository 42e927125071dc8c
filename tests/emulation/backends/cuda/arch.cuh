// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_pipeline_primitives.h>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "device.hpp"

// In place of src/backends/cuda/arch.cuh, which says what these are: the same functions, in C++. One that is missing here is an
// error where a kernel uses it.
namespace gatedelta::cuda {

using Pair = std::uint32_t;

/// What a lane has of the factors of a product: of a and b as many words as there are.
template <int a_words, int b_words>
struct Factors {
  Pair a[a_words], b[b_words];
};

inline void unpack(Pair pair, double* out) {
  out[0] = __uint_as_float(pair << 16);
  out[1] = __uint_as_float(pair & 0xffff0000u);
}
inline float toward_zero(double x) {
  const auto nearest = static_cast<float>(x);
  return std::fabs(nearest) > std::fabs(x) ? std::nextafter(nearest, 0.0f) : nearest;
}
/// A product is summed up in float64, how a device does it is its own business, and then rounded toward zero, as devices do.
template <int a_words, int b_words>
void multiply_add(float (&d)[4], const Factors<a_words, b_words>& mine) {
  static_assert(a_words == 2 * b_words);
  const auto lanes = emulation::exchange(b_words == 2 ? "a product of 16 keys" : "a product of 8 keys", mine);
  const int g = emulation::own_lane() / 4, c = emulation::own_lane() % 4;
  // The lane's two rows of a and two columns of b.
  double rows[2][8 * b_words], columns[2][8 * b_words];
  for (int i = 0; i < 4; ++i) {
    const auto row = lanes[4 * g + i];
    for (int word = 0; word < a_words; ++word) unpack(row.a[word], &rows[word % 2][8 * (word / 2) + 2 * i]);
    for (int e = 0; e < 2; ++e) {
      const auto column = lanes[4 * (2 * c + e) + i];
      for (int word = 0; word < b_words; ++word) unpack(column.b[word], &columns[e][8 * word + 2 * i]);
    }
  }
  for (int e = 0; e < 4; ++e) {
    double sum = d[e];
    for (int k = 0; k < 8 * b_words; ++k) sum += rows[e / 2][k] * columns[e % 2][k];
    d[e] = toward_zero(sum);
  }
}
inline void multiply_add(float (&d)[4], Pair a0, Pair a1, Pair a2, Pair a3, Pair b0, Pair b1) {
  multiply_add(d, Factors<4, 2>{{a0, a1, a2, a3}, {b0, b1}});
}
inline void multiply_add(float (&d)[4], Pair a0, Pair a1, Pair b) { multiply_add(d, Factors<2, 1>{{a0, a1}, {b}}); }

inline std::uint32_t transposed(std::uint32_t x) {
  const auto lanes = emulation::exchange("a transposition", x);
  const int g = emulation::own_lane() / 4, c = emulation::own_lane() % 4;
  const auto element = [&](int row) { return lanes[4 * row + g / 2] >> (16 * (g % 2)) & 0xffff; };
  return element(2 * c) | element(2 * c + 1) << 16;
}

/// Element `column` of the row of 16 bytes.
inline std::uint16_t row_element(const char* row, int column) {
  std::uint16_t element;
  std::memcpy(&element, row + 2 * column, sizeof element);
  return element;
}
inline void load_transposed(std::uint32_t (&out)[4], const void* row) {
  const auto rows = emulation::exchange("a transposed load", static_cast<const char*>(row));
  const int g = emulation::own_lane() / 4, c = emulation::own_lane() % 4;
  for (int i = 0; i < 4; ++i)
    out[i] = row_element(rows[8 * i + 2 * c], g) | std::uint32_t{row_element(rows[8 * i + 2 * c + 1], g)} << 16;
  emulation::warp_barrier();  // no lane goes on before all have loaded
}
inline void load_matrices(std::uint32_t (&out)[4], const void* row) {
  const auto rows = emulation::exchange("a load", static_cast<const char*>(row));
  const int g = emulation::own_lane() / 4, c = emulation::own_lane() % 4;
  for (int i = 0; i < 4; ++i) std::memcpy(&out[i], rows[8 * i + g] + 4 * c, sizeof out[i]);
  emulation::warp_barrier();
}
inline void store_transposed(void* row, const std::uint32_t (&in)[4]) {
  const auto rows = emulation::exchange("a transposed store", static_cast<char*>(row));
  const int g = emulation::own_lane() / 4, c = emulation::own_lane() % 4;
  for (int i = 0; i < 4; ++i)
    for (int e = 0; e < 2; ++e) {
      const auto element = static_cast<std::uint16_t>(in[i] >> (16 * e));
      std::memcpy(rows[8 * i + 2 * c + e] + 2 * g, &element, sizeof element);
    }
}

// Products by four warps together: here each warp for itself, and at once.
constexpr bool has_group_products = GATEDELTA_GROUP_PRODUCTS;
using SharedMatrix = std::uint64_t;
inline std::uint32_t shared_offset(const void* shared) {
  return static_cast<std::uint32_t>(static_cast<const char*>(shared) - static_cast<const char*>(emulation::shared_memory()));
}
inline char* at_shared(std::uint32_t offset) { return static_cast<char*>(emulation::shared_memory()) + offset; }
inline SharedMatrix shared_matrix(std::uint32_t address) { return address / 16; }
inline void show_to_products() {}
inline void begin_products() {}
inline void end_products() {}
template <int>
void wait_for_products() {}
template <bool transposed>
void multiply_in_group(float (&d)[2][4][4], const Pair (&a)[4], SharedMatrix b) {
  const int g = emulation::own_lane() / 4, c = emulation::own_lane() % 4;
  // Element `element` of line `line`, where the swizzle has put it: it counts from the address, not from b.
  const auto pair_at = [&](int line, int element) {
    const auto address = static_cast<std::uint32_t>(16 * b) + static_cast<std::uint32_t>(128 * line + 2 * element);
    std::uint16_t out;
    std::memcpy(&out, at_shared(address ^ (address / 128 % 8 * 16)), sizeof out);
    return std::uint32_t{out};
  };
  for (int tile = 0; tile < 8; ++tile) {
    Pair words[2];
    for (int half = 0; half < 2; ++half) {
      const int column = 8 * tile + g, k = 8 * half + 2 * c;
      words[half] =
          transposed ? pair_at(k, column) | pair_at(k + 1, column) << 16 : pair_at(column, k) | pair_at(column, k + 1) << 16;
    }
    multiply_add(d[tile / 4][tile % 4], a[0], a[1], a[2], a[3], words[0], words[1]);
  }
  emulation::warp_barrier();
}

inline void load_again(std::uint32_t (&out)[4], const void* from) { std::memcpy(out, from, sizeof out); }
enum class Eviction : std::uint32_t { first, normal, last };
inline void store_vector(void* to, uint4 vector, Eviction) { std::memcpy(to, &vector, sizeof vector); }
inline void copy_vector(void* to, const void* from, Eviction) { __pipeline_memcpy_async(to, from, 16); }
template <class Word, class T>
void load_if(bool wanted, Word& x, const T* from) {
  if (wanted) x = *from;
}

template <class T>
void forget(T&) {}

inline char* shared_address(void* shared, std::uint32_t offset) { return at_shared(shared_offset(shared) + offset); }

inline std::int64_t multiply_wide(std::int32_t a, std::int32_t b) { return std::int64_t{a} * b; }

}  // namespace gatedelta::cuda
