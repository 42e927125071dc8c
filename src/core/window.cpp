// SPDX-License-Identifier: Apache-2.0
// The layout of replay windows, and what all backends on host memory do with them.
#include "gatedelta/window.hpp"

#include <algorithm>
#include <bitset>
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "core/elements.hpp"
#include "core/host_rows.hpp"
#include "core/host_window.hpp"
#include "gatedelta/error.hpp"

namespace gatedelta {
namespace {

[[noreturn]] void fail(const std::string& message) { throw Error(ErrorCode::invalid_argument, message); }

template <class Shape>
std::size_t padded_bytes(const Shape& shape, DType dtype) {
  std::size_t bytes = size_of(dtype);
  for (const std::int64_t size : shape) bytes *= static_cast<std::size_t>(size);
  return (bytes + 255) / 256 * 256;
}

void set_order(const WindowRecord& record, std::int64_t slot, std::int64_t entry, std::int64_t place) {
  static_cast<std::int32_t*>(record.order.data)[slot * record.order.strides[0] + entry * record.order.strides[1]] =
      static_cast<std::int32_t>(place);
}

void set_length(const WindowRecord& record, std::int64_t slot, std::int64_t length) {
  static_cast<std::int32_t*>(record.length.data)[slot * record.length.strides[0]] = static_cast<std::int32_t>(length);
}

/// The slots of a call, -1 for padding. Throws for one that is out of range or, if `unique`, there twice.
std::vector<std::int64_t> checked_slots(const char* name, const TensorView& slots, const Config& config, std::int64_t pool,
                                        bool unique) {
  std::vector<std::int64_t> out;
  std::vector<bool> seen(static_cast<std::size_t>(pool), false);
  for (std::int64_t n = 0; n < slots.shape[0]; ++n) {
    const std::int64_t slot = checked_slot(name, index_at(slots, n), config.null_slot, pool, n);
    if (slot >= 0 && unique) {
      if (seen[slot]) fail(std::string(name) + ": row " + std::to_string(n) + " has slot " + std::to_string(slot) + " again");
      seen[slot] = true;
    }
    out.push_back(slot);
  }
  return out;
}

/// What a row of accept() does.
struct Acceptance {
  std::int64_t slot, length, tokens, accepted;
};

Acceptance checked_acceptance(const AcceptArguments& in, std::int64_t slot, std::int64_t row) {
  const WindowRecord& record = in.record;
  Acceptance out{slot, checked_length(record, slot, row), in.tokens, index_at(in.accepted, row)};
  const std::string name = "row " + std::to_string(row);
  if (in.cu_seqlens.defined()) {
    const std::int64_t most = std::min(record.capacity, record.order.shape[1] - record.capacity);
    out.tokens = index_at(in.cu_seqlens, row + 1) - index_at(in.cu_seqlens, row);
    if (out.tokens < 0 || out.tokens > most)
      fail("cu_seqlens: sequence " + std::to_string(row) + " has " + std::to_string(out.tokens) + " tokens, expected 0.." +
           std::to_string(most));
  }
  if (out.accepted < 0 || out.accepted > out.tokens)
    fail("accepted: " + name + " has " + std::to_string(out.accepted) + ", expected 0.." + std::to_string(out.tokens));
  if (!in.path.defined()) return out;
  if (in.path.shape[1] < out.accepted)
    fail("path: " + name + " has " + std::to_string(out.accepted) + " accepted tokens, but there is room for " +
         std::to_string(in.path.shape[1]));
  std::int64_t last = -1;
  for (std::int64_t i = 0; i < out.accepted; ++i) {
    const std::int64_t token = index_at(in.path, row, i);
    if (token <= last || token >= out.tokens)
      fail("path: " + name + " has token " + std::to_string(token) + " at " + std::to_string(i) + ", expected " +
           std::to_string(last + 1) + ".." + std::to_string(out.tokens - 1));
    last = token;
  }
  return out;
}

void accept_row(const AcceptArguments& in, const Acceptance& what, std::int64_t row) {
  const WindowRecord& record = in.record;
  const std::int64_t ring = record.order.shape[1], P = what.length;
  std::vector<std::int64_t> order;
  for (std::int64_t i = 0; i < ring; ++i) order.push_back(place_of(record, what.slot, i));
  if (in.path.defined()) {  // the path comes first, the rejected tokens' places are free after it
    std::vector<bool> kept(static_cast<std::size_t>(what.tokens), false);
    std::vector<std::int64_t> sorted;
    for (std::int64_t i = 0; i < what.accepted; ++i) {
      const std::int64_t token = index_at(in.path, row, i);
      kept[token] = true;
      sorted.push_back(order[P + token]);
    }
    for (std::int64_t t = 0; t < what.tokens; ++t)
      if (!kept[t]) sorted.push_back(order[P + t]);
    std::copy(sorted.begin(), sorted.end(), order.begin() + P);
  }
  const bool folded = P + what.tokens > record.capacity;
  if (folded) std::rotate(order.begin(), order.begin() + P, order.end());
  for (std::int64_t i = 0; i < ring; ++i) set_order(record, what.slot, i, order[i]);
  set_length(record, what.slot, (folded ? 0 : P) + what.accepted);
}

/// The state of one head that checkpoint and entries stand for, [V,K].
void replay_head(const FoldArguments& in, std::int64_t slot, std::int64_t h, std::vector<double>& S) {
  const WindowRecord& record = in.window.record;
  const std::int64_t V = in.state.shape[2], K = in.state.shape[3], length = index_at(record.length, slot);
  for (std::int64_t v = 0; v < V; ++v)
    for (std::int64_t i = 0; i < K; ++i) S[v * K + i] = load(in.state, slot, h, v, i);
  for (std::int64_t j = 0; j < length; ++j) replay_entry(in.window, slot, h, place_of(record, slot, j), S);
}

/// Copies slot `from` to slot `to`, element by element as strides may be anything.
void copy_slot(const TensorView& tensor, std::int64_t from, std::int64_t to) {
  const std::size_t element = size_of(tensor.dtype);
  const auto size = [&](int dim) { return dim < tensor.rank ? tensor.shape[dim] : 1; };
  const auto step = [&](int dim) { return dim < tensor.rank ? tensor.strides[dim] : 0; };
  auto* data = static_cast<char*>(tensor.data);
  for (std::int64_t i = 0; i < size(1); ++i)
    for (std::int64_t j = 0; j < size(2); ++j)
      for (std::int64_t k = 0; k < size(3); ++k) {
        const std::int64_t offset = i * step(1) + j * step(2) + k * step(3);
        std::memcpy(data + (to * step(0) + offset) * static_cast<std::int64_t>(element),
                    data + (from * step(0) + offset) * static_cast<std::int64_t>(element), element);
      }
}

}  // namespace

WindowLayout window_layout(const Config& config, std::int64_t slots, std::int64_t capacity, DType entries,
                           std::int64_t max_tokens) {
  validate(config);
  if (slots < 0) fail("slots: expected at least 0, got " + std::to_string(slots));
  if (capacity < min_window || capacity > max_window)
    fail("capacity: expected " + std::to_string(min_window) + ".." + std::to_string(max_window) + ", got " +
         std::to_string(capacity));
  if (entries != DType::f32 && entries != DType::bf16)
    fail("entries: expected f32 or bf16, got " + std::string(name_of(entries)));
  if (max_tokens < 0 || max_tokens > capacity)
    fail("max_tokens: expected 0.." + std::to_string(capacity) + ", got " + std::to_string(max_tokens));
  WindowLayout out;
  out.capacity = capacity;
  out.ring = capacity + (max_tokens == 0 ? capacity : max_tokens);
  out.entries = entries;
  out.keys = {slots, config.k_heads, out.ring, config.key_dim};
  out.corrections = {slots, config.heads(), out.ring, config.value_dim};
  out.decays = {slots, config.heads(), out.ring};
  out.order = {slots, out.ring};
  out.layer_bytes =
      padded_bytes(out.keys, entries) + padded_bytes(out.corrections, entries) + padded_bytes(out.decays, DType::f32);
  out.record_bytes = padded_bytes(std::array{slots}, DType::i32) + padded_bytes(out.order, DType::i32);
  return out;
}

ReplayWindow window_at(const WindowLayout& layout, void* layer, void* record, Device device) {
  ReplayWindow out;
  auto* next = static_cast<char*>(layer);
  const auto place = [&](const auto& shape, DType dtype) {
    const TensorView view = make_view(next, dtype, shape, {}, device);
    next += padded_bytes(shape, dtype);
    return view;
  };
  if (layer != nullptr) {
    out.keys = place(layout.keys, layout.entries);
    out.corrections = place(layout.corrections, layout.entries);
    out.decays = place(layout.decays, DType::f32);
  }
  next = static_cast<char*>(record);
  out.record.capacity = layout.capacity;
  out.record.length = place(std::array{layout.order[0]}, DType::i32);
  out.record.order = place(layout.order, DType::i32);
  return out;
}

std::int64_t place_of(const WindowRecord& record, std::int64_t slot, std::int64_t entry) {
  return index_at(record.order, slot, entry);
}

void replay_entry(const ReplayWindow& window, std::int64_t slot, std::int64_t h, std::int64_t place, std::vector<double>& S) {
  const std::int64_t V = window.corrections.shape[3], K = window.keys.shape[3];
  const std::int64_t hk = h / (window.corrections.shape[1] / window.keys.shape[1]);
  const double decay = std::exp(load(window.decays, slot, h, place));
  for (std::int64_t v = 0; v < V; ++v) {
    const double u = load(window.corrections, slot, h, place, v);
    for (std::int64_t i = 0; i < K; ++i) S[v * K + i] = decay * S[v * K + i] + u * load(window.keys, slot, hk, place, i);
  }
}

std::int64_t checked_length(const WindowRecord& record, std::int64_t slot, std::int64_t row) {
  const std::int64_t length = index_at(record.length, slot), ring = record.order.shape[1];
  const std::string name = "row " + std::to_string(row) + " (slot " + std::to_string(slot) + ")";
  if (length < 0 || length > record.capacity)
    fail("window.length: " + name + " has " + std::to_string(length) + ", expected 0.." + std::to_string(record.capacity));
  std::bitset<2 * max_window> seen;
  for (std::int64_t i = 0; i < ring; ++i) {
    const std::int64_t place = place_of(record, slot, i);
    if (place < 0 || place >= ring || seen[static_cast<std::size_t>(place)])
      fail("window.order: " + name + " has " + std::to_string(place) + " at " + std::to_string(i) +
           ", expected a permutation of 0.." + std::to_string(ring - 1) + " (reset() makes one)");
    seen.set(static_cast<std::size_t>(place));
  }
  return length;
}

void accept_on_host(const Config& config, const AcceptArguments& in) {
  std::vector<Acceptance> rows;
  std::vector<std::int64_t> slots;
  if (in.slots.defined()) slots = checked_slots("slots", in.slots, config, in.record.length.shape[0], true);
  for (std::int64_t n = 0; n < in.accepted.shape[0]; ++n) {
    const std::int64_t slot = in.slots.defined() ? slots[n] : n;
    rows.push_back(slot < 0 ? Acceptance{-1, 0, 0, 0} : checked_acceptance(in, slot, n));
  }
  for (std::size_t n = 0; n < rows.size(); ++n)
    if (rows[n].slot >= 0) accept_row(in, rows[n], static_cast<std::int64_t>(n));
}

void reset_on_host(const Config& config, const ResetArguments& in) {
  std::vector<std::int64_t> slots;
  if (in.slots.defined())
    slots = checked_slots("slots", in.slots, config, in.record.length.shape[0], false);
  else
    for (std::int64_t slot = 0; slot < in.record.length.shape[0]; ++slot) slots.push_back(slot);
  for (const std::int64_t slot : slots) {
    if (slot < 0) continue;
    set_length(in.record, slot, 0);
    for (std::int64_t i = 0; i < in.record.order.shape[1]; ++i) set_order(in.record, slot, i, i);
  }
}

void fold_on_host(const Config& config, const FoldArguments& in) {
  const bool in_place = !in.out.defined();
  const std::vector<std::int64_t> slots = checked_slots("slots", in.slots, config, in.state.shape[0], in_place);
  for (std::size_t n = 0; n < slots.size(); ++n)
    if (slots[n] >= 0) checked_length(in.window.record, slots[n], static_cast<std::int64_t>(n));
  const TensorView& to = in_place ? in.state : in.out;
  const std::int64_t H = config.heads(), V = config.value_dim, K = config.key_dim;
  std::vector<double> S(static_cast<std::size_t>(V * K));
  for (std::size_t n = 0; n < slots.size(); ++n) {
    if (slots[n] < 0 && in_place) continue;
    for (std::int64_t h = 0; h < H; ++h) {
      if (slots[n] < 0)
        std::fill(S.begin(), S.end(), 0.0);
      else
        replay_head(in, slots[n], h, S);
      for (std::int64_t v = 0; v < V; ++v)
        for (std::int64_t i = 0; i < K; ++i)
          store(to, S[v * K + i], in_place ? slots[n] : static_cast<std::int64_t>(n), h, v, i);
    }
  }
}

void copy_on_host(const Config& config, const ForkArguments& in) {
  const std::int64_t pool = in.window.record.length.shape[0];
  const std::vector<std::int64_t> from = checked_slots("from", in.from, config, pool, false),
                                  to = checked_slots("to", in.to, config, pool, true);
  for (std::size_t n = 0; n < to.size(); ++n)
    for (std::size_t m = 0; m < from.size(); ++m)
      if (to[n] >= 0 && to[n] == from[m])
        fail("to: row " + std::to_string(n) + " has slot " + std::to_string(to[n]) + ", which row " + std::to_string(m) +
             " reads");
  for (std::size_t n = 0; n < to.size(); ++n) {
    if (to[n] < 0 || from[n] < 0) continue;
    if (!in.state.defined()) {
      copy_slot(in.window.record.length, from[n], to[n]);
      copy_slot(in.window.record.order, from[n], to[n]);
      continue;
    }
    for (const TensorView* tensor : {&in.state, &in.window.keys, &in.window.corrections, &in.window.decays})
      copy_slot(*tensor, from[n], to[n]);
  }
}

}  // namespace gatedelta
