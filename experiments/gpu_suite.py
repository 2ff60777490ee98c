"""Everything that only a GPU can tell, in one command of fifteen minutes, what teaches most per second first.

  python -m experiments.gpu_suite --budget 780        all parts, in order; 540 is enough for the first five
  python -m experiments.gpu_suite --part kernels      one part (may be given several times)
  python -m experiments.gpu_suite --rehearse          every part at toy size on the CPU, under three minutes
  python -m experiments.gpu_suite --list | --page     the parts; README.md of the folder from the rows that are there

Rows of JSON go to OUT/rows.jsonl as they are measured (default: experiments/results/gpu), with device, driver,
versions, command and date. Each part is a process of its own under a bound of its own: its share of the seconds that
are left, so that what one part does not use the next ones have. A part that says nothing for too long, or that dies,
leaves an error row of the variant that it had begun, and is started again behind it. A rerun with the same OUT measures
what is missing and what raised. On an image without network, see CONTRIBUTING.md for what to carry.
"""

from __future__ import annotations

import argparse
import datetime
import os
import pathlib
import signal
import sys
import tempfile
import time
from typing import Any, NamedTuple

from difax.core.files import read_rows
from experiments.bounded import driver, watch
from experiments.gpu_rows import RESTART, ROWS
from experiments.provenance import RESULTS, append_row

OUT = RESULTS / "gpu"
STARTS = 6  # of one part: each death costs one
LEAST = 12.0  # seconds below which a part is not begun


class Part(NamedTuple):
    """about: what it is for; share: of the budget, and of a rehearsal's; stall: seconds of silence after which it is
    taken for hung."""

    about: str
    share: float
    toy_share: float
    stall: float


PARTS = {
    "ceilings": Part("versions, products in bf16, int8, fp8, copy", 45, 15, 60),
    "kernels": Part("block-sparse attention: errors, cuDNN, Mosaic against Triton with the decision rule", 170, 20, 45),
    "products": Part("fused products against XLA's in bf16, int8, fp8, int4", 85, 20, 45),
    "models": Part("DiT-XL/2 and FLUX blocks in bf16, int8, fp8 against torch.compile", 170, 40, 120),
    "realised": Part("FORA, TeaCache, ToCa on DiT-XL/2 at batch 1 and 8: seconds against operations", 170, 40, 150),
    "training": Part("DiT-S/2 and B/2 on latents at batch 256: steps per second, a loss that falls", 80, 40, 90),
    "whole": Part("the whole sampler of flux_dev at reduced depth", 60, 30, 90),
}


def part_command(name: str, seconds: float, options: argparse.Namespace) -> list[str]:
    """The command line of one part."""
    command = [sys.executable, "-m", options.module, name, "--out", str(options.out), "--seconds", f"{seconds:.1f}"]
    command += ["--run", options.run, "--command", options.command]
    return [*command, *(["--rehearse"] if options.rehearse else [])]


def environment(options: argparse.Namespace) -> dict[str, str]:
    """Of a part: torch runs beside jax, compiled programs are kept for the next start of the same part."""
    found = {
        **os.environ,
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.9",
        "PYTHONUNBUFFERED": "1",
    }
    found.setdefault("JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(tempfile.gettempdir()) / "difax-gpu-suite"))
    found.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "3")
    return found | ({"JAX_PLATFORMS": "cpu"} if options.rehearse else {})


def run_part(name: str, bound: float, options: argparse.Namespace) -> str:
    """Runs one part for at most `bound` seconds and appends the row of how it ended; returns that."""
    start, end, outcome = time.monotonic(), time.monotonic() + bound, ""
    for attempt in range(STARTS):
        left = end - time.monotonic()
        if attempt and left < min(LEAST, bound / 2):
            break
        outcome, label, last = watch(part_command(name, left, options), end, PARTS[name].stall, environment(options))
        if outcome in ("done", "bound"):
            break
        if label is None:  # it died before it had begun anything: another start would too
            outcome = f"{outcome}: {last}"
            break
        there = _own_row(name, label, options)
        if there is not None and outcome != f"exit code {RESTART}":  # nothing new before it died: it would again
            outcome = f"{outcome}: {last}"
            break
        if there is None:
            row = {"part": name, "label": label, "error": f"the process ended ({outcome}): {last}"[:300]}
            append_row(options.out / ROWS, {**row, "run": options.run, "provenance": source(options)})
    row = {"part": name, "label": "part", "outcome": outcome[:300], "seconds": time.monotonic() - start, "bound": bound}
    append_row(options.out / ROWS, {**row, "run": options.run, "provenance": source(options)})
    print(f"== {name}: {row['outcome']} after {row['seconds']:.0f} of {bound:.0f} s", flush=True)
    return outcome


def _own_row(part: str, label: str, options: argparse.Namespace) -> dict[str, Any] | None:
    rows = [r for r in read_rows(options.out / ROWS) if (r["part"], r["label"], r["run"]) == (part, label, options.run)]
    return rows[-1] if rows else None


def source(options: argparse.Namespace) -> dict[str, str]:
    """Provenance of a row that this process writes, which does not start JAX on the device."""
    date = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    return {"device": options.device, "command": options.command, "date": date}


def run_all(options: argparse.Namespace) -> None:
    """All parts that are not done, each for its share of what is left of the budget."""
    end = time.monotonic() + options.budget
    names = [n for n in PARTS if not options.part or n in options.part]
    rows = read_rows(options.out / ROWS)
    errors = {(r["part"], r["label"]): "error" in r for r in rows if r["label"] != "part"}
    ended = {r["part"]: r["outcome"] for r in rows if r["label"] == "part"}
    again = {part for (part, _), error in errors.items() if error}
    for i, name in enumerate(names):
        if ended.get(name) == "done" and name not in again:
            print(f"== {name}: done already", flush=True)
            continue
        left = end - time.monotonic()
        shares = [PARTS[n].toy_share if options.rehearse else PARTS[n].share for n in names[i:]]
        bound = left * shares[0] / sum(shares)
        if bound < LEAST * min(1.0, options.budget / 540):
            print(f"== {name}: not begun, {left:.0f} s are left", flush=True)
            continue
        print(f"== {name}: {PARTS[name].about} (at most {bound:.0f} s)", flush=True)
        run_part(name, bound, options)


def table(rows: list[dict[str, Any]]) -> str:
    """What was measured, a line each: microseconds, against the baseline, or the error."""
    last = {(r["part"], r["label"]): r for r in rows if r["label"] != "part"}
    lines = []
    for (part, label), row in last.items():
        ratio = f"x{row['over_baseline']:.2f}" if "over_baseline" in row else ""
        time_ = f"{row['us']:,.0f} us" if "us" in row else ""
        rest = row.get("error") or row.get("decision") or ""
        lines.append(f"{part:9} {label:46} {time_:>14} {ratio:>7}  {str(rest)[:70]}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=780, help="seconds in all (780)")
    parser.add_argument("--part", choices=PARTS, action="append", help="may be given several times")
    parser.add_argument("--out", type=pathlib.Path, default=OUT, help="folder of the rows")
    parser.add_argument("--rehearse", action="store_true", help="toy sizes on the CPU, to see that every part runs")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--page", action="store_true", help="write README.md of the folder, and measure nothing")
    parser.add_argument("--module", default="experiments.gpu_parts", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.list:
        for name, part in PARTS.items():
            print(f"{name:10} {part.about}")
        return
    if options.page:
        from experiments.gpu_page import page

        (options.out / "README.md").write_text(page(options.out))
        return
    if options.rehearse and options.out == OUT:
        parser.error("--rehearse needs an --out of its own: its rows are no results")
    options.out.mkdir(parents=True, exist_ok=True)
    options.run = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%S.%f")
    words = sys.argv[1:] if arguments is None else arguments
    folder = str(options.out)  # is the machine's own, and says nothing of the figures
    options.command = " ".join(["python -m experiments.gpu_suite", *words]).replace(folder, "DIR")
    options.device = driver() or "no GPU"
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        run_all(options)
    finally:
        signal.signal(signal.SIGTERM, before)
        print(table(read_rows(options.out / ROWS)), flush=True)


if __name__ == "__main__":
    main()
