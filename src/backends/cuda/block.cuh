// SPDX-License-Identifier: Apache-2.0
#pragma once

// What the kernels for every case share.
namespace gatedelta::cuda {

constexpr int block_threads = 256, block_warps = block_threads / 32;

__device__ inline double warp_sum(double value) {
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
  return value;
}

}  // namespace gatedelta::cuda
