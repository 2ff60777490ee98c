"""Films: videos as moving pictures (.gif, .webp by Pillow) and as H.264 (.mp4 by PyAV, the extra `video`).

A film is an iterator of frames, uint8 [H, W] or [H, W, 3]; .mp4 takes one at a time, and the other two hold all of
them, a quarter of what the samples take.
"""

from __future__ import annotations

import io
import itertools
import os
import pathlib
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

import numpy as np

from difax.core.extras import needs
from difax.media.images import check_sides, image_grid, to_uint8

RATES = (1.0, 120.0)  # frames a second
RATE = 16.0  # where nobody says; Wan 2.1's
GIF_RATE = 50.0  # at most: viewers show a delay of 1/100 s as one of 1/10 s


def check_film(suffix: str, fps: float, what: str = "fps") -> None:
    """Refuses, before any work, a film that could not be written.

    Raises:
      ValueError: a frame rate outside of `RATES`, or of `GIF_RATE` for .gif; .mp4 without PyAV.
    """
    if not RATES[0] <= fps <= RATES[1]:
        raise ValueError(f"{what}={fps:g}; allowed: {RATES[0]:g} to {RATES[1]:g} frames a second")
    if suffix == ".gif" and fps > GIF_RATE:
        raise ValueError(f"{what}={fps:g} of a .gif; allowed: up to {GIF_RATE:g} frames a second, or a .webp or .mp4")
    if suffix == ".mp4":
        needs("a film (.mp4)", "av")


def film(samples: np.ndarray, columns: int) -> Iterator[np.ndarray]:
    """Videos [N, F, H, W, C] in [-1, 1] as one film, whose frames are grids of theirs; of one video it is that."""
    for f in range(samples.shape[1]):
        yield image_grid(to_uint8(samples[:, f]), min(columns, len(samples)), gap=0 if len(samples) == 1 else 2)


def _delays(fps: float, unit: int) -> Iterator[int]:
    """Milliseconds that each frame is shown, multiples of `unit`, of which the sum is off by less than one unit."""
    before = 0
    for i in itertools.count(1):
        now = round(1000 * i / fps / unit)
        yield (now - before) * unit
        before = now


def _write_moving(name: str, unit: int, most: int, **options: Any) -> Callable[..., None]:
    def write(path: str | os.PathLike, frames: Iterator[np.ndarray], fps: float) -> None:
        from PIL import Image

        pictures = [Image.fromarray(frame) for frame in frames]
        check_sides(pictures[0].size[::-1], f".{name.lower()}", most)
        delays = list(itertools.islice(_delays(fps, unit), len(pictures)))
        shown = delays if len(pictures) > 1 else delays[0]
        packed = io.BytesIO()  # as of `difax.media.images.write_still`
        pictures[0].save(
            packed, format=name, save_all=True, append_images=pictures[1:], duration=shown, loop=0, **options
        )
        pathlib.Path(path).write_bytes(packed.getbuffer())

    return write


def _write_mp4(path: str | os.PathLike, frames: Iterator[np.ndarray], fps: float) -> None:
    """H.264 in yuv420p and the colours of BT.709, whose sides are even: a last row or column stands twice else."""
    import av
    from av.video.reformatter import Colorspace

    first = next(frames)
    check_sides(first.shape, ".mp4", 16384)
    height, width = (n + n % 2 for n in first.shape[:2])
    codec = "libx264" if "libx264" in av.codecs_available else "h264"
    with av.open(os.fspath(path), "w", format="mp4", options={"movflags": "faststart"}) as container:
        stream: Any = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1001))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {"crf": "17"}
        context = stream.codec_context
        context.colorspace = context.color_primaries = context.color_trc = 1  # BT.709
        context.color_range = 1  # 16 to 235
        for frame in itertools.chain([first], frames):
            colours = np.broadcast_to(frame.reshape(*frame.shape[:2], -1), (*frame.shape[:2], 3))
            even = np.pad(colours, ((0, height - len(frame)), (0, width - frame.shape[1]), (0, 0)), "edge")
            made = av.VideoFrame.from_ndarray(np.ascontiguousarray(even), "rgb24")
            made = made.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709)
            container.mux(stream.encode(made))
        container.mux(stream.encode())


# suffix -> write(path, frames, fps), as it goes, to a file or into a folder that itself appears whole
FILMS: dict[str, Callable[..., None]] = {
    ".gif": _write_moving("GIF", 10, 65535),
    ".webp": _write_moving("WEBP", 1, 16383, quality=90),
    ".mp4": _write_mp4,
}
