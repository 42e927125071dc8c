// SPDX-License-Identifier: Apache-2.0
#include "cuda_kernels.hpp"

namespace gatedelta::bench {
namespace {

template <class T, class Convert>
__global__ void fill(T* data, std::int64_t count, Normal numbers, Convert convert) {
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * blockDim.x;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += step)
    data[i] = convert(numbers(static_cast<std::uint64_t>(i)));
}

template <class T, class Convert>
void launch_fill_as(void* data, std::int64_t count, const Normal& numbers, cudaStream_t stream, Convert convert) {
  constexpr int threads = 256;
  const std::int64_t blocks = (count + threads - 1) / threads;
  fill<<<static_cast<unsigned>(blocks < 65536 ? blocks : 65536), threads, 0, stream>>>(static_cast<T*>(data), count, numbers,
                                                                                       convert);
}

struct AsFloat {
  __device__ float operator()(float x) const { return x; }
};
struct AsFloat16 {
  __device__ float16 operator()(float x) const { return to_float16(x); }
};
struct AsBfloat16 {
  __device__ bfloat16 operator()(float x) const { return to_bfloat16(x); }
};

struct Move {
  const uint4* read;
  uint4* write;
  std::int64_t count, copies;
  unsigned flip;  // 0, and `never` a sum that does not occur; the compiler does not know, so that it drops no load and no store
  uint4 never;
  uint4* unused;
};

/// Nothing but traffic: all of a thread's vectors are loaded before the first is used, through registers only, once, and with
/// the hint that they are not used again. `Whole`: all vectors of the block exist.
template <int Threads, int Vectors, bool Whole>
__device__ void move_block(const Move& p, std::int64_t first) {
  const std::int64_t left = p.count - first;
  const uint4* read = p.read + first;
  uint4* write = p.write + first;
  uint4 held[Vectors];
#pragma unroll
  for (int i = 0; i < Vectors; ++i) held[i] = Whole || i * Threads < left ? __ldcs(read + i * Threads) : uint4{};
  if (p.copies == 0) {
    uint4 sum{};
#pragma unroll
    for (int i = 0; i < Vectors; ++i) sum.x += held[i].x, sum.y += held[i].y, sum.z += held[i].z, sum.w += held[i].w;
    if (sum.x == p.never.x && sum.y == p.never.y && sum.z == p.never.z && sum.w == p.never.w) *p.unused = sum;
    return;
  }
#pragma unroll
  for (int i = 0; i < Vectors; ++i) held[i].x ^= p.flip;
  for (std::int64_t copy = 0; copy < p.copies; ++copy, write += p.count) {
#pragma unroll
    for (int i = 0; i < Vectors; ++i)
      if (Whole || i * Threads < left) __stcs(write + i * Threads, held[i]);
  }
}

template <int Threads, int Vectors>
__global__ void __launch_bounds__(Threads) move(Move p) {
  const std::int64_t block = static_cast<std::int64_t>(blockIdx.x) * (Threads * Vectors);
  const std::int64_t first = block + threadIdx.x;
  if (block + Threads * Vectors <= p.count)
    move_block<Threads, Vectors, true>(p, first);
  else
    move_block<Threads, Vectors, false>(p, first);
}

template <int Threads, int Vectors>
void launch_move_of(const Traffic& traffic, void* unused, cudaStream_t stream) {
  const auto count = static_cast<std::int64_t>(traffic.bytes / sizeof(uint4));
  constexpr int block = Threads * Vectors;
  const std::int64_t blocks = count > 0 ? (count + block - 1) / block : 1;
  const Move params{static_cast<const uint4*>(traffic.read),
                    static_cast<uint4*>(traffic.write),
                    count,
                    traffic.copies,
                    0,
                    {0x9e3779b9u, 0x7f4a7c15u, 0xd1342543u, 0xde82ef95u},
                    static_cast<uint4*>(unused)};
  move<Threads, Vectors><<<static_cast<unsigned>(blocks), Threads, 0, stream>>>(params);
}

__global__ void multiply_add(std::int64_t rounds, float a, float b, float never, float* unused) {
  float x[multiply_add_chains];
#pragma unroll
  for (int i = 0; i < multiply_add_chains; ++i) x[i] = b * static_cast<float>(threadIdx.x + i);
  for (std::int64_t round = 0; round < rounds; ++round) {
#pragma unroll
    for (int i = 0; i < multiply_add_chains; ++i) x[i] = a * x[i] + b;
  }
  float sum = 0;
#pragma unroll
  for (int i = 0; i < multiply_add_chains; ++i) sum += x[i];
  if (sum == never) *unused = sum;
}

}  // namespace

cudaError_t launch_fill(void* data, DType dtype, std::int64_t count, const Normal& numbers, cudaStream_t stream) {
  if (count == 0) return cudaSuccess;
  if (dtype == DType::f32) launch_fill_as<float>(data, count, numbers, stream, AsFloat());
  if (dtype == DType::f16) launch_fill_as<float16>(data, count, numbers, stream, AsFloat16());
  if (dtype == DType::bf16) launch_fill_as<bfloat16>(data, count, numbers, stream, AsBfloat16());
  return cudaGetLastError();
}

cudaError_t launch_move(const Traffic& traffic, int shape, void* unused, cudaStream_t stream) {
  constexpr void (*launches[])(const Traffic&, void*, cudaStream_t) = {
      launch_move_of<128, 1>, launch_move_of<128, 2>, launch_move_of<128, 4>, launch_move_of<128, 8>,
      launch_move_of<256, 1>, launch_move_of<256, 2>, launch_move_of<256, 4>, launch_move_of<256, 8>,
      launch_move_of<512, 1>, launch_move_of<512, 2>, launch_move_of<512, 4>, launch_move_of<512, 8>,
  };
  static_assert(sizeof launches / sizeof launches[0] == move_shapes);
  launches[shape](traffic, unused, stream);
  return cudaGetLastError();
}

cudaError_t launch_multiply_add(int blocks, std::int64_t rounds, void* unused, cudaStream_t stream) {
  multiply_add<<<static_cast<unsigned>(blocks), multiply_add_threads, 0, stream>>>(
      rounds, 0.999f, 0.001f, -1.0f, static_cast<float*>(unused));  // all sums are positive
  return cudaGetLastError();
}

}  // namespace gatedelta::bench
