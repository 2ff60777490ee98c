"""PixArt-alpha and PixArt-Sigma: text-to-image Transformers with adaLN-single and cross-attention to a caption.

Chen et al., PixArt-alpha, 2023, arXiv:2310.00426; Chen et al., PixArt-Sigma, 2024, arXiv:2403.04692. One network of
the time gives six vectors s of width D for all blocks; a block adds its own table E and computes, with
(shift, scale, gate, shift', scale', gate') = E + s and the projected caption y,

  h <- h + gate attn(norm(h) (1 + scale) + shift)
  h <- h + cross(h, y)                                      (no norm before, no gate)
  h <- h + gate' mlp(norm(h) (1 + scale') + shift').

The function is that of diffusers' PixArtTransformer2DModel. Both papers share it: Sigma has longer captions and no
micro-conditions (its compressed keys and values are not in that class and not here).

Shape letters: B batch, N tokens, L caption tokens, D width, H heads, K head width.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from difax.core.contracts import Context, Model, Params, Segments, Shard, Stage
from difax.core.ops import attend
from difax.core.placement import split
from difax.models.layers import (
    ACTIVATIONS,
    Dense,
    activate,
    affine_norm,
    check_size,
    gelu,
    masked,
    model_dtype,
    modulate,
    patchify,
    sincos_positions,
    timestep_embedding,
    unpatchify,
)

VARIANTS = {"alpha": 120, "sigma": 300}  # name -> caption tokens; both are XL/2
XL = {"depth": 28, "width": 1152, "heads": 16}
FREQUENCIES = 256


@dataclasses.dataclass(frozen=True)
class PixArtConfig:
    """Geometry and numerics of a PixArt; the arguments of `pixart` with nothing left open."""

    depth: int
    width: int
    heads: int
    patch: int
    size: tuple[int, int]
    channels: int
    text_tokens: int
    text_width: int
    base_size: int
    interpolation_scale: float
    micro_conditioning: bool
    learn_sigma: bool
    norm_eps: float
    norm_affine: bool
    qkv_bias: bool
    activation: str
    caption_projection: bool
    dtype: Any

    @property
    def grid(self) -> tuple[int, int]:
        return self.size[0] // self.patch, self.size[1] // self.patch

    @property
    def out_channels(self) -> int:
        return self.channels * (2 if self.learn_sigma else 1)


def _normal(std: float) -> nn.initializers.Initializer:
    return nn.initializers.normal(std)


class PixArtBlock(nn.Module):
    """One block: parameters and the pieces that the block runner puts together."""

    config: PixArtConfig

    def setup(self) -> None:
        c, width = self.config, self.config.width
        self.table = self.param("table", _normal(width**-0.5), (6, width))
        self.attn_norm = affine_norm(c.norm_eps) if c.norm_affine else None
        self.qkv = Dense(3 * width, use_bias=c.qkv_bias)
        self.out = Dense(width)
        self.cross_q = Dense(width, use_bias=c.qkv_bias)
        self.cross_kv = Dense(2 * width, use_bias=c.qkv_bias)
        self.cross_out = Dense(width, kernel_init=nn.initializers.zeros)
        self.mlp_norm = affine_norm(c.norm_eps) if c.norm_affine else None
        self.fc1 = Dense(ACTIVATIONS[c.activation][0] * 4 * width)
        self.fc2 = Dense(width)

    def mods(self, context: Context) -> dict[str, tuple[jax.Array, ...]]:
        a, b, c, d, e, f = jnp.moveaxis(self.table.astype(jnp.float32)[None] + context["six"], 1, 0)
        return {"attn": (a, b, c), "mlp": (d, e, f)}

    def attn(self, h_BND: jax.Array, mods: Any, context: Context, attend: Any) -> jax.Array:
        shift, scale, _ = mods["attn"]
        x = modulate(h_BND, shift, scale, self.config.norm_eps, self.attn_norm)
        b, n, d = x.shape
        q, k, v = (a.reshape(b, n, self.config.heads, -1) for a in split(self.qkv(x), (d, d, d)))
        return self.out(attend(q, k, v).reshape(b, n, d))

    def once(self, context: Context) -> dict[str, Any]:
        """Keys and values of the caption, [B, L, H, K] each."""
        kv_BLD = self.cross_kv(context["text"])
        k_v = split(kv_BLD, 2 * (self.config.width,))
        return {"keys_values": tuple(a.reshape(*a.shape[:2], self.config.heads, -1) for a in k_v)}

    def cross(self, h_BND: jax.Array, mods: Any, context: Context, attend: Any) -> jax.Array:
        b, n, d = h_BND.shape
        q_BNHK = self.cross_q(h_BND).reshape(b, n, self.config.heads, -1)
        k, v = context["keys_values"] if "keys_values" in context else self.once(context)["keys_values"]
        segments = Segments(q=jnp.ones((b, n), jnp.int32), k=context["mask"])
        return self.cross_out(attend(q_BNHK, k, v, segments).reshape(b, n, d))

    def mlp(self, h_BND: jax.Array, mods: Any, context: Context, attend: Any) -> jax.Array:
        shift, scale, _ = mods["mlp"]
        x = modulate(h_BND, shift, scale, self.config.norm_eps, self.mlp_norm)
        return self.fc2(activate(self.fc1(x), self.config.activation))

    def gate(self, mods: Any, branch: str) -> jax.Array:
        return mods[branch][2][:, None] if branch in mods else jnp.ones((1, 1, 1))

    def __call__(self, h_BND: jax.Array, context: Context, attend: Any) -> None:
        """Touches every parameter once; used by `init` only."""
        mods = self.mods(context)
        self.attn(h_BND, mods, context, attend)
        self.cross(h_BND, mods, context, attend)
        self.mlp(h_BND, mods, context, attend)


class Ends(nn.Module):
    """What stands before and after the blocks: patch, time, size and caption embeddings, and the final layer."""

    config: PixArtConfig

    def setup(self) -> None:
        c, small = self.config, _normal(0.02)
        self.patch = Dense(c.width)
        self.time1 = Dense(c.width, kernel_init=small)
        self.time2 = Dense(c.width, kernel_init=small)
        self.six = Dense(6 * c.width, kernel_init=small)
        if c.caption_projection:
            self.text1 = Dense(c.width, kernel_init=small)
            self.text2 = Dense(c.width, kernel_init=small)
        if c.micro_conditioning:
            self.resolution1 = Dense(c.width // 3, kernel_init=small)
            self.resolution2 = Dense(c.width // 3, kernel_init=small)
            self.aspect1 = Dense(c.width // 3, kernel_init=small)
            self.aspect2 = Dense(c.width // 3, kernel_init=small)
        self.table = self.param("table", _normal(c.width**-0.5), (2, c.width))
        self.out = Dense(c.patch * c.patch * c.out_channels, kernel_init=nn.initializers.zeros)

    def once(self, cond: Any) -> Any:
        """The condition with the caption projected, and with one vector [B, D] of the micro-conditions."""
        c = self.config
        text = masked(cond["text"].astype(c.dtype), cond["mask"])
        projected = self.text2(gelu(self.text1(text))) if c.caption_projection else text
        known = {"projected": projected, "mask": cond["mask"]}
        if c.micro_conditioning:
            sizes = self._numbers(cond["resolution"], self.resolution1, self.resolution2)
            aspect = self._numbers(cond["aspect_ratio"], self.aspect1, self.aspect2)
            known["micro"] = jnp.concatenate([sizes, aspect], axis=-1)
        return known

    def embed(self, x: jax.Array, model_time: jax.Array, cond: Any) -> tuple[jax.Array, Context]:
        c = self.config
        cond = cond if "projected" in cond else self.once(cond)
        positions = jnp.asarray(sincos_positions(c.width, *c.grid, c.base_size, c.interpolation_scale))[None]
        tokens = self.patch(patchify(x, c.patch).astype(c.dtype)) + positions.astype(c.dtype)
        # a few rows in float32, as every modulation that comes of them
        time_BD = self.time2(nn.silu(self.time1(timestep_embedding(model_time, FREQUENCIES))))
        if c.micro_conditioning:
            time_BD = time_BD + cond["micro"]
        six = self.six(nn.silu(time_BD)).reshape(-1, 6, c.width)
        return tokens, {"time": time_BD, "six": six, "text": cond["projected"], "mask": cond["mask"]}

    def _numbers(self, values_BJ: jax.Array, first: Dense, second: Dense) -> jax.Array:
        """Embeds J numbers a sample one by one, side by side: [B, J D/3]."""
        features = timestep_embedding(values_BJ.reshape(-1), FREQUENCIES)
        return second(nn.silu(first(features))).reshape(len(values_BJ), -1)

    def head(self, tokens: jax.Array, context: Context) -> jax.Array:
        shift, scale = jnp.moveaxis(self.table.astype(jnp.float32)[None] + context["time"][:, None], 1, 0)
        return unpatchify(self.out(modulate(tokens, shift, scale)), self.config.patch, *self.config.grid)

    def __call__(self, x: jax.Array, model_time: jax.Array, cond: Any) -> tuple[jax.Array, Context]:
        tokens, context = self.embed(x, model_time, cond)
        self.head(tokens, context)
        return tokens, context


def pixart(
    variant: str | None = None,
    *,
    depth: int | None = None,
    width: int | None = None,
    heads: int | None = None,
    patch: int = 2,
    size: int | tuple[int, int] = 128,
    channels: int = 4,
    text_tokens: int | None = None,
    text_width: int = 4096,
    base_size: int | None = None,
    interpolation_scale: float | None = None,
    micro_conditioning: bool | None = None,
    learn_sigma: bool = True,
    norm_eps: float = 1e-6,
    norm_affine: bool = False,
    qkv_bias: bool = True,
    activation: str = "gelu-approximate",
    caption_projection: bool = True,
    dtype: str | type | np.dtype = "float32",
) -> Model:
    """A PixArt as a `Model`, conditioned on an encoded caption.

    The condition is a dict: text [B, L, text_width] and mask [B, L] int32 (1: a token, 0: padding; at least one 1; what
    the text holds where it is 0 does not matter),
    null_text and null_mask of the same shapes (the empty or the negative prompt), and with micro-conditioning
    resolution [B, 2] (height, width in pixels) and aspect_ratio [B, 1] (height over width).

    Args:
      variant: "alpha" or "sigma", XL/2 of the papers with 120 or 300 caption tokens; or None and give depth, width,
        heads and text_tokens yourself.
      depth, width, heads: blocks, model width (divisible by heads and by 4; by 3 with micro-conditioning), heads
        (28, 1152, 16).
      patch: side of a patch (2).
      size: height and width of the latents, divisible by patch; 32, 64, 128 for images of 256, 512, 1024 pixels.
      channels: of the latents (4).
      text_tokens, text_width: caption tokens (120 in alpha, 300 in Sigma) and features of the text encoder (4096,
        T5-XXL).
      base_size: rows of patches of the square latents that the weights were trained on, to which positions are
        stretched; None takes it from a square `size`.
      interpolation_scale: of the positions; None is (base_size patch) // 64, at least 1, as in diffusers.
      micro_conditioning: embed resolution and aspect ratio; None is True for "alpha" of 128 x 128 latents.
      learn_sigma: emit variance channels (True; samplers other than ddpm drop them).
      norm_eps: epsilon of the blocks' norms, > 0 (1e-6; that of the final norm is always 1e-6).
      norm_affine: have the blocks' norms a scale and a shift of their own (False).
      qkv_bias: have queries, keys and values of both attentions a bias (True).
      activation: of the MLP, as in `difax.models.dit.dit` ("gelu-approximate").
      caption_projection: is the caption projected to the model's width by two layers (True); if not, keys and values
        are made of the text encoder's features themselves.
      dtype: "float32" or "bfloat16", of activations and dots; time, norms, modulation and softmax are float32.

    Raises:
      ValueError: unknown variant, a missing part of the geometry, or one that does not divide.

    References: Chen et al. 2023, arXiv:2310.00426; Chen et al. 2024, arXiv:2403.04692.
    """
    if variant is not None and variant not in VARIANTS:
        raise ValueError(f"unknown PixArt variant {variant!r}; allowed: {', '.join(VARIANTS)}")
    given: dict[str, Any] = {"depth": depth, "width": width, "heads": heads, "text_tokens": text_tokens}
    preset: dict[str, Any] = {} if variant is None else {**XL, "text_tokens": VARIANTS[variant]}
    geometry: dict[str, Any] = {name: preset.get(name) if value is None else value for name, value in given.items()}
    missing = [name for name, value in geometry.items() if value is None]
    if missing:
        raise ValueError(f"pixart: {', '.join(missing)} missing; give it, or a variant: {', '.join(VARIANTS)}")
    hw = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
    if patch < 1:
        raise ValueError(f"pixart: patch={patch}; allowed: 1 or more")
    if base_size is None:
        if hw[0] != hw[1]:
            raise ValueError(
                f"pixart: size={hw[0]}x{hw[1]} does not tell the square size that the weights were trained on; "
                "give base_size=... in patches (64 for 1024 pixels)"
            )
        base_size = hw[0] // patch
    trained = base_size * patch
    c = PixArtConfig(
        **geometry,
        patch=patch,
        size=hw,
        channels=channels,
        text_width=text_width,
        base_size=base_size,
        interpolation_scale=max(trained // 64, 1) if interpolation_scale is None else interpolation_scale,
        micro_conditioning=(variant == "alpha" and trained == 128)
        if micro_conditioning is None
        else micro_conditioning,
        learn_sigma=learn_sigma,
        norm_eps=norm_eps,
        norm_affine=norm_affine,
        qkv_bias=qkv_bias,
        activation=activation,
        caption_projection=caption_projection,
        dtype=model_dtype("pixart", dtype),
    )
    _check(c)
    block, ends = PixArtBlock(c), Ends(c)
    text, mask = (c.text_tokens, c.text_width), (c.text_tokens,)
    shapes = {"text": text, "mask": mask, "null_text": text, "null_mask": mask}
    if c.micro_conditioning:
        shapes |= {"resolution": (2,), "aspect_ratio": (1,)}
    cond_spec = {n: jax.ShapeDtypeStruct(s, "int32" if "mask" in n else "float32") for n, s in shapes.items()}

    def init(key: jax.Array) -> Params:
        ends_key, blocks_key = jax.random.split(key)
        x = jnp.zeros((1, *c.size, c.channels))
        cond = {name: jnp.ones((1, *s.shape), s.dtype) for name, s in cond_spec.items()}
        (tokens, context), ends_params = ends.init_with_output(ends_key, x, jnp.zeros((1,)), cond)
        one = lambda k: block.init(k, tokens, context, attend)["params"]  # noqa: E731
        return {"ends": ends_params["params"], "blocks": jax.vmap(one)(jax.random.split(blocks_key, c.depth))}

    def embed(params: Params, x: jax.Array, model_time: jax.Array, cond: Any) -> Any:
        return ends.apply({"params": params["ends"]}, x, model_time, cond, method="embed")

    def once(params: Params, cond: Any) -> Any:
        return ends.apply({"params": params["ends"]}, cond, method="once")

    def head(params: Params, tokens: jax.Array, context: Context) -> Any:
        return ends.apply({"params": params["ends"]}, tokens, context, method="head")

    return Model(
        name=f"pixart-{variant or f'{c.depth}x{c.width}/{c.patch}'}",
        init=init,
        embed=embed,
        stages=(Stage("blocks", c.depth, block, ("attn", "cross", "mlp"), once=True),),
        head=head,
        null=lambda cond: {**cond, "text": cond["null_text"], "mask": cond["null_mask"]},
        input_shape=(*c.size, c.channels),
        learn_sigma=c.learn_sigma,
        classes=0,
        dtype=c.dtype,
        cond=cond_spec,
        once=once,
        shards=(
            ("/qkv/", Shard("columns", (1, 1, 1))),
            ("/cross_kv/", Shard("columns", (1, 1))),
            ("/cross_q/", Shard("columns")),
            ("/fc1/", Shard("columns", (1,) * ACTIVATIONS[c.activation][0])),
            ("blocks/(out|cross_out|fc2)/", Shard("rows")),
        ),
    )


def _check(c: PixArtConfig) -> None:
    for name in ("depth", "width", "heads", "channels", "text_tokens", "text_width", "base_size"):
        if getattr(c, name) < 1:
            raise ValueError(f"pixart: {name}={getattr(c, name)}; allowed: 1 or more")
    if c.width % c.heads or c.width % 4:
        raise ValueError(f"pixart: width={c.width} must be divisible by heads={c.heads} and by 4")
    if c.micro_conditioning and c.width % 3:
        raise ValueError(f"pixart: width={c.width} must be divisible by 3 with micro_conditioning")
    if min(c.size) < 1 or c.size[0] % c.patch or c.size[1] % c.patch:
        raise ValueError(f"pixart: size={c.size[0]}x{c.size[1]} must be divisible by patch={c.patch}")
    if not 0 < c.interpolation_scale <= 1e6:
        what = f"interpolation_scale={c.interpolation_scale}; allowed: > 0, up to 1e6"
        raise ValueError(f"pixart: base_size={c.base_size}, {what}")
    if c.activation not in ACTIVATIONS:
        raise ValueError(f"pixart: activation={c.activation!r}; allowed: {', '.join(ACTIVATIONS)}")
    if not 0 < c.norm_eps <= 1:
        raise ValueError(f"pixart: norm_eps={c.norm_eps}; allowed: > 0, up to 1")
    check_size("pixart", c.size, c.channels, math.prod(c.grid) + c.text_tokens, c.width)
