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
    case FaultKind::none:
      break;
  }
  return "a kernel left an unknown fault";
}

}  // namespace gatedelta
