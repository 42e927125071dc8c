// SPDX-License-Identifier: Apache-2.0
// Which kernel of the cuda backend a call gets, and how it is cut. Needs no GPU: nothing is launched and no memory is touched.
#include "backends/cuda/plan.hpp"

#include <doctest/doctest.h>

#include <cstdint>
#include <map>
#include <utility>
#include <vector>

#include "device/memory.hpp"
#include "gatedelta/gatedelta.hpp"
#include "verify/generate.hpp"
#include "verify/memory.hpp"
#include "verify/window.hpp"

using namespace gatedelta;
using namespace gatedelta::cuda;

namespace {

constexpr Device gpu{DeviceType::cuda, 0};

struct Form {
  std::int64_t rows = 4, tokens = 1, key_dim = 128, value_dim = 128;
  DType state = DType::bf16, activations = DType::bf16;
  bool value_last = false, snapshots = false, variable = false, dependent = false;
  enum { where_read, given_twice, elsewhere } written = where_read;
  bool token_slots = false, updates = true;
  std::int64_t misaligned = 0;  ///< elements that the state begins behind an aligned address
};

/// Views of addresses that nothing lies at.
class Memory {
 public:
  TensorView make(DType dtype, const std::vector<std::int64_t>& shape, std::int64_t elements = 0) {
    next_ += 1 << 30;
    return make_view(reinterpret_cast<void*>(next_ + elements * static_cast<std::int64_t>(size_of(dtype))), dtype, shape, {},
                     gpu);
  }

 private:
  std::int64_t next_ = 0;
};

Plan plan_of(const Form& form) {
  Config config{.q_heads = 16, .k_heads = 16, .v_heads = 32, .key_dim = form.key_dim, .value_dim = form.value_dim};
  DTypes& d = config.dtypes;
  d.q = d.k = d.v = d.o = d.gate = d.beta = form.activations;
  d.state = d.snapshots = form.state;
  Memory memory;
  Arguments in;
  const std::int64_t B = form.variable ? 1 : form.rows, T = form.tokens;
  in.q = memory.make(d.q, {B, T, 16, form.key_dim}), in.k = memory.make(d.k, {B, T, 16, form.key_dim});
  in.v = memory.make(d.v, {B, T, 32, form.value_dim}), in.o = memory.make(d.o, {B, T, 32, form.value_dim});
  in.a = memory.make(d.gate, {B, T, 32}), in.b = memory.make(d.beta, {B, T, 32});
  in.A_log = memory.make(d.A_log, {32});
  in.state = form.value_last ? memory.make(d.state, {1000, 32, form.key_dim, form.value_dim}, form.misaligned).transposed(2, 3)
                             : memory.make(d.state, {1000, 32, form.value_dim, form.key_dim}, form.misaligned);
  in.read_slots = memory.make(DType::i32, {form.rows});
  if (form.written != Form::where_read)
    in.write_slots = form.written == Form::given_twice ? in.read_slots : memory.make(DType::i32, {form.rows});
  if (form.token_slots) in.token_slots = memory.make(DType::i32, {form.rows, T});
  in.update_state = form.updates;
  in.dependent_launch = form.dependent;
  if (form.variable) in.cu_seqlens = memory.make(DType::i32, {form.rows + 1});
  if (form.snapshots)
    in.snapshots = form.value_last ? memory.make(d.snapshots, {form.rows, T, 32, form.key_dim, form.value_dim}).transposed(3, 4)
                                   : memory.make(d.snapshots, {form.rows, T, 32, form.value_dim, form.key_dim});
  return make_plan(make_params(validate(config, in)));
}

/// The reference, which notes what the cuda backend would have done: calls by kernel and token tile.
class Watching final : public Backend {
 public:
  std::map<std::pair<Kernel, int>, int> calls;
  std::map<DType, int> serving_inputs;  ///< of calls of the serving kernel
  int half_chunks = 0, fast_trees = 0, recurrent_trees = 0, fast_sequences = 0, fast_value_last = 0, fast_float_entries = 0;
  int fast_passes = 0, tree_passes = 0;  ///< windows of more than 8 tokens
  int usual_short = 0, usual_long = 0;   ///< windows of calls of the usual form
  int long_keys = 0;                     ///< serving with K = 256
  bool computes = true;

  std::string_view name() const noexcept override { return "watching"; }
  std::string description() const override { return "for tests"; }
  Availability availability() const override { return {true, {}}; }
  bool reaches(Device device) const noexcept override { return device == Device{}; }
  std::string unsupported_reason(const Problem&) const override { return {}; }
  void forward(const Call& call) override {
    const Plan plan = call.problem.window ? make_replay_plan(make_replay_params(call)) : make_plan(make_params(call));
    ++calls[{plan.kernel, plan.token_tile}];
    serving_inputs[plan.inputs] += plan.kernel == Kernel::serving;
    half_chunks += plan.kernel == Kernel::chunks && plan.inputs == DType::f16;
    fast_trees += call.problem.tree && plan.kernel == Kernel::replay;
    recurrent_trees += call.problem.tree && plan.kernel == Kernel::recurrent;
    fast_sequences += call.arguments->cu_seqlens.defined() && plan.kernel == Kernel::replay;
    fast_float_entries += plan.kernel == Kernel::replay && plan.entries == DType::f32;
    fast_value_last += plan.kernel == Kernel::replay && plan.value_last;
    const bool passes = plan.kernel == Kernel::replay && make_replay_params(call).most_tokens() > 8;
    fast_passes += passes, tree_passes += passes && call.problem.tree;
    if (plan.kernel == Kernel::replay && plan.common) ++(plan.one_group ? usual_short : usual_long);
    long_keys += plan.long_keys;
    if (computes) reference_.forward(call);
  }
  void commit(const Config& config, const CommitArguments& in) override { reference_.commit(config, in); }
  void accept(const Config& config, const AcceptArguments& in) override { reference_.accept(config, in); }
  void reset(const Config& config, const ResetArguments& in) override { reference_.reset(config, in); }
  void fold(const Config& config, const FoldArguments& in) override { reference_.fold(config, in); }
  void copy(const Config& config, const ForkArguments& in) override { reference_.copy(config, in); }

 private:
  Backend& reference_ = *find_backend("reference");
};

}  // namespace

TEST_CASE("the tables of launches are complete and ascend") {
  for (const Kernel kernel : {Kernel::decode, Kernel::serving, Kernel::chunks, Kernel::replay})
    for (const DType state : {DType::f32, DType::f16, DType::bf16})
      for (const bool value_last : {false, true})
        for (const Stores stores : {Stores::none, Stores::last, Stores::each})
          for (const auto& [token_tile, inputs] : {std::pair{1, DType::bf16},
                                                   {8, DType::bf16},
                                                   {1, DType::f16},
                                                   {8, DType::f16},
                                                   {8, DType::f32},
                                                   {16, DType::bf16},
                                                   {16, DType::f16}}) {
            Plan plan;
            plan.kernel = kernel, plan.value_last = value_last, plan.token_tile = token_tile, plan.inputs = inputs;
            // Windows are a matter of one kernel, which has bfloat16 inputs: in place of other inputs it gets other entries,
            // and in place of stores long windows.
            if (kernel == Kernel::replay) {
              plan.entries = inputs == DType::bf16 ? DType::bf16 : DType::f32;
              plan.one_group = stores == Stores::none, plan.passes = stores == Stores::each;
            }
            const Choices rows = choices(plan, state, stores);
            REQUIRE(rows.begin < rows.end);
            for (const Choice* row = rows.begin; row < rows.end; ++row) {
              CHECK(row->shape.warps >= 1);
              CHECK(row->shape.warps <= (kernel != Kernel::chunks ? 4 : inputs == DType::bf16 ? 12 : 8));
              CHECK(row->shape.span >= 1);
              if (kernel == Kernel::decode) {
                const int size = row->shape.rows_a_lane;
                CHECK((size == 4 || size == 8 || size == (value_last ? 16 : 2)));
              }
              if (const int shares = row->shape.shares; kernel == Kernel::serving && shares > 0) {
                CHECK((shares == 2 || shares == 4));
                CHECK((value_last ? row->shape.warps == shares : row->shape.warps % shares == 0 && row->shape.span <= 16));
              }
              // A warp of a V-last block without a tile, or with two, would wait for the others forever.
              if (kernel == Kernel::serving && value_last && stores == Stores::each)
                CHECK(row->shape.shares == (state == DType::f32 ? 2 : 4));
              if (kernel == Kernel::replay) {
                CHECK(row->shape.heads >= 1);
                CHECK(row->shape.heads <= row->shape.warps);
              }
              if (kernel == Kernel::chunks) {
                // Two warps prepare a chunk, and four multiply together.
                CHECK(row->shape.preparing < row->shape.warps);
                CHECK(row->shape.preparing % 2 == 0);
                CHECK((row->shape.warps - row->shape.preparing) % 4 == 0);
                CHECK(row->shape.span == 16);
              }
              if (row != rows.begin) CHECK(row->states > row[-1].states);
            }
            CHECK(rows.end[-1].states == INT64_MAX);
          }
}

TEST_CASE("a call's form decides its kernel, the number of rows its shape alone") {
  for (const std::int64_t key_dim : {64, 128, 256})
    for (const DType state : {DType::f32, DType::f16, DType::bf16})
      for (const bool value_last : {false, true})
        for (const bool variable : {false, true})
          for (const std::int64_t tokens : {0, 1, 2, 4, 5, 8, 9, 16, 17, 100}) {
            Form form{.tokens = tokens, .key_dim = key_dim, .state = state, .value_last = value_last, .variable = variable};
            form.rows = 1;
            const Plan one = plan_of(form);
            const bool wide = key_dim > 128;
            const bool serving = !variable && tokens >= 2 && tokens <= (wide ? 8 : 16) && !(wide && value_last);
            const bool chunks = key_dim <= 128 && (variable || tokens > 16);
            const bool decode = tokens == 1 && !variable;
            CHECK(one.kernel == (serving  ? Kernel::serving
                                 : chunks ? Kernel::chunks
                                 : decode ? Kernel::decode
                                          : Kernel::recurrent));
            if (serving) CHECK(one.token_tile == (tokens <= 4 ? 4 : tokens <= 8 ? 8 : 16));
            CHECK(one.value_last == value_last);
            CHECK(one.common == (decode || (serving && !wide)));  // what has a form of its own for these
            for (const std::int64_t rows : {2, 7, 64, 512, 70000}) {
              form.rows = rows;
              const Plan many = plan_of(form);
              CHECK(many.kernel == one.kernel);
              CHECK(many.token_tile == one.token_tile);
              CHECK(many.common == one.common);
            }
          }
}

TEST_CASE("sequences of one length have one kernel whatever else the call has") {
  for (const std::int64_t key_dim : {64, 128, 256})
    for (const std::int64_t length : {1, 8, 9, 16, 17}) {
      const Plan alone = plan_of({.rows = 1, .tokens = length, .key_dim = key_dim, .variable = true});
      const Plan crowd = plan_of({.rows = 9, .tokens = length + 1000, .key_dim = key_dim, .variable = true});
      CHECK(alone.kernel == crowd.kernel);
      CHECK(alone.token_tile == crowd.token_tile);
    }
}

TEST_CASE("what the fast kernels have no vectors for goes to the generic one") {
  CHECK(plan_of({.misaligned = 1}).kernel == Kernel::generic);
  CHECK(plan_of({.misaligned = 8}).kernel == Kernel::decode);
  CHECK(plan_of({.key_dim = 100}).kernel == Kernel::generic);
  CHECK(plan_of({.key_dim = 512}).kernel == Kernel::generic);
  CHECK(plan_of({.value_dim = 100}).kernel == Kernel::generic);
  CHECK(plan_of({.value_dim = 96}).kernel == Kernel::decode);
  CHECK_FALSE(plan_of({.activations = DType::f16}).common);
  for (const DType other : {DType::f16, DType::f32}) {
    const Plan split = plan_of({.tokens = 4, .activations = other});
    CHECK(split.kernel == Kernel::serving);
    CHECK(split.inputs == other);
    CHECK_FALSE(split.common);
    CHECK(plan_of({.rows = 70000, .tokens = 4, .activations = other}).kernel == Kernel::serving);
    CHECK(plan_of({.tokens = 8, .activations = other, .snapshots = true}).kernel == Kernel::serving);
    CHECK(plan_of({.tokens = 4, .activations = other, .snapshots = true}).kernel ==
          (other == DType::f32 ? Kernel::recurrent : Kernel::serving));
    const bool half = other == DType::f16;
    CHECK(plan_of({.tokens = 9, .activations = other}).kernel == (half ? Kernel::serving : Kernel::recurrent));
    for (const bool value_last : {false, true}) {
      const Plan many = plan_of({.tokens = 17, .activations = other, .value_last = value_last});
      CHECK(many.kernel == (half ? Kernel::chunks : Kernel::recurrent));
      if (half) CHECK(many.inputs == other);
    }
    for (const std::int64_t tokens : {4, 5, 9})
      CHECK(plan_of({.tokens = tokens, .activations = other, .value_last = true}).kernel == Kernel::recurrent);
    CHECK(plan_of({.tokens = 4, .key_dim = 256, .activations = other}).kernel == Kernel::recurrent);
  }
  CHECK(plan_of({.tokens = 4, .value_last = true}).kernel == Kernel::serving);
  CHECK(plan_of({.tokens = 4, .value_last = true, .snapshots = true}).kernel == Kernel::serving);
  CHECK(plan_of({.tokens = 17, .value_last = true, .snapshots = true}).kernel == Kernel::recurrent);
  CHECK(plan_of({.tokens = 2, .state = DType::f32, .value_last = true, .snapshots = true}).kernel == Kernel::serving);
  CHECK(plan_of({.tokens = 3, .state = DType::f32, .value_last = true, .snapshots = true}).kernel == Kernel::recurrent);
  CHECK(plan_of({.tokens = 4, .snapshots = true}).kernel == Kernel::serving);
  CHECK(plan_of({.tokens = 17, .snapshots = true}).kernel == Kernel::recurrent);
  CHECK(plan_of({.tokens = 8, .key_dim = 256, .snapshots = true}).kernel == Kernel::recurrent);
  CHECK(plan_of({.tokens = 8, .key_dim = 256, .value_last = true}).kernel == Kernel::recurrent);
}

TEST_CASE("a block of a V-last decode has whole rows of the state where V and K allow it") {
  const auto lanes = [](std::int64_t K, std::int64_t V, DType state, DType activations = DType::bf16) {
    return plan_of({.rows = 512, .key_dim = K, .value_dim = V, .state = state, .activations = activations, .value_last = true})
        .shape.value_lanes;
  };
  CHECK(lanes(128, 128, DType::bf16) == 16);
  CHECK(lanes(128, 128, DType::f32) == 16);
  CHECK(lanes(256, 128, DType::f32) == 16);
  CHECK(lanes(256, 64, DType::f32) == 16);
  CHECK(lanes(128, 96, DType::f32) == 8);
  CHECK(lanes(128, 96, DType::bf16) == 4);
  CHECK(lanes(128, 128, DType::bf16, DType::f16) == 8);
}

TEST_CASE("what a call does beside the ones around it depends on the bytes of its states") {
  const auto begins = [](const Form& form) {
    const Plan plan = plan_of(form);
    return std::pair(plan.early, plan.ahead);
  };
  // A row's states are 1 MiB in bfloat16.
  CHECK(begins({.rows = 2}) == std::pair(true, false));
  CHECK(begins({.rows = 2, .dependent = true}) == std::pair(true, true));
  CHECK(begins({.rows = 3, .dependent = true}) == std::pair(false, false));
  CHECK(begins({.rows = 3, .value_last = true, .dependent = true}) == std::pair(false, true));
  CHECK(begins({.rows = 3, .value_last = true}) == std::pair(false, false));
  CHECK(begins({.rows = 16, .value_last = true}) == std::pair(false, false));
  CHECK(begins({.rows = 32, .value_last = true}) == std::pair(false, true));
  CHECK(begins({.rows = 2, .state = DType::f32, .value_last = true}) == std::pair(false, false));
  CHECK(begins({.rows = 4, .state = DType::f32, .value_last = true}) == std::pair(false, true));
  CHECK(begins({.rows = 2, .state = DType::f32, .dependent = true}) == std::pair(false, false));
  CHECK(begins({.rows = 4, .tokens = 4, .dependent = true}) == std::pair(true, true));
  CHECK(begins({.rows = 5, .tokens = 4, .value_last = true, .dependent = true}) == std::pair(false, false));
}

TEST_CASE("states are kept in the cache where a call stores them in place alone") {
  const auto keeps = [](const Form& form) { return plan_of(form).shape.keeps_states; };
  for (const std::int64_t tokens : {1, 4}) {
    CAPTURE(tokens);
    CHECK(keeps({.rows = 64, .tokens = tokens}));
    CHECK(keeps({.rows = 64, .tokens = tokens, .written = Form::given_twice}));
    CHECK_FALSE(keeps({.rows = 64, .tokens = tokens, .written = Form::elsewhere}));
    CHECK_FALSE(keeps({.rows = 64, .tokens = tokens, .token_slots = true}));
    CHECK_FALSE(keeps({.rows = 64, .tokens = tokens, .snapshots = true}));
    CHECK_FALSE(keeps({.rows = 64, .tokens = tokens, .updates = false}));
    CHECK_FALSE(keeps({.rows = 1, .tokens = tokens}));
  }
}

TEST_CASE("a shape for measuring is three numbers") {
  CHECK_FALSE(parse_shape(nullptr));
  CHECK_FALSE(parse_shape(""));
  const auto shape = parse_shape("8:2:16");
  REQUIRE(shape);
  CHECK(shape->rows_a_lane == 8);
  CHECK(shape->warps == 2);
  CHECK(shape->span == 16);
  CHECK_THROWS_WITH_AS(parse_shape("8:2"), "GATEDELTA_CUDA_SHAPE: '8:2' is not ROWS:WARPS:SPAN[:keep]", Error);
  CHECK_FALSE(shape->keeps_states);
  CHECK(parse_shape("8:2:16:keep")->keeps_states);
  CHECK_THROWS_AS(parse_shape("8:2:16x"), Error);
  CHECK_THROWS_AS(parse_shape("8:2:16:keeps"), Error);
}

TEST_CASE("windows whose places are too far apart for 32 bits are not for the fast kernels") {
  ReplayParams<ForwardParams> p{};
  p.window.ring = 20;
  const auto fits = [&](auto tensor, std::int64_t stride) {
    ReplayParams<ForwardParams> strided = p;
    (strided.window.*tensor).strides[2] = stride;
    ReplayParams<FastParams> out{};
    return narrow(strided, out);
  };
  constexpr std::int64_t most = INT32_MAX / 20;
  for (const auto tensor : {&WindowParams<std::int64_t>::keys, &WindowParams<std::int64_t>::corrections}) {
    CHECK(fits(tensor, most));
    CHECK(fits(tensor, -most));
    CHECK_FALSE(fits(tensor, most + 1));
    CHECK_FALSE(fits(tensor, std::int64_t{1} << 40));
  }
  CHECK(fits(&WindowParams<std::int64_t>::decays, INT32_MAX));
  CHECK_FALSE(fits(&WindowParams<std::int64_t>::decays, std::int64_t{INT32_MAX} + 1));
}

TEST_CASE("random windows reach every form of the fast kernels") {
  Watching watching;
  verify::WindowChecker checker(watching, device::host_memory());
  for (std::int64_t i = 0; i < 45; ++i) checker.run(verify::make_window_scenario(1, i));
  CHECK(checker.failures().empty());
  for (const int token_tile : {1, 4, 8}) {
    CAPTURE(token_tile);
    CHECK(watching.calls[{Kernel::replay, token_tile}] >= 3);
  }
  CHECK(watching.calls[{Kernel::recurrent, 0}] >= 5);
  CHECK(watching.fast_trees >= 3);
  CHECK(watching.recurrent_trees >= 5);
  CHECK(watching.fast_sequences >= 3);
  CHECK(watching.fast_value_last >= 3);
  CHECK(watching.fast_float_entries >= 3);
  CHECK(watching.fast_passes >= 3);
  CHECK(watching.tree_passes >= 3);
  CHECK(watching.usual_short >= 3);
  CHECK(watching.usual_long >= 3);
  CHECK(watching.calls[{Kernel::generic, 0}] >= 5);
}

TEST_CASE("random cases reach every form of the fast kernels") {
  Watching watching;
  watching.computes = false;
  for (const verify::Family& family : verify::families())
    for (std::int64_t i = 0; i < 150; ++i) {
      const verify::Case c = verify::make_case(family, 1, i);
      verify::Instance instance(c, device::host_memory());
      const GatedDeltaRule op(c.config, watching);
      instance.add_workspace(op.workspace_size(instance.arguments()));
      op.forward(instance.arguments());
    }
  const std::pair<Kernel, int> forms[] = {{Kernel::decode, 0},   {Kernel::serving, 4},   {Kernel::serving, 8},
                                          {Kernel::serving, 16}, {Kernel::recurrent, 0}, {Kernel::chunks, 0}};
  for (const auto& form : forms) {
    CAPTURE(static_cast<int>(form.first));
    CAPTURE(form.second);
    CHECK(watching.calls[form] >= 3);
  }
  for (const DType inputs : {DType::f16, DType::f32, DType::bf16}) CHECK(watching.serving_inputs[inputs] >= 3);
  CHECK(watching.half_chunks >= 3);
  CHECK(watching.long_keys >= 3);
}
