"""A Qwen-Image of two narrow blocks with random weights: masked text and two streams in seconds on a CPU.

  difax sample --config qwen_image_tiny

Qwen Team 2025, arXiv:2508.02324.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "model": {
                "name": "qwen_image",
                "depth": 2,
                "width": 64,
                "heads": 4,
                "size": 16,
                "channels": 4,
                "text_tokens": 8,
                "text_width": 32,
                "axes_dim": (4, 6, 6),
                "dtype": "float32",
            },
            "process": {"name": "flow", "shift": 3.0},
            "prediction": "velocity",
            "weights": "random",
            "solver": {"name": "euler"},
            "grid": {"name": "shifted"},
            "steps": 8,
            "guide": {"name": "cfg", "norm": "patch"},
            "scale": 4.0,
            "cache": {"name": "none"},
        }
    )
