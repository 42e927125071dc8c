# SPDX-License-Identifier: Apache-2.0
"""Calls on JAX arrays: the programs that those on CUDA devices are, and for the others new arrays."""

import functools
import math

import jax

_DTYPES = {name: jax.numpy.dtype(full) for name, full in (("f32", "float32"), ("f16", "float16"), ("bf16", "bfloat16"))}

# Where a call is a compiled program of gatedelta.jax.forward, which XLA puts in order with all else, so that nothing waits. On the
# host the work has to be done on return.
COMPILED = {"gpu"}

TENSORS = ("q", "k", "v", "a", "A_log", "dt_bias", "g", "b", "beta", "state", "read_slots", "write_slots", "token_slots", "accepted",
           "state_in", "cu_seqlens")  # fmt: skip


def is_compiled(sharding):
    """Whether calls on arrays with this sharding are compiled programs."""
    devices = list(sharding.device_set)
    if not hasattr(jax, "ffi") or len(devices) != 1 or devices[0].platform not in COMPILED:
        return False
    return sharding.memory_kind in (None, devices[0].default_memory().kind)  # not the host's memory that a device can use


@functools.lru_cache(maxsize=256)
def program(sharding, given, state_out, snapshots, update_state, backend, *options):
    """A compiled function of the tensors whose bits in `given` are set; it gives what gatedelta.forward returns. A wrong call is
    found out while it is traced, so that it raises what others do."""
    from .jax import _call

    names = [name for bit, name in enumerate(TENSORS) if given >> bit & 1]
    (device,) = sharding.device_set

    def forward(*tensors):
        return _call(dict(zip(names, tensors)), state_out, snapshots, update_state, backend, options, device)

    return jax.jit(forward, out_shardings=sharding)


# A call of a compiled function takes 3 us and 0.5 to 1 us for each result, up to 8 of them; beyond that XLA uses other threads.
# Small results are made for several calls at once, but not so many bytes that filling or keeping them would count.
MOST_RESULTS, MOST_BYTES = 8, 1 << 17


@functools.lru_cache(maxsize=256)
def stock(sharding, *arrays):
    """For shape, dtype, shape, dtype ... of the results of a call: a function that makes a list of the new arrays of some calls, and
    the list of those that it has made and nobody has yet."""
    shapes, dtypes = arrays[::2], [_DTYPES[name] for name in arrays[1::2]]
    size = sum(math.prod(shape) * dtype.itemsize for shape, dtype in zip(shapes, dtypes))
    calls = max(1, min(MOST_RESULTS // len(shapes), MOST_BYTES // max(size, 1)))

    def make():
        return [jax.numpy.zeros(shape, dtype) for _ in range(calls) for shape, dtype in zip(shapes, dtypes)]

    return jax.jit(make, out_shardings=sharding), []


def call_untraced(function, *arrays):
    """For a call while JAX traces a function, where it would give an array of the traced program."""
    with jax.ensure_compile_time_eval():
        return function(*arrays)
