"""The classifier that ships with difax and judges its Fashion-MNIST samples.

  difax train --config fmnist_cnn --workdir runs/fmnist_cnn

The run behind the shipped weights is recorded in experiments/results/fmnist_cnn.
"""

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    """No arguments."""
    if arg:
        raise ValueError(f"config fmnist_cnn takes no argument, got {arg!r}")
    return ConfigDict(
        {
            "model": {
                "name": "cnn",
                "width": 24,
                "depth": 2,
                "features": 128,
                "size": 28,
                "channels": 1,
                "classes": 10,
                "dtype": "float32",
            },
            "weights": "fmnist_cnn",
            "data": {"name": "fashion_mnist"},
            "loss": {"name": "cross_entropy", "label_smoothing": 0.02, "flip": 0.0, "shift": 1},
            "train": {
                "dtype": "bfloat16",
                "steps": 2500,
                "batch": 128,
                "learning_rate": 2e-3,
                "warmup": 150,
                "decay": 1900,
                "weight_decay": 0.02,
                "b1": 0.9,
                "b2": 0.99,
                "clip": 1.0,
                "ema": 0.995,
                "seed": 0,
                "log_every": 50,
                "checkpoint_every": 500,
                "keep": 1,
            },
        }
    )
