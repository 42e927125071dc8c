# SPDX-License-Identifier: Apache-2.0
"""The cells that peers are timed in: their tensors, the operator in float64, and the clock."""
import dataclasses
import statistics

import torch

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
MODES = ("update", "snapshots", "read-only", "token-slots", "replay")
WINDOW, FILLED = 16, 8  # replay: entries of the window, and those in it before the call
CHECKED_ROWS = 4  # of a batch, compared with the operator in float64
TOLERANCE = 0.02  # relative error (L2); bf16 outputs alone give 0.0017


@dataclasses.dataclass(frozen=True)
class Cell:
    mode: str
    tokens: int
    batch: int
    state: str  # dtype
    layout: str = "vk"
    q_heads: int = 16
    v_heads: int = 32
    width: int = 128  # K and V

    @property
    def op(self):
        return "decode" if self.tokens == 1 else "verify"

    @property
    def state_shape(self):  # the layouts differ by the order of two equal widths
        return (self.v_heads, self.width, self.width)

    @property
    def state_bytes(self):
        return self.batch * self.v_heads * self.width * self.width * DTYPES[self.state].itemsize

    @property
    def bytes(self):
        """Of the states that a call reads and writes."""
        written = {"update": 0, "snapshots": self.tokens, "token-slots": self.tokens}.get(self.mode, 0)
        return self.state_bytes * (1 + written)


def tensors(cell, device, memory=None, in_order=False, seed=1):
    """One instance: dict of q, k, v, a, b, A_log, dt_bias, pool, slots and the outputs. `memory`: numbers to take the pool from;
    `in_order`: row i of the batch has slot 1 + i, for peers that know no slots."""
    generator = None if device == "meta" else torch.Generator(device).manual_seed(seed)

    def normal(shape, mean, deviation, dtype):
        if device == "meta":
            return torch.empty(shape, dtype=dtype, device=device)
        return (torch.randn(shape, generator=generator, device=device) * deviation + mean).to(dtype)

    B, T, HQ, HV, D = cell.batch, cell.tokens, cell.q_heads, cell.v_heads, cell.width
    io, state = torch.bfloat16, DTYPES[cell.state]
    out = {"cell": cell, "scale": D ** -0.5}
    # q, k and v of a token are one row in memory, for peers that want them packed; others get copies that are dense.
    out["packed"] = normal((B, T, (2 * HQ + HV) * D), 0, 1, io)
    q, k, v = out["packed"].split([HQ * D, HQ * D, HV * D], -1)
    out["q"], out["k"] = (x.reshape(B, T, HQ, D).contiguous() for x in (q, k))
    out["v"] = v.reshape(B, T, HV, D).contiguous()
    # As in `gatedelta bench`: decays of about 0.99, few below 0.9.
    out["a"] = normal((B, T, HV), 0, 0.5, io)
    out["b"] = normal((B, T, HV), 0, 1, io)
    out["A_log"] = normal((HV,), -0.7, 0.3, torch.float32)
    out["dt_bias"] = normal((HV,), -3.9, 0.5, torch.float32)
    elements = pool_elements(cell)
    numbers = normal((elements,), 0, 0.1, state) if memory is None else memory[:elements]
    out["pool"] = numbers.view(pool_slots(cell), *cell.state_shape)
    order = torch.arange(B) if in_order else torch.randperm(B, generator=torch.Generator().manual_seed(seed))
    out["slots"] = (1 + order).to(device=device, dtype=torch.int32)
    out["o"] = torch.empty(B, T, HV, D, dtype=io, device=device)
    if cell.mode == "snapshots":
        out["snapshots"] = torch.empty(B, T, *cell.state_shape, dtype=state, device=device)
    if cell.mode == "token-slots":
        out["token_slots"] = (1 + B + torch.arange(B * T).view(B, T)).to(device=device, dtype=torch.int32)
    return out


def copy_of(x, memory):
    """Another instance, on other memory but of the same layer. The times do not depend on the numbers."""
    shared = ("pool", "A_log", "dt_bias")
    out = {name: value.clone() if isinstance(value, torch.Tensor) and name not in shared else value for name, value in x.items()}
    out["pool"] = memory[: x["pool"].numel()].view(x["pool"].shape)
    return out


def pool_slots(cell):
    """Slot 0 is left out: for some peers it means padding. Token slots follow the slots that are read."""
    return 1 + cell.batch * (1 + (cell.tokens if cell.mode == "token-slots" else 0))


def pool_elements(cell):
    return pool_slots(cell) * cell.v_heads * cell.width**2


def states_memory(elements, dtype, device):
    """A flat buffer of small random numbers, to take the pools of many instances from."""
    out = torch.empty(elements, dtype=dtype, device=device)
    filled = min(elements, 1 << 22)
    out[:filled].normal_(0, 0.1)
    while filled < elements:
        more = min(filled, elements - filled)
        out[filled : filled + more] = out[:more]
        filled += more
    return out


def reference(x, rows):
    """Outputs [rows, T, HV, V] and the states after each token [rows, T, HV, V, K], in float64, before the call touches the pool."""
    cell = x["cell"]
    index = torch.arange(cell.batch, device=x["o"].device)[rows]
    state = x["pool"][x["slots"][index].long()].double()
    state = state.transpose(-1, -2).clone() if cell.layout == "kv" else state.clone()
    group = cell.v_heads // cell.q_heads
    q, k = (torch.nn.functional.normalize(x[n][index].double(), dim=-1, eps=0).repeat_interleave(group, 2) for n in ("q", "k"))
    v, a, b = (x[n][index].double() for n in ("v", "a", "b"))
    decay = torch.exp(-torch.exp(x["A_log"].double()) * torch.nn.functional.softplus(a + x["dt_bias"].double()))
    beta = torch.sigmoid(b)
    outputs, states = [], []
    for t in range(cell.tokens):
        state = state * decay[:, t, :, None, None]
        u = beta[:, t, :, None] * (v[:, t] - torch.einsum("bhvk,bhk->bhv", state, k[:, t]))
        state = state + u[..., None] * k[:, t, :, None, :]
        outputs.append(torch.einsum("bhvk,bhk->bhv", state, q[:, t]) * x["scale"])
        states.append(state)
    return torch.stack(outputs, 1), torch.stack(states, 1)


def relative_error(found, expected):
    found = found.double()
    if found.shape != expected.shape:
        raise ValueError(f"got {tuple(found.shape)}, expected {tuple(expected.shape)}")
    if not torch.isfinite(found).all():
        return float("inf")
    return float((found - expected).norm() / expected.norm())


def states_after(x, call, result, rows):
    """What the call left behind of these rows, as [rows, n, HV, V, K], and which tokens' states that should be."""
    cell = x["cell"]
    index = torch.arange(cell.batch, device=x["o"].device)[rows]
    if cell.mode == "update":
        state = call.state(result)
        left = (x["pool"][x["slots"][index].long()] if state is None else state[index]).unsqueeze(1)
        return (left.transpose(-1, -2) if cell.layout == "kv" else left), slice(cell.tokens - 1, cell.tokens)
    if cell.mode == "snapshots":
        return x["snapshots"][index], slice(None)
    if cell.mode == "token-slots":
        return x["pool"][x["token_slots"][index].long()], slice(None)
    return x["pool"][x["slots"][index].long()].unsqueeze(1), None  # unchanged


def check(x, call):
    """Runs the call directly and as a graph; the largest relative errors of outputs and states."""
    rows = slice(0, min(CHECKED_ROWS, x["cell"].batch))
    before = x["pool"].clone()
    outputs, states = reference(x, rows)
    worst = [0.0, 0.0]

    def compare(result):
        torch.cuda.synchronize()
        left, tokens = states_after(x, call, result, rows)
        initial = before[x["slots"][: rows.stop].long()].double().unsqueeze(1)
        wanted = initial if tokens is None else states[:, tokens]
        worst[0] = max(worst[0], relative_error(call.output(result)[rows], outputs))
        worst[1] = max(worst[1], relative_error(left, wanted))

    def reset():
        x["pool"].copy_(before)
        x["o"].zero_()
        if "snapshots" in x:
            x["snapshots"].zero_()

    compare(call())
    reset()
    graph, results = capture([call])  # a launch on another stream would escape it
    reset()
    call.output(results[0]).zero_()
    graph.replay()
    compare(results[0])
    x["pool"].copy_(before)
    return worst


def capture(calls):
    """The calls as one CUDA graph, and what they returned, which must live as long as the graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        calls[0]()  # whatever is made on first use
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = [call() for call in calls]
    return graph, results


def time_calls(calls, replays):
    """Microseconds of one call, for each replay of the calls as one graph."""
    graph, results = capture(calls)
    for _ in range(2):
        graph.replay()
    times = []
    for _ in range(replays):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(calls))
    del results
    return times


def quantiles(times):
    ordered = sorted(times)
    return {"median_us": statistics.median(ordered), "min_us": ordered[0], "p10_us": ordered[int(0.1 * (len(ordered) - 1))],
            "p90_us": ordered[-1 - int(0.1 * (len(ordered) - 1))], "max_us": ordered[-1], "repetitions": len(ordered)}
