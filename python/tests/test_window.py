# SPDX-License-Identifier: Apache-2.0
"""Replay windows against the plain recurrence over the tokens that stayed."""

import inspect

import numpy as np
import pytest
from reference import error, inputs, log_decay, sigmoid, steps
from test_numpy import backends

import gatedelta

SLOTS, H, K, V = 5, 4, 16, 24
BOUND = {"float32": 1e-6, "bfloat16": 6e-3}  # an entry is off by at most sqrt(2) 2^-8 of itself


@pytest.fixture(params=backends())
def backend(request):
    return request.param


def pool(seed=1):
    return np.random.default_rng(seed).standard_normal((SLOTS, H, V, K)).astype(np.float32)


def ints(*values, dtype=np.int32):
    return np.array(values, dtype)


def tokens_of(x, batch, tokens):
    """Some tokens of one row of a call, as a call of its own."""
    return {name: array[batch : batch + 1, tokens] if array.ndim > 1 else array for name, array in x.items()}


def recurrence(x, state):
    """Outputs and last state of one row from a state."""
    if x["q"].shape[1] == 0:
        return np.zeros((1, 0, H, V)), state
    outputs, states = steps(x["q"], x["k"], x["v"], log_decay(x["a"], x["A_log"], x["dt_bias"]), sigmoid(x["b"]), state[None])
    return outputs, states[0, -1]


@pytest.mark.parametrize("entries", BOUND)
@pytest.mark.parametrize("layers", [1, 2])
def test_steps(backend, entries, layers):
    """Chains, of which some tokens stay; windows of four entries, so that they are folded again and again."""
    random = np.random.default_rng(2)
    states = [pool(seed) for seed in range(layers)]
    exact = [state.astype(np.float64) for state in states]
    untouched = states[0][[1, 3]].copy()
    window = gatedelta.ReplayWindow(
        states if layers > 1 else states[0], k_heads=2, capacity=4, entries=entries, max_tokens=3, backend=backend)  # fmt: skip
    assert (window.layers, window.capacity, window.max_tokens) == (layers, 4, 3)
    slots = ints(4, -1, 0, dtype=np.int64)
    for step in range(12):
        accepted = random.integers(0, 4, 3).astype(np.int32)
        for layer in range(layers):
            x = inputs(B=3, T=3, seed=10 * step + layer)
            before = states[layer].copy()
            o = gatedelta.forward(**x, read_slots=slots, window=window, layer=layer, backend=backend)
            assert not o[1].any()
            for row in (0, 2):
                wanted, _ = recurrence(tokens_of(x, row, slice(0, 3)), exact[layer][slots[row]])
                assert error(o[row], wanted[0]) < BOUND[entries]
                _, after = recurrence(tokens_of(x, row, slice(0, accepted[row])), exact[layer][slots[row]])
                exact[layer][slots[row]] = after
            if step == 0:
                assert np.array_equal(states[layer], before)  # nothing is written before a window is full
        window.accept(accepted, slots, tokens=3)
        for layer in range(layers):
            found = window.state_of(ints(0, 4), layer=layer)
            assert found.dtype == np.float32 and error(found, exact[layer][[0, 4]]) < BOUND[entries]
    assert np.array_equal(states[0][[1, 3]], untouched)
    assert error(states[0][0], exact[0][0]) > 0.01  # the window has the rest
    window.fold(ints(0, 4))
    for layer in range(layers):
        assert error(states[layer][[0, 4]], exact[layer][[0, 4]]) < BOUND[entries]
    # Windows are empty now, so that a plain call on the pool is right.
    x = inputs(B=1, T=5)
    o = gatedelta.forward(**x, state=states[0], read_slots=ints(4), backend=backend)
    assert error(o, recurrence(x, exact[0][4])[0]) < BOUND[entries]


def test_trees(backend):
    """Each token sees its ancestors alone, and the accepted path is what stays."""
    state = pool()
    exact = state.astype(np.float64)
    window = gatedelta.ReplayWindow(state, k_heads=2, capacity=8, entries="float32", backend=backend)
    parent = ints([-1, -1, 0, 1, 3, 3], [-1, 0, 0, 2, -1, 4])
    paths = ([1, 3, 5], [4])
    path = ints([1, 3, 5], [4, -1, -1])
    slots = ints(2, 1)
    for step in range(3):
        x = inputs(B=2, T=6, seed=step)
        o = gatedelta.forward(**x, read_slots=slots, window=window, parent=parent, backend=backend)
        for row in range(2):
            for t in range(6):
                ancestors = [t]
                while parent[row, ancestors[0]] >= 0:
                    ancestors.insert(0, parent[row, ancestors[0]])
                wanted, _ = recurrence(tokens_of(x, row, ancestors), exact[slots[row]])
                assert error(o[row, t], wanted[0, -1]) < 2e-6
            exact[slots[row]] = recurrence(tokens_of(x, row, paths[row]), exact[slots[row]])[1]
        window.accept(ints(3, 1), slots, tokens=6, path=path)
        assert error(window.state_of(slots), exact[slots]) < 2e-6


def test_one_token_and_variable_length(backend):
    state = pool()
    exact = state.astype(np.float64)
    window = gatedelta.ReplayWindow(state, k_heads=2, capacity=6, entries="float32", backend=backend)
    starts = ints(0, 4, 4, 5)
    for step in range(4):
        x = inputs(B=1, T=5, seed=step)
        o = gatedelta.forward(**x, read_slots=ints(3, 2, 1), cu_seqlens=starts, window=window, backend=backend)
        for slot, begin, end, kept in ((3, 0, 4, 2), (1, 4, 5, 1)):
            wanted, _ = recurrence(tokens_of(x, 0, slice(begin, end)), exact[slot])
            assert error(o[:, begin:end], wanted) < 2e-6
            exact[slot] = recurrence(tokens_of(x, 0, slice(begin, begin + kept)), exact[slot])[1]
        window.accept(ints(2, 0, 1), ints(3, 2, 1), cu_seqlens=starts)
    for step in range(20):  # plain decoding, row n with slot n
        x = inputs(B=SLOTS, T=1, seed=step)
        o = gatedelta.forward(**x, window=window, backend=backend)
        for slot in range(SLOTS):
            wanted, exact[slot] = recurrence(tokens_of(x, slot, slice(0, 1)), exact[slot])
            assert error(o[slot], wanted[0]) < 2e-6
        window.accept(np.ones(SLOTS, np.int32), tokens=1)
    assert error(window.state_of(np.arange(SLOTS)), exact) < 2e-6


def test_copy_and_reset(backend):
    states = [pool(1), pool(2)]
    window = gatedelta.ReplayWindow(states, k_heads=2, capacity=4, entries="float32", backend=backend)
    x = inputs(B=1, T=2)
    for layer in range(2):
        gatedelta.forward(**x, read_slots=ints(1), window=window, layer=layer, backend=backend)
    window.accept(ints(2), ints(1), tokens=2)
    window.copy(ints(1), ints(3))
    for layer in range(2):
        both = window.state_of(ints(1, 3, -1), layer=layer)
        assert both[0].any() and np.array_equal(both[0], both[1]) and not both[2].any()
        assert error(both[0], states[layer][1]) > 0.01
    given = np.full((1, H, V, K), 7, np.float16)
    assert window.state_of(ints(3), given, layer=1) is given and error(given, both[:1]) < 1e-3
    window.reset(ints(3))
    assert np.array_equal(window.state_of(ints(3), layer=1)[0], states[1][3])
    assert error(window.state_of(ints(1), layer=1)[0], both[0]) < 1e-6
    window.reset()
    assert np.array_equal(window.state_of(ints(1), layer=1)[0], states[1][1])


def test_errors(backend):
    state = pool()
    window = gatedelta.ReplayWindow(state, k_heads=2, capacity=4, max_tokens=2, backend=backend)
    x, before = inputs(T=2), state.copy()

    def refused(message, call, *arguments, **options):
        with pytest.raises(gatedelta.InvalidArgument, match=message):
            call(*arguments, **options)

    forward = gatedelta.forward
    refused("state: given, but the window has", forward, **x, state=state, window=window)
    refused("layer: expected 0..0, got 1", forward, **x, window=window, layer=1)
    refused("layer: given, but there is no window", forward, **x, state=state, layer=1)
    refused("parent: given, but there is no replay window", forward, **x, state=state, parent=ints([-1, 0], [-1, 0]))
    refused("read_slots: row 1 has slot 5", forward, **x, window=window, read_slots=ints(0, 5))
    refused("parent: row 0 token 1 has 1", forward, **x, window=window, parent=ints([-1, 1], [-1, 0]))
    refused("tokens: required", window.accept, ints(1))
    refused("tokens: expected 0..2, got 3", window.accept, ints(1), tokens=3)
    refused("accepted: row 0 has 3, expected 0..2", window.accept, ints(3), tokens=2)
    refused("slots: row 0 has slot 9", window.fold, ints(9))
    refused("to: row 0 has slot 1, which row 0 reads", window.copy, ints(1), ints(1))
    refused(r"slots: expected \[N\]", window.state_of, ints([1]))
    refused("capacity: expected 4..64, got 3", gatedelta.ReplayWindow, state, k_heads=2, capacity=3)
    refused("entries: expected bfloat16 or float32, got float16", gatedelta.ReplayWindow, state, k_heads=2, entries="float16")
    refused("k_heads: expected", gatedelta.ReplayWindow, state, k_heads=3)
    refused("state: expected .* in layer 1", gatedelta.ReplayWindow, [state, state[:2]], k_heads=2)
    refused("states: expected an array for each layer", gatedelta.ReplayWindow, [], k_heads=2)
    refused(r"state: expected \[slots, H, V, K\]", gatedelta.ReplayWindow, state[0], k_heads=2)
    state.setflags(write=False)
    refused("state: is written, but the array is read-only", window.fold, ints(0))
    assert np.array_equal(state, before)


def test_torch():
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    state, x = pool(), inputs(T=3)
    tensor = torch.from_numpy(state.copy())
    windows = [gatedelta.ReplayWindow(states, k_heads=2, capacity=4) for states in (state, tensor)]
    for _ in range(4):
        o = gatedelta.forward(**x, window=windows[0])
        other = gatedelta.forward(**{name: torch.from_numpy(array) for name, array in x.items()}, window=windows[1])
        assert np.array_equal(o, other.numpy())
        windows[0].accept(ints(2, 3), tokens=3)
        windows[1].accept(torch.tensor([2, 3], dtype=torch.int32), tokens=3)
    assert np.array_equal(state, tensor.numpy())
    found = windows[1].state_of(torch.tensor([1]))
    assert isinstance(found, torch.Tensor) and np.array_equal(windows[0].state_of(ints(1)), found.numpy())


def test_documented():
    for name, member in inspect.getmembers(gatedelta.ReplayWindow):
        assert name.startswith("_") or member.__doc__, name
    assert "states" in gatedelta.ReplayWindow.__doc__
