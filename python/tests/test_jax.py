# SPDX-License-Identifier: Apache-2.0
import concurrent.futures
import os

import numpy as np
import pytest
from reference import error, expected, inputs

import gatedelta

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"
jax = pytest.importorskip("jax", reason="jax is not installed")

import gatedelta._jax  # noqa: E402


@pytest.fixture(autouse=True, params=["arrays", "programs"])
def way(request, monkeypatch):
    """Calls read arrays of the host and are compiled programs on CUDA devices; here both ways are taken on whatever JAX has."""
    if request.param == "programs" and not hasattr(jax, "ffi"):
        pytest.skip("this JAX has no jax.ffi")
    monkeypatch.setattr(gatedelta._jax, "COMPILED", {"cpu", "gpu"} if request.param == "programs" else set())
    gatedelta._core._forget_jax()
    gatedelta._jax.program.cache_clear()
    yield request.param
    gatedelta._core._forget_jax()
    assert request.param == "programs" or programs() == 0


def programs():
    return gatedelta._jax.program.cache_info().currsize


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


def test_options(way):
    """Those of one call are not those of the next, and a call that was made before is not compiled again."""
    x, pool = inputs(), np.random.default_rng(1).standard_normal((3, 4, 24, 16)).astype(np.float32)
    gates = {"g": -np.abs(x["a"]), "beta": 1 / (1 + np.exp(-x["b"]))}
    plain = {name: x[name] for name in "qkv"}
    state_in = {"state_in": pool[:2]}
    slots = {"state": pool, "read_slots": np.array([2, -1], np.int32), "update_state": False}
    options = [{}, {"scale": 0.3}, {"scale": 0.2}, {"qk_l2norm": False}, {"l2_eps": 0.5}, {"softplus_beta": 2.0}]
    options += [{"softplus_threshold": 0.1}, {"negative_eigenvalues": True}, {"num_threads": 1}, state_in, slots]
    options += [{"snapshots": True}, {"state_out": False, "snapshots": False}, {**state_in, "state_out": True, "snapshots": True}]
    options += [{**slots, "null_slot": 2}, {"state": pool, "update_state": False, "snapshots": True}]
    calls = [{**x, **more} for more in options] + [{**plain, **gates}, plain, {**plain, "b": x["b"], **state_in}]
    for again in range(2):
        for call in calls:
            given = {name: jax.numpy.asarray(value) if isinstance(value, np.ndarray) else value for name, value in call.items()}
            ours, same = gatedelta.forward(**given), gatedelta.forward(**call)
            assert isinstance(ours, tuple) == isinstance(same, tuple)
            for mine, theirs in zip(ours if isinstance(ours, tuple) else [ours], same if isinstance(same, tuple) else [same]):
                assert mine.dtype == theirs.dtype and mine.shape == theirs.shape
                assert np.linalg.norm(np.asarray(mine) - theirs) <= 1e-5 * np.linalg.norm(theirs)
        assert programs() == (len(calls) - 1 if way == "programs" else 0)  # False asks for nothing


def raised(**call):
    with pytest.raises(Exception) as info:
        gatedelta.forward(**call)
    return type(info.value), str(info.value)


def test_errors(way, monkeypatch):
    """Both ways raise the same."""
    if way == "arrays":
        pytest.skip("compared with the other way")
    x, zeros, ints = {name: jax.numpy.asarray(array) for name, array in inputs().items()}, jax.numpy.zeros, jax.numpy.asarray
    state, slots = zeros((2, 4, 24, 16)), ints([0, 1])
    read = {"state": state, "update_state": False}
    bad = [{name: array[None]} for name, array in x.items()] + [{name: array[:1]} for name, array in x.items()]
    bad += [{name: array.astype("int32")} for name, array in x.items()] + [{"a": None}, {"g": x["a"]}, {"beta": x["b"]}]
    bad += [{"q": x["q"][0, 0, 0, 0]}, {"v": x["v"][0]}, {"k": x["k"][..., :3]}, {"q": zeros((2, 3, 3, 16))}]
    bad += [{"cu_seqlens": slots}, {"cu_seqlens": slots[None]}, {"cu_seqlens": slots[0]}, {"cu_seqlens": slots[:0]}]
    bad += [{"read_slots": slots}, {"accepted": slots}, {"state": state}, {"state": state, "state_out": True}]
    bad += [{**read, "read_slots": x["A_log"]}, {**read, "read_slots": slots[:1]}, {**read, "state_out": True}]
    bad += [{**read, "state_in": state}, {**read, "accepted": slots}, {"state_in": state[:1]}, {"state_in": state[..., :2]}]
    bad += [{"l2_eps": -1.0}, {"scale": float("nan")}, {"softplus_beta": 0.0}, {"num_threads": -1}, {"layer": 1}]
    bad += [{"backend": "no-such-backend"}, {"backend": "cuda" if state.device.platform == "cpu" else "cpu"}]
    bad += [{"o": x["v"]}, {"state_out": state}, {"snapshots": state}, {"parent": slots}, {"update_state": False, "state_out": True}]
    bad += [{"k": "k"}, {"k": [1, 2]}, {"scale": "1"}]
    found = [raised(**{**x, **wrong}) for wrong in bad]
    assert all(issubclass(kind, (gatedelta.Error, TypeError)) for kind, _ in found)
    assert found == [raised(**{**x, **wrong}) for wrong in bad]  # what is wrong stays wrong
    monkeypatch.setattr(gatedelta._jax, "COMPILED", set())
    gatedelta._core._forget_jax()
    assert found == [raised(**{**x, **wrong}) for wrong in bad]


def test_nothing_waits(way):
    """A program's results need not be there when the call returns."""
    x = {name: jax.numpy.asarray(array) for name, array in inputs().items()}
    size = 600 if x["q"].device.platform == "cpu" else 4096
    slow = jax.jit(lambda m: jax.lax.fori_loop(0, 20, lambda i, m: m @ m, m)[0, 0] * size)
    matrix = jax.numpy.full((size, size), 1 / size)
    for warm in (True, False):  # the first one compiles
        v = slow(matrix) * x["v"]
        o = gatedelta.forward(**{**x, "v": v})
        there = o.is_ready()
        assert error(o, expected({**inputs(), "v": np.asarray(v)})[0]) < 1e-6
    assert there == (way == "arrays")


def test_a_bad_slot(way):
    x = {name: jax.numpy.asarray(array) for name, array in inputs().items()}
    state, slots = jax.numpy.zeros((2, 4, 24, 16)), jax.numpy.asarray([0, 99])

    def call():
        return gatedelta.forward(**x, state=state, read_slots=slots, update_state=False)

    if state.device.platform == "cpu":
        kind = gatedelta.InvalidArgument if way == "arrays" else jax.errors.JaxRuntimeError
        with pytest.raises(kind, match="read_slots: .*99"):
            call().block_until_ready()
    elif way == "arrays":
        with pytest.raises(gatedelta.DeviceError, match="read_slots: row 1 has slot 99"):
            call()
    else:
        o = call()
        with pytest.raises(gatedelta.DeviceError, match="read_slots: row 1 has slot 99"):
            gatedelta.check(o)
        gatedelta.check(o)


def test_several_threads():
    calls = [{name: jax.numpy.asarray(array) for name, array in inputs(B=B).items()} for B in (1, 2, 3, 4)]
    alone = [np.asarray(gatedelta.forward(**call, scale=0.5)) for call in calls]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for _ in range(10):
            for o, same in zip(pool.map(lambda call: gatedelta.forward(**call, scale=0.5), calls), alone):
                assert np.array_equal(o, same)


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
    """Results of small calls are made several at a time: each is given away once."""
    x = {name: jax.numpy.asarray(array) for name, array in inputs().items()}
    state = jax.numpy.zeros((2, 4, 24, 16))
    scales = [float(n) for n in range(1, 20)]
    results = [gatedelta.forward(**{**x, "v": n * x["v"]}, state_in=state, state_out=True) for n in scales]
    for n, result in zip(scales, results):
        for scaled, first in zip(result, results[0]):
            assert error(scaled, n * np.asarray(first)) < 1e-6
    assert len({array.unsafe_buffer_pointer() for result in results for array in result}) == 2 * len(scales)
    assert not jax.numpy.zeros((2, 3, 4, 24)).any()


@pytest.mark.parametrize("tokens", [3, 300])
def test_results_of_other_sizes_in_turn(tokens):
    for B in (1, 2, 1, 3, 2, 1):
        x = inputs(B=B, T=tokens)
        arrays = {name: jax.numpy.asarray(array) for name, array in x.items()}
        o, final = gatedelta.forward(**arrays, state_in=jax.numpy.zeros((B, 4, 24, 16), "bfloat16"), state_out=True)
        assert o.dtype == "float32" and final.dtype == "bfloat16"
        assert error(o, expected(x)[0]) < 1e-6


def test_arrays_that_are_not_there_yet():
    matrix = jax.numpy.full((600, 600), 1 / 600)
    slow = jax.jit(lambda m: jax.lax.fori_loop(0, 20, lambda i, m: m @ m, m)[0, 0])
    x = {name: jax.numpy.asarray(array) for name, array in inputs().items()}
    slow(matrix).block_until_ready()
    v = slow(matrix) * 600 * x["v"]
    o = gatedelta.forward(**{**x, "v": v})
    assert error(o, expected({**inputs(), "v": np.asarray(v)})[0]) < 1e-6


def test_another_layout():
    layout = pytest.importorskip("jax.experimental.layout", reason="this JAX has no layouts")
    x = {name: jax.numpy.asarray(array) for name, array in inputs().items()}
    q = jax.device_put(x["q"], layout.Format(layout.Layout(major_to_minor=(0, 2, 1, 3)), x["q"].sharding))
    assert np.array_equal(gatedelta.forward(**{**x, "q": q}), gatedelta.forward(**x))


def test_constants_of_traced_functions():
    x = {name: jax.numpy.asarray(array) for name, array in inputs(B=5).items()}  # a size of its own, so that no array is left over
    o = jax.jit(lambda n: n * gatedelta.forward(**x))(2.0)
    assert error(o, 2 * expected(inputs(B=5))[0]) < 1e-6
    assert error(gatedelta.forward(**x), expected(inputs(B=5))[0]) < 1e-6


@pytest.mark.skipif(len(jax.devices("cpu")) < 2, reason="JAX has one host device")
def test_devices():
    sharding, cpus = jax.sharding, jax.devices("cpu")[:2]
    x = {name: jax.device_put(array, cpus[1]) for name, array in inputs().items()}
    o = gatedelta.forward(**x)
    assert o.devices() == {cpus[1]} and error(o, expected(inputs())[0]) < 1e-6
    one = sharding.NamedSharding(sharding.Mesh(np.array(cpus[:1]), "x"), sharding.PartitionSpec())
    state = jax.device_put(np.zeros((2, 4, 24, 16), np.float32), cpus[0])
    o, final = gatedelta.forward(**jax.device_put(x, one), state_in=state, state_out=True)
    assert o.sharding == one and final.sharding == one and error(o, expected(inputs())[0]) < 1e-6
    for parts in (sharding.PartitionSpec("x"), sharding.PartitionSpec()):
        two = sharding.NamedSharding(sharding.Mesh(np.array(cpus), "x"), parts)
        with pytest.raises(BufferError, match="2 devices"):
            gatedelta.forward(**{**x, "q": jax.device_put(x["q"], two)})
