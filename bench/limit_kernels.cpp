// SPDX-License-Identifier: Apache-2.0
// Compiled several times with other instruction sets: nothing inline from other headers may be used here, or the linker could
// pick an AVX-512 copy of it for everyone.
#include "limit_kernels.hpp"

namespace gatedelta::bench {
namespace {

#if defined(__AVX512F__)
#define LIMIT_KERNELS limit_kernels_avx512
constexpr char level[] = "avx512";
constexpr std::size_t width = 64;
#elif defined(__AVX2__)
#define LIMIT_KERNELS limit_kernels_avx2
constexpr char level[] = "avx2";
constexpr std::size_t width = 32;
#else
#define LIMIT_KERNELS limit_kernels_baseline
constexpr char level[] = "baseline";
constexpr std::size_t width = 16;
#endif

void scale_add(float* x, std::size_t count, float a, float b) {
  for (std::size_t i = 0; i < count; ++i) x[i] = a * x[i] + b;
}

using Lanes [[gnu::vector_size(width)]] = float;
constexpr std::int64_t chains = 12;

// Named variables, as compilers keep an array of vectors in memory. Twelve chains hide the latency of two units with four
// cycles each and leave registers for a and b where there are only sixteen.
float multiply_add(std::int64_t rounds, float a, float b) {
  const Lanes m = a - Lanes{}, c = b - Lanes{};
  Lanes x0 = c, x1 = c + 1, x2 = c + 2, x3 = c + 3, x4 = c + 4, x5 = c + 5;
  Lanes x6 = c + 6, x7 = c + 7, x8 = c + 8, x9 = c + 9, x10 = c + 10, x11 = c + 11;
  for (std::int64_t i = 0; i < rounds; ++i) {
    x0 = m * x0 + c;
    x1 = m * x1 + c;
    x2 = m * x2 + c;
    x3 = m * x3 + c;
    x4 = m * x4 + c;
    x5 = m * x5 + c;
    x6 = m * x6 + c;
    x7 = m * x7 + c;
    x8 = m * x8 + c;
    x9 = m * x9 + c;
    x10 = m * x10 + c;
    x11 = m * x11 + c;
  }
  const Lanes sum = x0 + x1 + x2 + x3 + x4 + x5 + x6 + x7 + x8 + x9 + x10 + x11;
  float total = 0;
  for (std::size_t i = 0; i < width / sizeof(float); ++i) total += sum[i];
  return total;
}

}  // namespace

const LimitKernels LIMIT_KERNELS = {level, scale_add, multiply_add,
                                    2 * chains* static_cast<std::int64_t>(width / sizeof(float))};

}  // namespace gatedelta::bench
