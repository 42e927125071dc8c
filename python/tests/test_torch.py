# SPDX-License-Identifier: Apache-2.0
import subprocess
import sys

import numpy as np
import pytest
from reference import error, expected, inputs

import gatedelta

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
import gatedelta.torch  # noqa: E402

devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


@pytest.fixture(params=devices)
def device(request):
    return request.param


def tensors(device, dtype=torch.float32, **sizes):
    return {name: torch.from_numpy(array).to(device, dtype) for name, array in inputs(**sizes).items()}


def arrays(x):
    return {name: tensor.float().cpu().numpy() for name, tensor in x.items()}


def pool_of(device, slots=6, dtype=torch.float32):
    return torch.from_numpy(np.random.default_rng(1).standard_normal((slots, 4, 24, 16))).to(device, dtype)


def host(tensor):
    return tensor.detach().float().cpu().numpy().copy()


@pytest.mark.parametrize("dtype, rounding", [(torch.float32, 2e-6), (torch.float16, 5e-4), (torch.bfloat16, 4e-3)], ids=str)
@pytest.mark.parametrize("forward", [gatedelta.forward, gatedelta.torch.forward], ids=["direct", "operator"])
def test_pool(device, forward, dtype, rounding):
    x = tensors(device, dtype)
    pool = pool_of(device, dtype=dtype)
    slots = torch.tensor([4, 1], device=device)
    outputs, states = expected(arrays(x), host(pool[slots]))
    o = forward(**x, state=pool, read_slots=slots)
    assert o.dtype == dtype and o.device.type == device
    assert error(host(o), outputs) < rounding
    assert error(host(pool[slots]), states[:, -1]) < rounding


def test_results_of_the_operator(device):
    x = tensors(device)
    given = pool_of(device, 2)
    outputs, states = expected(arrays(x), host(given))
    o, final, snapshots = gatedelta.torch.forward(**x, state_in=given, state_out=True, snapshots=True)
    assert error(host(o), outputs) < 2e-6 and error(host(final), states[:, -1]) < 2e-6 and error(host(snapshots), states) < 2e-6
    out = torch.empty_like(o, dtype=torch.bfloat16)
    assert gatedelta.torch.forward(**x, o=out, state=given, update_state=False) is out
    assert error(host(out), outputs) < 4e-3
    pool = pool_of(device, 4)
    gatedelta.torch.commit(snapshots, torch.tensor([2, 3], dtype=torch.int32, device=device), pool,
                           torch.tensor([3, 0], device=device))  # fmt: skip
    assert torch.equal(pool[3], snapshots[0, 1]) and torch.equal(pool[0], snapshots[1, 2])


def operator_calls(device):
    x = list(tensors(device).values())
    q, k, v, a, b, A_log, dt_bias = x
    none = {"state": None, "state_out": None, "snapshots": None}
    gates = {**none, "a": a, "A_log": A_log, "dt_bias": dt_bias, "b": b}
    slots = torch.tensor([4, 1], dtype=torch.int32, device=device)
    forward, out, commit = (getattr(torch.ops.gatedelta, name).default for name in ("forward", "forward_out", "commit"))
    given, final = pool_of(device, 2), pool_of(device, 2)
    snapshots = torch.zeros(2, 3, 4, 24, 16, device=device)
    return {
        "decode": (forward, (q, k, v), {**gates, "state": pool_of(device), "read_slots": slots}),
        "given state": (forward, (q, k, v), {**gates, "state_in": given, "state_out": final, "snapshots": snapshots}),
        "read only": (forward, (q, k, v), {**gates, "read_only_state": pool_of(device), "scale": 0.5}),
        "out": (out, (q, k, v, torch.empty_like(v)), {**gates, "state": pool_of(device), "read_slots": slots}),
        "commit": (commit, (snapshots, torch.tensor([1, 3], dtype=torch.int32, device=device), pool_of(device), slots), {}),
    }


def test_operators_eagerly(device):
    """torch.ops.gatedelta.* give what the functions give, which do without them."""
    for name, (operator, args, kwargs) in operator_calls(device).items():
        copies = [x.clone() for x in args]
        result = operator(*args, **kwargs)
        if name == "commit":
            gatedelta.commit(*copies)
            assert torch.equal(copies[2], args[2]) and args[2].any()
            continue
        kwargs = {key: value for key, value in operator_calls(device)[name][2].items() if value is not None}
        pool = kwargs.pop("read_only_state", None)
        wanted = gatedelta.forward(*copies[:3], **kwargs, **({} if pool is None else {"state": pool, "update_state": False}))
        assert torch.equal(args[3] if name == "out" else result, wanted)


def test_who_has_to_see_an_operator():
    """Modes and tracers do, and autograd hears of what is written, whichever way is taken."""
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    x, pool = tensors("cpu"), pool_of("cpu")
    slots = torch.tensor([4, 1])
    gatedelta.torch.forward(**x, state=pool, read_slots=slots)
    assert pool._version == 1
    gatedelta.torch.forward(**x, state=pool, read_slots=slots, update_state=False)
    assert pool._version == 1
    with Mode():
        gatedelta.torch.forward(**x, state=pool, read_slots=slots)
    assert seen == ["gatedelta.forward.default"] and pool._version > 1
    names = list(x)
    traced = make_fx(lambda *values: gatedelta.torch.forward(**dict(zip(names, values))))(*x.values())
    assert "gatedelta.forward" in traced.code
    with torch.inference_mode():
        assert error(host(gatedelta.torch.forward(**x)), expected(arrays(x))[0]) < 2e-6
    snapshots = torch.zeros(2, 1, 4, 24, 16)
    before = pool._version
    gatedelta.torch.commit(snapshots, torch.ones(2, dtype=torch.int32), pool, slots)
    assert pool._version == before + 1 and not pool[slots].any()


@pytest.mark.parametrize("name", ["decode", "given state", "read only", "out", "commit"])
def test_opcheck(device, name):
    operator, args, kwargs = operator_calls(device)[name]
    result = torch.library.opcheck(operator, args, kwargs)
    assert all(outcome == "SUCCESS" for outcome in result.values()), result


def test_compiled(device):
    """One graph without breaks; the state goes on from call to call."""

    def decode(x, pool, slots):
        o = gatedelta.torch.forward(**x, state=pool, read_slots=slots)
        o = o * 2
        return gatedelta.torch.forward(**{**x, "v": o}, state=pool, read_slots=slots) + 1

    x, pool, slots = tensors(device), pool_of(device), torch.tensor([4, 1], device=device)
    plain_pool = pool.clone()
    # aot_eager: the graph is functionalised as for inductor, which would need a compiler here.
    compiled = torch.compile(decode, fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager")
    for _ in range(2):
        wanted = decode(x, plain_pool, slots)
        assert torch.allclose(compiled(x, pool, slots), wanted, rtol=1e-5, atol=1e-5)
        assert torch.allclose(pool, plain_pool, rtol=1e-5, atol=1e-5)


def test_no_gradient(device):
    x = tensors(device)
    x["v"].requires_grad_()
    with pytest.raises(RuntimeError, match="autograd"):
        gatedelta.torch.forward(**x).sum().backward()


def test_errors_pass_through():
    x = tensors("cpu")
    with pytest.raises(gatedelta.InvalidArgument, match=r"state: expected \[slots, 4, 24, 16\], got \[6, 4, 16, 24\]"):
        gatedelta.torch.forward(**x, state=pool_of("cpu").transpose(2, 3).contiguous())
    with pytest.raises(gatedelta.InvalidArgument, match="q: expected memory of the host or a CUDA device"):
        gatedelta.forward(**{**x, "q": x["q"].to("meta")})


@pytest.mark.skipif("cuda" not in devices, reason="there is no CUDA device")
def test_cuda_graph():
    x, pool, slots = tensors("cuda"), pool_of("cuda"), torch.tensor([4, 1], device="cuda")
    plain_pool = pool.clone()
    o = torch.empty(2, 3, 4, 24, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gatedelta.forward(**x, o=o, state=pool, read_slots=slots, write_slots=slots)
    for _ in range(3):
        graph.replay()
        wanted = gatedelta.forward(**x, state=plain_pool, read_slots=slots)
        assert torch.equal(o, wanted) and torch.equal(pool, plain_pool)


@pytest.mark.skipif("cuda" not in devices, reason="there is no CUDA device")
def test_cuda_stream_and_faults():
    x, pool = tensors("cuda"), pool_of("cuda")
    wanted = gatedelta.forward(**x, state=pool.clone())
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)  # what follows on this stream is late
        found = gatedelta.forward(**{**x, "v": x["v"] * 1.0}, state=pool)
        gatedelta.check(pool)
    assert torch.equal(found, wanted)
    gatedelta.forward(**x, state=pool, read_slots=torch.tensor([0, 99], device="cuda"))
    with pytest.raises(gatedelta.DeviceError, match="read_slots: row 1 has slot 99"):
        gatedelta.check(pool)
    gatedelta.check(pool)


@pytest.mark.skipif("cuda" not in devices, reason="there is no CUDA device")
def test_cupy_and_jax_on_cuda():
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
    x = tensors("cuda")
    wanted, states = expected(arrays(x))
    shown = {name: cupy.asarray(tensor) for name, tensor in x.items()}
    with cupy.cuda.Stream():
        o, final = gatedelta.forward(**shown, state_out=True)
    assert isinstance(o, cupy.ndarray)
    gatedelta.check(o)
    assert error(cupy.asnumpy(o), wanted) < 2e-6 and error(cupy.asnumpy(final), states[:, -1]) < 2e-6
    jax = pytest.importorskip("jax", reason="jax is not installed")
    shown = {name: jax.device_put(array) for name, array in arrays(x).items()}
    if shown["q"].device.platform == "gpu":
        o = gatedelta.forward(**shown)
        assert isinstance(o, jax.Array) and error(np.asarray(o), wanted) < 2e-6


def test_tensors_of_any_kind():
    """Parameters, views and tensors that need a gradient are memory like others."""
    x = tensors("cpu")
    wanted = gatedelta.forward(**x)
    assert torch.equal(wanted, gatedelta.forward(**{name: torch.nn.Parameter(tensor) for name, tensor in x.items()}))
    assert torch.equal(wanted[1:], gatedelta.forward(**{n: y[1:] if y.dim() > 1 else y for n, y in x.items()}))
    turned = {name: y.transpose(0, 1).contiguous().transpose(0, 1) if y.dim() > 1 else y for name, y in x.items()}
    assert turned["q"].stride() != x["q"].stride() and torch.equal(wanted, gatedelta.forward(**turned))
    for dtype in (torch.int16, torch.complex64, torch.float64):
        with pytest.raises(gatedelta.InvalidArgument, match=f"q: expected dtype .*, got {dtype}"):
            gatedelta.forward(**{**x, "q": x["q"].to(dtype)})


def test_releases_without_the_table_of_functions():
    """Older ones are asked for a tensor's attributes instead."""
    code = """
import torch, gatedelta
if hasattr(torch.Tensor, "__dlpack_c_exchange_api__"): del torch.Tensor.__dlpack_c_exchange_api__
q, k, v = (torch.linspace(-1, 1, 24).reshape(1, 2, 3, 4).transpose(1, 2).to(dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16))
pool, slots = torch.ones(2, 2, 4, 4), torch.tensor([1])
o = gatedelta.forward(q, k, v, state=pool, read_slots=slots)
wanted = torch.ones(1, 2, 4, 4)
other, wanted = gatedelta.forward(q.numpy(), k.numpy(), v.float().numpy(), state_in=wanted.numpy(), state_out=True)
assert o.dtype == torch.bfloat16 and abs(o.float().numpy() - other).max() < 8e-3
assert abs(pool[1].numpy() - wanted[0]).max() < 1e-6 and (pool[0] == 1).all()
"""
    subprocess.run([sys.executable, "-c", code], check=True)
