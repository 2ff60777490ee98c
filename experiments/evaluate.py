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
from typing import Any, NamedTuple

import jax
import numpy as np

from difax.build import build_data, build_run, load_weights, make
from difax.config import load_config, override
from difax.contracts import Classifier, Params
from difax.data import CLASS_NAMES, Images
from difax.images import to_uint8
from difax.losses import scale_image
from difax.metrics import FeatureScale, agreement, feature_scale, frechet_distance, normalise_features
from difax.report import draw
from difax.train import read_run
from experiments.provenance import provenance

CLASSIFIER = "fmnist_cnn"
SCALE_IMAGES = 10_000
BATCH = 500


class Judge(NamedTuple):
    """A trained classifier, the scale of its features, and the real test images: reference, control and all."""

    classifier: Classifier
    params: Params
    scale: FeatureScale
    test: Images


def make_judge(data_dir: str | None = None) -> Judge:
    """The embedded classifier, with the scale of its features measured on the first training images."""
    config = load_config(CLASSIFIER)
    classifier = make("model", config["model"])
    _, params, _ = load_weights(config, classifier)
    train, test = (build_data(config, split, data_dir) for split in ("train", "test"))
    _, features = examine(classifier, params, train.image[:SCALE_IMAGES])
    return Judge(classifier, params, feature_scale(features), test)


def examine(classifier: Classifier, params: Params, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Predicted labels [N] and features [N, F] of uint8 images [N, H, W, C], in batches of one size."""

    @jax.jit
    def look(params, batch):
        features = classifier.features(params, scale_image(batch))
        return classifier.logits(params, features).argmax(-1), features

    labels, features = [], []
    for start in range(0, len(images), BATCH):
        batch = images[start : start + BATCH]
        padded = np.concatenate([batch, np.repeat(batch[-1:], BATCH - len(batch), axis=0)])
        label, feature = jax.device_get(look(params, padded))
        labels.append(label[: len(batch)])
        features.append(feature[: len(batch)])
    return np.concatenate(labels), np.concatenate(features)


def halves(images: Images, n: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of two disjoint sets of n images each, with n / classes of every class: reference and control.

    Raises:
      ValueError: n not a multiple of the classes, or more than half of the images of some class.
    """
    most = min(int(np.sum(images.label == c)) for c in range(classes)) // 2 * classes
    if n % classes or not 0 < n <= most:
        raise ValueError(f"--samples {n}; allowed: multiples of {classes} up to {most}")
    rows = [np.flatnonzero(images.label == c)[: 2 * n // classes] for c in range(classes)]
    return np.concatenate([r[::2] for r in rows]), np.concatenate([r[1::2] for r in rows])


def judge_samples(judge: Judge, images: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """All measures of uint8 samples [n, H, W, C] that were asked to be `labels` [n], beside their controls."""
    n, classes = len(labels), judge.classifier.classes
    reference, control = halves(judge.test, n, classes)
    predicted, features = examine(judge.classifier, judge.params, images)
    real_predicted, real_features = examine(judge.classifier, judge.params, judge.test.image)
    features, real = (normalise_features(f, judge.scale) for f in (features, real_features))
    return {
        "samples": n,
        "agreement": agreement(predicted, labels)._asdict(),
        "agreement_per_class": [agreement(predicted[labels == c], labels[labels == c]).rate for c in range(classes)],
        "real_agreement": agreement(real_predicted, judge.test.label)._asdict(),
        "frechet": frechet_distance(features, real[reference]),
        "real_frechet": frechet_distance(real[control], real[reference]),
    }


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
    parser.add_argument("--samples", type=int, default=2000, help="in equal parts of every class (%(default)s)")
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
    config = read_run(options.workdir) if options.workdir else load_config(options.config or "fmnist_dit")
    settings = [(f"{k}.name", getattr(options, k)) for k in ("solver", "grid", "guide", "cache")]
    settings += [("steps", options.steps), ("scale", options.scale), ("model.dtype", options.dtype)]
    config = override(config, [(k, v) for k, v in settings if v is not None])
    if options.out and not options.out.absolute().parent.is_dir():
        raise ValueError(f"--out {options.out}: its folder does not exist")
    run = build_run(config)
    model, params, source = load_weights(config, run.model, options.workdir or options.weights)
    run = run._replace(model=model)
    judge = make_judge(options.data)
    if judge.classifier.input_shape != model.input_shape or judge.classifier.classes != model.classes:
        raise ValueError(
            f"{model.name} draws {model.input_shape} in {model.classes} classes; the judge knows "
            f"{judge.classifier.input_shape} in {judge.classifier.classes}"
        )
    halves(judge.test, options.samples, model.classes)  # refuses a number before hours of sampling
    labels = np.arange(options.samples, dtype=np.int32) % model.classes
    images, table, _ = draw(run, params, labels, options.seed, progress=sys.stderr.isatty())
    measures = judge_samples(judge, to_uint8(images), labels)
    print(format_report(measures, CLASS_NAMES[load_config(CLASSIFIER)["data"]["name"]]), flush=True)
    sampler = {k: config[k] for k in ("solver", "grid", "guide", "cache", "steps", "scale") if k in config}
    return {
        "model": model.name,
        "weights": source,
        "dtype": config["model"].get("dtype", "float32"),
        **sampler,
        "seed": options.seed,
        **measures,
        "cost": table,
        "provenance": provenance(),
    }


if __name__ == "__main__":
    main()
