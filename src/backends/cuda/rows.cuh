// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "backends/cuda/elements.cuh"

// What core/host_rows.hpp is for host memory: the index tensors of a call resolved, by each block for its own row.
namespace gatedelta::cuda {

/// Keeps the first fault since the last check. Inline: around a call, all that is in registers would have to be saved.
static __device__ __forceinline__ void record(Fault* fault, FaultKind kind, std::int64_t row, std::int64_t value,
                                              std::int64_t limit) {
  if (atomicCAS(&fault->kind, 0, static_cast<int>(kind)) != 0) return;
  fault->row = row;
  fault->value = value;
  fault->limit = limit;
}

/// Behind this, what the kernel before wrote is there. Only then may the next one begin: so slots and states, which that may
/// read before it waits itself, are there unless this kernel writes them.
template <class P>
__device__ __forceinline__ void wait_for_inputs(const P& p) {
  if (p.dependent) cudaGridDependencySynchronize();
  if (p.early) cudaTriggerProgrammaticLaunchCompletion();
}

struct Row {
  std::int64_t batch = 0, first_token = 0, tokens = 0;
  std::int64_t source = 0;  ///< slot; -1: padding
  std::int64_t final_slot = -1;
};

/// All entries of cu_seqlens ascend within 0..tokens. For all threads of a block together; records the fault.
template <class P>
__device__ bool sequences_are_good(const P& p) {
  bool bad = false;
  for (std::int64_t i = threadIdx.x; i <= p.rows; i += blockDim.x) {
    const std::int64_t begin = i == 0 ? 0 : index_at(p.cu_seqlens, i - 1), end = index_at(p.cu_seqlens, i);
    if (end >= begin && end <= p.tokens) continue;
    bad = true;
    record(p.fault, FaultKind::cu_seqlens, i, end, p.tokens);
  }
  return !__syncthreads_or(bad);
}

/// The block's slice of the outputs of some tokens.
template <class P>
__device__ void zero_outputs(const P& p, std::int64_t batch, std::int64_t begin, std::int64_t end, unsigned h,
                             std::int64_t first_row, int rows) {
  for (std::int64_t e = threadIdx.x; e < (end - begin) * rows; e += blockDim.x)
    store_at(p.o, offset_of(p.o, batch, begin + e / rows, h, first_row + e % rows), 0.0f);
}

/// For all threads of a block together, which has the values first_value... of one head. False: there is nothing left to do,
/// since the sequences make no sense or the block is one of those behind the last row, which take the tokens of no sequence.
template <class P>
__device__ bool has_row(const P& p, unsigned n, unsigned h, std::int64_t first_value, int values) {
  if (p.cu_seqlens.data == nullptr) return true;
  const bool good = sequences_are_good(p);
  if (n == p.rows) {
    zero_outputs(p, 0, 0, good ? index_at(p.cu_seqlens, 0) : p.tokens, h, first_value, values);
    if (good) zero_outputs(p, 0, index_at(p.cu_seqlens, p.rows), p.tokens, h, first_value, values);
  }
  return n < p.rows && good;
}

/// -1: padding. -2: a fault, which is recorded.
template <class P>
__device__ std::int64_t checked_slot(const P& p, FaultKind kind, std::int64_t slot, unsigned row) {
  if (slot <= p.null_slot) return -1;
  if (slot >= 0 && slot < p.slots) [[likely]]
    return slot;
  record(p.fault, kind, row, slot, p.slots);
  return -2;
}

/// What says which slot row n reads, on its way from memory. `common`: there are neither token_slots nor accepted.
template <bool common = false>
struct SourceIndex {
  RawIndex raw;

  template <class P>
  __device__ void fetch(const P& p, unsigned n) {
    if (!common && p.accepted.data != nullptr)
      raw.fetch(p.accepted, n);
    else
      raw.fetch(p.read_slots, n);
  }
  /// The slot, -1 for padding, -2 after a fault.
  template <class P>
  __device__ std::int64_t slot(const P& p, unsigned n) const {
    if (!common && p.accepted.data != nullptr) {
      const std::int64_t count = raw.value(p.accepted.dtype);
      if (count < 1 || count > p.token_room) {
        record(p.fault, FaultKind::accepted, n, count, p.token_room);
        return -2;
      }
      return checked_slot(p, FaultKind::token_slots, index_at(p.token_slots, n, count - 1), n);
    }
    if (p.read_slots.data != nullptr) return checked_slot(p, FaultKind::read_slots, raw.value(p.read_slots.dtype), n);
    return n;
  }
};
template <class P>
__device__ std::int64_t source_slot(const P& p, unsigned n) {
  SourceIndex<> index;
  index.fetch(p, n);
  return index.slot(p, n);
}

/// The slots of a row without cu_seqlens and with at most 32 tokens, for a warp. A row with a fault anywhere is padding. The
/// fast kernels have less than 2^31 slots.
template <bool common = false>
struct RowSlots {
  std::int32_t source = -1, final_slot = -1;
  std::int32_t token_slot = -1;  ///< of token `lane`, or of the last one; -1 also where a later state goes to the same slot

  template <class P>
  __device__ void fetch(const P& p, unsigned n, unsigned lane) {
    index_.fetch(p, n);
    if (p.store_final && p.write_slots.data != nullptr) write_.fetch(p.write_slots, n);
    if (!common && p.store_tokens) token_.fetch(p.token_slots, n, min(lane, static_cast<unsigned>(p.tokens) - 1));
  }
  template <class P>
  __device__ void resolve(const P& p, unsigned n) {
    source = static_cast<std::int32_t>(index_.slot(p, n));
    if (source < 0) return;
    if (p.store_final)
      final_slot =
          p.write_slots.data == nullptr
              ? source
              : static_cast<std::int32_t>(checked_slot(p, FaultKind::write_slots, write_.value(p.write_slots.dtype), n));
    bool bad = final_slot == -2;
    if (!common && p.store_tokens) {
      token_slot = static_cast<std::int32_t>(checked_slot(p, FaultKind::token_slots, token_.value(p.token_slots.dtype), n));
      bad = __any_sync(0xffffffffu, bad || token_slot == -2);
      // Of several states for one slot the last one stays there, whatever the order in which they are stored.
      const int lane = static_cast<int>(threadIdx.x % 32);
      const unsigned same = __match_any_sync(0xffffffffu, token_slot);
      if (lane + 1 < p.tokens && (same >> lane > 1 || token_slot == final_slot)) token_slot = -1;
    }
    if (bad) source = final_slot = token_slot = -1;
  }

 private:
  SourceIndex<common> index_;
  RawIndex write_, token_;
};

/// For all threads of a block together. A row with a fault anywhere is padding. cu_seqlens must be good.
/// `source` is what source_slot() said.
template <class P>
__device__ Row resolve(const P& p, unsigned n, std::int64_t source) {
  Row row;
  row.batch = n;
  row.tokens = p.tokens;
  bool bad = false;
  if (p.cu_seqlens.data != nullptr) {
    row.batch = 0;
    row.first_token = index_at(p.cu_seqlens, n);
    row.tokens = index_at(p.cu_seqlens, n + 1) - row.first_token;
    const auto check_room = [&](FaultKind kind, const auto& tensor, std::int64_t room) {
      if (tensor.data == nullptr || row.tokens <= room) return;
      bad = true;
      record(p.fault, kind, n, row.tokens, room);
    };
    check_room(FaultKind::token_room, p.token_slots, p.token_room);
    check_room(FaultKind::snapshot_room, p.snapshots, p.snapshot_room);
  }
  row.source = bad ? -1 : source;
  if (row.source >= 0 && p.store_final) {
    row.final_slot = row.source;
    if (p.write_slots.data != nullptr) row.final_slot = checked_slot(p, FaultKind::write_slots, index_at(p.write_slots, n), n);
    bad = row.final_slot == -2;
  }
  if (row.source >= 0 && p.store_tokens)
    for (std::int64_t t = threadIdx.x; t < row.tokens; t += blockDim.x)
      bad |= checked_slot(p, FaultKind::token_slots, index_at(p.token_slots, n, t), n) == -2;
  if (__syncthreads_or(bad) || row.source < 0) row.source = row.final_slot = -1;
  return row;
}

}  // namespace gatedelta::cuda
