"""How much of what a cache leaves out is really saved: seconds against operations at published geometries of DiT.

  python -m experiments.realised                                       B/2 at batch 1 and 4, XL/2 at batch 1
  python -m experiments.realised --models B/2 --batches 4 --methods fora
  python -m experiments.realised --once                                PixArt and Wan, conditioned ahead against each

Random weights (adaLN-zero re-randomised), latents [batch, 32, 32, 4], DDIM with guidance, the blocks written out
(`difax.core.trunk.unstack`). All methods of a geometry are compiled first and then run turn by turn, so that a busy
moment of the machine falls on all; figures are medians. `realised` is the ratio of seconds over the ratio of operations
(`difax.core.cost`, from the trace). Thresholds of the online gates are set to a multiple of the median metric that this
network shows when everything is computed, because those of the papers belong to trained weights. `never` is the gate
that always computes. Memory is what the cache remembers (`Accelerator.init`), beside what the compiled program takes
more than the uncached one. Rows go to experiments/results/realised/LANE.jsonl; a geometry that is there already is
not measured again.
"""

from __future__ import annotations

import argparse
import itertools
import pathlib
import statistics
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from difax.accel.caches import CACHES
from difax.accel.solvers import SOLVERS
from difax.build import CONDITIONINGS, LAYOUTS
from difax.core.contracts import Attention
from difax.core.cost import model_cost, run_cost
from difax.core.device import peak_memory
from difax.core.files import read_rows
from difax.core.grids import GRIDS, make_times
from difax.core.guidance import cfg
from difax.core.noise import sample_keys
from difax.core.process import flow, vp_linear
from difax.core.sample import initial_noise, make_rows, make_sampler
from difax.core.shapes import trunk_spec
from difax.core.trunk import neutral, unstack
from difax.models.dit import dit
from difax.models.pixart import pixart
from difax.models.wan import wan
from difax.weights.conditions import random_conditions
from experiments.provenance import RESULTS, append_row, provenance

TOY = {"depth": 2, "width": 64, "heads": 2, "patch": 8}  # the variant "toy", to see that everything runs
GEOMETRIES = (("B/2", 1), ("B/2", 4), ("XL/2", 1))


class Method(NamedTuple):
    """A cache with its settings; `times_metric`: its threshold in medians of the metric that it shows uncached."""

    kind: str  # "static", "online", "token" or "never"
    cache: str
    settings: dict[str, Any]
    times_metric: float | None = None


METHODS = {
    "fora 3": Method("static", "fora", {"interval": 3}),
    "fora 5": Method("static", "fora", {"interval": 5}),
    "fora 20": Method("static", "fora", {"interval": 20}),  # what an evaluation costs that computes nothing
    "taylorseer 4, order 1": Method("static", "taylorseer", {"interval": 4, "order": 1}),
    "taylorseer 4, order 2": Method("static", "taylorseer", {"interval": 4, "order": 2}),
    "delta_dit": Method("static", "delta_dit", {}),
    "frdiff": Method("static", "frdiff", {}),
    "teacache": Method("online", "teacache", {}, 3.0),
    "fbcache": Method("online", "fbcache", {}, 1.5),
    "dbcache": Method("online", "dbcache", {"warmup": 2, "max_continuous": 2, "threshold": 1.0}),
    "dbcache, taylor": Method(
        "online", "dbcache", {"warmup": 2, "max_continuous": 2, "threshold": 1.0, "forecast": "taylor"}
    ),
    "adacache": Method("online", "adacache", {}),
    "toca": Method("token", "toca", {}),
    "toca, random score": Method("token", "toca", {"score": "random"}),
    "duca": Method("token", "duca", {}),
    "teacache, never": Method("never", "teacache", {"threshold": 0.0}),
    "fbcache, never": Method("never", "fbcache", {"threshold": 0.0}),
    "dbcache, never": Method("never", "dbcache", {"threshold": 0.0}),
}


# models with a caption: name -> (model, process, prediction, solver, grid)
CAPTIONED: dict[str, Any] = {
    "PixArt-XL/2, 256 tokens, 120 of text": (
        lambda dtype: pixart("alpha", size=32, micro_conditioning=False, dtype=dtype),
        vp_linear(),
        "eps",
        "ddim",
        "leading",
    ),
    "Wan-1.3B, 256 tokens, 512 of text": (
        lambda dtype: wan("1.3B", size=(1, 32, 32), text_tokens=512, dtype=dtype),
        flow(3.0),
        "velocity",
        "euler",
        "uniform",
    ),
}


class Work:
    """One geometry: weights, inputs, and a compiled sampler per method."""

    def __init__(
        self,
        variant: str,
        batch: int,
        dtype: str,
        steps: int,
        conditioning: str,
        layout: str = "unstacked",
        attention: Attention | None = None,
    ):
        self.batch, self.ahead, self.attention = batch, conditioning == "ahead", attention
        size: dict[str, Any] = TOY if variant == "toy" else {"variant": variant}
        of_dit = (lambda dtype: dit(**size, dtype=dtype), vp_linear(), "eps", "ddim", "leading")
        make, self.process, self.prediction, solver, grid = CAPTIONED.get(variant, of_dit)
        self.model = make(dtype)
        shapes = jax.eval_shape(self.model.init, jax.random.key(0))
        self.cost = model_cost(self.model, shapes)
        leaves, tree = jax.tree.flatten(shapes)
        keys = jax.random.split(jax.random.key(0), len(leaves))
        draw = lambda k, a: (0.03 * jax.random.normal(k, a.shape)).astype(dtype)  # noqa: E731
        stacked = tree.unflatten([draw(k, a) for k, a in zip(keys, leaves, strict=True)])
        self.params = jax.block_until_ready(unstack(self.model, stacked) if layout == "unstacked" else stacked)
        self.solver, self.guide = SOLVERS[solver](), cfg()
        self.times = make_times(GRIDS[grid](), self.process, steps)
        self.keys, self.cond = sample_keys(0, batch), jax.tree.map(jnp.asarray, random_conditions(self.model, batch))

    def program(self, cache: str | None, settings: dict[str, Any], ahead: bool | None = None) -> dict[str, Any]:
        ahead = self.ahead if ahead is None else ahead
        accelerator = neutral() if cache is None else CACHES[cache](**settings)
        host = make_rows(self.solver, self.guide, self.process, self.times, accelerator, self.model.stages)
        rows, scale = jax.tree.map(jnp.asarray, host), jnp.float32(2.0)
        seams: dict[str, Any] = {"solver": self.solver, "guide": self.guide, "accelerator": accelerator}
        if self.attention is not None:
            seams["attention"] = self.attention
        sampler = make_sampler(self.model, self.process, self.prediction, ahead=ahead, **seams)
        start = time.perf_counter()
        compiled = sampler.lower(self.params, self.noise(), self.keys, self.cond, rows, scale).compile()
        both = jax.tree.map(lambda a: jnp.concatenate([a, a]), (self.noise(), self.cond))
        spec = trunk_spec(self.model, self.params, *both, halves=2)
        memory = jax.eval_shape(lambda: accelerator.init(spec, host.plan.modes))

        def run() -> tuple[float, Any]:
            x = jax.block_until_ready(self.noise())
            begin = time.perf_counter()
            out, trace = jax.block_until_ready(compiled(self.params, x, self.keys, self.cond, rows, scale))
            if not bool(jnp.isfinite(out).all()):
                raise FloatingPointError(f"{cache}: samples that are not finite")
            return time.perf_counter() - begin, trace

        return {
            "run": run,
            "settings": settings,
            "compile_seconds": time.perf_counter() - start,
            "peak": peak_memory(compiled),
            "remembered": sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(memory)),
        }

    def noise(self) -> jax.Array:
        return initial_noise(self.process, self.keys, self.model.input_shape)

    def threshold(self, method: Method) -> dict[str, Any]:
        """The settings of a method with its threshold in the metric's own units."""
        if method.times_metric is None:
            return method.settings
        _, trace = self.program(method.cache, {**method.settings, "threshold": 0.0})["run"]()
        metric = np.concatenate([np.ravel(a) for a in jax.tree.leaves(trace.metric["trunk"])])
        return {**method.settings, "threshold": float(method.times_metric * np.median(metric[metric > 0]))}


def measure(
    variant: str, batch: int, dtype: str, methods: list[str], steps: int, repeats: int, conditioning: str = "each"
) -> list[dict[str, Any]]:
    """The rows of one geometry."""
    work = Work(variant, batch, dtype, steps, conditioning)
    programs = {"none": work.program(None, {})}
    for name in methods:
        method = METHODS[name]
        programs[name] = work.program(method.cache, work.threshold(method))
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    flops: dict[str, float] = {}
    for turn in range(repeats + 1):
        for name, program in programs.items():
            taken, trace = program["run"]()
            if turn == 0:  # the first touches its memory
                flops[name] = run_cost(work.cost, trace)
            else:
                seconds[name].append(taken)
    rows = []
    for name, program in programs.items():
        spent = statistics.median(seconds[name])
        flops_ratio = flops["none"] / flops[name]
        seconds_ratio = statistics.median(seconds["none"]) / spent
        turns = [a / b / flops_ratio for a, b in zip(seconds["none"], seconds[name], strict=True)]
        rows.append(
            {
                "model": f"DiT-{variant}",
                "batch": batch,
                "dtype": dtype,
                "steps": steps,
                "conditioning": conditioning,
                "method": name,
                "kind": METHODS[name].kind if name in METHODS else "none",
                "settings": program["settings"],
                "flops_ratio": flops_ratio,
                "seconds": spent,
                "seconds_ratio": seconds_ratio,
                "realised": seconds_ratio / flops_ratio,
                "realised_turns": [round(t, 4) for t in turns],
                "compile_seconds": program["compile_seconds"],
                "remembered_mib": program["remembered"] / 2**20,
                "peak_over_uncached_mib": (program["peak"] - programs["none"]["peak"]) / 2**20,
            }
        )
    return rows


def once(variant: str, layout: str, batch: int, dtype: str, steps: int, repeats: int) -> list[dict[str, Any]]:
    """Rows of what is known ahead computed once a run against at every evaluation, with and without a cache."""
    work, rows = Work(variant, batch, dtype, steps, "each", layout), []
    methods: dict[str, tuple[str | None, dict[str, Any]]] = {"none": (None, {}), "fora 3": ("fora", {"interval": 3})}
    programs = {(n, ahead): work.program(*m, ahead) for n, m in methods.items() for ahead in (False, True)}
    seconds: dict[Any, list[float]] = {key: [] for key in programs}
    flops: dict[Any, float] = {}
    for turn in range(repeats + 1):
        for key, program in programs.items():
            taken, trace = program["run"]()
            if turn == 0:
                flops[key] = run_cost(work.cost, trace)
            else:
                seconds[key].append(taken)
    for name in methods:
        each, ahead = (name, False), (name, True)
        flops_ratio = flops[each] / flops[ahead]
        ratios = [a / b for a, b in zip(seconds[each], seconds[ahead], strict=True)]
        rows.append(
            {
                "model": variant,
                "batch": batch,
                "dtype": dtype,
                "steps": steps,
                "conditioning": "ahead",
                "layout": layout,
                "method": f"ahead over each, {layout}, {name}",
                "kind": "once",
                "settings": methods[name][1],
                "flops_ratio": flops_ratio,
                "seconds": statistics.median(seconds[ahead]),
                "seconds_ratio": statistics.median(seconds[each]) / statistics.median(seconds[ahead]),
                "realised": statistics.median(ratios) / flops_ratio,
                "realised_turns": [round(r / flops_ratio, 4) for r in ratios],
                "compile_seconds": programs[ahead]["compile_seconds"],
                "remembered_mib": (programs[ahead]["peak"] - programs[each]["peak"]) / 2**20,
                "peak_over_uncached_mib": (programs[ahead]["peak"] - programs[each]["peak"]) / 2**20,
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| network | batch | method | kind | FLOPs | seconds | realised (turns) | remembers, MiB | program, MiB more |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        if r["method"] != "none":
            turns = f"{min(r['realised_turns']):.2f}-{max(r['realised_turns']):.2f}"
            network = r["model"] + (", conditioned ahead" if conditioning_of(r) == "ahead" else "")
            lines.append(
                f"| {network} | {r['batch']} | {r['method']} | {r['kind']} | x{r['flops_ratio']:.2f} | "
                f"x{r['seconds_ratio']:.2f} | {r['realised']:.3f} ({turns}) | {r['remembered_mib']:.0f} | "
                f"{r['peak_over_uncached_mib']:.0f} |"
            )
    return "\n".join(lines)


def conditioning_of(row: dict[str, Any]) -> str:
    """Of a row; the first ones were measured before there was a choice."""
    return row.get("conditioning", "each")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", help="default: B/2 and XL/2")
    parser.add_argument("--batches", nargs="+", type=int, help="default: 1 and 4 for B/2, 1 for XL/2")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--conditioning", default="each", choices=CONDITIONINGS, help="of cached and uncached sampler")
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--once", action="store_true", help="of models with a caption: conditioned ahead against each")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--lane", default=f"jax{''.join(jax.__version__.split('.')[:2])}", help="name of the file")
    parser.add_argument("--out", type=pathlib.Path, help="file of rows, instead of the lane's")
    parser.add_argument("--table", action="store_true", help="print what is measured, and measure nothing")
    options = parser.parse_args()
    path = options.out or RESULTS / "realised" / f"{options.lane}.jsonl"
    if options.table:
        print(table(read_rows(path)))
        return
    if options.once:
        there = {(r["model"], r["dtype"], r["layout"]) for r in read_rows(path) if "layout" in r}
        for variant, layout in itertools.product(options.models or CAPTIONED, LAYOUTS):
            if (variant, options.dtype, layout) in there:
                continue
            for row in once(
                variant, layout, (options.batches or [1])[0], options.dtype, options.steps, options.repeats
            ):
                append_row(path, {**row, "provenance": provenance()})
                ratios = f"FLOPs x{row['flops_ratio']:.3f}, seconds x{row['seconds_ratio']:.3f}"
                print(f"{row['model']} {row['method']}: {ratios} {row['realised_turns']}", flush=True)
        return
    for method in options.methods:
        if method not in METHODS:
            parser.error(f"unknown method {method!r}; allowed: {', '.join(METHODS)}")
    wanted = GEOMETRIES
    if options.models or options.batches:
        wanted = [(m, b) for m in options.models or ("B/2", "XL/2") for b in options.batches or (1,)]
    for variant, batch in wanted:
        there = {
            r["method"]
            for r in read_rows(path)
            if (r["model"], r["batch"], r["dtype"], conditioning_of(r))
            == (f"DiT-{variant}", batch, options.dtype, options.conditioning)
        }
        methods = [m for m in options.methods if m not in there]
        if not methods:
            continue
        work = (variant, batch, options.dtype, methods, options.steps, options.repeats, options.conditioning)
        for row in measure(*work):
            if row["method"] not in there:
                append_row(path, {**row, "provenance": provenance()})
            print(
                f"{row['model']} b{batch} {row['method']:22} FLOPs x{row['flops_ratio']:.2f}  seconds "
                f"x{row['seconds_ratio']:.2f}  realised {row['realised']:.3f}  remembers {row['remembered_mib']:.0f} "
                f"MiB (program +{row['peak_over_uncached_mib']:.0f})",
                flush=True,
            )


if __name__ == "__main__":
    main()
