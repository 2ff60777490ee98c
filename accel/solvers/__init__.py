"""Solvers of the reverse process: one file each, one row of the scanned table per model evaluation."""

from difax.accel.solvers.cld import cld_em, sscs
from difax.accel.solvers.ddim import ddim
from difax.accel.solvers.ddpm import ddpm
from difax.accel.solvers.dpmpp_2m import dpmpp_2m
from difax.accel.solvers.euler import euler
from difax.accel.solvers.gddim import gddim
from difax.accel.solvers.genie import genie
from difax.accel.solvers.heun import heun

SOLVERS = {
    "ddpm": ddpm,
    "ddim": ddim,
    "euler": euler,
    "heun": heun,
    "dpmpp_2m": dpmpp_2m,
    "gddim": gddim,
    "genie": genie,
    "sscs": sscs,
    "cld_em": cld_em,
}
