"""SiT on 256 x 256 ImageNet latents: the network of DiT with a straight path and a velocity prediction.

  difax sample --config sit_imagenet:XL/2 --weights SiT-XL-2-256.safetensors --labels 207,360

The argument is a variant, S/2 ... XL/8. Ma et al. 2024, arXiv:2401.08740.
"""

from ml_collections import ConfigDict


def get_config(arg: str = "XL/2") -> ConfigDict:
    """arg: the variant, "S/2" ... "XL/8"."""
    return ConfigDict(
        {
            "model": {
                "name": "dit",
                "variant": arg,
                "size": 32,
                "channels": 4,
                "classes": 1000,
                "learn_sigma": True,
                "dtype": "float32",
            },
            "process": {"name": "sit"},
            "prediction": "velocity",
            "weights": None,
            "solver": {"name": "heun"},
            "grid": {"name": "uniform"},
            "steps": 125,
            "guide": {"name": "cfg", "channels": 3},
            "scale": 1.5,
            "cache": {"name": "none"},
        }
    )
