"""Settings of every test run: eight forced CPU devices, strict ranks, no compilation cache of the user's."""

import os
import pathlib
import sys

import pytest

if "jax" in sys.modules:
    raise pytest.UsageError("jax was imported before tests/conftest.py could ask it for eight CPU devices")

ROOT = pathlib.Path(__file__).resolve().parent.parent
DEVICES = "--xla_force_host_platform_device_count"

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if DEVICES not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DEVICES}=8".strip()

import jax  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_enable_compilation_cache", False)


@pytest.fixture(scope="session")
def user_env(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment of a subprocess that runs difax as a user does, from any folder.

    One CPU device; caches in one temporary folder per session, so that a command given twice compiles once.
    """
    cache = tmp_path_factory.mktemp("cache")
    env = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_", "PYTEST_"))}
    return env | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(cache / "jax"),
        "XDG_CACHE_HOME": str(cache),
        "PYTHONPATH": str(ROOT),
    }
