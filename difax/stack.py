"""Accelerators together: which of them acts on which level of the network, and one plan of several."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from difax.contracts import Accelerator, Params, Plan, Row, Stage, State, TrunkSpec, Where, no_memory

LEVELS = ("guide", "output", "trunk", "block", "branch")  # from the outermost to the innermost


def stack(*accelerators: Accelerator) -> Accelerator:
    """Puts accelerators together that act on different levels, or on different branches.

    The order of composition is that of the levels, whatever the order of the arguments: guide > output > trunk >
    block > branch; what an outer level fills, an inner one never sees.

    Raises:
      ValueError: two of them act on the same level (names both and the level).
    """
    members = [a for a in accelerators if a != Accelerator()]
    if len(members) < 2:
        return members[0] if members else Accelerator()
    owner: dict[str, int] = {}
    for level in LEVELS[:-1]:
        acting = [i for i, a in enumerate(members) if getattr(a, level) is not None]
        if len(acting) > 1:
            first, second = (members[i].name for i in acting[:2])
            raise ValueError(f"{first} and {second} both act on the {level} of the network; allowed: one of them")
        owner.update((level, i) for i in acting)
    branching = [i for i, a in enumerate(members) if a.branch is not None]
    taken: dict[str, int] = {}
    for i in branching:
        named = members[i].branches
        if named is None and len(branching) > 1:
            other = next(members[j].name for j in branching if j != i)
            raise ValueError(
                f"{members[i].name} and {other} both act on branches; allowed: one of them, or branches=... of each"
            )
        for name in named or ():
            if name in taken:
                raise ValueError(f"{members[taken[name]].name} and {members[i].name} both act on the branch {name}")
            taken[name] = i
    only = branching[0] if branching and members[branching[0]].branches is None else None

    def plan(rows: Row, stages: tuple[Stage, ...]) -> Plan:
        plans = [a.plan(rows, stages) for a in members]
        return joined(plans, "+".join(a.name for a in members))

    def seen_by(i: int, row: Row) -> Row:
        return row._replace(plan=row.plan._replace(mode=row.plan.mode[i], values=row.plan.values[i]))

    def init(spec: TrunkSpec, modes: tuple[Any, ...]) -> State:
        memories = [a.init(spec, tuple(dict.fromkeys(m[i] for m in modes))) for i, a in enumerate(members)]
        memory = no_memory(spec, modes)
        for level, i in owner.items():
            if level != "guide":
                memory[level] = memories[i][level]
        memory["along"] = {name: of for one in memories for name, of in one["along"].items()}
        for stage, branches in memory["branch"].items():
            for name in branches:
                i = only if only is not None else taken.get(name)
                if i is not None:
                    memory["branch"][stage][name] = memories[i]["branch"][stage][name]
        return memory

    def wrapped(level: str) -> Any:
        if level not in owner:
            return None
        i = owner[level]
        function = getattr(members[i], level)
        return lambda *arguments: function(*arguments[:-1], seen_by(i, arguments[-1]))

    def of_branch(compute: Any, gate: Any, where: Where, state: State, inner: State, row: Row) -> Any:
        i = only if only is not None else taken[where.branch or ""]
        function = members[i].branch
        assert function is not None
        return function(compute, gate, where, state, inner, seen_by(i, row))

    return Accelerator(
        name="+".join(a.name for a in members),
        branches=None if only is not None else tuple(taken),
        plan=plan,
        init=init,
        guide=members[owner["guide"]].guide if "guide" in owner else None,
        output=wrapped("output"),
        trunk=wrapped("trunk"),
        block=wrapped("block"),
        branch=of_branch if branching else None,
        learned=_merged([a.learned for a in members if a.learned is not None]),
    )


def _merged(learned: list[dict[str, dict[str, Any]]]) -> dict[str, dict[str, Any]] | None:
    merged: dict[str, dict[str, Any]] = {}
    for one in learned:
        for stage, arrays in one.items():
            merged[stage] = {**merged.get(stage, {}), **arrays}
    return merged or None


def with_learned(params: Params, accelerator: Accelerator) -> Params:
    """The parameters of a model with those of an accelerator that has some."""
    if accelerator.learned is None:
        return params
    return {**params, "accelerator": jax.tree.map(jnp.asarray, accelerator.learned)}


def joined(plans: list[Plan], owner: str) -> Plan:
    """One plan of several: an evaluation's mode is the tuple of its modes in each."""
    pairs = [tuple(p.modes[p.index[e]] for p in plans) for e in range(len(plans[0].index))]
    return Plan(**indexed(pairs), values=tuple(p.values for p in plans), owner=owner)


def indexed(modes: list[Any]) -> dict[str, Any]:
    """`index` and `modes` of a plan, from the mode of each evaluation; the order of the modes is their own."""
    distinct = tuple(sorted(set(modes), key=repr))
    return {"index": np.asarray([distinct.index(m) for m in modes], np.int32), "modes": distinct}
