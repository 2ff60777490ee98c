"""Random numbers with one key per sample, so that a sample does not depend on the batch that it is drawn in."""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp


def sample_keys(seed: int | jax.Array, n: int, start: int = 0) -> jax.Array:
    """Keys [n] of samples start ... start + n - 1 of a run: fold_in(key(seed), index)."""
    return keys_of(seed, jnp.arange(start, start + n, dtype=jnp.int32))


def keys_of(seed: int | jax.Array, index: Any) -> jax.Array:
    """Keys [n] of the samples of a run with these indices [n], int32."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.asarray(index, jnp.int32))


@flax.struct.dataclass
class Given:
    """Noise that takes the place of keys, so that a run that drew its own can be repeated.

    values: [B, E, ...], one draw of each evaluation.
    """

    values: jax.Array

    def __len__(self) -> int:
        return len(self.values)


@flax.struct.dataclass
class OfEvaluation:
    """What `Given` has for one evaluation, [B, ...]: the keys of its step."""

    values: jax.Array

    def __len__(self) -> int:
        return len(self.values)


def fold(keys: Any, index: Any) -> Any:
    """Folds one index into every key [B]: the keys of one evaluation, i + 1 of evaluation i; or its given noise."""
    if isinstance(keys, Given):
        return OfEvaluation(jax.lax.dynamic_index_in_dim(keys.values, index - 1, 1, keepdims=False))
    if isinstance(keys, OfEvaluation):
        raise ValueError("noise that is given has one draw an evaluation, and this solver draws more; allowed: a seed")
    return jax.vmap(jax.random.fold_in, (0, None))(keys, index)


def normal_like(keys: Any, x: jax.Array) -> jax.Array:
    """Standard normal noise of x's shape and dtype, row b from keys[b] alone."""
    return normal(keys, x.shape[1:], x.dtype)


def normal(keys: Any, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """Standard normal noise [len(keys), *shape], row b from keys[b] alone, or what is given for the evaluation."""
    if isinstance(keys, OfEvaluation):
        return keys.values.astype(dtype)
    return jax.vmap(lambda key: jax.random.normal(key, shape, dtype))(keys)
