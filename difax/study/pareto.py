"""`difax pareto`: every method on the same work, in one resumable sweep, with what is dominated and what is not.

All methods draw the same images: sample i has noise i and, in turn, the run's conditions. Each batch is timed, in
turns with the unaccelerated sampler, both compiled ahead of time; what is drawn is compared with the unaccelerated
images of the same noise and, where the data set is there, judged against real ones. A row of JSON is appended as soon
as a method is measured, so that a sweep that is killed goes on where it stopped.

Methods whose programs are the same text share a compilation: a sweep of thresholds compiles once.

Any model is measured. A pipeline's latents are decoded, and what is compared, judged and kept are its pictures; seconds
are the sampler's alone, and those of decoding, which are every method's, stand beside them. Of latents that nothing
decodes (neither 1 nor 3 channels) PSNR and SSIM take the range of the unaccelerated ones as their peak, and the
pictures that are kept are three channels in that range; of videos they are means over frames.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pathlib
import shlex
import statistics
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from difax.build import Setup
from difax.config import plain
from difax.core.arrays import save_arrays
from difax.core.contracts import Params, Trace
from difax.core.cost import model_bytes, model_cost, run_bytes, run_cost
from difax.core.decisions import averaged, strip
from difax.core.device import device_name, peak_memory, processor, versions
from difax.core.drive import evaluations
from difax.core.files import place_of
from difax.core.lock import locked
from difax.core.shell import DifaxWarning
from difax.core.writing import NoRoom, append_line, drop_cut_line, replacing
from difax.media.images import to_uint8
from difax.pipelines.caches import EXPERTS
from difax.pipelines.pipeline import Pipeline
from difax.program import Program, unfinished
from difax.registry import shown
from difax.study.calibrate import ending
from difax.study.folder import read_image_file, read_measured, read_sweep
from difax.study.frontier import BASELINE, BROUGHT, CONTROL, finite, line
from difax.study.judge import FIGURES, Judge, compared, halves
from difax.study.methods import Method
from difax.study.metrics import (
    FEATURE_FIGURES,
    WINDOW,
    Measure,
    bootstrap,
    framewise,
    ms_ssim,
    psnr,
    relative_error,
    ssim,
)
from difax.study.networks import Eyes, figures, seen
from difax.training.data import Images, check_images
from difax.weights.conditions import labelled

CALIBRATION_SEED, CALIBRATION_SAMPLES = 1_000_000, 20
QUEUED = 3  # runs of a batch that are timed together on an accelerator
PSNR_LIMIT = 100.0  # what equal images count as: the mean of an infinity says nothing
Tell = Callable[[str], None]


class Options(NamedTuple):
    """seeds: images of each method; batch: at a time; turns: batches that are timed beside the baseline's; 0 compares
    with the baseline's seconds when the sweep began, and the machine may have had other work then; seed: of the first
    image; budget: minutes after which no more methods are begun, or None."""

    seeds: int = 64
    batch: int = 8
    turns: int = 3
    seed: int = 0
    budget: float | None = None


class Opened(Protocol):
    """What a sweep needs of a `difax.Run`."""

    @property
    def config(self) -> dict[str, Any]: ...
    @property
    def setup(self) -> Setup: ...
    @property
    def source(self) -> str: ...
    @property
    def prepared(self) -> Params: ...
    @property
    def pipeline(self) -> Pipeline | None: ...
    def conditions(self, cond: Any = None) -> Any: ...
    def replace(self, **settings: Any) -> Opened: ...
    def calibrate(self, technique: str, out: Any = None, cond: Any = None, **settings: Any) -> dict[str, Any]: ...


class Timed:
    """One method's program, and its timed draws."""

    def __init__(self, run: Opened, cond: Any, options: Options, compiled: dict[str, Any]):
        self.setup, self.cond, self.options = run.setup, cond, options
        self.params = run.prepared
        self.program = Program(run.setup, self.params, self.inputs(0), compiled)

    def inputs(self, index: int) -> tuple[jax.Array, jax.Array, Any]:
        """Noise, keys and conditions of a batch; the last one is filled up with samples that are not counted."""
        return self.setup.inputs(self.options.seed, self.options.batch, self.cond, index * self.options.batch)

    def draw(self, index: int) -> tuple[np.ndarray, Trace, float]:
        """Samples, trace and seconds of a batch; on an accelerator those of one of several queued runs, so that they
        are the device's and not the launch's."""
        queued = QUEUED if jax.default_backend() != "cpu" else 1
        inputs = jax.block_until_ready([self.inputs(index) for _ in range(queued)])  # x is donated
        start = time.perf_counter()
        out = [self.program(*given) for given in inputs]
        samples, trace = jax.block_until_ready(out)[-1]
        seconds = max(time.perf_counter() - start, 1e-9) / queued  # a clock may stand still
        return np.asarray(samples), jax.tree.map(np.asarray, trace), seconds


class Sweep:
    """A folder of measurements of one configuration, which is made when the baseline is drawn."""

    def __init__(
        self,
        name: str,
        run: Opened,
        options: Options,
        out: pathlib.Path,
        judge: Judge | None = None,
        tell: Tell = lambda text: None,
        eyes: Eyes | None = None,
        test: Images | None = None,
        cond: Any = None,
    ):
        """name: what follows `difax sample` in a command, the flags that change it included; run: what that opens.
        judge, eyes: what else than the unaccelerated images the images are compared with, where the model draws what
        they can see. test: real images that the model should fit, or None. cond: as `Run.conditions` takes it.

        Raises:
          ValueError: a baseline with a cache, judges that do not fit or too few images for them, real images of
            another size, conditions that do not fit, or a folder of another sweep; nothing is written then.
        """
        self.name, self.run, self.options, self.out, self.tell = name, run, options, out, tell
        check_methods(run, {})
        self.cond = run.conditions(cond)
        model, count = run.setup.model, len(jax.tree.leaves(self.cond)[0])
        self.index = np.arange(options.seeds) % count  # of the condition that each image has
        self.labels = np.asarray(self.cond)[self.index] if labelled(model) else None
        self.shape = drawn_shape(run)
        self.latents = self.shape[-1] not in (1, 3)
        self.judge, self.eyes = self._judges(judge, eyes or Eyes({}))
        if test is not None and self.labels is not None:
            check_images(test, self.shape, model.classes)
        self.compiled: dict[str, Any] = {}
        self.failed: dict[str, str] = {}  # methods that raised what no refusal is, and what
        self.baseline: Timed | None = None
        self.wanted: np.ndarray | None = None
        self.seconds: list[float] = []  # of each batch of it
        self.decoding: float | None = None  # seconds of decoding an image, once some are decoded
        self.range = (-1.0, 1.0)  # of the images; of latents, that of the baseline's once they are drawn
        self.uncached = (0.0, 0.0)  # operations and bytes of the baseline, once its images are drawn
        self.described = {
            **described(run, self.cond, options),
            "judged": self.judge is not None,
            **({"networks": list(self.eyes.networks)} if self.eyes.networks else {}),
        }
        refuse_other(out, self.described)

    def _judges(self, judge: Judge | None, eyes: Eyes) -> tuple[Judge | None, Eyes]:
        """Those that can see what the model draws; what is left out is told by name."""
        model, seeds = self.run.setup.model, self.options.seeds
        if judge is not None and self.labels is None:
            self.tell(f"{model.name} takes no labels: {', '.join(FIGURES)} of a judge are left out")
            judge = None
        if judge is not None:
            knows = judge.classifier
            if knows.input_shape != self.shape or knows.classes != model.classes:
                raise ValueError(
                    f"{model.name} draws {self.shape} of {model.classes} classes; the judge knows "
                    f"{knows.input_shape} of {knows.classes} (--no-judge)"
                )
            enough(seeds, FEATURE_FIGURES, "a judge", "--no-judge")
            halves(judge.test, seeds, knows.classes, self.labels)
        if eyes.networks and (self.latents or len(self.shape) != 3):
            what = "latents" if self.latents else "videos"
            left = ", ".join(name for network in eyes.networks.values() for name in network.figures.values())
            self.tell(f"{model.name} draws {what}, which no network sees: {left} are left out")
            eyes = Eyes({})
        for name, network in eyes.networks.items():
            if network.kind == "features":
                enough(seeds, network.figures, f"network {name}", "no such network")
        return judge, eyes

    def qualities(self) -> tuple[str, ...]:
        """The figures that a measured method will have (`difax.study.frontier.QUALITIES`)."""
        found = list(measures(self.shape))
        if self.judge is not None:
            found += [f for f in FIGURES if f != "frechet" or self.options.seeds >= 2 * self.judge.width]
        return (*found, *figures(self.eyes, self.options.seeds))

    def _accelerated(self, method: Method, calibrated: pathlib.Path | None = None) -> Opened:
        """The run with a method's settings."""
        return accelerated(self.run, method, {} if calibrated is None else {"cache.file": str(calibrated)})

    @contextlib.contextmanager
    def _claimed(self) -> Iterator[None]:
        """Makes the folder and writes what it is of, or checks that it is the same; keeps other processes out of it."""
        self.out.mkdir(parents=True, exist_ok=True)
        with locked(self.out, "difax pareto"):
            refuse_other(self.out, self.described)
            drop_cut_line(self.out / "rows.jsonl")
            path = self.out / "sweep.json"
            if not path.exists():
                with replacing(path) as aside:
                    pathlib.Path(aside).write_text(json.dumps(self.described, indent=1) + "\n")
            yield

    def _left(self, todo: Mapping[str, Method]) -> dict[str, Method]:
        """What the folder does not have yet.

        Raises:
          ValueError: a method that it has with other settings.
        """
        there = {row["method"]: row["settings"] for row in self.rows()}
        for name, settings in there.items():
            if name in todo and settings != finite(plain(todo[name].settings)):
                raise ValueError(f"{self.out} has {name!r} with other settings, {settings}; allowed: another --out")
        return {n: m for n, m in todo.items() if n not in there}

    def rows(self) -> list[dict[str, Any]]:
        """What is measured; without a line that a killed process left half-written."""
        return read_measured(self.out)

    def measure(self, methods: Mapping[str, Method]) -> list[dict[str, Any]]:
        """Measures what the folder does not have yet: baseline, control and methods. Returns all rows.

        A method that fails is named in `failed` and gets no row, so that the sweep goes on, and tries it again when it
        is started again. Nothing is measured, and no folder made, without the baseline, whose failure is raised.

        Raises:
          ValueError: a baseline that is refused, or a folder that has a method with other settings.
          FloatingPointError: a baseline whose images are not finite.
        """
        methods = {name: with_steps(self.run, method) for name, method in methods.items()}
        todo = {BASELINE: Method("baseline", {}), **methods}
        if self._left(todo):
            self._check_images()
            self._wanted(self._baseline())
        with self._claimed():
            self._measure(self._left(todo))
        return self.rows()

    def _check_images(self) -> None:
        """Reads the images that are there, so that damaged ones are refused before more is measured."""
        for row in self.rows():
            path = self._image_file(row["method"])
            if place_of(path) is not None:
                read_image_file(path)

    def _measure(self, left: Mapping[str, Method]) -> None:
        start = time.monotonic()
        if (self.judge is not None or self.eyes.real is not None) and CONTROL not in {
            row["method"] for row in self.rows()
        }:
            self._append({"method": CONTROL, "family": "control", "settings": {}, "quality": self._control()})
        for done, (name, method) in enumerate(left.items()):
            spent = (time.monotonic() - start) / 60
            if self.options.budget is not None and spent > self.options.budget and name != BASELINE:
                self.tell(
                    f"the budget of {self.options.budget:g} minutes is spent; {len(left) - done} methods are left"
                )
                break
            try:
                row = finite(self._row(name, method))
            except NoRoom:  # nor would the next one be kept
                raise
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

    def _append(self, row: dict[str, Any]) -> None:
        append_line(self.out / "rows.jsonl", json.dumps(finite(row), allow_nan=False))

    def _row(self, name: str, method: Method) -> dict[str, Any]:
        about = {
            "method": name,
            "family": method.family,
            "settings": plain(method.settings),
            "calibrated": method.calibrated,
            "command": self._command(method),
        }
        try:
            run = self._accelerated(method, self._calibrated(method.calibrated) if method.calibrated else None)
            program = self._baseline() if name == BASELINE else Timed(run, self.cond, self.options, self.compiled)
        except NoRoom:  # says nothing of the method
            raise
        except (ValueError, NotImplementedError) as error:
            return {**about, "refused": " ".join(str(error).split())}
        measured = self._measured(name, program)
        return {
            **about,
            **measured,
            "config": plain(run.config),
            "device": device_name(),
            "processor": processor(),
            "jax": jax.__version__,
            "versions": versions(),
            "date": _now(),
        }

    def _baseline(self) -> Timed:
        if self.baseline is None:
            self.baseline = Timed(self.run, self.cond, self.options, self.compiled)
        return self.baseline

    def _measured(self, name: str, program: Timed) -> dict[str, Any]:
        baseline, options = self._baseline(), self.options
        batches, wanted = self._batches(), self._wanted(baseline)
        drawn, own = [program.draw(0)[:2]], []  # not timed: the first run touches its memory
        turns = []
        for index in range(1, max(batches, options.turns + 1)):
            at, timed = index % batches, index <= options.turns
            beside = baseline.draw(at)[2] if timed and index % 2 else 0.0  # who is first changes from turn to turn
            samples, trace, seconds = program.draw(at)
            if timed:
                turns.append((seconds, beside or baseline.draw(at)[2]))
            own.append(seconds)
            if index < batches:
                drawn.append((samples, trace))
        images, traces = (list(part) for part in zip(*drawn, strict=True))
        together = self._pictures(np.concatenate(images)[: options.seeds])
        trace = averaged(traces)
        cost, moved = self._cost(program, traces)
        uncached, uncached_moved = self.uncached
        # the baseline is the unit: what its turns against itself are off from 1 is the machine's noise
        pairs = turns or [(a, statistics.median(self.seconds)) for a in own or [program.draw(0)[2]]]
        ratio = 1.0 if name == BASELINE else statistics.median(b / a for a, b in pairs)
        self._save_images(name, together)
        lost = _lost(together)
        if trace.unfinished > 0:
            warnings.warn(unfinished(program.setup, trace), DifaxWarning, stacklevel=2)
        return {
            "evaluations": round(evaluations(program.setup.solver, program.setup.rows, trace), 2),
            "cost": {
                "gflops_per_image": cost / 1e9,
                "ratio": uncached / cost,
                "gbytes_per_image": moved / 1e9,
                "bytes_ratio": uncached_moved / moved,
            },
            "speed": {
                "seconds_per_image": statistics.median(a for a, _ in pairs) / options.batch,
                "baseline_seconds_per_image": statistics.median(b for _, b in pairs) / options.batch,
                **({} if self.decoding is None else {"decode_seconds_per_image": self.decoding}),
                "ratio": ratio,
                "turns": [b / a for a, b in turns],
                "realised": ratio * cost / uncached,
                "compile_seconds": program.program.compile_seconds,
                "shared_compilation": program.program.shared,
                "peak_memory_mib": peak_memory(program.program.compiled) / 2**20,
            },
            "quality": {} if lost else self._quality(together, wanted),
            **({"not_finite": lost} if lost else {}),
            **({"range": list(self.range), "shown": self._shown()} if self.latents else {}),
            "decisions": decisions(trace, program.setup.width),
        }

    def _batches(self) -> int:
        return -(-self.options.seeds // self.options.batch)

    def _wanted(self, baseline: Timed) -> np.ndarray:
        if self.wanted is None:
            baseline.draw(0)
            drawn = [baseline.draw(i) for i in range(self._batches())]
            self.seconds = [seconds for *_, seconds in drawn]
            wanted = self._pictures(np.concatenate([samples for samples, *_ in drawn])[: self.options.seeds])
            lost = _lost(wanted)
            if lost:
                raise FloatingPointError(
                    f"{lost} of {len(wanted)} images of the baseline are not finite: there is nothing to compare with"
                )
            if self.latents:
                self.range = (float(wanted.min()), float(wanted.max()))
                self.tell(
                    f"{self.run.setup.model.name} draws latents: PSNR and SSIM take their range, "
                    f"{self.range[0]:.3g} to {self.range[1]:.3g}; pictures show {self._shown()}"
                )
            self.uncached = self._cost(baseline, [trace for _, trace, _ in drawn])
            self.wanted = wanted
        return self.wanted

    def _pictures(self, samples: np.ndarray) -> np.ndarray:
        """What is looked at of samples [n, ...]: of a pipeline the decoded pictures, whose seconds are kept."""
        pipeline = self.run.pipeline
        if pipeline is None:
            return samples
        if self.decoding is None:
            pipeline.decode(samples[:1])  # reads the autoencoder and compiles
        start = time.perf_counter()
        images = pipeline.decode(samples)
        seconds = (time.perf_counter() - start) / len(samples)
        if self.decoding is None:
            self.tell(f"decoding takes {seconds:.3g} s an image, beside the sampler's seconds")
        self.decoding = seconds
        return images

    def _cost(self, program: Timed, traces: list[Trace]) -> tuple[float, float]:
        """Operations and bytes of one image; the weights' bytes are those of a batch, shared by its images."""
        run, batch = program.setup, self.options.batch
        parts = (run.model, program.params, run.attention)
        networks = run.accelerator.networks
        cost = model_bytes(*parts, networks)
        moved = [run_bytes(cost, trace, batch, run.guide.together) for trace in traces]
        return run_cost(model_cost(*parts, networks=networks), averaged(traces)), statistics.mean(moved) / batch

    def _quality(self, images: np.ndarray, wanted: np.ndarray) -> dict[str, Any]:
        compare = measures(self.shape, self.range[1] - self.range[0] or 1.0)
        found: dict[str, Any] = {name: list(bootstrap(of(images, wanted))) for name, of in compare.items()}
        if self.judge is not None:
            assert self.labels is not None
            found |= compared(self.judge, to_uint8(images), self.labels)
        if self.eyes.networks:
            found |= seen(self.eyes, to_uint8(images), to_uint8(wanted), self.index)
        return found

    def _control(self) -> dict[str, Any]:
        found = {}
        if self.judge is not None:
            assert self.labels is not None
            found |= compared(self.judge, None, self.labels)
        if self.eyes.real is not None:
            found |= seen(self.eyes, self.eyes.real[1][: self.options.seeds])
        return found

    def _shown(self) -> str:
        """What a picture of latents is of."""
        channels = self.run.setup.model.input_shape[-1]
        which = "channel 1" if channels < 3 else "channels 1 to 3"
        return f"{which} of {channels} of the latents, {self.range[0]:.3g} (black) to {self.range[1]:.3g}"

    def _save_images(self, name: str, images: np.ndarray) -> None:
        path = self._image_file(name)
        path.parent.mkdir(exist_ok=True)
        low, high = self.range
        if self.latents:
            images = 2 * (images[..., : 3 if images.shape[-1] >= 3 else 1] - low) / (high - low or 1.0) - 1
        images = np.nan_to_num(images, nan=-1.0, posinf=1.0, neginf=-1.0)
        save_arrays(path, {"images": to_uint8(images)}, compressed=True)

    def _image_file(self, name: str) -> pathlib.Path:
        return self.out / "images" / f"{slug(name)}.npz"

    def _calibrated(self, technique: str) -> pathlib.Path:
        """The file of a technique, calibrated on other seeds if the folder does not have it."""
        path = self._file(technique)
        if path.exists():
            return path
        path.parent.mkdir(exist_ok=True)
        self.tell(f"calibrating {technique}")
        searched = technique == "scheduled"
        settings = {"budget": 0.4, "rounds": 6} if searched else {}
        samples = 10 if searched else CALIBRATION_SAMPLES
        self.run.calibrate(technique, path, self.cond, samples=samples, batch=10, seed=CALIBRATION_SEED, **settings)
        return path

    def _command(self, method: Method) -> str:
        flags = [shlex.quote(f"--config.{k}={_flag(v)}") for k, v in method.settings.items()]
        if method.calibrated:
            flags.append(shlex.quote(f"--config.cache.file={self._file(method.calibrated)}"))
        return " ".join(["difax sample", self.name, *flags, f"--seed {self.options.seed}"])

    def _file(self, technique: str) -> pathlib.Path:
        return self.out / "calibrated" / f"{technique}{ending(technique)}"


def drawn_shape(run: Opened) -> tuple[int, ...]:
    """Of what is compared and judged: a pipeline's picture or film, else a sample."""
    return run.setup.model.input_shape if run.pipeline is None else run.pipeline.shape


def measures(shape: tuple[int, ...], peak: float = 2.0) -> dict[str, Measure]:
    """What compares images [N, ...] with the unaccelerated ones, by name.

    Args:
      shape: of an image (`drawn_shape`). peak: width of their range.
    """

    def decibels(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.asarray([min(psnr(x, y, peak), PSNR_LIMIT) for x, y in zip(a, b, strict=True)])

    large = min(shape[-3:-1]) >= WINDOW
    return {
        "psnr": framewise(decibels),
        "ssim": framewise(lambda a, b: ssim(a, b, peak)),
        **({"ms_ssim": framewise(lambda a, b: ms_ssim(a, b, peak))} if large else {}),
        "relative_l1": lambda a, b: relative_error(a, b, 1),
        "relative_l2": lambda a, b: relative_error(a, b, 2),
    }


def accelerated(run: Opened, method: Method, more: Mapping[str, Any] = MappingProxyType({})) -> Opened:
    """The run with a method's settings, and more of them.

    Raises:
      ValueError: settings that a model cannot have, or that draw other images.
    """
    found, own = run.replace(**method.settings, **more), run.setup.model
    if found.setup.model.input_shape != own.input_shape:
        raise ValueError(
            f"{own.name} draws {own.input_shape}, and with these settings {found.setup.model.input_shape}; allowed: "
            "settings that draw the same images"
        )
    if run.pipeline is not None and found.setup.guide.halves > run.setup.guide.halves:
        raise ValueError(
            f"guide {found.setup.described.get('guide', '')}: {run.pipeline.folder.name} is not guided by a second "
            "evaluation here, and has no other half of the condition; allowed: methods without a guide"
        )
    return found


def with_steps(run: Opened, method: Method) -> Method:
    """A method with the number of steps that makes its evaluations; as it was where a solver refuses every number."""
    if method.evaluations is None:
        return method
    for steps in range(method.evaluations, 0, -1):
        found = method._replace(settings={**method.settings, "steps": steps})
        with contextlib.suppress(ValueError, NotImplementedError):
            if len(accelerated(run, found).setup.rows.i) <= method.evaluations:
                return found
    return method._replace(settings={**method.settings, "steps": method.evaluations})


def check_methods(run: Opened, methods: Mapping[str, Method]) -> None:
    """Builds the baseline and methods without reading weights.

    Raises:
      ValueError: a baseline with a cache, or a method that cannot be built; names it.
    """
    cache = run.config.get("cache", {}).get("name", "none")
    if cache != "none" and not (run.pipeline is not None and cache == EXPERTS):  # a second network is no cache
        raise ValueError(
            f"cache {shown(cache)}: methods are compared with the sampler without a cache; allowed: --cache none, "
            f"and {shown(cache)} among --methods"
        )
    for name, method in methods.items():
        try:
            accelerated(run, method)
        except (ValueError, NotImplementedError) as error:
            raise ValueError(f"--methods {name}: {' '.join(str(error).split())}") from None


def check_quality(quality: str, there: Collection[str], seeds: int) -> None:
    """Refuses a figure that no measured method will have, and says what brings it.

    Args:
      there: the figures that there will be (`Sweep.qualities`).
    """
    if quality in there:
        return
    how = BROUGHT[quality]
    if quality in DISTANCES:
        how += ", and two images for each feature (--seeds)"
    raise ValueError(
        f"--quality {quality}: nothing here will have it of {seeds} images; it needs {how}; allowed: {', '.join(there)}"
    )


DISTANCES = ("frechet", "lite0_frechet", "fid")  # which need a covariance


def enough(seeds: int, compared: Collection[str], what: str, otherwise: str) -> None:
    """Refuses fewer images than figures of sets need.

    Args:
      compared: keys of `FEATURE_FIGURES`. what: wants them. otherwise: what else is allowed.
    """
    least = max(FEATURE_FIGURES[figure].least for figure in compared)
    if seeds < least:
        raise ValueError(
            f"--seeds={seeds}: {what} compares sets of {least} images or more; allowed: {least} or more, or {otherwise}"
        )


def described(run: Opened, cond: Any, options: Options) -> dict[str, Any]:
    """What a folder says that it is a sweep of, before anything of the model is read."""
    leaves, model = [np.asarray(leaf) for leaf in jax.tree.leaves(cond)], run.setup.model
    if not labelled(model):
        content = hashlib.sha256(b"".join(a.tobytes() for a in leaves)).hexdigest()[:12]
        conditions: dict[str, Any] = {"conditions": f"{len(leaves[0])} of {content}"}
    elif leaves[0].tolist() == list(range(model.classes)):
        conditions = {}
    else:
        conditions = {"labels": leaves[0].tolist()}
    return {
        "config": plain(run.config),
        "weights": run.source,
        **conditions,
        "seeds": options.seeds,
        "batch": options.batch,
        "seed": options.seed,
        "device": device_name(),
        "jax": jax.__version__,
    }


def refuse_other(out: str | os.PathLike, here: Mapping[str, Any]) -> None:
    """Refuses a folder that holds another sweep; what only one of the two tells of is compared where both have all.

    Args:
      here: all of what is claimed, or a part (`described`).

    Raises:
      ValueError: something else is there; names what differs.
    """
    if place_of(pathlib.Path(out) / "sweep.json") is None:
        if place_of(pathlib.Path(out) / "rows.jsonl") is not None:
            raise ValueError(
                f"{out} has rows.jsonl without the sweep.json that says what they are of; allowed: another --out"
            )
        return
    there = read_sweep(out)
    keys = {**here, **there} if "judged" in here else here
    other = [k for k in keys if there.get(k) != here.get(k) and (k != "weights" or k in there)]
    if other:
        differences = "; ".join(f"{k}: {there.get(k)} there, {here.get(k)} here" for k in other if k != "config")
        raise ValueError(
            f"{out} holds another sweep ({differences or 'another configuration'}); allowed: the same one, or "
            "another --out"
        )


def decisions(trace: Trace, width: int = 1) -> dict[str, Any]:
    """What was computed, as a strip for each half and as a share for each evaluation that was made (`width` of a sample
    at once) and block, in hundredths."""
    halves = next(iter(trace.computed.values())).shape[-1]
    blocks = np.concatenate([np.asarray(c, np.float64).mean((2, 3)) for c in trace.computed.values()], axis=1) / width
    blocks = blocks[np.broadcast_to(np.asarray(trace.live) > 0, len(blocks))]
    return {
        "strips": [strip(trace, half) for half in range(halves)],
        "blocks": np.round(100 * np.minimum(blocks, 1)).astype(int).tolist(),  # what scores tokens does more
        "computed_fraction": float(np.mean(blocks)),
    }


def slug(name: str) -> str:
    """A method's name as that of a file."""
    kept = "".join(c if c.isalnum() else "_" for c in name)
    return f"{kept[:60]}_{hashlib.sha256(name.encode()).hexdigest()[:6]}"


def _flag(value: Any) -> str:
    return value if isinstance(value, str) else str(value).replace(" ", "")


def _lost(images: np.ndarray) -> int:
    """How many images have values that are not finite."""
    return int(np.sum(~np.isfinite(images).reshape(len(images), -1).all(1)))


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
