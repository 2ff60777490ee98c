"""Scheduler files of diffusers: what becomes of each, and its trajectory against diffusers' own, step by step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from difax.accel.solvers import ddpm
from difax.accel.solvers import linear as engine
from difax.core import process as P
from difax.core.grids import lay_times
from difax.core.guidance import GUIDES
from difax.core.sample import make_rows
from difax.registry import make
from difax.weights.scheduler import scheduler_sections
from tests.golden.schedulers_cases import CALL, CASES, MU
from tests.oracles.schedulers import network

GOLDEN = Path(__file__).with_name("golden") / "schedulers.npz"
ETA = {"DDIMScheduler": "eta", "TCDScheduler": "gamma"}  # what a pipeline's eta is here


def sections_of(name: str) -> dict[str, Any]:
    """The sections of a case, with what its pipeline adds."""
    cls, config, n = CASES[name]
    found = scheduler_sections(
        {"_class_name": cls, **config}, steps=n, mu=MU if "use_dynamic_shifting" in config else None
    )
    for value in CALL.get(name, {}).values():
        found["solver"][ETA[cls]] = value
    return found


def trajectory(name: str, golden: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray, float]:
    """(path, told, prior_std) of difax for the first noise and the draws of a golden case."""
    cls, config, n = CASES[name]
    found = json.loads(json.dumps(sections_of(name)))  # plain data
    process, solver = make("process", found["process"]), make("solver", found["solver"])
    process, times = lay_times(make("grid", found["grid"]), process, n)
    rows = make_rows(solver, GUIDES["none"](), process, times)
    noise = golden.get("noise", np.zeros((len(rows.t), *golden["path"].shape[1:]), np.float32))
    x = jnp.asarray(golden["path"][0])
    state, path = solver.init(x), [x]
    for e in range(len(rows.t)):
        row = jax.tree.map(lambda a, e=e: np.asarray(a[e]), rows)
        output = jnp.asarray(network(cls, config, np.asarray(x, np.float64), float(rows.model_time[e])), jnp.float32)
        learned = output.shape[-1] > x.shape[-1]
        level = P.Level(*(np.float32(a) for a in row.level))
        prediction = P.predict(output, found["prediction"], learned, x, level)
        x, state = solver.step(prediction, x, state, row, jnp.asarray(noise[e]))
        path.append(x)
    return np.stack(path), np.asarray(rows.model_time), process.prior_std


@pytest.fixture(scope="module")
def golden() -> dict[str, dict[str, np.ndarray]]:
    """{case: its arrays}"""
    found: dict[str, dict[str, np.ndarray]] = {name: {} for name in CASES}
    with np.load(GOLDEN) as file:
        for key in file.files:
            name, _, array = key.rpartition(".")
            found[name][array] = file[key]
    return found


@pytest.fixture
def given_noise(monkeypatch):
    """Makes the stochastic solvers take their keys for the noise itself."""
    monkeypatch.setattr(engine, "draw", lambda keys, x, k: keys)
    monkeypatch.setattr(ddpm, "normal_like", lambda keys, x: keys)
