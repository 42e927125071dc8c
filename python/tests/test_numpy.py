# SPDX-License-Identifier: Apache-2.0
import threading

import ml_dtypes
import numpy as np
import pytest
from reference import error, expected, inputs, sigmoid, steps

import gatedelta

ROUNDING = {np.dtype(np.float32): 1e-6, np.dtype(np.float16): 5e-4, np.dtype(ml_dtypes.bfloat16): 4e-3}


def backends():
    return [backend.name for backend in gatedelta.backends() if backend.available and backend.name != "cuda"]


@pytest.fixture(params=backends())
def backend(request):
    return request.param


def test_lists_backends():
    listed = gatedelta.backends()
    assert [entry.name for entry in listed][-1] == "reference"
    for entry in listed:
        assert entry.available or entry.reason
        assert entry.name in repr(entry)


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_pool(backend, dtype):
    x = {name: array.astype(dtype) for name, array in inputs().items()}
    pool = np.random.default_rng(1).standard_normal((6, 4, 24, 16)).astype(dtype)
    before = pool.copy()
    slots = np.array([4, 1], np.int64)
    o = gatedelta.forward(**x, state=pool, read_slots=slots, backend=backend)
    outputs, states = expected(x, before[slots])
    assert o.dtype == dtype and o.shape == (2, 3, 4, 24)
    assert error(o, outputs) < ROUNDING[dtype]
    assert error(pool[slots], states[:, -1]) < ROUNDING[dtype]
    others = [0, 2, 3, 5]
    assert np.array_equal(pool[others], before[others])


def test_output_arguments(backend):
    x = inputs()
    given = np.random.default_rng(1).standard_normal((2, 4, 24, 16)).astype(np.float32)
    outputs, states = expected(x, given)
    o, final = gatedelta.forward(**x, state_in=given, state_out=True, backend=backend)
    assert error(o, outputs) < 1e-6 and error(final, states[:, -1]) < 1e-6
    o, final, snapshots = gatedelta.forward(**x, state_in=given, state_out=True, snapshots=True, backend=backend)
    assert error(snapshots, states) < 1e-6
    o, snapshots = gatedelta.forward(**x, state_in=given, snapshots=True, backend=backend)
    assert error(o, outputs) < 1e-6 and error(snapshots, states) < 1e-6
    out, final = np.empty((2, 3, 4, 24), np.float16), np.empty_like(given)
    assert gatedelta.forward(**x, o=out, state_in=given, state_out=final, backend=backend) is out
    assert error(out, outputs) < 5e-4 and error(final, states[:, -1]) < 1e-6


def test_strided_views(backend):
    x = inputs()
    packed = np.concatenate([x["q"].reshape(2, 3, -1), x["k"].reshape(2, 3, -1), x["v"].reshape(2, 3, -1)], axis=-1)
    q, k, v = (part.reshape(2, 3, heads, -1) for part, heads in zip(np.split(packed, [32, 64], axis=-1), (2, 2, 4)))
    assert not q.flags.c_contiguous and q.base is not None
    pool = np.random.default_rng(1).standard_normal((5, 4, 16, 24)).astype(np.float32)  # [slots,H,K,V]
    outputs, states = expected(x, pool[:2].swapaxes(-1, -2))
    o = gatedelta.forward(**{**x, "q": q, "k": k, "v": v}, state=pool.swapaxes(-1, -2), backend=backend)
    assert error(o, outputs) < 1e-6
    assert error(pool[:2].swapaxes(-1, -2), states[:, -1]) < 1e-6
    backwards = gatedelta.forward(**{name: array[..., ::-1] if name in ("q", "k") else array for name, array in x.items()}, backend=backend)
    assert error(backwards, expected(x)[0]) < 1e-6


def test_other_gates(backend):
    x = inputs()
    q, k, v, g, beta = x["q"], x["k"], x["v"], -np.abs(x["a"]), sigmoid(x["b"]).astype(np.float32)
    assert error(gatedelta.forward(q, k, v, g=g, beta=beta, backend=backend), steps(q, k, v, g, beta)[0]) < 1e-6
    assert error(gatedelta.forward(q, k, v, backend=backend), steps(q, k, v)[0]) < 1e-6
    found = gatedelta.forward(q, k, v, g=g, b=x["b"], negative_eigenvalues=True, scale=0.5, backend=backend)
    assert error(found, steps(q, k, v, g, 2 * beta, scale=0.5)[0]) < 1e-6
    found = gatedelta.forward(q, k * 0.1, v, g=g, b=x["b"], qk_l2norm=False, backend=backend)
    assert error(found, steps(q, k * 0.1, v, g, beta, l2norm=False)[0]) < 1e-6


def test_variable_length(backend):
    x = inputs(B=1, T=7)
    starts = np.array([0, 3, 3, 7], np.int32)
    o, final = gatedelta.forward(**x, cu_seqlens=starts, state_out=True, backend=backend)
    for n, (begin, end) in enumerate(zip(starts, starts[1:])):
        part = {name: array[:, begin:end] if array.ndim > 1 else array for name, array in x.items()}
        if end > begin:
            outputs, states = expected(part)
            assert error(o[:, begin:end], outputs) < 1e-6 and error(final[n], states[0, -1]) < 1e-6
        else:
            assert not final[n].any()


def test_speculation(backend):
    """Snapshots with commit, and token_slots with accepted, both end where plain steps over the accepted tokens do."""
    x = inputs(T=4)
    pool = np.random.default_rng(1).standard_normal((12, 4, 24, 16)).astype(np.float32)
    _, states = expected(x, pool[:2])
    accepted, slots = np.array([3, 1], np.int32), np.array([0, 1], np.int32)
    first = pool.copy()
    _, snapshots = gatedelta.forward(**x, state=first, update_state=False, snapshots=True, backend=backend)
    assert np.array_equal(first, pool)
    gatedelta.commit(snapshots, accepted, first, slots, backend=backend)
    assert error(first[[0, 1]], np.stack([states[0, 2], states[1, 0]])) < 1e-6
    tokens = np.array([[2, 3, 4, 5], [6, 7, 8, 9]], np.int32)
    gatedelta.forward(**x, state=pool, read_slots=slots, token_slots=tokens, backend=backend)
    assert error(pool[tokens], states) < 1e-6
    again = {name: array[:, :1] if array.ndim > 1 else array for name, array in x.items()}
    o = gatedelta.forward(**again, state=pool, token_slots=tokens, accepted=accepted, backend=backend)
    wanted, _ = expected(again, np.stack([states[0, 2], states[1, 0]]))
    assert error(o, wanted) < 1e-6


def test_padding(backend):
    x = inputs()
    pool = np.ones((3, 4, 24, 16), np.float32)
    before = pool.copy()
    o = gatedelta.forward(**x, state=pool, read_slots=np.array([0, 2]), null_slot=0, backend=backend)
    assert not o[0].any() and o[1].any()
    assert np.array_equal(pool[:2], before[:2]) and not np.array_equal(pool[2], before[2])


@pytest.mark.parametrize(
    "change, kind, message",
    [
        ({"q": [1.0]}, gatedelta.InvalidArgument, "q: expected an array with __dlpack__"),
        ({"q": np.zeros((2, 3, 2, 16))}, gatedelta.InvalidArgument, "q: expected dtype .*, got float64"),
        ({"v": np.zeros((2, 3, 4), np.float32)}, gatedelta.InvalidArgument, r"v: expected \[B, T, HV, V\], got \[2, 3, 4\]"),
        ({"a": np.zeros((2, 3, 2), np.float32)}, gatedelta.InvalidArgument, r"a: expected \[2, 3, 4\], got \[2, 3, 2\]"),
        ({"state": np.zeros((2, 4, 16, 24), np.float32)}, gatedelta.InvalidArgument, "state: expected .*24, 16"),
        ({"read_slots": np.array([0, 7])}, gatedelta.InvalidArgument, "read_slots: row 1 has slot 7"),
        ({"backend": "none such"}, gatedelta.InvalidArgument, "backend: expected auto or one of"),
        ({"g": np.zeros((2, 3, 4), np.float32)}, gatedelta.InvalidArgument, "g: given, but"),
        ({"k": np.zeros((2, 3, 2, 16), ">f4")}, gatedelta.InvalidArgument, "k: expected dtype"),
    ],
)
def test_errors(change, kind, message):
    x = {**inputs(), "state": np.zeros((4, 4, 24, 16), np.float32), **change}
    before = x["state"].copy()
    with pytest.raises(kind, match=message) as caught:
        gatedelta.forward(**x)
    assert isinstance(caught.value, gatedelta.Error) and caught.value.code == kind.code > 0
    assert np.array_equal(x["state"], before)


def test_error_classes():
    for kind, base, code in (
        (gatedelta.InvalidArgument, ValueError, 1),
        (gatedelta.Unsupported, NotImplementedError, 2),
        (gatedelta.OutOfMemory, MemoryError, 3),
        (gatedelta.DeviceError, RuntimeError, 4),
    ):
        assert issubclass(kind, gatedelta.Error) and issubclass(kind, base) and kind.code == code


def test_read_only_memory():
    x = inputs()
    pool = np.zeros((2, 4, 24, 16), np.float32)
    pool.setflags(write=False)
    with pytest.raises(gatedelta.InvalidArgument, match="state: is written, but the array is read-only"):
        gatedelta.forward(**x, state=pool)
    gatedelta.forward(**x, state=pool, update_state=False)
    x["q"].setflags(write=False)
    gatedelta.forward(**x)


class DeviceArray:
    """What CuPy and Numba show of an array on a CUDA device; this one has host memory."""

    def __init__(self, array, **changes):
        self.shown = {"shape": array.shape, "typestr": array.dtype.str, "data": (array.ctypes.data, False), "version": 3, "strides": None}
        self.shown.update(changes)

    @property
    def __cuda_array_interface__(self):
        return self.shown


def test_cuda_array_interface_is_read():
    array = np.zeros((2, 3, 2, 16), np.float32)
    with pytest.raises(gatedelta.InvalidArgument, match="q: expected dtype .*, got <f8"):
        gatedelta.forward(DeviceArray(array, typestr="<f8"), array, array)
    with pytest.raises(gatedelta.InvalidArgument, match="cuda:0"):  # one device for all
        gatedelta.forward(DeviceArray(array), array, array, array.copy())


class Exporter:
    """An array known by DLPack alone."""

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


def test_dlpack(backend):
    x = inputs()
    o = np.empty((2, 3, 4, 24), np.float32)
    shown = {name: Exporter(array) for name, array in x.items()}
    gatedelta.forward(**shown, o=Exporter(o), backend=backend)
    assert np.array_equal(o, gatedelta.forward(**x, backend=backend))
    with pytest.raises(gatedelta.InvalidArgument, match="o: required: there is no way to allocate"):
        gatedelta.forward(**shown)


def test_threads():
    """Calls from several threads at once: the lock of the interpreter is free during a call."""
    x = inputs(B=4, T=64, K=64, V=64)
    wanted = gatedelta.forward(**x)
    found = [None] * 4

    def run(i):
        for _ in range(5):
            found[i] = gatedelta.forward(**x)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(result, wanted) for result in found)
