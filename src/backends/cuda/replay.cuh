// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "backends/cuda/coefficients.cuh"
#include "backends/cuda/record.cuh"
#include "backends/cuda/state_columns.cuh"

// The serving form (see serving.cuh) with a replay window of bfloat16 entries. With the P entries (k_j, u_j), whose decays up
// to the last one are gamma_j (gamma: that of the checkpoint S), the state that the tokens meet is
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
namespace gatedelta::cuda {

constexpr int replay_stages = 2;
constexpr int replay_max_warps = 4, replay_max_heads = replay_max_warps;
template <class State, int key_dim, bool value_last>
using ReplayRows = std::conditional_t<value_last, StateColumns<State, key_dim>, StateRows<State, key_dim>>;
template <int key_dim, int token_tile>
using ReplayTokens = TokenColumns<key_dim, token_tile, 8, 2>;

/// A lane's part of M for 16 entries, by halves of these, as sums of bfloat16 numbers.
template <int numbers>
struct alignas(numbers == 2 ? 16 : 8) Mix {
  static constexpr int parts = numbers;
  Pair pairs[parts][2];
};
/// Of 16 value rows of the corrections of a group.
constexpr int group_stage_bytes = group_entries * 16 * 2;

/// What the warps of a block know of one head, in shared memory, in part with all of its team: written by one or two of them.
/// The tokens' keys and queries are rows of a matrix; between rows there is a gap, so that 8 of them can be read at a time.
template <class Tokens, int key_dim, int token_tile>
struct HeadNotes {
  /// Two numbers have twice the bits of what M is multiplied with. For one token a third one costs nothing.
  using Mix = cuda::Mix<token_tile == 1 ? 3 : 2>;
  static constexpr int row_pitch = key_dim / 2 + 4, rows = token_tile == 1 ? 2 : 2 * token_tile;
  // Of a team: the rows, and for sequences that are folded the keys of each 16 entries.
  static constexpr int team_bytes = rows * row_pitch * 4, key_bytes = key_dim * 2, team_group_bytes = group_entries * key_bytes;
  // Of a head: numbers of the tokens, gamma, of each 16 entries M and gamma_j, and v, token by token.
  static constexpr int checkpoint_at = [] {
    if constexpr (token_tile == 1)
      return 32;
    else
      return static_cast<int>(Tokens::shared_bytes + Tokens::norms_bytes);
  }();
  static constexpr int groups_at = checkpoint_at + 16, mix_bytes = Tokens::blocks * 32 * static_cast<int>(sizeof(Mix));
  static constexpr int group_bytes = mix_bytes + group_entries * 4;
  static constexpr int value_bytes = 2 * token_tile;  ///< for each of V

  char *memory, *team;
  int lane;

  __device__ Pair* row(int row) const { return reinterpret_cast<Pair*>(team) + row * row_pitch; }
  /// Vector v of the key of an entry of a group: so that those of 8 entries lie in different banks.
  __device__ char* key_vector(int group, int entry, int v) const {
    return team + team_bytes + group * team_group_bytes + entry * key_bytes + (v ^ entry % 8) * 16;
  }
  __device__ float* numbers() const { return reinterpret_cast<float*>(memory); }
  __device__ void pass(Tokens& tokens, bool gives) const {
    tokens.pass({memory, lane, gives});
    tokens.pass_norms({memory + Tokens::shared_bytes, lane, gives});
  }
  /// gamma.
  __device__ float& checkpoint_decay() const { return *reinterpret_cast<float*>(memory + checkpoint_at); }
  __device__ char* group(int group) const { return memory + groups_at + group * group_bytes; }
  /// The lane's part of M.
  __device__ Mix& mix(int group, int block) const { return reinterpret_cast<Mix*>(this->group(group))[block * 32 + lane]; }
  /// gamma_j for j = 16 group ...
  __device__ float* decays(int group) const { return reinterpret_cast<float*>(this->group(group) + mix_bytes); }
  __device__ std::uint16_t* values(int groups) const { return reinterpret_cast<std::uint16_t*>(this->group(groups)); }
};

/// A row, as each warp of its block knows it.
struct ReplayRow {
  unsigned batch, first_token;  ///< where its tokens begin
  int count;
  std::int32_t slot;
  RecordRow record;

  template <class P>
  __device__ std::uint16_t* keys(const P& p, unsigned h) const {
    return static_cast<std::uint16_t*>(p.window.keys.data) +
           offset_of(p.window.keys, static_cast<unsigned>(slot), head_of(h, p.k_group));
  }
  template <class P>
  __device__ float* decays(const P& p, unsigned h) const {
    return static_cast<float*>(p.window.decays.data) + offset_of(p.window.decays, static_cast<unsigned>(slot), h);
  }
};

/// One warp's work for the heads of a team from h on: what the entries of the window are to its tokens. `notes_of` gives the
/// notes of a head.
template <class Rows, int token_tile, class Tokens>
class Entries {
 public:
  /// Starts the loads that all that follows waits for.
  __device__ __forceinline__ void fetch(const ReplayParams<FastParams>& p, const ReplayRow& row, unsigned h, int heads,
                                        int lane) {
    const float* decays = row.decays(p, h);
#pragma unroll
    for (int i = 0; i < replay_max_heads; ++i) {
      if (i >= heads) break;
#pragma unroll
      for (int word = 0; word < words; ++word) {
        log_decays_[i][word] = 0;
        if (32 * word + lane < row.record.length)
          log_decays_[i][word] = decays[product(row.record.places[word], static_cast<int>(p.window.decays.strides[2]))];
      }
      decays += p.window.decays.strides[1];
    }
    fetch_keys(p, row, h, 0, lane);
  }

  /// Of what they bring, what each head's notes are to say.
  template <class NotesOf>
  __device__ __forceinline__ void prepare(const ReplayParams<FastParams>& p, const ReplayRow& row, unsigned h, int heads,
                                          const Tokens& tokens, const NotesOf& notes_of) {
    const auto notes = notes_of(h);
    const int lane = notes.lane, g = lane / 4, c = lane % 4;
    const int P = row.record.length, used = (P + group_entries - 1) / group_entries;
    const bool folds = P + row.count > p.window.capacity;

#pragma unroll
    for (int i = 0; i < replay_max_heads; ++i) {
      if (i >= heads) break;
      const auto own = notes_of(h + i);
      float checkpoint_decay = 1;
#pragma unroll
      for (int word = words - 1; word >= 0; --word) {
        if (32 * word >= P) continue;
        float product = expf(log_decays_[i][word]);
#pragma unroll
        for (int distance = 1; distance < 32; distance *= 2) {
          const float behind = __shfl_down_sync(0xffffffffu, product, distance);
          if (lane + distance < 32) product *= behind;
        }
        product *= checkpoint_decay;  // of the other word
        const float next = __shfl_down_sync(0xffffffffu, product, 1);
        if (const int entry = 32 * word + lane; entry < used * group_entries)
          own.decays(entry / group_entries)[entry % group_entries] = lane < 31 ? next : checkpoint_decay;
        checkpoint_decay = shuffle(product, 0);
      }
      own.checkpoint_decay() = checkpoint_decay;
    }
    __syncwarp();

#pragma unroll 1
    for (int group = 0; group < used; ++group) {
      if (group > 0) fetch_keys(p, row, h, group, lane);
      if (folds)
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
          for (int i = 0; i < runs; ++i) {
            const uint4& x = keys_[half][i];
            const Pair pairs[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
            for (int pair = 0; pair < 4; ++pair) {
              const int place = Rows::place_of_pair(i, pair, c);
              reinterpret_cast<Pair*>(notes.key_vector(group, 8 * half + g, place / 4))[place % 4] = pairs[pair];
            }
          }
      float products[2][Tokens::blocks][4] = {};
#pragma unroll
      for (int i = 0; i < runs; ++i) {
        const uint4 &low = keys_[0][i], &high = keys_[1][i];
#pragma unroll
        for (int block = 0; block < Tokens::blocks; ++block) {
          multiply_add(products[0][block], low.x, high.x, low.y, high.y, tokens.pair(block, i, 0), tokens.pair(block, i, 1));
          multiply_add(products[1][block], low.z, high.z, low.w, high.w, tokens.pair(block, i, 2), tokens.pair(block, i, 3));
        }
      }
#pragma unroll
      for (int block = 0; block < Tokens::blocks; ++block)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          float& x = products[0][block][e];
          x += products[1][block][e];
          // All even columns are the key's, all odd ones the query's, as those of the state.
          if constexpr (token_tile == 1) x = shuffle(x, lane & ~3);
        }
#pragma unroll 1
      for (int i = 0; i < heads; ++i) {
        const auto own = notes_of(h + i);
        const float* const decays = own.decays(group);
#pragma unroll
        for (int block = 0; block < Tokens::blocks; ++block) {
          auto& mix = own.mix(group, block);
          constexpr int parts = std::remove_reference_t<decltype(mix)>::parts;
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const float decay = decays[8 * half + g];
            Pair pairs[parts];
            split_in<parts>(decay * products[0][block][2 * half], decay * products[0][block][2 * half + 1],
                            [&](int part) -> Pair& { return pairs[part]; });
#pragma unroll
            for (int part = 0; part < parts; ++part) mix.pairs[part][half] = transposed(pairs[part]);
          }
        }
      }
    }
  }

 private:
  static constexpr int runs = Tokens::runs, words = max_window / 32;

  __device__ __forceinline__ void fetch_keys(const ReplayParams<FastParams>& p, const ReplayRow& row, unsigned h, int group,
                                             int lane) {
    const int g = lane / 4, c = lane % 4;
    const std::uint16_t* const keys = row.keys(p, h) + 8 * c;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int entry = group * group_entries + 8 * half + g, place = row.record.place_of(entry, p.window.ring);
#pragma unroll
      for (int i = 0; i < runs; ++i) {
        keys_[half][i] = uint4{};
        if (entry < row.record.length)
          keys_[half][i] = *reinterpret_cast<const uint4*>(keys + place * static_cast<int>(p.window.keys.strides[2]) + 32 * i);
      }
    }
  }

  float log_decays_[replay_max_heads][words];  ///< behind the entries lane and lane + 32
  uint4 keys_[2][runs];                        ///< of a group, as rows of 16 entries, a lane's 8 at a time
};

/// And another's: what the tokens are to each other. One token of a team's heads differs in the gates alone, and lane i has
/// those of head h + i; of more tokens a head is a warp's work.
template <int token_tile, bool common, class Tokens, class NotesOf>
__device__ __forceinline__ void prepare_tokens(const ReplayParams<FastParams>& p, int count, unsigned path, unsigned h,
                                               int heads, bool leads, Tokens& tokens, const NotesOf& notes_of) {
  const auto notes = notes_of(h);
  const int lane = notes.lane, g = lane / 4, c = lane % 4;
#pragma unroll
  for (int block = 0; block < Tokens::blocks; ++block)
    if (leads && (token_tile > 1 || g < 2))
#pragma unroll
      for (int i = 0; i < Tokens::runs; ++i)
        *reinterpret_cast<uint4*>(notes.row(8 * block + g) + 4 * c + 16 * i) =
            *reinterpret_cast<const uint4*>(tokens.run(block, i));
  if constexpr (token_tile == 1) {
    tokens.template prepare<common>(p);
    if (lane < heads) tokens.store_factors(notes_of(h + static_cast<unsigned>(lane)).numbers());
  } else {
    tokens.template prepare<common, true>(p, count, g, c, path);
    notes.pass(tokens, true);
  }
}

/// The entry of token g but for its correction, at `place`; or, of one token, those of the heads of a team.
template <int token_tile, class Tokens>
__device__ __forceinline__ void store_entry(const ReplayParams<FastParams>& p, const ReplayRow& row, unsigned h, int heads,
                                            const Tokens& tokens, int place, int lane) {
  const int g = lane / 4, c = lane % 4;
  if (g < row.count && is_first(h, p.k_group)) {
    std::uint16_t* const keys = row.keys(p, h) + place * static_cast<int>(p.window.keys.strides[2]) + 8 * c;
#pragma unroll
    for (int i = 0; i < Tokens::runs; ++i)
      *reinterpret_cast<uint4*>(keys + 32 * i) = *reinterpret_cast<const uint4*>(tokens.run(0, i));
  }
  const bool has_decay = token_tile == 1 ? lane < heads : c == 0 && g < row.count;
  const unsigned own = token_tile == 1 ? h + static_cast<unsigned>(lane) : h;
  if (has_decay) row.decays(p, own)[product(place, static_cast<int>(p.window.decays.strides[2]))] = tokens.log_decay();
}

/// The state of 16 rows where the window is full: gamma S + sum_j gamma_j u_j k_j^T. `load_corrections` gives those of a group
/// of entries as a fragment. `overlaps`: there are registers for several runs of keys at a time.
template <bool overlaps, class Rows, class State, class Notes, class Load>
__device__ __forceinline__ void fold(const Rows& rows, const Notes& notes, int used, const Load& load_corrections, State* to) {
  // Three numbers are all of a float32, two are enough for a state of 16 bits.
  constexpr int parts = sizeof(State) == 4 ? 3 : 2, runs = Rows::keys / Rows::run_keys;
  const int lane = notes.lane, c = lane % 4;
  const float checkpoint_decay = notes.checkpoint_decay();
  Pair a[parts][4];
  const auto scale_corrections = [&](int group) {
    std::uint32_t words[4];
    load_corrections(words, group);
#pragma unroll
    for (int word = 0; word < 4; ++word) {
      float low, high;
      widen(words[word], low, high, __nv_bfloat16{});
      const float2 decay = *reinterpret_cast<const float2*>(notes.decays(group) + word / 2 * 8 + 2 * c);
      low *= decay.x, high *= decay.y;
      split_in<parts>(low, high, [&](int part) -> Pair& { return a[part][word]; });
    }
  };
  const auto add_group = [&](float(&sums)[Rows::pairs][4], int run, int group) {
#pragma unroll
    for (int pair = 0; pair < Rows::pairs; pair += 2) {
      Pair keys[4];
      load_transposed(keys, notes.key_vector(group, lane % 16, run * Rows::pairs + pair + lane / 16));
#pragma unroll
      for (int e = 0; e < 2; ++e)
#pragma unroll
        for (int part = parts - 1; part >= 0; --part)
          multiply_add(sums[pair + e], a[part][0], a[part][1], a[part][2], a[part][3], keys[2 * e], keys[2 * e + 1]);
    }
  };
  // Once for all keys, if there is one group.
  if constexpr (overlaps) {
    if (used == 1) {
      scale_corrections(0);
#pragma unroll
      for (int run = 0; run < runs; ++run, to += Rows::run_step) {  // without a branch
        float sums[Rows::pairs][4] = {};
        add_group(sums, run, 0);
        rows.store_sum(to, run, checkpoint_decay, sums);
      }
      return;
    }
  } else if (used == 1) {
    scale_corrections(0);
  }
#pragma unroll 1
  for (int run = 0; run < runs; ++run, to += Rows::run_step) {
    float sums[Rows::pairs][4] = {};
#pragma unroll 1
    for (int group = 0; group < used; ++group) {
      if (overlaps || used > 1) scale_corrections(group);
      add_group(sums, run, group);
    }
    rows.store_sum(to, run, checkpoint_decay, sums);
  }
}

template <class Rows, int token_tile, bool common>
constexpr int replay_blocks() {
  constexpr int blocks = ReplayTokens<Rows::keys, token_tile>::blocks;
  constexpr int registers = blocks * Rows::keys / 8 +
                            (token_tile == 1   ? 96
                             : token_tile == 4 ? 96
                                               : 120) +
                            (Rows::narrow_state ? Rows::parts > 1 ? 16 : 0 : 32) + (common ? 0 : 8);
  return 65536 / (32 * replay_max_warps * registers);
}

template <class State, int key_dim, bool value_last, int token_tile, bool common>
__global__ void __launch_bounds__(32 * replay_max_warps,
                                  replay_blocks<ReplayRows<State, key_dim, value_last>, token_tile, common>())
    replay_kernel(const __grid_constant__ ReplayParams<FastParams> p) {
  using Rows = ReplayRows<State, key_dim, value_last>;
  using Tokens = ReplayTokens<key_dim, token_tile>;
  using Notes = HeadNotes<Tokens, key_dim, token_tile>;
  using Mix = typename Notes::Mix;
  constexpr int blocks = Tokens::blocks, parts = Rows::parts, stages = replay_stages;
  constexpr bool streams = token_tile == 1;  // more tokens have been slower with it
  constexpr bool overlaps = token_tile == 1 && common && (parts == 1 || !Rows::narrow_state);
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
  ReplayRow row{n, 0, static_cast<int>(p.tokens), -1, {}};
  const WindowParams& window = p.window;
  const int groups = (window.capacity + group_entries - 1) / group_entries;
  wait_for_inputs(p);
  bool good = true;
  if (!common && token_tile > 1 && p.cu_seqlens.data != nullptr) {
    bool has = false;
    for (unsigned h = first_head; h < end_head; ++h)
      has = has_row(p, n, h, block_begin, min(block_rows, p.value_dim - block_begin));
    if (!has) return;
    row.batch = 0, row.first_token = static_cast<unsigned>(index_at(p.cu_seqlens, n));
    row.count = static_cast<int>(index_at(p.cu_seqlens, n + 1)) - static_cast<int>(row.first_token);
    good = has_room(p, n, row.count, threadIdx.x == 0);
  }
  const int count = min(row.count, token_tile);  // of a row that is good, all

  extern __shared__ __align__(256) uint4 shared[];
  const int stage_bytes = Rows::bytes + groups * group_stage_bytes;
  const auto memory_of = [&](int warp) {
    return shared_offset(shared) + static_cast<std::uint32_t>(warp * stages * stage_bytes + warp * Rows::gap_bytes);
  };
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

  // One of the last warps has the tokens of a head, or of a team, and one of the first ones the entries of a team.
  const int team = static_cast<int>(p.team.count), heads = static_cast<int>(end_head - first_head);
  const int token_heads = token_tile == 1 ? team : 1;  // of one warp
  const int with_tokens = (warp - max(warps - static_cast<int>(p.token_warps), 0)) * token_heads, with_entries = warp * team;
  const bool has_tokens = with_tokens >= 0 && with_tokens < heads, has_entries = with_entries < heads;
  const unsigned tokens_head = first_head + static_cast<unsigned>(with_tokens);
  const unsigned entries_head = first_head + static_cast<unsigned>(with_entries);
  const int own_tokens = min(token_heads, heads - with_tokens), own_entries = min(team, heads - with_entries);

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
  const bool tree = token_tile > 1 && p.parent.data != nullptr;
  int parent = -1;
  if (tree && lane < count) parent = parent_at(p, row.batch, row.first_token + static_cast<unsigned>(lane));
  slots.resolve(p, n);
  row.slot = slots.source;
  const auto slot = static_cast<unsigned>(row.slot);

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
  good = good && row.slot >= 0;
  unsigned path = (2u << g % token_tile) - 1;
  if (good && tree)
    path = __shfl_sync(0xffffffffu, path_in_tree<token_tile>(p, n, parent, lane, blockIdx.x == 0 && warp == 0, good),
                       g % token_tile);
  if (good) {
    row.record.load(p, row.slot, lane);
    next.state = static_cast<const State*>(p.state_write.data) + offset_of(p.state_write, slot, first_head) +
                 (span_begin + (copied_warp - warp) * Rows::rows) * Rows::row_step +
                 Rows::lane_offset(copied_lane, p.value_dim);
    if (next.h < end_head) Rows(copied, copied_lane, p.value_dim).template fetch<streams>(next.state);
    if (has_tokens)
      prepare_tokens<token_tile, common>(p, count, path, tokens_head, own_tokens,
                                         is_first(static_cast<unsigned>(with_tokens), p.team), tokens, notes_of);
    good = row.record.is_in_range(p, n, lane, warp == 0);
  }
  const int P = good ? row.record.length : 0, used = (P + group_entries - 1) / group_entries;
  auto* const corrections = static_cast<std::uint16_t*>(window.corrections.data) + offset_of(window.corrections, slot);
  const auto correction_stride = static_cast<int>(window.corrections.strides[2]);
  const auto corrections_at = [&](int stage, int group) {
    return at_shared(memory + stage * stage_bytes + Rows::bytes + group * group_stage_bytes);
  };
  // Beyond the first group, which is all that there is in short windows: not worth the registers.
  const auto place_of = [&](int entry) {
    return static_cast<const std::int32_t*>(window.order.data)[offset_of(window.order, slot, entry)];
  };
  const std::uint16_t* const first_corrections =
      corrections + row.record.place_of(lane / 2, window.ring) * correction_stride + lane % 2 * 8;
  const auto fetch_corrections = [&](int stage, const Position& at) {
    const std::int64_t along = product(at.h, window.corrections.strides[1]) + at.first_value;
    if (lane / 2 < P)
      __pipeline_memcpy_async(reinterpret_cast<uint4*>(corrections_at(stage, 0)) + lane, first_corrections + along, 16);
#pragma unroll 1
    for (int group = 1; group < used; ++group)
      if (const int entry = group * group_entries + lane / 2; entry < P)
        __pipeline_memcpy_async(reinterpret_cast<uint4*>(corrections_at(stage, group)) + lane,
                                corrections + along + place_of(entry) * correction_stride + lane % 2 * 8, 16);
  };
  Entries<Rows, token_tile, Tokens> entries;
  if (good) {
    // Ahead of most states, behind which this would have to wait.
    if (has_entries) {
      entries.fetch(p, row, entries_head, own_entries, lane);
      if (!has_tokens) tokens.fetch(p, row.batch, entries_head, count, g, c, row.first_token);
    }
    // Corrections of entries that there are not are zero, and stay so.
    if (used * group_entries > P && lane / 2 >= P % group_entries)
      for (int stage = 0; stage < stages; ++stage) reinterpret_cast<uint4*>(corrections_at(stage, used - 1))[lane] = uint4{};
    static_assert(stages == 2);
    if (next.h < end_head) {
      fetch_corrections(0, next);
      advance(next);
    }
    __pipeline_commit();
    if (next.h < end_head) fetch_corrections(1, next);
    good = row.record.is_permutation(p, n, lane, warp == 0);
    if (good && has_tokens && blockIdx.x == 0)
      store_entry<token_tile>(p, row, tokens_head, own_tokens, tokens,
                              row.record.place_of(P + (token_tile == 1 ? 0 : g), window.ring), lane);
    if (next.h < end_head) {
      Rows(copied + stage_bytes, copied_lane, p.value_dim).template fetch<streams>(next.state);
      advance(next);
    }
    __pipeline_commit();
  }
  const int new_place = row.record.place_of(P + (token_tile == 1 ? 0 : g), window.ring);
  if (good && has_entries) {
    if (has_tokens && tokens_head != entries_head) tokens.fetch(p, row.batch, entries_head, count, g, c, row.first_token);
    entries.prepare(p, row, entries_head, own_entries, tokens, notes_of);
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

  const bool folds = P + count > window.capacity;
  const int o_token = Tokens::query_of(g);
  const bool has_o = token_tile == 1 || (o_token >= 0 && o_token < count);
  int stage = 0, left_of_team = 0;
  Pair columns[blocks][Rows::steps][2];
#pragma unroll 1
  for (unsigned h = first_head; h < end_head; ++h) {
    std::uint16_t* o = static_cast<std::uint16_t*>(p.o.data);
    if (has_o) o += offset_of(p.o, row.batch, row.first_token + static_cast<unsigned>(o_token), h);
    std::uint16_t* new_corrections = corrections + product(h, window.corrections.strides[1]) + new_place * correction_stride;
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
    const float checkpoint_decay = notes.checkpoint_decay();
    Mix mixes[blocks] = {};
    if (used > 0)
#pragma unroll
      for (int block = 0; block < blocks; ++block) mixes[block] = notes.mix(0, block);
    float value_factor = 0, key_factor = 0, query_factor = 0;
    std::uint16_t* result = nullptr;
    if constexpr (token_tile == 1) {
      // All lanes have S k and S q of the rows g and g + 8; they store the outputs of these and their corrections.
      const float* const factors = notes.numbers();
      const float factor = c < 2 ? factors[3] : factors[4];
      value_factor = factor * factors[0], key_factor = factor * factors[1], query_factor = c < 2 ? factors[2] : 0.0f;
      result = (c < 2 ? o : new_corrections) + g + c % 2 * 8;
    } else {
      notes.pass(tokens, false);
      o += 2 * c;
      new_corrections += 2 * c;
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
          products[0][block][e] *= checkpoint_decay;
        }
      const auto load_corrections = [&](std::uint32_t(&words)[4], int group) {
        load_transposed(words, corrections_at(stage, group) + ((lane / 16 * 8 + lane % 8) * 2 + lane / 8 % 2) * 16);
      };
      const auto add_entries = [&](float(&d)[4], const std::uint32_t(&a)[4], const Mix& mix) {
#pragma unroll
        for (int part = Mix::parts - 1; part >= 0; --part)
          multiply_add(d, a[0], a[1], a[2], a[3], mix.pairs[part][0], mix.pairs[part][1]);
      };
      if (used > 0) {
        std::uint32_t a[4];
        load_corrections(a, 0);
#pragma unroll
        for (int block = 0; block < blocks; ++block) add_entries(products[0][block], a, mixes[block]);
      }
#pragma unroll 1
      for (int group = 1; group < used; ++group) {
        std::uint32_t a[4];
        load_corrections(a, group);
#pragma unroll
        for (int block = 0; block < blocks; ++block) add_entries(products[0][block], a, notes.mix(group, block));
      }

      if constexpr (token_tile == 1) {
        const auto result_of = [&](int half) {
          const float v = __uint_as_float(std::uint32_t{values[first_value + 8 * half]} << 16);
          return value_factor * v + key_factor * products[0][0][2 * half] + query_factor * products[0][0][2 * half + 1];
        };
        const float first = result_of(0), second = result_of(1);
        result[first_value] = __bfloat16_as_ushort(__float2bfloat16_rn(c % 2 == 0 ? first : second));
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
          const Pair entry =
              transposed(narrow(tokens.key_norm[0] * u[0][2 * half], tokens.key_norm[1] * u[0][2 * half + 1], __nv_bfloat16{}));
          if (g < count) *reinterpret_cast<Pair*>(new_corrections + first_value + 8 * half) = entry;
        }
      }

      const Rows copy(copied + stage * stage_bytes, copied_lane, p.value_dim);
      if (folds) {
        State* const to = static_cast<State*>(p.state_write.data) + offset_of(p.state_write, slot, h);
        fold<overlaps>(rows, notes, used, load_corrections,
                       to + (first_value * Rows::row_step + Rows::vector_offset(lane, p.value_dim)));
        if constexpr (value_last) {
          synchronise();
          copy.write(to + (first_value + (copied_warp - warp) * Rows::rows + Rows::lane_offset(copied_lane, p.value_dim)));
        }
      }
      synchronise();
      if (next.h < end_head) {
        copy.template fetch<streams>(next.state);
        fetch_corrections(stage, next);
        advance(next);
      }
      __pipeline_commit();
      stage = stage + 1 == stages ? 0 : stage + 1;
    }
  }
}

}  // namespace gatedelta::cuda
