"""Training: exact resume after kill -9, data parallelism, refusals, and the files of a run."""

import gzip
import itertools
import json
import os
import pathlib
import platform
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from difax.build import build_options, build_task
from difax.cli import main
from difax.config import load_config, override
from difax.core.lock import locked
from difax.program import previewer
from difax.training.data import Images, batches, fashion_mnist, read_idx
from difax.training.train import Task, TrainOptions, restore_ema, schedule, train
from tests.families import some

ROOT = pathlib.Path(__file__).resolve().parent.parent
SMALL = [
    ("model.depth", 2),
    ("model.width", 32),
    ("train.devices", 2),
    ("train.steps", 8),
    ("train.batch", 8),
    ("train.checkpoint_every", 4),
]


def start(folder, data_dir, config=None, resume=False, extra=(), name="fmnist_smoke"):
    config = config or override(load_config(name), [*SMALL, *extra])
    options = build_options(config)
    data = fashion_mnist("train", data_dir)
    return train(build_task(config, previewer), data, options, folder, config, resume, progress=False)


SAMPLED = [("train.sample_every", 4)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, data_dir):
    """The folder of a run of eight steps, and its state."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    return folder, start(folder, data_dir, extra=SAMPLED)


@pytest.fixture
def run(finished, tmp_path):
    """A copy of that folder, to go on with."""
    return pathlib.Path(shutil.copytree(finished[0], tmp_path / "run"))


def losses(folder: pathlib.Path) -> dict[int, float]:
    return {r["step"]: r["loss"] for r in map(json.loads, (folder / "log.jsonl").read_text().splitlines())}


@pytest.mark.slow
def test_killed_run_resumes_with_the_same_losses(tmp_path, data_dir, user_env):
    """kill -9 in the middle of 40 steps, then --resume: every logged loss equals the uninterrupted run's."""
    base = [sys.executable, "-m", "difax", "train", "--config", str(ROOT / "configs/fmnist_smoke.py")]
    base += ["--config.model.depth=1", "--config.model.width=32", "--config.train.sample_every=1000"]
    base += ["--data", str(data_dir), "--quiet", "--workdir"]
    subprocess.run([*base, str(tmp_path / "whole")], env=user_env, check=True, stdout=subprocess.DEVNULL)
    killed = tmp_path / "killed"
    process = subprocess.Popen([*base, str(killed)], env=user_env, stdout=subprocess.DEVNULL)
    log = killed / "log.jsonl"
    deadline = time.monotonic() + 300
    while not (log.exists() and log.read_text().count("\n") >= 20):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    reached = max(losses(killed))
    assert 20 <= reached < 40
    subprocess.run([*base, str(killed), "--resume"], env=user_env, check=True, stdout=subprocess.DEVNULL)
    assert losses(killed) == losses(tmp_path / "whole")
    assert sorted(losses(killed)) == list(range(1, 41))


def test_run_leaves_its_files(finished):
    run, state = finished
    assert int(state.step) == 8
    assert sorted(losses(run)) == list(range(1, 9))
    assert [p.name for p in sorted((run / "samples").glob("*.png"))] == ["0000004.png", "0000008.png"]
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["4", "8"]
    assert list((run / "events").iterdir())
    step, ema = restore_ema(run, build_task(load_small()).init)
    assert step == 8
    jax.tree.map(np.testing.assert_array_equal, ema, jax.device_get(state.ema))


def load_small():
    return override(load_config("fmnist_smoke"), SMALL)


def test_wrong_shape_checkpoint_names_the_tensor(run):
    other = build_task(override(load_small(), [("model.width", 48), ("model.heads", 2)]))
    with pytest.raises(ValueError, match=r"tensor blocks/ada/bias is \(2, 192\), expected \(2, 288\)"):
        restore_ema(run, other.init)


@pytest.mark.slow
def test_one_device_and_eight_agree(tmp_path, data_dir):
    assert len(jax.devices()) == 8
    for devices in (1, 8):
        start(tmp_path / str(devices), data_dir, extra=[("train.devices", devices)])
    one, eight = losses(tmp_path / "1"), losses(tmp_path / "8")
    assert one.keys() == eight.keys()
    np.testing.assert_allclose(list(one.values()), list(eight.values()), rtol=2e-4)


@pytest.mark.slow
def test_resume_keeps_the_trajectory_and_may_go_on(tmp_path, data_dir):
    start(tmp_path / "whole", data_dir, extra=[("train.steps", 12)])
    start(tmp_path / "parts", data_dir)
    start(tmp_path / "parts", data_dir, extra=[("train.steps", 12)], resume=True)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


RESUMES = {
    "other configuration": ([("train.learning_rate", 0.5)], "train.learning_rate is 0.001 there, 0.5 now"),
    "no more steps": ([("train.steps", 8)], "at step 8 already"),
}


@pytest.mark.parametrize("name", RESUMES)
def test_resume_refusals(name, run, data_dir):
    extra, message = RESUMES[name]
    with pytest.raises(ValueError, match=message):
        start(run, data_dir, extra=[*SAMPLED, *extra], resume=True)


def test_steps_may_not_change_within_the_decay(tmp_path, data_dir):
    decay = [("train.decay", 4), ("train.warmup", 2)]
    start(tmp_path / "run", data_dir, extra=[*decay, ("train.steps", 8), ("train.checkpoint_every", 2)])
    with pytest.raises(ValueError, match="within the final decay"):
        start(tmp_path / "run", data_dir, extra=[*decay, ("train.steps", 12)], resume=True)


def test_folder_refusals(tmp_path, data_dir):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    with pytest.raises(ValueError, match="not empty"):
        start(tmp_path / "full", data_dir)
    with pytest.raises(ValueError, match="no training run there"):
        start(tmp_path / "new", data_dir, resume=True)
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is no folder"):
        start(tmp_path / "file" / "run", data_dir)


def test_non_finite_loss_names_the_step_and_keeps_the_last_good_checkpoint(run, data_dir):
    config = override(load_small(), [*SAMPLED, ("train.steps", 12)])
    task = build_task(config)

    def loss(params, batch, key):
        value, metrics = task.loss(params, batch, key)
        return value * jax.numpy.inf, metrics

    data = fashion_mnist("train", data_dir)
    with pytest.raises(FloatingPointError, match="step 9"):
        train(task._replace(loss=loss), data, build_options(config), run, config, True, progress=False)
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["4", "8"]
    assert restore_ema(run, task.init)[0] == 8


@pytest.mark.slow
def test_ddpm_trains(tmp_path, data_dir):
    start(tmp_path / "run", data_dir, name="fmnist_smoke:ddpm", extra=[("train.steps", 30), ("steps", 4)])
    values = losses(tmp_path / "run")
    assert np.mean([values[s] for s in range(26, 31)]) < 0.8 * np.mean([values[s] for s in range(1, 4)])


@pytest.mark.parametrize(
    "field, value", [("steps", 0), ("batch", 0), ("ema", 1.0), ("learning_rate", 0.0), ("decay", 9), ("warmup", -1)]
)
def test_option_refusals(field, value):
    with pytest.raises(ValueError, match=field):
        TrainOptions(**{"steps": 8, field: value})


def test_mesh_and_batch_refusals(tmp_path, data_dir):
    for extra, message in (
        ([("train.devices", 0)], "devices=0; allowed: 1 ... 8"),
        ([("train.devices", 9)], "devices=9"),
        ([("train.batch", 9)], "batch=9 must be divisible by the 2 devices"),
        ([("train.batch", 65), ("train.devices", 1)], "batch=65; allowed: 1 ... 64"),
    ):
        with pytest.raises(ValueError, match=message):
            start(tmp_path / "run", data_dir, extra=extra)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("setting, word", [("train.devices=0", "devices=0"), ("train.batch=7", "batch=7")])
def test_command_line_refusals_write_nothing(setting, word, tmp_path, data_dir, capsys):
    run = str(tmp_path / "run")
    arguments = ["--config", "fmnist_smoke", "--workdir", run, "--data", str(data_dir), f"--config.{setting}"]
    assert main(["train", *arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith("difax: error: ") and err.count("\n") == 1 and word in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_slices_of_a_run_are_the_run(tmp_path, data_dir):
    """A run stopped by `minutes` leaves a checkpoint, and goes on from it on the same losses."""
    config = override(load_small(), [("train.steps", 3), ("train.warmup", 1)])
    start(tmp_path / "whole", data_dir, config)
    options, data, task = build_options(config), fashion_mnist("train", data_dir), build_task(config)
    steps = []
    while not steps or steps[-1] < options.steps:
        clock = itertools.count(step=3600).__next__
        state = train(
            task, data, options, tmp_path / "parts", config, bool(steps), progress=False, minutes=1, clock=clock
        )
        steps.append(int(state.step))
    assert steps == [1, 2, 3]
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


# A model of three numbers on images of three: what the loop does, without the seconds of compiling a network.
PLAIN = {"train": {"steps": 8}}


def plain_data(black: int | None = None) -> Images:
    image = np.full((64, 2, 2, 1), 200, np.uint8)
    if black is not None:
        image[black] = 0
    return Images(image, np.zeros(64, np.int32))


def plain_loss(params, batch, key):
    """Finite at a black image, where its slope is not."""
    x = batch["image"].astype("float32").reshape(len(batch["image"]), -1)[:, :3] / 255
    return jax.numpy.mean((jax.numpy.sqrt(((params["w"][None] * x) ** 2).sum(-1)) - 1.0) ** 2), {}


def plain_init(key):
    return {"w": jax.numpy.ones((3,))}


def plain_train(folder, resume=False, data=None, task=None, clock=None, minutes=None, **options):
    options = TrainOptions(**{"steps": 8, "batch": 8, "log_every": 1, "checkpoint_every": 1, "devices": 1, **options})
    task = task or Task(plain_init, plain_loss)
    config = {"train": {"steps": options.steps}}
    more = {} if clock is None else {"clock": clock, "minutes": minutes}
    return train(task, data or plain_data(), options, folder, config, resume, progress=False, **more)


def kept(folder) -> list[int]:
    return sorted(int(p.name) for p in (folder / "checkpoints").iterdir())


@pytest.mark.parametrize("seed, every", [(0, 1), (5, 2)])
def test_nothing_is_kept_of_a_gradient_that_is_not_finite(seed, every, tmp_path):
    """The loss of that step is finite, and the weights after it are not."""
    data, at = plain_data(40), next(s for s in range(8) if 40 in batches(64, 8, seed)(s)) + 1
    last = (at - 1) // every * every
    for resume in (False, True):
        with pytest.raises(FloatingPointError, match=f"gradient_norm is nan at step {at};"):
            plain_train(tmp_path / "run", resume, data, seed=seed, checkpoint_every=every, log_every=8)
        assert max(kept(tmp_path / "run")) == last
        step, weights = restore_ema(tmp_path / "run", plain_init)
        assert step == last and np.all(np.isfinite(weights["w"]))


BAD = {
    "an update that overflows": (
        {"learning_rate": 1e38, "weight_decay": 1e3},
        plain_init,
        "update_norm is (inf|nan) at step 1",
    ),
    "a weight that nobody asks": (
        {},
        lambda key: {"w": jax.numpy.ones((3,)), "unused": jax.numpy.array([1.0, jax.numpy.inf])},
        "params/unused is not finite after step 1",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_nothing_is_kept_of_weights_that_are_not_finite(name, tmp_path):
    options, init, message = BAD[name]
    task = Task(init, plain_loss, lambda params: pytest.fail("a picture of them"))
    for every in (1, 100):
        often = {"checkpoint_every": every, "log_every": every, "sample_every": 1}
        with pytest.raises(FloatingPointError, match=message):
            plain_train(tmp_path / str(every), task=task, **options, **often)
        assert kept(tmp_path / str(every)) == []


def test_minutes_are_those_of_training(tmp_path):
    """On a clock of which the first step takes an hour (it compiles), every other a second, and a preview an hour."""
    now = [0.0]

    def preview(params):
        now[0] += 3600
        return np.zeros((2, 2), np.uint8)

    def clock():
        now[0] += 1 if now[0] else 3600
        return now[0]

    task = Task(plain_init, plain_loss, preview)
    state = plain_train(tmp_path / "run", task=task, clock=clock, minutes=5.5 / 60, sample_every=1, checkpoint_every=8)
    # each step asks the clock once, each preview twice, of which the second is not counted: 1, 3, 5 and 7 seconds
    assert int(state.step) == 4 and now[0] > 4 * 3600


def damage(name: str, step: pathlib.Path) -> None:
    files = [p for p in step.rglob("*") if p.is_file()]
    if name == "emptied":
        for path in files:
            path.write_bytes(b"")
    elif name == "metadata":
        for path in files:
            if "METADATA" in path.name or path.suffix == ".json":
                path.write_text("{")
    elif name == "cut":
        for path in files:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif name == "pipe":
        files[0].unlink()
        os.mkfifo(files[0])
    elif name == "gone":
        for path in files:
            path.unlink()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "run"
    plain_train(folder, steps=3)
    return folder


@pytest.fixture
def copy(trained, tmp_path):
    return pathlib.Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.mark.parametrize("name", some(["emptied", "metadata", "cut", "pipe", "gone"], "emptied", "cut", "pipe"))
def test_a_damaged_checkpoint_is_named_and_the_one_before_it(name, copy):
    damage(name, copy / "checkpoints" / "3")
    for read in (lambda: restore_ema(copy, plain_init), lambda: plain_train(copy, True, steps=4)):
        with pytest.raises(ValueError, match=r"run.checkpoints.3: .*remove that folder to go on from step 2"):
            read()
    shutil.rmtree(copy / "checkpoints" / "3")
    assert int(plain_train(copy, True, steps=4).step) == 4


def test_a_checkpoint_that_is_not_finite_is_refused(copy, monkeypatch):
    import difax.training.checkpoints as module

    monkeypatch.setattr(module, "not_finite", lambda tree: ["ema/w"])
    with pytest.raises(ValueError, match="checkpoints.3: ema/w is not finite; remove that folder"):
        restore_ema(copy, plain_init)


def test_a_damaged_log_goes_on(copy, capsys):
    """Lines that cannot be read go: silently the last one, which was being written, and by number in the middle."""
    log = copy / "log.jsonl"
    lines = log.read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]
    log.write_text("\n".join([*lines, lines[2][:20]]))
    for folder in ("samples", "events"):
        shutil.rmtree(copy / folder)
    assert int(plain_train(copy, True, steps=4).step) == 4
    assert sorted(losses(copy)) == [1, 2, 3, 4] and capsys.readouterr().err == ""
    whole = log.read_bytes().splitlines()
    log.write_bytes(b"\n".join([whole[0], b"\xff\x00{", b"[3]", *whole[1:]]) + b"\n")
    assert int(plain_train(copy, True, steps=5).step) == 5
    assert sorted(losses(copy)) == [1, 2, 3, 4, 5] and "line 2 is damaged" in capsys.readouterr().err


def test_what_a_killed_run_left_goes(copy):
    half = copy / "checkpoints" / "4.orbax-checkpoint-tmp-17" / "default"
    half.mkdir(parents=True)
    (half / "x").write_text("half")
    (copy / ".difax.lock").write_text(json.dumps({"what": "difax train", "pid": 2**22 + 1, "host": platform.node()}))
    assert int(plain_train(copy, True, steps=4).step) == 4
    assert sorted(p.name for p in copy.iterdir()) == ["checkpoints", "config.json", "events", "log.jsonl", "samples"]
    assert kept(copy) == [3, 4]


def test_one_process_at_a_time(copy):
    before = (copy / "log.jsonl").read_text()
    with locked(copy, "difax train"):
        with pytest.raises(ValueError, match=rf"difax train \(process {os.getpid()} on .*, since 20.*\) writes there"):
            plain_train(copy, True, steps=4)
    assert (copy / "log.jsonl").read_text() == before and not (copy / ".difax.lock").exists()
    owner = {"what": "difax train", "pid": 1, "host": "elsewhere", "since": "2026-01-01"}
    (copy / ".difax.lock").write_text(json.dumps(owner))
    with pytest.raises(ValueError, match="process 1 on elsewhere.*if that process is gone, remove .*difax.lock"):
        plain_train(copy, True, steps=4)
    assert json.loads((copy / ".difax.lock").read_text()) == owner


def test_a_folder_that_cannot_be_a_run(copy, tmp_path):
    (copy / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match="config.json: a list; allowed: an object with train"):
        plain_train(copy, True)
    with pytest.raises(ValueError, match="workdir is empty"):
        plain_train("")
    (copy / "config.json").write_text('{"train": {"steps": 4}}')
    (copy / "log.jsonl").unlink()
    os.mkfifo(copy / "log.jsonl")  # whoever reads it waits
    with pytest.raises(ValueError, match="log.jsonl: is no file"):
        plain_train(copy, True)
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / ".difax.lock").write_text("")  # of one that was killed before it had begun
    assert int(plain_train(tmp_path / "new", steps=1).step) == 1


def test_folder_flags_and_data_come_before_what_does_not_fit_together(tmp_path, data_dir, capsys):
    """Each mistake is named while those behind it are still there, and nothing is made."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    wrong = {
        "--workdir": (str(tmp_path / "full"), str(tmp_path / "run"), "not empty"),
        "--minutes": ("0", "1", "--minutes=0.0"),
        "--data": (str(tmp_path / "none"), str(data_dir), str(tmp_path / "none")),
        "--config.train.steps": ("3", "8", "train.warmup + train.decay = 5 exceeds train.steps=3"),
        "--config.train.batch": ("65", "8", "batch=65"),
    }
    now = {flag: bad for flag, (bad, _, _) in wrong.items()}
    for flag, (_, good, word) in wrong.items():
        arguments = [word for pair in now.items() for word in pair]
        assert main(["train", "--config", "fmnist_smoke", "--config.train.devices=1", *arguments]) == 2
        err = capsys.readouterr().err
        assert word in err and err.count("\n") == 1, err
        now[flag] = good
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full"]


def test_schedule():
    rate = schedule(TrainOptions(steps=100, learning_rate=2.0, warmup=10, decay=20))
    values = [float(np.asarray(rate(step))) for step in (0, 4, 9, 50, 80, 90, 99)]
    np.testing.assert_allclose(values, [0.2, 1.0, 2.0, 2.0, 2.0, 1.0, 0.1], rtol=1e-6)


def test_batches_are_a_function_of_seed_and_step():
    first, again, other = batches(50, 10, 0), batches(50, 10, 0), batches(50, 10, 1)
    epoch = np.concatenate([first(step) for step in range(5)])
    assert sorted(epoch) == list(range(50))
    np.testing.assert_array_equal(first(7), again(7))
    assert not np.array_equal(first(0), other(0))
    assert not np.array_equal(epoch, np.concatenate([first(step) for step in range(5, 10)]))


def test_idx_files(tmp_path, data_dir):
    data = fashion_mnist("test", data_dir)
    assert data.image.shape == (64, 28, 28, 1) and data.label.dtype == np.int32
    path = tmp_path / "x"
    for content, message in (
        (b"\x00\x00\x08\x01\x00\x00\x00\x05abc", "3 bytes of data, but its header says"),
        (b"not idx at all", "not an idx file"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_idx(path, 1)
    broken = tmp_path / "y.gz"
    broken.write_bytes(gzip.compress(os.urandom(1000))[:500])
    with pytest.raises(ValueError, match="not a whole gzip file"):
        read_idx(broken, 1)
    with pytest.raises(ValueError, match="allowed: train, test"):
        fashion_mnist("valid", data_dir)
