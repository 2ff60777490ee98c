"""Training objectives written from the papers, in numpy float64. k counts discrete steps from 0."""

import numpy as np
from scipy.stats import norm


def gaussian_kl(mean_1, variance_1, mean_2, variance_2):
    """KL(N(mean_1, variance_1) || N(mean_2, variance_2)) in nats."""
    return 0.5 * (np.log(variance_2 / variance_1) + (variance_1 + (mean_1 - mean_2) ** 2) / variance_2 - 1)


def decoder_nll(image, mean, std):
    """Ho et al. 2020, equation 13: minus log of the mass of N(mean, std^2) on the bin of a uint8 image, in nats."""
    x0 = image / 127.5 - 1
    lower = np.where(image == 0, -np.inf, x0 - 1 / 255)
    upper = np.where(image == 255, np.inf, x0 + 1 / 255)
    # the survival function keeps the digits of the upper tail
    mass = np.where(
        x0 > mean,
        norm.sf(lower, mean, std) - norm.sf(upper, mean, std),
        norm.cdf(upper, mean, std) - norm.cdf(lower, mean, std),
    )
    return -np.log(np.maximum(mass, 1e-12))


def variational_bound(image, x, eps, v, k, betas):
    """One term of Nichol & Dhariwal 2021's L_vlb in bits per element, with their learned variance (equation 15).

    Args:
      image [B, ...] uint8; x: its noised version at steps k [B]; eps, v: the network's two outputs.
    """
    abar = np.cumprod(1 - betas)
    before = np.append(1.0, abar[:-1])
    tilde = (1 - before) / (1 - abar) * betas
    terms = []
    for b, step in enumerate(k):
        mean_x0 = np.sqrt(before[step]) * betas[step] / (1 - abar[step])
        mean_x = np.sqrt(1 - betas[step]) * (1 - before[step]) / (1 - abar[step])
        x0 = image[b] / 127.5 - 1
        guess = (x[b] - np.sqrt(1 - abar[step]) * eps[b]) / np.sqrt(abar[step])
        smallest = tilde[max(step, 1)]  # the first step's beta~ is 0: the second's stands in
        variance = np.exp((v[b] + 1) / 2 * np.log(betas[step]) + (1 - v[b]) / 2 * np.log(smallest))
        mean = mean_x * x[b] + mean_x0 * guess
        if step == 0:
            nats = decoder_nll(image[b], mean, np.sqrt(variance))
        else:
            nats = gaussian_kl(mean_x * x[b] + mean_x0 * x0, tilde[step], mean, variance)
        terms.append(nats.mean() / np.log(2))
    return np.array(terms)


def cross_entropy(logits, label, smoothing):
    """Szegedy et al. 2015, equation 9 and section 7: mean cross entropy with smoothed labels, in nats."""
    classes = logits.shape[1]
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    losses = [-(1 - smoothing) * row[y] - smoothing / classes * row.sum() for row, y in zip(log_p, label, strict=True)]
    return np.mean(losses)
