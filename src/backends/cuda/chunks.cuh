// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "backends/cuda/rows.cuh"
#include "backends/cuda/state_tile.cuh"
#include "backends/cuda/value_tile.cuh"
#include "backends/cuda/wide_columns.cuh"

// The serving form (see serving.cuh) of any number of tokens: chunks of 16, one after the other, with the state in registers
// between them, as float32. What the tokens of a chunk are to each other does not depend on the state: so it is prepared for
// several chunks at once, by as many warps. Either these are all warps of a block, which then go through these chunks, each
// with value rows of its own; or some warps do nothing else, always one group of chunks ahead of the others.
namespace gatedelta::cuda {

constexpr int chunk_tokens = 16;

template <class State, int key_dim, bool value_last, class Input>
struct ChunkForm {
  using Tile = StateTile<State, key_dim, value_last>;
  using Tokens = WideColumns<Input, key_dim, Tile::width>;
  /// What ValueVectors want to know of a tile.
  struct Rows {
    static constexpr int halves = Tile::halves, tile_rows = Tile::warp_rows, tiles = 1;
  };
  using Values = ValueVectors<Input, Rows, value_last>;
};

template <class State, int key_dim, bool value_last, class Input>
__global__ void __launch_bounds__(32 * chunks_max_warps(bfloat_parts_of<Input> == 1), 1)
    chunks_kernel(const __grid_constant__ FastParams p) {
  using Form = ChunkForm<State, key_dim, value_last, Input>;
  using Tile = typename Form::Tile;
  using Tokens = typename Form::Tokens;
  using Values = typename Form::Values;
  constexpr int width = Tile::width, halves = Tile::halves, runs = Tile::runs, pairs = width / 2;
  constexpr int groups = Tokens::groups, parts = Tokens::parts;
  const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32), g = lane / 4, c = lane % 4;
  // Chunks of a group, and how many groups there is room for.
  const int preparing = p.preparing, row_warps = p.warps - preparing;
  const int group_chunks = preparing > 0 ? preparing : row_warps, sets = preparing > 0 ? 2 : 1;
  const unsigned n = p.first_row + blockIdx.z, h = blockIdx.y;
  const int block_begin = static_cast<int>(blockIdx.x) * row_warps * Tile::warp_rows;
  const int first_value = block_begin + (warp - preparing) * Tile::warp_rows;
  wait_for_inputs(p);
  const int block_rows = min(row_warps * Tile::warp_rows, p.value_dim - block_begin);
  if (!has_row(p, n, h, block_begin, block_rows)) return;
  const Row row = resolve(p, n, source_slot(p, n));
  if (row.source < 0) {
    zero_outputs(p, row.batch, row.first_token, row.first_token + row.tokens, h, block_begin, block_rows);
    return;
  }
  const int count = static_cast<int>(row.tokens), chunks = (count + chunk_tokens - 1) / chunk_tokens;
  const auto batch = static_cast<unsigned>(row.batch), first_token = static_cast<unsigned>(row.first_token);
  const bool prepares = preparing == 0 || warp < preparing;
  const bool has_values = warp >= preparing && first_value < p.value_dim;

  extern __shared__ uint4 shared[];
  char* const memory = reinterpret_cast<char*>(shared);
  const auto chunk_at = [&](int chunk) {
    return memory + chunk % (sets * group_chunks) * static_cast<int>(Tokens::shared_bytes);
  };
  const auto values_at = [&](int chunk) {
    const int place = (warp - preparing) * sets * group_chunks + chunk % (sets * group_chunks);
    return memory + sets * group_chunks * static_cast<int>(Tokens::shared_bytes) + place * Values::bytes;
  };
  const auto values_of = [&](int chunk) {
    const int done = chunk * chunk_tokens;
    return Values(p, batch, h, lane, first_token + static_cast<unsigned>(done), min(count - done, chunk_tokens));
  };
  const auto offset_in = [&](const Tensor<std::int64_t, 4>& tensor, std::int64_t slot) {
    return offset_of(tensor, slot, h, first_value) + Tile::lane_offset(lane, tensor.strides[2], tensor.strides[3]);
  };

  float s[halves][runs][width];
  {
    Tile tile;
    tile.clear();
    if (p.initial_state && has_values)
      tile.load(static_cast<const State*>(p.state_read.data) + offset_in(p.state_read, row.source), p.state_read.strides[2],
                p.state_read.strides[3]);
    tile.widen_to(s);
  }

  // The chunks from `prepared` are prepared while those from `begin` are gone through, or before.
#pragma unroll 1
  for (int begin = preparing > 0 ? -group_chunks : 0; begin < chunks; begin += group_chunks) {
    const int prepared = preparing > 0 ? begin + group_chunks : begin;
    if (has_values)
#pragma unroll 1
      for (int chunk = prepared; chunk < min(prepared + group_chunks, chunks); ++chunk)
        values_of(chunk).fetch(values_at(chunk), first_value, p.value_dim);
    __pipeline_commit();
    if (const int chunk = prepared + warp; prepares && chunk < chunks) {
      const int own = min(count - chunk * chunk_tokens, chunk_tokens);
      const unsigned first = first_token + static_cast<unsigned>(chunk * chunk_tokens);
      Tokens tokens(chunk_at(chunk));
      tokens.load(p, batch, h, first, own, g, c);
      tokens.template fetch_gates<false>(p, batch, h, own, g, first);
      tokens.template prepare<false>(p, own, g, c);
      tokens.pass({chunk_at(chunk), lane, true});
    }
    if (preparing > 0) {
      __pipeline_wait_prior(1);
      __syncwarp();
    } else {
      __pipeline_wait_prior(0);
      __syncthreads();
    }

    if (has_values)
#pragma unroll 1
      for (int chunk = max(begin, 0); chunk < min(begin + group_chunks, chunks); ++chunk) {
        Tokens tokens(chunk_at(chunk));
        tokens.pass({chunk_at(chunk), lane, false});
        float products[1][Tokens::blocks][4] = {};
        Pair columns[Tokens::key_parts][Tokens::blocks][4];
#pragma unroll
        for (int i = 0; i < runs; ++i) {
          if (i * pairs % 4 == 0)
#pragma unroll
            for (int key_part = 0; key_part < Tokens::key_parts; ++key_part)
#pragma unroll
              for (int block = 0; block < Tokens::blocks; ++block)
                tokens.load_pairs(columns[key_part][block], block, i * pairs, key_part);
#pragma unroll
          for (int j = 0; j < pairs; j += 2) {
            const int column = (i * pairs + j) % 4;
            Pair a[parts][2][2];
#pragma unroll
            for (int half = 0; half < halves; ++half)
#pragma unroll
              for (int e = 0; e < 2; ++e)
                split_in<parts>(s[half][i][2 * (j + e)], s[half][i][2 * (j + e) + 1],
                                [&](int part) -> Pair& { return a[part][e][half]; });
#pragma unroll
            for (int part = parts - 1; part >= 0; --part)
#pragma unroll
              for (int key_part = Tokens::key_parts - 1; key_part >= 0; --key_part)
#pragma unroll
                for (int block = 0; block < Tokens::blocks; ++block) {
                  const auto& keys = columns[key_part][block];
                  if (part + key_part < 3)
                    multiply_add(products[0][block], a[part][0][0], a[part][0][1], a[part][1][0], a[part][1][1], keys[column],
                                 keys[column + 1]);
                }
          }
        }

        float in[groups][2][2], out[groups][4], u[groups][4] = {};
        Pair v[groups][halves];
        const Values values = values_of(chunk);
        values.load(v, values_at(chunk), 0);
        apply_factors(tokens, products, v, in, out);
        tokens.solve(in, u, out);
        values.store(out, values_at(chunk), 0, first_value);

        // Tokens that there are not have no decay and no correction.
        const float decay = tokens.decay_to(chunk_tokens - 1);
        Pair fragments[groups][2][Tokens::parts];
        corrections_after(tokens, chunk_tokens - 1, c, u, fragments);
#pragma unroll
        for (int i = 0; i < runs; ++i)
#pragma unroll
          for (int j = 0; j < pairs; j += 2) {
            float d[2][4] = {};
            tokens.multiply_keys(d, fragments, i, j);
#pragma unroll
            for (int e = 0; e < 2; ++e)
#pragma unroll
              for (int half = 0; half < halves; ++half)
#pragma unroll
                for (int x = 0; x < 2; ++x) {
                  float& element = s[half][i][2 * (j + e) + x];
                  element = decay * element + d[e][2 * half + x];
                }
          }
      }
    __syncthreads();
  }
  if (!has_values || row.final_slot < 0) return;
  State* const to = static_cast<State*>(p.state_write.data) + offset_in(p.state_write, row.final_slot);
  Tile::store([&](std::int64_t step, const auto& x) { store_as<State>(to, step, x); }, p.state_write.strides[2],
              p.state_write.strides[3], s);
}

}  // namespace gatedelta::cuda
