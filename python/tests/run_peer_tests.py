#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Runs the test files that FlashInfer and Flash Linear Attention publish for their gated delta rule functions against the
drop-ins of gatedelta.compat, from a checkout of theirs; neither has to be installed. Needs a CUDA device, PyTorch and, for FLA,
Triton and einops. The end of the output counts the results of each test function, with the reasons.

    run_peer_tests.py flashinfer CHECKOUT [arguments of pytest]
    run_peer_tests.py fla CHECKOUT [arguments of pytest]
    run_peer_tests.py fla-forward CHECKOUT [arguments of pytest]    tests of gradients compare results only
"""

import collections
import importlib
import os
import pathlib
import sys
import types

import pytest
import torch


def package(name, folder=None):
    """A package of this name that consists of what is put into it, and of a folder's modules."""
    module = types.ModuleType(name)
    module.__path__ = [] if folder is None else [str(folder)]
    sys.modules[name] = module
    return module


def prepare_flashinfer(checkout):
    """The tests import these functions, a device query, and internal kernels, which they do without where there are none."""
    from gatedelta.compat import flashinfer

    root = package("flashinfer")
    root.gdn_decode = sys.modules["flashinfer.gdn_decode"] = flashinfer
    root.utils = package("flashinfer.utils")
    root.utils.get_compute_capability = lambda device: torch.cuda.get_device_capability(device)
    root.cute_dsl = package("flashinfer.cute_dsl")
    root.cute_dsl.utils = package("flashinfer.cute_dsl.utils")
    root.cute_dsl.utils.is_cute_dsl_arch_supported = lambda *_, **__: True
    tests = checkout / "tests/gdn"
    files = [tests / "test_decode_delta_rule.py", tests / "test_decode_pretranspose_noncontiguous_pool.py",
             tests / "test_decode_pretranspose_bf16_padded_pool.py"]  # fmt: skip
    return files, []


def prepare_fla(checkout):
    """The tests' references are FLA's own; only the two functions are replaced. Left out are tests that do not call them: of
    FLA's gate, of the steps of its backward pass, and of which of its kernels run on which GPU."""
    from gatedelta.compat import fla

    os.environ["FLA_DISABLE_BACKEND_DISPATCH"] = "1"  # with several of its backends it skips tests with more value heads
    sys.path.insert(0, str(checkout))
    package("fla", checkout / "fla").__version__ = "0"  # without its __init__, which imports models
    package("fla.ops", checkout / "fla/ops")
    operators = importlib.import_module("fla.ops.gated_delta_rule")
    operators.chunk_gated_delta_rule = fla.chunk_gated_delta_rule
    operators.fused_recurrent_gated_delta_rule = fla.fused_recurrent_gated_delta_rule
    return [checkout / "tests/ops/test_gdn.py"], ["-k", "not (test_gate or prepare_wy or flash_qla or blackwell)"]


def prepare_fla_forward(checkout):
    """Most of FLA's tests compare results and gradients in one function. The drop-ins have no gradients: here all are zeros, on
    both sides, so that what is compared are results."""
    found = prepare_fla(checkout)
    importlib.import_module("torch._dynamo")  # looks at the real attribute when it is imported
    torch.Tensor.backward = lambda self, *_, **__: None
    torch.Tensor.grad = property(lambda self: torch.zeros_like(self), lambda self, value: None)
    return found


class Counts:
    """A plugin of pytest that counts the results of each test function."""

    def __init__(self):
        self.results = collections.Counter()

    def pytest_runtest_logreport(self, report):
        if report.when != "call" and report.outcome == "passed":
            return
        reason = ""
        if report.skipped and isinstance(report.longrepr, tuple):
            reason = report.longrepr[2]
        elif report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            reason = (crash.message if crash else str(report.longrepr)).strip().split("\n")[0]
        name = report.nodeid.split("/")[-1].split("[")[0]
        self.results[name, report.outcome, reason[:160]] += 1

    def pytest_terminal_summary(self, terminalreporter):
        terminalreporter.section("results of each function")
        for (name, outcome, reason), count in sorted(self.results.items()):
            terminalreporter.write_line(f"{name}: {count} {outcome}" + (f": {reason}" if reason else ""))


def main():
    peers = {"flashinfer": prepare_flashinfer, "fla": prepare_fla, "fla-forward": prepare_fla_forward}
    if len(sys.argv) < 3 or sys.argv[1] not in peers:
        raise SystemExit(__doc__.strip())
    checkout = pathlib.Path(sys.argv[2]).resolve()
    files, selection = peers[sys.argv[1]](checkout)
    missing = [str(file) for file in files if not file.exists()]
    if missing:
        raise SystemExit(f"there is no {missing[0]}")
    # Their configuration files name plugins and options that are not needed here.
    options = ["-c", "/dev/null", "--rootdir", str(checkout), "--confcutdir", str(files[0].parent), "-p", "no:cacheprovider",
               "-q", "-rfE", "--tb=line"]  # fmt: skip
    raise SystemExit(pytest.main([*options, *map(str, files), *selection, *sys.argv[3:]], plugins=[Counts()]))


if __name__ == "__main__":
    main()
