# SPDX-License-Identifier: Apache-2.0
"""CuPy's arrays: those of a device, and what is read off arrays over other memory, for which there need not be one."""

import numpy as np
import pytest
from reference import error, expected, inputs

import gatedelta

cupy = pytest.importorskip("cupy", reason="CuPy is not installed")


def over(array):
    """An array said to be on device 0: calls with it have to fail before they run."""
    memory = cupy.cuda.UnownedMemory(array.ctypes.data, array.nbytes, array, device_id=0)
    return cupy.ndarray(array.shape, array.dtype, cupy.cuda.MemoryPointer(memory, 0))


def test_what_is_read():
    x = {name: over(array) for name, array in inputs().items()}
    o = over(np.zeros((2, 3, 4, 24), np.float32))
    fixed = cupy.lib.stride_tricks.as_strided(o, o.shape, (384, 0, 96, 4))
    wrong = {
        r"k: expected \[2, 3, 2, 16\], got \[2, 1, 2, 16\]": {"k": x["k"][:, :1]},
        r"o: expected \[2, 3, 4, 24\], got \[2, 4, 3, 24\]": {"o": o.swapaxes(1, 2)},
        "o: is written, so dimension 1 of size 3 cannot have stride 0": {"o": fixed},
        "q: expected dtype .*, got float64": {"q": over(np.zeros((2, 3, 2, 16)))},
        "dtypes.q: expected f32, f16 or bf16, got i64": {"q": over(np.zeros((2, 3, 2, 16), np.int64))},
        "cuda:0": {"k": inputs()["k"]},
    }
    for message, change in wrong.items():
        with pytest.raises(gatedelta.InvalidArgument, match=message):
            gatedelta.forward(**{**x, "o": o, **change}, stream=1)
    with pytest.raises(gatedelta.Unsupported, match="cpu: cannot reach memory on cuda:0"):
        gatedelta.forward(**x, o=o, stream=1, backend="cpu")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_on_a_device(dtype):
    try:
        cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as missing:
        pytest.skip(f"there is no CUDA device: {missing}")
    if dtype == "bfloat16":
        dtype = pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed").bfloat16
        try:
            over(np.zeros(1, dtype))
        except (TypeError, ValueError) as missing:
            pytest.skip(f"this CuPy has no bfloat16: {missing}")
    x = {name: array.astype(dtype) for name, array in inputs().items()}
    pool = np.random.default_rng(1).standard_normal((3, 4, 16, 24)).astype(np.float32)
    outputs, states = expected({name: array.astype(np.float32) for name, array in x.items()}, pool.swapaxes(-1, -2)[[2, 0]])
    with cupy.cuda.Stream():
        shown, held = {name: cupy.asarray(array) for name, array in x.items()}, cupy.asarray(pool)
        packed = cupy.asarray(np.concatenate([x["q"], x["k"]], axis=2))
        shown.update(q=packed[:, :, :2], k=packed[:, :, 2:])
        o = gatedelta.forward(**shown, state=held.swapaxes(-1, -2), read_slots=cupy.asarray([2, 0]))
        gatedelta.check(o)
    assert isinstance(o, cupy.ndarray) and o.dtype == dtype
    bound = {"float32": 2e-6, "float16": 1e-3}.get(dtype, 8e-3)
    assert error(cupy.asnumpy(o).astype(np.float32), outputs) < bound
    assert error(cupy.asnumpy(held).swapaxes(-1, -2)[[2, 0]], states[:, -1]) < 2e-6
