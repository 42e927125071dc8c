// SPDX-License-Identifier: Apache-2.0
// The C interface does what the C++ interface does, and its structs may be of another version.
#include <doctest/doctest.h>

#include <bit>
#include <cmath>
#include <cstring>
#include <deque>
#include <limits>
#include <string>
#include <thread>
#include <vector>

#include "core/versioned.hpp"
#include "gatedelta/gatedelta.h"
#include "gatedelta/gatedelta.hpp"
#include "verify/generate.hpp"
#include "verify/memory.hpp"

using namespace gatedelta;

namespace {

/// C++ structs as those of C, which point into this object.
class Translated {
 public:
  gatedelta_config config;
  gatedelta_arguments arguments;

  Translated(const Config& c, const Arguments& in) {
    REQUIRE(gatedelta_config_init(&config, sizeof config) == GATEDELTA_SUCCESS);
    REQUIRE(gatedelta_arguments_init(&arguments, sizeof arguments) == GATEDELTA_SUCCESS);
    config.q_heads = c.q_heads, config.k_heads = c.k_heads, config.v_heads = c.v_heads;
    config.key_dim = c.key_dim, config.value_dim = c.value_dim;
    config.q_dtype = int(c.dtypes.q), config.k_dtype = int(c.dtypes.k);
    config.v_dtype = int(c.dtypes.v), config.o_dtype = int(c.dtypes.o);
    config.gate_dtype = int(c.dtypes.gate), config.beta_dtype = int(c.dtypes.beta);
    config.A_log_dtype = int(c.dtypes.A_log), config.dt_bias_dtype = int(c.dtypes.dt_bias);
    config.state_dtype = int(c.dtypes.state), config.snapshots_dtype = int(c.dtypes.snapshots);
    config.gate = int(c.gate), config.beta = int(c.beta);
    config.qk_l2norm = c.qk_l2norm, config.num_threads = c.num_threads, config.l2_eps = c.l2_eps;
    config.has_scale = c.scale.has_value(), config.scale = c.scale.value_or(0);
    config.softplus_beta = c.softplus_beta, config.softplus_threshold = c.softplus_threshold;
    config.null_slot = c.null_slot;
#define TENSOR(name) arguments.name = tensor(in.name)
    TENSOR(q), TENSOR(k), TENSOR(v), TENSOR(o), TENSOR(a), TENSOR(g), TENSOR(A_log), TENSOR(dt_bias), TENSOR(b), TENSOR(beta);
    TENSOR(state), TENSOR(read_slots), TENSOR(write_slots), TENSOR(token_slots), TENSOR(accepted), TENSOR(state_in);
    TENSOR(state_out), TENSOR(snapshots), TENSOR(cu_seqlens);
#undef TENSOR
    arguments.update_state = in.update_state;
  }
  const gatedelta_tensor* tensor(const TensorView& view) {
    if (!view.defined()) return nullptr;
    views_.push_back(view);
    gatedelta_tensor out = gatedelta_view(view.data, int(view.dtype), view.rank, views_.back().shape.data());
    out.strides = views_.back().strides.data();
    return &tensors_.emplace_back(out);
  }

 private:
  std::deque<TensorView> views_;  // stay where they are
  std::deque<gatedelta_tensor> tensors_;
};

struct Rule {
  gatedelta_rule* handle = nullptr;
  ~Rule() { gatedelta_rule_destroy(handle); }
};

bool same(const std::vector<double>& left, const std::vector<double>& right) {
  return left.size() == right.size() &&
         (left.empty() || std::memcmp(left.data(), right.data(), left.size() * sizeof(double)) == 0);
}

/// A small call in order, with a pool.
struct Small {
  float memory[64] = {};
  std::int32_t slots[1] = {0};
  Config config;
  Arguments call;
  Small() {
    config.q_heads = config.k_heads = config.v_heads = 1;
    config.key_dim = config.value_dim = 2;
    call.q = view(memory, {1, 1, 1, 2}), call.k = view(memory + 2, {1, 1, 1, 2}), call.v = view(memory + 4, {1, 1, 1, 2});
    call.o = view(memory + 6, {1, 1, 1, 2}), call.a = view(memory + 8, {1, 1, 1}), call.b = view(memory + 9, {1, 1, 1});
    call.A_log = view(memory + 10, {1}), call.state = view(memory + 16, {3, 1, 2, 2}), call.read_slots = view(slots, {1});
    for (int i = 0; i < 6; ++i) memory[i] = static_cast<float>(i + 1);
  }
};

void check_failure(gatedelta_status status, gatedelta_status expected, const std::string& message) {
  CHECK(status == expected);
  CHECK(std::string(gatedelta_last_error()) == message);
}

}  // namespace

TEST_CASE("calls through C give the bits that calls through C++ give") {
  const verify::Family& any = *verify::find_family("any");
  for (const char* name : {"reference", "cpu"}) {
    verify::Memory& memory = *verify::memory_for(*find_backend(name));
    for (std::int64_t number = 0; number < 60; ++number) {
      const verify::Case c = verify::make_case(any, 11, number);
      CAPTURE(verify::describe(c));
      verify::Instance one(c, memory), other(c, memory);
      const Translated translated(c.config, other.arguments());
      REQUIRE(gatedelta_validate(&translated.config, &translated.arguments) == GATEDELTA_SUCCESS);
      Rule rule;
      REQUIRE(gatedelta_rule_create(&translated.config, name, &rule.handle) == GATEDELTA_SUCCESS);
      std::size_t bytes = 1;
      REQUIRE(gatedelta_workspace_size(rule.handle, &translated.arguments, &bytes) == GATEDELTA_SUCCESS);
      const GatedDeltaRule op(c.config, name);
      CHECK(bytes == op.workspace_size(one.arguments()));
      const char* chosen = nullptr;
      REQUIRE(gatedelta_backend_for(rule.handle, &translated.arguments, &chosen) == GATEDELTA_SUCCESS);
      CHECK(std::string(chosen) == name);

      op.forward(one.arguments());
      REQUIRE(gatedelta_forward(rule.handle, &translated.arguments) == GATEDELTA_SUCCESS);
      one.download();
      other.download();
      for (const verify::Tensor tensor : {verify::Tensor::o, c.state_output(), verify::Tensor::snapshots})
        if (c[tensor].present()) CHECK(same(one.values(tensor), other.values(tensor)));
    }
  }
}

TEST_CASE("commit through C") {
  Small small;
  const std::vector<float> snapshots = {1, 2, 3, 4, 5, 6, 7, 8};
  const std::int32_t accepted = 2, slot = 1;
  const TensorView views[] = {view(snapshots.data(), {1, 2, 1, 2, 2}), view(&accepted, {1}), small.call.state,
                              view(&slot, {1})};
  Translated translated(small.config, small.call);
  gatedelta_commit_arguments commit;
  REQUIRE(gatedelta_commit_arguments_init(&commit, sizeof commit) == GATEDELTA_SUCCESS);
  commit.snapshots = translated.tensor(views[0]), commit.accepted = translated.tensor(views[1]);
  commit.state = translated.tensor(views[2]), commit.write_slots = translated.tensor(views[3]);
  Rule rule;
  REQUIRE(gatedelta_rule_create(&translated.config, nullptr, &rule.handle) == GATEDELTA_SUCCESS);
  CHECK(gatedelta_validate_commit(&translated.config, &commit) == GATEDELTA_SUCCESS);
  REQUIRE(gatedelta_commit(rule.handle, &commit) == GATEDELTA_SUCCESS);
  for (int i = 0; i < 12; ++i) CHECK(small.memory[16 + i] == (i >= 4 && i < 8 ? float(i + 1) : 0));
  commit.accepted = nullptr;
  check_failure(gatedelta_commit(rule.handle, &commit), GATEDELTA_ERROR_INVALID_ARGUMENT, "accepted: required, but not given");
}

TEST_CASE("defaults are those of C++") {
  const Config expected;
  gatedelta_config config;
  REQUIRE(gatedelta_config_init(&config, sizeof config) == GATEDELTA_SUCCESS);
  CHECK(config.size == sizeof config);
  CHECK(config.qk_l2norm == 1);
  CHECK(config.l2_eps == expected.l2_eps);
  CHECK(config.softplus_beta == expected.softplus_beta);
  CHECK(config.softplus_threshold == expected.softplus_threshold);
  CHECK(config.null_slot == expected.null_slot);
  CHECK(config.has_scale == 0);
  gatedelta_arguments arguments;
  REQUIRE(gatedelta_arguments_init(&arguments, sizeof arguments) == GATEDELTA_SUCCESS);
  CHECK(arguments.update_state == 1);
  CHECK(arguments.q == nullptr);
  CHECK(arguments.workspace == nullptr);
}

TEST_CASE("structs have the layout of the first release") {
  // Programs are built with these numbers: a change breaks them. New fields go to the end.
  CHECK(sizeof(gatedelta_tensor) == 48);
  CHECK(offsetof(gatedelta_tensor, device_index) == 44);
  CHECK(sizeof(gatedelta_config) == 152);
  CHECK(offsetof(gatedelta_config, null_slot) == 144);
  CHECK(offsetof(gatedelta_config, l2_eps) == 104);
  CHECK(sizeof(gatedelta_arguments) == 192);
  CHECK(offsetof(gatedelta_arguments, update_state) == 160);
  CHECK(sizeof(gatedelta_commit_arguments) == 48);
}

TEST_CASE("shorter structs have defaults, longer ones zeros at the end") {
  Small small;
  Translated translated(small.config, small.call);

  SUBCASE("a program older than the library") {
    translated.config.null_slot = 7;  // beyond the size: not looked at, or slot 0 would be padding
    translated.config.size = offsetof(gatedelta_config, null_slot);
    translated.arguments.stream = &small;
    translated.arguments.update_state = 0;
    translated.arguments.size = offsetof(gatedelta_arguments, update_state);
    Rule rule;
    REQUIRE(gatedelta_rule_create(&translated.config, "reference", &rule.handle) == GATEDELTA_SUCCESS);
    REQUIRE(gatedelta_forward(rule.handle, &translated.arguments) == GATEDELTA_SUCCESS);
    CHECK(small.memory[6] != 0);   // an output
    CHECK(small.memory[16] != 0);  // the state was updated: the default
    std::vector<unsigned char> bytes(sizeof(gatedelta_config), 0xee);
    REQUIRE(gatedelta_config_init(reinterpret_cast<gatedelta_config*>(bytes.data()), 104) == GATEDELTA_SUCCESS);
    CHECK(bytes[0] == 104);
    CHECK(bytes[103] == 0);
    CHECK(bytes[104] == 0xee);
  }
  SUBCASE("a program newer than the library") {
    struct Newer {
      gatedelta_config config;
      double later;
    } newer;
    std::memset(static_cast<void*>(&newer), 0xee, sizeof newer);
    REQUIRE(gatedelta_config_init(&newer.config, sizeof newer) == GATEDELTA_SUCCESS);
    CHECK(newer.config.size == sizeof newer);
    CHECK(newer.later == 0);
    newer.config = translated.config;
    newer.config.size = sizeof newer;
    CHECK(gatedelta_validate_config(&newer.config) == GATEDELTA_SUCCESS);
    newer.later = 1;
    check_failure(gatedelta_validate_config(&newer.config), GATEDELTA_ERROR_UNSUPPORTED,
                  "config: options beyond the 152 bytes that this version of the library knows are set; it is older than the "
                  "program that calls it");
  }
  SUBCASE("no size at all") {
    translated.config.size = 0;
    check_failure(gatedelta_validate_config(&translated.config), GATEDELTA_ERROR_INVALID_ARGUMENT,
                  "config: expected in its first member the struct's size (152 in this version), got 0");
    translated.config.size = 0xeeeeeeeeeeeeeee8;
    CHECK(gatedelta_validate_config(&translated.config) == GATEDELTA_ERROR_INVALID_ARGUMENT);
    check_failure(gatedelta_config_init(&translated.config, 3), GATEDELTA_ERROR_INVALID_ARGUMENT,
                  "config: expected the struct's size (152 in this version), got 3");
  }
  SUBCASE("fields of a later version") {
    struct Later {
      std::uint64_t size;
      std::int64_t first, added;
    };
    const Later defaults = {sizeof(Later), 1, 2}, old = {16, 5, 6}, full = {24, 5, 6};
    CHECK(read_versioned("later", &old, defaults).first == 5);
    CHECK(read_versioned("later", &old, defaults).added == 2);
    CHECK(read_versioned("later", &full, defaults).added == 6);
  }
}

TEST_CASE("errors through C") {
  Small small;
  Translated translated(small.config, small.call);
  gatedelta_rule* rule = nullptr;
  REQUIRE(gatedelta_rule_create(&translated.config, "reference", &rule) == GATEDELTA_SUCCESS);
  const Rule owner{rule};
  gatedelta_tensor q = *translated.arguments.q;
  translated.arguments.q = &q;

  SUBCASE("the messages of C++, and of what only C can get wrong") {
    const auto forward = [&](gatedelta_status code, const char* message) {
      check_failure(gatedelta_forward(rule, &translated.arguments), code, message);
      CHECK(small.memory[6] == 0);
    };
    const std::int64_t wide[] = {1, 1, 1, 3}, negative[] = {1, 1, -1, 2};
    q.shape = wide;
    forward(GATEDELTA_ERROR_INVALID_ARGUMENT, "q: expected [B, T, 1, 2], got [1, 1, 1, 3]");
    q.shape = negative;
    forward(GATEDELTA_ERROR_INVALID_ARGUMENT, "q: dimension 2 has the negative size -1");
    q.shape = nullptr;
    forward(GATEDELTA_ERROR_INVALID_ARGUMENT, "q.shape: expected an address, got a null pointer");
    q.rank = 6;
    forward(GATEDELTA_ERROR_INVALID_ARGUMENT, "q: expected 1 to 5 dimensions, got 6");
    q.rank = 4, q.shape = wide, q.dtype = 9;
    forward(GATEDELTA_ERROR_INVALID_ARGUMENT, "q.dtype: expected a value from 0 to 4, got 9");
    q.dtype = 0, q.device_type = -1;
    forward(GATEDELTA_ERROR_INVALID_ARGUMENT, "q.device_type: expected a value from 0 to 1, got -1");
    translated.arguments.q = nullptr;
    forward(GATEDELTA_ERROR_INVALID_ARGUMENT, "q: required, but not given");
    translated.config.reserved = 1;
    check_failure(gatedelta_validate_config(&translated.config), GATEDELTA_ERROR_INVALID_ARGUMENT,
                  "config.reserved: expected 0, got 1");
    check_failure(gatedelta_forward(nullptr, &translated.arguments), GATEDELTA_ERROR_INVALID_ARGUMENT,
                  "rule: expected an address, got a null pointer");
    check_failure(gatedelta_forward(rule, nullptr), GATEDELTA_ERROR_INVALID_ARGUMENT,
                  "arguments: expected a struct, got a null pointer");
  }
  SUBCASE("a rule that cannot be made is null") {
    gatedelta_rule* none = rule;
    CHECK(gatedelta_rule_create(&translated.config, "no such", &none) == GATEDELTA_ERROR_INVALID_ARGUMENT);
    CHECK(none == nullptr);
    CHECK(std::string(gatedelta_last_error()).find("\"no such\"") != std::string::npos);
    gatedelta_rule_destroy(none);
  }
  SUBCASE("messages are kept per thread, and calls that succeed leave them") {
    CHECK(gatedelta_backend_count(nullptr) == GATEDELTA_ERROR_INVALID_ARGUMENT);
    std::thread([&] {
      CHECK(std::string(gatedelta_last_error()).empty());
      CHECK(gatedelta_backend_name(1000, nullptr) == GATEDELTA_ERROR_INVALID_ARGUMENT);
      CHECK(std::string(gatedelta_last_error()).starts_with("index: expected less than "));
    }).join();
    CHECK(gatedelta_validate_config(&translated.config) == GATEDELTA_SUCCESS);
    CHECK(std::string(gatedelta_last_error()) == "count: expected an address, got a null pointer");
  }
  SUBCASE("names") {
    CHECK(std::string(gatedelta_status_name(GATEDELTA_SUCCESS)) == "success");
    CHECK(std::string(gatedelta_status_name(GATEDELTA_ERROR_DEVICE)) == "device error");
    CHECK(std::string(gatedelta_status_name(GATEDELTA_ERROR_OTHER)) == "unknown error");
    CHECK(std::string(gatedelta_version()) == GATEDELTA_PROJECT_VERSION);
    CHECK(std::string(gatedelta_version()) == version());
  }
}

namespace {

/// A backend whose every answer is "no", and whose calls throw what is not the library's.
class Foreign : public Backend {
 public:
  std::string_view name() const noexcept override { return "foreign"; }
  std::string description() const override { return "throws"; }
  Availability availability() const override { return {true, ""}; }
  bool reaches(Device) const noexcept override { return true; }
  std::string unsupported_reason(const Problem&) const override { return refuses ? "it is in no mood" : ""; }
  void forward(const Call& call) override {
    dependent_launch = call.arguments->dependent_launch;
    throw std::runtime_error("foreign trouble");
  }
  void commit(const Config&, const CommitArguments&) override { throw 1; }
  void check(void*) override { throw Error(ErrorCode::device, "foreign device"); }
  bool refuses = false, dependent_launch = false;
};

}  // namespace

TEST_CASE("backends through C") {
  std::size_t count = 0;
  REQUIRE(gatedelta_backend_count(&count) == GATEDELTA_SUCCESS);
  const std::vector<Backend*> all = backends();
  REQUIRE(count == all.size());
  for (std::size_t i = 0; i < count; ++i) {
    const char *name = nullptr, *text = nullptr;
    REQUIRE(gatedelta_backend_name(i, &name) == GATEDELTA_SUCCESS);
    CHECK(name == all[i]->name());
    REQUIRE(gatedelta_backend_description(name, &text) == GATEDELTA_SUCCESS);
    CHECK(text == all[i]->description());
    std::int32_t yes = -1;
    REQUIRE(gatedelta_backend_available(name, &yes, &text) == GATEDELTA_SUCCESS);
    CHECK(yes == all[i]->availability().available);
    CHECK(text == all[i]->availability().reason);
    REQUIRE(gatedelta_backend_reaches(name, GATEDELTA_DEVICE_CUDA, 0, &yes) == GATEDELTA_SUCCESS);
    CHECK(yes == all[i]->reaches({DeviceType::cuda, 0}));
  }
  const char* text = nullptr;
  CHECK(gatedelta_backend_description("absent", &text) == GATEDELTA_ERROR_INVALID_ARGUMENT);
  CHECK(gatedelta_synchronize("cpu", nullptr) == GATEDELTA_SUCCESS);

  SUBCASE("one that was added in C++") {
    Small small;
    Translated translated(small.config, small.call);
    auto& foreign = static_cast<Foreign&>(register_backend(std::make_unique<Foreign>()));
    std::int32_t yes = -1;
    REQUIRE(gatedelta_backend_supports("foreign", &translated.config, &translated.arguments, &yes, &text) == GATEDELTA_SUCCESS);
    CHECK(yes == 1);
    foreign.refuses = true;
    REQUIRE(gatedelta_backend_supports("foreign", &translated.config, &translated.arguments, &yes, &text) == GATEDELTA_SUCCESS);
    CHECK(yes == 0);
    CHECK(std::string(text) == "it is in no mood");
    foreign.refuses = false;
    {
      Rule rule;
      REQUIRE(gatedelta_rule_create(&translated.config, "foreign", &rule.handle) == GATEDELTA_SUCCESS);
      for (const std::int32_t dependent : {1, 0}) {
        translated.arguments.dependent_launch = dependent;
        check_failure(gatedelta_forward(rule.handle, &translated.arguments), GATEDELTA_ERROR_OTHER, "foreign trouble");
        CHECK(foreign.dependent_launch == (dependent == 1));
      }
    }
    check_failure(gatedelta_check("foreign", nullptr), GATEDELTA_ERROR_DEVICE, "foreign device");
    const char* name = nullptr;
    REQUIRE(gatedelta_backend_name(0, &name) == GATEDELTA_SUCCESS);
    unregister_backend("foreign");
    CHECK(std::string(name) == "foreign");  // still there
  }
}
