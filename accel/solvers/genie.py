"""GENIE. Dockhorn, Vahdat & Kreis, Higher-Order Denoising Diffusion Solvers, 2022, arXiv:2210.05475."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from difax.accel.caches.measured import source
from difax.core.annotations import checked
from difax.core.arrays import check_finite, read_arrays
from difax.core.contracts import Array, Solver
from difax.core.files import place_of
from difax.core.grids import check_times, lay_rows
from difax.core.process import Process

SPACES = ("sigma", "flow")
FREQUENCIES = 16  # of the head's time features, each a sine and a cosine
HEAD = ("in/kernel", "in/bias", "out/kernel", "out/bias")  # arrays of a file


class GenieTable(NamedTuple):
    """x_s = x x_t + first d + second d', d = eps - flow x0, and the direction of the flow in terms of u:
    dx = dx_x0 x0 + dx_eps eps, dt; mix: what the head's three parts are multiplied by."""

    x: Array
    first: Array
    second: Array
    flow: Array
    dx_x0: Array
    dx_eps: Array
    dt: Array
    mix: Array


@checked
def genie(space: str | None = None, file: str | None = None) -> Solver:
    """Second-order truncated Taylor step along the flow of DDIM, one evaluation a step.

    space "sigma": y = x/alpha, u = sigma/alpha, d = dy/du = eps, as in the paper (their gamma is u);
    space "flow":  y = x/(alpha + sigma), u = sigma/(alpha + sigma), d = eps - x0, where alpha may be 0;

      y_s = y_t + h d + (h^2/2) d',   d' = dd/du along the flow, h = u_s - u_t.

    A last step that ends at sigma = 0 is of first order. Without a file d' is exact, by forward differentiation of the
    network (with its guidance), which about doubles an evaluation's cost. A network need not be smooth in the time that
    it is told: one that hears it through waves shorter than a step (sin(1000 t), as Diffusion Transformers do) has a
    derivative that says nothing of the change over a step, and then this is worse than DDIM. With a file d' is what a
    small head on the network's last tokens says,

      d' = -k1/u + u k2/(1 + u^2) + k3/(u (1 + u^2)),

    of the conditional half alone where there is guidance: the head is fitted for the guided derivative.

    Args:
      space: "sigma", "flow", or None: flow for the flow processes, sigma for the others.
      file: .npz of a head (`difax.accel.fit.genie`), for the model and the space that it was fitted on.

    Raises:
      ValueError: unknown space, a file that holds no head; from `grid`, space "sigma" with a time where alpha = 0.

    References: Dockhorn et al. 2022, equations 9, 10 and 13. Their head is a residual block of convolutions of the
      images, eps and the features of a U-Net; here it is a layer of products over each token. Their last step ends at
      t = 1e-3, with or without another to 0, of first order here.
    """
    if space not in (*SPACES, None):
        raise ValueError(f"genie: space={space!r}; allowed: {', '.join(SPACES)}, or None")
    head = None if file is None else read_head(file)

    def grid(process: Process, times: np.ndarray):
        check_times(times)
        level = process.level(times)
        flow = process.name in ("flow", "sit") if space is None else space == "flow"
        if not flow and np.any(level.alpha <= 0):
            raise ValueError(
                f"genie: space 'sigma' divides by alpha, which is 0 at t={times[np.argmin(level.alpha)]:g} "
                f"of {process.name}; allowed: space 'flow', or a grid such as karras or log_snr"
            )
        if head is not None and bool(head["flow"]) != flow:
            fitted = SPACES[int(head["flow"])]
            raise ValueError(f"genie: file={file!r} is of space {fitted}; allowed: that of {process.name}, or space")
        scale = level.alpha + level.sigma if flow else level.alpha
        u, start = level.sigma / scale, times[:-1]
        h, end, at = np.diff(u), scale[1:], process.level(start)
        slope = (at.sigma_dot * at.alpha - at.sigma * at.alpha_dot) / scale[:-1] ** 2  # of u, along the slopes' time
        rate = clock_rate(process)
        table = GenieTable(
            x=end / scale[:-1],
            first=end * h,
            second=np.where(level.sigma[1:] > 0, end * h**2 / 2, 0.0),
            flow=np.full(len(h), float(flow)),
            dx_x0=at.alpha_dot / slope,
            dx_eps=at.sigma_dot / slope,
            dt=1 / (rate * slope),
            mix=mixing(u[:-1]),
        )
        return lay_rows(process, start, np.arange(len(h)), table)

    def step(prediction, x, state, row, keys):
        c = row.coefficients
        d = prediction.eps - c.flow * prediction.x0
        if head is None:
            dx0, deps = prediction.jvp(c.dx_x0 * prediction.x0 + c.dx_eps * prediction.eps, c.dt)
            change = deps - c.flow * dx0
        else:
            change = mixed(prediction.extra, c.mix)
        return c.x * x + c.first * d + c.second * change, state

    said = None if head is None else lambda x, time, hidden, output: apply_head(head, x, time, hidden, output)
    return Solver(grid, lambda x: (), step, derivatives=head is None, head=said)


def clock_rate(process: Process) -> float:
    """How much of the time that the slopes of a process go by passes in one of t; every process has it even."""
    t, d = np.array([0.36951]), 1e-5  # between the steps of a discrete one
    return float((process.level(t + d).sigma - process.level(t - d).sigma)[0] / (2 * d * process.level(t).sigma_dot[0]))


def mixing(u: np.ndarray) -> np.ndarray:
    """[n, 3], what k1, k2 and k3 are multiplied by at u [n]."""
    return np.stack([-1 / u, u / (1 + u**2), 1 / (u * (1 + u**2))], -1)


def mixed(parts: jax.Array, mix: jax.Array) -> jax.Array:
    """The derivative [B, ..., C] of a head's three parts [B, ..., 3C]."""
    first, second, third = jnp.split(parts, 3, -1)
    return mix[..., 0] * first + mix[..., 1] * second + mix[..., 2] * third


def apply_head(head: Mapping[str, Any], x: jax.Array, time: jax.Array, hidden: jax.Array, output: jax.Array) -> Any:
    """k1, k2, k3 of every pixel: one hidden layer over each token, its patches of x and of the prediction, and time.

    Args:
      x: [B, H, W, C]; time: [B], the model's; hidden: [B, N, D] behind the last block; output: [B, H, W, C or more].

    Returns:
      [B, H, W, 3C].
    """
    batch, height, width, channels = x.shape
    size = patch_of(x.shape, hidden.shape[1])
    parts = [_tokens(x, size), _tokens(output[..., :channels], size), _time_features(time, hidden.shape[1])]
    h = jnp.concatenate([_normal(hidden), *parts], -1)
    if h.shape[-1] != head["in/kernel"].shape[0] or head["out/bias"].shape[0] != 3 * channels * size**2:
        made = (head["in/kernel"].shape[0], head["out/bias"].shape[0])
        raise ValueError(
            f"genie: a head of {made[0]} inputs and {made[1]} outputs; allowed: {h.shape[-1]} and "
            f"{3 * channels * size**2}, as this model needs"
        )
    weights = {name: jnp.asarray(head[name], jnp.float32) for name in HEAD}
    h = jax.nn.silu(h @ weights["in/kernel"] + weights["in/bias"][None, None])
    k = h @ weights["out/kernel"] + weights["out/bias"][None, None]
    rows, columns = height // size, width // size
    k = k.reshape(batch, rows, columns, size, size, 3 * channels)
    return k.transpose(0, 1, 3, 2, 4, 5).reshape(batch, height, width, 3 * channels)


def patch_of(shape: tuple[int, ...], tokens: int) -> int:
    """The side of a token's square of pixels.

    Raises:
      ValueError: tokens that are no squares of an image.
    """
    size = int(round((shape[-3] * shape[-2] / tokens) ** 0.5)) if len(shape) == 4 else 0
    if not size or shape[-3] % size or shape[-2] % size or (shape[-3] // size) * (shape[-2] // size) != tokens:
        raise ValueError(f"genie: {tokens} tokens of samples {shape[1:]}; allowed: square patches of images")
    return size


def read_head(file: str) -> dict[str, np.ndarray]:
    """The arrays of a head's file.

    Raises:
      ValueError: a file that is not there, is damaged or holds something else.
    """
    what = source("genie", file)
    if place_of(file) is None:
        raise ValueError(f"{what}: no such file; allowed: an .npz file of difax calibrate")
    arrays = read_arrays(file)
    missing = [name for name in (*HEAD, "flow") if name not in arrays]
    if missing:
        raise ValueError(f"{what} has no array {missing[0]}; allowed: {', '.join((*HEAD, 'flow'))}")
    shapes = [arrays[name].shape for name in HEAD]
    inner, outer = shapes[0], shapes[2]
    fits = len(inner) == len(outer) == 2 and inner[1] == outer[0]
    if not fits or shapes[1] != inner[1:] or shapes[3] != outer[1:] or arrays["flow"].shape:
        raise ValueError(f"{what}: its arrays have shapes {shapes}; allowed: [i, w], [w], [w, o], [o]")
    check_finite(arrays, what)
    return {name: arrays[name] for name in (*HEAD, "flow")}


def _tokens(x: jax.Array, size: int) -> jax.Array:
    """Squares of pixels [B, N, size size C]."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // size, size, width // size, size, channels).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, -1, size * size * channels).astype(jnp.float32)


def _normal(h: jax.Array) -> jax.Array:
    h = h.astype(jnp.float32)
    return (h - h.mean(-1, keepdims=True)) * jax.lax.rsqrt(h.var(-1, keepdims=True) + 1e-6)


def _time_features(time: jax.Array, tokens: int) -> jax.Array:
    """[B, N, 2 FREQUENCIES] of waves from a thousand units of the model's time to one."""
    rates = 2 * np.pi * np.geomspace(1e-3, 1.0, FREQUENCIES).astype(np.float32)
    angle = time[:, None].astype(jnp.float32) * jnp.asarray(rates)[None]
    waves = jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], -1)
    return jnp.broadcast_to(waves[:, None], (len(time), tokens, waves.shape[-1]))
