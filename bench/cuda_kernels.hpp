// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "platform.hpp"

// The kernels of the benchmark itself on CUDA devices: inputs and limits.
namespace gatedelta::bench {

cudaError_t launch_fill(void* data, DType dtype, std::int64_t count, const Normal& numbers, cudaStream_t stream);
/// Moves whole vectors of 16 bytes; up to 15 bytes at the end are left out. The shapes differ in the threads of a block and the
/// vectors that each has in flight. `unused` is device memory for a vector.
inline constexpr int move_shapes = 12;
cudaError_t launch_move(const Traffic& traffic, int shape, void* unused, cudaStream_t stream);
/// In shapes of its own, which differ in whether stored states are to stay in cache, too; `fits` says whether anything was
/// launched.
inline constexpr int call_shapes = 18;
cudaError_t launch_call_traffic(const CallTraffic& call, int shape, void* unused, cudaStream_t stream, bool& fits);
/// `blocks` blocks of multiply_add_threads threads, each of which does multiply_add_chains * 2 * rounds operations.
inline constexpr int multiply_add_threads = 512, multiply_add_chains = 16;
cudaError_t launch_multiply_add(int blocks, std::int64_t rounds, void* unused, cudaStream_t stream);

}  // namespace gatedelta::bench
