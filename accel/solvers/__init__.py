"""Solvers of the reverse process: one file each, one row of the scanned table per model evaluation."""

from difax.accel.solvers.bns import bns
from difax.accel.solvers.ddim import ddim
from difax.accel.solvers.ddpm import ddpm
from difax.accel.solvers.ddss import ddss
from difax.accel.solvers.dpmpp_2m import dpmpp_2m
from difax.accel.solvers.euler import euler
from difax.accel.solvers.heun import heun
from difax.accel.solvers.iia import iia
from difax.accel.solvers.ltsl import ltsl

SOLVERS = {
    "ddpm": ddpm,
    "ddim": ddim,
    "euler": euler,
    "heun": heun,
    "dpmpp_2m": dpmpp_2m,
    "bns": bns,
    "ddss": ddss,
    "ltsl": ltsl,
    "iia": iia,
}
