"""FLUX.1 against diffusers' FluxTransformer2DModel, in both published layouts of its weights.

The golden files (tests/golden/make_flux.py) hold one tiny model, every layer random, under the names of diffusers and
of black-forest-labs/flux, and what diffusers computed. Errors are printed (pytest -rP): largest difference over the
largest output.
"""

# pyright: reportMissingImports=false

import functools
import importlib.util
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from difax.accel.solvers import SOLVERS
from difax.build import make_process
from difax.configs import flux_dev, flux_schnell, flux_tiny
from difax.core import noise
from difax.core.grids import GRIDS, make_times
from difax.core.guidance import GUIDES
from difax.core.process import PROCESSES
from difax.core.sample import initial_noise, make_rows, make_sampler
from difax.core.shapes import trunk_spec
from difax.core.trunk import forward
from difax.models.flux import flux, pack, rms_norm, unpack
from difax.models.flux_checkpoint import LAYOUTS, layout_table, load_flux
from difax.models.rope import apply_rotary, rotary_angles, rotary_table
from difax.weights.checkpoint import Source, load_safetensors
from tests.toys import randomise

GOLDEN = Path(__file__).parent / "golden"
# Measured is 2e-6. The reference makes the frequencies of time and guidance in float32, up to 6e-7 off, and the angle
# is 1000 times the guidance: with exact ones the error would be 1e-5.
TOLERANCE = 1e-4
# what no layout stores; the files hold float16
GIVEN: dict[str, Any] = {"size": (8, 12), "axes_dim": (2, 4, 4)}
TINY: dict[str, Any] = dict(
    double_depth=1,
    single_depth=1,
    width=12,
    heads=2,
    size=(4, 6),
    channels=2,
    text_tokens=3,
    text_width=5,
    pooled_width=4,
    axes_dim=(2, 2, 2),
)


def weights(layout: str) -> Path:
    return GOLDEN / f"flux_{layout}.safetensors"


def compiled(model: Any) -> Any:
    """(params, x, model_time, cond) -> output."""
    return jax.jit(functools.partial(forward, model))


@functools.cache
def loaded(layout: str) -> Any:
    """(model, params, network)"""
    model, params = load_flux(weights(layout), layout=layout, param_dtype="float32", **GIVEN)
    return model, params, compiled(model)


@functools.cache
def golden_run() -> dict[str, np.ndarray]:
    return load_file(GOLDEN / "flux_run.safetensors")


def condition(run: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The network's own part of a condition; `null` is not asked for."""
    return {name: run[name] for name in ("text", "pooled", "guidance")}


def relative_errors(network: Any, params: Any, run: dict[str, np.ndarray]) -> np.ndarray:
    """Per sample: largest difference from the reference, over the reference's largest output."""
    x = run["x"].transpose(0, 2, 3, 1)  # the references take [B, C, H, W]
    with jax.default_matmul_precision("highest"):
        output = network(params, x, 1000 * run["t"], condition(run))
    difference = np.abs(np.asarray(output).transpose(0, 3, 1, 2) - run["output"])
    return difference.max(axis=(1, 2, 3)) / np.abs(run["output"]).max()


# ---- parity ----------------------------------------------------------------------------------------------------


def test_matches_diffusers():
    _, params, network = loaded("diffusers")
    run = golden_run()
    errors = relative_errors(network, params, run)
    for t, guidance, error in zip(run["t"], run["guidance"], errors, strict=True):
        print(f"diffusers: t={t:<4.2f} guidance={guidance:<3.1f} error {error:.1e}")
    assert errors.max() <= TOLERANCE


def test_both_layouts_hold_the_same_parameters():
    """The original's file is turned into diffusers' state dict by diffusers' own converter (make_flux.py)."""
    names = [set(load_file(weights(layout))) for layout in LAYOUTS]
    assert not names[0] & names[1]
    jax.tree.map(np.testing.assert_array_equal, loaded("original")[1], loaded("diffusers")[1])


def _swap_halves(params):
    ada = {k: np.roll(a, a.shape[-1] // 2, axis=-1) for k, a in params["ends"]["ada"].items()}
    return {**params, "ends": {**params["ends"], "ada": ada}}


def _swap_streams(params):
    return {**params, "double": {"img": params["double"]["txt"], "txt": params["double"]["img"]}}


def _no_norm(params):
    single = {k: jnp.ones_like(a) if k == "q_norm" else a for k, a in params["single"].items()}
    return {**params, "single": single}


# a change of the weights, of the geometry or of the inputs, that a wrong implementation would amount to
WRONG: dict[str, Any] = {
    "scale and shift of the final layer swapped": (_swap_halves, {}, {}),
    "text and image streams swapped": (_swap_streams, {}, {}),
    "no scale of the normed queries": (_no_norm, {}, {}),
    "rotary sections of other axes": (None, {"axes_dim": (4, 4, 2)}, {}),
    "rotary frequencies of another base": (None, {"theta": 100.0}, {}),
    "guidance without its factor": (None, {}, {"guidance": 1e-3}),
    "time without its factor": (None, {}, {"t": 1e-3}),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_numerics_fail(case):
    """The comparison can fail: each error is far above the tolerance."""
    edit, geometry, scaled = WRONG[case]
    model, params, network = loaded("diffusers")
    if geometry:
        c = model.stages[0].block.config
        network = compiled(flux(**{k: getattr(c, k) for k in c.__dataclass_fields__} | geometry))
    run = golden_run() | {name: factor * golden_run()[name] for name, factor in scaled.items()}
    error = relative_errors(network, edit(params) if edit else params, run).max()
    print(f"{case}: error {error:.1e}")
    assert error > 1e-2


def test_geometry_comes_from_the_tensors():
    for layout in LAYOUTS:
        model, params = load_flux(weights(layout), **GIVEN)  # recognised by its names
        c = model.stages[0].block.config
        assert [(s.name, s.depth, s.branches) for s in model.stages] == [
            ("double", 2, ("attn", "mlp")),
            ("single", 3, ("attn_mlp",)),
        ]
        assert (c.width, c.heads, c.channels, c.text_width, c.pooled_width) == (20, 2, 4, 12, 6)
        assert c.guidance_embedding and c.mlp_ratio == 4 and model.input_shape == (8, 12, 4)
        assert (model.classes, model.learn_sigma) == (0, False)
        assert {str(a.dtype) for a in jax.tree.leaves(params)} == {"float16"}
        spec = jax.eval_shape(model.init, jax.random.key(0))
        assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, spec)


def test_geometry_of_the_published_model():
    """The default geometry has as many parameters as Black Forest Labs say, 12 billion, and their names."""
    model = flux("dev")
    spec = jax.eval_shape(model.init, jax.random.key(0))
    total = sum(a.size for a in jax.tree.leaves(spec))
    print(f"FLUX.1 dev: {total / 1e9:.3f} billion parameters")
    assert total == 11_901_408_320
    assert (model.name, model.input_shape, model.cond["text"].shape) == ("flux-dev", (128, 128, 16), (512, 4096))
    schnell = flux("schnell")
    assert "guidance" not in schnell.cond and schnell.cond["text"].shape == (256, 4096)
    assert not {"guidance1", "guidance2"} & set(jax.eval_shape(schnell.init, jax.random.key(0))["ends"])


# ---- pieces against numpy --------------------------------------------------------------------------------------


def test_latents_are_packed_over_channel_row_column():
    x = np.arange(2 * 4 * 6 * 3).reshape(2, 4, 6, 3)
    tokens = np.asarray(pack(jnp.asarray(x)))
    assert tokens.shape == (2, 6, 12)
    for token, (row, column) in enumerate(np.ndindex(2, 3)):
        patch = x[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
        expected = [[patch[b, i, j, c] for c in range(3) for i in range(2) for j in range(2)] for b in range(2)]
        np.testing.assert_array_equal(tokens[:, token], expected)
    np.testing.assert_array_equal(unpack(jnp.asarray(tokens), 2, 3), x)


def test_rotary_turns_pairs_by_position():
    """Against complex numbers: pair j of axis a turns by exp(i position theta^(-2j/d_a))."""
    rng = np.random.default_rng(0)
    positions, axes_dim = rng.integers(0, 50, (7, 2)), (2, 4)
    x = rng.normal(size=(3, 7, 2, 6)).astype(np.float32)
    frequencies = [(0, 1.0), (1, 1.0), (1, 100.0**-0.5)]
    turns = np.stack([np.exp(1j * positions[:, a] * f) for a, f in frequencies], axis=1)
    turned = (x[..., 0::2] + 1j * x[..., 1::2]) * turns[None, :, None]
    expected = np.stack([turned.real, turned.imag], axis=-1).reshape(x.shape)
    got = apply_rotary(jnp.asarray(x), *map(jnp.asarray, rotary_table(positions, axes_dim, theta=100.0)))
    error = np.abs(got - expected).max()
    print(f"rotation: error {error:.1e}")
    assert error < 2e-6 and got.dtype == jnp.float32
    half = apply_rotary(jnp.asarray(x, jnp.bfloat16), *rotary_table(positions, axes_dim, theta=100.0))
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(jnp.float32), expected, atol=0.05)


def test_scores_depend_on_distance_only():
    rng = np.random.default_rng(1)
    q, k = (jnp.asarray(rng.normal(size=(1, 1, 1, 6)), jnp.float32) for _ in range(2))

    def score(i, j):
        a, b = (apply_rotary(x, *rotary_table(np.array([p]), (2, 4))) for x, p in ((q, i), (k, j)))
        return float((a * b).sum())

    assert score((3, 9), (1, 4)) == pytest.approx(score((12, 25), (10, 20)), abs=1e-5)
    assert abs(score((3, 9), (1, 4)) - score((3, 9), (4, 1))) > 1e-2


@pytest.mark.parametrize(
    ("positions", "axes_dim", "theta", "words"),
    [
        (np.zeros((3, 2)), (3, 4), 1e4, r"axes_dim=\(3, 4\); allowed: even"),
        (np.zeros((3, 2)), (2, 2, 2), 1e4, r"positions of shape \(3, 2\); expected \[T, 3\]"),
        (np.zeros((3, 2)), (2, 4), 0.0, "theta=0.0; allowed: > 0"),
    ],
)
def test_rotary_refuses(positions, axes_dim, theta, words):
    with pytest.raises(ValueError, match=words):
        rotary_angles(positions, axes_dim, theta)


def test_rms_norm_is_float32():
    x = np.random.default_rng(2).normal(size=(2, 3, 5))
    scale = np.linspace(0.5, 2, 5)
    expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale
    got = rms_norm(jnp.asarray(x, jnp.float32), jnp.asarray(scale, jnp.float32))
    np.testing.assert_allclose(got, expected, rtol=2e-6)
    assert rms_norm(jnp.asarray(x, jnp.bfloat16), jnp.asarray(scale, jnp.bfloat16)).dtype == jnp.float32


# ---- as a model of difax ---------------------------------------------------------------------------------------


@functools.cache
def tiny() -> Any:
    """(model, params, network)"""
    model = flux(**TINY)
    return model, randomise(jax.eval_shape(model.init, jax.random.key(0))), compiled(model)


def conditions(model: Any, batch: int, seed: int = 0) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    return {k: jnp.asarray(rng.normal(size=(batch, *s.shape)), s.dtype) for k, s in model.cond.items()}


def test_init_makes_the_parameters_and_starts_from_zero():
    model, _, network = tiny()
    params = jax.jit(model.init)(jax.random.key(0))
    x = jnp.ones((2, *model.input_shape))
    np.testing.assert_array_equal(network(params, x, jnp.ones(2), conditions(model, 2)), jnp.zeros_like(x))
    np.testing.assert_array_equal(params["double"]["txt"]["q_norm"], 1)
    assert params["single"]["linear1"]["kernel"].std() > 0.1


def test_each_branch_attends_once_over_text_and_image():
    model, params, _ = tiny()
    x = jax.ShapeDtypeStruct((2, *model.input_shape), jnp.float32)
    spec = trunk_spec(model, params, x, conditions(model, 2))
    attends = {(s, b): call for s, branches in spec.attention.items() for b, call in branches.items()}
    assert attends.pop(("double", "mlp")) is None
    calls = [call for call in attends.values() if call is not None]
    assert [call.q.shape for call in calls] == 2 * [(2, 3 + 6, 2, 6)]
    shapes = {"txt": (2, 3, 12), "img": (2, 6, 12)}
    assert jax.tree.map(jnp.shape, spec.tokens) == shapes
    for branches in spec.update.values():
        assert all(jax.tree.map(jnp.shape, update) == shapes for update in branches.values())


def test_text_is_a_set():
    """All text tokens stand at position 0: their order says nothing; that of the latents does."""
    model, params, network = tiny()
    x = jnp.asarray(np.random.default_rng(3).normal(size=(2, *model.input_shape)), jnp.float32)
    cond, time = conditions(model, 2), jnp.full(2, 500.0)
    output = network(params, x, time, cond)
    turned = network(params, x, time, {**cond, "text": cond["text"][:, ::-1]})
    np.testing.assert_allclose(turned, output, atol=2e-6)
    mirrored = network(params, x[:, ::-1], time, cond)[:, ::-1]
    assert jnp.abs(mirrored - output).max() > 1e-2


def test_null_replaces_text_and_pooled_only():
    model, _, _ = tiny()
    cond = conditions(model, 2)
    null = model.null(cond)
    assert jax.tree.structure(null) == jax.tree.structure(cond)
    for name, source in {"text": "null_text", "pooled": "null_pooled", "guidance": "guidance"}.items():
        assert null[name] is cond[source]


@pytest.mark.slow
def test_bfloat16_is_near_float32():
    model, params, network = tiny()
    half = compiled(flux(**TINY, dtype="bfloat16"))
    x = jnp.asarray(np.random.default_rng(4).normal(size=(2, *model.input_shape)), jnp.float32)
    cond, time = conditions(model, 2), jnp.array([900.0, 100.0])
    output = network(params, x, time, cond)
    rounded = half(jax.tree.map(lambda a: a.astype(jnp.bfloat16), params), x, time, cond)
    assert rounded.dtype == jnp.bfloat16 and bool(jnp.isfinite(rounded).all())
    error = jnp.linalg.norm(rounded.astype(jnp.float32) - output) / jnp.linalg.norm(output)
    print(f"bfloat16: relative error {error:.1e}")
    assert error < 0.05


@pytest.mark.parametrize("guide", ["none", "cfg"])
def test_sampler_integrates_the_velocity(guide):
    """Two Euler steps of the sampler against the same written out with the plain network."""
    model, params, network = tiny()
    process, scale = PROCESSES["flow"](shift=3.0), 2.0
    times = make_times(GRIDS["shifted"](), process, 2)
    rows = make_rows(SOLVERS["euler"](), GUIDES[guide](), process, times)
    cond = conditions(model, 2)
    keys = noise.sample_keys(0, 2)
    x = initial_noise(process, keys, model.input_shape)
    expected = x
    for now, then in zip(times, times[1:], strict=False):
        time = jnp.full(2, 1000.0 * now)
        velocity = network(params, expected, time, cond)
        if guide == "cfg":
            off = network(params, expected, time, model.null(cond))
            assert jnp.abs(off - velocity).max() > 1e-2
            velocity = off + scale * (velocity - off)
        expected = expected + (then - now) * velocity
    sampler = make_sampler(model, process, "velocity", SOLVERS["euler"](), GUIDES[guide]())
    inputs = (params, x, keys, cond, rows, scale)
    samples, trace = sampler.lower(*inputs).compile()(*inputs)
    error = float(jnp.abs(samples - expected).max() / jnp.abs(expected).max())
    print(f"sampler, {guide}: error {error:.1e}")
    assert error < 1e-5
    assert jnp.all(trace.halves == (2 if guide == "cfg" else 1))
    halves = 2 if guide == "cfg" else 1
    shapes = {name: a.shape for name, a in trace.computed.items()}
    assert shapes == {"double": (2, 1, 2, halves), "single": (2, 1, 1, halves)}


GEOMETRY_REFUSALS = {
    "variant": ({"variant": "pro"}, "unknown FLUX variant 'pro'; allowed: dev, schnell"),
    "depth": ({"single_depth": 0}, "single_depth=0; allowed: 1 or more"),
    "heads": ({"heads": 5}, "width=12 must be divisible by heads=5"),
    "axes": ({"axes_dim": (2, 2, 4)}, r"axes_dim=\(2, 2, 4\); allowed: three even .* head width 6"),
    "odd axes": ({"axes_dim": (1, 3, 2)}, r"axes_dim=\(1, 3, 2\)"),
    "theta": ({"theta": 0}, "theta=0.0; allowed: > 0"),
    "odd size": ({"size": (4, 5)}, "size=4x5; allowed: even"),
    "dtype": ({"dtype": "float16"}, "dtype=float16; allowed: float32, bfloat16"),
}


@pytest.mark.parametrize("case", GEOMETRY_REFUSALS)
def test_geometry_is_refused(case):
    overrides, words = GEOMETRY_REFUSALS[case]
    with pytest.raises(ValueError, match=words):
        flux(**(TINY | overrides))


# ---- layouts: refusals, and what `Source` needs for them -------------------------------------------------------


def _put(name: str, *shape: int) -> Any:
    return lambda t: t.update({name: np.ones(shape, np.float16)})


def _drop_block(t: Any) -> None:
    for name in [n for n in t if n.startswith("single_blocks.1.")]:
        del t[name]


PROJ_MLP = "single_transformer_blocks.2.proj_mlp.weight"
REFUSALS: dict[str, Any] = {
    "missing": ("original", lambda t: t.pop("txt_in.bias"), {}, ["'txt_in.bias'", "ends/txt/bias", "missing"]),
    "missing first": ("diffusers", lambda t: t.pop("x_embedder.weight"), {}, ["'x_embedder.weight'", "missing"]),
    "missing block": ("original", _drop_block, {}, ["'single_blocks.1.", "and 7 more"]),
    "half a guidance embedding": (
        "original",
        lambda t: t.pop("guidance_in.in_layer.weight"),
        {},
        ["'guidance_in.in_layer.weight'", "missing"],
    ),
    "surplus": ("original", _put("controlnet.weight", 2, 2), {}, ["surplus tensor 'controlnet.weight'", "(2, 2)"]),
    "guidance not wanted": ("original", None, {"guidance_embedding": False}, ["surplus tensor 'guidance_in."]),
    "fewer layers asked": ("diffusers", None, {"double_depth": 1}, ["surplus tensor 'transformer_blocks.1."]),
    "wrong shape": (
        "original",
        _put("double_blocks.1.txt_attn.qkv.weight", 59, 20),
        {},
        ["'double_blocks.1.txt_attn.qkv.weight'", "wrong shape (59, 20)", "expected (60, 20)"],
    ),
    "wrong shape of a narrow part": (
        "diffusers",
        _put("single_transformer_blocks.2.attn.to_v.weight", 80, 20),
        {},
        ["to_v.weight' (for single/linear1/kernel) has the wrong shape (80, 20)", "expected (20, 20)"],
    ),
    "wrong shape of the wide part": (
        "diffusers",
        _put(PROJ_MLP, 20, 20),
        {},
        [f"'{PROJ_MLP}' (for single/linear1/kernel) has the wrong shape (20, 20)", "expected (80, 20)"],
    ),
    "another input than output": (
        "original",
        _put("img_in.weight", 20, 32),
        {},
        ["takes 32 features a token and emits 16", "relatives"],
    ),
    "no rotary sections": ("original", None, {"axes_dim": None}, ["head width of 10", "give axes_dim="]),
    "unknown layout": ("original", None, {"layout": "diffuser"}, ["'diffuser'", "nearest: 'diffusers'"]),
    "the other layout": ("original", None, {"layout": "diffusers"}, ["'x_embedder.weight'", "missing"]),
    "unknown argument": ("original", None, {"head": 2}, ["'head'", "nearest: 'heads'"]),
    "no FLUX": ("original", lambda t: [t.clear(), _put("lm_head.weight", 4)(t)], {}, ["lm_head.weight"]),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refuses(tmp_path, case):
    layout, edit, arguments, words = REFUSALS[case]
    tensors = load_file(weights(layout))
    if edit is not None:
        edit(tensors)
    save_file(tensors, tmp_path / "flux.safetensors")
    arguments = {k: v for k, v in (GIVEN | arguments).items() if v is not None}
    with pytest.raises(ValueError) as error:
        load_flux(tmp_path / "flux.safetensors", **arguments)
    for word in words:
        assert word in str(error.value)


def test_diffusers_config_gives_the_rotary_sections(tmp_path):
    save_file(load_file(weights("diffusers")), tmp_path / "diffusion_pytorch_model.safetensors")
    config = {"_class_name": "FluxTransformer2DModel", "patch_size": 1, "axes_dims_rope": [2, 2, 6]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model, _ = load_flux(tmp_path, size=(8, 12))
    assert model.stages[0].block.config.axes_dim == (2, 2, 6)
    (tmp_path / "config.json").write_text(json.dumps(config | {"_class_name": "SD3Transformer2DModel"}))
    with pytest.raises(ValueError, match="_class_name='SD3Transformer2DModel'; allowed: FluxTransformer2DModel"):
        load_flux(tmp_path)


def test_tables_name_every_parameter():
    for guidance in (True, False):
        model = flux(**TINY, guidance_embedding=guidance)
        spec = jax.tree_util.tree_leaves_with_path(jax.eval_shape(model.init, jax.random.key(0)))
        paths = {jax.tree_util.keystr(p, simple=True, separator="/") for p, _ in spec}
        for layout in LAYOUTS:
            assert set(layout_table(layout, guidance)) == paths
    assert layout_table("diffusers", mlp_ratio=3)["single/linear1/bias"].widths == (1, 1, 1, 3)
    with pytest.raises(ValueError, match="unknown layout 'orignal'.*nearest: 'original'"):
        layout_table("orignal")


def test_source_joins_unequal_parts_and_reorders_pieces(tmp_path):
    a, b = np.arange(6.0, dtype=np.float32).reshape(2, 3), 10 + np.arange(12.0, dtype=np.float32).reshape(4, 3)
    save_file({"a.0": a, "a.1": -a, "b.0": b, "b.1": -b, "swap": b}, tmp_path / "x.safetensors")
    spec = {"w": jax.ShapeDtypeStruct((2, 3, 6), "float32"), "s": jax.ShapeDtypeStruct((3, 4), "float32")}

    def read(joined: Source, swapped: Source) -> Any:
        return load_safetensors(tmp_path / "x.safetensors", spec, {"w": joined, "s": swapped}, {"i": 2})

    joined, swapped = Source(("a.{i}", "b.{i}"), (1, 0), widths=(1, 2)), Source(("swap",), (1, 0), order=(1, 0))
    params = read(joined, swapped)
    np.testing.assert_array_equal(params["w"], [[*s] for s in (np.vstack([a, b]).T, -np.vstack([a, b]).T)])
    np.testing.assert_array_equal(params["s"], np.vstack([b[2:], b[:2]]).T)
    with pytest.raises(ValueError, match=r"w: 2 tensors of widths \(1, 3\) do not add up to 6"):
        read(joined._replace(widths=(1, 3)), swapped)
    with pytest.raises(ValueError, match=r"'a.0' \(for w\) has the wrong shape \(2, 3\); expected \(3, 3\)"):
        read(joined._replace(widths=None), swapped)
    for order in ((0, 0), (0, 1, 2)):
        with pytest.raises(ValueError, match=r"s: order=.* does not name each equal piece of 4 features once"):
            read(joined, swapped._replace(order=order))


# ---- configurations --------------------------------------------------------------------------------------------


def test_configurations_build_their_models():
    shifts = {}
    for module, arg in ((flux_dev, "1024"), (flux_dev, "256"), (flux_schnell, "768x1360"), (flux_tiny, "")):
        config = (module.get_config(arg) if arg else module.get_config()).to_dict()
        section = dict(config["model"])
        assert section.pop("name") == "flux"
        model = flux(**section)
        process = make_process(config["process"], model)
        times = make_times(GRIDS[config["grid"]["name"]](), process, config["steps"])
        assert times[0] == 1 and times[-1] == 0
        shifts[f"{model.name}:{arg}"] = (model.input_shape, process.shift, config["steps"])
    # exp of 0.5 at 256 tokens and 1.15 at 4096 (black-forest-labs/flux, src/flux/sampling.py); schnell is not shifted
    assert shifts["flux-dev:1024"] == ((128, 128, 16), pytest.approx(np.exp(1.15)), 28)
    assert shifts["flux-dev:256"] == ((32, 32, 16), pytest.approx(np.exp(0.5)), 28)
    assert shifts["flux-schnell:768x1360"] == ((96, 170, 16), 1.0, 4)
    for arg, words in {"1000": "1000", "wide": "wide", "1024x": "1024x"}.items():
        with pytest.raises(ValueError, match=f"config flux_dev:{words}; allowed"):
            flux_dev.get_config(arg)


# ---- live, with the `parity` extra -----------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["dev", "schnell"])
def test_matches_diffusers_live(tmp_path, variant):
    """A model of another geometry than the golden one, saved by diffusers itself in shards with its config.json."""
    pytest.importorskip("torch", reason="needs the parity extra (torch, diffusers)")
    diffusers = pytest.importorskip("diffusers", reason="needs the parity extra (torch, diffusers)")
    spec = importlib.util.spec_from_file_location("make_flux", GOLDEN / "make_flux.py")
    assert spec is not None and spec.loader is not None
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    reference = diffusers.FluxTransformer2DModel(
        in_channels=8,
        num_layers=3,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=20,
        pooled_projection_dim=24,
        guidance_embeds=variant == "dev",
        axes_dims_rope=(4, 6, 6),
    )
    reference = reference.eval().requires_grad_(False)
    make.randomise(reference, seed=2)
    run = make.run(reference, (10, 6), 7, (0.9, 0.5, 0.1), (2.0, 5.0, 8.0), seed=3)
    run = {name: np.asarray(a) for name, a in run.items()}
    state = {name: a.clone() for name, a in reference.state_dict().items()}
    reference.save_pretrained(tmp_path / "diffusers", max_shard_size="200KB")
    assert len(list((tmp_path / "diffusers").glob("*.safetensors"))) > 1
    original = make.to_original(state, 3, 1)
    make.check_conversion(original, state, width=48)
    save_file({name: a.numpy() for name, a in original.items()}, tmp_path / "original.safetensors")
    model, params = load_flux(tmp_path / "diffusers", size=(10, 6))
    assert ("guidance" in model.cond) == (variant == "dev")
    errors = relative_errors(compiled(model), params, run)
    print(f"{variant}, live: " + ", ".join(f"t={t:.1f}: {e:.1e}" for t, e in zip(run["t"], errors, strict=True)))
    assert errors.max() <= TOLERANCE
    _, same = load_flux(tmp_path / "original.safetensors", size=(10, 6), axes_dim=(4, 6, 6))
    jax.tree.map(np.testing.assert_array_equal, params, same)
