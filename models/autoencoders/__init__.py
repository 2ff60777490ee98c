"""Autoencoders between pixels and latents, one file each. Import as `difax.models.autoencoders`.

found = find_autoencoder("FOLDER/vae")
params = load_foreign("FOLDER/vae", found)
pixels = jax.jit(found.model.decode)(params, latents)
"""

if __name__ != "difax.models.autoencoders":
    raise ImportError(f"import difax.models.autoencoders, not {__name__}: one identity per module")

import os
from typing import Any

from difax.core.annotations import choose
from difax.models.autoencoders import kl_checkpoint, tiny_checkpoint, wan_checkpoint
from difax.weights.checkpoint import tensor_shapes
from difax.weights.published import Foreign, Published, naming, read_config

# the class in model_index.json and config.json -> what finds it in a file
AUTOENCODERS: dict[str, Published] = {
    "AutoencoderKL": kl_checkpoint.KL,
    "AutoencoderKLFlux2": kl_checkpoint.FLUX2,
    "AutoencoderTiny": tiny_checkpoint.PUBLISHED,
    "AutoencoderKLWan": wan_checkpoint.PUBLISHED,
    "AutoencoderKLQwenImage": wan_checkpoint.PUBLISHED,
}


def find_autoencoder(path: str | os.PathLike, dtype: str = "float32", **overrides: Any) -> Foreign:
    """The autoencoder of a published folder or file, by the class in its config.json, or without one by its tensors.

    Args:
      path: a folder with config.json and weights (FOLDER/vae), a .safetensors file or the .index.json of a sharded one.
      dtype: "float32" or "bfloat16", of what is computed, whatever the weights are stored in ("float32").
      **overrides: arguments of the class's factory, which win over what was found (scaling_factor, ...).

    Returns:
      `Foreign`, whose `model` is the `Autoencoder`; `difax.weights.published.load_foreign(path, found)` reads its
      parameters.

    Raises:
      ValueError: an unknown class (the nearest is named), a key of config.json that is not honoured, missing or surplus
        tensors, no file.
    """
    file, config = read_config(path, {})
    if config:
        try:
            kind = choose("autoencoder", config["_class_name"], AUTOENCODERS)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None
    else:
        names = tensor_shapes(path)
        kind = max(AUTOENCODERS, key=lambda name: AUTOENCODERS[name].known(names))
    with naming(path):
        return AUTOENCODERS[kind].find(path, dtype=dtype, **overrides)._replace(kind=kind)
