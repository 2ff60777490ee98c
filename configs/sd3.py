"""Stable Diffusion 3 and 3.5 on latents of 1024 x 1024 pixels: rectified flow shifted by 3, with guidance.

  difax sample --config sd3 --weights sd3_medium.safetensors --cond prompts.safetensors
  difax sample --config sd3:3.5-large --random-init       (costs without weights)

The argument is the model: medium (3), 3.5-medium, 3.5-large or 3.5-large-turbo, which is distilled to 4 steps without
guidance. Prompts are embeddings of 333 tokens and pooled ones. Other sizes are `model.size=(96, 168)`: an eighth of
the pixels. Steps and guidance are those of the models' pages; times are diffusers' own for them.
Esser et al. 2024, arXiv:2403.03206; Stability AI 2024, https://github.com/Stability-AI/sd3.5.
"""

from ml_collections import ConfigDict

# name -> steps, guidance scale (1: none)
VARIANTS = {
    "medium": (28, 7.0),
    "3.5-medium": (40, 4.5),
    "3.5-large": (28, 3.5),
    "3.5-large-turbo": (4, 1.0),
}


def get_config(arg: str = "medium") -> ConfigDict:
    """arg: "medium", "3.5-medium", "3.5-large" or "3.5-large-turbo"."""
    if arg not in VARIANTS:
        raise ValueError(f"config sd3:{arg}; allowed: {', '.join(VARIANTS)}")
    steps, scale = VARIANTS[arg]
    dual = (0,) if arg == "3.5-medium" else ()
    return ConfigDict(
        {
            "model": {
                "name": "sd3",
                "variant": arg,
                "size": (128, 128),
                "dtype": "bfloat16",
            },
            "process": {"name": "flow", "shift": 3.0},
            "prediction": "velocity",
            "weights": None,
            # drawn with in place of the whole where that does not fit into memory (--random-init)
            "reduced": {"model": {"depth": 3, "dual_layers": dual, "position_rows": 32, "size": 32}, "steps": 4},
            "attend": {"name": "chunked"},
            "solver": {"name": "euler"},
            "grid": {"name": "flow_match"},
            "steps": steps,
            "guide": {"name": "none" if scale == 1 else "cfg"},
            "scale": scale,
            "cache": {"name": "none"},
        }
    )
