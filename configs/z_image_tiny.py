"""A Z-Image of one refiner a stream and two blocks with random weights: for tests, and for trying techniques on it.

  difax sample --config z_image_tiny

Z-Image Team 2025, arXiv:2511.22699.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "model": {
                "name": "z_image",
                "depth": 2,
                "refiner_depth": 1,
                "width": 64,
                "heads": 4,
                "size": 16,
                "channels": 4,
                "text_tokens": 40,
                "text_width": 32,
                "time_hidden": 64,
                "axes_dim": (4, 6, 6),
                "dtype": "float32",
            },
            "process": {"name": "flow", "shift": 3.0},
            "prediction": "velocity",
            "weights": "random",
            "solver": {"name": "euler"},
            "grid": {"name": "shifted"},
            "steps": 8,
            "guide": {"name": "cfg"},
            "scale": 5.0,
            "cache": {"name": "none"},
        }
    )
