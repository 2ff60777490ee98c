"""Everything that only an accelerator can tell, in parts of under nine minutes that can be taken up again.

  python -m experiments.gpu_suite                   every part that is not done
  python -m experiments.gpu_suite --part bench_step one part
  python -m experiments.gpu_suite --list

Rows of JSON (device, versions, command, date) go to experiments/results/gpu_suite/; a finished part leaves PART.done
there and is skipped. On an image without network, see CONTRIBUTING.md for what to carry; the data set's idx files may
be carried too (`--data DIR`). `--quick` runs every part at toy size on whatever device there is, to see that it works.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from experiments.provenance import RESULTS, append_row, provenance

MINUTES = 9.0


class Part(NamedTuple):
    """One part: what it is for, and its command lines for a folder, in order."""

    about: str
    commands: Callable[[argparse.Namespace], Sequence[Sequence[str]]]


def _train(options: argparse.Namespace) -> list[list[str]]:
    run = options.out / ("quick" if options.quick else "fmnist_dit_patch2")
    command = ["difax", "train", "--config", "fmnist_dit:patch2", "--workdir", str(run), "--minutes", "8", "--quiet"]
    command += ["--data", options.data] if options.data else []
    if options.quick:
        command += ["--config.train.steps=4", "--config.train.batch=8", "--config.train.warmup=0"]
        command += ["--config.train.decay=0", "--config.model.depth=2"]
    return [command + (["--resume"] if (run / "config.json").exists() else [])]


def _bench(options: argparse.Namespace) -> list[list[str]]:
    path = options.out / ("quick_bench_step.jsonl" if options.quick else "bench_step.jsonl")
    command = ["experiments.bench_step", "--dtypes", "bfloat16", "--out", str(path)]
    if options.quick:
        return [[*command, "--models", "S/2", "--batches", "1", "--repeats", "1", "--sample-steps", "2"]]
    return [[*command, "--torch", "eager", "compile", "--repeats", "20"]]


def _sample(options: argparse.Namespace) -> list[list[str]]:
    picture = str(options.out / "samples.png")
    command = ["difax", "sample", "--repeat", "1" if options.quick else "200", "--out", picture, "--json"]
    command += ["--steps", "3", "--random-init"] if options.quick else []
    return [[*command, "--dtype", dtype] for dtype in ("float32", "bfloat16")]


def _quantisation(options: argparse.Namespace) -> list[list[str]]:
    path = options.out / ("quick_quantisation.json" if options.quick else "quantisation.json")
    command = ["experiments.quantisation", "--out", str(path)]
    return [
        [*command, *(["--model", "S/8", "--batch", "1", "--repeats", "1", "--images", "0"] if options.quick else [])]
    ]


def _attention(options: argparse.Namespace) -> list[list[str]]:
    path = options.out / ("quick_attention.jsonl" if options.quick else "attention.jsonl")
    quick = ["--tokens", "256", "--repeats", "1"] if options.quick else []
    return [["experiments.attention", "--out", str(path), *quick]]


def _realised(options: argparse.Namespace) -> list[list[str]]:
    path = options.out / ("quick_realised.jsonl" if options.quick else "realised.jsonl")
    command = ["experiments.realised", "--dtype", "bfloat16", "--out", str(path)]
    if options.quick:
        small = ["--models", "S/8", "--batches", "1", "--steps", "4", "--repeats", "1"]
        return [[*command, *small, "--methods", "fora 3", "teacache", "toca"]]
    return [[*command, "--models", "XL/2", "--batches", "1", "8", "--steps", "50", "--repeats", "10"]]


def _pareto(options: argparse.Namespace) -> list[list[str]]:
    command = ["difax", "pareto", "--out", str(options.out / ("quick_pareto" if options.quick else "pareto"))]
    if options.quick:
        return [[*command, "--methods", "fora 3", "--seeds", "10", "--turns", "1", "--no-judge", "--config.steps=4"]]
    data = ["--data", options.data] if options.data else []
    return [[*command, "--seeds", "320", "--batch", "64", "--budget", "8", *data]]


PARTS = {
    "train": Part("patch-2 DiT on Fashion-MNIST, resumed in slices of 8 minutes until its steps are done", _train),
    "bench_step": Part("a step and a sample of DiT-S/2, B/2, XL/2 in bf16, against torch eager and compile", _bench),
    "attention": Part("chunked attention against the reference at 1k, 4k and 16k tokens", _attention),
    "quantisation": Part("bytes, errors and seconds of every quantised DiT-B/2", _quantisation),
    "realised": Part("caches on DiT-XL/2 in bf16: seconds against operations, at batch 1 and 8", _realised),
    "pareto": Part("every method on the embedded model, 320 images each", _pareto),
    "sample": Part("2,000 images of the embedded model in f32 and bf16: seconds and memory", _sample),
}


def run_part(name: str, options: argparse.Namespace) -> bool:
    """Runs one part; True when it is finished, False when a slice ended and more remains."""
    # torch runs in a process of its own beside jax, which would otherwise take three quarters of the memory
    environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    for command in PARTS[name].commands(options):
        start = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-m", *command],
            capture_output=True,
            text=True,
            timeout=60 * (MINUTES + 1),
            env=environment,
        )
        row = {
            "part": name,
            "command": " ".join(["python", "-m", *command]),
            "exit_code": done.returncode,
            "seconds": time.monotonic() - start,
            "stdout": done.stdout.splitlines()[-20:],
            "stderr": done.stderr.splitlines()[-5:] if done.returncode else [],
            "provenance": provenance(),
        }
        append_row(options.out / ("quick.jsonl" if options.quick else "rows.jsonl"), row)
        print(
            f"{name}: exit {done.returncode} after {row['seconds']:.0f} s: {' '.join(row['stdout'][-1:])}", flush=True
        )
        if done.returncode:
            print("\n".join(row["stderr"]), file=sys.stderr)
            raise SystemExit(f"part {name} failed")
        if name == "train" and not _trained(done.stdout):
            return False
    return True


def _trained(output: str) -> bool:
    words = output.split()  # "... step N of M"
    return len(words) >= 3 and words[-3] == words[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, action="append", help="may be given several times")
    parser.add_argument("--quick", action="store_true", help="toy sizes, to see that every part runs")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS / "gpu_suite")
    parser.add_argument("--data", help="folder of the Fashion-MNIST files")
    parser.add_argument("--list", action="store_true")
    options = parser.parse_args()
    if options.list:
        for name, part in PARTS.items():
            print(f"{name:12} {part.about}")
        return
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.part or PARTS:
        done = options.out / f"{name}.done"
        if done.exists() and not options.quick:
            print(f"{name}: done already")
            continue
        if run_part(name, options) and not options.quick:
            done.write_text("")


if __name__ == "__main__":
    main()
