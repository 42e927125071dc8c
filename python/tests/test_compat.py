# SPDX-License-Identifier: Apache-2.0
"""The functions of other packages against the equations, and against transformers' own reference functions."""

import numpy as np
import pytest
from reference import error, expected, inputs, log_decay, sigmoid, steps

import gatedelta

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
from gatedelta.compat import fla, flashinfer, sglang  # noqa: E402

devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
HALF = {torch.float32: 2e-6, torch.bfloat16: 4e-3}


@pytest.fixture(params=devices)
def device(request):
    return request.param


def host(tensor):
    return tensor.detach().float().cpu().numpy().copy()


def tensors(device, dtype=torch.bfloat16, **sizes):
    """q, k, v, a, b of a dtype, A_log and dt_bias in float32; and the same as arrays."""
    kept = ("A_log", "dt_bias")
    x = {n: torch.from_numpy(y).to(device, torch.float32 if n in kept else dtype) for n, y in inputs(**sizes).items()}
    return x, {name: host(tensor) for name, tensor in x.items()}


def states(device, *shape, dtype=torch.float32):
    return torch.from_numpy(np.random.default_rng(1).standard_normal(shape)).to(device, dtype)


def indices(device, *values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype, device=device)


def flashinfer_arguments(x):
    return {name: x[name] for name in ("A_log", "a", "dt_bias", "b")}


@pytest.mark.parametrize("state_dtype", HALF, ids=str)
@pytest.mark.parametrize("tokens", [1, 3])
def test_flashinfer_pretranspose(device, tokens, state_dtype):
    x, arrays = tensors(device, T=tokens)
    state = states(device, 2, 4, 24, 16, dtype=state_dtype)
    wanted, after = expected(arrays, host(state))
    o, returned = flashinfer.gated_delta_rule_decode_pretranspose(x["q"], x["k"], x["v"], state, **flashinfer_arguments(x))
    assert returned is state and o.dtype == torch.bfloat16
    assert error(host(o), wanted) < 4e-3 and error(host(state), after[:, -1]) < HALF[state_dtype]


def test_flashinfer_pool(device):
    x, arrays = tensors(device, T=1, B=3)
    pool = states(device, 6, 4, 24, 16)
    before = host(pool)
    output = torch.full((3, 1, 4, 24), 7.0, device=device)
    o, returned = flashinfer.gated_delta_rule_decode_pretranspose(
        x["q"], x["k"], x["v"], None, **flashinfer_arguments(x), output=output, scale=1.0, initial_state=pool,
        initial_state_indices=indices(device, 4, -1, 0), output_state_indices=indices(device, 5, -1, -1),
    )  # fmt: skip
    wanted, after = expected(arrays, before[[4, 0, 0]], scale=1.0)
    assert o is output and returned is pool
    assert error(host(o)[[0, 2]], wanted[[0, 2]]) < 2e-6
    assert not host(o)[1].any()  # padding gives zeros
    assert error(host(pool)[5], after[0, -1]) < 2e-6
    assert np.array_equal(host(pool)[:5], before[:5])  # neither slot 0 nor those that were only read


def test_flashinfer_verification_of_bf16_states(device):
    x, arrays = tensors(device, T=4)
    pool = states(device, 3, 4, 24, 16, dtype=torch.bfloat16)
    before, buffer = pool.clone(), torch.zeros(2, 4, 4, 24, 16, device=device, dtype=torch.bfloat16)
    flashinfer.gated_delta_rule_decode_pretranspose(
        x["q"], x["k"], x["v"], None, **flashinfer_arguments(x), initial_state=pool,
        initial_state_indices=indices(device, 2, 0), intermediate_states_buffer=buffer, disable_state_update=True,
    )  # fmt: skip
    assert torch.equal(pool, before)
    assert error(host(buffer), expected(arrays, host(before)[[2, 0]])[1]) < 4e-3


def test_flashinfer_decode(device):
    x, arrays = tensors(device, T=1)
    state = states(device, 2, 4, 16, 24)  # K-major
    wanted, after = expected(arrays, host(state).swapaxes(2, 3))
    o, returned = flashinfer.gated_delta_rule_decode(x["q"], x["k"], x["v"], state, **flashinfer_arguments(x))
    assert returned is state
    assert error(host(o), wanted) < 4e-3 and error(host(state).swapaxes(2, 3), after[:, -1]) < 2e-6
    with pytest.raises(AssertionError, match="T=1"):
        flashinfer.gated_delta_rule_decode(*(x[n].repeat(1, 2, 1, 1) for n in "qkv"), state, **flashinfer_arguments(x))


def test_flashinfer_mtp(device):
    x, arrays = tensors(device, T=4)
    call = (x["q"], x["k"], x["v"])
    pool = states(device, 12, 4, 24, 16)
    before, read = pool.clone(), indices(device, 3, 1, dtype=torch.int64)
    wanted, after = expected(arrays, host(pool)[[3, 1]])
    buffer = torch.zeros(3, 4, 4, 24, 16, device=device)
    with pytest.warns(FutureWarning, match="disable_state_update"):
        o, returned = flashinfer.gated_delta_rule_mtp(
            *call, pool, read, **flashinfer_arguments(x), intermediate_states_buffer=buffer)  # fmt: skip
    assert returned is pool and torch.equal(pool, before)
    assert error(host(o), wanted) < 4e-3 and error(host(buffer)[:2], after) < 2e-6 and not host(buffer)[2].any()
    flashinfer.gated_delta_rule_mtp(*call, pool, read, **flashinfer_arguments(x), disable_state_update=False)
    assert error(host(pool)[[3, 1]], after[:, -1]) < 2e-6
    pool = before.clone()
    scatter = indices(device, [4, 5, 6, 7], [8, 9, 10, 11])
    flashinfer.gated_delta_rule_mtp(
        *call, pool, read, **flashinfer_arguments(x), disable_state_update=False, ssm_state_indices=scatter)  # fmt: skip
    assert error(host(pool)[4:].reshape(after.shape), after) < 2e-6 and torch.equal(pool[:4], before[:4])
    with pytest.raises(AssertionError, match="mutually exclusive"):
        flashinfer.gated_delta_rule_mtp(*call, pool, read, **flashinfer_arguments(x), disable_state_update=False,
                                        ssm_state_indices=scatter, intermediate_states_buffer=buffer)  # fmt: skip


@pytest.mark.parametrize("function", [fla.fused_recurrent_gated_delta_rule, fla.chunk_gated_delta_rule])
@pytest.mark.parametrize("v_first", [False, True], ids=["K first", "V first"])
def test_fla(device, function, v_first):
    x, arrays = tensors(device, torch.float32, T=70)
    q, k, v, g = x["q"], x["k"], x["v"], -x["a"].abs()
    beta = x["b"].sigmoid()
    state = states(device, 2, 4, 24, 16)
    wanted, after = steps(arrays["q"], arrays["k"], arrays["v"], host(g), host(beta), host(state))
    given = state if v_first else state.transpose(-1, -2).contiguous()
    o, final = function(q, k, v, g=g, beta=beta, initial_state=given, output_final_state=True, use_qk_l2norm_in_kernel=True,
                        state_v_first=v_first)  # fmt: skip
    assert final.is_contiguous() and final.shape == given.shape and final.dtype == torch.float32
    assert error(host(o), wanted) < 5e-6
    assert error(host(final if v_first else final.transpose(-1, -2)), after[:, -1]) < 5e-6
    o, final = function(q, k * 0.1, v, g=g, beta=beta)
    assert final is None
    assert error(host(o), steps(arrays["q"], 0.1 * arrays["k"], arrays["v"], host(g), host(beta), l2norm=False)[0]) < 5e-6


def test_fla_gates_in_the_kernel(device):
    x, arrays = tensors(device, torch.float32)
    g = log_decay(arrays["a"], arrays["A_log"], arrays["dt_bias"])
    options = {"A_log": x["A_log"], "dt_bias": x["dt_bias"], "use_gate_in_kernel": True, "use_qk_l2norm_in_kernel": True}
    for function in (fla.fused_recurrent_gated_delta_rule, fla.chunk_gated_delta_rule):
        o, _ = function(x["q"], x["k"], x["v"], g=x["a"], beta=x["b"], use_beta_sigmoid_in_kernel=True, allow_neg_eigval=True,
                        **options)  # fmt: skip
        assert error(host(o), steps(arrays["q"], arrays["k"], arrays["v"], g, 2 * sigmoid(arrays["b"]))[0]) < 2e-6
        with pytest.raises(ValueError, match="allow_neg_eigval"):
            function(x["q"], x["k"], x["v"], g=x["a"], beta=x["b"], allow_neg_eigval=True, **options)


def test_fla_variable_length(device):
    x, arrays = tensors(device, torch.float32, B=1, T=9)
    g, beta = -x["a"].abs(), x["b"].sigmoid()
    state = states(device, 2, 4, 16, 24, dtype=torch.bfloat16)
    o, final = fla.chunk_gated_delta_rule(
        x["q"], x["k"], x["v"], g, beta, initial_state=state, output_final_state=True, use_qk_l2norm_in_kernel=True,
        cu_seqlens=indices(device, 0, 4, 9, dtype=torch.int64))  # fmt: skip
    for n, part in enumerate((slice(0, 4), slice(4, 9))):
        start = host(state)[n : n + 1].swapaxes(2, 3)
        wanted, after = steps(*(arrays[i][:, part] for i in "qkv"), host(g)[:, part], host(beta)[:, part], start)
        assert error(host(o)[:, part], wanted) < 2e-6 and error(host(final)[n].swapaxes(1, 2), after[0, -1]) < 2e-6
    with pytest.raises(ValueError, match="batch size is expected to be 1"):
        fla.chunk_gated_delta_rule(*(x[n].repeat(2, 1, 1, 1) for n in "qkv"), g, beta, cu_seqlens=indices(device, 0, 9))


def test_fla_says_what_it_cannot():
    x, _ = tensors("cpu", torch.float32)
    q, k, v = (x[n] for n in "qkv")
    with pytest.raises(gatedelta.Unsupported, match="gk"):
        fla.fused_recurrent_gated_delta_rule(q, k, v, gk=torch.zeros(2, 3, 4, 16))
    with pytest.raises(gatedelta.Unsupported, match="beta_per_value_channel"):
        fla.fused_recurrent_gated_delta_rule(q, k, v, beta=torch.zeros(2, 3, 4, 24))
    q.requires_grad_()
    o, _ = fla.fused_recurrent_gated_delta_rule(q, k, v)
    with pytest.raises(RuntimeError, match="autograd"):
        o.sum().backward()


def sglang_gates(x):
    return {"A_log": x["A_log"], "dt_bias": x["dt_bias"], "softplus_beta": 1.0, "softplus_threshold": 20.0}


def test_sglang_decode(device):
    """As the engine calls it: one token a sequence, all in one batch row."""
    x, arrays = tensors(device, B=3, T=1)
    pool = states(device, 5, 4, 24, 16)
    before = host(pool)
    q, k, v = (x[n].transpose(0, 1) for n in "qkv")
    o = sglang.fused_sigmoid_gating_delta_rule_update(
        a=x["a"][:, 0], b=x["b"][:, 0], q=q, k=k, v=v, **sglang_gates(x), initial_state_source=pool,
        initial_state_indices=indices(device, 3, -1, 0), use_qk_l2norm_in_kernel=True, cu_seqlens=indices(device, 0, 1, 2, 3),
    )  # fmt: skip
    wanted, after = expected(arrays, before[[3, 0, 0]])
    assert o.shape == v.shape and o.dtype == q.dtype
    found = host(o).swapaxes(0, 1)
    assert error(found[[0, 2]], wanted[[0, 2]]) < 4e-3 and not found[1].any()
    assert error(host(pool)[[3, 0]], after[[0, 2], -1]) < 2e-6
    assert np.array_equal(host(pool)[[1, 2, 4]], before[[1, 2, 4]])


def test_sglang_verify(device):
    x, arrays = tensors(device, T=3)
    pool, buffer = states(device, 5, 4, 24, 16), torch.zeros(4, 5, 4, 24, 16, device=device)
    before = pool.clone()
    o = sglang.fused_sigmoid_gating_delta_rule_update(
        a=x["a"], b=x["b"], q=x["q"], k=x["k"], v=x["v"], **sglang_gates(x), initial_state_source=pool,
        initial_state_indices=indices(device, 2, 4), use_qk_l2norm_in_kernel=True, disable_state_update=True,
        intermediate_states_buffer=buffer, intermediate_state_indices=indices(device, 3, 1), cache_steps=5,
    )  # fmt: skip
    wanted, after = expected(arrays, host(before)[[2, 4]])
    assert torch.equal(pool, before) and error(host(o), wanted) < 4e-3
    assert error(host(buffer)[[3, 1], :3], after) < 2e-6
    assert not host(buffer)[[0, 2]].any() and not host(buffer)[:, 3:].any()
    with pytest.raises(gatedelta.Unsupported, match="retrieve_parent_token"):
        sglang.fused_sigmoid_gating_delta_rule_update(
            a=x["a"], b=x["b"], q=x["q"], k=x["k"], v=x["v"], **sglang_gates(x), initial_state_source=None,
            initial_state_indices=None, retrieve_parent_token=indices(device, 0))  # fmt: skip


@pytest.mark.parametrize("dtype, rounding", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)], ids=str)
@pytest.mark.parametrize("tokens", [1, 7, 130])
def test_transformers_reference_functions(device, tokens, dtype, rounding):
    """Qwen3-Next's layer. They normalise in the input's dtype, hence the rounding of bfloat16."""
    qwen = pytest.importorskip(
        "transformers.models.qwen3_next.modeling_qwen3_next", reason="transformers with Qwen3-Next is not installed")  # fmt: skip
    x, _ = tensors(device, dtype, T=tokens, HQ=4, HV=4, K=32, V=32)
    q, k, v, beta = x["q"], x["k"], x["v"], x["b"].sigmoid()
    g = -x["A_log"].exp() * torch.nn.functional.softplus(x["a"].float() + x["dt_bias"])
    start = states(device, 2, 4, 32, 32)
    options = {"g": g, "beta": beta, "initial_state": start, "output_final_state": True, "use_qk_l2norm_in_kernel": True}
    for theirs, ours in (
        (qwen.torch_recurrent_gated_delta_rule, fla.fused_recurrent_gated_delta_rule),
        (qwen.torch_chunk_gated_delta_rule, fla.chunk_gated_delta_rule),
    ):
        wanted, wanted_state = theirs(q, k, v, **options)
        o, final = ours(q, k, v, **options)
        assert error(host(o), host(wanted)) < rounding and error(host(final), host(wanted_state)) < rounding
    o, final = gatedelta.forward(q, k, v, a=x["a"], A_log=x["A_log"], dt_bias=x["dt_bias"], b=x["b"], state_out=True,
                                 state_in=start.transpose(2, 3))  # fmt: skip
    assert error(host(o), host(wanted)) < rounding


def test_compiled(device):
    """The drop-ins are traced as operators."""

    def step(x, pool, slots):
        o, _ = flashinfer.gated_delta_rule_decode_pretranspose(
            x["q"], x["k"], x["v"], None, **flashinfer_arguments(x), initial_state=pool, initial_state_indices=slots)  # fmt: skip
        final = fla.fused_recurrent_gated_delta_rule(x["q"], x["k"], o, g=-x["a"].abs(), output_final_state=True)[1]
        return o, final

    x, _ = tensors(device, T=1)
    pool, slots = states(device, 4, 4, 24, 16), indices(device, 2, 0)
    plain_pool = pool.clone()
    wanted = step(x, plain_pool, slots)
    found = torch.compile(step, fullgraph=True, backend="aot_eager")(x, pool, slots)
    assert all(torch.equal(one, other) for one, other in zip(found, wanted)) and torch.equal(pool, plain_pool)
