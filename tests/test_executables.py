"""Programs that are kept between processes: their keys, what is not read, and weights read while one is compiled."""

import concurrent.futures
import json
import os
import pickle
import subprocess
import sys
import threading
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import difax
from difax import program
from difax.accel.caches.fora import fora
from difax.build import Setup, build_setup, recipe_of
from difax.config import load_config, override
from difax.core import executables
from difax.core.executables import kept_in
from difax.core.shell import DifaxWarning
from difax.program import Program, draw, model_shapes, program_key
from difax.registry import REGISTRIES
from tests.toys import randomise

SMALL = [("model.depth", 1), ("model.width", 32), ("model.heads", 2), ("steps", 2)]


def setup_of(*settings: tuple[str, Any]) -> Setup:
    return build_setup(override(load_config("fmnist_smoke"), [*SMALL, *settings]))


def arguments(setup: Setup, n: int = 1) -> tuple[Any, ...]:
    params = jax.eval_shape(setup.prepare, model_shapes(setup.model))
    x, keys, cond = jax.eval_shape(lambda: setup.inputs(0, n, np.zeros(n, np.int32)))
    return params, x, keys, cond, jax.tree.map(jnp.asarray, setup.rows), jnp.float32(setup.scale)


def prepared(setup: Setup) -> Any:
    return setup.prepare(randomise(model_shapes(setup.model)))


@pytest.fixture
def keeping(tmp_path, monkeypatch):
    """A folder that programs are kept in, within a test; the code is what it was long ago."""
    monkeypatch.setattr(executables, "sources", lambda: "of this test")
    monkeypatch.setattr(program, "_texts", {})
    monkeypatch.setattr(program, "_drawn", [])
    before = jax.config.values["jax_enable_compilation_cache"]
    jax.config.update("jax_enable_compilation_cache", True)
    try:
        with kept_in(tmp_path / "kept"):
            yield tmp_path / "kept"
    finally:
        jax.config.update("jax_enable_compilation_cache", before)


def forget() -> None:
    """What a new process does not know."""
    program._texts.clear()
    program._drawn.clear()


# ---- keys --------------------------------------------------------------------------------------------------

CHANGED = {  # settings of which each makes another program
    "solver": [("solver.name", "heun")],
    "steps": [("steps", 3)],
    "cache": [("cache.name", "fora")],
    "cache, another interval": [("cache.name", "fora"), ("cache.interval", 3)],
    "cache, another one": [("cache.name", "teacache")],
    "dtype": [("model.dtype", "bfloat16")],
    "quant": [("quant.name", "int8_w8a8")],
    "quant, weights alone": [("quant.name", "int8_weight")],
    "attend": [("attend.name", "chunked")],
    "layout": [("layout", "unstacked")],
    "conditioning": [("conditioning", "ahead")],
    "guide": [("guide.name", "none")],
    "prediction": [("prediction", "x0")],
    "depth": [("model.depth", 2)],
    "width": [("model.width", 64)],
}


@pytest.fixture(scope="module")
def plain_setup() -> Setup:
    return setup_of()


def test_what_changes_the_program_changes_its_key(plain_setup, monkeypatch):
    monkeypatch.setattr(executables, "sources", lambda: "of this test")
    key = lambda setup: program_key(setup, arguments(setup))  # noqa: E731
    keys = {"nothing": key(plain_setup)}
    assert key(setup_of()) == keys["nothing"]
    keys |= {name: key(setup_of(*settings)) for name, settings in CHANGED.items()}
    keys["batch"] = program_key(plain_setup, arguments(plain_setup, 2))
    assert None not in keys.values()
    assert len(set(keys.values())) == len(keys)


def test_what_is_around_changes_every_key(plain_setup, monkeypatch):
    """Settings of JAX and of compilers, the processor, the device, versions, difax's own code."""
    monkeypatch.setattr(executables, "sources", lambda: "of this test")
    given = arguments(plain_setup)
    key = lambda: program_key(plain_setup, given)  # noqa: E731
    keys = [key()]
    with jax.default_matmul_precision("float32"):
        keys.append(key())
    with jax.debug_nans(True):
        keys.append(key())
    for name, value in (("XLA_FLAGS", "--xla_dump_to=/tmp/x"), ("LIBTPU_INIT_ARGS", "--a=1"), ("TRITON_X", "1")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            keys.append(key())
    for name, value in (("host", ["x86_64", "another", 2]), ("versions", {"jax": "0.99"}), ("sources", "edited")):
        with monkeypatch.context() as patch:
            patch.setattr(executables, name, lambda value=value: value)
            keys.append(key())
    with jax.default_device(jax.devices()[1]):
        keys.append(key())
    moved = jax.tree.map(lambda a: jax.device_put(a, jax.devices()[2]), given[-1])
    keys.append(program_key(plain_setup, (*given[:-1], moved)))
    keys.append(program_key(plain_setup, (*given[:-1], jnp.float16(1.0))))
    assert len(set(keys)) == len(keys)
    assert key() == keys[0]


TOLD = {  # settings that are of JAX's caches and messages, and of no program
    "jax_compilation_cache_dir": "/tmp/elsewhere",
    "jax_persistent_cache_min_compile_time_secs": 9.0,
    "jax_log_compiles": True,
}


@pytest.mark.parametrize("name", TOLD)
def test_where_compilations_are_kept_is_part_of_no_key(name):
    before, found = jax.config.values[name], executables.settings()
    try:
        jax.config.update(name, TOLD[name])
        assert executables.settings() == found
    finally:
        jax.config.update(name, before)


def test_the_code_is_known_by_its_content(tmp_path):
    """Also behind links; and not where a file is newer than what was imported."""
    sources = executables.sources.__wrapped__
    (tmp_path / "away").mkdir()
    (tmp_path / "away" / "b.py").write_text("2")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "a.py").write_text("1")
    (tmp_path / "root" / "linked").symlink_to(tmp_path / "away")
    found = [sources(tmp_path / "root", 2e10)]
    for path in ("root/a.py", "away/b.py"):
        (tmp_path / path).write_text("3")
        found.append(sources(tmp_path / "root", 2e10))
    (tmp_path / "root" / "notes.txt").write_text("no code")
    assert len(set(found)) == 3 and None not in found
    assert sources(tmp_path / "root", 2e10) == found[-1]
    assert sources(tmp_path / "root", os.stat(tmp_path / "root" / "a.py").st_mtime - 1) is None


def test_a_file_that_a_configuration_names_is_known_by_its_content(tmp_path):
    path = tmp_path / "plan.json"
    texts = []
    for schedule in ([True, True], [True, False]):
        path.write_text(json.dumps({"cache": "scheduled", "schedule": schedule, "order": 0}))
        texts.append(build_setup_text({"cache": {"name": "scheduled", "file": str(path)}}))
    assert None not in texts and texts[0] != texts[1]


def build_setup_text(section: dict[str, Any]) -> str | None:
    from difax.build import with_recipe

    config = {**override(load_config("fmnist_smoke"), SMALL), **section}
    return recipe_of(with_recipe(setup_of(), config, config["model"]))


def test_what_is_no_plain_data_has_no_recipe(tmp_path, monkeypatch, plain_setup):
    """Code of one's own may import any other, so that its programs are known by their text."""
    assert recipe_of(plain_setup) is not None
    assert recipe_of(plain_setup._replace(solver=setup_of(("solver.name", "heun")).solver)) is None
    assert recipe_of(plain_setup._replace(ahead=True)) is None
    assert recipe_of(plain_setup._replace(scale=plain_setup.scale + 1)) is None
    (tmp_path / "mine.py").write_text("from difax.accel.caches.fora import fora\n")
    config = override(load_config("fmnist_smoke"), SMALL)
    for name in (f"{tmp_path / 'mine.py'}:fora", "difax.accel.caches.fora:fora", fora, fora(interval=3)):
        assert recipe_of(build_setup({**config, "cache": {"name": name}})) is None
    mine = lambda **keys: fora(**keys)  # noqa: E731
    monkeypatch.setitem(REGISTRIES["cache"], "fora", mine)  # type: ignore[index]
    assert recipe_of(build_setup({**config, "cache": {"name": "fora"}})) is None


def test_a_run_has_a_recipe_with_the_model_that_its_checkpoint_tells(small_weights):
    run = difax.load(small_weights, steps=1)
    assert recipe_of(run.setup) is not None
    assert recipe_of(run.replace(solver="heun").setup) not in (None, recipe_of(run.setup))
    assert recipe_of(run.replace(cache=fora(interval=2)).setup) is None


# ---- programs ----------------------------------------------------------------------------------------------


def test_a_program_is_loaded_with_equal_results(keeping, monkeypatch):
    """By the configuration without being traced; after a change of code that changes no program, by its text."""
    setup = setup_of(("cache.name", "fora"), ("quant.name", "int8_weight"))
    params, cond = prepared(setup), np.arange(2, dtype=np.int32)
    first = draw(setup, params, cond)
    assert first.table["program"] == "compiled" and first.table["compile_seconds"] > 0
    assert draw(setup, params, cond).table["program"] == "kept"
    forget()
    with monkeypatch.context() as patch:
        patch.setattr(Setup, "sampler", lambda *_, **__: pytest.fail("it was traced"))
        second = draw(setup, params, cond)
    forget()
    with monkeypatch.context() as patch:
        patch.setattr(executables, "sources", lambda: "edited")
        patch.setattr(jax.stages.Lowered, "compile", lambda *_: pytest.fail("it was compiled"))
        third = draw(setup, params, cond)
    for found in (second, third):
        assert found.table["program"] == "loaded"
        np.testing.assert_array_equal(found.samples, first.samples)
        jax.tree.map(np.testing.assert_array_equal, found.trace, first.trace)
        assert found.table["peak_memory_mib"] == first.table["peak_memory_mib"]
    assert len(list(keeping.glob("*.executable"))) == 1 and len(list(keeping.glob("*.key"))) == 2
    assert all(path.stat().st_mode & 0o77 == 0 for path in (keeping, *keeping.iterdir()))


def test_nothing_is_kept_where_the_user_wants_no_cache(keeping):
    jax.config.update("jax_enable_compilation_cache", False)
    setup = setup_of(("steps", 1))
    Program(setup, prepared(setup), setup.inputs(0, 1, np.zeros(1, np.int32)))
    assert not list(keeping.iterdir())


def tiny(x: jax.Array) -> Any:
    return jax.jit(lambda x, y: {"sum": x + 2 * y}).lower(x, x).compile()


DAMAGED = {
    "cut off": lambda raw: raw[: len(raw) // 2],
    "a byte": lambda raw: raw[:-100] + bytes([raw[-100] ^ 1]) + raw[-99:],
    "empty": lambda raw: b"",
    "another format": lambda raw: raw.replace(b"difax executable 1", b"difax executable 0"),
    "a pickle of others": lambda raw: pickle.dumps(os.getcwd),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_warned_of_and_removed(name, tmp_path):
    x = jnp.arange(4.0)
    with kept_in(tmp_path / "kept"):
        place = tmp_path / "kept"
        assert executables.save(place, "a" * 64, tiny(x))
        path = place / f"{'a' * 64}.executable"
        loaded = executables.load(place, "a" * 64, (x, x))
        np.testing.assert_array_equal(loaded(x, x)["sum"], 3 * np.arange(4.0))
        path.write_bytes(DAMAGED[name](path.read_bytes()))
        with pytest.warns(DifaxWarning, match="damaged and compiled anew") as told:
            assert executables.load(place, "a" * 64, (x, x)) is None
        assert len(told) == 1 and not path.exists()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert executables.load(place, "a" * 64, (x, x)) is None


def test_a_damaged_program_is_compiled_anew(keeping):
    setup = setup_of(("steps", 1))
    params, cond = prepared(setup), np.zeros(1, np.int32)
    first = draw(setup, params, cond)
    for path in keeping.glob("*.executable"):
        path.write_bytes(b"what is this")
    forget()
    with pytest.warns(DifaxWarning, match="compiled anew") as told:
        second = draw(setup, lambda: params, cond)
    assert len([w for w in told if issubclass(w.category, DifaxWarning)]) == 1
    assert second.table["program"] == "compiled"
    np.testing.assert_array_equal(first.samples, second.samples)
    for path in keeping.glob("*.key"):
        executables._write(path, b"../../elsewhere")
    forget()
    assert draw(setup, params, cond).table["program"] == "loaded"


def test_a_link_is_not_followed(tmp_path):
    x = jnp.arange(4.0)
    with kept_in(tmp_path / "kept"):
        executables.save(tmp_path / "kept", "a" * 64, tiny(x))
    (tmp_path / "run").mkdir(mode=0o700)
    (tmp_path / "run" / f"{'b' * 64}.executable").symlink_to(tmp_path / "kept" / f"{'a' * 64}.executable")
    with pytest.warns(DifaxWarning):
        assert executables.load(tmp_path / "run", "b" * 64, (x, x)) is None


FOLDERS = {
    "writable by others": lambda path: (path.mkdir(), path.chmod(0o777)),
    "a file": lambda path: path.write_text(""),
    "a link": lambda path: (path.with_name("b").mkdir(), path.symlink_to(path.with_name("b"))),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_that_others_may_write_to_is_not_used(name, tmp_path, keeping):
    FOLDERS[name](tmp_path / "a")
    with pytest.warns(DifaxWarning, match="compiled programs are not kept") as told, kept_in(tmp_path / "a"):
        assert executables.folder() is None
    assert len(told) == 1


def test_a_folder_of_another_user_is_not_used(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.warns(DifaxWarning, match="another user's"), kept_in(tmp_path / "a"):
        assert executables._folder.get() is None


def test_a_folder_that_others_may_read_is_closed(tmp_path):
    (tmp_path / "a").mkdir(mode=0o755)
    with kept_in(tmp_path / "a"):
        assert (tmp_path / "a").stat().st_mode & 0o777 == 0o700


def test_what_was_used_longest_ago_goes_first(tmp_path, monkeypatch):
    x, names = jnp.arange(4.0), [c * 64 for c in "abc"]
    with kept_in(place := tmp_path / "kept"):
        for age, name in zip((30, 20, 10), names, strict=True):
            assert executables.save(place, name, tiny(x))
            then = os.stat(place / f"{name}.executable").st_mtime - age
            os.utime(place / f"{name}.executable", (then, then))
        assert executables.load(place, names[0], (x, x)) is not None  # used now
        size = max(path.stat().st_size for path in place.iterdir())
        monkeypatch.setattr(executables, "LIMIT", 3 * size)
        assert executables.save(place, "d" * 64, tiny(x))
        left = {path.name[0] for path in place.glob("*.executable")}
        assert left == {"a", "c", "d"}
        monkeypatch.setattr(executables, "LIMIT", size // 2)
        assert not executables.save(place, "e" * 64, tiny(x))


def test_a_program_of_several_devices_is_loaded_for_them(tmp_path):
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()[4:8])[::-1], "a")
    x = jax.device_put(jnp.arange(8.0), jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("a")))
    compiled = jax.jit(lambda x: x - x.mean()).lower(x).compile()
    with kept_in(tmp_path / "kept"):
        assert executables.save(tmp_path / "kept", "a" * 64, compiled)
        found = executables.load(tmp_path / "kept", "a" * 64, (x,))(x)
    np.testing.assert_array_equal(found, np.arange(8.0) - 3.5)
    assert found.sharding == compiled(x).sharding


# ---- weights that are read meanwhile -----------------------------------------------------------------------


def test_weights_are_read_while_the_program_is_compiled(monkeypatch):
    """The compiler waits for the weights here, which is for ever if they are not read until it is done."""
    setup, read, threads = setup_of(("steps", 1)), threading.Event(), []
    compile_ = jax.stages.Lowered.compile

    def waiting(lowered, *args):
        threads.append(threading.current_thread().name)
        if "sample" in str(lowered.as_text()[:200]):
            assert read.wait(60)
        return compile_(lowered, *args)

    def reading():
        params = prepared(setup)
        read.set()
        return params

    monkeypatch.setattr(jax.stages.Lowered, "compile", waiting)
    found = draw(setup, reading, np.zeros(1, np.int32))
    assert found.table["finite"] and threads == ["difax-compile"]


def test_a_setting_of_the_caller_alone_is_compiled_with_by_the_caller(monkeypatch):
    setup, threads = setup_of(("steps", 1)), []
    compile_ = jax.stages.Lowered.compile

    def noted(lowered, *args):
        threads.append(threading.current_thread().name)
        return compile_(lowered, *args)

    monkeypatch.setattr(jax.stages.Lowered, "compile", noted)
    with jax.default_matmul_precision("float32"):
        draw(setup, lambda: prepared(setup), np.zeros(1, np.int32))
    assert threads == [threading.main_thread().name]


def test_weights_of_another_type_than_was_compiled_for(monkeypatch):
    setup = setup_of(("steps", 1))
    half = lambda: jax.tree.map(lambda a: a.astype(jnp.bfloat16), prepared(setup))  # noqa: E731
    want = draw(setup, half(), np.zeros(1, np.int32)).samples
    np.testing.assert_array_equal(draw(setup, half, np.zeros(1, np.int32)).samples, want)


def raising(error: Exception) -> Any:
    def raises(*_: Any, **__: Any) -> Any:
        raise error

    return raises


def test_what_is_wrong_with_the_weights_is_told_first(monkeypatch):
    """As it was when they were read before; what the program is refused for comes after, and again when asked again."""
    setup, cond = setup_of(("steps", 1)), np.zeros(1, np.int32)
    wrong = raising(ValueError("w.safetensors: damaged"))
    with pytest.raises(ValueError, match="damaged"):
        draw(setup, wrong, cond)
    setup = setup_of(("steps", 1))
    monkeypatch.setattr(Setup, "sampler", raising(NotImplementedError("no kernel")))
    with pytest.raises(ValueError, match="damaged"):
        draw(setup, wrong, cond)
    for _ in range(2):
        with pytest.raises(NotImplementedError, match="no kernel"):
            draw(setup, lambda: prepared(setup), cond)


def test_a_failed_compilation_is_tried_again(monkeypatch, small_weights):
    run = difax.load(small_weights, steps=1)
    with monkeypatch.context() as patch:
        patch.setattr(jax.stages.Lowered, "compile", raising(MemoryError("too large")))
        for _ in range(2):
            with pytest.raises(MemoryError):
                run.sample([0])
    assert run.sample([0]).cost["program"] == "compiled"
    assert run.sample([1]).cost["program"] == "kept"


def test_a_program_without_memory_is_refused_each_time(monkeypatch, small_weights):
    run = difax.load(small_weights, steps=1)
    with monkeypatch.context() as patch:
        patch.setattr(program, "memory_available", lambda: 0)
        for _ in range(2):
            with pytest.raises(ValueError, match="of memory are needed"):
                run.sample([0])
    assert run.sample([0]).cost["finite"]


# ---- processes ---------------------------------------------------------------------------------------------

COUNTED = """
import collections, sys, jax
seen = collections.Counter()
jax.monitoring.register_event_listener(lambda event, **_: seen.update([event]))
jax.monitoring.register_event_duration_secs_listener(lambda event, _, **__: seen.update([event]))
from difax.cli import main
code = main(sys.argv[1:])
asked, found = seen["/jax/core/compile/backend_compile_duration"], seen["/jax/compilation_cache/cache_hits"]
print(asked - found, found, file=sys.stderr)
sys.exit(code)
"""


def test_a_second_start_compiles_nothing(tmp_path, user_env, small_weights):
    """Two processes that compile the same at once, and one after them: every program that it asks the compiler for, the
    small ones of reading and preparing weights too, is found in JAX's cache, and the sampler in difax's."""
    env = {k: v for k, v in user_env.items() if k != "JAX_COMPILATION_CACHE_DIR"} | {"XDG_CACHE_HOME": str(tmp_path)}
    # the source files of a clone of this minute would not be trusted
    code = "from difax.core import executables; executables._SETTLED = -1e9\n" + COUNTED

    def start(name: str) -> tuple[dict[str, Any], int, int]:
        flags = ["--weights", small_weights, "--labels", "1", "--steps", "1", "--json", "--out", str(tmp_path / name)]
        command = [sys.executable, "-c", code, "sample", *flags]
        done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=170)
        assert done.returncode == 0, done.stderr
        *warned, counts = done.stderr.strip().splitlines()
        assert not [line for line in warned if "difax:" in line]
        compiled, found = counts.split()
        return json.loads(done.stdout), int(compiled), int(found)

    with concurrent.futures.ThreadPoolExecutor() as pool:
        first = list(pool.map(start, ("a.npz", "b.npz")))
    assert {table["program"] for table, _, _ in first} <= {"compiled", "loaded"}
    assert max(compiled for _, compiled, _ in first) > 0
    table, compiled, found = start("c.npz")
    assert table["program"] == "loaded" and compiled == 0 and found > 0
    images = [np.load(tmp_path / name)["samples"] for name in ("a.npz", "c.npz")]
    np.testing.assert_array_equal(*images)
    assert not [path for path in (tmp_path / "difax" / "executables").iterdir() if path.name.endswith(".part")]
