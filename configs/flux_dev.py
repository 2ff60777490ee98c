"""FLUX.1 dev on latents of a given image size: rectified flow whose guidance scale is an input of the network.

  difax sample --config flux_dev --weights flux1-dev.safetensors
  difax sample --config flux_dev:768x1360 --random-init        (costs without weights)

The argument is the image's size in pixels: a side, or height x width, divisible by 16. Latents are [H/8, W/8, 16];
decode them with the autoencoder of the checkpoint. The condition's `guidance` is 3.5 in the published pipelines.
Black Forest Labs 2024, https://github.com/black-forest-labs/flux: 50 steps there, 28 in diffusers. Times are shifted
by s = exp(mu) with mu linear in the number of image tokens, 0.5 for 256 and 1.15 for 4096 (1024 x 1024 pixels),
whichever way the size is set; `process.shift` is another shift.
"""

from ml_collections import ConfigDict


def latent_size(name: str, arg: str) -> tuple[int, int]:
    """Latent height and width of "1024" or "768x1360"."""
    sides = arg.split("x") * (1 if "x" in arg else 2)
    if len(sides) != 2 or not all(s.isdecimal() and int(s) and int(s) % 16 == 0 for s in sides):
        raise ValueError(f"config {name}:{arg}; allowed: pixels divisible by 16, such as 1024 or 768x1360")
    return int(sides[0]) // 8, int(sides[1]) // 8


def get_config(arg: str = "1024") -> ConfigDict:
    """arg: the image's size in pixels, "1024" or "768x1360" (height x width)."""
    height, width = latent_size("flux_dev", arg)
    return ConfigDict(
        {
            "model": {
                "name": "flux",
                "variant": "dev",
                "size": (height, width),
                "dtype": "bfloat16",
            },
            "process": {"name": "flow", "shift": None, "shift_by": "flux"},
            "prediction": "velocity",
            "weights": None,
            # drawn with in place of the whole where that does not fit into memory (--random-init)
            "reduced": {"model": {"double_depth": 1, "single_depth": 1, "size": 32}, "steps": 4},
            "attend": {"name": "chunked"},
            "solver": {"name": "euler"},
            "grid": {"name": "shifted"},
            "steps": 28,
            "guide": {"name": "none"},
            "scale": 1.0,
            "cache": {"name": "none"},
        }
    )
