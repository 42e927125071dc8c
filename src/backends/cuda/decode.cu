// SPDX-License-Identifier: Apache-2.0
// The decode kernels of one state dtype: compiled once for each GATEDELTA_STATE.
#include "backends/cuda/decode.cuh"
#include "backends/cuda/decode_value_last.cuh"
#include "backends/cuda/plan.hpp"
#include "backends/cuda/state_dtype.cuh"

namespace gatedelta::cuda {
namespace {

template <int key_dim, int rows, bool common>
FastKernel describe() {
  using Tile = DecodeTile<State, key_dim, rows>;
  void (*const kernel)(FastParams) = decode_kernel<State, key_dim, rows, common>;
  return {.function = reinterpret_cast<const void*>(kernel), .warp_rows = Tile::warp_rows, .bytes = DecodeRing<Tile>::bytes};
}

template <int key_dim, int lanes, bool common>
FastKernel describe_value_last() {
  using Tile = ValueLastTile<State, key_dim, lanes>;
  void (*const kernel)(FastParams) = decode_value_last_kernel<State, key_dim, lanes, common>;
  return {.function = reinterpret_cast<const void*>(kernel),
          .warp_rows = Tile::values / Tile::warps,
          .bytes = Tile::warp_bytes,
          .block_bytes = Tile::block_bytes,
          .warps = Tile::warps};
}

template <int key_dim, bool common>
FastKernel find(const Plan& plan) {
  switch (plan.shape.rows_a_lane) {
    case 2:
      return describe<key_dim, 2, common>();
    case 4:
      return describe<key_dim, 4, common>();
    case 8:
      return describe<key_dim, 8, common>();
  }
  return {};
}

template <int key_dim, bool common>
FastKernel find_value_last(const Plan& plan) {
  switch (plan.shape.value_lanes) {
    case 4:
      return describe_value_last<key_dim, 4, common>();
    case 8:
      return describe_value_last<key_dim, 8, common>();
    case 16:
      if constexpr (common) return describe_value_last<key_dim, 16, true>();
  }
  return {};
}

template <int key_dim>
FastKernel find(const Plan& plan) {
  if (plan.value_last) return plan.common ? find_value_last<key_dim, true>(plan) : find_value_last<key_dim, false>(plan);
  return plan.common ? find<key_dim, true>(plan) : find<key_dim, false>(plan);
}

}  // namespace

template <>
FastKernel decode_kernel_of<state_dtype>(const Plan& plan, std::int64_t key_dim) {
  return key_dim == 64 ? find<64>(plan) : key_dim == 128 ? find<128>(plan) : find<256>(plan);
}

}  // namespace gatedelta::cuda
