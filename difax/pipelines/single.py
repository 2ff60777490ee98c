"""A pipeline of a single file: the weights of a network as its authors published them, and components that are given.

The class of the pipeline and what its scheduler says are taken from the kind of the network, since no folder says them:
FLUX.1 as black-forest-labs/FLUX.1-dev and -schnell have it, Wan 2.1 as Wan-AI/Wan2.1-T2V-*-Diffusers have it.
"""

from __future__ import annotations

import functools
import os
import pathlib
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from difax.core.files import named
from difax.models import CHECKPOINTS
from difax.pipelines.folder import Folder
from difax.weights.checkpoint import tensor_shapes
from difax.weights.published import known

FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000}
DYNAMIC = {
    "shift": 3.0, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}  # fmt: skip
WAN = {
    "_class_name": "UniPCMultistepScheduler", "num_train_timesteps": 1000, "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
}  # fmt: skip
WAN_SMALL = 480 * 832  # pixels, up to which its authors take a shift of 3, and 5 beyond


def _flux(names: Collection[str], section: Mapping[str, Any]) -> dict[str, Any]:
    """The dev model, which is told the scale of its guidance, has a shift by the size; schnell has none."""
    return FLOW | (DYNAMIC if any("guidance" in name for name in names) else {"shift": 1.0})


def _wan(names: Collection[str], section: Mapping[str, Any]) -> dict[str, Any]:
    return WAN | {"flow_shift": 3.0 if section["height"] * section["width"] <= WAN_SMALL else 5.0}


class Single(NamedTuple):
    """A pipeline that a network's file alone stands for: its class, the components that must be given besides, and what
    its scheduler says: (names of the network's tensors, section `pipeline`) -> as scheduler_config.json has it."""

    pipeline: str
    needs: tuple[str, ...]
    scheduler: Callable[[Collection[str], Mapping[str, Any]], dict[str, Any]]


# kind of the network -> the pipeline
SINGLE = {
    "flux": Single("FluxPipeline", ("vae", "text_encoder", "text_encoder_2"), _flux),
    "wan": Single("WanPipeline", ("vae", "text_encoder"), _wan),
}


def open_single(path: str | os.PathLike, given: Mapping[str, str]) -> Folder:
    """The folder that a network's file and given components would be.

    Args:
      path: a .safetensors file in either layout of its kind, or the .index.json of a sharded one.
      given: components by name.

    Raises:
      ValueError: a file of no such network, a component that is missing, or one that the pipeline does not have.
    """
    names = tensor_shapes(path)
    count, kind = max((known(t, names), kind) for kind, p in CHECKPOINTS.items() for t in p.tables.values())
    if not count or kind not in SINGLE:
        what = f"a network of {kind}" if count else "no network that difax knows"
        raise ValueError(
            f"pipeline {named(path)}: {what}; allowed: a pipeline's folder, or a file of {' or '.join(SINGLE)}"
        )
    found = SINGLE[kind]
    flag = lambda name: f"--{name.replace('_', '-')} PATH"  # noqa: E731
    missing = [flag(name) for name in found.needs if name not in given]
    if missing:
        raise ValueError(f"pipeline {named(path)}: a {kind} alone; it needs {', '.join(missing)} beside it")
    surplus = [flag(name) for name in given if name not in found.needs]
    if surplus:
        raise ValueError(f"pipeline {named(path)}: {surplus[0]}; allowed: {', '.join(map(flag, found.needs))}")
    components = dict.fromkeys(("transformer", *found.needs), "")
    every = {"transformer": os.fspath(path), **given}
    scheduler = functools.partial(found.scheduler, tuple(names))
    return Folder(pathlib.Path(path), found.pipeline, components, {}, every, scheduler)
