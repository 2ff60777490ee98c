"""Pictures and masks that a run begins from, as paths or arrays."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from difax.core.annotations import brief
from difax.media.inputs import read_mask, read_picture, resized


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


def read_masks(mask: Any, n: int, size: tuple[int, int], sides: tuple[int, int]) -> np.ndarray:
    """float32 [1 or n, *sides], 0 or 1, of a path or an array that is as large as the image.

    It is resized by Lanczos' filter, then cut at a half, as diffusers does with pictures.

    Args:
      size: (height, width) of the image. sides: those that the mask is resized to.

    Raises:
      ValueError: what is no mask, of another size or number, or other numbers than 0 ... 1.
    """
    if isinstance(mask, (str, os.PathLike)):
        return read_mask(mask, size, sides)[None]
    found = np.asarray(mask)
    found = found[None] if found.ndim == 2 else found
    if found.dtype.kind not in "fiub" or found.ndim != 3 or len(found) not in (1, n):
        raise ValueError(f"mask={brief(mask)}; allowed: [H, W] or [{n}, H, W] of 0 ... 1")
    if found.shape[1:] != size:
        raise ValueError(f"mask: {list(found.shape[1:])}; allowed: the size of the image, {list(size)}")
    if not np.all((found >= 0) & (found <= 1)):
        raise ValueError("mask: numbers beyond 0 ... 1; allowed: 1 where the image may become another, 0 elsewhere")
    grey = np.round(255 * found.astype(np.float32)).astype(np.uint8)[..., None]
    return np.stack([resized(a, sides)[..., 0] >= 127.5 for a in grey]).astype(np.float32)


CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
FILTERS = {0: "NEAREST", 1: "LANCZOS", 2: "BILINEAR", 3: "BICUBIC", 4: "BOX", 5: "HAMMING"}
PROCESSOR = "preprocessor_config.json"


def preprocessed(pixels: np.ndarray, said: Mapping[str, Any]) -> np.ndarray:
    """What an image encoder is given: float32 [n, h, w, 3], resized, cut to the middle, standardised by channel.

    Args:
      pixels: uint8 [n, H, W, 3]. said: the preprocessor's file, whose missing keys are those of CLIP's.

    Raises:
      ValueError: a size, filter or number that is none, or a picture that is smaller than what is cut out.
    """
    on = lambda key: said.get(key, True) is not False  # noqa: E731
    if on("do_resize"):
        size, filter_ = said.get("size", 224), said.get("resample", 3)
        if filter_ not in FILTERS:
            raise ValueError(f"{PROCESSOR}: resample={brief(filter_)}; allowed: {', '.join(map(str, FILTERS))}")
        to = _sides("size", size, pixels.shape[1:3])
        pixels = np.stack([resized(a, to, FILTERS[filter_]) for a in pixels])
    if on("do_center_crop"):
        h, w = _sides("crop_size", said.get("crop_size", 224), None)
        top, left = (pixels.shape[1] - h) // 2, (pixels.shape[2] - w) // 2
        if top < 0 or left < 0:
            raise ValueError(f"{PROCESSOR}: crop_size={[h, w]} of a picture of {list(pixels.shape[1:3])}")
        pixels = pixels[:, top : top + h, left : left + w]
    x = pixels.astype(np.float32)
    if on("do_rescale"):
        x = x * np.float32(said.get("rescale_factor", 1 / 255))
    if on("do_normalize"):
        mean, std = (
            np.asarray(said.get(key, own), np.float32)
            for key, own in (("image_mean", CLIP_MEAN), ("image_std", CLIP_STD))
        )
        if mean.shape != (3,) or std.shape != (3,) or not (std > 0).all():
            raise ValueError(f"{PROCESSOR}: image_mean, image_std; allowed: 3 numbers each, the second above 0")
        x = (x - mean) / std
    return x


def _sides(key: str, size: Any, of: tuple[int, ...] | None) -> tuple[int, int]:
    """(height, width) that a size means; a number, or a shortest edge, of a picture keeps its proportions."""
    given = size if isinstance(size, Mapping) else {"shortest_edge": size}
    short = given.get("shortest_edge")
    asked = given.get("height", short), given.get("width", short)
    both = [n for n in asked if isinstance(n, int) and not isinstance(n, bool) and n > 0]
    if len(both) < 2:
        raise ValueError(f"{PROCESSOR}: {key}={brief(size)}; allowed: a number, or height and width")
    if short is None or of is None:
        return both[0], both[1]
    h, w = of
    return (int(both[0] * h / w), both[1]) if w <= h else (both[0], int(both[1] * w / h))
