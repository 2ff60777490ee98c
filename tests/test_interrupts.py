"""Processes that are told to end, or killed: one line or none, the exit code, nothing half-written, and the same
command goes on. What counts is the outcome, not when it came."""

import errno
import fcntl
import json
import os
import pathlib
import platform
import random
import signal
import subprocess
import sys
import threading
import time

import pytest
from safetensors.numpy import load_file

from difax.cli import main
from difax.core.lock import LOCK, locked
from difax.core.writing import append_line, replacing

ROOT = pathlib.Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"
CONVERT = ["convert", str(GOLDEN / "dit_diffusers.safetensors"), "dst", "--geometry", "heads=4", "--geometry", "size=8"]
PATIENCE = 120  # seconds until a process that should have ended counts as one that hangs
WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
DONE = ("asks for no more", "exists already")  # said to the next one where a signal came when all of it was done

pytestmark = pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(), reason="needs Linux's /proc")


@pytest.fixture(autouse=True)
def heard():
    """A child of a process that ignores Ctrl-C, such as one in the background of a script, would ignore it too."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def start(arguments: list[str], env: dict[str, str], folder: pathlib.Path) -> subprocess.Popen:
    """A process of a command that has begun to listen to signals: before that it is Python's."""
    process = subprocess.Popen(
        [sys.executable, *arguments],
        env=env,
        cwd=folder,
        text=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    until(process, lambda: listens(process.pid))
    return process


def until(process: subprocess.Popen, there) -> None:
    end = time.monotonic() + PATIENCE
    while not there() and process.poll() is None:
        assert time.monotonic() < end
        time.sleep(0.002)


def listens(pid: int) -> bool:
    """Whether a process catches SIGTERM."""
    try:
        lines = pathlib.Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return False
    caught = next((int(line.split()[1], 16) for line in lines if line.startswith("SigCgt")), 0)
    return bool(caught >> (signal.SIGTERM - 1) & 1)


def tell(process: subprocess.Popen, number: signal.Signals) -> int:
    """Sends a signal, and checks how the process ends: 0 where it was done before, or by a process before it."""
    process.send_signal(number)
    _, said = process.communicate(timeout=PATIENCE)
    if process.returncode == 2 and any(word in said for word in DONE):
        return 0
    if number == signal.SIGKILL:
        assert process.returncode in (-signal.SIGKILL, 0), said
        assert said == ""
    else:
        assert (process.returncode, said) in [(130, f"difax: error: {WORDS[number]}\n"), (0, "")]
    return process.returncode


def leftovers(folder: pathlib.Path) -> list[str]:
    """What only a process that is still at work may have in a folder."""
    return [str(p) for p in folder.rglob("*") if ".part" in p.name or "tmp" in p.name or p.name == ".difax.lock"]


def written(folder: pathlib.Path) -> bool:
    return any(".part" in p.name for p in folder.iterdir())


DEAF = """
import hashlib, pathlib, sys
from difax.core.shell import end_at_signals, undone
end_at_signals()
half = pathlib.Path("half")
with undone(lambda: half.unlink(missing_ok=True)):
    half.write_text("of it")
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)  # minutes in C, as a compilation is
"""


@pytest.mark.parametrize("number", WORDS)
def test_a_process_ends_while_it_is_deep_in_c(number, tmp_path, user_env):
    process = start(["-c", DEAF], user_env, tmp_path)
    until(process, (tmp_path / "half").exists)
    assert tell(process, number) == 130
    assert list(tmp_path.iterdir()) == []


# Ctrl-C as soon as the process imports anything of its own, and a signal while the interpreter is taken down
EARLY = """
import os, signal, sys
class Finder:
    def find_spec(name, path, target=None):
        if name == "difax.core.shell":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder)
from difax.__main__ import run
run()
"""
LATE = """
import atexit, os, signal, time
import difax.cli
def main():
    atexit.register(lambda: [os.kill(os.getpid(), signal.SIGINT), time.sleep(60)])
    return CODE
difax.cli.main = main
from difax.__main__ import run
run()
"""
AT_THE_EDGES = {
    "early": (EARLY, 130, "difax: error: interrupted\n"),
    "done": (LATE.replace("CODE", "0"), 0, ""),
    "refused": (LATE.replace("CODE", "2"), 2, ""),
}


@pytest.mark.parametrize("name", AT_THE_EDGES)
def test_signals_before_and_after_the_work(name, user_env, tmp_path):
    program, code, said = AT_THE_EDGES[name]
    found = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=user_env, capture_output=True, text=True, timeout=PATIENCE
    )
    assert (found.returncode, found.stderr) == (code, said)


def test_what_the_parent_ignores_stays_ignored(tmp_path, user_env):
    program = "from difax.core.shell import end_at_signals; end_at_signals(); import os, signal; "
    program += "os.kill(os.getpid(), signal.SIGINT); open('on', 'w')"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    assert subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=user_env).returncode == 0
    assert (tmp_path / "on").exists()


def test_one_command_at_several_moments(tmp_path, user_env):
    """While it imports, while it writes, killed while it writes; and then it goes on."""
    command = ["-m", "difax", *CONVERT]
    rng = random.Random(0)
    process = start(command, user_env, tmp_path)
    time.sleep(rng.uniform(0, 0.3))
    assert tell(process, signal.SIGINT) == 130
    for number in (signal.SIGTERM, signal.SIGKILL):
        assert list(tmp_path.iterdir()) == []
        process = start(command, user_env, tmp_path)
        until(process, lambda: written(tmp_path))
        if tell(process, number) == 0:  # it was quicker
            (tmp_path / "dst").rename(tmp_path.parent / f"done{number}")
    done = subprocess.run([sys.executable, *command], cwd=tmp_path, env=user_env, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert [p.name for p in tmp_path.iterdir()] == ["dst"]


def test_what_a_killed_process_left_goes_and_what_lives_stays(tmp_path):
    import difax.core.writing as writing

    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    names = {
        "dead": f".a.png.{writing._HOST}.{int(dead.stdout)}.part",
        "alive": f".b.png.{writing._HOST}.{os.getppid()}.part",
        "elsewhere": f".c.png.another-{writing._HOST}.{int(dead.stdout)}.part",
        "someone's": ".d.part",
    }
    for name in names.values():
        (tmp_path / name).write_text("half")
    (tmp_path / f".e.{writing._HOST}.{int(dead.stdout)}.part" / "deep").mkdir(parents=True)
    long = "n" * 251 + ".txt"
    with replacing(tmp_path / long) as aside:
        aside.write_text("whole")
    there = {p.name for p in tmp_path.iterdir()}
    assert there == {long, names["alive"], names["elsewhere"], names["someone's"]}


# threads as orbax and tensorstore have them, of which no signal knows: they fill a folder under another name, make it
# anew where it is gone, and rename it when it is whole
WRITERS = """
import hashlib, pathlib, threading
from difax.core.lock import locked
from difax.core.shell import end_at_signals, undone
from difax.core.writing import remove_unfinished
end_at_signals()
folder = pathlib.Path("run").absolute()

def write(which):
    for n in range(10**9):
        half = folder / f"{which}_{n}.orbax-checkpoint-tmp"
        for name in "abcdefgh":
            half.mkdir(exist_ok=True)
            with open(half / name, "w"):
                pass
        half.rename(folder / f"{which}_{n}")

folder.mkdir()
with locked(folder, "difax train"), undone(remove_unfinished, folder):
    for which in range(3):
        threading.Thread(target=write, args=(which,), daemon=True).start()
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
"""


@pytest.mark.parametrize("turn", range(4))
def test_what_threads_still_write_is_there_whole_or_not_at_all(turn, tmp_path, user_env):
    process = start(["-c", WRITERS], user_env, tmp_path)
    until(process, (tmp_path / "run" / f"1_{turn}").exists)
    assert tell(process, [signal.SIGTERM, signal.SIGINT][turn % 2]) == 130
    for made in (tmp_path / "run").iterdir():
        assert made.name.replace("_", "").isdigit() and len(list(made.iterdir())) == 8


def test_a_lock_without_the_kernels(tmp_path, monkeypatch):
    """Some file systems have none: then the process that the file names counts, as long as it lives."""

    def none(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    path = tmp_path / LOCK
    owner = {"what": "difax pareto", "pid": os.getppid(), "host": platform.node(), "since": "now"}
    path.write_text(json.dumps(owner))
    with pytest.raises(ValueError, match=rf"difax pareto \(process {os.getppid()} on .*since now\) writes there"):
        with locked(tmp_path, "difax train"):
            pass
    for left in (json.dumps(owner | {"pid": 2**22 + 1}), json.dumps(owner)[:20], "[]", ""):
        path.write_text(left)
        with locked(tmp_path, "difax train"):
            assert json.loads(path.read_text())["pid"] == os.getpid()
        assert not path.exists()


@pytest.mark.parametrize("name", ["link", "folder", "pipe"])
def test_a_lock_that_is_no_file_is_left_alone(name, tmp_path):
    """A link in a folder of someone else would have what it points to written over."""
    other = tmp_path / "other"
    other.write_text("precious")
    (tmp_path / "run").mkdir()
    path = tmp_path / "run" / LOCK
    {"link": lambda: path.symlink_to(other), "folder": path.mkdir, "pipe": lambda: os.mkfifo(path)}[name]()
    with pytest.raises(ValueError, match=rf"{LOCK}: is no file"), locked(path.parent, "difax train"):
        pass
    assert other.read_text() == "precious" and os.path.lexists(path)


def test_a_sweep_is_that_of_one_process(tmp_path, small_weights, capsys):
    command = ["pareto", "--weights", small_weights, "--set", "steps=1", "--methods", "steps=2", "--no-judge"]
    (tmp_path / "sweep").mkdir()
    with locked(tmp_path / "sweep", "difax pareto"):
        assert main([*command, "--seeds", "1", "--quiet", "--out", str(tmp_path / "sweep")]) == 2
    said = capsys.readouterr().err
    assert "difax pareto (process" in said and said.count("\n") == 1
    assert not (tmp_path / "sweep" / "rows.jsonl").exists()


def test_lines_of_several_writers_stay_whole(tmp_path):
    path = tmp_path / "log.jsonl"
    texts = [str(n) * 20_000 for n in range(4)]
    writers = [threading.Thread(target=lambda t=t: [append_line(path, t) for _ in range(20)]) for t in texts]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert sorted(path.read_text().splitlines()) == sorted(texts * 20)


def test_main_leaves_the_handlers_of_whoever_calls_it(capsys):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    streams = sys.stdout, sys.stderr, sys.excepthook, threading.excepthook, sys.unraisablehook
    assert main(["list", "solvers"]) == 0
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before
    assert (sys.stdout, sys.stderr, sys.excepthook, threading.excepthook, sys.unraisablehook) == streams


# command -> arguments, and what it leaves when it is done
TINY = ["--config", "fmnist_smoke", "--config.model.depth=2", "--config.model.width=32", "--quiet"]
FEW = ["--config.train.steps=6", "--config.train.checkpoint_every=1", "--config.train.sample_every=3"]
COMMANDS = {
    "train": (["train", *TINY, *FEW, "--data", "{data}", "--workdir", "run"], ["run"]),
    "pareto": (
        ["pareto", "--weights", "{weights}", "--set", "steps=2", "--methods", "steps=1", "cache.name=none", "--seeds"]
        + ["2", "--batch", "2", "--turns", "1", "--no-judge", "--quiet", "--out", "sweep"],
        ["sweep"],
    ),
    "convert": (CONVERT, ["dst"]),
    "calibrate": (
        ["calibrate", "--cache", "smoothcache", "--weights", "{weights}", "--steps", "2", "--samples", "2", "--batch"]
        + ["2", "--quiet", "--out", "c.json"],
        ["c.json"],
    ),
    "export": (["export", "--workdir", "{run}", "--out", "w.safetensors"], ["w.safetensors"]),
}


@pytest.fixture(scope="module")
def filled(tmp_path_factory, data_dir, small_weights, user_env):
    """The arguments of a command with the paths of this session; export's run is made when it is asked for."""
    folder = tmp_path_factory.mktemp("filled")

    def fill(name: str) -> list[str]:
        paths = {"data": str(data_dir), "weights": small_weights, "run": str(folder / "run")}
        if name == "export" and not (folder / "run").exists():
            subprocess.run([sys.executable, *fill("train")], cwd=folder, env=user_env, check=True)
        return ["-m", "difax", *(word.format(**paths) for word in COMMANDS[name][0])]

    return fill


def whole(name: str, folder: pathlib.Path) -> None:
    """Whether what a command leaves when it is done is there, and all of it."""
    assert sorted(p.name for p in folder.iterdir()) == COMMANDS[name][1]
    assert leftovers(folder) == []
    if name == "train":
        rows = [json.loads(line) for line in (folder / "run" / "log.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
        assert sorted(p.name for p in (folder / "run" / "checkpoints").iterdir()) == ["5", "6"]
    elif name == "pareto":
        rows = [json.loads(line) for line in (folder / "sweep" / "rows.jsonl").read_text().splitlines()]
        assert sorted(row["method"] for row in rows) == ["baseline", "cache.name=none", "steps=1"]
        assert (folder / "sweep" / "index.html").exists() or list((folder / "sweep").glob("*.html"))
    elif name == "calibrate":
        assert json.loads((folder / "c.json").read_text())["technique"] == "smoothcache"
    elif name == "export":
        assert load_file(folder / "w.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_commands_at_ten_moments(name, tmp_path, filled, user_env):
    """kill -9, SIGTERM and Ctrl-C, one after the other in the same folder, at ten moments of a command's time."""
    command = filled(name)
    for folder in ("first", "measured"):  # the first one fills the cache of compilations
        (tmp_path / folder).mkdir()
        begun = time.monotonic()
        subprocess.run([sys.executable, *command], cwd=tmp_path / folder, env=user_env, check=True)
        seconds = time.monotonic() - begun
    whole(name, tmp_path / "measured")
    rng, ended = random.Random(name), 0
    for moment in range(10):
        here = tmp_path / str(moment)
        here.mkdir()
        done = False
        for number in rng.sample([signal.SIGKILL, signal.SIGTERM, signal.SIGINT], 3):
            more = ["--resume"] if name == "train" and (here / "run" / "config.json").exists() else []
            before = leftovers(here)  # of a kill -9, which may outlive a start that ends before it looks
            process = start([*command, *more], user_env, here)
            time.sleep(seconds * (moment + rng.random()) / 10)
            done = tell(process, number) == 0
            if done:
                break
            ended += 1
            if number != signal.SIGKILL:
                assert set(leftovers(here)) <= set(before)
        if not done:
            more = ["--resume"] if name == "train" and (here / "run" / "config.json").exists() else []
            again = subprocess.run(
                [sys.executable, *command, *more], cwd=here, env=user_env, capture_output=True, text=True
            )
            assert again.returncode == 0 or any(word in again.stderr for word in DONE), again.stderr
        whole(name, here)
    print(f"{name}: {ended} processes ended before they were done, of {seconds:.1f} s each")
    assert ended >= 5
