// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <vector>

#include "gatedelta/backend.hpp"

// Replay windows on host memory: what the backends there share. Each function checks all it is given before it changes
// anything.
namespace gatedelta {

/// P of a slot. Throws unless it is 0..W and the slot's order is a permutation.
std::int64_t checked_length(const WindowRecord& record, std::int64_t slot, std::int64_t row);
/// Where entry `entry` of a slot is in its ring.
std::int64_t place_of(const WindowRecord& record, std::int64_t slot, std::int64_t entry);
/// What the entry at a place does to the state [V,K] of head `h`.
void replay_entry(const ReplayWindow& window, std::int64_t slot, std::int64_t h, std::int64_t place, std::vector<double>& S);

void accept_on_host(const Config& config, const AcceptArguments& arguments);
void reset_on_host(const Config& config, const ResetArguments& arguments);
void fold_on_host(const Config& config, const FoldArguments& arguments);
void copy_on_host(const Config& config, const ForkArguments& arguments);

}  // namespace gatedelta
