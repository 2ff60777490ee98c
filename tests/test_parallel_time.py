"""Solvers that decide in the run or are parallel in time: their papers' algorithms, DDIM's own samples at tolerance 0,
meshes, caches, what is reported, and what is refused."""

import json
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import difax
from difax.accel.caches import CACHES
from difax.accel.solvers import SOLVERS
from difax.build import build_setup
from difax.cli import main
from difax.config import load_config, override
from difax.core import noise
from difax.core.contracts import Prediction, Trace
from difax.core.cost import model_cost, run_cost
from difax.core.decisions import strip
from difax.core.drive import DRIVES, Run, evaluations, width
from difax.core.grids import GRIDS, make_times
from difax.core.guidance import GUIDES
from difax.core.process import PROCESSES
from difax.core.sample import initial_noise, make_rows, make_sampler, rounded
from difax.core.shell import DifaxWarning
from difax.core.stack import with_learned
from difax.core.trunk import neutral
from difax.program import CHUNK
from experiments import parallel_time
from tests.families import some
from tests.oracles import parallel_time as oracle
from tests.test_caches import CASES as CACHED
from tests.test_executed import Products
from tests.toys import MIXTURE, randomise, tiny_dit

WINDOWS = ("paradigms", "parataa", "deq")


def mixture(x: Any, level: Any) -> Prediction:
    """A perfect network of `MIXTURE`, on the device; the noise level is each sample's own."""
    mean, std, weight = (jnp.asarray(a, x.dtype) for a in (MIXTURE.mean_KD, MIXTURE.std_K, MIXTURE.weight_K))
    a, s = (jnp.broadcast_to(v, x[:, :1].shape) for v in (level.alpha, level.sigma))
    variance = a**2 * std[None] ** 2 + s**2
    far = x[:, None] - a[..., None] * mean[None]
    posterior = jax.nn.softmax(jnp.log(weight)[None] - (far**2).sum(-1) / (2 * variance) - 4 * jnp.log(variance), -1)
    x0 = (posterior[..., None] * (mean[None] + (a * std[None] ** 2 / variance)[..., None] * far)).sum(1)
    return Prediction(x0, (x - a * x0) / s, None)


def gaussian(mean: Any, std: Any) -> Any:
    """A perfect network of independent Gaussians."""

    def predict(x, level):
        a, s = (jnp.broadcast_to(v, x[:, :1].shape) for v in (level.alpha, level.sigma))
        x0 = mean + a * std**2 / (a**2 * std**2 + s**2) * (x - a * mean)
        return Prediction(x0, (x - a * x0) / s, None)

    return predict


def driven(solver, process, times, x, keys, predict=mixture) -> tuple[np.ndarray, Trace]:
    """A solver's drive with a network that is known, in the precision of x."""
    rows = solver.grid(process, np.asarray(times, np.float64))._replace(plan=())
    if x.dtype == jnp.float32:
        rows = rounded(rows)

    def evaluate(x, row, guide_state, memory):
        return predict(x, row.level), guide_state, memory, Trace({}, {}, jnp.float32(1), {}, (), (), ())

    @jax.jit
    def run(x, keys, rows):
        return DRIVES[solver.drive](Run(solver, process, evaluate, rows, keys), x, (), ())

    samples, trace = run(x, keys, jax.tree.map(jnp.asarray, rows))
    return np.asarray(samples), trace


def begin(process, n: int, width: int = 8, dtype: Any = jnp.float32, start: int = 0) -> tuple[Any, Any]:
    keys = noise.sample_keys(0, n, start)
    return process.prior_std * noise.normal(noise.fold(keys, 0), (width,), dtype), keys


def noises(keys, n: int, width: int = 8) -> np.ndarray:
    """[samples, n, width], what the evaluations of each sample draw."""
    return np.stack([noise.normal(noise.fold(keys, e + 1), (width,), jnp.float64) for e in range(n)], 1)


# ---------------------------------------------------------------- Gotta Go Fast


def sde(name: str) -> tuple[Any, Any]:
    """(f, g) of the paper's own VP and VE processes, as functions of t."""
    if name == "ve":
        ratio = math.log(80.0 / 0.002)
        return lambda t: 0.0, lambda t: 0.002 * math.exp(ratio * t) * math.sqrt(2 * ratio)
    beta = lambda t: 0.1 + t * 19.9  # noqa: E731
    return lambda t: -beta(t) / 2, lambda t: math.sqrt(beta(t))


@pytest.mark.parametrize("name", ["vp_sde", "ve"])
def test_gotta_go_fast_by_algorithm_1(name):
    process, (f, g) = PROCESSES[name](), sde(name)
    with jax.enable_x64(True):
        x, keys = begin(process, 2, dtype=jnp.float64)
        solver = SOLVERS["gotta_go_fast"](relative=0.1, absolute=0.02)
        got, trace = driven(solver, process, np.linspace(1, 0.01, 401), x, keys)
        z, most = noises(keys, 400), []

        def drift(x, t):
            level = process.level(np.float64(t))
            score = -MIXTURE.eps(x[None], level.alpha, level.sigma)[0] / level.sigma
            return f(t) * x - g(t) ** 2 * score

        for b in range(2):
            want, e = oracle.gotta_go_fast(np.asarray(x[b]), drift, g, lambda e, b=b: z[b, e], 1.0, 0.01, 0.1, 0.02)
            np.testing.assert_allclose(got[b], want, rtol=1e-6, atol=1e-6)
            most.append(e)
    assert float(trace.live.sum()) == np.mean(most) and trace.unfinished == 0
    assert len(set(most)) == 2  # each has steps of its own
    print(name, most)


@pytest.mark.parametrize("name", ["vp_linear", "ve"])
def test_mean_and_covariance_of_a_gaussian(name):
    """32 pairs of numbers with means (0.5, -1) and deviations (0.3, 0.8) in one sample of 64, and 64 samples. In a
    sample of one pair alone the means come out 0.1 deviations off: its noise decides how long its steps are."""
    process, pairs = PROCESSES[name](), 32
    mean, std = np.tile([0.5, -1.0], pairs)[None], np.tile([0.3, 0.8], pairs)[None]
    x, keys = begin(process, 64, 2 * pairs)
    solver = SOLVERS["gotta_go_fast"]()
    predict = gaussian(jnp.asarray(mean, jnp.float32), jnp.asarray(std, jnp.float32))
    got, trace = driven(solver, process, np.linspace(1, 0, 1001), x, keys, predict)
    unit = ((got - mean) / std).reshape(-1, 2)
    n, correlation = len(unit), float(np.mean(np.prod(unit - unit.mean(0), 1)))
    print(name, unit.mean(0), unit.std(0) - 1, correlation, float(trace.live.sum()))
    assert trace.unfinished == 0
    assert np.all(np.abs(unit.mean(0)) < 4 / np.sqrt(n))
    assert np.all(np.abs(unit.std(0) - 1) < 4 / np.sqrt(2 * n))
    assert abs(correlation) < 4 / np.sqrt(n)
    again, _ = driven(solver, process, np.linspace(1, 0, 1001), x, keys, predict)
    np.testing.assert_array_equal(again, got)


@pytest.mark.slow
def test_tighter_tolerances_take_more_evaluations():
    process = PROCESSES["vp_sde"]()
    x, keys = begin(process, 4)
    made = []
    for relative in (0.2, 0.05, 0.02):
        solver = SOLVERS["gotta_go_fast"](relative=relative)
        made.append(float(driven(solver, process, np.linspace(1, 0, 1001), x, keys)[1].live.sum()))
    assert made[0] < made[1] < made[2]


def test_who_has_not_arrived_is_counted():
    process = PROCESSES["vp_sde"]()
    x, keys = begin(process, 3)
    _, trace = driven(SOLVERS["gotta_go_fast"](), process, np.linspace(1, 0, 21), x, keys)
    assert trace.unfinished == 1 and np.all(trace.live == 1) and len(trace.live) == 20


@pytest.mark.parametrize("process", ["flow", "sit"])
def test_a_flow_is_taken_from_where_it_has_a_slope(process):
    p = PROCESSES[process]()
    with pytest.raises(ValueError, match=f"SDE of {process} has no slope at t=1, where alpha = 0; allowed: processes"):
        SOLVERS["gotta_go_fast"]().grid(p, np.linspace(1, 0, 11))
    times = make_times(GRIDS["log_snr"](), p, 1000)
    x, keys = begin(p, 8, 64)
    mean, std = jnp.full((1, 64), 0.5), jnp.full((1, 64), 0.3)
    got, trace = driven(SOLVERS["gotta_go_fast"](), p, times, x, keys, gaussian(mean, std))
    assert trace.unfinished == 0
    assert abs(got.mean() - 0.5) < 4 * 0.3 / np.sqrt(512) and abs(got.std() / 0.3 - 1) < 4 / np.sqrt(1024)


# ---------------------------------------------------------------- windows, by their papers

PAPERS: list[tuple[str, dict[str, Any]]] = [
    ("paradigms", {}),
    ("paradigms", {"window": 4, "tolerance": 0.03, "eta": 1.0}),
    ("paradigms", {"window": None, "tolerance": 0.01}),
    ("parataa", {}),
    ("parataa", {"memory": 1}),
    ("parataa", {"memory": 2, "order": 3, "eta": 1.0}),
    ("parataa", {"memory": 4, "window": 5, "order": 5}),
    ("deq", {}),
    ("deq", {"memory": 5, "eta": 1.0, "tolerance": 1e-4}),
    ("deq", {"memory": 1}),
]
PAPER_IDS = [f"{name}-{settings}" for name, settings in PAPERS]


@pytest.mark.parametrize("case", some(PAPERS, *(PAPERS[i] for i in (0, 1, 3, 6, 7))), ids=PAPER_IDS)
def test_a_window_by_its_paper(case):
    """Samples and batches of evaluations, of three samples that settle at different times."""
    (name, settings), process, n = case, PROCESSES["vp_linear"](), 12
    times = make_times(GRIDS["trailing"](), process, n)
    level, eta = process.level(times), settings.get("eta", 0.0)
    a, b, c, w = oracle.chain(level.alpha, level.sigma, eta)
    given = {"window": n if name != "paradigms" else 10, "tolerance": 0.1 if name == "paradigms" else 1e-3} | settings
    given["window"] = min(given["window"] or n, n)
    with jax.enable_x64(True):
        x, keys = begin(process, 3, dtype=jnp.float64)
        got, trace = driven(SOLVERS[name](**settings), process, times, x, keys)
        z, made = noises(keys, n), []
        for sample in range(3):

            def eps(j, x):
                return MIXTURE.eps(x[None], level.alpha[j], level.sigma[j])[0]

            start, of = np.asarray(x[sample]), (a, b, c)
            if name == "paradigms":
                maps = [
                    lambda x, j=j, s=sample: a[j] * x + b[j] * eps(j, x) + c[j] * z[s, j] for j in range(n)
                ]  # fmt: skip
                want, batches = oracle.paradigms(start, maps, w, given["tolerance"], given["window"])
            elif name == "parataa":
                order, memory = given.get("order") or given["window"], given.get("memory", 3)
                rest = given["tolerance"], given["window"], order, memory
                want, batches = oracle.parataa(start, eps, z[sample], of, w, *rest)
            else:
                want, batches = oracle.deq(start, eps, z[sample], of, given["tolerance"], given.get("memory", 3))
            np.testing.assert_allclose(got[sample], want, rtol=1e-7, atol=1e-8)
            made.append(batches)
    assert float(trace.live.sum()) == pytest.approx(np.mean(made)) and trace.unfinished == 0
    assert max(made) < n or eta
    print(name, settings, made)


@pytest.mark.parametrize("process", some(PROCESSES, "vp_cosine"))
@pytest.mark.parametrize("name", WINDOWS)
def test_tolerance_zero_is_ddim(name, process):
    p, n = PROCESSES[process](), 20
    times = make_times(GRIDS["uniform"](), p, n)
    x, keys = begin(p, 2)
    for eta in (0.0, 1.0):
        want, _ = driven(SOLVERS["ddim"](eta), p, times, x, keys)
        got, trace = driven(SOLVERS[name](tolerance=0.0, eta=eta), p, times, x, keys)
        np.testing.assert_allclose(got, want, rtol=0, atol=3e-6 * np.abs(want).max())
        assert trace.unfinished == 0 and trace.live.sum() <= n


@pytest.mark.parametrize("name", WINDOWS)
def test_a_tolerance_buys_batches_for_an_error(name):
    """Of 50 steps: the tighter, the more batches, fewer than steps, and the nearer to DDIM's samples."""
    process = PROCESSES["vp_linear"]()
    times, (x, keys) = make_times(GRIDS["trailing"](), process, 50), begin(process, 4)
    want, _ = driven(SOLVERS["ddim"](), process, times, x, keys)
    default = 0.1 if name == "paradigms" else 1e-3
    wide = {} if name == "deq" else {"window": None}
    made, errors = [], []
    for factor in (1, 0.1, 0.01) if name == "parataa" else (10, 1, 0.1):
        got, trace = driven(SOLVERS[name](tolerance=factor * default, **wide), process, times, x, keys)
        made.append(float(trace.live.sum()))
        errors.append(np.abs(got - want).max())
    print(name, made, errors)
    assert made[0] < made[1] < made[2] < 25
    assert errors[0] > errors[1] > errors[2] and errors[2] < 0.01


SLIDING = [("paradigms", {"window": 5}), ("parataa", {"window": 6}), ("deq", {})]


@pytest.mark.parametrize("settings", some(SLIDING, SLIDING[1]), ids=[name for name, _ in SLIDING])
def test_a_batch_equals_its_samples(settings):
    process, (name, keys_of) = PROCESSES["vp_linear"](), settings
    times = make_times(GRIDS["trailing"](), process, 15)
    with jax.enable_x64(True):
        x, keys = begin(process, 4, dtype=jnp.float64)
        many, trace = driven(SOLVERS[name](**keys_of), process, times, x, keys)
        singles = []
        for b in range(4):
            one, its = driven(SOLVERS[name](**keys_of), process, times, x[b : b + 1], keys[b : b + 1])
            np.testing.assert_allclose(one[0], many[b], rtol=1e-9, atol=1e-9)
            singles.append(float(its.live.sum()))
    assert len(set(singles)) > 1 and float(trace.live.sum()) == pytest.approx(np.mean(singles))


@pytest.mark.parametrize("name", some(WINDOWS, "parataa"))
def test_the_whole_sampler_with_a_window(name):
    """Of a guided network: DDIM's samples, and what was evaluated."""
    model, params = tiny_dit()
    process, guide, cond = PROCESSES["vp_linear"](), GUIDES["cfg"](), jnp.asarray([3, 0], jnp.int32)
    times = make_times(GRIDS["trailing"](), process, 6)
    keys = noise.sample_keys(0, 2)

    def drawn(solver):
        rows = make_rows(solver, guide, process, times)
        x = initial_noise(process, keys, model.input_shape)
        return make_sampler(model, process, "eps", solver, guide)(params, x, keys, cond, rows, 1.5), rows

    (want, plain), _ = drawn(SOLVERS["ddim"](1.0))
    solver = SOLVERS[name](tolerance=0.0, eta=1.0)
    (got, trace), rows = drawn(solver)
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-5 * np.abs(want).max())
    wide, batches = width(solver, rows), int((trace.live > 0).sum())
    assert wide == 6 and evaluations(solver, rows, trace) == wide * float(trace.live.sum())
    assert trace.halves.sum() == wide * batches * 2
    full = np.asarray(plain.computed["blocks"][0])
    np.testing.assert_array_equal(trace.computed["blocks"][:batches], np.tile(wide * full, (batches, 1, 1, 1)))
    assert len(strip(trace)) == batches


# ---------------------------------------------------------------- meshes


def run_of(**settings) -> difax.Run:
    return difax.load("fmnist_smoke", **{"weights": "random", "steps": 8, **settings})


PARADIGMS = {"name": "paradigms", "window": 8, "tolerance": 0.0}


@pytest.mark.slow
def test_a_window_of_one_sample_lies_on_all_devices():
    """One sample, eight rows of it at once, eight devices: each has one, and they draw what one device draws."""
    one, many = (run_of(solver=PARADIGMS, **mesh) for mesh in ({}, {"mesh": {"data": 8}}))
    assert (one.setup.shards, many.setup.shards, many.setup.width) == (1, 1, 8)
    (a, alone), (b, shared) = (compiled_and_drawn(run) for run in (one, many))
    np.testing.assert_allclose(b, a, rtol=0, atol=1e-5)
    assert shared < alone / 4, (alone, shared)


def compiled_and_drawn(run: difax.Run) -> tuple[np.ndarray, float]:
    """One sample, and one device's operations in its program, the loop counted once."""
    setup = run.setup
    arguments = (setup.place(run.prepared), *setup.inputs(0, 1, np.asarray([3], np.int32)), setup.rows, jnp.float32(2))
    program = setup.sampler().lower(*arguments).compile()
    return np.asarray(program(*arguments)[0]), program.cost_analysis()["flops"]


GOTTA = {"solver": {"name": "gotta_go_fast", "relative": 5.0}, "grid": {"name": "log_snr"}, "steps": 40}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "mesh", "labels"),
    [
        ({"solver": PARADIGMS}, {"data": 8}, [3]),
        ({"solver": PARADIGMS}, {"data": 2, "cfg": 2, "seq": 2}, [3]),
        ({"solver": {"name": "deq"}}, {"data": 2, "fsdp": 2}, [1, 2, 3]),
        ({"solver": {"name": "parataa", "window": 3}}, {"data": 4}, [1, 2, 3]),
        (GOTTA, {"data": 2, "cfg": 2}, [1, 2, 3]),
    ],
    ids=str,
)
def test_every_mesh_draws_what_one_device_draws(settings, mesh, labels):
    one, many = (run_of(**{"steps": 8, **settings}, **more).sample(labels) for more in ({}, {"mesh": mesh}))
    np.testing.assert_allclose(many.images, one.images, rtol=0, atol=2e-5)
    assert many.cost["images"] == len(labels) and one.cost.get("unfinished", 0) == 0


@pytest.mark.parametrize(
    ("window", "data", "shards", "chunk"), [(8, 8, 1, 3), (4, 8, 2, 4), (3, 8, 8, 8), (8, 4, 1, 3)], ids=str
)
def test_batches_and_windows_together_divide(window, data, shards, chunk):
    """Of three samples: what the batch is filled up to."""
    setup = run_of(solver={**PARADIGMS, "window": window}, mesh={"data": data}).setup
    assert setup.shards == shards and -(-3 // shards) * shards == chunk <= CHUNK
    x, keys, cond = setup.inputs(0, chunk, np.arange(3))
    assert len(x) == len(keys) == len(cond) == chunk
    parts = {shard.data.shape[0] for shard in x.addressable_shards}
    assert parts == {chunk // data if chunk % data == 0 else chunk}


# ---------------------------------------------------------------- what is reported, and commands


def test_a_run_says_what_was_made_and_what_is_not_finished():
    settings = {"process": {"name": "vp_linear"}, "prediction": "eps", "solver": {"name": "gotta_go_fast"}}
    run = run_of(**settings)
    with pytest.warns(DifaxWarning, match=r"solver gotta_go_fast: 100 % of the samples are not finished after 8 eval"):
        cost = run.sample([1, 2]).cost
    assert (cost["evaluations"], cost["most_evaluations"], cost["unfinished"]) == (8.0, 8, 1.0)
    run = run_of(solver={"name": "parataa"})
    cost = run.sample([1, 2]).cost
    assert "unfinished" not in cost and cost["most_evaluations"] == 64
    assert cost["evaluations"] == 8 * cost["batches"] <= 64 and cost["computed_fraction"] == 1
    assert cost["network_evaluations"] % 16 == 0  # both halves of eight rows, for the slower of two samples
    one = model_cost(run.setup.model, run.prepared, run.setup.attention).evaluation / 1e9
    assert cost["gflops_per_image"] == pytest.approx(one * cost["network_evaluations"], abs=1e-3)


@pytest.mark.parametrize("solver", some(["paradigms", "gotta_go_fast"], "paradigms"))
@pytest.mark.parametrize(
    "command",
    [["profile"], ["plan", "--target", "cpu:8"], ["calibrate", "--cache", "magcache", "--out", "x.json"]],
    ids=lambda command: command[0],
)
def test_commands_that_count_rows_refuse_by_name(command, solver, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    more = ["--config", "fmnist_smoke", "--solver", solver, "--grid", "log_snr", "--weights", "random"]
    if command[0] == "plan":
        more = more[:-2]
    assert main([*command, *more]) == 2
    err = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"difax {command[0]} counts the evaluations before the run, and solver {solver} makes" in err
    assert err.endswith("allowed: a solver such as ddim")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("solver", "more"),
    [("paradigms", [("solver.window", 3)]), ("gotta_go_fast", [("grid.name", "log_snr"), ("solver.relative", 5.0)])],
)
def test_a_trace_counts_what_its_program_executes(solver, more, monkeypatch):
    """Op by op, every loop run, as tests/test_executed.py does for the other solvers."""
    size = [("model.depth", 2), ("model.width", 16), ("model.heads", 2), ("steps", 7)]
    run = build_setup(override(load_config("fmnist_smoke"), [*size, ("solver.name", solver), *more]))
    params = run.prepare(randomise(jax.eval_shape(run.model.init, jax.random.key(0))))
    keys, cond = noise.sample_keys(0, 2), jnp.asarray([3, 0], jnp.int32)
    x, rows = initial_noise(run.process, keys, run.model.input_shape), jax.tree.map(jnp.asarray, run.rows)
    with jax.disable_jit(), monkeypatch.context() as patch:
        products = Products(patch)
        _, trace = run.sampler()(params, x, keys, cond, rows, jnp.float32(2.0))
    trace = jax.tree.map(np.asarray, trace)
    claimed = 2 * run_cost(model_cost(run.model, params, run.attention), trace)
    assert claimed == pytest.approx(products.operations, rel=1e-6)


@pytest.mark.slow
def test_the_experiment_has_rows_and_tables():
    rows = [parallel_time.counted(method, 6, 0.0, 2, "fmnist_smoke") for method in list(parallel_time.METHODS)[:4:3]]
    rows += parallel_time.timed(4, 1, "fmnist_smoke")
    assert all(1 < row["batches"] <= row["steps"] for row in rows)
    assert len([line for line in parallel_time.table(rows).splitlines() if "| 6" not in line]) > 10


@pytest.mark.slow
def test_a_sweep_measures_them(tmp_path, capsys):
    command = [
        "pareto",
        "--config",
        "fmnist_smoke",
        "--weights",
        "random",
        "--no-judge",
        "--seeds",
        "4",
        "--batch",
        "2",
    ]
    methods = ["paradigms", "solver.name=deq,steps=6", "solver.name=gotta_go_fast,grid.name=log_snr,steps=8"]
    assert main([*command, "--turns", "1", "--out", str(tmp_path / "p"), "--methods", *methods]) == 0
    said = capsys.readouterr()
    assert "gotta_go_fast: 100 % of the samples are not finished after 8 evaluations" in said.err
    rows = [json.loads(line) for line in (tmp_path / "p" / "rows.jsonl").read_text().splitlines()]
    made = {row["method"]: row["evaluations"] for row in rows if "evaluations" in row}
    assert made[methods[2]] == 8 and 6 <= made[methods[1]] <= 36 and made["paradigms"] > 10


# ---------------------------------------------------------------- caches

ACTIVE = [case for case in CACHED if case.on]
STEPS = len(ACTIVE[0].computed)
CACHE_NAMES = [case.name for case in ACTIVE]
BY_TIME = ("pab", "skipcache", "tokencache")  # what they compute depends on times too
# those that decide in the run alone
DECIDE = {"teacache", "fbcache", "dbcache", "dbprune", "adacache", "lazydit"}


def heun_rows(accelerator, model):
    """Three steps of two evaluations each."""
    times = np.array([0.9, 0.6, 0.3, 0.1])
    return make_rows(SOLVERS["heun"](), GUIDES["cfg"](), PROCESSES["vp_linear"](), times, accelerator, model.stages)


def test_every_cache_is_here():
    assert sorted(CACHE_NAMES) == sorted(CACHES)


@pytest.mark.parametrize("case", ACTIVE, ids=lambda case: case.name)
def test_evaluations_are_the_clock_of_every_plan(case):
    """A plan is the same whatever steps the evaluations belong to."""
    model, accelerator = case.toy()[0], case.make("on")
    rows = heun_rows(accelerator, model)
    assert len(rows.i) == STEPS and rows.step.tolist() == [0, 0, 1, 1, 2, 2]
    single = rows._replace(step=np.arange(STEPS, dtype=np.int32), plan=())
    one, other = rows.plan, rounded(accelerator.plan(single, model.stages))
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", some(CACHE_NAMES, "dbcache", "tgate"))
def test_a_cache_acts_under_two_evaluations_a_step(name):
    """What it computes under Heun's method is what it computes under DDIM (tests/test_caches), by evaluations."""
    case = ACTIVE[CACHE_NAMES.index(name)]
    model, params = case.toy()
    accelerator, process, keys = case.make("on"), PROCESSES["vp_linear"](), noise.sample_keys(0, 2)
    sampler = make_sampler(model, process, "eps", SOLVERS["heun"](), GUIDES["cfg"](), accelerator)
    x, cond = initial_noise(process, keys, model.input_shape), jnp.asarray([3, 0], jnp.int32)
    params = with_learned(params, accelerator)
    samples, trace = sampler(params, x, keys, cond, heun_rows(accelerator, model), 1.5)
    assert np.isfinite(samples).all() and np.all(trace.live == 1)
    computed = np.concatenate([np.asarray(a).sum(-1) for a in trace.computed.values()], 1).mean((1, 2)) / 2
    if case.name not in BY_TIME:
        np.testing.assert_allclose(trace.halves, case.halves)
        np.testing.assert_allclose(computed, case.computed, atol=1e-5)
    assert computed.min() < 1


@pytest.mark.parametrize("name", ["gotta_go_fast", "paradigms"])
@pytest.mark.parametrize("case", ACTIVE, ids=lambda case: case.name)
def test_a_cache_is_refused_by_name_where_it_cannot_act(case, name):
    model, accelerator, process = case.toy()[0], case.make("on"), PROCESSES["vp_linear"]()
    lay = lambda: make_rows(  # noqa: E731
        SOLVERS[name](), GUIDES["cfg"](), process, np.linspace(1, 0, STEPS + 1), accelerator, model.stages
    )
    if name == "gotta_go_fast" and case.name in DECIDE:
        assert lay().plan.owner == accelerator.name
        return
    with pytest.raises(ValueError, match=f"cache {case.name} .*; allowed: "):
        lay()


@pytest.mark.parametrize("name", some(sorted(DECIDE), "fbcache"))
def test_a_cache_that_decides_acts_while_the_solver_does(name):
    """Switched off it changes nothing; switched on it computes less, evaluation by evaluation."""
    case = ACTIVE[CACHE_NAMES.index(name)]
    model, params = tiny_dit()
    process, keys, solver = PROCESSES["vp_linear"](), noise.sample_keys(0, 2), SOLVERS["gotta_go_fast"](relative=10.0)

    def drawn(accelerator):
        rows = make_rows(solver, GUIDES["cfg"](), process, np.linspace(1, 0, 21), accelerator, model.stages)
        x = initial_noise(process, keys, model.input_shape)
        sampler = make_sampler(model, process, "eps", solver, GUIDES["cfg"](), accelerator)
        return sampler(with_learned(params, accelerator), x, keys, jnp.asarray([3, 0], jnp.int32), rows, 1.5)

    plain, _ = drawn(neutral())
    if name != "lazydit":  # which has no threshold that computes everything
        same, off = drawn(case.make("off"))
        np.testing.assert_allclose(same, plain, rtol=0, atol=1e-4 * np.abs(plain).max())
        assert set(strip(off)) == {"F"}
    samples, trace = drawn(case.make("on"))
    assert np.isfinite(samples).all() and set(strip(trace)) > {"F"}
    assert len(strip(trace)) == int((trace.live > 0).sum())


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("solver", "arguments", "message"),
    [
        ("gotta_go_fast", {"relative": 0.0}, "relative=0.0; allowed: above 0"),
        ("gotta_go_fast", {"absolute": -1.0}, "absolute=-1.0; allowed: above 0"),
        ("gotta_go_fast", {"first": 2.0}, "first=2.0; allowed: above 0, at most 1"),
        ("gotta_go_fast", {"safety": 0.0}, "safety=0.0; allowed: above 0, at most 1"),
        ("gotta_go_fast", {"stop": 0.0}, "stop=0.0; allowed: 1e-6 or more, below 1"),
        ("gotta_go_fast", {"exponent": 0.1}, r"exponent=0.1; allowed: 0.5 \.\.\. 1"),
        ("paradigms", {"tolerance": -0.1}, "paradigms: tolerance=-0.1; allowed: 0 or more"),
        ("paradigms", {"window": 0}, "paradigms: window=0; allowed: 1 or more, or None"),
        ("paradigms", {"eta": 1.5}, r"eta=1.5; allowed: 0 \.\.\. 1"),
        ("parataa", {"window": 4, "order": 5}, r"parataa: order=5; allowed: 1 \.\.\. window=4"),
        ("parataa", {"order": 0}, r"parataa: order=0; allowed: 1"),
        ("parataa", {"memory": 0}, r"parataa: memory=0; allowed: 1 \.\.\. 10"),
        ("parataa", {"ridge": 0.0}, "parataa: ridge=0.0; allowed: above 0"),
        ("parataa", {"eta": -1.0}, "eta=-1.0"),
        ("deq", {"memory": 11}, r"deq: memory=11; allowed: 1 \.\.\. 10"),
        ("deq", {"ridge": -1.0}, "deq: ridge=-1.0; allowed: above 0"),
        ("deq", {"tolerance": -1.0}, "deq: tolerance=-1.0"),
    ],
)
def test_bad_arguments_are_refused(solver, arguments, message):
    with pytest.raises(ValueError, match=message):
        SOLVERS[solver](**arguments)


@pytest.mark.parametrize("name", [*WINDOWS, "gotta_go_fast"])
def test_bad_times_are_refused(name):
    with pytest.raises(ValueError, match="must decrease strictly"):
        SOLVERS[name]().grid(PROCESSES["vp_linear"](), np.array([0.2, 0.5, 0.0]))


def test_times_that_begin_at_the_end_are_refused():
    with pytest.raises(ValueError, match=r"begin at 0.001; allowed: above stop=0.001"):
        SOLVERS["gotta_go_fast"]().grid(PROCESSES["vp_linear"](), np.array([0.001, 0.0]))
