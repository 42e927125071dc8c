// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "backends/cuda/recurrent_tile.cuh"

// All that no other kernel is for: any number of tokens a row, of any dtype and of sequences of different lengths, with a
// replay window or without one. The recurrence itself in float32, token by token, with the state in registers.
//
// A block has some value rows of one head. What its warps know of the tokens, and of the entries of a window, they prepare
// together in shared memory, some of them at a time; the recurrence of a warp's value rows needs no other warp. With the
// entries (k_j, u_j), whose decays up to the last one are gamma_j (gamma: that of the checkpoint), it begins with
//
//     S <- gamma S + sum_j gamma_j u_j k_j^T
//
// which is stored only where the window is full; the tokens' own corrections then are new entries. Where drafts are a tree,
// that state is kept: a draft whose parent is not the token before begins with it and the corrections of its own ancestors.
namespace gatedelta::cuda {

/// A thread's part of preparing some tokens: 8 neighbours of the key and the query of one of them.
template <class Tile>
struct TokenPiece {
  RawRun<8> raw_k, raw_q;
  GateInputs gates;
  int token, piece;  ///< of those

  __device__ TokenPiece() : token(threadIdx.x / Tile::pieces), piece(threadIdx.x % Tile::pieces) {}

  /// Starts the loads. `first`: of the first one in the tensors.
  template <class P>
  __device__ __forceinline__ void fetch(const P& p, unsigned batch, unsigned first, int count, unsigned h) {
    raw_k = {}, raw_q = {};
    if (token >= count) return;
    const unsigned t = first + static_cast<unsigned>(token);
    const auto fetch_run = [&](RawRun<8>& to, const Tensor<std::int32_t, 4>& from, const Group& group) {
      const int along = p.vector_keys ? 1 : from.strides[3];
      to.fetch(from, from.dtype, offset_of(from, batch, t, head_of(h, group)) + product(8 * piece, along), along,
               p.vector_keys);
    };
    fetch_run(raw_k, p.k, p.k_group);
    fetch_run(raw_q, p.q, p.q_group);
    if (piece == 0) gates.fetch(p, batch, t, h);
  }
  /// For all lanes of a warp together. `to`: the first of the tokens in shared memory. `k` is the thread's part of the key.
  template <class P, class Token>
  __device__ __forceinline__ void prepare(const P& p, int count, Token* to, float (&k)[8]) const {
    float q[8], products[3] = {};
    raw_k.widen_to(k, p.k.dtype, p.vector_keys), raw_q.widen_to(q, p.q.dtype, p.vector_keys);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      products[0] += k[i] * k[i];
      products[1] += q[i] * q[i];
      products[2] += k[i] * q[i];
    }
#pragma unroll
    for (int distance = Tile::pieces / 2; distance >= 1; distance /= 2)
#pragma unroll
      for (float& sum : products) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
    if (token >= count) return;
    store(to[token].key, k);
    store(to[token].query, q);
    if (piece != 0) return;
    DecodeFactors factors;
    factors.set_products<false>(p, products);
    factors.set_gates<false>(p, gates);
    to[token].factors = factors;
  }
  /// The thread's part of a key.
  __device__ void store(float* to, const float (&x)[8]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) store_four(to + 4 * Tile::place_of(2 * piece + half), x + 4 * half);
  }
};

/// A row's window, as each warp of its block knows it.
struct WindowRow {
  std::uint32_t slot;
  RecordRow<> record;

  /// False after a fault, which is recorded.
  template <class P>
  __device__ bool fetch(const P& p, std::int64_t slot_of_row, unsigned n, std::int64_t tokens, int lane, bool records) {
    slot = static_cast<std::uint32_t>(slot_of_row);
    return has_room(p, n, tokens, records) && record.fetch(p, slot_of_row, n, lane, records);
  }
};

/// A thread's part of preparing some entries of a window: some keys and corrections of one of them.
template <class Tile, class P, class Memory>
__device__ __forceinline__ float prepare_entries(const P& p, const WindowRow& row, unsigned h, int first_value, int begin,
                                                 Memory& memory, int lane) {
  constexpr int threads = Tile::entry_threads, keys = Tile::key_dim / threads, rows = Tile::block_rows / threads;
  static_assert(keys % 8 == 0 && rows % 4 == 0);
  const auto& window = p.window;
  const int own = static_cast<int>(threadIdx.x) / threads, piece = static_cast<int>(threadIdx.x) % threads;
  const int entry = begin + own, count = min(row.record.length - begin, Tile::entries);
  const int place = row.record.place_of(entry, window.ring);
  constexpr int run = rows < 8 ? rows : 8;
  constexpr int step = keys > 16 ? 8 : keys;  // at a time, as registers allow
  RawRun<8> raw_keys[step / 8] = {};
  RawRun<run> raw_corrections[rows / run] = {};
  const std::int64_t keys_at = offset_of(window.keys, row.slot, head_of(h, p.k_group), place) + piece * keys;
  const auto fetch_keys = [&](int first) {
    if (own < count)
#pragma unroll
      for (int i = 0; i < step / 8; ++i) raw_keys[i].fetch(window.keys, window.keys.dtype, keys_at + first + 8 * i, 1, true);
  };
  fetch_keys(0);
  if (own < count && first_value + piece * rows < p.value_dim) {
    const std::int64_t rows_at = offset_of(window.corrections, row.slot, h, place) + first_value + piece * rows;
#pragma unroll
    for (int i = 0; i < rows / run; ++i)
      raw_corrections[i].fetch(window.corrections, window.keys.dtype, rows_at + run * i, 1, true);
  }
  // Each lane has the decay of an entry, and works out that up to the last one.
  const int decayed = begin + lane % Tile::entries, decay_place = row.record.place_of(decayed, window.ring);
  float log_decay = 0;
  if (decayed < row.record.length)
    log_decay = static_cast<const float*>(window.decays.data)[offset_of(window.decays, row.slot, h, decay_place)];
  float behind = expf(log_decay);
#pragma unroll
  for (int distance = 1; distance < Tile::entries; distance *= 2) {
    const float more = __shfl_down_sync(0xffffffffu, behind, distance);
    if (lane % Tile::entries + distance < Tile::entries) behind *= more;
  }
  const float all = __shfl_sync(0xffffffffu, behind, 0);
  float decay = __shfl_sync(0xffffffffu, behind, (own + 1) % Tile::entries);
  if (own + 1 == Tile::entries) decay = 1;
  if (own >= count) return all;
#pragma unroll 1
  for (int first = 0; first < keys; first += step) {
    if (first > 0) fetch_keys(first);
#pragma unroll
    for (int i = 0; i < step / 8; ++i) {
      float x[8];
      raw_keys[i].widen_to(x, window.keys.dtype, true);
#pragma unroll
      for (int half = 0; half < 2; ++half)
        store_four(memory.entries.keys + own * Tile::key_dim + 4 * Tile::place_of((piece * keys + first) / 4 + 2 * i + half),
                   x + 4 * half);
    }
  }
#pragma unroll
  for (int i = 0; i < rows / run; ++i) {
    float x[run];
    raw_corrections[i].widen_to(x, window.keys.dtype, true);
#pragma unroll
    for (float& u : x) u *= decay;
#pragma unroll
    for (int j = 0; j < run; j += 4)
      store_four(memory.entries.corrections + own * Tile::block_rows + piece * rows + run * i + j, x + j);
  }
  return all;
}

template <bool replays>
using RecurrentParams = std::conditional_t<replays, ReplayParams<FastParams>, FastParams>;

/// Three blocks on a multiprocessor: the state is 64 registers for K of 128 and 256. Trees are compiled for themselves: as a
/// case of all windows they make the others 1 to 3 % slower.
template <class State, int key_dim, bool value_last, bool replays, bool trees>
__global__ void __launch_bounds__(recurrent_threads, 3) recurrent_kernel(const __grid_constant__ RecurrentParams<replays> p) {
  using Tile = RecurrentTile<State, key_dim, value_last>;
  using Memory = RecurrentMemory<Tile, replays>;
  extern __shared__ uint4 shared[];
  Memory& memory = *reinterpret_cast<Memory*>(shared);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int key_lane = lane % Tile::key_lanes, value_lane = lane / Tile::key_lanes;
  const unsigned n = p.first_row + blockIdx.z, h = blockIdx.y;
  const int first_value = static_cast<int>(blockIdx.x) * Tile::block_rows;
  const int values = min(Tile::block_rows, p.value_dim - first_value);
  // Of the block's value rows, the lane's first one, and whether the warp has any.
  const int lane_row = warp * Tile::warp_rows + value_lane * Tile::rows;
  const bool has_rows = warp * Tile::warp_rows < values;
  wait_for_inputs(p);
  if (!has_row(p, n, h, first_value, values)) return;

  const std::int64_t source = source_slot(p, n);
  const bool reads = source >= 0 && (replays || p.initial_state);
  const State* const from = static_cast<const State*>(p.state_read.data) + (reads ? offset_of(p.state_read, source, h) : 0);
  // Of a V-last state, all vectors of the block: function(vector in shared memory, offset).
  const auto for_each_vector = [&](std::int64_t stride, const auto& function) {
    constexpr int width = lanes_of<State>, vectors = Tile::block_rows / width, step = recurrent_threads / vectors;
    const int v = thread % vectors;
    if (v * width >= values) return;
    std::int64_t offset = thread / vectors * stride + first_value + v * width;
#pragma unroll 4
    for (int key = thread / vectors; key < key_dim; key += step, offset += step * stride)
      function(memory.state_vector(key, v), offset);
  };
  // Where a lane's keys begin in a K-last state.
  const auto offset_of_lane = [&](std::int64_t stride) {
    return (first_value + lane_row) * stride + Tile::key_of(key_lane, 0);
  };
  typename Tile::StateRing ring(reinterpret_cast<char*>(memory.state) + warp * Tile::StateRing::bytes, lane);
  if constexpr (value_last) {
    if (reads)
      for_each_vector(p.state_read.strides[3],
                      [&](uint4* to, std::int64_t offset) { __pipeline_memcpy_async(to, from + offset, 16); });
    __pipeline_commit();
  } else {
    const std::int64_t stride = p.state_read.strides[2];
    const State* const first = from + offset_of_lane(stride);
    ring.fetch(0, reads && has_rows, Eviction::normal,
               [&](int i) { return first + i / Tile::runs * stride + i % Tile::runs * (Tile::width * Tile::key_lanes); });
  }
  const Row row = resolve(p, n, source);
  const auto batch = static_cast<unsigned>(row.batch), row_token = static_cast<unsigned>(row.first_token);
  const int tokens = static_cast<int>(row.tokens);
  TokenPiece<Tile> token;
  if (row.source >= 0) token.fetch(p, batch, row_token, min(tokens, Tile::tokens), h);
  bool good = row.source >= 0;
  WindowRow window{};
  if constexpr (replays) good = good && window.fetch(p, row.source, n, row.tokens, lane, warp == 0);
  if constexpr (trees) {
    bool bad = false;
    if (good && thread < tokens) {
      const int parent = parent_at(p, batch, row_token + static_cast<unsigned>(thread));
      bad = !is_parent(p, n, parent, thread, true);
      memory.token(thread).parent = parent;
    }
    if (__syncthreads_or(bad)) good = false;
  }
  if (!good) {
    __pipeline_wait_prior(0);
    zero_outputs(p, row.batch, row.first_token, row.first_token + row.tokens, h, first_value, values);
    return;
  }

  RecurrentState<Tile> state;
  float4* checkpoint = nullptr;
  if constexpr (trees) checkpoint = memory.checkpoint(p.most_tokens()) + thread;
  // A head, from registers.
  const auto store_directly = [&](auto* data, std::int64_t v_stride, std::int64_t k_stride) {
    if (!has_rows) return;
    if constexpr (value_last)
      state.store_pieces(data + first_value + lane_row + Tile::key_of(key_lane, 0) * k_stride, k_stride);
    else
      state.store_runs(data + offset_of_lane(v_stride), v_stride);
  };
  const auto store_state = [&](const Tensor<std::int64_t, 4>& to, std::int64_t slot) {
    State* const data = static_cast<State*>(to.data) + offset_of(to, slot, h);
    if constexpr (value_last && replays) {
      // Seldom, and not worth the registers of more.
      store_directly(data, to.strides[2], to.strides[3]);
    } else if constexpr (value_last) {
      __syncthreads();
      if (has_rows) state.narrow_to(memory, lane_row, key_lane);
      __syncthreads();
      for_each_vector(to.strides[3], [&](const uint4* vector, std::int64_t offset) {
        __stcs(reinterpret_cast<uint4*>(data + offset), *vector);
      });
    } else {
      store_directly(data, to.strides[2], to.strides[3]);
    }
  };
  // Each lane finishes a row, or several lanes the same.
  const int own_row = lane_row + Tile::number(key_lane) / 2;
  const bool finishes = has_rows && key_lane % (2 * Tile::lanes_a_number) == 0;
  // Some tokens, the first of them the row's token `first`. With a window all of them are there at once: there are never many.
  const auto prepare_tokens = [&](int first, int count) {
    const int to = replays ? first : 0;
    const unsigned first_token = row_token + static_cast<unsigned>(first);
    if (first > 0) token.fetch(p, batch, first_token, count, h);
    const std::int64_t v_at = offset_of(p.v, batch, first_token, head_of(h, p.v_group)) + product(first_value, p.v.strides[3]);
    RawElement raw_values[Tile::tokens * Tile::block_rows / recurrent_threads];
    const auto for_each_value = [&](const auto& function) {
#pragma unroll
      for (int i = 0; i < Tile::tokens * Tile::block_rows / recurrent_threads; ++i) {
        const int t = (thread + i * recurrent_threads) / Tile::block_rows, v = thread % Tile::block_rows;
        if (t < count && v < values) function(raw_values[i], t, v);
      }
    };
    for_each_value(
        [&](RawElement& raw, int t, int v) { raw.fetch(p.v, v_at + product(t, p.v.strides[1]) + product(v, p.v.strides[3])); });
    float key[8];
    token.prepare(p, count, &memory.token(to), key);
    for_each_value([&](const RawElement& raw, int t, int v) { memory.token(to + t).value[v] = raw.value(p.v.dtype); });
    if constexpr (replays) {
      const auto& w = p.window;
      const int place = window.record.place_of(window.record.length + first + token.token, w.ring);
      if (token.token >= count) return;
      auto& own = memory.token(to + token.token);
      if (w.keys.dtype == DType::bf16)
#pragma unroll
        for (float& k : key) k = __bfloat162float(__float2bfloat16_rn(k));
      token.store(own.added_key, key);
      if (token.piece == 0) own.place = place;
      if (blockIdx.x != 0) return;
      if (is_first(h, p.k_group))
        store_run(w.keys, offset_of(w.keys, window.slot, head_of(h, p.k_group), place) + 8 * token.piece, key);
      if (token.piece == 0)
        static_cast<float*>(w.decays.data)[offset_of(w.decays, window.slot, h, place)] =
            token.gates.template log_decay<float>(p);
    }
  };
  int done = 0, count = replays ? tokens : min(tokens, Tile::tokens);
#pragma unroll 1
  for (int first = 0; first < count; first += Tile::tokens) prepare_tokens(first, min(count - first, Tile::tokens));
  const auto widen_state = [&] {
    if (!reads || !has_rows) return;
    if constexpr (value_last)
      state.widen_from(memory, lane_row, key_lane);
    else
      state.widen_from(ring);
  };
  if constexpr (replays) {
    const int length = window.record.length;
    int begin = 0;
#pragma unroll 1
    do {
      if (begin > 0) __syncthreads();
      const float entries_decay = prepare_entries<Tile>(p, window, h, first_value, begin, memory, lane);
      __pipeline_wait_prior(0);
      __syncthreads();
      if (begin == 0) widen_state();
      state.scale(entries_decay);
      const int end = min(length - begin, Tile::entries);
#pragma unroll 1
      for (int j = 0; j < end; ++j) {
        float u[Tile::rows];
        load_vectors(u, memory.entries.corrections + j * Tile::block_rows + lane_row);
        state.add(1, u, memory.entries.keys + j * key_dim, key_lane);
      }
      begin += Tile::entries;
    } while (begin < length);
    if (length + tokens > p.window.capacity) store_state(p.state_write, window.slot);
    if constexpr (trees) {
      if (Memory::has_checkpoint_room) __syncthreads();  // others may be reading what came in
      state.save(checkpoint);
    }
  } else {
    __pipeline_wait_prior(0);
    __syncthreads();
    widen_state();
  }

#pragma unroll 1
  for (;;) {
    const std::int64_t o_at =
        offset_of(p.o, batch, row_token + static_cast<unsigned>(done), h) + product(first_value + own_row, p.o.strides[3]);
#pragma unroll 1
    for (int t = 0; t < count; ++t) {
      auto& own = memory.token(t);
      const DecodeFactors factors = own.factors;
      const float number = state.multiply(own.key, own.query, lane);
      const float other = __shfl_xor_sync(0xffffffffu, number, Tile::lanes_a_number);
      const bool has_query = Tile::number(key_lane) % 2 != 0;
      float u = factors.correction(own.value[own_row], has_query ? other : number);
      if (finishes) store_at(p.o, o_at + product(t, p.o.strides[1]), factors.output(u, has_query ? number : other));
      if constexpr (replays) {
        const auto& w = p.window;
        if (w.keys.dtype == DType::bf16) u = __bfloat162float(__float2bfloat16_rn(u));
        if (finishes) store_at(w.corrections, offset_of(w.corrections, window.slot, h, own.place) + first_value + own_row, u);
        if (t + 1 == tokens) break;
      }
      if constexpr (trees) {
        __syncwarp();  // all have their v
        if (finishes) own.value[own_row] = u;
        if (const int parent = memory.token(t + 1).parent; parent != t) {
          __syncwarp();
          std::uint64_t path = 0;  // its ancestors
          for (int from = parent; from >= 0; from = memory.token(from).parent) path |= std::uint64_t{1} << from;
          state.restore(checkpoint);
#pragma unroll 1
          for (; path != 0; path &= path - 1) {
            const auto& ancestor = memory.token(__ffsll(static_cast<long long>(path)) - 1);
            float all_u[Tile::rows];
            load_vectors(all_u, ancestor.value + lane_row);
            state.add(ancestor.factors.decay, all_u, ancestor.added_key, key_lane);
          }
          continue;
        }
      }
      float all_u[Tile::rows];
#pragma unroll
      for (int r = 0; r < Tile::rows; ++r)
        all_u[r] = __shfl_sync(0xffffffffu, u, 2 * r * Tile::lanes_a_number, Tile::key_lanes);
      state.add(factors.decay, all_u, replays ? own.added_key : own.key, key_lane);
      if constexpr (!replays) {
        const auto number_of_row = static_cast<unsigned>(done + t);
        if (p.store_tokens)
          if (const std::int64_t slot = index_at(p.token_slots, n, number_of_row); slot > p.null_slot)
            store_state(p.state_write, slot);
        if (p.snapshots.data == nullptr) continue;
        if (p.snapshots.dtype != element_dtype<State>) {
          const auto store_converted = [&](auto* data) {
            store_directly(data + offset_of(p.snapshots, n, number_of_row, h), p.snapshots.strides[3], p.snapshots.strides[4]);
          };
          using First = std::conditional_t<sizeof(State) == 4, __half, float>;
          using Second = std::conditional_t<std::is_same_v<State, __nv_bfloat16>, __half, __nv_bfloat16>;
          if (p.snapshots.dtype == element_dtype<First>)
            store_converted(static_cast<First*>(p.snapshots.data));
          else
            store_converted(static_cast<Second*>(p.snapshots.data));
          continue;
        }
        Tensor<std::int64_t, 4> to;
        to.data = static_cast<State*>(p.snapshots.data) + offset_of(p.snapshots, n, number_of_row);
#pragma unroll
        for (int dim = 1; dim < 4; ++dim) to.strides[dim] = p.snapshots.strides[dim + 1];
        store_state(to, 0);
      }
    }
    done += count;
    if (replays || done >= tokens) break;
    count = min(tokens - done, Tile::tokens);
    __syncthreads();
    prepare_tokens(done, count);
    __syncthreads();
  }
  if constexpr (!replays)
    if (row.final_slot >= 0) store_state(p.state_write, row.final_slot);
}

}  // namespace gatedelta::cuda
