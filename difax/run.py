"""The front door: a configuration or a checkpoint opened as a `Run`, which samples, calibrates and profiles."""

from __future__ import annotations

import base64
import io
import json
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np

from difax.accel.caches import published
from difax.build import Setup, build_data, build_options, build_setup, build_task, described, with_recipe
from difax.checkpoints import RANDOM, Weights, embedded_weights, find_weights
from difax.config import (
    config_names,
    configuration,
    keyword_settings,
    load_config,
    override,
    piped,
    pipeline_config,
    plain,
    scheduled,
)
from difax.core import hosts
from difax.core.annotations import OrInfinite, Seed, brief, check_arguments, check_value
from difax.core.contracts import Params
from difax.core.decisions import save_trace
from difax.core.device import check_memory, memory_available
from difax.core.executables import signature
from difax.core.files import writable
from difax.core.qtensor import size_in_bytes
from difax.media.films import RATE
from difax.media.images import picture, pictured
from difax.media.samples import check_latents, check_output, save_samples
from difax.pipelines.encode import check_prompts
from difax.pipelines.folder import is_pipeline
from difax.pipelines.pipeline import Pipeline, begun_by_image, network_of
from difax.pipelines.preview import Preview, check_preview, previewing
from difax.pipelines.section import COMPONENTS
from difax.program import (
    Drawn,
    Program,
    ahead_of_time,
    check_samples,
    draw,
    model_shapes,
    previewer,
    together,
    weight_bytes,
)
from difax.registry import choose
from difax.report import format_table
from difax.study import calibrate as calibrate_
from difax.study import plan as plan_
from difax.study import profile as profile_
from difax.training.data import CLASS_NAMES, check_images, data_section
from difax.training.train import TrainState, Unfit, resumes
from difax.training.train import train as train_
from difax.weights.conditions import check_conditions, labelled, load_conditions, random_conditions


class Result:
    """Samples of a run, what was computed for them and what it cost; shows itself in a notebook.

    images: float32 [N, H, W, C], or videos [N, F, H, W, C], in [-1, 1] (latents, for models of latents without a
    pipeline that decodes them). samples: what the network gave, of a pipeline the latents. prompts: of each image.
    trace: what was computed (`difax.Trace`), the mean over the batches; with `steps_by` {steps: of those samples}.
    cost: a table {name: value}: evaluations, GFLOPs, seconds, memory, what a cache decided, whether all images are
    `finite` (`difax.program.draw`).
    latents: [N, ...] that the samples began from. cond: their conditions. seed: of the run.
    """

    def __init__(
        self, run: Run, cond: Any, columns: int, seed: int, drawn: Drawn, prompts: Sequence[str] | None = None
    ):
        self.run, self.cond, self.columns, self.seed, self.prompts = run, cond, columns, seed, prompts
        self.samples: np.ndarray = drawn.samples
        self.images: np.ndarray = drawn.samples if run.pipeline is None else run.pipeline.decode(drawn.samples)
        self.latents: np.ndarray = drawn.latents
        self.trace: Any = drawn.trace
        self.cost: dict[str, Any] = drawn.table

    def __iter__(self) -> Any:
        """images, trace, cost."""
        return iter((self.images, self.trace, self.cost))

    @property
    def table(self) -> dict[str, Any]:
        """What was run, and its cost."""
        part = pictured(self.images.shape[-1])
        names = {"cache": "none", "attend": "xla", "quant": "none", **self.run.setup.described}
        return {
            "model": self.run.setup.model.name,
            "weights": self.run.source,
            **{key: names[key] for key in ("solver", "guide", "cache", "attend", "quant")},
            "dtype": str(np.dtype(self.run.setup.model.dtype)),
            **self.cost,
            **({} if self.run.pipeline is None else self.run.pipeline.spent()),
            **self._numbers(),
            **({} if part is None else {"pictures": f"{part}, -1 (black) to 1"}),
            **self.run.full_size,
        }

    def _numbers(self) -> dict[str, str]:
        """Which published numbers a cache went by, for the table."""
        found = {}
        for key, value in self.run.config.get("cache", {}).items():
            technique = {"coefficients": "teacache", "ratios": "magcache"}.get(key.rpartition(".")[2])
            if technique and isinstance(value, str):
                name, fit = published.entry(technique, key, value)
                found["published"] = f"{technique} of {name}, {fit['source']}"
        return found

    def save(self, path: str | os.PathLike, *, fps: float | None = None, each: str = ".png") -> pathlib.Path:
        """Writes the samples by the ending of a path; what is written appears whole or not at all.

        .png, .jpg, .webp: one grid of pictures; .webp, .gif, .mp4: of videos one film of them all (.mp4 needs the extra
        `video`). .npz: `samples` float32, `latents`, `seeds` int64 [N, 2] (of the run, index of the sample), the
        conditions (`labels`, or `cond/NAME`) and `config` (JSON). No suffix: a folder of single pictures or films, a
        video being a folder of its frames where those are pictures.

        Args:
          fps: frames a second of films, 1 to 120, of a .gif 1 to 50; None is the pipeline's (16).
          each: suffix of the files in a folder (".png").

        Returns:
          The path.

        Raises:
          ValueError: another suffix or frame rate, a place that cannot be written, or .mp4 without the extra.
        """
        own = RATE if self.run.pipeline is None else self.run.pipeline.section.get("fps", RATE)
        rate, each = check_value("fps", own if fps is None else fps, float), check_value("each", each, str)
        target = check_output(os.fspath(check_value("path", path, str | os.PathLike)), fps=rate, each=each)
        leaves = jax.tree_util.tree_flatten_with_path(self.cond)[0]
        name = lambda p: f"cond/{jax.tree_util.keystr(p, simple=True, separator='/')}" if p else "labels"  # noqa: E731
        arrays = {
            "latents": self.latents,
            "seeds": np.stack([np.full(len(self.images), self.seed), np.arange(len(self.images))], 1),
            **{name(p): np.asarray(leaf) for p, leaf in leaves},
            "config": np.asarray(json.dumps(plain(self.run.config))),
            **({} if self.prompts is None else {"prompts": np.asarray(self.prompts)}),
            **({} if self.images is self.samples else {"pixels": self.images}),
        }
        numbers = self.samples if target.suffix == ".npz" else self.images
        save_samples(target, numbers, self.columns, arrays, rate, each)
        return target

    def save_trace(self, path: str | os.PathLike) -> None:
        """Writes what was computed as .npz (`difax.core.decisions.save_trace`)."""
        path = check_value("path", path, str | os.PathLike)
        if isinstance(self.trace, dict):
            raise ValueError("trace: runs of several lengths (steps_by) have no trace in common; allowed: one of steps")
        save_trace(writable(path, (".npz",), "trace"), self.run.setup.rows, self.trace)

    def picture(self) -> np.ndarray:
        """One grid of the samples, uint8 [H, W] or [H, W, 3]."""
        return picture(self.images, self.columns)

    def _repr_png_(self) -> bytes:
        from PIL import Image

        buffer = io.BytesIO()
        Image.fromarray(self.picture()).save(buffer, format="PNG")
        return buffer.getvalue()

    def _repr_html_(self) -> str:
        picture = base64.b64encode(self._repr_png_()).decode()
        return f'<img src="data:image/png;base64,{picture}"/><pre>{format_table(self.table)}</pre>'

    def __repr__(self) -> str:
        return format_table(self.table)


class Run:
    """A configuration with its weights and its compiled programs, as `difax.load` opens it.

    config: the whole configuration. setup: what it is made of (`difax.build.Setup`). weights: of the model
    (`difax.checkpoints.Weights`). full_size: what compiling the full size told, where only a reduced one fits into
    memory.

    A Run is never changed: `replace` makes another one. Programs are compiled when they are first drawn with and kept,
    for this run and for those that `replace` made of it.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        setup: Setup,
        weights: Weights,
        path: str | None = None,
        seed: int = 0,
        full_size: Mapping[str, Any] | None = None,
        kept: Run | None = None,
        as_configured: bool = True,
    ):
        """path: of the weights, or None. seed: of random weights. kept: whose programs and weights may be used on.
        as_configured: is the model what the configuration alone would give (a checkpoint may know better)."""
        self.config, self.setup, self.weights = dict(config), setup, weights
        self.full_size = dict(full_size or {})
        self._path, self._seed, self._as_configured = path, seed, as_configured
        self._compiled: dict[str, Any] = {} if kept is None else kept._compiled
        self._programs: dict[Any, Program] = {}
        self._parts: dict[int, Run] = {}  # by the number of steps, where labels have their own
        self._prepared: Params | None = None
        self.pipeline: Pipeline | None = None
        if "pipeline" in self.config:
            same = kept is not None and kept.config.get("pipeline") == self.config["pipeline"]
            self.pipeline = kept.pipeline if kept is not None and same else Pipeline(self.config["pipeline"])
        if kept is not None and kept.weights is weights and self._preparation() == kept._preparation():
            self._prepared = kept._prepared

    @property
    def params(self) -> Params:
        """The weights as they are stored; read when they are first asked for."""
        return self.weights.params

    @property
    def source(self) -> str:
        """Where the weights come from."""
        return self.weights.source

    def _preparation(self) -> Any:
        """What `Setup.prepare` goes by; equal to nothing where parameters that a cache has learned go in."""
        if self.setup.accelerator.learned is not None:
            return object()
        return list(self.setup.rules), str(self.setup.model.dtype), self.setup.stacked, self.setup.placement

    @property
    def prepared(self) -> Params:
        """The weights as they are sampled with: quantised, cast, in the layout of the configuration."""
        if self._prepared is None:
            self._prepared = jax.block_until_ready(self.setup.place(self.setup.prepare(self.params)))
        return self._prepared

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, or () where they are not known."""
        data = self.config.get("data", {})
        return tuple(map(str, data.get("names") or CLASS_NAMES.get(data.get("name"), ())))

    def conditions(self, cond: Any = None) -> Any:
        """Conditions [n] as the model takes them.

        Args:
          cond: labels, as numbers or names, in a list or as "bag,3"; a path of embeddings (.safetensors), or their
            tree; None is one of each class (at most ten), or random embeddings for random weights.

        Raises:
          ValueError: labels out of range, embeddings that do not fit, or none where the weights are real.
        """
        model = self.setup.model
        if labelled(model):
            if cond is None:
                return np.arange(min(model.classes, 10), dtype=np.int32)
            if isinstance(cond, Mapping) or isinstance(cond, str) and cond.endswith(".safetensors"):
                raise ValueError(f"cond {cond if isinstance(cond, str) else brief(cond)}: {model.name} takes labels")
            words = cond.split(",") if isinstance(cond, str) else np.ravel(np.asarray(cond, object)).tolist()
            return np.asarray(parse_labels(words, model.classes, self.class_names), np.int32)
        if isinstance(cond, (str, os.PathLike)):
            return load_conditions(model, os.fspath(cond), self.pipeline is not None)
        if cond is not None:
            return check_conditions(model, cond, lengths=self.pipeline is not None)
        if self.source == RANDOM:
            return random_conditions(model, 1, self._seed)
        leaves = jax.tree_util.tree_flatten_with_path(model.cond)[0]
        names = ", ".join(
            f"{jax.tree_util.keystr(p, simple=True, separator='/')} [{', '.join(map(str, ('n', *a.shape)))}]"
            for p, a in leaves
        )
        prompt = "" if self.pipeline is None else "--prompt TEXT, or "
        raise ValueError(
            f"{model.name} takes embeddings; give {prompt}--cond FILE.safetensors with the tensors {names}"
        )

    def sample(
        self,
        cond: Any = None,
        seed: int = 0,
        *,
        repeat: int = 1,
        prompt: str | Sequence[str] | None = None,
        latents: Any = None,
        noise: Any = None,
        image: Any = None,
        strength: float | None = None,
        mask: Any = None,
        batch: int | None = None,
        preview: Preview | None = None,
        progress: bool = False,
    ) -> Result:
        """Draws one sample per condition; the first call of a shape compiles, later ones do not.

        Args:
          cond: as `conditions` takes it.
          seed: 0 ... 2^32 - 1; sample i depends on (seed, i), its condition and its latents, and not on its batch but
            with a cache that decides in the run without `per_sample`: one decision then serves the batch.
          repeat: how often the conditions are gone through, each time with other noise.
          prompt: of a pipeline, one or several, in place of `cond`.
          latents: [n, ...] to begin from, in place of noise of the seed; of a pipeline in diffusers' layout too.
          noise: [n, evaluations, ...] that the steps take, in place of the seed's; layouts as of the latents.
          image: of a pipeline, to begin from: a path, or uint8 [H, W, 3] or [n, H, W, 3]; of a pipeline from image to
            video its first frame, with the prompts (n of them).
          strength: of the noise that is added to it, above 0 up to 1: that part of the steps is made (the pipeline's).
          mask: of the image, 1 where it may become another: a path, or [H, W] or [n, H, W] of 0 ... 1.
          batch: samples at a time; None is as many as make 64 evaluations, of a pipeline 1.
          preview: called with what is predicted on the way (`Preview`).
          progress: a bar on stderr, at the price of a callback per step; by batches where executables are kept.

        Returns:
          `Result`: images, trace and cost.

        Raises:
          ValueError: a condition, seed or latents that the model cannot take, an image or a mask that is none.
        """
        check_seed(seed)
        if self.pipeline is not None:
            self.pipeline.seconds.clear()
        if prompt is not None and cond is not None:
            raise ValueError("cond and prompt exclude each other; allowed: one of them")
        words = None if prompt is None else [prompt] if isinstance(prompt, str) else list(prompt)
        first = begun_by_image(self.setup.model)
        if first and words is None and image is not None:
            raise ValueError(f"{self.setup.model.name}: image without prompt; allowed: both, or cond, which holds both")
        row = None if words is not None else self.conditions(cond)
        columns = len(jax.tree.leaves(row)[0]) if words is None else len(check_prompts(words))
        begins, image = (image, None) if first else (None, image)
        _counted(repeat=repeat)
        n = columns * repeat
        setup, shape = self.setup, self.setup.model.input_shape
        if latents is not None:
            latents = check_latents(self.channels_last(latents), n, shape)
        more: dict[str, Any] = {}
        if image is not None or mask is not None or strength is not None:
            if self.pipeline is None or image is None:
                allowed = "without mask and strength" if first else "difax.load(FOLDER)"
                raise ValueError(f"image, mask and strength: of a pipeline, with an image; allowed: {allowed}")
            share = self.pipeline.strength(mask) if strength is None else check_value("strength", strength, float)
            setup = setup.started(share)
            more["image"], more["mask"] = self.pipeline.known(image, mask, n, shape)
        if noise is not None:
            more["noise"] = check_latents(self.channels_last(noise, 2), n, (len(setup.rows.i), *shape), "noise")
        if batch is not None:
            _counted(batch=batch)
        batch = 1 if batch is None and self.pipeline is not None else batch
        check_preview(preview)
        if words is not None:  # when all else is known to be right
            row = self.encoded(words, begins)
        all_of = self._repeated(row, repeat)
        options: dict[str, Any] = {"latents": latents, "progress": progress}
        if self.setup.by_label is not None:
            if more:
                raise ValueError("steps_by: labels of other steps each; allowed: without noise, image and mask")
            return Result(self, all_of, columns, seed, self._by_label(all_of, seed, **options))
        weights = (lambda: self.prepared) if self._prepared is None else self._prepared
        if self.pipeline is not None:
            self.pipeline.tell("denoising")
        with previewing(preview, self.pipeline, len(setup.rows.i)) as watch:
            drawn = draw(
                setup, weights, all_of, seed, program=self._program, batch=batch, watch=watch, **options, **more
            )
        if isinstance(all_of, Mapping) and "first_frame" in all_of:  # what was made of it means nothing
            kept = np.asarray(all_of["first_frame"], drawn.samples.dtype)[:, None]
            drawn = drawn._replace(samples=np.concatenate([kept, drawn.samples[:, 1:]], 1))
        return Result(self, all_of, columns, seed, drawn, None if words is None else words * repeat)

    def encoded(self, prompts: Sequence[str], image: Any = None) -> Any:
        """Conditions [n] of prompts, by the encoders of the run's pipeline.

        Args:
          image: of a pipeline from image to video, the first frame.

        Raises:
          ValueError: a run without a pipeline, a model of labels, no prompts, or what is no text.
        """
        if self.pipeline is None:
            raise ValueError(f"prompts: {self.setup.model.name} has no pipeline; allowed: difax.load(FOLDER)")
        return self.pipeline.conditions(self.setup.model, prompts, self.setup.guide.halves > 1, image)

    def channels_last(self, latents: Any, lead: int = 1) -> Any:
        """Latents in the layout of the model, where a pipeline's are in diffusers'; [n, ...], or with more axes in
        front."""
        if self.pipeline is None:
            return latents
        return self.pipeline.channels_last(np.asarray(latents), self.setup.model.input_shape, lead)

    def _by_label(self, labels: Any, seed: int, latents: Any, progress: bool) -> Drawn:
        """Samples whose labels have steps of their own: those of one number of steps are drawn by one program."""
        assert self.setup.by_label is not None
        steps, parts = np.asarray(self.setup.by_label)[np.asarray(labels)], []
        for count in np.unique(steps).tolist():
            numbers = np.flatnonzero(steps == count)
            if count not in self._parts:
                self._parts[count] = self.replace(steps=count, steps_by=None)
            part = self._parts[count]
            some = None if latents is None else latents[numbers]
            options: dict[str, Any] = {"latents": some, "progress": progress, "program": part._program}
            parts.append((numbers, draw(part.setup, part.prepared, labels[numbers], seed, numbers=numbers, **options)))
        return together(parts)

    def _repeated(self, row: Any, repeat: int) -> Any:
        """Conditions [n] gone through so often, [repeat n]; refused before they are laid out if they do not fit."""
        _counted(repeat=repeat)
        check_samples(self.setup, len(jax.tree.leaves(row)[0]) * repeat)
        return jax.tree.map(lambda a: np.concatenate([np.asarray(a)] * repeat), row)

    def _program(self, setup: Setup, params: Params, inputs: Any, **calls: Any) -> Program:
        if any(call is not None for call in calls.values()):  # a program of its own: it calls back to this draw's bar
            return Program(setup, params, inputs, **calls)
        # of one run the steps alone may differ, where it begins at an image
        shapes = f"{len(setup.rows.i)} {signature((params, inputs))}"
        if shapes in self._programs and not self._programs[shapes].failed:
            self._programs[shapes].again()
        else:
            self._programs[shapes] = Program(setup, params, inputs, self._compiled)
        return self._programs[shapes]

    def replace(self, *, weights: Any = None, **settings: Any) -> Run:
        """Another run: only what the settings change is made and compiled anew.

        The weights are read again where the settings name others, or another model.

        Args:
          weights, settings: as `load` takes them.
        """
        config = piped(configuration(self.config, _file(weights), keyword_settings(settings)), self.config)
        new, old = config["model"], self.config["model"]
        whole = lambda section: {k: v for k, v in section.items() if k != "dtype"}  # noqa: E731
        moved = self._path is not None and config.get("mesh") != self.config.get("mesh")  # read onto other devices
        if weights is not None or moved or whole(new) != whole(old) or (new != old and not self._as_configured):
            return _opened(config, self._path if weights is None else weights, self._seed, kept=self)
        setup = build_setup(config, self.setup.model if new == old else None)
        if new == old:
            setup = with_recipe(setup, config, self.weights.section)
        return Run(config, setup, self.weights, self._path, self._seed, self.full_size, self, self._as_configured)

    def calibrate(
        self,
        technique: str,
        out: str | os.PathLike | None = None,
        cond: Any = None,
        *,
        samples: int = 16,
        batch: int = 4,
        seed: int = 0,
        tell: Callable[[str], None] = lambda text: None,
        kind: str = "cache",
        **settings: Any,
    ) -> dict[str, Any]:
        """Measures what a cache plans from, fits what it has learned, or searches a plan; or fits a grid or a solver
        (`difax.study.calibrate`).

        Args:
          technique: of `difax.study.calibrate.KINDS[kind]`.
          out: file to write, .npz for what is learned and .json else, for the cache's, grid's or solver's `file`; None
            writes none.
          cond: as `conditions` takes it. samples: to draw, in batches of `batch`. seed: of them.
          tell: is called with a line of progress.
          kind: what is calibrated, "cache", "grid" or "solver".
          settings: of "scheduled": budget, rounds, where, forecast, order; of what is fitted: rank; of grids and
            solvers what the fit takes.

        Returns:
          What the file holds.
        """
        check_seed(seed)
        _counted(samples=samples, batch=batch)
        choose("kind", kind, calibrate_.KINDS)
        check_value("tell", tell, Callable)
        calibrate_.check_settings(technique, settings, kind)
        if out is not None:
            out = writable(check_value("out", out, str | os.PathLike), (calibrate_.ending(technique, kind),), "out")
        plain_run = self.replace(cache="none")
        sampler = calibrate_.Sampler(plain_run.setup, plain_run.prepared, self.conditions(cond), seed)
        return calibrate_.calibrate_to(technique, sampler, out, samples, batch, tell, kind, **settings)

    def profile(self, cond: Any = None, seed: int = 0, *, repeat: int = 1, turns: int = 5) -> profile_.Profile:
        """Where the seconds of an evaluation go, part by part (`difax.study.profile`).

        Args:
          cond, seed, repeat: as `sample` takes them. turns: of which the median is taken.
        """
        check_seed(seed)
        _counted(turns=turns)
        profile_.check_setup(self.setup)
        all_of = self._repeated(self.conditions(cond), repeat)
        return profile_.profile(self.setup, self.prepared, all_of, seed, turns)

    def plan(
        self,
        target: str,
        mesh: str | None = None,
        *,
        batch: int | None = None,
        xla: Mapping[str, Any] | None = None,
        search: bool = True,
        whole: bool = False,
    ) -> plan_.Planned:
        """What this run would take on devices that are not there (`difax.plan`)."""
        return plan(self.config, target, mesh, batch=batch, xla=xla, search=search, whole=whole)


def plan(
    what: str | Mapping[str, Any],
    target: str,
    mesh: str | None = None,
    *,
    batch: int | None = None,
    xla: Mapping[str, Any] | None = None,
    search: bool = True,
    whole: bool = False,
    **settings: Any,
) -> plan_.Planned:
    """Compiles a run's whole sampler for devices that are not there, from shapes alone, and says what it would take.

    Args:
      what: a name of `difax list configs` ("flux_dev", "wan2_1:14B"), a .py file with get_config, a configuration, or a
        pipeline's folder, of which text encoders and autoencoder are planned too.
      target: "v5e:4x4", "v6e:2x4", "v5p:2x2x2", "v4:2x2x1" (all need difax[tpu]), "h100:8", "h200:8" (difax[cuda]),
        "cpu:8".
      mesh: sizes of its axes, such as "data=2,seq=8"; "auto" ranks all meshes; None is the configuration's own, or all
        devices along "data".
      batch: samples at once, 1 or more; None is one for each group of devices with samples of its own.
      xla: options of XLA's compiler. search: look for a placement that fits where this one does not.
      whole: also the published text encoders and autoencoder around the denoiser.
      settings: of sections, as `load` takes them.

    Returns:
      `difax.study.plan.Planned`, which shows itself as a table; `figures` are its numbers.

    Raises:
      ValueError: what is not there or does not fit: the key, the value, what is allowed and the nearest match.
    """
    if batch is not None:
        _counted(batch=batch)
    check_value("target", target, str)
    if mesh is not None and check_value("mesh", mesh, str) != "auto":
        settings["mesh"] = mesh
    given = keyword_settings(settings)
    if not isinstance(what, Mapping) and is_pipeline(what):
        config = pipeline_config(what, given)
    else:
        config = configuration(what, None, given)
    return plan_.plan(config, target, mesh == "auto", batch, xla, search, whole=check_value("whole", whole, bool))


def check_seed(seed: Any) -> None:
    """Refuses what is no seed of a run: an integer, 0 ... 2^32 - 1."""
    if check_value("seed", seed, Seed) < 0:
        raise ValueError(f"seed={seed}; allowed: 0 ... {2**32 - 1}")


def _counted(**numbers: Any) -> None:
    """Refuses a number of things that is no integer, or below 1."""
    for key, value in numbers.items():
        if check_value(key, value, int) < 1:
            raise ValueError(f"{key}={value}; allowed: 1 or more")


def load(
    what: str | os.PathLike | Mapping[str, Any] = "fmnist_dit",
    *,
    weights: Any = None,
    seed: int = 0,
    scheduler: str | os.PathLike | Mapping[str, Any] | None = None,
    **settings: Any,
) -> Run:
    """Opens a configuration or a checkpoint.

    Args:
      what: a name of `difax list configs` ("fmnist_dit", "dit_imagenet:XL/2"), a .py file with get_config, a
        configuration as a mapping; or a checkpoint, which brings its own: the folder of a training run, a .safetensors
        file that difax wrote, or a published checkpoint that difax knows.
      weights: of a configuration: the path of a checkpoint, a name of `difax list weights`, or "random"; None is what
        the configuration or the checkpoint names.
      seed: of random weights.
      scheduler: a scheduler_config.json of diffusers, a folder that has it (a pipeline's), or what it says: it is the
        sections process, prediction, solver and grid, in which settings still win.
      settings: of sections, by keyword: a name (`solver="dpmpp_2m"`, `quant="int8_w8a8"`), a value (`steps=12`), a
        mapping of keys (`cache={"name": "fora", "interval": 3}`), code of one's own (`cache="my/file.py:mine"`), a
        factory, or what a factory made (`cache=difax.Accelerator(...)`); `dtype` is that of the model.

    Returns:
      A `Run`.

    Raises:
      ValueError: what is not there or does not fit: the key, the value, what is allowed and the nearest match.
    """
    check_seed(seed)
    path, given = weights, keyword_settings(settings)
    check_value("scheduler", scheduler, str | os.PathLike | Mapping | None)
    finish = (lambda config: config) if scheduler is None else (lambda config: scheduled(config, scheduler, given))
    if not isinstance(what, (str, os.PathLike, Mapping)):
        raise ValueError(f"load {brief(what)}: allowed: a configuration, its name or file, or a checkpoint")
    if isinstance(what, Mapping):
        config = {k: dict(v) if isinstance(v, Mapping) else v for k, v in what.items()}
        return _opened(finish(override(config, given)), path, seed)
    what, base = os.fspath(what), os.fspath(what)
    if is_pipeline(what) or any(key.partition(".")[2] in COMPONENTS for key, _ in given):
        return _opened(pipeline_config(what, given, scheduler), path, seed)
    if _is_checkpoint(what):
        base = None if weights is None else configuration(None, what, given)
        path = what if weights is None else weights
    return _opened(finish(configuration(base, _file(path), given)), path, seed)


def _file(weights: Any) -> str | None:
    """The path that weights are named by; None for those that are no file's."""
    check_value("weights", weights, str | os.PathLike | None)
    if weights is None or weights == RANDOM or weights in embedded_weights():
        return None
    return os.fspath(weights)


def _opened(config: dict[str, Any], path: Any, seed: int, kept: Run | None = None) -> Run:
    """A configuration with the weights of a path, a name of embedded ones, "random", or (None) its own."""
    path = check_value("weights", path, str | os.PathLike | None)
    path = None if path is None else os.fspath(path)
    if path is None and "pipeline" in config and config.get("weights") is None:
        path = network_of(config["pipeline"])
    if path == RANDOM or path in embedded_weights():
        config, path = {**config, "weights": path}, None
    setup, full = build_setup(config), {}
    if path is None and config.get("weights") == RANDOM:
        config, setup, full = _fitting(config, setup)
    straight = None if setup.placement is None else setup.placement.params  # no host holds the whole
    weights = find_weights(config, setup.model, path, seed, straight)
    as_configured = weights.model is setup.model
    if weights.model.input_shape != setup.model.input_shape:  # what follows from the size follows from the model's
        setup = build_setup(config, weights.model)
    setup = with_recipe(setup._replace(model=weights.model), config, weights.section)
    return Run(config, setup, weights, path, seed, full, kept, as_configured)


def _fitting(config: dict[str, Any], setup: Setup) -> tuple[dict[str, Any], Setup, dict[str, Any]]:
    """The setup itself, or where its random weights do not fit into memory, its `reduced` size to draw with and what
    compiling the full size told."""
    free, needed = memory_available(), size_in_bytes(model_shapes(setup.model))
    if needed <= free:  # else it is not prepared, not even in the abstract: unstacked it has an array a layer
        needed = weight_bytes(setup)
    if needed <= free:
        return config, setup, {}
    if "reduced" not in config:
        what = f"the weights of {described(config, 'model')}, which has no `reduced` size to draw with"
        check_memory(what, needed, free, "a smaller model")
    full = ahead_of_time(setup)
    smaller = {**config, **config["reduced"], "model": {**config["model"], **config["reduced"].get("model", {})}}
    smaller["steps"] = min(smaller["steps"], config["steps"])  # fewer, where fewer were asked for
    return smaller, build_setup(smaller), {"full_size": full}


def _is_checkpoint(what: str) -> bool:
    """Whether a text names a checkpoint, and no configuration."""
    path = pathlib.Path(what)
    if not what or what.partition(":")[0] in config_names() or ".py" in (path.suffix.partition(":")[0], path.suffix):
        return False
    return os.path.exists(what) or path.suffix in (".safetensors", ".json")


def parse_labels(words: Sequence[Any], classes: int, names: Sequence[str] = ()) -> list[int]:
    """Labels, as numbers or names, as indices.

    Raises:
      ValueError: no words, a name that is no class, or an index outside 0 ... classes - 1.
    """
    labels = []
    if not words:
        raise ValueError("no labels; allowed: one or more")
    for word in words:
        word = str(word).strip()
        if word.isascii() and word.removeprefix("-").isdigit():
            if len(word) > 20 or not 0 <= int(word) < classes:
                raise ValueError(f"label {brief(word) if len(word) > 20 else word}; allowed: 0 ... {classes - 1}")
            labels.append(int(word))
        elif names:
            labels.append(list(names).index(choose("label", word, names)))
        else:
            raise ValueError(f"label {brief(word)}; allowed: 0 ... {classes - 1}")
    return labels


def train(
    config: str | os.PathLike | Mapping[str, Any],
    workdir: str | os.PathLike,
    *,
    data: str | os.PathLike | None = None,
    resume: bool | Literal["auto"] = False,
    minutes: OrInfinite | None = None,
    progress: bool = False,
    log: Callable[[dict[str, Any]], None] | None = None,
    **settings: Any,
) -> TrainState:
    """Trains a model and writes checkpoints, samples and logs into a folder, which `load` opens.

    Args:
      config, settings: as `load` takes them; sections model, loss, data and train say what is trained.
      workdir: the run's folder; new or empty unless `resume`.
      data: where the data set lies: the folder of its files, a folder of images, or an .npz
        (`difax.training.data.data_section`); None is what the configuration says.
      resume: continue from the last checkpoint; "auto": if there is one, else begin the run.
      minutes: stop with a checkpoint after so long, from the end of the first step on and without the previews.
      progress: a bar on stderr. log: is called with every line of log.jsonl.

    Returns:
      The last state.

    Raises:
      ValueError: a configuration, folder or data that do not fit, before anything is written; another process that
        trains there.
      FloatingPointError: a loss, gradient or weight that is not finite, with its step; the last good checkpoint stays.
    """
    if not isinstance(config, (str, os.PathLike, Mapping)):
        raise ValueError(f"train {brief(config)}: allowed: a configuration, its name or its file")
    given = dict(config) if isinstance(config, Mapping) else load_config(os.fspath(config))
    whole = override(given, keyword_settings(settings))
    more = {"workdir": workdir, "data": data, "resume": resume, "minutes": minutes, "progress": progress, "log": log}
    check_arguments("train", train, more)
    resume = hosts.first(lambda: resumes(workdir, resume))
    if minutes is not None and not minutes > 0:
        raise ValueError(f"--minutes={minutes}; allowed: > 0")
    if data is not None:
        whole["data"] = data_section(os.fspath(data), whole.get("data", {}))
    task = build_task(whole, previewer)
    try:
        options = build_options(whole)
    except Unfit as error:  # what is wrong by itself is told first
        options = error
    # weights, their average, two moments and a gradient, float32 each
    check_memory(
        f"training {described(whole, 'model')}",
        5 * size_in_bytes(jax.eval_shape(task.init, jax.random.key(0))),
        memory_available(),
        "a smaller model",
    )
    images = build_data(whole, "train")
    check_images(images, task.input_shape, task.classes)
    if isinstance(options, Unfit):
        raise options
    if images.names:
        whole["data"] = {**whole["data"], "names": list(images.names)}
    return train_(task, images, options, workdir, plain(whole), resume, progress, minutes, log)
