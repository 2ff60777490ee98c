"""What a process owes to the shell that started it: streams that may be closed or full, signals that end it at once.

A signal cannot wait for Python: XLA compiles for minutes without returning to it, threads of orbax write on, and an
exception that lands in the middle of an import is swallowed or turned into another. So a thread of its own ends the
process as soon as a signal comes, with one line and without what was half-written; the main thread does nothing more.
Files go when the other threads are gone, too: the process replaces itself by a short program that removes them.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import os
import pathlib
import re
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TextIO

INTERRUPTED = 130  # the exit code of a process that was told to end
SIGNALS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated", signal.SIGHUP: "hung up"}
_LIMIT = 2.0  # seconds after a signal in which the process is over, whatever becomes of what it removes

_under_way: list[tuple[Callable[..., None], str | os.PathLike | None]] = []
_ending = threading.Lock()
_stderr = 2  # the descriptor of what people read


@contextlib.contextmanager
def undone(undo: Callable[..., None], path: str | os.PathLike | None = None) -> Iterator[None]:
    """Calls `undo()`, or `undo(path)`, after the block, and also where a signal ends the process within it.

    Args:
      undo: removes what nobody shall find; quick, imports nothing, and may be called twice.
      path: that it takes; then it is a function of a module that needs the standard library alone, and after a signal
        is called when no thread of the process is left. Those of orbax and tensorstore write on until then: they make
        anew the folders that they write to, and would rename one that is half removed as a whole one.
    """
    entry = (undo, path)
    _under_way.append(entry)
    try:
        yield
    finally:
        _under_way.remove(entry)
        _undo(*entry)


def _undo(undo: Callable[..., None], path: str | os.PathLike | None) -> None:
    undo() if path is None else undo(path)


def end_at_signals() -> Callable[[int], None]:
    """Lets SIGINT, SIGTERM and SIGHUP end this process with one line on stderr and exit code 130.

    For a process that is difax's own, before anything heavy is imported. What is `undone` is so, in two seconds at
    most. A signal that the parent had ignored (nohup) stays so.

    Returns:
      To be called with the exit code when the work is done: from then on a signal ends the process with that code, at
      once and without a word, however long the interpreter is taken down.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    codes: list[int] = []

    def told(number: int, frame: Any) -> None:
        with contextlib.suppress(OSError):
            os.write(writing, bytes([number]))  # should another loop of events have taken the wakeup
        while True:  # the main thread must not go on: it would stumble over what is removed, and say so
            time.sleep(60)

    def watch() -> None:
        while True:
            for number in os.read(reading, 1):
                if number in kept and codes:
                    os._exit(codes[0])
                if number in kept:
                    end_now(kept[number])

    kept = {int(n): word for n, word in SIGNALS.items() if signal.getsignal(n) is not signal.SIG_IGN}
    threading.Thread(target=watch, name="difax-signals", daemon=True).start()
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    for number in kept:
        signal.signal(number, told)
        # the last that is called at exit: what is done has its exit code, while the interpreter is taken down
        atexit.register(signal.signal, number, signal.SIG_IGN)
    return codes.append


def silence_threads() -> None:
    """Lets nothing but the main thread tell of errors: what matters of the others' comes back to it as one of its own,
    and what they miss after a failure (tensorstore's loops, orbax's files) would be pages.

    For a process that is difax's own.
    """
    whole = sys.excepthook

    def hook(kind: Any, error: Any, trace: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            whole(kind, error, trace)

    sys.excepthook = hook
    threading.excepthook = lambda _: None
    sys.unraisablehook = lambda _: None


def end_now(word: str, code: int = INTERRUPTED) -> None:
    """Ends this process from any of its threads: with one line on stderr, and without what was half-written."""
    if not _ending.acquire(blocking=False):
        time.sleep(60)  # another thread does
    limit = threading.Timer(_LIMIT, os._exit, [code])
    limit.daemon = True
    limit.start()
    with contextlib.suppress(OSError):
        shown, nowhere = os.dup(_stderr), os.open(os.devnull, os.O_WRONLY)
        for number in (_stderr, 2):  # in this order: `_relay` hands on what it holds when 2 is closed
            os.dup2(nowhere, number)  # nothing follows the line: threads of C++ would tell what they miss
        start = "\n" if getattr(sys.stderr, "open_line", False) else ""
        os.write(shown, f"{start}difax: error: {word}\n".encode())
    first, last = [], []
    for undo, path in reversed(_under_way):
        (first if path is None else last).append((undo, path))
    for entry in first:
        with contextlib.suppress(Exception):
            _undo(*entry)
    words = [word for undo, path in last for word in (undo.__module__, undo.__name__, os.fspath(path))]
    if words and sys.executable:
        with contextlib.suppress(Exception):
            signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
            home = str(pathlib.Path(__file__).parents[2])
            # which ends all threads of the process and keeps its number
            os.execv(sys.executable, [sys.executable, "-I", "-S", "-c", _LAST, home, str(code), *words])
    for entry in last:
        with contextlib.suppress(Exception):
            _undo(*entry)
    os._exit(code)


_LAST = "import sys; sys.path.append(sys.argv[1]); from difax.core.shell import undo_last; undo_last(*sys.argv[2:])"


def undo_last(code: str, *words: str) -> None:
    """What a process that a signal ends does at the very end, as a program of one thread.

    Args:
      code: that it ends with.
      words: module, function and path in turn.
    """
    limit = threading.Timer(_LIMIT, os._exit, [int(code)])
    limit.daemon = True
    limit.start()
    for module, name, path in zip(words[::3], words[1::3], words[2::3], strict=True):
        with contextlib.suppress(Exception):
            getattr(importlib.import_module(module), name)(pathlib.Path(path))
    os._exit(int(code))


class DifaxWarning(UserWarning):
    """What difax warns of; the command line shows it as one line."""


class StreamError(OSError):
    """Standard output that cannot be written."""


class Stream:
    """Standard output or standard error, which may be closed, full, or know fewer letters than a text has.

    Args:
      stream: what stands there, or None.
      heard: whether the run has failed if nobody can read it (`StreamError`, or BrokenPipeError where a reader such as
        head has seen enough); else what cannot be written is dropped.
    """

    def __init__(self, stream: TextIO | None, heard: bool):
        self.stream, self.heard, self.open_line = stream, heard, False
        self.failure: OSError | None = None  # told again by `flush`: who writes help does not listen

    def write(self, text: str) -> int:
        if self.stream is not None and text:
            self.open_line = not text.endswith("\n")
            with self._errors():
                try:
                    self.stream.write(text)
                except UnicodeEncodeError:
                    letters = self.stream.encoding or "ascii"
                    self.stream.write(text.encode(letters, "backslashreplace").decode(letters))
        return len(text)

    def flush(self) -> None:
        if self.failure is not None:
            raise self.failure
        if self.stream is not None:
            with self._errors():
                self.stream.flush()

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._drop()
            if not self.heard:
                return
            broken = isinstance(error, BrokenPipeError)
            self.failure = error if broken else StreamError(error.errno, f"cannot write to stdout: {error.strerror}")
            raise self.failure from None

    def _drop(self) -> None:
        """What is left in a buffer goes nowhere, so that the end of the process does not stumble over it again."""
        stream, self.stream = self.stream, None
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())  # type: ignore[union-attr]
            os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        if self.stream is None and name in ("isatty", "writable"):
            return lambda: False
        return getattr(self.stream if self.stream is not None else sys.__stderr__, name)


@contextlib.contextmanager
def streams() -> Iterator[None]:
    """Standard output and standard error as `Stream`s, in the block."""
    with contextlib.redirect_stdout(Stream(sys.stdout, True)), contextlib.redirect_stderr(Stream(sys.stderr, False)):
        yield


@contextlib.contextmanager
def own_streams(hold: float = 5.0) -> Iterator[None]:
    """A block in which standard output and standard error are Python's own.

    What C++ writes to the first goes nowhere (gloo tells there whom it met). What it writes to the second comes so many
    seconds later, and not where `end_now` has ended the process before, whose line says it better.

    Args:
      hold: seconds.
    """
    global _stderr
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    shown = {1: os.dup(1), 2: os.dup(2)}
    reading, writing = os.pipe()
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(writing, 2)
    for number in (nowhere, writing):
        os.close(number)
    relay = threading.Thread(target=_relay, args=(reading, shown[2], hold), name="difax-stderr", daemon=True)
    relay.start()
    _stderr = shown[2]
    try:
        with open(os.dup(shown[1]), "w") as out, open(os.dup(shown[2]), "w", buffering=1) as err:
            with contextlib.redirect_stdout(Stream(out, True)), contextlib.redirect_stderr(Stream(err, False)):
                yield
    finally:
        _stderr = 2
        for number, there in shown.items():
            os.dup2(there, number)
        relay.join(1.0)  # who was started in the block may hold the other end
        os.close(shown[1])


def _relay(reading: int, shown: int, hold: float) -> None:
    """Hands on what comes, so many seconds later; all of it when no more can come."""
    held: list[tuple[float, bytes]] = []
    there = True
    while there or held:
        due = held[0][0] - time.monotonic() if held else None
        if there and select.select([reading], [], [], None if due is None else max(due, 0))[0]:
            chunk = os.read(reading, 2**16)
            there = bool(chunk)
            held.append((time.monotonic() + hold, chunk))
        while held and (not there or held[0][0] <= time.monotonic()):
            with contextlib.suppress(OSError):
                os.write(shown, held.pop(0)[1])


def open_streams() -> None:
    """Gives a process whose standard streams are closed empty ones: a file would take their place otherwise."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "r" if number == 0 else "w", closefd=False))


def check_xla_flags() -> None:
    """Lets a child find out whether XLA takes XLA_FLAGS: it aborts the process that has one it does not know.

    Only before jaxlib is imported, in a process without other threads than ours.

    Raises:
      ValueError: a flag or a value that XLA does not take, in its words.
    """
    flags = os.environ.get("XLA_FLAGS")
    if not flags or "jaxlib" in sys.modules:
        return
    from jaxlib import xla_client

    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        signal.set_wakeup_fd(-1)
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        signal.alarm(20)
        os.dup2(writing, 2)
        xla_client.CompileOptions()  # reads them
        os._exit(0)
    os.close(writing)
    with open(reading, errors="replace") as told:
        text = told.read(2**20)
    if os.waitpid(child, 0)[1]:  # it aborts, or exits, by the version
        lines = [line.partition("] ")[2] for line in text.splitlines() if re.match(r"[EF]\d{4} ", line)]
        why = lines[0][:200] if lines else "XLA does not start with them"
        raise ValueError(f"XLA_FLAGS={flags}: {why}")
