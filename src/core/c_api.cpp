// SPDX-License-Identifier: Apache-2.0
// The C interface: structs are turned into those of the C++ interface, exceptions into codes and messages.
#include <mutex>
#include <new>
#include <set>
#include <string>

#include "core/versioned.hpp"
#include "gatedelta/gatedelta.h"
#include "gatedelta/gatedelta.hpp"

using namespace gatedelta;

struct gatedelta_rule {
  GatedDeltaRule rule;
};

namespace {

/// Enumerators have the same values on both sides; those of C are checked to be in range.
template <class Enum>
Enum enumerator(const std::string& name, std::int32_t value, Enum last) {
  if (value < 0 || value > static_cast<std::int32_t>(last))
    throw Error(ErrorCode::invalid_argument, name + ": expected a value from 0 to " +
                                                 std::to_string(static_cast<std::int32_t>(last)) + ", got " +
                                                 std::to_string(value));
  return static_cast<Enum>(value);
}
#define SAME(c, cpp) static_assert(static_cast<std::int32_t>(c) == static_cast<std::int32_t>(cpp))
SAME(GATEDELTA_ERROR_INVALID_ARGUMENT, ErrorCode::invalid_argument);
SAME(GATEDELTA_ERROR_UNSUPPORTED, ErrorCode::unsupported);
SAME(GATEDELTA_ERROR_OUT_OF_MEMORY, ErrorCode::out_of_memory);
SAME(GATEDELTA_ERROR_DEVICE, ErrorCode::device);
SAME(GATEDELTA_F32, DType::f32);
SAME(GATEDELTA_F16, DType::f16);
SAME(GATEDELTA_BF16, DType::bf16);
SAME(GATEDELTA_I32, DType::i32);
SAME(GATEDELTA_I64, DType::i64);
SAME(GATEDELTA_DEVICE_CPU, DeviceType::cpu);
SAME(GATEDELTA_DEVICE_CUDA, DeviceType::cuda);
SAME(GATEDELTA_GATE_RAW, GateForm::raw);
SAME(GATEDELTA_GATE_LOG_DECAY, GateForm::log_decay);
SAME(GATEDELTA_GATE_NONE, GateForm::none);
SAME(GATEDELTA_BETA_LOGITS, BetaForm::logits);
SAME(GATEDELTA_BETA_TWICE_LOGITS, BetaForm::twice_logits);
SAME(GATEDELTA_BETA_VALUE, BetaForm::value);
SAME(GATEDELTA_BETA_ONE, BetaForm::one);
#undef SAME

struct LastError {
  std::string text;
  const char* shown = "";
  void set(const char* message) noexcept {
    try {
      shown = text.assign(message).c_str();
    } catch (...) {
      shown = "host memory is exhausted";
    }
  }
};
thread_local LastError last_error;
thread_local std::string last_text;  // of descriptions and reasons

/// Runs a function of the C++ interface; no exception leaves it.
template <class Function>
gatedelta_status guarded(Function function) noexcept {
  try {
    function();
    return GATEDELTA_SUCCESS;
  } catch (const Error& error) {
    last_error.set(error.what());
    return static_cast<gatedelta_status>(error.code());
  } catch (const std::bad_alloc&) {
    last_error.set("host memory is exhausted");
    return GATEDELTA_ERROR_OUT_OF_MEMORY;
  } catch (const std::exception& error) {
    last_error.set(error.what());
  } catch (...) {
    last_error.set("an exception of unknown type");
  }
  return GATEDELTA_ERROR_OTHER;
}

template <class Type>
Type& required(const char* name, Type* pointer) {
  if (pointer == nullptr)
    throw Error(ErrorCode::invalid_argument, std::string(name) + ": expected an address, got a null pointer");
  return *pointer;
}

/// Names live as long as the process, whatever becomes of a backend that was added at run time.
const char* lasting(std::string_view name) {
  static std::mutex mutex;
  static auto& names = *new std::set<std::string, std::less<>>;  // never freed: pointers into it were given away
  const std::lock_guard lock(mutex);
  return names.emplace(name).first->c_str();
}

gatedelta_config default_config() {
  const Config c;
  gatedelta_config out{};
  out.size = sizeof out;
  out.qk_l2norm = c.qk_l2norm;
  out.num_threads = c.num_threads;
  out.l2_eps = c.l2_eps;
  out.softplus_beta = c.softplus_beta;
  out.softplus_threshold = c.softplus_threshold;
  out.null_slot = c.null_slot;
  return out;
}

gatedelta_arguments default_arguments() {
  gatedelta_arguments out{};
  out.size = sizeof out;
  out.update_state = 1;
  return out;
}

/// Of structs in which everything is zero, but for the size.
template <class Struct>
Struct zeros() {
  Struct out{};
  out.size = sizeof out;
  return out;
}

Config config_from(const gatedelta_config* given) {
  const gatedelta_config c = read_versioned("config", given, default_config());
  if (c.reserved != 0)
    throw Error(ErrorCode::invalid_argument, "config.reserved: expected 0, got " + std::to_string(c.reserved));
  const auto dtype = [](const char* name, gatedelta_dtype value) {
    return enumerator(std::string("dtypes.") + name, value, DType::i64);
  };
  Config out;
  out.q_heads = c.q_heads;
  out.k_heads = c.k_heads;
  out.v_heads = c.v_heads;
  out.key_dim = c.key_dim;
  out.value_dim = c.value_dim;
  out.dtypes.q = dtype("q", c.q_dtype);
  out.dtypes.k = dtype("k", c.k_dtype);
  out.dtypes.v = dtype("v", c.v_dtype);
  out.dtypes.o = dtype("o", c.o_dtype);
  out.dtypes.gate = dtype("gate", c.gate_dtype);
  out.dtypes.beta = dtype("beta", c.beta_dtype);
  out.dtypes.A_log = dtype("A_log", c.A_log_dtype);
  out.dtypes.dt_bias = dtype("dt_bias", c.dt_bias_dtype);
  out.dtypes.state = dtype("state", c.state_dtype);
  out.dtypes.snapshots = dtype("snapshots", c.snapshots_dtype);
  out.gate = enumerator("gate", c.gate, GateForm::none);
  out.beta = enumerator("beta", c.beta, BetaForm::one);
  out.qk_l2norm = c.qk_l2norm != 0;
  out.l2_eps = c.l2_eps;
  if (c.has_scale != 0) out.scale = c.scale;
  out.softplus_beta = c.softplus_beta;
  out.softplus_threshold = c.softplus_threshold;
  out.null_slot = c.null_slot;
  out.num_threads = c.num_threads;
  return out;
}

/// A view of a tensor that the call is made with; not defined where it is made without.
TensorView view_from(const char* name, const gatedelta_tensor* given) {
  if (given == nullptr) return {};
  gatedelta_tensor defaults{};
  const gatedelta_tensor t = read_versioned(name, given, defaults);
  if (t.rank < 1 || t.rank > max_rank)
    throw Error(ErrorCode::invalid_argument, std::string(name) + ": expected 1 to 5 dimensions, got " + std::to_string(t.rank));
  const auto rank = static_cast<std::size_t>(t.rank);
  const std::int64_t* shape = &required((std::string(name) + ".shape").c_str(), t.shape);
  for (std::size_t i = 0; i < rank; ++i)
    if (shape[i] < 0)
      throw Error(ErrorCode::invalid_argument, std::string(name) + ": dimension " + std::to_string(i) +
                                                   " has the negative size " + std::to_string(shape[i]));
  const Device device = {enumerator(std::string(name) + ".device_type", t.device_type, DeviceType::cuda), t.device_index};
  const std::span<const std::int64_t> strides(t.strides, t.strides == nullptr ? 0 : rank);
  return make_view(t.data, enumerator(std::string(name) + ".dtype", t.dtype, DType::i64), {shape, rank}, strides, device);
}

/// The tensors of a window, or of its record alone where it has no layer.
ReplayWindow window_from(const gatedelta_window* given) {
  const gatedelta_window w = read_versioned("window", given, zeros<gatedelta_window>());
  const gatedelta_window_layout l = read_versioned("window.layout", w.layout, zeros<gatedelta_window_layout>());
  WindowLayout layout;
  layout.capacity = l.capacity;
  layout.ring = l.ring;
  layout.entries = enumerator("window.layout.entries", l.entries, DType::i64);
  layout.keys = {l.slots, l.k_heads, l.ring, l.key_dim};
  layout.corrections = {l.slots, l.heads, l.ring, l.value_dim};
  layout.decays = {l.slots, l.heads, l.ring};
  layout.order = {l.slots, l.ring};
  const Device device = {enumerator("window.device_type", w.device_type, DeviceType::cuda), w.device_index};
  if (w.record == nullptr) throw Error(ErrorCode::invalid_argument, "window.record: expected an address, got a null pointer");
  return window_at(layout, w.layer, w.record, device);
}

/// A call and the window that it points to, which therefore stay together.
struct TranslatedCall : Arguments {
  ReplayWindow layer_window;
  explicit TranslatedCall(const gatedelta_arguments* given);
  TranslatedCall(const TranslatedCall&) = delete;
};

TranslatedCall::TranslatedCall(const gatedelta_arguments* given) {
  const gatedelta_arguments a = read_versioned("arguments", given, default_arguments());
  Arguments& out = *this;
#define TENSOR(name) out.name = view_from(#name, a.name)
  TENSOR(q);
  TENSOR(k);
  TENSOR(v);
  TENSOR(o);
  TENSOR(a);
  TENSOR(g);
  TENSOR(A_log);
  TENSOR(dt_bias);
  TENSOR(b);
  TENSOR(beta);
  TENSOR(state);
  TENSOR(read_slots);
  TENSOR(write_slots);
  TENSOR(token_slots);
  TENSOR(accepted);
  TENSOR(state_in);
  TENSOR(state_out);
  TENSOR(snapshots);
  TENSOR(cu_seqlens);
  out.update_state = a.update_state != 0;
  out.stream = a.stream;
  out.dependent_launch = a.dependent_launch != 0;
  out.workspace = a.workspace;
  out.workspace_size = static_cast<std::size_t>(a.workspace_size);
  TENSOR(parent);
  if (a.window == nullptr) return;
  layer_window = window_from(a.window);
  out.window = &layer_window;
}

CommitArguments commit_arguments_from(const gatedelta_commit_arguments* given) {
  const gatedelta_commit_arguments a = read_versioned("commit_arguments", given, zeros<gatedelta_commit_arguments>());
  CommitArguments out;
  TENSOR(snapshots);
  TENSOR(accepted);
  TENSOR(state);
  TENSOR(write_slots);
  out.stream = a.stream;
  return out;
}

AcceptArguments accept_arguments_from(const gatedelta_accept_arguments* given) {
  const gatedelta_accept_arguments a = read_versioned("accept_arguments", given, zeros<gatedelta_accept_arguments>());
  AcceptArguments out;
  out.record = window_from(a.window).record;
  TENSOR(slots);
  TENSOR(accepted);
  TENSOR(cu_seqlens);
  TENSOR(path);
  out.tokens = a.tokens;
  out.stream = a.stream;
  return out;
}

ResetArguments reset_arguments_from(const gatedelta_reset_arguments* given) {
  const gatedelta_reset_arguments a = read_versioned("reset_arguments", given, zeros<gatedelta_reset_arguments>());
  ResetArguments out;
  out.record = window_from(a.window).record;
  TENSOR(slots);
  out.stream = a.stream;
  return out;
}

FoldArguments fold_arguments_from(const gatedelta_fold_arguments* given) {
  const gatedelta_fold_arguments a = read_versioned("fold_arguments", given, zeros<gatedelta_fold_arguments>());
  FoldArguments out;
  out.window = window_from(a.window);
  TENSOR(state);
  TENSOR(slots);
  TENSOR(out);
  out.stream = a.stream;
  return out;
}

ForkArguments fork_arguments_from(const gatedelta_fork_arguments* given) {
  const gatedelta_fork_arguments a = read_versioned("fork_arguments", given, zeros<gatedelta_fork_arguments>());
  ForkArguments out;
  out.window = window_from(a.window);
  TENSOR(state);
  TENSOR(from);
  TENSOR(to);
#undef TENSOR
  out.stream = a.stream;
  return out;
}

/// Checks a call's configuration and then its arguments.
template <class Given>
gatedelta_status checked(const gatedelta_config* config, const Given& arguments_from) noexcept {
  return guarded([&] {
    const Config translated = config_from(config);
    validate(translated);
    validate(translated, arguments_from());
  });
}

Backend& backend_of(const char* name) {
  Backend* backend = find_backend(&required("backend", name));
  if (backend == nullptr) {
    std::string known;
    for (const Backend* other : backends()) known += (known.empty() ? "" : ", ") + std::string(other->name());
    throw Error(ErrorCode::invalid_argument, "backend: expected one of " + known + "; got \"" + name + "\"");
  }
  return *backend;
}

/// Answers yes or no, the latter with a reason.
void answer(std::int32_t* yes, const char** reason, const char* name, std::string why_not) {
  required(name, yes) = why_not.empty();
  last_text = std::move(why_not);
  if (reason != nullptr) *reason = last_text.c_str();
}

}  // namespace

extern "C" {

const char* gatedelta_version(void) { return version(); }

const char* gatedelta_last_error(void) { return last_error.shown; }

const char* gatedelta_status_name(gatedelta_status status) {
  return status == GATEDELTA_SUCCESS ? "success" : name_of(static_cast<ErrorCode>(status));
}

gatedelta_status gatedelta_config_init(gatedelta_config* config, size_t size) {
  return guarded([&] { init_versioned("config", config, size, default_config()); });
}

gatedelta_status gatedelta_arguments_init(gatedelta_arguments* arguments, size_t size) {
  return guarded([&] { init_versioned("arguments", arguments, size, default_arguments()); });
}

gatedelta_status gatedelta_commit_arguments_init(gatedelta_commit_arguments* arguments, size_t size) {
  return guarded([&] { init_versioned("commit_arguments", arguments, size, zeros<gatedelta_commit_arguments>()); });
}

gatedelta_status gatedelta_accept_arguments_init(gatedelta_accept_arguments* arguments, size_t size) {
  return guarded([&] { init_versioned("accept_arguments", arguments, size, zeros<gatedelta_accept_arguments>()); });
}

gatedelta_status gatedelta_reset_arguments_init(gatedelta_reset_arguments* arguments, size_t size) {
  return guarded([&] { init_versioned("reset_arguments", arguments, size, zeros<gatedelta_reset_arguments>()); });
}

gatedelta_status gatedelta_fold_arguments_init(gatedelta_fold_arguments* arguments, size_t size) {
  return guarded([&] { init_versioned("fold_arguments", arguments, size, zeros<gatedelta_fold_arguments>()); });
}

gatedelta_status gatedelta_fork_arguments_init(gatedelta_fork_arguments* arguments, size_t size) {
  return guarded([&] { init_versioned("fork_arguments", arguments, size, zeros<gatedelta_fork_arguments>()); });
}

gatedelta_status gatedelta_window_init(gatedelta_window* window, size_t size) {
  return guarded([&] { init_versioned("window", window, size, zeros<gatedelta_window>()); });
}

gatedelta_status gatedelta_window_layout_init(gatedelta_window_layout* layout, size_t size, const gatedelta_config* config,
                                              int64_t slots, int64_t capacity, gatedelta_dtype entries, int64_t max_tokens) {
  return guarded([&] {
    const Config translated = config_from(config);
    const WindowLayout found =
        window_layout(translated, slots, capacity, enumerator("entries", entries, DType::i64), max_tokens);
    auto out = zeros<gatedelta_window_layout>();
    out.slots = slots;
    out.capacity = found.capacity;
    out.ring = found.ring;
    out.k_heads = translated.k_heads;
    out.heads = translated.heads();
    out.key_dim = translated.key_dim;
    out.value_dim = translated.value_dim;
    out.entries = entries;
    out.layer_bytes = found.layer_bytes;
    out.record_bytes = found.record_bytes;
    init_versioned("layout", layout, size, out);
  });
}

gatedelta_status gatedelta_rule_create(const gatedelta_config* config, const char* backend, gatedelta_rule** rule) {
  return guarded([&] {
    required("rule", rule) = nullptr;
    *rule = new gatedelta_rule{GatedDeltaRule(config_from(config), backend == nullptr ? "" : backend)};
  });
}

void gatedelta_rule_destroy(gatedelta_rule* rule) { delete rule; }

gatedelta_status gatedelta_forward(const gatedelta_rule* rule, const gatedelta_arguments* arguments) {
  return guarded([&] { required("rule", rule).rule.forward(TranslatedCall(arguments)); });
}

gatedelta_status gatedelta_commit(const gatedelta_rule* rule, const gatedelta_commit_arguments* arguments) {
  return guarded([&] { required("rule", rule).rule.commit(commit_arguments_from(arguments)); });
}

gatedelta_status gatedelta_window_accept(const gatedelta_rule* rule, const gatedelta_accept_arguments* arguments) {
  return guarded([&] { required("rule", rule).rule.accept(accept_arguments_from(arguments)); });
}

gatedelta_status gatedelta_window_reset(const gatedelta_rule* rule, const gatedelta_reset_arguments* arguments) {
  return guarded([&] { required("rule", rule).rule.reset(reset_arguments_from(arguments)); });
}

gatedelta_status gatedelta_window_fold(const gatedelta_rule* rule, const gatedelta_fold_arguments* arguments) {
  return guarded([&] { required("rule", rule).rule.fold(fold_arguments_from(arguments)); });
}

gatedelta_status gatedelta_window_state_of(const gatedelta_rule* rule, const gatedelta_fold_arguments* arguments) {
  return guarded([&] { required("rule", rule).rule.state_of(fold_arguments_from(arguments)); });
}

gatedelta_status gatedelta_window_copy(const gatedelta_rule* rule, const gatedelta_fork_arguments* arguments) {
  return guarded([&] { required("rule", rule).rule.copy(fork_arguments_from(arguments)); });
}

gatedelta_status gatedelta_workspace_size(const gatedelta_rule* rule, const gatedelta_arguments* arguments, size_t* bytes) {
  return guarded([&] { required("bytes", bytes) = required("rule", rule).rule.workspace_size(TranslatedCall(arguments)); });
}

gatedelta_status gatedelta_backend_for(const gatedelta_rule* rule, const gatedelta_arguments* arguments, const char** name) {
  return guarded(
      [&] { required("name", name) = lasting(required("rule", rule).rule.backend_for(TranslatedCall(arguments)).name()); });
}

gatedelta_status gatedelta_validate_config(const gatedelta_config* config) {
  return guarded([&] { validate(config_from(config)); });
}

gatedelta_status gatedelta_validate(const gatedelta_config* config, const gatedelta_arguments* arguments) {
  return checked(config, [&] { return TranslatedCall(arguments); });
}

gatedelta_status gatedelta_validate_commit(const gatedelta_config* config, const gatedelta_commit_arguments* arguments) {
  return checked(config, [&] { return commit_arguments_from(arguments); });
}

gatedelta_status gatedelta_validate_accept(const gatedelta_config* config, const gatedelta_accept_arguments* arguments) {
  return checked(config, [&] { return accept_arguments_from(arguments); });
}

gatedelta_status gatedelta_validate_reset(const gatedelta_config* config, const gatedelta_reset_arguments* arguments) {
  return checked(config, [&] { return reset_arguments_from(arguments); });
}

gatedelta_status gatedelta_validate_fold(const gatedelta_config* config, const gatedelta_fold_arguments* arguments) {
  return checked(config, [&] { return fold_arguments_from(arguments); });
}

gatedelta_status gatedelta_validate_fork(const gatedelta_config* config, const gatedelta_fork_arguments* arguments) {
  return checked(config, [&] { return fork_arguments_from(arguments); });
}

gatedelta_status gatedelta_backend_count(size_t* count) {
  return guarded([&] { required("count", count) = backends().size(); });
}

gatedelta_status gatedelta_backend_name(size_t index, const char** name) {
  return guarded([&] {
    const std::vector<Backend*> all = backends();
    if (index >= all.size())
      throw Error(ErrorCode::invalid_argument,
                  "index: expected less than " + std::to_string(all.size()) + ", got " + std::to_string(index));
    required("name", name) = lasting(all[index]->name());
  });
}

gatedelta_status gatedelta_backend_description(const char* backend, const char** text) {
  return guarded([&] {
    required("text", text);
    last_text = backend_of(backend).description();
    *text = last_text.c_str();
  });
}

gatedelta_status gatedelta_backend_available(const char* backend, int32_t* available, const char** reason) {
  return guarded([&] {
    const Availability state = backend_of(backend).availability();
    // A backend added in C++ may have no reason to give.
    answer(available, reason, "available", state.available ? "" : state.reason.empty() ? "no reason given" : state.reason);
  });
}

gatedelta_status gatedelta_backend_reaches(const char* backend, gatedelta_device_type device_type, int32_t device_index,
                                           int32_t* reaches) {
  return guarded([&] {
    const Device device = {enumerator("device_type", device_type, DeviceType::cuda), device_index};
    required("reaches", reaches) = backend_of(backend).reaches(device);
  });
}

gatedelta_status gatedelta_backend_supports(const char* backend, const gatedelta_config* config,
                                            const gatedelta_arguments* arguments, int32_t* supported, const char** reason) {
  return guarded([&] {
    const Config translated = config_from(config);
    validate(translated);
    const TranslatedCall call(arguments);
    answer(supported, reason, "supported", backend_of(backend).unsupported_reason(validate(translated, call).problem));
  });
}

gatedelta_status gatedelta_check(const char* backend, void* stream) {
  return guarded([&] { backend_of(backend).check(stream); });
}

gatedelta_status gatedelta_synchronize(const char* backend, void* stream) {
  return guarded([&] { backend_of(backend).synchronize(stream); });
}

}  // extern "C"
