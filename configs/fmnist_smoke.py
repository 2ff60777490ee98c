"""A small DiT on Fashion-MNIST for 40 steps: seconds on a CPU, to see every part of training work.

difax train --config fmnist_smoke --workdir runs/smoke        (rectified flow)
difax train --config fmnist_smoke:ddpm --workdir runs/smoke   (DDPM with learned variance)
"""

from ml_collections import ConfigDict

VARIANTS = ("flow", "ddpm")


def get_config(arg: str = "flow") -> ConfigDict:
    """arg: "flow" or "ddpm"."""
    if arg not in VARIANTS:
        raise ValueError(f"config fmnist_smoke:{arg}; allowed: {', '.join(VARIANTS)}")
    ddpm = arg == "ddpm"
    return ConfigDict(
        {
            "model": {
                "name": "dit",
                "depth": 3,
                "width": 64,
                "heads": 2,
                "patch": 4,
                "size": 28,
                "channels": 1,
                "classes": 10,
                "learn_sigma": ddpm,
                "dtype": "float32",
            },
            "process": {"name": "vp_linear" if ddpm else "flow"},
            "prediction": "eps" if ddpm else "velocity",
            "weights": None,
            "solver": {"name": "ddpm", "variance": "learned"} if ddpm else {"name": "euler"},
            "grid": {"name": "uniform"},
            "steps": 10,
            "guide": {"name": "cfg"},
            "scale": 2.0,
            "cache": {"name": "none"},
            "data": {"name": "fashion_mnist"},
            "loss": {"name": arg, "label_dropout": 0.1},
            "train": {
                "steps": 40,
                "batch": 16,
                "learning_rate": 1e-3,
                "warmup": 5,
                "seed": 0,
                "log_every": 1,
                "sample_every": 40,
                "checkpoint_every": 10,
                "keep": 2,
            },
        }
    )
