"""The device that a program is compiled for, which need not be there: what kernels and layouts are chosen by.

What chooses at trace time (`difax.accel.attention`, the products of `difax.core.ops`) asks `target()` and never the
host's devices: a program that is compiled ahead of time for a TPU, on a machine that has none, is then the TPU's.
"""

from __future__ import annotations

import contextlib
import re
from typing import Any, NamedTuple

import jax


class Target(NamedTuple):
    """platform: "cpu", "gpu" or "tpu"; kind: as jax names the device ("NVIDIA H100 80GB HBM3", "TPU v5 lite");
    capability: of an NVIDIA GPU, (9, 0) for Hopper; (0, 0) where there is none or it is not known."""

    platform: str
    kind: str = ""
    capability: tuple[int, int] = (0, 0)


_lowered_for = jax.make_user_context(None)  # which jit keeps apart what it remembers of a function by


def target() -> Target:
    """What is compiled for: within `lowering_for` what that names, else the device that jax would run on."""
    named, chosen = _lowered_for.value, getattr(jax.config, "jax_default_device", None)
    return target_of(chosen or jax.devices()[0]) if named is None else named


def target_of(device: Any) -> Target:
    """The target that a device is, present or of a described topology; or a platform's name."""
    if isinstance(device, str):
        return Target("gpu" if device == "cuda" else device)
    platform = "gpu" if device.platform == "cuda" else device.platform
    said = re.fullmatch(r"(\d+)\.(\d+)", str(getattr(device, "compute_capability", "")))  # an AMD GPU's is no number
    major, minor = said.groups() if said and platform == "gpu" else (0, 0)
    return Target(platform, device.device_kind, (int(major), int(minor)))


def lowering_for(what: Target) -> contextlib.AbstractContextManager[None]:
    """Within it, what is traced is made for this target."""
    return _lowered_for(what)
