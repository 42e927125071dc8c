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

namespace {

/// Two sequences of four slots, in trees of two tokens: everything that calls for replay windows read and write.
struct WindowUser {
  Config config;
  WindowLayout layout;
  std::vector<float> q = std::vector<float>(32), k = q, v = q, g = std::vector<float>(4, -0.1f), o = std::vector<float>(32),
                     pool = std::vector<float>(4 * 64, 0.25f), state = std::vector<float>(2 * 64);
  std::vector<std::int32_t> slots = {2, 0}, others = {3, 1}, parent = {-1, -1, -1, 0}, accepted = {1, 2}, path = {1, -1, 0, 1};
  std::vector<std::byte> layer, record;
  Arguments call;
  ReplayWindow window;

  WindowUser() {
    config.q_heads = config.k_heads = config.v_heads = 1;
    config.key_dim = config.value_dim = 8;
    config.gate = GateForm::log_decay;
    config.beta = BetaForm::one;
    layout = window_layout(config, 4, 4, DType::bf16, 2);
    layer.resize(layout.layer_bytes);
    record.resize(layout.record_bytes);
    window = window_at(layout, layer.data(), record.data());
    for (std::size_t i = 0; i < q.size(); ++i) {
      q[i] = static_cast<float>(i % 5) - 1.0f;
      k[i] = static_cast<float>(i % 7) - 2.0f;
      v[i] = static_cast<float>(i % 3);
    }
    call.q = view(q.data(), {2, 2, 1, 8}), call.k = view(k.data(), {2, 2, 1, 8}), call.v = view(v.data(), {2, 2, 1, 8});
    call.g = view(g.data(), {2, 2, 1}), call.o = view(o.data(), {2, 2, 1, 8}), call.state = view(pool.data(), {4, 1, 8, 8});
    call.read_slots = view(slots.data(), {2}), call.parent = view(parent.data(), {2, 2});
  }
  void compare(const WindowUser& other) const {
    CHECK(o == other.o);
    CHECK(pool == other.pool);
    CHECK(layer == other.layer);
    CHECK(record == other.record);
    CHECK(state == other.state);
  }
};

/// The same memory as structs of C.
struct WindowUserInC : WindowUser {
  Translated translated{config, call};
  gatedelta_window_layout c_layout;
  gatedelta_window c_window;
  Rule rule;
  gatedelta_accept_arguments accept;
  gatedelta_reset_arguments reset;
  gatedelta_fold_arguments fold;
  gatedelta_fork_arguments fork;

  explicit WindowUserInC(const char* backend) {
    REQUIRE(gatedelta_window_layout_init(&c_layout, sizeof c_layout, &translated.config, 4, 4, GATEDELTA_BF16, 2) ==
            GATEDELTA_SUCCESS);
    CHECK(c_layout.layer_bytes == layout.layer_bytes);
    CHECK(c_layout.record_bytes == layout.record_bytes);
    CHECK(c_layout.ring == layout.ring);
    REQUIRE(gatedelta_window_init(&c_window, sizeof c_window) == GATEDELTA_SUCCESS);
    c_window.layout = &c_layout, c_window.layer = layer.data(), c_window.record = record.data();
    translated.arguments.parent = translated.tensor(call.parent);
    translated.arguments.window = &c_window;
    REQUIRE(gatedelta_rule_create(&translated.config, backend, &rule.handle) == GATEDELTA_SUCCESS);
    REQUIRE(gatedelta_accept_arguments_init(&accept, sizeof accept) == GATEDELTA_SUCCESS);
    REQUIRE(gatedelta_reset_arguments_init(&reset, sizeof reset) == GATEDELTA_SUCCESS);
    REQUIRE(gatedelta_fold_arguments_init(&fold, sizeof fold) == GATEDELTA_SUCCESS);
    REQUIRE(gatedelta_fork_arguments_init(&fork, sizeof fork) == GATEDELTA_SUCCESS);
    accept.window = reset.window = fold.window = fork.window = &c_window;
    accept.slots = fold.slots = fork.from = translated.tensor(call.read_slots);
    accept.accepted = translated.tensor(view(accepted.data(), {2}));
    accept.path = translated.tensor(view(path.data(), {2, 2}));
    accept.tokens = 2;
    fold.state = fork.state = translated.tensor(call.state);
    fork.to = translated.tensor(view(others.data(), {2}));
  }
};

}  // namespace

TEST_CASE("replay windows through C give the bits that they give through C++") {
  for (const char* name : {"reference", "cpu"}) {
    CAPTURE(name);
    WindowUser one;
    WindowUserInC other(name);
    const GatedDeltaRule op(one.config, name);
    const TensorView slots = one.call.read_slots, to = view(one.others.data(), {2});
    one.call.window = &one.window;

    op.reset({.record = one.window.record});
    REQUIRE(gatedelta_validate_reset(&other.translated.config, &other.reset) == GATEDELTA_SUCCESS);
    REQUIRE(gatedelta_window_reset(other.rule.handle, &other.reset) == GATEDELTA_SUCCESS);
    for (int step = 0; step < 5; ++step) {  // the second sequence is folded
      op.forward(one.call);
      REQUIRE(gatedelta_validate(&other.translated.config, &other.translated.arguments) == GATEDELTA_SUCCESS);
      REQUIRE(gatedelta_forward(other.rule.handle, &other.translated.arguments) == GATEDELTA_SUCCESS);
      op.accept({.record = one.window.record,
                 .slots = slots,
                 .accepted = view(one.accepted.data(), {2}),
                 .tokens = 2,
                 .path = view(one.path.data(), {2, 2})});
      REQUIRE(gatedelta_validate_accept(&other.translated.config, &other.accept) == GATEDELTA_SUCCESS);
      REQUIRE(gatedelta_window_accept(other.rule.handle, &other.accept) == GATEDELTA_SUCCESS);
      one.compare(other);
    }
    CHECK(one.pool[0] != 0.25f);

    op.copy({.window = one.window, .state = one.call.state, .from = slots, .to = to});
    op.copy({.window = {.record = one.window.record}, .from = slots, .to = to});
    REQUIRE(gatedelta_validate_fork(&other.translated.config, &other.fork) == GATEDELTA_SUCCESS);
    REQUIRE(gatedelta_window_copy(other.rule.handle, &other.fork) == GATEDELTA_SUCCESS);
    other.fork.state = nullptr;
    other.c_window.layer = nullptr;  // the record alone
    REQUIRE(gatedelta_window_copy(other.rule.handle, &other.fork) == GATEDELTA_SUCCESS);
    other.c_window.layer = other.layer.data();
    one.compare(other);

    op.state_of({.window = one.window, .state = one.call.state, .slots = to, .out = view(one.state.data(), {2, 1, 8, 8})});
    other.fold.slots = other.fork.to;
    other.fold.out = other.translated.tensor(view(other.state.data(), {2, 1, 8, 8}));
    REQUIRE(gatedelta_validate_fold(&other.translated.config, &other.fold) == GATEDELTA_SUCCESS);
    REQUIRE(gatedelta_window_state_of(other.rule.handle, &other.fold) == GATEDELTA_SUCCESS);
    one.compare(other);
    CHECK(one.state[0] != 0);

    op.fold({.window = one.window, .state = one.call.state, .slots = to});
    op.reset({.record = one.window.record, .slots = to});
    other.fold.out = nullptr;
    other.reset.slots = other.fork.to;
    REQUIRE(gatedelta_window_fold(other.rule.handle, &other.fold) == GATEDELTA_SUCCESS);
    REQUIRE(gatedelta_window_reset(other.rule.handle, &other.reset) == GATEDELTA_SUCCESS);
    one.compare(other);
    const std::vector<float> folded(one.pool.begin() + 3 * 64, one.pool.end());
    CHECK(folded == std::vector<float>(one.state.begin(), one.state.begin() + 64));  // slot 3
  }
}

TEST_CASE("errors of replay windows through C") {
  WindowUserInC user("reference");
  const auto forward = [&](const char* message) {
    check_failure(gatedelta_forward(user.rule.handle, &user.translated.arguments), GATEDELTA_ERROR_INVALID_ARGUMENT, message);
  };
  REQUIRE(gatedelta_window_reset(user.rule.handle, &user.reset) == GATEDELTA_SUCCESS);
  std::int32_t supported = -1;
  REQUIRE(gatedelta_backend_supports("cpu", &user.translated.config, &user.translated.arguments, &supported, nullptr) ==
          GATEDELTA_SUCCESS);
  CHECK(supported == 1);

  SUBCASE("of structs") {
    user.c_window.layer = nullptr;
    forward("window.keys: required, but not given");
    user.c_window.record = nullptr;
    forward("window.record: expected an address, got a null pointer");
    user.c_layout.entries = 7;
    forward("window.layout.entries: expected a value from 0 to 4, got 7");
    user.c_window.layout = nullptr;
    forward("window.layout: expected a struct, got a null pointer");
    user.c_window.size = 0;
    forward("window: expected in its first member the struct's size (40 in this version), got 0");
    user.accept.window = nullptr;
    check_failure(gatedelta_window_accept(user.rule.handle, &user.accept), GATEDELTA_ERROR_INVALID_ARGUMENT,
                  "window: expected a struct, got a null pointer");
    check_failure(gatedelta_window_layout_init(&user.c_layout, sizeof user.c_layout, &user.translated.config, 4, 3, 0, 0),
                  GATEDELTA_ERROR_INVALID_ARGUMENT, "capacity: expected 4..64, got 3");
  }
  SUBCASE("of values: nothing is changed") {
    const std::vector<std::byte> before = user.record;
    user.accepted[1] = 3;
    check_failure(gatedelta_window_accept(user.rule.handle, &user.accept), GATEDELTA_ERROR_INVALID_ARGUMENT,
                  "accepted: row 1 has 3, expected 0..2");
    CHECK(user.record == before);
    user.parent[1] = 1;
    forward("parent: row 0 token 1 has 1, expected -1..0");
    CHECK(user.o == std::vector<float>(32));
  }
  SUBCASE("a program from before there were windows") {
    user.translated.arguments.size = offsetof(gatedelta_arguments, window);
    REQUIRE(gatedelta_forward(user.rule.handle, &user.translated.arguments) == GATEDELTA_SUCCESS);
    CHECK(user.pool[0] != 0.25f);  // an ordinary step, which stores the state
  }
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
  CHECK(sizeof(gatedelta_arguments) == 208);
  CHECK(offsetof(gatedelta_arguments, workspace_size) == 184);
  CHECK(offsetof(gatedelta_arguments, update_state) == 160);
  CHECK(sizeof(gatedelta_commit_arguments) == 48);
  CHECK(sizeof(gatedelta_window_layout) == 88);
  CHECK(offsetof(gatedelta_window_layout, layer_bytes) == 72);
  CHECK(sizeof(gatedelta_window) == 40);
  CHECK(sizeof(gatedelta_accept_arguments) == 64);
  CHECK(offsetof(gatedelta_accept_arguments, tokens) == 48);
  CHECK(sizeof(gatedelta_reset_arguments) == 32);
  CHECK(sizeof(gatedelta_fold_arguments) == 48);
  CHECK(sizeof(gatedelta_fork_arguments) == 48);
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
