"""A FLUX.2 of two double and two single blocks with random weights: modulations that all blocks share, on a CPU.

  difax sample --config flux2_tiny            (as klein: no guidance embedding)
  difax sample --config flux2_tiny:dev        (with one)

Black Forest Labs 2025, https://github.com/black-forest-labs/flux2.
"""

from ml_collections import ConfigDict

VARIANTS = ("klein", "dev")


def get_config(arg: str = "klein") -> ConfigDict:
    """arg: "klein" or "dev"."""
    if arg not in VARIANTS:
        raise ValueError(f"config flux2_tiny:{arg}; allowed: {', '.join(VARIANTS)}")
    return ConfigDict(
        {
            "model": {
                "name": "flux2",
                "double_depth": 2,
                "single_depth": 2,
                "width": 64,
                "heads": 4,
                "ffn": 192,
                "text_width": 32,
                "guidance_embedding": arg == "dev",
                "size": 8,
                "channels": 16,
                "text_tokens": 8,
                "axes_dim": (4, 4, 4, 4),
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
