# SPDX-License-Identifier: Apache-2.0
"""gatedelta.torch.ReplayWindow against gatedelta.ReplayWindow, which has tests of its own."""

import numpy as np
import pytest
from reference import error, inputs

import gatedelta

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
import gatedelta.torch  # noqa: E402

OPTIONS = {"k_heads": 2, "capacity": 4, "max_tokens": 3, "entries": "float32"}
SLOTS = np.array([4, 1], np.int32)


def pools():
    return [np.random.default_rng(seed).standard_normal((5, 4, 24, 16)).astype(np.float32) for seed in (1, 2)]


def tensors(x):
    return {name: torch.from_numpy(array) for name, array in x.items()}


def step(window, x, slots, accepted):
    """A step of two layers."""
    o = [gatedelta.torch.forward(**x, read_slots=slots, window=window, layer=layer) for layer in range(2)]
    window.accept(accepted, slots, tokens=3)
    return o


def other_calls(window, slots, free):
    window.copy(slots, free)
    before = window.state_of(free, layer=1)
    window.fold(slots)
    window.reset(free[:1])
    return before


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_steps(compiled):
    states = pools()
    plain = gatedelta.ReplayWindow(states, **OPTIONS)
    own = [torch.from_numpy(state.copy()) for state in states]
    window = gatedelta.torch.ReplayWindow(own, **OPTIONS)
    run, rest = step, other_calls
    if compiled:
        run, rest = torch.compile(step, fullgraph=True), torch.compile(other_calls, fullgraph=True)
    for n in range(5):
        x, accepted = inputs(B=2, T=3, seed=n), np.array([n % 4, 2], np.int32)
        wanted = [gatedelta.forward(**x, read_slots=SLOTS, window=plain, layer=layer) for layer in range(2)]
        plain.accept(accepted, SLOTS, tokens=3)
        found = run(window, tensors(x), torch.from_numpy(SLOTS), torch.from_numpy(accepted))
        assert all(np.array_equal(o, other.numpy()) for o, other in zip(wanted, found))
    free = np.array([0, 2], np.int32)
    plain.copy(SLOTS, free)
    wanted = plain.state_of(free, layer=1)
    plain.fold(SLOTS)
    found = rest(window, torch.from_numpy(SLOTS), torch.from_numpy(free))
    assert np.array_equal(wanted, found.numpy())
    assert all(np.array_equal(state, tensor.numpy()) for state, tensor in zip(states, own))
    assert window.length.tolist()[4] == window.length.tolist()[0] == 0 and window.length.tolist()[2] > 0
    assert error(window.state_of(torch.tensor([2]), layer=1).numpy(), wanted[1:]) < 1e-6


def test_errors():
    own = [torch.from_numpy(state) for state in pools()]
    window = gatedelta.torch.ReplayWindow(own, **OPTIONS)
    x = tensors(inputs(T=3))
    with pytest.raises(gatedelta.InvalidArgument, match="layer"):
        gatedelta.torch.forward(**x, window=window, layer=2)
    with pytest.raises(gatedelta.InvalidArgument, match="state: given"):
        gatedelta.torch.forward(**x, window=window, state=own[0])
    with pytest.raises(gatedelta.InvalidArgument, match="entries"):
        gatedelta.torch.ReplayWindow(own, k_heads=2, entries="float16")
    with pytest.raises(gatedelta.InvalidArgument, match="capacity"):
        gatedelta.torch.ReplayWindow(own, k_heads=2, capacity=3)
