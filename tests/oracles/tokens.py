"""Token caches as plain Python loops over steps, blocks and tokens, with dictionaries for what is remembered."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np


class Network(NamedTuple):
    """A DiT in pieces: embed(x, k, labels) -> (tokens, context), attn(layer, tokens, context) -> (update, q, k, v),
    mlp(layer, tokens, context) -> update, gate(layer, name, context), head(tokens, context), depth."""

    embed: Callable[..., Any]
    attn: Callable[..., Any]
    mlp: Callable[..., Any]
    gate: Callable[..., Any]
    head: Callable[..., Any]
    depth: int


class ToCa(NamedTuple):
    """Settings of the rule, with the names of the paper's code."""

    interval: int
    ratio: float
    step_weight: float
    layer_weight: float
    module: float = 2.5
    score: str = "attention"
    soft: float = 0.25
    bonus: float = 0.6
    quirks: bool = False


def attention_maps(q, k) -> np.ndarray:
    """softmax(q k^T / sqrt(K)) of q, k [B, N, H, K]: [B, H, N, N]."""
    b, n, h, width = q.shape
    maps = np.zeros((b, h, n, n))
    for i in range(b):
        for j in range(h):
            logits = q[i, :, j].astype(np.float64) @ k[i, :, j].astype(np.float64).T / math.sqrt(width)
            e = np.exp(logits - logits.max(1, keepdims=True))
            maps[i, j] = e / e.sum(1, keepdims=True)
    return maps


def seen_by_attention(kind: str, q, k, v) -> np.ndarray:
    """[B, N]: what a full step keeps of the attention for one score."""
    if kind == "attention":
        return attention_maps(q, k).mean(1).sum(1)  # mean over heads, sum over queries
    if kind == "key_norm":
        return np.sqrt((k.astype(np.float64) ** 2).sum(-1)).mean(-1)
    return (1 - np.sqrt((v.astype(np.float64) ** 2).sum(-1))).sum(-1)


def base_score(kind: str, seen, tokens, held, age) -> np.ndarray:
    if kind == "similarity":
        a, b = tokens.astype(np.float64), held.astype(np.float64)
        seen = 1 - (a * b).sum(-1) / np.sqrt((a * a).sum(-1) * (b * b).sum(-1))
    elif kind == "staleness":
        seen = age.astype(np.float64)
    norm = np.sqrt((seen**2).sum(1, keepdims=True))
    return seen / np.where(norm == 0, 1, norm)


def spread(score: np.ndarray, bonus: float, rows: int, columns: int, cell: int = 2) -> np.ndarray:
    """The best token of each cell gains `bonus` times its score."""
    out = score.copy()
    for b in range(len(score)):
        for r in range(0, rows, cell):
            for c in range(0, columns, cell):
                inside = [(r + i) * columns + c + j for i in range(cell) for j in range(cell)]
                best = max(inside, key=lambda n: (score[b, n], -n))
                out[b, best] += bonus * score[b, best]
    return out


class Clock:
    """The modulus of the full steps, asked block by block; step counts down."""

    def __init__(self, settings: ToCa, steps: int):
        self.settings, self.steps, self.modulus = settings, steps, settings.interval

    def reset(self, step: int) -> None:
        s = self.settings
        weight = 0.0 if s.ratio == 0 else 0.4
        self.modulus = np.round(s.interval / (1 + weight - 2 * weight * step / self.steps))
        if s.ratio != 0 and step in range(int(self.steps * 0.2), int(self.steps * 0.4)):
            self.modulus = 2

    def kinds(self, step: int, depth: int, duca: bool = False) -> list[str]:
        """F, T or A of every block in this step."""
        out: list[str] = []
        for layer in range(depth):
            if not self.settings.quirks and layer:
                out.append(out[0])
                continue
            rest = 0 if step == self.steps - 1 else step % self.modulus
            out.append("F" if rest == 0 else "A" if duca and rest % 2 == 0 else "T")
            if out[-1] == "F" and layer == 0:
                self.reset(step)
        return out


def share(settings: ToCa, layer: int, depth: int, step: int, steps: int) -> float:
    by_layer = 1 + settings.layer_weight - 2 * settings.layer_weight * layer / (depth - 1)
    by_step = 1 + settings.step_weight - 2 * settings.step_weight * step / steps
    return min(max(settings.ratio * by_layer * by_step * settings.module, 0.0), 1.0)


def rhythm(settings: ToCa, steps: int, depth: int, duca: bool = False) -> list[list[str]]:
    """F, T or A of every block of every step, from the first one."""
    clock = Clock(settings, steps)
    return [clock.kinds(step, depth, duca) for step in reversed(range(steps))]


def round_robin(intervals: tuple[int, int], switch: int, importance: np.ndarray, pruned: int) -> list[list[str]]:
    """TokenCache: a full step begins each round, and each phase; in between the `pruned` blocks of the least importance
    [steps, depth] are T."""
    plan, since = [], 0
    for i, row in enumerate(importance):
        interval = intervals[0] if i < switch else intervals[1]
        since = 0 if i in (0, switch) or since == interval - 1 else since + 1
        least = sorted(range(len(row)), key=lambda layer, row=row: row[layer])[:pruned]
        plan.append(["T" if since and layer in least else "F" for layer in range(len(row))])
    return plan


def evaluate(
    network: Network, settings: ToCa, x, k, labels, cache: dict, kinds, step: int, steps: int, given: Any = None
):
    """One evaluation of one half of the guidance: (output, tokens computed by the MLPs).

    given [depth, N]: scores from outside.
    """
    tokens, context = network.embed(x.astype(np.float32), k, labels)
    tokens, computed = np.asarray(tokens), 0
    for layer in range(network.depth):
        own = cache.setdefault(layer, {})
        if kinds[layer] == "A":
            continue
        if kinds[layer] == "F":
            own["attn"], *qkv = network.attn(layer, tokens, context)
            if settings.score in ("attention", "key_norm", "value_norm"):
                own["seen"] = seen_by_attention(settings.score, *qkv)
            own["age"] = np.zeros(tokens.shape[:2], int)
        tokens = tokens + network.gate(layer, "attn", context) * own["attn"]
        fresh = network.mlp(layer, tokens, context)
        if kinds[layer] == "F":
            own["mlp"], computed = fresh.copy(), computed + tokens.shape[1]
        else:
            if settings.score == "given":
                own["seen"] = np.repeat(given[layer][None], len(tokens), 0)
            score = base_score(settings.score, own.get("seen"), tokens, own["mlp"], own["age"])
            score = score + settings.soft * own["age"] / settings.interval
            side = math.isqrt(tokens.shape[1])
            score = spread(score, settings.bonus, side, side)
            # float32, as the authors' code has it: a share of exactly m tokens stays one
            number = int(np.float32(share(settings, layer, network.depth, step, steps)) * np.float32(tokens.shape[1]))
            own["age"] += 1
            for b in range(len(tokens)):
                chosen = sorted(range(tokens.shape[1]), key=lambda n, b=b: -score[b, n])[:number]
                for n in chosen:
                    own["mlp"][b, n], own["age"][b, n] = fresh[b, n], 0
            computed += number
        tokens = tokens + network.gate(layer, "mlp", context) * own["mlp"]
    if kinds[-1] == "A":  # DuCa: what the last block gave out a step ago
        tokens = cache["hidden"]
    cache["hidden"] = tokens
    return network.head(tokens, context), computed


def sample(network: Network, settings: ToCa, x, ks, abar, labels, null, scale, plan: list[list[str]], given=None):
    """Guided DDIM: (samples, kind of every step, tokens that the MLPs of one half computed in every step).

    Args:
      plan: F, T or A of every block of every step; given: scores [steps, depth, N].
    """
    steps, caches, counts = len(ks), ({}, {}), []
    for i, kinds in enumerate(plan):
        rest = (kinds, steps - 1 - i, steps, None if given is None else given[i])
        on, computed = evaluate(network, settings, x, ks[i], labels, caches[0], *rest)
        off, _ = evaluate(network, settings, x, ks[i], null, caches[1], *rest)
        eps = off + scale * (on - off)
        x0 = (x - np.sqrt(1 - abar[i]) * eps) / np.sqrt(abar[i])
        x = np.sqrt(abar[i + 1]) * x0 + np.sqrt(1 - abar[i + 1]) * eps
        counts.append(computed)
    return x, "".join("*" if "F" in kinds and set(kinds) != {"F"} else kinds[0] for kinds in plan), counts


# ---------------------------------------------------------------- ICC


def layer_norm(x: np.ndarray, eps: float = 1e-6) -> np.ndarray:
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)


def gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def cut_to_rank(kernel: np.ndarray, parts: int, rank: int, inputs=None, outputs=None) -> np.ndarray:
    """The kernel [K, N], each of its parts replaced by the best matrix of that rank between the channel weights."""
    k, n = kernel.shape
    u = np.diag(np.ones(k) if inputs is None else np.sqrt(inputs) + 1e-6)
    whole = []
    for j in range(parts):
        own = slice(j * n // parts, (j + 1) * n // parts)
        v = np.diag(np.ones(n // parts) if outputs is None else np.sqrt(outputs[own]) + 1e-6)
        left, s, right = np.linalg.svd(u @ kernel[:, own] @ v)
        best = sum(s[r] * np.outer(left[:, r], right[r]) for r in range(min(rank, len(s))))
        whole.append(np.linalg.inv(u) @ best @ np.linalg.inv(v))
    return np.concatenate(whole, axis=1)


def icc(embed, head, blocks, heads: int, x, ks, abar, labels, null, scale, period: int, low) -> np.ndarray:
    """Guided DDIM of a DiT written out, its dense layers replaced at all but every `period`-th step by
    y' + (x - x') low[layer][name], x' and y' of the last full one.

    Args:
      blocks: per layer {name: {"kernel", "bias"}}; low: per layer {name: [K, N]}.
    """
    caches: tuple[dict, dict] = ({}, {})

    def evaluate(x, k, labels, cache, full):
        tokens, silu_c = embed(x.astype(np.float32), k, labels)
        for layer, block in enumerate(blocks):

            def dense(name, a, layer=layer, block=block):
                if not full:
                    before, y = cache[layer, name]
                    return y + (a - before) @ low[layer][name]
                cache[layer, name] = (a, a @ block[name]["kernel"] + block[name]["bias"])
                return cache[layer, name][1]

            six = silu_c @ block["ada"]["kernel"] + block["ada"]["bias"]
            shift1, scale1, gate1, shift2, scale2, gate2 = (m[:, None] for m in np.split(six, 6, axis=1))
            qkv = dense("qkv", layer_norm(tokens) * (1 + scale1) + shift1)
            q, k_, v = (a.reshape(*a.shape[:2], heads, -1) for a in np.split(qkv, 3, axis=-1))
            o = np.einsum("bhts,bshk->bthk", attention_maps(q, k_), v).reshape(tokens.shape)
            tokens = tokens + gate1 * dense("out", o)
            hidden = gelu(dense("fc1", layer_norm(tokens) * (1 + scale2) + shift2))
            tokens = tokens + gate2 * dense("fc2", hidden)
        return head(tokens.astype(np.float32), silu_c)

    for i, k in enumerate(ks):
        on, off = (evaluate(x, k, y, c, i % period == 0) for y, c in zip((labels, null), caches, strict=True))
        eps = off + scale * (on - off)
        x0 = (x - np.sqrt(1 - abar[i]) * eps) / np.sqrt(abar[i])
        x = np.sqrt(abar[i + 1]) * x0 + np.sqrt(1 - abar[i + 1]) * eps
    return x
