# SPDX-License-Identifier: Apache-2.0
"""The token mixer of a Qwen3-Next layer: projections, causal convolution, gated delta rule, gated norm."""

import torch
from torch import nn
from torch.nn import functional as F

import gatedelta.torch


class GatedDeltaNet(nn.Module):
    """Decodes batches of sequences whose states lie in pools: `states` [slots,HV,V,K] and `history`
    [slots,channels,taps-1], the convolution's last inputs."""

    def __init__(self, hidden=2048, q_heads=16, v_heads=32, width=128, taps=4):
        super().__init__()
        self.q_heads, self.v_heads, self.width, self.taps = q_heads, v_heads, width, taps
        self.channels = (2 * q_heads + v_heads) * width
        self.qkv = nn.Linear(hidden, self.channels, bias=False)
        self.z = nn.Linear(hidden, v_heads * width, bias=False)
        self.ba = nn.Linear(hidden, 2 * v_heads, bias=False)
        self.conv = nn.Parameter(torch.randn(self.channels, taps) * 0.4)
        self.A_log = nn.Parameter(torch.empty(v_heads).uniform_(1, 16).log())
        self.dt_bias = nn.Parameter(torch.randn(v_heads) - 4)
        self.norm = nn.Parameter(torch.ones(width))
        self.out = nn.Linear(v_heads * width, hidden, bias=False)

    def pools(self, slots, device=None, dtype=None, state_dtype=torch.float32):
        states = torch.zeros(slots, self.v_heads, self.width, self.width, device=device, dtype=state_dtype)
        return states, torch.zeros(slots, self.channels, self.taps - 1, device=device, dtype=dtype)

    def forward(self, x, states, history, slots):
        """x [B,T,hidden], slots [B]: the next T tokens of each sequence. Both pools are updated in place."""
        inputs = torch.cat([history[slots], self.qkv(x).transpose(1, 2)], dim=-1)
        history.index_copy_(0, slots, inputs[..., 1 - self.taps :])
        mixed = F.silu(F.conv1d(inputs, self.conv[:, None], groups=self.channels)).transpose(1, 2)
        # Views of one tensor each: the operator takes them as they are.
        q, k, v = (
            part.unflatten(-1, (-1, self.width))
            for part in mixed.split([self.q_heads * self.width, self.q_heads * self.width, self.v_heads * self.width], -1)
        )
        b, a = self.ba(x).chunk(2, dim=-1)
        o = gatedelta.torch.forward(
            q, k, v, a=a, b=b, A_log=self.A_log, dt_bias=self.dt_bias, state=states, read_slots=slots
        )
        o = F.rms_norm(o.float(), (self.width,), self.norm.float(), 1e-6) * F.silu(self.z(x).unflatten(-1, (-1, self.width)).float())
        return self.out(o.flatten(-2).to(x.dtype))
