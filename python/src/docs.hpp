// SPDX-License-Identifier: Apache-2.0
#pragma once

// Signatures and docstrings of the Python functions; type stubs are generated from them.
namespace gatedelta::python {

inline constexpr const char* forward_signature =
    "def forward(q: Array, k: Array, v: Array, o: Array | None = None, *, a: Array | None = None, A_log: Array | None = None, "
    "dt_bias: Array | None = None, g: Array | None = None, b: Array | None = None, beta: Array | None = None, "
    "state: Array | None = None, read_slots: Array | None = None, write_slots: Array | None = None, "
    "token_slots: Array | None = None, accepted: Array | None = None, state_in: Array | None = None, "
    "state_out: Array | bool | None = None, snapshots: Array | bool | None = None, cu_seqlens: Array | None = None, "
    "window: ReplayWindow | None = None, layer: int = 0, parent: Array | None = None, update_state: bool = True, scale: float "
    "| None = None, qk_l2norm: bool = True, l2_eps: float = 1e-6, "
    "softplus_beta: float = 1.0, softplus_threshold: float = 20.0, negative_eigenvalues: bool = False, null_slot: int = -1, "
    "num_threads: int = 0, backend: str | None = None, stream: int | None = None) -> Any";

inline constexpr const char* forward_doc = R"(The gated delta rule over the tokens of a batch.

For each sequence, token and head, with a state S of V x K:

    q^ = q / sqrt(sum q^2 + l2_eps)     k^ = k / sqrt(sum k^2 + l2_eps)    (if qk_l2norm)
    g  = -exp(A_log) * softplus(a + dt_bias)                               (if a is given)
    beta = sigmoid(b), twice that with negative_eigenvalues                (if b is given)
    S <- exp(g) S;   u = beta (v - S k^);   S <- S + u k^T;   o = scale * S q^

All arrays are on one device and may have any strides; none is copied. H = max(HQ, HK, HV), and head h reads query head
h // (H/HQ), and so on. Floating arrays are float32, float16 or bfloat16, each as it likes; indices are int32 or int64.

Tensors:
    q, k, v       [B,T,HQ,K], [B,T,HK,K], [B,T,HV,V]
    o             [B,T,H,V], written; a new array with the dtype of v where it is left out
    a, A_log, dt_bias   [B,T,H], [H], [H]: the raw gate (dt_bias optional); or
    g             [B,T,H]: the natural logarithm of the decay; neither a nor g: no decay
    b             [B,T,H]: logits of beta; or beta [B,T,H]: its values; neither: 1
    state         [slots,H,V,K]: a pool, read and written in place. For storage [slots,H,K,V] pass the transposed view
    read_slots    [N]: the pool slot of each row; row n has slot n where it is left out
    write_slots   [N]: where the last state goes; the slot that was read where it is left out
    token_slots   [N,S], S >= T: the state after token t goes to slot token_slots[n,t], and then the last one to
                  write_slots only where those are given
    accepted      [N] int32, 1..S, instead of read_slots: row n starts from slot token_slots[n, accepted[n]-1]
    state_in      [N,H,V,K], instead of a pool; no state at all is a zero state
    state_out     [N,H,V,K], written, or True for a new array (dtype of state_in, else float32)
    snapshots     [N,>=T,H,V,K], written: the state after each token; or True for a new array (dtype of the state, else float32)
    window        a ReplayWindow, whose states take the place of `state`: read_slots pick states and windows of the rows, the
                  tokens are appended, and states are written only where a window is full; `layer`: which of its layers
    parent        [B,T] int32, with a window: the token's predecessor in a draft tree, an earlier token of its row or -1
    cu_seqlens    [N+1]: sequence n is tokens cu_seqlens[n] to cu_seqlens[n+1]-1 of the one batch row (B = 1). Otherwise N = B

Options:
    update_state  False: the pool is only read
    scale         1/sqrt(K) where it is None
    null_slot     a slot <= null_slot is padding: zeros in o, nothing else of the row is read or written
    num_threads   of the host backends; 0: OpenMP's own number
    backend       a name from backends(), or "auto"; None: the environment variable GATEDELTA_BACKEND, or else auto
    stream        a cudaStream_t as an integer; None: the current stream of the arrays' library

Returns o, or (o, state_out), (o, snapshots), (o, state_out, snapshots) where these are asked for by True.

Host arrays: the work is done on return. CUDA arrays: it is enqueued on the stream; bad slots become an error in check(). The
GIL is released. JAX arrays cannot be changed, so that o, state_out and snapshots are always new and `state` needs
update_state=False; on CUDA a call on them is a compiled program of XLA's and waits for nothing. Not differentiable.

Raises InvalidArgument, Unsupported, OutOfMemory or DeviceError, all of them Error.)";

inline constexpr const char* window_doc = R"(Replay windows: a step reads the states and does not write them.

A slot keeps the last tokens (key, correction, decay) beside its state, which is then brought up to date about once in `capacity`
tokens, and speculative decoding takes tokens back by setting a length. For each step:

    forward(q, k, v, ..., read_slots=slots, window=window, layer=i)    once for each layer
    window.accept(accepted, slots, tokens=T)                           once, for all layers

Prefill a new sequence by forward(..., state=states[i]) after reset() of its slot.

Arguments:
    states      the pool [slots,H,V,K], or a list with one for each layer; kept, and written in place
    k_heads     HK of the calls
    capacity    W: the entries of a slot, 4 to 64; a call has at most W tokens for each row
    entries     "bfloat16" or "float32": of keys (as given, so that bfloat16 keys lose nothing) and corrections
    max_tokens  the most tokens of a row in one call, 1 to W; 0: W
    null_slot, backend, stream: as in forward()

The memory is of the library and on the device of the states. Raises Unsupported where no backend there has windows.)";

inline constexpr const char* window_signature =
    "def __init__(self, states: Array | Sequence[Array], *, k_heads: int, capacity: int = 16, entries: str = 'bfloat16', "
    "max_tokens: int = 0, null_slot: int = -1, backend: str | None = None, stream: int | None = None) -> None";

inline constexpr const char* over_signature =
    "def over(states: Array | Sequence[Array], record: tuple[Array, Array], layers: list[tuple[Array, Array, Array]], *, "
    "capacity: int, null_slot: int = -1, backend: str | None = None) -> ReplayWindow";

inline constexpr const char* over_doc =
    R"(Windows in arrays of the caller's, which are kept; nothing is written. reset() comes first.

    states      as for a new ReplayWindow
    record      length [slots] and order [slots,R], int32; R = capacity + the most tokens of a row in one call
    layers      keys [slots,HK,R,K], corrections [slots,H,R,V] (bfloat16 or float32) and decays [slots,H,R] (float32) of each layer)";

inline constexpr const char* accept_signature =
    "def accept(self, accepted: Array, slots: Array | None = None, *, tokens: int | None = None, "
    "cu_seqlens: Array | None = None, path: Array | None = None, stream: int | None = None) -> None";

inline constexpr const char* accept_doc = R"(Keeps accepted tokens of the last step, in all layers.

    accepted    [N] int32, 0..T: how many tokens of row n stay
    slots       [N] int32 or int64, read_slots of the step; row n has slot n where it is left out
    tokens      T of the step; or
    cu_seqlens  [N+1], those of the step
    path        [N,>=accepted] int32, with trees: which tokens stay, ascending; the first ones where it is left out)";

inline constexpr const char* reset_signature =
    "def reset(self, slots: Array | None = None, *, stream: int | None = None) -> None";

inline constexpr const char* reset_doc =
    R"(Empties the windows of slots [N] (all where it is left out), for new sequences. New windows are empty.)";

inline constexpr const char* fold_signature = "def fold(self, slots: Array, *, stream: int | None = None) -> None";

inline constexpr const char* fold_doc =
    R"(Brings the states of slots [N] up to date in all layers and empties their windows: before a state is copied or sent.)";

inline constexpr const char* state_of_signature =
    "def state_of(self, slots: Array, out: Array | None = None, *, layer: int = 0, stream: int | None = None) -> Any";

inline constexpr const char* state_of_doc = R"(The states of slots [N] as they would be without a window; changes nothing.

    out     [N,H,V,K], written, zeros for slots <= null_slot; a new array with the states' dtype where it is left out

Returns out.)";

inline constexpr const char* copy_signature =
    "def copy(self, from_slots: Array, to_slots: Array, *, stream: int | None = None) -> None";

inline constexpr const char* copy_doc =
    R"(Forks sequences: slot to_slots[n] becomes a copy of from_slots[n] ([N] each), states and windows of all layers. No slot may be
both read and written, and none written twice.)";

inline constexpr const char* commit_signature =
    "def commit(snapshots: Array, accepted: Array, state: Array, write_slots: Array, *, null_slot: int = -1, "
    "backend: str | None = None, stream: int | None = None) -> None";

inline constexpr const char* commit_doc =
    R"(Ends a speculative step: state[write_slots[n]] = snapshots[n, accepted[n]-1].

    snapshots     [N,S,H,V,K], as forward() has written them
    accepted      [N] int32, 1..S
    state         [slots,H,V,K], written
    write_slots   [N] int32 or int64; a slot <= null_slot skips the row)";

inline constexpr const char* check_signature = "def check(array: Array, *, stream: int | None = None) -> None";

inline constexpr const char* check_doc =
    R"(Waits for the stream (of the library and device of `array`) and raises DeviceError if a kernel met a bad slot, count or
sequence since the last check. Host backends raise at the call itself.)";

}  // namespace gatedelta::python
