# SPDX-License-Identifier: Apache-2.0
"""Functions of other packages with their arguments, on this library: change the import, keep the calls.

    gatedelta.compat.flashinfer   gated_delta_rule_decode_pretranspose, gated_delta_rule_decode, gated_delta_rule_mtp
    gatedelta.compat.fla          fused_recurrent_gated_delta_rule, chunk_gated_delta_rule
    gatedelta.compat.sglang       fused_sigmoid_gating_delta_rule_update

They take PyTorch tensors on the host or a CUDA device, of more dtypes and sizes than the originals; docs/PYTHON.md lists what
differs.
"""
