// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "backends/cuda/elements.cuh"

// What core/host_rows.hpp is for host memory: the index tensors of a call resolved, by each block for its own row.
namespace gatedelta::cuda {

/// Part of the module, so each device has its own and nothing is ever allocated for it.
__device__ Fault fault_record;

__device__ inline void record(FaultKind kind, std::int64_t row, std::int64_t value, std::int64_t limit) {
  if (atomicCAS(&fault_record.kind, 0, static_cast<int>(kind)) != 0) return;
  fault_record.row = row;
  fault_record.value = value;
  fault_record.limit = limit;
}

struct Row {
  std::int64_t batch = 0, first_token = 0, tokens = 0;
  std::int64_t source = 0;  ///< slot; -1: padding
  std::int64_t final_slot = -1;
};

/// All entries of cu_seqlens ascend within 0..tokens. For all threads of a block together; records the fault.
__device__ inline bool sequences_are_good(const ForwardParams& p) {
  bool bad = false;
  for (std::int64_t i = threadIdx.x; i <= p.rows; i += blockDim.x) {
    const std::int64_t begin = i == 0 ? 0 : index_at(p.cu_seqlens, i - 1), end = index_at(p.cu_seqlens, i);
    if (end >= begin && end <= p.tokens) continue;
    bad = true;
    record(FaultKind::cu_seqlens, i, end, p.tokens);
  }
  return !__syncthreads_or(bad);
}

/// -1: padding. -2: a fault, which is recorded.
__device__ inline std::int64_t checked_slot(FaultKind kind, std::int64_t slot, std::int64_t null_slot, std::int64_t slots,
                                            std::int64_t row) {
  if (slot <= null_slot) return -1;
  if (slot >= 0 && slot < slots) return slot;
  record(kind, row, slot, slots);
  return -2;
}

/// The slot that row `n` reads, -1 for padding, -2 after a fault.
__device__ inline std::int64_t source_slot(const ForwardParams& p, std::int64_t n) {
  if (p.accepted.data != nullptr) {
    const std::int64_t count = index_at(p.accepted, n);
    if (count < 1 || count > p.token_room) {
      record(FaultKind::accepted, n, count, p.token_room);
      return -2;
    }
    return checked_slot(FaultKind::token_slots, index_at(p.token_slots, n, count - 1), p.null_slot, p.slots, n);
  }
  if (p.read_slots.data != nullptr)
    return checked_slot(FaultKind::read_slots, index_at(p.read_slots, n), p.null_slot, p.slots, n);
  return n;
}

/// For all threads of a block together. A row with a fault anywhere is padding. cu_seqlens must be good.
__device__ inline Row resolve(const ForwardParams& p, std::int64_t n) {
  Row row;
  row.batch = n;
  row.tokens = p.tokens;
  bool bad = false;
  if (p.cu_seqlens.data != nullptr) {
    row.batch = 0;
    row.first_token = index_at(p.cu_seqlens, n);
    row.tokens = index_at(p.cu_seqlens, n + 1) - row.first_token;
    const auto check_room = [&](FaultKind kind, const Strided& tensor, std::int64_t room) {
      if (tensor.data == nullptr || row.tokens <= room) return;
      bad = true;
      record(kind, n, row.tokens, room);
    };
    check_room(FaultKind::token_room, p.token_slots, p.token_room);
    check_room(FaultKind::snapshot_room, p.snapshots, p.snapshot_room);
  }
  row.source = bad ? -1 : source_slot(p, n);
  if (row.source >= 0 && p.store_final) {
    row.final_slot = row.source;
    if (p.write_slots.data != nullptr)
      row.final_slot = checked_slot(FaultKind::write_slots, index_at(p.write_slots, n), p.null_slot, p.slots, n);
    bad = row.final_slot == -2;
  }
  if (row.source >= 0 && p.store_tokens)
    for (std::int64_t t = threadIdx.x; t < row.tokens; t += blockDim.x)
      bad |= checked_slot(FaultKind::token_slots, index_at(p.token_slots, n, t), p.null_slot, p.slots, n) == -2;
  if (__syncthreads_or(bad) || row.source < 0) row.source = row.final_slot = -1;
  return row;
}

}  // namespace gatedelta::cuda
