"""`difax pareto`: every method on the same work, in one resumable sweep, with what is dominated and what is not.

All methods draw the same images: sample i has noise i and label i of the run's. Each batch of a method is timed, in
turns with the unaccelerated sampler, both compiled ahead of time; what is drawn is compared with the unaccelerated
images of the same noise and, where the data set is there, judged against real ones. A row of JSON is appended as soon
as a method is measured, so that a sweep that is killed goes on where it stopped.

Methods whose programs are the same text share a compilation: a sweep of thresholds compiles once.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from difax.build import Setup, build_setup, load_weights
from difax.config import override, plain
from difax.core.contracts import Params, Trace
from difax.core.cost import model_bytes, model_cost, run_bytes, run_cost
from difax.core.decisions import averaged, strip
from difax.core.device import device_name, peak_memory, processor, versions
from difax.core.files import save_arrays
from difax.core.writing import append_line, replacing
from difax.media.images import to_uint8
from difax.program import Program
from difax.study.calibrate import Sampler, calibrate_to, ending
from difax.study.folder import read_measured, read_sweep
from difax.study.frontier import BASELINE, CONTROL, line
from difax.study.judge import Judge, compared
from difax.study.methods import Method
from difax.study.metrics import WINDOW, bootstrap, ms_ssim, psnr, relative_error, ssim
from difax.study.networks import Eyes, seen
from difax.training.data import Images, check_images

CALIBRATION_SEED, CALIBRATION_SAMPLES = 1_000_000, 20
QUEUED = 3  # runs of a batch that are timed together on an accelerator
PSNR_LIMIT = 100.0  # what equal images count as: the mean of an infinity says nothing
Tell = Callable[[str], None]


class Options(NamedTuple):
    """seeds: images of each method; batch: at a time; turns: batches that are timed; seed: of the first image;
    budget: minutes after which no more methods are begun, or None."""

    seeds: int = 64
    batch: int = 8
    turns: int = 3
    seed: int = 0
    budget: float | None = None


class Timed:
    """One method's program, and its timed draws."""

    def __init__(self, run: Setup, params: Params, options: Options, compiled: dict[str, Any]):
        self.run, self.options = run, options
        self.params = jax.block_until_ready(run.prepare(params))
        self.program = Program(run, self.params, self.inputs(0), compiled)

    def inputs(self, index: int) -> tuple[jax.Array, jax.Array, Any]:
        """Noise, keys and labels of a batch; the last one is filled up with samples that are not counted."""
        labels = np.arange(self.run.model.classes, dtype=np.int32)
        return self.run.inputs(self.options.seed, self.options.batch, labels, index * self.options.batch)

    def draw(self, index: int) -> tuple[np.ndarray, Trace, float]:
        """Samples, trace and seconds of a batch; on an accelerator those of one of several queued runs, so that they
        are the device's and not the launch's."""
        queued = QUEUED if jax.default_backend() != "cpu" else 1
        inputs = jax.block_until_ready([self.inputs(index) for _ in range(queued)])  # x is donated
        start = time.perf_counter()
        out = [self.program(*given) for given in inputs]
        samples, trace = jax.block_until_ready(out)[-1]
        seconds = (time.perf_counter() - start) / queued
        return np.asarray(samples), jax.tree.map(np.asarray, trace), seconds


class Sweep:
    """A folder of measurements of one configuration."""

    def __init__(
        self,
        name: str,
        config: Mapping[str, Any],
        options: Options,
        out: pathlib.Path,
        judge: Judge | None = None,
        tell: Tell = lambda text: None,
        eyes: Eyes | None = None,
        weights: str | None = None,
        test: Images | None = None,
    ):
        """name: what follows `difax sample` in a command, the flags that change it included; config: what that gives.
        judge, eyes: what else than the unaccelerated images the images are compared with. weights: a path, or None for
        those of the configuration. test: real images that the model should fit, or None."""
        self.name, self.config, self.options, self.out = name, dict(config), options, out
        self.judge, self.eyes, self.tell = judge, eyes or Eyes({}), tell
        run = build_setup(config)
        if not run.model.classes:
            raise ValueError(f"difax pareto: {run.model.name} takes no labels; allowed: a model that does")
        model, self.params, self.weights = load_weights(config, run.model, weights)
        self.run = run._replace(model=model)
        if test is not None:
            check_images(test, model.input_shape, model.classes)
        if judge is not None and judge.classifier.input_shape != model.input_shape:
            raise ValueError(
                f"{model.name} draws {model.input_shape}; the judge knows {judge.classifier.input_shape} (--no-judge)"
            )
        self.compiled: dict[str, Any] = {}
        self.failed: dict[str, str] = {}  # methods that raised what no refusal is, and what
        self.baseline: Timed | None = None
        self.wanted: np.ndarray | None = None
        self.uncached = (0.0, 0.0)  # operations and bytes of the baseline, once its images are drawn
        out.mkdir(parents=True, exist_ok=True)
        self._claim()

    def _claim(self) -> None:
        """Writes what the folder is of, or checks that it is the same."""
        here = {
            "config": plain(self.config),
            "seeds": self.options.seeds,
            "batch": self.options.batch,
            "seed": self.options.seed,
            "device": device_name(),
            "jax": jax.__version__,
            "judged": self.judge is not None,
            **({"networks": list(self.eyes.networks)} if self.eyes.networks else {}),
        }
        path = self.out / "sweep.json"
        if not path.exists():
            with replacing(path) as aside:
                pathlib.Path(aside).write_text(json.dumps(here, indent=1) + "\n")
            return
        there = read_sweep(self.out)
        other = [k for k in here | there if there.get(k) != here.get(k)]
        if other:
            differences = "; ".join(f"{k}: {there.get(k)} there, {here.get(k)} here" for k in other if k != "config")
            raise ValueError(
                f"{self.out} holds another sweep ({differences or 'another configuration'}); allowed: the same one, or "
                "another --out"
            )

    def rows(self) -> list[dict[str, Any]]:
        """What is measured; a line that a killed process left half-written is dropped."""
        return read_measured(self.out)

    def measure(self, methods: Mapping[str, Method]) -> list[dict[str, Any]]:
        """Measures what the folder does not have yet: baseline, control and methods. Returns all rows.

        A method that fails is named in `failed` and gets no row, so that the sweep goes on, and tries it again when it
        is started again. Nothing is measured without the baseline, whose failure is raised.
        """
        todo = {BASELINE: Method("baseline", {}), **methods}
        there = {row["method"]: row["settings"] for row in self.rows()}
        for name, settings in there.items():
            if name in todo and settings != plain(todo[name].settings):
                raise ValueError(f"{self.out} has {name!r} with other settings, {settings}; allowed: another --out")
        left = {n: m for n, m in todo.items() if n not in there}
        start = time.monotonic()
        if (self.judge is not None or self.eyes.real is not None) and CONTROL not in there:
            self._append({"method": CONTROL, "family": "control", "settings": {}, "quality": self._control()})
        for done, (name, method) in enumerate(left.items()):
            spent = (time.monotonic() - start) / 60
            if self.options.budget is not None and spent > self.options.budget and name != BASELINE:
                self.tell(
                    f"the budget of {self.options.budget:g} minutes is spent; {len(left) - done} methods are left"
                )
                break
            try:
                row = _finite(self._row(name, method))
            except Exception as error:
                if name == BASELINE:
                    raise
                self.failed[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
                self.tell(f"[{done + 1}/{len(left)}] {name} failed: {self.failed[name]}")
                continue
            self._append(row)
            spent = (time.monotonic() - start) / 60
            minutes = spent / (done + 1) * (len(left) - done - 1)
            self.tell(f"[{done + 1}/{len(left)}] {line(row)}; about {minutes:.0f} min left")
        return self.rows()

    def _append(self, row: dict[str, Any]) -> None:
        append_line(self.out / "rows.jsonl", json.dumps(_finite(row), allow_nan=False))

    def _row(self, name: str, method: Method) -> dict[str, Any]:
        about = {
            "method": name,
            "family": method.family,
            "settings": plain(method.settings),
            "calibrated": method.calibrated,
            "command": self._command(method),
        }
        try:
            settings = list(method.settings.items())
            if method.calibrated:
                settings.append(("cache.file", str(self._calibrated(method.calibrated))))
            config = override(self.config, settings)
            run = build_setup(config, None if "model.dtype" in method.settings else self.run.model)
            program = Timed(run, self.params, self.options, self.compiled)
        except (ValueError, NotImplementedError) as error:
            return {**about, "refused": " ".join(str(error).split())}
        if name == BASELINE:
            self.baseline = program
        measured = self._measured(name, program)
        return {
            **about,
            **measured,
            "config": plain(config),
            "device": device_name(),
            "processor": processor(),
            "jax": jax.__version__,
            "versions": versions(),
            "date": _now(),
        }

    def _baseline(self) -> Timed:
        if self.baseline is None:
            self.baseline = Timed(self.run, self.params, self.options, self.compiled)
        return self.baseline

    def _measured(self, name: str, program: Timed) -> dict[str, Any]:
        baseline, options = self._baseline(), self.options
        batches = -(-options.seeds // options.batch)
        wanted = self._wanted(baseline, batches)
        drawn = [program.draw(0)[:2]]  # not timed: the first run touches its memory
        turns = []
        for index in range(1, max(batches, options.turns + 1)):
            at, timed = index % batches, index <= options.turns
            beside = baseline.draw(at)[2] if timed and index % 2 else 0.0  # who is first changes from turn to turn
            samples, trace, seconds = program.draw(at)
            if timed:
                turns.append((seconds, beside or baseline.draw(at)[2]))
            if index < batches:
                drawn.append((samples, trace))
        images, traces = (list(part) for part in zip(*drawn, strict=True))
        together = np.concatenate(images)[: options.seeds]
        trace = averaged(traces)
        cost, moved = self._cost(program, traces)
        uncached, uncached_moved = self.uncached
        # the baseline is the unit: what its turns against itself are off from 1 is the machine's noise
        ratio = 1.0 if name == BASELINE else statistics.median(b / a for a, b in turns)
        self._save_images(name, together)
        return {
            "evaluations": len(program.run.rows.i),
            "cost": {
                "gflops_per_image": cost / 1e9,
                "ratio": uncached / cost,
                "gbytes_per_image": moved / 1e9,
                "bytes_ratio": uncached_moved / moved,
            },
            "speed": {
                "seconds_per_image": statistics.median(a for a, _ in turns) / options.batch,
                "baseline_seconds_per_image": statistics.median(b for _, b in turns) / options.batch,
                "ratio": ratio,
                "turns": [b / a for a, b in turns],
                "realised": ratio * cost / uncached,
                "compile_seconds": program.program.compile_seconds,
                "shared_compilation": program.program.shared,
                "peak_memory_mib": peak_memory(program.program.compiled) / 2**20,
            },
            "quality": self._quality(together, wanted),
            "decisions": decisions(trace),
        }

    def _wanted(self, baseline: Timed, batches: int) -> np.ndarray:
        if self.wanted is None:
            baseline.draw(0)
            drawn = [baseline.draw(i)[:2] for i in range(batches)]
            self.wanted = np.concatenate([samples for samples, _ in drawn])[: self.options.seeds]
            self.uncached = self._cost(baseline, [trace for _, trace in drawn])
        return self.wanted

    def _cost(self, program: Timed, traces: list[Trace]) -> tuple[float, float]:
        """Operations and bytes of one image; the weights' bytes are those of a batch, shared by its images."""
        run, batch = program.run, self.options.batch
        parts = (run.model, program.params, run.attention)
        cost = model_bytes(*parts)
        moved = [run_bytes(cost, trace, batch, run.guide.together) for trace in traces]
        return run_cost(model_cost(*parts), averaged(traces)), statistics.mean(moved) / batch

    def _labels(self) -> np.ndarray:
        return np.arange(self.options.seeds) % self.run.model.classes

    def _quality(self, images: np.ndarray, wanted: np.ndarray) -> dict[str, Any]:
        large = min(images.shape[-3:-1]) >= WINDOW
        each = {
            "psnr": np.asarray([min(psnr(a, b), PSNR_LIMIT) for a, b in zip(images, wanted, strict=True)]),
            "ssim": ssim(images, wanted),
            **({"ms_ssim": ms_ssim(images, wanted)} if large else {}),
            "relative_l1": relative_error(images, wanted, 1),
            "relative_l2": relative_error(images, wanted, 2),
        }
        found: dict[str, Any] = {name: list(bootstrap(values)) for name, values in each.items()}
        if self.judge is not None:
            found |= compared(self.judge, to_uint8(images), self._labels())
        return found | seen(self.eyes, to_uint8(images), to_uint8(wanted), self._labels())

    def _control(self) -> dict[str, Any]:
        found = {} if self.judge is None else compared(self.judge, None, self._labels())
        if self.eyes.real is not None:
            found |= seen(self.eyes, self.eyes.real[1][: self.options.seeds])
        return found

    def _save_images(self, name: str, images: np.ndarray) -> None:
        folder = self.out / "images"
        folder.mkdir(exist_ok=True)
        save_arrays(folder / f"{slug(name)}.npz", {"images": to_uint8(images)}, compressed=True)

    def _calibrated(self, technique: str) -> pathlib.Path:
        """The file of a technique, calibrated on other seeds if the folder does not have it."""
        path = self._file(technique)
        if path.exists():
            return path
        path.parent.mkdir(exist_ok=True)
        self.tell(f"calibrating {technique}")
        sampler = Sampler(self.run, self.run.prepare(self.params), np.arange(self.run.model.classes), CALIBRATION_SEED)
        quiet: Tell = lambda text: None  # noqa: E731
        if technique == "scheduled":
            calibrate_to(technique, sampler, path, 10, 10, quiet, budget=0.4, rounds=6)
        else:
            calibrate_to(technique, sampler, path, CALIBRATION_SAMPLES, 10, quiet)
        return path

    def _command(self, method: Method) -> str:
        flags = [f"--config.{k}={_flag(v)}" for k, v in method.settings.items()]
        if method.calibrated:
            flags.append(f"--config.cache.file={self._file(method.calibrated)}")
        return " ".join(["difax sample", self.name, *flags, f"--seed {self.options.seed}"])

    def _file(self, technique: str) -> pathlib.Path:
        return self.out / "calibrated" / f"{technique}{ending(technique)}"


def decisions(trace: Trace) -> dict[str, Any]:
    """What was computed, as a strip for each half and as a share for each evaluation and block, in hundredths."""
    halves = next(iter(trace.computed.values())).shape[-1]
    blocks = np.concatenate([np.asarray(c, np.float64).mean((2, 3)) for c in trace.computed.values()], axis=1)
    return {
        "strips": [strip(trace, half) for half in range(halves)],
        "blocks": np.round(100 * np.minimum(blocks, 1)).astype(int).tolist(),  # what scores tokens does more
        "computed_fraction": float(np.mean(blocks)),
    }


def slug(name: str) -> str:
    """A method's name as that of a file."""
    kept = "".join(c if c.isalnum() else "_" for c in name)
    return f"{kept[:60]}_{hashlib.sha256(name.encode()).hexdigest()[:6]}"


def _finite(value: Any) -> Any:
    """Without the infinities and nans that JSON does not have."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    if isinstance(value, (float, np.floating)):
        return float(value) if np.isfinite(value) else None
    return value


def _flag(value: Any) -> str:
    text = str(value).replace(" ", "")
    return f"'{text}'" if any(c in text for c in "()[]{}") else text


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
