"""Where a number came from: the device, versions, command and date that stand beside every row of results."""

from __future__ import annotations

import datetime
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

from difax.core.device import device_name, processor, versions
from difax.core.writing import drop_cut_line

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
    """Appends one JSON line; a line is written whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    drop_cut_line(path)
    with open(path, "a") as file:
        file.write(json.dumps(row) + "\n")


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
