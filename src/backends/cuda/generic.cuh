// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "backends/cuda/block.cuh"
#include "backends/cuda/gates.cuh"
#include "backends/cuda/rows.cuh"

// One kernel for every case of the operator. A block has one row, one head and a slice of the state's value rows, which stays
// in shared memory for all tokens; a warp works on one value row at a time, its lanes spread over K.
namespace gatedelta::cuda {

/// q or k of one token, normalised in place. For all threads of a block together; begins and ends with a barrier.
__device__ inline void normalise(float* vector, int K, double eps) {
  __syncthreads();
  double squares = 0;
  for (int i = static_cast<int>(threadIdx.x) % 32; i < K; i += 32) squares += static_cast<double>(vector[i]) * vector[i];
  const double factor = 1 / sqrt(warp_sum(squares) + eps);
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < K; i += block_threads) vector[i] = static_cast<float>(vector[i] * factor);
  __syncthreads();
}

__global__ void __launch_bounds__(block_threads) forward_kernel(const __grid_constant__ ForwardParams p) {
  extern __shared__ float4 dynamic[];
  __shared__ double decay, beta;
  const int K = static_cast<int>(p.key_dim), tid = static_cast<int>(threadIdx.x), lane = tid % 32;
  float* const S = reinterpret_cast<float*>(dynamic);
  float* const q = S + p.slice_rows * K;
  float* const k = q + K;
  const unsigned slices = p.slices, heads = p.heads;
  const unsigned n = blockIdx.x / (slices * heads), h = blockIdx.x / slices % heads;
  const std::int64_t first_row = static_cast<std::int64_t>(blockIdx.x % slices) * p.slice_rows;
  const int rows = static_cast<int>(min(static_cast<std::int64_t>(p.slice_rows), p.value_dim - first_row));

  wait_for_inputs(p);
  if (!has_row(p, n, h, first_row, rows)) return;
  const Row row = resolve(p, n, source_slot(p, n));
  if (row.source < 0) {
    zero_outputs(p, row.batch, row.first_token, row.first_token + row.tokens, h, first_row, rows);
    return;
  }

  // Base is the offset of the state's head; the last two strides are those of V and K.
  const auto store_state = [&](const auto& to, std::int64_t base, std::int64_t v_stride, std::int64_t k_stride) {
    for_each_element(rows, K, v_stride, k_stride,
                     [&](int v, int i) { store_at(to, base + (first_row + v) * v_stride + i * k_stride, S[v * K + i]); });
  };
  const auto store_slot = [&](std::int64_t slot) {
    store_state(p.state_write, offset_of(p.state_write, slot, h), p.state_write.strides[2], p.state_write.strides[3]);
  };

  if (p.initial_state) {
    const auto& from = p.state_read;
    const std::int64_t base = offset_of(from, row.source, h, first_row);
    for_each_element(rows, K, from.strides[2], from.strides[3],
                     [&](int v, int i) { S[v * K + i] = load_at(from, base + v * from.strides[2] + i * from.strides[3]); });
  } else {
    for (int e = tid; e < rows * K; e += block_threads) S[e] = 0;
  }

  for (std::int64_t t = 0; t < row.tokens; ++t) {
    const std::int64_t token = row.first_token + t;
    for (int i = tid; i < K; i += block_threads) {
      q[i] = load(p.q, row.batch, token, h / p.q_group.count, i);
      k[i] = load(p.k, row.batch, token, h / p.k_group.count, i);
    }
    if (tid == 0) {
      GateInputs gates;
      gates.fetch(p, row.batch, token, h);
      decay = exp(gates.log_decay<double>(p));
      beta = gates.beta<double>(p);
    }
    if (p.l2norm) {
      normalise(q, K, p.l2_eps);
      normalise(k, K, p.l2_eps);
    }
    __syncthreads();
    for (int v = tid / 32; v < rows; v += block_warps) {
      float* const s = S + v * K;
      // One rounding a token: outputs can be small differences of what the state and a correction give.
      double recalled = 0, out = 0;
      for (int i = lane; i < K; i += 32) recalled += static_cast<double>(s[i]) * k[i];
      const double u = beta * (load(p.v, row.batch, token, h / p.v_group.count, first_row + v) - decay * warp_sum(recalled));
      for (int i = lane; i < K; i += 32) {
        const double next = decay * s[i] + u * k[i];
        s[i] = static_cast<float>(next);
        out += next * q[i];
      }
      out = warp_sum(out);
      if (lane == 0) store_at(p.o, offset_of(p.o, row.batch, token, h, first_row + v), static_cast<float>(p.scale * out));
    }
    __syncthreads();
    if (p.snapshots.data != nullptr)
      store_state(p.snapshots, offset_of(p.snapshots, n, t, h), p.snapshots.strides[3], p.snapshots.strides[4]);
    if (p.store_tokens)
      if (const std::int64_t slot = index_at(p.token_slots, n, t); slot > p.null_slot) store_slot(slot);
  }
  __syncthreads();
  if (row.final_slot >= 0) store_slot(row.final_slot);
}

/// One block for each row and head.
__global__ void __launch_bounds__(block_threads) commit_kernel(const __grid_constant__ CommitParams p) {
  const unsigned n = blockIdx.x / static_cast<unsigned>(p.heads), h = blockIdx.x % static_cast<unsigned>(p.heads);
  const std::int64_t slot = checked_slot(p, FaultKind::write_slots, index_at(p.write_slots, n), n);
  if (slot < 0) return;
  const std::int64_t count = index_at(p.accepted, n);
  if (count < 1 || count > p.room) {
    record(p.fault, FaultKind::accepted, n, count, p.room);
    return;
  }
  const std::int64_t from = offset_of(p.snapshots, n, count - 1, h), to = offset_of(p.state, slot, h);
  for (std::int64_t e = threadIdx.x; e < p.value_dim * p.key_dim; e += blockDim.x) {
    const std::int64_t v = e / p.key_dim, k = e % p.key_dim;
    store_at(p.state, to + v * p.state.strides[2] + k * p.state.strides[3],
             load_at(p.snapshots, from + v * p.snapshots.strides[3] + k * p.snapshots.strides[4]));
  }
}

}  // namespace gatedelta::cuda
