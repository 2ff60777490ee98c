"""Multistep samplers written from the papers' formulas in their own notation, in numpy float64.

Everywhere alpha, sigma [n + 1] are the levels of the run, and eps(x, i) is the noise prediction at level i.
"""

import math

import numpy as np


def half_log_snr(alpha, sigma):
    with np.errstate(divide="ignore"):
        return np.log(alpha) - np.log(sigma)


def phi(k, h):
    """phi_k(h) = int_0^1 e^{(1 - u) h} u^{k - 1}/(k - 1)! du, by its series."""
    return sum(h**m / math.factorial(m + k) for m in range(60))


def unipc_rho(r, h, b_of_h):
    """The solution of R_p(h) a_p = phi_p(h) of UniPC's theorem: r [k], B(h) -> a [k]."""
    r = np.asarray(r, float)
    k = len(r)
    matrix = np.stack([(r * h) ** i for i in range(k)])
    right = [h ** (i + 1) * math.factorial(i + 1) * phi(i + 2, h) for i in range(k)]
    return np.linalg.solve(matrix, np.array(right) / b_of_h)


def unipc(x, eps, alpha, sigma, order, variant="bh2", data=True, off=(), lower_final=True, ratios=None, t=None):
    """Algorithms 5 to 8 of UniPC: predictor, then the corrector once the output at the predicted point is known.

    ratios, t: DC-Solver's rho of each step, by which the newest output is compensated, and the times of the levels.
    """
    n, lam = len(alpha) - 1, half_log_snr(alpha, sigma)

    def model(x, i):
        e = eps(x, i)
        return (x - sigma[i] * e) / alpha[i] if data else e

    def update(x, i, outputs, many, new=None):
        """From level i to i + 1 by `many` outputs, newest first; the corrector if the new output is given."""
        h = lam[i + 1] - lam[i]
        if np.isinf(h):
            m = outputs[0]
            return alpha[i + 1] * m if data else alpha[i + 1] * (x - sigma[i] * m) / alpha[i]
        hh = -h if data else h
        scale, ratio = (alpha[i + 1], sigma[i + 1] / sigma[i]) if data else (sigma[i + 1], alpha[i + 1] / alpha[i])
        b = hh if variant == "bh1" else np.expm1(hh)
        r = [(lam[i - k] - lam[i]) / h for k in range(1, many)]
        d = [(outputs[k] - outputs[0]) / r[k - 1] for k in range(1, many)]
        if new is not None:
            r, d = [*r, 1.0], [*d, new - outputs[0]]
            rho = [0.5] if many == 1 else unipc_rho(r, hh, b)
        else:
            rho = [0.5] if many == 2 else unipc_rho(r, hh, b) if r else []
        return (
            ratio * x - scale * np.expm1(hh) * outputs[0] - scale * b * sum(a * b for a, b in zip(rho, d, strict=True))
        )

    outputs, before, many = [], None, 0
    for i in range(n):
        new = model(x, i)
        if i and i - 1 not in off:
            x = update(before, i - 1, outputs, many, new)
        outputs = [new, *outputs]
        if t is not None and ratios is not None and ratios[i] != 1:
            at = ratios[i] * t[i] + (1 - ratios[i]) * t[i - 1]
            nodes = [t[i], t[i - 1], t[i - 2]]
            total = 0.0
            for a in range(3):
                others = [b for b in range(3) if b != a]
                weight = np.prod([(at - nodes[b]) / (nodes[a] - nodes[b]) for b in others])
                total = total + weight * outputs[a]
            outputs[0] = total
        many = min(order, i + 1, n - i if lower_final else order)
        if np.isinf(lam[i + 1]):
            many = 1
        before, x = x, update(x, i, outputs, many)
    return x


def compensation_ratios(coefficients, steps, scale):
    """DC-Solver's cascade: coefficients [4, 3, 3], powers of the share of the run, then of guidance and of evaluations
    with the highest first."""
    found = []
    for step in range(1, steps + 1):
        total = 0.0
        for power in range(4):
            inner = [np.polyval(coefficients[power, q], steps / 50) for q in range(3)]
            total += np.polyval(inner, scale / 12) * (step / steps) ** power
        found.append(1.0 if step < 3 else total)
    return np.array(found)


def moment(p, start, end, rate):
    """int_start^end e^{rate (x - end)} x^p dx, by parts."""
    if p == 0:
        return -np.expm1(-rate * (end - start)) / rate
    return (end**p - start**p * np.exp(-rate * (end - start)) - p * moment(p - 1, start, end, rate)) / rate


def sa_solver(x, eps, alpha, sigma, tau, predictor, corrector, z, few=True, lower_final=True):
    """Algorithm 1 of SA-Solver; tau, z: of each step. corrector 0: none."""
    n, lam = len(alpha) - 1, half_log_snr(alpha, sigma)

    def update(x, i, nodes, values, z):
        h, rate = lam[i + 1] - lam[i], 1 + tau[i] ** 2
        if np.isinf(h):
            return alpha[i + 1] * values[0]
        weights = []
        for a in nodes:  # in lambda measured from the start of the step, where the powers do not cancel
            others = [lam[b] - lam[i] for b in nodes if b != a]
            poly = np.poly1d(others, True) / np.prod([lam[a] - lam[i] - o for o in others])
            weights.append(sum(c * moment(poly.order - k, 0.0, h, rate) for k, c in enumerate(poly.c)))
        if few and len(nodes) == 2:
            extra = h**2 / 2 - moment(1, 0.0, h, rate)
            other = next(b for b in nodes if b != i)
            sign = extra / (lam[other] - lam[i])
            weights = [w + (sign if a == other else -sign) for w, a in zip(weights, nodes, strict=True)]
        drift = sigma[i + 1] / sigma[i] * np.exp(-(tau[i] ** 2) * h) * x
        sums = sum(w * v for w, v in zip(weights, values, strict=True))
        return drift + rate * alpha[i + 1] * sums + sigma[i + 1] * np.sqrt(1 - np.exp(-2 * tau[i] ** 2 * h)) * z

    outputs, before = [], None
    for i in range(n):
        outputs = [(x - sigma[i] * eps(x, i)) / alpha[i], *outputs]
        if i and corrector:
            many = min(corrector, i + 1, n - i + 2 if lower_final else corrector)
            x = update(before, i - 1, list(range(i, i - many, -1)), outputs[:many], z[i - 1])
        many = min(predictor, i + 1, n - i if lower_final else predictor)
        if np.isinf(lam[i + 1]):
            many = 1
        before, x = x, update(x, i, list(range(i, i - many, -1)), outputs[:many], z[i])
    return x


def deis(x, eps, alpha, sigma, variable, rho_to_variable, order, points=40_000):
    """Equation 14 of DEIS in y = x/alpha: the integral of the interpolated eps over rho, by the midpoint rule.

    variable: [n + 1], in which eps is interpolated; rho_to_variable(rho) -> it.
    """
    rho, outputs = sigma / alpha, []
    for i in range(len(alpha) - 1):
        outputs = [eps(x, i), *outputs]
        many = 1 if rho[i + 1] == 0 else min(order, i + 1)
        step = (rho[i + 1] - rho[i]) / points
        at = rho_to_variable(rho[i] + step * (np.arange(points) + 0.5))
        y = x / alpha[i]
        for a in range(many):
            basis = np.ones(points)
            for b in range(many):
                if b != a:
                    basis = basis * (at - variable[i - b]) / (variable[i - a] - variable[i - b])
            y = y + basis.sum() * step * outputs[a]
        x = alpha[i + 1] * y
    return x


def runge_kutta(x, eps_at, alpha, sigma, order):
    """Heun, Kutta and the classical method on dy/d rho = eps(alpha y, rho); an Euler step to rho = 0.

    eps_at(x, rho), and alpha of a rho of a variance-preserving process.
    """

    def slope(y, rho):
        return eps_at(y / np.sqrt(1 + rho**2), rho)

    y = x / alpha[0]
    for a, b in zip((sigma / alpha)[:-1], (sigma / alpha)[1:], strict=True):
        h = b - a
        k1 = slope(y, a)
        if b == 0:
            y = y + h * k1
        elif order == 2:
            y = y + h / 2 * (k1 + slope(y + h * k1, b))
        elif order == 3:
            k2 = slope(y + h / 2 * k1, a + h / 2)
            k3 = slope(y - h * k1 + 2 * h * k2, b)
            y = y + h / 6 * (k1 + 4 * k2 + k3)
        else:
            k2 = slope(y + h / 2 * k1, a + h / 2)
            k3 = slope(y + h / 2 * k2, a + h / 2)
            k4 = slope(y + h * k3, b)
            y = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return alpha[-1] * y


def pndm(x, eps, abar, t, order):
    """Algorithms of PNDM: S-PNDM (order 2) or F-PNDM (order 4); eps(x, t), abar(t), times t [n + 1]."""

    def transfer(x, t, s, e):
        """Equation 11 of PNDM."""
        at, a = abar(t), abar(s)
        first = 1 / (np.sqrt(at) * (np.sqrt(at) + np.sqrt(a)))
        second = 1 / (np.sqrt(at) * (np.sqrt((1 - a) * at) + np.sqrt((1 - at) * a)))
        return x + (a - at) * (first * x - second * e)

    ets = []
    for now, then in zip(t[:-1], t[1:], strict=True):
        e = eps(x, now)
        ets.append(e)
        if order == 2 and len(ets) == 1:
            e = (e + eps(transfer(x, now, then, e), then)) / 2
        elif order == 2:
            e = (3 * ets[-1] - ets[-2]) / 2
        elif len(ets) <= 3:
            middle = (now + then) / 2
            e2 = eps(transfer(x, now, middle, e), middle)
            e3 = eps(transfer(x, now, middle, e2), middle)
            e4 = eps(transfer(x, now, then, e3), then)
            e = (e + 2 * e2 + 2 * e3 + e4) / 6
        else:
            e = (55 * ets[-1] - 59 * ets[-2] + 37 * ets[-3] - 9 * ets[-4]) / 24
        x = transfer(x, now, then, e)
    return x


def dpm_solver_v3(x, eps, alpha, sigma, index, lam, ell, s, b, order, p_pseudo, c_pseudo, corrects, lower_final):
    """Algorithm 1 of DPM-Solver-v3 with all integrals by trapezoids over the log-SNRs `lam` [K] of the statistics.

    index: [n + 1], where the levels of the run lie in `lam`. ell, s, b: [K, D].
    """

    def cumulative(exponent, values):
        v = np.exp(exponent) * values
        return np.concatenate([np.zeros_like(v[:1]), np.cumsum((v[1:] + v[:-1]) / 2 * np.diff(lam)[:, None], 0)])

    zero, one = np.zeros_like(ell), np.ones_like(ell)
    big_l, big_s = cumulative(zero, ell), cumulative(zero, s)
    i_of, b_of = cumulative(big_l + big_s, one), cumulative(-big_s, b)
    c_of = cumulative(big_l + big_s, b_of)

    def derivatives(nodes, g, pseudo):
        n = len(nodes) - 1
        if pseudo:
            table = [list(g)]
            for k in range(1, n + 1):
                last = table[-1]
                table.append([(last[j] - last[j + 1]) / (nodes[j] - nodes[j + k]) for j in range(n + 1 - k)])
            return [table[k][0] * math.factorial(k) for k in range(1, n + 1)]
        if not n:
            return []
        matrix = np.stack([(nodes[1:] - nodes[0]) ** k for k in range(1, n + 1)], 1)
        found = np.linalg.solve(matrix, (np.stack(g[1:]) - g[0]).reshape(n, -1)).reshape(n, *np.shape(g[0]))
        return [found[k - 1] * math.factorial(k) for k in range(1, n + 1)]

    def update(x, i, j, f, known, pseudo):
        """From run index i to j by f at run indices `known`, the first of which is i."""
        a, z = index[i], index[j]
        g = [np.exp(big_s[a] - big_s[index[k]]) * f[k] - np.exp(big_s[a]) * (b_of[index[k]] - b_of[a]) for k in known]
        out = alpha[j] / alpha[i] * np.exp(big_l[a] - big_l[z]) * x
        out = out - alpha[j] * np.exp(-big_l[z] - big_s[a]) * (i_of[z] - i_of[a]) * g[0]
        out = out - alpha[j] * np.exp(-big_l[z]) * (c_of[z] - c_of[a] - b_of[a] * (i_of[z] - i_of[a]))
        span = slice(a, z + 1)
        for k, d in enumerate(derivatives(lam[[index[m] for m in known]], g, pseudo), 1):
            v = np.exp((big_l + big_s)[span] - (big_l + big_s)[a])
            v = v * ((lam[span] - lam[a]) ** k / math.factorial(k))[:, None]
            e = ((v[1:] + v[:-1]) / 2 * np.diff(lam[span])[:, None]).sum(0)
            out = out - alpha[j] * np.exp(big_l[a] - big_l[z]) * e * d
        return out

    n, f, before, many = len(alpha) - 1, {}, None, 0
    for i in range(n):
        f[i] = (sigma[i] * eps(x, i) - ell[index[i]] * x) / alpha[i]
        wide = many + c_pseudo
        if corrects and wide > 1:
            x = update(before, i - 1, i, f, [i - 1, i, *range(i - 2, i - wide, -1)], c_pseudo)
        many = min(order, i + 1, n - i if lower_final else order)
        before, x = x, update(x, i, i + 1, f, list(range(i, i - many, -1)), p_pseudo)
    return x
