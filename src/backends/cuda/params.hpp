// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "core/faults.hpp"
#include "gatedelta/operator.hpp"

namespace gatedelta {
struct Call;
}

// What the host hands to the kernels: plain data, passed by value at the launch.
namespace gatedelta::cuda {

/// A TensorView without what the host has checked already. data is null where there is no tensor.
template <class Stride, int rank>
struct Tensor {
  void* data = nullptr;
  Stride strides[rank] = {};
  DType dtype = DType::f32;
};

/// How many heads of the state share one of a tensor, as 2^32 / count rounded up, or 0 for 1: exact for heads below 2^16.
struct Group {
  std::uint32_t count, reciprocal;
};
Group make_group(std::int64_t count);

/// The fast kernels have strides of 32 bits where that is enough, which halves the address arithmetic. Each line of 64 bytes of
/// parameters that a launch touches is a miss in the constant cache, for which its warps wait: so what is wanted together, and
/// first of all for finding the slot, lies together. The first line has room for 48 bytes.
template <class Stride>
struct Params {
  Tensor<Stride, 1> read_slots, write_slots;
  std::uint32_t first_row;    ///< of this launch
  std::uint16_t span, warps;  ///< value rows of a warp, and warps of a block
  std::int32_t value_dim;
  bool initial_state, store_final;
  bool ahead;  ///< states are asked for before inputs, if the launch is a dependent one, before the one before it has ended
  /// decode, serving: states that are loaded stay in the L2 cache until they have been stored in the same place, and then leave
  /// it like anything else. Where not, what is stored leaves it first.
  bool keeps_states;

  Tensor<std::int64_t, 4> state_read;
  std::int64_t slots, null_slot;

  Tensor<Stride, 4> q, k, v, o;
  Tensor<Stride, 3> gate, beta;  ///< a or g, b or beta
  Tensor<Stride, 1> A_log, dt_bias;
  Group q_group, k_group, v_group;
  float l2_eps, softplus_beta, softplus_threshold, scale;
  DType state_dtype;
  GateForm gate_form;
  BetaForm beta_form;
  bool l2norm, store_tokens;
  bool vector_keys;  ///< q and k may be loaded 16 bytes at a time
  bool dependent;    ///< the launch may begin before the one before it has ended
  bool early;        ///< a dependent launch behind this one may begin as soon as this one has all that it waits for

  Tensor<std::int64_t, 4> state_write;
  std::int32_t heads;
  std::uint8_t preparing;    ///< chunks: warps of a block that do nothing else
  std::uint8_t share_bits;   ///< serving: 1 << share_bits warps have the same value rows
  std::uint32_t warp_bytes;  ///< of shared memory
  Fault* fault;              ///< the device's record
  std::int64_t rows, tokens;
  Tensor<Stride, 1> cu_seqlens;
  Tensor<Stride, 2> token_slots;
  Tensor<Stride, 1> accepted;
  Tensor<std::int64_t, 5> snapshots;
  std::int64_t token_room, snapshot_room;
  std::int32_t key_dim, slice_rows, slices;
};
using ForwardParams = Params<std::int64_t>;
using FastParams = Params<std::int32_t>;

constexpr int group_entries = 16;  ///< of a window, that a product takes at a time
__host__ __device__ constexpr int groups_of(int entries) { return (entries + group_entries - 1) / group_entries; }

/// Of a block of the kernel for chunks, as registers allow.
constexpr int chunks_max_warps(bool bfloat_inputs) { return bfloat_inputs ? 12 : 8; }

/// A ReplayWindow, in the order in which it is wanted.
template <class Stride>
struct WindowParams {
  std::int32_t capacity, ring;
  Tensor<Stride, 1> length;
  Tensor<Stride, 2> order;
  Tensor<Stride, 4> corrections, keys;
  Tensor<Stride, 3> decays;

  /// The most tokens of a row.
  __host__ __device__ int room() const { return capacity < ring - capacity ? capacity : ring - capacity; }
};

/// A call with a window.
template <class Call>
struct ReplayParams;
template <class Stride>
struct ReplayParams<Params<Stride>> : Params<Stride> {
  // The fast kernel: heads of a block, how many of them have a key and a query in common, warps that prepare tokens, and what
  // is in shared memory for a head and for those that share.
  std::uint32_t block_heads;
  Group team;
  std::uint32_t token_warps, head_bytes, team_bytes;
  Group teams;                  ///< of a block
  std::uint32_t entry_warps;    ///< for those of a team, a power of two
  std::uint32_t passed_tokens;  ///< of each row, in the passes before
  WindowParams<Stride> window;
  Tensor<Stride, 2> parent;
  /// The most tokens of a row that is no fault.
  __host__ __device__ int most_tokens() const {
    return this->tokens < window.room() ? static_cast<int>(this->tokens) : window.room();
  }
};

/// Whether a tensor's elements along dimension `along` can be moved `width` at a time, in pieces of 16 bytes or all together if
/// that is less.
template <int rank>
bool has_vectors(const Tensor<std::int64_t, rank>& tensor, int along, std::int64_t width) {
  const auto size = static_cast<std::int64_t>(size_of(tensor.dtype)), bytes = width * size < 16 ? width * size : 16;
  bool good =
      tensor.strides[along] == 1 && reinterpret_cast<std::uintptr_t>(tensor.data) % static_cast<std::uintptr_t>(bytes) == 0;
  for (int dim = 0; dim < rank; ++dim) good = good && (dim == along || tensor.strides[dim] * size % bytes == 0);
  return good;
}

/// The calls for windows alone; each has what it needs of this.
struct WindowCallParams {
  WindowParams<std::int64_t> window;
  Tensor<std::int64_t, 4> state, out;
  Tensor<std::int64_t, 1> slots;  ///< or those that a copy reads
  Tensor<std::int64_t, 1> to, accepted, cu_seqlens;
  Tensor<std::int64_t, 2> path;
  std::int64_t rows, pool, tokens, path_room, null_slot;
  std::int32_t heads, key_dim, value_dim, slice_rows, slices;
  Group k_group;
  Fault* fault;
};

struct CommitParams {
  Tensor<std::int64_t, 5> snapshots;
  Tensor<std::int64_t, 4> state;
  Tensor<std::int64_t, 1> accepted, write_slots;
  std::int64_t rows, room, slots, heads, key_dim, value_dim, null_slot;
  Fault* fault;
};

ForwardParams make_params(const Call& call);
/// False where a stride does not fit.
bool narrow(const ForwardParams& params, FastParams& out);
CommitParams make_params(const Config& config, const CommitArguments& arguments);
ReplayParams<ForwardParams> make_replay_params(const Call& call);
/// Nor where the places of a window are too far apart.
bool narrow(const ReplayParams<ForwardParams>& params, ReplayParams<FastParams>& out);
WindowCallParams make_params(const Config& config, const AcceptArguments& arguments);
WindowCallParams make_params(const Config& config, const ResetArguments& arguments);
WindowCallParams make_params(const Config& config, const FoldArguments& arguments);
WindowCallParams make_params(const Config& config, const ForkArguments& arguments);

/// Value rows of a block, from the sizes alone: results do not depend on the batch.
constexpr std::int64_t max_key_dim = 3584;  ///< one row of the state, q and k fit into 48 KiB of shared memory
constexpr std::int64_t rows_of_slice(std::int64_t key_dim, std::int64_t value_dim) {
  const std::int64_t fitting = key_dim > 4096 ? 1 : 4096 / key_dim;
  return fitting < value_dim ? fitting : value_dim;
}
/// With a window, whose new corrections are in shared memory as well.
constexpr std::int64_t rows_of_replayed_slice(std::int64_t key_dim, std::int64_t value_dim) {
  const std::int64_t rows = rows_of_slice(key_dim, value_dim);
  return rows < 64 ? rows : 64;
}

}  // namespace gatedelta::cuda
