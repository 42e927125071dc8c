// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "gatedelta/backend.hpp"

namespace gatedelta {

/// One sequence of a call on host memory, its index tensors resolved.
struct HostRow {
  std::int64_t batch = 0;        ///< index into dimension 0 of q, k, v, o and the gates
  std::int64_t first_token = 0;  ///< index into their dimension 1
  std::int64_t tokens = 0;
  bool padding = false;
  const TensorView* source = nullptr;  ///< [slots,H,V,K]; null: the zero state
  std::int64_t source_slot = 0;
  std::int64_t final_slot = -1;  ///< of state_write; -1: not stored
  std::int64_t length = 0;       ///< P, with a window
  bool fold = false;             ///< with a window: its entries go into the checkpoint
};

/// The rows of a call, with every slot checked: what all backends on host memory start from. The constructor throws before
/// anything is touched. Rows read the pool as it was before the call: where one row reads a slot that another one
/// writes, the state is copied aside first.
class HostRows {
 public:
  explicit HostRows(const Call& call);

  std::span<const HostRow> rows() const { return rows_; }
  /// The slot that gets row `row`'s state after its token `token`, or -1.
  std::int64_t token_slot(std::int64_t row, std::int64_t token) const;
  /// Writes zeros to the outputs of padding rows and of tokens outside every sequence.
  void zero_padding() const;

 private:
  void find_sequences();
  void find_sources();
  void find_stores();
  void find_windows();

  const Call& call_;
  std::vector<HostRow> rows_;
  struct Gap {
    std::int64_t begin, end;
  };
  std::vector<Gap> gaps_;  // tokens of the one batch row that belong to no sequence
  TensorView staged_;
  std::vector<std::byte> staged_memory_;
};

/// -1 for padding; throws for a slot outside the pool.
std::int64_t checked_slot(const char* name, std::int64_t slot, std::int64_t null_slot, std::int64_t slots, std::int64_t row);

/// Element `i` (or `i, j`) of an index tensor, i32 or i64.
std::int64_t index_at(const TensorView& tensor, std::int64_t i, std::int64_t j = 0);

/// Runs a commit whose tensors are host memory: checks all, then copies with the conversion that the dtypes ask for.
void commit_on_host(const Config& config, const CommitArguments& arguments);

}  // namespace gatedelta
