// SPDX-License-Identifier: Apache-2.0
// The kernels of the serving form with a replay window, of one state dtype: compiled once for each GATEDELTA_STATE.
#include "backends/cuda/plan.hpp"
#include "backends/cuda/replay.cuh"
#include "backends/cuda/state_dtype.cuh"

namespace gatedelta::cuda {
namespace {

template <class Entry, int key_dim, bool value_last, int token_tile, bool common, bool one_group>
FastKernel describe() {
  void (*const kernel)(ReplayParams<FastParams>) =
      replay_kernel<State, Entry, key_dim, value_last, token_tile, common, one_group>;
  using Rows = ReplayRows<State, key_dim, value_last>;
  using Notes = HeadNotes<ReplayTokens<Entry, key_dim, token_tile>, Entry, key_dim, token_tile>;
  return {.function = reinterpret_cast<const void*>(kernel),
          .warp_rows = Rows::rows,
          .bytes = replay_stages * Rows::bytes + Rows::gap_bytes,
          .group_bytes = replay_stages * Corrections<Entry>::bytes + (one_group ? 0 : Corrections<Entry>::offset_bytes),
          .head_bytes = Notes::groups_at,
          .head_group_bytes = Notes::group_bytes,
          .head_value_bytes = Notes::value_bytes,
          .path_bytes = Notes::path_bytes,
          .path_group_bytes = Notes::path_group_bytes,
          .team_bytes = Notes::team_bytes,
          .team_group_bytes = Notes::team_group_bytes};
}

template <class Entry, int key_dim, bool value_last, bool common, bool one_group>
FastKernel find(const Plan& plan) {
  switch (plan.token_tile) {
    case 1:
      return describe<Entry, key_dim, value_last, 1, common, one_group>();
    case 4:
      return describe<Entry, key_dim, value_last, 4, common, one_group>();
    default:
      return describe<Entry, key_dim, value_last, 8, common, one_group>();
  }
}

template <int key_dim>
FastKernel find(const Plan& plan) {
  if (plan.entries == DType::f32)
    return plan.value_last ? find<float, key_dim, true, false, false>(plan) : find<float, key_dim, false, false, false>(plan);
  if (plan.value_last) return find<__nv_bfloat16, key_dim, true, false, false>(plan);
  if (!plan.common) return find<__nv_bfloat16, key_dim, false, false, false>(plan);
  return plan.one_group ? find<__nv_bfloat16, key_dim, false, true, true>(plan)
                        : find<__nv_bfloat16, key_dim, false, true, false>(plan);
}

}  // namespace

template <>
FastKernel replay_kernel_of<state_dtype>(const Plan& plan, std::int64_t key_dim) {
  return key_dim == 64 ? find<64>(plan) : find<128>(plan);
}

}  // namespace gatedelta::cuda
