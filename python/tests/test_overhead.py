# SPDX-License-Identifier: Apache-2.0
"""The time that Python adds to a call, on an empty batch, where the library has nothing to compute."""

import functools
import timeit

import pytest
from reference import inputs

import gatedelta

LIMIT_US = 10


def least_us(call):
    """Other work on the machine only adds to times."""
    return min(timeit.repeat(call, number=200, repeat=25)) / 200 * 1e6


def overhead_us(forward, arrays, slots, pool, o):
    x = {name: array[:0] if array.ndim > 1 else array for name, array in arrays.items()}
    o, slots = o[:0], slots[:0]
    return least_us(lambda: forward(**x, o=o, state=pool, read_slots=slots))


def empty_call(module, **device):
    """Time in microseconds of a function of gatedelta.forward's arguments."""
    asarray, zeros = functools.partial(module.asarray, **device), functools.partial(module.zeros, dtype=module.float32, **device)
    arrays = {name: asarray(array) for name, array in inputs().items()}
    pool, slots, o = zeros((2, 4, 24, 16)), asarray([0, 1]), zeros((2, 3, 4, 24))
    return lambda forward: overhead_us(forward, arrays, slots, pool, o)


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_overhead(library):
    found = empty_call(pytest.importorskip(library, reason=f"{library} is not installed"))(gatedelta.forward)
    print(f"gatedelta.forward on {library} arrays: {found:.1f} us a call")
    assert found < LIMIT_US


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_overhead_on_jax(dtype):
    """Of q, k, v, the gates and a state, with o and the new state as results, which JAX makes."""
    jax = pytest.importorskip("jax", reason="JAX is not installed")
    arrays = {name: jax.numpy.asarray(array, dtype) for name, array in inputs().items()}
    x = {name: array[:0] if array.ndim > 1 else array for name, array in arrays.items()}
    state = jax.numpy.zeros((0, 4, 24, 16), dtype)
    found = least_us(lambda: gatedelta.forward(**x, state_in=state, state_out=True))
    print(f"gatedelta.forward on {dtype} JAX arrays of {state.device}: {found:.1f} us a call")
    # JAX's own part of it grows more than the rest does where the machine is busy.
    assert found < (1.5 if state.device.platform == "cpu" else 10) * LIMIT_US


@pytest.mark.parametrize("library", ["torch", "cupy"])
def test_overhead_on_cuda(library):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    module = pytest.importorskip(library, reason=f"{library} is not installed")
    found = empty_call(module, **({"device": "cuda"} if library == "torch" else {}))(gatedelta.forward)
    print(f"gatedelta.forward on {library} arrays of a CUDA device: {found:.1f} us a call")
    assert found < 3 * LIMIT_US


def test_overhead_of_operators():
    """gatedelta.torch.forward does without PyTorch's dispatch, whose time is several times that of the rest."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    import gatedelta.torch

    time = empty_call(torch)
    operator = torch.ops.gatedelta.forward_out.default
    dispatched = time(lambda q, k, v, o, **rest: operator(q, k, v, o, state_out=None, snapshots=None, **rest))
    found = time(gatedelta.torch.forward)
    print(f"gatedelta.torch.forward: {found:.1f} us a call; as an operator: {dispatched:.1f} us")
    assert found < 0.8 * dispatched
