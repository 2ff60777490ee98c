"""Solvers of the reverse process: one file each, one row of the scanned table per model evaluation."""

from difax.accel.solvers.ddim import ddim
from difax.accel.solvers.ddpm import ddpm
from difax.accel.solvers.deq import deq
from difax.accel.solvers.dpmpp_2m import dpmpp_2m
from difax.accel.solvers.euler import euler
from difax.accel.solvers.gotta_go_fast import gotta_go_fast
from difax.accel.solvers.heun import heun
from difax.accel.solvers.paradigms import paradigms
from difax.accel.solvers.parataa import parataa

SOLVERS = {
    "ddpm": ddpm,
    "ddim": ddim,
    "euler": euler,
    "heun": heun,
    "dpmpp_2m": dpmpp_2m,
    "gotta_go_fast": gotta_go_fast,
    "paradigms": paradigms,
    "parataa": parataa,
    "deq": deq,
}
