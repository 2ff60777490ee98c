"""The DiT that ships with difax: class-conditional Fashion-MNIST, rectified flow, 12 blocks of width 192, patch 4.

  difax train --config fmnist_dit --workdir runs/fmnist_dit

The run behind the shipped weights is recorded in experiments/results/fmnist_dit.
"""

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    """No arguments."""
    if arg:
        raise ValueError(f"config fmnist_dit takes no argument, got {arg!r}")
    return ConfigDict(
        {
            "model": {
                "name": "dit",
                "depth": 12,
                "width": 192,
                "heads": 3,
                "patch": 4,
                "size": 28,
                "channels": 1,
                "classes": 10,
                "learn_sigma": False,
                "dtype": "float32",
            },
            "process": {"name": "flow"},
            "prediction": "velocity",
            "weights": "fmnist_dit",
            "solver": {"name": "euler"},
            "grid": {"name": "uniform"},
            "steps": 50,
            "guide": {"name": "cfg"},
            "scale": 2.0,
            "cache": {"name": "none"},
            "data": {"name": "fashion_mnist"},
            "loss": {"name": "flow", "times": "logit_normal", "label_dropout": 0.1},
            "train": {
                "steps": 6000,
                "batch": 64,
                "learning_rate": 8e-4,
                "warmup": 200,
                "decay": 1500,
                "weight_decay": 0.01,
                "b1": 0.9,
                "b2": 0.99,
                "clip": 1.0,
                "ema": 0.999,
                "seed": 0,
                "log_every": 25,
                "sample_every": 500,
                "checkpoint_every": 250,
                "keep": 2,
                "dtype": "bfloat16",
            },
        }
    )
