// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "machine.hpp"

// What nvcc knows and a C++ compiler does not, as far as the fast kernels use it: comes before all else in what is compiled of
// the device code. A kernel that uses more does not compile, and more has to be added here.
#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __grid_constant__
#define __grid_constant__
// One for all fibers of a block. Unlike `static`, it may stand behind `extern`, and means the same inside of a function alone.
#undef __shared__
#define __shared__ thread_local

namespace gatedelta::emulation {
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim;
}  // namespace gatedelta::emulation
using gatedelta::emulation::blockDim;
using gatedelta::emulation::blockIdx;
using gatedelta::emulation::threadIdx;
using std::max;
using std::min;

inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline int __popc(unsigned x) { return std::popcount(x); }
inline int __popcll(unsigned long long x) { return std::popcount(x); }
inline int __ffsll(long long x) { return x == 0 ? 0 : std::countr_zero(static_cast<unsigned long long>(x)) + 1; }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(std::uint64_t{a} * b >> 32); }
inline float __fdividef(float a, float b) { return a / b; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
  const std::uint64_t bytes = std::uint64_t{high} << 32 | low;
  unsigned out = 0;
  for (int i = 0; i < 4; ++i) out |= static_cast<unsigned>(bytes >> (8 * (selector >> (4 * i) & 7)) & 0xff) << (8 * i);
  return out;
}

// All lanes take part in all of these.
template <class T>
T __shfl_sync(unsigned, T x, int lane, int width = 32) {
  const int first = gatedelta::emulation::own_lane() & ~(width - 1);
  return gatedelta::emulation::exchange("a shuffle", x)[first + (lane & (width - 1))];
}
template <class T>
T __shfl_xor_sync(unsigned, T x, int mask) {
  return gatedelta::emulation::exchange("a shuffle by xor", x)[(gatedelta::emulation::own_lane() ^ mask) & 31];
}
template <class T>
T __shfl_up_sync(unsigned, T x, int distance) {
  const int lane = gatedelta::emulation::own_lane();
  return gatedelta::emulation::exchange("a shuffle up", x)[lane < distance ? lane : lane - distance];
}
template <class T>
T __shfl_down_sync(unsigned, T x, int distance) {
  const int lane = gatedelta::emulation::own_lane();
  return gatedelta::emulation::exchange("a shuffle down", x)[lane + distance > 31 ? lane : lane + distance];
}
inline unsigned __reduce_or_sync(unsigned, unsigned x) {
  const auto lanes = gatedelta::emulation::exchange("a reduction", x);
  unsigned out = 0;
  for (int lane = 0; lane < gatedelta::emulation::warp_lanes; ++lane) out |= lanes[lane];
  return out;
}
template <class T>
unsigned __match_any_sync(unsigned mask, T x) {
  unsigned same = 0;
  for (int lane = 0; lane < 32; ++lane) same |= __shfl_sync(mask, x, lane) == x ? 1u << lane : 0;
  return same;
}
inline bool __any_sync(unsigned mask, bool x) { return __reduce_or_sync(mask, x) != 0; }
inline bool __all_sync(unsigned mask, bool x) { return __reduce_or_sync(mask, !x) == 0; }
inline void __syncwarp() { gatedelta::emulation::warp_barrier(); }
inline void __syncthreads() { gatedelta::emulation::block_barrier(); }
inline bool __syncthreads_or(bool x) {
  static bool any;
  __syncthreads();  // all have taken the last result
  any = false;
  __syncthreads();
  any = any || x;
  __syncthreads();
  return any;
}

template <class T>
void __stcs(T* to, T value) {
  *to = value;
}
inline int atomicCAS(int* at, int expected, int value) {
  const int old = *at;
  if (old == expected) *at = value;
  return old;
}

inline void cudaTriggerProgrammaticLaunchCompletion() {}
inline void cudaGridDependencySynchronize() {}

// Of variables of a device.
template <class T>
cudaError_t cudaGetSymbolAddress(void** address, T& symbol) {
  *address = &symbol;
  return cudaSuccess;
}
template <class T>
cudaError_t cudaMemcpyFromSymbolAsync(void* to, const T& symbol, std::size_t bytes, std::size_t, cudaMemcpyKind, cudaStream_t) {
  std::memcpy(to, &symbol, bytes);
  return cudaSuccess;
}
template <class T>
cudaError_t cudaMemcpyToSymbolAsync(T& symbol, const void* from, std::size_t bytes, std::size_t, cudaMemcpyKind, cudaStream_t) {
  std::memcpy(&symbol, from, bytes);
  return cudaSuccess;
}
