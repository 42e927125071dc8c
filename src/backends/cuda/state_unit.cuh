// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "backends/cuda/vectors.cuh"

namespace gatedelta::cuda {

/// What a warp moves at a time of a head's state, in shared memory: whole lines of device memory, since pieces of 64 bytes
/// would cost 5 % of its bandwidth. From there it goes as fragments of matrix products, a tile of 16 value rows at a time, in
/// two halves. Copies are asynchronous. The state has no gaps: K-last a unit is contiguous, V-last it is 128 bytes of each key.
///
/// Of a tile, with g = lane / 4 and c = lane % 4, a lane has value row g of each half, and of it the keys width (c + 4i) ...
/// width (c + 4i) + width - 1 for each run i, in pairs j, as four words. Products do not care for the order of what they sum
/// over.
template <class State, int key_dim, bool value_last>
class StateUnit {
 public:
  static constexpr int width = lanes_of<State>, halves = 2, tile_rows = 8 * halves;
  static constexpr int tiles = value_last ? 8 * width / tile_rows : 1, rows = tiles * tile_rows;
  static constexpr int keys = key_dim;
  static constexpr int runs = key_dim / (4 * width);
  static constexpr int pair_words = static_cast<int>(sizeof(State)) / 2;
  static constexpr std::size_t bytes = std::size_t{sizeof(State)} * rows * key_dim;

  /// `memory`: the warp's, of `bytes`. `value_dim`: how far it is from key to key of a V-last state.
  __device__ StateUnit(void* memory, unsigned lane, int value_dim, Evictions evictions)
      : memory_(static_cast<char*>(memory)), lane_(static_cast<int>(lane)), value_dim_(value_dim), evictions_(evictions) {}

  /// Elements from a head's first to the first of its value rows from `first_value`.
  __device__ static int offset(int first_value) { return value_last ? first_value : first_value * key_dim; }

  /// Starts the copy of a unit whose first element is *from and which has `count` value rows: one of `warps` that do it
  /// together.
  template <int warps = 1>
  __device__ void fetch(const State* from, int count, int warp = 0) const {
    for_each_vector<warps>(from, count, warp, [&](char* to, const State* vector) { copy_vector(to, vector, evictions_.load); });
  }
  /// Of a row that starts from zero.
  __device__ void clear() const {
    for_each_vector<1>(static_cast<State*>(nullptr), rows, 0,
                       [](char* to, State*) { *reinterpret_cast<uint4*>(to) = uint4{}; });
  }
  /// Copies it back, likewise. All lanes of all must have stored what they have of it.
  template <int warps = 1>
  __device__ void write(State* to, int count, int warp = 0) const {
    for_each_vector<warps>(to, count, warp, [&](const char* from, State* vector) {
      store_vector(vector, *reinterpret_cast<const uint4*>(from), evictions_.store);
    });
  }

  /// A lane's words of one run of tile m, from shared memory and back.
  __device__ void load(std::uint32_t (&words)[4], int m, int half, int i) const {
    if constexpr (!value_last) {
      const uint4 vector = *reinterpret_cast<const uint4*>(fragment_at(half, i));
      words[0] = vector.x, words[1] = vector.y, words[2] = vector.z, words[3] = vector.w;
    } else if constexpr (pair_words == 1) {
      load_transposed(words, matrix_row_at(m, half, i));
    } else {
#pragma unroll
      for (int e = 0; e < 4; ++e) words[e] = *element_at(m, half, i, e);
    }
  }
  __device__ void store(const std::uint32_t (&words)[4], int m, int half, int i) const {
    if constexpr (!value_last) {
      *reinterpret_cast<uint4*>(fragment_at(half, i)) = make_uint4(words[0], words[1], words[2], words[3]);
    } else if constexpr (pair_words == 1) {
      store_transposed(matrix_row_at(m, half, i), words);
    } else {
#pragma unroll
      for (int e = 0; e < 4; ++e) *element_at(m, half, i, e) = words[e];
    }
  }

  /// Pair j of a run's words.
  __device__ static void values(const std::uint32_t (&words)[4], int j, float& low, float& high) {
    if constexpr (pair_words == 1)
      widen(words[j], low, high, State{});
    else
      low = __uint_as_float(words[2 * j]), high = __uint_as_float(words[2 * j + 1]);
  }
  __device__ static void pack(std::uint32_t (&words)[4], int j, float low, float high) {
    if constexpr (pair_words == 1)
      words[j] = narrow(low, high, State{});
    else
      words[2 * j] = __float_as_uint(low), words[2 * j + 1] = __float_as_uint(high);
  }
  /// Pair j as a sum of bfloat16 numbers: out(part) is where a part goes.
  template <class Out>
  __device__ __forceinline__ static void split(const std::uint32_t (&words)[4], int j, Out out) {
    if constexpr (pair_words == 1) {
      split_pair<State>(words[j], out);
    } else {
      float low, high;
      values(words, j, low, high);
#pragma unroll
      for (int part = 0; part < bfloat_parts_of<State>; ++part) out(part) = take_upper(low, high);
    }
  }

 private:
  // Shared memory has lines as device memory has: of a value row (K-last) or of a key (V-last).
  static constexpr int line_vectors = value_last ? 8 : key_dim / width, lines = value_last ? key_dim : rows,
                       line_bytes = 16 * line_vectors;

  // Lines that are read together have their vectors in different banks: vector v of a line is at v ^ swizzle. K-last, lines of
  // different parity are; V-last all lines of a matrix, or those of lanes that differ in c.
  //
  // Below, what depends on the lane is apart from what is constant, so that addresses need no instructions of their own.
  __device__ char* fragment_at(int half, int i) const {
    const int g = lane_ / 4, flip = g % 2 * 64;
    return memory_ + (8 * half + g) * line_bytes + lane_ % 4 * 16 + (i % 2 == 0 ? flip : -flip) + i * 64;
  }
  __device__ char* matrix_row_at(int m, int half, int i) const {
    const int j = lane_ / 8, row = lane_ % 8;
    return memory_ + (width * (row / 2) + 2 * j + row % 2) * line_bytes + ((m * (tile_rows / width) + half) ^ row) * 16 +
           4 * width * i * line_bytes;
  }
  __device__ std::uint32_t* element_at(int m, int half, int i, int e) const {
    const int value = m * tile_rows + 8 * half + lane_ / 4, c = lane_ % 4;
    return reinterpret_cast<std::uint32_t*>(memory_ + width * c * line_bytes + ((value / width) ^ (2 * c)) * 16 +
                                            value % width * 4 + (4 * width * i + e) * line_bytes);
  }

  /// Calls function(address in shared memory, address in device memory) for the lane's vectors of each line.
  template <int warps, class Pointer, class Function>
  __device__ __forceinline__ void for_each_vector(Pointer* first, int count, int warp, Function function) const {
    constexpr int vectors = line_vectors < 32 ? line_vectors : 32;  // of a line at a time
    static_assert(lines * vectors % (32 * warps) == 0);
    constexpr int step = 32 * warps / vectors;  // lines
    const int line = (32 * warp + lane_) / vectors, vector = lane_ % vectors;
    if (value_last && vector * width >= count) return;
    const int stride = value_last ? value_dim_ : key_dim;
    first += line * stride + vector * width;
    forget(first);
#pragma unroll
    for (int piece = 0; piece < line_vectors / vectors; ++piece)
#pragma unroll
      for (int i = 0; i < lines / step; ++i) {
        // Of line + i step, by 8, 4 or 1.
        const int by_8 = (step <= 8 ? i * step / 8 : line / 8 + i * step / 8) % 4;
        const int by_4 = (step <= 4 ? i * step / 4 : line / 4 + i * step / 4) % 4;
        const int by_1 = (step == 1 ? i : line) % 2;
        const int swizzle = !value_last ? by_1 * 4 : pair_words == 1 ? by_8 * 2 + by_1 : by_4 * 2;
        function(memory_ + line * line_bytes + (vector ^ swizzle) * 16 + i * (step * line_bytes) + piece * 512,
                 first + i * step * stride + piece * (32 * width));
      }
  }
  char* const memory_;
  const int lane_, value_dim_;
  const Evictions evictions_;
};

}  // namespace gatedelta::cuda
