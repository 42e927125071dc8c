# SPDX-License-Identifier: Apache-2.0
"""How to call each peer: which cells its functions do, with which arguments, and what they do differently.

A peer is a class with `name`, `differs` (one sentence for the tables), `load(folder)`, which imports it and returns its version,
`does(cell)`, `in_order(cell)`, whether it takes the states of a batch as they lie in memory instead of by slots, and `call(x)`,
which turns the tensors of cells.tensors() into a Call. Nothing of a peer is imported before load().
"""
import contextlib
import dataclasses
import importlib
import importlib.machinery
import importlib.metadata
import importlib.util
import pathlib
import sys
import types
from typing import Any, Callable

import torch

from cells import FILLED, WINDOW


@dataclasses.dataclass
class Call:
    function: Callable
    arguments: dict[str, Any]
    output: Callable[[Any], torch.Tensor]  # from the function's result: [B, T, HV, V]
    state: Callable[[Any], Any] = lambda result: None  # the last states by batch row, if they are not in the pool

    def __call__(self):
        return self.function(**self.arguments)


def stand_in(name, **attributes):
    """A module of these attributes instead of one that would import a whole serving engine."""
    module = types.ModuleType(name)
    module.__dict__.update(attributes)
    sys.modules[name] = module
    return module


def bare_package(name, folder):
    """Makes the package's modules importable without running its __init__."""
    spec = importlib.machinery.ModuleSpec(name, None, is_package=True)
    spec.submodule_search_locations = [str(folder)]
    stand_in(name, __path__=[str(folder)], __spec__=spec)


def package_folder(name, folder):
    """Where a package lies, without importing it."""
    if folder is not None and (pathlib.Path(folder) / name).is_dir():
        return pathlib.Path(folder) / name
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f"there is no package {name}")
    return pathlib.Path(next(iter(spec.submodule_search_locations)))


def engine_module(package, folder, module, stand_ins):
    """One module of a serving engine with the few that it imports itself; `stand_ins`: {module: attributes}."""
    root = package_folder(package, folder)
    parts = module.split(".")
    for end in range(1, len(parts)):
        name = ".".join(parts[:end])
        if name not in sys.modules:
            bare_package(name, root.joinpath(*parts[1:end]))
    for name, attributes in stand_ins.items():
        stand_in(name, **attributes)
    return importlib.import_module(module)


def version_of(*distributions):
    for name in distributions:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return "unknown"


def capability():
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)


class Peer:
    def in_order(self, cell):
        return False


class Fla(Peer):
    name = "fla"
    differs = ("fused_recurrent_gated_delta_rule; no pool and no slots; with an update the last state goes to a new float32 tensor, "
               "whatever the dtype of the one read")

    def load(self, folder):
        module = importlib.import_module("fla.ops.gated_delta_rule.fused_recurrent")
        self.function = module.fused_recurrent_gated_delta_rule
        return version_of("fla-core", "flash-linear-attention")

    def in_order(self, cell):
        return True

    def does(self, cell):
        return cell.mode in ("update", "read-only")

    def call(self, x):
        cell = x["cell"]
        return Call(
            self.function,
            dict(q=x["q"], k=x["k"], v=x["v"], g=x["a"], beta=x["b"], scale=x["scale"], initial_state=x["pool"][1:],
                 output_final_state=cell.mode == "update", use_qk_l2norm_in_kernel=True, use_gate_in_kernel=True, A_log=x["A_log"],
                 dt_bias=x["dt_bias"], use_beta_sigmoid_in_kernel=True, state_v_first=cell.layout == "vk"),
            output=lambda result: result[0], state=lambda result: result[1])


class FlashInfer(Peer):
    """What its documentation names."""

    name = "flashinfer"
    differs = ("gated_delta_rule_decode_pretranspose, gated_delta_rule_decode (V last) and gated_delta_rule_mtp (float32 states of "
               "several tokens); V last knows no pool and no slots")

    def load(self, folder):
        # Its __init__ imports every kernel family there is, and what these need.
        if "flashinfer" not in sys.modules:
            bare_package("flashinfer", package_folder("flashinfer", folder))
        self.api = importlib.import_module("flashinfer.gdn_decode")
        self.kernels = importlib.import_module("flashinfer.gdn_kernels")
        if self.kernels.gated_delta_rule is None:
            importlib.import_module("flashinfer.gdn_kernels.gdn_decode_bf16_state")  # raises what was swallowed
        self.compile_in_parallel()
        return version_of("flashinfer-python")

    @staticmethod
    def compile_in_parallel():
        """Its own form for several processes that compile: the lock is held while a kernel is stored, not while it is built."""
        spec = importlib.import_module("flashinfer.jit.cute_dsl_core").JitSpecCuteDsl

        def build_and_load(self):
            kernel = self.try_load()
            if kernel is None:
                self.compile_and_persist()
                kernel = self.load()
            return kernel

        spec.build_and_load = build_and_load

    def in_order(self, cell):
        return cell.layout == "kv"

    def does(self, cell):
        if cell.width != 128 or cell.state == "f16":
            return False
        if cell.layout == "kv":
            return cell.state == "f32" and cell.tokens == 1 and cell.mode == "update"
        if cell.tokens == 1:
            return cell.mode == "update"
        return cell.mode in ("update", "snapshots", "read-only") or (cell.mode == "token-slots" and cell.state == "f32")

    def call(self, x):
        cell = x["cell"]
        common = dict(q=x["q"], k=x["k"], v=x["v"], A_log=x["A_log"], a=x["a"], dt_bias=x["dt_bias"], b=x["b"], scale=x["scale"],
                      output=x["o"], use_qk_l2norm=True)
        output = lambda result: result[0]  # noqa: E731
        if cell.layout == "kv":
            return Call(self.api.gated_delta_rule_decode, dict(common, state=x["pool"][1:]), output)
        pool = dict(initial_state=x["pool"], initial_state_indices=x["slots"])
        if cell.tokens == 1:
            return Call(self.api.gated_delta_rule_decode_pretranspose, dict(common, state=None, **pool), output)
        pool["disable_state_update"] = cell.mode in ("snapshots", "read-only")
        if cell.mode == "snapshots":
            pool["intermediate_states_buffer"] = x["snapshots"]
        if cell.state == "bf16":
            return Call(self.api.gated_delta_rule_decode_pretranspose, dict(common, state=None, **pool), output)
        if cell.mode == "token-slots":
            pool["ssm_state_indices"] = x["token_slots"]
        return Call(self.api.gated_delta_rule_mtp, dict(common, **pool), output)


class FlashInferKernels(FlashInfer):
    """bfloat16 kernels that its documented functions do not reach."""

    name = "flashinfer-kernels"
    differs = ("gdn_kernels, undocumented: gated_delta_rule_mtp_wy_output_only (read-only; A_log and dt_bias in bfloat16), "
               "gated_delta_rule_mtp with ssm_state_indices (token-slots), gated_delta_rule_mtp_ucache "
               f"(replay; {FILLED} of {WINDOW} entries filled)")

    def does(self, cell):
        if cell.width != 128 or cell.state != "bf16" or cell.layout != "vk" or cell.tokens == 1:
            return False
        return cell.mode in ("read-only", "token-slots") or (cell.mode == "replay" and cell.tokens in (4, 8))

    def call(self, x):
        cell = x["cell"]
        arguments = dict(A_log=x["A_log"], a=x["a"], dt_bias=x["dt_bias"], q=x["q"], k=x["k"], v=x["v"], b=x["b"],
                         initial_state_source=x["pool"], initial_state_indices=x["slots"], use_qk_l2norm_in_kernel=True,
                         scale=x["scale"])
        output = lambda result: result  # noqa: E731
        if cell.mode == "token-slots":
            return Call(self.kernels.gated_delta_rule_mtp, dict(arguments, ssm_state_indices=x["token_slots"], output=x["o"]), output)
        if cell.mode == "read-only":
            # Its own output tensor is written directly; one of the caller's would be a copy.
            return Call(self.kernels.gated_delta_rule_mtp_wy_output_only, arguments, output)
        slots, device = x["pool"].shape[0], x["o"].device
        # A window of zeros stands for the state in the pool as it is.
        window = dict(
            k_cache=torch.zeros(slots, cell.q_heads, WINDOW, cell.width, dtype=torch.bfloat16, device=device),
            u_cache=torch.zeros(slots, cell.v_heads, WINDOW, cell.width, dtype=torch.bfloat16, device=device),
            g_cache=torch.zeros(slots, cell.v_heads, WINDOW, dtype=torch.float32, device=device),
            hist_len=torch.full((cell.batch,), FILLED, dtype=torch.int32, device=device))
        return Call(self.kernels.gated_delta_rule_mtp_ucache, dict(arguments, **window), output)


class Sglang(Peer):
    name = "sglang"
    differs = ("packed decode (T = 1; rounds beta to bfloat16, wants q, k, v packed) and fused_sigmoid_gating_delta_rule_update, "
               "with programmatic dependent launch")
    dependent_launch = True

    def load(self, folder):
        major, minor = capability()
        utils = dict(get_device_sm=lambda: major * 10 + minor, is_cuda=lambda: True, is_hip=lambda: False,
                     is_gfx95_supported=lambda: False, is_sm90_supported=lambda: major == 9)
        stand_ins = {
            "sglang.srt": {"__path__": []},
            "sglang.srt.utils": dict(utils, __path__=[]),
            "sglang.srt.utils.common": {"torch_release": tuple(int(n) for n in torch.__version__.split("+")[0].split(".")[:2])},
            "sglang.kernels.jit": {"__path__": []},
            "sglang.kernels.jit.utils": {"is_arch_support_pdl": lambda: major >= 9},
        }
        self.verify = engine_module("sglang", folder, "sglang.kernels.ops.attention.linear.fused_sigmoid_gating_recurrent", stand_ins)
        self.decode = engine_module("sglang", folder, "sglang.kernels.ops.attention.fla.fused_recurrent", {})
        return version_of("sglang")

    def does(self, cell):
        return cell.layout == "vk" and (cell.mode == "update" if cell.tokens == 1 else cell.mode in ("update", "snapshots", "read-only"))

    def call(self, x):
        cell = x["cell"]
        if cell.tokens == 1:
            return packed_decode(self.decode.fused_recurrent_gated_delta_rule_packed_decode, x)
        arguments = dict(A_log=x["A_log"], a=x["a"], dt_bias=x["dt_bias"], softplus_beta=1.0, softplus_threshold=20.0, q=x["q"], k=x["k"],
                         v=x["v"], b=x["b"], initial_state_source=x["pool"], initial_state_indices=x["slots"], scale=x["scale"],
                         use_qk_l2norm_in_kernel=True, disable_state_update=cell.mode != "update")
        if cell.mode == "snapshots":
            rows = torch.arange(cell.batch, dtype=torch.int32, device=x["o"].device)
            arguments.update(intermediate_states_buffer=x["snapshots"], intermediate_state_indices=rows, cache_steps=cell.tokens)
        return Call(self.update, arguments, output=lambda result: result)

    def update(self, **arguments):
        self.verify.is_arch_support_pdl = lambda: self.dependent_launch and capability()[0] >= 9
        return self.verify.fused_sigmoid_gating_delta_rule_update(**arguments)


class SglangPlain(Sglang):
    name = "sglang-plain"
    differs = "fused_sigmoid_gating_delta_rule_update of sglang without programmatic dependent launch"
    dependent_launch = False

    def does(self, cell):
        return cell.tokens > 1 and super().does(cell)


def packed_decode(function, x):
    """The decode function that SGLang and vLLM share: q, k and v of a token are one row."""
    cell = x["cell"]
    B, HV = cell.batch, cell.v_heads
    return Call(
        function,
        dict(mixed_qkv=x["packed"].view(B, -1), a=x["a"].view(B, HV), b=x["b"].view(B, HV), A_log=x["A_log"], dt_bias=x["dt_bias"],
             scale=x["scale"], initial_state=x["pool"], out=x["o"], ssm_state_indices=x["slots"], use_qk_l2norm_in_kernel=True),
        output=lambda result: x["o"])


class Vllm(Peer):
    name = "vllm"
    differs = ("Triton kernels: packed decode (T = 1; wants q, k, v packed), and fused_sigmoid_gating_delta_rule_update with "
               "num_accepted_tokens, which writes the state after each token to a slot of the pool")

    def load(self, folder):
        import triton
        import triton.language as tl
        from triton.language.extra import libdevice

        platform = types.SimpleNamespace(is_cuda=lambda: True, is_cuda_alike=lambda: True, is_rocm=lambda: False, is_xpu=lambda: False,
                                         is_device_capability_family=lambda family, device_id=0: capability()[0] * 10 == family)
        stand_ins = {"vllm.triton_utils": {"tl": tl, "triton": triton, "tldevice": libdevice}, "vllm.platforms": {"current_platform": platform}}
        place = "vllm.third_party.flash_linear_attention.ops"
        self.decode = engine_module("vllm", folder, f"{place}.fused_recurrent", stand_ins)
        self.verify = engine_module("vllm", folder, f"{place}.fused_sigmoid_gating", {})
        return version_of("vllm")

    def does(self, cell):
        return cell.layout == "vk" and (cell.mode == "update" if cell.tokens == 1 else cell.mode == "token-slots")

    def call(self, x):
        cell = x["cell"]
        if cell.tokens == 1:
            return packed_decode(self.decode.fused_recurrent_gated_delta_rule_packed_decode, x)
        B, T, device = cell.batch, cell.tokens, x["o"].device
        flat = {name: x[name].view(1, B * T, *x[name].shape[2:]) for name in ("q", "k", "v", "a", "b")}
        # As it is called in the engine: the state read is that of the last accepted token, here the only one, in the first column.
        table = x["token_slots"] = torch.cat((x["slots"].view(B, 1), x["token_slots"][:, 1:]), 1).contiguous()
        return Call(
            self.verify.fused_sigmoid_gating_delta_rule_update,
            dict(A_log=x["A_log"], a=flat["a"], b=flat["b"], dt_bias=x["dt_bias"], q=flat["q"], k=flat["k"], v=flat["v"], scale=x["scale"],
                 initial_state=x["pool"], inplace_final_state=True,
                 cu_seqlens=torch.arange(0, B * T + 1, T, dtype=torch.int32, device=device), ssm_state_indices=table,
                 num_accepted_tokens=torch.ones(B, dtype=torch.int32, device=device), use_qk_l2norm_in_kernel=True),
            output=lambda result: result[0].view(B, T, cell.v_heads, cell.width))


PEERS = {peer.name: peer for peer in (Fla, FlashInfer, FlashInferKernels, Sglang, SglangPlain, Vllm)}
