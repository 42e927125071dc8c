// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "backends/cuda/vectors.cuh"

// What a warp moves of v and o with a unit of the state, for the kernels of the serving form: their value rows are together in
// memory. v goes through shared memory behind the unit.
namespace gatedelta::cuda {

struct AllTiles {
  __device__ bool operator()(int) const { return true; }
};

/// Up to 8 tokens in 16 bits: each lane copies and stores the pairs that it has, two values of token g in each half of a tile.
template <class Unit, class Tokens>
class ValuePairs {
 public:
  using Raw = Pair;
  static constexpr int groups = Tokens::groups, halves = Unit::halves;
  static constexpr int bytes = Unit::tiles * halves * 32 * 4;

  __device__ ValuePairs(const FastParams& p, unsigned n, unsigned h, int lane)
      : p_(p), n_(n), h_(h), lane_(lane), g_(lane / 4), c_(lane % 4) {}

  /// Starts the copy of a unit's values from this one up to the end of the span, of the tiles that `is_own` names.
  template <class IsOwn>
  __device__ void fetch(char* memory, int first_value, int span_end, IsOwn is_own) const {
    if (!has_v()) return;
    const auto* const v = static_cast<const std::uint16_t*>(p_.v.data) +
                          offset_of(p_.v, n_, static_cast<unsigned>(g_), head_of(h_, p_.v_group)) + first_value + 2 * c_;
#pragma unroll
    for (int m = 0; m < Unit::tiles; ++m)
#pragma unroll
      for (int half = 0; half < halves; ++half)
        if (const int value = m * Unit::tile_rows + 8 * half; first_value + value < span_end && is_own(m))
          __pipeline_memcpy_async(word(memory, m, half), v + value, sizeof(Pair));
  }
  /// Of tile m, columns 2c and 2c + 1 of row g of each half.
  __device__ void load(Pair (&out)[groups][halves], char* memory, int m) const {
#pragma unroll
    for (int half = 0; half < halves; ++half) out[0][half] = transposed(has_v() ? *word(memory, m, half) : 0);
  }
  /// Outputs of tile m, which begins with this value.
  __device__ void store(const float (&out)[groups][4], char*, int, int first_value) const {
#pragma unroll
    for (int half = 0; half < halves; ++half) {
      const Pair pair = transposed(narrow(out[0][2 * half], out[0][2 * half + 1], typename Tokens::Element{}));
      const int t = Tokens::query_of(g_);
      if (t >= 0 && t < count()) store(t, first_value + 8 * half, pair);
    }
  }
  __device__ void zero(int first_value, int span_end) const {
    for (int value = first_value; value < span_end; value += 8)
      if (g_ < count()) store(g_, value, 0);
  }

 private:
  __device__ int count() const { return static_cast<int>(p_.tokens); }
  __device__ bool has_v() const { return g_ < count(); }
  __device__ Pair* word(char* memory, int m, int half) const {
    return reinterpret_cast<Pair*>(memory) + (m * halves + half) * 32 + lane_;
  }
  __device__ void store(int t, int value, Pair pair) const {
    auto* const to =
        static_cast<std::uint16_t*>(p_.o.data) + offset_of(p_.o, n_, static_cast<unsigned>(t), h_) + value + 2 * c_;
    *reinterpret_cast<std::uint32_t*>(to) = pair;
  }

  const FastParams& p_;
  const unsigned n_, h_;
  const int lane_, g_, c_;
};

/// Up to 8 tokens in float32, K-last: of a tile a lane copies and stores 4 values of one token, 16 bytes.
template <class Unit, class Tokens>
class ValueFloats {
 public:
  using Raw = float2;
  static constexpr int groups = Tokens::groups, halves = Unit::halves;
  static_assert(groups == 1 && halves == 2 && Unit::tiles == 1);
  static constexpr int line = 20;  ///< of a token in shared memory: so that what is read together is in different banks
  static constexpr int bytes = 8 * line * 4;

  __device__ ValueFloats(const FastParams& p, unsigned n, unsigned h, int lane)
      : p_(p), n_(n), h_(h), token_(lane / 4), first_(lane % 4 * 4) {}

  template <class IsOwn>
  __device__ void fetch(char* memory, int first_value, int span_end, IsOwn) const {
    if (token_ >= count() || first_value >= span_end) return;
    const auto* const v = static_cast<const float*>(p_.v.data) +
                          offset_of(p_.v, n_, static_cast<unsigned>(token_), head_of(h_, p_.v_group)) + first_value + first_;
    __pipeline_memcpy_async(vector(memory), v, 16);
  }
  __device__ void load(Raw (&out)[groups][halves], char* memory, int) const {
    const float* const floats = at(memory);
#pragma unroll
    for (int half = 0; half < halves; ++half)
      out[0][half] =
          make_float2(column() < count() ? floats[8 * half] : 0.0f, column() + 1 < count() ? floats[8 * half + line] : 0.0f);
  }
  __device__ void store(const float (&out)[groups][4], char* memory, int, int first_value) const {
    __syncwarp();
    // Of a lane, columns 2c and 2c + 1.
    if (const int t = Tokens::query_of(column()); t >= 0) {
      float* const floats = at(memory) + (t - column()) * line;
#pragma unroll
      for (int half = 0; half < halves; ++half)
        floats[8 * half] = out[0][2 * half], floats[8 * half + line] = out[0][2 * half + 1];
    }
    __syncwarp();
    if (token_ < count()) store(first_value, *vector(memory));
  }
  __device__ void zero(int first_value, int span_end) const {
    for (int value = first_value; value < span_end; value += Unit::rows)
      if (token_ < count()) store(value, uint4{});
  }

 private:
  __device__ int count() const { return static_cast<int>(p_.tokens); }
  /// The first of the lane's two columns of a product; its row in the first half is lane / 4.
  __device__ int column() const { return first_ / 2; }
  __device__ float* at(char* memory) const { return reinterpret_cast<float*>(memory) + column() * line + token_; }
  __device__ uint4* vector(char* memory) const {
    return reinterpret_cast<uint4*>(reinterpret_cast<float*>(memory) + token_ * line + first_);
  }
  __device__ void store(int first_value, const uint4& values) const {
    auto* const to =
        static_cast<float*>(p_.o.data) + offset_of(p_.o, n_, static_cast<unsigned>(token_), h_) + first_value + first_;
    *reinterpret_cast<uint4*>(to) = values;
  }

  const FastParams& p_;
  const unsigned n_, h_;
  const int token_, first_;
};

/// 16 tokens in 16 bits: of a tile a lane copies and stores 8 values of one token, 16 bytes; as matrices they come out of
/// shared memory the other way around. `pairwise`: the halves of a tile have pairs of value rows in turn, not 8 rows each.
template <class Element, class Unit, bool pairwise = false>
class ValueVectors {
 public:
  using Raw = Pair;
  static constexpr int groups = 2, halves = Unit::halves, tile_bytes = 16 * Unit::tile_rows * 2;
  static constexpr int bytes = Unit::tiles * tile_bytes;

  __device__ ValueVectors(const FastParams& p, unsigned n, unsigned h, int lane)
      : ValueVectors(p, n, h, lane, 0, static_cast<int>(p.tokens)) {}
  /// Of `count` tokens from `first`.
  __device__ ValueVectors(const FastParams& p, unsigned n, unsigned h, int lane, unsigned first, int count)
      : p_(p), n_(n), h_(h), first_(first), lane_(lane), count_(count) {}

  template <class IsOwn = AllTiles>
  __device__ void fetch(char* memory, int first_value, int span_end, IsOwn is_own = {}) const {
    if (!has_token()) return;
    const std::uint16_t* const v = values_from(first_value);
#pragma unroll
    for (int m = 0; m < Unit::tiles; ++m)
      if (const int value = m * Unit::tile_rows; first_value + value < span_end && is_own(m)) copy(memory, m, v + value);
  }
  /// Of units that follow each other, as far as there are values: memory_of(i) is that of unit i.
  template <class MemoryOf>
  __device__ void fetch_units(int units, const MemoryOf& memory_of, int first_value, int end) const {
    static_assert(Unit::tiles == 1);
    if (!has_token()) return;
    const std::uint16_t* v = values_from(first_value);
#pragma unroll 1
    for (int unit = 0; unit < units && first_value < end; ++unit, first_value += Unit::tile_rows, v += Unit::tile_rows)
      copy(memory_of(unit), 0, v);
  }
  __device__ void load(Pair (&out)[groups][halves], char* memory, int m) const {
    std::uint32_t words[4];
    load_transposed(words, matrix_row(memory, m));
#pragma unroll
    for (int group = 0; group < groups; ++group)
#pragma unroll
      for (int half = 0; half < halves; ++half) {
        // What is there in the place of tokens that are not is never used.
        const int behind = count_ - (8 * group + lane_ % 4 * 2);
        out[group][half] = words[2 * group + half] & (behind > 1 ? 0xffffffffu : behind > 0 ? 0xffffu : 0u);
      }
  }
  __device__ void store(const float (&out)[groups][4], char* memory, int m, int first_value) const {
    put(out, memory, m);
    store_put(memory, m, first_value);
  }
  /// The same in two steps: into shared memory, and on.
  __device__ void put(const float (&out)[groups][4], char* memory, int m) const {
    std::uint32_t words[4];
#pragma unroll
    for (int group = 0; group < groups; ++group)
#pragma unroll
      for (int half = 0; half < halves; ++half)
        words[2 * group + half] = narrow(out[group][2 * half], out[group][2 * half + 1], Element{});
    __syncwarp();
    store_transposed(matrix_row(memory, m), words);
  }
  __device__ void store_put(char* memory, int m, int first_value) const {
    __syncwarp();
    if (!has_token()) return;
    if constexpr (pairwise)
      store(first_value, make_uint4(*word(memory, m, 0), *word(memory, m, 1), *word(memory, m, 2), *word(memory, m, 3)));
    else
      store(first_value, *vector(memory, m));
  }
  __device__ void zero(int first_value, int span_end) const {
    for (int value = first_value; value < span_end; value += Unit::tile_rows)
      if (has_token()) store(value, uint4{});
  }

 private:
  static_assert(Unit::tile_rows == 16);

  __device__ const std::uint16_t* values_from(int first_value) const {
    return static_cast<const std::uint16_t*>(p_.v.data) + offset_of(p_.v, n_, token(), head_of(h_, p_.v_group)) + first_value +
           8 * piece();
  }
  __device__ void copy(char* memory, int m, const std::uint16_t* from) const {
    if constexpr (pairwise) {
#pragma unroll
      for (int pair = 0; pair < 4; ++pair) __pipeline_memcpy_async(word(memory, m, pair), from + 2 * pair, 4);
    } else {
      __pipeline_memcpy_async(vector(memory, m), from, 16);
    }
  }
  __device__ int row() const { return lane_ / 2; }
  __device__ unsigned token() const { return first_ + static_cast<unsigned>(row()); }
  __device__ int piece() const { return lane_ % 2; }
  __device__ bool has_token() const { return row() < count_; }
  // Rows of shared memory are tokens, of two vectors each, one for each half of the tile, which change places in every other
  // four rows: so that the rows of a matrix are in different banks.
  __device__ uint4* vector(char* memory, int m) const {
    return reinterpret_cast<uint4*>(memory + m * tile_bytes) + (lane_ ^ (lane_ / 8 % 2));
  }
  __device__ static char* half_of_row(char* memory, int m, int row, int half) {
    return memory + m * tile_bytes + row * 32 + (half ^ (row / 4 % 2)) * 16;
  }
  /// Pairwise, pair `pair` of the lane's four.
  __device__ std::uint32_t* word(char* memory, int m, int pair) const {
    char* const at = half_of_row(memory, m, row(), pair % 2);
    return reinterpret_cast<std::uint32_t*>(at) + 2 * piece() + pair / 2;
  }
  __device__ char* matrix_row(char* memory, int m) const {
    return half_of_row(memory, m, lane_ / 16 * 8 + lane_ % 8, lane_ / 8 % 2);
  }
  __device__ void store(int first_value, const uint4& values) const {
    auto* const to = static_cast<std::uint16_t*>(p_.o.data) + offset_of(p_.o, n_, token(), h_) + first_value + 8 * piece();
    *reinterpret_cast<uint4*>(to) = values;
  }

  const FastParams& p_;
  const unsigned n_, h_, first_;
  const int lane_, count_;
};

}  // namespace gatedelta::cuda
