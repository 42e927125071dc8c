// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "backends/cuda/arch.cuh"
#include "backends/cuda/vectors.cuh"

namespace gatedelta::cuda {

/// The part of a head's state that a warp has, as the fragments of matrix products want it: two groups ("halves") of 8 value
/// rows, and all of K. With g = lane / 4 and c = lane % 4 a lane has one row of each half, and of it the keys width (c +
/// 4i) ... width (c + 4i) + width - 1 for each run i. Matrix products do not care for the order of what they sum over, so a
/// lane's pairs of neighbouring keys may come out of one vector of memory.
template <class State, int key_dim, bool value_last>
struct StateTile {
  static constexpr int width = lanes_of<State>;
  static constexpr int halves = 2;
  static_assert(key_dim <= 128);  // as registers allow
  static constexpr int warp_rows = 8 * halves;
  static constexpr int runs = key_dim / (4 * width);
  /// V-last: neighbouring lanes and the halves share a vector along V of this many elements.
  static constexpr int vector_values = 2 * halves;
  /// Between a lane's rows in the two halves.
  static constexpr int half_step = value_last ? 2 : 8;
  static constexpr int words = value_last ? vector_values * static_cast<int>(sizeof(State)) / 4 : 4;
  static constexpr int vectors = value_last ? runs * width / 2 : halves * runs;

  __device__ static constexpr int row_of(int half, int g) {
    return value_last ? vector_values * (g / 2) + 2 * half + g % 2 : 8 * half + g;
  }
  /// Of the warp's rows, the first of the two neighbours that a lane has of a product with this half.
  __device__ static constexpr int value_of(int half, int c) { return row_of(half, 2 * c); }
  // Where a lane's vectors are, from the warp's first row: at lane_offset() + step(vector).
  // V-last, the key whose vector along V a lane loads is such that after the transposition pair j of run i is where it must be.
  __device__ static std::int64_t lane_offset(int lane, std::int64_t v_stride, std::int64_t k_stride) {
    const int g = lane / 4, c = lane % 4;
    return value_last ? (width * (g / 2) + g % 2) * k_stride + vector_values * c : g * v_stride + width * c;
  }
  __device__ static std::int64_t step(int vector, std::int64_t v_stride, std::int64_t k_stride) {
    if constexpr (value_last) return (4 * width * (vector / (width / 2)) + 2 * (vector % (width / 2))) * k_stride;
    return 8 * (vector / runs) * v_stride + 4 * width * (vector % runs);
  }

  std::uint32_t raw[vectors][words];

  __device__ void clear() {
#pragma unroll
    for (auto& vector : raw)
#pragma unroll
      for (std::uint32_t& word : vector) word = 0;
  }

  /// Straight from memory, the lane's first vector from here.
  __device__ void load(const State* from, std::int64_t v_stride, std::int64_t k_stride) {
#pragma unroll
    for (int vector = 0; vector < vectors; ++vector) {
      const State* const at = from + step(vector, v_stride, k_stride);
      if constexpr (words == 4) {
        const uint4 four = *reinterpret_cast<const uint4*>(at);
        raw[vector][0] = four.x, raw[vector][1] = four.y, raw[vector][2] = four.z, raw[vector][3] = four.w;
      } else {
        const uint2 two = *reinterpret_cast<const uint2*>(at);
        raw[vector][0] = two.x, raw[vector][1] = two.y;
      }
    }
  }

  /// As float32.
  __device__ void widen_to(float (&s)[halves][runs][width]) const {
#pragma unroll
    for (int i = 0; i < runs; ++i)
#pragma unroll
      for (int half = 0; half < halves; ++half) {
        if constexpr (!value_last) {
          unpack<State>(raw[half * runs + i], s[half][i]);
        } else {
#pragma unroll
          for (int j = 0; j < width / 2; ++j) {
            const auto& vector = raw[i * (width / 2) + j];
            float &low = s[half][i][2 * j], &high = s[half][i][2 * j + 1];
            if constexpr (width == 8) {
              widen(transposed(vector[half]), low, high, State{});
            } else {
              low = __uint_as_float(vector[2 * half]), high = __uint_as_float(vector[2 * half + 1]);
              transpose(low, high);
            }
          }
        }
      }
  }

  /// Calls store_vector(step, values) for each of the lane's vectors.
  template <class Store>
  __device__ static void store(Store store_vector, std::int64_t v_stride, std::int64_t k_stride,
                               const float (&s)[halves][runs][width]) {
    if constexpr (value_last) {
#pragma unroll
      for (int vector = 0; vector < vectors; ++vector) {
        const int i = vector / (width / 2), j = vector % (width / 2);
        float x[vector_values];
#pragma unroll
        for (int half = 0; half < halves; ++half) {
          x[2 * half] = s[half][i][2 * j], x[2 * half + 1] = s[half][i][2 * j + 1];
          transpose(x[2 * half], x[2 * half + 1]);
        }
        store_vector(step(vector, v_stride, k_stride), x);
      }
    } else {
#pragma unroll
      for (int vector = 0; vector < vectors; ++vector)
        store_vector(step(vector, v_stride, k_stride), s[vector / runs][vector % runs]);
    }
  }

 private:
  /// Of 8 x 8 float32 values, by halves of 16 bits.
  __device__ static void transpose(float& low, float& high) {
    const std::uint32_t x = __float_as_uint(low), y = __float_as_uint(high);
    const std::uint32_t lower = transposed(__byte_perm(x, y, 0x5410)), upper = transposed(__byte_perm(x, y, 0x7632));
    low = __uint_as_float(__byte_perm(lower, upper, 0x5410));
    high = __uint_as_float(__byte_perm(lower, upper, 0x7632));
  }
};

}  // namespace gatedelta::cuda
