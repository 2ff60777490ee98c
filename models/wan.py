"""Wan 2.1: text-to-video Transformers over patches of frames, with 3-D rotary positions and cross-attention.

Wan Team, Wan: Open and Advanced Large-Scale Video Generative Models, 2025, arXiv:2503.20314. One network of the time
gives six vectors s of width D for all blocks; a block adds its own table E and computes, with
(shift, scale, gate, shift', scale', gate') = E + s and the projected caption y,

  h <- h + gate attn(norm(h) (1 + scale) + shift)       queries and keys rotated by (frame, row, column)
  h <- h + cross(affine_norm(h), y)                     (no gate)
  h <- h + gate' ffn(norm(h) (1 + scale') + shift').

Queries and keys of both attentions pass an RMS norm over all heads together. The function is that of diffusers'
WanTransformer3DModel for text alone, which is the T2V of Wan-Video/Wan2.1; its image branch (I2V) is not here.

Shape letters: B batch, F frames, N tokens, L caption tokens, D width, H heads, K head width.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from difax.core.contracts import Context, Model, Params, Shard, Stage
from difax.core.ops import attend
from difax.core.placement import split
from difax.models.layers import Dense, affine_norm, check_size, gelu, model_dtype, modulate, timestep_embedding
from difax.models.rope import apply_rotary, rotary_table

# name -> depth, width, heads, ffn (table 3 of the paper)
VARIANTS = {"1.3B": (30, 1536, 12, 8960), "14B": (40, 5120, 40, 13824)}


@dataclasses.dataclass(frozen=True)
class WanConfig:
    """Geometry and numerics of a Wan; the arguments of `wan` with nothing left open."""

    depth: int
    width: int
    heads: int
    ffn: int
    size: tuple[int, int, int]
    channels: int
    patch: tuple[int, int, int]
    text_tokens: int
    text_width: int
    eps: float
    freq_dim: int
    cross_attn_norm: bool
    qk_norm: bool
    max_positions: int
    dtype: Any

    @property
    def grid(self) -> tuple[int, int, int]:
        f, h, w = (n // p for n, p in zip(self.size, self.patch, strict=True))
        return f, h, w

    @property
    def rotary_axes(self) -> tuple[int, int, int]:
        """Features of a head that turn with the frame, the row and the column."""
        k = self.width // self.heads
        return k - 4 * (k // 6), 2 * (k // 6), 2 * (k // 6)


def rotary_grid(grid: tuple[int, int, int], axes_dim: tuple[int, int, int]) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines [N, K/2] of every token of a grid (frames, rows, columns), in this order of axes.

    They are put together on the device from one small table an axis: a video of 81 frames in 480p has 32760 tokens,
    whose tables would otherwise be 17 MB of constants in the program.
    """
    parts = []
    for axis, (n, d) in enumerate(zip(grid, axes_dim, strict=True)):
        table = rotary_table(np.arange(n)[:, None], (d,))
        place = tuple(n if a == axis else 1 for a in range(3))
        parts.append([jnp.broadcast_to(jnp.asarray(t).reshape(*place, -1), (*grid, d // 2)) for t in table])
    cos, sin = (jnp.concatenate(t, axis=-1).reshape(math.prod(grid), -1) for t in zip(*parts, strict=True))
    return cos, sin


def patchify_video(x_BFHWC: jax.Array, patch: tuple[int, int, int]) -> jax.Array:
    """[B, F, H, W, C] -> [B, N, p q r C] in the order frame, row, column; a patch's features run likewise, then C."""
    b, f, h, w, c = x_BFHWC.shape
    p, q, r = patch
    x = x_BFHWC.reshape(b, f // p, p, h // q, q, w // r, r, c).transpose(0, 1, 3, 5, 2, 4, 6, 7)
    return x.reshape(b, (f // p) * (h // q) * (w // r), p * q * r * c)


def unpatchify_video(x_BNP: jax.Array, patch: tuple[int, int, int], grid: tuple[int, int, int]) -> jax.Array:
    """The inverse of `patchify_video` for a grid of patches: [B, N, p q r C] -> [B, F, H, W, C]."""
    b = len(x_BNP)
    x = x_BNP.reshape(b, *grid, *patch, -1).transpose(0, 1, 4, 2, 5, 3, 6, 7)
    return x.reshape(b, *(n * p for n, p in zip(grid, patch, strict=True)), -1)


def _normal(std: float) -> nn.initializers.Initializer:
    return nn.initializers.normal(std)


class WanBlock(nn.Module):
    """One block: parameters and the pieces that the block runner puts together."""

    config: WanConfig

    def setup(self) -> None:
        c = self.config
        self.table = self.param("table", _normal(c.width**-0.5), (6, c.width))
        self.qkv = Dense(3 * c.width)
        self.norm_q, self.norm_k = self._rms_norm(), self._rms_norm()
        self.out = Dense(c.width)
        self.cross_norm = affine_norm(c.eps) if c.cross_attn_norm else None
        self.cross_q = Dense(c.width)
        self.cross_kv = Dense(2 * c.width)
        self.cross_norm_q, self.cross_norm_k = self._rms_norm(), self._rms_norm()
        self.cross_out = Dense(c.width)
        self.fc1 = Dense(c.ffn)
        self.fc2 = Dense(c.width)

    def _rms_norm(self) -> Any:
        """The norm of queries or keys over all heads together, or the identity."""
        return nn.RMSNorm(self.config.eps, dtype=jnp.float32) if self.config.qk_norm else lambda x: x

    def mods(self, context: Context) -> dict[str, tuple[jax.Array, ...]]:
        a, b, c, d, e, f = jnp.moveaxis(self.table.astype(jnp.float32)[None] + context["six"], 1, 0)
        return {"attn": (a, b, c), "mlp": (d, e, f)}

    def _heads(self, x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:2], self.config.heads, -1)

    def attn(self, h_BND: jax.Array, mods: Any, context: Context, attend: Any) -> jax.Array:
        x = modulate(h_BND, *mods["attn"][:2], eps=self.config.eps)
        q, k, v = split(self.qkv(x), 3 * (self.config.width,))
        rotary = context["cos"], context["sin"]
        q = apply_rotary(self._heads(self.norm_q(q)), *rotary).astype(v.dtype)
        k = apply_rotary(self._heads(self.norm_k(k)), *rotary).astype(v.dtype)
        return self.out(attend(q, k, self._heads(v)).reshape(h_BND.shape))

    def once(self, context: Context) -> dict[str, Any]:
        """Normed keys, and values, of the caption, [B, L, H, K] each."""
        k, v = split(self.cross_kv(context["text"]), 2 * (self.config.width,))
        return {"keys_values": (self._heads(self.cross_norm_k(k).astype(v.dtype)), self._heads(v))}

    def cross(self, h_BND: jax.Array, mods: Any, context: Context, attend: Any) -> jax.Array:
        x = h_BND if self.cross_norm is None else self.cross_norm(h_BND).astype(h_BND.dtype)
        q = self.cross_q(x)
        k, v = context["keys_values"] if "keys_values" in context else self.once(context)["keys_values"]
        q = self._heads(self.cross_norm_q(q).astype(v.dtype))
        return self.cross_out(attend(q, k, v).reshape(h_BND.shape))

    def mlp(self, h_BND: jax.Array, mods: Any, context: Context, attend: Any) -> jax.Array:
        return self.fc2(gelu(self.fc1(modulate(h_BND, *mods["mlp"][:2], eps=self.config.eps))))

    def gate(self, mods: Any, branch: str) -> jax.Array:
        return mods[branch][2][:, None] if branch in mods else jnp.ones((1, 1, 1))

    def __call__(self, h_BND: jax.Array, context: Context, attend: Any) -> None:
        """Touches every parameter once; used by `init` only."""
        mods = self.mods(context)
        self.attn(h_BND, mods, context, attend)
        self.cross(h_BND, mods, context, attend)
        self.mlp(h_BND, mods, context, attend)


class Ends(nn.Module):
    """What stands before and after the blocks: patch, time and caption embeddings, and the final layer."""

    config: WanConfig

    def setup(self) -> None:
        c, small = self.config, _normal(0.02)
        self.patch = Dense(c.width)
        self.time1 = Dense(c.width, kernel_init=small)
        self.time2 = Dense(c.width, kernel_init=small)
        self.six = Dense(6 * c.width)
        self.text1 = Dense(c.width, kernel_init=small)
        self.text2 = Dense(c.width, kernel_init=small)
        self.table = self.param("table", _normal(c.width**-0.5), (2, c.width))
        self.out = Dense(math.prod(c.patch) * c.channels, kernel_init=nn.initializers.zeros)

    def once(self, cond: Any) -> Any:
        """The condition as the projected caption [B, L, D]."""
        return {"projected": self.text2(gelu(self.text1(cond["text"].astype(self.config.dtype))))}

    def embed(self, x: jax.Array, model_time: jax.Array, cond: Any) -> tuple[jax.Array, Context]:
        c = self.config
        cond = cond if "projected" in cond else self.once(cond)
        tokens = self.patch(patchify_video(x, c.patch).astype(c.dtype))
        # float32, as the original keeps the time and every modulation whatever the rest computes in
        time_BD = self.time2(nn.silu(self.time1(timestep_embedding(model_time, c.freq_dim))))
        six = self.six(nn.silu(time_BD)).reshape(-1, 6, c.width)
        cos, sin = rotary_grid(c.grid, c.rotary_axes)
        return tokens, {"time": time_BD, "six": six, "text": cond["projected"], "cos": cos, "sin": sin}

    def head(self, tokens: jax.Array, context: Context) -> jax.Array:
        shift, scale = jnp.moveaxis(self.table.astype(jnp.float32)[None] + context["time"][:, None], 1, 0)
        x = modulate(tokens, shift, scale, self.config.eps)
        return unpatchify_video(self.out(x), self.config.patch, self.config.grid)

    def __call__(self, x: jax.Array, model_time: jax.Array, cond: Any) -> tuple[jax.Array, Context]:
        tokens, context = self.embed(x, model_time, cond)
        self.head(tokens, context)
        return tokens, context


def wan(
    variant: str | None = None,
    *,
    depth: int | None = None,
    width: int | None = None,
    heads: int | None = None,
    ffn: int | None = None,
    size: tuple[int, int, int] = (21, 60, 104),
    channels: int = 16,
    patch: tuple[int, int, int] = (1, 2, 2),
    text_tokens: int = 512,
    text_width: int = 4096,
    eps: float = 1e-6,
    freq_dim: int = 256,
    cross_attn_norm: bool = True,
    qk_norm: bool = True,
    max_positions: int = 1024,
    dtype: str | type | np.dtype = "float32",
) -> Model:
    """A Wan 2.1 text-to-video network as a `Model`.

    It takes latents [B, F, H, W, C] and predicts the velocity eps - x0 of a flow; model times run from 0 to 1000. The
    condition is a dict: text [B, L, text_width], the encoded prompt with zeros behind its end (the reference masks
    nothing), and null_text of the same shape (the empty or the negative prompt).

    Args:
      variant: "1.3B" or "14B": depth, width, heads and ffn of the paper; or None and give the four yourself.
      depth, width, heads, ffn: blocks, model width, heads, hidden width of the feed-forward ((30, 1536, 12, 8960) and
        (40, 5120, 40, 13824)). Heads have an even width of 6 or more.
      size: frames, height and width of the latents, divisible by patch; (21, 60, 104) is 81 frames of 480 x 832
        pixels, (21, 90, 160) is 81 of 720 x 1280.
      channels: of the latents (16).
      patch: frames, rows and columns of a patch ((1, 2, 2)).
      text_tokens, text_width: caption tokens (512) and features of the text encoder (4096, umT5-XXL).
      eps: of every norm (1e-6).
      freq_dim: features of the time's sinusoid, even (256).
      cross_attn_norm: does a norm stand before the cross-attention (True).
      qk_norm: are queries and keys normed, over all heads together (True).
      max_positions: patches along an axis that the reference has rotary angles for; more are refused (1024).
      dtype: "float32" or "bfloat16", of activations and dots; time, norms, modulation, rotation and softmax are
        float32.

    Raises:
      ValueError: unknown variant, a missing part of the geometry, or one that does not divide.

    References: Wan Team 2025, arXiv:2503.20314.
    """
    if variant is not None and variant not in VARIANTS:
        raise ValueError(f"unknown Wan variant {variant!r}; allowed: {', '.join(VARIANTS)}")
    given: dict[str, Any] = {"depth": depth, "width": width, "heads": heads, "ffn": ffn}
    preset = dict(zip(given, VARIANTS[variant], strict=True)) if variant is not None else {}
    geometry: dict[str, Any] = {name: preset.get(name) if value is None else value for name, value in given.items()}
    missing = [name for name, value in geometry.items() if value is None]
    if missing:
        raise ValueError(f"wan: {', '.join(missing)} missing; give it, or a variant: {', '.join(VARIANTS)}")
    for name, value in (("size", size), ("patch", patch)):
        if len(value) != 3:
            raise ValueError(f"wan: {name}={tuple(value)}; expected (frames, height, width)")
    c = WanConfig(
        **geometry,
        size=(int(size[0]), int(size[1]), int(size[2])),
        channels=channels,
        patch=(int(patch[0]), int(patch[1]), int(patch[2])),
        text_tokens=text_tokens,
        text_width=text_width,
        eps=eps,
        freq_dim=freq_dim,
        cross_attn_norm=cross_attn_norm,
        qk_norm=qk_norm,
        max_positions=max_positions,
        dtype=model_dtype("wan", dtype),
    )
    _check(c)
    block, ends = WanBlock(c), Ends(c)
    text = jax.ShapeDtypeStruct((c.text_tokens, c.text_width), "float32")
    cond_spec = {"text": text, "null_text": text}

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
        name=f"wan-{variant or f'{c.depth}x{c.width}'}",
        init=init,
        embed=embed,
        stages=(Stage("blocks", c.depth, block, ("attn", "cross", "mlp"), once=True),),
        head=head,
        null=lambda cond: {**cond, "text": cond["null_text"]},
        input_shape=(*c.size, c.channels),
        learn_sigma=False,
        classes=0,
        dtype=c.dtype,
        cond=cond_spec,
        once=once,
        told=lambda context: {"time": context["time"], "modulation": context["six"]},
        shards=(
            ("/qkv/", Shard("columns", (1, 1, 1))),
            ("/cross_kv/", Shard("columns", (1, 1))),
            ("/cross_q/", Shard("columns")),
            ("/fc1/", Shard("columns")),
            ("blocks/(out|cross_out|fc2)/", Shard("rows")),
        ),
    )


def _check(c: WanConfig) -> None:
    for name in ("depth", "width", "heads", "ffn", "channels", "text_tokens", "text_width"):
        if getattr(c, name) < 1:
            raise ValueError(f"wan: {name}={getattr(c, name)}; allowed: 1 or more")
    head = c.width // c.heads
    if c.width % c.heads or head % 2 or head < 6:
        raise ValueError(
            f"wan: width={c.width} must be divisible by heads={c.heads} into heads of an even width, 6 or more"
        )
    if min(c.patch) < 1 or min(c.size) < 1 or any(n % p for n, p in zip(c.size, c.patch, strict=True)):
        raise ValueError(f"wan: size={c.size} must be divisible by patch={c.patch} (frames, height, width)")
    if not 0 < c.eps <= 1:
        raise ValueError(f"wan: eps={c.eps}; allowed: > 0, up to 1")
    if c.freq_dim < 2 or c.freq_dim % 2:
        raise ValueError(f"wan: freq_dim={c.freq_dim}; allowed: even, 2 or more")
    if max(c.grid) > c.max_positions:
        raise ValueError(
            f"wan: size={c.size} of patches {c.patch}; allowed: max_positions={c.max_positions} on an axis"
        )
    check_size("wan", c.size, c.channels, math.prod(c.grid) + c.text_tokens, head)
