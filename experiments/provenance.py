"""Where a number came from: the device, versions, command and date that stand beside every row of results."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

from difax.core.device import device_name, processor, versions
from difax.core.writing import append_line, drop_cut_line

RESULTS = pathlib.Path(__file__).resolve().parent / "results"


def provenance() -> dict[str, Any]:
    """Device, versions, command, commit and UTC date of this process."""
    return {
        "device": device_name(),
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "versions": versions(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "command": " ".join(["python", "-m", _module(), *sys.argv[1:]]),
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def append_row(path: pathlib.Path, row: dict[str, Any]) -> None:
    """Appends one JSON line in one write; what a killed process has left of a line goes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    drop_cut_line(path)
    append_line(path, json.dumps(row))


def package_versions(*names: str) -> dict[str, str]:
    """Of those packages that are installed."""
    found = {}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _module() -> str:
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    return spec.name if spec is not None else pathlib.Path(getattr(main, "__file__", "?")).name


def _commit() -> str:
    try:
        run = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=RESULTS.parent, capture_output=True, text=True
        )
    except OSError:
        return "unknown"
    return run.stdout.strip() or "unknown"
