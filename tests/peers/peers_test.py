# SPDX-License-Identifier: Apache-2.0
"""Checks what bench/peers can do without a device: the operator that peers are compared with, the comparison, the plan of cells."""
import json
import pathlib
import struct
import sys
import types
import unittest

ROOT = pathlib.Path(sys.argv.pop(1)).resolve()
sys.dont_write_bytecode = True  # nothing is left beside the scripts
sys.path.insert(0, str(ROOT / "bench/peers"))

try:
    import torch
except ImportError as missing:
    print(f"bench/peers needs PyTorch: {missing}")
    sys.exit(77)

import cells  # noqa: E402
import entry_points  # noqa: E402
import time_peers  # noqa: E402
from cells import Cell  # noqa: E402


def golden(name):
    """The tensors of a safetensors file."""
    content = (ROOT / "tests/data/golden" / name).read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    out = {}
    for key, entry in json.loads(content[8 : 8 + length]).items():
        first, last = (8 + length + offset for offset in entry["data_offsets"])
        dtype = {"F32": torch.float32, "BF16": torch.bfloat16}[entry["dtype"]]
        out[key] = torch.frombuffer(bytearray(content[first:last]), dtype=dtype).view(entry["shape"])
    return out


class Reference(unittest.TestCase):
    def instance(self, name, layout):
        found = golden(name)
        B, T, HV, D = found["v"].shape
        cell = Cell("update", T, B, "f32", layout, found["q"].shape[2], HV, D)
        pool = torch.zeros(1 + B, HV, D, D)
        order = torch.arange(B).flip(0)  # of the slots
        pool[1 + order] = found["state"].transpose(-1, -2) if layout == "kv" else found["state"]
        return found, {**found, "cell": cell, "scale": D**-0.5, "pool": pool, "slots": (1 + order).int(), "o": found["o"]}

    def test_golden_values(self):
        for name in ("decode_t1_layer0.safetensors", "verify_t4_layer3.safetensors"):
            for layout in ("vk", "kv"):
                found, x = self.instance(name, layout)
                outputs, states = cells.reference(x, slice(0, x["cell"].batch))
                self.assertLess(cells.relative_error(found["o"], outputs), 1e-6)
                if "snapshots" in found:
                    self.assertLess(cells.relative_error(found["snapshots"], states), 1e-6)
                else:
                    self.assertLess(cells.relative_error(found["state_out"], states[:, -1]), 1e-6)


class Comparison(unittest.TestCase):
    """states_after() finds what each mode leaves behind, and only that."""

    def errors(self, mode, write):
        cell = Cell(mode, 3, 2, "f32", "vk", 1, 2, 8)
        x = cells.tensors(cell, "cpu")
        rows = slice(0, 2)
        outputs, states = cells.reference(x, rows)
        before = x["pool"][x["slots"].long()].double().unsqueeze(1)
        if write:
            self.store(x, states)
        call = entry_points.Call(lambda: None, {}, output=lambda result: outputs)
        left, tokens = cells.states_after(x, call, None, rows)
        return cells.relative_error(left, before if tokens is None else states[:, tokens])

    def store(self, x, states):
        mode = x["cell"].mode
        if mode == "update":
            x["pool"][x["slots"].long()] = states[:, -1].float()
        elif mode == "snapshots":
            x["snapshots"].copy_(states)
        elif mode == "token-slots":
            x["pool"][x["token_slots"].long()] = states.float()
        else:
            x["pool"][x["slots"].long()] = states[:, -1].float()  # must not be written

    def test_modes(self):
        for mode in ("update", "snapshots", "token-slots"):
            self.assertLess(self.errors(mode, write=True), 1e-6, mode)
            self.assertGreater(self.errors(mode, write=False), cells.TOLERANCE, mode)
        for mode in ("read-only", "replay"):
            self.assertEqual(self.errors(mode, write=False), 0, mode)
            self.assertGreater(self.errors(mode, write=True), cells.TOLERANCE, mode)

    def test_not_finite(self):
        self.assertEqual(cells.relative_error(torch.tensor([1.0, float("nan")]), torch.ones(2).double()), float("inf"))
        with self.assertRaises(ValueError):
            cells.relative_error(torch.ones(2), torch.ones(2, 1).double())

    def test_instances_do_not_share_states(self):
        cell = Cell("token-slots", 2, 3, "bf16", "vk", 1, 2, 8)
        elements = cells.pool_elements(cell)
        memory = cells.states_memory(2 * elements, torch.bfloat16, "cpu")
        first = cells.tensors(cell, "cpu", memory)
        second = cells.copy_of(first, memory[elements:])
        second["pool"].zero_()
        self.assertGreater(float(first["pool"].abs().min(-1).values.max()), 0)
        self.assertEqual(sorted(first["slots"].tolist()), [1, 2, 3])
        self.assertEqual(first["token_slots"].flatten().tolist(), list(range(4, 10)))


class Plan(unittest.TestCase):
    def options(self, **fields):
        defaults = dict(heads=[(16, 32)], tokens=None, batch=None, layout=None, modes=cells.MODES, state=["bf16", "f32"], quick=False)
        return types.SimpleNamespace(**{**defaults, **fields})

    def test_cells_of_the_peers(self):
        peers = [peer() for peer in entry_points.PEERS.values()]
        jobs = time_peers.plan(self.options(), peers)
        self.assertEqual(len(jobs), len({(peer.name, cell) for peer, cell in jobs}))
        for mode in cells.MODES:  # somebody does each of them
            self.assertTrue(any(cell.mode == mode for _, cell in jobs), mode)
        self.assertEqual({cell.batch for _, cell in jobs if cell.tokens == 1}, set(time_peers.DECODE_BATCHES))
        quick = time_peers.plan(self.options(quick=True), peers)
        self.assertLess({cell for _, cell in quick}, {cell for _, cell in jobs})

    def test_options(self):
        peers = [entry_points.Fla()]
        jobs = time_peers.plan(self.options(tokens=[4], batch=[2, 3], layout=["kv"], modes=["update"], state=["f32"], heads=[(4, 8)]), peers)
        self.assertEqual([cell for _, cell in jobs], [Cell("update", 4, batch, "f32", "kv", 4, 8) for batch in (2, 3)])

    def test_rows_have_the_fields_of_gatedelta_bench(self):
        peer = entry_points.Fla()
        peer.version = "1"
        row = time_peers.row_of(peer, Cell("update", 1, 1, "f32"), {}, {"hardware": "x", "commit": "y", "command": "z"})
        bench = json.loads((ROOT / "bench/results/cpu/default.json").read_text(encoding="utf-8"))[0]
        not_measured = {"threads", "interruptions_per_second", "bound", "memory_limit_us", "memory_limit_p10_us", "memory_limit_p90_us",
                        "peak_gflops", "gbps", "gflops", "limit_variant", "version"}
        timed = {"instances", "instance_bytes", *cells.quantiles([1.0, 2.0, 3.0])}
        self.assertEqual(set(bench) - set(row) - timed, not_measured)


if __name__ == "__main__":
    unittest.main(verbosity=2)
