"""Caching rules as plain Python loops over steps, layers and branches, with a dictionary for a cache."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np


class Network(NamedTuple):
    """A network in pieces: embed(x, k, labels), branch(layer, name, tokens, context) -> (update, gate), head, depth."""

    embed: Callable[..., Any]
    branch: Callable[..., Any]
    head: Callable[..., Any]
    depth: int


def evaluate(network: Network, x, k, labels, cache: dict, full: bool) -> np.ndarray:
    """One evaluation: a full one stores every branch's output, any other takes it from the cache."""
    tokens, context = network.embed(x.astype(np.float32), k, labels)
    tokens = np.asarray(tokens)
    for layer in range(network.depth):
        for name in ("attn", "mlp"):
            update, gate = network.branch(layer, name, tokens, context)
            if full:
                cache[layer, name] = update
            tokens = tokens + gate * cache[layer, name]
    return network.head(tokens, context)


def fora(network: Network, x, k, abar, labels, null, scale, interval, t, low, high) -> tuple[np.ndarray, list[int]]:
    """DDIM with guidance in low <= t <= high and Selvaraju et al. 2024, section 3.2: a full evaluation every
    `interval`, and one where guidance begins, since the unconditional half has nothing to reuse there.

    Args:
      k, t [E]: steps and times of the evaluations; abar [E + 1].

    Returns:
      The samples, and per evaluation whether it was a full one.
    """
    caches: dict[str, dict] = {"cond": {}, "null": {}}
    fulls, before = [], False
    for i in range(len(k)):
        guided = low <= t[i] <= high
        full = i % interval == 0 or (guided and not before)
        eps = evaluate(network, x, k[i], labels, caches["cond"], full)
        if guided:
            off = evaluate(network, x, k[i], null, caches["null"], full)
            eps = off + scale * (eps - off)
        x0 = (x - np.sqrt(1 - abar[i]) * eps) / np.sqrt(abar[i])
        x = np.sqrt(abar[i + 1]) * x0 + np.sqrt(1 - abar[i + 1]) * eps
        fulls.append(int(full))
        before = guided
    return x, fulls
