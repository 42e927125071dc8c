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

/// The arguments; without `window` all but that, whose memory counts nevertheless.
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
  const std::int64_t rows = item.value_last ? K : V, columns = item.value_last ? V : K;
  const std::int64_t slots = item.mode == Mode::token_slots ? B * T : B;
  out.state = tensor(item.state_dtype, {slots, H, rows, columns});
  if (item.value_last) out.state = out.state.transposed(2, 3);
  if (item.mode == Mode::token_slots) {
    out.token_slots = tensor(DType::i32, {B, T});
    out.accepted = tensor(DType::i32, {B});
  } else {
    out.read_slots = tensor(DType::i32, {B});
  }
  if (item.mode == Mode::snapshots) {
    out.snapshots = tensor(item.state_dtype, {B, T, H, rows, columns});
    if (item.value_last) out.snapshots = out.snapshots.transposed(3, 4);
  }
  out.update_state = item.mode == Mode::update || item.mode == Mode::token_slots;
  if (item.window > 0) {
    const WindowLayout layout = window_layout(item.config(), B, item.window, item.entries, T);
    void* const layer = allocate(layout.layer_bytes);
    void* const record = allocate(layout.record_bytes);
    const TensorView parent = item.tree ? tensor(DType::i32, {B, T}) : TensorView{};
    if (window != nullptr) {
      *window = window_at(layout, layer, record, device);
      out.window = window, out.parent = parent;
    }
  }
  return out;
}

}  // namespace

std::string_view name_of(Op op) noexcept { return op == Op::decode ? "decode" : op == Op::verify ? "verify" : "prefill"; }

std::string_view name_of(Mode mode) noexcept {
  switch (mode) {
    case Mode::update:
      return "update";
    case Mode::snapshots:
      return "snapshots";
    case Mode::read_only:
      return "read-only";
    case Mode::token_slots:
      return "token-slots";
  }
  return {};
}

Config Case::config() const {
  Config config;
  config.q_heads = config.k_heads = q_heads;
  config.v_heads = v_heads;
  config.key_dim = key_dim;
  config.value_dim = value_dim;
  DTypes& dtypes = config.dtypes;
  dtypes.q = dtypes.k = dtypes.v = dtypes.o = dtypes.gate = dtypes.beta = dtype;
  dtypes.state = dtypes.snapshots = state_dtype;
  config.num_threads = threads;
  return config;
}

std::size_t Case::state_bytes() const {
  return static_cast<std::size_t>(batch * config().heads() * value_dim * key_dim) * size_of(state_dtype);
}

std::vector<std::int32_t> Case::longest_path() const {
  std::vector<std::int32_t> path;
  for (std::int32_t token = 0; token < tokens; token = 2 * token + 1) path.push_back(token);
  return path;
}

std::int64_t Case::stores() const { return mode == Mode::update ? 1 : mode == Mode::read_only ? 0 : tokens; }

double Case::flops() const {
  return 7.0 * static_cast<double>(batch * tokens * config().heads()) * static_cast<double>(key_dim * value_dim);
}

Arguments shapes_of(const Case& item, Device device, ReplayWindow& window) {
  alignas(256) static std::byte somewhere;  // views of memory that nobody reads; a null pointer would not pass for a tensor
  return make_arguments(
      item, device, [](std::size_t) { return &somewhere; }, &window);
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

Workload::Workload(const Case& item, Platform& platform, const Rotation& rotation, std::size_t workspace_size) : item_(item) {
  std::vector<std::size_t> sizes;  // of an instance's blocks
  for (int i = 0; i < rotation.instances; ++i) {
    windows_.push_back(std::make_unique<ReplayWindow>());
    const auto allocate = [&](std::size_t bytes) {
      if (i == 0) sizes.push_back(bytes);
      memory_.push_back(platform.allocate(bytes));
      return memory_.back().get();
    };
    instances_.push_back(make_arguments(item, platform.device(), allocate, windows_.back().get()));
  }
  for (const auto& window : windows_) window->record = windows_.front()->record;
  if (workspace_size > 0) workspace_ = platform.allocate(workspace_size);
  for (Arguments& instance : instances_) {
    instance.stream = platform.stream();
    instance.workspace = workspace_.get();
    instance.workspace_size = workspace_size;
    instance.dependent_launch = item.dependent;
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
  if (first.snapshots.defined()) fill(first.snapshots, 0, 0);
  // In a server a batch's slots lie in no order.
  std::mt19937 random(1);
  const TensorView& given = first.read_slots.defined() ? first.read_slots : first.token_slots;
  std::vector<std::int32_t> slots(static_cast<std::size_t>(given.elements()));
  std::iota(slots.begin(), slots.end(), 0);
  if (!item.ordered) std::shuffle(slots.begin(), slots.end(), random);
  platform.copy_from_host(given.data, slots.data(), slots.size() * sizeof slots[0]);
  if (first.accepted.defined()) {
    std::vector<std::int32_t> accepted(static_cast<std::size_t>(item.batch));
    for (std::int32_t& count : accepted)
      count = std::uniform_int_distribution<std::int32_t>(1, static_cast<std::int32_t>(item.tokens))(random);
    platform.copy_from_host(first.accepted.data, accepted.data(), accepted.size() * sizeof accepted[0]);
  }
  if (item.window > 0) start_windows(platform);

  // The times do not depend on the numbers, so the other instances are copies.
  for (std::size_t block = sizes.size(); block < memory_.size(); ++block) {
    const std::size_t original = block % sizes.size();
    platform.copy(memory_[block].get(), memory_[original].get(), sizes[original], item.threads);
  }
}

Traffic Workload::traffic(const Arguments& arguments) const {
  Traffic out;
  out.read = out.write = arguments.state.data;
  if (arguments.snapshots.defined()) out.write = arguments.snapshots.data;
  out.bytes = item_.state_bytes();
  out.copies = item_.stores();
  return out;
}

CallTraffic Workload::call_traffic(const Arguments& arguments) const {
  constexpr std::size_t vector = 16;
  const auto vectors = [](std::int64_t elements, DType dtype) {
    return static_cast<int>(static_cast<std::size_t>(elements) * size_of(dtype) / vector);
  };
  const auto index = [](const TensorView& view) { return static_cast<const std::int32_t*>(view.data); };
  CallTraffic out;
  if (item_.v_heads < item_.q_heads) return out;  // heads that share their v
  out.rows = item_.batch, out.heads = item_.v_heads, out.key_heads = item_.q_heads;
  out.key_group = static_cast<int>(out.heads / out.key_heads);
  out.head_vectors = vectors(item_.key_dim * item_.value_dim, item_.state_dtype);
  out.tokens = static_cast<int>(item_.tokens), out.stores = static_cast<int>(item_.stores());
  out.state = arguments.state.data, out.snapshots = arguments.snapshots.data;
  out.slots = index(arguments.read_slots.defined() ? arguments.read_slots : arguments.token_slots);
  out.accepted = index(arguments.accepted);
  out.q = arguments.q.data, out.k = arguments.k.data, out.v = arguments.v.data, out.o = arguments.o.data;
  out.a = arguments.a.data, out.b = arguments.b.data;
  out.key_vectors = vectors(item_.key_dim, item_.dtype), out.value_vectors = vectors(item_.value_dim, item_.dtype);
  out.gate_bytes = static_cast<int>(size_of(item_.dtype));
  if (const ReplayWindow* window = arguments.window; window != nullptr) {
    out.length = index(window->record.length);
    out.keys = window->keys.data, out.corrections = window->corrections.data, out.decays = window->decays.data;
    out.capacity = static_cast<int>(item_.window), out.ring = static_cast<int>(window->record.order.shape[1]);
    out.entry_key_vectors = vectors(item_.key_dim, item_.entries);
    out.entry_value_vectors = vectors(item_.value_dim, item_.entries);
  }
  return out;
}

/// Sequences of a server are folded at different steps: so their windows start at all lengths. Instances stand for the layers
/// of a model, which share the lengths.
void Workload::start_windows(Platform& platform) {
  const ReplayWindow& window = *windows_.front();
  platform.fill(window.keys, {101, 0, 1 / std::sqrt(static_cast<float>(item_.key_dim))}, item_.threads);
  platform.fill(window.corrections, {102, 0, 0.5f}, item_.threads);
  platform.fill(window.decays, {103, -0.01f, 0.001f}, item_.threads);
  std::vector<std::int32_t> lengths, order;
  for (std::int64_t n = 0; n < item_.batch; ++n) {
    lengths.push_back(static_cast<std::int32_t>(n * item_.accepted % item_.window));
    for (std::int64_t i = 0; i < window.record.order.shape[1]; ++i) order.push_back(static_cast<std::int32_t>(i));
  }
  platform.copy_from_host(window.record.length.data, lengths.data(), lengths.size() * sizeof lengths[0]);
  platform.copy_from_host(window.record.order.data, order.data(), order.size() * sizeof order[0]);
  // The same for each sequence.
  const auto for_all = [&](const std::vector<std::int32_t>& of_one) {
    std::vector<std::int32_t> all;
    for (std::int64_t n = 0; n < item_.batch; ++n) all.insert(all.end(), of_one.begin(), of_one.end());
    return all;
  };
  const auto place = [&](std::shared_ptr<void>& memory, const std::vector<std::int32_t>& numbers) {
    memory = platform.allocate(numbers.size() * sizeof numbers[0]);
    platform.copy_from_host(memory.get(), numbers.data(), numbers.size() * sizeof numbers[0]);
    return memory.get();
  };
  accepted_ = make_view(place(accepted_memory_, for_all({static_cast<std::int32_t>(item_.accepted)})), DType::i32,
                        std::array{item_.batch}, {}, platform.device());
  if (!item_.tree) return;
  std::vector<std::int32_t> parents{-1};
  for (std::int32_t t = 1; t < item_.tokens; ++t) parents.push_back((t - 1) / 2);
  const std::vector<std::int32_t> all_parents = for_all(parents), path = item_.longest_path();
  platform.copy_from_host(instances_.front().parent.data, all_parents.data(), all_parents.size() * sizeof all_parents[0]);
  path_ = make_view(place(path_memory_, for_all(path)), DType::i32,
                    std::array{item_.batch, static_cast<std::int64_t>(path.size())}, {}, platform.device());
}

AcceptArguments Workload::accept(const Arguments& arguments) const {
  AcceptArguments out;
  out.record = arguments.window->record;
  out.slots = arguments.read_slots;
  out.accepted = accepted_;
  out.path = path_;
  out.tokens = arguments.q.shape[1];
  out.stream = arguments.stream;
  return out;
}

const Arguments& Workload::next() {
  position_ = (position_ + 1) % instances_.size();
  return instances_[position_];
}

}  // namespace gatedelta::bench
