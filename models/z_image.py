"""Z-Image: a single-stream Transformer over image and caption tokens, each refined by blocks of its own before.

Z-Image Team (Alibaba), Z-Image: An Efficient Image Generation Foundation Model with Single-Stream Diffusion
Transformer, 2025, arXiv:2511.22699. With c the embedded time, (s, g, s', g') = W c + b without a nonlinearity before,
and RMS norms n_1 ... n_4, every block is a sandwich,

  h <- h + tanh(g) n_2(attn(n_1(h) (1 + s)))         queries and keys RMS-normed per head and rotated by position
  h <- h + tanh(g') n_4(mlp(n_3(h) (1 + s')))        mlp(x) = W_2 (silu(W_1 x) W_3 x).

Refiners are such blocks: those of the image see image tokens alone; those of the caption see caption tokens alone and
have s = 0 and no gate, so that what they make depends on the condition only (`Model.once`).

Both streams are filled up to a multiple of 32 tokens with one learned token each, and these are attended to. Caption
token j stands at (1 + j, 0, 0), patch (row, column) at (1 + P, row, column), P the filled length of its own caption,
and what fills the image at (0, 0, 0). What a batch of captions has beyond P is in another segment: samples are those of
a batch of one.

The function is that of diffusers' ZImageTransformer2DModel for one image and its caption (its omni mode, with several
images and SigLIP tokens, is not here), but for the sign: that one returns x0 - eps.

Shape letters: B batch, L caption tokens (filled up), N image tokens (filled up), T = L + N, D width, H heads, K head
width.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from difax.core.contracts import Context, Model, Params, Segments, Shard, Stage, Tokens
from difax.core.ops import attend as exact_attention
from difax.core.ops import layer_norm
from difax.core.placement import cut, join, split
from difax.models.layers import (
    Dense,
    activate,
    check_size,
    masked,
    model_dtype,
    patchify,
    timestep_embedding,
    unpatchify,
)
from difax.models.rope import apply_rotary, rotary_table

FREQUENCIES = 256
PATCH = 2
MULTIPLE = 32  # of tokens, to which both streams are filled up
CONDITIONING = 256  # width of the embedded time, or the model's where that is less
HEAD_EPS = 1e-5  # of the norms of queries and keys
STREAMS = ("txt", "img")  # in the order in which they are joined


@dataclasses.dataclass(frozen=True)
class ZImageConfig:
    """Geometry and numerics of a Z-Image; the arguments of `z_image` with nothing left open."""

    depth: int
    refiner_depth: int
    width: int
    heads: int
    ffn: int
    size: tuple[int, int]
    channels: int
    text_tokens: int
    text_width: int
    time_hidden: int
    norm_eps: float
    qk_norm: bool
    axes_dim: tuple[int, ...]
    theta: float
    time_scale: float
    max_positions: tuple[int, ...]
    dtype: Any

    @property
    def grid(self) -> tuple[int, int]:
        return self.size[0] // PATCH, self.size[1] // PATCH


def filled_up(tokens: int) -> int:
    """The next multiple of 32."""
    return -(-tokens // MULTIPLE) * MULTIPLE


class Layer(nn.Module):
    """The weights of a block, and its two branches behind their second norm."""

    config: ZImageConfig

    def setup(self) -> None:
        c = self.config
        self.attn_norm1, self.attn_norm2 = self._norm(c.norm_eps), self._norm(c.norm_eps)
        self.mlp_norm1, self.mlp_norm2 = self._norm(c.norm_eps), self._norm(c.norm_eps)
        self.qkv = Dense(3 * c.width, use_bias=False)
        self.q_norm = self._norm(HEAD_EPS) if c.qk_norm else lambda x: x
        self.k_norm = self._norm(HEAD_EPS) if c.qk_norm else lambda x: x
        self.out = Dense(c.width, use_bias=False)
        self.fc1 = Dense(2 * c.ffn, use_bias=False)
        self.fc2 = Dense(c.width, use_bias=False)

    def _norm(self, eps: float) -> nn.RMSNorm:
        return nn.RMSNorm(eps, dtype=jnp.float32)

    def attention(self, h_BTD: jax.Array, scale_BD: Any, rotary: Any, ids_BT: Any, attend: Any) -> jax.Array:
        c = self.config
        qkv = split(self.qkv(self._scaled(self.attn_norm1, h_BTD, scale_BD)), 3 * (c.width,))
        q, k, v = (a.reshape(*a.shape[:2], c.heads, -1) for a in qkv)
        q, k = (apply_rotary(norm(a), *rotary).astype(v.dtype) for norm, a in ((self.q_norm, q), (self.k_norm, k)))
        o = attend(q, k, v) if ids_BT is None else attend(q, k, v, Segments(ids_BT, ids_BT))
        return self.attn_norm2(self.out(o.reshape(h_BTD.shape))).astype(h_BTD.dtype)

    def feed_forward(self, h_BTD: jax.Array, scale_BD: Any) -> jax.Array:
        x = activate(self.fc1(self._scaled(self.mlp_norm1, h_BTD, scale_BD)), "swiglu")
        return self.mlp_norm2(self.fc2(x)).astype(h_BTD.dtype)

    def _scaled(self, norm: Any, h_BTD: jax.Array, scale_BD: Any) -> jax.Array:
        normed = norm(h_BTD)
        return (normed if scale_BD is None else normed * (1 + scale_BD[:, None])).astype(h_BTD.dtype)


class CaptionBlock(Layer):
    """A refiner of caption tokens: no modulation, no gate."""

    def __call__(self, h_BLD: jax.Array, rotary: Any, ids_BL: Any) -> jax.Array:
        h_BLD = h_BLD + self.attention(h_BLD, None, rotary, ids_BL, exact_attention)
        return h_BLD + self.feed_forward(h_BLD, None)


class ZImageBlock(Layer):
    """A modulated block, on the image's tokens {"img"} or on both streams {"txt", "img"}."""

    def setup(self) -> None:
        super().setup()
        self.ada = Dense(4 * self.config.width, kernel_init=nn.initializers.zeros)

    def mods(self, context: Context) -> dict[str, tuple[jax.Array, jax.Array]]:
        scale, gate, scale2, gate2 = jnp.split(self.ada(context["c"]).astype(jnp.float32), 4, axis=-1)
        return {"attn": (scale, jnp.tanh(gate)), "mlp": (scale2, jnp.tanh(gate2))}

    def attn(self, tokens: Tokens, mods: Any, context: Context, attend: Any) -> Tokens:
        alone = "txt" not in tokens
        rotary, ids = context["image_rotary" if alone else "rotary"], None if alone else context["ids"]
        return _apart(self.attention(_joined(tokens), mods["attn"][0], rotary, ids, attend), tokens)

    def mlp(self, tokens: Tokens, mods: Any, context: Context, attend: Any) -> Tokens:
        return _apart(self.feed_forward(_joined(tokens), mods["mlp"][0]), tokens)

    def gate(self, mods: Any, branch: str) -> dict[str, jax.Array]:
        return dict.fromkeys(STREAMS, mods[branch][1][:, None])

    def __call__(self, tokens: Tokens, context: Context, attend: Any) -> None:
        """Touches every parameter once; used by `init` only."""
        mods = self.mods(context)
        self.attn(tokens, mods, context, attend)
        self.mlp(tokens, mods, context, attend)


class RefinerBlock(ZImageBlock):
    """A modulated block of image tokens."""

    def gate(self, mods: Any, branch: str) -> dict[str, jax.Array]:
        return {"img": mods[branch][1][:, None]}


def _joined(tokens: Tokens) -> jax.Array:
    return join(*(tokens[s] for s in STREAMS if s in tokens))


def _apart(h_BTD: jax.Array, like: Tokens) -> Tokens:
    names = [s for s in STREAMS if s in like]
    return dict(zip(names, cut(h_BTD, [like[s].shape[1] for s in names]), strict=True))


class Ends(nn.Module):
    """What stands before and after the blocks: embeddings of latents, caption and time, and the final layer."""

    config: ZImageConfig

    def setup(self) -> None:
        c, small = self.config, nn.initializers.normal(0.02)
        self.img = Dense(c.width)
        self.txt_norm = nn.RMSNorm(c.norm_eps, dtype=jnp.float32)
        self.txt = Dense(c.width)
        self.img_pad = self.param("img_pad", small, (c.width,))
        self.txt_pad = self.param("txt_pad", small, (c.width,))
        self.time1 = Dense(c.time_hidden, kernel_init=small)
        self.time2 = Dense(min(c.width, CONDITIONING), kernel_init=small)
        self.ada = Dense(c.width, kernel_init=nn.initializers.zeros)
        self.out = Dense(PATCH * PATCH * c.channels, kernel_init=nn.initializers.zeros)

    def caption(self, cond: dict[str, Any]) -> tuple[jax.Array, jax.Array]:
        """Embedded caption tokens [B, L, D], those of the mask first, and the length P [B] that each is filled to."""
        c = self.config
        first = jnp.argsort(cond["mask"] == 0, axis=1, stable=True)
        mask = jnp.take_along_axis(cond["mask"], first, axis=1)
        text = jnp.take_along_axis(cond["text"], first[..., None], axis=1).astype(c.dtype)
        embedded = self.txt(self.txt_norm(masked(text, mask)).astype(c.dtype))
        more = filled_up(mask.shape[1]) - mask.shape[1]
        embedded, mask = jnp.pad(embedded, ((0, 0), (0, more), (0, 0))), jnp.pad(mask, ((0, 0), (0, more)))
        tokens = jnp.where((mask != 0)[..., None], embedded, self.txt_pad.astype(c.dtype)[None, None])
        count = (mask != 0).sum(1)
        return tokens, jnp.maximum(-(-count // MULTIPLE), 1) * MULTIPLE

    def embed(self, x: jax.Array, model_time: jax.Array, known: dict[str, Any]) -> tuple[Tokens, Context]:
        c, text = self.config, known["refined"]
        t = (1000 - model_time.astype(jnp.float32)) / 1000 * c.time_scale
        time = nn.silu(self.time1(timestep_embedding(t, FREQUENCIES).astype(c.dtype)))
        img = self.img(patchify(x, PATCH).astype(c.dtype))
        more = filled_up(img.shape[1]) - img.shape[1]
        if more:
            pad = jnp.broadcast_to(self.img_pad.astype(c.dtype), (len(img), more, c.width))
            img = jnp.concatenate([img, pad], axis=1)
        image = _image_rotary(c, known["filled"], text.shape[1])
        caption = [jnp.broadcast_to(a, (len(img), *a.shape)) for a in caption_rotary(c, text.shape[1])]
        ids = caption_ids(known["filled"], text.shape[1])
        if ids is not None:
            ids = join(ids, jnp.ones(img.shape[:2], jnp.int32))
        context = {
            "c": self.time2(time),
            "ids": ids,
            "image_rotary": image,
            "rotary": tuple(join(*pair) for pair in zip(caption, image, strict=True)),
        }
        return {"txt": text, "img": img}, context

    def head(self, tokens: Tokens, context: Context) -> jax.Array:
        rows, columns = self.config.grid
        img = tokens["img"][:, : rows * columns]
        scale = self.ada(nn.silu(context["c"])).astype(jnp.float32)
        # the reference returns x0 - eps
        return -unpatchify(self.out((layer_norm(img) * (1 + scale[:, None])).astype(img.dtype)), PATCH, rows, columns)

    def __call__(self, x: jax.Array, model_time: jax.Array, cond: dict[str, Any]) -> tuple[Tokens, Context]:
        text, filled = self.caption(cond)
        tokens, context = self.embed(x, model_time, {"refined": text, "filled": filled})
        self.head(tokens, context)
        return tokens, context


def caption_rotary(c: ZImageConfig, length: int) -> tuple[jax.Array, ...]:
    """Cosines and sines [L, K/2] of caption tokens, at (1, 0, 0), (2, 0, 0), ..."""
    positions = np.zeros((length, 3))
    positions[:, 0] = 1 + np.arange(length)
    return tuple(jnp.asarray(a) for a in rotary_table(positions, c.axes_dim, c.theta))


def _image_rotary(c: ZImageConfig, filled_B: jax.Array, length: int) -> tuple[jax.Array, ...]:
    """Cosines and sines [B, N, K/2] of image tokens, whose first coordinate is one behind the sample's caption.

    On the device only the first axis depends on the sample: one row of a table of the lengths that there are.
    """
    rows, columns = c.grid
    n, more = rows * columns, filled_up(rows * columns) - rows * columns
    first = rotary_table(1.0 + MULTIPLE * np.arange(1, length // MULTIPLE + 1)[:, None], c.axes_dim[:1], c.theta)
    places = np.stack(np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij"), -1).reshape(n, 2)
    grid = rotary_table(places, c.axes_dim[1:], c.theta)
    tables = []
    for of_caption, of_place, none in zip(first, grid, (1.0, 0.0), strict=True):  # position 0 is cos 1, sin 0
        own = jnp.asarray(of_caption)[filled_B // MULTIPLE - 1][:, None]
        own = jnp.broadcast_to(own, (len(own), n, own.shape[-1]))
        both = jnp.concatenate([own, jnp.broadcast_to(of_place, (len(own), *of_place.shape))], axis=-1)
        tables.append(jnp.pad(both, ((0, 0), (0, more), (0, 0)), constant_values=none))
    return tuple(tables)


def caption_ids(filled_B: jax.Array, length: int) -> jax.Array | None:
    """Segments [B, L] of caption tokens, 0 beyond a sample's own filled length; None where none can be beyond it."""
    return None if length <= MULTIPLE else (jnp.arange(length)[None] < filled_B[:, None]).astype(jnp.int32)


def z_image(
    *,
    depth: int = 30,
    refiner_depth: int = 2,
    width: int = 3840,
    heads: int = 30,
    ffn: int | None = None,
    size: int | tuple[int, int] = 128,
    channels: int = 16,
    text_tokens: int = 512,
    text_width: int = 2560,
    time_hidden: int = 1024,
    norm_eps: float = 1e-5,
    qk_norm: bool = True,
    axes_dim: tuple[int, ...] = (32, 48, 48),
    theta: float = 256.0,
    time_scale: float = 1000.0,
    max_positions: tuple[int, ...] = (1024, 512, 512),
    dtype: str | type | np.dtype = "float32",
) -> Model:
    """Z-Image as a `Model`: latents [B, H, W, 16] -> velocity eps - x0, for the process `flow` (model time 1000 t).

    The condition is a dict: text [B, L, text_width] and mask [B, L] int32 (1: a token, 0: none; at least one 1), and
    null_text and null_mask of the same shapes (the negative prompt). Tokens whose mask is 0 are dropped, wherever they
    stand and whatever they hold, and the others count from the front: what comes out depends on their number, rounded
    up to 32, and not on L. Text of another length than `text_tokens` is taken too.

    Args:
      depth, refiner_depth: blocks of both streams (30), and of each of the two before them (2), 1 or more.
      width, heads: of the model (3840, 30).
      ffn: hidden width of the MLPs; None is width / 3 * 8, rounded down.
      size: latent height and width, even (128: images of 1024 x 1024 pixels).
      channels: of the latents (16).
      text_tokens, text_width: most caption tokens (512), and features of the text encoder (2560, Qwen3-4B).
      time_hidden: hidden width of the time's MLP (1024).
      norm_eps: of the blocks' norms and the caption's, > 0, up to 1 (1e-5; of queries and keys it is always that).
      qk_norm: are queries and keys normed per head (True).
      axes_dim: widths of the rotary sections (caption, row, column), even, adding up to width / heads ((32, 48, 48)).
      theta: base of the rotary frequencies (256).
      time_scale: what the network is told is this times 1 - t (1000).
      max_positions: places along each axis that the reference has rotary angles for; more are refused
        ((1024, 512, 512)).
      dtype: "float32" or "bfloat16", of activations and dots; norms, rotation, softmax and modulation are float32.

    Raises:
      ValueError: a geometry that does not fit.

    References: Z-Image Team 2025, arXiv:2511.22699; diffusers 0.42.1, ZImageTransformer2DModel. In bfloat16 queries and
      keys are rounded once, after norm and rotation (twice there).
    """
    c = ZImageConfig(
        depth=depth,
        refiner_depth=refiner_depth,
        width=width,
        heads=heads,
        ffn=int(width / 3 * 8) if ffn is None else ffn,
        size=(size, size) if isinstance(size, int) else (int(size[0]), int(size[1])),
        channels=channels,
        text_tokens=text_tokens,
        text_width=text_width,
        time_hidden=time_hidden,
        norm_eps=norm_eps,
        qk_norm=qk_norm,
        axes_dim=tuple(int(d) for d in axes_dim),
        theta=float(theta),
        time_scale=float(time_scale),
        max_positions=tuple(int(n) for n in max_positions),
        dtype=model_dtype("z_image", dtype),
    )
    _check(c)
    block, refiner, caption, ends = ZImageBlock(c), RefinerBlock(c), CaptionBlock(c), Ends(c)
    text, mask = (c.text_tokens, c.text_width), (c.text_tokens,)
    shapes = {"text": text, "mask": mask, "null_text": text, "null_mask": mask}
    spec = {n: jax.ShapeDtypeStruct(s, "int32" if "mask" in n else "float32") for n, s in shapes.items()}

    def init(key: jax.Array) -> Params:
        ends_key, *keys = jax.random.split(key, 4)
        x = jnp.zeros((1, *c.size, c.channels))
        cond = {name: jnp.ones((1, *s.shape), s.dtype) for name, s in spec.items()}
        (tokens, context), ends_params = ends.init_with_output(ends_key, x, jnp.zeros((1,)), cond)
        # attention has no parameters: its values stand in for it
        given = {"context": context, "attend": lambda q, k, v, segments=None: v}
        rotary = caption_rotary(c, tokens["txt"].shape[1])
        starts = {
            "caption": (
                caption,
                c.refiner_depth,
                {"h_BLD": tokens["txt"], "rotary": rotary, "ids_BL": None},
            ),
            "refiner": (refiner, c.refiner_depth, {"tokens": {"img": tokens["img"]}, **given}),
            "blocks": (block, c.depth, {"tokens": tokens, **given}),
        }
        params = {"ends": ends_params["params"]}
        for key, (name, (module, n, inputs)) in zip(keys, starts.items(), strict=True):
            one = lambda k, module=module, inputs=inputs: module.init(k, **inputs)["params"]  # noqa: E731
            params[name] = jax.vmap(one)(jax.random.split(key, n))
        return params

    def once(params: Params, cond: Any) -> dict[str, Any]:
        """The condition as refined caption tokens [B, L, D] and the lengths [B] that they are filled to."""
        h, filled = cast(Any, ends.apply({"params": params["ends"]}, cond, method="caption"))
        rotary, ids = caption_rotary(c, h.shape[1]), caption_ids(filled, h.shape[1])
        refined, _ = jax.lax.scan(
            lambda h, p: (caption.apply({"params": p}, h, rotary, ids), None), h, params["caption"]
        )
        return {"refined": refined, "filled": filled}

    def embed(params: Params, x: jax.Array, model_time: jax.Array, cond: Any) -> Any:
        known = cond if "refined" in cond else once(params, cond)
        return ends.apply({"params": params["ends"]}, x, model_time, known, method="embed")

    def head(params: Params, tokens: Tokens, context: Context) -> Any:
        return ends.apply({"params": params["ends"]}, tokens, context, method="head")

    branches, patches = ("attn", "mlp"), math.prod(c.grid)
    default = (c.depth, c.refiner_depth, c.width, c.heads) == (30, 2, 3840, 30)
    return Model(
        name="z_image" if default else f"z_image-{c.refiner_depth}+{c.depth}x{c.width}",
        init=init,
        embed=embed,
        stages=(
            Stage("refiner", c.refiner_depth, refiner, branches, streams=("img",)),
            Stage("blocks", c.depth, block, branches),
        ),
        head=head,
        null=lambda cond: {**cond, "text": cond["null_text"], "mask": cond["null_mask"]},
        input_shape=(*c.size, c.channels),
        learn_sigma=False,
        classes=0,
        dtype=c.dtype,
        cond=spec,
        once=once,
        hidden=lambda tokens: tokens["img"][:, :patches],
        shards=(
            ("/qkv/", Shard("columns", (1, 1, 1))),
            ("/fc1/", Shard("columns", (1, 1))),
            ("(blocks|refiner)/ada/", Shard("columns")),
            ("(blocks|refiner|caption)/(out|fc2)/", Shard("rows")),
        ),
    )


def _check(c: ZImageConfig) -> None:
    names = ("depth", "refiner_depth", "width", "heads", "ffn", "channels", "text_tokens", "text_width", "time_hidden")
    for name in names:
        if getattr(c, name) < 1:
            raise ValueError(f"z_image: {name}={getattr(c, name)}; allowed: 1 or more")
    if c.width % c.heads:
        raise ValueError(f"z_image: width={c.width} must be divisible by heads={c.heads}")
    if len(c.axes_dim) != 3 or any(d < 2 or d % 2 for d in c.axes_dim) or sum(c.axes_dim) * c.heads != c.width:
        raise ValueError(
            f"z_image: axes_dim={c.axes_dim}; allowed: three even widths that add up to the head width "
            f"{c.width // c.heads} of width={c.width}, heads={c.heads}"
        )
    for name in ("theta", "time_scale"):
        if not 0 < getattr(c, name) <= 1e12:
            raise ValueError(f"z_image: {name}={getattr(c, name)}; allowed: > 0, up to 1e12")
    if not 0 < c.norm_eps <= 1:
        raise ValueError(f"z_image: norm_eps={c.norm_eps}; allowed: > 0, up to 1")
    if min(c.size) < PATCH or c.size[0] % PATCH or c.size[1] % PATCH:
        raise ValueError(f"z_image: size={c.size[0]}x{c.size[1]}; allowed: even, {PATCH} or more")
    if len(c.max_positions) != 3 or min(c.max_positions) < 1:
        raise ValueError(f"z_image: max_positions={c.max_positions}; allowed: three, each 1 or more")
    # the image stands one behind the longest caption
    needed = (filled_up(c.text_tokens) + 2, *c.grid)
    if any(n > most for n, most in zip(needed, c.max_positions, strict=True)):
        raise ValueError(
            f"z_image: text_tokens={c.text_tokens}, size={c.size[0]}x{c.size[1]} have places up to {needed}; allowed: "
            f"max_positions={c.max_positions}"
        )
    tokens = filled_up(math.prod(c.grid)) + filled_up(c.text_tokens)
    check_size("z_image", c.size, c.channels, tokens, c.width // c.heads)
