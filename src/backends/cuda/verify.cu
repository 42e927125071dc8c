// SPDX-License-Identifier: Apache-2.0
// The kernels for several tokens of one state dtype: compiled once for each GATEDELTA_STATE.
#include "backends/cuda/plan.hpp"
#include "backends/cuda/state_dtype.cuh"
#include "backends/cuda/verify.cuh"

namespace gatedelta::cuda {
namespace {

template <int key_dim, bool value_last, int token_tile, bool keeps_float, bool common>
VerifyKernel describe() {
  using Tile = StateTile<State, key_dim, value_last, keeps_float>;
  using Tokens = TokenTile<key_dim, token_tile, Tile::width, common>;
  void (*const kernel)(FastParams) = verify_kernel<State, key_dim, value_last, token_tile, keeps_float, common>;
  return {reinterpret_cast<const void*>(kernel), Tile::warp_rows,
          Ring<Tile::vectors, Tile::words, verify_stages>::bytes + Tokens::bytes(0), Tokens::bytes(1) - Tokens::bytes(0)};
}

template <int key_dim, int token_tile>
VerifyKernel find(bool value_last, bool keeps_float, bool common) {
  if (value_last) return describe<key_dim, true, token_tile, true, false>();
  // Only a bfloat16 state need not be widened for its product with the keys.
  if constexpr (state_dtype == DType::bf16)
    if (!keeps_float && common) return describe<key_dim, false, token_tile, false, true>();
  if constexpr (state_dtype != DType::f16)
    if (common) return describe<key_dim, false, token_tile, true, true>();
  return describe<key_dim, false, token_tile, true, false>();
}

template <int key_dim>
VerifyKernel find(bool value_last, int token_tile, bool keeps_float, bool common) {
  if constexpr (key_dim < 256)
    if (token_tile == 16) return find<key_dim, 16>(value_last, keeps_float, common);
  return find<key_dim, 8>(value_last, keeps_float, common);
}

}  // namespace

template <>
VerifyKernel verify_kernel_of<state_dtype>(std::int64_t key_dim, bool value_last, int token_tile, bool keeps_float,
                                           bool common) {
  return key_dim == 64    ? find<64>(value_last, token_tile, keeps_float, common)
         : key_dim == 128 ? find<128>(value_last, token_tile, keeps_float, common)
                          : find<256>(value_last, token_tile, keeps_float, common);
}

}  // namespace gatedelta::cuda
