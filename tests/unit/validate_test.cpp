// SPDX-License-Identifier: Apache-2.0
// What validation says: the tensor, what was expected, what was found.
#include <doctest/doctest.h>

#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "gatedelta/gatedelta.hpp"

using namespace gatedelta;

namespace {

constexpr std::int64_t B = 3, T = 2, HQ = 16, HV = 32, K = 128, V = 128, slots = 8;

/// A call that is in order, of tensors that nobody touches: only their descriptions are looked at.
struct Good {
  float memory = 0;
  std::int32_t indices = 0;
  Config config;
  Arguments arguments;

  Good() {
    config.q_heads = config.k_heads = HQ;
    config.v_heads = HV;
    config.key_dim = K;
    config.value_dim = V;
    arguments.q = arguments.k = tensor({B, T, HQ, K});
    arguments.v = arguments.o = tensor({B, T, HV, V});
    arguments.a = arguments.b = tensor({B, T, HV});
    arguments.A_log = arguments.dt_bias = tensor({HV});
    arguments.state = tensor({slots, HV, V, K});
    arguments.read_slots = index({B});
  }
  TensorView tensor(std::initializer_list<std::int64_t> shape) { return view(&memory, shape); }
  TensorView index(std::initializer_list<std::int64_t> shape) { return view(&indices, shape); }
  TensorView wide_index(std::initializer_list<std::int64_t> shape) {
    TensorView out = index(shape);
    out.dtype = DType::i64;
    return out;
  }
  /// Without a pool.
  void no_pool() { arguments.state = arguments.read_slots = {}; }
};

struct Fault {
  const char* message;
  std::function<void(Good&)> make;
};

void expect(const std::vector<Fault>& faults) {
  for (const Fault& fault : faults) {
    CAPTURE(fault.message);
    Good good;
    fault.make(good);
    try {
      validate(good.config);
      validate(good.config, good.arguments);
      FAIL_CHECK("was accepted");
    } catch (const Error& error) {
      CHECK(error.code() == ErrorCode::invalid_argument);
      CHECK(std::string(error.what()) == fault.message);
    }
  }
}

}  // namespace

TEST_CASE("configurations") {
  expect({
      {"q_heads: expected at least 1, got 0", [](Good& x) { x.config.q_heads = 0; }},
      {"k_heads: expected a divisor of 32 (the largest head count), got 5", [](Good& x) { x.config.k_heads = 5; }},
      {"v_heads: expected at least 1, got -2", [](Good& x) { x.config.v_heads = -2; }},
      {"key_dim: expected at least 1, got 0", [](Good& x) { x.config.key_dim = 0; }},
      {"value_dim: expected at least 1, got -1", [](Good& x) { x.config.value_dim = -1; }},
      {"dtypes.q: expected f32, f16 or bf16, got i32", [](Good& x) { x.config.dtypes.q = DType::i32; }},
      {"dtypes.k: expected f32, f16 or bf16, got i32", [](Good& x) { x.config.dtypes.k = DType::i32; }},
      {"dtypes.v: expected f32, f16 or bf16, got i32", [](Good& x) { x.config.dtypes.v = DType::i32; }},
      {"dtypes.o: expected f32, f16 or bf16, got i32", [](Good& x) { x.config.dtypes.o = DType::i32; }},
      {"dtypes.gate: expected f32, f16 or bf16, got i32", [](Good& x) { x.config.dtypes.gate = DType::i32; }},
      {"dtypes.beta: expected f32, f16 or bf16, got i32", [](Good& x) { x.config.dtypes.beta = DType::i32; }},
      {"dtypes.A_log: expected f32, f16 or bf16, got i32", [](Good& x) { x.config.dtypes.A_log = DType::i32; }},
      {"dtypes.dt_bias: expected f32, f16 or bf16, got i32", [](Good& x) { x.config.dtypes.dt_bias = DType::i32; }},
      {"dtypes.state: expected f32, f16 or bf16, got i64", [](Good& x) { x.config.dtypes.state = DType::i64; }},
      {"dtypes.snapshots: expected f32, f16 or bf16, got i64", [](Good& x) { x.config.dtypes.snapshots = DType::i64; }},
      {"l2_eps: expected a finite number >= 0, got -1.000000", [](Good& x) { x.config.l2_eps = -1; }},
      {"scale: expected a finite number, got inf", [](Good& x) { x.config.scale = std::numeric_limits<double>::infinity(); }},
      {"softplus_beta: expected a finite number > 0, got 0.000000", [](Good& x) { x.config.softplus_beta = 0; }},
      {"softplus_threshold: expected a number, got nan",
       [](Good& x) { x.config.softplus_threshold = std::numeric_limits<double>::quiet_NaN(); }},
      {"num_threads: expected at least 0, got -1", [](Good& x) { x.config.num_threads = -1; }},
  });
}

TEST_CASE("shapes") {
  expect({
      {"state: expected [slots, 32, 128, 128], got [8, 16, 128, 128]",
       [](Good& x) {
         x.arguments.state = x.tensor({slots, HQ, V, K});
       }},
      {"state: expected [slots, 32, 128, 128], got [8, 32, 128]",
       [](Good& x) {
         x.arguments.state = x.tensor({slots, HV, V});
       }},
      {"q: expected [B, T, 16, 128], got [3, 2, 32, 128]",
       [](Good& x) {
         x.arguments.q = x.tensor({B, T, HV, K});
       }},
      {"k: expected [3, 2, 16, 128], got [3, 1, 16, 128]",
       [](Good& x) {
         x.arguments.k = x.tensor({B, 1, HQ, K});
       }},
      {"v: expected [3, 2, 32, 128], got [3, 2, 16, 128]",
       [](Good& x) {
         x.arguments.v = x.tensor({B, T, HQ, V});
       }},
      {"o: expected [3, 2, 32, 128], got [3, 2, 32, 64]",
       [](Good& x) {
         x.arguments.o = x.tensor({B, T, HV, 64});
       }},
      {"a: expected [3, 2, 32], got [3, 32]",
       [](Good& x) {
         x.arguments.a = x.tensor({B, HV});
       }},
      {"b: expected [3, 2, 32], got [3, 2, 16]",
       [](Good& x) {
         x.arguments.b = x.tensor({B, T, HQ});
       }},
      {"A_log: expected [32], got [16]", [](Good& x) { x.arguments.A_log = x.tensor({HQ}); }},
      {"dt_bias: expected [32], got [1, 32]",
       [](Good& x) {
         x.arguments.dt_bias = x.tensor({1, HV});
       }},
      {"read_slots: expected [3], got [4]", [](Good& x) { x.arguments.read_slots = x.index({4}); }},
      {"write_slots: expected [3], got [3, 1]",
       [](Good& x) {
         x.arguments.write_slots = x.index({B, 1});
       }},
      {"token_slots: expected [3, >=2], got [3, 1]",
       [](Good& x) {
         x.arguments.token_slots = x.index({B, 1});
       }},
      {"accepted: expected [3], got [2]",
       [](Good& x) {
         x.arguments.read_slots = {};
         x.arguments.token_slots = x.index({B, T});
         x.arguments.accepted = x.index({2});
       }},
      {"snapshots: expected [3, >=2, 32, 128, 128], got [3, 1, 32, 128, 128]",
       [](Good& x) {
         x.arguments.snapshots = x.tensor({B, 1, HV, V, K});
       }},
      {"state_in: expected [3, 32, 128, 128], got [8, 32, 128, 128]",
       [](Good& x) {
         x.no_pool();
         x.arguments.state_in = x.tensor({slots, HV, V, K});
       }},
      {"state_out: expected [3, 32, 128, 128], got [3, 32, 128, 64]",
       [](Good& x) {
         x.no_pool();
         x.arguments.state_out = x.tensor({B, HV, V, 64});
       }},
      {"state: expected a slot for each of 3 rows as read_slots are not given, got [2, 32, 128, 128]",
       [](Good& x) {
         x.arguments.read_slots = {};
         x.arguments.state = x.tensor({2, HV, V, K});
       }},
      {"cu_seqlens: expected [N+1], got [3, 1]",
       [](Good& x) {
         x.arguments.cu_seqlens = x.index({3, 1});
       }},
      {"cu_seqlens: expected at least 1 entry, got [0]", [](Good& x) { x.arguments.cu_seqlens = x.index({0}); }},
      {"q: expected [1, T, ...] as cu_seqlens are given, got [3, 2, 16, 128]",
       [](Good& x) { x.arguments.cu_seqlens = x.index({4}); }},
  });
}

TEST_CASE("dtypes, memory and strides") {
  expect({
      {"q: expected dtype f32, got bf16", [](Good& x) { x.arguments.q.dtype = DType::bf16; }},
      {"state: expected dtype bf16, got f32", [](Good& x) { x.config.dtypes.state = DType::bf16; }},
      {"A_log: expected dtype f16, got f32", [](Good& x) { x.config.dtypes.A_log = DType::f16; }},
      {"read_slots: expected dtype i32 or i64, got f32", [](Good& x) { x.arguments.read_slots.dtype = DType::f32; }},
      {"accepted: expected dtype i32, got i64",
       [](Good& x) {
         x.arguments.read_slots = {};
         x.arguments.token_slots = x.wide_index({B, T});
         x.arguments.accepted = x.wide_index({B});
       }},
      {"v: expected 24576 elements, got a null pointer", [](Good& x) { x.arguments.v.data = nullptr; }},
      {"k: expected memory on cpu like q, got cuda:1",
       [](Good& x) {
         x.arguments.k.device = {DeviceType::cuda, 1};
       }},
      {"o: is written, so dimension 1 of size 2 cannot have stride 0", [](Good& x) { x.arguments.o.strides[1] = 0; }},
      {"state: is written, so dimension 0 of size 8 cannot have stride 0", [](Good& x) { x.arguments.state.strides[0] = 0; }},
      {"snapshots: is written, so dimension 4 of size 128 cannot have stride 0",
       [](Good& x) {
         x.arguments.snapshots = x.tensor({B, T, HV, V, K});
         x.arguments.snapshots.strides[4] = 0;
       }},
  });
}

TEST_CASE("tensors that are missing, or given where they mean nothing") {
  expect({
      {"q: required, but not given", [](Good& x) { x.arguments.q = {}; }},
      {"k: required, but not given", [](Good& x) { x.arguments.k = {}; }},
      {"v: required, but not given", [](Good& x) { x.arguments.v = {}; }},
      {"o: required, but not given", [](Good& x) { x.arguments.o = {}; }},
      {"a: required, but not given", [](Good& x) { x.arguments.a = {}; }},
      {"A_log: required, but not given", [](Good& x) { x.arguments.A_log = {}; }},
      {"b: required, but not given", [](Good& x) { x.arguments.b = {}; }},
      {"g: given, but the gate form is raw (a, A_log, dt_bias)",
       [](Good& x) {
         x.arguments.g = x.tensor({B, T, HV});
       }},
      {"a: given, but the gate form is log decay (g)", [](Good& x) { x.config.gate = GateForm::log_decay; }},
      {"a: given, but the gate form is none", [](Good& x) { x.config.gate = GateForm::none; }},
      {"g: required, but not given",
       [](Good& x) {
         x.config.gate = GateForm::log_decay;
         x.arguments.a = x.arguments.A_log = x.arguments.dt_bias = {};
       }},
      {"beta: given, but the beta form is logits (b)",
       [](Good& x) {
         x.arguments.beta = x.tensor({B, T, HV});
       }},
      {"b: given, but the beta form is value (beta)", [](Good& x) { x.config.beta = BetaForm::value; }},
      {"b: given, but the beta form is one", [](Good& x) { x.config.beta = BetaForm::one; }},
      {"beta: required, but not given",
       [](Good& x) {
         x.config.beta = BetaForm::value;
         x.arguments.b = {};
       }},
      {"state_in: given, but a state pool is given as well",
       [](Good& x) {
         x.arguments.state_in = x.tensor({B, HV, V, K});
       }},
      {"state_out: given, but a state pool is given as well",
       [](Good& x) {
         x.arguments.state_out = x.tensor({B, HV, V, K});
       }},
      {"read_slots: given, but there is no state pool", [](Good& x) { x.arguments.state = {}; }},
      {"read_slots: given, but accepted picks the slots to read",
       [](Good& x) {
         x.arguments.token_slots = x.index({B, T});
         x.arguments.accepted = x.index({B});
       }},
      {"accepted: given, but there are no token_slots to pick from",
       [](Good& x) {
         x.arguments.read_slots = {};
         x.arguments.accepted = x.index({B});
       }},
      {"state_out: given, but update_state is false",
       [](Good& x) {
         x.no_pool();
         x.arguments.state_out = x.tensor({B, HV, V, K});
         x.arguments.update_state = false;
       }},
  });
}

TEST_CASE("what is in order is accepted") {
  Good good;
  SUBCASE("as it is") {}
  SUBCASE("dt_bias left out") { good.arguments.dt_bias = {}; }
  SUBCASE("a pool that is only read may repeat a slot") {
    good.arguments.update_state = false;
    good.arguments.state.strides[0] = 0;
  }
  SUBCASE("snapshots and token slots with room to spare") {
    good.arguments.snapshots = good.tensor({B, T + 3, HV, V, K});
    good.arguments.token_slots = good.wide_index({B, T + 5});
  }
  SUBCASE("no tokens") {
    for (TensorView* tensor :
         {&good.arguments.q, &good.arguments.k, &good.arguments.v, &good.arguments.o, &good.arguments.a, &good.arguments.b}) {
      tensor->shape[1] = 0;
      tensor->data = nullptr;
    }
  }
  CHECK_NOTHROW(validate(good.config, good.arguments));
}

TEST_CASE("a decay per key channel is well formed but not supported") {
  Good good;
  good.config.gate = GateForm::log_decay;
  good.arguments.a = good.arguments.A_log = good.arguments.dt_bias = {};
  good.arguments.g = good.tensor({B, T, HV, K});
  try {
    validate(good.config, good.arguments);
    FAIL("was accepted");
  } catch (const Error& error) {
    CHECK(error.code() == ErrorCode::unsupported);
    CHECK(std::string(error.what()).rfind("g: expected one decay per head [B, T, H], got [3, 2, 32, 128]", 0) == 0);
  }
}

TEST_CASE("commits") {
  Good good;
  CommitArguments valid;
  valid.snapshots = good.tensor({B, T, HV, V, K});
  valid.state = good.tensor({slots, HV, V, K});
  valid.accepted = valid.write_slots = good.index({B});
  CHECK_NOTHROW(validate(good.config, valid));
  const std::pair<const char*, std::function<void(CommitArguments&)>> faults[] = {
      {"snapshots: required, but not given", [](CommitArguments& x) { x.snapshots = {}; }},
      {"snapshots: expected [N, S, 32, 128, 128], got [3, 2, 32, 128]", [](CommitArguments& x) { x.snapshots.rank = 4; }},
      {"state: expected [slots, 32, 128, 128], got [8, 31, 128, 128]", [](CommitArguments& x) { x.state.shape[1] = 31; }},
      {"state: is written, so dimension 0 of size 8 cannot have stride 0", [](CommitArguments& x) { x.state.strides[0] = 0; }},
      {"accepted: required, but not given", [](CommitArguments& x) { x.accepted = {}; }},
      {"accepted: expected dtype i32, got i64", [](CommitArguments& x) { x.accepted.dtype = DType::i64; }},
      {"write_slots: required, but not given", [](CommitArguments& x) { x.write_slots = {}; }},
      {"write_slots: expected [3], got [4]", [](CommitArguments& x) { x.write_slots.shape[0] = 4; }},
  };
  for (const auto& [message, make] : faults) {
    CommitArguments broken = valid;
    make(broken);
    CHECK_THROWS_WITH_AS(validate(good.config, broken), message, Error);
  }
}
