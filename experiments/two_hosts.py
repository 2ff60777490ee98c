"""Two processes on loopback against one: images, losses, a process that is killed, and the run that goes on.

  python -m experiments.two_hosts [--devices 4] [--steps 12] [--parts sample train killed resumed] [--lane NAME]

Each process has so many CPU devices, and they meet through DIFAX_COORDINATOR, DIFAX_PROCESSES and DIFAX_PROCESS, as
hosts of a cluster do; collectives go through gloo. The data are 64 bars whose position tells their label. One row a
part goes to experiments/results/two_hosts/LANE.jsonl. No row is a timing of difax: seconds are how long the others took
to notice.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from difax.core.lock import LOCK
from experiments.provenance import RESULTS, append_row, provenance

PATIENCE = 300.0  # seconds after which a process counts as one that hangs


class Ended(dict):
    """code, out, err of a process; seconds from when it was looked at."""


def free_port() -> int:
    """A port of loopback that nobody listens at."""
    with socket.socket() as some:
        some.bind(("127.0.0.1", 0))
        return some.getsockname()[1]


def environment(devices: int, processes: int = 1) -> list[dict[str, str]]:
    """Variables of every process of a job; flags of XLA that are set stay."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("DIFAX_", "SLURM_", "TPU_"))}
    flags = f"{kept.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}".strip()
    kept |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    if processes == 1:
        return [kept]
    job = {"DIFAX_COORDINATOR": f"127.0.0.1:{free_port()}", "DIFAX_PROCESSES": str(processes)}
    return [kept | job | {"DIFAX_PROCESS": str(i)} for i in range(processes)]


def begin(arguments: list[str], environments: list[dict[str, str]]) -> list[subprocess.Popen]:
    """The same command in every environment."""
    command = [sys.executable, "-m", "difax", *arguments]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return [subprocess.Popen(command, env=env, **pipes) for env in environments]


def ended(processes: list[subprocess.Popen], patience: float = PATIENCE) -> list[Ended]:
    """What became of processes; those that hang are killed, and have the code None."""
    since, found = time.monotonic(), []
    for process in processes:
        code: int | None
        try:
            out, err = process.communicate(timeout=max(since + patience - time.monotonic(), 0.1))
            code = process.returncode
        except subprocess.TimeoutExpired:
            process.kill()
            (out, err), code = process.communicate(), None
        found.append(Ended(code=code, out=out, err=err, seconds=round(time.monotonic() - since, 1)))
    return found


def run(arguments: list[str], devices: int, processes: int = 1, patience: float = PATIENCE) -> list[Ended]:
    """A command to its end, in one process or by several together."""
    return ended(begin(arguments, environment(devices, processes)), patience)


def write_bars(folder: pathlib.Path) -> pathlib.Path:
    """A data set of 64 pictures [28, 28, 1] of bars whose position tells their label."""
    label = np.arange(64) % 10
    image = np.zeros((64, 28, 28, 1), np.uint8)
    for i, c in enumerate(label):
        image[i, 2 * c + 2 : 2 * c + 8, 4:24] = 200
    path = folder / "bars.npz"
    np.savez(path, images=image, labels=label)
    return path


def losses(folder: pathlib.Path) -> dict[int, float]:
    """Of a run, by step."""
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows}


def difference(one: dict[int, float], other: dict[int, float]) -> float:
    """The largest of two runs of the same steps; infinite where the steps differ."""
    return max(abs(one[s] - other[s]) for s in one) if one and one.keys() == other.keys() else float("inf")


def train_arguments(folder: pathlib.Path, data: pathlib.Path, steps: int, *more: str) -> list[str]:
    settings = {"steps": steps, "sample_every": steps, "checkpoint_every": 4, "log_every": 1}
    flags = [f"--config.train.{key}={value}" for key, value in settings.items()]
    base = ["train", "--config", "fmnist_smoke", "--config.model.depth=2", "--config.model.width=32", "--quiet"]
    return [*base, "--config.steps=2", "--data", str(data), "--workdir", str(folder), *flags, "--resume", "auto", *more]


def sample_arguments(weights: pathlib.Path, out: pathlib.Path) -> list[str]:
    return [
        "sample",
        "--weights",
        str(weights),
        "--labels",
        "0,1,2,3,4",
        "--config.steps=3",
        "--out",
        str(out),
        "--json",
    ]


def finished(folder: pathlib.Path) -> list[int]:
    """Steps of the whole checkpoints of a run; those that are being written have longer names."""
    return sorted(int(p.name) for p in folder.glob("checkpoints/*") if p.name.isdigit())


def kill_one(arguments: list[str], folder: pathlib.Path, devices: int, victim: int) -> tuple[list[Ended], float]:
    """Kills one of two processes of a training run after its first checkpoint; the others' end, and after how long."""
    both = begin(arguments, environment(devices, 2))
    limit = time.monotonic() + PATIENCE
    while not finished(folder) and time.monotonic() < limit:
        if any(process.poll() is not None for process in both):
            break
        time.sleep(0.05)
    both[victim].send_signal(signal.SIGKILL)
    since = time.monotonic()
    left = ended([both[1 - victim]])[0]
    seconds = time.monotonic() - since
    return [left, *ended([both[victim]])], round(seconds, 1)


def last_line(process: Ended) -> str:
    return (process["err"].strip().splitlines() or [""])[-1]


def check(results: list[Ended]) -> None:
    """Ends here where a command failed."""
    for result in results:
        if result["code"] != 0:
            raise SystemExit(f"exit code {result['code']}: {last_line(result)}")


def measure(folder: pathlib.Path, devices: int, steps: int, parts: list[str]) -> Iterator[dict[str, Any]]:
    """The rows of the parts that are asked for."""
    data, all_devices = write_bars(folder), 2 * devices
    one, two = folder / "one", folder / "two"
    check(run(train_arguments(one, data, steps), all_devices))
    if "sample" in parts:
        check(run(sample_arguments(one, folder / "one.npz"), 1))
        both = run(sample_arguments(one, folder / "two.npz"), devices, 2)
        check(both)
        images = [np.load(folder / f"{name}.npz")["samples"] for name in ("one", "two")]
        yield {
            "part": "sample",
            "trained_on": f"1 process x {all_devices} devices",
            "largest_difference": float(np.abs(images[0] - images[1]).max()),
            "largest_value": float(np.abs(images[0]).max()),
            "second_process_wrote": bool(both[1]["out"] or both[1]["err"]),
        }
    if "train" in parts:
        check(run(train_arguments(two, data, steps), devices, 2))
        check(run(sample_arguments(two, folder / "from_two.npz"), 1))
        yield {
            "part": "train",
            "largest_difference_of_losses": difference(losses(one), losses(two)),
            "last_loss": losses(two)[steps],
            "sampled_on_one_device": bool(np.isfinite(np.load(folder / "from_two.npz")["samples"]).all()),
        }
    for victim in (1, 0) if "killed" in parts or "resumed" in parts else ():
        cut = folder / f"killed{victim}"
        (left, _), seconds = kill_one(train_arguments(cut, data, 4000), cut, devices, victim)
        row = {
            "part": "killed",
            "killed": f"process {victim}, kill -9",
            "others_exit_code": left["code"],
            "others_last_line": last_line(left),
            "others_lines": len(left["err"].strip().splitlines()),
            "seconds": seconds,
            "lock_left": (cut / LOCK).exists(),
        }
        if "killed" in parts:
            yield row
        if "resumed" in parts:
            kept = finished(cut)[-1]
            more = kept + steps
            check(run(train_arguments(cut, data, more), devices, 2))
            whole = folder / f"whole{victim}"
            check(run(train_arguments(whole, data, more), all_devices))
            yield {
                "part": "resumed",
                "killed": row["killed"],
                "from_step": kept,
                "to_step": more,
                "largest_difference_of_losses": difference(losses(whole), losses(cut)),
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--devices", type=int, default=4, help="of each process")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--parts", nargs="+", default=["sample", "train", "killed", "resumed"])
    parser.add_argument("--lane", default="cpu", help="name of the file of results")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        shape = {"processes": 2, "devices_of_each": options.devices, "steps": options.steps}
        for row in measure(pathlib.Path(folder), options.devices, options.steps, options.parts):
            print(json.dumps(row), flush=True)
            append_row(RESULTS / "two_hosts" / f"{options.lane}.jsonl", {**row, **shape, **provenance()})


if __name__ == "__main__":
    main()
