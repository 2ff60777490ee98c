"""What is made before a run: tables for caches to plan from, their learned parameters, and plans for a budget."""

from collections.abc import Callable
from typing import Any, NamedTuple

from difax.accel.fit import fastcache, icc, tables
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
