// SPDX-License-Identifier: Apache-2.0
// Times are those of CUDA graphs: the calls as the library enqueues them, replayed by the device without the host.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <chrono>

#include "cuda_kernels.hpp"
#include "device/memory.hpp"
#include "gatedelta/backend.hpp"
#include "gatedelta/error.hpp"
#include "platform.hpp"
#include "tool/machine.hpp"

namespace gatedelta::bench {
namespace {

void require(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  throw Error(status == cudaErrorMemoryAllocation ? ErrorCode::out_of_memory : ErrorCode::device,
              std::string("bench: ") + what + ": " + cudaGetErrorString(status));
}

class Event {
 public:
  Event() { require(cudaEventCreate(&event_), "event"); }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
  ~Event() { (void)cudaEventDestroy(event_); }
  void record(cudaStream_t stream) { require(cudaEventRecord(event_, stream), "record an event"); }
  double seconds_since(const Event& before) const {
    float milliseconds = 0;
    require(cudaEventSynchronize(event_), "the measured calls");
    require(cudaEventElapsedTime(&milliseconds, before.event_, event_), "elapsed time");
    return 1e-3 * static_cast<double>(milliseconds);
  }

 private:
  cudaEvent_t event_ = nullptr;
};

/// What calls enqueue on a stream, recorded once.
class Graph {
 public:
  Graph(cudaStream_t stream, int calls, const std::function<void()>& call) : stream_(stream) {
    require(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "begin capture");
    cudaGraph_t graph = nullptr;
    try {
      for (int i = 0; i < calls; ++i) call();
    } catch (...) {
      if (cudaStreamEndCapture(stream, &graph) == cudaSuccess && graph != nullptr) (void)cudaGraphDestroy(graph);
      throw;
    }
    require(cudaStreamEndCapture(stream, &graph), "end capture");
    const cudaError_t status = cudaGraphInstantiate(&executable_, graph, 0);
    (void)cudaGraphDestroy(graph);
    require(status, "instantiate a graph");
    require(cudaGraphUpload(executable_, stream), "upload a graph");
  }
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;
  ~Graph() { (void)cudaGraphExecDestroy(executable_); }

  /// The first of two replays keeps the device busy while the host starts the second, the measured one.
  double seconds() {
    require(cudaGraphLaunch(executable_, stream_), "replay");
    begin_.record(stream_);
    require(cudaGraphLaunch(executable_, stream_), "replay");
    end_.record(stream_);
    return end_.seconds_since(begin_);
  }

 private:
  cudaStream_t stream_;
  cudaGraphExec_t executable_ = nullptr;
  Event begin_, end_;
};

class CudaPlatform final : public Platform {
 public:
  CudaPlatform() {
    require(cudaSetDevice(device().index), "set device");
    require(cudaGetDeviceProperties(&properties_, device().index), "device properties");
    require(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "stream");
    unused_ = allocate(256);
  }
  ~CudaPlatform() override { (void)cudaStreamDestroy(stream_); }

  Device device() const override { return {DeviceType::cuda, 0}; }
  std::string description() const override { return properties_.name; }
  double cache_bytes() const override { return properties_.l2CacheSize; }
  double free_bytes() const override {
    std::size_t free = 0, total = 0;
    require(cudaMemGetInfo(&free, &total), "free memory");
    return static_cast<double>(free);
  }
  int default_threads() const override { return 1; }

  std::shared_ptr<void> allocate(std::size_t bytes) override {
    void* memory = nullptr;
    require(cudaMalloc(&memory, std::max<std::size_t>(bytes, 16)), "cudaMalloc");
    return {memory, [](void* data) { (void)cudaFree(data); }};
  }
  void fill(const TensorView& dense, const Normal& numbers, int /*threads*/) override {
    require(launch_fill(dense.data, dense.dtype, dense.elements(), numbers, stream_), "fill");
  }
  void copy_from_host(void* to, const void* from, std::size_t bytes) override {
    require(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, stream_), "copy to the device");
    wait();
  }
  void copy(void* to, const void* from, std::size_t bytes, int /*threads*/) override {
    require(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, stream_), "copy");
  }

  void* stream() const override { return stream_; }
  std::function<double()> prepare(int calls, const std::function<void()>& call) override {
    call();  // what the first call of a kernel has to load cannot be recorded
    wait();
    const auto graph = std::make_shared<Graph>(stream_, calls, call);
    wait();
    return [graph] { return graph->seconds(); };
  }
  double repetition_seconds() const override { return 2e-3; }
  void wait() override { require(cudaStreamSynchronize(stream_), "the calls"); }
  std::vector<double> enqueue_seconds(int calls, const std::function<void()>& call) override {
    constexpr int together = 16;  // few enough that no call waits for room in the stream
    const auto start = std::chrono::steady_clock::now();
    std::vector<double> out;
    for (int i = 0; i < calls; ++i) {
      if (i % together == 0) {
        wait();
        if (i > 0 && std::chrono::steady_clock::now() - start > std::chrono::seconds(1)) break;
      }
      const auto begin = std::chrono::steady_clock::now();
      call();
      out.push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count());
    }
    wait();
    return out;
  }

  /// The device's clock does not count what the host's processors do.
  std::int64_t interruptions() const override { return 0; }

  int move_shapes() const override { return bench::move_shapes; }
  void move(const Traffic& traffic, int shape, int /*threads*/) override {
    require(launch_move(traffic, shape, unused_.get(), stream_), "launch a limit");
  }
  int call_shapes() const override { return bench::call_shapes; }
  bool move_call(const CallTraffic& traffic, int shape) override {
    bool fits = false;
    require(launch_call_traffic(traffic, shape, unused_.get(), stream_, fits), "launch a call's traffic");
    return fits;
  }
  double measure_peak_flops(int /*threads*/) override {
    constexpr std::int64_t rounds = 20'000;
    const int blocks = 4 * properties_.multiProcessorCount;  // all resident at once
    const std::function<double()> time =
        prepare(1, [&] { require(launch_multiply_add(blocks, rounds, unused_.get(), stream_), "launch a limit"); });
    double best = time();
    for (int sample = 0; sample < 10; ++sample) best = std::min(best, time());
    return 2.0 * multiply_add_chains * multiply_add_threads * static_cast<double>(blocks * rounds) / best;
  }
  std::string limit_description() const override { return "16-byte vectors, streaming"; }
  std::vector<std::pair<std::string, std::string>> facts() const override {
    const device::CudaVersions versions = device::cuda_versions();
    return {{"compute_capability", std::to_string(properties_.major) + "." + std::to_string(properties_.minor)},
            {"multiprocessors", std::to_string(properties_.multiProcessorCount)},
            {"driver", tool::nvidia_driver()},
            {"cuda_driver", versions.driver},
            {"cuda_runtime", versions.runtime}};
  }

 private:
  cudaDeviceProp properties_{};
  cudaStream_t stream_ = nullptr;
  std::shared_ptr<void> unused_;
};

}  // namespace

std::unique_ptr<Platform> make_cuda_platform() {
  const Backend* backend = find_backend("cuda");
  if (backend == nullptr) throw Error(ErrorCode::unsupported, "bench: the library was built without CUDA");
  if (const Availability state = backend->availability(); !state.available)
    throw Error(ErrorCode::unsupported, "bench: cuda is not available: " + state.reason);
  return std::make_unique<CudaPlatform>();
}

}  // namespace gatedelta::bench
