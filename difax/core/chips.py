"""Chips by name: what their makers publish of them, and targets of several, such as "v5e:4x4", that need not be there.

A figure is the maker's peak, which no program reaches; each has its source beside it. Nothing here imports jax or a
compiler: `environment` says what a process needs before it does, and `devices` asks the compiler for them in it.
"""

from __future__ import annotations

import importlib.util
import math
import os
import pathlib
from typing import Any, NamedTuple

from difax.core.annotations import choose
from difax.core.extras import needs

GIB, MIB = 2**30, 2**20


class Chip(NamedTuple):
    """What is published of one chip.

    platform: "tpu", "gpu" or "cpu". memory: bytes of HBM, and usable: of them, what its compiler lets a program take.
    bandwidth: bytes/s to and from HBM. rates: {type of both operands: operations/s of dense products}. link, links:
    bytes/s of one link in one direction, and how many links a chip has. on_chip: bytes of VMEM (TPU) or L2 (GPU).
    axes: how many numbers its topology has. Zero, or no rate, is what nobody publishes.
    """

    platform: str
    memory: int
    usable: int
    bandwidth: float
    rates: dict[str, float]
    link: float
    links: int
    on_chip: int
    axes: int


# TPU: published by Google Cloud (cloud.google.com/tpu/docs/v4, v5e, v5p, v6e): HBM, HBM bandwidth, peak compute a chip,
# and interconnect a chip in Gbit/s, here divided by the links of its torus (2D: 4, 3D: 6). usable: what libtpu 0.0.48
# says when a program does not fit ("Used ... of 15.75G hbm"). VMEM: jax's own table of TPUs (both cores of v4, v5p).
# GPU: published by NVIDIA (H100 and H200 SXM data sheets), dense rates: half of those "with sparsity"; NVLink 900 GB/s
# is 18 links of 25 GB/s a direction; L2 50 MB. The driver keeps some of the memory: 79.2 and 139.8 GiB are left.
CHIPS: dict[str, Chip] = {
    # 32 GB, 1228 GB/s, 275 TFLOP/s bf16 or int8, 2400 Gbit/s over 6 links
    "v4": Chip("tpu", 32 * GIB, int(30.75 * GIB), 1228e9, {"bfloat16": 275e12, "int8": 275e12}, 50e9, 6, 32 * MIB, 3),
    # 16 GB, 819 GB/s, 197 TFLOP/s bf16, 394 TOP/s int8, 1600 Gbit/s over 4 links
    "v5e": Chip("tpu", 16 * GIB, int(15.75 * GIB), 819e9, {"bfloat16": 197e12, "int8": 394e12}, 50e9, 4, 128 * MIB, 2),
    # 95 GB (of 96 GiB), 2765 GB/s, 459 TFLOP/s bf16, 918 TOP/s int8, 4800 Gbit/s over 6 links
    "v5p": Chip(
        "tpu", 96 * GIB, int(95.73 * GIB), 2765e9, {"bfloat16": 459e12, "int8": 918e12}, 100e9, 6, 128 * MIB, 3
    ),
    # 32 GB, 1640 GB/s, 918 TFLOP/s bf16, 1836 TOP/s int8, 3200 Gbit/s over 4 links
    "v6e": Chip(
        "tpu", 32 * GIB, int(31.24 * GIB), 1640e9, {"bfloat16": 918e12, "int8": 1836e12}, 100e9, 4, 128 * MIB, 2
    ),
    # 80 GB, 3.35 TB/s, 989 TFLOP/s bf16, 1979 fp8 and int8
    "h100": Chip(
        "gpu",
        80 * GIB,
        int(79.2 * GIB),
        3.35e12,
        {"bfloat16": 989e12, "float16": 989e12, "int8": 1979e12, "float8_e4m3fn": 1979e12},
        25e9,
        18,
        50 * MIB,
        1,
    ),
    # 141 GB, 4.8 TB/s, the rates of the H100
    "h200": Chip(
        "gpu",
        141 * GIB,
        int(139.8 * GIB),
        4.8e12,
        {"bfloat16": 989e12, "float16": 989e12, "int8": 1979e12, "float8_e4m3fn": 1979e12},
        25e9,
        18,
        50 * MIB,
        1,
    ),
    # a processor's peaks are its model's; difax does not guess them
    "cpu": Chip("cpu", 0, 0, 0.0, {}, 0.0, 0, 0, 1),
}

EXAMPLES = {"v4": "v4:2x2x1", "v5e": "v5e:4x4", "v5p": "v5p:2x2x2", "v6e": "v6e:2x4", "cpu": "cpu:8"}
MOST = 1024  # devices of a target


class Absent(NamedTuple):
    """A target: its name as it was given, the name of its chip, and how many of them along each axis."""

    name: str
    chip: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """How many devices there are."""
        return math.prod(self.shape)

    @property
    def published(self) -> Chip:
        """What is published of its chip."""
        return CHIPS[self.chip]


def parse_target(name: str) -> Absent:
    """A target of its name: CHIP:SHAPE, the shape as long as the chip's topology has axes ("v5e:4x4", "h200:8").

    Raises:
      ValueError: an unknown chip (with the nearest match), another shape, or none that the chip comes in.
    """
    chip, _, sizes = name.partition(":")
    if chip not in CHIPS:
        allowed = [EXAMPLES.get(known, f"{known}:8") for known in CHIPS]
        choose("target", name if ":" in name else f"{name}:", [*allowed]) if name in allowed else None
        try:
            choose("chip", chip, CHIPS)
        except ValueError as error:
            nearest = f"{error}".partition(";")[0]
            raise ValueError(f"target {name}: {nearest}; allowed: {', '.join(allowed)}") from None
    example, axes = EXAMPLES.get(chip, f"{chip}:8"), CHIPS[chip].axes
    shape = tuple(int(size) for size in sizes.split("x") if size.isdecimal() and len(size) < 6)
    if len(shape) != len(sizes.split("x")) or len(shape) != axes or min(shape) < 1:
        what = "one number" if axes == 1 else f"{axes} numbers with x between them"
        raise ValueError(f"target {name}: a {chip} target has {what}; allowed: such as {example}")
    if math.prod(shape) > MOST:
        raise ValueError(f"target {name} has {math.prod(shape)} devices; allowed: up to {MOST}")
    return Absent(name, chip, shape)


def check_compiler(target: Absent) -> None:
    """Refuses a target whose compiler is not installed; looks for it and loads nothing.

    Raises:
      ValueError: names the extra that brings it.
    """
    packages = {"tpu": ("libtpu",), "gpu": ("jax_cuda13_plugin",), "cpu": ()}[target.published.platform]
    needs(f"--target {target.name}", *packages)


def environment(target: Absent) -> dict[str, str]:
    """What the environment of a process must hold, before it imports jax, to compile for a target that is not there."""
    found = {"JAX_PLATFORMS": "cpu"}
    if target.chip == "cpu":
        flags = [f for f in os.environ.get("XLA_FLAGS", "").split() if "host_platform_device_count" not in f]
        found["XLA_FLAGS"] = " ".join([*flags, f"--xla_force_host_platform_device_count={target.size}"])
    elif target.published.platform == "tpu":
        # libtpu asks a metadata server and takes a lock unless it is told who it is; any accelerator's name will do
        found |= {
            "TPU_SKIP_MDS_QUERY": "1",
            "TPU_ACCELERATOR_TYPE": "v5litepod-8",
            "TPU_WORKER_HOSTNAMES": "localhost",
            "TPU_WORKER_ID": "0",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
            "TPU_STDERR_LOG_LEVEL": "3",
            "TPU_MIN_LOG_LEVEL": "3",
        }
    else:
        found["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
        spec = importlib.util.find_spec("nvidia")
        for place in [] if spec is None else spec.submodule_search_locations or []:
            for tools in pathlib.Path(place).glob("*/bin"):
                if (tools / "ptxas").exists():
                    found["PATH"] = f"{tools}{os.pathsep}{os.environ.get('PATH', '')}"
    return found


def devices(target: Absent) -> list[Any]:
    """The devices of a target, in a process that was started with its `environment`.

    Raises:
      ValueError: a shape that its compiler does not know.
    """
    import jax
    from jax.experimental import topologies

    if target.chip == "cpu":
        there = jax.devices("cpu")
        if len(there) < target.size:
            raise ValueError(f"target {target.name}: this process has {len(there)} devices; allowed: a new process")
        return there[: target.size]
    if target.published.platform == "gpu":
        options: dict[str, Any] = {
            "platform": "cuda",
            "target_config": target_config(target.chip),
            "topology": f"1x{-(-target.size // 8)}x{min(target.size, 8)}",
        }
    else:
        options = {"platform": "tpu", "topology_name": target.name}
        if target.size == 1:  # a host has four chips or eight unless it is told otherwise
            options["chips_per_host_bounds"] = (1, 1, 1)
        if target.chip == "v4":  # both cores of a chip as one device, as jax has them on a v4
            options["chip_config_name"] = "megacore"
    try:
        found = list(topologies.get_topology_desc(**options).devices)
    except Exception as error:
        why = " ".join(str(error).split())[:200]
        raise ValueError(f"target {target.name}: its compiler does not know that shape ({why})") from None
    if len(found) != target.size:
        raise ValueError(f"target {target.name}: its compiler has {len(found)} devices of that name, not {target.size}")
    return found


# what XLA's GPU compiler asks of a device; the rest of the figures are those of every Hopper
_DEVICES = {"h100": ("NVIDIA H100 80GB HBM3", 3_350_000_000_000), "h200": ("NVIDIA H200", 4_800_000_000_000)}
_HOPPER = """gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth}
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: {memory}
  shared_memory_per_block_optin: 232448
  cuda_compute_capability {{ major: 9 feature_extension: ACCELERATED_FEATURES }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  device_vendor: "NVIDIA Corporation"
  platform_version: "Compute Capability 9.0a"
  model_str: "{kind}"
  device_address_bits: 64
  pcie_bandwidth: 34359738368
  name: "{kind}"
  driver_version: "13.0.0"
  runtime_version: "12.8.0"
  compile_time_toolkit_version: "12.8.0"
  dnn_version: "9.10.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{kind}"
"""


def target_config(chip: str) -> str:
    """XLA's description of a GPU that is not there, a text proto (`stream_executor.GpuTargetConfigProto`)."""
    kind, bandwidth = _DEVICES[chip]
    return _HOPPER.format(kind=kind, bandwidth=bandwidth, memory=CHIPS[chip].usable)
