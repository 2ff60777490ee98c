"""A network's file as its authors published it, with components that are given, in place of a pipeline's folder."""

import json
import pathlib
from functools import partial

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import difax
from difax.cli import main
from difax.config import pipeline_config
from difax.models import CHECKPOINTS
from difax.weights.checkpoint import Source

pytest.importorskip("tokenizers")

GOLDEN = pathlib.Path(__file__).resolve().parent / "golden"
SHARED = pathlib.Path(__file__).resolve().parent.parent.parent / "shared" / "pipelines"
PIXART, WAN, FLUX = GOLDEN / "pipeline_pixart", GOLDEN / "pipeline_wan", SHARED / "flux_dev"
PROMPT = "a red fox jumps over 3 logs"
NEEDS_FLUX = pytest.mark.skipif(not FLUX.is_dir(), reason="needs the recorded pipelines beside the checkout")


def original(folder: pathlib.Path, kind: str, path: pathlib.Path) -> pathlib.Path:
    """The network of a folder in the layout of its authors: other names, tensors joined, halves swapped."""
    tables = CHECKPOINTS[kind].tables
    tensors = load_file(next((folder / "transformer").glob("*.safetensors")))
    found: dict[str, np.ndarray] = {}
    for name, source in tables["original"].items():
        for layer in (0, 1):
            put = partial(str.format, layer=layer, double=layer, single=layer)
            mine = tables["diffusers"][name]
            if put(mine.keys[0]) in tensors:
                parts = [_ordered(tensors[put(key)], mine, source) for key in mine.keys]
                joined = parts if len(source.keys) == len(parts) else [np.concatenate(parts)]
                found |= {put(key): np.ascontiguousarray(a) for key, a in zip(source.keys, joined, strict=True)}
    assert sum(a.size for a in found.values()) == sum(a.size for a in tensors.values())
    save_file(found, path)
    return path


def _ordered(tensor: np.ndarray, mine: Source, source: Source) -> np.ndarray:
    return np.concatenate(np.split(tensor, 2)[::-1]) if mine.order != source.order else tensor


def components(folder: pathlib.Path, *names: str) -> dict[str, str]:
    return {f"pipeline.{name}": str(folder / name) for name in names}


# kind -> (folder, components, what a file of so small a network does not tell, the size)
KINDS = {
    "wan": (
        WAN, ("vae", "text_encoder"), {"model.heads": 2},
        {"pipeline.height": 32, "pipeline.width": 32, "pipeline.frames": 5, "pipeline.tokens": 24},
    ),
    "flux": (
        FLUX, ("vae", "text_encoder", "text_encoder_2"), {"model.axes_dim": (4, 10, 10)},
        {"pipeline.height": 32, "pipeline.width": 32, "pipeline.tokens": 32},
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["wan", pytest.param("flux", marks=[pytest.mark.slow, NEEDS_FLUX])])
def test_a_file_says_what_its_folder_says(kind, tmp_path):
    folder, names, untold, size = KINDS[kind]
    path = original(folder, kind, tmp_path / "network.safetensors")
    asked = [*components(folder, *names).items(), *untold.items(), *size.items(), ("steps", 2)]
    of_file, of_folder = pipeline_config(path, asked), pipeline_config(folder, [*size.items(), ("steps", 2)])
    for section in ("process", "prediction", "solver", "grid", "guide", "scale", "steps"):
        assert of_file[section] == of_folder[section], section
    assert {**of_file["model"], "variant": None} == {**of_folder["model"], "variant": None}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wan", pytest.param("flux", marks=NEEDS_FLUX)])
def test_a_file_draws_what_its_folder_draws(kind, tmp_path):
    folder, names, untold, size = KINDS[kind]
    path = original(folder, kind, tmp_path / "network.safetensors")
    wanted = difax.load(folder, steps=2, **size).sample(prompt=PROMPT, seed=1).images
    found = difax.load(path, steps=2, **size, **components(folder, *names), **untold)
    np.testing.assert_allclose(found.sample(prompt=PROMPT, seed=1).images, wanted, atol=1e-5)
    inside = difax.load(folder, weights=path, steps=2, **size)
    np.testing.assert_allclose(inside.sample(prompt=PROMPT, seed=1).images, wanted, atol=1e-5)
    assert inside.source == str(path)


@pytest.mark.slow
def test_the_command(tmp_path, capsys):
    path = original(WAN, "wan", tmp_path / "network.safetensors")
    flags = ["--weights", path, "--vae", WAN / "vae", "--text-encoder", WAN / "text_encoder", "--prompt", PROMPT]
    size = "--config.model.heads=2 --height 32 --width 32 --frames 5 --tokens 24 --steps 2 --no-compile-cache --json"
    assert main(["sample", *map(str, flags), *size.split(), "--out", str(tmp_path / "a.gif")]) == 0
    table = json.loads(capsys.readouterr().out)
    assert table["weights"] == str(path) and (tmp_path / "a.gif").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("quant", ["none", "int8_w8a8"])
def test_a_network_that_difax_converted(quant, tmp_path):
    """In place of the folder's, quantised in the same way."""
    geometry = ["--geometry", "text_tokens=24", "--geometry", "size=8"]
    assert main(["convert", str(PIXART / "transformer"), str(tmp_path / "mine"), *geometry]) == 0
    asked = {"pipeline.height": 16, "pipeline.width": 16, "pipeline.tokens": 24, "steps": 2, "quant": quant}
    wanted = difax.load(PIXART, **asked).sample(prompt=PROMPT).images
    found = difax.load(PIXART, weights=tmp_path / "mine", **asked)
    np.testing.assert_allclose(found.sample(prompt=PROMPT).images, wanted, atol=1e-6)
    assert found.source == str(tmp_path / "mine")


def scheduler(kind: str, *names: str, height: int = 480, width: int = 832) -> dict:
    from difax.pipelines.single import SINGLE

    return SINGLE[kind].scheduler(names, {"height": height, "width": width})


def test_what_a_kind_is_scheduled_by():
    dev, schnell = scheduler("flux", "img_in.weight", "guidance_in.in_layer.weight"), scheduler("flux", "img_in.weight")
    assert dev["use_dynamic_shifting"] and (dev["base_shift"], dev["max_shift"]) == (0.5, 1.15)
    assert schnell["shift"] == 1.0 and "use_dynamic_shifting" not in schnell
    assert scheduler("wan")["flow_shift"] == 3.0 and scheduler("wan", height=720, width=1280)["flow_shift"] == 5.0


# flags beside --weights of Wan -> words of the one line
MISTAKES = {
    "no encoder": (["--vae", f"{WAN}/vae"], "it needs --text-encoder PATH"),
    "no autoencoder": (["--text-encoder", f"{WAN}/text_encoder"], "it needs --vae PATH"),
    "a second encoder": (
        ["--vae", f"{WAN}/vae", "--text-encoder", f"{WAN}/text_encoder", "--text-encoder-2", f"{WAN}/text_encoder"],
        "--text-encoder-2 PATH; allowed: --vae PATH, --text-encoder PATH",
    ),
    "no tokenizer": (["--vae", f"{WAN}/vae", "--text-encoder", "{}/alone"], "no tokenizer in or beside it"),
    "no components": ([], "of a pipeline; allowed: with --pipeline FOLDER"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name, tmp_path, capsys):
    flags, words = MISTAKES[name]
    path = original(WAN, "wan", tmp_path / "network.safetensors")
    (tmp_path / "alone").mkdir()
    for file in (WAN / "text_encoder").iterdir():
        (tmp_path / "alone" / file.name).write_bytes(file.read_bytes())
    size = ["--config.model.heads=2", "--height", "32", "--width", "32", "--frames", "5", "--steps", "2"]
    flags = [flag.replace("{}", str(tmp_path)) for flag in flags]
    out = ["--out", str(tmp_path / "a.gif"), "--no-compile-cache", "--prompt", PROMPT]
    assert main(["sample", "--weights", str(path), *flags, *size, *out]) == 2
    said = capsys.readouterr().err.strip()
    assert words in said and "\n" not in said and not (tmp_path / "a.gif").exists()


def test_a_file_of_another_kind(tmp_path, capsys):
    path = next((PIXART / "transformer").glob("*.safetensors"))
    flags = ["--weights", str(path), "--vae", f"{PIXART}/vae", "--prompt", PROMPT, "--out", str(tmp_path / "a.png")]
    assert main(["sample", *flags]) == 2
    assert "a network of pixart; allowed: a pipeline's folder, or a file of flux or wan" in capsys.readouterr().err
