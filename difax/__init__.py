"""difax: fast Diffusion Transformers in JAX, as small pure functions that compose in one jitted sampler.

  import difax

  run = difax.load("fmnist_dit", solver="dpmpp_2m", steps=12)
  run.sample("bag,sneaker", seed=0).save("garments.png")

`load` opens a configuration or a checkpoint as a `Run`, which samples, calibrates and profiles; `train` trains one;
`plan` says what one would take on devices that are not there. The other names are the contracts
(`difax.core.contracts`) of those who write a technique of their own.
"""

import importlib
import pathlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from difax.core.contracts import (
        Accelerator,
        Attention,
        AttentionSpec,
        Classifier,
        Done,
        Guide,
        Level,
        Model,
        Plan,
        Prediction,
        Report,
        Row,
        Segments,
        Solver,
        Stage,
        Trace,
        TrunkSpec,
        Where,
    )
    from difax.run import Result, Run, load, plan, train
    from difax.training.data import Images

_here = pathlib.Path(__file__).resolve().parent
if not (_here / "models").is_dir() and (_here.parent / "models").is_dir():
    # a checkout whose in-tree links are plain files (git core.symlinks=false): find the sister folders beside us
    __path__.append(str(_here.parent))

__version__ = "0.1.0"

_CONTRACTS = (
    "Accelerator", "Attention", "AttentionSpec", "Classifier", "Done", "Guide", "Level", "Model", "Plan", "Prediction",
    "Report", "Row", "Segments", "Solver", "Stage", "Trace", "TrunkSpec", "Where",
)  # fmt: skip
# what is heavy is imported when it is first asked for: `import difax` alone takes milliseconds
_HOMES = {
    **dict.fromkeys(("Result", "Run", "load", "plan", "train"), "difax.run"),
    **dict.fromkeys(_CONTRACTS, "difax.core.contracts"),
    "Images": "difax.training.data",
}

__all__ = [
    "Accelerator", "Attention", "AttentionSpec", "Classifier", "Done", "Guide", "Images", "Level", "Model", "Plan",
    "Prediction", "Report", "Result", "Row", "Run", "Segments", "Solver", "Stage", "Trace", "TrunkSpec", "Where",
    "load", "plan", "train",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'difax' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
