"""A small convolutional classifier: the judge of what difax samples. Its penultimate layer is the feature space of
the Frechet distance.

  stem    conv 4 x 4, stride 2 -> width               14 x 14
  fine    h + conv 3 x 3                              14 x 14
  down    conv 4 x 4, stride 2 -> 3 width               7 x 7
  coarse  h + conv 3 x 3, `depth` times                 7 x 7
  last    conv 4 x 4, stride 2 -> 64                    3 x 3
  dense, relu -> features; dense -> logits

Each conv is followed by a norm over the whole image and a relu. The positions of the last one are kept, not averaged:
a sleeve is what it is by where it is, and learning is several times faster.

A convolution is one two-dimensional product over unfolded patches, the form that `difax.core.ops.dot` is fast in.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from difax.core.contracts import Classifier, Params
from difax.models.layers import Dense, check_size, model_dtype

LAST = 64  # channels of the last convolution


class ConvNorm(nn.Module):
    """relu(norm(conv(x))): square kernel, "same" padding, statistics of the norm over each whole image."""

    features: int
    kernel: int
    stride: int = 1

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        he = nn.initializers.variance_scaling(2.0, "fan_in", "truncated_normal")
        y = Dense(self.features, kernel_init=he, name="conv")(unfold(x_BHWC, self.kernel, self.stride))
        return nn.relu(nn.GroupNorm(1, dtype=x_BHWC.dtype, name="norm")(y))


class Backbone(nn.Module):
    """Images [B, H, W, C] to features [B, F]."""

    width: int
    depth: int
    features: int
    dtype: Any

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        h = ConvNorm(self.width, 4, 2, name="stem")(x_BHWC.astype(self.dtype))
        h = h + ConvNorm(self.width, 3, name="fine")(h)
        h = ConvNorm(3 * self.width, 4, 2, name="down")(h)
        for i in range(self.depth):
            h = h + ConvNorm(3 * self.width, 3, name=f"coarse{i}")(h)
        h = ConvNorm(LAST, 4, 2, name="last")(h)
        return nn.relu(Dense(self.features, name="features")(h.astype(jnp.float32).reshape(len(h), -1)))


def unfold(x_BHWC: jax.Array, kernel: int, stride: int) -> jax.Array:
    """[B, H, W, C] -> [B, H // s, W // s, k k C]: the zero-padded patch of each output, over row, column, channel."""
    before = (kernel - stride) // 2
    after = kernel - stride - before
    _, height, width, _ = x_BHWC.shape
    x = jnp.pad(x_BHWC, ((0, 0), (before, after), (before, after), (0, 0)))
    shifted = [
        x[:, i : i + height - stride + 1 : stride, j : j + width - stride + 1 : stride]
        for i in range(kernel)
        for j in range(kernel)
    ]
    return jnp.concatenate(shifted, axis=-1)


def cnn(
    width: int = 24,
    *,
    depth: int = 2,
    features: int = 128,
    size: int = 28,
    channels: int = 1,
    classes: int = 10,
    dtype: str | type | np.dtype = "float32",
) -> Classifier:
    """A small convolutional classifier.

    Args:
      width: channels of the first half; the second half has 3 width (24).
      depth: residual convolutions at a quarter of the resolution (2).
      features: of the penultimate layer (128).
      size, channels: of the square images; size divisible by 4 (28, 1).
      classes: number of labels (10).
      dtype: "float32" or "bfloat16", of the convolutions; features and logits are float32.

    Raises:
      ValueError: a size that does not divide, a count below 1, another dtype.
    """
    counts = dict(width=width, depth=depth, features=features, size=size, channels=channels, classes=classes)
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"cnn: {name}={value}; allowed: 1 or more")
    if size % 4:
        raise ValueError(f"cnn: size={size} must be divisible by 4")
    if depth > 1000:
        raise ValueError(f"cnn: depth={depth}; allowed: up to 1000")  # each is traced by itself
    check_size("cnn", (size, size), channels, (size // 2) ** 2, 16 * width)
    backbone = Backbone(width, depth, features, model_dtype("cnn", dtype))
    output = Dense(classes)

    def init(key: jax.Array) -> Params:
        backbone_key, output_key = jax.random.split(key)
        return {
            "backbone": backbone.init(backbone_key, jnp.zeros((1, size, size, channels)))["params"],
            "output": output.init(output_key, jnp.zeros((1, features)))["params"],
        }

    def extract(params: Params, images: jax.Array) -> Any:
        return backbone.apply({"params": params["backbone"]}, images)

    def logits(params: Params, features_BF: jax.Array) -> Any:
        return output.apply({"params": params["output"]}, features_BF)

    return Classifier(
        name=f"cnn-{width}x{depth}",
        init=init,
        features=extract,
        logits=logits,
        input_shape=(size, size, channels),
        width=features,
        classes=classes,
    )
