"""What drives the evaluations of a run: the rows one after another, the solver as it goes, or several rows at once.

  scan    rows[0], rows[1], ...: times and order are known before the run
  while   the solver asks for the time of each sample's next evaluation, at most as many as there are rows
  window  the solver asks for several rows of each sample, evaluated in one batch, until it has them all

These are the only loops of a run. Everything that a loop hands to the network goes through one function,
`evaluate(x, row, guide_state, memory) -> (prediction, guide_state, memory, trace)`, which `difax.core.sample` makes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from difax.core import noise
from difax.core.contracts import Accelerator, Row, Solver, Trace
from difax.core.process import Process

Evaluate = Callable[..., tuple[Any, Any, Any, Trace]]


class Run(NamedTuple):
    """What a drive is given: the solver, its process, `evaluate`, the rows and the keys [B] of the samples."""

    solver: Solver
    process: Process
    evaluate: Evaluate
    rows: Row
    keys: jax.Array
    remat: bool = False


def width(solver: Solver, rows: Row) -> int:
    """W: the rows of each sample that are evaluated at once; 1 but for a window."""
    return len(rows.i) if solver.window is None else min(solver.window, len(rows.i))


def evaluations(solver: Solver, rows: Row, trace: Trace) -> float:
    """Evaluations of the network that a sample took, in the mean over the samples: rows, not steps; halves of guidance
    count as one. Those that were made beside it for slower samples of its batch are not its own."""
    return len(rows.i) if solver.drive == "scan" else width(solver, rows) * float(np.sum(trace.live))


def check_drive(solver: Solver, rows: Row, accelerator: Accelerator) -> None:
    """Refuses what cannot act under a solver's drive.

    Args:
      rows: of the run, with the plans of the guide and the accelerator.

    Raises:
      ValueError: an unknown drive; a cache, a guidance of some evaluations only, or derivatives that do not go with it.
    """
    if solver.drive not in DRIVES:
        raise ValueError(f"solver: drive={solver.drive!r}; allowed: {', '.join(DRIVES)}")
    name = accelerator.name
    acts = any(part is not None for part in (accelerator.output, accelerator.trunk, accelerator.block))
    acts = acts or accelerator.branch is not None or accelerator.guide is not None
    planned = len(rows.plan.modes) > 1 or accelerator.planned
    planned = planned or accelerator.guide is not None or accelerator.lookup is not None
    planned = planned or accelerator.network is not None
    if solver.derivatives and acts:
        raise ValueError(f"cache {name} with a solver that differentiates the network; allowed: cache none")
    if solver.head is not None and accelerator.output is not None:
        raise ValueError(f"cache {name} acts on the output, and this solver reads the tokens too; allowed: cache none")
    if solver.drive == "scan":
        return
    if solver.drive == "while" and planned:
        raise ValueError(
            f"cache {name} plans what each evaluation computes, and this solver decides in the run which there are; "
            "allowed: none, or a cache that decides in the run too, such as teacache"
        )
    if solver.drive == "window" and (acts or accelerator.network is not None):
        raise ValueError(
            f"cache {name} goes from one evaluation to the next, and this solver makes {width(solver, rows)} at once; "
            "allowed: cache none"
        )
    tables = map(np.asarray, jax.tree.leaves(rows.guide))
    if any(np.any(a != a[:1]) for a in tables) or rows.guided.any() != rows.guided.all():
        raise ValueError(
            "guide: guidance that differs from evaluation to evaluation, and a solver that does not take them one by "
            "one; allowed: guide cfg over the whole interval, or none"
        )


def scan(run: Run, x: jax.Array, guide_state: Any, memory: Any) -> tuple[jax.Array, Trace]:
    """The rows in order, `lax.scan`."""
    solver, keys = run.solver, run.keys

    def body(carry, row):
        x, state, guide_state, memory, keys = carry
        prediction, guide_state, memory, trace = run.evaluate(x, row, guide_state, memory)
        # evaluation i draws from index i + 1; index 0 made the initial noise
        x, state = solver.step(prediction, x, state, row, noise.fold(keys, row.i + 1))
        return (x, state, guide_state, memory, keys), trace

    carry = (x, solver.init(x), guide_state, memory, keys)
    (x, *_), trace = jax.lax.scan(jax.checkpoint(body) if run.remat else body, carry, run.rows)
    return x, trace


def whilst(run: Run, x: jax.Array, guide_state: Any, memory: Any) -> tuple[jax.Array, Trace]:
    """Evaluations until no sample asks for one, `lax.while_loop`; a sample that is done stays as it is, and is
    evaluated beside the others until the last is done."""
    solver, most, ask = run.solver, len(run.rows.i), run.solver.ask
    assert ask is not None

    def row_at(count, t):
        row = jax.tree.map(lambda a: a[jnp.minimum(count, most - 1)], run.rows)
        # tables of a process are wider than x where jax has 64 bits
        level, model_time = jax.tree.map(
            lambda a: a.astype(x.dtype), (run.process.level(t, jnp), run.process.model_time(t))
        )
        level = jax.tree.map(lambda a: per_sample(a, x.ndim), level)
        return row._replace(t=t, model_time=model_time, level=level)

    def evaluated(x, state, guide_state, memory, row, live):
        prediction, guide_state, memory, trace = run.evaluate(x, row, guide_state, memory)
        new, kept = solver.step(prediction, x, state, row, noise.fold(run.keys, row.i + 1))
        x, state = kept_where(live, (new, kept), (x, state))
        return x, state, guide_state, memory, trace._replace(live=live.mean(dtype=jnp.float32))

    def body(carry):
        count, t, live, x, state, guide_state, memory, traces = carry
        row = row_at(count, t)
        x, state, guide_state, memory, trace = evaluated(x, state, guide_state, memory, row, live)
        t, more = ask(x, state, row_at(count + 1, t))
        return count + 1, t, live & more, x, state, guide_state, memory, _put(traces, trace, count)

    state = solver.init(x)
    zero = jnp.zeros(len(x), x.dtype)
    t, live = ask(x, state, row_at(0, zero))
    start = (x, state, guide_state, memory, row_at(0, t), live)
    traces = _empty(jax.eval_shape(evaluated, *start)[-1], most)
    carry = (jnp.int32(0), t, live, x, state, guide_state, memory, traces)
    more = lambda carry: (carry[0] < most) & jnp.any(carry[2])  # noqa: E731
    _, _, live, x, *_, traces = jax.lax.while_loop(more, body, carry)
    return x, traces._replace(unfinished=live.mean(dtype=jnp.float32))


def window(run: Run, x: jax.Array, guide_state: Any, memory: Any) -> tuple[jax.Array, Trace]:
    """Several rows of each sample in one batch, until every sample has its last: at most as often as there are rows."""
    solver, rows, most, wide = run.solver, run.rows, len(run.rows.i), width(run.solver, run.rows)
    ask = solver.ask
    assert ask is not None
    batch, shape = len(x), x.shape[1:]

    def evaluated(x, state, guide_state, memory):
        points, index, live = ask(state, rows)
        flat, at = points.reshape(batch * wide, *shape), index.reshape(-1)
        here = lambda a: per_sample(a[at], x.ndim)  # noqa: E731
        row = Row(
            i=at,
            step=rows.step[at],
            t=rows.t[at],
            model_time=rows.model_time[at],
            level=jax.tree.map(here, rows.level),
            coefficients=(),
            guided=rows.guided[0],
            fresh=rows.fresh[0],
            plan=jax.tree.map(lambda a: a[0], rows.plan),
            guide=jax.tree.map(lambda a: a[0], rows.guide),
        )
        prediction, guide_state, memory, trace = run.evaluate(flat, row, guide_state, memory)
        several = lambda a: a.reshape(batch, wide, *a.shape[1:])  # noqa: E731
        row = jax.tree.map(lambda a: several(a[at]), rows._replace(plan=(), guide=()))
        keys = jax.vmap(lambda key, at: jax.vmap(lambda i: jax.random.fold_in(key, i + 1))(at))(run.keys, index)
        new, kept = solver.step(jax.tree.map(several, prediction), points, state, row, keys)
        x, state = kept_where(live, (new, kept), (x, state))
        computed, entered, halves = jax.tree.map(lambda a: wide * a, (trace.computed, trace.entered, trace.halves))
        trace = trace._replace(computed=computed, entered=entered, halves=halves, live=live.mean(dtype=jnp.float32))
        return x, state, guide_state, memory, trace

    def body(carry):
        count, _, x, state, guide_state, memory, traces = carry
        x, state, guide_state, memory, trace = evaluated(x, state, guide_state, memory)
        live = ask(state, rows)[2]
        return count + 1, live, x, state, guide_state, memory, _put(traces, trace, count)

    state = solver.init(x, rows)
    traces = _empty(jax.eval_shape(evaluated, x, state, guide_state, memory)[-1], most)
    carry = (jnp.int32(0), jnp.ones(batch, bool), x, state, guide_state, memory, traces)
    more = lambda carry: (carry[0] < most) & jnp.any(carry[1])  # noqa: E731
    _, live, x, *_, traces = jax.lax.while_loop(more, body, carry)
    return x, traces._replace(unfinished=live.mean(dtype=jnp.float32))


def per_sample(a: jax.Array, ndim: int) -> jax.Array:
    """Numbers [B] that multiply what leads with [B] and has so many axes."""
    return a.reshape(*a.shape, *(1,) * (ndim - a.ndim))


def kept_where(live: jax.Array, new: Any, old: Any) -> Any:
    """New leaves of the samples [B] that are live, old ones of the others."""
    return jax.tree.map(lambda n, o: jnp.where(per_sample(live, n.ndim), n, o), new, old)


def _empty(trace: Trace, most: int) -> Trace:
    """Zeros for the traces of so many evaluations."""
    return jax.tree.map(lambda a: jnp.zeros((most, *a.shape), a.dtype), trace)


def _put(traces: Trace, trace: Trace, count: jax.Array) -> Trace:
    return jax.tree.map(lambda a, new: a.at[count].set(new), traces, trace)


DRIVES: dict[str, Callable[..., tuple[jax.Array, Trace]]] = {"scan": scan, "while": whilst, "window": window}
