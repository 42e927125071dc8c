# SPDX-License-Identifier: Apache-2.0
"""Plots what the states of the small language model of examples/textgen do over a prompt: the norm of each head's state after
each byte, and the decay exp(g) that the byte applies to it. NumPy alone computes the model, but for the operator."""

import argparse
import json
import pathlib

import ml_dtypes
import numpy as np

import gatedelta

MODEL = pathlib.Path(__file__).parents[1] / "textgen/data/tiny_gdn_lm.safetensors"
DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


def read_safetensors(path):
    """(tensors as float32, metadata)"""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    metadata = header.pop("__metadata__", {})
    tensors = {}
    for name, entry in header.items():
        begin, end = (start + offset for offset in entry["data_offsets"])
        tensors[name] = np.frombuffer(data[begin:end], DTYPES[entry["dtype"]]).reshape(entry["shape"]).astype(np.float32)
    return tensors, metadata


def silu(x):
    return x / (1 + np.exp(-x))


def rms_norm(x, weight, eps):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def run(text, weights, config):
    """The model over a text: its logits [T,256], and of each layer the states' norms and the decays [T,H]."""
    heads, width, eps = config["v_heads"], config["key_dim"], config["rms_eps"]
    x = weights["emb.weight"][np.frombuffer(text, np.uint8)]
    norms, decays = [], []
    for layer in range(config["layers"]):
        w = {name.removeprefix(f"blocks.{layer}."): w for name, w in weights.items() if name.startswith(f"blocks.{layer}.")}
        y = rms_norm(x, w["n1.weight"], eps)
        taps = w["gdn.conv"]
        padded = np.pad(y @ w["gdn.qkv.weight"].T, ((config["conv"] - 1, 0), (0, 0)))
        mixed = silu(sum(padded[j : j + len(x)] * taps[:, j] for j in range(config["conv"])))
        q, k, v = np.split(mixed.reshape(1, len(x), -1, width), np.cumsum([config["q_heads"], config["k_heads"]]), axis=2)
        b, a = np.split((y @ w["gdn.ba.weight"].T)[None], 2, axis=-1)
        o, states = gatedelta.forward(
            q, k, v, a=a, A_log=w["gdn.A_log"], dt_bias=w["gdn.dt_bias"], b=b, snapshots=True, scale=config["scale"],
            l2_eps=config["l2_eps"],
        )  # fmt: skip
        norms.append(np.linalg.norm(states[0], axis=(-2, -1)))
        decays.append(np.exp(-np.exp(w["gdn.A_log"]) * np.logaddexp(0, a[0] + w["gdn.dt_bias"])))
        o = rms_norm(o[0], w["gdn.norm.weight"], eps).reshape(len(x), heads * width) * silu(y @ w["gdn.z.weight"].T)
        x = x + o @ w["gdn.out.weight"].T
        y = rms_norm(x, w["n2.weight"], eps)
        x = x + (silu(y @ w["gate.weight"].T) * (y @ w["up.weight"].T)) @ w["down.weight"].T
    return rms_norm(x, weights["norm.weight"], eps) @ weights["head.weight"].T, norms, decays


def plot(text, norms, decays, output):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(norms), 2, figsize=(max(8, 0.16 * len(text)), 2.2 * len(norms)), sharex=True, squeeze=False)
    for layer, (norm, decay) in enumerate(zip(norms, decays)):
        for axis, values, name in ((axes[layer, 0], norm, "state norm"), (axes[layer, 1], decay, "decay exp(g)")):
            for head in range(values.shape[1]):
                axis.plot(values[:, head], label=f"head {head}")
            axis.set_ylabel(f"layer {layer}: {name}")
        axes[layer, 1].set_ylim(0, 1.05)
    for axis in axes[-1]:
        axis.set_xticks(range(len(text)), [chr(byte) if chr(byte).isprintable() else " " for byte in text], fontsize=7)
    axes[0, 0].legend(fontsize=7, ncols=4)
    figure.tight_layout()
    figure.savefig(output, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompt", default="In the beginning God created the heaven and the earth. ")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("states.png"), help="the PNG file (states.png)")
    options = parser.parse_args()
    weights, metadata = read_safetensors(MODEL)
    text = options.prompt.encode()
    if not text:
        parser.error("--prompt: expected at least one byte")
    logits, norms, decays = run(text, weights, json.loads(metadata["config"]))
    plot(text, norms, decays, options.output)
    # A model that runs wrong predicts no better than chance: log(256) = 5.5 nats a byte.
    scores = logits[:-1] - np.logaddexp.reduce(logits[:-1], axis=-1, keepdims=True)
    if len(text) > 1:
        loss = -scores[np.arange(len(text) - 1), list(text[1:])].mean()
        print(f"the prompt costs the model {loss:.2f} nats a byte; the next byte is {chr(int(logits[-1].argmax()))!r}")
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
