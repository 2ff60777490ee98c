"""Plain attention, as XLA compiles it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from difax.core.ops import attend


def xla() -> Callable[..., Any]:
    """The reference o = softmax(q k^T / sqrt(K)) v as XLA compiles `difax.core.ops.attend`.

    The logits [T, S] are in memory, of one head at a time or of all, as the XLA version has it.

    Returns:
      The function; it takes every option, on every platform.
    """
    return attend
