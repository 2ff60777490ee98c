"""Wan 2.1 text-to-video as published: 81 frames from umT5-XXL embeddings, 50 steps, guidance 5, shifted times.

  difax sample --config wan2_1 --weights Wan2.1-T2V-1.3B --cond prompts.safetensors
  difax sample --config wan2_1:14B-720p --weights Wan2.1-T2V-14B-Diffusers/transformer --cond prompts.safetensors

The argument is a variant and, for 14B, may name the resolution: 480p is 480 x 832 pixels with a shift of 3, 720p is
720 x 1280 with a shift of 5, and other sizes of the model have the shift that follows (`difax.core.process.wan_shift`).
Latents are a quarter of the frames (plus one) and an eighth of the sides; decode them
with Wan's VAE. The authors' default solver is UniPC, DPM-Solver++ the other that they offer.
Wan Team 2025, arXiv:2503.20314.
"""

from ml_collections import ConfigDict

# argument -> variant, size of the latents
CASES = {"1.3B": ("1.3B", (21, 60, 104)), "14B": ("14B", (21, 60, 104)), "14B-720p": ("14B", (21, 90, 160))}


def get_config(arg: str = "1.3B") -> ConfigDict:
    """arg: "1.3B" or "14B" (480p), or "14B-720p"."""
    if arg not in CASES:
        raise ValueError(f"config wan2_1:{arg}; allowed: {', '.join(CASES)}")
    variant, size = CASES[arg]
    return ConfigDict(
        {
            "model": {
                "name": "wan",
                "variant": variant,
                "size": size,
                "channels": 16,
                "text_tokens": 512,
                "dtype": "bfloat16",
            },
            "process": {"name": "flow", "shift": None, "shift_by": "wan"},
            "prediction": "velocity",
            "weights": None,
            "reduced": {"model": {"depth": 1, "size": (3, 16, 16)}, "steps": 2},
            "attend": {"name": "chunked"},
            "solver": {"name": "dpmpp_2m"},
            "grid": {"name": "shifted"},
            "steps": 50,
            "guide": {"name": "cfg"},
            "scale": 5.0,
            "cache": {"name": "none"},
        }
    )
