"""Names and what they stand for: the registries, and factories of one's own by `module:name` or `path/to/file.py:name`.

Code is loaded for a name that the user wrote, in a command, a configuration or Python, and for no other: names that
come out of a file of data (a checkpoint, the folder of a run, a sweep or a calibration) are marked
(`difax.core.files.from_data`), and then stand for entries of the registries alone.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import os
import pathlib
import sys
from collections.abc import Callable, Collection, Mapping
from typing import Any

from difax.accel.attention import ATTENTIONS
from difax.accel.caches import CACHES, NETWORKS
from difax.accel.quant import QUANTS
from difax.accel.solvers import SOLVERS
from difax.core.annotations import brief, check_arguments, check_keys
from difax.core.annotations import choose as choose
from difax.core.contracts import Accelerator, Attention, Classifier, Guide, Model, Solver
from difax.core.files import FromData, named, place_of
from difax.core.grids import GRIDS
from difax.core.guidance import GUIDES
from difax.core.langevin import AUGMENTED
from difax.core.process import PROCESSES, Process
from difax.core.qtensor import Quantisation
from difax.core.trunk import neutral
from difax.models import MODELS
from difax.training.data import DATASETS, Images
from difax.training.losses import LOSSES

ACCELERATORS: dict[str, Callable[..., Accelerator]] = {"none": neutral, **CACHES, **NETWORKS}

REGISTRIES: dict[str, Mapping[str, Callable[..., Any]]] = {
    "model": MODELS,
    "process": {**PROCESSES, **AUGMENTED},
    "solver": SOLVERS,
    "grid": GRIDS,
    "guide": GUIDES,
    "cache": ACCELERATORS,
    "attend": ATTENTIONS,
    "quant": QUANTS,
    "loss": LOSSES,
    "data": DATASETS,
}

# what a factory of a kind returns; the kinds that are not here return functions, or a list of rules (quant)
RESULTS: dict[str, tuple[type, ...]] = {
    "model": (Model, Classifier),
    "process": (Process,),
    "solver": (Solver,),
    "guide": (Guide,),
    "cache": (Accelerator,),
    "attend": (Attention,),
    "quant": (list, tuple),
    "data": (Images,),
}


def is_outside(name: Any) -> bool:
    """Whether a name is of code outside of difax: `module:name` or `path/to/file.py:name`."""
    return isinstance(name, str) and ":" in name


def check_name(kind: str, name: Any, known: Mapping[str, Any] | None = None) -> None:
    """Refuses a name that is in no registry and of no code outside; loads nothing.

    Args:
      kind: of `REGISTRIES`, or any word where `known` is given.

    Raises:
      ValueError: an unknown name (with the nearest match), or one of code outside that came from a file of data.
    """
    if not isinstance(name, str):
        return
    if not is_outside(name):
        choose(kind, name, REGISTRIES[kind] if known is None else known)
    elif isinstance(name, FromData):
        raise ValueError(
            f"{kind} {name}: that name comes from a file of data, for which no code is loaded; allowed: a name of "
            f"difax list, or write it yourself ({kind}.name={name} in the command or in a configuration)"
        )


def factory(kind: str, name: Any, known: Mapping[str, Callable[..., Any]] | None = None) -> Callable[..., Any]:
    """The factory that a name stands for, an entry of a registry or code outside, or a function as it is.

    Raises:
      ValueError: as `check_name`; code outside that is not there, fails or holds no such function.
    """
    check_name(kind, name, known)
    if callable(name):
        return name
    if not isinstance(name, str):
        raise ValueError(
            f"{kind}: name={brief(name)} is {_article(type(name).__name__)}; allowed: a name, or a factory"
        )
    if is_outside(name):
        return load_outside(kind, name)
    return (REGISTRIES[kind] if known is None else known)[name]


def load_outside(kind: str, name: str) -> Callable[..., Any]:
    """The function `attribute` of `module:attribute`, or of the file `path/to/file.py:attribute`; runs that code.

    A file is run once in a process; its path is relative to the current folder.

    Raises:
      ValueError: no such file, module or attribute, or code that fails.
    """
    where, _, attribute = name.rpartition(":")
    what = f"{kind} {name}"
    if not where or not attribute.isidentifier():
        raise ValueError(f"{what}: allowed: package.module:factory or path/to/file.py:factory")
    try:
        module = _run_file(where, what) if where.endswith(".py") else importlib.import_module(where)
    except (ValueError, KeyboardInterrupt):
        raise
    except BaseException as error:
        raise ValueError(f"{what}: {type(error).__name__}: {error}") from error
    if not hasattr(module, attribute):
        public = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        choose(f"function of {where}", attribute, public)
    found = getattr(module, attribute)
    if not callable(found):
        raise ValueError(f"{what} is {_article(type(found).__name__)}; allowed: a function that makes one")
    return found


def _run_file(where: str, what: str) -> Any:
    if place_of(where) != "file":
        raise ValueError(f"{what}: no such file: {named(where)}")
    path = pathlib.Path(where).resolve()
    name = f"difax_outside_{path.stem}_{hashlib.sha256(os.fsencode(path)).hexdigest()[:8]}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def make(kind: str, section: Mapping[str, Any], *args: Any, **more: Any) -> Any:
    """Calls the factory that `section["name"]` names with the section's other keys.

    Args:
      kind: a key of `REGISTRIES`.
      section: {"name": ..., **hyperparameters}; the name of an entry of the registry or of code outside (`factory`),
        a factory, or, alone, what a factory has returned.
      args, more: passed on before and besides the section's own keys.

    Raises:
      ValueError: unknown name or key (with the nearest match), a value that is not of the type that the factory
        annotates, whatever the factory refuses, or a result that is not of the kind.
    """
    if not isinstance(section, Mapping):
        raise ValueError(
            f"config section {kind}={brief(section)}; allowed: a name with its keys, such as {{'name': ...}}"
        )
    keys = dict(section)
    if "name" not in keys:
        raise ValueError(f"{kind}: the name is missing; allowed: {', '.join(REGISTRIES[kind])}")
    name = keys.pop("name")
    if isinstance(name, RESULTS.get(kind, ())) and not isinstance(name, str):
        if keys:
            raise ValueError(f"{kind} {shown(name)} is made already; allowed: no keys, not {', '.join(keys)}")
        if kind == "quant":
            _check_rules("given", name)
        return name
    function, name, keys = resolved(kind, {"name": name, **keys}, len(args), more)
    try:
        made = function(*args, **keys, **more)
    except TypeError as error:
        raise ValueError(f"{kind} {name}: {error}") from None
    except (ValueError, NotImplementedError, OSError, MemoryError, KeyboardInterrupt):
        raise
    except BaseException as error:  # code of a user's own may raise anything, or leave
        if function in REGISTRIES[kind].values():
            raise
        raise ValueError(f"{kind} {name}: {type(error).__name__}: {error}") from error
    if kind == "quant":
        _check_rules(name, made)
    if kind in RESULTS and not isinstance(made, RESULTS[kind]):
        allowed = " or ".join(f"a {t.__name__}" for t in RESULTS[kind])
        raise ValueError(f"{kind} {name} made {_article(type(made).__name__)}; allowed: {allowed}")
    return made


def resolved(
    kind: str, section: Mapping[str, Any], before: int = 0, more: Collection[str] = ()
) -> tuple[Callable[..., Any], str, dict[str, Any]]:
    """The factory that a section names, its name as text, and the section's other keys, held against its annotations.

    Args:
      before: how many arguments of the factory are given by position. more: names of others that are no user's keys.

    Raises:
      ValueError: as `make`, but for what the factory itself refuses; nothing is made.
    """
    keys = {key: value for key, value in section.items() if key != "name"}
    function, name = factory(kind, section["name"]), shown(section["name"])
    try:
        parameters = inspect.signature(function).parameters
    except ValueError:  # a type of C that has none
        raise ValueError(f"{kind} {name} has no signature; allowed: a function that makes one") from None
    check_keys(f"{kind} {name}", function, keys, [*list(parameters)[:before], *more])
    return function, name, check_arguments(f"{kind} {name}", function, keys)


def _check_rules(name: str, rules: Any) -> None:
    for rule in rules if isinstance(rules, (list, tuple)) else (rules,):
        pair = isinstance(rule, (list, tuple)) and len(rule) == 2 and isinstance(rule[0], str)
        if not pair or not isinstance(rule[1], (Quantisation, type(None))):
            raise ValueError(f"quant {name} made {rule!r}; allowed: pairs of a pattern and a Quantisation or None")


def shown(name: Any) -> str:
    """A section's name as text: itself, or that of a factory or of what it made."""
    if isinstance(name, str):
        return str(name)
    return str(getattr(name, "name", None) or getattr(name, "__name__", None) or type(name).__name__)


def _article(word: str) -> str:
    return f"{'an' if word[0] in 'aeiouAEIOU' else 'a'} {word}"
