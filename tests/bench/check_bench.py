# SPDX-License-Identifier: Apache-2.0
"""Runs `gatedelta bench` on tiny cases and checks its table, its JSON and what it says of bad usage."""
import json
import math
import os
import subprocess
import sys
import tempfile

GATEDELTA = sys.argv[1]
TINY = ["--backend", "reference", "--heads", "1/2", "--dim", "8", "--value-dim", "16", "--max-memory", "1", "--repetitions", "3"]
KEYS = {
    "backend": str, "device": str, "op": str, "batch": int, "tokens": int, "q_heads": int, "v_heads": int, "key_dim": int,
    "value_dim": int, "dtype": str, "state_dtype": str, "median_us": float, "limit_us": float, "ratio": float, "threads": int,
    "layout": str, "cache": str, "instances": int, "repetitions": int, "gbps": float, "gflops": float, "min_us": float,
    "p10_us": float, "p90_us": float, "max_us": float, "mode": str, "calls_per_repetition": int, "first_call_ms": float, "description": str, "hardware": str, "noisy": bool, "version": str, "date": str,
}
checks = 0


def check(condition, message):
    global checks
    checks += 1
    if not condition:
        sys.exit(f"FAILED: {message}")


def bench(*arguments):
    return subprocess.run([GATEDELTA, "bench", *arguments], capture_output=True, text=True, timeout=120)


def rows_of(folder, *arguments):
    path = os.path.join(folder, "rows.json")
    done = bench(*TINY, "--json", path, *arguments)
    check(done.returncode == 0, f"{arguments}: exit {done.returncode}: {done.stderr}")
    check(done.stderr == "", f"{arguments}: a pipe gets no progress, got {done.stderr!r}")
    with open(path, encoding="utf-8") as file:
        rows = json.load(file)
    check(os.listdir(folder) == ["rows.json"], f"nothing but the result is left behind: {os.listdir(folder)}")
    os.remove(path)
    table = [line for line in done.stdout.splitlines() if line.startswith("reference ")]
    check(len(table) == len(rows), f"{arguments}: {len(table)} lines in the table, {len(rows)} in the JSON")
    for row in rows:
        for key, kind in KEYS.items():
            check(type(row.get(key)) is kind, f"{arguments}: {key} should be a {kind.__name__}, got {row.get(key)!r}")
        for key in ("median_us", "limit_us", "ratio", "gbps", "gflops"):
            check(math.isfinite(row[key]) and row[key] > 0, f"{arguments}: {key} is {row[key]}")
        check(math.isclose(row["ratio"], row["limit_us"] / row["median_us"], rel_tol=1e-9), "ratio is limit / time")
        check(row["min_us"] <= row["p10_us"] <= row["median_us"] <= row["p90_us"] <= row["max_us"], "quantiles are in order")
        elements = row["batch"] * row["v_heads"] * row["key_dim"] * row["value_dim"]
        size = {"f32": 4, "f16": 2, "bf16": 2}[row["state_dtype"]]
        check(math.isclose(row["gbps"] * row["median_us"] * 1e3, 2 * size * elements, rel_tol=1e-9), "GB/s count the state twice")
        check(math.isclose(row["gflops"] * row["median_us"] * 1e3, 7 * row["tokens"] * elements, rel_tol=1e-9), "7 K V flops")
        check((row["backend"], row["device"], row["repetitions"]) == ("reference", "cpu", 3), f"{arguments}: {row}")
        check((row["q_heads"], row["v_heads"], row["key_dim"], row["value_dim"]) == (1, 2, 8, 16), f"{arguments}: {row}")
    return rows


def check_rows(folder):
    rows = rows_of(folder, "--op", "decode", "--batch", "1,3", "--state", "f32,bf16", "--threads", "1,2", "--layout", "kv")
    check(len(rows) == 8, "batches x state dtypes x threads")
    check({(r["op"], r["batch"], r["tokens"], r["state_dtype"], r["threads"], r["layout"]) for r in rows} ==
          {("decode", b, 1, s, t, "kv") for b in (1, 3) for s in ("f32", "bf16") for t in (1, 2)}, "decode cases")
    check(all(r["instances"] > 1 and r["cache"] in ("cold", "mixed") for r in rows), "states rotate")
    rows = rows_of(folder, "--op", "decode", "--batch", "1", "--warm", "--traffic")
    check([(r["instances"], r["cache"]) for r in rows] == [(1, "warm")], "a warm state does not rotate")
    check("traffic_us" not in rows[0], "on the host there is no kernel for a call's traffic")
    rows = rows_of(folder, "--op", "verify", "--batch", "2", "--dtype", "f16", "--threads", "1")
    check([(r["op"], r["tokens"], r["dtype"]) for r in rows] == [("verify", 4, "f16"), ("verify", 8, "f16")], "verify cases")
    rows = rows_of(folder, "--op", "prefill", "--tokens", "70", "--threads", "1")
    check([(r["op"], r["batch"], r["tokens"]) for r in rows] == [("prefill", 1, 70)], "prefill cases")
    check(all(r["peak_gflops"] > 0 for r in rows), "prefill is held against the arithmetic, too")
    # A backend can be compared with itself: both share one limit.
    rows = rows_of(folder, "--op", "decode", "--batch", "1", "--threads", "1", "--backend", "reference,reference")
    check(len(rows) == 3 and len({row["limit_us"] for row in rows}) == 1, "several backends, one limit")
    check(len(rows_of(folder, "--threads", "1")) == 8, "the default set")
    rows = rows_of(folder, "--op", "verify", "--tokens", "3", "--accepted", "2", "--window", "4", "--entries", "f32", "--threads", "1")
    check([(r["mode"], r.get("window"), r.get("accepted"), r.get("entries")) for r in rows] ==
          [("replay", 4, 2, "f32"), ("update", None, None, None)], "with the window and without it")
    check(len({row["limit_us"] for row in rows}) == 1 and rows[0]["calls_per_repetition"] % 4 == 0, "whole cycles of a window")


def check_usage(folder):
    path = os.path.join(folder, "rows.json")
    decode = ["--op", "decode"]
    for arguments in (
        ["--op", "decoding"], decode + ["--backend", "nonesuch"], decode + ["--batch", "0"], decode + ["--batch", "-1"],
        decode + ["--batch", "1,x"], decode + ["--tokens", "2"], ["--op", "prefill", "--tokens", "0"], ["--batch", "2"],
        decode + ["--heads", "16/24"], decode + ["--heads", "16/"], decode + ["--heads", "0/4"], decode + ["--dim", "0"],
        decode + ["--mode", "snapshots", "--window", "4"], decode + ["--window", "4", "--accepted", "2"],
        decode + ["--mode", "rollback"], decode + ["--mode", "snapshots"], decode + ["--device", "tpu"], ["--mode", "update"],
        decode + ["--dtype", "f64"], decode + ["--state", "i32"], decode + ["--layout", "vkv"], decode + ["--threads", "0"],
        decode + ["--min-time", "-1"], decode + ["--nonesuch"], decode + ["--batch", "131072", "--heads", "512", "--dim", "4096"],
    ):
        done = bench(*arguments, "--json", path)
        check(done.returncode == 2, f"{arguments}: exit {done.returncode}, expected 2")
        check(len(done.stderr.strip().splitlines()) == 1, f"{arguments}: expected one line, got {done.stderr!r}")
        check(done.stdout == "" and os.listdir(folder) == [], f"{arguments}: no table and no file")
    for unwritable in (os.path.join(folder, "none", "rows.json"), folder, "/dev/full"):
        done = bench(*TINY, *decode, "--json", unwritable)
        check(done.returncode == 2 and unwritable in done.stderr, f"{unwritable}: {done.returncode} {done.stderr!r}")
        check(len(done.stderr.strip().splitlines()) == 1 and os.listdir(folder) == [], f"{unwritable}: {done.stderr!r}")
        check(done.stdout == "", "an unwritable path is found before the run")


def check_cuda(folder):
    """On a machine with a GPU small rows of every mode; elsewhere what the tool says."""
    path = os.path.join(folder, "rows.json")
    info = json.loads(subprocess.run([GATEDELTA, "info", "--json"], capture_output=True, text=True, timeout=60).stdout)
    state = next((b for b in info["backends"] if b["name"] == "cuda"), None)
    if state is None or not state["available"]:
        reason = state["reason"] if state else "without CUDA"
        print(f"skipped: measurements on a GPU: {reason}")
        for arguments in (["--device", "cuda"], ["--device", "cuda", "--backend", "cuda", "--op", "decode"]):
            done = bench(*arguments, "--json", path)
            check(done.returncode == 2 and done.stdout == "" and os.listdir(folder) == [], f"{arguments}: {done}")
            check(len(done.stderr.splitlines()) == 1 and reason in done.stderr, f"{arguments}: {done.stderr!r}")
        if state:
            done = bench("--backend", "cuda", "--op", "decode")
            check(done.returncode == 2 and reason in done.stderr, f"{done}")
        return
    for mode, stores in (("update", 1), ("snapshots", 3), ("read-only", 0), ("token-slots", 3)):
        for layout in ("vk", "kv"):
            done = bench("--backend", "cuda", "--op", "verify", "--mode", mode, "--tokens", "3", "--batch", "2,5", "--heads", "8/16",
                         "--state", "bf16", "--layout", layout, "--repetitions", "3", "--host-calls", "20",
                         "--json", path)
            check((done.returncode, done.stderr) == (0, ""), f"{mode}: {done}")
            with open(path, encoding="utf-8") as file:
                rows = json.load(file)
            os.remove(path)
            check([r["batch"] for r in rows] == [2, 5], f"{mode}: {rows}")
            for row in rows:
                check((row["backend"], row["device"], row["mode"], row["layout"]) == ("cuda", "cuda:0", mode, layout), f"{row}")
                for key in ("median_us", "limit_us", "ratio", "host_us", "first_call_ms", "gbps"):
                    check(math.isfinite(row[key]) and row[key] > 0, f"{mode}: {key} is {row[key]}")
                size = row["batch"] * 16 * 128 * 128 * 2
                check(math.isclose(row["gbps"] * row["median_us"] * 1e3, (1 + stores) * size, rel_tol=1e-9), f"{mode}: bytes")
                check(row["cache"] == "cold" and row["calls_per_repetition"] >= row["instances"] > 1, f"{mode}: {row}")
                for key in ("driver", "cuda_driver", "cuda_runtime", "multiprocessors", "compute_capability"):
                    check(row[key] != "", f"{mode}: {key}")


with tempfile.TemporaryDirectory() as scratch:
    check_rows(scratch)
    check_usage(scratch)
    check_cuda(scratch)
print(f"{checks} checks passed")
