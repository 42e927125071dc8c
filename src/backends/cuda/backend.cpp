// SPDX-License-Identifier: Apache-2.0
// The host side: what can run here, the parameters of a launch, and the faults that kernels leave behind.
#include <array>
#include <atomic>
#include <limits>
#include <string>
#include <vector>

#include "backends/cuda/plan.hpp"
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
  std::vector<bool> usable, fast;  // fast: has machine code, not only the generic kernels' PTX
  std::string reason;              // why none is
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
      const bool known = cudaGetDeviceProperties(&properties, i) == cudaSuccess;
      usable.push_back(known && properties.major >= lowest_compute_capability);
      fast.push_back(usable.back() && (properties.major == 9 || properties.major == 10) && properties.minor == 0);
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

/// The current device's record, looked up once.
Fault* fault_record(int device) {
  constexpr int remembered = 64;
  static std::array<std::atomic<Fault*>, remembered> records{};
  Fault* record = device < remembered ? records[static_cast<std::size_t>(device)].load(std::memory_order_relaxed) : nullptr;
  if (record != nullptr) return record;
  require(find_fault_record(record), "fault record");
  if (device < remembered) records[static_cast<std::size_t>(device)].store(record, std::memory_order_relaxed);
  return record;
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
    if (config.key_dim > max_key_dim)
      return "K = " + std::to_string(config.key_dim) + " is larger than " + std::to_string(max_key_dim);
    const std::int64_t slice_rows = problem.window ? rows_of_replayed_slice(config.key_dim, config.value_dim)
                                                   : rows_of_slice(config.key_dim, config.value_dim);
    const std::int64_t slices = (config.value_dim + slice_rows - 1) / slice_rows, heads = config.heads();
    if (heads > max_blocks / slices || problem.rows + 1 > max_blocks / (heads * slices))
      return "more than 2^31 blocks of rows, heads and value rows";
    return {};
  }

  void forward(const Call& call) override {
    call.problem.window ? run(call, make_replay_params(call), make_replay_plan, launch_replay)
                        : run(call, make_params(call), make_plan, launch_forward);
  }

  void commit(const Config& config, const CommitArguments& in) override {
    launch(make_params(config, in), in.snapshots.device, in.stream, launch_commit);
  }
  void accept(const Config& config, const AcceptArguments& in) override {
    launch(make_params(config, in), in.record.length.device, in.stream, launch_accept);
  }
  void reset(const Config& config, const ResetArguments& in) override {
    launch(make_params(config, in), in.record.length.device, in.stream, launch_reset);
  }
  void fold(const Config& config, const FoldArguments& in) override {
    launch(make_params(config, in), in.state.device, in.stream, launch_fold);
  }
  void copy(const Config& config, const ForkArguments& in) override {
    launch(make_params(config, in), in.window.record.length.device, in.stream, launch_copy);
  }

  /// Waits for the stream, whose device must be the current one: the record lies in that device's memory.
  void check(void* stream) override {
    Fault fault{};
    require(take_fault(fault, static_cast<cudaStream_t>(stream)), "fault record");
    if (fault.kind != 0) throw Error(ErrorCode::device, text(fault));
  }

 private:
  template <class Params, class Launch>
  static void launch(Params params, Device on, void* stream, Launch launch) {
    const CurrentDevice device(on);
    params.fault = fault_record(on.index);
    require(launch(params, static_cast<cudaStream_t>(stream)), "launch");
  }

  template <class Params, class MakePlan, class Launch>
  static void run(const Call& call, const Params& params, MakePlan make_plan, Launch launch_planned) {
    const Device device = call.problem.device;
    const bool fast = devices().fast[static_cast<std::size_t>(device.index)];
    launch(params, device, call.arguments->stream, [&](const Params& checked, cudaStream_t stream) {
      return launch_planned(fast ? make_plan(checked) : Plan{}, checked, stream);
    });
  }
};

}  // namespace

std::unique_ptr<Backend> make_cuda_backend() { return std::make_unique<CudaBackend>(); }

}  // namespace gatedelta
