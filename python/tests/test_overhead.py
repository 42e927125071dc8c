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
    """Of q, k, v, the gates and a state, with o and the new state as results, which JAX makes: what it takes for a trivial
    program of as many arrays is not Python's addition to the call. On a CUDA device the call is itself a program."""
    jax = pytest.importorskip("jax", reason="JAX is not installed")
    arrays = {name: jax.numpy.asarray(array, dtype) for name, array in inputs().items()}
    x = {name: array[:0] if array.ndim > 1 else array for name, array in arrays.items()}
    state = jax.numpy.zeros((0, 4, 24, 16), dtype)
    found = least_us(lambda: gatedelta.forward(**x, state_in=state, state_out=True))
    program = jax.jit(lambda *arrays: (arrays[2] + 1, arrays[-1] + 1), keep_unused=True)
    trivial = least_us(lambda: program(*x.values(), state))
    print(f"gatedelta.forward on {dtype} JAX arrays of {state.device}: {found:.1f} us a call; a trivial program: {trivial:.1f} us")
    assert found < trivial + LIMIT_US
    if state.device.platform == "cpu":
        assert found < 1.5 * LIMIT_US  # JAX's own part of it grows more than the rest does where the machine is busy


@pytest.mark.parametrize("results", [1, 2])
def test_overhead_of_programs(monkeypatch, results):
    """Calls on JAX arrays of CUDA devices are compiled programs; here also those on the host."""
    jax = pytest.importorskip("jax", reason="JAX is not installed")
    if not hasattr(jax, "ffi"):
        pytest.skip("this JAX has no jax.ffi")
    import gatedelta._jax

    x = {name: jax.numpy.asarray(array[:1, :1] if array.ndim > 1 else array) for name, array in inputs().items()}
    if results == 2:
        x.update(state_in=jax.numpy.zeros((1, 4, 24, 16)), state_out=True)
    arrays = [value for value in x.values() if value is not True]
    program = jax.jit(lambda *arrays: tuple(array + 1 for array in arrays[-results:]), keep_unused=True)
    monkeypatch.setattr(gatedelta._jax, "COMPILED", {"cpu", "gpu"})
    gatedelta._core._forget_jax()
    found, trivial = least_us(lambda: gatedelta.forward(**x)), least_us(lambda: program(*arrays))
    gatedelta._core._forget_jax()
    print(f"gatedelta.forward as a program of {len(arrays)} arrays and {results} results, one token: {found:.1f} us a call; ", end="")
    print(f"a trivial program: {trivial:.1f} us")
    assert found < trivial + LIMIT_US


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
