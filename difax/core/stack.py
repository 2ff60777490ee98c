"""Accelerators together: which of them acts on which level of the network, and one plan of several."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from difax.core.contracts import Accelerator, Network, Params, Plan, Row, Stage, State, TrunkSpec, Where, no_memory
from difax.core.qtensor import cast

LEVELS = ("guide", "output", "trunk", "block", "branch")  # from the outermost to the innermost


def stack(*accelerators: Accelerator, one_clock: bool = False) -> Accelerator:
    """Puts accelerators together that act on different levels, or on different branches.

    The order of composition is that of the levels, whatever the order of the arguments: guide > output > trunk >
    block > branch; what an outer level fills, an inner one never sees. A static plan inside of a level that leaves
    evaluations out counts those that reach it, and no others (it goes on from where it stopped; at an evaluation that
    is `fresh` it is where the run is), so that it never mixes what was not computed. A gate that decides by samples
    runs what lies inside for the whole batch: what is remembered there goes by all samples, so that a sample is that of
    a batch of one only where nothing inside remembers.

    Args:
      one_clock: plans that were made for each other count all evaluations.

    Raises:
      ValueError: two of them act on the same level, or on the same branch, or a static plan of branches is put into
        blocks that are left out one by one (names both and the level).
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
    running = [i for i, a in enumerate(members) if a.networks]
    if len(running) > 1:
        first, second = (members[i].name for i in running[:2])
        raise ValueError(f"{first} and {second} both run another network; allowed: one of them")
    choosing = next((i for i in running if members[i].network is not None), None)
    only = branching[0] if branching and members[branching[0]].branches is None else None
    outermost = [next((lv for lv in LEVELS[1:] if getattr(a, lv) is not None), "branch") for a in members]

    def counted(own: list[set[Any]]) -> dict[int, str]:
        """Members with a static plan (by the modes of each) inside of a level that leaves evaluations out, and whose
        clock they go by."""
        found = {}
        for i, level in enumerate(outermost if not one_clock else ()):
            inside = [
                lv for lv in ("output", "trunk") if owner.get(lv, i) != i and LEVELS.index(lv) < LEVELS.index(level)
            ]
            if inside and own[i] != {()}:
                found[i] = "trunk" if level == "trunk" else "branch"
        return found

    def plan(rows: Row, stages: tuple[Stage, ...]) -> Plan:
        plans = [a.plan(rows, stages) for a in members]
        for i in branching:
            block = owner.get("block", i)
            if block != i and plans[i].modes != ((),):
                raise ValueError(
                    f"{members[i].name} plans branches of blocks that {members[block].name} leaves out one by one; "
                    "allowed: one of them"
                )
        inner = counted([set(p.modes) for p in plans])
        for i in inner:
            if members[i].guide is not None:
                outside = next(members[owner[lv]].name for lv in ("output", "trunk") if owner.get(lv, i) != i)
                raise ValueError(
                    f"{members[i].name} plans branches along with guidance, and {outside} leaves evaluations out; "
                    "allowed: one of them"
                )
        return joined(plans, inner, members)

    def lookup(whole: Plan, row: Row, along: State) -> tuple[Any, Any]:
        """The mode and the numbers of each member at its own count of evaluations."""
        inner = counted(_own(whole.modes))
        if not inner:
            return row.plan.index, row.plan.values
        index, values = row.plan.index, list(row.plan.values["members"])
        stride = 1
        for i in reversed(inner):
            at = jnp.where(row.fresh, row.i, along["clock"][inner[i]][0])
            index = index + stride * whole.values["own"][i][at]
            stride *= len({m[i] for m in whole.modes})
            values[i] = jax.tree.map(lambda a, at=at: a[at], whole.values["members"][i])
        return index, tuple(values)

    def fresh(rows: Row) -> Row:
        for member in members:
            rows = rows if member.fresh is None else member.fresh(rows)
        return rows

    def seen_by(i: int, row: Row) -> Row:
        return row._replace(plan=row.plan._replace(mode=row.plan.mode[i], values=row.plan.values[i]))

    def init(spec: TrunkSpec, modes: tuple[Any, ...]) -> State:
        memories = [a.init(spec, tuple(dict.fromkeys(m[i] for m in modes))) for i, a in enumerate(members)]
        memory = no_memory(spec, modes)
        for level, i in owner.items():
            if level != "guide":
                memory[level] = memories[i][level]
        memory["along"] = {name: of for one in memories for name, of in one["along"].items()}
        inner = counted(_own(modes))
        if inner:
            start = jnp.zeros(1 if spec.together else spec.halves, jnp.int32)
            memory["along"]["clock"] = dict.fromkeys(sorted(set(inner.values())), start)
        for stage, branches in memory["branch"].items():
            for name in branches:
                i = only if only is not None else taken.get(name)
                if i is not None:
                    memory["branch"][stage][name] = memories[i]["branch"][stage][name]
        return memory

    def wrapped(level: str, i: int | None = None) -> Any:
        i = owner.get(level) if i is None else i
        if i is None:
            return None
        function = getattr(members[i], level)
        return lambda *arguments: function(*arguments[:-1], seen_by(i, arguments[-1]))

    def trunk(blocks: Any, tokens: Any, context: Any, state: State, memory: State, row: Row) -> Any:
        if "trunk" in owner:
            run = wrapped("trunk")
            tokens, state, memory, report = run(blocks, tokens, context, state, memory, row)
        else:
            tokens, memory, report = blocks.run(tokens, memory)
        if "clock" in memory["along"]:
            whole = jnp.all(jnp.stack([jnp.all(entered > 0) for entered in report.entered.values()]))
            ran = {"trunk": 1, "branch": whole.astype(jnp.int32)}
            then = {k: jnp.where(row.fresh, row.i, c) + ran[k] for k, c in memory["along"]["clock"].items()}
            memory = {**memory, "along": {**memory["along"], "clock": then}}
        return tokens, state, memory, report

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
        lookup=lookup,
        output=wrapped("output"),
        trunk=trunk if {"output", "trunk"} & owner.keys() else None,
        block=wrapped("block"),
        branch=of_branch if branching else None,
        learned=_merged([a.learned for a in members if a.learned is not None]),
        measured=tuple(said for a in members for said in a.measured),
        batchwide=any(a.batchwide for a in members),
        networks=tuple(network for a in members for network in a.networks),
        planned=any(a.planned for a in members),
        network=None if choosing is None else wrapped("network", choosing),
        fresh=fresh if any(a.fresh is not None for a in members) else None,
    )


def _own(modes: tuple[Any, ...]) -> list[set[Any]]:
    """The modes of each member."""
    return [set(of) for of in zip(*modes, strict=True)]


def _merged(learned: list[dict[str, dict[str, Any]]]) -> dict[str, dict[str, Any]] | None:
    merged: dict[str, dict[str, Any]] = {}
    for one in learned:
        for stage, arrays in one.items():
            merged[stage] = {**merged.get(stage, {}), **arrays}
    return merged or None


def with_learned(
    params: Params, accelerator: Accelerator, prepared: Callable[[Params], Params] | None = None
) -> Params:
    """The parameters of a model with those of an accelerator that has some, and of the other networks that it runs.

    Args:
      prepared: what was made of the model's parameters, for networks that share its blocks; None is the model's dtype.
    """
    if accelerator.learned is not None:
        params = {**params, "accelerator": jax.tree.map(jnp.asarray, accelerator.learned)}
    if accelerator.networks:

        def ready(one: Network) -> Params:
            if one.shared and prepared is not None:
                return prepared(one.params)
            return cast(one.params, one.model.dtype)

        params = {**params, "networks": tuple(map(ready, accelerator.networks))}
    return params


def joined(plans: list[Plan], inner: dict[int, str], members: list[Accelerator]) -> Plan:
    """One plan of several: an evaluation's mode is the tuple of its modes in each.

    Args:
      inner: members that count evaluations for themselves; of their modes each meets each.
    """
    owner, steps = "+".join(a.name for a in members), len(plans[0].index)
    alike = [tuple(None if i in inner else p.modes[p.index[e]] for i, p in enumerate(plans)) for e in range(steps)]
    base = indexed(alike)
    if not inner:
        return Plan(**base, values=tuple(p.values for p in plans), owner=owner)
    own = {i: tuple(sorted(plans[i].modes, key=repr)) for i in inner}
    modes = tuple(
        tuple(met[list(own).index(i)] if i in own else m for i, m in enumerate(outer))
        for outer in base["modes"]
        for met in itertools.product(*own.values())
    )
    numbers = {
        i: np.asarray([modes_.index(plans[i].modes[k]) for k in plans[i].index], np.int32) for i, modes_ in own.items()
    }
    values = {"members": tuple(p.values for p in plans), "own": numbers}
    return Plan(base["index"] * (len(modes) // len(base["modes"])), values, modes, owner)


def indexed(modes: list[Any]) -> dict[str, Any]:
    """`index` and `modes` of a plan, from the mode of each evaluation; the order of the modes is their own."""
    distinct = tuple(sorted(set(modes), key=repr))
    return {"index": np.asarray([distinct.index(m) for m in modes], np.int32), "modes": distinct}
