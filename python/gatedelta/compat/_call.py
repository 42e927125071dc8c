# SPDX-License-Identifier: Apache-2.0
from .._errors import Unsupported
from ..torch import commit, forward

__all__ = ["commit", "forward", "reject", "require"]


def require(condition, message):
    """The originals' own checks raise AssertionError."""
    if not condition:
        raise AssertionError(message)


def reject(**arguments):
    """For arguments of the originals that have no counterpart here."""
    for name, value in arguments.items():
        if value is not None and value is not False:
            raise Unsupported(f"{name}: not supported")
