// SPDX-License-Identifier: Apache-2.0
// Replay windows: sizes, errors, and what a call may touch. The numbers are the business of checkkernel's family window.
#include <doctest/doctest.h>

#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "gatedelta/gatedelta.hpp"

using namespace gatedelta;

namespace {

constexpr std::int64_t slots = 3, W = 4, T = 3, H = 2, K = 8, V = 8;

Config config() {
  Config out;
  out.q_heads = out.k_heads = 1;
  out.v_heads = H;
  out.key_dim = K;
  out.value_dim = V;
  out.gate = GateForm::none;
  out.beta = BetaForm::one;
  return out;
}

/// Two rows of T tokens, slots 2 and 0.
struct Fixture {
  std::vector<float> q = std::vector<float>(2 * T * K, 0.5f), k = q, v = std::vector<float>(2 * T * H * V, 1.0f),
                     o = std::vector<float>(2 * T * H * V, 7.0f), pool = std::vector<float>(slots * H * V * K, 0.25f);
  std::vector<std::int32_t> rows = {2, 0}, accepted = {T, 1}, parent = std::vector<std::int32_t>(2 * T, -1),
                            path = {0, 1, 2, 1, 2, 0};
  WindowLayout layout = window_layout(config(), slots, W, DType::f32);
  std::vector<std::byte> layer = std::vector<std::byte>(layout.layer_bytes, std::byte{3}),
                         record = std::vector<std::byte>(layout.record_bytes);
  ReplayWindow window = window_at(layout, layer.data(), record.data());
  GatedDeltaRule op;
  Arguments call;
  AcceptArguments accept;

  explicit Fixture(Backend& backend) : op(config(), backend) {
    op.reset({.record = window.record});
    call.q = view(q.data(), {2, T, 1, K});
    call.k = view(k.data(), {2, T, 1, K});
    call.v = view(v.data(), {2, T, H, V});
    call.o = view(o.data(), {2, T, H, V});
    call.state = view(pool.data(), {slots, H, V, K});
    call.read_slots = view(rows.data(), {2});
    call.window = &window;
    accept.record = window.record;
    accept.slots = call.read_slots;
    accept.accepted = view(accepted.data(), {2});
    accept.tokens = T;
  }
  std::int32_t* length() { return static_cast<std::int32_t*>(window.record.length.data); }
  std::int32_t* order() { return static_cast<std::int32_t*>(window.record.order.data); }

  /// The call throws invalid_argument with this beginning, and changes nothing.
  void refused(const std::string& begin, const std::function<void()>& run) {
    const auto o_before = o, pool_before = pool;
    const auto layer_before = layer, record_before = record;
    try {
      run();
      FAIL("not refused: " << begin);
    } catch (const Error& error) {
      CHECK(error.code() == ErrorCode::invalid_argument);
      const std::string message = error.what();
      CHECK_MESSAGE(message.rfind(begin, 0) == 0, message);
    }
    CHECK(o == o_before);
    CHECK(pool == pool_before);
    CHECK(layer == layer_before);
    CHECK(record == record_before);
  }
  void call_refused(const std::string& begin) {
    refused(begin, [&] { op.forward(call); });
  }
  void accept_refused(const std::string& begin) {
    refused(begin, [&] { op.accept(accept); });
  }
};

std::vector<Backend*> host_backends() {
  std::vector<Backend*> out;
  for (Backend* backend : backends()) {
    if (!backend->availability().available || !backend->reaches({})) continue;
    Problem problem;
    problem.config = config();
    problem.window = true;
    if (const std::string reason = backend->unsupported_reason(problem); !reason.empty())
      MESSAGE("skipped " << backend->name() << ": " << reason);
    else
      out.push_back(backend);
  }
  return out;
}

}  // namespace

TEST_CASE("the layout of a window") {
  Config c = config();
  c.q_heads = c.k_heads = 16;
  c.v_heads = 32;
  c.key_dim = c.value_dim = 128;
  const WindowLayout layout = window_layout(c, 10, 16);
  CHECK(layout.ring == 32);
  CHECK(layout.keys == std::array<std::int64_t, 4>{10, 16, 32, 128});
  CHECK(layout.corrections == std::array<std::int64_t, 4>{10, 32, 32, 128});
  CHECK(layout.layer_bytes == 10 * (16 * 32 * 128 * 2 + 32 * 32 * 128 * 2 + 32 * 32 * 4));
  CHECK(layout.record_bytes == 256 + 10 * 32 * 4);
  CHECK(window_layout(c, 10, 16, DType::f32, 4).ring == 20);
  std::byte memory[256 + 1280];
  const ReplayWindow record = window_at(window_layout(c, 10, 16), nullptr, memory);
  CHECK_FALSE(record.keys.defined());
  CHECK(record.record.order.data == memory + 256);
  for (const std::int64_t capacity : {3, 65}) CHECK_THROWS_AS(window_layout(c, 1, capacity), Error);
  CHECK_THROWS_AS(window_layout(c, 1, 16, DType::f16), Error);
  CHECK_THROWS_AS(window_layout(c, 1, 16, DType::f32, 17), Error);
}

TEST_CASE("calls with a bad window are refused") {
  for (Backend* backend : host_backends()) {
    CAPTURE(backend->name());
    const auto call = [&](const std::string& begin, const std::function<void(Fixture&)>& change) {
      Fixture f(*backend);
      change(f);
      f.call_refused(begin);
    };
    call("window.length: row 0 (slot 2) has 5, expected 0..4", [](Fixture& f) { f.length()[2] = W + 1; });
    call("window.length: row 1 (slot 0) has -1", [](Fixture& f) { f.length()[0] = -1; });
    call("window.order: row 1 (slot 0) has 3 at 1", [](Fixture& f) { f.order()[0] = f.order()[1] = 3; });
    call("window.order: row 0 (slot 2) has 8 at 7", [](Fixture& f) { f.order()[2 * 8 + 7] = 8; });
    call("read_slots: row 1 has slot 3", [](Fixture& f) { f.rows[1] = 3; });
    call("read_slots: rows 0 and 1 both store to slot 2", [](Fixture& f) { f.rows[1] = 2; });
    call("parent: row 0 token 1 has 1, expected -1..0", [](Fixture& f) {
      f.parent[1] = 1;
      f.call.parent = view(f.parent.data(), {2, T});
    });
    call("parent: row 1 token 0 has -2", [](Fixture& f) {
      f.parent[T] = -2;
      f.call.parent = view(f.parent.data(), {2, T});
    });
    call("parent: expected [2, 3]", [](Fixture& f) { f.call.parent = view(f.parent.data(), {T, 2}); });
    call("parent: given, but there is no replay window", [](Fixture& f) {
      f.call.parent = view(f.parent.data(), {2, T});
      f.call.window = nullptr;
    });
    call("state: required", [](Fixture& f) { f.call.state = f.call.read_slots = {}; });
    call("write_slots: given, but", [](Fixture& f) { f.call.write_slots = f.call.read_slots; });
    call("update_state: false", [](Fixture& f) { f.call.update_state = false; });
    call("window.capacity: expected 4..64", [](Fixture& f) { f.window.record.capacity = 2; });
    call("q: expected at most 1 tokens (capacity 7, ring 8)", [](Fixture& f) { f.window.record.capacity = 7; });
    call("window.length: expected [3]",
         [](Fixture& f) { f.window.record.length.shape[0] = f.window.record.order.shape[0] = 2; });
    call("window.keys: expected dtype f32 or bf16", [](Fixture& f) { f.window.keys.dtype = DType::f16; });
    call("window.corrections: expected dtype f32, got bf16", [](Fixture& f) { f.window.corrections.dtype = DType::bf16; });
    call("window.decays: expected stride 1", [](Fixture& f) { f.window.decays.strides[2] = 2; });
    std::vector<std::int32_t> cu = {0, 6};
    call("cu_seqlens: sequence 0 has 6 tokens, expected at most 4", [&](Fixture& f) {
      for (TensorView* tensor : {&f.call.q, &f.call.k, &f.call.v, &f.call.o}) tensor->shape[0] = 1, tensor->shape[1] = 6;
      f.call.read_slots.shape[0] = 1;
      f.call.cu_seqlens = view(cu.data(), {2});
    });
  }
}

TEST_CASE("a bad accept is refused") {
  for (Backend* backend : host_backends()) {
    CAPTURE(backend->name());
    const auto accept = [&](const std::string& begin, const std::function<void(Fixture&)>& change) {
      Fixture f(*backend);
      change(f);
      f.accept_refused(begin);
    };
    accept("accepted: row 0 has 4, expected 0..3", [](Fixture& f) { f.accepted[0] = T + 1; });
    accept("accepted: row 1 has -1", [](Fixture& f) { f.accepted[1] = -1; });
    accept("slots: row 1 has slot 2 again", [](Fixture& f) { f.rows[1] = 2; });
    accept("slots: row 0 has slot 3", [](Fixture& f) { f.rows[0] = 3; });
    accept("tokens: expected 0..4, got 5", [](Fixture& f) { f.accept.tokens = 5; });
    accept("window.length: row 0 (slot 2) has 9", [](Fixture& f) { f.length()[2] = 9; });
    accept("path: row 0 has token 1 at 2, expected 2..2", [](Fixture& f) {
      f.path[2] = 1;
      f.accept.path = view(f.path.data(), {2, T});
    });
    accept("path: row 1 has token 3 at 0", [](Fixture& f) {
      f.path[3] = 3;
      f.accept.path = view(f.path.data(), {2, T});
    });
    Fixture f(*backend);
    const std::int32_t slot[] = {1};
    ForkArguments fork;
    fork.window.record = f.window.record;
    fork.from = fork.to = view(slot, {1});
    f.refused("to: row 0 has slot 1, which row 0 reads", [&] { f.op.copy(fork); });
    FoldArguments fold;
    fold.window = f.window;
    fold.state = f.call.state;
    fold.slots = fork.from;
    f.refused("out: required", [&] { f.op.state_of(fold); });
  }
}

TEST_CASE("lengths, folds and the order") {
  for (Backend* backend : host_backends()) {
    CAPTURE(backend->name());
    Fixture f(*backend);
    const auto pool = f.pool;
    f.op.forward(f.call);
    CHECK(f.pool == pool);  // a step writes no state
    CHECK(f.length()[2] == 0);
    f.op.accept(f.accept);
    CHECK(std::vector<std::int32_t>(f.length(), f.length() + 3) == std::vector<std::int32_t>{1, 0, 3});
    f.op.forward(f.call);  // slot 2: 3 + 3 > 4, slot 0: 1 + 3
    CHECK(std::memcmp(&f.pool[2 * H * V * K], &pool[2 * H * V * K], H * V * K * sizeof(float)) != 0);
    CHECK(std::memcmp(f.pool.data(), pool.data(), 2 * H * V * K * sizeof(float)) == 0);
    // Slot 2 keeps tokens 0, 1, 2 of the places 3, 4, 5; slot 0 keeps token 1 alone.
    f.accept.path = view(f.path.data(), {2, T});
    f.op.accept(f.accept);
    CHECK(std::vector<std::int32_t>(f.length(), f.length() + 3) == std::vector<std::int32_t>{2, 0, 3});
    const std::vector<std::int32_t> order(f.order(), f.order() + 24);
    CHECK(std::vector<std::int32_t>(&order[16], &order[16] + 8) == std::vector<std::int32_t>{3, 4, 5, 6, 7, 0, 1, 2});
    CHECK(std::vector<std::int32_t>(order.begin(), order.begin() + 8) == std::vector<std::int32_t>{0, 2, 1, 3, 4, 5, 6, 7});
    // Padding: nothing is looked at, however bad.
    f.rows = {-1, -5};
    f.length()[0] = 99;
    const auto layer = f.layer;
    f.op.forward(f.call);
    f.op.accept(f.accept);
    CHECK(f.layer == layer);
    CHECK(f.o == std::vector<float>(f.o.size(), 0.0f));
    CHECK(f.length()[0] == 99);
  }
}

TEST_CASE("a backend without windows says so") {
  class Plain final : public Backend {
    std::string_view name() const noexcept override { return "plain"; }
    std::string description() const override { return ""; }
    Availability availability() const override { return {true, {}}; }
    bool reaches(Device) const noexcept override { return true; }
    std::string unsupported_reason(const Problem& problem) const override { return problem.window ? "no windows" : ""; }
    void forward(const Call&) override {}
    void commit(const Config&, const CommitArguments&) override {}
  } plain;
  Fixture f(*find_backend("reference"));
  const GatedDeltaRule op(config(), plain);
  CHECK_THROWS_WITH(op.forward(f.call), "plain: no windows");
  CHECK_THROWS_WITH(op.accept(f.accept), "plain: no windows");
  CHECK_THROWS_WITH(static_cast<Backend&>(plain).accept(config(), f.accept), "plain: replay windows are not implemented");
}
