"""PixArt-alpha XL/2 as published: text to image from T5-XXL embeddings, DPM-Solver++ in 20 steps, guidance 4.5.

  difax sample --config pixart_alpha --weights PixArt-XL-2-1024-MS/transformer --cond prompts.safetensors
  difax sample --config pixart_alpha:512 --random-init --steps 4      (costs without weights)

The argument is the side of the image in pixels: 1024 (micro-conditioned), 512 or 256; latents are an eighth of it.
Prompts are embeddings of 120 tokens with their masks; decode the latents with the VAE of the checkpoint.
Chen et al. 2023, arXiv:2310.00426.
"""

from ml_collections import ConfigDict

SIZES = ("1024", "512", "256")


def get_config(arg: str = "1024") -> ConfigDict:
    """arg: "1024", "512" or "256" pixels."""
    if arg not in SIZES:
        raise ValueError(f"config pixart_alpha:{arg}; allowed: {', '.join(SIZES)}")
    return ConfigDict(
        {
            "model": {
                "name": "pixart",
                "variant": "alpha",
                "size": int(arg) // 8,
                "channels": 4,
                "text_tokens": 120,
                "learn_sigma": True,
                "dtype": "bfloat16",
            },
            "process": {"name": "vp_linear"},
            "prediction": "eps",
            "weights": None,
            "solver": {"name": "dpmpp_2m"},
            "grid": {"name": "uniform"},
            "steps": 20,
            "guide": {"name": "cfg"},
            "scale": 4.5,
            "cache": {"name": "none"},
        }
    )
