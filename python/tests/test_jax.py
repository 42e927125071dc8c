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
    half = {name: array.astype(jax.numpy.bfloat16) for name, array in arrays.items()}
    assert error(gatedelta.forward(**half), expected({n: np.asarray(a) for n, a in half.items()})[0]) < 4e-3


def test_arrays_that_cannot_be_changed():
    x = {name: jax.numpy.asarray(array) for name, array in inputs().items()}
    with pytest.raises(gatedelta.InvalidArgument, match="state: is written, but jax arrays cannot be changed"):
        gatedelta.forward(**x, state=jax.numpy.zeros((2, 4, 24, 16)))
