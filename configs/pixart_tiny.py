"""A PixArt of two narrow blocks with random weights: every part of text-to-image sampling in seconds on a CPU.

difax sample --config pixart_tiny           (micro-conditioned, as alpha at 1024 pixels)
difax sample --config pixart_tiny:sigma     (without)
"""

from ml_collections import ConfigDict

VARIANTS = ("alpha", "sigma")


def get_config(arg: str = "alpha") -> ConfigDict:
    """arg: "alpha" or "sigma"."""
    if arg not in VARIANTS:
        raise ValueError(f"config pixart_tiny:{arg}; allowed: {', '.join(VARIANTS)}")
    return ConfigDict(
        {
            "model": {
                "name": "pixart",
                "depth": 2,
                "width": 48,
                "heads": 4,
                "patch": 2,
                "size": 16,
                "channels": 4,
                "text_tokens": 8,
                "text_width": 16,
                "micro_conditioning": arg == "alpha",
                "learn_sigma": True,
                "dtype": "float32",
            },
            "process": {"name": "vp_linear"},
            "prediction": "eps",
            "weights": "random",
            "solver": {"name": "dpmpp_2m"},
            "grid": {"name": "uniform"},
            "steps": 10,
            "guide": {"name": "cfg"},
            "scale": 4.5,
            "cache": {"name": "none"},
        }
    )
