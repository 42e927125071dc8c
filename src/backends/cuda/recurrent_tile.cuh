// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "backends/cuda/decode_token.cuh"
#include "backends/cuda/record.cuh"

// How the warps of a block share its part of a head's state for the recurrence, and what they prepare for each other.
namespace gatedelta::cuda {

constexpr int recurrent_warps = 4, recurrent_threads = 32 * recurrent_warps;

/// A lane has four neighbouring value rows, and of these some keys. Neighbouring lanes have neighbouring keys, in vectors of
/// `width`. Sums over the keys for the rows, of a key and of a query each, end as one number a lane: see number().
template <class State_, int key_dim_, bool value_last_>
struct RecurrentTile {
  using State = State_;
  static constexpr int key_dim = key_dim_;
  static constexpr bool value_last = value_last_;
  static constexpr int key_lanes = key_dim == 256 ? 16 : 8, value_lanes = 32 / key_lanes;
  static constexpr int keys = key_dim / key_lanes, rows = 4;
  static constexpr int warp_rows = rows * value_lanes, block_rows = recurrent_warps * warp_rows;
  static constexpr int width = value_last ? 4 : lanes_of<State>, runs = keys / width;
  static constexpr int pieces = key_dim / 8;             ///< of a token's key, one for each thread
  static constexpr int tokens = key_dim == 256 ? 4 : 8;  ///< that are prepared at a time
  static constexpr int entries = group_entries, entry_threads = recurrent_threads / entries;  ///< of a window, at a time
  using StateRing = Ring<rows * runs, 1>;

  /// The lane's vector i of four keys.
  __device__ static constexpr int key_of(int key_lane, int i) {
    return 4 * i / width * (width * key_lanes) + width * key_lane + 4 * i % width;
  }
  /// Where vector v of four keys of a token lies: so that those which neighbouring lanes read at a time are neighbours.
  __device__ static constexpr int place_of(int v) {
    constexpr int of_lane = width / 4;
    const int in_run = v % (of_lane * key_lanes);
    return (v / (of_lane * key_lanes) * of_lane + in_run % of_lane) * key_lanes + in_run / of_lane;
  }
  /// The number that a lane is left with: twice its row, and one more for the query. Where there are more lanes, some have the
  /// same one.
  __device__ static constexpr int number(int key_lane) { return key_lane * (2 * rows) / key_lanes; }
  static constexpr int lanes_a_number = key_lanes / (2 * rows);
};

/// Four numbers to shared memory.
__device__ inline void store_four(float* to, const float* from) {
  *reinterpret_cast<float4*>(to) = make_float4(from[0], from[1], from[2], from[3]);
}

/// Shared memory of a block, with as many tokens behind it as there is room for.
template <class Tile, bool replays>
struct RecurrentMemory {
  static constexpr int K = Tile::key_dim, V = Tile::block_rows;
  struct alignas(16) Token {
    float key[K], query[K], value[V];
    float added_key[replays ? K : 4];  ///< as an entry
    DecodeFactors factors;
    std::int32_t place;   ///< of the new entry
    std::int32_t parent;  ///< in a tree
  };
  struct Entries {
    float keys[Tile::entries * K], corrections[Tile::entries * V];
  };
  struct None {};

  alignas(16) std::conditional_t<replays, Entries, None> entries;
  /// The state on its way. K-last, each lane has its own vectors; V-last, there are rows of all the block's values of a key, as
  /// they lie in the state.
  alignas(16) typename Tile::State state[K * V];

  __device__ Token& token(int t) { return reinterpret_cast<Token*>(this + 1)[t]; }
  /// With drafts in a tree, the state that they begin with: where the state came in if there is room, or behind all `tokens`.
  __device__ float4* checkpoint(int tokens) {
    return reinterpret_cast<float4*>(has_checkpoint_room ? static_cast<void*>(state) : &token(tokens));
  }
  static constexpr bool has_checkpoint_room = sizeof(typename Tile::State) == sizeof(float);
  static constexpr int checkpoint_bytes = has_checkpoint_room ? 0 : K * V * static_cast<int>(sizeof(float));
  /// Vector v of the key's values. So that lanes with different keys read different banks, vectors of some keys change places.
  __device__ uint4* state_vector(int key, int v) {
    constexpr int vectors = V / lanes_of<typename Tile::State>, banks = vectors < 8 ? vectors : 8;
    return reinterpret_cast<uint4*>(state) + key * vectors + (v ^ key / 4 % banks);
  }
};

/// The part of the state that a lane has.
template <class Tile>
struct RecurrentState {
  using State = typename Tile::State;
  static constexpr int width = lanes_of<State>;
  float s[Tile::rows][Tile::keys] = {};

  __device__ void scale(float factor) {
#pragma unroll
    for (auto& row : s)
#pragma unroll
      for (float& x : row) x *= factor;
  }
  /// S <- decay S + u k^T. The lane's keys come from shared memory.
  __device__ void add(float decay, const float (&u)[Tile::rows], const float* from_k, int key_lane) {
#pragma unroll
    for (int i = 0; i < Tile::keys; i += 4) {
      float k[4];
      load_vectors(k, from_k + 4 * (i / 4 * Tile::key_lanes + key_lane));
#pragma unroll
      for (int e = 0; e < 4; ++e)
#pragma unroll
        for (int r = 0; r < Tile::rows; ++r) s[r][i + e] = fmaf(u[r], k[e], decay * s[r][i + e]);
    }
  }
  /// To and from shared memory: `memory` is the first vector of the thread's.
  __device__ void save(float4* memory) const {
#pragma unroll
    for (int r = 0; r < Tile::rows; ++r)
#pragma unroll
      for (int i = 0; i < Tile::keys; i += 4)
        store_four(reinterpret_cast<float*>(memory + (r * Tile::keys + i) / 4 * recurrent_threads), s[r] + i);
  }
  __device__ void restore(const float4* memory) {
#pragma unroll
    for (int r = 0; r < Tile::rows; ++r)
#pragma unroll
      for (int i = 0; i < Tile::keys; i += 4) {
        float x[4];
        load_vectors(x, reinterpret_cast<const float*>(memory + (r * Tile::keys + i) / 4 * recurrent_threads));
#pragma unroll
        for (int e = 0; e < 4; ++e) s[r][i + e] = x[e];
      }
  }
  /// S k and S q of all rows, of which each lane of a warp gets its number.
  __device__ float multiply(const float* from_k, const float* from_q, int lane) const {
    const int key_lane = lane % Tile::key_lanes;
    float sums[2 * Tile::rows] = {};
#pragma unroll
    for (int i = 0; i < Tile::keys; i += 4) {
      const int at = 4 * (i / 4 * Tile::key_lanes + key_lane);
      float k[4], q[4];
      load_vectors(k, from_k + at), load_vectors(q, from_q + at);
#pragma unroll
      for (int e = 0; e < 4; ++e)
#pragma unroll
        for (int r = 0; r < Tile::rows; ++r) {
          sums[2 * r] += s[r][i + e] * k[e];
          sums[2 * r + 1] += s[r][i + e] * q[e];
        }
    }
    spread_sums<Tile::key_lanes / 2, 1, 2 * Tile::rows>(sums, static_cast<unsigned>(lane));
    return sums[0];
  }

  /// K-last: from the lane's own vectors, in the order of rows and runs.
  __device__ void widen_from(const typename Tile::StateRing& ring) {
#pragma unroll
    for (int r = 0; r < Tile::rows; ++r)
#pragma unroll
      for (int i = 0; i < Tile::runs; ++i) {
        std::uint32_t words[4];
        float out[width];
        ring.read_again(0, r * Tile::runs + i, words);
        unpack<State>(words, out);
#pragma unroll
        for (int e = 0; e < width; ++e) s[r][i * Tile::width + e] = out[e];
      }
  }
  /// Stores the lane's runs, the first of them to here.
  template <class Element>
  __device__ void store_runs(Element* to, std::int64_t v_stride) const {
#pragma unroll
    for (int r = 0; r < Tile::rows; ++r, to += v_stride) {
      if constexpr (sizeof(Element) != sizeof(State)) forget(to);
#pragma unroll
      for (int i = 0; i < Tile::runs; ++i) {
        float x[Tile::width];
#pragma unroll
        for (int e = 0; e < Tile::width; ++e) x[e] = s[r][i * Tile::width + e];
        store_as<Element>(to, i * (Tile::width * Tile::key_lanes), x);
      }
    }
  }

  /// V-last: the lane's value rows, `first_value` of the block's and the next ones, are a piece of shared memory for each key.
  template <class Memory>
  __device__ void widen_from(Memory& memory, int first_value, int key_lane) {
#pragma unroll
    for (int i = 0; i < Tile::keys; ++i) {
      float x[4];
      const State* const from = piece(memory, first_value, key_lane, i);
      if constexpr (sizeof(State) == 4) {
        load_vectors(x, from);
      } else {
        const uint2 words = *reinterpret_cast<const uint2*>(from);
        widen(words.x, x[0], x[1], State{}), widen(words.y, x[2], x[3], State{});
      }
#pragma unroll
      for (int r = 0; r < 4; ++r) s[r][i] = x[r];
    }
  }
  template <class Memory>
  __device__ void narrow_to(Memory& memory, int first_value, int key_lane) const {
#pragma unroll
    for (int i = 0; i < Tile::keys; ++i) {
      State* const to = piece(memory, first_value, key_lane, i);
      const Packed<State, 4> packed({s[0][i], s[1][i], s[2][i], s[3][i]});
      if constexpr (packed.count == 4)
        *reinterpret_cast<uint4*>(to) = packed.vector();
      else
        *reinterpret_cast<uint2*>(to) = make_uint2(packed.words[0], packed.words[1]);
    }
  }
  /// Of each key the lane's value rows, those of the first key to here, directly. From address to address: there are no
  /// registers for all of them.
  template <class Element>
  __device__ void store_pieces(Element* to, std::int64_t k_stride) const {
    const auto key_of = [](int i) { return Tile::key_of(0, i / 4) + i % 4; };
#pragma unroll
    for (int i = 0; i < Tile::keys; ++i) {
      store_as<Element>(to, 0, {s[0][i], s[1][i], s[2][i], s[3][i]});
      to += (key_of(i + 1) - key_of(i)) * k_stride;
      forget(to);
    }
  }

 private:
  static_assert(Tile::rows == 4);

  template <class Memory>
  __device__ static State* piece(Memory& memory, int first_value, int key_lane, int i) {
    const int key = Tile::key_of(key_lane, i / 4) + i % 4;
    return reinterpret_cast<State*>(memory.state_vector(key, first_value / width)) + first_value % width;
  }
};

}  // namespace gatedelta::cuda
