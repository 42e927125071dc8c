// SPDX-License-Identifier: Apache-2.0
#include "core/host_rows.hpp"

#include <algorithm>
#include <string>

#include "core/elements.hpp"
#include "core/host_window.hpp"
#include "gatedelta/error.hpp"

namespace gatedelta {
namespace {

[[noreturn]] void fail(const std::string& message) { throw Error(ErrorCode::invalid_argument, message); }

std::int64_t checked_accepted(const TensorView& accepted, std::int64_t row, std::int64_t limit) {
  const std::int64_t count = index_at(accepted, row);
  if (count < 1 || count > limit)
    fail("accepted: row " + std::to_string(row) + " has " + std::to_string(count) + ", expected 1.." + std::to_string(limit));
  return count;
}

struct Store {
  std::int64_t slot, row;
  bool operator<(const Store& other) const { return slot != other.slot ? slot < other.slot : row < other.row; }
};

void check_single_writer(std::vector<Store>& stores, const char* name) {
  std::sort(stores.begin(), stores.end());
  for (std::size_t i = 1; i < stores.size(); ++i)
    if (stores[i].slot == stores[i - 1].slot && stores[i].row != stores[i - 1].row)
      fail(std::string(name) + ": rows " + std::to_string(stores[i - 1].row) + " and " + std::to_string(stores[i].row) +
           " both store to slot " + std::to_string(stores[i].slot));
}

}  // namespace

std::int64_t checked_slot(const char* name, std::int64_t slot, std::int64_t null_slot, std::int64_t slots, std::int64_t row) {
  if (slot <= null_slot) return -1;
  if (slot < 0 || slot >= slots)
    fail(std::string(name) + ": row " + std::to_string(row) + " has slot " + std::to_string(slot) + ", expected 0.." +
         std::to_string(slots - 1) + " (the pool has " + std::to_string(slots) +
         " slots) or padding <= " + std::to_string(null_slot));
  return slot;
}

std::int64_t index_at(const TensorView& tensor, std::int64_t i, std::int64_t j) {
  const std::int64_t offset = i * tensor.strides[0] + (tensor.rank > 1 ? j * tensor.strides[1] : 0);
  if (tensor.dtype == DType::i32) return static_cast<const std::int32_t*>(tensor.data)[offset];
  return static_cast<const std::int64_t*>(tensor.data)[offset];
}

HostRows::HostRows(const Call& call) : call_(call), rows_(static_cast<std::size_t>(call.problem.rows)) {
  find_sequences();
  find_sources();
  find_stores();
  if (call.problem.window) find_windows();
}

void HostRows::find_sequences() {
  const Problem& problem = call_.problem;
  const TensorView& cu = call_.arguments->cu_seqlens;
  if (!problem.variable_length) {
    for (std::int64_t n = 0; n < problem.rows; ++n) {
      rows_[n].batch = n;
      rows_[n].tokens = problem.tokens;
    }
    return;
  }
  std::int64_t end = index_at(cu, 0);
  if (end < 0) fail("cu_seqlens: entry 0 is " + std::to_string(end) + ", expected at least 0");
  if (end > 0) gaps_.push_back({0, std::min(end, problem.tokens)});
  for (std::int64_t n = 0; n < problem.rows; ++n) {
    const std::int64_t begin = end;
    end = index_at(cu, n + 1);
    if (end < begin || end > problem.tokens)
      fail("cu_seqlens: entry " + std::to_string(n + 1) + " is " + std::to_string(end) + ", expected " + std::to_string(begin) +
           ".." + std::to_string(problem.tokens));
    rows_[n].first_token = begin;
    rows_[n].tokens = end - begin;
    const auto check_room = [&](const char* name, const TensorView& tensor) {
      if (tensor.defined() && tensor.shape[1] < end - begin)
        fail(std::string(name) + ": sequence " + std::to_string(n) + " has " + std::to_string(end - begin) +
             " tokens, but there is room for " + std::to_string(tensor.shape[1]));
    };
    check_room("token_slots", call_.arguments->token_slots);
    check_room("snapshots", call_.arguments->snapshots);
  }
  if (end > problem.tokens) fail("cu_seqlens: entry 0 is beyond the tokens");
  if (end < problem.tokens) gaps_.push_back({end, problem.tokens});
}

void HostRows::find_sources() {
  const Problem& problem = call_.problem;
  const Arguments& in = *call_.arguments;
  for (std::int64_t n = 0; n < problem.rows; ++n) {
    HostRow& row = rows_[n];
    std::int64_t slot = n;
    if (problem.accepted) {
      const std::int64_t last = checked_accepted(in.accepted, n, in.token_slots.shape[1]) - 1;
      slot = checked_slot("token_slots", index_at(in.token_slots, n, last), problem.config.null_slot, problem.slots, n);
    } else if (call_.read_slots.defined()) {
      slot = checked_slot("read_slots", index_at(call_.read_slots, n), problem.config.null_slot, problem.slots, n);
    }
    row.padding = slot < 0;
    row.source_slot = slot;
    row.source = problem.initial_state && !row.padding ? &call_.state_read : nullptr;
  }
}

void HostRows::find_stores() {
  const Problem& problem = call_.problem;
  const Arguments& in = *call_.arguments;
  std::vector<Store> stores;
  for (std::int64_t n = 0; n < problem.rows; ++n) {
    HostRow& row = rows_[n];
    if (row.padding) continue;
    if (problem.store_final) {
      row.final_slot = row.source_slot;
      if (call_.write_slots.defined())
        row.final_slot =
            checked_slot("write_slots", index_at(call_.write_slots, n), problem.config.null_slot, problem.slots, n);
      if (row.final_slot >= 0) stores.push_back({row.final_slot, n});
    }
    if (problem.store_tokens)
      for (std::int64_t t = 0; t < row.tokens; ++t) {
        const std::int64_t slot =
            checked_slot("token_slots", index_at(in.token_slots, n, t), problem.config.null_slot, problem.slots, n);
        if (slot >= 0) stores.push_back({slot, n});
      }
  }
  if (!in.state.defined()) return;  // state_in and state_out: row n has its own slot n
  check_single_writer(stores,
                      problem.store_tokens ? "token_slots" : (call_.write_slots.defined() ? "write_slots" : "read_slots"));

  std::vector<std::int64_t> staged;
  for (std::int64_t n = 0; n < problem.rows; ++n) {
    if (rows_[n].padding) continue;
    const auto writer = std::lower_bound(stores.begin(), stores.end(), Store{rows_[n].source_slot, -1});
    if (writer != stores.end() && writer->slot == rows_[n].source_slot && writer->row != n) staged.push_back(n);
  }
  if (staged.empty()) return;
  const TensorView& pool = call_.state_read;
  const std::int64_t shape[] = {static_cast<std::int64_t>(staged.size()), pool.shape[1], pool.shape[2], pool.shape[3]};
  const std::size_t element = size_of(pool.dtype);
  staged_memory_.resize(static_cast<std::size_t>(shape[0] * shape[1] * shape[2] * shape[3]) * element);
  staged_ = make_view(staged_memory_.data(), pool.dtype, shape);
  for (std::int64_t i = 0; i < shape[0]; ++i) {
    HostRow& row = rows_[staged[i]];
    for (std::int64_t h = 0; h < shape[1]; ++h)
      for (std::int64_t v = 0; v < shape[2]; ++v)
        for (std::int64_t k = 0; k < shape[3]; ++k)
          std::memcpy(element_address(staged_, i, h, v, k), element_address(pool, row.source_slot, h, v, k), element);
    row.source = &staged_;
    row.source_slot = i;
  }
}

void HostRows::find_windows() {
  const Problem& problem = call_.problem;
  const WindowRecord& record = call_.arguments->window->record;
  const TensorView& parent = call_.arguments->parent;
  const std::int64_t most = std::min(record.capacity, record.order.shape[1] - record.capacity);
  std::vector<Store> writers;
  for (std::int64_t n = 0; n < problem.rows; ++n) {
    HostRow& row = rows_[n];
    if (row.padding) continue;
    writers.push_back({row.source_slot, n});
    if (row.tokens > most)
      fail("cu_seqlens: sequence " + std::to_string(n) + " has " + std::to_string(row.tokens) + " tokens, expected at most " +
           std::to_string(most) + " with this window");
    row.length = checked_length(record, row.source_slot, n);
    row.fold = row.length + row.tokens > record.capacity;
    for (std::int64_t t = 0; parent.defined() && t < row.tokens; ++t) {
      const std::int64_t p = index_at(parent, row.batch, row.first_token + t);
      if (p < -1 || p >= t)
        fail("parent: row " + std::to_string(n) + " token " + std::to_string(t) + " has " + std::to_string(p) +
             ", expected -1.." + std::to_string(t - 1));
    }
  }
  check_single_writer(writers, "read_slots");
}

std::int64_t HostRows::token_slot(std::int64_t row, std::int64_t token) const {
  if (!call_.problem.store_tokens) return -1;
  const std::int64_t slot = index_at(call_.arguments->token_slots, row, token);
  return slot <= call_.problem.config.null_slot ? -1 : slot;
}

void HostRows::zero_padding() const {
  const TensorView& o = call_.arguments->o;
  const auto zero = [&](std::int64_t batch, std::int64_t begin, std::int64_t end) {
    for (std::int64_t t = begin; t < end; ++t)
      for (std::int64_t h = 0; h < o.shape[2]; ++h)
        for (std::int64_t v = 0; v < o.shape[3]; ++v) store(o, 0.0, batch, t, h, v);
  };
  for (const HostRow& row : rows_)
    if (row.padding) zero(row.batch, row.first_token, row.first_token + row.tokens);
  for (const Gap& gap : gaps_) zero(0, gap.begin, gap.end);
}

void commit_on_host(const Config& config, const CommitArguments& in) {
  const std::int64_t rows = in.snapshots.shape[0], slots = in.state.shape[0];
  std::vector<Store> stores;
  for (std::int64_t n = 0; n < rows; ++n) {
    const std::int64_t slot = checked_slot("write_slots", index_at(in.write_slots, n), config.null_slot, slots, n);
    if (slot < 0) continue;
    checked_accepted(in.accepted, n, in.snapshots.shape[1]);
    stores.push_back({slot, n});
  }
  check_single_writer(stores, "write_slots");
  const bool same = in.snapshots.dtype == in.state.dtype;
  const std::size_t element = size_of(in.state.dtype);
  const std::int64_t blocks = static_cast<std::int64_t>(stores.size()) * config.heads();
#pragma omp parallel for schedule(static) if (blocks > 1)
  for (std::int64_t block = 0; block < blocks; ++block) {
    const Store& to = stores[static_cast<std::size_t>(block / config.heads())];
    const std::int64_t h = block % config.heads(), last = index_at(in.accepted, to.row) - 1;
    for (std::int64_t v = 0; v < config.value_dim; ++v)
      for (std::int64_t k = 0; k < config.key_dim; ++k) {
        const void* from = element_address(in.snapshots, to.row, last, h, v, k);
        void* target = element_address(in.state, to.slot, h, v, k);
        if (same)
          std::memcpy(target, from, element);
        else
          store_element(target, in.state.dtype, load_element(from, in.snapshots.dtype));
      }
  }
}

}  // namespace gatedelta
