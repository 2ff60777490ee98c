"""The DiT that ships with difax: class-conditional Fashion-MNIST, rectified flow, 12 blocks of width 192.

  difax train --config fmnist_dit --workdir runs/fmnist_dit            (patch 4: hours of a small CPU)
  difax train --config fmnist_dit:patch2 --workdir runs/fmnist_dit_p2  (patch 2: minutes of a data-centre GPU)

The run behind the shipped weights is recorded in experiments/results/fmnist_dit.
"""

from ml_collections import ConfigDict

VARIANTS = ("patch4", "patch2")


def get_config(arg: str = "patch4") -> ConfigDict:
    """arg: "patch4" (the weights that ship) or "patch2" (196 tokens, trained on a GPU)."""
    if arg not in VARIANTS:
        raise ValueError(f"config fmnist_dit:{arg}; allowed: {', '.join(VARIANTS)}")
    fine = arg == "patch2"
    return ConfigDict(
        {
            "model": {
                "name": "dit",
                "depth": 12,
                "width": 192,
                "heads": 3,
                "patch": 2 if fine else 4,
                "size": 28,
                "channels": 1,
                "classes": 10,
                "learn_sigma": False,
                "dtype": "float32",
            },
            "process": {"name": "flow"},
            "prediction": "velocity",
            "weights": None if fine else "fmnist_dit",
            "solver": {"name": "euler"},
            "grid": {"name": "uniform"},
            "steps": 50,
            "guide": {"name": "cfg"},
            "scale": 2.0,
            "cache": {"name": "none"},
            "data": {"name": "fashion_mnist"},
            "loss": {"name": "flow", "times": "logit_normal", "label_dropout": 0.1},
            "train": {
                "steps": 32800 if fine else 5500,
                "batch": 512 if fine else 64,
                "learning_rate": 8e-4,
                "warmup": 200,
                "decay": 8000 if fine else 1500,
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
