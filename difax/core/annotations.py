"""Values held against annotations: what a user gives a factory is of the type that it says, or refused by name."""

from __future__ import annotations

import collections.abc
import contextlib
import difflib
import functools
import inspect
import math
import os
import types
import typing
from collections.abc import Callable, Collection, Mapping
from typing import Annotated, Any, Literal, ParamSpec, TypeVar

import jax
import numpy as np

INFINITE = "or infinite"
OrInfinite = Annotated[float, INFINITE]  # a number that may be infinite; every other one is finite


class AtMost(int):
    """The largest value of an integer, in an annotation, where it is another than the usual one."""


SEEDS = 2**32 - 1
Seed = Annotated[int, AtMost(SEEDS)]

Given = ParamSpec("Given")
Made = TypeVar("Made")

LARGEST = 2**31 - 1  # of an integer that says nothing else: sizes and counts are indices of 32 bits on the device
LARGEST_FLOAT = float(np.finfo(np.float32).max)
ARRAYS = (np.ndarray, jax.Array)
_SEQUENCES = (collections.abc.Sequence, list, tuple)


def annotations_of(function: Callable[..., Any]) -> dict[str, Any]:
    """The annotations of a function, class or callable object, evaluated; those that cannot be are left out."""
    while isinstance(function, functools.partial):
        function = function.func
    if isinstance(function, type):
        function = function.__init__ if hasattr(function.__init__, "__annotations__") else function
    elif not hasattr(function, "__annotations__"):
        function = type(function).__call__
    function = inspect.unwrap(function)
    names = getattr(function, "__globals__", {})
    found = {}
    for key, annotation in getattr(function, "__annotations__", {}).items():
        try:
            one = types.SimpleNamespace(__annotations__={key: annotation})
            found |= typing.get_type_hints(one, names, include_extras=True)
        except Exception:  # a name that only a type checker sees
            continue
    return found


def choose(kind: str, value: str, allowed: Any) -> str:
    """Returns `value` if it is allowed, else raises ValueError with the list and the nearest match."""
    names = list(allowed)
    if isinstance(value, str) and value in names:
        return value
    near = difflib.get_close_matches(value[:100], names, 1, 0.5) if isinstance(value, str) else []
    hint = f" (did you mean {near[0]}?)" if near else ""
    raise ValueError(f"unknown {kind} {brief(value)}{hint}; allowed: {', '.join(names) or 'none'}")


def check_keys(what: str, function: Callable[..., Any], keys: Collection[str], taken: Collection[str] = ()) -> None:
    """Refuses keys that a factory does not take.

    Args:
      what: the factory, as the message names it. taken: its arguments that are no user's keys.

    Raises:
      ValueError: an unknown key (with the nearest match).
    """
    parameters = inspect.signature(function).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        for key in keys:
            choose(f"key of {what}", key, [p for p in parameters if p not in taken])


def check_arguments(what: str, function: Callable[..., Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by keyword held against a function's annotations; its own defaults always serve.

    Args:
      what: that the message begins with ("cache fora").
      function: a factory; what it does not annotate is not checked.
      values: by keyword, as a user gave them.

    Returns:
      The values: numpy scalars as Python's, an integer as a float and a list as a tuple where that is annotated.

    Raises:
      ValueError: a value of another type; the key, the value and what is allowed.
    """
    parameters, known = inspect.signature(function).parameters, annotations_of(function)
    rest = next((p.name for p in parameters.values() if p.kind is p.VAR_KEYWORD), None)
    checked = {}
    for key, value in values.items():
        parameter = parameters.get(key)
        default = inspect.Parameter.empty if parameter is None else parameter.default
        annotation = known.get(key if parameter is not None else rest or "", Any)
        checked[key] = check_value(f"{what}: {key}", value, annotation, default)
    return checked


def checked(function: Callable[Given, Made]) -> Callable[Given, Made]:
    """A factory whose arguments are held against its annotations (`check_arguments`) at every call, by whatever way.

    What is wrong with a list or a table the factory may say itself, since it knows which of the numbers and why.

    Raises:
      ValueError: a value of another type; the factory, the key, the value and what is allowed.
    """
    signature, what = inspect.signature(function), getattr(function, "__name__", "")

    @functools.wraps(function)
    def held(*args: Given.args, **keys: Given.kwargs) -> Made:
        given = signature.bind(*args, **keys)
        tables = {k: v for k, v in given.arguments.items() if isinstance(v, (list, tuple, Mapping, *ARRAYS))}
        plain = {k: v for k, v in given.arguments.items() if k not in tables}
        given.arguments.update(check_arguments(what, function, plain))
        try:
            given.arguments.update(check_arguments(what, function, tables))
        except ValueError as refused:
            with contextlib.suppress(TypeError, AttributeError, IndexError, KeyError, OverflowError):
                try:
                    function(*given.args, **given.kwargs)
                except ValueError as own:
                    if str(own).startswith(what):
                        raise
            raise refused from None
        return function(*given.args, **given.kwargs)

    return held


def check_value(key: str, value: Any, annotation: Any, default: Any = inspect.Parameter.empty) -> Any:
    """One value held against an annotation.

    An integer serves as a number, not the other way round; a boolean is neither; a text is no sequence; lists and
    tuples are both sequences. NaN is no number, nor is infinity unless the default is infinite or the annotation is
    `OrInfinite`. An integer is at most 2^31 - 1, a seed at most 2^32 - 1.

    Args:
      key: that the message begins with ("config steps").
      annotation: int, float, bool, str, None, `Literal`, unions, sequences, mappings, arrays, callables and classes;
        others, `Any` among them, take everything.
      default: which serves whatever the annotation is.

    Returns:
      The value, as `check_arguments` returns it.

    Raises:
      ValueError: with the key, the value and what is allowed.
    """
    if value is default or (type(value) is type(default) and type(value) in _PLAIN and value == default):
        return value
    infinite = isinstance(default, float) and math.isinf(default)
    fits, found = _fit(value, annotation, LARGEST, infinite)
    if not fits:
        raise ValueError(f"{key}={brief(value)}; allowed: {in_words(annotation, infinite)}{_hint(value, annotation)}")
    return found


_PLAIN = (int, float, str, bool, type(None))


def brief(value: Any) -> str:
    """A value as a message shows it: its repr, cut where it is long."""
    try:
        text = repr(value)
    except Exception as error:  # an integer of more digits than Python prints
        return f"<{type(value).__name__}: {type(error).__name__}>"
    text = " ".join(text.split())
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters)"


def in_words(annotation: Any, infinite: bool = False) -> str:
    """What an annotation allows, in words: "an integer, or none"."""
    return _words(annotation, infinite, 1)


def _words(annotation: Any, infinite: bool, how_many: int) -> str:
    origin, of = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return _words(of[0], infinite or INFINITE in of[1:], how_many)
    if annotation in (None, type(None)):
        return "none"
    if origin in (typing.Union, types.UnionType):
        members = sorted(of, key=lambda a: a is type(None))
        if float in members and int in members:
            members.remove(int)
        if {str, os.PathLike} <= set(members):
            members = [os.PathLike, *(m for m in members if m not in (str, os.PathLike))]
        return ", or ".join(_words(a, infinite, how_many) for a in members)
    if origin is Literal:
        return ", ".join(map(str, of))
    plain = {
        int: ("an integer", "integers"),
        float: ("a number, or inf", "numbers, or inf") if infinite else ("a number", "numbers"),
        bool: ("true or false", "true or false"),
        str: ("a text", "texts"),
        np.ndarray: ("an array", "arrays"),
        jax.Array: ("an array", "arrays"),
        os.PathLike: ("a path", "paths"),
        type: ("a type", "types"),
        Any: ("anything", "anything"),
    }
    base = origin or annotation
    if base in plain:
        return plain[base][how_many != 1]
    if base in _SEQUENCES:
        if base is tuple and of and of[-1] is not Ellipsis:
            kinds = dict.fromkeys(_words(a, infinite, 2) for a in of)
            each = next(iter(kinds)) if len(kinds) == 1 else f"values ({', '.join(_words(a, infinite, 1) for a in of)})"
            return f"{'a list' if how_many == 1 else 'lists'} of {len(of)} {each}"
        return f"{'a list' if how_many == 1 else 'lists'} of {_words(of[0], infinite, 2) if of else 'anything'}"
    if base in (collections.abc.Mapping, dict, collections.abc.MutableMapping):
        inner = _words(of[1], infinite, 2) if of else "anything"
        return f"{'a mapping' if how_many == 1 else 'mappings'} of names to {inner}"
    if base is collections.abc.Callable:
        return "a function" if how_many == 1 else "functions"
    name = getattr(base, "__name__", str(base))
    return f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}" if how_many == 1 else f"{name}s"


def _hint(value: Any, annotation: Any) -> str:
    """What else to say of a number that nearly serves."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return ""
    if isinstance(value, float) and value.is_integer() and _fit(int(value), annotation, LARGEST, False)[0]:
        return f" ({int(value)}, without a fraction, would be one)"
    if _fit(1, annotation, LARGEST, False)[0] and not _fit(0.5, annotation, LARGEST, False)[0]:
        most = next((most for most in (SEEDS, LARGEST) if _fit(most, annotation, LARGEST, False)[0]), LARGEST)
        return f"; at most {most}" if isinstance(value, int) and abs(value) > most else ""
    return f"; at most {LARGEST_FLOAT:.4g}" if abs(value) > LARGEST_FLOAT and value not in (math.inf, -math.inf) else ""


def _fit(value: Any, annotation: Any, most: int, infinite: bool) -> tuple[bool, Any]:
    """Does a value serve, and the value that serves."""
    origin, of = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        most = next((a for a in of[1:] if isinstance(a, AtMost)), most)
        return _fit(value, of[0], most, infinite or INFINITE in of[1:])
    raw, value = value, value.item() if isinstance(value, np.generic) else value
    if annotation in (None, type(None)):
        return value is None, value
    if origin in (typing.Union, types.UnionType):
        for member in of:
            fits, found = _fit(value, member, most, infinite)
            if fits:
                return True, found
        return False, value
    if origin is Literal:
        return any(isinstance(value, type(a)) and value == a for a in of), value
    if annotation is bool:
        return isinstance(value, bool), value
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool) and -most - 1 <= value <= most, value
    if annotation is float:
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            return False, value
        if value in (math.inf, -math.inf):
            return infinite, value
        if not -LARGEST_FLOAT <= value <= LARGEST_FLOAT:
            return False, value
        return True, float(value)
    base = origin or annotation
    if base in _SEQUENCES:
        return _fit_sequence(value, base, of, most, infinite)
    if base in (collections.abc.Mapping, dict, collections.abc.MutableMapping):
        return _fit_mapping(value, of, most, infinite)
    if base in ARRAYS:
        return isinstance(value, ARRAYS), value
    if base is collections.abc.Callable:
        return callable(value), value
    if isinstance(base, type):
        if isinstance(value, str) and hasattr(base, "__fspath__"):  # as a configuration names one
            return True, value
        try:
            return isinstance(raw, base) or isinstance(value, base), value
        except TypeError:  # a protocol that cannot be asked
            return True, value
    return True, value


def _fit_sequence(value: Any, base: Any, of: tuple[Any, ...], most: int, infinite: bool) -> tuple[bool, Any]:
    if isinstance(value, ARRAYS) and value.ndim > 0:
        whole: Any = value.tolist()
    elif isinstance(value, (list, tuple)) or (
        isinstance(value, collections.abc.Sequence) and not isinstance(value, (str, bytes, bytearray))
    ):
        whole = list(value)
    else:
        return False, value
    each = (of[0],) * len(whole) if base is not tuple or (of and of[-1] is Ellipsis) else of
    if not of:
        each = (Any,) * len(whole)
    if len(each) != len(whole):
        return False, value
    found = [_fit(part, kind, most, infinite) for part, kind in zip(whole, each, strict=True)]
    if not all(fits for fits, _ in found):
        return False, value
    parts = [part for _, part in found]
    return True, parts if base is not tuple and isinstance(value, list) else tuple(parts)


def _fit_mapping(value: Any, of: tuple[Any, ...], most: int, infinite: bool) -> tuple[bool, Any]:
    if not isinstance(value, Mapping):
        return False, value
    if not of:
        return True, value
    found = {}
    for key, part in value.items():
        known, _ = _fit(key, of[0], most, infinite)
        fits, found[key] = _fit(part, of[1], most, infinite)
        if not known or not fits:
            return False, value
    return True, found
