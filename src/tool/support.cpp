// SPDX-License-Identifier: Apache-2.0
#include "tool/support.hpp"

#include <fmt/format.h>

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "gatedelta/gatedelta.hpp"

namespace gatedelta::tool {
namespace {

/// A call as it is asked for: the sizes and options, and which of the optional tensors there are.
struct Question {
  Config config{.q_heads = 16, .k_heads = 16, .v_heads = 32, .key_dim = 128, .value_dim = 128};
  std::int64_t rows = 4, tokens = 1;
  bool pool = true, transposed = false, padded_slots = false, strided = false;
  bool state_in = false, state_out = false, update_state = true, write_slots = false, token_slots = false, accepted = false;
  bool snapshots = false, varlen = false, tree = false;
  std::int64_t window = 0;
  DType slots = DType::i32, entries = DType::bf16;
};

/// What a backend says of it: empty, or the reason why not. Backends are asked about sizes alone, so no tensor has memory of
/// its own.
std::string reason_against(const Backend& backend, const Question& q) {
  static char memory[256];
  const Device device = backend.reaches({}) ? Device{} : Device{DeviceType::cuda, 0};
  const auto view = [&](DType dtype, std::vector<std::int64_t> shape) { return make_view(memory, dtype, shape, {}, device); };
  const Config& config = q.config;
  const DTypes& d = config.dtypes;
  const std::int64_t H = config.heads(), V = config.value_dim, K = config.key_dim, slots = 64;
  const std::int64_t B = q.varlen ? 1 : q.rows, T = q.varlen ? q.rows * q.tokens : q.tokens;
  const auto states = [&](DType dtype, std::int64_t count) {
    TensorView out = view(dtype, {count, H, q.transposed ? K : V, q.transposed ? V : K});
    if (q.padded_slots) out.strides[0] += 64;
    return q.transposed ? out.transposed(2, 3) : out;
  };
  Arguments in;
  in.q = view(d.q, {B, T, config.q_heads, K}), in.k = view(d.k, {B, T, config.k_heads, K});
  in.v = view(d.v, {B, T, config.v_heads, V}), in.o = view(d.o, {B, T, H, V});
  if (q.strided) in.q.strides[1] += 3, in.k.strides[3] = -1, in.v.strides[2] = 0;
  if (config.gate == GateForm::raw) in.a = view(d.gate, {B, T, H}), in.A_log = view(d.A_log, {H});
  if (config.gate == GateForm::raw) in.dt_bias = view(d.dt_bias, {H});
  if (config.gate == GateForm::log_decay) in.g = view(d.gate, {B, T, H});
  if (config.beta == BetaForm::logits || config.beta == BetaForm::twice_logits) in.b = view(d.beta, {B, T, H});
  if (config.beta == BetaForm::value) in.beta = view(d.beta, {B, T, H});
  if (q.pool) in.state = states(d.state, slots);
  if (q.pool && !q.accepted) in.read_slots = view(q.slots, {q.rows});
  if (q.write_slots) in.write_slots = view(q.slots, {q.rows});
  if (q.token_slots) in.token_slots = view(q.slots, {q.rows, q.tokens});
  if (q.accepted) in.accepted = view(DType::i32, {q.rows});
  if (q.state_in) in.state_in = states(d.state, q.rows);
  if (q.state_out) in.state_out = states(d.state, q.rows);
  if (q.snapshots) in.snapshots = view(d.snapshots, {q.rows, q.tokens, H, V, K});
  if (q.varlen) in.cu_seqlens = view(q.slots, {q.rows + 1});
  if (q.tree) in.parent = view(DType::i32, {B, T});
  in.update_state = q.update_state;
  ReplayWindow window;
  if (q.window > 0) {
    const WindowLayout layout = window_layout(config, slots, q.window, q.entries);
    const auto of = [&](const auto& shape) { return std::vector<std::int64_t>(shape.begin(), shape.end()); };
    window.keys = view(q.entries, of(layout.keys)), window.corrections = view(q.entries, of(layout.corrections));
    window.decays = view(DType::f32, of(layout.decays));
    window.record = {q.window, view(DType::i32, {slots}), view(DType::i32, of(layout.order))};
    in.window = &window;
  }
  return backend.unsupported_reason(validate(config, in).problem);
}

struct DTypeSet {
  const char* name;
  DType activations, states;
};
constexpr std::array dtype_sets = {
    DTypeSet{"f32", DType::f32, DType::f32},
    DTypeSet{"f16", DType::f16, DType::f16},
    DTypeSet{"bf16", DType::bf16, DType::bf16},
    DTypeSet{"bf16 with f32 states", DType::bf16, DType::f32},
    DTypeSet{"f32 with bf16 states", DType::f32, DType::bf16},
};

/// "yes", "no" with the reason, or the dtypes that are done and why the others are not.
template <class Change>
std::string answer(const Backend& backend, Change change) {
  std::string done, reason;
  std::size_t count = 0;
  for (const DTypeSet& set : dtype_sets) {
    Question question;
    DTypes& d = question.config.dtypes;
    d.q = d.k = d.v = d.o = d.gate = d.beta = d.A_log = d.dt_bias = set.activations;
    d.state = d.snapshots = set.states;
    change(question);
    const std::string why_not = reason_against(backend, question);
    if (!why_not.empty()) reason = why_not;
    if (why_not.empty()) done += (count++ > 0 ? ", " : "") + std::string(set.name);
  }
  if (count == dtype_sets.size()) return "yes";
  return (count == 0 ? "no: " : done + "; else no: ") + reason;
}

struct Feature {
  const char* name;
  void (*change)(Question&);
};

// clang-format off
constexpr Feature features[] = {
    {"one token", [](Question&) {}},
    {"4 tokens", [](Question& q) { q.tokens = 4; }},
    {"16 tokens", [](Question& q) { q.tokens = 16; }},
    {"4096 tokens", [](Question& q) { q.tokens = 4096; }},
    {"4096 rows", [](Question& q) { q.rows = 4096; }},
    {"K = V = 64", [](Question& q) { q.config.key_dim = q.config.value_dim = 64; }},
    {"K = V = 256", [](Question& q) { q.config.key_dim = q.config.value_dim = 256; }},
    {"K = 100, V = 37", [](Question& q) { q.config.key_dim = 100, q.config.value_dim = 37; }},
    {"K = 3584", [](Question& q) { q.config.key_dim = 3584; }},
    {"K = 8192", [](Question& q) { q.config.key_dim = 8192; }},
    {"GQA: 32 query heads, 16 key and value heads", [](Question& q) { q.config.q_heads = 32, q.config.v_heads = 16; }},
    {"as many query, key and value heads", [](Question& q) { q.config.v_heads = 16; }},
    {"gate: log decay `g`", [](Question& q) { q.config.gate = GateForm::log_decay; }},
    {"gate: none", [](Question& q) { q.config.gate = GateForm::none; }},
    {"beta: `2 sigmoid(b)`", [](Question& q) { q.config.beta = BetaForm::twice_logits; }},
    {"beta: given", [](Question& q) { q.config.beta = BetaForm::value; }},
    {"beta: 1", [](Question& q) { q.config.beta = BetaForm::one; }},
    {"q and k as they are, no norm", [](Question& q) { q.config.qk_l2norm = false; }},
    {"V-last states, padded slots", [](Question& q) { q.transposed = q.padded_slots = true; }},
    {"any strides of q, k and v", [](Question& q) { q.strided = true; }},
    {"int64 slots", [](Question& q) { q.slots = DType::i64; }},
    {"no pool: zero states, and the last ones stored", [](Question& q) { q.pool = false, q.state_out = true; }},
    {"no pool: given states, none stored", [](Question& q) { q.pool = false, q.state_in = true; }},
    {"pool that is only read", [](Question& q) { q.update_state = false; }},
    {"`write_slots`", [](Question& q) { q.write_slots = true; }},
    {"`token_slots`, 4 tokens", [](Question& q) { q.tokens = 4, q.token_slots = true; }},
    {"`token_slots` with `accepted`, 4 tokens", [](Question& q) { q.tokens = 4, q.token_slots = q.accepted = true; }},
    {"`snapshots`, 4 tokens", [](Question& q) { q.tokens = 4, q.snapshots = true, q.update_state = false; }},
    {"`cu_seqlens`", [](Question& q) { q.tokens = 100, q.varlen = true; }},
    {"replay window of 16 bf16 entries, 1 token", [](Question& q) { q.window = 16; }},
    {"replay window of 16 bf16 entries, 4 tokens", [](Question& q) { q.window = 16, q.tokens = 4; }},
    {"replay window of 16 f32 entries, 4 tokens", [](Question& q) { q.window = 16, q.tokens = 4, q.entries = DType::f32; }},
    {"replay window of 64 bf16 entries, 64 tokens", [](Question& q) { q.window = 64, q.tokens = 64; }},
    {"replay window, K = V = 64", [](Question& q) { q.window = 16, q.config.key_dim = q.config.value_dim = 64; }},
    {"replay window, K = V = 256", [](Question& q) { q.window = 16, q.config.key_dim = q.config.value_dim = 256; }},
    {"replay window, GQA", [](Question& q) { q.window = 16, q.config.q_heads = 32, q.config.v_heads = 16; }},
    {"replay window with `cu_seqlens`", [](Question& q) { q.window = 16, q.tokens = 4, q.varlen = true; }},
    {"replay window with draft trees", [](Question& q) { q.window = 16, q.tokens = 8, q.tree = true; }},
};
// clang-format on

}  // namespace

std::string support_table() {
  std::string out = "| |", rule = "|---|";
  const std::vector<Backend*> all = backends();
  for (const Backend* backend : all) {
    out += fmt::format(" `{}` |", backend->name());
    rule += "---|";
  }
  out += "\n" + rule + "\n";
  for (const Feature& feature : features) {
    out += fmt::format("| {} |", feature.name);
    for (const Backend* backend : all) out += fmt::format(" {} |", answer(*backend, feature.change));
    out += "\n";
  }
  return out;
}

}  // namespace gatedelta::tool
