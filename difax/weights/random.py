"""Random weights to draw with: a model's own initialisation, with noise where that is all zero.

Training starts a network as the identity (adaLN-Zero's gates and the final layer are zero), and such a network draws
zero whatever is done to it: every cache, precision and attention would give the same picture.
"""

from __future__ import annotations

import zlib
from functools import partial

import jax
import jax.numpy as jnp

from difax.core.contracts import Classifier, Model, Params

BIAS = 0.25  # standard deviation of what stands in place of a zero vector


@partial(jax.jit, static_argnames="std")
def _noise(leaf: jax.Array, key: jax.Array, std: float) -> jax.Array:
    return (std * jax.random.normal(key, leaf.shape, jnp.float32)).astype(leaf.dtype)


def random_weights(model: Model | Classifier, seed: int = 0) -> Params:
    """Parameters of a network that does something, as a function of the seed and of each parameter's name.

    A parameter that `model.init` leaves at zero becomes normal: a matrix with standard deviation 1/sqrt(inputs), a
    vector with 0.25. All others are as `model.init` gives them. Activations stay of the order that they have after
    initialisation: what is modulated has been normed, and gates are far below 1.

    Args:
      seed: 0 ... 2^32 - 1, of `model.init` too.
    """
    params = jax.jit(model.init)(jax.random.key(seed))
    stacks = {stage.name for stage in getattr(model, "stages", ())}  # a classifier has none

    def drawn(path: tuple, leaf: jax.Array) -> jax.Array:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if not jnp.issubdtype(leaf.dtype, jnp.floating) or bool(jnp.any(leaf)):
            return leaf
        matrix = leaf.ndim - (name.partition("/")[0] in stacks) > 1
        key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))
        return _noise(leaf, key, leaf.shape[-2] ** -0.5 if matrix else BIAS)

    return jax.tree_util.tree_map_with_path(drawn, params)
