"""AutoencoderKL, the convolutional autoencoder of latent diffusion, and FLUX.2's variant of it.

Rombach et al., High-Resolution Image Synthesis with Latent Diffusion Models, 2021, arXiv:2112.10752 (appendix E.1).
With widths (128, 256, 512, 512) an image of 8 h x 8 w pixels is h x w latents:

  encoder  conv 3 x 3; per width `layers` resnets, then (but for the last) a conv of stride 2;
           resnet, attention, resnet; norm, silu, conv 3 x 3 -> mean and log-variance; conv 1 x 1
  decoder  conv 1 x 1; conv 3 x 3; resnet, attention, resnet;
           per width, in reverse, `layers` + 1 resnets, then (but for the last) twice the size and a conv;
           norm, silu, conv 3 x 3

A resnet is x + conv(silu(norm(conv(silu(norm(x)))))), x through a 1 x 1 conv where the widths differ. Attention has one
head over all channels. The denoiser's latents are (mean - shift) scale; FLUX.2's are 2 x 2 patches of the mean, each
of the 4 C features standardised by the statistics of a BatchNorm.

Norms, softmax and the latents' scale are float32. Everything is channels-last.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from difax.core.annotations import checked
from difax.core.contracts import Autoencoder, Params
from difax.core.ops import attend_by_rows
from difax.models.layers import Dense, model_dtype

EPS = 1e-6  # of every norm
PATCH = 2  # sides of FLUX.2's patches
MOST_LEVELS = 10


def doubled(x_BHWC: jax.Array) -> jax.Array:
    """Twice the height and width, every value four times (nearest)."""
    b, h, w, c = x_BHWC.shape
    return jnp.broadcast_to(x_BHWC[:, :, None, :, None], (b, h, 2, w, 2, c)).reshape(b, 2 * h, 2 * w, c)


class Resnet(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x))))))."""

    features: int
    groups: int
    dtype: Any

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        h = nn.Conv(self.features, (3, 3), dtype=self.dtype, name="conv1")(normed(self.groups, "norm1", x_BHWC))
        h = nn.Conv(self.features, (3, 3), dtype=self.dtype, name="conv2")(normed(self.groups, "norm2", h))
        if x_BHWC.shape[-1] != self.features:
            x_BHWC = nn.Conv(self.features, (1, 1), dtype=self.dtype, name="shortcut")(x_BHWC)
        return x_BHWC + h


def group_norm(groups: int, name: str) -> nn.GroupNorm:
    """A norm over the pixels and the channels of each group, in float32."""
    return nn.GroupNorm(groups, epsilon=EPS, dtype=jnp.float32, use_fast_variance=False, name=name)


def normed(groups: int, name: str, x: jax.Array) -> jax.Array:
    """silu(norm(x)), computed in float32."""
    return nn.silu(group_norm(groups, name)(x)).astype(x.dtype)


class Middle(nn.Module):
    """Resnet, attention over all pixels, resnet."""

    groups: int
    attention: bool
    attend: Callable[..., jax.Array]
    dtype: Any

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        b, h, w, c = x_BHWC.shape
        x = Resnet(c, self.groups, self.dtype, name="resnet0")(x_BHWC)
        if self.attention:
            tokens = group_norm(self.groups, "norm")(x).astype(x.dtype).reshape(b, h * w, c)
            q, k, v = jnp.split(Dense(3 * c, name="qkv")(tokens)[:, :, None], 3, axis=-1)
            o = Dense(c, name="out")(self.attend(q, k, v, None)[:, :, 0])
            x = x + o.reshape(b, h, w, c)
        return Resnet(c, self.groups, self.dtype, name="resnet1")(x)


class Encoder(nn.Module):
    """Pixels [B, H, W, 3] to the moments [B, h, w, 2 C]: mean, then log-variance."""

    widths: tuple[int, ...]
    layers: int
    channels: int
    groups: int
    attention: bool
    quant: bool
    attend: Callable[..., jax.Array]
    dtype: Any

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        x = nn.Conv(self.widths[0], (3, 3), dtype=self.dtype, name="conv_in")(x_BHWC)
        for i, width in enumerate(self.widths):
            for j in range(self.layers):
                x = Resnet(width, self.groups, self.dtype, name=f"down{i}_resnet{j}")(x)
            if i < len(self.widths) - 1:
                after = ((0, 1), (0, 1))
                x = nn.Conv(width, (3, 3), 2, padding=after, dtype=self.dtype, name=f"down{i}_conv")(x)
        x = Middle(self.groups, self.attention, self.attend, self.dtype, name="mid")(x)
        x = nn.Conv(2 * self.channels, (3, 3), dtype=self.dtype, name="conv_out")(normed(self.groups, "norm_out", x))
        return nn.Conv(2 * self.channels, (1, 1), dtype=self.dtype, name="quant")(x) if self.quant else x


class Decoder(nn.Module):
    """Latents [B, h, w, C] to pixels [B, H, W, 3]."""

    widths: tuple[int, ...]
    layers: int
    channels: int
    groups: int
    attention: bool
    quant: bool
    attend: Callable[..., jax.Array]
    dtype: Any

    @nn.compact
    def __call__(self, z_BHWC: jax.Array) -> jax.Array:
        if self.quant:
            z_BHWC = nn.Conv(z_BHWC.shape[-1], (1, 1), dtype=self.dtype, name="quant")(z_BHWC)
        x = nn.Conv(self.widths[-1], (3, 3), dtype=self.dtype, name="conv_in")(z_BHWC)
        x = Middle(self.groups, self.attention, self.attend, self.dtype, name="mid")(x)
        for i, width in enumerate(reversed(self.widths)):
            for j in range(self.layers + 1):
                x = Resnet(width, self.groups, self.dtype, name=f"up{i}_resnet{j}")(x)
            if i < len(self.widths) - 1:
                x = nn.Conv(width, (3, 3), dtype=self.dtype, name=f"up{i}_conv")(doubled(x))
        return nn.Conv(self.channels, (3, 3), dtype=self.dtype, name="conv_out")(normed(self.groups, "norm_out", x))


class Coders(NamedTuple):
    """The two halves of one geometry."""

    encoder: Encoder
    decoder: Decoder
    side: int
    latents: int
    in_channels: int
    dtype: Any

    def init(self, key: jax.Array) -> Params:
        keys = jax.random.split(key)
        pixels, latents = (1, self.side, self.side, self.in_channels), (1, 1, 1, self.latents)
        return {
            "encoder": self.encoder.init(keys[0], jnp.zeros(pixels, self.dtype))["params"],
            "decoder": self.decoder.init(keys[1], jnp.zeros(latents, self.dtype))["params"],
        }

    def mean(self, params: Params, pixels_BHWC: jax.Array) -> jax.Array:
        """Pixels to the mean of their latents, float32."""
        moments: Any = self.encoder.apply({"params": params["encoder"]}, pixels_BHWC.astype(self.dtype))
        return moments[..., : self.latents].astype(jnp.float32)

    def pixels(self, params: Params, z_BHWC: jax.Array) -> jax.Array:
        """Latents as the encoder gives them to pixels, float32."""
        x: Any = self.decoder.apply({"params": params["decoder"]}, z_BHWC.astype(self.dtype))
        return x.astype(jnp.float32)


def make_coders(
    name: str,
    widths: Sequence[int],
    decoder_widths: Sequence[int] | None,
    layers: int,
    latents: int,
    groups: int,
    in_channels: int,
    out_channels: int,
    attention: bool,
    quant: bool,
    post_quant: bool,
    attend: Callable[..., jax.Array],
    dtype: Any,
) -> Coders:
    """The two halves; arguments as of `autoencoder_kl` and `autoencoder_kl_flux2`, of which `name` is one."""
    kind, downs, ups = model_dtype(name, dtype), tuple(widths), tuple(decoder_widths or widths)
    counts = dict(layers=layers, latents=latents, groups=groups, in_channels=in_channels, out_channels=out_channels)
    _check(name, downs, ups, counts)
    encoder = Encoder(downs, layers, latents, groups, attention, quant, attend, kind)
    decoder = Decoder(ups, layers, out_channels, groups, attention, post_quant, attend, kind)
    return Coders(encoder, decoder, 2 ** (len(downs) - 1), latents, in_channels, kind)


def _check(name: str, widths: tuple[int, ...], ups: tuple[int, ...], counts: dict[str, int]) -> None:
    for key, value in counts.items():
        if value < 1:
            raise ValueError(f"{name}: {key}={value}; allowed: 1 or more")
    for key, values in (("widths", widths), ("decoder_widths", ups)):
        if not 1 <= len(values) <= MOST_LEVELS:
            raise ValueError(f"{name}: {key}={values}; allowed: 1 to {MOST_LEVELS} widths")
        for width in values:
            if width < 1 or width % counts["groups"]:
                raise ValueError(f"{name}: {key}={values}; allowed: each divisible by groups={counts['groups']}")
    if len(widths) != len(ups):
        raise ValueError(f"{name}: decoder_widths={ups}; allowed: {len(widths)} of them, as widths={widths} has")


@checked
def autoencoder_kl(
    widths: Sequence[int] = (128, 256, 512, 512),
    *,
    layers: int = 2,
    latents: int = 4,
    groups: int = 32,
    in_channels: int = 3,
    out_channels: int = 3,
    attention: bool = True,
    quant: bool = True,
    post_quant: bool = True,
    scaling_factor: float = 0.18215,
    shift_factor: float = 0.0,
    latents_mean: Sequence[float] | None = None,
    latents_std: Sequence[float] | None = None,
    sample_size: int = 32,
    attend: Callable[..., jax.Array] = attend_by_rows,
    dtype: str | type | np.dtype = "float32",
) -> Autoencoder:
    """The autoencoder of Stable Diffusion 1, 2, XL and 3, FLUX.1, PixArt, DiT and Z-Image.

    z = latents std / scaling_factor + mean + shift_factor is what the decoder takes and the encoder's mean gives.

    Args:
      widths: channels of each level, finest first, divisible by groups; a level more halves the latents' sides (128,
        256, 512, 512).
      layers: resnets of a level; the decoder has one more (2).
      latents: channels of the latents (4; 16 of SD3 and FLUX.1).
      groups: of every norm (32).
      in_channels, out_channels: of the pixels (3, 3).
      attention: is there attention between the resnets of the middle (True).
      quant, post_quant: are there 1 x 1 convolutions behind the encoder and before the decoder (True; FLUX.1 and SD3
        have none).
      scaling_factor: of the latents, not 0 (0.18215; SDXL 0.13025, SD3 1.5305, FLUX.1 0.3611).
      shift_factor: (0; SD3 0.0609, FLUX.1 0.1159).
      latents_mean, latents_std: by channel (None: 0 and 1).
      sample_size: pixels of a side that it was trained on, and of diffusers' tiles (32).
      attend: (q, k, v, None) -> o, [B, N, 1, C] each; a part of the rows at a time by default.
      dtype: "float32" or "bfloat16", of convolutions and products.

    Raises:
      ValueError: a geometry that does not divide, a factor of 0, means of another number than the channels.

    References: Rombach et al. 2021, arXiv:2112.10752.
    """
    if scaling_factor == 0:
        raise ValueError(f"autoencoder_kl: scaling_factor={scaling_factor}; allowed: a number, but not 0")
    if sample_size < 1:
        raise ValueError(f"autoencoder_kl: sample_size={sample_size}; allowed: 1 or more")
    coders = make_coders(
        "autoencoder_kl", widths, None, layers, latents, groups, in_channels, out_channels, attention, quant,
        post_quant, attend, dtype,
    )  # fmt: skip
    mean = _by_channel("latents_mean", latents_mean, latents, 0.0)
    std = _by_channel("latents_std", latents_std, latents, 1.0)
    if (std <= 0).any():
        raise ValueError(f"autoencoder_kl: latents_std={latents_std}; allowed: numbers > 0")
    scale, shift = (std / scaling_factor).astype(np.float32), (mean + shift_factor).astype(np.float32)

    def decode(params: Params, latents_BHWC: jax.Array) -> jax.Array:
        return coders.pixels(params, latents_BHWC.astype(jnp.float32) * scale + shift)

    def encode(params: Params, pixels_BHWC: jax.Array) -> jax.Array:
        return (coders.mean(params, pixels_BHWC) - shift) / scale

    return Autoencoder(
        name=f"autoencoder_kl-{'x'.join(map(str, widths))}",
        init=coders.init,
        decode=decode,
        encode=encode,
        side=coders.side,
        time=0,
        channels=latents,
        dtype=coders.dtype,
    )


def _by_channel(name: str, given: Sequence[float] | None, channels: int, default: float) -> np.ndarray:
    """Numbers by channel [1, 1, 1, C], float64."""
    values = np.full(channels, default) if given is None else np.asarray(given, np.float64)
    if values.shape != (channels,):
        raise ValueError(f"autoencoder_kl: {name} of {values.size} numbers; allowed: {channels}, one for each channel")
    return values[None, None, None]


@checked
def autoencoder_kl_flux2(
    widths: Sequence[int] = (128, 256, 512, 512),
    *,
    decoder_widths: Sequence[int] | None = None,
    layers: int = 2,
    latents: int = 32,
    groups: int = 32,
    in_channels: int = 3,
    out_channels: int = 3,
    attention: bool = True,
    quant: bool = True,
    post_quant: bool = True,
    eps: float = 1e-4,
    sample_size: int = 1024,
    attend: Callable[..., jax.Array] = attend_by_rows,
    dtype: str | type | np.dtype = "float32",
) -> Autoencoder:
    """The autoencoder of FLUX.2, with latents [B, H/16, W/16, 128] as its denoiser has them.

    Each is a patch of 2 x 2 of the network's own latents, features (channel, row, column), standardised by the
    running statistics of a BatchNorm: x = latents sqrt(var + eps) + mean.

    Args:
      widths, layers, groups, in_channels, out_channels, attention, quant, post_quant, attend, dtype: as of
        `autoencoder_kl`.
      decoder_widths: of the decoder, where they are others (None).
      latents: channels of the network's own latents, a quarter of the denoiser's (32).
      eps: of the BatchNorm (1e-4).
      sample_size: pixels of a side that it was trained on, and of diffusers' tiles (1024).

    Raises:
      ValueError: a geometry that does not divide, an eps below 0.

    References: Black Forest Labs, FLUX.2, 2025.
    """
    if eps < 0:
        raise ValueError(f"autoencoder_kl_flux2: eps={eps}; allowed: 0 or more")
    if sample_size < 1:
        raise ValueError(f"autoencoder_kl_flux2: sample_size={sample_size}; allowed: 1 or more")
    coders = make_coders(
        "autoencoder_kl_flux2", widths, decoder_widths, layers, latents, groups, in_channels, out_channels, attention,
        quant, post_quant, attend, dtype,
    )  # fmt: skip
    channels = latents * PATCH * PATCH

    def init(key: jax.Array) -> Params:
        return coders.init(key) | {"latents": {"mean": jnp.zeros(channels), "var": jnp.ones(channels)}}

    def statistics(params: Params) -> tuple[jax.Array, jax.Array]:
        mean, var = (params["latents"][k].astype(jnp.float32)[None, None, None] for k in ("mean", "var"))
        return mean, jnp.sqrt(var + eps)

    def decode(params: Params, latents_BHWC: jax.Array) -> jax.Array:
        mean, std = statistics(params)
        return coders.pixels(params, unpacked(latents_BHWC.astype(jnp.float32) * std + mean))

    def encode(params: Params, pixels_BHWC: jax.Array) -> jax.Array:
        mean, std = statistics(params)
        return (packed(coders.mean(params, pixels_BHWC)) - mean) / std

    return Autoencoder(
        name=f"autoencoder_kl_flux2-{'x'.join(map(str, widths))}",
        init=init,
        decode=decode,
        encode=encode,
        side=coders.side * PATCH,
        time=0,
        channels=channels,
        dtype=coders.dtype,
    )


def packed(x_BHWC: jax.Array) -> jax.Array:
    """[B, 2 h, 2 w, C] -> [B, h, w, 4 C], features over channel, row, column."""
    b, h, w, c = x_BHWC.shape
    x = x_BHWC.reshape(b, h // PATCH, PATCH, w // PATCH, PATCH, c).transpose(0, 1, 3, 5, 2, 4)
    return x.reshape(b, h // PATCH, w // PATCH, c * PATCH * PATCH)


def unpacked(x_BHWC: jax.Array) -> jax.Array:
    """The inverse of `packed`."""
    b, h, w, c = x_BHWC.shape
    x = x_BHWC.reshape(b, h, w, -1, PATCH, PATCH).transpose(0, 1, 4, 2, 5, 3)
    return x.reshape(b, h * PATCH, w * PATCH, c // (PATCH * PATCH))
