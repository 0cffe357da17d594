"""Prototypes for `benchmarks.precision`: dense layers that read stored signs in other ways.

Bits are words of 32 signs. In blocks, the product that sends the error back takes some of the rows
at a time, so there is no float32 matrix of all rows. `rounded_bar` and `split_bar` take signs in
bfloat16, which the matrix units of some CPUs and of GPUs multiply several times as fast as float32.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

WORD, BLOCKS = 32, 8


def dense(x_bar, x, kernel, stored):
    """`x · kernel`; its error is `x_bar(y_bar, stored)`."""

    @jax.custom_vjp
    def f(x, kernel, stored):
        return x @ kernel

    def backward(residuals, y_bar):
        x, stored = residuals
        return x_bar(y_bar, stored), x.T @ y_bar, None

    f.defvjp(lambda x, kernel, stored: (x @ kernel, (x, stored)), backward)
    return f(x, kernel, stored)


def pack(kernel):
    """The signs of a kernel `(in, out)`, `(in / 32, out)`: bit k is of row block k."""
    negative = (kernel < 0).astype(jnp.uint32).reshape(WORD, -1, kernel.shape[1])
    return jnp.sum(negative << _places(0, WORD), axis=0, dtype=jnp.uint32)


def rows_of_bits(words, first, count):
    """Some 32nds of the rows, as ±1: a float's highest bit is its sign."""
    signs = words << (WORD - 1 - _places(first, count)) & jnp.uint32(1 << (WORD - 1))
    ones = lax.bitcast_convert_type(signs | jnp.float32(1).view(jnp.uint32), jnp.float32)
    return ones.reshape(-1, words.shape[1])


def _places(first, count):
    return (first + jnp.arange(count)).astype(jnp.uint32)[:, None, None]


def rows_of_int8(signs, first, count):
    """Some 32nds of the rows."""
    size = len(signs) // WORD
    return lax.dynamic_slice_in_dim(signs, first * size, count * size).astype(jnp.float32)


def by_rows(rows, blocks, y_bar, stored):
    """`y_bar · Bᵀ`, in a loop over blocks of B's rows."""
    count = WORD // blocks

    def block(i):
        return y_bar @ rows(stored, i * count, count).T

    def body(i, x_bar):
        return lax.dynamic_update_slice_in_dim(x_bar, block(i), i * width, 1)

    width = jax.eval_shape(block, 0).shape[1]
    return lax.fori_loop(0, blocks, body, jnp.zeros((len(y_bar), blocks * width)))


def rounded_bar(y_bar, signs):
    """`y_bar · Bᵀ` of bfloat16 numbers, summed in float32."""
    last = (((1,), (1,)), ((), ()))  # `signs.T` would be a new array, in float32
    y_bar = y_bar.astype(jnp.bfloat16)
    return lax.dot_general(y_bar, signs, last, preferred_element_type=jnp.float32)


def split_bar(y_bar, signs):
    """The same, exact but for rounding in the sum."""
    high = lax.reduce_precision(y_bar, exponent_bits=8, mantissa_bits=7)  # XLA may leave out a cast
    middle = lax.reduce_precision(y_bar - high, exponent_bits=8, mantissa_bits=7)
    parts = high, middle, y_bar - high - middle
    return sum(rounded_bar(part, signs) for part in parts)


PROTOTYPES = {  # what is stored, and `(y_bar, stored) -> x_bar`
    "bits": ("bits", functools.partial(by_rows, rows_of_bits, 1)),
    "bits, blocks": ("bits", functools.partial(by_rows, rows_of_bits, BLOCKS)),
    "int8, blocks": ("int8", functools.partial(by_rows, rows_of_int8, BLOCKS)),
    "bfloat16, error too": ("bfloat16", rounded_bar),
    "bfloat16, error in three": ("bfloat16", split_bar),
}
