"""A program that has asked jax for 64 bits draws, trains and calibrates a float32 model as any other does."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from difax.accel.attention import ATTENTIONS
from difax.accel.fit import CALIBRATIONS, FITS
from difax.accel.quant import QUANTS
from difax.accel.solvers import SOLVERS
from difax.build import build_setup
from difax.config import load_config
from difax.core import process as P
from difax.core.guidance import GUIDES
from difax.core.noise import sample_keys
from difax.core.sample import initial_noise
from difax.models import cnn
from difax.training import losses as L
from difax.training.train import TrainOptions, TrainState, make_step, optimizer
from difax.weights.conditions import random_conditions
from tests.families import some
from tests.test_caches import CASES, problem
from tests.test_solvers import ELSEWHERE
from tests.toys import randomise, tiny_dit

MODELS = ("flux", "pixart", "skip_dit", "wan", "sd3", "qwen_image", "flux2", "z_image")
DIT = {
    "model": {"name": "dit", "depth": 2, "width": 16, "heads": 2, "patch": 2, "size": 4, "channels": 3, "classes": 5},
    "process": {"name": "vp_linear"},
    "prediction": "eps",
    "grid": {"name": "log_snr"},
    "solver": {"name": "ddim"},
    "guide": {"name": "cfg"},
}


def in_both(run: Callable[[], Any]) -> tuple[Any, Any]:
    """What a function gives without and with 64 bits."""
    narrow = jax.tree.map(np.asarray, run())
    with jax.enable_x64(True):
        wide = jax.tree.map(np.asarray, run())
    return narrow, wide


def assert_same(narrow: Any, wide: Any, tolerance: float = 2e-5) -> None:
    """Equal types, and numbers equal to the rounding of float32."""
    assert jax.tree.structure(narrow) == jax.tree.structure(wide)
    for a, b in zip(jax.tree.leaves(narrow), jax.tree.leaves(wide), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        scale = max(float(np.nanmax(np.abs(a.astype(np.float64)), initial=0)), 1e-6)
        np.testing.assert_allclose(b.astype(np.float64), a.astype(np.float64), rtol=0, atol=tolerance * scale)


def drawn(**sections: Any) -> Any:
    """Samples and trace of three steps of a configuration, labels and scale as a user's program hands them in."""
    name = sections.pop("base", "dit")
    config = DIT if name == "dit" else load_config(f"{name}_tiny")
    run = build_setup({**config, "steps": 3, "scale": 1.5, **sections})
    params = run.prepare(randomise(jax.eval_shape(run.model.init, jax.random.key(0))))
    cond = jax.tree.map(jnp.asarray, random_conditions(run.model, 2))
    if name == "dit":
        cond = jnp.asarray(np.array([3, 0]))
    keys = sample_keys(0, 2)
    x = initial_noise(run.process, keys, run.model.input_shape)
    return run.sampler()(params, x, keys, cond, run.rows, jnp.asarray(np.float64(1.5)))


@pytest.mark.parametrize("name", some([c.name for c in CASES if c.on], "taylorseer", "dbprune", "fastercache"))
def test_caches(name):
    (case,) = [c for c in CASES if c.name == name]

    def run() -> Any:
        accelerator = case.make("on")
        return problem(toy=case.toy).taught(accelerator).run(accelerator)

    (samples, trace), (wide, wide_trace) = in_both(run)
    assert_same(samples, wide)
    assert_same(trace.computed, wide_trace.computed, 0)
    assert_same(trace._replace(metric=()), wide_trace._replace(metric=()))


ADAMS = ("unipc", "dc_solver", "sa_solver", "deis", "ipndm", "pndm", "lms", "dpm_solver_v3")
LEARNED = ("bns", "ddss", "ltsl", "iia", "usf")


@pytest.mark.parametrize(
    ("solver", "settings"),
    [
        ("euler", {}),
        ("ddim", {"eta": 1.0}),
        ("ddpm", {}),
        ("heun", {}),
        pytest.param("heun", {"space": "flow"}, marks=pytest.mark.slow),
        ("dpmpp_2m", {}),
        ("pc", {}),
        pytest.param("restart", {"plan": [[3, 1, 0.7, 2.0]]}, marks=pytest.mark.slow),
        *(
            pytest.param(name, {}, marks=pytest.mark.slow)
            for name in ("euler_ancestral", "kdpm2", "edm", "flow_ab", "sampler_scheduler")
        ),
        ("sa_solver", {}),
        *(pytest.param(name, {}, marks=pytest.mark.slow) for name in ADAMS if name != "sa_solver"),
        *(pytest.param(name, {}, marks=pytest.mark.slow) for name in LEARNED),
        ("seeds_3", {}),
        ("dpm_solver_23", {}),
        *(
            pytest.param(name, {}, marks=pytest.mark.slow)
            for name in ELSEWHERE["solvers_exponential"]
            if name not in ("seeds_3", "dpm_solver_23")
        ),
        pytest.param("gddim", {}, marks=pytest.mark.slow),
    ],
)
def test_solvers(solver, settings):
    """Alone, as the loop of the sampler calls them."""

    def run() -> Any:
        made, process = SOLVERS[solver](**settings), P.vp_linear()
        rows = jax.tree.map(lambda a: np.asarray(a)[1], made.grid(process, np.array([0.9, 0.5, 0.2])))
        rows = jax.tree.map(lambda a: a.astype(np.float32) if a.dtype == np.float64 else a, rows)
        x, keys = initial_noise(process, sample_keys(0, 2), (4,)), sample_keys(1, 2)
        from difax.core.process import predict

        return made.step(predict(jnp.tanh(x), "eps", False, x, rows.level), x, made.init(x), rows, keys)

    # genie and mcg differentiate a network, others are of position and velocity, or their steps are of a drive
    elsewhere = {*ELSEWHERE["solvers_exponential"], *ELSEWHERE["parallel_time"], "mcg", "genie", "sscs", "cld_em"}
    assert set(SOLVERS) - elsewhere == {
        *("euler", "ddim", "ddpm", "heun", "dpmpp_2m", "gddim"),
        *("euler_ancestral", "kdpm2", "edm", "restart", "pc", "flow_ab", "sampler_scheduler"),
        *ADAMS,
        *LEARNED,
    }
    assert_same(*in_both(run))


# every solver on a process, but mcg, which needs a measurement, and those of velocities; every process under two
DRAWN = [(s, "vp_cosine") for s in SOLVERS if s not in ("mcg", "sscs", "cld_em")]
DRAWN += [(s, p) for s in ("heun", "unipc") for p in P.PROCESSES if p != "vp_cosine"]


@pytest.mark.parametrize(
    ("solver", "process"),
    [pytest.param(*at, marks=() if at == ("heun", "vp_cosine") else pytest.mark.slow, id="-".join(at)) for at in DRAWN],
)
def test_processes_and_solvers_in_the_sampler(process, solver):
    prediction = "velocity" if process in ("flow", "sit") else "eps"
    sections = {"process": {"name": process}, "prediction": prediction, "solver": {"name": solver}}
    assert_same(*in_both(lambda: drawn(**sections)))


@pytest.mark.parametrize("guide", some(GUIDES, "interval"))
@pytest.mark.parametrize("conditioning", ["ahead", pytest.param("each", marks=pytest.mark.slow)])
@pytest.mark.slow
def test_guides(guide, conditioning):
    assert_same(*in_both(lambda: drawn(guide={"name": guide}, conditioning=conditioning, layout="unstacked")))


@pytest.mark.parametrize("quant", some([q for q in QUANTS if q != "none"], "int4_w4a8"))
def test_quants(quant):
    model = DIT["model"] | {"width": 64}
    section = {"name": quant} | ({"rank": 4} if quant.startswith("svd") else {})
    assert_same(*in_both(lambda: drawn(quant=section, model=model)), tolerance=2e-2)


@pytest.mark.parametrize("attend", some([a for a in ATTENTIONS if a not in ("xla", "cudnn")], "window"))
@pytest.mark.parametrize("base", some(("dit", *MODELS)))
@pytest.mark.slow
def test_models_and_attentions(base, attend):
    settings = {"window": {"radius": 2}, "chunked": {"block_q": 4, "block_k": 4}}.get(attend, {})
    assert_same(*in_both(lambda: drawn(base=base, attend={"name": attend, **settings})))


def trained(loss: Any, params: Any, batch: Any) -> Any:
    options = TrainOptions(steps=6, warmup=2, decay=2, log_every=1)
    params, ema = jax.tree.map(jnp.array, params), jax.tree.map(jnp.array, params)
    state = TrainState(jnp.zeros((), jnp.int32), params, ema, optimizer(options).init(params))
    step = make_step(loss, options)
    state, _ = step(state, batch)
    state, metrics = step(state, batch)
    return state._replace(optimizer=()), metrics


@pytest.mark.parametrize("loss", ["flow", pytest.param("ddpm", marks=pytest.mark.slow)])
def test_training(loss):
    model, params = tiny_dit(depth=1, learn_sigma=loss == "ddpm")
    batch = {"image": np.random.default_rng(0).integers(0, 256, (4, 4, 4, 3), np.uint8), "label": np.arange(4) % 5}

    def run() -> Any:
        if loss == "flow":
            made = L.flow_loss(model, P.vp_cosine(), "eps", times="logit_normal", label_dropout=0.5)
        else:
            made = L.ddpm_loss(model, P.vp_linear(), label_dropout=0.5)
        return trained(made, params, batch)

    assert_same(*in_both(run), tolerance=1e-4)


@pytest.mark.slow
def test_training_a_classifier():
    model = cnn(size=8, channels=1, classes=3, width=8)
    params = jax.jit(model.init)(jax.random.key(0))
    batch = {"image": np.random.default_rng(0).integers(0, 256, (4, 8, 8, 1), np.uint8), "label": np.arange(4) % 3}
    made = L.cross_entropy(model, label_smoothing=0.1, flip=0.5, shift=1)
    assert_same(*in_both(lambda: trained(made, params, batch)), tolerance=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("technique", [*CALIBRATIONS, "fastcache"])
def test_calibration(technique):
    def run() -> Any:
        recorder = (FITS if technique == "fastcache" else CALIBRATIONS)[technique].recorder(6)
        return problem().run(recorder)

    assert_same(*in_both(run), tolerance=1e-4)
