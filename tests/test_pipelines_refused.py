"""Mistakes with --pipeline: each is one line on stderr that names what is wrong, exit code 2, and nothing written."""

import json
import pathlib
import shutil
import sys

import numpy as np
import pytest
from families import some
from PIL import Image
from safetensors.numpy import load_file, save_file

from difax.cli import main

pytest.importorskip("tokenizers")

GOLDEN = pathlib.Path(__file__).resolve().parent / "golden"
PIXART, WAN = GOLDEN / "pipeline_pixart", GOLDEN / "pipeline_wan"
SAMPLE = ["--steps", "2", "--height", "16", "--width", "16", "--no-compile-cache", "--quiet"]
PROMPT = ["--prompt", "a cat"]


def ran(command: str, *flags: str, capsys, folder: pathlib.Path, out: str | None = None) -> str:
    """The one line that a mistake gives, after all that must hold of it."""
    before = files(folder)
    out = out or ("o.safetensors" if command == "encode" else "o.png")
    flags = (*(SAMPLE if command == "sample" else ()), "--out", str(folder / out), *flags)
    code = main([command, *flags])
    said, told = capsys.readouterr().err.strip(), "difax: error: "
    lines = [line for line in said.splitlines() if not line.startswith("difax: warning: ")]
    assert code == 2 and len(lines) == 1 and lines[0].startswith(told), (code, said)
    assert "fault of difax" not in said and "Traceback" not in said
    assert files(folder) == before, "something was written"
    return lines[0].removeprefix(told)


def files(folder: pathlib.Path) -> list[tuple[str, int]]:
    return sorted((str(p), p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file())


# ---- flags -------------------------------------------------------------------------------------------------
# name -> (flags, words that the line must have); {} is the test's folder, in which are the files of `prepared`

P, W = ["--pipeline", str(PIXART)], ["--pipeline", str(WAN), "--frames", "5"]
FLAGS = {
    "no folder": (["--pipeline", "{}/none", *PROMPT], "no such folder"),
    "a file": (["--pipeline", "{}/i.png", *PROMPT], "no such folder"),
    "no index": (["--pipeline", str(GOLDEN), *PROMPT], "no model_index.json"),
    "empty": (["--pipeline", "", *PROMPT], "--pipeline is empty"),
    "a configuration too": ([*P, "--config", "fmnist_dit", *PROMPT], "exclude each other"),
    "prompt alone": (PROMPT, "of a pipeline"),
    "height of 17": ([*P, *PROMPT, "--height", "17"], "height=17; allowed: multiples of 4"),
    "a huge height": ([*P, *PROMPT, "--height", "100000"], "such as 32768"),
    "a height below 0": ([*P, *PROMPT, "--height", "-16"], "height=-16"),
    "frames of a picture": ([*P, *PROMPT, "--frames", "5"], "PixArtSigmaPipeline has no frames"),
    "6 frames": ([*W, *PROMPT, "--frames", "6"], "allowed: 1 and multiples of 4 more, such as 5"),
    "0 frames": ([*W, *PROMPT, "--frames", "0"], "pipeline.frames=0"),
    "too many frames": ([*W, *PROMPT, "--frames", "100001"], "pipeline.frames=100001"),
    "0 steps": ([*P, *PROMPT, "--steps", "0"], "steps=0; allowed: 1 or more"),
    "steps below 0": ([*P, *PROMPT, "--steps", "-1"], "steps=-1"),
    "more steps than it was trained for": ([*P, *PROMPT, "--steps", "1001"], "steps=1001"),
    "a million steps": ([*P, *PROMPT, "--steps", "1000000"], "steps=1000000"),
    "0 tokens": ([*P, *PROMPT, "--tokens", "0"], "pipeline.tokens=0"),
    "too many tokens": ([*P, *PROMPT, "--tokens", "99999"], "pipeline.tokens=99999"),
    "guidance that it does not take": ([*P, *PROMPT, "--guidance", "3"], "has no guidance"),
    "guidance that is no number": ([*P, *PROMPT, "--guidance", "nan"], "pipeline.guidance=nan"),
    "scale that is no number": ([*P, *PROMPT, "--scale", "nan"], "scale=nan; allowed: a number"),
    "endless scale": ([*P, *PROMPT, "--scale", "inf"], "scale=inf; allowed: a number"),
    "scale of a second network": ([*W, *PROMPT, "--scale-2", "3"], "has no scale_2"),
    "shift of no flow": ([*P, *PROMPT, "--shift", "3"], "is of no flow"),
    "shift of 0": ([*W, *PROMPT, "--shift", "0"], "pipeline.shift=0.0"),
    "shift that is no number": ([*W, *PROMPT, "--shift", "nan"], "pipeline.shift=nan"),
    "endless shift": ([*W, *PROMPT, "--shift", "inf"], "pipeline.shift=inf"),
    "0 frames a second": ([*W, *PROMPT, "--fps", "0"], "pipeline.fps=0.0"),
    "sigmas of no flow": ([*P, *PROMPT, "--sigmas", "1,0.5"], "a list of sigmas"),
    "sigmas in words": ([*W, *PROMPT, "--sigmas", "1,x"], "--sigmas 1,x; allowed: numbers between commas"),
    "no value": ([*W, *PROMPT, "--sigmas=--"], "--sigmas=--: no value"),
    "sigmas that rise": ([*P, *PROMPT, "--scheduler", "{}/flow.json", "--sigmas", "0.5,1"], "sigmas=[0.5, 1.0]"),
    "too many sigmas": (
        [*P, *PROMPT, "--scheduler", "{}/flow.json", "--sigmas", "1,0.7,0.3"],
        "3 sigmas; allowed: the 2",
    ),
    "a sigma of 2": ([*P, *PROMPT, "--scheduler", "{}/flow.json", "--sigmas", "2,1"], "falling numbers in (0, 1]"),
    "no sigmas": ([*W, *PROMPT, "--sigmas", ","], "--sigmas ,;"),
    "sigmas that are no numbers": ([*W, *PROMPT, "--sigmas", "1,nan"], "pipeline.sigmas=[1.0, nan]"),
    "tile of 3": ([*P, *PROMPT, "--tile", "3"], "pipeline.tile=3; allowed: multiples of"),
    "tile of 0": ([*P, *PROMPT, "--tile", "0"], "pipeline.tile=0"),
    "prompt and labels": ([*P, *PROMPT, "--labels", "1"], "exclude each other"),
    "prompt and embeddings": ([*P, *PROMPT, "--cond", "x"], "exclude each other"),
    "no such prompts": ([*P, "--prompts", "{}/none.txt"], "no such file"),
    "empty prompts": ([*P, "--prompts", "{}/empty.txt"], "no prompts in it"),
    "prompts of bytes": ([*P, "--prompts", "{}/binary.txt"], "no UTF-8 text"),
    "prompts with a zero": ([*P, "--prompts", "{}/zero.txt"], "is zero"),
    "a folder of prompts": ([*P, "--prompts", "{}"], "a folder"),
    "too many prompts": ([*P, "--prompts", "{}/many.txt"], "100001 prompts"),
    "too long a prompt": ([*P, "--prompts", "{}/long.txt"], "a prompt of 100001 letters"),
    "letters that are no text": ([*P, "--prompt", "a \udcff cat"], "letter 2 is no text"),
    "no such autoencoder": ([*P, *PROMPT, "--vae", "{}/none"], "none: no such file or folder"),
    "a picture for an autoencoder": ([*P, *PROMPT, "--vae", "{}/i.png"], "not a safetensors file"),
    "a network for an autoencoder": ([*P, *PROMPT, "--vae", f"{PIXART}/transformer"], "unknown autoencoder"),
    "an autoencoder of films": ([*P, *PROMPT, "--vae", f"{WAN}/vae"], "is not of pictures"),
    "an autoencoder of pictures": ([*W, *PROMPT, "--vae", f"{PIXART}/vae"], "is not of films"),
    "an empty encoder": ([*P, *PROMPT, "--text-encoder", ""], "--text-encoder is empty"),
    "no such encoder": ([*P, *PROMPT, "--text-encoder", "{}/none"], "none: no such file or folder"),
    "a text for an encoder": ([*P, *PROMPT, "--text-encoder", "{}/empty.txt"], "not a safetensors file"),
    "a second encoder": ([*P, *PROMPT, "--text-encoder-2", f"{WAN}/text_encoder"], "(did you mean text_encoder?)"),
    "an encoder of another width": (
        [*P, *PROMPT, "--text-encoder", "{}/wide"],
        "the text encoders give text [300, 8]; allowed: [300, 16]",
    ),
    "another kind of weights": ([*P, *PROMPT, "--weights", f"{WAN}/transformer"], "holds a wan"),
    "weights of difax": ([*P, *PROMPT, "--weights", "fmnist_dit"], "holds a dit"),
    "no such weights": ([*P, *PROMPT, "--weights", "{}/none.safetensors"], "no such file"),
    "a scheduler of nothing": ([*P, *PROMPT, "--scheduler", "{}/none"], "none"),
    "embeddings where a file is": ([*P, *PROMPT, "--embeddings", "{}/i.png"], "is no folder"),
    "no prompt": (P, "give --prompt TEXT, or --cond FILE.safetensors"),
    "no such latents": ([*P, *PROMPT, "--latents", "{}/none.npz"], "no such file"),
    "no such noise": ([*P, *PROMPT, "--noise", "{}/none.npz"], "no such file"),
    "no such embeddings": ([*P, "--cond", "{}/none.safetensors"], "no such file"),
    "another model": ([*P, *PROMPT, "--config.model.name=dit"], "model.name='dit'; allowed: pixart"),
    "another folder": ([*P, *PROMPT, "--config.pipeline.folder=x"], "pipeline.folder='x'; allowed: "),
    "a misspelt key": ([*P, *PROMPT, "--config.pipeline.heigth=3"], "(did you mean height?)"),
    "a height in words": (["--pipeline", str(PIXART), *PROMPT, "--config.pipeline.tokens=x"], "pipeline.tokens='x'"),
}
# those that are found when the prompt is encoded already, which takes seconds
LATE = {
    "previews of 0 steps": ([*P, *PROMPT, "--preview", "0"], "preview.every=0"),
    "no such small autoencoder": ([*P, *PROMPT, "--preview", "1", "--preview-vae", "{}/none"], "no such file"),
    "0 at a time": ([*P, *PROMPT, "--batch", "0"], "batch=0"),
    "no such image": ([*P, *PROMPT, "--image", "{}/none.png"], "no such file; allowed: a picture"),
    "a text for an image": ([*P, *PROMPT, "--image", "{}/empty.txt"], "no picture"),
    "half an image": ([*P, *PROMPT, "--image", "{}/half.png"], "no picture"),
    "a folder for an image": ([*P, *PROMPT, "--image", "{}"], "a folder"),
    "mask without an image": ([*P, *PROMPT, "--mask", "{}/i.png"], "with an image"),
    "mask of another size": ([*P, *PROMPT, "--image", "{}/i.png", "--mask", "{}/small.png"], "the size of its picture"),
    "too much strength": ([*P, *PROMPT, "--image", "{}/i.png", "--strength", "2"], "strength=2.0"),
    "no strength": ([*P, *PROMPT, "--image", "{}/i.png", "--strength", "0"], "strength=0.0"),
    "strength that is no number": ([*P, *PROMPT, "--image", "{}/i.png", "--strength", "nan"], "strength=nan"),
    "an image of a film": ([*W, *PROMPT, "--height", "32", "--width", "32", "--image", "{}/i.png"], "draws films"),
    "a negative prompt that is no text": ([*P, *PROMPT, "--negative", "\udcff"], "letter 0 is no text"),
}
ENCODE = {
    "no pipeline": (PROMPT, "needs --pipeline FOLDER"),
    "a configuration": (["--config", "fmnist_dit", *PROMPT], "needs --pipeline FOLDER"),
    "no prompt": (P, "needs --prompt TEXT or --prompts FILE"),
    "no such prompts": ([*P, "--prompts", "{}/none.txt"], "no such file"),
    "empty prompts": ([*P, "--prompts", "{}/empty.txt"], "no prompts in it"),
    "another ending": ([*P, *PROMPT, "--out", "{}/e.npz"], "ends in .safetensors"),
    "nowhere": ([*P, *PROMPT, "--out", "{}/none/e.safetensors"], "does not exist"),
    "steps": ([*P, *PROMPT, "--steps", "3"], "--steps"),
    "letters that are no text": ([*P, "--prompt", "\udcff"], "letter 0 is no text"),
}
OUTS = {
    "another ending": ([*P, *PROMPT], "a.tiff", "allowed: a name that ends in .png"),
    "a film of a picture": ([*P, *PROMPT], "a.mp4", "draws pictures"),
    "nowhere": ([*P, *PROMPT], "none/o.png", "does not exist"),
    "in a file": ([*P, *PROMPT], "i.png/o.png", "--out"),
}


# those of tables that are found behind a network, an encoder or an autoencoder of films, which takes a part of a second
SLOW = {
    "no second network", "6 frames", "no tokenizer", "letters that are no text", "an autoencoder of films",
    "a tokenizer's broken settings", "a tokenizer of nothing", "no prompt", "shift of 0", "0 frames a second",
    "no encoder", "too long a prompt", "too many prompts", "0 frames", "no such noise", "an encoder's broken file",
    "another width of the encoder", "a text for an encoder", "too many frames", "a misspelt encoder",
    "more steps than it was trained for", "layers in words", "an encoder cut short", "scale of a second network",
    "no tokenizer named", "no encoder named", "no such embeddings", "prompts of bytes", "no such weights",
    "weights of difax", "too many sigmas", "a sigma of 2",
}  # fmt: skip


def rows(table: dict) -> list:
    return some(table, *(table.keys() - SLOW))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("mistakes")
    texts = {"empty": b"\n \n", "binary": b"\xff\xfe\x00", "zero": b"a\0b", "many": b"a\n" * 100_001}
    for name, text in {**texts, "long": b"a" * 100_001}.items():
        (folder / f"{name}.txt").write_bytes(text)
    flow = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 1.0}
    (folder / "flow.json").write_text(json.dumps(flow))
    Image.new("RGB", (16, 16)).save(folder / "i.png")
    Image.new("L", (8, 8)).save(folder / "small.png")
    (folder / "half.png").write_bytes((folder / "i.png").read_bytes()[:40])
    narrow_encoder(folder / "wide")
    return folder


def narrow_encoder(folder: pathlib.Path) -> None:
    """The T5 of a pipeline with half of its width, and its tokenizer in it."""
    shutil.copytree(PIXART / "text_encoder", folder)
    shutil.copytree(PIXART / "tokenizer", folder / "tokenizer")
    config = json.loads((folder / "config.json").read_text())
    halved = {key: config[key] // 2 for key in ("d_model", "num_heads")}
    edited(folder, "config.json", **halved)
    sides = {config[key]: value for key, value in halved.items()}
    half = lambda a: np.ascontiguousarray(a[tuple(slice(0, sides.get(n, n)) for n in a.shape)])  # noqa: E731
    tensors = {k: half(a) for k, a in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors")


def of(flags: list[str], folder: pathlib.Path) -> list[str]:
    return [flag.replace("{}", str(folder)) for flag in flags]


@pytest.mark.parametrize("name", rows(FLAGS))
def test_flags(name, prepared, capsys):
    flags, words = FLAGS[name]
    assert words in ran("sample", *of(flags, prepared), capsys=capsys, folder=prepared)


@pytest.mark.slow
@pytest.mark.parametrize("name", LATE)
def test_flags_that_are_refused_late(name, prepared, capsys):
    flags, words = LATE[name]
    assert words in ran("sample", *of(flags, prepared), capsys=capsys, folder=prepared)


@pytest.mark.parametrize("name", rows(ENCODE))
def test_encode(name, prepared, capsys):
    flags, words = ENCODE[name]
    assert words in ran("encode", *of(flags, prepared), capsys=capsys, folder=prepared)


@pytest.mark.parametrize("name", rows(OUTS))
def test_places_to_write(name, prepared, capsys):
    flags, out, words = OUTS[name]
    assert words in ran("sample", *flags, capsys=capsys, folder=prepared, out=out)


# ---- folders -----------------------------------------------------------------------------------------------


def edited(folder: pathlib.Path, file: str, **keys) -> None:
    place = folder / file
    place.write_text(json.dumps(json.loads(place.read_text()) | keys))


def without_a_shard(folder: pathlib.Path) -> None:
    whole = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(whole)
    shards = [f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    index = {name: shards[i % 2] for i, name in enumerate(sorted(tensors))}
    save_file({k: a for k, a in tensors.items() if index[k] == shards[0]}, whole.with_name(shards[0]))
    whole.unlink()
    text = json.dumps({"metadata": {}, "weight_map": index})
    whole.with_name("diffusion_pytorch_model.safetensors.index.json").write_text(text)


def cut(file: str, at: int):
    return lambda folder: (folder / file).write_bytes((folder / file).read_bytes()[:at])


def text(file: str, content: str | bytes):
    content = content if isinstance(content, bytes) else content.encode()
    return lambda folder: (folder / file).write_bytes(content)


def keys(file: str, **found):
    return lambda folder: edited(folder, file, **found)


def gone(name: str):
    return lambda folder: shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()


INDEX, VAE, NET = "model_index.json", "vae/config.json", "transformer/config.json"
SCHEDULER, ENCODER, TOKENS = (
    "scheduler/scheduler_config.json", "text_encoder/config.json", "tokenizer/tokenizer.json",
)  # fmt: skip
FOLDERS = {
    "a misspelt pipeline": (keys(INDEX, _class_name="PixArtSigmPipeline"), "(did you mean PixArtSigmaPipeline?)"),
    "a pipeline by number": (keys(INDEX, _class_name=3), "'_class_name' is 3; allowed: a text"),
    "half an index": (text(INDEX, "{"), "model_index.json: line 1"),
    "a list": (text(INDEX, "[]"), "allowed: an object"),
    "an index of bytes": (text(INDEX, b"\xff\xfe"), "no UTF-8 text"),
    "no autoencoder named": (keys(INDEX, vae=[None, None]), "has no vae"),
    "no network named": (keys(INDEX, transformer=[None, None]), "has no transformer"),
    "no scheduler named": (keys(INDEX, scheduler=[None, None]), "has no scheduler"),
    "no encoder named": (keys(INDEX, text_encoder=[None, None]), "has no text_encoder"),
    "no tokenizer named": (keys(INDEX, tokenizer=[None, None]), "has no tokenizer"),
    "no encoder": (gone("text_encoder"), "text_encoder: no such file or folder"),
    "no tokenizer": (gone("tokenizer"), "tokenizer: no such file or folder"),
    "no network": (gone("transformer"), "transformer: no such file or folder"),
    "no weights of the autoencoder": (gone("vae/diffusion_pytorch_model.safetensors"), "found no"),
    "no scheduler's file": (gone(SCHEDULER), "no such file"),
    "a shard is missing": (without_a_shard, "shard 'diffusion_pytorch_model-00002-of-00002.safetensors' is not beside"),
    "a misspelt encoder": (keys(INDEX, text_encoder=["transformers", "T5EncoderModl"]), "(did you mean T5EncoderModel"),
    "a misspelt autoencoder": (keys(VAE, _class_name="AutoencoderK"), "(did you mean AutoencoderKL?)"),
    "an unknown scheduler": (keys(SCHEDULER, _class_name="DPMSolver"), "unknown scheduler class 'DPMSolver'"),
    "a misspelt network": (keys(NET, _class_name="PixArtTransformr"), "_class_name='PixArtTransformr'"),
    "another width of the encoder": (keys(ENCODER, d_model=32), "d_model=32; allowed: 16"),
    "layers in words": (keys(ENCODER, num_layers="a"), "num_layers='a'"),
    "an encoder's broken file": (text(ENCODER, "x"), "text_encoder/config.json"),
    "an encoder cut short": (cut("text_encoder/model.safetensors", 100), "truncated or damaged"),
    "an autoencoder cut short": (cut("vae/diffusion_pytorch_model.safetensors", 2000), "truncated or damaged"),
    "a network cut short": (cut("transformer/diffusion_pytorch_model.safetensors", 2000), "truncated or damaged"),
    "an autoencoder's broken file": (text(VAE, "x"), "vae/config.json"),
    "a scale in words": (keys(VAE, scaling_factor="x"), "scaling_factor='x'"),
    "a scale of 0": (keys(VAE, scaling_factor=0), "scaling_factor=0"),
    "other latents": (keys(VAE, latent_channels=5), "latent_channels=5; allowed: 4"),
    "a network's broken file": (text(NET, "x"), "transformer/config.json"),
    "a scheduler's broken file": (text(SCHEDULER, "x"), "scheduler_config.json"),
    "times in words": (keys(SCHEDULER, num_train_timesteps="x"), "num_train_timesteps='x'"),
    "half a tokenizer": (cut(TOKENS, 200), "tokenizer.json: no tokenizer can be made of it"),
    "a tokenizer of nothing": (text(TOKENS, "{}"), "tokenizer.json: no tokenizer can be made of it"),
    "a tokenizer's broken settings": (text("tokenizer/tokenizer_config.json", "["), "tokenizer_config.json: line 1"),
}
OF_WAN = {
    "a boundary in words": (keys(INDEX, boundary_ratio="x"), "boundary_ratio='x'; allowed: 0 ... 1"),
    "a boundary of 2": (keys(INDEX, boundary_ratio=2), "boundary_ratio=2"),
    "a boundary of one network": (keys(INDEX, boundary_ratio=0.5), "boundary_ratio=0.5 without transformer_2"),
    "no second network": (
        keys(INDEX, boundary_ratio=0.5, transformer_2=["diffusers", "WanTransformer3DModel"]),
        "transformer_2: no such file or folder",
    ),
}


@pytest.mark.parametrize("name", rows(FOLDERS))
def test_folders(name, tmp_path, capsys):
    edit, words = FOLDERS[name]
    edit(shutil.copytree(PIXART, tmp_path / "p"))
    assert words in ran("sample", "--pipeline", str(tmp_path / "p"), *PROMPT, capsys=capsys, folder=tmp_path)


@pytest.mark.parametrize("name", rows(OF_WAN))
def test_folders_of_two_networks(name, tmp_path, capsys):
    edit, words = OF_WAN[name]
    edit(shutil.copytree(WAN, tmp_path / "p"))
    found = ran("sample", "--pipeline", str(tmp_path / "p"), *PROMPT, "--frames", "5", capsys=capsys, folder=tmp_path)
    assert words in found


def test_the_extra_of_tokenizers_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    said = ran("sample", *P, *PROMPT, capsys=capsys, folder=tmp_path)
    assert "difax[text]" in said
