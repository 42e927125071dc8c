// SPDX-License-Identifier: Apache-2.0
// Slots, staging and commit, on every available backend that works on host memory. With a scalar state and beta 1, k = 1, no
// norm and no decay, a token simply replaces the state by v; with k = 0 it leaves it.
#include <doctest/doctest.h>

#include <cstdint>
#include <string>
#include <vector>

#include "gatedelta/gatedelta.hpp"

using namespace gatedelta;

namespace {

std::vector<Backend*> host_backends() {
  std::vector<Backend*> out;
  for (Backend* backend : backends())
    if (backend->availability().available && backend->reaches({})) out.push_back(backend);
  return out;
}

struct Scalars {
  Config config;
  std::vector<float> q, k, v, o, pool;
  Arguments arguments;

  Scalars(std::int64_t rows, std::int64_t tokens, std::int64_t slots) {
    config.q_heads = config.k_heads = config.v_heads = config.key_dim = config.value_dim = 1;
    config.gate = GateForm::none;
    config.beta = BetaForm::one;
    config.qk_l2norm = false;
    const auto count = static_cast<std::size_t>(rows * tokens);
    q.assign(count, 1);
    k.assign(count, 0);
    v.assign(count, 0);
    o.assign(count, -1);
    for (std::int64_t slot = 0; slot < slots; ++slot) pool.push_back(static_cast<float>(100 + slot));
    arguments.q = view(q.data(), {rows, tokens, 1, 1});
    arguments.k = view(k.data(), {rows, tokens, 1, 1});
    arguments.v = view(v.data(), {rows, tokens, 1, 1});
    arguments.o = view(o.data(), {rows, tokens, 1, 1});
    arguments.state = view(pool.data(), {slots, 1, 1, 1});
  }
  void run(Backend& backend) { GatedDeltaRule(config, backend).forward(arguments); }
};

using Floats = std::vector<float>;

}  // namespace

TEST_CASE("each row reads the pool as it was before the call") {
  for (Backend* backend : host_backends()) {
    CAPTURE(std::string(backend->name()));
    Scalars call(3, 1, 4);
    const std::int32_t read[] = {0, 1, 2}, write[] = {1, 2, 0};  // a rotation: every source is overwritten by another row
    call.arguments.read_slots = view(read, {3});
    call.arguments.write_slots = view(write, {3});
    call.run(*backend);
    CHECK(call.o == Floats{100, 101, 102});
    CHECK(call.pool == Floats{102, 100, 101, 103});
  }
}

TEST_CASE("several rows may start from one slot") {
  for (Backend* backend : host_backends()) {
    CAPTURE(std::string(backend->name()));
    Scalars call(3, 1, 4);
    const std::int64_t read[] = {1, 1, 1}, write[] = {1, 2, 3};
    call.arguments.read_slots = view(read, {3});
    call.arguments.write_slots = view(write, {3});
    call.k = {1, 0, 1};
    call.v = {7, 8, 9};
    call.run(*backend);
    CHECK(call.pool == Floats{100, 7, 101, 9});
    CHECK(call.o == Floats{7, 101, 9});
  }
}

TEST_CASE("padding rows and padding stores") {
  for (Backend* backend : host_backends()) {
    CAPTURE(std::string(backend->name()));
    Scalars call(3, 1, 4);
    call.config.null_slot = 0;
    const std::int32_t read[] = {0, 2, -7}, write[] = {1, 0, 1'000'000};
    call.arguments.read_slots = view(read, {3});
    call.arguments.write_slots = view(write, {3});
    call.k = {1, 1, 1};
    call.v = {7, 8, 9};
    call.run(*backend);
    CHECK(call.o == Floats{0, 8, 0});
    CHECK(call.pool == Floats{100, 101, 102, 103});
  }
}

TEST_CASE("token slots and the last accepted token") {
  for (Backend* backend : host_backends()) {
    CAPTURE(std::string(backend->name()));
    Scalars call(2, 2, 8);
    const std::int32_t slots[] = {0, 1, 2, 3, -1, 5}, accepted[] = {3, 1};
    call.arguments.token_slots = view(slots, {2, 3});
    call.arguments.accepted = view(accepted, {2});
    call.k = {1, 0, 0, 1};
    call.v = {7, 0, 0, 9};
    call.run(*backend);
    CHECK(call.o == Floats{7, 7, 103, 9});                           // row 0 starts from slot 2, row 1 from slot 3
    CHECK(call.pool == Floats{7, 7, 102, 103, 104, 105, 106, 107});  // row 1: token 0 back to slot 3, token 1 to padding
    const std::int32_t write[] = {6, 7};
    call.arguments.write_slots = view(write, {2});
    call.run(*backend);
    CHECK(call.pool[6] == 7);
    CHECK(call.pool[7] == 9);
  }
}

TEST_CASE("errors change nothing") {
  const auto expect = [](Scalars& call, Backend& backend, const char* message) {
    const Floats pool = call.pool, o = call.o;
    CHECK_THROWS_WITH_AS(call.run(backend), message, Error);
    CHECK(call.pool == pool);
    CHECK(call.o == o);
  };
  for (Backend* backend : host_backends()) {
    CAPTURE(std::string(backend->name()));
    Scalars call(2, 1, 4);
    std::int32_t read[] = {0, 4}, write[] = {1, 1}, accepted[] = {1, 2}, tokens[] = {2, 3};
    call.arguments.read_slots = view(read, {2});
    expect(call, *backend, "read_slots: row 1 has slot 4, expected 0..3 (the pool has 4 slots) or padding <= -1");
    read[1] = 0;
    expect(call, *backend, "read_slots: rows 0 and 1 both store to slot 0");
    call.arguments.write_slots = view(write, {2});
    expect(call, *backend, "write_slots: rows 0 and 1 both store to slot 1");
    write[1] = 99;
    expect(call, *backend, "write_slots: row 1 has slot 99, expected 0..3 (the pool has 4 slots) or padding <= -1");
    call.arguments.read_slots = call.arguments.write_slots = {};
    call.arguments.token_slots = view(tokens, {2, 1});
    call.arguments.accepted = view(accepted, {2});
    expect(call, *backend, "accepted: row 1 has 2, expected 1..1");
    accepted[1] = 1;
    tokens[1] = 2;
    expect(call, *backend, "token_slots: rows 0 and 1 both store to slot 2");
    tokens[1] = 5;
    expect(call, *backend, "token_slots: row 1 has slot 5, expected 0..3 (the pool has 4 slots) or padding <= -1");
  }
}

TEST_CASE("sequences of cu_seqlens") {
  for (Backend* backend : host_backends()) {
    CAPTURE(std::string(backend->name()));
    Scalars call(1, 4, 2);
    std::int64_t cu[] = {1, 1, 3};  // one token before, one behind, the first sequence is empty
    call.arguments.cu_seqlens = view(cu, {3});
    call.k = {1, 1, 0, 1};
    call.v = {5, 6, 7, 8};
    call.run(*backend);
    CHECK(call.o == Floats{0, 6, 6, 0});
    CHECK(call.pool == Floats{100, 6});
    cu[0] = 2;
    CHECK_THROWS_WITH_AS(call.run(*backend), "cu_seqlens: entry 1 is 1, expected 2..4", Error);
    cu[0] = -1;
    CHECK_THROWS_WITH_AS(call.run(*backend), "cu_seqlens: entry 0 is -1, expected at least 0", Error);
    cu[0] = 0;
    cu[2] = 5;
    CHECK_THROWS_WITH_AS(call.run(*backend), "cu_seqlens: entry 2 is 5, expected 1..4", Error);
  }
}

TEST_CASE("commit copies the snapshot of the last accepted token") {
  for (Backend* backend : host_backends()) {
    CAPTURE(std::string(backend->name()));
    Config config;
    config.q_heads = config.k_heads = config.v_heads = config.key_dim = 1;
    config.value_dim = 2;
    config.dtypes.state = DType::bf16;
    const GatedDeltaRule op(config, *backend);
    // [N = 3, S = 2, H = 1, V = 2, K = 1], rounded to bf16 on the way: 1.00390625 is a tie and goes to 1
    const float snapshots[] = {1.00390625f, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12};
    const std::int32_t accepted[] = {1, 2, 2};
    std::int64_t slots[] = {2, -1, 0};
    bfloat16 pool[6];
    for (bfloat16& x : pool) x = to_bfloat16(-1);
    CommitArguments arguments;
    arguments.snapshots = view(snapshots, {3, 2, 1, 2, 1});
    arguments.accepted = view(accepted, {3});
    arguments.state = view(pool, {3, 1, 2, 1});
    arguments.write_slots = view(slots, {3});
    op.commit(arguments);
    const float expected[] = {11, 12, -1, -1, 1, 2};
    for (int i = 0; i < 6; ++i) CHECK(to_float(pool[i]) == expected[i]);

    slots[1] = 2;
    CHECK_THROWS_WITH_AS(op.commit(arguments), "write_slots: rows 0 and 1 both store to slot 2", Error);
    slots[1] = 3;
    CHECK_THROWS_WITH_AS(op.commit(arguments),
                         "write_slots: row 1 has slot 3, expected 0..2 (the pool has 3 slots) or padding <= -1", Error);
    slots[1] = 1;
    const std::int32_t too_many[] = {1, 3, 1};
    arguments.accepted = view(too_many, {3});
    CHECK_THROWS_WITH_AS(op.commit(arguments), "accepted: row 1 has 3, expected 1..2", Error);
    for (int i = 0; i < 6; ++i) CHECK(to_float(pool[i]) == expected[i]);
  }
}
