"""`difax plan`: what a run would take on devices that are not there, compiled in a process of its own.

The child process (`difax.study.planning`) has the environment that a target's compiler wants before jax starts; this
one loads no compiler, so that a notebook may plan for several targets, and a library that aborts ends no session.
"""

from __future__ import annotations

import io
import json
import os
import pathlib
import pickle
import signal
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from difax.core.chips import check_compiler, environment, parse_target
from difax.media.images import drawing

GIB = 2**30
# what a device's memory holds -> how it is drawn, in colours that the colour-blind tell apart
HOLDS = {"weights": "#0b5fa5", "caches": "#c2410c", "activations": "#0a8291", "inputs": "#946800"}


class Planned:
    """A plan: `figures`, plain numbers for JSON; shows itself as a table.

    model, cache, quant, ...: of the run. target, devices, device, mesh, batch, xla: compiled for.
    fits: True, False, or None where the memory is nobody's figure (cpu).
    memory: bytes of one device {"argument", "temporary", "output", "aliased", "peak", "chip" (as published), "usable"};
    holds: the same by what it holds. arguments, temporaries: the largest, each with its bytes.
    operations {type: of one device}, bytes: to and from its memory, both of a run, by `difax.core.cost`, divided as
    `divided` says; operations_compiled: of the products in the compiled program. decided: False where a cache decides
    in the run what is computed, and the figures are the most that it may be.
    collectives {kind: {"times", "bytes", "sent"}}: of one device in a run; collectives_least: if every conditional took
    its cheapest branch.
    planned: True where a cache's modes were counted as often as its plan takes each, so that neither is a bound.
    seconds: {"compute", "memory", "collectives", "least", "summed", "rates"}, None without published peaks.
    instead: placements that fit where this one does not. candidates, compiled: of mesh "auto".
    pipeline, stages, whole: of a pipeline, the ways in which each stage beside the sampler can run
    (`difax.study.stages.planned`; chosen: as a run does), and what all of it takes (`difax.study.stages.whole`).
    """

    def __init__(self, figures: Mapping[str, Any]):
        self.figures = dict(figures)

    @property
    def fits(self) -> bool | None:
        """Whether one device's memory holds it; None where nobody publishes that memory."""
        return self.figures["fits"]

    def draw(self, path: str | os.PathLike) -> None:
        """Writes the picture of the memory (.png) by what it holds, against the chip's; needs the extra `plot`."""
        draw_plan(self.figures, pathlib.Path(path))

    def __repr__(self) -> str:
        return format_plan(self.figures)


def plan(
    config: Mapping[str, Any],
    target: str,
    auto: bool = False,
    batch: int | None = None,
    xla: Mapping[str, Any] | None = None,
    search: bool = True,
    quiet: bool = True,
    whole: bool = False,
) -> Planned:
    """Compiles a configuration's whole sampler ahead of time, from shapes alone, for devices that are not there.

    Args:
      config: of the run; its section `mesh` is what is compiled (without one: all devices along "data").
      target: "v5e:4x4", "v6e:2x4", "v5p:2x2x2", "v4:2x2x1", "h100:8", "h200:8" or "cpu:8".
      auto: rank all meshes instead.
      batch: samples at once; None is one for each group of the mesh that has samples of its own.
      xla: options of XLA's compiler {name: bool, int or text}.
      search: look for another placement where this one does not fit.
      quiet: no lines on stderr of what is compiled.
      whole: also the published text encoders and autoencoder around the denoiser; of a pipeline's folder, whose own
        they are, always.

    Returns:
      `Planned`.

    Raises:
      ValueError: an unknown target, a compiler that is not installed (names the extra), a mesh that does not multiply
        to the devices, or a configuration that cannot be built.
    """
    absent = parse_target(target)
    check_compiler(absent)
    asked = (dict(config), target, auto, batch, dict(xla or {}), search, whole)
    try:
        request = pickle.dumps((asked, quiet))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ValueError(
            f"plan compiles in another process, which this configuration does not reach ({error}); allowed: code by "
            "its name, module:factory or path/to/file.py:factory"
        ) from None
    env = os.environ | environment(absent)
    env["PYTHONPATH"] = os.pathsep.join(dict.fromkeys([p for p in sys.path if p]))
    child = subprocess.Popen(
        [sys.executable, "-m", "difax.study.planning"], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        out, _ = child.communicate(request)
    except BaseException:
        child.kill()
        child.wait()
        raise
    if child.returncode or not out.strip():
        if child.returncode == -signal.SIGKILL:
            raise MemoryError(f"the compiler's process for {target} was killed")
        raise RuntimeError(f"plan: the compiler's process for {target} ended with exit code {child.returncode}")
    found = json.loads(out)
    if "refused" in found:
        raise ValueError(found["refused"])
    if "failed" in found:
        raise RuntimeError(f"plan: {found['failed']}\n{found['traceback']}")
    return Planned(found["plan"])


def _gib(n: float | None) -> str:
    if n is None:
        return "?"
    return f"{n / GIB:.2f} GiB" if n >= GIB / 10 else f"{n / 2**20:.2f} MiB"


def _large(n: float, unit: str) -> str:
    for factor, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if n >= factor:
            return f"{n / factor:.3g} {prefix}{unit}"
    return f"{n:.3g} {unit}"


def _seconds(n: float | None) -> str:
    return "?" if n is None else f"{n:.3g} s"


def format_plan(found: Mapping[str, Any]) -> str:
    """A plan as a table for people."""
    memory, bound = found["memory"], found["seconds"]
    of = ", ".join(f"{key} {found[key]}" for key in ("cache", "quant", "attend") if found[key] != "none")
    lines = [
        f"{found['model']}{f' ({of})' if of else ''}, {found['evaluations']} evaluations, batch {found['batch']}",
        f"{found['target']}: {found['devices']} x {found['device']}, mesh {found['mesh']}"
        + (f", XLA {found['xla']}" if found["xla"] else ""),
        "",
    ]
    if "candidates" in found:
        lines += [*_ranking(found), ""]
    lines += [*_memory(found, memory), ""]
    if found["refused"]:
        lines += [f"refused by XLA: {found['refused']}", ""]
    if found["fits"] is False:
        lines += [*_largest(found), *_instead(found), ""]
    at_most = "" if found["decided"] else ", at most: the cache decides in the run"
    lines.append(f"one device in a run{at_most} ({found['divided']})")
    lines += [f"  operations, {kind:<14}{_large(n, 'FLOP')}" for kind, n in found["operations"].items()]
    if found["operations_compiled"]:
        compiled = _large(found["operations_compiled"], "FLOP")
        lines.append(f"  products as compiled      {compiled} (without what is inside kernels)")
    lines.append(f"  memory traffic            {_large(found['bytes'], 'B')}")
    for kind, moved in found["collectives"].items():
        least = found["collectives_least"].get(kind, {"times": 0})["times"]
        few = "" if found["planned"] or least == moved["times"] else f" at most, {least:g} times at least"
        lines.append(f"  {kind:<26}{moved['times']:g} times, {_gib(moved['bytes'])}, {_gib(moved['sent'])} sent{few}")
    if not found["collectives"] and not found["refused"]:
        lines.append("  collectives               none")
    if found["loops_of_unknown_length"]:
        lines.append(f"  {found['loops_of_unknown_length']} loops of unknown length are counted once")
    lines.append("")
    if bound is None:
        why = "it was not compiled" if found["refused"] else "nobody publishes peaks of this target"
        lines.append(f"seconds: none, {why}")
    else:
        rates = bound["rates"]
        compute = ", ".join(
            f"{_large(v, 'FLOP/s')} {k.removesuffix(' operations/s')}" for k, v in rates.items() if "operations" in k
        )
        lines += [
            "seconds of a run on one device, at the chip's published peaks",
            f"  compute                   {_seconds(bound['compute'])} ({compute})",
            f"  memory                    {_seconds(bound['memory'])} ({_large(rates['memory bytes/s'], 'B/s')})",
            f"  collectives               {_seconds(bound['collectives'])} ({_large(rates['link bytes/s'], 'B/s')}: "
            f"all links, one way{_hosts(found)})",
            f"  a bound from below        {_seconds(bound['least'])} if all three overlap, "
            f"{_seconds(bound['summed'])} if none does",
        ]
    if "stages" in found:
        lines += ["", *_stages(found)]
    lines.append(f"compiled in {found['compile_seconds']} s with jax {found['jax']}")
    return "\n".join(lines)


def _stages(found: Mapping[str, Any]) -> list[str]:
    """What the pipeline takes around the sampler, and as a whole."""
    all_of, rows = found["whole"], found["stages"]
    lines = [f"{found['pipeline']} as a whole, on one device; stages as a run takes them, and (in brackets) otherwise"]
    shown = [
        (
            f"{row['stage']}: {row['what']}, {row['how']}",
            row["chosen"],
            _gib(row["peak"]) + (" TOO LARGE" if row["fits"] is False else ""),
            _large(sum(row["operations"].values()), "FLOP"),
            _seconds(row["seconds"] and row["seconds"]["least"]),
        )
        for row in rows
    ]
    last = next((i for i, row in enumerate(rows) if row["stage"] == "vae"), len(rows))
    bound = found["seconds"] and found["seconds"]["least"]
    peak, operations = found["memory"].get("peak"), sum(found["operations"].values())
    shown.insert(last, ("sampler: as above", True, _gib(peak), _large(operations, "FLOP"), _seconds(bound)))
    width = max(len(what) for what, *_ in shown) + 2
    for what, chosen, *figures in shown:
        cells = "  ".join(f"{cell:>11}" for cell in figures)
        lines.append(f"  {what if chosen else f'({what})':<{width}}  {cells}")
    refused = [f"  {row['stage']}, {row['how']}: {row['refused']}" for row in rows if row["refused"]]
    verdict = {True: ": fits", False: ": DOES NOT FIT", None: ""}[all_of["fits"]]
    least = "" if all_of["seconds"] is None else f", {_seconds(all_of['seconds']['least'])} at least"
    return [
        *lines,
        *refused,
        f"  the largest stage is {all_of['stage']}, {_gib(all_of['peak'])}; with the denoiser's weights kept while it "
        f"decodes, as a run keeps them, {_gib(all_of['peak_kept'])}{verdict}",
        f"  all of it: {_large(all_of['operations'], 'FLOP')}{least}",
    ]


def _hosts(found: Mapping[str, Any]) -> str:
    """What the links of a chip are not: GPUs of one host have NVLink, those of others a network."""
    several = parse_target(found["target"]).published.platform == "gpu" and found["devices"] > 8
    return "; between hosts slower, which is not counted" if several else ""


def _memory(found: Mapping[str, Any], memory: Mapping[str, Any]) -> list[str]:
    lines = [f"memory of one device{' (estimated by shape)' if found['refused'] else ''}"]
    lines += [f"  {name:<26}{_gib(n)}" for name, n in found["holds"].items()]
    if "argument" in memory:
        parts = ", ".join(f"{name} {_gib(memory[name])}" for name in ("argument", "temporary", "output", "aliased"))
        lines.append(f"  as XLA counts             {parts}")
    room = f" of {_gib(memory['usable'])} (published: {_gib(memory['chip'])})" if memory["usable"] else ""
    verdict = {True: ": fits", False: ": DOES NOT FIT", None: ""}[found["fits"]]
    return [*lines, f"  peak                      {_gib(memory.get('peak'))}{room}{verdict}"]


def _largest(found: Mapping[str, Any]) -> list[str]:
    lines = ["largest buffers of one device"]
    lines += [f"  {_gib(row['bytes']):<14}argument   {row['name']}" for row in found["arguments"][:5]]
    for row in found["temporaries"][:5]:
        lines.append(f"  {_gib(row['bytes']):<14}temporary  {row['type']} {row['where']}".rstrip())
    return lines


def _instead(found: Mapping[str, Any]) -> list[str]:
    if "instead" not in found:
        return []
    if not found["instead"]:
        return ["no placement of these devices that fits was found"]
    lines = ["what fits"]
    for row in found["instead"]:
        how = "by arithmetic, not compiled" if row.get("estimated") else "compiled"
        quant = f" --quant {row['quant']}" if row.get("quant", "none") != found["quant"] else ""
        lines.append(f"  --mesh {row['mesh']}{quant}: {_gib(row['bytes'])}, {_seconds(row['seconds'])} ({how})")
    return lines


def _ranking(found: Mapping[str, Any], most: int = 12) -> list[str]:
    rows = found["candidates"]
    compiled = {row["mesh"]: row for row in found["compiled"]}
    width = max(len(row["mesh"]) for row in rows[:most])
    lines = [
        f"{len(rows)} placements, by arithmetic; the best {len(compiled)} compiled",
        f"  {'mesh':<{width}}  {'estimated':>22}  {'compiled':>22}",
    ]
    for row in rows[:most]:
        guess = f"{_gib(row['bytes'])} {_seconds(row['seconds'])}" + (" too large" if row["fits"] is False else "")
        made = compiled.get(row["mesh"])
        seen = "" if made is None else f"{_gib(made['bytes'])} {_seconds(made['seconds'])}"
        lines.append(f"  {row['mesh']:<{width}}  {guess:>22}  {seen:>22}".rstrip())
    return lines


def draw_plan(found: Mapping[str, Any], path: pathlib.Path | io.BytesIO) -> None:
    """The memory of one device as bars by what it holds: this placement, and those that fit instead of it, if there
    are any, and a pipeline's other stages, against the line of the chip's memory.

    Raises:
      ValueError: matplotlib is missing (the extra `plot`).
    """
    usable, others = found["memory"]["usable"], found.get("instead", ())
    stages = [row for row in found.get("stages", ()) if row["peak"] is not None]
    tall = 3.2 + 0.35 * len(stages)
    with drawing(path, (9, tall), layout="constrained") as picture:  # type: ignore[arg-type]
        axes = picture.add_subplot()
        sizes = *(row["bytes"] for row in others), *(row["peak"] for row in stages)
        widest = max([sum(found["holds"].values()), usable or 0, *sizes])
        unit, scale = ("GiB", GIB) if widest > GIB else ("MiB", 2**20)
        bars = [(f"sampler, {found['mesh']}" if stages else found["mesh"], found["holds"], None)]
        for row in others:
            quantised = f", {row['quant']}" if row.get("quant", "none") != found["quant"] else ""
            bars.append((f"{row['mesh']}{quantised}", row.get("holds"), row["bytes"]))
        bars += [(f"{row['stage']}, {row['how']}", row["holds"], row["peak"]) for row in stages]
        for i, (name, holds, total) in enumerate(bars):
            left = 0.0
            for what, n in (holds or {"by arithmetic": total or 0}).items():
                colour, n = HOLDS.get(what, "#a0a5ab"), n / scale
                label = f"{what} {n:.2f} {unit}" if i == 0 else None
                axes.barh([name], [n], left=left, color=colour, height=0.5, label=label)
                left += n
            axes.text(left, name, f" {left:.2f} {unit}", va="center")
        if usable:
            axes.axvline(usable / scale, color="#1c1d1f", linestyle="--", linewidth=1)
            axes.text(usable / scale, len(bars) - 0.65, f" {usable / scale:.2f} {unit}", va="bottom", ha="left")
        axes.set_ylim(-0.6, len(bars) - 0.3)
        axes.set_xlim(0, 1.2 * widest / scale)
        axes.set_xlabel(f"{unit} of one device")
        verdict = {True: "fits", False: "does not fit", None: "memory is the host's"}[found.get("whole", found)["fits"]]
        axes.set_title(f"{found['model']}, batch {found['batch']}, {found['target']}: {verdict}", fontsize=10)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.28), ncols=4, frameon=False, fontsize=8)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
