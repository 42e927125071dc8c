// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <bit>

#include "backends/cuda/launch_kernel.hpp"
#include "backends/cuda/plan.hpp"

namespace gatedelta::cuda {
namespace {

constexpr std::size_t shared_without_asking = 47 * 1024;  // 48, with the kernels' own
constexpr std::size_t most_shared = 226 * 1024;           // 227 on the devices of the fast kernels

template <DType state>
FastKernel kernel_of(const Plan& plan, std::int64_t key_dim, bool replays) {
  switch (plan.kernel) {
    case Kernel::decode:
      return decode_kernel_of<state>(plan, key_dim);
    case Kernel::serving:
      return serving_kernel_of<state>(plan, key_dim);
    case Kernel::chunks:
      return chunks_kernel_of<state>(plan, key_dim);
    case Kernel::replay:
      return replay_kernel_of<state>(plan, key_dim);
    default:
      return recurrent_kernel_of<state>(plan, key_dim, replays);
  }
}

FastKernel find_kernel(const Plan& plan, DType state, std::int64_t key_dim, bool replays) {
  switch (state) {
    case DType::f32:
      return kernel_of<DType::f32>(plan, key_dim, replays);
    case DType::f16:
      return kernel_of<DType::f16>(plan, key_dim, replays);
    default:
      return kernel_of<DType::bf16>(plan, key_dim, replays);
  }
}

template <class P>
cudaError_t launch(const Launch& what, const P& params, cudaStream_t stream) {
  if (what.shared_bytes > shared_without_asking) {
    const cudaError_t status =
        cudaFuncSetAttribute(what.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(what.shared_bytes));
    if (status != cudaSuccess) return status;
  }
  return launch_kernel(what, params, stream);
}

/// Cuts the call into blocks as the shape says.
template <class P>
cudaError_t launch_fast(const FastKernel& kernel, const Shape& shape, std::size_t warp_bytes, std::size_t block_bytes, P& p,
                        std::int64_t rows, cudaStream_t stream, int block_heads = 1) {
  Launch what;
  what.kernel = kernel.function;
  what.dependent = p.dependent;
  const int warps = kernel.warps > 0 ? kernel.warps : shape.warps;
  what.threads = 32 * static_cast<unsigned>(warps);
  what.shared_bytes = block_bytes + static_cast<std::size_t>(warps) * warp_bytes;
  p.warp_bytes = static_cast<std::uint32_t>(warp_bytes);
  const int tiles = kernel.warps > 0 ? 1 : std::max((shape.span + kernel.warp_rows - 1) / kernel.warp_rows, 1);
  p.span = static_cast<std::uint16_t>(tiles * kernel.warp_rows), p.warps = static_cast<std::uint16_t>(warps);
  const std::int64_t block_rows = static_cast<std::int64_t>(p.span) * ((warps - p.preparing) >> p.share_bits);
  what.grid = dim3(static_cast<unsigned>((p.value_dim + block_rows - 1) / block_rows),
                   static_cast<unsigned>((p.heads + block_heads - 1) / block_heads));
  for (std::int64_t first = 0; first < rows; first += max_grid_yz) {
    p.first_row = static_cast<std::uint32_t>(first);
    what.grid.z = static_cast<unsigned>(std::min(rows - first, max_grid_yz));
    const cudaError_t status = launch(what, p, stream);
    if (status != cudaSuccess) return status;
  }
  return cudaSuccess;
}

/// How many of a block's heads have a key and a query in common, one after the other from the first one.
std::uint32_t team_of(const FastParams& p, std::uint32_t heads) {
  const std::uint32_t count = p.k_group.count;
  if (p.q_group.count != count) return 1;
  return count % heads == 0 ? heads : heads % count == 0 ? count : 1;
}

}  // namespace

cudaError_t launch_forward(const Plan& plan, const ForwardParams& params, cudaStream_t stream) {
  // Behind the last row of cu_seqlens there are the blocks of the tokens of no sequence.
  const std::int64_t rows = params.rows + (params.cu_seqlens.data != nullptr ? 1 : 0);
  if (rows == 0) return cudaSuccess;
  Launch what;
  FastParams p{};
  if (plan.kernel == Kernel::generic || !narrow(params, p)) {
    what.kernel = generic_kernel();
    what.dependent = params.dependent;
    what.threads = 256;
    what.grid = dim3(static_cast<unsigned>(rows * params.heads * params.slices));
    what.shared_bytes = static_cast<std::size_t>((params.slice_rows + 2) * params.key_dim) * sizeof(float);
    return launch(what, params, stream);
  }
  const FastKernel kernel = find_kernel(plan, p.state_dtype, p.key_dim, false);
  p.keeps_states = plan.shape.keeps_states, p.ahead = plan.ahead, p.early = plan.early;
  if (plan.kernel == Kernel::chunks) {
    p.preparing = static_cast<std::uint8_t>(plan.shape.preparing);
    const int row_warps = plan.shape.warps - plan.shape.preparing;
    // A chunk is prepared by two warps; those of which some warps do nothing else have room for two groups of them.
    const int room = plan.shape.preparing > 0 ? plan.shape.preparing : row_warps / 2;
    const std::size_t bytes = kernel.chunk_bytes + static_cast<std::size_t>(row_warps) * kernel.chunk_value_bytes;
    return launch_fast(kernel, plan.shape, 0, static_cast<std::size_t>(room) * bytes, p, rows, stream);
  }
  if (plan.kernel == Kernel::serving && plan.shape.shares > 0)
    p.share_bits = static_cast<std::uint8_t>(std::countr_zero(static_cast<unsigned>(plan.shape.shares)));
  const int stages = plan.shape.span > kernel.warp_rows ? kernel.stages : 1;
  std::size_t warp_bytes = static_cast<std::size_t>(stages) * kernel.bytes;
  if (p.store_tokens || p.snapshots.data != nullptr) warp_bytes += kernel.each_bytes;
  std::size_t block_bytes = kernel.block_bytes + static_cast<std::size_t>(kernel.tokens) * kernel.token_bytes;
  if (plan.value_last && p.share_bits > 0) block_bytes += warp_bytes, warp_bytes = 0;  // all of a block have a unit together
  return launch_fast(kernel, plan.shape, warp_bytes, block_bytes, p, rows, stream);
}

cudaError_t launch_replay(const Plan& plan, const ReplayParams<ForwardParams>& params, cudaStream_t stream) {
  ReplayParams<FastParams> p{};
  const std::int64_t rows = params.rows + (params.cu_seqlens.data != nullptr ? 1 : 0);
  if (rows == 0 || plan.kernel == Kernel::generic || !narrow(params, p)) return launch_generic_replay(params, stream);
  p.early = plan.early;
  const FastKernel kernel = find_kernel(plan, p.state_dtype, p.key_dim, true);
  if (plan.kernel == Kernel::recurrent) {
    const std::size_t bytes =
        kernel.block_bytes + static_cast<std::size_t>(p.most_tokens()) * kernel.token_bytes + kernel.tree_bytes;
    if (bytes > most_shared) return launch_generic_replay(params, stream);
    return launch_fast(kernel, plan.shape, 0, bytes, p, rows, stream);
  }
  const auto groups = static_cast<std::size_t>(groups_of(p.window.capacity));
  const std::size_t warp_bytes = kernel.bytes + groups * kernel.group_bytes;
  p.head_bytes = static_cast<std::uint32_t>(kernel.head_bytes + groups * kernel.head_group_bytes +
                                            static_cast<std::size_t>(p.value_dim) * kernel.head_value_bytes);
  const auto tokens = static_cast<std::uint32_t>(p.most_tokens());
  const bool paths = p.parent.data != nullptr && tokens > static_cast<std::uint32_t>(plan.token_tile);
  if (paths) p.head_bytes += static_cast<std::uint32_t>(kernel.path_bytes + groups * kernel.path_group_bytes);
  p.team_bytes = static_cast<std::uint32_t>(kernel.team_bytes + groups * kernel.team_group_bytes);
  // As many heads as fit: long windows of float32 entries need much of shared memory.
  auto heads = static_cast<std::uint32_t>(plan.shape.heads);
  std::size_t block_bytes = 0;
  for (;; --heads) {
    p.block_heads = heads, p.team = make_group(team_of(p, heads));
    const std::uint32_t teams = (heads + p.team.count - 1) / p.team.count;
    p.token_warps = plan.token_tile == 1 ? teams : heads;
    p.teams = make_group(teams);
    // A tree in passes is one warp's work.
    p.entry_warps = static_cast<std::uint32_t>(
        paths ? 1 : std::bit_floor(std::min(groups, static_cast<std::size_t>(plan.shape.warps) / teams)));
    block_bytes = heads * p.head_bytes + teams * p.team_bytes;
    if (heads == 1 || block_bytes + static_cast<std::size_t>(plan.shape.warps) * warp_bytes <= most_shared) break;
  }
  cudaError_t status = cudaSuccess;
  do {
    p.ahead = plan.ahead && p.passed_tokens == 0;  // what a pass asks for comes from the one before
    status = launch_fast(kernel, plan.shape, warp_bytes, block_bytes, p, rows, stream, static_cast<int>(heads));
    p.passed_tokens += static_cast<std::uint32_t>(plan.token_tile);
  } while (status == cudaSuccess && p.passed_tokens < tokens);
  return status;
}

}  // namespace gatedelta::cuda
