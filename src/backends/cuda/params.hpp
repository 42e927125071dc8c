// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "gatedelta/operator.hpp"

// What the host hands to the kernels: plain data, passed by value at the launch.
namespace gatedelta::cuda {

/// A TensorView without what the host has checked already. data is null where there is no tensor.
struct Strided {
  void* data = nullptr;
  DType dtype = DType::f32;
  std::int64_t strides[max_rank] = {};
};

struct ForwardParams {
  Strided q, k, v, o, a, g, A_log, dt_bias, b, beta;
  Strided state_read, state_write, read_slots, write_slots, token_slots, accepted, snapshots, cu_seqlens;
  Strided staged;             ///< [rows,H,V,K] in the workspace: sources that other rows store to
  std::int32_t* staged_rows;  ///< [rows]: 1 where `staged` is the row's source
  std::int64_t rows, tokens, slots, token_room, snapshot_room;
  std::int64_t heads, q_group, k_group, v_group;  ///< H and how many of its heads share one of q, k, v
  std::int64_t key_dim, value_dim, slice_rows, slices;
  std::int64_t null_slot;
  double l2_eps, softplus_beta, softplus_threshold, scale;
  GateForm gate;
  BetaForm beta_form;
  bool l2norm, initial_state, store_final, store_tokens;
};

struct CommitParams {
  Strided snapshots, accepted, state, write_slots;
  std::int64_t rows, room, slots, heads, key_dim, value_dim, null_slot;
};

enum class FaultKind : int { none, read_slots, write_slots, token_slots, accepted, cu_seqlens, token_room, snapshot_room };

/// The first fault since the last check on a device.
struct Fault {
  int kind;
  long long row, value, limit;
};

// The launches; all are asynchronous. Each returns the launch's own status.
cudaError_t launch_stage(const ForwardParams& params, cudaStream_t stream);
cudaError_t launch_forward(const ForwardParams& params, cudaStream_t stream);
cudaError_t launch_commit(const CommitParams& params, cudaStream_t stream);
/// Reads the current device's fault record after everything on the stream, and clears it if there is a fault.
cudaError_t take_fault(Fault& fault, cudaStream_t stream);

/// Value rows of a block, from the sizes alone: results do not depend on the batch.
constexpr std::int64_t max_key_dim = 3584;  ///< one row of the state, q and k fit into 48 KiB of shared memory
constexpr std::int64_t rows_of_slice(std::int64_t key_dim, std::int64_t value_dim) {
  const std::int64_t fitting = key_dim > 4096 ? 1 : 4096 / key_dim;
  return fitting < value_dim ? fitting : value_dim;
}

}  // namespace gatedelta::cuda
