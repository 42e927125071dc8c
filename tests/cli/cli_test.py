# SPDX-License-Identifier: Apache-2.0
"""Drives the command-line tool: cli_test.py TOOL GOLDEN_FOLDER [unittest options]. Standard library only."""
import json
import math
import os
import random
import struct
import subprocess
import sys
import tempfile
import unittest

TOOL, GOLDEN = sys.argv.pop(1), sys.argv.pop(1)
BACKEND = os.environ.get("CLI_TEST_BACKEND", "reference")  # of the calls from files
U32 = 2.0**-24  # unit roundoff of float32
FORMATS = {"F32": "f", "F16": "e", "I32": "i", "I64": "q"}


def round_bf16(x):
    bits = struct.unpack("<I", struct.pack("<f", x))[0]
    return struct.unpack("<f", struct.pack("<I", (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000))[0]


def encode(dtype, values):
    if dtype == "BF16":
        words = (struct.unpack("<I", struct.pack("<f", round_bf16(x)))[0] >> 16 for x in values)
        return struct.pack(f"<{len(values)}H", *words)
    return struct.pack(f"<{len(values)}{FORMATS[dtype]}", *values)


def decode(dtype, data):
    if dtype == "BF16":
        words = struct.unpack(f"<{len(data) // 2}H", data)
        return list(struct.unpack(f"<{len(words)}f", struct.pack(f"<{len(words)}I", *(w << 16 for w in words))))
    size = struct.calcsize(FORMATS[dtype])
    return list(struct.unpack(f"<{len(data) // size}{FORMATS[dtype]}", data))


def rounded(dtype, values):
    return decode(dtype, encode(dtype, values))


class Tensor:
    def __init__(self, dtype, shape, values):
        self.dtype, self.shape, self.values = dtype, list(shape), list(values)
        assert len(self.values) == math.prod(self.shape)

    def __eq__(self, other):
        return (self.dtype, self.shape, self.values) == (other.dtype, other.shape, other.values)

    def matrices_transposed(self):
        *outer, m, n = self.shape
        v = self.values
        values = [v[o * m * n + i * n + j] for o in range(math.prod(outer)) for j in range(n) for i in range(m)]
        return Tensor(self.dtype, [*outer, n, m], values)


def pack(tensors):
    header, data = {}, b""
    for name, t in tensors.items():
        part = encode(t.dtype, t.values)
        header[name] = {"dtype": t.dtype, "shape": t.shape, "data_offsets": [len(data), len(data) + len(part)]}
        data += part
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def load(path):
    with open(path, "rb") as file:
        whole = file.read()
    start = 8 + struct.unpack("<Q", whole[:8])[0]
    header = json.loads(whole[8:start])
    header.pop("__metadata__", None)
    return {
        name: Tensor(d["dtype"], d["shape"], decode(d["dtype"], whole[start:][slice(*d["data_offsets"])]))
        for name, d in header.items()
    }


def relative_error(values, expected):
    assert len(values) == len(expected)
    if not all(map(math.isfinite, values)):
        return math.inf
    norm = math.sqrt(math.fsum(y * y for y in expected))
    distance = math.sqrt(math.fsum((x - y) ** 2 for x, y in zip(values, expected)))
    return distance / norm if norm else distance


def operator(x, gate="none", beta="one", scale=None, l2norm=True, l2_eps=1e-6, softplus_beta=1.0, threshold=20.0):
    """The equations, for one head and one sequence: x has lists q, k (of K numbers a token), v (of V numbers), S (V x K),
    and by form a, A_log, dt_bias, g, b, beta. Returns the outputs and the states after each token."""
    S, outputs, states = [row[:] for row in x["S"]], [], []
    K = len(S[0])
    for t in range(len(x["q"])):
        q, k = x["q"][t], x["k"][t]
        if l2norm:
            q = [i / math.sqrt(sum(j * j for j in q) + l2_eps) for i in q]
            k = [i / math.sqrt(sum(j * j for j in k) + l2_eps) for i in k]
        g, strength = 0.0, 1.0
        if gate == "log":
            g = x["g"][t]
        if gate == "raw":
            y = x["a"][t] + x["dt_bias"]
            y = y if softplus_beta * y > threshold else math.log1p(math.exp(softplus_beta * y)) / softplus_beta
            g = -math.exp(x["A_log"]) * y
        if beta == "value":
            strength = x["beta"][t]
        if beta in ("logits", "logits2"):
            strength = (2 if beta == "logits2" else 1) / (1 + math.exp(-x["b"][t]))
        S = [[math.exp(g) * s for s in row] for row in S]
        for v, row in enumerate(S):
            u = strength * (x["v"][t][v] - sum(s * i for s, i in zip(row, k)))
            S[v] = [s + u * i for s, i in zip(row, k)]
        factor = scale if scale is not None else 1 / math.sqrt(K)
        outputs.append([factor * sum(s * i for s, i in zip(row, q)) for row in S])
        states.append([row[:] for row in S])
    return outputs, states


B, T, HQ, HK, HV, H, K, V, SLOTS = 2, 3, 2, 1, 4, 4, 5, 3, 7


def small_call(seed=1):
    """Every input there is, in float32; a test takes those it wants."""
    rng = random.Random(seed)

    def normal(*shape):
        return Tensor("F32", shape, rounded("F32", [rng.gauss(0, 1) for _ in range(math.prod(shape))]))

    return {
        "q": normal(B, T, HQ, K), "k": normal(B, T, HK, K), "v": normal(B, T, HV, V),
        "a": normal(B, T, H), "A_log": normal(H), "dt_bias": normal(H),
        "g": Tensor("F32", (B, T, H), rounded("F32", [-rng.random() for _ in range(B * T * H)])),
        "b": normal(B, T, H), "beta": Tensor("F32", (B, T, H), rounded("F32", [rng.random() for _ in range(B * T * H)])),
        "state": normal(SLOTS, H, V, K),
    }  # fmt: skip


def rows_of(tensor, index, width):
    return tensor.values[index * width : (index + 1) * width]


def expected_call(x, row, tokens, slot, **forms):
    """The outputs [t][h][v] and states [t][h] (flat V*K) of tokens [(b, t), ...] from this slot (None: zero)."""
    heads = []
    for h in range(H):
        at = [b * T + t for b, t in tokens]
        one = {
            "q": [rows_of(x["q"], i * HQ + h // (H // HQ), K) for i in at],
            "k": [rows_of(x["k"], i * HK + h // (H // HK), K) for i in at],
            "v": [rows_of(x["v"], i * HV + h // (H // HV), V) for i in at],
            "S": [rows_of(x["state"], (slot * H + h) * V + v, K) if slot is not None else [0.0] * K for v in range(V)],
        }
        for name in ("a", "g", "b", "beta"):
            one[name] = [x[name].values[i * H + h] for i in at]
        for name in ("A_log", "dt_bias"):
            one[name] = x[name].values[h]
        heads.append(operator(one, **forms))
    outputs = [[y for o, _ in heads for y in o[t]] for t in range(len(tokens))]
    states = [[y for _, s in heads for row in s[t] for y in row] for t in range(len(tokens))]
    return outputs, states


class ToolTest(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory(prefix="gatedelta-cli-")
        self.addCleanup(folder.cleanup)
        self.folder = folder.name
        self.input, self.output = self.path("in.safetensors"), self.path("out.safetensors")

    def path(self, name):
        return os.path.join(self.folder, name)

    def call(self, *args, env=(), **options):
        # The environment may name a backend; here only --backend does.
        environment = {k: v for k, v in os.environ.items() if k != "GATEDELTA_BACKEND"} | dict(env)
        return subprocess.run([TOOL, *args], capture_output=True, text=True, env=environment, timeout=60, **options)

    def write(self, content):
        with open(self.input, "wb") as file:
            file.write(content if isinstance(content, bytes) else pack(content))

    def run_file(self, path, *args):
        done = self.call("run", "--input", path, "--output", self.output, *args)
        self.assertEqual((done.returncode, done.stdout, done.stderr), (0, "", ""))
        return load(self.output)

    def run_call(self, tensors, *args):
        self.write(tensors)
        return self.run_file(self.input, "--backend", BACKEND, *args)

    def check_fails(self, done, *causes):
        self.assertEqual(done.returncode, 2, done)
        self.assertEqual(done.stdout, "")
        self.assertRegex(done.stderr, r"\Agatedelta: [^\n]+\n\Z")
        self.assertLess(len(done.stderr), 1500)
        for cause in causes:
            self.assertIn(cause, done.stderr)
        self.assertEqual([n for n in os.listdir(self.folder) if n != "in.safetensors"], [])

    def fails(self, content, *args, cause):
        if content is not None:
            self.write(content)
        self.check_fails(self.call("run", "--input", self.input, "--output", self.output, *args), cause)

    def check_close(self, values, expected):
        self.assertLess(relative_error(values, expected), (K + T) * U32)


class Info(ToolTest):
    def test_json(self):
        done = self.call("info", "--json")
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        info = json.loads(done.stdout)
        names = [b["name"] for b in info["backends"]]
        self.assertEqual(names[-1], "reference")
        self.assertEqual(len(names), len(set(names)))
        for backend in info["backends"]:
            self.assertTrue(backend["description"])
            self.assertEqual(backend["available"], backend["reason"] == "")
            self.assertEqual(backend["host_memory"], "NVIDIA" not in backend["description"] and "::Cuda" not in backend["description"])
        self.assertRegex(info["version"], r"^\d+\.\d+\.\d+$")
        self.assertIsInstance(info["cpu_features"], list)
        self.assertEqual(info["devices"][0]["device"], "cpu")
        self.assertGreaterEqual(info["devices"][0]["logical_cores"], 1)

    def test_text_says_the_same(self):
        info, done = json.loads(self.call("info", "--json").stdout), self.call("info")
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        for word in [info["version"], *info["cpu_features"], *(b["name"] for b in info["backends"])]:
            self.assertIn(word, done.stdout)
        lines = self.call("info", "--support").stdout.splitlines()
        self.assertEqual(lines[0], "| | " + " | ".join(f"`{b['name']}`" for b in info["backends"]) + " |")
        self.assertTrue(all(line.endswith("| yes |") for line in lines[2:]), "the reference does everything")

    def test_help_and_version(self):
        for args in (["--help"], ["info", "--help"], ["run", "--help"], ["run", "-h"], ["--version"]):
            done = self.call(*args)
            self.assertEqual((done.returncode, done.stderr), (0, ""), args)
            self.assertTrue(done.stdout)
        self.assertIn("--softplus-threshold", self.call("run", "--help").stdout)

    def test_full_standard_output(self):
        with open("/dev/full", "w") as full:
            done = subprocess.run([TOOL, "info"], stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
        self.assertEqual(done.returncode, 2)
        self.assertRegex(done.stderr, r"\Agatedelta: [^\n]+\n\Z")


class Check(ToolTest):
    def test_agreement(self):
        done = self.call("check", "--cases", "20", "--seed", "3", "--threads", "1")
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        self.assertEqual(done.stdout, "check: auto against reference: 20 passed, 0 failed, 0 skipped\n")
        done = self.call("check", "--backend", "reference", "--against", "reference", "--case", "7")
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        self.assertEqual(done.stdout, "check: reference against reference: 1 passed, 0 failed, 0 skipped\n")

    def test_bad_usage(self):
        for args, cause in (
            (["--backend", "nonesuch"], "expected auto or one of"),
            (["--against", "nonesuch"], "expected auto or one of"),
            (["--cases", "0"], "--cases: expected at least 1, got 0"),
            (["--cases", "x"], "--cases"),
            (["--case", "-1"], "--case: expected at least 0, got -1"),
            (["--threads", "-1"], "--threads: expected at least 0, got -1"),
            (["--nonesuch"], "--nonesuch"),
        ):
            with self.subTest(args=args):
                done = self.call("check", *args)
                self.assertEqual((done.returncode, done.stdout), (2, ""))
                self.assertEqual(done.stderr.count("\n"), 1)
                self.assertIn(cause, done.stderr)


class Golden(ToolTest):
    """On inputs of a trained model, for every backend that is available."""

    def check(self, name, case, *args):
        golden = load(os.path.join(GOLDEN, name))
        for backend in json.loads(self.call("info", "--json").stdout)["backends"]:
            if not backend["available"]:
                print(f"skipped: {name} on {backend['name']}: {backend['reason']}", file=sys.stderr)
                continue
            for dtype in ("F32", "BF16", "F16"):
                with self.subTest(file=name, backend=backend["name"], dtype=dtype):
                    out = self.run_file(
                        os.path.join(GOLDEN, name), "--backend", backend["name"], "--out-dtype", dtype.lower(), *args
                    )
                    self.assertEqual(set(out), {"o", *case})
                    self.assertEqual(out["o"].dtype, dtype)
                    self.check_tensor(out["o"], golden["o"], golden)
                    for ours, theirs in case.items():
                        self.assertEqual(out[ours].dtype, "F32")
                        self.check_tensor(out[ours], theirs(golden), golden)
        return golden, out

    def check_tensor(self, found, expected, golden):
        # 1.5 times what rounding the answer to this dtype costs, and the float32 rounding of K-long sums over T tokens.
        tokens, key_dim = golden["q"].shape[1], golden["q"].shape[3]
        rounding = relative_error(rounded(found.dtype, expected.values), expected.values)
        self.assertEqual(found.shape, expected.shape)
        self.assertLess(relative_error(found.values, expected.values), 1.5 * rounding + (key_dim + tokens) * U32)

    def test_decode(self):
        self.check("decode_t1_layer0.safetensors", {"state": lambda x: x["state_out"]})

    def test_prefill_from_no_state(self):
        self.check("prefill_256_layer0.safetensors", {"state": lambda x: x["state_out"]})

    def test_verify_with_snapshots(self):
        golden, out = self.check(
            "verify_t4_layer3.safetensors",
            {"snapshots": lambda x: x["snapshots"], "state": lambda x: x["state"]},
            "--snapshots",
            "--no-update",
        )
        self.assertEqual(out["state"], golden["state"])  # --no-update: not a bit of it changes

    def test_decode_with_bf16_state(self):
        golden = load(os.path.join(GOLDEN, "decode_t1_layer0.safetensors"))
        inputs = {n: golden[n] for n in ("q", "k", "v", "a", "b", "A_log", "dt_bias")} | {"state": golden["state_bf16"]}
        out = self.run_call(inputs)
        self.assertEqual((out["o"].dtype, out["state"].dtype), ("BF16", "BF16"))
        self.check_tensor(out["o"], golden["o_from_bf16"], golden)
        self.check_tensor(out["state"], golden["state_out_from_bf16"], golden)


class Cuda(ToolTest):
    """The backend whose tensors the tool copies: with a GPU it runs, without one the reason is what every command says."""

    def setUp(self):
        super().setUp()
        info = json.loads(self.call("info", "--json").stdout)
        backend = next((b for b in info["backends"] if b["name"] == "cuda"), None)
        if backend is None:
            self.skipTest("built without CUDA")
        self.info, self.reason = info, backend["reason"]

    def no_gpu(self):
        if self.reason:
            print(f"skipped: {self.id().split('.', 1)[1]} on a GPU: {self.reason}", file=sys.stderr)
        return self.reason != ""

    def test_info(self):
        devices = [d for d in self.info["devices"] if d["device"] != "cpu"]
        self.assertRegex(self.info["cuda"]["runtime"], r"^\d+\.\d+$")
        text = self.call("info").stdout
        self.assertIn(f"runtime {self.info['cuda']['runtime']}", text)
        if self.no_gpu():
            self.assertIn(f"(unavailable: {self.reason})", text)
            return
        self.assertEqual(devices[0]["device"], "cuda:0")
        for device in devices:
            self.assertRegex(device["compute_capability"], r"^\d+\.\d$")
            self.assertRegex(device["code"], "machine code$|^PTX|^none")
            for value in (device["model"], device["compute_capability"], device["code"]):
                self.assertIn(value, text)
        self.assertIn(self.info["cuda"]["driver_supports"], text)

    def test_run(self):
        x = small_call()
        token_slots = {"token_slots": Tensor("I32", [B, T], [0, 1, 2, 3, 4, 5]), "accepted": Tensor("I32", [B], [2, 3])}
        call = {n: x[n] for n in ("q", "k", "v", "a", "A_log", "dt_bias", "b", "state")}
        if self.no_gpu():
            for env, args in (((), ["--backend", "cuda"]), ({"GATEDELTA_BACKEND": "cuda"}, [])):
                self.write(call)
                done = self.call("run", "--input", self.input, "--output", self.output, *args, env=env)
                self.check_fails(done, "cuda is not available", self.reason)
            return
        for tensors, args in (
            (call, []), (call, ["--snapshots", "--no-update"]), (call | token_slots, ["--snapshots"]),
            (call | {"read_slots": Tensor("I64", [B], [4, 1]), "write_slots": Tensor("I32", [B], [1, -1])}, []),
            ({n: x[n] for n in ("q", "k", "v")}, []),
        ):  # fmt: skip
            with self.subTest(args=args, tensors=list(tensors)):
                expected = self.run_call(tensors, *args)
                found = self.run_file(self.input, "--backend", "cuda", *args)
                self.assertEqual(found.keys(), expected.keys())
                for name in expected:
                    self.assertEqual(found[name].shape, expected[name].shape)
                    self.check_close(found[name].values, expected[name].values)
                os.remove(self.output)
        bad = call | {"read_slots": Tensor("I32", [B], [0, SLOTS])}
        self.fails(bad, "--backend", "cuda", cause=f"read_slots: row 1 has slot {SLOTS}, the pool has {SLOTS} slots")

    def test_check(self):
        done = self.call("check", "--backend", "cuda", "--cases", "5")
        if self.no_gpu():
            self.check_fails(done, "cuda is not available", self.reason)
            return
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        self.assertIn("check: cuda against reference: 5 passed, 0 failed", done.stdout)


class Options(ToolTest):
    """Small calls with K != V and grouped heads, against the equations above."""

    def check(self, names, args, forms, slots=(0, 1)):
        x = small_call()
        out = self.run_call({n: x[n] for n in names.split()}, *args)
        for row in range(B):
            o, states = expected_call(x, row, [(row, t) for t in range(T)], slots[row], **forms)
            for t in range(T):
                self.check_close(rows_of(out["o"], row * T + t, H * V), o[t])
                if "snapshots" in out:
                    self.check_close(rows_of(out["snapshots"], row * T + t, H * V * K), states[t])
            if "state" in out:
                self.check_close(rows_of(out["state"], row if slots[row] is None else slots[row], H * V * K), states[-1])
        return x, out

    def test_forms_follow_from_the_tensors(self):
        raw, logits = {"gate": "raw"}, {"beta": "logits"}
        self.check("q k v state", [], {})
        self.check("q k v a A_log dt_bias b state", [], raw | logits)
        self.check("q k v g b state", [], {"gate": "log"} | logits)
        self.check("q k v a A_log dt_bias beta state", [], raw | {"beta": "value"})
        self.check("q k v a A_log dt_bias state", [], raw)

    def test_forms_by_option(self):
        every = "q k v a A_log dt_bias g b beta state"
        for gate in ("raw", "log", "none"):
            for beta in ("logits", "logits2", "value", "one"):
                with self.subTest(gate=gate, beta=beta):
                    self.check(every, ["--gate", gate, "--beta", beta], {"gate": gate, "beta": beta})

    def test_dt_bias_is_optional(self):
        x = small_call()
        names = ["q", "k", "v", "a", "A_log", "b"]
        without = self.run_call({n: x[n] for n in names})
        x["dt_bias"].values = [0.0] * H
        self.assertEqual(without["o"], self.run_call({n: x[n] for n in [*names, "dt_bias"]})["o"])

    def test_numbers(self):
        names, forms = "q k v a A_log dt_bias b state", {"gate": "raw", "beta": "logits"}
        self.check(names, ["--scale", "-0.75"], forms | {"scale": -0.75})
        self.check(names, ["--no-l2norm"], forms | {"l2norm": False})
        self.check(names, ["--l2-eps", "0.5"], forms | {"l2_eps": 0.5})
        self.check(names, ["--softplus-beta", "3"], forms | {"softplus_beta": 3.0})
        self.check(names, ["--softplus-threshold", "0.25"], forms | {"threshold": 0.25})
        self.check(names, ["--threads", "1"], forms)

    def test_state(self):
        x, out = self.check("q k v g state", [], {"gate": "log"})
        row = H * V * K
        self.assertEqual(out["state"].shape, [SLOTS, H, V, K])
        self.assertEqual(out["state"].values[2 * row :], x["state"].values[2 * row :])  # slots of no row
        x, out = self.check("q k v g", ["--snapshots"], {"gate": "log"}, slots=(None, None))
        self.assertEqual(out["state"].shape, [B, H, V, K])
        self.assertEqual(out["snapshots"].shape, [B, T, H, V, K])
        self.assertEqual(set(self.run_call({n: x[n] for n in ("q", "k", "v")}, "--no-update")), {"o"})
        out = self.run_call({n: x[n] for n in ("q", "k", "v", "state")}, "--no-update")
        self.assertEqual(out["state"], x["state"])

    def test_slots(self):
        x = small_call()
        call = {n: x[n] for n in ("q", "k", "v", "state")}
        row = H * V * K
        states = [expected_call(x, n, [(n, t) for t in range(T)], slot)[1] for n, slot in enumerate((4, 1))]
        out = self.run_call(call | {"read_slots": Tensor("I64", [B], [4, 1]), "write_slots": Tensor("I32", [B], [2, -1])})
        self.check_close(rows_of(out["state"], 2, row), states[0][-1])
        for slot in set(range(SLOTS)) - {2}:
            self.assertEqual(rows_of(out["state"], slot, row), rows_of(x["state"], slot, row))

        # Slot 0 is padding with --null-slot 0, and so row 1 has zeros and slot 0 stays.
        slots = {"read_slots": Tensor("I32", [B], [4, 0])}
        out = self.run_call(call | slots, "--null-slot", "0")
        self.assertEqual(rows_of(out["o"], 1, T * H * V), [0.0] * (T * H * V))
        self.assertEqual(rows_of(out["state"], 0, row), rows_of(x["state"], 0, row))
        self.check_close(rows_of(out["state"], 4, row), states[0][-1])
        self.assertNotEqual(rows_of(self.run_call(call | slots)["o"], 1, T * H * V), [0.0] * (T * H * V))

    def test_token_slots_and_accepted(self):
        x = small_call()
        token_slots = [0, 1, 2, 3, 4, 5]  # row 0 starts from slot 1, row 1 from slot 5
        call = {n: x[n] for n in ("q", "k", "v", "state")}
        out = self.run_call(
            call | {"token_slots": Tensor("I32", [B, T], token_slots), "accepted": Tensor("I32", [B], [2, 3])}
        )
        for n, slot in enumerate((1, 5)):
            o, states = expected_call(x, n, [(n, t) for t in range(T)], slot)
            for t in range(T):
                self.check_close(rows_of(out["o"], n * T + t, H * V), o[t])
                self.check_close(rows_of(out["state"], token_slots[n * T + t], H * V * K), states[t])

    def test_cu_seqlens(self):
        x = small_call()
        call = {n: Tensor("F32", [1, B * T, *x[n].shape[2:]], x[n].values) for n in ("q", "k", "v", "g")}
        for dtype in ("I32", "I64"):
            out = self.run_call(call | {"cu_seqlens": Tensor(dtype, [4], [0, 2, 2, 6])}, "--snapshots")
            self.assertEqual(out["state"].shape, [3, H, V, K])
            self.assertEqual(out["snapshots"].shape, [3, 4, H, V, K])
            for n, (begin, end) in enumerate(((0, 2), (2, 2), (2, 6))):
                o, states = expected_call(x, n, [(0, t) for t in range(begin, end)], None, gate="log")
                for i, t in enumerate(range(begin, end)):
                    self.check_close(rows_of(out["o"], t, H * V), o[i])
                    self.check_close(rows_of(out["snapshots"], n * 4 + i, H * V * K), states[i])
                last = states[-1] if states else [0.0] * (H * V * K)
                self.check_close(rows_of(out["state"], n, H * V * K), last)
            self.assertEqual(rows_of(out["snapshots"], 2, H * V * K), [0.0] * (H * V * K))  # after the end of sequence 0

    def test_no_tokens(self):
        state = small_call()["state"]
        call = {n: Tensor("F32", [B, 0, heads, dim], []) for n, heads, dim in (("q", HQ, K), ("k", HK, K), ("v", HV, V))}
        out = self.run_call(call | {"state": state}, "--snapshots")
        self.assertEqual(out["state"], state)
        self.assertEqual((out["o"].shape, out["snapshots"].shape), ([B, 0, H, V], [B, 0, H, V, K]))

    def test_layouts_agree(self):
        x = small_call()
        call = {n: x[n] for n in ("q", "k", "v", "g", "b", "state")}
        vk = self.run_call(call, "--snapshots")
        kv = self.run_call(call | {"state": x["state"].matrices_transposed()}, "--snapshots", "--state-layout", "kv")
        self.assertEqual(kv["state"].shape, [SLOTS, H, K, V])
        self.assertEqual(vk["o"], kv["o"])
        self.assertEqual(vk["state"], kv["state"].matrices_transposed())
        self.assertEqual(vk["snapshots"], kv["snapshots"].matrices_transposed())
        call.pop("state")
        vk, kv = self.run_call(call), self.run_call(call, "--state-layout", "kv")
        self.assertEqual(vk["state"], kv["state"].matrices_transposed())

    def test_dtypes(self):
        x = small_call()
        names = ("q", "k", "v", "a", "A_log", "dt_bias", "b", "state")
        dtypes = ("BF16", "F16", "BF16", "F16", "BF16", "F32", "BF16", "F16")
        for name, dtype in zip(names, dtypes):
            x[name] = Tensor(dtype, x[name].shape, rounded(dtype, x[name].values))
        call = {n: x[n] for n in names}
        out = self.run_call(call, "--snapshots")
        self.assertEqual([out[n].dtype for n in ("o", "state", "snapshots")], ["BF16", "F16", "F16"])
        forms = {"gate": "raw", "beta": "logits"}
        for option, dtype in (("f32", "F32"), ("f16", "F16"), ("bf16", "BF16")):
            out = self.run_call(call, "--out-dtype", option)
            self.assertEqual(out["o"].dtype, dtype)
            for row in range(B):
                o, _ = expected_call(x, row, [(row, t) for t in range(T)], row, **forms)
                found, expected = rows_of(out["o"], row, T * H * V), sum(o, [])
                rounding = relative_error(rounded(dtype, expected), expected)
                self.assertLess(relative_error(found, expected), 1.5 * rounding + (K + T) * U32)

    def test_output_may_be_the_input(self):
        x = small_call()
        expected = self.run_call({n: x[n] for n in ("q", "k", "v")})
        done = self.call("run", "--input", self.input, "--output", self.input, "--backend", BACKEND)
        self.assertEqual(done.returncode, 0)
        self.assertEqual(load(self.input), expected)


class Errors(ToolTest):
    """One line on standard error, exit code 2, and no file."""

    def call_of(self, names="q k v g b state", **changes):
        x = small_call()
        return {n: x[n] for n in names.split()} | changes

    def test_command_line(self):
        self.write(self.call_of())
        files = ["--input", self.input, "--output", self.output]
        for args, cause in (
            ([], "subcommand"),
            (["frob"], "frob"),
            (["--frob"], "--frob"),
            (["info", "--frob"], "--frob"),
            (["info", "frob"], "frob"),
            (["run"], "--input"),
            (["run", *files[:2]], "--output"),
            (["run", *files[2:]], "--input"),
            (["run", "--input"], "--input"),
            (["run", *files, "--frob"], "--frob"),
            (["run", *files, "frob"], "frob"),
            (["run", *files, "info"], "info"),
            (["run", *files, "--frob\nnew line"], "--frob new line"),
            (["run", *files, "--gate", "frob"], "--gate"),
            (["run", *files, "--gate", ""], "--gate"),
            (["run", *files, "--beta", "twice"], "--beta"),
            (["run", *files, "--out-dtype", "i32"], "--out-dtype"),
            (["run", *files, "--state-layout", "vv"], "--state-layout"),
            (["run", *files, "--scale", "x"], "--scale"),
            (["run", *files, "--scale"], "--scale"),
            (["run", *files, "--scale", "1", "--scale", "2"], "--scale"),
            (["run", *files, "--scale", "nan"], "scale"),
            (["run", *files, "--scale", "1e400"], "scale"),
            (["run", *files, "--l2-eps", "-1"], "l2_eps"),
            (["run", *files, "--softplus-beta", "0"], "softplus_beta"),
            (["run", *files, "--softplus-threshold", "nan"], "softplus_threshold"),
            (["run", *files, "--null-slot", "0.5"], "--null-slot"),
            (["run", *files, "--null-slot", "99999999999999999999"], "--null-slot"),
            (["run", *files, "--threads", "-1"], "--threads"),
            (["run", *files, "--threads", "1000000"], "--threads"),
            (["run", *files, "--backend", "frob"], "frob"),
        ):
            with self.subTest(args=args):
                self.check_fails(self.call(*args), cause)
        with self.subTest("environment"):
            self.check_fails(self.call("run", *files, env={"GATEDELTA_BACKEND": "frob"}), "GATEDELTA_BACKEND", "frob")

    def test_inputs_that_are_no_file(self):
        for path, cause in (
            (self.path("absent"), "absent"),
            (self.folder, "directory"),
            ("/dev/zero", "regular file"),
            ("", "No such file"),
        ):
            with self.subTest(path=path):
                self.check_fails(self.call("run", "--input", path, "--output", self.output), cause)

    def test_outputs_that_cannot_be_written(self):
        self.write(self.call_of())
        for path, cause in (
            (self.path("absent/out"), "absent"),
            (self.folder, "directory"),
            ("/dev/null", "regular file"),
            ("/proc/gatedelta", "/proc/gatedelta"),
            (self.path("x" * 300), "cannot be written"),
            ("", "cannot be written"),
        ):
            with self.subTest(path=path):
                self.check_fails(self.call("run", "--input", self.input, "--output", path), cause)
        self.assertFalse(os.path.isfile("/dev/null"))

    def test_a_failure_keeps_an_older_output(self):
        with open(self.output, "w") as file:
            file.write("older")
        self.write(self.call_of("q k"))
        self.assertEqual(self.call("run", "--input", self.input, "--output", self.output).returncode, 2)
        with open(self.output) as file:
            self.assertEqual(file.read(), "older")
        self.assertEqual(sorted(os.listdir(self.folder)), ["in.safetensors", "out.safetensors"])

    def test_hostile_files(self):
        whole = pack(self.call_of())
        for size in (0, 1, 7, 8, 9, 100, len(whole) // 2, len(whole) - 1):
            with self.subTest(size=size):
                self.fails(whole[:size], cause="in.safetensors")
        for content in (
            struct.pack("<Q", 2**64 - 1) + b"{}",
            struct.pack("<Q", 10**6) + b"[" * 10**6,
            struct.pack("<Q", 5 * 10**6) + b'{"a":' * 10**6,
            pack({"q\n\x1b[31m": Tensor("F32", [1], [1])}).replace(b'"shape": [1]', b'"shape": [2]'),
            os.urandom(10000),
        ):
            self.fails(content, cause="in.safetensors")

    def test_missing_tensors(self):
        for name in ("q", "k", "v"):
            call = self.call_of()
            del call[name]
            self.fails(call, cause=f'"{name}" is missing')
        self.fails(self.call_of("q k v a"), cause="A_log: required")
        self.fails(self.call_of("q k v A_log dt_bias"), cause="a: required")
        self.fails(self.call_of("q k v"), "--gate", "log", cause="g: required")
        self.fails(self.call_of("q k v"), "--gate", "raw", cause="a: required")
        self.fails(self.call_of("q k v"), "--beta", "value", cause="beta: required")
        self.fails(self.call_of("q k v beta"), "--beta", "logits2", cause="b: required")
        self.fails(self.call_of("q k v", read_slots=Tensor("I32", [B], [0, 1])), cause="read_slots")
        self.fails(self.call_of(accepted=Tensor("I32", [B], [1, 1])), cause="token_slots")

    def test_two_forms(self):
        self.fails(self.call_of("q k v a A_log g"), cause="--gate")
        self.fails(self.call_of("q k v b beta"), cause="--beta")

    def test_shapes_and_dtypes(self):
        x = small_call()
        for name in ("q", "k", "v", "g", "b", "state"):
            with self.subTest(name=name):
                t = x[name]
                self.fails(self.call_of(**{name: Tensor(t.dtype, [1, *t.shape][-5:], t.values)}), cause=f"{name}: expected")
                self.fails(self.call_of(**{name: Tensor(t.dtype, [len(t.values)], t.values)}), cause=f"{name}: expected")
                self.fails(self.call_of(**{name: Tensor("I32", t.shape, [0] * len(t.values))}), cause="got i32")
                wrong = [*t.shape[:-1], t.shape[-1] + 1]
                if name not in "qv":  # these two set K and V, and the others are at fault
                    self.fails(self.call_of(**{name: Tensor("F32", wrong, [0.0] * math.prod(wrong))}), cause=f"{name}: expected")
        self.fails(pack(self.call_of()).replace(b"F32", b"U32"), cause="U32")
        self.fails(self.call_of(q=Tensor("F32", [B, T, 3, K], [0.0] * (B * T * 3 * K))), cause="q_heads: expected a divisor of 4")
        self.fails(self.call_of(q=Tensor("F32", [B, T, 0, K], [])), cause="q_heads: expected at least 1")
        self.fails(self.call_of(state=x["state"].matrices_transposed()), cause="state: expected")
        self.fails(self.call_of(), "--state-layout", "kv", cause="state: expected")
        for name, dtype, shape in (
            ("read_slots", "F32", [B]), ("read_slots", "I32", [B + 1]), ("write_slots", "I32", [B, 1]),
            ("token_slots", "I32", [B, T - 1]), ("cu_seqlens", "F32", [2]), ("cu_seqlens", "I32", [2, 1]),
        ):  # fmt: skip
            with self.subTest(name=name, dtype=dtype, shape=shape):
                self.fails(self.call_of(**{name: Tensor(dtype, shape, range(math.prod(shape)))}), cause=f"{name}: expected")
        self.fails(self.call_of(g=Tensor("F32", [B, T, H, K], [0.0] * (B * T * H * K))), cause="g: expected")

    def test_slots_out_of_range(self):
        self.fails(self.call_of(read_slots=Tensor("I64", [B], [0, SLOTS])), cause="read_slots: row 1 has slot 7")
        self.fails(self.call_of(write_slots=Tensor("I64", [B], [2**62, 0])), cause="write_slots: row 0")
        self.fails(self.call_of(read_slots=Tensor("I64", [B], [1, 1])), cause="slot 1")
        self.fails(self.call_of(read_slots=Tensor("I64", [B], [-1, -5])), "--null-slot", "-5", cause="slot -1")
        token_slots = Tensor("I32", [B, T], range(B * T))
        self.fails(self.call_of(token_slots=token_slots, accepted=Tensor("I32", [B], [1, 4])), cause="accepted: row 1 has 4")
        flat = {n: Tensor("F32", [1, B * T, *t.shape[2:]], t.values) for n, t in self.call_of("q k v").items()}
        for entries in ([0, 7], [-1, 6], [3, 2], [0, 2**62, 6], [-(2**63), 2**63 - 1], [2**63 - 1, 2**63 - 1]):
            with self.subTest(entries=entries):
                call = flat | {"cu_seqlens": Tensor("I64", [len(entries)], entries)}
                self.fails(call, "--snapshots", cause="cu_seqlens: entry")

    def test_sizes_beyond_memory(self):
        # Small files may ask for much: no elements, but huge sizes.
        def empty(rows, tokens, heads, dim):
            return {n: Tensor("F32", [rows, tokens, heads, dim], []) for n in "qkv"}

        self.fails(empty(2**40, 0, 1, 1), cause="rows without tokens")
        self.fails(empty(1, 0, 1, 2**50), cause="memory")
        self.fails(empty(1, 0, 2**50, 1), cause="memory")


if __name__ == "__main__":
    unittest.main()
