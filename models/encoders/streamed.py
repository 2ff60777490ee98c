"""Running encoders: layer by layer from their files, or whole from memory.

An encoder may be larger than the memory there is. Its blocks are one function, so `states` compiles one block, reads a
layer's weights, runs it, and drops them before it reads the next; of the table of tokens it reads the rows of the text
alone. At its peak a host holds two layers of weights (what the file gave and what the device was handed) and no more.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from difax.core.contracts import Params, TextEncoder
from difax.models.encoders.clip import ImageEncoder
from difax.weights.checkpoint import Streamed
from difax.weights.published import Foreign, load_foreign, opened_parameters

TOKENS = "ends/tokens/embedding"


class FoundEncoder(NamedTuple):
    """An encoder whose weights have been looked at and not read: path of the file, class, and what is in it."""

    path: Path
    kind: str
    foreign: Foreign

    @property
    def encoder(self) -> Any:
        """The `TextEncoder`, or `ImageEncoder`."""
        return self.foreign.model


class _Programs(NamedTuple):
    embed: Callable[..., Any]
    block: Callable[..., Any]
    norm: Callable[..., Any]
    pool: Callable[..., Any]


@functools.lru_cache(maxsize=16)
def _programs(encoder: Any) -> _Programs:
    """The compiled functions of an encoder, which its layers and all texts of a shape share."""
    return _Programs(*(jax.jit(f) for f in (encoder.embed, encoder.block, encoder.norm, encoder.pool or encoder.norm)))


def load(found: FoundEncoder, dtype: Any = None, shardings: Params | None = None) -> Params:
    """All parameters of an encoder, for `encode`, or to be quantised or laid on a mesh first.

    Args:
      dtype, shardings: as `difax.weights.checkpoint.load_safetensors`.
    """
    return load_foreign(found.path, found.foreign, dtype, shardings)


def states(
    found: FoundEncoder, ids: Any, mask: Any = None, wanted: Sequence[int] = (-1,), pooled: bool = False
) -> dict[Any, jax.Array]:
    """States of an encoder whose weights are read layer by layer and dropped, up to the last that is wanted.

    Args:
      ids: [B, L] whole numbers, tokens. mask: [B, L], 0 for padding; None: no padding.
      wanted: numbers of states as `TextEncoder` counts them, each once: -1, -2, 9.
      pooled: also what the encoder pools, "pooled" and (with a projection) "projected".

    Returns:
      {number: [B, L, D], "pooled": [B, D], "projected": [B, P]} in the encoder's dtype.

    Raises:
      ValueError: ids that the encoder has no tokens for, or too many; a state that it has not; pooled states of one
        that pools nothing; what `load_safetensors` raises for a file.
    """
    ids, mask = _texts(found.encoder, ids, mask)
    rows = ids.reshape(-1)

    def ends(parameters: dict[str, Streamed]) -> Params:
        table = parameters[TOKENS]
        looked_up = table.rows(rows) if table.rows is not None else table.read(None)[rows]
        return _read(parameters, "ends/", None, {TOKENS: looked_up})

    inputs = (np.arange(rows.size, dtype=np.int32).reshape(ids.shape), mask)
    return _streamed(found, ends, inputs, (ids,), wanted, pooled)


def image_states(
    found: FoundEncoder, pixels: Any, wanted: Sequence[int] = (-1,), pooled: bool = False
) -> dict[Any, jax.Array]:
    """`states` of pictures.

    Args:
      pixels: [B, H, W, C], with H = W the encoder's size, normalised as its preprocessor does.
      wanted, pooled: as of `states`.

    Raises:
      ValueError: pictures of another size; else as `states`.
    """
    encoder = found.encoder
    shape = (encoder.size, encoder.size, encoder.channels)
    if np.ndim(pixels) != 4 or np.shape(pixels)[1:] != shape:
        raise ValueError(
            f"{encoder.name}: pixels of shape {np.shape(pixels)}; allowed: [B, {shape[0]}, {shape[1]}, {shape[2]}]"
        )
    return _streamed(found, lambda p: _read(p, "ends/", None, {}), (jnp.asarray(pixels),), (), wanted, pooled)


def encode(
    encoder: TextEncoder | ImageEncoder,
    params: Params,
    *inputs: jax.Array,
    wanted: Sequence[int] = (-1,),
    pooled: bool = False,
) -> tuple[dict[int, jax.Array], dict[str, jax.Array]]:
    """`states` with the weights in memory, as one pure function to be compiled: the blocks are scanned.

    Args:
      params: as `load` gives them, or what became of these.
      inputs: ids and mask [B, L], or pixels [B, H, W, C]; not checked, as they may be traced.
      wanted, pooled: as of `states`.

    Returns:
      ({number: [B, L, D]}, what is pooled or {}).
    """
    numbers = _numbers(encoder, wanted, pooled)
    x, context = encoder.embed(params["ends"], *inputs)
    found, at = {0: x}, 0
    for stop in sorted({*numbers.values(), *([encoder.depth] if pooled else [])} - {0}):
        some = jax.tree.map(lambda a, at=at, stop=stop: a[at:stop], params["blocks"])
        x, _ = jax.lax.scan(lambda x, one: (encoder.block(one, x, context), None), x, some)
        found[stop], at = x, stop
    more = inputs[:1] if isinstance(encoder, TextEncoder) else ()
    return _handed_out(encoder, numbers, found, params["ends"], more, pooled, encoder.norm, encoder.pool)


def _streamed(
    found: FoundEncoder, ends: Callable[..., Params], inputs: tuple, more: tuple, wanted: Sequence[int], pooled: bool
) -> dict[Any, jax.Array]:
    """more: what `pool` takes beside the normed state."""
    encoder = found.encoder
    run, numbers = _programs(encoder), _numbers(encoder, wanted, pooled)
    last = encoder.depth if pooled else max(numbers.values(), default=0)
    with opened_parameters(found.path, found.foreign, each=True) as parameters:
        outer = ends(parameters)
        x, context = run.embed(outer, *inputs)
        kept = {0: x}
        for layer in range(last):
            # waited for, or weights of many layers would lie in memory beside each other
            x = jax.block_until_ready(run.block(_read(parameters, "blocks/", layer, {}), x, context))
            if layer + 1 in (*numbers.values(), last):
                kept[layer + 1] = x
    out, pools = _handed_out(encoder, numbers, kept, outer, more, pooled, run.norm, run.pool)
    return {**out, **pools}


def _handed_out(
    encoder: Any,
    numbers: dict[int, int],
    found: dict[int, Any],
    ends: Params,
    more: tuple,
    pooled: bool,
    norm: Callable[..., Any],
    pool: Callable[..., Any] | None,
) -> tuple[dict[int, Any], dict[str, Any]]:
    """The states behind so many blocks, `found`, as they were asked for."""
    is_normed = {n: n == -1 or (n == encoder.depth and encoder.normed) for n in numbers}
    normed = norm(ends, found[encoder.depth]) if pooled or any(is_normed.values()) else None
    out = {n: normed if is_normed[n] else found[i] for n, i in numbers.items()}
    return out, pool(ends, normed, *more) if pooled and pool is not None else {}


def _read(parameters: dict[str, Streamed], under: str, layer: int | None, known: dict[str, Any]) -> Params:
    read = {p: known[p] if p in known else q.read(layer) for p, q in parameters.items() if p.startswith(under)}
    return unflatten_dict({p.removeprefix(under): value for p, value in read.items()}, sep="/")


def _numbers(encoder: Any, wanted: Sequence[int], pooled: bool) -> dict[int, int]:
    """{number that was asked for: blocks before that state}."""
    depth = encoder.depth
    for n in wanted:
        if not isinstance(n, (int, np.integer)) or isinstance(n, bool) or not -depth - 1 <= n <= depth:
            raise ValueError(f"{encoder.name}: state {n!r}; allowed: {-depth - 1} ... {depth}")
    if pooled and encoder.pool is None:
        raise ValueError(f"{encoder.name}: pooled=True; this encoder pools nothing, only its states can be had")
    return {int(n): int(n) if n >= 0 else depth + 1 + int(n) for n in wanted}


def _texts(encoder: TextEncoder, ids: Any, mask: Any) -> tuple[np.ndarray, np.ndarray]:
    ids = np.asarray(ids)
    mask = np.ones(ids.shape, np.int32) if mask is None else np.asarray(mask)
    if ids.ndim != 2 or not ids.size or ids.dtype.kind not in "iu" or mask.shape != ids.shape:
        shown = f"{ids.dtype} of shape {ids.shape}, mask of shape {mask.shape}"
        raise ValueError(f"{encoder.name}: ids {shown}; allowed: whole numbers [B, L], and a mask of the same shape")
    if ids.shape[1] > encoder.length:
        raise ValueError(f"{encoder.name}: texts of {ids.shape[1]} tokens; allowed: up to {encoder.length}")
    if ids.min() < 0 or ids.max() >= encoder.vocabulary:
        wrong = ids.min() if ids.min() < 0 else ids.max()
        raise ValueError(f"{encoder.name}: token {wrong}; allowed: 0 ... {encoder.vocabulary - 1}")
    return ids.astype(np.int32), (mask != 0).astype(np.int32)
