"""Tiles: an autoencoder that decodes and encodes a part at a time, in the memory of a tile and not of the picture.

Along an axis of L latents tile k lies at k s, s = tile - overlap - what is thrown away; the last one ends at L. From
the zone z_k on, `overlap` latents wide, it takes over linearly from the one before:

  y = sum_k (u_k - u_{k+1}) y_k,   u_k(p) = clip((p - z_k) / overlap, 0, 1),   u_0 = 1,   u_n = 0.

What is exact. A tile sees zeros where the picture goes on, so it differs from the whole as far as its convolutions
reach from such an edge; `margin` throws that away. A network without norms over pixels and without attention
(AutoencoderTiny) is then the whole's equal; with a smaller margin it differs no further from an inner edge than it
reaches. Group norms have the statistics of a tile, and attention its pixels: AutoencoderKL in tiles is another
function, which the overlap only makes smooth, as in the reference.

Frames. A causal autoencoder may be cut in time too: a part begins `frames_before` latents early, of which the first
stands for a single frame wherever it is, and is thrown away with the others. It is exact where these reach as far as
the network looks back. An autoencoder that carries its past from part to part itself (`wan_autoencoder(chunk=...)`)
always is.

Tiles of a size are one compiled program in a loop, so many at a time (`at_once`) in one batch, which a mesh divides.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from difax.core import placement
from difax.core.annotations import checked
from difax.core.contracts import Autoencoder, Params
from difax.models.autoencoders.kl import packed, unpacked
from difax.weights.published import Foreign


class Cut(NamedTuple):
    """How an axis is cut, in latents.

    tile: length of a tile. overlap: where two of them are mixed. before, after: what is thrown away on a side where the
    axis goes on.
    """

    tile: int
    overlap: int
    before: int = 0
    after: int = 0

    @property
    def stride(self) -> int:
        return self.tile - self.overlap - self.before - self.after


class Scale(NamedTuple):
    """Elements for latents along an axis: `each` for one, or with `first` 1 for the first and `each` for the others."""

    each: int
    first: bool = False

    def length(self, n: int) -> int:
        """Elements of n latents."""
        return 1 + self.each * (n - 1) if self.first else self.each * n

    def zone(self, latent: int) -> int:
        """The first element of a latent, which is not the first of the axis."""
        return self.each * (latent - 1) + 1 if self.first else self.each * latent


ONE = Scale(1)


class Pieces(NamedTuple):
    """Tiles along one axis, in latents, with their weights [n][R, elements] by a scale (`pieces`)."""

    starts: list[int]
    lengths: list[int]
    weights: list[np.ndarray]


def pieces(cut: Cut, length: int, scale: Scale, whole_last: bool, rank: Literal["plain", "rows", "columns"]) -> Pieces:
    """The tiles of an axis and what each counts at each of its elements.

    Args:
      whole_last: does the last tile reach back to be as long as the others; else the axis cuts it, and as many tiles
        are begun as the strides allow (diffusers).
      rank: "plain", weights of one term; the reference mixes a tile's left edge a second time in the rows that it
        shares with the tile below, so that u is u^2 there: "rows" are a row's weights without and with such a tile
        below, "columns" a column's with u and u^2.
    """
    stride, tile = cut.stride, min(cut.tile, length)
    rest = length - cut.overlap - cut.before - cut.after if whole_last else length
    n = max(1, -(-rest // stride)) if length > cut.tile or not whole_last else 1
    starts = [min(k * stride, length - tile) if whole_last else k * stride for k in range(n)]
    lengths = [min(tile, length - start) for start in starts]

    def taken(k: int, at: np.ndarray) -> np.ndarray:
        """u_k at these elements of the axis."""
        if k in (0, n):
            return np.full(at.shape, float(k == 0))
        zone, width = scale.zone(k * stride + cut.before), scale.each * cut.overlap
        if not whole_last:
            width = min(width, scale.each * lengths[k - 1], scale.each * lengths[k])
        return np.clip((at - zone) / width, 0.0, 1.0) if width else (at >= zone).astype(float)

    weights = []
    for k, (start, size) in enumerate(zip(starts, lengths, strict=True)):
        at = (scale.each * start) + np.arange(scale.length(size), dtype=float)
        begun, ended = taken(k, at), taken(k + 1, at)
        plain = begun - ended
        if rank == "rows":
            shared = at >= scale.zone((k + 1) * stride) if k + 1 < n else np.zeros(at.shape, bool)
            parts = [plain * ~shared, plain * shared]
        elif rank == "columns":
            parts = [plain, begun**2 - ended**2]
        else:
            parts = [plain]
        weights.append(np.stack(parts).astype(np.float32))
    return Pieces(starts, lengths, weights)


@checked
def tiled(
    autoencoder: Autoencoder,
    tile: int = 64,
    overlap: int = 16,
    *,
    margin: int = 0,
    frames: int | None = None,
    frames_before: int = 1,
    frames_overlap: int = 0,
    at_once: int = 1,
    like: Literal["even", "diffusers"] = "even",
) -> Autoencoder:
    """An autoencoder that goes tile by tile over pictures, or over the rows, columns and frames of videos.

    Args:
      autoencoder: any; its decode and encode are called with tiles for pictures.
      tile: latents of a tile's side; smaller pictures are taken whole (64).
      overlap: latents over which two tiles are mixed (16).
      margin: latents that are computed at the inner edges of a tile and thrown away (0).
      frames: latents of a part in time, of a causal autoencoder of videos (None: all of them).
      frames_before: latents at the beginning of a later part that are thrown away, 1 or more (1).
      frames_overlap: latents over which two parts in time are mixed (0).
      at_once: tiles in a batch; a mesh divides them (1).
      like: "even": all tiles have one size, and are one program. "diffusers": as its `tiled_decode` and `tiled_encode`
        cut and mix, up to nine sizes, for equal results (`tiled_as_diffusers`).

    Returns:
      The autoencoder with other `decode` and `encode`. Pixels whose sides are no multiples of `side` are a ValueError.

    Raises:
      ValueError: overlaps and margins that leave less than an overlap of a tile, frames of an autoencoder of pictures.
    """
    whole_last = like == "even"
    counts = dict(tile=(tile, 1), overlap=(overlap, 0), margin=(margin, 0), at_once=(at_once, 1))
    counts |= dict(frames_before=(frames_before, 1), frames_overlap=(frames_overlap, 0))
    for name, (value, least) in counts.items():
        if value < least:
            raise ValueError(f"tiled: {name}={value}; allowed: {least} or more")
    sides, time = Cut(tile, overlap, margin, margin), None
    if frames is not None:
        if not autoencoder.time:
            raise ValueError(f"tiled: frames={frames} of {autoencoder.name}; allowed: none, it is one of pictures")
        time = Cut(frames, frames_overlap, frames_before, 0)
    for name, cut in (("tile", sides), ("frames", time)):
        if cut is not None and cut.stride < max(cut.overlap, 1):
            least = 2 * cut.overlap + cut.before + cut.after + (cut.overlap == 0)
            raise ValueError(f"tiled: {name}={cut.tile}; allowed: {least} or more, twice the overlap and what is lost")
    if not whole_last and (margin or time is not None):
        raise ValueError("tiled: like=diffusers with margin or frames; allowed: neither, it has none")

    def axes_of(latents: tuple[int, ...]) -> list[tuple[Cut, int, Scale]]:
        """Per axis behind the batch: how it is cut, its latents, and pixels or frames for them."""
        *video, h, w = latents
        clock = [(time or Cut(f, 0), f, Scale(autoencoder.time, True)) for f in video]
        return [*clock, (sides, h, Scale(autoencoder.side)), (sides, w, Scale(autoencoder.side))]

    def decode(params: Params, latents: jax.Array) -> jax.Array:
        spec = jax.eval_shape(autoencoder.decode, params, latents)
        axes = [(cut, n, ONE, scale) for cut, n, scale in axes_of(latents.shape[1:-1])]
        return _by_tiles(autoencoder.decode, params, latents, spec, axes, whole_last, at_once)

    def encode(params: Params, pixels: jax.Array) -> jax.Array:
        spec = jax.eval_shape(autoencoder.encode, params, pixels)
        axes = [
            (cut, n, scale, Scale(spec.shape[i + 1] // n))
            for i, (cut, n, scale) in enumerate(axes_of(_latents_of(autoencoder, pixels.shape[1:-1])))
        ]
        return _by_tiles(autoencoder.encode, params, pixels, spec, axes, whole_last, at_once)

    return autoencoder._replace(name=f"{autoencoder.name}-tiled", decode=decode, encode=encode)


def _latents_of(autoencoder: Autoencoder, pixels: tuple[int, ...]) -> tuple[int, ...]:
    *video, h, w = pixels
    side, time = autoencoder.side, autoencoder.time
    if h % side or w % side:
        raise ValueError(f"{autoencoder.name}: pixels of {h} x {w}; allowed: multiples of {side}")
    for f in video:
        if time and (f - 1) % time:
            raise ValueError(f"{autoencoder.name}: {f} frames; allowed: {time} n + 1")
    return (*((f - 1) // time + 1 for f in video), h // side, w // side)


def _by_tiles(
    run: Callable[[Params, jax.Array], jax.Array],
    params: Params,
    x: jax.Array,
    spec: Any,
    axes: list[tuple[Cut, int, Scale, Scale]],
    whole_last: bool,
    at_once: int,
) -> jax.Array:
    """What `run` makes of x, tile by tile.

    Args:
      spec: shape and dtype of the result.
      axes: behind the batch: how each is cut, its latents, elements of x and of the result for them.
    """
    if all(n <= cut.tile for cut, n, _, _ in axes):
        return run(params, x)
    ranks: list[Any] = ["plain"] * len(axes)
    if not whole_last:
        ranks[-2:] = ["rows", "columns"]
    cuts = [pieces(cut, n, to, whole_last, rank) for (cut, n, _, to), rank in zip(axes, ranks, strict=True)]
    groups: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
    for places in itertools.product(*(range(len(c.starts)) for c in cuts)):
        groups.setdefault(tuple(c.lengths[k] for c, k in zip(cuts, places, strict=True)), []).append(places)
    batch = x.shape[0]
    out = jnp.zeros(spec.shape, spec.dtype)
    for lengths, tiles in groups.items():
        size = [source.length(n) for (_, _, source, _), n in zip(axes, lengths, strict=True)]
        together = min(at_once, len(tiles))
        spare = -len(tiles) % together
        tiles = [*tiles, *tiles[:1] * spare]  # which count nothing

        def along(
            of: Callable[[int, int], Any], tiles: list[tuple[int, ...]] = tiles, together: int = together
        ) -> list[np.ndarray]:
            """Per axis what belongs to each tile, [rounds, together, ...]."""
            values = [np.stack([of(a, places[a]) for places in tiles]) for a in range(len(axes))]
            return [v.reshape(-1, together, *v.shape[1:]) for v in values]

        begins = np.stack(along(lambda a, k: axes[a][2].each * cuts[a].starts[k]), -1)
        ends = np.stack(along(lambda a, k: axes[a][3].each * cuts[a].starts[k]), -1)
        weights = along(lambda a, k: cuts[a].weights[k])
        counts = (np.arange(len(tiles)) < len(tiles) - spare).astype(np.float32).reshape(-1, together)

        def add(out: jax.Array, one: Any) -> tuple[jax.Array, None]:
            y, end, count, weight = one
            start = (0, *(end[i] for i in range(len(axes))), 0)
            mixed = jax.lax.dynamic_slice(out, start, y.shape) + y * (count * _product(weight))[None, ..., None]
            return jax.lax.dynamic_update_slice(out, mixed.astype(out.dtype), start), None

        def step(out: jax.Array, some: Any, size: list[int] = size, together: int = together) -> Any:
            begin, *rest = some
            cut = lambda b: jax.lax.dynamic_slice(  # noqa: E731
                x, (0, *(b[i] for i in range(len(axes))), 0), (batch, *size, x.shape[-1])
            )
            several = jnp.concatenate([cut(begin[i]) for i in range(together)])
            y = run(params, spread(several))
            return jax.lax.scan(add, out, (y.reshape(together, batch, *y.shape[1:]), *rest))[0], None

        out = jax.lax.scan(step, out, (begins, ends, counts, weights))[0]
    return out


def _product(weights: list[jax.Array]) -> jax.Array:
    """sum_r of the product over axes of weights [R, n]: what each element counts."""
    terms = weights[0]
    for weight in weights[1:]:
        weight = jnp.broadcast_to(weight, (max(len(terms), len(weight)), weight.shape[1]))
        terms = jnp.broadcast_to(terms, (len(weight), *terms.shape[1:]))
        terms = terms[..., None] * weight.reshape(len(weight), *(1,) * (terms.ndim - 1), -1)
    return terms.sum(0)


def spread(a: jax.Array) -> jax.Array:
    """Tiles in a batch, over all devices of the mesh that is being traced for, as far as they divide."""
    p = placement.current()
    return a if p is None else p.keep(a, p.even(len(a), placement.NAMES))


# pixels of the side of diffusers' tiles, None: sample_size of config.json
SAMPLES = {
    "AutoencoderKL": None,
    "AutoencoderKLFlux2": None,
    "AutoencoderKLWan": 256,
    "AutoencoderKLQwenImage": 256,
}
SHARE = 0.25  # of a tile that overlaps


def tiled_as_diffusers(found: Foreign, at_once: int = 1) -> Autoencoder:
    """An autoencoder in tiles as diffusers takes them after `enable_tiling()`.

    They have `sample_size` pixels a side (AutoencoderKL and FLUX.2's) or 256 (Wan's and Qwen-Image's, which the
    reference clips behind the mixing, and which are clipped before it here), a quarter of which overlaps.

    Args:
      found: of `find_autoencoder`. at_once: as of `tiled`.

    Raises:
      ValueError: another class, or tiles of which no whole number of latents is a quarter.
    """
    if found.kind not in SAMPLES:
        raise ValueError(f"tiled_as_diffusers: {found.kind or found.model.name}; allowed: {', '.join(SAMPLES)}")
    sample = SAMPLES[found.kind] or found.geometry["sample_size"]
    tile, overlap = sample / found.model.side, SHARE * sample / found.model.side
    if not (float(tile).is_integer() and float(overlap).is_integer()):
        least = math.ceil(found.model.side / SHARE)
        raise ValueError(f"tiled_as_diffusers: tiles of {sample} pixels; allowed: multiples of {least}")
    if found.kind != "AutoencoderKLFlux2":
        return tiled(found.model, int(tile), int(overlap), at_once=at_once, like="diffusers")
    # its encoder's latents are mixed before they are packed, two for one of ours
    fine = found.model._replace(encode=lambda params, pixels: unpacked(found.model.encode(params, pixels)))
    made = tiled(fine, int(tile), int(overlap), at_once=at_once, like="diffusers")
    return made._replace(encode=lambda params, pixels: packed(made.encode(params, pixels)))
