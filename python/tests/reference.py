# SPDX-License-Identifier: Apache-2.0
"""The equations of the operator in NumPy, float64, and random calls of it."""

import numpy as np


def widths(array):
    return np.asarray(array, np.float64)


def log_decay(a, A_log, dt_bias):
    x = widths(a) + (0 if dt_bias is None else widths(dt_bias))
    return -np.exp(widths(A_log)) * np.where(x > 20, x, np.log1p(np.exp(np.minimum(x, 20))))


def sigmoid(x):
    return 1 / (1 + np.exp(-widths(x)))


def steps(q, k, v, g=None, beta=None, state=None, l2norm=True, scale=None, eps=1e-6):
    """Of [B,T,heads,width] arrays with activated gates [B,T,H]: outputs [B,T,H,V] and the states after each token."""
    q, k, v = widths(q), widths(k), widths(v)
    B, T, _, K = q.shape
    V = v.shape[3]
    H = max(q.shape[2], k.shape[2], v.shape[2])
    q, k, v = (np.repeat(x, H // x.shape[2], axis=2) for x in (q, k, v))
    if l2norm:
        q, k = (x / np.sqrt((x * x).sum(-1, keepdims=True) + eps) for x in (q, k))
    scale = K**-0.5 if scale is None else scale
    S = np.zeros((B, H, V, K)) if state is None else widths(state).copy()
    outputs, states = np.zeros((B, T, H, V)), np.zeros((B, T, H, V, K))
    for t in range(T):
        if g is not None:
            S *= np.exp(widths(g)[:, t, :, None, None])
        u = v[:, t] - np.einsum("bhvk,bhk->bhv", S, k[:, t])
        if beta is not None:
            u = u * widths(beta)[:, t, :, None]
        S = S + u[..., None] * k[:, t, :, None, :]
        outputs[:, t] = scale * np.einsum("bhvk,bhk->bhv", S, q[:, t])
        states[:, t] = S
    return outputs, states


def inputs(B=2, T=3, HQ=2, HV=4, K=16, V=24, seed=0):
    """q, k, v, a, b, A_log and dt_bias of a call, float32."""
    random = np.random.default_rng(seed)

    def normal(*shape):
        return random.standard_normal(shape, dtype=np.float32)

    return {
        "q": normal(B, T, HQ, K),
        "k": normal(B, T, HQ, K),
        "v": normal(B, T, HV, V),
        "a": normal(B, T, HV),
        "b": normal(B, T, HV),
        "A_log": normal(HV) * 0.5,
        "dt_bias": normal(HV),
    }


def expected(x, state=None, **options):
    """What forward() of inputs() gives."""
    return steps(x["q"], x["k"], x["v"], log_decay(x["a"], x["A_log"], x["dt_bias"]), sigmoid(x["b"]), state, **options)


def error(found, wanted):
    """Relative L2."""
    wanted = widths(wanted)
    return np.linalg.norm(widths(found) - wanted) / np.linalg.norm(wanted)
