"""difax/weights/checkpoint.py: reading through a table, every refusal, and difax's own files."""

import json
import struct
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from difax.weights.checkpoint import (
    Source,
    load_native,
    load_safetensors,
    read_metadata,
    save_safetensors,
    tensor_shapes,
)

LAYERS = {"layer": 3}
TABLE = {
    "ends/conv": Source(("conv.weight",), (2, 3, 1, 0)),
    "ends/bias": Source(("conv.bias",)),
    "ends/time": Source(("layers.{layer}.time",), (1, 0), shared=True),
    "blocks/qkv": Source(tuple(f"layers.{{layer}}.{p}.weight" for p in "qkv"), (1, 0)),
}
SPEC = {
    "ends": {
        "conv": jax.ShapeDtypeStruct((12, 4), jnp.float32),
        "bias": jax.ShapeDtypeStruct((4,), jnp.float32),
        "time": jax.ShapeDtypeStruct((5, 2), jnp.float32),
    },
    "blocks": {"qkv": jax.ShapeDtypeStruct((3, 4, 6), jnp.float32)},
}
POSITIONS = np.linspace(-1, 1, 8, dtype=np.float32).reshape(1, 8)


def checkpoint() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    time = normal(2, 5)
    tensors = {"conv.weight": normal(4, 3, 2, 2), "conv.bias": normal(4)}
    for i in range(3):
        tensors[f"layers.{i}.time"] = time.copy()
        tensors |= {f"layers.{i}.{part}.weight": normal(2, 4) for part in "qkv"}
    return tensors


def load(path, **kwargs):
    return load_safetensors(path, SPEC, TABLE, LAYERS, constants={"positions": POSITIONS}, **kwargs)


def check_loaded(params, tensors) -> None:
    """The parameters by their meaning, element by element, from the tensors they came from."""
    conv = np.asarray(params["ends"]["conv"]).reshape(2, 2, 3, 4)
    for row, column, channel, out in np.ndindex(2, 2, 3, 4):
        assert conv[row, column, channel, out] == tensors["conv.weight"][out, channel, row, column]
    np.testing.assert_array_equal(params["ends"]["bias"], tensors["conv.bias"])
    np.testing.assert_array_equal(params["ends"]["time"], tensors["layers.2.time"].T)
    x = np.arange(4.0)
    for layer in range(3):
        q, k, v = np.split(x @ np.asarray(params["blocks"]["qkv"][layer]), 3)
        for part, got in zip("qkv", (q, k, v), strict=True):
            np.testing.assert_allclose(got, tensors[f"layers.{layer}.{part}.weight"] @ x, rtol=1e-5)


def test_table_arranges_concatenates_stacks_and_takes_one_of_equal_copies(tmp_path):
    tensors = checkpoint()
    save_file(tensors, tmp_path / "a.safetensors")
    check_loaded(load(tmp_path / "a.safetensors"), tensors)
    assert tensor_shapes(tmp_path)["layers.1.q.weight"] == (2, 4)


def save_sharded(folder, tensors) -> dict:
    names = sorted(tensors)
    shards = {f"m-{i}.safetensors": names[i::3] for i in range(3)}
    for file, held in shards.items():
        save_file({n: tensors[n] for n in held}, folder / file)
    index = {"metadata": {}, "weight_map": {n: file for file, held in shards.items() for n in held}}
    (folder / "m.safetensors.index.json").write_text(json.dumps(index))
    return index


@pytest.mark.parametrize("name", ["", "m.safetensors.index.json"])
def test_sharded(tmp_path, name):
    tensors = checkpoint()
    save_sharded(tmp_path, tensors)
    check_loaded(load(tmp_path / name), tensors)


def test_reads_one_tensor_at_a_time(tmp_path):
    """What lives at once while a large stacked parameter is read: the parameter and about one layer of it."""
    depth, width = 16, 512  # a layer of 1 MiB, beside which what Python itself allocates is nothing
    one = np.ones((width, width), np.float32)
    save_file({f"b.{i}.w": one * i for i in range(depth)}, tmp_path / "a.safetensors")
    spec = {"w": jax.ShapeDtypeStruct((depth, width, width), jnp.float32)}

    def read():
        table = {"w": Source(("b.{layer}.w",), (1, 0))}
        return load_safetensors(tmp_path / "a.safetensors", spec, table, {"layer": depth})

    read()  # what is imported and traced on the first use is not counted
    tracemalloc.start()
    params = read()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert float(params["w"][7, 0, 0]) == 7
    assert peak < (depth + 3) * one.nbytes, f"peak {peak / one.nbytes:.1f} tensors for {depth}"


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_dtype_is_the_files_unless_asked(tmp_path, dtype):
    tensors = {k: np.asarray(jnp.asarray(v, dtype)) for k, v in checkpoint().items()}
    tensors["positions"] = np.asarray(jnp.asarray(POSITIONS, dtype))  # rounding of a half is accepted
    save_file(tensors, tmp_path / "a.safetensors")
    kept = load(tmp_path / "a.safetensors")
    assert {str(x.dtype) for x in jax.tree.leaves(kept)} == {dtype}
    cast = load(tmp_path / "a.safetensors", dtype=jnp.float32)
    assert {str(x.dtype) for x in jax.tree.leaves(cast)} == {"float32"}
    check_loaded(cast, {k: v.astype(np.float32) for k, v in tensors.items()})


# ---- refusals: each row edits the tensors; the message must hold the words -------------------------------


def _renamed(t):
    t["layers.1.key.weight"] = t.pop("layers.1.k.weight")


def _shifted_positions(t):
    t["positions"] = POSITIONS + np.float32(2e-5)


REFUSALS = {
    "missing": (lambda t: t.pop("conv.bias"), ["'conv.bias'", "missing", "ends/bias"]),
    "missing, nearest": (_renamed, ["'layers.1.k.weight'", "nearest in the file: 'layers.1.key.weight'"]),
    "missing several": (
        lambda t: [t.pop(f"layers.2.{p}.weight") for p in "qkv"],
        ["'layers.2.q.weight'", "and 2 more"],
    ),
    "surplus": (
        lambda t: t.update({"conv.scale": np.ones(4, np.float32)}),
        ["surplus tensor 'conv.scale' of shape (4,)", "nearest expected: 'conv.bias'"],
    ),
    "surplus layer": (
        lambda t: t.update({"layers.3.q.weight": np.ones((2, 4), np.float32)}),
        ["surplus tensor 'layers.3.q.weight'"],
    ),
    "wrong shape": (
        lambda t: t.update({"layers.1.v.weight": np.ones((4, 2), np.float32)}),
        ["'layers.1.v.weight'", "wrong shape (4, 2)", "expected (2, 4)"],
    ),
    "wrong rank": (
        lambda t: t.update({"conv.weight": np.ones((4, 12), np.float32)}),
        ["'conv.weight'", "wrong shape (4, 12)", "4 axes that fold into (12, 4)"],
    ),
    "integers": (
        lambda t: t.update({"conv.bias": np.ones(4, np.int32)}),
        ["'conv.bias'", "is I32", "F32 or F16 or BF16"],
    ),
    "unequal copies": (
        lambda t: t["layers.2.time"].__setitem__((0, 0), t["layers.0.time"][0, 0] + 0.5),
        ["'layers.2.time' must equal 'layers.0.time'", "differ by 0.5"],
    ),
    "other positions": (_shifted_positions, ["'positions' differs", "2e-05"]),
    "positions of another size": (
        lambda t: t.update({"positions": np.ones((1, 9), np.float32)}),
        ["'positions'", "wrong shape (1, 9)", "expected (1, 8)"],
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refuses_tensors(tmp_path, case):
    edit, words = REFUSALS[case]
    tensors = checkpoint()
    edit(tensors)
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(ValueError) as error:
        load(tmp_path / "a.safetensors")
    for word in ("a.safetensors", *words):
        assert word in str(error.value)


def _cut(data: bytes) -> bytes:
    return data[:-30]


FOREIGN = {
    "truncated": (_cut, ["truncated: tensor 'layers.2.v.weight' ends at byte", "the file at"]),
    "truncated header": (lambda d: d[:200], ["truncated or damaged in its header", "200 bytes"]),
    "empty": (lambda d: b"", ["not a safetensors file", "0 bytes"]),
    "text": (lambda d: b"hello, this is no checkpoint", ["not a safetensors file"]),
    "zip pickle": (lambda d: b"PK\x03\x04" + bytes(100), ["PyTorch pickle", "safetensors.torch.save_file"]),
    "old pickle": (lambda d: b"\x80\x02\x8a\n" + bytes(100), ["PyTorch pickle"]),
    "trailing bytes": (lambda d: d + b"xx", ["damaged"]),
    "cut to a header of 0x80 bytes": (
        lambda d: struct.pack("<Q", 0x80) + b'{"w":{"dtype":"F32","shape":[9],"data_offsets":[0,36]}}'.ljust(0x80),
        ["truncated: tensor 'w' ends at byte 172, the file at 136"],
    ),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_refuses_files(tmp_path, case):
    damage, words = FOREIGN[case]
    file = tmp_path / "a.safetensors"
    save_file(checkpoint(), file)
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError) as error:
        load(file)
    for word in ("a.safetensors", *words):
        assert word in str(error.value)


def _lost_shard(folder, index):
    (folder / "m-1.safetensors").unlink()


def _lost_tensor(folder, index):
    tensors = load_file(folder / "m-1.safetensors")
    tensors.pop("conv.weight")
    save_file(tensors, folder / "m-1.safetensors")


def _unlisted(folder, index):
    del index["weight_map"]["conv.weight"]
    (folder / "m.safetensors.index.json").write_text(json.dumps(index))


def _outside(folder, index):
    index["weight_map"]["conv.weight"] = "../m-1.safetensors"
    (folder / "m.safetensors.index.json").write_text(json.dumps(index))


SHARDS = {
    "lost shard": (_lost_shard, ["shard 'm-1.safetensors' is not beside it"]),
    "lost tensor": (_lost_tensor, ["m-1.safetensors", "lacks tensor 'conv.weight'"]),
    "unlisted tensor": (_unlisted, ["m-1.safetensors", "unknown to its index", "'conv.weight'"]),
    "shard outside": (_outside, ["'../m-1.safetensors'"]),
    "no index": (
        lambda folder, index: (folder / "m.safetensors.index.json").write_text("{}"),
        ["m.safetensors.index.json", "weight_map"],
    ),
    "two indices": (
        lambda folder, index: (folder / "n.safetensors.index.json").write_text("{}"),
        ["m.safetensors.index.json, n.safetensors.index.json"],
    ),
}


@pytest.mark.parametrize("case", SHARDS)
def test_refuses_shards(tmp_path, case):
    edit, words = SHARDS[case]
    edit(tmp_path, save_sharded(tmp_path, checkpoint()))
    with pytest.raises(ValueError) as error:
        load(tmp_path)
    for word in words:
        assert word in str(error.value)


def test_refuses_absent_paths_and_tables_of_another_model(tmp_path):
    with pytest.raises(ValueError, match="nowhere: no such file"):
        load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="found none"):
        load(tmp_path)
    with pytest.raises(ValueError, match="ends/conv"):
        load_safetensors(tmp_path, {"ends": {"bias": SPEC["ends"]["bias"]}}, TABLE, LAYERS)


# ---- difax's own files -----------------------------------------------------------------------------------


def tree(dtype):
    key = jax.random.key(0)
    return {
        "ends": {"bias": jax.random.normal(key, (3,), dtype), "scale": jnp.asarray(0.5, dtype)},
        "blocks": {"qkv": {"kernel": jax.random.normal(key, (2, 4, 6), dtype)}},
    }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_native_round_trip(tmp_path, dtype):
    params, file = tree(dtype), tmp_path / "own.safetensors"
    params["codes"] = jnp.arange(-3, 3, dtype=jnp.int8)
    # strides that are not C order must not reach the file as they are
    params["turned"] = np.arange(6, dtype=np.float32).reshape(2, 3).T
    save_safetensors(file, params, {"model": {"depth": 2}, "step": 7})
    assert read_metadata(file) == {"model": {"depth": 2}, "step": 7}
    assert set(tensor_shapes(file)) >= {"ends/bias", "ends/scale", "blocks/qkv/kernel"}
    back = load_native(file, jax.eval_shape(lambda: jax.tree.map(jnp.asarray, params)))
    assert jax.tree.structure(back) == jax.tree.structure(params)
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(params), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_native_file_is_reproducible_and_replaces_the_old_one_whole(tmp_path):
    file = tmp_path / "own.safetensors"
    metadata = {name: i for i, name in enumerate("zyxwvutsrq")}
    save_safetensors(file, tree("bfloat16"), metadata)
    first = file.read_bytes()
    save_safetensors(file, tree("bfloat16"), dict(reversed(metadata.items())))
    assert file.read_bytes() == first
    assert [f.name for f in tmp_path.iterdir()] == ["own.safetensors"]
    plain = tmp_path / "plain"
    plain.touch()
    assert file.stat().st_mode == plain.stat().st_mode


def test_failed_save_keeps_the_old_file_and_leaves_nothing(tmp_path, monkeypatch):
    import difax.weights.checkpoint as module

    file = tmp_path / "own.safetensors"
    save_safetensors(file, tree("float32"))
    before = file.read_bytes()

    def full_disk(tensors, path, metadata):
        path.write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "save_file", full_disk)
    with pytest.raises(ValueError, match=r"cannot write .*own.safetensors: .*No space left"):
        save_safetensors(file, tree("float32"))
    assert file.read_bytes() == before
    assert [f.name for f in tmp_path.iterdir()] == ["own.safetensors"]


def test_refuses_to_save(tmp_path):
    with pytest.raises(ValueError, match=r"cannot write .*nowhere"):
        save_safetensors(tmp_path / "nowhere" / "a.safetensors", tree("float32"))
    with pytest.raises(ValueError, match="cannot write ends/name: str is no array"):
        save_safetensors(tmp_path / "a.safetensors", {"ends": {"name": "x"}})
    assert not list(tmp_path.iterdir())


def test_native_load_names_the_tensor(tmp_path):
    file = tmp_path / "own.safetensors"
    save_safetensors(file, tree("float32"))
    spec = jax.eval_shape(lambda: tree("float32"))
    spec["ends"]["bias"] = jax.ShapeDtypeStruct((4,), jnp.float32)
    with pytest.raises(ValueError, match=r"'ends/bias'.* wrong shape \(3,\); expected \(4,\)"):
        load_native(file, spec)
    spec = jax.eval_shape(lambda: tree("float32"))
    spec["ends"]["bias"] = jax.ShapeDtypeStruct((3,), jnp.int8)
    with pytest.raises(ValueError, match="'ends/bias'.* is F32; expected I8"):
        load_native(file, spec)


def test_metadata_of_a_foreign_file_is_empty(tmp_path):
    save_file(checkpoint(), tmp_path / "a.safetensors", {"format": "pt"})
    assert read_metadata(tmp_path / "a.safetensors") == {}
