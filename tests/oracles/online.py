"""Caches that decide while they run, as plain Python loops.

On the toy network h + 0.5 tanh(h W + tau b) of six blocks, in float64, or on the pieces of a DiT.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import chi2

DEPTH = 6


def toy() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    r = np.random.default_rng(0)
    w = r.standard_normal((DEPTH, 8, 8)) * 0.6 / np.sqrt(8)
    b = r.standard_normal((DEPTH, 8)) * 0.5
    return w, b, r.standard_normal((1, 4, 8))


def residual(i: int, h: np.ndarray, tau: float) -> np.ndarray:
    w, b, _ = toy()
    return 0.5 * np.tanh(h @ w[i] + tau * b[i])


def euler(net: Callable[[int, np.ndarray, float], np.ndarray], steps: int) -> np.ndarray:
    """x <- x - net(k, x, tau) / steps at tau = 1, 1 - 1 / steps, ..."""
    x = toy()[2]
    for k in range(steps):
        x = x - net(k, x, 1 - k / steps) / steps
    return x


def adacache(
    steps: int,
    codebook: Sequence[tuple[float, int]],
    at: int,
    frames: int | None = None,
    window: tuple[int, int] = (1, 0),
) -> tuple[np.ndarray, list[int], list[float]]:
    """Kahatapitiya et al. 2024: counted from 1, computed iff due or the first or one of the last two.

    Returns:
      The samples, the evaluations (from 0) that were computed, and the intervals that were chosen.
    """
    held: dict[int, np.ndarray] = {}
    clock = {"last": 0, "rate": 1, "motion": 1.0}
    computed, rates = [], []

    def net(k: int, h: np.ndarray, tau: float) -> np.ndarray:
        step = k + 1
        full = step == clock["last"] + clock["rate"] or step in (1, steps - 1, steps)
        rate = clock["rate"]
        for i in range(DEPTH):
            if not full:
                h = h + held[i]
                continue
            r = residual(i, h, tau)
            if i == at and i in held:
                d = np.abs(held[i] - r).sum() / np.abs(held[i]).sum() / clock["rate"]
                if frames is not None:
                    step_of = r.shape[1] // frames
                    a, z = r[:, step_of:], r[:, :-step_of]
                    m = np.abs(a - z).sum() / (np.abs(a).sum() + np.abs(z).sum())
                    m = (m / 0.385) ** 8 if window[0] <= step <= window[1] else 1.0
                    gradient = 10 * (m - clock["motion"]) / clock["rate"]
                    clock["motion"] = m
                    d *= m + abs(gradient)
                rate = next((n for bound, n in codebook[:-1] if d < bound), codebook[-1][1])
                rates.append(rate)
            held[i] = r
            h = h + r
        if full:
            computed.append(k)
            clock.update(last=step, rate=rate)
        return h

    return euler(net, steps), computed, rates


class Network(NamedTuple):
    """A DiT: embed(x, k, labels), branch(layer, name, tokens, context) -> (update, gate, shift, scale), head, depth."""

    embed: Callable[..., Any]
    branch: Callable[..., Any]
    head: Callable[..., Any]
    depth: int


def guided_ddim(
    x: np.ndarray, abar: np.ndarray, scale: float, eps: Callable[[str, int, np.ndarray], Any], guided: int
) -> np.ndarray:
    """DDIM, guided at the first evaluations; eps(half, i, x) is the network of "cond" or "null" at evaluation i."""
    for i in range(len(abar) - 1):
        e = eps("cond", i, x)
        if i < guided:
            off = eps("null", i, x)
            e = off + scale * (e - off)
        x0 = (x - np.sqrt(1 - abar[i]) * e) / np.sqrt(abar[i])
        x = np.sqrt(abar[i + 1]) * x0 + np.sqrt(1 - abar[i + 1]) * e
    return x


def modulated(tokens: np.ndarray, shift: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Layer norm without weights, then scale and shift [B, D]."""
    t = tokens.astype(np.float64)
    t = (t - t.mean(-1, keepdims=True)) / np.sqrt(t.var(-1, keepdims=True) + 1e-6)
    return t * (1 + scale[:, None]) + shift[:, None]


def lazydit(
    network: Network, k: Any, labels: dict[str, Any], weights: dict[str, np.ndarray], soft: bool = False
) -> tuple[Callable[[str, int, np.ndarray], np.ndarray], dict[Any, np.ndarray]]:
    """eps(half, i, x) by Shen et al. 2024: each row keeps its last output of a branch where sigmoid(sum w z) < 1/2.

    Returns:
      eps, and the scores that its calls collect, {(half, i, layer, name): [B]}.
    """
    held: dict[Any, np.ndarray] = {}
    scores: dict[Any, np.ndarray] = {}

    def eps(half: str, i: int, x: np.ndarray) -> np.ndarray:
        tokens, context = network.embed(x.astype(np.float32), k[i], labels[half])
        tokens = np.asarray(tokens)
        for layer in range(network.depth):
            for name in ("attn", "mlp"):
                update, gate, shift, scale = network.branch(layer, name, tokens, context)
                z = modulated(tokens, shift, scale)
                s = 1 / (1 + np.exp(-(z * weights[name][layer, i]).sum((1, 2))))
                scores[half, i, layer, name] = s
                if i > 0:
                    share = (s if soft else (s >= 0.5))[:, None, None]
                    update = share * update + (1 - share) * held[half, layer, name]
                held[half, layer, name] = update
                tokens = (tokens + gate * update).astype(np.float32)
        return network.head(tokens, context)

    return eps, scores


def fastcache(
    steps: int, threshold: float, significance: float, weight: np.ndarray, bias: np.ndarray
) -> tuple[np.ndarray, list[list[int]]]:
    """Liu et al. 2025: a block whose input passes the chi-squared test of no change is h + h W + b.

    Returns:
      The samples, and the blocks that each evaluation ran.
    """
    bound = threshold * np.sqrt(chi2.ppf(1 - significance, 4 * 8) / (4 * 8))
    inputs: dict[int, np.ndarray] = {}
    ran: list[list[int]] = []

    def net(k: int, h: np.ndarray, tau: float) -> np.ndarray:
        ran.append([])
        for i in range(DEPTH):
            still = i in inputs and np.linalg.norm(h - inputs[i]) / np.linalg.norm(inputs[i]) <= bound
            inputs[i] = h
            if not still:
                ran[-1].append(i)
            h = h + (h @ weight[i] + bias[i] if still else residual(i, h, tau))
        return h

    return euler(net, steps), ran


def fastcache_tokens(network: Network, k: Any, labels: dict[str, Any], share: float) -> Callable[..., np.ndarray]:
    """eps(half, i, x) of a DiT whose blocks run, but at the first evaluation, on the tokens that changed most."""
    before: dict[str, np.ndarray] = {}

    def eps(half: str, i: int, x: np.ndarray) -> np.ndarray:
        tokens, context = network.embed(x.astype(np.float32), k[i], labels[half])
        whole = np.array(tokens)
        number = int(np.ceil(share * whole.shape[1])) if i > 0 else whole.shape[1]
        change = ((whole - before.get(half, whole)) ** 2).sum(-1)
        chosen = np.argsort(-change, axis=1, kind="stable")[:, :number, None]
        before[half] = whole.copy()
        moving = np.take_along_axis(whole, chosen, 1)
        for layer in range(network.depth):
            for name in ("attn", "mlp"):
                update, gate, *_ = network.branch(layer, name, moving, context)
                moving = (moving + gate * update).astype(np.float32)
        np.put_along_axis(whole, chosen, moving, 1)
        return network.head(whole, context)

    return eps


def tgate(
    network: Network, k: Any, labels: dict[str, Any], gate: int, sp_interval: int, fi_interval: int, warmup: int
) -> Callable[[str, int, np.ndarray], np.ndarray]:
    """eps(half, i, x) by Liu et al. 2024, with "mlp" in the part of cross-attention; from the gate on of "cond" only.

    The mean over the halves is made when the second, "null", has run evaluation gate - 1.
    """
    held: dict[Any, np.ndarray] = {}

    def eps(half: str, i: int, x: np.ndarray) -> np.ndarray:
        tokens, context = network.embed(x.astype(np.float32), k[i], labels[half])
        tokens = np.asarray(tokens)
        for layer in range(network.depth):
            for name in ("attn", "mlp"):
                if name == "mlp":
                    full = i < gate
                elif i < gate:
                    full = i <= warmup or i % sp_interval == 0 or i == gate - 1
                else:
                    full = i % fi_interval == 0
                update, gate_value, *_ = network.branch(layer, name, tokens, context)
                if full:
                    held[half, layer, name] = update
                tokens = (tokens + gate_value * held[half, layer, name]).astype(np.float32)
        if half == "null" and i == gate - 1:
            for _, layer, name in [key for key in held if key[0] == "null"]:
                held["cond", layer, name] = (held["cond", layer, name] + held["null", layer, name]) / 2
        return network.head(tokens, context)

    return eps


def fastercache(
    network: Network, k: Any, labels: dict[str, Any]
) -> tuple[Callable[[str, int, np.ndarray], np.ndarray], dict[str, list[int]]]:
    """eps(half, i, x) of a run of 30 evaluations by the rule of the authors' Open-Sora script; "cond" is asked first.

    Returns:
      eps, and what it collects: the evaluations that "attended" in the conditional half, and that ran the "null".
    """
    cache: dict[Any, list[np.ndarray]] = {}
    state: dict[str, np.ndarray] = {}
    log: dict[str, list[int]] = {"attended": [], "null": []}

    def split(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        h, w = x.shape[1:3]
        spectrum = np.fft.fftshift(np.fft.fft2(x, axes=(1, 2)), axes=(1, 2))
        y, z = np.meshgrid(np.arange(h), np.arange(w), indexing="ij")
        low = (z - w // 2) ** 2 + (y - h // 2) ** 2 <= (min(h, w) // 5) ** 2
        return spectrum * low[None, :, :, None], spectrum * ~low[None, :, :, None]

    def estimated(i: int) -> bool:
        return i + 1 > 11 and (i + 1) % 5 != 0

    def run(half: str, i: int, x: np.ndarray) -> np.ndarray:
        tokens, context = network.embed(x.astype(np.float32), k[i], labels[half])
        tokens, counter = np.asarray(tokens), i + 1
        full = counter <= 7 or counter % 2 == 1 or (not estimated(i) and estimated(i - 1))
        for layer in range(network.depth):
            for name in ("attn", "mlp"):
                update, gate, *_ = network.branch(layer, name, tokens, context)
                if name == "attn" and full:
                    kept = cache.setdefault((half, layer), [update, update])
                    kept[:] = [kept[1], update]
                elif name == "attn":
                    a0, a1 = cache[half, layer]
                    update = a1 + (a1 - a0) * (counter - 7) / 20 * 0.9
                tokens = (tokens + gate * update).astype(np.float32)
        if half == "cond" and full:
            log["attended"].append(i)
        return network.head(tokens, context)

    def eps(half: str, i: int, x: np.ndarray) -> np.ndarray:
        if half == "cond":
            state["on"] = run(half, i, x)
            return state["on"]
        on_low, on_high = split(state["on"])
        if estimated(i):
            if i + 1 >= 20:
                state["high"] = state["high"] * 1.15
            if i + 1 <= 25:
                state["low"] = state["low"] * 1.15
            both = np.fft.ifftshift(on_low + state["low"] + on_high + state["high"], axes=(1, 2))
            return np.fft.ifft2(both, axes=(1, 2)).real
        log["null"].append(i)
        off = run(half, i, x)
        low, high = split(off)
        state.update(low=low - on_low, high=high - on_high)
        return off

    return eps, log
