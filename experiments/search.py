"""Searched plans against presets at equal operations, on the shipped model and on seeds that the search never saw.

  python -m experiments.search                           every policy of cache-dit's step masks, 50 steps
  python -m experiments.search --policies fast --where stack

For each policy of `difax.accel.caches.masks.steps_mask` the search (`difax calibrate --cache scheduled`) is given as
many computed evaluations as the mask has, so that all plans of a group cost the same operations. Compared are the
mask, uniform intervals, the dynamic programming that the search starts from, and what it found, all with the same
place and forecast. PSNR to the uncached images of the same noise, on `--held-out` samples of another seed; intervals
are bootstraps over samples (`difax.study.metrics.bootstrap`), and `gain` is the paired difference in decibels of the
found plan over each. Rows go to experiments/results/search/LANE.jsonl; a group that is there already is not measured
again.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
from functools import partial
from typing import Any

import jax
import numpy as np

import difax
from difax.accel.caches.masks import POLICIES, steps_mask
from difax.accel.caches.scheduled import PLACES, scheduled
from difax.accel.fit.search import by_dynamic_programming, uniform
from difax.build import Setup
from difax.core.contracts import Accelerator
from difax.core.cost import model_cost, run_cost
from difax.core.files import read_rows
from difax.study.calibrate import Loss, Sampler, calibrate, search
from difax.study.metrics import bootstrap, psnr
from experiments.provenance import RESULTS, append_row, provenance

CONFIG, SEARCHED, HELD_OUT, BATCH = "fmnist_dit", 2_000, 3_000, 20


def budget_of(run: Setup, params: Any, full: int) -> float:
    """The share of the operations at which `search` computes `full` evaluations."""
    cost, evaluations = model_cost(run.model, params, run.attention), len(run.rows.i)
    return (full * cost.evaluation + (evaluations - full) * cost.held) / (evaluations * cost.evaluation) + 1e-9


class HeldOut:
    """PSNR of plans on samples of one seed; every plan runs in one program."""

    def __init__(self, sampler: Sampler, make: Any, samples: int):
        self.sampler = sampler
        self.losses = [Loss(sampler, make, BATCH, start) for start in range(0, samples, BATCH)]

    def __call__(self, schedule: np.ndarray) -> np.ndarray:
        found = []
        for loss in self.losses:
            loss.program = loss.program or self.losses[0].program
            pairs = zip(np.asarray(loss.samples_of(schedule)), np.asarray(loss.wanted), strict=True)
            found += [psnr(a, b) for a, b in pairs]
        return np.asarray(found)

    def operations(self, accelerator: Accelerator) -> float:
        x, keys, cond = self.sampler.inputs(0, BATCH)
        program, rows = self.sampler.program(accelerator), self.sampler.rows(accelerator)
        _, trace = program(self.sampler.params, x, keys, cond, rows, self.sampler.scale())
        run = self.sampler.run
        return run_cost(model_cost(run.model, self.sampler.params, run.attention), jax.tree.map(np.asarray, trace))


def compare(run: Setup, params: Any, policy: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of one policy: its mask, uniform, dynamic programming, and what was found."""
    labels, steps = np.arange(run.model.classes), len(run.rows.i)
    mask = np.asarray(steps_mask(policy=policy, total_steps=steps), bool)
    settings = {"where": options.where, "forecast": options.forecast, "order": 1}
    tell = lambda text: print(f"  {policy}: {text}", file=sys.stderr, flush=True)  # noqa: E731
    sampler = Sampler(run, params, labels, SEARCHED)
    found = search(
        sampler,
        budget_of(run, params, int(mask.sum())),
        options.samples,
        tell,
        rounds=options.rounds,
        **settings,
    )
    table = calibrate("smoothcache", sampler, 8, 8, tell)["errors"]
    errors = [np.asarray(e, np.float64) for branches in table.values() for e in branches.values()]
    plans = {
        f"SCM {policy}": mask,
        "uniform": uniform(steps, int(mask.sum())),
        "dynamic programming": by_dynamic_programming(np.mean(errors, axis=0), int(mask.sum())),
        "found": np.asarray(found["schedule"], bool),
    }
    held = HeldOut(Sampler(run, params, labels, HELD_OUT), partial(scheduled, **settings), options.held_out)
    decibels = {name: held(plan) for name, plan in plans.items()}
    rows = []
    for name, plan in plans.items():
        gain = decibels["found"] - decibels[name]
        rows.append(
            {
                "policy": policy,
                "plan": name,
                **settings,
                "steps": steps,
                "computed": int(plan.sum()),
                "gflops": held.operations(scheduled(plan.astype(int).tolist(), **settings)) / 1e9,
                "schedule": "".join(map(str, plan.astype(int))),
                "psnr": float(np.mean(decibels[name])),
                "psnr_interval": list(bootstrap(decibels[name])[1:]),
                "gain": float(np.mean(gain)),
                "gain_interval": list(bootstrap(gain)[1:]),
                "searched": {"seed": SEARCHED, "samples": options.samples, "losses": found["losses"]},
                "held_out": {"seed": HELD_OUT, "samples": options.held_out},
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policies", nargs="+", default=list(POLICIES), choices=list(POLICIES))
    parser.add_argument("--where", default="branches", choices=PLACES)
    parser.add_argument("--forecast", default="hold", choices=("hold", "taylor", "newton"))
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--samples", type=int, default=10, help="that the search sees (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=12, help="of exchanges (default: %(default)s)")
    parser.add_argument("--held-out", type=int, default=200, help="samples, in whole batches of 20")
    parser.add_argument("--lane", default=f"jax{''.join(jax.__version__.split('.')[:2])}", help="name of the file")
    parser.add_argument("--out", type=pathlib.Path, help="file of rows, instead of the lane's")
    options = parser.parse_args()
    path = options.out or RESULTS / "search" / f"{options.lane}.jsonl"
    opened = difax.load(CONFIG, steps=options.steps)
    run, params = opened.setup, opened.prepared
    keys = ("policy", "where", "forecast", "steps")
    there = {tuple(r[k] for k in keys) for r in read_rows(path)}
    for policy in options.policies:
        if (policy, options.where, options.forecast, options.steps) in there:
            continue
        for row in compare(run, params, policy, options):
            append_row(path, {**row, "provenance": provenance()})
            low, high = row["gain_interval"]
            print(
                f"{row['plan']:22} {row['computed']:3d} of {row['steps']}  {row['gflops']:.1f} GFLOPs  PSNR "
                f"{row['psnr']:.2f}  gain of the found one {row['gain']:+.2f} dB [{low:+.2f}, {high:+.2f}]",
                flush=True,
            )


if __name__ == "__main__":
    main()
