// SPDX-License-Identifier: Apache-2.0
// How a call finds its backend.
#include <doctest/doctest.h>

#include <algorithm>
#include <cstdlib>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "gatedelta/gatedelta.hpp"

using namespace gatedelta;

namespace {

struct Fake final : Backend {
  std::string label = "fake";
  Availability state{true, {}};
  std::string obstacle;
  bool host = true;
  int calls = 0;

  std::string_view name() const noexcept override { return label; }
  std::string description() const override { return "for tests"; }
  Availability availability() const override { return state; }
  bool reaches(Device device) const noexcept override { return host == (device.type == DeviceType::cpu); }
  std::string unsupported_reason(const Problem&) const override { return obstacle; }
  std::size_t workspace_size(const Problem&) const override { return 4711; }
  void forward(const Call&) override { ++calls; }
  void commit(const Config&, const CommitArguments&) override { ++calls; }
};

/// A registered Fake for the length of a test.
class Registered {
 public:
  explicit Registered(std::unique_ptr<Fake> fake = std::make_unique<Fake>()) : fake_(fake.get()) {
    register_backend(std::move(fake));
  }
  ~Registered() { unregister_backend(fake_->label); }
  Fake* operator->() const { return fake_; }
  Backend* get() const { return fake_; }

 private:
  Fake* fake_;
};

struct Environment {
  explicit Environment(const char* value) { setenv("GATEDELTA_BACKEND", value, 1); }
  ~Environment() { unsetenv("GATEDELTA_BACKEND"); }
};

Config config() {
  Config out;
  out.q_heads = out.k_heads = out.v_heads = 1;
  out.key_dim = out.value_dim = 2;
  out.gate = GateForm::none;
  out.beta = BetaForm::one;
  return out;
}

/// One token of one head.
struct Tensors {
  float q[2] = {1, 0}, k[2] = {0, 1}, v[2] = {1, 2}, o[2] = {};
  Arguments arguments() {
    Arguments out;
    out.q = view(q, {1, 1, 1, 2});
    out.k = view(k, {1, 1, 1, 2});
    out.v = view(v, {1, 1, 1, 2});
    out.o = view(o, {1, 1, 1, 2});
    return out;
  }
};

std::string message_of(const std::function<void()>& call, ErrorCode code) {
  try {
    call();
  } catch (const Error& error) {
    CHECK(error.code() == code);
    return error.what();
  }
  FAIL("nothing was thrown");
  return {};
}

}  // namespace

TEST_CASE("reference is there and comes last") {
  REQUIRE(!backends().empty());
  CHECK(backends().back()->name() == "reference");
  CHECK(find_backend("reference") == backends().back());
  CHECK(find_backend("reference")->availability().available);
  CHECK(find_backend("nonesuch") == nullptr);
  CHECK(find_backend("") == nullptr);
  CHECK(find_backend("auto") == nullptr);
}

TEST_CASE("a backend can be added and removed at run time") {
  const std::size_t before = backends().size();
  {
    const Registered fake;
    CHECK(backends().size() == before + 1);
    CHECK(backends().front() == fake.get());
    CHECK(find_backend("fake") == fake.get());
    Tensors tensors;
    const GatedDeltaRule op(config(), "fake");
    op.forward(tensors.arguments());
    CHECK(fake->calls == 1);
    CHECK(op.workspace_size(tensors.arguments()) == 4711);
    CHECK(message_of([] { register_backend(std::make_unique<Fake>()); }, ErrorCode::invalid_argument) ==
          "register_backend: expected a name that is free, got \"fake\"");
  }
  CHECK(backends().size() == before);
  CHECK(find_backend("fake") == nullptr);
  CHECK(message_of([] { unregister_backend("fake"); }, ErrorCode::invalid_argument) ==
        "unregister_backend: expected a backend added at run time, got \"fake\"");
  CHECK(message_of([] { unregister_backend("reference"); }, ErrorCode::invalid_argument) ==
        "unregister_backend: expected a backend added at run time, got \"reference\"");
  for (const char* name : {"", "auto"}) {
    auto fake = std::make_unique<Fake>();
    fake->label = name;
    CHECK_THROWS_AS(register_backend(std::move(fake)), Error);
  }
  CHECK_THROWS_AS(register_backend(nullptr), Error);
}

TEST_CASE("auto takes the first backend that is available, supports the problem and reaches the memory") {
  const Registered fake;
  Tensors tensors;
  const Arguments arguments = tensors.arguments();
  const GatedDeltaRule op(config(), "auto");
  CHECK(&op.backend_for(arguments) == fake.get());
  const std::vector<Backend*> all = backends();
  Backend* const next =
      *std::find_if(all.begin() + 1, all.end(), [](Backend* b) { return b->availability().available && b->reaches({}); });
  SUBCASE("unavailable") { fake->state = {false, "no such device"}; }
  SUBCASE("unsupported") { fake->obstacle = "only on Sundays"; }
  SUBCASE("out of reach") { fake->host = false; }
  CHECK(&op.backend_for(arguments) == (fake->state.available && fake->obstacle.empty() && fake->host ? fake.get() : next));
}

TEST_CASE("no backend for a call") {
  Tensors tensors;
  Arguments arguments = tensors.arguments();
  for (TensorView* tensor : {&arguments.q, &arguments.k, &arguments.v, &arguments.o}) tensor->device = {DeviceType::cuda, 3};
  const std::string message = message_of([&] { GatedDeltaRule(config(), "auto").forward(arguments); }, ErrorCode::unsupported);
  CHECK(message.find("reference: cannot reach memory on cuda:3") != std::string::npos);
}

TEST_CASE("a backend that was asked for by name is never replaced") {
  const Registered fake;
  Tensors tensors;
  const Arguments arguments = tensors.arguments();
  const GatedDeltaRule op(config(), "fake");
  SUBCASE("unsupported") {
    fake->obstacle = "only on Sundays";
    CHECK(message_of([&] { op.forward(arguments); }, ErrorCode::unsupported) == "fake: only on Sundays");
  }
  SUBCASE("out of reach") {
    fake->host = false;
    CHECK(message_of([&] { op.forward(arguments); }, ErrorCode::unsupported) == "fake: cannot reach memory on cpu");
  }
  SUBCASE("unavailable") {
    fake->state = {false, "no such device"};
    CHECK(message_of([&] { op.forward(arguments); }, ErrorCode::unsupported) == "fake: no such device");
    const std::string message = message_of([] { GatedDeltaRule(config(), "fake"); }, ErrorCode::unsupported);
    CHECK(message.rfind("backend: fake is not available: no such device; there is: fake (unavailable: no such device), ", 0) ==
          0);
  }
  CHECK(fake->calls == 0);
}

TEST_CASE("a backend held by the caller needs no registration") {
  Fake fake;
  Tensors tensors;
  GatedDeltaRule(config(), fake).forward(tensors.arguments());
  CHECK(fake.calls == 1);
}

TEST_CASE("GATEDELTA_BACKEND") {
  const Registered fake;
  Tensors tensors;
  const Arguments arguments = tensors.arguments();
  SUBCASE("chooses") {
    const Environment variable("reference");
    CHECK(GatedDeltaRule(config()).backend_for(arguments).name() == "reference");
  }
  SUBCASE("gives way to a name in the program") {
    const Environment variable("reference");
    CHECK(&GatedDeltaRule(config(), "fake").backend_for(arguments) == fake.get());
    CHECK(&GatedDeltaRule(config(), "auto").backend_for(arguments) == fake.get());
  }
  SUBCASE("empty or auto is auto") {
    for (const char* value : {"", "auto"}) {
      const Environment variable(value);
      CHECK(&GatedDeltaRule(config()).backend_for(arguments) == fake.get());
    }
  }
  SUBCASE("unknown") {
    const Environment variable("cdua");
    const std::string message = message_of([] { GatedDeltaRule op(config()); }, ErrorCode::invalid_argument);
    CHECK(message.rfind("GATEDELTA_BACKEND: expected auto or one of fake, ", 0) == 0);
    CHECK(message.find("reference; got \"cdua\"") != std::string::npos);
  }
  SUBCASE("unavailable") {
    const Environment variable("fake");
    fake->state = {false, "no such device"};
    const std::string message = message_of([] { GatedDeltaRule op(config()); }, ErrorCode::unsupported);
    CHECK(message.rfind("GATEDELTA_BACKEND: fake is not available: no such device", 0) == 0);
    CHECK(message.find("reference") != std::string::npos);
  }
}
