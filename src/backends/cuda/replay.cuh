// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "backends/cuda/coefficients.cuh"
#include "backends/cuda/replay_entries.cuh"

// The serving form (see serving.cuh) with a replay window of bfloat16 entries, or of float32 ones as sums of three bfloat16
// numbers. With the P entries (k_j, u_j), whose decays up to the last one are gamma_j (gamma: that of the checkpoint S), the
// state that the tokens meet is
//
//     gamma S + sum_j gamma_j u_j k_j^T      and so      D = gamma S [k q] + U M      with M_j = gamma_j k_j [k q]
//
// in place of S [k q]. The state is stored only where the window is full: that sum, which is one product more for each key.
//
// A block has some heads of one row, and what a row has to look up before it can begin, one load after the other, is looked up
// once for all of them. States stream through the rings of the warps from head to head. While the first ones are on their way,
// what does not depend on the value row is worked out: by some warps what the tokens are to each other, and by others, if there
// are enough, M as a sum of bfloat16 numbers. Of heads with the same key and query, a team, most of that is the same.
// How soon the streams can go on depends on the warp with the entries: so it asks for these as soon as it knows where they are,
// and all warps leave most of the states until then.
//
// More than 8 tokens are passes of 8, launches one after the other: to each of these the tokens before are entries. Drafts in a
// tree are as well: then gamma and gamma_j are a token's own, along its path up to where it leaves the earlier passes, and
// those of entries beside that path are zero.
namespace gatedelta::cuda {

/// The state of 16 rows where the window is full: gamma S + sum_j gamma_j u_j k_j^T. `corrections_of` gives those of a group
/// of entries. `overlaps`: there are registers for several runs of keys at a time. `one_group`: there is no other.
template <bool overlaps, bool one_group, class Rows, class State, class Notes, class CorrectionsOf>
__device__ __forceinline__ void fold(const Rows& rows, const Notes& notes, int used, const CorrectionsOf& corrections_of,
                                     State* to) {
  // Three numbers are all of a float32, two are enough for a state of 16 bits.
  constexpr int parts = sizeof(State) == 4 ? 3 : 2, key_parts = parts < Notes::key_parts ? parts : Notes::key_parts;
  constexpr int runs = Rows::keys / Rows::run_keys;
  const int lane = notes.lane, c = lane % 4;
  const float checkpoint_decay = notes.checkpoint_decay();
  Pair a[parts][4];
  const auto scale_corrections = [&](int group) {
    float u[4][2];
    corrections_of(group).load(u);
#pragma unroll
    for (int word = 0; word < 4; ++word) {
      const float2 decay = *reinterpret_cast<const float2*>(notes.decays(group) + word / 2 * 8 + 2 * c);
      split_in<parts>(decay.x * u[word][0], decay.y * u[word][1], [&](int part) -> Pair& { return a[part][word]; });
    }
  };
  const auto add_group = [&](float(&sums)[Rows::pairs][4], int run, int group) {
#pragma unroll
    for (int pair = 0; pair < Rows::pairs; pair += 2)
#pragma unroll
      for (int key_part = key_parts - 1; key_part >= 0; --key_part) {
        Pair keys[4];
        load_transposed(keys, notes.key_vector(group, key_part, lane % 16, run * Rows::pairs + pair + lane / 16));
#pragma unroll
        for (int e = 0; e < 2; ++e)
#pragma unroll
          for (int part = parts - 1 - key_part; part >= 0; --part)
            multiply_add(sums[pair + e], a[part][0], a[part][1], a[part][2], a[part][3], keys[2 * e], keys[2 * e + 1]);
      }
  };
  // Once for all keys, if there is one group.
  if (one_group || used == 1) scale_corrections(0);
  static_assert(one_group || !overlaps);
#pragma unroll overlaps ? runs : 1
  for (int run = 0; run < runs; ++run, to += Rows::run_step) {
    const auto old = rows.run(run);  // ahead of the products, not behind them
    float sums[Rows::pairs][4] = {};
    if constexpr (one_group) {
      add_group(sums, run, 0);
    } else {
#pragma unroll 1
      for (int group = 0; group < used; ++group) {
        if (used > 1) scale_corrections(group);
        add_group(sums, run, group);
      }
    }
    rows.store_sum(to, old, checkpoint_decay, sums);
  }
}

template <class Rows, class Entry, int token_tile, bool common>
constexpr int replay_blocks() {
  constexpr int blocks = ReplayTokens<Entry, Rows::keys, token_tile>::blocks;
  constexpr int registers = blocks * Rows::keys / 8 +
                            (token_tile == 1   ? 96
                             : token_tile == 4 ? 96
                                               : 120) +
                            (Rows::narrow_state ? Rows::parts > 1 ? 16 : 0 : 32) + (common ? 0 : 8) +
                            (sizeof(Entry) == 2 ? 0 : 40);
  return 65536 / (32 * replay_max_warps * registers);
}

/// `common`: as for the serving kernel, and rows of one length, of at most 8 tokens. `one_group`: see ReplayRow.
template <class State, class Entry, int key_dim, bool value_last, int token_tile, bool common, bool one_group>
__global__ void __launch_bounds__(32 * replay_max_warps,
                                  replay_blocks<ReplayRows<State, key_dim, value_last>, Entry, token_tile, common>())
    replay_kernel(const __grid_constant__ ReplayParams<FastParams> p) {
  using Rows = ReplayRows<State, key_dim, value_last>;
  using Tokens = ReplayTokens<Entry, key_dim, token_tile>;
  using Notes = HeadNotes<Tokens, Entry, key_dim, token_tile>;
  using Corrections = cuda::Corrections<Entry>;
  using Mix = typename Notes::Mix;
  constexpr int blocks = Tokens::blocks, parts = Rows::parts, stages = replay_stages;
  constexpr Eviction eviction = token_tile == 1 ? Eviction::first : Eviction::normal;  // of states; measured
  constexpr bool passes = token_tile == 8 && !common;
  constexpr bool overlaps = token_tile == 1 && one_group && (parts == 1 || !Rows::narrow_state);
  const int warp = static_cast<int>(threadIdx.x / 32), warps = p.warps;
  const int lane = static_cast<int>(threadIdx.x % 32), g = lane / 4, c = lane % 4;
  const unsigned n = p.first_row + blockIdx.z, first_head = blockIdx.y * p.block_heads;
  RowSlots<true> slots;
  // All else waits for it. Behind the last row of cu_seqlens there is one of the tokens of no sequence.
  slots.fetch(p, !common && token_tile > 1 ? min(n, static_cast<unsigned>(p.rows) - 1) : n, static_cast<unsigned>(lane));
  const unsigned end_head = min(first_head + p.block_heads, static_cast<unsigned>(p.heads));
  const int block_rows = warps * static_cast<int>(p.span), block_begin = static_cast<int>(blockIdx.x) * block_rows;
  // K-last a warp has its value rows together. V-last those of all warps of a block lie side by side, unit by unit.
  const int unit_step = value_last ? warps * Rows::rows : Rows::rows;
  const int span_begin = block_begin + warp * (value_last ? Rows::rows : static_cast<int>(p.span));
  const int span_end = min(value_last ? block_begin + block_rows : span_begin + static_cast<int>(p.span), p.value_dim);
  ReplayRow<one_group> row{n, 0, static_cast<int>(p.tokens), -1, {}};
  const auto& window = p.window;
  const int groups = one_group ? 1 : groups_of(window.capacity);
  bool good = true;
  const auto passed = static_cast<int>(p.passed_tokens);
  if (!common && token_tile > 1 && p.cu_seqlens.data != nullptr) {
    bool has = false;
    wait_for_inputs(p);  // outputs of no sequence are written here
    if (passes && passed > 0 && (n == p.rows || index_at(p.cu_seqlens, n + 1) - index_at(p.cu_seqlens, n) <= passed)) return;
    for (unsigned h = first_head; h < end_head; ++h)
      has = has_row(p, n, h, block_begin, min(block_rows, p.value_dim - block_begin));
    if (!has) return;
    row.batch = 0, row.first_token = static_cast<unsigned>(index_at(p.cu_seqlens, n));
    row.count = static_cast<int>(index_at(p.cu_seqlens, n + 1)) - static_cast<int>(row.first_token);
    good = has_room(p, n, row.count, threadIdx.x == 0);
  }
  if (passes) row.first_token += p.passed_tokens, row.count -= passed;
  const int count = min(row.count, token_tile);  // of a row that is good, all but those of later passes

  extern __shared__ __align__(256) uint4 shared[];
  const int stage_bytes = Rows::bytes + groups * Corrections::bytes;
  const int warp_bytes = stages * stage_bytes + Rows::gap_bytes + (one_group ? 0 : groups * Corrections::offset_bytes);
  const auto memory_of = [&](int warp) { return shared_offset(shared) + static_cast<std::uint32_t>(warp * warp_bytes); };
  const std::uint32_t memory = memory_of(warp);
  int copied_warp = warp, copied_lane = lane;
  Rows::share_copies(static_cast<int>(threadIdx.x), warps, copied_warp, copied_lane);
  const std::uint32_t copied = memory_of(copied_warp);
  const auto synchronise = [] {
    if constexpr (value_last)
      __syncthreads();
    else
      __syncwarp();
  };
  const std::uint32_t notes_memory = memory_of(warps);
  const std::uint32_t teams_memory = notes_memory + p.block_heads * p.head_bytes;
  const auto notes_of = [&](unsigned h) -> Notes {
    const unsigned own = h - first_head;
    return {at_shared(notes_memory + own * p.head_bytes), at_shared(teams_memory + head_of(own, p.team) * p.team_bytes), lane};
  };

  // One of the last warps has the tokens of a head, or of a team, and one of the first ones the entries of a team, or if there
  // are many, some of them, each a part.
  const int team = static_cast<int>(p.team.count), heads = static_cast<int>(end_head - first_head);
  const int token_heads = token_tile == 1 ? team : 1;  // of one warp
  const int with_tokens = (warp - max(warps - static_cast<int>(p.token_warps), 0)) * token_heads;
  const int first_group = one_group ? 0 : static_cast<int>(head_of(static_cast<unsigned>(warp), p.teams));
  const int with_entries = (warp - first_group * static_cast<int>(p.teams.count)) * team;
  const bool has_tokens = with_tokens >= 0 && with_tokens < heads;
  bool has_entries = with_entries < heads && (one_group || first_group < static_cast<int>(p.entry_warps));
  const unsigned tokens_head = first_head + static_cast<unsigned>(with_tokens);
  const unsigned entries_head = first_head + static_cast<unsigned>(with_entries);
  const int own_tokens = min(token_heads, heads - with_tokens), own_entries = min(team, heads - with_entries);

  // What is fetched next, of all heads. The first states do not wait for the record, corrections do.
  struct Position {
    unsigned h;
    int first_value;
    const State* state;
  };
  const auto advance = [&](Position& at) {
    at.first_value += unit_step;
    at.state += unit_step * Rows::row_step;
    if (at.first_value < span_end) return;
    at.state += p.state_write.strides[1] - (at.first_value - span_begin) * Rows::row_step;
    at.first_value = span_begin;
    ++at.h;
  };
  Position next{span_begin < span_end ? first_head : end_head, span_begin, nullptr};
  const auto begin = [&] {
    slots.resolve(p, n);
    row.slot = slots.source;
    if (row.slot < 0) return;
    row.record.load(p, row.slot, lane);
    next.state =
        static_cast<const State*>(p.state_write.data) + offset_of(p.state_write, static_cast<unsigned>(row.slot), first_head) +
        (span_begin + (copied_warp - warp) * Rows::rows) * Rows::row_step + Rows::lane_offset(copied_lane, p.value_dim);
    if (next.h < end_head) Rows(copied, copied_lane, p.value_dim).fetch(next.state, eviction);
  };
  // The kernel before may be writing the inputs of a dependent launch, but neither slots nor states, nor anything of the
  // window.
  if (p.ahead) begin();
  __pipeline_commit();
  wait_for_inputs(p);

  Tokens tokens(nullptr);
  if (has_tokens) {
    tokens.fetch(p, row.batch, tokens_head, count, g, c, row.first_token);
    const unsigned own = token_tile == 1 ? min(tokens_head + static_cast<unsigned>(lane), end_head - 1) : tokens_head;
    tokens.template fetch_gates<common>(p, row.batch, own, count, g, row.first_token);
    const int vectors = p.value_dim / 8;
#pragma unroll 1
    for (unsigned h = tokens_head; h < tokens_head + static_cast<unsigned>(own_tokens); ++h) {
      const auto* const v =
          static_cast<const std::uint16_t*>(p.v.data) + offset_of(p.v, row.batch, row.first_token, head_of(h, p.v_group));
      auto* const to = reinterpret_cast<uint4*>(notes_of(h).values(groups));
      int t = 0, vector = lane;  // of this token
#pragma unroll 1
      for (int i = lane;; i += 32) {
#pragma unroll 1
        for (; vector >= vectors; vector -= vectors) ++t;
        if (t >= count) break;
        __pipeline_memcpy_async(to + i, v + product(t, p.v.strides[1]) + 8 * vector, 16);
        vector += 32;
      }
    }
  }
  __pipeline_commit();
  if (!p.ahead) begin();
  const auto slot = static_cast<unsigned>(row.slot);
  good = good && row.slot >= 0;
  const bool tree = token_tile > 1 && p.parent.data != nullptr;
  int parent = -1;
  if (tree && lane < count) parent = parent_at(p, row.batch, row.first_token + static_cast<unsigned>(lane));
  if (passes && tree) parent = max(parent, -1) - passed;  // negative, too, where that came in a pass before
  unsigned path = (2u << g % token_tile) - 1;
  if (good && tree) {
    const bool records = blockIdx.x == 0 && warp == 0;
    if constexpr (passes) {
      // In each pass of all, so that none takes a row that another one leaves.
      for (int token = lane; token < passed + row.count; token += 32)
        good = is_parent(p, n, row.parent_of(p, token), token, records) && good;
    } else {
      good = is_parent(p, n, parent, lane, records);
    }
    good = __all_sync(0xffffffffu, good);
    path = __shfl_sync(0xffffffffu, path_in_tree<token_tile>(parent, lane), g % token_tile);
  }
  if (good) {
    if (has_tokens)
      prepare_tokens<token_tile, common>(p, count, path, tokens_head, own_tokens,
                                         is_first(static_cast<unsigned>(with_tokens), p.team), tokens, notes_of);
    good = row.record.is_in_range(p, n, lane, warp == 0);
    if (passes && good && passed > 0) row.record.append(passed, row.count, p.window);
  }
  const int P = good ? row.record.length : 0, used = one_group ? static_cast<int>(P > 0) : groups_of(P);
  auto* const corrections = static_cast<Entry*>(window.corrections.data) + offset_of(window.corrections, slot);
  const int correction_stride = window.corrections.strides[2];
  const auto corrections_at = [&](int stage, int group) {
    return Corrections(at_shared(memory + stage * stage_bytes + Rows::bytes + group * Corrections::bytes), lane);
  };
  // Where those entries lie that a lane copies beyond the first group, in shared memory: there are no registers for it.
  const auto offset_at = [&](int group, int copy) -> int& {
    return reinterpret_cast<int*>(
        at_shared(memory + stages * stage_bytes + group * Corrections::offset_bytes))[copy * 32 + lane];
  };
#pragma unroll 1
  for (int group = 1; !one_group && group < used; ++group)
#pragma unroll
    for (int copy = 0; copy < Corrections::copies; ++copy)
      offset_at(group, copy) =
          row.record.place_of(group * group_entries + Corrections::entry_of(lane, copy), window.ring) * correction_stride +
          Corrections::value_of(lane);
  const Entry* first_corrections[Corrections::copies];
#pragma unroll
  for (int copy = 0; copy < Corrections::copies; ++copy)
    first_corrections[copy] = corrections +
                              row.record.place_of(Corrections::entry_of(lane, copy), window.ring) * correction_stride +
                              Corrections::value_of(lane);
  const auto fetch_corrections = [&](int stage, const Position& at) {
    const std::int64_t along = product(at.h, window.corrections.strides[1]) + at.first_value;
#pragma unroll
    for (int copy = 0; copy < Corrections::copies; ++copy)
      if (Corrections::entry_of(lane, copy) < P) corrections_at(stage, 0).fetch(first_corrections[copy] + along, copy);
#pragma unroll 1
    for (int group = 1; !one_group && group < used; ++group)
#pragma unroll
      for (int copy = 0; copy < Corrections::copies; ++copy)
        if (group * group_entries + Corrections::entry_of(lane, copy) < P)
          corrections_at(stage, group).fetch(corrections + along + offset_at(group, copy), copy);
  };
  Entries<Rows, Entry, token_tile, Tokens, one_group, passes> entries;
  has_entries = has_entries && (first_group == 0 || first_group < used);
  if (good) {
    // Ahead of most states, behind which this would have to wait.
    if (has_entries) {
      entries.fetch(p, row, entries_head, own_entries, first_group, lane);
      if (!has_tokens) tokens.fetch(p, row.batch, entries_head, count, g, c, row.first_token);
    }
    // Corrections of entries that there are not are zero, and stay so.
#pragma unroll
    for (int copy = 0; copy < Corrections::copies; ++copy)
      if (used * group_entries > P && Corrections::entry_of(lane, copy) >= P % group_entries)
        for (int stage = 0; stage < stages; ++stage) corrections_at(stage, used - 1).clear(copy);
    static_assert(stages == 2);
    if (next.h < end_head) {
      fetch_corrections(0, next);
      advance(next);
    }
    __pipeline_commit();
    if (next.h < end_head) fetch_corrections(1, next);
    good = row.record.is_permutation(p, n, lane, warp == 0);
    if (good && has_tokens && blockIdx.x == 0)
      store_entry<Entry, token_tile>(p, row, tokens_head, own_tokens, tokens,
                                     row.record.place_of(P + (token_tile == 1 ? 0 : g), window.ring), lane);
    if (next.h < end_head) {
      Rows(copied + stage_bytes, copied_lane, p.value_dim).fetch(next.state, eviction);
      advance(next);
    }
    __pipeline_commit();
  }
  // A lane has of new corrections those that lie together: of two value rows of a token in 16 bits, of two tokens in 32.
  constexpr int new_entries = token_tile == 1 || sizeof(Entry) == 2 ? 1 : 2;
  const auto new_token = [&](int e) { return token_tile == 1 ? 0 : sizeof(Entry) == 2 ? g : 2 * c + e; };
  int new_places[new_entries];
#pragma unroll
  for (int e = 0; e < new_entries; ++e) new_places[e] = row.record.place_of(P + new_token(e), window.ring);
  if (good && has_entries) {
    if (has_tokens && tokens_head != entries_head) tokens.fetch(p, row.batch, entries_head, count, g, c, row.first_token);
    entries.prepare(p, row, entries_head, own_entries, first_group, tokens, notes_of);
  }
  if (!good) {
    // Its first states are under way, which nothing has waited for.
    __pipeline_wait_prior(0);
    for (unsigned h = first_head; h < end_head; ++h)
      zero_outputs(p, row.batch, row.first_token, row.first_token + row.count, h, block_begin,
                   min(block_rows, p.value_dim - block_begin));
    return;
  }
  __pipeline_wait_prior(stages);  // v
  __syncthreads();

  const bool folds = P + row.count > window.capacity;
  const int o_token = Tokens::query_of(g);
  const bool has_o = token_tile == 1 || (o_token >= 0 && o_token < count);
  int stage = 0, left_of_team = 0;
  Pair columns[blocks][Rows::steps][2];
#pragma unroll 1
  for (unsigned h = first_head; h < end_head; ++h) {
    std::uint16_t* o = static_cast<std::uint16_t*>(p.o.data);
    if (has_o) o += offset_of(p.o, row.batch, row.first_token + static_cast<unsigned>(o_token), h);
    Entry* new_corrections[new_entries];
#pragma unroll
    for (int e = 0; e < new_entries; ++e)
      new_corrections[e] = corrections + product(h, window.corrections.strides[1]) + new_places[e] * correction_stride +
                           (token_tile == 1      ? g + c % 2 * 8
                            : sizeof(Entry) == 2 ? 2 * c
                                                 : g);
    const Notes notes = notes_of(h);
    if (left_of_team == 0) {
      left_of_team = team;
#pragma unroll
      for (int block = 0; block < blocks; ++block)
#pragma unroll
        for (int m = 0; m < Rows::steps; ++m)
#pragma unroll
          for (int j = 0; j < 2; ++j)
            columns[block][m][j] = notes.row(token_tile == 1 ? g % 2 : 8 * block + g)[Rows::key_of(m, j, c) / 2];
    }
    --left_of_team;
    const float2 checkpoint_decays = notes.checkpoint_decays(passes && tree && passed > 0, groups, p.value_dim);
    Mix mixes[blocks] = {};
    if (used > 0)
#pragma unroll
      for (int block = 0; block < blocks; ++block) mixes[block] = notes.mix(0, block);
    float value_factor = 0, key_factor = 0, query_factor = 0;
    if constexpr (token_tile == 1) {
      // All lanes have S k and S q of the rows g and g + 8; they store the outputs of these and their corrections.
      const float* const factors = notes.numbers();
      const float factor = c < 2 ? factors[3] : factors[4];
      value_factor = factor * factors[0], key_factor = factor * factors[1], query_factor = c < 2 ? factors[2] : 0.0f;
      o += g + c % 2 * 8;
      if (sizeof(Entry) == 2 && c >= 2)
        o = reinterpret_cast<std::uint16_t*>(new_corrections[0]);  // which it stores in place of o
    } else {
      notes.pass(tokens, false);
      o += 2 * c;
    }
    const std::uint16_t* const values = notes.values(groups) + (token_tile == 1 ? g : g * p.value_dim + 2 * c);

#pragma unroll 1
    for (int first_value = span_begin; first_value < span_end; first_value += unit_step) {
      const Rows rows(memory + stage * stage_bytes, lane, p.value_dim);
      __pipeline_wait_prior(stages - 1);
      synchronise();
      constexpr int chains = token_tile < 8 ? 2 : 1;
      float products[chains][blocks][4] = {};
#pragma unroll
      for (int m = 0; m < Rows::steps; ++m) {
        Pair a[parts][4];
        rows.load(a, m);
#pragma unroll
        for (int block = 0; block < blocks; ++block)
#pragma unroll
          for (int part = parts - 1; part >= 0; --part)
            multiply_add(products[m % chains][block], a[part][0], a[part][1], a[part][2], a[part][3], columns[block][m][0],
                         columns[block][m][1]);
      }
#pragma unroll
      for (int block = 0; block < blocks; ++block)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          if constexpr (chains == 2) products[0][block][e] += products[1][block][e];
          products[0][block][e] *= e % 2 == 0 ? checkpoint_decays.x : checkpoint_decays.y;
        }
      const auto add_entries = [&](float(&d)[4], const Pair(&a)[Corrections::parts][4], const Mix& mix) {
#pragma unroll
        for (int number = Mix::parts - 1; number >= 0; --number)
#pragma unroll
          for (int part = Corrections::parts - 1; part >= 0; --part)
            if (number + part < Mix::parts)
              multiply_add(d, a[part][0], a[part][1], a[part][2], a[part][3], mix.pairs[number][0], mix.pairs[number][1]);
      };
      if (used > 0) {
        Pair a[Corrections::parts][4];
        corrections_at(stage, 0).load(a);
#pragma unroll
        for (int block = 0; block < blocks; ++block) add_entries(products[0][block], a, mixes[block]);
      }
#pragma unroll 1
      for (int group = 1; !one_group && group < used; ++group) {
        Pair a[Corrections::parts][4];
        corrections_at(stage, group).load(a);
#pragma unroll
        for (int block = 0; block < blocks; ++block) add_entries(products[0][block], a, notes.mix(group, block));
      }

      if constexpr (token_tile == 1) {
        const auto result_of = [&](int half) {
          const float v = __uint_as_float(std::uint32_t{values[first_value + 8 * half]} << 16);
          return value_factor * v + key_factor * products[0][0][2 * half] + query_factor * products[0][0][2 * half + 1];
        };
        const float first = result_of(0), second = result_of(1);
        const float result = c % 2 == 0 ? first : second;
        if (sizeof(Entry) == 2 || c < 2)
          o[first_value] = __bfloat16_as_ushort(__float2bfloat16_rn(result));
        else
          new_corrections[0][first_value] = result;
      } else {
        float in[1][2][2] = {}, out[1][4] = {}, u[1][4] = {};
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          Pair word = 0;
          if (g < count) word = *reinterpret_cast<const Pair*>(values + first_value + 8 * half);
          float v[2];
          widen(transposed(word), v[0], v[1], __nv_bfloat16{});
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            in[0][half][e] = tokens.key_factor[0][e] * products[0][0][2 * half + e] + tokens.value_factor[0][e] * v[e];
            out[0][2 * half + e] = tokens.query_factor[0][e] * products[0][blocks - 1][2 * half + e];
          }
        }
        tokens.solve(in, u, out);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const Pair pair = transposed(narrow(out[0][2 * half], out[0][2 * half + 1], __nv_bfloat16{}));
          if (has_o) *reinterpret_cast<Pair*>(o + first_value + 8 * half) = pair;
          const float entry[2] = {tokens.key_norm[0] * u[0][2 * half], tokens.key_norm[1] * u[0][2 * half + 1]};
          if constexpr (sizeof(Entry) == 2) {
            const Pair words = transposed(narrow(entry[0], entry[1], __nv_bfloat16{}));
            if (g < count) *reinterpret_cast<Pair*>(new_corrections[0] + first_value + 8 * half) = words;
          } else {
#pragma unroll
            for (int e = 0; e < 2; ++e)
              if (new_token(e) < count) new_corrections[e][first_value + 8 * half] = entry[e];
          }
        }
      }

      const Rows copy(copied + stage * stage_bytes, copied_lane, p.value_dim);
      if (folds) {
        State* const to = static_cast<State*>(p.state_write.data) + offset_of(p.state_write, slot, h);
        fold<overlaps, one_group>(
            rows, notes, used, [&](int group) { return corrections_at(stage, group); },
            to + (first_value * Rows::row_step + Rows::vector_offset(lane, p.value_dim)));
        if constexpr (value_last) {
          synchronise();
          copy.write(to + (first_value + (copied_warp - warp) * Rows::rows + Rows::lane_offset(copied_lane, p.value_dim)));
        }
      }
      synchronise();
      if (next.h < end_head) {
        copy.fetch(next.state, eviction);
        fetch_corrections(stage, next);
        advance(next);
      }
      __pipeline_commit();
      stage = stage + 1 == stages ? 0 : stage + 1;
    }
  }
}

}  // namespace gatedelta::cuda
