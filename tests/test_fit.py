"""Calibrations and the search: tables by plain loops over taken features, gradients by differences, plans by trying."""

import itertools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from difax import cli
from difax.accel.caches import CACHES
from difax.accel.caches.measured import MeasuredElsewhere, save_by_stage
from difax.accel.caches.measured import record as says_of_itself
from difax.accel.fit import CALIBRATIONS, FITS, fastcache
from difax.accel.fit.record import record, record_inputs
from difax.accel.fit.search import by_dynamic_programming, refine, soft_hold, uniform
from difax.accel.solvers import SOLVERS
from difax.build import build_setup
from difax.config import checkpoint_config, load_config, override
from difax.core import process as P
from difax.core.contracts import Accelerator, Done
from difax.core.grids import GRIDS, make_times
from difax.core.guidance import GUIDES
from difax.core.noise import sample_keys
from difax.core.sample import initial_noise, make_rows, make_sampler
from difax.core.trunk import neutral
from difax.weights.checkpoint import save_safetensors
from tests.families import some
from tests.toys import randomise, tiny_dit

STEPS = 6
MODEL, PARAMS = tiny_dit(depth=3)
PROCESS, SOLVER, GUIDE = P.vp_linear(), SOLVERS["ddim"](), GUIDES["cfg"]()
LABELS = jnp.asarray([3, 0], jnp.int32)


def rows(accelerator):
    times = make_times(GRIDS["uniform"](), PROCESS, STEPS)
    return make_rows(SOLVER, GUIDE, PROCESS, times, accelerator, MODEL.stages)


def sampler(accelerator, **options):
    return make_sampler(MODEL, PROCESS, "eps", SOLVER, GUIDE, accelerator, **options)


def inputs(seed=0):
    keys = sample_keys(seed, len(LABELS))
    return PARAMS, initial_noise(PROCESS, keys, MODEL.input_shape), keys, LABELS


def run(accelerator):
    program = jax.jit(sampler(accelerator))
    samples, trace = program(*inputs(), rows(accelerator), 2.0)
    return np.asarray(samples), jax.tree.map(np.asarray, trace)


@pytest.fixture(scope="module")
def features():
    """Every branch's output [E, L, 2 halves x B, N, D] of a plain run, taken out as a metric."""

    def branch(compute, gate, where, state, inner, row):
        update, inner = compute(inner)
        return gate(update), state, inner, Done(1.0, update[..., None].astype(jnp.float32))

    _, trace = run(Accelerator(name="taps", branch=branch))
    return {b: f[..., 0] for b, f in trace.metric["branch"]["blocks"].items()}


@pytest.fixture(scope="module")
def recorded():
    samples, trace = run(record(STEPS - 1, dense=True))
    return samples, trace


def test_recording_changes_nothing(recorded):
    want, _ = run(neutral())
    np.testing.assert_allclose(recorded[0], want, rtol=1e-5, atol=1e-6)
    assert np.all(recorded[1].computed["blocks"] == 1)


def halves(a):
    """[2 halves x B, ...] -> [2, ...] flattened."""
    return a.reshape(2, -1)


def test_smoothcache_table(features, recorded):
    errors = CALIBRATIONS["smoothcache"].table([recorded[1]])["errors"]["blocks"]
    for branch, f in features.items():
        for i, k in itertools.product(range(STEPS), range(1, STEPS)):
            got = errors[branch][i][k - 1]
            if i + k >= STEPS:
                assert got is None
                continue
            each = [
                np.abs(a - b).sum() / np.abs(b).sum()
                for layer in range(3)
                for a, b in zip(halves(f[i, layer]), halves(f[i + k, layer]), strict=True)
            ]
            assert got == pytest.approx(np.mean(each), rel=1e-4)


def test_block_caching_table(features, recorded):
    changes = CALIBRATIONS["block_caching"].table([recorded[1]])["changes"]["blocks"]
    f = features["mlp"]
    for layer, i in itertools.product(range(3), range(1, STEPS)):
        pairs = zip(halves(f[i - 1, layer]), halves(f[i, layer]), strict=True)
        want = np.mean([np.abs(a - b).sum() / np.abs(b).sum() for a, b in pairs])
        assert changes["mlp"][layer][i] == pytest.approx(want, rel=1e-4)
    assert changes["mlp"][0][0] is None


def test_bacache_table(features, recorded):
    table = CALIBRATIONS["bacache"].table([recorded[1]])
    f = features["attn"].astype(np.float64)
    pairs = []
    for layer, (i, j) in itertools.product(range(3), itertools.combinations(range(STEPS), 2)):
        a, b = f[i, layer], f[j, layer]
        cosines = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
        assert table["similarities"]["blocks"]["attn"][layer][i][j] == pytest.approx(cosines.mean(), rel=1e-4)
        pairs.append((layer, np.abs(a - b).mean()))
    for layer in range(3):
        want = np.mean([d for at, d in pairs if at == layer])
        assert table["spreads"]["blocks"]["attn"][layer] == pytest.approx(want, rel=1e-4)


def test_bacache_needs_all_distances():
    _, trace = run(record(2))
    with pytest.raises(ValueError, match="2 distances were recorded; needed: 5"):
        CALIBRATIONS["bacache"].table([trace])


def test_magcache_ratios(features, recorded):
    """The residual of the whole stack is the sum of what its branches add; gates are taken from a one-branch run."""
    ratios = CALIBRATIONS["magcache"].table([recorded[1]])["ratios"]
    assert len(ratios) == STEPS and ratios[0] == 1.0

    def trunk(blocks, tokens, context, state, memory, row):
        out, memory, report = blocks.run(tokens, memory)
        return out, state, memory, report._replace(metric={**report.metric, "trunk": (out - tokens)[..., None]})

    _, trace = run(Accelerator(name="taps", trunk=trunk))
    norms = np.linalg.norm(trace.metric["trunk"][..., 0], axis=-1)
    want = (norms[1:] / norms[:-1]).mean((1, 2))
    np.testing.assert_allclose(ratios[1:], want, rtol=1e-4)


def test_teacache_needs_changes_that_differ(recorded):
    """A head of zeros, as random weights may have, gives none."""
    trace = recorded[1]
    for filled, why in ((0.0, "all alike"), (np.nan, "too few")):
        output = np.full_like(trace.metric["output"], filled)
        with pytest.raises(ValueError, match=f"teacache: .* of the network's output, {why}; allowed: more than 4"):
            CALIBRATIONS["teacache"].table([trace._replace(metric={**trace.metric, "output": output})])


def test_teacache_polynomial_is_the_least_squares_fit(recorded):
    table = CALIBRATIONS["teacache"].table([recorded[1]] * 2)
    x = recorded[1].metric["trunk"]["input"][1:].ravel().astype(np.float64)
    y = recorded[1].metric["output"][1:].ravel().astype(np.float64)
    assert table["points"] == 2 * len(x) and np.isfinite(x).all()
    want = np.linalg.lstsq(np.vander(x, 5), y, rcond=None)[0]
    np.testing.assert_allclose(np.polyval(table["coefficients"], x), np.vander(x, 5) @ want, rtol=1e-6)
    assert 0 < table["r2"] <= 1


def test_icc_magnitudes(features, recorded):
    found = CALIBRATIONS["icc"].table([recorded[1]])
    for side in ("inputs", "outputs"):
        names = {b: sorted(m) for b, m in found[side]["blocks"].items()}
        assert names == {"attn": ["out", "qkv"], "mlp": ["fc1", "fc2"]}
    assert found["inputs"]["blocks"]["mlp"]["fc2"].shape == (3, 64)
    # what the last layer of a branch gives out is the branch's output
    want = np.abs(features["mlp"]).mean((0, 2, 3))
    np.testing.assert_allclose(found["outputs"]["blocks"]["mlp"]["fc2"], want, rtol=1e-5)


def test_fastcache_maps_are_the_least_squares_of_all_that_blocks_did():
    """By numpy, on what goes in and out of every block in a guided run, both halves, taken out as a metric."""

    def block(run, where, tokens, state, inner, row):
        out, inner, done = run(tokens, inner)
        both = jnp.stack([tokens, out], -1)
        return out, state, inner, done._replace(metric={**done.metric, "block": both})

    want, trace = run(Accelerator(name="taps", block=block))
    taken = trace.metric["block"]["blocks"].astype(np.float64)  # [E, L, 2 halves x B, N, D, in and out]
    samples, trace = run(record_inputs())
    np.testing.assert_allclose(samples, want, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(trace.metric["output"][0, ..., 0], inputs()[1])
    runs = [(rows(neutral()), LABELS, trace)]
    found = FITS["fastcache"].arrays(MODEL, PARAMS, iter(runs), rank=1)["blocks"]
    firmer = fastcache.fit(MODEL, PARAMS, fastcache.of_runs(MODEL, runs), ridge=1e-4)["blocks"]
    for layer in range(3):
        h, out = (taken[:, layer, ..., k].reshape(-1, 16) for k in range(2))
        x, added = np.append(h, np.ones((len(h), 1)), axis=1), out - h
        assert len(x) == STEPS * 2 * len(LABELS) * 4
        got, firm = (np.append(of["weight"][layer], of["bias"][layer][None], axis=0) for of in (found, firmer))
        want = [ridge_regression(x, added, ridge) for ridge in (0.0, 1e-6, 1e-4)]
        left = [np.linalg.norm(x @ w - added) / np.linalg.norm(added) for w in (*want, got)]
        print(f"layer {layer}: of what the block adds, {left[0]:.4f} is left at best, {left[3]:.4f} here")
        # the sums are float32, of tokens whose second moments have a condition number of 1e7 and more
        assert left[3] == pytest.approx(left[1], rel=2e-3) and left[3] < 1.06 * left[0] < 0.5
        np.testing.assert_allclose(firm, want[2], atol=2e-3 * np.abs(want[2]).max())


def ridge_regression(x, y, ridge):
    """argmin_W |x W - y|^2 + lambda |W|^2, lambda relative to the mean of the second moments."""
    n = x.shape[1]
    extra = np.sqrt(ridge * (x**2).sum() / n) * np.eye(n)
    return np.linalg.lstsq(np.append(x, extra, axis=0), np.append(y, np.zeros((n, y.shape[1])), axis=0), rcond=None)[0]


# ---------------------------------------------------------------- the search


def test_soft_weights_of_one_and_zero_are_the_hard_plan():
    schedule = np.asarray([1, 0, 1, 1, 0, 0])
    want, _ = run(CACHES["scheduled"](schedule.tolist()))
    got, trace = run(soft_hold(schedule))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(trace.computed["blocks"].mean((1, 2, 3)), schedule)


def test_gradient_by_reuse_weights_is_the_difference_quotient():
    accelerator, (params, x, keys, labels) = soft_hold(), inputs()
    plain, _ = run(neutral())
    program = sampler(accelerator, remat=True)
    laid = rows(accelerator)

    def loss(w):
        planned = laid._replace(plan=laid.plan.replace(values=w))
        return jnp.mean((program(params, x.copy(), keys, labels, planned, 2.0)[0] - plain) ** 2)

    w = jnp.asarray([1.0, 0.3, 0.8, 0.5, 0.2, 0.6])
    slope = jax.jit(jax.grad(loss))(w)
    value = jax.jit(loss)
    for i in range(1, STEPS):
        e = jnp.zeros(STEPS).at[i].set(0.05)
        quotient = (value(w + e) - value(w - e)) / 0.1
        assert slope[i] == pytest.approx(float(quotient), rel=2e-2, abs=1e-4)  # the loss is 11, in float32
    assert np.all(np.abs(slope[1:4]) > 1e-3)


@pytest.mark.parametrize("full", [1, 2, 3, 6])
def test_dynamic_programming_finds_what_trying_all_finds(full):
    rng = np.random.default_rng(0)
    errors = np.sort(rng.random((6, 5)), axis=1)

    def total(schedule):
        last, value = 0, 0.0
        for j, computed in enumerate(schedule):
            if computed:
                last = j
            else:
                value += errors[last, j - last - 1]
        return value

    tried = [(True, *rest) for rest in itertools.product([True, False], repeat=5) if sum(rest) == full - 1]
    found = by_dynamic_programming(errors, full)
    assert found.sum() == full and found[0]
    assert total(found) == pytest.approx(min(map(total, tried)))


def test_dynamic_programming_avoids_what_was_not_measured():
    found = by_dynamic_programming(np.full((9, 2), 0.1), 3)  # three runs of at most two filled ones
    np.testing.assert_array_equal(np.flatnonzero(found), [0, 3, 6])


def test_uniform_is_even():
    np.testing.assert_array_equal(np.flatnonzero(uniform(50, 10)), np.arange(0, 50, 5))
    assert uniform(7, 3).sum() == 3 and uniform(5, 5).all()


@pytest.mark.parametrize("with_gradient", [True, False])
def test_refinement_reaches_the_optimum_of_a_known_loss(with_gradient):
    """A separable loss, whose gradient is its weights: the best plan computes the heaviest evaluations."""
    weights = np.asarray([0.0, 0.1, 0.9, 0.2, 0.8, 0.3, 0.7, 0.05])
    loss = lambda s: float(weights[~s].sum())  # noqa: E731
    start = np.asarray([1, 1, 0, 1, 0, 1, 0, 0], bool)
    found = refine(start, loss, (lambda s: -weights) if with_gradient else None, width=3)
    np.testing.assert_array_equal(np.flatnonzero(found.schedule), [0, 2, 4, 6])
    assert found.loss == pytest.approx(loss(found.schedule)) and found.schedule.sum() == start.sum()
    values = [value for value, _ in found.history]
    assert values == sorted(values, reverse=True) and values[0] == pytest.approx(loss(start))


# ---------------------------------------------------------------- the command

TINY = ("--labels", "0,1", "--steps", "5", "--quiet")


@pytest.mark.parametrize(
    "technique", some(["smoothcache", "teacache", "magcache", "block_caching", "bacache"], "smoothcache", "teacache")
)
def test_calibrate_writes_what_the_cache_reads(technique, small_weights, tmp_path, capsys):
    out = tmp_path / "table.json"
    assert (
        cli.main(
            ["calibrate", "--cache", technique, "--weights", small_weights, *TINY, "--samples", "2", "--out", str(out)]
        )
        == 0
    )
    assert str(out) in capsys.readouterr().out
    found = json.loads(out.read_text())
    assert found["technique"] == technique and found["steps"] == 5 and found["model"] == "dit-2x32/4"
    assert found["solver"] == "euler" and "2 samples, seed 0" in found["data"]
    settings = [("cache.name", technique), ("cache.file", str(out)), ("steps", 5)]
    settings += [("cache.updates", 2)] if technique == "bacache" else []
    laid = build_setup(override(checkpoint_config(small_weights), settings)).rows
    assert laid.plan.owner == technique


# ---------------------------------------------------------------- what a file says of itself

HERE = {
    "model": {"name": "dit", "depth": 2, "width": 16, "heads": 2, "patch": 2, "size": 4, "channels": 3, "classes": 5},
    "process": {"name": "flow"},
    "prediction": "velocity",
    "solver": {"name": "euler"},
    "grid": {"name": "uniform"},
    "guide": {"name": "cfg"},
    "steps": 6,
    "scale": 1.5,
}
BLOCKS = {"blocks": {"depth": 2, "branches": ["attn", "mlp"]}}
SAYS = {
    "technique": "teacache", "model": "dit-2x16/2", "stages": BLOCKS, "solver": "euler", "steps": 6, "guide": "cfg",
    "scale": 1.5, "coefficients": [1.0, 0.0],
}  # fmt: skip


def build_with(tmp_path, content, cache="teacache", **sections):
    """A setup whose cache plans from a file with this content."""
    file = tmp_path / "table.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return build_setup({**HERE, **sections, "cache": {"name": cache, "file": str(file)}})


@pytest.mark.parametrize(
    ("says", "words"),
    [
        ({}, None),
        ({"model": "dit-4x16/2", "stages": {"blocks": {"depth": 4, "branches": ["attn", "mlp"]}}}, "'dit-4x16/2'"),
        ({"model": "dit-4x16/2"}, "here: dit-2x16/2"),
        ({"solver": "heun"}, "solver 'heun'; here: euler"),
        ({"steps": 50}, "evaluations 50; here: 6"),
        ({"scale": 4.0}, "scale 4.0; here: 1.5"),
        ({"guide": "none"}, "guidance 'none'; here: cfg"),
        ({"steps": 50, "solver": ["a"]}, "evaluations 50; here: .*6"),
    ],
)
def test_a_calibration_of_another_run_is_warned_of(says, words, tmp_path, recwarn):
    setup = build_with(tmp_path, SAYS | says)
    told = [str(w.message) for w in recwarn if w.category is MeasuredElsewhere]
    assert setup.accelerator.measured[0]["model"] == (SAYS | says)["model"]
    if words is None:
        assert told == []
    else:
        assert len(told) == 1 and "teacache: file=" in told[0] and "table.json" in told[0]
        assert re.search(words, told[0]), told[0]


def test_scale_says_nothing_where_nothing_is_guided(tmp_path, recwarn):
    build_with(tmp_path, SAYS | {"guide": "none", "scale": 7.0}, guide={"name": "none"})
    assert not [w for w in recwarn if w.category is MeasuredElsewhere]


OTHER = {"double": {"depth": 19, "branches": ["attn", "mlp"]}, "single": {"depth": 38, "branches": ["attn_mlp"]}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (SAYS | {"model": "flux-dev", "stages": OTHER}, r"flux-dev, with double \(attn, mlp\); single .*dit-2x16/2"),
        (SAYS | {"coefficients": []}, "coefficients: .*list of one or more numbers"),
        (SAYS | {"coefficients": None}, "coefficients: None; allowed: a list"),
        (SAYS | {"coefficients": {"a": 1.0}}, "coefficients: .*allowed: a list"),
        (SAYS | {"coefficients": [1.0, float("nan")]}, "coefficients is nan, no finite number"),
        (json.dumps(SAYS).replace("[1.0, 0.0]", "[1.0, 1e999]"), "coefficients is inf, no finite number"),
        (SAYS | {"technique": "magcache"}, "measured for magcache"),
    ],
)
def test_a_calibration_that_cannot_fit_is_refused(content, message, tmp_path):
    with pytest.raises(ValueError, match=f"(?s)teacache: file='.*table.json'.*{message}"):
        build_with(tmp_path, content)


@pytest.mark.parametrize(
    ("cache", "table", "message"),
    [
        ("magcache", {"ratios": [1.0] * 5}, "5 ratios of 6 evaluations; allowed: 1 for each"),
        ("magcache", {"ratios": [1.0] * 6, "halves": 2}, "6 ratios of 6 evaluations; allowed: 2 for each"),
        ("magcache", {"ratios": [1.0, 0.0] * 3}, "ratios: 0; allowed: above 0"),
        ("magcache", {"ratios": [1.0] * 6, "halves": "x"}, "halves='x'"),
        ("magcache", {"ratios": [1.0] * 6, "steps": "six"}, "6 ratios of six evaluations"),
        ("smoothcache", {"errors": {}}, "an empty table"),
        ("smoothcache", {"errors": {"blocks": {"attn": [[0.1]] * 5}}}, "are 5 x 1; allowed: 6 x any"),
        ("block_caching", {"changes": {"blocks": {"attn": [[0.1] * 6] * 4}}}, "are 4 x 6; allowed: 2 x 6"),
        ("scheduled", {"schedule": [1, 0]}, "measured over 2 evaluations; allowed: the 6"),
        ("scheduled", {"schedule": [1] * 6, "forecast": "taylor", "order": "2"}, "order=2; allowed"),
    ],
)
def test_tables_of_a_file_are_refused_with_its_name(cache, table, message, tmp_path):
    about = {k: v for k, v in SAYS.items() if k != "coefficients"} | {"technique": cache}
    with pytest.raises(ValueError, match=f"(?s){cache}: file='.*table.json'.*{message}"):
        build_with(tmp_path, about | table, cache)


def test_the_command_warns_in_one_line(small_weights, tmp_path, capsys):
    file = tmp_path / "table.json"
    file.write_text(json.dumps(SAYS))
    command = ["sample", "--weights", small_weights, *TINY, "--cache", "teacache", f"--config.cache.file={file}"]
    assert cli.main([*command, "--no-compile-cache", "--out", str(tmp_path / "a.png")]) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if "table.json" in line]
    assert len(told) == 1 and told[0].startswith("difax: warning: teacache: file=") and "dit-2x16/2" in told[0]


def test_files_of_arrays_say_what_they_are_of(tmp_path):
    save_by_stage(tmp_path / "a.npz", {"blocks": {"weight": np.ones(2)}}, {"model": "dit-2x16/2", "data": "x"})
    save_by_stage(tmp_path / "b.npz", {"blocks": {"weight": np.ones(2)}})
    assert says_of_itself("fastcache", str(tmp_path / "b.npz")) == ()
    (said,) = says_of_itself("fastcache", str(tmp_path / "a.npz"))
    assert said == {"technique": "fastcache", "file": str(tmp_path / "a.npz"), "model": "dit-2x16/2"}
    with np.load(tmp_path / "a.npz") as arrays:
        assert list(arrays) == ["blocks.weight"]


def test_calibrate_writes_the_factors_of_icc(small_weights, tmp_path, capsys):
    out = tmp_path / "factors.npz"
    command = [
        "calibrate",
        "--cache",
        "icc",
        "--weights",
        small_weights,
        *TINY,
        "--samples",
        "2",
        "--rank",
        "8",
        "--out",
        str(out),
    ]
    assert cli.main(command) == 0
    assert str(out) in capsys.readouterr().out
    settings = [("cache.name", "icc"), ("cache.file", str(out)), ("steps", 5)]
    built = build_setup(override(checkpoint_config(small_weights), settings)).accelerator
    assert built.learned and built.learned["blocks"]["icc.fc1.a"].shape == (2, 32, 1, 8)
    other = tmp_path / "factors.json"
    assert cli.main([*command[:-1], str(other)]) == 2 and ".npz" in capsys.readouterr().err


def test_calibrate_writes_the_maps_of_fastcache(tmp_path, capsys, monkeypatch):
    """Which sampling then reads, with random weights of a small model."""
    monkeypatch.chdir(tmp_path)
    model = build_setup(load_config("fmnist_smoke")).model
    save_safetensors("w.safetensors", randomise(jax.eval_shape(model.init, jax.random.key(0))), {"step": 0})
    small = ["--config", "fmnist_smoke", "--weights", "w.safetensors", "--labels", "0,1", "--steps", "3", "--quiet"]
    command = ["calibrate", "--cache", "fastcache", *small, "--samples", "3", "--batch", "2", "--out", "maps.npz"]
    assert cli.main(command) == 0
    told = capsys.readouterr().out
    assert "maps.npz" in told and "3 samples, seed 0" in told
    with np.load("maps.npz") as maps:
        shapes = {name: (a.shape, a.dtype.name) for name, a in maps.items()}
    depth, width = shapes["blocks.bias"][0]
    assert shapes == {
        "blocks.weight": ((depth, width, width), "float32"),
        "blocks.bias": ((depth, width), "float32"),
    }
    sample = ["sample", *small, "--cache", "fastcache", "--config.cache.threshold=1e9", "--no-compile-cache", "--json"]
    assert cli.main([*sample, "--config.cache.file=maps.npz"]) == 0
    table = json.loads(capsys.readouterr().out)
    assert table["decisions"] == ["F.."] * len(table["decisions"]) and table["metric"]["50 %"] > 0
    assert cli.main([*command[:-1], "maps.json"]) == 2 and ".npz" in capsys.readouterr().err


def test_search_writes_a_plan_that_beats_its_starts(small_weights, tmp_path, capsys):
    out = tmp_path / "plan.json"
    command = [
        "calibrate",
        "--cache",
        "scheduled",
        "--weights",
        small_weights,
        *TINY,
        "--samples",
        "2",
        "--budget",
        "0.6",
    ]
    assert cli.main([*command, "--rounds", "2", "--out", str(out)]) == 0
    assert "loss, found" in capsys.readouterr().out
    found = json.loads(out.read_text())
    assert len(found["schedule"]) == 5 and 1 <= sum(found["schedule"]) <= 3
    assert 0 < found["losses"]["found"] <= min(found["losses"].values())
    assert CACHES["scheduled"](file=str(out)).name == "scheduled"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--cache", "smoothcash"], ["'smoothcash'", "did you mean smoothcache?"]),
        ([], ["--cache is missing", "scheduled"]),
        (["--cache", "scheduled", "--budget", "0.0001"], ["--budget=0.0001", "or more"]),
        (["--cache", "scheduled", "--budget", "3"], ["--budget=3.0", "at most 1"]),
        (["--cache", "teacache", "--samples", "0"], ["--samples=0", "1 or more"]),
        (["--cache", "teacache", "--config.cache.threshold=1"], ["takes no keys", "threshold"]),
    ],
)
def test_calibrate_refuses(arguments, said, small_weights, tmp_path, capsys):
    out = tmp_path / "x.json"
    with pytest.raises(SystemExit) as stopped:
        raise SystemExit(cli.main(["calibrate", *arguments, "--weights", small_weights, *TINY, "--out", str(out)]))
    told = capsys.readouterr().err
    assert stopped.value.code == 2 and told.count("\n") == 1
    for word in said:
        assert word in told, told
    assert not list(tmp_path.iterdir())
