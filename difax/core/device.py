"""The machine that a program runs on: its name, its memory, and the versions that figures depend on."""

from __future__ import annotations

import importlib.metadata
import os
import pathlib
import platform
import resource
from typing import Any

import jax

PLATFORMS = ("cpu", "gpu", "tpu")


def choose_platform(name: str) -> None:
    """Makes "cpu", "gpu" or "tpu" the platform of this process; before JAX has looked for devices.

    Raises:
      ValueError: another name, or a platform that is not there (says which are, and what brings it).
    """
    if name not in PLATFORMS:
        raise ValueError(f"--platform {name}; allowed: {', '.join(PLATFORMS)}")
    jax.config.update("jax_platforms", {"gpu": "cuda"}.get(name, name))
    there = _devices(f"--platform {name}", _HOW[name])[0].platform
    if there != name:
        raise ValueError(f"--platform {name}: JAX was started on {there} before; allowed: a new process")


def check_platforms() -> None:
    """Whether what JAX_PLATFORMS asks for is there; ValueError if not."""
    names = os.environ.get("JAX_PLATFORMS")
    if names and names != "cpu":
        _devices(f"JAX_PLATFORMS={names}", "allowed: cpu, what is installed, or nothing")


def _devices(asked: str, how: str) -> list[Any]:
    try:
        return jax.devices()
    except (RuntimeError, AssertionError) as error:  # the latter where jaxlib knows the name and has no plugin
        why = " ".join(str(error).split())
        raise ValueError(f"{asked}: no such device here ({why[:160] or 'no plugin'}); {how}") from None


_HOW = {
    "cpu": "allowed: an installation of jaxlib for this machine",
    "gpu": "allowed: a machine with an NVIDIA GPU, and pip install 'difax[cuda]'",
    "tpu": "allowed: a machine with a TPU, and pip install 'difax[tpu]'",
}


def device_name() -> str:
    """Platform and, where the runtime knows it, kind and number of the devices."""
    devices = jax.devices()
    return f"{devices[0].platform}:{devices[0].device_kind} x{len(devices)}"


def processor() -> str:
    """The processor's model and its matrix instructions, as Linux names them."""
    try:
        text = pathlib.Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    lines = dict(line.split(":", 1) for line in text.split("\n\n")[0].splitlines() if ":" in line)
    found = {k.strip(): v.strip() for k, v in lines.items()}
    flags = [f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f in found.get("flags", "").split()]
    return f"{found.get('model name', platform.machine())} ({', '.join(flags)})"


def versions() -> dict[str, str]:
    """Of python, difax and what its figures depend on."""
    of = {name: _version(name) for name in ("difax", "jax", "jaxlib", "flax", "numpy")}
    return {"python": platform.python_version(), **of}


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:  # a clone on the path, on a machine where nothing is installed
        return "not installed"


def memory_available() -> int:
    """Bytes that the first device has left, or the host where the device's memory is the host's."""
    stats = jax.devices()[0].memory_stats() if jax.default_backend() != "cpu" else None
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    return host_memory()


def host_memory() -> int:
    """Bytes that this process may still take on the host: what the kernel can free, within the limit of its cgroup."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    found = _numbers("/proc/meminfo").get("MemAvailable:", 0) * 1024
    group = pathlib.Path("/sys/fs/cgroup")
    try:
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        within = limit - used + _numbers(group / "memory.stat").get("inactive_file", 0)
    except (OSError, ValueError):  # no such group, or one without a limit
        return found or free
    return max(min(found or free, within), 0)


def _numbers(path: str | os.PathLike) -> dict[str, int]:
    """The lines "name number ..." of a file of the kernel."""
    try:
        lines = [line.split() for line in pathlib.Path(path).read_text().splitlines()]
    except OSError:
        return {}
    return {words[0]: int(words[1]) for words in lines if len(words) > 1 and words[1].isdigit()}


def check_memory(what: str, needed: int, free: int | None = None, instead: str = "less of it") -> None:
    """Refuses what does not fit into memory, before any of it is allocated.

    Args:
      what: needs the memory, in words. needed: bytes. free: bytes; None is what the host has left.
      instead: what is allowed.

    Raises:
      ValueError: with both numbers.
    """
    free = host_memory() if free is None else free
    if needed > free:
        needs, there = (f"{n / 2**30:,.1f} GiB" for n in (needed, free))
        raise ValueError(f"{what}: {needs} of memory are needed, {there} are free; allowed: {instead}")


def peak_memory(program: Any) -> int:
    """Bytes that a compiled program holds at once: arguments, results and temporaries, shared buffers once."""
    memory = program.memory_analysis()
    if memory is None:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes
    )
