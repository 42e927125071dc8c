// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

#include "gatedelta/dtype.hpp"
#include "gatedelta/export.hpp"
#include "gatedelta/tensor.hpp"

/// Replay windows: a step reads the state and does not write it. A slot of the pool keeps a checkpoint S0 of its state, and
/// beside it, the window has what the last P <= W tokens did to it: the key k, the correction u and the log decay g of each.
/// The key is the one that was given, before its norm: a bf16 key is a bf16 entry as it is, without rounding. The correction is
/// u = r beta (v - S k^), with the factor r that the norm multiplies k with (k^ = r k; r = 1 without Config::qk_l2norm), so
/// that u k^T is what the token added to the state. The state they stand for is what S0 becomes by
///
///     S <- exp(g_j) S + u_j k_j^T        for j = 0 .. P-1
///
/// Other tokens, of the same call too, see a key and a correction as they are stored; a token's own output is computed before
/// they are rounded. Entries have the range of float32: r and k must not leave it (norms of k from 1e-30 to 1e30 do not).
///
/// `GatedDeltaRule::forward` with `Arguments::window` appends its T tokens behind the P that are there; a row whose P + T is
/// above W first folds its P entries into the checkpoint. It does not change P: `accept` does, once a step and for all layers
/// of a model together, when it is known how many of the T tokens stay. So rejected tokens cost nothing.
///
/// Where entries lie is given by the record, which all layers share: entry j of a slot is at place order[slot, j] of its ring
/// of R > W places. Places behind the P entries are free; new entries go there, so that nothing is overwritten that another
/// part of the same call may still read. Accepting a path of a draft tree changes the order only, and moves no entry.
namespace gatedelta {

struct Config;

inline constexpr std::int64_t min_window = 4;   ///< the smallest W
inline constexpr std::int64_t max_window = 64;  ///< the largest W

/// What the windows of all layers share. A plain forward call on the same pool (a prefill, say) is right for slots of length 0.
struct WindowRecord {
  std::int64_t capacity = 0;  ///< W, min_window to max_window
  TensorView length{};        ///< [slots] i32: P, the entries of each slot
  TensorView order{};         ///< [slots,R] i32: a permutation of 0..R-1 for each slot; `reset` makes the first one
};

/// The windows of one layer. The last two dimensions are dense and the strides of heads as if dense; that of the slots is free.
/// The decay is each token's own: what lies between two entries is a sum of their decays, which is exact where differences of
/// cumulative ones would cancel, or be NaN for a decay of zero.
struct ReplayWindow {
  TensorView keys{};         ///< [slots,HK,R,K] f32 or bf16: as given, not normalised
  TensorView corrections{};  ///< [slots,H,R,V], same dtype: times the norm factor of the key
  TensorView decays{};       ///< [slots,H,R] f32: g
  WindowRecord record{};     ///< what all layers share
};

/// Sizes of the windows of one layer and of the record. Each tensor begins at a multiple of 256 bytes.
struct WindowLayout {
  std::int64_t capacity = 0;                  ///< W
  std::int64_t ring = 0;                      ///< R = W + the most tokens of a step
  DType entries = DType::bf16;                ///< of keys and corrections
  std::array<std::int64_t, 4> keys{};         ///< shape of ReplayWindow::keys
  std::array<std::int64_t, 4> corrections{};  ///< shape of ReplayWindow::corrections
  std::array<std::int64_t, 3> decays{};       ///< shape of ReplayWindow::decays
  std::array<std::int64_t, 2> order{};        ///< shape of WindowRecord::order; length has its first size
  std::size_t layer_bytes = 0;                ///< keys, corrections and decays of one layer
  std::size_t record_bytes = 0;               ///< length and order, once for all layers
};

/// `max_tokens`: the most tokens of a row in one call, 1 to W; 0: W. Throws Error(invalid_argument) for sizes out of range and
/// entry dtypes other than f32 and bf16.
GATEDELTA_API WindowLayout window_layout(const Config& config, std::int64_t slots, std::int64_t capacity,
                                         DType entries = DType::bf16, std::int64_t max_tokens = 0);
/// Views of `layer_bytes` and `record_bytes` of the caller's memory, 256-byte aligned. The record has to be `reset` once.
/// Without a layer (null) it is the record alone, for the calls that need no more.
GATEDELTA_API ReplayWindow window_at(const WindowLayout& layout, void* layer, void* record, Device device = {});

/// Once a step, after forward() of all layers: slot n keeps `accepted[n]` of its T tokens, so that its length becomes
/// (P + T > W ? 0 : P) + accepted[n]. T must be that of the forward calls. Nothing but the record is read or written.
struct AcceptArguments {
  WindowRecord record{};    ///< what all layers share
  TensorView slots{};       ///< [N], i32 or i64; not given: row n has slot n. Slots <= null_slot are skipped
  TensorView accepted{};    ///< [N] i32, 0..T
  std::int64_t tokens = 0;  ///< T of each row, unless cu_seqlens are given
  TensorView cu_seqlens{};  ///< [N+1], i32 or i64, as in forward()
  TensorView path{};        ///< optional, for trees: [N,>=accepted] i32: which tokens stay, ascending; else the first ones
  void* stream = nullptr;   ///< cudaStream_t for device backends
};

/// Empties the windows of slots: length 0, order 0..R-1. A slot that starts a new sequence needs it, and every slot once.
struct ResetArguments {
  WindowRecord record{};   ///< what all layers share
  TensorView slots{};      ///< [N], i32 or i64; not given: all. Slots <= null_slot are skipped
  void* stream = nullptr;  ///< cudaStream_t for device backends
};

/// The states that checkpoints and entries of a layer stand for: to `out` row by row if that is given, otherwise in place of
/// the checkpoints. The lengths do not change; after the checkpoints of all layers are folded, `reset` must follow.
struct FoldArguments {
  ReplayWindow window{};   ///< of the layer
  TensorView state{};      ///< [slots,H,V,K], written unless `out` is given
  TensorView slots{};      ///< [N], i32 or i64; slots <= null_slot are skipped
  TensorView out{};        ///< [N,H,V,K], f32, f16 or bf16; rows of skipped slots are zeroed
  void* stream = nullptr;  ///< cudaStream_t for device backends
};

/// Forks sequences: slot to[n] becomes a copy of slot from[n], checkpoint and entries of one layer (`state` and `window`), or,
/// if `window` has no tensors but the record, the record. All layers and the record must be copied. No slot may be both read
/// and written, and none written twice. Rows where either slot is <= null_slot are skipped.
struct ForkArguments {
  ReplayWindow window{};   ///< of the layer
  TensorView state{};      ///< [slots,H,V,K]; not given: copies the record
  TensorView from{};       ///< [N], i32 or i64
  TensorView to{};         ///< [N], i32 or i64
  void* stream = nullptr;  ///< cudaStream_t for device backends
};

}  // namespace gatedelta
