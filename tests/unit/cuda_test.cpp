// SPDX-License-Identifier: Apache-2.0
// What checkkernel does not ask of a backend on the GPU: commit, graph capture, slots far apart. Needs a GPU. The backend is
// cuda, or what CUDA_TEST_BACKEND says.
#include <cuda_runtime_api.h>
#include <doctest/doctest.h>

#include <algorithm>
#include <array>
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
  T* data() const { return data_; }
  TensorView view(std::initializer_list<std::int64_t> shape, std::initializer_list<std::int64_t> strides = {}) const {
    return gatedelta::view(data_, shape, strides, gpu);
  }
  TensorView view_as(DType dtype, std::initializer_list<std::int64_t> shape) const {
    return make_view(data_, dtype, shape, {}, gpu);
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

/// Calls on a stream of their own, as a CUDA graph.
class Graph {
 public:
  Graph() { REQUIRE(cudaStreamCreate(&stream_) == cudaSuccess); }
  Graph(const Graph&) = delete;
  ~Graph() {
    CHECK(cudaGraphExecDestroy(executable_) == cudaSuccess);
    CHECK(cudaGraphDestroy(graph_) == cudaSuccess);
    CHECK(cudaStreamDestroy(stream_) == cudaSuccess);
  }

  cudaStream_t stream() const { return stream_; }
  /// Once.
  template <class Calls>
  void record(Calls calls) {
    REQUIRE(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeGlobal) == cudaSuccess);
    calls();
    REQUIRE(cudaStreamEndCapture(stream_, &graph_) == cudaSuccess);
    REQUIRE(cudaGraphInstantiate(&executable_, graph_, 0) == cudaSuccess);
  }
  void launch() { REQUIRE(cudaGraphLaunch(executable_, stream_) == cudaSuccess); }

 private:
  cudaStream_t stream_ = nullptr;
  cudaGraph_t graph_ = nullptr;
  cudaGraphExec_t executable_ = nullptr;
};

/// Calls as a model makes them, of one row, in bfloat16.
class Model {
 public:
  static constexpr std::int64_t q_heads = 2, v_heads = 4, dim = 128, state_size = v_heads * dim * dim;

  Model(Backend& backend, std::int64_t tokens, std::uint32_t seed)
      : tokens_(tokens),
        seed_(seed),
        op_(config(), backend),
        q_(random(tokens * q_heads * dim)),
        k_(random(tokens * q_heads * dim)),
        v_(random(tokens * v_heads * dim)),
        a_(random(tokens * v_heads)),
        b_(random(tokens * v_heads)),
        o_(static_cast<std::size_t>(tokens * v_heads * dim)),
        A_log_(std::vector<float>{0.5f, -1, 0, 1}),
        slot_(std::vector<std::int64_t>{0}) {}

  /// bfloat16 numbers between 2^-5 and 1 of either sign.
  std::vector<std::uint16_t> random(std::int64_t count) {
    std::vector<std::uint16_t> out(static_cast<std::size_t>(count));
    for (std::uint16_t& x : out) {
      seed_ = seed_ * 1664525 + 1013904223;
      x = static_cast<std::uint16_t>((seed_ >> 16 & 0x8000u) | 0x3d00u | (seed_ >> 8 & 0x27fu));
    }
    return out;
  }
  void forward(const TensorView& pool, std::int64_t slot, void* stream = nullptr) {
    slot_.set({slot});
    run(pool, stream);
  }
  void run(const TensorView& pool, void* stream) {
    Arguments call;
    call.q = q_.view_as(DType::bf16, {1, tokens_, q_heads, dim}), call.k = k_.view_as(DType::bf16, {1, tokens_, q_heads, dim});
    call.v = v_.view_as(DType::bf16, {1, tokens_, v_heads, dim}), call.o = o_.view_as(DType::bf16, {1, tokens_, v_heads, dim});
    call.a = a_.view_as(DType::bf16, {1, tokens_, v_heads}), call.b = b_.view_as(DType::bf16, {1, tokens_, v_heads});
    call.A_log = A_log_.view({v_heads}), call.state = pool, call.read_slots = slot_.view({1}), call.stream = stream;
    op_.forward(call);
  }
  std::vector<std::uint16_t> outputs() const { return o_.get(); }

 private:
  static Config config() {
    Config config{.q_heads = q_heads, .k_heads = q_heads, .v_heads = v_heads, .key_dim = dim, .value_dim = dim};
    DTypes& d = config.dtypes;
    d.q = d.k = d.v = d.o = d.gate = d.beta = d.state = DType::bf16;
    return config;
  }

  const std::int64_t tokens_;
  std::uint32_t seed_;
  GatedDeltaRule op_;
  Array<std::uint16_t> q_, k_, v_, a_, b_, o_;
  Array<float> A_log_;
  Array<std::int64_t> slot_;
};

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
  Graph graph;
  call.stream = graph.stream();
  GatedDeltaRule(scalar(), *backend).forward(call);  // a backend may allocate something at the first call on a stream
  graph.record([&] { GatedDeltaRule(scalar(), *backend).forward(call); });
  const auto replay = [&](float value, float share, std::int32_t slot) {
    v.set({value});
    beta.set({share});
    slots.set({slot});
    graph.launch();
    return device_error(*backend, graph.stream());
  };
  CHECK(replay(3, 1, 1) == "");
  CHECK(pool.get() == std::vector<float>{5, 3});
  CHECK(replay(6, 0.5f, 0) == "");
  CHECK(pool.get() == std::vector<float>{5.5f, 3});
  CHECK(o.get() == std::vector<float>{5.5f});
  CHECK(replay(6, 1, 2) == "read_slots: row 0 has slot 2, the pool has 2 slots");
  CHECK(o.get() == std::vector<float>{0});
  CHECK(pool.get() == std::vector<float>{5.5f, 3});
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

TEST_CASE("a pool of 100 GB gives what a small one gives") {
  Backend* backend = usable();
  if (backend == nullptr) return;
  constexpr std::size_t bytes = 100'000'000'000, slot_bytes = 2 * Model::state_size;
  constexpr auto slots = static_cast<std::int64_t>(bytes / slot_bytes);
  std::size_t free = 0, total = 0;
  REQUIRE(cudaMemGetInfo(&free, &total) == cudaSuccess);
  if (free < bytes + (std::size_t{1} << 28)) {
    MESSAGE("skipped: needs 100 GB of free device memory");
    return;
  }
  Array<std::uint16_t> large(bytes / 2);
  for (const std::int64_t tokens : {1, 4, 40}) {
    Model model(*backend, tokens, 1);
    const std::vector<std::uint16_t> state = model.random(Model::state_size);
    Array<std::uint16_t> small(state);
    model.forward(small.view_as(DType::bf16, {1, Model::v_heads, Model::dim, Model::dim}), 0);
    REQUIRE(device_error(*backend) == "");
    const auto outputs = model.outputs(), after = small.get();
    CHECK(after != state);
    for (const std::int64_t slot : {std::int64_t{0}, slots / 2, slots - 1}) {
      const auto at = static_cast<std::size_t>(slot) * Model::state_size;
      large.set(state, at);
      model.forward(large.view_as(DType::bf16, {slots, Model::v_heads, Model::dim, Model::dim}), slot);
      CHECK(device_error(*backend) == "");
      CHECK(model.outputs() == outputs);
      CHECK(large.get(at, Model::state_size) == after);
    }
  }
}

TEST_CASE("two streams at once do what they do one after the other") {
  Backend* backend = usable();
  if (backend == nullptr) return;
  constexpr int steps = 50;
  Model first(*backend, 1, 1), second(*backend, 4, 2);
  const std::vector<std::uint16_t> state = first.random(Model::state_size);
  std::vector<std::uint16_t> expected_outputs[2], expected_states[2];
  for (const bool together : {false, true}) {
    const Array<std::uint16_t> pools[2] = {Array<std::uint16_t>(state), Array<std::uint16_t>(state)};
    REQUIRE(cudaDeviceSynchronize() == cudaSuccess);  // the pools' copies, for streams that do not wait for them
    cudaStream_t streams[2];
    for (cudaStream_t& stream : streams) REQUIRE(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking) == cudaSuccess);
    const auto step = [&](int i) {
      const TensorView pool = pools[i].view_as(DType::bf16, {1, Model::v_heads, Model::dim, Model::dim});
      (i == 0 ? first : second).run(pool, streams[i]);
    };
    if (together) {
      for (int n = 0; n < steps; ++n) step(0), step(1);
    } else {
      for (int i = 0; i < 2; ++i) {
        for (int n = 0; n < steps; ++n) step(i);
        REQUIRE(device_error(*backend, streams[i]) == "");
      }
    }
    for (int i = 0; i < 2; ++i) {
      CHECK(device_error(*backend, streams[i]) == "");
      const auto outputs = (i == 0 ? first : second).outputs(), after = pools[i].get();
      CHECK(after != state);
      if (together) {
        CHECK(outputs == expected_outputs[i]);
        CHECK(after == expected_states[i]);
      }
      expected_outputs[i] = outputs, expected_states[i] = after;
      CHECK(cudaStreamDestroy(streams[i]) == cudaSuccess);
    }
  }
}

TEST_CASE("windows: faults are found on the device, and a captured step replays") {
  Backend* backend = usable();
  if (backend == nullptr) return;
  constexpr std::int64_t slots = 3, W = 4, T = 2;
  const Config config = scalar();
  Problem problem;
  problem.config = config;
  problem.window = true;
  if (const std::string reason = backend->unsupported_reason(problem); !reason.empty()) {
    MESSAGE("skipped: " << reason);
    return;
  }
  const WindowLayout layout = window_layout(config, slots, W, DType::f32, T);
  const Array<std::byte> layer(std::vector<std::byte>(layout.layer_bytes));
  Array<std::int32_t> record(layout.record_bytes / 4);  // lengths, and behind the first 256 bytes the orders
  const ReplayWindow placed = window_at(layout, layer.view_as(DType::i32, {1}).data, record.view({1}).data, gpu);
  const std::vector<float> ones(2 * T, 1);
  const Array<float> q(ones), beta(ones), v(std::vector<float>(2 * T, 2)), o(2 * T), states(slots);
  Array<float> pool(std::vector<float>{1, 1, 1});
  Array<std::int32_t> rows(std::vector<std::int32_t>{0, 1}), accepted(std::vector<std::int32_t>{1, 2});
  const Array<std::int32_t> all(std::vector<std::int32_t>{0, 1, 2});
  const GatedDeltaRule op(config, *backend);
  Arguments call;
  call.q = call.k = q.view({2, T, 1, 1}), call.v = v.view({2, T, 1, 1}), call.o = o.view({2, T, 1, 1});
  call.beta = beta.view({2, T, 1}), call.state = pool.view({slots, 1, 1, 1}), call.read_slots = rows.view({2});
  call.window = &placed;
  AcceptArguments accept{.record = placed.record, .slots = rows.view({2}), .accepted = accepted.view({2}), .tokens = T};
  const auto restart = [&] {
    rows.set({0, 1}), accepted.set({1, 2});
    op.reset({.record = placed.record});
    CHECK(device_error(*backend) == "");
  };
  const auto lengths = [&] { return record.get(0, slots); };

  restart();
  op.forward(call);
  op.accept(accept);
  CHECK(device_error(*backend) == "");
  CHECK(o.get() == std::vector<float>{2, 2, 2, 2});
  CHECK(lengths() == std::vector<std::int32_t>{1, 2, 0});
  CHECK(pool.get() == std::vector<float>{1, 1, 1});

  record.set({W + 1}, 0);
  op.forward(call);
  CHECK(device_error(*backend) == "window.length: row 0 has 5, expected 0..4");
  CHECK(o.get() == std::vector<float>{0, 0, 2, 2});
  restart();
  record.set({0, 0}, 64 + static_cast<std::size_t>(layout.ring));
  op.forward(call);
  CHECK(device_error(*backend).rfind("window.order: row 1 has", 0) == 0);
  restart();
  rows.set({3, 1});
  op.forward(call);
  CHECK(device_error(*backend) == "read_slots: row 0 has slot 3, the pool has 3 slots");
  op.accept(accept);
  CHECK(device_error(*backend) == "slots: row 0 has slot 3, the pool has 3 slots");
  CHECK(lengths() == std::vector<std::int32_t>{0, 2, 0});
  restart();
  rows.set({1, 1});
  op.accept(accept);
  CHECK(device_error(*backend) == "slots: row 1 has slot 1 again");
  restart();
  accepted.set({T + 1, 0});
  op.accept(accept);
  CHECK(device_error(*backend) == "accepted: row 0 has 3, expected 0..2");

  // Whole steps on the device alone: windows fill up and are folded, and the states are those of plain decoding.
  restart();
  Graph step;
  call.stream = accept.stream = step.stream();
  step.record([&] {
    op.forward(call);
    op.accept(accept);
  });
  for (int i = 0; i < 5; ++i) step.launch();
  CHECK(device_error(*backend, step.stream()) == "");
  CHECK(lengths() == std::vector<std::int32_t>{2, 2, 0});  // 1 2 3 1 2, and 2 4 2 4 2
  CHECK(pool.get() == std::vector<float>{2, 2, 1});
  op.state_of({.window = placed, .state = call.state, .slots = all.view({slots}), .out = states.view({slots, 1, 1, 1})});
  CHECK(device_error(*backend) == "");
  CHECK(states.get() == std::vector<float>{2, 2, 1});
}

namespace {

/// Calls that reach each kernel, as dependent launches: the outputs of each are the values of the next one. Behind a call of
/// the kernel there are a decode of all its tokens as rows of their own, and `long_row` of them as a row: that takes so long
/// that the kernel would begin too early if it did not wait.
struct Chain {
  const char* kernel;
  std::int64_t tokens;
  std::int64_t padding = 0;  ///< elements behind each value row of a state
  DType inputs = DType::bf16;
  bool value_last = false;
  std::int64_t capacity = 0;  ///< of a window
  DType entries = DType::bf16;
  std::int64_t rows = 20;

  static constexpr std::int64_t calls = 24, q_heads = 2, v_heads = 4, dim = 128, long_row = 20;

  /// The bits of all outputs and states. Sets `skipped` if the backend cannot do this.
  std::vector<std::uint16_t> run(Backend& backend, bool dependent, std::string& skipped) const {
    Config config{.q_heads = q_heads, .k_heads = q_heads, .v_heads = v_heads, .key_dim = dim, .value_dim = dim};
    config.scale = 1.0;
    DTypes& d = config.dtypes;
    d.q = d.k = d.v = d.o = d.gate = d.beta = inputs, d.state = DType::bf16;
    Problem problem;
    problem.config = config, problem.window = capacity > 0;
    skipped = backend.unsupported_reason(problem);
    if (!skipped.empty()) return {};

    const std::int64_t all = rows * tokens, values = all * v_heads * dim, state = v_heads * dim * (dim + padding);
    auto random = [&, seed = std::uint32_t{1}](std::int64_t count) mutable {
      std::vector<std::uint16_t> out(static_cast<std::size_t>(count));
      for (std::uint16_t& x : out) {
        seed = seed * 1664525 + 1013904223;
        x = static_cast<std::uint16_t>((seed >> 16 & 0x8000u) | 0x3c00u | (seed >> 8 & 0x1ffu));  // of either dtype
      }
      return out;
    };
    const Array<std::uint16_t> q(random(all * q_heads * dim)), k(random(all * q_heads * dim));
    const Array<std::uint16_t> gates(random(all * v_heads));
    const Array<float> A_log(std::vector<float>{0.5f, -1, 0, 1});
    const std::array<std::int64_t, 3> lengths = {tokens, 1, long_row};
    const std::int64_t slots = calls / 3 * (rows + all + all / long_row);
    // Not written, an output is NaN.
    Array<std::uint16_t> chain(std::vector<std::uint16_t>(static_cast<std::size_t>((calls + 1) * values), 0x7fff));
    chain.set(random(values));
    const Array<std::uint16_t> pool(random(slots * state)), decoded(random(slots * v_heads * dim * dim));
    std::vector<std::int32_t> numbers(static_cast<std::size_t>(slots));
    for (std::size_t i = 0; i < numbers.size(); ++i) numbers[i] = static_cast<std::int32_t>(i);
    const Array<std::int32_t> all_slots(numbers);
    TensorView states = make_view(pool.data(), DType::bf16, std::array{slots, v_heads, dim, dim},
                                  std::array{state, state / v_heads, dim + padding, std::int64_t{1}}, gpu);
    TensorView dense = decoded.view_as(DType::bf16, {slots, v_heads, dim, dim});
    if (value_last) states = states.transposed(2, 3), dense = dense.transposed(2, 3);

    const GatedDeltaRule op(config, backend);
    Graph graph;
    WindowLayout layout;
    if (capacity > 0) layout = window_layout(config, slots, capacity, entries, tokens);
    const Array<std::byte> layer(std::vector<std::byte>(std::max<std::size_t>(layout.layer_bytes, 1)));
    const Array<std::byte> record(std::vector<std::byte>(std::max<std::size_t>(layout.record_bytes, 1)));
    ReplayWindow window;
    if (capacity > 0) {
      window = window_at(layout, layer.view_as(DType::i32, {1}).data, record.view_as(DType::i32, {1}).data, gpu);
      op.reset({.record = window.record});
    }
    graph.record([&] {
      std::int64_t slot = 0;
      for (std::int64_t i = 0; i < calls; ++i) {
        const bool own = i % 3 == 0;
        const std::int64_t T = lengths[static_cast<std::size_t>(i % 3)], B = all / T;
        const auto view = [&](const Array<std::uint16_t>& data, std::int64_t at, std::vector<std::int64_t> shape) {
          shape.insert(shape.begin(), {B, T});
          return make_view(data.data() + at, inputs, shape, {}, gpu);
        };
        Arguments call;
        call.q = view(q, 0, {q_heads, dim}), call.k = view(k, 0, {q_heads, dim});
        call.v = view(chain, i * values, {v_heads, dim}), call.o = view(chain, (i + 1) * values, {v_heads, dim});
        call.a = call.b = view(gates, 0, {v_heads}), call.A_log = A_log.view({v_heads});
        call.state = own ? states : dense;
        call.read_slots = make_view(all_slots.data() + slot, DType::i32, std::array{B}, {}, gpu);
        if (capacity > 0 && own) call.window = &window;
        call.stream = graph.stream(), call.dependent_launch = dependent;
        op.forward(call);
        slot += B;
      }
    });
    graph.launch();
    CHECK(device_error(backend, graph.stream()) == "");
    std::vector<std::uint16_t> out = chain.get();
    for (const auto& after : {pool.get(), decoded.get()}) out.insert(out.end(), after.begin(), after.end());
    return out;
  }
};

}  // namespace

TEST_CASE("dependent launches wait for what the kernel before writes") {
  Backend* backend = usable();
  if (backend == nullptr) return;
  for (const Chain& chain :
       {Chain{.kernel = "decode", .tokens = 1}, Chain{.kernel = "decode", .tokens = 1, .value_last = true},
        Chain{.kernel = "decode", .tokens = 1, .value_last = true, .rows = 40},
        Chain{.kernel = "decode", .tokens = 1, .rows = 40}, Chain{.kernel = "serving", .tokens = 4, .rows = 5},
        Chain{.kernel = "serving", .tokens = 16, .value_last = true, .rows = 5},
        Chain{.kernel = "serving", .tokens = 4, .rows = 40}, Chain{.kernel = "chunks", .tokens = 20, .rows = 2},
        Chain{.kernel = "chunks", .tokens = 20, .rows = 8},
        Chain{.kernel = "verify", .tokens = 20, .inputs = DType::f16, .rows = 2},
        Chain{.kernel = "recurrent", .tokens = 3, .inputs = DType::f16},
        Chain{.kernel = "generic", .tokens = 2, .padding = 1, .rows = 10},
        Chain{.kernel = "replay", .tokens = 1, .capacity = 16},
        Chain{.kernel = "replay", .tokens = 1, .capacity = 16, .rows = 40},
        Chain{.kernel = "replay", .tokens = 1, .value_last = true, .capacity = 16},
        Chain{.kernel = "replay", .tokens = 4, .capacity = 16, .rows = 5},
        Chain{.kernel = "replay, in passes", .tokens = 20, .capacity = 32, .rows = 2},
        Chain{.kernel = "recurrent, window", .tokens = 2, .capacity = 16, .entries = DType::f32, .rows = 10},
        Chain{.kernel = "generic, window", .tokens = 2, .padding = 1, .capacity = 16, .rows = 10}}) {
    REQUIRE(chain.rows * chain.tokens % Chain::long_row == 0);
    CAPTURE(std::string(chain.kernel));
    CAPTURE(chain.rows);
    std::string skipped;
    const auto expected = chain.run(*backend, false, skipped);
    if (!skipped.empty()) {
      MESSAGE("skipped: " << skipped);
      continue;
    }
    for (int repeat = 0; repeat < 3; ++repeat) CHECK(chain.run(*backend, true, skipped) == expected);
  }
}
