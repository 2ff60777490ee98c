"""TeaCache. Liu et al., Timestep Embedding Tells: It's Time to Cache for Video Diffusion Model, 2024."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from difax.accel.caches import measured, published
from difax.accel.caches.gate import ASK, COMPUTE, gated, rule
from difax.core.annotations import checked
from difax.core.contracts import Accelerator

# published by the authors, highest power first
COEFFICIENTS = {name: tuple(fit["coefficients"]) for name, fit in published.table("teacache").items()}


@checked
def teacache(
    threshold: float = 0.1,
    coefficients: str | tuple[float, ...] | None = None,
    *,
    probe: str | None = None,
    file: str | None = None,
    per_sample: bool = False,
    dtype: str | None = None,
) -> Accelerator:
    """Skips all blocks while the modulated input of the first has changed little since they last ran.

    acc += P(mean|m - m'| / mean|m'|), m the modulated input of the first block (or what the model makes of the time
    alone) and m' that of the evaluation before;
    reuse iff acc < threshold: tokens += the whole stack's last residual; else compute and acc = 0. The first and the
    last evaluation are always computed.

    Args:
      threshold: of the accumulated, rescaled change; 0 never reuses (0.1 to 0.2 in the authors' evaluation; FLUX 0.25
        to 0.8).
      coefficients: of the polynomial P, highest power first, or the name of a published one (`COEFFICIENTS`); None is
        P(d) = d. They belong to one model: `difax calibrate --cache teacache` fits them to another.
      probe: what m is: "input", the modulated input of the first block; "time", the time's embedding, or "modulation",
        what all blocks modulate by, of models that tell them (Wan). None: what the published coefficients were fitted
        to, else "input".
      file: written by `difax calibrate`, in place of coefficients.
      per_sample: every sample decides for itself, so that sample i is that of a batch of one, to rounding; without it
        one decision serves the batch, so that an image depends on its companions.
      dtype: of the residual that is kept; None is the model's.

    Returns:
      An `Accelerator` that remembers the modulated input in float32 and one residual of the tokens.

    References: Liu et al. 2024, arXiv:2411.19108. One number decides for the whole batch, as in the authors' code.
      Their Wan with "ret_steps" computes the first five steps always, and the last if it likes; here it is the first
      and the last, as without.
    """
    if not threshold >= 0:
        raise ValueError(f"teacache: threshold={threshold}; allowed: 0 or more")
    polynomial = _polynomial(coefficients, file)
    named = isinstance(coefficients, str)
    if probe is None:
        probe = (named and published.entry("teacache", "coefficients", str(coefficients))[1]["input"]) or "input"
    if probe not in ("input", "time", "modulation"):
        raise ValueError(f"teacache: probe={probe!r}; allowed: input, time, modulation")

    def rules(rows, stages):
        force = np.full(len(rows.i), ASK)
        force[[0, -1]] = COMPUTE
        return rule(rows, force, threshold)

    made = gated(
        "teacache",
        rules,
        probe=probe,
        transform=lambda d: jnp.polyval(jnp.asarray(polynomial, d.dtype), d),
        accumulate=True,
        refresh="always",
        per_sample=per_sample,
        dtype=dtype,
    )
    says = published.says("teacache", "coefficients", coefficients) if named else measured.record("teacache", file)
    return made._replace(measured=says)


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
        return COEFFICIENTS[published.entry("teacache", "coefficients", coefficients)[0]]
    return tuple(measured.numbers("teacache: coefficients, highest power first", coefficients).tolist())
