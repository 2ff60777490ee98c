"""Small pictures of what a run is about to draw, while it runs."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from difax.core.annotations import check_value
from difax.pipelines.pipeline import Pipeline


class Preview(NamedTuple):
    """every: so many evaluations, 1 or more. show(first, evaluation, pictures): called in a thread of its own with the
    number of the first sample of a batch, the evaluation, from 1, and small pictures [B, h, w, C] in [-1, 1] of what is
    predicted then."""

    every: int
    show: Callable[[int, int, np.ndarray], None]


def check_preview(preview: Preview | None) -> None:
    """Refuses a preview every 0 evaluations or fewer."""
    if preview is not None and check_value("preview.every", preview.every, int) < 1:
        raise ValueError(f"preview.every={preview.every}; allowed: 1 or more")


@contextlib.contextmanager
def previewing(
    preview: Preview | None, pipeline: Pipeline | None, evaluations: int
) -> Iterator[Callable[[int, int, Any, Any], None] | None]:
    """What `difax.program.draw` may take as `watch`; all pictures are shown when the block ends.

    Pictures are decoded by a thread of their own, beside the run: what is called back may not wait for a device.

    Raises:
      ValueError: as `check_preview`; what showing raised.
    """
    check_preview(preview)
    if preview is None:
        yield None
        return
    waiting: queue.Queue[Any] = queue.Queue()
    failed: list[BaseException] = []

    def work() -> None:
        while (item := waiting.get()) is not None:
            first, i, x0 = item
            try:
                preview.show(first, i + 1, x0 if pipeline is None else pipeline.preview(x0))
            except BaseException as error:
                failed.append(error)
                return

    def watch(first: int, i: int, x: Any, x0: Any) -> None:
        if (i + 1) % preview.every == 0 and i + 1 < evaluations and not failed:
            waiting.put((first, i, np.array(x0, np.float32)))

    thread = threading.Thread(target=work, name="difax-preview", daemon=True)
    thread.start()
    try:
        yield watch
    finally:
        import jax

        jax.effects_barrier()
        waiting.put(None)
        thread.join()
    if failed:
        raise failed[0]
