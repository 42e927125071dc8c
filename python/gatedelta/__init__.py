# SPDX-License-Identifier: Apache-2.0
"""The gated delta rule, the linear attention operator of Gated DeltaNet models, on NumPy, PyTorch, JAX and CuPy arrays.

forward() runs the operator, commit() ends a speculative step with snapshots, ReplayWindow has windows, backends() lists what can run here. Arrays are used where they
are, on their device and its current stream, and never copied. gatedelta.torch has the same as custom operators for
torch.compile; gatedelta.compat has the functions of other packages.
"""

from ._core import Backend, ReplayWindow, __version__, backends, check, commit, forward
from ._errors import DeviceError, Error, InvalidArgument, OutOfMemory, Unsupported

__all__ = [
    "Backend",
    "DeviceError",
    "Error",
    "InvalidArgument",
    "OutOfMemory",
    "ReplayWindow",
    "Unsupported",
    "__version__",
    "backends",
    "check",
    "commit",
    "forward",
]
