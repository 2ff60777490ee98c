"""What is measured or searched before a run: tables for caches to plan from, and plans for a budget."""

from collections.abc import Callable
from typing import Any, NamedTuple

from difax.accel.fit import tables
from difax.accel.fit.record import record
from difax.contracts import Accelerator


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
