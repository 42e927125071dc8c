# SPDX-License-Identifier: Apache-2.0
"""Tensor parallelism by heads: each process has its share of the heads of a Qwen3-Next layer, with their states. Heads are
independent, so that the operator needs no communication; the layer has one all-reduce, after the last projection.

    torchrun --nproc-per-node 2 examples/python/tensor_parallel.py
"""

import argparse
import json
import os
import time

import torch
import torch.distributed as dist
from qwen3_next import GatedDeltaNet


def rows_of_heads(weight, heads, first, count):
    """Rows of a weight whose first dimension is heads x width."""
    return weight.unflatten(0, (heads, -1))[first : first + count].flatten(0, 1)


@torch.no_grad()
def share_of(layer, rank, size):
    """The layer with the heads of one process: its output is a summand of the whole layer's."""
    q, v = layer.q_heads // size, layer.v_heads // size
    part = GatedDeltaNet(layer.qkv.in_features, q, v, layer.width, layer.taps).to(layer.out.weight.device, layer.out.weight.dtype)
    split = [layer.q_heads * layer.width, layer.q_heads * layer.width, layer.v_heads * layer.width]
    sections = [(layer.q_heads, q), (layer.q_heads, q), (layer.v_heads, v)]
    for whole, mine in ((layer.qkv.weight, part.qkv.weight), (layer.conv, part.conv)):
        cut = [rows_of_heads(w, all_, rank * own, own) for w, (all_, own) in zip(whole.split(split), sections)]
        mine.copy_(torch.cat(cut))
    part.ba.weight.copy_(torch.cat([w[rank * v : (rank + 1) * v] for w in layer.ba.weight.chunk(2)]))
    part.z.weight.copy_(rows_of_heads(layer.z.weight, layer.v_heads, rank * v, v))
    part.out.weight.copy_(rows_of_heads(layer.out.weight.T, layer.v_heads, rank * v, v).T)
    part.A_log.copy_(layer.A_log[rank * v : (rank + 1) * v])
    part.dt_bias.copy_(layer.dt_bias[rank * v : (rank + 1) * v])
    part.norm.copy_(layer.norm)
    return part


def median_ms(step, device, repeats):
    times = []
    for _ in range(repeats + 3):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return sorted(times[3:])[repeats // 2] * 1e3


def operator_step(layer, batch, device, dtype):
    """The operator alone on one token of each sequence."""
    import gatedelta

    def normal(heads, *width):
        return torch.randn(batch, 1, heads, *width, device=device, dtype=dtype)

    q, k, v = (normal(heads, layer.width) for heads in (layer.q_heads, layer.q_heads, layer.v_heads))
    a, b, o = normal(layer.v_heads), normal(layer.v_heads), torch.empty_like(v)
    states, _ = layer.pools(batch, device, dtype)
    A_log, dt_bias = layer.A_log.detach(), layer.dt_bias.detach()
    return lambda: gatedelta.forward(q, k, v, o, a=a, b=b, A_log=A_log, dt_bias=dt_bias, state=states)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16, help="sequences (16)")
    parser.add_argument("--hidden", type=int, default=2048, help="width of the model (2048)")
    parser.add_argument("--q-heads", type=int, default=16, help="query and key heads; there are twice as many value heads (16)")
    parser.add_argument("--repeats", type=int, default=20, help="timed steps (20)")
    parser.add_argument("--json", help="a file for the measurements")
    options = parser.parse_args()
    cuda = torch.cuda.is_available()
    dist.init_process_group("nccl" if cuda else "gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dtype = torch.bfloat16 if cuda else torch.float32
    if options.q_heads % size != 0:
        parser.error(f"--q-heads: expected a multiple of {size} processes, got {options.q_heads}")

    torch.manual_seed(0)  # all processes make the same layer and tokens
    whole = GatedDeltaNet(options.hidden, options.q_heads, 2 * options.q_heads).to(device, dtype)
    part = share_of(whole, rank, size)
    slots = torch.arange(options.batch, device=device)
    tokens = torch.randn(4, options.batch, 1, options.hidden, device=device, dtype=dtype)
    pools, whole_pools = (layer.pools(options.batch, device, dtype) for layer in (part, whole))

    def step(x):
        o = part(x, *pools, slots)
        dist.all_reduce(o)
        return o

    with torch.inference_mode():
        for x in tokens:
            found, wanted = step(x), whole(x, *whole_pools, slots)
        difference = ((found - wanted).float().norm() / wanted.float().norm()).item()
        times = {
            "layer_whole_ms": median_ms(lambda: whole(tokens[0], *whole_pools, slots), device, options.repeats),
            "layer_share_ms": median_ms(lambda: step(tokens[0]), device, options.repeats),
            "operator_whole_ms": median_ms(operator_step(whole, options.batch, device, dtype), device, options.repeats),
            "operator_share_ms": median_ms(operator_step(part, options.batch, device, dtype), device, options.repeats),
        }
    if rank == 0:
        name = torch.cuda.get_device_name() if cuda else "cpu"
        result = {"processes": size, "device": name, "batch": options.batch, "q_heads": options.q_heads, **times}
        print(json.dumps(result))
        print(f"against the whole layer on one process: relative difference {difference:.1e}")
        if options.json:
            with open(options.json, "w", encoding="utf-8") as file:
                json.dump(result, file, indent=1)
    dist.destroy_process_group()
    if not difference < (3e-2 if cuda else 1e-4):
        raise SystemExit("they should agree")


if __name__ == "__main__":
    main()
