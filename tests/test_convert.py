"""`difax convert`: sharded safetensors to orbax, tensor by tensor, and what it refuses."""

import functools
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from difax.build import build_setup, load_weights
from difax.checkpoints import find_weights, recognise, settings_of
from difax.cli import main
from difax.config import configuration, load_config
from difax.core import writing
from difax.core.trunk import forward
from difax.models import MODELS
from difax.weights.conditions import random_conditions
from difax.weights.convert import SETTINGS, check_target, converted_model, is_converted, load_converted
from difax.weights.published import load_foreign, opened_parameters
from tests.families import some

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
    return shards({n: a for n, a in tensors.items() if n != drop}, folder, parts)


def shards(tensors: dict[str, np.ndarray], folder: Path, parts: int = 3) -> Path:
    names, where = list(tensors), {}
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
    with pytest.raises(ValueError, match="this checkpoint cannot be read"):
        load_converted(tmp_path, spec)


def test_a_parameter_is_read_layer_by_layer():
    file = GOLDEN / "dit_diffusers.safetensors"
    found = recognise(str(file), heads=4, size=8)
    with opened_parameters(file, found) as parameters:
        p = parameters["blocks/qkv/kernel"]
        assert (p.layers, p.shape) == (3, (3, 16, 48)) and p.read(1).shape == (16, 48)


# ---- a converted folder carries what the reader learned -----------------------------------------------------------

# every layout of every model: the golden file, and what it does not tell
SOURCES: dict[str, tuple[str, dict[str, Any]]] = {
    "dit original": ("dit_original", {"heads": 4, "size": 8}),
    "dit diffusers": ("dit_diffusers", {"heads": 4, "size": 8}),
    "flux original": ("flux_original", {"size": (8, 12), "axes_dim": (2, 4, 4)}),
    "flux diffusers": ("flux_diffusers", {"size": (8, 12), "axes_dim": (2, 4, 4)}),
    "qwen_image": ("qwen_image_diffusers", {"size": (4, 6), "axes_dim": (2, 4, 4)}),
    "flux2 original": ("flux2_dev_original", {"size": (4, 6), "axes_dim": (2, 4, 4, 6)}),
    "flux2 diffusers": ("flux2_dev_diffusers", {"size": (4, 6), "axes_dim": (2, 4, 4, 6)}),
    "pixart alpha": ("pixart_alpha", {"heads": 2, "size": 16, "text_tokens": 6}),
    "pixart sigma": ("pixart_sigma", {"heads": 2, "size": 16, "text_tokens": 6}),
    "wan original": ("wan_original", {"heads": 2, "size": (2, 4, 4)}),
    "wan diffusers": ("wan_diffusers", {"heads": 2, "size": (2, 4, 4)}),
    "sd3 original": ("sd3_35_medium_original", {"size": (8, 12)}),
    "sd3 diffusers": ("sd3_odd_diffusers", {"heads": 2, "size": (8, 12)}),
    "z_image original": ("z_image_original", {"size": (8, 12), "axes_dim": (2, 4, 4)}),
    "z_image diffusers": ("z_image_diffusers", {"size": (8, 12), "axes_dim": (2, 4, 4)}),
}


def told(geometry: dict[str, Any]) -> list[tuple[str, Any]]:
    return [(f"model.{key}", value) for key, value in geometry.items()]


def opened(path: Any, settings: Sequence[tuple[str, Any]] = (), base: Any = None) -> Any:
    """A checkpoint as every command opens it, in float32: (model, weights)."""
    config = configuration(base, str(path), [*settings, ("model.dtype", "float32")])
    found = find_weights(config, build_setup(config).model, str(path))
    return found.model, found.params


def answer(model: Any, params: Any) -> np.ndarray:
    """The network's output for one random input."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1, *model.input_shape)).astype(np.float32)
    params = jax.tree.map(lambda a: np.asarray(a, np.float32), params)
    with jax.default_matmul_precision("highest"):
        run = jax.jit(functools.partial(forward, model))
        out = run(params, x, np.full(1, 0.3 * 999, np.float32), random_conditions(model, 1))
    return np.asarray(out)


def check_same_network(one: Any, other: Any) -> None:
    """Equal parameters, equal settings, and outputs within 1e-6 of the largest value."""
    assert settings_of(one[0]) == settings_of(other[0]) and one[0].name == other[0].name
    jax.tree.map(np.testing.assert_array_equal, one[1], other[1])
    a, b = answer(*one), answer(*other)
    assert np.abs(a).max() > 0 and np.abs(a - b).max() <= 1e-6 * np.abs(a).max()


@pytest.mark.parametrize("case", some(SOURCES, "dit diffusers"))
def test_what_is_converted_is_the_network_that_is_read(tmp_path, case):
    name, geometry = SOURCES[case]
    source = GOLDEN / f"{name}.safetensors"
    flags = [f"--geometry={k}={v}" for k, v in geometry.items()]
    assert main(["convert", str(source), str(tmp_path / "dst"), *flags]) == 0
    kind = case.split()[0]
    stored = converted_model(tmp_path / "dst")
    arguments = set(inspect.signature(MODELS[kind]).parameters) - {"dtype"}
    assert stored is not None and set(stored) == {"name", *arguments} and stored["name"] == kind
    check_same_network(opened(tmp_path / "dst"), opened(source, told(geometry)))


def _prefix(tensors):
    beside = {"first_stage_model.x": np.ones(3, np.float32), "cond_stage_model.y.weight": np.ones((3, 3), np.float16)}
    return {f"model.diffusion_model.{name}": a for name, a in tensors.items()} | beside


def _eighths(tensors, suffix):
    """Weights of two axes or more in fp8, those of blocks with a scale of one number, of which every row has its own
    in the last spelling; biases in bfloat16."""
    written = {"scaled_fp8": np.zeros(0, ml_dtypes.float8_e4m3fn)}
    for name, a in tensors.items():
        written[name] = a.astype(ml_dtypes.bfloat16)
        if name.endswith(".weight") and a.ndim > 1:
            written[name] = a.astype(ml_dtypes.float8_e4m3fn)
            if ("block" in name or "layers." in name) and "emb" not in name:
                scale = np.linspace(0.5, 1.5, len(a)) if suffix == "weight_scale_inv" else np.float32(0.7)
                written[name.removesuffix("weight") + suffix] = np.asarray(scale, np.float32)
    return written


FORMS = {
    "bf16": lambda tensors: {name: a.astype(ml_dtypes.bfloat16) for name, a in tensors.items()},
    "prefix": _prefix,
    "fp8, comfy": lambda tensors: _prefix(_eighths(tensors, "scale_weight")),
    "fp8, compressed": lambda tensors: _eighths(tensors, "weight_scale"),
    "fp8, rows": lambda tensors: _eighths(tensors, "weight_scale_inv"),
    "fp8": lambda tensors: {name: a.astype(ml_dtypes.float8_e4m3fn) for name, a in tensors.items()},
    "mixed": lambda tensors: {n: a.astype(ml_dtypes.bfloat16 if "0." in n else np.float32) for n, a in tensors.items()},
}


def meant(written, names):
    """What a file says of its network's tensors, in float32: values times the scales beside them."""
    found = {}
    for full, a in written.items():
        base, scales = full.removesuffix("weight"), ("scale_weight", "weight_scale", "weight_scale_inv")
        scale = next((written[base + suffix] for suffix in scales if base + suffix in written), np.float32(1))
        name = full.removeprefix("model.diffusion_model.")
        if name in names:
            found[name] = a.astype(np.float32) * scale.reshape(-1, *[1] * (a.ndim - 1))
    return found


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", some(SOURCES, "dit original"))
def test_forms_of_a_file_convert_to_what_is_read(tmp_path, case, form):
    """Values as the file says them, in shards: read, converted, and the same values in a plain file of float32."""
    name, geometry = SOURCES[case]
    tensors = {n: a.astype(np.float32) for n, a in load_file(GOLDEN / f"{name}.safetensors").items()}
    if not case.startswith("sd3"):  # whose positions are the file's, and not computed again
        tensors = {n: a for n, a in tensors.items() if not n.startswith("pos_embed.pos_embed") and n != "pos_embed"}
    written = FORMS[form](tensors)
    (tmp_path / "src").mkdir()
    shards(written, tmp_path / "src")
    wanted = meant(written, tensors)
    assert wanted.keys() == tensors.keys()
    save_file(wanted, tmp_path / "plain.safetensors")
    settings = told(geometry)
    model, params = opened(tmp_path / "src", settings)
    plain = opened(tmp_path / "plain.safetensors", settings)
    assert settings_of(model) == settings_of(plain[0])
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(lambda a: np.asarray(a, np.float32), params), plain[1])
    flags = [f"--geometry={k}={v}" for k, v in geometry.items()]
    assert main(["convert", str(tmp_path / "src"), str(tmp_path / "dst"), *flags]) == 0
    other = opened(tmp_path / "dst")
    assert settings_of(other[0]) == settings_of(model)
    jax.tree.map(np.testing.assert_array_equal, other[1], params)
    (one,) = {str(a.dtype) for a in jax.tree.leaves(params)}
    assert {str(a.dtype) for a in jax.tree.leaves(other[1])} == {one}
    assert one == ("bfloat16" if form in ("bf16", "fp8") else "float32")


PIPELINES = Path(__file__).parents[2] / "shared" / "pipelines"


@pytest.mark.parametrize(
    "name, settings",
    [
        ("dit", {}),
        ("flux_dev", {"size": (8, 8)}),
        ("pixart_sigma", {"variant": "sigma"}),
        ("wan21", {"size": (2, 8, 8)}),
        ("sd3", {"size": (8, 12)}),
        ("qwen_image", {"size": (8, 8)}),
        ("z_image", {"size": (8, 8), "text_tokens": 40}),
    ],
)
@pytest.mark.skipif(not PIPELINES.is_dir(), reason="the tiny pipelines are not there")
def test_pipelines_convert_to_the_network_that_is_read(tmp_path, name, settings):
    source = PIPELINES / name / "transformer"
    flags = [f"--geometry={k}={v}" for k, v in settings.items()]
    assert main(["convert", str(source), str(tmp_path / "dst"), *flags]) == 0
    check_same_network(opened(tmp_path / "dst"), opened(source, told(settings)))


def test_a_converted_folder_is_opened_with_a_configuration_of_its_kind_too(tmp_path):
    file = str(GOLDEN / "dit_diffusers.safetensors")
    target = str(tmp_path / "dst")
    assert main(["convert", file, target, *DIT]) == 0
    base = load_config("dit_imagenet")
    base["model"] = {"name": "dit", "depth": 3, "width": 16, "heads": 4, "patch": 2, "classes": 5, "channels": 3}
    base["model"]["learn_sigma"] = settings_of(opened(target)[0])["learn_sigma"]
    base["model"]["channels"] = settings_of(opened(target)[0])["channels"]
    base["model"]["classes"] = settings_of(opened(target)[0])["classes"]
    check = settings_of(opened(target, base=base)[0])
    assert (check["freq_shift"], check["mlp_norm_eps"], check["size"]) == (1, 1e-5, (8, 8))
    # what is set explicitly comes first
    check = settings_of(opened(target, [("model.size", 12), ("model.freq_shift", 0)], base)[0])
    assert (check["freq_shift"], check["size"]) == (0, (12, 12))
    # what contradicts the checkpoint is refused with both values
    for key, value, words in (
        ("heads", 8, r"model.heads is 4 in the checkpoint, 8 by the configuration"),
        ("freq_shift", 0, r"model.freq_shift is 1 in the checkpoint, 0 by the configuration"),
        ("width", 32, r"model.width is 16 in the checkpoint, 32 by the configuration"),
    ):
        with pytest.raises(ValueError, match=words):
            opened(target, base={**base, "model": {**base["model"], key: value}})
    with pytest.raises(ValueError, match=r"model.width is 16 in the checkpoint, 32 by the configuration"):
        opened(target, [("model.width", 32)], base)
    with pytest.raises(ValueError, match=r"model.width is 16 in the checkpoint, 384 by the configuration"):
        opened(target, [("model.variant", "S/2")])
    with pytest.raises(ValueError, match="holds a dit; the configuration's model is pixart"):
        opened(target, base="pixart_sigma")
    # a folder of an older difax says nothing, and takes what the configuration says
    (Path(target) / SETTINGS).unlink()
    assert settings_of(opened(target, base=base)[0])["freq_shift"] == 0
    with pytest.raises(ValueError, match="says nothing of its model; give its configuration by --config"):
        opened(target)


# ---- damage, and what is left behind -------------------------------------------------------------------------------


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-5])


def _flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


DAMAGES = {"missing": Path.unlink, "cut": _cut, "flipped": _flip, "empty": lambda file: file.write_bytes(b"")}


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    target = tmp_path_factory.mktemp("converted") / "dst"
    assert main(["convert", str(GOLDEN / "dit_diffusers.safetensors"), str(target), *DIT]) == 0
    return target


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_in_every_file(tmp_path, converted, damage):
    target = tmp_path / "dst"
    files = sorted(f.relative_to(converted) for f in converted.rglob("*") if f.is_file())
    assert len(files) > 40
    files = files[:4] + files[5 :: 10 if damage == "flipped" else 25]  # of an array each file is like the next
    for name in files:
        shutil.copytree(converted, target)
        DAMAGES[damage](target / name)
        if name == Path(SETTINGS) and damage == "missing":
            message = "says nothing of its model"
        else:
            message = re.escape(str(target / name))
        with pytest.raises(ValueError, match=message):
            opened(target)
        shutil.rmtree(target)


@pytest.mark.slow
def test_an_older_folder_names_the_chunk_that_is_missing_or_damaged(tmp_path, converted):
    spec = opened(converted)[1]
    for name in ("blocks.qkv.kernel/1.0.0", "blocks.qkv.kernel/.zarray", "_METADATA", "ends.label/0.0"):
        for damage in DAMAGES:
            target = tmp_path / "dst"
            shutil.copytree(converted, target)
            (target / SETTINGS).unlink()
            DAMAGES[damage](target / name)
            if damage == "flipped" and name[0] in "be":  # without checksums not every flipped bit can be seen
                shutil.rmtree(target)
                continue
            with pytest.raises(ValueError, match=re.escape(str(target))):
                load_converted(target, spec)
            shutil.rmtree(target)


def test_what_a_killed_process_left_goes_at_the_next_start_and_a_live_ones_stays(tmp_path):
    target = tmp_path / "dst"
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for pid in (dead.pid, os.getppid()):
        (tmp_path / f".dst.{writing._HOST}.{pid}.part" / "weights").mkdir(parents=True)
    check_target(target)
    assert [p.name for p in tmp_path.iterdir()] == [f".dst.{writing._HOST}.{os.getppid()}.part"]


@pytest.mark.parametrize(
    ("error", "code"), [(KeyboardInterrupt(), 130), (SystemExit(1), 1), (OSError(28, "No space left on device"), 1)]
)
def test_an_interrupted_conversion_leaves_nothing(tmp_path, monkeypatch, capsys, error, code):
    import difax.weights.convert as module

    def stop(*arguments: Any) -> None:
        assert any(tmp_path.iterdir())
        raise error

    monkeypatch.setattr(module, "_write_settings", stop)
    arguments = ["convert", str(GOLDEN / "dit_diffusers.safetensors"), str(tmp_path / "dst"), *DIT]
    assert main(arguments) == code
    assert not list(tmp_path.iterdir())
    if isinstance(error, OSError):
        assert f"cannot write {tmp_path / 'dst'}: No space left on device" in capsys.readouterr().err


def test_targets_are_refused_before_the_source_is_read(tmp_path, capsys):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    rows = {
        tmp_path / "file": "exists already",
        tmp_path / "link": "exists already",
        tmp_path / "file" / "dst": "does not exist or is not writable",
        tmp_path / "none" / "dst": "does not exist or is not writable",
        tmp_path / ("n" * 300): "name",
        tmp_path / "nul\0": "null",
    }
    for target, words in rows.items():
        assert main(["convert", str(tmp_path / "no.safetensors"), str(target)]) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1 and "no.safetensors" not in error, error
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "link"]


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
