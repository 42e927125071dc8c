// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "backends/cuda/params.hpp"

// Which kernel runs a call, and how it is cut into blocks.
namespace gatedelta::cuda {

constexpr std::int64_t max_grid_yz = 65535;

enum class Kernel : std::uint8_t { generic, decode, verify };

/// How a fast kernel is cut into blocks.
struct Shape {
  int rows_a_lane = 0;  ///< decode, K-last: value rows of a lane
  int warps = 0;        ///< decode: of a block
  int span = 0;         ///< value rows of a warp, rounded up to what it has at a time
};

struct Plan {
  Kernel kernel = Kernel::generic;
  bool value_last = false;
  int token_tile = 0;        ///< verify: tokens of a turn
  bool keeps_float = false;  ///< verify: see verify.cuh
  bool common = false;       ///< see decode.cuh
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
Choices choices(Kernel kernel, DType state, bool value_last, bool keeps_float);

/// From what the host knows of the call. The kernel, and so the bits of the result, depends on the form of the call and on
/// T, but never on the number of rows; the shape may.
Plan make_plan(const ForwardParams& params);

/// Launches the plan's kernel; all launches are asynchronous. Returns the launch's own status.
cudaError_t launch_forward(const Plan& plan, const ForwardParams& params, cudaStream_t stream);
cudaError_t launch_commit(const CommitParams& params, cudaStream_t stream);
/// The address of the current device's fault record.
cudaError_t find_fault_record(Fault*& out);
/// Reads the current device's fault record after everything on the stream, and clears it if there is a fault.
cudaError_t take_fault(Fault& fault, cudaStream_t stream);

// The device code, by state dtype.
struct VerifyKernel {
  const void* function = nullptr;
  int warp_rows = 0;
  std::size_t tile_bytes = 0, part_bytes = 0;  ///< of shared memory: fixed, and for each part of keys and queries
};
template <DType state>
const void* decode_kernel_of(std::int64_t key_dim, bool value_last, int rows_a_lane, bool common);
template <DType state>
VerifyKernel verify_kernel_of(std::int64_t key_dim, bool value_last, int token_tile, bool keeps_float, bool common);
const void* generic_kernel();

}  // namespace gatedelta::cuda
