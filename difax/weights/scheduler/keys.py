"""The keys of diffusers' scheduler files: of each class that difax takes, with the default of each (0.42.1)."""

from __future__ import annotations

import math
from typing import Any

Keys = dict[str, Any]

BETAS: Keys = dict(num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear", trained_betas=None)
PREDICTED: Keys = dict(prediction_type="epsilon")
LEADING: Keys = dict(timestep_spacing="leading", steps_offset=0)
LINSPACE: Keys = dict(timestep_spacing="linspace", steps_offset=0)
RESCALED: Keys = dict(rescale_betas_zero_snr=False)
THRESHOLD: Keys = dict(thresholding=False, dynamic_thresholding_ratio=0.995, sample_max_value=1.0)
CLIP: Keys = dict(clip_sample=True, clip_sample_range=1.0)
CURVES: Keys = dict(use_karras_sigmas=False, use_exponential_sigmas=False, use_beta_sigmas=False)
FLOW_SIGMAS: Keys = dict(use_flow_sigmas=False, flow_shift=1.0)
DYNAMIC: Keys = dict(use_dynamic_shifting=False, time_shift_type="exponential")
CLIPPED: Keys = dict(lambda_min_clipped=-math.inf, variance_type=None)
SD: Keys = dict(beta_start=0.00085, beta_end=0.012)
EDM: Keys = dict(
    sigma_min=0.002,
    sigma_max=80.0,
    sigma_data=0.5,
    sigma_schedule="karras",
    num_train_timesteps=1000,
    prediction_type="epsilon",
    rho=7.0,
    final_sigmas_type="zero",
)
FLOW: Keys = dict(
    num_train_timesteps=1000,
    shift=1.0,
    use_dynamic_shifting=False,
    base_shift=0.5,
    max_shift=1.15,
    base_image_seq_len=256,
    max_image_seq_len=4096,
    invert_sigmas=False,
    shift_terminal=None,
    time_shift_type="exponential",
    **CURVES,
)
DISTILLED: Keys = dict(
    BETAS,
    **PREDICTED,
    **LEADING,
    **THRESHOLD,
    **RESCALED,
    original_inference_steps=50,
    clip_sample=False,
    clip_sample_range=1.0,
    set_alpha_to_one=True,
    timestep_scaling=10.0,
) | dict(SD, beta_schedule="scaled_linear")
DDIM: Keys = dict(BETAS, **PREDICTED, **LEADING, **THRESHOLD, **CLIP, **RESCALED, set_alpha_to_one=True)
DDPM: Keys = dict(BETAS, **PREDICTED, **LEADING, **THRESHOLD, **CLIP, **RESCALED, variance_type="fixed_small")
COG: Keys = dict(
    BETAS, **PREDICTED, **LEADING, **CLIP, **RESCALED, sample_max_value=1.0, set_alpha_to_one=True, snr_shift_scale=3.0
) | dict(SD, beta_schedule="scaled_linear")
LEVELS: Keys = dict(BETAS, **PREDICTED, **LINSPACE)
CURVED: Keys = dict(LEVELS, **CURVES) | SD
MULTISTEP: Keys = dict(LEVELS, **CURVES, **THRESHOLD, **FLOW_SIGMAS, lower_order_final=True)

CLASSES: dict[str, Keys] = {
    "DDPMScheduler": DDPM,
    "DDPMParallelScheduler": DDPM,
    "DDIMScheduler": DDIM,
    "DDIMParallelScheduler": DDIM,
    "CogVideoXDDIMScheduler": COG,
    "CogVideoXDPMScheduler": COG,
    "UnCLIPScheduler": dict(
        num_train_timesteps=1000,
        variance_type="fixed_small_log",
        prediction_type="epsilon",
        beta_schedule="squaredcos_cap_v2",
        **CLIP,
    ),
    "PNDMScheduler": dict(BETAS, **PREDICTED, **LEADING, skip_prk_steps=False, set_alpha_to_one=False),
    "IPNDMScheduler": dict(num_train_timesteps=1000, trained_betas=None),
    "LMSDiscreteScheduler": dict(LEVELS, **CURVES),
    "DPMSolverMultistepScheduler": dict(
        MULTISTEP,
        **RESCALED,
        **DYNAMIC,
        **CLIPPED,
        solver_order=2,
        algorithm_type="dpmsolver++",
        solver_type="midpoint",
        euler_at_final=False,
        use_lu_lambdas=False,
        final_sigmas_type="zero",
    ),
    "DPMSolverSinglestepScheduler": dict(
        {k: v for k, v in MULTISTEP.items() if k not in LINSPACE},
        **DYNAMIC,
        **CLIPPED,
        solver_order=2,
        algorithm_type="dpmsolver++",
        solver_type="midpoint",
        final_sigmas_type="zero",
    )
    | dict(lower_order_final=False),
    "DPMSolverSDEScheduler": dict(CURVED, noise_sampler_seed=None),
    "UniPCMultistepScheduler": dict(
        MULTISTEP,
        **RESCALED,
        **DYNAMIC,
        solver_order=2,
        predict_x0=True,
        solver_type="bh2",
        disable_corrector=[],
        solver_p=None,
        final_sigmas_type="zero",
        sigma_min=None,
        sigma_max=None,
        shift_terminal=None,
    ),
    "DEISMultistepScheduler": dict(MULTISTEP, **DYNAMIC, solver_order=2, algorithm_type="deis", solver_type="logrho"),
    "SASolverScheduler": dict(
        MULTISTEP,
        **CLIPPED,
        predictor_order=2,
        corrector_order=2,
        tau_func=None,
        algorithm_type="data_prediction",
    ),
    "KDPM2DiscreteScheduler": CURVED,
    "KDPM2AncestralDiscreteScheduler": CURVED,
    "HeunDiscreteScheduler": dict(CURVED, clip_sample=False, clip_sample_range=1.0),
    "EulerDiscreteScheduler": dict(
        LEVELS,
        **CURVES,
        **RESCALED,
        interpolation_type="linear",
        sigma_min=None,
        sigma_max=None,
        timestep_type="discrete",
        final_sigmas_type="zero",
    ),
    "EulerAncestralDiscreteScheduler": dict(LEVELS, **RESCALED),
    "EDMEulerScheduler": EDM,
    "EDMDPMSolverMultistepScheduler": dict(
        EDM,
        **THRESHOLD,
        solver_order=2,
        algorithm_type="dpmsolver++",
        solver_type="midpoint",
        lower_order_final=True,
        euler_at_final=False,
    ),
    "CosineDPMSolverMultistepScheduler": dict(
        EDM, solver_order=2, solver_type="midpoint", lower_order_final=True, euler_at_final=False
    )
    | dict(sigma_min=0.3, sigma_max=500, sigma_data=1.0, sigma_schedule="exponential", prediction_type="v_prediction"),
    "FlowMatchEulerDiscreteScheduler": dict(FLOW, stochastic_sampling=False),
    "FlowMatchHeunDiscreteScheduler": dict(num_train_timesteps=1000, shift=1.0),
    "FlowMatchLCMScheduler": dict(FLOW, scale_factors=None, upscale_mode="bicubic"),
    "LCMScheduler": DISTILLED,
    "TCDScheduler": DISTILLED,
}

# classes of diffusers that are not taken, and why
REFUSED: dict[str, str] = {
    "ScoreSdeVeScheduler": "its corrector goes by the mean norm of a batch, and a batch of difax is its singles; "
    "solver pc is its method",
    "CMStochasticIterativeScheduler": "its networks have their boundary condition at sigma_min, a prediction that "
    "difax does not have",
    "DDIMInverseScheduler": "it adds noise to an image step by step, and difax draws samples",
    "DPMSolverMultistepInverseScheduler": "it adds noise to an image step by step, and difax draws samples",
    "RePaintScheduler": "it needs an image and a mask at each step, which a sampler of difax is not given",
    "ScoreSdeVpScheduler": "it is deprecated in diffusers; process vp_sde and solver pc are its method",
    "KarrasVeScheduler": "it is deprecated in diffusers; solver edm is its method",
    "DDPMWuerstchenScheduler": "its network is told a continuous ratio of noise that no process of difax has",
    "SCMScheduler": "its TrigFlow networks are distilled ones of their own parametrisation",
    "FlowMapEulerDiscreteScheduler": "its networks are told two times, of which difax tells one",
    "LTXEulerAncestralRFScheduler": "its ancestral steps on a flow are those of one pipeline",
    "PiflowScheduler": "its networks return a policy, and not a prediction",
    "HeliosScheduler": "it samples in stages of growing size",
    "HeliosDMDScheduler": "it samples in stages of growing size",
    "MiniMaxH3Scheduler": "it is of one pipeline of language",
    "RFD4ProteinaScheduler": "it is of one model of proteins",
    "ConsistencyDecoderScheduler": "it is of a decoder, and not of a denoiser",
    "AmusedScheduler": "it samples discrete tokens",
    "BlockRefinementScheduler": "it samples discrete tokens",
    "DiscreteDDIMScheduler": "it samples discrete tokens",
    "EntropyBoundScheduler": "it samples discrete tokens",
    "VQDiffusionScheduler": "it samples discrete tokens",
}

# keys that files carry and no class reads
STORED = ("_class_name", "_diffusers_version", "_name_or_path", "_use_default_values")

# what a key may be, where it is one of several texts
TEXTS: dict[str, tuple[str, ...]] = {
    "timestep_spacing": ("linspace", "leading", "trailing"),
    "timestep_type": ("discrete", "continuous"),
    "final_sigmas_type": ("zero", "sigma_min"),
    "time_shift_type": ("exponential", "linear"),
    "sigma_schedule": ("karras", "exponential"),
}

# keys of these classes that change nothing of what difax takes, whatever their value
INERT: dict[str, tuple[str, ...]] = {
    "CogVideoXDDIMScheduler": ("clip_sample", "clip_sample_range", "sample_max_value"),
    "CogVideoXDPMScheduler": ("clip_sample", "clip_sample_range", "sample_max_value"),
    "DPMSolverSDEScheduler": ("noise_sampler_seed",),
    "EDMEulerScheduler": ("num_train_timesteps",),
    "EDMDPMSolverMultistepScheduler": ("num_train_timesteps",),
    "CosineDPMSolverMultistepScheduler": ("num_train_timesteps",),
    "FlowMatchLCMScheduler": ("upscale_mode",),
    "LCMScheduler": ("timestep_spacing", "steps_offset", "set_alpha_to_one"),
    "TCDScheduler": (
        "timestep_spacing",
        "steps_offset",
        "set_alpha_to_one",
        "timestep_scaling",
        "clip_sample",
        "clip_sample_range",
        *THRESHOLD,
    ),
    "IPNDMScheduler": ("num_train_timesteps",),
}

# keys whose values are lists of numbers
LISTS = ("trained_betas", "disable_corrector")
