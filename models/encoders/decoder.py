"""Decoder-only language models as text encoders: Llama, Qwen 2 and 2.5-VL (text), Qwen3, Gemma-2, Mistral.

One function with settings. With norm(x) = (o + w) x / sqrt(mean x^2 + eps), a block is

  x <- x + attn(norm1(x)),   x <- x + down (act(gate norm2(x)) up norm2(x)),

causal, queries and keys turned by their places (a feature and the one half a head on are a pair), keys and values
shared among heads. Gemma-2 norms what attention and the feed-forward give as well; Qwen3 the queries and keys of each
head. The functions are those of transformers; of models that also take pictures, that of text alone, where positions of
three axes are the plain ones. Nothing generates here: no cache, no logits.

Touvron et al. (Llama), 2023, arXiv:2302.13971; Gemma Team, 2024, arXiv:2408.00118; Qwen Team, 2025, arXiv:2505.09388.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from difax.core.annotations import LARGEST, check_keys, checked, choose
from difax.core.contracts import Context, Shard, TextEncoder
from difax.core.placement import split
from difax.models.encoders.attention import attend as reference
from difax.models.encoders.attention import seen_keys
from difax.models.encoders.layers import ACTIVATIONS, RMSNorm, Tokens, as_heads, check_least, functions, gated
from difax.models.layers import Dense, model_dtype


def _plain(rates: np.ndarray) -> np.ndarray:
    return rates


def _linear(rates: np.ndarray, *, factor: float) -> np.ndarray:
    return rates / factor


def _llama3(rates: np.ndarray, *, factor: float, low: float, high: float, original: float) -> np.ndarray:
    """Llama 3.1: waves longer than original / low are slowed by the factor, those below original / high are not."""
    turns = original * rates / (2 * math.pi)  # of each wave within the length that was trained first
    part = np.clip((turns - low) / (high - low), 0, 1)
    return rates * (part + (1 - part) / factor)


# how rotary frequencies are changed for texts longer than the first ones: (frequencies, settings) -> frequencies
ROPES: dict[str, Callable[..., np.ndarray]] = {"default": _plain, "linear": _linear, "llama3": _llama3}


def rotary_rates(head_width: int, theta: float = 10_000.0, rope: Mapping[str, Any] | None = None) -> np.ndarray:
    """Radians a place of each pair of features, theta^(-2j/K), float32 [K/2].

    Args:
      head_width: K, even. theta: base of the frequencies, > 0 (10000).
      rope: {"name": one of `ROPES`, its settings}; None is "default".
    """
    settings = dict(rope or {"name": "default"})
    change = ROPES[choose("rope", settings.pop("name", "default"), ROPES)]
    check_keys("rope", change, settings, ("rates",))
    rates = theta ** (-np.arange(0, head_width, 2, dtype=np.float64) / head_width)
    return np.asarray(change(rates, **settings), np.float32)


def rotate(x_BTHK: jax.Array, cos_TK2: jax.Array, sin_TK2: jax.Array) -> jax.Array:
    """Rotates the pairs (x_j, x_j+K/2) of every head in float32: (a, b) -> (a cos - b sin, b cos + a sin)."""
    a, b = jnp.split(x_BTHK.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos_TK2[None, :, None], sin_TK2[None, :, None]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTHK.dtype)


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Geometry and numerics of a language model; the arguments of `decoder`."""

    depth: int
    width: int
    heads: int
    groups: int
    head_width: int
    ffn: int
    vocabulary: int
    activation: str
    theta: float
    rope: tuple[tuple[str, Any], ...]
    scale: float
    cap: float | None
    window: int | None
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    qk_norm: bool
    outer_norms: bool
    norm_offset: float
    embedding_scale: float
    eps: float
    dtype: Any

    @property
    def widths(self) -> tuple[int, int, int]:
        """Of queries, keys and values."""
        return self.heads * self.head_width, self.groups * self.head_width, self.groups * self.head_width


class DecoderBlock(nn.Module):
    """One block of the language model."""

    config: DecoderConfig

    def setup(self) -> None:
        c = self.config
        norm = lambda: RMSNorm(c.eps, c.norm_offset)  # noqa: E731
        self.norm1, self.norm2 = norm(), norm()
        self.qkv = Dense(sum(c.widths), use_bias=c.qkv_bias)
        self.norm_q, self.norm_k = (norm(), norm()) if c.qk_norm else (lambda x: x, lambda x: x)
        self.out = Dense(c.width, use_bias=c.out_bias)
        self.up = Dense(2 * c.ffn, use_bias=c.mlp_bias)
        self.down = Dense(c.width, use_bias=c.mlp_bias)
        self.behind1, self.behind2 = (norm(), norm()) if c.outer_norms else (lambda x: x, lambda x: x)

    def __call__(self, x_BTD: jax.Array, context: Context, attend: Any) -> jax.Array:
        c, turn = self.config, (context["cos"], context["sin"])
        q, k, v = (as_heads(part, c.head_width) for part in split(self.qkv(self.norm1(x_BTD)), c.widths))
        q, k = rotate(self.norm_q(q), *turn), rotate(self.norm_k(k), *turn)
        o = attend(q, k, v, scale=c.scale, seen=context["seen"], cap=c.cap)
        x_BTD = x_BTD + self.behind1(self.out(o.reshape(*x_BTD.shape[:2], -1)))
        gate, h = split(self.up(self.norm2(x_BTD)), 2 * (c.ffn,))
        return x_BTD + self.behind2(self.down(gated(h, gate, c.activation)))


class Ends(nn.Module):
    """The table of tokens, and the norm behind the last block."""

    config: DecoderConfig

    def setup(self) -> None:
        c = self.config
        self.tokens = Tokens(c.vocabulary, c.width)
        self.final = RMSNorm(c.eps, c.norm_offset)

    def embed(self, ids: jax.Array, mask: jax.Array) -> tuple[jax.Array, Context]:
        c = self.config
        # in float32, as the library has them: the product is rounded before its cosine is taken
        rates = rotary_rates(c.head_width, c.theta, dict(c.rope))
        angles = (np.arange(ids.shape[1], dtype=np.float32)[:, None] * rates[None]).astype(np.float64)
        turn = {"cos": np.cos(angles).astype(np.float32), "sin": np.sin(angles).astype(np.float32)}
        x = self.tokens(ids).astype(c.dtype) * jnp.asarray(c.embedding_scale, c.dtype)
        return x, {"seen": seen_keys(mask, causal=True, window=c.window)} | jax.tree.map(jnp.asarray, turn)

    def norm(self, x: jax.Array) -> jax.Array:
        return self.final(x)

    def __call__(self, ids: jax.Array, mask: jax.Array) -> tuple[jax.Array, Context]:
        x, context = self.embed(ids, mask)
        return self.norm(x), context


@checked
def decoder(
    *,
    depth: int,
    width: int,
    heads: int,
    groups: int | None = None,
    head_width: int | None = None,
    ffn: int,
    vocabulary: int,
    activation: str = "silu",
    theta: float = 10_000.0,
    rope: Mapping[str, Any] | None = None,
    scale: float | None = None,
    cap: float | None = None,
    window: int | None = None,
    length: int = LARGEST,
    qkv_bias: bool = False,
    out_bias: bool = False,
    mlp_bias: bool = False,
    qk_norm: bool = False,
    outer_norms: bool = False,
    norm_offset: float = 0.0,
    embedding_scale: float = 1.0,
    eps: float = 1e-6,
    attend: Callable[..., Any] = reference,
    dtype: str | type | np.dtype = "float32",
) -> TextEncoder:
    """A decoder-only language model as a `TextEncoder`: the states between its blocks.

    Right-padded rows see the real tokens before them and not themselves; places are counted from 0, padding or not.
    Left-padded rows see nothing, and attention adds 0 to them, as in all classes of the library but Gemma-2's, which
    adds the mean of all values; no pipeline pads Gemma's texts there.

    Args:
      depth, width, ffn, vocabulary: blocks, width, hidden width of the feed-forward, tokens.
      heads, groups, head_width: heads of the queries, of keys and values (as many; they divide the heads), features of
        one (width / heads), even.
      activation: of the gate, one of `ACTIVATIONS` ("silu").
      theta, rope: of `rotary_rates` (10000, None).
      scale: of the logits (head_width^-0.5; Gemma-2: query_pre_attn_scalar^-0.5).
      cap: logits are c tanh(logits / c); None: they are not capped (Gemma-2: 50).
      window: keys that a query sees, itself included; None: all before it.
      length: of the longest text (2^31 - 1: rotary places do not end).
      qkv_bias, out_bias, mlp_bias: have these products a bias (Qwen2: the first).
      qk_norm: are queries and keys normed, head by head (Qwen3).
      outer_norms: are the updates normed before they are added (Gemma-2).
      norm_offset: o of the norms (0; Gemma-2: 1).
      embedding_scale: of the embedded tokens (1; Gemma-2: sqrt(width)).
      eps: of the norms (1e-6).
      attend: as `difax.models.encoders.attention.attend`, which is the default.
      dtype: "float32" or "bfloat16", of activations and products; norms, rotation and softmax are float32.

    Raises:
      ValueError: a number that is too small, heads that groups do not divide, an odd head width, an unknown activation
        or rope.
    """
    groups, head_width = groups or heads, head_width or width // heads
    c = DecoderConfig(
        depth, width, heads, groups, head_width, ffn, vocabulary, choose("activation", activation, ACTIVATIONS), theta,
        tuple((rope or {}).items()), head_width**-0.5 if scale is None else scale, cap, window, qkv_bias, out_bias,
        mlp_bias, qk_norm, outer_norms, norm_offset, embedding_scale, eps, model_dtype("decoder", dtype),
    )  # fmt: skip
    whole = ("depth", "width", "heads", "groups", "head_width", "ffn", "vocabulary")
    check_least("decoder", {name: getattr(c, name) for name in whole} | {"window": window or 1, "length": length})
    if heads % groups:
        raise ValueError(f"decoder: heads={heads}; allowed: divisible by groups={groups}")
    if head_width % 2:
        raise ValueError(f"decoder: head_width={head_width}; allowed: even")
    for name, value in {"theta": theta, "scale": c.scale, "cap": 1.0 if cap is None else cap, "eps": eps}.items():
        if not value > 0:
            raise ValueError(f"decoder: {name}={value}; allowed: > 0")
    rotary_rates(head_width, theta, rope)
    return TextEncoder(
        name=f"decoder-{depth}x{width}",
        **functions(Ends(c), DecoderBlock(c), depth, attend, pools=False),
        depth=depth,
        width=width,
        length=length,
        vocabulary=vocabulary,
        dtype=c.dtype,
        shards=(
            ("/qkv/", Shard("columns", (heads, groups, groups))),
            ("/up/", Shard("columns", (1, 1))),
            ("blocks/(out|down)/", Shard("rows")),
        ),
    )
