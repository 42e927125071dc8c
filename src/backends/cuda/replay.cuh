// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "backends/cuda/coefficients.cuh"
#include "backends/cuda/record.cuh"
#include "backends/cuda/state_unit.cuh"

// The serving form (see serving.cuh) with a replay window of bfloat16 entries. With the P entries (k_j, u_j), whose decays up
// to the last one are gamma_j (gamma: that of the checkpoint S), the state that the tokens meet is
//
//     gamma S + sum_j gamma_j u_j k_j^T      and so      D = gamma S [k q] + U M      with M_j = gamma_j k_j [k q]
//
// in place of S [k q]. Keys of entries are rows of products like value rows, so M comes out of the same fragments; one warp of
// a block makes it, as a sum of three bfloat16 numbers. The state is stored only where the window is full: that sum, which is
// one product more for each key.
namespace gatedelta::cuda {

constexpr int group_entries = 16;  ///< entries that a product takes at a time
constexpr int replay_stages = 2;
constexpr int replay_max_warps = 4;
/// Of a unit's corrections, for each group.
constexpr int group_stage_bytes = group_entries * 16 * 2;

template <class Tokens>
constexpr int group_mix_bytes = Tokens::blocks * 3 * 2 * 32 * 4;
template <class Unit>
constexpr int replay_stage_bytes = static_cast<int>(Unit::bytes) + Unit::halves * 32 * 4;

template <class Unit, int token_tile, bool common>
constexpr int replay_blocks() {
  constexpr int memory =
      227 * 1024 / (replay_max_warps * replay_stages * (replay_stage_bytes<Unit> + group_stage_bytes) + 4096);
  constexpr int fragments = TokenColumns<Unit::keys, token_tile, Unit::width>::blocks * Unit::keys / 8;
  constexpr int others = (token_tile <= 4 ? 84 : 104) + (Unit::pair_words == 2 ? 16 : 0) + (common ? 0 : 16);
  constexpr int registers = 65536 / (32 * replay_max_warps * (fragments + others));
  return memory < registers ? memory : registers;
}

template <class State, int key_dim, int token_tile, bool common>
__global__ void __launch_bounds__(32 * replay_max_warps, replay_blocks<StateUnit<State, key_dim, false>, token_tile, common>())
    replay_kernel(const __grid_constant__ ReplayParams<FastParams> p) {
  using Unit = StateUnit<State, key_dim, false>;
  using Tokens = TokenColumns<key_dim, token_tile, Unit::width>;
  constexpr int pairs = Unit::width / 2, halves = Unit::halves, runs = Unit::runs, parts = state_parts_of<State>;
  constexpr int stages = replay_stages;
  const auto warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int lane = static_cast<int>(threadIdx.x % 32), g = lane / 4, c = lane % 4;
  const unsigned n = p.first_row + blockIdx.z, h = blockIdx.y;
  const int span_begin = static_cast<int>((blockIdx.x * warps + warp) * p.span);
  const int span_end = min(span_begin + static_cast<int>(p.span), p.value_dim), count = static_cast<int>(p.tokens);
  const WindowParams& window = p.window;
  const int groups = (window.capacity + group_entries - 1) / group_entries;
  cudaTriggerProgrammaticLaunchCompletion();
  if (p.dependent) cudaGridDependencySynchronize();

  extern __shared__ uint4 shared[];
  const int stage_bytes = replay_stage_bytes<Unit> + groups * group_stage_bytes;
  const unsigned mixes_at = Tokens::shared_bytes + Tokens::norms_bytes, mix_bytes = groups * group_mix_bytes<Tokens>;
  char* const memory = shared_address(shared, mixes_at + mix_bytes + warp * (stages * stage_bytes));
  const auto unit_at = [&](int stage) { return Unit(memory + stage * stage_bytes, static_cast<unsigned>(lane), p.value_dim); };
  const auto state_at = [&](std::int32_t slot, int first_value) {
    return static_cast<State*>(p.state_write.data) + offset_of(p.state_write, static_cast<unsigned>(slot), h) +
           Unit::offset(first_value);
  };
  const auto store_output = [&](int t, int value, Pair pair) {
    auto* const to = static_cast<std::uint16_t*>(p.o.data) + offset_of(p.o, n, static_cast<unsigned>(t), h) + value + 2 * c;
    *reinterpret_cast<std::uint32_t*>(to) = pair;
  };

  RowSlots<true> slots;
  slots.fetch(p, n, static_cast<unsigned>(lane));
  Tokens tokens;
  tokens.fetch(p, n, h, count, g, c);
  if (warp == 0) tokens.template fetch_gates<common>(p, n, h, count, g);
  slots.resolve(p, n);
  const std::int32_t slot = slots.source;
  const auto fetch_state = [&](int stage, int first_value) {
    if (first_value < span_end) unit_at(stage).fetch(state_at(slot, first_value), span_end - first_value);
  };
  RecordRow known;
  bool good = slot >= 0;
  if (good) {
#pragma unroll
    for (int stage = 0; stage < stages; ++stage) fetch_state(stage, span_begin + stage * Unit::rows);
    good = known.fetch(p, slot, n, lane);
  }
  if (!good) {
    __pipeline_commit();
    __pipeline_wait_prior(0);
    for (int value = span_begin; value < span_end; value += 8)
      if (g < count) store_output(g, value, 0);
    return;
  }

  const int P = known.length, used = (P + group_entries - 1) / group_entries;
  const auto place_of = [&](int entry) {
    return static_cast<unsigned>(
        static_cast<const std::int32_t*>(window.order.data)[offset_of(window.order, static_cast<unsigned>(slot), entry)]);
  };
  auto* const keys = static_cast<std::uint16_t*>(window.keys.data) +
                     offset_of(window.keys, static_cast<unsigned>(slot), head_of(h, p.k_group));
  auto* const corrections =
      static_cast<std::uint16_t*>(window.corrections.data) + offset_of(window.corrections, static_cast<unsigned>(slot), h);
  const auto key_stride = static_cast<int>(window.keys.strides[2]),
             correction_stride = static_cast<int>(window.corrections.strides[2]);
  const auto v_word = [&](int stage, int half) {
    return reinterpret_cast<Pair*>(memory + stage * stage_bytes + Unit::bytes) + half * 32 + lane;
  };
  const auto corrections_at = [&](int stage, int group) {
    return memory + stage * stage_bytes + replay_stage_bytes<Unit> + group * group_stage_bytes;
  };
  const int v_token = Tokens::value_of(g);
  const bool has_v = v_token >= 0 && v_token < count;
  // The lane's part of the first group's corrections, which are all that there are in short windows.
  const std::uint16_t* const first_corrections =
      lane / 2 < P ? corrections + place_of(lane / 2) * correction_stride + lane % 2 * 8 : nullptr;
  const auto fetch_values = [&](int stage, int first_value) {
    if (first_value < span_end) {
      if (has_v) {
        const auto* const v = static_cast<const std::uint16_t*>(p.v.data) +
                              offset_of(p.v, n, static_cast<unsigned>(v_token), head_of(h, p.v_group)) + first_value + 2 * c;
#pragma unroll
        for (int half = 0; half < halves; ++half) __pipeline_memcpy_async(v_word(stage, half), v + 8 * half, sizeof(Pair));
      }
#pragma unroll 1
      for (int group = 0; group < used; ++group) {
        const int entry = group * group_entries + lane / 2;
        auto* const to = reinterpret_cast<uint4*>(corrections_at(stage, group)) + lane;
        const std::uint16_t* from = first_corrections;
        if (group > 0) from = entry < P ? corrections + place_of(entry) * correction_stride + lane % 2 * 8 : nullptr;
        if (from != nullptr)
          __pipeline_memcpy_async(to, from + first_value, 16);
        else
          *to = uint4{};
      }
    }
    __pipeline_commit();
  };
#pragma unroll
  for (int stage = 0; stage < stages; ++stage) fetch_values(stage, span_begin + stage * Unit::rows);

  // A lane has the decays behind the entries lane and lane + 32.
  float gamma[2], checkpoint_decay = 1;
#pragma unroll
  for (int word = 1; word >= 0; --word) {
    const int entry = 32 * word + lane;
    float product = 1;
    gamma[word] = 1;
    if (32 * word >= P) continue;
    if (entry < P)
      product = expf(static_cast<const float*>(
          window.decays.data)[offset_of(window.decays, static_cast<unsigned>(slot), h, place_of(entry))]);
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const float behind = __shfl_down_sync(0xffffffffu, product, distance);
      if (lane + distance < 32) product *= behind;
    }
    product *= checkpoint_decay;  // of the other word
    const float next = __shfl_down_sync(0xffffffffu, product, 1);
    gamma[word] = lane < 31 ? next : checkpoint_decay;
    checkpoint_decay = shuffle(product, 0);
  }
  const auto gamma_of = [&](int group, int entry) {
    return shuffle(group < 2 ? gamma[0] : gamma[1], group % 2 * group_entries + entry);
  };
  // Keys of an entry as a lane has those of a value row; zeros where there is none.
  const auto keys_of = [&](int entry) -> const std::uint16_t* {
    return entry < P ? keys + place_of(entry) * key_stride + Unit::width * c : nullptr;
  };
  const auto load_keys = [&](Pair(&words)[pairs], const std::uint16_t* from, int i) {
#pragma unroll
    for (Pair& word : words) word = 0;
    if (from == nullptr) return;
    if constexpr (pairs == 4) {
      const uint4 vector = *reinterpret_cast<const uint4*>(from + 4 * Unit::width * i);
      words[0] = vector.x, words[1] = vector.y, words[2] = vector.z, words[3] = vector.w;
    } else {
      const uint2 vector = *reinterpret_cast<const uint2*>(from + 4 * Unit::width * i);
      words[0] = vector.x, words[1] = vector.y;
    }
  };
  auto* const mixes = reinterpret_cast<Pair*>(reinterpret_cast<char*>(shared) + mixes_at) + lane;
  const auto mix = [&](int group, int block, int part, int half) -> Pair& {
    return mixes[(((group * Tokens::blocks + block) * 3 + part) * 2 + half) * 32];
  };
  if (warp == warps - 1) {
#pragma unroll 1
    for (int group = 0; group < used; ++group) {
      float products[Tokens::blocks][4] = {};
      const std::uint16_t* const from[2] = {keys_of(group * group_entries + g), keys_of(group * group_entries + 8 + g)};
#pragma unroll
      for (int i = 0; i < runs; ++i) {
        Pair rows[2][pairs];
#pragma unroll
        for (int half = 0; half < 2; ++half) load_keys(rows[half], from[half], i);
#pragma unroll
        for (int j = 0; j < pairs; j += 2)
#pragma unroll
          for (int block = 0; block < Tokens::blocks; ++block)
            multiply_add(products[block], rows[0][j], rows[1][j], rows[0][j + 1], rows[1][j + 1], tokens.pair(block, i, j),
                         tokens.pair(block, i, j + 1));
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float decay = gamma_of(group, 8 * half + g);
#pragma unroll
        for (int block = 0; block < Tokens::blocks; ++block) {
          float low = decay * products[block][2 * half], high = decay * products[block][2 * half + 1];
#pragma unroll
          for (int part = 0; part < 3; ++part) mix(group, block, part, half) = transposed(take_upper(low, high));
        }
      }
    }
  }
  const int new_place = g < count ? static_cast<int>(place_of(P + g)) : 0;
  if (warp == 0) {
    tokens.template prepare<common>(p, count, g, c);
    if (blockIdx.x == 0 && g < count) {
      if (head_of(h, p.k_group) * p.k_group.count == h)
#pragma unroll
        for (int i = 0; i < runs; ++i)
#pragma unroll
          for (int j = 0; j < pairs; ++j)
            *reinterpret_cast<Pair*>(keys + new_place * key_stride + Unit::width * (c + 4 * i) + 2 * j) = tokens.pair(0, i, j);
      if (c == 0)
        static_cast<float*>(window.decays.data)[offset_of(window.decays, static_cast<unsigned>(slot), h, new_place)] =
            tokens.template log_decay<common>(p);
    }
    tokens.pass({shared, lane, true});
    tokens.pass_norms({reinterpret_cast<char*>(shared) + Tokens::shared_bytes, lane, true});
  }
  __syncthreads();
  if (warp != 0) {
    tokens.pass({shared, lane, false});
    tokens.pass_norms({reinterpret_cast<char*>(shared) + Tokens::shared_bytes, lane, false});
  }

  const bool folds = P + count > window.capacity;
  const auto load_corrections = [&](std::uint32_t(&words)[4], int stage, int group) {
    load_transposed(words, corrections_at(stage, group) + ((lane / 16 * 8 + lane % 8) * 2 + lane / 8 % 2) * 16);
  };
  int stage = 0;
#pragma unroll 1
  for (int first_value = span_begin; first_value < span_end; first_value += Unit::rows) {
    const Unit unit = unit_at(stage);
    __pipeline_wait_prior(stages - 1);
    __syncwarp();
    constexpr int chains = token_tile < 8 ? 2 : 1;
    float products[chains][Tokens::blocks][4] = {};
#pragma unroll
    for (int i = 0; i < runs; ++i) {
      std::uint32_t state[halves][4];
#pragma unroll
      for (int half = 0; half < halves; ++half) unit.load(state[half], 0, half, i);
#pragma unroll
      for (int j = 0; j < pairs; j += 2) {
        Pair a[parts][2][2] = {};
#pragma unroll
        for (int half = 0; half < halves; ++half)
#pragma unroll
          for (int e = 0; e < 2; ++e) Unit::split(state[half], j + e, [&](int part) -> Pair& { return a[part][e][half]; });
#pragma unroll
        for (int block = 0; block < Tokens::blocks; ++block)
#pragma unroll
          for (int part = 0; part < parts; ++part)
            multiply_add(products[(i * pairs / 2 + j / 2) % chains][block], a[part][0][0], a[part][0][1], a[part][1][0],
                         a[part][1][1], tokens.pair(block, i, j), tokens.pair(block, i, j + 1));
      }
    }
    float mixed[Tokens::blocks][4] = {};
#pragma unroll 1
    for (int group = 0; group < used; ++group) {
      std::uint32_t a[4];
      load_corrections(a, stage, group);
#pragma unroll
      for (int block = 0; block < Tokens::blocks; ++block)
#pragma unroll
        for (int part = 0; part < 3; ++part)
          multiply_add(mixed[block], a[0], a[1], a[2], a[3], mix(group, block, part, 0), mix(group, block, part, 1));
    }

    float in[2][2] = {}, out[4] = {}, u[4] = {};
#pragma unroll
    for (int half = 0; half < halves; ++half) {
      float values[2];
      widen(transposed(has_v ? *v_word(stage, half) : 0), values[0], values[1], __nv_bfloat16{});
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float recalled = 0, read_out = 0;
#pragma unroll
        for (const auto& sums : products) {
          recalled += sums[0][2 * half + e];
          read_out += sums[Tokens::blocks - 1][2 * half + e];
        }
        recalled = checkpoint_decay * recalled + mixed[0][2 * half + e];
        read_out = checkpoint_decay * read_out + mixed[Tokens::blocks - 1][2 * half + e];
        in[half][e] = tokens.key_factor[e] * recalled + tokens.value_factor[e] * values[e];
        out[2 * half + e] = tokens.query_factor[e] * read_out;
      }
    }
    tokens.solve(in, u, out);
#pragma unroll
    for (int half = 0; half < halves; ++half) {
      const Pair pair = transposed(narrow(out[2 * half], out[2 * half + 1], __nv_bfloat16{}));
      const int t = Tokens::query_of(g);
      if (t >= 0 && t < count) store_output(t, first_value + 8 * half, pair);
      const Pair entry =
          transposed(narrow(tokens.key_norm[0] * u[2 * half], tokens.key_norm[1] * u[2 * half + 1], __nv_bfloat16{}));
      if (g < count)
        *reinterpret_cast<Pair*>(corrections + new_place * correction_stride + first_value + 8 * half + 2 * c) = entry;
    }

    if (folds) {
#pragma unroll 1
      for (int i = 0; i < runs; ++i) {
        float sums[pairs][4] = {};
#pragma unroll 1
        for (int group = 0; group < used; ++group) {
          std::uint32_t words[4];
          load_corrections(words, stage, group);
          Pair a[3][4];
#pragma unroll
          for (int word = 0; word < 4; ++word) {
            float low, high;
            widen(words[word], low, high, __nv_bfloat16{});
            const int entry = word / 2 * 8 + 2 * c;
            split_in_three(gamma_of(group, entry) * low, gamma_of(group, entry + 1) * high,
                           [&](int part) -> Pair& { return a[part][word]; });
          }
          Pair rows[2][pairs];
#pragma unroll
          for (int half = 0; half < 2; ++half) load_keys(rows[half], keys_of(group * group_entries + 8 * half + g), i);
#pragma unroll
          for (int j = 0; j < pairs; ++j) {
            const Pair first = transposed(rows[0][j]), second = transposed(rows[1][j]);
#pragma unroll
            for (int part = 2; part >= 0; --part)
              multiply_add(sums[j], a[part][0], a[part][1], a[part][2], a[part][3], first, second);
          }
        }
        std::uint32_t state[halves][4];
#pragma unroll
        for (int half = 0; half < halves; ++half) {
          unit.load(state[half], 0, half, i);
#pragma unroll
          for (int j = 0; j < pairs; ++j) {
            float x, y;
            Unit::values(state[half], j, x, y);
            Unit::pack(state[half], j, checkpoint_decay * x + sums[j][2 * half], checkpoint_decay * y + sums[j][2 * half + 1]);
          }
          unit.store(state[half], 0, half, i);
        }
      }
      __syncwarp();
      unit.write(state_at(slot, first_value), span_end - first_value);
    }
    __syncwarp();
    fetch_state(stage, first_value + stages * Unit::rows);
    fetch_values(stage, first_value + stages * Unit::rows);
    stage = stage + 1 == stages ? 0 : stage + 1;
  }
}

}  // namespace gatedelta::cuda
