"""Two networks of one geometry, each for its own range of noise, as Wan 2.2's.

Wan Team, Wan: Open and Advanced Large-Scale Video Generative Models, 2025, arXiv:2503.20314, and Wan-Video/Wan2.2.
"""

from __future__ import annotations

import numpy as np

from difax.core.annotations import checked
from difax.core.contracts import Accelerator, Network, Plan, Row, Stage
from difax.core.stack import indexed

LONGEST = 1000.0  # the model time of pure noise


@checked
def experts(boundary: float = 0.875, weights: str | None = None, network: Network | None = None) -> Accelerator:
    """Runs the model where the noise is strong, and a second set of weights of the same model where it is weak.

    The model's own weights serve evaluations whose model time is 1000 boundary or more, the others those below it: the
    switch is known before the run, and both are arguments of the one program. What else accelerates the model acts on
    both, and the first evaluation behind the switch is `fresh`: nothing that one of them computed is reused with the
    other.

    Args:
      boundary: 0 (the model throughout) ... 1 (the second one, but at pure noise); a pipeline's `boundary_ratio`
        (0.875 in Wan 2.2's text-to-video, 0.9 in its image-to-video).
      weights: of the network for weak noise, of the model's own geometry: a published folder (`transformer_2`), a run's
        folder or a .safetensors file of difax.
      network: what a run reads from `weights`.

    Returns:
      An `Accelerator` with one other network, which shares the model's blocks.

    Raises:
      ValueError: a boundary out of range, or no second network.

    References: Wan-Video/Wan2.2, README, "Mixture-of-Experts"; diffusers' WanPipeline, `boundary_ratio`.
    """
    if not 0 <= boundary <= 1:
        raise ValueError(f"experts: boundary={boundary}; allowed: 0 ... 1")
    if network is None:
        raise ValueError(f"experts: weights={weights}; allowed: a folder or file with the second network's weights")

    def which(rows: Row) -> np.ndarray:
        return (np.asarray(rows.model_time) < LONGEST * boundary).astype(np.int32)

    def plan(rows: Row, stages: tuple[Stage, ...]) -> Plan:
        return Plan(**indexed(which(rows).tolist()), owner="experts")

    def fresh(rows: Row) -> Row:
        other = which(rows)
        return rows._replace(fresh=np.asarray(rows.fresh, bool) | (other != np.append(other[:1], other[:-1])))

    return Accelerator(
        name="experts",
        plan=plan,
        networks=(network._replace(shared=True),),
        network=lambda row: row.plan.mode,
        fresh=fresh,
    )
