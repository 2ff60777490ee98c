"""What a configuration may say: values against annotations, files of get_config, gin, literals, and sizes."""

import functools
import inspect
import os
import pathlib
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

import jax
import numpy as np
import pytest

import difax
import difax.program
from difax.build import build_options, build_setup
from difax.cli import main
from difax.config import gin_settings, load_config, override, parse_value
from difax.core import device
from difax.core.annotations import OrInfinite, Seed, annotations_of, check_arguments, check_value, in_words
from difax.core.device import check_memory, host_memory
from difax.registry import REGISTRIES, make
from difax.training.train import TrainOptions

NAN, INF = float("nan"), float("inf")

# annotation: what is taken, what is refused, and what the refusal says is allowed
ANNOTATIONS = [
    (int, (0, -1, np.int64(3), 2**31 - 1), (1.5, 3.0, True, "1", None, [1], NAN, 2**31, np.float32(1)), "an integer"),
    (Seed, (0, 2**32 - 1), (2**32, 0.5, False), "an integer"),
    (float, (0, 0.5, np.float32(0.5), -3), (NAN, INF, -INF, True, "0.5", None, 1e39, 10**400), "a number"),
    (OrInfinite, (0.5, INF, -INF, 3), (NAN, "inf", None), "a number, or inf"),
    (bool, (True, np.True_), (0, 1, "true", None), "true or false"),
    (str, ("", "a"), (0, None, b"a", ["a"]), "a text"),
    (None, (None,), (0, "none"), "none"),
    (int | None, (3, None), (0.5, "none", False), "an integer, or none"),
    (typing.Optional[float], (1, None), ("a",), "a number, or none"),  # noqa: UP045
    (Literal["a", 2], ("a", 2), ("b", 2.0, None), "a, 2"),
    (Sequence[int], ([1], (), np.arange(3)), ("12", [0.5], [True], 3, {1: 2}, {1}, b"12"), "a list of integers"),
    (tuple[float, float], ([1, 2], (0.5, 2.0)), ([1], [1, 2, 3], "ab", [1, NAN]), "a list of 2 numbers"),
    (list[str], (["a"], ("a",)), ("a", [1]), "a list of texts"),
    (Sequence[tuple[OrInfinite, int]], ([[0.5, 1], (INF, 2)],), ([0.5, 1], [[1, 0.5]]), "a list of lists of 2 values"),
    (Mapping[str, float], ({"a": 1}, {}), ([("a", 1)], {1: 2}, {"a": "b"}), "a mapping of names to numbers"),
    (np.ndarray, (np.zeros(3), jax.numpy.zeros(3)), ([0.0], 3), "an array"),
    (Callable[..., Any], (len,), ("len", 3), "a function"),
    (str | os.PathLike, ("a",), (3, None), "a path"),
    (pathlib.Path, ("a", pathlib.Path("a")), (3, None), "a Path"),
    (np.float32, (np.float32(1),), ("a",), "a float32"),
    (Annotated[int, 5], (6,), ("a",), "an integer"),
    (dict, ({1: 2},), ([1],), "a mapping"),
    (Any, (3, None, NAN), (), "anything"),
    (Annotated[int, "of pixels"], (3,), (0.5,), "an integer"),
]


@pytest.mark.parametrize("annotation, good, bad, words", ANNOTATIONS, ids=lambda a: str(a)[:40])
def test_values_against_annotations(annotation, good, bad, words):
    assert in_words(annotation).startswith(words)
    for value in good:
        check_value("key", value, annotation)
    for value in bad:
        with pytest.raises(ValueError) as refused:
            check_value("key", value, annotation)
        assert str(refused.value).startswith("key=") and f"allowed: {words}" in str(refused.value)


def test_what_is_taken_is_of_the_annotated_type():
    assert type(check_value("k", np.int64(3), int)) is int
    assert type(check_value("k", 3, float)) is float and type(check_value("k", np.float32(0.5), float)) is float
    assert check_value("k", 3, int | float) == 3 and type(check_value("k", 3, int | str)) is int
    assert check_value("k", [1, 2], tuple[int, int]) == (1, 2)
    assert check_value("k", np.arange(2), Sequence[int]) == (0, 1)
    assert check_value("k", [[1, 2]], Sequence[tuple[float, int]]) == [(1.0, 2)]


def test_a_default_serves_whatever_the_annotation_says():
    def factory(cap: float = INF, name: int = None, plain=3, *, odd=0) -> None:  # type: ignore # noqa: RUF013
        pass

    factory.__annotations__["odd"] = "Nowhere"  # as a name that only a type checker sees

    given = {"cap": INF, "name": None, "plain": "a", "odd": []}
    assert check_arguments("x", factory, given) == given
    for key, value in (("cap", NAN), ("name", "a")):
        with pytest.raises(ValueError, match=f"x: {key}={value!r}"):
            check_arguments("x", factory, {key: value})


def test_annotations_of_every_form_of_a_factory():
    class Made:
        def __init__(self, width: int):
            pass

        def __call__(self, depth: int):
            pass

    assert annotations_of(Made) == {"width": int} and annotations_of(Made(1)) == {"depth": int}
    assert annotations_of(functools.partial(functools.partial(Made), 3)) == {"width": int}
    assert annotations_of(TrainOptions)["devices"] == int | None
    assert annotations_of(len) == {}


def test_every_factory_annotates_everything_that_it_takes():
    for kind, entries in REGISTRIES.items():
        for name, factory in entries.items():
            found = annotations_of(factory)
            missing = [k for k in inspect.signature(factory).parameters if found.get(k, Any) is Any]
            assert not missing, (kind, name, missing)


OUTSIDE = """
from difax.accel.caches import CACHES

def mine(interval: int = 2, plain=None, **more: float):
    return CACHES["fora"](interval)
"""


def test_factories_from_outside_are_held_to_what_they_annotate(tmp_path):
    (tmp_path / "mine.py").write_text(OUTSIDE)
    name = f"{tmp_path}/mine.py:mine"
    make("cache", {"name": name, "interval": 3, "plain": NAN, "other": 0.5})
    for key, value in (("interval", 1.5), ("interval", NAN), ("other", "a")):
        with pytest.raises(ValueError, match=f"mine: {key}={value!r}; allowed: a"):
            make("cache", {"name": name, key: value})


# the text of a file -> what its one line says
FILES = {
    "x = 1": "defines no get_config",
    "get_config = 3": "get_config is 3",
    "def get_config(): return None": "returned NoneType",
    "def get_config(): return 3": "returned int 3",
    "def get_config():\n yield 3": "returned generator",
    "def get_config(): return {'model': [1]}": r"model=\[1\]",
    "def get_config(): return {'solver': 3}": "solver=3",
    "def get_config(): return {'steps': None}": "steps=None",
    "d = {}\nd['model'] = d\ndef get_config(): return d": "RecursionError",
    "class M(dict):\n def items(self): raise OSError('x')\ndef get_config(): return M()": "OSError: x",
    "def get_config(): return {'reduced': {'steps': 'a'}}": "steps='a'",
    "def get_config(): return {1: 2}": "unknown config section 1",
    "def get_config(): raise KeyError('x')": "KeyError: 'x'",
    "def get_config(): return get_config()": "RecursionError",
    "import sys\ndef get_config(): sys.exit(3)": "SystemExit: 3",
    "raise SystemExit": "SystemExit",
    "raise BaseException('b')": "BaseException: b",
    "def get_config(:": "SyntaxError",
    "import nothing_there": "No module named",
    "def get_config(a): return {}": "needs an argument",
    "def get_config(a, b): return {}": "needs an argument",
    "\0": "null bytes",
}


@pytest.mark.parametrize("text", FILES)
def test_a_file_that_gives_no_configuration_is_one_line_that_names_it(text, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(text)
    with pytest.raises(ValueError, match=FILES[text]) as refused:
        load_config(str(path))
    assert str(path) in str(refused.value) and "\n" not in str(refused.value)


def test_a_plain_dict_serves_and_an_argument_must_be_wanted(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("def get_config(): return {'steps': 3, 'model': {'name': 'dit'}}")
    assert load_config(str(path)) == {"steps": 3, "model": {"name": "dit"}}
    with pytest.raises(ValueError, match="takes no argument, but 'x' was given"):
        load_config(f"{path}:x")
    path.write_bytes(b"x = '\xff\xfe'\ndef get_config(): return {}")
    with pytest.raises(ValueError, match="mine.py: "):
        load_config(str(path))


@pytest.mark.parametrize(
    "where", ["", ":x", ".", "..", "/tmp", "../fmnist_smoke", "/etc/passwd", "a" * 5000 + ".py", "\0"]
)
def test_what_names_no_configuration(where):
    with pytest.raises(ValueError, match="config"):
        load_config(where)


def test_an_empty_name_on_the_command_line_is_refused(capsys):
    assert main(["sample", "--config", ""]) == 2
    assert "--config is empty; allowed" in capsys.readouterr().err


SMOKE = load_config("fmnist_smoke")


@pytest.mark.parametrize(
    "settings, words",
    [
        ([("solver", 3)], "solver=3"),
        ([("cache", "fora")], "cache.name=fora"),
        ([("model", None)], "model=None"),
        ([("steps", None)], "steps=None; allowed: an integer"),
        ([("steps", 1.5)], "steps=1.5; allowed: an integer"),
        ([("steps", 10.0)], "10, without a fraction"),
        ([("scale", NAN)], "scale=nan; allowed: a number"),
        ([("layout", 3)], "layout=3"),
        ([("solver.name", 3)], "name=3"),
        ([("guide.channels", 1.5)], "guide cfg: channels=1.5; allowed: an integer, or none"),
        ([("model.name", "cnn")], "model cnn is a classifier"),
        ([("data.data_dir", 3)], "data_dir=3"),
        ([("quant.name", "int8_w8a8"), ("quant.layers", "[")], r"layers='\['"),
        ([("quant.name", "int8_w8a8"), ("quant.group", 0)], "group=0"),
        ([("process.shift", 1e12)], "shift=1000000000000.0"),
        ([("grid.name", "karras"), ("grid.rho", 1e-300)], "rho=1e-300"),
        ([("solver.name", "ddim"), ("process.name", "vp_sde"), ("process.beta_max", 1e12)], "beta_max=1000000000000.0"),
        ([("cache.name", "skipcache"), ("cache.power", 1e12)], "power=1000000000000.0"),
        ([("cache.name", "taylorseer"), ("cache.order", 10**6)], "order=1000000"),
    ],
)
def test_settings_that_cannot_be(settings, words):
    with pytest.raises(ValueError, match=words):
        build_setup(override(SMOKE, settings))


def test_options_of_training_are_held_to_their_annotations():
    for key, value in (("steps", 1.5), ("ema", NAN), ("clip", INF), ("seed", -1), ("devices", 0.5), ("batch", True)):
        with pytest.raises(ValueError, match=f"train.{key}={value!r}"):
            build_options({"train": {"steps": 40, key: value}})
    assert build_options({"train": {"steps": 40, "seed": 2**32 - 1, "clip": 1}}).clip == 1.0


@pytest.mark.parametrize("text", ["-" * 100_000 + "1", "[1," * 3000, "b'a'", "{1, 2}", "{1: 2}", "1j", "...", "[b'a']"])
def test_literals_that_no_configuration_holds(text):
    with pytest.raises(ValueError, match="solver.eta=") as refused:
        parse_value(text, "solver.eta")
    assert len(str(refused.value)) < 300


def test_literals():
    for text, value in (("inf", INF), ("-inf", -INF), ("{'a': 1}", {"a": 1}), ("(1, [2.5, None])", (1, [2.5, None]))):
        assert parse_value(text) == value
    assert np.isnan(parse_value("nan"))
    for text in ("(" * 100_000, "9" * 5000, '"""', "\0"):
        assert parse_value(text) == text  # a text, which no factory takes for a number


GIN = {
    "import os": "'import os' runs code",
    "from os import path": "runs code",
    "from __gin__ import dynamic_registration": "runs code",
    "solver.eta = 1\n\nimport os.path as p": "line 3",
    "include 'inner.gin'": "inner.gin, line 1: 'import mine' runs code",
    "include 'outer.gin'": "includes itself",
    "include 'nowhere.gin'": "nowhere.gin: no such file",
    "solver.eta = " + "(" * 5000: "outer.gin",
    "config.base = 3": "config.base=3",
    "solver.eta = @solver()": "gin: ",
    "\0": "outer.gin",
}


@pytest.mark.parametrize("text", GIN)
def test_gin_binds_values_and_runs_nothing(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("open('ran', 'w')")
    (tmp_path / "inner.gin").write_text("import mine")
    (tmp_path / "outer.gin").write_text(text)
    with pytest.raises(ValueError, match=GIN[text]) as refused:
        gin_settings(["outer.gin"], [])
    assert "\n" not in str(refused.value) and not (tmp_path / "ran").exists()


def test_gin_files_include_values(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "inner.gin").write_text("eta = 0.5\nsolver.name = 'ddim'")
    (tmp_path / "outer.gin").write_text("include 'inner.gin'\nsolver.eta = %eta")
    assert gin_settings(["outer.gin"], []) == (None, [("solver.name", "ddim"), ("solver.eta", 0.5)])
    with pytest.raises(ValueError, match="import os' runs code"):
        gin_settings([], ["import os"])


HUGE = 2**31 - 1
# settings that need more memory than there is -> what the refusal names
SIZES = [
    ({"model.size": 2**28}, "size="),
    ({"model.size": 2**30, "model.patch": 2**30}, "size="),
    ({"model.width": 2**30}, "1073741824"),
    ({"model.width": 2**17}, "width=131072"),
    ({"model.depth": HUGE}, "blocks"),
    ({"model.depth": 10**6}, "depth=1000000"),
    ({"model.classes": HUGE}, "classes="),
    ({"model.classes": HUGE - 1}, "classes="),
    ({"model.channels": 2**30}, "channels="),
    ({"model.mlp_ratio": 2**30}, "mlp_ratio="),
    ({"steps": 10**7}, "steps=10000000"),
    ({"process.name": "vp_linear", "process.steps": 10**9}, "steps=1000000000"),
    ({"model.depth": 5000, "layout": "unstacked"}, "5000 blocks"),
]


@pytest.mark.parametrize("settings, named", SIZES, ids=lambda v: str(v)[:50])
def test_sizes_beyond_memory_are_refused_before_anything_is_allocated(settings, named, monkeypatch):
    monkeypatch.setattr(device, "host_memory", lambda: 2 * 2**30)
    with pytest.raises(ValueError, match=named):
        difax.load(SMOKE, weights="random", **settings)


def test_repeats_seeds_and_training_beyond_memory(monkeypatch, tmp_path):
    monkeypatch.setattr(device, "host_memory", lambda: 2 * 2**30)
    run = difax.load(SMOKE, weights="random", steps=1, model={"depth": 1, "width": 16})
    for settings, named in (
        ({"repeat": 10**9}, "10000000000 samples"),
        ({"repeat": 1.5}, "repeat=1.5"),
        ({"repeat": 0}, "repeat=0"),
        ({"seed": 2**32}, "seed=4294967296"),
        ({"seed": "a"}, "seed='a'"),
    ):
        with pytest.raises(ValueError, match=named):
            run.sample(**settings)
    with monkeypatch.context() as patched, pytest.raises(ValueError, match="sampling dit.*, 10 at once .* are needed"):
        patched.setattr(difax.program, "memory_available", lambda: 0)
        run.sample()
    with pytest.raises(ValueError, match="training model dit .*width=131072.* of memory are needed"):
        difax.train(SMOKE, tmp_path / "w", model={"width": 2**17})
    assert not (tmp_path / "w").exists()


def test_a_refusal_of_memory_has_both_numbers():
    assert 0 < host_memory() < 2**60
    check_memory("x", 2**30, 2**30)
    with pytest.raises(ValueError, match="x: 2,048.0 GiB of memory are needed, 1.0 GiB are free; allowed: less of it"):
        check_memory("x", 2**41, 2**30)
