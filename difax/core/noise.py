"""Random numbers with one key per sample, so that a sample does not depend on the batch that it is drawn in."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def sample_keys(seed: int | jax.Array, n: int, start: int = 0) -> jax.Array:
    """Keys [n] of samples start ... start + n - 1 of a run: fold_in(key(seed), index)."""
    return keys_of(seed, jnp.arange(start, start + n, dtype=jnp.int32))


def keys_of(seed: int | jax.Array, index: Any) -> jax.Array:
    """Keys [n] of the samples of a run with these indices [n], int32."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.asarray(index, jnp.int32))


def fold(keys: jax.Array, index: jax.Array | int) -> jax.Array:
    """Folds one index into every key [B]: the keys of one evaluation."""
    return jax.vmap(jax.random.fold_in, (0, None))(keys, index)


def normal_like(keys: jax.Array, x: jax.Array) -> jax.Array:
    """Standard normal noise of x's shape and dtype, row b from keys[b] alone."""
    return normal(keys, x.shape[1:], x.dtype)


def normal(keys: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """Standard normal noise [len(keys), *shape], row b from keys[b] alone."""
    return jax.vmap(lambda key: jax.random.normal(key, shape, dtype))(keys)
