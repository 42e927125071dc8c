// SPDX-License-Identifier: Apache-2.0
#include "backends/cuda/params.hpp"

#include <cstdlib>
#include <limits>

#include "gatedelta/backend.hpp"

namespace gatedelta::cuda {
namespace {

template <int rank>
void set(Tensor<std::int64_t, rank>& out, const TensorView& view) {
  if (!view.defined()) return;
  // An index or optional tensor without elements is never read, but that it was given counts.
  static char given;
  out.data = view.data == nullptr ? &given : view.data;
  out.dtype = view.dtype;
  // What is never multiplied by anything but zero says nothing about alignment.
  for (int dim = 0; dim < rank; ++dim) out.strides[dim] = view.shape[dim] == 1 ? 0 : view.strides[dim];
}

template <int rank>
bool narrow(const Tensor<std::int64_t, rank>& in, Tensor<std::int32_t, rank>& out) {
  out.data = in.data;
  out.dtype = in.dtype;
  for (int dim = 0; dim < rank; ++dim) {
    out.strides[dim] = static_cast<std::int32_t>(in.strides[dim]);
    if (out.strides[dim] != in.strides[dim]) return false;
  }
  return true;
}

WindowParams<std::int64_t> window_params(const ReplayWindow& in) {
  WindowParams<std::int64_t> p{};
  set(p.keys, in.keys), set(p.corrections, in.corrections), set(p.decays, in.decays);
  set(p.length, in.record.length), set(p.order, in.record.order);
  p.capacity = static_cast<std::int32_t>(in.record.capacity), p.ring = static_cast<std::int32_t>(in.record.order.shape[1]);
  return p;
}

WindowCallParams window_call(const Config& config, const ReplayWindow& window) {
  WindowCallParams p{};
  p.window = window_params(window);
  p.pool = window.record.length.shape[0], p.null_slot = config.null_slot;
  p.heads = static_cast<std::int32_t>(config.heads());
  p.key_dim = static_cast<std::int32_t>(config.key_dim), p.value_dim = static_cast<std::int32_t>(config.value_dim);
  p.slice_rows = static_cast<std::int32_t>(rows_of_replayed_slice(config.key_dim, config.value_dim));
  p.slices = (p.value_dim + p.slice_rows - 1) / p.slice_rows;
  p.k_group = make_group(config.heads() / config.k_heads);
  return p;
}

}  // namespace

Group make_group(std::int64_t count) {
  const auto reciprocal = ((std::int64_t{1} << 32) + count - 1) / count;
  return {static_cast<std::uint32_t>(count), count == 1 ? 0 : static_cast<std::uint32_t>(reciprocal)};
}

ForwardParams make_params(const Call& call) {
  const Arguments& in = *call.arguments;
  const Problem& problem = call.problem;
  const Config& config = problem.config;
  ForwardParams p{};
  set(p.q, in.q), set(p.k, in.k), set(p.v, in.v), set(p.o, in.o);
  set(p.gate, config.gate == GateForm::raw ? in.a : in.g);
  set(p.beta, config.beta == BetaForm::value ? in.beta : in.b);
  set(p.A_log, in.A_log), set(p.dt_bias, in.dt_bias);
  set(p.state_read, call.state_read), set(p.state_write, call.state_write);
  set(p.read_slots, call.read_slots), set(p.write_slots, call.write_slots);
  set(p.token_slots, in.token_slots), set(p.accepted, in.accepted);
  set(p.snapshots, in.snapshots), set(p.cu_seqlens, in.cu_seqlens);
  p.rows = problem.rows, p.tokens = problem.tokens, p.slots = problem.slots;
  p.token_room = in.token_slots.defined() ? in.token_slots.shape[1] : 0;
  p.snapshot_room = in.snapshots.defined() ? in.snapshots.shape[1] : 0;
  const std::int64_t heads = config.heads();
  p.heads = static_cast<std::int32_t>(heads);
  p.q_group = make_group(heads / config.q_heads), p.k_group = make_group(heads / config.k_heads);
  p.v_group = make_group(heads / config.v_heads);
  p.key_dim = static_cast<std::int32_t>(config.key_dim), p.value_dim = static_cast<std::int32_t>(config.value_dim);
  p.slice_rows = static_cast<std::int32_t>(rows_of_slice(config.key_dim, config.value_dim));
  p.slices = (p.value_dim + p.slice_rows - 1) / p.slice_rows;
  p.null_slot = config.null_slot;
  p.l2_eps = static_cast<float>(config.l2_eps), p.scale = static_cast<float>(config.effective_scale());
  p.softplus_beta = static_cast<float>(config.softplus_beta);
  p.softplus_threshold = static_cast<float>(config.softplus_threshold);
  p.state_dtype = config.dtypes.state;
  p.gate_form = config.gate, p.beta_form = config.beta, p.l2norm = config.qk_l2norm;
  p.vector_keys = has_vectors(p.q, 3, 8) && has_vectors(p.k, 3, 8), p.dependent = in.dependent_launch;
  p.initial_state = problem.initial_state, p.store_final = problem.store_final, p.store_tokens = problem.store_tokens;
  return p;
}

bool narrow(const ForwardParams& in, FastParams& out) {
  out.state_read = in.state_read, out.state_write = in.state_write, out.snapshots = in.snapshots;
  out.q_group = in.q_group, out.k_group = in.k_group, out.v_group = in.v_group;
  out.value_dim = in.value_dim, out.heads = in.heads, out.key_dim = in.key_dim;
  out.l2_eps = in.l2_eps, out.scale = in.scale;
  out.softplus_beta = in.softplus_beta, out.softplus_threshold = in.softplus_threshold;
  out.state_dtype = in.state_dtype, out.gate_form = in.gate_form, out.beta_form = in.beta_form;
  out.l2norm = in.l2norm, out.initial_state = in.initial_state;
  out.store_final = in.store_final, out.store_tokens = in.store_tokens;
  out.vector_keys = in.vector_keys, out.dependent = in.dependent;
  out.slots = in.slots, out.null_slot = in.null_slot, out.fault = in.fault, out.rows = in.rows, out.tokens = in.tokens;
  out.token_room = in.token_room, out.snapshot_room = in.snapshot_room;
  return in.slots <= std::numeric_limits<std::int32_t>::max() && narrow(in.read_slots, out.read_slots) &&
         narrow(in.write_slots, out.write_slots) && narrow(in.q, out.q) && narrow(in.k, out.k) && narrow(in.v, out.v) &&
         narrow(in.o, out.o) && narrow(in.gate, out.gate) && narrow(in.beta, out.beta) && narrow(in.A_log, out.A_log) &&
         narrow(in.dt_bias, out.dt_bias) && narrow(in.token_slots, out.token_slots) && narrow(in.accepted, out.accepted) &&
         narrow(in.cu_seqlens, out.cu_seqlens);
}

bool narrow(const ReplayParams<ForwardParams>& in, ReplayParams<FastParams>& out) {
  const auto& from = in.window;
  auto& to = out.window;
  to.capacity = from.capacity, to.ring = from.ring;
  // How far a place is from the first one has 32 bits, too.
  const auto is_near = [&](std::int64_t stride) {
    return std::abs(stride) <= std::numeric_limits<std::int32_t>::max() / from.ring;
  };
  return from.ring > 0 && is_near(from.keys.strides[2]) && is_near(from.corrections.strides[2]) &&
         narrow(static_cast<const ForwardParams&>(in), static_cast<FastParams&>(out)) && narrow(in.parent, out.parent) &&
         narrow(from.length, to.length) && narrow(from.order, to.order) && narrow(from.corrections, to.corrections) &&
         narrow(from.keys, to.keys) && narrow(from.decays, to.decays);
}

ReplayParams<ForwardParams> make_replay_params(const Call& call) {
  const Arguments& in = *call.arguments;
  const Config& config = call.problem.config;
  ReplayParams<ForwardParams> p{};
  static_cast<ForwardParams&>(p) = make_params(call);
  set(p.state_write, in.state);  // the checkpoints
  p.window = window_params(*in.window);
  set(p.parent, in.parent);
  p.slice_rows = static_cast<std::int32_t>(rows_of_replayed_slice(config.key_dim, config.value_dim));
  p.slices = (p.value_dim + p.slice_rows - 1) / p.slice_rows;
  return p;
}

CommitParams make_params(const Config& config, const CommitArguments& in) {
  CommitParams p{};
  set(p.snapshots, in.snapshots), set(p.accepted, in.accepted);
  set(p.state, in.state), set(p.write_slots, in.write_slots);
  p.rows = in.snapshots.shape[0], p.room = in.snapshots.shape[1], p.slots = in.state.shape[0];
  p.heads = config.heads(), p.key_dim = config.key_dim, p.value_dim = config.value_dim;
  p.null_slot = config.null_slot;
  return p;
}

WindowCallParams make_params(const Config& config, const AcceptArguments& in) {
  WindowCallParams p = window_call(config, {.record = in.record});
  set(p.slots, in.slots), set(p.accepted, in.accepted), set(p.cu_seqlens, in.cu_seqlens), set(p.path, in.path);
  p.rows = in.accepted.shape[0], p.tokens = in.tokens, p.path_room = in.path.defined() ? in.path.shape[1] : 0;
  return p;
}

WindowCallParams make_params(const Config& config, const ResetArguments& in) {
  WindowCallParams p = window_call(config, {.record = in.record});
  set(p.slots, in.slots);
  p.rows = in.slots.defined() ? in.slots.shape[0] : p.pool;
  return p;
}

WindowCallParams make_params(const Config& config, const FoldArguments& in) {
  WindowCallParams p = window_call(config, in.window);
  set(p.slots, in.slots), set(p.state, in.state), set(p.out, in.out);
  p.rows = in.slots.shape[0];
  return p;
}

WindowCallParams make_params(const Config& config, const ForkArguments& in) {
  WindowCallParams p = window_call(config, in.window);
  set(p.slots, in.from), set(p.to, in.to), set(p.state, in.state);
  p.rows = in.from.shape[0];
  return p;
}

}  // namespace gatedelta::cuda
