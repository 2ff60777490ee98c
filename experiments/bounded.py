"""Processes under a bound: watched, ended with all that they started, and gone when the one that started them is."""

from __future__ import annotations

import contextlib
import ctypes
import os
import queue
import signal
import subprocess
import threading
import time
from collections import deque

OUT_OF_TIME = 124  # exit code of a process that ends itself at its bound


def watch(command: list[str], end: float, stall: float, env: dict[str, str]) -> tuple[str, str | None, str]:
    """Runs a command in a group of its own until it ends, is silent for `stall` seconds, or its time is up.

    Returns:
      "done", "bound", "silent for N s" or "exit code N"; the last label that it began; its last lines.
    """
    # the group makes what the part started end with it
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", env=env,
        start_new_session=True,
    )  # fmt: skip
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        assert process.stdout is not None
        with process.stdout as stream:
            for line in stream:
                lines.put(line.rstrip("\n"))
        lines.put(None)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    label, tail, outcome = None, deque(maxlen=4), ""
    try:
        while True:
            wait = min(stall, end - time.monotonic())
            try:
                line = lines.get(timeout=max(wait, 0.01))
            except queue.Empty:
                outcome = "bound" if end - time.monotonic() < 0.05 else f"silent for {stall:.0f} s"
                break
            if line is None:
                code = process.wait(timeout=10)
                outcome = "done" if code == 0 else "bound" if code == OUT_OF_TIME else f"exit code {code}"
                break
            if line.startswith("> "):
                label = line[2:]
            else:
                tail.append(line)
                print(line, flush=True)
    finally:
        end_group(process)
        reader.join(timeout=5)
    return outcome, label, " | ".join(tail)


def end_group(process: subprocess.Popen[str]) -> None:
    """Kills a process and all that it started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    try:
        process.wait(timeout=20)
    except subprocess.TimeoutExpired:  # a kernel that the driver does not let go of: the next part begins without
        print(f"process {process.pid} does not end", flush=True)


def driver() -> str:
    """Name and driver of the NVIDIA GPUs as nvidia-smi tells them; "" where there is none."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def end_with_parent() -> None:
    """Asks Linux to kill this process when the one that started it is gone."""
    parent = os.getppid()
    try:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    except (OSError, AttributeError):
        return
    if os.getppid() != parent:  # it went before the kernel was asked
        os._exit(1)


def end_at(end: float) -> None:
    """Ends this process hard at a time of `time.monotonic`, whatever it waits for."""

    def watch() -> None:
        time.sleep(max(0.0, end - time.monotonic()))
        os._exit(OUT_OF_TIME)

    threading.Thread(target=watch, daemon=True).start()
