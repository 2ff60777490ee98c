"""GENIE and DuoDiff on the shipped model: PSNR to the exact solution at equal evaluations, and what each costs.

  difax train --config fmnist_dit --config.model.depth=3 --config.weights=None --config.train.steps=2000 \
    --config.train.decay=700 --config.train.warmup=100 --workdir runs/shallow
  python -m experiments.augmented_solvers [--shallow runs/shallow] [--reaches 0 0.1 0.2]

The exact solution is 40 Heun steps of the full model from the same noise, on seeds that no head was fitted on; PSNR
with 95 % bootstrap intervals over images. A second network that draws other images as good counts as wrong here.
GENIE's head is fitted for each reach (`difax.accel.fit.genie`), 0 being the paper's exact derivative. Rows go to
experiments/results/augmented_solvers/rows.jsonl.
"""

from __future__ import annotations

import argparse
import pathlib
import tempfile
from typing import Any

import numpy as np

import difax
from difax.study.metrics import bootstrap, psnr
from experiments.provenance import RESULTS, append_row, provenance

SEED, FITTED = 7, 1_000
BUDGETS = (5, 10, 20)


def measured(run: Any, labels: list[int], wanted: np.ndarray) -> dict[str, Any]:
    """PSNR with its interval, and GFLOPs of an image."""
    result = run.sample(labels, seed=SEED)
    mean, low, high = bootstrap(np.asarray([psnr(a, b) for a, b in zip(result.images, wanted, strict=True)]))
    return {"psnr": mean, "interval": [low, high], "gflops_per_image": result.cost["gflops_per_image"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shallow", help="folder of the run of a shallow network (DuoDiff is left out without one)")
    parser.add_argument("--reaches", type=float, nargs="*", default=[0.0, 0.1, 0.2])
    parser.add_argument("--samples", type=int, default=64, help="that a head is fitted on (default: %(default)s)")
    parser.add_argument("--fit-steps", type=int, default=2000, help="of Adam (default: %(default)s)")
    parser.add_argument("--repeat", type=int, default=4, help="images of each class (default: %(default)s)")
    options = parser.parse_args()
    run, path = difax.load("fmnist_dit"), RESULTS / "augmented_solvers" / "rows.jsonl"
    labels = list(range(10)) * options.repeat
    wanted = run.replace(solver="heun", steps=40).sample(labels, seed=SEED).images

    def row(name: str, evaluations: int, more: dict[str, Any] | None = None, **settings: Any) -> None:
        found = measured(run.replace(**settings), labels, wanted)
        about = {"method": name, "evaluations": evaluations, "images": len(labels), **(more or {})}
        append_row(path, {**about, **found, "provenance": provenance()})
        low, high = found["interval"]
        print(f"{name:28} {evaluations:3d}  {found['psnr']:.2f} dB [{low:.2f}, {high:.2f}]", flush=True)

    for n in BUDGETS:
        row("ddim", n, solver="ddim", steps=n)
        row("dpmpp_2m", n, solver="dpmpp_2m", steps=n)
        row("genie, exact derivative", n, solver="genie", steps=n)
    with tempfile.TemporaryDirectory() as folder:
        for reach in options.reaches:
            file = str(pathlib.Path(folder) / f"head_{reach}.npz")
            fit = {"samples": options.samples, "batch": 16, "seed": FITTED, "steps": options.fit_steps, "reach": reach}
            made = run.calibrate("genie", file, kind="solver", **fit)
            left = float(made["arrays"]["error"])
            print(f"head of reach {reach}: {left:.3f} of the loss without one is left", flush=True)
            for n in BUDGETS:
                more = {"reach": reach, "loss_left": left}
                row(f"genie, head of reach {reach}", n, more, solver={"name": "genie", "file": file}, steps=n)
    for switch in (0.0, 0.5, 0.8, 1.0) if options.shallow else ():
        cache = {"name": "duodiff", "weights": options.shallow, "switch": switch}
        row(f"duodiff, switch {switch}", 10, {"switch": switch}, solver="ddim", steps=10, cache=cache)


if __name__ == "__main__":
    main()
