// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>

// What kernels on a device report of the values in index tensors, which the host does not see before the call.
namespace gatedelta {

enum class FaultKind : int {
  none,
  read_slots,
  write_slots,
  token_slots,
  accepted,
  cu_seqlens,
  token_room,
  snapshot_room,
  // Of replay windows.
  slots,
  slots_again,
  from,
  to,
  to_again,
  to_is_read,
  length,
  order,
  parent,
  window_room,
  kept,
  path
};

/// The first fault since the last check on a device.
struct Fault {
  int kind = 0;         ///< a FaultKind; an int, so that it can be claimed by an atomic operation
  long long row = 0;    ///< the batch row, or the entry of cu_seqlens
  long long value = 0;  ///< what was found
  long long limit = 0;  ///< what would have been in order
};

/// The message of its error, with tensor, batch row, value and limit.
std::string text(const Fault& fault);

}  // namespace gatedelta
