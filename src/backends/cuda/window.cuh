// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "backends/cuda/block.cuh"
#include "backends/cuda/gates.cuh"
#include "backends/cuda/record.cuh"

// Replay windows for every case of the operator, and the calls for windows alone.
//
// A block has one row, one head and a slice of the state's value rows in shared memory, as the generic kernel of plain calls,
// and brings it up to date from the entries. With S that state, G_t and G_tj sums of log decays on the path to token t,
//
//     u_t = beta_t (v_t - exp(G_t) S k^_t - sum_j exp(G_tj) (k_j.k^_t) u_j)           j: ancestors of t among the new tokens
//     o_t = scale (exp(G_t) S q^_t + sum_j exp(G_tj) (k_j.q^_t) u_j + (k^_t.q^_t) u_t)
//
// where the sums are over entries as they are stored: k_j as given, u_j with the factor that normalises k_j.
namespace gatedelta::cuda {

/// The record of a slot in shared memory, for all threads of a block together.
struct SharedRecord {
  std::int32_t length, places[2 * max_window];
};
template <class P>
__device__ bool fetch_record(const P& p, std::int64_t slot, unsigned row, SharedRecord& out) {
  bool bad = false;
  if (threadIdx.x < 32) {
    RecordRow<> found;
    const int lane = static_cast<int>(threadIdx.x);
    bad = !found.fetch(p, slot, row, lane, true);
    for (int i = 0; i < window_words; ++i) out.places[32 * i + lane] = found.places[i];
    out.length = found.length;
  }
  return !__syncthreads_or(bad);
}

/// The shared memory of a block: a slice of the state, and before it what is needed of some entries at a time, or of the
/// tokens.
struct SliceMemory {
  int entries;  ///< at a time
  int pitch;    ///< of corrections: value rows, in vectors of 4
  float* corrections;
  float* keys;   ///< of entries, or key and query of a token
  float* state;  ///< [rows][K]

  static constexpr int key_floats = 2048, most_entries = 16;
  __host__ __device__ SliceMemory(float* memory, std::int64_t slice_rows, std::int64_t key_dim)
      : pitch(static_cast<int>((slice_rows + 3) / 4 * 4)), corrections(memory), keys(corrections + max_window * pitch) {
    const std::int64_t room = 2 * key_dim > key_floats ? 2 * key_dim : key_floats;
    entries = static_cast<int>(room / key_dim < most_entries ? room / key_dim : most_entries);
    state = keys + room;
  }
  static std::size_t bytes(std::int64_t slice_rows, std::int64_t key_dim) {
    const SliceMemory all(nullptr, slice_rows, key_dim);
    return reinterpret_cast<std::uintptr_t>(all.state + slice_rows * key_dim);
  }
};

/// A slice of the state from the pool, and what the entries make of it.
template <class P, class State>
__device__ void load_replayed(const P& p, const State& from, const SharedRecord& what, std::int64_t slot, unsigned h,
                              std::int64_t first_row, int rows, const SliceMemory& memory) {
  __shared__ float decays[SliceMemory::most_entries];
  const int K = p.key_dim, tid = static_cast<int>(threadIdx.x), lane = tid % 32, warp = tid / 32;
  float* const S = memory.state;
  const std::int64_t base = offset_of(from, slot, h, first_row);
  for_each_element(rows, K, from.strides[2], from.strides[3],
                   [&](int v, int i) { S[v * K + i] = load_at(from, base + v * from.strides[2] + i * from.strides[3]); });
  const auto& window = p.window;
  const std::int64_t keys = offset_of(window.keys, slot, h / p.k_group.count);
  const std::int64_t corrections = offset_of(window.corrections, slot, h, 0, first_row);
  for (int begin = 0; begin < what.length; begin += memory.entries) {
    const int count = min(memory.entries, what.length - begin);
    for (int j = warp; j < count; j += block_warps) {
      const std::int64_t place = what.places[begin + j], key = keys + place * window.keys.strides[2],
                         correction = corrections + place * window.corrections.strides[2];
#pragma unroll 4
      for (int i = lane; i < K; i += 32) memory.keys[j * K + i] = load_at(window.keys, key + i);
      for (int v = lane; v < rows; v += 32)
        memory.corrections[j * memory.pitch + v] = load_at(window.corrections, correction + v);
    }
    if (tid < count) decays[tid] = expf(load(window.decays, slot, h, what.places[begin + tid]));
    __syncthreads();
    // A warp takes four value rows, a thread one of their keys at a time.
    for (int first = 4 * warp; first < rows; first += 4 * block_warps)
      for (int i = lane; i < K; i += 32) {
        float* const s = S + first * K + i;
        float x[4];
#pragma unroll
        for (int v = 0; v < 4; ++v) x[v] = first + v < rows ? s[v * K] : 0.0f;
        const float *key = memory.keys + i, *of_rows = memory.corrections + first;
#pragma unroll 4
        for (int j = 0; j < count; ++j, key += K, of_rows += memory.pitch) {
          const float4 u = *reinterpret_cast<const float4*>(of_rows);
          const float decay = decays[j];
          x[0] = fmaf(u.x, *key, decay * x[0]), x[1] = fmaf(u.y, *key, decay * x[1]);
          x[2] = fmaf(u.z, *key, decay * x[2]), x[3] = fmaf(u.w, *key, decay * x[3]);
        }
#pragma unroll
        for (int v = 0; v < 4; ++v)
          if (first + v < rows) s[v * K] = x[v];
      }
    __syncthreads();
  }
  __syncthreads();
}

template <class P, class State>
__device__ void store_slice(const P& p, const State& to, std::int64_t at, unsigned h, std::int64_t first_row, int rows,
                            const float* S) {
  const std::int64_t base = offset_of(to, at, h, first_row);
  for_each_element(rows, p.key_dim, to.strides[2], to.strides[3], [&](int v, int i) {
    store_at(to, base + v * to.strides[2] + i * to.strides[3], S == nullptr ? 0.0f : S[v * p.key_dim + i]);
  });
}

__device__ inline float as_stored(float x, DType entries) {
  return entries == DType::bf16 ? __bfloat162float(__float2bfloat16_rn(x)) : x;
}

__global__ void __launch_bounds__(block_threads, 4)
    replay_forward_kernel(const __grid_constant__ ReplayParams<ForwardParams> p) {
  extern __shared__ float4 dynamic[];
  __shared__ SharedRecord known;
  __shared__ double path_decay, norms[3], since[max_window], log_decays[max_window], betas[max_window];
  __shared__ float mixes[2][max_window];
  __shared__ int path[max_window], path_length, parents[max_window];
  const int K = p.key_dim, tid = static_cast<int>(threadIdx.x), lane = tid % 32, warp = tid / 32;
  const SliceMemory memory(reinterpret_cast<float*>(dynamic), p.slice_rows, K);
  const float* const S = memory.state;
  float *const q = memory.keys, *const k = q + K;
  float* const corrections = memory.corrections;  // [T][slice_rows], as stored
  const unsigned slices = p.slices, heads = p.heads;
  const unsigned n = blockIdx.x / (slices * heads), h = blockIdx.x / slices % heads, slice = blockIdx.x % slices;
  const std::int64_t first_row = static_cast<std::int64_t>(slice) * p.slice_rows;
  const int rows = static_cast<int>(min(static_cast<std::int64_t>(p.slice_rows), p.value_dim - first_row));
  const auto& window = p.window;
  const DType entries = window.keys.dtype;

  wait_for_inputs(p);
  if (!has_row(p, n, h, first_row, rows)) return;
  Row row = resolve(p, n, source_slot(p, n));
  bool good = row.source >= 0 && has_room(p, n, row.tokens, true);
  if (good && p.parent.data != nullptr) {
    bool bad = false;
    for (int t = tid; t < row.tokens; t += block_threads) {
      parents[t] = parent_at(p, row.batch, row.first_token + t);
      bad |= !is_parent(p, n, parents[t], t, true);
    }
    good = !__syncthreads_or(bad);
  }
  if (!good || !fetch_record(p, row.source, n, known)) {
    zero_outputs(p, row.batch, row.first_token, row.first_token + row.tokens, h, first_row, rows);
    return;
  }
  if (tid < row.tokens) {
    GateInputs inputs;
    inputs.fetch(p, row.batch, row.first_token + tid, h);
    betas[tid] = inputs.beta<double>(p);
    const auto g = static_cast<float>(inputs.log_decay<double>(p));
    log_decays[tid] = g;
    if (slice == 0) store_at(window.decays, offset_of(window.decays, row.source, h, known.places[known.length + tid]), g);
  }
  load_replayed(p, p.state_read, known, row.source, h, first_row, rows, memory);
  if (known.length + row.tokens > window.capacity) store_slice(p, p.state_write, row.source, h, first_row, rows, S);

  const auto raw_key = [&](std::int64_t token, int i) { return load(p.k, row.batch, token, h / p.k_group.count, i); };
  for (int t = 0; t < row.tokens; ++t) {
    const std::int64_t token = row.first_token + t, place = known.places[known.length + t];
    for (int i = tid; i < K; i += block_threads) {
      q[i] = load(p.q, row.batch, token, h / p.q_group.count, i);
      k[i] = raw_key(token, i);
      if (h % p.k_group.count == 0 && slice == 0)
        store_at(window.keys, offset_of(window.keys, row.source, h / p.k_group.count, place, i), k[i]);
    }
    if (tid == 0) {
      double sum = log_decays[t];
      path_length = 0;
      for (int j = p.parent.data != nullptr ? parents[t] : t - 1; j >= 0; j = p.parent.data != nullptr ? parents[j] : j - 1) {
        since[path_length] = sum;
        path[path_length++] = j;
        sum += log_decays[j];
      }
      path_decay = exp(sum);
    }
    __syncthreads();
    if (warp < 3) {
      double sum = 0;
      for (int i = lane; i < K; i += 32) sum += static_cast<double>(warp == 1 ? k[i] : q[i]) * (warp == 0 ? q[i] : k[i]);
      sum = warp_sum(sum);
      if (lane == 0) norms[warp] = warp < 2 ? p.l2norm ? 1 / sqrt(sum + static_cast<double>(p.l2_eps)) : 1.0 : sum;
    }
    // The entries that this token sees: products of raw keys and queries.
    for (int a = warp; a < path_length; a += block_warps) {
      double with_key = 0, with_query = 0;
      for (int i = lane; i < K; i += 32) {
        const double entry = as_stored(raw_key(row.first_token + path[a], i), entries);
        with_key += entry * k[i], with_query += entry * q[i];
      }
      with_key = warp_sum(with_key), with_query = warp_sum(with_query);
      const double factor = exp(since[a]);
      if (lane == 0) mixes[0][a] = static_cast<float>(factor * with_key), mixes[1][a] = static_cast<float>(factor * with_query);
    }
    __syncthreads();
    const double decay = path_decay, beta = betas[t], query_norm = norms[0], key_norm = norms[1];
    // A warp takes four value rows at a time, of which its first lanes finish one each.
    for (int first = 4 * warp; first < rows; first += 4 * block_warps) {
      const int own = first + lane;
      const bool finishes = lane < 4 && own < rows;
      float value = 0;
      if (finishes) value = load(p.v, row.batch, token, h / p.v_group.count, first_row + own);
      double recalled[4] = {}, out[4] = {};
      for (int i = lane; i < K; i += 32) {
        const double key = k[i], query = q[i];
#pragma unroll
        for (int v = 0; v < 4; ++v) {
          const double s = S[min(first + v, rows - 1) * K + i];
          recalled[v] += s * key, out[v] += s * query;
        }
      }
      double own_recalled = 0, own_out = 0;
#pragma unroll
      for (int v = 0; v < 4; ++v) {
        recalled[v] *= decay, out[v] *= decay;
        for (int a = lane; a < path_length; a += 32) {
          const double u = corrections[path[a] * p.slice_rows + min(first + v, rows - 1)];
          recalled[v] += mixes[0][a] * u, out[v] += mixes[1][a] * u;
        }
        recalled[v] = warp_sum(recalled[v]), out[v] = warp_sum(out[v]);
        if (lane == v) own_recalled = recalled[v], own_out = out[v];
      }
      if (!finishes) continue;
      const double u = beta * (value - key_norm * own_recalled) * key_norm;
      store_at(p.o, offset_of(p.o, row.batch, token, h, first_row + own),
               static_cast<float>(p.scale * query_norm * (own_out + norms[2] * u)));
      store_at(window.corrections, offset_of(window.corrections, row.source, h, place, first_row + own), static_cast<float>(u));
      corrections[t * p.slice_rows + own] = as_stored(static_cast<float>(u), entries);
    }
    __syncthreads();
  }
}

/// The slot of row n of a call for windows alone: -1 for padding and after a fault.
__device__ inline std::int64_t call_slot(const WindowCallParams& p, const Tensor<std::int64_t, 1>& slots, FaultKind kind,
                                         unsigned n) {
  if (slots.data == nullptr) return n;
  const std::int64_t slot = index_at(slots, n);
  if (slot <= p.null_slot) return -1;
  if (slot >= 0 && slot < p.pool) return slot;
  record(p.fault, kind, n, slot, p.pool);
  return -1;
}

/// Whether an earlier row has this slot too. For all threads of a block together.
__device__ inline bool is_again(const WindowCallParams& p, const Tensor<std::int64_t, 1>& slots, FaultKind kind, unsigned n,
                                std::int64_t slot) {
  bool again = false;
  if (slots.data != nullptr)
    for (unsigned m = threadIdx.x; m < n; m += blockDim.x) again |= index_at(slots, m) == slot;
  again = __syncthreads_or(again);
  if (again && threadIdx.x == 0) record(p.fault, kind, n, slot, 0);
  return again;
}

/// One block for each row, with a thread for each place of a ring.
__global__ void __launch_bounds__(2 * max_window) accept_kernel(const __grid_constant__ WindowCallParams p) {
  __shared__ SharedRecord known;
  __shared__ std::int32_t sorted[2 * max_window];
  __shared__ unsigned long long kept_tokens;
  const unsigned n = blockIdx.x;
  const int i = static_cast<int>(threadIdx.x);
  const std::int64_t slot = call_slot(p, p.slots, FaultKind::slots, n);
  if (slot < 0 || is_again(p, p.slots, FaultKind::slots_again, n, slot) || !fetch_record(p, slot, n, known)) return;
  const int P = known.length, ring = p.window.ring, room = p.window.room();
  const std::int64_t accepted = index_at(p.accepted, n);
  std::int64_t tokens = p.tokens;
  bool bad = false;
  if (p.cu_seqlens.data != nullptr) {
    tokens = index_at(p.cu_seqlens, n + 1) - index_at(p.cu_seqlens, n);
    if (tokens < 0 || tokens > room) record(p.fault, FaultKind::window_room, n, tokens, room), bad = true;
  }
  if (!bad && (accepted < 0 || accepted > tokens)) record(p.fault, FaultKind::kept, n, accepted, tokens), bad = true;
  if (bad) return;
  if (i == 0) {
    kept_tokens = 0;
    std::int64_t last = -1;
    for (std::int64_t a = 0; a < accepted && !bad; ++a) {
      const std::int64_t token = p.path.data == nullptr ? a : a < p.path_room ? index_at(p.path, n, a) : -1;
      bad = token <= last || token >= tokens;
      if (bad) record(p.fault, FaultKind::path, n, token, tokens);
      if (!bad) kept_tokens |= 1ull << token;
      last = token;
    }
  }
  if (__syncthreads_or(bad)) return;
  // The kept tokens come first, the others' places are free behind them.
  if (i < ring) {
    int to = i;
    if (const int t = i - P; t >= 0 && t < tokens) {
      const unsigned long long below = (1ull << t) - 1;
      to = P +
           (kept_tokens >> t & 1 ? __popcll(kept_tokens & below) : static_cast<int>(accepted) + __popcll(~kept_tokens & below));
    }
    sorted[to] = known.places[i];
  }
  __syncthreads();
  const bool folded = P + tokens > p.window.capacity;
  if (i < ring)
    static_cast<std::int32_t*>(p.window.order.data)[offset_of(p.window.order, slot, i)] = sorted[folded ? (i + P) % ring : i];
  if (i == 0)
    static_cast<std::int32_t*>(p.window.length.data)[offset_of(p.window.length, slot)] =
        static_cast<std::int32_t>((folded ? 0 : P) + accepted);
}

__global__ void __launch_bounds__(2 * max_window) reset_kernel(const __grid_constant__ WindowCallParams p) {
  const std::int64_t slot = call_slot(p, p.slots, FaultKind::slots, blockIdx.x);
  const auto i = static_cast<std::int32_t>(threadIdx.x);
  if (slot < 0) return;
  if (i < p.window.ring) static_cast<std::int32_t*>(p.window.order.data)[offset_of(p.window.order, slot, i)] = i;
  if (i == 0) static_cast<std::int32_t*>(p.window.length.data)[offset_of(p.window.length, slot)] = 0;
}

/// A block for each row, head and slice.
__global__ void __launch_bounds__(block_threads) fold_kernel(const __grid_constant__ WindowCallParams p) {
  extern __shared__ float4 dynamic[];
  __shared__ SharedRecord known;
  const SliceMemory memory(reinterpret_cast<float*>(dynamic), p.slice_rows, p.key_dim);
  const unsigned slices = p.slices, heads = p.heads;
  const unsigned n = blockIdx.x / (slices * heads), h = blockIdx.x / slices % heads;
  const std::int64_t first_row = static_cast<std::int64_t>(blockIdx.x % slices) * p.slice_rows;
  const int rows = static_cast<int>(min(static_cast<std::int64_t>(p.slice_rows), p.value_dim - first_row));
  const bool in_place = p.out.data == nullptr;
  const std::int64_t slot = call_slot(p, p.slots, FaultKind::slots, n);
  if (slot < 0 || (in_place && is_again(p, p.slots, FaultKind::slots_again, n, slot)) || !fetch_record(p, slot, n, known)) {
    if (!in_place) store_slice(p, p.out, n, h, first_row, rows, nullptr);
    return;
  }
  load_replayed(p, p.state, known, slot, h, first_row, rows, memory);
  in_place ? store_slice(p, p.state, slot, h, first_row, rows, memory.state)
           : store_slice(p, p.out, n, h, first_row, rows, memory.state);
}

/// Elements [rows, columns] of a tensor's last two dimensions.
template <int rank>
__device__ void copy_elements(const Tensor<std::int64_t, rank>& tensor, std::int64_t from, std::int64_t to, int rows,
                              int columns) {
  const std::int64_t row_stride = tensor.strides[rank - 2], column_stride = tensor.strides[rank - 1];
  for_each_element(rows, columns, row_stride, column_stride, [&](int i, int j) {
    const std::int64_t at = i * row_stride + j * column_stride;
    if (tensor.dtype == DType::f32 || tensor.dtype == DType::i32)
      static_cast<std::uint32_t*>(tensor.data)[to + at] = static_cast<const std::uint32_t*>(tensor.data)[from + at];
    else
      static_cast<std::uint16_t*>(tensor.data)[to + at] = static_cast<const std::uint16_t*>(tensor.data)[from + at];
  });
}

/// A block for each row and head; without a state, for the record alone, one for each row.
__global__ void __launch_bounds__(block_threads) copy_kernel(const __grid_constant__ WindowCallParams p) {
  const bool layer = p.state.data != nullptr;
  const unsigned heads = layer ? p.heads : 1, n = blockIdx.x / heads, h = blockIdx.x % heads;
  const std::int64_t from = call_slot(p, p.slots, FaultKind::from, n), to = call_slot(p, p.to, FaultKind::to, n);
  if (from < 0 || to < 0 || is_again(p, p.to, FaultKind::to_again, n, to)) return;
  bool read = false;
  for (std::int64_t m = threadIdx.x; m < p.rows; m += blockDim.x)
    if (index_at(p.slots, m) == to) record(p.fault, FaultKind::to_is_read, n, to, m), read = true;
  if (__syncthreads_or(read)) return;
  const auto& window = p.window;
  if (layer) {
    const auto copy = [&](const Tensor<std::int64_t, 4>& tensor, unsigned head, int rows, int columns) {
      copy_elements(tensor, offset_of(tensor, from, head), offset_of(tensor, to, head), rows, columns);
    };
    copy(p.state, h, p.value_dim, p.key_dim);
    copy(window.corrections, h, window.ring, p.value_dim);
    copy_elements(window.decays, offset_of(window.decays, from, h), offset_of(window.decays, to, h), 1, window.ring);
    if (h % p.k_group.count == 0) copy(window.keys, h / p.k_group.count, window.ring, p.key_dim);
  } else {
    copy_elements(window.order, offset_of(window.order, from), offset_of(window.order, to), 1, window.ring);
    if (threadIdx.x == 0)
      static_cast<std::int32_t*>(window.length.data)[offset_of(window.length, to)] =
          static_cast<std::int32_t>(index_at(window.length, from));
  }
}

}  // namespace gatedelta::cuda
