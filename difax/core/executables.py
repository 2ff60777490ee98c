"""Compiled programs that are kept in the user's cache folder, so that the next process compiles nothing.

An executable lies under a key of everything that changes it (`digest` of the lowered text, the trees of its arguments
and `environment()`); a second key, of a description that needs no tracing, may point to the first (`point`, `pointed`).
Reading one is like running code. So they are taken from a folder alone that is the user's own and closed to others
(mode 0700), and never from where checkpoints or runs lie; a file whose checksum is not that of its content is not read.

The folder holds at most `LIMIT` bytes: what was used longest ago goes first.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import io
import json
import os
import pathlib
import pickle
import platform
import stat
import threading
import time
import uuid
import warnings
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.serialize_executable import deserialize_and_load, serialize

from difax.core.shell import DifaxWarning
from difax.core.target import target
from difax.core.writing import remove_left, replacing

LIMIT = 2 * 2**30  # bytes of all executables of a folder
_FORMAT = b"difax executable 1\n"
_IMPORTED = time.time()
_SETTLED = 30.0  # seconds: a source file changed later than so long before the import may not be what was imported

_folder: ContextVar[pathlib.Path | None] = ContextVar("difax_executables", default=None)


@contextlib.contextmanager
def kept_in(folder: str | os.PathLike | None) -> Iterator[None]:
    """Within it, programs that are compiled are kept in a folder, and taken from there where they are.

    Args:
      folder: made with mode 0700 if it is not there; None keeps none. One that others may write to, or that is another
        user's, is warned of and not used.
    """
    token = _folder.set(None if folder is None else _own(pathlib.Path(folder)))
    try:
        yield
    finally:
        _folder.reset(token)


def folder() -> pathlib.Path | None:
    """Where executables are kept; None where they are not: none was named, JAX's own cache is off, or several processes
    run one program."""
    if not setting("jax_enable_compilation_cache") or _folder.get() is None or jax.process_count() > 1:
        return None
    return _folder.get()


def _own(path: pathlib.Path) -> pathlib.Path | None:
    """The folder, if it can be one that this user alone reads and writes."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = os.lstat(path)
        if not stat.S_ISDIR(status.st_mode):
            why = "is no folder"
        elif status.st_uid != os.geteuid():
            why = "is another user's"
        elif status.st_mode & 0o022:
            why = "can be written to by others"
        elif not os.access(path, os.W_OK | os.X_OK):
            why = "cannot be written to"
        else:
            if status.st_mode & 0o077:
                path.chmod(0o700)
            return path
    except OSError as error:
        why = error.strerror or str(error)
    warnings.warn(f"compiled programs are not kept: {path} {why}", DifaxWarning, stacklevel=3)
    return None


# ---- keys --------------------------------------------------------------------------------------------------


def digest(*parts: Any) -> str:
    """SHA-256 of values that JSON knows, in hexadecimal; ValueError for others."""
    try:
        text = json.dumps(parts, sort_keys=True)
    except TypeError as error:
        raise ValueError(f"no key of {error}; allowed: texts, numbers, lists and mappings") from None
    return hashlib.sha256(text.encode()).hexdigest()


def signature(tree: Any) -> list[Any]:
    """What a program is specialised to in its arguments: their tree, and shape, type and placement of every leaf."""
    leaves, structure = jax.tree.flatten(tree)
    return [str(structure), *map(_leaf, leaves)]


def _leaf(leaf: Any) -> list[Any]:
    where = getattr(leaf, "sharding", None)
    devices = () if where is None else where.device_set
    usual = len(devices) <= 1 and (not getattr(leaf, "committed", False) or set(devices) == {_default_device()})
    weak = bool(getattr(leaf, "weak_type", False))
    return [list(np.shape(leaf)), str(jnp.result_type(leaf)), weak, "" if usual else f"{where} {_ids(devices)}"]


def _ids(devices: Any) -> list[int]:
    return sorted(device.id for device in devices)


def _default_device() -> Any:
    return setting("jax_default_device") or jax.devices()[0]


# settings of JAX that say where compilations are kept and what is told of them, not what is compiled
_TELLING = (
    "jax_compilation_cache", "jax_enable_compilation_cache", "jax_persistent_cache", "jax_raise_persistent_cache",
    "jax_log", "jax_explain", "jax_traceback", "jax_tracer_error", "jax_dump", "jax_platforms", "jax_compiler_detailed",
)  # fmt: skip
_VARIABLES = ("XLA_", "LIBTPU", "TPU_", "TF_XLA", "NVIDIA_TF32", "CUBLAS", "CUDNN", "CUDA_", "TRITON", "OMP_NUM")
_PACKAGES = (
    "difax", "jax", "jaxlib", "flax", "numpy", "ml_dtypes", "opt_einsum", "jax-triton", "triton", "libtpu",
    "jax-cuda12-plugin", "jax-cuda12-pjrt", "jax-cuda13-plugin", "jax-cuda13-pjrt",
)  # fmt: skip


def setting(name: str) -> Any:
    """One of JAX's settings, as it holds in this thread."""
    return getattr(jax.config, name, jax.config.values.get(name))


def settings() -> dict[str, str]:
    """JAX's settings as they hold in this thread, but for those that change no program."""
    return {name: repr(setting(name)) for name in sorted(jax.config.values) if not name.startswith(_TELLING)}


def environment() -> dict[str, Any]:
    """Everything besides the program itself that its executable depends on: versions, the devices and what is compiled
    for, the host's processor, settings of JAX and of the compilers."""
    devices, device = jax.devices(), _default_device()
    return {
        "format": _FORMAT.decode(),
        "versions": versions(),
        "host": host(),
        "target": list(map(str, target())),
        "device": [device.platform, device.device_kind, device.id, len(devices)],
        "topology": [[d.id, d.process_index, list(getattr(d, "coords", ()))] for d in devices],
        "runtime": [device.client.platform_version, str(device.client.runtime_type)],
        "variables": {k: v for k, v in sorted(os.environ.items()) if k.startswith(_VARIABLES)},
        "settings": settings(),
    }


@functools.cache
def versions() -> dict[str, str]:
    """Of Python, difax and the packages that make a program of its functions."""
    found = {"python": ".".join(platform.python_version_tuple()[:2]), "of": platform.python_implementation()}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


@functools.cache
def host() -> list[Any]:
    """The processor's model, instruction set and number of cores; where Linux does not tell it, this machine alone."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        first = pathlib.Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return [platform.machine(), platform.processor(), platform.platform(), uuid.getnode(), cores]
    # names of x86 and of ARM; the clock, which changes, is not among them
    named = ("vendor_id", "cpu family", "model", "model name", "stepping", "flags", "Features")
    told = ("CPU implementer", "CPU architecture", "CPU variant", "CPU part", "CPU revision", "isa")
    lines = [line for line in first if line.partition(":")[0].strip() in named + told]
    return [platform.machine(), hashlib.sha256("\n".join(lines).encode()).hexdigest(), cores]


@functools.cache
def sources(root: pathlib.Path | None = None, before: float | None = None) -> str | None:
    """A digest of difax's own code, by content; None where a file may have changed since it was imported.

    Args:
      root: the package's folder, the default this one's. before: time that all must be older than.
    """
    root = pathlib.Path(__file__).resolve().parent.parent if root is None else root
    before = _IMPORTED - _SETTLED if before is None else before
    found = hashlib.sha256()
    for base, _, names in sorted(os.walk(root, followlinks=True)):
        for name in sorted(name for name in names if name.endswith(".py")):
            path = os.path.join(base, name)
            try:
                if os.stat(path).st_mtime > before:
                    return None
                content = pathlib.Path(path).read_bytes()
            except OSError:
                return None
            found.update(f"{os.path.relpath(path, root)} {len(content)}\n".encode() + content)
    return found.hexdigest()


# ---- files -------------------------------------------------------------------------------------------------


def point(place: pathlib.Path, key: str, to: str) -> None:
    """Lets a key that needs no tracing stand for the executable of another one."""
    _write(place / f"{key}.key", to.encode())


def pointed(place: pathlib.Path, key: str) -> str | None:
    """The key that another one stands for, if its executable is there."""
    path = place / f"{key}.key"
    try:
        to = _read(path).decode()
        if len(to) == 64 and set(to) <= set("0123456789abcdef"):
            return to if (place / f"{to}.executable").is_file() else None
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError):
        pass
    _drop(path)
    return None


_seen = threading.local()


@functools.cache
def _listen() -> None:
    def note(event: str, **_: Any) -> None:
        if event == "/jax/compilation_cache/cache_hits":
            _seen.hits = getattr(_seen, "hits", 0) + 1

    jax.monitoring.register_event_listener(note)


def compiled(lowered: Any) -> tuple[Any, bool]:
    """A lowered program compiled, and whether JAX had it in its own cache of compilations.

    One that it had is not to be saved: XLA's CPU backend writes such a program without its functions.
    """
    _listen()
    before = getattr(_seen, "hits", 0)
    made = lowered.compile()
    return made, getattr(_seen, "hits", 0) > before


def save(place: pathlib.Path, key: str, program: Any) -> bool:
    """Keeps a compiled program under a key; what cannot be kept is not: one that calls back to this process, one that
    is larger than the folder may be, and one for which there is no room (of which one line warns)."""
    try:
        executable, _, out_tree = serialize(program)
        content = pickle.dumps((executable, out_tree, _placed(program)))
    except Exception:  # each backend refuses in its own words, what it cannot serialise
        return False
    return len(content) <= LIMIT and _write(place / f"{key}.executable", content)


def load(place: pathlib.Path, key: str, arguments: Any) -> Any:
    """The compiled program that a key has; None where there is none, or (with one line of warning) a damaged one, which
    is removed.

    Args:
      arguments: that it is called with, or their shapes.
    """
    path = place / f"{key}.executable"
    try:
        executable, out_tree, ids = pickle.loads(_read(path))
        by_id = {device.id: device for device in jax.devices()}
        in_tree = jax.tree.structure((tuple(arguments), {}))
        loaded = deserialize_and_load(executable, in_tree, out_tree, execution_devices=[by_id[i] for i in ids])
        with contextlib.suppress(OSError):
            os.utime(path)  # when it was used last
        return loaded
    except FileNotFoundError:
        return None
    except Exception as error:  # whatever unpickling and the backend raise
        why = " ".join(str(error).split())[:100] or type(error).__name__
        warnings.warn(f"{path} is damaged and compiled anew ({why})", DifaxWarning, stacklevel=2)
        _drop(path)
        return None


def _placed(program: Any) -> list[int]:
    """Numbers of the devices that a program runs on, in its order."""
    shardings = [s for s in jax.tree.leaves(program.input_shardings) if hasattr(s, "device_set")]
    meshes = [s.mesh.devices for s in shardings if isinstance(s, jax.sharding.NamedSharding)]
    most = max(shardings, key=lambda s: len(s.device_set)).device_set
    if len(most) == 1:
        return _ids(most)
    order = next(list(m.flat) for m in meshes if m is not None and m.size == len(most))
    return [device.id for device in order]


def _write(path: pathlib.Path, content: bytes) -> bool:
    try:
        with replacing(path) as aside:
            file = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            with open(file, "wb") as out:
                out.write(_FORMAT + hashlib.sha256(content).digest() + content)
        _bound(path)
    except (OSError, ValueError) as error:  # a full disk is no reason not to draw
        warnings.warn(f"a compiled program is not kept: {error}", DifaxWarning, stacklevel=3)
        return False
    return True


def _read(path: pathlib.Path) -> bytes:
    """The content of a file of this user's that is whole; OSError of another."""
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    with open(file, "rb") as opened:
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
            raise OSError("not a file of this user's")
        whole = io.BytesIO(opened.read())
    form, check, content = whole.read(len(_FORMAT)), whole.read(32), whole.read()
    if form != _FORMAT or hashlib.sha256(content).digest() != check:
        raise OSError("its checksum is another")
    return content


def _bound(latest: pathlib.Path) -> None:
    """Removes what was used longest ago until the folder is within its limit; never the latest."""
    remove_left(latest.parent)
    files = []
    for entry in os.scandir(latest.parent):
        with contextlib.suppress(OSError):  # another process has removed it
            status = entry.stat(follow_symlinks=False)
            if stat.S_ISREG(status.st_mode) and entry.name.endswith((".executable", ".key")):
                files.append((status.st_mtime, status.st_size, pathlib.Path(entry.path)))
    total = sum(size for _, size, _ in files)
    for _, size, path in sorted(files):
        if total <= LIMIT:
            break
        if path != latest:
            _drop(path)
            total -= size


def _drop(path: pathlib.Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()
