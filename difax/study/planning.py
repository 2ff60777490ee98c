"""The work of `difax plan`, in a process of its own whose environment was set for a target that is not there.

A request comes in on stdin, as `difax.study.plan` writes it, and the answer goes out on stdout as one line of JSON.
Everything is compiled from shapes alone: no weights, no device.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from difax.build import Setup, axes_of, build_setup, check_laid_out
from difax.core.chips import Absent, devices, parse_target
from difax.core.placement import Axes, described
from difax.pipelines.parts import Parts, parts_of, published_parts
from difax.program import model_shapes
from difax.study import roofline, stages
from difax.study.lowered import Compiled, compiled, lower

INT8 = "int8_w8a8"
CONFIRMED = 3  # placements that are compiled, at most, to find one that fits or to rank the best
AROUND = 300.0  # seconds after which no more ways of other stages are compiled
WORTH = 1.5  # compilations that must fit into the seconds that are left, for one more to be begun


class Asked(NamedTuple):
    """A request: the configuration, whose section `mesh` is compiled (without one: all devices along "data"); the
    target; whether to rank all meshes instead; samples, None for one in each group of the mesh's; XLA's options;
    whether to look for another placement where this one does not fit; whether to plan what is around the denoiser too,
    which a configuration with a section `pipeline` always does; seconds that the sampler's answer may take."""

    config: dict[str, Any]
    target: str
    auto: bool
    batch: int | None
    xla: dict[str, Any]
    search: bool = True
    whole: bool = False
    patience: float = 160.0


def answer(asked: Asked, tell: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """The plan of a request, as plain numbers (`difax.study.plan.plan` says what they are)."""
    deadline = time.perf_counter() + asked.patience
    target = parse_target(asked.target)
    there = devices(target)
    config = {key: value for key, value in asked.config.items() if key != "mesh"}
    axes = None if asked.auto else checked_axes(asked.config.get("mesh", {"data": target.size}), target)
    batch = asked.batch or (axes or {}).get("data", 1) * (axes or {}).get("fsdp", 1)
    setup = build_setup(config)
    check_laid_out(setup, "difax plan")
    parts = None
    if "pipeline" in config:
        parts = parts_of(config["pipeline"])
    elif asked.whole:
        parts = published_parts(setup.model, config["model"]["name"])
    asked = asked._replace(batch=batch, config=config)
    params = jax.eval_shape(setup.prepare, model_shapes(setup.model))
    of = roofline.work(setup, params, batch)
    found: dict[str, Any] = {
        "model": setup.model.name,
        **{key: setup.described.get(key, "none") for key in ("cache", "quant", "attend", "solver", "guide")},
        "target": target.name,
        "devices": target.size,
        "device": there[0].device_kind,
        "batch": batch,
        "evaluations": len(setup.rows.i),
        "decided": of.decided,
        "xla": asked.xla,
        "jax": jax.__version__,
    }
    trial = Trial(setup, asked, target, there, of, tell, deadline)
    if axes is None:
        rows = trial.ranked()
        best = trial.confirmed([row["axes"] for row in rows])
        best.sort(key=lambda plan: (plan["fits"] is False, (plan["seconds"] or {}).get("summed", 0.0)))
        chosen = {**best[0], "candidates": rows, "compiled": [shortened(plan) for plan in best]}
    else:
        chosen = trial.plan(axes)
    if chosen["fits"] is False and asked.search:
        chosen["instead"] = trial.nearest(chosen["axes"])
    return {**found, **chosen, **({} if parts is None else around(parts, chosen, trial))}


def around(parts: Parts, sampler: Mapping[str, Any], trial: Trial) -> dict[str, Any]:
    """{"pipeline", "stages", "whole"} of a pipeline (`difax.study.stages`), beside its sampler's plan; what a run does
    is compiled first, and the other ways as far as the time goes."""
    deadline, rows = time.perf_counter() + AROUND, {}
    ways = stages.ways(parts, trial.setup.model.input_shape, trial.of.batch)
    for i, way in sorted(enumerate(ways), key=lambda pair: not pair[1].chosen):
        trial.tell(f"compiling {way.stage}, {way.what}, {way.how}")
        late = None if way.chosen else deadline
        rows[i] = stages.planned(way, trial.there, trial.target.published, trial.asked.xla, late)
    in_turn = [rows[i] for i in range(len(ways))]
    return {"pipeline": parts.pipeline, "stages": in_turn, "whole": stages.whole(sampler, in_turn)}


def checked_axes(section: Mapping[str, Any], target: Absent) -> dict[str, int]:
    """A section `mesh` whose sizes multiply to the target's devices.

    Raises:
      ValueError: an unknown axis, a size that is none, or another product.
    """
    axes = axes_of(section)
    if axes.devices != target.size:
        raise ValueError(
            f"--mesh {described(axes)} has {axes.devices} devices; allowed: the {target.size} of {target.name}"
        )
    return {name: size for name, size in axes._asdict().items() if size not in (1, None)}


class Trial(NamedTuple):
    """What placements are tried with."""

    setup: Setup
    asked: Asked
    target: Absent
    there: list[Any]
    of: roofline.Work
    tell: Callable[[str], None]
    deadline: float

    def plan(self, axes: Mapping[str, int]) -> dict[str, Any]:
        """One placement, compiled."""
        shown = described(Axes(**axes))
        self.tell(f"compiling {self.setup.model.name} for {self.target.name}, mesh {shown}")
        made = lower(self.asked.config, self.there, axes, self.of.batch)
        return self.judged(axes, compiled(self.setup, made, self.asked.xla))

    def judged(self, axes: Mapping[str, int], program: Compiled) -> dict[str, Any]:
        """What a compiled program amounts to on the chip."""
        chip = self.target.published
        usable = program.memory.get("usable") or chip.usable
        peak = program.memory.get("peak")
        fits = False if program.refused else (peak <= usable if usable and peak is not None else None)
        operations, moved = roofline.per_device(self.of, axes)
        sent = sum(m.sent for m in program.collectives.values())
        bound = None if program.refused else roofline.seconds(chip, operations, moved, sent)
        return {
            "mesh": described(Axes(**axes)),
            "axes": dict(axes),
            "fits": fits,
            "refused": program.refused,
            "memory": {"chip": chip.memory or None, "usable": usable or None, **program.memory},
            "holds": self.holds(axes, program),
            "arguments": [{"name": name, "bytes": n} for name, n in program.arguments],
            "temporaries": [{"type": kind, "bytes": n, "where": w} for kind, n, w in program.temporaries],
            "operations": operations,
            "operations_compiled": program.products,
            "operations_compiled_least": program.least_products,
            "bytes": moved,
            "divided": divided(self.of, axes),
            "collectives": {kind: m._asdict() for kind, m in program.collectives.items()},
            "collectives_least": {kind: m._asdict() for kind, m in program.fewest.items()},
            "loops_of_unknown_length": program.unknown,
            "planned": program.planned,
            "seconds": None if bound is None else {**bound._asdict(), "least": bound.least, "summed": bound.summed},
            "compile_seconds": round(program.seconds, 1),
        }

    def holds(self, axes: Mapping[str, int], program: Compiled) -> dict[str, int]:
        """Bytes of one device by what they hold; caches are part of the temporaries, of their size by shape."""
        estimate = roofline.held(self.of, axes)
        if program.refused:
            return {name: int(n) for name, n in estimate.items()}
        memory = program.memory
        inputs = min(int(estimate["inputs"]), memory["argument"])
        caches = min(int(estimate["caches"]), memory["temporary"])
        rest = memory["temporary"] - caches + memory["output"] - memory["aliased"]
        return {
            "weights": memory["argument"] - inputs,
            "caches": caches,
            "activations": max(rest, 0),
            "inputs": inputs,
        }

    def estimated(self, axes: Mapping[str, int]) -> dict[str, Any]:
        """A placement by arithmetic alone."""
        operations, moved = roofline.per_device(self.of, axes)
        bound = roofline.seconds(self.target.published, operations, moved, roofline.sent(self.of, axes))
        held, usable = sum(roofline.held(self.of, axes).values()), self.target.published.usable
        return {
            "mesh": described(Axes(**axes)),
            "axes": dict(axes),
            "bytes": int(held),
            "fits": held <= usable if usable else None,
            "seconds": None if bound is None else bound.summed,
        }

    def ranked(self) -> list[dict[str, Any]]:
        """All placements by arithmetic: those that fit first, the quickest first."""
        meshes = roofline.factorised(self.target.size, self.of)
        rows = [self.estimated(axes) for axes in meshes]
        if not rows:
            raise ValueError(f"--mesh auto: no mesh of {self.target.size} devices divides a batch of {self.of.batch}")
        return sorted(rows, key=lambda row: (row["fits"] is False, row["seconds"] or 0.0, row["bytes"]))

    def confirmed(self, meshes: list[Mapping[str, int]], most: int = CONFIRMED) -> list[dict[str, Any]]:
        """The first few placements, compiled, as far as the time goes."""
        plans: list[dict[str, Any]] = []
        for axes in meshes[:most]:
            took = max((plan["compile_seconds"] for plan in plans), default=0.0)
            if plans and time.perf_counter() + WORTH * took > self.deadline:
                break
            plan = self.attempt(axes)
            plans += [] if plan is None else [plan]
        if not plans:
            raise ValueError(f"--mesh auto: {self.setup.model.name} could not be compiled for any of the best meshes")
        return plans

    def attempt(self, axes: Mapping[str, int]) -> dict[str, Any] | None:
        """One placement, compiled; None where it is refused, which is told."""
        try:
            return self.plan(axes)
        except (ValueError, jax.errors.JaxRuntimeError) as error:
            self.tell(f"mesh {described(Axes(**axes))} is left out: {' '.join(str(error).split())[:200]}")
            return None

    def nearest(self, axes: Mapping[str, int]) -> list[dict[str, Any]]:
        """Placements near one that does not fit and that do: other meshes of the same devices, and int8 weights."""
        found: list[dict[str, Any]] = []
        near = [row for row in self.ranked() if row["fits"] is not False and row["axes"] != dict(axes)]
        near.sort(key=lambda row: (distance(axes, row["axes"]), row["seconds"] or 0.0))
        quantised = self.quantised()
        tried: list[tuple[Trial, list[dict[str, Any]], str]] = [(self, near, self.setup.described.get("quant", "none"))]
        if quantised is not None:
            tried.append((quantised, [quantised.estimated(axes)], INT8))
        for trial, rows, quant in tried:
            for row in rows[:CONFIRMED]:
                if row["fits"] is False or time.perf_counter() > self.deadline:
                    break
                plan = trial.attempt(row["axes"])
                if plan is not None and plan["fits"]:
                    found.append({**shortened(plan), "quant": quant})
                    break
        if not found:  # by arithmetic alone, and said so
            for trial, _, quant in tried:
                best = next((row for row in trial.ranked() if row["fits"] is not False), None)
                if best is not None:
                    kept = {key: best[key] for key in ("mesh", "bytes", "seconds")}
                    found.append({**kept, "quant": quant, "estimated": True})
        return found

    def quantised(self) -> Trial | None:
        """The same run with int8 weights and activations, if it is not quantised yet."""
        if self.setup.rules:
            return None
        config = {**self.asked.config, "quant": {"name": INT8}}
        setup = build_setup(config)
        params = jax.eval_shape(setup.prepare, model_shapes(setup.model))
        return self._replace(
            setup=setup, asked=self.asked._replace(config=config), of=roofline.work(setup, params, self.of.batch)
        )


def distance(one: Mapping[str, int], other: Mapping[str, int]) -> float:
    """How far two meshes are apart: the sum over axes of |log2 of the ratio|."""
    return sum(abs(math.log2(one.get(a, 1) / other.get(a, 1))) for a in roofline.DIVIDES)


def divided(of: roofline.Work, axes: Mapping[str, int]) -> str:
    """In words, by what the figures of one device were divided."""
    used = [axis for axis in roofline.DIVIDES if axes.get(axis, 1) > 1 and (axis != "cfg" or of.halves == 2)]
    parts = [f"{roofline.DIVIDES[axis]} by {axes[axis]} ({axis})" for axis in used]
    seq, heads = axes.get("seq", 1), roofline.ulysses(of, axes)
    if seq > heads:
        parts.append(f"seq is {seq // heads} in a ring x {heads} that exchange heads")
    return "; ".join(parts) or "nothing is divided"


def shortened(plan: Mapping[str, Any]) -> dict[str, Any]:
    """Of a plan what a table of several shows."""
    bound = plan["seconds"]
    return {
        "mesh": plan["mesh"],
        "fits": plan["fits"],
        "bytes": plan["memory"].get("peak"),
        "holds": plan["holds"],
        "least": bound and bound["least"],
        "seconds": bound and bound["summed"],
        "compile_seconds": plan["compile_seconds"],
    }


def main() -> int:
    """Answers one request; what libraries tell on stderr is kept out of the way, and shown where the work fails."""
    telling = os.fdopen(os.dup(2), "w")
    answering = os.fdopen(os.dup(1), "w")
    with tempfile.TemporaryFile() as noise:
        os.dup2(noise.fileno(), 1)
        os.dup2(noise.fileno(), 2)
        try:
            request, quiet = pickle.load(sys.stdin.buffer)

            def tell(text: str) -> None:
                if not quiet:
                    print(f"difax: {text}", file=telling, flush=True)

            found = {"plan": answer(Asked(*request), tell)}
        except ValueError as error:
            found = {"refused": str(error)}
        except Exception as error:
            found = {"failed": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(found), file=answering, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
