"""Scheduler files of diffusers: what becomes of each, and its trajectory against diffusers' own, step by step."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import difax
from difax.accel.solvers import linear as engine
from difax.accel.solvers.linear import LinearTable
from difax.cli import main
from difax.config import scheduled
from difax.core import process as P
from difax.core.contracts import Level, Row, Solver
from difax.core.grids import lay_times
from difax.registry import make
from difax.weights.scheduler import FILE, MAPPINGS, read_scheduler, scheduler_sections
from difax.weights.scheduler.keys import CLASSES, INERT, REFUSED
from tests.families import some
from tests.golden.schedulers_cases import CALL, CASES, MU, PIPELINE
from tests.oracles.schedulers import network

GOLDEN = Path(__file__).with_name("golden") / "schedulers.npz"
PIPELINES = Path(__file__).parents[2] / "shared" / "pipelines"
ETA = {"DDIMScheduler": "eta", "TCDScheduler": "gamma"}  # what a pipeline's eta is here
TOLERANCE = 1e-5  # of the largest value of each state
# where diffusers departs from its method, and how far its samples are then from ours (`scheduler_sections` says why)
DEPARTS = {"dpmpp_3m_sde": 0.2, "unclip": 1e-3, "unclip_learned": 1e-3, "euler_zero_snr": 2e-5}


class Laid(NamedTuple):
    """A case with what becomes of it."""

    cls: str
    config: dict[str, Any]
    sections: dict[str, Any]
    process: P.Process
    solver: Solver
    rows: Row


def lay(name: str) -> Laid:
    """What a case becomes; eta is set as a pipeline would hand it to `step`."""
    cls, config, n = CASES[name]
    mu = MU if "use_dynamic_shifting" in config else None
    sigmas = "pipeline" if name in PIPELINE else None
    found = scheduler_sections({"_class_name": cls, **config}, steps=n, mu=mu, sigmas=sigmas)
    for value in CALL.get(name, {}).values():
        found["solver"][ETA[cls]] = value
    found = json.loads(json.dumps(found))  # it is plain data
    solver = make("solver", found["solver"])
    process, times = lay_times(make("grid", found["grid"]), make("process", found["process"]), n)
    return Laid(cls, config, found, process, solver, solver.grid(process, times))


def stepped(laid: Laid, first: np.ndarray, noise: np.ndarray | None) -> np.ndarray:
    """The path by the solver's own step, in float32, with the given noise as its keys."""
    x, path = jnp.asarray(first), [jnp.asarray(first)]
    state = laid.solver.init(x)
    for e in range(len(laid.rows.t)):
        row = jax.tree.map(lambda a, e=e: np.asarray(a[e]), laid.rows)
        output = network(laid.cls, laid.config, np.asarray(x, np.float64), float(row.model_time))
        level = Level(*(np.float32(a) for a in row.level))
        learned = output.shape[-1] > x.shape[-1]
        prediction = P.predict(jnp.asarray(output, jnp.float32), laid.sections["prediction"], learned, x, level)
        x, state = laid.solver.step(prediction, x, state, row, None if noise is None else jnp.asarray(noise[e]))
        path.append(x)
    return np.stack(path)


def replayed(laid: Laid, first: np.ndarray, noise: np.ndarray | None) -> np.ndarray:
    """The path by the solver's table alone, in numpy and float64: what the engine is to make of it."""
    table = laid.rows.coefficients.weights  # [E, outputs, inputs]
    x = first.astype(np.float64)
    slots, path = [np.zeros_like(x)] * (table.shape[1] - 1), [x]
    for e in range(len(laid.rows.t)):
        level = Level(*(a[e] for a in laid.rows.level))
        output = network(laid.cls, laid.config, x, float(laid.rows.model_time[e]))
        x0, eps = P.convert(output, laid.sections["prediction"], x, level)
        clipped = bounded(laid.sections["solver"], x0)
        if clipped is not None:
            x0 = clipped
            if laid.sections["solver"]["name"] != "ddim":
                eps = (x - level.alpha * x0) / level.sigma
        known = [x, x0, eps, *slots]
        known += [np.zeros_like(x) if noise is None else noise[e]] * (table.shape[2] - len(known))
        x, *slots = np.einsum("oi,ibd->obd", table[e], np.stack(known))
        path.append(x)
    return np.stack(path)


def bounded(solver: dict[str, Any], x0: np.ndarray) -> np.ndarray | None:
    """Clipping, and dynamic thresholding (Saharia et al. 2022, section 2.3)."""
    if "clip" in solver:
        return np.clip(x0, -solver["clip"], solver["clip"])
    if "thresholding" not in solver:
        return None
    s = np.quantile(np.abs(x0), solver["thresholding"], axis=1, keepdims=True)
    s = np.clip(s, 1.0, solver["sample_max_value"])
    return np.clip(x0, -s, s) / s


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    """{case: its arrays}, and {"defaults": {class: {key: default}}}"""
    found: dict[str, Any] = {name: {} for name in CASES}
    with np.load(GOLDEN) as file:
        for key in file.files:
            name, _, array = key.rpartition(".")
            if name:
                found[name][array] = file[key]
        found["defaults"] = json.loads(str(file["defaults"]))
    return found


@pytest.fixture
def given_noise(monkeypatch):
    """Makes the stochastic solvers take their keys for the noise itself."""
    monkeypatch.setattr(engine, "draw", lambda keys, x, k: keys)
    monkeypatch.setattr(sys.modules["difax.accel.solvers.ddpm"], "normal_like", lambda keys, x: keys)


def check(name: str, path: np.ndarray, laid: Laid, wanted: dict[str, np.ndarray]) -> None:
    """A path, what the network is told along it and the first noise against diffusers', as one line of a table."""
    evaluations = len(laid.rows.t)
    known = np.concatenate([wanted["path"][:evaluations], wanted["path"][-1:]])
    # an evaluation whose step changes nothing is left out
    np.testing.assert_allclose(wanted["path"][evaluations:] - known[-1], 0.0, atol=1e-6)
    error = (np.abs(path - known).max((1, 2)) / np.abs(known).max((1, 2))).max()
    told = np.abs(laid.rows.model_time - wanted["told"][:evaluations]).max() / np.abs(wanted["told"]).max()
    section = laid.sections
    print(f"{name:26} {laid.cls:36} {section['solver']['name']:14} {section['grid']['name']:14} {error:.0e}")
    assert told < 1e-6
    np.testing.assert_allclose(laid.process.prior_std, wanted["prior"], rtol=1e-6)
    if name in DEPARTS:
        assert TOLERANCE < error < DEPARTS[name]
    else:
        assert error < TOLERANCE


@pytest.mark.parametrize("name", CASES)
def test_table_gives_the_trajectory_of_diffusers(name, golden, given_noise):
    laid = lay(name)
    first, noise = golden[name]["path"][0], golden[name].get("noise")
    by = replayed if isinstance(laid.rows.coefficients, LinearTable) else stepped
    check(name, by(laid, first, noise), laid, golden[name])


@pytest.mark.parametrize(
    "name", some(CASES, "ddim_eta_clip", "unipc_wan", "dpm_sde_karras", "sa_threshold", "euler_svd")
)
def test_steps_in_single_precision_are_the_tables(name, golden, given_noise):
    laid = lay(name)
    first, noise = golden[name]["path"][0], golden[name].get("noise")
    path = stepped(laid, first, noise)
    assert path.dtype == np.float32
    if isinstance(laid.rows.coefficients, LinearTable):  # of the table; diffusers' own rounding is in the other test
        exact = replayed(laid, first, noise)
        assert (np.abs(path - exact).max((1, 2)) / np.abs(exact).max((1, 2))).max() < TOLERANCE
    else:
        check(name, path, laid, golden[name])


# ---------------------------------------------------------------- the classes and their keys


def test_every_class_is_taken_or_refused_with_a_reason(golden):
    told = golden["defaults"]
    assert not CLASSES.keys() & REFUSED.keys()
    assert CLASSES.keys() == MAPPINGS.keys() == {cls for cls, _, _ in CASES.values()}
    assert told.keys() <= CLASSES.keys() | REFUSED.keys()


@pytest.mark.parametrize("cls", CLASSES)
def test_keys_and_defaults_are_those_of_diffusers(cls, golden):
    assert {k: list(v) if isinstance(v, tuple) else v for k, v in CLASSES[cls].items()} == golden["defaults"][cls]
    assert set(INERT.get(cls, ())) <= CLASSES[cls].keys()


def of(cls: str, steps: int = 8, **keys: Any) -> dict[str, Any]:
    return scheduler_sections({"_class_name": cls, **keys}, steps=steps)


DDIM, DPM, UNIPC, EULER = (
    "DDIMScheduler",
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
    "EulerDiscreteScheduler",
)
FLOW, PNDM, SA, EDM = "FlowMatchEulerDiscreteScheduler", "PNDMScheduler", "SASolverScheduler", "EDMEulerScheduler"


@pytest.mark.parametrize(
    ("cls", "keys", "message"),
    [
        ("DDIMSheduler", {}, "unknown scheduler class 'DDIMSheduler' .did you mean DDIMScheduler"),
        ("RePaintScheduler", {}, "RePaintScheduler is not taken: it needs an image and a mask"),
        (DDIM, {"clip_sampel": True}, "unknown key of scheduler DDIMScheduler 'clip_sampel' .did you mean clip_sample"),
        (DDIM, {"clip_sample": "yes"}, "clip_sample='yes'; allowed: true or false"),
        (DDIM, {"beta_start": "0.1"}, "beta_start='0.1'; allowed: a number"),
        (DDIM, {"beta_start": float("nan")}, "beta_start=nan; allowed: a number"),
        (DDIM, {"num_train_timesteps": 99.5}, "num_train_timesteps=99.5; allowed: a whole number"),
        (DDIM, {"trained_betas": [0.1, "x"]}, "trained_betas=.*allowed: a list of numbers"),
        (DDIM, {"beta_schedule": "exp"}, "beta_schedule='exp'; allowed: linear, scaled_linear, squaredcos_cap_v2"),
        (DDIM, {"prediction_type": "flow"}, "prediction_type='flow'; allowed: epsilon, sample, v_prediction"),
        (DDIM, {"timestep_spacing": "even"}, "timestep_spacing='even'; allowed: linspace, leading, trailing"),
        (DDIM, {"set_alpha_to_one": False}, "set_alpha_to_one=False; with steps_offset=0 its last step stays"),
        ("DDPMScheduler", {"variance_type": "learned"}, "variance_type='learned'; allowed: fixed_small"),
        (PNDM, {"prediction_type": "v_prediction"}, "prediction_type='v_prediction'; it mixes v"),
        (PNDM, {"set_alpha_to_one": True}, "skip_prk_steps=False; T // n = 125 is odd"),
        (DPM, {"algorithm_type": "sde-dpmsolver", "final_sigmas_type": "sigma_min"}, "algorithm_type='sde-dpmsolver'"),
        (DPM, {"algorithm_type": "dpmsolver"}, "final_sigmas_type='zero'; dpmsolver has no step to sigma = 0"),
        (
            DPM,
            {"use_karras_sigmas": True, "use_lu_lambdas": True},
            "use_karras_sigmas and use_lu_lambdas; allowed: one",
        ),
        (DPM, {"use_karras_sigmas": True, "final_sigmas_type": "sigma_min"}, "its last step goes nowhere"),
        (DPM, {"prediction_type": "flow_prediction"}, "flow_prediction is of use_flow_sigmas=true"),
        (
            DPM,
            {"use_flow_sigmas": True, "prediction_type": "v_prediction"},
            "prediction_type='v_prediction'; of a flow",
        ),
        (DPM, {"solver_order": 4}, "solver_order=4; allowed: 1, 2, 3"),
        ("DPMSolverSinglestepScheduler", {"algorithm_type": "sde-dpmsolver++"}, "of single steps; allowed: dpmsolver"),
        (UNIPC, {"solver_p": "another"}, "solver_p='another'; another scheduler as predictor"),
        (UNIPC, {"solver_type": "bh1"}, "final_sigmas_type='zero'; diffusers' own samples are no numbers"),
        (
            UNIPC,
            {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "use_dynamic_shifting": True},
            "gives mu",
        ),
        ("DEISMultistepScheduler", {"use_karras_sigmas": True}, "use_karras_sigmas=True; its sigmas end in the same"),
        (
            SA,
            {"algorithm_type": "noise_prediction"},
            "algorithm_type='noise_prediction'; difax has its data prediction",
        ),
        (EULER, {"final_sigmas_type": "sigma_min"}, "final_sigmas_type='sigma_min'; its sample would come out"),
        (EULER, {"interpolation_type": "log_linear"}, "interpolation_type='log_linear'; its network would be told"),
        (EULER, {"use_karras_sigmas": True, "sigma_max": 700.0}, "sigma_max=700.0; its betas have"),
        (EDM, {"final_sigmas_type": "sigma_min"}, "final_sigmas_type='sigma_min'; its last step would go nowhere"),
        (EDM, {"prediction_type": "sample"}, "prediction_type='sample'; allowed: epsilon, v_prediction"),
        (FLOW, {"use_dynamic_shifting": True}, "use_dynamic_shifting=True; needs the shape of the latents, or mu"),
        ("FlowMatchLCMScheduler", {"scale_factors": [1.0]}, "scale_factors="),
    ],
)
def test_refusals_name_the_key_its_value_and_what_is_allowed(cls, keys, message):
    with pytest.raises(ValueError, match=message) as error:
        of(cls, **keys)
    assert "\n" not in str(error.value)


JUNK = (None, True, 0, -1, 0.5, 1e9, -np.inf, np.nan, "x", "linear", "sigma_min", [], [0.1, 0.2], {})


@pytest.mark.parametrize("cls", CLASSES)
def test_whatever_a_file_says_is_taken_or_refused(cls):
    """Each key at values of all types: rows, or a refusal in one line."""
    for key in CLASSES[cls]:
        for value in JUNK:
            try:
                found = scheduler_sections({"_class_name": cls, key: value}, steps=4, shape=(16, 16, 4))
                process, times = lay_times(make("grid", found["grid"]), make("process", found["process"]), 4)
                rows = make("solver", found["solver"]).grid(process, times)
            except ValueError as refusal:
                assert "\n" not in str(refusal) and ("allowed" in str(refusal) or "need" in str(refusal))
            else:
                assert all(np.isfinite(a).all() for a in jax.tree.leaves((rows.t, rows.model_time, rows.coefficients)))


def test_keys_of_other_classes_are_passed_over_as_diffusers_does():
    """Stable Diffusion's file is of a PNDM and has a key of DDIM."""
    plain = of(PNDM, skip_prk_steps=True, steps_offset=1)
    more = {"clip_sample": False, "_diffusers_version": "0.6.0", "sample_max_value": 1.0}
    assert of(PNDM, skip_prk_steps=True, steps_offset=1, **more) == plain


def test_shift_follows_from_the_size_of_the_latents():
    keys = {"_class_name": FLOW, "use_dynamic_shifting": True}
    for shape, mu in (((32, 32, 16), 0.5), ((128, 128, 16), 1.15), ((4, 32, 32, 16), 1.15)):
        found = scheduler_sections(keys, steps=4, shape=shape)
        np.testing.assert_allclose(found["grid"]["mu"], mu, rtol=1e-12)
        np.testing.assert_allclose(found["process"]["shift"], np.exp(mu), rtol=1e-12)


# ---------------------------------------------------------------- files, and the user's own settings


def test_a_file_its_folder_and_a_pipeline_are_read(tmp_path):
    folder = tmp_path / "pipeline" / "scheduler"
    folder.mkdir(parents=True)
    said = {"_class_name": DPM, "lambda_min_clipped": -np.inf}
    (folder / FILE).write_text(json.dumps(said))
    for place in (folder / FILE, folder, tmp_path / "pipeline"):
        assert read_scheduler(place) == said
    (tmp_path / "list.json").write_text("[1]")
    for place, message in ((tmp_path / "none.json", "no such file"), (tmp_path / "list.json", "a JSON object of keys")):
        with pytest.raises(ValueError, match=message):
            read_scheduler(place)


def test_settings_of_the_user_win(tmp_path):
    config = {"model": {"name": "dit", "variant": "S/2"}, "steps": 10, "solver": {"name": "heun"}, "scale": 1.0}
    said = {"_class_name": DDIM, "clip_sample": False}
    own = [("solver.eta", 0.5), ("grid.name", "trailing"), ("scale", 3.0)]
    found = scheduled(config, said, own)
    assert found["solver"] == {"name": "ddim", "eta": 0.5}
    assert found["grid"] == {"name": "trailing"}
    assert found["process"]["name"] == "vp" and found["prediction"] == "eps" and found["steps"] == 10
    assert scheduled(config, said, [("solver.name", "heun")])["solver"] == {"name": "heun"}


SMOKE = ("fmnist_smoke:ddpm", {"_class_name": DDIM, "clip_sample": False, "timestep_spacing": "trailing"})


def test_load_takes_what_a_file_says():
    run = difax.load(SMOKE[0], weights="random", scheduler=SMOKE[1], steps=3, solver={"eta": 0.5})
    assert run.config["solver"] == {"name": "ddim", "equal_steps": True, "eta": 0.5}
    assert run.setup.process.name == "vp" and run.setup.rows.model_time.tolist() == [999, 666, 332]
    with pytest.raises(ValueError, match="scheduler=3"):
        difax.load(SMOKE[0], scheduler=3)


def test_sample_takes_a_file(tmp_path, capsys):
    (tmp_path / FILE).write_text(json.dumps(SMOKE[1]))
    small = ["--random-init", "--labels", "1", "--no-compile-cache", "--json", "--out", str(tmp_path / "x.npz")]
    asked = ["sample", "--config", SMOKE[0], "--steps", "2", "--scheduler", str(tmp_path), *small]
    assert main([*asked, "--config.solver.eta=1.0"]) == 0
    assert json.loads(capsys.readouterr().out)["solver"] == "ddim"
    with np.load(tmp_path / "x.npz") as file:
        config = json.loads(str(file["config"]))
    assert config["solver"] == {"name": "ddim", "eta": 1.0} and config["grid"]["timestep_spacing"] == "trailing"
    (tmp_path / FILE).write_text(json.dumps({**SMOKE[1], "clip_samples": 1}))
    assert main(asked) == 2
    told = capsys.readouterr().err
    assert "'clip_samples' (did you mean clip_sample?)" in told and told.count("\n") == 1


@pytest.mark.skipif(not PIPELINES.is_dir(), reason="the pipelines are not here")
@pytest.mark.parametrize("name", sorted(p.name for p in PIPELINES.glob("*/")) if PIPELINES.is_dir() else [])
def test_recorded_runs_of_pipelines_tell_the_same_times(name):
    """The scheduler files of whole pipelines, by the times that a recorded run told its network."""
    with np.load(PIPELINES / name / "run.npz") as file:
        told = file["timesteps"]
    config = read_scheduler(PIPELINES / name)
    n = len(told) - (config["_class_name"] == PNDM)  # whose second time is evaluated twice

    def times(mu: float | None, whose: str | None) -> np.ndarray:
        found = scheduler_sections(config, steps=n, shape=(16, 16, 4), mu=mu, sigmas=whose)
        process, t = lay_times(make("grid", found["grid"]), make("process", found["process"]), n)
        return make("solver", found["solver"]).grid(process, t).model_time

    if not config.get("use_dynamic_shifting"):
        both = [times(None, whose) for whose in ("scheduler", "pipeline")]
        assert min(np.abs(t - told).max() for t in both) < 1e-3
        return
    low, high = -3.0, 3.0  # mu is the pipeline's: by the second time, and the others must follow
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if times(middle, None)[1] < told[1] else (low, middle)
    np.testing.assert_allclose(times(low, None), told, rtol=1e-5)


def linear_mu(tokens: int, low: float, high: float, base: int, most: int) -> float:
    """The logarithm of a flow's shift, as pipelines give it to their scheduler."""
    return low + (high - low) * (tokens - base) / (most - base)


# what a pipeline of these gives its scheduler: mu of its packed tokens, and sigmas 1 ... 1/n
GIVEN: dict[str, dict[str, Any]] = {
    "FluxPipeline": {"mu": linear_mu(24, 0.5, 1.15, 256, 4096)},
    "QwenImagePipeline": {"mu": linear_mu(24, 0.5, 0.9, 256, 8192)},
    "LTXPipeline": {"mu": linear_mu(12, 0.95, 2.05, 1024, 4096)},
    "HunyuanVideoPipeline": {"sigmas": "pipeline"},
    "ZImagePipeline": {"sigmas": "pipeline"},
}


class Recorded:
    """A recorded run: arrays by name, whatever name they are stored under, and what its run.json says."""

    def __init__(self, arrays: Any, said: dict[str, Any]):
        self.arrays, self.said = arrays, said

    def __getitem__(self, name: str) -> np.ndarray:
        return self.arrays[self.said["same"].get(name, name)]

    def __contains__(self, name: str) -> bool:
        return self.said["same"].get(name, name) in self.arrays.files


@pytest.mark.skipif(not PIPELINES.is_dir(), reason="the pipelines are not here")
@pytest.mark.parametrize("name", sorted(p.name for p in PIPELINES.glob("*/")) if PIPELINES.is_dir() else [])
def test_recorded_steps_of_pipelines_are_repeated(name, given_noise):
    """The scheduler files of whole pipelines: sigmas, what the network is told, and every step of a recorded run."""
    with np.load(PIPELINES / name / "run.npz") as arrays:
        run = Recorded(arrays, json.loads((PIPELINES / name / "run.json").read_text()))
        config, told = read_scheduler(PIPELINES / name), run["timesteps"]
        n = len(told) - (config["_class_name"] == PNDM)  # whose second time is evaluated twice
        found = scheduler_sections(config, steps=n, **GIVEN.get(run.said["pipeline"], {}))
        process, times = lay_times(make("grid", found["grid"]), make("process", found["process"]), n)
        solver = make("solver", found["solver"])
        rows = solver.grid(process, times)
        np.testing.assert_allclose(rows.model_time, told, atol=2e-7 * np.abs(told).max())
        if "sigmas" in run:
            level, flow = rows.level, found["process"]["name"] == "flow"
            sigmas = level.sigma if flow else level.sigma / level.alpha
            np.testing.assert_allclose(sigmas, run["sigmas"][:-1], atol=1e-7 * run["sigmas"].max())
        # schedulers of k-diffusion hold x/alpha
        scale = np.hypot(1, run["sigmas"]) if config["_class_name"] == EULER else np.ones(len(told) + 1)
        state, errors = solver.init(jnp.asarray(run["step/0/sample"])), []
        for e in range(len(told)):
            row = jax.tree.map(lambda a, e=e: np.asarray(a[e]), rows)
            x = jnp.asarray(run[f"step/{e}/sample"] / scale[e], jnp.float32)
            level = Level(*(np.float32(a) for a in row.level))
            output = jnp.asarray(run[f"step/{e}/model_output"])
            prediction = P.predict(output, found["prediction"], False, x, level)
            noise = jnp.asarray(run[f"step/{e}/noise"]) if f"step/{e}/noise" in run else None
            x, state = solver.step(prediction, x, state, row, noise)
            wanted = run[f"step/{e}/prev"]
            errors.append(np.abs(np.asarray(x) * scale[e + 1] - wanted).max() / np.abs(wanted).max())
    print(f"{name:14} {config['_class_name']:34} {found['solver']['name']:10} " + " ".join(f"{e:.0e}" for e in errors))
    assert max(errors) < 5e-6
