"""FLUX.1: a Transformer over text and image tokens, first in two streams, then in one.

Black Forest Labs, FLUX.1 (dev and schnell), 2024, https://github.com/black-forest-labs/flux. The two streams are those
of MM-DiT (Esser et al. (SD3), 2024, arXiv:2403.03206), the parallel block that of ViT-22B (Dehghani et al., 2023,
arXiv:2302.05442). With c the sum of the time, guidance and pooled text embeddings, (shift, scale, gate) linear in
silu(c), m(h) = norm(h) (1 + scale) + shift, and one attention over the tokens of text and image together, a block is

  double: h <- h + gate_1 W_o attn(m_1(h)), h <- h + gate_2 mlp(m_2(h)), each stream with weights of its own;
  single: h <- h + gate W_2 [attn(u), gelu(v)] with [u, v] = W_1 m(h), text and image with the same weights.

Queries and keys are RMS-normed per head and rotated by position; all text tokens stand at position 0.

Tokens are {"txt", "img"} in both stages, so that what all blocks together add is defined token by token (for caches of
the whole stack). The price, joining and cutting the streams in every single block, is small against its products.

Queries, keys and values are one product, and so is W_1 of a single block, as in the original checkpoint: few and large
products, and file layouts that store them apart (diffusers) need only be joined.

Shape letters: B batch, L text tokens, N image tokens, T = L + N, D width, H heads, K head width.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from difax.core.contracts import Context, Model, Params, Segments, Shard, Stage, Tokens
from difax.core.placement import cut, fuse, join, split
from difax.models.layers import Dense, check_size, gelu, model_dtype, modulate, timestep_embedding
from difax.models.rope import apply_rotary, rotary_table

# name -> guidance embedding, text tokens
VARIANTS = {"dev": (True, 512), "schnell": (False, 256)}
FREQUENCIES = 256
PATCH = 2
EPS = 1e-6


@dataclasses.dataclass(frozen=True)
class FluxConfig:
    """Geometry and numerics of a FLUX.1; see `flux` for the fields."""

    double_depth: int
    single_depth: int
    width: int
    heads: int
    size: tuple[int, int]
    channels: int
    text_tokens: int
    text_width: int
    pooled_width: int
    axes_dim: tuple[int, ...]
    theta: float
    guidance_embedding: bool
    mlp_ratio: int
    dtype: Any

    @property
    def grid(self) -> tuple[int, int]:
        return self.size[0] // PATCH, self.size[1] // PATCH


class Streams(Protocol):
    """What a block in two streams asks of a model's geometry."""

    @property
    def width(self) -> int: ...

    @property
    def heads(self) -> int: ...

    @property
    def mlp_ratio(self) -> int: ...


def rms_norm(x: jax.Array, scale_K: jax.Array, eps: float = EPS) -> jax.Array:
    """x / sqrt(mean(x^2) + eps) * scale over the last axis, computed and returned in float32."""
    x = x.astype(jnp.float32)
    scale = scale_K.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))
    return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + eps) * scale


def pack(x_BHWC: jax.Array) -> jax.Array:
    """[B, H, W, C] -> [B, (H/2)(W/2), 4 C]; a token's features run over channel, row, column."""
    b, h, w, c = x_BHWC.shape
    x = x_BHWC.reshape(b, h // PATCH, PATCH, w // PATCH, PATCH, c).transpose(0, 1, 3, 5, 2, 4)
    return x.reshape(b, (h // PATCH) * (w // PATCH), c * PATCH * PATCH)


def unpack(x_BNP: jax.Array, rows: int, columns: int) -> jax.Array:
    """The inverse of `pack`: [B, rows * columns, 4 C] -> [B, 2 rows, 2 columns, C]."""
    b, _, features = x_BNP.shape
    c = features // (PATCH * PATCH)
    x = x_BNP.reshape(b, rows, columns, c, PATCH, PATCH).transpose(0, 1, 4, 2, 5, 3)
    return x.reshape(b, rows * PATCH, columns * PATCH, c)


def token_positions(text_tokens: int, rows: int, columns: int) -> np.ndarray:
    """Coordinates [L + N, 3] of text tokens, (0, 0, 0), and then of image tokens, (0, row, column)."""
    row, column = np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij")
    image = np.stack([np.zeros(rows * columns), row.ravel(), column.ravel()], axis=1)
    return np.concatenate([np.zeros((text_tokens, 3)), image])


def normed_heads(
    qkv: Sequence[jax.Array], heads: int, q_scale: jax.Array, k_scale: jax.Array, eps: float = EPS
) -> tuple[jax.Array, ...]:
    """Queries, keys (both normed, float32) and values [B, T, H, K] of three arrays [B, T, D]."""
    q, k, v = (a.reshape(*a.shape[:2], heads, -1) for a in qkv)
    return rms_norm(q, q_scale, eps), rms_norm(k, k_scale, eps), v


def rotated_attention(
    q_BTHK: jax.Array, k_BTHK: jax.Array, v_BTHK: jax.Array, context: Context, attend: Any
) -> jax.Array:
    """Attention of the rotated queries and keys, heads joined: [B, T, D]; keys that the context's mask has are left
    out."""
    q, k = (apply_rotary(a, context["cos"], context["sin"]).astype(v_BTHK.dtype) for a in (q_BTHK, k_BTHK))
    there = context.get("mask")
    o = attend(q, k, v_BTHK, None if there is None else Segments(q=jnp.ones(q.shape[:2], jnp.int32), k=there))
    return o.reshape(*o.shape[:2], -1)


def values(q: jax.Array, k: jax.Array, v: jax.Array, segments: Segments | None = None) -> jax.Array:
    """Stands in for attention, which has no parameters, where they are made."""
    return v


class Stream(nn.Module):
    """The weights of one stream, text or image, of a double block."""

    config: Streams

    def setup(self) -> None:
        c = self.config
        ones = nn.initializers.ones
        self.ada = Dense(6 * c.width, kernel_init=nn.initializers.zeros)
        self.qkv = Dense(3 * c.width)
        self.q_norm = self.param("q_norm", ones, (c.width // c.heads,))
        self.k_norm = self.param("k_norm", ones, (c.width // c.heads,))
        self.out = Dense(c.width)
        self.fc1 = Dense(c.mlp_ratio * c.width)
        self.fc2 = Dense(c.width)

    def mods(self, silu_c_BD: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(jnp.split(self.ada(silu_c_BD).astype(jnp.float32), 6, axis=-1))

    def heads(self, h_BND: jax.Array, six: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        qkv = split(self.qkv(modulate(h_BND, six[0], six[1])), 3 * (self.config.width,))
        return normed_heads(qkv, self.config.heads, self.q_norm, self.k_norm)

    def project(self, o_BND: jax.Array) -> jax.Array:
        return self.out(o_BND)

    def mlp(self, h_BND: jax.Array, six: tuple[jax.Array, ...]) -> jax.Array:
        return self.fc2(gelu(self.fc1(modulate(h_BND, six[3], six[4]))))


class DoubleBlock(nn.Module):
    """Text and image with weights of their own and one attention over both."""

    config: Streams

    def setup(self) -> None:
        self.txt = Stream(self.config)
        self.img = Stream(self.config)

    def mods(self, context: Context) -> dict[str, tuple[jax.Array, ...]]:
        return {"txt": self.txt.mods(context["silu_c"]), "img": self.img.mods(context["silu_c"])}

    def attn(self, tokens: Tokens, mods: Any, context: Context, attend: Any) -> Tokens:
        img = self.img.heads(tokens["img"], mods["img"])
        txt = self.txt.heads(tokens["txt"], mods["txt"])
        q, k, v = (join(*pair) for pair in zip(txt, img, strict=True))
        o_txt, o_img = cut(rotated_attention(q, k, v, context, attend), [tokens[s].shape[1] for s in ("txt", "img")])
        return {"txt": self.txt.project(o_txt), "img": self.img.project(o_img)}

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

    config: FluxConfig

    def setup(self) -> None:
        c = self.config
        ones = nn.initializers.ones
        self.ada = Dense(3 * c.width, kernel_init=nn.initializers.zeros)
        self.linear1 = Dense((3 + c.mlp_ratio) * c.width)
        self.q_norm = self.param("q_norm", ones, (c.width // c.heads,))
        self.k_norm = self.param("k_norm", ones, (c.width // c.heads,))
        self.linear2 = Dense(c.width)

    def mods(self, context: Context) -> tuple[jax.Array, ...]:
        return tuple(jnp.split(self.ada(context["silu_c"]).astype(jnp.float32), 3, axis=-1))

    def attn_mlp(self, tokens: Tokens, mods: Any, context: Context, attend: Any) -> Tokens:
        c = self.config
        h_BTD = join(tokens["txt"], tokens["img"])
        wide = self.linear1(modulate(h_BTD, mods[0], mods[1]))
        *qkv, hidden = split(wide, (c.width, c.width, c.width, c.mlp_ratio * c.width))
        q, k, v = normed_heads(qkv, c.heads, self.q_norm, self.k_norm)
        o = rotated_attention(q, k, v, context, attend)
        txt, img = cut(self.linear2(fuse(o, gelu(hidden))), [tokens[s].shape[1] for s in ("txt", "img")])
        return {"txt": txt, "img": img}

    def gate(self, mods: Any, branch: str) -> dict[str, jax.Array]:
        return dict.fromkeys(("txt", "img"), mods[2][:, None])

    def __call__(self, tokens: Tokens, context: Context, attend: Any) -> None:
        """Touches every parameter once; used by `init` only."""
        self.attn_mlp(tokens, self.mods(context), context, attend)


class Ends(nn.Module):
    """What stands before and after the blocks: embeddings of latents, text, time and guidance, and the final layer."""

    config: FluxConfig

    def setup(self) -> None:
        c = self.config
        narrow = partial(Dense, c.width, kernel_init=nn.initializers.normal(0.02))
        self.img = Dense(c.width)
        self.txt = Dense(c.width)
        self.time1, self.time2 = narrow(), narrow()
        self.pooled1, self.pooled2 = narrow(), narrow()
        if c.guidance_embedding:
            self.guidance1, self.guidance2 = narrow(), narrow()
        self.ada = Dense(2 * c.width, kernel_init=nn.initializers.zeros)
        self.out = Dense(PATCH * PATCH * c.channels, kernel_init=nn.initializers.zeros)

    def once(self, cond: dict[str, Any]) -> dict[str, Any]:
        """The condition as the text's tokens [B, L, D] and the vectors [B, D] of guidance and pooled text."""
        dtype, vectors = self.config.dtype, []
        if self.config.guidance_embedding:
            guidance = timestep_embedding(1000.0 * cond["guidance"].astype(jnp.float32), FREQUENCIES).astype(dtype)
            vectors.append(self.guidance2(nn.silu(self.guidance1(guidance))))
        vectors.append(self.pooled2(nn.silu(self.pooled1(cond["pooled"].astype(dtype)))))
        return {"projected": self.txt(cond["text"].astype(dtype)), "vectors": vectors}

    def embed(self, x: jax.Array, model_time: jax.Array, cond: dict[str, Any]) -> tuple[Tokens, Context]:
        config, dtype = self.config, self.config.dtype
        cond = cond if "projected" in cond else self.once(cond)
        c = self.time2(nn.silu(self.time1(timestep_embedding(model_time, FREQUENCIES).astype(dtype))))
        for vector in cond["vectors"]:
            c = c + vector
        tokens = {"txt": cond["projected"], "img": self.img(pack(x).astype(dtype))}
        positions = token_positions(tokens["txt"].shape[1], *config.grid)
        text = tokens["txt"].shape[1]
        tables = (jnp.asarray(a) for a in rotary_table(positions, config.axes_dim, config.theta))
        cos, sin = (join(a[:text], a[text:], axis=0) for a in tables)  # in the order of the joined tokens
        return tokens, {"silu_c": nn.silu(c), "cos": cos, "sin": sin}

    def head(self, tokens: Tokens, context: Context) -> jax.Array:
        shift, scale = jnp.split(self.ada(context["silu_c"]).astype(jnp.float32), 2, axis=-1)
        return unpack(self.out(modulate(tokens["img"], shift, scale)), *self.config.grid)

    def __call__(self, x: jax.Array, model_time: jax.Array, cond: dict[str, jax.Array]) -> tuple[Tokens, Context]:
        tokens, context = self.embed(x, model_time, cond)
        self.head(tokens, context)
        return tokens, context


def flux(
    variant: str | None = None,
    *,
    double_depth: int = 19,
    single_depth: int = 38,
    width: int = 3072,
    heads: int = 24,
    size: int | tuple[int, int] = 128,
    channels: int = 16,
    text_tokens: int | None = None,
    text_width: int = 4096,
    pooled_width: int = 768,
    axes_dim: tuple[int, ...] = (16, 56, 56),
    theta: float = 10_000.0,
    guidance_embedding: bool | None = None,
    mlp_ratio: int = 4,
    dtype: str | type | np.dtype = "float32",
) -> Model:
    """FLUX.1 as a `Model`: latents [B, H, W, 16] -> velocity eps - x0, for the process `flow` (model time 1000 t).

    The condition is {"text": [B, L, text_width] (T5), "pooled": [B, pooled_width] (CLIP), "guidance": [B] (only with a
    guidance embedding: the distilled scale itself, 3.5, which the network multiplies by 1000), "null_text",
    "null_pooled": those of the unconditional half, for guidance by two evaluations}. Text of another length than
    `text_tokens` is taken too.

    Args:
      variant: "dev", "schnell" (the two differ in guidance_embedding and text_tokens), or None for dev's values and a
        name made of the geometry.
      double_depth, single_depth: blocks of each kind, 1 or more (19, 38).
      width, heads: of the model (3072, 24).
      size: latent height and width, even (128: images of 1024 x 1024 pixels).
      channels: of the latents (16).
      text_tokens: length of the text (512 in dev, 256 in schnell).
      text_width, pooled_width: of the text encoders' outputs (4096, 768).
      axes_dim: widths of the rotary sections (text, row, column), even, adding up to width / heads ((16, 56, 56)).
      theta: base of the rotary frequencies (10000).
      guidance_embedding: does the network take the guidance scale (True in dev, False in schnell).
      mlp_ratio: hidden over model width of the MLPs (4).
      dtype: "float32" or "bfloat16", of activations and dots; norms, rotation, softmax and modulation are float32.

    Raises:
      ValueError: unknown variant, or a geometry that does not fit.

    References: Black Forest Labs 2024, https://github.com/black-forest-labs/flux; Esser et al. 2024, arXiv:2403.03206.
      In bfloat16 queries and keys are rounded once, after norm and rotation (twice in the original).
    """
    if variant is not None and variant not in VARIANTS:
        raise ValueError(f"unknown FLUX variant {variant!r}; allowed: {', '.join(VARIANTS)}")
    guided, tokens = VARIANTS[variant or "dev"]
    c = FluxConfig(
        double_depth=double_depth,
        single_depth=single_depth,
        width=width,
        heads=heads,
        size=(size, size) if isinstance(size, int) else (int(size[0]), int(size[1])),
        channels=channels,
        text_tokens=tokens if text_tokens is None else text_tokens,
        text_width=text_width,
        pooled_width=pooled_width,
        axes_dim=tuple(int(d) for d in axes_dim),
        theta=float(theta),
        guidance_embedding=guided if guidance_embedding is None else guidance_embedding,
        mlp_ratio=mlp_ratio,
        dtype=model_dtype("flux", dtype),
    )
    _check(c)
    double, single, ends = DoubleBlock(c), SingleBlock(c), Ends(c)
    spec = _condition(c)

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

    return Model(
        name=f"flux-{variant or f'{c.double_depth}+{c.single_depth}x{c.width}'}",
        init=init,
        embed=embed,
        stages=(
            Stage("double", c.double_depth, double, ("attn", "mlp")),
            Stage("single", c.single_depth, single, ("attn_mlp",)),
        ),
        head=head,
        null=lambda cond: {**cond, "text": cond["null_text"], "pooled": cond["null_pooled"]},
        input_shape=(*c.size, c.channels),
        learn_sigma=False,
        classes=0,
        dtype=c.dtype,
        cond=spec,
        once=once,
        hidden=lambda tokens: tokens["img"],
        shards=(
            ("/qkv/", Shard("columns", (1, 1, 1))),
            ("single/linear1/", Shard("columns", (1, 1, 1, c.mlp_ratio))),
            ("single/linear2/", Shard("rows", (1, c.mlp_ratio))),
            ("/fc1/|(double/.*|single)/ada/", Shard("columns")),
            ("double/.*/(out|fc2)/", Shard("rows")),
        ),
    )


def _condition(c: FluxConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of one sample's condition."""
    shapes: dict[str, tuple[int, ...]] = {"text": (c.text_tokens, c.text_width), "pooled": (c.pooled_width,)}
    shapes |= {f"null_{name}": shape for name, shape in shapes.items()}
    if c.guidance_embedding:
        shapes["guidance"] = ()
    return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}


def _check(c: FluxConfig) -> None:
    names = ("double_depth", "single_depth", "width", "heads", "channels", "text_tokens", "text_width", "pooled_width")
    check_streams("flux", c, (*names, "mlp_ratio"), 3)
    if not 0 < c.theta <= 1e12:
        raise ValueError(f"flux: theta={c.theta}; allowed: > 0, up to 1e12")
    if min(c.size) < PATCH or c.size[0] % PATCH or c.size[1] % PATCH:
        raise ValueError(f"flux: size={c.size[0]}x{c.size[1]}; allowed: even, {PATCH} or more")
    check_size("flux", c.size, c.channels, math.prod(c.grid) + c.text_tokens, c.width // c.heads)


def check_streams(name: str, c: Any, counts: Sequence[str], axes: int) -> None:
    """Raises ValueError for a count below 1, heads that do not divide the width, or rotary sections that are not so
    many even widths that add up to that of a head.

    Args:
      name: of the model, for the message. c: its geometry, with width, heads and axes_dim. counts: of its fields.
    """
    for field in counts:
        if getattr(c, field) < 1:
            raise ValueError(f"{name}: {field}={getattr(c, field)}; allowed: 1 or more")
    if c.width % c.heads:
        raise ValueError(f"{name}: width={c.width} must be divisible by heads={c.heads}")
    if len(c.axes_dim) != axes or any(d < 2 or d % 2 for d in c.axes_dim) or sum(c.axes_dim) * c.heads != c.width:
        raise ValueError(
            f"{name}: axes_dim={c.axes_dim}; allowed: {('three', 'four')[axes - 3]} even widths that add up to the "
            f"head width {c.width // c.heads} of width={c.width}, heads={c.heads}"
        )
