"""Training: exact resume after kill -9, data parallelism, refusals, and the files of a run."""

import gzip
import json
import os
import pathlib
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
from difax.program import previewer
from difax.training.data import batches, fashion_mnist, read_idx
from difax.training.train import TrainOptions, restore_ema, schedule, train

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
    with pytest.raises(ValueError, match="cannot be written|not empty"):
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
        state = train(task, data, options, tmp_path / "parts", config, bool(steps), progress=False, minutes=0.0001)
        steps.append(int(state.step))
    assert steps == [1, 2, 3]
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


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
