"""Every kind of file that difax reads, damaged in each of its parts by a seeded mutator.

What a reader may do with a damaged file: refuse it, by a ValueError that names it; give what the whole one gives, where
the damage does not matter; or, of formats without a checksum, give something of the same shape and type that is finite.
Any other exception is a failure, and so is a result that is none of these.
"""

import contextlib
import copy
import gzip
import importlib.util
import io
import json
import pathlib
import shutil
import signal
import struct
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from difax.accel.caches import CACHES
from difax.accel.caches.measured import save_by_stage
from difax.accel.solvers import SOLVERS
from difax.build import build_setup, steps_by_label
from difax.config import load_config, override, pipeline_config, plain
from difax.core.arrays import save_arrays
from difax.core.files import read_json, read_rows, read_text
from difax.media.samples import read_latents
from difax.models.encoders import find_encoder
from difax.pipelines.recipes import open_pipeline
from difax.study.folder import read_image_file, read_measured, read_sweep
from difax.study.frontier import table
from difax.study.networks import read_prompts, real_images
from difax.study.pareto_report import facts, report, title
from difax.training.data import Images, fashion_mnist, folder, npz, read_idx
from difax.training.train import Task, TrainOptions, read_run, restore_ema, train
from difax.weights.checkpoint import load_native, read_metadata, save_safetensors, tensor_shapes
from difax.weights.conditions import load_conditions, random_conditions
from difax.weights.convert import load_converted
from difax.weights.tokenizers import open_tokenizer

SECONDS = 20  # for one file, on any machine
TOKENIZERS = importlib.util.find_spec("tokenizers") is not None
PIPELINE = pathlib.Path(__file__).resolve().parent / "golden" / "pipeline_pixart"
EVERY_RUN, ALL = 8, 200  # damaged files of each part of a kind

rng = np.random.default_rng(0)
SETUP = build_setup(override(load_config("fmnist_smoke"), [("steps", 4), ("model.depth", 2), ("model.width", 16)]))
CONDITIONED = build_setup(load_config("pixart_tiny")).model
STAGE = SETUP.model.stages[0]
SPEC = {"a": {"kernel": jax.ShapeDtypeStruct((3, 4), "float32")}, "b": jax.ShapeDtypeStruct((4,), "float32")}
PARAMS = jax.tree.map(lambda s: rng.normal(size=s.shape).astype(s.dtype), SPEC)


class Kind(NamedTuple):
    """A kind of file: make(folder) writes a whole one and returns its path, or its folder's; read(path) gives a tree of
    arrays, numbers and texts; parts: what of a folder is damaged (a pattern); text: is it JSON; sound(result, whole):
    may a damaged file give this."""

    make: Callable[[pathlib.Path], pathlib.Path]
    read: Callable[[pathlib.Path], Any]
    parts: str = ""
    text: bool = False
    sound: Callable[[Any, Any], bool] = lambda found, whole: alike(found, whole)


def alike(found: Any, whole: Any) -> bool:
    """Of equal structure, shapes and types, and finite."""
    if jax.tree.structure(found) != jax.tree.structure(whole):
        return False
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(whole), strict=True)
    return all(np.shape(a) == np.shape(b) and np.asarray(a).dtype.kind == np.asarray(b).dtype.kind for a, b in pairs)


def no_nan(found: Any, whole: Any) -> bool:
    """Of what a cache plans, in which an infinity may stand for never."""
    return not any(np.isnan(a).any() for a in map(np.asarray, jax.tree.leaves(found)) if a.dtype.kind == "f")


def finite(found: Any, whole: Any = None) -> bool:
    leaves = [np.asarray(a) for a in jax.tree.leaves(found)]
    return all(np.isfinite(a).all() for a in leaves if a.dtype.kind == "f")


def written(name: str, content: bytes | str) -> Callable[[pathlib.Path], pathlib.Path]:
    def make(where: pathlib.Path) -> pathlib.Path:
        (where / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return where / name

    return make


def arrays(name: str, compressed: bool = False, **found: Any) -> Callable[[pathlib.Path], pathlib.Path]:
    def make(where: pathlib.Path) -> pathlib.Path:
        save_arrays(where / name, found, compressed)
        return where / name

    return make


def idx(values: np.ndarray) -> bytes:
    return bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()


def mnist(where: pathlib.Path) -> pathlib.Path:
    for name, values in (("images-idx3", rng.integers(0, 9, (6, 4, 4))), ("labels-idx1", np.arange(6) % 10)):
        (where / f"train-{name}-ubyte.gz").write_bytes(gzip.compress(idx(values.astype(np.uint8))))
    return where


def pictures(suffix: str, **how: Any) -> Callable[[pathlib.Path], pathlib.Path]:
    def make(where: pathlib.Path) -> pathlib.Path:
        for i in range(2):
            image = rng.integers(0, 255, (6, 6, 3), np.uint8)
            Image.fromarray(image).save(where / f"{i}{suffix}", **how)
        return where

    return make


def planned(technique: str, **settings: Any) -> Callable[[pathlib.Path], Any]:
    """What a cache plans from a file."""

    def read(path: pathlib.Path) -> Any:
        key = "adjust" if technique == "block_caching" and path.suffix == ".npz" else "file"
        cache = CACHES[technique](**{key: str(path)}, **settings)
        plan = cache.plan(SETUP.rows, SETUP.model.stages)
        return [np.asarray(a) for a in jax.tree.leaves((plan.values, cache.learned))]

    return read


def calibration(technique: str, **content: Any) -> Callable[[pathlib.Path], pathlib.Path]:
    about = {"technique": technique, "model": SETUP.model.name, "solver": "euler", "steps": E, "data": "2 samples"}
    return written(f"{technique}.json", json.dumps({**about, **content}))


def tabled(solver: str) -> Callable[[pathlib.Path], Any]:
    """The table that a solver has from a file."""

    def read(path: pathlib.Path) -> Any:
        rows = SOLVERS[solver](file=str(path)).grid(SETUP.process, SETUP.times)
        return rows.t, rows.coefficients.weights

    return read


def staged(name: str, **found: np.ndarray) -> Callable[[pathlib.Path], pathlib.Path]:
    def make(where: pathlib.Path) -> pathlib.Path:
        save_by_stage(where / name, {STAGE.name: found})
        return where / name

    return make


def condition(where: pathlib.Path) -> pathlib.Path:
    cond = random_conditions(CONDITIONED, 1)
    save_file({k: np.ascontiguousarray(v) for k, v in cond.items()}, where / "cond.safetensors")
    return where / "cond.safetensors"


def init(key: jax.Array) -> Any:
    return {"a": {"kernel": jax.random.normal(key, (3, 4)), "bias": jnp.zeros(4)}, "s": jnp.ones(())}


def run_folder(where: pathlib.Path) -> pathlib.Path:
    def loss(params: Any, batch: Any, key: jax.Array) -> Any:
        x = batch["image"].reshape(len(batch["image"]), -1)[:, :3] / 255.0
        return jnp.mean((x @ params["a"]["kernel"] + params["a"]["bias"][None]) ** 2) * params["s"], {}

    data = Images(rng.integers(0, 255, (8, 2, 2, 1), np.uint8), np.zeros(8, np.int32))
    options = TrainOptions(steps=2, batch=4, checkpoint_every=1, devices=1)
    config = {"model": {"name": "dit"}, "train": {"steps": 2}, "data": {}}
    train(Task(init, loss), data, options, where / "run", config, progress=False)
    return where / "run"


def pipeline(where: pathlib.Path) -> pathlib.Path:
    shutil.copytree(PIPELINE, where / "pipeline")
    for file in (where / "pipeline").rglob("*.json"):  # one line each: files of several are taken for rows
        file.write_text(json.dumps(json.loads(file.read_text())))
    return where / "pipeline"


def pipelined(path: pathlib.Path) -> Any:
    """What is known of a pipeline's folder before any weight is read, and the ids of a prompt."""
    config = plain(pipeline_config(path, [("steps", 4)]))
    folder, _ = open_pipeline(path)
    found = find_encoder(folder.component("text_encoder"), kind=folder.components["text_encoder"])
    ids = open_tokenizer(folder.component("tokenizer")).encode("a red fox", 24) if TOKENIZERS else []
    config["pipeline"]["folder"] = ""
    return config, [found.encoder.width, found.encoder.length or 0], ids


def converted(where: pathlib.Path) -> pathlib.Path:
    from difax.weights.convert import _checkpointer

    with _checkpointer(streaming=False) as checkpointer:
        checkpointer.save((where / "converted").absolute(), PARAMS)
    return where / "converted"


def native(where: pathlib.Path) -> pathlib.Path:
    save_safetensors(where / "w.safetensors", PARAMS, {"config": {"steps": 3}, "step": 1})
    return where / "w.safetensors"


def sharded(where: pathlib.Path) -> pathlib.Path:
    flat = {"a/kernel": PARAMS["a"]["kernel"], "b": PARAMS["b"]}
    for name, array in flat.items():
        save_file({name: array}, where / f"{name[0]}.safetensors")
    index = {"metadata": {}, "weight_map": {name: f"{name[0]}.safetensors" for name in flat}}
    (where / "w.safetensors.index.json").write_text(json.dumps(index))
    return where


def sweep_row(method: str, **more: Any) -> dict[str, Any]:
    figure = {"psnr": [30.0, 29.0, 31.0], "kernel": None}
    speed = {"ratio": 2.0, "realised": 0.9, "turns": [2.0, 2.1], "seconds_per_image": 0.1}
    cost = {"ratio": 2.5, "gflops_per_image": 1.0}
    row = {"method": method, "family": "cache", "settings": {"cache.name": "fora"}, "quality": figure, "speed": speed}
    return {**row, "cost": cost, "decisions": {"strips": ["FF"], "blocks": [[1, 2]]}, "date": "2026-01-01", **more}


ROWS = [sweep_row("baseline", family="baseline", settings={}), sweep_row("fora"), sweep_row("steps=2", family="steps")]
CONFIG = {"model": {"name": "dit"}, "solver": {"name": "euler"}, "steps": 4, "weights": "fmnist_dit"}
SWEEP: dict[str, Any] = {"config": CONFIG, "seeds": 4, "batch": 2, "seed": 0, "device": "cpu", "jax": "0.10.2"}
SWEEP |= {"judged": False}


def reported(path: pathlib.Path) -> Any:
    """The rows of a sweep, through everything that shows them."""
    rows = read_measured(path.parent)
    measured = [row for row in rows if "speed" in row]
    if measured:
        table(rows)
        report(SWEEP, rows, {})
    return rows


def swept(path: pathlib.Path) -> Any:
    sweep = read_sweep(path.parent)
    assert title(sweep) and facts(sweep, ROWS)
    return sweep


E, L, B = len(SETUP.rows.i), STAGE.depth, STAGE.branches
LEARNED = {
    "bns": {"a": [1.0] * E, "b": np.eye(E).tolist()},
    "ddss": {"mu": np.eye(E).tolist(), "nu": np.eye(E).tolist(), "noise": [0.0] * E},
    "ltsl": {"data": [1.0] * E, "noise": [1.0] * E},
    "iia": {"base": "ddim", "gamma": np.full((E, 2), 0.1).tolist()},
    "usf": {
        "order": [1, 2, 2, 1][:E], "prediction": ["data"] * E, "estimate": [0] * E, "relaxation": ["none"] * E,
        "corrector": [False] * E,
    },
}  # fmt: skip
CURVE = [[0.1, None][: 1 + (i > 0)] + [0.2] * (i == 0) for i in range(E)]
lines = "".join(json.dumps(row) + "\n" for row in ROWS)

KINDS = {
    "JSON": Kind(written("x.json", json.dumps(SWEEP)), read_json, text=True, sound=finite),
    "rows": Kind(written("x.jsonl", lines), read_rows, text=True, sound=finite),
    "text": Kind(written("x.txt", "a prompt\nénd\n"), read_text, sound=lambda found, _: isinstance(found, str)),
    "prompts": Kind(written("x.txt", "a\nb\n"), lambda p: read_prompts(str(p)), sound=lambda found, _: all(found)),
    "latents": Kind(
        arrays("x.npz", latents=rng.normal(size=(2, 4, 4, 1)).astype(np.float32), other=np.arange(3)),
        lambda p: read_latents(str(p), 2, (4, 4, 1)),
        sound=lambda found, whole: alike(found, whole) and finite(found),
    ),
    "data.npz": Kind(
        arrays("x.npz", True, images=rng.integers(0, 9, (12, 4, 4), np.uint8), labels=np.arange(12) % 3),
        lambda p: npz(p)[:2],
    ),
    "idx": Kind(written("x", idx(np.arange(12, dtype=np.uint8))), lambda p: read_idx(p, 1)),
    "Fashion-MNIST": Kind(mnist, lambda p: fashion_mnist("train", p)[:2], parts="*.gz"),
    "png": Kind(pictures(".png"), lambda p: folder(p)[:2], parts="0.png"),
    "jpg": Kind(pictures(".jpg"), lambda p: folder(p)[:2], parts="0.jpg"),
    "webp": Kind(pictures(".webp", lossless=True), lambda p: folder(p)[:2], parts="0.webp"),
    **{
        name: Kind(
            calibration(name, times=SETUP.times[:-1].tolist(), **content), tabled(name), text=True, sound=no_nan
        )
        for name, content in LEARNED.items()
    },
    "steps_by": Kind(
        calibration("adadiff", steps_of=[4] * SETUP.model.classes), lambda p: steps_by_label(str(p), SETUP.model),
        text=True, sound=lambda found, _: len(found) == SETUP.model.classes and min(found) >= 1,
    ),
    "smoothcache": Kind(
        calibration("smoothcache", kmax=2, errors={STAGE.name: {b: np.full((E, 2), 0.1).tolist() for b in B}}),
        planned("smoothcache"), text=True, sound=no_nan,
    ),
    "teacache": Kind(
        calibration("teacache", coefficients=[1.0, 0.5, 0.0]), planned("teacache"), text=True, sound=no_nan
    ),
    "magcache": Kind(
        calibration("magcache", ratios=[1.0, *[0.9] * (E - 1)]), planned("magcache"), text=True, sound=no_nan
    ),
    "scheduled": Kind(
        calibration("scheduled", schedule=[1, *[0] * (E - 1)]), planned("scheduled"), text=True, sound=no_nan
    ),
    "block_caching": Kind(
        calibration("block_caching", changes={STAGE.name: {b: np.full((L, E), 0.1).tolist() for b in B}}),
        planned("block_caching"), text=True, sound=no_nan,
    ),
    "bacache": Kind(
        calibration("bacache", similarities={STAGE.name: {b: np.full((L, E, E), 0.5).tolist() for b in B}}),
        planned("bacache", updates=2, bubble=0), text=True, sound=no_nan,
    ),
    "routers": Kind(
        arrays("x.npz", **{STAGE.name: rng.normal(size=(E, L, len(B)))}),
        planned("harmonica"), sound=no_nan,
    ),
    "factors": Kind(
        staged("x.npz", **{f"{B[0]}.u": rng.normal(size=(L, 4, 2)), f"{B[0]}.v": rng.normal(size=(L, 2, 4))}),
        planned("icc", period=2), sound=no_nan,
    ),
    "adjustment": Kind(
        staged("x.npz", **{f"{B[0]}.{part}": rng.normal(size=(L, E, 4)) for part in ("scale", "shift")}),
        planned("block_caching", changes={STAGE.name: {b: np.full((L, E), 0.1) for b in B}}), sound=no_nan,
    ),
    "condition": Kind(condition, lambda p: load_conditions(CONDITIONED, str(p)), sound=alike),
    "real.npy": Kind(
        lambda where: (np.save(where / "x.npy", rng.integers(0, 9, (8, 4, 4, 1), np.uint8)), where / "x.npy")[1],
        lambda p: real_images(str(p), 2, None),
    ),
    "real.npz": Kind(
        arrays("x.npz", images=rng.integers(0, 9, (8, 4, 4, 1), np.uint8)), lambda p: real_images(str(p), 2, None)
    ),
    "sweep": Kind(written("sweep.json", json.dumps(SWEEP)), swept, text=True, sound=lambda *_: True),
    "rows of a sweep": Kind(written("rows.jsonl", lines), reported, text=True, sound=finite),
    "images of a sweep": Kind(
        arrays("x.npz", True, images=rng.integers(0, 9, (4, 4, 4, 1), np.uint8)), read_image_file,
        sound=lambda found, _: found.dtype == np.uint8 and found.ndim in (4, 5),
    ),
    "configuration of a run": Kind(
        written("config.json", json.dumps({**CONFIG, "train": {"steps": 3}, "data": {}})),
        lambda p: read_run(p.parent), text=True, sound=lambda *_: True,
    ),
    "checkpoint of a run": Kind(
        run_folder, lambda p: restore_ema(p, init), parts="checkpoints/2/**/*",
        sound=lambda found, whole: alike(found, whole) and finite(found),
    ),
    **{
        f"pipeline: {part}": Kind(
            pipeline, pipelined, parts=part, text=True, sound=lambda found, _: found[0]["steps"] == 4,
        )
        for part in (
            "model_index.json", "transformer/config.json", "vae/config.json", "text_encoder/config.json",
            "scheduler/scheduler_config.json", "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json",
        )
    },
    "weights": Kind(native, lambda p: (load_native(p, SPEC), tensor_shapes(p))),
    "metadata of weights": Kind(native, read_metadata, sound=lambda found, _: isinstance(found, dict)),
    "sharded weights": Kind(sharded, lambda p: load_native(p, SPEC), parts="*.json"),
    "converted weights": Kind(converted, lambda p: load_converted(p, SPEC), parts="**/*"),
}  # fmt: skip

# ---- damage ------------------------------------------------------------------------------------------------

OTHERS = {
    "a picture": b"\x89PNG\r\n\x1a\n" + bytes(64),
    "a zip": b"PK\x03\x04" + bytes(64),
    "an empty zip": b"PK\x05\x06" + bytes(18),
    "a gzip": gzip.compress(b"hello"),
    "an empty gzip": gzip.compress(b""),
    "a pickle": b"\x80\x04}q\x00.",
    "JSON": b"[1]",
    "a deep text": b"[" * 100_000,
    "noise": bytes(range(256)) * 4,
    "an .npy": b"\x93NUMPY\x01\x00\x46\x00{'descr': '<f4', 'fortran_order': False, 'shape': (9000000000,), }   \n",
}


def damaged_bytes(raw: bytes, random: np.random.Generator) -> Iterator[tuple[str, bytes]]:
    """Endless (what was done, bytes); the plain ones first."""
    n = max(len(raw), 1)
    yield "empty", b""
    plain = [(f"cut to {cut}", raw[:cut]) for cut in sorted({1, 8, n // 4, n // 2, n - 1})]
    plain += [(f"replaced by {name}", other) for name, other in OTHERS.items()]
    yield from (plain[i] for i in random.permutation(len(plain)))
    while True:
        a, length = int(random.integers(n)), int(random.integers(1, 9))
        flipped = bytearray(raw)
        if raw:
            flipped[a] ^= 1 << int(random.integers(8))
        yield f"bit of byte {a}", bytes(flipped)
        yield f"cut to {a}", raw[:a]
        yield f"zeros at {a}", raw[:a] + bytes(min(length, n - a)) + raw[a + length :]
        yield f"ones at {a}", raw[:a] + b"\xff" * min(length, n - a) + raw[a + length :]
        yield f"{length} bytes more at {a}", raw[:a] + random.bytes(length) + raw[a:]
        yield f"{length} bytes twice at {a}", raw[: a + length] + raw[a:]
        yield f"without {length} bytes at {a}", raw[:a] + raw[a + length :]


VALUES = {
    "null": "null", "a number": "-1", "a fraction": "1.5", "a text": '"text"', "a list": "[]", "an object": "{}",
    "true": "true", "a deep list": "[" * 200 + "]" * 200, "nan": "NaN", "infinity": "-Infinity", "1e999": "1e999",
    "a long number": "9" * 5000, "a large number": "9" * 30, "zero": "0", "a list of texts": '["a", "b"]',
}  # fmt: skip


def damaged_json(text: str, random: np.random.Generator) -> Iterator[tuple[str, bytes]]:
    """Each value in turn replaced by each of `VALUES`, each key left out or given twice; of JSON lines, in one line."""
    whole = [json.loads(line) for line in text.splitlines()] if text.endswith("\n") else [json.loads(text)]
    places = [(i, *place) for i, value in enumerate(whole) for place in _places(value)]
    todo = [(place, name) for place in places for name in (*VALUES, "left out", "twice")]
    for k in random.permutation(len(todo)):
        (i, *place), name = todo[k]
        value = copy.deepcopy(whole)
        at: Any = value[i]
        for step in place[:-1]:
            at = at[step]
        if not place:
            value[i] = "@@"
        elif name == "left out":
            del at[place[-1]]
        elif name == "twice" and isinstance(at, dict):
            at["@@twice"] = at[place[-1]]
        else:
            at[place[-1]] = "@@"
        made = [json.dumps(one).replace('"@@"', VALUES.get(name, "[]")) for one in value]
        if name == "twice" and place:
            made = [one.replace('"@@twice"', json.dumps(place[-1])) for one in made]
        yield f"{'.'.join(map(str, (i, *place)))}: {name}", ("\n".join(made) + "\n" * text.endswith("\n")).encode()


def _places(value: Any) -> Iterator[tuple[Any, ...]]:
    yield ()
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in items:
        yield from ((key, *rest) for rest in _places(part))


def member(values: np.ndarray | None = None, header: dict[str, Any] | None = None, body: bytes = b"") -> bytes:
    out = io.BytesIO()
    if values is not None:
        np.lib.format.write_array(out, values, allow_pickle=True)
        return out.getvalue()
    np.lib.format.write_array_header_1_0(out, header or {})
    return out.getvalue() + body


def damaged_arrays(raw: bytes, random: np.random.Generator) -> Iterator[tuple[str, bytes]]:
    """An .npz with each array in turn replaced by what is no array of numbers of its shape, or lies about its size."""
    with np.load(io.BytesIO(raw)) as found:
        whole = {name: found[name] for name in found.files}
    made: list[tuple[str, bytes]] = []

    def put(what: str, members: list[tuple[str, bytes]], edit: Callable[[bytes], bytes] = lambda b: b) -> None:
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of names that stand twice
            for name, content in members:
                archive.writestr(name, content)
        made.append((what, edit(out.getvalue())))

    for name, array in whole.items():
        rest = [(f"{k}.npy", member(a)) for k, a in whole.items() if k != name]
        about = {"descr": array.dtype.str, "fortran_order": False, "shape": array.shape}
        swaps = {
            "objects": member(np.asarray([{}], object)),
            "nothing": b"",
            "no array": b"hello",
            "texts": member(np.full(array.shape, "a")),
            "nan": member(np.full(array.shape, np.nan)),
            "complex": member(np.full(array.shape, 1j)),
            "booleans": member(np.ones(array.shape, bool)),
            "huge numbers": member(np.full(array.shape, 1e300)),
            "a scalar": member(np.asarray(1.0)),
            "no rows": member(array[:0]),
            "an axis more": member(array[None]),
            "turned": member(array.T),
            "8 GiB promised": member(header={**about, "shape": (8 << 30, *array.shape)}, body=bytes(100)),
            "an overflow promised": member(header={**about, "shape": (1 << 62, 8)}, body=bytes(100)),
            "less than promised": member(array)[:-4],
            "more than promised": member(array) + bytes(4),
            "a negative shape": member(header={**about, "shape": (-1, -4)}),
            "a record": member(np.zeros(array.shape, [("a", "<f4")])),
            "no bytes a value": member(header={**about, "descr": "|S0", "shape": (1 << 60,)}),
            "a header of parentheses": b"\x93NUMPY\x01\x00" + struct.pack("<H", 9000) + b"(" * 9000,
            "a header that calls": b"\x93NUMPY\x01\x00\x10\x00" + b"__import__('os')",
            "a version to come": b"\x93NUMPY\x09\x00" + bytes(100),
        }
        for what, content in swaps.items():
            put(f"{name}: {what}", [(f"{name}.npy", content), *rest])
        put(f"{name} left out", rest)
        put(f"{name} twice", [(f"{name}.npy", member(array)), (f"{name}.npy", member(array * 0)), *rest])
        put(f"{name} under another name", [(f"../{name}", member(array)), *rest])
        # bit 0 of the flags in the directory, and there a size that is another than the member's
        encrypted = lambda b: (i := b.index(b"PK\x01\x02"), b[: i + 8] + bytes([b[i + 8] | 1]) + b[i + 9 :])[1]  # noqa: E731
        put(f"{name} encrypted", [(f"{name}.npy", member(array)), *rest], encrypted)
        larger = lambda b: (i := b.index(b"PK\x01\x02"), b[: i + 24] + struct.pack("<I", 10**9) + b[i + 28 :])[1]  # noqa: E731
        put(f"{name} larger than it is", [(f"{name}.npy", member(array)), *rest], larger)
    put("a surplus array", [*((f"{k}.npy", member(a)) for k, a in whole.items()), ("more.npy", member(np.ones(3)))])
    yield from (made[i] for i in random.permutation(len(made)))


def damages(kind: Kind, raw: bytes, random: np.random.Generator) -> Iterator[tuple[str, bytes]]:
    """Of a part of a file's kind: by bytes and by what the format is made of, in turn."""
    streams = [damaged_bytes(raw, random)]
    if kind.text:
        streams.append(damaged_json(raw.decode(), random))
    if raw[:4] == b"PK\x03\x04":
        streams.append(damaged_arrays(raw, random))
    while streams:
        for stream in list(streams):
            try:
                yield next(stream)
            except StopIteration:
                streams.remove(stream)


# ---- tests -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """Interrupts what waits for ever."""

    def late(*_: Any) -> None:
        raise TimeoutError(f"longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def outcome(kind: Kind, path: pathlib.Path, whole: Any) -> tuple[str, str]:
    """What became of a damaged file: refused, equal or taken, or what is not allowed; and what was said."""
    try:
        with within(SECONDS), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = kind.read(path)
    except (ValueError, FileNotFoundError) as error:  # the latter of data sets alone, where a file is missing
        text = str(error)
        named = path.name in text or str(path.parent) in text
        return ("refused" if named else "refused without a name"), " ".join(text.split())
    except Exception as error:
        return f"raised {type(error).__name__}", " ".join(str(error).split())
    if alike(found, whole) and all(
        np.array_equal(a, b) for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(whole), strict=True)
    ):
        return "equal", ""
    return ("taken" if kind.sound(found, whole) else "nonsense accepted"), str(found)[:300]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """kind -> (path that its reader takes, what it reads of the whole file), made once."""
    made: dict[str, tuple[pathlib.Path, Any]] = {}

    def get(name: str) -> tuple[pathlib.Path, Any]:
        if name not in made:
            path = KINDS[name].make(tmp_path_factory.mktemp("file"))
            made[name] = path, KINDS[name].read(path)
        return made[name]

    return get


PICTURES = ("png", "jpg", "webp")
# of a pipeline's files, each of which takes a second, two are damaged in every run; what orbax reads takes longer
CASES = [
    (name, EVERY_RUN)
    for name in KINDS
    if (not name.startswith("pipeline: ") or name.endswith(("index.json", "r.json")))
    and name not in ("checkpoint of a run", "converted weights")
]
CASES += [pytest.param(name, 40 if name.startswith("pipeline: ") else ALL, marks=pytest.mark.slow) for name in KINDS]


@pytest.mark.parametrize(("name", "count"), CASES)
def test_damaged_files_are_refused_by_name(files, name, count, capsys):
    kind = KINDS[name]
    path, whole = files(name)
    parts = sorted(p for p in path.glob(kind.parts) if p.is_file()) if kind.parts else [path]
    random, tally, wrong = np.random.default_rng(count), Counter(), []
    each = max(1, count // len(parts))
    for part in parts:
        raw = part.read_bytes()
        stream = damages(kind, raw, random)
        for _ in range(each):
            what, content = next(stream)
            part.write_bytes(content)
            result, said = outcome(kind, path if kind.parts else part, whole)
            tally[result] += 1
            if result not in ("refused", "equal", "taken"):
                wrong.append(f"{part.name}, {what}: {result}: {said}"[:300])
        part.unlink()
        result, said = outcome(kind, path if kind.parts else part, whole)
        if name in PICTURES and result == "nonsense accepted":
            result = "taken"  # a folder of one picture less is one
        if name == "rows" or name == "rows of a sweep":
            result = "equal" if said == "[]" else result  # nothing is measured yet
        tally[result] += 1
        if result not in ("refused", "equal", "taken"):
            wrong.append(f"{part.name} removed: {result}: {said}"[:300])
        part.write_bytes(raw)
    with capsys.disabled():
        print(f"\n{name}: {sum(tally.values())} tried: {dict(sorted(tally.items()))}", end=" ")
    if wrong:
        pytest.fail("\n".join(wrong), pytrace=False)
    assert tally["refused"]
