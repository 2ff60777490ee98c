"""CLD, SSCS and gDDIM from their papers, in numpy: equations integrated, and not the closed forms of our code."""

import numpy as np
from scipy.integrate import solve_ivp


class Langevin:
    """du = F u dB + sqrt(2 Gamma) dW of the velocity, in B; data is a mixture of isotropic Gaussians of R^d."""

    def __init__(self, mass: float, gamma: float, weight, mean, std) -> None:
        self.mass, self.friction = mass, 2 * np.sqrt(mass)
        self.first = gamma * mass
        self.weight, self.mean, self.std = (np.asarray(a, np.float64) for a in (weight, mean, std))
        self.F = np.array([[0, 1 / mass], [-1, -self.friction / mass]])
        self.N = np.diag([0, 2 * self.friction])

    def moved(self, b: float) -> np.ndarray:
        """exp(F b) by scaling and squaring its series."""
        a, out, term = self.F * b / 1024, np.eye(2), np.eye(2)
        for k in range(1, 20):
            term = term @ a / k
            out = out + term
        for _ in range(10):
            out = out @ out
        return out

    def covariance(self, b: float, start: np.ndarray) -> np.ndarray:
        """Of u at B = b from `start` at B = 0, by its equation."""

        def slope(_, s):
            s = s.reshape(2, 2)
            return (self.F @ s + s @ self.F.T + self.N).ravel()

        return solve_ivp(slope, (0, b), start.ravel(), method="DOP853", rtol=1e-12, atol=1e-20).y[:, -1].reshape(2, 2)

    def known(self, b: float) -> np.ndarray:
        """Covariance given x0, the first velocities averaged out."""
        return self.covariance(b, np.diag([0, self.first]))

    def score(self, u: np.ndarray, b: float, known: np.ndarray | None = None) -> np.ndarray:
        """grad log p [B, 2, d] of u [B, 2, d] = (position, velocity); known: `known(b)`, where that is at hand."""
        motion = self.moved(b)
        given = self.known(b) if known is None else known
        spread = np.outer(motion[:, 0], motion[:, 0])  # what a variance of x0 adds
        inverse = np.linalg.inv(given + self.std[:, None, None] ** 2 * spread)
        far = u[:, None] - motion[:, 0, None] * self.mean[:, None]  # [B, K, 2, d]
        pull = np.einsum("kij,bkjd->bkid", inverse, far)
        log = (
            np.log(self.weight) - 0.5 * (far * pull).sum((-1, -2)) + 0.5 * u.shape[-1] * np.log(np.linalg.det(inverse))
        )
        share = np.exp(log - np.logaddexp.reduce(log, axis=1)[:, None])
        return -np.einsum("bk,bkid->bid", share, pull)

    def flow(self, u: np.ndarray, b: float, end: float) -> np.ndarray:
        """Where the probability flow takes u [B, 2, d] from B = b to B = end."""
        from functools import cache

        known = cache(self.known)

        def slope(at, y):
            v = y.reshape(u.shape)
            s = self.score(v, at, known(at))
            return (np.einsum("ij,bjd->bid", self.F, v) - 0.5 * np.einsum("ij,bjd->bid", self.N, s)).ravel()

        done = solve_ivp(slope, (b, end), u.ravel(), method="DOP853", rtol=1e-10, atol=1e-11)
        assert done.success
        return done.y[:, -1].reshape(u.shape)

    def root(self, start: float, end: float, at_start: np.ndarray) -> np.ndarray:
        """R of gDDIM at B = end, by dR/dB = (F + N (R R^T)^-1/2) R."""

        def slope(_, r):
            r = r.reshape(2, 2)
            return ((self.F + 0.5 * self.N @ np.linalg.inv(r @ r.T)) @ r).ravel()

        done = solve_ivp(slope, (start, end), at_start.ravel(), method="DOP853", rtol=1e-12, atol=1e-14)
        return done.y[:, -1].reshape(2, 2)

    def weights(self, nodes: np.ndarray, start: float, end: float, root_at, n: int = 4000) -> list[np.ndarray]:
        """gDDIM's C_j: integral of Psi(end, tau) N R_tau^-T l_j(tau)/2, by the midpoint rule over B (t = B/beta)."""
        edges = np.linspace(start, end, n + 1)
        tau = (edges[1:] + edges[:-1]) / 2
        field = np.stack([self.moved(end - b) @ self.N @ np.linalg.inv(root_at(b)).T / 2 for b in tau])
        out = []
        for j in range(len(nodes)):
            others = np.delete(nodes, j)
            polynomial = np.prod([(tau - o) / (nodes[j] - o) for o in others], axis=0) * np.ones(n)
            out.append(np.einsum("k,kij->ij", polynomial, field) * (end - start) / n)
        return out


def sscs(u, score_v, times, beta: float, mass: float, z):
    """The authors' SSCS for a constant beta: u [B, 2, d], score_v(u, t) -> [B, d], z [steps, 2 halves, B, 2, d].

    Coefficients are those of the paper's appendix D for the analytic half steps, h the time of a half.
    """
    friction = 2 * np.sqrt(mass)
    f, g = 2 / np.sqrt(1 / mass), 1 / friction

    def half(u, h, z):
        b = -beta * h  # beta_int(1 - (t + h)) - beta_int(1 - t)
        coeff = np.exp(2 * g * b)
        x, v = u[:, 0], u[:, 1]
        mean = np.stack(
            [coeff * ((1 - 2 * g * b) * x + 4 * g**2 * b * v), coeff * (-b * x + (1 + 2 * g * b) * v)], axis=1
        )
        e = np.exp(4 * g * b)
        xx = e * (1 / e - 1 + 4 * g * b - 8 * g**2 * b**2)
        xv = -e * 4 * g * b**2
        vv = e * (-(f**2) * (-(1 / e) + 1) / 4 - f * b - 2 * b**2)
        l11 = np.sqrt(xx)
        l21 = xv / l11
        l22 = np.sqrt(vv - l21**2)
        return mean + np.stack([l11 * z[:, 0], l21 * z[:, 0] + l22 * z[:, 1]], axis=1)

    for j in range(len(times) - 1):
        dt = times[j] - times[j + 1]
        u = half(u, dt / 2, z[j, 0])
        v = u[:, 1] + 2 * f * (score_v(u, times[j]) + u[:, 1] / mass) * beta * dt
        u = half(np.stack([u[:, 0], v], axis=1), dt / 2, z[j, 1])
    return u
