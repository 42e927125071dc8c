// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "backends/cuda/gates.cuh"
#include "backends/cuda/rows.cuh"
#include "backends/cuda/vectors.cuh"

// What the decode kernels know of a row's one token before they have its state. With d = exp(g),
//
//     u = beta (v - d S k)     o = scale (d S q + u (k q))     S <- d S + u k^T
//
// `common`: the call of a model. q, k, v, o, the gate and beta are bfloat16, q and k come in vectors, v and o are contiguous, a
// K-last state has no gaps between its rows, the gate is raw and beta are logits, q and k are normalised, and the state goes to
// one slot. For that, half of the instructions are enough.
namespace gatedelta::cuda {

template <bool common>
__device__ DType dtype_of(const Tensor<std::int32_t, 4>& tensor) {
  return common ? DType::bf16 : tensor.dtype;
}

/// A lane's part of key and query, `runs` times `run` neighbours, and the gates.
template <int run, int runs, bool common>
struct DecodeInputs {
  RawRun<run> raw_q[runs], raw_k[runs];
  GateInputs gates;

  /// Starts the loads; key_of(i) is where run i begins.
  template <class KeyOf>
  __device__ __forceinline__ void fetch(const FastParams& p, unsigned n, unsigned h, const KeyOf& key_of) {
    const auto fetch_key = [&](const Tensor<std::int32_t, 4>& from, const Group& group, RawRun<run>(&to)[runs]) {
      const int along = is_vector(p) ? 1 : from.strides[3];
      const std::int64_t base = offset_of(from, n, 0u, head_of(h, group));
#pragma unroll
      for (int i = 0; i < runs; ++i)
        to[i].fetch(from, dtype_of<common>(from), base + product(key_of(i), along), along, is_vector(p));
    };
    fetch_key(p.k, p.k_group, raw_k);
    fetch_key(p.q, p.q_group, raw_q);
    gates.fetch<common>(p, n, 0u, h);
  }
  __device__ __forceinline__ void widen_to(float (&k)[run * runs], float (&q)[run * runs], const FastParams& p) const {
#pragma unroll
    for (int i = 0; i < runs; ++i) {
      float part[run];
      raw_k[i].widen_to(part, dtype_of<common>(p.k), is_vector(p));
#pragma unroll
      for (int j = 0; j < run; ++j) k[i * run + j] = part[j];
      raw_q[i].widen_to(part, dtype_of<common>(p.q), is_vector(p));
#pragma unroll
      for (int j = 0; j < run; ++j) q[i * run + j] = part[j];
    }
  }
  /// Element e of run i, where they are bfloat16 in vectors.
  __device__ float key(int i, int e) const { return element(raw_k[i], e); }
  __device__ float query(int i, int e) const { return element(raw_q[i], e); }

 private:
  __device__ static float element(const RawRun<run>& from, int e) {
    static_assert(common);
    return widen_one(from.words[e / 2], e % 2);
  }
  __device__ static bool is_vector(const FastParams& p) { return common || p.vector_keys; }
};

/// The recurrence of one value row, for the key and the query as they are: what normalises them comes in here.
struct DecodeFactors {
  float key_factor, query_factor, key_query, decay, beta;

  template <bool common>
  __device__ __forceinline__ void set_gates(const FastParams& p, const GateInputs& gates) {
    decay = expf(gates.log_decay<float, common>(p)), beta = gates.beta<float, common>(p);
  }
  /// Of the key with itself, the query with itself, and of both.
  template <bool common, int count>
  __device__ __forceinline__ void set_products(const FastParams& p, const float (&products)[count]) {
    const bool l2norm = common || p.l2norm;
    key_factor = l2norm ? rsqrtf(products[0] + p.l2_eps) : 1.0f;
    query_factor = (l2norm ? rsqrtf(products[1] + p.l2_eps) : 1.0f) * p.scale;
    key_query = products[2];
  }
  /// u, from S k.
  __device__ float correction(float v, float recalled) const {
    return key_factor * (beta * (v - decay * key_factor * recalled));
  }
  /// o, from S q.
  __device__ float output(float u, float read_out) const { return query_factor * (decay * read_out + u * key_query); }
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

/// The state after the token, in its slots and in the snapshots. Of what a lane has of it: stride_of(the strides of V and K) is
/// the one between its vectors, lane_offset(stride) where the first one is, and store(stride, f) calls f(offset from there,
/// elements) for each.
template <bool common, class State, int width, class Slots, class StrideOf, class LaneOffset, class Store>
__device__ __forceinline__ void store_in_all_places(const FastParams& p, unsigned n, unsigned h, const Slots& slots,
                                                    const StrideOf& stride_of, const LaneOffset& lane_offset,
                                                    const Store& store) {
#pragma unroll 1
  for (int i = 0; i < (common ? 1 : 2); ++i) {
    const std::int32_t slot = i == 0 ? slots.final_slot : slots.token_slot;
    if (slot < 0) continue;
    const std::int64_t stride = stride_of(&p.state_write.strides[2]);
    State* const to = static_cast<State*>(p.state_write.data) + offset_of(p.state_write, slot, h) + lane_offset(stride);
    store(stride, [&](std::int64_t step, const float(&s)[width]) {
      store_vector(to + step, Packed<State, width>(s).vector(), Evictions(p).store);
    });
  }
  if (!common && p.snapshots.data != nullptr) {
    const std::int64_t stride = stride_of(&p.snapshots.strides[3]);
    const std::int64_t base = offset_of(p.snapshots, n, 0u, h) + lane_offset(stride);
    store(stride, [&](std::int64_t step, const float(&s)[width]) { store_run(p.snapshots, base + step, s); });
  }
}

}  // namespace gatedelta::cuda
