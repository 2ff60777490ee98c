"""Rows that a part of the suite (`experiments.gpu_suite`) measures: groups of variants, checked, then timed in turns.

A part says on stdout which variant it begins (`> LABEL`), so that whoever started it knows which one took the process
down. A variant that raises leaves a row with the error, and the part goes on; where the error has taken the device's
context with it, the process ends with RESTART, and another one goes on behind what is there.
"""

from __future__ import annotations

import os
import pathlib
import re
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from difax.core.files import read_rows
from experiments.bounded import driver
from experiments.provenance import append_row, package_versions, provenance

RESTART = 75  # exit code: the device's context is gone, the rows are whole, begin again behind them
ROWS = "rows.jsonl"
_CONTEXT_LOST = re.compile(r"CUDA_ERROR|ILLEGAL_ADDRESS|illegal memory|launch failure|misaligned|device-side", re.I)


class Variant(NamedTuple):
    """One thing that is measured.

    function, arguments: compiled and called as they are. operations: of one call, for a column of TFLOP/s.
    bytes: that one call must read and write, for a column of GB/s. check: output -> columns, such as an error.
    run: in place of a function, a call whose seconds are returned (another process, a sampler with its own clock).
    """

    function: Callable[..., Any] | None = None
    arguments: tuple[Any, ...] = ()
    operations: float | None = None
    bytes: float | None = None
    check: Callable[[Any], dict[str, Any]] | None = None
    run: Callable[[], float] | None = None


class Bench:
    """The rows of one part, and the seconds that it still has."""

    def __init__(self, part: str, folder: pathlib.Path, seconds: float, run: str, command: str, toy: bool):
        self.part, self.path, self.run, self.command, self.toy = part, folder / ROWS, run, command, toy
        self.end = time.monotonic() + seconds
        self.complete = True  # until something is not begun for want of time
        self._source: dict[str, Any] = {}

    def left(self) -> float:
        """Seconds until the bound of the part."""
        return self.end - time.monotonic()

    def enough(self, seconds: float, what: str) -> bool:
        """Are that many seconds left; if not, says so, and the part is to be taken up again."""
        if self.left() >= seconds:
            return True
        print(f"{what}: not begun, {self.left():.0f} s are left", flush=True)
        self.complete = False
        return False

    def rows(self) -> dict[str, dict[str, Any]]:
        """What is there of this part, the last row of each label."""
        return {r["label"]: r for r in read_rows(self.path) if r["part"] == self.part}

    def missing(self, label: str) -> bool:
        """Is this still to be measured: no row, or an error of an earlier run of the suite."""
        row = self.rows().get(label)
        return row is None or ("error" in row and row["run"] != self.run)

    def write(self, label: str, **columns: Any) -> None:
        """Appends one row, whole, with where it comes from."""
        self._source = self._source or {**provenance(), "driver": driver(), "command": self.command}
        self._source["versions"] |= package_versions("jax-cuda13-plugin", "triton", "jax-triton", "torch")
        row = {"part": self.part, "label": label, **columns, "run": self.run, "provenance": self._source}
        append_row(self.path, row)
        shown = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in columns.items() if k != "group"}
        print(f"{label:44} {' '.join(f'{k}={v}' for k, v in shown.items())}", flush=True)

    def failed(self, label: str, group: str, error: BaseException) -> None:
        """Appends the row of a variant that raised; ends the process where the device's context is gone."""
        text = " ".join(f"{type(error).__name__}: {error}".split())
        self.write(label, group=group, error=text[:300])
        if _CONTEXT_LOST.search(text):
            sys.stdout.flush()
            os._exit(RESTART)

    def section(self, label: str, function: Callable[..., Any], *arguments: Any) -> None:
        """Calls a function of the part; where it raises outside of a variant, a row says so, and the part goes on."""
        try:
            function(*arguments)
        except Exception as error:
            self.failed(label, label, error)

    def group(
        self,
        name: str,
        variants: Mapping[str, Callable[[], Variant]],
        baseline: str | None = None,
        repeats: int = 5,
        window: float = 0.05,
        reserve: float = 10.0,
    ) -> dict[str, float]:
        """Compiles, checks and times variants in turns, and writes a row of each that is not there yet.

        Args:
          variants: label -> what makes the variant; imports belong inside, so that what lacks is a row with its error.
          baseline: the label whose median seconds the others' are divided into ("over_baseline").
          repeats: turns (5), each of as many calls as fill `window` seconds (0.05).
          reserve: seconds that must be left for another variant to be begun.

        Returns:
          Median seconds by label, of this run or of the rows that are there.
        """
        known = {k: r["us"] / 1e6 for k, r in self.rows().items() if k in variants and "us" in r}
        if not any(map(self.missing, variants)):
            return known
        ready: dict[str, tuple[Callable[[], float], Variant, dict[str, Any]]] = {}
        wanted = self._wanted(variants, baseline)
        for label in wanted:
            if not self.enough(min(reserve, 1.0) if self.toy else reserve, label):
                break
            print(f"> {label}", flush=True)
            try:
                ready[label] = self._prepared(variants[label](), window)
            except Exception as error:  # whatever a kernel or a compiler raises is that variant's result
                self.failed(label, name, error)
        seconds: dict[str, list[float]] = {label: [] for label in ready}
        for turn in range(repeats):
            for label in [k for k in ready if k in seconds]:
                if turn and self.left() < 1:
                    break
                print(f"> {label}", flush=True)
                try:
                    seconds[label].append(ready[label][0]())
                except Exception as error:
                    del seconds[label]
                    self.failed(label, name, error)
        medians = {label: statistics.median(taken) for label, taken in seconds.items() if taken}
        for label, median in medians.items():
            if not self.missing(label):  # a baseline that was measured again for its ratios
                continue
            variant, columns = ready[label][1:]
            columns |= {"us": 1e6 * median, "spread": max(seconds[label]) / min(seconds[label])}
            if variant.operations:
                columns["tflops"] = variant.operations / median / 1e12
            if variant.bytes:
                columns["gb_per_second"] = variant.bytes / median / 1e9
            if baseline in medians and label != baseline:
                columns |= {"baseline": baseline, "over_baseline": medians[baseline] / median}
            self.write(label, group=name, **columns)
        return known | medians

    def _wanted(self, variants: Mapping[str, Any], baseline: str | None) -> list[str]:
        """What is missing, and the baseline too where it has been measured: its ratios are of one process."""
        there = self.rows()
        again = baseline in there and "error" not in there[baseline]
        return [label for label in variants if self.missing(label) or (label == baseline and again)]

    def _prepared(self, variant: Variant, window: float) -> tuple[Callable[[], float], Variant, dict[str, Any]]:
        """What is called for the seconds of a turn, and the columns that are known before."""
        if variant.run is not None:
            variant.run()  # the first touches its memory
            return variant.run, variant, {} if variant.check is None else variant.check(None)
        assert variant.function is not None
        lowered, start = jax.jit(variant.function).lower(*variant.arguments), time.perf_counter()
        program = lowered.compile()
        columns: dict[str, Any] = {"compile_seconds": time.perf_counter() - start}
        out = jax.block_until_ready(program(*variant.arguments))
        if variant.check is not None:
            columns |= variant.check(out)
        del out
        once = calls(program, variant.arguments, 1)
        number = 1 if self.toy else int(min(100, max(1, window / max(once, 1e-6))))
        return lambda: calls(program, variant.arguments, number), variant, columns


def calls(program: Callable[..., Any], arguments: tuple[Any, ...], number: int) -> float:
    """Seconds of one call, of `number` that are handed to the device one behind the other."""
    start = time.perf_counter()
    out = None
    for _ in range(number):
        out = program(*arguments)
    jax.block_until_ready(out)
    return (time.perf_counter() - start) / number
