"""Metrics against scipy, closed forms and their own properties."""

import json
from pathlib import Path

import numpy as np
import pytest

from difax.study.judge import halves
from difax.study.metrics import (
    FEATURE_FIGURES,
    MS_SSIM_WEIGHTS,
    agreement,
    bootstrap,
    feature_scale,
    framewise,
    frechet_distance,
    kernel_distance,
    ms_ssim,
    normalise_features,
    precision_recall,
    psnr,
    relative_error,
    ssim,
)
from difax.training.data import Images
from tests.golden.make_scikit_image import SHAPES, pair

RNG = np.random.default_rng(0)
N, F = 400, 12
MIX = RNG.normal(size=(F, F))
A = RNG.normal(size=(N, F)) @ MIX + RNG.normal(size=F)
B = RNG.normal(size=(N + 100, F)) @ RNG.normal(size=(F, F))
ROTATION = np.linalg.qr(RNG.normal(size=(F, F)))[0]


def test_frechet_distance_is_the_formula_with_scipys_matrix_root():
    linalg = pytest.importorskip("scipy.linalg", reason="the oracle's matrix square root is scipy's")
    c_a, c_b = np.cov(A.T), np.cov(B.T)
    root = linalg.sqrtm(c_a @ c_b)
    expected = np.sum((A.mean(0) - B.mean(0)) ** 2) + np.trace(c_a + c_b - 2 * root.real)
    np.testing.assert_allclose(frechet_distance(A, B), expected, rtol=1e-10)


def test_frechet_distance_of_diagonal_gaussians_is_the_closed_form():
    # whitened, so that the sample moments are exactly mean 0 and covariance diag(s^2)
    white = B - B.mean(0)
    white = white @ np.linalg.inv(np.linalg.cholesky(np.cov(white.T))).T
    s, t, mean = np.linspace(0.5, 3, F), np.linspace(2, 1, F), np.linspace(-1, 1, F)
    expected = np.sum(mean**2) + np.sum((s - t) ** 2)
    np.testing.assert_allclose(frechet_distance(white * s, white * t + mean), expected, rtol=1e-10)


PROPERTIES = {
    "a set is at distance 0 from itself": (frechet_distance(A, A), 0.0),
    "order of the images does not matter": (frechet_distance(A, A[::-1]), 0.0),
    "symmetric": (frechet_distance(A, B), frechet_distance(B, A)),
    "a shift adds its squared length": (
        frechet_distance(A, A + np.linspace(0, 1, F)),
        np.sum(np.linspace(0, 1, F) ** 2),
    ),
    "scaling one set by k costs (k - 1)^2 of its variance": (
        frechet_distance(A - A.mean(0), 3 * (A - A.mean(0))),
        4 * np.trace(np.cov(A.T)),
    ),
    "quadratic in the unit": (frechet_distance(5 * A, 5 * B), 25 * frechet_distance(A, B)),
    "blind to rotations": (frechet_distance(A @ ROTATION, B @ ROTATION), frechet_distance(A, B)),
    "one feature": (frechet_distance(A[:, :1], A[:, :1] + 2), 4.0),
    "a feature that never varies": (frechet_distance(A * [0, *[1] * (F - 1)], A * [0, *[1] * (F - 1)]), 0.0),
}


@pytest.mark.parametrize("name", PROPERTIES)
def test_frechet_distance(name):
    value, expected = PROPERTIES[name]
    np.testing.assert_allclose(value, expected, rtol=1e-9, atol=1e-7)


REFUSED = {
    "too few": (A[: 2 * F - 1], B, "set a has 23 rows of 12 features; allowed: 24 or more"),
    "too few in b": (A, B[:3], "set b has 3 rows"),
    "other features": (A, B[:, 1:], "equal F"),
    "one dimension": (A[:, 0], B[:, 0], "allowed: \\[N, F\\]"),
    "not finite": (A, np.where(B > 2, np.nan, B), "set b has features that are not finite"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_frechet_distance_refuses(name):
    a, b, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        frechet_distance(a, b)


def test_normalised_features_have_mean_0_and_std_1_and_make_the_distance_blind_to_units():
    unit = np.geomspace(1e-3, 1e3, F)
    normal = normalise_features(A, feature_scale(A))
    np.testing.assert_allclose(normal.mean(0), 0, atol=1e-12)
    np.testing.assert_allclose(normal.std(0), 1, rtol=1e-12)
    ours = frechet_distance(normal, normalise_features(B, feature_scale(A)))
    scale = feature_scale(A * unit)
    other = frechet_distance(normalise_features(A * unit, scale), normalise_features(B * unit, scale))
    np.testing.assert_allclose(ours, other, rtol=1e-8)


def test_a_feature_that_hardly_ever_fires_is_left_out():
    """One sample on which it fires would otherwise outweigh everything else."""
    real = np.abs(A).copy()
    real[:, 0] = 0.0
    real[0, 0] = 1e-3
    scale = feature_scale(real)
    assert not scale.keep[0] and scale.keep[1:].all()
    odd = real.copy()
    odd[1, 0] = 1.0
    assert frechet_distance(normalise_features(odd, scale), normalise_features(real, scale)) == pytest.approx(
        0, abs=1e-9
    )
    with pytest.raises(ValueError, match="none of 2 features"):
        feature_scale(np.zeros((9, 2)))


# Wilson's interval, from the formula evaluated with 50 digits
INTERVALS = {
    (0, 10): (0.0, 0.0, 0.27753279986288926),
    (5, 10): (0.5, 0.23659309051256397, 0.7634069094874361),
    (1700, 2000): (0.85, 0.8336805918528312, 0.8649774750502918),
    (10, 10): (1.0, 0.7224672001371107, 1.0),
}


@pytest.mark.parametrize("right,n", INTERVALS)
def test_agreement_is_the_share_with_wilsons_interval(right, n):
    requested = np.arange(n) % 10
    predicted = np.where(np.arange(n) < right, requested, requested + 1)
    found = agreement(predicted, requested)
    np.testing.assert_allclose(found[:3], INTERVALS[right, n], atol=1e-12)
    assert found.n == n


def test_the_interval_holds_the_truth_19_times_in_20():
    p, n = 0.9, 500
    hits = 0
    for _ in range(2000):
        found = agreement(RNG.random(n) < p, np.ones(n, bool))
        hits += found.low <= p <= found.high
    assert 0.93 < hits / 2000 < 0.97


@pytest.mark.parametrize("predicted,requested", [([], []), ([1, 2], [1]), ([[1]], [[1]])])
def test_agreement_refuses(predicted, requested):
    with pytest.raises(ValueError, match="agreement"):
        agreement(np.array(predicted), np.array(requested))


def test_ssim_by_plain_windows():
    """Against the definition, window by window, on images that fit three windows."""
    rng = np.random.default_rng(0)
    a = rng.uniform(-1, 1, (2, 14, 13, 1))
    b = 0.7 * a + 0.3 * rng.uniform(-1, 1, a.shape)
    offsets = np.arange(-5, 6)
    window = np.exp(-(offsets**2) / (2 * 1.5**2))
    window = np.outer(window, window) / window.sum() ** 2
    want = []
    for x, y in zip(a[..., 0], b[..., 0], strict=True):
        each = []
        for i in range(5, 9):
            for j in range(5, 8):
                p, q = (z[i - 5 : i + 6, j - 5 : j + 6] for z in (x, y))
                m, n = (window * p).sum(), (window * q).sum()
                v, w = (window * p * p).sum() - m * m, (window * q * q).sum() - n * n
                c = (window * p * q).sum() - m * n
                s, t = 0.02**2, 0.06**2
                each.append((2 * m * n + s) * (2 * c + t) / ((m * m + n * n + s) * (v + w + t)))
        want.append(np.mean(each))
    np.testing.assert_allclose(ssim(a, b), want, rtol=1e-10)
    np.testing.assert_allclose(ssim(a, a), 1.0)
    with pytest.raises(ValueError, match="ssim"):
        ssim(a, b[:1])


def test_psnr():
    image = RNG.uniform(-1, 1, (4, 8, 8, 1))
    assert psnr(image, image) == np.inf
    # an error of 0.2 of a range of 2: 20 log10(10)
    np.testing.assert_allclose(psnr(image, image + 0.2), 20.0)
    np.testing.assert_allclose(psnr(image, image + 0.2, peak=1.0), 20 * np.log10(5))
    with pytest.raises(ValueError, match="equal shapes"):
        psnr(image, image[:1])


GOLDEN = json.loads((Path(__file__).parent / "golden" / "scikit_image.json").read_text())["rows"]


@pytest.mark.parametrize("index", range(len(SHAPES)))
def test_psnr_and_ssim_are_those_of_scikit_image(index):
    a, b = pair(index)
    np.testing.assert_allclose(psnr(a, b), GOLDEN[index]["psnr"], rtol=1e-10)
    np.testing.assert_allclose(ssim(a[None], b[None])[0], GOLDEN[index]["ssim"], rtol=1e-10)


def test_ms_ssim_by_its_parts():
    """Two scales: mean(cs)^w0 mean(l cs)^w1, the second by `ssim` itself on images averaged two by two."""
    a, b = pair(0)
    half = [x.reshape(14, 2, 14, 2, 1).mean((1, 3)) for x in (a, b)]
    flat = [x[None] for x in (a, b)]
    offsets = np.arange(-5, 6)
    window = np.exp(-(offsets**2) / (2 * 1.5**2))
    window = np.outer(window, window) / window.sum() ** 2
    cs = []
    for i in range(5, 23):
        for j in range(5, 23):
            p, q = (z[i - 5 : i + 6, j - 5 : j + 6, 0] for z in (a, b))
            m, n = (window * p).sum(), (window * q).sum()
            v, w = (window * p * p).sum() - m * m, (window * q * q).sum() - n * n
            cs.append((2 * ((window * p * q).sum() - m * n) + 0.06**2) / (v + w + 0.06**2))
    w0, w1 = np.asarray(MS_SSIM_WEIGHTS[:2]) / sum(MS_SSIM_WEIGHTS[:2])
    want = np.mean(cs) ** w0 * ssim(half[0][None], half[1][None])[0] ** w1
    np.testing.assert_allclose(ms_ssim(*flat), want, rtol=1e-9)
    np.testing.assert_allclose(ms_ssim(flat[0], flat[0]), 1.0)
    np.testing.assert_allclose(ms_ssim(*flat, scales=1), ssim(*flat))
    with pytest.raises(ValueError, match="allowed: 1 to 2"):
        ms_ssim(*flat, scales=3)


def test_relative_error():
    a, b = RNG.normal(size=(2, 3, 4, 4, 1))
    for order in (1, 2):
        want = [
            (np.abs(x - y) ** order).sum() ** (1 / order) / (np.abs(y) ** order).sum() ** (1 / order)
            for x, y in zip(a, b, strict=True)
        ]
        np.testing.assert_allclose(relative_error(a, b, order), want)
    with pytest.raises(ValueError, match="allowed: 1, 2"):
        relative_error(a, b, 3)


def test_a_measure_of_videos_is_the_mean_over_their_frames():
    a, b = RNG.normal(size=(2, 3, 4, 6, 6, 2))
    of = framewise(lambda x, y: np.abs(x - y).max((1, 2, 3)))
    want = [np.mean([np.abs(x - y).max() for x, y in zip(*pair, strict=True)]) for pair in zip(a, b, strict=True)]
    np.testing.assert_allclose(of(a, b), want)
    np.testing.assert_allclose(of(a[:, 0], b[:, 0]), np.abs(a[:, 0] - b[:, 0]).max((1, 2, 3)))


def test_the_error_of_images_that_are_zero():
    zero, one = np.zeros((2, 4, 4, 1)), np.stack([np.zeros((4, 4, 1)), np.ones((4, 4, 1))])
    np.testing.assert_array_equal(relative_error(one, zero, 2), [0.0, np.inf])


def test_kernel_distance_is_the_sum_over_pairs():
    a, b = A[:7], B[:9]
    k = lambda x, y: (x @ y / F + 1) ** 3  # noqa: E731
    within = lambda x: np.mean([k(x[i], x[j]) for i in range(len(x)) for j in range(len(x)) if i != j])  # noqa: E731
    want = within(a) + within(b) - 2 * np.mean([k(x, y) for x in a for y in b])
    np.testing.assert_allclose(kernel_distance(a, b), want, rtol=1e-10)


def test_kernel_distance_has_no_bias():
    """Over sets of one distribution its mean is 0 within three of its standard errors, and as often below as above."""
    rng = np.random.default_rng(1)
    found = [kernel_distance(*rng.normal(size=(2, 20, 4))) for _ in range(400)]
    assert abs(np.mean(found)) < 3 * np.std(found) / 20
    assert 0.3 < np.mean(np.asarray(found) < 0) < 0.8


def test_precision_recall_by_plain_loops():
    rng = np.random.default_rng(2)
    real, samples = rng.normal(size=(30, 2)), 0.5 * rng.normal(size=(30, 2)) + 0.3

    def covered(points, by):
        radius = [sorted(np.linalg.norm(c - d) for d in by)[3] for c in by]
        return np.mean([any(np.linalg.norm(p - c) <= r for c, r in zip(by, radius, strict=True)) for p in points])

    found = precision_recall(samples, real)
    np.testing.assert_allclose(found, (covered(samples, real), covered(real, samples)))
    assert found.precision > found.recall  # narrower than the real ones: all among them, not all of them covered
    assert precision_recall(real + 100, real) == (0, 0) and precision_recall(real, real) == (1, 1)
    with pytest.raises(ValueError, match="3 rows; allowed: 4 or more"):
        precision_recall(real[:3], real)


def test_bootstrap_interval_of_a_mean_is_the_normal_one_and_holds_the_truth():
    rng = np.random.default_rng(3)
    values = rng.normal(2.0, 1.0, 400)
    found = bootstrap(values)
    np.testing.assert_allclose(found.value, values.mean())
    half = 1.96 * values.std() / 20
    np.testing.assert_allclose([found.value - found.low, found.high - found.value], half, rtol=0.1)
    hits = [f.low <= 0 <= f.high for f in (bootstrap(rng.normal(size=60), resamples=200) for _ in range(200))]
    assert 0.88 <= np.mean(hits) <= 0.99
    assert bootstrap(values) == found  # the same draws each time
    assert bootstrap(np.array([np.inf, 1.0])).value == np.inf


def test_the_interval_of_a_share_is_one_of_shares():
    """A centred interval may reach over 1."""
    few = A[: N // 4]
    loose = bootstrap(few, lambda rows: precision_recall(rows, B[:N]).precision, 100)
    found = FEATURE_FIGURES["precision"].interval(few, B[:N], 100)
    assert found.value == loose.value and found.low == max(loose.low, 0.0) and found.high == min(loose.high, 1.0)
    share = np.asarray([0.0] + [1.0] * 19)
    assert bootstrap(share).high > 1.0 == bootstrap(share, bounds=(0.0, 1.0)).high


def test_bootstrap_of_a_distance_lies_around_it():
    """Rows that repeat make a Frechet distance larger; the interval is moved back to the figure itself."""
    found = bootstrap(A, lambda rows: frechet_distance(rows, B[:N]), resamples=50)
    assert found.low < found.value < found.high


@pytest.mark.parametrize("shape", [(4, 2), (23, 2), (60, 5)])
def test_draws_that_share_their_work_are_those_of_the_definition(shape, monkeypatch):
    """Estimate and interval of every figure, draw by draw, and where the kept neighbours do not suffice."""
    rng = np.random.default_rng(7)
    samples, real = rng.normal(size=shape), 1.3 * rng.normal(size=(shape[0] + 3, shape[1])) + 0.2
    figures = {name: figure for name, figure in FEATURE_FIGURES.items() if figure.each is not None}
    assert set(figures) == {"kernel", "precision", "recall"}
    for near in (40, 2):
        monkeypatch.setattr("difax.study.metrics.NEAR", near)
        for figure in figures.values():
            whole = bootstrap(samples, lambda rows, of=figure.of: of(rows, real), 50, figure.bounds)
            np.testing.assert_allclose(figure.interval(samples, real, 50), whole, rtol=1e-12, atol=1e-13)


LABELLED = Images(np.zeros((70, 2, 2, 1), np.uint8), RNG.permutation(np.repeat(np.arange(10, dtype=np.int32), 7)))


@pytest.mark.parametrize("n", [1, 10, 14, 30])
def test_reference_and_control_are_disjoint_and_have_the_classes_of_the_samples(n):
    reference, control = halves(LABELLED, n, 10)
    assert len({*reference, *control}) == 2 * n
    for rows in (reference, control):
        wanted = np.bincount(np.arange(n) % 10, minlength=10)
        np.testing.assert_array_equal(np.bincount(LABELLED.label[rows], minlength=10), wanted)


@pytest.mark.parametrize("n", [0, 40, -10])
def test_reference_and_control_refuse(n):
    with pytest.raises(ValueError, match=f"{n} samples; allowed: 1 to 30"):
        halves(LABELLED, n, 10)


def test_reference_and_control_of_other_labels():
    labels = np.asarray([3, 3, 7])
    for rows in halves(LABELLED, 3, 10, labels):
        np.testing.assert_array_equal(LABELLED.label[rows], labels)
    with pytest.raises(ValueError, match="4 samples, 4 of them of label 3; allowed: 3, half of its real images"):
        halves(LABELLED, 4, 10, np.full(4, 3))
