"""API.md: the public API of difax, from its own signatures and docstrings.

  python -m experiments.api_page            writes API.md; a test holds it against the code

Everything in `difax.__all__`, the methods of Run and Result, the fields of the contracts, and for every name of
`difax list` its arguments with their defaults and the first sentence of what it says of itself.
"""

from __future__ import annotations

import inspect
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any, ForwardRef

import difax
from difax.registry import REGISTRIES

PAGE = pathlib.Path(__file__).resolve().parent.parent / "API.md"
FUNCTIONS, CLASSES = ("load", "train"), ("Run", "Result")
TITLES = {
    "model": "Models",
    "process": "Processes",
    "solver": "Solvers",
    "grid": "Time grids",
    "guide": "Guidance",
    "cache": "Caches",
    "attend": "Attention",
    "quant": "Quantisation",
    "loss": "Losses",
    "data": "Data sets",
}


def signature(function: Callable[..., Any], hidden: tuple[str, ...] = ("self",), types: bool = True) -> str:
    """The arguments of a function in parentheses, with their types and defaults as they are written."""
    written, star = [], False
    for name, parameter in inspect.signature(function).parameters.items():
        if name in hidden:
            continue
        stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        star = star or stars == "*"
        if parameter.kind is parameter.KEYWORD_ONLY and not star:
            written.append("*")
            star = True
        annotation = parameter.annotation if types and parameter.annotation is not parameter.empty else None
        text = f"{stars}{name}" + (f": {_annotation(annotation)}" if annotation is not None else "")
        if parameter.default is not parameter.empty:
            default = "..." if callable(parameter.default) else repr(parameter.default)
            text += f" = {default}" if annotation is not None else f"={default}"
        written.append(text)
    return f"({', '.join(written)})"


def _annotation(annotation: Any) -> str:
    if isinstance(annotation, ForwardRef):
        annotation = annotation.__forward_arg__
    return annotation if isinstance(annotation, str) else getattr(annotation, "__name__", str(annotation))


def sentence(thing: Any) -> str:
    """The first sentence of what a thing says of itself."""
    paragraph = " ".join((inspect.getdoc(thing) or "").split("\n\n")[0].split())
    return re.split(r"(?<=[.;])\s", paragraph, maxsplit=1)[0].rstrip(";.")


def _entry(title: str, thing: Any, level: int = 3) -> list[str]:
    return [f"{'#' * level} `{title}`", "", "```text", inspect.getdoc(thing) or "", "```", ""]


def _members(kind: type) -> Iterator[tuple[str, Any]]:
    """Public methods and properties that a class itself defines, in their order."""
    for name, member in vars(kind).items():
        written = inspect.unwrap(getattr(member, "fget", member))
        home = getattr(written, "__module__", "") or ""
        if not name.startswith("_") and inspect.isfunction(written) and home.startswith("difax"):
            yield name, member


def page() -> str:
    """API.md."""
    lines = [
        "# The public API of difax",
        "",
        "Written by `python -m experiments.api_page` from the signatures and docstrings. "
        "[README.md](README.md) has the examples, [ARCHITECTURE.md](ARCHITECTURE.md) how the parts meet, "
        "[CONTRIBUTING.md](CONTRIBUTING.md) how to add one.",
        "",
        "## The front door",
        "",
    ]
    for name in FUNCTIONS:
        function = getattr(difax, name)
        lines += _entry(f"difax.{name}{signature(function)}", function)
    for name in CLASSES:
        kind = getattr(difax, name)
        lines += _entry(f"difax.{name}", kind)
        for member, value in _members(kind):
            call = "" if isinstance(value, property) else signature(value)
            lines += _entry(f"{name}.{member}{call}", value, 4)
    lines += ["## Contracts", "", "A technique is a factory that returns one of these tuples of pure functions.", ""]
    for name in difax.__all__:
        if name in (*FUNCTIONS, *CLASSES):
            continue
        kind = getattr(difax, name)
        lines += _entry(f"difax.{name}", kind)
        lines += [f"- `{field}: {_annotation(of)}`" for field, of in kind.__annotations__.items()]
        for member, value in _members(kind):
            if member not in kind.__annotations__:
                call = "" if isinstance(value, property) else signature(value)
                lines += [f"- `{member}{call}`: {sentence(value)}."]
        lines += [""]
    lines += ["## What configurations and commands name", "", "The first argument of a quantisation is its model.", ""]
    for kind, entries in REGISTRIES.items():
        lines += [f"### {TITLES[kind]}", ""]
        for name, function in entries.items():
            lines += [f"- `{name}{signature(function, types=False)}`: {sentence(function)}."]
        lines += [""]
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(page())
    print(f"{PAGE}: {len(page().splitlines())} lines")
