"""BERT: learned places, norms behind the branches, attention both ways (Devlin et al., 2018, arXiv:1810.04805).

A block is x <- norm(x + attn(x)), x <- norm(x + fc2 act(fc1 x)). The function is that of transformers' BertModel for
one text of the first kind (token type 0), which HunyuanDiT takes beside mT5.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from difax.core.annotations import checked, choose
from difax.core.contracts import Context, Shard, TextEncoder
from difax.core.placement import split
from difax.models.encoders.attention import attend as reference
from difax.models.encoders.attention import seen_keys
from difax.models.encoders.layers import ACTIVATIONS, Tokens, activate, as_heads, check_least, functions
from difax.models.layers import Dense, affine_norm, model_dtype


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """Geometry and numerics of a BERT; the arguments of `bert`."""

    depth: int
    width: int
    heads: int
    ffn: int
    vocabulary: int
    length: int
    kinds: int
    activation: str
    pooled: bool
    eps: float
    dtype: Any


class BertBlock(nn.Module):
    """One block."""

    config: BertConfig

    def setup(self) -> None:
        c = self.config
        self.qkv, self.out = Dense(3 * c.width), Dense(c.width)
        self.fc1, self.fc2 = Dense(c.ffn), Dense(c.width)
        self.norm1, self.norm2 = affine_norm(c.eps), affine_norm(c.eps)

    def __call__(self, x_BTD: jax.Array, context: Context, attend: Any) -> jax.Array:
        c = self.config
        q, k, v = (as_heads(part, c.width // c.heads) for part in split(self.qkv(x_BTD), 3 * (c.width,)))
        o = attend(q, k, v, scale=(c.width // c.heads) ** -0.5, seen=context["seen"])
        x_BTD = self.norm1(x_BTD + self.out(o.reshape(x_BTD.shape))).astype(x_BTD.dtype)
        return self.norm2(x_BTD + self.fc2(activate(self.fc1(x_BTD), c.activation))).astype(x_BTD.dtype)


class Ends(nn.Module):
    """Tokens, places and the kind of text before the blocks; the pooled first token behind them."""

    config: BertConfig

    def setup(self) -> None:
        c, small = self.config, nn.initializers.normal(0.02)
        self.tokens = Tokens(c.vocabulary, c.width)
        self.places = self.param("places", small, (c.length, c.width))
        self.kinds = self.param("kinds", small, (c.kinds, c.width))
        self.before = affine_norm(c.eps)
        self.pooler = Dense(c.width) if c.pooled else None

    def embed(self, ids: jax.Array, mask: jax.Array) -> tuple[jax.Array, Context]:
        x = self.tokens(ids) + self.places[: ids.shape[1]][None] + self.kinds[:1][None]
        return self.before(x).astype(self.config.dtype), {"seen": seen_keys(mask)}

    def norm(self, x: jax.Array) -> jax.Array:
        return x

    def pool(self, x: jax.Array, ids: jax.Array) -> dict[str, jax.Array]:
        return {} if self.pooler is None else {"pooled": jnp.tanh(self.pooler(x[:, 0]))}

    def __call__(self, ids: jax.Array, mask: jax.Array) -> tuple[jax.Array, Context]:
        x, context = self.embed(ids, mask)
        self.pool(x, ids)
        return x, context


@checked
def bert(
    *,
    depth: int,
    width: int,
    heads: int,
    ffn: int,
    vocabulary: int = 30522,
    length: int = 512,
    kinds: int = 2,
    activation: str = "gelu",
    pooled: bool = True,
    eps: float = 1e-12,
    attend: Callable[..., Any] = reference,
    dtype: str | type | np.dtype = "float32",
) -> TextEncoder:
    """A BERT as a `TextEncoder`; HunyuanDiT's is (24, 1024, 16, 4096) with 47020 tokens.

    Args:
      depth, width, heads, ffn: blocks, width, heads, hidden width of the feed-forward.
      vocabulary, length, kinds: tokens (30522), places (512), token types (2), of which the first is taken.
      activation: one of `ACTIVATIONS` ("gelu", the exact form).
      pooled: is there the layer that pools the first token (True).
      eps: of the norms (1e-12).
      attend: as `difax.models.encoders.attention.attend`, which is the default.
      dtype: "float32" or "bfloat16", of activations and products; norms and softmax are float32.

    Raises:
      ValueError: a number that is too small, a width that heads do not divide, an unknown activation.
    """
    check_least("bert", dict(depth=depth, width=width, heads=heads, ffn=ffn, vocabulary=vocabulary, length=length))
    check_least("bert", {"kinds": kinds})
    if width % heads:
        raise ValueError(f"bert: width={width}; allowed: divisible by heads={heads}")
    if not 0 < eps <= 1:
        raise ValueError(f"bert: eps={eps}; allowed: > 0, up to 1")
    activation = choose("activation", activation, ACTIVATIONS)
    c = BertConfig(
        depth, width, heads, ffn, vocabulary, length, kinds, activation, pooled, eps, model_dtype("bert", dtype)
    )
    made = functions(Ends(c), BertBlock(c), depth, attend, pools=pooled)
    return TextEncoder(
        name=f"bert-{depth}x{width}",
        **made,
        depth=depth,
        width=width,
        length=length,
        vocabulary=vocabulary,
        dtype=c.dtype,
        shards=(
            ("/qkv/", Shard("columns", (1, 1, 1))),
            ("/fc1/", Shard("columns")),
            ("blocks/(out|fc2)/", Shard("rows")),
        ),
    )
