"""DiT and SiT: Transformers over patches with adaLN-Zero conditioning.

Peebles & Xie, Scalable Diffusion Models with Transformers, 2022, arXiv:2212.09748; SiT (Ma et al., 2024,
arXiv:2401.08740) is the same network trained with another process. A block is, with c the sum of the time and
class embeddings and (shift, scale, gate) linear functions of silu(c),

  h <- h + gate_1 attn(norm(h) (1 + scale_1) + shift_1)
  h <- h + gate_2 mlp (norm(h) (1 + scale_2) + shift_2).

Shape letters: B batch, N tokens, D width, H heads, K head width.
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

from difax.core.annotations import LARGEST
from difax.core.contracts import Context, Model, Params, Shard, Stage
from difax.core.ops import attend
from difax.core.placement import split
from difax.models.layers import (
    ACTIVATIONS,
    Dense,
    activate,
    affine_norm,
    check_size,
    model_dtype,
    modulate,
    patchify,
    sincos_positions,
    timestep_embedding,
    unpatchify,
)

# name -> depth, width, heads (table 1 of the paper)
SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}
PATCHES = (2, 4, 8)
FREQUENCIES = 256


@dataclasses.dataclass(frozen=True)
class DiTConfig:
    """Geometry and numerics of a DiT.

    size: (height, width) of the input in pixels or latents; channels: of the input.
    classes: number of labels; label index `classes` is the null label of the unconditional half.
    learn_sigma: emit C more channels for the variance.
    freq_shift, mlp_norm_eps: (0, 1e-6) in the original code, (1, 1e-5) in diffusers' DiTTransformer2DModel.
    activation, qkv_bias, mlp_norm_affine, block_embedders: see `dit`.
    base_size: rows of the square grid that positions are stretched to, None for those of the grid itself.
    dtype: of activations and dots; norms, softmax and the residual gates' inputs stay float32.
    """

    depth: int
    width: int
    heads: int
    patch: int
    size: tuple[int, int] = (32, 32)
    channels: int = 4
    classes: int = 1000
    mlp_ratio: int = 4
    learn_sigma: bool = True
    freq_shift: int = 0
    mlp_norm_eps: float = 1e-6
    base_size: int | None = None
    activation: str = "gelu-approximate"
    qkv_bias: bool = True
    mlp_norm_affine: bool = False
    block_embedders: bool = False
    dtype: Any = jnp.float32

    @property
    def grid(self) -> tuple[int, int]:
        return self.size[0] // self.patch, self.size[1] // self.patch

    @property
    def out_channels(self) -> int:
        return self.channels * (2 if self.learn_sigma else 1)


def _normal(std: float) -> nn.initializers.Initializer:
    return nn.initializers.normal(std)


def _embedders(module: Any) -> tuple[Dense, Dense, jax.Array]:
    """The layers that a time goes through, and the table of labels; the null label's row is the last."""
    c, small = module.config, _normal(0.02)
    table = module.param("label", small, (c.classes + 1, c.width))
    return Dense(c.width, kernel_init=small), Dense(c.width, kernel_init=small), table


def _embedded(module: Any, features: jax.Array, label: jax.Array) -> jax.Array:
    """silu(c) of the module's own embedders, c the sum of the time's and the label's."""
    time = module.time2(nn.silu(module.time1(features)))
    return nn.silu(time + module.label[label].astype(module.config.dtype))


class DiTBlock(nn.Module):
    """One adaLN-Zero block: parameters and the pieces that the block runner puts together."""

    config: DiTConfig

    def setup(self) -> None:
        config, width = self.config, self.config.width
        zeros = nn.initializers.zeros
        self.ada = Dense(6 * width, kernel_init=zeros)
        self.qkv = Dense(3 * width, use_bias=config.qkv_bias)
        self.out = Dense(width)
        self.fc1 = Dense(ACTIVATIONS[config.activation][0] * config.mlp_ratio * width)
        self.fc2 = Dense(width)
        self.mlp_norm = affine_norm(config.mlp_norm_eps) if config.mlp_norm_affine else None
        if config.block_embedders:
            self.time1, self.time2, self.label = _embedders(self)

    def mods(self, context: Context) -> dict[str, tuple[jax.Array, jax.Array, jax.Array]]:
        silu_c = context["silu_c"]
        if self.config.block_embedders:
            silu_c = _embedded(self, context["features"], context["label"])
        six = self.ada(silu_c).astype(jnp.float32)
        a, b, c, d, e, f = jnp.split(six, 6, axis=-1)
        return {"attn": (a, b, c), "mlp": (d, e, f)}

    def attn(self, h_BND: jax.Array, mods: Any, context: Context, attend: Any) -> jax.Array:
        shift, scale, _ = mods["attn"]
        x = modulate(h_BND, shift, scale)
        b, n, d = x.shape
        q, k, v = (a.reshape(b, n, self.config.heads, -1) for a in split(self.qkv(x), (d, d, d)))
        return self.out(attend(q, k, v).reshape(b, n, d))

    def mlp(self, h_BND: jax.Array, mods: Any, context: Context, attend: Any) -> jax.Array:
        shift, scale, _ = mods["mlp"]
        x = modulate(h_BND, shift, scale, self.config.mlp_norm_eps, self.mlp_norm)
        return self.fc2(activate(self.fc1(x), self.config.activation))

    def gate(self, mods: Any, branch: str) -> jax.Array:
        return mods[branch][2][:, None]

    def __call__(self, h_BND: jax.Array, context: Context, attend: Any) -> None:
        """Touches every parameter once; used by `init` only."""
        mods = self.mods(context)
        self.attn(h_BND, mods, context, attend)
        self.mlp(h_BND, mods, context, attend)


class Ends(nn.Module):
    """What stands before and after the blocks: patch, time and label embeddings, and the final layer."""

    config: DiTConfig

    def setup(self) -> None:
        c = self.config
        self.patch = Dense(c.width)
        self.time1, self.time2, self.label = _embedders(self)
        self.ada = Dense(2 * c.width, kernel_init=nn.initializers.zeros)
        self.out = Dense(c.patch * c.patch * c.out_channels, kernel_init=nn.initializers.zeros)

    def embed(self, x: jax.Array, model_time: jax.Array, label: jax.Array) -> tuple[jax.Array, Context]:
        c = self.config
        positions = jnp.asarray(sincos_positions(c.width, *c.grid, c.base_size))[None]
        tokens = self.patch(patchify(x, c.patch).astype(c.dtype)) + positions.astype(c.dtype)
        features = timestep_embedding(model_time, FREQUENCIES, c.freq_shift).astype(c.dtype)
        context = {"silu_c": _embedded(self, features, label)}
        return tokens, context | ({"features": features, "label": label} if c.block_embedders else {})

    def head(self, tokens: jax.Array, context: Context) -> jax.Array:
        shift, scale = jnp.split(self.ada(context["silu_c"]).astype(jnp.float32), 2, axis=-1)
        x = modulate(tokens, shift, scale)
        return unpatchify(self.out(x), self.config.patch, *self.config.grid)

    def __call__(self, x: jax.Array, model_time: jax.Array, label: jax.Array) -> tuple[jax.Array, Context]:
        tokens, context = self.embed(x, model_time, label)
        self.head(tokens, context)
        return tokens, context


def dit(
    variant: str | None = None,
    *,
    depth: int | None = None,
    width: int | None = None,
    heads: int | None = None,
    patch: int | None = None,
    size: int | tuple[int, int] = 32,
    channels: int = 4,
    classes: int = 1000,
    mlp_ratio: int = 4,
    learn_sigma: bool = True,
    freq_shift: int = 0,
    mlp_norm_eps: float = 1e-6,
    base_size: int | None = None,
    activation: str = "gelu-approximate",
    qkv_bias: bool = True,
    mlp_norm_affine: bool = False,
    block_embedders: bool = False,
    dtype: str | type | np.dtype = "float32",
) -> Model:
    """A class-conditional DiT (or SiT) as a `Model`.

    Args:
      variant: "S/2" ... "XL/8": depth, width, heads and patch of the paper; or None and give the four yourself.
      depth, width, heads, patch: override or replace the variant's.
      size: input height and width, in latents or pixels, divisible by patch (32: 256 x 256 images in SD latents).
      channels: of the input (4).
      classes: number of labels; label `classes` is the null label (1000).
      mlp_ratio: hidden over model width of the MLP (4).
      learn_sigma: emit variance channels (True).
      freq_shift, mlp_norm_eps: 0 and 1e-6 as facebookresearch/DiT; 1 and 1e-5 as diffusers.
      base_size: rows of patches of the square size that the weights were trained on, to which positions are stretched
        at any other, as diffusers does; None is the positions of the grid itself, as facebookresearch/DiT.
      activation: of the MLP, by diffusers' names: gelu-approximate (the paper's), gelu, geglu, geglu-approximate,
        swiglu or linear-silu; geglu and swiglu have a first product of twice the width.
      qkv_bias: have queries, keys and values a bias (True).
      mlp_norm_affine: has the norm before the MLP a scale and a shift of its own (False).
      block_embedders: has every block embedders of time and label of its own, as a file of diffusers may store them;
        the final layer goes by those of the first (False: one for all).
      dtype: "float32" or "bfloat16", of activations and dots.

    Raises:
      ValueError: unknown variant, or a geometry that does not divide.

    References: Peebles & Xie 2022, arXiv:2212.09748.
    """
    if variant is not None:
        letter, _, p = variant.partition("/")
        allowed = [f"{s}/{q}" for s in SIZES for q in PATCHES]
        if variant not in allowed:
            raise ValueError(f"unknown DiT variant {variant!r}; allowed: {', '.join(allowed)}")
        preset = (*SIZES[letter], int(p))
    else:
        preset = (None, None, None, None)
    chosen = (a if a is not None else b for a, b in zip((depth, width, heads, patch), preset, strict=True))
    given = [n for n in chosen if n is not None]
    if len(given) < 4:
        raise ValueError("dit: give a variant such as 'S/2', or all of depth, width, heads and patch")
    hw = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
    c = DiTConfig(
        *given,
        size=hw,
        channels=channels,
        classes=classes,
        mlp_ratio=mlp_ratio,
        learn_sigma=learn_sigma,
        freq_shift=freq_shift,
        mlp_norm_eps=mlp_norm_eps,
        base_size=base_size,
        activation=activation,
        qkv_bias=qkv_bias,
        mlp_norm_affine=mlp_norm_affine,
        block_embedders=block_embedders,
        dtype=model_dtype("dit", dtype),
    )
    _check(c)
    block, ends = DiTBlock(c), Ends(c)

    def init(key: jax.Array) -> Params:
        ends_key, blocks_key = jax.random.split(key)
        x = jnp.zeros((1, *c.size, c.channels))
        label = jnp.zeros((1,), jnp.int32)
        (tokens, context), ends_params = ends.init_with_output(ends_key, x, jnp.zeros((1,)), label)
        one = partial(block.init, h_BND=tokens, context=context, attend=attend)
        blocks = jax.vmap(lambda k: one(k)["params"])(jax.random.split(blocks_key, c.depth))
        return {"ends": ends_params["params"], "blocks": blocks}

    def embed(params: Params, x: jax.Array, model_time: jax.Array, cond: jax.Array):
        return ends.apply({"params": params["ends"]}, x, model_time, cond, method="embed")

    def head(params: Params, tokens: jax.Array, context: Context) -> Any:
        return ends.apply({"params": params["ends"]}, tokens, context, method="head")

    return Model(
        name=f"dit-{variant or f'{c.depth}x{c.width}/{c.patch}'}",
        init=init,
        embed=embed,
        stages=(Stage("blocks", c.depth, block, ("attn", "mlp")),),
        head=head,
        null=lambda label: jnp.full_like(label, c.classes),
        input_shape=(*c.size, c.channels),
        learn_sigma=c.learn_sigma,
        classes=c.classes,
        dtype=c.dtype,
        shards=(
            ("/qkv/", Shard("columns", (1, 1, 1))),
            ("/fc1/", Shard("columns", (1,) * ACTIVATIONS[c.activation][0])),
            ("/ada/", Shard("columns")),
            ("blocks/out/|down/out/|up/out/|/fc2/", Shard("rows")),
        ),
    )


def _check(c: DiTConfig) -> None:
    for name in ("depth", "width", "heads", "patch", "channels", "classes", "mlp_ratio"):
        if getattr(c, name) < 1:
            raise ValueError(f"dit: {name}={getattr(c, name)}; allowed: 1 or more")
    if c.activation not in ACTIVATIONS:
        raise ValueError(f"dit: activation={c.activation!r}; allowed: {', '.join(ACTIVATIONS)}")
    if c.base_size is not None and c.base_size < 1:
        raise ValueError(f"dit: base_size={c.base_size}; allowed: 1 or more, or none")
    if c.classes > LARGEST - 1:
        raise ValueError(f"dit: classes={c.classes}; allowed: up to {LARGEST - 1}, beside the null label")
    if c.width % c.heads or c.width % 4:
        raise ValueError(f"dit: width={c.width} must be divisible by heads={c.heads} and by 4")
    if min(c.size) < 1 or c.size[0] % c.patch or c.size[1] % c.patch:
        raise ValueError(f"dit: size={c.size[0]}x{c.size[1]} must be 1 or more and divisible by patch={c.patch}")
    if c.freq_shift not in (0, 1) or not 0 < c.mlp_norm_eps <= 1:
        raise ValueError(
            f"dit: freq_shift={c.freq_shift}, mlp_norm_eps={c.mlp_norm_eps}; allowed: 0 or 1, and above 0, up to 1"
        )
    check_size("dit", c.size, c.channels, math.prod(c.grid), c.width)
