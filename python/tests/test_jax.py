# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
from reference import error, expected, inputs

import gatedelta

jax = pytest.importorskip("jax", reason="jax is not installed")


def test_jax():
    x = inputs()
    arrays = {name: jax.numpy.asarray(array) for name, array in x.items()}
    state = jax.numpy.ones((2, 4, 24, 16))
    o, final = gatedelta.forward(**arrays, state_in=state, state_out=True)
    outputs, states = expected(x, np.ones((2, 4, 24, 16)))
    assert isinstance(o, jax.Array) and isinstance(final, jax.Array)
    assert error(o, outputs) < 1e-6 and error(final, states[:, -1]) < 1e-6
    assert np.all(np.asarray(state) == 1)
    for dtype, bound in ((jax.numpy.bfloat16, 4e-3), (jax.numpy.float16, 5e-4)):
        half = {name: array.astype(dtype) for name, array in arrays.items()}
        assert error(gatedelta.forward(**half), expected({n: np.asarray(a) for n, a in half.items()})[0]) < bound
        mixed = {**arrays, "q": half["q"], "a": half["a"]}
        assert error(gatedelta.forward(**mixed), expected({n: np.asarray(a) for n, a in mixed.items()})[0]) < 1e-6


def test_variable_length_and_a_pool_that_is_read():
    x = inputs(B=1, T=5)
    starts, slots = jax.numpy.asarray([0, 2, 5]), jax.numpy.asarray([2, 0])
    pool = np.random.default_rng(1).standard_normal((3, 4, 24, 16)).astype(np.float32)
    arrays = {name: jax.numpy.asarray(array) for name, array in x.items()}
    o = gatedelta.forward(**arrays, state=jax.numpy.asarray(pool), read_slots=slots, update_state=False, cu_seqlens=starts)
    for slot, part in ((2, slice(0, 2)), (0, slice(2, 5))):
        row = {name: array[:, part] if array.ndim > 1 else array for name, array in x.items()}
        assert error(o[:, part], expected(row, pool[slot : slot + 1])[0]) < 1e-6


@pytest.mark.parametrize("dtype", ["int16", "bool", "complex64"])
def test_other_dtypes(dtype):
    x = {name: jax.numpy.asarray(array) for name, array in inputs().items()}
    with pytest.raises(gatedelta.InvalidArgument, match=f"q: expected dtype .*, got {dtype}"):
        gatedelta.forward(**{**x, "q": jax.numpy.zeros((2, 3, 2, 16), dtype)})


def test_arrays_that_cannot_be_changed():
    x = {name: jax.numpy.asarray(array) for name, array in inputs().items()}
    with pytest.raises(gatedelta.InvalidArgument, match="state: is written, but jax arrays cannot be changed"):
        gatedelta.forward(**x, state=jax.numpy.zeros((2, 4, 24, 16)))
    with pytest.raises(gatedelta.InvalidArgument, match="state: is written, but jax arrays cannot be changed"):
        gatedelta.ReplayWindow(jax.numpy.zeros((2, 4, 24, 16)), k_heads=2)


def test_results_have_memory_of_their_own():
    x = {name: jax.numpy.asarray(array) for name, array in inputs().items()}
    results = [gatedelta.forward(**{**x, "v": scale * x["v"]}) for scale in (1.0, 2.0, 3.0)]
    for scale, o in zip((1.0, 2.0, 3.0), results):
        assert error(o, scale * np.asarray(results[0])) < 1e-6
    assert len({o.unsafe_buffer_pointer() for o in results}) == 3
    assert not jax.numpy.zeros((2, 3, 4, 24)).any()
