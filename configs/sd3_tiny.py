"""A Stable Diffusion 3.5 of three blocks, one of each kind, with random weights: for tests and for trying techniques.

  difax sample --config sd3_tiny

Esser et al. 2024, arXiv:2403.03206.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "model": {
                "name": "sd3",
                "depth": 3,
                "width": 64,
                "heads": 4,
                "dual_layers": (0,),
                "qk_norm": True,
                "position_rows": 12,
                "base_size": 8,
                "size": 16,
                "channels": 4,
                "text_tokens": 8,
                "text_width": 32,
                "pooled_width": 16,
                "dtype": "float32",
            },
            "process": {"name": "flow", "shift": 3.0},
            "prediction": "velocity",
            "weights": "random",
            "solver": {"name": "euler"},
            "grid": {"name": "flow_match"},
            "steps": 8,
            "guide": {"name": "cfg"},
            "scale": 4.0,
            "cache": {"name": "none"},
        }
    )
