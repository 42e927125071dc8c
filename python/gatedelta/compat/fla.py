# SPDX-License-Identifier: Apache-2.0
"""Flash Linear Attention's gated delta rule functions (fla.ops.gated_delta_rule), forward only.

Both are the same operator here, so that the chunked and the recurrent form differ by rounding alone.
"""

import warnings

import torch

from ._call import forward, reject

__all__ = ["chunk_gated_delta_rule", "chunk_gdn", "fused_recurrent_gated_delta_rule", "fused_recurrent_gdn"]


def _gated_delta_rule(q, k, v, g, beta, scale, initial_state, output_final_state, l2norm, gate, A_log, dt_bias, sigmoid,
                      allow_neg_eigval, state_v_first, cu_seqlens):  # fmt: skip
    if cu_seqlens is not None:
        if q.shape[0] != 1:
            raise ValueError(
                f"The batch size is expected to be 1 rather than {q.shape[0]} when using `cu_seqlens`."
                f"Please flatten variable-length inputs before processing."
            )
        if initial_state is not None and initial_state.shape[0] != len(cu_seqlens) - 1:
            raise ValueError(
                f"The number of initial states is expected to be equal to the number of input sequences, "
                f"i.e., {len(cu_seqlens) - 1} rather than {initial_state.shape[0]}."
            )
    if allow_neg_eigval and not sigmoid:
        raise ValueError("`allow_neg_eigval=True` requires `use_beta_sigmoid_in_kernel=True`.")
    if gate and (A_log is None or g is None):
        raise ValueError("`A_log` and `g` must be provided when `use_gate_in_kernel=True`.")
    if beta is not None and beta.dim() == 4:
        reject(beta_per_value_channel=True)
    gates = {"a": g, "A_log": A_log, "dt_bias": dt_bias} if gate else {"g": g}
    betas = {"b": beta, "negative_eigenvalues": allow_neg_eigval} if sigmoid else {"beta": beta}

    def value_first(state):
        return state if state_v_first else state.transpose(-1, -2)

    states, final_state = {}, None
    if initial_state is not None:
        states["state_in"] = value_first(initial_state.float())  # the final state is float32, and the two have one dtype
    if output_final_state:
        rows = q.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
        sizes = (v.shape[3], q.shape[3]) if state_v_first else (q.shape[3], v.shape[3])
        final_state = q.new_empty((rows, v.shape[2], *sizes), dtype=torch.float32)
        states["state_out"] = value_first(final_state)
    o = forward(q, k, v, **gates, **betas, **states, scale=scale, qk_l2norm=l2norm, cu_seqlens=cu_seqlens)
    return o, final_state


def _renamed(state_v_first, kwargs):
    if "transpose_state_layout" not in kwargs:
        return state_v_first
    if state_v_first:
        raise ValueError("Cannot pass both `state_v_first` and the deprecated `transpose_state_layout`.")
    warnings.warn("`transpose_state_layout` is renamed to `state_v_first`.", DeprecationWarning, stacklevel=3)
    return kwargs["transpose_state_layout"]


def fused_recurrent_gated_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None = None,
    gk: torch.Tensor | None = None,
    gv: torch.Tensor | None = None,
    beta: torch.Tensor | None = None,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    A_log: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """q, k [B,T,H,K]; v [B,T,HV,V]; g [B,T,HV], the log decay, or with use_gate_in_kernel its raw input; beta [B,T,HV];
    initial_state [N,HV,K,V] ([N,HV,V,K] with state_v_first). gk, gv and a beta per value channel are not supported.

    Returns (o [B,T,HV,V] of v's dtype, final state in float32 or None).
    """
    reject(gk=gk, gv=gv)
    return _gated_delta_rule(
        q, k, v, g, beta, scale, initial_state, output_final_state, use_qk_l2norm_in_kernel, use_gate_in_kernel, A_log, dt_bias,
        use_beta_sigmoid_in_kernel, allow_neg_eigval, _renamed(state_v_first, kwargs), cu_seqlens,
    )  # fmt: skip


def chunk_gated_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    cu_seqlens_cpu: torch.Tensor | None = None,
    chunk_indices: torch.Tensor | None = None,
    cp_context=None,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As fused_recurrent_gated_delta_rule, for long sequences. use_gate_in_kernel, A_log and dt_bias are keyword arguments;
    cu_seqlens_cpu, chunk_indices and chunk_size are not needed and ignored; cp_context is not supported.

    Returns (o [B,T,HV,V] of v's dtype, final state in float32 or None).
    """
    reject(cp_context=cp_context)
    heads, value_heads = q.shape[2], v.shape[2]
    if k.shape[2] != heads:
        raise ValueError(f"q and k must have the same number of heads, but got {heads} and {k.shape[2]}")
    if value_heads % heads != 0:
        raise ValueError(f"For GVA, num_v_heads (HV={value_heads}) must be evenly divisible by num_heads (H={heads})")
    if "head_first" in kwargs:
        raise DeprecationWarning("head_first has been removed. Inputs must be in `[B, T, H, ...]` format.")
    if kwargs.get("chunk_size", 64) not in (16, 32, 64):
        raise ValueError(f"`chunk_size` must be 16, 32, or 64 for Gated Delta Rule, got {kwargs['chunk_size']}.")
    gate = kwargs.get("use_gate_in_kernel", False)
    return _gated_delta_rule(
        q, k, v, g, beta, scale, initial_state, output_final_state, use_qk_l2norm_in_kernel, gate, kwargs.get("A_log"),
        kwargs.get("dt_bias"), use_beta_sigmoid_in_kernel, allow_neg_eigval, _renamed(state_v_first, kwargs), cu_seqlens,
    )  # fmt: skip


fused_recurrent_gdn = fused_recurrent_gated_delta_rule
chunk_gdn = chunk_gated_delta_rule
