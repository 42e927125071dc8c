# SPDX-License-Identifier: Apache-2.0
"""The library's errors as Python exceptions."""


class Error(RuntimeError):
    """Base of all errors of the library. The message names the tensor, what was expected and what was found.

    `code` is the number that the C++ and C interfaces use. A call that raises has changed nothing, except for DeviceError,
    after which outputs are unspecified.
    """

    code = 0


class InvalidArgument(Error, ValueError):
    """A tensor, slot, size or option is wrong."""

    code = 1


class Unsupported(Error, NotImplementedError):
    """Well formed, but no selected backend does it; the message has the reason."""

    code = 2


class OutOfMemory(Error, MemoryError):
    """A host or device allocation failed."""

    code = 3


class DeviceError(Error):
    """The device reported an error, or a kernel met a bad slot."""

    code = 4
