"""The head of GENIE, distilled: fitted to the exact derivative along the flow of the model's own samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from difax.accel.solvers.genie import FREQUENCIES, apply_head, genie, mixed, patch_of
from difax.core.drive import per_sample
from difax.core.guidance import mix_halves
from difax.core.process import Process, predict
from difax.core.sample import rounded
from difax.core.trunk import neutral, nothing, reference_attention, run_trunk

HELD = 10  # of so many batches one is not seen by the fit


def fit(
    sampler: Any,
    samples: int,
    batch: int,
    progress: Callable[[str], None],
    *,
    nodes: int = 10,
    width: int = 128,
    steps: int = 2000,
    rate: float = 1e-3,
    reach: float = 0.0,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Fits a head to the run's model, conditions, guidance and process.

    Samples go down the flow by exact second-order steps over `nodes` times, jittered anew for each batch; at each the
    tokens, the prediction and the exact d' are recorded. Then Adam on E u^2 (head - d')^2, the paper's loss, with the
    last layer zero to begin with, so that what is learned starts from DDIM.

    Args:
      sampler: `difax.study.calibrate.Sampler`: run (a `Setup`), params, inputs(start, n), scale().
      samples, batch: to draw, two batches or more, and at a time. progress: is told a line.
      nodes: evaluations that are recorded of each sample, 2 ... 1000 (10).
      width: of the head's hidden layer, 1 ... 4096 (128).
      steps, rate: of Adam, 1 ... 1e6, and 1e-6 ... 1, falling to 0 as a cosine (2000 and 1e-3). seed: of the fit.
      reach: over which the derivative is taken, in the time of the process, 0 ... 0.5. 0, the paper's, is the exact
        one; above, the change of d on the flow's own way from t to t - reach over that of u: what a step of about that
        length needs of a network that is not smooth in its time (`difax.accel.solvers.genie`).

    Returns:
      The arrays of an .npz file for `genie`: the head's, `flow` (its space, 1 or 0), and `error`: the loss on batches
      that the fit does not see, over that of no head at all.

    Raises:
      ValueError: a setting out of range, a guidance but none or cfg, or a run whose tokens are no squares of images.
    """
    ranges = {"nodes": (nodes, 2, 1000), "width": (width, 1, 4096), "steps": (steps, 1, 10**6), "rate": (rate, 1e-6, 1)}
    for key, (value, low, high) in {**ranges, "reach": (reach, 0, 0.5)}.items():
        if not low <= value <= high:
            raise ValueError(f"genie: {key}={value}; allowed: {low} ... {high}")
    if samples < 2 * batch:
        raise ValueError(f"genie: {samples} samples, {batch} at a time; allowed: two batches or more")
    if sampler.run.described.get("guide", "none") not in ("none", "cfg"):
        raise ValueError(f"genie: guide {sampler.run.described['guide']}; allowed: none, cfg")
    rng, record = np.random.default_rng(seed), jax.jit(recorder(sampler.run, reach))
    batches = []
    for start in range(0, samples - batch + 1, batch):
        x, _, cond = sampler.inputs(start, batch)
        rows = rounded(genie().grid(sampler.run.process, jittered(sampler.run.process, nodes, rng)))
        batches.append(jax.device_get(record(sampler.params, x, cond, rows, sampler.scale())))
        progress(f"recorded {start + batch} of {samples} samples")
    held = max(1, len(batches) // HELD)
    seen, unseen = (jax.tree.map(lambda *a: np.concatenate(a), *part) for part in (batches[held:], batches[:held]))
    optimiser = optax.adam(optax.cosine_decay_schedule(rate, steps))
    head = started(seen, width, rng)
    state = optimiser.init(head)

    @jax.jit
    def update(head, state, some):
        value, slope = jax.value_and_grad(loss)(head, some)
        change, state = optimiser.update(slope, state)
        return optax.apply_updates(head, change), state, value

    for i in range(steps):
        at = rng.integers(0, len(seen["u"]), batch)
        head, state, value = update(head, state, {name: a[at] for name, a in seen.items()})
        if i % max(1, steps // 10) == 0:
            progress(f"step {i}: loss {float(value):.5f}")
    measure = jax.jit(loss)
    parts = [{n: a[i : i + batch] for n, a in unseen.items()} for i in range(0, len(unseen["u"]), batch)]
    left = np.mean([float(measure(head, part)) for part in parts])
    error = left / np.mean([float(measure(jax.tree.map(jnp.zeros_like, head), part)) for part in parts])
    progress(f"on batches that were not seen, {error:.3f} of the loss without a head is left")
    flow = np.float32(sampler.run.process.name in ("flow", "sit"))
    return {
        **{k: np.asarray(v) for k, v in head.items()},
        "flow": np.asarray(flow),
        "error": np.asarray(error, np.float32),
    }


def recorder(run: Any, reach: float = 0.0) -> Callable[..., dict[str, jax.Array]]:
    """(params, x, cond, rows, scale) -> what a head sees and should say along the flow, leaves lead with [E B]."""
    model, process, guided = run.model, run.process, run.guide.halves == 2

    def network(params, x, time, cond):
        tokens, context = model.embed(params, x, time, cond)
        tokens, _, _ = run_trunk(model, params, tokens, context, neutral(), reference_attention(), nothing(model), None)
        output = model.head(params, tokens, context)
        return model.hidden(tokens), output.astype(jnp.float32)

    def record(params, x, cond, rows, scale):
        channels, null = x.shape[-1], model.null(cond)

        def predicted(x, t):
            time = process.model_time(t)
            hidden, output = network(params, x, time, cond)
            whole = output
            if guided:
                whole = mix_halves(output, network(params, x, time, null)[1], scale, channels, None)
            level = jax.tree.map(lambda a: per_sample(a, x.ndim), process.level(t, jnp))
            found = predict(whole, run.prediction, model.learn_sigma, x, level)
            return (found.x0, found.eps), (hidden, output[..., :channels])

        def body(x, row):
            c, t = row.coefficients, jnp.broadcast_to(row.t, x.shape[:1])
            (x0, eps), along, (hidden, output) = jax.linearize(predicted, x, t, has_aux=True)
            d = eps - c.flow * x0
            if reach:
                change = secant(lambda x, t: predicted(x, t)[0], process, x, t, d, c.flow, reach)
            else:
                dx0, deps = along(c.dx_x0 * x0 + c.dx_eps * eps, jnp.broadcast_to(c.dt, t.shape))
                change = deps - c.flow * dx0
            every = lambda a: jnp.broadcast_to(a, (len(x), *jnp.shape(a)))  # noqa: E731
            seen = {"x": x, "time": process.model_time(t), "hidden": hidden, "output": output, "change": change}
            seen |= {"u": every(-1 / c.mix[0]), "mix": every(c.mix)}
            return c.x * x + c.first * d + c.second * change, seen

        _, seen = jax.lax.scan(body, x, rows._replace(plan=(), guide=()))
        return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), seen)

    return record


def secant(predicted: Any, process: Process, x: Any, t: Any, d: Any, flow: Any, reach: float) -> jax.Array:
    """(d(t') - d(t))/(u' - u), t' = t - reach or the process's t_min, at the point that a midpoint step leads to.

    Args:
      predicted: (x, t) -> (x0, eps). t: [B]. d: at x and t. flow: 1 or 0, the space of `genie`.
    """

    def coordinates(t):
        level = jax.tree.map(lambda a: per_sample(a, x.ndim), process.level(t, jnp))
        scale = level.alpha + flow * level.sigma
        return level.sigma / scale, scale

    def slope(x, t):
        x0, eps = predicted(x, t)
        return eps - flow * x0

    end = jnp.maximum(t - reach, jnp.minimum(t, process.t_min))
    (u, scale), (u_half, scale_half), (u_end, scale_end) = map(coordinates, (t, 0.5 * (t + end), end))
    half = scale_half * (x / scale + (u_half - u) * d)
    there = scale_end * (x / scale + (u_end - u) * slope(half, 0.5 * (t + end)))
    far = u_end < u
    return jnp.where(far, (slope(there, end) - d) / jnp.where(far, u_end - u, -1.0), 0.0)


def loss(head: dict[str, Any], seen: dict[str, jax.Array]) -> jax.Array:
    """E u^2 (head - d')^2."""
    parts = apply_head(head, seen["x"], seen["time"], seen["hidden"], seen["output"])
    mix = seen["mix"][:, None, None, None]
    weight = per_sample(seen["u"], parts.ndim)
    return jnp.mean((weight * (mixed(parts, mix) - seen["change"])) ** 2)


def started(seen: dict[str, np.ndarray], width: int, rng: np.random.Generator) -> dict[str, jax.Array]:
    """A head whose last layer is zero."""
    shape = seen["x"].shape
    pixels = patch_of(shape, seen["hidden"].shape[1]) ** 2 * shape[-1]
    inputs = seen["hidden"].shape[-1] + 2 * pixels + 2 * FREQUENCIES
    return {
        "in/kernel": jnp.asarray(rng.normal(size=(inputs, width)) / np.sqrt(inputs), jnp.float32),
        "in/bias": jnp.zeros(width),
        "out/kernel": jnp.zeros((width, 3 * pixels)),
        "out/bias": jnp.zeros(3 * pixels),
    }


def jittered(process: Process, n: int, rng: np.random.Generator) -> np.ndarray:
    """Times [n + 1] from t_max to 0, one in each of n equal stretches; the first is t_max where it is 1."""
    edges = np.linspace(process.t_max, process.t_min, n + 1)
    times = edges[:-1] + rng.uniform(0, 1, n) * np.diff(edges)
    return np.append(times, 0.0)
