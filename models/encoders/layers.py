"""What the text encoders share: a norm, a table of embeddings, activations, and how modules become an encoder."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from difax.core.contracts import Context, Params

# as transformers' configurations name them
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": nn.relu,
    "gelu": partial(nn.gelu, approximate=False),
    "gelu_new": partial(nn.gelu, approximate=True),
    "gelu_pytorch_tanh": partial(nn.gelu, approximate=True),
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
    "silu": nn.silu,
}


def activate(x: jax.Array, name: str) -> jax.Array:
    """An activation of `ACTIVATIONS`, in float32 and returned in the dtype of x."""
    return ACTIVATIONS[name](x.astype(jnp.float32)).astype(x.dtype)


def gated(x: jax.Array, gate: jax.Array, name: str) -> jax.Array:
    """x activation(gate), in float32 and returned in the dtype of x."""
    return (ACTIVATIONS[name](gate.astype(jnp.float32)) * x.astype(jnp.float32)).astype(x.dtype)


class RMSNorm(nn.Module):
    """x / sqrt(mean x^2 + eps) (offset + scale), in float32 and returned in the dtype of x."""

    eps: float
    offset: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        # the scale stands for no change at the beginning, whatever the offset
        scale = self.param("scale", nn.initializers.constant(1.0 - self.offset), (x.shape[-1],))
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt((x32 * x32).mean(-1, keepdims=True) + self.eps)
        weight = self.offset + scale.astype(jnp.float32)
        return (normed * weight.reshape((1,) * (x.ndim - 1) + (-1,))).astype(x.dtype)


class Tokens(nn.Module):
    """A table of embeddings [vocabulary, width], or the part of it that was looked up already."""

    vocabulary: int
    width: int

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        if self.is_initializing():
            table = self.param("embedding", nn.initializers.normal(0.02), (self.vocabulary, self.width))
        else:  # `param` would hold the rows of a text against the shape of the whole table
            table = self.get_variable("params", "embedding")
        return table[ids]


TEXT = (((1, 2), "int32"), ((1, 2), "int32"))  # shapes and types of the smallest ids and mask


def functions(
    ends: Any,
    block: Any,
    depth: int,
    attend: Callable[..., Any],
    inputs: tuple[tuple[tuple[int, ...], str], ...] = TEXT,
    pools: bool = True,
) -> Mapping[str, Any]:
    """The functions of a `TextEncoder` made of two stateless modules.

    Equal modules have the same functions, so that what was compiled for an encoder serves whenever it is found again.

    Args:
      ends: with the methods embed(*inputs) -> (x, context), norm(x), pool(x, *more), and a __call__ that touches every
        parameter and returns what `embed` does. block: __call__(x, context, attend) -> x.
      attend: as `difax.models.encoders.attention.attend`. inputs: shapes and types that `embed` can be given. pools: is
        there something pooled.
    """
    return _functions(ends, block, depth, attend, inputs, pools)


@functools.lru_cache(maxsize=32)
def _functions(ends: Any, block: Any, depth: int, attend: Any, inputs: Any, pools: bool) -> Mapping[str, Any]:
    def init(key: jax.Array) -> Params:
        ends_key, blocks_key = jax.random.split(key)
        (x, context), found = ends.init_with_output(ends_key, *(jnp.ones(*one) for one in inputs))
        one = lambda k: block.init(k, x, context, attend)["params"]  # noqa: E731
        return {"ends": found["params"], "blocks": jax.vmap(one)(jax.random.split(blocks_key, depth))}

    def embed(params: Params, *given: jax.Array) -> tuple[jax.Array, Context]:
        return ends.apply({"params": params}, *given, method="embed")

    def apply_block(params: Params, x: jax.Array, context: Context) -> jax.Array:
        return block.apply({"params": params}, x, context, attend)

    def norm(params: Params, x: jax.Array) -> jax.Array:
        return ends.apply({"params": params}, x, method="norm")

    def pool(params: Params, x: jax.Array, *more: jax.Array) -> dict[str, jax.Array]:
        return ends.apply({"params": params}, x, *more, method="pool")

    found = {"init": init, "embed": embed, "block": apply_block, "norm": norm, "pool": pool if pools else None}
    return MappingProxyType(found)


def as_heads(x: jax.Array, width: int) -> jax.Array:
    """[B, T, H K] -> [B, T, H, K]."""
    return x.reshape(*x.shape[:2], -1, width)


def check_least(what: str, values: dict[str, Any], least: int = 1) -> None:
    """Raises ValueError for a whole number below the least: the factory, the key and the value."""
    for name, value in values.items():
        if value < least:
            raise ValueError(f"{what}: {name}={value}; allowed: {least} or more")
