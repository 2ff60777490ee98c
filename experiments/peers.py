"""difax's caches against cache-dit and diffusers' hooks: the same weights, the same loop, decisions and seconds.

  python -m experiments.peers --torch-python PYTHON --torch-path FOLDER     the mid-size networks, all methods
  python -m experiments.peers --sizes tiny ...                              the tiny ones
  python -m experiments.peers --quick --out FILE ...                        a check of a minute: four methods, tiny
  python -m experiments.peers --table                                       the rows as a table

A second process (`experiments.torch_caches`) makes random weights, which difax reads with its own readers, and runs the
peers on them; it needs the `parity` extra, which --torch-python has, and cache-dit 1.5.3, which may lie apart
(`pip install --no-deps --target FOLDER cache-dit==1.5.3`, then --torch-path FOLDER). Everything is float32.

Per method: which branches of which blocks both sides compute at every evaluation, the difference of the final latents,
and seconds of a whole sample, turn by turn, as medians. `ratio` is the peer's seconds over difax's with the cache,
`uncached_ratio` without any, of the same turns. Thresholds are laid between the metrics that the network shows, since
one beside a metric is decided by rounding: `margin` is the distance of the nearest one, over the threshold. Rows go to
experiments/results/peers/LANE.jsonl; a row that is there already is not measured again.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from difax.accel.caches import CACHES
from difax.accel.solvers import SOLVERS
from difax.core.files import read_rows
from difax.core.grids import GRIDS, make_times
from difax.core.guidance import cfg, unguided
from difax.core.noise import sample_keys
from difax.core.process import flow, vp_linear
from difax.core.sample import make_rows, make_sampler
from difax.core.trunk import neutral, unstack
from difax.models.dit_checkpoint import load_dit
from difax.models.flux_checkpoint import load_flux
from difax.models.wan_checkpoint import load_wan
from experiments.peer_settings import GEOMETRIES, QUICK, THREADS, UNCACHED, Method, methods
from experiments.provenance import RESULTS, append_row, provenance

SCALE = 2.0  # of guidance
LAYOUTS = ("unstacked", "stacked")
GUIDES = {"none": unguided, "together": cfg, "separate": lambda: cfg(together=False)}
# where a threshold is tried: a quantile of the metrics of a run that computes everything, times a factor
TRIES = ((0.6, 1.0), (0.6, 1.5), (0.75, 1.0), (0.75, 1.5), (0.45, 1.0), (0.45, 1.5), (0.9, 1.2), (0.3, 1.0), (0.9, 2.0))


class Torch:
    """The peers in a process of their own, asked for one sample at a time."""

    def __init__(self, python: str, path: str | None, geometry: dict[str, Any], folder: str):
        command = [python, "-m", "experiments.torch_caches", json.dumps(geometry), folder]
        where = os.pathsep.join(p for p in (os.environ.get("PYTHONPATH"), path) if p)
        environment = {**os.environ, "PYTHONPATH": where} if where else dict(os.environ)
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.ready = self._read()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the torch process ended with exit code {self.process.wait()}")
        return json.loads(line)

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self._read()

    def close(self) -> None:
        self.process.communicate(input="")


class Work:
    """One geometry on both sides: weights, inputs, the loop's coefficients."""

    def __init__(self, geometry: dict[str, Any], steps: int, python: str, path: str | None, folder: str):
        self.geometry, self.steps, self.folder = geometry, steps, folder
        self.torch = Torch(python, path, geometry, folder)
        given = load_file(f"{folder}/inputs.safetensors")
        file, a = f"{folder}/weights.safetensors", geometry["arguments"]
        self.x = np.moveaxis(given.pop("x"), 1, -1)
        heads = a["num_attention_heads"]
        if geometry["kind"] == "dit":
            model, params = load_dit(file, layout="diffusers", heads=heads, size=a["sample_size"])
            self.process, self.prediction, solver = vp_linear(), "v", "ddim"
            cond: Any = given["label"].astype(np.int32)
        elif geometry["kind"] == "wan":
            sizes = {"size": tuple(geometry["size"]), "text_tokens": geometry["text_tokens"]}
            model, params = load_wan(file, layout="diffusers", heads=heads, **sizes)
            self.process, self.prediction, solver = flow(), "velocity", "euler"
            cond = given
        else:
            sizes = {"size": tuple(geometry["size"]), "text_tokens": geometry["text_tokens"]}
            model, params = load_flux(file, layout="diffusers", axes_dim=tuple(a["axes_dims_rope"]), **sizes)
            self.process, self.prediction, solver = flow(), "velocity", "euler"
            cond = {**given, **{f"null_{k}": np.zeros_like(given[k]) for k in ("text", "pooled")}}
        self.model, self.solver = model, SOLVERS[solver]()
        self.cond = jax.tree.map(jnp.asarray, cond)
        self.params = {"stacked": params, "unstacked": unstack(model, params)}
        self.times = make_times(GRIDS["uniform"](), self.process, steps)
        self.keys = sample_keys(0, len(self.x))

    def loop(self, guide: str) -> dict[str, Any]:
        """What the peers' loop is told: x <- x_e x + output_e network(x, time_e), worked out apart from our solvers."""
        now, later = (self.process.level(t) for t in (self.times[:-1], self.times[1:]))
        if self.prediction == "v":  # x0 = alpha x - sigma v, eps = sigma x + alpha v
            x = later.alpha * now.alpha + later.sigma * now.sigma
            output = later.sigma * now.alpha - later.alpha * now.sigma
        else:
            x, output = np.ones(self.steps), np.diff(self.times)
        columns = {"time": self.process.model_time(self.times[:-1]), "x": x, "output": output}
        return {**{k: np.asarray(v).tolist() for k, v in columns.items()}, "guide": guide, "scale": SCALE}


class Cached:
    """One method on one geometry: difax's compiled samplers, and what the peer is asked."""

    def __init__(self, work: Work, method: Method, layouts: tuple[str, ...]):
        self.work, self.method = work, method
        self.guide = method.guide or work.geometry["guide"]
        self.own, self.settings = dict(method.own), dict(method.settings)
        if method.threshold:
            self.own["threshold"] = 0.0
        guide, accelerator = GUIDES[self.guide](), self._accelerator()
        self.rows = self._rows()
        sampler = make_sampler(work.model, work.process, work.prediction, work.solver, guide, accelerator)
        self.compiled, self.compile_seconds = {}, {}
        for layout in layouts:
            start = time.perf_counter()
            lowered = sampler.lower(*self._arguments(layout))
            self.compiled[layout] = lowered.compile()
            self.compile_seconds[layout] = time.perf_counter() - start
        self.margin: float | None = None
        if method.threshold:
            self._settle(layouts[0])

    def _accelerator(self) -> Any:
        return neutral() if self.method.cache is None else CACHES[self.method.cache](**self.own)

    def _rows(self) -> Any:
        work = self.work
        guide, accelerator = GUIDES[self.guide](), self._accelerator()
        rows = make_rows(work.solver, guide, work.process, work.times, accelerator, work.model.stages)
        return jax.tree.map(jnp.asarray, rows)

    def _arguments(self, layout: str) -> Any:
        work = self.work
        return work.params[layout], jnp.asarray(work.x), work.keys, work.cond, self.rows, jnp.float32(SCALE)

    def difax(self, layout: str) -> tuple[float, np.ndarray, Any]:
        arguments = jax.block_until_ready(self._arguments(layout))
        start = time.perf_counter()
        x, trace = jax.block_until_ready(self.compiled[layout](*arguments))
        return time.perf_counter() - start, np.asarray(x), trace

    def peer(self) -> tuple[dict[str, Any], np.ndarray | None]:
        out = f"{self.work.folder}/out.npy"
        m = self.method
        method = {
            "library": m.library,
            "config": m.config,
            "settings": self.settings,
            "calibrator": m.calibrator,
        }
        answer = self.work.torch.ask({"method": method, "loop": self.work.loop(self.guide), "out": out})
        return answer, None if "error" in answer else np.moveaxis(np.load(out), 1, -1)

    def _settle(self, layout: str) -> None:
        """Lays the threshold between metrics, well away from all that it is compared with in the run itself."""
        known = np.unique(_metrics(self.difax(layout)[2], "known"))
        best: tuple[bool, float, float] = (False, -1.0, 0.0)
        for share, stretch in TRIES:
            at = min(int(share * len(known)), len(known) - 2)
            threshold = self.own["threshold"] = stretch * float(known[at] + known[at + 1]) / 2
            self.rows = self._rows()
            asked = _metrics(self.difax(layout)[2], "asked")
            reused = float(np.mean(asked < threshold))
            best = max(best, (0.25 <= reused <= 0.9, float(np.min(np.abs(asked / threshold - 1))), threshold))
            if best[0] and best[1] >= min(0.02, 0.2 / len(asked)):
                break
        _, self.margin, self.own["threshold"] = best
        self.settings[str(self.method.threshold)] = self.own["threshold"]
        self.rows = self._rows()


def _metrics(trace: Any, which: str) -> np.ndarray:
    """Metrics of a gate: all that the run could form ("known"), or those that decided ("asked")."""
    found = trace.metric["trunk"] or trace.metric["block"]
    gates = [found] if "metric" in found else list(found.values())
    values = [np.asarray(g["metric"])[np.asarray(g["asked"]) > 0 if which == "asked" else ...] for g in gates]
    flat = np.concatenate([v.ravel() for v in values])
    return flat[np.isfinite(flat) & (flat > 0)]


def computed(trace: Any) -> np.ndarray:
    """Which branches of which blocks ran, [E, halves, branches of all blocks], 0 or 1, from difax's trace."""
    parts = [np.asarray(c) for c in trace.computed.values()]
    return np.concatenate([np.moveaxis(c, -1, 1).reshape(len(c), c.shape[-1], -1) for c in parts], axis=-1)


def strips(taken: np.ndarray) -> list[str]:
    """Per half one character per evaluation: F everything computed, . nothing, 1 to 9 tenths in between."""
    fractions = taken.mean(-1)
    letters = [
        ["F" if f >= 1 else "." if f <= 0 else str(min(max(round(10 * f), 1), 9)) for f in half] for half in fractions.T
    ]
    return ["".join(half) for half in letters]


def measure(
    name: str,
    geometry: dict[str, Any],
    wanted: list[str],
    steps: int,
    repeats: int,
    python: str,
    path: str | None,
    layouts: tuple[str, ...] = LAYOUTS,
) -> list[dict[str, Any]]:
    """The rows of one geometry, and its uncached one."""
    found = methods(geometry["kind"], geometry["depth"], steps)
    with tempfile.TemporaryDirectory() as folder:
        work = Work(geometry, steps, python, path, folder)
        try:
            cached = {"uncached": Cached(work, UNCACHED, layouts)}
            cached |= {method: Cached(work, found[method], layouts) for method in wanted}
            seconds: dict[str, dict[str, list[float]]] = {m: {} for m in cached}
            rows: dict[str, dict[str, Any]] = {}
            uncached: Any = None
            for turn in range(repeats + 1):
                for method, one in cached.items():
                    answer, theirs = one.peer()
                    if turn == 0:
                        uncached = theirs if method == "uncached" else uncached
                        rows[method] = _compared(name, geometry, method, one, answer, theirs, uncached, layouts[0])
                    elif "seconds" in answer:
                        seconds[method].setdefault("peer", []).append(answer["seconds"])
                    for layout in layouts if turn else layouts[1:]:  # the first one ran for the comparison
                        # the slower layout is not worth more than one turn
                        if turn > 1 and layout != _fastest(seconds[method], layouts):
                            continue
                        taken = one.difax(layout)[0]
                        if turn:
                            seconds[method].setdefault(layout, []).append(taken)
        finally:
            work.torch.close()
    for method, row in rows.items():
        row |= {"steps": steps, "repeats": repeats, "parameters": work.torch.ready["parameters"]}
        row |= {"compile_seconds": cached[method].compile_seconds, "torch": work.torch.ready["versions"]}
        row |= _timed(seconds[method], seconds["uncached"], layouts)
    return list(rows.values())


def _timed(seconds: dict[str, list[float]], uncached: dict[str, list[float]], layouts: tuple[str, ...]) -> Any:
    """Medians and their ratios; what was not measured is None."""
    own, plain = (
        {side: statistics.median(s) for side, s in taken.items()} | {"difax": statistics.median(taken[layout])}
        if (layout := _fastest(taken, layouts)) in taken
        else {}
        for taken in (seconds, uncached)
    )

    def over(a: dict[str, float], one: str, b: dict[str, float], other: str) -> float | None:
        return a[one] / b[other] if one in a and other in b else None

    return {
        "layout": _fastest(seconds, layouts),
        "seconds": own,
        "seconds_all": {side: [round(t, 5) for t in s] for side, s in seconds.items()},
        "ratio": over(own, "peer", own, "difax"),
        "uncached_ratio": over(plain, "peer", plain, "difax"),
        "speedup": {side: over(plain, side, own, side) for side in ("peer", "difax")},
    }


def _fastest(seconds: dict[str, list[float]], layouts: tuple[str, ...]) -> str:
    """The layout with the smaller first turn: all have had that one."""
    return min(layouts, key=lambda layout: seconds.get(layout, [0.0])[0])


def _compared(
    name: str, geometry: dict[str, Any], method: str, one: Cached, answer: Any, theirs: Any, uncached: Any, layout: str
) -> dict[str, Any]:
    """Decisions and latents of both sides; `effect` is what the cache changes, as large as rel_l2 would be without."""
    row: dict[str, Any] = {
        "geometry": name,
        "model": geometry["class"],
        "method": method,
        "guide": one.guide,
        "peer_settings": one.settings,
        "settings": one.own,
        "margin": one.margin,
    }
    _, ours, trace = one.difax(layout)
    mine = computed(trace)
    row["decisions"] = {"difax": strips(mine)}
    if theirs is None:
        return {**row, "error": answer["error"], **dict.fromkeys(("equal", "max_abs", "max_rel", "rel_l2", "effect"))}
    peer = np.asarray(answer["computed"])
    row["decisions"]["peer"] = strips(peer)
    difference = np.abs(ours - theirs)
    return {
        **row,
        "equal": bool(mine.shape == peer.shape and (mine == peer).all()),
        "max_abs": float(difference.max()),
        "max_rel": float(difference.max() / np.abs(theirs).max()),
        "rel_l2": float(np.linalg.norm(difference) / np.linalg.norm(theirs)),
        "effect": float(np.linalg.norm(theirs - uncached) / np.linalg.norm(uncached)),
    }


def shown(row: dict[str, Any]) -> str:
    """One line of a table."""
    head = f"{row['geometry']:9} {row['method']:26} "
    if row.get("error"):
        return head + f"the peer failed: {row['error'][:90]}"
    strips_ = row["decisions"]["difax"] if row["equal"] else row["decisions"]
    margin = "" if row["margin"] is None else f" margin {row['margin']:.1%}"
    head += f"{'equal' if row['equal'] else 'DIFFER'} {strips_} rel {row['max_rel']:.1e} of {row['effect']:.1e}{margin}"
    if row["ratio"] is None:
        return head
    times = f"{row['seconds']['peer']:.3f} s against {row['seconds']['difax']:.3f} s ({row['layout']})"
    return f"{head}  {times}: x{row['ratio']:.2f}, uncached x{row['uncached_ratio']:.2f}"


def _provenance(options: argparse.Namespace) -> dict[str, Any]:
    """Where a row came from, without the places of this machine."""
    found = provenance()
    for place, name in ((options.torch_python, "PYTHON"), (options.torch_path, "FOLDER"), (options.out, "FILE")):
        if place:
            found["command"] = found["command"].replace(str(place), name)
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a table in Markdown."""
    head = (
        "network | method | decisions | equal | margin | largest difference | effect | s, peer | s, difax (layout) "
        "| ratio | ratio uncached | speed-up, peer | speed-up, difax"
    )
    lines = [f"| {head} |", "|" + "---|" * len(head.split("|"))]
    number = lambda value, form: "" if value is None else format(value, form)  # noqa: E731
    for row in rows:
        if row.get("error"):
            lines.append(f"| {row['geometry']} | {row['method']} | the peer raises {row['error'].split(':')[0]} |")
            continue
        sides = row["decisions"]
        found = sides["difax"] if row["equal"] else [*sides["difax"], "against", *sides["peer"]]
        own = row["seconds"]
        cells = (
            row["geometry"],
            row["method"],
            " ".join(dict.fromkeys(found)),
            "yes" if row["equal"] else "no",
            number(row["margin"], ".1%"),
            number(row["max_rel"], ".1e"),
            "" if row["method"] == "uncached" else number(row["effect"], ".1e"),
            number(own.get("peer"), ".3f"),
            f"{own['difax']:.3f} ({row['layout']})" if own else "",
            number(row["ratio"], ".2f"),
            number(row["uncached_ratio"], ".2f"),
            *(number(row["speedup"][side], ".2f") for side in ("peer", "difax")),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["mid"], choices=("tiny", "mid"))
    parser.add_argument("--models", nargs="+", default=["flux", "dit", "wan"], choices=("flux", "dit", "wan"))
    parser.add_argument("--methods", nargs="+", help="default: all")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=3, help="timed turns; 0: decisions and differences alone")
    parser.add_argument("--torch-threads", type=int, help=f"default: {THREADS}")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, help="default: both")
    parser.add_argument("--quick", action="store_true", help="tiny networks, four methods, one layout, one repeat")
    parser.add_argument("--torch-python", default=sys.executable, help="interpreter that has the parity extra")
    parser.add_argument("--torch-path", help="folder with cache-dit, if it lies apart")
    parser.add_argument("--lane", default=f"jax{''.join(jax.__version__.split('.')[:2])}", help="name of the file")
    parser.add_argument("--out", type=pathlib.Path, help="file of rows, instead of the lane's")
    parser.add_argument("--table", action="store_true", help="print the rows that are there as a table, measure none")
    options = parser.parse_args()
    path = options.out or RESULTS / "peers" / f"{options.lane}.jsonl"
    if options.table:
        print(table(read_rows(path)))
        return
    sizes, repeats = (["tiny"], 1) if options.quick else (options.sizes, options.repeats)
    layouts = tuple(options.layouts or (LAYOUTS[:1] if options.quick else LAYOUTS))
    for name in (f"{model} {size}" for size in sizes for model in options.models):
        geometry = {**GEOMETRIES[name], "threads": options.torch_threads or THREADS[name.split()[1]]}
        known = methods(geometry["kind"], geometry["depth"], options.steps)
        for method in options.methods or ():
            if method not in known:
                parser.error(f"unknown method {method!r}; allowed: {', '.join(known)}")
        there = {r["method"] for r in read_rows(path) if r["geometry"] == name and r["steps"] == options.steps}
        wanted = [m for m in options.methods or (QUICK if options.quick else known) if m not in there]
        if not wanted:
            continue
        rows = measure(
            name, geometry, wanted, options.steps, repeats, options.torch_python, options.torch_path, layouts
        )
        for row in rows:
            if row["method"] not in there:
                append_row(path, {**row, "provenance": _provenance(options)})
            print(shown(row), flush=True)


if __name__ == "__main__":
    main()
