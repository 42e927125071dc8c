// SPDX-License-Identifier: Apache-2.0
// The decode kernels of one state dtype: compiled once for each GATEDELTA_STATE.
#include "backends/cuda/decode.cuh"
#include "backends/cuda/decode_value_last.cuh"
#include "backends/cuda/plan.hpp"
#include "backends/cuda/state_dtype.cuh"

namespace gatedelta::cuda {
namespace {

template <int key_dim, bool value_last, int size, bool common>
FastKernel describe() {
  if constexpr (value_last) {
    using Tile = ValueLastTile<State, key_dim, size>;
    void (*const kernel)(FastParams) = decode_value_last_kernel<State, key_dim, size, common>;
    return {.function = reinterpret_cast<const void*>(kernel),
            .warp_rows = Tile::values / Tile::warps,
            .bytes = Tile::warp_bytes,
            .block_bytes = Tile::block_bytes,
            .warps = Tile::warps};
  } else {
    using Tile = DecodeTile<State, key_dim, size>;
    void (*const kernel)(FastParams) = decode_kernel<State, key_dim, size, common>;
    return {.function = reinterpret_cast<const void*>(kernel), .warp_rows = Tile::warp_rows, .bytes = DecodeRing<Tile>::bytes};
  }
}

template <int key_dim, bool value_last, bool common>
FastKernel find(const Plan& plan) {
  switch (plan.shape.rows_a_lane) {
    case 2:
      return describe<key_dim, value_last, 2, common>();
    case 4:
      return describe<key_dim, value_last, 4, common>();
    case 8:
      return describe<key_dim, value_last, 8, common>();
    case 16:
      if constexpr (value_last && common) return describe<key_dim, true, 16, true>();
      break;
    case 32:
      if constexpr (value_last && common && key_dim < 256 && sizeof(State) == 4) return describe<key_dim, true, 32, true>();
  }
  return {};
}

template <int key_dim, bool value_last>
FastKernel find(const Plan& plan) {
  return plan.common ? find<key_dim, value_last, true>(plan) : find<key_dim, value_last, false>(plan);
}

template <int key_dim>
FastKernel find(const Plan& plan) {
  return plan.value_last ? find<key_dim, true>(plan) : find<key_dim, false>(plan);
}

}  // namespace

template <>
FastKernel decode_kernel_of<state_dtype>(const Plan& plan, std::int64_t key_dim) {
  return key_dim == 64 ? find<64>(plan) : key_dim == 128 ? find<128>(plan) : find<256>(plan);
}

}  // namespace gatedelta::cuda
