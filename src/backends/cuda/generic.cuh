// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "backends/cuda/rows.cuh"

// One kernel for every case of the operator. A block has one row, one head and a slice of the state's value rows, which stays
// in shared memory for all tokens; a warp works on one value row at a time, its lanes spread over K.
namespace gatedelta::cuda {

constexpr int block_threads = 256;

__device__ inline double warp_sum(double value) {
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
  return value;
}
__device__ inline float warp_sum(float value) {
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
  return value;
}

__device__ inline double log_decay(const ForwardParams& p, std::int64_t batch, std::int64_t token, std::int64_t h) {
  if (p.gate == GateForm::none) return 0;
  if (p.gate == GateForm::log_decay) return load(p.g, batch, token, h);
  const double x = static_cast<double>(load(p.a, batch, token, h)) + (p.dt_bias.data != nullptr ? load(p.dt_bias, h) : 0.0f);
  const double scaled = p.softplus_beta * x;
  const double softplus = scaled > p.softplus_threshold ? x : log1p(exp(scaled)) / p.softplus_beta;
  return -exp(static_cast<double>(load(p.A_log, h))) * softplus;
}

__device__ inline double beta_of(const ForwardParams& p, std::int64_t batch, std::int64_t token, std::int64_t h) {
  if (p.beta_form == BetaForm::one) return 1;
  if (p.beta_form == BetaForm::value) return load(p.beta, batch, token, h);
  const double sigmoid = 1 / (1 + exp(-static_cast<double>(load(p.b, batch, token, h))));
  return p.beta_form == BetaForm::logits ? sigmoid : 2 * sigmoid;
}

/// The block's slice of the outputs of some tokens.
__device__ inline void zero_outputs(const ForwardParams& p, std::int64_t batch, std::int64_t begin, std::int64_t end,
                                    std::int64_t h, std::int64_t first_row, int rows) {
  for (std::int64_t e = threadIdx.x; e < (end - begin) * rows; e += blockDim.x)
    store_at(p.o, offset_of(p.o, batch, begin + e / rows, h, first_row + e % rows), 0.0f);
}

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
  extern __shared__ float memory[];
  __shared__ float decay, beta;
  const int K = static_cast<int>(p.key_dim), tid = static_cast<int>(threadIdx.x), lane = tid % 32;
  float* const S = memory;
  float* const q = S + p.slice_rows * K;
  float* const k = q + K;
  const std::int64_t block = blockIdx.x, n = block / (p.slices * p.heads), h = block / p.slices % p.heads;
  const std::int64_t first_row = block % p.slices * p.slice_rows;
  const int rows = static_cast<int>(min(p.slice_rows, p.value_dim - first_row));

  if (p.cu_seqlens.data != nullptr) {
    // The blocks behind the last row take the tokens of no sequence: all tokens if the sequences make no sense.
    const bool good = sequences_are_good(p);
    if (n == p.rows) {
      zero_outputs(p, 0, 0, good ? index_at(p.cu_seqlens, 0) : p.tokens, h, first_row, rows);
      if (good) zero_outputs(p, 0, index_at(p.cu_seqlens, p.rows), p.tokens, h, first_row, rows);
    }
    if (n == p.rows || !good) return;
  }
  const Row row = resolve(p, n);
  if (row.source < 0) {
    zero_outputs(p, row.batch, row.first_token, row.first_token + row.tokens, h, first_row, rows);
    return;
  }

  // Base is the offset of the state's head; the last two strides are those of V and K.
  const auto store_state = [&](const Strided& to, std::int64_t base, std::int64_t v_stride, std::int64_t k_stride) {
    for_each_element(rows, K, v_stride, k_stride,
                     [&](int v, int i) { store_at(to, base + (first_row + v) * v_stride + i * k_stride, S[v * K + i]); });
  };
  const auto store_slot = [&](std::int64_t slot) {
    store_state(p.state_write, offset_of(p.state_write, slot, h), p.state_write.strides[2], p.state_write.strides[3]);
  };

  if (p.initial_state) {
    const bool staged = p.staged_rows != nullptr && p.staged_rows[n] != 0;
    const Strided& from = staged ? p.staged : p.state_read;
    const std::int64_t base = offset_of(from, staged ? n : row.source, h, first_row);
    for_each_element(rows, K, from.strides[2], from.strides[3],
                     [&](int v, int i) { S[v * K + i] = load_at(from, base + v * from.strides[2] + i * from.strides[3]); });
  } else {
    for (int e = tid; e < rows * K; e += block_threads) S[e] = 0;
  }

  for (std::int64_t t = 0; t < row.tokens; ++t) {
    const std::int64_t token = row.first_token + t;
    for (int i = tid; i < K; i += block_threads) {
      q[i] = load(p.q, row.batch, token, h / p.q_group, i);
      k[i] = load(p.k, row.batch, token, h / p.k_group, i);
    }
    if (tid == 0) {
      decay = static_cast<float>(exp(log_decay(p, row.batch, token, h)));
      beta = static_cast<float>(beta_of(p, row.batch, token, h));
    }
    if (p.l2norm) {
      normalise(q, K, p.l2_eps);
      normalise(k, K, p.l2_eps);
    }
    __syncthreads();
    for (int v = tid / 32; v < rows; v += block_threads / 32) {
      float* const s = S + v * K;
      float recalled = 0, out = 0;
      for (int i = lane; i < K; i += 32) {
        s[i] *= decay;
        recalled += s[i] * k[i];
      }
      const float u = beta * (load(p.v, row.batch, token, h / p.v_group, first_row + v) - warp_sum(recalled));
      for (int i = lane; i < K; i += 32) {
        s[i] += u * k[i];
        out += s[i] * q[i];
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

/// Before forward_kernel, where slots are stored to that were not read by the same row: copies the sources that other rows may
/// store to aside, so that each row reads the pool as it was. One block for each row and head.
__global__ void __launch_bounds__(block_threads) stage_kernel(const __grid_constant__ ForwardParams p) {
  const std::int64_t n = blockIdx.x / p.heads, h = blockIdx.x % p.heads;
  const std::int64_t source = source_slot(p, n);
  bool needed = false;
  for (std::int64_t e = threadIdx.x; source >= 0 && e < p.rows * (p.token_room + 1); e += blockDim.x) {
    const std::int64_t other = e / (p.token_room + 1), t = e % (p.token_room + 1);
    if (other == n) continue;
    if (t < p.token_room)
      needed |= p.store_tokens && index_at(p.token_slots, other, t) == source;
    else
      needed |= p.write_slots.data != nullptr && index_at(p.write_slots, other) == source;
  }
  needed = __syncthreads_or(needed);
  if (threadIdx.x == 0 && h == 0) p.staged_rows[n] = needed;
  if (!needed) return;
  const Strided &from = p.state_read, &to = p.staged;
  const std::int64_t base = offset_of(from, source, h), target = offset_of(to, n, h);
  for (std::int64_t e = threadIdx.x; e < p.value_dim * p.key_dim; e += blockDim.x) {
    const std::int64_t v = e / p.key_dim, k = e % p.key_dim;
    store_at(to, target + e, load_at(from, base + v * from.strides[2] + k * from.strides[3]));
  }
}

/// One block for each row and head.
__global__ void __launch_bounds__(block_threads) commit_kernel(const __grid_constant__ CommitParams p) {
  const std::int64_t n = blockIdx.x / p.heads, h = blockIdx.x % p.heads;
  const std::int64_t slot = checked_slot(FaultKind::write_slots, index_at(p.write_slots, n), p.null_slot, p.slots, n);
  if (slot < 0) return;
  const std::int64_t count = index_at(p.accepted, n);
  if (count < 1 || count > p.room) {
    record(FaultKind::accepted, n, count, p.room);
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
