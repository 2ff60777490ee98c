"""A Wan of two narrow blocks with random weights: every part of text-to-video sampling in seconds on a CPU.

difax sample --config wan_tiny
"""

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    """No arguments."""
    if arg:
        raise ValueError(f"config wan_tiny takes no argument, got {arg!r}")
    return ConfigDict(
        {
            "model": {
                "name": "wan",
                "depth": 2,
                "width": 48,
                "heads": 4,
                "ffn": 96,
                "size": (5, 8, 12),
                "channels": 4,
                "text_tokens": 8,
                "text_width": 16,
                "dtype": "float32",
            },
            "process": {"name": "flow", "shift": 3.0},
            "prediction": "velocity",
            "weights": "random",
            "solver": {"name": "dpmpp_2m"},
            "grid": {"name": "shifted"},
            "steps": 10,
            "guide": {"name": "cfg"},
            "scale": 5.0,
            "cache": {"name": "none"},
        }
    )
