// SPDX-License-Identifier: Apache-2.0
// The decode kernels of one state dtype: compiled once for each GATEDELTA_STATE.
#include "backends/cuda/decode.cuh"
#include "backends/cuda/plan.hpp"
#include "backends/cuda/state_dtype.cuh"

namespace gatedelta::cuda {
namespace {

template <int key_dim, bool value_last, int size, bool common>
FastKernel describe() {
  using Tile = DecodeTile<State, key_dim, value_last, size>;
  void (*const kernel)(FastParams) = decode_kernel<State, key_dim, value_last, size, common>;
  return {reinterpret_cast<const void*>(kernel), Tile::warp_rows, DecodeRing<Tile>::bytes, 0};
}

template <int key_dim, bool value_last, bool common>
FastKernel find(const Plan& plan) {
  constexpr bool all_sizes = common || !value_last;
  switch (plan.shape.rows_a_lane) {
    case 2:
      return describe<key_dim, value_last, 2, common>();
    case 4:
      if constexpr (all_sizes) return describe<key_dim, value_last, 4, common>();
      break;
    case 8:
      if constexpr (all_sizes && (!value_last || key_dim < 256)) return describe<key_dim, value_last, 8, common>();
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
