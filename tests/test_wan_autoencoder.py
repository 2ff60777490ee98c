"""Wan's causal autoencoders against diffusers' AutoencoderKLWan and AutoencoderKLQwenImage.

The golden files (tests/golden/make_wan_autoencoders.py) hold random weights, what the reference decodes and encodes,
and the names that the tensors have in the files of Wan-Video. The reference takes a latent at a time; here it is one
pass, or parts. Errors are printed (pytest -rP): the largest difference over the largest value.
"""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from difax.models.autoencoders.wan import STATISTICS, as_patches, averaged, from_patches, repeated, wan_autoencoder
from difax.models.autoencoders.wan_checkpoint import find_wan_autoencoder
from difax.weights.published import load_foreign
from tests.families import some
from tests.toys import randomise

GOLDEN = Path(__file__).parent / "golden"
PIPELINES = Path(__file__).parents[2] / "shared" / "pipelines"
SAID = json.loads((GOLDEN / "wan_autoencoders.json").read_text())
TOLERANCE = 1e-4
BOTH = [("2.1", 1), ("2.1", 2), ("2.1", 4), ("2.2", 1), ("2.2", 3), ("qwen", 1)]
# residual, latents, latents of a part
SMALL = [(residual, f, chunk) for residual in (False, True) for f in (1, 2, 4, 5) for chunk in (1, 2)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder of each case as diffusers saves it."""
    root = tmp_path_factory.mktemp("autoencoders")
    for case, said in SAID.items():
        (root / case).mkdir()
        (root / case / "config.json").write_text(json.dumps(said["config"]))
        weights = (GOLDEN / f"wan_autoencoder_{case}.safetensors").read_bytes()
        (root / case / "diffusion_pytorch_model.safetensors").write_bytes(weights)
    return root


@pytest.fixture(scope="module")
def opened(folders):
    """case, chunk -> (autoencoder, params, the jitted decode and encode), each made once."""
    made: dict[Any, Any] = {}

    def get(case: str, chunk: int | None = None) -> Any:
        if (case, chunk) not in made:
            found = find_wan_autoencoder(folders / case, chunk=chunk)
            params = load_foreign(folders / case, found, "float32")
            made[case, chunk] = found.model, params, jax.jit(found.model.decode), jax.jit(found.model.encode)
        return made[case, chunk]

    return get


def drawn(f: int, height: int, width: int) -> np.ndarray:
    """The pixels that the golden script encodes to f latents, [1, F, H, W, 3]."""
    x = np.random.default_rng(f).uniform(-1, 1, (1, 3, 4 * f - 3, height, width)).astype(np.float32)
    return x.transpose(0, 2, 3, 4, 1)


def error(found: Any, expected: np.ndarray) -> float:
    assert found.shape == expected.shape and np.isfinite(found).all()
    return float(np.abs(np.asarray(found, np.float32) - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("what", some(BOTH, ("2.1", 2), ("2.2", 3), ("qwen", 1)), ids=str)
def test_matches_diffusers(what, opened):
    case, f = what
    model, params, decode, encode = opened(case)
    with np.load(GOLDEN / "wan_autoencoders_run.npz") as run:
        latents, decoded, encoded = (
            run[f"{case}/{name}_{f}"].transpose(0, 2, 3, 4, 1) for name in ("latents", "decoded", "encoded")
        )
    x = drawn(f, *decoded.shape[2:4])
    if case == "qwen":  # pictures
        latents, decoded, encoded, x = (a[:, 0] for a in (latents, decoded, encoded, x))
    with jax.default_matmul_precision("highest"):
        errors = error(decode(params, latents), decoded), error(encode(params, x), encoded)
    print(f"{case}, {f} latents: decoded {errors[0]:.1e}, encoded {errors[1]:.1e}")
    assert max(errors) <= TOLERANCE
    assert decoded.shape[-3] == model.side * latents.shape[-3] and model.time == (0 if case == "qwen" else 4)


def small(residual: bool, chunk: int | None = None) -> Any:
    """Three levels that double time twice."""
    numbers = {"mean": (0.1, 0.2, 0.3, 0.4), "deviation": (1.0, 2.0, 0.5, 1.5)}
    size = {"base": 4, "decoder_base": 4, "channels": 4, "multipliers": (1, 2, 2), "depth": 1, "time": (True, True)}
    return wan_autoencoder(**size, **numbers, residual=residual, chunk=chunk)


def check_parts(
    whole: tuple[Any, Any], parts: tuple[Any, Any], params: Any, z: np.ndarray, chunk: int, tolerance: float
) -> None:
    """`whole` and `parts` are (decode, encode)."""
    pixels = np.asarray(whole[0](params, z))
    assert error(parts[0](params, z), pixels) <= tolerance
    x = np.random.default_rng(1).uniform(-1, 1, pixels.shape).astype(np.float32)
    assert error(parts[1](params, x), np.asarray(whole[1](params, x))) <= tolerance
    if z.shape[1] > chunk:  # without what is carried it is another film
        alone = np.concatenate([whole[0](params, z[:, :1])] * pixels.shape[1], 1)
        assert error(alone, pixels) > 1e-2


@pytest.mark.parametrize("what", some(SMALL, (True, 4, 2)), ids=str)
def test_parts_are_the_whole(what):
    """What is carried from part to part is all that a part needs of those before it, at every length."""
    residual, f, chunk = what
    whole, parts = small(residual), small(residual, chunk)
    params = randomise(jax.eval_shape(whole.init, jax.random.key(0)))
    z = np.random.default_rng(0).normal(size=(2, f, 2, 1, 4)).astype(np.float32)
    whole, parts = ((jax.jit(model.decode), jax.jit(model.encode)) for model in (whole, parts))
    check_parts(whole, parts, params, z, chunk, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("case", "f", "chunk"), [("2.1", 4, 1), ("2.1", 4, 2), ("2.2", 3, 1)])
def test_parts_of_published_geometry(case, f, chunk, opened):
    z = np.random.default_rng(0).normal(size=(1, f, 2, 2, 4)).astype(np.float32)
    check_parts(opened(case)[2:], opened(case, chunk)[2:], opened(case)[1], z, chunk, TOLERANCE)


def test_memory_is_that_of_a_part():
    """Of a longer film in parts more pixels are kept and nothing else; of one pass all that is between them."""
    spec = jax.eval_shape(small(False).init, jax.random.key(0))

    def needed(chunk: int | None, f: int) -> int:
        z = jax.ShapeDtypeStruct((1, f, 8, 8, 4), "float32")
        memory = jax.jit(small(False, chunk).decode).lower(spec, z).compile().memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes

    pixels = 4 * 6 * 32 * 32 * 3 * 4  # of six latents, in bytes
    short, long, whole = needed(1, 7), needed(1, 13), needed(None, 13)
    print(f"bytes in parts of 7 latents {short}, of 13 {long}; in one pass of 13 {whole}; pixels of 6 latents {pixels}")
    assert long - short <= 2 * pixels and 2 * long < whole


@pytest.mark.parametrize("case", ["2.1", "2.2"])
def test_the_names_of_wan_video(case, folders, tmp_path):
    """A file of the original names, without a config.json, is the same autoencoder but for its statistics."""
    tensors = load_file(folders / case / "diffusion_pytorch_model.safetensors")
    save_file({SAID[case]["original"][name]: t for name, t in tensors.items()}, tmp_path / "vae.safetensors")
    ours, theirs = find_wan_autoencoder(folders / case), None
    with pytest.raises(ValueError, match="channels=4 without mean and deviation"):
        find_wan_autoencoder(tmp_path / "vae.safetensors")
    statistics = {name: ours.geometry[name] for name in ("mean", "deviation")}
    theirs = find_wan_autoencoder(tmp_path / "vae.safetensors", **statistics)
    assert {**theirs.geometry, "side": 0, "frames": 0, "images": False} == {**ours.geometry, "side": 0, "frames": 0}
    assert theirs.model[4:] == ours.model[4:]
    params = [
        load_foreign(path, found) for path, found in ((folders / case, ours), (tmp_path / "vae.safetensors", theirs))
    ]
    jax.tree.map(np.testing.assert_array_equal, *params)


@pytest.mark.parametrize("variant", some(["2.1", "2.2"], "2.2"))
def test_published_sizes(variant):
    """Parameters of the published autoencoders, counted by diffusers of AutoencoderKLWan, and shapes."""
    count, side, channels = {"2.1": (126_892_531, 8, 16), "2.2": (704_688_668, 16, 48)}[variant]
    model = wan_autoencoder(variant)
    spec = jax.eval_shape(model.init, jax.random.key(0))
    assert sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(spec)) == count
    assert (model.side, model.time, model.channels) == (side, 4, channels)
    z = jax.ShapeDtypeStruct((1, 21, 4, 6, channels), "float32")
    pixels = jax.eval_shape(model.decode, spec, z)
    assert pixels.shape == (1, 81, 4 * side, 6 * side, 3)
    assert jax.eval_shape(model.encode, spec, pixels).shape == z.shape
    assert [len(numbers) for numbers in STATISTICS[channels]] == [channels, channels]


@pytest.mark.slow
def test_half_precision(opened, folders):
    """bfloat16 activations and parameters: float32 pixels near those of float32."""
    _, params, decode, encode = opened("2.1")
    half = find_wan_autoencoder(folders / "2.1", dtype="bfloat16").model
    z = np.random.default_rng(0).normal(size=(1, 2, 2, 3, 4)).astype(np.float32)
    narrow = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)
    pixels = jax.jit(half.decode)(narrow, z)
    assert pixels.dtype == jnp.float32
    difference = np.asarray(decode(params, z)) - pixels
    assert 1e-4 < np.sqrt(np.mean(difference**2)) < 0.05


def test_patches_and_shortcuts():
    """The order of patches, and both shortcuts, against indices written out."""
    x = np.arange(2 * 3 * 4 * 6 * 2, dtype=np.float32).reshape(2, 3, 4, 6, 2)
    patches = np.asarray(as_patches(x, 2))
    for c, column, row in np.ndindex(2, 2, 2):  # the column before the row
        np.testing.assert_array_equal(patches[..., 4 * c + 2 * column + row], x[:, :, row::2, column::2, c])
    np.testing.assert_array_equal(from_patches(patches, 2), x)

    down = np.asarray(averaged(x, 4, 2, 2, True))  # 2 channels of 8 places each are 4 groups of 4
    padded = np.concatenate([np.zeros_like(x[:, :1]), x], 1)
    for group in range(4):
        c, frame = divmod(group, 2)
        places = [padded[:, frame::2, row::2, column::2, c] for row, column in np.ndindex(2, 2)]
        np.testing.assert_allclose(down[..., group], np.mean(places, 0), rtol=1e-6)

    up = np.asarray(repeated(x, 1, 2, 2, True))  # 2 channels fill 8 places, 4 each: the frames
    assert up.shape == (2, 5, 8, 12, 1)
    np.testing.assert_array_equal(up[:, 0, ::2, ::2, 0], x[:, 0, ..., 1])  # the first frame's earlier half is dropped
    np.testing.assert_array_equal(up[:, 1::2, 1::2, ::2, 0], x[:, 1:, ..., 0])


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another class": ({"_class_name": "AutoencoderKL"}, "_class_name='AutoencoderKL'; allowed: AutoencoderKLWan or"),
    "another base": ({"base_dim": 3}, r"base_dim=3; allowed: 2, as the checkpoint's tensors say"),
    "another time": ({"temperal_downsample": [True, True, False]}, "temperal_downsample=.*tensors say"),
    "attention elsewhere": ({"attn_scales": [1.0]}, r"attn_scales=\[1.0\]; allowed: those of the levels"),
    "patches that do not divide": ({"patch_size": 2}, "patch_size=2; allowed: one whose square divides 3"),
    "few means": ({"latents_mean": [0.0]}, "mean of 1 numbers; allowed: 4"),
    "a deviation of 0": ({"latents_std": [0, 1, 1, 1]}, "latents_std=.*allowed: a list, each a number, > 0"),
    "no number": ({"latents_mean": ["a"]}, "latents_mean=.*a list, each a number"),
    "no statistics": ({"latents_mean": None}, "channels=4 without mean and deviation; allowed: both given"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_config_that_is_refused(case, folders, tmp_path):
    change, message = REFUSED[case]
    (tmp_path / "config.json").write_text(json.dumps(SAID["2.1"]["config"] | change))
    (tmp_path / "x.safetensors").symlink_to(folders / "2.1" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ValueError, match=message):
        find_wan_autoencoder(tmp_path)


def test_harmless_changes(folders, tmp_path):
    """Keys that nobody knows, and keys that have the class's default left out, change nothing."""
    config = SAID["2.1"]["config"]
    kept = {name: value for name, value in config.items() if name in ("_class_name", "latents_mean", "latents_std")}
    (tmp_path / "config.json").write_text(
        json.dumps(kept | {"attn_scales": [0.5], "_name_or_path": 1, "patch_size": None})
    )
    (tmp_path / "x.safetensors").symlink_to(folders / "2.1" / "diffusion_pytorch_model.safetensors")
    assert find_wan_autoencoder(tmp_path).geometry == find_wan_autoencoder(folders / "2.1").geometry


ARGUMENTS: dict[str, tuple[dict[str, Any], str]] = {
    "nothing": ({}, "base, decoder_base, channels missing; give it, or a variant: 2.1, 2.2"),
    "a variant": ({"variant": "2.3"}, "variant='2.3'; allowed: 2.1 or 2.2|variant.*2.3"),
    "levels": ({"variant": "2.1", "multipliers": (1, 2)}, "time=.*allowed: 1 of true or false, for 2 levels"),
    "widths": (
        {"variant": "2.2", "multipliers": (3, 1, 4, 4)},
        "multipliers=.*allowed: a level's width divides 4 of the one before",
    ),
    "chunk": ({"variant": "2.1", "chunk": 0}, "chunk=0; allowed: 1 or more"),
    "dtype": ({"variant": "2.1", "dtype": "float16"}, "dtype=float16; allowed: float32, bfloat16"),
    "statistics": ({"variant": "2.1", "channels": 5}, "channels=5 without mean and deviation"),
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_arguments_that_are_refused(case):
    arguments, message = ARGUMENTS[case]
    with pytest.raises(ValueError, match=message):
        wan_autoencoder(**arguments)


@pytest.mark.parametrize(
    "shape", [(1, 4, 16, 16, 3), (1, 5, 16, 12, 3), (5, 16, 3), (1, 5, 16, 16, 4), (1, 0, 16, 16, 3)]
)
def test_pixels_that_are_refused(shape, opened):
    model, params, *_ = opened("2.1")
    with pytest.raises(ValueError, match=r"wan_autoencoder: .*; allowed: (1 \+ 4 k frames|\[B, F, H, W, 3\])"):
        jax.eval_shape(model.encode, params, jax.ShapeDtypeStruct(shape, "float32"))


@pytest.mark.skipif(not PIPELINES.is_dir(), reason="the recorded pipelines are not here")
@pytest.mark.parametrize("name", some(["wan21", "qwen_image"], "qwen_image"))
def test_a_recorded_run(name):
    found = find_wan_autoencoder(PIPELINES / name / "vae")
    params = load_foreign(PIPELINES / name / "vae", found)
    mean, deviation = (np.asarray(found.geometry[key], np.float32) for key in ("mean", "deviation"))
    with np.load(PIPELINES / name / "run.npz") as run:
        z, pixels = (run[f"decode/0/{place}"].transpose(0, 2, 3, 4, 1) for place in ("in", "out"))
    with jax.default_matmul_precision("highest"):
        assert error(jax.jit(found.model.decode)(params, (z - mean) / deviation), pixels) <= TOLERANCE
