"""A FLUX of two double and two single blocks with random weights: for tests and for trying techniques on two streams.

  difax sample --config flux_tiny

Black Forest Labs 2024, https://github.com/black-forest-labs/flux.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "model": {
                "name": "flux",
                "double_depth": 2,
                "single_depth": 2,
                "width": 64,
                "heads": 4,
                "size": 16,
                "channels": 4,
                "text_tokens": 8,
                "text_width": 32,
                "pooled_width": 16,
                "axes_dim": (4, 6, 6),
                "guidance_embedding": True,
                "dtype": "float32",
            },
            "process": {"name": "flow", "shift": 3.0},
            "prediction": "velocity",
            "weights": "random",
            "solver": {"name": "euler"},
            "grid": {"name": "shifted"},
            "steps": 8,
            "guide": {"name": "none"},
            "scale": 1.0,
            "cache": {"name": "none"},
        }
    )
