"""FLUX.2 against diffusers' Flux2Transformer2DModel, in both published layouts of its weights.

The golden files (tests/golden/make_flux2.py) hold two tiny models, every layer random: "dev" with a guidance embedding,
under the names of diffusers and of black-forest-labs/flux2, and "klein" without one, with every setting of config.json
away from its default; and what diffusers computed. Errors are printed (pytest -rP): largest difference over the largest
output.
"""

# pyright: reportMissingImports=false

import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from difax.build import build_setup
from difax.checkpoints import recognise
from difax.config import load_config, override
from difax.configs import flux2_klein, flux2_tiny
from difax.core.process import flux2_shift
from difax.core.shapes import trunk_spec
from difax.core.trunk import forward
from difax.models.flux2 import VARIANTS, flux2, token_positions
from difax.models.flux2_checkpoint import DIFFUSERS, LAYOUTS, load_flux2
from tests.families import some

GOLDEN = Path(__file__).parent / "golden"
PIPELINES = Path(__file__).parents[2] / "shared" / "pipelines"
TOLERANCE = 2e-5  # measured 9e-6, at a guidance of 7
SIZE = (4, 6)
CONFIGS: dict[str, dict[str, Any]] = {
    "dev": {
        "patch_size": 1,
        "in_channels": 8,
        "out_channels": None,
        "num_layers": 2,
        "num_single_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 12,
        "timestep_guidance_channels": 256,
        "mlp_ratio": 3.0,
        "axes_dims_rope": [2, 4, 4, 6],
        "rope_theta": 2000,
        "eps": 1e-6,
        "guidance_embeds": True,
    },
    "klein": {
        "num_layers": 1,
        "num_single_layers": 2,
        "axes_dims_rope": [4, 2, 4, 6],
        "guidance_embeds": False,
        "mlp_ratio": 2.5,
        "rope_theta": 100,
        "eps": 1e-2,
        "timestep_guidance_channels": 32,
    },
}
TINY: dict[str, Any] = dict(
    double_depth=1,
    single_depth=1,
    width=16,
    heads=2,
    ffn=24,
    text_width=5,
    guidance_embedding=True,
    size=(2, 3),
    channels=4,
    text_tokens=3,
    axes_dim=(2, 2, 2, 2),
)


def write(folder: Path, case: str = "dev", edit: Any = None, **changes: Any) -> Path:
    """A folder as diffusers writes it; ... takes a key out of its config.json."""
    tensors = load_file(GOLDEN / f"flux2_{case}_diffusers.safetensors")
    if edit is not None:
        edit(tensors)
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
    config = {"_class_name": "Flux2Transformer2DModel", **CONFIGS[case], **changes}
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))
    return folder


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """case -> (model, params, network), from a folder with its config.json."""

    @functools.cache
    def load(case: str) -> Any:
        folder = write(tmp_path_factory.mktemp(case), case)
        model, params = load_flux2(folder, size=SIZE, param_dtype="float32")
        return model, params, jax.jit(functools.partial(forward, model))

    return load


def golden(case: str) -> dict[str, np.ndarray]:
    """x and outputs [B, h, w, C], t, text, and of dev the guidance."""
    run = load_file(GOLDEN / "flux2_run.safetensors")
    found = {name.removeprefix(f"{case}/"): a for name, a in run.items() if name.startswith(f"{case}/")}
    return found | {k: found[k].transpose(0, 2, 3, 1) for k in ("x", "output", "untold") if k in found}


def answer(network: Any, params: Any, run: dict[str, Any]) -> np.ndarray:
    cond = {name: run[name] for name in ("text", "guidance") if name in run}
    with jax.default_matmul_precision("highest"):
        return np.asarray(network(params, run["x"], 1000 * run["t"], cond))


def errors(output: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Per sample: largest difference from the reference, over the reference's largest output."""
    return np.abs(output - reference).max(axis=(1, 2, 3)) / np.abs(reference).max()


# ---- parity ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CONFIGS)
def test_matches_diffusers(loaded, case):
    _, params, network = loaded(case)
    run = golden(case)
    found = errors(answer(network, params, run), run["output"])
    for t, guidance, error in zip(run["t"], run.get("guidance", [None] * 4), found, strict=True):
        print(f"{case}: t={t:<4.2f} guidance={guidance} error {error:.1e}")
    assert found.max() <= TOLERANCE


def test_an_embedding_that_is_ignored_changes_nothing(tmp_path):
    """As klein's pipeline asks, whatever the weights have: the same as diffusers without being told the guidance."""
    model, params = load_flux2(write(tmp_path), size=SIZE, param_dtype="float32", ignores_guidance=True)
    assert "guidance" not in model.cond and "guidance1" in params["ends"]
    run = golden("dev")
    run.pop("guidance")
    assert errors(answer(jax.jit(functools.partial(forward, model)), params, run), run["untold"]).max() <= TOLERANCE
    assert errors(run["output"], run["untold"]).max() > 1e-2


def test_both_layouts_hold_the_same_parameters():
    """The original's file is turned into diffusers' state dict by diffusers' own converter (make_flux2.py)."""
    files = [GOLDEN / f"flux2_dev_{layout}.safetensors" for layout in LAYOUTS]
    assert not set(load_file(files[0])) & set(load_file(files[1]))
    one, other = (load_flux2(file, axes_dim=(2, 4, 4, 6), size=SIZE) for file in files)
    assert one[0].stages[0].block.config == other[0].stages[0].block.config
    jax.tree.map(np.testing.assert_array_equal, one[1], other[1])
    assert [recognise(str(file), axes_dim=(2, 4, 4, 6)).kind for file in files] == ["flux2"] * 2


def _swap_halves(name):
    def edit(params):
        kernel = np.roll(params["ends"][name]["kernel"], params["ends"][name]["kernel"].shape[-1] // 2, axis=-1)
        return {**params, "ends": {**params["ends"], name: {"kernel": kernel}}}

    return edit


def _swap(stage, *names):
    def edit(params):
        part = params[stage]
        return {**params, stage: {**part, names[0]: part[names[1]], names[1]: part[names[0]]}}

    return edit


def _swap_gates(params):
    """Of the single block's MLP: the gate for what it gates."""
    kernel = params["single"]["linear1"]["kernel"]
    qkv, a, b = np.split(kernel, (96, 192), axis=-1)
    return {**params, "single": {**params["single"], "linear1": {"kernel": np.concatenate([qkv, b, a], -1)}}}


# a change of the weights or of the inputs that a wrong implementation would amount to
WRONG: dict[str, Any] = {
    "scale and shift of the final layer swapped": (_swap_halves("ada"), {}),
    "attention's and MLP's modulation swapped": (_swap_halves("mod_img"), {}),
    "modulations of the streams swapped": (_swap("ends", "mod_img", "mod_txt"), {}),
    "text and image streams swapped": (_swap("double", "img", "txt"), {}),
    "the MLP's halves swapped": (_swap_gates, {}),
    "guidance without its factor": (None, {"guidance": 1e-3}),
    "time without its factor": (None, {"t": 1e-3}),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_numerics_fail(loaded, case):
    """The comparison can fail: each error is far above the tolerance."""
    edit, scaled = WRONG[case]
    _, params, network = loaded("dev")
    run = golden("dev")
    run |= {name: factor * run[name] for name, factor in scaled.items()}
    error = errors(answer(network, edit(params) if edit else params, run), run["output"]).max()
    print(f"{case}: error {error:.1e}")
    assert error > 1e-2


# what would be computed if a setting of config.json were not read
OTHERWISE: dict[str, dict[str, Any]] = {
    "sections": {"axes_dim": (2, 4, 4, 6)},
    "base": {"theta": 2000.0},
    "eps": {"eps": 1e-6},
}


@pytest.mark.parametrize("case", some(OTHERWISE, "sections"))
def test_without_a_setting_it_is_another_function(tmp_path, case):
    model, params = load_flux2(write(tmp_path, "klein"), size=SIZE, param_dtype="float32", **OTHERWISE[case])
    run = golden("klein")
    assert errors(answer(jax.jit(functools.partial(forward, model)), params, run), run["output"]).max() > 1e-3


def test_positions_have_four_axes():
    """(reference, row, column, place in the text), as the pipeline numbers them."""
    expected = [[0, 0, 0, i] for i in range(3)] + [[0, i, j, 0] for i in range(2) for j in range(4)]
    np.testing.assert_array_equal(token_positions(3, 2, 4), expected)


# ---- checkpoints -----------------------------------------------------------------------------------------------


def test_geometry_comes_from_the_tensors(loaded):
    model, params, _ = loaded("klein")
    c = model.stages[0].block.config
    assert [(s.name, s.depth, s.branches) for s in model.stages] == [
        ("double", 1, ("attn", "mlp")),
        ("single", 2, ("attn_mlp",)),
    ]
    assert (c.width, c.heads, c.ffn, c.channels, c.text_width, c.freq_dim) == (32, 2, 80, 8, 12, 32)
    assert (c.axes_dim, c.theta, c.eps, c.guidance_embedding) == ((4, 2, 4, 6), 100.0, 1e-2, False)
    assert model.input_shape == (4, 6, 8) and (model.classes, model.learn_sigma) == (0, False)
    assert set(model.cond) == {"text", "null_text"} and set(loaded("dev")[0].cond) == {"text", "null_text", "guidance"}
    assert "bias" not in {path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(params)}


def test_keys_that_are_missing_are_the_defaults(tmp_path):
    """Those of the class, and what its config.json does not know is read over."""
    missing = dict.fromkeys(("rope_theta", "eps", "mlp_ratio", "guidance_embeds", "timestep_guidance_channels"), ...)
    model, _ = load_flux2(write(tmp_path, **missing, _name_or_path="x", pooled_projection_dim=768))
    c = model.stages[0].block.config
    assert (c.theta, c.eps, c.ffn, c.guidance_embedding, c.freq_dim) == (2000.0, 1e-6, 96, True, 256)


def _put(name: str, *shape: int) -> Any:
    return lambda tensors: tensors.__setitem__(name, np.zeros(shape, np.float16))


# edit of the tensors, of config.json, words of the message
REFUSALS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "patches": (None, {"patch_size": 2}, "patch_size=2; allowed: 1 .latents are cut into 2 x 2"),
    "sections": (None, {"axes_dims_rope": [2, 4, 4, 4]}, "axes_dims_rope=.*; allowed: four even widths .* 16"),
    "three sections": (None, {"axes_dims_rope": [2, 6, 8]}, "axes_dims_rope=.*; allowed: a list of 4"),
    "no sections": (None, {"axes_dims_rope": ...}, "rotary sections of a head width of 16 .*give axes_dim="),
    "ratio": (None, {"mlp_ratio": 4.0}, "mlp_ratio=4.0 of a width of 32; allowed: 3, as"),
    "guidance": (None, {"guidance_embeds": False}, "guidance_embeds=False; allowed: True, as the checkpoint's tensors"),
    "layers": (None, {"num_single_layers": 48}, "num_single_layers=48; allowed: 1, as the checkpoint's tensors say"),
    "eps": (None, {"eps": 0}, "eps=0; allowed: a number, > 0"),
    "another class": (None, {"_class_name": "FluxTransformer2DModel"}, "_class_name='FluxTransformer2DModel'; allowed"),
    "missing": (
        lambda t: t.pop("transformer_blocks.1.ff_context.linear_in.weight"),
        {},
        "'transformer_blocks.1.ff_context.linear_in.weight' .for double/txt/fc1/kernel. is missing",
    ),
    "surplus": (_put("proj_out.bias", 8), {}, "surplus tensor 'proj_out.bias'"),
    "another output": (_put("proj_out.weight", 16, 32), {}, "takes 8 features a token and emits 16"),
    "wrong shape": (_put("single_stream_modulation.linear.weight", 95, 32), {}, r"wrong shape \(95, 32\)"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refuses(tmp_path, case):
    edit, changes, words = REFUSALS[case]
    with pytest.raises(ValueError, match=words):
        load_flux2(write(tmp_path, edit=edit, **changes))


def test_refuses_arguments():
    file = GOLDEN / "flux2_dev_original.safetensors"
    for arguments, words in (
        ({"head": 2}, "unknown argument 'head'; nearest: 'heads'"),
        ({"layout": "diffuser"}, "unknown layout 'diffuser'; .*nearest: 'diffusers'"),
        ({"layout": "diffusers"}, "'x_embedder.weight' .*missing"),
        ({"size": (0, 8)}, "size=0x8; allowed: 1 or more"),
        ({"axes_dim": (4, 4, 8)}, r"axes_dim=\(4, 4, 8\); allowed: four even widths"),
        ({"theta": 0.0}, "theta=0.0; allowed: > 0"),
    ):
        with pytest.raises(ValueError, match=words):
            load_flux2(file, **{"axes_dim": (2, 4, 4, 6), **arguments})
    for name in ("double_depth", "single_depth", "width", "heads", "ffn", "text_width", "channels", "text_tokens"):
        with pytest.raises(ValueError, match=f"flux2: {name}=0; allowed: 1 or more"):
            flux2(**TINY | {name: 0})
    with pytest.raises(ValueError, match="unknown FLUX.2 variant 'klein'; allowed: klein-4B, klein-9B, dev"):
        flux2("klein")
    with pytest.raises(ValueError, match="flux2: ffn missing; give it, or a variant"):
        flux2(**TINY | {"ffn": None})


# ---- the published models --------------------------------------------------------------------------------------

# as diffusers counts the parameters of its class at these sizes
PARAMETERS = {"klein-4B": 3_875_544_576, "klein-9B": 9_078_581_248, "dev": 32_223_281_152}


@pytest.mark.parametrize("variant", some(VARIANTS, "klein-4B", "dev"))
def test_geometry_of_the_published_models(variant):
    model = flux2(variant)
    spec = jax.eval_shape(model.init, jax.random.key(0))
    total = sum(a.size for a in jax.tree.leaves(spec))
    print(f"FLUX.2 {variant}: {total / 1e9:.3f} billion parameters")
    assert total == PARAMETERS[variant] and model.name == f"flux2-{variant}"
    paths = {jax.tree_util.keystr(p, simple=True, separator="/") for p, _ in jax.tree_util.tree_leaves_with_path(spec)}
    for table in LAYOUTS.values():
        assert {p for p in table if variant == "dev" or not p.startswith("ends/guidance")} == paths
    assert model.input_shape == (64, 64, 128) and model.cond["text"].shape[0] == 512
    assert ("guidance" in model.cond) == (variant == "dev") and set(DIFFUSERS) >= paths


# (tokens, steps) -> mu, as diffusers' Flux2KleinPipeline has it (compute_empirical_mu)
MU = {(64, 64, 4): 2.291179894115571, (64, 64, 50): 2.0233511571292637, (70, 70, 4): 1.28608966}
MU |= {(4, 6, 4): 1.9458947254741559}


def test_the_shift_follows_from_the_tokens_and_the_steps():
    for (rows, columns, steps), mu in MU.items():
        assert np.log(flux2_shift((rows, columns, 128), steps)) == pytest.approx(mu, rel=1e-12)
    narrow = [("model.variant", None), *((f"model.{k}", v) for k, v in TINY.items() if k != "size")]
    for arg, steps, scale in (("klein-4B", 4, 1.0), ("base-9B", 50, 4.0)):
        setup = build_setup(override(load_config(f"flux2_klein:{arg}"), narrow))
        shift, s = np.exp(MU[64, 64, steps]), np.linspace(1, 1 / steps, steps)
        # in float32, as diffusers has them
        np.testing.assert_allclose(setup.times, [*(shift * s / (1 + (shift - 1) * s)), 0.0], atol=1.2e-7)
        assert load_config(f"flux2_klein:{arg}")["scale"] == scale
    for module in (flux2_klein, flux2_tiny):
        with pytest.raises(ValueError, match="config flux2_.*:klein-3B; allowed"):
            module.get_config("klein-3B")


@pytest.mark.parametrize("dtype", some(["float32", "bfloat16"], "bfloat16"))
def test_what_the_head_reads_and_what_blocks_hold(dtype):
    model = flux2(**TINY, dtype=dtype)
    params = jax.eval_shape(model.init, jax.random.key(0))
    x = jax.ShapeDtypeStruct((2, *model.input_shape), jnp.float32)
    cond = jax.tree.map(lambda s: jax.ShapeDtypeStruct((2, *s.shape), s.dtype), model.cond)
    spec = trunk_spec(model, params, x, cond)
    assert spec.hidden.shape == (2, 6, 16) and str(spec.hidden.dtype) == dtype
    for stage, branch in (("double", "attn"), ("double", "mlp"), ("single", "attn_mlp")):
        assert {a.shape for a in jax.tree.leaves(spec.update[stage][branch])} == {(2, 6, 16), (2, 3, 16)}


# ---- with more around ------------------------------------------------------------------------------------------


def klein_pipelines() -> list[Path]:
    files = PIPELINES.glob("*/model_index.json")
    return sorted(f.parent for f in files if json.loads(f.read_text())["_class_name"] == "Flux2KleinPipeline")


@pytest.mark.skipif(not klein_pipelines(), reason="there is no tiny pipeline of this model")
def test_recorded_calls_of_pipelines():
    """Opened from their folders."""
    for folder in klein_pipelines():
        with np.load(folder / "run.npz") as file:
            arrays = {name: file[name] for name in file.files}
        said = json.loads((folder / "run.json").read_text())
        arrays |= {name: arrays[of] for name, of in said["same"].items()}
        rows, columns = (int(arrays["call/0/in/img_ids"][..., axis].max()) + 1 for axis in (1, 2))
        model, params = load_flux2(folder / "transformer", size=(rows, columns), ignores_guidance=True)
        network = jax.jit(functools.partial(forward, model))
        for i in range(said["denoiser_calls"]):
            call = {name: a for name, a in arrays.items() if name.startswith(f"call/{i}/")}
            x, output = (call[f"call/{i}/{key}"].reshape(-1, *model.input_shape) for key in ("in/hidden_states", "out"))
            run = {"x": x, "t": call[f"call/{i}/in/timestep"], "text": call[f"call/{i}/in/encoder_hidden_states"]}
            (error,) = errors(answer(network, params, run), output)
            print(f"{folder.name}, call {i}: error {error:.1e}")
            assert error <= 3e-5


def test_matches_diffusers_live(tmp_path):
    """A model of another geometry than the golden ones, saved by diffusers itself in shards with its config.json."""
    pytest.importorskip("torch", reason="needs the parity extra (torch, diffusers)")
    diffusers = pytest.importorskip("diffusers", reason="needs the parity extra (torch, diffusers)")
    from tests.golden import make_flux, make_flux2

    reference = diffusers.Flux2Transformer2DModel(
        in_channels=16,
        num_layers=3,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=20,
        axes_dims_rope=(4, 4, 4, 4),
    )
    reference = reference.eval().requires_grad_(False)
    make_flux.randomise(reference, seed=2)
    run = make_flux2.run(reference, (5, 3), 7, (0.9, 0.5, 0.1), (2.0, 5.0, 4.0), seed=3)
    state = {name: a.clone() for name, a in reference.state_dict().items()}
    reference.save_pretrained(tmp_path / "diffusers", max_shard_size="200KB")
    assert len(list((tmp_path / "diffusers").glob("*.safetensors"))) > 1
    original = make_flux2.to_original(state, 3, 2)
    make_flux2.check_conversion(original, state)
    save_file({name: a.numpy() for name, a in original.items()}, tmp_path / "original.safetensors")
    model, params = load_flux2(tmp_path / "diffusers", size=(5, 3))
    found = {name: np.asarray(a) for name, a in run.items()}
    found |= {name: found[name].transpose(0, 2, 3, 1) for name in ("x", "output")}
    error = errors(answer(jax.jit(functools.partial(forward, model)), params, found), found["output"])
    print(f"live: {error}")
    assert error.max() <= TOLERANCE
    _, same = load_flux2(tmp_path / "original.safetensors", axes_dim=(4, 4, 4, 4), size=(5, 3))
    jax.tree.map(np.testing.assert_array_equal, params, same)
