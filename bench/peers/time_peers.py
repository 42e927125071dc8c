#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Times other implementations of the gated delta rule on a CUDA device, in the JSON of `gatedelta bench`.

Peers that cannot be imported are named with the reason and left out; a cell that a peer cannot do, or does wrongly, gets a row with
the reason and no time. The file is written after each cell, and --resume goes on where an earlier run stopped.
"""
import argparse
import datetime
import inspect
import json
import os
import pathlib
import shlex
import subprocess
import sys
import time
import traceback

import torch

import cells
from cells import Cell
from entry_points import PEERS

DECODE_BATCHES, VERIFY_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512), (1, 4, 16, 64, 256)
QUICK_BATCHES, QUICK_TOKENS = (1, 16, 256), (1, 4)
IDENTITY = ("peer", "mode", "tokens", "batch", "state_dtype", "layout", "q_heads", "v_heads", "key_dim")
FEWEST_CALLS = 8  # of a graph
L2_MULTIPLE = 4.2


def numbers(text):
    out = [int(value) for value in text.split(",")]
    if min(out) < 1:
        raise argparse.ArgumentTypeError("expected numbers from 1")
    return out


def choice(known):
    def parse(text):
        for value in text.split(","):
            if value not in known:
                raise argparse.ArgumentTypeError(f"{value}: expected some of {','.join(known)}")
        return text.split(",")

    return parse


def heads(text):
    out = [tuple(int(count) for count in pair.split("/")) for pair in text.split(",")]
    if any(len(pair) != 2 or min(pair) < 1 or pair[1] % pair[0] for pair in out):
        raise argparse.ArgumentTypeError("expected query/value heads, the second a multiple of the first: 16/32")
    return out


def parse_options():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=pathlib.Path, help="write the results to this file")
    parser.add_argument("--peers", type=choice(list(PEERS)), default=list(PEERS), help=",".join(PEERS))
    parser.add_argument("--modes", type=choice(cells.MODES), default=cells.MODES, help=",".join(cells.MODES))
    parser.add_argument("--tokens", type=numbers, help="default 1,2,4,8")
    parser.add_argument("--batch", type=numbers, help="default 1,2,...,512 for one token, 1,4,16,64,256 for more")
    parser.add_argument("--state", type=choice(("bf16", "f32")), default=["bf16", "f32"], help="dtypes of the state")
    parser.add_argument("--layout", type=choice(("vk", "kv")), help="of the state; by default vk, for one token also kv")
    parser.add_argument("--heads", type=heads, default=[(16, 32)], help="query/value heads: 16/32,4/8")
    parser.add_argument("--replays", type=int, default=15, help="of each graph")
    parser.add_argument("--quick", action="store_true", help="fewer batches and tokens")
    parser.add_argument("--folder", type=pathlib.Path, help="with the unpacked packages, besides PYTHONPATH")
    parser.add_argument("--commit", help="of this repository, where git does not know it")
    parser.add_argument("--jobs", type=int, default=max(1, min(14, (os.cpu_count() or 1) - 2)), help="processes that compile first; 0: none")
    parser.add_argument("--seconds", type=float, help="begin no cell after this time")
    parser.add_argument("--resume", action="store_true", help="keep the rows of the file and do the cells that it lacks")
    parser.add_argument("--dry-run", action="store_true", help="no device: list the cells and check the arguments of the calls")
    parser.add_argument("--share", type=numbers, help=argparse.SUPPRESS)  # of a process that compiles: number, processes
    options = parser.parse_args()
    if options.replays < 11:
        parser.error("--replays: expected at least 11")
    if options.resume and not options.json:
        parser.error("--resume needs --json")
    return options


def plan(options, peers):
    """[(peer, cell)]; all peers of a cell one after the other."""
    jobs = []
    for head in options.heads:
        for tokens in options.tokens or (QUICK_TOKENS if options.quick else (1, 4, 8, 2)):
            batches = options.batch or (QUICK_BATCHES if options.quick else DECODE_BATCHES if tokens == 1 else VERIFY_BATCHES)
            for layout in options.layout or (("vk", "kv") if tokens == 1 else ("vk",)):
                for mode in options.modes:
                    for state in options.state:
                        for batch in batches:
                            cell = Cell(mode, tokens, batch, state, layout, *head)
                            jobs += [(peer, cell) for peer in peers if peer.does(cell)]
    return jobs


def load_peers(options):
    """Those that can be imported, with their versions; the others are named with the reason."""
    if options.folder:
        sys.path.insert(0, str(options.folder.resolve()))
    peers = []
    for name in options.peers:
        peer = PEERS[name]()
        try:
            peer.version = peer.load(options.folder)
            peers.append(peer)
        except Exception as error:  # whatever an import may raise
            print(f"{name}: left out: {reason(error)}")
    return peers


def reason(error):
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


def dry_run(options):
    """Arguments on no device against the functions' signatures."""
    jobs, wrong = plan(options, load_peers(options)), 0
    for peer, cell in jobs:
        call = peer.call(cells.tensors(cell, "meta", in_order=peer.in_order(cell)))
        try:
            inspect.signature(call.function).bind(**call.arguments)
        except TypeError as error:
            wrong += 1
            print(f"{peer.name}: {cell}: {error}")
    print(f"{len(jobs)} cells, {wrong} with wrong arguments")
    return 1 if wrong or not jobs else 0


def compile_share(options, jobs):
    """The work of one of the processes that compile: each of its cells is called once, which fills the compilers' caches."""
    first, count = options.share
    for peer, cell in jobs[first - 1 :: count]:
        try:
            memory = cells.states_memory(cells.pool_elements(cell), cells.DTYPES[cell.state], "cuda")
            peer.call(cells.tensors(cell, "cuda", memory, peer.in_order(cell)))()
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except Exception as error:  # the cell's row will say it
            print(f"{peer.name}: {cell}: {reason(error)}", file=sys.stderr)
    return 0


def compile_first(options):
    started = time.monotonic()
    arguments = [sys.executable, *sys.argv]
    workers = [subprocess.Popen([*arguments, "--share", f"{i},{options.jobs}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
               for i in range(1, options.jobs + 1)]
    for worker in workers:
        worker.wait()
    print(f"compiled in {time.monotonic() - started:.0f} s by {options.jobs} processes")


class Memory:
    """The states that the instances of a cell rotate through; one buffer for each dtype, made when first needed."""

    def __init__(self):
        self.buffers = {}

    def get(self, elements, dtype):
        if dtype not in self.buffers or self.buffers[dtype].numel() < elements:
            self.buffers.pop(dtype, None)
            torch.cuda.empty_cache()
            self.buffers[dtype] = cells.states_memory(elements, dtype, "cuda")
        return self.buffers[dtype]


def measure(peer, cell, memory, options):
    """The fields of a row that come from running the cell."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    instances = max(2, -(-int(L2_MULTIPLE * cache) // cell.bytes))
    elements = cells.pool_elements(cell)
    states = memory.get(instances * elements, cells.DTYPES[cell.state])
    first = cells.tensors(cell, "cuda", states, peer.in_order(cell))
    tensors = [first] + [cells.copy_of(first, states[i * elements :]) for i in range(1, instances)]
    calls = [peer.call(x) for x in tensors]
    errors = cells.check(first, calls[0])
    out = {"instances": instances, "instance_bytes": cell.bytes, "output_error": errors[0], "state_error": errors[1]}
    if max(errors) > cells.TOLERANCE:
        raise ArithmeticError(f"wrong results: relative error {errors[0]:.2g} of the outputs, {errors[1]:.2g} of the states")
    calls *= -(-FEWEST_CALLS // instances)
    out.update(cells.quantiles(cells.time_calls(calls, options.replays)))
    return out


def describe_machine(options):
    def said(*command):
        try:
            done = subprocess.run(command, capture_output=True, text=True, cwd=pathlib.Path(__file__).parent, check=True)
            return done.stdout.strip().splitlines()[0]
        except (OSError, subprocess.CalledProcessError, IndexError):
            return "unknown"

    os.environ.setdefault("TIME_PEERS_COMMAND", shlex.join(["time_peers.py", *sys.argv[1:]]))  # as it was begun
    return {"hardware": torch.cuda.get_device_name(), "driver": said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
            "torch": torch.__version__, "commit": options.commit or said("git", "rev-parse", "--short", "HEAD"),
            "command": os.environ["TIME_PEERS_COMMAND"]}


def row_of(peer, cell, fields, machine):
    return {"backend": peer.name, "peer": peer.name, "peer_version": peer.version, "device": "cuda", "op": cell.op, "mode": cell.mode,
            "batch": cell.batch, "tokens": cell.tokens, "q_heads": cell.q_heads, "v_heads": cell.v_heads, "key_dim": cell.width,
            "value_dim": cell.width, "dtype": "bf16", "state_dtype": cell.state, "median_us": None, "limit_us": None, "ratio": None,
            "layout": cell.layout, "cache": "cold", "noisy": False, **({"window": cells.WINDOW} if cell.mode == "replay" else {}),
            **fields, "description": peer.differs, **machine,
            "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")}


def identity(row):
    return tuple(row[key] for key in IDENTITY)


def save(path, rows):
    if path:
        pending = path.with_name(path.name + ".pending")
        pending.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        pending.replace(path)


def device_is_lost():
    try:
        torch.cuda.synchronize()
        return False
    except RuntimeError:
        return True


def main():
    options = parse_options()
    started = time.monotonic()
    if options.dry_run:
        return dry_run(options)
    if not torch.cuda.is_available():
        sys.exit("time_peers: there is no CUDA device; --dry-run needs none")
    rows = json.loads(options.json.read_text(encoding="utf-8")) if options.resume and options.json.is_file() else []
    peers = load_peers(options)
    jobs = plan(options, peers)
    if options.share:
        return compile_share(options, jobs)
    machine, memory, failed = describe_machine(options), Memory(), 0
    done = {identity(row) for row in rows}
    jobs = [job for job in jobs if identity(row_of(*job, {}, machine)) not in done]
    save(options.json, rows)  # before the run, not after minutes
    print(f"{machine['hardware']}, driver {machine['driver']}; {len(jobs)} cells of {', '.join(f'{p.name} {p.version}' for p in peers)}")
    if options.jobs and jobs:
        compile_first(options)
    for number, (peer, cell) in enumerate(jobs, start=1):
        if options.seconds and time.monotonic() - started > options.seconds:
            print(f"time is up: {len(jobs) - number + 1} cells were not begun")
            break
        if sys.stderr.isatty():
            print(f"\r\033[K[{number}/{len(jobs)}] {peer.name} {cell.mode} T={cell.tokens} B={cell.batch}", end="", file=sys.stderr)
        error = None
        try:
            row = row_of(peer, cell, measure(peer, cell, memory, options), machine)
            said = f"{row['median_us']:9.2f} us   errors {row['output_error']:.1e} {row['state_error']:.1e}"
        except Exception as caught:  # recorded, and the next cell
            error, failed = caught, failed + 1
            row = row_of(peer, cell, {"error": reason(caught)}, machine)
            said = f"failed: {row['error']}"
        rows.append(row)
        save(options.json, rows)
        print(f"{peer.name:18} {cell.mode:11} T={cell.tokens} B={cell.batch:<3} {cell.state:4} {cell.layout} {cell.q_heads}/{cell.v_heads} {said}", flush=True)
        if error is not None and os.environ.get("TIME_PEERS_TRACEBACK"):
            traceback.print_exception(error)
        if error is not None and device_is_lost():  # nothing more can run in this process
            if not options.json:
                sys.exit("time_peers: the device is lost; with --json another process would go on")
            again = [argument for argument in sys.argv[1:] if argument != "--resume"]
            left = ["--seconds", str(options.seconds - (time.monotonic() - started))] if options.seconds else []
            os.execv(sys.executable, [sys.executable, sys.argv[0], *again, *left, "--resume", "--jobs", "0"])
        error = None
        torch.cuda.empty_cache()
    print(f"{len(rows)} rows, {failed} failed, {time.monotonic() - started:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
