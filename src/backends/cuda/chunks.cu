// SPDX-License-Identifier: Apache-2.0
// The kernels for many tokens of one state dtype: compiled once for each GATEDELTA_STATE.
#include "backends/cuda/chunks.cuh"
#include "backends/cuda/plan.hpp"
#include "backends/cuda/state_dtype.cuh"

namespace gatedelta::cuda {
namespace {

template <int key_dim, bool value_last, class Input>
FastKernel describe() {
  using Form = ChunkForm<State, key_dim, value_last, Input>;
  void (*const function)(FastParams) = chunks_kernel<State, key_dim, value_last, Input>;
  FastKernel kernel{reinterpret_cast<const void*>(function), Form::Tile::warp_rows};
  kernel.chunk_bytes = Form::Tokens::shared_bytes, kernel.chunk_value_bytes = chunk_members * Form::Values::bytes;
  return kernel;
}

template <int key_dim, class Input>
FastKernel find(const Plan& plan) {
  return plan.value_last ? describe<key_dim, true, Input>() : describe<key_dim, false, Input>();
}

template <int key_dim>
FastKernel find(const Plan& plan) {
  return plan.inputs == DType::f16 ? find<key_dim, __half>(plan) : find<key_dim, __nv_bfloat16>(plan);
}

}  // namespace

template <>
FastKernel chunks_kernel_of<state_dtype>(const Plan& plan, std::int64_t key_dim) {
  return key_dim == 64 ? find<64>(plan) : find<128>(plan);
}

}  // namespace gatedelta::cuda
