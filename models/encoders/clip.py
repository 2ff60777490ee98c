"""CLIP: the text encoder (L, H, G) and the vision encoder, which share a block.

Radford et al., 2021, arXiv:2103.00020; Cherti et al. (OpenCLIP), 2022, arXiv:2212.07143. A block is

  x <- x + attn(norm(x)),   x <- x + fc2 act(fc1 norm(x)),

with LayerNorms, biases everywhere, and for text a causal mask. The pooled state of a text is the normed one at its end
token, that of a picture the normed one of the class token. The functions are those of transformers'
CLIPTextModelWithProjection and CLIPVisionModelWithProjection.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from difax.core.annotations import checked, choose
from difax.core.contracts import Context, Params, Shard, TextEncoder
from difax.core.placement import split
from difax.models.encoders.attention import attend as reference
from difax.models.encoders.attention import seen_keys
from difax.models.encoders.layers import ACTIVATIONS, Tokens, activate, as_heads, check_least, functions
from difax.models.layers import Dense, affine_norm, model_dtype, patchify

OLD_END = 2  # the end token that configurations name whose files mean the largest id of a text


class ImageEncoder(NamedTuple):
    """A picture's encoder as data, with the functions of a `TextEncoder` but for what goes in.

    embed(ends, pixels [B, H, W, C], normalised as the encoder wants them) -> (x [B, 1 + N, D], context), the class
    token first; pool(ends, x) -> {"pooled": [B, D], "projected": [B, P]}. norm leaves the last state as it is.
    """

    name: str
    init: Callable[[jax.Array], Params]
    embed: Callable[..., tuple[jax.Array, Context]]
    block: Callable[[Params, jax.Array, Context], jax.Array]
    norm: Callable[[Params, jax.Array], jax.Array]
    depth: int
    width: int
    size: int  # pixels of a side
    channels: int
    tokens: int  # 1 + N
    pool: Callable[..., dict[str, jax.Array]]
    dtype: Any = "float32"
    shards: tuple[tuple[str, Shard], ...] = ()
    normed: bool = True


SHARDS = (
    ("/qkv/", Shard("columns", (1, 1, 1))),
    ("/fc1/", Shard("columns")),
    ("blocks/(out|fc2)/", Shard("rows")),
)


@dataclasses.dataclass(frozen=True)
class ClipConfig:
    """Geometry and numerics of a CLIP encoder, of text or (with size, patch and channels) of pictures."""

    depth: int
    width: int
    heads: int
    ffn: int
    activation: str
    projection: int | None
    eps: float
    dtype: Any
    vocabulary: int = 0
    length: int = 0
    end: int = OLD_END
    size: int = 0
    patch: int = 0
    channels: int = 0


class ClipBlock(nn.Module):
    """One block, of either encoder."""

    config: ClipConfig

    def setup(self) -> None:
        c = self.config
        self.norm1, self.norm2 = affine_norm(c.eps), affine_norm(c.eps)
        self.qkv = Dense(3 * c.width)
        self.out = Dense(c.width)
        self.fc1, self.fc2 = Dense(c.ffn), Dense(c.width)

    def __call__(self, x_BTD: jax.Array, context: Context, attend: Any) -> jax.Array:
        c = self.config
        parts = split(self.qkv(self.norm1(x_BTD).astype(x_BTD.dtype)), 3 * (c.width,))
        q, k, v = (as_heads(part, c.width // c.heads) for part in parts)
        o = attend(q, k, v, scale=(c.width // c.heads) ** -0.5, seen=context["seen"])
        x_BTD = x_BTD + self.out(o.reshape(x_BTD.shape))
        h = self.fc1(self.norm2(x_BTD).astype(x_BTD.dtype))
        return x_BTD + self.fc2(activate(h, c.activation))


class TextEnds(nn.Module):
    """Tokens and places before the blocks; the norm, the pooled state and its projection behind them."""

    config: ClipConfig

    def setup(self) -> None:
        c = self.config
        self.tokens = Tokens(c.vocabulary, c.width)
        self.places = self.param("places", nn.initializers.normal(0.01), (c.length, c.width))
        self.final = affine_norm(c.eps)
        self.projection = None if c.projection is None else Dense(c.projection, use_bias=False)

    def embed(self, ids: jax.Array, mask: jax.Array) -> tuple[jax.Array, Context]:
        x = self.tokens(ids) + self.places[: ids.shape[1]][None]
        return x.astype(self.config.dtype), {"seen": seen_keys(mask, causal=True)}

    def norm(self, x: jax.Array) -> jax.Array:
        return self.final(x).astype(x.dtype)

    def pool(self, x: jax.Array, ids: jax.Array) -> dict[str, jax.Array]:
        old = self.config.end == OLD_END
        pooled = x[jnp.arange(len(ids)), jnp.argmax(ids if old else ids == self.config.end, axis=1)]
        return {"pooled": pooled} | ({} if self.projection is None else {"projected": self.projection(pooled)})

    def __call__(self, ids: jax.Array, mask: jax.Array) -> tuple[jax.Array, Context]:
        x, context = self.embed(ids, mask)
        self.pool(self.norm(x), ids)
        return x, context


class ImageEnds(nn.Module):
    """Patches, the class token and places before the blocks; the pooled state and its projection behind them."""

    config: ClipConfig

    def setup(self) -> None:
        c = self.config
        self.patch = Dense(c.width, use_bias=False)
        self.whole = self.param("whole", nn.initializers.normal(0.02), (c.width,))
        self.places = self.param("places", nn.initializers.normal(0.02), (1 + (c.size // c.patch) ** 2, c.width))
        self.before, self.final = affine_norm(c.eps), affine_norm(c.eps)
        self.projection = None if c.projection is None else Dense(c.projection, use_bias=False)

    def embed(self, pixels: jax.Array) -> tuple[jax.Array, Context]:
        c, b = self.config, len(pixels)
        side = c.size - c.size % c.patch
        patches = self.patch(patchify(pixels[:, :side, :side].astype(c.dtype), c.patch))
        whole = jnp.broadcast_to(self.whole.astype(c.dtype)[None, None], (b, 1, c.width))
        x = jnp.concatenate([whole, patches], axis=1) + self.places.astype(c.dtype)[None]
        return self.before(x).astype(c.dtype), {"seen": jnp.ones((b, 1, 1, x.shape[1]), bool)}

    def norm(self, x: jax.Array) -> jax.Array:
        return x

    def pool(self, x: jax.Array) -> dict[str, jax.Array]:
        pooled = self.final(x[:, 0]).astype(x.dtype)
        return {"pooled": pooled} | ({} if self.projection is None else {"projected": self.projection(pooled)})

    def __call__(self, pixels: jax.Array) -> tuple[jax.Array, Context]:
        x, context = self.embed(pixels)
        self.pool(x)
        return x, context


@checked
def clip_text(
    *,
    depth: int,
    width: int,
    heads: int,
    ffn: int,
    vocabulary: int = 49408,
    length: int = 77,
    activation: str = "quick_gelu",
    projection: int | None = None,
    end: int = OLD_END,
    eps: float = 1e-5,
    attend: Callable[..., Any] = reference,
    dtype: str | type | np.dtype = "float32",
) -> TextEncoder:
    """The text encoder of a CLIP as a `TextEncoder`; L is (12, 768, 12, 3072), G (32, 1280, 20, 5120).

    The library gives CLIP no mask of padding, so its pipelines give ones; a mask that has zeros is obeyed.

    Args:
      depth, width, heads, ffn: blocks, width, heads, hidden width of the feed-forward.
      vocabulary, length: tokens (49408), places (77).
      activation: one of `ACTIVATIONS` ("quick_gelu" in OpenAI's L; OpenCLIP's have "gelu").
      projection: width of the projected state, None without one.
      end: id of the end token, of which a text's first counts; 2 stands for the largest id in the text.
      eps: of the norms (1e-5).
      attend: as `difax.models.encoders.attention.attend`, which is the default.
      dtype: "float32" or "bfloat16", of activations and products; norms and softmax are float32.

    Raises:
      ValueError: a number that is too small, a width that heads do not divide, an unknown activation.
    """
    check_least("clip_text", {"vocabulary": vocabulary, "length": length})
    c = _config("clip_text", depth, width, heads, ffn, activation, projection, eps, dtype)
    c = dataclasses.replace(c, vocabulary=vocabulary, length=length, end=end)
    return TextEncoder(
        name=f"clip-{depth}x{width}",
        **functions(TextEnds(c), ClipBlock(c), depth, attend),
        depth=depth,
        width=width,
        length=length,
        vocabulary=vocabulary,
        dtype=c.dtype,
        shards=SHARDS,
        normed=False,
    )


@checked
def clip_vision(
    *,
    depth: int,
    width: int,
    heads: int,
    ffn: int,
    size: int = 224,
    patch: int = 14,
    channels: int = 3,
    activation: str = "quick_gelu",
    projection: int | None = None,
    eps: float = 1e-5,
    attend: Callable[..., Any] = reference,
    dtype: str | type | np.dtype = "float32",
) -> ImageEncoder:
    """The vision encoder of a CLIP as an `ImageEncoder`; H is (32, 1280, 16, 5120), patches of 14.

    Args:
      size, patch, channels: pixels of a picture's side and of a patch's, which need not divide it (what is over at the
        right and the bottom is left out); channels (224, 14, 3).
      depth, width, heads, ffn, activation, projection, eps, attend, dtype: as of `clip_text`.

    Raises:
      ValueError: as `clip_text`; a patch that is larger than the picture.
    """
    check_least("clip_vision", {"patch": patch, "channels": channels})
    if size < patch:
        raise ValueError(f"clip_vision: size={size}; allowed: patch={patch} or more")
    c = _config("clip_vision", depth, width, heads, ffn, activation, projection, eps, dtype)
    c = dataclasses.replace(c, size=size, patch=patch, channels=channels)
    inputs = (((1, size, size, channels), "float32"),)
    return ImageEncoder(
        name=f"clip-vision-{depth}x{width}",
        **functions(ImageEnds(c), ClipBlock(c), depth, attend, inputs),
        depth=depth,
        width=width,
        size=size,
        channels=channels,
        tokens=1 + (size // patch) ** 2,
        dtype=c.dtype,
        shards=SHARDS,
    )


def _config(
    what: str,
    depth: int,
    width: int,
    heads: int,
    ffn: int,
    activation: str,
    projection: int | None,
    eps: float,
    dtype: Any,
) -> ClipConfig:
    """What both encoders check."""
    check_least(what, {"depth": depth, "width": width, "heads": heads, "ffn": ffn, "projection": projection or 1})
    if width % heads:
        raise ValueError(f"{what}: width={width}; allowed: divisible by heads={heads}")
    if not 0 < eps <= 1:
        raise ValueError(f"{what}: eps={eps}; allowed: > 0, up to 1")
    activation = choose("activation", activation, ACTIVATIONS)
    return ClipConfig(depth, width, heads, ffn, activation, projection, eps, model_dtype(what, dtype))
