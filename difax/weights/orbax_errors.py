"""What orbax says of a damaged checkpoint, as one error that names its folder."""

from __future__ import annotations

import gc
import logging
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import absl.logging

from difax.core.files import named, why

LINGERING = 0.2  # seconds that reads go on after one of them has failed


def readable(read: Callable[[], Any], folder: str | os.PathLike, go_on: str = "") -> Any:
    """What orbax reads; all that it raises or prints of damage becomes one error.

    Args:
      read: what is called. folder: that the error names. go_on: what it says at its end.

    Raises:
      ValueError: whatever `read` raises, in a few words, without its traceback.
    """
    said, hooks, fault = absl.logging.get_verbosity(), (sys.unraisablehook, sys.excepthook), None
    tasks = logging.getLogger("asyncio")
    absl.logging.set_verbosity(absl.logging.FATAL)  # it logs what it then raises, or can do without
    silent, tasks.disabled = tasks.disabled, True  # of tasks whose errors nobody asked for
    # it leaves coroutines that fail when they are collected, and reads that call a loop which is closed by then
    sys.unraisablehook = sys.excepthook = lambda *_: None
    try:
        return read()
    except MemoryError:
        raise
    except Exception as error:
        fault = why(error)
    finally:
        if fault is not None:
            time.sleep(LINGERING)
            gc.collect()
        sys.unraisablehook, sys.excepthook = hooks
        tasks.disabled = silent
        absl.logging.set_verbosity(said)
    raise ValueError(f"{named(folder)}: this checkpoint cannot be read ({fault}){go_on}")
