# SPDX-License-Identifier: Apache-2.0
"""The time that Python adds to a call, on an empty batch, where the library has nothing to compute."""

import timeit

import pytest
from reference import inputs

import gatedelta

LIMIT_US = 10


def overhead_us(arrays, slots, pool, o):
    x = {name: array[:0] if array.ndim > 1 else array for name, array in arrays.items()}
    times = timeit.repeat(lambda: gatedelta.forward(**x, o=o[:0], state=pool, read_slots=slots[:0]), number=500, repeat=9)
    return min(times) / 500 * 1e6


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_overhead(library, record_property):
    module = pytest.importorskip(library, reason=f"{library} is not installed")
    arrays = {name: module.asarray(array) for name, array in inputs().items()}
    pool, slots = module.zeros((2, 4, 24, 16), dtype=module.float32), module.asarray([0, 1])
    found = overhead_us(arrays, slots, pool, module.zeros((2, 3, 4, 24), dtype=module.float32))
    record_property("overhead_us", found)
    print(f"{library}: {found:.1f} us a call")
    assert found < LIMIT_US
