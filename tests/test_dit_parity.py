"""DiT against its two references: facebookresearch/DiT and diffusers' DiTTransformer2DModel.

The golden files (tests/golden/make_dit.py) hold state dicts that the references wrote, with every layer random, and
what the references computed. Errors are printed (pytest -rP): largest difference over the largest output.
"""

# pyright: reportMissingImports=false

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from difax.core.trunk import forward
from difax.models.dit_checkpoint import LAYOUTS, load_dit
from difax.weights.checkpoint import load_native, save_safetensors

GOLDEN = Path(__file__).parent / "golden"
TOLERANCE = 1e-5
# what the golden files themselves do not tell: no layout stores heads, diffusers' does not store positions
UNSTORED: dict[str, dict[str, Any]] = {"original": {"heads": 4}, "diffusers": {"heads": 4, "size": 8}}
NULL = 10


def weights(layout: str) -> Path:
    return GOLDEN / f"dit_{layout}.safetensors"


def relative_errors(model, params, run) -> np.ndarray:
    """Per sample: largest difference from the reference, over the reference's largest output."""
    x = run["x"].transpose(0, 2, 3, 1)  # the references take [B, C, H, W]
    with jax.default_matmul_precision("highest"):
        output = jax.jit(lambda p, *inputs: forward(model, p, *inputs))(params, x, run["t"], run["y"])
    difference = np.abs(np.asarray(output).transpose(0, 3, 1, 2) - run["output"])
    return difference.max(axis=(1, 2, 3)) / np.abs(run["output"]).max()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_matches_its_reference(layout):
    model, params = load_dit(weights(layout), **UNSTORED[layout])
    run = load_file(GOLDEN / f"dit_{layout}_run.safetensors")
    assert set(run["t"]) == {0, 50, 500, 999} and NULL in run["y"]
    errors = relative_errors(model, params, run)
    for t, y, error in zip(run["t"], run["y"], errors, strict=True):
        print(f"{layout}: t={t:<4.0f} label={'null' if y == NULL else y:<4} error {error:.1e}")
    assert errors.max() <= TOLERANCE


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("field", "least"), [("freq_shift", 0.1), ("mlp_norm_eps", 5e-4)], ids=["freq_shift", "mlp_norm_eps"]
)
def test_the_other_references_numerics_fail(layout, field, least):
    """The comparison can fail: with one constant of the other reference the error is far above the tolerance."""
    (other,) = set(LAYOUTS) - {layout}
    wrong = {field: getattr(LAYOUTS[other], field)}
    model, params = load_dit(weights(layout), **UNSTORED[layout], **wrong)
    error = relative_errors(model, params, load_file(GOLDEN / f"dit_{layout}_run.safetensors")).max()
    print(f"{layout} with {wrong}: error {error:.1e}")
    assert error > least


@pytest.mark.parametrize("layout", LAYOUTS)
def test_geometry_comes_from_the_tensors(layout):
    model, params = load_dit(weights(layout), layout=layout, **UNSTORED[layout])
    block = model.stages[0].block.config
    assert (model.stages[0].depth, block.width, block.patch, block.mlp_ratio) == (3, 16, 2, 4)
    assert (model.input_shape, model.classes, model.learn_sigma) == ((8, 8, 4), NULL, True)
    assert (block.freq_shift, block.mlp_norm_eps) == {"original": (0, 1e-6), "diffusers": (1, 1e-5)}[layout]
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, jax.eval_shape(model.init, jax.random.key(0)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_null_label_is_the_last_row(layout):
    model, params = load_dit(weights(layout), **UNSTORED[layout])
    labels = jnp.array([3, 7])
    np.testing.assert_array_equal(model.null(labels), [NULL, NULL])
    name = LAYOUTS[layout].table["ends/label"].keys[0].format(layer=0)
    np.testing.assert_array_equal(params["ends"]["label"][NULL], load_file(weights(layout))[name][-1])


def test_named_size_of_the_paper(tmp_path):
    """A checkpoint with the depth and width of a named size needs no heads given."""
    d = 384
    ends = {"t_embedder.mlp.0": (d, 256), "t_embedder.mlp.2": (d, d)}
    ends |= {"final_layer.adaLN_modulation.1": (2 * d, d), "final_layer.linear": (32, d)}
    block = {"adaLN_modulation.1": (6 * d, d), "attn.qkv": (3 * d, d), "attn.proj": (d, d)}
    block |= {"mlp.fc1": (4 * d, d), "mlp.fc2": (d, 4 * d)}
    dense = ends | {f"blocks.{i}.{name}": shape for i in range(12) for name, shape in block.items()}
    shapes = {f"{name}.weight": shape for name, shape in dense.items()}
    shapes |= {f"{name}.bias": shape[:1] for name, shape in dense.items()}
    shapes |= {"x_embedder.proj.weight": (d, 4, 2, 2), "x_embedder.proj.bias": (d,)}
    shapes |= {"y_embedder.embedding_table.weight": (1001, d)}
    tensors = {name: np.zeros(shape, np.float16) for name, shape in shapes.items()}
    save_file(tensors, tmp_path / "s.safetensors")
    model, params = load_dit(tmp_path / "s.safetensors", size=16, dtype="bfloat16")
    assert (model.name, model.classes) == ("dit-S/2", 1000) and model.stages[0].block.config.heads == 6
    assert params["blocks"]["qkv"]["kernel"].shape == (12, 384, 1152)
    assert {str(x.dtype) for x in jax.tree.leaves(params)} == {"float16"}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sharded_folder(tmp_path, layout):
    tensors = load_file(weights(layout))
    names, index = sorted(tensors), {}
    for i in range(2):
        file = f"model-{i}.safetensors"
        save_file({n: tensors[n] for n in names[i::2]}, tmp_path / file)
        index |= dict.fromkeys(names[i::2], file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    _, one = load_dit(weights(layout), **UNSTORED[layout])
    _, sharded = load_dit(tmp_path, **UNSTORED[layout])
    jax.tree.map(np.testing.assert_array_equal, one, sharded)


def test_diffusers_config_gives_heads_size_and_epsilon(tmp_path):
    save_file(load_file(weights("diffusers")), tmp_path / "diffusion_pytorch_model.safetensors")
    config = {
        "_class_name": "DiTTransformer2DModel",
        "activation_fn": "gelu-approximate",
        "num_attention_heads": 2,
        "sample_size": 8,
        "norm_eps": 1e-4,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    model, _ = load_dit(tmp_path)
    block = model.stages[0].block.config
    assert (block.heads, block.size, block.mlp_norm_eps) == (2, (8, 8), 1e-4)
    (tmp_path / "config.json").write_text(json.dumps(config | {"activation_fn": "relu"}))
    with pytest.raises(ValueError, match="config.json: activation_fn='relu'; allowed: gelu-approximate or gelu or"):
        load_dit(tmp_path)


def test_imported_weights_survive_difaxs_own_file(tmp_path):
    model, params = load_dit(weights("original"), param_dtype=jnp.bfloat16, heads=4)
    save_safetensors(tmp_path / "own.safetensors", params)
    back = load_native(tmp_path / "own.safetensors", jax.eval_shape(model.init, jax.random.key(0)))
    assert {str(x.dtype) for x in jax.tree.leaves(back)} == {"bfloat16"}
    jax.tree.map(np.testing.assert_array_equal, back, params)
    with pytest.raises(ValueError, match="difax's own layout; read it with difax.weights.checkpoint.load_native"):
        load_dit(tmp_path / "own.safetensors", heads=4)


# ---- refusals: (layout, edit of the tensors, arguments, words of the message) ----------------------------------


def _put(name, shape, dtype: Any = np.float32):
    return lambda t: t.update({name: np.ones(shape, dtype)})


def _nudge(name):
    def edit(t):
        t[name] = t[name].copy()
        t[name].flat[0] += 0.25

    return edit


def _drop_block(t):
    for name in [n for n in t if n.startswith("blocks.1.")]:
        del t[name]


def _rename(t):
    t["blocks.2.attn.projection.bias"] = t.pop("blocks.2.attn.proj.bias")


EMB = "transformer_blocks.1.norm1.emb"
REFUSALS = {
    "missing": ("original", lambda t: t.pop("t_embedder.mlp.2.bias"), {}, ["'t_embedder.mlp.2.bias'", "missing"]),
    "missing first": ("original", lambda t: t.pop("x_embedder.proj.weight"), {}, ["'x_embedder.proj.weight'"]),
    "renamed": (
        "original",
        _rename,
        {},
        ["'blocks.2.attn.proj.bias'", "nearest in the file: 'blocks.2.attn.projection.bias'"],
    ),
    "missing block": ("original", _drop_block, {}, ["'blocks.1.adaLN_modulation.1.weight'", "and 9 more"]),
    "surplus": (
        "original",
        _put("blocks.0.attn.q_norm.weight", (4,)),
        {},
        ["surplus tensor 'blocks.0.attn.q_norm.weight' of shape (4,)"],
    ),
    "fewer layers asked": ("original", None, {"depth": 2}, ["surplus tensor 'blocks.2."]),
    "wrong shape": (
        "original",
        _put("blocks.1.attn.qkv.weight", (47, 16)),
        {},
        ["'blocks.1.attn.qkv.weight'", "wrong shape (47, 16)", "expected (48, 16)"],
    ),
    "wrong shape of a part": (
        "diffusers",
        _put("transformer_blocks.2.attn1.to_k.weight", (8, 16)),
        {},
        ["'transformer_blocks.2.attn1.to_k.weight'", "wrong shape (8, 16)", "expected (16, 16)"],
    ),
    "other width asked": ("original", None, {"width": 32}, ["wrong shape (16,", "fold into (16, 32)"]),
    "oblong patch": ("original", _put("x_embedder.proj.weight", (16, 4, 2, 4)), {}, ["patches of 2 x 4"]),
    "odd final layer": ("original", _put("final_layer.linear.weight", (24, 16)), {}, ["emits 24", "16, or 32"]),
    "unequal time embedders": (
        "diffusers",
        _nudge(f"{EMB}.timestep_embedder.linear_1.weight"),
        {"block_embedders": False},
        [f"'{EMB}.timestep_embedder.linear_1.weight' must equal", "0.25"],
    ),
    "unequal class embedders": (
        "diffusers",
        _nudge(f"{EMB}.class_embedder.embedding_table.weight"),
        {"block_embedders": False},
        [f"'{EMB}.class_embedder.embedding_table.weight' must equal"],
    ),
    "missing class embedder": (
        "diffusers",
        lambda t: t.pop(f"{EMB}.class_embedder.embedding_table.weight"),
        {},
        [f"'{EMB}.class_embedder.embedding_table.weight'", "missing"],
    ),
    "learned positions": ("original", _nudge("pos_embed"), {}, ["'pos_embed' differs", "0.25"]),
    "learned positions of diffusers": (
        "diffusers",
        _put("pos_embed.pos_embed", (1, 16, 16)),
        {},
        ["'pos_embed.pos_embed' differs"],
    ),
    "positions of no square": (
        "original",
        _put("pos_embed", (1, 15, 16)),
        {"size": 16},
        ["'pos_embed'", "(1, 15, 16)", "expected (1, 64, 16)"],
    ),
    "heads unknown": ("original", None, {"heads": None}, ["attention heads", "give heads="]),
    "size unknown": ("diffusers", None, {"size": None}, ["height and width", "give size="]),
    "heads that do not divide": ("original", None, {"heads": 3}, ["heads=3"]),
    "unknown layout": ("original", None, {"layout": "orignal"}, ["'orignal'", "nearest: 'original'"]),
    "the other layout": ("original", None, {"layout": "diffusers"}, ["'pos_embed.proj.weight'", "missing"]),
    "unknown argument": ("original", None, {"head": 4}, ["'head'", "nearest: 'heads'"]),
    "no DiT": ("original", lambda t: [t.clear(), _put("lm_head.weight", (4,))(t)], {}, ["lm_head.weight"]),
    "integers": (
        "original",
        _put("blocks.0.mlp.fc1.bias", (64,), np.int32),
        {},
        ["'blocks.0.mlp.fc1.bias'", "I32"],
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refuses(tmp_path, case):
    layout, edit, arguments, words = REFUSALS[case]
    tensors = load_file(weights(layout))
    if edit is not None:
        edit(tensors)
    save_file(tensors, tmp_path / "dit.safetensors")
    arguments = {k: v for k, v in (UNSTORED[layout] | arguments).items() if v is not None}
    with pytest.raises(ValueError) as error:
        load_dit(tmp_path / "dit.safetensors", **arguments)
    for word in words:
        assert word in str(error.value)


def test_refuses_truncated_and_pickled_files(tmp_path):
    file = tmp_path / "dit.safetensors"
    file.write_bytes(weights("original").read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"dit.safetensors: truncated: tensor 'y_embedder.embedding_table.weight'"):
        load_dit(file)
    file = tmp_path / "DiT-XL-2-256x256.pt"
    file.write_bytes(b"PK\x03\x04" + bytes(64))
    with pytest.raises(ValueError, match="DiT-XL-2-256x256.pt: a PyTorch pickle; only safetensors"):
        load_dit(file)


# ---- live, with the `parity` extra ------------------------------------------------------------------------------


def test_matches_diffusers_live(tmp_path):
    """A model of another geometry than the golden one, saved by diffusers itself in shards with its config.json."""
    torch = pytest.importorskip("torch", reason="needs the parity extra (torch, diffusers)")
    diffusers = pytest.importorskip("diffusers", reason="needs the parity extra (torch, diffusers)")
    torch.manual_seed(0)
    reference = diffusers.DiTTransformer2DModel(
        num_attention_heads=3,
        attention_head_dim=16,
        in_channels=3,
        out_channels=3,
        num_layers=4,
        sample_size=16,
        patch_size=4,
        num_embeds_ada_norm=7,
    ).eval()
    first = reference.transformer_blocks[0].norm1.emb
    with torch.no_grad():
        for p in reference.parameters():
            p.normal_(0, p[0].numel() ** -0.5 if p.ndim > 1 else 0.1)
        for block in reference.transformer_blocks[1:]:
            block.norm1.emb.load_state_dict(first.state_dict())
        x = torch.randn(4, 3, 16, 16)
        t, y = torch.tensor([0, 50, 500, 999]), torch.tensor([0, 6, 7, 3])
        output = reference(x, t, y).sample
    reference.save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    model, params = load_dit(tmp_path)
    assert not model.learn_sigma
    run = {"x": x.numpy(), "t": t.float().numpy(), "y": y.int().numpy(), "output": output.numpy()}
    errors = relative_errors(model, params, run)
    print("diffusers, live: " + ", ".join(f"t={s}: {e:.1e}" for s, e in zip(t.tolist(), errors, strict=True)))
    assert errors.max() <= TOLERANCE
