"""PixArt-Sigma XL/2 as published: text to image from T5-XXL embeddings, DPM-Solver++ in 20 steps, guidance 4.5.

  difax sample --config pixart_sigma --weights PixArt-Sigma-XL-2-1024-MS/transformer --cond prompts.safetensors
  difax sample --config pixart_sigma:512 --random-init --steps 4      (costs without weights)

The argument is the side of the image in pixels: 2048, 1024, 512 or 256; latents are an eighth of it. Prompts are
embeddings of 300 tokens with their masks; decode the latents with the VAE of the checkpoint (SDXL's).
Chen et al. 2024, arXiv:2403.04692.
"""

from ml_collections import ConfigDict

SIZES = ("2048", "1024", "512", "256")


def get_config(arg: str = "1024") -> ConfigDict:
    """arg: "2048", "1024", "512" or "256" pixels."""
    if arg not in SIZES:
        raise ValueError(f"config pixart_sigma:{arg}; allowed: {', '.join(SIZES)}")
    return ConfigDict(
        {
            "model": {
                "name": "pixart",
                "variant": "sigma",
                "size": int(arg) // 8,
                "channels": 4,
                "text_tokens": 300,
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
