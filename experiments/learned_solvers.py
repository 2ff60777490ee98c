"""Learned and searched solvers against hand-made ones at equal evaluations, on the shipped model and on seeds that no
fit has seen.

  python -m experiments.learned_solvers                                  all of it, hours of two cores
  python -m experiments.learned_solvers --steps 5 --methods bns iia      some rows
  python -m experiments.learned_solvers --page                           the page from the rows

Each solver is fitted by what `difax calibrate --solver NAME` calls, at 5, 8 and 10 evaluations, to samples of one seed
(three quarters learned from, a quarter to choose by), and measured on `--held-out` samples of another seed: PSNR to the
samples of many steps of the same noise, and the kernel distance (KID) of the shipped classifier's features to those of
many steps of other noise. Intervals are bootstraps over samples, and `gain` is the paired difference of PSNR over
`dpmpp_2m`. Rows go to experiments/results/learned_solvers/rows.jsonl; one that is there is not measured again.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
import tempfile
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import difax
from difax.accel.fit.descent import batches, program, rows_of
from difax.accel.solvers import SOLVERS
from difax.core.files import read_rows
from difax.study.calibrate import Sampler, calibrate_to
from difax.study.metrics import bootstrap, kernel_distance, psnr
from experiments.provenance import RESULTS, append_row, provenance

CONFIG, LEARNED, HELD_OUT, FINE, BATCH = "fmnist_dit", 4_000, 5_000, 100, 20
STEPS, HAND = (5, 8, 10), ("ddim", "dpmpp_2m")
# settings of the fits, and the samples that they see, at a time and in all
FITS: dict[str, dict[str, Any]] = {
    "bns": {"iterations": 200, "rate": 2e-3, "batch": 8},
    "ddss": {"iterations": 100, "rate": 1e-3},
    "ltsl": {"iterations": 60, "rate": 1e-2},
    "iia": {"order": 2, "samples": 60},
    "dc_solver": {"batch": 8},
    "usf": {"measured": 100, "samples": 60},
}
PAGE = """# Learned and searched solvers

`python -m experiments.learned_solvers` on the DiT that ships (flow, guidance 2, uniform times where none are learned).
Every learned solver was fitted to samples of one seed and is measured on {held} of another: PSNR to {fine} steps
of Adams-Bashforth 2 from the same noise, KID to those of other noise in the features of the shipped classifier (0 is a
perfect sampler; below it by chance), with bootstrap intervals over samples. Gain is the paired difference of PSNR over
dpmpp_2m. {device}, jax {jax}, {date}. Every number: [rows.jsonl](rows.jsonl).

| evaluations | solver | PSNR [95 %] | gain, dB [95 %] | KID [95 %] | samples | loss of the fit, held out | seconds |
|---|---|---|---|---|---|---|---|
{table}
"""


class Judged:
    """The fine samples of the held-out seed, and the features of them and of a second set."""

    def __init__(self, opened: Any, samples: int, fine: int):
        self.sampler = Sampler(opened.setup, opened.prepared, np.arange(opened.setup.model.classes), HELD_OUT)
        self.features = jax.jit(self.sampler.features())
        drawn = batches(self.sampler, 2 * samples, BATCH, 0, fine)
        self.batches, others = drawn[: len(drawn) // 2], drawn[len(drawn) // 2 :]
        other = np.concatenate([self.features(b.wanted) for b in others])
        self.mean, self.std = other.mean(0), other.std(0) + 0.1 * other.std()
        self.other = (other - self.mean) / self.std

    def __call__(self, solver: Any, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(PSNR of each sample, standardised features) of a solver."""
        run, rows, decibels, features = program(self.sampler, solver), rows_of(self.sampler, solver, times), [], []
        for b in self.batches:
            x = jnp.array(b.x)
            got, _ = run(self.sampler.params, x, b.keys, b.cond, rows, self.sampler.scale())
            decibels += [psnr(x, y) for x, y in zip(np.asarray(got), np.asarray(b.wanted), strict=True)]
            features.append((np.asarray(self.features(got)) - self.mean) / self.std)
        return np.asarray(decibels), np.concatenate(features)


def measure(method: str, steps: int, options: argparse.Namespace, judged: Judged) -> dict[str, Any]:
    """The row of one solver at one number of evaluations."""
    opened = difax.load(CONFIG, steps=steps)
    times, found, seconds, samples = opened.setup.times, {}, 0.0, 0
    if method in HAND:
        solver = SOLVERS[method]()
    else:
        sampler = Sampler(opened.setup, opened.prepared, np.arange(opened.setup.model.classes), LEARNED)
        tell = lambda text: print(f"  {method} {steps}: {text}", file=sys.stderr, flush=True)  # noqa: E731
        settings = {**FITS[method], "steps": options.fine}
        batch, samples = settings.pop("batch", BATCH), min(settings.pop("samples", options.samples), options.samples)
        for key, given in (("iterations", options.iterations), ("measured", options.measured)):
            if given and (key in settings or (key, method) == ("iterations", "dc_solver")):
                settings[key] = given
        with tempfile.TemporaryDirectory() as folder:
            file, start = pathlib.Path(folder) / "found.json", time.perf_counter()
            found = calibrate_to(method, sampler, file, samples, batch, tell, "solver", **settings)
            seconds = time.perf_counter() - start
            solver = SOLVERS[method](file=str(file))
        found = {k: v for k, v in found.items() if k not in ("stages", "history")} | {"settings": settings}
    decibels, features = judged(solver, times)
    base, _ = judged(SOLVERS["dpmpp_2m"](), times)
    kernel = bootstrap(features, lambda rows: kernel_distance(rows, judged.other), resamples=100)
    return {
        "method": method,
        "evaluations": steps,
        "psnr": list(bootstrap(decibels)),
        "gain": list(bootstrap(decibels - base)),
        "kid": list(kernel),
        "fit_seconds": round(seconds, 1),
        "fit": found,
        "samples": samples,
        "fine": options.fine,
        "held_out": len(decibels),
        "provenance": provenance(),
    }


def page(rows: list[dict[str, Any]]) -> str:
    """The page of the rows."""
    lines = []
    for row in sorted(rows, key=lambda r: (r["evaluations"], -r["psnr"][0])):
        figures = [
            f"{v:{sign}.{d}f} [{low:{sign}.{d}f}, {high:{sign}.{d}f}]"
            for (v, low, high), d, sign in ((row["psnr"], 2, ""), (row["gain"], 2, "+"), (row["kid"], 3, ""))
        ]
        loss = f"{row['fit']['before']:.3f} -> {row['fit']['after']:.3f}" if row["fit"] else ""
        cells = [
            str(row["evaluations"]),
            row["method"],
            *figures,
            str(row["samples"] or ""),
            loss,
            f"{row['fit_seconds']:.0f}" if loss else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    first = rows[0]["provenance"]
    return PAGE.format(
        held=rows[0]["held_out"],
        fine=rows[0]["fine"],
        device=f"{first['cores']} cores of {first['processor']}",
        jax=jax.__version__,
        date=first["date"],
        table="\n".join(lines),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", nargs="+", type=int, default=list(STEPS))
    parser.add_argument("--methods", nargs="+", default=[*HAND, *FITS], choices=[*HAND, *FITS])
    parser.add_argument("--samples", type=int, default=160, help="that a fit sees (default: %(default)s)")
    parser.add_argument("--held-out", type=int, default=200, help="samples, in batches of 20 (default: %(default)s)")
    parser.add_argument("--fine", type=int, default=FINE, help="steps of the fine samples (default: %(default)s)")
    parser.add_argument("--iterations", type=int, help="of descents, instead of each method's own")
    parser.add_argument("--measured", type=int, help="schedules of usf, instead of its own")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS / "learned_solvers", help="folder of the rows")
    parser.add_argument("--page", action="store_true", help="only write the page from the rows")
    options = parser.parse_args()
    path, judged = options.out / "rows.jsonl", None
    if not options.page:
        there = {(row["method"], row["evaluations"]) for row in read_rows(path)}
        for steps in options.steps:
            for method in options.methods:
                if (method, steps) in there:
                    continue
                judged = judged or Judged(difax.load(CONFIG, steps=STEPS[0]), options.held_out, options.fine)
                row = measure(method, steps, options, judged)
                append_row(path, row)
                print(f"{steps:3d} {method:10} PSNR {row['psnr'][0]:.2f}, gain {row['gain'][0]:+.2f} dB", flush=True)
    (options.out / "README.md").write_text(page(read_rows(path)))


if __name__ == "__main__":
    main()
