# SPDX-License-Identifier: Apache-2.0
"""The Python examples of the documents run and do what they say."""

import pathlib
import re

import numpy as np
import pytest

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


@pytest.mark.parametrize("document", ["README.md", "docs/PYTHON.md"])
def test_example(document):
    block = next(block for block in blocks(document) if block.startswith("import numpy"))
    names = {}
    exec(block, names)
    assert np.allclose(names["o"], 1, atol=1e-3)
    assert names["pool"][[5, 2]].all() and not names["pool"][[0, 1, 3, 4, 6, 7]].any()
