"""Several processes that run one program together, one or more on each host, as `jax.distributed` joins them.

Each runs the same command. They find each other by what starts them: SLURM, GKE (xpk too) with TPU slices, or three
variables of the environment, DIFAX_COORDINATOR=host:port (of process 0), DIFAX_PROCESSES and DIFAX_PROCESS. Process 0
alone writes what people read: pictures, tables, logs, configurations. Checkpoints are written by all of them.

A process that is lost ends the others (`difax.core.watch`).
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")

OURS = ("DIFAX_COORDINATOR", "DIFAX_PROCESSES", "DIFAX_PROCESS")
SLURM = (
    "SLURM_JOB_ID",
    "SLURM_STEP_NODELIST",
    "SLURM_NTASKS",
    "SLURM_PROCID",
    "SLURM_LOCALID",
)  # all of them, in a step
TPU_PORT = 8482  # of JAX for slices of TPUs
START = 300  # seconds that processes wait for each other at the start
KEPT = 10_000  # answers of process 0 that are kept for the others
AGES = 86_400  # seconds of what ends by `difax.core.watch` if somebody does not come


class Job(NamedTuple):
    """coordinator: host:port at which process 0 listens; processes: in all; process: which this one is; found: the
    variable that told; devices: local numbers of those that this process takes, None being all of its host."""

    coordinator: str
    processes: int
    process: int
    found: str
    devices: tuple[int, ...] | None = None


class LostHost(RuntimeError):
    """Other processes of a job that did not come, or are no more."""


def job_of(environment: Mapping[str, str]) -> Job | None:
    """The job that variables describe; None where there is one process.

    The three of our own go first (DIFAX_PROCESSES=1, alone, keeps the processes of a job apart), then those of TPU
    slices, then those of a SLURM step.

    Raises:
      ValueError: a variable that is missing, or not what it has to be.
    """
    given = {k: v for k, v in environment.items() if v.strip()}
    if any(name in given for name in OURS):
        return _by_hand(given)
    if "TPU_PROCESS_ADDRESSES" in given or "TPU_WORKER_HOSTNAMES" in given:
        return _slices(given)
    if all(name in given for name in SLURM):
        return _slurm(given)
    return None


def _by_hand(given: Mapping[str, str]) -> Job | None:
    processes = _number(given, "DIFAX_PROCESSES", 1) if "DIFAX_PROCESSES" in given else 0
    if processes == 1:
        return None
    missing = [name for name in OURS if name not in given]
    if missing:
        there = ", ".join(f"{name}={given[name]}" for name in OURS if name in given)
        how = {"DIFAX_COORDINATOR": "HOST:PORT of process 0", "DIFAX_PROCESSES": "2 or more", "DIFAX_PROCESS": "0 ..."}
        raise ValueError(f"{missing[0]} is missing beside {there}; allowed: {missing[0]}={how[missing[0]]}")
    process = _number(given, "DIFAX_PROCESS", 0, processes - 1, f"DIFAX_PROCESSES={processes}")
    return Job(_address("DIFAX_COORDINATOR", given["DIFAX_COORDINATOR"]), processes, process, "DIFAX_PROCESSES")


def _slices(given: Mapping[str, str]) -> Job | None:
    """Of TPU slices on GKE: workers of a slice, and MEGASCALE_* where there are several slices."""
    name = "TPU_PROCESS_ADDRESSES" if "TPU_PROCESS_ADDRESSES" in given else "TPU_WORKER_HOSTNAMES"
    workers = [worker.strip().split(":")[0] for worker in given[name].split(",")]
    slices = _number(given, "MEGASCALE_NUM_SLICES", 1) if "MEGASCALE_NUM_SLICES" in given else 1
    if len(workers) * slices == 1:
        return None
    if not all(workers):
        raise ValueError(f"{name}={given[name]}; allowed: names of hosts between commas")
    for needed in ("TPU_WORKER_ID", *(("MEGASCALE_SLICE_ID", "MEGASCALE_COORDINATOR_ADDRESS") if slices > 1 else ())):
        if needed not in given:
            raise ValueError(f"{needed} is missing beside {name}={given[name][:80]}; GKE sets it, and xpk's job sets")
    worker = _number(given, "TPU_WORKER_ID", 0, len(workers) - 1, f"{len(workers)} names in {name}")
    which = _number(given, "MEGASCALE_SLICE_ID", 0, slices - 1, f"{slices} slices") if slices > 1 else 0
    host = given["MEGASCALE_COORDINATOR_ADDRESS"].split(":")[0] if slices > 1 else workers[0]
    port = _port(given, TPU_PORT)
    return Job(f"{host}:{port}", len(workers) * slices, which * len(workers) + worker, name)


def _slurm(given: Mapping[str, str]) -> Job | None:
    """Of a SLURM step: the first host and a port made of the job's number, as JAX has them."""
    processes = _number(given, "SLURM_NTASKS", 1)
    if processes == 1:
        return None
    process = _number(given, "SLURM_PROCID", 0, processes - 1, f"SLURM_NTASKS={processes}")
    local, nodes = _number(given, "SLURM_LOCALID", 0), given["SLURM_STEP_NODELIST"]
    found = re.match(r"([^\[,\s]+)(?:\[(\d+)[^\]]*\])?([^\[,\s]*)", nodes)  # node7,b or node[007-9,12],b
    if found is None:
        raise ValueError(f"SLURM_STEP_NODELIST={nodes}; allowed: names of hosts, as SLURM writes them")
    host = "".join(part or "" for part in found.groups())
    port = _port(given, _number(given, "SLURM_JOB_ID", 0) % 2**12 + 2**16 - 2**12)
    return Job(f"{host}:{port}", processes, process, "SLURM_NTASKS", _share(given, local))


def _share(given: Mapping[str, str], local: int) -> tuple[int, ...] | None:
    """The GPUs of one of several tasks on a node: its share of those that are visible, all where it is alone or SLURM
    has given each task its own."""
    counts = re.findall(r"(\d+)(?:\(x(\d+)\))?", given.get("SLURM_STEP_TASKS_PER_NODE", ""))  # 4(x2),3
    each = [int(n) for n, times in counts for _ in range(int(times or 1))]
    node = given.get("SLURM_NODEID", "0")
    tasks = each[int(node)] if node.isdigit() and int(node) < len(each) else None
    visible = len(given.get("CUDA_VISIBLE_DEVICES", "").split(",")) if "CUDA_VISIBLE_DEVICES" in given else None
    if tasks == 1 or visible == 1 or "JAX_LOCAL_DEVICE_IDS" in given:
        return None
    if tasks is None or visible is None or visible % tasks:
        return (local,)
    share = visible // tasks
    return tuple(range(local * share, (local + 1) * share))


def _port(given: Mapping[str, str], default: int) -> int:
    return _number(given, "JAX_COORDINATOR_PORT", 1, 65535) if "JAX_COORDINATOR_PORT" in given else default


def _number(given: Mapping[str, str], name: str, least: int, most: int | None = None, since: str = "") -> int:
    text = given[name].strip()
    value = int(text) if text.isascii() and text.isdigit() and len(text) < 19 else -1
    if value < least or (most is not None and value > most):
        allowed = f"{least} or more" if most is None else f"{least} ... {most}"
        raise ValueError(f"{name}={text[:80]}; allowed: {allowed}{f' ({since})' if since else ''}")
    return value


def _address(name: str, text: str) -> str:
    host, colon, port = text.strip().rpartition(":")
    if not (host and colon and port.isascii() and port.isdigit() and 0 < int(port[:6]) < 2**16) or "/" in host:
        raise ValueError(f"{name}={text}; allowed: HOST:PORT, the port 1 ... 65535, such as node0:8476")
    return text.strip()


_job: Job | None = None
_client: Any = None  # of jax's coordination service
_turn = itertools.count()


def start(environment: Mapping[str, str] | None = None, patience: int = START) -> Job | None:
    """Joins the processes of this job, if it has several; before any device is looked for.

    Args:
      environment: variables; None is this process's. patience: seconds to wait for the others.

    Returns:
      The job, or None where this process is alone.

    Raises:
      ValueError: variables that do not describe a job (`job_of`), or devices that were in use before.
      LostHost: the others did not come, or process 0 was not to be reached.
    """
    global _job, _client
    job = job_of(os.environ if environment is None else environment)
    if job is None or _job is not None:
        return _job
    import jax
    from jax._src import distributed  # its client is how processes talk before there is a device

    if jax.config.values.get("jax_cpu_collectives_implementation") in (None, "none"):
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # programs that run beside each other would send in another order here than there, which gloo takes for one message
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    jax.config.update("jax_enable_preemption_service", False)  # its handler would swallow SIGTERM, which ends us
    if job.process and not _answers(job.coordinator, patience):  # jax would wait and then abort()
        raise LostHost(
            f"process {job.process} did not meet process 0 at {job.coordinator} within {patience} s ({job.found}); "
            "nobody answers there"
        )
    try:
        jax.distributed.initialize(
            job.coordinator,
            job.processes,
            job.process,
            local_device_ids=job.devices,
            cluster_detection_method="deactivate",
            initialization_timeout=patience,
        )
    except Exception as error:
        why = " ".join(str(error).split())
        if "must be called before" in why or "only be called once" in why:
            raise ValueError(f"{job.found}: JAX was started before; allowed: a new process") from None
        what = f"the {job.processes} processes" if job.process == 0 else f"process 0 at {job.coordinator}"
        raise LostHost(
            f"process {job.process} did not meet {what} within {patience} s ({job.found}); {why[:200]}"
        ) from None
    from difax.core import watch

    _job, _client = job, distributed.global_state.client
    watch.begin(_client, job)
    return job


def _answers(address: str, patience: float) -> bool:
    """Whether something takes connections at HOST:PORT, now or within so many seconds."""
    host, _, port = address.rpartition(":")
    end = time.monotonic() + patience
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), max(min(end - time.monotonic(), 5.0), 0.1)).close()
            return True
        except OSError:
            if time.monotonic() >= end:
                return False
            time.sleep(0.2)


def processes() -> int:
    """Of this job."""
    return 1 if _job is None else _job.processes


def process() -> int:
    """The number of this process in its job, 0 where it is alone."""
    return 0 if _job is None else _job.process


def is_first() -> bool:
    """Whether this process writes what people read."""
    return process() == 0


def first(work: Callable[[], T]) -> T:
    """What process 0 gets from `work`, at every process of the job; all have to call it.

    Args:
      work: done by process 0 alone; what it gives is plain JSON.

    Raises:
      ValueError: where `work` does, with its words, at every process.
    """
    if _job is None:
        return work()
    turn = next(_turn)
    key = f"difax/first/{turn}"
    if _job.process:
        told = json.loads(_client.blocking_key_value_get(key, AGES * 1000))
        if "refused" in told:
            raise ValueError(told["refused"])
        return told["value"]
    try:
        value = work()
    except ValueError as error:
        _client.key_value_set(key, json.dumps({"refused": str(error)}))
        raise
    _client.key_value_set(key, json.dumps({"value": value}))
    with contextlib.suppress(Exception):  # everybody has read it long ago
        _client.key_value_delete(f"difax/first/{turn - KEPT}")
    return value


def barrier(seconds: float = AGES) -> None:
    """Waits until every process of the job is here.

    Raises:
      LostHost: they are not within so many seconds.
    """
    if _job is not None:
        try:
            _client.wait_at_barrier(f"difax/barrier/{next(_turn)}", int(seconds * 1000))
        except Exception as error:
            why = " ".join(str(error).split())[:200]
            raise LostHost(f"not all {_job.processes} processes came within {seconds:g} s; {why}") from None


@contextlib.contextmanager
def together() -> Iterator[None]:
    """A block in which the processes of a job are joined (`start`): at its end they part, and where this one fails, the
    others are told, and end."""
    if job_of(os.environ) is None:
        yield
        return
    from difax.core import watch
    from difax.core.shell import own_streams

    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # before jaxlib is there: it tells of every step of joining
    with own_streams():
        try:
            with watch.telling():
                yield
            _part()
        except BaseException as error:
            watch.failed(error)
            raise


def _part() -> None:
    """Waits for the others to be done, and leaves them."""
    if _job is None:
        return
    from difax.core import watch

    barrier()
    watch.done()
    import jax

    jax.distributed.shutdown()


def end(code: int) -> None:
    """Ends this process where it is one of a job that has failed: JAX would wait for the others at exit."""
    if _job is not None and code:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)


def put(tree: Any, sharding: Any) -> Any:
    """Arrays on the devices of a sharding, those of other processes too.

    Args:
      tree: arrays that every process has whole; it copies the parts of its own devices and no more.
      sharding: of all leaves, or a tree of them.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    if processes() == 1:
        return jax.device_put(tree, sharding)

    def leaf(a: Any, where: Any) -> Any:
        if isinstance(a, jax.Array) and jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(leaf(jax.random.key_data(a), where), impl=jax.random.key_impl(a))
        if isinstance(a, jax.Array) and not a.is_fully_addressable:
            return jax.device_put(a, where)
        whole = np.asarray(a)
        return jax.make_array_from_callback(whole.shape, where, lambda index: whole[index])

    if isinstance(sharding, jax.sharding.Sharding):
        return jax.tree.map(lambda a: leaf(a, sharding), tree)
    return jax.tree.map(leaf, tree, sharding)


def put_rows(arrays: Any, rows: Any, sharding: Any) -> Any:
    """Rows of arrays, cut over the devices of a sharding; each process reads those of its own devices.

    Args:
      arrays: a tree whose leaves lead with the same axis. rows: indices along it. sharding: of what is made.
    """
    import jax

    if processes() == 1:
        return jax.device_put(jax.tree.map(lambda a: a[rows], arrays), sharding)

    def leaf(a: Any) -> Any:
        part = lambda index: a[rows[index[0]]][(slice(None), *index[1:])]  # noqa: E731
        return jax.make_array_from_callback((len(rows), *a.shape[1:]), sharding, part)

    return jax.tree.map(leaf, arrays)


def fetch(tree: Any) -> Any:
    """Arrays as numpy, whole at every process; all have to call it. Only what lies on several hosts is gathered."""
    import jax
    import numpy as np

    def leaf(a: Any) -> np.ndarray:
        if not isinstance(a, jax.Array) or a.is_fully_addressable or a.is_fully_replicated:
            return np.asarray(a)
        from jax.experimental import multihost_utils

        return np.asarray(multihost_utils.process_allgather(a, tiled=True))

    return jax.tree.map(leaf, tree)
