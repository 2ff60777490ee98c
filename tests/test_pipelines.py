"""Published folders from a prompt to a picture or a film, against what diffusers recorded of the same run."""

import functools
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

import difax
from difax.media.images import to_uint8
from difax.program import draw
from tests.families import some

GOLDEN = pathlib.Path(__file__).resolve().parent / "golden"
SHARED = pathlib.Path(__file__).resolve().parent.parent.parent / "shared" / "pipelines"
PIXART, WAN, WAN22, KLEIN = (GOLDEN / f"pipeline_{name}" for name in ("pixart", "wan", "wan22", "klein"))

pytest.importorskip("tokenizers")
safetensors = pytest.importorskip("safetensors.numpy")


def opened(folder: pathlib.Path, **more):
    told = json.loads((folder / "run.json").read_text())
    names = {"height": "height", "width": "width", "num_frames": "frames", "max_sequence_length": "tokens"}
    asked = {f"pipeline.{key}": told[name] for name, key in names.items() if name in told}
    scales = {"guidance_scale": "scale", "guidance_scale_2": "pipeline.scale_2"}
    asked |= {key: told[name] for name, key in scales.items() if name in told}
    return difax.load(folder, steps=told["steps"], **asked, **{"pipeline.negative": told["negative"], **more}), told


def path_of(run, cond, latents, setup=None, **more) -> tuple[np.ndarray, np.ndarray]:
    """x at every evaluation and behind the last, [n, E + 1, ...], and what the run gives."""
    setup = run.setup if setup is None else setup
    seen: dict[tuple[int, int], np.ndarray] = {}

    def watch(first, i, x, x0):
        seen.update({(first + j, i): np.array(a) for j, a in enumerate(x)})

    drawn = draw(setup, run.prepared, cond, 0, latents=latents, batch=1, watch=watch, **more)
    jax.effects_barrier()
    n, e = len(drawn.samples), len(setup.rows.i)
    path = np.stack([np.stack([seen[j, i] for i in range(e)]) for j in range(n)])
    return np.concatenate([path, drawn.samples[:, None]], 1), drawn.samples


def difference(found: np.ndarray, wanted: np.ndarray) -> float:
    """The largest, of the array's deviation."""
    return float(np.abs(found - wanted).max() / wanted.std())


@pytest.mark.parametrize("folder", some([PIXART, WAN, WAN22, KLEIN], PIXART, KLEIN), ids=lambda p: p.name)
def test_a_prompt_becomes_the_picture_that_diffusers_makes(folder):
    run, told = opened(folder)
    assert run.pipeline is not None
    golden = np.load(folder / "run.npz")
    cond = run.encoded(told["prompts"])
    latents = run.channels_last(golden["latents0"])
    path, samples = path_of(run, cond, latents)
    wanted = run.channels_last(golden["steps"], 2)
    for step in range(told["steps"]):
        assert difference(path[:, step + 1], wanted[:, step]) < 1e-4, step
    assert run.pipeline is not None
    images = run.pipeline.decode(samples)
    # this decoder makes 30 times as much of the latents' rounding: it is asked for what it makes of the recorded ones
    shown = images if folder != WAN22 else run.pipeline.decode(wanted[:, -1])
    np.testing.assert_allclose((shown + 1) / 2, golden["output"], atol=2e-4)
    result = run.sample(prompt=told["prompts"], latents=golden["latents0"])
    np.testing.assert_allclose(result.images, images, atol=1e-5)
    assert {"encode_seconds", "decode_seconds"} <= result.table.keys()


# ---- changes of a folder that change nothing ----------------------------------------------------------------


def edit(file: pathlib.Path, change) -> None:
    """A JSON file with what a function makes of it."""
    found = json.loads(file.read_text())
    file.write_text(json.dumps(change(found) or found, indent=1))


def configs(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted([*folder.glob("*/config.json"), *folder.glob("scheduler/scheduler_config.json")])


def weights(folder: pathlib.Path, components: str = "*") -> list[pathlib.Path]:
    return sorted(folder.glob(f"{components}/*.safetensors"))


def renamed(components: str, name):
    def change(folder):
        assert (files := weights(folder, components))
        for file in files:
            arrays = safetensors.load_file(file)
            found = {new: a for key, a in arrays.items() for new in name(key)}
            assert found.keys() != arrays.keys()
            safetensors.save_file(found, file)

    return change


def in_two(folder: pathlib.Path) -> None:
    """Every component in two files and an index."""
    for file in weights(folder):
        arrays, names = safetensors.load_file(file), {}
        for part, keys in enumerate((sorted(arrays)[::2], sorted(arrays)[1::2])):
            names |= dict.fromkeys(keys, f"{file.stem}-0000{part + 1}-of-00002.safetensors")
            safetensors.save_file({k: arrays[k] for k in keys}, file.parent / names[keys[0]])
        index = {"metadata": {"total_size": sum(a.nbytes for a in arrays.values())}, "weight_map": names}
        (file.parent / f"{file.name}.index.json").write_text(json.dumps(index))
        file.unlink()


def variants(folder: pathlib.Path) -> None:
    """The files of the variant fp16, by whose name diffusers has it."""
    for file in weights(folder):
        file.rename(file.with_suffix(".fp16.safetensors"))


def variants_in_two(folder: pathlib.Path) -> None:
    in_two(folder)
    for index in folder.glob("*/*.index.json"):
        edit(index, lambda found: {**found, "weight_map": {k: fp16(v) for k, v in found["weight_map"].items()}})
        index.rename(index.with_name(index.name.replace(".index.json", ".index.fp16.json")))
    for file in weights(folder):
        file.rename(file.with_name(fp16(file.name)))


def fp16(name: str) -> str:
    return name.replace("-0000", ".fp16-0000")


def other_tokenizer(folder: pathlib.Path) -> None:
    for file in folder.glob("tokenizer*/tokenizer_config.json"):
        edit(file, lambda found: {**found, "tokenizer_class": "LlamaTokenizerFast"})
    index = lambda found: {  # noqa: E731
        k: ["transformers", "LlamaTokenizerFast"] if k.startswith("tokenizer") else v for k, v in found.items()
    }
    edit(folder / "model_index.json", index)


def unknown_keys(folder: pathlib.Path) -> None:
    for file in folder.glob("*/config.json"):
        edit(file, lambda found: {**found, "_name_or_path": "x/y", "of_another_version": [1], "older": {"key": None}})
    edit(folder / "model_index.json", lambda found: {**found, "of_another_version": None, "safety": [None, None]})


# class -> keys of its file that may be left out where they have the class's default
DEFAULTS = {
    "PixArtTransformer2DModel": "activation_fn attention_bias attention_type dropout in_channels interpolation_scale "
    "norm_elementwise_affine norm_eps norm_num_groups norm_type num_embeds_ada_norm out_channels patch_size "
    "upcast_attention",
    "WanTransformer3DModel": "added_kv_proj_dim cross_attn_norm eps image_dim patch_size pos_embed_seq_len qk_norm "
    "rope_max_seq_len",
    "Flux2Transformer2DModel": "eps mlp_ratio out_channels patch_size rope_theta",
    "AutoencoderKL": "act_fn force_upcast in_channels latent_channels latents_mean latents_std layers_per_block "
    "mid_block_add_attention out_channels sample_size shift_factor use_post_quant_conv use_quant_conv",
    "AutoencoderKLWan": "attn_scales decoder_base_dim dropout in_channels is_residual out_channels patch_size "
    "scale_factor_spatial scale_factor_temporal temperal_downsample",
    "AutoencoderKLFlux2": "act_fn batch_norm_eps batch_norm_momentum decoder_block_out_channels in_channels "
    "mid_block_add_attention out_channels patch_size sample_size use_post_quant_conv use_quant_conv",
    "DPMSolverMultistepScheduler": "algorithm_type dynamic_thresholding_ratio euler_at_final final_sigmas_type "
    "beta_schedule beta_start beta_end flow_shift lower_order_final num_train_timesteps prediction_type solver_order "
    "solver_type steps_offset thresholding timestep_spacing trained_betas use_karras_sigmas variance_type",
    "UniPCMultistepScheduler": "beta_end beta_schedule beta_start disable_corrector final_sigmas_type "
    "lower_order_final num_train_timesteps predict_x0 solver_order solver_p solver_type steps_offset thresholding "
    "timestep_spacing trained_betas use_karras_sigmas",
    "FlowMatchEulerDiscreteScheduler": "base_image_seq_len base_shift invert_sigmas max_image_seq_len max_shift "
    "num_train_timesteps shift_terminal stochastic_sampling time_shift_type use_beta_sigmas use_karras_sigmas",
    "t5": "classifier_dropout dropout_rate eos_token_id layer_norm_epsilon pad_token_id tie_word_embeddings "
    "relative_attention_max_distance relative_attention_num_buckets transformers_version architectures",
    "umt5": "feed_forward_proj dense_act_fn is_gated_act layer_norm_epsilon relative_attention_max_distance "
    "relative_attention_num_buckets tie_word_embeddings transformers_version architectures",
    "qwen3": "attention_bias hidden_act max_position_embeddings rms_norm_eps sliding_window use_sliding_window "
    "transformers_version architectures layer_types",
}


def defaults_left_out(folder: pathlib.Path) -> None:
    left_out = 0
    for file in configs(folder):
        found = json.loads(file.read_text())
        keys = DEFAULTS[found.get("_class_name") or found["model_type"]].split()
        left_out += len(found.keys() & set(keys))
        edit(file, lambda found, keys=keys: {k: v for k, v in found.items() if k not in keys})
    assert left_out > 20


def absent(folder: pathlib.Path) -> None:
    """Components that it is without named as null, or not at all."""
    null = lambda found: {**found, "image_encoder": [None, None], "feature_extractor": [None, None]}  # noqa: E731
    edit(folder / "model_index.json", null)
    drop = {"transformer_2", "boundary_ratio", "expand_timesteps", "is_distilled", "_diffusers_version"}
    if not (folder / "transformer_2").is_dir():
        edit(folder / "model_index.json", lambda found: {k: v for k, v in found.items() if k not in drop})


def old_class(folder: pathlib.Path) -> None:
    edit(folder / "model_index.json", lambda found: {**found, "transformer": ["diffusers", "Transformer2DModel"]})
    edit(folder / "transformer/config.json", lambda found: {**found, "_class_name": "Transformer2DModel"})


def untied(folder: pathlib.Path) -> None:
    for file in folder.glob("text_encoder*/config.json"):
        edit(file, lambda found: {**found, "tie_word_embeddings": False})


def without(*names: str):
    def change(folder):
        found = [file for name in names for file in folder.glob(name)]
        assert found
        for file in found:
            file.unlink()

    return change


EMBEDDED = "encoder.embed_tokens.weight"
CHANGES = {
    "tie_word_embeddings false": untied,
    "another name of the embedding": renamed("text_encoder", lambda k: [EMBEDDED if k == "shared.weight" else k]),
    "both names of the embedding": renamed(
        "text_encoder", lambda k: ["shared.weight", EMBEDDED] if k == "shared.weight" else [k]
    ),
    "in two files": in_two,
    "fp16 in the names": variants,
    "fp16 in the names of two": variants_in_two,
    "tokenizer's class": other_tokenizer,
    "unknown keys": unknown_keys,
    "defaults left out": defaults_left_out,
    "null components": absent,
    "deprecated class": old_class,
    "text_model. in front": renamed("text_encoder", lambda k: [f"text_model.{k}"]),
    "without model.": renamed("text_encoder", lambda k: [k.removeprefix("model.")]),
    "without tokenizer.json": without("tokenizer*/tokenizer.json"),
    "without spiece.model": without("tokenizer*/spiece.model"),
    "without added tokens": without("tokenizer*/added_tokens.json", "tokenizer*/special_tokens_map.json"),
}
FLUX, SD3, QWEN, SIGMA = (SHARED / name for name in ("flux_dev", "sd3", "qwen_image", "pixart_sigma"))
EVERYWHERE = (
    "in two files", "fp16 in the names", "fp16 in the names of two", "tokenizer's class", "unknown keys",
    "null components",
)  # fmt: skip
T5 = ("tie_word_embeddings false", "another name of the embedding", "both names of the embedding")
CASES = [
    *((folder, change) for folder in (PIXART, WAN, WAN22, KLEIN) for change in (*EVERYWHERE, "defaults left out")),
    *((folder, change) for folder in (PIXART, WAN) for change in T5),
    (PIXART, "deprecated class"),
    (KLEIN, "without model."),
    *((FLUX, change) for change in EVERYWHERE),
    *((folder, change) for folder in (SD3, QWEN, SIGMA) for change in ("in two files", "tokenizer's class")),
    (FLUX, "text_model. in front"),
    *((FLUX, change) for change in ("without tokenizer.json", "without spiece.model")),
    *((folder, "without added tokens") for folder in (FLUX, SIGMA)),
]


@functools.cache
def drawn_of(folder: pathlib.Path) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The conditions that a folder makes of a prompt, and a picture of two steps."""
    told = json.loads((folder / "run.json").read_text())
    size = {f"pipeline.{key}": told.get("call", told)[key] for key in ("height", "width")}
    more = {"pipeline.frames": 5} if "num_frames" in told.get("call", told) else {}
    run = difax.load(folder, steps=2, **size, **more, **{"pipeline.tokens": 64})
    result = run.sample(prompt=["a red fox, over 3 logs!"], seed=1)
    return result.cond, result.images


@pytest.mark.parametrize(
    "case", some(CASES, (PIXART, "defaults left out")), ids=lambda case: f"{case[0].name}: {case[1]}"
)
def test_changes_of_a_folder_that_change_nothing(case, tmp_path):
    folder, change = case
    if not folder.is_dir():
        pytest.skip("needs the recorded pipelines beside the checkout")
    changed = tmp_path / folder.name
    shutil.copytree(folder, changed)
    for path in (changed, *changed.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    CHANGES[change](changed)
    (cond, images), (cond2, images2) = drawn_of(folder), drawn_of(changed)
    for name, array in cond.items():
        np.testing.assert_allclose(cond2[name], array, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(images2, images, atol=1e-5)


# ---- the recorded runs --------------------------------------------------------------------------------------

# folder -> what the recorded call asked for, as the section pipeline has it
CALLS = {"height": "height", "width": "width", "num_frames": "frames", "guidance_scale": "guidance"}
RECORDED = ("dit", "flux_dev", "pixart_sigma", "wan21", "sd3", "qwen_image", "z_image")


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the recorded pipelines beside the checkout")
@pytest.mark.slow
@pytest.mark.parametrize("name", RECORDED)
def test_recorded_runs(name):
    """Token ids equal; embeddings, latents of every step and pictures within 1e-4 of the recorded magnitude."""
    folder = SHARED / name
    said, golden = json.loads((folder / "run.json").read_text()), np.load(folder / "run.npz")
    call, same = said["call"], said.get("same", {})
    array = lambda key: golden[same.get(key, key)]  # noqa: E731
    asked = {f"pipeline.{k}": call[k] for k in ("height", "width") if k in call}
    if "num_frames" in call:
        asked["pipeline.frames"] = call["num_frames"]
    if "negative_prompt" in call:
        asked["pipeline.negative"] = call["negative_prompt"]
    scale = call.get("true_cfg_scale", call.get("guidance_scale"))
    asked["pipeline.guidance" if name == "flux_dev" else "scale"] = scale
    run = difax.load(folder, steps=call["num_inference_steps"], **asked)
    assert run.pipeline is not None
    cond = call["class_labels"] if name == "dit" else run.encoded([call["prompt"]])
    cond = run.conditions(cond)
    n = len(jax.tree.leaves(cond)[0])
    latents = run.channels_last(
        array("latents0" if "latents0" in same or "latents0" in golden else "step/0/sample")[:n]
    )
    path, samples = path_of(run, cond, latents)
    for step in range(said["scheduler_steps"]):
        wanted = run.channels_last(array(f"step/{step}/prev")[:n])
        assert difference(path[:, step + 1], wanted) < 1e-4, step
    images = run.pipeline.decode(samples)
    assert np.abs(to_uint8(images).astype(int) - array("output").astype(int)).max() <= 1
