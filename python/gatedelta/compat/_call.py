# SPDX-License-Identifier: Apache-2.0
import torch

from .. import _core
from .. import torch as operators
from .._errors import Unsupported


def forward(*tensors, **arguments):
    """gatedelta.forward; as an operator where PyTorch traces, or would go back through it (which is an error then)."""
    graph = torch.compiler.is_compiling() or (
        torch.is_grad_enabled()
        and any(isinstance(x, torch.Tensor) and x.requires_grad for x in (*tensors, *arguments.values()))
    )
    return (operators if graph else _core).forward(*tensors, **arguments)


def commit(*tensors, **arguments):
    (operators if torch.compiler.is_compiling() else _core).commit(*tensors, **arguments)


def require(condition, message):
    """The originals' own checks raise AssertionError."""
    if not condition:
        raise AssertionError(message)


def reject(**arguments):
    """For arguments of the originals that have no counterpart here."""
    for name, value in arguments.items():
        if value is not None and value is not False:
            raise Unsupported(f"{name}: not supported")
