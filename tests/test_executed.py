"""The operations of a run's trace against those that its program executes: the sampler op by op, with jit disabled, so
that every conditional is decided and every loop run. What counts knows nothing of what a technique leaves out."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.core import Tracer

from difax.build import build_setup
from difax.config import load_config, override
from difax.core.cost import model_cost, run_cost
from difax.core.noise import sample_keys
from difax.core.sample import initial_noise
from difax.study.methods import METHODS
from tests.toys import randomise

SMALL = [("model.depth", 4), ("model.width", 64), ("model.heads", 2), ("model.size", 16), ("steps", 12)]
# thresholds at which the random network computes some and fills some, and what a network of four blocks can have
INSTEAD = {
    "magcache, published": {"cache.ratios": (1.0,) + (0.99, 0.97, 1.02) * 3 + (0.98, 0.96)},  # of a network of its own
    "teacache 0.1": {"cache.threshold": 0.5},
    "teacache 0.2": {"cache.threshold": 1.0},
    "fbcache 0.08": {"cache.threshold": 0.6},
    "fbcache 0.12": {"cache.threshold": 0.8},
    "dbcache F8 W8 0.08": {"cache.threshold": 0.6, "cache.first": 2},
    "dbcache F1 W4 0.12 MC3": {"cache.threshold": 0.8},
    "dbcache F1 W4 0.12 MC3 taylor": {"cache.threshold": 0.8},
    "dbprune": {"cache.threshold": 0.8},
    "fastcache": {},
    "dbcache F1 W4 0.12 MC3 + fora 2": {"cache.dbcache.threshold": 0.8},
    "teacache 0.1 + toca": {"cache.teacache.threshold": 0.5},
    "fbcache 0.12 + bfloat16": {"cache.threshold": 0.8},
}
QUICK = [("model.depth", 2), ("steps", 5)]  # each operation is compiled by itself
# of every run; the others are slow
FAST = ("teacache 0.1",)
# (computed, held) evaluations of one half, by hand: 12 steps with guidance are 24, and 8 of Heun's 15 evaluations
HAND = {
    "dpmpp_2m 8": (16, 0),
    "heun 8": (30, 0),
    "fora 3": (8, 16),
    "fora 3 + int8_w8a8": (8, 16),
    "window 14": (24, 0),
    "int8_w8a8": (24, 0),
    "steps 8": (16, 0),
}
ELSEWHERE = {"tgate": "pixart_tiny"}  # methods of other models


class Products:
    """Counts the operations of products of arrays, and not of tracers, while they are run."""

    def __init__(self, monkeypatch):
        self.operations = 0.0
        for primitive, contracted in (
            (jax.lax.dot_general_p, self._contracted),
            (jax.lax.conv_general_dilated_p, self._under_the_kernel),
        ):
            monkeypatch.setattr(primitive, "bind", self._counted(primitive.bind, contracted))

    def _counted(self, bind, contracted):
        def counted(lhs, rhs, *more, **params):
            out = bind(lhs, rhs, *more, **params)
            if not any(isinstance(a, Tracer) for a in (lhs, rhs, out)):
                self.operations += 2.0 * math.prod(out.shape) * contracted(lhs, rhs, params)
            return out

        return counted

    def _contracted(self, lhs, rhs, params):
        return math.prod(lhs.shape[i] for i in params["dimension_numbers"][0][0])

    def _under_the_kernel(self, lhs, rhs, params):
        return math.prod(rhs.shape) / rhs.shape[params["dimension_numbers"].rhs_spec[0]]


@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in METHODS])
def test_a_trace_counts_what_its_program_executes(name, monkeypatch):
    method = METHODS[name]
    if method.calibrated:
        pytest.skip("needs a file")
    settings = {**method.settings, **INSTEAD.get(name, {})}
    config = load_config(ELSEWHERE.get(name, "fmnist_dit"))
    size = [] if name in ELSEWHERE else [*SMALL, *(QUICK if name in FAST else [])]
    run = build_setup(override(config, [*size, *settings.items()]))
    params = run.prepare(randomise(jax.eval_shape(run.model.init, jax.random.key(0))))
    keys = sample_keys(0, 2)
    x = initial_noise(run.process, keys, run.model.input_shape)
    rows = jax.tree.map(jnp.asarray, run.rows)
    cond = jax.tree.map(lambda a: jnp.ones((2, *a.shape), a.dtype), run.model.cond)
    with jax.disable_jit(), monkeypatch.context() as patch:
        products = Products(patch)
        _, trace = run.sampler()(params, x, keys, cond, rows, jnp.float32(2.0))
    cost = model_cost(run.model, params, run.attention)
    claimed = 2 * run_cost(cost, jax.tree.map(np.asarray, trace))
    assert claimed == pytest.approx(products.operations, rel=1e-6)
    if name in HAND:
        full, held = HAND[name]
        assert products.operations / 4 == full * by_hand() + held * by_hand(computed=False)


def by_hand(depth=4, width=64, tokens=16, patch=4, channels=1, computed=True):
    """Multiply-adds of `SMALL` on one sample, from the shapes of the DiT paper."""
    block = 6 * width**2 + computed * (tokens * 12 * width**2 + 2 * tokens**2 * width)
    ends = 2 * tokens * patch**2 * channels * width + 256 * width + width**2 + 2 * width**2
    return depth * block + ends
