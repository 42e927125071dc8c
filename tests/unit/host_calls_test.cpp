// SPDX-License-Identifier: Apache-2.0
// Copies of calls to another memory and back, with a device that is really host memory, so that no GPU is needed.
#include "device/host_calls.hpp"

#include <doctest/doctest.h>

#include <cstdlib>
#include <cstring>
#include <set>
#include <string>
#include <vector>

#include "gatedelta/gatedelta.hpp"
#include "verify/generate.hpp"
#include "verify/memory.hpp"

using namespace gatedelta;

namespace {

constexpr Device elsewhere{DeviceType::cuda, 3};

class FarMemory final : public device::Memory {
 public:
  ~FarMemory() override { CHECK(blocks.empty()); }
  Device device() const override { return elsewhere; }
  void* allocate(std::size_t bytes) override {
    ++allocations;
    void* memory = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
    std::memset(memory, 0xff, bytes);
    blocks.insert(memory);
    return memory;
  }
  void release(void* memory) override {
    CHECK(blocks.erase(memory) == 1);
    std::free(memory);
  }
  void copy_in(void* to, const void* from, std::size_t bytes) override { std::memcpy(to, from, bytes); }
  void copy_out(void* to, const void* from, std::size_t bytes) override { std::memcpy(to, from, bytes); }

  int allocations = 0;
  std::set<void*> blocks;
};

/// The reference, for tensors that are said to be elsewhere. Wants a workspace and can report a fault after the call.
class FarBackend final : public Backend {
 public:
  std::string_view name() const noexcept override { return "far"; }
  std::string description() const override { return "the reference elsewhere"; }
  Availability availability() const override { return {true, {}}; }
  bool reaches(Device device) const noexcept override { return device == elsewhere; }
  std::string unsupported_reason(const Problem&) const override { return {}; }
  std::size_t workspace_size(const Problem&) const override { return 100; }
  void forward(const Call& call) override {
    Arguments host = *call.arguments;
    REQUIRE(host.workspace != nullptr);
    REQUIRE(host.workspace_size == 100);
    std::memset(host.workspace, 1, 100);
    for (const device::Field& field : device::fields) (host.*field.view).device = {};
    host.parent.device = {};
    ReplayWindow window;
    if (host.window != nullptr) {
      window = *host.window;
      host.window = &window;
      for (TensorView* view :
           {&window.keys, &window.corrections, &window.decays, &window.record.length, &window.record.order}) {
        REQUIRE(view->device == elsewhere);
        view->device = {};
      }
    }
    GatedDeltaRule(call.problem.config, "reference").forward(host);
  }
  void commit(const Config&, const CommitArguments&) override { FAIL("not called"); }
  void check(void*) override {
    if (fault) throw Error(ErrorCode::device, "a fault");
  }

  bool fault = false;
};

}  // namespace

TEST_CASE("a call by copies changes what the call itself changes, bit by bit") {
  FarBackend backend;
  verify::Memory& host = device::host_memory();
  for (std::int64_t i = 0; i < 100; ++i) {
    const verify::Case c = verify::make_case(*verify::find_family("any"), 5, i);
    CAPTURE(verify::describe(c));
    verify::Instance direct(c, host), copied(c, host);
    GatedDeltaRule(c.config, "reference").forward(direct.arguments());
    FarMemory memory;
    device::HostCalls calls(memory);
    CHECK(&calls.forward(GatedDeltaRule(c.config, backend), copied.arguments()) == &backend);
    CHECK(memory.allocations <= 2);
    for (const device::Field& field : device::fields) {
      const TensorView &expected = direct.arguments().*field.view, &found = copied.arguments().*field.view;
      CHECK(found.device == Device{});
      std::size_t lowest = 0, highest = 1;  // in elements
      if (expected.elements() == 0) continue;
      for (int d = 0; d < expected.rank; ++d) {
        const std::int64_t reach = expected.strides[d] * (expected.shape[d] - 1);
        (reach < 0 ? lowest : highest) += static_cast<std::size_t>(reach < 0 ? -reach : reach);
      }
      const std::size_t element = size_of(expected.dtype), before = lowest * element, bytes = (lowest + highest) * element;
      CHECK_MESSAGE(
          std::memcmp(static_cast<char*>(expected.data) - before, static_cast<char*>(found.data) - before, bytes) == 0,
          field.name);
    }
  }
}

TEST_CASE("columns of one matrix, states that stay there, and a second call without new memory") {
  FarMemory memory;
  FarBackend backend;
  const Config config{
      .q_heads = 1, .k_heads = 1, .v_heads = 1, .key_dim = 2, .value_dim = 3, .gate = GateForm::none, .beta = BetaForm::one};
  const auto run = [&](device::HostCalls* calls, const TensorView& state) {
    std::vector<float> mixed = {1, 2, 3, 4, 5, 6, 7, 8, 7, 6, 5, 4, 3, 2};  // two tokens: q, k and v
    std::vector<float> o(6);
    Arguments call;
    call.q = view(mixed.data(), {2, 1, 1, 2}, {7, 7, 2, 1});
    call.k = view(mixed.data() + 2, {2, 1, 1, 2}, {7, 7, 2, 1});
    call.v = view(mixed.data() + 4, {2, 1, 1, 3}, {7, 7, 3, 1});
    call.o = view(o.data(), {2, 1, 1, 3});
    call.state = state;
    if (calls != nullptr)
      calls->forward(GatedDeltaRule(config, backend), call);
    else
      GatedDeltaRule(config, "reference").forward(call);
    return o;
  };
  std::vector<float> near(12, 0.5f), far = near;
  device::HostCalls calls(memory);
  const TensorView there = view(far.data(), {2, 1, 3, 2}, {}, elsewhere);
  for (int i = 0; i < 2; ++i) {
    CHECK(run(&calls, there) == run(nullptr, view(near.data(), {2, 1, 3, 2})));
    CHECK(far == near);
    CHECK(memory.allocations == 2);
  }
  backend.fault = true;
  std::vector<float> untouched = near;
  CHECK_THROWS_WITH_AS(run(&calls, view(untouched.data(), {2, 1, 3, 2})), "a fault", Error);
  CHECK(untouched == near);
}

TEST_CASE("replay windows and trees are copied, and what was appended comes back") {
  const Config config{
      .q_heads = 1, .k_heads = 1, .v_heads = 2, .key_dim = 2, .value_dim = 3, .gate = GateForm::none, .beta = BetaForm::one};
  const WindowLayout layout = window_layout(config, 2, 4, DType::f32, 2);
  std::vector<std::int32_t> slots = {1, 0}, parents = {-1, -1, -1, 0}, accepted = {2, 1}, paths = {0, 1, 1, -1};
  FarBackend backend;
  const GatedDeltaRule reference(config, "reference"), far(config, backend);
  // All memory of one user: five steps, so that windows are folded.
  const auto run = [&](device::HostCalls* calls) {
    std::vector<float> q(8), k(8), v(24), o(24), pool(24, 0.5f), layer(layout.layer_bytes / 4), all;
    std::vector<std::int32_t> record(layout.record_bytes / 4);
    const ReplayWindow window = window_at(layout, layer.data(), record.data());
    reference.reset({.record = window.record});
    Arguments call;
    call.q = view(q.data(), {2, 2, 1, 2}), call.k = view(k.data(), {2, 2, 1, 2}), call.v = view(v.data(), {2, 2, 2, 3});
    call.o = view(o.data(), {2, 2, 2, 3}), call.state = view(pool.data(), {2, 2, 3, 2});
    call.read_slots = view(slots.data(), {2}), call.parent = view(parents.data(), {2, 2}), call.window = &window;
    for (int step = 0; step < 5; ++step) {
      for (std::size_t i = 0; i < v.size(); ++i) v[i] = static_cast<float>(i) - static_cast<float>(step);
      for (std::size_t i = 0; i < q.size(); ++i)
        q[i] = k[(i + 3) % 8] = static_cast<float>(i % 3) + static_cast<float>(step) + 1;
      if (calls != nullptr)
        calls->forward(far, call);
      else
        reference.forward(call);
      CHECK(call.window == &window);
      all.insert(all.end(), o.begin(), o.end());
      reference.accept({.record = window.record,
                        .slots = call.read_slots,
                        .accepted = view(accepted.data(), {2}),
                        .tokens = 2,
                        .path = view(paths.data(), {2, 2})});
    }
    all.insert(all.end(), pool.begin(), pool.end());
    all.insert(all.end(), layer.begin(), layer.end());
    all.insert(all.end(), record.begin(), record.end());
    return all;
  };
  FarMemory memory;
  device::HostCalls calls(memory);
  CHECK(run(&calls) == run(nullptr));
}

TEST_CASE("which memory a name means") {
  CHECK(&device::memory_for_name("reference") == &device::host_memory());
  CHECK(&device::memory_for_name("auto") == &device::host_memory());
  CHECK_THROWS_AS(device::memory_for_name("nonesuch"), Error);
  FarBackend* far = static_cast<FarBackend*>(&register_backend(std::make_unique<FarBackend>()));
  CHECK(device::memory_for(*far) == nullptr);
  CHECK_THROWS_WITH_AS(device::memory_for_name("far"), "far: this build cannot copy tensors to its memory", Error);
  unregister_backend("far");
}
