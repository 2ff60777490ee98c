"""Samples as files: a picture, a film, the numbers (.npz), or a folder of single files; and latents read back."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from difax.core.annotations import choose
from difax.core.arrays import check_finite, opened_arrays, save_arrays
from difax.core.files import named, writable
from difax.core.writing import replacing
from difax.media.films import FILMS, RATE, check_film, film
from difax.media.images import STILLS, image_grid, picture, to_uint8, write_still

EACH = tuple(dict.fromkeys((*STILLS, *FILMS)))  # of the files in a folder
SUFFIXES = (*EACH, ".npz", "")  # the last is a folder


def check_output(path: str, flag: str = "--out", fps: float = RATE, each: str = ".png") -> pathlib.Path:
    """Checks before any work that samples can be written there; returns the path.

    Args:
      flag: that the message begins with. fps, each: as of `save_samples`.

    Raises:
      ValueError: another suffix, a folder for a file or a file for a folder, a folder of images that is not empty, or
        a parent that is missing or not writable; a frame rate that is not allowed; .mp4 without PyAV.
    """
    target = writable(path, SUFFIXES, flag)
    choose("suffix of files in a folder", each, EACH)
    check_film(target.suffix or each, fps)
    return target


def save_samples(
    path: str | os.PathLike,
    samples: np.ndarray,
    columns: int,
    arrays: Mapping[str, Any],
    fps: float = RATE,
    each: str = ".png",
) -> None:
    """Writes samples by the ending of the path; the file or folder appears whole or not at all.

    .png, .jpg: one grid, with some frames of each video. .gif, .mp4, .webp: the same of images, and of videos one film
    in which they run beside one another. .npz: `samples` float32 and the other arrays. No suffix: a folder of
    00000.png, 00001.png, ...; a video is a folder of its frames there, or one film with an `each` that moves.

    Args:
      path: as `check_output` takes it.
      samples: [N, H, W, C], or videos [N, F, H, W, C], in [-1, 1].
      columns: of the grid.
      arrays: what stands beside the samples in an .npz.
      fps: frames a second of films, 1 to 120, of a .gif 1 to 50 (16).
      each: suffix of the files in a folder, of `EACH` (".png").

    Raises:
      ValueError: as `check_output`, or a grid that the format has no room for.
    """
    path = pathlib.Path(path)
    check_film(path.suffix or each, fps)
    if path.suffix == ".npz":
        save_arrays(path, {"samples": samples, **arrays})
        return
    with replacing(path) as aside:
        if path.suffix:
            _write(aside, samples, path.suffix, columns, fps, scaled=True)
        else:
            _write_folder(aside, samples, each, fps)


def _write(
    path: pathlib.Path, samples: np.ndarray, suffix: str, columns: int, fps: float, scaled: bool = False
) -> None:
    """Samples together in one file."""
    if suffix in FILMS and (samples.ndim == 5 or suffix not in STILLS):
        videos = samples if samples.ndim == 5 else samples[:, None]
        FILMS[suffix](path, film(videos, columns), fps)
    elif scaled:
        write_still(path, picture(samples, columns), suffix)
    else:
        write_still(path, image_grid(to_uint8(samples), 1, gap=0), suffix)


def _write_folder(path: pathlib.Path, samples: np.ndarray, each: str, fps: float) -> None:
    path.mkdir()
    for i, sample in enumerate(samples):
        if sample.ndim == 3 or each in FILMS:
            _write(path / f"{i:05d}{each}", sample[None], each, 1, fps)
            continue
        frames = path / f"{i:05d}"
        frames.mkdir()
        for j, frame in enumerate(sample):
            _write(frames / f"{j:05d}{each}", frame[None], each, 1, fps)


def read_latents(
    path: str,
    n: int,
    shape: tuple[int, ...] | None,
    arranged: Callable[[np.ndarray], np.ndarray] = lambda found: found,
    name: str = "latents",
    flag: str = "--latents",
) -> np.ndarray:
    """The initial latents [n, *shape] of an .npz file, under the name `latents`, float32.

    Args:
      n: of them. shape: of one; None leaves it to be checked where it is known. arranged: brings latents of another
        layout into that of the model. name, flag: of the array, and of what asks for it.

    Raises:
      ValueError: a file that is not there or no .npz, or latents that are missing, of another shape or not finite.
    """
    allowed = f"an .npz file with an array named {name}"
    size = None if shape is None else n * int(np.prod(shape))
    try:
        with opened_arrays(path, allowed) as found:
            if name not in found:
                raise ValueError(f"{named(path)}: no array named {name} in it; allowed: what --out FILE.npz writes")
            stored = found[name]
            if size is not None and shape is not None and int(np.prod(stored.shape)) != size:
                _check_latents(stored, n, shape, named(path))  # by its header, before it is read
            latents = arranged(stored.read())
    except ValueError as error:
        raise ValueError(f"{flag} {error}") from None
    return latents if shape is None else check_latents(latents, n, shape, f"{flag} {named(path)}")


def check_latents(latents: Any, n: int, shape: tuple[int, ...], where: str = "latents") -> np.ndarray:
    """Initial latents as float32 [n, *shape]; ValueError for another shape, or values that are not finite numbers."""
    try:
        latents = np.asarray(latents)
    except (ValueError, TypeError, OverflowError) as error:  # lists of unequal lengths
        raise ValueError(f"{where}: {error}; allowed: numbers {[n, *shape]}") from None
    _check_latents(latents, n, shape, where)
    with np.errstate(over="ignore"):
        latents = latents.astype(np.float32)
    check_finite({"the array": latents}, where)
    return latents


def _check_latents(latents: Any, n: int, shape: tuple[int, ...], where: str) -> None:
    if latents.dtype.kind not in "fiu" or latents.shape != (n, *shape):
        raise ValueError(f"{where}: {latents.dtype} {list(latents.shape)}; allowed: numbers {[n, *shape]}")
