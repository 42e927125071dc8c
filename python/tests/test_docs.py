# SPDX-License-Identifier: Apache-2.0
"""The Python examples of the documents run and do what they say."""

import pathlib
import re

import numpy as np
import pytest
from reference import error, expected, inputs, sigmoid, steps

import gatedelta

root = pathlib.Path(__file__).parents[2]


def blocks(document):
    return re.findall(r"^```python\n(.*?)^```$", (root / document).read_text(encoding="utf-8"), re.S | re.M)


def test_window_example():
    first, second = (block for block in blocks("docs/PYTHON.md") if "gatedelta.forward" in block)
    names = {}
    exec(first, names)
    exec(second, names)
    assert not any(pool.any() for pool in names["pools"])  # only windows were written
    states = names["window"].state_of(names["slots"])
    assert states[0].any() and not states[1].any()


def migration(page, number, x, **names):
    """The names after a page's call, which is the `number`th; everything it mentions is there before."""
    names.update(x, gatedelta=gatedelta, np=np, g=-np.abs(x["a"]), beta=sigmoid(x["b"]).astype(np.float32))
    names["alpha"] = np.exp(names["g"])
    exec([block for block in blocks(f"docs/migration/{page}.md") if "gatedelta.forward" in block][number], names)
    return names


def states(*shape):
    return np.random.default_rng(3).standard_normal(shape).astype(np.float32)


def test_migration_from_flashinfer():
    x, pool, slots, targets = inputs(), states(5, 4, 24, 16), np.array([3, 1]), np.array([4, 0])
    outputs, after = expected(x, pool[slots], scale=0.5)
    names = migration("flashinfer", 0, x, pool=pool, slots=slots, targets=targets, scale=0.5)
    assert error(names["o"], outputs) < 1e-6 and error(pool[targets], after[:, -1]) < 1e-6
    x, h0 = inputs(B=1), states(2, 4, 24, 16)
    names = migration("flashinfer", 1, x, h0=h0, cu_seqlens=np.array([0, 1, 3]))
    for n, part in enumerate((slice(0, 1), slice(1, 3))):
        outputs, after = steps(*(x[i][:, part] for i in "qkv"), names["g"][:, part], names["beta"][:, part], h0[n : n + 1])
        assert error(names["o"][:, part], outputs) < 2e-6 and error(names["final"][n], after[0, -1]) < 2e-6


def test_migration_from_fla():
    x, h0 = inputs(), states(2, 4, 16, 24)
    names = migration("fla", 0, x, h0=h0)
    outputs, after = steps(x["q"], x["k"], x["v"], names["g"], names["beta"], h0.swapaxes(-1, -2))
    assert error(names["o"], outputs) < 1e-6 and error(names["final"], after[:, -1].swapaxes(-1, -2)) < 1e-6


def test_migration_from_sglang():
    x, pool, slots = inputs(), states(5, 4, 24, 16), np.array([3, 1])
    outputs, after = expected(x, pool[slots])
    names = migration("sglang", 0, x, pool=pool, slots=slots, accepted=np.array([2, 3], np.int32))
    assert error(names["o"], outputs) < 1e-6 and error(pool[slots], [after[0, 1], after[1, 2]]) < 1e-6


def test_migration_from_vllm():
    x, pool = inputs(B=1, T=6), states(9, 4, 24, 16)
    table, accepted = np.array([[1, 2, 3], [4, 5, 6], [0, 0, 0]]), np.array([2, 1, 1], np.int32)
    before = pool.copy()
    names = migration("vllm", 0, x, pool=pool, table=table, accepted=accepted, cu_seqlens=np.array([0, 3, 6, 6]))
    for n, start in enumerate((2, 4)):
        row = {name: array[:, 3 * n : 3 * n + 3] if array.ndim > 1 else array for name, array in x.items()}
        outputs, after = expected(row, before[[start]])
        assert error(names["o"][:, 3 * n : 3 * n + 3], outputs) < 1e-6 and error(pool[table[n]], after[0]) < 1e-6
    assert np.array_equal(pool[[0, 7, 8]], before[[0, 7, 8]])


def test_what_migration_pages_say_is_refused():
    x = inputs()
    q, k, v = (x[name] for name in "qkv")
    with pytest.raises(gatedelta.Unsupported, match="key channel"):
        gatedelta.forward(q, k, v, g=np.zeros((2, 3, 4, 16), np.float32))
    with pytest.raises(gatedelta.InvalidArgument, match="beta: expected"):
        gatedelta.forward(q, k, v, beta=np.zeros((2, 3, 4, 24), np.float32))


@pytest.mark.parametrize("document", ["README.md", "docs/PYTHON.md"])
def test_example(document):
    block = next(block for block in blocks(document) if block.startswith("import numpy"))
    names = {}
    exec(block, names)
    assert np.allclose(names["o"], 1, atol=1e-3)
    assert names["pool"][[5, 2]].all() and not names["pool"][[0, 1, 3, 4, 6, 7]].any()
