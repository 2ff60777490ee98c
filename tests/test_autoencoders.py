"""Autoencoders of images against diffusers, the layouts of their files, and tiles.

The golden files (tests/golden/make_autoencoders.py) hold tiny random autoencoders of each class and variant, and what
diffusers makes of latents and pixels with them, whole and tile by tile.
"""

import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from difax.core.contracts import Autoencoder, Segments
from difax.core.ops import attend, attend_by_rows
from difax.core.placement import Axes, make_placement, placed
from difax.models.autoencoders import find_autoencoder
from difax.models.autoencoders.kl import autoencoder_kl, autoencoder_kl_flux2
from difax.models.autoencoders.kl_checkpoint import NAMES, layout_table
from difax.models.autoencoders.tiles import tiled, tiled_as_diffusers
from difax.models.autoencoders.tiny import autoencoder_tiny
from difax.weights.published import load_foreign
from tests.families import some
from tests.golden.make_autoencoders import CASES, PALER, original_name
from tests.toys import randomise

GOLDEN = Path(__file__).parent / "golden"
PIPELINES = Path(__file__).parents[2] / "shared" / "pipelines"
TOLERANCE = 1e-4  # of the largest value


@pytest.fixture(scope="module")
def golden():
    """{case: (config, weights by diffusers' names, arrays channels-last)}."""
    arrays = load_file(GOLDEN / "autoencoders.safetensors") | load_file(GOLDEN / "autoencoders_tiled.safetensors")
    with safe_open(GOLDEN / "autoencoders.safetensors", "np") as file:
        configs = {name: json.loads(text) for name, text in file.metadata().items()}
    return {
        name: (
            config,
            {k.split("/", 2)[2]: a for k, a in arrays.items() if k.startswith(f"{name}/weights/")},
            {k.split("/")[1]: a.transpose(0, 2, 3, 1) for k, a in arrays.items() if re.fullmatch(f"{name}/[a-z_]+", k)},
        )
        for name, config in configs.items()
    }


def written(folder, weights, config=None, name="diffusion_pytorch_model.safetensors"):
    """A folder as diffusers saves one."""
    folder.mkdir(exist_ok=True)
    save_file({k: np.ascontiguousarray(a) for k, a in weights.items()}, folder / name)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def opened(folder, **overrides):
    found = find_autoencoder(folder, **overrides)
    return found.model, load_foreign(folder, found)


def error(found, expected) -> float:
    found = np.asarray(found, np.float32)
    assert found.shape == expected.shape and np.isfinite(found).all()
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("case", some(CASES, "kl", "flux2", "tiny"))
def test_decodes_and_encodes_as_diffusers_does(golden, case, tmp_path):
    config, weights, arrays = golden[case]
    model, params = opened(written(tmp_path / "vae", weights, config))
    decoded = jax.jit(model.decode)(params, arrays["latents"])
    encoded = jax.jit(model.encode)(params, arrays["pixels"])
    errors = error(decoded, arrays["decoded"]), error(encoded, arrays["encoded"])
    print(f"{case}: decoded {errors[0]:.1e}, encoded {errors[1]:.1e}")
    assert max(errors) <= TOLERANCE
    h, w, c = arrays["latents"].shape[1:]
    assert arrays["pixels"].shape[1:3] == (h * model.side, w * model.side) and c == model.channels


def _scaled(config):
    config["scaling_factor"] *= 1.01


def _old_eps(config):
    config["batch_norm_eps"] = 1e-4


def _groups(config):
    config["norm_num_groups"] = 1


def _relu(config):
    config["act_fn"] = "relu"


@pytest.mark.parametrize(
    ("case", "edit"), [("kl_means", _scaled), ("kl", _groups), ("flux2", _old_eps), ("tiny_mish", _relu)]
)
@pytest.mark.slow
def test_another_config_is_another_function(golden, case, edit, tmp_path):
    """The comparison can fail: every number that stands in config.json alone is taken from there."""
    config, weights, arrays = golden[case]
    config = dict(config)
    edit(config)
    model, params = opened(written(tmp_path / "vae", weights, config))
    assert error(jax.jit(model.decode)(params, arrays["latents"]), arrays["decoded"]) > 1e-3


RECORDED = ("dit", "flux_dev", "pixart_sigma", "sd3", "z_image", "sd15")


@pytest.mark.parametrize("name", RECORDED)
@pytest.mark.slow
def test_decodes_as_the_recorded_run_did(name):
    folder = PIPELINES / name
    if not folder.is_dir():
        pytest.skip("the recorded pipelines are not here")
    found = find_autoencoder(folder / "vae")
    params, run, said = load_foreign(folder / "vae", found), np.load(folder / "run.npz"), found.geometry
    z, out = (run[f"decode/0/{part}"].transpose(0, 2, 3, 1) for part in ("in", "out"))
    # what was recorded is behind the pipeline's own scale
    latents = (z - said.get("shift_factor", 0.0)) * said["scaling_factor"]
    found_error = error(jax.jit(found.model.decode)(params, latents), out)
    print(f"{name}: {found_error:.1e}")
    assert found_error <= TOLERANCE


# ---------------------------------------------------------------- files


def _original(weights, config):
    levels = len(config["block_out_channels"])
    flux2 = config["_class_name"] == "AutoencoderKLFlux2"
    named = {original_name(k, levels, flux2): a for k, a in weights.items()}
    products = re.compile(r"attn_1\.(q|k|v|proj_out)\.weight")
    return {k: a[..., None, None] if products.search(k) else a for k, a in named.items()}


def _old_attention(weights, config):
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for new, old in names.items():
        weights = {k.replace(f".{new}.", f".{old}."): a for k, a in weights.items()}
    return weights


def _below(prefix):
    def rename(weights, config):
        others = {"model.diffusion_model.input_blocks.0.0.weight": np.zeros((4, 4), np.float32)}
        return {prefix + k: a for k, a in _original(weights, config).items()} | others

    return rename


LAYOUTS = {
    "old attention": ("kl", _old_attention),
    "original": ("kl", _original),
    "original without 1 x 1": ("kl_shift", _original),
    "FLUX.2's original": ("flux2", _original),
    "in a whole checkpoint": ("kl", _below("first_stage_model.")),
    "below vae": ("kl_shift", _below("vae.")),
}


@pytest.mark.parametrize("layout", some(LAYOUTS, "FLUX.2's original", "in a whole checkpoint"))
def test_every_layout_gives_the_same_parameters(golden, layout, tmp_path):
    case, rename = LAYOUTS[layout]
    config, weights, _ = golden[case]
    model, params = opened(written(tmp_path / "a", weights, config))
    other, others = opened(written(tmp_path / "b", rename(weights, config), config))
    jax.tree.map(np.testing.assert_array_equal, params, others)
    assert (model.name, model.side, model.channels) == (other.name, other.side, other.channels)


def test_files_of_other_types_and_in_parts(golden, tmp_path):
    """float16, two shards with an index, keys that have their default left out, and unknown ones."""
    config, weights, _ = golden["kl"]
    model, params = opened(written(tmp_path / "whole", weights, config))
    folder, names = tmp_path / "parts", sorted(weights)
    files = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, some_names in files.items():
        written(folder, {k: weights[k].astype(np.float16) for k in some_names}, name=file)
    index = {"weight_map": {k: file for file, some_names in files.items() for k in some_names}}
    (folder / "diffusion_pytorch_model.fp16.safetensors.index.json").write_text(json.dumps(index))
    defaults = {"scaling_factor": 0.18215, "latent_channels": 4, "act_fn": "silu", "use_quant_conv": True}
    assert all(config[k] == v for k, v in defaults.items())
    kept = {k: v for k, v in config.items() if k not in defaults and v is not None} | {"_name_or_path": "x", "new": [1]}
    (folder / "config.json").write_text(json.dumps(kept))
    halves, half_params = opened(folder)
    assert halves.name == model.name and jax.tree.leaves(half_params)[0].dtype == jnp.float16
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a.astype(jnp.float16), b), params, half_params)
    assert find_autoencoder(folder).geometry == find_autoencoder(tmp_path / "whole").geometry


def test_the_same_weights_under_other_names_beside_them(golden, tmp_path):
    """As the folders of TAESD and of SDXL's autoencoder have them."""
    config, weights, _ = golden["tiny"]
    model, params = opened(written(tmp_path / "vae", weights, config))
    for half in ("encoder", "decoder"):
        some = {k.removeprefix(f"{half}.layers."): 2 * a for k, a in weights.items() if k.startswith(half)}
        written(tmp_path / "vae", some, name=f"taesd_{half}.safetensors")
    other, others = opened(tmp_path / "vae")
    jax.tree.map(np.testing.assert_array_equal, params, others)
    assert other.name == model.name


BARE = {
    # channels, prefix, layout -> what a file without a config.json stands for
    "ae.safetensors": (16, "", "original", (0.3611, 0.1159)),
    "stable diffusion 3": (16, "first_stage_model.", "original", (1.5305, 0.0609)),
    "of four channels": (4, "", "original", None),
    "of 16, by diffusers": (16, "", "diffusers", None),
}


@pytest.mark.parametrize("name", BARE)
def test_a_file_without_a_config(name, tmp_path):
    latents, prefix, layout, expected = BARE[name]
    model = autoencoder_kl((32, 32), latents=latents, layers=1, quant=False, post_quant=False)
    spec = jax.eval_shape(model.init, jax.random.key(0))
    named = _tensors_of(spec)
    if layout == "original":
        named = _original(named, {"_class_name": "AutoencoderKL", "block_out_channels": [32, 32]})
    file = written(tmp_path, {prefix + k: a for k, a in named.items()})
    if expected is None:
        with pytest.raises(ValueError, match=r"scaling_factor=.*0\.13025 of SDXL"):
            find_autoencoder(file)
        assert find_autoencoder(file, scaling_factor=0.5).geometry["scaling_factor"] == 0.5
        (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKL"}')  # all of it the class's defaults
        assert find_autoencoder(file).geometry["scaling_factor"] == 0.18215
        return
    found = find_autoencoder(file)
    assert found.kind == "AutoencoderKL" and found.model.channels == latents
    assert (found.geometry["scaling_factor"], found.geometry["shift_factor"]) == expected


def test_flux2_is_known_without_a_config(golden, tmp_path):
    config, weights, _ = golden["flux2"]
    found = find_autoencoder(written(tmp_path, _original(weights, config)), groups=2, eps=0.01)
    assert (found.kind, found.model.channels) == ("AutoencoderKLFlux2", 12)


def _tensors_of(spec):
    """Zeros under diffusers' names for the parameters of an AutoencoderKL."""
    table = layout_table(NAMES["diffusers"], (32, 32), (32, 32), 1, quant=False, post_quant=False)
    weights = {}
    leaves: dict[str, Any] = dict(flatten_dict(spec, sep="/"))
    for path, leaf in leaves.items():
        source = table[path]
        for key in source.keys:
            shape = (*leaf.shape[:-1], leaf.shape[-1] // len(source.keys))
            axes = source.axes or tuple(range(len(shape)))
            weights[key] = np.zeros([shape[axes.index(i)] for i in range(len(axes))], np.float32)
    return weights


REFUSED = {
    "an unknown class": ("kl", {"_class_name": "AutoencoderKl"}, r"unknown autoencoder 'AutoencoderKl' \(did you mean"),
    "a class of later": ("kl", {"_class_name": "AutoencoderDC"}, r"allowed: AutoencoderKL, "),
    "other blocks": (
        "kl",
        {"up_block_types": ["AttnUpDecoderBlock2D"] * 3},
        "up_block_types=.*a list, each UpDec",
    ),
    "another activation": ("kl", {"act_fn": "mish"}, "act_fn='mish'; allowed: silu or swish"),
    "other widths": ("kl", {"block_out_channels": [4, 4, 8]}, r"block_out_channels=.*allowed: \[4, 4, 6\], as the"),
    "no convolution": ("kl", {"use_quant_conv": False}, "use_quant_conv=False; allowed: True, as the"),
    "a scale of nothing": ("kl", {"scaling_factor": 0}, "scaling_factor=0; allowed: a number, > 0"),
    "means of another number": ("kl", {"latents_mean": [0.0, 1.0]}, "latents_mean of 2 numbers; allowed: 4"),
    "groups that do not divide": ("kl", {"norm_num_groups": 4}, r"widths=\(4, 4, 6\); allowed: each divisible by gro"),
    "larger patches": ("flux2", {"patch_size": [4, 4]}, r"patch_size=\[4, 4\]; allowed"),
    "another upsampling": ("tiny", {"upsample_fn": "bilinear"}, "upsample_fn='bilinear'; allowed: nearest"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_honoured_is_refused(golden, name, tmp_path):
    case, change, message = REFUSED[name]
    config, weights, _ = golden[case]
    folder = written(tmp_path / "vae", weights, config | change)
    with pytest.raises(ValueError, match=message):
        find_autoencoder(folder)


def test_surplus_and_missing_tensors_are_named(golden, tmp_path):
    config, weights, _ = golden["kl"]
    more = written(
        tmp_path / "more", weights | {"encoder.mid_block.attentions.1.to_q.weight": weights["quant_conv.bias"]}, config
    )
    with pytest.raises(ValueError, match="surplus tensor 'encoder.mid_block.attentions.1"):
        opened(more)
    less = written(tmp_path / "less", {k: a for k, a in weights.items() if k != "decoder.conv_out.bias"}, config)
    with pytest.raises(ValueError, match="tensor 'decoder.conv_out.bias'.*is missing"):
        opened(less)


FACTORIES = {
    "widths": (
        autoencoder_kl,
        dict(widths=(8, 12), groups=8),
        r"widths=\(8, 12\); allowed: each divisible by groups=8",
    ),
    "no widths": (autoencoder_kl, dict(widths=()), r"widths=\(\); allowed: 1 to 10"),
    "scale": (autoencoder_kl, dict(scaling_factor=0.0), r"scaling_factor=0.0; allowed: a number, but not 0"),
    "deviation": (autoencoder_kl, dict(latents_std=(1.0, 0.0, 1.0, 1.0)), "latents_std=.*allowed: numbers > 0"),
    "layers": (autoencoder_kl, dict(layers=0), "layers=0; allowed: 1 or more"),
    "decoder": (autoencoder_kl_flux2, dict(decoder_widths=(32, 32)), r"decoder_widths=\(32, 32\); allowed: 4 of them"),
    "dtype": (autoencoder_kl_flux2, dict(dtype="float16"), "dtype=float16; allowed: float32, bfloat16"),
    "stages": (autoencoder_tiny, dict(decoder_blocks=(1, 1)), r"decoder_blocks=\(1, 1\); allowed: 4 stages"),
    "activation": (autoencoder_tiny, dict(activation="reluu"), r"unknown activation 'reluu' \(did you mean relu"),
}


@pytest.mark.parametrize("name", FACTORIES)
def test_factories_refuse_by_name(name):
    factory, arguments, message = FACTORIES[name]
    with pytest.raises(ValueError, match=message):
        factory(**arguments)


def test_bfloat16_runs(golden, tmp_path):
    config, weights, arrays = golden["kl_shift"]
    model, params = opened(written(tmp_path / "vae", weights, config), dtype="bfloat16")
    decoded = jax.jit(model.decode)(jax.tree.map(lambda a: a.astype(jnp.bfloat16), params), arrays["latents"])
    assert decoded.dtype == jnp.float32 and model.dtype == jnp.bfloat16
    assert 1e-4 < error(decoded, arrays["decoded"]) < 0.1


SIZES = {
    # (side, channels, parameters) of the published ones, counted by diffusers
    "FLUX.1": (lambda: autoencoder_kl(latents=16, quant=False, post_quant=False), (8, 16, 83_819_683)),
    "Stable Diffusion": (autoencoder_kl, (8, 4, 83_653_863)),
    "FLUX.2": (autoencoder_kl_flux2, (16, 128, 84_046_371)),
    "TAESD": (autoencoder_tiny, (8, 4, 2_445_063)),
}


@pytest.mark.parametrize("name", some(SIZES, "FLUX.2"))
def test_published_sizes_as_shapes(name):
    make, expected = SIZES[name]
    model = make()
    spec = jax.eval_shape(model.init, jax.random.key(0))
    assert (model.side, model.channels, sum(a.size for a in jax.tree.leaves(spec))) == expected


@pytest.mark.parametrize("masked", [False, True])
def test_attention_by_rows_is_attention(masked):
    q, k, v = (jax.random.normal(jax.random.key(i), (2, 11, 1, 6)) for i in range(3))
    ids = Segments(jnp.arange(22).reshape(2, 11) % 3, jnp.arange(22).reshape(2, 11) % 2) if masked else None
    np.testing.assert_allclose(attend_by_rows(q, k, v, ids, rows=4), attend(q, k, v, ids), atol=1e-6)
    # a part of the logits at a time: nothing of 11 x 11 elements a sample
    text = jax.jit(lambda q, k, v: attend_by_rows(q, k, v, rows=4)).lower(q, k, v).as_text()
    assert "x4x11xf32" in text and "x11x11xf32" not in text


# ---------------------------------------------------------------- tiles


CASES_TILED = ("kl_shift decode", "kl_shift encode", "flux2 decode", "flux2 encode")


@pytest.mark.parametrize("case", some(CASES_TILED, CASES_TILED[0]))
def test_tiles_as_diffusers_has_them(golden, case, tmp_path):
    """Tiles of the default size: inner ones, cut ones and corners."""
    name, half = case.split()
    config, weights, arrays = golden[name]
    folder = written(tmp_path / "vae", weights, config)
    found = find_autoencoder(folder)
    params, model = load_foreign(folder, found), tiled_as_diffusers(found, at_once=2)
    x = arrays["tiled_latents" if half == "decode" else "tiled_pixels"]
    tiles, whole = (error(jax.jit(getattr(m, half))(params, x), arrays[f"tiled_{half}d"]) for m in (model, found.model))
    print(f"{case}: {tiles:.1e}; the whole differs by {whole:.1e}")
    assert tiles <= TOLERANCE < 1e-2 < whole


@pytest.mark.slow
def test_tiles_of_wan_as_diffusers_has_them():
    """A causal autoencoder of videos: one frame, with nothing that the reference would clip."""
    arrays = load_file(GOLDEN / "autoencoders_tiled.safetensors")
    z, out = (arrays[f"wan/tiled_{part}"].transpose(0, 2, 3, 1)[:, None] for part in ("latents", "decoded"))
    model, params = opened(GOLDEN / "pipeline_wan" / "vae")
    params["decoder"]["conv_out"] = jax.tree.map(lambda a: PALER * a, params["decoder"]["conv_out"])
    found = jax.jit(tiled(model, 4, 1, like="diffusers").decode)(params, z)
    print(f"{error(found, out):.1e}")
    assert error(found, out) <= TOLERANCE < error(jax.jit(model.decode)(params, z), out)


@pytest.mark.slow
def test_parts_in_time_of_wan_are_the_whole():
    """Where what is thrown away reaches as far back as it looks, which is far: it has a way of its own, `chunk`."""
    model, params = opened(GOLDEN / "pipeline_wan" / "vae")
    z = jax.random.normal(jax.random.key(0), (1, 40, 2, 2, 4))
    whole = np.asarray(jax.jit(model.decode)(params, z))
    errors = []
    for frames, before in ((36, 32), (8, 2)):
        cut = tiled(model, 2, 0, frames=frames, frames_before=before)
        errors.append(error(jax.jit(cut.decode)(params, z), whole))
    print(errors)
    assert errors[0] < 1e-5 < 1e-3 < errors[1]


REACH = 7  # latents that the small coders' convolutions see: 4 of the latents' size and 5 of half of it


@pytest.fixture(scope="module")
def local():
    """A network without norms and attention, its parameters, latents and pixels."""
    model = autoencoder_tiny(4, encoder_blocks=(1, 1), decoder_blocks=(1, 1), latents=2)
    params = randomise(jax.eval_shape(model.init, jax.random.key(0)))
    latents = jax.random.normal(jax.random.key(1), (2, 34, 31, 2))
    return model, params, latents, jax.random.uniform(jax.random.key(2), (2, 68, 62, 3), minval=-1.0)


def difference(found, expected) -> np.ndarray:
    """By place, over the largest value."""
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape
    return np.abs(found - expected).max((0, -1)) / np.abs(expected).max()


@pytest.mark.parametrize("half", some(["decode", "encode"], "decode"))
def test_tiles_of_a_local_network_are_the_whole(local, half):
    """With a margin as wide as the convolutions reach; with a smaller one the seams show, and nothing else."""
    model, params, latents, pixels = local
    x = latents if half == "decode" else pixels
    run = lambda ae: jax.jit(getattr(ae, half))(params, x)  # noqa: E731
    whole = run(model)
    assert difference(run(tiled(model, 24, 4, margin=REACH, at_once=3)), whole).max() < 1e-6
    seams = difference(run(tiled(model, 24, 4, at_once=2)), whole)
    # tiles begin at 0 and 20, of which the last is pulled back to 10 and 7; zones at 20 ... 24; tile 0 ends at 24
    rows, columns = np.arange(34)[:, None], np.arange(31)[None]
    exact = ~((24 - REACH <= rows) & (rows < 24) | (24 - REACH <= columns) & (columns < 24))
    exact = exact if half == "encode" else exact.repeat(2, 0).repeat(2, 1)
    assert seams[exact].max() < 1e-6 < 1e-4 < seams.max()


def test_a_picture_that_fits_is_taken_whole(local):
    model, params, latents, _ = local
    seen = []
    tiled(model._replace(decode=lambda params, x: seen.append(x) or x), 34).decode(params, latents)
    assert seen[-1] is latents and len(seen) == 2  # once for the shapes


def test_tiles_of_a_size_are_one_program_in_the_memory_of_a_tile(local):
    model, params, _, _ = local
    traced = []

    def decode(params, latents):
        traced.append(latents.shape)
        return model.decode(params, latents)

    latents = jnp.zeros((1, 100, 90, 2))
    cut = tiled(model._replace(decode=decode), 16, 4, at_once=2)
    small = jax.jit(cut.decode).lower(params, latents).compile().memory_analysis()
    assert sorted(traced) == [(1, 100, 90, 2), (2, 16, 16, 2)]
    whole = jax.jit(model.decode).lower(params, latents).compile().memory_analysis()
    assert small is not None and whole is not None
    assert small.temp_size_in_bytes < whole.temp_size_in_bytes / 4


@pytest.mark.parametrize("axes", some([Axes(data=8), Axes(data=2, seq=2, tensor=2)], Axes(data=8)), ids=str)
def test_a_mesh_divides_the_tiles(local, axes):
    model, params, latents, _ = local
    cut, latents = tiled(model, 14, 4, at_once=8), latents[:1]
    one = jax.jit(cut.decode)(params, latents)
    with placed(make_placement(axes, jax.devices())):
        # a function of its own: a program that was traced elsewhere would be taken from jit's memory
        program = jax.jit(lambda params, latents: cut.decode(params, latents)).lower(params, latents).compile()
    np.testing.assert_allclose(program(params, latents), one, atol=1e-6)
    convolutions = re.findall(r"f32\[(\d+),28,28,\d+\]\S* convolution", program.as_text() or "")
    assert convolutions and set(convolutions) == {"1"}


def causal() -> Autoencoder:
    """A video autoencoder that looks three latents back; the first latent is one frame, every other two."""

    def back(x: jax.Array, weights: tuple[float, ...]) -> Any:
        padded = jnp.pad(x, ((0, 0), (len(weights) - 1, 0), *((0, 0),) * 3))
        return sum(w * padded[:, len(weights) - 1 - i :][:, : x.shape[1]] for i, w in enumerate(weights))

    def decode(params, z):
        h = back(z, (1.0, 0.5, -0.3, 0.2))
        later = jnp.stack([h[:, 1:], back(h, (0.7,))[:, 1:] ** 2], 2).reshape(len(z), -1, *z.shape[2:])
        return jnp.concatenate([2 * h[:, :1], later], 1)

    def encode(params, x):
        first, later = x[:, :1], x[:, 1:].reshape(len(x), -1, 2, *x.shape[2:])
        return back(jnp.concatenate([3 * first, later[:, :, 0] - 0.1 * later[:, :, 1] ** 2], 1), (1.0, 0.5, -0.3, 0.2))

    return Autoencoder("causal", lambda key: {}, decode, encode, side=1, time=2, channels=3)


@pytest.mark.parametrize("half", some(["decode", "encode"], "decode"))
def test_parts_in_time_of_a_causal_network_are_the_whole(half):
    """Where what is thrown away reaches as far back as the network looks: 3 latents, and 1 more of the encoder's first
    frame, which it takes for that of all."""
    model, reach = causal(), 3 if half == "decode" else 4
    frames = 14 if half == "decode" else 27
    x = jax.random.normal(jax.random.key(0), (2, frames, 5, 4, 3))
    run = lambda ae: getattr(ae, half)({}, x)  # noqa: E731
    whole = run(model)
    for overlap in (0, 1):
        cut = tiled(model, 4, 0, frames=6, frames_before=reach, frames_overlap=overlap)
        np.testing.assert_allclose(run(cut), whole, atol=1e-6)
    near = np.abs(run(tiled(model, 4, 0, frames=6)) - whole).max((0, 2, 3, 4))
    assert near[:6].max() < 1e-6 < 1e-2 < near[6:].max()


TILES = {
    "a tile of nothing": (dict(tile=0), "tile=0; allowed: 1 or more"),
    "an overlap of more than half": (dict(tile=16, overlap=9), "tile=16; allowed: 18 or more"),
    "margins that leave nothing": (dict(tile=16, overlap=0, margin=8), "tile=16; allowed: 17 or more"),
    "frames of a picture": (dict(frames=4), "frames=4 of autoencoder_tiny-4; allowed: none, it is one of pictures"),
    "a margin that diffusers lacks": (dict(margin=1, like="diffusers"), "like=diffusers with margin or frames"),
    "another manner": (dict(like="comfy"), "like='comfy'; allowed: even, diffusers"),
}


@pytest.mark.parametrize("name", TILES)
def test_tiles_that_do_not_fit_are_refused(local, name):
    arguments, message = TILES[name]
    with pytest.raises(ValueError, match=message):
        tiled(local[0], **arguments)


def test_pixels_that_are_no_multiple_are_refused(local):
    model, params, _, pixels = local
    with pytest.raises(ValueError, match="pixels of 67 x 62; allowed: multiples of 2"):
        tiled(model, 16, 4).encode(params, pixels[:, :67])
