"""The engine of the linear solvers: each evaluation maps what is known, linearly, to the next x and to what is kept.

  (x', slots') = W (x, x0, eps, slots, z_1, ...)

x0 and eps are the two forms of the network's prediction at x, z standard normal noise, slots whatever the method keeps:
past predictions, the start of a step, an earlier stage. Multistep, single-step and predictor-corrector methods differ
in their tables W [E, outputs, inputs] alone, which are made in float64 on the host. Of a process of position and
velocity each of these has two parts, halves of the channels, and a weight is a number or a matrix of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from difax.core import noise
from difax.core.contracts import Array, Row, Solver
from difax.core.grids import check_times, lay_rows
from difax.core.mixing import mix
from difax.core.process import Process

PREDICTED = ("x", "x0", "eps")


@flax.struct.dataclass
class LinearTable:
    """W of a run. weights: [E, outputs, inputs]; used: for each output the inputs that any evaluation gives a weight,
    negative (-1 - input) for an output that is one input as it is in all of them. parts: of each output and input, one
    after another in both axes."""

    weights: Array
    used: tuple[tuple[int, ...], ...] = flax.struct.field(pytree_node=False)
    parts: int = flax.struct.field(pytree_node=False, default=1)


class Steps:
    """A table under construction, one `row` an evaluation.

    Args:
      slots: names of what the method keeps, all zero before the first evaluation.
      noises: how many independent draws z1, z2, ... an evaluation may use.
      parts: of x, and of all that is like it.
    """

    def __init__(self, slots: Sequence[str] = (), noises: int = 0, parts: int = 1):
        self.parts = parts
        self.outputs = ("x", *slots)
        self.inputs = (*PREDICTED, *slots, *(f"z{k + 1}" for k in range(noises)))
        self.t: list[float] = []
        self.step: list[int] = []
        self.weights: list[np.ndarray] = []

    def row(self, t: float, step: int, x: Mapping[str, Any], **slots: Mapping[str, Any]) -> None:
        """One evaluation.

        Args:
          t: the time at which the network is evaluated, on the x that the row before made. step: the solver step.
          x: {input: weight} of the next x. slots: the same for the slots that change; the others are kept. A weight of
          several parts is a number, of each, or [parts, parts].
        """
        w = np.zeros((len(self.outputs), len(self.inputs), self.parts, self.parts))
        for o, name in enumerate(self.outputs):
            given = x if name == "x" else slots.pop(name, {name: 1.0})
            for key, value in given.items():
                w[o, self.inputs.index(key)] += value * np.eye(self.parts) if np.ndim(value) == 0 else value
        if slots:
            raise KeyError(f"no such slot: {', '.join(slots)}")
        self.t.append(float(t))
        self.step.append(step)
        self.weights.append(w.swapaxes(1, 2).reshape(len(w) * self.parts, -1))

    def rows(self, process: Process) -> Row:
        """The rows of the run."""
        table = tabulated(np.stack(self.weights), self.parts)
        return lay_rows(process, np.asarray(self.t), np.asarray(self.step), table)


def tabulated(w: np.ndarray, parts: int = 1) -> LinearTable:
    """The table of weights [E, outputs, inputs]."""
    return LinearTable(w, tuple(_used(w[:, o]) for o in range(w.shape[1])), parts)


def _used(w: np.ndarray) -> tuple[int, ...]:
    """Of one output's weights [E, inputs]: as `LinearTable.used` has it."""
    some = np.flatnonzero(w.any(0))
    return (-1 - int(some[0]),) if len(some) == 1 and np.all(w[:, some[0]] == 1) else tuple(map(int, some))


def linear(
    lay: Callable[[Steps, Process, np.ndarray], None],
    slots: Sequence[str] = (),
    noises: int = 0,
    bound: Callable[[jax.Array], jax.Array] | None = None,
    follows: bool = True,
    augmented: bool = False,
) -> Solver:
    """A solver from a function that lays out its table.

    Args:
      lay(steps, process, times): gives `steps` one row an evaluation, for decreasing times [n + 1]; raises ValueError
        for times that the method cannot use.
      slots, noises: of `Steps`. Noise is drawn where a weight of it is not zero in all evaluations.
      bound: x0 -> x0, what is made of the data prediction before the step (clipping, dynamic thresholding).
      follows: is eps then that of the bounded x0, or as it was predicted.
      augmented: does it take processes of position and velocity, for which its weights are matrices.

    Returns:
      A `Solver` whose state is the slots, a tuple of arrays like x.
    """

    def grid(process: Process, times: np.ndarray) -> Row:
        check_times(times)
        steps = Steps(slots, noises, 1 if process.augmented is None else len(process.augmented.prior_std))
        lay(steps, process, times)
        return steps.rows(process)

    def step(prediction, x, state, row, keys):
        c, x0, eps = row.coefficients, prediction.x0, prediction.eps
        if bound is not None:
            x0 = bound(x0)
            eps = (x - row.level.alpha * x0) / row.level.sigma if follows else eps
        known = [x, x0, eps, *state]
        inputs = {(i if i >= 0 else -1 - i) // c.parts for used in c.used for i in used}
        drawn = sorted(i for i in inputs if i >= len(known))
        values = dict(enumerate(known)) | {i: draw(keys, x, i - len(known)) for i in drawn}
        if c.parts > 1:
            halves = {i: jnp.split(value, c.parts, -1) for i, value in values.items()}
            values = {i * c.parts + p: part for i, parts in halves.items() for p, part in enumerate(parts)}
        weights, like = jnp.asarray(c.weights), values[0]

        def weight(o: int, i: int) -> jax.Array:
            w = weights[..., o, i]  # of all samples, or of each
            return w.reshape(*w.shape, *(1,) * (x.ndim - w.ndim)) if w.ndim else w

        def output(o: int) -> jax.Array:
            used = c.used[o]
            if len(used) == 1 and used[0] < 0:
                return jnp.asarray(values[-1 - used[0]], x.dtype)
            return mix([values[i] for i in used], [weight(o, i) for i in used], like)

        found = list(map(output, range(len(c.used))))
        if c.parts > 1:
            found = [jnp.concatenate(found[o : o + c.parts], -1) for o in range(0, len(found), c.parts)]
        new, *kept = found
        return new, tuple(kept)

    return Solver(grid, lambda x: tuple(jnp.zeros_like(x) for _ in slots), step, augmented=augmented)


def draw(keys: jax.Array, x: jax.Array, k: int) -> jax.Array:
    """The k-th independent standard normal noise of an evaluation, like x; the first is drawn from its keys as is."""
    return noise.normal_like(keys if k == 0 else noise.fold(keys, k), x)
