"""Solvers of the reverse process: one file each, one row of the scanned table per model evaluation."""

from difax.accel.solvers.bns import bns
from difax.accel.solvers.cld import cld_em, sscs
from difax.accel.solvers.dc_solver import dc_solver
from difax.accel.solvers.ddim import ddim, euler_ancestral
from difax.accel.solvers.ddpm import ddpm
from difax.accel.solvers.ddss import ddss
from difax.accel.solvers.deis import deis
from difax.accel.solvers.deq import deq
from difax.accel.solvers.dpm_solver import dpm_solver_2m, dpm_solver_2s, dpm_solver_3m, dpm_solver_3s
from difax.accel.solvers.dpm_solver_adaptive import dpm_solver_12, dpm_solver_23
from difax.accel.solvers.dpm_solver_v3 import dpm_solver_v3
from difax.accel.solvers.dpmpp_2m import dpmpp_2m, dpmpp_3m
from difax.accel.solvers.dpmpp_sde import dpmpp_2m_sde, dpmpp_3m_sde, dpmpp_sde
from difax.accel.solvers.dpmpp_singlestep import dpmpp_2s, dpmpp_3s
from difax.accel.solvers.edm import edm
from difax.accel.solvers.euler import euler, flow_ab
from difax.accel.solvers.gddim import gddim
from difax.accel.solvers.genie import genie
from difax.accel.solvers.gotta_go_fast import gotta_go_fast
from difax.accel.solvers.heun import heun
from difax.accel.solvers.iia import iia
from difax.accel.solvers.kdpm2 import kdpm2
from difax.accel.solvers.lms import lms
from difax.accel.solvers.ltsl import ltsl
from difax.accel.solvers.mcg import mcg
from difax.accel.solvers.paradigms import paradigms
from difax.accel.solvers.parataa import parataa
from difax.accel.solvers.pc import pc
from difax.accel.solvers.pfdiff import pfdiff
from difax.accel.solvers.pndm import ipndm, pndm
from difax.accel.solvers.restart import restart
from difax.accel.solvers.sa_solver import sa_solver
from difax.accel.solvers.sampler_scheduler import sampler_scheduler
from difax.accel.solvers.scire import scire_2, scire_3
from difax.accel.solvers.seeds import seeds_1, seeds_2, seeds_3
from difax.accel.solvers.unipc import unipc
from difax.accel.solvers.usf import usf

# solvers that are made of others
NESTING = {"sampler_scheduler": sampler_scheduler, "mcg": mcg}

SOLVERS = {
    "ddpm": ddpm,
    "ddim": ddim,
    "euler": euler,
    "heun": heun,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_3m": dpmpp_3m,
    "dpmpp_2s": dpmpp_2s,
    "dpmpp_3s": dpmpp_3s,
    "dpmpp_sde": dpmpp_sde,
    "dpmpp_2m_sde": dpmpp_2m_sde,
    "dpmpp_3m_sde": dpmpp_3m_sde,
    "dpm_solver_2m": dpm_solver_2m,
    "dpm_solver_3m": dpm_solver_3m,
    "dpm_solver_2s": dpm_solver_2s,
    "dpm_solver_3s": dpm_solver_3s,
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
    "dpm_solver_12": dpm_solver_12,
    "dpm_solver_23": dpm_solver_23,
    "scire_2": scire_2,
    "scire_3": scire_3,
    "seeds_1": seeds_1,
    "seeds_2": seeds_2,
    "seeds_3": seeds_3,
    "pfdiff": pfdiff,
    "dpm_solver_v3": dpm_solver_v3,
    "euler_ancestral": euler_ancestral,
    "kdpm2": kdpm2,
    "edm": edm,
    "restart": restart,
    "pc": pc,
    "flow_ab": flow_ab,
    **NESTING,
    "gotta_go_fast": gotta_go_fast,
    "paradigms": paradigms,
    "parataa": parataa,
    "deq": deq,
    "gddim": gddim,
    "genie": genie,
    "sscs": sscs,
    "cld_em": cld_em,
}
