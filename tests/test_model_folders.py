"""Networks straight from a pipeline's folder: the recorded calls of whole pipelines, and folders that say the same
otherwise, as published ones do."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from difax.checkpoints import recognise, settings_of
from difax.core.trunk import forward
from difax.models import CHECKPOINTS
from difax.weights.published import load_foreign
from tests.families import some
from tests.golden.make_settings import CASES, draw_tensors

PIPELINES = Path(__file__).parents[2] / "shared" / "pipelines"
TOLERANCE = 3e-5  # of the largest output
GOLDEN = Path(__file__).parent / "golden" / "settings.npz"
WEIGHTS = "diffusion_pytorch_model"


# ---- recorded calls --------------------------------------------------------------------------------------------------


def unpacked(tokens: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Latents [B, H, W, C] of FLUX's tokens, 2 x 2 of them in each, the channel first."""
    x = tokens.reshape(len(tokens), rows // 2, columns // 2, -1, 2, 2).transpose(0, 1, 4, 2, 5, 3)
    return x.reshape(len(tokens), rows, columns, -1)


def recorded(name: str) -> list[dict[str, Any]]:
    """The calls of a pipeline's network: x and output with channels last, t, cond, and the denoiser's folder."""
    said = json.loads((PIPELINES / name / "run.json").read_text())
    with np.load(PIPELINES / name / "run.npz") as file:
        arrays = {key: file[key] for key in file.files}
    arrays |= {alias: arrays[key] for alias, key in said["same"].items()}
    calls = []
    for i, folder in enumerate(said["denoiser_of_call"]):
        given = {key.rpartition("/")[2]: a for key, a in arrays.items() if key.startswith(f"call/{i}/in/")}
        x, output, t = given["hidden_states"], arrays[f"call/{i}/out"], given["timestep"]
        text = {"text": given.get("encoder_hidden_states")}
        if name == "dit":
            cond: Any = given["class_labels"].astype(np.int32)
        elif name == "pixart_sigma":
            cond = text | {"mask": given["encoder_attention_mask"].astype(np.int32)}
        elif name == "flux_dev":
            cond = text | {"pooled": given["pooled_projections"], "guidance": given["guidance"]}
            side = [n // 8 for n in (said["call"]["height"], said["call"]["width"])]
            x, output, t = unpacked(x, *side), unpacked(output, *side), 1000 * t
        else:
            cond = text
        if x.ndim > 3 and name != "flux_dev":
            x, output = np.moveaxis(x, 1, -1), np.moveaxis(output, 1, -1)
        calls.append({"x": x, "output": output, "t": np.float32(t), "cond": cond, "folder": PIPELINES / name / folder})
    return calls


@pytest.mark.skipif(not PIPELINES.is_dir(), reason="the pipelines are not here")
@pytest.mark.parametrize("name", some(["dit", "pixart_sigma", "flux_dev", "wan21"], "flux_dev", "wan21"))
def test_recorded_calls_of_a_pipelines_network(name):
    """Nothing is given by hand but the latents' size and the text's length, which the pipeline decides."""
    calls = recorded(name)
    given: dict[str, Any] = {"size": calls[0]["x"].shape[1:-1]}
    if isinstance(calls[0]["cond"], dict):
        given["text_tokens"] = calls[0]["cond"]["text"].shape[1]
    found = recognise(str(calls[0]["folder"]), **given)
    params, errors = load_foreign(calls[0]["folder"], found), []
    with jax.default_matmul_precision("highest"):
        network = jax.jit(lambda *inputs: forward(found.model, *inputs))
        for call in calls:
            output = np.asarray(network(params, call["x"], call["t"], call["cond"]))
            errors.append(np.abs(output - call["output"]).max() / np.abs(call["output"]).max())
    print(f"{name}: " + " ".join(f"{error:.1e}" for error in errors))
    assert max(errors) <= TOLERANCE


# ---- folders that say the same otherwise -----------------------------------------------------------------------------


def facts(case: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """config.json and tensors of a case of tests/golden/make_settings.py."""
    with np.load(GOLDEN) as file:
        said = json.loads(str(file["facts"]))[case]
    return dict(said["config"]), draw_tensors(case, said["shapes"])


def find(folder: Path, case: str) -> Any:
    kind, _, size = CASES[case]
    return CHECKPOINTS[kind].find(folder, size=size, **({} if kind == "dit" else {"text_tokens": 3}))


def write(folder: Path, config: dict[str, Any], files: dict[str, dict[str, np.ndarray]], index: str = "") -> None:
    """A folder with config.json, files by name, and an index of them."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    for name, tensors in files.items():
        save_file(tensors, folder / name)
    if index:
        place = {key: name for name, tensors in files.items() for key in tensors}
        (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": place}))


def parts(tensors: dict[str, np.ndarray], variant: str = "") -> dict[str, dict[str, np.ndarray]]:
    """Two files, every other tensor in each."""
    names = sorted(tensors)
    shard = lambda i: f"{WEIGHTS}{variant}-0000{i + 1}-of-00002.safetensors"  # noqa: E731
    return {shard(i): {name: tensors[name] for name in names[i::2]} for i in range(2)}


PLAIN = f"{WEIGHTS}.safetensors"
# what becomes of the files of a folder: tensors -> (files by name, name of the index)
FILES = {
    "a variant": lambda t: ({f"{WEIGHTS}.fp16.safetensors": t}, ""),
    "a variant beside it": lambda t: ({PLAIN: t, f"{WEIGHTS}.fp16.safetensors": {n: 2 * a for n, a in t.items()}}, ""),
    "two files": lambda t: (parts(t), f"{WEIGHTS}.safetensors.index.json"),
    "two files of a variant": lambda t: (parts(t, ".fp16"), f"{WEIGHTS}.safetensors.index.fp16.json"),
    "two files of a variant beside it": lambda t: (
        {PLAIN: t} | parts({n: 2 * a for n, a in t.items()}, ".bf16"),
        "",
    ),
    "behind a prefix": lambda t: ({PLAIN: {f"model.diffusion_model.{n}": a for n, a in t.items()}}, ""),
}


@pytest.mark.parametrize("files", FILES)
def test_files_of_a_folder(tmp_path, files):
    case = "flux as it is"
    config, tensors = facts(case)
    write(tmp_path / "plain", config, {PLAIN: tensors})
    names, index = FILES[files](tensors)
    write(tmp_path / "other", config, names, index)
    known, found = find(tmp_path / "plain", case), find(tmp_path / "other", case)
    assert settings_of(found.model) == settings_of(known.model)
    params = [load_foreign(tmp_path / folder, of) for folder, of in (("plain", known), ("other", found))]
    jax.tree.map(np.testing.assert_array_equal, *params)


def test_two_variants_are_not_chosen_from(tmp_path):
    config, tensors = facts("dit as it is")
    names = [f"{WEIGHTS}.{variant}.safetensors" for variant in ("bf16", "fp16")]
    write(tmp_path / "both", config, dict.fromkeys(names, tensors))
    with pytest.raises(ValueError, match=rf"expected one .safetensors file.*; found {names[0]}, {names[1]}"):
        find(tmp_path / "both", "dit as it is")


OLD = "Transformer2DModel"  # which held DiT and PixArt before they had classes of their own
# (case, what config.json says otherwise; ... leaves the key out)
SAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "dit, unknown keys": ("dit as it is", {"_name_or_path": "here", "brand_new": {"x": 1}, "_diffusers_version": 3}),
    "dit, the old class": ("dit as it is", {"_class_name": OLD, "caption_channels": None, "cross_attention_dim": None}),
    "dit, no flags": ("dit as it is", {"attention_bias": None, "norm_elementwise_affine": None, "dropout": ...}),
    "dit, defaults left out": ("dit as it is", {"activation_fn": ..., "norm_eps": ..., "norm_type": ...}),
    "dit, heads by their width": ("dit as it is", {"num_attention_heads": ...}),
    "dit, width of a head left out": ("dit as it is", {"attention_head_dim": ...}),
    "pixart, the old class": ("pixart as it is", {"_class_name": OLD}),
    "pixart, nulls": ("pixart as it is", {"use_additional_conditions": None, "interpolation_scale": None}),
    "pixart, heads by their width": ("pixart as it is", {"num_attention_heads": ..., "num_layers": ...}),
    "pixart conditions, by the tensors": ("pixart conditions", {"use_additional_conditions": ...}),
    "wan, nulls": ("wan as it is", {"image_dim": None, "added_kv_proj_dim": None, "pos_embed_seq_len": None}),
    "wan, defaults left out": ("wan as it is", {"eps": ..., "freq_dim": ..., "qk_norm": ..., "patch_size": ...}),
    "wan, heads by their width": ("wan as it is", {"num_attention_heads": ...}),
    "flux, guidance by the tensors": ("flux as it is", {"guidance_embeds": ..., "out_channels": None}),
    "flux without guidance, left out": ("flux without guidance", {"guidance_embeds": ...}),
    "flux without guidance, null": ("flux without guidance", {"guidance_embeds": None, "patch_size": ...}),
}


@pytest.mark.parametrize("said", SAYS)
def test_what_config_json_says_otherwise(tmp_path, said):
    case, changes = SAYS[said]
    config, tensors = facts(case)
    write(tmp_path / "plain", config, {PLAIN: tensors})
    changed = {key: value for key, value in (config | changes).items() if value is not ...}
    write(tmp_path / "other", changed, {PLAIN: tensors})
    known, found = find(tmp_path / "plain", case), recognise(str(tmp_path / "other"), **given(case))
    assert found.kind == CASES[case][0]
    assert settings_of(found.model) == settings_of(known.model)
    assert found.table == known.table


def given(case: str) -> dict[str, Any]:
    kind, _, size = CASES[case]
    return {"size": size} | ({} if kind == "dit" else {"text_tokens": 3})


# ---- keys whose defaults are the class's -----------------------------------------------------------------------------

# case -> (keys left out, what they stand for in diffusers 0.42.1)
CLASS_DEFAULTS = {
    "dit as it is": ({"sample_size"}, {"base_size": 16, "size": (32, 32)}),
    "pixart as it is": (
        {"sample_size", "interpolation_scale"},
        {"base_size": 64, "interpolation_scale": 2, "size": (128, 128)},
    ),
    "wan as it is": ({"rope_max_seq_len"}, {"max_positions": 1024}),
}


@pytest.mark.parametrize("case", CLASS_DEFAULTS)
def test_a_key_that_is_left_out_is_the_classs_default(tmp_path, case):
    keys, wanted = CLASS_DEFAULTS[case]
    config, tensors = facts(case)
    write(tmp_path / "x", {key: value for key, value in config.items() if key not in keys}, {PLAIN: tensors})
    more = {"size": CASES[case][2]} if case.startswith("wan") else {}
    more |= {} if case.startswith("dit") else {"text_tokens": 3}
    settings = settings_of(CHECKPOINTS[CASES[case][0]].find(tmp_path / "x", **more).model)
    assert {key: settings[key] for key in wanted} == wanted


def test_heads_by_the_width_that_the_class_has(tmp_path):
    """A file that says neither the number of heads nor the width of one has those of 72 features."""
    width = 216
    tensors = {
        name: np.zeros([width if n == 16 else 6 * width if n == 96 else 4 * width if n == 64 else n for n in a.shape])
        for name, a in facts("dit as it is")[1].items()
    }
    config = {"_class_name": "DiTTransformer2DModel", "patch_size": 2}
    write(tmp_path / "x", config, {PLAIN: {n: a.astype(np.float32) for n, a in tensors.items()}})
    assert find(tmp_path / "x", "dit as it is").geometry["heads"] == 3
