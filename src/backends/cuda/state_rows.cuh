// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "backends/cuda/vectors.cuh"

namespace gatedelta::cuda {

/// 16 value rows of a head's K-last state without gaps, in shared memory, as a matrix that products take 16 keys at a time.
///
/// Of step m, with g = lane / 4 and c = lane % 4, a lane has of the rows g and g + 8 two pairs of keys, of which pair j starts
/// at key_of(m, j, c). Products do not care for the order of what they sum over, so it is what loads bring without moves.
template <class State, int key_dim>
class StateRows {
 public:
  static constexpr int rows = 16, keys = key_dim, steps = key_dim / 16, parts = bfloat_parts_of<State>;
  static constexpr bool narrow_state = sizeof(State) == 2;
  static constexpr int line_bytes = key_dim * static_cast<int>(sizeof(State)), bytes = rows * line_bytes;
  static constexpr int gap_bytes = 0;  ///< behind what a warp has

  __device__ static int key_of(int m, int j, int c) { return 16 * m + (narrow_state ? 8 * j + 2 * c : 4 * c + 2 * j); }

  /// `memory`: the warp's, of `bytes`, aligned to a line.
  __device__ StateRows(std::uint32_t memory, int lane, int /*value_dim*/) : memory_(memory), lane_(lane) {}

  static constexpr int row_step = key_dim;                      ///< from one value row to the next
  __device__ static void share_copies(int, int, int&, int&) {}  // each warp makes its own
  /// Where the lane's first vector is, from the first row's first element on. With it, the copy of 16 rows starts.
  __device__ static int lane_offset(int lane, int /*value_dim*/) {
    return lane / vectors * key_dim + lane % vectors * lanes_of<State>;
  }
  __device__ void fetch(const State* from, Eviction eviction) const {
    for_each_vector(from, [=](char* to, const State* vector) { copy_vector(to, vector, eviction); });
  }

  /// Step m as a fragment, in parts that add up to it.
  __device__ __forceinline__ void load(Pair (&a)[parts][4], int m) const {
    if constexpr (narrow_state) {
      const int row = lane_ % 16, vector = (lane_ / 16) ^ (row % 8);
      std::uint32_t words[4];
      load_matrices(words, at_shared(((memory_ + row * line_bytes + vector * 16) ^ (m % 4 * 32)) + m / 4 * 128));
#pragma unroll
      for (int word = 0; word < 4; ++word) split_pair<State>(words[word], [&](int part) -> Pair& { return a[part][word]; });
    } else {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float4 x = *reinterpret_cast<const float4*>(line_at(half, m));
#pragma unroll
        for (int part = 0; part < parts; ++part) {
          a[part][half] = take_upper(x.x, x.y);
          a[part][2 + half] = take_upper(x.z, x.w);
        }
      }
    }
  }

  // On the way back a lane has a vector of the rows g and g + 8 in each run of `run_keys` keys, which are `pairs` products. As
  // a row of shared memory for these, keys are in the order of runs, pairs and lanes: where pair `pair` of the keys from
  // 8 (c + 4 i) is.
  static constexpr int run_keys = 4 * lanes_of<State>, pairs = lanes_of<State> / 2, run_step = run_keys;
  __device__ static int place_of_pair(int i, int pair, int c) {
    return 16 * i + (narrow_state ? 4 * pair + c : c / 2 * 8 + pair % 2 * 4 + c % 2 * 2 + pair / 2);
  }
  /// Where the lane's vector of row g is, from the first row's first key of the run.
  __device__ static int vector_offset(int lane, int /*value_dim*/) { return lane / 4 * key_dim + lane % 4 * lanes_of<State>; }
  struct Run {
    uint4 vectors[2];
  };
  __device__ __forceinline__ Run run(int run) const {
    const int g = lane_ / 4, c = lane_ % 4;
    Run out;
#pragma unroll
    for (int half = 0; half < 2; ++half)
      out.vectors[half] = *reinterpret_cast<const uint4*>(
          at_shared(memory_ + (8 * half + g) * line_bytes + static_cast<std::uint32_t>(((4 * run + c) ^ swizzle(g)) * 16)));
    return out;
  }
  /// Decay times the run plus more, as products have it. `to`: the lane's vector, see vector_offset().
  __device__ __forceinline__ static void store_sum(State* to, const Run& run, float decay, const float (&more)[pairs][4]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint4& old = run.vectors[half];
      std::uint32_t words[4] = {old.x, old.y, old.z, old.w};
      float x[lanes_of<State>];
      unpack<State>(words, x);
#pragma unroll
      for (int pair = 0; pair < pairs; ++pair) {
#pragma unroll
        for (int e = 0; e < 2; ++e) x[2 * pair + e] = decay * x[2 * pair + e] + more[pair][2 * half + e];
        if constexpr (narrow_state)
          words[pair] = gatedelta::cuda::narrow(x[2 * pair], x[2 * pair + 1], State{});
        else
          words[2 * pair] = __float_as_uint(x[2 * pair]), words[2 * pair + 1] = __float_as_uint(x[2 * pair + 1]);
      }
      store_vector(to + 8 * half * key_dim, make_uint4(words[0], words[1], words[2], words[3]), Eviction::first);
    }
  }

 private:
  // Vectors of 16 bytes that are read together lie in different banks: vector v of row r is at v ^ swizzle(r).
  static constexpr int vectors = line_bytes / 16;
  __device__ static int swizzle(int row) { return narrow_state ? row % 8 : row % 2 * 4; }

  __device__ char* line_at(int half, int m) const {
    const int g = lane_ / 4, flip = g % 2 * 64;
    return at_shared(memory_ + g * line_bytes + lane_ % 4 * 16 + (m % 2 == 0 ? flip : -flip) + 8 * half * line_bytes + m * 64);
  }
  template <class Pointer, class Function>
  __device__ __forceinline__ void for_each_vector(Pointer* first, Function function) const {
    constexpr int step = 32 / vectors;  // rows
    static_assert(vectors <= 32 && step <= 8);
    const int row = lane_ / vectors, vector = lane_ % vectors;
    forget(first);
    const std::uint32_t at = memory_ + row * line_bytes + (vector ^ swizzle(row)) * 16;
#pragma unroll
    for (int i = 0; i < rows / step; ++i) {
      const int flip = narrow_state ? i * step % 8 : i * step % 2 * 4;  // what the rows before add to the swizzle
      function(at_shared((at ^ (flip * 16)) + i * step * line_bytes), first + i * step * key_dim);
    }
  }

  const std::uint32_t memory_;
  const int lane_;
};

}  // namespace gatedelta::cuda
