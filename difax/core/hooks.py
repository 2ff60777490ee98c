"""Hooks on the dense layers of a block: called in their place, or to look at what the first one is given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax


class _Found(Exception):
    """Carries a value out of the middle of a network."""

    def __init__(self, value: Any):
        super().__init__()
        self.value = value


def modulated_input(compute: Callable[..., Any], *arguments: Any) -> Any:
    """What the first dense layer of a branch is given; nothing behind it is run.

    Args:
      compute: takes the arguments and `dense=...` (that of `Accelerator.branch`, with `inner`).
    """

    def stop(name: str, x: jax.Array, apply: Any) -> Any:
        raise _Found(x)

    try:
        compute(*arguments, dense=stop)
    except _Found as found:
        return found.value
    raise ValueError("the branch has no dense layer")


def hooked(dense: Callable[..., Any]) -> Any:
    """A context in which every dense layer of a block is called as dense(name, x, apply)."""

    def intercept(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        if context.method_name != "__call__" or not context.module.has_variable("params", "kernel"):
            return call(*args, **kwargs)
        return dense("/".join(context.module.path), args[0], call)

    return nn.intercept_methods(intercept)
