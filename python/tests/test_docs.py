# SPDX-License-Identifier: Apache-2.0
"""The Python examples of the documents run and do what they say."""

import pathlib
import re

import numpy as np
import pytest

root = pathlib.Path(__file__).parents[2]


@pytest.mark.parametrize("document", ["README.md", "docs/PYTHON.md"])
def test_example(document):
    block = re.search(r"^```python\n(import numpy.*?)^```$", (root / document).read_text(encoding="utf-8"), re.S | re.M)
    names = {}
    exec(block[1], names)
    assert np.allclose(names["o"], 1, atol=1e-3)
    assert names["pool"][[5, 2]].all() and not names["pool"][[0, 1, 3, 4, 6, 7]].any()
