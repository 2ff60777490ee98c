"""Pictures and masks that a run begins from, as paths or arrays."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from difax.core.annotations import brief
from difax.media.inputs import read_mask, read_picture


def read_pictures(image: Any, n: int) -> np.ndarray:
    """uint8 [1 or n, H, W, 3] of a path or an array.

    Raises:
      ValueError: what is no image, or another number of them than n.
    """
    if isinstance(image, (str, os.PathLike)):
        found = read_picture(image)[None]
        return np.broadcast_to(found, (*found.shape[:-1], 3))
    found = np.asarray(image)
    found = found[None] if found.ndim == 3 else found
    if found.dtype != np.uint8 or found.ndim != 4 or found.shape[-1] != 3 or len(found) not in (1, n):
        raise ValueError(f"image: {found.dtype} {list(np.shape(image))}; allowed: uint8 [H, W, 3] or [{n}, H, W, 3]")
    return found


def read_masks(mask: Any, n: int, size: tuple[int, int]) -> np.ndarray:
    """float32 [1 or n, H, W] in 0 ... 1 of a path or an array, as large as the image.

    Raises:
      ValueError: what is no mask, of another size or number, or other numbers than 0 ... 1.
    """
    if isinstance(mask, (str, os.PathLike)):
        found = read_mask(mask)[None]
    else:
        found = np.asarray(mask)
        found = found[None] if found.ndim == 2 else found
        if found.dtype.kind not in "fiub" or found.ndim != 3 or len(found) not in (1, n):
            raise ValueError(f"mask={brief(mask)}; allowed: [H, W] or [{n}, H, W] of 0 ... 1")
        found = found.astype(np.float32)
    if found.shape[1:] != size:
        raise ValueError(f"mask: {list(found.shape[1:])}; allowed: the size of the image, {list(size)}")
    if not np.all((found >= 0) & (found <= 1)):
        raise ValueError("mask: numbers beyond 0 ... 1; allowed: 1 where the image may become another, 0 elsewhere")
    return found


def resized(pixels: np.ndarray, sides: tuple[int, int]) -> np.ndarray:
    """uint8 [n, H, W, 3] as [n, *sides, 3], by Lanczos' filter, as diffusers resizes."""
    from PIL import Image

    one = lambda a: np.asarray(Image.fromarray(a).resize((sides[1], sides[0]), Image.Resampling.LANCZOS))  # noqa: E731
    return np.stack([one(a) for a in pixels])
