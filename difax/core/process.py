"""Noising processes x_t = alpha(t) x0 + sigma(t) eps, and every conversion between what networks predict.

One convention throughout: t in [0, 1], t = 0 is data and t = 1 is noise. A discrete process of T steps (DDPM,
DiT) has its step k = 0 ... T-1 at t = (k + 1)/T, so that t = 0 is exactly the clean image; between the steps
log(alpha) is linear in t, as in the discrete schedule of DPM-Solver (Lu et al. 2022, arXiv:2206.00927).

Everything that enters a solver is computed from here in float64 numpy on the host: float32 tables lose
high-order multistep methods their order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from difax.core import betas
from difax.core.annotations import brief, checked, choose
from difax.core.betas import log_alphas
from difax.core.contracts import Array, Level, Prediction

PREDICTIONS = {
    "eps": "the noise",
    "x0": "the clean sample",
    "v": "alpha eps - sigma x0 (Salimans & Ho 2022)",
    "velocity": "dx/dt along the model's own time (rectified flow: eps - x0)",
    "score": "grad log p(x_t) = -eps/sigma",
    "edm": "sigma x0 - alpha eps, what EDM's preconditioned networks return (Karras et al. 2022)",
}


class Process(NamedTuple):
    """A noising process.

    level(t, xp) -> Level: alpha, sigma and their slopes along the model's time, in numpy (default) or jax.numpy.
    inverse(half_log_snr) -> t: where log(alpha/sigma) takes that value (float64 numpy).
    model_time(t) -> what the network is told.
    steps: T of a discrete process, None for a continuous one.
    t_min, t_max: the range in which log(alpha/sigma) is finite and grids in that variable are laid.
    prior_std: standard deviation of x at t = 1, in which sampling starts.
    shift: time shift of a flow (Esser et al. 2024), used by the `shifted` grid and by training.
    augmented: of a process whose x is not alpha x0 + sigma eps alone, what its parts are and how they move
        (`difax.core.langevin.Augmented`); `level` is then that of the data's own part, with more beside it.
    """

    name: str
    level: Callable[..., Level]
    inverse: Callable[[Array], Array]
    model_time: Callable[[Array], Array]
    steps: int | None
    t_min: float
    t_max: float
    prior_std: float
    shift: float = 1.0
    augmented: Any = None


def observed(process: Process, x: Any) -> Any:
    """The part [..., C] of x that the data has: the position, where there is a velocity too, else all of it."""
    return x[..., : observed_shape(process, x.shape)[-1]]


def observed_shape(process: Process, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of that part of what has a shape [..., C]."""
    parts = 1 if process.augmented is None else len(process.augmented.prior_std)
    return (*shape[:-1], shape[-1] // parts)


def check_parts(process: Process, takes: bool, solver: str = "solver") -> None:
    """Refuses a process of several parts to a solver that does not take one."""
    if process.augmented is not None and not takes:
        raise ValueError(
            f"{solver}: process {process.name} has positions and velocities, and this is for one noise level; allowed: "
            "sscs, cld_em, gddim, or a process such as vp_sde"
        )


def log_snr(process: Process, t: Array) -> np.ndarray:
    """log(alpha^2 / sigma^2) at times t (float64); +inf at t = 0, -inf where alpha = 0."""
    level = process.level(np.asarray(t, np.float64))
    with np.errstate(divide="ignore"):
        return 2.0 * (np.log(level.alpha) - np.log(level.sigma))


ALPHA_IS_ZERO = -300.0  # log(alpha) that stands for alpha = 0, so that tables can be interpolated


def _from_log_alphas(name: str, log_alphas: np.ndarray, between: str = "log_alpha", prior_std: float = 1.0) -> Process:
    """A discrete process from log(alpha) [T] of its steps; -inf stands for alpha = 0, of the last one alone."""
    steps = len(log_alphas)
    log_alpha = np.maximum(np.concatenate([[0.0], log_alphas]), ALPHA_IS_ZERO)
    slope = np.diff(log_alpha) * steps
    knots = np.arange(steps + 1) / steps
    # half of log-SNR at the steps, decreasing; infinite at t = 0
    half = log_alpha[1:] - 0.5 * np.log(-np.expm1(2 * log_alpha[1:]))
    half_slope = np.append(0.0, np.diff(half) * steps)

    def level(t, xp=np):
        la = xp.interp(t, knots, log_alpha)
        piece = xp.clip(xp.ceil(t * steps).astype(int) - 1, 0, steps - 1)
        la_dot = xp.asarray(slope)[piece]
        if between == "log_sigma":
            inner = -0.5 * xp.logaddexp(0.0, -2.0 * xp.interp(t, knots[1:], half))
            la = xp.where(piece > 0, inner, la)
            la_dot = xp.where(piece > 0, -xp.expm1(2 * la) * xp.asarray(half_slope)[piece], la_dot)
        # slopes along the model's time k = T t - 1
        alpha, variance = xp.where(la > ALPHA_IS_ZERO, xp.exp(la), 0.0), -xp.expm1(2 * la)
        alpha_dot = alpha * la_dot / steps
        sigma = xp.sqrt(variance)
        sigma_dot = -alpha * alpha_dot / xp.maximum(sigma, 1e-12)
        return Level(alpha, sigma, alpha_dot, sigma_dot)

    def inverse(value):
        value = np.asarray(value, np.float64)
        # invert log(alpha) = -softplus(-2 lambda)/2 exactly; np.interp wants increasing knots
        la = -0.5 * np.logaddexp(0.0, -2.0 * value)
        t = np.interp(-la, -log_alpha, knots)
        if between == "log_sigma":
            t = np.where(value < half[0], np.interp(-value, -half, knots[1:]), t)
        return t

    return Process(
        name=name,
        level=level,
        inverse=inverse,
        model_time=lambda t: t * steps - 1.0,
        steps=steps,
        t_min=1.0 / steps,
        t_max=1.0 if log_alpha[-1] > ALPHA_IS_ZERO else 1.0 - 1.0 / steps,
        prior_std=prior_std,
    )


def vp_linear(beta_start: float = 1e-4, beta_end: float = 0.02, steps: int = 1000) -> Process:
    """Variance-preserving process with linear betas, the one of DDPM and DiT.

    alpha_k^2 = prod_{j<=k} (1 - beta_j), sigma^2 = 1 - alpha^2.

    Args:
      beta_start, beta_end: first and last beta, in (0, 1) (1e-4 and 0.02 for 1000 steps).
      steps: T, how many discrete steps, 1 ... 100000 (1000).

    References: Ho et al., Denoising Diffusion Probabilistic Models, 2020, arXiv:2006.11239.
    """
    _check_steps("vp_linear", steps)
    if not 0 < beta_start <= beta_end < 1:
        raise ValueError(
            f"vp_linear: beta_start={beta_start}, beta_end={beta_end}; need 0 < beta_start <= beta_end < 1"
        )
    return _from_log_alphas("vp_linear", log_alphas(betas.linear(beta_start, beta_end, steps)))


def vp_cosine(s: float = 0.008, max_beta: float = 0.999, steps: int = 1000) -> Process:
    """Variance-preserving process with the cosine schedule of Improved DDPM.

    alpha^2(u) = cos^2((u + s)/(1 + s) pi/2), beta_k = min(1 - alpha^2((k+1)/T)/alpha^2(k/T), max_beta).

    Args:
      s: offset that keeps the first betas away from 0, 0 ... 1 (0.008).
      max_beta: cap of the last betas (0.999).
      steps: T (1000).

    References: Nichol & Dhariwal, Improved DDPM, 2021, arXiv:2102.09672.
    """
    _check_steps("vp_cosine", steps)
    if not 0 <= s <= 1 or not 0 < max_beta < 1:
        raise ValueError(f"vp_cosine: s={s}, max_beta={max_beta}; allowed: 0 <= s <= 1 and 0 < max_beta < 1")
    return _from_log_alphas("vp_cosine", log_alphas(betas.cosine(s, max_beta, steps)))


@checked
def vp(
    schedule: str = "linear",
    beta_start: float = 1e-4,
    beta_end: float = 0.02,
    steps: int = 1000,
    trained: Sequence[float] | None = None,
    snr_shift: float = 1.0,
    terminal: float | None = None,
    between: Literal["log_alpha", "log_sigma"] = "log_alpha",
    prior_std: float = 1.0,
    precision: Literal["float64", "float32"] = "float64",
) -> Process:
    """Variance-preserving process of any schedule of betas that diffusers has.

    alpha_k^2 = prod_{j<=k} (1 - beta_j), sigma^2 = 1 - alpha^2.

    Args:
      schedule: "linear", "scaled_linear" (latent diffusion), "squaredcos_cap_v2" (the cosine of Improved DDPM),
        "sigmoid", "laplace" or "exp" (`difax.core.betas`).
      beta_start, beta_end: first and last beta of the first two and of "sigmoid", in (0, 1).
      steps: T, how many discrete steps, 1 ... 100000 (1000).
      trained: the betas themselves, in (0, 1), instead of all of these.
      snr_shift: by what alpha^2/sigma^2 is divided, 0.001 ... 1000 (1; 3 in CogVideoX 2B).
      terminal: if given, alpha is rescaled so that it is 0 at the last step (zero terminal SNR); its square there is
        then this, 0 ... 1e-3: 0 in the paper, 2^-24 in diffusers' schedulers of sigma.
      between: what is linear in t between the steps, log(alpha) or log(sigma/alpha); the latter is how schedulers of
        sigma find the step of a noise level.
      prior_std: standard deviation of x at the first time, 0.1 ... 10 (1).
      precision: "float32" rounds alpha^2 as diffusers does, of whose smallest sigma, where 1 - 0.9999 has three digits,
        that is another fourth digit. Without snr_shift.

    References: Ho et al. 2020, arXiv:2006.11239; Nichol & Dhariwal 2021, arXiv:2102.09672; Lin et al., Common Diffusion
    Noise Schedules and Sample Steps are Flawed, 2023, arXiv:2305.08891.
    """
    choose("vp: schedule", schedule, betas.SCHEDULES)
    if trained is not None:
        steps = len(trained)
    _check_steps("vp", steps)
    if not 0 < beta_start <= beta_end < 1:
        raise ValueError(f"vp: beta_start={beta_start}, beta_end={beta_end}; need 0 < beta_start <= beta_end < 1")
    if not 1e-3 <= snr_shift <= 1e3:
        raise ValueError(f"vp: snr_shift={snr_shift}; allowed: > 0, 0.001 ... 1000")
    if terminal is not None and not (0 <= terminal <= 1e-3 and steps > 2):
        raise ValueError(f"vp: terminal={terminal}; allowed: 0 ... 0.001, of 3 steps or more")
    if not 0.1 <= prior_std <= 10:
        raise ValueError(f"vp: prior_std={prior_std}; allowed: 0.1 ... 10")
    if trained is None:
        found = betas.SCHEDULES[schedule](beta_start, beta_end, steps)
    else:
        found = np.asarray(trained, np.float64)
        if not np.all((found > 0) & (found < 1)):
            raise ValueError(f"vp: trained={brief(list(trained))}; allowed: numbers between 0 and 1")
    if precision == "float32" and snr_shift != 1.0:
        raise ValueError(f"vp: precision='float32' with snr_shift={snr_shift}; allowed: float64, or no shift")
    log_alpha = log_alphas(found, snr_shift, terminal, precision)
    with np.errstate(invalid="ignore"):
        falls = np.diff(log_alpha, prepend=0.0) < 0
    falls[-1] |= terminal is not None  # which may lie above what the rescaling left of the step before
    if not falls.all():
        k = int(np.argmin(falls))
        raise ValueError(f"vp: beta {found[k]:g} of step {k} is lost in {precision}; allowed: larger ones")
    return _from_log_alphas("vp", log_alpha, between, prior_std)


def vp_sde(beta_min: float = 0.1, beta_max: float = 20.0, t_min: float = 1e-3) -> Process:
    """Continuous variance-preserving SDE with linear beta(t).

    log alpha(t) = -t^2 (beta_max - beta_min)/4 - t beta_min/2.

    Args:
      beta_min, beta_max: beta(0) and beta(1), 1e-6 ... 300 (0.1 and 20); the network is told 999 t.
      t_min: smallest time of grids in log-SNR (1e-3).

    References: Song et al., Score-Based Generative Modeling through SDEs, 2021, arXiv:2011.13456.
    """
    _check_sde("vp_sde", beta_min, beta_max, t_min)
    spread = beta_max - beta_min

    def level(t, xp=np):
        la = -0.25 * t**2 * spread - 0.5 * t * beta_min
        alpha, sigma = xp.exp(la), xp.sqrt(-xp.expm1(2 * la))
        # slopes along the model's time 999 t
        alpha_dot = alpha * (-0.5 * t * spread - 0.5 * beta_min) / 999.0
        return Level(alpha, sigma, alpha_dot, -alpha * alpha_dot / xp.maximum(sigma, 1e-12))

    def inverse(value):
        la = -0.5 * np.logaddexp(0.0, -2.0 * np.asarray(value, np.float64))
        # smaller root of spread t^2/4 + beta_min t/2 + la = 0, in the form that does not cancel
        return -4 * la / (beta_min + np.sqrt(beta_min**2 - 4 * spread * la))

    return Process("vp_sde", level, inverse, lambda t: t * 999.0, None, t_min, 1.0, 1.0)


@checked
def edm(
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    sigma_data: float = 1.0,
    told: Literal["log", "atan"] = "log",
    time_scale: float = 1.0,
    prior_std: float = 1.0,
) -> Process:
    """EDM's process in the coordinates in which its networks are called, x' = x/sqrt(sigma^2 + sigma_data^2).

    Of data in units of sigma_data that is a variance-preserving process,

      alpha = sigma_data/sqrt(sigma^2 + sigma_data^2), sigma' = sigma/sqrt(sigma^2 + sigma_data^2),

    sigma(t) = sigma_min (sigma_max/sigma_min)^t, and what a network returns is `edm` (or `v`, its negative). At t = 0
    alpha is sigma_data and sigma' 0: the sample that comes out is the data in its own units. Predictions x0 before that
    are in units of sigma_data.

    Args:
      sigma_min, sigma_max: noise levels at t_min and at t = 1, 1e-9 ... 1e6 (0.002 and 80).
      sigma_data: standard deviation of the data, 1e-3 ... 1e3 (1; 0.5 in the paper).
      told: the network is told log(sigma)/4 ("log", the paper's) or 2/pi atan(sigma) ("atan", Stable Audio's).
      time_scale: by which that is multiplied (1; 1000 in consistency models).
      prior_std: standard deviation of x' at t = 1, 0.1 ... 10 (1).

    References: Karras et al. (EDM), 2022, arXiv:2206.00364, table 1.
    """
    ratio = _log_range("edm", sigma_min, sigma_max)
    if not 1e-3 <= sigma_data <= 1e3:
        raise ValueError(f"edm: sigma_data={sigma_data}; allowed: 0.001 ... 1000")
    if not 0 < time_scale <= 1e6:
        raise ValueError(f"edm: time_scale={time_scale}; allowed: > 0, up to 1e6")
    if not 0.1 <= prior_std <= 10:
        raise ValueError(f"edm: prior_std={prior_std}; allowed: 0.1 ... 10")

    def noise(t, xp=np):
        return sigma_min * xp.exp(ratio * t)

    def level(t, xp=np):
        sigma = noise(t, xp)
        norm = xp.sqrt(sigma**2 + sigma_data**2)
        alpha, std = sigma_data / norm, sigma / norm
        # d sigma along the model's time, log(sigma)/4 or 2/pi atan(sigma)
        along = 4.0 * sigma if told == "log" else (1 + sigma**2) * (math.pi / 2)
        slope = along / norm**2 / time_scale
        clean = t <= 0
        return Level(
            xp.where(clean, sigma_data, alpha),
            xp.where(clean, 0.0, std),
            xp.where(clean, 0.0, -alpha * sigma * slope),
            xp.where(clean, 0.0, sigma_data**2 / norm * slope),
        )

    def model_time(t):
        own = 0.25 * (math.log(sigma_min) + ratio * t)
        if told == "atan":
            own = (jnp if isinstance(t, jax.Array) else np).arctan(noise(t, jnp if isinstance(t, jax.Array) else np))
            own = own * (2 / math.pi)
        return time_scale * own

    return Process(
        name="edm",
        level=level,
        inverse=lambda value: (math.log(sigma_data / sigma_min) - np.asarray(value, np.float64)) / ratio,
        model_time=model_time,
        steps=None,
        t_min=1e-9,
        t_max=1.0,
        prior_std=prior_std,
    )


def trig() -> Process:
    """x = cos(pi t/2) x0 + sin(pi t/2) eps, the network told t: the process of v-diffusion and of diffusers' IPNDM.

    References: Salimans & Ho, Progressive Distillation, 2022, arXiv:2202.00512.
    """

    def level(t, xp=np):
        alpha, sigma = xp.cos(t * (math.pi / 2)), xp.sin(t * (math.pi / 2))
        alpha = xp.where(t >= 1, 0.0, alpha)
        return Level(alpha, sigma, -sigma * (math.pi / 2), alpha * (math.pi / 2))

    return Process(
        name="trig",
        level=level,
        inverse=lambda value: 2 / math.pi * np.arctan(np.exp(-np.asarray(value, np.float64))),
        model_time=lambda t: t,
        steps=None,
        t_min=1e-3,
        t_max=1.0 - 1e-3,
        prior_std=1.0,
    )


def subvp(beta_min: float = 0.1, beta_max: float = 20.0, t_min: float = 1e-3) -> Process:
    """Sub-variance-preserving SDE: alpha(t) of `vp_sde`, and sigma = 1 - alpha^2, which is the square of its sigma.

    Args:
      beta_min, beta_max, t_min: as in `vp_sde`; the network is told 999 t. Data of unit variance have at t = 1 the
        standard deviation 1 - 2e-5 with the defaults, and sampling starts in 1.

    References: Song et al. 2021, arXiv:2011.13456, equation 34.
    """
    _check_sde("subvp", beta_min, beta_max, t_min)
    vp = vp_sde(beta_min, beta_max, t_min)

    def level(t, xp=np):
        alpha, sigma, alpha_dot, _ = vp.level(t, xp)
        return Level(alpha, sigma**2, alpha_dot, -2 * alpha * alpha_dot)

    def inverse(value):
        # alpha/(1 - alpha^2) = e^value is sinh(-log alpha) = e^-value/2
        la = -np.arcsinh(0.5 * np.exp(-np.asarray(value, np.float64)))
        with np.errstate(divide="ignore"):
            return vp.inverse(la - 0.5 * np.log(-np.expm1(2 * la)))

    return vp._replace(name="subvp", level=level, inverse=inverse)


def ve(sigma_min: float = 0.002, sigma_max: float = 80.0) -> Process:
    """Variance-exploding process: alpha = 1, sigma(t) = sigma_min (sigma_max/sigma_min)^t, and sigma(0) = 0.

    The network is told c_noise = log(sigma)/4, as in EDM. t_min = 1e-9 stands for the limit t -> 0+, where
    sigma = sigma_min, as opposed to the clean sample at t = 0.

    Args:
      sigma_min, sigma_max: noise levels at t_min and at t = 1, 1e-9 ... 1e6 (0.002 and 80).

    References: Song et al. 2021, arXiv:2011.13456; Karras et al. (EDM), 2022, arXiv:2206.00364.
    """
    ratio = _log_range("ve", sigma_min, sigma_max)

    def level(t, xp=np):
        sigma = xp.where(t > 0, sigma_min * xp.exp(ratio * t), 0.0)
        # along the model's time c = log(sigma)/4: d sigma/dc = 4 sigma
        return Level(xp.ones_like(sigma), sigma, xp.zeros_like(sigma), 4.0 * sigma)

    return Process(
        name="ve",
        level=level,
        inverse=lambda value: (-np.asarray(value, np.float64) - math.log(sigma_min)) / ratio,
        model_time=lambda t: 0.25 * (math.log(sigma_min) + ratio * t),
        steps=None,
        t_min=1e-9,
        t_max=1.0,
        prior_std=sigma_max,
    )


def flux_shift(shape: tuple[int, ...]) -> float:
    """FLUX.1 dev's time shift: exp(mu), mu linear in the image tokens n = H W / 4, 0.5 for 256 and 1.15 for 4096.

    Args:
      shape: (height, width, channels) of the latents; 4096 tokens are 1024 x 1024 pixels.

    References: Black Forest Labs 2024, https://github.com/black-forest-labs/flux.
    """
    tokens = shape[-3] * shape[-2] // 4
    return math.exp(0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256))


def wan_shift(shape: tuple[int, ...]) -> float:
    """Wan 2.1's time shift for text-to-video: 3 at 480p and 5 at 720p, in between and beyond exp of a line.

    3 (5/3)^((n - 6240)/(14400 - 6240)), n the latents of a frame, H W: 60 x 104 for 480p, 90 x 160 for 720p, however
    many frames. The authors give the two points; that log s is linear in n is FLUX's rule.

    Args:
      shape: (frames, height, width, channels) of the latents.

    References: Wan Team 2025, arXiv:2503.20314; https://github.com/Wan-Video/Wan2.1.
    """
    return 3.0 * (5.0 / 3.0) ** ((shape[-3] * shape[-2] - 60 * 104) / (90 * 160 - 60 * 104))


def qwen_image_shift(shape: tuple[int, ...]) -> float:
    """Qwen-Image's time shift: exp(mu), mu linear in the image tokens n = H W / 4, 0.5 for 256 and 0.9 for 8192.

    Args:
      shape: (height, width, channels) of the latents; 4096 tokens are 1024 x 1024 pixels.

    References: Qwen Team 2025, arXiv:2508.02324, whose scheduler also stretches the times so that the last is 0.02.
    """
    tokens = shape[-3] * shape[-2] // 4
    return math.exp(0.5 + (0.9 - 0.5) * (tokens - 256) / (8192 - 256))


def flux2_mu(tokens: int, steps: int) -> float:
    """Logarithm of FLUX.2's time shift, which its authors fitted to the image tokens n and the number of steps.

    On 10 steps it is 8.73809524e-5 n + 1.89833333, on 200 it is 0.00016927 n + 0.45666666, linear in the steps between
    and beyond; more than 4300 tokens have that of 200 whatever the steps.

    References: Black Forest Labs 2025, https://github.com/black-forest-labs/flux2 (`compute_empirical_mu`).
    """
    of_10, of_200 = 8.73809524e-05 * tokens + 1.89833333, 0.00016927 * tokens + 0.45666666
    return of_200 if tokens > 4300 else of_200 + (of_200 - of_10) * (steps - 200) / 190


def flux2_shift(shape: tuple[int, ...], steps: int = 50) -> float:
    """FLUX.2's time shift: exp(mu) of `flux2_mu`.

    Args:
      shape: (height, width, channels) of the latents behind 2 x 2 patches; 4096 tokens are 1024 x 1024 pixels.
      steps: of the run (50).
    """
    return math.exp(flux2_mu(shape[-3] * shape[-2], steps))


# name -> (shape of one sample) -> time shift
SHIFTS: dict[str, Callable[[tuple[int, ...]], float]] = {
    "flux": flux_shift,
    "wan": wan_shift,
    "qwen_image": qwen_image_shift,
    "flux2": flux2_shift,
    "flux2_distilled": partial(flux2_shift, steps=4),
}


def flow(
    shift: float | None = None,
    time_scale: float = 1000.0,
    shift_by: str | None = None,
    shape: tuple[int, ...] | None = None,
) -> Process:
    """Rectified flow: x_t = (1 - t) x0 + t eps, whose velocity dx/dt is eps - x0.

    Args:
      shift: time shift s, 0.001 ... 1000, t' = s t/(1 + (s - 1) t), applied by the `shifted` grid and to training times
        (1 = none; 3 in SD3). None is what `shift_by` says of the size, or 1 without it.
      time_scale: the network is told time_scale * t (1000, as SD3 and FLUX); slopes and velocity stay along t.
      shift_by: by whose rule the shift follows from the size of the samples, where `shift` is None: "flux", "wan",
        "qwen_image", "flux2" (of 50 steps) or "flux2_distilled" (of 4), the keys of `SHIFTS`.
      shape: of one sample, for that rule; a run gives its model's.

    Raises:
      ValueError: a shift or a scale that is not above 0, an unknown rule, or a rule without a shape.

    References: Liu et al., Rectified Flow, 2022, arXiv:2209.03003; Esser et al. (SD3), 2024, arXiv:2403.03206.
    """
    if shift_by is not None and shift_by not in SHIFTS:
        raise ValueError(f"flow: shift_by={shift_by!r}; allowed: {', '.join(SHIFTS)}, or none")
    if shift is None and shift_by is not None:
        if shape is None or len(shape) < 3:
            raise ValueError(f"flow: shift_by={shift_by!r} needs the shape of a sample, not {shape}; or give shift")
        shift = SHIFTS[shift_by](tuple(shape))
    if shape is not None and shift_by is None:
        raise ValueError(f"flow: shape={shape} without a rule that reads it; allowed: none, or shift_by too")
    shift = 1.0 if shift is None else shift
    check_shift("flow", shift)
    if not 0 < time_scale <= 1e6:
        raise ValueError(f"flow: time_scale={time_scale}; allowed: > 0, up to 1e6")

    def level(t, xp=np):
        one = xp.ones_like(t)
        return Level(1.0 - t, t, -one, one)

    return Process(
        name="flow",
        level=level,
        inverse=lambda value: 1.0 / (1.0 + np.exp(np.asarray(value, np.float64))),
        model_time=lambda t: time_scale * t,
        steps=None,
        t_min=1e-3,
        t_max=1.0 - 1e-3,
        prior_std=1.0,
        shift=shift,
    )


@checked
def sit(time_scale: float = 1.0) -> Process:
    """The linear path of SiT: `flow` whose network's time runs the other way, u = 1 - t, with velocity x0 - eps.

    Args:
      time_scale: the network is told time_scale * u, above 0 and up to 1e6 (1; 1000 with diffusers' inverted sigmas).

    References: Ma et al., SiT, 2024, arXiv:2401.08740.
    """

    def level(t, xp=np):
        one = xp.ones_like(t)
        return Level(1.0 - t, t, one, -one)

    if not 0 < time_scale <= 1e6:
        raise ValueError(f"sit: time_scale={time_scale}; allowed: > 0, up to 1e6")
    return flow()._replace(name="sit", level=level, model_time=lambda t: time_scale * (1.0 - t))


PROCESSES = {
    "vp_linear": vp_linear,
    "vp_cosine": vp_cosine,
    "vp_sde": vp_sde,
    "subvp": subvp,
    "ve": ve,
    "flow": flow,
    "sit": sit,
    "vp": vp,
    "edm": edm,
    "trig": trig,
}


def convert(output: jax.Array, kind: str, x: jax.Array, level: Level) -> tuple[jax.Array, jax.Array]:
    """Turns a network output of any kind into (x0, eps), given x = alpha x0 + sigma eps.

    velocity u = alpha_dot x0 + sigma_dot eps gives, with d = alpha sigma_dot - alpha_dot sigma,
    x0 = (sigma_dot x - sigma u)/d and eps = (alpha u - alpha_dot x)/d.

    Args:
      output: [B, ...] what the network returned (without variance channels).
      kind: a key of `PREDICTIONS`.
      x: [B, ...] the network's input.
      level: alpha, sigma and slopes, broadcastable against x. `eps` and `score` need alpha > 0, `x0` and
        `velocity` work at alpha = 0 too; sigma > 0 always.
    """
    alpha, sigma, alpha_dot, sigma_dot = level
    if kind == "eps":
        return (x - sigma * output) / alpha, output
    if kind == "x0":
        return output, (x - alpha * output) / sigma
    if kind == "score":
        eps = -sigma * output
        return (x - sigma * eps) / alpha, eps
    if kind == "edm":
        return convert(-output, "v", x, level)
    if kind == "v":
        norm = alpha**2 + sigma**2  # 1 for a VP process
        return (alpha * x - sigma * output) / norm, (sigma * x + alpha * output) / norm
    if kind == "velocity":
        d = alpha * sigma_dot - alpha_dot * sigma
        return (sigma_dot * x - sigma * output) / d, (alpha * output - alpha_dot * x) / d
    raise ValueError(f"unknown prediction {kind!r}; allowed: {', '.join(PREDICTIONS)}")


def target(kind: str, x0: jax.Array, eps: jax.Array, level: Level) -> jax.Array:
    """What a network of that prediction kind should return for (x0, eps): the inverse of `convert`."""
    alpha, sigma, alpha_dot, sigma_dot = level
    if kind == "eps":
        return eps
    if kind == "x0":
        return x0
    if kind == "score":
        return -eps / sigma
    if kind == "v":
        return alpha * eps - sigma * x0
    if kind == "edm":
        return sigma * x0 - alpha * eps
    if kind == "velocity":
        return alpha_dot * x0 + sigma_dot * eps
    raise ValueError(f"unknown prediction {kind!r}; allowed: {', '.join(PREDICTIONS)}")


def split_variance(output: jax.Array, learn_sigma: bool) -> tuple[jax.Array, jax.Array | None]:
    """Separates DiT's 2C output channels into the prediction and the variance channels (None without them)."""
    if not learn_sigma:
        return output, None
    channels = output.shape[-1] // 2
    return output[..., :channels], output[..., channels:]


def learned_log_variance(variance: jax.Array, log_beta: Array, log_beta_tilde: Array) -> jax.Array:
    """Improved DDPM's log-variance: w log(beta) + (1 - w) log(beta~), w = (variance + 1)/2.

    References: Nichol & Dhariwal 2021, arXiv:2102.09672, equation 15.
    """
    w = (variance + 1) / 2
    return w * log_beta + (1 - w) * log_beta_tilde


def predict(
    output: jax.Array, kind: str, learn_sigma: bool, x: jax.Array, level: Level, process: Process | None = None
) -> Prediction:
    """Splits off the variance channels and converts the rest: network output -> `Prediction`, in float32 or wider.

    process: that the level is of, where it may have a conversion of its own.
    """
    output = output.astype(jnp.promote_types(output.dtype, jnp.float32))
    main, variance = split_variance(output, learn_sigma)
    own = None if process is None else process.augmented
    x0, eps = (convert if own is None else own.convert)(main, kind, x, level)
    return Prediction(x0, eps, variance)


MOST_STEPS = 100_000  # of a discrete process: each is tabulated on the host


def check_shift(name: str, shift: float) -> None:
    """Refuses a time shift with which times fall together, or which is none."""
    if not 1e-3 <= shift <= 1e3:
        raise ValueError(f"{name}: shift={shift}; allowed: > 0, 0.001 ... 1000")


def _log_range(name: str, sigma_min: float, sigma_max: float) -> float:
    if not 1e-9 <= sigma_min < sigma_max <= 1e6:
        raise ValueError(
            f"{name}: sigma_min={sigma_min}, sigma_max={sigma_max}; allowed: 1e-9 <= sigma_min < sigma_max <= 1e6"
        )
    return math.log(sigma_max / sigma_min)


def _check_sde(name: str, beta_min: float, beta_max: float, t_min: float) -> None:
    if not 1e-6 <= beta_min <= beta_max <= 300:  # beyond that alpha(1) is 0 in float32
        raise ValueError(
            f"{name}: beta_min={beta_min}, beta_max={beta_max}; allowed: 1e-6 <= beta_min <= beta_max <= 300"
        )
    if not 0 < t_min < 1:
        raise ValueError(f"{name}: t_min={t_min}; need 0 < t_min < 1")


def _check_steps(name: str, steps: int) -> None:
    if not 1 <= steps <= MOST_STEPS:
        raise ValueError(f"{name}: steps={steps}; allowed: 1 ... {MOST_STEPS}")
