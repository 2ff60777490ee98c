"""A process of a job that is lost ends the others, with its name.

JAX notices after its own time (100 s), says nothing of which host it was, and ends the process by abort(); where
collectives go over TCP they fail at once, on other devices they wait for ever. So each process says through jax's
coordination service that it is there, every second; process 0 looks who has not for `LIMIT` seconds and tells all; the
others look whether process 0 still answers. Who fails by itself says so before it ends.

The abort() comes as soon as process 0, with the service, is no more, and from gloo where a message breaks off. It is
put off by six seconds: the C library's `sleep`, which takes the seconds to sleep, serves as the handler of signal 6, so
that nothing of Python runs in a thread that is being aborted. Where Python still runs, it stops that thread for good
(`_Abort`), looks who is silent, and ends with a line that names the host. An abort for any other reason takes its way
after that.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import pathlib
import platform
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from difax.core.shell import end_now, undone

BEAT = 1.0  # seconds between two signs of life
LIMIT = 20.0  # seconds without one after which a process counts as lost
HASTE = 5.0  # the same where a process is being aborted: then one is known to be lost, but not which
GRACE = 2.0  # seconds that process 0, where the service is, stays for the others to hear of it
# what gloo, the coordination service and orbax's barriers say where another process is no more
_OF_OTHERS = re.compile(r"(?i)gloo|barrier|UNAVAILABLE|DEADLINE_EXCEEDED|coordination|connection (?:closed|reset)")
_TGKILL = {"x86_64": 234, "aarch64": 131}  # number of the system call
ENDED = 1  # the exit code of a process that another one has ended

_watch: _Watch | None = None


class _Watch:
    """What is known of the other processes of a job; client: of jax's coordination service."""

    def __init__(self, client: Any, job: Any):
        self.client, self.job = client, job
        self.over = threading.Event()  # nobody is to be ended any more
        self.told = False
        self.lock = threading.Lock()
        self.abort = _Abort()
        self.answered, self.failures = time.monotonic(), 0
        self.client.key_value_set(f"difax/host/{job.process}", platform.node())
        self.first = self.client.blocking_key_value_get("difax/host/0", 60_000)
        self.threads = [threading.Thread(target=self._beat, name="difax-beat", daemon=True)]
        if job.process:
            self.threads.append(threading.Thread(target=self._look, name="difax-coordinator", daemon=True))
        for thread in self.threads:
            thread.start()

    def _beat(self) -> None:
        count, seen = 0, {}
        while not self.over.wait(BEAT):
            count += 1
            since = self.abort.since()
            if since is not None and time.monotonic() - since > LIMIT:
                self.abort.go_on()
            try:
                if since is not None:
                    self.client.key_value_set(f"difax/haste/{self.job.process}", "", allow_overwrite=True)
                self.client.key_value_set(f"difax/beat/{self.job.process}", str(count), allow_overwrite=True)
                if self.job.process == 0:
                    self._judge(seen)
                verdict = [text for _, text in self.client.key_value_dir_get("difax/verdict")]
                self.answered, self.failures = time.monotonic(), 0
            except Exception:
                self.failures += 1
                continue
            if verdict:
                self.end(verdict[0])

    def _judge(self, seen: dict[int, tuple[str, float]]) -> None:
        """Process 0: who has gone, or has not been seen to count for too long."""
        now = time.monotonic()
        beats = {_last(key): text for key, text in self.client.key_value_dir_get("difax/beat")}
        limit = HASTE if self.client.key_value_dir_get("difax/haste") else LIMIT
        gone = {_last(key): json.loads(text) for key, text in self.client.key_value_dir_get("difax/gone")}
        for other in range(1, self.job.processes):
            text = beats.get(other, "")
            if other not in seen or seen[other][0] != text:
                seen[other] = (text, now)
            if gone.get(other):
                self.decide(f"{self._named(other)} {gone[other]}")
            elif other not in gone and now - seen[other][1] > limit:
                self.decide(f"{self._named(other)} was lost: no sign of life for {limit:.0f} s")

    def _named(self, process: int) -> str:
        hosts = {_last(key): text for key, text in self.client.key_value_dir_get("difax/host")}
        return f"process {process} of {self.job.processes} (host {hosts.get(process, '?')})"

    def decide(self, text: str) -> None:
        """Tells every process why it ends; the first word counts."""
        with contextlib.suppress(Exception):
            self.client.key_value_set("difax/verdict/0", text)

    def _look(self) -> None:
        """All but process 0: whether that is still there."""
        name = f"process 0 of {self.job.processes} (host {self.first})"
        while not self.over.wait(BEAT / 2):
            silent = time.monotonic() - self.answered
            if (self.failures or silent > 3 * BEAT) and _refuses(self.job.coordinator):
                self.end(f"{name} was lost: nobody answers at {self.job.coordinator}")
            if self.failures >= 3 or silent > LIMIT:
                self.end(f"{name} was lost: no answer for {silent:.0f} s")

    def end(self, text: str) -> None:
        """Ends this process with a line."""
        with self.lock:
            if self.over.is_set():
                return
            self.over.set()
        if self.job.process == 0:
            time.sleep(GRACE)
        end_now(text, ENDED)

    def leave(self, why: str) -> bool:
        """Tells the others that this process goes, once; "" is that it is done."""
        if self.told:
            return False
        self.told = True
        with contextlib.suppress(Exception):
            self.client.key_value_set(f"difax/gone/{self.job.process}", json.dumps(why))
        if why and self.job.process == 0:
            self.decide(f"process 0 of {self.job.processes} (host {self.first}) {why}")
        return True


def _last(key: str) -> int:
    return int(key.rpartition("/")[2])


def _refuses(address: str) -> bool:
    """Whether nobody listens there, or there is no such host; one that does not answer may be slow."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=2).close()
    except TimeoutError:
        return False
    except OSError:
        return True
    return False


class _Abort:
    """A thread of this process that is in abort(): stopped, until it is to go on. Linux only; elsewhere there is none.

    Such a thread is in the handler of signal 6, `sleep`, and so the one that blocks this signal and not `self.stop`,
    whose handler is the C library's `pause`, which never ends.
    """

    def __init__(self) -> None:
        self.found: float | None = None
        self.linux = sys.platform == "linux" and platform.machine() in _TGKILL
        if self.linux:
            self.libc = ctypes.CDLL(None)
            self.libc.signal.argtypes, self.libc.signal.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
            self.stop = signal.SIGRTMAX - 7
            self._handle(self.stop, self.libc.pause)
            self._handle(signal.SIGABRT, self.libc.sleep)

    def _handle(self, number: int, function: Any) -> None:
        self.libc.signal(int(number), ctypes.cast(function, ctypes.c_void_p))

    def since(self) -> float | None:
        """When an abort was first seen (time.monotonic); None without one."""
        if self.linux and self.found is None:
            for thread in pathlib.Path("/proc/self/task").iterdir():
                with contextlib.suppress(OSError, ValueError, IndexError):  # threads come and go
                    blocked = int((thread / "status").read_text().split("SigBlk:")[1].split()[0], 16)
                    if blocked >> (signal.SIGABRT - 1) & 1 and not blocked >> (self.stop - 1) & 1:
                        self.libc.syscall(_TGKILL[platform.machine()], os.getpid(), int(thread.name), int(self.stop))
                        self.found = time.monotonic()
        return self.found

    def go_on(self) -> None:
        """Ends this process as the abort would have."""
        self.libc.signal(int(signal.SIGABRT), None)
        os.kill(os.getpid(), signal.SIGABRT)


def begin(client: Any, job: Any) -> None:
    """Watches over a job that this process has joined; client: of jax's coordination service."""
    global _watch
    _watch = _Watch(client, job)


def done() -> None:
    """Every process is: nobody is watched any more."""
    if _watch is not None:
        _watch.leave("")
        _watch.over.set()


def failed(error: BaseException) -> None:
    """Tells the other processes that this one ends with an error; first waits whether it is one of theirs: what
    computes together fails where another one is lost, and then this process ends in here, with the name of that."""
    if _watch is None:
        return
    text = " ".join(f"{error or type(error).__name__}".split())
    names = {t.__name__ for t in type(error).__mro__}
    computed = names & {"JaxRuntimeError", "XlaRuntimeError"} and "RESOURCE_EXHAUSTED" not in text
    if computed or _OF_OTHERS.search(text):
        _watch.over.wait(LIMIT + 5 * BEAT)
        if _watch.over.is_set():  # a thread is about to end this process
            time.sleep(60)
    first = _watch.job.process == 0
    if _watch.leave(f"failed: {text[:400]}") and first:
        time.sleep(GRACE)
    _watch.over.set()


@contextlib.contextmanager
def telling() -> Iterator[None]:
    """A block in which a signal that ends this process also ends the others."""

    def tell() -> None:
        if _watch is not None and not _watch.over.is_set() and threading.current_thread().name == "difax-signals":
            if _watch.leave("was told to end") and _watch.job.process == 0:
                time.sleep(1.2 * BEAT)
            _watch.over.set()

    with undone(tell):
        yield
