"""Pieces that several architectures share: a dense layer around `difax.core.ops.dot`, embeddings, patches."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from difax.core.device import check_memory
from difax.core.ops import dot, layer_norm
from difax.core.placement import split

DTYPES = ("float32", "bfloat16")


def model_dtype(name: str, dtype: str | type | np.dtype) -> np.dtype:
    """The dtype of a model's activations and products; ValueError for another than those of `DTYPES`."""
    try:
        found = str(dtype) if isinstance(dtype, str) else str(jnp.dtype(dtype))
    except TypeError:  # a type that no array has
        found = getattr(dtype, "__name__", str(dtype))
    if found not in DTYPES:
        raise ValueError(f"{name}: dtype={found}; allowed: {', '.join(DTYPES)}")
    return jnp.dtype(found)


def check_size(name: str, size: Sequence[int], channels: int, tokens: int, features: int) -> None:
    """Refuses an input whose latents, or the float64 tables of its positions, do not fit into the host's memory.

    Arithmetic alone: nothing is allocated.

    Args:
      size: of the input, behind the batch and before its channels. tokens: of all streams together.
      features: that a token has in the table of positions.
    """
    shown = "x".join(map(str, size))
    needed = 16 * math.prod(size) * channels + 32 * tokens * (features + 1)
    what = f"{name}: size={shown} of channels={channels}, {tokens} tokens with {features} features of position each"
    check_memory(what, needed, None, "a smaller size or width")


class Dense(nn.Module):
    """y = dot(x, kernel, bias), the bias 0 without one; the kernel may be any type that `difax.core.ops.dot` knows."""

    features: int
    kernel_init: nn.initializers.Initializer = nn.initializers.xavier_uniform()
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if self.is_initializing():
            kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features))
        else:  # `param` would hold a packed weight against the shape of the array that it stands for
            kernel = self.get_variable("params", "kernel")
        if not self.use_bias:
            return dot(x, kernel, jnp.zeros((self.features,), x.dtype))
        return dot(x, kernel, self.param("bias", nn.initializers.zeros, (self.features,)))


def affine_norm(eps: float) -> nn.LayerNorm:
    """LayerNorm with a scale and a shift of its own, computed and returned in float32."""
    return nn.LayerNorm(eps, dtype=jnp.float32, use_fast_variance=False)


def gelu(x: jax.Array) -> jax.Array:
    """The tanh approximation of GELU, in float32 (a bfloat16 tanh is 3 times slower on CPU, and less exact)."""
    return nn.gelu(x.astype(jnp.float32), approximate=True).astype(x.dtype)


# name, as diffusers' FeedForward has it -> (widths of the first product, what becomes of them)
ACTIVATIONS: dict[str, tuple[int, Callable[..., jax.Array]]] = {
    "gelu-approximate": (1, partial(nn.gelu, approximate=True)),
    "gelu": (1, partial(nn.gelu, approximate=False)),
    "geglu": (2, lambda x, gate: x * nn.gelu(gate, approximate=False)),
    "geglu-approximate": (1, lambda x: x * nn.sigmoid(1.702 * x)),
    "swiglu": (2, lambda x, gate: x * nn.silu(gate)),
    "linear-silu": (1, nn.silu),
}


def activate(x: jax.Array, name: str) -> jax.Array:
    """An activation of `ACTIVATIONS`, in float32 and returned in the dtype of x; gated ones halve the last axis."""
    widths, function = ACTIVATIONS[name]
    return function(*split(x.astype(jnp.float32), widths * (x.shape[-1] // widths,))).astype(x.dtype)


def modulate(
    x_BND: jax.Array,
    shift_BD: jax.Array,
    scale_BD: jax.Array,
    eps: float = 1e-6,
    norm: Callable[[jax.Array], jax.Array] | None = None,
) -> jax.Array:
    """norm(x) (1 + scale) + shift, computed in float32 and returned in the dtype of x.

    Args:
      shift_BD, scale_BD: of all tokens; [B, N, D] where each has its own.
      norm: in place of the LayerNorm without a scale and a shift of its own.
    """
    normed = layer_norm(x_BND, eps) if norm is None else norm(x_BND)
    shift, scale = (a[:, None] if a.ndim == 2 else a for a in (shift_BD, scale_BD))
    return (normed * (1 + scale) + shift).astype(x_BND.dtype)


def masked(x_BLT: jax.Array, mask_BL: jax.Array) -> jax.Array:
    """x where the mask is not 0, and 0 elsewhere: what stands in a token that does not exist never matters, not even
    where it is no number."""
    return jnp.where((mask_BL != 0)[..., None], x_BLT, jnp.zeros((), x_BLT.dtype))


def timestep_embedding(t: jax.Array, width: int, shift: int = 0, max_period: float = 10_000.0) -> jax.Array:
    """[cos(t f_j), sin(t f_j)] with f_j = max_period^(-j/(width/2 - shift)), in float32.

    The exponents are rounded to float32, as in the references: f_j is then up to 6e-7 off, and the angle of a guidance
    scale times 1000 that much of thousands.

    Args:
      t: [B] model times.
      width: even number of features.
      shift: 0 in the original DiT, 1 in diffusers; the two are different functions of t.
    """
    half = width // 2
    exponent = np.float32(-math.log(max_period)) * np.arange(half, dtype=np.float32) / np.float32(half - shift)
    f = np.exp(exponent.astype(np.float64)).astype(np.float32)
    angle = t.astype(jnp.float32)[:, None] * f[None]
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


def sincos_positions(
    width: int, rows: int, columns: int, base_size: int | None = None, interpolation_scale: float = 1.0
) -> np.ndarray:
    """Fixed 2-D sine-cosine positions of a grid, or of one that is stretched to the extent that was trained on.

    Token (i, j) stands at (i, j), or with a base size at (i base_size/rows, j base_size/columns)/interpolation_scale.

    Args:
      width: features, divisible by 4: the first half comes from the column, the second from the row.
      rows, columns: of the grid of patches.
      base_size: rows of the square grid that the weights were trained on, 1 or more; None stretches nothing.
      interpolation_scale: how many times finer that grid is than the one of the first training stage, > 0 (1).

    Returns:
      [rows columns, width] float32.
    """

    def axis(n: int) -> np.ndarray:
        place = np.arange(n) * ((1.0 if base_size is None else base_size / n) / interpolation_scale)
        angle = place[:, None] * 10_000.0 ** (-np.arange(width // 4) / (width / 4))
        return np.concatenate([np.sin(angle), np.cos(angle)], axis=1)

    column, row = np.broadcast_arrays(axis(columns)[None], axis(rows)[:, None])
    return np.concatenate([column, row], axis=-1).reshape(rows * columns, width).astype(np.float32)


def patchify(x_BHWC: jax.Array, patch: int) -> jax.Array:
    """[B, H, W, C] -> [B, (H/p)(W/p), p p C]; a patch's features run over row, column, channel."""
    b, h, w, c = x_BHWC.shape
    x = x_BHWC.reshape(b, h // patch, patch, w // patch, patch, c).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, (h // patch) * (w // patch), patch * patch * c)


def unpatchify(x_BNP: jax.Array, patch: int, rows: int, columns: int) -> jax.Array:
    """The inverse of `patchify`: [B, rows * columns, p p C] -> [B, rows p, columns p, C]."""
    b, _, features = x_BNP.shape
    c = features // (patch * patch)
    x = x_BNP.reshape(b, rows, columns, patch, patch, c).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, rows * patch, columns * patch, c)
