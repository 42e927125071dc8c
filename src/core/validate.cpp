// SPDX-License-Identifier: Apache-2.0
// The checks that every backend relies on, written once. Nothing here allocates unless a check fails.
#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <string>

#include "gatedelta/backend.hpp"
#include "gatedelta/error.hpp"

namespace gatedelta {
namespace {

[[noreturn]] void fail(const std::string& message) { throw Error(ErrorCode::invalid_argument, message); }

/// One expected dimension: a size, a minimum, or a symbol where any size will do.
struct Dim {
  const char* symbol = "";
  std::int64_t size = -1;
  bool minimum = false;

  bool admits(std::int64_t found) const { return size < 0 || found == size || (minimum && found > size); }
  std::string text() const { return size < 0 ? symbol : (minimum ? ">=" : "") + std::to_string(size); }
};

Dim any(const char* symbol) { return {symbol, -1, false}; }
Dim exactly(std::int64_t size) { return {"", size, false}; }
Dim at_least(std::int64_t size) { return {"", size, true}; }

std::string shape_text(const TensorView& tensor) {
  std::string text = "[";
  for (int i = 0; i < tensor.rank; ++i) text += (i ? ", " : "") + std::to_string(tensor.shape[i]);
  return text + "]";
}

void check_shape(const char* name, const TensorView& tensor, std::initializer_list<Dim> expected) {
  bool matches = tensor.rank == static_cast<int>(expected.size());
  int i = 0;
  for (const Dim& dim : expected) {
    if (!matches) break;
    matches = dim.admits(tensor.shape[i++]);
  }
  if (matches) return;
  std::string text;
  for (const Dim& dim : expected) text += (text.empty() ? "" : ", ") + dim.text();
  fail(std::string(name) + ": expected [" + text + "], got " + shape_text(tensor));
}

void check_memory(const char* name, const TensorView& tensor, Device device) {
  if (tensor.device != device)
    fail(std::string(name) + ": expected memory on " + name_of(device) + " like q, got " + name_of(tensor.device));
  if (tensor.data == nullptr && tensor.elements() > 0)
    fail(std::string(name) + ": expected " + std::to_string(tensor.elements()) + " elements, got a null pointer");
}

void check_tensor(const char* name, const TensorView& tensor, std::initializer_list<Dim> shape, DType dtype, Device device) {
  if (!tensor.defined()) fail(std::string(name) + ": required, but not given");
  check_shape(name, tensor, shape);
  if (tensor.dtype != dtype)
    fail(std::string(name) + ": expected dtype " + std::string(name_of(dtype)) + ", got " + std::string(name_of(tensor.dtype)));
  check_memory(name, tensor, device);
}

void check_index(const char* name, const TensorView& tensor, std::initializer_list<Dim> shape, Device device,
                 bool wide = true) {
  check_shape(name, tensor, shape);
  if (tensor.dtype != DType::i32 && !(wide && tensor.dtype == DType::i64))
    fail(std::string(name) + ": expected dtype " + (wide ? "i32 or i64" : "i32") + ", got " +
         std::string(name_of(tensor.dtype)));
  check_memory(name, tensor, device);
}

/// Two elements of an output at one address would make the result depend on the order of the stores.
void check_written(const char* name, const TensorView& tensor) {
  if (tensor.elements() == 0) return;  // dense strides are zero next to a size of zero
  for (int i = 0; i < tensor.rank; ++i)
    if (tensor.shape[i] > 1 && tensor.strides[i] == 0)
      fail(std::string(name) + ": is written, so dimension " + std::to_string(i) + " of size " +
           std::to_string(tensor.shape[i]) + " cannot have stride 0");
}

void check_absent(const char* name, const TensorView& tensor, const char* why) {
  if (tensor.defined()) fail(std::string(name) + ": given, but " + why);
}

void check_gates(const Config& config, const Arguments& in, std::int64_t batch, std::int64_t tokens, Device device) {
  const std::int64_t heads = config.heads();
  const DTypes& dtypes = config.dtypes;
  const auto per_token = {exactly(batch), exactly(tokens), exactly(heads)};
  if (config.gate == GateForm::raw) {
    check_absent("g", in.g, "the gate form is raw (a, A_log, dt_bias)");
    check_tensor("a", in.a, per_token, dtypes.gate, device);
    check_tensor("A_log", in.A_log, {exactly(heads)}, dtypes.A_log, device);
    if (in.dt_bias.defined()) check_tensor("dt_bias", in.dt_bias, {exactly(heads)}, dtypes.dt_bias, device);
  } else {
    const bool log_decay = config.gate == GateForm::log_decay;
    const char* why = log_decay ? "the gate form is log decay (g)" : "the gate form is none";
    check_absent("a", in.a, why);
    check_absent("A_log", in.A_log, why);
    check_absent("dt_bias", in.dt_bias, why);
    if (!log_decay) check_absent("g", in.g, why);
    if (log_decay && in.g.rank == 4)
      throw Error(ErrorCode::unsupported, "g: expected one decay per head [B, T, H], got " + shape_text(in.g) +
                                              " (a decay per key channel is not supported yet)");
    if (log_decay) check_tensor("g", in.g, per_token, dtypes.gate, device);
  }
  if (config.beta == BetaForm::logits || config.beta == BetaForm::twice_logits) {
    check_absent("beta", in.beta, "the beta form is logits (b)");
    check_tensor("b", in.b, per_token, dtypes.beta, device);
  } else {
    const bool value = config.beta == BetaForm::value;
    check_absent("b", in.b, value ? "the beta form is value (beta)" : "the beta form is one");
    if (value) check_tensor("beta", in.beta, per_token, dtypes.beta, device);
    if (!value) check_absent("beta", in.beta, "the beta form is one");
  }
}

/// Inner dimensions of a window's tensors are dense: only the slots may lie apart.
void check_dense_slots(const char* name, const TensorView& tensor) {
  check_written(name, tensor);
  std::int64_t stride = 1;
  for (int i = tensor.rank - 1; i > 0; --i) {
    if (tensor.shape[i] > 1 && tensor.strides[i] != stride)
      fail(std::string(name) + ": expected stride " + std::to_string(stride) + " in dimension " + std::to_string(i) + ", got " +
           std::to_string(tensor.strides[i]));
    stride *= tensor.shape[i];
  }
}

void check_record(const WindowRecord& record, Device device) {
  if (record.capacity < min_window || record.capacity > max_window)
    fail("window.capacity: expected " + std::to_string(min_window) + ".." + std::to_string(max_window) + ", got " +
         std::to_string(record.capacity));
  check_tensor("window.length", record.length, {any("slots")}, DType::i32, device);
  check_tensor("window.order", record.order, {exactly(record.length.shape[0]), at_least(record.capacity + 1)}, DType::i32,
               device);
  if (record.order.shape[1] > 2 * max_window)
    fail("window.order: expected [slots, <=" + std::to_string(2 * max_window) + "], got " + shape_text(record.order));
  check_written("window.length", record.length);
  check_dense_slots("window.order", record.order);
}

void check_window(const Config& config, const ReplayWindow& window, std::int64_t slots, Device device) {
  check_record(window.record, device);
  const Dim size = exactly(slots), heads = exactly(config.heads()), ring = exactly(window.record.order.shape[1]);
  if (window.record.length.shape[0] != slots) check_shape("window.length", window.record.length, {size});
  const DType dtype = window.keys.dtype;
  if (window.keys.defined() && dtype != DType::f32 && dtype != DType::bf16)
    fail("window.keys: expected dtype f32 or bf16, got " + std::string(name_of(dtype)));
  check_tensor("window.keys", window.keys, {size, exactly(config.k_heads), ring, exactly(config.key_dim)}, dtype, device);
  check_tensor("window.corrections", window.corrections, {size, heads, ring, exactly(config.value_dim)}, dtype, device);
  check_tensor("window.decays", window.decays, {size, heads, ring}, DType::f32, device);
  check_dense_slots("window.keys", window.keys);
  check_dense_slots("window.corrections", window.corrections);
  check_dense_slots("window.decays", window.decays);
}

Problem window_problem(const Config& config, const WindowRecord& record, std::int64_t rows, DType entries) {
  Problem problem;
  problem.config = config;
  problem.device = record.length.device;
  problem.rows = problem.batch = rows;
  problem.slots = record.length.shape[0];
  problem.window = true;
  problem.window_capacity = record.capacity;
  problem.window_entries = entries;
  return problem;
}

/// A call with a window: what the rest of check_states has seen is a pool with read slots at most.
void check_window_call(const Config& config, const Arguments& in, Call& call) {
  Problem& problem = call.problem;
  const char* why = "the call has a replay window";
  check_absent("write_slots", in.write_slots, why);
  check_absent("token_slots", in.token_slots, why);
  check_absent("snapshots", in.snapshots, why);
  if (!in.state.defined()) fail("state: required with a replay window, but not given");
  if (!in.update_state) fail("update_state: false, but the call has a replay window");
  check_window(config, *in.window, problem.slots, problem.device);
  const std::int64_t W = in.window->record.capacity, R = in.window->record.order.shape[1];
  if (!problem.variable_length && (problem.tokens > W || problem.tokens > R - W))
    fail("q: expected at most " + std::to_string(std::min(W, R - W)) + " tokens (capacity " + std::to_string(W) + ", ring " +
         std::to_string(R) + "), got " + shape_text(in.q));
  if (in.parent.defined())
    check_tensor("parent", in.parent, {exactly(problem.batch), exactly(problem.tokens)}, DType::i32, problem.device);
  problem.window = true;
  problem.window_capacity = W;
  problem.window_entries = in.window->keys.dtype;
  problem.tree = in.parent.defined();
  problem.store_final = false;
}

void check_states(const Config& config, const Arguments& in, Call& call) {
  Problem& problem = call.problem;
  const Device device = problem.device;
  const Dim rows = exactly(problem.rows), heads = exactly(config.heads()), value = exactly(config.value_dim),
            key = exactly(config.key_dim);
  const std::int64_t tokens = problem.variable_length ? 0 : problem.tokens;  // per row, as far as the host knows
  const DType dtype = config.dtypes.state;

  if (in.state.defined()) {
    check_absent("state_in", in.state_in, "a state pool is given as well");
    check_absent("state_out", in.state_out, "a state pool is given as well");
    check_tensor("state", in.state, {any("slots"), heads, value, key}, dtype, device);
    problem.slots = in.state.shape[0];
    if (in.accepted.defined()) {
      check_absent("read_slots", in.read_slots, "accepted picks the slots to read");
      if (!in.token_slots.defined()) fail("accepted: given, but there are no token_slots to pick from");
      check_index("accepted", in.accepted, {rows}, device, false);
    } else if (in.read_slots.defined()) {
      check_index("read_slots", in.read_slots, {rows}, device);
    } else if (problem.slots < problem.rows) {
      fail("state: expected a slot for each of " + std::to_string(problem.rows) + " rows as read_slots are not given, got " +
           shape_text(in.state));
    }
    if (in.write_slots.defined()) check_index("write_slots", in.write_slots, {rows}, device);
    if (in.token_slots.defined()) check_index("token_slots", in.token_slots, {rows, at_least(tokens)}, device);
    call.state_read = in.state;
    call.read_slots = in.read_slots;
    call.write_slots = in.write_slots;
    problem.initial_state = true;
    problem.accepted = in.accepted.defined();
    problem.store_tokens = in.update_state && in.token_slots.defined();
    problem.store_final = in.update_state && (!in.token_slots.defined() || in.write_slots.defined());
    if (in.update_state) {
      check_written("state", in.state);
      call.state_write = in.state;
    }
    return;
  }
  const char* why = "there is no state pool";
  check_absent("read_slots", in.read_slots, why);
  check_absent("write_slots", in.write_slots, why);
  check_absent("token_slots", in.token_slots, why);
  check_absent("accepted", in.accepted, why);
  problem.slots = problem.rows;
  if (in.state_in.defined()) {
    check_tensor("state_in", in.state_in, {rows, heads, value, key}, dtype, device);
    call.state_read = in.state_in;
    problem.initial_state = true;
  }
  if (in.state_out.defined()) {
    if (!in.update_state) fail("state_out: given, but update_state is false");
    check_tensor("state_out", in.state_out, {rows, heads, value, key}, dtype, device);
    check_written("state_out", in.state_out);
    call.state_write = in.state_out;
    problem.store_final = true;
  }
}

}  // namespace

void validate(const Config& config) {
  const std::int64_t heads = config.heads();
  const auto check_heads = [&](const char* name, std::int64_t count) {
    if (count < 1) fail(std::string(name) + ": expected at least 1, got " + std::to_string(count));
    if (heads % count != 0)
      fail(std::string(name) + ": expected a divisor of " + std::to_string(heads) + " (the largest head count), got " +
           std::to_string(count));
  };
  check_heads("q_heads", config.q_heads);
  check_heads("k_heads", config.k_heads);
  check_heads("v_heads", config.v_heads);
  if (config.key_dim < 1) fail("key_dim: expected at least 1, got " + std::to_string(config.key_dim));
  if (config.value_dim < 1) fail("value_dim: expected at least 1, got " + std::to_string(config.value_dim));
  const auto check_dtype = [](const char* name, DType dtype) {
    if (!is_floating(dtype))
      fail(std::string("dtypes.") + name + ": expected f32, f16 or bf16, got " + std::string(name_of(dtype)));
  };
  const DTypes& d = config.dtypes;
  check_dtype("q", d.q);
  check_dtype("k", d.k);
  check_dtype("v", d.v);
  check_dtype("o", d.o);
  check_dtype("gate", d.gate);
  check_dtype("beta", d.beta);
  check_dtype("A_log", d.A_log);
  check_dtype("dt_bias", d.dt_bias);
  check_dtype("state", d.state);
  check_dtype("snapshots", d.snapshots);
  const auto check_number = [](const char* name, double value, bool ok, const char* expected) {
    if (!ok) fail(std::string(name) + ": expected " + expected + ", got " + std::to_string(value));
  };
  check_number("l2_eps", config.l2_eps, std::isfinite(config.l2_eps) && config.l2_eps >= 0, "a finite number >= 0");
  check_number("scale", config.effective_scale(), std::isfinite(config.effective_scale()), "a finite number");
  check_number("softplus_beta", config.softplus_beta, std::isfinite(config.softplus_beta) && config.softplus_beta > 0,
               "a finite number > 0");
  check_number("softplus_threshold", config.softplus_threshold, !std::isnan(config.softplus_threshold), "a number");
  if (config.num_threads < 0) fail("num_threads: expected at least 0, got " + std::to_string(config.num_threads));
}

Call validate(const Config& config, const Arguments& in) {
  Call call;
  call.arguments = &in;
  Problem& problem = call.problem;
  problem.config = config;
  const DTypes& dtypes = config.dtypes;

  if (!in.q.defined()) fail("q: required, but not given");
  const Device device = in.q.device;
  problem.device = device;
  check_tensor("q", in.q, {any("B"), any("T"), exactly(config.q_heads), exactly(config.key_dim)}, dtypes.q, device);
  const std::int64_t batch = in.q.shape[0], tokens = in.q.shape[1];
  const Dim b = exactly(batch), t = exactly(tokens);
  check_tensor("k", in.k, {b, t, exactly(config.k_heads), exactly(config.key_dim)}, dtypes.k, device);
  check_tensor("v", in.v, {b, t, exactly(config.v_heads), exactly(config.value_dim)}, dtypes.v, device);
  check_tensor("o", in.o, {b, t, exactly(config.heads()), exactly(config.value_dim)}, dtypes.o, device);
  check_written("o", in.o);
  check_gates(config, in, batch, tokens, device);

  problem.batch = batch;
  problem.tokens = tokens;
  problem.rows = batch;
  if (in.cu_seqlens.defined()) {
    check_index("cu_seqlens", in.cu_seqlens, {any("N+1")}, device);
    if (in.cu_seqlens.shape[0] < 1) fail("cu_seqlens: expected at least 1 entry, got [0]");
    if (batch != 1) fail("q: expected [1, T, ...] as cu_seqlens are given, got " + shape_text(in.q));
    problem.rows = in.cu_seqlens.shape[0] - 1;
    problem.variable_length = true;
  }
  check_states(config, in, call);
  if (in.window != nullptr) check_window_call(config, in, call);
  if (in.window == nullptr) check_absent("parent", in.parent, "there is no replay window");
  if (in.snapshots.defined()) {
    const std::int64_t row_tokens = problem.variable_length ? 0 : tokens;
    check_tensor("snapshots", in.snapshots,
                 {exactly(problem.rows), at_least(row_tokens), exactly(config.heads()), exactly(config.value_dim),
                  exactly(config.key_dim)},
                 dtypes.snapshots, device);
    check_written("snapshots", in.snapshots);
    problem.snapshots = true;
  }
  return call;
}

void validate(const Config& config, const CommitArguments& in) {
  const Device device = in.snapshots.device;
  const Dim heads = exactly(config.heads()), value = exactly(config.value_dim), key = exactly(config.key_dim);
  check_tensor("snapshots", in.snapshots, {any("N"), any("S"), heads, value, key}, config.dtypes.snapshots, device);
  check_tensor("state", in.state, {any("slots"), heads, value, key}, config.dtypes.state, device);
  check_written("state", in.state);
  const Dim rows = exactly(in.snapshots.shape[0]);
  if (!in.accepted.defined()) fail("accepted: required, but not given");
  if (!in.write_slots.defined()) fail("write_slots: required, but not given");
  check_index("accepted", in.accepted, {rows}, device, false);
  check_index("write_slots", in.write_slots, {rows}, device);
}

Problem validate(const Config& config, const AcceptArguments& in) {
  const Device device = in.record.length.device;
  check_record(in.record, device);
  if (!in.accepted.defined()) fail("accepted: required, but not given");
  check_index("accepted", in.accepted, {any("N")}, device, false);
  const std::int64_t N = in.accepted.shape[0], W = in.record.capacity, most = std::min(W, in.record.order.shape[1] - W);
  if (in.slots.defined())
    check_index("slots", in.slots, {exactly(N)}, device);
  else if (in.record.length.shape[0] < N)
    fail("window.length: expected a slot for each of " + std::to_string(N) + " rows as slots are not given, got " +
         shape_text(in.record.length));
  if (in.cu_seqlens.defined()) {
    check_index("cu_seqlens", in.cu_seqlens, {exactly(N + 1)}, device);
  } else if (in.tokens < 0 || in.tokens > most) {
    fail("tokens: expected 0.." + std::to_string(most) + ", got " + std::to_string(in.tokens));
  }
  if (in.path.defined()) check_index("path", in.path, {exactly(N), any("tokens")}, device, false);
  return window_problem(config, in.record, N, DType::f32);
}

Problem validate(const Config& config, const ResetArguments& in) {
  const Device device = in.record.length.device;
  check_record(in.record, device);
  if (in.slots.defined()) check_index("slots", in.slots, {any("N")}, device);
  return window_problem(config, in.record, in.slots.defined() ? in.slots.shape[0] : in.record.length.shape[0], DType::f32);
}

Problem validate(const Config& config, const FoldArguments& in) {
  const Device device = in.state.device;
  const Dim heads = exactly(config.heads()), value = exactly(config.value_dim), key = exactly(config.key_dim);
  check_tensor("state", in.state, {any("slots"), heads, value, key}, config.dtypes.state, device);
  check_window(config, in.window, in.state.shape[0], device);
  if (!in.slots.defined()) fail("slots: required, but not given");
  check_index("slots", in.slots, {any("N")}, device);
  if (in.out.defined()) {
    if (!is_floating(in.out.dtype)) fail("out: expected dtype f32, f16 or bf16, got " + std::string(name_of(in.out.dtype)));
    check_tensor("out", in.out, {exactly(in.slots.shape[0]), heads, value, key}, in.out.dtype, device);
    check_written("out", in.out);
  } else {
    check_written("state", in.state);
  }
  return window_problem(config, in.window.record, in.slots.shape[0], in.window.keys.dtype);
}

Problem validate(const Config& config, const ForkArguments& in) {
  const WindowRecord& record = in.window.record;
  const Device device = record.length.device;
  if (in.state.defined()) {
    check_tensor("state", in.state, {any("slots"), exactly(config.heads()), exactly(config.value_dim), exactly(config.key_dim)},
                 config.dtypes.state, device);
    check_written("state", in.state);
    check_window(config, in.window, in.state.shape[0], device);
  } else {
    check_absent("window.keys", in.window.keys, "there is no state: only the record is copied");
    check_record(record, device);
  }
  if (!in.from.defined()) fail("from: required, but not given");
  if (!in.to.defined()) fail("to: required, but not given");
  check_index("from", in.from, {any("N")}, device);
  check_index("to", in.to, {exactly(in.from.shape[0])}, device);
  return window_problem(config, record, in.from.shape[0], in.window.keys.dtype);
}

}  // namespace gatedelta
