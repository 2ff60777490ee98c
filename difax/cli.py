"""The command line of difax, a command a function. Every user's mistake is one line on stderr and exit code 2."""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import shlex
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

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


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0, 1 for a failed run, 2 for a mistake in what was asked."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        options = _parser().parse_args(_join_overrides(arguments))
        options.command = shlex.join(["difax", *arguments])
        code = options.run(options)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader of a pipe, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, FileNotFoundError) as error:
        return _fail(str(error), 2)
    except FloatingPointError as error:
        return _fail(str(error), 1)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)


def _fail(message: str, code: int) -> int:
    print(f"difax: error: {' '.join(message.split())}", file=sys.stderr)
    return code


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see {self.prog} --help)")


def _join_overrides(arguments: list[str]) -> list[str]:
    """Turns --config.a.b=v and --config.a.b v into --set a.b=v."""
    joined, rest = [], iter(arguments)
    for argument in rest:
        if argument.startswith("--config."):
            setting = argument.removeprefix("--config.")
            if "=" not in setting:
                value = next(rest, None)
                if value is None:
                    raise ValueError(f"{argument}: a value is missing")
                setting = f"{setting}={value}"
            joined += ["--set", setting]
        else:
            joined.append(argument)
    return joined


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="difax",
        description="Fast Diffusion Transformers in JAX.",
        epilog="Any key of the configuration can be set by --config.SECTION.KEY=VALUE.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)

    common = _Parser(add_help=False)
    common.add_argument("--config", metavar="NAME[:ARG]", help="a name of `difax list configs`, or a .py file")
    common.add_argument("--gin_file", action="append", default=[], metavar="FILE", help="gin bindings")
    common.add_argument("--gin_param", action="append", default=[], metavar="BINDING", help="one gin binding")
    common.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=argparse.SUPPRESS)
    common.add_argument("--quiet", action="store_true", help="no progress on stderr")

    sample = commands.add_parser("sample", parents=[common], help="draw images and say what they cost")
    for name in SHORT:
        sample.add_argument(f"--{name}", metavar="NAME", help=f"short for --config.{name}.name=NAME")
    sample.add_argument("--steps", type=int, help="solver steps")
    sample.add_argument("--scale", type=float, help="guidance scale")
    sample.add_argument("--dtype", choices=("float32", "bfloat16"), help="compute dtype of the model")
    sample.add_argument("--layout", metavar="NAME", help="of the weights: stacked, or unstacked (blocks written out)")
    sample.add_argument(
        "--conditioning", metavar="NAME", help="of the blocks: at each evaluation, or ahead of all (small batches)"
    )
    sample.add_argument("--labels", help="comma-separated labels or class names (default: one of each class)")
    sample.add_argument("--repeat", type=int, default=1, help="rows of the labels, each with other noise")
    sample.add_argument("--seed", type=int, default=0, help="seed of the run; image i depends on (seed, i) alone")
    sample.add_argument("--cond", metavar="FILE.safetensors", help="embeddings, for models that take no labels")
    sample.add_argument("--weights", metavar="PATH", help=".safetensors file or training folder")
    sample.add_argument("--random-init", action="store_true", help="random weights, to look at costs only")
    sample.add_argument("--out", default="samples.png", metavar="FILE.png", help="the picture (default: %(default)s)")
    sample.add_argument(
        "--trace", metavar="FILE.npz", help="what was computed: step, layer, branch, half; the gate's metric"
    )
    sample.add_argument("--json", action="store_true", help="print the table as JSON")
    sample.add_argument("--no-compile-cache", action="store_true", help="compile anew")
    sample.set_defaults(run=_sample)

    train = commands.add_parser("train", parents=[common], help="train a model")
    train.add_argument("--workdir", required=True, metavar="DIR", help="folder of the run")
    train.add_argument("--data", metavar="DIR", help="folder of the data set's files")
    train.add_argument("--minutes", type=float, help="stop with a checkpoint after so long")
    train.add_argument("--resume", action="store_true", help="continue the run in DIR")
    train.set_defaults(run=_train)

    export = commands.add_parser("export", help="write a run's averaged weights as one safetensors file")
    export.add_argument("--workdir", required=True, metavar="DIR", help="folder of the run")
    export.add_argument("--out", required=True, metavar="FILE.safetensors")
    export.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    export.set_defaults(run=_export)

    calibrate = commands.add_parser(
        "calibrate", parents=[common], help="measure what a cache plans from, fit what it has learned, or search a plan"
    )
    for name in SHORT:
        calibrate.add_argument(f"--{name}", metavar="NAME", help=f"short for --config.{name}.name=NAME")
    calibrate.add_argument("--steps", type=int, help="solver steps")
    calibrate.add_argument("--scale", type=float, help="guidance scale")
    calibrate.add_argument("--dtype", choices=("float32", "bfloat16"), help="compute dtype of the model")
    calibrate.add_argument("--labels", help="comma-separated labels or class names (default: one of each class)")
    calibrate.add_argument("--cond", metavar="FILE.safetensors", help="embeddings, for models that take no labels")
    calibrate.add_argument("--weights", metavar="PATH", help=".safetensors file or training folder")
    calibrate.add_argument("--random-init", action="store_true", help="random weights, to try the command")
    calibrate.add_argument("--samples", type=int, default=16, help="samples to draw (default: %(default)s)")
    calibrate.add_argument("--batch", type=int, default=4, help="samples at a time (default: %(default)s)")
    calibrate.add_argument("--seed", type=int, default=0, help="seed of the samples")
    calibrate.add_argument("--budget", type=float, default=0.4, help="of scheduled: share of the operations of a run")
    calibrate.add_argument("--rounds", type=int, default=12, help="of scheduled: exchanges, at most")
    calibrate.add_argument("--rank", type=int, default=32, help="of icc: of each factor (default: %(default)s)")
    calibrate.add_argument("--out", required=True, metavar="FILE", help="for the cache's file=...")
    calibrate.set_defaults(run=_calibrate, repeat=1)

    pareto = commands.add_parser("pareto", parents=[common], help="measure methods on the same work, side by side")
    pareto.add_argument(
        "--methods",
        nargs="+",
        default=["all"],
        metavar="NAME",
        help="all, a family (steps, solver, guidance, cache, attention, quantisation, together), names, or settings "
        "such as steps=12,cache.name=fora (default: all)",
    )
    pareto.add_argument("--out", default="pareto", metavar="DIR", help="folder of the sweep (default: %(default)s)")
    pareto.add_argument("--seeds", type=int, default=64, help="images of each method (default: %(default)s)")
    pareto.add_argument("--batch", type=int, default=8, help="images at a time (default: %(default)s)")
    pareto.add_argument("--turns", type=int, default=3, help="batches that are timed (default: %(default)s)")
    pareto.add_argument("--seed", type=int, default=0, help="seed of the images")
    pareto.add_argument("--budget", type=float, metavar="MINUTES", help="begin no more methods after so long")
    pareto.add_argument("--data", metavar="DIR", help="folder of the data set's files, for the judge")
    pareto.add_argument("--no-judge", action="store_true", help="compare with the baseline's images alone")
    pareto.add_argument(
        "--network",
        action="append",
        default=[],
        metavar="NAME[=PATH]",
        help="also judge with efficientnet_lite0, or with your own inception=FILE (FID), lpips=FILE, clip=FOLDER, "
        "image_reward=FILE (needs difax[features]); may be repeated",
    )
    pareto.add_argument("--real", metavar="FILE", help="of --network: real images, uint8 [N, H, W, C], .npy or .npz")
    pareto.add_argument("--prompts", metavar="FILE", help="of --network: a line of text for each label, in their order")
    pareto.add_argument("--quality", default="psnr", help="that the frontier is of (default: %(default)s)")
    pareto.add_argument("--search", action="store_true", help="look for the best composition (needs difax[search])")
    pareto.add_argument("--speedup", type=float, help="of --search: seconds over the baseline's, at least")
    pareto.add_argument("--floor", type=float, help="of --search: of the quality, at least (at most, of a distance)")
    pareto.add_argument("--trials", type=int, default=30, help="of --search: settings to try (default: %(default)s)")
    pareto.add_argument("--figure", metavar="FILE.png", help="the scatter as a picture (needs difax[plot])")
    pareto.add_argument(
        "--sheet", metavar="FILE.png", help="the frontier's images, differences and decisions (needs difax[plot])"
    )
    pareto.add_argument("--json", action="store_true", help="print the rows as JSON")
    pareto.set_defaults(run=_pareto)

    profile = commands.add_parser("profile", parents=[common], help="where the seconds of a step go, part by part")
    for name in SHORT:
        profile.add_argument(f"--{name}", metavar="NAME", help=f"short for --config.{name}.name=NAME")
    profile.add_argument("--steps", type=int, help="solver steps")
    profile.add_argument("--dtype", choices=("float32", "bfloat16"), help="compute dtype of the model")
    profile.add_argument("--labels", help="comma-separated labels or class names (default: one of each class)")
    profile.add_argument("--repeat", type=int, default=1, help="rows of the labels")
    profile.add_argument("--cond", metavar="FILE.safetensors", help="embeddings, for models that take no labels")
    profile.add_argument("--weights", metavar="PATH", help=".safetensors file or training folder")
    profile.add_argument("--random-init", action="store_true", help="random weights")
    profile.add_argument("--seed", type=int, default=0, help="seed of the samples")
    profile.add_argument("--turns", type=int, default=5, help="of which the median is taken (default: %(default)s)")
    profile.add_argument("--figure", metavar="FILE.png", help="the parts as a picture (needs difax[plot])")
    profile.add_argument("--perfetto", metavar="DIR", help="also JAX's trace of one run, for ui.perfetto.dev")
    profile.add_argument("--json", action="store_true", help="print the parts as JSON")
    profile.set_defaults(run=_profile)

    convert = commands.add_parser("convert", help="turn a published safetensors checkpoint into an orbax one")
    convert.add_argument("source", metavar="SRC", help=".safetensors file, its .index.json, or their folder")
    convert.add_argument("target", metavar="DST", help="folder that does not exist yet")
    convert.add_argument("--model", metavar="NAME", help="dit, flux, pixart or wan (default: by the tensors' names)")
    convert.add_argument("--layout", metavar="NAME", help="original or diffusers (default: by the tensors' names)")
    convert.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the result (default: the file's)")
    convert.add_argument(
        "--geometry",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="what the file does not tell, such as heads=16 or size=32",
    )
    convert.add_argument("--json", action="store_true", help="print the result as JSON")
    convert.set_defaults(run=_convert)

    listing = commands.add_parser("list", help="what there is, one line each")
    listing.add_argument("kind", nargs="?", help=f"one of {', '.join(LISTS)}")
    listing.add_argument("--systems", action="store_true", help="published systems, and what difax has of each")
    listing.add_argument("--category", help="of --systems: one of them, such as caching")
    listing.add_argument("--status", help="of --systems: exact, variant, adapted, planned or 'not applicable'")
    listing.set_defaults(run=_list)
    return parser


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


def _sample(options: argparse.Namespace) -> int:
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


def _pareto(options: argparse.Namespace) -> int:
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
            writable(getattr(options, flag), (".png",), f"--{flag}")
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
        found = search(sweep, Goal(options.quality, options.speedup, options.floor), options.trials)
        print(summary(found, Goal(options.quality, options.speedup, options.floor)))
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
    return 0


def _profile(options: argparse.Namespace) -> int:
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


def _calibrate(options: argparse.Namespace) -> int:
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


def _train(options: argparse.Namespace) -> int:
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


def _export(options: argparse.Namespace) -> int:
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


def _convert(options: argparse.Namespace) -> int:
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


def _list(options: argparse.Namespace) -> int:
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


def writable(path: str, suffixes: tuple[str, ...], flag: str = "--out") -> pathlib.Path:
    """Checks before any work that a file can be written there; returns its path.

    Raises:
      ValueError: another suffix, a folder, or a folder that is missing or not writable.
    """
    target = pathlib.Path(path)
    if target.suffix not in suffixes:
        raise ValueError(f"{flag} {path}: the name must end in {' or '.join(suffixes)}")
    if target.is_dir():
        raise ValueError(f"{flag} {path}: that is a folder")
    if not target.parent.is_dir():
        raise ValueError(f"{flag} {path}: the folder {target.parent} does not exist")
    if not os.access(target.parent, os.W_OK):
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
