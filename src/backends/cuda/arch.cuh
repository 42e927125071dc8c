// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

// The instructions that CUDA C++ has no function for (PTX ISA: mma.sync.m16n8k16, movmatrix, mul.wide).
namespace gatedelta::cuda {

/// Two bfloat16 values, the first in the lower half.
using Pair = std::uint32_t;

/// d += a b for a 16 x 16 matrix a and a 16 x 8 matrix b of bfloat16. With g = lane / 4 and c = lane % 4 a lane has of
///   a: (g; 2c, 2c+1), (g+8; 2c, 2c+1), (g; 2c+8, 2c+9), (g+8; 2c+8, 2c+9)     b: (2c, 2c+1; g), (2c+8, 2c+9; g)
///   d: (g; 2c), (g; 2c+1), (g+8; 2c), (g+8; 2c+1)
__device__ inline void multiply_add(float (&d)[4], Pair a0, Pair a1, Pair a2, Pair a3, Pair b0, Pair b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

/// Transposes an 8 x 8 matrix of 16-bit elements, of which a lane has (g; 2c, 2c+1).
__device__ inline std::uint32_t transposed(std::uint32_t x) {
  std::uint32_t out;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(out) : "r"(x));
  return out;
}

/// One instruction, which a product of converted integers often is not.
__device__ inline std::int64_t multiply_wide(std::int32_t a, std::int32_t b) {
  std::int64_t out;
  asm("mul.wide.s32 %0, %1, %2;" : "=l"(out) : "r"(a), "r"(b));
  return out;
}

}  // namespace gatedelta::cuda
