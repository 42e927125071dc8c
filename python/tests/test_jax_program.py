# SPDX-License-Identifier: Apache-2.0
"""gatedelta.jax: the operator inside of programs that JAX compiles."""

import functools
import os
import pathlib
import re

import numpy as np
import pytest
from reference import error, expected, inputs

import gatedelta

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"
jax = pytest.importorskip("jax", reason="jax is not installed")
if not hasattr(jax, "ffi"):
    pytest.skip("this JAX has no jax.ffi", allow_module_level=True)

import gatedelta.jax  # noqa: E402


@pytest.fixture(autouse=True, params=["cpu", "gpu"])
def platform(request):
    try:
        device = jax.devices(request.param)[0]
    except RuntimeError as error:
        pytest.skip(f"JAX has no {request.param}: {error}")
    if request.param == "gpu" and not hasattr(gatedelta._core, "xla_handler_cuda"):
        pytest.skip("this gatedelta has no cuda backend")
    with jax.default_device(device):
        yield request.param


def arrays(dtype="float32", **sizes):
    return {name: jax.numpy.asarray(array, dtype) for name, array in inputs(**sizes).items()}


def pool(slots=3, seed=1):
    return jax.numpy.asarray(np.random.default_rng(seed).standard_normal((slots, 4, 24, 16)), "float32")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_results_are_those_of_a_plain_call(dtype):
    x, state = arrays(dtype), pool(2).astype(dtype)
    call = functools.partial(gatedelta.forward, state_out=True, snapshots=True)
    program = jax.jit(functools.partial(gatedelta.jax.forward, state_out=True, snapshots=True))
    for ours, plain in zip(program(**x, state_in=state), call(**x, state_in=state)):
        assert ours.dtype == plain.dtype and np.array_equal(ours, plain)
    assert np.array_equal(gatedelta.jax.forward(**x), gatedelta.forward(**x))


def test_options_and_other_forms(platform):
    x = arrays(B=1, T=5)
    g, beta = -jax.numpy.abs(x["a"]), jax.nn.sigmoid(x["b"])
    given = dict(q=x["q"], k=x["k"], v=x["v"], g=g, beta=beta, read_slots=jax.numpy.asarray([2, -1]), state=pool())
    given.update(cu_seqlens=jax.numpy.asarray([0, 2, 5]), update_state=False)
    options = dict(scale=0.3, qk_l2norm=False, null_slot=-1, num_threads=1, backend="reference" if platform == "cpu" else "cuda")
    ours, plain = gatedelta.jax.forward(**given, **options), gatedelta.forward(**given, **options)
    assert np.array_equal(ours, plain) and ours[0, :2].any() and not ours[0, 2:].any()


def test_a_donated_pool_is_changed_in_place():
    x, slots = arrays(), jax.numpy.asarray([2, 0])
    before, kept = np.array(pool()), pool()
    o, after = jax.jit(gatedelta.jax.forward)(**x, state=kept, read_slots=slots)
    assert np.array_equal(kept, before)  # not donated: a copy is changed
    donated = pool()
    memory = donated.unsafe_buffer_pointer()
    program = jax.jit(lambda state, x: gatedelta.jax.forward(**x, state=state, read_slots=slots), donate_argnums=0)
    same_o, same = program(donated, x)
    assert donated.is_deleted() and same.unsafe_buffer_pointer() == memory
    assert np.array_equal(same_o, o) and np.array_equal(same, after)
    outputs, states = expected(inputs(), before[[2, 0]])
    assert error(o, outputs) < 1e-6 and error(np.asarray(after)[[2, 0]], states[:, -1]) < 1e-6
    assert np.array_equal(after[1], before[1])


def test_example():
    text = (pathlib.Path(__file__).parents[2] / "docs/PYTHON.md").read_text(encoding="utf-8")
    names = {}
    exec(next(block for block in re.findall(r"^```python\n(.*?)^```$", text, re.S | re.M) if "gatedelta.jax" in block), names)
    x, donated, slots = arrays(), pool(), jax.numpy.asarray([0, 2])
    x.pop("dt_bias")
    same_o, same = gatedelta.jax.forward(**x, state=pool(), read_slots=slots)
    o, after = names["step"](donated, slots, **x)
    assert donated.is_deleted() and np.array_equal(o, same_o) and np.array_equal(after, same)


def test_steps_of_a_loop():
    x, slots = arrays(T=6), jax.numpy.asarray([1, 2])
    weights = {name: x.pop(name) for name in ("A_log", "dt_bias")}

    @jax.jit
    def decode(state, x):
        def step(state, token):
            token = {name: array[:, None] for name, array in token.items()}
            o, state = gatedelta.jax.forward(**token, **weights, state=state, read_slots=slots)
            return state, o[:, 0]

        return jax.lax.scan(step, state, {name: array.swapaxes(0, 1) for name, array in x.items()})

    state, o = decode(pool(), x)
    outputs, states = expected(inputs(T=6), np.asarray(pool())[1:])
    assert error(o.swapaxes(0, 1), outputs) < 1e-6 and error(state[1:], states[:, -1]) < 1e-6


@pytest.mark.skipif(len(jax.devices("cpu")) < 2 or not hasattr(jax, "shard_map"), reason="no two host devices, or no jax.shard_map")
def test_rows_on_two_devices(platform):
    if platform != "cpu":
        pytest.skip("these are host devices")
    x = arrays()
    weights = {name: x.pop(name) for name in ("A_log", "dt_bias")}
    mesh, rows = jax.sharding.Mesh(np.array(jax.devices("cpu")[:2]), "x"), jax.sharding.PartitionSpec("x")
    program = jax.jit(jax.shard_map(lambda x: gatedelta.jax.forward(**x, **weights), mesh=mesh, in_specs=rows, out_specs=rows))
    o = program(x)
    assert len(o.devices()) == 2 and np.array_equal(o, gatedelta.jax.forward(**x, **weights))


def test_errors():
    x = arrays()
    with pytest.raises(gatedelta.InvalidArgument, match=r"q: expected \[B, T, HQ, K\], got \[3, 2, 16\]"):
        gatedelta.jax.forward(**{**x, "q": x["q"][0]})
    with pytest.raises(gatedelta.InvalidArgument, match=r"k: expected \[2, 3, 2, 16\], got \[1, 3, 2, 16\]"):
        jax.jit(gatedelta.jax.forward)(**{**x, "k": x["k"][:1]})
    with pytest.raises(gatedelta.InvalidArgument, match="q: expected dtype .* got int16"):
        gatedelta.jax.forward(**{**x, "q": x["q"].astype("int16")})
    with pytest.raises(gatedelta.InvalidArgument, match="l2_eps: expected a finite number"):
        gatedelta.jax.forward(**x, l2_eps=-1.0)
    with pytest.raises(Exception, match="INVALID_ARGUMENT: .*no-such-backend"):
        gatedelta.jax.forward(**x, backend="no-such-backend").block_until_ready()
    with pytest.raises(gatedelta.InvalidArgument, match="q: expected an array, got a traced one"):
        jax.jit(lambda q: gatedelta.forward(q, x["k"], x["v"]))(x["q"])
    with pytest.raises(NotImplementedError, match="vmap"):
        jax.vmap(gatedelta.jax.forward)(x["q"][None], x["k"][None], x["v"][None])
