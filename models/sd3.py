"""Stable Diffusion 3 and 3.5: MM-DiT, a Transformer over text and image tokens with weights of their own.

Esser et al. (SD3), 2024, arXiv:2403.03206; Stability AI, Stable Diffusion 3.5, 2024,
https://github.com/Stability-AI/sd3.5. With c the sum of the time and pooled text embeddings, (shift, scale, gate)
linear in silu(c), m(h) = norm(h) (1 + scale) + shift, and one attention over the tokens of text and image together, a
block is

  h <- h + gate_1 W_o attn(m_1(h)) [+ gate_3 W_o' attn'(m_3(h))],  h <- h + gate_2 mlp(m_2(h)),

each stream with weights of its own. What is in brackets is 3.5-medium's in its first layers: a second attention, among
the image tokens alone, beside the first (both read the same h). In 3.5 queries and keys are RMS-normed per head.
Positions are added to the patches: the centre of a table of sines and cosines. The last block's text has keys and
values only, and ends there.

Layers are of three kinds, "dual" (two attentions), "joint" and "last"; a run of layers of one kind is a stage of that
name. Tokens are {"txt", "img"} in all of them; the text's update is zero where there is none.

Shape letters: B batch, L text tokens, N image tokens, T = L + N, D width, H heads, K head width, P patches of a side
of the table of positions.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from difax.core.contracts import Context, Model, Params, Shard, Stage, Tokens
from difax.core.device import check_memory
from difax.core.placement import cut, join, split
from difax.models.flux import rms_norm
from difax.models.layers import (
    Dense,
    check_size,
    gelu,
    model_dtype,
    modulate,
    patchify,
    sincos_positions,
    timestep_embedding,
    unpatchify,
)

_MEDIUM: dict[str, Any] = {"depth": 24, "width": 1536, "heads": 24, "dual_layers": (), "qk_norm": False}
_LARGE: dict[str, Any] = {"depth": 38, "width": 2432, "heads": 38, "dual_layers": (), "qk_norm": True}
VARIANTS: dict[str, dict[str, Any]] = {
    "medium": {**_MEDIUM, "position_rows": 192},
    "3.5-medium": {**_MEDIUM, "dual_layers": tuple(range(13)), "qk_norm": True, "position_rows": 384},
    "3.5-large": {**_LARGE, "position_rows": 192},
    "3.5-large-turbo": {**_LARGE, "position_rows": 192},
}
FREQUENCIES = 256
MLP_RATIO = 4


@dataclasses.dataclass(frozen=True)
class SD3Config:
    """Geometry and numerics of a Stable Diffusion 3; the arguments of `sd3` with nothing left open."""

    depth: int
    width: int
    heads: int
    dual_layers: tuple[int, ...]
    qk_norm: bool
    position_rows: int
    base_size: int
    patch: int
    size: tuple[int, int]
    channels: int
    text_tokens: int
    text_width: int
    pooled_width: int
    dtype: Any

    @property
    def grid(self) -> tuple[int, int]:
        return self.size[0] // self.patch, self.size[1] // self.patch


class LayerRun(NamedTuple):
    """Consecutive layers of one kind: a stage.

    name: the kind, with a number from the second run of it on. dual: two attentions. last: the text ends here.
    """

    name: str
    dual: bool
    last: bool
    layers: range


def layer_runs(depth: int, dual_layers: tuple[int, ...]) -> list[LayerRun]:
    """The layers as stages: of 24 with dual ones 0 ... 12, "dual" 0-12, "joint" 13-22, "last" 23.

    A last layer with two attentions is "dual_last".
    """
    edges = sorted({0, depth - 1, depth, *dual_layers, *(layer + 1 for layer in dual_layers)})
    kinds = itertools.groupby(itertools.pairwise(edges), lambda edge: (edge[0] in dual_layers, edge[0] == depth - 1))
    found, seen = [], Counter()
    for (dual, last), group in kinds:
        name = ("dual_last" if dual else "last") if last else "dual" if dual else "joint"
        seen[name] += 1
        pieces = list(group)
        number = str(seen[name]) if seen[name] > 1 else ""
        found.append(LayerRun(name + number, dual, last, range(pieces[0][0], pieces[-1][1])))
    return found


def _heads(qkv_BTD: jax.Array, heads: int, q_norm: jax.Array | None, k_norm: jax.Array | None) -> tuple[jax.Array, ...]:
    """Queries, keys (both normed, where there are norms) and values [B, T, H, K] of their product [B, T, 3 D]."""
    d = qkv_BTD.shape[-1] // 3
    q, k, v = (a.reshape(*a.shape[:2], heads, -1) for a in split(qkv_BTD, (d, d, d)))
    normed = lambda a, scale: a if scale is None else rms_norm(a, scale).astype(v.dtype)  # noqa: E731
    return normed(q, q_norm), normed(k, k_norm), v


class Stream(nn.Module):
    """The weights of one stream, text or image, of a block; `chunks` vectors modulate it."""

    config: SD3Config
    chunks: int = 6

    def setup(self) -> None:
        width = self.config.width
        self.ada = Dense(self.chunks * width, kernel_init=nn.initializers.zeros)
        self.qkv = Dense(3 * width)
        self.q_norm, self.k_norm = self._norm("q_norm"), self._norm("k_norm")
        self.behind()

    def behind(self) -> None:
        """What stands behind the attention."""
        width = self.config.width
        self.out = Dense(width)
        self.fc1 = Dense(MLP_RATIO * width)
        self.fc2 = Dense(width)

    def _norm(self, name: str) -> jax.Array | None:
        c = self.config
        return self.param(name, nn.initializers.ones, (c.width // c.heads,)) if c.qk_norm else None

    def mods(self, silu_c_BD: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(jnp.split(self.ada(silu_c_BD).astype(jnp.float32), self.chunks, axis=-1))

    def heads(self, h_BND: jax.Array, mods: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        return _heads(self.qkv(modulate(h_BND, mods[0], mods[1])), self.config.heads, self.q_norm, self.k_norm)

    def attended(self, o_BND: jax.Array) -> jax.Array:
        return self.out(o_BND)

    def mlp(self, h_BND: jax.Array, mods: tuple[jax.Array, ...]) -> jax.Array:
        return self.fc2(gelu(self.fc1(modulate(h_BND, mods[3], mods[4]))))


class DualStream(Stream):
    """The image's stream of a block with two attentions: nine vectors modulate it."""

    chunks: int = 9

    def setup(self) -> None:
        super().setup()
        self.qkv2 = Dense(3 * self.config.width)
        self.q_norm2, self.k_norm2 = self._norm("q_norm2"), self._norm("k_norm2")
        self.out2 = Dense(self.config.width)

    def heads2(self, h_BND: jax.Array, mods: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        return _heads(self.qkv2(modulate(h_BND, mods[6], mods[7])), self.config.heads, self.q_norm2, self.k_norm2)

    def attended2(self, o_BND: jax.Array) -> jax.Array:
        return self.out2(o_BND)


class LastStream(Stream):
    """The text's stream of the last block: it is attended to, and not updated."""

    chunks: int = 2

    def behind(self) -> None:
        """Nothing: the text ends here."""

    def mods(self, silu_c_BD: jax.Array) -> tuple[jax.Array, ...]:
        shift, scale = super().mods(silu_c_BD)
        return (shift, scale, *4 * (jnp.zeros_like(shift),))

    def attended(self, o_BND: jax.Array) -> jax.Array:
        return jnp.zeros_like(o_BND)

    def mlp(self, h_BND: jax.Array, mods: tuple[jax.Array, ...]) -> jax.Array:
        return jnp.zeros_like(h_BND)


class JointBlock(nn.Module):
    """Text and image with weights of their own and one attention over both; `last`: the text is not updated."""

    config: SD3Config
    last: bool = False

    def setup(self) -> None:
        self.txt = (LastStream if self.last else Stream)(self.config)
        self.img = self.image()

    def image(self) -> Stream:
        return Stream(self.config)

    def mods(self, context: Context) -> dict[str, tuple[jax.Array, ...]]:
        return {"txt": self.txt.mods(context["silu_c"]), "img": self.img.mods(context["silu_c"])}

    def attn(self, tokens: Tokens, mods: Any, context: Context, attend: Any) -> Tokens:
        img = self.img.heads(tokens["img"], mods["img"])
        txt = self.txt.heads(tokens["txt"], mods["txt"])
        o = attend(*(join(*pair) for pair in zip(txt, img, strict=True)))
        o_txt, o_img = cut(o.reshape(*o.shape[:2], -1), [tokens[s].shape[1] for s in ("txt", "img")])
        return {"txt": self.txt.attended(o_txt), "img": self.img.attended(o_img)}

    def mlp(self, tokens: Tokens, mods: Any, context: Context, attend: Any) -> Tokens:
        return {"txt": self.txt.mlp(tokens["txt"], mods["txt"]), "img": self.img.mlp(tokens["img"], mods["img"])}

    def gate(self, mods: Any, branch: str) -> dict[str, jax.Array]:
        place = {"attn": 2, "mlp": 5}[branch]
        return {stream: vectors[place][:, None] for stream, vectors in mods.items()}

    def __call__(self, tokens: Tokens, context: Context, attend: Any) -> None:
        """Touches every parameter once; used by `init` only."""
        mods = self.mods(context)
        self.attn(tokens, mods, context, attend)
        self.mlp(tokens, mods, context, attend)


class DualBlock(JointBlock):
    """A block with a second attention, among the image tokens, beside the first."""

    def image(self) -> Stream:
        return DualStream(self.config)

    def attn2(self, tokens: Tokens, mods: Any, context: Context, attend: Any) -> Tokens:
        o = attend(*self.img.heads2(tokens["img"], mods["img"]))
        return {"txt": jnp.zeros_like(tokens["txt"]), "img": self.img.attended2(o.reshape(*o.shape[:2], -1))}

    def gate(self, mods: Any, branch: str) -> dict[str, jax.Array]:
        if branch != "attn2":
            return super().gate(mods, branch)
        return {"txt": jnp.zeros((1, 1, 1)), "img": mods["img"][8][:, None]}

    def __call__(self, tokens: Tokens, context: Context, attend: Any) -> None:
        """Touches every parameter once; used by `init` only."""
        super().__call__(tokens, context, attend)
        self.attn2(tokens, self.mods(context), context, attend)


class Ends(nn.Module):
    """What stands before and after the blocks: embeddings of latents, text and time, and the final layer."""

    config: SD3Config

    def setup(self) -> None:
        c = self.config
        narrow = partial(Dense, c.width, kernel_init=nn.initializers.normal(0.02))
        self.patch = Dense(c.width)
        self.positions = self.param("positions", self._positions)
        self.text = Dense(c.width)
        self.time1, self.time2 = narrow(), narrow()
        self.pooled1, self.pooled2 = narrow(), narrow()
        self.ada = Dense(2 * c.width, kernel_init=nn.initializers.zeros)
        self.out = Dense(c.patch * c.patch * c.channels, kernel_init=nn.initializers.zeros)

    def _positions(self, key: jax.Array) -> jax.Array:
        """[P P, D], put together on the device: the columns' half, then the rows'."""
        c, side = self.config, self.config.position_rows
        half = jnp.asarray(sincos_positions(c.width, 1, side, c.base_size)[:, : c.width // 2])
        shape = (side, side, c.width // 2)
        table = [jnp.broadcast_to(half[None], shape), jnp.broadcast_to(half[:, None], shape)]
        return jnp.concatenate(table, axis=-1).reshape(side * side, c.width)

    def once(self, cond: dict[str, Any]) -> dict[str, Any]:
        """The condition as the text's tokens [B, L, D] and the vector [B, D] of the pooled text."""
        dtype = self.config.dtype
        pooled = self.pooled2(nn.silu(self.pooled1(cond["pooled"].astype(dtype))))
        return {"projected": self.text(cond["text"].astype(dtype)), "vector": pooled}

    def embed(self, x: jax.Array, model_time: jax.Array, cond: dict[str, Any]) -> tuple[Tokens, Context]:
        c = self.config
        cond = cond if "projected" in cond else self.once(cond)
        (rows, columns), side = c.grid, c.position_rows
        top, left = (side - rows) // 2, (side - columns) // 2
        table = self.positions.reshape(side, side, c.width)[top : top + rows, left : left + columns]
        # the table is fixed, in training too
        positions = jax.lax.stop_gradient(table).reshape(1, rows * columns, c.width).astype(c.dtype)
        img = self.patch(patchify(x, c.patch).astype(c.dtype)) + positions
        time = self.time2(nn.silu(self.time1(timestep_embedding(model_time, FREQUENCIES).astype(c.dtype))))
        return {"txt": cond["projected"], "img": img}, {"silu_c": nn.silu(time + cond["vector"])}

    def head(self, tokens: Tokens, context: Context) -> jax.Array:
        shift, scale = jnp.split(self.ada(context["silu_c"]).astype(jnp.float32), 2, axis=-1)
        return unpatchify(self.out(modulate(tokens["img"], shift, scale)), self.config.patch, *self.config.grid)

    def __call__(self, x: jax.Array, model_time: jax.Array, cond: dict[str, jax.Array]) -> tuple[Tokens, Context]:
        tokens, context = self.embed(x, model_time, cond)
        self.head(tokens, context)
        return tokens, context


def sd3(
    variant: str | None = None,
    *,
    depth: int | None = None,
    width: int | None = None,
    heads: int | None = None,
    dual_layers: tuple[int, ...] | None = None,
    qk_norm: bool | None = None,
    position_rows: int | None = None,
    base_size: int = 64,
    patch: int = 2,
    size: int | tuple[int, int] = 128,
    channels: int = 16,
    text_tokens: int = 333,
    text_width: int = 4096,
    pooled_width: int = 2048,
    dtype: str | type | np.dtype = "float32",
) -> Model:
    """Stable Diffusion 3 or 3.5 as a `Model`: latents [B, H, W, 16] -> velocity eps - x0, for the process `flow` (model
    time 1000 t).

    The condition is {"text": [B, L, text_width] (CLIP's two side by side, padded with zeros, and T5's behind them),
    "pooled": [B, pooled_width] (both CLIP's), "null_text", "null_pooled": those of the unconditional half}. Text of
    another length than `text_tokens` is taken too.

    Args:
      variant: "medium" (3), "3.5-medium", "3.5-large", "3.5-large-turbo" (3.5-large's geometry), or None for a geometry
        that is given.
      depth, width, heads: of the model, 1 or more; width divisible by heads and by 4. A variant's, or given.
      dual_layers: the layers with two attentions, of 0 ... depth - 1 (0 ... 12 in 3.5-medium, else none).
      qk_norm: are queries and keys normed (in 3.5).
      position_rows: sides of the table of positions, in patches (192; 384 in 3.5-medium). Latents take its centre.
      base_size: patches of a side of the images trained on, 1 or more (64): the spacing of the table that `init` makes.
        Checkpoints bring their own.
      patch: side of a token's square of latents (2).
      size: latent height and width, divisible by patch (128: images of 1024 x 1024 pixels).
      channels: of the latents (16).
      text_tokens: length of the text (333: 77 of CLIP, 256 of T5).
      text_width, pooled_width: of the text encoders' outputs (4096, 2048).
      dtype: "float32" or "bfloat16", of activations and dots; norms, softmax and modulation are float32.

    Raises:
      ValueError: unknown variant, a geometry that is left open or does not fit.

    References: Esser et al. 2024, arXiv:2403.03206; Stability AI 2024, https://github.com/Stability-AI/sd3.5. The
      function is that of diffusers' SD3Transformer2DModel; its layers cannot be skipped one by one (skip-layer
      guidance).
    """
    if variant is not None and variant not in VARIANTS:
        raise ValueError(f"unknown SD3 variant {variant!r}; allowed: {', '.join(VARIANTS)}")
    given = {"depth": depth, "width": width, "heads": heads, "position_rows": position_rows}
    given |= {"dual_layers": dual_layers, "qk_norm": qk_norm}
    preset: dict[str, Any] = {"dual_layers": (), "qk_norm": False} if variant is None else VARIANTS[variant]
    geometry: dict[str, Any] = {name: preset.get(name) if value is None else value for name, value in given.items()}
    missing = [name for name, value in geometry.items() if value is None]
    if missing:
        raise ValueError(f"sd3: {', '.join(missing)} missing; give it, or a variant: {', '.join(VARIANTS)}")
    c = SD3Config(
        **{**geometry, "dual_layers": tuple(sorted(geometry["dual_layers"]))},
        base_size=base_size,
        patch=patch,
        size=(size, size) if isinstance(size, int) else (int(size[0]), int(size[1])),
        channels=channels,
        text_tokens=text_tokens,
        text_width=text_width,
        pooled_width=pooled_width,
        dtype=model_dtype("sd3", dtype),
    )
    _check(c)
    runs, ends = layer_runs(c.depth, c.dual_layers), Ends(c)
    blocks = {run.name: (DualBlock if run.dual else JointBlock)(c, run.last) for run in runs}
    shapes: dict[str, tuple[int, ...]] = {"text": (c.text_tokens, c.text_width), "pooled": (c.pooled_width,)}
    shapes |= {f"null_{name}": shape for name, shape in shapes.items()}
    spec = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}

    def init(key: jax.Array) -> Params:
        ends_key, *keys = jax.random.split(key, 1 + len(runs))
        x = jnp.zeros((1, *c.size, c.channels))
        cond = jax.tree.map(lambda s: jnp.zeros((1, *s.shape)), spec)
        (tokens, context), ends_params = ends.init_with_output(ends_key, x, jnp.zeros((1,)), cond)

        def stack(run: LayerRun, key: jax.Array) -> Params:
            # attention has no parameters: its values stand in for it
            one = partial(blocks[run.name].init, tokens=tokens, context=context, attend=lambda q, k, v: v)
            return jax.vmap(lambda k: one(k)["params"])(jax.random.split(key, len(run.layers)))

        stacks = {run.name: stack(run, key) for run, key in zip(runs, keys, strict=True)}
        return {"ends": ends_params["params"], **stacks}

    def embed(params: Params, x: jax.Array, model_time: jax.Array, cond: dict[str, jax.Array]) -> Any:
        return ends.apply({"params": params["ends"]}, x, model_time, cond, method="embed")

    def once(params: Params, cond: Any) -> Any:
        return ends.apply({"params": params["ends"]}, cond, method="once")

    def head(params: Params, tokens: Tokens, context: Context) -> Any:
        return ends.apply({"params": params["ends"]}, tokens, context, method="head")

    def stage(run: LayerRun) -> Stage:
        if not run.dual:
            return Stage(run.name, len(run.layers), blocks[run.name], ("attn", "mlp"))
        return Stage(run.name, len(run.layers), blocks[run.name], ("attn", "attn2", "mlp"), beside=("attn2",))

    return Model(
        name=f"sd3-{variant or f'{c.depth}x{c.width}'}",
        init=init,
        embed=embed,
        stages=tuple(map(stage, runs)),
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
            ("/qkv2?/", Shard("columns", (1, 1, 1))),
            ("/fc1/|(img|txt)/ada/", Shard("columns")),
            ("(img|txt)/(out2?|fc2)/", Shard("rows")),
        ),
    )


def _check(c: SD3Config) -> None:
    names = ("depth", "width", "heads", "position_rows", "base_size", "patch", "channels", "text_tokens", "text_width")
    for name in (*names, "pooled_width"):
        if getattr(c, name) < 1:
            raise ValueError(f"sd3: {name}={getattr(c, name)}; allowed: 1 or more")
    if c.width % c.heads or c.width % 4:
        raise ValueError(f"sd3: width={c.width} must be divisible by heads={c.heads} and by 4")
    wrong = [layer for layer in c.dual_layers if not 0 <= layer < c.depth]
    if wrong or len(set(c.dual_layers)) < len(c.dual_layers):
        raise ValueError(f"sd3: dual_layers={c.dual_layers}; allowed: layers of 0 ... {c.depth - 1}, each once")
    if min(c.size) < 1 or c.size[0] % c.patch or c.size[1] % c.patch:
        raise ValueError(f"sd3: size={c.size[0]}x{c.size[1]} must be divisible by patch={c.patch}")
    if max(c.grid) > c.position_rows:
        raise ValueError(
            f"sd3: size={c.size[0]}x{c.size[1]} with patch={c.patch}; allowed: sides up to "
            f"{c.position_rows * c.patch}, by the table of positions (position_rows={c.position_rows})"
        )
    check_size("sd3", c.size, c.channels, math.prod(c.grid) + c.text_tokens, c.width)
    table = f"sd3: position_rows={c.position_rows} of width={c.width}"
    check_memory(table, 4 * c.position_rows**2 * c.width, None, "a smaller table")
