"""A Skip-DiT of three and three narrow blocks with random weights: long skips, and a cache for them, in seconds.

difax sample --config skip_dit_tiny
difax sample --config skip_dit_tiny --cache skipcache --config.cache.blocks=1

Chen et al. 2024, arXiv:2411.17616.
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
