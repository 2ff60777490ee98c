"""Plain attention, as XLA compiles it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from difax.ops import attend


def xla() -> Callable[..., Any]:
    """The reference o = softmax(q k^T / sqrt(K)) v with all logits [B, H, T, S] in memory: `difax.ops.attend`.

    Returns:
      The function; it takes every option, on every platform.
    """
    return attend
