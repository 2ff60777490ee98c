"""AutoencoderTiny (TAESD and its relatives for SDXL, SD3, FLUX.1): small convolutional coders for previews.

Bohan, TAESD, 2023, github.com/madebyollin/taesd: distilled from the autoencoder of a latent diffusion model, whose
latents it takes as the denoiser has them, so that a picture costs a hundredth of what it costs there.

  encoder  conv; per stage (but the first) a conv of stride 2 without bias, then blocks; conv
  decoder  3 tanh(z / 3); conv, activation; per stage blocks, then twice the size (but for the last) and a conv,
           which has a bias in the last stage alone

A block is relu(x + conv(act(conv(act(conv(x)))))); all convolutions are 3 x 3, of one width. There is no norm and no
attention: what lies further away than the convolutions reach changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from difax.core.annotations import checked, choose
from difax.core.contracts import Autoencoder, Params
from difax.models.autoencoders.kl import MOST_LEVELS, doubled
from difax.models.layers import model_dtype

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": nn.relu,
    "silu": nn.silu,
    "swish": nn.silu,
    "mish": lambda x: x * jnp.tanh(nn.softplus(x)),
    "gelu": lambda x: nn.gelu(x, approximate=False),
}


class Block(nn.Module):
    """relu(x + conv(act(conv(act(conv(x))))))."""

    activation: str
    dtype: Any

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        act, width = ACTIVATIONS[self.activation], x_BHWC.shape[-1]
        h = act(nn.Conv(width, (3, 3), dtype=self.dtype, name="conv0")(x_BHWC))
        h = act(nn.Conv(width, (3, 3), dtype=self.dtype, name="conv1")(h))
        return nn.relu(x_BHWC + nn.Conv(width, (3, 3), dtype=self.dtype, name="conv2")(h))


class Encoder(nn.Module):
    """Pixels in [0, 1] to latents."""

    width: int
    blocks: tuple[int, ...]
    latents: int
    activation: str
    dtype: Any

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        x = nn.Conv(self.width, (3, 3), dtype=self.dtype, name="conv_in")(x_BHWC)
        for i, count in enumerate(self.blocks):
            if i:
                # as torch pads it: one on every side
                side = ((1, 1), (1, 1))
                x = nn.Conv(self.width, (3, 3), 2, side, use_bias=False, dtype=self.dtype, name=f"stage{i}_conv")(x)
            for j in range(count):
                x = Block(self.activation, self.dtype, name=f"stage{i}_block{j}")(x)
        return nn.Conv(self.latents, (3, 3), dtype=self.dtype, name="conv_out")(x)


class Decoder(nn.Module):
    """Latents to pixels in [0, 1]."""

    width: int
    blocks: tuple[int, ...]
    channels: int
    activation: str
    dtype: Any

    @nn.compact
    def __call__(self, z_BHWC: jax.Array) -> jax.Array:
        act = ACTIVATIONS[self.activation]
        x = act(nn.Conv(self.width, (3, 3), dtype=self.dtype, name="conv_in")(jnp.tanh(z_BHWC / 3) * 3))
        for i, count in enumerate(self.blocks):
            for j in range(count):
                x = Block(self.activation, self.dtype, name=f"stage{i}_block{j}")(x)
            if i < len(self.blocks) - 1:
                x = nn.Conv(self.width, (3, 3), use_bias=False, dtype=self.dtype, name=f"stage{i}_conv")(doubled(x))
        return nn.Conv(self.channels, (3, 3), dtype=self.dtype, name="conv_out")(x)


@checked
def autoencoder_tiny(
    width: int = 64,
    *,
    decoder_width: int | None = None,
    encoder_blocks: Sequence[int] = (1, 3, 3, 3),
    decoder_blocks: Sequence[int] = (3, 3, 3, 1),
    latents: int = 4,
    in_channels: int = 3,
    out_channels: int = 3,
    activation: str = "relu",
    scaling_factor: float = 1.0,
    shift_factor: float = 0.0,
    dtype: str | type | np.dtype = "float32",
) -> Autoencoder:
    """A small autoencoder for the latents of another one: TAESD, TAESDXL, TAESD3, TAEF1.

    z = latents / scaling_factor + shift_factor is what the decoder takes and the encoder gives; the published ones take
    the denoiser's latents as they are.

    Args:
      width: channels of every convolution (64). decoder_width: of the decoder's, where they are others (None).
      encoder_blocks: blocks of each stage, finest first, one stage more than the latents' sides are halved ((1, 3, 3,
        3)).
      decoder_blocks: of the decoder, coarsest first ((3, 3, 3, 1)).
      latents: channels of the latents (4; 16 of SD3 and FLUX.1).
      in_channels, out_channels: of the pixels (3, 3).
      activation: "relu", "silu" ("swish"), "mish" or "gelu" ("relu").
      scaling_factor: of the latents, not 0 (1). shift_factor: (0).
      dtype: "float32" or "bfloat16".

    Raises:
      ValueError: a count below 1, encoder and decoder of other numbers of stages, an unknown activation, a factor of 0.

    References: Bohan 2023, github.com/madebyollin/taesd.
    """
    choose("activation", activation, ACTIVATIONS)
    kind, ups = model_dtype("autoencoder_tiny", dtype), width if decoder_width is None else decoder_width
    counts = dict(width=width, decoder_width=ups, latents=latents, in_channels=in_channels, out_channels=out_channels)
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"autoencoder_tiny: {name}={value}; allowed: 1 or more")
    for name, blocks in (("encoder_blocks", encoder_blocks), ("decoder_blocks", decoder_blocks)):
        if not 1 <= len(blocks) <= MOST_LEVELS or min(blocks) < 0:
            raise ValueError(f"autoencoder_tiny: {name}={blocks}; allowed: 1 to {MOST_LEVELS} stages of 0 or more")
    if len(encoder_blocks) != len(decoder_blocks):
        raise ValueError(f"autoencoder_tiny: decoder_blocks={decoder_blocks}; allowed: {len(encoder_blocks)} stages")
    if scaling_factor == 0:
        raise ValueError(f"autoencoder_tiny: scaling_factor={scaling_factor}; allowed: a number, but not 0")
    encoder = Encoder(width, tuple(encoder_blocks), latents, activation, kind)
    decoder = Decoder(ups, tuple(decoder_blocks), out_channels, activation, kind)
    side = 2 ** (len(encoder_blocks) - 1)

    def init(key: jax.Array) -> Params:
        keys = jax.random.split(key)
        pixels, z = jnp.zeros((1, side, side, in_channels), kind), jnp.zeros((1, 1, 1, latents), kind)
        return {"encoder": encoder.init(keys[0], pixels)["params"], "decoder": decoder.init(keys[1], z)["params"]}

    def decode(params: Params, latents_BHWC: jax.Array) -> jax.Array:
        z = (latents_BHWC.astype(jnp.float32) / scaling_factor + shift_factor).astype(kind)
        x: Any = decoder.apply({"params": params["decoder"]}, z)
        return 2 * x.astype(jnp.float32) - 1

    def encode(params: Params, pixels_BHWC: jax.Array) -> jax.Array:
        x = ((pixels_BHWC.astype(jnp.float32) + 1) / 2).astype(kind)
        z: Any = encoder.apply({"params": params["encoder"]}, x)
        return (z.astype(jnp.float32) - shift_factor) * scaling_factor

    return Autoencoder(
        name=f"autoencoder_tiny-{width}",
        init=init,
        decode=decode,
        encode=encode,
        side=side,
        time=0,
        channels=latents,
        dtype=kind,
    )
