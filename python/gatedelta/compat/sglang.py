# SPDX-License-Identifier: Apache-2.0
"""SGLang's fused decode and verify function (sglang's fused_sigmoid_gating_recurrent)."""

import torch

from ._call import commit, forward, reject, require

__all__ = ["fused_sigmoid_gating_delta_rule_update"]


def _per_token(gate, batch, tokens):
    """[B,T,HV] of a gate that may come as [B*T,HV]."""
    return gate if gate.dim() == 3 else gate.unflatten(0, (batch, tokens))


def fused_sigmoid_gating_delta_rule_update(
    A_log: torch.Tensor,
    a: torch.Tensor,
    dt_bias: torch.Tensor,
    softplus_beta: float,
    softplus_threshold: float,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    b: torch.Tensor,
    initial_state_source: torch.Tensor | None,
    initial_state_indices: torch.Tensor | None,
    scale: float | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    is_kda: bool = False,
    disable_state_update: bool = False,
    intermediate_states_buffer: torch.Tensor | None = None,
    intermediate_state_indices: torch.Tensor | None = None,
    cache_steps: int | None = None,
    retrieve_parent_token: torch.Tensor | None = None,
    cache_ring: bool = False,
    replayssm_rawv: torch.Tensor | None = None,
    replayssm_rawk: torch.Tensor | None = None,
    replayssm_g: torch.Tensor | None = None,
    replayssm_beta: torch.Tensor | None = None,
    lower_bound: float | None = None,
) -> torch.Tensor:
    """q, k [B,T,H,K]; v [B,T,HV,V]; a, b [B,T,HV] or [B*T,HV]; A_log, dt_bias [HV]. The pool initial_state_source
    [slots,HV,V,K] is read and, unless disable_state_update is set, written at initial_state_indices [N]; with cu_seqlens [N+1]
    B is 1. A negative index is padding: zeros in the output, no state is read or written.

    intermediate_states_buffer [rows,>=T,HV,V,K] takes the state after token t at [intermediate_state_indices[n], t] (with
    cu_seqlens, T is the length of the buffer, and entries past a sequence's end are undefined). Kimi Delta Attention (is_kda,
    lower_bound), tree drafts (retrieve_parent_token) and the raw-input ring (cache_ring) are not supported.

    Returns o [B,T,HV,V] of q's dtype.
    """
    reject(is_kda=is_kda, lower_bound=lower_bound, retrieve_parent_token=retrieve_parent_token, cache_ring=cache_ring)
    require(scale is None or scale > 0, "scale must be positive")
    batch, tokens = q.shape[:2]
    o = q.new_empty(v.shape)
    snapshots = None
    if intermediate_states_buffer is not None:
        rows = batch if cu_seqlens is None else len(cu_seqlens) - 1
        kept = tokens if cu_seqlens is None else intermediate_states_buffer.shape[1]
        snapshots = intermediate_states_buffer.new_zeros((rows, kept, *intermediate_states_buffer.shape[2:]))
    pool = initial_state_source
    forward(
        q, k, v, o, a=_per_token(a, batch, tokens), A_log=A_log, dt_bias=dt_bias, b=_per_token(b, batch, tokens), state=pool,
        read_slots=None if pool is None else initial_state_indices, cu_seqlens=cu_seqlens, snapshots=snapshots,
        update_state=pool is not None and not disable_state_update, scale=scale, qk_l2norm=use_qk_l2norm_in_kernel,
        softplus_beta=softplus_beta, softplus_threshold=softplus_threshold,
    )  # fmt: skip
    for t in range(0 if snapshots is None else snapshots.shape[1]):
        # Each step of the buffer is a pool of states, at the caller's own indices.
        commit(snapshots, torch.full_like(intermediate_state_indices, t + 1, dtype=torch.int32),
               intermediate_states_buffer[:, t], intermediate_state_indices)  # fmt: skip
    return o
