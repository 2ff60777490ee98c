"""Caches that decide while they run, and those that act on guidance, by their rules in plain Python and golden data."""

import functools
import importlib
import itertools
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chi2, norm

from difax.accel.caches import CACHES
from difax.accel.caches.cfg_cache import bands_of
from difax.accel.caches.motion import among
from difax.accel.fit import fastcache as fastcache_fit
from difax.accel.solvers import SOLVERS
from difax.core import process as P
from difax.core.contracts import Accelerator, Done, Segments
from difax.core.guidance import GUIDES
from difax.core.noise import sample_keys
from difax.core.ops import attend
from difax.core.sample import make_rows, make_sampler
from difax.core.shapes import memory_for, trunk_spec
from difax.core.stack import with_learned
from difax.core.trunk import reference_attention, run_trunk, unstack
from difax.models import wan
from tests.families import some
from tests.oracles import online as oracle
from tests.test_caches import LABELS, STEPS, Problem, problem
from tests.toys import randomise, tanh_stack

fastcache_module = importlib.import_module("difax.accel.caches.fastcache")  # whose name its factory has

FOLDER = pathlib.Path(__file__).parent / "golden"


def toy_run(
    accelerator: Any,
    guide: Any = None,
    steps: int = 16,
    video: bool = False,
    learned: bool = True,
    programs: dict[Any, Any] | None = None,
) -> tuple[np.ndarray, Any]:
    """A float64 run of the tanh network: Euler from tau = 1, scale 2.

    Args:
      video: its tokens are a grid of 2 frames. programs: compiled ones, for runs that differ in their rows alone.
    """
    with jax.enable_x64(True):
        model, params, x0 = tanh_stack()
        if video:
            flat = model
            model = model._replace(
                embed=lambda p, x, t, c: flat.embed(p, x.reshape(len(x), 4, 8), t, c),
                head=lambda p, tokens, context: tokens.reshape(-1, 2, 2, 1, 8),
                input_shape=(2, 2, 1, 8),
            )
            x0 = x0.reshape(1, 2, 2, 1, 8)
        process, solver, guide = P.flow(time_scale=1.0), SOLVERS["euler"](), guide or GUIDES["none"]()
        rows = make_rows(solver, guide, process, np.linspace(1.0, 0.0, steps + 1), accelerator, model.stages)
        sampler = make_sampler(model, process, "velocity", solver, guide, accelerator)
        params = with_learned(params, accelerator) if learned else params
        arguments = (params, jnp.asarray(x0), sample_keys(0, 1), jnp.ones(1), rows, 2.0)
        programs = {} if programs is None else programs
        if jax.tree.structure(arguments) not in programs:
            program = sampler.lower(*arguments).compile()
            programs[jax.tree.structure(arguments)] = program
        got, trace = programs[jax.tree.structure(arguments)](*arguments)
    return np.asarray(got), jax.tree.map(np.asarray, trace)


# ---------------------------------------------------------------- all of them

SWEPT: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "dbprune": (
        dict(threshold=0.05, first=1, warmup=2),
        dict(threshold=0.3, first=2, never=(4,), warmup=3, max_continuous=2, dynamic=True, relax=1.1),
    ),
    "adacache": (dict(codebook=((0.1, 3), (1.0, 1))), dict(codebook=((0.06, 4), (1.0, 2)))),
    "fastcache": (dict(threshold=0.01), dict(threshold=0.08, significance=0.3)),
    "lazydit": (dict(threshold=0.5), dict(threshold=0.6)),
    "tgate": (dict(cross="mlp", gate=3, sp_interval=1), dict(cross="mlp", gate=5, sp_interval=1)),
    "fastercache": (dict(start=5), dict(start=5, weight=0.3, growth=1.3, low_end=20)),
}


@pytest.mark.parametrize("name", some(SWEPT, "dbcache", "adacache", "fastercache"))
def test_a_sweep_shares_a_program(name):
    """Rows of other settings are of one structure, and the program of the first gives what that of the second does."""
    one, other = (CACHES[name](**settings) for settings in SWEPT[name])
    if name in ("dbprune", "adacache", "fastcache"):
        with jax.enable_x64(True):
            model, params, x0 = tanh_stack()
            guide, times = GUIDES["none"](), np.linspace(1.0, 0.0, 17)
            process, solver, kind = P.flow(time_scale=1.0), SOLVERS["euler"](), "velocity"
            inputs: Any = (params, jnp.asarray(x0), sample_keys(0, 1), jnp.ones(1))
    else:
        p = problem()
        model, guide, times, process, solver, kind = p.model, p.guide, p.times, p.process, SOLVERS["ddim"](), "eps"
        inputs = p.inputs()
    with jax.enable_x64(len(inputs[1]) == 1):
        rows = [make_rows(solver, guide, process, times, a, model.stages) for a in (one, other)]
        samplers = [
            make_sampler(model, process, kind, solver, guide, a).lower(*inputs, rows[0], 2.0) for a in (one, other)
        ]
        first, second = (sampler.compile() for sampler in samplers)
        draw = lambda program, row: program(inputs[0], inputs[1].copy(), *inputs[2:], row, 2.0)[0]  # noqa: E731
        np.testing.assert_array_equal(draw(first, rows[1]), draw(second, rows[1]))
        assert np.abs(draw(first, rows[0]) - draw(first, rows[1])).max() > 1e-6  # the settings do differ


# ---------------------------------------------------------------- DBPrune, by what cache-dit 1.5.3 does

PRUNED = json.loads((FOLDER / "dbprune.json").read_text())
MASK = (1, 1, 1, 0, 0, 1, 0, 0, 1, 0, 0, 0, 1, 0, 0, 1)
DBPRUNE: dict[str, dict[str, Any]] = {
    "F1B0_W2_R0.05": dict(threshold=0.05),
    "F1B0_W2_R0.1": dict(threshold=0.1),
    "F1B1_never3_W2_R0.1": dict(threshold=0.1, last=1, never=(3,)),
    "F1B0_W2_R1": dict(threshold=1.0),
    "F1B0_W2_R0.5_MC2": dict(threshold=0.5, max_continuous=2),
    "F1B0_W2_R0.1_M3": dict(threshold=0.1, max_cached=3),
    "F1B0_W6_I3_R0.1": dict(threshold=0.1, warmup=6, warmup_interval=3),
    "F1B0_SCM_static": dict(threshold=0.1, warmup=8, mask=MASK, policy="static"),
    "F1B0_SCM_dynamic_R0.1": dict(threshold=0.1, warmup=8, mask=MASK),
    "F1B0_W2_R0.08_dynamic": dict(threshold=0.08, dynamic=True),
    "F1B0_W2_R0.08_dynamic1.5_top0.5": dict(threshold=0.08, dynamic=True, relax=1.5, dynamic_limit=0.5),
    "F1B0_W2_R0.1_Acc0.1": dict(threshold=0.1),  # cache-dit's cap has no effect here
    "F1B0_W2_R0.1_CFGsep": dict(threshold=0.1),
    "F1B0_W2_R0.1_M3_FR7": dict(threshold=0.1, max_cached=3, force_refresh_step_hint=7),
    "F1B0_W2_R0.1_MC2_FR5repeat": dict(
        threshold=0.1, max_continuous=2, force_refresh_step_hint=5, force_refresh_step_policy="repeat"
    ),
}


def test_every_golden_configuration_of_dbprune_is_run():
    assert list(DBPRUNE) == list(PRUNED)


@pytest.fixture(scope="module")
def programs():
    """One for each kind of guide: thresholds, caps, masks and the blocks that are kept are all in the rows."""
    return {}


@pytest.mark.parametrize("name", DBPRUNE)
def test_dbprune_does_what_cache_dit_does(name, programs):
    """In float64: the same blocks at every evaluation, the same differences, the same samples."""
    want, separate = PRUNED[name], "CFGsep" in name
    guide = GUIDES["cfg"](together=False) if separate else None
    accelerator = CACHES["dbprune"](**({"first": 1, "warmup": 2} | DBPRUNE[name]))
    got, trace = toy_run(accelerator, guide, programs=programs.setdefault(separate, {}))
    assert got.dtype == np.float64
    computed = trace.computed["blocks"][:, :, 0]  # [E, L, halves]
    for half, ran in enumerate([want["ran"], want["cfg_ran"]][: 1 + separate]):
        assert [list(np.flatnonzero(of)) for of in computed[:, :, half]] == ran
    gate = {k: a[:, :, 0] for k, a in trace.metric["block"]["blocks"].items()}
    for k, diffs in want["diffs"].items():
        asked = np.flatnonzero(gate["asked"][int(k)])
        assert len(asked) == len(diffs)
        for block, d in zip(asked, diffs, strict=True):
            assert d == -1 or gate["metric"][int(k), block] == pytest.approx(d, rel=1e-6)  # kept in float32
    np.testing.assert_array_equal(gate["asked"].any(1), [str(k) in want["diffs"] for k in range(16)])
    np.testing.assert_allclose([got.sum(), np.sqrt((got**2).sum())], [want["out_sum"], want["out_l2"]], rtol=1e-12)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"threshold": -1.0}, "dbprune: threshold=-1.0; allowed: 0 or more"),
        ({"warmup_interval": 0}, "warmup_interval=0; allowed: 0 or more, and 1 or more"),
        ({"mask": (1, 2)}, r"mask=\(1, 2\); allowed: 1 \(compute\) and 0"),
        ({"policy": "statc"}, "policy='statc'; allowed: dynamic, static"),
        ({"relax": -1.0}, "relax=-1.0, dynamic_limit=None; allowed: 0 or more"),
        ({"first": 6}, "first=6, last=0, never=.*allowed: 0 or more, and blocks of the 6"),
        ({"never": (6,)}, r"dbprune: never=\(6,\); allowed: 0 to 5"),
        ({"never": (1, 99)}, r"never=\(1, 99\); allowed: 0 to 5, the blocks"),
        ({"never": (-1,)}, r"never=\(-1,\); allowed: 0 to 5"),
        ({"force_refresh_step_hint": 0}, "dbprune: force_refresh_step_hint=0; allowed: 1 or more, or None"),
        ({"mask": (1, 0)}, "dbprune: the mask has 2 entries; the run has 16 evaluations"),
    ],
)
def test_dbprune_refuses(settings, message):
    with pytest.raises(ValueError, match=message):
        toy_run(CACHES["dbprune"](**settings))


# ---------------------------------------------------------------- AdaCache, by a plain loop

BOOK = ((0.046, 5), (0.0475, 4), (0.049, 3), (0.06, 2), (1.0, 1))


@pytest.mark.parametrize("block", [None, 0, 5])
def test_adacache_by_a_plain_loop(block):
    """In float64, on the toy network: the same evaluations and intervals, the same samples."""
    want, computed, intervals = oracle.adacache(24, BOOK, 2 if block is None else block)
    got, trace = toy_run(CACHES["adacache"](BOOK, block=block), steps=24)
    assert 2 < len(computed) < 24 and len(set(intervals)) > 2
    full = trace.computed["blocks"][:, :, 0, 0]
    np.testing.assert_array_equal(full.min(1), full.max(1))
    assert list(np.flatnonzero(full[:, 0])) == computed
    assert list(trace.metric["trunk"]["interval"][computed[1:], 0]) == intervals
    np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-13)


def test_adacache_with_motion_by_a_plain_loop():
    book = ((0.03, 5), (0.06, 4), (0.12, 3), (0.3, 2), (1.0, 1))
    want, computed, intervals = oracle.adacache(24, book, 2, frames=2, window=(3, 20))
    accelerator = CACHES["adacache"](book, moreg=True, frames=2, window=(3, 20))
    got, trace = toy_run(accelerator, steps=24, video=True)
    assert 2 < len(computed) < 24 and len(set(intervals)) > 2
    assert list(np.flatnonzero(trace.computed["blocks"][:, 0, 0, 0])) == computed
    assert list(trace.metric["trunk"]["interval"][computed[1:], 0]) == intervals
    np.testing.assert_allclose(got.reshape(want.shape), want, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"codebook": "50"}, "codebook='50'; allowed: pairs of numbers, or 100, 30-fast, 30-slow"),
        ({"codebook": ((0.2, 1), (0.1, 2))}, "allowed: increasing bounds, and intervals of 1 or more"),
        ({"codebook": ((0.2, 0),)}, "allowed: increasing bounds, and intervals of 1 or more"),
        ({"moreg": True}, "moreg=True with frames=None; give the frames"),
        ({"moreg": True, "frames": 1}, "frames=1; allowed: 2 or more"),
        ({"moreg": True, "frames": 2}, "allowed: a model of videos"),
        ({"block": 6}, "block=6; allowed: 0 to 5"),
        ({"block": -1}, "block=-1; allowed: 0 to 5"),
        ({"window": (3, 99)}, r"adacache: window=\(3, 99\); allowed: 1 to 16"),
        ({"branch": "attn"}, "branch='attn'; allowed: f in block 2"),
        ({"dtype": "int8"}, "adacache: dtype='int8'"),
    ],
)
def test_adacache_refuses(settings, message):
    with pytest.raises(ValueError, match=message):
        toy_run(CACHES["adacache"](**settings))


# ---------------------------------------------------------------- LazyDiT, by a plain loop


def pieces(p: Problem) -> oracle.Network:
    """A DiT as plain functions for the oracles."""
    stage = p.model.stages[0]

    @jax.jit
    def branch(params, tokens, context, name):
        apply = functools.partial(stage.block.apply, {"params": params})
        mods = apply(context, method="mods")
        branches = [
            (apply(tokens, mods, context, attend, method=b), apply(mods, b, method="gate")) for b in stage.branches
        ]
        update, gate = jax.lax.switch(name, [lambda pair=pair: pair for pair in branches])
        shift, scale = jax.lax.switch(name, [lambda b=b: mods[b][:2] for b in stage.branches])
        return update, gate, shift, scale

    @jax.jit
    def embed(x, k, labels):
        return p.model.embed(p.params, x, jnp.full(labels.shape, k, jnp.float32), labels)

    def by_name(layer, name, tokens, context):
        params = jax.tree.map(lambda a: a[layer], p.params["blocks"])
        return jax.tree.map(np.asarray, branch(params, tokens, context, stage.branches.index(name)))

    head = jax.jit(lambda tokens, context: p.model.head(p.params, tokens, context))
    return oracle.Network(embed, by_name, lambda *a: np.asarray(head(*a)), stage.depth)


def by_ddim(p: Problem, eps: Any, guided: int = STEPS) -> np.ndarray:
    """The oracle's samples of a problem, of which so many evaluations are guided."""
    abar = np.append(p.process.level(p.rows().t.astype(np.float64)).alpha ** 2, 1.0)
    return oracle.guided_ddim(np.asarray(p.inputs()[1]), abar, 2.0, eps, guided)


def both(p: Problem) -> dict[str, Any]:
    return {"cond": LABELS, "null": p.model.null(LABELS)}


def gates(scale: float, steps: int = STEPS) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    return {b: (scale * rng.normal(size=(2, steps, 16))).astype(np.float32) for b in ("attn", "mlp")}


@pytest.mark.parametrize("soft", [False, True])
def test_lazydit_by_a_plain_loop(soft):
    p, weights = problem(), gates(0.02)
    accelerator = CACHES["lazydit"]({"blocks": weights}, soft=soft)
    got, trace = p._replace(params=with_learned(p.params, accelerator)).run(accelerator)
    eps, scores = oracle.lazydit(pieces(p), p.rows().model_time, both(p), weights, soft)
    want = by_ddim(p, eps)
    computed = np.ones((STEPS, 2, 2))
    for b, name in enumerate(("attn", "mlp")):
        for i, layer in itertools.product(range(STEPS), range(2)):
            s = np.stack([scores[half, i, layer, name] for half in ("cond", "null")], -1)  # [samples, halves]
            got_s = trace.metric["branch"]["blocks"][name]["metric"][i, layer]
            np.testing.assert_allclose(got_s, s, rtol=1e-3, atol=1e-4)
            computed[i, layer, b] = soft or i == 0 or np.any(s >= 0.5)
    rows = np.concatenate([s for (_, i, _, _), s in scores.items() if i > 0])
    assert 0.2 < (rows >= 0.5).mean() < 0.8 and (soft or 0 < (computed == 0).sum())
    for half in range(2):
        np.testing.assert_array_equal(trace.computed["blocks"][..., half], computed)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * np.abs(want).max())


def test_a_batch_of_lazydit_is_its_samples_one_by_one():
    p, accelerator = problem(), CACHES["lazydit"]({"blocks": gates(0.02)})
    params, x, keys, labels = p.inputs()
    params = with_learned(params, accelerator)

    @jax.jit
    def sample(x, keys, labels):
        return p.sampler(accelerator)(params, x, keys, labels, p.rows(accelerator), 2.0)

    whole, _ = sample(x, keys, labels)
    for n in range(2):
        one, trace = sample(x[n : n + 1], keys[n : n + 1], labels[n : n + 1])
        np.testing.assert_allclose(one[0], whole[n], rtol=1e-4, atol=1e-4)
        assert trace.computed["blocks"].mean() < 0.9


def test_soft_gates_of_lazydit_have_gradients():
    p, accelerator = problem("none", steps=2), CACHES["lazydit"]({"blocks": gates(0.02, 2)}, soft=True)
    params, x, keys, labels = p.inputs()
    params = with_learned(params, accelerator)
    sampler, rows = p.sampler(accelerator), p.rows(accelerator)

    def total(learned: Any) -> jax.Array:
        return sampler({**params, "accelerator": learned}, x, keys, labels, rows, 2.0)[0].sum()

    slope = jax.jit(jax.grad(total))(params["accelerator"])
    for name, g in slope["blocks"].items():
        assert np.all(np.isfinite(g)) and np.all(np.any(g[:, 1:], -1)), name
        assert not np.any(g[:, 0]), name  # nothing is held at the first evaluation


def test_lazydit_reads_its_file(tmp_path):
    np.savez(tmp_path / "gates.npz", **{f"blocks.{b}": w for b, w in gates(1.0).items()})
    got = CACHES["lazydit"](file=str(tmp_path / "gates.npz")).learned
    assert got is not None and list(got) == ["blocks"]
    for b, w in gates(1.0).items():
        np.testing.assert_array_equal(got["blocks"][f"{b}.lazy"], w)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"threshold": 1.5}, "threshold=1.5; allowed: 0 to 1"),
        ({"weights": {}, "file": "a"}, "weights and file were both given"),
        ({"file": "gates.txt"}, "file='gates.txt'; allowed: an .npz file"),
        ({"weights": {"blocks": {"cross": np.zeros((2, 6, 16))}}}, "blocks.cross; allowed: blocks.attn, blocks.mlp"),
        ({"weights": {"blocks": {"attn": np.zeros((2, 5, 16))}}}, r"\(2, 5, 16\); expected \[2, 6, D\]"),
        ({"weights": {"blocks": {"attn": np.zeros((2, 6, 9))}}}, "9 features; blocks.attn has 16"),
    ],
)
def test_lazydit_refuses(settings, message):
    with pytest.raises(ValueError, match=message):
        accelerator, p = CACHES["lazydit"](**settings), problem()
        p._replace(params=with_learned(p.params, accelerator)).run(accelerator)


def test_lazydit_refuses_parameters_without_its_weights():
    with pytest.raises(ValueError, match="hold no weights; see difax.core.stack.with_learned"):
        problem().run(CACHES["lazydit"]({"blocks": gates(1.0)}))


# ---------------------------------------------------------------- FastCache, by a plain loop


def maps(scale: float) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(2)
    return {"weight": scale * rng.normal(size=(6, 8, 8)), "bias": scale * rng.normal(size=(6, 8))}


@pytest.mark.parametrize("scale", [0.0, 0.1])
def test_fastcache_by_a_plain_loop(scale):
    """In float64 on the toy network, with and without linear maps: the same blocks, the same samples."""
    linear = {k: a.astype(np.float32) for k, a in maps(scale).items()}
    want, ran = oracle.fastcache(16, 0.07, 0.2, linear["weight"].astype(float), linear["bias"].astype(float))
    accelerator = CACHES["fastcache"](0.07, significance=0.2, weights={"blocks": linear} if scale else None)
    got, trace = toy_run(accelerator)
    assert 20 < sum(map(len, ran)) < 80 and len(set(map(tuple, ran))) > 3
    assert [list(np.flatnonzero(of)) for of in trace.computed["blocks"][:, :, 0, 0]] == ran
    np.testing.assert_array_equal(
        trace.metric["block"]["blocks"]["reused"][..., 0], trace.computed["blocks"][..., 0, 0] == 0
    )
    np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("freedom", [32, 1000, 10**6])
@pytest.mark.parametrize("p", [0.5, 0.95, 0.999])
def test_chi_squared_quantile(freedom, p):
    got = fastcache_module.quantile(norm.ppf(p), freedom)
    assert got == pytest.approx(chi2.ppf(p, freedom) / freedom, rel=2e-3)


def test_motion_tokens_of_fastcache_by_a_plain_loop():
    """Threshold 0: every block runs, on the tokens that changed most alone."""
    p = problem(depth=2, size=8)
    accelerator = CACHES["fastcache"](0.0, motion=0.3)
    got, trace = p.run(accelerator)
    want = by_ddim(p, oracle.fastcache_tokens(pieces(p), p.rows().model_time, both(p), 0.3))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * np.abs(want).max())
    computed = trace.computed["blocks"][:, 0, :, 0]
    np.testing.assert_array_equal(computed[0], 1)
    # 5 of 16 tokens: every product of the MLP is per token, in attention two grow with the square of their number
    n, m, d = 16, 5, 16
    attn = (4 * m * d * d + 2 * m * m * d) / (4 * n * d * d + 2 * n * n * d)
    np.testing.assert_allclose(computed[1:], np.broadcast_to([attn, m / n], (STEPS - 1, 2)), rtol=1e-6)


def test_motion_tokens_attend_among_themselves_where_they_are_rotated():
    """Wan: a block's branches among some tokens equal the whole branch with all other keys masked."""
    model = wan(depth=1, width=24, heads=2, ffn=32, size=(2, 4, 4), channels=3, text_tokens=3, text_width=8)
    params = randomise(jax.eval_shape(model.init, jax.random.key(0)))
    rng = np.random.default_rng(3)
    cond = {k: jnp.asarray(rng.normal(size=(2, *s.shape)), jnp.float32) for k, s in model.cond.items()}
    x = jnp.asarray(rng.normal(size=(2, *model.input_shape)), jnp.float32)
    tokens, context = model.embed(params, x, jnp.full(2, 500.0), cond)
    index = jnp.asarray([[1, 6, 2], [7, 0, 5]])
    chosen = np.zeros(tokens.shape[:2], np.int32)
    np.put_along_axis(chosen, np.asarray(index), 1, 1)
    seen: dict[str, Any] = {}

    def branch(compute, gate, where, state, inner, row):
        update, inner, share = among(compute, inner, index)

        def masked(q, k, v, segments, apply):
            keys = k.shape[1] == q.shape[1]
            ids = jnp.asarray(chosen) if keys else jnp.zeros((2, k.shape[1]), jnp.int32)
            return apply(q, k, v, Segments(jnp.ones_like(chosen) * keys, ids))

        whole, inner = compute(inner, attend=masked)
        seen[where.branch] = (update, whole, share)
        return gate(whole), state, inner, Done(1.0)

    @jax.jit
    def run(params):
        accelerator, attention = Accelerator(branch=branch), reference_attention()
        memory = memory_for(trunk_spec(model, params, x, cond), accelerator, attention, ((),))
        run_trunk(model, unstack(model, params), tokens, context, accelerator, attention, memory, None)
        return seen

    done = run(params)
    assert set(done) == {"attn", "cross", "mlp"}
    for name, (update, whole, share) in done.items():
        want = np.where(chosen[..., None] == 1, whole, 0)
        np.testing.assert_allclose(update, want, rtol=1e-4, atol=1e-5, err_msg=name)
        assert 3 / 8 * 0.9 < share < 1 if name == "cross" else 0.2 < share <= 3 / 8


def test_fastcache_fits_blocks_that_are_linear():
    """Where a block is linear in its input the map is exact, and a run in which it replaces the block unchanged."""
    with jax.enable_x64(True):
        model, params, x0 = tanh_stack()
        small = jax.tree.map(lambda a: a * 1e-3, params)  # tanh is the identity there
        rng = np.random.default_rng(4)
        batch = [(jnp.asarray(rng.normal(size=(8, 4, 8))), jnp.full(8, 0.5), jnp.ones(8))]
        fitted = fastcache_fit.fit(model, small, batch, ridge=1e-12)
    kernel, bias = (np.asarray(small["blocks"]["dense"][name]) for name in ("kernel", "bias"))
    np.testing.assert_allclose(fitted["blocks"]["weight"], 0.5 * kernel, rtol=1e-3, atol=1e-7)
    np.testing.assert_allclose(fitted["blocks"]["bias"], 0.25 * bias, rtol=1e-3, atol=1e-7)


def test_fitted_maps_of_fastcache_are_nearer_than_the_identity(tmp_path):
    with jax.enable_x64(True):
        model, params, _ = tanh_stack()
        noise = np.random.default_rng(5).normal(size=(8, 16, 4, 8))
        batches = [
            (jnp.asarray(x * t), jnp.full(16, t), jnp.ones(16))
            for x, t in zip(noise, np.linspace(1, 0.1, 8), strict=True)
        ]
        fitted = fastcache_fit.fit(model, params, batches)
    np.savez(tmp_path / "maps.npz", **{f"blocks.{k}": a for k, a in fitted["blocks"].items()})
    exact, _ = toy_run(CACHES["fastcache"](0.0))
    identity, _ = toy_run(CACHES["fastcache"](1e9))
    nearer, trace = toy_run(CACHES["fastcache"](1e9, file=str(tmp_path / "maps.npz")))
    assert not trace.computed["blocks"][1:].any()
    assert np.abs(nearer - exact).mean() < 0.3 * np.abs(identity - exact).mean()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"threshold": -1.0}, "fastcache: threshold=-1.0; allowed: 0 or more"),
        ({"significance": 0.0}, "significance=0.0, motion=1.0; allowed: between 0 and 1"),
        ({"motion": 0.0}, "motion=0.0; allowed"),
        ({"weights": {}, "file": "a"}, "weights and file were both given"),
        ({"file": "maps.txt"}, "file='maps.txt'; allowed: an .npz file"),
        ({"weights": {"blocks": {"weight": np.zeros((5, 8, 8))}}}, r"\(5, 8, 8\); allowed: of the stages blocks \[6, "),
        ({"weights": {"single": {"weight": np.zeros((6, 8, 8))}}}, "single.weight is"),
        ({"weights": {"blocks": maps(1.0)}}, "hold no linear maps; see difax.core.stack.with_learned"),
    ],
)
def test_fastcache_refuses(settings, message):
    with pytest.raises(ValueError, match=message):
        toy_run(CACHES["fastcache"](**settings), learned=False)


# ---------------------------------------------------------------- T-GATE, by a plain loop


@pytest.mark.parametrize("together", some([True, False], False))
def test_tgate_by_a_plain_loop(together):
    """On a DiT whose MLP stands in for cross-attention: self-attention held at 1, 3 and 5, the MLP from 3 on."""
    p = problem()._replace(guide=GUIDES["cfg"](together=together))
    settings = dict(sp_interval=2, fi_interval=2, warmup=0)
    got, trace = p.run(CACHES["tgate"](3, cross="mlp", **settings))
    want = by_ddim(p, oracle.tgate(pieces(p), p.rows().model_time, both(p), 3, **settings), guided=3)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * np.abs(want).max())
    np.testing.assert_array_equal(trace.halves, [2, 2, 2, 1, 1, 1])


def test_guidance_that_would_begin_behind_the_gate_does_not():
    p = problem("interval", (0.1, 0.5))
    np.testing.assert_array_equal(p.rows().guided, [False, False, False, True, True, False])
    rows = p.rows(CACHES["tgate"](4, cross="mlp"))
    np.testing.assert_array_equal(rows.guided, [False, False, False, True, False, False])
    rows = p.rows(CACHES["tgate"](3, cross="mlp"))
    assert not rows.guided.any() and not rows.fresh[1:].any()


def test_tgate_without_guidance_holds_what_it_had():
    p = problem("none")
    got, trace = p.run(CACHES["tgate"](3, cross="mlp", sp_interval=1))
    np.testing.assert_array_equal(trace.computed["blocks"][:, 0, :, 0], [[1, 1]] * 3 + [[1, 0]] * 3)
    assert np.all(np.isfinite(got))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gate": 0}, "gate=0; allowed: 1 or more"),
        ({"sp_interval": 0}, "sp_interval=0; allowed: 1 or more"),
        ({"warmup": -1}, "warmup=-1"),
        ({"cross": "attn"}, "cross='attn', attn='attn'; allowed: .* two branches"),
        ({}, "tgate: no branch 'cross' in this model; allowed: attn, mlp"),
    ],
)
def test_tgate_refuses(settings, message):
    with pytest.raises(ValueError, match=message):
        problem().rows(CACHES["tgate"](**settings))


# ---------------------------------------------------------------- FasterCache, by a plain loop


@pytest.mark.parametrize("together", some([True, False], False))
def test_fastercache_by_a_plain_loop(together):
    """30 evaluations, whose windows are the authors', of 10 x 10 images, whose low band has a radius of 2."""
    p = problem(size=10, steps=30)._replace(guide=GUIDES["cfg"](together=together))
    got, trace = p.run(CACHES["fastercache"]())
    eps, log = oracle.fastercache(pieces(p), p.rows().model_time, both(p))
    want = by_ddim(p, eps, guided=30)
    attended = trace.computed["blocks"][:, 0, 0, 0]
    assert list(np.flatnonzero(attended)) == log["attended"] and set(map(float, attended)) == {0, 1}
    assert list(np.flatnonzero(trace.halves == 2)) == log["null"]
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-3 * np.abs(want).max())


def test_fastercache_has_the_authors_schedule():
    """Counters of their Open-Sora script: attention live up to 7 and at odd ones, guidance up to 11 and at fifths."""
    rows = problem(steps=30).rows(CACHES["fastercache"]())
    guided = {*range(1, 12), 15, 20, 25, 30}
    assert set(np.flatnonzero(rows.guided) + 1) == guided
    doing = [dict(rows.plan.modes[m]).get(("blocks", "attn")) for m in rows.plan.index]
    # 20 and 30 are even and guided among estimates: computed here
    assert [c + 1 for c in np.flatnonzero([d == "fill" for d in doing])] == [8, 10, 12, 14, 16, 18, 22, 24, 26, 28]
    low, high = np.asarray(rows.guide.low), np.asarray(rows.guide.high)
    np.testing.assert_allclose(low[[11, 13, 15, 18, 23, 25]], 1.15 ** np.array([1, 3, 1, 4, 4, 0]), rtol=1e-6)
    np.testing.assert_allclose(high[[11, 18, 20, 23, 25, 28]], 1.15 ** np.array([0, 0, 1, 4, 1, 4]), rtol=1e-6)


def test_fastercache_scales_its_windows_with_the_run():
    rows = problem(steps=60).rows(CACHES["fastercache"]())
    assert rows.guided[:22].all() and not rows.guided[22:24].any() and rows.guided[24]


def test_an_estimate_without_growth_is_the_old_difference():
    """Where both bands are added as they were, uncond = cond + (uncond - cond when it was last evaluated)."""
    difference = np.random.default_rng(6).normal(size=(2, 3, 10, 12, 4)).astype(np.float32)
    low, high = bands_of(jnp.asarray(difference))
    np.testing.assert_allclose(low + high, difference, atol=1e-6)
    spectrum = np.abs(np.fft.fft2(low, axes=(2, 3))).max((0, 1, 4)) > 1e-3  # a disc of radius 2 has 13 points
    assert spectrum.sum() == 13 and spectrum[0, 2] and spectrum[8, 0] and not spectrum[2, 1]


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("channels", [None, 1])
def test_fastercache_estimates_what_is_guided(together, channels):
    """By a network whose outputs are known: the guide's own mix, the variance channels conditional."""
    rng = np.random.default_rng(7)
    on, off, later = (jnp.asarray(rng.normal(size=(2, 10, 10, 6)), jnp.float32) for _ in range(3))
    guide = CACHES["fastercache"]().guide(GUIDES["cfg"](channels, together=together))
    rows = guide.plan(problem(steps=30).rows())

    def evaluate(i, state, values):
        def denoise(x, cond, row, memory, half):
            output = jnp.concatenate(values) if half == "both" else values[half == "uncond"]
            return output, memory, jnp.float32(len(output) // 2)

        row = jax.tree.map(lambda a: jnp.asarray(a[i]), rows)
        return guide.apply(denoise, x, jnp.zeros(2), jnp.zeros(2), 3.0, row, state, ())

    x = jnp.zeros((2, 10, 10, 3))
    output, state, _, halves = evaluate(10, guide.init(x), (on, off))
    g = 3 if channels is None else channels
    np.testing.assert_allclose(output[..., :g], (off + 3 * (on - off))[..., :g], atol=1e-5)
    assert halves == 2
    output, after, _, halves = evaluate(11, state, (later, jnp.full_like(off, jnp.nan)))
    low, high = bands_of((off - on)[..., :3])
    estimate = later[..., :3] + 1.15 * low + high
    np.testing.assert_allclose(output[..., :g], (estimate + 3 * (later[..., :3] - estimate))[..., :g], atol=1e-5)
    np.testing.assert_array_equal(output[..., g:], later[..., g:])
    assert halves == 1
    jax.tree.map(np.testing.assert_array_equal, after, state)


@pytest.mark.parametrize(
    ("settings", "guide", "message"),
    [
        ({"interval": 0}, "cfg", "interval=0; allowed: 1 or more"),
        ({"cfg_interval": 0}, "cfg", "cfg_interval=0; allowed: 1 or more"),
        ({"start": 0}, "cfg", "start=0, cfg_start=11; allowed: 1 or more"),
        ({"branches": ("cross",)}, "cfg", "fastercache: no branch 'cross' in this model; allowed: attn, mlp"),
        ({}, "none", "cfg=True with a guide that evaluates no unconditional half; allowed: cfg=False, or the guides"),
    ],
)
def test_fastercache_refuses(settings, guide, message):
    with pytest.raises(ValueError, match=message):
        problem(guide).rows(CACHES["fastercache"](**settings))
