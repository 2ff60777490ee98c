"""Z-Image on latents of a given image size: the base model, guided, or the distilled one of eight steps.

  difax sample --config z_image --weights Z-Image/transformer --cond prompts.safetensors
  difax sample --config z_image:turbo --weights Z-Image-Turbo/transformer --cond prompts.safetensors
  difax sample --config z_image:turbo-768x1360 --random-init                     (costs without weights)

The argument is "base" or "turbo" and, behind a hyphen, the image's size in pixels: a side, or height x width,
divisible by 16 (1024). Latents are [H/8, W/8, 16]; decode them with FLUX.1's autoencoder. The published scale of the
base model is 5 where guidance is c + 5 (c - u): a scale of 6 here, where 1 is unguided. Its pipeline ends the grid at
1/n before the shift, as the grid `shifted` does.
Z-Image Team 2025, arXiv:2511.22699.
"""

from ml_collections import ConfigDict

from difax.configs.flux_dev import latent_size

# variant -> steps, guide, scale
VARIANTS = {"base": (50, "cfg", 6.0), "turbo": (8, "none", 1.0)}


def get_config(arg: str = "base") -> ConfigDict:
    """arg: "base" or "turbo", and a size: "turbo-1024", "base-768x1360" (height x width)."""
    variant, _, size = arg.partition("-")
    if variant not in VARIANTS:
        raise ValueError(f"config z_image:{arg}; allowed: {', '.join(VARIANTS)}, and a size, such as turbo-768x1360")
    height, width = latent_size("z_image", size or "1024")
    steps, guide, scale = VARIANTS[variant]
    return ConfigDict(
        {
            "model": {"name": "z_image", "size": (height, width), "dtype": "bfloat16"},
            "process": {"name": "flow", "shift": 3.0},
            "prediction": "velocity",
            "weights": None,
            # drawn with in place of the whole where that does not fit into memory (--random-init)
            "reduced": {"model": {"depth": 1, "refiner_depth": 1, "size": 32}, "steps": 4},
            "attend": {"name": "chunked"},
            "solver": {"name": "euler"},
            "grid": {"name": "shifted"},
            "steps": steps,
            "guide": {"name": guide},
            "scale": scale,
            "cache": {"name": "none"},
        }
    )
