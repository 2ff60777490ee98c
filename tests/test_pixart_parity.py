"""PixArt-alpha and Sigma against diffusers' PixArtTransformer2DModel.

The golden files (tests/golden/make_pixart.py) hold state dicts that the reference wrote, with every layer random, and
what it computed. Errors are printed (pytest -rP): largest difference over the largest output.
"""

# pyright: reportMissingImports=false

import json
import math
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from difax.accel.solvers import dpmpp_2m
from difax.checkpoints import recognise, settings_of
from difax.core.guidance import cfg, unguided
from difax.core.noise import sample_keys
from difax.core.process import vp_linear
from difax.core.sample import initial_noise, make_rows, make_sampler
from difax.core.shapes import trunk_spec
from difax.core.trunk import forward
from difax.models.layers import sincos_positions
from difax.models.pixart import pixart
from difax.models.pixart_checkpoint import load_pixart
from difax.weights.checkpoint import load_native, save_safetensors
from difax.weights.published import load_foreign
from tests.toys import randomise

GOLDEN = Path(__file__).parent / "golden"
TOLERANCE = 1e-4
# what the golden files themselves do not tell: heads, caption tokens, and the latents that were trained on
UNSTORED: dict[str, dict[str, Any]] = {
    "alpha": {"heads": 2, "text_tokens": 7, "base_size": 64},
    "sigma": {"heads": 2, "text_tokens": 7, "base_size": 8, "interpolation_scale": 3},
}
CASES = [("alpha", (8, 8)), ("alpha", (6, 10)), ("sigma", (16, 16)), ("sigma", (12, 6))]


def network(model, params, x, t, cond) -> np.ndarray:
    """The model's output in float32, or refused for what is not finite."""
    with jax.default_matmul_precision("highest"):
        apply = jax.jit(lambda *args: forward(model, *args))
        output = np.asarray(apply(params, x, t, cond), np.float32)
    assert np.isfinite(output).all()
    return output


def weights(name: str) -> Path:
    return GOLDEN / f"pixart_{name}.safetensors"


def golden(name: str, size: tuple[int, int]) -> dict[str, Any]:
    """A golden run on latents of one size: x [B, H, W, C], t, cond and output [B, H, W, C]."""
    run = load_file(GOLDEN / f"pixart_{name}_run.safetensors")
    x, output = (run[f"{k}_{size[0]}x{size[1]}"].transpose(0, 2, 3, 1) for k in ("x", "output"))
    cond = {k: run[k] for k in ("text", "mask", "resolution", "aspect_ratio") if k in run}
    return {"x": x, "t": run["t"], "cond": cond, "output": output}


def relative_errors(model, params, run) -> np.ndarray:
    """Per sample: largest difference from the reference, over the reference's largest output."""
    output = network(model, params, run["x"], run["t"], run["cond"])
    return np.abs(output - run["output"]).max(axis=(1, 2, 3)) / np.abs(run["output"]).max()


# a tensor's name in diffusers -> of the original projects, by diffusers' scripts/convert_pixart_sigma_to_diffusers.py
ORIGINAL_NAMES = (
    (r"^pos_embed\.proj", "x_embedder.proj"),
    (r"^pos_embed\.pos_embed", "pos_embed"),
    (r"^caption_projection\.linear_", "y_embedder.y_proj.fc"),
    (r"^adaln_single\.emb\.timestep_embedder", "t_embedder"),
    (r"^adaln_single\.emb\.resolution_embedder", "csize_embedder"),
    (r"^adaln_single\.emb\.aspect_ratio_embedder", "ar_embedder"),
    (r"embedder\.linear_1", "embedder.mlp.0"),
    (r"embedder\.linear_2", "embedder.mlp.2"),
    (r"^adaln_single\.linear", "t_block.1"),
    (r"^proj_out", "final_layer.linear"),
    (r"^scale_shift_table", "final_layer.scale_shift_table"),
    (r"^transformer_blocks", "blocks"),
    (r"\.attn1\.to_out\.0", ".attn.proj"),
    (r"\.attn2\.to_out\.0", ".cross_attn.proj"),
    (r"\.attn2\.to_q", ".cross_attn.q_linear"),
    (r"\.ff\.net\.0\.proj", ".mlp.fc1"),
    (r"\.ff\.net\.2", ".mlp.fc2"),
)


def original_tensors(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors under the names of the original projects, queries, keys and values in one."""
    fused = {}
    for name in [n for n in tensors if ".attn1.to_k." in n or ".attn2.to_k." in n]:
        whole = "attn.qkv" if ".attn1." in name else "cross_attn.kv_linear"
        parts = [name.replace("to_k", f"to_{p}") for p in ("qkv" if ".attn1." in name else "kv")]
        moved = re.sub(r"attn\d\.to_k", whole, name)
        fused[moved] = np.concatenate([tensors[part] for part in parts])
    rest = {n: a for n, a in tensors.items() if not re.search(r"attn1\.to_[qkv]\.|attn2\.to_[kv]\.", n)}
    found = {}
    for name, array in (rest | fused).items():
        for pattern, replacement in ORIGINAL_NAMES:
            name = re.sub(pattern, replacement, name)
        found[name] = array
    return found | {"y_embedder.y_embedding": np.zeros((7, 24), np.float32)}


@pytest.mark.parametrize("name", ["alpha", "sigma"])
def test_the_original_names_are_the_same_parameters(tmp_path, name):
    save_file(original_tensors(load_file(weights(name))), tmp_path / "x.safetensors")
    found = recognise(str(tmp_path / "x.safetensors"), size=(8, 8), **UNSTORED[name])
    assert found.kind == "pixart"
    known, params = load_pixart(weights(name), size=(8, 8), **UNSTORED[name])
    assert settings_of(found.model) == settings_of(known)
    jax.tree.map(np.testing.assert_array_equal, params, load_foreign(tmp_path / "x.safetensors", found))


@pytest.mark.parametrize(("name", "size"), CASES)
def test_matches_diffusers(name, size):
    model, params = load_pixart(weights(name), size=size, **UNSTORED[name])
    run = golden(name, size)
    assert set(run["t"]) == {0, 50, 500, 999} and set(run["cond"]["mask"].sum(1)) == {1, 3, 5, 7}
    errors = relative_errors(model, params, run)
    print(f"{name} {size}: " + ", ".join(f"t={t:.0f} {e:.1e}" for t, e in zip(run["t"], errors, strict=True)))
    assert errors.max() <= TOLERANCE


def _unmask(run):
    run["cond"]["mask"] = np.ones_like(run["cond"]["mask"])


def _swap_sides(run):
    run["cond"]["resolution"] = run["cond"]["resolution"][:, ::-1]


def _transpose(run):
    run["x"] = run["x"].swapaxes(1, 2).reshape(run["x"].shape)


WRONG = {
    "mask ignored": ({}, _unmask),
    "height and width swapped": ({}, _swap_sides),
    "positions of the trained size": ({"base_size": 4}, lambda run: None),
    "another interpolation": ({"interpolation_scale": 1}, lambda run: None),
    "columns before rows": ({}, _transpose),
}


@pytest.mark.parametrize("case", WRONG)
def test_another_function_fails(case):
    """The comparison can fail: with one thing done otherwise the error is far above the tolerance."""
    arguments, edit = WRONG[case]
    model, params = load_pixart(weights("alpha"), size=(6, 10), **UNSTORED["alpha"] | arguments)
    run = golden("alpha", (6, 10))
    edit(run)
    errors = relative_errors(model, params, run)
    print(f"{case}: error {errors.max():.1e}")
    assert errors.max() > 1e-2


def test_what_is_masked_does_not_matter():
    model, params = load_pixart(weights("sigma"), size=(12, 6), **UNSTORED["sigma"])
    run = golden("sigma", (12, 6))
    cond = dict(run["cond"])
    cond["text"] = np.where(cond["mask"][..., None] == 1, cond["text"], 100.0).astype(np.float32)
    same = network(model, params, run["x"], run["t"], cond)
    np.testing.assert_array_equal(same, network(model, params, run["x"], run["t"], run["cond"]))


def test_positions_of_the_trained_grid_are_dits():
    np.testing.assert_allclose(sincos_positions(24, 5, 5, 5), sincos_positions(24, 5, 5), atol=1e-6)
    # twice as many patches over the same extent: every second one stands where one stood
    fine = sincos_positions(24, 8, 6, 4).reshape(8, 6, 24)
    coarse = sincos_positions(24, 4, 3, 4).reshape(4, 3, 24)
    np.testing.assert_allclose(fine[::2, ::2], coarse, atol=1e-6)


def test_published_geometries():
    """Parameters of diffusers' model at the published sizes, and what follows from variant and size."""
    published = {("alpha", 128): (611_349_152, 2.0, True, 120), ("sigma", 64): (610_856_096, 1.0, False, 300)}
    for (variant, size), expected in published.items():
        model = pixart(variant, size=size)
        c = model.stages[0].block.config
        spec = jax.eval_shape(model.init, jax.random.key(0))
        count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(spec))
        assert (count, c.interpolation_scale, c.micro_conditioning, c.text_tokens) == expected
        assert (c.base_size, model.learn_sigma, model.classes) == (size // 2, True, 0)
        shapes = {k: (v.shape, str(v.dtype)) for k, v in model.cond.items()}
        tokens = expected[-1]
        caption = {"text": ((tokens, 4096), "float32"), "mask": ((tokens,), "int32")}
        caption |= {f"null_{k}": v for k, v in caption.items()}
        sizes = {"resolution": ((2,), "float32"), "aspect_ratio": ((1,), "float32")}
        assert shapes == caption | (sizes if expected[2] else {})


def tiny(**overrides: Any) -> tuple[Any, Any, Any]:
    """A PixArt of two blocks on 4 x 4 x 3 latents, random parameters, and conditions of two samples."""
    geometry = dict(depth=2, width=12, heads=2, size=4, channels=3, text_tokens=3, text_width=8)
    model = pixart(**(geometry | dict(micro_conditioning=True) | overrides))
    rng = np.random.default_rng(0)
    cond = {k: rng.normal(size=(2, *s.shape)).astype(np.float32) for k, s in model.cond.items() if "mask" not in k}
    cond |= {"mask": np.array([[1, 1, 0], [1, 1, 1]], np.int32), "null_mask": np.array([[1, 0, 0]] * 2, np.int32)}
    return model, randomise(jax.eval_shape(model.init, jax.random.key(0))), cond


def test_branches_and_attention():
    model, params, cond = tiny()
    spec = trunk_spec(model, params, jnp.zeros((2, 4, 4, 3)), cond)
    assert model.stages[0].branches == ("attn", "cross", "mlp")
    calls = spec.attention["blocks"]
    assert calls["mlp"] is None and calls["attn"] is not None and calls["cross"] is not None
    assert calls["attn"].k.shape == (2, 4, 2, 6) and calls["attn"].segments is None
    assert calls["cross"].q.shape == (2, 4, 2, 6) and calls["cross"].k.shape == (2, 3, 2, 6)
    assert calls["cross"].segments is not None and calls["cross"].segments.k.shape == (2, 3)


@pytest.mark.slow
def test_bfloat16():
    model, params, cond = tiny()
    half = tiny(dtype="bfloat16")[0]
    x, t = np.random.default_rng(1).normal(size=(2, 4, 4, 3)).astype(np.float32), np.array([10.0, 900.0])
    exact, rounded = (network(m, params, x, t, cond) for m in (model, half))
    error = np.abs(rounded - exact).max() / np.abs(exact).max()
    print(f"bfloat16: {error:.1e}")
    assert 1e-4 < error < 5e-2


def test_samples_with_and_without_guidance():
    """Guidance at scale 1 is the conditional run, at scale 0 the run of the null condition; variance is dropped."""
    model, params, cond = tiny()
    assert model.learn_sigma
    process, solver, keys = vp_linear(), dpmpp_2m(), sample_keys(0, 2)

    def sampler(guide):
        # from t = 0.6 on: before, a random network's eps gives an x0 a hundred times as large
        rows = make_rows(solver, guide, process, np.linspace(0.6, 0.0, 4))
        sample = make_sampler(model, process, "eps", solver, guide)
        sample = jax.jit(sample.__wrapped__)

        def run(cond, scale):
            x = initial_noise(process, keys, model.input_shape)
            samples, trace = sample(params, x, keys, cond, rows, scale)
            return np.asarray(samples), set(np.asarray(trace.halves))

        return run

    alone, both = sampler(unguided()), sampler(cfg())
    (plain, one), (null, _) = alone(cond, 1.0), alone(model.null(cond), 1.0)
    (guided, two), (unconditional, _) = both(cond, 1.0), both(cond, 0.0)
    assert (plain.shape, one, two) == ((2, 4, 4, 3), {1}, {2}) and np.isfinite(plain).all()
    scale = np.abs(plain).max()
    errors = [np.abs(a - b).max() / scale for a, b in ((guided, plain), (unconditional, null), (plain, null))]
    print("guided and plain {:.1e}, unconditional and null {:.1e}, plain and null {:.1e}".format(*errors))
    assert max(errors[:2]) < 1e-4 and errors[2] > 1e-2


def test_imported_weights_survive_difaxs_own_file(tmp_path):
    model, params = load_pixart(weights("alpha"), param_dtype=jnp.bfloat16, size=(6, 10), **UNSTORED["alpha"])
    assert {str(x.dtype) for x in jax.tree.leaves(params)} == {"bfloat16"}
    save_safetensors(tmp_path / "own.safetensors", params)
    back = load_native(tmp_path / "own.safetensors", jax.eval_shape(model.init, jax.random.key(0)))
    jax.tree.map(np.testing.assert_array_equal, back, params)
    with pytest.raises(ValueError, match="difax's own layout; read it with difax.weights.checkpoint.load_native"):
        load_pixart(tmp_path / "own.safetensors")


# ---- refusals --------------------------------------------------------------------------------------------------

FACTORY = {
    "variant": (("alfa",), {}, "unknown PixArt variant 'alfa'; allowed: alpha, sigma"),
    "missing": ((), {"depth": 2, "width": 12}, "heads, text_tokens missing"),
    "heads": (("alpha",), {"heads": 5}, "width=1152 must be divisible by heads=5"),
    "thirds": (("alpha",), {"width": 1024}, "width=1024 must be divisible by 3 with micro_conditioning"),
    "patch": (("alpha",), {"size": 63}, "size=63x63 must be divisible by patch=2"),
    "oblong": (("sigma",), {"size": (96, 160)}, "size=96x160 does not tell"),
    "interpolation": (("sigma",), {"interpolation_scale": 0}, "interpolation_scale=0; allowed: > 0"),
    "dtype": (("sigma",), {"dtype": "float16"}, "dtype=float16; allowed: float32, bfloat16"),
    "channels": (("sigma",), {"channels": 0}, "channels=0; allowed: 1 or more"),
}


@pytest.mark.parametrize("case", FACTORY)
def test_factory_refuses(case):
    args, arguments, words = FACTORY[case]
    with pytest.raises(ValueError, match=words):
        pixart(*args, **arguments)


def _put(name, shape, dtype: Any = np.float32):
    return lambda t: t.update({name: np.ones(shape, dtype)})


CROSS = "transformer_blocks.1.attn2"
# (edit of alpha's tensors, arguments, words of the message)
REFUSALS = {
    "missing": (lambda t: t.pop(f"{CROSS}.to_k.bias"), {}, [f"'{CROSS}.to_k.bias'", "missing"]),
    "missing first": (lambda t: t.pop("proj_out.weight"), {}, ["'proj_out.weight' (for ends/out/kernel) is missing"]),
    "half of the micro-conditions": (
        lambda t: [t.pop(n) for n in list(t) if "resolution_embedder" in n],
        {},
        ["'adaln_single.emb.resolution_embedder.linear_1.weight'", "missing"],
    ),
    "surplus": (_put(f"{CROSS}.norm_q.weight", (24,)), {}, [f"surplus tensor '{CROSS}.norm_q.weight' of shape (24,)"]),
    "wrong shape": (
        _put(f"{CROSS}.to_v.weight", (24, 20)),
        {},
        [f"'{CROSS}.to_v.weight'", "wrong shape (24, 20)", "expected (24, 24)"],
    ),
    "wrong table": (_put("scale_shift_table", (6, 24)), {}, ["wrong shape (6, 24)", "expected (2, 24)"]),
    "odd final layer": (_put("proj_out.weight", (24, 24)), {}, ["emits 24", "16, or 32"]),
    "oblong patch": (_put("pos_embed.proj.weight", (24, 4, 2, 1)), {}, ["patches of 2 x 1"]),
    "other positions": (_put("pos_embed.pos_embed", (1, 64 * 64, 24)), {}, ["'pos_embed.pos_embed' differs"]),
    "fewer layers asked": (None, {"depth": 1}, ["surplus tensor 'transformer_blocks.1."]),
    "micro-conditions refused": (None, {"micro_conditioning": False}, ["surplus", "aspect_ratio_embedder"]),
    "heads unknown": (None, {"heads": None}, ["attention heads", "give heads="]),
    "size unknown": (None, {"size": None}, ["height and width", "give size="]),
    "tokens unknown": (None, {"text_tokens": None}, ["caption tokens", "variant='alpha' or 'sigma'"]),
    "unknown argument": (None, {"head": 4}, ["'head'", "nearest: 'heads'"]),
    "unknown layout": (None, {"layout": "originals"}, ["'originals'; allowed: diffusers, original"]),
    "no PixArt": (lambda t: [t.clear(), _put("lm_head.weight", (4,))(t)], {}, ["no tensor of a PixArt", "lm_head"]),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_checkpoint_refuses(tmp_path, case):
    edit, arguments, words = REFUSALS[case]
    tensors = load_file(weights("alpha"))
    if edit is not None:
        edit(tensors)
    save_file(tensors, tmp_path / "pixart.safetensors")
    arguments = {k: v for k, v in (UNSTORED["alpha"] | {"size": (6, 10)} | arguments).items() if v is not None}
    with pytest.raises(ValueError) as error:
        load_pixart(tmp_path / "pixart.safetensors", **arguments)
    for word in words:
        assert word in str(error.value)


def test_stored_positions_and_config_json(tmp_path):
    """Positions that a file holds give the size; diffusers' config.json gives heads, size and interpolation."""
    tensors = load_file(weights("sigma"))
    save_file(tensors, tmp_path / "diffusion_pytorch_model.safetensors")
    config = {"_class_name": "PixArtTransformer2DModel", "num_attention_heads": 2, "sample_size": 16}
    config |= {"interpolation_scale": 3, "use_additional_conditions": False, "norm_type": "ada_norm_single"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model, _ = load_pixart(tmp_path, variant="sigma")
    c = model.stages[0].block.config
    assert (c.heads, c.size, c.base_size, c.interpolation_scale) == (2, (16, 16), 8, 3)
    assert (c.text_tokens, c.depth, c.width, c.micro_conditioning) == (300, 2, 24, False)
    for name, value in (("norm_type", "ada_norm_zero"), ("attention_type", "gated")):
        (tmp_path / "config.json").write_text(json.dumps(config | {name: value}))
        with pytest.raises(ValueError, match=f"config.json: {name}='{value}'; allowed"):
            load_pixart(tmp_path, variant="sigma")
    (tmp_path / "config.json").write_text(json.dumps(config | {"use_additional_conditions": True}))
    with pytest.raises(ValueError, match="use_additional_conditions=True, but the checkpoint lacks"):
        load_pixart(tmp_path, variant="sigma")
    (tmp_path / "config.json").unlink()
    save_file(
        tensors | {"pos_embed.pos_embed": sincos_positions(24, 8, 8, 8)[None]},
        tmp_path / "diffusion_pytorch_model.safetensors",
    )
    model, _ = load_pixart(tmp_path, heads=2, text_tokens=7)
    assert model.input_shape == (16, 16, 4)


# ---- live, with the `parity` extra ------------------------------------------------------------------------------


def test_matches_diffusers_live(tmp_path):
    """A model of another geometry than the golden ones, saved by diffusers itself in shards with its config.json."""
    torch = pytest.importorskip("torch", reason="needs the parity extra (torch, diffusers)")
    diffusers = pytest.importorskip("diffusers", reason="needs the parity extra (torch, diffusers)")
    torch.manual_seed(0)
    reference = diffusers.PixArtTransformer2DModel(
        num_attention_heads=3,
        attention_head_dim=16,
        in_channels=3,
        out_channels=3,
        num_layers=3,
        sample_size=16,
        patch_size=4,
        cross_attention_dim=48,
        caption_channels=10,
        use_additional_conditions=True,
    ).eval()
    with torch.no_grad():
        for p in reference.parameters():
            p.normal_(0, p[0].numel() ** -0.5 if p.ndim > 1 else 0.1)
        x, t = torch.randn(3, 3, 8, 20), torch.tensor([0, 500, 999])
        cond = {"text": torch.randn(3, 6, 10), "mask": (torch.arange(6) < torch.tensor([[2], [6], [4]])).int()}
        added = {"resolution": torch.rand(3, 2) * 1000, "aspect_ratio": torch.rand(3, 1)}
        output = reference(
            x, cond["text"], timestep=t, encoder_attention_mask=cond["mask"], added_cond_kwargs=added
        ).sample
    reference.save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    model, params = load_pixart(tmp_path, text_tokens=6, size=(8, 20))
    assert not model.learn_sigma
    x_BHWC, output_BHWC = (a.numpy().transpose(0, 2, 3, 1) for a in (x, output))
    run = {"x": x_BHWC, "t": t.float().numpy(), "output": output_BHWC}
    errors = relative_errors(model, params, run | {"cond": {k: v.numpy() for k, v in (cond | added).items()}})
    print("diffusers, live: " + ", ".join(f"t={s}: {e:.1e}" for s, e in zip(t.tolist(), errors, strict=True)))
    assert errors.max() <= TOLERANCE


def test_published_geometries_live():
    """Names and shapes of diffusers' models at the published sizes are those of the layout table."""
    torch = pytest.importorskip("torch", reason="needs the parity extra (torch, diffusers)")
    diffusers = pytest.importorskip("diffusers", reason="needs the parity extra (torch, diffusers)")
    for variant, size in (("alpha", 128), ("sigma", 64)):
        with torch.device("meta"):
            reference = diffusers.PixArtTransformer2DModel(sample_size=size, caption_channels=4096)
        spec = jax.eval_shape(pixart(variant, size=size).init, jax.random.key(0))
        count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(spec))
        assert count == sum(p.numel() for p in reference.parameters()), variant
