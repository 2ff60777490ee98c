"""Fetches the wheels that a GPU machine without network needs beside what its image has.

  python -m experiments.gpu_wheels --out wheels      (needs the network and pip)

The image has Python 3.12, jax, torch, triton and most of what difax stands on (CONTRIBUTING.md, "A GPU machine without
network"); these are what it lacks, for Linux on x86-64. They go where nothing of the image is replaced:

  python3 -m pip install --no-index --no-deps --no-compile --target out/site wheels/*.whl
  PYTHONPATH=.:out/site python3 -m experiments.gpu_suite
"""

from __future__ import annotations

import argparse
import pathlib
import subprocess
import sys

# array-record and portpicker are what grain stands on; jax-triton 0.4 wants triton 3.7, and torch 2.11 stands on 3.6
WHEELS = (
    "gin-config==0.5.0",
    "ml_collections==1.1.0",
    "grain==0.2.18",
    "array-record==0.8.6",
    "portpicker==1.6.0",
    "tensorboardX==2.6.5",
    "jax-triton==0.3.1",
)
PYTHON = "3.12"
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_24_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
LARGEST = 40 * 2**20  # bytes of all together, since they travel with the clone


def command(folder: pathlib.Path) -> list[str]:
    """pip's command line: exactly these, as wheels, for the image's Python whatever this one is."""
    fetch = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    fetch += ["--python-version", PYTHON, "--implementation", "cp", "--dest", str(folder)]
    return [*fetch, *(word for platform in PLATFORMS for word in ("--platform", platform)), *WHEELS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("wheels"), help="folder, best an empty one")
    folder = parser.parse_args().out
    done = subprocess.run(command(folder))
    if done.returncode:
        raise SystemExit(f"pip ended with exit code {done.returncode}; is there a network?")
    there = sorted(folder.glob("*.whl"))
    size = sum(path.stat().st_size for path in there)
    for path in there:
        print(f"{path.stat().st_size / 2**20:6.1f} MiB  {path.name}")
    if len(there) != len(WHEELS):
        raise SystemExit(f"{folder} holds {len(there)} wheels for {len(WHEELS)} packages; empty it, two would stop pip")
    if size > LARGEST:
        raise SystemExit(f"{size / 2**20:.0f} MiB; allowed: {LARGEST // 2**20}")


if __name__ == "__main__":
    main()
