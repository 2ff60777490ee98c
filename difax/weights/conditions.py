"""What a model is conditioned on, as a tree of arrays: labels, or embeddings of prompts made elsewhere.

Embeddings are those that the model's own encoders made (`difax encode`, or another program), in one safetensors file
with a tensor for every leaf of `Model.cond`, each leading with [n].
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from difax.core.annotations import brief
from difax.core.arrays import unpacked_limit
from difax.core.contracts import Model
from difax.core.files import opened
from difax.weights.checkpoint import load_native, tensor_shapes, tensor_types


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


TEXTS = ("text", "mask", "null_text", "null_mask")  # leaves that lead with the tokens of the prompt


def of_lengths(model: Model, shapes: Mapping[str, tuple[int, ...]]) -> Model:
    """A model whose condition has texts as long as those that are given, [n, L, ...] by name."""
    spec: dict[str, Any] = flatten_dict(model.cond, sep="/")
    for name in spec.keys() & set(TEXTS) & shapes.keys():
        shape = shapes[name]
        if len(shape) == len(spec[name].shape) + 1 and shape[1] > 0:
            spec[name] = jax.ShapeDtypeStruct((shape[1], *spec[name].shape[1:]), spec[name].dtype)
    return model._replace(cond=unflatten_dict(spec, sep="/"))


def load_conditions(model: Model, path: str, lengths: bool = False) -> Any:
    """Reads the conditions [n] of a model that takes embeddings.

    Args:
      path: a .safetensors file with one tensor [n, ...] for every leaf of `model.cond`. Masks hold 0 and 1 in any type.
      lengths: may texts have other lengths than the model's.

    Raises:
      ValueError: as `difax.weights.checkpoint.load_safetensors` and `check_conditions`; tensors of unequal n, or too
        many of them; a model that takes labels.
    """
    if labelled(model):
        raise ValueError(f"--cond {path}: {model.name} takes labels")
    shapes = tensor_shapes(path)
    model = of_lengths(model, shapes) if lengths else model
    numbers = {shapes[name][0] for name in flatten_dict(model.cond, sep="/") if shapes.get(name)}
    n = numbers.pop() if numbers else 1
    if numbers:
        raise ValueError(f"{path}: the tensors lead with {sorted({n, *numbers})}; allowed: one number of conditions")
    if not n:
        raise ValueError(f"{path}: the tensors lead with 0; allowed: one condition or more")
    types = tensor_types(path)

    def stored(name: str, leaf: Any) -> jax.ShapeDtypeStruct:
        kind = leaf.dtype if jnp.issubdtype(leaf.dtype, jnp.floating) else types.get(name) or leaf.dtype
        return jax.ShapeDtypeStruct((n, *leaf.shape), kind)

    spec = {name: stored(name, leaf) for name, leaf in flatten_dict(model.cond, sep="/").items()}
    size = sum(math.prod(s.shape) * np.dtype(s.dtype).itemsize for s in spec.values())
    with opened(path) as file:
        if size > unpacked_limit(file):  # of a file with holes, which takes no place itself
            raise ValueError(f"{path}: {n:,} conditions of {size:,} bytes; allowed: {unpacked_limit(file):,} bytes")
    found = load_native(path, unflatten_dict(spec, sep="/"), finite=False)  # what a mask hides may be anything
    return check_conditions(model, jax.tree.map(np.asarray, found), path)


def check_conditions(model: Model, cond: Any, where: str = "cond", lengths: bool = False) -> Any:
    """Conditions [n] that are given as a tree, as arrays of the model's types.

    Args:
      where: they are from, for the messages. lengths: may texts have other lengths than the model's.

    Raises:
      ValueError: leaves that are missing, unknown, of another shape, type or of unequal n; a mask of other numbers than
        0 and 1, or without a token; a number that is not finite, but where a mask says that there is no token.
    """
    if lengths and isinstance(cond, Mapping):
        model = of_lengths(model, {str(name): np.shape(leaf) for name, leaf in cond.items()})
    spec: dict[str, Any] = flatten_dict(model.cond, sep="/")
    if not isinstance(cond, Mapping):
        raise ValueError(
            f"{where}={brief(cond)}; allowed: a mapping of {', '.join(sorted(spec))}, or the path of a file"
        )
    given: dict[str, Any] = {"/".join(map(str, path)): leaf for path, leaf in flatten_dict(dict(cond)).items()}
    if given.keys() != spec.keys():
        raise ValueError(f"{where} has {', '.join(sorted(given))}; allowed: {', '.join(sorted(spec))}")
    arrays = {name: _numbers(f"{where} {name}", given[name], spec[name].dtype) for name in spec}
    numbers = {len(a) if a.ndim else 0 for a in arrays.values()}
    for name, array in arrays.items():
        if array.shape[1:] != spec[name].shape or len(numbers) > 1:
            wanted = ", ".join(map(str, ("n", *spec[name].shape)))
            raise ValueError(f"{where} {name} is {list(array.shape)}; allowed: [{wanted}], one n for all")
    if 0 in numbers:
        raise ValueError(f"{where} holds 0 conditions; allowed: one or more")
    for name, array in arrays.items():
        mask = arrays.get(name.replace("text", "mask")) if "text" in name else None
        _check_finite(f"{where} {name}", array, mask)
        if name.rpartition("/")[2].endswith("mask") and not array.any(axis=-1).all():
            empty = int(np.argmin(array.any(axis=-1)))
            raise ValueError(f"{where} {name} has no token in condition {empty}; allowed: one or more that are 1")
    return unflatten_dict(arrays, sep="/")


def _numbers(what: str, given: Any, dtype: Any) -> np.ndarray:
    """An array in the model's type; what is whole there (masks) holds 0 and 1, in whatever type it came."""
    try:
        array = np.asarray(given)
    except ValueError:
        raise ValueError(f"{what} is a list of unequal lengths; allowed: an array of numbers") from None
    if not (jnp.issubdtype(array.dtype, jnp.floating) or array.dtype.kind in "biu"):
        raise ValueError(f"{what} is of type {array.dtype}; allowed: numbers")
    if jnp.issubdtype(dtype, jnp.floating):
        with np.errstate(over="ignore"):
            return array.astype(dtype)
    if not np.isin(array, (0, 1)).all():
        other = array[~np.isin(array, (0, 1))][0]
        raise ValueError(f"{what} holds {other}; allowed: 0 (no token) and 1 (a token)")
    return array.astype(dtype)


def _check_finite(what: str, array: np.ndarray, mask: np.ndarray | None) -> None:
    """Raises ValueError for numbers that are not finite in a token that exists."""
    bad = ~np.isfinite(array.astype(np.float32))
    if mask is not None:
        bad &= (mask != 0).reshape(mask.shape + (1,) * (bad.ndim - mask.ndim))
    if bad.any():
        at = [int(i) for i in np.argwhere(bad)[0]]
        raise ValueError(
            f"{what} holds {int(bad.sum())} numbers that are not finite, the first, {array[tuple(at)]}, at {at}; "
            "allowed: finite numbers"
        )
