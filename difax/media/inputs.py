"""Pictures that come in: of data sets, and those that sampling begins from."""

from __future__ import annotations

import math
import os
from typing import Any

import numpy as np

from difax.core.files import named, opened, why

PIXELS = 2**26  # of a picture, at most
FORMATS = ("PNG", "JPEG", "WEBP")  # of pictures, whatever their suffix says
_ALLOWED = f"a picture ({', '.join(FORMATS)}) of at most {PIXELS:,} pixels"


def read_image(path: str | os.PathLike, size: tuple[int, int] | None = None) -> np.ndarray:
    """A picture as samples are: float32 [H, W, 3] in [-1, 1], turned as its camera says; of what is seen through, over
    white.

    Args:
      size: (height, width) that it is resized to (Lanczos); None leaves it as it is.

    Raises:
      ValueError: nothing there, no picture of `FORMATS`, a moving, damaged or too large one (names the file).
    """
    image = resized(read_picture(path), size)
    return np.broadcast_to(image.astype(np.float32) / 127.5 - 1, (*image.shape[:2], 3)).copy()


def read_mask(
    path: str | os.PathLike, like: tuple[int, int] | None = None, size: tuple[int, int] | None = None
) -> np.ndarray:
    """A mask: float32 [H, W], 1 where the picture is at least half white, to be drawn anew, and 0 elsewhere.

    Args:
      like: (height, width) of the picture that it belongs to, which it must have too; None allows any.
      size: (height, width) that it is resized to (Lanczos) before it is cut to 0 and 1.

    Raises:
      ValueError: as `read_image`, or a mask of another size.
    """
    image = read_picture(path, channels=1)
    if like is not None and image.shape[:2] != tuple(like):
        raise ValueError(
            f"{named(path)}: a mask of {image.shape[1]} x {image.shape[0]} pixels; allowed: {like[1]} x {like[0]}, the "
            "size of its picture"
        )
    return (resized(image, size)[..., 0] >= 127.5).astype(np.float32)


def read_picture(path: str | os.PathLike, side: int | None = None, channels: int | None = None) -> np.ndarray:
    """uint8 [H, W, 1 or 3], turned as its camera says; of what is seen through, over white.

    Args:
      side: cut to the middle square and resize to this side; None takes it as it is.
      channels: 1 (grey) or 3; None is 1 where the picture is grey, else 3.

    Raises:
      ValueError: as `read_image`.
    """
    with opened(path, _ALLOWED) as raw:
        try:
            array = _decoded(raw, side, channels)
        except Exception as error:  # a library of many formats says in many ways that a file is damaged
            fault = "no picture" if type(error).__name__ == "UnidentifiedImageError" else why(error)
            raise ValueError(f"{named(path)}: {fault}; allowed: {_ALLOWED}") from None
    return array if array.ndim == 3 else array[..., None]


def _decoded(raw: Any, side: int | None, channels: int | None) -> np.ndarray:
    from PIL import Image, ImageOps

    with Image.open(raw, formats=FORMATS) as picture:
        if math.prod(picture.size) > PIXELS:
            raise ValueError(f"{picture.width} x {picture.height} pixels")
        if picture.format != "MPO" and getattr(picture, "n_frames", 1) > 1:  # MPO: a camera's JPEG with a preview
            raise ValueError("a moving picture")
        image = ImageOps.exif_transpose(picture)
        if image.mode.startswith("I"):  # 16 bits, of which the upper ones are seen
            image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        grey = image.mode in ("1", "L") if channels is None else channels == 1
        image = image.convert("L" if grey else "RGB")
        if side is not None:
            image = ImageOps.fit(image, (side, side), Image.Resampling.LANCZOS)
        return np.asarray(image, np.uint8)


def resized(image: np.ndarray, size: tuple[int, int] | None, filter: str = "LANCZOS") -> np.ndarray:
    """uint8 [H, W, C] at another size; None leaves it as it is.

    Args:
      filter: a name of `PIL.Image.Resampling` ("LANCZOS", as diffusers has it for its autoencoders).
    """
    if size is None or image.shape[:2] == tuple(size):
        return image
    from PIL import Image

    picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    array = np.asarray(picture.resize((size[1], size[0]), Image.Resampling[filter]))
    return array if array.ndim == 3 else array[..., None]
