"""Everything composes: solvers x caches x quantisation x attention x models x guidance, one row per cell."""

import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from difax.accel.quant import QUANTS as ALL_QUANTS
from difax.build import Setup, build_setup
from difax.config import load_config
from difax.core.noise import sample_keys
from difax.core.sample import initial_noise, make_sampler
from difax.core.trunk import unstack
from difax.weights.conditions import random_conditions
from tests.families import some
from tests.toys import randomise

STEPS = 3
TINY_DIT = {
    "model": {"name": "dit", "depth": 2, "width": 16, "heads": 2, "patch": 2, "size": 4, "channels": 3, "classes": 5},
    "process": {"name": "flow"},
    "prediction": "velocity",
    "grid": {"name": "uniform"},
}
MODELS = ("dit", "flux", "pixart", "wan", "sd3", "qwen_image", "flux2", "z_image")
SOLVERS = ("ddim", "dpmpp_2m")
CACHES = ("none", "fora")
QUANTS = ("none", "int8_w8a8")
ATTENDS = ("xla", "chunked")
GUIDES = ("none", "cfg")


class Cell(NamedTuple):
    """One composition: a name in each registry."""

    model: str
    solver: str = "ddim"
    cache: str = "none"
    quant: str = "none"
    attend: str = "xla"
    guide: str = "none"


CELLS = [Cell(*names) for names in itertools.product(MODELS, SOLVERS, CACHES, QUANTS, ATTENDS, GUIDES)]


def _row(cell: Cell) -> Any:
    """Every run of the tests has a model of images and one of videos with nothing on, guided, and in the first each
    member alone and all of them together; the slow ones have the rest."""
    on = sum(getattr(cell, section) != "none" for section in ("cache", "quant")) + (cell.attend != "xla")
    few = (
        ((on == 0 and cell.model in ("dit", "wan")) or (on in (1, 3) and cell.model == "dit"))
        and cell.guide == "cfg"
        and cell.solver == "ddim"
    )
    return pytest.param(cell, marks=() if few else pytest.mark.slow, id="-".join(cell))


class Drawn(NamedTuple):
    samples: np.ndarray
    computed: float
    halves: list[float]
    retraced: bool


@functools.cache
def weights(model: str) -> Any:
    return randomise(jax.eval_shape(composed(Cell(model)).model.init, jax.random.key(0)))


def composed(cell: Cell) -> Setup:
    config = TINY_DIT if cell.model == "dit" else load_config(f"{cell.model}_tiny")
    config = {k: v for k, v in config.items() if k not in ("attend", "quant", "cache")}
    names = [(section, {"name": getattr(cell, section)}) for section in Cell._fields[1:]]
    blocks = {"block_q": 4, "block_k": 4} if cell.attend == "chunked" else {}
    settings = {"steps": STEPS, "scale": 1.5, **dict(names), "attend": {"name": cell.attend, **blocks}}
    return build_setup({**config, **settings})


@functools.cache
def draw(cell: Cell) -> Drawn:
    """Two samples of a cell, and whether another seed, scale and time grid trace it anew."""
    run, traces = composed(cell), [0]

    def embed(*arguments):
        traces[0] += 1
        return run.model.embed(*arguments)

    model = run.model._replace(embed=embed)
    sampler = make_sampler(
        model, run.process, run.prediction, run.solver, run.guide, run.accelerator, attention=run.attention
    )
    params = run.prepare(weights(cell.model))
    cond = jax.tree.map(jnp.asarray, random_conditions(run.model, 2))
    sampler = jax.jit(sampler)

    def once(seed: int, scale: float, rows: Any) -> Any:
        keys = sample_keys(seed, 2)
        x = initial_noise(run.process, keys, run.model.input_shape)
        return sampler(params, x, keys, cond, rows, jnp.float32(scale))

    samples, trace = once(0, 1.5, run.rows)
    first = traces[0]
    once(1, 2.5, run.rows._replace(t=run.rows.t * 0.9))
    computed = float(np.mean([np.mean(c) for c in trace.computed.values()]))
    return Drawn(np.asarray(samples), computed, np.asarray(trace.halves).tolist(), traces[0] != first)


def difference(a: Cell, b: Cell) -> float:
    """Relative difference of two cells' samples."""
    one, other = draw(a).samples, draw(b).samples
    return float(np.linalg.norm(one - other) / np.linalg.norm(other))


@pytest.mark.parametrize("cell", [_row(cell) for cell in CELLS])
def test_cell(cell):
    drawn = draw(cell)
    assert np.all(np.isfinite(drawn.samples)) and not drawn.retraced
    assert drawn.halves == [2.0 if cell.guide == "cfg" else 1.0] * STEPS
    assert drawn.computed == pytest.approx(1 / STEPS if cell.cache == "fora" else 1)
    if cell.attend == "chunked":  # exact: the same cell with the reference attention
        assert difference(cell, cell._replace(attend="xla")) < (2e-2 if cell.quant != "none" else 1e-4)
    for section in ("cache", "quant", "guide"):  # not exact: switched on, it changes the samples
        if getattr(cell, section) != "none":
            assert difference(cell, cell._replace(**{section: "none"})) > 1e-4, section


@pytest.mark.parametrize("model", some(MODELS, "dit"))
def test_quantising_and_writing_the_blocks_out_commute(model):
    run = composed(Cell(model, quant="int8_w8a8"))
    one = unstack(run.model, run.prepare(weights(model)))
    other = run._replace(rules=[(p.replace("/", "/.*", 1), how) for p, how in run.rules]).prepare(
        unstack(run.model, weights(model))
    )
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.parametrize("model", some(MODELS, "dit", "wan"))
def test_exact_members_together_are_the_plain_run(model):
    """Every block written out, chunked attention and a cache that never fills, at once."""
    cell = Cell(model, guide="cfg")
    run = composed(cell._replace(attend="chunked", cache="fora"))
    from difax.accel.caches import CACHES as factories

    fora = factories["fora"](interval=1)
    sampler = make_sampler(run.model, run.process, run.prediction, run.solver, run.guide, fora, attention=run.attention)
    rows = run.rows._replace(plan=fora.plan(run.rows, run.model.stages))
    keys = sample_keys(0, 2)
    x = initial_noise(run.process, keys, run.model.input_shape)
    cond = jax.tree.map(jnp.asarray, random_conditions(run.model, 2))
    params = unstack(run.model, run.prepare(weights(model)))
    got, _ = jax.jit(sampler)(params, x, keys, cond, rows, jnp.float32(1.5))
    want = draw(cell).samples
    assert np.linalg.norm(got - want) / np.linalg.norm(want) < 1e-4


# ---------------------------------------------------------------- widths that no group and no byte divides

WIDTHS = {  # models whose dense layers have an odd number of inputs, or one that 64 does not divide
    "dit": {"width": 20, "heads": 1, "patch": 1, "size": 3, "channels": 3},
    "flux": {},
    "pixart": {},
    "skip_dit": {},
    "wan": {},
    "sd3": {},
    "qwen_image": {},
    "flux2": {},
    "z_image": {},
}
ATTENTIONS_ON = {"xla": {}, "chunked": {"block_q": 4, "block_k": 4}, "window": {"radius": 1}}


@functools.cache
def _quantised(model: str, quant: str, attend: str) -> np.ndarray:
    """One evaluation of the network, every dense layer of which is quantised, ends and all."""
    config = TINY_DIT if model == "dit" else load_config(f"{model}_tiny")
    config = {k: v for k, v in config.items() if k not in ("attend", "quant", "cache")}
    section = {} if quant == "none" else {"layers": ".", **({"rank": 1} if "svd" in quant else {})}
    run = build_setup(
        {
            **config,
            "model": {**config["model"], **WIDTHS[model]},
            "solver": {"name": "ddim"},
            "steps": 1,
            "scale": 1.0,
            "guide": {"name": "none"},
            "quant": {"name": quant, **section},
            "attend": {"name": attend, **ATTENTIONS_ON[attend]},
        }
    )
    params = run.prepare(randomise(jax.eval_shape(run.model.init, jax.random.key(0))))
    cond = jax.tree.map(jnp.asarray, random_conditions(run.model, 1))
    keys = sample_keys(0, 1)
    x = initial_noise(run.process, keys, run.model.input_shape)
    return np.asarray(run.sampler()(params, x, keys, cond, run.rows, jnp.float32(1.0))[0])


QUANTISED = list(itertools.product(WIDTHS, ALL_QUANTS, ATTENTIONS_ON))


@pytest.mark.parametrize("cell", some(QUANTISED, ("dit", "int4_weight", "window")), ids="-".join)
def test_every_quantisation_and_attention_on_every_model(cell):
    model, quant, attend = cell
    got, plain = _quantised(model, quant, attend), _quantised(model, "none", "xla")
    assert got.shape == plain.shape and np.all(np.isfinite(got))
    if (quant, attend) != ("none", "xla"):
        change = np.linalg.norm(got - plain) / np.linalg.norm(plain)
        print(f"{model} {quant} {attend}: {change:.1e} from the plain network")
        assert change < 1.5
        assert change > (0 if (quant, attend) == ("none", "chunked") else 1e-5)
