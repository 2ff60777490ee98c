"""Skip-DiT: a DiT whose second half is given, block by block, what the first half gave out, the last first.

Chen et al., Accelerating Vision Diffusion Transformers with Skip Branches (Skip-DiT), 2024, arXiv:2411.17616. With L
blocks, block i >= L/2 is run on

  h <- W norm([h, h_{L-1-i}]) + b       (LayerNorm with a scale and a shift over both, in float32)

where h_j is what block j gave out; W replaces the hidden stream, it adds nothing to it. All else is a DiT's. The long
skips let a sampler compute the outermost blocks alone and take the deep hidden stream from another step (skipcache).

Shape letters: B batch, N tokens, D width.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from difax.core.contracts import Context, Model, Params, Stage
from difax.core.ops import attend
from difax.models.dit import DiTBlock, Ends, dit
from difax.models.layers import Dense

EPS = 1e-6


class SkipDiTBlock(DiTBlock):
    """A DiT block that is first given what an earlier one gave out."""

    def setup(self) -> None:
        super().setup()
        self.skip_norm = nn.LayerNorm(EPS, dtype=jnp.float32, use_fast_variance=False)
        self.skip_linear = Dense(self.config.width)

    def skip(self, h_BND: jax.Array, taken_BND: jax.Array) -> jax.Array:
        both = jnp.concatenate([h_BND, taken_BND], axis=-1)
        return self.skip_linear(self.skip_norm(both).astype(h_BND.dtype))

    def __call__(self, h_BND: jax.Array, context: Context, attend: Any) -> None:
        """Touches every parameter once; used by `init` only."""
        super().__call__(self.skip(h_BND, h_BND), context, attend)


def skip_dit(
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
    dtype: str | type | np.dtype = "float32",
) -> Model:
    """A class-conditional DiT with long skips as a `Model` of two stages, "down" and "up", of equal depth.

    Args:
      variant: "S/2" ... "XL/8": depth, width, heads and patch of a DiT (the paper's is XL/2); or None and give the four
        yourself.
      depth: of both stages together, even.
      width, heads, patch, size, channels, classes, mlp_ratio, learn_sigma, dtype: as in `difax.models.dit`.

    Raises:
      ValueError: unknown variant, an odd depth, or a geometry that does not divide.

    References: Chen et al. 2024, arXiv:2411.17616.
    """
    base = dit(
        variant,
        depth=depth,
        width=width,
        heads=heads,
        patch=patch,
        size=size,
        channels=channels,
        classes=classes,
        mlp_ratio=mlp_ratio,
        learn_sigma=learn_sigma,
        dtype=dtype,
    )
    c = base.stages[0].block.config
    if c.depth % 2:
        raise ValueError(f"skip_dit: depth={c.depth}; allowed: even, half of it before the skips and half behind")
    half, down, up, ends = c.depth // 2, DiTBlock(c), SkipDiTBlock(c), Ends(c)

    def init(key: jax.Array) -> Params:
        ends_key, *keys = jax.random.split(key, 3)
        x, label = jnp.zeros((1, *c.size, c.channels)), jnp.zeros((1,), jnp.int32)
        (tokens, context), ends_params = ends.init_with_output(ends_key, x, jnp.zeros((1,)), label)

        def stack(block: Any, key: jax.Array) -> Params:
            one = partial(block.init, h_BND=tokens, context=context, attend=attend)
            return jax.vmap(lambda k: one(k)["params"])(jax.random.split(key, half))

        return {"ends": ends_params["params"], "down": stack(down, keys[0]), "up": stack(up, keys[1])}

    return base._replace(
        name=base.name.replace("dit", "skip_dit", 1),
        init=init,
        stages=(Stage("down", half, down, ("attn", "mlp")), Stage("up", half, up, ("attn", "mlp"), takes="down")),
    )
