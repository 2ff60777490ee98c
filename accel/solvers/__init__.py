"""Solvers of the reverse process: one file each, one row of the scanned table per model evaluation."""

from difax.accel.solvers.ddim import ddim, euler_ancestral
from difax.accel.solvers.ddpm import ddpm
from difax.accel.solvers.dpmpp_2m import dpmpp_2m
from difax.accel.solvers.edm import edm
from difax.accel.solvers.euler import euler, flow_ab
from difax.accel.solvers.heun import heun
from difax.accel.solvers.kdpm2 import kdpm2
from difax.accel.solvers.mcg import mcg
from difax.accel.solvers.pc import pc
from difax.accel.solvers.restart import restart
from difax.accel.solvers.sampler_scheduler import sampler_scheduler

# solvers that are made of others
NESTING = {"sampler_scheduler": sampler_scheduler, "mcg": mcg}

SOLVERS = {
    "ddpm": ddpm,
    "ddim": ddim,
    "euler": euler,
    "heun": heun,
    "dpmpp_2m": dpmpp_2m,
    "euler_ancestral": euler_ancestral,
    "kdpm2": kdpm2,
    "edm": edm,
    "restart": restart,
    "pc": pc,
    "flow_ab": flow_ab,
    **NESTING,
}
