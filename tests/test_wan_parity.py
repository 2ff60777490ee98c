"""Wan 2.1 text-to-video against diffusers' WanTransformer3DModel.

The golden files (tests/golden/make_wan.py) hold one state dict under the names of diffusers and of Wan-Video/Wan2.1,
with every layer random, and what the reference computed; diffusers' own converter has turned the second into the first.
Errors are printed (pytest -rP): largest difference over the largest output.
"""

# pyright: reportMissingImports=false

import importlib
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from difax.accel.solvers import dpmpp_2m
from difax.core.grids import make_times, shifted
from difax.core.guidance import cfg, unguided
from difax.core.noise import sample_keys
from difax.core.process import flow
from difax.core.sample import initial_noise, make_rows, make_sampler
from difax.core.shapes import trunk_spec
from difax.core.trunk import forward
from difax.models.wan import VARIANTS, patchify_video, rotary_grid, unpatchify_video, wan
from difax.models.wan_checkpoint import LAYOUTS, load_wan
from difax.weights.checkpoint import load_native, save_safetensors
from tests.toys import randomise

GOLDEN = Path(__file__).parent / "golden"
TOLERANCE = 1e-4
UNSTORED: dict[str, Any] = {"heads": 2, "text_tokens": 5, "size": (3, 6, 10)}  # what the golden weights do not tell
SIZES = [(3, 6, 10), (4, 8, 4)]


def network(model, params, x, t, cond) -> np.ndarray:
    """The model's output in float32, or refused for what is not finite."""
    with jax.default_matmul_precision("highest"):
        apply = jax.jit(lambda *args: forward(model, *args))
        output = np.asarray(apply(params, x, t, cond), np.float32)
    assert np.isfinite(output).all()
    return output


def weights(layout: str) -> Path:
    return GOLDEN / f"wan_{layout}.safetensors"


def golden(size: tuple[int, int, int]) -> dict[str, Any]:
    """A golden run on latents of one size: x [B, F, H, W, C], t, cond and output [B, F, H, W, C]."""
    run, name = load_file(GOLDEN / "wan_run.safetensors"), "x".join(map(str, size))
    x, output = (run[f"{k}_{name}"].transpose(0, 2, 3, 4, 1) for k in ("x", "output"))
    return {"x": x, "t": run["t"], "cond": {"text": run["text"]}, "output": output}


def relative_errors(model, params, run) -> np.ndarray:
    """Per sample: largest difference from the reference, over the reference's largest output."""
    output = network(model, params, run["x"], run["t"], run["cond"])
    return np.abs(output - run["output"]).max(axis=(1, 2, 3, 4)) / np.abs(run["output"]).max()


@pytest.mark.parametrize("size", SIZES)
def test_matches_diffusers(size):
    model, params = load_wan(weights("diffusers"), **UNSTORED | {"size": size})
    run = golden(size)
    assert set(run["t"]) == {0, 50, 500, 999}
    errors = relative_errors(model, params, run)
    print(f"{size}: " + ", ".join(f"t={t:.0f} {e:.1e}" for t, e in zip(run["t"], errors, strict=True)))
    assert errors.max() <= TOLERANCE


def test_both_layouts_are_the_same_parameters():
    models, params = zip(*(load_wan(weights(layout), **UNSTORED) for layout in LAYOUTS), strict=True)
    jax.tree.map(np.testing.assert_array_equal, *params)
    config, other = (model.stages[0].block.config for model in models)
    assert config == other
    assert (config.depth, config.width, config.ffn, config.channels) == (3, 20, 36, 3)
    assert (config.patch, config.text_width, config.rotary_axes) == ((1, 2, 2), 24, (6, 2, 2))


def _ones(*names):
    def edit(params, run):
        for name in names:
            params["blocks"][name] = jax.tree.map(jnp.ones_like, params["blocks"][name])

    return edit


def _no_table(params, run):
    params["blocks"]["table"] = jnp.zeros_like(params["blocks"]["table"])


def _other_time(params, run):
    run["t"] = run["t"] / 1000


def _other_frames(params, run):
    run["x"], run["output"] = run["x"][:, ::-1], run["output"][:, ::-1]


WRONG = {
    "weights of self-attention's norms ignored": _ones("norm_q", "norm_k"),
    "weights of cross-attention's norms ignored": _ones("cross_norm_q", "cross_norm_k"),
    "norm before cross-attention without its weights": _ones("cross_norm"),
    "tables ignored": _no_table,
    "time in 0 ... 1": _other_time,
    "time runs backwards": _other_frames,
}


@pytest.mark.parametrize("case", WRONG)
def test_another_function_fails(case):
    """The comparison can fail: with one thing done otherwise the error is far above the tolerance."""
    model, params = load_wan(weights("diffusers"), **UNSTORED)
    run = golden(UNSTORED["size"])
    WRONG[case](params, run)
    errors = relative_errors(model, params, run)
    print(f"{case}: error {errors.max():.1e}")
    assert errors.max() > 1e-2


@pytest.mark.parametrize("order", [(0, 2, 1), (1, 0, 2)], ids=["rows and columns", "frames and rows"])
def test_swapped_rotary_axes_fail(monkeypatch, order):
    def swapped(grid, axes_dim):
        """Each section of a head turns with another axis of the grid than it should."""
        places = tuple(grid[i] for i in order)
        tables = (table.reshape(*places, -1) for table in rotary_grid(places, axes_dim))
        return tuple(t.transpose(*np.argsort(order), 3).reshape(math.prod(grid), -1) for t in tables)

    run = golden(UNSTORED["size"])
    model, params = load_wan(weights("diffusers"), **UNSTORED)
    monkeypatch.setattr(importlib.import_module("difax.models.wan"), "rotary_grid", swapped)
    errors = relative_errors(model, params, run)
    print(f"{order}: error {errors.max():.1e}")
    assert errors.max() > 1e-2


def test_rotary_grid_of_every_token():
    """Against the definition, token by token in numpy: angle = position theta^(-2j/d) in the section of its axis."""
    cos, sin = rotary_grid((2, 3, 4), (6, 4, 4))
    angles = [
        [place * 10_000.0 ** (-2 * j / d) for place, d in zip((f, h, w), (6, 4, 4), strict=True) for j in range(d // 2)]
        for f in range(2)
        for h in range(3)
        for w in range(4)
    ]
    np.testing.assert_allclose(cos, np.cos(angles), atol=1e-7)
    np.testing.assert_allclose(sin, np.sin(angles), atol=1e-7)


def test_patches_of_a_video():
    """A patch is what stands at its place, and unpatchify puts it back."""
    x = np.random.default_rng(0).normal(size=(2, 4, 6, 10, 3)).astype(np.float32)
    tokens = np.asarray(patchify_video(jnp.asarray(x), (2, 3, 5)))
    assert tokens.shape == (2, 2 * 2 * 2, 2 * 3 * 5 * 3)
    token = (1 * 2 + 0) * 2 + 1  # frame 1, row 0, column 1
    np.testing.assert_array_equal(tokens[:, token], x[:, 2:4, 0:3, 5:10].reshape(2, -1))
    np.testing.assert_array_equal(unpatchify_video(jnp.asarray(tokens), (2, 3, 5), (2, 2, 2)), x)


def test_published_geometries():
    """Parameters of diffusers' model at the published sizes, and the tokens of 81 frames in 480p."""
    for variant, count, rotary in (("1.3B", 1_418_996_800, (44, 42, 42)), ("14B", 14_288_491_584, (44, 42, 42))):
        model = wan(variant)
        c = model.stages[0].block.config
        spec = jax.eval_shape(model.init, jax.random.key(0))
        assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(spec)) == count
        assert (c.rotary_axes, math.prod(c.grid), c.width // c.heads) == (rotary, 32_760, 128)
        assert (model.input_shape, model.learn_sigma, model.classes) == ((21, 60, 104, 16), False, 0)
        text = ((512, 4096), "float32")
        assert {k: (v.shape, str(v.dtype)) for k, v in model.cond.items()} == {"text": text, "null_text": text}


def tiny(**overrides: Any) -> tuple[Any, Any, Any]:
    """A Wan of two blocks on latents of 2 x 4 x 4 x 3, random parameters, and conditions of two samples."""
    geometry = dict(depth=2, width=16, heads=2, ffn=24, size=(2, 4, 4), channels=3, text_tokens=3, text_width=8)
    model = wan(**(geometry | overrides))
    rng = np.random.default_rng(0)
    cond = {k: rng.normal(size=(2, *s.shape)).astype(np.float32) for k, s in model.cond.items()}
    return model, randomise(jax.eval_shape(model.init, jax.random.key(0))), cond


def test_branches_and_attention():
    model, params, cond = tiny()
    spec = trunk_spec(model, params, jnp.zeros((2, 2, 4, 4, 3)), cond)
    assert model.stages[0].branches == ("attn", "cross", "mlp")
    calls = spec.attention["blocks"]
    assert calls["mlp"] is None and calls["attn"] is not None and calls["cross"] is not None
    assert calls["attn"].k.shape == (2, 8, 2, 8) and calls["attn"].segments is None
    assert calls["cross"].q.shape == (2, 8, 2, 8) and calls["cross"].k.shape == (2, 3, 2, 8)


def test_bfloat16():
    model, params, cond = tiny()
    half = tiny(dtype="bfloat16")[0]
    x, t = np.random.default_rng(1).normal(size=(2, 2, 4, 4, 3)).astype(np.float32), np.array([10.0, 900.0])
    exact, rounded = (network(m, params, x, t, cond) for m in (model, half))
    spec = trunk_spec(half, params, jnp.asarray(x), cond)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves((spec.update, spec.attention, spec.tokens))} == {"bfloat16"}
    error = np.abs(rounded - exact).max() / np.abs(exact).max()
    print(f"bfloat16: {error:.1e}")
    assert 1e-4 < error < 5e-2


def test_samples_with_and_without_guidance():
    """Guidance at scale 1 is the conditional run, at scale 0 the run of the null condition."""
    model, params, cond = tiny()
    process, solver, keys = flow(shift=3.0), dpmpp_2m(), sample_keys(0, 2)

    def sampler(guide):
        rows = make_rows(solver, guide, process, make_times(shifted(), process, 3))
        sample = make_sampler(model, process, "velocity", solver, guide)
        sample = jax.jit(sample.__wrapped__)

        def run(cond, scale):
            x = initial_noise(process, keys, model.input_shape)
            samples, trace = sample(params, x, keys, cond, rows, scale)
            return np.asarray(samples), set(np.asarray(trace.halves))

        return run

    alone, both = sampler(unguided()), sampler(cfg())
    (plain, one), (null, _) = alone(cond, 1.0), alone(model.null(cond), 1.0)
    (guided, two), (unconditional, _) = both(cond, 1.0), both(cond, 0.0)
    assert (plain.shape, one, two) == ((2, 2, 4, 4, 3), {1}, {2}) and np.isfinite(plain).all()
    scale = np.abs(plain).max()
    errors = [np.abs(a - b).max() / scale for a, b in ((guided, plain), (unconditional, null), (plain, null))]
    print("guided and plain {:.1e}, unconditional and null {:.1e}, plain and null {:.1e}".format(*errors))
    assert max(errors[:2]) < 1e-4 and errors[2] > 1e-2


def test_imported_weights_survive_difaxs_own_file(tmp_path):
    model, params = load_wan(weights("original"), param_dtype=jnp.bfloat16, **UNSTORED)
    assert {str(x.dtype) for x in jax.tree.leaves(params)} == {"bfloat16"}
    save_safetensors(tmp_path / "own.safetensors", params)
    back = load_native(tmp_path / "own.safetensors", jax.eval_shape(model.init, jax.random.key(0)))
    jax.tree.map(np.testing.assert_array_equal, back, params)
    with pytest.raises(ValueError, match="difax's own layout; read it with difax.weights.checkpoint.load_native"):
        load_wan(tmp_path / "own.safetensors")


# ---- refusals --------------------------------------------------------------------------------------------------

FACTORY = {
    "variant": (("1.3b",), {}, "unknown Wan variant '1.3b'; allowed: 1.3B, 14B"),
    "missing": ((), {"depth": 2, "width": 12}, "heads, ffn missing"),
    "heads": (("1.3B",), {"heads": 7}, "width=1536 must be divisible by heads=7"),
    "odd heads": ((), {"depth": 1, "width": 21, "heads": 3, "ffn": 8}, "heads of an even width, 6 or more"),
    "narrow heads": (("1.3B",), {"heads": 384}, "heads of an even width, 6 or more"),
    "patch": (("1.3B",), {"size": (21, 61, 104)}, "must be divisible by patch="),
    "two axes": (("1.3B",), {"size": (60, 104)}, "expected \\(frames, height, width\\)"),
    "eps": (("1.3B",), {"eps": 0.0}, "eps=0.0; allowed: > 0"),
    "dtype": (("1.3B",), {"dtype": "float16"}, "dtype=float16; allowed: float32, bfloat16"),
    "channels": (("1.3B",), {"channels": 0}, "channels=0; allowed: 1 or more"),
}


@pytest.mark.parametrize("case", FACTORY)
def test_factory_refuses(case):
    args, arguments, words = FACTORY[case]
    with pytest.raises(ValueError, match=words):
        wan(*args, **arguments)


def _put(name, shape, dtype: Any = np.float32):
    return lambda t: t.update({name: np.ones(shape, dtype)})


# (layout, edit of the tensors, arguments, words of the message)
REFUSALS = {
    "missing": ("original", lambda t: t.pop("blocks.1.cross_attn.k.bias"), {}, ["'blocks.1.cross_attn.k.bias'"]),
    "missing in diffusers": ("diffusers", lambda t: t.pop("blocks.2.norm2.bias"), {}, ["'blocks.2.norm2.bias'"]),
    "missing first": ("original", lambda t: t.pop("head.head.weight"), {}, ["'head.head.weight'", "is missing"]),
    "image-to-video": (
        "original",
        _put("blocks.0.cross_attn.k_img.weight", (20, 20)),
        {},
        ["surplus tensor 'blocks.0.cross_attn.k_img.weight' of shape (20, 20)"],
    ),
    "fewer channels in than out": (
        "original",
        _put("patch_embedding.weight", (20, 2, 1, 2, 2)),
        {},
        ["emits 12", "expected 8, or fewer", "image-to-video"],
    ),
    "wrong shape": (
        "diffusers",
        _put("blocks.1.attn2.to_v.weight", (20, 24)),
        {},
        ["'blocks.1.attn2.to_v.weight'", "wrong shape (20, 24)", "expected (20, 20)"],
    ),
    "wrong table": ("original", _put("blocks.0.modulation", (1, 2, 20)), {}, ["'blocks.0.modulation'", "(1, 2, 20)"]),
    "flat patch kernel": ("original", _put("patch_embedding.weight", (20, 12)), {}, ["expected 5 axes"]),
    "odd time features": ("original", _put("time_embedding.0.weight", (20, 63)), {}, ["freq_dim=63; allowed: even"]),
    "other time features": ("original", _put("time_embedding.0.weight", (21, 64)), {}, ["'time_embedding.0.weight'"]),
    "fewer layers asked": ("original", None, {"depth": 2}, ["surplus tensor 'blocks.2."]),
    "the other layout": ("original", None, {"layout": "diffusers"}, ["'proj_out.weight'", "missing"]),
    "unknown layout": ("original", None, {"layout": "diffuser"}, ["'diffuser'", "nearest: 'diffusers'"]),
    "heads unknown": ("original", None, {"heads": None}, ["attention heads", "give heads="]),
    "size unknown": ("original", None, {"size": None}, ["(frames, height, width)", "give size="]),
    "unknown argument": ("original", None, {"head": 4}, ["'head'", "nearest: 'heads'"]),
    "no Wan": ("original", lambda t: [t.clear(), _put("lm_head.weight", (4,))(t)], {}, ["no tensor of a Wan"]),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_checkpoint_refuses(tmp_path, case):
    layout, edit, arguments, words = REFUSALS[case]
    tensors = load_file(weights(layout))
    if edit is not None:
        edit(tensors)
    save_file(tensors, tmp_path / "wan.safetensors")
    arguments = {k: v for k, v in (UNSTORED | arguments).items() if v is not None}
    with pytest.raises(ValueError) as error:
        load_wan(tmp_path / "wan.safetensors", **arguments)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_config_json(tmp_path, layout):
    save_file(load_file(weights(layout)), tmp_path / "diffusion_pytorch_model.safetensors")
    config, bad = {
        "original": ({"_class_name": "WanModel", "model_type": "t2v", "num_heads": 1}, ("model_type", "i2v")),
        "diffusers": ({"_class_name": "WanTransformer3DModel", "num_attention_heads": 1}, ("cross_attn_norm", False)),
    }[layout]
    (tmp_path / "config.json").write_text(json.dumps(config | {"eps": 1e-5, "text_len": 7}))
    model, _ = load_wan(tmp_path, size=(1, 2, 2))
    c = model.stages[0].block.config
    assert (c.heads, c.eps, c.text_tokens, c.size) == (1, 1e-5, 7, (1, 2, 2))
    (tmp_path / "config.json").write_text(json.dumps(config | dict([bad])))
    with pytest.raises(ValueError, match=f"config.json: {bad[0]}={bad[1]!r}; allowed: "):
        load_wan(tmp_path, size=(1, 2, 2))


# ---- live, with the `parity` extra ------------------------------------------------------------------------------


def test_matches_diffusers_live(tmp_path):
    """A model of another geometry than the golden one, saved by diffusers itself in shards with its config.json."""
    torch = pytest.importorskip("torch", reason="needs the parity extra (torch, diffusers)")
    diffusers = pytest.importorskip("diffusers", reason="needs the parity extra (torch, diffusers)")
    torch.manual_seed(0)
    reference = diffusers.WanTransformer3DModel(
        patch_size=(2, 1, 3),
        num_attention_heads=3,
        attention_head_dim=16,
        in_channels=5,
        out_channels=5,
        text_dim=10,
        ffn_dim=40,
        num_layers=2,
        eps=1e-5,
    ).eval()
    with torch.no_grad():
        for name, p in reference.named_parameters():
            norm = "norm" in name and name.endswith("weight")
            p.normal_(norm, p[0].numel() ** -0.5 if p.ndim > 1 else 0.1)
        x, t, text = torch.randn(3, 5, 4, 3, 9), torch.tensor([0, 500, 999]), torch.randn(3, 6, 10)
        output = reference(x, timestep=t, encoder_hidden_states=text).sample
    reference.save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    model, params = load_wan(tmp_path, text_tokens=6, size=(4, 3, 9))
    assert model.stages[0].block.config.eps == 1e-5
    x_BFHWC, output_BFHWC = (a.numpy().transpose(0, 2, 3, 4, 1) for a in (x, output))
    run = {"x": x_BFHWC, "t": t.float().numpy(), "cond": {"text": text.numpy()}, "output": output_BFHWC}
    errors = relative_errors(model, params, run)
    print("diffusers, live: " + ", ".join(f"t={s}: {e:.1e}" for s, e in zip(t.tolist(), errors, strict=True)))
    assert errors.max() <= TOLERANCE


def test_published_geometries_live():
    """diffusers' models at the published sizes have as many parameters as ours."""
    torch = pytest.importorskip("torch", reason="needs the parity extra (torch, diffusers)")
    diffusers = pytest.importorskip("diffusers", reason="needs the parity extra (torch, diffusers)")
    for variant, (depth, width, heads, ffn) in VARIANTS.items():
        with torch.device("meta"):
            reference = diffusers.WanTransformer3DModel(num_attention_heads=heads, ffn_dim=ffn, num_layers=depth)
        spec = jax.eval_shape(wan(variant).init, jax.random.key(0))
        assert width == heads * 128
        count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(spec))
        assert count == sum(p.numel() for p in reference.parameters()), variant
