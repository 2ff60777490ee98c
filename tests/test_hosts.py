"""Jobs of several processes: who is in them, what two of them draw and train, and what becomes of who is left."""

import json
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from difax.cli import _parsed, main
from difax.core import hosts, watch
from difax.core.hosts import Job, job_of
from difax.core.lock import LOCK, locked
from difax.training.checkpoints import open_checkpoints
from difax.training.train import resumes
from experiments import two_hosts
from tests.quick import with_flags

ROOT = pathlib.Path(__file__).resolve().parent.parent
LAUNCH = ROOT / "experiments" / "launch"
HAND = {"DIFAX_COORDINATOR": "node0:8476", "DIFAX_PROCESSES": "4", "DIFAX_PROCESS": "3"}
STEP = {
    "SLURM_JOB_ID": "5000",
    "SLURM_STEP_NODELIST": "gpu[007-009,12]",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
}
SLICE = {"TPU_WORKER_HOSTNAMES": "a-0.job,a-1.job", "TPU_WORKER_ID": "1"}
SLICES = {"MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "1", "MEGASCALE_COORDINATOR_ADDRESS": "a-0.job:8080"}
PORT = 5000 % 4096 + 61440

JOBS = {
    "nothing": ({}, None),
    "empty variables": ({"DIFAX_COORDINATOR": "", "TPU_WORKER_HOSTNAMES": ""}, None),
    "by hand": (HAND, Job("node0:8476", 4, 3, "DIFAX_PROCESSES")),
    "by hand, IPv6": (HAND | {"DIFAX_COORDINATOR": "[::1]:80"}, Job("[::1]:80", 4, 3, "DIFAX_PROCESSES")),
    "by hand, one": ({"DIFAX_PROCESSES": "1"}, None),
    "kept apart under SLURM": (STEP | {"DIFAX_PROCESSES": "1"}, None),
    "by hand under SLURM": (STEP | HAND, Job("node0:8476", 4, 3, "DIFAX_PROCESSES")),
    "slice": (SLICE, Job("a-0.job:8482", 2, 1, "TPU_WORKER_HOSTNAMES")),
    "slice of one host": ({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}, None),
    "addresses with ports": (
        {"TPU_PROCESS_ADDRESSES": "b:1,c:1", "TPU_WORKER_ID": "0"}, Job("b:8482", 2, 0, "TPU_PROCESS_ADDRESSES")
    ),
    "two slices": (SLICE | SLICES, Job("a-0.job:8482", 4, 3, "TPU_WORKER_HOSTNAMES")),
    "port": (SLICE | {"JAX_COORDINATOR_PORT": "99"}, Job("a-0.job:99", 2, 1, "TPU_WORKER_HOSTNAMES")),
    "SLURM": (STEP, Job(f"gpu007:{PORT}", 4, 3, "SLURM_NTASKS", (1,))),
    "SLURM, one host": (STEP | {"SLURM_STEP_NODELIST": "n1"}, Job(f"n1:{PORT}", 4, 3, "SLURM_NTASKS", (1,))),
    "SLURM, a list": (STEP | {"SLURM_STEP_NODELIST": "n1,m[2-3]"}, Job(f"n1:{PORT}", 4, 3, "SLURM_NTASKS", (1,))),
    "SLURM, no step": ({k: v for k, v in STEP.items() if k != "SLURM_STEP_NODELIST"}, None),
    "SLURM, one task": (STEP | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, None),
    "SLURM, a task a node": (
        STEP | {"SLURM_STEP_TASKS_PER_NODE": "1(x4)", "CUDA_VISIBLE_DEVICES": "0,1"},
        Job(f"gpu007:{PORT}", 4, 3, "SLURM_NTASKS"),
    ),
    "SLURM, GPUs shared": (
        STEP | {"SLURM_STEP_TASKS_PER_NODE": "1,2,1", "SLURM_NODEID": "1", "CUDA_VISIBLE_DEVICES": "4,5,6,7"},
        Job(f"gpu007:{PORT}", 4, 3, "SLURM_NTASKS", (2, 3)),
    ),
    "SLURM, a GPU for each task": (
        STEP | {"SLURM_STEP_TASKS_PER_NODE": "2(x2)", "CUDA_VISIBLE_DEVICES": "5"},
        Job(f"gpu007:{PORT}", 4, 3, "SLURM_NTASKS"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", JOBS)
def test_jobs(name):
    environment, job = JOBS[name]
    assert job_of(environment) == job


REFUSED = {
    "missing": (
        {"DIFAX_PROCESSES": "2", "DIFAX_PROCESS": "0"},
        "DIFAX_COORDINATOR is missing beside DIFAX_PROCESSES=2",
    ),
    "number missing": ({"DIFAX_COORDINATOR": "a:1", "DIFAX_PROCESS": "0"}, "DIFAX_PROCESSES is missing"),
    "no port": (HAND | {"DIFAX_COORDINATOR": "node0"}, "DIFAX_COORDINATOR=node0; allowed: HOST:PORT"),
    "port too large": (HAND | {"DIFAX_COORDINATOR": "node0:65536"}, "allowed: HOST:PORT, the port 1 ... 65535"),
    "an address of the web": (HAND | {"DIFAX_COORDINATOR": "http://a:1"}, "allowed: HOST:PORT"),
    "no number": (HAND | {"DIFAX_PROCESSES": "four"}, "DIFAX_PROCESSES=four; allowed: 1 or more"),
    "none": (HAND | {"DIFAX_PROCESSES": "0"}, "DIFAX_PROCESSES=0; allowed: 1 or more"),
    "past the end": (HAND | {"DIFAX_PROCESS": "4"}, r"DIFAX_PROCESS=4; allowed: 0 ... 3 \(DIFAX_PROCESSES=4\)"),
    "negative": (HAND | {"DIFAX_PROCESS": "-1"}, "DIFAX_PROCESS=-1; allowed: 0 ... 3"),
    "worker": (SLICE | {"TPU_WORKER_ID": "2"}, r"TPU_WORKER_ID=2; allowed: 0 ... 1 \(2 names"),
    "no worker": ({"TPU_WORKER_HOSTNAMES": "a,b"}, "TPU_WORKER_ID is missing"),
    "no slice": (SLICE | {"MEGASCALE_NUM_SLICES": "2"}, "MEGASCALE_SLICE_ID is missing"),
    "an empty host": (SLICE | {"TPU_WORKER_HOSTNAMES": "a,,b"}, "TPU_WORKER_HOSTNAMES=a,,b; allowed: names of hosts"),
    "task": (STEP | {"SLURM_PROCID": "4"}, r"SLURM_PROCID=4; allowed: 0 ... 3 \(SLURM_NTASKS=4\)"),
    "nodes": (STEP | {"SLURM_STEP_NODELIST": "[1-2]"}, "SLURM_STEP_NODELIST"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_jobs_that_are_refused(name):
    environment, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        job_of(environment)


def test_one_process_is_first_and_meets_nobody():
    assert hosts.is_first() and hosts.process() == 0 and hosts.processes() == 1
    assert hosts.start({}) is None
    assert hosts.first(lambda: {"a": 1}) == {"a": 1}
    hosts.barrier()
    with hosts.together():
        pass


def test_rows_and_arrays_lie_as_they_are_asked_to():
    mesh = Mesh(np.asarray(jax.devices()[:4]), ("data",))
    split = NamedSharding(mesh, PartitionSpec("data"))
    data = {"image": np.arange(60.0).reshape(20, 3), "label": np.arange(20)}
    rows = np.asarray([7, 3, 19, 0, 1, 1, 2, 5])
    made = hosts.put_rows(data, rows, split)
    assert made["image"].sharding == split
    np.testing.assert_array_equal(hosts.fetch(made)["image"], data["image"][rows])
    keys = hosts.put(jax.random.split(jax.random.key(0), 8), split)
    assert keys.sharding.is_equivalent_to(split, 1)


class Board:
    """The board that processes write on, as jax's coordination service has it."""

    def __init__(self, **there):
        self.there = dict(there)

    def key_value_set(self, key, value, allow_overwrite=False):
        if key in self.there and not allow_overwrite:
            raise RuntimeError("ALREADY_EXISTS")
        self.there[key] = value

    def key_value_dir_get(self, folder):
        return [(k, v) for k, v in self.there.items() if k.startswith(f"{folder}/")]

    def verdict(self):
        return self.there.get("difax/verdict/0")


def watcher(board, process=0):
    """A watch without its threads."""
    made = object.__new__(watch._Watch)
    made.client, made.job, made.first, made.told = board, Job("a:1", 3, process, "DIFAX_PROCESSES"), "alpha", False
    return made


def test_who_is_silent_is_lost_and_who_goes_says_why(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(watch.time, "monotonic", lambda: now[0])
    board, seen = Board(**{"difax/host/1": "beta", "difax/host/2": "gamma"}), {}
    judge = watcher(board)
    for count in range(30):
        board.there["difax/beat/1"] = str(count)
        board.there["difax/beat/2"] = str(min(count, 5))
        now[0] += 1
        judge._judge(seen)
        if count < watch.LIMIT:
            assert board.verdict() is None
    assert board.verdict() == "process 2 of 3 (host gamma) was lost: no sign of life for 20 s"
    for why, verdict in (("failed: no data", "process 1 of 3 (host beta) failed: no data"), ("", None)):
        board = Board(**{"difax/host/1": "beta"})
        assert watcher(board, process=1).leave(why)
        watcher(board)._judge({})
        assert board.verdict() == verdict


def test_the_first_word_counts():
    board = Board()
    judge = watcher(board)
    judge.decide("one")
    judge.decide("two")
    assert board.verdict() == "one" and judge.leave("was told to end") and not judge.leave("")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="an abort is put off on Linux only")
@pytest.mark.parametrize("there", [False, True])
def test_an_abort_waits_until_it_is_known_who_was_lost(there):
    script = f"""
import ctypes, threading
from difax.core import watch
from difax.core.hosts import Job
from tests.test_hosts import Board

class Both(Board):
    count = 0
    def key_value_dir_get(self, folder):
        if {there} and folder == "difax/beat":
            Both.count += 1
            return [("difax/beat/1", str(self.count))]
        return super().key_value_dir_get(folder)
    def blocking_key_value_get(self, key, limit):
        return "alpha"

watch.BEAT, watch.HASTE, watch.LIMIT, watch.GRACE = 0.1, 7.0, 8.0, 0.1
watch.begin(Both(**{{"difax/host/1": "beta"}}), Job("a:1", 2, 0, "DIFAX_PROCESSES"))
thread = threading.Thread(target=ctypes.CDLL(None).abort)
thread.start()
thread.join()
"""
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONFAULTHANDLER": ""}
    since = time.monotonic()
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=60)
    assert time.monotonic() - since > 7  # the six seconds of the handler are over
    lost = "difax: error: process 1 of 2 (host beta) was lost: no sign of life for 7 s\n"
    assert (done.returncode, done.stderr) == ((-signal.SIGABRT, "") if there else (1, lost))


@pytest.mark.parametrize("ending, said", [("", "noise\n"), ("end_now('lost', 1)", "difax: error: lost\n")])
def test_streams_are_pythons_own(ending, said, tmp_path):
    script = (
        "import os\nfrom difax.core.shell import end_now, own_streams\n"
        "with own_streams():\n"
        "    os.write(1, b'[Gloo] Rank 0\\n')\n    os.write(2, b'noise\\n')\n    print('table', flush=True)\n"
        f"    {ending or 'pass'}\n"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr, done.returncode) == ("table\n", said, 1 if ending else 0)


def test_auto_goes_on_where_a_run_is(tmp_path):
    assert resumes(tmp_path / "new", "auto") is False
    (tmp_path / "run").mkdir()
    assert resumes(tmp_path / "run", "auto") is False
    (tmp_path / "run" / "config.json").write_text(json.dumps({"train": {"steps": 1}}))
    assert resumes(tmp_path / "run", "auto") is True
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match="not empty"):
        resumes(tmp_path / "full", "auto")
    flags = ["train", "--config", "fmnist_smoke", "--workdir", "w"]
    given = [getattr(_parsed([*flags, *more]), "resume", None) for more in ([], ["--resume"], ["--resume", "auto"])]
    assert given == [False, True, "auto"]
    with pytest.raises(ValueError, match="--resume"):
        _parsed([*flags, "--resume", "always"])


def test_a_job_takes_over_its_own_lock_on_another_host(tmp_path, monkeypatch):
    left = {"what": "difax train", "pid": 1, "host": "another", "since": "then", "job": "slurm 7"}
    for job, fits in (("7", True), ("8", False)):
        monkeypatch.setenv("SLURM_JOB_ID", job)
        (tmp_path / LOCK).write_text(json.dumps(left))
        if fits:
            with locked(tmp_path, "difax train"):
                assert json.loads((tmp_path / LOCK).read_text())["job"] == "slurm 7"
            continue
        with pytest.raises(ValueError, match="on another"), locked(tmp_path, "difax train"):
            pass


def commands() -> list[list[str]]:
    """What the page gives to difax: lines of it, and arguments of the two scripts."""
    text = (LAUNCH / "README.md").read_text() + "".join(
        re.sub(r"\\\n#\s*", "", (LAUNCH / name).read_text()) for name in ("slurm.sh", "xpk.sh")
    )
    found = re.findall(r"(?:^(?:\w+=\S+ )*difax|^#.*?launch/\w+\.sh|`[^`\n]*launch/\w+\.sh) +([^`\n]+)", text, re.M)
    return [shlex.split(line) for line in found]


def test_the_page_is_of_commands_that_there_are():
    assert len(commands()) >= 9
    for arguments in commands():
        assert arguments[0] in ("train", "sample")
        options = _parsed(arguments)
        assert options is not None and (arguments[0] == "sample" or options.resume in (False, "auto"))
    for script in LAUNCH.glob("*.sh"):
        assert subprocess.run(["bash", "-n", str(script)], timeout=60).returncode == 0
        assert os.access(script, os.X_OK)


@pytest.fixture
def quickly(monkeypatch):
    """Processes of a job compile as quickly as the tests do, and find difax from any folder."""
    monkeypatch.setenv("XLA_FLAGS", with_flags())
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def test_two_processes_draw_the_images_of_one(small_weights, tmp_path, quickly):
    """Two of two devices; the second writes nothing, to no stream and no file."""
    arguments = two_hosts.sample_arguments(pathlib.Path(small_weights), tmp_path / "two.npz")
    both = two_hosts.run(arguments, 2, 2, patience=120)
    assert [process["code"] for process in both] == [0, 0], both
    assert both[1]["out"] == both[1]["err"] == both[0]["err"] == ""
    table = json.loads(both[0]["out"])
    assert table["processes"] == 2 and table["device"].endswith("x4")
    assert main(two_hosts.sample_arguments(pathlib.Path(small_weights), tmp_path / "one.npz")) == 0
    images = [np.load(tmp_path / f"{name}.npz")["samples"] for name in ("one", "two")]
    np.testing.assert_allclose(images[0], images[1], atol=1e-5)
    assert images[0].std() > 0.01


@pytest.mark.slow
def test_two_processes_train_as_one_and_are_sampled_on_one(tmp_path, quickly):
    rows = {row["part"]: row for row in two_hosts.measure(tmp_path, 2, 8, ["sample", "train"])}
    assert rows["sample"]["largest_difference"] < 1e-5 and not rows["sample"]["second_process_wrote"]
    assert rows["train"]["largest_difference_of_losses"] < 1e-5 and rows["train"]["sampled_on_one_device"]


@pytest.mark.slow
def test_a_process_that_is_killed_ends_the_other_and_the_same_command_goes_on(tmp_path, quickly):
    rows = two_hosts.measure(tmp_path, 2, 6, ["killed", "resumed"])
    for row in rows:
        if row["part"] == "killed":
            victim = re.search(r"process (\d)", row["killed"])
            assert victim is not None and row["others_exit_code"] == 1 and row["seconds"] < 60
            # of process 0 the file stays, and the kernel has let go of the lock
            assert row["others_lines"] == 1 and row["lock_left"] == (victim[1] == "0")
            line = row["others_last_line"]
            assert re.match(rf"difax: error: process {victim[1]} of 2 \(host \S+\) was lost: ", line), line
        else:
            assert row["largest_difference_of_losses"] < 1e-5 and row["from_step"] >= 4


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2])
def test_a_run_of_four_devices_goes_on_with_others(devices, tmp_path, quickly):
    data, run, whole = two_hosts.write_bars(tmp_path), tmp_path / "run", tmp_path / "whole"
    even = ("--config.train.warmup=0", "--config.train.decay=0")  # no rate that goes by the number of steps
    two_hosts.check(two_hosts.run(two_hosts.train_arguments(run, data, 4, *even), 4))
    with open_checkpoints(run) as checkpoints:
        assert checkpoints.latest_step() == 4
    two_hosts.check(two_hosts.run(two_hosts.train_arguments(run, data, 8, *even), devices))
    two_hosts.check(two_hosts.run(two_hosts.train_arguments(whole, data, 8, *even), 4))
    assert two_hosts.difference(two_hosts.losses(whole), two_hosts.losses(run)) < 1e-5


@pytest.mark.slow
def test_a_mistake_and_a_signal_end_both(small_weights, tmp_path, quickly):
    mistakes = ["sample", "--weights", small_weights, "--mesh", "data=2", "--out", str(tmp_path / "x.npz")]
    for process in two_hosts.run(mistakes, 2, 2, patience=120):
        assert process["code"] in (1, 2) and "mesh of 2 devices (data=2); allowed: 4" in process["err"], process
    data, run = two_hosts.write_bars(tmp_path), tmp_path / "run"
    both = two_hosts.begin(two_hosts.train_arguments(run, data, 4000), two_hosts.environment(2, 2))
    limit = time.monotonic() + 120
    while not (run / "log.jsonl").exists() and time.monotonic() < limit:
        time.sleep(0.1)
    both[1].send_signal(signal.SIGTERM)
    first, second = two_hosts.ended(both, 60)
    assert (second["code"], second["err"]) == (130, "difax: error: terminated\n")
    assert first["code"] == 1 and re.fullmatch(
        r"difax: error: process 1 of 2 \(host \S+\) was told to end\n", first["err"]
    )


@pytest.mark.slow
def test_nobody_comes(tmp_path, quickly):
    env = two_hosts.environment(1, 2)[1] | {"DIFAX_COORDINATOR": f"127.0.0.1:{two_hosts.free_port()}"}
    script = "from difax.core import hosts\nhosts.start(patience=5)"
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=120)
    assert "LostHost: process 1 did not meet process 0" in done.stderr
