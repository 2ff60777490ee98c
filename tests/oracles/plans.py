"""Rules of caches with a static plan as plain Python, from the papers and the authors' code, and their sampled results.

Step counters run as the authors' do (downwards from the noise in DiT's descendants); flags are per evaluation.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tests.oracles.caches import Network


def fora_steps(steps: int, interval: int) -> str:
    """FORA's code: F (full) or . for step T - 1 down to 0."""
    return "".join("F" if s == steps - 1 or s % interval == 0 else "." for s in range(steps - 1, -1, -1))


def smooth_schedule(rows: Sequence[Sequence[float]], alpha: float, length: int) -> list[int]:
    """SmoothCache's scan: rows[k - 1][i] is the error of holding i at i + k, as long as that exists."""
    schedule: list[int] = []
    while len(schedule) < length:
        i, skips = len(schedule), 0
        for k in reversed(range(1, len(rows) + 1)):
            if i < len(rows[k - 1]) and rows[k - 1][i] <= alpha:
                skips = k
                break
        schedule += [1] + [0] * skips
    schedule = schedule[:length]
    schedule[0] = schedule[-1] = 1
    return schedule


def magnitude_skips(ratios: Sequence[float], threshold: float, streak: int, retention: float) -> str:
    """MagCache, equations 6 to 10: E sums |1 - product of the ratios since the last computed evaluation|."""
    done, last, total = "", 0, 0.0
    for t in range(len(ratios)):
        early = t < max(1, int(retention * len(ratios) + 0.5))
        total += abs(1 - float(np.prod(ratios[last + 1 : t + 1])))
        if early or total > threshold or t - last > streak:
            done, last, total = done + "F", t, 0.0
        else:
            done += "."
    return done


def best_updates(similarity: np.ndarray, updates: int) -> tuple[float, set[int]]:
    """BAC's scheduler by trying every choice: (highest sum of similarities of held evaluations, the updates)."""
    n = len(similarity)
    best: tuple[float, set[int]] = (-np.inf, set())
    for rest in itertools.combinations(range(1, n), updates - 1):
        starts = (0, *rest)
        held = [(max(c for c in starts if c <= j), j) for j in range(n) if j not in starts]
        score = sum(similarity[c, j] for c, j in held)
        if score > best[0]:
            best = (score, set(starts))
    return best


def bubbled(updates: dict[tuple[int, str], set[int]], spread: dict[tuple[int, str], float], most: int) -> Any:
    """BAC's union: the `most` branches of the largest spread also update where an MLP at or behind them does."""
    out = {site: set(steps) for site, steps in updates.items()}
    for layer, name in sorted(spread, key=lambda site: -spread[site])[:most]:
        for (other, kind), steps in updates.items():
            if kind == "mlp" and other >= layer:
                out[layer, name] |= steps
    return out


def ddim(network: Callable[..., Any], x: Any, abar: np.ndarray, labels: Any, null: Any, scale: float) -> np.ndarray:
    """DDIM with guidance: network(i, x, labels, memory) -> eps, with a dictionary of its own for each half."""
    memories: tuple[dict, dict] = ({}, {})
    for i in range(len(abar) - 1):
        on, off = (np.asarray(network(i, x, c, m)) for c, m in zip((labels, null), memories, strict=True))
        eps = off + scale * (on - off)
        x0 = (x - np.sqrt(1 - abar[i]) * eps) / np.sqrt(abar[i])
        x = np.sqrt(abar[i + 1]) * x0 + np.sqrt(1 - abar[i + 1]) * eps
    return x


def through_branches(network: Network, k: Any, stands_in: Callable[..., Any]) -> Callable[..., Any]:
    """The network with stands_in(i, layer, name, update, memory) in place of each branch's output before the gate."""

    def run(i: int, x: Any, labels: Any, memory: dict) -> Any:
        tokens, context = network.embed(x.astype(np.float32), k[i], labels)
        tokens = np.asarray(tokens)
        for layer in range(network.depth):
            for name in ("attn", "mlp"):
                update, gate = network.branch(layer, name, tokens, context)
                tokens = tokens + gate * stands_in(i, layer, name, update, memory)
        return network.head(tokens, context)

    return run


def through_spans(network: Network, k: Any, spans: Sequence[tuple[int, int] | None]) -> Callable[..., Any]:
    """The network with the last residual of spans[i] in place of its blocks; None runs them all."""

    def run(i: int, x: Any, labels: Any, memory: dict) -> Any:
        tokens, context = network.embed(x.astype(np.float32), k[i], labels)
        states = [np.asarray(tokens)]
        for layer in range(network.depth):
            span = spans[i]
            if span is not None and span[0] <= layer < span[1]:
                states.append(states[-1] + (memory[span] if layer == span[0] else 0))
                continue
            tokens = states[-1]
            for name in ("attn", "mlp"):
                update, gate = network.branch(layer, name, tokens, context)
                tokens = tokens + gate * update
            states.append(tokens)
        if spans[i] is None:
            memory.update({s: states[s[1]] - states[s[0]] for s in spans if s is not None})
        return network.head(states[-1], context)

    return run


def extrapolated(values: Sequence[tuple[int, np.ndarray]], now: int) -> np.ndarray:
    """The polynomial through (evaluation, value), by Aitken-Neville."""
    points = [(float(at), np.asarray(v, np.float64)) for at, v in values]
    column = [v for _, v in points]
    for width in range(1, len(points)):
        column = [
            ((now - points[j + width][0]) * column[j] + (points[j][0] - now) * column[j + 1])
            / (points[j][0] - points[j + width][0])
            for j in range(len(column) - 1)
        ]
    return column[0]
