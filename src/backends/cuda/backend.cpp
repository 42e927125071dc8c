// SPDX-License-Identifier: Apache-2.0
// The host side: what can run here, the parameters of a launch, and the faults that kernels leave behind.
#include <algorithm>
#include <limits>
#include <string>
#include <vector>

#include "backends/cuda/params.hpp"
#include "core/builtin_backends.hpp"
#include "gatedelta/error.hpp"

namespace gatedelta {
namespace {

using namespace cuda;

constexpr std::int64_t max_blocks = std::numeric_limits<std::int32_t>::max();
constexpr int lowest_compute_capability = 9;

void require(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  throw Error(status == cudaErrorMemoryAllocation ? ErrorCode::out_of_memory : ErrorCode::device,
              std::string("cuda: ") + what + ": " + cudaGetErrorString(status));
}

/// The devices as the process found them first.
struct Devices {
  std::vector<bool> usable;
  std::string reason;  // why none is
  std::string names;

  Devices() {
    int count = 0;
    const cudaError_t status = cudaGetDeviceCount(&count);
    if (status != cudaSuccess) {
      (void)cudaGetLastError();
      const bool no_driver = status == cudaErrorInsufficientDriver;
      reason = std::string(no_driver ? "no CUDA driver" : "no CUDA device") + ": " + cudaGetErrorString(status);
      return;
    }
    for (int i = 0; i < count; ++i) {
      cudaDeviceProp properties{};
      usable.push_back(cudaGetDeviceProperties(&properties, i) == cudaSuccess && properties.major >= lowest_compute_capability);
      if (usable.back()) names += (names.empty() ? "" : ", ") + std::string(properties.name);
    }
    if (names.empty()) reason = "no CUDA device of compute capability 9.0 or higher";
  }
};

const Devices& devices() {
  static const Devices instance;
  return instance;
}

/// Makes a device current for a scope.
class CurrentDevice {
 public:
  explicit CurrentDevice(Device device) {
    require(cudaGetDevice(&before_), "current device");
    changed_ = before_ != device.index;
    if (changed_) require(cudaSetDevice(device.index), "set device");
  }
  CurrentDevice(const CurrentDevice&) = delete;
  CurrentDevice& operator=(const CurrentDevice&) = delete;
  ~CurrentDevice() {
    if (changed_) (void)cudaSetDevice(before_);
  }

 private:
  int before_ = 0;
  bool changed_ = false;
};

Strided strided(const TensorView& view) {
  Strided out;
  // An index or optional tensor without elements is never read, but that it was given counts.
  static char given;
  out.data = view.defined() && view.data == nullptr ? &given : view.data;
  if (!view.defined()) out.data = nullptr;
  out.dtype = view.dtype;
  std::copy(view.strides.begin(), view.strides.end(), out.strides);
  return out;
}

std::size_t staged_rows_bytes(const Problem& problem) { return (static_cast<std::size_t>(problem.rows) * 4 + 255) / 256 * 256; }

ForwardParams parameters(const Call& call) {
  const Arguments& in = *call.arguments;
  const Problem& problem = call.problem;
  const Config& config = problem.config;
  ForwardParams p{};
  p.q = strided(in.q), p.k = strided(in.k), p.v = strided(in.v), p.o = strided(in.o);
  p.a = strided(in.a), p.g = strided(in.g), p.A_log = strided(in.A_log), p.dt_bias = strided(in.dt_bias);
  p.b = strided(in.b), p.beta = strided(in.beta);
  p.state_read = strided(call.state_read), p.state_write = strided(call.state_write);
  p.read_slots = strided(call.read_slots), p.write_slots = strided(call.write_slots);
  p.token_slots = strided(in.token_slots), p.accepted = strided(in.accepted);
  p.snapshots = strided(in.snapshots), p.cu_seqlens = strided(in.cu_seqlens);
  p.rows = problem.rows, p.tokens = problem.tokens, p.slots = problem.slots;
  p.token_room = in.token_slots.defined() ? in.token_slots.shape[1] : 0;
  p.snapshot_room = in.snapshots.defined() ? in.snapshots.shape[1] : 0;
  p.heads = config.heads();
  p.q_group = p.heads / config.q_heads, p.k_group = p.heads / config.k_heads, p.v_group = p.heads / config.v_heads;
  p.key_dim = config.key_dim, p.value_dim = config.value_dim;
  p.slice_rows = rows_of_slice(p.key_dim, p.value_dim);
  p.slices = (p.value_dim + p.slice_rows - 1) / p.slice_rows;
  p.null_slot = config.null_slot;
  p.l2_eps = config.l2_eps, p.softplus_beta = config.softplus_beta, p.softplus_threshold = config.softplus_threshold;
  p.scale = config.effective_scale();
  p.gate = config.gate, p.beta_form = config.beta, p.l2norm = config.qk_l2norm;
  p.initial_state = problem.initial_state, p.store_final = problem.store_final, p.store_tokens = problem.store_tokens;
  return p;
}

std::string text(const Fault& fault) {
  const std::string row = std::to_string(fault.row), value = std::to_string(fault.value), limit = std::to_string(fault.limit);
  const auto slot = [&](const char* name) {
    return std::string(name) + ": row " + row + " has slot " + value + ", the pool has " + limit + " slots";
  };
  const auto room = [&](const char* name) {
    return std::string(name) + ": sequence " + row + " has " + value + " tokens, but there is room for " + limit;
  };
  switch (static_cast<FaultKind>(fault.kind)) {
    case FaultKind::read_slots:
      return slot("read_slots");
    case FaultKind::write_slots:
      return slot("write_slots");
    case FaultKind::token_slots:
      return slot("token_slots");
    case FaultKind::accepted:
      return "accepted: row " + row + " has " + value + ", expected 1.." + limit;
    case FaultKind::cu_seqlens:
      return "cu_seqlens: entry " + row + " is " + value + ", expected ascending entries in 0.." + limit;
    case FaultKind::token_room:
      return room("token_slots");
    case FaultKind::snapshot_room:
      return room("snapshots");
    case FaultKind::none:
      break;
  }
  return "cuda: a kernel left an unknown fault";
}

class CudaBackend final : public Backend {
 public:
  std::string_view name() const noexcept override { return "cuda"; }
  std::string description() const override {
    return "float32 on NVIDIA GPUs" + (devices().names.empty() ? "" : ": " + devices().names);
  }
  Availability availability() const override { return {devices().reason.empty(), devices().reason}; }
  bool reaches(Device device) const noexcept override {
    if (device.type != DeviceType::cuda || device.index < 0) return false;
    const auto index = static_cast<std::size_t>(device.index);
    return index < devices().usable.size() && devices().usable[index];
  }

  std::string unsupported_reason(const Problem& problem) const override {
    const Config& config = problem.config;
    if (problem.window) return "replay windows are not implemented";
    if (config.key_dim > max_key_dim)
      return "K = " + std::to_string(config.key_dim) + " is larger than " + std::to_string(max_key_dim);
    const std::int64_t slice_rows = rows_of_slice(config.key_dim, config.value_dim);
    const std::int64_t slices = (config.value_dim + slice_rows - 1) / slice_rows, heads = config.heads();
    if (heads > max_blocks / slices || problem.rows + 1 > max_blocks / (heads * slices))
      return "more than 2^31 blocks of rows, heads and value rows";
    return {};
  }

  std::size_t workspace_size(const Problem& problem) const override {
    if (!problem.other_slots || problem.rows < 2) return 0;
    const Config& config = problem.config;
    const std::int64_t elements = problem.rows * config.heads() * config.value_dim * config.key_dim;
    return staged_rows_bytes(problem) + static_cast<std::size_t>(elements) * size_of(config.dtypes.state);
  }

  void forward(const Call& call) override {
    const Problem& problem = call.problem;
    const Arguments& in = *call.arguments;
    ForwardParams params = parameters(call);
    const auto stream = static_cast<cudaStream_t>(in.stream);
    const std::size_t needed = workspace_size(problem);
    if (needed > 0 && (in.workspace == nullptr || in.workspace_size < needed))
      throw Error(ErrorCode::invalid_argument, "workspace: expected at least " + std::to_string(needed) + " bytes, got " +
                                                   std::to_string(in.workspace == nullptr ? 0 : in.workspace_size));
    const CurrentDevice device(problem.device);
    if (needed > 0) {
      params.staged_rows = static_cast<std::int32_t*>(in.workspace);
      params.staged.data = static_cast<char*>(in.workspace) + staged_rows_bytes(problem);
      params.staged.dtype = call.state_read.dtype;
      std::int64_t* strides = params.staged.strides;
      strides[3] = 1, strides[2] = params.key_dim, strides[1] = params.value_dim * strides[2];
      strides[0] = params.heads * strides[1];
      require(launch_stage(params, stream), "launch");
    }
    require(launch_forward(params, stream), "launch");
  }

  void commit(const Config& config, const CommitArguments& in) override {
    CommitParams params{};
    params.snapshots = strided(in.snapshots), params.accepted = strided(in.accepted);
    params.state = strided(in.state), params.write_slots = strided(in.write_slots);
    params.rows = in.snapshots.shape[0], params.room = in.snapshots.shape[1], params.slots = in.state.shape[0];
    params.heads = config.heads(), params.key_dim = config.key_dim, params.value_dim = config.value_dim;
    params.null_slot = config.null_slot;
    const CurrentDevice device(in.snapshots.device);
    require(launch_commit(params, static_cast<cudaStream_t>(in.stream)), "launch");
  }

  /// Waits for the stream, whose device must be the current one: the record lies in that device's memory.
  void check(void* stream) override {
    Fault fault{};
    require(take_fault(fault, static_cast<cudaStream_t>(stream)), "fault record");
    if (fault.kind != 0) throw Error(ErrorCode::device, text(fault));
  }
};

}  // namespace

std::unique_ptr<Backend> make_cuda_backend() { return std::make_unique<CudaBackend>(); }

}  // namespace gatedelta
