// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "backends/cuda/rows.cuh"
#include "backends/cuda/split_columns.cuh"
#include "backends/cuda/state_unit.cuh"
#include "backends/cuda/value_tile.cuh"
#include "backends/cuda/wide_columns.cuh"

// The call of a model that is serving: as many tokens in every row, at most `token_tile`, q, k, v and o in one dtype. The state
// is read once and does nothing but be multiplied, on the tensor cores. With value rows as rows of the products and tokens as
// their columns, whatever one product gives is where the next one wants it:
//
//     D = S [k q]       exact if all are bfloat16; normalisation and decays come in as factors of its columns
//     U = R W^T         R_t = beta_t (v_t - exp(G_t) n_t S k_t), and W = (I + A)^-1 of the tokens alone (see coefficients.cuh)
//     O = D_q + R (Q W)^T
//     S <- exp(G_T) S + U k^T
//
// R, U, W and Q W are sums of three bfloat16 numbers, which is all of a float32; S, k and q of as many as they take.
namespace gatedelta::cuda {

constexpr int serving_max_warps = 4;  ///< of a block

/// Units of the state that are under way ahead of their use.
template <bool value_last>
constexpr int serving_stages = value_last ? 1 : 2;

template <class Unit, int token_tile, class Input>
using ServingTokens =
    std::conditional_t<token_tile == 16, WideColumns<Input, Unit::keys, Unit::width>,
                       std::conditional_t<bfloat_parts_of<Input> == 1, TokenColumns<Unit::keys, token_tile, Unit::width>,
                                          SplitColumns<Input, Unit::keys, token_tile, Unit::width>>>;
template <class Unit, int token_tile, class Input>
using ServingValues =
    std::conditional_t<token_tile == 16, ValueVectors<Input, Unit>,
                       std::conditional_t<sizeof(Input) == 4, ValueFloats<Unit, ServingTokens<Unit, token_tile, Input>>,
                                          ValuePairs<Unit, ServingTokens<Unit, token_tile, Input>>>>;

/// A unit of the state, and what is needed of v with it.
template <class Unit, int token_tile, class Input>
constexpr int serving_stage_bytes = static_cast<int>(Unit::bytes) + ServingValues<Unit, token_tile, Input>::bytes;

/// Blocks that are to fit on a multiprocessor: as registers allow, by an estimate of what a thread needs beside fragments, and
/// shared memory, but where how much a block has depends on how many warps share it: V-last, up to 8 tokens.
template <class State, class Unit, int token_tile, bool value_last, bool common, class Input>
constexpr int serving_blocks() {
  using Tokens = ServingTokens<Unit, token_tile, Input>;
  constexpr bool wide = token_tile == 16, split = Tokens::key_parts > 1;
  constexpr int parts = bfloat_parts_of<State>;
  constexpr int memory = 227 * 1024 /
                         (serving_max_warps * serving_stages<value_last> * serving_stage_bytes<Unit, token_tile, Input> +
                          (wide || split ? static_cast<int>(Tokens::shared_bytes) + 1024 : 0));
  constexpr int fragments = wide || split ? 0 : Tokens::blocks * Unit::keys / 8;
  constexpr int others = (token_tile == 4   ? 80
                          : token_tile == 8 ? 88
                                            : 113) +
                         (Unit::pair_words == 2 || (wide && parts > 1) ? 16 : 0) +
                         (!value_last  ? 0
                          : wide       ? 24
                          : parts == 2 ? 16
                                       : 8) +
                         (common ? 0 : 8) +
                         (Tokens::key_parts > 2 ? (parts == 2 && token_tile == 8 ? 88 : 40)
                          : split               ? 24
                                                : 0);
  constexpr int registers = 65536 / (32 * serving_max_warps * (fragments + others));
  return (!value_last || wide) && memory < registers ? memory : registers;
}

/// A warp has a span of value rows of one head, which it goes through unit by unit with the next ones under way. The first warp
/// of a block works out what the tokens need for all. `common`: the gate is raw and beta are logits, both bfloat16, q and k are
/// normalised, and slots are not per token.
template <class State, int key_dim, bool value_last, int token_tile, bool common, class Input = __nv_bfloat16>
__global__ void __launch_bounds__(
    32 * serving_max_warps,
    serving_blocks<State, StateUnit<State, key_dim, value_last>, token_tile, value_last, common, Input>())
    serving_kernel(const __grid_constant__ FastParams p) {
  using Unit = StateUnit<State, key_dim, value_last>;
  using Tokens = ServingTokens<Unit, token_tile, Input>;
  using Values = ServingValues<Unit, token_tile, Input>;
  constexpr int pairs = Unit::width / 2, halves = Unit::halves, runs = Unit::runs, parts = bfloat_parts_of<State>;
  constexpr int stages = serving_stages<value_last>, stage_bytes = serving_stage_bytes<Unit, token_tile, Input>;
  const auto warp = threadIdx.x / 32;
  const int lane = static_cast<int>(threadIdx.x % 32), g = lane / 4, c = lane % 4;
  const unsigned n = p.first_row + blockIdx.z, h = blockIdx.y;
  RowSlots<common> slots;
  slots.fetch(p, n, static_cast<unsigned>(lane));  // all else waits for it
  // Warps may share the value rows of a unit. K-last each has a copy and stores the states after tokens of its own, and all the
  // same outputs. V-last, where a unit has several tiles, all of a block have one together: each copies a part and has tiles of
  // its own; as many as there are tiles where states after each token are stored.
  const auto share = [&] { return static_cast<int>(threadIdx.x / 32 & ((1u << p.share_bits) - 1)); };
  const auto is_own_tile = [&](int m) { return !value_last || (m & ((1 << p.share_bits) - 1)) == share(); };
  const auto by_all = [&](auto copy) {
    if (!value_last || p.share_bits == 0)
      copy(std::integral_constant<int, 1>{}, 0);
    else if (p.share_bits == 1)
      copy(std::integral_constant<int, 2>{}, share());
    else
      copy(std::integral_constant<int, 4>{}, share());
  };
  const auto synchronise = [&] {
    if (value_last && p.share_bits > 0)
      __syncthreads();
    else
      __syncwarp();
  };
  const int span_begin = static_cast<int>(((blockIdx.x * p.warps + warp) >> p.share_bits) * p.span);
  const int span_end = min(span_begin + static_cast<int>(p.span), p.value_dim), count = static_cast<int>(p.tokens);

  extern __shared__ uint4 shared[];
  const bool stores_each = (!common && p.store_tokens) || p.snapshots.data != nullptr;
  char* const memory = shared_address(shared, Tokens::shared_bytes + warp * p.warp_bytes);
  const auto unit_in = [&](char* where) { return Unit(where, static_cast<unsigned>(lane), p.value_dim, Evictions(p)); };
  const auto unit_at = [&](int stage) { return unit_in(memory + stage * stage_bytes); };
  Tokens tokens(shared);
  const Values values(p, n, h, lane);
  const auto values_at = [&](int stage) { return memory + stage * stage_bytes + Unit::bytes; };
  const auto fetch_values = [&](int stage, int first_value) {
    values.fetch(values_at(stage), first_value, span_end, is_own_tile);
  };
  const auto fetch_unit = [&](int stage, int first_value) {
    if (first_value < span_end) {
      const Unit unit = unit_at(stage);
      if (slots.source >= 0 && p.initial_state) {
        const State* const from = static_cast<const State*>(p.state_read.data) +
                                  offset_of(p.state_read, static_cast<unsigned>(slots.source), h) + Unit::offset(first_value);
        by_all([&](auto warps, int warp) { unit.template fetch<warps>(from, span_end - first_value, warp); });
      } else if (!value_last || share() == 0) {
        unit.clear();
      }
    }
    __pipeline_commit();
  };
  // What is asked for first comes first: units that are used after the tokens have been prepared can wait for these.
  constexpr int first_stages = token_tile == 16 ? 1 : stages;
  const auto begin = [&] {
    slots.resolve(p, n);
#pragma unroll
    for (int stage = 0; stage < first_stages; ++stage) fetch_unit(stage, span_begin + stage * Unit::rows);
  };
  // The kernel before may be writing the inputs of a dependent launch, but neither slots nor states.
  if (p.ahead) begin();
  wait_for_inputs(p);
  tokens.fetch(p, n, h, count, g, c);
  if (warp == 0) tokens.template fetch_gates<common>(p, n, h, count, g);
#pragma unroll
  for (int stage = 0; stage < stages; ++stage) fetch_values(stage, span_begin + stage * Unit::rows);
  if (p.ahead)
    __pipeline_commit();
  else
    begin();
  if (slots.source < 0) {
    __pipeline_wait_prior(0);
    values.zero(span_begin, span_end);
    return;
  }
  tokens.share(g, c);
  // One warp works for all.
  if (warp == 0) tokens.template prepare<common>(p, count, g, c);
#pragma unroll
  for (int stage = first_stages; stage < stages; ++stage) fetch_unit(stage, span_begin + stage * Unit::rows);
  if (p.warps > 1) {
    if (!value_last && p.share_bits > 0) __pipeline_wait_prior(0);  // states may go where another warp reads
    if (warp == 0) tokens.pass({shared, lane, true});
    __syncthreads();
    if (warp != 0) tokens.pass({shared, lane, false});
  }
  if (p.ahead) __pipeline_wait_prior(0);  // v has come last

  const auto state_at = [&](std::int32_t slot, int first_value) {
    return static_cast<State*>(p.state_write.data) + offset_of(p.state_write, static_cast<unsigned>(slot), h) +
           Unit::offset(first_value);
  };
  const auto load_run = [](std::uint32_t(&words)[halves][4], const Unit& from, int m, int i) {
#pragma unroll
    for (int half = 0; half < halves; ++half) from.load(words[half], m, half, i);
  };
  int stage = 0;
#pragma unroll 1
  for (int unit_begin = span_begin; unit_begin < span_end; unit_begin += Unit::rows) {
    const Unit unit = unit_at(stage);
    const int unit_rows = span_end - unit_begin;
    __pipeline_wait_prior(stages - 1);
    synchronise();
#pragma unroll 1
    for (int m = value_last ? share() : 0; m < Unit::tiles; m += value_last ? 1 << p.share_bits : 1) {
      const int first_value = unit_begin + m * Unit::tile_rows;
      // V-last, states after each token are stored by all warps together, also those whose tile is behind the last value.
      if (first_value >= span_end && !(value_last && stores_each)) break;
      // Two sums do not wait for each other. Tensor cores round toward zero: for float32 keys the products of lower parts have
      // a sum of their own, where that is nothing.
      constexpr bool apart = Tokens::key_parts > 2;
      constexpr int upper_chains = token_tile < 8 || apart ? 2 : 1, chains = upper_chains + (apart ? 1 : 0);
      float products[chains][Tokens::blocks][4] = {};
      const auto sum_of = [](int step, int part, int key_part) {
        return apart && part + key_part > 0 ? chains - 1 : step % upper_chains;
      };
      Pair columns[Tokens::blocks][Tokens::key_parts][4];
#pragma unroll
      for (int i = 0; i < runs; ++i) {
        std::uint32_t state[halves][4];
        load_run(state, unit, m, i);
        if (i * pairs % 4 == 0)
#pragma unroll
          for (int block = 0; block < Tokens::blocks; ++block)
#pragma unroll
            for (int part = 0; part < Tokens::key_parts; ++part)
              tokens.load_pairs(columns[block][part], block, i * pairs, part);
#pragma unroll
        for (int j = 0; j < pairs; j += 2) {
          const int column = (i * pairs + j) % 4;
          Pair a[parts][2][2] = {};
#pragma unroll
          for (int half = 0; half < halves; ++half)
#pragma unroll
            for (int e = 0; e < 2; ++e) Unit::split(state[half], j + e, [&](int part) -> Pair& { return a[part][e][half]; });
#pragma unroll
          for (int block = 0; block < Tokens::blocks; ++block)
#pragma unroll
            for (int part = 0; part < parts; ++part)
#pragma unroll
              for (int key_part = 0; part + key_part < 3 && key_part < Tokens::key_parts; ++key_part) {
                const auto& keys = columns[block][key_part];
                multiply_add(products[sum_of((i * pairs + j) / 2, part, key_part)][block], a[part][0][0], a[part][0][1],
                             a[part][1][0], a[part][1][1], keys[column], keys[column + 1]);
              }
        }
      }

      constexpr int groups = Tokens::groups;
      float in[groups][2][2] = {}, out[groups][4] = {}, u[groups][4] = {};
      typename Values::Raw v[groups][halves];
      values.load(v, values_at(stage), m);
      apply_factors(tokens, products, v, in, out);
      tokens.solve(in, u, out);
      if (!value_last || first_value < span_end) values.store(out, values_at(stage), m, first_value);

      // States: the last one, or that after each token.
      const int first_token = stores_each ? (value_last ? 0 : share()) : slots.final_slot >= 0 ? count - 1 : count;
#pragma unroll 1
      for (int t = first_token; t < count; t += value_last ? 1 : 1 << p.share_bits) {
        // States after each token leave the one that they all begin with as it is.
        const Unit to = !stores_each ? unit : unit_in(memory + (value_last ? stage_bytes : p.warp_bytes - Unit::bytes));
        tokens.forget();
        const float decay = tokens.decay_to(t);
        Pair fragments[groups][2][Tokens::parts] = {};
        corrections_after(tokens, t, c, u, fragments);
        // As registers allow, no load waits for a store that may, for all the compiler knows, be to the same place.
        constexpr bool loads_ahead = parts == 3;
        std::uint32_t states[2][halves][4];
        if (loads_ahead) load_run(states[0], unit, m, 0);
#pragma unroll
        for (int i = 0; i < runs; ++i) {
          auto& state = states[i % 2];
          if (!loads_ahead) load_run(state, unit, m, i);
#pragma unroll
          for (int j = 0; j < pairs; j += 2) {
            float d[2][4] = {};
            tokens.multiply_keys(d, fragments, i, j);
#pragma unroll
            for (int e = 0; e < 2; ++e)
#pragma unroll
              for (int half = 0; half < halves; ++half) {
                float x, y;
                Unit::values(state[half], j + e, x, y);
                Unit::pack(state[half], j + e, decay * x + d[e][2 * half], decay * y + d[e][2 * half + 1]);
              }
          }
          if (loads_ahead && i + 1 < runs) load_run(states[(i + 1) % 2], unit, m, i + 1);
#pragma unroll
          for (int half = 0; half < halves; ++half) to.store(state[half], m, half, i);
        }
        if (value_last && !stores_each) continue;
        synchronise();
        const auto write = [&](State* state) {
          to.template write<value_last ? Unit::tiles : 1>(state, unit_rows, value_last ? share() : 0);
        };
        if (t == count - 1 && slots.final_slot >= 0) write(state_at(slots.final_slot, unit_begin));
        if (p.snapshots.data != nullptr)
          write(static_cast<State*>(p.snapshots.data) + offset_of(p.snapshots, n, static_cast<unsigned>(t), h) +
                Unit::offset(unit_begin));
        if (!common && p.store_tokens)
          if (const std::int32_t slot = __shfl_sync(0xffffffffu, slots.token_slot, t); slot >= 0)
            write(state_at(slot, unit_begin));
        synchronise();
      }
    }
    if (value_last && !stores_each && slots.final_slot >= 0) {
      synchronise();
      by_all(
          [&](auto warps, int warp) { unit.template write<warps>(state_at(slots.final_slot, unit_begin), unit_rows, warp); });
    }
    synchronise();
    fetch_values(stage, unit_begin + stages * Unit::rows);
    fetch_unit(stage, unit_begin + stages * Unit::rows);
    stage = stage + 1 == stages ? 0 : stage + 1;
  }
}

}  // namespace gatedelta::cuda
