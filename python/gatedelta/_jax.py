# SPDX-License-Identifier: Apache-2.0
"""New JAX arrays: a compiled function for each size takes microseconds, where jax.numpy.empty takes a hundred."""

import functools

import jax


@functools.lru_cache(maxsize=4096)
def _maker(shape, dtype, sharding):
    return jax.jit(lambda: jax.numpy.zeros(shape, dtype or jax.numpy.float32), out_shardings=sharding)


def empty(shape, dtype, sharding):
    """`dtype` None: float32."""
    return _maker(shape, dtype, sharding)()
