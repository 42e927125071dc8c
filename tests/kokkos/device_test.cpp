// SPDX-License-Identifier: Apache-2.0
// What the kernels do on a device, where teams read the index tensors and leave faults behind: the same code on the host's
// execution space, with host memory that is said to be a device's.
#include <doctest/doctest.h>

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "backends/kokkos/kernels.hpp"
#include "backends/kokkos/session.hpp"
#include "gatedelta/gatedelta.hpp"
#include "verify/check.hpp"
#include "verify/errors.hpp"
#include "verify/generate.hpp"

using namespace gatedelta;

namespace {

constexpr Device elsewhere{DeviceType::cuda, 3};

class FarMemory final : public device::Memory {
 public:
  Device device() const override { return elsewhere; }
  void* allocate(std::size_t bytes) override { return std::aligned_alloc(256, (bytes + 255) / 256 * 256); }
  void release(void* memory) override { std::free(memory); }
  void copy_in(void* to, const void* from, std::size_t bytes) override { std::memcpy(to, from, bytes); }
  void copy_out(void* to, const void* from, std::size_t bytes) override { std::memcpy(to, from, bytes); }
};

class FarBackend final : public Backend {
 public:
  std::string_view name() const noexcept override { return "far"; }
  std::string description() const override { return "the kernels of kokkos as on a device"; }
  Availability availability() const override { return {true, {}}; }
  bool reaches(Device device) const noexcept override { return device == elsewhere; }
  std::string unsupported_reason(const Problem&) const override { return {}; }
  void forward(const Call& call) override {
    kokkos::Session session;
    kokkos::ForwardParams params = kokkos::make_params(call);
    params.fault = session.fault_record();
    launch(session.space(nullptr, 0), "forward", kokkos::Forward(params));
  }
  void commit(const Config& config, const CommitArguments& arguments) override {
    kokkos::Session session;
    kokkos::CommitParams params = kokkos::make_params(config, arguments);
    params.fault = session.fault_record();
    launch(session.space(nullptr, 0), "commit", kokkos::Commit(params));
  }
  void check(void* stream) override {
    const Fault fault = kokkos::Session().take_fault(stream);
    if (fault.kind != 0) throw Error(ErrorCode::device, text(fault));
  }
};

/// A scalar state.
Config scalar() {
  Config config{.q_heads = 1, .k_heads = 1, .v_heads = 1, .key_dim = 1, .value_dim = 1};
  config.gate = GateForm::none;
  config.beta = BetaForm::one;
  return config;
}

std::string device_error(Backend& backend) {
  try {
    backend.synchronize(nullptr);
  } catch (const Error& error) {
    CHECK(error.code() == ErrorCode::device);
    return error.what();
  }
  return {};
}

}  // namespace

TEST_CASE("generated calls on a device") {
  FarBackend backend;
  FarMemory memory;
  int calls = 0;
  for (const verify::Family& family : verify::families())
    for (std::int64_t i = 0; i < 40; ++i) {
      const verify::Case c = verify::make_case(family, 11, i, true);
      CAPTURE(verify::describe(c));
      verify::Checker checker(backend, memory);
      if (std::string_view(family.name) == "errors") {
        for (const verify::BrokenCall& broken : verify::broken_calls(c)) {
          if (!broken.by_value)
            checker.rejects(broken.c, broken.tensor, broken.what);
          else if (!broken.two_writers)
            checker.faults(broken.c, c, broken.tensor, broken.what);
        }
      } else {
        checker.against_golden(c, verify::golden(c));
        checker.repeats(c);
      }
      for (const verify::Failure& failure : checker.failures()) FAIL_CHECK(verify::text(failure));
      calls += checker.calls();
    }
  CHECK(calls > 1000);
}

TEST_CASE("commit copies the accepted snapshots and reports bad rows") {
  FarBackend backend;
  Config config = scalar();
  config.key_dim = 2;
  std::vector<float> snapshots{1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12}, pool(8, -1);  // [3,2,1,1,2] and [4,1,1,2]
  std::vector<std::int32_t> accepted{2, 1, 1};
  std::vector<std::int64_t> slots{3, -1, 0};
  CommitArguments commit;
  commit.snapshots = view(snapshots.data(), {3, 2, 1, 1, 2}, {}, elsewhere);
  commit.accepted = view(accepted.data(), {3}, {}, elsewhere);
  commit.state = view(pool.data(), {4, 1, 1, 2}, {}, elsewhere);
  commit.write_slots = view(slots.data(), {3}, {}, elsewhere);
  const GatedDeltaRule op(config, backend);
  op.commit(commit);
  CHECK(device_error(backend) == "");
  CHECK(pool == std::vector<float>{9, 10, -1, -1, -1, -1, 3, 4});

  pool.assign(8, -1);
  slots = {4, 1, 0};
  op.commit(commit);
  CHECK(device_error(backend) == "write_slots: row 0 has slot 4, the pool has 4 slots");
  CHECK(device_error(backend) == "");
  CHECK(pool == std::vector<float>{9, 10, 5, 6, -1, -1, -1, -1});
  slots = {2, 1, 0};
  accepted = {1, 3, 1};
  op.commit(commit);
  CHECK(device_error(backend) == "accepted: row 1 has 3, expected 1..2");
}

TEST_CASE("the first of several faults is reported") {
  FarBackend backend;
  std::vector<float> q(2, 1), pool(2, 5);
  std::vector<std::int32_t> slots{2, 3};
  Arguments call;
  call.q = call.k = call.v = view(q.data(), {2, 1, 1, 1}, {}, elsewhere);
  std::vector<float> o(2, -1);
  call.o = view(o.data(), {2, 1, 1, 1}, {}, elsewhere);
  call.state = view(pool.data(), {2, 1, 1, 1}, {}, elsewhere);
  call.read_slots = view(slots.data(), {2}, {}, elsewhere);
  GatedDeltaRule(scalar(), backend).forward(call);
  slots = {0, 1};
  GatedDeltaRule(scalar(), backend).forward(call);
  const std::string message = device_error(backend);
  CHECK((message == "read_slots: row 0 has slot 2, the pool has 2 slots" ||
         message == "read_slots: row 1 has slot 3, the pool has 2 slots"));
  CHECK(device_error(backend) == "");
  CHECK(o != std::vector<float>{0, 0});  // the good call after it
}

TEST_CASE("sizes beyond those of the generated calls") {
  constexpr std::int64_t most = kokkos::max_key_dim;
  const auto as_if_random = [](std::size_t size, float step) {
    std::vector<float> out(size);
    for (std::size_t i = 0; i < size; ++i) out[i] = 1 + std::sin(step * static_cast<float>(i));  // no sum cancels
    return out;
  };
  for (const auto& size : {std::pair<std::int64_t, std::int64_t>{most, 7}, {most - 1, 3}, {300, 40}, {3, 2000}, {1, 5000}}) {
    const std::int64_t K = size.first, V = size.second;
    CAPTURE(K);
    CAPTURE(V);
    Config config = scalar();
    config.key_dim = K;
    config.value_dim = V;
    std::vector<float> q = as_if_random(static_cast<std::size_t>(2 * K), 0.7f), k = as_if_random(q.size(), 1.3f),
                       v = as_if_random(static_cast<std::size_t>(2 * V), 2.1f), o(v.size()), expected(v.size()),
                       state = as_if_random(static_cast<std::size_t>(V * K), 0.3f), expected_state = state;
    const auto call = [&](std::vector<float>& out, std::vector<float>& pool, Device device) {
      Arguments arguments;
      arguments.q = view(q.data(), {1, 2, 1, K}, {}, device), arguments.k = view(k.data(), {1, 2, 1, K}, {}, device);
      arguments.v = view(v.data(), {1, 2, 1, V}, {}, device), arguments.o = view(out.data(), {1, 2, 1, V}, {}, device);
      arguments.state = view(pool.data(), {1, 1, V, K}, {}, device);
      return arguments;
    };
    FarBackend backend;
    GatedDeltaRule(config, backend).forward(call(o, state, elsewhere));
    GatedDeltaRule(config, "reference").forward(call(expected, expected_state, {}));
    const auto close = [](const std::vector<float>& found, const std::vector<float>& wanted) {
      double distance = 0, norm = 0;
      for (std::size_t i = 0; i < found.size(); ++i) {
        distance += std::pow(found[i] - wanted[i], 2);
        norm += std::pow(wanted[i], 2);
      }
      return std::sqrt(distance / norm) < 1e-6;
    };
    CHECK(close(o, expected));
    CHECK(close(state, expected_state));
  }
}

TEST_CASE("what the backend does not do") {
  Problem problem;
  problem.config = scalar();
  problem.rows = 1;
  const Backend& backend = *find_backend("kokkos");
  CHECK(backend.unsupported_reason(problem) == "");
  problem.config.key_dim = kokkos::max_key_dim;
  CHECK(backend.unsupported_reason(problem) == "");
  problem.config.key_dim = kokkos::max_key_dim + 1;
  CHECK(backend.unsupported_reason(problem) == "K = 1025 is larger than 1024");
  problem.config.key_dim = 1;
  problem.window = true;
  CHECK(backend.unsupported_reason(problem) == "replay windows are not implemented");
  problem.window = false;
  problem.config.value_dim = 4096;
  problem.rows = std::int64_t{1} << 31;
  CHECK(backend.unsupported_reason(problem) == "more than 2^31 teams of rows, heads and value rows");
  CHECK(backend.reaches(Device{}));
  CHECK_FALSE(backend.reaches(elsewhere));
}
