// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string_view>

#include "gatedelta/dtype.hpp"
#include "gatedelta/export.hpp"
#include "gatedelta/tensor.hpp"
#include "gatedelta/window.hpp"

/// The gated delta rule (Yang, Kautz, Hatamizadeh: "Gated Delta Networks", arXiv 2412.06464). For sequence n, token t, head h,
/// with a state S of V x K per head:
///
///     q^ = q / sqrt(sum q^2 + eps)        k^ = k / sqrt(sum k^2 + eps)       (if qk_l2norm)
///     g  = -exp(A_log[h]) * softplus(a + dt_bias[h])                         (GateForm::raw)
///     beta = sigmoid(b)                                                      (BetaForm::logits)
///     S <- exp(g) S
///     u  = beta (v - S k^)
///     S <- S + u k^T
///     o  = scale * S q^
///
/// Gates, beta, norms and all sums are computed in float32 or better, whatever the dtypes.
namespace gatedelta {

class Backend;

/// Where the decay exp(g) comes from.
enum class GateForm : std::uint8_t {
  raw,        ///< g = -exp(A_log[h]) * softplus(a + dt_bias[h]); dt_bias may be left out
  log_decay,  ///< g is given: the natural logarithm of the decay, normally <= 0
  none,       ///< g = 0: plain DeltaNet
};

/// Where beta comes from.
enum class BetaForm : std::uint8_t {
  logits,        ///< sigmoid(b)
  twice_logits,  ///< 2 * sigmoid(b): admits negative eigenvalues
  value,         ///< beta is given
  one,           ///< beta = 1
};

/// The dtype of each tensor, chosen independently: f32, f16 or bf16.
struct DTypes {
  DType q = DType::f32;          ///< of q
  DType k = DType::f32;          ///< of k
  DType v = DType::f32;          ///< of v
  DType o = DType::f32;          ///< of o, which may differ from v
  DType gate = DType::f32;       ///< of a or g
  DType beta = DType::f32;       ///< of b or beta
  DType A_log = DType::f32;      ///< of A_log
  DType dt_bias = DType::f32;    ///< of dt_bias
  DType state = DType::f32;      ///< of state, state_in and state_out
  DType snapshots = DType::f32;  ///< of snapshots
};

/// What is fixed for the life of an operator.
struct GATEDELTA_API Config {
  /// HQ, HK, HV. H = max of the three is the number of state and output heads, and each count must divide H: head h
  /// reads query head h / (H/HQ), key head h / (H/HK), value head h / (H/HV). HV > HQ is GVA, HQ > HV is GQA.
  std::int64_t q_heads = 0;
  std::int64_t k_heads = 0;          ///< HK
  std::int64_t v_heads = 0;          ///< HV
  std::int64_t key_dim = 0;          ///< K
  std::int64_t value_dim = 0;        ///< V
  DTypes dtypes{};                   ///< of each tensor
  GateForm gate = GateForm::raw;     ///< where the decay comes from
  BetaForm beta = BetaForm::logits;  ///< where beta comes from
  bool qk_l2norm = true;             ///< q and k are normalised first
  double l2_eps = 1e-6;              ///< added to the sum of squares, inside the root
  std::optional<double> scale{};     ///< of the output; 1/sqrt(K) if not set
  double softplus_beta = 1.0;        ///< softplus(x) = log(1 + exp(softplus_beta * x)) / softplus_beta
  double softplus_threshold = 20.0;  ///< softplus(x) = x where softplus_beta * x is above this
  /// A slot <= null_slot marks padding. Engines that reserve slot 0 set 0.
  std::int64_t null_slot = -1;
  /// Threads of the host backends; 0 takes OpenMP's own default. Results do not depend on it.
  int num_threads = 0;

  std::int64_t heads() const noexcept;      ///< H
  double effective_scale() const noexcept;  ///< scale, or 1/sqrt(K)
};

/// One call. All tensors are strided views and stay the caller's; they must all live on one device. A tensor that is left
/// out is a default-constructed view. With cu_seqlens, B is 1 and every per-row tensor (slots, accepted, state_in,
/// state_out, snapshots) has N rows, one for each sequence; without it, N = B.
///
/// The state comes from exactly one of
///   - a pool: `state`, rows picked by `read_slots` (or by `accepted` out of `token_slots`; with neither, row n has slot n);
///   - `state_in`, one state a row;
///   - neither: zero.
/// and goes to
///   - the pool: after the last token to `write_slots` (default: the slot that was read), and after token t to
///     `token_slots[n,t]` where these are given; then the last state is stored only if write_slots is given as well;
///   - `state_out`, one state a row (may be the same memory as state_in).
/// A row of no tokens hands on its state unchanged.
///
/// With a `window` (see window.hpp), `state` holds the checkpoints and `read_slots` pick checkpoint and window of each row; the
/// tokens are appended to the windows and the state is stored only where a row is folded. write_slots, token_slots, accepted,
/// snapshots and update_state = false do not go with it. A row has at most W tokens. Between two `accept`s each layer is run
/// once for a slot: a second call would fold a second time.
///
/// Padding: a row whose read slot is <= null_slot writes zeros to its rows of `o`, and nothing else of it is looked at.
/// A write or token slot <= null_slot only skips that store. Tokens outside every sequence of cu_seqlens get zeros in `o`.
///
/// A slot >= the pool's size, `accepted` outside 1..S, bad cu_seqlens, and two rows that store to one slot are errors: the host
/// backends throw before they touch anything. On the host each row reads the pool as it was before the call; on a device the
/// content of a slot that one row stores to while another row reads it is undefined for the latter, as is that of a slot that
/// two rows store to.
///
/// With a window, a length outside 0..W, an order that is no permutation, a parent that is not an earlier token, and two rows
/// of one slot are errors as well.
struct Arguments {
  TensorView q;  ///< [B,T,HQ,K]
  TensorView k;  ///< [B,T,HK,K]
  TensorView v;  ///< [B,T,HV,V]
  TensorView o;  ///< written: [B,T,H,V]

  TensorView a;        ///< [B,T,H], GateForm::raw
  TensorView g;        ///< [B,T,H], GateForm::log_decay: natural logarithm of the decay
  TensorView A_log;    ///< [H], GateForm::raw
  TensorView dt_bias;  ///< [H], optional with GateForm::raw
  TensorView b;        ///< [B,T,H], BetaForm::logits and twice_logits
  TensorView beta;     ///< [B,T,H], BetaForm::value

  TensorView state;        ///< read and written: [slots,H,V,K]
  TensorView read_slots;   ///< [N], i32 or i64
  TensorView write_slots;  ///< [N], i32 or i64
  TensorView token_slots;  ///< [N,S], S >= T, i32 or i64
  TensorView accepted;     ///< [N], i32, 1..S: row n starts from slot token_slots[n, accepted[n]-1]

  TensorView state_in;   ///< [N,H,V,K], instead of a pool
  TensorView state_out;  ///< written: [N,H,V,K], instead of a pool

  TensorView snapshots;   ///< written: [N,>=T,H,V,K], the state after each token
  TensorView cu_seqlens;  ///< [N+1], i32 or i64: sequence n is tokens cu_seqlens[n] to cu_seqlens[n+1]-1 of the one batch row

  const ReplayWindow* window = nullptr;  ///< of this layer; only looked at during the call
  TensorView parent;                     ///< [B,T] i32, with a window: the token's predecessor in its row's draft tree, an
                                         ///< earlier token of the row or -1 for the window's last entry; default: a chain

  bool update_state = true;  ///< false: the pool is only read (no final and no token stores); snapshots are still written

  void* stream = nullptr;  ///< cudaStream_t for device backends; host backends ignore it
  /// cuda: the kernel may begin before the one before it on the stream has ended (programmatic dependent launch). Then q, k, v,
  /// a or g, and b or beta may be outputs of that kernel, but everything else (states, slots, parameters, a window and its
  /// record) must have been there before it began: so the first call behind an accept must be no such launch. A kernel of this
  /// library lets the next one begin only when it need not wait itself any more: so what the kernel before it wrote is there.
  /// Other backends ignore it.
  bool dependent_launch = false;
  void* workspace = nullptr;       ///< at least workspace_size(...) bytes on the tensors' device, 256-byte aligned
  std::size_t workspace_size = 0;  ///< bytes of workspace
};

/// After speculative verification with snapshots: state[write_slots[n]] = snapshots[n, accepted[n]-1].
/// Rows with a write slot <= null_slot are skipped.
struct CommitArguments {
  TensorView snapshots;    ///< [N,S,H,V,K]
  TensorView accepted;     ///< [N], i32, 1..S
  TensorView state;        ///< written: [slots,H,V,K]
  TensorView write_slots;  ///< [N], i32 or i64
  void* stream = nullptr;  ///< as in Arguments
};

/// The operator: configured once, called many times, also from several threads at once. It holds no state of the sequences.
class GATEDELTA_API GatedDeltaRule {
 public:
  /// `backend` is a registered backend's name, or "auto": for each call the first backend that is available, supports the
  /// problem and can reach the tensors' memory. Empty: the environment variable GATEDELTA_BACKEND, or else auto.
  /// Throws Error(invalid_argument) for a bad configuration or an unknown name, Error(unsupported) for a backend that is
  /// not available here; both list what there is. There is no silent fallback.
  explicit GatedDeltaRule(const Config& config, std::string_view backend = {});
  /// With a backend the caller holds, registered or not; it must outlive the operator.
  GatedDeltaRule(const Config& config, Backend& backend);

  /// What it was made with.
  const Config& config() const noexcept { return config_; }

  /// Checks everything that can be checked on the host, then runs. Throws Error; a call that fails has changed nothing.
  /// Host backends have finished when it returns; device backends have enqueued their work on `arguments.stream`.
  void forward(const Arguments& arguments) const;
  /// Copies accepted snapshots into the pool; checks and runs as forward() does.
  void commit(const CommitArguments& arguments) const;

  /// Keeps the accepted tokens of the last forward() in the replay windows: once for all layers, which share the record.
  void accept(const AcceptArguments& arguments) const;
  /// Empties replay windows: once for all layers.
  void reset(const ResetArguments& arguments) const;
  /// Folds replay windows of one layer into its checkpoints; `out` must not be given.
  void fold(const FoldArguments& arguments) const;
  /// Writes the states of one layer that checkpoints and windows stand for to `out`; changes nothing else.
  void state_of(const FoldArguments& arguments) const;
  /// Forks sequences: those of one layer, or the record.
  void copy(const ForkArguments& arguments) const;

  /// Bytes of workspace that forward() of these arguments needs (0 for the host backends).
  std::size_t workspace_size(const Arguments& arguments) const;
  /// The backend that forward() of these arguments uses.
  Backend& backend_for(const Arguments& arguments) const;

 private:
  Config config_;
  Backend* backend_ = nullptr;  // null: choose for each call
};

}  // namespace gatedelta
