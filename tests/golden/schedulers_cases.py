"""The scheduler files of `schedulers.npz`: (class, what differs from its defaults, steps), and what a pipeline adds.

`CALL` is what pipelines hand to `set_timesteps` (mu) or `step` (eta), which no file holds.
"""

from __future__ import annotations

from typing import Any

SD = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
ZERO = dict(SD, rescale_betas_zero_snr=True, prediction_type="v_prediction", timestep_spacing="trailing")
COSINE = dict(beta_schedule="squaredcos_cap_v2")
FLOW = dict(use_flow_sigmas=True, prediction_type="flow_prediction")
COG = dict(SD, rescale_betas_zero_snr=True, prediction_type="v_prediction", timestep_spacing="trailing")
FEW = [0.02 + 0.002 * k for k in range(50)]
SHIFTED = dict(use_dynamic_shifting=True)

CASES: dict[str, tuple[str, dict[str, Any], int]] = {
    # ancestral and implicit
    "ddpm": ("DDPMScheduler", dict(clip_sample=False), 8),
    "ddpm_clip": ("DDPMScheduler", dict(clip_sample_range=0.8), 8),
    "ddpm_large": ("DDPMScheduler", dict(variance_type="fixed_large", clip_sample=False), 8),
    "ddpm_large_end": ("DDPMScheduler", dict(variance_type="fixed_large", clip_sample=False, steps_offset=1), 8),
    "ddpm_small_log": ("DDPMScheduler", dict(variance_type="fixed_small_log", clip_sample=False), 8),
    "ddpm_learned": ("DDPMScheduler", dict(variance_type="learned_range", clip_sample=False), 8),
    "ddpm_threshold": ("DDPMScheduler", dict(thresholding=True, sample_max_value=1.5), 8),
    "ddpm_sigmoid": ("DDPMScheduler", dict(beta_schedule="sigmoid", clip_sample=False), 8),
    "ddpm_laplace": ("DDPMScheduler", dict(beta_schedule="laplace", clip_sample=False), 8),
    "ddpm_linspace": ("DDPMScheduler", dict(timestep_spacing="linspace", clip_sample=False), 7),
    "ddpm_trailing": ("DDPMScheduler", dict(timestep_spacing="trailing", clip_sample=False), 7),
    "ddpm_hunyuan_dit": (
        "DDPMScheduler",
        dict(SD, beta_end=0.02, prediction_type="v_prediction", steps_offset=1, clip_sample=False),
        8,
    ),
    "ddpm_sample": ("DDPMScheduler", dict(COSINE, prediction_type="sample", clip_sample=False), 8),
    "ddpm_parallel": ("DDPMParallelScheduler", dict(clip_sample=False), 8),
    "ddim_dit": ("DDIMScheduler", dict(clip_sample=False), 8),
    "ddim_clip": ("DDIMScheduler", dict(), 8),
    "ddim_eta": ("DDIMScheduler", dict(clip_sample=False), 8),
    "ddim_eta_clip": ("DDIMScheduler", dict(clip_sample_range=0.7), 8),
    "ddim_threshold": (
        "DDIMScheduler",
        dict(thresholding=True, dynamic_thresholding_ratio=0.8, sample_max_value=2.0),
        8,
    ),
    "ddim_sd": ("DDIMScheduler", dict(SD, clip_sample=False, set_alpha_to_one=False, steps_offset=1), 8),
    "ddim_sd_from_0": ("DDIMScheduler", dict(SD, clip_sample=False, set_alpha_to_one=False), 8),
    "ddim_sd21": (
        "DDIMScheduler",
        dict(SD, clip_sample=False, set_alpha_to_one=False, steps_offset=1, prediction_type="v_prediction"),
        8,
    ),
    "ddim_zero_snr": ("DDIMScheduler", dict(ZERO, clip_sample=False), 8),
    "ddim_linspace": ("DDIMScheduler", dict(timestep_spacing="linspace", clip_sample=False), 7),
    "ddim_trailing_uneven": ("DDIMScheduler", dict(timestep_spacing="trailing", clip_sample=False), 7),
    "ddim_sample": ("DDIMScheduler", dict(COSINE, prediction_type="sample", clip_sample=False), 8),
    "ddim_trained": ("DDIMScheduler", dict(trained_betas=FEW, num_train_timesteps=50, clip_sample=False), 10),
    "ddim_parallel": ("DDIMParallelScheduler", dict(clip_sample=False), 8),
    "cogvideox_ddim": ("CogVideoXDDIMScheduler", dict(COG), 8),
    "cogvideox_ddim_5b": ("CogVideoXDDIMScheduler", dict(COG, snr_shift_scale=1.0), 8),
    "cogvideox_dpm": ("CogVideoXDPMScheduler", dict(COG, snr_shift_scale=1.0), 8),
    "unclip": ("UnCLIPScheduler", dict(clip_sample_range=5.0), 8),
    "unclip_learned": ("UnCLIPScheduler", dict(variance_type="learned_range"), 8),
    # multistep
    "pndm": ("PNDMScheduler", dict(SD, set_alpha_to_one=False, skip_prk_steps=True, steps_offset=1), 8),
    "pndm_prk": ("PNDMScheduler", dict(SD, steps_offset=1), 10),
    "pndm_one": ("PNDMScheduler", dict(set_alpha_to_one=True, skip_prk_steps=True), 8),
    "ipndm": ("IPNDMScheduler", dict(), 8),
    "lms": ("LMSDiscreteScheduler", dict(SD), 8),
    "lms_karras": ("LMSDiscreteScheduler", dict(SD, use_karras_sigmas=True), 8),
    "lms_leading": ("LMSDiscreteScheduler", dict(SD, timestep_spacing="leading", steps_offset=1), 8),
    "lms_v": ("LMSDiscreteScheduler", dict(SD, prediction_type="v_prediction", timestep_spacing="trailing"), 8),
    "dpmpp_2m_pixart": ("DPMSolverMultistepScheduler", dict(), 8),
    "dpmpp_2m_16": ("DPMSolverMultistepScheduler", dict(SD), 16),
    "dpmpp_1m": ("DPMSolverMultistepScheduler", dict(solver_order=1), 8),
    "dpmpp_3m": ("DPMSolverMultistepScheduler", dict(solver_order=3), 8),
    "dpmpp_3m_16": ("DPMSolverMultistepScheduler", dict(solver_order=3), 16),
    "dpmpp_2m_heun": ("DPMSolverMultistepScheduler", dict(solver_type="heun"), 8),
    "dpmpp_2m_sigma_min": ("DPMSolverMultistepScheduler", dict(final_sigmas_type="sigma_min"), 8),
    "dpmpp_2m_sigma_min_full": (
        "DPMSolverMultistepScheduler",
        dict(final_sigmas_type="sigma_min", lower_order_final=False),
        8,
    ),
    "dpmpp_2m_euler_end": (
        "DPMSolverMultistepScheduler",
        dict(final_sigmas_type="sigma_min", euler_at_final=True, lower_order_final=False),
        8,
    ),
    "dpmpp_2m_karras": ("DPMSolverMultistepScheduler", dict(SD, use_karras_sigmas=True), 8),
    "dpmpp_2m_karras_cosine": ("DPMSolverMultistepScheduler", dict(COSINE, use_karras_sigmas=True), 8),
    "dpmpp_2m_lu": ("DPMSolverMultistepScheduler", dict(SD, use_lu_lambdas=True), 8),
    "dpmpp_2m_exponential": ("DPMSolverMultistepScheduler", dict(SD, use_exponential_sigmas=True), 8),
    "dpmpp_2m_beta": ("DPMSolverMultistepScheduler", dict(SD, use_beta_sigmas=True), 8),
    "dpmpp_2m_clipped": ("DPMSolverMultistepScheduler", dict(COSINE, lambda_min_clipped=-5.1), 8),
    "dpmpp_2m_threshold": ("DPMSolverMultistepScheduler", dict(thresholding=True, sample_max_value=1.5), 8),
    "dpmpp_2m_leading": ("DPMSolverMultistepScheduler", dict(SD, timestep_spacing="leading", steps_offset=1), 8),
    "dpmpp_2m_trailing": ("DPMSolverMultistepScheduler", dict(SD, timestep_spacing="trailing"), 7),
    "dpmpp_2m_zero_snr": ("DPMSolverMultistepScheduler", dict(ZERO), 8),
    "dpmpp_2m_sana": ("DPMSolverMultistepScheduler", dict(FLOW, flow_shift=3.0), 8),
    "dpmpp_2m_sde": ("DPMSolverMultistepScheduler", dict(algorithm_type="sde-dpmsolver++"), 8),
    "dpmpp_2m_sde_heun": (
        "DPMSolverMultistepScheduler",
        dict(algorithm_type="sde-dpmsolver++", solver_type="heun", use_karras_sigmas=True),
        8,
    ),
    "dpmpp_3m_sde": ("DPMSolverMultistepScheduler", dict(algorithm_type="sde-dpmsolver++", solver_order=3), 8),
    "dpm_2m": ("DPMSolverMultistepScheduler", dict(algorithm_type="dpmsolver", final_sigmas_type="sigma_min"), 8),
    "dpm_3m": (
        "DPMSolverMultistepScheduler",
        dict(algorithm_type="dpmsolver", solver_order=3, final_sigmas_type="sigma_min"),
        8,
    ),
    "dpm_2m_heun": (
        "DPMSolverMultistepScheduler",
        dict(algorithm_type="dpmsolver", solver_type="heun", final_sigmas_type="sigma_min"),
        8,
    ),
    "dpmpp_2s": ("DPMSolverSinglestepScheduler", dict(), 8),
    "dpmpp_2s_9": ("DPMSolverSinglestepScheduler", dict(lower_order_final=True), 9),
    "dpmpp_3s": ("DPMSolverSinglestepScheduler", dict(solver_order=3), 9),
    "dpmpp_3s_heun": (
        "DPMSolverSinglestepScheduler",
        dict(solver_order=3, solver_type="heun", lower_order_final=True),
        10,
    ),
    "dpm_2s": ("DPMSolverSinglestepScheduler", dict(algorithm_type="dpmsolver", final_sigmas_type="sigma_min"), 8),
    "dpm_3s": (
        "DPMSolverSinglestepScheduler",
        dict(algorithm_type="dpmsolver", solver_order=3, final_sigmas_type="sigma_min"),
        10,
    ),
    "dpmpp_2s_karras": ("DPMSolverSinglestepScheduler", dict(SD, use_karras_sigmas=True), 8),
    "unipc": ("UniPCMultistepScheduler", dict(), 8),
    "unipc_bh1_3": (
        "UniPCMultistepScheduler",
        dict(solver_order=3, solver_type="bh1", final_sigmas_type="sigma_min"),
        8,
    ),
    "unipc_3_full": (
        "UniPCMultistepScheduler",
        dict(solver_order=3, lower_order_final=False, final_sigmas_type="sigma_min"),
        8,
    ),
    "unipc_noise": ("UniPCMultistepScheduler", dict(predict_x0=False, final_sigmas_type="sigma_min"), 8),
    "unipc_uncorrected": ("UniPCMultistepScheduler", dict(disable_corrector=[0, 1]), 8),
    "unipc_karras": ("UniPCMultistepScheduler", dict(SD, use_karras_sigmas=True), 8),
    "unipc_wan": ("UniPCMultistepScheduler", dict(FLOW, flow_shift=3.0), 8),
    "unipc_flow_terminal": ("UniPCMultistepScheduler", dict(FLOW, **SHIFTED, shift_terminal=0.1), 8),
    "deis": ("DEISMultistepScheduler", dict(), 8),
    "deis_3": ("DEISMultistepScheduler", dict(solver_order=3), 8),
    "deis_v": ("DEISMultistepScheduler", dict(SD, prediction_type="v_prediction", timestep_spacing="trailing"), 8),
    "sa_ode": ("SASolverScheduler", dict(predictor_order=3, corrector_order=3), 8),
    "sa": ("SASolverScheduler", dict(), 8),
    "unipc_threshold": ("UniPCMultistepScheduler", dict(thresholding=True, sample_max_value=1.5), 8),
    "deis_threshold": ("DEISMultistepScheduler", dict(thresholding=True, sample_max_value=1.5), 8),
    "sa_threshold": ("SASolverScheduler", dict(thresholding=True, sample_max_value=1.5), 8),
    # k-diffusion
    "euler": ("EulerDiscreteScheduler", dict(), 8),
    "euler_sdxl": ("EulerDiscreteScheduler", dict(SD, timestep_spacing="leading", steps_offset=1), 8),
    "euler_trailing_v": (
        "EulerDiscreteScheduler",
        dict(SD, timestep_spacing="trailing", prediction_type="v_prediction"),
        8,
    ),
    "euler_karras": ("EulerDiscreteScheduler", dict(SD, use_karras_sigmas=True), 8),
    "euler_karras_ends": (
        "EulerDiscreteScheduler",
        dict(SD, use_karras_sigmas=True, sigma_min=0.05, sigma_max=12.0),
        8,
    ),
    "euler_exponential": ("EulerDiscreteScheduler", dict(SD, use_exponential_sigmas=True), 8),
    "euler_beta": ("EulerDiscreteScheduler", dict(SD, use_beta_sigmas=True), 8),
    "euler_zero_snr": ("EulerDiscreteScheduler", dict(ZERO), 8),
    "euler_svd": (
        "EulerDiscreteScheduler",
        dict(
            SD,
            use_karras_sigmas=True,
            sigma_min=0.002,
            sigma_max=700.0,
            timestep_spacing="leading",
            timestep_type="continuous",
            prediction_type="v_prediction",
            steps_offset=1,
        ),
        8,
    ),
    "euler_sample": ("EulerDiscreteScheduler", dict(prediction_type="sample"), 8),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", dict(), 8),
    "euler_ancestral_trailing": ("EulerAncestralDiscreteScheduler", dict(SD, timestep_spacing="trailing"), 8),
    "heun": ("HeunDiscreteScheduler", dict(), 6),
    "heun_karras": ("HeunDiscreteScheduler", dict(SD, use_karras_sigmas=True), 6),
    "heun_clip": ("HeunDiscreteScheduler", dict(SD, clip_sample=True, timestep_spacing="trailing"), 6),
    "kdpm2": ("KDPM2DiscreteScheduler", dict(SD, timestep_spacing="leading", steps_offset=1), 6),
    "kdpm2_linspace": ("KDPM2DiscreteScheduler", dict(SD), 6),
    "kdpm2_karras": ("KDPM2DiscreteScheduler", dict(SD, use_karras_sigmas=True), 6),
    "kdpm2_ancestral": ("KDPM2AncestralDiscreteScheduler", dict(SD, timestep_spacing="trailing"), 6),
    "dpm_sde": ("DPMSolverSDEScheduler", dict(SD, timestep_spacing="trailing"), 6),
    "dpm_sde_karras": ("DPMSolverSDEScheduler", dict(SD, use_karras_sigmas=True), 6),
    # EDM
    "edm_euler": ("EDMEulerScheduler", dict(), 8),
    "edm_euler_cosmos": (
        "EDMEulerScheduler",
        dict(sigma_data=1.0, sigma_schedule="exponential", prediction_type="v_prediction"),
        8,
    ),
    "edm_dpmpp_2m": ("EDMDPMSolverMultistepScheduler", dict(), 8),
    "edm_dpmpp_3m": ("EDMDPMSolverMultistepScheduler", dict(solver_order=3, sigma_schedule="exponential"), 8),
    "edm_dpmpp_2m_sde": ("EDMDPMSolverMultistepScheduler", dict(algorithm_type="sde-dpmsolver++"), 8),
    "cosine_dpmpp": ("CosineDPMSolverMultistepScheduler", dict(), 8),
    # flows
    "flow_sd3": ("FlowMatchEulerDiscreteScheduler", dict(shift=3.0), 8),
    "flow_flux": ("FlowMatchEulerDiscreteScheduler", dict(**SHIFTED, shift=3.0), 8),
    "flow_ltx": (
        "FlowMatchEulerDiscreteScheduler",
        dict(**SHIFTED, base_shift=0.95, max_shift=2.05, base_image_seq_len=1024, shift_terminal=0.1),
        8,
    ),
    "flow_qwen_image": (
        "FlowMatchEulerDiscreteScheduler",
        dict(**SHIFTED, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02),
        8,
    ),
    "flow_hunyuan_video": ("FlowMatchEulerDiscreteScheduler", dict(shift=7.0), 8),
    "flow_mochi": ("FlowMatchEulerDiscreteScheduler", dict(invert_sigmas=True), 8),
    "flow_linear": ("FlowMatchEulerDiscreteScheduler", dict(**SHIFTED, time_shift_type="linear"), 8),
    "flow_karras": ("FlowMatchEulerDiscreteScheduler", dict(shift=3.0, use_karras_sigmas=True), 8),
    "flow_exponential": ("FlowMatchEulerDiscreteScheduler", dict(shift=3.0, use_exponential_sigmas=True), 8),
    "flow_beta": ("FlowMatchEulerDiscreteScheduler", dict(shift=3.0, use_beta_sigmas=True), 8),
    "flow_stochastic": ("FlowMatchEulerDiscreteScheduler", dict(stochastic_sampling=True), 8),
    "flow_heun": ("FlowMatchHeunDiscreteScheduler", dict(shift=3.0), 6),
    "flow_lcm": ("FlowMatchLCMScheduler", dict(shift=3.0), 6),
    # few steps
    "lcm": ("LCMScheduler", dict(SD), 4),
    "lcm_clip": ("LCMScheduler", dict(SD, clip_sample=True, original_inference_steps=40), 3),
    "tcd": ("TCDScheduler", dict(SD), 4),
    "tcd_deterministic": ("TCDScheduler", dict(SD), 4),
}

MU = 0.9
CALL: dict[str, dict[str, Any]] = {
    "ddim_eta": dict(eta=0.7),
    "ddim_eta_clip": dict(eta=1.0),
    "tcd_deterministic": dict(eta=0.0),
}
# given the pipelines' sigmas, 1 ... 1/n, as those are whose shift follows from the size, and these mu
PIPELINE = ("flow_hunyuan_video",)
