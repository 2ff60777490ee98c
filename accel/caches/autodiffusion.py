"""AutoDiffusion's skipped blocks. Li et al., AutoDiffusion, 2023, arXiv:2309.10438."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from difax.accel.caches import measured
from difax.accel.caches.probe import check_blocks
from difax.core.annotations import brief, checked
from difax.core.contracts import Accelerator, Plan, Row, Stage, State, Tokens, Where
from difax.core.fold import Block
from difax.core.stack import indexed


@checked
def autodiffusion(skip: Sequence[Sequence[int]] | None = None, *, file: str | None = None) -> Accelerator:
    """Leaves out, at each evaluation, the blocks that a list names: they add nothing to the tokens.

    Args:
      skip: for each evaluation the blocks that are left out, counted over all stages.
      file: in place of it, what `difax calibrate --grid autodiffusion` found, whose times the grid `measured` reads.

    Returns:
      An `Accelerator` that remembers nothing. Which blocks are left out are numbers in the rows: other lists of as many
      evaluations need no new compilation.

    References: Li et al. 2023, arXiv:2309.10438; https://github.com/lilijiangg/AutoDiffusion.
    """
    if (skip is None) == (file is None):
        given = "nothing" if file is None else "skip and file"
        raise ValueError(f"autodiffusion: {given} was given; allowed: skip, or a file of difax calibrate --grid")
    if file is not None:
        skip = measured.read("autodiffusion", file, ("skip",))["skip"]
    source, says = measured.source("autodiffusion", file), measured.record("autodiffusion", file)
    rows_of = skip if isinstance(skip, (list, tuple)) else ()
    whole = all(isinstance(row, (list, tuple)) and all(type(b) is int for b in row) for row in rows_of)
    if not rows_of or not whole:
        raise ValueError(f"{source}: skip={brief(skip)}; allowed: a list of blocks for each evaluation")

    def plan(rows: Row, stages: tuple[Stage, ...]) -> Plan:
        measured.same_length(source, len(rows_of), len(rows.i))
        depth = sum(stage.depth for stage in stages)
        left = np.zeros((len(rows_of), depth), bool)
        for i, blocks in enumerate(rows_of):
            check_blocks(source, f"skip[{i}]", blocks, depth)
            left[i, list(blocks)] = True
        cuts = np.cumsum([stage.depth for stage in stages])[:-1]
        of = {s.name: part for s, part in zip(stages, np.split(left, cuts, 1), strict=True)}
        return Plan(**indexed([()] * len(rows_of)), values=of, owner="autodiffusion")

    def block(run: Block, where: Where, tokens: Tokens, own: State, inner: State, row: Row) -> Any:
        left = row.plan.values[where.stage][where.layer]
        out, inner, done = jax.lax.cond(left, lambda t, i: run.skip(t, i), lambda t, i: run(t, i), tokens, inner)
        return out, own, inner, done

    return Accelerator(name="autodiffusion", plan=plan, block=block, measured=says, planned=True)
