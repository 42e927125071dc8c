# SPDX-License-Identifier: Apache-2.0
"""The operator as a part of JAX's compiled programs, for jax.jit, jax.lax.scan and shard_map.

Importing this module registers it with XLA, for the host and, where gatedelta has it, CUDA. XLA then orders the work and owns the
results, and nothing waits. There are no gradients and no vmap.
"""

import jax
import numpy as np

from . import _core
from ._errors import InvalidArgument

__all__ = ["forward"]

_TARGET = "gatedelta_forward"

for _platform, _handler in (("cpu", "xla_handler_cpu"), ("CUDA", "xla_handler_cuda")):
    if hasattr(_core, _handler):
        jax.ffi.register_ffi_target(_TARGET, getattr(_core, _handler), platform=_platform)


def forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    a: jax.Array | None = None,
    A_log: jax.Array | None = None,
    dt_bias: jax.Array | None = None,
    g: jax.Array | None = None,
    b: jax.Array | None = None,
    beta: jax.Array | None = None,
    state: jax.Array | None = None,
    read_slots: jax.Array | None = None,
    write_slots: jax.Array | None = None,
    token_slots: jax.Array | None = None,
    accepted: jax.Array | None = None,
    state_in: jax.Array | None = None,
    state_out: bool = False,
    snapshots: bool = False,
    cu_seqlens: jax.Array | None = None,
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
) -> jax.Array | tuple[jax.Array, ...]:
    """gatedelta.forward for arrays that may be traced; the options are constants of the program.

    Returns o, or a tuple of o and, in this order, the pool after the call where `state` is given (unless update_state=False),
    the states where state_out=True, and the snapshots where snapshots=True. The pool is changed in place where the program may:
    where it is donated to it (jax.jit(..., donate_argnums=...)) or the carry of a loop; otherwise XLA copies it first.
    """
    given = dict(q=q, k=k, v=v, a=a, A_log=A_log, dt_bias=dt_bias, g=g, b=b, beta=beta, state=state, read_slots=read_slots)
    given.update(write_slots=write_slots, token_slots=token_slots, accepted=accepted, state_in=state_in, cu_seqlens=cu_seqlens)
    given = {name: jax.numpy.asarray(array) for name, array in given.items() if array is not None}
    options = (scale, qk_l2norm, l2_eps, softplus_beta, softplus_threshold, negative_eigenvalues, null_slot, num_threads)
    return _call(given, state_out, snapshots, update_state, backend or "", options)


def _call(given, state_out, snapshots, update_state, backend, options, device=None):
    """With `device`, that is where the program runs, and a backend is looked for. `options` begin with the scale; all are numbers in
    the order in which the compiled part takes them."""
    for name, array in given.items():
        if not 1 <= array.ndim <= 5:
            raise InvalidArgument(f"{name}: expected 1 to 5 dimensions, got {array.ndim}")
    q, k, v = given["q"], given["k"], given["v"]
    for name, expected in (("q", "[B, T, HQ, K]"), ("k", "[B, T, HK, K]"), ("v", "[B, T, HV, V]")):
        if given[name].ndim != 4:
            raise InvalidArgument(f"{name}: expected {expected}, got {list(given[name].shape)}")

    rows = max(given["cu_seqlens"].size - 1, 0) if "cu_seqlens" in given else q.shape[0]
    tokens, heads, sizes = q.shape[1], max(q.shape[2], k.shape[2], v.shape[2]), (v.shape[3], q.shape[3])
    dtype = next((given[name].dtype for name in ("state_in", "state") if name in given), jax.numpy.float32)
    results = {"o": jax.ShapeDtypeStruct((q.shape[0], tokens, heads, sizes[0]), v.dtype)}
    aliases = {}
    if "state" in given and update_state:
        results["state"] = jax.ShapeDtypeStruct(given["state"].shape, given["state"].dtype)
        aliases = {list(given).index("state"): 1}
    if state_out:
        results["state_out"] = jax.ShapeDtypeStruct((rows, heads, *sizes), dtype)
    if snapshots:
        results["snapshots"] = jax.ShapeDtypeStruct((rows, tokens, heads, *sizes), dtype)

    scale, *others = options
    options = [update_state, scale is not None, 0.0 if scale is None else scale, *others]
    tensors = [(name, array.dtype.name, array.shape) for name, array in (*given.items(), *results.items())]
    place = None if device is None else (device.platform == "gpu", device.local_hardware_id or 0)
    _core._check_call(tensors, options, backend, place)
    call = jax.ffi.ffi_call(_TARGET, tuple(results.values()), input_output_aliases=aliases)
    made = call(
        *given.values(),
        arguments=" ".join(given),
        results=" ".join(results),
        options=np.array(options, np.float64),
        backend=backend,
    )
    return made[0] if len(made) == 1 else tuple(made)
