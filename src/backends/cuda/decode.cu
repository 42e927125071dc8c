// SPDX-License-Identifier: Apache-2.0
// The decode kernels of one state dtype: compiled once for each GATEDELTA_STATE.
#include "backends/cuda/decode.cuh"
#include "backends/cuda/plan.hpp"
#include "backends/cuda/state_dtype.cuh"

namespace gatedelta::cuda {
namespace {

template <int key_dim, bool common>
const void* find(bool value_last, int rows_a_lane) {
  const auto pointer = [](void (*kernel)(FastParams)) { return reinterpret_cast<const void*>(kernel); };
  if (value_last) return pointer(decode_kernel<State, key_dim, true, 1, common>);
  switch (rows_a_lane) {
    case 2:
      return pointer(decode_kernel<State, key_dim, false, 2, common>);
    case 4:
      return pointer(decode_kernel<State, key_dim, false, 4, common>);
    case 8:
      return pointer(decode_kernel<State, key_dim, false, 8, common>);
  }
  return nullptr;
}

template <int key_dim>
const void* find(bool value_last, int rows_a_lane, bool common) {
  return common ? find<key_dim, true>(value_last, rows_a_lane) : find<key_dim, false>(value_last, rows_a_lane);
}

}  // namespace

template <>
const void* decode_kernel_of<state_dtype>(std::int64_t key_dim, bool value_last, int rows_a_lane, bool common) {
  return key_dim == 64    ? find<64>(value_last, rows_a_lane, common)
         : key_dim == 128 ? find<128>(value_last, rows_a_lane, common)
                          : find<256>(value_last, rows_a_lane, common);
}

}  // namespace gatedelta::cuda
