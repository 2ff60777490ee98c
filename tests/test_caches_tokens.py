"""Token caches: the token axis by its properties, ToCa and DuCa by plain loops over steps, blocks and tokens."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from difax.accel.caches import CACHES
from difax.accel.caches import token_axis as axis
from difax.accel.caches.planned import planned
from difax.accel.caches.toca import clock
from difax.accel.caches.tokens import Schedule, attends_itself, token_cache
from difax.accel.fit.icc import icc_factors, save_factors
from difax.build import build_setup
from difax.config import load_config
from difax.core import ops
from difax.core.contracts import Segments
from difax.core.guidance import GUIDES
from difax.core.noise import sample_keys
from difax.core.sample import initial_noise, make_rows, make_sampler
from difax.core.shapes import trunk_spec
from difax.core.stack import with_learned
from difax.core.trunk import neutral, unstack
from difax.weights.conditions import random_conditions
from tests.families import some
from tests.oracles import tokens as oracle
from tests.test_caches import Problem, problem
from tests.toys import randomise

SIDE, DEPTH, STEPS = 4, 3, 10  # of the test's DiT: side of the grid of tokens, blocks; and of its runs
RNG = np.random.default_rng(0)


def dit(**more: Any) -> Problem:
    return problem(**({"size": 2 * SIDE, "depth": DEPTH} | more))


# ---------------------------------------------------------------- the token axis


def test_scatter_of_gather_changes_nothing_and_scatter_changes_the_chosen_only():
    x, index = jnp.asarray(RNG.normal(size=(2, 9, 3)), jnp.float32), jnp.asarray([[4, 0, 7], [8, 2, 3]])
    np.testing.assert_array_equal(axis.scatter(x, index, axis.gather(x, index)), x)
    new = RNG.normal(size=(2, 3, 3)).astype(np.float32)
    want = np.array(x)
    for b in range(2):
        for m in range(2):
            want[b, index[b, m]] = new[b, m]
    np.testing.assert_array_equal(axis.scatter(x, index, new, 2), want)
    np.testing.assert_array_equal(axis.scatter(x, index, new, 0), x)


@pytest.mark.parametrize("number", [1, 4, 7, 12])
def test_chosen_tokens_are_the_best(number):
    score = jnp.asarray(RNG.permutation(24).reshape(2, 12), jnp.float32)
    edges = [next(n for n in range(13) if n * number // 12 >= j) for j in range(number + 1)]
    for b in range(2):
        best = sorted(range(12), key=lambda n, b=b: -score[b, n])
        assert list(axis.top(score, number)[b]) == best[:number]
        each = {max(range(i, j), key=lambda n, b=b: score[b, n]) for i, j in zip(edges, edges[1:], strict=False)}
        assert list(axis.top(axis.stratified(score, number), number)[b]) == [n for n in best if n in each]


def test_of_equal_tokens_the_earlier_is_chosen():
    np.testing.assert_array_equal(axis.top(jnp.ones((1, 5)), 3), [[0, 1, 2]])
    np.testing.assert_array_equal(axis.top(axis.stratified(jnp.ones((1, 6)), 2), 2), [[0, 3]])


@pytest.mark.parametrize("grid", [(4, 6), (2, 2, 4)])
def test_the_best_of_each_cell_gains(grid):
    score = RNG.normal(size=(2, int(np.prod(grid)))).astype(np.float32)
    *frames, rows, columns = grid
    parts = np.split(score, frames[0] if frames else 1, axis=1)
    want = np.concatenate([oracle.spread(p, 0.6, rows, columns) for p in parts], axis=1)
    np.testing.assert_allclose(axis.with_bonus(jnp.asarray(score), 0.6, grid), want, rtol=1e-6)
    assert (want != score).sum() == score.size / 4


@pytest.mark.parametrize("padded", [False, True])
def test_column_sums_are_those_of_the_map(padded):
    """More queries than go into one part, and keys that nobody may attend to."""
    q, k = (RNG.normal(size=(2, n, 3, 4)).astype(np.float32) for n in (axis.QUERIES + 5, 6))
    segments = None
    logits = np.einsum("bthk,bshk->bhts", q, k) / 2
    if padded:
        ids = np.array([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0]])
        segments = Segments(jnp.ones(q.shape[:2], jnp.int32), jnp.asarray(ids))
        logits = np.where(ids[:, None, None] == 1, logits, -np.inf)
    e = np.exp(logits - logits.max(-1, keepdims=True))
    want = (e / e.sum(-1, keepdims=True)).sum(2).mean(1)
    np.testing.assert_allclose(axis.column_sums(q, k, segments), want, rtol=1e-4, atol=1e-6)


def test_a_permutation_of_the_tokens_permutes_what_is_held():
    """Choose, gather, compute, scatter: each token is treated alike, wherever it stands."""
    x, held = (jnp.asarray(RNG.normal(size=(2, 8, 3)), jnp.float32) for _ in range(2))
    score, order = RNG.permutation(16).reshape(2, 8).astype(np.float32), RNG.permutation(8)

    def step(x, held, score):
        index = axis.top(score, 3)
        return axis.scatter(held, index, jnp.tanh(axis.gather(x, index)))

    got = step(x[:, order], held[:, order], score[:, order])
    np.testing.assert_array_equal(got, np.asarray(step(x, held, score))[:, order])


def composed(model: str, **sections: Any):
    config = {k: v for k, v in load_config(f"{model}_tiny").items() if k not in ("attend", "quant", "cache")}
    return build_setup({**config, "steps": 4, "scale": 1.5, "guide": {"name": "cfg"}, **sections})


ITSELF = {
    "flux": {"double/attn", "single/attn_mlp"},
    "pixart": {"blocks/attn"},
    "wan": {"blocks/attn"},
    "sd3": {"dual/attn", "dual/attn2", "joint/attn", "last/attn"},
    "qwen_image": {"double/attn"},
    "flux2": {"double/attn", "single/attn_mlp"},
    "z_image": {"refiner/attn", "blocks/attn"},
}


@pytest.mark.parametrize("model", some(ITSELF, "flux", "pixart", "wan"))
def test_branches_whose_tokens_attend_to_each_other(model):
    """All others give, for some of the tokens alone, what they give for these among all."""
    run = composed(model)
    params = randomise(jax.eval_shape(run.model.init, jax.random.key(0)))
    x = jnp.ones((2, *run.model.input_shape))
    cond = jax.tree.map(jnp.asarray, random_conditions(run.model, 2))
    spec = trunk_spec(run.model, params, x, cond)
    found = {f"{s}/{b}" for s, of in spec.update.items() for b in of if attends_itself(spec, s, b)}
    assert found == ITSELF[model]

    @jax.jit
    def both():
        tokens, context = run.model.embed(params, x, jnp.ones(2), cond)
        index = jax.tree.map(lambda a: jnp.asarray([[3, 0, 5], [1, 2, 7]]), tokens)
        pairs = {}
        for stage in run.model.stages:
            p = {"params": jax.tree.map(lambda a: a[0], params[stage.name])}
            mods = stage.block.apply(p, context, method="mods")
            for branch in stage.branches:
                if f"{stage.name}/{branch}" not in found:
                    apply = functools.partial(stage.block.apply, p, method=branch)
                    whole = apply(tokens, mods, context, ops.attend)
                    part = apply(axis.gather(tokens, index), mods, context, ops.attend)
                    pairs[branch] = (axis.gather(whole, index), part)
        return pairs

    for branch, (want, got) in both().items():
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5, err_msg=branch), got, want)


def test_streams_stand_in_the_order_of_a_joint_attention():
    """Keys that change with the text stand where `by_stream` puts the text."""
    run = composed("flux")
    params = randomise(jax.eval_shape(run.model.init, jax.random.key(0)))
    cond = jax.tree.map(jnp.asarray, random_conditions(run.model, 1))
    text = run.model.cond["text"].shape[0]

    @jax.jit
    def keys(order):
        tokens, context = run.model.embed(params, jnp.ones((1, *run.model.input_shape)), jnp.ones(1), cond)
        tokens, found = {**tokens, "txt": tokens["txt"][:, order]}, {}
        for stage in run.model.stages:
            p = {"params": jax.tree.map(lambda a: a[0], params[stage.name])}

            def attend(q, k, v, segments=None, name=stage.name):
                found[name] = k
                return ops.attend(q, k, v)

            mods = stage.block.apply(p, context, method="mods")
            stage.block.apply(p, tokens, mods, context, attend, method=stage.branches[0])
        return tokens, found

    tokens, there = keys(np.arange(text))
    _, back = keys(np.arange(text)[::-1])
    for name, k in there.items():
        cut = axis.by_stream(np.abs(k - back[name]).max((2, 3)), tokens)
        assert set(cut) == {"txt", "img"} and np.all(cut["txt"] > 0) and np.all(cut["img"] == 0), name


# ---------------------------------------------------------------- ToCa and DuCa by plain loops


@functools.cache
def pieces() -> oracle.Network:
    """The network for the oracle, compiled once a piece."""
    p = dit()
    block, stage = p.model.stages[0].block, p.model.stages[0]

    def at(layer: Any):
        return {"params": jax.tree.map(lambda a: a[layer], p.params["blocks"])}

    @jax.jit
    def embed(x, k, labels):
        return p.model.embed(p.params, x, jnp.full(labels.shape, k, jnp.float32), labels)

    @jax.jit
    def run(layer, tokens, context):
        seen = []

        def attend(q, k, v):
            seen.extend((q, k, v))
            return ops.attend(q, k, v)

        mods = block.apply(at(layer), context, method="mods")
        attn = block.apply(at(layer), tokens, mods, context, attend, method="attn")
        mlp = block.apply(at(layer), tokens, mods, context, attend, method="mlp")
        gates = {b: block.apply(at(layer), mods, b, method="gate") for b in ("attn", "mlp")}
        return (attn, *seen), mlp, gates

    def numpy(tree):
        return jax.tree.map(np.asarray, tree)

    head = jax.jit(lambda tokens, context: p.model.head(p.params, tokens, context))
    return oracle.Network(
        embed,
        lambda *a: numpy(run(*a)[0]),
        lambda *a: np.asarray(run(*a)[1]),
        lambda layer, name, context: np.asarray(run(layer, np.zeros((2, SIDE**2, 16), np.float32), context)[2][name]),
        lambda t, c: np.asarray(head(jnp.asarray(t), c)),
        stage.depth,
    )


@functools.cache
def without() -> np.ndarray:
    return np.asarray(dit(steps=STEPS).run(neutral())[0])


def compare(p: Problem, accelerator: Any, settings: oracle.ToCa, plan: list[list[str]], given: Any = None) -> str:
    """Samples and numbers of computed tokens are those of the loops; returns the loops' string of steps."""
    _, x, _, labels = p.inputs()
    rows = p.rows()
    abar = np.append(p.process.level(rows.t.astype(np.float64)).alpha ** 2, 1.0)
    k = np.round(rows.model_time).astype(int)
    guidance = (labels, p.model.null(labels), 2.0)
    want, string, tokens = oracle.sample(pieces(), settings, np.asarray(x), k, abar, *guidance, plan, given)
    got, trace = p.run(accelerator)
    scale = np.abs(want).max()
    error, effect = np.abs(got - want).max() / scale, np.abs(without() - want).max() / scale
    print(f"{string}: error {error:.1e}, effect of the cache {effect:.1e}")
    assert error < min(1e-4, 0.01 * effect)
    np.testing.assert_allclose(trace.computed["blocks"][:, :, 1, 0].sum(1) * SIDE**2, tokens, atol=1e-4)
    return string


CONSTANT = {"interval": 4, "ratio": 0.2, "step_weight": 0.0, "layer_weight": 0.0}  # half of the tokens of an MLP
TOCA = {
    "ddim50": oracle.ToCa(3, 0.06, 2.0, -0.2),
    "ddpm250": oracle.ToCa(4, 0.15, 0.4, 0.8, quirks=True),
    "key_norm": oracle.ToCa(4, 0.15, 0.0, 0.0, score="key_norm"),
    "value_norm": oracle.ToCa(4, 0.15, 0.0, 0.0, score="value_norm", bonus=0.0),
    "similarity": oracle.ToCa(4, 0.15, 0.0, 0.0, score="similarity", soft=0.0),
    "staleness": oracle.ToCa(4, 0.15, 0.0, 0.0, score="staleness", bonus=0.0),
}


@pytest.mark.parametrize("name", some(TOCA, "ddim50", "similarity"))
def test_toca_by_plain_loops(name):
    s = TOCA[name]
    accelerator = CACHES["toca"](
        interval=s.interval,
        ratio=s.ratio,
        step_weight=s.step_weight,
        layer_weight=s.layer_weight,
        score=s.score,
        staleness=s.soft,
        bonus=s.bonus,
        reference_quirks=s.quirks,
    )
    p = dit(steps=STEPS)
    if name == "similarity":  # the blocks written out
        p = p._replace(params=unstack(p.model, p.params))
    if name == "key_norm":  # the halves one after the other
        p = p._replace(guide=GUIDES["cfg"](together=False))
    assert compare(p, accelerator, s, oracle.rhythm(s, STEPS, DEPTH)) == {
        "ddim50": "FFTTTFFFTF",
        "ddpm250": "FTT*TFTTTF",
    }.get(name, "FTTFTFTTTF")


GOLDEN = {  # restated from the rule, with the full steps they amount to in 28 blocks
    3: ("FTTT*FTTTFTTTFTTT*TFTTFTTFTTFTTFTFTFTFTFTFTFTFTFTF", 18.07),
    4: ("FFTTTTT*TFTTTTFTTTT*TFTTTFTTTFTTTFTFTFTFT*TFTTFTTF", 14.11),
}


@pytest.mark.parametrize("interval", GOLDEN)
def test_the_clock_in_50_steps(interval):
    first, rest = clock(50, interval, 0.07, quirks=True)
    string = "".join("F" if r == 0 else "*" if f == 0 else "T" for f, r in zip(first, rest, strict=True))
    full = ((first == 0) + 27 * (rest == 0)).sum() / 28
    assert (string, round(float(full), 2)) == GOLDEN[interval]
    clean, same = clock(50, interval, 0.07)
    np.testing.assert_array_equal(clean, same)
    assert string.replace("*", "F")[:6] == "".join("TF"[int(r == 0)] for r in clean)[:6]


def test_without_a_ratio_the_clock_is_a_plain_interval():
    first, _ = clock(7, 3, 0.0)
    assert list(np.flatnonzero(first == 0)) == [0, 3, 6]  # steps 6, 3, 0


def test_duca_takes_turns():
    _, rest = clock(50, 3, 0.05, quirks=True)
    first, _ = clock(50, 3, 0.05, quirks=True)
    kinds = [("*" if r else "F") if f == 0 else "AT"[r % 2] for f, r in zip(first, rest, strict=True)]
    assert "".join(kinds) == "FTAT*FTATFTATFTAT*TFATFATFATFATFTFTFTFTFTFTFTFTFTF"


DUCA = {
    "clean": (oracle.ToCa(4, 0.1, 0.0, 0.0, score="value_norm", bonus=0.8), "FATFTFTATF"),
    "quirks": (oracle.ToCa(4, 0.1, 0.0, 0.0, score="attention", bonus=0.8, quirks=True), "FAT*TFTATF"),
}


@pytest.mark.parametrize("name", DUCA)
def test_duca_by_plain_loops(name):
    """With the quirks, the first block of the fourth evaluation is full, and the others are left out."""
    s, want = DUCA[name]
    accelerator = CACHES["duca"](
        s.interval, s.ratio, step_weight=0.0, layer_weight=0.0, score=s.score, reference_quirks=s.quirks
    )
    assert compare(dit(steps=STEPS), accelerator, s, oracle.rhythm(s, STEPS, DEPTH, duca=True)) == want


def test_tokencache_by_plain_loops(tmp_path):
    """Each evaluation goes by the nearest of five times, at which a made-up predictor ranks blocks and tokens."""
    p = dit(steps=STEPS)
    times, table = np.linspace(0, 1000, 5), RNG.normal(size=(5, DEPTH, SIDE**2))
    np.savez(tmp_path / "predictor.npz", times=times, blocks=table)
    accelerator = CACHES["tokencache"]((4, 2), 0.5, ratio=0.4, blocks=0.67, file=str(tmp_path / "predictor.npz"))
    nearest = [int(np.argmin([abs(t - k) for k in times])) for t in p.rows().model_time]
    plan = oracle.round_robin((4, 2), STEPS // 2, table[nearest].mean(2), pruned=2)
    settings = oracle.ToCa(1, 0.4, 0.0, 0.0, module=1.0, score="given", soft=0.0, bonus=0.0)
    assert compare(p, accelerator, settings, plan, table[nearest]) == "F***FF*F*F"
    assert len({tuple(kinds) for kinds in plan}) > 2  # not always the same blocks


# ---------------------------------------------------------------- against other parts of difax


def test_every_token_is_the_whole_branch():
    """All tokens of the MLP in a partial evaluation: what a plan that holds the attention alone computes."""
    p = dit()
    full = np.asarray([1, 0, 0, 1, 0, 0], bool)

    def schedule(rows, stages):
        flags = {"blocks": np.repeat(full[:, None], DEPTH, 1)}
        return Schedule(flags, {"blocks": {"mlp": np.ones((len(full), DEPTH))}}, np.zeros(len(full), bool))

    got, trace = p.run(token_cache("all", schedule, score="random"))
    want, _ = p.run(planned("attn", lambda rows, stages: {"blocks": {"attn": full}}))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6 * np.abs(want).max())
    np.testing.assert_array_equal(trace.computed["blocks"].mean((1, 3)), [[1, 1], [0, 1], [0, 1]] * 2)


def test_random_tokens_are_a_samples_own_affair():
    """A batch of two is two batches of one; another seed chooses others, in the same program."""
    p, traces = dit(), [0]

    def embed(*a):
        traces[0] += 1
        return p.model.embed(*a)

    def random(seed=0):
        return CACHES["toca"](score="random", **CONSTANT, seed=seed)

    counted = p._replace(model=p.model._replace(embed=embed))
    sampler = jax.jit(counted.sampler(random()))

    def run(rows=slice(0, 2), seed=0):
        params, x, keys, labels = p.inputs()
        return np.asarray(sampler(params, x[rows], keys[rows], labels[rows], p.rows(random(seed)), 2.0)[0])

    both = run()
    scale, first = np.abs(both).max(), traces[0]
    assert np.abs(both - run(seed=1)).max() > 1e-3 * scale and traces[0] == first
    np.testing.assert_allclose(both[1:], run(slice(1, 2)), rtol=1e-4, atol=1e-5 * scale)


def test_stretches_choose_other_tokens_than_the_best():
    p = dit()
    best, stretches = (p.run(CACHES["toca"](**CONSTANT, select=how))[0] for how in ("top", "stratified"))
    assert np.abs(best - stretches).max() > 1e-4 * np.abs(best).max()


def test_nothing_stale_is_used_where_guidance_begins():
    """What is not a number before the guide wakes up does not reach the samples."""
    p, toca = dit(), CACHES["toca"](**CONSTANT)
    p = p._replace(guide=GUIDES["interval"](0.1, 0.7))

    def poisoned(spec, modes):
        return jax.tree.map(
            lambda a: jnp.full_like(a, jnp.nan if a.dtype == jnp.float32 else 99), toca.init(spec, modes)
        )

    got, trace = p.run(toca._replace(init=poisoned))
    assert np.all(np.isfinite(got)) and list(trace.halves) == [1, 1, 2, 2, 2, 1]
    # the scores of a full evaluation count as well
    assert list(np.floor(trace.computed["blocks"][:, 0, 0, 0])) == [1, 0, 1, 0, 0, 1]


def of_cross(n: int, width: int = 48, text: int = 8, share: float = 0.4) -> float:
    """Left of the products of cross-attention: queries, logits, values and projection of some tokens, keys and values
    of the whole caption."""
    token, caption = 4 * width**2 + 4 * text * width, 4 * text * width**2
    return (int(share * n) * token + caption) / (n * token + caption)


SHARES = {
    "flux": {"mlp": (32 + 4) / (64 + 8)},  # half of the image's tokens, and of the text's
    "sd3": {"mlp": (32 + 4) / (64 + 8)},
    "wan": {"mlp": 0.5, "cross": of_cross(120)},
}


@pytest.mark.parametrize(
    ("model", "name"),
    [
        pytest.param("flux", "toca", marks=pytest.mark.slow),
        ("wan", "toca"),
        ("flux", "duca"),
        pytest.param("sd3", "toca", marks=pytest.mark.slow),
        pytest.param("sd3", "duca", marks=pytest.mark.slow),
    ],
)
def test_runs_on_every_model_and_counts_its_products(model, name):
    modules = {"mlp": 2.5} if model in ("flux", "sd3") else {"mlp": 2.5, "cross": 2.0}
    run = composed(model)
    accelerator = CACHES[name](**{**CONSTANT, "interval": 2}, modules=modules)
    rows = make_rows(run.solver, run.guide, run.process, run.times, accelerator, run.model.stages)
    params = run.prepare(randomise(jax.eval_shape(run.model.init, jax.random.key(0))))
    keys, cond = sample_keys(0, 2), jax.tree.map(jnp.asarray, random_conditions(run.model, 2))
    sampler = make_sampler(run.model, run.process, run.prediction, run.solver, run.guide, accelerator)
    x = initial_noise(run.process, keys, run.model.input_shape)
    got, trace = jax.jit(sampler)(params, x, keys, cond, rows, 1.5)
    assert np.all(np.isfinite(got))
    _, rest = clock(len(rows.i), 2, 0.2)
    part = int(np.flatnonzero(rest % 2 == 1)[0])
    for stage in run.model.stages:
        for j, branch in enumerate(stage.branches):
            share = np.unique(trace.computed[stage.name][part, :, j])
            np.testing.assert_allclose(share, [SHARES[model].get(branch, 0)], rtol=1e-6)


# ---------------------------------------------------------------- ICC

PARTS = {"qkv": 3, "out": 1, "fc1": 1, "fc2": 1}


def magnitudes(p: Problem, of: str) -> dict[str, Any]:
    """Made-up mean magnitudes of every channel."""
    rng, kernels = np.random.default_rng(len(of)), p.params["blocks"]
    axis_of = {"inputs": 1, "outputs": 2}[of]
    return {n: rng.uniform(0.1, 3, (DEPTH, kernels[n]["kernel"].shape[axis_of])) for n in PARTS}


@pytest.mark.parametrize("weighted", [False, True])
def test_icc_by_plain_loops(weighted):
    """Four full evaluations of ten, and between them the weights cut to rank 3, in a DiT written out in numpy."""
    p = dit(steps=STEPS)
    inputs, outputs = (magnitudes(p, of) if weighted else None for of in ("inputs", "outputs"))
    given = {k: {"blocks": {"attn": m}} for k, m in (("inputs", inputs), ("outputs", outputs)) if m}
    factors = icc_factors(p.params, p.model.stages, 3, **given)
    accelerator = CACHES["icc"](3, factors)
    p = p._replace(params=with_learned(p.params, accelerator))
    got, trace = p.run(accelerator)

    blocks = [jax.tree.map(lambda a, i=i: np.asarray(a[i], np.float64), p.params["blocks"]) for i in range(DEPTH)]
    low = [
        {
            n: oracle.cut_to_rank(block[n]["kernel"], k, 3, inputs and inputs[n][i], outputs and outputs[n][i])
            for n, k in PARTS.items()
        }
        for i, block in enumerate(blocks)
    ]
    _, x, _, labels = p.inputs()
    rows, network = p.rows(), pieces()
    abar = np.append(p.process.level(rows.t.astype(np.float64)).alpha ** 2, 1.0)

    def embed(x, k, labels):
        tokens, context = network.embed(x, k, labels)
        return np.asarray(tokens, np.float64), np.asarray(context["silu_c"], np.float64)

    def head(tokens, silu_c):
        return network.head(tokens, {"silu_c": jnp.asarray(silu_c, jnp.float32)})

    k = np.round(rows.model_time).astype(int)
    guidance = (labels, p.model.null(labels), 2.0)
    want = oracle.icc(embed, head, blocks, 2, np.asarray(x, np.float64), k, abar, *guidance, 3, low)
    scale = np.abs(want).max()
    error, effect = np.abs(got - want).max() / scale, np.abs(without() - want).max() / scale
    print(f"error {error:.1e}, effect of the cache {effect:.1e}")
    assert error < 1e-4 < 0.1 * effect
    n, d, r = SIDE**2, 16, 3
    whole, attention = {"attn": 4 * d * d + 2 * n * d, "mlp": 8 * d * d}, 2 * n * d
    part = {"attn": 3 * r * 2 * d + 2 * r * d + attention, "mlp": 2 * r * 5 * d}
    share = [part[b] / whole[b] for b in ("attn", "mlp")]
    for e in range(STEPS):
        expected = np.tile([1, 1] if e % 3 == 0 else share, (DEPTH, 1))
        np.testing.assert_allclose(trace.computed["blocks"][e, :, :, 0], expected, rtol=1e-6)


@pytest.mark.parametrize("model", some(["flux", "pixart", "sd3"], "pixart"))
def test_icc_of_full_rank_is_the_plain_run(model):
    """On every model, from a file, in both layouts of the parameters."""
    run = composed(model)
    params = run.prepare(randomise(jax.eval_shape(run.model.init, jax.random.key(0))))
    factors = icc_factors(params if model == "flux" else unstack(run.model, params), run.model.stages, 10_000)
    keys, cond = sample_keys(0, 2), jax.tree.map(jnp.asarray, random_conditions(run.model, 2))
    results = []
    for accelerator in (CACHES["icc"](1), CACHES["icc"](2, factors)):
        rows = make_rows(run.solver, run.guide, run.process, run.times, accelerator, run.model.stages)
        sampler = make_sampler(run.model, run.process, run.prediction, run.solver, run.guide, accelerator)
        x = initial_noise(run.process, keys, run.model.input_shape)
        results.append(jax.jit(sampler)(with_learned(params, accelerator), x, keys, cond, rows, 1.5))
    (want, _), (got, trace) = results
    error = np.abs(got - want).max() / np.abs(want).max()
    print(f"{model}: error {error:.1e}")
    assert error < 1e-5
    assert all(np.all(c[1] != 1) and np.all(c[2] == 1) for c in trace.computed.values())


def test_icc_reads_the_factors_that_were_saved(tmp_path):
    p, path = dit(), str(tmp_path / "factors.npz")
    factors = icc_factors(p.params, p.model.stages, 2)
    save_factors(path, factors)
    jax.tree.map(np.testing.assert_array_equal, CACHES["icc"](file=path).learned, factors)


def test_icc_refuses_factors_of_another_model():
    p = dit()
    factors = icc_factors(p.params, p.model.stages, 2)
    with pytest.raises(ValueError, match="hold no factors; see difax.core.stack.with_learned"):
        p.run(CACHES["icc"](2, factors))
    wider = icc_factors(dit(width=32).params, p.model.stages, 2)
    with pytest.raises(ValueError, match=re.escape("allowed: [3, 16, products, rank]")):
        p.run(CACHES["icc"](2, wider))
    with pytest.raises(ValueError, match="no factors for the dense layer qkv of the stage blocks"):
        p.run(CACHES["icc"](2, {"blocks": {k: a for k, a in factors["blocks"].items() if "qkv" not in k}}))
    with pytest.raises(ValueError, match="icc: factors: .*none of them empty"):
        CACHES["icc"](2, {"blocks": {}})
    with pytest.raises(ValueError, match="rank=0; allowed: 1 or more"):
        icc_factors(p.params, p.model.stages, 0)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("toca", {"interval": 0}, "interval=0, ratio=0.07; allowed: 1 or more, and 0 to 1"),
        ("toca", {"ratio": 1.5}, "ratio=1.5; allowed"),
        ("toca", {"preset": "ddim20"}, "preset='ddim20'; allowed: ddim50, ddpm250"),
        ("toca", {"score": "entropy"}, "score='entropy'; allowed: attention, key_norm"),
        ("toca", {"select": "best"}, "select='best'; allowed: top, stratified"),
        ("toca", {"bonus": -1.0}, "bonus=-1.0; allowed: 0 or more"),
        ("toca", {"dtype": "int8"}, "dtype='int8'; allowed: float32"),
        ("duca", {"interval": -1}, "interval=-1"),
        ("duca", {"score": "mean"}, "score='mean'; allowed"),
        ("icc", {"period": 0}, "period=0; allowed: 1 or more"),
        ("icc", {}, "period=2 without factors or file; allowed: 1, or one of them"),
        ("icc", {"factors": {}, "file": "x.npz"}, "factors and file were both given"),
        ("icc", {"file": "factors.pt"}, "file='factors.pt'; allowed: an .npz file that save_factors wrote"),
        ("tokencache", {"intervals": (0, 2)}, "intervals=(0, 2), switch=0.5; allowed: two of 1 or more"),
        ("tokencache", {"ratio": 2}, "ratio=2.0, blocks=1.0; allowed: 0 to 1"),
        ("tokencache", {"blocks": 0.5}, "blocks=0.5 without importance or file"),
        ("tokencache", {"score": "given"}, "score='given'; allowed: attention"),
        ("tokencache", {"file": "predictor.pt"}, "file='predictor.pt'; allowed: an .npz file"),
        ("tokencache", {"file": "x.npz", "score": "random"}, "a file was given beside importance or score"),
    ],
)
def test_factories_refuse(name, settings, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        CACHES[name](**settings)


def test_a_branch_that_the_model_lacks_is_refused_by_the_plan():
    p = dit()
    with pytest.raises(ValueError, match="toca: no branch 'cross' in this model; allowed: attn, mlp"):
        p.rows(CACHES["toca"](modules={"cross": 1.0}))


def test_predictors_of_another_model_are_refused(tmp_path):
    p, path = dit(), str(tmp_path / "predictor.npz")
    with pytest.raises(ValueError, match="importance of 2 blocks; the model has 3"):
        p.rows(CACHES["tokencache"](importance=(1, 2), blocks=0.5))
    np.savez(path, blocks=np.ones((1, 3, 16)))
    with pytest.raises(ValueError, match="has no times"):
        CACHES["tokencache"](file=path)
    np.savez(path, times=[500.0], blocks=np.ones((1, 2, 16)))
    with pytest.raises(
        ValueError, match=re.escape("an array (1, 2, 16) for the stage blocks; allowed: [1, 3, tokens]")
    ):
        p.rows(CACHES["tokencache"](file=path))
    np.savez(path, times=[500.0], blocks=np.ones((1, 3, 9)))
    with pytest.raises(ValueError, match="scores of 9 tokens in the stage blocks; it has 16"):
        p.run(CACHES["tokencache"](file=path))


def test_a_grid_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"grid=\(3, 5\) for 16 tokens; allowed"):
        dit().run(CACHES["toca"](grid=(3, 5)))
