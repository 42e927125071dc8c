// SPDX-License-Identifier: Apache-2.0
// What checkkernel does not ask of a backend on the GPU: commit, graph capture, slots far apart. Needs a GPU. The backend is
// cuda, or what CUDA_TEST_BACKEND says.
#include <cuda_runtime_api.h>
#include <doctest/doctest.h>

#include <cstdint>
#include <cstdlib>
#include <string>
#include <vector>

#include "gatedelta/gatedelta.hpp"

using namespace gatedelta;

namespace {

constexpr Device gpu{DeviceType::cuda, 0};

Backend* usable() {
  const char* name = std::getenv("CUDA_TEST_BACKEND");
  Backend* backend = find_backend(name == nullptr ? "cuda" : name);
  REQUIRE(backend != nullptr);
  if (backend->availability().available) return backend;
  MESSAGE("skipped: " << backend->availability().reason);
  return nullptr;
}

template <class T>
class Array {
 public:
  explicit Array(const std::vector<T>& values) : Array(values.size()) { set(values); }
  explicit Array(std::size_t size) : size_(size) {
    REQUIRE(cudaMalloc(reinterpret_cast<void**>(&data_), size * sizeof(T)) == cudaSuccess);
  }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;
  ~Array() { (void)cudaFree(data_); }
  void set(const std::vector<T>& values, std::size_t at = 0) {
    REQUIRE(cudaMemcpy(data_ + at, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice) == cudaSuccess);
  }
  std::vector<T> get(std::size_t at, std::size_t count) const {
    std::vector<T> out(count);
    REQUIRE(cudaMemcpy(out.data(), data_ + at, count * sizeof(T), cudaMemcpyDeviceToHost) == cudaSuccess);
    return out;
  }
  std::vector<T> get() const { return get(0, size_); }
  TensorView view(std::initializer_list<std::int64_t> shape, std::initializer_list<std::int64_t> strides = {}) const {
    return gatedelta::view(data_, shape, strides, gpu);
  }

 private:
  T* data_ = nullptr;
  std::size_t size_;
};

/// A scalar state: with k = q = 1 a token makes S and o equal to S + beta (v - S).
Config scalar() {
  Config config{.q_heads = 1, .k_heads = 1, .v_heads = 1, .key_dim = 1, .value_dim = 1};
  config.gate = GateForm::none;
  config.beta = BetaForm::value;
  config.qk_l2norm = false;
  config.scale = 1.0;
  return config;
}

std::string device_error(Backend& backend, void* stream = nullptr) {
  try {
    backend.synchronize(stream);
  } catch (const Error& error) {
    CHECK(error.code() == ErrorCode::device);
    return error.what();
  }
  return {};
}

}  // namespace

TEST_CASE("commit copies the accepted snapshots and reports bad rows") {
  Backend* backend = usable();
  if (backend == nullptr) return;
  Config config = scalar();
  config.key_dim = 2;
  const Array<float> snapshots(std::vector<float>{1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12});  // [3,2,1,1,2]
  Array<float> pool(std::vector<float>(8, -1));
  Array<std::int32_t> accepted(std::vector<std::int32_t>{2, 1, 1});
  Array<std::int64_t> slots(std::vector<std::int64_t>{3, -1, 0});
  CommitArguments commit;
  commit.snapshots = snapshots.view({3, 2, 1, 1, 2});
  commit.accepted = accepted.view({3});
  commit.state = pool.view({4, 1, 1, 2});
  commit.write_slots = slots.view({3});
  const GatedDeltaRule op(config, *backend);
  op.commit(commit);
  CHECK(device_error(*backend) == "");
  CHECK(pool.get() == std::vector<float>{9, 10, -1, -1, -1, -1, 3, 4});

  pool.set(std::vector<float>(8, -1));
  slots.set({4, 1, 0});
  op.commit(commit);
  CHECK(device_error(*backend) == "write_slots: row 0 has slot 4, the pool has 4 slots");
  CHECK(device_error(*backend) == "");
  CHECK(pool.get() == std::vector<float>{9, 10, 5, 6, -1, -1, -1, -1});
  slots.set({2, 1, 0});
  accepted.set({1, 3, 1});
  op.commit(commit);
  CHECK(device_error(*backend) == "accepted: row 1 has 3, expected 1..2");
}

TEST_CASE("a captured call replays with changed inputs") {
  Backend* backend = usable();
  if (backend == nullptr) return;
  const Array<float> one(std::vector<float>{1}), o(1), pool(std::vector<float>{5, 7});
  Array<float> v(std::vector<float>{0}), beta(std::vector<float>{1});
  Array<std::int32_t> slots(std::vector<std::int32_t>{1});
  Arguments call;
  call.q = call.k = one.view({1, 1, 1, 1});
  call.v = v.view({1, 1, 1, 1}), call.o = o.view({1, 1, 1, 1}), call.beta = beta.view({1, 1, 1});
  call.state = pool.view({2, 1, 1, 1}), call.read_slots = slots.view({1});
  cudaStream_t stream;
  REQUIRE(cudaStreamCreate(&stream) == cudaSuccess);
  call.stream = stream;
  GatedDeltaRule(scalar(), *backend).forward(call);  // a backend may allocate something at the first call on a stream
  cudaGraph_t graph;
  cudaGraphExec_t executable;
  REQUIRE(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal) == cudaSuccess);
  GatedDeltaRule(scalar(), *backend).forward(call);
  REQUIRE(cudaStreamEndCapture(stream, &graph) == cudaSuccess);
  REQUIRE(cudaGraphInstantiate(&executable, graph, 0) == cudaSuccess);
  const auto replay = [&](float value, float share, std::int32_t slot) {
    v.set({value});
    beta.set({share});
    slots.set({slot});
    REQUIRE(cudaGraphLaunch(executable, stream) == cudaSuccess);
    return device_error(*backend, stream);
  };
  CHECK(replay(3, 1, 1) == "");
  CHECK(pool.get() == std::vector<float>{5, 3});
  CHECK(replay(6, 0.5f, 0) == "");
  CHECK(pool.get() == std::vector<float>{5.5f, 3});
  CHECK(o.get() == std::vector<float>{5.5f});
  CHECK(replay(6, 1, 2) == "read_slots: row 0 has slot 2, the pool has 2 slots");
  CHECK(o.get() == std::vector<float>{0});
  CHECK(pool.get() == std::vector<float>{5.5f, 3});
  CHECK(cudaGraphExecDestroy(executable) == cudaSuccess);
  CHECK(cudaGraphDestroy(graph) == cudaSuccess);
  CHECK(cudaStreamDestroy(stream) == cudaSuccess);
}

TEST_CASE("slots more than 2^31 elements apart") {
  Backend* backend = usable();
  if (backend == nullptr) return;
  constexpr std::int64_t stride = (std::int64_t{1} << 31) + 3;
  std::size_t free = 0, total = 0;
  REQUIRE(cudaMemGetInfo(&free, &total) == cudaSuccess);
  if (free < 3u * stride * sizeof(float)) {
    MESSAGE("skipped: needs 24 GiB of free device memory");
    return;
  }
  Array<float> pool(static_cast<std::size_t>(2 * stride + 1));
  pool.set({4}, static_cast<std::size_t>(2 * stride));
  const Array<float> one(std::vector<float>{1}), v(std::vector<float>{10}), beta(std::vector<float>{0.5f}), o(1);
  const Array<std::int32_t> slots(std::vector<std::int32_t>{2});
  Arguments call;
  call.q = call.k = one.view({1, 1, 1, 1});
  call.v = v.view({1, 1, 1, 1}), call.o = o.view({1, 1, 1, 1}), call.beta = beta.view({1, 1, 1});
  call.state = pool.view({3, 1, 1, 1}, {stride, 1, 1, 1}), call.read_slots = slots.view({1});
  GatedDeltaRule(scalar(), *backend).forward(call);
  CHECK(device_error(*backend) == "");
  CHECK(o.get() == std::vector<float>{7});
  CHECK(pool.get(static_cast<std::size_t>(2 * stride), 1) == std::vector<float>{7});
}
