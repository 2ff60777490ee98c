"""The flags of difax, whose work `difax.commands` does. A user's mistake is one line on stderr and exit code 2."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from typing import NoReturn

from difax import commands


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
    added = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)

    common = _Parser(add_help=False)
    common.add_argument("--config", metavar="NAME[:ARG]", help="a name of `difax list configs`, or a .py file")
    common.add_argument("--gin_file", action="append", default=[], metavar="FILE", help="gin bindings")
    common.add_argument("--gin_param", action="append", default=[], metavar="BINDING", help="one gin binding")
    common.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=argparse.SUPPRESS)
    common.add_argument("--quiet", action="store_true", help="no progress on stderr")
    common.add_argument("--log", metavar="FILE.jsonl", help="append what happens as lines of JSON")
    common.add_argument("--platform", metavar="NAME", help="cpu, gpu or tpu (default: what JAX finds)")

    opened = _Parser(add_help=False)
    for name in commands.NAMED:
        opened.add_argument(f"--{name}", metavar="NAME", help=f"short for --config.{name}.name=NAME")
    opened.add_argument("--steps", type=int, help="solver steps")
    opened.add_argument("--scale", type=float, help="guidance scale")
    opened.add_argument("--dtype", choices=("float32", "bfloat16"), help="compute dtype of the model")
    opened.add_argument("--layout", metavar="NAME", help="of the weights: stacked, or unstacked (blocks written out)")
    opened.add_argument(
        "--conditioning", metavar="NAME", help="what no image goes into: at each evaluation, or ahead of all of them"
    )
    opened.add_argument("--labels", help="comma-separated labels or class names (default: one of each class)")
    opened.add_argument("--cond", metavar="FILE.safetensors", help="embeddings, for models that take no labels")
    opened.add_argument("--weights", metavar="PATH", help="a training run, a .safetensors file, a published checkpoint")
    opened.add_argument("--random-init", action="store_true", help="random weights, to look at costs only")
    from_weights = [common, opened]

    sample = added.add_parser("sample", parents=from_weights, help="draw images and say what they cost")
    sample.add_argument("--repeat", type=int, default=1, help="rows of the labels, each with other noise")
    sample.add_argument("--seed", type=int, default=0, help="seed of the run: image i depends on it, i and its label")
    sample.add_argument("--latents", metavar="FILE.npz", help="to begin from, as --out FILE.npz writes them")
    sample.add_argument(
        "--out",
        default="samples.png",
        metavar="PATH",
        help="a picture (.png), the numbers (.npz), or a folder of single pictures (default: %(default)s)",
    )
    sample.add_argument(
        "--trace", metavar="FILE.npz", help="what was computed: step, layer, branch, half; the gate's metric"
    )
    sample.add_argument("--json", action="store_true", help="print the table as JSON")
    sample.add_argument("--no-compile-cache", action="store_true", help="compile anew")
    sample.set_defaults(run=commands.sample)

    train = added.add_parser("train", parents=[common], help="train a model")
    train.add_argument("--workdir", required=True, metavar="DIR", help="folder of the run")
    train.add_argument(
        "--data",
        metavar="PATH",
        help="a folder of images (sub-folders are classes), an .npz, or the data set's files",
    )
    train.add_argument("--minutes", type=float, help="stop with a checkpoint after so long")
    train.add_argument("--resume", action="store_true", help="continue the run in DIR")
    train.set_defaults(run=commands.train)

    export = added.add_parser("export", help="write a run's averaged weights as one safetensors file")
    export.add_argument("--workdir", required=True, metavar="DIR", help="folder of the run")
    export.add_argument("--out", required=True, metavar="FILE.safetensors")
    export.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    export.set_defaults(run=commands.export)

    calibrate = added.add_parser(
        "calibrate",
        parents=from_weights,
        help="measure what a cache plans from, fit what it has learned, or search a plan",
    )
    calibrate.add_argument("--samples", type=int, default=16, help="samples to draw (default: %(default)s)")
    calibrate.add_argument("--batch", type=int, default=4, help="samples at a time (default: %(default)s)")
    calibrate.add_argument("--seed", type=int, default=0, help="seed of the samples")
    calibrate.add_argument("--budget", type=float, help="of scheduled: share of the operations of a run (default: 0.4)")
    calibrate.add_argument("--rounds", type=int, help="of scheduled: exchanges, at most (default: 12)")
    calibrate.add_argument("--rank", type=int, help="of icc: of each factor (default: 32)")
    calibrate.add_argument("--out", required=True, metavar="FILE", help="for the cache's file=...")
    calibrate.set_defaults(run=commands.calibrate)

    pareto = added.add_parser("pareto", parents=from_weights, help="measure methods on the same work, side by side")
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
    pareto.set_defaults(run=commands.pareto)

    profile = added.add_parser("profile", parents=from_weights, help="where the seconds of a step go, part by part")
    profile.add_argument("--repeat", type=int, default=1, help="rows of the labels")
    profile.add_argument("--seed", type=int, default=0, help="seed of the samples")
    profile.add_argument("--turns", type=int, default=5, help="of which the median is taken (default: %(default)s)")
    profile.add_argument("--figure", metavar="FILE.png", help="the parts as a picture (needs difax[plot])")
    profile.add_argument("--perfetto", metavar="DIR", help="also JAX's trace of one run, for ui.perfetto.dev")
    profile.add_argument("--json", action="store_true", help="print the parts as JSON")
    profile.set_defaults(run=commands.profile)

    convert = added.add_parser("convert", help="turn a published safetensors checkpoint into an orbax one")
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
    convert.set_defaults(run=commands.convert)

    listing = added.add_parser("list", help="what there is, one line each")
    listing.add_argument("kind", nargs="?", help=f"one of {', '.join(commands.LISTS)}")
    listing.add_argument("--systems", action="store_true", help="published systems, and what difax has of each")
    listing.add_argument("--category", help="of --systems: one of them, such as caching")
    listing.add_argument("--status", help="of --systems: exact, variant, adapted, planned or 'not applicable'")
    listing.set_defaults(run=commands.list_names)
    return parser
