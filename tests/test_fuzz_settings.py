"""Every key of every factory, every value that stands alone and every option of training, given seventeen values.

Each is either refused by a ValueError that names the key and the value, or is taken, and then what it makes is usable:
tables of a run are finite, models and losses have finite shapes. Nothing else is raised, and none takes long or much.
"""

import collections
import inspect
import json
import math
import random
import resource
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from difax.build import ALONE, SECTIONS, build_options, build_setup, build_task
from difax.checkpoints import find_weights
from difax.config import load_config, override
from difax.core.annotations import brief
from difax.program import model_shapes
from difax.registry import REGISTRIES, make
from difax.training.train import TrainOptions

NAN, INF = float("nan"), float("inf")
VALUES = (0, 1, 3, -1, 0.5, 1e12, NAN, INF, -INF, "a", "", [], [1, 2], ["a"], None, True, False)
STEPS = 4
SECONDS, BYTES = 20, 2 * 2**30
SAMPLE = 300  # cases of the default run

SMOKE: dict[str, Any] = {**load_config("fmnist_smoke"), "steps": STEPS, "weights": "random"}
SMOKE["model"] |= {"depth": 2, "width": 16, "size": 8, "patch": 2}
DDPM: dict[str, Any] = {**load_config("fmnist_smoke:ddpm"), "steps": STEPS}
DDPM["model"] |= {"depth": 2, "width": 16, "size": 8, "patch": 2}
CNN = load_config("fmnist_cnn")
CNN["model"] |= {"width": 4, "size": 8}
SKIP, WAN, PIXART, FLUX = (load_config(n) for n in ("skip_dit_tiny", "wan_tiny", "pixart_tiny", "flux_tiny"))
SD3 = load_config("sd3_tiny")
QWEN_IMAGE, FLUX2 = load_config("qwen_image_tiny"), load_config("flux2_tiny:dev")

TABLE = np.zeros((STEPS, 2, 2)).tolist()
# what a factory must be given besides the key that is tried
NEEDS = {
    ("cache", "duodiff"): {"weights": "fmnist_dit"},
    ("cache", "experts"): {"weights": "fmnist_dit"},
    ("cache", "magcache"): {"ratios": [1.0, 1.1, 0.9, 1.0]},
    ("cache", "learning_to_cache"): {"logits": TABLE},
    ("cache", "harmonica"): {"logits": TABLE},
    ("cache", "smoothcache"): {"schedule": {"attn": [1, 0, 1, 1]}},
    ("cache", "scheduled"): {"schedule": [1, 0, 1, 0]},
    ("cache", "block_caching"): {"changes": {"attn": [[0.1] * STEPS] * 2}},
    ("cache", "bacache"): {"similarities": {"attn": np.ones((2, STEPS, STEPS)).tolist()}, "updates": 2, "bubble": 0},
    ("cache", "icc"): {"period": 1},
    ("cache", "autodiffusion"): {"skip": [[0]] * STEPS},
    ("grid", "given"): {"times": [1.0, 0.7, 0.5, 0.2]},
    ("cache", "pab"): {"window": (100.0, 850.0)},
    ("solver", "mcg"): {"measurement": 0.0},
    ("quant", "int4_weight"): {"group": 8},
    ("quant", "svdquant_w4a8"): {"rank": 4},
}
LANGEVIN: dict[str, Any] = {**SMOKE, "process": {"name": "cld"}, "prediction": "eps", "loss": {"name": "hsm"}}
LANGEVIN |= {"model": {**SMOKE["model"], "channels": 2}, "solver": {"name": "gddim"}}
# the configuration that a factory is tried in; the others in SMOKE
WHERE = {
    ("process", "cld"): LANGEVIN,
    ("cache", "duodiff"): {**load_config("fmnist_dit"), "steps": STEPS},
    ("cache", "experts"): {**load_config("fmnist_dit"), "steps": STEPS},
    ("loss", "hsm"): LANGEVIN,
    ("solver", "gotta_go_fast"): {**SMOKE, "grid": {"name": "log_snr"}},  # a flow has no slope out of pure noise
    ("cache", "skipcache"): SKIP,
    ("cache", "tgate"): PIXART,
    ("model", "skip_dit"): SKIP,
    ("model", "wan"): WAN,
    ("model", "pixart"): PIXART,
    ("model", "flux"): FLUX,
    ("model", "sd3"): SD3,
    ("model", "qwen_image"): QWEN_IMAGE,
    ("model", "flux2"): FLUX2,
    ("model", "z_image"): load_config("z_image_tiny"),
    ("model", "cnn"): CNN,
    ("loss", "ddpm"): DDPM,
    ("loss", "cross_entropy"): CNN,
    ("grid", "leading"): DDPM,
    ("grid", "diffusers"): DDPM,
    ("grid", "lcm"): DDPM,
}
# of these, what one loads or measures is another's to check; the values here are no files
NOT_A_VALUE = {"model", "process", "prediction"}


def keys_of(kind: str, name: str) -> list[str]:
    """The keys that a user may give a factory."""
    found = inspect.signature(REGISTRIES[kind][name]).parameters
    given = {"quant": NOT_A_VALUE, "loss": NOT_A_VALUE, "cache": {"network"}}.get(kind, set())  # by the builder
    return [key for key in found if key not in given]


FACTORIES = [(kind, name) for kind, entries in REGISTRIES.items() for name in entries if keys_of(kind, name)]
GROUPS = {
    **{f"{kind} {name}": [(kind, name, key) for key in keys_of(kind, name)] for kind, name in FACTORIES},
    "values that stand alone": [("alone", "", key) for key in ALONE],
    "sections": [("section", "", key) for key in SECTIONS if key not in ALONE],
    "options of training": [("train", "", key) for key in TrainOptions.__dataclass_fields__],
}
CASES = [(*case, value) for cases in GROUPS.values() for case in cases for value in VALUES]
COUNTS: collections.Counter[str] = collections.Counter()


@pytest.fixture(scope="module", autouse=True)
def counts(request):
    """Says at the end how many were tried, refused and taken."""
    yield
    total = f"{sum(COUNTS.values())} settings tried: {COUNTS['refused']} refused, {COUNTS['taken']} taken"
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print(f"\n{total}")


@pytest.fixture(scope="module")
def data(tmp_path_factory, data_dir):
    """Keys of a data set of each kind that is there."""
    folder = tmp_path_factory.mktemp("images")
    from PIL import Image

    for i in range(10):
        Image.fromarray(np.full((4, 4), 20 * i, np.uint8)).save(folder / f"{i}.png")
    np.savez(folder / "data.npz", images=np.zeros((20, 4, 4, 1), np.uint8), labels=np.arange(20) % 2)
    return {
        "fashion_mnist": {"data_dir": str(data_dir)},
        "folder": {"path": str(folder)},
        "npz": {"path": str(folder / "data.npz")},
    }


def finite_tables(setup) -> None:
    """The tables of a run are finite, but for a plan's caps that are none."""
    for leaf in jax.tree.leaves(setup.rows._replace(plan=())):
        assert np.isfinite(leaf).all()
    for leaf in jax.tree.leaves(setup.rows.plan.values):
        assert not np.isnan(np.asarray(leaf, np.float64)).any()


def traced(setup) -> None:
    """The sampler has a program: nothing is refused at trace time that was not refused by name."""
    n = lambda a: jax.ShapeDtypeStruct((2, *a.shape), a.dtype)  # noqa: E731
    params = jax.eval_shape(setup.prepare, model_shapes(setup.model))
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 2))
    x = jax.ShapeDtypeStruct((2, *setup.model.input_shape), jnp.float32)
    rows = jax.tree.map(jnp.asarray, setup.rows)
    image, _ = jax.eval_shape(setup.sampler(), params, x, keys, jax.tree.map(n, setup.model.cond), rows, setup.scale)
    assert image.shape == x.shape


def tried(kind: str, name: str, key: str, value, data, trace: bool) -> None:
    """Makes what a value makes, as a command would; raises what that raises."""
    if kind == "data":
        split = {} if key == "split" else {"split": "train"}
        images = make("data", {"name": name, **data[name], key: value}, **split)
        assert len(images.image) and images.image.dtype == np.uint8
        return
    if kind == "train":
        options = build_options({**SMOKE, "train": {**SMOKE["train"], key: value}})
        assert type(getattr(options, key)) in (int, float, str, type(None))
        return
    if kind == "section":
        override({**SMOKE, key: value}, [])
        raise AssertionError("a section is a mapping")
    if kind == "alone":
        config = {**SMOKE, key: value}
        setup = build_setup(config)
        if key == "weights" and value is None:
            return  # a configuration may have none
        find_weights(config, setup.model)
        return finite_tables(setup)
    base = WHERE.get((kind, name), SMOKE)
    before = base.get(kind, {})
    section = {
        **(before if before.get("name") == name else {}),
        "name": name,
        **NEEDS.get((kind, name), {}),
        key: value,
    }
    config = {**base, kind: section}
    if kind == "loss" or name == "cnn":
        task = build_task(config)
        params = jax.eval_shape(task.init, jax.random.key(0))
        image = jax.ShapeDtypeStruct((2, *task.input_shape), jnp.uint8)
        batch = {"image": image, "label": jax.ShapeDtypeStruct((2,), jnp.int32)}
        assert jax.eval_shape(task.loss, params, batch, jax.random.key(0))[0].shape == ()
        return
    setup = build_setup(config)
    finite_tables(setup)
    if kind == "model":
        shapes = model_shapes(setup.model)
        assert all(math.prod(a.shape) > 0 for a in jax.tree.leaves(shapes))
    if trace and name != "cudnn":  # which takes no call on a CPU
        traced(setup)


def names(text: str, value) -> bool:
    """Whether a message shows a value: as it was given, as a tuple, or as what it stands for."""
    forms = {brief(value), str(value)}
    if isinstance(value, list):
        forms |= {str(tuple(value)), "x".join(map(str, value)), *(repr(v) for v in value)} or {"()", "[]"}
    if isinstance(value, float) and value in (0.5, 1e12):
        forms |= {f"{value:g}"}
    return value in (None, "") or any(form in text for form in forms)


def outcome(case, data, trace: bool) -> str:
    """ "refused" or "taken"; anything else is a failure."""
    kind, name, key, value = case
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    try:
        tried(kind, name, key, value, data, trace)
        found = "taken"
    except ValueError as error:
        text, found = str(error), "refused"
        assert key in text or (name and name in text), f"{case}: {text}"
        assert names(text, value), f"{case}: {text}"
        assert "\n" not in text and len(text) < 1500, f"{case}: {text}"
    except FileNotFoundError as error:  # what the data sets raise
        assert kind == "data" and isinstance(value, str), f"{case}: {error}"
        found = "refused"
    except Exception as error:
        raise AssertionError(f"{case}: {type(error).__name__}: {error}") from error
    assert time.perf_counter() - start < SECONDS, case
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) * 1024 < BYTES, case
    COUNTS[found] += 1
    return found


def failing(cases, data, trace: bool) -> list[str]:
    """What went wrong, a line each."""
    failures = []
    for case in cases:
        try:
            outcome(case, data, trace)
        except AssertionError as failure:
            failures.append(str(failure)[:300])
    return failures


def test_a_sample_of_settings_is_refused_by_name_or_usable(data):
    failures = failing(random.Random(0).sample(CASES, SAMPLE), data, trace=False)
    assert not failures, "\n".join(failures)
    assert COUNTS["refused"] > COUNTS["taken"] > 10


@pytest.mark.slow
@pytest.mark.parametrize("group", GROUPS)
def test_every_setting_is_refused_by_name_or_usable(group, data):
    trace = GROUPS[group][0][0] in ("cache", "attend", "solver", "guide", "quant")
    failures = failing([(*case, value) for case in GROUPS[group] for value in VALUES], data, trace)
    assert not failures, "\n".join(failures)


def test_seventeen_values_and_every_factory():
    assert len(VALUES) == 17 and len({json.dumps(v) for v in VALUES}) == 17
    assert {kind for kind, _ in FACTORIES} == REGISTRIES.keys()
