"""Exponential integrators written from the papers' algorithms and the authors' code, in numpy float64.

Everything is on a variance-preserving process, whose alpha and sigma follow from lambda = log(alpha/sigma) alone; a
model is a function (x, lambda) -> prediction. Steps go from lambda s to lambda t; None is the clean sample, sigma = 0.
"""

import numpy as np


def vp(lam):
    """alpha and sigma of lambda."""
    return 1 / np.sqrt(1 + np.exp(-2 * lam)), 1 / np.sqrt(1 + np.exp(2 * lam))


def dpm_solver_1(x, eps, s, t):
    """Lu et al. 2022 (DPM-Solver), equation 3.7, which is DDIM; eps is the prediction at x."""
    (a_s, s_s), (a_t, s_t) = vp(s), (1.0, 0.0) if t is None else vp(t)
    if t is None:
        return (x - s_s * eps) / a_s
    return a_t / a_s * x - s_t * np.expm1(t - s) * eps


def dpm_solver_2(x, model, s, t, r=0.5, taylor=False):
    """Algorithm 1 (DPM-Solver-2) with any r; taylor: the authors' solver type."""
    h, u = t - s, s + r * (t - s)
    (a_s, _), (a_u, s_u), (a_t, s_t) = vp(s), vp(u), vp(t)
    e_s = model(x, s)
    y = a_u / a_s * x - s_u * np.expm1(r * h) * e_s
    d = model(y, u) - e_s
    gain = (np.expm1(h) / h - 1) / r if taylor else np.expm1(h) / (2 * r)
    return a_t / a_s * x - s_t * np.expm1(h) * e_s - s_t * gain * d


def dpm_solver_3(x, model, s, t, r1=1 / 3, r2=2 / 3, taylor=False):
    """Algorithm 2 (DPM-Solver-3)."""
    h, u, v = t - s, s + r1 * (t - s), s + r2 * (t - s)
    (a_s, _), (a_u, s_u), (a_v, s_v), (a_t, s_t) = vp(s), vp(u), vp(v), vp(t)
    e_s = model(x, s)
    y = a_u / a_s * x - s_u * np.expm1(r1 * h) * e_s
    d1 = model(y, u) - e_s
    y = a_v / a_s * x - s_v * np.expm1(r2 * h) * e_s - s_v * r2 / r1 * (np.expm1(r2 * h) / (r2 * h) - 1) * d1
    d2 = model(y, v) - e_s
    out = a_t / a_s * x - s_t * np.expm1(h) * e_s
    phi2 = np.expm1(h) / h - 1
    if not taylor:
        return out - s_t / r2 * phi2 * d2
    first = (r2 * d1 / r1 - r1 * d2 / r2) / (r2 - r1)
    second = 2 * (d2 / r2 - d1 / r1) / (r2 - r1)
    return out - s_t * phi2 * first - s_t * (phi2 / h - 0.5) * second


def dpmpp_1(x, data, s, t):
    """Lu et al. 2022 (DPM-Solver++), equation 4.1; data is the prediction at x."""
    if t is None:
        return data
    (_, s_s), (a_t, s_t) = vp(s), vp(t)
    return s_t / s_s * x - a_t * np.expm1(s - t) * data


def dpmpp_2s(x, model, s, t, r=0.5, taylor=False):
    """Algorithm 1 of DPM-Solver++."""
    h, u = t - s, s + r * (t - s)
    (_, s_s), (a_u, s_u), (a_t, s_t) = vp(s), vp(u), vp(t)
    m_s = model(x, s)
    y = s_u / s_s * x - a_u * np.expm1(-r * h) * m_s
    m_u = model(y, u)
    if taylor:
        out = s_t / s_s * x - a_t * np.expm1(-h) * m_s
        return out + a_t * (np.expm1(-h) / h + 1) * (m_u - m_s) / r
    return s_t / s_s * x - a_t * np.expm1(-h) * ((1 - 1 / (2 * r)) * m_s + m_u / (2 * r))


def dpmpp_3s(x, model, s, t, r1=1 / 3, r2=2 / 3, taylor=False):
    """The authors' third-order single step on data predictions."""
    h, u, v = t - s, s + r1 * (t - s), s + r2 * (t - s)
    (_, s_s), (a_u, s_u), (a_v, s_v), (a_t, s_t) = vp(s), vp(u), vp(v), vp(t)
    m_s = model(x, s)
    y = s_u / s_s * x - a_u * np.expm1(-r1 * h) * m_s
    d1 = model(y, u) - m_s
    y = s_v / s_s * x - a_v * np.expm1(-r2 * h) * m_s + a_v * r2 / r1 * (np.expm1(-r2 * h) / (r2 * h) + 1) * d1
    d2 = model(y, v) - m_s
    out = s_t / s_s * x - a_t * np.expm1(-h) * m_s
    phi2 = np.expm1(-h) / h + 1
    if not taylor:
        return out + a_t / r2 * phi2 * d2
    first = (r2 * d1 / r1 - r1 * d2 / r2) / (r2 - r1)
    second = 2 * (d2 / r2 - d1 / r1) / (r2 - r1)
    return out + a_t * phi2 * first - a_t * (phi2 / h - 0.5) * second


def fast_orders(n, order):
    """Orders of the single steps of n evaluations (the authors' get_orders_and_timesteps_for_singlestep_solver)."""
    if order == 2:
        return [2] * (n // 2) + [1] * (n % 2)
    whole = n // 3
    return {0: [3] * (whole - 1) + [2, 1], 1: [3] * whole + [1], 2: [3] * whole + [2]}[n % 3]


def multistep(x, model, lams, data, order, taylor=False, lower_order_final=False):
    """The authors' multistep updates (DPM-Solver or, with data predictions, DPM-Solver++) through all of lams."""
    outputs, n = [], len(lams) - 1
    for i in range(1, n + 1):
        outputs.append(model(x, lams[i - 1]))
        p = min(order, i, n + 1 - i) if lower_order_final else min(order, i)
        s, t = lams[i - 1], lams[i]
        if t is None:
            x = dpmpp_1(x, outputs[-1], s, None) if data else dpm_solver_1(x, outputs[-1], s, None)
            continue
        h = t - s
        (a_s, s_s), (a_t, s_t) = vp(s), vp(t)
        # of the noise form phi_1 = e^h - 1, phi_2 = phi_1/h - 1, of the data form phi_1 = e^-h - 1, phi_2 = phi_1/h + 1
        if data:
            phi1 = np.expm1(-h)
            phi2 = phi1 / h + 1
            base, d1_gain, d2_gain, half = s_t / s_s * x - a_t * phi1 * outputs[-1], a_t * phi2, 0, -0.5 * a_t * phi1
            d2_gain = -a_t * (phi2 / h - 0.5)
        else:
            phi1 = np.expm1(h)
            phi2 = phi1 / h - 1
            base, d1_gain, half = a_t / a_s * x - s_t * phi1 * outputs[-1], -s_t * phi2, -0.5 * s_t * phi1
            d2_gain = -s_t * (phi2 / h - 0.5)
        if p == 1:
            x = base
            continue
        r0 = (s - lams[i - 2]) / h
        d10 = (outputs[-1] - outputs[-2]) / r0
        if p == 2:
            x = base + (d1_gain if taylor else half) * d10
            continue
        r1 = (lams[i - 2] - lams[i - 3]) / h
        d11 = (outputs[-2] - outputs[-3]) / r1
        x = base + d1_gain * (d10 + r0 / (r0 + r1) * (d10 - d11)) + d2_gain * (d10 - d11) / (r0 + r1)
    return x


def k_diffusion_multistep_sde(y, denoiser, sigma, noise, order, eta, heun):
    """k-diffusion's sample_dpmpp_2m_sde and sample_dpmpp_3m_sde on y = x0 + sigma eps; sigma [n + 1] ends at 0."""
    old, before = [], []
    for i in range(len(sigma) - 1):
        d = denoiser(y, sigma[i])
        if sigma[i + 1] == 0:
            y = d
            break
        h = np.log(sigma[i]) - np.log(sigma[i + 1])
        k = h * (eta + 1)
        y = np.exp(-k) * y - np.expm1(-k) * d
        if old and (order == 2 or len(old) == 1):
            r = before[-1] / h
            gain = (-np.expm1(-k) / -k + 1) if heun else -0.5 * np.expm1(-k)
            y = y + gain / r * (d - old[-1])
        elif old:
            r0, r1 = before[-1] / h, before[-2] / h
            d10, d11 = (d - old[-1]) / r0, (old[-1] - old[-2]) / r1
            phi2 = np.expm1(-k) / k + 1
            d1 = d10 + (d10 - d11) * r0 / (r0 + r1)
            y = y + phi2 * d1 - (phi2 / k - 0.5) * (d10 - d11) / (r0 + r1)
        y = y + noise[i] * sigma[i + 1] * np.sqrt(-np.expm1(-2 * h * eta))
        old.append(d)
        before.append(h)
    return y


def k_diffusion_dpmpp_sde(y, denoiser, sigma, brownian, eta, r):
    """k-diffusion's sample_dpmpp_sde; brownian(i, middle): the noise of step i, to its middle or to its end."""

    def ancestral(begin, end):
        up = min(end, eta * np.sqrt(end**2 * (begin**2 - end**2) / begin**2))
        return np.sqrt(end**2 - up**2), up

    for i in range(len(sigma) - 1):
        d = denoiser(y, sigma[i])
        if sigma[i + 1] == 0:
            y = d
            break
        s, t = -np.log(sigma[i]), -np.log(sigma[i + 1])
        middle = np.exp(-(s + (t - s) * r))
        down, up = ancestral(sigma[i], middle)
        y2 = down / sigma[i] * y - (down / sigma[i] - 1) * d + brownian(i, True) * up
        d2 = denoiser(y2, middle)
        down, up = ancestral(sigma[i], sigma[i + 1])
        mixed = (1 - 1 / (2 * r)) * d + d2 / (2 * r)
        y = down / sigma[i] * y - (down / sigma[i] - 1) * mixed + brownian(i, False) * up
    return y


def seeds(x, model, s, t, z, data, shares):
    """One step of SEEDS-1, -2 or -3 (Gonzalez et al. 2023); shares: where lambda is in the later evaluations.

    z [p]: independent noise of the stretches between the evaluations. The stochastic integral of a stretch from u to v
    is alpha_v sqrt(2) int e^-lambda dW for noise predictions and sigma_v^2/alpha_v sqrt(2) int e^lambda dW for data
    predictions, summed up from s.
    """
    at = [s, *(s + c * (t - s) for c in shares), t]
    integral, outputs = np.zeros_like(x), []
    start = x
    for k in range(len(at) - 1):
        outputs.append(model(x, at[k]))
        u, v = at[k], at[k + 1]
        (a_s, s_s), (a_v, s_v) = vp(s), vp(v)
        h, c = v - s, (v - s) / (t - s)
        rate = 2 if data else 1
        if data:
            integral = integral + np.sqrt(np.exp(2 * v) - np.exp(2 * u)) * z[k]
            x = s_v**2 * a_s / (s_s**2 * a_v) * start - a_v * np.expm1(-2 * h) * outputs[0] + s_v**2 / a_v * integral
        else:
            integral = integral + np.sqrt(np.exp(-2 * u) - np.exp(-2 * v)) * z[k]
            x = a_v / a_s * start - 2 * s_v * np.expm1(h) * outputs[0] + a_v * integral
        if k == 0:
            continue
        d = outputs[-1] - outputs[0]
        where = (u - s) / (t - s)
        if len(shares) == 1:
            x = x + (-a_v * np.expm1(-2 * h) / (2 * where) if data else -s_v * np.expm1(h) / where) * d
        else:
            phi = np.expm1(-rate * h) / (rate * h) + 1 if data else np.expm1(h) / h - 1
            x = x + c / where * (a_v * phi if data else -2 * s_v * phi) * d
    return x


def scire(x, model, s, t, phi, shares):
    """One step of SciRE-Solver-2 or -3 (the authors' scire_v1), in rho = sigma/alpha; shares: of rho."""
    rho_s, rho_t = np.exp(-s), np.exp(-t)
    y, h = x / vp(s)[0], rho_t - rho_s
    at = [rho_s + r * h for r in shares]
    e_s = model(x, s)

    def evaluate(y, rho):
        return model(vp(-np.log(rho))[0] * y, -np.log(rho))

    e_1 = evaluate(y + shares[0] * h * e_s, at[0])
    if len(shares) == 1:
        end = y + h * e_s + 0.5 / shares[0] / phi * h * (e_1 - e_s)
    else:
        r1, r2 = shares
        e_2 = evaluate(y + r2 * h * e_s + 0.5 * r2 / r1 / phi * h * (e_1 - e_s), at[1])
        end = y + h * e_s + 0.5 / r2 / phi * h * (e_2 - e_s)
    return vp(t)[0] * end


def scire_phis(n):
    """The authors' phi_1(m) of n steps: sums of 1 - 1/2! + 1/3! - ... from three terms on, to the middle and back."""
    sums, total, factorial = [], 0.0, 1.0
    for k in range(1, n + 3):
        factorial *= k
        total += (-1) ** (k - 1) / factorial
        sums.append(total)
    sums = sums[2:]
    chosen = []
    for j in range(n):
        if j < n // 2:
            chosen.append(sums[2 * j])
        else:
            chosen.append(sums[-1] if j == n // 2 else sums[2 * (n - j) - 1])
    return chosen


def pfdiff(x, eps, lams, k, l):  # noqa: E741
    """Wang et al. 2024, algorithm 1, with DDIM; (x at the end, how many evaluations)."""
    past = eps(x, lams[0])
    x, i, count, n = dpm_solver_1(x, past, lams[0], lams[1]), 1, 1, len(lams) - 1
    while i < n:
        skip = min(k, n - i - 1)
        count += 1
        if skip == 0:
            past = eps(x, lams[i])
        else:
            to = i + min(l, skip)
            past = eps(dpm_solver_1(x, past, lams[i], lams[to]), lams[to])
        x = dpm_solver_1(x, past, lams[i], lams[i + skip + 1])
        i += skip + 1
    return x, count


def adaptive(x, model, start, end, order, first, atol, rtol, theta, data=False):
    """DPM-Solver-12 or -23 (the authors' dpm_solver_adaptive) of one sample; (x at the end, evaluations, rejections).

    A rejected step's first evaluation is made once: of `order` evaluations a step, order - 1 are made again.
    """
    two, three = (dpmpp_2s, dpmpp_3s) if data else (dpm_solver_2, dpm_solver_3)
    one = dpmpp_1 if data else dpm_solver_1
    lam, h, before, count, rejected = start, min(first, end - start), x, 0, 0
    while lam < end - 1e-5:
        t = lam + h
        if order == 2:
            lower, higher = one(x, model(x, lam), lam, t), two(x, model, lam, t)
        else:
            lower, higher = two(x, model, lam, t, 1 / 3), three(x, model, lam, t)
        delta = np.maximum(atol, rtol * np.maximum(np.abs(lower), np.abs(before)))
        error = np.sqrt(np.mean(((higher - lower) / delta) ** 2))
        count += order
        if error <= 1:
            x, lam, before = higher, t, lower
        else:
            rejected += 1
        h = min(theta * h * error ** (-1 / order), end - lam)
    return x, count - rejected, rejected
