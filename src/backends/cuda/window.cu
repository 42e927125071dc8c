// SPDX-License-Identifier: Apache-2.0
// The kernels of replay windows for every case.
#include "backends/cuda/launch_kernel.hpp"
#include "backends/cuda/plan.hpp"
#include "backends/cuda/window.cuh"

namespace gatedelta::cuda {
namespace {

template <class Params>
cudaError_t launch(void (*kernel)(Params), std::int64_t blocks, int threads, std::size_t shared_bytes, const Params& params,
                   cudaStream_t stream) {
  if (blocks == 0) return cudaSuccess;
  Launch what;
  what.kernel = reinterpret_cast<const void*>(kernel);
  what.grid = dim3(static_cast<unsigned>(blocks));
  what.threads = static_cast<unsigned>(threads);
  what.shared_bytes = shared_bytes;
  return launch_kernel(what, params, stream);
}

}  // namespace

cudaError_t launch_generic_replay(const ReplayParams<ForwardParams>& params, cudaStream_t stream) {
  const std::int64_t rows = params.rows + (params.cu_seqlens.data != nullptr ? 1 : 0);
  return launch(replay_forward_kernel, rows * params.heads * params.slices, block_threads,
                SliceMemory::bytes(params.slice_rows, params.key_dim), params, stream);
}

cudaError_t launch_accept(const WindowCallParams& params, cudaStream_t stream) {
  return launch(accept_kernel, params.rows, 2 * max_window, 0, params, stream);
}

cudaError_t launch_reset(const WindowCallParams& params, cudaStream_t stream) {
  return launch(reset_kernel, params.rows, 2 * max_window, 0, params, stream);
}

cudaError_t launch_fold(const WindowCallParams& params, cudaStream_t stream) {
  return launch(fold_kernel, params.rows * params.heads * params.slices, block_threads,
                SliceMemory::bytes(params.slice_rows, params.key_dim), params, stream);
}

cudaError_t launch_copy(const WindowCallParams& params, cudaStream_t stream) {
  return launch(copy_kernel, params.rows * (params.state.data != nullptr ? params.heads : 1), block_threads, 0, params, stream);
}

}  // namespace gatedelta::cuda
