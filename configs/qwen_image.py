"""Qwen-Image as published: text-to-image from states of Qwen2.5-VL, 50 steps, guidance 4.

  difax sample --config qwen_image --weights Qwen-Image/transformer --cond prompts.safetensors
  difax sample --config qwen_image:928x1664 --random-init        (costs without weights)

The argument is the image's size in pixels: a side, or height x width, divisible by 16. Latents are [H/8, W/8, 16];
decode them with the autoencoder of the checkpoint (Wan 2.1's, of one frame). Times are shifted by the number of image
tokens, whichever way the size is set, and stretched so that the last one is 0.02. The guided velocity of each token is
brought to the length of the conditional one.
Qwen Team 2025, arXiv:2508.02324.
"""

from ml_collections import ConfigDict

from difax.configs.flux_dev import latent_size


def get_config(arg: str = "1024") -> ConfigDict:
    """arg: the image's size in pixels, "1024" or "928x1664" (height x width)."""
    return ConfigDict(
        {
            "model": {
                "name": "qwen_image",
                "size": latent_size("qwen_image", arg),
                "dtype": "bfloat16",
            },
            "process": {"name": "flow", "shift": None, "shift_by": "qwen_image"},
            "prediction": "velocity",
            "weights": None,
            # drawn with in place of the whole where that does not fit into memory (--random-init)
            "reduced": {"model": {"depth": 1, "size": 32}, "steps": 4},
            "attend": {"name": "chunked"},
            "solver": {"name": "euler"},
            "grid": {
                "name": "flow_match",
                "use_dynamic_shifting": True,
                "shift_terminal": 0.02,
                "sigmas": "pipeline",
            },
            "steps": 50,
            "guide": {"name": "cfg", "norm": "patch"},
            "scale": 4.0,
            "cache": {"name": "none"},
        }
    )
