"""Bounded readers of texts and JSON, which may be damaged or hostile, and where a file may be written.

A reader takes regular files alone (a pipe would be waited for), looks at sizes before it reads, and refuses what is
damaged by a ValueError that names the file, what is wrong and where, and what is allowed.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import pathlib
import stat
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

from difax.core.writing import EXHAUSTED

TEXT = 64 * 2**20  # bytes of a text
VALUES = 2**22  # values of a JSON text, which take some hundred bytes each
DEPTH = 64  # of a JSON text
NAME = 255  # bytes of a file's name


class FromData(str):
    """A name that was read from a file of data: it never loads code."""

    __slots__ = ()


def from_data(value: Any) -> Any:
    """A configuration that was read from a file of data, with every text marked as such."""
    if isinstance(value, Mapping):
        return {key: from_data(part) for key, part in value.items()}
    if isinstance(value, list):
        return [from_data(part) for part in value]
    return FromData(value) if isinstance(value, str) else value


# ---- opening -----------------------------------------------------------------------------------------------


def named(path: str | os.PathLike) -> str:
    """A path as a message shows it: quoted where it holds what is not printed, such as a line's end."""
    text = os.fspath(path)
    return text if text and text.isprintable() else repr(text)


def why(error: BaseException) -> str:
    """An error of a library in a few words, on one line."""
    text = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
    return " ".join(text.split())[:160]


def place_of(path: str | os.PathLike) -> str | None:
    """What lies at a path: "file", "folder", "other" (a pipe, a device), or None for nothing.

    Raises:
      ValueError: it cannot be looked at (names the path), such as a name of 300 letters or a link to itself.
    """
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise ValueError(f"{named(path)}: cannot be read ({why(error)})") from None
    return "file" if stat.S_ISREG(mode) else "folder" if stat.S_ISDIR(mode) else "other"


@contextlib.contextmanager
def opened(path: str | os.PathLike, allowed: str = "a file", limit: int | None = None) -> Iterator[BinaryIO]:
    """A regular file to read from; what the system then refuses is a ValueError that names it.

    Args:
      allowed: what the file should be, in words. limit: bytes that it may have; None is any number.

    Raises:
      ValueError: nothing there, no regular file, one that is too large, or one that cannot be read.
    """
    place = place_of(path)
    if place != "file":
        found = {None: "no such file", "folder": "a folder"}.get(place, "no regular file")
        raise ValueError(f"{named(path)}: {found}; allowed: {allowed}")
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if limit is not None and size > limit:
                raise ValueError(f"{named(path)}: {size:,} bytes; allowed: {allowed} of at most {limit:,} bytes")
            yield file
    except OSError as error:
        raise ValueError(f"{named(path)}: cannot be read ({why(error)}); allowed: {allowed}") from None


def listed(path: str | os.PathLike) -> list[pathlib.Path]:
    """What lies in a folder, by name; ValueError where it cannot be listed."""
    try:
        return sorted(pathlib.Path(path).iterdir())
    except OSError as error:
        raise ValueError(
            f"{named(path)}: cannot be listed ({why(error)}); allowed: a folder that can be read"
        ) from None


# ---- texts -------------------------------------------------------------------------------------------------


def read_text(path: str | os.PathLike, allowed: str = "a text file", limit: int = TEXT) -> str:
    """A whole text in UTF-8, with or without a byte order mark.

    Args:
      allowed: what the file should be, in words. limit: bytes that it may have.

    Raises:
      ValueError: as `opened`, or bytes that are no text (names the first one).
    """
    with opened(path, allowed, limit) as file:
        raw = file.read(limit + 1)
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{named(path)}: byte {error.start} is no UTF-8 text; allowed: {allowed}") from None
    if "\0" in text:
        raise ValueError(f"{named(path)}: byte {raw.index(0)} is zero, as in no text; allowed: {allowed}")
    return text


def parse_json(text: str, where: str, allowed: str = "JSON", finite: bool = True) -> Any:
    """What a JSON text says, of bounded size and depth, with every text marked as read from data.

    A key that an object has twice is refused, and so are whole numbers beyond 64 bits.

    Args:
      where: of the text, which begins the message. allowed: what it should be, in words.
      finite: refuse NaN and infinities, which JSON itself does not have but Python writes.

    Raises:
      ValueError: it is something else (says where).
    """
    if sum(map(text.count, ",[{")) > VALUES:
        raise ValueError(f"{where}: more than {VALUES:,} values; allowed: {allowed} of fewer")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))
            raise ValueError(f"the key {twice[:80]!r} stands twice in one object")
        return found

    def whole(digits: str) -> int:
        if len(digits) > 20:
            raise ValueError(f"a whole number of {len(digits)} digits")
        return int(digits)

    try:
        return _marked(json.loads(text, object_pairs_hook=unique, parse_int=whole), "", finite, 0)
    except json.JSONDecodeError as error:
        fault = f"line {error.lineno}, column {error.colno}: {error.msg}" if text.strip() else "empty"
    except RecursionError:
        fault = f"nested deeper than {DEPTH}"
    except ValueError as error:
        fault = why(error)
    raise ValueError(f"{where}: {fault}; allowed: {allowed}")


def _marked(value: Any, key: str, finite: bool, depth: int) -> Any:
    if depth >= DEPTH and isinstance(value, (dict, list)):
        raise RecursionError
    if isinstance(value, dict):
        return {k: _marked(part, f"{key}.{k}" if key else k, finite, depth + 1) for k, part in value.items()}
    if isinstance(value, list):
        return [_marked(part, key, finite, depth + 1) for part in value]
    if isinstance(value, str):
        return FromData(value)
    if type(value) is float and finite and not math.isfinite(value):
        raise ValueError(f"{key[:160] or 'the number'} is {value}, no finite number")
    if type(value) is int and not -(2**63) <= value < 2**64:
        raise ValueError(f"{key[:160] or 'the number'} is a whole number beyond 64 bits")
    return value


def read_json(path: str | os.PathLike, allowed: str = "a JSON file", finite: bool = True) -> Any:
    """What a JSON file of data holds, whose texts are marked as such.

    Args:
      allowed, finite: as in `parse_json`.

    Raises:
      ValueError: as `read_text` and `parse_json`.
    """
    return parse_json(read_text(path, allowed), named(path), allowed, finite)


def read_object(path: str | os.PathLike, allowed: str = "a JSON object", finite: bool = True, **kinds: Any) -> Any:
    """A JSON file that holds one object, with some keys of known kinds.

    Args:
      allowed, finite: as in `parse_json`. kinds: as in `check_object`.

    Raises:
      ValueError: as `read_json` and `check_object`.
    """
    return check_object(read_json(path, allowed, finite), named(path), **kinds)


def read_rows(path: str | os.PathLike, **kinds: Any) -> list[dict[str, Any]]:
    """Rows of a JSON-lines file; [] where there is none, and without a last line that was cut off, which
    stays where it is (`drop_cut_line`).

    Args:
      kinds: of the keys of every row, as in `check_object`.

    Raises:
      ValueError: a line that is no such row (names it), or as `read_text`.
    """
    if place_of(path) is None:
        return []
    allowed = "a line of JSON for each row"
    with opened(path, allowed, TEXT) as file:
        raw = file.read(TEXT + 1)
    whole = raw[: raw.rfind(b"\n") + 1]  # a line that is cut may end within a letter
    if sum(map(whole.count, (b",", b"[", b"{"))) > VALUES:
        raise ValueError(f"{named(path)}: more than {VALUES:,} values; allowed: {allowed} of fewer")
    rows = []
    for number, line in enumerate(whole.split(b"\n")[:-1], 1):
        where = f"{named(path)}: line {number}"
        try:
            text = line.decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{where}: its byte {error.start} is no UTF-8 text; allowed: {allowed}") from None
        row = parse_json(text, where, f"{allowed}; without this line the others can be read")
        rows.append(check_object(row, where, **kinds))
    return rows


WORDS = {dict: "an object", list: "a list", str: "a text", int: "a whole number", float: "a number", type(None): "null"}


def check_object(value: Any, where: str, **kinds: type | tuple[type, ...]) -> dict[str, Any]:
    """A value as a dictionary that has what `kinds` asks for; other keys may be there.

    Args:
      where: begins the message. kinds: {key: the types of its value}; a type of None is a key that may be absent. A
        whole number is a number too, and true and false are neither.

    Raises:
      ValueError: another type, or a key that is missing or of another type.
    """
    if not isinstance(value, dict):
        raise ValueError(f"{where}: {_kind(value)}; allowed: an object{_having(kinds)}")
    for key, types in kinds.items():
        allowed = types if isinstance(types, tuple) else (types,)
        if key not in value and not isinstance(None, types):
            raise ValueError(f"{where}: no {key!r}; allowed: an object{_having(kinds)}")
        given = value.get(key)
        fits = isinstance(given, types) or (float in allowed and isinstance(given, int))
        if not fits or (isinstance(given, bool) and bool not in allowed):
            words = " or ".join(WORDS.get(t, t.__name__) for t in allowed)
            raise ValueError(f"{where}: {key!r} is {_kind(given)}; allowed: {words}")
    return value


def _kind(value: Any) -> str:
    if isinstance(value, (bool, int, float)):
        return str(value)
    return f"{value[:80]!r}" if isinstance(value, str) else WORDS.get(type(value), type(value).__name__)


def _having(kinds: Mapping[str, Any]) -> str:
    needed = [key for key, types in kinds.items() if not isinstance(None, types)]
    return f" with {', '.join(needed)}" if needed else ""


# ---- writing -----------------------------------------------------------------------------------------------


def writable(
    path: str | os.PathLike, suffixes: tuple[str, ...], flag: str = "--out", made: str | os.PathLike | None = None
) -> pathlib.Path:
    """Checks before any work that a file, or a folder, can be written there; returns its path.

    Args:
      suffixes: that the name may end in; "" allows a folder that is not there yet or is empty. made: a folder that the
        command makes, with all above it.

    Raises:
      ValueError: another suffix, a name that is too long, something there that is not replaced, or a folder above that
        is missing, none, or not writable.
    """
    text = os.fspath(path)
    target = pathlib.Path(text)
    refused = lambda fault: ValueError(f"{flag} {named(text)}: {fault}")  # noqa: E731
    named_so = bool(text.strip()) and "\0" not in text and target.suffix in suffixes
    if not named_so or target.name in filter(None, suffixes) or (target.suffix and text.endswith("/")):
        ends = " or ".join(s for s in suffixes if s)
        more = ", or a folder's, without a suffix" if "" in suffixes else ""
        raise refused(f"allowed: a name that ends in {ends}{more}" if ends else "allowed: a folder's name")
    _check_name(text, flag)
    place = place_of(target)
    if place is None and os.path.islink(target):
        raise refused("that is a link to nothing")
    if target.suffix:
        if place in ("folder", "other"):
            raise refused("that is a folder" if place == "folder" else "that is no regular file")
    elif place is not None and (place != "folder" or listed(target)):
        raise refused("exists and is not an empty folder")
    above = place_of(target.parent)
    if above is None:
        folder = None if made is None else pathlib.Path(made).absolute()
        if folder is None or target.parent.absolute() not in (folder, *folder.parents):
            raise refused(f"the folder {named(target.parent)} does not exist")
    elif above != "folder":
        raise refused(f"{named(target.parent)} is no folder")
    elif not _takes_files(target.parent):
        raise refused(f"the folder {named(target.parent)} is not writable")
    return target


def makeable(path: str | os.PathLike, flag: str = "--out") -> pathlib.Path:
    """Checks before any work that files can be written into a folder, which is there or can be made; returns its path.

    Raises:
      ValueError: no name, something that is no folder there or above, or a folder that is not writable.
    """
    text = os.fspath(path)
    _check_name(text, flag)
    target = pathlib.Path(text)
    there = next(p for p in (target.absolute(), *target.absolute().parents) if place_of(p) or os.path.islink(p))
    if place_of(there) != "folder":
        raise ValueError(f"{flag} {named(text)}: {named(there)} is no folder")
    if not _takes_files(there):
        raise ValueError(f"{flag} {named(text)}: the folder {named(there)} is not writable")
    return target


def _check_name(text: str, flag: str) -> None:
    """Refuses what no file or folder can be named, and bytes that are no text, which libraries do not take."""
    fault = None
    if not text.strip() or "\0" in text:
        fault = "allowed: a name"
    elif (length := max(map(len, os.fsencode(text).split(b"/")))) > NAME:
        fault = f"a name of {length} bytes; allowed: up to {NAME}"
    elif any("\ud800" <= c <= "\udfff" for c in text):
        fault = "a name that is no UTF-8 text; allowed: one that is"
    if fault:
        raise ValueError(f"{flag} {named(text[:300])}: {fault}")


def _takes_files(folder: str | os.PathLike) -> bool:
    """Whether a file can be made in a folder: that of a nameless one is tried, since permissions do not tell of all
    (/proc, a full table of files)."""
    if not os.access(folder, os.W_OK | os.X_OK):
        return False
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError as error:
        return error.errno in EXHAUSTED  # told when it is written, as a lack of room
