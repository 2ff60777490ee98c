"""The judge of samples: a trained classifier, its feature space, and real images that are measured in the same way.

Distances and shares are taken between sets of equal size and equal classes: samples against a reference of real test
images, and other real test images against the same reference, which is what a perfect sampler would score (the
control). Features are standardised by those of 10,000 training images.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from difax.build import build_data, load_weights
from difax.checkpoints import embedded_weights
from difax.config import checkpoint_config, load_config
from difax.core.contracts import Classifier, Model, Params
from difax.core.files import place_of
from difax.registry import choose, is_outside, load_outside, make
from difax.study.metrics import (
    FEATURE_FIGURES,
    FeatureScale,
    agreement,
    feature_scale,
    frechet_distance,
    normalise_features,
)
from difax.training.data import Images, check_images
from difax.training.losses import scale_image

CLASSIFIER = "fmnist_cnn"
SCALE_IMAGES = 10_000
BATCH = 500
RESAMPLES = 200
FIGURES = ("agreement", *FEATURE_FIGURES)  # what a judge says of a set of images


class Judge(NamedTuple):
    """A trained classifier, the scale of its features, and the real test images with what it says of them."""

    classifier: Classifier
    params: Params
    scale: FeatureScale
    test: Images
    predicted: np.ndarray  # of the test images
    features: np.ndarray  # of the test images, standardised

    @property
    def width(self) -> int:
        """Features that are compared."""
        return self.features.shape[1]


def make_judge(which: str | None = None, data: Mapping[str, Any] | None = None) -> Judge:
    """A trained classifier, with the scale of its features measured on the first training images.

    Args:
      which: an embedded classifier, the folder of a run or the file of one that difax trained, or code outside
        (`module:factory`, `path/to/file.py:factory`) that is called with the training and the test images and returns
        a `Judge` (`judge_of`). None is the one that ships, for Fashion-MNIST.
      data: the section of the data set; None is Fashion-MNIST.

    Raises:
      FileNotFoundError: the data set's files are not there.
      ValueError: a judge that is not there, or that does not take the images.
    """
    which, section = which or CLASSIFIER, dict(data or {"name": "fashion_mnist"})
    train, test = (build_data({"data": section}, split) for split in ("train", "test"))
    if is_outside(which):
        made = load_outside("judge", which)(train, test)
        if not isinstance(made, Judge):
            raise ValueError(
                f"judge {which} made a {type(made).__name__}; allowed: a Judge (difax.study.judge.judge_of)"
            )
        return made
    embedded = which in embedded_weights()
    if not embedded and place_of(which) is None:
        choose("judge", which, [CLASSIFIER])
    config = load_config(CLASSIFIER) if embedded else checkpoint_config(which)
    classifier = make("model", config["model"])
    if not isinstance(classifier, Classifier):
        raise ValueError(f"judge {which} is {classifier.name}; allowed: a classifier, such as fmnist_cnn")
    check_images(train, classifier.input_shape, classifier.classes)
    _, params, _ = load_weights(config, classifier, None if embedded else which)
    return judge_of(classifier, params, train, test)


def suits(model: Model, data: Mapping[str, Any]) -> bool:
    """Whether the classifier that ships knows what a model draws: Fashion-MNIST, which a configuration without data
    may draw."""
    knows = make("model", load_config(CLASSIFIER)["model"])
    fits = (knows.input_shape, knows.classes) == (model.input_shape, model.classes)
    return fits and data.get("name", "fashion_mnist") == "fashion_mnist"


def shipped_features(model: Model) -> Callable[[jax.Array], jax.Array]:
    """samples [B, ...] in [-1, 1] -> features [B, F], by the classifier that ships; differentiable.

    Raises:
      ValueError: a model that draws what it does not know.
    """
    if not suits(model, {}):
        raise ValueError(
            f"{model.name} draws {' x '.join(map(str, model.input_shape))}, and quality is judged by {CLASSIFIER}; "
            "allowed: a model of Fashion-MNIST (28 x 28 x 1, 10 classes)"
        )
    config = load_config(CLASSIFIER)
    classifier = make("model", config["model"])
    _, params, _ = load_weights(config, classifier)
    return lambda images: classifier.features(params, images)


def judge_of(classifier: Classifier, params: Params, train: Images, test: Images) -> Judge:
    """A judge of a classifier and its data: features standardised by training images, test images to compare with."""
    scale = feature_scale(examine(classifier, params, train.image[:SCALE_IMAGES])[1])
    predicted, features = examine(classifier, params, test.image)
    return Judge(classifier, params, scale, test, predicted, normalise_features(features, scale))


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


def halves(images: Images, n: int, classes: int, labels: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Rows of two disjoint sets of n images each, with the classes of n samples: reference, control.

    Args:
      labels: [n], of the samples; None is 0, 1, 2, ... in turn.

    Raises:
      ValueError: more than half of the images of some class.
    """
    there = np.bincount(images.label, minlength=classes)[:classes]
    if labels is None:
        most = int(there.min()) // 2 * classes
        if not 0 < n <= most:
            raise ValueError(f"{n} samples; allowed: 1 to {most}, half of the real images")
        labels = np.arange(n) % classes
    counts = np.bincount(labels, minlength=classes)
    for c in np.flatnonzero(2 * counts > there):
        raise ValueError(
            f"{n} samples, {counts[c]} of them of label {c}; allowed: {there[c] // 2}, half of its real images"
        )
    rows = [np.flatnonzero(images.label == c)[: 2 * count] for c, count in enumerate(counts)]
    return np.concatenate([r[::2] for r in rows]), np.concatenate([r[1::2] for r in rows])


def judge_samples(judge: Judge, images: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """All measures of uint8 samples [n, H, W, C] that were asked to be `labels` [n], beside their controls."""
    n, classes = len(labels), judge.classifier.classes
    reference, control = halves(judge.test, n, classes)
    predicted, features = examine(judge.classifier, judge.params, images)
    features, real = normalise_features(features, judge.scale), judge.features
    return {
        "samples": n,
        "agreement": agreement(predicted, labels)._asdict(),
        "agreement_per_class": [agreement(predicted[labels == c], labels[labels == c]).rate for c in range(classes)],
        "real_agreement": agreement(judge.predicted, judge.test.label)._asdict(),
        "frechet": frechet_distance(features, real[reference]),
        "real_frechet": frechet_distance(real[control], real[reference]),
    }


def compared(judge: Judge, images: np.ndarray | None, labels: np.ndarray) -> dict[str, Any]:
    """Figures of a set of samples with their bootstrap intervals.

    Args:
      images: uint8 [n, H, W, C]; None is the control, as many real images of the same classes.
      labels: [n], that were asked for.

    Returns:
      {"agreement", "frechet", "kernel", "precision", "recall"}: [value, low, high] each; frechet is None for fewer than
      two samples per feature.
    """
    reference, control = halves(judge.test, len(labels), judge.classifier.classes, labels)
    if images is None:
        right, features = judge.predicted[control] == judge.test.label[control], judge.features[control]
    else:
        predicted, features = examine(judge.classifier, judge.params, images)
        right, features = predicted == labels, normalise_features(features, judge.scale)
    real = judge.features[reference]
    share = agreement(right, np.ones(len(right), bool))
    found: dict[str, Any] = {"agreement": [share.rate, share.low, share.high], "frechet": None}
    for name, figure in FEATURE_FIGURES.items():
        if name != "frechet" or len(features) >= 2 * judge.width:
            found[name] = list(figure.interval(features, real, RESAMPLES))
    return found
