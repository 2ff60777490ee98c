"""DuoDiff. Fernandez et al., Accelerating Diffusion Models with a Dual-Backbone Approach, 2024, arXiv:2410.09633."""

from __future__ import annotations

from typing import Any

import numpy as np

from difax.core.annotations import checked
from difax.core.contracts import Accelerator, Network, Plan, Row, Stage, State
from difax.core.stack import indexed


@checked
def duodiff(switch: float = 0.6, weights: str | None = None, network: Network | None = None) -> Accelerator:
    """Runs a second, shallow network at the first evaluations, where t > switch, and the model behind them.

    Nothing is remembered or filled: at either end of `switch` the run is that of one network alone.

    Args:
      switch: process time, 0 (the shallow network throughout) ... 1 (the model throughout). 0.6 is ours: the paper's
        switch is a fixed step of 1000 for each data set.
      weights: of the second network, trained for the same process and prediction: a run's folder or a .safetensors file
        of difax, which says its depth and width; a name of embedded weights.
      network: what a run reads from `weights`.

    Returns:
      An `Accelerator` with one other network.

    Raises:
      ValueError: a switch out of range, or no second network.

    References: Fernandez et al. 2024, section 4 (a U-ViT of 3 layers before one of 13); here both are any model.
    """
    if not 0 <= switch <= 1:
        raise ValueError(f"duodiff: switch={switch}; allowed: 0 ... 1")
    if network is None:
        raise ValueError(
            f"duodiff: weights={weights}; allowed: a run's folder or a .safetensors file of a second network"
        )

    def plan(rows: Row, stages: tuple[Stage, ...]) -> Plan:
        return Plan(**indexed([int(t > switch) for t in np.asarray(rows.t)]), owner="duodiff")

    def output(run: Any, state: State, memory: State, row: Row) -> Any:
        value, memory, report = run(memory, row.plan.mode)
        return value, state, memory, report, 1.0

    return Accelerator(name="duodiff", plan=plan, output=output, networks=(network,))
