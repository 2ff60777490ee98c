"""DiT on 256 x 256 ImageNet latents as published: DDPM, learned variance, guidance on the first 3 channels.

  difax sample --config dit_imagenet:XL/2 --weights DiT-XL-2-256x256.safetensors --labels 207,360
  difax sample --config dit_imagenet:S/2 --random-init --steps 10      (costs without weights)

The argument is a variant, S/2 ... XL/8. Images are latents [32, 32, 4]; decode them with the VAE of the checkpoint.
Peebles & Xie 2022, arXiv:2212.09748: 118.6 GMACs an evaluation and FID 2.27 for XL/2 with 250 steps, scale 1.5.
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
