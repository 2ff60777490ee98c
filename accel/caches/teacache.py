"""TeaCache. Liu et al., Timestep Embedding Tells: It's Time to Cache for Video Diffusion Model, 2024."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from difax.accel.caches import measured
from difax.accel.caches.gate import ASK, COMPUTE, gated, rule
from difax.core.annotations import checked
from difax.core.contracts import Accelerator

# published by the authors, highest power first; those of Wan are in their documentation only
COEFFICIENTS = {
    "flux": (498.651651, -283.781631, 55.8554382, -3.82021401, 0.264230861),
    "hunyuan_video": (733.226126, -401.131952, 67.5869174, -3.149878, 0.0961237896),
    "ltx_video": (21.4700694, -12.8016453, 2.31279151, 0.792487521, 0.00969274326),
    "lumina_next": (393.76566581, -603.50993606, 209.10239044, -23.00726601, 0.86377344),
    "mochi": (-3512.41319, 811.675948, -60.9400215, 2.42429681, 0.00305291719),
    "cogvideox_2b": (-31.0658903, 25.4732368, -5.92380459, 1.75769064, -0.00361568434),
    "cogvideox_5b": (-1538.80483, 843.202495, -134.363087, 7.97131516, -0.0523162339),
    "latte": (-2464.34137, 308.044764, 80.7447667, -4.11385132, 0.111001402),
    "open_sora": (217.546007, -118.329252, 26.8662585, -0.0459364272, 0.048442624),
    "open_sora_plan": (205943.668, -14875.9286, 306.085986, 1.3141808, 0.00238659469),
    "wan2_1_1.3b": (-52186.2437, 9230.41404, -528.275948, 13.6987616, -0.0499875664),
    "wan2_1_14b": (-303318.725, 49053.7029, -2655.30556, 58.7365115, -0.315583525),
}


@checked
def teacache(
    threshold: float = 0.1,
    coefficients: str | tuple[float, ...] | None = None,
    *,
    file: str | None = None,
    per_sample: bool = False,
    dtype: str | None = None,
) -> Accelerator:
    """Skips all blocks while the modulated input of the first has changed little since they last ran.

    acc += P(mean|m - m'| / mean|m'|), m the modulated input of the first block and m' that of the evaluation before;
    reuse iff acc < threshold: tokens += the whole stack's last residual; else compute and acc = 0. The first and the
    last evaluation are always computed.

    Args:
      threshold: of the accumulated, rescaled change; 0 never reuses (0.1 to 0.2 in the authors' evaluation; FLUX 0.25
        to 0.8).
      coefficients: of the polynomial P, highest power first, or the name of a published one (`COEFFICIENTS`); None is
        P(d) = d. They belong to one model: `difax calibrate --cache teacache` fits them to another.
      file: written by `difax calibrate`, in place of coefficients.
      per_sample: every sample decides for itself, so that sample i is that of a batch of one, to rounding; without it
        one decision serves the batch, so that an image depends on its companions.
      dtype: of the residual that is kept; None is the model's.

    Returns:
      An `Accelerator` that remembers the modulated input in float32 and one residual of the tokens.

    References: Liu et al. 2024, arXiv:2411.19108. One number decides for the whole batch, as in the authors' code.
    """
    if not threshold >= 0:
        raise ValueError(f"teacache: threshold={threshold}; allowed: 0 or more")
    polynomial = _polynomial(coefficients, file)

    def rules(rows, stages):
        force = np.full(len(rows.i), ASK)
        force[[0, -1]] = COMPUTE
        return rule(rows, force, threshold)

    made = gated(
        "teacache",
        rules,
        transform=lambda d: jnp.polyval(jnp.asarray(polynomial, d.dtype), d),
        accumulate=True,
        refresh="always",
        per_sample=per_sample,
        dtype=dtype,
    )
    return made._replace(measured=measured.record("teacache", file))


def _polynomial(coefficients: str | tuple[float, ...] | None, file: str | None) -> tuple[float, ...]:
    if file is not None:
        if coefficients is not None:
            raise ValueError("teacache: coefficients and file were both given; allowed: one of them")
        content = measured.read("teacache", file, ("coefficients",))
        return tuple(
            measured.numbers(f"{measured.source('teacache', file)}: coefficients", content["coefficients"]).tolist()
        )
    if coefficients is None:
        return (1.0, 0.0)
    if isinstance(coefficients, str):
        if coefficients not in COEFFICIENTS:
            raise ValueError(f"teacache: coefficients={coefficients!r}; allowed: numbers, or {', '.join(COEFFICIENTS)}")
        return COEFFICIENTS[coefficients]
    return tuple(measured.numbers("teacache: coefficients, highest power first", coefficients).tolist())
