"""Where a model's settings come from: what the user sets, then what the checkpoint knows, then the configuration."""

import json
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import load_file, save_file

import difax
from difax.build import build_setup
from difax.checkpoints import find_weights, settings_of
from difax.cli import main
from difax.config import checkpoint_config, configuration, load_config, override, plain
from difax.weights.checkpoint import read_metadata, save_safetensors
from tests.toys import randomise

SMALL = override(load_config("fmnist_smoke"), [("model.depth", 2), ("model.width", 32)])
GOLDEN = Path(__file__).parent / "golden"


def parameters(config: Any) -> Any:
    return randomise(jax.eval_shape(build_setup(config).model.init, jax.random.key(0)))


def run_folder(folder: Path, config: Any = SMALL) -> Path:
    """What a training run leaves, as far as its weights are concerned."""
    params = parameters(config)
    with ocp.CheckpointManager(folder.absolute() / "checkpoints") as checkpoints:
        checkpoints.save(3, args=ocp.args.StandardSave({"step": np.int32(3), "params": params, "ema": params}))
    (folder / "config.json").write_text(json.dumps(plain(config)))
    return folder


def own_file(folder: Path, config: Any = SMALL) -> Path:
    save_safetensors(folder / "own.safetensors", parameters(config), {"config": plain(config)})
    return folder / "own.safetensors"


def published_file(folder: Path) -> Path:
    """A DiT of diffusers whose config.json tells heads and size."""
    save_file(load_file(GOLDEN / "dit_diffusers.safetensors"), folder / "model.safetensors")
    said = {"_class_name": "DiTTransformer2DModel", "num_attention_heads": 4, "sample_size": 8}
    (folder / "config.json").write_text(json.dumps(said))
    return folder / "model.safetensors"


def converted(folder: Path) -> Path:
    (folder / "src").mkdir()
    assert main(["convert", str(published_file(folder / "src")), str(folder / "dst")]) == 0
    return folder / "dst"


KINDS = {"run": run_folder, "own": own_file, "published": published_file, "converted": converted}


@pytest.fixture(params=KINDS)
def checkpoint(request: Any, tmp_path: Path) -> tuple[str, dict[str, Any]]:
    """A checkpoint of each kind, and a configuration of its model that leaves open or has otherwise what it can."""
    path = KINDS[request.param](tmp_path)
    config = checkpoint_config(str(path))
    model = {k: v for k, v in config["model"].items() if k not in ("heads", "size", "variant")}
    return str(path), {**config, "model": model}


def opened(path: str, base: Any = None, *settings: tuple[str, Any]) -> Any:
    config = configuration(base, path, settings)
    return find_weights(config, build_setup(config).model, path)


def test_the_user_comes_before_the_checkpoint_and_that_before_the_configuration(checkpoint):
    path, base = checkpoint
    known = settings_of(opened(path).model)
    other = {**base, "model": {**base["model"], "heads": known["heads"], "size": 4 * known["size"][0]}}
    assert settings_of(opened(path, other).model) == known
    # the smallest change that no tensor shows
    set_ = settings_of(opened(path, other, ("model.heads", 1), ("model.size", 2 * known["size"][0])).model)
    assert set_["heads"] == 1 and set_["size"][0] == 2 * known["size"][0]
    assert jax.tree.leaves(opened(path, other).params)


def test_what_the_tensors_contradict_is_refused_with_both_values(checkpoint):
    path, base = checkpoint
    known = settings_of(opened(path).model)
    base = {**base, "model": {**base["model"], "heads": known["heads"]}}
    for key, value in (("width", 2 * known["width"]), ("depth", 7), ("classes", 77)):
        words = f"model.{key} is {known[key]} in the checkpoint, {value} by the configuration"
        with pytest.raises(ValueError, match=words):
            opened(path, {**base, "model": {**base["model"], key: value}})
        for named in (None, base):
            with pytest.raises(ValueError, match=words):
                opened(path, named, (f"model.{key}", value))
    with pytest.raises(ValueError, match=f"model.heads is {known['heads']} in the checkpoint, 1 by the configuration"):
        opened(path, {**base, "model": {**base["model"], "heads": 1}})


def test_another_model_is_refused_by_name(checkpoint):
    path, _ = checkpoint
    for name in ("skip_dit_tiny", "flux_tiny", "pixart_tiny", "fmnist_cnn"):
        if "solver" not in load_config(name):
            continue
        with pytest.raises(ValueError, match=f"holds a dit; the configuration's model is {name.rpartition('_')[0]}"):
            opened(path, name)


def test_commands_and_python_say_the_same(checkpoint, capsys):
    """Every command takes its configuration from one function; one of them shows it."""
    path, _ = checkpoint
    known = settings_of(opened(path).model)
    words = f"model.width is {known['width']} in the checkpoint, 1152 by the configuration"
    assert main(["sample", "--config", "dit_imagenet", "--weights", path]) == 2
    assert words in capsys.readouterr().err
    for command in ("profile", "pareto", "calibrate"):
        more = {"calibrate": ["--cache", "teacache", "--out", "x.json"]}.get(command, [])
        assert main([command, "--config", "dit_imagenet", "--weights", path, *more]) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1, error
    with pytest.raises(ValueError, match=words):
        difax.load("dit_imagenet", weights=path)
    assert settings_of(difax.load(path).setup.model) == known


# ---- what is lost ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "model.", "module._orig_mod."])
def test_own_weights_that_another_tool_has_saved_again(tmp_path, prefix):
    tensors = load_file(own_file(tmp_path))
    file = tmp_path / "again.bin"
    save_file({prefix + name: a for name, a in tensors.items()}, file)
    assert read_metadata(file) == {}
    params = opened(str(file), SMALL).params
    jax.tree.map(np.testing.assert_array_equal, params, parameters(SMALL))
    wider = override(SMALL, [("model.width", 48)])
    with pytest.raises(ValueError, match=r"again.bin: tensor '.*' .*wrong shape"):
        _ = opened(str(file), wider).params


def test_it_is_said_which_configurations_fit(tmp_path):
    tensors = load_file(own_file(tmp_path, load_config("fmnist_smoke")))
    save_file({f"model.{name}": a for name, a in tensors.items()}, tmp_path / "again.bin")
    words = r"again.bin: says nothing of its model; give its configuration by --config \(its tensors fit fmnist_smoke\)"
    with pytest.raises(ValueError, match=words):
        difax.load(tmp_path / "again.bin")


def test_a_run_without_its_configuration(tmp_path):
    run = run_folder(tmp_path / "run")
    (run / "config.json").unlink()
    assert jax.tree.leaves(opened(str(run), SMALL).params)
    with pytest.raises(ValueError, match="run: says nothing of its model; give its configuration by --config"):
        opened(str(run))
    with pytest.raises(ValueError, match=r"tensor .* is \(.*\), expected"):
        _ = opened(str(run), override(SMALL, [("model.width", 48)])).params


DAMAGED = {
    "no table": ("[1]", "a list; allowed: an object"),
    "no model": ("{}", "no 'train'"),
    "model is text": ('{"model": "dit"}', "'model' is 'dit'"),
    "model without a name": (json.dumps({**plain(SMALL), "model": {}}), "name"),
    "unknown model": (json.dumps({**plain(SMALL), "model": {"name": "dot"}}), "unknown model 'dot'"),
    "text": ("hello", "config.json|Expecting"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_configuration_is_one_line(tmp_path, capsys, case):
    run = run_folder(tmp_path / "run")
    text, words = DAMAGED[case]
    (run / "config.json").write_text(text)
    for more in ([], ["--config", "fmnist_smoke"]):
        assert main(["sample", "--weights", str(run), *more]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "Traceback" not in error, error
        assert re.search(words, error) or more, error
    save_safetensors(tmp_path / "w.safetensors", parameters(SMALL), {"config": {"model": {"name": 3}}})
    with pytest.raises(ValueError, match=r"w.safetensors: its section model"):
        opened(str(tmp_path / "w.safetensors"), SMALL)


@pytest.mark.parametrize("name", ["n" * 300, "nul\0", "no/such", ""])
def test_a_place_that_cannot_be(name):
    for base in (None, "fmnist_smoke"):
        with pytest.raises(ValueError):
            opened(name or "none", base)


# ---- export ----------------------------------------------------------------------------------------------------------

FACTORY = """
from difax.models import MODELS, dit
from difax.config import load_config, override

def mine(**settings):
    return dit(**settings)

MODELS["mine_%s"] = mine

class Config(dict):
    def to_dict(self):
        return dict(self)

def get_config():
    config = override(load_config("fmnist_smoke"), [("model.depth", 2), ("model.width", 32)])
    return Config({**config, "model": {**config["model"], "name": "mine_%s"}})
"""


def test_export_takes_the_configuration_that_registers_the_model(tmp_path, capsys):
    from difax.models import MODELS

    name = f"mine_{tmp_path.name}"
    (tmp_path / "my.py").write_text(FACTORY.replace("%s", tmp_path.name))
    run = run_folder(tmp_path / "run")
    (run / "config.json").write_text(json.dumps(plain({**SMALL, "model": {**SMALL["model"], "name": name}})))
    command = ["export", "--workdir", str(run), "--out", str(tmp_path / "e.safetensors"), "--dtype", "float32"]
    assert main(command) == 2
    assert f"unknown model '{name}'" in capsys.readouterr().err
    assert main([*command, "--config", str(tmp_path / "my.py")]) == 0
    del MODELS[name]
    stored = read_metadata(tmp_path / "e.safetensors")
    assert stored["step"] == 3 and stored["config"]["model"]["name"] == name
    jax.tree.map(
        np.testing.assert_array_equal, opened(str(tmp_path / "e.safetensors"), SMALL).params, parameters(SMALL)
    )


def test_export_of_a_file_of_ones_own_is_said_by_the_user(tmp_path, capsys):
    (tmp_path / "my.py").write_text("from difax.models import dit as mine\n")
    run, name = run_folder(tmp_path / "run"), f"{tmp_path / 'my.py'}:mine"
    (run / "config.json").write_text(json.dumps(plain({**SMALL, "model": {**SMALL["model"], "name": name}})))
    command = ["export", "--workdir", str(run), "--out", str(tmp_path / "e.safetensors")]
    assert main(command) == 2
    assert "comes from a file of data" in capsys.readouterr().err
    assert main([*command, f"--config.model.name={name}"]) == 0
