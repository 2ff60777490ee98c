"""The training loop: AdamW with warm-up, clipping and EMA, exact resume, and a record of everything it did.

Batch `step` and the random keys of `step` are functions of (seed, step) alone and the whole state is in the
checkpoint, so a run that is killed and resumed has the losses of the uninterrupted one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import platform
import sys
import time
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp

from difax.core import hosts
from difax.core.annotations import Seed
from difax.core.files import check_object, listed, makeable, named, place_of, read_object
from difax.core.lock import LOCK, locked
from difax.core.placement import SAMPLES, Axes, Placement, make_placement, placed, shapes_at
from difax.core.shell import undone
from difax.core.writing import append_line, remove_unfinished, replacing, unwritable, writing
from difax.training.checkpoints import not_finite, open_checkpoints, restored, restored_part
from difax.training.data import Images, batches
from difax.training.losses import Loss
from difax.weights.checkpoint import check_shapes


class Unfit(ValueError):
    """Settings that are allowed each, and not together."""


@dataclasses.dataclass(frozen=True)
class TrainOptions:
    """What `train` needs besides the task and the data.

    steps, batch: updates in all, and images in each.
    learning_rate, warmup, decay: linear warm-up from 0 over `warmup` steps, constant, linear to 0 in the last
        `decay` steps (0: constant to the end, as in DiT).
    weight_decay, b1, b2: of AdamW. clip: global gradient norm. ema: decay of the averaged weights, reached
        gradually as min(ema, (1 + step)/(10 + step)).
    seed: of weights, shuffles and noise.
    log_every, sample_every, checkpoint_every: in steps; keep: checkpoints kept.
    devices: in the data-parallel mesh (None: all).
    dtype: compute dtype of the model in training (None: the model's own); weights and averages stay float32.
    """

    steps: int
    batch: int = 128
    learning_rate: float = 1e-4
    warmup: int = 0
    decay: int = 0
    weight_decay: float = 0.0
    b1: float = 0.9
    b2: float = 0.999
    clip: float = 1.0
    ema: float = 0.999
    seed: Seed = 0
    log_every: int = 50
    sample_every: int = 1000
    checkpoint_every: int = 500
    keep: int = 2
    devices: int | None = None
    dtype: str | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "log_every", "sample_every", "checkpoint_every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"train.{name}={getattr(self, name)}; allowed: 1 or more")
        for name in ("warmup", "decay", "weight_decay", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"train.{name}={getattr(self, name)}; allowed: 0 or more")
        for name in ("learning_rate", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"train.{name}={getattr(self, name)}; allowed: > 0")
        for name in ("ema", "b1", "b2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"train.{name}={getattr(self, name)}; allowed: 0 <= {name} < 1")
        if self.warmup + self.decay > self.steps:
            raise Unfit(f"train.warmup + train.decay = {self.warmup + self.decay} exceeds train.steps={self.steps}")


class Task(NamedTuple):
    """What is trained: init(key) -> params; loss(params, batch, key) -> (loss, metrics);
    preview(ema_params) -> uint8 picture [H, W(, 3)] or None; input_shape, classes: of the images and labels; placement:
    of the mesh that it trains on, None for samples over `TrainOptions.devices`."""

    init: Callable[[jax.Array], Any]
    loss: Loss
    preview: Callable[[Any], np.ndarray] | None = None
    input_shape: tuple[int, ...] = ()
    classes: int = 0
    placement: Placement | None = None


class TrainState(NamedTuple):
    step: jax.Array
    params: Any
    ema: Any
    optimizer: Any


# settings that a resumed run may change: they do not touch the trajectory up to the checkpoint
FREE = ("steps", "log_every", "sample_every", "checkpoint_every", "keep", "devices")


def schedule(options: TrainOptions) -> optax.Schedule:
    """Linear warm-up, constant, linear decay at the end."""

    def rate(step):
        step = jnp.asarray(step, jnp.float32)
        up = jnp.minimum(1.0, (step + 1) / max(options.warmup, 1))
        down = jnp.minimum(1.0, (options.steps - step) / max(options.decay, 1)) if options.decay else 1.0
        return options.learning_rate * up * down

    return rate


def optimizer(options: TrainOptions) -> optax.GradientTransformation:
    """AdamW behind a clip of the global gradient norm."""
    return optax.chain(
        optax.clip_by_global_norm(options.clip),
        optax.adamw(schedule(options), options.b1, options.b2, weight_decay=options.weight_decay),
    )


def make_step(
    loss: Loss, options: TrainOptions, placement: Placement | None = None, shardings: Any = None
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """The jitted update (state, batch) -> (state, metrics); the state is donated.

    Among the metrics are the loss and the norms of the gradient and of the update: where all are finite, so are weights
    that were.
    """
    transform = optimizer(options)
    root = jax.random.key(options.seed)

    def update(state: TrainState, batch: Any):
        key = jax.random.fold_in(jax.random.fold_in(root, 1), state.step)
        (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(state.params, batch, key)
        updates, inner = transform.update(gradient, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        step = state.step.astype(jnp.float32)
        decay = jnp.minimum(options.ema, (1 + step) / (10 + step))
        ema = jax.tree.map(lambda e, p: e + (1 - decay) * (p - e), state.ema, params)
        norms = {"gradient_norm": optax.tree.norm(gradient), "update_norm": optax.tree.norm(updates)}
        metrics = {"loss": value, **metrics, **norms}
        return TrainState(state.step + 1, params, ema, inner), metrics

    def update_there(state: TrainState, batch: Any):
        with placed(placement):
            return update(state, batch)

    return jax.jit(update_there, donate_argnums=0, out_shardings=None if shardings is None else (shardings, None))


def train(
    task: Task,
    data: Images,
    options: TrainOptions,
    workdir: str | os.PathLike,
    config: dict[str, Any],
    resume: bool | Literal["auto"] = False,
    progress: bool = True,
    minutes: float | None = None,
    log: Callable[[dict[str, Any]], None] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> TrainState:
    """Trains a task and writes checkpoints, samples and logs into a folder.

    The folder gets config.json, log.jsonl (one line every `log_every` steps), TensorBoard events, samples/*.png and
    checkpoints/ (asynchronous, the last `keep`, and always the final one). The processes of a job (`difax.core.hosts`)
    train together over all their devices, each reading its own rows of a batch; all of them write the checkpoints, into
    a folder that they share, and process 0 the rest.

    Args:
      task, data, options: what, on what, and how.
      workdir: the run's folder; must be new or empty unless `resume`.
      config: the run's whole configuration as plain JSON, compared on resume and stored beside the checkpoints.
      resume: continue from the last checkpoint of `workdir`; "auto": if there is a run, else begin it.
      progress: show a progress bar on stderr.
      minutes: stop with a checkpoint after so long, to be resumed; from the end of the first step on, since compilation
        is before it, and without the previews. None trains to the end.
      log: is called with every line of log.jsonl.
      clock: seconds, for `minutes`.

    Returns:
      The last state.

    Raises:
      ValueError: a folder that is not empty, holds no run, another configuration or a damaged checkpoint, or that
        another process writes to; bad mesh or batch.
      FloatingPointError: a loss, gradient, update or weight that is not finite, with its step, before anything of it is
        kept; the last good checkpoint stays.
    """
    resume = hosts.first(lambda: resumes(workdir, resume))
    folder = pathlib.Path(workdir).absolute()
    placement = _placement(task, options)
    indices = batches(len(data.image), options.batch, options.seed)

    def prepare() -> None:
        _check_config(folder, config, resume)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise unwritable(folder, error) from None
        held.enter_context(locked(folder, "difax train"))
        held.enter_context(undone(remove_unfinished, folder / "checkpoints"))
        remove_unfinished(folder / "checkpoints")
        check_folder(folder, resume)  # another process may have been here before the lock was ours
        _check_config(folder, config, resume)
        if not resume:
            _write_json(folder / "config.json", config)
        (folder / "samples").mkdir(exist_ok=True)

    with contextlib.ExitStack() as held:
        hosts.first(prepare)
        _check_shared(folder)
        return _train(task, data, options, folder, config, progress, minutes, log, clock, (indices, placement))


def _check_shared(folder: pathlib.Path, patience: float = 60.0) -> None:
    """Whether this process sees what process 0 has written, which file systems may take a minute to show."""
    end = time.monotonic() + patience
    while not (folder / "config.json").is_file():
        if time.monotonic() > end:
            raise ValueError(
                f"{folder}: process {hosts.process()} (host {platform.node()}) does not see there what process 0 has "
                "written; allowed: a folder that all hosts share"
            )
        time.sleep(0.2)


def _train(
    task: Task,
    data: Images,
    options: TrainOptions,
    folder: pathlib.Path,
    config: dict[str, Any],
    progress: bool,
    minutes: float | None,
    log: Callable[[dict[str, Any]], None] | None,
    clock: Callable[[], float],
    given: tuple[Any, Placement],
) -> TrainState:
    """`train` in a folder that is ours and prepared; given: rows of a step, and where everything lies."""
    indices, placement = given
    transform = optimizer(options)
    deadline: float | None = None

    def init() -> TrainState:
        params = task.init(jax.random.fold_in(jax.random.key(options.seed), 0))
        # the averages start as a copy: donated buffers may not be shared
        ema = jax.tree.map(lambda a: a + 0, params)
        return TrainState(jnp.zeros((), jnp.int32), params, ema, transform.init(params))

    checkpoints = open_checkpoints(
        folder,
        options=ocp.CheckpointManagerOptions(max_to_keep=options.keep, enable_async_checkpointing=True),
    )
    shapes = jax.eval_shape(init)
    held = placement.params(shapes)
    with checkpoints:
        latest = hosts.first(checkpoints.latest_step)
        if latest is None:
            state = jax.jit(init, out_shardings=held)()
        else:
            hosts.first(lambda: _check_schedule(folder, latest, options))
            like = shapes_at(shapes, held)
            state = cast(TrainState, restored(folder, checkpoints, latest, like))
        if hosts.is_first():
            _write_json(folder / "config.json", {**config, "train": {**config["train"], "steps": options.steps}})
        recorder = _Recorder(folder, int(state.step), options, progress, log)
        update = make_step(task.loss, options, placement, held)
        with recorder:
            for step in range(int(state.step), options.steps):
                batch = hosts.put_rows({"image": data.image, "label": data.label}, indices(step), placement.batch())
                state, metrics = update(state, batch)
                done = step + 1
                recorder.add(done, metrics)
                if minutes is not None and deadline is None:
                    jax.block_until_ready(state)
                    deadline = clock() + 60 * minutes
                ends = None if deadline is None else deadline
                last = done == options.steps or (ends is not None and hosts.first(lambda end=ends: clock() >= end))
                save = last or done % options.checkpoint_every == 0
                show = task.preview is not None and (last or done % options.sample_every == 0)
                if save or show or done % options.log_every == 0:
                    recorder.flush()  # raises where something is not finite, so that only good states are kept or shown
                if save or show:
                    _check_finite(folder, done, state)
                if save:
                    with writing(checkpoints.directory):
                        checkpoints.save(done, args=ocp.args.StandardSave(state))
                if task.preview and show:
                    begun = clock()
                    recorder.picture(done, task.preview(state.ema))
                    deadline = None if deadline is None else deadline + clock() - begun
                if last:
                    break
        with writing(checkpoints.directory):
            checkpoints.wait_until_finished()
    return state


def _placement(task: Task, options: TrainOptions) -> Placement:
    """The task's, or samples over the options' devices; ValueError where mesh and batch are none to train on."""
    placement, there = task.placement, jax.devices()
    if placement is None:
        n = len(there) if options.devices is None else options.devices
        if not 1 <= n <= len(there):
            raise ValueError(f"devices={n}; allowed: 1 ... {len(there)} ({there[0].platform})")
        if n < len(there) and hosts.processes() > 1:
            raise ValueError(f"devices={n}; allowed: {len(there)}, all those of the {hosts.processes()} processes")
        if options.batch % n:
            raise ValueError(f"batch={options.batch} must be divisible by the {n} devices of the mesh")
        return make_placement(Axes(data=n), there)
    for axes in ("cfg", "ring", "ulysses"):
        if placement.size(axes) > 1:
            name = "cfg" if axes == "cfg" else "seq"
            raise ValueError(f"mesh.{name}={placement.size(axes)} in training; allowed: 1 (data, fsdp, tensor train)")
    n = placement.size(*SAMPLES)
    if options.batch % n:
        raise ValueError(f"train.batch={options.batch} over data x fsdp = {n}; allowed: a multiple of {n}")
    if options.devices is not None:
        raise ValueError(f"train.devices={options.devices} beside a section mesh; allowed: one of them")
    return placement


def _check_finite(folder: pathlib.Path, step: int, state: TrainState) -> None:
    """FloatingPointError with the first weight, average or moment of a state that is not finite."""
    bad = not_finite(state)
    if bad:
        raise FloatingPointError(f"{bad[0]} is not finite after step {step}; {_kept(folder)}")


def _kept(folder: pathlib.Path) -> str:
    return f"checkpoints up to the last good one are kept in {folder / 'checkpoints'}"


def read_run(workdir: str | os.PathLike) -> dict[str, Any]:
    """The configuration of the run in a folder, whose names load no code; ValueError where there is none."""
    path = pathlib.Path(workdir) / "config.json"
    if place_of(path) is None:
        raise ValueError(f"{named(workdir)}: no training run there (no config.json)")
    maybe = (dict, type(None))
    config = read_object(path, "the configuration of a run", finite=False, model=maybe, train=dict, data=maybe)
    check_object(config["train"], f"{named(path)}: train", steps=int)
    if config.get("model") is not None:
        check_object(config["model"], f"{named(path)}: model", name=str)
    return config


def last_step(workdir: str | os.PathLike) -> int:
    """The step of the last checkpoint of a training folder; ValueError where there is none."""
    with _checkpoints(workdir) as checkpoints:
        return _latest(workdir, checkpoints)


def restore_ema(workdir: str | os.PathLike, init: Callable[[jax.Array], Any], sharding: Any = None) -> tuple[int, Any]:
    """Reads the averaged weights of the last checkpoint of a training folder, and nothing else of it.

    Args:
      workdir: the folder given to `train`, on however many devices and hosts.
      init: the model's init, for the expected shapes.
      sharding: that each leaf is read onto, one for all or a tree; None is the first device of this process.

    Returns:
      (step, params).

    Raises:
      ValueError: no checkpoint there, a damaged one, or one of another shape (names the tensor).
    """
    wanted = jax.eval_shape(init, jax.random.key(0))
    check = lambda stored: check_shapes(str(workdir), stored, wanted)  # noqa: E731
    with _checkpoints(workdir) as checkpoints:
        latest = _latest(workdir, checkpoints)
        return latest, restored_part(workdir, checkpoints, latest, "ema", check, sharding)


def _checkpoints(workdir: str | os.PathLike) -> ocp.CheckpointManager:
    folder = pathlib.Path(workdir).absolute() / "checkpoints"
    if not folder.is_dir():
        raise ValueError(f"{workdir}: no training run there (no checkpoints/)")
    return open_checkpoints(workdir, options=ocp.CheckpointManagerOptions(read_only=True))


def _latest(workdir: str | os.PathLike, checkpoints: ocp.CheckpointManager) -> int:
    latest = checkpoints.latest_step()
    if latest is None:
        raise ValueError(f"{workdir}: the run has no checkpoint yet")
    return latest


class _Recorder:
    """Progress bar, JSONL, TensorBoard events and pictures; metrics stay on the device until flushed. Of the processes
    of a job the first writes, and all look whether the metrics are finite."""

    def __init__(self, folder: pathlib.Path, start: int, options: TrainOptions, progress: bool, tell: Any = None):
        from tensorboardX import SummaryWriter
        from tqdm import tqdm

        self.folder, self.options, self.start, self.tell = folder, options, start, tell
        self.pending: list[tuple[int, dict[str, jax.Array]]] = []
        self.path, self.events = folder / "log.jsonl", None
        if hosts.is_first():
            _truncate_log(self.path, start)
            self.events = SummaryWriter(str(folder / "events"), purge_step=start or None)
        self.bar = tqdm(
            total=options.steps,
            initial=start,
            unit="step",
            disable=not progress,
            file=sys.stderr,
            mininterval=1,
        )
        self.clock, self.last = time.perf_counter(), start

    def __enter__(self) -> _Recorder:
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()
        if self.events is not None:
            self.events.close()

    def add(self, step: int, metrics: dict[str, jax.Array]) -> None:
        self.pending.append((step, metrics))
        self.bar.update()

    def flush(self) -> None:
        """Reads the pending metrics, refuses what is not finite, and logs the steps that are due."""
        if not self.pending:
            return
        fetched = [(step, {k: float(v) for k, v in m.items()}) for step, m in jax.device_get(self.pending)]
        self.pending = []
        for step, metrics in fetched:
            for name in ("loss", "gradient_norm", "update_norm"):
                if not np.isfinite(metrics[name]):
                    raise FloatingPointError(f"{name} is {metrics[name]} at step {step}; {_kept(self.folder)}")
        if self.events is None:
            return
        now = time.perf_counter()
        step = fetched[-1][0]
        rate = (step - self.last) * self.options.batch / (now - self.clock)
        self.clock, self.last = now, step
        self.bar.set_postfix(loss=f"{fetched[-1][1]['loss']:.4f}", images_per_second=f"{rate:.0f}")
        for step, metrics in fetched:
            if step % self.options.log_every == 0 or step == self.options.steps:
                metrics = {**metrics, "learning_rate": float(np.asarray(schedule(self.options)(step - 1)))}
                row = {"step": step, **metrics, "images_per_second": rate}
                append_line(self.path, json.dumps(row))
                if self.tell is not None:
                    self.tell(row)
                for name, value in metrics.items():
                    self.events.add_scalar(name, value, step)

    def picture(self, step: int, image: np.ndarray) -> None:
        from difax.media.images import save_png

        if self.events is None:
            return
        save_png(self.folder / "samples" / f"{step:07d}.png", image)
        self.events.add_image("samples", image, step, dataformats="HW" if image.ndim == 2 else "HWC")


def resumes(workdir: str | os.PathLike, resume: bool | Literal["auto"]) -> bool:
    """Whether a run goes on in a folder: "auto" where one is there. Raises as `check_folder`."""
    goes_on = place_of(pathlib.Path(workdir) / "config.json") is not None if resume == "auto" else bool(resume)
    check_folder(workdir, goes_on)
    return goes_on


def check_folder(workdir: str | os.PathLike, resume: bool) -> None:
    """Whether a run may begin in a folder, or go on there; writes nothing.

    Raises:
      ValueError: an empty path, a folder that is not empty or cannot be made; on resume, no run there.
    """
    if not os.fspath(workdir):
        raise ValueError("workdir is empty; allowed: a path")
    folder = makeable(workdir, "--workdir").absolute()
    if not resume and place_of(folder) and any(map(_counts, listed(folder))):
        raise ValueError(f"{folder} exists and is not empty; give a new folder, or resume it")
    if resume:
        read_run(folder)
        for name in ("samples", "events", "checkpoints"):
            if (folder / name).exists() and not (folder / name).is_dir():
                raise ValueError(f"{folder / name}: is no folder; remove it to go on")
        if place_of(folder / "log.jsonl") not in (None, "file"):
            raise ValueError(f"{folder / 'log.jsonl'}: is no file; remove it to go on")


def _counts(path: pathlib.Path) -> bool:
    """Whether a file in a folder says that something is there: not what a run that was killed at once left."""
    return path.name != LOCK and not path.name.endswith(".part")


def _check_config(folder: pathlib.Path, config: dict[str, Any], resume: bool) -> None:
    difference = _first_difference(_fixed(read_run(folder)), _fixed(config)) if resume else None
    if difference:
        raise ValueError(f"{folder} holds a run of another configuration: {difference}")


def _fixed(config: dict[str, Any]) -> dict[str, Any]:
    kept = {k: v for k, v in config["train"].items() if k not in FREE}
    data = {k: v for k, v in config.get("data", {}).items() if k not in ("path", "data_dir")}  # data may be moved
    rest = {k: v for k, v in config.items() if k != "mesh"}  # and so may the devices
    return {**rest, "train": kept, "data": data}


def _first_difference(a: Any, b: Any, path: str = "") -> str | None:
    if isinstance(a, dict) and isinstance(b, dict):
        for key in sorted(a.keys() | b.keys()):
            found = _first_difference(a.get(key), b.get(key), f"{path}.{key}" if path else key)
            if found:
                return found
        return None
    return None if a == b else f"{path} is {a!r} there, {b!r} now"


def _check_schedule(folder: pathlib.Path, latest: int, options: TrainOptions) -> None:
    """Another number of steps moves the start of the final decay: refuse it once either decay has begun."""
    before = read_run(folder)["train"]["steps"]
    if latest >= options.steps:
        raise ValueError(f"{folder} is at step {latest} already; train.steps={options.steps} asks for no more")
    begun = min(before, options.steps) - options.decay
    if before != options.steps and options.decay and latest > begun:
        raise ValueError(
            f"{folder} is at step {latest}, within the final decay of a run of {min(before, options.steps)} "
            f"steps; train.steps may no longer change from {before} to {options.steps}"
        )


def _truncate_log(path: pathlib.Path, start: int) -> None:
    """Drops the lines of steps that a killed run logged after its last checkpoint, which will come again, and lines
    that cannot be read, of which those in the middle are told."""
    if not path.exists():
        return
    kept, broken = [], []
    lines = path.read_text(errors="replace").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            if json.loads(line)["step"] <= start:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError, RecursionError):
            broken.append(number)
    if broken and broken != [len(lines)]:  # the last one was being written when the run was killed
        print(f"difax: warning: {path}: line {broken[0]} is damaged and dropped, {len(broken)} in all", file=sys.stderr)
    with replacing(path) as aside:
        aside.write_text("".join(kept))


def _write_json(path: pathlib.Path, value: Any) -> None:
    with replacing(path) as aside:
        aside.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n")
