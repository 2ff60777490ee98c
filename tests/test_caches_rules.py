"""TaylorSeer, TeaCache and FBCache by plain loops: the caches of which many others are settings."""

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from difax.accel.caches import CACHES
from difax.core.contracts import Accelerator
from difax.registry import REGISTRIES
from tests.oracles.online import Network, modulated
from tests.test_caches import Problem, problem
from tests.test_caches_online import by_ddim, pieces
from tests.test_caches_plans import computed, text

CLOCKS = [  # with the full evaluations of 50: of the authors' DiT, FLUX and HunyuanVideo code
    ({"interval": 3}, 18, "FF..F..F..F"),
    ({"interval": 4}, 14, "FF...F...F"),
    ({"interval": 5}, 11, "FF....F....F"),
    ({"interval": 6}, 10, "FF.....F.....F"),
    ({"interval": 6, "first": 3}, 10, "FFF.....F"),
    ({"interval": 5, "first": 1}, 10, "F....F....F"),
]


@pytest.mark.parametrize(("settings", "full", "start"), CLOCKS)
def test_taylorseer_has_the_authors_clock(settings, full, start):
    got = text(computed(CACHES["taylorseer"](**settings))["blocks", "attn"])
    assert got.count("F") == full and got.startswith(start)


def test_taylorseer_diffusers_has_the_clock_of_diffusers():
    """FLUX's attention as diffusers 0.42.1 computes it in 20 evaluations, and 13 of 50."""
    got = text(computed(CACHES["taylorseer_diffusers"](), steps=20)["blocks", "attn"])
    assert got == "FFF.F....F....F....F"
    assert text(computed(CACHES["taylorseer_diffusers"]())["blocks", "mlp"]).count("F") == 13


STEPS = 12


@functools.cache
def unguided() -> tuple[Problem, Network, np.ndarray]:
    """A run of a tiny DiT, its network in pieces, and its samples without a cache."""
    p = problem("none", steps=STEPS)
    return p, pieces(p), np.asarray(p.run(REGISTRIES["cache"]["none"]())[0])


def blocks(
    network: Network, tokens: np.ndarray, context: Any, low: int, high: int, stands_in: Any = None
) -> np.ndarray:
    for layer in range(low, high):
        for name in ("attn", "mlp"):
            update, gate, *_ = network.branch(layer, name, tokens, context)
            update = update if stands_in is None else stands_in(layer, name, update)
            tokens = (tokens + gate * update).astype(np.float32)
    return tokens


def embedded(i: int, x: np.ndarray) -> tuple[np.ndarray, Any]:
    p, network, _ = unguided()
    tokens, context = network.embed(x.astype(np.float32), p.rows().model_time[i], p.inputs()[3])
    return np.asarray(tokens), context


def compare(accelerator: Accelerator, eps: Callable[..., np.ndarray]) -> np.ndarray:
    """The sampler gives the loop's samples; returns what was computed, [E, L, branches]."""
    p, _, plain = unguided()
    got, trace = p.run(accelerator)
    want = by_ddim(p, eps, guided=0)
    scale = np.abs(want).max()
    error, effect = np.abs(got - want).max() / scale, np.abs(plain - want).max() / scale
    print(f"{accelerator.name}: error {error:.1e}, effect of the cache {effect:.1e}")
    assert error < min(1e-4, 0.01 * effect)
    return np.asarray(trace.computed["blocks"])[..., 0]


def test_taylorseer_by_a_plain_loop():
    """The authors' factors, by their counter, which runs down: G_{i+1} = (G_i - G_i before) / (step - step before)."""
    order, interval, first = 3, 3, 2
    network = unguided()[1]
    factors: dict[tuple[int, str], list[np.ndarray]] = {}
    clock = {"counter": 0, "last": 0, "full": False}
    done = []

    def stands_in(step, layer, name, update):
        key = layer, name
        if not clock["full"]:
            x = step - clock["last"]
            return np.sum([g * x**i / math.factorial(i) for i, g in enumerate(factors[key])], 0).astype(np.float32)
        new, old = [update.astype(np.float64)], factors.get(key, [])
        for i in range(order):
            if i < len(old) and step < STEPS - first + 1:
                new.append((new[i] - old[i]) / (step - clock["last"]))
        factors[key] = new
        return update

    def eps(half, i, x):
        step = STEPS - 1 - i
        clock["full"] = step > STEPS - first - 1 or clock["counter"] == interval - 1
        clock["counter"] = 0 if clock["full"] else clock["counter"] + 1
        done.append(clock["full"])
        tokens, context = embedded(i, x)
        tokens = blocks(network, tokens, context, 0, 2, functools.partial(stands_in, step))
        clock["last"] = step if clock["full"] else clock["last"]
        return network.head(tokens, context)

    ran = compare(CACHES["taylorseer"](interval=interval, order=order, first=first), eps)
    np.testing.assert_array_equal(ran, np.broadcast_to(np.asarray(done)[:, None, None], ran.shape))
    assert 2 < sum(done) < STEPS / 2 + 1


@pytest.mark.parametrize("polynomial", [(1.0, 0.0), (2.0, -0.5, 0.3, 0.01)])
def test_teacache_by_a_plain_loop(polynomial):
    """The change of every evaluation is added up, rescaled, until it reaches the threshold; both ends are computed."""
    threshold = {2: 0.7, 4: 0.25}[len(polynomial)]
    network = unguided()[1]
    state: dict[str, np.ndarray] = {}
    sums, done = [0.0], []

    def eps(half, i, x):
        tokens, context = embedded(i, x)
        _, _, shift, scale = network.branch(0, "attn", tokens, context)
        m = modulated(tokens, shift, scale)
        change = np.abs(m - state["m"]).mean() / np.abs(state["m"]).mean() if i > 0 else 0.0
        total = sums[-1] + np.polyval(polynomial, change)
        full = i in (0, STEPS - 1) or not total < threshold
        sums.append(0.0 if full else total)
        done.append(full)
        state["m"] = m
        if full:
            out = blocks(network, tokens, context, 0, 2)
            state["residual"] = out - tokens
        return network.head(tokens + state["residual"], context)

    ran = compare(CACHES["teacache"](threshold, polynomial), eps)
    np.testing.assert_array_equal(ran, np.broadcast_to(np.asarray(done)[:, None, None], ran.shape))
    runs = "".join("F" if d else "." for d in done)
    print(runs)
    assert len(set(map(len, runs.strip("F").split("F")))) > 1  # it is not a plain interval


def test_fbcache_by_a_plain_loop():
    """The first block's residual is held against that of the last computed evaluation."""
    threshold = 0.4
    network = unguided()[1]
    state: dict[str, np.ndarray] = {}
    done = []

    def eps(half, i, x):
        tokens, context = embedded(i, x)
        behind = blocks(network, tokens, context, 0, 1)
        r = behind - tokens
        full = not state or not np.abs(state["r"] - r).mean() / np.abs(state["r"]).mean() < threshold
        done.append(full)
        if full:
            state.update(r=r, tail=blocks(network, behind, context, 1, 2) - behind)
        return network.head(behind + state["tail"], context)

    ran = compare(CACHES["fbcache"](threshold), eps)
    assert ran[:, 0].all()
    np.testing.assert_array_equal(ran[:, 1], np.broadcast_to(np.asarray(done)[:, None], ran[:, 1].shape))
    assert 2 < sum(done) < STEPS - 2
