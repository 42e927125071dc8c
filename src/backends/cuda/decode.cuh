// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "backends/cuda/gates.cuh"
#include "backends/cuda/rows.cuh"
#include "backends/cuda/vectors.cuh"

// One token a row. The state goes through registers once: every warp has a span of value rows of one head, goes through it
// slice by slice with the next slice's loads under way, and forms the outputs in the same pass,
//
//     u = beta (v - d S k)     o = scale (d S q + u (k q))     S <- d S + u k^T         (d = exp(g)),
//
// without a barrier: all of K is in one warp.
namespace gatedelta::cuda {

constexpr int decode_max_warps = 4;  ///< of a block

/// How the lanes of a warp share its part of a head's state. `size`: rows of a lane (K-last), or lanes along V (V-last).
template <class State, int key_dim, bool value_last, int size>
struct DecodeTile {
  static constexpr int width = lanes_of<State>;
  /// Neighbouring lanes have neighbouring vectors: along K (K-last), or a few of them along V and the others along K (V-last).
  static constexpr int key_lanes = value_last ? 32 / size : key_dim / width < 32 ? key_dim / width : 32;
  static constexpr int value_lanes = 32 / key_lanes;
  static constexpr int key_lane_step = value_last ? value_lanes : 1;
  static constexpr int keys = key_dim / key_lanes;  ///< of a lane
  static constexpr int rows = value_last ? width : size;
  static constexpr int warp_rows = rows * value_lanes;
  static constexpr int vectors = rows * keys / width;
  /// A lane's keys are runs of `run` neighbours, key_lanes * run apart.
  static constexpr int run = value_last ? key_dim / 16 : width;
  /// The sums over a V-last lane's runs are added as those of as many lanes would be, so the bits do not depend on the size.
  static constexpr int parts = value_last ? keys / run : 1;
  static constexpr int own_rows = rows > key_lanes ? rows / key_lanes : 1;  ///< whose outputs a lane finishes
  static constexpr unsigned stages = value_last ? 1 : 2;                    ///< slices that are under way ahead of their use

  __device__ static unsigned key_lane(unsigned lane) { return value_last ? lane / value_lanes : lane % key_lanes; }
  __device__ static unsigned value_lane(unsigned lane) { return value_last ? lane % value_lanes : lane / key_lanes; }
  /// The lane's key i, or of vector i.
  __device__ static constexpr unsigned key_of(unsigned key_lane, int i) {
    return i / run * (key_lanes * run) + key_lane * run + i % run;
  }
  /// Of the warp's rows, the lane's row r.
  __device__ static constexpr unsigned row_of(unsigned value_lane, unsigned r) {
    return value_last ? value_lane * width + r : r * value_lanes + value_lane;
  }
  /// Of the last two dimensions of a state, the stride of the one that is not contiguous: K (V-last) or V (K-last).
  template <bool gapless>
  __device__ static std::int64_t stride_of(const std::int64_t* strides) {
    return value_last ? strides[1] : gapless ? key_dim : strides[0];
  }
  /// From a head's first element to the lane's first vector, and from there to vector i.
  __device__ static std::int64_t offset(unsigned key_lane, unsigned value_lane, unsigned first_value, std::int64_t stride) {
    const unsigned row = first_value + row_of(value_lane, 0), key = key_of(key_lane, 0);
    return value_last ? key * stride + row : row * stride + key;
  }
  __device__ static std::int64_t rows_on(unsigned rows, std::int64_t stride) { return value_last ? rows : rows * stride; }
  __device__ static std::int64_t step(int i, std::int64_t stride) {
    const unsigned row = row_of(0, row_at(i, 0)), key = key_of(0, key_at(i, 0));
    return value_last ? key * stride + row : row * stride + key;
  }
  /// Which row and key (of the lane's) element e of vector i is.
  __device__ static constexpr int row_at(int i, int e) { return value_last ? e : i / (keys / width); }
  __device__ static constexpr int key_at(int i, int e) { return value_last ? i : i % (keys / width) * width + e; }
};

/// Sums each of x over the lanes that differ in the bits Distance, Distance/2, ..., Last. While there is more than one number
/// each step hands half of them to the other lane, so N numbers take less than N + log2(lanes) shuffles and end spread over the
/// lanes. A number's order of summation does not depend on N.
template <int Distance, int Last, int N, int Size>
__device__ __forceinline__ void spread_sums(float (&x)[Size], unsigned lane) {
  if constexpr (N > 1) {
    const bool upper = (lane & Distance) != 0;
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      const float given = upper ? x[i] : x[i + N / 2], kept = upper ? x[i + N / 2] : x[i];
      x[i] = kept + __shfl_xor_sync(0xffffffffu, given, Distance);
    }
  } else {
    x[0] += __shfl_xor_sync(0xffffffffu, x[0], Distance);
  }
  if constexpr (Distance > Last) spread_sums<Distance / 2, Last, (N > 1 ? N / 2 : 1)>(x, lane);
}

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

template <class Tile>
using DecodeRing = Ring<Tile::vectors, 4, Tile::stages>;

/// `common`: the call of a model. q, k, v, o, the gate and beta are bfloat16, q and k come in vectors, v and o are contiguous,
/// a K-last state has no gaps between its rows, the gate is raw and beta are logits, q and k are normalised, and the state goes
/// to one slot. For that, half of the instructions are enough.
template <class State, int key_dim, bool value_last, int size, bool common>
__global__ void __launch_bounds__(32 * decode_max_warps, value_last && !common ? 2 : 3)
    decode_kernel(const __grid_constant__ FastParams p) {
  using Tile = DecodeTile<State, key_dim, value_last, size>;
  constexpr int rows = Tile::rows, keys = Tile::keys, width = Tile::width, last = Tile::key_lane_step;
  constexpr int own_rows = Tile::own_rows;
  constexpr int first = last * Tile::key_lanes / 2, runs = keys / Tile::run;
  const unsigned lane = threadIdx.x % 32, key_lane = Tile::key_lane(lane), value_lane = Tile::value_lane(lane);
  const unsigned n = p.first_row + blockIdx.z, h = blockIdx.y;
  const unsigned span_begin = (blockIdx.x * p.warps + threadIdx.x / 32) * p.span;
  const unsigned span_end = min(span_begin + p.span, static_cast<unsigned>(p.value_dim));
  if (span_begin >= span_end) return;
  RowSlots<common> slots;
  slots.fetch(p, n, lane);  // all else waits for it
  cudaTriggerProgrammaticLaunchCompletion();

  const auto dtype_of = [](const Tensor<std::int32_t, 4>& tensor) { return common ? DType::bf16 : tensor.dtype; };
  const bool vector_keys = common || p.vector_keys;
  RawRun<Tile::run> raw_q[runs], raw_k[runs];
  RawElement raw_v[own_rows];
  GateInputs gates;
  // This lane finishes the sums of a row or of neighbours; several lanes may have the same row. Where value and output are:
  const unsigned own_row = Tile::row_of(value_lane, key_lane * rows / Tile::key_lanes);
  const int v_along = common ? 1 : p.v.strides[3], o_along = common ? 1 : p.o.strides[3];
  const std::int64_t v_at = offset_of(p.v, n, 0u, head_of(h, p.v_group)) + product(span_begin + own_row, v_along);
  const std::int64_t o_at = offset_of(p.o, n, 0u, h) + product(span_begin + own_row, o_along);
  const auto fetch_values = [&](unsigned done) {
#pragma unroll
    for (int r = 0; r < own_rows; ++r) raw_v[r].fetch(p.v, dtype_of(p.v), v_at + product(done + r, v_along));
  };
  const auto fetch_inputs = [&] {
    const auto fetch_key = [&](const Tensor<std::int32_t, 4>& from, const Group& group, RawRun<Tile::run>(&to)[runs]) {
      const int along = vector_keys ? 1 : from.strides[3];
      const std::int64_t base = offset_of(from, n, 0u, head_of(h, group));
#pragma unroll
      for (int i = 0; i < runs; ++i)
        to[i].fetch(from, dtype_of(from), base + product(Tile::key_of(key_lane, i * Tile::run), along), along, vector_keys);
    };
    fetch_key(p.k, p.k_group, raw_k);
    fetch_key(p.q, p.q_group, raw_q);
    gates.fetch<common>(p, n, 0u, h);
    fetch_values(0);
  };
  extern __shared__ uint4 shared[];
  DecodeRing<Tile> ring(reinterpret_cast<char*>(shared) + threadIdx.x / 32 * DecodeRing<Tile>::bytes, lane);
  const unsigned span = span_end - span_begin;
  const std::int64_t read_stride = Tile::template stride_of<common>(&p.state_read.strides[2]);
  const State* from =
      static_cast<const State*>(p.state_read.data) + Tile::offset(key_lane, value_lane, span_begin, read_stride);
  bool reads = false;
  // `done`: value rows of the span before the slice.
  const auto fetch_state = [&](unsigned stage, unsigned done) {
    const State* const first_vector = from + Tile::rows_on(done, read_stride);
    ring.fetch(stage, reads && done < span, [&](int i) { return first_vector + Tile::step(i, read_stride); });
  };
  const auto begin = [&] {
    slots.resolve(p, n);
    reads = slots.source >= 0 && p.initial_state;
    if (reads) from += offset_of(p.state_read, slots.source, h);
    if (value_last && !reads) ring.clear();
#pragma unroll
    for (unsigned stage = 0; stage < Tile::stages; ++stage) fetch_state(stage, stage * Tile::warp_rows);
  };
  // The kernel before may be writing the inputs of a dependent launch, but neither slots nor states.
  if (p.dependent) {
    begin();
    cudaGridDependencySynchronize();
  }
  fetch_inputs();
  if (!p.dependent) begin();

  float q[keys], k[keys];
#pragma unroll
  for (int i = 0; i < runs; ++i) {
    float part[Tile::run];
    raw_k[i].widen_to(part, dtype_of(p.k), vector_keys);
#pragma unroll
    for (int j = 0; j < Tile::run; ++j) k[i * Tile::run + j] = part[j];
    raw_q[i].widen_to(part, dtype_of(p.q), vector_keys);
#pragma unroll
    for (int j = 0; j < Tile::run; ++j) q[i * Tile::run + j] = part[j];
  }
  // Products of the key and the query as they are; the factors that normalise them come in afterwards.
  float products[3] = {};
  sum_of_parts<Tile::parts>(products, 0, 1, [&](int part, float(&out)[3]) {
#pragma unroll
    for (int i = part * keys / Tile::parts; i < (part + 1) * keys / Tile::parts; ++i) {
      out[0] += k[i] * k[i];
      out[1] += q[i] * q[i];
      out[2] += k[i] * q[i];
    }
  });
#pragma unroll
  for (int distance = first; distance >= last; distance /= 2)
#pragma unroll
    for (float& sum : products) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
  const bool l2norm = common || p.l2norm;
  const float key_factor = l2norm ? 1.0f / sqrtf(products[0] + p.l2_eps) : 1.0f;
  const float query_factor = (l2norm ? 1.0f / sqrtf(products[1] + p.l2_eps) : 1.0f) * p.scale;
  const float decay = expf(gates.log_decay<float, common>(p)), beta = gates.beta<float, common>(p);

  unsigned stage = 0;
#pragma unroll 1
  for (unsigned done = 0; done < span; done += Tile::warp_rows) {
    // K-last, the slice is in registers and its place in the ring is free; V-last, it is read there twice.
    std::uint32_t state[value_last ? 1 : Tile::vectors][4] = {};
    ring.wait();
    if constexpr (!value_last)
      if (reads) ring.read(stage, state);
    const auto vector = [&](int i, float(&out)[width]) {
      if constexpr (value_last) ring.read_again(stage, i, state[0]);
      unpack<State>(state[value_last ? 0 : i], out);
    };
    float v[own_rows];
#pragma unroll
    for (int r = 0; r < own_rows; ++r) v[r] = raw_v[r].value(dtype_of(p.v));
    if (done + Tile::warp_rows < span) fetch_values(done + Tile::warp_rows);

    // S k and S q of each row, next to each other.
    float sums[2 * rows] = {};
    sum_of_parts<Tile::parts>(sums, 0, 1, [&](int part, float(&out)[2 * rows]) {
#pragma unroll
      for (int i = part * Tile::vectors / Tile::parts; i < (part + 1) * Tile::vectors / Tile::parts; ++i) {
        float s[width];
        vector(i, s);
#pragma unroll
        for (int e = 0; e < width; ++e) {
          out[2 * Tile::row_at(i, e)] += s[e] * k[Tile::key_at(i, e)];
          out[2 * Tile::row_at(i, e) + 1] += s[e] * q[Tile::key_at(i, e)];
        }
      }
    });
    if constexpr (!value_last) {
      fetch_state(stage, done + Tile::stages * Tile::warp_rows);
      stage = stage + 1 == Tile::stages ? 0 : stage + 1;
    }
    spread_sums<first, last, 2 * rows>(sums, lane);
    float recalled[own_rows], read_out[own_rows];
#pragma unroll
    for (int r = 0; r < own_rows; ++r) recalled[r] = sums[2 * r], read_out[r] = sums[2 * r + 1];
    if constexpr (2 * rows <= Tile::key_lanes) {  // then a lane has one of the two sums
      constexpr int distance = Tile::key_lanes / (2 * rows) * last;
      const float other = __shfl_xor_sync(0xffffffffu, sums[0], distance);
      const bool has_query = (lane & distance) != 0;
      recalled[0] = has_query ? other : sums[0];
      read_out[0] = has_query ? sums[0] : other;
    }
    // The correction, for the key as it is.
    float u[own_rows];
#pragma unroll
    for (int r = 0; r < own_rows; ++r) u[r] = key_factor * (beta * (v[r] - decay * key_factor * recalled[r]));
    if (own_rows > 1 || key_lane * rows % Tile::key_lanes == 0) {
#pragma unroll
      for (int r = 0; r < own_rows; ++r) {
        const float out = query_factor * (decay * read_out[r] + u[r] * products[2]);
        store_at(p.o, dtype_of(p.o), o_at + product(done + r, o_along), slots.source >= 0 ? out : 0.0f);
      }
    }
    if (slots.source < 0) continue;

    float all_u[rows];
#pragma unroll
    for (int r = 0; r < rows; ++r) {
      const unsigned lane_of = r * Tile::key_lanes / rows * last + (value_last ? value_lane : value_lane * Tile::key_lanes);
      all_u[r] = __shfl_sync(0xffffffffu, u[r % own_rows], static_cast<int>(lane_of));
    }
    const auto store = [&](std::int64_t stride, auto store_vector) {
#pragma unroll
      for (int i = 0; i < Tile::vectors; ++i) {
        float s[width];
        vector(i, s);
#pragma unroll
        for (int e = 0; e < width; ++e) s[e] = decay * s[e] + all_u[Tile::row_at(i, e)] * k[Tile::key_at(i, e)];
        store_vector(Tile::step(i, stride), s);
      }
    };
#pragma unroll 1
    for (int i = 0; i < (common ? 1 : 2); ++i) {
      const std::int32_t slot = i == 0 ? slots.final_slot : slots.token_slot;
      if (slot < 0) continue;
      const std::int64_t stride = Tile::template stride_of<common>(&p.state_write.strides[2]);
      State* const to = static_cast<State*>(p.state_write.data) + offset_of(p.state_write, slot, h) +
                        Tile::offset(key_lane, value_lane, span_begin + done, stride);
      store(stride, [&](std::int64_t step, const float(&s)[width]) {
        store_vector(to + step, Packed<State, width>(s).vector(), p.stores_stay);
      });
    }
    if (!common && p.snapshots.data != nullptr) {
      const std::int64_t stride = Tile::template stride_of<common>(&p.snapshots.strides[3]);
      const std::int64_t base =
          offset_of(p.snapshots, n, 0u, h) + Tile::offset(key_lane, value_lane, span_begin + done, stride);
      store(stride, [&](std::int64_t step, const float(&s)[width]) { store_run(p.snapshots, base + step, s); });
    }
    if constexpr (value_last) fetch_state(stage, done + Tile::warp_rows);
  }
}

}  // namespace gatedelta::cuda
