// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "backends/kokkos/params.hpp"

// What core/host_rows.hpp is for host memory: the index tensors of a call resolved, by each team for its own row.
namespace gatedelta::kokkos {

/// Keeps the first fault since the last check.
KOKKOS_INLINE_FUNCTION void record(Fault* fault, FaultKind kind, std::int64_t row, std::int64_t value, std::int64_t limit) {
  if (Kokkos::atomic_compare_exchange(&fault->kind, 0, static_cast<int>(kind)) != 0) return;
  fault->row = row;
  fault->value = value;
  fault->limit = limit;
}

/// Whether bad(i) is true for any of 0 ... count-1. For all threads of a team together, which get one answer.
template <class Predicate>
KOKKOS_INLINE_FUNCTION bool any(const Team& team, std::int64_t count, const Predicate& bad) {
  int found = 0;
  Kokkos::parallel_reduce(
      Kokkos::TeamVectorRange(team, count), [&](const std::int64_t i, int& most) { most = bad(i) ? 1 : most; },
      Kokkos::Max<int>(found));
  return found > 0;
}

/// All entries of cu_seqlens ascend within 0..tokens; records the fault.
KOKKOS_INLINE_FUNCTION bool sequences_are_good(const Team& team, const ForwardParams& p) {
  return !any(team, p.rows + 1, [&](const std::int64_t i) {
    const std::int64_t begin = i == 0 ? 0 : index_in(p.cu_seqlens, i - 1), end = index_in(p.cu_seqlens, i);
    if (end >= begin && end <= p.tokens) return false;
    record(p.fault, FaultKind::cu_seqlens, i, end, p.tokens);
    return true;
  });
}

/// -1: padding. -2: a fault, which is recorded.
template <class Params>
KOKKOS_INLINE_FUNCTION std::int64_t checked_slot(const Params& p, FaultKind kind, std::int64_t slot, std::int64_t row) {
  if (slot <= p.null_slot) return -1;
  if (slot >= 0 && slot < p.slots) return slot;
  record(p.fault, kind, row, slot, p.slots);
  return -2;
}

/// The slot that row n reads; -1: padding, -2: a fault.
KOKKOS_INLINE_FUNCTION std::int64_t source_slot(const ForwardParams& p, std::int64_t n) {
  if (p.accepted.defined()) {
    const std::int64_t count = index_in(p.accepted, n), room = p.token_slots.shape[1];
    if (count >= 1 && count <= room) return checked_slot(p, FaultKind::token_slots, index_in(p.token_slots, n, count - 1), n);
    record(p.fault, FaultKind::accepted, n, count, room);
    return -2;
  }
  if (p.read_slots.defined()) return checked_slot(p, FaultKind::read_slots, index_in(p.read_slots, n), n);
  return n;
}

/// Row n, for all threads of a team together; its source is state_read. A row with a fault anywhere is padding. cu_seqlens must
/// be good.
KOKKOS_INLINE_FUNCTION HostRow resolve(const Team& team, const ForwardParams& p, std::int64_t n) {
  HostRow row;
  row.batch = n;
  row.tokens = p.tokens;
  bool bad = false;
  if (p.cu_seqlens.defined()) {
    row.batch = 0;
    row.first_token = index_in(p.cu_seqlens, n);
    row.tokens = index_in(p.cu_seqlens, n + 1) - row.first_token;
    const auto check_room = [&](FaultKind kind, const TensorView& tensor) {
      if (!tensor.defined() || row.tokens <= tensor.shape[1]) return;
      bad = true;
      record(p.fault, kind, n, row.tokens, tensor.shape[1]);
    };
    check_room(FaultKind::token_room, p.token_slots);
    check_room(FaultKind::snapshot_room, p.snapshots);
  }
  row.source_slot = bad ? -1 : source_slot(p, n);
  if (row.source_slot >= 0 && p.store_final) {
    row.final_slot = row.source_slot;
    if (p.write_slots.defined()) row.final_slot = checked_slot(p, FaultKind::write_slots, index_in(p.write_slots, n), n);
    bad = row.final_slot == -2;
  }
  if (row.source_slot >= 0 && p.store_tokens)
    bad = any(team, row.tokens,
              [&](const std::int64_t t) {
                return checked_slot(p, FaultKind::token_slots, index_in(p.token_slots, n, t), n) == -2;
              }) ||
          bad;
  row.padding = bad || row.source_slot < 0;
  return row;
}

}  // namespace gatedelta::kokkos
