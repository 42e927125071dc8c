# SPDX-License-Identifier: Apache-2.0
"""FlashInfer's gated delta rule functions (flashinfer.gdn_decode)."""

import warnings

import torch

from ._call import forward, require

__all__ = ["gated_delta_rule_decode", "gated_delta_rule_decode_pretranspose", "gated_delta_rule_mtp"]


def _output(output, q, v):
    """The given tensor, or a new one of q's dtype."""
    return output if output is not None else q.new_empty(v.shape)


def gated_delta_rule_decode_pretranspose(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    state: torch.Tensor | None,
    A_log: torch.Tensor,
    a: torch.Tensor,
    dt_bias: torch.Tensor,
    b: torch.Tensor,
    scale: float | None = None,
    output: torch.Tensor | None = None,
    use_qk_l2norm: bool = True,
    initial_state: torch.Tensor | None = None,
    initial_state_indices: torch.Tensor | None = None,
    output_state_indices: torch.Tensor | None = None,
    *,
    intermediate_states_buffer: torch.Tensor | None = None,
    disable_state_update: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One or more tokens; the state is V-major and updated in place.

    q, k [B,T,H,K]; v [B,T,HV,V]; a, b [B,T,HV]; A_log, dt_bias [HV]. Either state [B,HV,V,K], or the pool initial_state
    [slots,HV,V,K] with initial_state_indices [B] and, where they are written to other slots, output_state_indices [B].
    intermediate_states_buffer [>=B,>=T,HV,V,K] takes the state after each token (T > 1).

    A negative index is padding for every state dtype: zeros in the output, no state is read or written.

    Returns (output [B,T,HV,V] of q's dtype, the state or pool that was given).
    """
    batch, tokens = q.shape[:2]
    pooled = initial_state is not None
    if tokens == 1 and (intermediate_states_buffer is not None or disable_state_update):
        raise ValueError("intermediate_states_buffer and disable_state_update: supported only with T > 1")
    require(
        pooled == (initial_state_indices is not None),
        "initial_state and initial_state_indices must be provided together",
    )
    require(pooled or state is not None, "Either state or initial_state must be provided")
    require(pooled or output_state_indices is None, "output_state_indices can only be used with initial_state (pool mode)")
    require(
        pooled or state.shape[0] == batch,
        f"state: expected [{batch}, HV, V, K], got {None if pooled else tuple(state.shape)}",
    )
    pool = initial_state if pooled else state
    output = _output(output, q, v)
    forward(
        q, k, v, output, a=a, A_log=A_log, dt_bias=dt_bias, b=b, scale=scale, qk_l2norm=use_qk_l2norm, state=pool,
        read_slots=initial_state_indices, write_slots=None if disable_state_update else output_state_indices,
        snapshots=None if intermediate_states_buffer is None else intermediate_states_buffer[:batch],
        update_state=not disable_state_update,
    )  # fmt: skip
    return output, pool


def gated_delta_rule_decode(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    state: torch.Tensor,
    A_log: torch.Tensor,
    a: torch.Tensor,
    dt_bias: torch.Tensor,
    b: torch.Tensor,
    scale: float | None = None,
    output: torch.Tensor | None = None,
    use_qk_l2norm: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token; the state [B,HV,K,V] is K-major and updated in place, whatever its strides.

    Returns (output [B,1,HV,V] of q's dtype, state).
    """
    require(q.shape[1] == 1, f"Decode only supports T=1, got T={q.shape[1]}")
    output, _ = gated_delta_rule_decode_pretranspose(
        q, k, v, state.transpose(-1, -2), A_log, a, dt_bias, b, scale, output, use_qk_l2norm
    )
    return output, state


def gated_delta_rule_mtp(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    initial_state: torch.Tensor,
    initial_state_indices: torch.Tensor,
    A_log: torch.Tensor,
    a: torch.Tensor,
    dt_bias: torch.Tensor,
    b: torch.Tensor,
    scale: float | None = None,
    output: torch.Tensor | None = None,
    intermediate_states_buffer: torch.Tensor | None = None,
    ssm_state_indices: torch.Tensor | None = None,
    disable_state_update: bool | None = None,
    use_qk_l2norm: bool = True,
    output_state_indices: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Several tokens for speculative verification, on the pool initial_state [slots,HV,V,K].

    The state after token t goes to intermediate_states_buffer[i,t] ([>=B,>=T,HV,V,K], by batch row), or to pool slot
    ssm_state_indices[i,t] ([B,T] int32, T >= 2; the last state then goes nowhere else). disable_state_update left out means
    True, with a warning. A negative initial_state_indices entry is padding: the output row becomes zero; a negative
    output_state_indices or ssm_state_indices entry skips that store.

    Returns (output [B,T,HV,V] of q's dtype, initial_state).
    """
    if disable_state_update is None:
        warnings.warn(
            "gated_delta_rule_mtp: disable_state_update defaults to True; pass it, as the default is going to change",
            FutureWarning,
            stacklevel=2,
        )
        disable_state_update = True
    batch, tokens = q.shape[:2]
    if ssm_state_indices is not None:
        require(
            intermediate_states_buffer is None,
            "ssm_state_indices and intermediate_states_buffer are mutually exclusive",
        )
        require(not disable_state_update, "ssm_state_indices requires state writes; disable_state_update must be False")
        require(tokens >= 2, f"ssm_state_indices requires T >= 2 (got T={tokens})")
        require(
            ssm_state_indices.shape == (batch, tokens),
            f"ssm_state_indices must have shape [{batch}, {tokens}], got {tuple(ssm_state_indices.shape)}",
        )
        require(
            ssm_state_indices.dtype == torch.int32,
            f"ssm_state_indices must be int32, got {ssm_state_indices.dtype}",
        )
    scattered = ssm_state_indices is not None
    output = _output(output, q, v)
    forward(
        q, k, v, output, a=a, A_log=A_log, dt_bias=dt_bias, b=b, scale=scale, qk_l2norm=use_qk_l2norm, state=initial_state,
        read_slots=initial_state_indices, token_slots=ssm_state_indices,
        write_slots=None if disable_state_update or scattered else output_state_indices,
        snapshots=None if intermediate_states_buffer is None else intermediate_states_buffer[:batch],
        update_state=not disable_state_update,
    )  # fmt: skip
    return output, initial_state
