// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "backends/cuda/decode_token.cuh"

// One token a row, K-last. The state goes through registers once: every warp has a span of value rows of one head, goes through
// it slice by slice with the next slices' loads under way, and forms the outputs in the same pass, without a barrier: all of K
// is in one warp.
namespace gatedelta::cuda {

constexpr int decode_max_warps = 4;  ///< of a block

/// How the lanes of a warp share its part of a head's state, of which each has `size` rows at a time. Neighbouring lanes have
/// neighbouring vectors along K.
template <class State, int key_dim, int size>
struct DecodeTile {
  static constexpr int width = lanes_of<State>;
  static constexpr int key_lanes = key_dim / width < 32 ? key_dim / width : 32, value_lanes = 32 / key_lanes;
  static constexpr int keys = key_dim / key_lanes, runs = keys / width;  ///< of a lane
  static constexpr int rows = size, warp_rows = rows * value_lanes;
  static constexpr int vectors = rows * runs;
  static constexpr int own_rows = rows > key_lanes ? rows / key_lanes : 1;  ///< whose outputs a lane finishes
  static constexpr unsigned stages = 2;                                     ///< slices that are under way ahead of their use

  /// The first key of the lane's run i.
  __device__ static constexpr unsigned key_of(unsigned key_lane, int i) { return i * (key_lanes * width) + key_lane * width; }
  /// Of the warp's rows, the lane's row r.
  __device__ static constexpr unsigned row_of(unsigned value_lane, unsigned r) { return r * value_lanes + value_lane; }
  /// The stride of V.
  template <bool gapless>
  __device__ static std::int64_t stride_of(const std::int64_t* strides) {
    return gapless ? key_dim : strides[0];
  }
  /// From the lane's first vector to vector i.
  __device__ static std::int64_t step(int i, std::int64_t stride) { return row_of(0, i / runs) * stride + key_of(0, i % runs); }
};

template <class Tile>
using DecodeRing = Ring<Tile::vectors, Tile::stages>;

template <class State, int key_dim, int size, bool common>
__global__ void __launch_bounds__(32 * decode_max_warps, 3) decode_kernel(const __grid_constant__ FastParams p) {
  using Tile = DecodeTile<State, key_dim, size>;
  constexpr int rows = Tile::rows, keys = Tile::keys, width = Tile::width, own_rows = Tile::own_rows, runs = Tile::runs;
  constexpr int first = Tile::key_lanes / 2;
  const unsigned lane = threadIdx.x % 32, key_lane = lane % Tile::key_lanes, value_lane = lane / Tile::key_lanes;
  const unsigned n = p.first_row + blockIdx.z, h = blockIdx.y;
  const unsigned span_begin = (blockIdx.x * p.warps + threadIdx.x / 32) * p.span;
  const unsigned span_end = min(span_begin + p.span, static_cast<unsigned>(p.value_dim));
  if (span_begin >= span_end) return;
  RowSlots<common> slots;
  slots.fetch(p, n, lane);  // all else waits for it

  DecodeInputs<width, runs, common> inputs;
  RawElement raw_v[own_rows];
  // This lane finishes the sums of a row or of neighbours; several lanes may have the same row. Where value and output are:
  const unsigned own_row = Tile::row_of(value_lane, key_lane * rows / Tile::key_lanes);
  const int v_along = common ? 1 : p.v.strides[3], o_along = common ? 1 : p.o.strides[3];
  const std::int64_t v_at = offset_of(p.v, n, 0u, head_of(h, p.v_group)) + product(span_begin + own_row, v_along);
  const auto fetch_values = [&](unsigned done) {
#pragma unroll
    for (int r = 0; r < own_rows; ++r) raw_v[r].fetch(p.v, dtype_of<common>(p.v), v_at + product(done + r, v_along));
  };
  extern __shared__ uint4 shared[];
  DecodeRing<Tile> ring(reinterpret_cast<char*>(shared) + threadIdx.x / 32 * DecodeRing<Tile>::bytes, lane);
  const unsigned span = span_end - span_begin;
  const std::int64_t read_stride = Tile::template stride_of<common>(&p.state_read.strides[2]);
  const auto lane_offset = [&](unsigned first_value, std::int64_t stride) {
    return (first_value + Tile::row_of(value_lane, 0)) * stride + Tile::key_of(key_lane, 0);
  };
  const State* from = static_cast<const State*>(p.state_read.data) + lane_offset(span_begin, read_stride);
  bool reads = false;
  // `done`: value rows of the span before the slice.
  const auto fetch_state = [&](unsigned stage, unsigned done) {
    const State* const first_vector = from + done * read_stride;
    ring.fetch(stage, reads && done < span, Evictions(p).load,
               [&](int i) { return first_vector + Tile::step(i, read_stride); });
  };
  const auto begin = [&] {
    slots.resolve(p, n);
    reads = slots.source >= 0 && p.initial_state;
    if (reads) from += offset_of(p.state_read, slots.source, h);
#pragma unroll
    for (unsigned stage = 0; stage < Tile::stages; ++stage) fetch_state(stage, stage * Tile::warp_rows);
  };
  // The kernel before may be writing the inputs of a dependent launch, but neither slots nor states.
  if (p.ahead) begin();
  wait_for_inputs(p);
  inputs.fetch(p, n, h, [&](int i) { return Tile::key_of(key_lane, i); });
  fetch_values(0);
  if (!p.ahead) begin();
  const std::int64_t o_at = offset_of(p.o, n, 0u, h) + product(span_begin + own_row, o_along);

  float q[keys], k[keys], products[3] = {};
  inputs.widen_to(k, q, p);
#pragma unroll
  for (int i = 0; i < keys; ++i) {
    products[0] += k[i] * k[i];
    products[1] += q[i] * q[i];
    products[2] += k[i] * q[i];
  }
#pragma unroll
  for (int distance = first; distance >= 1; distance /= 2)
#pragma unroll
    for (float& sum : products) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
  DecodeFactors factors;
  factors.set_products<common>(p, products);
  factors.set_gates<common>(p, inputs.gates);

  unsigned stage = 0;
#pragma unroll 1
  for (unsigned done = 0; done < span; done += Tile::warp_rows) {
    std::uint32_t state[Tile::vectors][4] = {};
    ring.wait();
    if (reads) ring.read(stage, state);
    const auto key_at = [](int i, int e) { return i % runs * width + e; };  // of element e of vector i
    float v[own_rows];
#pragma unroll
    for (int r = 0; r < own_rows; ++r) v[r] = raw_v[r].value(dtype_of<common>(p.v));
    if (done + Tile::warp_rows < span) fetch_values(done + Tile::warp_rows);

    // S k and S q of each row, next to each other.
    float sums[2 * rows] = {};
#pragma unroll
    for (int i = 0; i < Tile::vectors; ++i) {
      float s[width];
      unpack<State>(state[i], s);
#pragma unroll
      for (int e = 0; e < width; ++e) {
        sums[i / runs * 2] += s[e] * k[key_at(i, e)];
        sums[i / runs * 2 + 1] += s[e] * q[key_at(i, e)];
      }
    }
    fetch_state(stage, done + Tile::stages * Tile::warp_rows);  // its place in the ring is free
    stage = stage + 1 == Tile::stages ? 0 : stage + 1;
    spread_sums<first, 1, 2 * rows>(sums, lane);
    float recalled[own_rows], read_out[own_rows];
#pragma unroll
    for (int r = 0; r < own_rows; ++r) recalled[r] = sums[2 * r], read_out[r] = sums[2 * r + 1];
    if constexpr (2 * rows <= Tile::key_lanes) {  // then a lane has one of the two sums
      constexpr int distance = Tile::key_lanes / (2 * rows);
      const float other = __shfl_xor_sync(0xffffffffu, sums[0], distance);
      const bool has_query = (lane & distance) != 0;
      recalled[0] = has_query ? other : sums[0];
      read_out[0] = has_query ? sums[0] : other;
    }
    float u[own_rows];
#pragma unroll
    for (int r = 0; r < own_rows; ++r) u[r] = factors.correction(v[r], recalled[r]);
    if (own_rows > 1 || key_lane * rows % Tile::key_lanes == 0) {
#pragma unroll
      for (int r = 0; r < own_rows; ++r)
        store_at(p.o, dtype_of<common>(p.o), o_at + product(done + r, o_along),
                 slots.source >= 0 ? factors.output(u[r], read_out[r]) : 0.0f);
    }
    if (slots.source < 0) continue;

    float all_u[rows];
#pragma unroll
    for (int r = 0; r < rows; ++r) {
      const unsigned lane_of = r * Tile::key_lanes / rows + value_lane * Tile::key_lanes;
      all_u[r] = __shfl_sync(0xffffffffu, u[r % own_rows], static_cast<int>(lane_of));
    }
    const auto store = [&](std::int64_t stride, auto store_vector) {
#pragma unroll
      for (int i = 0; i < Tile::vectors; ++i) {
        float s[width];
        unpack<State>(state[i], s);
#pragma unroll
        for (int e = 0; e < width; ++e) s[e] = factors.decay * s[e] + all_u[i / runs] * k[key_at(i, e)];
        store_vector(Tile::step(i, stride), s);
      }
    };
    store_in_all_places<common, State, width>(
        p, n, h, slots, [](const std::int64_t* of_rows) { return Tile::template stride_of<common>(of_rows); },
        [&](std::int64_t stride) { return lane_offset(span_begin + done, stride); }, store);
  }
}

}  // namespace gatedelta::cuda
