"""A Gaussian mixture whose denoiser is exact: the problem that solvers are measured on (numpy, float64)."""

import numpy as np


class Mixture:
    """Five isotropic Gaussians in R^8: data whose E[x0 | x] is known for every alpha and sigma (numpy, float64)."""

    def __init__(self) -> None:
        rng = np.random.default_rng(7)
        self.mean_KD = rng.normal(size=(5, 8))
        self.std_K = rng.uniform(0.2, 0.6, size=5)
        self.weight_K = rng.dirichlet(np.full(5, 4.0))

    def log_density(self, x_BD: np.ndarray, alpha: float, sigma: float) -> np.ndarray:
        """log p_t(x) [B] of x = alpha x0 + sigma eps."""
        return np.logaddexp.reduce(self._joint(x_BD, alpha, sigma), axis=1)

    def x0(self, x_BD: np.ndarray, alpha: float, sigma: float) -> np.ndarray:
        """E[x0 | x]."""
        joint_BK = self._joint(x_BD, alpha, sigma)
        posterior_BK = np.exp(joint_BK - np.logaddexp.reduce(joint_BK, axis=1)[:, None])
        gain_K = alpha * self.std_K**2 / (alpha**2 * self.std_K**2 + sigma**2)
        each_BKD = self.mean_KD + gain_K[:, None] * (x_BD[:, None] - alpha * self.mean_KD)
        return np.einsum("bk,bkd->bd", posterior_BK, each_BKD)

    def eps(self, x_BD: np.ndarray, alpha: float, sigma: float) -> np.ndarray:
        """E[eps | x]."""
        return (x_BD - alpha * self.x0(x_BD, alpha, sigma)) / sigma

    def variance(self, x_BD: np.ndarray) -> np.ndarray:
        """Some smooth function of x in [-1, 1], standing for the learned-variance channels."""
        return np.sin(2 * x_BD)

    def _joint(self, x_BD: np.ndarray, alpha: float, sigma: float) -> np.ndarray:
        variance_K = alpha**2 * self.std_K**2 + sigma**2
        square_BK = ((x_BD[:, None] - alpha * self.mean_KD) ** 2).sum(-1)
        return np.log(self.weight_K) - 0.5 * square_BK / variance_K - 4.0 * np.log(2 * np.pi * variance_K)
