"""What the commands of `difax` do, a function each; they import what they need, so that help is quick."""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import shlex
import sys
from collections.abc import Sequence
from typing import Any

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
)

SHORT = ("solver", "grid", "guide", "cache", "attend", "quant")  # sections whose name has a flag of its own


def _config(options: argparse.Namespace, default: str | None) -> dict[str, Any]:
    from difax.config import gin_settings, load_config, override, parse_value

    settings: list[tuple[str, Any]] = []
    base: str | None = options.config
    if options.gin_file or options.gin_param:
        gin_base, settings = gin_settings(options.gin_file, options.gin_param)
        base = base or gin_base
    base = base or default
    if base is None:
        raise ValueError("which configuration? Give --config NAME (see difax list configs)")
    for setting in options.set:
        key, _, value = setting.partition("=")
        settings.append((key, parse_value(value)))
    short = {name: f"{name}.name" for name in SHORT}
    short |= {
        "layout": "layout",
        "conditioning": "conditioning",
        "steps": "steps",
        "scale": "scale",
        "dtype": "model.dtype",
    }
    for flag, key in short.items():
        if getattr(options, flag, None) is not None:
            settings.append((key, getattr(options, flag)))
    return override(load_config(base), settings)


def sample(options: argparse.Namespace) -> int:
    config = _config(options, "fmnist_dit")
    out = writable(options.out, (".png",))
    if options.trace:
        writable(options.trace, (".npz",), "--trace")
    if options.repeat < 1:
        raise ValueError(f"--repeat={options.repeat}; allowed: 1 or more")
    if not 0 <= options.seed < 2**32:
        raise ValueError(f"--seed={options.seed}; allowed: 0 ... {2**32 - 1}")
    import jax
    import numpy as np

    from difax.build import build_run
    from difax.decisions import save_trace
    from difax.images import picture, save_png
    from difax.report import draw, format_table

    if not options.no_compile_cache:
        cache = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
        jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(cache) / "difax" / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    run, random, full_size = build_run(config), _random(options, config), {}
    if random:
        config, run, full_size = _fitting(config, run)
    cond, columns = _conditions(options, config, run.model, random)
    run, params, source = _weights(options, config, run, random)
    progress = not (options.quiet or options.json) and sys.stderr.isatty()
    images, table, trace = draw(run, params, cond, options.seed, progress)
    save_png(out, picture(images, columns))
    if options.trace:
        save_trace(options.trace, run.rows, trace)
    table = {
        "model": run.model.name,
        "weights": source,
        "solver": config["solver"]["name"],
        "guide": config["guide"]["name"],
        "cache": config.get("cache", {"name": "none"})["name"],
        "attend": config.get("attend", {"name": "xla"})["name"],
        "quant": config.get("quant", {"name": "none"})["name"],
        "dtype": str(np.dtype(run.model.dtype)),
        **table,
        **full_size,
        "out": str(out),
    }
    print(json.dumps(table) if options.json else format_table(table))
    return 0


def pareto(options: argparse.Namespace) -> int:
    config = _config(options, "fmnist_dit")
    for name, least in (("seeds", 1), ("batch", 1), ("turns", 1), ("trials", 1), ("seed", 0)):
        if getattr(options, name) < least:
            raise ValueError(f"--{name}={getattr(options, name)}; allowed: {least} or more")
    if options.budget is not None and not options.budget > 0:
        raise ValueError(f"--budget={options.budget}; allowed: above 0")
    if options.search == (options.speedup is None and options.floor is None):
        raise ValueError("--search needs one of --speedup and --floor, which need --search")
    from difax.build import choose
    from difax.config import override, parse_value
    from difax.frontier import QUALITIES, table
    from difax.judge import make_judge
    from difax.methods import METHODS, chosen
    from difax.networks import make_eyes, read_prompts, real_images
    from difax.pareto import Options, Sweep
    from difax.pareto_report import figure, read_images, sheet, title, write_report
    from difax.pareto_search import Goal, search, summary

    choose("quality", options.quality, QUALITIES)
    for flag in ("figure", "sheet"):
        if getattr(options, flag):
            writable(getattr(options, flag), (".png",), f"--{flag}", made=options.out)
    methods = chosen(options.methods, parse_value)
    for name in methods.keys() - METHODS.keys():  # what a user wrote is refused before hours of measuring
        override(config, list(methods[name].settings.items()))
    judge = None if options.no_judge else make_judge(options.data)
    real = real_images(options.real, options.seeds, judge) if options.network else None
    eyes = make_eyes(options.network, real, read_prompts(options.prompts))
    tell = lambda text: None if options.quiet else print(f"difax: {text}", file=sys.stderr, flush=True)  # noqa: E731
    asked = Options(options.seeds, options.batch, options.turns, options.seed, options.budget)
    gin = [f"--gin_file {f}" for f in options.gin_file] + [f"--gin_param {shlex.quote(p)}" for p in options.gin_param]
    name = " ".join([options.config or "fmnist_dit", *gin, *(shlex.quote(f"--config.{s}") for s in options.set)])
    sweep = Sweep(name, config, asked, pathlib.Path(options.out), judge, tell, eyes)
    if options.search:
        goal = Goal(options.quality, options.speedup, options.floor)
        print(summary(search(sweep, goal, options.trials), goal))
        rows = sweep.rows()
    else:
        rows = sweep.measure(methods)
    print(json.dumps(rows) if options.json else table(rows, options.quality))
    report = write_report(options.out, quality=options.quality, command=options.command)
    heading = title(json.loads((sweep.out / "sweep.json").read_text()))
    if options.figure:
        figure(rows, options.quality, options.figure, heading=heading)
    if options.sheet:
        sheet(rows, read_images(sweep.out, rows), options.sheet, options.quality, heading=heading)
    tell(f"the report is {report}")
    for method, why in sweep.failed.items():
        print(f"difax: error: {method} failed, and is tried again by the same command: {why}", file=sys.stderr)
    return 1 if sweep.failed else 0


def profile(options: argparse.Namespace) -> int:
    config = _config(options, "fmnist_dit")
    for name in ("turns", "repeat"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name}={getattr(options, name)}; allowed: 1 or more")
    if options.figure:
        writable(options.figure, (".png",), "--figure")
    from difax.build import build_run
    from difax.profile import as_json, draw_profile, format_profile, perfetto, profile

    run, random = build_run(config), _random(options, config)
    if random:
        config, run, _ = _fitting(config, run)
    cond, _ = _conditions(options, config, run.model, random)
    run, params, _ = _weights(options, config, run, random)
    found = profile(run, params, cond, options.seed, options.turns)
    print(json.dumps(as_json(found)) if options.json else format_profile(found))
    if options.figure:
        draw_profile(found, pathlib.Path(options.figure))
    if options.perfetto:
        print(f"difax: trace in {perfetto(run, params, cond, options.seed, options.perfetto)}", file=sys.stderr)
    return 0


def calibrate(options: argparse.Namespace) -> int:
    from difax.build import CALIBRATIONS, FITS, build_run, choose, save_by_stage

    out = writable(options.out, (".npz" if options.cache in FITS else ".json",))
    for name in ("samples", "batch", "rounds", "rank"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name}={getattr(options, name)}; allowed: 1 or more")
    known = dict.fromkeys(["scheduled", *CALIBRATIONS, *FITS])
    if not options.cache:
        raise ValueError(f"--cache is missing; allowed: {', '.join(known)}")
    technique = choose("calibration", options.cache, known)
    options.cache = None
    config = _config(options, "fmnist_dit")
    settings = {k: v for k, v in config.get("cache", {}).items() if k != "name"}
    config = {k: v for k, v in config.items() if k != "cache"}
    run, random = build_run(config), _random(options, config)
    cond, _ = _conditions(options, config, run.model, random)
    import jax

    from difax.calibrate import Sampler, about, calibrate, fit, save_json, search

    run, params, _ = _weights(options, config, run, random)
    params = jax.block_until_ready(run.prepare(params))
    sampler = Sampler(run, params, cond, options.seed)
    tell = lambda text: None if options.quiet else print(f"difax: {text}", file=sys.stderr)  # noqa: E731
    if technique == "scheduled":
        for key in settings:
            choose("key of cache scheduled", key, ("where", "forecast", "order"))
        content = search(sampler, options.budget, options.samples, tell, rounds=options.rounds, **settings)
        kept = "".join("F" if c else "." for c in content["schedule"])
        shown = {"schedule": kept, **{f"loss, {k}": f"{v:.4g}" for k, v in content["losses"].items()}}
    else:
        if settings:
            raise ValueError(f"cache {technique}: a calibration takes no keys, not {', '.join(settings)}")
        if technique in FITS:
            save_by_stage(out, fit(technique, sampler, options.samples, options.batch, tell, options.rank))
            content = {"technique": technique, **about(sampler, options.samples)}
        else:
            content = calibrate(technique, sampler, options.samples, options.batch, tell)
        shown = {k: v for k, v in content.items() if isinstance(v, (str, int, float))}
        if technique == "teacache":
            shown["coefficients"] = ", ".join(f"{c:.6g}" for c in content["coefficients"])
    if technique not in FITS:
        save_json(out, content)
    for key, value in {**shown, "written to": str(out)}.items():
        print(f"{key:<26}{value}")
    return 0


def _random(options: argparse.Namespace, config: dict[str, Any]) -> bool:
    """Are the weights random, by a flag or by the configuration."""
    if options.random_init and options.weights:
        raise ValueError("--random-init and --weights exclude each other")
    return options.random_init or (config.get("weights") == "random" and not options.weights)


def _weights(options: argparse.Namespace, config: dict[str, Any], run: Any, random: bool) -> tuple[Any, Any, str]:
    """The run with the model that its weights are of, the weights, and where they came from."""
    import jax

    from difax.build import load_weights

    if random:
        return run, jax.jit(run.model.init)(jax.random.key(options.seed)), "random"
    model, params, source = load_weights(config, run.model, options.weights)
    return run._replace(model=model), params, source


def _conditions(options: argparse.Namespace, config: dict[str, Any], model: Any, random: bool) -> tuple[Any, int]:
    """The conditions of a run, and how many of them make a row of the picture."""
    import jax
    import numpy as np

    from difax.conditions import labelled, load_conditions, random_conditions
    from difax.data import CLASS_NAMES

    if labelled(model):
        if options.cond:
            raise ValueError(f"--cond {options.cond}: {model.name} takes labels")
        names = CLASS_NAMES.get(config.get("data", {}).get("name"), ())
        row = np.asarray(parse_labels(options.labels, model.classes, names), np.int32)
    elif options.labels:
        raise ValueError(f"--labels {options.labels}: {model.name} takes no labels; give --cond FILE.safetensors")
    elif options.cond:
        row = load_conditions(model, options.cond)
    elif random:
        row = random_conditions(model, 1, options.seed)
    else:
        leaves = jax.tree_util.tree_flatten_with_path(model.cond)[0]
        names = ", ".join(
            f"{jax.tree_util.keystr(p, simple=True, separator='/')} [n, {str(a.shape)[1:-1]}]" for p, a in leaves
        )
        raise ValueError(f"{model.name} takes embeddings; give --cond FILE.safetensors with the tensors {names}")
    columns = len(jax.tree.leaves(row)[0])
    return jax.tree.map(lambda a: np.concatenate([a] * options.repeat), row), columns


def _fitting(config: dict[str, Any], run: Any) -> tuple[dict[str, Any], Any, dict[str, Any]]:
    """The run itself, or where its random weights do not fit into memory, its `reduced` size to draw with and what
    compiling the full size told."""
    from difax.build import build_run
    from difax.report import ahead_of_time, memory_available, weight_bytes

    needed, free = weight_bytes(run), memory_available()
    if needed <= free:
        return config, run, {}
    if "reduced" not in config:
        raise ValueError(
            f"the weights of {run.model.name} need {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free, and this "
            "configuration has no `reduced` size to draw with"
        )
    full = ahead_of_time(run)
    smaller = {**config, **config["reduced"], "model": {**config["model"], **config["reduced"].get("model", {})}}
    return smaller, build_run(smaller), {"full_size": full}


def train(options: argparse.Namespace) -> int:
    config = _config(options, None)
    from difax.build import build_data, build_options, build_task
    from difax.report import previewer
    from difax.train import train

    task = build_task(config, previewer)
    training = build_options(config)
    data = build_data(config, "train", options.data)
    if options.minutes is not None and not options.minutes > 0:
        raise ValueError(f"--minutes={options.minutes}; allowed: > 0")
    state = train(
        task,
        data,
        training,
        options.workdir,
        config,
        options.resume,
        progress=not options.quiet,
        minutes=options.minutes,
    )
    print(f"{options.workdir}: step {int(state.step)} of {training.steps}")
    return 0


def export(options: argparse.Namespace) -> int:
    out = writable(options.out, (".safetensors",))
    from difax.build import make
    from difax.checkpoint import save_safetensors
    from difax.train import read_run, restore_ema

    config = read_run(options.workdir)
    import jax
    import jax.numpy as jnp

    step, params = restore_ema(options.workdir, make("model", config["model"]).init)
    params = jax.tree.map(lambda a: jnp.asarray(a).astype(options.dtype), params)
    save_safetensors(out, params, {"config": config, "step": step})
    print(f"{out}: {out.stat().st_size} bytes, step {step}, {options.dtype}")
    return 0


def convert(options: argparse.Namespace) -> int:
    import absl.logging
    import jax.numpy as jnp

    absl.logging.set_verbosity(absl.logging.ERROR)  # orbax warns of what it skips
    from difax.build import recognise
    from difax.config import parse_value
    from difax.convert import convert

    geometry = {}
    for setting in options.geometry:
        key, equals, value = setting.partition("=")
        if not equals:
            raise ValueError(f"--geometry {setting}: allowed: KEY=VALUE")
        geometry[key] = parse_value(value)
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
    from difax.build import choose
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
    from difax import catalogue
    from difax.report import format_systems

    if options.kind is not None:
        raise ValueError(f"list {options.kind} --systems: allowed: one of the two")
    print(format_systems(catalogue.select(catalogue.systems(), options.category, options.status)))
    return 0


def writable(path: str, suffixes: tuple[str, ...], flag: str = "--out", made: str | None = None) -> pathlib.Path:
    """Checks before any work that a file can be written there; returns its path.

    Args:
      made: a folder that the command makes, with all above it.

    Raises:
      ValueError: another suffix, a folder, or a folder that is missing or not writable.
    """
    target = pathlib.Path(path)
    if target.suffix not in suffixes:
        raise ValueError(f"{flag} {path}: the name must end in {' or '.join(suffixes)}")
    if target.is_dir():
        raise ValueError(f"{flag} {path}: that is a folder")
    if not target.parent.is_dir():
        folder = None if made is None else pathlib.Path(made).absolute()
        if folder is None or target.parent.absolute() not in (folder, *folder.parents):
            raise ValueError(f"{flag} {path}: the folder {target.parent} does not exist")
    elif not os.access(target.parent, os.W_OK):
        raise ValueError(f"{flag} {path}: the folder {target.parent} is not writable")
    return target


def parse_labels(text: str | None, classes: int, names: Sequence[str] = ()) -> list[int]:
    """Labels "0,3,bag" as indices; None is one of each class (at most the first ten).

    Raises:
      ValueError: a name that is no class, or an index outside 0 ... classes - 1.
    """
    from difax.build import choose

    if text is None:
        return list(range(min(classes, 10)))
    labels = []
    for word in text.split(","):
        word = word.strip()
        if word.lstrip("-").isdigit():
            if not 0 <= int(word) < classes:
                raise ValueError(f"label {word}; allowed: 0 ... {classes - 1}")
            labels.append(int(word))
        elif names:
            labels.append(list(names).index(choose("label", word, names)))
        else:
            raise ValueError(f"label {word!r}; allowed: 0 ... {classes - 1}")
    return labels
