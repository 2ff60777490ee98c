"""No technique makes a NaN or an infinity where none is meant, so that jax_debug_nans and jax_debug_infs find those
that are: samplers op by op, every operation's result looked at."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from difax.accel.attention import ATTENTIONS, attention
from difax.accel.caches import CACHES
from difax.accel.quant import QUANTS
from difax.accel.solvers import SOLVERS
from difax.build import build_setup
from difax.cli import main
from difax.config import load_config, override
from difax.core import process as P
from difax.core.contracts import Accelerator
from difax.core.grids import GRIDS, make_times
from difax.core.guidance import GUIDES
from difax.core.noise import sample_keys
from difax.core.qtensor import quantize_params
from difax.core.sample import initial_noise, make_rows, make_sampler
from difax.core.stack import with_learned
from difax.report import format_table
from difax.weights.checkpoint import save_safetensors
from tests.families import some
from tests.test_batches import ONLINE
from tests.test_caches import CASES, Case
from tests.toys import randomise, tiny_dit

ON = {case.name: case for case in CASES}
STEPS = 6
NARROW: dict[str, Any] = {"int4_weight": {"group": 8}, "svdquant_w4a8": {"rank": 2}}  # for a width of 16


def watched(
    accelerator: Accelerator | None = None,
    *,
    solver: str = "ddim",
    guide: str = "cfg",
    process: Any = None,
    prediction: str = "eps",
    attend: Any = None,
    quant: str = "none",
    toy: Any = tiny_dit,
    steps: int = STEPS,
) -> None:
    """Runs a sampler op by op with both flags on, and once more compiled.

    Raises:
      FloatingPointError: some operation gave NaN or infinity.
    """
    model, params = toy()
    process, accelerator = process or P.vp_linear(), accelerator or Accelerator()
    params = with_learned(quantize_params(params, QUANTS[quant](model, **NARROW.get(quant, {}))), accelerator)
    keys = sample_keys(0, 2)
    x = np.asarray(initial_noise(process, keys, model.input_shape))
    labels = jnp.asarray([3, 0], jnp.int32)
    solving, guiding = SOLVERS[solver](), GUIDES[guide]()
    times = make_times(GRIDS["uniform"](), process, steps)
    rows = jax.tree.map(jnp.asarray, make_rows(solving, guiding, process, times, accelerator, model.stages))
    sampler = make_sampler(model, process, prediction, solving, guiding, accelerator, attention=attend)
    with jax.debug_nans(True), jax.debug_infs(True):
        sampler(params, x, keys, labels, rows, jnp.float32(2.0))
        with jax.disable_jit():
            samples, trace = sampler(params, x, keys, labels, rows, jnp.float32(2.0))
    assert all(np.isfinite(a).all() for a in jax.tree.leaves((samples, trace)))


@pytest.mark.slow
def test_what_is_watched_can_be_seen():
    """The counterpart: an accelerator that makes one infinity that reaches nothing."""

    def trunk(blocks, tokens, context, state, memory, row):
        out, memory, report = blocks.run(tokens, memory)
        unseen = jnp.where(row.i == 3, 1.0, 0.0) / jnp.where(row.i == 3, 0.0, 1.0)
        return jnp.where(unseen > 0, out, out), state, memory, report

    with pytest.raises(FloatingPointError):
        watched(Accelerator(trunk=trunk))


@pytest.mark.parametrize("name", some(CACHES, "dbcache", "adacache"))
def test_a_cache(name):
    watched(ON[name].make("on"), toy=ON[name].toy)


@pytest.mark.parametrize("name", some(ONLINE))
def test_a_gate_that_decides_by_samples(name):
    watched(CACHES[name](per_sample=True, **ONLINE[name]))


@pytest.mark.parametrize(
    "case",
    some(
        [
            Case("toca", {}, {"interval": 4, "ratio": 0.2, "select": "stratified"}),
            Case("dbcache", {}, dict(threshold=0.4, warmup=1, forecast="taylor", order=2, max_accumulated=1.0)),
            Case("teacache", {}, dict(threshold=0.3, coefficients="flux")),
            Case("fastcache", {}, dict(threshold=4.4, motion=0.5)),
            Case("fbcache", {}, dict(threshold=0.5, dtype="float8_e4m3fn")),
        ]
    ),
    ids=lambda case: "-".join(map(str, [case.name, *case.on.values()])),
)
def test_other_settings_of_caches(case):
    watched(case.make("on"))


@pytest.mark.parametrize("name", some(["teacache", "fbcache", "dbprune", "fastcache", "adacache"], "fbcache"))
def test_a_gate_of_a_network_that_adds_nothing(name):
    """As initialised, adaLN-Zero's blocks add zeros: there is nothing to compare with, and nothing is reused for it."""

    def untrained():
        model, params = tiny_dit()
        return model, jax.tree.map(jnp.zeros_like, params)

    watched(CACHES[name](**ONLINE[name]), toy=untrained)


OTHER_SOLVERS = ("mcg", "sscs", "cld_em", "genie")  # of a measurement, of velocities, of derivatives


@pytest.mark.slow
@pytest.mark.parametrize(
    ("solver", "guide"),
    [
        *((s, "cfg") for s in SOLVERS if s not in OTHER_SOLVERS),
        *(("dpmpp_2m", guide) for guide in GUIDES if guide != "cfg"),
    ],
)
def test_a_solver_and_a_guide(solver, guide):
    watched(solver=solver, guide=guide)
    if solver not in ("ddpm", "gotta_go_fast"):  # whose steps have no slope out of pure noise of a flow
        watched(solver=solver, guide=guide, process=P.flow(), prediction="velocity")


@pytest.mark.parametrize("name", some(QUANTS, "int8_w8a8"))
def test_a_quantisation(name):
    watched(quant=name, steps=2)


@pytest.mark.parametrize("name", some([n for n in ATTENTIONS if n != "cudnn"], "chunked"))
def test_an_attention(name):
    settings = {"chunked": {"block_q": 3, "block_k": 3}, "window": {"radius": 1, "block": 3}}
    watched(attend=attention(name, {name: settings.get(name, {})}), steps=2)


def test_images_that_are_not_finite_end_in_1(tmp_path, capsys):
    """Written all the same, and told in the table and in JSON: how many of them."""
    config = override(load_config("fmnist_smoke"), [("model.depth", 1), ("model.width", 16), ("steps", 2)])
    params = randomise(jax.eval_shape(build_setup(config).model.init, jax.random.key(0)))
    labels = params["ends"]["label"]
    for huge, broken in ((1.0, 0), (1e38, 1)):
        ends = {**params["ends"], "label": labels.at[1].multiply(huge)}
        weights, out = str(tmp_path / "w.safetensors"), tmp_path / f"{broken}.npz"
        save_safetensors(weights, {**params, "ends": ends}, {"config": config})
        command = ["sample", "--weights", weights, "--labels", "0,1,2", "--out", str(out), "--no-compile-cache"]
        assert main([*command, "--json"]) == broken
        said = capsys.readouterr()
        told = json.loads(said.out)
        assert told["finite"] is (broken == 0) and told.get("not_finite", 0) == broken
        assert ("1 of 3 images are not finite" in said.err) == broken
        samples = np.load(out)["samples"]
        assert list(np.isfinite(samples).all((1, 2, 3))) == [True, not broken, True]
        assert ("images that are not finite" in format_table(told)) == broken
