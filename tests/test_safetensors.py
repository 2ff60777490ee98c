"""difax/weights/checkpoint.py: reading through a table, every refusal, and difax's own files."""

import json
import struct
import tracemalloc

import jax
import jax.numpy as jnp
import ml_dtypes
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


# ---- what other tools do to a file ---------------------------------------------------------------------------------

PREFIXES = [
    "model.diffusion_model.", "diffusion_model.", "model.", "transformer.", "net.", "module.", "_orig_mod.", "ema.",
    "module._orig_mod.", "model.module.net.", "state_dict.model.diffusion_model.", "some_tool.0.",
]  # fmt: skip


def prefixed(tensors, prefix):
    return {prefix + name: value for name, value in tensors.items()}


@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_common_prefix_is_dropped(tmp_path, prefix):
    tensors = checkpoint()
    save_file(prefixed(tensors, prefix), tmp_path / "a.safetensors")
    check_loaded(load(tmp_path / "a.safetensors"), tensors)
    assert tensor_shapes(tmp_path, [TABLE]) == {name: a.shape for name, a in tensors.items()}


BESIDE = {
    "first_stage_model.decoder.conv.weight": np.ones((2, 2), np.float32),
    "vae.conv.bias": np.ones(4, np.float32),
    "cond_stage_model.transformer.layers.0.q.weight": np.ones((5, 5), np.float32),
    "text_encoders.t5xxl.layers.0.q.weight": np.ones((7, 7), np.int32),
    "x": np.ones(1, np.int64),
}


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "net."])
def test_all_in_one(tmp_path, prefix):
    """What lies outside of the network's prefix is left out; within it every tensor must have its place."""
    file, tensors = tmp_path / "a.safetensors", checkpoint()
    save_file(prefixed(tensors, prefix) | BESIDE, file)
    check_loaded(load(file), tensors)
    rows = {
        "missing": ({n: a for n, a in tensors.items() if n != "conv.bias"}, "tensor 'conv.bias' .*is missing"),
        "surplus": (tensors | {"conv.extra": np.ones(2, np.float32)}, "surplus tensor 'conv.extra'"),
        "shape": (tensors | {"conv.bias": np.ones(5, np.float32)}, r"'conv.bias' .*wrong shape \(5,\)"),
    }
    for changed, words in rows.values():
        save_file(prefixed(changed, prefix) | BESIDE, file)
        with pytest.raises(ValueError, match=words):
            load(file)
    # two networks in one file: which one is not for the reader to choose
    save_file(prefixed(tensors, "ema.") | prefixed(tensors, "model."), file)
    with pytest.raises(ValueError, match="several networks, under 'ema.', 'model.'"):
        load(file)
    # without a prefix there is nothing that would tell the network from what lies beside it
    save_file(tensors | BESIDE, file)
    with pytest.raises(ValueError, match="surplus tensor 'cond_stage_model.transformer.layers.0.q.weight'"):
        load(file)


EIGHTHS = {"E4M3": ml_dtypes.float8_e4m3fn, "E5M2": ml_dtypes.float8_e5m2}
WEIGHTS = [f"layers.{i}.{part}.weight" for i in range(3) for part in "qkv"]
FP8 = {  # suffix, shape of the scale of a weight of two rows, dtype of the scale
    "comfy": ("scale_weight", (), np.float32),
    "compressed": ("weight_scale", (1,), ml_dtypes.bfloat16),
    "inverse by name only": ("weight_scale_inv", (1,), np.float32),
    "per row": ("weight_scale", (2,), np.float32),
    "per row, kept": ("scale_weight", (2, 1), np.float16),
}


def eighths(tensors, kind, suffix=None, shape=(), dtype=np.float32):
    """The file with its weights in fp8, and what they stand for."""
    rng, wanted, written = np.random.default_rng(1), dict(tensors), dict(tensors)
    for name in WEIGHTS:
        written[name] = tensors[name].astype(EIGHTHS[kind])
        wanted[name] = written[name].astype(np.float32)
        if suffix:
            scale = rng.uniform(0.5, 2, shape).astype(dtype)
            written[name.removesuffix("weight") + suffix] = scale
            scale = scale.astype(np.float32)
            wanted[name] = wanted[name] * (scale.reshape(2, 1) if scale.size == 2 else scale.reshape(()))
    return written, wanted


@pytest.mark.parametrize("kind", EIGHTHS)
@pytest.mark.parametrize("case", FP8)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_fp8_with_scales_is_value_times_scale(tmp_path, kind, case, prefix):
    written, wanted = eighths(checkpoint(), kind, *FP8[case])
    written["scaled_fp8"] = np.zeros(0, EIGHTHS[kind])
    written |= {name.removesuffix("weight") + "scale_input": np.ones(1, np.float32) for name in WEIGHTS[:2]}
    written |= {name.removesuffix("weight") + "input_scale": np.ones(1, np.float32) for name in WEIGHTS[2:4]}
    written[WEIGHTS[5].removesuffix("weight") + "comfy_quant"] = np.frombuffer(b'{"format": "float8_e4m3fn"}', np.uint8)
    save_file(prefixed(written, prefix), tmp_path / "a.safetensors")
    params = load(tmp_path / "a.safetensors")
    assert {str(a.dtype) for a in jax.tree.leaves(params)} == {"float32"}
    check_loaded(params, wanted)
    half = load(tmp_path / "a.safetensors", dtype="bfloat16")["blocks"]["qkv"]
    np.testing.assert_array_equal(half, params["blocks"]["qkv"].astype("bfloat16"))


@pytest.mark.parametrize("shape", [(4,), (4, 1), (4, 1, 1, 1)])
def test_a_scale_of_rows_serves_a_convolution_too(tmp_path, shape):
    tensors, scale = checkpoint(), np.array([0.5, 2, 4, 1], np.float32)
    eighth = tensors["conv.weight"].astype(ml_dtypes.float8_e4m3fn)
    wanted = tensors | {"conv.weight": eighth.astype(np.float32) * scale.reshape(4, 1, 1, 1)}
    save_file(tensors | {"conv.weight": eighth, "conv.weight_scale": scale.reshape(shape)}, tmp_path / "a.safetensors")
    check_loaded(load(tmp_path / "a.safetensors"), wanted)


@pytest.mark.parametrize("kind", EIGHTHS)
@pytest.mark.parametrize("rest, one", [("bfloat16", "bfloat16"), ("float16", "float16"), ("float32", "float32")])
def test_fp8_without_scales_is_what_it_is(tmp_path, kind, rest, one):
    tensors = {k: np.asarray(jnp.asarray(v, rest)) for k, v in checkpoint().items()}
    written, wanted = eighths({k: v.astype(np.float32) for k, v in tensors.items()}, kind)
    save_file({k: v if k in WEIGHTS else tensors[k] for k, v in written.items()}, tmp_path / "a.safetensors")
    params = load(tmp_path / "a.safetensors")
    assert {str(a.dtype) for a in jax.tree.leaves(params)} == {one}
    check_loaded(jax.tree.map(lambda a: a.astype("float32"), params), wanted)


def _scale(value, name="layers.1.k.scale_weight"):
    return lambda t: t.update({name: np.asarray(value)})


BAD_SCALES = {
    "shape": (_scale(np.ones(3, np.float32)), ["'layers.1.k.scale_weight'", "shape (3,)", "2 rows"]),
    "blocks": (_scale(np.ones((1, 2), np.float32)), ["shape (1, 2)"]),
    "nan": (_scale(np.full((), np.nan, np.float32)), ["'layers.1.k.scale_weight'", "1 values that are not finite"]),
    "inf": (_scale(np.full((1,), np.inf, np.float32)), ["not finite"]),
    "integer": (_scale(np.ones((), np.int32)), ["is I32"]),
    "two": (_scale(np.ones((), np.float32), "layers.1.k.weight_scale"), ["two scales", "weight_scale"]),
    "of nothing": (_scale(np.ones((), np.float32), "layers.7.k.scale_weight"), ["surplus tensor"]),
    "of a wide weight": (lambda t: t.update({"conv.scale_weight": np.ones((), np.float32)}), ["surplus tensor"]),
    "unknown": (_scale(np.ones((), np.float32), "layers.1.k.scales"), ["surplus tensor 'layers.1.k.scales'"]),
}


@pytest.mark.parametrize("case", BAD_SCALES)
def test_refuses_scales(tmp_path, case):
    edit, words = BAD_SCALES[case]
    written, _ = eighths(checkpoint(), "E4M3", "scale_weight")
    edit(written)
    save_file(written, tmp_path / "a.safetensors")
    with pytest.raises(ValueError) as error:
        load(tmp_path / "a.safetensors")
    for word in ("a.safetensors", *words):
        assert word in str(error.value)


F16, BF16, F32, F64 = np.float16, ml_dtypes.bfloat16, np.float32, np.float64
MIXED = {  # which tensors have which dtype, the others bfloat16 -> the dtype of all
    "one layer of a stack": (lambda n: n.startswith("layers.1.") and F32, F32),
    "one part of a layer": (lambda n: n == "layers.2.v.weight" and F32, F32),
    "biases": (lambda n: n.endswith("bias") and F32, F32),
    "the other half": (lambda n: n.endswith("bias") and F16, F32),
    "double": (lambda n: n.startswith("layers.1.q") and F64, F32),
    "all double": (lambda n: F64, F32),
    "all single": (lambda n: F32, F32),
    "all half": (lambda n: F16, F16),
    "all alike": (lambda n: False, BF16),
}


@pytest.mark.parametrize("case", MIXED)
def test_several_dtypes_are_read_in_the_one_that_holds_them_all(tmp_path, case):
    of, one = MIXED[case]
    written = {name: a.astype(of(name) or BF16) for name, a in checkpoint().items()}
    written |= {name: written["layers.0.time"].astype(a.dtype) for name, a in written.items() if "time" in name}
    save_file(written, tmp_path / "a.safetensors")
    params = load(tmp_path / "a.safetensors")
    assert {a.dtype for a in jax.tree.leaves(params)} == {np.dtype(one)}
    wanted = {name: a.astype(one).astype(np.float32) for name, a in written.items()}
    check_loaded(jax.tree.map(lambda a: a.astype("float32"), params), wanted)
    asked = load(tmp_path / "a.safetensors", dtype="bfloat16")
    assert {str(a.dtype) for a in jax.tree.leaves(asked)} == {"bfloat16"}


@pytest.mark.parametrize("dtype", [F32, F16, BF16, F64, ml_dtypes.float8_e4m3fn])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused(tmp_path, dtype, value):
    tensors = checkpoint()
    tensors["layers.1.k.weight"][1, 2] = value
    tensors["layers.1.k.weight"] = tensors["layers.1.k.weight"].astype(dtype)
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"a.safetensors: tensor 'layers.1.k.weight' holds 1 values .*finite, of 8"):
        load(tmp_path / "a.safetensors")


# dtype of a tensor, its largest value, that of its scale, dtype that is asked for; what is named
BEYOND = {
    "F64": (F64, 1e200, None, None, r"holds 1e\+200; allowed in float32: up to 3.4e\+38"),
    "F64, half": (F64, 1e6, None, "float16", r"holds 1e\+06; allowed in float16: up to 6.55e\+04"),
    "half": (F32, -1e6, None, "float16", r"holds 1e\+06; allowed in float16"),
    "bfloat16": (F32, 3.4e38, None, "bfloat16", r"holds 3.4e\+38; allowed in bfloat16"),
    "scale": (ml_dtypes.float8_e4m3fn, 448, np.float32(1e37), None, r"times 'layers.1.k.scale_weight' holds inf"),
    "scale F64": (ml_dtypes.float8_e4m3fn, 2, np.float64(1e300), None, r"times 'layers.1.k.scale_weight' holds inf"),
    "scale, half": (ml_dtypes.float8_e4m3fn, 448, np.float32(1e3), "float16", r"times .* holds 4.48e\+05; allowed"),
}


@pytest.mark.parametrize("case", BEYOND)
def test_values_beyond_the_dtype_they_are_read_in_are_refused(tmp_path, case):
    kind, value, scale, dtype, words = BEYOND[case]
    tensors = checkpoint()
    tensors["layers.1.k.weight"] = tensors["layers.1.k.weight"].astype(kind)
    if scale is not None:
        tensors["layers.1.k.scale_weight"] = np.asarray(scale)
    tensors["layers.1.k.weight"][1, 2] = value
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=f"a.safetensors: tensor 'layers.1.k.weight'.* {words}"):
        load(tmp_path / "a.safetensors", dtype=dtype)


# ---- fake and hostile headers --------------------------------------------------------------------------------------


def written(header, data=b"", length=None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def one(dtype="F32", shape=(1,), offsets=(0, 4), **more):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


HOSTILE = {
    "length 2^60": (written({"w": one()}, bytes(4), 2**60), "truncated or damaged in its header"),
    "length 2^64 - 1": (written({"w": one()}, bytes(4), 2**64 - 1), "truncated or damaged in its header"),
    "length 0": (written(b"", bytes(4)), "not a safetensors file"),
    "negative offsets": (written({"w": one(offsets=(-4, 0))}, bytes(4)), "no dtype, shape or place"),
    "offsets in turn": (written({"w": one(offsets=(4, 0))}, bytes(4)), "no dtype, shape or place"),
    "offsets beyond": (written({"w": one(offsets=(2**62, 2**62 + 4))}, bytes(4)), "truncated: tensor 'w'"),
    "offsets of text": (written({"w": one(offsets=("0", "4"))}, bytes(4)), "no dtype, shape or place"),
    "one offset": (written({"w": one(offsets=(0,))}, bytes(4)), "no dtype, shape or place"),
    "overlap": (written({"v": one(), "w": one()}, bytes(4)), "tensor 'w' begins at byte"),
    "gap": (written({"v": one(), "w": one(offsets=(8, 12))}, bytes(12)), "tensor 'w' begins at byte"),
    "behind the end": (written({"w": one()}, bytes(9)), "the last tensor ends at byte"),
    "other size": (written({"w": one(shape=(2,))}, bytes(4)), r"tensor 'w' of F32 \(2,\) has 4 bytes"),
    "huge shape": (written({"w": one(shape=(2**40, 2**40))}, bytes(4)), "has 4 bytes"),
    "negative shape": (written({"w": one(shape=(-1,))}, bytes(4)), "no dtype, shape or place"),
    "shape of booleans": (written({"w": one(shape=(True,))}, bytes(4)), "no dtype, shape or place"),
    "shape of floats": (written({"w": one(shape=(1.0,))}, bytes(4)), "no dtype, shape or place"),
    "many axes": (written({"w": one(shape=(1,) * 50)}, bytes(4)), "no dtype, shape or place"),
    "no dtype": (written({"w": {"shape": [1], "data_offsets": [0, 4]}}, bytes(4)), "no dtype, shape or place"),
    "tensor is a number": (written({"w": 3}, bytes(4)), "no dtype, shape or place"),
    "a list": (written([1, 2]), "not a safetensors file"),
    "a long name": (written({"w" * 100_000: one()}, bytes(4)), r"a tensor's name of 100000 letters \('wwww"),
    "deep": (written(b'{"w":' * 50_000), "damaged in its header"),
    "twice": (written(b'{"w":%s,"w":%s}' % ((json.dumps(one()).encode(),) * 2), bytes(4)), "'w' stands there twice"),
    "binary": (written(b"{\xff\xfe\x00"), "damaged in its header"),
    "metadata of numbers": (written({"__metadata__": {"difax": 3}, "w": one()}, bytes(4)), "__metadata__"),
    "not wanted": (written({"w": one()}, bytes(4)), "'conv.weight' .*is missing"),
    "four bits": (written({"w": one("F4", (8,))}, bytes(4)), "'conv.weight' .*is missing"),
    "no tensor": (written({}), "'conv.weight' .*is missing"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_refuses_hostile_headers(tmp_path, case):
    data, words = HOSTILE[case]
    file = tmp_path / "a.safetensors"
    file.write_bytes(data)
    with pytest.raises(ValueError, match=words) as error:
        load(file)
    assert "a.safetensors" in str(error.value) and len(str(error.value)) < 1000


def test_a_wanted_tensor_of_an_unknown_dtype_or_without_values_is_refused(tmp_path):
    file = tmp_path / "a.safetensors"
    for code, shape, words in (("F4", (4,), "is F4; expected F32"), ("F32", (0,), r"wrong shape \(0,\)")):
        tensors = {n: a for n, a in checkpoint().items() if n != "conv.bias"}
        save_file(tensors, file)
        raw = file.read_bytes()
        size = struct.unpack("<Q", raw[:8])[0]
        end = len(raw) - 8 - size
        header = json.loads(raw[8 : 8 + size]) | {"conv.bias": one(code, shape, (end, end + (2 if shape[0] else 0)))}
        file.write_bytes(written(header, raw[8 + size :] + bytes(2 if shape[0] else 0)))
        with pytest.raises(ValueError, match=words):
            load(file)


def _index(text):
    def write(folder):
        (folder / "m.safetensors.index.json").write_text(text if isinstance(text, str) else json.dumps(text))

    return write


INDICES = {
    "to itself": ({"weight_map": {"a": "m.safetensors.index.json"}}, "shard 'm.safetensors.index.json' is not beside"),
    "absolute": ({"weight_map": {"a": "/etc/passwd"}}, "shard '/etc/passwd' is not beside it"),
    "above": ({"weight_map": {"a": "../a.safetensors"}}, "is not beside it"),
    "nul": ({"weight_map": {"a": "a\0.safetensors"}}, "is not beside it"),
    "long": ({"weight_map": {"a": "a" * 5000 + ".safetensors"}}, "is not beside it"),
    "number": ({"weight_map": {"a": 3}}, "shard '3' is not beside it"),
    "list": ({"weight_map": {"a": ["x"]}}, "not an index"),
    "no table": ({"weight_map": [1]}, "not an index"),
    "empty": ({"weight_map": {}}, "is empty"),
    "deep": ("[" * 50_000, "not an index"),
    "many shards": ({"weight_map": {f"t{i}": f"{i}.safetensors" for i in range(300_000)}}, "is not beside it"),
    "text": ("hello", "not an index"),
    "huge": ('{"weight_map": {"a": "' + "b" * 2**25 + '"}}', "an index of .* bytes; allowed"),
}


@pytest.mark.parametrize("case", INDICES)
def test_refuses_hostile_indices(tmp_path, case):
    text, words = INDICES[case]
    _index(text)(tmp_path)
    with pytest.raises(ValueError, match=words) as error:
        load(tmp_path)
    assert "m.safetensors.index.json" in str(error.value) and len(str(error.value)) < 1500


@pytest.mark.parametrize("entry", ["[1]", "{", '"x"', "[" * 50_000])
def test_refuses_damaged_metadata_of_our_own(tmp_path, entry):
    save_file(checkpoint(), tmp_path / "a.safetensors", {"difax": entry})
    with pytest.raises(ValueError, match="a.safetensors: what difax stored beside the weights is damaged"):
        read_metadata(tmp_path)


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
