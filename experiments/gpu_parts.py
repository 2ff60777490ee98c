"""One part of the suite (`experiments.gpu_suite`) in a process of its own: python -m experiments.gpu_parts NAME ..."""

from __future__ import annotations

import argparse
import importlib
import os
import pathlib
import sys
import time

from experiments.bounded import OUT_OF_TIME, end_at, end_with_parent
from experiments.gpu_rows import Bench

# name -> module of the function of that name; imported in the part's own process alone
MODULES = {
    "ceilings": "experiments.gpu_kernels",
    "kernels": "experiments.gpu_kernels",
    "products": "experiments.gpu_products",
    "models": "experiments.gpu_models",
    "realised": "experiments.gpu_runs",
    "training": "experiments.gpu_runs",
    "whole": "experiments.gpu_runs",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=MODULES)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--run", default="by hand")
    parser.add_argument("--command", default="python -m experiments.gpu_parts")
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args()
    end_with_parent()
    end_at(time.monotonic() + options.seconds)
    bench = Bench(options.part, options.out, options.seconds, options.run, options.command, options.rehearse)
    getattr(importlib.import_module(MODULES[options.part]), options.part)(bench)
    if not bench.complete:
        sys.stdout.flush()
        os._exit(OUT_OF_TIME)  # a thread of torch or jax may still be waiting for what nobody needs any more


if __name__ == "__main__":
    main()
