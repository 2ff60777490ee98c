"""GENIE and DuoDiff on the shipped model: error against many steps at equal evaluations, and what each costs.

  difax train --config fmnist_dit --config.model.depth=3 --config.weights=None --config.train.steps=2000 \
    --config.train.decay=700 --config.train.warmup=100 --workdir runs/shallow
  python experiments/augmented_solvers.py --fit --out experiments/results/augmented_solvers
  python experiments/augmented_solvers.py --shallow runs/shallow --out experiments/results/augmented_solvers

Root mean square of the difference to 40 Heun steps of the full model from the same noise, of a seed that the head was
not fitted on. A second network that draws other images as good counts as wrong here.
"""

import argparse
import datetime
import json
import pathlib
import sys

import numpy as np

import difax
from difax.accel.fit.genie import fit
from difax.core.arrays import read_arrays, save_arrays
from difax.core.device import device_name
from difax.study.calibrate import Sampler

LABELS = list(range(10))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shallow", help="folder of the run of a shallow network (DuoDiff is left out without one)")
    parser.add_argument("--out", required=True)
    parser.add_argument("--samples", type=int, default=64, help="that the head is fitted on")
    parser.add_argument("--steps", type=int, default=2000, help="of the fit")
    parser.add_argument("--fit", action="store_true", help="fit the head, and no more")
    options = parser.parse_args()
    out = pathlib.Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    run, head = difax.load("fmnist_dit"), out / "genie_head.npz"
    if options.fit:
        sampler = Sampler(run.setup, run.setup.prepare(run.params), np.arange(10, dtype=np.int32), 0)
        tell = lambda line: print(line, flush=True)  # noqa: E731
        save_arrays(head, fit(sampler, options.samples, 16, tell, steps=options.steps))
        return
    wanted = run.replace(solver="heun", steps=40).sample(LABELS, seed=7).images
    rows: list[dict] = []

    def row(name: str, evaluations: int, **settings: object) -> None:
        result = run.replace(**settings).sample(LABELS, seed=7)
        error = float(np.sqrt(np.mean((result.images - wanted) ** 2)))
        cost = result.cost["gflops_per_image"]
        rows.append({"method": name, "evaluations": evaluations, "rmse": round(error, 4), "gflops": cost})
        print(rows[-1], flush=True)

    for n in (5, 10):
        row("ddim", n, solver="ddim", steps=n)
        row("genie, exact", n, solver="genie", steps=n)
        row("genie, head", n, solver={"name": "genie", "file": str(head)}, steps=n)
    if options.shallow:
        for switch in (0.0, 0.5, 0.8, 1.0):
            cache = {"name": "duodiff", "weights": options.shallow, "switch": switch}
            row(f"duodiff, switch {switch}", 10, solver="ddim", steps=10, cache=cache)
    table = {
        "device": device_name(),
        "date": datetime.date.today().isoformat(),
        "command": " ".join(sys.argv),
        "head_error": float(read_arrays(head)["error"]),
        "rows": rows,
    }
    (out / "table.json").write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
