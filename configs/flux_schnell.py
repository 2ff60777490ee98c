"""FLUX.1 schnell on latents of a given image size: rectified flow distilled to four steps, without guidance.

  difax sample --config flux_schnell --weights flux1-schnell.safetensors
  difax sample --config flux_schnell:768x1360 --random-init        (costs without weights)

The argument is the image's size in pixels: a side, or height x width, divisible by 16. Latents are [H/8, W/8, 16];
decode them with the autoencoder of the checkpoint. Times are even, without a shift.
Black Forest Labs 2024, https://github.com/black-forest-labs/flux.
"""

from ml_collections import ConfigDict

from difax.configs.flux_dev import latent_size


def get_config(arg: str = "1024") -> ConfigDict:
    """arg: the image's size in pixels, "1024" or "768x1360" (height x width)."""
    return ConfigDict(
        {
            "model": {
                "name": "flux",
                "variant": "schnell",
                "size": latent_size("flux_schnell", arg),
                "dtype": "bfloat16",
            },
            "process": {"name": "flow", "shift": 1.0},
            "prediction": "velocity",
            "weights": None,
            "reduced": {"model": {"double_depth": 1, "single_depth": 1, "size": 32}},
            "attend": {"name": "chunked"},
            "solver": {"name": "euler"},
            "grid": {"name": "shifted"},
            "steps": 4,
            "guide": {"name": "none"},
            "scale": 1.0,
            "cache": {"name": "none"},
        }
    )
