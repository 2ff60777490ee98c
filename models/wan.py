"""Wan 2.1 and 2.2: video Transformers over patches of frames, with 3-D rotary positions and cross-attention.

Wan Team, Wan: Open and Advanced Large-Scale Video Generative Models, 2025, arXiv:2503.20314. One network of the time
gives six vectors s of width D for all blocks; a block adds its own table E and computes, with
(shift, scale, gate, shift', scale', gate') = E + s and the projected caption y,

  h <- h + gate attn(norm(h) (1 + scale) + shift)       queries and keys rotated by (frame, row, column)
  h <- h + cross(affine_norm(h), y)                     (no gate)
  h <- h + gate' ffn(norm(h) (1 + scale') + shift').

Queries and keys of both attentions pass an RMS norm over all heads together. The function is that of diffusers'
WanTransformer3DModel. What a picture adds, by settings:

  condition channels   a mask and latents beside the noise (image-to-video of 2.1 and of 2.2 A14B)
  image tokens         of CLIP, through two layers and into the cross-attention, with keys and values of their own whose
                       attention is added to the caption's (image-to-video of 2.1)
  the first frame      given latents in the place of the noise, whose tokens are told the time 0 (2.2 TI2V-5B)

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

from difax.core.contracts import Context, Model, Params, Segments, Shard, Stage
from difax.core.ops import attend
from difax.core.placement import cut, join, split
from difax.models.layers import (
    Dense,
    activate,
    affine_norm,
    check_size,
    gelu,
    model_dtype,
    modulate,
    timestep_embedding,
)
from difax.models.rope import apply_rotary, rotary_table

# name -> depth, width, heads, ffn (table 3 of the paper; 5B is 2.2's)
VARIANTS = {"1.3B": (30, 1536, 12, 8960), "14B": (40, 5120, 40, 13824), "5B": (30, 3072, 24, 14336)}
IMAGE_EPS = 1e-5  # of the norms around the image's layers, whatever `eps` is


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
    condition_channels: int = 0
    image_width: int | None = None
    image_tokens: int = 257
    image_positions: bool = False
    added_kv: bool = True
    first_frame: bool = False

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


def with_first_frame(x_BFHWC: jax.Array, first_BHWC: jax.Array) -> jax.Array:
    """Latents whose first frame is the one that is given: what the network sees at each evaluation, and what is to be
    made of the sampler's result."""
    return jnp.concatenate([first_BHWC.astype(x_BFHWC.dtype)[:, None], x_BFHWC[:, 1:]], axis=1)


def image_condition(latents_BFHWC: jax.Array, last: bool = False, time: int = 4) -> jax.Array:
    """The condition of image-to-video: a mask of the frames that are given, and behind it the encoded frames.

    A latent stands for `time` frames, the first one for one, which counts as often: mask channel j of latent f is that
    of frame time (f - 1) + 1 + j.

    Args:
      latents_BFHWC: of the video whose given frames are pictures and whose others are grey (zeros).
      last: is the last frame given beside the first one.
      time: frames of a latent (4).

    Returns:
      [B, F, H, W, time + C] float32.
    """
    mask = np.zeros((latents_BFHWC.shape[1], time), np.float32)
    mask[0] = 1.0
    if last:
        mask[-1, -1] = 1.0
    given = jnp.broadcast_to(jnp.asarray(mask)[None, :, None, None], (*latents_BFHWC.shape[:-1], time))
    return jnp.concatenate([given, latents_BFHWC.astype(jnp.float32)], axis=-1)


def spread(v: jax.Array, c: WanConfig) -> jax.Array:
    """What all tokens of a sample share, [B, D] -> [B, 1, D]; of two times, [B, 2, D] -> [B, N, D]: the first frame's
    and that of the others."""
    if v.ndim == 2:
        return v[:, None]
    first, whole = math.prod(c.grid[1:]), math.prod(c.grid)
    parts = (jnp.broadcast_to(v[:, i, None], (len(v), n, v.shape[-1])) for i, n in enumerate((first, whole - first)))
    return jnp.concatenate(list(parts), axis=1)


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
        if c.image_width and c.added_kv:
            self.image_kv = Dense(2 * c.width)
            self.image_norm_k = self._rms_norm()
        self.cross_out = Dense(c.width)
        self.fc1 = Dense(c.ffn)
        self.fc2 = Dense(c.width)

    def _rms_norm(self) -> Any:
        """The norm of queries or keys over all heads together, or the identity."""
        return nn.RMSNorm(self.config.eps, dtype=jnp.float32) if self.config.qk_norm else lambda x: x

    def mods(self, context: Context) -> dict[str, tuple[jax.Array, ...]]:
        table, six = self.table.astype(jnp.float32)[None], context["six"]
        a, b, c, d, e, f = jnp.moveaxis((table if six.ndim == 3 else table[None]) + six, -2, 0)
        return {"attn": (a, b, c), "mlp": (d, e, f)}

    def _modulated(self, h_BND: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
        if shift.ndim == 3:
            shift, scale = (spread(a, self.config) for a in (shift, scale))
            if h_BND.shape[1] != shift.shape[1]:
                raise ValueError(
                    f"wan: first_frame=True with {h_BND.shape[1]} of {shift.shape[1]} tokens; each has a time of its "
                    "own; allowed: a cache of whole frames"
                )
        return modulate(h_BND, shift, scale, eps=self.config.eps)

    def _heads(self, x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:2], self.config.heads, -1)

    def attn(self, h_BND: jax.Array, mods: Any, context: Context, attend: Any) -> jax.Array:
        x = self._modulated(h_BND, *mods["attn"][:2])
        q, k, v = split(self.qkv(x), 3 * (self.config.width,))
        rotary = context["cos"], context["sin"]
        q = apply_rotary(self._heads(self.norm_q(q)), *rotary).astype(v.dtype)
        k = apply_rotary(self._heads(self.norm_k(k)), *rotary).astype(v.dtype)
        return self.out(attend(q, k, self._heads(v)).reshape(h_BND.shape))

    def once(self, context: Context) -> dict[str, Any]:
        """Normed keys, and values, of the caption and behind it of the image, [B, L, H, K] each."""
        k, v = split(self.cross_kv(context["text"]), 2 * (self.config.width,))
        k = self.cross_norm_k(k).astype(v.dtype)
        if "image" in context:
            image_k, image_v = split(self.image_kv(context["image"]), 2 * (self.config.width,))
            k, v = join(k, self.image_norm_k(image_k).astype(v.dtype)), join(v, image_v)
        return {"keys_values": (self._heads(k), self._heads(v))}

    def cross(self, h_BND: jax.Array, mods: Any, context: Context, attend: Any) -> jax.Array:
        x = h_BND if self.cross_norm is None else self.cross_norm(h_BND).astype(h_BND.dtype)
        q = self.cross_q(x)
        k, v = context["keys_values"] if "keys_values" in context else self.once(context)["keys_values"]
        q = self._heads(self.cross_norm_q(q).astype(v.dtype))
        if "image" in context:
            # caption and image are attended to apart, and added: in one call, by queries that stand there twice
            n, known = q.shape[1], [context[name].shape[1] for name in ("text", "image")]
            ids = [[jnp.full((len(q), m), i, jnp.int32) for i, m in enumerate(ms, 1)] for ms in ((n, n), known)]
            segments = Segments(q=join(*ids[0]), k=join(*ids[1]))
            of_text, of_image = cut(attend(join(q, q), k, v, segments), (n, n))
            return self.cross_out((of_text + of_image).reshape(h_BND.shape))
        return self.cross_out(attend(q, k, v).reshape(h_BND.shape))

    def mlp(self, h_BND: jax.Array, mods: Any, context: Context, attend: Any) -> jax.Array:
        return self.fc2(gelu(self.fc1(self._modulated(h_BND, *mods["mlp"][:2]))))

    def gate(self, mods: Any, branch: str) -> jax.Array:
        return spread(mods[branch][2], self.config) if branch in mods else jnp.ones((1, 1, 1))

    def __call__(self, h_BND: jax.Array, context: Context, attend: Any) -> None:
        """Touches every parameter once; used by `init` only."""
        mods = self.mods(context)
        self.attn(h_BND, mods, context, attend)
        self.cross(h_BND, mods, context, attend)
        self.mlp(h_BND, mods, context, attend)


class Ends(nn.Module):
    """What stands before and after the blocks: patch, time, caption and image embeddings, and the final layer."""

    config: WanConfig

    def setup(self) -> None:
        c, small = self.config, _normal(0.02)
        self.patch = Dense(c.width)
        self.time1 = Dense(c.width, kernel_init=small)
        self.time2 = Dense(c.width, kernel_init=small)
        self.six = Dense(6 * c.width)
        self.text1 = Dense(c.width, kernel_init=small)
        self.text2 = Dense(c.width, kernel_init=small)
        if c.image_width:
            self.image_norm1, self.image_norm2 = affine_norm(IMAGE_EPS), affine_norm(IMAGE_EPS)
            self.image1, self.image2 = Dense(c.image_width), Dense(c.width)
            if c.image_positions:
                self.image_positions = self.param("image_positions", small, (c.image_tokens, c.image_width))
        self.table = self.param("table", _normal(c.width**-0.5), (2, c.width))
        self.out = Dense(math.prod(c.patch) * c.channels, kernel_init=nn.initializers.zeros)

    def once(self, cond: Any) -> Any:
        """The condition with the caption projected to [B, L, D], and the image to [B, I, D]."""
        c = self.config
        known = {"projected": self.text2(gelu(self.text1(cond["text"].astype(c.dtype))))}
        if c.image_width:
            image = cond["image"].astype(jnp.float32)
            if c.image_positions:
                image = image + self.image_positions.astype(jnp.float32)[None]
            image = self.image2(activate(self.image1(self.image_norm1(image).astype(c.dtype)), "gelu"))
            image = self.image_norm2(image).astype(c.dtype)
            if c.added_kv:
                known["image"] = image
            else:
                known["projected"] = jnp.concatenate([image, known["projected"]], axis=1)
        return {name: cond[name] for name in ("condition", "first_frame") if name in cond} | known

    def embed(self, x: jax.Array, model_time: jax.Array, cond: Any) -> tuple[jax.Array, Context]:
        c = self.config
        cond = cond if "projected" in cond else self.once(cond)
        if c.first_frame:
            x = with_first_frame(x, cond["first_frame"])
            model_time = jnp.stack([jnp.zeros_like(model_time), model_time], axis=1).reshape(-1)
        if c.condition_channels:
            x = jnp.concatenate([x, cond["condition"].astype(x.dtype)], axis=-1)
        tokens = self.patch(patchify_video(x, c.patch).astype(c.dtype))
        # float32, as the original keeps the time and every modulation whatever the rest computes in
        time_BD = self.time2(nn.silu(self.time1(timestep_embedding(model_time, c.freq_dim))))
        six = self.six(nn.silu(time_BD)).reshape(-1, 6, c.width)
        if c.first_frame:
            time_BD, six = (a.reshape(-1, 2, *a.shape[1:]) for a in (time_BD, six))
        cos, sin = rotary_grid(c.grid, c.rotary_axes)
        known = {"image": cond["image"]} if "image" in cond else {}
        return tokens, {"time": time_BD, "six": six, "text": cond["projected"], "cos": cos, "sin": sin, **known}

    def head(self, tokens: jax.Array, context: Context) -> jax.Array:
        table, time = self.table.astype(jnp.float32)[None], context["time"]
        if time.ndim == 2:
            shift, scale = jnp.moveaxis(table + time[:, None], 1, 0)
        else:
            shift, scale = (spread(a, self.config) for a in jnp.moveaxis(table[None] + time[:, :, None], 2, 0))
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
    condition_channels: int = 0,
    image_width: int | None = None,
    image_tokens: int = 257,
    image_positions: bool = False,
    added_kv: bool = True,
    first_frame: bool = False,
    dtype: str | type | np.dtype = "float32",
) -> Model:
    """A Wan 2.1 or 2.2 network as a `Model`.

    It takes latents [B, F, H, W, C] and predicts the velocity eps - x0 of a flow; model times run from 0 to 1000. The
    condition is a dict: text [B, L, text_width], the encoded prompt with zeros behind its end (the reference masks
    nothing), and null_text of the same shape (the empty or the negative prompt). Where the settings below say so, also
    condition [B, F, H, W, condition_channels], image [B, image_tokens, image_width] and first_frame [B, H, W, C].

    Args:
      variant: "1.3B", "14B" or "5B": depth, width, heads and ffn of the publications; or None and give the four
        yourself.
      depth, width, heads, ffn: blocks, model width, heads, hidden width of the feed-forward ((30, 1536, 12, 8960),
        (40, 5120, 40, 13824) and (30, 3072, 24, 14336)). Heads have an even width of 6 or more.
      size: frames, height and width of the latents, divisible by patch; (21, 60, 104) is 81 frames of 480 x 832
        pixels, (21, 90, 160) is 81 of 720 x 1280.
      channels: of the latents (16; 48 in TI2V-5B).
      patch: frames, rows and columns of a patch ((1, 2, 2)).
      text_tokens, text_width: caption tokens (512) and features of the text encoder (4096, umT5-XXL).
      eps: of every norm (1e-6).
      freq_dim: features of the time's sinusoid, even (256).
      cross_attn_norm: does a norm stand before the cross-attention (True).
      qk_norm: are queries and keys normed, over all heads together (True).
      max_positions: patches along an axis that the reference has rotary angles for; more are refused (1024).
      condition_channels: that the condition adds to the latents' (0; 20 in image-to-video: 4 of the mask, 16 of the
        encoded frames).
      image_width: features of the image's tokens (None: no image; 1280 of CLIP ViT-H in image-to-video of 2.1).
      image_tokens: of the condition (257; 514 for a first and a last frame).
      image_positions: are learned positions added to them (False; True for a first and a last frame).
      added_kv: have they keys and values of their own (True), or those of the caption.
      first_frame: is the first frame given, whose tokens are told the time 0 (False). The sampler's own first frame
        means nothing then and is to be replaced behind it (`with_first_frame`), as in diffusers' pipeline.
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
        condition_channels=condition_channels,
        image_width=image_width,
        image_tokens=image_tokens,
        image_positions=image_positions,
        added_kv=added_kv,
        first_frame=first_frame,
    )
    _check(c)
    block, ends = WanBlock(c), Ends(c)
    cond_spec = _condition(c)

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
            ("/(cross|image)_kv/", Shard("columns", (1, 1))),
            ("/cross_q/", Shard("columns")),
            ("/fc1/", Shard("columns")),
            ("blocks/(out|cross_out|fc2)/", Shard("rows")),
        ),
    )


def _condition(c: WanConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of one sample's condition."""
    text = (c.text_tokens, c.text_width)
    shapes: dict[str, tuple[int, ...]] = {"text": text, "null_text": text}
    if c.condition_channels:
        shapes["condition"] = (*c.size, c.condition_channels)
    if c.image_width:
        shapes["image"] = (c.image_tokens, c.image_width)
    if c.first_frame:
        shapes["first_frame"] = (*c.size[1:], c.channels)
    return {name: jax.ShapeDtypeStruct(shape, "float32") for name, shape in shapes.items()}


def _check(c: WanConfig) -> None:
    for name in ("depth", "width", "heads", "ffn", "channels", "text_tokens", "text_width"):
        if getattr(c, name) < 1:
            raise ValueError(f"wan: {name}={getattr(c, name)}; allowed: 1 or more")
    if c.condition_channels < 0:
        raise ValueError(f"wan: condition_channels={c.condition_channels}; allowed: 0 or more")
    if c.image_width is not None and (c.image_width < 1 or c.image_tokens < 1):
        raise ValueError(f"wan: image_width={c.image_width}, image_tokens={c.image_tokens}; allowed: 1 or more")
    if c.first_frame and c.patch[0] != 1:
        raise ValueError(f"wan: first_frame=True with patch={c.patch}; allowed: patches of one frame")
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
