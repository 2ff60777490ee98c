"""The front door: `import difax` is light, `difax.load` opens what there is, and a run keeps what it has compiled."""

import json
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

import difax
from difax.accel.caches import CACHES
from difax.build import build_setup
from difax.cli import main
from difax.config import load_config
from difax.media.samples import check_output
from difax.program import Drawn, model_shapes
from difax.weights.checkpoint import save_safetensors
from difax.weights.conditions import check_conditions
from tests.families import some

ROOT = pathlib.Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"
TINY = {"weights": "random", "model": {"depth": 2, "width": 32}}


@pytest.fixture(scope="module")
def run() -> difax.Run:
    return difax.load("fmnist_smoke", steps=4, **TINY)


@pytest.fixture(scope="module")
def drawn(run) -> difax.Result:
    return run.sample([3, "bag", 1], seed=5)


def test_import_is_light(user_env):
    """Nothing of weight comes along before it is used, and everything is there when it is."""
    code = "import sys, difax; print(sorted({m.partition('.')[0] for m in sys.modules} & set(sys.argv[1:])))"
    heavy = ["jax", "numpy", "flax", "optax", "orbax", "grain", "PIL", "tqdm", "tensorboardX", "torch", "matplotlib"]
    done = subprocess.run(
        [sys.executable, "-c", code, *heavy], env=user_env, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", difax.__all__)
def test_what_it_offers_is_there_and_documented(name):
    assert len(getattr(difax, name).__doc__) > 60 and name in dir(difax)
    if name == "load":
        assert difax.load.__annotations__["return"] == "Run"


def test_no_such_name():
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        difax.lode  # noqa: B018


def test_settings_by_keyword_are_those_of_the_command_line(tmp_path, capsys):
    command = ["sample", "--config", "fmnist_smoke", "--random-init", "--solver", "ddim", "--config.solver.eta=0.5"]
    command += ["--steps", "3", "--cache", "fora", "--config.cache.interval=2", "--quant", "int8_weight", "--seed", "2"]
    command += ["--config.model.depth=2", "--labels", "bag,1", "--dtype", "bfloat16", "--out", str(tmp_path / "a.npz")]
    assert main([*command, "--json", "--no-compile-cache"]) == 0
    table = json.loads(capsys.readouterr().out)
    run = difax.load(
        "fmnist_smoke",
        weights="random",
        seed=2,
        solver={"name": "ddim", "eta": 0.5},
        steps=3,
        cache={"name": "fora", "interval": 2},
        quant="int8_weight",
        dtype="bfloat16",
        model={"depth": 2},
    )
    found = run.sample("bag,1", seed=2)
    with np.load(tmp_path / "a.npz") as written:
        np.testing.assert_array_equal(found.images, written["samples"])
    measured = {"compile_seconds", "seconds_per_image", "out"}
    assert {k: v for k, v in found.table.items() if k not in measured} == {
        k: v for k, v in table.items() if k not in measured
    }


@pytest.mark.parametrize(
    "settings, wanted",
    [
        ({"solvr": "euler"}, r"unknown setting 'solvr' \(did you mean solver\?\)"),
        ({"cache": "foraa"}, r"unknown cache 'foraa' \(did you mean fora\?\)"),
        (
            {"cache": {"name": "fora", "intervall": 3}},
            r"key of cache fora 'intervall' \(did you mean interval\?\)",
        ),
        ({"cache": 3}, "cache: name=3 is an int; allowed: a name, or a factory"),
        ({"steps": "many"}, "steps='many'"),
        ({"weights": "nowhere"}, "nowhere: no such file"),
        ({"quant": {"name": ["a"]}}, "quant given made 'a'; allowed: pairs of a pattern and a Quantisation"),
    ],
)
def test_a_mistake_is_a_value_error(settings, wanted):
    with pytest.raises(ValueError, match=wanted):
        difax.load("fmnist_smoke", **{"weights": "random", **settings})


def test_a_result_is_images_trace_and_cost(drawn, run):
    images, trace, cost = drawn
    assert images.shape == (3, 28, 28, 1) and images.dtype == np.float32 and np.isfinite(images).all()
    assert isinstance(trace, difax.Trace) and trace.computed["blocks"].shape == (4, 2, 2, 2)
    assert cost["evaluations"] == 4 and cost["gflops_per_image"] > 0
    assert drawn.cond.tolist() == [3, 8, 1] and drawn.run is run
    assert "dit-2x32/4" in repr(drawn) and "GFLOPs per image" in repr(drawn)


def test_a_result_shows_itself(drawn):
    import io

    from PIL import Image

    shown = Image.open(io.BytesIO(drawn._repr_png_()))
    np.testing.assert_array_equal(np.asarray(shown), drawn.picture())
    assert drawn._repr_html_().startswith('<img src="data:image/png;base64,')


def test_saving_by_the_ending(drawn, tmp_path):
    from PIL import Image

    drawn.save(tmp_path / "a.png")
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "a.png")), drawn.picture())
    assert drawn.save(tmp_path / "a.npz") == tmp_path / "a.npz"
    with np.load(tmp_path / "a.npz") as found:
        np.testing.assert_array_equal(found["samples"], drawn.images)
        np.testing.assert_array_equal(found["labels"], [3, 8, 1])
        np.testing.assert_array_equal(found["seeds"], [[5, 0], [5, 1], [5, 2]])
        assert found["latents"].shape == drawn.images.shape
        assert json.loads(str(found["config"]))["steps"] == 4
    drawn.save(tmp_path / "images")
    files = sorted(p.name for p in (tmp_path / "images").iterdir())
    assert files == ["00000.png", "00001.png", "00002.png"]
    one = np.asarray(Image.open(tmp_path / "images" / "00001.png"))
    np.testing.assert_array_equal(one, np.clip(np.round((drawn.images[1, ..., 0] + 1) * 127.5), 0, 255))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.npz", "a.png", "images"]


@pytest.mark.slow
def test_a_video_is_a_folder_of_its_frames(tmp_path):
    run = difax.load("wan_tiny", steps=1)
    drawn = run.sample()
    drawn.save(tmp_path / "film")
    frames = sorted((tmp_path / "film" / "00000").iterdir())
    assert [f.name for f in frames] == [f"{i:05d}.png" for i in range(drawn.images.shape[1])]


@pytest.mark.parametrize("name", ["a.bmp", "", "there/a.png", "full", "a.png/", "folder.png"])
def test_places_that_cannot_be_written_are_refused_first(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(ValueError, match="--out"):
        check_output(name)
    assert main(["sample", "--config", "fmnist_smoke", "--random-init", "--out", name]) == 2


def test_latents_in_and_out(run, drawn, tmp_path, capsys):
    """What was written begins the same images again, under another seed too: Euler draws no more noise."""
    again = run.sample([3, "bag", 1], seed=9, latents=drawn.latents)
    np.testing.assert_array_equal(again.images, drawn.images)
    np.testing.assert_array_equal(again.latents, drawn.latents)
    drawn.save(tmp_path / "a.npz")
    command = ["sample", "--config", "fmnist_smoke", "--random-init", "--steps", "4", "--labels", "3,bag,1"]
    command += ["--config.model.depth=2", "--config.model.width=32", "--quiet", "--no-compile-cache"]
    b = str(tmp_path / "b.npz")
    assert main([*command, "--latents", str(tmp_path / "a.npz"), "--out", b]) == 0
    with np.load(b) as found:
        np.testing.assert_allclose(found["samples"], drawn.images, atol=1e-6)
    np.savez(tmp_path / "c.npz", latents=drawn.latents[:2])
    np.savez(tmp_path / "d.npz", other=drawn.latents)
    np.savez(tmp_path / "e.npz", latents=np.full_like(drawn.latents, np.nan))
    (tmp_path / "f.npz").write_text("no zip")
    capsys.readouterr()
    for file, wanted in {"c": "[3, 28, 28, 1]", "d": "no array named latents", "e": "not finite", "f": "f.npz"}.items():
        assert main([*command, "--latents", str(tmp_path / f"{file}.npz"), "--out", b]) == 2
        err = capsys.readouterr().err
        assert wanted in err and err.count("\n") == 1


def test_what_is_compiled_is_kept(run, drawn):
    """A second draw, another seed, scale or threshold compile nothing, in the run as in those made of it."""
    before = len(run._compiled)
    assert run.sample([1, 2, 3], seed=1).cost["compile_seconds"] == 0
    for settings in ({"scale": 3.0}, {"guide": {"name": "interval", "low": 0.2}}):
        run.replace(**settings).sample([1, 2, 3])
    kept = len(run._compiled)
    assert kept <= before + 1  # the interval is a program of its own
    cached = [run.replace(cache={"name": "teacache", "threshold": t}) for t in (0.0, 1e9)]
    computed = [c.sample([1, 2, 3]).cost["computed_fraction"] for c in cached]
    assert len(run._compiled) == kept + 1 and computed[0] > computed[1]
    assert all(c.params is run.params and c.prepared is run.prepared for c in cached)
    assert run.replace(quant="int8_weight").prepared is not run.prepared


def test_a_replaced_run_draws_what_a_loaded_one_does(run):
    other = run.replace(solver="dpmpp_2m", steps=3, cache="fora", dtype="bfloat16")
    fresh = difax.load("fmnist_smoke", solver="dpmpp_2m", steps=3, cache="fora", dtype="bfloat16", **TINY)
    np.testing.assert_array_equal(other.sample([4]).images, fresh.sample([4]).images)
    assert run.config["steps"] == 4 and run.setup.described["solver"] == "euler"  # the first one is as it was
    deeper = run.replace(model={"depth": 3})
    assert deeper.setup.model.name == "dit-3x32/4" and deeper.params is not run.params


def test_calibrations_become_settings(run, tmp_path):
    file = tmp_path / "s.json"
    content = run.calibrate("smoothcache", file, samples=2, batch=2)
    assert json.loads(file.read_text()) == content and content["technique"] == "smoothcache"
    cached = run.replace(cache={"name": "smoothcache", "alpha": 1e9, "file": str(file)})
    assert cached.sample([1]).cost["computed_fraction"] < 1
    with pytest.raises(ValueError, match=r"unknown calibration 'smothcache' \(did you mean smoothcache\?\)"):
        run.calibrate("smothcache")
    with pytest.raises(ValueError, match="ends in .json"):
        run.calibrate("smoothcache", tmp_path / "s.npz")


NOT_ARGUMENTS = {
    "seed": (lambda run: run.sample([1], seed=1.5), "seed=1.5"),
    "repeat": (lambda run: run.sample([1], repeat=True), "repeat=True"),
    "label of other digits": (lambda run: run.sample(["\u00b2"]), "unknown label '\u00b2'"),
    "label of many digits": (lambda run: run.sample(["9" * 5000]), "label '9999.*allowed: 0 ... 9"),
    "label of two signs": (lambda run: run.sample(["--1"]), "unknown label '--1'"),
    "labels of unequal lengths": (lambda run: run.sample([[1, 2], [3]]), r"label '\[1, 2\]'"),
    "latents of unequal lengths": (lambda run: run.sample([1], latents=[[1, 2], [3]]), r"latents: .*\[1, 28, 28, 1\]"),
    "turns": (lambda run: run.profile([1], turns="3"), "turns='3'"),
    "no turns": (lambda run: run.profile([1], turns=0), "turns=0"),
    "samples": (lambda run: run.calibrate("teacache", samples="3"), "samples='3'"),
    "a seed of a calibration": (lambda run: run.calibrate("teacache", seed=-1), "seed=-1"),
    "budget": (lambda run: run.calibrate("scheduled", budget=float("nan")), "budget=nan"),
    "rank": (lambda run: run.calibrate("icc", rank=1.5), "rank=1.5"),
    "out": (lambda run: run.calibrate("teacache", 1.5), "out=1.5"),
    "tell": (lambda run: run.calibrate("teacache", tell=3), "tell=3; allowed: a function"),
    "weights": (lambda run: difax.load("fmnist_smoke", weights=1.5), "weights=1.5"),
    "other weights": (lambda run: run.replace(weights=[1]), r"weights=\[1\]"),
    "workdir": (lambda run: difax.train("fmnist_smoke", 1.5), "workdir=1.5"),
    "resume": (lambda run: difax.train("fmnist_smoke", "w", resume="no"), "resume='no'"),
    "log": (lambda run: difax.train("fmnist_smoke", "w", log="a.log"), "log='a.log'"),
}


@pytest.mark.parametrize("name", NOT_ARGUMENTS)
def test_an_argument_of_another_type_is_named(name, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    call, wanted = NOT_ARGUMENTS[name]
    with pytest.raises(ValueError, match=wanted):
        call(run)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("cond", [[None], 3, {0: np.zeros(2)}, {"text": None}], ids=str)
def test_embeddings_of_another_type_are_named(cond):
    model = build_setup(load_config("flux_tiny")).model
    with pytest.raises(ValueError, match="cond.*allowed: .*pooled"):
        check_conditions(model, cond)
    none = jax.tree.map(lambda a: np.zeros((0, *a.shape), a.dtype), model.cond)
    with pytest.raises(ValueError, match="cond holds 0 conditions"):
        check_conditions(model, none)


def test_a_picture_of_latents_says_what_it_shows(drawn):
    four = np.zeros((1, 4, 4, 4), np.float32)
    latents = difax.Result(drawn.run, None, 1, 0, Drawn(four, four, drawn.trace, drawn.cost))
    assert latents.table["pictures"] == "channel 1 of 4, -1 (black) to 1" and "channel 1 of 4" in repr(latents)
    assert "pictures" not in drawn.table


def test_profile(run):
    found = run.profile([0, 1], turns=1)
    assert found.batch == 2 and found.evaluation.seconds > 0 and any(p.name == "blocks: mlp" for p in found.parts)


def test_a_made_accelerator_and_its_contract(run):
    """A contract's own tuple stands in for a name: the neutral one is the plain run."""
    made = run.replace(cache=difax.Accelerator())
    np.testing.assert_array_equal(made.sample([3, "bag", 1], seed=5).images, run.sample([3, "bag", 1], seed=5).images)
    assert run.replace(cache=CACHES["fora"](2)).sample([1]).cost["decisions"][0] == "F.F."


def test_a_file_of_weights_brings_its_settings(run, drawn, tmp_path):
    path = tmp_path / "w.safetensors"
    save_safetensors(path, run.params, {"config": {**load_config("fmnist_smoke"), **run.config, "weights": None}})
    opened = difax.load(path)
    np.testing.assert_allclose(opened.sample([3, "bag", 1], seed=5).images, drawn.images, atol=1e-6)
    assert opened.source == str(path) and difax.load(path, steps=2).config["steps"] == 2
    with pytest.raises(ValueError, match="no such file"):
        difax.load(tmp_path / "x.safetensors")


PUBLISHED = {
    "dit_original": {"heads": 4},
    "flux_original": {"size": 8, "axes_dim": (2, 4, 4)},
    "pixart_sigma": {"heads": 2, "size": 8, "text_tokens": 5, "base_size": 2},
    "wan_original": {"heads": 2, "size": (2, 4, 4)},
    "sd3_3_original": {"heads": 2, "size": 8},
    "qwen_image_diffusers": {"size": 8, "axes_dim": (2, 4, 4)},
    "flux2_dev_original": {"size": 4, "axes_dim": (2, 4, 4, 6)},
    "z_image_original": {"size": 8, "axes_dim": (2, 4, 4)},
}


@pytest.mark.parametrize("name", some(PUBLISHED, "dit_original", "wan_original"))
def test_a_published_checkpoint_brings_its_geometry(name, tmp_path):
    """Without a configuration: what the file tells of the model, with what the caller does, is in the configuration
    that comes out, which builds the same network."""
    path = GOLDEN / f"{name}.safetensors"
    opened = difax.load(path, model=PUBLISHED[name])
    again = build_setup(opened.config).model
    assert again.name == opened.setup.model.name and again.name.startswith(name.partition("_")[0])
    assert jax.tree.map(np.shape, opened.params) == jax.tree.map(lambda a: a.shape, model_shapes(again))
    assert opened.replace(steps=2).weights is opened.weights
    with pytest.raises(ValueError, match="heads|axes_dim"):
        difax.load(path)


def test_platform(capsys, user_env):
    """A device that is not there is one line; the one that is is used."""
    command = [sys.executable, "-m", "difax", "sample", "--platform"]
    for name, extra in (("tpu", "difax[tpu]"), ("gpu", "difax[cuda]")):
        if name == "gpu" and shutil.which("nvidia-smi"):
            continue
        done = subprocess.run([*command, name], env=user_env, capture_output=True, text=True)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        assert f"--platform {name}: no such device here" in done.stderr and extra in done.stderr
    assert main(["sample", "--platform", "quantum"]) == 2
    assert "--platform quantum; allowed: cpu, gpu, tpu" in capsys.readouterr().err


def test_log_is_lines_of_json(tmp_path, capsys):
    log = tmp_path / "log.jsonl"
    command = ["sample", "--config", "fmnist_smoke", "--random-init", "--steps", "1", "--log", str(log)]
    command += ["--config.model.depth=1", "--out", str(tmp_path / "a.png"), "--no-compile-cache"]
    for _ in range(2):
        assert main(command) == 0
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["event"] for line in lines] == ["sample", "sample"]
    assert (
        lines[0]["evaluations"] == 1 and lines[0]["command"].startswith("difax sample") and lines[0]["time"][-1] == "Z"
    )
    assert main([*command[:-3], "--log", str(tmp_path / "nowhere" / "x.jsonl")]) == 2


def test_a_setup_drawn_again_compiles_nothing(small_weights):
    """Also without a `Run`: other seeds and scales share what `draw` has compiled."""
    from difax.program import draw, kept_program

    run = difax.load(small_weights, steps=2)
    first = draw(run.setup, run.prepared, [0, 1])
    other = run.replace(scale=3.0).setup
    assert first.table["compile_seconds"] > 0
    assert draw(run.setup, run.prepared, [2, 3], seed=1).table["compile_seconds"] == 0
    assert draw(other, run.prepared, [2, 3]).samples.shape == first.samples.shape
    program = kept_program(other, run.prepared, other.inputs(0, 2, np.arange(2)))
    assert program.shared and program.compile_seconds == 0
