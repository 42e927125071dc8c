// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "backends/cuda/state_rows.cuh"

namespace gatedelta::cuda {

/// What StateRows is, of a V-last state without gaps: 16 neighbouring values of each key. That is 32 or 64 bytes; the warps of
/// a block have neighbours, and copy together, for all of them, what is whole lines of device memory.
template <class State, int key_dim>
class StateColumns {
 public:
  static constexpr int rows = 16, keys = key_dim, steps = key_dim / 16, parts = bfloat_parts_of<State>;
  static constexpr bool narrow_state = sizeof(State) == 2;
  static constexpr int line_bytes = rows * static_cast<int>(sizeof(State)), bytes = key_dim * line_bytes;
  static constexpr int gap_bytes = line_bytes;  ///< so that what warps have of the same key is in different banks

  __device__ static int key_of(int m, int j, int c) { return 16 * m + 8 * j + 2 * c; }

  __device__ StateColumns(std::uint32_t memory, int lane, int value_dim)
      : memory_(memory), lane_(lane), value_dim_(value_dim) {}

  static constexpr int row_step = 1;
  /// Whose copies this thread of a block of `warps` makes: of which warp, as which of its lanes.
  __device__ static void share_copies(int thread, int warps, int& warp, int& lane) {
    const int key = thread / (vectors * warps), vector = thread % (vectors * warps);
    warp = vector / vectors, lane = key * vectors + vector % vectors;
  }
  __device__ static int lane_offset(int lane, int value_dim) {
    return lane / vectors * value_dim + lane % vectors * lanes_of<State>;
  }
  __device__ void fetch(const State* from, Eviction eviction) const {
    for_each_vector(from, [=](char* to, const State* vector) { copy_vector(to, vector, eviction); });
  }

  __device__ __forceinline__ void load(Pair (&a)[parts][4], int m) const {
    if constexpr (narrow_state) {
      std::uint32_t words[4];
      load_transposed(words, matrix_row(m));
#pragma unroll
      for (int word = 0; word < 4; ++word) split_pair<State>(words[word], [&](int part) -> Pair& { return a[part][word]; });
    } else {
#pragma unroll
      for (int j = 0; j < 2; ++j)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float x = *element_at(half, 2 * m + j, 0), y = *element_at(half, 2 * m + j, 1);
#pragma unroll
          for (int part = 0; part < parts; ++part) a[part][2 * j + half] = take_upper(x, y);
        }
    }
  }

  // On the way back it is changed where it is, in runs of keys that are in order, and then written as it came.
  static constexpr int run_keys = 4 * lanes_of<State>, pairs = run_keys / 8, run_step = 0;
  __device__ static int place_of_pair(int i, int pair, int c) { return 16 * i + 4 * c + pair; }
  __device__ static int vector_offset(int, int) { return 0; }
  __device__ __forceinline__ static int run(int run) { return run; }
  __device__ __forceinline__ void store_sum(State*, int run, float decay, const float (&more)[pairs][4]) const {
#pragma unroll
    for (int pair = 0; pair < pairs; pair += narrow_state ? 2 : 1) {
      if constexpr (narrow_state) {
        char* const at = matrix_row((run * pairs + pair) / 2);
        std::uint32_t words[4];
        load_transposed(words, at);
#pragma unroll
        for (int word = 0; word < 4; ++word) {
          float x, y;
          widen(words[word], x, y, State{});
          const float* const sums = more[pair + word / 2] + word % 2 * 2;
          words[word] = narrow(decay * x + sums[0], decay * y + sums[1], State{});
        }
        store_transposed(at, words);
      } else {
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            float& x = *element_at(half, run * pairs + pair, e);
            x = decay * x + more[pair][2 * half + e];
          }
      }
    }
  }
  /// `to`: the lane's first vector, see lane_offset().
  __device__ void write(State* to) const {
    for_each_vector(to, [](const char* from, State* vector) {
      store_vector(vector, *reinterpret_cast<const uint4*>(from), Eviction::first);
    });
  }

 private:
  static constexpr int vectors = line_bytes / 16;

  // Which rows of 16 bytes are read together, or elements, and which banks these then are in: for 16 bits, rows of 8 keys;
  // vector v of key k is at v ^ (k / 4). For float32, elements of 8 values and every other of 8 keys: keys change places in
  // pairs, and vectors in halves of a line.
  __device__ char* matrix_row(int m) const {
    const int row = lane_ % 8, key = lane_ / 16 * 8 + row, half = lane_ / 8 % 2;
    return at_shared(memory_ + key * line_bytes + (half ^ row / 4) * 16 + m * (16 * line_bytes));
  }
  /// Value lane / 4 of a half, key 2 (lane % 4) + e of the block-th 8.
  __device__ float* element_at(int half, int block, int e) const {
    const int g = lane_ / 4, c = lane_ % 4;
    const std::uint32_t at = memory_ + (2 * c + c % 2) * line_bytes + (g / 4 ^ c / 2 * 2) * 16 + g % 4 * 4;
    const int flip = e * (c % 2 == 0 ? line_bytes : -line_bytes);
    return reinterpret_cast<float*>(at_shared((at ^ (half * 32)) + flip + block * (8 * line_bytes)));
  }
  template <class Pointer, class Function>
  __device__ __forceinline__ void for_each_vector(Pointer* first, Function function) const {
    constexpr int step = 32 / vectors;  // keys
    const int key = lane_ / vectors, vector = lane_ % vectors;
    const int place = narrow_state ? key : key ^ key / 2 % 2, swizzle = narrow_state ? key / 4 % 2 : key / 4 % 2 * 2;
    const std::uint32_t at = memory_ + place * line_bytes + (vector ^ swizzle) * 16;
    forget(first);
#pragma unroll
    for (int i = 0; i < keys / step; ++i) function(at_shared(at + i * step * line_bytes), first + i * step * value_dim_);
  }

  const std::uint32_t memory_;
  const int lane_, value_dim_;
};

}  // namespace gatedelta::cuda
