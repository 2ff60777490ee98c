"""A scheduler file of diffusers (scheduler_config.json) as the sections process, prediction, solver and grid.

Plain data alone is made here; the registry makes objects of it. Every key of the classes in `keys.CLASSES` is
read or known to change nothing; others are refused by name, and so are values that difax has no equal for.

References: https://github.com/huggingface/diffusers, 0.42.1, `__init__`, `set_timesteps` and `step` of each class.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from difax.core.annotations import brief
from difax.weights.scheduler import common, discrete, flows, levels, multistep
from difax.weights.scheduler.case import FILE, Case, Sections, read_scheduler, scheduler_keys

__all__ = ["FILE", "MAPPINGS", "read_scheduler", "scheduler_keys", "scheduler_sections"]


def scheduler_sections(
    config: Mapping[str, Any],
    *,
    steps: int,
    shape: Sequence[int] | None = None,
    mu: float | None = None,
    sigmas: str | Sequence[float] | None = None,
) -> Sections:
    """The sections process, prediction, solver and grid that sample as a scheduler of diffusers does.

    Args:
      config: what its file says, `_class_name` included.
      steps: `num_inference_steps`, of which some rules depend.
      shape: (height, width, channels) of the latents, or (frames, height, width, channels), from which a flow with
        use_dynamic_shifting has its shift: the tokens are H W / 4, or F H W.
      mu: that shift's logarithm, as a pipeline gives it.
      sigmas: of a flow before its shift, "scheduler" or "pipeline" (1 ... 1/n, as FLUX's, Qwen's and HunyuanVideo's
        pipelines give them), or a list of them; None: the pipeline's with use_dynamic_shifting, else the scheduler's.

    Samples are diffusers' to float32's rounding, its float32 tables and rounded timesteps included, but for

    - DPMSolverMultistep of sde-dpmsolver++ and order 3, whose weight of the second difference has -1/2 for 1/2 there;
      here it is k-diffusion's;
    - UnCLIP's last step, which there divides two roundings of one beta, 5e-4 off 1;
    - Euler with zero terminal SNR, whose samples of size 4096 lose digits in float32 there (1e-5).

    A last step from a noise level to the same one is left out with its evaluation, and eta, use_clipped_model_output,
    s_churn and what else pipelines hand to `step` are keys of the solvers.

    Raises:
      ValueError: a class, key or value that is unknown, or that difax has no equal for; one line, with the reason.
    """
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps={brief(steps)}; allowed: 1 or more")
    name, keys = scheduler_keys(config)
    if sigmas is not None and not isinstance(sigmas, str) and MAPPINGS[name] is not flows.flow:
        raise ValueError(f"scheduler {name}: a list of sigmas; allowed: of a flow's scheduler")
    return MAPPINGS[name](Case(name, keys, steps, None if shape is None else tuple(shape), mu, sigmas))


MAPPINGS: dict[str, Callable[[Case], Sections]] = {
    "DDPMScheduler": discrete.ddpm,
    "DDPMParallelScheduler": discrete.ddpm,
    "DDIMScheduler": discrete.ddim,
    "DDIMParallelScheduler": discrete.ddim,
    "CogVideoXDDIMScheduler": discrete.cogvideox,
    "CogVideoXDPMScheduler": discrete.cogvideox,
    "UnCLIPScheduler": discrete.ddpm,
    "PNDMScheduler": discrete.pndm,
    "IPNDMScheduler": discrete.ipndm,
    "LMSDiscreteScheduler": lambda case: levels.levels(case, {"name": "lms", "order": 4}),
    "DPMSolverMultistepScheduler": multistep.dpm,
    "DPMSolverSinglestepScheduler": multistep.singlestep,
    "DPMSolverSDEScheduler": levels.dpm_sde,
    "UniPCMultistepScheduler": multistep.unipc,
    "DEISMultistepScheduler": multistep.deis,
    "SASolverScheduler": multistep.sa,
    "KDPM2DiscreteScheduler": levels.kdpm2,
    "KDPM2AncestralDiscreteScheduler": levels.kdpm2,
    "HeunDiscreteScheduler": levels.heun,
    "EulerDiscreteScheduler": levels.euler,
    "EulerAncestralDiscreteScheduler": lambda case: levels.levels(case, {"name": "euler_ancestral"}, common.NOISES),
    "EDMEulerScheduler": levels.edm,
    "EDMDPMSolverMultistepScheduler": levels.edm,
    "CosineDPMSolverMultistepScheduler": levels.edm,
    "FlowMatchEulerDiscreteScheduler": flows.flow,
    "FlowMatchHeunDiscreteScheduler": flows.flow,
    "FlowMatchLCMScheduler": flows.flow,
    "LCMScheduler": discrete.distilled,
    "TCDScheduler": discrete.distilled,
}
