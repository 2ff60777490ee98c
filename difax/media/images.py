"""Pictures: sample grids, and the files of pictures, written aside and renamed."""

from __future__ import annotations

import contextlib
import io
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from difax.core.extras import needs
from difax.core.writing import replacing


def to_uint8(x: np.ndarray) -> np.ndarray:
    """[-1, 1] -> uint8 [0, 255], clipped and rounded; a number that is none is black."""
    within = np.nan_to_num(np.clip(np.asarray(x, np.float32), -1.0, 1.0), nan=-1.0)
    return np.round((within + 1.0) * 127.5).astype(np.uint8)


def picture(samples: np.ndarray, columns: int) -> np.ndarray:
    """Samples [N, H, W, C] or videos [N, F, H, W, C] in [-1, 1] as one grid; the frames of a video follow one another.

    Args:
      columns: samples a row; a video has a row of its own, of at most 8 of its frames.
    """
    if samples.ndim == 5:
        frames = np.unique(np.linspace(0, samples.shape[1] - 1, 8).round().astype(int))
        samples, columns = samples[:, frames].reshape(-1, *samples.shape[2:]), len(frames)
    return image_grid(to_uint8(samples), min(columns, 10), scale=max(1, 96 // samples.shape[1]))


def pictured(channels: int) -> str | None:
    """What a picture shows of samples that are neither grey nor RGB, such as latents; None of those that are."""
    return None if channels in (1, 3) else f"channel 1 of {channels}"


def image_grid(images: np.ndarray, columns: int, gap: int = 2, scale: int = 1) -> np.ndarray:
    """Lays uint8 images [N, H, W, C] out in rows of `columns`, on white; [H', W'] for one channel.

    Args:
      images: C = 1 (grey) or 3 (RGB); other channel counts show their first channel.
      columns: images a row. gap: pixels between them. scale: whole-number magnification.
    """
    images = images if pictured(images.shape[-1]) is None else images[..., :1]
    n, h, w, c = images.shape
    rows = -(-n // columns)
    grid = np.full((rows * (h + gap) + gap, columns * (w + gap) + gap, c), 255, np.uint8)
    for i, image in enumerate(images):
        top, left = gap + (i // columns) * (h + gap), gap + (i % columns) * (w + gap)
        grid[top : top + h, left : left + w] = image
    grid = grid.repeat(scale, axis=0).repeat(scale, axis=1)
    return grid[..., 0] if c == 1 else grid


def save_png(path: str | os.PathLike, image: np.ndarray) -> None:
    """Writes a uint8 picture [H, W] or [H, W, 3]; the file appears whole or not at all."""
    with replacing(path) as aside:
        write_still(aside, image, ".png")


# suffix -> Pillow's name of the format, how it is written, the longest side that it has room for
STILLS: dict[str, tuple[str, dict[str, Any], int]] = {
    ".png": ("PNG", {}, 2**31 - 1),
    ".webp": ("WEBP", {"quality": 95}, 16383),
    ".jpg": ("JPEG", {"quality": 95}, 65500),
    ".jpeg": ("JPEG", {"quality": 95}, 65500),
}


def write_still(path: str | os.PathLike, image: np.ndarray, suffix: str) -> None:
    """Writes a uint8 picture [H, W] or [H, W, 3] as it goes, to a file or into a folder that itself appears whole.

    Args:
      suffix: of `STILLS`, the format, whatever the path ends in.

    Raises:
      ValueError: a side that the format has no room for.
    """
    from PIL import Image

    name, options, most = STILLS[suffix]
    check_sides(image.shape, suffix, most)
    packed = io.BytesIO()  # Pillow's own writing of .jpg and .gif says nothing where a disk is full
    Image.fromarray(image).save(packed, format=name, **options)
    pathlib.Path(path).write_bytes(packed.getbuffer())


def check_sides(shape: tuple[int, ...], suffix: str, most: int) -> None:
    """Raises ValueError for a picture [H, W, ...] that a format has no room for."""
    if max(shape[:2]) > most:
        raise ValueError(f"a picture of {shape[1]} x {shape[0]} pixels; allowed in {suffix}: sides of up to {most}")


@contextlib.contextmanager
def drawing(path: str | os.PathLike, size: tuple[float, float], font: float = 9, **options: Any) -> Iterator[Any]:
    """A matplotlib figure, written as PNG when the block ends; the file appears whole or not at all.

    Args:
      size: (width, height) in inches, of 200 pixels. font: size in points. options: of `matplotlib.figure.Figure`.

    Raises:
      ValueError: matplotlib is missing (the extra `plot`).
    """
    needs("a figure", "matplotlib")
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"font.size": font, "text.parse_math": False}), replacing(path) as aside:
        drawn = Figure(figsize=size, dpi=200, facecolor="white", **options)
        yield drawn
        drawn.savefig(aside, format="png", metadata={"Software": None})
