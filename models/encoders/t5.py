"""T5 encoders: T5 v1.1, mT5 and umT5, whose attention knows places by a learned bias alone.

Raffel et al., 2019, arXiv:1910.10683; Shazeer (gated units), 2020, arXiv:2002.05202; Xue et al. (mT5), 2020,
arXiv:2010.11934; Chung et al. (umT5), 2023, arXiv:2304.09151. With norm(x) = w x / sqrt(mean x^2 + eps), a block is

  x <- x + attn(norm(x)),   attn = softmax(q k^T + b) v with no scale, b[h, i, j] = table[bucket(j - i), h]
  x <- x + wo (act(w0 norm(x)) w1 norm(x)).

T5 and mT5 have one table, used by every block; umT5 has one in each. The function is that of transformers'
T5EncoderModel and UMT5EncoderModel; the clamping that these have for float16 is not here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from difax.core.annotations import LARGEST, checked, choose
from difax.core.contracts import Context, Shard, TextEncoder
from difax.core.placement import split
from difax.models.encoders.attention import attend as reference
from difax.models.encoders.attention import seen_keys
from difax.models.encoders.layers import ACTIVATIONS, RMSNorm, Tokens, activate, as_heads, check_least, functions, gated
from difax.models.layers import Dense, model_dtype


@dataclasses.dataclass(frozen=True)
class T5Config:
    """Geometry and numerics of a T5 encoder; the arguments of `t5`."""

    depth: int
    width: int
    heads: int
    head_width: int
    ffn: int
    vocabulary: int
    gated: bool
    activation: str
    buckets: int
    distance: int
    bias_each_layer: bool
    eps: float
    dtype: Any


def position_buckets(length: int, buckets: int = 32, distance: int = 128) -> np.ndarray:
    """The bucket of every pair of places: half of them for keys behind the query, the rest for keys before it.

    Of each half, the first half is a place each, and the others grow by equal ratios up to `distance`.

    Args:
      length: T of the text. buckets: of the table, a multiple of 4. distance: from which on all is one bucket.

    Returns:
      int32 [T, T], query by key.
    """
    place = np.arange(length)
    far = place[None] - place[:, None]
    half, exact = buckets // 2, buckets // 4
    away = np.abs(far)
    # in float32 and cut, not rounded, as the weights were trained: powers of two lie on the borders
    ratio = np.log(np.maximum(away, 1).astype(np.float32) / np.float32(exact)) / np.float32(math.log(distance / exact))
    grown = exact + (ratio * np.float32(half - exact)).astype(np.int32)
    return ((far > 0) * half + np.where(away < exact, away, np.minimum(grown, half - 1))).astype(np.int32)


def _bias(table: jax.Array, buckets_TT: jax.Array) -> jax.Array:
    """[buckets, H] -> float32 [1, H, T, T]."""
    return jnp.moveaxis(table.astype(jnp.float32)[buckets_TT], -1, 0)[None]


class T5Block(nn.Module):
    """One block of the encoder."""

    config: T5Config

    def setup(self) -> None:
        c = self.config
        self.norm1, self.norm2 = RMSNorm(c.eps), RMSNorm(c.eps)
        self.qkv = Dense(3 * c.heads * c.head_width, use_bias=False)
        self.out = Dense(c.width, use_bias=False)
        self.wi = Dense((2 if c.gated else 1) * c.ffn, use_bias=False)
        self.wo = Dense(c.width, use_bias=False)
        if c.bias_each_layer:
            self.places = self.param("places", nn.initializers.normal(0.02), (c.buckets, c.heads))

    def __call__(self, x_BTD: jax.Array, context: Context, attend: Any) -> jax.Array:
        c = self.config
        parts = split(self.qkv(self.norm1(x_BTD)), 3 * (c.heads * c.head_width,))
        q, k, v = (as_heads(part, c.head_width) for part in parts)
        bias = _bias(self.places, context["buckets"]) if c.bias_each_layer else context["bias"]
        o = attend(q, k, v, scale=1.0, seen=context["seen"], bias=bias)
        x_BTD = x_BTD + self.out(o.reshape(*x_BTD.shape[:2], -1))
        h = self.wi(self.norm2(x_BTD))
        if c.gated:
            gate, h = split(h, 2 * (c.ffn,))
            return x_BTD + self.wo(gated(h, gate, c.activation))
        return x_BTD + self.wo(activate(h, c.activation))


class Ends(nn.Module):
    """The table of tokens, the bias that all blocks share, and the norm behind the last block."""

    config: T5Config

    def setup(self) -> None:
        c = self.config
        self.tokens = Tokens(c.vocabulary, c.width)
        self.final = RMSNorm(c.eps)
        if not c.bias_each_layer:
            self.places = self.param("places", nn.initializers.normal(0.02), (c.buckets, c.heads))

    def embed(self, ids: jax.Array, mask: jax.Array) -> tuple[jax.Array, Context]:
        c = self.config
        buckets = jnp.asarray(position_buckets(ids.shape[1], c.buckets, c.distance))
        places = {"buckets": buckets} if c.bias_each_layer else {"bias": _bias(self.places, buckets)}
        return self.tokens(ids).astype(c.dtype), {"seen": seen_keys(mask), **places}

    def norm(self, x: jax.Array) -> jax.Array:
        return self.final(x)

    def __call__(self, ids: jax.Array, mask: jax.Array) -> tuple[jax.Array, Context]:
        x, context = self.embed(ids, mask)
        return self.norm(x), context


@checked
def t5(
    *,
    depth: int,
    width: int,
    heads: int,
    head_width: int = 64,
    ffn: int,
    vocabulary: int = 32128,
    gated: bool = True,
    activation: str = "gelu_new",
    buckets: int = 32,
    distance: int = 128,
    bias_each_layer: bool = False,
    eps: float = 1e-6,
    attend: Callable[..., Any] = reference,
    dtype: str | type | np.dtype = "float32",
) -> TextEncoder:
    """The encoder of a T5 v1.1, mT5 or umT5 as a `TextEncoder`; the XXL is (24, 4096, 64 heads, ffn 10240).

    Args:
      depth, width, heads, head_width, ffn: blocks, width, heads and their width (64; heads times it may be another than
        the width), hidden width of the feed-forward.
      vocabulary: tokens (32128; mT5 250112, umT5-XXL 256384).
      gated: has the feed-forward a gate (True; the first T5 has none).
      activation: one of `ACTIVATIONS` ("gelu_new", the tanh form).
      buckets, distance: of `position_buckets` (32, 128).
      bias_each_layer: has every block its own table of places, as in umT5 (False).
      eps: of the norms (1e-6).
      attend: as `difax.models.encoders.attention.attend`, which is the default.
      dtype: "float32" or "bfloat16", of activations and products; norms, bias and softmax are float32.

    Raises:
      ValueError: a number that is too small, an unknown activation, buckets that are no multiple of 4.
    """
    c = T5Config(
        depth, width, heads, head_width, ffn, vocabulary, gated, choose("activation", activation, ACTIVATIONS),
        buckets, distance, bias_each_layer, eps, model_dtype("t5", dtype),
    )  # fmt: skip
    whole = ("depth", "width", "heads", "head_width", "ffn", "vocabulary")
    check_least("t5", {name: getattr(c, name) for name in whole})
    if buckets < 4 or buckets % 4 or distance <= buckets // 4:
        raise ValueError(
            f"t5: buckets={buckets}, distance={distance}; allowed: a multiple of 4, and more than a fourth"
        )
    if not 0 < eps <= 1:
        raise ValueError(f"t5: eps={eps}; allowed: > 0, up to 1")
    made = functions(Ends(c), T5Block(c), depth, attend, pools=False)
    return TextEncoder(
        name=f"{'umt5' if bias_each_layer else 't5'}-{depth}x{width}",
        **made,
        depth=depth,
        width=width,
        length=LARGEST,
        vocabulary=vocabulary,
        dtype=c.dtype,
        shards=(
            ("/qkv/", Shard("columns", (1, 1, 1))),
            ("/wi/", Shard("columns", (1, 1) if gated else (1,))),
            ("blocks/(out|wo)/", Shard("rows")),
        ),
    )
