"""Wan's causal video autoencoders: of Wan 2.1, which Qwen-Image has for single pictures, and of Wan 2.2's 5B model.

Wan Team, Wan: Open and Advanced Large-Scale Video Generative Models, 2025, arXiv:2503.20314, section 4.1. A network of
convolutions over (frame, row, column) that see no later frame: each has its k - 1 frames before it, zeros in front of
the first. A residual block adds conv(silu(norm(conv(silu(norm(x)))))) with the RMS norm x / |x| sqrt(C) gamma over
channels, and attention is within a frame. The first frame stands for itself, every other latent for `time` frames:

  upsampling in time      x_0, then the halves of conv(x_1, x_2, ...) as two frames each; conv sees zeros before x_1
  downsampling in time    x_0, then conv over x_0 x_1 x_2, x_2 x_3 x_4, ...

In Wan 2.2 ("residual") a level also adds its input, of which groups of neighbours are averaged on the way down and
repeated on the way up, and pixels enter as patches.

The reference (diffusers' AutoencoderKLWan and AutoencoderKLQwenImage) takes one latent after another and keeps what
convolutions have seen. Here a video is one pass, or parts of `chunk` latents one after another: what a convolution has
seen is the variable collection "past" of its module, which is carried from part to part, and all are the same function.

Shape letters: B batch, F frames, H rows, W columns, C channels.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from difax.core.annotations import checked
from difax.core.contracts import Autoencoder, Params
from difax.core.ops import attend_by_rows
from difax.models.layers import Dense, model_dtype

# name -> base, decoder_base, channels, patch, residual; multipliers, depth and time are the same in both
VARIANTS = {"2.1": (96, 96, 16, 1, False), "2.2": (160, 256, 48, 2, True)}
# by the number of channels: means and deviations of the published autoencoders' latents
STATISTICS: dict[int, tuple[tuple[float, ...], tuple[float, ...]]] = {
    16: (
        (-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508)
        + (0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
        (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743)
        + (3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
    ),
    48: (
        (-0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557)
        + (-0.1382, 0.0542, 0.2813, 0.0891, 0.1570, -0.0098, 0.0375, -0.1825)
        + (-0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502)
        + (-0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230)
        + (-0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.0520, 0.3748)
        + (0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667),
        (0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013)
        + (0.8158, 1.0344, 0.5894, 1.0901, 0.6885, 0.6165, 0.8454, 0.4978)
        + (0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659)
        + (0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093)
        + (0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887)
        + (0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744),
    ),
}
LOGITS = 2**26  # of attention at a time: a picture of 1328 x 1328 pixels has 7.6e8 of them


@dataclasses.dataclass(frozen=True)
class WanAutoencoderConfig:
    """Geometry and numerics; the arguments of `wan_autoencoder` with nothing left open."""

    base: int
    decoder_base: int
    channels: int
    multipliers: tuple[int, ...]
    depth: int
    time: tuple[bool, ...]
    attention: tuple[bool, ...]
    residual: bool
    colours: int
    patch: int
    mean: tuple[float, ...]
    deviation: tuple[float, ...]
    chunk: int | None
    dtype: Any

    @property
    def side(self) -> int:
        """Pixels of a latent's side."""
        return self.patch * 2 ** (len(self.multipliers) - 1)

    @property
    def frames(self) -> int:
        """Frames that a latent adds behind the first."""
        return 2 ** sum(self.time)


# ---- pieces --------------------------------------------------------------------------------------------------


def continued(module: nn.Module, x_BFHWC: jax.Array, frames: int) -> tuple[jax.Array, bool]:
    """x with the last `frames` frames of the part before it, if there is one, and whether there is.

    Where the collection "past" is mutable, the last frames of x are put there for the part that follows.
    """
    past = module.get_variable("past", "frames")
    if module.is_mutable_collection("past"):
        b, _, h, w, c = x_BFHWC.shape
        before = jnp.zeros((b, frames, h, w, c), x_BFHWC.dtype) if past is None else past
        module.put_variable("past", "frames", jnp.concatenate([before, x_BFHWC], 1)[:, -frames:])
    return (x_BFHWC, False) if past is None else (jnp.concatenate([past, x_BFHWC], 1), True)


def _convolved(
    x_BFHWC: jax.Array, kernel: jax.Array, bias: jax.Array, strides: Sequence[int], padding: Sequence[tuple[int, int]]
) -> jax.Array:
    """A convolution with a kernel of frames [p, q, r, C, D], or of pixels [q, r, C, D] on every frame."""
    b, f = x_BFHWC.shape[:2]
    flat = kernel.ndim == 4
    x = x_BFHWC.reshape(b * f, *x_BFHWC.shape[2:]) if flat else x_BFHWC
    layout = ("NHWC", "HWIO", "NHWC") if flat else ("NDHWC", "DHWIO", "NDHWC")
    y = jax.lax.conv_general_dilated(x, kernel.astype(x.dtype), strides, padding, dimension_numbers=layout)
    y = y + jnp.broadcast_to(bias.astype(x.dtype), y.shape)
    return y.reshape(b, f, *y.shape[1:]) if flat else y


class CausalConv(nn.Module):
    """A convolution whose kernel [p, q, r] ends at the frame that it makes; rows and columns are padded by zeros."""

    features: int
    size: tuple[int, int, int] = (3, 3, 3)

    @nn.compact
    def __call__(self, x_BFHWC: jax.Array) -> jax.Array:
        p, q, r = self.size
        shape = (*self.size, x_BFHWC.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        x, behind = continued(self, x_BFHWC, p - 1)
        around = [(n // 2, n // 2) for n in (q, r)]
        if x_BFHWC.shape[1] == 0:
            return jnp.zeros((*x.shape[:-1], self.features), x.dtype)
        if x.shape[1] == 1:  # before the first frame there are zeros, which need no products
            return _convolved(x, kernel[-1], bias, (1, 1), around)
        return _convolved(x, kernel, bias, (1, 1, 1), [(0 if behind else p - 1, 0), *around])


class FrameConv(nn.Module):
    """A convolution of 3 x 3 pixels in every frame; with a stride of 2 zeros are put below and right of it alone."""

    features: int
    stride: int = 1

    @nn.compact
    def __call__(self, x_BFHWC: jax.Array) -> jax.Array:
        shape = (3, 3, x_BFHWC.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        return _convolved(x_BFHWC, kernel, bias, 2 * (self.stride,), 2 * [(int(self.stride == 1), 1)])


class Norm(nn.Module):
    """x / max(|x|, 1e-12) sqrt(C) scale over channels, in float32."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],)).astype(jnp.float32)
        x = x.astype(jnp.float32)
        square = (x * x).sum(-1, keepdims=True)
        unit = x * jax.lax.rsqrt(jnp.maximum(square, 1e-24))
        return unit * jnp.broadcast_to(x.shape[-1] ** 0.5 * scale, x.shape)


class Residual(nn.Module):
    """Two convolutions behind norm and SiLU, added to the input, which a product brings to the width."""

    features: int

    @nn.compact
    def __call__(self, x_BFHWC: jax.Array) -> jax.Array:
        y = x_BFHWC
        for i in ("1", "2"):
            y = nn.silu(Norm(name=f"norm{i}")(y)).astype(x_BFHWC.dtype)
            y = CausalConv(self.features, name=f"conv{i}")(y)
        if x_BFHWC.shape[-1] != self.features:
            x_BFHWC = Dense(self.features, name="shortcut")(x_BFHWC)
        return x_BFHWC + y


class FrameAttention(nn.Module):
    """Attention of one head among the pixels of each frame, added to the input."""

    @nn.compact
    def __call__(self, x_BFHWC: jax.Array) -> jax.Array:
        b, f, h, w, c = x_BFHWC.shape
        x = Norm(name="norm")(x_BFHWC).astype(x_BFHWC.dtype).reshape(b * f, h * w, c)
        q, k, v = (part[:, :, None] for part in jnp.split(Dense(3 * c, name="qkv")(x), 3, axis=-1))
        o = attend_by_rows(q, k, v, rows=max(1, LOGITS // (b * f * h * w)))
        return x_BFHWC + Dense(c, name="proj")(o.reshape(x_BFHWC.shape))


class Middle(nn.Module):
    """Residual block, attention, residual block."""

    @nn.compact
    def __call__(self, x_BFHWC: jax.Array) -> jax.Array:
        width = x_BFHWC.shape[-1]
        x = FrameAttention(name="attn")(Residual(width, name="res_0")(x_BFHWC))
        return Residual(width, name="res_1")(x)


# ---- resampling ----------------------------------------------------------------------------------------------


class HalveTime(nn.Module):
    """Two frames become one, but for the first of a video."""

    @nn.compact
    def __call__(self, x_BFHWC: jax.Array) -> jax.Array:
        c = x_BFHWC.shape[-1]
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (3, 1, 1, c, c))
        bias = self.param("bias", nn.initializers.zeros, (c,))
        x, behind = continued(self, x_BFHWC, 1)
        if x.shape[1] == 1:
            return x
        y = _convolved(x, kernel, bias, (2, 1, 1), 3 * [(0, 0)])
        return y if behind else jnp.concatenate([x[:, :1], y], 1)


class Downsample(nn.Module):
    """Half the rows and columns, and frames where `time` says so."""

    time: bool

    @nn.compact
    def __call__(self, x_BFHWC: jax.Array) -> jax.Array:
        x = FrameConv(x_BFHWC.shape[-1], 2, name="conv")(x_BFHWC)
        return HalveTime(name="time_conv")(x) if self.time else x


class Upsample(nn.Module):
    """Twice the rows and columns, and frames where `time` says so. first: does x begin with the first frame."""

    features: int
    time: bool

    @nn.compact
    def __call__(self, x_BFHWC: jax.Array, first: bool) -> jax.Array:
        x = x_BFHWC
        if self.time:
            y = CausalConv(2 * x.shape[-1], (3, 1, 1), name="time_conv")(x[:, int(first) :])
            b, f, h, w, c = y.shape
            y = jnp.moveaxis(y.reshape(b, f, h, w, 2, c // 2), 4, 2).reshape(b, 2 * f, h, w, c // 2)
            x = jnp.concatenate([x[:, :1], y], 1) if first else y
        return FrameConv(self.features, name="conv")(x.repeat(2, 2).repeat(2, 3))


def averaged(x_BFHWC: jax.Array, features: int, time: int, side: int, first: bool) -> jax.Array:
    """Blocks of time x side x side pixels as channels (c, frame, row, column), averaged in equal groups to `features`.

    The first frame of a video is a block of its own behind zeros.
    """
    if first and time > 1:
        b, _, h, w, c = x_BFHWC.shape
        x_BFHWC = jnp.concatenate([jnp.zeros((b, time - 1, h, w, c), x_BFHWC.dtype), x_BFHWC], 1)
    b, f, h, w, c = x_BFHWC.shape
    x = x_BFHWC.reshape(b, f // time, time, h // side, side, w // side, side, c).transpose(0, 1, 3, 5, 7, 2, 4, 6)
    return x.reshape(b, f // time, h // side, w // side, features, -1).astype(jnp.float32).mean(-1).astype(x.dtype)


def repeated(x_BFHWC: jax.Array, features: int, time: int, side: int, first: bool) -> jax.Array:
    """Channels repeated until they fill time x side x side pixels of `features`; the first frame's are the last's."""
    b, f, h, w, c = x_BFHWC.shape
    x = x_BFHWC.repeat(features * time * side * side // c, -1).reshape(b, f, h, w, features, time, side, side)
    x = x.transpose(0, 1, 5, 2, 6, 3, 7, 4).reshape(b, f * time, h * side, w * side, features)
    return x[:, time - 1 :] if first else x


def as_patches(x_BFHWC: jax.Array, patch: int) -> jax.Array:
    """[B, F, H p, W p, C] -> [B, F, H, W, C p p] in the order channel, column, row."""
    b, f, h, w, c = x_BFHWC.shape
    x = x_BFHWC.reshape(b, f, h // patch, patch, w // patch, patch, c).transpose(0, 1, 2, 4, 6, 5, 3)
    return x.reshape(b, f, h // patch, w // patch, c * patch * patch)


def from_patches(x_BFHWC: jax.Array, patch: int) -> jax.Array:
    """The inverse of `as_patches`."""
    b, f, h, w, c = x_BFHWC.shape
    x = x_BFHWC.reshape(b, f, h, w, c // patch**2, patch, patch).transpose(0, 1, 2, 6, 3, 5, 4)
    return x.reshape(b, f, h * patch, w * patch, c // patch**2)


# ---- the two networks ----------------------------------------------------------------------------------------


class DownLevel(nn.Module):
    """Residual blocks, with attention or without, then half the size but in the last level (`time` None)."""

    config: WanAutoencoderConfig
    features: int
    attention: bool
    time: bool | None

    @nn.compact
    def __call__(self, x_BFHWC: jax.Array, first: bool) -> jax.Array:
        x = x_BFHWC
        for i in range(self.config.depth):
            x = Residual(self.features, name=f"res_{i}")(x)
            if self.attention:
                x = FrameAttention(name=f"attn_{i}")(x)
        if self.time is not None:
            x = Downsample(self.time, name="resample")(x)
        if not self.config.residual:
            return x
        return x + averaged(x_BFHWC, self.features, 2 if self.time else 1, 1 if self.time is None else 2, first)


class Encoder(nn.Module):
    """Pixels [B, F, H, W, 3] -> mean and log-variance of the latents [B, f, h, w, 2 C]."""

    config: WanAutoencoderConfig

    @nn.compact
    def __call__(self, x_BFHWC: jax.Array, first: bool = True) -> jax.Array:
        c = self.config
        x = CausalConv(c.base, name="conv_in")(as_patches(x_BFHWC, c.patch))
        for i, (m, attention, time) in enumerate(zip(c.multipliers, c.attention, (*c.time, None), strict=True)):
            x = DownLevel(c, c.base * m, attention, time, name=f"down_{i}")(x, first)
        x = Middle(name="middle")(x)
        x = nn.silu(Norm(name="norm_out")(x)).astype(x.dtype)
        return Dense(2 * c.channels, name="quant")(CausalConv(2 * c.channels, name="conv_out")(x))


class UpLevel(nn.Module):
    """Residual blocks, then twice the size but in the last level (`time` None)."""

    config: WanAutoencoderConfig
    features: int
    time: bool | None

    @nn.compact
    def __call__(self, x_BFHWC: jax.Array, first: bool) -> jax.Array:
        x, residual = x_BFHWC, self.config.residual
        for i in range(self.config.depth + 1):
            x = Residual(self.features, name=f"res_{i}")(x)
        if self.time is None:
            return x
        x = Upsample(self.features if residual else self.features // 2, self.time, name="resample")(x, first)
        return x + repeated(x_BFHWC, self.features, 2 if self.time else 1, 2, first) if residual else x


class Decoder(nn.Module):
    """Latents [B, f, h, w, C] -> pixels [B, F, H, W, 3]."""

    config: WanAutoencoderConfig

    @nn.compact
    def __call__(self, z_BFHWC: jax.Array, first: bool = True) -> jax.Array:
        c = self.config
        widths = [c.decoder_base * m for m in reversed(c.multipliers)]
        x = CausalConv(widths[0], name="conv_in")(Dense(c.channels, name="post_quant")(z_BFHWC))
        x = Middle(name="middle")(x)
        for i, (width, time) in enumerate(zip(widths, (*reversed(c.time), None), strict=True)):
            x = UpLevel(c, width, time, name=f"up_{i}")(x, first)
        x = nn.silu(Norm(name="norm_out")(x)).astype(x.dtype)
        return from_patches(CausalConv(c.colours * c.patch**2, name="conv_out")(x), c.patch)


def in_parts(module: nn.Module, params: Params, x: jax.Array, begin: int, part: int) -> jax.Array:
    """A network on x [B, F, ...] in parts along the frames, one after another: the memory of one is needed.

    Args:
      begin: frames of the first part. part: of every other; what follows the first is a multiple of it.
    """
    y, past = module.apply({"params": params}, x[:, :begin], True, mutable=["past"])
    rest = x[:, begin:].reshape(len(x), -1, part, *x.shape[2:])
    if not rest.shape[1]:
        return y

    def step(past: Any, some: jax.Array) -> tuple[Any, jax.Array]:
        made, after = module.apply({"params": params, **past}, some, False, mutable=["past"])
        return after, made

    more = jnp.moveaxis(jax.lax.scan(step, past, jnp.moveaxis(rest, 1, 0))[1], 0, 1)
    return jnp.concatenate([y, more.reshape(len(x), -1, *more.shape[3:])], 1)


# ---- the autoencoder -----------------------------------------------------------------------------------------


@checked
def wan_autoencoder(
    variant: Literal["2.1", "2.2"] | None = None,
    *,
    base: int | None = None,
    decoder_base: int | None = None,
    channels: int | None = None,
    multipliers: Sequence[int] = (1, 2, 4, 4),
    depth: int = 2,
    time: Sequence[bool] = (False, True, True),
    attention: Sequence[bool] | None = None,
    residual: bool | None = None,
    colours: int = 3,
    patch: int | None = None,
    mean: Sequence[float] | None = None,
    deviation: Sequence[float] | None = None,
    side: int | None = None,
    frames: int | None = None,
    images: bool = False,
    chunk: int | None = None,
    dtype: str | type | np.dtype = "float32",
) -> Autoencoder:
    """Wan's causal autoencoder as an `Autoencoder`.

    Latents [B, f, h, w, C] stand for 1 + frames (f - 1) frames of side h x side w pixels; without the axis of frames,
    for one picture. `decode` gives pixels within [-1, 1], as the reference clips them, and `encode` the latents' mean.

    Args:
      variant: "2.1" or "2.2": base, decoder_base, channels, patch and residual of the published ones; or None and
        give the first three yourself.
      base, decoder_base: channels of the finest level of the encoder and of the decoder ((96, 96), (160, 256)).
      channels: of the latents (16, 48).
      multipliers: of the base, from the finest level to the coarsest; the size is halved between levels.
      depth: residual blocks of a level; the decoder has one more.
      time: is time halved too, between which levels of the encoder.
      attention: is there attention in the levels of the encoder (None: in none); the middle has it always.
      residual: does a level add its input (Wan 2.2).
      colours: channels of the pixels. patch: pixels of a patch's side (1, 2).
      mean, deviation: of the latents, by channel: the denoiser has (z - mean) / deviation. None are the published ones
        for 16 and 48 channels.
      side, frames: what the autoencoder says of itself (`Autoencoder.side`, `time`), where a pipeline counts with
        others than follow from the levels.
      images: does it stand for single pictures (`Autoencoder.time` is 0).
      chunk: latents that are decoded or encoded at a time, one part after another, which need the memory of one; None
        is all. The numbers are the same but for rounding.
      dtype: "float32" or "bfloat16", of activations and products; norms and softmax are float32.

    Raises:
      ValueError: a missing part of the geometry, or one that does not fit; when called, sizes that do not divide.

    References: Wan Team 2025, arXiv:2503.20314.
    """
    names = ("base", "decoder_base", "channels", "patch", "residual")
    preset = (
        dict(zip(names, VARIANTS[variant], strict=True)) if variant is not None else {"patch": 1, "residual": False}
    )
    given = dict(zip(names, (base, decoder_base, channels, patch, residual), strict=True))
    found: dict[str, Any] = {n: preset.get(n) if value is None else value for n, value in given.items()}
    missing = [name for name, value in found.items() if value is None]
    if missing:
        raise ValueError(f"wan_autoencoder: {', '.join(missing)} missing; give it, or a variant: {', '.join(VARIANTS)}")
    known = STATISTICS.get(found["channels"], (None, None))
    mean, deviation = (known[0] if mean is None else mean), (known[1] if deviation is None else deviation)
    if mean is None or deviation is None:
        raise ValueError(
            f"wan_autoencoder: channels={found['channels']} without mean and deviation; allowed: both given, or "
            f"channels={' or '.join(map(str, STATISTICS))}, whose published ones are known"
        )
    c = WanAutoencoderConfig(
        **found,
        multipliers=tuple(multipliers),
        depth=depth,
        time=tuple(time),
        attention=len(multipliers) * (False,) if attention is None else tuple(attention),
        colours=colours,
        mean=tuple(mean),
        deviation=tuple(deviation),
        chunk=chunk,
        dtype=model_dtype("wan_autoencoder", dtype),
    )
    _check(c)
    encoder, decoder = Encoder(c), Decoder(c)
    shift, scale = (np.asarray(a, np.float32).reshape(1, 1, 1, 1, -1) for a in (c.mean, c.deviation))

    def init(key: jax.Array) -> Params:
        f = 1 + c.frames  # a first frame alone leaves the convolutions in time out
        shapes = {"encoder": (1, f, c.side, c.side, c.colours), "decoder": (1, 2, 1, 1, c.channels)}
        keys = jax.random.split(key)
        nets = {"encoder": encoder, "decoder": decoder}
        # compiled, since of the networks' own operations nothing is left then
        make = lambda net, shape: jax.jit(lambda k: net.init(k, jnp.zeros(shape))["params"])  # noqa: E731
        return {n: make(nets[n], shapes[n])(k) for n, k in zip(nets, keys, strict=True)}

    def decode(params: Params, latents: jax.Array) -> jax.Array:
        def run(z: jax.Array) -> Any:
            z = (z.astype(jnp.float32) * scale + shift).astype(c.dtype)
            if c.chunk is None or z.shape[1] <= c.chunk:
                return decoder.apply({"params": params["decoder"]}, z)
            return in_parts(decoder, params["decoder"], z, 1 + (z.shape[1] - 1) % c.chunk, c.chunk)

        return jnp.clip(_as_video(run, latents, "latents", c.channels).astype(jnp.float32), -1, 1)

    def encode(params: Params, pixels: jax.Array) -> jax.Array:
        def run(x: jax.Array) -> Any:
            more, over = divmod(x.shape[1] - 1, c.frames)
            if over or x.shape[2] % c.side or x.shape[3] % c.side:
                raise ValueError(
                    f"wan_autoencoder: {x.shape[1]} frames of {x.shape[2]} x {x.shape[3]} pixels; allowed: 1 + "
                    f"{c.frames} k frames, sides divisible by {c.side}"
                )
            x = x.astype(c.dtype)
            if c.chunk is None or more < c.chunk:
                return encoder.apply({"params": params["encoder"]}, x)
            begin = 1 + c.frames * (more % c.chunk)
            return in_parts(encoder, params["encoder"], x, begin, c.frames * c.chunk)

        return _as_video(
            lambda x: (run(x)[..., : c.channels].astype(jnp.float32) - shift) / scale, pixels, "pixels", c.colours
        )

    return Autoencoder(
        name=f"wan-autoencoder-{variant or f'{c.base}x{len(c.multipliers)}'}",
        init=init,
        decode=decode,
        encode=encode,
        side=c.side if side is None else side,
        time=0 if images else c.frames if frames is None else frames,
        channels=c.channels,
        dtype=c.dtype,
    )


def _as_video(run: Callable[[jax.Array], jax.Array], x: jax.Array, what: str, channels: int) -> jax.Array:
    """What a network makes of videos, or of pictures, which are videos of one frame."""
    if x.ndim not in (4, 5) or x.shape[-1] != channels or 0 in x.shape:
        raise ValueError(
            f"wan_autoencoder: {what} {list(x.shape)}; allowed: [B, F, H, W, {channels}] or [B, H, W, {channels}]"
        )
    return run(x) if x.ndim == 5 else run(x[:, None])[:, 0]


def _check(c: WanAutoencoderConfig) -> None:
    refuse = lambda fault: ValueError(f"wan_autoencoder: {fault}")  # noqa: E731
    for name in ("base", "decoder_base", "channels", "depth", "colours", "patch"):
        if getattr(c, name) < 1:
            raise refuse(f"{name}={getattr(c, name)}; allowed: 1 or more")
    if c.chunk is not None and c.chunk < 1:
        raise refuse(f"chunk={c.chunk}; allowed: 1 or more latents, or None")
    levels = len(c.multipliers)
    if levels < 1 or min(c.multipliers) < 1:
        raise refuse(f"multipliers={c.multipliers}; allowed: whole numbers, 1 or more")
    for name, length in (("time", levels - 1), ("attention", levels)):
        if len(getattr(c, name)) != length:
            raise refuse(f"{name}={getattr(c, name)}; allowed: {length} of true or false, for {levels} levels")
    for name in ("mean", "deviation"):
        if len(getattr(c, name)) != c.channels:
            raise refuse(f"{name} of {len(getattr(c, name))} numbers; allowed: {c.channels}, one a channel")
    if not all(math.isfinite(d) and d > 0 for d in c.deviation):
        raise refuse(f"deviation={c.deviation}; allowed: numbers > 0")
    down = [c.base, *(c.base * m for m in c.multipliers)]
    up = [c.decoder_base * m for m in (c.multipliers[-1], *reversed(c.multipliers))]
    for i, time in enumerate((*c.time, None)):  # groups of a level's shortcut
        block = 1 if time is None else 8 if time else 4
        if c.residual and down[i] * block % down[i + 1]:
            raise refuse(f"multipliers={c.multipliers}; allowed: a level's width divides {block} of the one before")
    for i, time in enumerate(reversed(c.time)):
        if c.residual and up[i + 1] * (8 if time else 4) % up[i]:
            raise refuse(f"multipliers={c.multipliers}; allowed: {8 if time else 4} of a level's width hold the next")
        if not c.residual and up[i + 1] % 2:
            raise refuse(f"decoder_base={c.decoder_base}; allowed: one for which all levels have an even width")
