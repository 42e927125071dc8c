# SPDX-License-Identifier: Apache-2.0
"""The example scripts, as a user calls them; each checks its own result."""

import os
import pathlib
import subprocess
import sys

import pytest

scripts = pathlib.Path(__file__).parents[2] / "examples/python"


def run(*command):
    # Few threads: small work, and another OpenMP in the same process.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_plot_states(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    image = tmp_path / "states.png"
    out = run(sys.executable, scripts / "plot_states.py", "--prompt", "In the beginning God created", "--output", image)
    assert image.read_bytes().startswith(b"\x89PNG")
    cost = float(out.split("costs the model ")[1].split()[0])
    assert cost < 2.5  # a trained model on its own text; chance is 5.5


@pytest.mark.parametrize("options", [[], ["--compile"]], ids=["eager", "compiled"])
def test_decode(options):
    pytest.importorskip("torch", reason="PyTorch is not installed")
    out = run(sys.executable, scripts / "decode.py", "--hidden", "256", "--tokens", "4", *options)
    assert "relative difference" in out


def test_tensor_parallel(tmp_path):
    pytest.importorskip("torch", reason="PyTorch is not installed")
    import torch

    if torch.cuda.device_count() == 1:
        pytest.skip("there is one CUDA device, and two processes need two")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    out = run(*torchrun, scripts / "tensor_parallel.py", "--hidden", "128", "--q-heads", "4", "--batch", "2", "--repeats", "3",
              "--json", tmp_path / "scaling.json")  # fmt: skip
    assert "relative difference" in out and (tmp_path / "scaling.json").exists()
