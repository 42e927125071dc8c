// SPDX-License-Identifier: Apache-2.0
#include "backends/cuda/plan.hpp"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <iterator>
#include <string>
#include <string_view>

#include "gatedelta/error.hpp"

namespace gatedelta::cuda {
namespace {

constexpr std::int64_t no_bound = INT64_MAX;

// Measured on an H200 with 16 query and 32 value heads and K = V = 128 by bench/tune_cuda, which tries all of them. What counts
// is the order in which the L2 cache gives up what was written: from 256 or 512 states on it is 2 to 6 % faster to keep states
// there till they have been stored, with fewer it is up to 10 % slower.
constexpr Choice decode_16_bit[] = {
    {128, {4, 2, 8}}, {256, {4, 2, 16}}, {2048, {4, 2, 32, true}}, {no_bound, {8, 2, 32, true}}};
constexpr Choice decode_32_bit[] = {{64, {4, 2, 4}},          {128, {8, 2, 8}},
                                    {256, {8, 2, 16, true}},  {512, {8, 1, 32, true, Ahead::always}},
                                    {1024, {8, 2, 32, true}}, {no_bound, {8, 1, 16, true}}};
constexpr Choice decode_value_last_16_bit[] = {{128, {4, 2, 1, false, Ahead::dependent}},
                                               {256, {4, 2, 1, true, Ahead::dependent}},
                                               {512, {16, 4, 1, true, Ahead::dependent}},
                                               {no_bound, {16, 4, 1, true, Ahead::always}}};
constexpr Choice decode_value_last_32_bit[] = {{64, {4, 2, 1, false, Ahead::dependent}},
                                               {128, {4, 2, 1, false, Ahead::always}},
                                               {256, {4, 2, 1, true, Ahead::always}},
                                               {no_bound, {16, 4, 1, true, Ahead::always}}};
constexpr Choice serving_update_16_bit[] = {
    {32, {0, 1, 16}}, {256, {0, 4, 16}}, {512, {0, 4, 32, true}}, {1024, {0, 1, 64, true}}, {no_bound, {0, 4, 32, true}},
};
constexpr Choice serving_update_32_bit[] = {
    {128, {0, 2, 16}}, {256, {0, 4, 32}}, {512, {0, 1, 64, true}}, {1024, {0, 2, 32, true}}, {no_bound, {0, 4, 32, true}},
};
constexpr Choice serving_each_16_bit[] = {{64, {2, 2, 16}}, {256, {0, 4, 16}}, {1024, {0, 2, 32}}, {no_bound, {0, 2, 16}}};
constexpr Choice serving_each_32_bit[] = {{32, {2, 2, 16}}, {128, {0, 2, 16}}, {512, {0, 2, 32}}, {no_bound, {0, 4, 16}}};
constexpr Choice serving_long_keys_32_bit[] = {{128, {0, 2, 16}}, {no_bound, {0, 2, 32, true}}};
constexpr Choice serving_read_16_bit[] = {{256, {0, 1, 16}}, {4096, {0, 2, 64}}, {no_bound, {0, 4, 32}}};
constexpr Choice serving_read_32_bit[] = {{256, {0, 1, 16}}, {no_bound, {0, 2, 64}}};
// Inputs that are not bfloat16: up to 8 tokens in float16 beside a state of 16 bits, and all others.
constexpr Choice split_16_bit[] = {{128, {0, 4, 16}}, {512, {0, 4, 32, true}}, {no_bound, {0, 2, 64, true}}};
constexpr Choice split_32_bit[] = {{128, {0, 4, 16}}, {no_bound, {0, 2, 64, true}}};
// The same with states after each token: in float16, in float32.
constexpr Choice split_each_16_bit[] = {{64, {2, 4, 16}}, {256, {0, 4, 16}}, {no_bound, {0, 4, 32}}};
constexpr Choice split_each_32_bit[] = {{64, {2, 4, 16}}, {128, {0, 4, 16}}, {512, {0, 4, 32}}, {no_bound, {0, 4, 16}}};
constexpr Choice float_each_16_bit[] = {{64, {2, 4, 16}}, {512, {0, 2, 32}}, {no_bound, {0, 4, 32}}};
constexpr Choice float_each_32_bit[] = {{64, {2, 4, 16}}, {512, {0, 2, 32}}, {no_bound, {0, 4, 16}}};
constexpr Choice replay_one_token_16_bit[] = {{64, {1, 4, 16}}, {512, {1, 2, 32}}, {2048, {1, 2, 64}}, {no_bound, {2, 4, 32}}};
constexpr Choice replay_one_token_32_bit[] = {{64, {1, 4, 16}}, {256, {1, 2, 32}}, {no_bound, {1, 2, 64}}};
constexpr Choice replay_rows[] = {{128, {1, 4, 16}}, {256, {1, 2, 32}}, {no_bound, {1, 2, 64}}};
// Windows of more entries than a group, K-last; and the same where a call is several passes.
constexpr Choice replay_long[] = {{128, {1, 4, 16}}, {1024, {1, 4, 32}}, {no_bound, {2, 4, 32}}};
constexpr Choice replay_passes[] = {{128, {1, 4, 16}}, {256, {1, 2, 32}}, {1024, {1, 2, 64}}, {no_bound, {2, 4, 32}}};
constexpr Choice replay_value_last_one_token_16_bit[] = {{128, {1, 4, 16}}, {512, {1, 4, 32}}, {no_bound, {2, 4, 32}}};
constexpr Choice replay_value_last_one_token_32_bit[] = {{128, {1, 4, 16}}, {512, {1, 2, 32}}, {no_bound, {2, 4, 32}}};
constexpr Choice replay_value_last_16_bit[] = {{128, {1, 4, 16}}, {512, {1, 2, 64}}, {no_bound, {2, 4, 32}}};
constexpr Choice replay_value_last_32_bit[] = {{128, {1, 4, 16}}, {512, {1, 2, 32}}, {no_bound, {1, 2, 64}}};
// Windows of float32 entries, K-last.
constexpr Choice replay_float_one_token[] = {{128, {1, 4, 16}}, {256, {1, 2, 32}}, {2048, {1, 2, 64}}, {no_bound, {4, 4, 32}}};
constexpr Choice replay_float_16_bit[] = {{128, {1, 4, 16}}, {256, {1, 2, 32}}, {512, {1, 2, 64}}, {no_bound, {2, 4, 32}}};
constexpr Choice replay_float_32_bit[] = {{128, {1, 4, 16}}, {256, {1, 2, 32}}, {no_bound, {1, 2, 64}}};
// Calls that are not passes, with long windows: of several tokens, V-last; and of float32 entries, K-last.
constexpr Choice replay_long_value_last[] = {{128, {1, 4, 16}}, {512, {1, 4, 32}}, {no_bound, {2, 4, 32}}};
constexpr Choice replay_long_float_one_token_16_bit[] = {
    {128, {1, 4, 16}}, {256, {1, 2, 32}}, {2048, {2, 4, 32}}, {no_bound, {4, 4, 32}}};
constexpr Choice replay_long_float_one_token_32_bit[] = {{128, {1, 4, 16}}, {256, {1, 2, 32}}, {no_bound, {1, 4, 32}}};
constexpr Choice replay_long_float[] = {{128, {1, 4, 16}}, {256, {1, 2, 32}}, {no_bound, {2, 4, 32}}};
constexpr Choice wide_16_bit[] = {{32, {0, 4, 16}}, {no_bound, {0, 4, 32, true}}};
constexpr Choice wide_32_bit[] = {{32, {0, 2, 16}}, {no_bound, {0, 2, 64, true}}};
constexpr Choice chunks_rows[] = {{64, {4, 8, 16}}, {128, {4, 12, 16}}, {no_bound, {0, 4, 16}}};
constexpr Choice split_chunks_rows[] = {{64, {4, 8, 16}}, {no_bound, {0, 8, 16}}};
constexpr Choice serving_value_last_16_bit[] = {{128, {4, 4, 1}}, {2048, {2, 2, 1, true}}, {no_bound, {0, 2, 1, true}}};
constexpr Choice serving_value_last_32_bit[] = {
    {32, {4, 4, 1}}, {128, {2, 2, 1, true}}, {512, {0, 1, 1, true}}, {no_bound, {0, 2, 1, true}}};
constexpr Choice value_last_each_16_bit[] = {{no_bound, {4, 4, 1}}};
constexpr Choice value_last_each_32_bit[] = {{no_bound, {2, 2, 1}}};
constexpr Choice wide_value_last_16_bit[] = {{128, {4, 4, 1}}, {no_bound, {0, 2, 1, true}}};
constexpr Choice wide_value_last_32_bit[] = {{128, {2, 2, 1}}, {no_bound, {0, 2, 1, true}}};

template <std::size_t N>
constexpr Choices all(const Choice (&rows)[N]) {
  return {std::begin(rows), std::end(rows)};
}

/// Whether all states of the call have vectors along this one of their last two dimensions (0: V, 1: K).
bool states_have_vectors(const ForwardParams& p, int dimension) {
  const auto width = static_cast<std::int64_t>(16 / size_of(p.state_dtype));
  const auto good = [&]<int rank>(const Tensor<std::int64_t, rank>& tensor) {
    return tensor.data == nullptr || has_vectors(tensor, rank - 2 + dimension, width);
  };
  return good(p.state_read) && good(p.state_write) && good(p.snapshots);
}

/// What all fast kernels want; says which way the state lies.
bool has_fast_sizes(const ForwardParams& p, bool& value_last) {
  const bool key_dim = p.key_dim == 64 || p.key_dim == 128 || p.key_dim == 256;
  if (!key_dim || p.value_dim % 32 != 0 || p.heads > max_grid_yz || p.tokens > INT32_MAX) return false;
  value_last = !states_have_vectors(p, 1);
  return !value_last || states_have_vectors(p, 0);
}

/// q, k, v and o in this dtype and vectors, states without gaps.
bool has_serving_form(const ForwardParams& p, bool value_last, DType inputs = DType::bf16) {
  const auto good = [&](const auto& tensor) { return tensor.data == nullptr || tensor.dtype == inputs; };
  const auto gapless = [&](const auto& tensor, int row) {
    return tensor.data == nullptr || (value_last ? tensor.strides[row + 1] == p.value_dim : tensor.strides[row] == p.key_dim);
  };
  const int width = inputs == DType::f32 ? 4 : 2;
  return p.vector_keys && has_vectors(p.v, 3, width) && has_vectors(p.o, 3, width) && good(p.q) && good(p.k) && good(p.v) &&
         good(p.o) && gapless(p.state_read, 2) && gapless(p.state_write, 2) && gapless(p.snapshots, 3);
}

bool has_usual_gates(const ForwardParams& p) {
  return p.l2norm && p.gate_form == GateForm::raw && p.beta_form == BetaForm::logits && p.gate.dtype == DType::bf16 &&
         p.beta.dtype == DType::bf16 && !p.store_tokens && p.accepted.data == nullptr;
}

int token_tile_of(std::int64_t tokens) { return tokens == 1 ? 1 : tokens <= 4 ? 4 : tokens <= 8 ? 8 : 16; }

/// Whether states after each token are stored.
bool stores_each(const ForwardParams& p) { return p.store_tokens || p.snapshots.data != nullptr; }

/// More than 8 tokens move 16 bytes of v and o at a time. Keys of 256 elements: bfloat16, K-last, up to 8 tokens and no states
/// but the last; with these the recurrence is as fast, or up to 8 % faster.
bool fits_serving(const ForwardParams& p, bool value_last) {
  return p.cu_seqlens.data == nullptr && p.tokens >= 2 && p.tokens <= 16 &&
         (p.key_dim <= 128 || (p.q.dtype == DType::bf16 && !value_last && p.tokens <= 8 && !stores_each(p))) &&
         (p.tokens <= 8 || (has_vectors(p.v, 3, 8) && has_vectors(p.o, 3, 8))) &&
         (p.snapshots.data == nullptr || p.snapshots.dtype == p.state_dtype);
}

/// More tokens than serving has at a time, or rows of different lengths, and no states but the last.
bool fits_chunks(const ForwardParams& p) {
  return p.key_dim <= 128 && (p.cu_seqlens.data != nullptr || p.tokens > 16) && p.snapshots.data == nullptr &&
         !p.store_tokens && has_vectors(p.v, 3, 8) && has_vectors(p.o, 3, 8);
}

/// What serving could do, but the recurrence is faster at, measured on an H200 (16/32 heads, K = V = 128): states after each
/// token, of float32 inputs up to 4 tokens (it takes 0.85 to 1.05 of the time), V-last of 32 bits and more than 2 tokens (0.8
/// for few sequences to 1.15 for 64; of 16 bits serving takes 0.7 to 0.9 of the recurrence's time).
bool fits_recurrent(const ForwardParams& p, bool value_last) {
  if (!stores_each(p)) return false;
  return value_last ? p.state_dtype == DType::f32 && p.tokens > 2 : p.q.dtype == DType::f32 && p.tokens <= 4;
}

bool has_kernel(const Plan& plan, const Shape& shape, DType state, Stores stores) {
  if (plan.kernel == Kernel::chunks)
    return shape.preparing >= 0 && shape.preparing <= 8 && shape.preparing % 2 == 0 && shape.warps > shape.preparing &&
           (shape.warps - shape.preparing) % 4 == 0 && shape.warps <= chunks_max_warps(plan.inputs == DType::bf16) &&
           shape.span == 16;
  if (shape.warps < 1 || shape.warps > 4) return false;
  if (shape.span < 1 || shape.span > 1024) return false;
  if (plan.kernel == Kernel::replay) return shape.heads >= 1 && shape.heads <= shape.warps;
  if (plan.kernel == Kernel::serving) {
    // V-last, states after each token are stored by as many warps as there are tiles of 16 rows in 128 bytes of a key.
    const int tiles = 8 / static_cast<int>(size_of(state));
    if (plan.value_last && stores == Stores::each) return shape.shares == tiles && shape.warps == tiles;
    if (shape.shares == 0) return true;
    return (shape.shares == 2 || shape.shares == 4) &&
           (plan.value_last ? shape.warps == shape.shares : shape.warps % shape.shares == 0 && shape.span <= 16);
  }
  if (plan.kernel != Kernel::decode) return true;
  const int size = shape.rows_a_lane;
  return size == 4 || size == 8 || size == (plan.value_last ? 16 : 2);
}

}  // namespace

std::optional<Shape> parse_shape(const char* text) {
  if (text == nullptr || *text == '\0') return {};
  Shape shape;
  int length = 0;
  const int read = std::sscanf(text, "%d:%d:%d%n", &shape.rows_a_lane, &shape.warps, &shape.span, &length);
  const std::string_view rest = read == 3 ? text + length : "?";
  shape.keeps_states = rest == ":keep";
  if (!rest.empty() && !shape.keeps_states)
    throw Error(ErrorCode::invalid_argument, "GATEDELTA_CUDA_SHAPE: '" + std::string(text) + "' is not ROWS:WARPS:SPAN[:keep]");
  return shape;
}

Choices choices(const Plan& plan, DType state, Stores stores) {
  const auto by_state = [&](const auto& of_16_bit, const auto& of_32_bit) {
    return state == DType::f32 ? all(of_32_bit) : all(of_16_bit);
  };
  if (plan.kernel == Kernel::chunks) return plan.inputs == DType::bf16 ? all(chunks_rows) : all(split_chunks_rows);
  if (plan.kernel == Kernel::replay) {
    const bool one_token = plan.token_tile == 1, is_long = !plan.one_group && !plan.passes;
    if (plan.value_last) {
      if (one_token) return by_state(replay_value_last_one_token_16_bit, replay_value_last_one_token_32_bit);
      if (is_long && plan.entries == DType::bf16) return all(replay_long_value_last);
      return by_state(replay_value_last_16_bit, replay_value_last_32_bit);
    }
    if (plan.entries == DType::f32) {
      if (is_long && one_token) return by_state(replay_long_float_one_token_16_bit, replay_long_float_one_token_32_bit);
      if (is_long && (state != DType::f32 || plan.token_tile == 8)) return all(replay_long_float);
      return one_token ? all(replay_float_one_token) : by_state(replay_float_16_bit, replay_float_32_bit);
    }
    if (!plan.one_group) return plan.passes ? all(replay_passes) : all(replay_long);
    return one_token ? by_state(replay_one_token_16_bit, replay_one_token_32_bit) : all(replay_rows);
  }
  if (plan.kernel == Kernel::serving) {
    const bool wide = plan.token_tile == 16;
    if (plan.value_last && stores == Stores::each) return by_state(value_last_each_16_bit, value_last_each_32_bit);
    if (plan.value_last)
      return wide ? by_state(wide_value_last_16_bit, wide_value_last_32_bit)
                  : by_state(serving_value_last_16_bit, serving_value_last_32_bit);
    if (plan.inputs != DType::bf16) {
      const bool each = stores == Stores::each;
      if (plan.inputs == DType::f32) return each ? by_state(float_each_16_bit, float_each_32_bit) : all(split_32_bit);
      if (each) return by_state(split_each_16_bit, split_each_32_bit);
      return wide ? all(split_32_bit) : by_state(split_16_bit, split_32_bit);
    }
    if (wide) return by_state(wide_16_bit, wide_32_bit);
    if (stores == Stores::none) return by_state(serving_read_16_bit, serving_read_32_bit);
    if (stores == Stores::each) return by_state(serving_each_16_bit, serving_each_32_bit);
    return plan.long_keys ? by_state(serving_update_16_bit, serving_long_keys_32_bit)
                          : by_state(serving_update_16_bit, serving_update_32_bit);
  }
  return plan.value_last ? by_state(decode_value_last_16_bit, decode_value_last_32_bit)
                         : by_state(decode_16_bit, decode_32_bit);
}

namespace {

/// Whether the last state of a row goes where its first one is.
bool is_in_place(const ForwardParams& p) {
  const auto &read = p.read_slots, &write = p.write_slots;
  const bool same_slots =
      write.data == nullptr || (p.accepted.data == nullptr && write.data == read.data && write.strides[0] == read.strides[0]);
  return p.state_read.data == p.state_write.data && same_slots;
}

void choose_shape(const ForwardParams& p, Stores stores, Plan& plan) {
  static const std::optional<Shape> forced = parse_shape(std::getenv("GATEDELTA_CUDA_SHAPE"));
  const Choices rows = choices(plan, p.state_dtype, stores);
  plan.shape = std::find_if(rows.begin, rows.end, [&](const Choice& row) { return p.rows * p.heads <= row.states; })->shape;
  if (forced && has_kernel(plan, *forced, p.state_dtype, stores)) {
    const Ahead ahead = plan.shape.ahead;
    plan.shape = *forced, plan.shape.ahead = ahead;
  }
  plan.shape.keeps_states = plan.shape.keeps_states && stores == Stores::last && is_in_place(p);
  if (plan.kernel == Kernel::serving && !plan.value_last) {
    int& shares = plan.shape.shares;
    if (stores != Stores::each) shares = 0;
    while (shares > p.tokens) shares /= 2;
  }
  // V-last, all warps of a block have values.
  if (plan.kernel == Kernel::replay && plan.value_last) {
    int& warps = plan.shape.warps;
    while (p.value_dim % (16 * warps) != 0) --warps;
    plan.shape.heads = std::min(plan.shape.heads, warps);
  }
  // V-last, all lanes of a warp have values.
  if (plan.kernel == Kernel::decode && plan.value_last) {
    const std::int64_t width = 16 / static_cast<std::int64_t>(size_of(p.state_dtype));
    int& lanes = plan.shape.value_lanes;
    if (!plan.common) lanes = std::min(lanes, 8);
    while (p.value_dim % (lanes * width) != 0) lanes /= 2;
  }
}

/// What a call does beside those before and behind it. Few blocks leave room for the next kernel's, which then can begin early.
/// Where there are more, those that come early lie wherever there is room, unevenly, and what a kernel asks for ahead of its
/// inputs delays these: that costs up to a quarter. V-last decoding has small blocks and gains nearly everywhere, as a plain
/// call, too, if that is a large one; K-last in one row of its table. With a window, where more than the state is looked up and
/// waited for, that is worth more than it costs (measured on an H200).
void choose_start(const ForwardParams& p, Plan& plan) {
  constexpr std::int64_t MiB = 1 << 20;
  const bool decodes = plan.kernel == Kernel::decode;
  const std::int64_t bytes = p.rows * p.heads * p.key_dim * p.value_dim * static_cast<std::int64_t>(size_of(p.state_dtype));
  plan.early = plan.kernel == Kernel::replay || bytes <= (decodes ? 2 : 4) * MiB;
  const Ahead ahead = plan.shape.ahead;
  plan.ahead = ahead == Ahead::always || (p.dependent && (plan.early || ahead == Ahead::dependent));
}

}  // namespace

Plan make_plan(const ForwardParams& p) {
  Plan plan;
  if (!has_fast_sizes(p, plan.value_last)) return plan;
  // Inputs of other dtypes than bfloat16: float16 K-last or in chunks, float32 K-last and up to 8 tokens.
  const DType inputs = p.q.dtype;
  const bool form = has_serving_form(p, plan.value_last, inputs);
  const bool vectors = form && inputs == DType::bf16, half = form && inputs == DType::f16;
  const bool usual = vectors && has_usual_gates(p);
  const bool serving = form && (vectors || (!plan.value_last && (half || p.tokens <= 8))) && fits_serving(p, plan.value_last);
  if (serving && !fits_recurrent(p, plan.value_last)) {
    plan.kernel = Kernel::serving;
    plan.token_tile = token_tile_of(p.tokens);
    plan.long_keys = p.key_dim == 256;
    plan.common = usual && !plan.long_keys, plan.inputs = inputs;
  } else if ((vectors || half) && fits_chunks(p)) {
    plan.kernel = Kernel::chunks;
    plan.inputs = inputs;
  } else if (p.cu_seqlens.data == nullptr && p.tokens == 1) {
    plan.kernel = Kernel::decode;
    plan.common = usual && p.snapshots.data == nullptr;
  } else {
    plan.kernel = Kernel::recurrent;
  }
  if (plan.kernel != Kernel::recurrent)
    choose_shape(p, stores_each(p) ? Stores::each : p.store_final ? Stores::last : Stores::none, plan);
  choose_start(p, plan);
  return plan;
}

Plan make_replay_plan(const ReplayParams<ForwardParams>& p) {
  Plan plan;
  const auto& window = p.window;
  if (!has_fast_sizes(p, plan.value_last) || !has_vectors(window.keys, 3, 8) || !has_vectors(window.corrections, 3, 8))
    return plan;
  // Of sequences of different lengths, each must have room in the window.
  const bool variable = p.cu_seqlens.data != nullptr;
  const std::int64_t tokens = variable ? std::max(window.room(), 2) : p.tokens;
  // A block has all of v of its heads in shared memory.
  const bool tree = p.parent.data != nullptr;
  if (p.key_dim == 256 || p.value_dim > 512 || tokens < 1 || p.rows == 0 || (tree && tokens == 1) ||
      !has_serving_form(p, plan.value_last) || !has_vectors(p.v, 3, 8)) {
    plan.kernel = Kernel::recurrent;
    plan.tree = tree;
  } else {
    plan.kernel = Kernel::replay;
    plan.token_tile = token_tile_of(std::min<std::int64_t>(tokens, 8));
    plan.passes = tokens > plan.token_tile;
    plan.entries = window.keys.dtype;
    plan.one_group = window.capacity <= group_entries && window.ring <= 32;
    plan.common = plan.entries == DType::bf16 && !plan.value_last && !variable && !plan.passes && has_usual_gates(p);
    choose_shape(p, Stores::last, plan);
  }
  choose_start(p, plan);
  return plan;
}

}  // namespace gatedelta::cuda
