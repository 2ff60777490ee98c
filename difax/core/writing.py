"""Files and folders that appear whole or not at all, and lines that are appended."""

from __future__ import annotations

import contextlib
import errno
import os
import pathlib
import platform
import re
import shutil
from collections.abc import Iterator

from difax.core.lock import alive
from difax.core.shell import undone

# of a machine or a process that has no more of something, which no other request would change
EXHAUSTED = {
    getattr(errno, name)
    for name in ("ENOSPC", "EDQUOT", "EFBIG", "EIO", "ENOMEM", "EMFILE", "ENFILE", "EAGAIN")
    if hasattr(errno, name)
}


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Gives a name beside `path` to write a file or a folder to, which is renamed to `path` at the end.

    Raises:
      ValueError: it cannot be written there (`unwritable`).
    """
    with beside(path) as aside:
        yield aside
        os.replace(aside, path)


@contextlib.contextmanager
def beside(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Gives a hidden name beside `path` for a file or a folder, which is removed after the block, an error or a signal;
    what killed processes left in that folder goes first.

    Raises:
      ValueError: it cannot be written there (`unwritable`).
    """
    path = pathlib.Path(path)
    remove_left(path.parent)
    end = f".{_HOST}.{os.getpid()}.part"
    aside = path.with_name(f".{_shortened(path.name, 254 - len(end))}{end}")
    with undone(remove, aside):
        with writing(path):
            remove(aside)
            yield aside


class NoRoom(OSError, ValueError):
    """A file that cannot be written since the machine has no more room for it (`EXHAUSTED`)."""

    def __str__(self) -> str:
        return str(self.strerror)


def unwritable(path: str | os.PathLike, error: OSError) -> Exception:
    """What is raised where a file cannot be written: a ValueError, which is a `NoRoom` where only room is missing."""
    text = f"cannot write {path}: {error.strerror or error}"
    return NoRoom(error.errno, text) if error.errno in EXHAUSTED else ValueError(text)


@contextlib.contextmanager
def writing(path: str | os.PathLike) -> Iterator[None]:
    """Says of what the system refuses in the block that `path` cannot be written, also where a library that is not of
    Python tells it in its own words.

    Raises:
      ValueError: as `unwritable`.
    """
    try:
        yield
    except NoRoom:
        raise
    except Exception as error:
        number = _OS_ERROR.search(str(error))
        if isinstance(error, OSError):
            raise unwritable(path, error) from None
        if number is None:
            raise
        raise unwritable(path, OSError(int(number[1]), os.strerror(int(number[1])))) from None


_OS_ERROR = re.compile(r"os[ _]error(?:_code)?[ =']+(\d+)")  # of safetensors, and of tensorstore
_HOST = re.sub(r"[^A-Za-z0-9-]", "-", platform.node())[:64] or "host"
_LEFT = re.compile(rf"\..+\.{_HOST}\.(\d+)\.part")
_searched: set[pathlib.Path] = set()


def remove_left(folder: pathlib.Path) -> None:
    """Removes what processes of this machine that are no more were writing in a folder, once in a process."""
    if folder.absolute() in _searched:
        return
    _searched.add(folder.absolute())
    with contextlib.suppress(OSError):
        for entry in list(os.scandir(folder)):
            left = _LEFT.fullmatch(entry.name)
            if left and not alive(int(left[1])):
                remove(pathlib.Path(entry.path))


def remove(path: pathlib.Path) -> None:
    """Removes a file, or a folder with all that is in it, also if someone else still writes there; nothing if it is not
    there."""
    for _ in range(100):
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
        if not os.path.lexists(path):
            return
        shutil.rmtree(path, ignore_errors=True)


def remove_unfinished(folder: pathlib.Path) -> None:
    """Removes the checkpoints of a folder that are, or were, being written: orbax renames those that are whole."""
    with contextlib.suppress(OSError):
        for entry in list(os.scandir(folder)):
            if ".orbax-checkpoint-tmp" in entry.name:
                remove(pathlib.Path(entry.path))


def _shortened(name: str, room: int) -> str:
    return name.encode()[:room].decode(errors="ignore")


def drop_cut_line(path: str | os.PathLike) -> None:
    """Drops the end of a file of lines, if there is one, that a killed process has not ended: a line that is appended
    would be glued to it."""
    with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
        raw = file.read()
        if raw and not raw.endswith(b"\n"):
            with replacing(path) as aside:
                aside.write_bytes(raw[: raw.rfind(b"\n") + 1])


def append_line(path: str | os.PathLike, text: str) -> None:
    """Appends a line in one write, so that processes that append to the same file do not mix their lines."""
    with writing(path):
        file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            left = memoryview((text + "\n").encode())
            while left:
                left = left[os.write(file, left) :]
        finally:
            os.close(file)
