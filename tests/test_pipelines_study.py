"""What is measured and planned of whole pipelines: `difax pareto`, `difax plan`, compilations, listings."""

import importlib.util
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import difax
from difax import config as module
from difax.cli import main
from difax.config import load_config, pipeline_config
from difax.core.chips import parse_target
from difax.core.qtensor import size_in_bytes
from difax.media.images import to_uint8
from difax.pipelines.parts import DECODERS, parts_of, published_parts
from difax.pipelines.recipes import RECIPES, flux2_mu, open_pipeline
from difax.registry import make
from difax.study import stages
from difax.study.methods import METHODS
from difax.study.pareto import accelerated, check_methods, slug
from tests.families import some

GOLDEN = pathlib.Path(__file__).resolve().parent / "golden"
PIXART, WAN = GOLDEN / "pipeline_pixart", GOLDEN / "pipeline_wan"
SIZES = {
    PIXART: {"pipeline.height": 16, "pipeline.width": 24, "pipeline.tokens": 24},
    WAN: {"pipeline.height": 32, "pipeline.width": 48, "pipeline.frames": 5, "pipeline.tokens": 24},
}
PROMPTS = ["a red fox", "two cats on a bicycle"]
SEES = """
import numpy as np
from difax.study.networks import Network

def make(path):
    def look(images, texts):
        assert images.dtype == np.uint8 and images.shape[1:] == (16, 24, 3), images.shape
        return np.asarray([float(len(text)) for text in texts])
    return Network("scores", {"mean": "clip_score"}, look)
"""

needs_tokenizers = pytest.mark.skipif(importlib.util.find_spec("tokenizers") is None, reason="needs the extra text")


def flags(folder: pathlib.Path) -> list[str]:
    sizes = [word for key, value in SIZES[folder].items() for word in (f"--{key.partition('.')[2]}", str(value))]
    return ["--pipeline", str(folder), *sizes]


def rows_of(out: pathlib.Path) -> dict[str, dict]:
    return {row["method"]: row for row in map(json.loads, (out / "rows.jsonl").read_text().splitlines())}


@pytest.mark.slow
@needs_tokenizers
@pytest.mark.parametrize("folder", some([PIXART, WAN], PIXART))
def test_pareto_compares_decoded_pictures_of_prompts(folder, tmp_path):
    """Pictures are those of `difax sample`; a network is asked with the prompts, and a film shows its frames."""
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    (tmp_path / "sees.py").write_text(SEES)
    out, seeds = tmp_path / "sweep", 3 if folder == WAN else 2
    command = ["pareto", *flags(folder), "--prompts", str(tmp_path / "prompts.txt"), "--steps", "2", "--quiet"]
    method = "fora" if folder == WAN else "cache.name=none"  # which has the baseline's program
    command += ["--seeds", str(seeds), "--batch", "1", "--turns", "1", "--methods", method, "--out", str(out)]
    sees = ["--network", f"{tmp_path / 'sees.py'}:make"] if folder == PIXART else []
    assert main([*command, *sees]) == 0
    rows = rows_of(out)
    run = difax.load(folder, steps=2, **SIZES[folder])
    prompts = [PROMPTS[i % 2] for i in range(seeds)]
    drawn = {"baseline": run.sample(prompt=prompts).images}
    if folder == WAN:  # one is enough of a default run's seconds
        drawn["fora"] = run.replace(cache="fora").sample(prompt=prompts).images
        squared = ((drawn["fora"] - drawn["baseline"]) ** 2).mean((2, 3, 4))  # of each frame
        decibels = np.mean(10 * np.log10(4 / squared))
        assert rows["fora"]["quality"]["psnr"][0] == pytest.approx(decibels, abs=0.05)
    for name, images in drawn.items():
        kept = np.load(out / "images" / f"{slug(name)}.npz")["images"]
        assert np.abs(kept.astype(int) - to_uint8(images).astype(int)).max() <= 1
    for row in rows.values():
        assert row["speed"]["decode_seconds_per_image"] > 0
        assert "range" not in row
        assert f"--pipeline {folder}" in row["command"] and "--prompts" in row["command"]
        if sees:
            assert row["quality"]["clip_score"][0] == pytest.approx(np.mean([len(p) for p in prompts]))


def test_what_makes_no_sense_for_a_pipeline_is_refused():
    run = difax.load(PIXART, scale=1.0, steps=2, **SIZES[PIXART])
    assert run.setup.guide.halves == 1
    with pytest.raises(ValueError, match="not guided by a second evaluation here"):
        accelerated(run, METHODS["guidance t 0.1 to 0.9"])
    with pytest.raises(ValueError, match="magcache: nothing was given"):
        accelerated(run, METHODS["magcache, published"])  # nothing is published of it
    guided = difax.load(PIXART, steps=2, **SIZES[PIXART])
    assert accelerated(guided, METHODS["guidance t 0.1 to 0.9"]).setup.guide.halves == 2


@pytest.fixture(scope="module")
def two_networks(tmp_path_factory) -> pathlib.Path:
    """Wan's tiny folder with a second network for weak noise."""
    folder = tmp_path_factory.mktemp("experts") / "wan22"
    shutil.copytree(WAN, folder)
    shutil.copytree(folder / "transformer", folder / "transformer_2")
    file = folder / "transformer_2" / "diffusion_pytorch_model.safetensors"
    rng, tensors = np.random.default_rng(0), load_file(file)
    other = {k: (v * (1 + 0.3 * rng.standard_normal(v.shape))).astype(v.dtype) for k, v in tensors.items()}
    save_file(other, file)
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"boundary_ratio": 0.875, "transformer_2": index["transformer"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def test_a_second_network_stays_under_every_method(two_networks):
    run = difax.load(two_networks, steps=3, **SIZES[WAN])
    check_methods(run, {})  # it is no cache
    for method, name in (("fora 2", "experts+fora"), ("steps 8", "experts")):
        found = accelerated(run, METHODS[method])
        assert found.config["cache"]["name"] == name
        assert len(found.setup.accelerator.networks) == 1


@needs_tokenizers
@pytest.mark.slow
def test_a_calibration_runs_both_networks(two_networks):
    """MagCache's ratios behind the switch are the second network's: they are others with the first alone."""
    both = difax.load(two_networks, steps=4, **SIZES[WAN])
    cond = both.encoded(PROMPTS)
    one = difax.load(WAN, steps=4, **SIZES[WAN])
    tables = [run.calibrate("magcache", None, cond, samples=2, batch=2) for run in (both, one)]
    numbers = [np.asarray(jax.tree.leaves({k: v for k, v in t.items() if k == "ratios"}), float) for t in tables]
    first = np.asarray(both.setup.rows.model_time) >= 875
    assert first.any() and not first.all()
    assert not np.allclose(*numbers)
    with pytest.raises(ValueError, match="two networks"):
        both.calibrate("icc", None, cond, samples=2, batch=2, rank=2)


@needs_tokenizers
def test_other_prompts_compile_nothing_new():
    """Encoder, sampler and decoder are compiled once for a shape."""
    compiled: list[str] = []

    def listen(event: str, seconds: float, **more) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    run = difax.load(PIXART, steps=2, **SIZES[PIXART])
    first = run.sample(prompt=PROMPTS)
    assert compiled  # it is heard
    before = len(compiled)
    other = run.sample(prompt=["three logs", "a fox and a bicycle on a red log"], seed=5)
    many = [f"{i} cats" for i in range(2)]
    assert not np.allclose(first.images, other.images)
    run.sample(prompt=many)
    run.sample(prompt=many * 2, repeat=1, batch=1)  # the same prompts again: nothing else of a batch of one
    between = len(compiled) - before
    encoder_shapes = 3  # of four texts at once: embed, block, norm
    assert between <= encoder_shapes
    before = len(compiled)
    run.sample(prompt=[f"{i} dogs" for i in range(4)])
    assert len(compiled) == before


def test_an_encoder_costs_the_same_streamed_or_whole():
    """Operations by the sizes of T5's products; the streamed way holds one block, the other all of them."""
    section = pipeline_config(PIXART, list(SIZES[PIXART].items()))["pipeline"]
    parts = parts_of(section)
    (texts,) = parts.encoders
    assert texts.tokens == 24
    chip, there = parse_target("cpu:1").published, jax.devices("cpu")[:1]
    *ways, decoder = stages.ways(parts, (8, 12, 4), 2)
    assert decoder.stage == "vae" and decoder.chosen and decoder.times == 2  # one after another
    encoders = [stages.planned(way, there, chip, {}) for way in ways]
    config = json.loads((PIXART / "text_encoder" / "config.json").read_text())
    d, inner, hidden = config["d_model"], config["num_heads"] * config["d_kv"], config["d_ff"]
    gates = 3 if config.get("is_gated_act", "gated" in config.get("feed_forward_proj", "relu")) else 2
    rows = 2 * texts.tokens
    products = rows * (4 * d * inner + gates * d * hidden) + 2 * 2 * texts.tokens**2 * inner
    for row in encoders:
        assert sum(row["operations"].values()) == 2 * config["num_layers"] * products
        assert row["peak"] >= row["holds"]["weights"] > 0
    streamed, whole = encoders
    assert streamed["chosen"] and not whole["chosen"]
    assert whole["holds"]["weights"] > streamed["holds"]["weights"]


def test_the_whole_is_its_largest_stage():
    """A stage by itself, and with the denoiser's weights beside the decoder, which a run keeps."""

    def row(stage, peak, chosen=True):
        return {"stage": stage, "peak": peak, "chosen": chosen, "fits": None, "seconds": None, "operations": {"f": 5.0}}

    rows = [row("text_encoder", 7), row("text_encoder", 900, False), row("vae", 8), row("vae", 3, False)]
    sampler = {"memory": {"peak": 9, "usable": 10}, "holds": {"weights": 4}, "refused": None}
    sampler |= {"seconds": None, "operations": {"f": 1.0, "g": 2.0}}
    found = stages.whole(sampler, rows)
    assert (found["stage"], found["peak"], found["peak_kept"], found["fits"]) == ("sampler", 9, 12, False)
    assert found["operations"] == 13.0
    roomy = {**sampler, "memory": {"peak": 9, "usable": 12}}
    assert stages.whole(roomy, rows)["fits"] is True
    assert stages.whole(roomy, [row("vae", None)])["peak"] is None


# configuration -> parameters of the published text encoders, and of the autoencoder (their own checkpoints' counts)
T5, CLIP, UMT5 = 4_762_310_656, 123_060_480, 5_680_910_336
PUBLISHED = {
    "flux_dev": ([CLIP, T5], 83_819_683),
    "wan2_1:14B": ([UMT5], 126_892_531),
    "pixart_sigma": ([T5], 83_653_863),
    "dit_imagenet": ([], 83_653_863),
}


@pytest.mark.parametrize("name", some(PUBLISHED, "flux_dev"))
def test_published_parts_have_the_published_sizes(name):
    section = load_config(name)["model"]
    encoders, decoder = PUBLISHED[name]
    parts = published_parts(make("model", section), section["name"])
    counts = [size_in_bytes(texts.params) // 2 for texts in parts.encoders]  # bfloat16
    assert counts == encoders
    assert size_in_bytes(parts.decoder.params) // 4 == decoder


@pytest.mark.slow
def test_every_pipeline_has_published_parts_of_its_width():
    for kind in DECODERS:
        name = {"dit": "dit_imagenet", "flux": "flux_dev", "pixart": "pixart_sigma", "wan": "wan2_1"}.get(kind, kind)
        section = load_config({"flux2": "flux2_klein"}.get(name, name))["model"]
        model = make("model", section)
        parts = published_parts(model, kind)
        assert RECIPES[parts.pipeline].model == kind
        text = model.cond.get("text") if isinstance(model.cond, dict) else None
        if text is not None and kind != "sd3":
            widths = [texts.encoder.width * max(len(texts.wanted), 1) for texts in parts.encoders]
            assert widths[-1] == text.shape[1]
    assert {recipe.model for recipe in RECIPES.values()} <= set(DECODERS)


@pytest.mark.slow
def test_a_plan_of_a_folder_tells_every_stage(capsys, tmp_path):
    picture = tmp_path / "plan.png"
    more = ["--picture", str(picture)]
    assert main(["plan", *flags(WAN), "--steps", "2", "--target", "cpu:1", "--json", "--quiet", *more]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["pipeline"] == "WanPipeline"
    assert [row["stage"] for row in found["stages"]] == ["text_encoder"] * 2 + ["vae"] * 2
    chosen = {row["stage"]: row["how"] for row in found["stages"] if row["chosen"]}
    assert chosen == {"text_encoder": "streamed, 2 blocks", "vae": "a latent frame at a time"}
    peaks = [found["memory"]["peak"], *(row["peak"] for row in found["stages"] if row["chosen"])]
    assert found["whole"]["peak"] == max(peaks)
    assert picture.is_file()
    text = repr(difax.plan(WAN, "cpu:1", steps=2, **SIZES[WAN]))
    assert "WanPipeline as a whole" in text and "(text_encoder:" in text


@pytest.mark.slow
def test_a_shift_by_steps_goes_along_with_them(monkeypatch):
    """FLUX.2's mu is of the number of steps, so a method of fewer steps has its own."""
    asked = pipeline_config(PIXART, [*SIZES[PIXART].items(), ("steps", 4)])
    recipe = RECIPES["PixArtSigmaPipeline"]._replace(mu=flux2_mu)
    monkeypatch.setattr(module, "open_pipeline", lambda path, given=None: (open_pipeline(path)[0], recipe))
    tokens = int(np.prod(asked["model"]["size"])) // recipe.patch**2
    before = {**asked, "grid": {"name": "flow_match", "mu": flux2_mu(tokens, 4)}}
    after = module.piped({**before, "steps": 8}, before)
    assert after["grid"]["mu"] == flux2_mu(tokens, 8) != before["grid"]["mu"]
    set_by_user = {**before, "grid": {"name": "flow_match", "mu": 0.25}}
    assert module.piped({**set_by_user, "steps": 8}, set_by_user)["grid"]["mu"] == 0.25


def test_pipelines_are_listed(capsys):
    for kind, known in (("pipelines", RECIPES), ("encoders", ["T5EncoderModel"]), ("autoencoders", ["AutoencoderKL"])):
        assert main(["list", kind]) == 0
        lines = capsys.readouterr().out.splitlines()[1:]
        listed = {line.split(maxsplit=1)[0]: line.split(maxsplit=1)[1] for line in lines}
        assert set(known) <= set(listed) and all(listed.values())


@needs_tokenizers
@pytest.mark.slow
def test_profile_and_calibrate_take_prompts(tmp_path, capsys):
    prompt = ["--prompt", PROMPTS[0], "--steps", "2", "--quiet"]
    assert main(["profile", *flags(PIXART), *prompt, "--turns", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)
    out = tmp_path / "smooth.json"
    more = ["--samples", "2", "--batch", "2", "--cache", "smoothcache", "--out", str(out)]
    assert main(["calibrate", *flags(PIXART), *prompt, *more]) == 0
    assert json.loads(out.read_text())["technique"] == "smoothcache"
    assert main(["profile", "--config", "fmnist_smoke", "--prompt", "x", "--quiet"]) == 2
    assert "--pipeline" in capsys.readouterr().err
