"""The classifier that judges samples: its shapes, its loss against numpy, its training, and the weights that ship."""

import hashlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from difax.build import build_options, build_task, load_weights
from difax.checkpoints import ASSETS
from difax.config import load_config
from difax.models.cnn import cnn, unfold
from difax.registry import make
from difax.training.data import Images, fashion_mnist
from difax.training.losses import cross_entropy, scale_image
from difax.training.train import restore_ema, train

TINY = cnn(4, depth=1, features=16, size=8, channels=2, classes=3)
RNG = np.random.default_rng(0)
BATCH = {
    "image": RNG.integers(0, 256, (6, 8, 8, 2), dtype=np.uint8),
    "label": RNG.integers(0, 3, 6, dtype=np.int32),
}


@pytest.fixture(scope="module")
def params():
    return jax.jit(TINY.init)(jax.random.key(0))


@pytest.mark.parametrize("kernel,stride,size", [(3, 1, 8), (4, 2, 8), (4, 2, 7)])
def test_a_product_over_unfolded_patches_is_a_convolution(kernel, stride, size):
    x = RNG.normal(size=(2, size, size, 3)).astype(np.float32)
    w = RNG.normal(size=(kernel, kernel, 3, 5)).astype(np.float32)
    before = (kernel - stride) // 2
    padding = [(before, kernel - stride - before)] * 2
    expected = jax.lax.conv_general_dilated(
        x, w, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"), precision="highest"
    )
    found = jnp.matmul(unfold(jnp.asarray(x), kernel, stride), w.reshape(-1, 5), precision="highest")
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_features_and_logits_are_float32_of_the_promised_shape(params, dtype):
    model = cnn(4, depth=1, features=16, size=8, channels=2, classes=3, dtype=dtype)
    features = jax.jit(model.features)(params, scale_image(jnp.asarray(BATCH["image"])))
    logits = jax.jit(model.logits)(params, features)
    assert (features.shape, logits.shape) == ((6, model.width), (6, model.classes))
    assert features.dtype == logits.dtype == jnp.float32
    assert np.all(np.isfinite(features)) and np.all(np.isfinite(logits))
    assert len(np.unique(np.asarray(features), axis=0)) == 6


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_is_the_formula(params, smoothing):
    value, metrics = jax.jit(cross_entropy(TINY, label_smoothing=smoothing))(params, BATCH, jax.random.key(0))
    x = BATCH["image"].astype(np.float32) / 127.5 - 1
    logits = np.asarray(jax.jit(lambda p, x: TINY.logits(p, TINY.features(p, x)))(params, x), np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    q = (1 - smoothing) * np.eye(3)[BATCH["label"]] + smoothing / 3
    np.testing.assert_allclose(value, -(q * log_p).sum(-1).mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["accuracy"], np.mean(logits.argmax(-1) == BATCH["label"]))


def _seen(**augmentation):
    """The images that a classifier is shown under augmentation, as bytes."""
    seen = []

    def features(_, images):
        seen.append(np.asarray(jnp.round((images + 1) * 127.5)).astype(np.uint8))
        return jnp.zeros((len(images), TINY.width))

    spy = TINY._replace(features=features, logits=lambda params, f: jnp.zeros((len(f), 3)))
    cross_entropy(spy, **augmentation)({}, BATCH, jax.random.key(1))
    return seen[0]


def test_images_are_left_alone_unless_asked():
    np.testing.assert_array_equal(_seen(), BATCH["image"])


def test_flip_mirrors_left_and_right():
    np.testing.assert_array_equal(_seen(flip=1.0), BATCH["image"][:, :, ::-1])
    some = [np.array_equal(a, b) for a, b in zip(_seen(flip=0.5), BATCH["image"], strict=True)]
    assert 0 < sum(some) < len(some)


def test_shift_moves_by_whole_pixels_and_fills_with_black():
    moves = set()
    for moved, image in zip(_seen(shift=2), BATCH["image"], strict=True):
        padded = np.pad(image, ((2, 2), (2, 2), (0, 0)))
        found = [(i, j) for i in range(5) for j in range(5) if np.array_equal(padded[i : i + 8, j : j + 8], moved)]
        assert len(found) == 1
        moves |= set(found)
    assert len(moves) > 2


LOSSES_REFUSED = {
    "label_smoothing=1.0": {"label_smoothing": 1.0},
    "flip=1.5": {"flip": 1.5},
    "shift=8; allowed: 0 ... 7": {"shift": 8},
}


@pytest.mark.parametrize("message", LOSSES_REFUSED)
def test_cross_entropy_refuses(message):
    with pytest.raises(ValueError, match=message):
        cross_entropy(TINY, **LOSSES_REFUSED[message])


MODELS_REFUSED = {"size=30": {"size": 30}, "depth=0": {"depth": 0}, "dtype=float16": {"dtype": "float16"}}


@pytest.mark.parametrize("message", MODELS_REFUSED)
def test_cnn_refuses(message):
    with pytest.raises(ValueError, match=message):
        cnn(**MODELS_REFUSED[message])


@pytest.mark.slow
def test_the_training_command_learns(tmp_path):
    config = load_config("fmnist_cnn")
    config["model"] = {"name": "cnn", "width": 4, "depth": 1, "features": 16, "size": 8, "classes": 2}
    config["train"] |= {"steps": 30, "batch": 16, "warmup": 5, "decay": 5, "ema": 0.9, "log_every": 10}
    label = np.arange(64, dtype=np.int32) % 2
    image = np.zeros((64, 8, 8, 1), np.uint8)
    image[label == 1, :4] = 200  # one class is bright above
    task = build_task(config)
    train(task, Images(image, label), build_options(config), tmp_path / "run", config, progress=False)
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert rows[-1]["accuracy"] == 1.0
    step, averages = restore_ema(tmp_path / "run", task.init)
    model = make("model", config["model"])
    logits = model.logits(averages, model.features(averages, scale_image(jnp.asarray(image))))
    assert step == 30 and np.array_equal(logits.argmax(-1), label)


def _shipped():
    config = load_config("fmnist_cnn")
    model = make("model", config["model"])
    return model, load_weights(config, model)[1]


def test_the_shipped_weights_are_those_of_their_record():
    path = ASSETS / "fmnist_cnn.safetensors"
    record = json.loads(path.with_suffix(".json").read_text())
    assert hashlib.sha256(path.read_bytes()).hexdigest() == record["sha256"]
    assert path.stat().st_size < 2 * 2**20
    assert load_config("fmnist_cnn")["model"] == record["config"]["model"]
    _, params = _shipped()
    assert sum(a.size for a in jax.tree.leaves(params)) == record["parameters"]


def test_the_shipped_classifier_is_as_right_as_recorded():
    try:
        test = fashion_mnist("test")
    except FileNotFoundError as error:
        pytest.skip(f"needs the test images: {error}")
    record = json.loads((ASSETS / "fmnist_cnn.json").read_text())
    model, params = _shipped()
    look = jax.jit(lambda x: model.logits(params, model.features(params, scale_image(x))))
    image, label = test.image[:2000], test.label[:2000]
    predicted = np.concatenate([look(image[i : i + 500]).argmax(-1) for i in range(0, 2000, 500)])
    accuracy = np.mean(predicted == label)
    # the first 2,000 of 10,000, a draw without replacement: within 3 standard deviations of the whole
    p = record["test_accuracy"]
    assert p >= 0.91
    assert abs(accuracy - p) < 3 * np.sqrt(p * (1 - p) / 2000 * (1 - 2000 / 10000))
