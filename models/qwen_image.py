"""Qwen-Image: a Transformer over text and image tokens in two streams throughout.

Qwen Team, Qwen-Image Technical Report, 2025, arXiv:2508.02324. Its blocks are FLUX.1's double blocks (`DoubleBlock`),
modulated by the time alone; text tokens are RMS-normed before their projection, and those that do not exist are masked.

Positions (frame, row, column) are centred: of h x w image tokens, (i, j) stands at (0, i - h + h//2, j - w + w//2), and
text token l at max(h//2, w//2) + l on all three axes, whether it exists or not: the text behind a prompt's end changes
nothing. The function is that of diffusers' QwenImageTransformer2DModel for text alone.

Shape letters: B batch, L text tokens, N image tokens, T = L + N, D width, H heads, K head width.
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
from difax.core.placement import join
from difax.models.flux import FREQUENCIES, PATCH, DoubleBlock, check_streams, pack, rms_norm, unpack, values
from difax.models.layers import Dense, check_size, masked, model_dtype, modulate, timestep_embedding
from difax.models.rope import rotary_table

THETA = 10_000.0


@dataclasses.dataclass(frozen=True)
class QwenImageConfig:
    """Geometry and numerics of a Qwen-Image; see `qwen_image` for the fields."""

    depth: int
    width: int
    heads: int
    size: tuple[int, int]
    channels: int
    text_tokens: int
    text_width: int
    axes_dim: tuple[int, ...]
    mlp_ratio: int
    dtype: Any

    @property
    def grid(self) -> tuple[int, int]:
        return self.size[0] // PATCH, self.size[1] // PATCH


def centred_positions(text_tokens: int, rows: int, columns: int) -> np.ndarray:
    """Coordinates [L + N, 3] (frame, row, column) of text tokens and then of image tokens, whose middle is 0."""
    text = max(rows // 2, columns // 2) + np.arange(text_tokens)
    row, column = np.meshgrid(
        np.arange(rows) - (rows - rows // 2), np.arange(columns) - (columns - columns // 2), indexing="ij"
    )
    image = np.stack([np.zeros(rows * columns), row.ravel(), column.ravel()], axis=1)
    return np.concatenate([np.repeat(text[:, None], 3, axis=1), image])


class Ends(nn.Module):
    """What stands before and after the blocks: embeddings of latents, text and time, and the final layer."""

    config: QwenImageConfig

    def setup(self) -> None:
        c = self.config
        narrow = partial(Dense, c.width, kernel_init=nn.initializers.normal(0.02))
        self.img = Dense(c.width)
        self.txt_norm = self.param("txt_norm", nn.initializers.ones, (c.text_width,))
        self.txt = Dense(c.width)
        self.time1, self.time2 = narrow(), narrow()
        self.ada = Dense(2 * c.width, kernel_init=nn.initializers.zeros)
        self.out = Dense(PATCH * PATCH * c.channels, kernel_init=nn.initializers.zeros)

    def once(self, cond: dict[str, Any]) -> dict[str, Any]:
        """The condition as the text's tokens [B, L, D], and which of them there are."""
        text = masked(cond["text"].astype(self.config.dtype), cond["mask"])
        return {"projected": self.txt(rms_norm(text, self.txt_norm).astype(text.dtype)), "mask": cond["mask"]}

    def embed(self, x: jax.Array, model_time: jax.Array, cond: dict[str, Any]) -> tuple[Tokens, Context]:
        c = self.config
        cond = cond if "projected" in cond else self.once(cond)
        time = self.time2(nn.silu(self.time1(timestep_embedding(model_time, FREQUENCIES).astype(c.dtype))))
        tokens = {"txt": cond["projected"], "img": self.img(pack(x).astype(c.dtype))}
        text = tokens["txt"].shape[1]
        tables = (jnp.asarray(a) for a in rotary_table(centred_positions(text, *c.grid), c.axes_dim, THETA))
        cos, sin = (join(a[:text], a[text:], axis=0) for a in tables)  # in the order of the joined tokens
        mask = cond["mask"].astype(jnp.int32)
        mask = join(mask, jnp.ones(tokens["img"].shape[:2], jnp.int32))
        return tokens, {"silu_c": nn.silu(time), "cos": cos, "sin": sin, "mask": mask}

    def head(self, tokens: Tokens, context: Context) -> jax.Array:
        shift, scale = jnp.split(self.ada(context["silu_c"]).astype(jnp.float32), 2, axis=-1)
        return unpack(self.out(modulate(tokens["img"], shift, scale)), *self.config.grid)

    def __call__(self, x: jax.Array, model_time: jax.Array, cond: dict[str, jax.Array]) -> tuple[Tokens, Context]:
        tokens, context = self.embed(x, model_time, cond)
        self.head(tokens, context)
        return tokens, context


def qwen_image(
    *,
    depth: int = 60,
    width: int = 3072,
    heads: int = 24,
    size: int | tuple[int, int] = 128,
    channels: int = 16,
    text_tokens: int = 512,
    text_width: int = 3584,
    axes_dim: tuple[int, ...] = (16, 56, 56),
    mlp_ratio: int = 4,
    dtype: str | type | np.dtype = "float32",
) -> Model:
    """Qwen-Image as a `Model`: latents [B, H, W, 16] -> velocity eps - x0, for the process `flow` (model time 1000 t).

    The condition is {"text": [B, L, text_width] (the last state of Qwen2.5-VL, behind the template's beginning),
    "mask": [B, L] int32 (1: a token, 0: padding, whose text does not matter), "null_text", "null_mask": those of the
    unconditional half, the negative prompt's}. Text of another length than `text_tokens` is taken too.

    Args:
      depth: blocks, 1 or more (60).
      width, heads: of the model (3072, 24).
      size: latent height and width, even (128: images of 1024 x 1024 pixels).
      channels: of the latents (16).
      text_tokens: length to which texts are padded (512, the pipeline's; up to 1024 there).
      text_width: of the text encoder's states (3584, Qwen2.5-VL-7B).
      axes_dim: widths of the rotary sections (frame, row, column), even, adding up to width / heads ((16, 56, 56)).
      mlp_ratio: hidden over model width of the MLPs (4).
      dtype: "float32" or "bfloat16", of activations and dots; norms, rotation, softmax and modulation are float32.

    Raises:
      ValueError: a geometry that does not fit.

    References: Qwen Team 2025, arXiv:2508.02324. Angles are made in float64, in the reference in float32; that has
      tables for 4096 positions, here there is no end.
    """
    c = QwenImageConfig(
        depth=depth,
        width=width,
        heads=heads,
        size=(size, size) if isinstance(size, int) else (int(size[0]), int(size[1])),
        channels=channels,
        text_tokens=text_tokens,
        text_width=text_width,
        axes_dim=tuple(int(d) for d in axes_dim),
        mlp_ratio=mlp_ratio,
        dtype=model_dtype("qwen_image", dtype),
    )
    _check(c)
    block, ends = DoubleBlock(c), Ends(c)
    spec = _condition(c)

    def init(key: jax.Array) -> Params:
        ends_key, blocks_key = jax.random.split(key)
        x = jnp.zeros((1, *c.size, c.channels))
        cond = jax.tree.map(lambda s: jnp.ones((1, *s.shape), s.dtype), spec)
        (tokens, context), ends_params = ends.init_with_output(ends_key, x, jnp.zeros((1,)), cond)
        one = partial(block.init, tokens=tokens, context=context, attend=values)
        stacked = jax.vmap(lambda k: one(k)["params"])(jax.random.split(blocks_key, c.depth))
        return {"ends": ends_params["params"], "double": stacked}

    def embed(params: Params, x: jax.Array, model_time: jax.Array, cond: dict[str, jax.Array]) -> Any:
        return ends.apply({"params": params["ends"]}, x, model_time, cond, method="embed")

    def once(params: Params, cond: Any) -> Any:
        return ends.apply({"params": params["ends"]}, cond, method="once")

    def head(params: Params, tokens: Tokens, context: Context) -> Any:
        return ends.apply({"params": params["ends"]}, tokens, context, method="head")

    published = (c.depth, c.width, c.heads) == (60, 3072, 24)
    return Model(
        name="qwen-image" if published else f"qwen-image-{c.depth}x{c.width}",
        init=init,
        embed=embed,
        stages=(Stage("double", c.depth, block, ("attn", "mlp")),),
        head=head,
        null=lambda cond: {**cond, "text": cond["null_text"], "mask": cond["null_mask"]},
        input_shape=(*c.size, c.channels),
        learn_sigma=False,
        classes=0,
        dtype=c.dtype,
        cond=spec,
        once=once,
        hidden=lambda tokens: tokens["img"],
        shards=(
            ("/qkv/", Shard("columns", (1, 1, 1))),
            ("/fc1/|double/.*/ada/", Shard("columns")),
            ("double/.*/(out|fc2)/", Shard("rows")),
        ),
    )


def _condition(c: QwenImageConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of one sample's condition."""
    text = jax.ShapeDtypeStruct((c.text_tokens, c.text_width), jnp.float32)
    mask = jax.ShapeDtypeStruct((c.text_tokens,), jnp.int32)
    return {"text": text, "mask": mask, "null_text": text, "null_mask": mask}


def _check(c: QwenImageConfig) -> None:
    counts = ("depth", "width", "heads", "channels", "text_tokens", "text_width", "mlp_ratio")
    check_streams("qwen_image", c, counts, 3)
    if min(c.size) < PATCH or c.size[0] % PATCH or c.size[1] % PATCH:
        raise ValueError(f"qwen_image: size={c.size[0]}x{c.size[1]}; allowed: even, {PATCH} or more")
    check_size("qwen_image", c.size, c.channels, math.prod(c.grid) + c.text_tokens, c.width // c.heads)
