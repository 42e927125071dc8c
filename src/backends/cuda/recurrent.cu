// SPDX-License-Identifier: Apache-2.0
// The kernels for the recurrence of one state dtype: compiled once for each GATEDELTA_STATE.
#include "backends/cuda/plan.hpp"
#include "backends/cuda/recurrent.cuh"
#include "backends/cuda/state_dtype.cuh"

namespace gatedelta::cuda {
namespace {

template <int key_dim, bool value_last, bool replays, bool trees = false>
FastKernel describe() {
  using Tile = RecurrentTile<State, key_dim, value_last>;
  using Memory = RecurrentMemory<Tile, replays>;
  void (*const kernel)(RecurrentParams<replays>) = recurrent_kernel<State, key_dim, value_last, replays, trees>;
  return {.function = reinterpret_cast<const void*>(kernel),
          .warp_rows = Tile::warp_rows,
          .block_bytes = sizeof(Memory),
          .token_bytes = sizeof(typename Memory::Token),
          .tree_bytes = trees ? Memory::checkpoint_bytes : 0,
          .tokens = Tile::tokens,
          .warps = recurrent_warps};
}

template <int key_dim>
FastKernel find(const Plan& plan, bool replays) {
  if (plan.tree) return plan.value_last ? describe<key_dim, true, true, true>() : describe<key_dim, false, true, true>();
  if (replays) return plan.value_last ? describe<key_dim, true, true>() : describe<key_dim, false, true>();
  return plan.value_last ? describe<key_dim, true, false>() : describe<key_dim, false, false>();
}

}  // namespace

template <>
FastKernel recurrent_kernel_of<state_dtype>(const Plan& plan, std::int64_t key_dim, bool replays) {
  return key_dim == 64 ? find<64>(plan, replays) : key_dim == 128 ? find<128>(plan, replays) : find<256>(plan, replays);
}

}  // namespace gatedelta::cuda
