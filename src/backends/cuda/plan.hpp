// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <optional>

#include "backends/cuda/params.hpp"

// Which kernel runs a call, and how it is cut into blocks.
namespace gatedelta::cuda {

constexpr std::int64_t max_grid_yz = 65535;

enum class Kernel : std::uint8_t { generic, decode, serving, chunks, replay, recurrent };
/// Which states a call stores: that after a row's last token, or after each.
enum class Stores : std::uint8_t { none, last, each };

/// When a call asks for its states before its inputs: never, if it is a dependent launch, or always. See choose_start().
enum class Ahead : std::uint8_t { never, dependent, always };

/// How a fast kernel is cut into blocks, but for the recurrent one, which is always cut alike.
struct Shape {
  union {
    int rows_a_lane = 0;  ///< decode, K-last: value rows of a lane
    int value_lanes;      ///< decode, V-last: lanes along V, the others of a warp are along K
    int heads;            ///< replay: of a block, one after the other, no more than warps
    int preparing;        ///< chunks: warps that do nothing else; 0: all prepare
    int shares;           ///< serving: warps that share rows, K-last only for states after each token; 0: none do
  };
  int warps = 0;  ///< of a block (decode, V-last: follows from the lanes)
  int span = 0;   ///< value rows of a warp, rounded up to what it has at a time (decode, V-last: that)
  /// decode, serving: of calls that update states in place; see FastParams.
  bool keeps_states = false;
  Ahead ahead = Ahead::never;  ///< decode
};

struct Plan {
  Kernel kernel = Kernel::generic;
  bool value_last = false;
  int token_tile = 0;                 ///< serving, replay: at most
  bool common = false;                ///< see the kernel
  bool long_keys = false;             ///< serving: of 256 elements
  DType inputs = DType::bf16;         ///< serving, chunks: of q, k, v and o
  DType entries = DType::bf16;        ///< replay
  bool one_group = false;             ///< replay: a window of no more entries than a group, see ReplayRow
  bool passes = false;                ///< replay: rows may have more tokens than the kernel has at a time
  bool tree = false;                  ///< recurrent: drafts in a tree
  bool ahead = false, early = false;  ///< see Params
  Shape shape;
};

/// A measured row: the best shape where there are at most this many states (rows times heads) in a call.
struct Choice {
  std::int64_t states;
  Shape shape;
};
/// The rows for a kernel with this state, in ascending order; the last one has no bound.
struct Choices {
  const Choice* begin;
  const Choice* end;
};
Choices choices(const Plan& plan, DType state, Stores stores);

/// The shape in the environment's GATEDELTA_CUDA_SHAPE, "rows_a_lane:warps:span" or with ":keep" behind it, which takes the
/// place of the tables where the kernel can have it: for measuring. Throws if it makes no sense.
std::optional<Shape> parse_shape(const char* text);

/// From what the host knows of the call. The kernel, and so the bits of the result, depends on the form of the call and on
/// T, but never on the number of rows; the shape may.
Plan make_plan(const ForwardParams& params);
Plan make_replay_plan(const ReplayParams<ForwardParams>& params);

/// A kernel of some grid, see launch_kernel.hpp.
struct Launch {
  const void* kernel = nullptr;
  dim3 grid{};
  unsigned threads = 0;
  std::size_t shared_bytes = 0;
  bool dependent = false;  ///< may begin before the launch ahead of it has ended
};

/// Launches the plan's kernel; all launches are asynchronous. Returns the launch's own status.
cudaError_t launch_forward(const Plan& plan, const ForwardParams& params, cudaStream_t stream);
cudaError_t launch_replay(const Plan& plan, const ReplayParams<ForwardParams>& params, cudaStream_t stream);
cudaError_t launch_commit(const CommitParams& params, cudaStream_t stream);
cudaError_t launch_accept(const WindowCallParams& params, cudaStream_t stream);
cudaError_t launch_reset(const WindowCallParams& params, cudaStream_t stream);
cudaError_t launch_fold(const WindowCallParams& params, cudaStream_t stream);
cudaError_t launch_copy(const WindowCallParams& params, cudaStream_t stream);
/// The address of the current device's fault record.
cudaError_t find_fault_record(Fault*& out);
/// Reads the current device's fault record after everything on the stream, and clears it if there is a fault.
cudaError_t take_fault(Fault& fault, cudaStream_t stream);

/// What the host has to know of a fast kernel to launch it; the tile that it is compiled for says so.
struct FastKernel {
  const void* function = nullptr;
  int warp_rows = 0;  ///< value rows that a warp has at a time
  // Shared memory of a warp: for each stage, of which there are as many unless its span is shorter, and where states after each
  // token are stored.
  std::size_t bytes = 0, each_bytes = 0;
  int stages = 1;
  std::size_t block_bytes = 0;  ///< of a block beside its warps
  std::size_t group_bytes = 0;  ///< of a warp, for each group of entries of a window
  // Replay, for each head of a block: in any case, for each 16 entries, for each value row; for a tree in passes; and for heads
  // that share a key.
  std::size_t head_bytes = 0, head_group_bytes = 0, head_value_bytes = 0;
  std::size_t path_bytes = 0, path_group_bytes = 0, team_bytes = 0, team_group_bytes = 0;
  // Recurrent: of a block, for each token that it has there and for a tree, and how many it has of a call without a window.
  std::size_t token_bytes = 0, tree_bytes = 0;
  int tokens = 0;
  // Chunks, for each that there is room for: of a block, and of a warp with value rows.
  std::size_t chunk_bytes = 0, chunk_value_bytes = 0;
  int warps = 0;  ///< of a block, where the kernel wants as many and has its rows at once
};
// The device code, by state dtype.
template <DType state>
FastKernel decode_kernel_of(const Plan& plan, std::int64_t key_dim);
template <DType state>
FastKernel serving_kernel_of(const Plan& plan, std::int64_t key_dim);
template <DType state>
FastKernel chunks_kernel_of(const Plan& plan, std::int64_t key_dim);
template <DType state>
FastKernel replay_kernel_of(const Plan& plan, std::int64_t key_dim);
template <DType state>
FastKernel recurrent_kernel_of(const Plan& plan, std::int64_t key_dim, bool replays);
const void* generic_kernel();
cudaError_t launch_generic_replay(const ReplayParams<ForwardParams>& params, cudaStream_t stream);

}  // namespace gatedelta::cuda
