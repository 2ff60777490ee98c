"""When = a static plan: which branches an evaluation computes is known before the run, and costs nothing in it.

The schedule of a technique says per branch, and where it wants per layer, at which evaluations it is computed. From
that this file works out on the host what has to be remembered (a value that no later evaluation uses is not), in which
slot of the ring, and with which weights it is mixed. Evaluations that do the same share a mode, which the sampler
traces once: a branch that a mode fills is not in its program at all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from difax.accel.caches.fill import Fill, check_dtype, hold, stored
from difax.core.contracts import Accelerator, Done, Plan, Row, Stage, State, TrunkSpec, Where, no_memory
from difax.core.mixing import mix
from difax.core.stack import indexed

# {stage: {branch: bool [E] or [E, L]}}, True: computed; a branch that is missing is always computed
Schedule = dict[str, dict[str, np.ndarray]]
MODES = 16  # more distinct modes than that are traced as one, with a conditional for each layer


def planned(
    name: str,
    schedule: Callable[[Row, tuple[Stage, ...]], Schedule],
    fill: Fill | None = None,
    *,
    branches: tuple[str, ...] | None = None,
    after_gate: bool = False,
    correct: Callable[[Any, Where, Row], Any] | None = None,
    dtype: str | None = None,
) -> Accelerator:
    """An accelerator that fills branches of blocks by a static plan.

    Args:
      name: of the technique.
      schedule: (rows, stages) -> where each branch is computed; an evaluation that is `fresh` is always computed.
      fill: what stands in (the newest value).
      branches: the branches it acts on, None for all.
      after_gate: keep what is added to the tokens, and not the update before the gate.
      correct: (filled value, where, row) -> what stands in instead of it.
      dtype: of the ring ("float32", "bfloat16", "float8_e4m3fn", "float8_e5m2"); None: that of the model.

    Returns:
      An `Accelerator` that remembers, per branch and layer that is ever filled, up to `fill.depth` outputs.
    """
    check_dtype(name, dtype)
    fill = fill or hold()

    def acts(branch: str) -> bool:
        return branches is None or branch in branches

    def plan(rows: Row, stages: tuple[Stage, ...]) -> Plan:
        flags = schedule(rows, stages)
        fresh = np.asarray(rows.fresh, bool).copy()
        fresh[0] = True
        sites = {(s, b): _forced(a, fresh) for s, of in flags.items() for b, a in of.items() if acts(b)}
        return _tabulate(name, sites, {s.name: s.depth for s in stages}, fresh, fill)

    def init(spec: TrunkSpec, modes: tuple[Any, ...]) -> State:
        memory = no_memory(spec, modes)
        for (stage, branch), slots in _slots(modes).items():
            depth, update = spec.depth[stage], spec.update[stage][branch]
            kept = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype if dtype is None else dtype), update)
            whole = jax.tree.map(lambda a, d=depth: jnp.zeros((d, *a.shape), a.dtype), kept)
            memory["branch"][stage][branch] = tuple(whole for _ in range(slots))
        return memory

    def branch(compute: Any, gate: Any, where: Where, ring: State, inner: State, row: Row) -> Any:
        doing = dict(row.plan.mode).get((where.stage, where.branch))
        numbers = row.plan.values.get(where.stage, {}).get(where.branch, {})

        def computed(inner: State) -> tuple[Any, Any, State]:
            update, inner = compute(inner)
            residual = gate(update)
            return residual, residual if after_gate else update, inner

        def filled() -> Any:
            like = jax.eval_shape(lambda: computed(inner)[1])
            weights = numbers.get("weights")
            value = mix(ring, None if weights is None else weights[: len(ring)], like)
            value = value if correct is None else correct(value, where, row)
            return value if after_gate else gate(value)

        if doing is None:
            residual, _, inner = computed(inner)
            return residual, ring, inner, Done(1.0)
        if doing == "fill":
            return filled(), ring, inner, Done(0.0)
        if doing == "mixed":

            def fresh(inner: State) -> tuple[Any, Any, State]:
                residual, kept, inner = computed(inner)
                return residual, stored(kept, dtype), inner

            full = numbers["layers"][where.layer]
            residual, kept, inner = jax.lax.cond(full, fresh, lambda inner: (filled(), ring[0], inner), inner)
            return residual, (kept,), inner, Done(full.astype(jnp.float32))
        residual, kept, inner = computed(inner)
        slot = doing[1]
        return residual, (*ring[:slot], stored(kept, dtype), *ring[slot + 1 :]), inner, Done(1.0)

    return Accelerator(name=name, branches=branches, plan=plan, init=init, branch=branch)


def _forced(flags: Any, fresh: np.ndarray) -> np.ndarray:
    flags = np.asarray(flags, bool)
    flags = flags | (fresh if flags.ndim == 1 else fresh[:, None])
    uniform = flags.ndim == 1 or (flags == flags[:, :1]).all()
    return flags if flags.ndim == 1 or not uniform else flags[:, 0]


def _tabulate(name: str, sites: dict[Any, np.ndarray], depth: dict[str, int], fresh: np.ndarray, fill: Fill) -> Plan:
    """The plan of a schedule: modes are tuples of ((stage, branch), what is done there)."""
    steps = len(fresh)
    doing: dict[Any, list[Any]] = {}
    weights: dict[Any, np.ndarray] = {}
    layered = {site for site, flags in sites.items() if flags.ndim == 2}
    for site, flags in sites.items():
        if site not in layered:
            doing[site], weights[site] = ring_plan(flags, fresh, fill)
    modes = [tuple((site, d[e]) for site, d in sorted(doing.items()) if d[e] is not None) for e in range(steps)]
    if len(set(modes)) > MODES:
        layered |= doing.keys()
    for site in layered:
        if fill.depth > 1:
            raise ValueError(f"{name}: a plan that differs by layer can only hold the newest value")
        if sites[site].ndim == 1:
            sites[site] = np.repeat(sites[site][:, None], depth[site[0]], 1)
        doing[site] = _one_layered(sites[site])
    modes = [tuple((site, d[e]) for site, d in sorted(doing.items()) if d[e] is not None) for e in range(steps)]
    values: dict[str, Any] = {}
    for stage, branch in doing:
        numbers = {}
        if (stage, branch) in layered:
            numbers["layers"] = sites[stage, branch]
        elif fill.weights is not None:
            numbers["weights"] = weights[stage, branch]
        if numbers:
            values.setdefault(stage, {})[branch] = numbers
    return Plan(**indexed(modes), values=values, owner=name)


def ring_plan(flags: np.ndarray, fresh: np.ndarray, fill: Fill) -> tuple[list[Any], np.ndarray]:
    """What each evaluation does at one site that is the same in all layers, and its weights by slot [E, depth]."""
    doing: list[Any] = ["fill"] * len(flags)
    weights = np.zeros((len(flags), fill.depth))
    ring: list[tuple[int, int]] = []  # (evaluation, slot), the newest first
    used: set[int] = set()
    for e, full in enumerate(flags):
        if fresh[e]:
            ring = []
        if full:
            taken = {slot for _, slot in ring[: fill.depth - 1]}
            slot = min(set(range(fill.depth)) - taken)
            ring = [(e, slot), *ring[: fill.depth - 1]]
            doing[e] = ("store", slot)
            continue
        steps = np.asarray([at for at, _ in ring] + [-1] * (fill.depth - len(ring)))
        mixed = [1.0] if fill.weights is None else fill.weights(steps, e)
        for (at, slot), w in zip(ring, mixed, strict=False):
            weights[e, slot] = w
            if w != 0:
                used.add(at)
    for e, full in enumerate(flags):
        if full and e not in used:
            doing[e] = None
    return doing, weights


def _one_layered(flags: np.ndarray) -> list[Any]:
    """What each evaluation does at one site whose layers differ: all stored, all filled, or layer by layer."""
    ever = (~flags).any()
    return [(("store", 0) if ever else None) if f.all() else "fill" if not f.any() else "mixed" for f in flags]


def _slots(modes: tuple[Any, ...]) -> dict[Any, int]:
    """How many values each site remembers over all modes of a plan."""
    slots: dict[Any, int] = {}
    for mode in modes:
        for site, what in mode:
            if what != "fill":
                slots[site] = max(slots.get(site, 0), 1 if what == "mixed" else what[1] + 1)
    return slots


def every(interval: int, rows: Row) -> np.ndarray:
    """Every `interval`-th evaluation, counted from the first: bool [E]."""
    return np.asarray(rows.i) % interval == 0


def everywhere(flags: np.ndarray, stages: tuple[Stage, ...], branches: tuple[str, ...] | None = None) -> Schedule:
    """The same flags for all branches of all stages, or for those that are named.

    Raises:
      ValueError: a branch that no stage has.
    """
    known = {b for s in stages for b in s.branches}
    for branch in branches or ():
        if branch not in known:
            raise ValueError(f"no branch {branch!r} in this model; allowed: {', '.join(sorted(known))}")
    return {s.name: {b: flags for b in s.branches if branches is None or b in branches} for s in stages}
