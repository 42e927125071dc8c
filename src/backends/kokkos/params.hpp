// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "backends/kokkos/elements.hpp"
#include "core/faults.hpp"
#include "core/host_rows.hpp"
#include "gatedelta/backend.hpp"

// What the host hands to the kernels: plain data, part of the functor.
namespace gatedelta::kokkos {

/// A sum over the keys is kept in as many parts as a host's vectors have elements, so that the compiler may use vectors without
/// changing the result. On a GPU the lanes of a warp do that.
inline constexpr int parts = on_host ? 16 : 1;

/// K has to fit into a team's scratch memory with one row of the state, q and k.
inline constexpr std::int64_t max_key_dim = 1024;
inline constexpr std::int64_t slice_elements = 4096;
constexpr std::int64_t rows_of_slice(std::int64_t key_dim, std::int64_t value_dim) {
  return std::min(std::max<std::int64_t>(slice_elements / key_dim, 1), value_dim);
}
constexpr std::int64_t slices_of(std::int64_t key_dim, std::int64_t value_dim) {
  const std::int64_t rows = rows_of_slice(key_dim, value_dim);
  return (value_dim + rows - 1) / rows;
}

struct ForwardParams {
  TensorView q, k, v, o, gate, beta, A_log, dt_bias;  ///< gate: a or g; beta: b or beta
  TensorView state_read, state_write, snapshots;
  TensorView read_slots, write_slots, token_slots, accepted, cu_seqlens;
  GateForm gate_form;
  BetaForm beta_form;
  bool l2norm, initial_state, store_final, store_tokens;
  float scale;
  double l2_eps, softplus_beta, softplus_threshold;
  std::int64_t rows, tokens, slots, null_slot;
  int heads, q_group, k_group, v_group;
  int key_dim, value_dim;
  int slices, slice_rows;   ///< of a head; value rows of a slice
  int row_size;             ///< floats from one row of a slice to the next, in scratch memory
  const HostRow* resolved;  ///< on the host: the rows, with all slots checked; else each team resolves its own
  Fault* fault;             ///< on a device: the record
};

struct CommitParams {
  TensorView snapshots, state, accepted, write_slots;
  std::int64_t rows, slots, null_slot;
  int heads, key_dim, value_dim;
  Fault* fault;
};

inline ForwardParams make_params(const Call& call) {
  const Arguments& in = *call.arguments;
  const Problem& problem = call.problem;
  const Config& config = problem.config;
  ForwardParams p{};
  p.q = in.q, p.k = in.k, p.v = in.v, p.o = in.o;
  p.gate = config.gate == GateForm::raw ? in.a : in.g;
  p.beta = config.beta == BetaForm::value ? in.beta : in.b;
  p.A_log = in.A_log, p.dt_bias = in.dt_bias;
  p.state_read = call.state_read, p.state_write = call.state_write, p.snapshots = in.snapshots;
  p.read_slots = call.read_slots, p.write_slots = call.write_slots, p.token_slots = in.token_slots;
  p.accepted = in.accepted, p.cu_seqlens = in.cu_seqlens;
  p.gate_form = config.gate, p.beta_form = config.beta;
  p.l2norm = config.qk_l2norm, p.initial_state = problem.initial_state;
  p.store_final = problem.store_final, p.store_tokens = problem.store_tokens;
  p.scale = static_cast<float>(config.effective_scale()), p.l2_eps = config.l2_eps;
  p.softplus_beta = config.softplus_beta, p.softplus_threshold = config.softplus_threshold;
  p.rows = problem.rows, p.tokens = problem.tokens, p.slots = problem.slots, p.null_slot = config.null_slot;
  const std::int64_t heads = config.heads();
  p.heads = static_cast<int>(heads);
  p.q_group = static_cast<int>(heads / config.q_heads), p.k_group = static_cast<int>(heads / config.k_heads);
  p.v_group = static_cast<int>(heads / config.v_heads);
  p.key_dim = static_cast<int>(config.key_dim), p.value_dim = static_cast<int>(config.value_dim);
  p.slices = static_cast<int>(slices_of(config.key_dim, config.value_dim));
  p.slice_rows = static_cast<int>(rows_of_slice(config.key_dim, config.value_dim));
  // Odd on a GPU, so that a column's elements are in different banks.
  p.row_size = on_host ? (p.key_dim + parts - 1) / parts * parts : p.key_dim | 1;
  return p;
}

inline CommitParams make_params(const Config& config, const CommitArguments& in) {
  CommitParams p{};
  p.snapshots = in.snapshots, p.state = in.state, p.accepted = in.accepted, p.write_slots = in.write_slots;
  p.rows = in.snapshots.shape[0], p.slots = in.state.shape[0], p.null_slot = config.null_slot;
  p.heads = static_cast<int>(config.heads());
  p.key_dim = static_cast<int>(config.key_dim), p.value_dim = static_cast<int>(config.value_dim);
  return p;
}

}  // namespace gatedelta::kokkos
