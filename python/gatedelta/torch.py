# SPDX-License-Identifier: Apache-2.0
"""The operator as custom operators of PyTorch, for torch.compile, torch.export and CUDA graphs.

Importing this module registers torch.ops.gatedelta.forward, forward_out and commit. The state pool, state_out and snapshots are
declared as mutated, so that compiled programs keep the order of calls. forward and commit of this module call the operators where
that makes a difference, and otherwise do without PyTorch's dispatch of them, which takes longer than all else of a call.
"""

import torch

from . import _core
from ._errors import InvalidArgument
from ._torch_window import ReplayWindow, needs_operator, written

__all__ = ["ReplayWindow", "commit", "forward"]

# What is mutated comes before all defaults: PyTorch counts its uses by position, and drops trailing arguments at their defaults.
_ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, {o}Tensor(s!)? state, Tensor(t!)? state_out, Tensor(u!)? snapshots, Tensor? a=None, "
    "Tensor? A_log=None, Tensor? dt_bias=None, Tensor? g=None, Tensor? b=None, Tensor? beta=None, "
    "Tensor? read_only_state=None, Tensor? read_slots=None, Tensor? write_slots=None, Tensor? token_slots=None, "
    "Tensor? accepted=None, Tensor? state_in=None, Tensor? cu_seqlens=None, float? scale=None, "
    "bool qk_l2norm=True, float l2_eps=1e-06, float softplus_beta=1.0, float softplus_threshold=20.0, "
    "bool negative_eigenvalues=False, int null_slot=-1, int num_threads=0, str? backend=None"
)
_MUTATED = ("state", "state_out", "snapshots")


def _names(arguments):
    return [part.split("=")[0].split()[-1] for part in arguments.split(", ")]


_NAMES = _names(_ARGUMENTS.format(o=""))
_NAMES_OUT = _names(_ARGUMENTS.format(o="Tensor(o!) o, "))


def _run(given):
    pool = given.pop("read_only_state", None)
    if pool is not None:
        given.update(state=pool, update_state=False)
    return _core.forward(**given)


def _forward(*values):
    return _run(dict(zip(_NAMES, values)))


def _forward_out(*values):
    _run(dict(zip(_NAMES_OUT, values)))


def _commit(snapshots, accepted, state, write_slots, null_slot=-1, backend=None):
    _core.commit(snapshots, accepted, state, write_slots, null_slot=null_slot, backend=backend)


_forward_op = torch.library.custom_op(
    "gatedelta::forward", _forward, mutates_args=_MUTATED, schema=f"({_ARGUMENTS.format(o='')}) -> Tensor"
)
_forward_out_op = torch.library.custom_op(
    "gatedelta::forward_out",
    _forward_out,
    mutates_args=("o", *_MUTATED),
    schema=f"({_ARGUMENTS.format(o='Tensor(o!) o, ')}) -> ()",
)
_commit_op = torch.library.custom_op(
    "gatedelta::commit",
    _commit,
    mutates_args=("state",),
    schema="(Tensor snapshots, Tensor accepted, Tensor(s!) state, Tensor write_slots, int null_slot=-1, str? backend=None) -> ()",
)


def _sizes(q, k, v):
    """[B, T, H, V] of the output."""
    return q.shape[0], q.shape[1], max(q.shape[2], k.shape[2], v.shape[2]), v.shape[3]


@_forward_op.register_fake
def _(q, k, v, *values):
    return v.new_empty(_sizes(q, k, v))


@_forward_out_op.register_fake
def _(*values):
    return None


@_commit_op.register_fake
def _(*values):
    return None


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor | None = None,
    *,
    a: torch.Tensor | None = None,
    A_log: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    g: torch.Tensor | None = None,
    b: torch.Tensor | None = None,
    beta: torch.Tensor | None = None,
    state: torch.Tensor | None = None,
    read_slots: torch.Tensor | None = None,
    write_slots: torch.Tensor | None = None,
    token_slots: torch.Tensor | None = None,
    accepted: torch.Tensor | None = None,
    state_in: torch.Tensor | None = None,
    state_out: torch.Tensor | bool | None = None,
    snapshots: torch.Tensor | bool | None = None,
    cu_seqlens: torch.Tensor | None = None,
    window: ReplayWindow | None = None,
    layer: int = 0,
    parent: torch.Tensor | None = None,
    update_state: bool = True,
    scale: float | None = None,
    qk_l2norm: bool = True,
    l2_eps: float = 1e-6,
    softplus_beta: float = 1.0,
    softplus_threshold: float = 20.0,
    negative_eigenvalues: bool = False,
    null_slot: int = -1,
    num_threads: int = 0,
    backend: str | None = None,
):
    """gatedelta.forward as an operator that torch.compile and torch.export understand: same arguments (but `stream`, which is
    the current one), same results. `window` is a ReplayWindow of this module. state_out must not share memory with state_in: for
    a state that is updated in place, pass it as `state`.
    """
    if not needs_operator((q, k, v, o, a, A_log, dt_bias, g, b, beta, state, read_slots, write_slots, token_slots, accepted,
                           state_in, state_out, snapshots, cu_seqlens, parent)):  # fmt: skip
        result = _core._forward(
            q, k, v, o, a, A_log, dt_bias, g, b, beta, state, read_slots, write_slots, token_slots, accepted, state_in, state_out,
            snapshots, cu_seqlens, None if window is None else window._window, layer, parent, update_state, scale, qk_l2norm,
            l2_eps, softplus_beta, softplus_threshold, negative_eigenvalues, null_slot, num_threads, backend,
        )  # fmt: skip
        written(o, state if update_state else None, state_out, snapshots)
        if window is not None:
            written(window.states[layer], window.keys[layer], window.corrections[layer], window.decays[layer])
        return result
    if window is not None:
        for name, given in (("state", state), ("write_slots", write_slots), ("token_slots", token_slots), ("accepted", accepted),
                            ("state_in", state_in), ("state_out", state_out), ("snapshots", snapshots)):  # fmt: skip
            if given is not None and given is not False:
                raise InvalidArgument(f"{name}: given beside a replay window")
        if not update_state or not 0 <= layer < window.layers:
            raise InvalidArgument(f"layer: expected 0..{window.layers - 1} and update_state, got {layer} and {update_state}")
        if o is None:
            o = v.new_empty(_sizes(q, k, v))
        torch.ops.gatedelta.window_forward(
            *window._layer(layer), o, q, k, v, a, A_log, dt_bias, g, b, beta, read_slots, cu_seqlens, parent, scale, qk_l2norm,
            l2_eps, softplus_beta, softplus_threshold, negative_eigenvalues, num_threads, null_slot, backend, *window._settings,
        )  # fmt: skip
        return o
    if parent is not None or layer != 0:
        raise InvalidArgument("parent, layer: given, but there is no replay window")
    batch, tokens, heads, value_dim = _sizes(q, k, v)
    rows = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    like = state_in if state_in is not None else state
    dtype = torch.float32 if like is None else like.dtype
    asked = []
    if state_out is True:
        state_out = q.new_empty((rows, heads, value_dim, q.shape[3]), dtype=torch.float32 if state_in is None else dtype)
        asked.append(state_out)
    if snapshots is True:
        snapshots = q.new_empty((rows, tokens, heads, value_dim, q.shape[3]), dtype=dtype)
        asked.append(snapshots)
    pool, read_only = (state, None) if update_state else (None, state)
    mutated = (pool, None if state_out is False else state_out, None if snapshots is False else snapshots)
    rest = (a, A_log, dt_bias, g, b, beta, read_only, read_slots, write_slots, token_slots, accepted, state_in, cu_seqlens,
            scale, qk_l2norm, l2_eps, softplus_beta, softplus_threshold, negative_eigenvalues, null_slot, num_threads,
            backend)  # fmt: skip
    if o is None:
        o = torch.ops.gatedelta.forward(q, k, v, *mutated, *rest)
    else:
        torch.ops.gatedelta.forward_out(q, k, v, o, *mutated, *rest)
    return (o, *asked) if asked else o


def commit(
    snapshots: torch.Tensor,
    accepted: torch.Tensor,
    state: torch.Tensor,
    write_slots: torch.Tensor,
    *,
    null_slot: int = -1,
    backend: str | None = None,
) -> None:
    """gatedelta.commit as an operator that torch.compile and torch.export understand."""
    if not needs_operator((snapshots, accepted, state, write_slots)):
        _core.commit(snapshots, accepted, state, write_slots, null_slot=null_slot, backend=backend)
        written(state)
        return
    torch.ops.gatedelta.commit(snapshots, accepted, state, write_slots, null_slot, backend)
