"""The flags of difax, whose work `difax.commands` does. A user's mistake is one line on stderr and exit code 2."""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import sys
import tempfile
import traceback
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import difax
from difax import commands
from difax.core.shell import INTERRUPTED, DifaxWarning, StreamError, streams
from difax.core.writing import EXHAUSTED, NoRoom

FAILED, ASKED = 1, 2  # exit codes: of a run that failed, and of a mistake in what was asked


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0, 1 for a failed run, 2 for a mistake in what was asked.

    Whatever goes wrong is one line on stderr. What nobody foresaw also leaves a file with the traceback, which the line
    names; `--traceback`, anywhere, shows every traceback instead.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    shown = "--traceback" in arguments
    with streams():
        options = None
        try:
            options = _parsed([a for a in arguments if a != "--traceback"])
            code = 0
            if options is not None:
                options.command = shlex.join(["difax", *arguments])
                with _warnings_as_lines():
                    code = options.run(options)
            sys.stdout.flush()
            return code
        except BrokenPipeError:  # the reader of a pipe, such as head, has seen enough
            return 0
        except BaseException as error:
            if shown:
                traceback.print_exc()
            text, code = explained(error) or (_unforeseen(error, getattr(options, "log", None), shown), FAILED)
            print(f"difax: error: {' '.join(text.split())}", file=sys.stderr)
            return code


def _parsed(arguments: list[str]) -> argparse.Namespace | None:
    """The flags of a command; None where help or the version was asked for, and told.

    Raises:
      ValueError: what the parser refuses, and a path or a name that is empty: it would be the current folder.
    """
    for argument in arguments:
        if argument.startswith("--") and argument.endswith("=--"):  # argparse gives an empty list for it
            raise ValueError(f"{argument}: no value; allowed: a path, a name or a number")
    try:
        options = _parser().parse_args(_join_overrides(arguments))
    except SystemExit:
        return None
    for name, value in vars(options).items():
        if name not in ("set", "prompt", "negative") and "" in (value if isinstance(value, list) else [value]):
            flag = name if name in ("source", "target", "kind") else f"--{name}"
            raise ValueError(f"{flag} is empty; allowed: a path or a name")
    return options


def explained(error: BaseException) -> tuple[str, int] | None:
    """The line and the exit code of an error that was to be expected; None of any other."""
    text = str(error) or type(error).__name__
    names = {t.__name__ for t in type(error).__mro__}
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", INTERRUPTED
    if isinstance(error, FloatingPointError):
        return text, FAILED
    if isinstance(error, MemoryError):
        return f"out of memory ({text}), in {_place(error)}", FAILED
    if "LostHost" in names:
        return text, FAILED
    if names & {"JaxRuntimeError", "XlaRuntimeError"}:  # jax need not be imported yet
        return f"{'out of memory: ' * ('RESOURCE_EXHAUSTED' in text)}{text[:400]}", FAILED
    if isinstance(error, RuntimeError) and text.startswith("Unable to initialize backend"):
        return f"no such device here: {text}", ASKED
    if isinstance(error, OSError) and (error.strerror or error.filename):
        return _of_the_system(error), FAILED if error.errno in EXHAUSTED else ASKED
    if isinstance(error, UnicodeError):
        return f"not text in UTF-8 ({text}), in {_place(error)}", ASKED
    if isinstance(error, KeyError):
        return f"the key {text} is missing, in {_place(error)}", ASKED
    if isinstance(error, RecursionError):
        return f"nested too deeply ({text}), in {_place(error)}", ASKED
    if isinstance(error, (EOFError, zipfile.BadZipFile, zlib.error)) or "SafetensorError" in names:
        return f"a damaged file ({text}), in {_place(error)}", ASKED
    if isinstance(error, ModuleNotFoundError) and not (error.name or "difax").startswith("difax"):
        return f"a package is missing: {text}, in {_place(error)}", FAILED
    if isinstance(error, (OSError, ValueError, NotImplementedError)):
        return text, ASKED
    return None


def _of_the_system(error: OSError) -> str:
    """The file and what is wrong with it; where the error names none, the function that had to do with it."""
    if isinstance(error, (StreamError, NoRoom)):
        return str(error.strerror)
    name = error.filename
    if name is None:
        return f"{error.strerror}, in {_place(error)}"
    return f"{os.fsdecode(name) if isinstance(name, bytes) else name}: {error.strerror or error}"


def _place(error: BaseException) -> str:
    """The function of difax that an error came out of."""
    frames = [f for f, _ in traceback.walk_tb(error.__traceback__)]
    within = [f for f in frames if f.f_globals.get("__name__", "").partition(".")[0] == "difax"]
    frame = (within or frames or [sys._getframe()])[-1]
    return f"{frame.f_globals.get('__name__')}.{frame.f_code.co_name}"


def _unforeseen(error: BaseException, log: str | None, shown: bool) -> str:
    """The line about an error that nobody foresaw, with the file that its traceback is in."""
    about = f"{type(error).__name__}: {str(error)[:400]} (in {_place(error)}); that is a fault of difax"
    kept = None if shown else _keep("".join(traceback.format_exception(error)), log)
    return about if kept is None else f"{about}; the traceback is in {kept}"


def _keep(text: str, log: str | None) -> str | None:
    """Writes a text to a new file beside --log or in the temporary folder; None where neither can be written."""
    for folder in [*([os.path.dirname(os.path.abspath(log))] if log else []), None]:
        with contextlib.suppress(OSError):
            number, path = tempfile.mkstemp(".txt", "difax-traceback-", folder)
            with open(number, "w", errors="backslashreplace") as file:
                file.write(text)
            return path
    return None


@contextlib.contextmanager
def _warnings_as_lines() -> Iterator[None]:
    """Within it what difax warns of is one line on stderr; the warnings of others look as ever."""
    with warnings.catch_warnings():
        others = warnings.showwarning

        def show(message: Any, category: type[Warning], *where: Any, **more: Any) -> None:
            if not issubclass(category, DifaxWarning):
                return others(message, category, *where, **more)
            print(f"difax: warning: {' '.join(str(message).split())}", file=sys.stderr)

        warnings.showwarning = show
        warnings.simplefilter("always", DifaxWarning)
        yield


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
    traced = "show where an error came from, not its line alone"
    parser.add_argument("--version", action="version", version=f"difax {difax.__version__}")
    parser.add_argument("--traceback", action="store_true", help=traced)
    added = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)

    every = _Parser(add_help=False)
    every.add_argument("--traceback", action="store_true", help=traced)
    common = _Parser(add_help=False, parents=[every])
    common.add_argument("--config", metavar="NAME[:ARG]", help="a name of `difax list configs`, or a .py file")
    common.add_argument("--gin_file", action="append", default=[], metavar="FILE", help="gin bindings")
    common.add_argument("--gin_param", action="append", default=[], metavar="BINDING", help="one gin binding")
    common.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=argparse.SUPPRESS)
    common.add_argument("--quiet", action="store_true", help="no progress on stderr")
    common.add_argument("--log", metavar="FILE.jsonl", help="append what happens as lines of JSON")
    common.add_argument("--platform", metavar="NAME", help="cpu, gpu or tpu (default: what JAX finds)")

    composed = _Parser(add_help=False)
    for name in commands.NAMED:
        composed.add_argument(f"--{name}", metavar="NAME", help=f"short for --config.{name}.name=NAME")
    composed.add_argument("--steps", type=int, help="solver steps")
    composed.add_argument("--scale", type=float, help="guidance scale")
    composed.add_argument("--dtype", choices=("float32", "bfloat16"), help="compute dtype of the model")
    composed.add_argument("--layout", metavar="NAME", help="of the weights: stacked, or unstacked (blocks written out)")
    composed.add_argument(
        "--conditioning", metavar="NAME", help="what no image goes into: at each evaluation, or ahead of all of them"
    )
    opened = _Parser(add_help=False)
    opened.add_argument(
        "--mesh",
        metavar="AXES",
        help="devices along each axis, such as data=2,cfg=2,seq=4 (default: one device)",
    )
    opened.add_argument("--labels", help="comma-separated labels or class names (default: one of each class)")
    opened.add_argument("--cond", metavar="FILE.safetensors", help="embeddings, for models that take no labels")
    opened.add_argument("--weights", metavar="PATH", help="a training run, a .safetensors file, a published checkpoint")
    opened.add_argument(
        "--scheduler",
        metavar="PATH",
        help="a scheduler_config.json of diffusers or a pipeline's folder: process, prediction, solver and grid",
    )
    opened.add_argument("--random-init", action="store_true", help="random weights, to look at costs only")
    piped = _Parser(add_help=False)
    piped.add_argument("--pipeline", metavar="FOLDER", help="a pipeline as diffusers saves it (model_index.json)")
    whole: dict[str, Any] = {"type": int, "metavar": "N"}
    more: dict[str, Any]
    for flag, more, text in (
        ("height", whole, "of --pipeline: of the picture in pixels (default: the pipeline's own, as for all of these)"),
        ("width", whole, "of --pipeline: of the picture in pixels"),
        ("frames", whole, "of --pipeline: of the film"),
        ("fps", {"type": float}, "of --pipeline: frames of a second of the film"),
        ("negative", {"metavar": "TEXT"}, "of --pipeline: the negative prompt"),
        ("guidance", {"type": float}, "of --pipeline: scale that the network takes as an input (FLUX.1 dev)"),
        ("scale-2", {"type": float}, "of --pipeline: guidance scale of its second network (Wan 2.2)"),
        ("shift", {"type": float}, "of --pipeline: of the flow's times"),
        ("tokens", whole, "of --pipeline: of the longest prompt"),
        (
            "sigmas",
            {"metavar": "S,S,..."},
            "of --pipeline: of the flow before the shift, one a step, or a file of them",
        ),
        ("tile", whole, "of --pipeline: side in pixels of what is decoded and encoded at once (default: all)"),
        ("preview-vae", {"metavar": "PATH"}, "of --pipeline: a small autoencoder that --preview decodes by"),
        ("embeddings", {"metavar": "FOLDER"}, "of --pipeline: keep embeddings there, and take those that are there"),
        ("vae", {"metavar": "PATH"}, "of --pipeline: another autoencoder"),
        ("text-encoder", {"metavar": "FOLDER"}, "of --pipeline: another text encoder; --text-encoder-2, -3 too"),
        ("text-encoder-2", {"metavar": "FOLDER"}, argparse.SUPPRESS),
        ("text-encoder-3", {"metavar": "FOLDER"}, argparse.SUPPRESS),
    ):
        piped.add_argument(f"--{flag}", help=text, **more)
    prompted = _Parser(add_help=False)
    prompted.add_argument("--prompt", action="append", metavar="TEXT", help="of --pipeline; may be repeated")
    prompted.add_argument(
        "--prompts",
        metavar="FILE",
        help="of --pipeline: a prompt a line; in pareto also what --network scores images with, of a model of labels a "
        "line for each label, in their order",
    )
    from_weights = [common, composed, opened, piped]

    sample = added.add_parser("sample", parents=[*from_weights, prompted], help="draw images and say what they cost")
    sample.add_argument("--repeat", type=int, default=1, help="rows of the labels, each with other noise")
    sample.add_argument("--seed", type=int, default=0, help="seed of the run, of which image i has the i-th noise")
    sample.add_argument("--latents", metavar="FILE.npz", help="to begin from, as --out FILE.npz writes them")
    sample.add_argument(
        "--noise", metavar="FILE.npz", help="of the steps, in place of the seed's: noise [n, steps, ...]"
    )
    sample.add_argument(
        "--image", metavar="FILE", help="of --pipeline: a picture to begin from, of one to video its first frame"
    )
    sample.add_argument(
        "--strength", type=float, help="of --image: share of the steps that are made (default: 0.6, the pipeline's)"
    )
    sample.add_argument("--mask", metavar="FILE", help="of --image: white where it may become another, black elsewhere")
    sample.add_argument("--batch", type=int, help="samples at a time (default: 64 evaluations, of --pipeline 1)")
    sample.add_argument("--preview", type=int, metavar="N", help="write a small picture of each sample every N steps")
    sample.add_argument(
        "--out",
        default="samples.png",
        metavar="PATH",
        help="a picture (.png, .jpg, .webp), of videos a film (.mp4, .gif, .webp), the numbers (.npz), or a folder of "
        "single pictures (default: %(default)s)",
    )
    sample.add_argument(
        "--trace", metavar="FILE.npz", help="what was computed: step, layer, branch, half; the gate's metric"
    )
    sample.add_argument("--json", action="store_true", help="print the table as JSON")
    sample.add_argument("--no-compile-cache", action="store_true", help="compile anew, and keep nothing")
    sample.set_defaults(run=commands.sample)

    train = added.add_parser("train", parents=[common], help="train a model")
    train.add_argument("--workdir", required=True, metavar="DIR", help="folder of the run")
    train.add_argument(
        "--data",
        metavar="PATH",
        help="a folder of images (sub-folders are classes), an .npz, or the data set's files",
    )
    train.add_argument(
        "--mesh",
        metavar="AXES",
        help="devices along each axis, such as data=2,fsdp=2,tensor=2 (default: data on all)",
    )
    train.add_argument("--minutes", type=float, help="stop with a checkpoint so long after the first step")
    train.add_argument(
        "--resume",
        nargs="?",
        const=True,
        default=False,
        choices=("auto",),
        metavar="auto",
        help="continue the run in DIR; auto: if there is one, else begin it, so that one command serves every start",
    )
    train.set_defaults(run=commands.train)

    export = added.add_parser("export", parents=[common], help="write a run's averaged weights as one safetensors file")
    export.add_argument("--workdir", required=True, metavar="DIR", help="folder of the run")
    export.add_argument("--out", required=True, metavar="FILE.safetensors")
    export.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    export.set_defaults(run=commands.export)

    calibrate = added.add_parser(
        "calibrate",
        parents=[*from_weights, prompted],
        help="measure what a cache plans from, fit what it has learned, or search a plan; fit a grid or a solver",
        description="Names one calibration: --cache NAME, --grid NAME or --solver NAME. Besides it, --grid and "
        "--solver name what the run has, as in sample.",
    )
    calibrate.add_argument("--samples", type=int, default=16, help="samples to draw (default: %(default)s)")
    calibrate.add_argument("--batch", type=int, default=4, help="samples at a time (default: %(default)s)")
    calibrate.add_argument("--seed", type=int, default=0, help="seed of the samples")
    calibrate.add_argument("--budget", type=float, help="of scheduled: share of the operations of a run (default: 0.4)")
    calibrate.add_argument("--rounds", type=int, help="of scheduled: exchanges, at most (default: 12)")
    calibrate.add_argument("--rank", type=int, help="of icc: of each factor (default: 32)")
    calibrate.add_argument(
        "--fit", action="append", default=[], metavar="KEY=VALUE", help="a setting of the fit of a grid or a solver"
    )
    calibrate.add_argument("--out", required=True, metavar="FILE", help="for the file=... of the cache, grid or solver")
    calibrate.set_defaults(run=commands.calibrate)

    pareto = added.add_parser(
        "pareto", parents=[*from_weights, prompted], help="measure methods on the same work, side by side"
    )
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
    pareto.add_argument("--turns", type=int, default=3, help="batches that are timed beside it (default: %(default)s)")
    pareto.add_argument("--seed", type=int, default=0, help="seed of the images")
    pareto.add_argument("--budget", type=float, metavar="MINUTES", help="begin no more methods after so long")
    pareto.add_argument("--data", metavar="PATH", help="real images: a folder of them, an .npz, or a data set's files")
    pareto.add_argument(
        "--judge",
        metavar="NAME",
        help="a classifier that difax trained (a run's folder, a file), or module:factory, path/to/file.py:factory",
    )
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
    pareto.set_defaults(run=commands.pareto)

    profile = added.add_parser(
        "profile", parents=[*from_weights, prompted], help="where the seconds of a step go, part by part"
    )
    profile.add_argument("--repeat", type=int, default=1, help="rows of the labels")
    profile.add_argument("--seed", type=int, default=0, help="seed of the samples")
    profile.add_argument("--turns", type=int, default=5, help="of which the median is taken (default: %(default)s)")
    profile.add_argument("--figure", metavar="FILE.png", help="the parts as a picture (needs difax[plot])")
    profile.add_argument("--perfetto", metavar="DIR", help="also JAX's trace of one run, for ui.perfetto.dev")
    profile.add_argument("--json", action="store_true", help="print the parts as JSON")
    profile.set_defaults(run=commands.profile)

    plan = added.add_parser(
        "plan",
        parents=[common, composed, piped],
        help="what a run would take on devices that are not there, compiled for them",
    )
    plan.add_argument(
        "--target", required=True, metavar="CHIP:SHAPE", help="such as v5e:4x4, v6e:2x4, v5p:2x2x2, h200:8 or cpu:8"
    )
    plan.add_argument(
        "--mesh", metavar="AXIS=SIZE,...", help="such as data=2,seq=8, or auto to rank all (default: all along data)"
    )
    plan.add_argument("--batch", type=int, help="samples at once (default: one for each part of the data axis)")
    plan.add_argument(
        "--xla", action="append", default=[], metavar="KEY=VALUE", help="an option of XLA's compiler; may be repeated"
    )
    plan.add_argument(
        "--whole",
        action="store_true",
        help="also the published text encoders and autoencoder around the denoiser; of --pipeline its own, always",
    )
    plan.add_argument("--picture", metavar="FILE.png", help="the memory by what holds it (needs difax[plot])")
    plan.add_argument("--json", action="store_true", help="print the plan as JSON")
    plan.set_defaults(run=commands.plan)

    encode = added.add_parser(
        "encode",
        parents=[common, piped, prompted],
        help="turn prompts into embeddings, as --cond takes them",
    )
    encode.add_argument("--image", metavar="FILE", help="of --pipeline from image to video: its first frame")
    encode.add_argument("--out", required=True, metavar="FILE.safetensors")
    encode.add_argument("--json", action="store_true", help="print what was written as JSON")
    encode.set_defaults(run=commands.encode)

    convert = added.add_parser(
        "convert", parents=[every], help="turn a published safetensors checkpoint into an orbax one"
    )
    convert.add_argument("source", metavar="SRC", help=".safetensors file, its .index.json, or their folder")
    convert.add_argument("target", metavar="DST", help="folder that does not exist yet")
    convert.add_argument("--model", metavar="NAME", help="of `difax list models` (default: by the tensors' names)")
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
    convert.set_defaults(run=commands.convert)

    listing = added.add_parser("list", parents=[every], help="what there is, one line each")
    listing.add_argument("kind", nargs="?", help=f"one of {', '.join(commands.LISTS)}")
    listing.add_argument("--systems", action="store_true", help="published systems: status and composition of each")
    listing.add_argument("--category", help="of --systems: one of them, such as caching")
    listing.add_argument("--status", help="of --systems: exact, variant, adapted, planned or 'not applicable'")
    listing.set_defaults(run=commands.list_names)
    return parser
