"""Solvers of the reverse process: one file each, one row of the scanned table per model evaluation."""

from difax.accel.solvers.bns import bns
from difax.accel.solvers.dc_solver import dc_solver
from difax.accel.solvers.ddim import ddim
from difax.accel.solvers.ddpm import ddpm
from difax.accel.solvers.ddss import ddss
from difax.accel.solvers.deis import deis
from difax.accel.solvers.dpm_solver_v3 import dpm_solver_v3
from difax.accel.solvers.dpmpp_2m import dpmpp_2m
from difax.accel.solvers.euler import euler
from difax.accel.solvers.heun import heun
from difax.accel.solvers.iia import iia
from difax.accel.solvers.lms import lms
from difax.accel.solvers.ltsl import ltsl
from difax.accel.solvers.pndm import ipndm, pndm
from difax.accel.solvers.sa_solver import sa_solver
from difax.accel.solvers.unipc import unipc
from difax.accel.solvers.usf import usf

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
    "usf": usf,
    "unipc": unipc,
    "dc_solver": dc_solver,
    "sa_solver": sa_solver,
    "deis": deis,
    "ipndm": ipndm,
    "pndm": pndm,
    "lms": lms,
    "dpm_solver_v3": dpm_solver_v3,
}
