"""What the commands of `difax` do, a function each; they import what they need, so that help is quick."""

from __future__ import annotations

import argparse
import functools
import json
import os
import pathlib
import shlex
import sys
import time
from collections.abc import Callable
from typing import Any

from difax.core.shell import check_xla_flags
from difax.core.writing import append_line

LISTS = (
    "models",
    "processes",
    "solvers",
    "grids",
    "guides",
    "caches",
    "attends",
    "quants",
    "losses",
    "data",
    "weights",
    "configs",
    "pipelines",
    "encoders",
    "autoencoders",
)

# flags that are keys of the section pipeline
PIPED = ("height", "width", "frames", "fps", "negative", "guidance", "scale_2", "shift", "tokens", "sigmas", "tile",
         "preview_vae", "embeddings", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")  # fmt: skip
NAMED = ("solver", "grid", "guide", "cache", "attend", "quant")  # sections whose name has a flag of its own


def _config(options: argparse.Namespace, default: str | None) -> dict[str, Any]:
    """The configuration of a command: the one that it names, or else that of its weights, or else the default; with
    its settings."""
    from difax.checkpoints import RANDOM, embedded_weights
    from difax.config import (
        SHORT,
        configuration,
        first_frame_settings,
        gin_settings,
        mesh_settings,
        parse_value,
        pipeline_config,
        scheduled,
    )
    from difax.pipelines.section import COMPONENTS

    settings: list[tuple[str, Any]] = []
    base: str | None = options.config
    if options.gin_file or options.gin_param:
        gin_base, settings = gin_settings(options.gin_file, options.gin_param)
        base = gin_base if base is None else base
    for setting in options.set:
        key, _, value = setting.partition("=")
        settings.append((key, parse_value(value, key)))
    for flag, key in SHORT.items():
        if getattr(options, flag, None) is not None:
            settings.append((key, getattr(options, flag)))
    if getattr(options, "mesh", None):
        settings += mesh_settings(options.mesh)
    given = {flag: getattr(options, flag) for flag in PIPED if getattr(options, flag, None) is not None}
    if getattr(options, "weights", None) and given.keys() & set(COMPONENTS) and not options.pipeline:
        options.pipeline = options.weights  # a network's file and the components beside it
    pipeline = getattr(options, "pipeline", None)
    if pipeline is not None:
        if base is not None:
            raise ValueError(f"--pipeline {pipeline} and a configuration exclude each other; allowed: one of them")
        if "sigmas" in given:
            given["sigmas"] = _numbers(given["sigmas"], "--sigmas")
        if getattr(options, "image", None) is not None:
            settings = [*first_frame_settings(pipeline), *settings]
        settings += [(f"pipeline.{key.replace('preview_vae', 'preview')}", value) for key, value in given.items()]
        return pipeline_config(pipeline, settings, getattr(options, "scheduler", None))
    if given:
        flag = next(iter(given))
        raise ValueError(f"--{flag.replace('_', '-')} {given[flag]} is of a pipeline; allowed: with --pipeline FOLDER")
    weights = getattr(options, "weights", None)
    if weights in (RANDOM, *embedded_weights()):
        weights = None
    base = default if base is None and not weights else base
    config = configuration(base, weights or None, settings)
    scheduler = getattr(options, "scheduler", None)
    return config if scheduler is None else scheduled(config, scheduler, settings)


def _run(options: argparse.Namespace, config: dict[str, Any]) -> Any:
    """The run that a command is about (`difax.load`)."""
    from difax.run import load

    weights = "random" if options.random_init else options.weights
    return load(config, weights=weights, seed=options.seed)


def _numbers(text: str, flag: str) -> list[float]:
    """Numbers between commas, or of a file: a text, or an .npz with an array `sigmas`.

    Raises:
      ValueError: what is no number, or a file that is damaged.
    """
    from difax.core.arrays import opened_arrays
    from difax.core.files import place_of, read_text

    if len(text) < 1000 and place_of(text) is not None:
        if text.endswith(".npz"):
            with opened_arrays(text, "an .npz file with an array named sigmas") as found:
                if "sigmas" not in found or len(found["sigmas"].shape) != 1 or found["sigmas"].shape[0] > 10_000:
                    raise ValueError(f"{flag} {text}: no array named sigmas [n] in it; allowed: one of numbers")
                return [float(a) for a in found["sigmas"].read()]
        text = " ".join(read_text(text, "a text of numbers", 2**20).split())
    try:
        found = [float(word) for word in text.replace(",", " ").split()]
        if not found:
            raise ValueError
        return found
    except ValueError:
        raise ValueError(f"{flag} {text[:100]}; allowed: numbers between commas, or a file of them") from None


def _prompts(options: argparse.Namespace) -> list[str] | None:
    """The prompts of a command, by --prompt and --prompts; None without any."""
    from difax.pipelines.encode import read_prompts

    told, file = list(options.prompt or []), options.prompts
    found = told + (read_prompts(file) if file is not None else [])
    if found and not options.pipeline:
        raise ValueError(f"--prompt {found[0][:100]}: prompts are a pipeline's; allowed: with --pipeline FOLDER")
    for flag in ("cond", "labels"):
        if found and getattr(options, flag, None):
            raise ValueError(f"--prompt and --{flag} exclude each other; allowed: one of them")
    return found or None


def _cond(options: argparse.Namespace, run: Any, prompts: list[str] | None) -> Any:
    """What a command is conditioned on, as the model takes it: prompts, or else what --cond and --labels say."""
    from difax.weights.conditions import labelled

    model = run.setup.model
    if prompts is not None:
        return run.encoded(prompts)
    if labelled(model) and options.cond:
        raise ValueError(f"--cond {options.cond}: {model.name} takes labels")
    if not labelled(model) and options.labels:
        raise ValueError(f"--labels {options.labels}: {model.name} takes no labels; give --cond FILE.safetensors")
    return run.conditions(options.labels if options.cond is None else options.cond)


def _on_all_hosts(command: Callable[[argparse.Namespace], int]) -> Callable[[argparse.Namespace], int]:
    """A command that the processes of a job run together, each with this very command line (`difax.core.hosts`)."""

    @functools.wraps(command)
    def run(options: argparse.Namespace) -> int:
        from difax.core import hosts

        with hosts.together():
            return command(options)

    return run


def _start(options: argparse.Namespace, together: bool = False) -> Callable[..., None]:
    """Chooses the device and checks what can be checked at once; returns the function that writes a line of --log.

    Args:
      together: do the processes of a job run this command as one.
    """
    if getattr(options, "random_init", False) and options.weights:
        raise ValueError("--random-init and --weights exclude each other")
    _apart(options)
    check_xla_flags()
    import absl.logging

    absl.logging.set_verbosity(absl.logging.FATAL)  # orbax tells what it raises, and more, on stderr
    from difax.core import hosts

    if together:
        hosts.start()
    if getattr(options, "platform", None):
        from difax.core.device import choose_platform

        choose_platform(options.platform)
    elif os.environ.get("JAX_PLATFORMS", "cpu") != "cpu":
        from difax.core.device import check_platforms

        check_platforms()
    if not getattr(options, "log", None) or not hosts.is_first():
        return lambda event, **fields: None
    path = writable(options.log, (".jsonl", ".json", ".log"), "--log", made=getattr(options, "workdir", None))

    def log(event: str, **fields: Any) -> None:
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        append_line(path, json.dumps({"time": now, "command": options.command, "event": event, **fields}))

    return log


def _apart(options: argparse.Namespace) -> None:
    """Refuses flags that name one place to write two things to."""
    taken: dict[str, str] = {}
    for flag in ("out", "trace", "log", "figure", "sheet", "perfetto", "picture", "workdir"):
        if path := getattr(options, flag, None):
            other = taken.setdefault(os.path.abspath(path), flag)
            if other != flag:
                raise ValueError(f"--{flag} {path}: --{other} is written there; allowed: another place")


def _tell(options: argparse.Namespace, log: Callable[..., None]) -> Callable[[str], None]:
    def tell(text: str) -> None:
        log("progress", text=text)
        if not options.quiet:
            print(f"difax: {text}", file=sys.stderr, flush=True)

    return tell


@_on_all_hosts
def sample(options: argparse.Namespace) -> int:
    log = _start(options, together=True)
    from difax.core import hosts
    from difax.media.films import RATE
    from difax.media.samples import check_output, read_latents

    if hosts.is_first():
        check_output(options.out)
        if options.trace:
            writable(options.trace, (".npz",), "--trace")
    _counts(options, "repeat")
    _seeds(options)
    config = _config(options, "fmnist_dit")
    prompts = _prompts(options)
    if hosts.is_first() and "pipeline" in config:
        check_output(options.out, fps=config["pipeline"].get("fps", RATE))
        if "frames" not in config["pipeline"] and pathlib.Path(options.out).suffix in (".mp4", ".gif"):
            raise ValueError(f"--out {options.out}: that pipeline draws pictures; allowed: .png, .webp, .jpg, .npz")
    import jax

    from difax.core.executables import kept_in
    from difax.pipelines.preview import Preview
    from difax.report import format_table

    if not options.no_compile_cache:
        _keep_compilations()
    with kept_in(None if options.no_compile_cache else _cache_folder("executables")):
        run = _run(options, config)
        shape = run.setup.model.input_shape
        given: dict[str, Any] = {"prompt": prompts} if prompts is not None else {"cond": _cond(options, run, None)}
        n = (len(jax.tree.leaves(given["cond"])[0]) if prompts is None else len(prompts)) * options.repeat
        if options.latents:
            given["latents"] = read_latents(options.latents, n, shape, run.channels_last)
        if options.noise:
            given["noise"] = read_latents(options.noise, n, None, name="noise", flag="--noise")
        for key in ("image", "strength", "mask", "batch"):
            if getattr(options, key) is not None:
                given[key] = getattr(options, key)
        if options.preview is not None:
            given["preview"] = Preview(options.preview, _previewed(options))
        progress = not (options.quiet or options.json) and sys.stderr.isatty() and hosts.processes() == 1
        if run.pipeline is not None:
            run.pipeline.tell = _staged(progress, log)
        found = run.sample(seed=options.seed, repeat=options.repeat, progress=progress, **given)
    if not hosts.is_first():
        return 0 if found.table["finite"] else 1
    out = found.save(options.out)
    if options.trace:
        found.save_trace(options.trace)
    table = {**found.table, "out": str(out)}
    log("sample", **table)
    print(json.dumps(table) if options.json else format_table(table))
    return 0 if table["finite"] else 1


def _staged(shown: bool, log: Callable[..., None]) -> Callable[[str], None]:
    """Says which stage of a pipeline is under way."""

    def tell(text: str) -> None:
        log("stage", text=text)
        if shown:
            print(f"difax: {text}", file=sys.stderr, flush=True)

    return tell


def _previewed(options: argparse.Namespace) -> Callable[..., None]:
    """Writes small pictures beside --out: NAME.step005.png, and of several batches NAME.012.step005.png."""
    from difax.media.images import picture, save_png

    out = pathlib.Path(options.out)

    def show(first: int, evaluation: int, pictures: Any) -> None:
        which = f".{first:03d}" if first else ""
        save_png(out.with_name(f"{out.stem}{which}.step{evaluation:03d}.png"), picture(pictures, len(pictures)))

    return show


def _keep_compilations() -> None:
    """Lets JAX keep what it compiles: where the user has told it to, or in difax's folder among the caches, if that is
    or can be a folder that can be written to."""
    import jax

    if jax.config.values["jax_compilation_cache_dir"]:
        return
    folder = _cache_folder("xla")
    if folder is not None:
        jax.config.update("jax_compilation_cache_dir", str(folder))
        # also what takes a few hundredths of a second: reading and preparing weights has fifty of those
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def _cache_folder(name: str) -> pathlib.Path | None:
    """difax's folder of that name among the user's caches; None where it is not and cannot be."""
    home = os.path.expanduser("~")  # itself, where nobody knows
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.join(home, ".cache")
    if not os.path.isabs(caches):  # what is not is to be ignored, says the standard
        return None
    try:
        return makeable(os.path.join(caches, "difax", name), "XDG_CACHE_HOME")
    except ValueError:
        return None


def encode(options: argparse.Namespace) -> int:
    log = _start(options)
    from difax.core.files import named
    from difax.pipelines.pipeline import Pipeline
    from difax.registry import make
    from difax.weights.checkpoint import save_safetensors
    from difax.weights.conditions import labelled

    out = writable(options.out, (".safetensors",))
    if not options.pipeline:
        raise ValueError("difax encode needs --pipeline FOLDER")
    config, prompts = _config(options, None), _prompts(options)
    model = make("model", config["model"])
    if labelled(model):
        raise ValueError(f"--pipeline {options.pipeline}: {model.name} takes labels, which are not encoded")
    if prompts is None:
        raise ValueError("difax encode needs --prompt TEXT or --prompts FILE")
    pipeline = Pipeline(config["pipeline"])
    cond = pipeline.conditions(model, prompts, config["guide"]["name"] != "none", options.image)
    save_safetensors(out, cond, {"prompts": prompts, "pipeline": pipeline.folder.name})
    shapes = {name: f"{list(array.shape)} {array.dtype}" for name, array in cond.items()}
    table = {"out": str(out), "prompts": len(prompts), **pipeline.spent(), "tensors": shapes}
    log("encode", **table)
    if options.json:
        print(json.dumps(table))
    else:
        print(f"{named(out)}: {len(prompts)} prompts; {', '.join(f'{k} {v}' for k, v in shapes.items())}")
    return 0


def pareto(options: argparse.Namespace) -> int:
    log = _start(options)
    for name, most in (("seeds", None), ("batch", None), ("turns", 1000), ("trials", 10_000)):
        _counts(options, name, most, least=0 if name == "turns" else 1)
    _seeds(options)
    if options.budget is not None and not options.budget > 0:
        raise ValueError(f"--budget={options.budget}; allowed: above 0")
    if options.speedup is not None and not 0 < options.speedup < float("inf"):
        raise ValueError(f"--speedup={options.speedup}; allowed: above 0")
    if options.floor is not None and not abs(options.floor) < float("inf"):
        raise ValueError(f"--floor={options.floor}; allowed: a finite number")
    if options.search == (options.speedup is None and options.floor is None):
        raise ValueError("--search needs one of --speedup and --floor, which need --search")
    if options.no_judge and options.judge:
        raise ValueError("--no-judge and --judge exclude each other")
    import numpy as np

    from difax.build import build_data
    from difax.config import override, parse_value
    from difax.core.extras import needs
    from difax.registry import choose, make
    from difax.study.frontier import NETWORK_FIGURES, QUALITIES, lost, table
    from difax.study.judge import FIGURES, suits
    from difax.study.methods import METHODS, SOLVER_METHODS, chosen
    from difax.study.metrics import FEATURE_FIGURES
    from difax.study.networks import check_networks, make_eyes, read_prompts, real_images
    from difax.study.pareto import (
        Options,
        Sweep,
        check_methods,
        check_quality,
        described,
        drawn_shape,
        enough,
        measures,
        refuse_other,
    )
    from difax.study.pareto_report import figure, read_images, sheet, sweep_of, title, write_report
    from difax.study.pareto_search import Goal, search, summary
    from difax.training.data import data_section
    from difax.weights.conditions import labelled

    choose("quality", options.quality, QUALITIES)
    makeable(options.out, "--out")
    for flag in ("figure", "sheet"):
        if getattr(options, flag):
            writable(getattr(options, flag), (".png",), f"--{flag}", made=options.out)
            needs(f"--{flag}", "matplotlib")
    if options.search:
        needs("--search", "optuna")
    methods, config = chosen(options.methods, parse_value), _config(options, "fmnist_dit")
    written = {name: method for name, method in methods.items() if name not in {*METHODS, *SOLVER_METHODS}}
    for name, method in written.items():  # what a user wrote is refused before hours of measuring
        _named(f"--methods {name}", lambda method=method: override(config, list(method.settings.items())))
    check_networks(options.network)
    # of a pipeline what is drawn, of a model of labels a text for each: what the networks score is the same
    given = None if options.pipeline is None or labelled(make("model", config["model"])) else _prompts(options)
    if given is None and options.prompt:
        raise ValueError(
            f"--prompt {options.prompt[0][:100]}: it is of a pipeline that takes prompts; allowed: without it"
        )
    texts = given or read_prompts(options.prompts)
    tell = _tell(options, log)
    run = _run(options, config)
    cond = _cond(options, run, given)
    if run.full_size:
        tell("random weights of the whole size do not fit into memory: a reduced size is measured")
    model = run.setup.model
    _fits(options, "seeds", drawn_shape(run), 1)
    _fits(options, "batch", model.input_shape, 1)
    asked = Options(options.seeds, options.batch, options.turns, options.seed, options.budget)
    refuse_other(options.out, described(run, cond, asked))
    check_methods(run, written)
    data = data_section(options.data, config.get("data", {})) if options.data else config.get("data", {})
    judge = test = None
    judged = not options.no_judge and labelled(model) and bool(options.judge or suits(model, data))
    there = [*measures(drawn_shape(run)), *(FIGURES if judged else ()), *(NETWORK_FIGURES if options.network else ())]
    check_quality(options.quality, there, asked.seeds)
    if judged:
        enough(asked.seeds, FEATURE_FIGURES, "a judge", "--no-judge")
        judge = _judge(options, data, tell)
    elif data and (options.data or options.network) and labelled(model):
        test = build_data({"data": data}, "test")
    if judge is None and not options.no_judge:
        why = "there is no judge of these images (--judge)" if labelled(model) else f"{model.name} takes no labels"
        tell(f"{why}: {', '.join(FIGURES)} are left out")
    labels = np.asarray(cond)[np.arange(asked.seeds) % len(cond)] if labelled(model) else None
    real = real_images(options.real, asked.seeds, judge, test, labels) if options.network else None
    eyes = make_eyes(options.network, real, texts)
    out = pathlib.Path(options.out)
    sweep = Sweep(_flags(options, given is not None), run, asked, out, judge, tell, eyes, test, cond)
    check_quality(options.quality, sweep.qualities(), asked.seeds)
    if options.search:
        goal = Goal(options.quality, options.speedup, options.floor)
        print(summary(search(sweep, goal, options.trials), goal))
        rows = sweep.rows()
    else:
        rows = sweep.measure(methods)
    for row in rows:
        log("row", **row)
    print(json.dumps(rows) if options.json else table(rows, options.quality))
    report = write_report(options.out, quality=options.quality, command=options.command)
    heading = title(sweep_of(sweep.out))
    if options.figure:
        figure(rows, options.quality, options.figure, heading=heading)
    if options.sheet:
        heading = ", ".join([heading, *{r["shown"] for r in rows if r.get("shown")}])
        sheet(rows, read_images(sweep.out, rows), options.sheet, options.quality, heading=heading)
    tell(f"the report is {report}")
    for method, why in sweep.failed.items():
        print(f"difax: error: {method} failed, and is tried again by the same command: {why}", file=sys.stderr)
    wrong = [(r["method"], "images that are not finite") for r in rows if r["method"] in methods and lost(r)]
    wrong += [(r["method"], f"refused: {r['refused']}") for r in rows if r["method"] in written and "refused" in r]
    for method, why in wrong:
        print(f"difax: error: {method}: {why}", file=sys.stderr)
    return 1 if sweep.failed or wrong else 0


def _counts(options: argparse.Namespace, name: str, most: int | None = None, least: int = 1) -> None:
    """Refuses a number of things below the least, or above what anybody waits for."""
    value = getattr(options, name)
    if value < least or (most is not None and value > most):
        raise ValueError(f"--{name}={value}; allowed: {f'{least} or more' if value < least else f'{most} at most'}")


def _seeds(options: argparse.Namespace) -> None:
    if not 0 <= options.seed < 2**32:
        raise ValueError(f"--seed={options.seed}; allowed: 0 ... {2**32 - 1}")


def _fits(options: argparse.Namespace, name: str, shape: tuple[int, ...], each: int) -> None:
    """Refuses so many times `each` samples of a shape as cannot lie in memory, before anything is allocated."""
    import math

    from difax.core.device import memory_available

    value, one = getattr(options, name), 4 * math.prod(shape)
    needed, free = 4 * value * each * one, memory_available()  # noise, samples, their copies on the host
    if needed > free:
        raise ValueError(
            f"--{name}={value}: the samples alone take {needed / 2**30:.0f} GiB, {free / 2**30:.1f} GiB are free; "
            f"allowed: {max(int(free / (4 * each * one)), 1)} at most"
        )


def _judge(options: argparse.Namespace, data: dict[str, Any], tell: Callable[[str], None]) -> Any:
    """The judge that was named, or the one that suits the images, if its data set is on this machine."""
    from difax.study.judge import make_judge

    try:
        return make_judge(options.judge, data or None)
    except FileNotFoundError as error:
        if options.judge or options.data:
            raise
        tell(f"the judge of these images needs its data set: {' '.join(str(error).split())}")
        return None


def _named(what: str, work: Callable[[], Any]) -> Any:
    """What `work` gives; its refusal names what was asked for."""
    try:
        return work()
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None


def _flags(options: argparse.Namespace, prompted: bool) -> str:
    """The flags of a command that say which run it is about, as `difax sample` takes them.

    Args:
      prompted: do its prompts say what is drawn.
    """
    from difax.config import SHORT

    words = [] if options.pipeline is None else ["--pipeline", options.pipeline]
    if options.config or not (options.pipeline or options.weights or options.gin_file or options.gin_param):
        words += ["--config", options.config or "fmnist_dit"]
    words += [word for file in options.gin_file for word in ("--gin_file", file)]
    words += [word for binding in options.gin_param for word in ("--gin_param", binding)]
    for flag in ("weights", "labels", "cond", "scheduler", *SHORT, *PIPED):
        if getattr(options, flag, None) is not None:
            words += [f"--{flag.replace('_', '-')}", str(getattr(options, flag))]
    if prompted:
        words += [word for prompt in options.prompt or [] for word in ("--prompt", prompt)]
        words += [] if options.prompts is None else ["--prompts", options.prompts]
    words += ["--random-init"] if options.random_init else []
    words += [f"--config.{setting}" for setting in options.set]
    return shlex.join(words)


def profile(options: argparse.Namespace) -> int:
    log = _start(options)
    _counts(options, "turns", 1000)
    _counts(options, "repeat")
    _seeds(options)
    import jax

    from difax.core.extras import needs

    if options.figure:
        writable(options.figure, (".png",), "--figure")
        needs("--figure", "matplotlib")
    if options.perfetto is not None:
        makeable(options.perfetto, "--perfetto")
    from difax.study.profile import as_json, check_setup, draw_profile, format_profile, perfetto

    config, prompts = _config(options, "fmnist_dit"), _prompts(options)
    run = _run(options, config)
    check_setup(run.setup)
    cond = _cond(options, run, prompts)
    _fits(options, "repeat", run.setup.model.input_shape, len(jax.tree.leaves(cond)[0]))
    found = run.profile(cond, options.seed, repeat=options.repeat, turns=options.turns)
    log("profile", **as_json(found))
    print(json.dumps(as_json(found)) if options.json else format_profile(found))
    if options.figure:
        draw_profile(found, pathlib.Path(options.figure))
    if options.perfetto:
        where = perfetto(run.setup, run.prepared, cond, options.seed, options.perfetto)
        print(f"difax: trace in {where}", file=sys.stderr)
    return 0


def plan(options: argparse.Namespace) -> int:
    if options.platform:
        raise ValueError(f"--platform {options.platform}: a plan is for --target {options.target}; allowed: none")
    log = _start(options)
    from difax.config import parse_value
    from difax.core.chips import check_compiler, parse_target
    from difax.core.extras import needs
    from difax.study.plan import plan

    check_compiler(parse_target(options.target))
    if options.batch is not None:
        _counts(options, "batch")
    if options.picture:
        writable(options.picture, (".png",), "--picture")
        needs("--picture", "matplotlib")
    xla = {}
    for setting in options.xla:
        key, equals, value = setting.partition("=")
        if not equals:
            raise ValueError(f"--xla {setting}; allowed: KEY=VALUE")
        xla[key] = parse_value(value, key)
    auto = options.mesh == "auto"
    config = _config(argparse.Namespace(**{**vars(options), "mesh": None}) if auto else options, "fmnist_dit")
    quiet = options.quiet or options.json
    found = plan(config, options.target, auto, options.batch, xla, quiet=quiet, whole=options.whole)
    log("plan", **found.figures)
    print(json.dumps(found.figures) if options.json else found)
    if options.picture:
        found.draw(options.picture)
        print(f"difax: the picture is {options.picture}", file=sys.stderr)
    return 0


def calibrate(options: argparse.Namespace) -> int:
    log = _start(options)
    from difax.config import piped
    from difax.study.calibrate import check_settings, ending

    kind, technique = _calibrated(options)
    out = writable(options.out, (ending(technique, kind),))
    _seeds(options)
    setattr(options, kind, None)
    config = _config(options, "fmnist_dit")
    settings = _fit_settings(options, kind, config)
    check_settings(technique, {"samples": options.samples, "batch": options.batch, **settings}, kind)
    prompts = _prompts(options)
    run = _run(options, piped({k: v for k, v in config.items() if k != "cache"}))
    _fits(options, "samples" if technique == "scheduled" else "batch", run.setup.model.input_shape, 1)
    content = run.calibrate(
        technique,
        out,
        _cond(options, run, prompts),
        samples=options.samples,
        batch=options.batch,
        seed=options.seed,
        tell=_tell(options, log),
        kind=kind,
        **settings,
    )
    if technique == "scheduled":
        kept = "".join("F" if c else "." for c in content["schedule"])
        shown = {"schedule": kept, **{f"loss, {k}": f"{v:.4g}" for k, v in content["losses"].items()}}
    else:
        shown = {k: v for k, v in content.items() if isinstance(v, (str, int, float))}
        if technique == "teacache":
            shown["coefficients"] = ", ".join(f"{c:.6g}" for c in content["coefficients"])
        if kind == "grid":
            shown["times"] = ", ".join(f"{t:.4f}" for t in content["times"])
    log("calibrate", **shown, out=str(out))
    for key, value in {**shown, "written to": str(out)}.items():
        print(f"{key:<26}{value}")
    return 0


def _calibrated(options: argparse.Namespace) -> tuple[str, str]:
    """What `difax calibrate` is about, and its name: the cache, else a grid or a solver that is fitted.

    Raises:
      ValueError: none of them, an unknown one, or two.
    """
    from difax.registry import choose, is_outside
    from difax.study.calibrate import KINDS, MADE, TECHNIQUES

    # a grid or solver that can be run is the run's own, beside a cache or another fit
    known = {"grid": _registry("grid"), "solver": _registry("solver")}
    named = {kind: getattr(options, kind) for kind in MADE if getattr(options, kind) in MADE[kind]}
    if options.cache:
        also = [f"--{kind} {name}" for kind, name in named.items() if name not in known[kind]]
        if also:
            raise ValueError(f"--cache {options.cache} and {also[0]}: two calibrations; allowed: one at a time")
        return "cache", choose("calibration", options.cache, TECHNIQUES)
    if "grid" in named and "solver" in named and named["solver"] in known["solver"]:
        del named["solver"]
    if len(named) > 1:
        raise ValueError(
            f"--grid {named['grid']} and --solver {named['solver']}: two calibrations; allowed: one at a time"
        )
    if named:
        return next(iter(named.items()))
    for kind in MADE:
        name = getattr(options, kind)
        if name and name not in known[kind] and not is_outside(name):
            choose(f"calibration of a {kind}", name, KINDS[kind])
    raise ValueError(
        f"--cache is missing; allowed: {', '.join(TECHNIQUES)}; or --grid: {', '.join(KINDS['grid'])}; or --solver: "
        f"{', '.join(KINDS['solver'])}"
    )


def _registry(kind: str) -> Any:
    from difax.registry import REGISTRIES

    return REGISTRIES[kind]


def _fit_settings(options: argparse.Namespace, kind: str, config: dict[str, Any]) -> dict[str, Any]:
    """The settings of a calibration: of a cache its keys in the configuration and flags, else what --fit says."""
    from difax.config import parse_value

    flags = {k: getattr(options, k) for k in ("budget", "rounds", "rank") if getattr(options, k) is not None}
    if kind == "cache":
        if options.fit:
            raise ValueError(
                f"--fit {options.fit[0]}: a calibration of a cache has none; allowed: --config.cache.KEY=VALUE"
            )
        return {**{k: v for k, v in config.get("cache", {}).items() if k != "name"}, **flags}
    if flags:
        raise ValueError(f"--{next(iter(flags))} is of caches; allowed: --fit KEY=VALUE")
    settings = {}
    for setting in options.fit:
        key, equals, value = setting.partition("=")
        if not equals:
            raise ValueError(f"--fit {setting}; allowed: KEY=VALUE")
        settings[key] = parse_value(value, key)
    return settings


@_on_all_hosts
def train(options: argparse.Namespace) -> int:
    log, config = _start(options, together=True), _config(options, None)
    from difax.core import hosts
    from difax.run import train

    state = train(
        config,
        options.workdir,
        data=options.data,
        resume=options.resume,
        minutes=options.minutes,
        progress=not options.quiet and hosts.is_first(),
        log=lambda row: log("step", **row),
    )
    if hosts.is_first():
        print(f"{options.workdir}: step {int(state.step)} of {config['train']['steps']}")
    return 0


def export(options: argparse.Namespace) -> int:
    log = _start(options)
    out = writable(options.out, (".safetensors",))
    from difax.registry import make
    from difax.training.train import restore_ema
    from difax.weights.checkpoint import save_safetensors

    if not (pathlib.Path(options.workdir) / "checkpoints").is_dir():
        raise ValueError(f"{options.workdir}: no training run there (no checkpoints/)")
    asked = argparse.Namespace(**{**vars(options), "weights": options.workdir, "dtype": None})  # that of the file
    config = _config(asked, None)
    import jax
    import jax.numpy as jnp

    from difax.config import plain

    step, params = restore_ema(options.workdir, make("model", config["model"]).init)
    params = jax.tree.map(lambda a: jnp.asarray(a).astype(options.dtype), params)
    save_safetensors(out, params, {"config": plain(config), "step": step})
    log("export", step=step, out=str(out))
    print(f"{out}: {out.stat().st_size} bytes, step {step}, {options.dtype}")
    return 0


def convert(options: argparse.Namespace) -> int:
    _start(options)
    import jax.numpy as jnp

    from difax.checkpoints import recognise
    from difax.config import parse_value
    from difax.weights.convert import check_target, convert

    check_target(options.target)
    geometry = {}
    for setting in options.geometry:
        key, equals, value = setting.partition("=")
        if not equals:
            raise ValueError(f"--geometry {setting}: allowed: KEY=VALUE")
        geometry[key] = parse_value(value, key)
    found = recognise(options.source, options.model, options.layout, **geometry)
    done = convert(options.source, options.target, found, jnp.dtype(options.dtype) if options.dtype else None)
    done = {"model": found.model.name, **done, "out": options.target}
    text = (
        f"{options.target}: {found.model.name}, {done['parameters']:,} parameters in {done['tensors']} tensors, "
        f"{done['bytes']:,} bytes"
    )
    print(json.dumps(done) if options.json else text)
    return 0


def list_names(options: argparse.Namespace) -> int:
    if options.systems:
        return _list_systems(options)
    for flag in ("category", "status"):
        if getattr(options, flag) is not None:
            raise ValueError(f"--{flag} {getattr(options, flag)}: allowed with --systems only")
    from difax.registry import choose
    from difax.report import listing

    kinds = LISTS if options.kind is None else (choose("kind", options.kind, LISTS),)
    for kind in kinds:
        lines = listing(kind)
        width = max((len(name) for name, _ in lines), default=0)
        print(f"{kind}:")
        for name, text in lines:
            print(f"  {name:{width}}  {text}")
    return 0


def _list_systems(options: argparse.Namespace) -> int:
    from difax.study import catalogue

    if options.kind is not None:
        raise ValueError(f"list {options.kind} --systems: allowed: one of the two")
    print(catalogue.format_systems(catalogue.select(catalogue.systems(), options.category, options.status)))
    return 0


def writable(path: str, suffixes: tuple[str, ...], flag: str = "--out", made: str | None = None) -> pathlib.Path:
    """`difax.core.files.writable`, whose module is not imported for a command's help."""
    from difax.core.files import writable

    return writable(path, suffixes, flag, made)


def makeable(path: str, flag: str) -> pathlib.Path:
    """`difax.core.files.makeable`, whose module is not imported for a command's help."""
    from difax.core.files import makeable

    return makeable(path, flag)
