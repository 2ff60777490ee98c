"""Samples as files: a picture (.png), the numbers (.npz), or a folder of single images; and latents read back."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from difax.core.files import replacing
from difax.media.images import image_grid, picture, save_png, to_uint8

SUFFIXES = (".png", ".npz", "")  # the last is a folder


def check_output(path: str, flag: str = "--out") -> pathlib.Path:
    """Checks before any work that samples can be written there; returns the path.

    Raises:
      ValueError: another suffix, a folder for a file or a file for a folder, a folder of images that is not empty, or
        a parent that is missing or not writable.
    """
    target = pathlib.Path(path)
    if not path or target.suffix not in SUFFIXES or (path.endswith("/") and target.suffix):
        raise ValueError(f"{flag} {path!r}: allowed: a name that ends in .png or .npz, or a folder's, without a suffix")
    if target.suffix and target.is_dir():
        raise ValueError(f"{flag} {path}: that is a folder")
    if not target.suffix and target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{flag} {path}: exists and is not an empty folder")
    if not target.parent.is_dir():
        raise ValueError(f"{flag} {path}: the folder {target.parent} does not exist")
    if not os.access(target.parent, os.W_OK):
        raise ValueError(f"{flag} {path}: the folder {target.parent} is not writable")
    return target


def save_samples(path: str | os.PathLike, samples: np.ndarray, columns: int, arrays: Mapping[str, Any]) -> None:
    """Writes samples by the ending of the path; the file or folder appears whole or not at all.

    .png: one grid. .npz: `samples` float32 and the other arrays. No suffix: a folder of 00000.png, 00001.png, ...;
    a video is a folder of its frames there.

    Args:
      path: as `check_output` takes it.
      samples: [N, H, W, C], or videos [N, F, H, W, C], in [-1, 1].
      columns: of the grid.
      arrays: what stands beside the samples in an .npz.
    """
    path = pathlib.Path(path)
    if path.suffix == ".png":
        save_png(path, picture(samples, columns))
    elif path.suffix == ".npz":
        with replacing(path) as aside, open(aside, "wb") as file:
            np.savez(file, samples=samples, **arrays)
    else:
        _save_folder(path, samples)


def _save_folder(path: pathlib.Path, samples: np.ndarray) -> None:
    with replacing(path) as aside:
        aside.mkdir()
        for i, sample in enumerate(samples):
            if sample.ndim == 3:
                save_png(aside / f"{i:05d}.png", image_grid(to_uint8(sample)[None], 1, gap=0))
                continue
            frames = aside / f"{i:05d}"
            frames.mkdir()
            for j, frame in enumerate(sample):
                save_png(frames / f"{j:05d}.png", image_grid(to_uint8(frame)[None], 1, gap=0))


def read_latents(path: str, n: int, shape: tuple[int, ...]) -> np.ndarray:
    """The initial latents [n, *shape] of an .npz file, under the name `latents`, float32.

    Raises:
      ValueError: a file that is not there or no .npz, or latents that are missing, of another shape or not finite.
    """
    try:
        with np.load(path, allow_pickle=False) as found:
            latents = found["latents"]
    except KeyError:
        raise ValueError(
            f"--latents {path}: no array named latents in it; allowed: what --out FILE.npz writes"
        ) from None
    except Exception as error:
        why = " ".join(str(error).split())[:160]
        raise ValueError(f"--latents {path}: {why}; allowed: an .npz file with an array named latents") from None
    return check_latents(latents, n, shape, f"--latents {path}")


def check_latents(latents: Any, n: int, shape: tuple[int, ...], where: str = "latents") -> np.ndarray:
    """Initial latents as float32 [n, *shape]; ValueError for another shape, or values that are not finite numbers."""
    latents = np.asarray(latents)
    if latents.dtype.kind not in "fiu" or latents.shape != (n, *shape):
        raise ValueError(f"{where}: {latents.dtype} {list(latents.shape)}; allowed: numbers {[n, *shape]}")
    if not np.all(np.isfinite(latents)):
        raise ValueError(f"{where}: values that are not finite; allowed: finite numbers")
    return latents.astype(np.float32)
