// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "backends/cuda/coefficients.cuh"
#include "backends/cuda/record.cuh"
#include "backends/cuda/state_columns.cuh"

// What a block with a replay window (see replay.cuh) knows before it meets the states: of the tokens, and of the entries.
namespace gatedelta::cuda {

constexpr int replay_stages = 2;
constexpr int replay_max_warps = 4, replay_max_heads = replay_max_warps;
template <class State, int key_dim, bool value_last>
using ReplayRows = std::conditional_t<value_last, StateColumns<State, key_dim>, StateRows<State, key_dim>>;
/// The tokens' numbers among each other, in twice the bits of a bfloat16 entry, or all of a float32.
template <class Entry, int key_dim, int token_tile>
using ReplayTokens = TokenColumns<key_dim, token_tile, 8, sizeof(Entry) == 4 ? 3 : 2>;

/// A lane's part of M for 16 entries, by halves of these, as sums of bfloat16 numbers.
template <int numbers>
struct alignas(numbers == 2 ? 16 : 8) Mix {
  static constexpr int parts = numbers;
  Pair pairs[parts][2];
};

/// Of 16 value rows the corrections of a group of entries, in shared memory at `memory`: 16 bytes of an entry are a vector.
template <class Entry>
class Corrections {
 public:
  static constexpr int parts = bfloat_parts_of<Entry>, vectors = 16 / lanes_of<Entry>;
  /// What a lane copies: vectors of so many entries.
  static constexpr int copies = vectors / 2;
  // Elements that are read together lie in different banks: of float32 those of 8 values and of every other entry.
  static constexpr int pitch = vectors * 16 + (sizeof(Entry) == 4 ? 16 : 0), bytes = group_entries * pitch;
  static constexpr int offset_bytes = copies * 32 * 4;  ///< of a warp: where the entries of a group lie that its lanes copy

  __device__ static int entry_of(int lane, int copy) { return lane / vectors + copy * (32 / vectors); }
  __device__ static int value_of(int lane) { return lane % vectors * lanes_of<Entry>; }

  __device__ Corrections(char* memory, int lane) : memory_(memory), lane_(lane) {}
  __device__ void fetch(const Entry* from, int copy) const { __pipeline_memcpy_async(vector(copy), from, 16); }
  __device__ void clear(int copy) const { *vector(copy) = uint4{}; }

  /// The lane's part of the matrix of values and entries, as numbers: of word w the value g + 8 (w % 2) and the entries 2 c and
  /// 2 c + 1 of half w / 2.
  __device__ __forceinline__ void load(float (&x)[4][2]) const {
    if constexpr (parts == 1) {
      Pair words[1][4];
      load(words);
#pragma unroll
      for (int word = 0; word < 4; ++word) widen(words[0][word], x[word][0], x[word][1], Entry{});
    } else {
#pragma unroll
      for (int word = 0; word < 4; ++word)
#pragma unroll
        for (int e = 0; e < 2; ++e)
          x[word][e] = *reinterpret_cast<const float*>(memory_ + (word / 2 * 8 + lane_ % 4 * 2 + e) * pitch +
                                                       (lane_ / 4 + word % 2 * 8) * 4);
    }
  }
  /// The same as a fragment, in parts that add up to it.
  __device__ __forceinline__ void load(Pair (&a)[parts][4]) const {
    if constexpr (parts == 1) {
      load_transposed(a[0], memory_ + ((lane_ / 16 * 8 + lane_ % 8) * 2 + lane_ / 8 % 2) * 16);
    } else {
      float x[4][2];
      load(x);
#pragma unroll
      for (int word = 0; word < 4; ++word)
        split_in<parts>(x[word][0], x[word][1], [&](int part) -> Pair& { return a[part][word]; });
    }
  }

 private:
  __device__ uint4* vector(int copy) const {
    return reinterpret_cast<uint4*>(memory_ + entry_of(lane_, copy) * pitch + lane_ % vectors * 16);
  }

  char* const memory_;
  const int lane_;
};

/// What the warps of a block know of one head, in shared memory, in part with all of its team: written by one or two of them.
/// The tokens' keys and queries are rows of a matrix; between rows there is a gap, so that 8 of them can be read at a time.
template <class Tokens, class Entry, int key_dim, int token_tile>
struct HeadNotes {
  /// Two numbers have twice the bits of a bfloat16 entry, three all of a float32. For one token a third one costs nothing.
  using Mix = cuda::Mix<token_tile == 1 || sizeof(Entry) == 4 ? 3 : 2>;
  static constexpr int row_pitch = key_dim / 2 + 4, rows = token_tile == 1 ? 2 : 2 * token_tile;
  // Of a team: the rows, and for sequences that are folded the keys of each 16 entries.
  static constexpr int key_parts = bfloat_parts_of<Entry>, key_bytes = key_dim * 2;
  static constexpr int team_bytes = rows * row_pitch * 4, team_group_bytes = key_parts * group_entries * key_bytes;
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
  // Of a tree in passes, behind these: the decays of each entry, and of the checkpoint, up to where each token of the pass
  // begins.
  static constexpr int path_bytes = token_tile * 4, path_group_bytes = group_entries * path_bytes;

  char *memory, *team;
  int lane;

  __device__ Pair* row(int row) const { return reinterpret_cast<Pair*>(team) + row * row_pitch; }
  /// Vector v of a part of the key of an entry of a group: so that those of 8 entries lie in different banks.
  __device__ char* key_vector(int group, int part, int entry, int v) const {
    return team + team_bytes + group * team_group_bytes + (part * group_entries + entry) * key_bytes + (v ^ entry % 8) * 16;
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
  /// Those of an entry, zero where a token does not see it; behind the last one of these groups, the checkpoint's.
  __device__ float* path_decays(int entry, int groups, int value_dim) const {
    return reinterpret_cast<float*>(this->group(groups) + value_dim * value_bytes) + entry * token_tile;
  }
  /// The checkpoint's for the lane's columns.
  __device__ float2 checkpoint_decays(bool by_path, int groups, int value_dim) const {
    if (by_path) return *reinterpret_cast<const float2*>(path_decays(groups * group_entries, groups, value_dim) + lane % 4 * 2);
    const float decay = checkpoint_decay();
    return {decay, decay};
  }
};

/// A row, as each warp of its block knows it. `one_group`: its window has no more entries than one group, and its record no
/// more places than a warp has lanes.
template <bool one_group>
struct ReplayRow {
  unsigned batch, first_token;  ///< where its tokens begin
  int count;
  std::int32_t slot;
  RecordRow<one_group ? 1 : window_words> record;

  /// In a tree, of a draft of this pass, or of one before it.
  template <class P>
  __device__ int parent_of(const P& p, int draft) const {
    return parent_at(p, batch, first_token - p.passed_tokens + static_cast<unsigned>(draft));
  }
  template <class Entry, class P>
  __device__ Entry* keys(const P& p, unsigned h) const {
    return static_cast<Entry*>(p.window.keys.data) +
           offset_of(p.window.keys, static_cast<unsigned>(slot), head_of(h, p.k_group));
  }
  template <class P>
  __device__ float* decays(const P& p, unsigned h) const {
    return static_cast<float*>(p.window.decays.data) + offset_of(p.window.decays, static_cast<unsigned>(slot), h);
  }
};

/// One warp's work for the heads of a team from h on: what the entries of the window are to its tokens. `notes_of` gives the
/// notes of a head.
template <class Rows, class Entry, int token_tile, class Tokens, bool one_group, bool passes>
class Entries {
  using Row = ReplayRow<one_group>;

 public:
  /// Starts the loads that all that follows waits for.
  __device__ __forceinline__ void fetch(const ReplayParams<FastParams>& p, const Row& row, unsigned h, int heads,
                                        int first_group, int lane) {
    const float* decays = row.decays(p, h);
#pragma unroll
    for (int i = 0; i < replay_max_heads; ++i) {
      if (i >= heads) break;
#pragma unroll
      for (int word = 0; word < words; ++word) {
        log_decays_[i][word] = 0;
        if (32 * word + lane < row.record.length)
          log_decays_[i][word] = decays[product(row.record.places[word], p.window.decays.strides[2])];
      }
      decays += p.window.decays.strides[1];
    }
    fetch_keys(p, row, h, first_group, lane);
  }

  /// Of what they bring, what each head's notes are to say: of this group of entries and every `p.entry_warps`-th behind it.
  template <class NotesOf>
  __device__ __forceinline__ void prepare(const ReplayParams<FastParams>& p, const Row& row, unsigned h, int heads,
                                          int first_group, const Tokens& tokens, const NotesOf& notes_of) {
    const auto notes = notes_of(h);
    const int lane = notes.lane, g = lane / 4, c = lane % 4;
    const int P = row.record.length, used = one_group ? static_cast<int>(P > 0) : groups_of(P);
    const int group_step = one_group ? 1 : static_cast<int>(p.entry_warps);
    const bool folds = P + row.count > p.window.capacity;
    // The entries behind these are drafts of the passes before, and not in a row: what they decay is worked out for each path.
    const bool by_path = passes && p.parent.data != nullptr && p.passed_tokens > 0;
    const int in_row = by_path ? P - static_cast<int>(p.passed_tokens) : P;

#pragma unroll
    for (int i = 0; i < replay_max_heads; ++i) {
      if (i >= heads) break;
      const auto own = notes_of(h + i);
      float checkpoint_decay = 1;
#pragma unroll
      for (int word = words - 1; word >= 0; --word) {
        if (32 * word >= P) continue;
        const int entry = 32 * word + lane, group = entry / group_entries;
        const float own_decay = expf(log_decays_[i][word]);
        float product = passes && entry >= in_row ? 1.0f : own_decay;
#pragma unroll
        for (int distance = 1; distance < (one_group ? group_entries : 32); distance *= 2) {
          const float behind = __shfl_down_sync(0xffffffffu, product, distance);
          if (lane + distance < 32) product *= behind;
        }
        product *= checkpoint_decay;  // of the other word
        const float next = __shfl_down_sync(0xffffffffu, product, 1);
        if (group < used && (group & (group_step - 1)) == first_group)
          own.decays(group)[entry % group_entries] = passes && entry >= in_row ? own_decay
                                                     : lane < 31               ? next
                                                                               : checkpoint_decay;
        checkpoint_decay = shuffle(product, 0);
      }
      if (first_group == 0) own.checkpoint_decay() = checkpoint_decay;
    }
    __syncwarp();
    if constexpr (passes)
      if (by_path) {
        follow_paths(p, row, h, heads, in_row, notes_of, lane);
        __syncwarp();
      }

#pragma unroll 1
    for (int group = first_group; group < used; group += group_step) {
      if (!one_group && group > first_group) fetch_keys(p, row, h, group, lane);
      const auto store_key = [&](int half, int i, const Pair(&pairs)[parts][4]) {
#pragma unroll
        for (int part = 0; part < parts; ++part)
#pragma unroll
          for (int pair = 0; pair < 4; ++pair) {
            const int place = Rows::place_of_pair(i, pair, c);
            reinterpret_cast<Pair*>(notes.key_vector(group, part, 8 * half + g, place / 4))[place % 4] = pairs[part][pair];
          }
      };
      // As it is, or, where that makes new words, beside the products: there are no registers for those of the whole key.
      if constexpr (parts == 1)
        if (folds)
#pragma unroll
          for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int i = 0; i < runs; ++i) {
              Pair pairs[parts][4];
              split_key(half, i, pairs);
              store_key(half, i, pairs);
            }
      float products[2][Tokens::blocks][4] = {};
#pragma unroll
      for (int i = 0; i < runs; ++i) {
        Pair pairs[2][parts][4];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          split_key(half, i, pairs[half]);
          if constexpr (parts > 1)
            if (folds) store_key(half, i, pairs[half]);
        }
#pragma unroll
        for (int block = 0; block < Tokens::blocks; ++block)
#pragma unroll
          for (int part = parts - 1; part >= 0; --part)
#pragma unroll
            for (int j = 0; j < 2; ++j)
              multiply_add(products[j][block], pairs[0][part][2 * j], pairs[1][part][2 * j], pairs[0][part][2 * j + 1],
                           pairs[1][part][2 * j + 1], tokens.pair(block, i, 2 * j), tokens.pair(block, i, 2 * j + 1));
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
        const auto decays_of = [&](int entry) -> float2 {
          if (passes && by_path)
            return *reinterpret_cast<const float2*>(
                own.path_decays(group * group_entries + entry, groups_of(p.window.capacity), p.value_dim) + 2 * c);
          const float decay = own.decays(group)[entry];
          return {decay, decay};
        };
#pragma unroll
        for (int block = 0; block < Tokens::blocks; ++block) {
          auto& mix = own.mix(group, block);
          constexpr int numbers = std::remove_reference_t<decltype(mix)>::parts;
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const float2 decays = decays_of(8 * half + g);
            Pair pairs[numbers];
            split_in<numbers>(decays.x * products[0][block][2 * half], decays.y * products[0][block][2 * half + 1],
                              [&](int part) -> Pair& { return pairs[part]; });
#pragma unroll
            for (int part = 0; part < numbers; ++part) mix.pairs[part][half] = transposed(pairs[part]);
          }
        }
      }
    }
  }

 private:
  // Entries, 32 at a time. Of one group one is enough, but with it the kernel for one token would spill registers.
  static constexpr int words = one_group && token_tile > 1 ? 1 : max_window / 32;
  static constexpr int runs = Tokens::runs;
  static constexpr int parts = bfloat_parts_of<Entry>, vectors = 8 / lanes_of<Entry>;

  __device__ __forceinline__ void fetch_keys(const ReplayParams<FastParams>& p, const Row& row, unsigned h, int group,
                                             int lane) {
    const int g = lane / 4, c = lane % 4;
    const Entry* const keys = row.template keys<Entry>(p, h) + 8 * c;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int entry = group * group_entries + 8 * half + g, place = row.record.place_of(entry, p.window.ring);
#pragma unroll
      for (int i = 0; i < runs; ++i)
#pragma unroll
        for (int v = 0; v < vectors; ++v) {
          keys_[half][i][v] = uint4{};
          if (entry < row.record.length)
            keys_[half][i][v] =
                *reinterpret_cast<const uint4*>(keys + place * p.window.keys.strides[2] + 32 * i + v * lanes_of<Entry>);
        }
    }
  }
  /// Of a tree, one lane for each head of a team and token of this pass: the decays from each entry, and from the checkpoint,
  /// up to the draft of the passes before that the token's path comes from. The first `in_row` entries are in every path.
  template <class NotesOf>
  __device__ __forceinline__ static void follow_paths(const ReplayParams<FastParams>& p, const Row& row, unsigned h, int heads,
                                                      int in_row, const NotesOf& notes_of, int lane) {
    const int head = lane / token_tile, token = lane % token_tile, groups = groups_of(p.window.capacity);
    static_assert(token_tile * replay_max_heads <= 32);
    if (head >= heads) return;
    const auto own = notes_of(h + static_cast<unsigned>(head));
    const auto passed = static_cast<int>(p.passed_tokens);
    const auto decay_of = [&](int entry) { return own.decays(entry / group_entries)[entry % group_entries]; };
    const auto path_decay = [&](int entry) -> float& { return own.path_decays(entry, groups, p.value_dim)[token]; };
    for (int entry = in_row; entry < groups_of(row.record.length) * group_entries; ++entry) path_decay(entry) = 0;
    int draft = token < row.count ? passed + token : -1;
    while (draft >= passed) draft = row.parent_of(p, draft);
    float decay = 1;
    for (; draft >= 0; draft = row.parent_of(p, draft)) {
      path_decay(in_row + draft) = decay;
      decay *= decay_of(in_row + draft);
    }
    for (int entry = 0; entry < in_row; ++entry) path_decay(entry) = decay * decay_of(entry);
    path_decay(groups * group_entries) = decay * own.checkpoint_decay();
  }
  /// The lane's pairs of a run of an entry's key, in parts that add up to them.
  __device__ __forceinline__ void split_key(int half, int i, Pair (&out)[parts][4]) const {
    if constexpr (parts == 1) {
      const uint4& x = keys_[half][i][0];
      out[0][0] = x.x, out[0][1] = x.y, out[0][2] = x.z, out[0][3] = x.w;
    } else {
#pragma unroll
      for (int v = 0; v < vectors; ++v) {
        const uint4& x = keys_[half][i][v];
        split_in<parts>(__uint_as_float(x.x), __uint_as_float(x.y), [&](int part) -> Pair& { return out[part][2 * v]; });
        split_in<parts>(__uint_as_float(x.z), __uint_as_float(x.w), [&](int part) -> Pair& { return out[part][2 * v + 1]; });
      }
    }
  }

  float log_decays_[replay_max_heads][words];  ///< behind the entries lane and lane + 32
  uint4 keys_[2][runs][vectors];               ///< of a group, as rows of 16 entries, a lane's 8 at a time
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
template <class Entry, int token_tile, class Row, class Tokens>
__device__ __forceinline__ void store_entry(const ReplayParams<FastParams>& p, const Row& row, unsigned h, int heads,
                                            const Tokens& tokens, int place, int lane) {
  const int g = lane / 4, c = lane % 4;
  if (g < row.count && is_first(h, p.k_group)) {
    Entry* const keys = row.template keys<Entry>(p, h) + place * p.window.keys.strides[2] + 8 * c;
#pragma unroll
    for (int i = 0; i < Tokens::runs; ++i) {
      if constexpr (sizeof(Entry) == 2) {
        *reinterpret_cast<uint4*>(keys + 32 * i) = *reinterpret_cast<const uint4*>(tokens.run(0, i));
      } else {
        float x[8];
        unpack<__nv_bfloat16>(tokens.run(0, i), x);
#pragma unroll
        for (int v = 0; v < 8; v += 4)
          *reinterpret_cast<float4*>(keys + 32 * i + v) = make_float4(x[v], x[v + 1], x[v + 2], x[v + 3]);
      }
    }
  }
  const bool has_decay = token_tile == 1 ? lane < heads : c == 0 && g < row.count;
  const unsigned own = token_tile == 1 ? h + static_cast<unsigned>(lane) : h;
  if (has_decay) row.decays(p, own)[product(place, p.window.decays.strides[2])] = tokens.log_decay();
}

}  // namespace gatedelta::cuda
