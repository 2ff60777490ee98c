"""How good a set of samples is: agreement with the requested labels, and distances between sets and images.

Pure functions on numpy arrays, in float64. The distances between sets here are taken in the feature space of difax's
own classifier; their values compare with each other and with the real-against-real control beside them, not with a
published FID or KID. Shape letters: N images, F features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Agreement(NamedTuple):
    """A share of n with its 95 % interval."""

    rate: float
    low: float
    high: float
    n: int


def agreement(predicted: np.ndarray, requested: np.ndarray) -> Agreement:
    """Share of samples that a classifier gives the label that was asked for, with Wilson's 95 % interval.

    The interval is (p + z^2/2n -+ z sqrt(p (1 - p)/n + z^2/4n^2)) / (1 + z^2/n), z = 1.96.

    Args:
      predicted, requested: [N] labels.

    Raises:
      ValueError: no samples, or shapes that differ.

    References: Wilson 1927, doi:10.1080/01621459.1927.10502953.
    """
    predicted, requested = np.asarray(predicted), np.asarray(requested)
    if predicted.shape != requested.shape or predicted.ndim != 1:
        raise ValueError(f"agreement: labels of shapes {predicted.shape} and {requested.shape}; allowed: [N], equal")
    n = len(predicted)
    if n == 0:
        raise ValueError("agreement: no samples; allowed: 1 or more")
    p, z = float(np.mean(predicted == requested)), 1.959963984540054
    centre, half = p + z**2 / (2 * n), z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    # rounding may leave the interval of p = 0 or 1 a hair short of p
    low, high = (centre - half) / (1 + z**2 / n), (centre + half) / (1 + z**2 / n)
    return Agreement(p, min(float(low), p), max(float(high), p), n)


def frechet_distance(a_NF: np.ndarray, b_NF: np.ndarray) -> float:
    """Squared Frechet distance between the Gaussians of two sets of features.

    d = |mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)), and tr (C_a C_b)^(1/2) is the sum of the square roots of
    the eigenvalues of C_a^(1/2) C_b C_a^(1/2), which is symmetric. The estimate is biased upwards by about F/N: compare
    equal N only, beside a control of real against real.

    Args:
      a_NF, b_NF: features of the two sets, N >= 2 F each.

    Raises:
      ValueError: sets too small for a covariance, of different F, or not finite.

    References: Dowson & Landau 1982, doi:10.1016/0047-259X(82)90077-X; Heusel et al. 2017, arXiv:1706.08500.
    """
    a_NF, b_NF = np.asarray(a_NF, np.float64), np.asarray(b_NF, np.float64)
    if a_NF.ndim != 2 or b_NF.ndim != 2 or a_NF.shape[1] != b_NF.shape[1]:
        raise ValueError(f"frechet_distance: shapes {a_NF.shape} and {b_NF.shape}; allowed: [N, F] with equal F")
    for name, x_NF in (("a", a_NF), ("b", b_NF)):
        n, f = x_NF.shape
        if n < 2 * f:
            raise ValueError(f"frechet_distance: set {name} has {n} rows of {f} features; allowed: {2 * f} or more")
        if not np.all(np.isfinite(x_NF)):
            raise ValueError(f"frechet_distance: set {name} has features that are not finite")
    mean_a, mean_b = a_NF.mean(0), b_NF.mean(0)
    c_a, c_b = np.cov(a_NF, rowvar=False, ddof=1), np.cov(b_NF, rowvar=False, ddof=1)
    c_a, c_b = np.atleast_2d(c_a), np.atleast_2d(c_b)
    values, vectors = np.linalg.eigh(c_a)
    root_a = (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T
    cross = np.linalg.eigvalsh(root_a @ c_b @ root_a)
    shift = float(np.sum((mean_a - mean_b) ** 2))
    return shift + float(np.trace(c_a) + np.trace(c_b) - 2 * np.sum(np.sqrt(np.maximum(cross, 0.0))))


def kernel_distance(a_NF: np.ndarray, b_NF: np.ndarray) -> float:
    """Squared maximum mean discrepancy between two sets of features under a cubic kernel, without bias.

    d = mean_{i != j} k(a_i, a_j) + mean_{i != j} k(b_i, b_j) - 2 mean_{i, j} k(a_i, b_j), k(x, y) = (x . y / F + 1)^3.
    About 0 for two sets of one distribution, and below 0 half of the time.

    Args:
      a_NF, b_NF: features of the two sets, 2 rows or more each.

    Raises:
      ValueError: fewer rows, of different F, or not finite.

    References: Binkowski et al. 2018, arXiv:1801.01401; over whole sets, where KID averages over subsets of them.
    """
    a_NF, b_NF = _feature_sets("kernel_distance", a_NF, b_NF, 2)

    within = _without_diagonal(_cubic(a_NF, a_NF)) + _without_diagonal(_cubic(b_NF, b_NF))
    return within - 2 * float(_cubic(a_NF, b_NF).mean())


def _cubic(x_NF: np.ndarray, y_MF: np.ndarray) -> np.ndarray:
    """The cubic kernel of each pair [N, M]."""
    return (x_NF @ y_MF.T / x_NF.shape[1] + 1) ** 3


def _without_diagonal(k_NN: np.ndarray) -> float:
    """The mean over pairs of different rows."""
    return float((k_NN.sum() - np.trace(k_NN)) / (len(k_NN) * (len(k_NN) - 1)))


class PrecisionRecall(NamedTuple):
    """Share of samples that lie among the real images, and of real images that lie among the samples."""

    precision: float
    recall: float


def precision_recall(samples_NF: np.ndarray, real_NF: np.ndarray, k: int = 3) -> PrecisionRecall:
    """How much of the samples is real-looking, and how much of the real images they cover.

    The manifold of a set is the union of the balls around its features, each as wide as to its k-th neighbour in the
    set; precision is the share of samples in the manifold of the real ones, recall the other way round.

    Args:
      samples_NF, real_NF: features, more than k rows each; of equal N, since more balls cover more.
      k: neighbours (3).

    Raises:
      ValueError: too few rows, different F, or not finite.

    References: Kynkaanniemi et al. 2019, arXiv:1904.06991.
    """
    samples_NF, real_NF = _feature_sets("precision_recall", samples_NF, real_NF, k + 1)
    across = _squared(samples_NF, real_NF)
    precision = (across <= _radii(real_NF, k)[None]).any(1).mean()
    return PrecisionRecall(float(precision), float((across <= _radii(samples_NF, k)[:, None]).any(0).mean()))


def _squared(x_NF: np.ndarray, y_MF: np.ndarray) -> np.ndarray:
    """Squared distances [N, M]."""
    return np.maximum((x_NF**2).sum(1)[:, None] + (y_MF**2).sum(1)[None] - 2 * x_NF @ y_MF.T, 0.0)


def _own(x_NF: np.ndarray) -> np.ndarray:
    """Squared distances within a set, each row being nearest to itself."""
    apart = _squared(x_NF, x_NF)
    np.fill_diagonal(apart, -1.0)
    return apart


def _radii(x_NF: np.ndarray, k: int) -> np.ndarray:
    """Squared distance of each row to its k-th neighbour."""
    return np.partition(_own(x_NF), k, axis=1)[:, k]


def _precisions(samples_NF: np.ndarray, real_NF: np.ndarray, draws_RN: np.ndarray, k: int = 3) -> np.ndarray:
    """The precision of each draw of samples: whether one lies among the real ones is its own affair."""
    inside_N = np.asarray(_squared(samples_NF, real_NF) <= _radii(real_NF, k)[None]).any(1)
    return np.asarray(inside_N)[draws_RN].mean(1)


NEAR = 40  # neighbours of a sample that are kept in order; all but surely a draw has k of them


def _recalls(samples_NF: np.ndarray, real_NF: np.ndarray, draws_RN: np.ndarray, k: int = 3) -> np.ndarray:
    """The recall of each draw of samples, whose balls are as wide as to the k-th neighbour in the draw.

    A sample's neighbours are put in order once. In a draw its ball ends at the neighbour up to which more than k rows,
    itself included, were drawn; so a real image needs, of each sample, only the neighbour whose distance reaches it.
    """
    n, near = len(samples_NF), min(NEAR, len(samples_NF))
    apart = _own(samples_NF)
    order_Nn = np.argsort(apart, axis=1, kind="stable")[:, :near]
    reach_Nn = np.take_along_axis(apart, order_Nn, 1)
    reach_Nn[:, 0] = 0.0  # itself, as often as it is drawn
    across_NM = _squared(samples_NF, real_NF)
    # the first neighbour whose ball holds the real image; `near` is none of those that are kept
    needed_NM = np.stack([np.searchsorted(r, a) for r, a in zip(reach_Nn, across_NM, strict=True)])
    sample, real = np.nonzero(needed_NM < near)
    needed = needed_NM[sample, real]
    found = np.zeros(len(draws_RN))
    for r, draw in enumerate(draws_RN):
        times = np.bincount(draw, minlength=n)
        full_Nn = np.cumsum(times[order_Nn], axis=1) > k
        last = np.where(full_Nn.any(1), full_Nn.argmax(1), near)
        held = np.zeros(len(real_NF), bool)
        held[real[(times[sample] > 0) & (needed <= last[sample])]] = True
        for i in np.flatnonzero((times > 0) & (last == near)):  # its ball is wider than those that are kept
            rest = np.argsort(apart[i], kind="stable")
            held |= across_NM[i] <= apart[i, rest[np.argmax(np.cumsum(times[rest]) > k)]]
        found[r] = held.mean()
    return found


def _kernel_distances(samples_NF: np.ndarray, real_NF: np.ndarray, draws_RN: np.ndarray) -> np.ndarray:
    """The kernel distance of each draw of samples, by how often each was drawn."""
    n = draws_RN.shape[1]
    times_RN = np.stack([np.bincount(draw, minlength=len(samples_NF)) for draw in draws_RN]).astype(float)
    own_NN, real_MM = _cubic(samples_NF, samples_NF), _cubic(real_NF, real_NF)
    # of the n drawn rows, each with itself is left out
    within = ((times_RN @ own_NN) * times_RN).sum(1) - times_RN @ np.diagonal(own_NN)
    across = times_RN @ _cubic(samples_NF, real_NF).mean(1) / n
    return within / (n * (n - 1)) + _without_diagonal(real_MM) - 2 * across


def _feature_sets(name: str, a_NF: np.ndarray, b_NF: np.ndarray, least: int) -> tuple[np.ndarray, np.ndarray]:
    a_NF, b_NF = np.asarray(a_NF, np.float64), np.asarray(b_NF, np.float64)
    if a_NF.ndim != 2 or b_NF.ndim != 2 or a_NF.shape[1] != b_NF.shape[1]:
        raise ValueError(f"{name}: shapes {a_NF.shape} and {b_NF.shape}; allowed: [N, F] with equal F")
    for which, x_NF in (("first", a_NF), ("second", b_NF)):
        if len(x_NF) < least:
            raise ValueError(f"{name}: the {which} set has {len(x_NF)} rows; allowed: {least} or more")
        if not np.all(np.isfinite(x_NF)):
            raise ValueError(f"{name}: the {which} set has features that are not finite")
    return a_NF, b_NF


class Interval(NamedTuple):
    """An estimate with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


def bootstrap(
    values: np.ndarray,
    of: Callable[[np.ndarray], float] | None = None,
    resamples: int = 1000,
    bounds: tuple[float, float] = (-np.inf, np.inf),
) -> Interval:
    """A figure of a set of samples with its 95 % interval over samples: percentile bootstrap, centred.

    Rows are drawn again with replacement, and the 2.5 % and 97.5 % quantiles of the figure are moved by what its mean
    over the draws is off from the figure itself: a distance between sets grows when rows repeat, its spread does not.

    Args:
      values: [N, ...], a row for each sample. of: rows -> figure; None is the mean, over samples and the rest.
      resamples: draws; the same ones at every call (seed 0), so that methods are compared on equal draws.
      bounds: of the figure, which the interval keeps to: (0, 1) of a share.

    Raises:
      ValueError: no rows.

    References: Efron 1979, doi:10.1214/aos/1176344552.
    """
    values = np.asarray(values)
    if not len(values):
        raise ValueError("bootstrap: no samples; allowed: 1 or more")
    figure = of or (lambda rows: float(np.mean(rows)))
    drawn = [figure(values[draw]) for draw in _draws(len(values), resamples)]
    return _centred(figure(values), np.asarray(drawn), bounds)


def _draws(n: int, resamples: int) -> np.ndarray:
    """Which rows each draw has [resamples, n]: the same ones at every call."""
    return np.random.default_rng(0).integers(n, size=(resamples, n))


def _centred(estimate: float, drawn: np.ndarray, bounds: tuple[float, float]) -> Interval:
    if not np.all(np.isfinite(drawn)):  # such as the PSNR of equal images
        return Interval(estimate, float(drawn.min()), float(drawn.max()))
    ends = np.clip(estimate + np.quantile(drawn - drawn.mean(), (0.025, 0.975)), *bounds)
    return Interval(estimate, *map(float, ends))


class FeatureFigure(NamedTuple):
    """A figure of two sets of features.

    of(samples, real) -> the figure; least: rows that a set needs; bounds: what the figure cannot leave;
    each(samples, real, draws [R, N]) -> the figure of each draw of the samples [R], where what the draws have in common
    can be worked out once; None is `of` draw by draw.
    """

    of: Callable[[np.ndarray, np.ndarray], float]
    least: int = 2
    bounds: tuple[float, float] = (-np.inf, np.inf)
    each: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray] | None = None

    def interval(self, samples_NF: np.ndarray, real_NF: np.ndarray, resamples: int) -> Interval:
        """The figure with its bootstrap interval over samples."""
        if self.each is None:
            return bootstrap(samples_NF, lambda rows: self.of(rows, real_NF), resamples, self.bounds)
        samples_NF, real_NF = (np.asarray(x, np.float64) for x in (samples_NF, real_NF))
        estimate = self.of(samples_NF, real_NF)
        drawn = self.each(samples_NF, real_NF, _draws(len(samples_NF), resamples))
        return _centred(estimate, drawn, self.bounds)


FEATURE_FIGURES = {
    "frechet": FeatureFigure(frechet_distance),
    "kernel": FeatureFigure(kernel_distance, each=_kernel_distances),
    "precision": FeatureFigure(lambda a, b: precision_recall(a, b).precision, 4, (0.0, 1.0), _precisions),
    "recall": FeatureFigure(lambda a, b: precision_recall(a, b).recall, 4, (0.0, 1.0), _recalls),
}


class FeatureScale(NamedTuple):
    """Mean and standard deviation of the features of real images, and which of all F features are kept [F]."""

    mean: np.ndarray
    std: np.ndarray
    keep: np.ndarray


RARE = 0.01


def feature_scale(real_NF: np.ndarray) -> FeatureScale:
    """The scale of a feature space, from the rectified features [N, F] of real training images.

    A feature that is positive on less than 1 % of them is left out: its deviation is next to nothing, so that one
    sample on which it fires would outweigh all the rest.
    """
    real_NF = np.asarray(real_NF, np.float64)
    keep = (real_NF > 0).mean(0) >= RARE
    if not keep.any():
        raise ValueError(
            f"feature_scale: none of {real_NF.shape[1]} features is positive on 1 % of {len(real_NF)} images"
        )
    return FeatureScale(real_NF[:, keep].mean(0), real_NF[:, keep].std(0), keep)


def normalise_features(features_NF: np.ndarray, scale: FeatureScale) -> np.ndarray:
    """(features - mean)/std of the kept ones, so that no feature counts more because its unit is larger."""
    return (np.asarray(features_NF, np.float64)[:, scale.keep] - scale.mean) / scale.std


Measure = Callable[[np.ndarray, np.ndarray], np.ndarray]


def framewise(measure: Measure) -> Measure:
    """A measure of pairs of images [N, H, W, C] for pairs of videos [N, F, H, W, C] too: the mean over frames."""

    def measured(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        if a.ndim != 5:
            return np.asarray(measure(a, b))
        frames = (x.reshape(-1, *x.shape[2:]) for x in (a, b))
        return np.asarray(measure(*frames)).reshape(a.shape[:2]).mean(1)

    return measured


def psnr(a: np.ndarray, b: np.ndarray, peak: float = 2.0) -> float:
    """Peak signal-to-noise ratio 10 log10(peak^2 / mean (a - b)^2) in dB; inf for equal images.

    Args:
      a, b: images of one shape. peak: width of their range (2 for [-1, 1]).
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape:
        raise ValueError(f"psnr: images of shapes {a.shape} and {b.shape}; allowed: equal shapes")
    error = float(np.mean((a - b) ** 2))
    return float("inf") if error == 0 else 10 * float(np.log10(peak**2 / error))


def ssim(a: np.ndarray, b: np.ndarray, peak: float = 2.0, sigma: float = 1.5) -> np.ndarray:
    """Structural similarity of each pair of images, with Gaussian windows: mean over positions and channels of

      (2 m_a m_b + c1)(2 s_ab + c2) / ((m_a^2 + m_b^2 + c1)(s_a^2 + s_b^2 + c2))

    with c1 = (0.01 peak)^2 and c2 = (0.03 peak)^2.

    Args:
      a, b: [N, H, W, C], in a range of width `peak` (2 for [-1, 1]). sigma: of the windows, cut at 3.5 sigma.

    Returns:
      [N] float64; 1 for equal images. The margin of half a window is left out where the image is larger than it.

    References: Wang et al. 2004, doi:10.1109/TIP.2003.819861.
    """
    luminance, structure = _similarities("ssim", a, b, peak, sigma)
    return (luminance * structure).mean((1, 2, 3))


MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)


WINDOW = 11  # pixels of the window of structural similarity


def ms_ssim(a: np.ndarray, b: np.ndarray, peak: float = 2.0, scales: int | None = None) -> np.ndarray:
    """Multi-scale structural similarity of each pair of images.

    prod_j mean(cs_j)^w_j, at the coarsest scale mean(l cs)^w; from scale to scale images are averaged two by two and
    halved. l = (2 m_a m_b + c1)/(m_a^2 + m_b^2 + c1) and cs = (2 s_ab + c2)/(s_a^2 + s_b^2 + c2) as in `ssim`.

    Args:
      a, b: [N, H, W, C], in a range of width `peak` (2 for [-1, 1]).
      scales: how many, 1 to 5; None is as many as fit, the coarsest being as large as a window of 11. With fewer than
        the paper's 5 (for which an image needs 176 pixels) the first weights are taken and add up to 1 again.

    Returns:
      [N] float64, of each image the mean over channels; a channel whose mean cs is negative counts as 0.

    Raises:
      ValueError: shapes that differ, or more scales than fit.

    References: Wang et al. 2003, doi:10.1109/ACSSC.2003.1292216.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    side = min(a.shape[1:3]) if a.ndim == 4 else 0
    fit = next((n for n in range(len(MS_SSIM_WEIGHTS), 0, -1) if side >> (n - 1) >= WINDOW), 0)
    scales = fit if scales is None else scales
    if not 1 <= scales <= fit:
        raise ValueError(
            f"ms_ssim: scales={scales} of images of {a.shape}; allowed: 1 to {fit}, {WINDOW} pixels at the coarsest"
        )
    weights = np.asarray(MS_SSIM_WEIGHTS[:scales]) / sum(MS_SSIM_WEIGHTS[:scales])
    total = np.ones((len(a), a.shape[-1]))
    for j, weight in enumerate(weights):
        luminance, structure = _similarities("ms_ssim", a, b, peak, 1.5)
        part = luminance * structure if j == scales - 1 else structure
        total *= np.maximum(part.mean((1, 2)), 0.0) ** weight
        a, b = _halved(a), _halved(b)
    return total.mean(-1)


def _halved(x_NHWC: np.ndarray) -> np.ndarray:
    n, h, w, c = x_NHWC.shape
    return x_NHWC[:, : h // 2 * 2, : w // 2 * 2].reshape(n, h // 2, 2, w // 2, 2, c).mean((2, 4))


def relative_error(a: np.ndarray, b: np.ndarray, order: int = 1) -> np.ndarray:
    """|a - b|_p / |b|_p of each pair of images, p = 1 or 2: [N] float64.

    Args:
      a, b: [N, ...] of one shape; b is what is compared with. order: p.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape or a.ndim < 2:
        raise ValueError(f"relative_error: images of {a.shape} and {b.shape}; allowed: two equal shapes [N, ...]")
    if order not in (1, 2):
        raise ValueError(f"relative_error: order={order}; allowed: 1, 2")
    flat_a, flat_b = a.reshape(len(a), -1), b.reshape(len(b), -1)
    apart, size = np.linalg.norm(flat_a - flat_b, order, axis=1), np.linalg.norm(flat_b, order, axis=1)
    # of an image that is zero everywhere
    nothing = np.where(apart > 0, np.inf, 0.0)
    return np.divide(apart, size, out=nothing, where=size > 0)


def _similarities(name: str, a: np.ndarray, b: np.ndarray, peak: float, sigma: float) -> tuple[np.ndarray, np.ndarray]:
    """Luminance and contrast-structure terms of SSIM at every position, without the margin of half a window."""
    from scipy.ndimage import gaussian_filter

    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape or a.ndim != 4:
        raise ValueError(f"{name}: images of {a.shape} and {b.shape}; allowed: two equal shapes [N, H, W, C]")

    def smooth(x: np.ndarray) -> np.ndarray:
        return gaussian_filter(x, (0, sigma, sigma, 0), truncate=3.5)

    m_a, m_b = smooth(a), smooth(b)
    s_aa, s_bb, s_ab = smooth(a * a) - m_a**2, smooth(b * b) - m_b**2, smooth(a * b) - m_a * m_b
    c1, c2 = (0.01 * peak) ** 2, (0.03 * peak) ** 2
    luminance = (2 * m_a * m_b + c1) / (m_a**2 + m_b**2 + c1)
    structure = (2 * s_ab + c2) / (s_aa + s_bb + c2)
    margin = int(3.5 * sigma + 0.5)
    if min(a.shape[1:3]) > 2 * margin:
        luminance, structure = (x[:, margin:-margin, margin:-margin] for x in (luminance, structure))
    return luminance, structure
