"""How good a set of samples is: agreement with the requested labels, and distances between sets and images.

Pure functions on numpy arrays, in float64. The Frechet distance here is taken in the feature space of difax's own
classifier; its values compare with each other and with the real-against-real control beside them, not with a
published FID. Shape letters: N images, F features.
"""

from __future__ import annotations

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
    from scipy.ndimage import gaussian_filter

    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape or a.ndim != 4:
        raise ValueError(f"ssim: images of {a.shape} and {b.shape}; allowed: two equal shapes [N, H, W, C]")

    def smooth(x: np.ndarray) -> np.ndarray:
        return gaussian_filter(x, (0, sigma, sigma, 0), truncate=3.5)

    m_a, m_b = smooth(a), smooth(b)
    s_aa, s_bb, s_ab = smooth(a * a) - m_a**2, smooth(b * b) - m_b**2, smooth(a * b) - m_a * m_b
    c1, c2 = (0.01 * peak) ** 2, (0.03 * peak) ** 2
    found = ((2 * m_a * m_b + c1) * (2 * s_ab + c2)) / ((m_a**2 + m_b**2 + c1) * (s_aa + s_bb + c2))
    margin = int(3.5 * sigma + 0.5)
    if min(a.shape[1:3]) > 2 * margin:
        found = found[:, margin:-margin, margin:-margin]
    return found.mean((1, 2, 3))
