# SPDX-License-Identifier: Apache-2.0
"""Decode steps of a Qwen3-Next layer with random weights: a prompt in one call, then token by token, eagerly and compiled."""

import argparse
import time

import torch
from qwen3_next import GatedDeltaNet


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=4, help="sequences (4)")
    parser.add_argument("--tokens", type=int, default=16, help="steps (16)")
    parser.add_argument("--hidden", type=int, default=2048, help="width of the model; the heads shrink with it (2048)")
    parser.add_argument("--compile", action="store_true", help="through torch.compile, one graph")
    options = parser.parse_args()
    torch.manual_seed(0)
    half = options.device == "cuda"
    dtype = torch.bfloat16 if half else torch.float32
    scale = max(1, 2048 // options.hidden)
    layer = GatedDeltaNet(options.hidden, max(1, 16 // scale), max(2, 32 // scale)).to(options.device, dtype)
    tokens = torch.randn(options.batch, options.tokens, options.hidden, device=options.device, dtype=dtype)
    slots = torch.randperm(options.batch + 3, device=options.device)[: options.batch]

    with torch.inference_mode():
        at_once = layer(tokens, *layer.pools(options.batch + 3, options.device, dtype), slots)
        pools = layer.pools(options.batch + 3, options.device, dtype)
        step = torch.compile(layer, fullgraph=True) if options.compile else layer
        outputs, times = [], []
        for t in range(options.tokens):
            start = time.perf_counter()
            outputs.append(step(tokens[:, t : t + 1], *pools, slots))
            if options.device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        one_by_one = torch.cat(outputs, dim=1)
    difference = ((one_by_one - at_once).float().norm() / at_once.float().norm()).item()
    times.sort()
    print(f"{options.batch} sequences on {options.device}: {times[len(times) // 2] * 1e3:.3f} ms a step (median)")
    print(f"token by token against all at once: relative difference {difference:.1e}")
    if not difference < (3e-2 if half else 1e-4):
        raise SystemExit("they should agree")


if __name__ == "__main__":
    main()
