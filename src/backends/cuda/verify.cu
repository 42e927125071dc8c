// SPDX-License-Identifier: Apache-2.0
// The kernels for several tokens of one state dtype: compiled once for each GATEDELTA_STATE.
#include "backends/cuda/plan.hpp"
#include "backends/cuda/state_dtype.cuh"
#include "backends/cuda/verify.cuh"

namespace gatedelta::cuda {
namespace {

template <int key_dim, bool value_last, int token_tile, bool common>
FastKernel describe() {
  using Tile = StateTile<State, key_dim, value_last>;
  using Tokens = TokenTile<key_dim, token_tile, Tile::width, common>;
  void (*const kernel)(FastParams) = verify_kernel<State, key_dim, value_last, token_tile, common>;
  return {reinterpret_cast<const void*>(kernel), Tile::warp_rows, VerifyRing<Tile>::bytes + Tokens::bytes(0),
          Tokens::bytes(1) - Tokens::bytes(0), sizeof(float) * token_tile * Tile::warp_rows};
}

template <int key_dim, int token_tile>
FastKernel find(const Plan& plan) {
  if (plan.value_last) return describe<key_dim, true, token_tile, false>();
  if constexpr (state_dtype != DType::f16)
    if (plan.common) return describe<key_dim, false, token_tile, true>();
  return describe<key_dim, false, token_tile, false>();
}

template <int key_dim>
FastKernel find(const Plan& plan) {
  if constexpr (key_dim < 256)
    if (plan.token_tile == 16) return find<key_dim, 16>(plan);
  return find<key_dim, 8>(plan);
}

}  // namespace

template <>
FastKernel verify_kernel_of<state_dtype>(const Plan& plan, std::int64_t key_dim) {
  return key_dim == 64 ? find<64>(plan) : key_dim == 128 ? find<128>(plan) : find<256>(plan);
}

}  // namespace gatedelta::cuda
