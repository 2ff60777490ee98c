"""Time grids: decreasing times [n + 1] in float64 from noise (t = t_max) to data (t = 0), n model evaluations apart.

Every grid is a factory of hyperparameters that returns `grid(process, n) -> times`. The last entry is where the run
ends, t = 0, the clean sample, unless a grid is asked for another; the network is never evaluated there. A grid whose
network is told other times than `Process.model_time` (rounded to whole steps) returns `Times(times, told)`: `lay_times`
gives the times with the process that tells so, and `make_times` the times alone.
"""

from difax.core.grids.diffusers import diffusers, diffusers_flow, flow_match, ipndm, lcm
from difax.core.grids.dm_nonuniform import dm_nonuniform
from difax.core.grids.fastdpm import fastdpm
from difax.core.grids.given import given, measured
from difax.core.grids.levels import beta, exponential, karras, log_snr_uniform
from difax.core.grids.plain import leading, linspace, logit, quadratic, shift_time, shifted, trailing, uniform
from difax.core.grids.times import MOST_STEPS, Grid, Times, check_times, lay_rows, lay_times, make_times

__all__ = [
    "MOST_STEPS",
    "GRIDS", "Grid", "Times", "check_times", "karras", "lay_rows", "lay_times", "leading", "log_snr_uniform",
    "make_times", "quadratic", "shift_time", "shifted", "trailing", "uniform",
]  # fmt: skip

GRIDS = {
    "uniform": uniform,
    "linspace": linspace,
    "leading": leading,
    "trailing": trailing,
    "quadratic": quadratic,
    "log_snr": log_snr_uniform,
    "exponential": exponential,
    "karras": karras,
    "beta": beta,
    "shifted": shifted,
    "logit": logit,
    "dm_nonuniform": dm_nonuniform,
    "given": given,
    "measured": measured,
    "fastdpm": fastdpm,
    "lcm": lcm,
    "ipndm": ipndm,
    "flow_match": flow_match,
    "diffusers": diffusers,
    "diffusers_flow": diffusers_flow,
}
