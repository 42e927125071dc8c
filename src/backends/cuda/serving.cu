// SPDX-License-Identifier: Apache-2.0
// The kernels of the serving form of one state dtype: compiled once for each GATEDELTA_STATE.
#include "backends/cuda/plan.hpp"
#include "backends/cuda/serving.cuh"
#include "backends/cuda/state_dtype.cuh"

namespace gatedelta::cuda {
namespace {

template <int key_dim, bool value_last, int token_tile, bool common, class Input = __nv_bfloat16>
FastKernel describe() {
  void (*const kernel)(FastParams) = serving_kernel<State, key_dim, value_last, token_tile, common, Input>;
  using Unit = StateUnit<State, key_dim, value_last>;
  return {reinterpret_cast<const void*>(kernel),
          Unit::rows,
          serving_stage_bytes<Unit, token_tile, Input>,
          Unit::bytes,
          serving_stages<value_last>,
          ServingTokens<Unit, token_tile, Input>::shared_bytes};
}

template <int key_dim, int token_tile, bool common>
FastKernel find(const Plan& plan) {
  return plan.value_last ? describe<key_dim, true, token_tile, common>() : describe<key_dim, false, token_tile, common>();
}

template <int key_dim, class Input>
FastKernel find_split(const Plan& plan) {
  if constexpr (sizeof(Input) == 2)
    if (plan.token_tile == 16) return describe<key_dim, false, 16, false, Input>();
  return plan.token_tile == 4 ? describe<key_dim, false, 4, false, Input>() : describe<key_dim, false, 8, false, Input>();
}

template <int key_dim, bool common>
FastKernel find(const Plan& plan) {
  switch (plan.token_tile) {
    case 4:
      return find<key_dim, 4, common>(plan);
    case 8:
      return find<key_dim, 8, common>(plan);
    default:
      return find<key_dim, 16, common>(plan);
  }
}

template <int key_dim>
FastKernel find(const Plan& plan) {
  if (plan.inputs == DType::f16) return find_split<key_dim, __half>(plan);
  if (plan.inputs == DType::f32) return find_split<key_dim, float>(plan);
  return plan.common ? find<key_dim, true>(plan) : find<key_dim, false>(plan);
}

}  // namespace

template <>
FastKernel serving_kernel_of<state_dtype>(const Plan& plan, std::int64_t key_dim) {
  if (key_dim == 256) return plan.token_tile == 4 ? describe<256, false, 4, false>() : describe<256, false, 8, false>();
  return key_dim == 64 ? find<64>(plan) : find<128>(plan);
}

}  // namespace gatedelta::cuda
