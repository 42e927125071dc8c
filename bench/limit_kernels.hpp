// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>

// What one thread of the host can do at best: limit_kernels.cpp is compiled once for each instruction set.
namespace gatedelta::bench {

struct LimitKernels {
  const char* name;
  /// x = a*x + b, in place: the traffic of an update of the state.
  void (*scale_add)(float* x, std::size_t count, float a, float b);
  /// Multiplies and adds in registers only; returns something that depends on all of it.
  float (*multiply_add)(std::int64_t rounds, float a, float b);
  /// Floating-point operations of one round of multiply_add.
  std::int64_t flops_per_round;
};

extern const LimitKernels limit_kernels_baseline;
extern const LimitKernels limit_kernels_avx2;
extern const LimitKernels limit_kernels_avx512;

}  // namespace gatedelta::bench
