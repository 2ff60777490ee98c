"""FLUX.2: a Transformer over text and image tokens, first in two streams, then in one, modulated alike in all blocks.

Black Forest Labs, FLUX.2 (dev, 2025; klein, 2026), https://github.com/black-forest-labs/flux2. It is laid out as FLUX.1
(`difax.models.flux`), and differs in this. With c the embedding of the time (and in dev of the guidance), the three
modulations, of the image's and the text's stream and of the single blocks, are linear in silu(c) and are the same in
all blocks, so they are made with the embeddings and a block's `mods` picks its own. MLPs are gated, W_2 (silu(a) b)
with [a, b] = W_1 m(h); a single block is

  h <- h + gate W_2 [attn(u), silu(a) b] with [u, a, b] = W_1 m(h);

no layer has a bias; text is not pooled, and text tokens stand in order. Positions have four axes (reference, row,
column, place in the text): image tokens stand at (0, row, column, 0), text tokens at (0, 0, 0, l). Padded text is not
masked: it is text, as in training. Reference images (which would stand at 10, 20, ... on the first axis) are not here.

The latents are those of its pipelines behind 2 x 2 patches: 128 channels that run over (channel, row, column).

Shape letters: B batch, L text tokens, N image tokens, T = L + N, D width, F hidden width, H heads, K head width.
"""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from difax.core.contracts import Context, Model, Params, Shard, Stage, Tokens
from difax.core.placement import cut, fuse, join, split
from difax.models.flux import check_streams, normed_heads, rotated_attention, values
from difax.models.layers import Dense, check_size, model_dtype, modulate, timestep_embedding
from difax.models.rope import rotary_table

# name -> double blocks, single blocks, width, heads, hidden width, text width, guidance embedding
VARIANTS = {
    "klein-4B": (5, 20, 3072, 24, 9216, 7680, False),
    "klein-9B": (8, 24, 4096, 32, 12288, 12288, False),
    "dev": (8, 48, 6144, 48, 18432, 15360, True),
}


@dataclasses.dataclass(frozen=True)
class Flux2Config:
    """Geometry and numerics of a FLUX.2; the arguments of `flux2` with nothing left open."""

    double_depth: int
    single_depth: int
    width: int
    heads: int
    ffn: int
    text_width: int
    guidance_embedding: bool
    size: tuple[int, int]
    channels: int
    text_tokens: int
    axes_dim: tuple[int, ...]
    theta: float
    eps: float
    freq_dim: int
    ignores_guidance: bool
    dtype: Any

    @property
    def guided(self) -> bool:
        """Does the guidance scale enter the network?"""
        return self.guidance_embedding and not self.ignores_guidance


def token_positions(text_tokens: int, rows: int, columns: int) -> np.ndarray:
    """Coordinates [L + N, 4] of text tokens, (0, 0, 0, l), and then of image tokens, (0, row, column, 0)."""
    text = np.zeros((text_tokens, 4))
    text[:, 3] = np.arange(text_tokens)
    image = np.zeros((rows * columns, 4))
    image[:, 1:3] = np.stack(np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij"), -1).reshape(-1, 2)
    return np.concatenate([text, image])


def gated(a: jax.Array, b: jax.Array) -> jax.Array:
    """silu(a) b, in float32 and returned in the dtype of a."""
    return (nn.silu(a.astype(jnp.float32)) * b.astype(jnp.float32)).astype(a.dtype)


def _apart(x: jax.Array, tokens: Tokens) -> Tokens:
    """What belongs to the joined tokens, apart again."""
    txt, img = cut(x, [tokens[s].shape[1] for s in ("txt", "img")])
    return {"txt": txt, "img": img}


class Stream(nn.Module):
    """The weights of one stream, text or image, of a double block."""

    config: Flux2Config

    def setup(self) -> None:
        c, ones = self.config, nn.initializers.ones
        self.qkv = Dense(3 * c.width, use_bias=False)
        self.q_norm = self.param("q_norm", ones, (c.width // c.heads,))
        self.k_norm = self.param("k_norm", ones, (c.width // c.heads,))
        self.out = Dense(c.width, use_bias=False)
        self.fc1 = Dense(2 * c.ffn, use_bias=False)
        self.fc2 = Dense(c.width, use_bias=False)

    def heads(self, h_BND: jax.Array, six: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        c = self.config
        qkv = split(self.qkv(modulate(h_BND, six[0], six[1], c.eps)), 3 * (c.width,))
        return normed_heads(qkv, c.heads, self.q_norm, self.k_norm, c.eps)

    def project(self, o_BND: jax.Array) -> jax.Array:
        return self.out(o_BND)

    def mlp(self, h_BND: jax.Array, six: tuple[jax.Array, ...]) -> jax.Array:
        c = self.config
        return self.fc2(gated(*split(self.fc1(modulate(h_BND, six[3], six[4], c.eps)), (c.ffn, c.ffn))))


class DoubleBlock(nn.Module):
    """Text and image with weights of their own and one attention over both."""

    config: Flux2Config

    def setup(self) -> None:
        self.txt = Stream(self.config)
        self.img = Stream(self.config)

    def mods(self, context: Context) -> dict[str, tuple[jax.Array, ...]]:
        return {"txt": context["txt"], "img": context["img"]}

    def attn(self, tokens: Tokens, mods: Any, context: Context, attend: Any) -> Tokens:
        img = self.img.heads(tokens["img"], mods["img"])
        txt = self.txt.heads(tokens["txt"], mods["txt"])
        q, k, v = (join(*pair) for pair in zip(txt, img, strict=True))
        o = _apart(rotated_attention(q, k, v, context, attend), tokens)
        return {"txt": self.txt.project(o["txt"]), "img": self.img.project(o["img"])}

    def mlp(self, tokens: Tokens, mods: Any, context: Context, attend: Any) -> Tokens:
        return {"txt": self.txt.mlp(tokens["txt"], mods["txt"]), "img": self.img.mlp(tokens["img"], mods["img"])}

    def gate(self, mods: Any, branch: str) -> dict[str, jax.Array]:
        place = {"attn": 2, "mlp": 5}[branch]
        return {stream: six[place][:, None] for stream, six in mods.items()}

    def __call__(self, tokens: Tokens, context: Context, attend: Any) -> None:
        """Touches every parameter once; used by `init` only."""
        mods = self.mods(context)
        self.attn(tokens, mods, context, attend)
        self.mlp(tokens, mods, context, attend)


class SingleBlock(nn.Module):
    """Text and image with the same weights, attention and MLP side by side between two products."""

    config: Flux2Config

    def setup(self) -> None:
        c, ones = self.config, nn.initializers.ones
        self.linear1 = Dense(3 * c.width + 2 * c.ffn, use_bias=False)
        self.q_norm = self.param("q_norm", ones, (c.width // c.heads,))
        self.k_norm = self.param("k_norm", ones, (c.width // c.heads,))
        self.linear2 = Dense(c.width, use_bias=False)

    def mods(self, context: Context) -> tuple[jax.Array, ...]:
        return context["single"]

    def attn_mlp(self, tokens: Tokens, mods: Any, context: Context, attend: Any) -> Tokens:
        c = self.config
        h_BTD = join(tokens["txt"], tokens["img"])
        wide = self.linear1(modulate(h_BTD, mods[0], mods[1], c.eps))
        *qkv, a, b = split(wide, (c.width, c.width, c.width, c.ffn, c.ffn))
        q, k, v = normed_heads(qkv, c.heads, self.q_norm, self.k_norm, c.eps)
        o = rotated_attention(q, k, v, context, attend)
        return _apart(self.linear2(fuse(o, gated(a, b))), tokens)

    def gate(self, mods: Any, branch: str) -> dict[str, jax.Array]:
        return dict.fromkeys(("txt", "img"), mods[2][:, None])

    def __call__(self, tokens: Tokens, context: Context, attend: Any) -> None:
        """Touches every parameter once; used by `init` only."""
        self.attn_mlp(tokens, self.mods(context), context, attend)


class Ends(nn.Module):
    """What stands before and after the blocks: embeddings of latents, text, time and guidance, the modulations that all
    blocks share, and the final layer."""

    config: Flux2Config

    def setup(self) -> None:
        c = self.config
        wide = partial(Dense, c.width, use_bias=False)  # of the time too: there is no bias that gates could stand on
        zero = partial(Dense, kernel_init=nn.initializers.zeros, use_bias=False)
        self.img, self.txt = wide(), wide()
        self.time1, self.time2 = wide(), wide()
        if c.guidance_embedding:
            self.guidance1, self.guidance2 = wide(), wide()
        self.mod_img, self.mod_txt, self.mod_single = zero(6 * c.width), zero(6 * c.width), zero(3 * c.width)
        self.ada = zero(2 * c.width)
        self.out = zero(c.channels)

    def _guidance(self, guidance_B: jax.Array) -> jax.Array:
        features = timestep_embedding(1000.0 * guidance_B.astype(jnp.float32), self.config.freq_dim)
        return self.guidance2(nn.silu(self.guidance1(features.astype(self.config.dtype))))

    def once(self, cond: dict[str, Any]) -> dict[str, Any]:
        """The condition as the text's tokens [B, L, D], and the vector [B, D] of the guidance where there is one."""
        known = {"projected": self.txt(cond["text"].astype(self.config.dtype))}
        return known | ({"vector": self._guidance(cond["guidance"])} if self.config.guided else {})

    def embed(self, x: jax.Array, model_time: jax.Array, cond: dict[str, Any]) -> tuple[Tokens, Context]:
        c = self.config
        cond = cond if "projected" in cond else self.once(cond)
        vector = self.time2(nn.silu(self.time1(timestep_embedding(model_time, c.freq_dim).astype(c.dtype))))
        silu_c = nn.silu(vector + cond["vector"] if c.guided else vector)
        tokens = {"txt": cond["projected"], "img": self.img(x.reshape(len(x), -1, c.channels).astype(c.dtype))}
        text = tokens["txt"].shape[1]
        tables = (jnp.asarray(a) for a in rotary_table(token_positions(text, *c.size), c.axes_dim, c.theta))
        cos, sin = (join(a[:text], a[text:], axis=0) for a in tables)  # in the order of the joined tokens
        parts = {"img": (self.mod_img, 6), "txt": (self.mod_txt, 6), "single": (self.mod_single, 3)}
        mods = {
            name: tuple(jnp.split(layer(silu_c).astype(jnp.float32), count, axis=-1))
            for name, (layer, count) in parts.items()
        }
        return tokens, {"silu_c": silu_c, "cos": cos, "sin": sin, **mods}

    def head(self, tokens: Tokens, context: Context) -> jax.Array:
        c = self.config
        shift, scale = jnp.split(self.ada(context["silu_c"]).astype(jnp.float32), 2, axis=-1)
        img = self.out(modulate(tokens["img"], shift, scale, c.eps))
        return img.reshape(len(img), *c.size, c.channels)

    def __call__(self, x: jax.Array, model_time: jax.Array, cond: dict[str, jax.Array]) -> tuple[Tokens, Context]:
        tokens, context = self.embed(x, model_time, cond)
        self.head(tokens, context)
        if self.config.guidance_embedding:
            self._guidance(jnp.zeros((1,)))  # also where it is ignored
        return tokens, context


def flux2(
    variant: str | None = None,
    *,
    double_depth: int | None = None,
    single_depth: int | None = None,
    width: int | None = None,
    heads: int | None = None,
    ffn: int | None = None,
    text_width: int | None = None,
    guidance_embedding: bool | None = None,
    size: int | tuple[int, int] = 64,
    channels: int = 128,
    text_tokens: int = 512,
    axes_dim: tuple[int, ...] = (32, 32, 32, 32),
    theta: float = 2000.0,
    eps: float = 1e-6,
    freq_dim: int = 256,
    ignores_guidance: bool = False,
    dtype: str | type | np.dtype = "float32",
) -> Model:
    """FLUX.2 as a `Model`: latents [B, h, w, 128] -> velocity eps - x0, for the process `flow` (model time 1000 t).

    The condition is {"text": [B, L, text_width] (three states of a language model side by side, padding included),
    "guidance": [B] (only where it enters: the distilled scale itself, which the network multiplies by 1000),
    "null_text": that of the unconditional half, for guidance by two evaluations}. Text of another length than
    `text_tokens` is taken too.

    Args:
      variant: "klein-4B", "klein-9B" or "dev", which stand for the next seven; or None and give them yourself.
      double_depth, single_depth: blocks of each kind, 1 or more.
      width, heads: of the model.
      ffn: hidden width of the MLPs (three times the width in all of them).
      text_width: of the states of the text encoder together (klein: Qwen3, 3 x 2560 and 3 x 4096; dev: Mistral Small,
        3 x 5120).
      guidance_embedding: have the weights an embedding of the guidance scale (only in dev).
      size: height and width of the latents behind 2 x 2 patches (64: images of 1024 x 1024 pixels).
      channels: of these latents (128).
      text_tokens: length of the text (512).
      axes_dim: widths of the rotary sections (reference, row, column, place in the text), even, adding up to width /
        heads ((32, 32, 32, 32)).
      theta: base of the rotary frequencies (2000).
      eps: of every norm (1e-6).
      freq_dim: features of the time's sinusoid, even (256).
      ignores_guidance: is an embedding of the guidance left unused (False), as klein's pipeline does whatever the
        weights have.
      dtype: "float32" or "bfloat16", of activations and dots; norms, rotation, softmax and modulation are float32.

    Raises:
      ValueError: unknown variant, a missing part of the geometry, or one that does not fit.

    References: Black Forest Labs 2025, https://github.com/black-forest-labs/flux2. In bfloat16 queries and keys are
      rounded once, after norm and rotation (twice in the original).
    """
    if variant is not None and variant not in VARIANTS:
        raise ValueError(f"unknown FLUX.2 variant {variant!r}; allowed: {', '.join(VARIANTS)}")
    given: dict[str, Any] = {
        "double_depth": double_depth,
        "single_depth": single_depth,
        "width": width,
        "heads": heads,
        "ffn": ffn,
        "text_width": text_width,
        "guidance_embedding": guidance_embedding,
    }
    preset = dict(zip(given, VARIANTS[variant], strict=True)) if variant is not None else {}
    geometry: dict[str, Any] = {name: preset.get(name) if value is None else value for name, value in given.items()}
    missing = [name for name, value in geometry.items() if value is None]
    if missing:
        raise ValueError(f"flux2: {', '.join(missing)} missing; give it, or a variant: {', '.join(VARIANTS)}")
    c = Flux2Config(
        **geometry,
        size=(size, size) if isinstance(size, int) else (int(size[0]), int(size[1])),
        channels=channels,
        text_tokens=text_tokens,
        axes_dim=tuple(int(d) for d in axes_dim),
        theta=float(theta),
        eps=eps,
        freq_dim=freq_dim,
        ignores_guidance=ignores_guidance,
        dtype=model_dtype("flux2", dtype),
    )
    _check(c)
    double, single, ends = DoubleBlock(c), SingleBlock(c), Ends(c)
    text = jax.ShapeDtypeStruct((c.text_tokens, c.text_width), jnp.float32)
    spec = {"text": text, "null_text": text}
    if c.guided:
        spec["guidance"] = jax.ShapeDtypeStruct((), jnp.float32)

    def init(key: jax.Array) -> Params:
        ends_key, double_key, single_key = jax.random.split(key, 3)
        x = jnp.zeros((1, *c.size, c.channels))
        cond = jax.tree.map(lambda s: jnp.zeros((1, *s.shape)), spec)
        (tokens, context), ends_params = ends.init_with_output(ends_key, x, jnp.zeros((1,)), cond)

        def stack(block: Any, key: jax.Array, depth: int) -> Params:
            one = partial(block.init, tokens=tokens, context=context, attend=values)
            return jax.vmap(lambda k: one(k)["params"])(jax.random.split(key, depth))

        return {
            "ends": ends_params["params"],
            "double": stack(double, double_key, c.double_depth),
            "single": stack(single, single_key, c.single_depth),
        }

    def embed(params: Params, x: jax.Array, model_time: jax.Array, cond: dict[str, jax.Array]) -> Any:
        return ends.apply({"params": params["ends"]}, x, model_time, cond, method="embed")

    def once(params: Params, cond: Any) -> Any:
        return ends.apply({"params": params["ends"]}, cond, method="once")

    def head(params: Params, tokens: Tokens, context: Context) -> Any:
        return ends.apply({"params": params["ends"]}, tokens, context, method="head")

    unit = math.gcd(c.width, c.ffn)
    d, f = c.width // unit, c.ffn // unit
    return Model(
        name=f"flux2-{variant or f'{c.double_depth}+{c.single_depth}x{c.width}'}",
        init=init,
        embed=embed,
        stages=(
            Stage("double", c.double_depth, double, ("attn", "mlp")),
            Stage("single", c.single_depth, single, ("attn_mlp",)),
        ),
        head=head,
        null=lambda cond: {**cond, "text": cond["null_text"]},
        input_shape=(*c.size, c.channels),
        learn_sigma=False,
        classes=0,
        dtype=c.dtype,
        cond=spec,
        once=once,
        hidden=lambda tokens: tokens["img"],
        shards=(
            ("/qkv/", Shard("columns", (1, 1, 1))),
            ("single/linear1/", Shard("columns", (d, d, d, f, f))),
            ("single/linear2/", Shard("rows", (d, f))),
            ("double/.*/fc1/", Shard("columns", (1, 1))),
            ("ends/mod_", Shard("columns")),
            ("double/.*/(out|fc2)/", Shard("rows")),
        ),
    )


def _check(c: Flux2Config) -> None:
    counts = ("double_depth", "single_depth", "width", "heads", "ffn", "text_width", "channels", "text_tokens")
    check_streams("flux2", c, counts, 4)
    if not 0 < c.theta <= 1e12:
        raise ValueError(f"flux2: theta={c.theta}; allowed: > 0, up to 1e12")
    if not 0 < c.eps <= 1:
        raise ValueError(f"flux2: eps={c.eps}; allowed: > 0, up to 1")
    if c.freq_dim < 2 or c.freq_dim % 2:
        raise ValueError(f"flux2: freq_dim={c.freq_dim}; allowed: even, 2 or more")
    if min(c.size) < 1:
        raise ValueError(f"flux2: size={c.size[0]}x{c.size[1]}; allowed: 1 or more")
    check_size("flux2", c.size, c.channels, math.prod(c.size) + c.text_tokens, c.width // c.heads)
