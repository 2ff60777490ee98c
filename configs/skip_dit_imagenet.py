"""Skip-DiT on 256 x 256 ImageNet latents: a DiT with long skips, guidance on the first 3 channels.

  difax sample --config skip_dit_imagenet:S/2 --random-init --steps 10 --cache skipcache      (costs without weights)

The argument is a variant, S/2 ... XL/8. Chen et al. 2024, arXiv:2411.17616.
"""

from ml_collections import ConfigDict


def get_config(arg: str = "XL/2") -> ConfigDict:
    """arg: the variant, "S/2" ... "XL/8"."""
    return ConfigDict(
        {
            "model": {
                "name": "skip_dit",
                "variant": arg,
                "size": 32,
                "channels": 4,
                "classes": 1000,
                "learn_sigma": True,
                "dtype": "float32",
            },
            "process": {"name": "vp_linear"},
            "prediction": "eps",
            "weights": None,
            "solver": {"name": "ddpm", "variance": "learned"},
            "grid": {"name": "uniform"},
            "steps": 250,
            "guide": {"name": "cfg", "channels": 3},
            "scale": 1.5,
            "cache": {"name": "none"},
        }
    )
