"""What is made before a run: tables for caches to plan from, their learned parameters, and plans for a budget; grids
and solvers that are fitted to a model."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from difax.accel.fit import by_label, dpm_v3, evolution, fastcache, genie, icc, iia, learned, schedules, tables, usf
from difax.accel.fit.record import record, record_inputs
from difax.core.contracts import Accelerator


class Calibration(NamedTuple):
    """recorder(evaluations) -> the accelerator of the runs to measure; table(traces) -> the keys of the file."""

    recorder: Callable[[int], Accelerator]
    table: Callable[..., dict[str, Any]]


CALIBRATIONS = {
    "smoothcache": Calibration(lambda evaluations: record(min(3, evaluations - 1)), tables.smoothcache),
    "block_caching": Calibration(lambda evaluations: record(1), tables.block_caching),
    "bacache": Calibration(lambda evaluations: record(evaluations - 1), tables.bacache),
    "magcache": Calibration(lambda evaluations: record(1, branches=False), tables.magcache),
    "teacache": Calibration(lambda evaluations: record(1, branches=False), tables.teacache),
    "icc": Calibration(lambda evaluations: record(1, dense=True), tables.icc),
}


class Fit(NamedTuple):
    """recorder(evaluations) -> the accelerator of the runs to measure; arrays(model, params, runs, rank) -> what the
    technique's .npz file holds, {stage: {name: array}}: `runs` yields (rows, conditions, trace) of each batch."""

    recorder: Callable[[int], Accelerator]
    arrays: Callable[..., dict[str, dict[str, Any]]]


FITS = {
    "icc": Fit(
        CALIBRATIONS["icc"].recorder,
        lambda model, params, runs, rank: icc.icc_factors(
            params, model.stages, rank, **tables.icc([trace for _, _, trace in runs])
        ),
    ),
    "fastcache": Fit(
        lambda evaluations: record_inputs(),
        lambda model, params, runs, rank: fastcache.fit(model, params, fastcache.of_runs(model, runs)),
    ),
}


class Made(NamedTuple):
    """How `difax calibrate --grid NAME` or `--solver NAME` makes what a grid or a solver reads.

    fit(sampler, samples, batch, progress, **settings) -> what the file holds: of a .json file an object whose values
        JSON has, of an .npz file {name: array}. What every file says of itself (technique, model, solver, grid, steps,
        guidance, `difax.study.calibrate.about`) is added to it, but for keys that the fit gives itself: a grid gives
        "times" and "process".
        sampler: `difax.study.calibrate.Sampler`, of the run that the configuration describes, without its cache.
        samples: to measure on. batch: of them at a time. progress: is told a line.
        settings: `--fit KEY=VALUE`; keyword arguments with annotations and defaults, which are held against them. What
        is out of range the fit refuses with a ValueError, before it runs the model.
    suffix: of the file, .json or .npz (a solver reads its comment through `difax.accel.caches.measured.record`).
    """

    fit: Callable[..., Mapping[str, Any]]
    suffix: str = ".json"


GRID_FITS: dict[str, Made] = {
    "gits": Made(schedules.gits),
    "align_your_steps": Made(schedules.align_your_steps),
    "watson": Made(schedules.watson),
    "autodiffusion": Made(evolution.autodiffusion),
}

SOLVER_FITS: dict[str, Made] = {
    "bns": Made(learned.fit_bns),
    "ddss": Made(learned.fit_ddss),
    "ltsl": Made(learned.fit_ltsl),
    "iia": Made(iia.fit_iia),
    "dc_solver": Made(learned.fit_dc),
    "genie": Made(genie.fit, ".npz"),
    "dpm_solver_v3": Made(dpm_v3.fit_statistics, ".npz"),
    "usf": Made(usf.fit_usf),
    "stepsaver": Made(by_label.fit_stepsaver),
    "adadiff": Made(by_label.fit_adadiff),
}
