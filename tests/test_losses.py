"""Training losses against numpy, on a network of four numbers whose output is known in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from difax.core import process as P
from difax.core.contracts import Classifier, Model
from difax.training import losses as L
from tests.oracles import losses as oracle

CLASSES, B = 4, 32
PARAMS = {"x": 0.6, "time": 0.1, "label": 0.05, "variance": 0.9}


def outputs(params, x, time, label, xp):
    """What the toy network returns: a main part and variance channels in [-1, 1]."""
    time, label = (a.reshape(-1, 1, 1, 1) for a in (time, label))
    main = params["x"] * x + params["time"] * xp.sin(time / 7) + params["label"] * label
    return main, xp.sin(params["variance"] * x + 0.3 * time)


def toy(learn_sigma: bool) -> Model:
    def embed(params, x, time, label):
        return outputs(params, x, time, label * 1.0, jnp), ()

    return Model(
        name="toy",
        init=lambda key: PARAMS,
        embed=embed,
        stages=(),
        head=lambda params, tokens, _: jnp.concatenate(tokens, -1) if learn_sigma else tokens[0],
        null=lambda label: jnp.full_like(label, CLASSES),
        input_shape=(2, 2, 3),
        learn_sigma=learn_sigma,
        classes=CLASSES,
    )


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, size=(B, 2, 2, 3), dtype=np.uint8)
    image[:, 0, 0, 0], image[:, 0, 0, 1] = 0, 255  # the open bins
    return {"image": image, "label": rng.integers(0, CLASSES, size=B, dtype=np.int32)}


def draws(key, steps: int, times: str | None, rate: float, batch) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The random numbers that a loss draws from its key: times (or steps), noise, labels after dropout."""
    time_key, noise_key, drop_key = jax.random.split(key, 3)
    if times is None:
        t = np.asarray(jax.random.randint(time_key, (B,), 0, steps))
    elif times == "uniform":
        t = np.asarray(jax.random.uniform(time_key, (B,)), np.float64)
    else:
        t = 1 / (1 + np.exp(-np.asarray(jax.random.normal(time_key, (B,)), np.float64)))
    eps = np.asarray(jax.random.normal(noise_key, batch["image"].shape), np.float64)
    dropped = np.asarray(jax.random.bernoulli(drop_key, rate, (B,)))
    return t, eps, np.where(dropped, CLASSES, batch["label"])


def test_images_are_scaled_to_plus_minus_one():
    got = L.scale_image(jnp.asarray([0, 255, 51], jnp.uint8))
    np.testing.assert_allclose(got, [-1.0, 1.0, -0.6], rtol=1e-6)


@pytest.mark.parametrize("times", ["uniform", "logit_normal"])
@pytest.mark.parametrize(
    ("process", "sign", "shift"), [(P.flow(), 1, 1.0), (P.flow(shift=3.0), 1, 3.0), (P.sit(), -1, 1.0)]
)
def test_flow_loss(process, sign, shift, times, batch):
    key = jax.random.key(3)
    t, eps, label = draws(key, 0, times, 0.5, batch)
    t = (shift * t / (1 + (shift - 1) * t)).reshape(-1, 1, 1, 1)
    x0 = batch["image"] / 127.5 - 1
    told = 1000 * t if sign == 1 else 1 - t
    output, _ = outputs(PARAMS, (1 - t) * x0 + t * eps, told.ravel(), label, np)
    want = ((output - sign * (eps - x0)) ** 2).mean()
    got, metrics = L.flow_loss(toy(False), process, times=times, label_dropout=0.5)(PARAMS, batch, key)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    assert metrics["mse"] == got


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_ddpm_mean_squared_error(prediction, batch):
    process, key = P.vp_linear(), jax.random.key(1)
    k, eps, label = draws(key, 1000, None, 0.5, batch)
    abar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[k].reshape(-1, 1, 1, 1)
    x0, a, s = batch["image"] / 127.5 - 1, np.sqrt(abar), np.sqrt(1 - abar)
    wanted = {"eps": eps, "x0": x0, "v": a * eps - s * x0}[prediction]
    output, _ = outputs(PARAMS, a * x0 + s * eps, k.astype(float), label, np)
    loss = L.ddpm_loss(toy(False), process, prediction, label_dropout=0.5)
    got, metrics = loss(PARAMS, batch, key)
    np.testing.assert_allclose(got, ((output - wanted) ** 2).mean(), rtol=1e-5)
    assert metrics == {"mse": got}


@pytest.mark.parametrize("seed", [0, 1])
def test_variational_bound(seed, batch):
    """Six steps, so that the decoder's likelihood at k = 0 and the second step's stand-in variance are in it."""
    process, key = P.vp_linear(0.1, 0.5, 6), jax.random.key(seed)
    betas = np.linspace(0.1, 0.5, 6)
    k, eps, label = draws(key, 6, None, 0.0, batch)
    assert set(k) == set(range(6))
    abar = np.cumprod(1 - betas)[k].reshape(-1, 1, 1, 1)
    x = np.sqrt(abar) * (batch["image"] / 127.5 - 1) + np.sqrt(1 - abar) * eps
    main, variance = outputs(PARAMS, x, k.astype(float), label, np)
    bits = oracle.variational_bound(batch["image"].astype(float), x, main, variance, k, betas).mean()
    mse = ((main - eps) ** 2).mean()
    got, metrics = L.ddpm_loss(toy(True), process, label_dropout=0.0)(PARAMS, batch, key)
    np.testing.assert_allclose(metrics["mse"], mse, rtol=1e-5)
    np.testing.assert_allclose(metrics["vlb"], bits, rtol=1e-4)
    np.testing.assert_allclose(got, mse + bits * 6 / 1000, rtol=1e-5)


@pytest.mark.parametrize("skip", [1, 3, 6])
def test_loss_of_skipped_steps(skip, batch):
    """Where a DDIM step over several steps lands with what is predicted, against where it lands with what is true."""
    process, key = P.vp_linear(0.1, 0.5, 6), jax.random.key(0)
    alpha = np.sqrt(np.append(1.0, np.cumprod(1 - np.linspace(0.1, 0.5, 6))))  # of clean data and the six steps
    k, eps, label = draws(key, 6, None, 0.0, batch)
    (a, s), (end_a, end_s) = (
        (alpha[j][:, None, None, None], np.sqrt(1 - alpha[j] ** 2)[:, None, None, None])
        for j in (k + 1, np.maximum(k + 1 - skip, 0))
    )
    x0 = batch["image"] / 127.5 - 1
    x = a * x0 + s * eps
    main, _ = outputs(PARAMS, x, k.astype(float), label, np)
    landed = end_a * (x - s * main) / a + end_s * main
    jump = ((landed - end_a * x0 - end_s * eps) ** 2).mean()
    got, metrics = L.ddpm_loss(toy(False), process, label_dropout=0.0, skip_weight=0.3, skip=skip)(PARAMS, batch, key)
    np.testing.assert_allclose(metrics["skip"], jump, rtol=1e-4)
    np.testing.assert_allclose(got, 0.7 * ((main - eps) ** 2).mean() + 0.3 * jump, rtol=1e-4)
    both, _ = L.ddpm_loss(toy(True), process, label_dropout=0.0, skip_weight=0.3, skip=skip)(PARAMS, batch, key)
    plain, parts = L.ddpm_loss(toy(True), process, label_dropout=0.0)(PARAMS, batch, key)
    np.testing.assert_allclose(both - got, plain - parts["mse"], rtol=1e-4)


def test_bound_is_zero_for_the_true_posterior():
    """A network that knows eps and asks for the posterior's own variance (v = -1) pays nothing but the decoder."""
    tables = {name: jnp.asarray(table[500]) for name, table in L._posterior_tables(P.vp_linear()).items()}
    x0, x = jnp.linspace(-1, 1, 9), jnp.linspace(2, -1, 9)
    bits = L._vlb(x0, x, x0, -jnp.ones(9), jnp.full(9, 500), tables)
    np.testing.assert_allclose(bits, np.zeros(9), atol=1e-7)
    assert np.all(L._vlb(x0, x, x0 + 0.5, -jnp.ones(9), jnp.full(9, 500), tables) > 1e-5)
    assert np.all(L._vlb(x0, x, x0, jnp.zeros(9), jnp.full(9, 500), tables) > 0)


@pytest.mark.parametrize("std", [0.003, 0.05, 0.4])
def test_decoder_likelihood_on_every_grey_level(std):
    image = np.arange(256)
    for mean in (-1.1, -0.2, 0.0, 0.7):
        got = L._discretised_log_likelihood(
            jnp.asarray(image / 127.5 - 1, jnp.float32), jnp.full(256, mean), jnp.full(256, np.log(std))
        )
        np.testing.assert_allclose(-got, oracle.decoder_nll(image, mean, std), rtol=2e-3, atol=1e-4)
        assert np.all(np.isfinite(jax.grad(lambda m: L._discretised_log_likelihood(0.5, m, -9.0).sum())(mean)))


def test_bound_trains_the_variance_alone(batch):
    process, key = P.vp_linear(0.1, 0.5, 6), jax.random.key(0)
    loss = L.ddpm_loss(toy(True), process)
    params = jax.tree.map(jnp.float32, PARAMS)
    slope = {name: jax.grad(lambda p, n=name: loss(p, batch, key)[1][n])(params) for name in ("mse", "vlb")}
    for name in ("x", "time", "label"):
        assert slope["vlb"][name] == 0 and slope["mse"][name] != 0
    assert slope["vlb"]["variance"] != 0 and slope["mse"]["variance"] == 0


@pytest.mark.parametrize("kind", ["flow", "ddpm"])
@pytest.mark.parametrize("rate", [0.0, 0.1, 1.0])
def test_labels_are_dropped_at_their_rate(kind, rate):
    """A network that predicts x0 = 1 for the null label and 0 otherwise, on black images (x0 = -1)."""
    n = 20_000
    model = toy(False)._replace(
        embed=lambda params, x, time, label: (0 * x + (label == CLASSES)[:, None, None, None], ()),
        head=lambda params, tokens, _: tokens,
    )
    process = P.flow() if kind == "flow" else P.vp_linear()
    loss = L.LOSSES[kind](model, process, "x0", label_dropout=rate)
    batch = {"image": np.zeros((n, 1, 1, 1), np.uint8), "label": np.zeros(n, np.int32)}
    mse = loss({}, batch, jax.random.key(0))[0]
    dropped = (mse - 1) / 3  # (1 + 1)^2 with the label dropped, (0 + 1)^2 with it
    assert abs(dropped - rate) <= 5 * np.sqrt(rate * (1 - rate) / n) + 1e-6


# ---------------------------------------------------------------- classifier

CLASSIFIER = Classifier(
    name="toy",
    init=lambda key: {},
    features=lambda params, image: image.reshape(len(image), -1),
    logits=lambda params, features: features,
    input_shape=(2, 3, 1),
    width=6,
    classes=6,
)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy(smoothing):
    rng = np.random.default_rng(0)
    batch = {"image": rng.integers(0, 256, (8, 2, 3, 1), np.uint8), "label": np.arange(8, dtype=np.int32) % 6}
    got, metrics = L.cross_entropy(CLASSIFIER, label_smoothing=smoothing)({}, batch, jax.random.key(0))
    logits = batch["image"].reshape(8, 6) / 127.5 - 1
    np.testing.assert_allclose(got, oracle.cross_entropy(logits, batch["label"], smoothing), rtol=1e-5)
    np.testing.assert_allclose(metrics["accuracy"], (logits.argmax(1) == batch["label"]).mean(), rtol=1e-6)


def test_augmentation_mirrors_and_moves():
    image = np.zeros((400, 5, 5, 1), np.uint8)
    image[:, 2, 3] = 255  # one white pixel right of the centre
    moved = np.asarray(L._augment(jnp.asarray(image), jax.random.key(0), 0.5, 1))
    assert moved.shape == image.shape and np.all(moved.sum((1, 2, 3)) == 255)
    _, row, column, _ = np.nonzero(moved)
    assert set(row) == {1, 2, 3} and set(column) == {0, 1, 2, 3, 4}
    mirrored = np.asarray(L._augment(jnp.asarray(image), jax.random.key(1), 0.5, 0))[:, 2, 1, 0] == 255
    assert 0.375 < mirrored.mean() < 0.625  # five standard errors
    np.testing.assert_array_equal(L._augment(jnp.asarray(image), jax.random.key(0), 0.0, 0), image)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: L.flow_loss(toy(False), P.flow(), times="cosine"), "times='cosine'; allowed: uniform, logit_normal"),
        (lambda: L.flow_loss(toy(True), P.flow()), "learn_sigma=True; allowed: False"),
        (lambda: L.flow_loss(toy(False), P.flow(), label_dropout=1.5), r"label_dropout=1.5; allowed: 0 \.\.\. 1"),
        (lambda: L.ddpm_loss(toy(False), P.flow()), "discrete steps; flow is continuous"),
        (lambda: L.ddpm_loss(toy(True), P.vp_linear(steps=1)), "steps=1; allowed: 2 or more"),
        (lambda: L.ddpm_loss(toy(False), P.vp_linear(), label_dropout=-0.1), "label_dropout=-0.1"),
        (lambda: L.ddpm_loss(toy(False), P.vp_linear(), skip_weight=1.5), r"skip_weight=1.5; allowed: 0 \.\.\. 1"),
        (lambda: L.ddpm_loss(toy(False), P.vp_linear(), skip_weight=0.5, skip=0), r"skip=0; allowed: 1 \.\.\. 1000"),
        (lambda: L.cross_entropy(CLASSIFIER, label_smoothing=1.0), "label_smoothing=1.0"),
        (lambda: L.cross_entropy(CLASSIFIER, flip=2.0), "flip=2.0"),
        (lambda: L.cross_entropy(CLASSIFIER, shift=2), r"shift=2; allowed: 0 \.\.\. 1"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()
