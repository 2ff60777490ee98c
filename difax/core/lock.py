"""One process at a time in a folder, and whether a process is still there."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import pathlib
import platform
import stat
import time
from collections.abc import Iterator
from typing import Any

from difax.core.shell import undone

LOCK = ".difax.lock"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL)  # file systems that have none


def alive(pid: int) -> bool:
    """Whether this machine has a process of that number."""
    if pid < 1:  # of a group of processes, for the kernel
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True


@contextlib.contextmanager
def locked(folder: str | os.PathLike, what: str) -> Iterator[None]:
    """Keeps other processes out of a folder that is there, for the block.

    The kernel holds the lock, and lets go of it when the process dies, however it does. The file says who it is, for
    others, and for file systems that do not share locks between machines. A job that was started again, on another
    machine too, takes over its own (SLURM_JOB_ID, or DIFAX_JOB): it has one process that writes.

    Args:
      folder: to write to. what: holds it, as others are told, such as "difax train".

    Raises:
      ValueError: another process holds it (its number, machine and since when), or one of another machine may.
    """
    path = pathlib.Path(folder) / LOCK
    opened: list[int] = []
    with undone(remove_ours, path):  # before the file is there: a signal may come between
        try:
            sure = _open(path, opened)
            _check(path, _owner(opened[-1]), sure)
            since = time.strftime("%Y-%m-%d %H:%M:%S %z")
            me = {"what": what, "pid": os.getpid(), "host": platform.node(), "since": since}
            me |= {} if _job() is None else {"job": _job()}
            os.ftruncate(opened[-1], 0)
            os.pwrite(opened[-1], json.dumps(me).encode(), 0)
            yield
        finally:
            while opened:
                os.close(opened.pop())


def remove_ours(path: pathlib.Path) -> None:
    """Removes the file of a lock if it names this process, or nobody and nobody holds it."""
    with contextlib.suppress(OSError):
        file = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
            owner = _owner(file)
            ours = (owner.get("pid"), owner.get("host")) == (os.getpid(), platform.node())
            if ours or os.fstat(file).st_size == 0:
                path.unlink()
        finally:
            os.close(file)


def _open(path: pathlib.Path, opened: list[int]) -> bool:
    """Opens the file and puts its descriptor into `opened`; whether the kernel's lock is on it, which some file systems
    do not have."""
    while True:
        if os.path.lexists(path) and not stat.S_ISREG(os.lstat(path).st_mode):  # it would be written to
            raise ValueError(f"{path}: is no file; remove it to go on")
        opened.append(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666))
        sure = True
        try:
            fcntl.flock(opened[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(_refusal(path, _owner(opened[-1]))) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            sure = False
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(opened[-1]), os.stat(path)):
                return sure
        os.close(opened.pop())  # whoever held it has just removed it


def _owner(file: int) -> dict[str, Any]:
    try:
        owner = json.loads(os.pread(file, 4096, 0))
    except (ValueError, RecursionError):  # empty, cut off, or not ours
        return {}
    return owner if isinstance(owner, dict) else {}


def _refusal(path: pathlib.Path, owner: dict[str, Any]) -> str:
    return f"{path.parent}: {_words(owner)} writes there; allowed: another folder, or later"


def _words(owner: dict[str, Any]) -> str:
    if not owner:
        return "another process"
    get = lambda key: str(owner.get(key, "?"))[:80]  # noqa: E731
    return f"{get('what')} (process {get('pid')} on {get('host')}, since {get('since')})"


def _job() -> str | None:
    """What starts of one and the same job have in common."""
    slurm = os.environ.get("SLURM_JOB_ID")
    return os.environ.get("DIFAX_JOB") or (f"slurm {slurm}" if slurm else None)


def _check(path: pathlib.Path, owner: dict[str, Any], sure: bool) -> None:
    """Whether what the file says was left behind by a process that is no more."""
    pid, host = owner.get("pid"), owner.get("host")
    if host is not None and host != platform.node():
        if sure and _job() is not None and owner.get("job") == _job():
            return
        raise ValueError(
            f"{path.parent}: {_words(owner)} writes there, or did when it ended; if that process is gone, remove {path}"
        )
    if not sure and isinstance(pid, int) and pid != os.getpid() and alive(pid):
        raise ValueError(_refusal(path, owner))
