"""Prediction of the next character of a text by a small transformer."""

from __future__ import annotations

import functools
import os
import pathlib
import pydoc_data.topics

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from soap_jax import grids, models, training
from soap_jax.tasks.task import Taps, Task, accuracy

CHARACTERS = 128
"""The number of ASCII characters; all other characters count as "?"."""
HELD_OUT = 256
"""The number of validation windows of text, and of test windows."""


class Transformer(nn.Module):
    """A causal transformer: `(batch, time)` characters to logits `(batch, time, 128)`.

    Blocks are as in GPT-2: x + attention(norm(x)), then x + mlp(norm(x)). These values are named
    for direct feedback: "embedding" and "logits", and in each block i the inputs of attention
    ("query_i", "key_i", "value_i"), the residual stream after attention ("attention_i"), the hidden
    layer of the mlp ("hidden_i"), and the residual stream after the block ("block_i").

    Attributes:
        blocks: number of blocks.
        width: width of the residual stream.
        heads: number of attention heads.
        context: the largest number of characters in a sequence.
    """

    blocks: int = 2
    width: int = 32
    heads: int = 4
    context: int = 32

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Returns the logits of the next character at every position."""
        dense = functools.partial(nn.Dense, kernel_init=models.glorot_normal)
        position = self.param("position", nn.initializers.normal(0.02), (self.context, self.width))
        x = nn.Embed(CHARACTERS, self.width, name="embed")(tokens)
        x = checkpoint_name(x + position[None, : tokens.shape[1]], "embedding")
        mask = nn.make_causal_mask(tokens)
        for i in range(self.blocks):
            attend = nn.MultiHeadDotProductAttention(
                self.heads,
                attention_fn=functools.partial(_attention, i),
                name=f"attention_{i}",
                kernel_init=models.glorot_normal,
            )
            x = checkpoint_name(x + attend(nn.LayerNorm()(x), mask=mask), f"attention_{i}")
            h = nn.gelu(dense(4 * self.width, name=f"up_{i}")(nn.LayerNorm()(x)))
            h = checkpoint_name(h, f"hidden_{i}")
            x = checkpoint_name(x + dense(self.width, name=f"down_{i}")(h), f"block_{i}")
        logits = dense(CHARACTERS, name="readout")(nn.LayerNorm()(x))
        return checkpoint_name(logits, "logits")

    @property
    def streams(self) -> tuple[str, ...]:
        """The names of the residual stream between blocks."""
        return ("embedding", *(f"block_{i}" for i in range(self.blocks)))

    @property
    def layers(self) -> tuple[str, ...]:
        """The names of every layer's output, also inside attention."""
        within = ("query", "key", "value", "attention", "hidden", "block")
        return ("embedding", *(f"{name}_{i}" for i in range(self.blocks) for name in within))


def _attention(i, query, key, value, mask=None):  # Flax passes only arguments with these names
    query, key, value = (
        checkpoint_name(x, f"{name}_{i}")
        for name, x in (("query", query), ("key", key), ("value", value))
    )
    return nn.dot_product_attention(query, key, value, mask=mask)


def char_lm(
    text: str | os.PathLike[str] | None = None,
    *,
    model: Transformer | None = None,
    batch_size: int = 16,
) -> Task:
    """Makes the task of a transformer that predicts the next character of a text.

    The last tenth of the text is for validation, the tenth before it for testing, each as equally
    spaced windows. The loss is the mean cross-entropy over positions, in nats per character. Direct
    feedback goes to the residual stream between blocks (`Transformer.streams`). Within a block the
    gradient is exact, also through attention.

    Args:
        text: a text file; by default the topics of Python's help (`pydoc_data.topics`), which
            differ between versions of Python. A study's record has a hash of the text.
        model: the transformer.
        batch_size: number of windows in a batch.

    Returns:
        The task. A function draws its batches of windows, `(batch, context + 1)`, so give the study
        `steps`, not `epochs`.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if the text is too short.

    References:
        Julien Launay et al. Direct feedback alignment scales to modern deep learning tasks and
            architectures. NeurIPS, 2020. https://arxiv.org/abs/2006.12878
    """
    grids.check_count("batch_size", batch_size)
    model = Transformer() if model is None else model
    if text is None:
        topics = pydoc_data.topics.topics
        read = "\n".join(topics[name] for name in sorted(topics))
    else:
        read = pathlib.Path(text).read_text(encoding="utf-8", errors="replace")
    codes = np.frombuffer(read.encode("ascii", "replace"), np.uint8)
    size = model.context + 1
    tenth = len(codes) // 10
    if tenth < size:
        raise ValueError(
            f"the text has {len(codes)} characters; expected at least {10 * size}, ten times "
            "(context + 1)."
        )
    train = jnp.asarray(codes[: -2 * tenth])

    def draw(key):
        starts = jax.random.randint(key, (batch_size,), 0, len(train) - size + 1)
        return jax.vmap(lambda start: jax.lax.dynamic_slice(train, (start,), (size,)))(starts)

    def held_out(part):
        starts = np.linspace(0, len(part) - size, HELD_OUT).astype(int)
        return np.stack([part[start : start + size] for start in starts])

    def outputs(params, batch):
        batch = batch.astype(jnp.int32)
        return model.apply({"params": params}, batch[:, :-1]), batch[:, 1:]

    def target(batch):
        return jax.nn.one_hot(batch[:, 1:], CHARACTERS)

    return Task(
        init=lambda key: model.init(key, jnp.zeros((1, model.context), jnp.int32))["params"],
        loss=lambda params, batch: training.cross_entropy(*outputs(params, batch)),
        train=draw,
        validation=held_out(codes[-tenth:]),
        test=held_out(codes[-2 * tenth : -tenth]),
        metrics={"accuracy": lambda params, batch: accuracy(*outputs(params, batch))},
        taps=Taps(model.streams, "logits", target),
    )
