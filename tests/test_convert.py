"""`difax convert`: sharded safetensors to orbax, tensor by tensor, and what it refuses."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from difax.build import load_weights, recognise
from difax.cli import main
from difax.weights.convert import is_converted, load_converted
from difax.weights.published import load_foreign, opened_parameters

GOLDEN = Path(__file__).parent / "golden"
# the file of each model and layout, and what it does not tell
FILES = {
    "dit original": ("dit_original", {"heads": 4}),
    "dit diffusers": ("dit_diffusers", {"heads": 4, "size": 8}),
}
DIT = ["--geometry", "heads=4", "--geometry", "size=8"]


def shard(name: str, folder: Path, drop: str | None = None, parts: int = 3) -> Path:
    """A golden file cut into shards with an index, without one of its tensors."""
    tensors = load_file(GOLDEN / f"{name}.safetensors")
    names = [n for n in tensors if n != drop]
    where = {}
    for i in range(parts):
        file = f"model-{i + 1:05}-of-{parts:05}.safetensors"
        some = names[i::parts]
        save_file({n: tensors[n] for n in some}, folder / file)
        where |= dict.fromkeys(some, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


@pytest.mark.parametrize("case", FILES)
def test_converts_and_reads_back(tmp_path, case):
    name, geometry = FILES[case]
    (tmp_path / "src").mkdir()
    source = shard(name, tmp_path / "src")
    target = tmp_path / "dst"
    arguments = [f"--geometry={k}={v}" for k, v in geometry.items()]
    assert main(["convert", str(source), str(target), *arguments]) == 0
    found = recognise(str(source), **geometry)
    want = load_foreign(source, found)
    back = load_converted(target, found.spec)
    assert jax.tree.structure(back) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, back, want)
    assert is_converted(target) and sorted(p.name for p in tmp_path.iterdir()) == ["dst", "src"]
    model, params, _ = load_weights({"model": {"name": case.split()[0]}}, found.model, str(target))
    assert model is found.model
    jax.tree.map(np.testing.assert_array_equal, params, want)


def test_the_dtype_can_be_chosen(tmp_path, capsys):
    command = ["convert", str(GOLDEN / "dit_diffusers.safetensors"), str(tmp_path / "dst"), *DIT]
    assert main([*command, "--dtype", "bfloat16", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    found = recognise(str(GOLDEN / "dit_diffusers.safetensors"), heads=4, size=8)
    back = load_converted(tmp_path / "dst", found.spec)
    assert {str(a.dtype) for a in jax.tree.leaves(back)} == {"bfloat16"}
    assert report["bytes"] == 2 * report["parameters"] == sum(a.nbytes for a in jax.tree.leaves(back))


def test_restores_onto_a_mesh(tmp_path):
    file = str(GOLDEN / "dit_diffusers.safetensors")
    assert main(["convert", file, str(tmp_path / "dst"), *DIT]) == 0
    found = recognise(file, heads=4, size=8)
    mesh = jax.make_mesh((4,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))

    def place(leaf):
        spec = (*[None] * (leaf.ndim - 1), "model") if leaf.shape[-1] % 4 == 0 else ()
        sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    back = load_converted(tmp_path / "dst", jax.tree.map(place, found.spec))
    kernel = back["blocks"]["qkv"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (3, 16, 12)
    np.testing.assert_array_equal(kernel, load_foreign(file, found)["blocks"]["qkv"]["kernel"])


REFUSALS = {
    "removed key": ("transformer_blocks.1.ff.net.2.bias", DIT, "tensor 'transformer_blocks.1.ff.net.2.bias' .*missing"),
    "unknown model": (None, ["--model", "dot"], r"unknown model 'dot' \(did you mean dit\?\)"),
    "unknown layout": (None, ["--model", "dit", "--layout", "difusers"], "nearest: 'diffusers'"),
    "geometry": (None, ["--geometry", "heads"], "--geometry heads: allowed: KEY=VALUE"),
    "unknown geometry": (None, ["--geometry", "head=4"], "nearest: 'heads'"),
    "not told": (None, ["--geometry", "heads=4"], "size"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refuses_and_leaves_nothing(tmp_path, capsys, case):
    import re

    drop, arguments, message = REFUSALS[case]
    (tmp_path / "src").mkdir()
    source = shard("dit_diffusers", tmp_path / "src", drop)
    assert main(["convert", str(source), str(tmp_path / "dst"), *arguments]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and error.count("\n") == 1, error
    assert [p.name for p in tmp_path.iterdir()] == ["src"]


def test_refuses_targets(tmp_path, capsys):
    file = str(GOLDEN / "dit_diffusers.safetensors")
    assert main(["convert", file, str(tmp_path), *DIT]) == 2
    assert "exists already" in capsys.readouterr().err
    assert main(["convert", file, str(tmp_path / "no" / "dst"), *DIT]) == 2
    assert "does not exist" in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "x.safetensors"), str(tmp_path / "dst")]) == 2
    assert "no such file" in capsys.readouterr().err


def test_refuses_files_of_other_projects(tmp_path, capsys):
    save_file({"lm_head.weight": np.zeros((4, 4), np.float32)}, tmp_path / "x.safetensors")
    assert main(["convert", str(tmp_path / "x.safetensors"), str(tmp_path / "dst")]) == 2
    assert "no checkpoint of dit" in capsys.readouterr().err


def test_refuses_other_parameters_when_read_back(tmp_path):
    file = str(GOLDEN / "dit_diffusers.safetensors")
    assert main(["convert", file, str(tmp_path / "dst"), *DIT]) == 0
    found = recognise(file, heads=4, size=8)
    spec = {**found.spec, "more": jax.ShapeDtypeStruct((1,), "float32")}
    with pytest.raises(ValueError, match=r"parameter more is None, expected \(1,\)"):
        load_converted(tmp_path / "dst", spec)
    with pytest.raises(ValueError, match="not an orbax checkpoint"):
        load_converted(tmp_path, spec)


def test_a_parameter_is_read_layer_by_layer():
    file = GOLDEN / "dit_diffusers.safetensors"
    found = recognise(str(file), heads=4, size=8)
    with opened_parameters(file, found) as parameters:
        p = parameters["blocks/qkv/kernel"]
        assert (p.layers, p.shape) == (3, (3, 16, 48)) and p.read(1).shape == (16, 48)


MEMORY = """
import json, pathlib, sys
folder = pathlib.Path(sys.argv[1])
from difax.cli import main
def peak():  # of this program: what getrusage tells begins with the memory of the process that started it
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
before = peak()
assert main(["convert", str(folder / "src"), str(folder / "dst"), "--model", "dit", "--json"]) == 0
print(json.dumps([before, peak()]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_two_gigabytes_convert_in_less_than_one(tmp_path):
    """A random DiT-XL/2 in float32 (2.7 GB), in shards; the memory of the whole process is the operating system's."""
    from difax.models.dit_checkpoint import DIFFUSERS, find_dit  # noqa: F401

    source = tmp_path / "src"
    source.mkdir()
    write_random_dit(source)
    size = sum(f.stat().st_size for f in source.iterdir())
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path)], capture_output=True, text=True, check=True, timeout=600
    )
    before, peak = json.loads(done.stdout.splitlines()[-1])
    print(f"{size / 2**30:.2f} GiB converted: peak {peak / 2**10:.0f} MiB, {before / 2**10:.0f} MiB before")
    assert size > 2e9 and before < peak < 2**20


def write_random_dit(folder: Path) -> None:
    """Shards of a diffusers DiT-XL/2 with random weights, with its config.json."""
    rng = np.random.default_rng(0)
    width, depth = 1152, 28
    dense = lambda name, k, n: {f"{name}.weight": (n, k), f"{name}.bias": (n,)}  # noqa: E731
    shapes = {"pos_embed.proj.weight": (width, 4, 2, 2), "pos_embed.proj.bias": (width,)}
    shapes |= dense("proj_out_1", width, 2 * width) | dense("proj_out_2", width, 32)
    where, shared = {}, {}

    def write(file: str, tensors: dict[str, np.ndarray]) -> None:
        save_file(tensors, folder / file)
        where.update(dict.fromkeys(tensors, file))

    def random(shape: tuple[int, ...]) -> np.ndarray:
        return rng.standard_normal(shape, np.float32)

    write("ends.safetensors", {name: random(shape) for name, shape in shapes.items()})
    for i in range(depth):
        block = f"transformer_blocks.{i}"
        embedder = f"{block}.norm1.emb"
        copies = dense(f"{embedder}.timestep_embedder.linear_1", 256, width)
        copies |= dense(f"{embedder}.timestep_embedder.linear_2", width, width)
        copies |= {f"{embedder}.class_embedder.embedding_table.weight": (1001, width)}
        own = dense(f"{block}.norm1.linear", width, 6 * width)
        for part in ("to_q", "to_k", "to_v", "to_out.0"):
            own |= dense(f"{block}.attn1.{part}", width, width)
        own |= dense(f"{block}.ff.net.0.proj", width, 4 * width) | dense(f"{block}.ff.net.2", 4 * width, width)
        tensors = {name: random(shape) for name, shape in own.items()}
        for name, shape in copies.items():
            tensors[name] = shared.setdefault(name.removeprefix(block), random(shape))
        write(f"block{i:02}.safetensors", tensors)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    config = {"_class_name": "DiTTransformer2DModel", "num_attention_heads": 16, "sample_size": 32}
    (folder / "config.json").write_text(json.dumps(config))
