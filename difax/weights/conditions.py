"""What a model is conditioned on, as a tree of arrays: labels, or embeddings of prompts made elsewhere.

difax holds no text encoders: prompts arrive as the embeddings that the model's own encoder made, in one safetensors
file with a tensor for every leaf of `Model.cond`, each leading with [n].
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from difax.core.contracts import Model
from difax.core.files import opened, unpacked_limit, why
from difax.weights.checkpoint import load_native, tensor_shapes


def labelled(model: Model) -> bool:
    """Whether the model is conditioned on a label alone."""
    return isinstance(model.cond, jax.ShapeDtypeStruct)


def random_conditions(model: Model, n: int, seed: int = 0) -> Any:
    """Conditions [n] for models with random weights: standard normal embeddings, nothing masked, labels in turn."""
    if labelled(model):
        return np.arange(n, dtype=np.int32) % model.classes
    rng = np.random.default_rng(seed)

    def draw(leaf: Any) -> np.ndarray:
        shape = (n, *leaf.shape)
        floating = jnp.issubdtype(leaf.dtype, jnp.floating)
        return rng.normal(size=shape).astype(leaf.dtype) if floating else np.ones(shape, leaf.dtype)

    return jax.tree.map(draw, model.cond)


def load_conditions(model: Model, path: str) -> Any:
    """Reads the conditions [n] of a model that takes embeddings.

    Args:
      path: a .safetensors file with one tensor [n, ...] for every leaf of `model.cond`.

    Raises:
      ValueError: as `difax.weights.checkpoint.load_safetensors`; tensors of unequal n, or too many of them; values that
        are not finite, where no mask hides them; a model that takes labels.
    """
    if labelled(model):
        raise ValueError(f"--cond {path}: {model.name} takes labels")
    shapes = tensor_shapes(path)
    lengths = {shapes[name][0] for name in flatten_dict(model.cond, sep="/") if shapes.get(name)}
    n = lengths.pop() if lengths else 1
    if lengths:
        raise ValueError(f"{path}: the tensors lead with {sorted({n, *lengths})}; allowed: one number of conditions")
    if not n:
        raise ValueError(f"{path}: the tensors lead with 0; allowed: one condition or more")
    spec = jax.tree.map(lambda a: jax.ShapeDtypeStruct((n, *a.shape), a.dtype), model.cond)
    size = sum(math.prod(s.shape) * s.dtype.itemsize for s in jax.tree.leaves(spec))
    with opened(path) as file:
        if size > unpacked_limit(file):  # of a file with holes, which takes no place itself
            raise ValueError(f"{path}: {n:,} conditions of {size:,} bytes; allowed: {unpacked_limit(file):,} bytes")
    found = load_native(path, spec)
    found = jax.tree.map(lambda a, s: np.asarray(a).astype(s.dtype), found, spec)
    _check_finite(found, str(path))
    return found


def _check_finite(cond: Any, where: str) -> None:
    """Refuses embeddings that are not finite; those of tokens that a mask hides may be anything."""
    flat: dict[str, Any] = flatten_dict(cond, sep="/")
    for name, array in flat.items():
        if jnp.issubdtype(array.dtype, jnp.floating):
            wrong = ~np.isfinite(array.astype(np.float32))
            mask = flat.get(name.replace("text", "mask")) if "text" in name else None
            if mask is not None and mask.shape == wrong.shape[: mask.ndim]:
                wrong &= (mask != 0).reshape(mask.shape + (1,) * (wrong.ndim - mask.ndim))
            if wrong.any():
                at = [int(i) for i in np.argwhere(wrong)[0]]
                raise ValueError(f"{where}: tensor {name!r} is {array[tuple(at)]} at {at}; allowed: finite numbers")


def check_conditions(model: Model, cond: Any) -> Any:
    """Conditions [n] that are given as a tree, as arrays of the model's types.

    Raises:
      ValueError: leaves that are missing, unknown, of another shape or of unequal n, or not finite where no mask
        hides them.
    """
    given: dict[str, Any] = flatten_dict(dict(cond), sep="/")
    spec: dict[str, Any] = flatten_dict(model.cond, sep="/")
    if given.keys() != spec.keys():
        raise ValueError(f"cond has {', '.join(sorted(given))}; allowed: {', '.join(sorted(spec))}")
    try:
        arrays = {name: np.asarray(given[name]).astype(spec[name].dtype) for name in spec}
    except (TypeError, ValueError) as error:
        raise ValueError(f"cond: {why(error)}; allowed: arrays of numbers") from None
    lengths = {len(a) if a.ndim else 0 for a in arrays.values()}
    for name, array in arrays.items():
        if array.shape[1:] != spec[name].shape or len(lengths) > 1:
            wanted = ", ".join(map(str, ("n", *spec[name].shape)))
            raise ValueError(f"cond {name} is {list(array.shape)}; allowed: [{wanted}], one n for all")
    _check_finite(arrays, "cond")
    return unflatten_dict(arrays, sep="/")
