"""Training losses of diffusion models, flows and classifiers. Images arrive as uint8 and are scaled to [-1, 1] here."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from difax.core.contracts import Classifier, Level, Model
from difax.core.grids import shift_time
from difax.core.ops import narrowed, trainable
from difax.core.process import (
    Process,
    convert,
    learned_log_variance,
    split_variance,
    target,
)
from difax.core.trunk import forward

Loss = Callable[..., tuple[jax.Array, dict[str, jax.Array]]]


def scale_image(image: jax.Array) -> jax.Array:
    """uint8 [0, 255] -> float32 [-1, 1]."""
    return image.astype(jnp.float32) / 127.5 - 1.0


def flow_loss(
    model: Model,
    process: Process,
    prediction: str = "velocity",
    *,
    times: str = "logit_normal",
    label_dropout: float = 0.1,
    unroll: int | bool = True,
) -> Loss:
    """Mean squared error of the prediction at continuous times.

    L = E |f(x_t, t, y) - target|^2, x_t = alpha x0 + sigma eps; t ~ U(0, 1), or sigmoid of a standard normal; then
    shifted by the process.

    Args:
      model, process, prediction: the network, its process and what it predicts (velocity for a flow).
      times: "uniform" or "logit_normal" (the latter in SD3).
      label_dropout: probability in [0, 1] that a label becomes the null label (0.1).
      unroll: of the scan over blocks; gradients on CPU are faster with the blocks written out.

    Returns:
      loss(params, batch {"image", "label"}, key) -> (loss, metrics).

    References: Lipman et al., Flow Matching, 2022, arXiv:2210.02747; Esser et al. (SD3), 2024, arXiv:2403.03206.
    """
    if times not in ("uniform", "logit_normal"):
        raise ValueError(f"flow loss: times={times!r}; allowed: uniform, logit_normal")
    _check_scalar("flow", process)
    if model.learn_sigma:
        raise ValueError("flow loss: model has learn_sigma=True; allowed: False (a flow has no learned variance)")
    _check(label_dropout, unroll)

    def loss(params: Any, batch: Any, key: jax.Array):
        time_key, noise_key, drop_key = jax.random.split(key, 3)
        x0 = scale_image(batch["image"])
        if times == "uniform":
            t = jax.random.uniform(time_key, x0.shape[:1], x0.dtype)
        else:
            t = jax.nn.sigmoid(jax.random.normal(time_key, x0.shape[:1], x0.dtype))
        t = shift_time(t, process.shift)
        eps = jax.random.normal(noise_key, x0.shape, x0.dtype)
        level = _like(process.level(t, jnp), x0)
        cond = _drop_labels(model, batch["label"], label_dropout, drop_key)
        x = level.alpha * x0 + level.sigma * eps
        output = forward(model, trainable(params), x, process.model_time(t), cond, unroll=unroll).astype(jnp.float32)
        mse = jnp.mean((output - target(prediction, x0, eps, level)) ** 2)
        return mse, {"mse": mse}

    return loss


def ddpm_loss(
    model: Model,
    process: Process,
    prediction: str = "eps",
    *,
    label_dropout: float = 0.1,
    unroll: int | bool = True,
    skip_weight: float = 0.0,
    skip: int = 100,
) -> Loss:
    """Mean squared error at uniform discrete steps, plus the variational bound where the variance is learned.

    L = E |f(x_k, k, y) - target|^2 + (T/1000) L_vlb, where L_vlb (bits per dimension) sees the mean with its
    gradient stopped, so that it trains the variance alone: KL(q(x_{k-1} | x_k, x0) || p), and at k = 0 the
    discretised likelihood of the 8-bit image.

    With a skip weight w the first part becomes (1 - w) E |f - target|^2 + w L_skip: the squared distance between where
    a DDIM step over `skip` steps at once lands, and where it should,

      L_skip = E |(alpha_j x0' + sigma_j eps') - (alpha_j x0 + sigma_j eps)|^2,    j = k - skip, or clean data
             = E (alpha_j - sigma_j alpha_k/sigma_k)^2 |x0' - x0|^2.

    Args:
      model, process, prediction: the network, its discrete process and what it predicts (eps in the paper).
      label_dropout: probability in [0, 1] that a label becomes the null label (0.1).
      unroll: of the scan over blocks.
      skip_weight: w in [0, 1] (0, which is the loss without it). skip: steps of the process that one step of sampling
        goes, 1 ... T (100).

    Returns:
      loss(params, batch {"image", "label"}, key) -> (loss, metrics).

    References: Ho et al. 2020, arXiv:2006.11239; Nichol & Dhariwal 2021, arXiv:2102.09672 (L_hybrid, RESCALED_MSE);
      Wang & Li, S2-DMs: Skip-Step Diffusion Models, 2024, arXiv:2401.01520, from which the balance of the two losses is
      known, tau = 1 - w. Their L_skip could not be read: what stands here is our reading of a loss of the skipped step.
    """
    _check_scalar("ddpm", process)
    if process.steps is None:
        raise ValueError(f"ddpm loss needs a process of discrete steps; {process.name} is continuous")
    if process.steps < 2:
        raise ValueError(f"ddpm loss: {process.name} has steps={process.steps}; allowed: 2 or more")
    _check(label_dropout, unroll)
    steps = process.steps
    if not 0 <= skip_weight <= 1:
        raise ValueError(f"ddpm loss: skip_weight={skip_weight}; allowed: 0 ... 1")
    if not 1 <= skip <= steps and skip_weight:
        raise ValueError(f"ddpm loss: skip={skip}; allowed: 1 ... {steps}, the steps of {process.name}")
    tables = _posterior_tables(process)
    if skip_weight:
        tables["landing"] = _landing(process, skip)

    def loss(params: Any, batch: Any, key: jax.Array):
        step_key, noise_key, drop_key = jax.random.split(key, 3)
        x0 = scale_image(batch["image"])
        k = jax.random.randint(step_key, x0.shape[:1], 0, steps, jnp.int32)
        at = {name: _like(jnp.asarray(table)[k], x0) for name, table in tables.items()}
        level = Level(at["alpha"], at["sigma"], at["alpha_dot"], at["sigma_dot"])
        eps = jax.random.normal(noise_key, x0.shape, x0.dtype)
        cond = _drop_labels(model, batch["label"], label_dropout, drop_key)
        x = level.alpha * x0 + level.sigma * eps
        output = forward(model, trainable(params), x, k.astype(jnp.float32), cond, unroll=unroll).astype(jnp.float32)
        main, variance = split_variance(output, model.learn_sigma)
        mse = jnp.mean((main - target(prediction, x0, eps, level)) ** 2)
        metrics, total = {"mse": mse}, mse
        if skip_weight:
            jumped = jnp.mean((at["landing"] * (convert(main, prediction, x, level)[0] - x0)) ** 2)
            total, metrics = (1 - skip_weight) * mse + skip_weight * jumped, {"mse": mse, "skip": jumped}
        if variance is None:
            return total, metrics
        predicted, _ = convert(jax.lax.stop_gradient(main), prediction, x, level)
        vlb = jnp.mean(_vlb(x0, x, predicted, variance, k, at))
        return total + vlb * steps / 1000.0, {**metrics, "vlb": vlb}

    return loss


def hsm_loss(
    model: Model,
    process: Process,
    prediction: str = "eps",
    *,
    t_min: float = 1e-5,
    label_dropout: float = 0.1,
    unroll: int | bool = True,
) -> Loss:
    """Hybrid score matching of a process of position and velocity (`cld`): the first velocities are averaged out.

    L = E |f_v(u_t, t, y) - target|^2, u_t = (x, v) of x0 alone; t ~ U(t_min, 1). Of the output the velocity's half
    alone is trained, which says all of the noise (of a prediction of x0, the position's half).

    Args:
      model, process, prediction: the network, of twice the channels of the images; its process; and what it predicts:
        eps, as in the paper's reweighted loss, x0 or score.
      t_min: smallest time, above 0, below 1 (1e-5).
      label_dropout: probability in [0, 1] that a label becomes the null label (0.1).
      unroll: of the scan over blocks.

    Returns:
      loss(params, batch {"image", "label"}, key) -> (loss, metrics).

    References: Dockhorn et al. 2021, arXiv:2112.07068, section 3.2, appendix B ("reweightedv2" in the authors' code).
    """
    if process.augmented is None:
        raise ValueError(f"hsm loss: process {process.name} has no velocities; allowed: cld, or loss flow or ddpm")
    if model.learn_sigma:
        raise ValueError("hsm loss: model has learn_sigma=True; allowed: False")
    if not 0 < t_min < 1:
        raise ValueError(f"hsm loss: t_min={t_min}; allowed: above 0, below 1")
    _check(label_dropout, unroll)
    own = process.augmented

    def loss(params: Any, batch: Any, key: jax.Array):
        time_key, noise_key, drop_key = jax.random.split(key, 3)
        x0 = scale_image(batch["image"])
        t = jax.random.uniform(time_key, x0.shape[:1], x0.dtype, t_min, 1.0)
        level = _like(process.level(t, jnp), x0)
        e_x, e_v = jax.random.normal(noise_key, (2, *x0.shape), x0.dtype)
        x = level.alpha * x0 + level.sigma * e_x
        v = level.alpha_v * x0 + level.cross * e_x + level.sigma_v * e_v
        u, eps = jnp.concatenate([x, v], -1), jnp.concatenate([e_x, e_v], -1)
        cond = _drop_labels(model, batch["label"], label_dropout, drop_key)
        output = forward(model, trainable(params), u, process.model_time(t), cond, unroll=unroll).astype(jnp.float32)
        half = jnp.split(output, 2, -1)[0 if prediction == "x0" else 1]
        mse = jnp.mean((half - own.target(prediction, x0, eps, u, level)) ** 2)
        return mse, {"mse": mse}

    return loss


def cross_entropy(model: Classifier, *, label_smoothing: float = 0.0, flip: float = 0.0, shift: int = 0) -> Loss:
    """Cross entropy of a classifier, on images that are moved and mirrored at random.

    L = -E sum_c q_c log softmax(logits)_c with q = (1 - s) onehot(label) + s/C.

    Args:
      model: the classifier.
      label_smoothing: s in [0, 1) (0).
      flip: probability in [0, 1] of a left-right mirror image (0).
      shift: largest move in pixels, each way; the gap is filled with 0, black (0).

    Returns:
      loss(params, batch {"image", "label"}, key) -> (loss, metrics), with the accuracy on the batch.

    References: Szegedy et al., Rethinking the Inception Architecture, 2015, arXiv:1512.00567 (label smoothing).
    """
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing={label_smoothing}; allowed: 0 <= label_smoothing < 1")
    if not 0 <= flip <= 1:
        raise ValueError(f"flip={flip}; allowed: 0 ... 1")
    if not 0 <= shift < min(model.input_shape[:2]):
        raise ValueError(f"shift={shift}; allowed: 0 ... {min(model.input_shape[:2]) - 1}")

    def loss(params: Any, batch: Any, key: jax.Array):
        image = scale_image(_augment(batch["image"], key, flip, shift))
        weights = trainable(params)
        logits = model.logits(weights, model.features(weights, image))
        onehot = jax.nn.one_hot(batch["label"], model.classes, dtype=logits.dtype)
        target_BC = (1 - label_smoothing) * onehot + label_smoothing / model.classes
        value = -jnp.mean(jnp.sum(target_BC * jax.nn.log_softmax(logits), axis=-1))
        return value, {"accuracy": jnp.mean(jnp.argmax(logits, -1) == batch["label"])}

    return loss


def _augment(image: jax.Array, key: jax.Array, flip: float, shift: int) -> jax.Array:
    """Mirrors each image [B, H, W, C] with probability `flip` and moves it by up to `shift` pixels each way."""
    flip_key, shift_key = jax.random.split(key)
    if flip:
        mirrored = jax.random.bernoulli(flip_key, jnp.float32(flip), (len(image), 1, 1, 1))
        image = jnp.where(mirrored, image[:, :, ::-1], image)
    if shift:
        padded = jnp.pad(image, ((0, 0), (shift, shift), (shift, shift), (0, 0)))
        corner = jax.random.randint(shift_key, (len(image), 2), 0, 2 * shift + 1, jnp.int32)
        crop = lambda one, at: jax.lax.dynamic_slice(one, (*at, jnp.int32(0)), image.shape[1:])  # noqa: E731
        image = jax.vmap(crop)(padded, corner)
    return image


LOSSES = {"flow": flow_loss, "ddpm": ddpm_loss, "hsm": hsm_loss, "cross_entropy": cross_entropy}


def _posterior_tables(process: Process) -> dict[str, np.ndarray]:
    assert process.steps is not None
    t = np.arange(process.steps + 1) / process.steps
    level, before = process.level(t[1:]), process.level(t[:-1])
    a = level.alpha / before.alpha
    beta = level.sigma**2 - a**2 * before.sigma**2
    tilde = beta * before.sigma**2 / level.sigma**2
    tilde[0] = tilde[1]  # the clean image's posterior has no width
    tables = {
        **level._asdict(),
        "mean_x": a * before.sigma**2 / level.sigma**2,
        "mean_x0": before.alpha * beta / level.sigma**2,
        "log_beta": np.log(beta),
        "log_beta_tilde": np.log(tilde),
    }
    return {name: np.asarray(table, np.float32) for name, table in tables.items()}


def _landing(process: Process, skip: int) -> np.ndarray:
    """By how much an error of x0 at each step moves where a DDIM step over so many steps lands, [T]."""
    assert process.steps is not None
    k = np.arange(1, process.steps + 1)
    level, end = process.level(k / process.steps), process.level(np.maximum(k - skip, 0) / process.steps)
    return np.asarray(end.alpha - end.sigma * level.alpha / level.sigma, np.float32)


def _vlb(x0, x, predicted, variance, k, at) -> jax.Array:
    """Per-element terms of the variational bound in bits: KL for k > 0, decoder likelihood at k = 0."""
    log_variance = learned_log_variance(variance, at["log_beta"], at["log_beta_tilde"])
    mean = at["mean_x"] * x + at["mean_x0"] * predicted
    true = at["mean_x"] * x + at["mean_x0"] * x0
    ratio = at["log_beta_tilde"] - log_variance
    kl = 0.5 * (-1.0 - ratio + jnp.exp(ratio) + (true - mean) ** 2 * jnp.exp(-log_variance))
    nll = -_discretised_log_likelihood(x0, mean, 0.5 * log_variance)
    return jnp.where(_like(k, x0) == 0, nll, kl) / math.log(2.0)


def _discretised_log_likelihood(x0, mean, log_std) -> jax.Array:
    """log of the mass that N(mean, std^2) gives to the bin x0 +- 1/255 of an 8-bit x0; bins at -1 and 1 are open."""
    centred, inverse = x0 - mean, jnp.exp(-log_std)

    def log_mass(upper, lower):
        return jnp.log(jnp.maximum(upper - lower, 1e-12))

    cdf = jax.scipy.stats.norm.cdf
    side = -jnp.abs(centred)  # by symmetry; near 1 the difference of two values of the cdf has no digits left
    inner = log_mass(cdf(inverse * (side + 1 / 255)), cdf(inverse * (side - 1 / 255)))
    low = log_mass(cdf(inverse * (centred + 1 / 255)), 0.0)
    high = log_mass(cdf(-inverse * (centred - 1 / 255)), 0.0)
    return jnp.where(x0 < -0.999, low, jnp.where(x0 > 0.999, high, inner))


def _drop_labels(model: Model, label: jax.Array, rate: float, key: jax.Array) -> jax.Array:
    dropped = jax.random.bernoulli(key, jnp.float32(rate), label.shape)
    return jnp.where(dropped, model.null(label), label)


def _like(value: Any, x: jax.Array) -> Any:
    """Numbers [B] beside x [B, ...], in the precision of x where jax has 64 bits."""
    return jax.tree.map(lambda a: a.reshape(-1, *([1] * (x.ndim - 1))), narrowed(value, x.dtype))


def _check_scalar(name: str, process: Process) -> None:
    if process.augmented is not None:
        raise ValueError(f"{name} loss: process {process.name} has positions and velocities; allowed: loss hsm")


def _check(rate: float, unroll: int | bool) -> None:
    if not 0 <= rate <= 1:
        raise ValueError(f"label_dropout={rate}; allowed: 0 ... 1")
    if unroll is not False and not 1 <= unroll <= 1000:
        raise ValueError(f"unroll={unroll}; allowed: true, false, or blocks at once, 1 ... 1000")
