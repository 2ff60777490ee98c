"""How good samples are: agreement with the requested label and Frechet distance to real images, each with a control.

  python -m experiments.evaluate                                        the weights that ship, 2,000 samples
  python -m experiments.evaluate --workdir RUN --solver dpmpp_2m --steps 25 --scale 1.5 --out row.json

The judge is the classifier that difax trained and ships. It sees 8-bit images. Frechet distances are taken between
its features, standardised by those of 10,000 training images, and between sets of equal size and equal classes:
samples against the reference, and other real test images against the same reference, which is what a perfect
sampler would score. They are no FID and compare with nothing but each other.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import sys
from typing import Any

import numpy as np

import difax
from difax.config import load_config
from difax.media.images import to_uint8
from difax.study.judge import CLASSIFIER, halves, judge_samples, make_judge
from difax.training.data import CLASS_NAMES, data_section
from experiments.provenance import provenance


def format_report(row: dict[str, Any], names: tuple[str, ...]) -> str:
    """The measures of one row, for people."""

    def share(a: dict[str, Any]) -> str:
        return f"{a['rate']:.4f}  [{a['low']:.4f}, {a['high']:.4f}]  n {a['n']}"

    per_class = ", ".join(f"{name} {rate:.2f}" for name, rate in zip(names, row["agreement_per_class"], strict=True))
    return "\n".join(
        [
            f"agreement with the requested label   {share(row['agreement'])}",
            f"  of real test images (control)      {share(row['real_agreement'])}",
            f"  per class: {per_class}",
            f"Frechet distance, samples to real    {row['frechet']:.3f}  n {row['samples']}",
            f"  real to real (control)             {row['real_frechet']:.3f}  n {row['samples']}",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument("--workdir", metavar="RUN", help="a training run: its configuration and last averages")
    weights.add_argument("--weights", metavar="FILE.safetensors", help="instead of the embedded weights")
    parser.add_argument("--config", help="a name of `difax list configs`, or a .py file (default: fmnist_dit)")
    for name in ("solver", "grid", "guide", "cache"):
        parser.add_argument(f"--{name}", metavar="NAME")
    parser.add_argument("--steps", type=int, help="solver steps")
    parser.add_argument("--scale", type=float, help="guidance scale")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="compute dtype of the sampled model")
    parser.add_argument("--samples", type=int, default=2000, help="of the classes in turn (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", metavar="DIR", help="folder of the data set's files")
    parser.add_argument("--out", type=pathlib.Path, metavar="FILE.json")
    options = parser.parse_args()
    if options.workdir and options.config:
        parser.error("--workdir brings its own configuration; leave --config out")
    try:
        row = evaluate(options)
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    if options.out:
        aside = options.out.with_name(f".{options.out.name}.part")
        aside.write_text(json.dumps(row, indent=1) + "\n")
        os.replace(aside, options.out)


def evaluate(options: argparse.Namespace) -> dict[str, Any]:
    """Samples and measures as the command line asks; prints the table and returns the row."""
    if options.out and not options.out.absolute().parent.is_dir():
        raise ValueError(f"--out {options.out}: its folder does not exist")
    given = {k: getattr(options, k) for k in ("solver", "grid", "guide", "cache", "steps", "scale", "dtype")}
    settings = {k: v for k, v in given.items() if v is not None}
    run = difax.load(options.workdir or options.config or "fmnist_dit", weights=options.weights, **settings)
    config, model = run.config, run.setup.model
    data = config.get("data", {})
    judge = make_judge(None, data_section(options.data, data) if options.data else data)
    if judge.classifier.input_shape != model.input_shape or judge.classifier.classes != model.classes:
        raise ValueError(
            f"{model.name} draws {model.input_shape} in {model.classes} classes; the judge knows "
            f"{judge.classifier.input_shape} in {judge.classifier.classes}"
        )
    halves(judge.test, options.samples, model.classes)  # refuses a number before hours of sampling
    labels = np.arange(options.samples, dtype=np.int32) % model.classes
    drawn = run.sample(labels, options.seed, progress=sys.stderr.isatty())
    measures = judge_samples(judge, to_uint8(drawn.images), labels)
    print(format_report(measures, CLASS_NAMES[load_config(CLASSIFIER)["data"]["name"]]), flush=True)
    sampler = {k: config[k] for k in ("solver", "grid", "guide", "cache", "steps", "scale") if k in config}
    return {
        "model": model.name,
        "weights": run.source,
        "dtype": config["model"].get("dtype", "float32"),
        **sampler,
        "seed": options.seed,
        **measures,
        "cost": drawn.table,
        "provenance": provenance(),
    }


if __name__ == "__main__":
    main()
