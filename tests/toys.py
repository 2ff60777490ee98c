"""Small problems for the tests: solvers on a mixture with a known denoiser, and tiny networks without zeros."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from difax.core.contracts import Level, Model, Prediction, Solver, Stage
from difax.core.process import Process
from difax.core.trunk import forward
from difax.models import dit, skip_dit
from difax.models.layers import Dense
from tests.oracles.mixture import Mixture
from tests.quick import FLAGS

MIXTURE = Mixture()

# compiled as users' programs are, for the tests of equal bits; the others are compiled quickly (tests/quick.py)
FULL = {flag: value for flag, (_, value) in FLAGS.items()}
# what a grid needs: keys, without which it is none; discrete steps; a flow
KEYED, DISCRETE, FLOWS = (
    ("given", "measured"),
    ("leading", "lcm", "diffusers"),
    ("shifted", "flow_match", "diffusers_flow"),
)
# (model, params, x, model_time, cond) -> output
network = jax.jit(forward, static_argnums=0)


def predict(x: Any, level: Level) -> Prediction:
    """What a perfect network of `MIXTURE` gives a solver, with a made-up variance channel, in the precision of x."""
    x_BD = np.asarray(x, np.float64)
    x0 = MIXTURE.x0(x_BD, level.alpha, level.sigma)
    eps = (x_BD - level.alpha * x0) / level.sigma
    return Prediction(*(jnp.asarray(a, x.dtype) for a in (x0, eps, MIXTURE.variance(x_BD))))


def takes(grid: str, process: Process) -> bool:
    """Whether a grid without keys lays times of a process."""
    if grid in KEYED or (grid in DISCRETE and process.steps is None):
        return False
    return grid not in FLOWS or process.name in ("flow", "sit")


def solve(solver: Solver, process: Process, times: np.ndarray, x: Any, predict: Any, keys: Any = None) -> list[Any]:
    """Runs a solver's own table and step function in a Python loop, in the precision of x.

    Args:
      predict: (x, level) -> Prediction.
      keys: what each evaluation's step gets as its keys, or None.

    Returns:
      x before the first and after every evaluation.
    """
    rows = solver.grid(process, np.asarray(times, np.float64))
    path, state = [x], solver.init(x)
    step = jax.jit(solver.step) if len(rows.t) > 20 else solver.step  # a short run is sooner done than compiled
    for e in range(len(rows.t)):
        row = jax.tree.map(lambda a, e=e: a[e], rows)
        prediction = predict(path[-1], row.level)
        x, state = step(prediction, path[-1], state, row, None if keys is None else keys[e])
        path.append(x)
    return path


def randomise(params: Any, seed: int = 0) -> Any:
    """Every leaf anew, biases and adaLN-Zero's zeros too: normal with standard deviation 1/sqrt(fan in)."""
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(seed)

    def draw(leaf: Any) -> jax.Array:
        fan_in = leaf.shape[-2] if leaf.ndim > 1 else leaf.shape[0]
        return jnp.asarray(rng.normal(size=leaf.shape) / np.sqrt(fan_in), leaf.dtype)

    return jax.tree.unflatten(tree, [draw(leaf) for leaf in leaves])


class TanhBlock(nn.Module):
    """h + 0.5 tanh(h W + tau b): the block of the toy network that golden_dbcache.md describes."""

    width: int

    def setup(self):
        self.dense = Dense(self.width)

    def mods(self, context):
        return {}

    def f(self, h, mods, context, attend):
        p = self.dense.variables["params"]
        return 0.5 * jnp.tanh(h @ p["kernel"] + context["tau"] * p["bias"][None, None])

    def gate(self, mods, branch):
        return jnp.ones((1, 1, 1))


def tanh_stack() -> tuple[Model, Any, np.ndarray]:
    """The toy network of tests/golden/dbcache.json with its parameters and x0; the condition scales the input."""
    r = np.random.default_rng(0)
    w = r.standard_normal((6, 8, 8)) * 0.6 / np.sqrt(8)
    b = r.standard_normal((6, 8)) * 0.5
    x0 = r.standard_normal((1, 4, 8))

    def embed(params, x, model_time, cond):
        return x * cond[:, None, None], {"tau": model_time[:, None, None]}

    model = Model(
        name="tanh",
        init=lambda key: {"blocks": {"dense": {"kernel": jnp.asarray(w), "bias": jnp.asarray(b)}}},
        embed=embed,
        stages=(Stage("blocks", 6, TanhBlock(8), ("f",)),),
        head=lambda params, tokens, context: tokens,
        null=lambda cond: 0.9 * cond,
        input_shape=(4, 8),
        learn_sigma=False,
        classes=0,
        dtype="float64",
        cond=jax.ShapeDtypeStruct((), "float64"),
    )
    return model, model.init(jax.random.key(0)), x0


def tiny_dit(**overrides: Any) -> tuple[Model, Any]:
    """A DiT of two blocks on 4 x 4 x 3 inputs with five classes, and random parameters for it."""
    geometry = dict(depth=2, width=16, heads=2, patch=2, size=4, channels=3, classes=5, learn_sigma=False)
    model = dit(**(geometry | overrides))
    return model, randomise(jax.eval_shape(model.init, jax.random.key(0)))


def tiny_skip_dit(**overrides: Any) -> tuple[Model, Any]:
    """A Skip-DiT of two and two blocks, otherwise as `tiny_dit`."""
    geometry = dict(depth=4, width=16, heads=2, patch=2, size=4, channels=3, classes=5, learn_sigma=False)
    model = skip_dit(**(geometry | overrides))
    return model, randomise(jax.eval_shape(model.init, jax.random.key(0)))
