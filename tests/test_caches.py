"""One row per accelerator: neutral is off, compiled once, stable carry, counted compute, its rule in plain Python."""

import functools
import json
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from difax.accel.caches import CACHES
from difax.accel.fit.icc import icc_factors
from difax.accel.solvers import SOLVERS
from difax.core import process as P
from difax.core.contracts import Accelerator, Row
from difax.core.grids import GRIDS, make_times
from difax.core.guidance import GUIDES
from difax.core.noise import sample_keys
from difax.core.sample import initial_noise, make_rows, make_sampler
from difax.core.shapes import trunk_spec
from difax.core.stack import with_learned
from difax.core.trunk import neutral
from tests.families import some
from tests.oracles import caches as oracle
from tests.toys import FULL, network, tanh_stack, tiny_dit, tiny_skip_dit

STEPS = 6
LABELS = jnp.asarray([3, 0], jnp.int32)
ACCELERATORS = {"none": neutral, **CACHES}


class Case(NamedTuple):
    """One accelerator: arguments that switch it off, arguments that switch it on, and what it then computes."""

    name: str
    off: dict[str, Any]
    on: dict[str, Any] = {}
    computed: tuple[float, ...] = (1,) * STEPS  # of the evaluations, fraction of all branches
    halves: tuple[float, ...] = (2,) * STEPS  # that are run
    toy: Any = tiny_dit  # the network

    def make(self, which: str) -> Accelerator:
        return ACCELERATORS[self.name](**getattr(self, which))


ROUTED = np.full((STEPS, 2, 2), -5.0)  # logits of routers: evaluations, layers, branches
ROUTED[1, 0, 0] = ROUTED[5, :, 1] = 5.0
DISTANCE = abs(np.subtract.outer(range(STEPS), range(STEPS)))
LOW_RANK = icc_factors(tiny_dit()[1], tiny_dit()[0].stages, rank=2)
HALF_OF_THE_TOKENS = {"interval": 4, "ratio": 0.2, "step_weight": 0.0, "layer_weight": 0.0}  # of the MLPs
CASES = [
    Case("none", off={}),
    Case("fora", off={"interval": 1}, on={"interval": 3}, computed=(1, 0, 0, 1, 0, 0)),
    Case("scheduled", off={"schedule": [1] * STEPS}, on={"schedule": [1, 0, 0, 1, 0, 0]}, computed=(1, 0, 0, 1, 0, 0)),
    Case("taylorseer", off={"interval": 1}, on={"interval": 3, "order": 2}, computed=(1, 1, 0, 0, 1, 0)),
    Case("taylorseer_diffusers", off={"interval": 1}, on={"interval": 3, "first": 2}, computed=(1, 1, 0, 1, 0, 0)),
    Case("teacache", off={"threshold": 0.0}, on={"threshold": 1e9}, computed=(1, 0, 0, 0, 0, 1)),
    Case("fbcache", off={"threshold": 0.0}, on={"threshold": 1e9}, computed=(1, 0.5, 0.5, 0.5, 0.5, 0.5)),
    Case(
        "dbcache",
        off={"threshold": 0.0, "warmup": 2},
        on={"threshold": 1e9, "warmup": 2, "max_continuous": 2},
        computed=(1, 1, 0.5, 0.5, 1, 0.5),
    ),
    Case(
        "dbprune",
        off={"threshold": 0.0, "warmup": 2},
        on={"threshold": 1e9, "warmup": 2, "max_continuous": 2},
        computed=(1, 1, 0.5, 0.5, 1, 0.5),
    ),
    Case("fora_dit", off={"interval": 1}, on={"interval": 3}, computed=(1, 0, 1, 0, 0, 1)),
    Case(
        "smoothcache",
        off={"schedule": {"attn": (1,) * STEPS}},
        on={"schedule": {"attn": (1, 0, 1, 0, 0, 1), "mlp": (1, 1, 0, 0, 1, 1)}},
        computed=(1, 0.5, 0.5, 0, 0.5, 1),
    ),
    Case("learning_to_cache", off={"logits": abs(ROUTED)}, on={"logits": ROUTED}, computed=(1, 0.25, 1, 0, 1, 0.5)),
    Case("harmonica", off={"logits": abs(ROUTED)}, on={"logits": ROUTED}, computed=(1, 0.25, 0, 0, 0, 0.5)),
    Case("pab", off={"ranges": {"attn": 1}}, on={"ranges": {"attn": 2}}, computed=(1, 0.5, 1, 0.5, 1, 1)),
    Case(
        "delta_dit",
        off={"interval": 1},
        on={"interval": 2, "cutoff": 3, "blocks": 1},
        computed=(1, 0.5, 1, 0.5, 1, 0.5),
    ),
    Case("magcache", off={"ratios": [1.0], "streak": 0}, on={"ratios": [1.0]}, computed=(1, 0, 0, 0, 1, 0)),
    Case("ab_cache", off={"interval": 1}, on={"interval": 3, "order": 2}, computed=(1, 1, 0, 0, 1, 0)),
    Case("frdiff", off={"interval": 1}, on={"interval": 3, "bias": -1.0}, computed=(1, 0, 0, 1, 0, 0)),
    Case(
        "block_caching",
        off={"changes": {"attn": np.full((2, STEPS), 0.3)}, "threshold": 0.0},
        on={"changes": {"attn": np.full((2, STEPS), 0.3), "mlp": [[0.6] * STEPS, [0.2] * STEPS]}},
        computed=(1, 0.25, 0.75, 0.5, 0.75, 0.25),
    ),
    Case(
        "bacache",
        off={"similarities": {"mlp": np.ones((2, STEPS, STEPS))}, "updates": STEPS, "bubble": 0},
        on={"similarities": {"attn": [1.0 / (1 + DISTANCE)] * 2}, "updates": 2, "bubble": 0},
        computed=(1, 0.5, 0.5, 1, 0.5, 0.5),
    ),
    # of 9216 multiply-adds in attention, q k^T are 512
    Case("attention_map", off={"reuse": 0}, on={"reuse": 5}, computed=(1, *(1 - 256 / 9216,) * 5)),
    Case("adacache", off={"codebook": ((1.0, 1),)}, on={"codebook": ((1.0, 3),)}, computed=(1, 1, 0, 0, 1, 1)),
    Case("lazydit", off={}, on={"threshold": 0.6}, computed=(1, 0, 0, 0, 0, 0)),
    # its scores multiply queries by keys once more, N/(4 D + 2 N) = 1/18 of an attention branch, one branch of two
    Case("toca", off={"interval": 1}, on=HALF_OF_THE_TOKENS, computed=(1 + 1 / 36, 0.25, 0.25, 0.25, 0.25, 1)),
    Case("duca", off={"interval": 1}, on=HALF_OF_THE_TOKENS, computed=(1, 0, 0.25, 0, 0.25, 1)),
    Case("tokencache", off={"intervals": (1, 1)}, on={"intervals": (3, 2)}, computed=(1, 0.25, 0.25, 1, 0.25, 1)),
    # of a token's multiply-adds in attention, and in the MLP
    Case("icc", off={"period": 1}, on={"factors": LOW_RANK}, computed=(1, (384 / 1152 + 320 / 2048) / 2) * 3),
    Case(
        "skipcache",
        off={"interval": 1, "blocks": 1},
        on={"interval": 3, "blocks": 1},
        computed=(1, 0.5, 0.5, 1, 0.5, 0.5),
        toy=tiny_skip_dit,
    ),
    Case("fastcache", off={"threshold": 0.0}, on={"threshold": 1e9}, computed=(1, 0, 0, 0, 0, 0)),
    Case(
        "autodiffusion",
        off={"skip": [[]] * STEPS},
        on={"skip": [[], [0], [1], [0, 1], [], [1]]},
        computed=(1, 0.5, 0.5, 0, 1, 0.5),
    ),
    Case(
        "tgate",
        off={"cross": "mlp", "gate": STEPS, "sp_interval": 1},
        on={"cross": "mlp", "gate": 3, "sp_interval": 2, "fi_interval": 2, "warmup": 0},
        computed=(1, 0.5, 1, 0, 0.25, 0),
        halves=(2, 2, 2, 1, 1, 1),
    ),
    Case(
        "fastercache",
        off={"interval": 1, "cfg_interval": 1},
        on={"start": 5},
        computed=(1, 0.5, 0.5, 0.25, 1, 0.25),
        halves=(2, 2, 1, 1, 2, 1),
    ),
]
cases = pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
active = pytest.mark.parametrize("case", [c for c in CASES if c.on], ids=lambda c: c.name)


def test_every_accelerator_has_a_row():
    assert sorted(c.name for c in CASES) == sorted(ACCELERATORS)


class Problem(NamedTuple):
    """A guided DDIM run on a tiny DiT, waiting for an accelerator."""

    model: Any
    params: Any
    process: P.Process
    guide: Any
    times: np.ndarray

    def rows(self, accelerator: Accelerator | None = None) -> Row:
        return make_rows(SOLVERS["ddim"](), self.guide, self.process, self.times, accelerator, self.model.stages)

    def inputs(self):
        keys = sample_keys(0, len(LABELS))
        return self.params, initial_noise(self.process, keys, self.model.input_shape), keys, LABELS

    def sampler(self, accelerator: Accelerator):
        return make_sampler(self.model, self.process, "eps", SOLVERS["ddim"](), self.guide, accelerator)

    def taught(self, accelerator: Accelerator) -> "Problem":
        return self._replace(params=with_learned(self.params, accelerator))

    def lowered(self, accelerator: Accelerator):
        """The program, not compiled yet, and what it is called with."""
        arguments = (*self.inputs(), self.rows(accelerator), 2.0)
        return self.sampler(accelerator).lower(*arguments), arguments

    def run(self, accelerator: Accelerator, **options: bool | int):
        program, arguments = self.lowered(accelerator)
        return program.compile(compiler_options=options)(*arguments)


def problem(guide="cfg", bounds=(), steps=STEPS, toy: Any = tiny_dit, **dit) -> Problem:
    process, g = P.vp_linear(), GUIDES[guide](*bounds)
    times = make_times(GRIDS["uniform"](), process, steps)
    model, params = toy(**dit)
    return Problem(model, params, process, g, times)


# ---------------------------------------------------------------- every accelerator


# XLA may leave out the rounding of a bfloat16 value that it need not store, which a cache has to store
STRICT = {"xla_allow_excess_precision": False, **FULL}


@functools.cache
def plain(toy: Any, dtype: str, strict: bool) -> np.ndarray:
    """The samples without a cache, fully optimised or quickly compiled."""
    samples, trace = problem(toy=toy, dtype=dtype).run(neutral(), **(STRICT if strict else {}))
    assert np.all(of_all_blocks(trace) == 1)
    return np.asarray(samples)


@functools.cache
def plain_program(toy: Any, dtype: str) -> tuple[str, Any]:
    """The text of the program without a cache, and the rows that it is called with."""
    program, arguments = problem(toy=toy, dtype=dtype).lowered(neutral())
    return program.as_text(), jax.tree.leaves(arguments[-2])


def is_plain(program: Any, arguments: Any, toy: Any, dtype: str) -> bool:
    """Is a program that of no cache, called with the same numbers: it then needs no run to be told to give the same."""
    text, rows = plain_program(toy, dtype)
    mine = jax.tree.leaves(arguments[-2])
    return program.as_text() == text and len(mine) == len(rows) and all(map(np.array_equal, mine, rows))


def of_all_blocks(trace: Any) -> np.ndarray:
    """What was computed, [E, L, branches, halves]."""
    return np.concatenate([np.asarray(c) for c in trace.computed.values()], axis=1)


# one of each kind of accelerator that is not the plain program when it is off, or is by another way
OFF = ("fora", "taylorseer", "teacache", "dbprune", "adacache", "toca", "tgate", "fastcache", "skipcache", "icc")


# one of each place where something is filled, and of each way to decide it
ON = (
    *OFF,
    "smoothcache",
    "pab",
    "delta_dit",
    "magcache",
    "ab_cache",
    "frdiff",
    "fbcache",
    "dbcache",
    "lazydit",
    "duca",
)


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "case",
    [pytest.param(c, id=c.name, marks=() if c.name in OFF else pytest.mark.slow) for c in CASES if c.on],
)
def test_neutral_setting_is_bitwise_off(case, dtype):
    """Fully optimised; most static plans come down to the very program of no cache."""
    program, arguments = problem(toy=case.toy, dtype=dtype).lowered(case.make("off"))
    want = plain(case.toy, dtype, True)  # whose trace is all ones
    if is_plain(program, arguments, case.toy, dtype):
        return
    got, trace = program.compile(compiler_options=STRICT)(*arguments)
    np.testing.assert_array_equal(got, want)
    assert np.all(of_all_blocks(trace) == 1)


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "case", [pytest.param(c, id=c.name, marks=() if c.name in ON else pytest.mark.slow) for c in CASES if c.on]
)
def test_switched_on_it_computes_what_it_says_changes_the_samples_and_compiles_once(case, dtype):
    p, accelerator, traces = problem(toy=case.toy, dtype=dtype), case.make("on"), [0]

    def embed(*a):
        traces[0] += 1
        return p.model.embed(*a)

    counted = p._replace(model=p.model._replace(embed=embed)).taught(accelerator)
    sampler, rows = jax.jit(counted.sampler(accelerator)), p.rows(accelerator)
    got, trace = sampler(*counted.inputs(), rows, 2.0)
    want = plain(case.toy, dtype, False)
    assert got.dtype == jnp.float32 and np.all(np.isfinite(got))
    error = np.abs(got - want).max() / np.abs(want).max()
    print(f"{case.name} {dtype}: relative error {error:.3f}")
    assert error > 1e-4  # the noise of rounding is 1e-6
    np.testing.assert_allclose(of_all_blocks(trace).mean((1, 2, 3)), case.computed, rtol=1e-6)
    np.testing.assert_array_equal(trace.halves, case.halves)
    first = traces[0]
    sampler(*counted.inputs(), rows._replace(t=rows.t * 0.9), 3.0)
    assert traces[0] == first > 0


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.slow)])
@cases
def test_memory_keeps_its_types_and_its_leading_layers(case, dtype):
    p, accelerator = problem(toy=case.toy, dtype=dtype), case.make("on")
    x = jax.ShapeDtypeStruct((2, *p.model.input_shape), jnp.float32)
    spec = trunk_spec(p.model, p.params, x, jax.ShapeDtypeStruct((2,), jnp.int32))
    assert {u.dtype for u in jax.tree.leaves(spec.update)} == {jnp.dtype(dtype)}
    memory = jax.eval_shape(lambda: accelerator.init(spec, p.rows(accelerator).plan.modes))
    for stage, branch, update in ((s, b, u) for s, of in spec.update.items() for b, u in of.items()):
        for leaf in jax.tree.leaves(memory["branch"][stage][branch]):
            assert leaf.shape[0] == spec.depth[stage]  # the block runner scans over it
            held = leaf.shape[1:] == update.shape and case.name != "taylorseer_diffusers"
            assert not held or leaf.dtype == update.dtype


# ---------------------------------------------------------------- DBCache, by what cache-dit 1.5.3 does

GOLDEN = json.loads((pathlib.Path(__file__).parent / "golden" / "dbcache.json").read_text())
MASK = (1, 1, 1, 0, 0, 1, 0, 0, 1, 0, 0, 0, 1, 0, 0, 1)


def refreshed(hint: int, policy: str = "once") -> dict[str, Any]:
    return dict(force_refresh_step_hint=hint, force_refresh_step_policy=policy)


DBCACHE: dict[str, dict[str, Any]] = {
    "none(thr=0)": dict(threshold=0.0, warmup=2),
    "F1B0_W2_R0.05": dict(threshold=0.05, warmup=2),
    "F1B0_W2_R0.10": dict(threshold=0.1, warmup=2),
    "F1B0_W2_R0.5_MC2": dict(threshold=0.5, warmup=2, max_continuous=2),
    "F1B0_W6_I3_R0.5_MC3": dict(threshold=0.5, warmup=6, warmup_interval=3, max_continuous=3),
    "F1B0_W4_R0.5_MC3_TS1": dict(threshold=0.5, warmup=4, max_continuous=3, forecast="taylor", order=1),
    "F1B0_W4_R0.5_MC3_TS2": dict(threshold=0.5, warmup=4, max_continuous=3, forecast="taylor", order=2),
    "F1B0_W2_R0.5_MC3_TS1": dict(threshold=0.5, warmup=2, max_continuous=3, forecast="taylor", order=1),
    "F1B0_SCM_static": dict(threshold=0.1, warmup=8, mask=MASK, policy="static"),
    "F1B0_SCM_dynamic_R0.05": dict(threshold=0.05, warmup=8, mask=MASK, policy="dynamic"),
    "F1B0_W2_R0.5_AccR0.3": dict(threshold=0.5, warmup=2, max_accumulated=0.3),
    "F1B0_W2_R0.10_CFGsep": dict(threshold=0.1, warmup=2),
    "FoCa_F1B0_W4_R0.5_MC3": dict(threshold=0.5, warmup=4, max_continuous=3, forecast="foca"),
    "F1B0_W2_R0.10_CFGsep_onediff": dict(threshold=0.1, warmup=2, cfg_diff_compute_separate=False),
    "F1B0_W2_R0.5_MC2_M5_CFGsep_onediff": dict(
        threshold=0.5, warmup=2, max_continuous=2, max_cached=5, cfg_diff_compute_separate=False
    ),
    "F1B0_W2_R0.5_MC3_FR7": dict(threshold=0.5, warmup=2, max_continuous=3, **refreshed(7)),
    "F1B0_W2_R0.5_M3_AccR0.3_FR5repeat": dict(
        threshold=0.5, warmup=2, max_cached=3, max_accumulated=0.3, **refreshed(5, "repeat")
    ),
    "F1B0_W3_R0.5_MC3_TS1_FR7": dict(
        threshold=0.5, warmup=3, max_continuous=3, forecast="taylor", order=1, **refreshed(7)
    ),
    "F1B0_SCM_dynamic_R0.1_FR6repeat": dict(threshold=0.1, warmup=8, mask=MASK, **refreshed(6, "repeat")),
    "F1B0_W2_R0.10_FR12_CFGsep": dict(threshold=0.1, warmup=2, **refreshed(6)),  # two calls an evaluation there
    "FoCa_F1B0_W2_R0.5_MC3_FR8": dict(threshold=0.5, warmup=2, max_continuous=3, forecast="foca", **refreshed(8)),
}


def test_every_golden_configuration_is_run():
    assert list(DBCACHE) == list(GOLDEN)


SELDOM = ("F1B0_W2_R0.5_MC2_M5_CFGsep_onediff", "F1B0_W2_R0.5_MC3_FR7", "F1B0_SCM_dynamic_R0.1_FR6repeat")


@pytest.mark.parametrize("name", some(DBCACHE, *(DBCACHE.keys() - {*SELDOM})))
def test_dbcache_does_what_cache_dit_does(name):
    """In float64: the same decisions and numbers of block calls, differences and results to 1e-9."""
    want, guided = GOLDEN[name], "CFGsep" in name
    with jax.enable_x64(True):
        model, params, x0 = tanh_stack()
        process, solver = P.flow(time_scale=1.0), SOLVERS["euler"]()
        guide = GUIDES["cfg"](together=False) if guided else GUIDES["none"]()
        accelerator = CACHES["dbcache"](first=1, **DBCACHE[name])
        times = np.linspace(1.0, 0.0, 17)
        rows = make_rows(solver, guide, process, times, accelerator, model.stages)
        sampler = make_sampler(model, process, "velocity", solver, guide, accelerator)
        got, trace = sampler(params, jnp.asarray(x0), sample_keys(0, 1), jnp.ones(1), rows, 2.0)
    got, trace = jax.tree.map(np.asarray, (got, trace))
    assert got.dtype == np.float64
    computed = trace.computed["blocks"][:, :, 0]  # [E, L, halves]
    for half, cached in enumerate([want["cached"], want["cfg_cached"]][: 1 + guided]):
        np.testing.assert_array_equal(np.flatnonzero(computed[:, 1, half] == 0), cached)
    np.testing.assert_array_equal(computed.sum((0, 2)), want["calls"])
    gate = trace.metric["trunk"]
    for k, d in want["diffs"].items():
        assert gate["metric"][int(k), 0] == pytest.approx(d, rel=1e-6)  # kept in float32
    np.testing.assert_allclose([got.sum(), np.sqrt((got**2).sum())], [want["out_sum"], want["out_l2"]], rtol=1e-9)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"force_refresh_step_hint": 0}, "dbcache: force_refresh_step_hint=0; allowed: 1 or more, or None"),
        ({"force_refresh_step_policy": "twice"}, "force_refresh_step_policy='twice'; allowed: once, repeat"),
        ({"mask": (1, 0)}, "dbcache: the mask has 2 entries; the run has 6 evaluations"),
        ({"first": 2}, "dbcache: first=2 and last=0 blocks always run; allowed"),
    ],
)
def test_dbcache_refuses(settings, message):
    with pytest.raises(ValueError, match=message):
        problem().rows(CACHES["dbcache"](**settings))


# ---------------------------------------------------------------- FORA


def pieces(p: Problem):
    """The network as plain functions for the oracle: embed, branches by layer and name, gates, head."""
    block = p.model.stages[0].block

    def layer(i):
        return {"params": jax.tree.map(lambda a: a[i], p.params["blocks"])}

    @jax.jit
    def embed(x, k, labels):
        return p.model.embed(p.params, x, jnp.full(labels.shape, k, jnp.float32), labels)

    @jax.jit
    def branches(tokens, context):
        """Every layer's updates and gates of these tokens; the oracle picks the ones that it wants."""
        from difax.core.ops import attend

        out = []
        for i in range(p.model.stages[0].depth):
            mods = block.apply(layer(i), context, method="mods")
            out.append(
                {
                    b: (
                        block.apply(layer(i), tokens, mods, context, attend, method=b),
                        block.apply(layer(i), mods, b, method="gate"),
                    )
                    for b in ("attn", "mlp")
                }
            )
        return out

    def branch(i, name, tokens, context):
        update, gate = branches(tokens, context)[i][name]
        return np.asarray(update), np.asarray(gate)

    head = jax.jit(lambda tokens, context: p.model.head(p.params, tokens, context))
    return oracle.Network(embed, branch, lambda t, c: np.asarray(head(jnp.asarray(t), c)), p.model.stages[0].depth)


def test_oracle_network_is_the_network():
    p = problem()
    _, x, _, labels = p.inputs()
    got = oracle.evaluate(pieces(p), np.asarray(x), 500, labels, {}, full=True)
    want = network(p.model, p.params, x, jnp.full(labels.shape, 500.0), labels)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bounds", [None, (0.1, 0.7), pytest.param((0.0, 1.0), marks=pytest.mark.slow)])
@pytest.mark.parametrize("interval", [2, 3])
def test_fora_by_a_plain_loop(interval, bounds):
    """Six evaluations at t = 1, 0.8, 0.6, 0.4, 0.2, 0; with bounds (0.1, 0.7) the guide wakes up at the third."""
    p = problem("cfg") if bounds is None else problem("interval", bounds)
    _, x, _, labels = p.inputs()
    rows = p.rows()
    abar = np.append(p.process.level(rows.t.astype(np.float64)).alpha ** 2, 1.0)
    k = np.round(rows.model_time).astype(int)
    low, high = bounds or (0.0, 1.0)
    want, full = oracle.fora(
        pieces(p), np.asarray(x), k, abar, labels, p.model.null(labels), 2.0, interval, (k + 1) / 1000, low, high
    )
    got, trace = p.run(CACHES["fora"](interval=interval))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * np.abs(want).max())
    halves = np.maximum(trace.halves, 1)[:, None]
    np.testing.assert_array_equal((trace.computed["blocks"].mean((1, 2)) / halves).sum(1), full)
    if bounds == (0.1, 0.7):
        assert full == [1, interval == 1, 1, interval == 3, interval == 2, 0]
        np.testing.assert_array_equal(trace.halves, [1, 1, 2, 2, 2, 1])


def test_nothing_stale_is_used_where_guidance_begins():
    """Whatever fills the unconditional half before the guide wakes up does not reach the samples."""
    p, fora = problem("interval", (0.1, 0.7)), CACHES["fora"](interval=3)

    def poisoned(spec, modes):
        return jax.tree.map(lambda a: jnp.full_like(a, 1e6), fora.init(spec, modes))

    want, _ = p.run(fora)
    got, _ = p.run(fora._replace(init=poisoned))
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("interval", [0, -2])
def test_fora_refuses(interval):
    with pytest.raises(ValueError, match=f"interval={interval}; allowed: 1 or more"):
        CACHES["fora"](interval=interval)
