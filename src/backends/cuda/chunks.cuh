// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "backends/cuda/rows.cuh"
#include "backends/cuda/state_tile.cuh"
#include "backends/cuda/value_tile.cuh"
#include "backends/cuda/wide_columns.cuh"

// The serving form (see serving.cuh) of any number of tokens: chunks of 32, one after the other, with the state in registers
// between them, as float32. The state is multiplied with all keys and queries of a chunk at once. Then come its two members of
// 16 tokens, one after the other: what the first has added to the state, the second one has to add to these products,
//
//     S' [k q] = exp(G) S [k q] + U (k^T [k q])
//
// What the tokens of a chunk are to each other does not depend on the state: so it is prepared for several chunks at once, by
// as many warps as they have members. Either these are all warps of a block, which then go through these chunks, each with
// value rows of its own; or some warps do nothing else, always one group of chunks ahead of the others.
namespace gatedelta::cuda {

constexpr int member_tokens = 16, chunk_members = 2, chunk_tokens = member_tokens * chunk_members;

template <class State, int key_dim, bool value_last, class Input>
struct ChunkForm {
  using Tile = StateTile<State, key_dim, value_last>;
  using Tokens = WideColumns<Input, key_dim, Tile::width, chunk_members>;
  /// What ValueVectors want to know of a tile.
  struct Rows {
    static constexpr int halves = Tile::halves, tile_rows = Tile::warp_rows, tiles = 1;
  };
  using Values = ValueVectors<Input, Rows, value_last>;
};

/// A warp's value rows of a state, and their products.
template <class State, int key_dim, bool value_last, class Input>
struct ChunkRows {
  using Form = ChunkForm<State, key_dim, value_last, Input>;
  using Tokens = typename Form::Tokens;
  static constexpr int width = Form::Tile::width, halves = Form::Tile::halves, runs = Form::Tile::runs, pairs = width / 2;
  static constexpr int vectors = runs * pairs, groups = Tokens::groups, parts = Tokens::parts;
  static constexpr int blocks = Tokens::blocks;
  static_assert(halves == 2);

  float s[halves][runs][width];

  /// S [k q] of both members, as rows of 16 value rows; meanwhile() is called while it is being worked out.
  template <class Meanwhile>
  __device__ __forceinline__ void multiply(const Tokens (&tokens)[chunk_members], SharedMatrix matrices,
                                           float (&products)[chunk_members][blocks][4], const Meanwhile& meanwhile) const {
    if constexpr (has_group_products) {
#pragma unroll
      for (int step = 0; step < vectors / 2; ++step) {
        Pair a[parts][4];
        split(step, a);
        begin_products();
        for_each_parts([&](int part, int key_part) {
          multiply_in_group<false>(products, a[part], Tokens::columns(matrices, step, key_part));
        });
        end_products();
        wait_for_products<1>();
      }
      meanwhile();
      wait_for_products<0>();
    } else {
#pragma unroll
      for (int step = 0; step < vectors / 2; ++step) {
        Pair a[parts][4];
        split(step, a);
#pragma unroll
        for (int member = 0; member < chunk_members; ++member)
#pragma unroll
          for (int block = 0; block < blocks; ++block) {
            Pair keys[Tokens::key_parts][4];
#pragma unroll
            for (int key_part = 0; key_part < Tokens::key_parts; ++key_part)
              tokens[member].load_pairs(keys[key_part], block, step / 2 * 4, key_part);
            for_each_parts([&](int part, int key_part) {
              multiply_add(products[member][block], a[part][0], a[part][1], a[part][2], a[part][3],
                           keys[key_part][step % 2 * 2], keys[key_part][step % 2 * 2 + 1]);
            });
          }
      }
      meanwhile();
    }
  }

  /// S <- decay S + U k^T, with U as fragments, of this many members; meanwhile() as above.
  template <class Meanwhile>
  __device__ __forceinline__ void update(const Tokens (&tokens)[chunk_members], SharedMatrix matrices, int count, float decay,
                                         const Pair (&u)[chunk_members][parts][4], const Meanwhile& meanwhile) {
    if constexpr (has_group_products) {
      constexpr int lines = vectors / 8;
      float d[lines][2][4][4];
#pragma unroll
      for (int line = 0; line < lines; ++line) {
#pragma unroll
        for (auto& vectors : d[line])
#pragma unroll
          for (auto& vector : vectors)
#pragma unroll
            for (float& x : vector) x = 0;
        begin_products();
#pragma unroll
        for (int member = 0; member < chunk_members; ++member)
          if (member < count)
            for_each_parts([&](int part, int key_part) {
              multiply_in_group<true>(d[line], u[member][part], Tokens::keys(matrices, member, line, key_part));
            });
        end_products();
        if (line == 0) meanwhile();
      }
#pragma unroll
      for (int line = 0; line < lines; ++line) {
        if (line + 1 < lines)
          wait_for_products<1>();
        else
          wait_for_products<0>();
#pragma unroll
        for (int vector = 0; vector < 8; ++vector) add(8 * line + vector, decay, d[line][vector / 4][vector % 4]);
      }
    } else {
#pragma unroll
      for (int vector = 0; vector < vectors; vector += 2) {
        float d[2][4] = {};
#pragma unroll
        for (int member = 0; member < chunk_members; ++member)
          if (member < count) {
            Pair fragments[groups][2][parts];
#pragma unroll
            for (int part = 0; part < parts; ++part)
#pragma unroll
              for (int group = 0; group < groups; ++group)
#pragma unroll
                for (int half = 0; half < 2; ++half) fragments[group][half][part] = u[member][part][2 * group + half];
            tokens[member].multiply_keys(d, fragments, vector / pairs, vector % pairs);
          }
#pragma unroll
        for (int e = 0; e < 2; ++e) add(vector + e, decay, d[e]);
      }
      meanwhile();
    }
  }

  /// U, as fragments.
  __device__ __forceinline__ static void split(const float (&u)[groups][4], Pair (&out)[parts][4]) {
#pragma unroll
    for (int group = 0; group < groups; ++group)
#pragma unroll
      for (int half = 0; half < halves; ++half)
        split_in<parts>(u[group][2 * half], u[group][2 * half + 1],
                        [&](int part) -> Pair& { return out[part][2 * group + half]; });
  }

 private:
  /// Two vectors of the lane's pairs, as sums of bfloat16 numbers.
  __device__ __forceinline__ void split(int step, Pair (&a)[parts][4]) const {
#pragma unroll
    for (int e = 0; e < 2; ++e)
#pragma unroll
      for (int half = 0; half < halves; ++half) {
        const auto& run = s[half][2 * step / pairs];
        const int x = 2 * (2 * step % pairs + e);
        split_in<parts>(run[x], run[x + 1], [&](int part) -> Pair& { return a[part][2 * e + half]; });
      }
  }
  __device__ __forceinline__ void add(int vector, float decay, const float (&d)[4]) {
#pragma unroll
    for (int half = 0; half < halves; ++half)
#pragma unroll
      for (int x = 0; x < 2; ++x) {
        float& element = s[half][vector / pairs][2 * (vector % pairs) + x];
        element = decay * element + d[2 * half + x];
      }
  }
  /// The products of parts that count, from the least on.
  template <class Function>
  __device__ __forceinline__ static void for_each_parts(const Function& function) {
#pragma unroll
    for (int part = parts - 1; part >= 0; --part)
#pragma unroll
      for (int key_part = Tokens::key_parts - 1; key_part >= 0; --key_part)
        if (part + key_part < 3) function(part, key_part);
  }
};

template <class State, int key_dim, bool value_last, class Input>
__global__ void __launch_bounds__(32 * chunks_max_warps(bfloat_parts_of<Input> == 1), 1)
    chunks_kernel(const __grid_constant__ FastParams p) {
  using Form = ChunkForm<State, key_dim, value_last, Input>;
  using Tile = typename Form::Tile;
  using Tokens = typename Form::Tokens;
  using Values = typename Form::Values;
  constexpr int groups = Tokens::groups, halves = Tile::halves;
  // What decides on the way of a whole warp comes from one lane, for the compiler to know that.
  const auto of_warp = [](int x) { return __shfl_sync(0xffffffffu, x, 0); };
  const int warp = of_warp(static_cast<int>(threadIdx.x / 32));
  const int lane = static_cast<int>(threadIdx.x % 32), g = lane / 4, c = lane % 4;
  // Chunks of a group, and how many there is room for.
  const int preparing = p.preparing, row_warps = p.warps - preparing;
  const int group_chunks = (preparing > 0 ? preparing : row_warps) / chunk_members;
  const int room = preparing > 0 ? 2 * group_chunks : group_chunks;
  const unsigned n = p.first_row + blockIdx.z, h = blockIdx.y;
  const int block_begin = static_cast<int>(blockIdx.x) * row_warps * Tile::warp_rows;
  const int first_value = block_begin + warp * Tile::warp_rows;
  wait_for_inputs(p);
  const int block_rows = min(row_warps * Tile::warp_rows, p.value_dim - block_begin);
  if (of_warp(has_row(p, n, h, block_begin, block_rows)) == 0) return;
  const Row row = resolve(p, n, source_slot(p, n));
  if (of_warp(row.source < 0) != 0) {
    zero_outputs(p, row.batch, row.first_token, row.first_token + row.tokens, h, block_begin, block_rows);
    return;
  }
  const int count = of_warp(static_cast<int>(row.tokens)), chunks = (count + chunk_tokens - 1) / chunk_tokens;
  const auto final_slot = static_cast<std::int32_t>(row.final_slot);
  const auto batch = static_cast<unsigned>(row.batch), first_token = static_cast<unsigned>(row.first_token);
  // Which of all prepare where there are few chunks differs from block to block: the same warps share a part of a
  // multiprocessor.
  const int turn = static_cast<int>((blockIdx.z * static_cast<unsigned>(p.heads) + h) / 64 % 2) * 2;
  const int preparing_warp = preparing > 0 ? warp - row_warps : warp ^ turn;
  // Warps with value rows come first, in groups of four of which all take part in products if one has any.
  const auto has_values = [&] { return warp < row_warps && first_value < p.value_dim; };
  const auto multiplies = [&] {
    return has_group_products ? warp < row_warps && block_begin + warp / 4 * 4 * Tile::warp_rows < p.value_dim : has_values();
  };

  extern __shared__ __align__(1024) uint4 shared[];
  char* const memory = reinterpret_cast<char*>(shared);
  const auto chunk_at = [&](int place) { return memory + place * static_cast<int>(Tokens::shared_bytes); };
  const auto values_at = [&](int warp, int place, int member) {
    return chunk_at(room) + ((warp * room + place) * chunk_members + member) * Values::bytes;
  };
  const auto values_of = [&](int first, int own) {
    return Values(p, batch, h, lane, first_token + static_cast<unsigned>(first), own);
  };
  const auto offset_in = [&](const Tensor<std::int64_t, 4>& tensor, std::int64_t slot) {
    return offset_of(tensor, slot, h, first_value) + Tile::lane_offset(lane, tensor.strides[2], tensor.strides[3]);
  };

  using Rows = ChunkRows<State, key_dim, value_last, Input>;
  Rows rows;
  {
    Tile tile;
    tile.clear();
    if (p.initial_state && has_values())
      tile.load(static_cast<const State*>(p.state_read.data) + offset_in(p.state_read, row.source), p.state_read.strides[2],
                p.state_read.strides[3]);
    tile.widen_to(rows.s);
  }

  // The chunks from `prepared` are prepared while those from `begin` are gone through, or before.
  int place = 0;  // of the first chunk that is gone through next
#pragma unroll 1
  for (int begin = preparing > 0 ? -group_chunks : 0; begin < chunks; begin += group_chunks) {
    const int prepared = preparing > 0 ? begin + group_chunks : begin;
    const int prepared_place = preparing > 0 && begin >= 0 ? group_chunks - place : 0;
    if (const int first = prepared * chunk_tokens + preparing_warp * member_tokens; preparing_warp >= 0 && first < count) {
      const int own = min(count - first, member_tokens), member = preparing_warp % chunk_members;
      const unsigned token = first_token + static_cast<unsigned>(first);
      char* const chunk = chunk_at(prepared_place + preparing_warp / chunk_members);
      Tokens tokens(chunk, member);
      tokens.fetch_all(p, batch, h, token, own, g, c);
      values_of(first, own)
          .fetch_units(
              row_warps, [&](int to) { return values_at(to, prepared_place + preparing_warp / chunk_members, member); },
              block_begin, p.value_dim);
      __pipeline_commit();
      tokens.put_all(g, c);
      tokens.template fetch_gates<false>(p, batch, h, own, g, token);
      show_to_products();
      if (member > 0) tokens.prepare_before(p, batch, h, token - member_tokens, g, c, Tokens::before_at(chunk, member));
      tokens.template prepare<false>(p, own, g, c);
      tokens.pass({Tokens::numbers_at(chunk, member), lane, true});
    }
    if (preparing == 0) {
      __pipeline_wait_prior(0);
      __syncthreads();
    }

    if (multiplies() && begin >= 0)
#pragma unroll 1
      for (int i = 0; i < group_chunks; ++i) {
        const int first = (begin + i) * chunk_tokens;
        if (first >= count) break;
        char* const chunk = chunk_at(place + i);
        Tokens tokens[chunk_members] = {Tokens(chunk, 0), Tokens(chunk, 1)};
        const SharedMatrix matrices = Tokens::matrices(shared_offset(shared) + (place + i) * Tokens::shared_bytes);
        float products[chunk_members][Tokens::blocks][4] = {};
        rows.multiply(tokens, matrices, products, [&] { tokens[0].pass({Tokens::numbers_at(chunk, 0), lane, false}); });

        const int used = first + member_tokens < count ? 2 : 1;
        const auto values_from = [&](int member) {
          const int begin = first + member * member_tokens;
          return values_of(begin, min(count - begin, member_tokens));
        };
        float decay = 1, u[chunk_members][groups][4];
        Pair fragments[chunk_members][Rows::parts][4] = {};
        const auto go_through = [&](auto number) {
          constexpr int member = decltype(number)::value;
          const Values values = values_from(member);
          Pair v[groups][halves];
          values.load(v, values_at(warp, place + i, member), 0);
          float in[groups][2][2], out[groups][4];
          apply_factors(tokens[member], products[member], v, in, out);
#pragma unroll
          for (auto& group : u[member])
#pragma unroll
            for (float& x : group) x = 0;
          tokens[member].solve(in, u[member], out);
          values.put(out, values_at(warp, place + i, member), 0);
          // Tokens that there are not have no decay and no correction.
          float factor[groups][2];
          tokens[member].factors_to(member_tokens - 1, c, factor);
#pragma unroll
          for (int group = 0; group < groups; ++group)
#pragma unroll
            for (int e = 0; e < 4; ++e) u[member][group][e] *= factor[group][e % 2];
          Rows::split(u[member], fragments[member]);
          decay *= tokens[member].decay_to(member_tokens - 1);
        };
        go_through(std::integral_constant<int, 0>{});
        if (used > 1) {
          tokens[1].pass({Tokens::numbers_at(chunk, 1), lane, false});
          Tokens::add_before(Tokens::before_at(chunk, 1), fragments[0], decay, products[1]);
          go_through(std::integral_constant<int, 1>{});
          const float later = tokens[1].decay_to(member_tokens - 1);
#pragma unroll
          for (auto& group : u[0])
#pragma unroll
            for (float& x : group) x *= later;
          Rows::split(u[0], fragments[0]);
        }
        rows.update(tokens, matrices, used, decay, fragments, [&] {
          if (has_values())
#pragma unroll
            for (int member = 0; member < chunk_members; ++member)
              if (member < used) values_from(member).store_put(values_at(warp, place + i, member), 0, first_value);
        });
      }
    if (preparing > 0 && begin >= 0) place = group_chunks - place;
    __pipeline_wait_prior(0);
    __syncthreads();
  }
  if (!has_values() || final_slot < 0) return;
  State* const to = static_cast<State*>(p.state_write.data) + offset_in(p.state_write, final_slot);
  Tile::store([&](std::int64_t step, const auto& x) { store_as<State>(to, step, x); }, p.state_write.strides[2],
              p.state_write.strides[3], rows.s);
}

}  // namespace gatedelta::cuda
