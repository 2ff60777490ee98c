"""A Skip-DiT of three and three narrow blocks with random weights: long skips, and what caches make of them, in seconds.

difax sample --config skip_dit_tiny --random-init
difax sample --config skip_dit_tiny --random-init --cache skipcache --cache.blocks 1
"""

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    """No arguments."""
    if arg:
        raise ValueError(f"config skip_dit_tiny takes no argument, got {arg!r}")
    return ConfigDict(
        {
            "model": {
                "name": "skip_dit",
                "depth": 6,
                "width": 48,
                "heads": 4,
                "patch": 2,
                "size": 16,
                "channels": 4,
                "classes": 10,
                "learn_sigma": True,
                "dtype": "float32",
            },
            "process": {"name": "vp_linear"},
            "prediction": "eps",
            "weights": "random",
            "solver": {"name": "ddim"},
            "grid": {"name": "uniform"},
            "steps": 10,
            "guide": {"name": "cfg", "channels": 3},
            "scale": 1.5,
            "cache": {"name": "none"},
        }
    )
