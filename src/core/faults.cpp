// SPDX-License-Identifier: Apache-2.0
#include "core/faults.hpp"

namespace gatedelta {

std::string text(const Fault& fault) {
  const std::string row = std::to_string(fault.row), value = std::to_string(fault.value), limit = std::to_string(fault.limit);
  const auto slot = [&](const char* name) {
    return std::string(name) + ": row " + row + " has slot " + value + ", the pool has " + limit + " slots";
  };
  const auto room = [&](const char* name) {
    return std::string(name) + ": sequence " + row + " has " + value + " tokens, but there is room for " + limit;
  };
  switch (static_cast<FaultKind>(fault.kind)) {
    case FaultKind::read_slots:
      return slot("read_slots");
    case FaultKind::write_slots:
      return slot("write_slots");
    case FaultKind::token_slots:
      return slot("token_slots");
    case FaultKind::accepted:
      return "accepted: row " + row + " has " + value + ", expected 1.." + limit;
    case FaultKind::cu_seqlens:
      return "cu_seqlens: entry " + row + " is " + value + ", expected ascending entries in 0.." + limit;
    case FaultKind::token_room:
      return room("token_slots");
    case FaultKind::snapshot_room:
      return room("snapshots");
    case FaultKind::slots:
      return slot("slots");
    case FaultKind::slots_again:
      return "slots: row " + row + " has slot " + value + " again";
    case FaultKind::from:
      return slot("from");
    case FaultKind::to:
      return slot("to");
    case FaultKind::to_again:
      return "to: row " + row + " has slot " + value + " again";
    case FaultKind::to_is_read:
      return "to: row " + row + " has slot " + value + ", which row " + limit + " reads";
    case FaultKind::length:
      return "window.length: row " + row + " has " + value + ", expected 0.." + limit;
    case FaultKind::order:
      return "window.order: row " + row + " has " + value + " where a permutation of 0.." + limit +
             " was expected (reset() makes one)";
    case FaultKind::parent:
      return "parent: row " + row + " has " + value + ", expected -1.." + limit;
    case FaultKind::window_room:
      return "cu_seqlens: sequence " + row + " has " + value + " tokens, expected 0.." + limit + " with this window";
    case FaultKind::kept:
      return "accepted: row " + row + " has " + value + ", expected 0.." + limit;
    case FaultKind::path:
      return "path: row " + row + " has token " + value + " where ascending ones below " + limit + " were expected";
    case FaultKind::none:
      break;
  }
  return "a kernel left an unknown fault";
}

}  // namespace gatedelta
