"""Settings of every test run: eight CPU devices, quick compilation, strict ranks, no compilation cache of the user."""

import gzip
import importlib.util
import os
import pathlib
import sys
from collections import Counter

import pytest

from tests.families import LONGEST, family, table
from tests.quick import with_flags

if "jax" in sys.modules:
    raise pytest.UsageError("jax was imported before tests/conftest.py could ask it for eight CPU devices")

ROOT = pathlib.Path(__file__).resolve().parent.parent

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = with_flags(os.environ.get("XLA_FLAGS", ""), xla_force_host_platform_device_count=8)

import jax  # noqa: E402
import numpy as np  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_enable_compilation_cache", False)


# a harness that needs Triton at its top, which pytest would import to look for examples
collect_ignore = [] if importlib.util.find_spec("triton") else ["triton_interpreter.py"]

SECONDS: Counter[str] = Counter()
TESTS: Counter[str] = Counter()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take longest go first, so that the last of them does not keep one process while the other is done."""
    order = {f"test_{stem}.py": i for i, stem in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    SECONDS[family(report.nodeid)] += report.duration
    TESTS[family(report.nodeid)] += report.when == "call"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The seconds of each family, in the process that all reports come to."""
    if sum(TESTS.values()) > 200:
        terminalreporter.section("seconds by family")
        for line in table(SECONDS, TESTS):
            terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def user_env(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment of a subprocess that runs difax as a user does, from any folder, but for quick compilation.

    One CPU device; caches in one temporary folder per session, so that a command given twice compiles once.
    """
    cache = tmp_path_factory.mktemp("cache")
    env = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_", "PYTEST_"))}
    return env | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": with_flags(),
        "JAX_COMPILATION_CACHE_DIR": str(cache / "jax"),
        "XDG_CACHE_HOME": str(cache),
        "PYTHONPATH": str(ROOT),
    }


@pytest.fixture(scope="session")
def small_weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file of random weights without zeros, of a DiT of two blocks on 28 x 28 grey images, with its settings."""
    from difax.build import build_setup
    from difax.config import load_config, override
    from difax.weights.checkpoint import save_safetensors
    from tests.toys import randomise

    config = override(load_config("fmnist_smoke"), [("model.depth", 2), ("model.width", 32)])
    path = tmp_path_factory.mktemp("small") / "w.safetensors"
    params = randomise(jax.eval_shape(build_setup(config).model.init, jax.random.key(0)))
    save_safetensors(path, params, {"config": config})
    return str(path)


def write_idx(path: pathlib.Path, array: np.ndarray) -> None:
    header = bytes([0, 0, 8, array.ndim]) + np.asarray(array.shape, ">u4").tobytes()
    with gzip.open(path, "wb") as file:
        file.write(header + array.astype(np.uint8).tobytes())


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """Idx files of 64 bars whose position tells their label, under Fashion-MNIST's names."""
    folder = tmp_path_factory.mktemp("data")
    for name in ("train", "t10k"):
        label = np.arange(64) % 10
        image = np.zeros((64, 28, 28), np.uint8)
        for i, c in enumerate(label):
            image[i, 2 * c + 2 : 2 * c + 8, 4:24] = 200
        write_idx(folder / f"{name}-images-idx3-ubyte.gz", image)
        write_idx(folder / f"{name}-labels-idx1-ubyte.gz", label)
    return folder
