// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "backends/cuda/decode_token.cuh"

// One token a row, V-last. A block has value rows of one head, all of them where a warp's lanes reach along V: then it moves
// the head's state as one piece, since pieces of 128 bytes would cost 7 % of the bandwidth of device memory. Its warps have
// different keys, and add up what each of them finds of S k and S q in shared memory.
namespace gatedelta::cuda {

/// How the warps of a block and their lanes share its part of a head's state: neighbouring lanes have neighbouring vectors
/// along V.
///
/// A lane's keys are runs of `run` neighbours. Sums over K are sums over 16 such runs each, added pair by pair: first those
/// that are 8 runs apart, a lane's own, then those of lanes, then those of warps. So their bits do not depend on the number of
/// lanes.
template <class State, int key_dim, int lanes>
struct ValueLastTile {
  static constexpr int width = lanes_of<State>, warps = lanes < 8 ? 2 : 4, values = lanes * width;
  static constexpr int key_lanes = 32 / lanes;  ///< of a warp
  static constexpr int all_runs = 16, run = key_dim / all_runs, runs = all_runs / (key_lanes * warps), keys = runs * run;
  static_assert(lanes >= 4 && lanes <= 16);

  /// The first key of run i.
  __device__ static constexpr unsigned key_of(unsigned warp, unsigned key_lane, int i) {
    return ((i * key_lanes + key_lane) * warps + warp) * run;
  }
  using StateRing = Ring<keys, 1>;
  static constexpr int sums = 2 * values + 4;  ///< of a warp: S k and S q of each value row, and products of key and query
  static constexpr int factors = 8;            ///< numbers that a block's factors take, with what aligns what follows
  static constexpr std::size_t warp_bytes = StateRing::bytes + sums * sizeof(float),
                               block_bytes = (values + factors) * sizeof(float);
};

/// Adds part(first), part(first + step), ... to x, `count` of them and each to numbers of its own, in the order of lanes.
template <int count, int Size, class Part>
__device__ __forceinline__ void sum_of_parts(float (&x)[Size], int first, int step, Part part) {
  if constexpr (count == 1) {
    part(first, x);
  } else {
    float other[Size] = {};
    sum_of_parts<count / 2>(x, first, 2 * step, part);
    sum_of_parts<count / 2>(other, first + step, 2 * step, part);
#pragma unroll
    for (int i = 0; i < Size; ++i) x[i] += other[i];
  }
}

/// Blocks that are to fit on a multiprocessor, as shared memory allows and, by an estimate, registers.
template <class Tile, bool common>
constexpr int value_last_blocks() {
  constexpr int memory = 227 * 1024 / (Tile::warps * static_cast<int>(Tile::warp_bytes) + Tile::block_bytes + 1024);
  constexpr int sums = (Tile::runs > 2 ? 3 : Tile::runs) * 2 * Tile::width;
  constexpr int estimate = (common ? 1 : 6) * Tile::keys + sums + 30, of_thread = estimate < 72 ? 72 : estimate;
  // Each quarter of a multiprocessor has registers of its own.
  constexpr int registers = 16384 / (32 * of_thread) * 4 / Tile::warps;
  constexpr int blocks = memory < registers ? memory : registers;
  return blocks < 1 ? 1 : blocks > 16 ? 16 : blocks;
}

template <class State, int key_dim, int lanes, bool common>
__global__ void __launch_bounds__(32 * ValueLastTile<State, key_dim, lanes>::warps,
                                  value_last_blocks<ValueLastTile<State, key_dim, lanes>, common>())
    decode_value_last_kernel(const __grid_constant__ FastParams p) {
  using Tile = ValueLastTile<State, key_dim, lanes>;
  constexpr int width = Tile::width, values = Tile::values, runs = Tile::runs, run = Tile::run, keys = Tile::keys;
  constexpr int warps = Tile::warps, first = 16;  // lanes between those that are added first
  const unsigned thread = threadIdx.x, warp = thread / 32, lane = thread % 32, key_lane = lane / lanes,
                 value_lane = lane % lanes;
  const unsigned n = p.first_row + blockIdx.z, h = blockIdx.y, first_value = blockIdx.x * values;
  RowSlots<common> slots;
  slots.fetch(p, n, lane);  // all else waits for it

  extern __shared__ uint4 shared[];
  typename Tile::StateRing ring(reinterpret_cast<char*>(shared) + warp * Tile::StateRing::bytes, lane);
  // What follows the states: v, the factors, and of each warp its sums.
  float* const v = reinterpret_cast<float*>(reinterpret_cast<char*>(shared) + warps * Tile::StateRing::bytes);
  DecodeFactors* const shared_factors = reinterpret_cast<DecodeFactors*>(v + values);
  float* const all_sums = v + values + Tile::factors;
  // From a head to the lane's first vector, and from there to that of its key i.
  const auto lane_offset = [&](std::int64_t stride) {
    return Tile::key_of(warp, key_lane, 0) * stride + first_value + value_lane * width;
  };
  const auto step = [](int i, std::int64_t stride) { return (Tile::key_of(0, 0, i / run) + i % run) * stride; };
  const auto begin = [&] {
    slots.resolve(p, n);
    const bool reads = slots.source >= 0 && p.initial_state;
    const std::int64_t stride = p.state_read.strides[3];
    const State* from = static_cast<const State*>(p.state_read.data) + lane_offset(stride);
    if (reads)
      from += offset_of(p.state_read, slots.source, h);
    else
      ring.clear();
    ring.fetch(0, reads, Evictions(p).load, [&](int i) { return from + step(i, stride); });
  };
  // The kernel before may be writing the inputs of a dependent launch, but neither slots nor states.
  if (p.ahead) begin();
  wait_for_inputs(p);
  DecodeInputs<run, runs, common> inputs;
  inputs.fetch(p, n, h, [&](int i) { return Tile::key_of(warp, key_lane, i); });
  // Each of the first threads finishes a value row.
  const bool has_value = thread < values;
  RawElement raw_v;
  if (has_value)
    raw_v.fetch(p.v, dtype_of<common>(p.v),
                offset_of(p.v, n, 0u, head_of(h, p.v_group)) + product(first_value + thread, common ? 1 : p.v.strides[3]));
  if (!p.ahead) begin();
  // What is usual stays as it is until it is used: blocks are limited by registers.
  float all_q[common ? 1 : keys], all_k[common ? 1 : keys], products[3] = {};
  if constexpr (!common) inputs.widen_to(all_k, all_q, p);
  const auto key = [&](int i) {
    if constexpr (common)
      return inputs.key(i / run, i % run);
    else
      return all_k[i];
  };
  const auto query = [&](int i) {
    if constexpr (common)
      return inputs.query(i / run, i % run);
    else
      return all_q[i];
  };
  sum_of_parts<runs>(products, 0, 1, [&](int part, float(&out)[3]) {
#pragma unroll
    for (int i = part * run; i < (part + 1) * run; ++i) {
      out[0] += key(i) * key(i);
      out[1] += query(i) * query(i);
      out[2] += key(i) * query(i);
    }
  });
#pragma unroll
  for (int distance = first; distance >= lanes; distance /= 2)
#pragma unroll
    for (float& sum : products) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
  float* const own_sums = all_sums + warp * Tile::sums;
  if (lane == 0) *reinterpret_cast<float4*>(own_sums + 2 * values) = make_float4(products[0], products[1], products[2], 0);
  if (has_value) v[thread] = raw_v.value(dtype_of<common>(p.v));
  __syncthreads();
  // Neighbouring numbers that each warp has, for all of them.
  const auto add_up = [&](auto& out, unsigned at) {
    constexpr int count = sizeof(out) / sizeof(float);
    float x[warps][count];
#pragma unroll
    for (int i = 0; i < warps; ++i) load_vectors(x[i], all_sums + i * Tile::sums + at);
#pragma unroll
    for (int distance = warps / 2; distance > 0; distance /= 2)
#pragma unroll
      for (int i = 0; i < distance; ++i)
#pragma unroll
        for (int e = 0; e < count; ++e) x[i][e] += x[i + distance][e];
#pragma unroll
    for (int e = 0; e < count; ++e) out[e] = x[0][e];
  };
  // Factors wait for one instruction after the other, so they are formed while the states are on their way: by a warp for
  // itself or, where registers limit the blocks, by a thread each for norms and for gates, which leave them to the block.
  constexpr bool leaves_factors = lanes == 16 && sizeof(State) == 2;
  DecodeFactors factors = {};
  if (!leaves_factors || thread == 0) {
    float all_products[4];
    add_up(all_products, 2 * values);
    (leaves_factors ? *shared_factors : factors).set_products<common>(p, all_products);
  }
  if (leaves_factors ? thread == 32 : lane == 0)
    (leaves_factors ? *shared_factors : factors).set_gates<common>(p, inputs.gates);
  if constexpr (!leaves_factors) {
    factors.decay = __shfl_sync(0xffffffffu, factors.decay, 0);
    factors.beta = __shfl_sync(0xffffffffu, factors.beta, 0);
  }

  // S k of the lane's value rows, and behind them S q.
  float sums[2 * width] = {};
  ring.wait();
  const auto vector = [&](int i, float(&out)[width]) {
    std::uint32_t words[4];
    ring.read_again(0, i, words);
    unpack<State>(words, out);
  };
  sum_of_parts<runs>(sums, 0, 1, [&](int part, float(&out)[2 * width]) {
#pragma unroll
    for (int i = part * run; i < (part + 1) * run; ++i) {
      float s[width];
      vector(i, s);
#pragma unroll
      for (int e = 0; e < width; ++e) {
        out[e] += s[e] * key(i);
        out[width + e] += s[e] * query(i);
      }
    }
  });
  spread_sums<first, lanes, 2 * width>(sums, lane);
  cudaTriggerProgrammaticLaunchCompletion();        // the next one may read states while these are stored
  constexpr int own = 2 * width / Tile::key_lanes;  // numbers that the lane is left with
  const unsigned number = key_lane * own;
  float* const to_sums = own_sums + number / width * values + value_lane * width + number % width;
#pragma unroll
  for (int i = 0; i < own; ++i) to_sums[i] = sums[i];
  __syncthreads();

  if constexpr (leaves_factors) factors = *shared_factors;
  if (has_value) {
    float recalled[1], read_out[1];
    add_up(recalled, thread), add_up(read_out, values + thread);
    const float out = factors.output(factors.correction(v[thread], recalled[0]), read_out[0]);
    store_at(p.o, dtype_of<common>(p.o), offset_of(p.o, n, 0u, h) + product(first_value + thread, common ? 1 : p.o.strides[3]),
             slots.source >= 0 ? out : 0.0f);
  }
  if (slots.source < 0) return;
  float u[width], values_of_lane[width];
  add_up(u, value_lane * width);
  load_vectors(values_of_lane, v + value_lane * width);
#pragma unroll
  for (int e = 0; e < width; ++e) u[e] = factors.correction(values_of_lane[e], u[e]);
  const auto store = [&](std::int64_t stride, auto store_vector) {
#pragma unroll
    for (int i = 0; i < keys; ++i) {
      float s[width];
      vector(i, s);
#pragma unroll
      for (int e = 0; e < width; ++e) s[e] = factors.decay * s[e] + u[e] * key(i);
      store_vector(step(i, stride), s);
    }
  };
  store_in_all_places<common, State, width>(
      p, n, h, slots, [](const std::int64_t* of_rows) { return of_rows[1]; }, lane_offset, store);
}

}  // namespace gatedelta::cuda
