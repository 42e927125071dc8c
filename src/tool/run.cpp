// SPDX-License-Identifier: Apache-2.0
// gatedelta run: one call of the operator on the tensors of a file.
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <charconv>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <optional>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include "core/elements.hpp"
#include "device/host_calls.hpp"
#include "gatedelta/gatedelta.hpp"
#include "io/safetensors.hpp"
#include "tool/commands.hpp"

namespace gatedelta::tool {
namespace {

struct RunOptions {
  std::string input, output, backend;
  std::string gate, beta;  // empty: from the tensors that are there
  std::string out_dtype;   // empty: that of v
  std::string state_layout = "vk";
  Config config;
  std::optional<double> scale;
  bool no_l2norm = false, no_update = false, snapshots = false;
};

[[noreturn]] void fail(const std::string& message) { throw Error(ErrorCode::invalid_argument, message); }

/// A zeroed output tensor and its memory.
struct HostTensor {
  struct Free {
    void operator()(void* memory) const noexcept { std::free(memory); }
  };
  std::unique_ptr<void, Free> memory;
  TensorView view;
};

std::int64_t physical_memory() {
  return static_cast<std::int64_t>(sysconf(_SC_PHYS_PAGES)) * static_cast<std::int64_t>(sysconf(_SC_PAGESIZE));
}

HostTensor make_tensor(const char* name, DType dtype, const std::vector<std::int64_t>& shape) {
  auto bytes = static_cast<std::int64_t>(size_of(dtype));
  bool fits = true;
  for (const std::int64_t size : shape) fits = fits && !__builtin_mul_overflow(bytes, std::max<std::int64_t>(size, 1), &bytes);
  HostTensor tensor;
  // The system may promise more memory than it has and end the program later: ask for no more than there is.
  if (fits && bytes <= physical_memory()) tensor.memory.reset(std::calloc(static_cast<std::size_t>(bytes), 1));
  if (!tensor.memory) throw Error(ErrorCode::out_of_memory, std::string(name) + ": the output does not fit in memory");
  tensor.view = make_view(tensor.memory.get(), dtype, shape);
  return tensor;
}

TensorView optional_tensor(const io::SafetensorsFile& file, const char* name) {
  return file.contains(name) ? file.tensor(name) : TensorView{};
}

/// q, k and v set the configuration, so that their rank is needed before the library checks them.
const TensorView& heads_tensor(const io::SafetensorsFile& file, const char* name) {
  const TensorView& tensor = file.tensor(name);
  if (tensor.rank != 4)
    fail(std::string(name) + ": expected 4 dimensions (batch, token, head, channel), got " + std::to_string(tensor.rank));
  return tensor;
}

GateForm gate_form(const std::string& option, const io::SafetensorsFile& file) {
  if (option == "raw") return GateForm::raw;
  if (option == "log") return GateForm::log_decay;
  if (option == "none") return GateForm::none;
  const bool raw = file.contains("a") || file.contains("A_log") || file.contains("dt_bias"), log = file.contains("g");
  if (raw && log) fail("the input has gate tensors of two forms, raw (a, A_log, dt_bias) and log (g): choose one with --gate");
  return raw ? GateForm::raw : (log ? GateForm::log_decay : GateForm::none);
}

BetaForm beta_form(const std::string& option, const io::SafetensorsFile& file) {
  if (option == "logits") return BetaForm::logits;
  if (option == "logits2") return BetaForm::twice_logits;
  if (option == "value") return BetaForm::value;
  if (option == "one") return BetaForm::one;
  const bool logits = file.contains("b"), value = file.contains("beta");
  if (logits && value) fail("the input has beta tensors of two forms, logits (b) and value (beta): choose one with --beta");
  return logits ? BetaForm::logits : (value ? BetaForm::value : BetaForm::one);
}

/// The call's inputs, as the configuration wants them; other tensors of the file are of no interest.
Arguments collect_inputs(const io::SafetensorsFile& file, const RunOptions& options, const Config& config) {
  Arguments in;
  in.q = file.tensor("q");
  in.k = file.tensor("k");
  in.v = file.tensor("v");
  if (config.gate == GateForm::raw) {
    in.a = optional_tensor(file, "a");
    in.A_log = optional_tensor(file, "A_log");
    in.dt_bias = optional_tensor(file, "dt_bias");
  } else if (config.gate == GateForm::log_decay) {
    in.g = optional_tensor(file, "g");
  }
  if (config.beta == BetaForm::logits || config.beta == BetaForm::twice_logits) in.b = optional_tensor(file, "b");
  if (config.beta == BetaForm::value) in.beta = optional_tensor(file, "beta");
  in.state = optional_tensor(file, "state");
  if (options.state_layout == "kv" && in.state.rank == 4) in.state = in.state.transposed(2, 3);
  in.read_slots = optional_tensor(file, "read_slots");
  in.write_slots = optional_tensor(file, "write_slots");
  in.token_slots = optional_tensor(file, "token_slots");
  in.accepted = optional_tensor(file, "accepted");
  in.cu_seqlens = optional_tensor(file, "cu_seqlens");
  in.update_state = !options.no_update;
  return in;
}

void set_dtypes(Config& config, const Arguments& in, const std::string& out_dtype) {
  DTypes& dtypes = config.dtypes;
  const auto take = [](DType& dtype, const TensorView& tensor) {
    if (tensor.defined()) dtype = tensor.dtype;
  };
  take(dtypes.q, in.q);
  take(dtypes.k, in.k);
  take(dtypes.v, in.v);
  dtypes.o = out_dtype.empty() ? dtypes.v : dtype_from_name(out_dtype).value();
  take(dtypes.gate, in.a);
  take(dtypes.gate, in.g);
  take(dtypes.beta, in.b);
  take(dtypes.beta, in.beta);
  take(dtypes.A_log, in.A_log);
  take(dtypes.dt_bias, in.dt_bias);
  take(dtypes.state, in.state);
  dtypes.snapshots = dtypes.state;
}

/// The most tokens of a sequence. Entries that make no sense are left to the checks of the call.
std::int64_t longest_sequence(const TensorView& cu_seqlens, std::int64_t tokens) {
  std::int64_t longest = 0;
  if (cu_seqlens.rank != 1 || (cu_seqlens.dtype != DType::i32 && cu_seqlens.dtype != DType::i64)) return longest;
  for (std::int64_t n = 0; n + 1 < cu_seqlens.shape[0]; ++n) {
    const double begin = load(cu_seqlens, n), end = load(cu_seqlens, n + 1);
    if (0 <= begin && begin <= end && end <= static_cast<double>(tokens))
      longest = std::max(longest, static_cast<std::int64_t>(end - begin));
  }
  return longest;
}

/// The tensors that the call writes, and as what they go into the file.
class Outputs {
 public:
  /// Fills the written tensors of `call`.
  Outputs(const io::SafetensorsFile& file, const RunOptions& options, const Config& config, Arguments& call) {
    const bool kv = options.state_layout == "kv";
    const std::int64_t H = config.heads(), V = config.value_dim, K = config.key_dim;
    const std::int64_t batch = call.q.shape[0], tokens = call.q.shape[1];
    const std::int64_t rows = call.cu_seqlens.defined() ? std::max<std::int64_t>(call.cu_seqlens.shape[0] - 1, 0) : batch;
    const std::int64_t row_tokens = call.cu_seqlens.defined() ? longest_sequence(call.cu_seqlens, tokens) : tokens;
    const auto with_state_shape = [&](std::vector<std::int64_t> shape) {
      shape.insert(shape.end(), {H, kv ? K : V, kv ? V : K});
      return shape;
    };

    call.o = add("o", config.dtypes.o, {batch, tokens, H, V});
    if (call.state.defined()) {
      written_.emplace_back("state", file.tensor("state"));
    } else if (call.update_state) {
      call.state_out = add("state", config.dtypes.state, with_state_shape({rows}));
      if (kv) call.state_out = call.state_out.transposed(2, 3);
    }
    if (options.snapshots) {
      call.snapshots = add("snapshots", config.dtypes.snapshots, with_state_shape({rows, row_tokens}));
      if (kv) call.snapshots = call.snapshots.transposed(3, 4);
    }
  }

  void write(const std::string& path) const { io::write_safetensors(path, written_); }

 private:
  TensorView add(const char* name, DType dtype, const std::vector<std::int64_t>& shape) {
    memory_.push_back(make_tensor(name, dtype, shape));
    written_.emplace_back(name, memory_.back().view);
    return memory_.back().view;
  }

  std::vector<HostTensor> memory_;
  std::vector<std::pair<std::string, TensorView>> written_;
};

void run(const RunOptions& options) {
  const io::SafetensorsFile file = io::SafetensorsFile::read(options.input);
  const TensorView& q = heads_tensor(file, "q");
  const TensorView& k = heads_tensor(file, "k");
  const TensorView& v = heads_tensor(file, "v");
  // Rows without elements cost nothing in a file, but each costs memory in a call.
  constexpr std::int64_t max_empty_rows = 1 << 20;
  if (q.elements() == 0 && q.shape[0] > max_empty_rows)
    fail("q: expected at most " + std::to_string(max_empty_rows) + " rows without tokens, got " + std::to_string(q.shape[0]));

  Config config = options.config;
  config.q_heads = q.shape[2];
  config.k_heads = k.shape[2];
  config.v_heads = v.shape[2];
  config.key_dim = q.shape[3];
  config.value_dim = v.shape[3];
  config.gate = gate_form(options.gate, file);
  config.beta = beta_form(options.beta, file);
  config.scale = options.scale;
  config.qk_l2norm = !options.no_l2norm;
  Arguments call = collect_inputs(file, options, config);
  set_dtypes(config, call, options.out_dtype);

  const GatedDeltaRule rule(config, options.backend);
  const Outputs outputs(file, options, config, call);
  device::HostCalls(device::memory_for_name(options.backend)).forward(rule, call);
  outputs.write(options.output);
}

/// CLI11 takes the nearest number for one that does not fit.
std::string whole_number(const std::string& text) {
  std::int64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  return error == std::errc() && end == text.data() + text.size() ? "" : "expected a whole number, got " + io::in_quotes(text);
}

}  // namespace

void add_run_command(CLI::App& app) {
  CLI::App* command = app.add_subcommand("run", "Run the operator on the tensors of a safetensors file");
  command->footer(
      "Input tensors: q k v, a A_log dt_bias or g, b or beta, state, read_slots write_slots token_slots accepted, cu_seqlens;\n"
      "others are ignored. Output tensors: o, state (the whole pool after the call; without a pool the last states, from\n"
      "zero), snapshots if asked for (zeros after the end of a shorter sequence).");
  const auto options = std::make_shared<RunOptions>();
  RunOptions& o = *options;
  command->add_option("--input", o.input, "Safetensors file with the call's tensors")->required();
  command->add_option("--output", o.output, "Safetensors file to write")->required();
  command->add_option("--backend", o.backend,
                      "A backend of `gatedelta info` (tensors are copied to its device and back), or auto: a host backend "
                      "(default: $GATEDELTA_BACKEND "
                      "or auto)");
  command->add_option("--gate", o.gate, "Form of the gate (default: by the tensors)")
      ->check(CLI::IsMember({"raw", "log", "none"}));
  command->add_option("--beta", o.beta, "Form of beta (default: by the tensors)")
      ->check(CLI::IsMember({"logits", "logits2", "value", "one"}));
  command->add_option("--scale", o.scale, "Factor of the output (default: 1/sqrt(K))");
  command->add_flag("--no-l2norm", o.no_l2norm, "Take q and k as they are");
  command->add_option("--l2-eps", o.config.l2_eps, "Added to the sum of squares")->capture_default_str();
  command->add_option("--softplus-beta", o.config.softplus_beta, "softplus(x) = log(1 + exp(B x)) / B")->capture_default_str();
  command->add_option("--softplus-threshold", o.config.softplus_threshold, "softplus(x) = x where B x is above it")
      ->capture_default_str();
  command->add_option("--state-layout", o.state_layout, "Order of the last two dimensions of state and snapshots")
      ->check(CLI::IsMember({"vk", "kv"}))
      ->capture_default_str();
  command->add_flag("--no-update", o.no_update, "Only read the state");
  command->add_flag("--snapshots", o.snapshots, "Write the state after each token as well");
  command->add_option("--null-slot", o.config.null_slot, "Slots up to this one mark padding")
      ->check(whole_number)
      ->capture_default_str();
  command->add_option("--out-dtype", o.out_dtype, "dtype of o (default: that of v)")
      ->check(CLI::IsMember({"f32", "f16", "bf16"}));
  command->add_option("--threads", o.config.num_threads, "Threads of the host backends, 0: OpenMP's default")
      ->check(CLI::Range(0, 4096))
      ->capture_default_str();
  command->callback([options] { run(*options); });
}

}  // namespace gatedelta::tool
