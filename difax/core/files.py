"""Files that appear whole or not at all, rows that are appended line by line, and texts that came out of files."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any


class FromData(str):
    """A name that was read from a file of data: it never loads code."""


def from_data(value: Any) -> Any:
    """A configuration that was read from a file of data, with every text marked as such."""
    if isinstance(value, Mapping):
        return {key: from_data(part) for key, part in value.items()}
    if isinstance(value, list):
        return [from_data(part) for part in value]
    return FromData(value) if isinstance(value, str) else value


def read_json(path: str | os.PathLike) -> Any:
    """What a JSON file of data holds, whose texts are marked as such."""
    return from_data(json.loads(pathlib.Path(path).read_text()))


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Gives a name beside `path` to write to, which is renamed to `path` at the end, or removed after an error.

    Raises:
      ValueError: the file cannot be written.
    """
    path = pathlib.Path(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield aside
        os.replace(aside, path)
    except OSError as error:
        raise ValueError(f"{path}: cannot be written ({error.strerror or error})") from None
    finally:
        aside.unlink(missing_ok=True)


def read_rows(path: pathlib.Path) -> list[dict[str, Any]]:
    """Rows of a JSON-lines file; [] where there is none, and without a last line that was cut off."""
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
        with replacing(path) as aside:
            pathlib.Path(aside).write_text("".join(lines))
    return [from_data(json.loads(text)) for text in lines]


def is_alive(pid: int) -> bool:
    """Whether a process of this machine runs, whoever's it is."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True
