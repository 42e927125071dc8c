// SPDX-License-Identifier: Apache-2.0
#include "workload.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>
#include <random>

#include "gatedelta/error.hpp"

namespace gatedelta::bench {
namespace {

using Allocate = std::function<void*(std::size_t)>;

/// The arguments, but for the window itself, whose memory counts as well.
Arguments make_arguments(const Case& item, Device device, const Allocate& allocate, ReplayWindow* window = nullptr) {
  const auto tensor = [&](DType dtype, std::initializer_list<std::int64_t> shape) {
    TensorView view = make_view(nullptr, dtype, {shape.begin(), shape.size()}, {}, device);
    view.data = allocate(static_cast<std::size_t>(view.elements()) * size_of(dtype));
    return view;
  };
  const std::int64_t B = item.batch, T = item.tokens, H = item.config().heads(), K = item.key_dim, V = item.value_dim;
  Arguments out;
  out.q = tensor(item.dtype, {B, T, item.q_heads, K});
  out.k = tensor(item.dtype, {B, T, item.q_heads, K});
  out.v = tensor(item.dtype, {B, T, item.v_heads, V});
  out.o = tensor(item.dtype, {B, T, H, V});
  out.a = tensor(item.dtype, {B, T, H});
  out.b = tensor(item.dtype, {B, T, H});
  out.A_log = tensor(DType::f32, {H});
  out.dt_bias = tensor(DType::f32, {H});
  out.read_slots = tensor(DType::i32, {B});
  out.state =
      item.value_last ? tensor(item.state_dtype, {B, H, K, V}).transposed(2, 3) : tensor(item.state_dtype, {B, H, V, K});
  if (item.window > 0) {
    const WindowLayout layout = window_layout(item.config(), B, item.window, item.entries, T);
    void* const layer = allocate(layout.layer_bytes);
    void* const record = allocate(layout.record_bytes);
    if (window != nullptr) *window = window_at(layout, layer, record, device);
  }
  return out;
}

}  // namespace

std::string_view name_of(Op op) noexcept { return op == Op::decode ? "decode" : op == Op::verify ? "verify" : "prefill"; }

Config Case::config() const {
  Config config;
  config.q_heads = config.k_heads = q_heads;
  config.v_heads = v_heads;
  config.key_dim = key_dim;
  config.value_dim = value_dim;
  DTypes& dtypes = config.dtypes;
  dtypes.q = dtypes.k = dtypes.v = dtypes.o = dtypes.gate = dtypes.beta = dtype;
  dtypes.state = state_dtype;
  config.num_threads = threads;
  return config;
}

std::size_t Case::state_bytes() const {
  return static_cast<std::size_t>(batch * config().heads() * value_dim * key_dim) * size_of(state_dtype);
}

double Case::flops() const {
  return 7.0 * static_cast<double>(batch * tokens * config().heads()) * static_cast<double>(key_dim * value_dim);
}

Arguments shapes_of(const Case& item, Device device) {
  static std::byte somewhere;  // views of memory that nobody reads; a null pointer would not pass for a tensor
  return make_arguments(item, device, [](std::size_t) { return &somewhere; });
}

Rotation plan_rotation(const Case& item, const Platform& platform, double max_bytes) {
  Rotation rotation;
  make_arguments(item, platform.device(), [&](std::size_t bytes) {
    rotation.instance_bytes += bytes;
    return nullptr;
  });
  const double one = static_cast<double>(rotation.instance_bytes), free = platform.free_bytes();
  if (one > 0.9 * free)
    throw Error(ErrorCode::out_of_memory, "bench: one call of " + std::to_string(std::llround(one / 1048576)) +
                                              " MiB does not fit into the " + std::to_string(std::llround(free / 1048576)) +
                                              " MiB of free memory");
  const double wanted = 4 * platform.cache_bytes();
  if (!item.warm) {
    const double fitting = std::max(1.0, std::floor(std::min(max_bytes, free / 2) / one));
    rotation.instances = static_cast<int>(std::min({std::floor(wanted / one) + 1, fitting, 1e6}));
    rotation.cold = one * rotation.instances > wanted;
  }
  return rotation;
}

Workload::Workload(const Case& item, Platform& platform, const Rotation& rotation) {
  std::vector<std::size_t> sizes;  // of an instance's blocks
  for (int i = 0; i < rotation.instances; ++i) {
    windows_.push_back(std::make_unique<ReplayWindow>());
    const auto allocate = [&](std::size_t bytes) {
      if (i == 0) sizes.push_back(bytes);
      memory_.push_back(platform.allocate(bytes));
      return memory_.back().get();
    };
    instances_.push_back(make_arguments(item, platform.device(), allocate, windows_.back().get()));
    if (item.window > 0) instances_.back().window = windows_.back().get();
  }

  const Arguments& first = instances_.front();
  std::uint64_t seed = 0;
  const auto fill = [&](const TensorView& tensor, float mean, float deviation) {
    platform.fill(tensor, {++seed, mean, deviation}, item.threads);
  };
  fill(first.q, 0, 1);
  fill(first.k, 0, 1);
  fill(first.v, 0, 1);
  fill(first.o, 0, 0);
  // -exp(A_log) * softplus(a + dt_bias) is about -0.5 * exp(-3.9): a decay of 0.99, few below 0.9.
  fill(first.a, 0, 0.5f);
  fill(first.A_log, -0.7f, 0.3f);
  fill(first.dt_bias, -3.9f, 0.5f);
  fill(first.b, 0, 1);
  fill(first.state, 0, 0.1f);
  // In a server a batch's slots lie in no order.
  std::vector<std::int32_t> slots(static_cast<std::size_t>(item.batch));
  std::iota(slots.begin(), slots.end(), 0);
  std::shuffle(slots.begin(), slots.end(), std::mt19937(1));
  platform.copy_from_host(first.read_slots.data, slots.data(), slots.size() * sizeof slots[0]);
  if (item.window > 0) start_windows(item, platform);

  // The times do not depend on the numbers, so the other instances are copies.
  const std::size_t before = memory_.size() - sizes.size() * instances_.size();  // what the instances share
  for (std::size_t block = sizes.size(); before + block < memory_.size(); ++block) {
    const std::size_t original = block % sizes.size();
    platform.copy(memory_[before + block].get(), memory_[before + original].get(), sizes[original], item.threads);
  }
}

/// Sequences of a server are folded at different steps: so their windows start at all lengths.
void Workload::start_windows(const Case& item, Platform& platform) {
  const ReplayWindow& window = *windows_.front();
  platform.fill(window.keys, {101, 0, 1 / std::sqrt(static_cast<float>(item.key_dim))}, item.threads);
  platform.fill(window.corrections, {102, 0, 0.5f}, item.threads);
  platform.fill(window.decays, {103, -0.01f, 0.001f}, item.threads);
  std::vector<std::int32_t> lengths, order, accepted(static_cast<std::size_t>(item.batch));
  for (std::int64_t n = 0; n < item.batch; ++n) {
    lengths.push_back(static_cast<std::int32_t>(n * item.accepted % item.window));
    for (std::int64_t i = 0; i < window.record.order.shape[1]; ++i) order.push_back(static_cast<std::int32_t>(i));
  }
  platform.copy_from_host(window.record.length.data, lengths.data(), lengths.size() * sizeof lengths[0]);
  platform.copy_from_host(window.record.order.data, order.data(), order.size() * sizeof order[0]);
  std::fill(accepted.begin(), accepted.end(), static_cast<std::int32_t>(item.accepted));
  memory_.insert(memory_.begin(), platform.allocate(accepted.size() * sizeof accepted[0]));
  platform.copy_from_host(memory_.front().get(), accepted.data(), accepted.size() * sizeof accepted[0]);
  accepted_ = make_view(memory_.front().get(), DType::i32, std::array{item.batch}, {}, platform.device());
}

AcceptArguments Workload::accept(const Arguments& arguments) const {
  AcceptArguments out;
  out.record = arguments.window->record;
  out.slots = arguments.read_slots;
  out.accepted = accepted_;
  out.tokens = arguments.q.shape[1];
  return out;
}

const Arguments& Workload::next() {
  position_ = (position_ + 1) % instances_.size();
  return instances_[position_];
}

}  // namespace gatedelta::bench
