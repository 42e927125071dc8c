// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "backends/cuda/coefficients.cuh"

namespace gatedelta::cuda {

/// TokenColumns of keys and queries that are not bfloat16, each the sum of several numbers that are: two for all of a float16,
/// three for all of a float32. They are in the block's shared memory; each warp fetches and splits some of them for all. Of
/// the products of parts, those that are nothing beside a float32 are left out.
template <class Input, int key_dim, int token_tile, int width>
class SplitColumns : public TokenColumns<key_dim, token_tile, width> {
  using Base = TokenColumns<key_dim, token_tile, width>;

 public:
  using Element = Input;
  using Base::blocks, Base::runs, Base::parts, Base::beside;
  static constexpr int key_parts = bfloat_parts_of<Input>, pairs = width / 2;

  __device__ explicit SplitColumns(void* memory) : Base(memory), memory_(shared_address(memory, Base::shared_bytes)) {}

  __device__ void fetch(const FastParams& p, unsigned n, unsigned h, int count, int g, int c) {
#pragma unroll
    for (int turn = 0; turn < turns; ++turn) {
      const int number = number_of(turn), token = g % token_tile;
      if (number >= turns) break;
      const bool query = beside ? g >= 4 : number / runs == 1;
      const std::int64_t at = query ? offset_of(p.q, n, static_cast<unsigned>(token), head_of(h, p.q_group))
                                    : offset_of(p.k, n, static_cast<unsigned>(token), head_of(h, p.k_group));
      const auto* const from = static_cast<const Input*>(query ? p.q.data : p.k.data) + at + width * (c + 4 * (number % runs));
      load(raw_[turn], from, token < count);
    }
  }

  /// Hands what was fetched to all warps of the block.
  __device__ void share(int g, int c) {
#pragma unroll
    for (int turn = 0; turn < turns; ++turn) {
      const int number = number_of(turn), block = number / runs, i = number % runs;
      if (number >= turns) break;
#pragma unroll
      for (int j = 0; j < pairs; ++j) {
        float low, high;
        if constexpr (sizeof(Input) == 4)
          low = __uint_as_float(raw_[turn][2 * j]), high = __uint_as_float(raw_[turn][2 * j + 1]);
        else
          widen(raw_[turn][j], low, high, Input{});
        Pair split[key_parts];
        split_in<key_parts>(low, high, [&](int part) -> Pair& { return split[part]; });
#pragma unroll
        for (int part = 0; part < key_parts; ++part)
          *reinterpret_cast<Pair*>(row_at(part, block, g) + ((i * pairs + j) ^ g) * 16 + 4 * c) = split[part];
      }
    }
    __syncthreads();
  }

  /// As fragments of a matrix product: of one part of column g of a block, four pairs from this one.
  __device__ void load_pairs(Pair (&out)[4], int block, int first, int part = 0) const {
    const int lane = own_lane(), row = lane % 8;
    load_matrices(out, row_at(part, block, row) + (((lane / 8) ^ row) ^ first % 8) * 16 + first / 8 * 128);
  }

  template <bool common>
  __device__ void prepare(const FastParams& p, int count, int g, int c) {
    Base::template prepare_with<common, false>(
        p, count, g, c, 0, [&](float(&products)[2], float(&read_outs)[2], float(&squares)[2]) {
          float keys[2][4] = {}, queries[2][4] = {};  // of the first parts, of the others
#pragma unroll
          for (int first = 0; first < runs * pairs; first += 4) {
            Pair words[blocks][key_parts][4];
#pragma unroll
            for (int block = 0; block < blocks; ++block)
#pragma unroll
              for (int part = 0; part < key_parts; ++part) load_pairs(words[block][part], block, first, part);
#pragma unroll
            for (int a = 0; a < key_parts; ++a)
#pragma unroll
              for (int b = 0; a + b < 3 && b < key_parts; ++b)
#pragma unroll
                for (int j = 0; j < 4; j += 2) {
                  const auto &key = words[0][a], &query = words[blocks - 1][a];
                  const int rest = a + b > 0;
                  multiply_add(keys[rest], key[j], query[j], key[j + 1], query[j + 1], words[0][b][j], words[0][b][j + 1]);
                  if constexpr (!beside)
                    multiply_add(queries[rest], query[j], 0, query[j + 1], 0, words[blocks - 1][b][j],
                                 words[blocks - 1][b][j + 1]);
                }
          }
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            products[e] = keys[0][e] + keys[1][e];
            read_outs[e] = keys[0][2 + e] + keys[1][2 + e];
            squares[e] = queries[0][e] + queries[1][e];
          }
        });
  }

  __device__ void forget() {}

  /// d += U k^T for rows g and g + 8 and the keys of pairs j and j + 1 of run i.
  __device__ void multiply_keys(float (&d)[2][4], const Pair (&u)[1][2][parts], int i, int j) const {
    const int lane = own_lane(), row = lane % 8, first = i * pairs + j;
    const auto load_keys = [&](Pair(&out)[4], int part, int other) {  // out[2 part + e]
      load_transposed(
          out, row_at(lane / 16 == 0 ? part : other, 0, row) + ((lane / 8 % 2 ^ row) ^ first % 8) * 16 + first / 8 * 128);
    };
    Pair upper[4], lower[4];
    load_keys(upper, 0, 1);
    if constexpr (key_parts > 2) load_keys(lower, 2, 2);
    const auto& [low, high] = u[0];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const Pair first_part = upper[e], second_part = upper[2 + e];
      multiply_add(d[e], low[2], high[2], low[1], high[1], first_part, second_part);
      if constexpr (key_parts > 2)
        multiply_add(d[e], low[0], high[0], low[1], high[1], lower[e], first_part);
      else
        multiply_add(d[e], low[1], high[1], first_part);
      multiply_add(d[e], low[0], high[0], low[0], high[0], second_part, first_part);
    }
  }

 private:
  // As in WideColumns: rows of shared memory are tokens, and vector v of a row r is at v ^ (r % 8).
  static constexpr int row_bytes = 2 * key_dim;
  static constexpr int turns = blocks * runs, words = width * static_cast<int>(sizeof(Input)) / 4;

  __device__ char* row_at(int part, int block, int row) const {
    return memory_ + ((part * blocks + block) * 8 + row) * row_bytes;
  }
  __device__ static void load(std::uint32_t (&out)[words], const Input* from, bool there) {
    if constexpr (words == 2) {
      uint2 vector = {};
      if (there) vector = *reinterpret_cast<const uint2*>(from);
      out[0] = vector.x, out[1] = vector.y;
    } else {
#pragma unroll
      for (int i = 0; i < words; i += 4) {
        uint4 vector = {};
        if (there) vector = reinterpret_cast<const uint4*>(from)[i / 4];
        out[i] = vector.x, out[i + 1] = vector.y, out[i + 2] = vector.z, out[i + 3] = vector.w;
      }
    }
  }
  __device__ static int own_lane() { return static_cast<int>(threadIdx.x % 32); }
  /// Runs of blocks are numbered; those of a warp.
  __device__ static int number_of(int turn) { return static_cast<int>(threadIdx.x / 32 + turn * (blockDim.x / 32)); }

  char* const memory_;
  std::uint32_t raw_[turns][words];

 public:
  static constexpr std::size_t shared_bytes = Base::shared_bytes + std::size_t{key_parts * blocks * 8} * row_bytes;
};

}  // namespace gatedelta::cuda
