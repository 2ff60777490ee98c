"""Images that a pipeline begins from: from image to image, inpainting, the first frame of a film; and autoencoders that
take a picture in tiles and a film frame by frame.

tests/golden/pipeline_wan_i2v and image_in.npz hold what diffusers made (tests/golden/make_image_in.py).
"""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

import difax
from difax.pipelines.image_in import preprocessed
from difax.pipelines.pipeline import Pipeline
from difax.pipelines.recipes import RECIPES
from tests.families import some
from tests.test_pipelines import GOLDEN, PIXART, SHARED, difference, opened, path_of

FILMS, IMAGES = GOLDEN / "pipeline_wan_i2v", GOLDEN / "image_in.npz"

pytest.importorskip("tokenizers")


@pytest.fixture(scope="module")
def runs() -> dict[str, np.ndarray]:
    with np.load(IMAGES) as file:
        return dict(file)


@pytest.fixture(scope="module")
def films() -> dict[str, np.ndarray]:
    with np.load(FILMS / "run.npz") as file:
        return dict(file)


# ---- image to video ------------------------------------------------------------------------------------------


def film_folder(kind: str, place: pathlib.Path, class_: str | None = None) -> pathlib.Path:
    """A folder of the golden pipeline with the networks of a kind; and with another class in its index."""
    shutil.copytree(FILMS, place, ignore=shutil.ignore_patterns("more", "run.*"))
    if kind != "i2v":
        for component in ("transformer", "image_encoder", "image_processor"):
            shutil.rmtree(place / component)
        shutil.copytree(FILMS / "more" / kind, place, dirs_exist_ok=True)
    if class_ is not None:
        index = json.loads((place / "model_index.json").read_text())
        (place / "model_index.json").write_text(json.dumps(index | {"_class_name": class_}))
    return place


def film_run(folder: pathlib.Path, **more):
    told = json.loads((FILMS / "run.json").read_text())
    asked = {f"pipeline.{key}": told[key] for key in ("negative", "height", "width", "frames", "tokens")}
    return difax.load(folder, steps=told["steps"], **asked | more), told


@pytest.mark.parametrize("kind", some(("i2v", "i2v to pictures", "ti2v", "a14b", "ti2v of WanPipeline"), "i2v"))
def test_a_picture_begins_the_film_that_diffusers_makes(kind, tmp_path, films):
    whole = kind != "i2v"
    kind, _, class_ = kind.removesuffix(" to pictures").partition(" of ")
    more = {"pipeline.scale_2": 3.0} if kind == "a14b" else {"model.first_frame": True} if class_ else {}
    run, told = film_run(film_folder(kind, tmp_path / "folder", class_ or None), **more)
    cond = run.encoded([told["prompt"]], films["image"])
    path, samples = path_of(run, cond, run.channels_last(films[f"{kind}/latents0"]))
    wanted = run.channels_last(films[f"{kind}/steps"], 2)
    for step in range(told["steps"]):
        assert difference(path[:, step + 1], wanted[:, step]) < 1e-4, step
    if not whole:
        return
    Image.fromarray(films["image"]).save(tmp_path / "first.png")
    result = run.sample(prompt=told["prompt"], image=tmp_path / "first.png", latents=films[f"{kind}/latents0"])
    assert "image_seconds" in result.table
    if kind == "ti2v":  # the first frame is that of the picture, whatever the sampler made there
        np.testing.assert_allclose(result.samples[:, 0], cond["first_frame"], atol=1e-6)
    else:
        np.testing.assert_allclose(result.samples, samples, atol=1e-5)
    if f"{kind}/output" in films:
        np.testing.assert_allclose((result.images + 1) / 2, films[f"{kind}/output"], atol=1e-3)  # kept in float16


@pytest.mark.slow
def test_embeddings_of_image_to_video_hold_the_picture(tmp_path, films):
    from difax.cli import main

    folder, picture, kept = FILMS, tmp_path / "first.png", tmp_path / "e.safetensors"
    Image.fromarray(films["image"]).save(picture)
    asked = ["--pipeline", str(folder), "--height", "32", "--width", "48", "--frames", "5", "--tokens", "512"]
    assert main(["encode", *asked, "--prompt", "a fox", "--image", str(picture), "--out", str(kept)]) == 0
    out = [tmp_path / "a.npz", tmp_path / "b.npz"]
    begun = [["--prompt", "a fox", "--image", str(picture)], ["--cond", str(kept)]]
    for path, given in zip(out, begun, strict=True):
        assert main(["sample", *asked, *given, "--steps", "2", "--out", str(path)]) == 0
    first, second = (np.load(path)["samples"] for path in out)
    np.testing.assert_allclose(first, second, atol=1e-6)


# ---- image to image, inpainting ------------------------------------------------------------------------------

CALLS = {"flux_dev": {"pipeline.tokens": 48}, "sd3": {"pipeline.tokens": 24}, "qwen_image": {}, "z_image": {}}
SCALES = {"flux_dev": {"pipeline.guidance": 3.5}, "sd3": {"scale": 7.0}, "qwen_image": {"scale": 4.0}}
CLASSES = {
    "flux_dev": ("FluxImg2ImgPipeline", "FluxInpaintPipeline"),
    "sd3": ("StableDiffusion3Img2ImgPipeline", "StableDiffusion3InpaintPipeline"),
    "qwen_image": ("QwenImageImg2ImgPipeline", "QwenImageInpaintPipeline"),
    "z_image": ("ZImageImg2ImgPipeline", "ZImageInpaintPipeline"),
}


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the recorded pipelines beside the checkout")
@pytest.mark.slow
@pytest.mark.parametrize("kind", ("image", "mask"))
@pytest.mark.parametrize("name", CALLS)
def test_an_image_becomes_what_diffusers_makes_of_it(name, kind, tmp_path, runs):
    """Latents of every step of its pipelines, whose classes open as folders too; the mean in place of a draw."""
    if f"{name}/{kind}/noise" not in runs:
        pytest.skip("diffusers' pipeline takes no network of so few channels")
    call = json.loads((SHARED / name / "run.json").read_text())["call"]
    folder = tmp_path / name
    folder.mkdir()
    for part in (SHARED / name).iterdir():
        if part.is_dir():
            (folder / part.name).symlink_to(part)
    index = json.loads((SHARED / name / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": CLASSES[name][kind == "mask"]}))
    sides = {f"pipeline.{key}": call[key] for key in ("height", "width")}
    negative = {} if name == "flux_dev" else {"pipeline.negative": "blurry"}
    run = difax.load(folder, steps=4, **sides, **negative, **CALLS[name], **SCALES.get(name, {}))
    size = "small" if name == "z_image" else "large"
    mask = runs[f"{size}/mask"] / 255.0 if kind == "mask" else None
    noise = runs[f"{name}/{kind}/noise"]
    noise = run.channels_last(noise.reshape(1, *noise.shape[-3:]))
    assert run.pipeline is not None
    image, free = run.pipeline.known(runs[f"{size}/picture"], mask, 1, run.setup.model.input_shape)
    cond = run.encoded(["a red fox jumps over 3 logs"])
    path, samples = path_of(run, cond, noise, run.setup.started(0.75), image=image, mask=free)
    wanted = run.channels_last(runs[f"{name}/{kind}/steps"], 2)
    assert path.shape[1] - 1 == wanted.shape[1] == 3
    for step in range(3):
        assert difference(path[:, step + 1], wanted[:, step]) < 1e-4, step
    again = run.sample(
        prompt="a red fox jumps over 3 logs", image=runs[f"{size}/picture"], mask=mask, strength=0.75, latents=noise
    )
    np.testing.assert_allclose(again.samples, samples, atol=1e-5)


PROMPT = "a fox"


@pytest.fixture(scope="module")
def pixart():
    return opened(PIXART)[0].replace(steps=5)


def image_of(run) -> np.ndarray:
    assert run.pipeline is not None
    return np.random.default_rng(0).integers(0, 256, (*run.pipeline.sides, 3), np.uint8)


def test_a_mask_holds_the_image_where_it_is_black(pixart):
    image, mask = image_of(pixart), np.zeros(pixart.pipeline.sides)
    mask[:, 12:] = 1.0
    known, free = pixart.pipeline.known(image, mask, 1, pixart.setup.model.input_shape)
    held = pixart.sample(prompt=PROMPT, image=image, mask=mask, strength=0.6).samples
    assert 0 < free.mean() < 1
    np.testing.assert_array_equal(held[0][free[0, ..., 0] == 0], known[0][free[0, ..., 0] == 0])
    assert np.abs(held - known)[0][free[0, ..., 0] == 1].min() > 1e-4


@pytest.mark.slow
def test_of_masks_and_strengths(pixart):
    """A white mask is no mask; a black one gives the image; other strengths are other runs of one `Run`, in any
    order."""
    image, sides = image_of(pixart), pixart.pipeline.sides
    known, _ = pixart.pipeline.known(image, None, 1, pixart.setup.model.input_shape)
    plain = pixart.sample(prompt=PROMPT).samples
    some = pixart.sample(prompt=PROMPT, image=image, strength=0.6)
    more = pixart.sample(prompt=PROMPT, image=image, strength=0.8)
    assert (some.table["steps"], more.table["steps"]) == (3, 4)
    np.testing.assert_array_equal(pixart.sample(prompt=PROMPT, image=image).samples, some.samples)  # 0.6 of its own
    white = pixart.sample(prompt=PROMPT, image=image, mask=np.ones(sides), strength=0.6).samples
    np.testing.assert_allclose(white, some.samples, rtol=1e-5, atol=1e-5)
    black = pixart.sample(prompt=PROMPT, image=image, mask=np.zeros(sides), strength=0.6).samples
    np.testing.assert_array_equal(black, known)
    np.testing.assert_array_equal(pixart.sample(prompt=PROMPT).samples, plain)
    assert np.abs(some.samples - more.samples).max() > 1e-3


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the recorded pipelines beside the checkout")
@pytest.mark.slow
def test_all_of_the_strength_of_a_flow_is_a_run_without_an_image():
    run = difax.load(SHARED / "flux_dev", steps=2, **{"pipeline.height": 64, "pipeline.width": 96})
    plain = run.sample(prompt=PROMPT).samples
    np.testing.assert_allclose(run.sample(prompt=PROMPT, image=image_of(run), strength=1.0).samples, plain, atol=1e-6)


def test_strengths_are_those_of_the_pipelines():
    """Defaults of diffusers 0.42.1's calls, without and with a mask."""
    for name in ("FluxImg2ImgPipeline", "StableDiffusion3Img2ImgPipeline", "QwenImageInpaintPipeline"):
        assert RECIPES[name].strength == (0.6, 0.6)
    assert RECIPES["ZImageInpaintPipeline"].strength == (0.6, 1.0)
    assert RECIPES["FluxInpaintPipeline"].guidance == 7.0 and RECIPES["StableDiffusion3Img2ImgPipeline"].steps == 50


# ---- preparing ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "said", [{"size": {"shortest_edge": 8}, "crop_size": {"height": 8, "width": 8}}, {"size": 8, "crop_size": 8}]
)
def test_pictures_are_prepared_as_the_file_says(said):
    """The middle of a picture of 8 x 16, of which nothing is resized; mean and deviation are CLIP's."""
    pixels = np.random.default_rng(0).integers(0, 256, (1, 8, 16, 3), np.uint8)
    mean, std = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
    wanted = (pixels[:, :, 4:12] / 255.0 - mean) / std
    np.testing.assert_allclose(preprocessed(pixels, said), wanted, atol=1e-5)
    plain = preprocessed(pixels, said | {"do_normalize": False, "image_mean": [9.0, 9.0, 9.0]})
    np.testing.assert_allclose(plain, pixels[:, :, 4:12] / 255.0, atol=1e-6)


REFUSALS = {
    "no image": (dict(image=np.zeros((4, 4), np.uint8)), r"image: uint8 \[4, 4\]; allowed: uint8 \[H, W, 3\]"),
    "numbers": (dict(image=np.zeros((4, 4, 3))), "image: float64"),
    "two for one": (dict(image=np.zeros((2, 4, 4, 3), np.uint8)), r"allowed: uint8 \[H, W, 3\] or \[1, H, W, 3\]"),
    "another size": (
        dict(image=np.zeros((4, 4, 3), np.uint8), mask=np.zeros((4, 5))),
        r"mask: \[4, 5\]; allowed: the size of the image, \[4, 4\]",
    ),
    "beyond": (dict(image=np.zeros((4, 4, 3), np.uint8), mask=np.full((4, 4), 2.0)), "mask: numbers beyond 0 ... 1"),
    "a word": (dict(image=np.zeros((4, 4, 3), np.uint8), strength="much"), "strength"),
    "too strong": (dict(image=np.zeros((4, 4, 3), np.uint8), strength=1.5), "strength=1.5; allowed: above 0 up to 1"),
    "too weak": (dict(image=np.zeros((4, 4, 3), np.uint8), strength=0.0), "one of 5 steps at least"),
    "a mask alone": (dict(mask=np.zeros((4, 4))), "with an image"),
}


@pytest.mark.parametrize("given, told", REFUSALS.values(), ids=REFUSALS)
def test_refusals(pixart, given, told):
    with pytest.raises(ValueError, match=told) as found:
        pixart.sample(prompt=PROMPT, **given)
    assert "\n" not in str(found.value)


def test_files_that_are_none(pixart, tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / "small.png")
    Image.fromarray(np.zeros((4, 6), np.uint8)).save(tmp_path / "mask.png")
    with pytest.raises(ValueError, match="no picture"):
        pixart.sample(prompt=PROMPT, image=tmp_path / "text.png")
    with pytest.raises(ValueError, match="a mask of 6 x 4 pixels; allowed: 4 x 4"):
        pixart.sample(prompt=PROMPT, image=tmp_path / "small.png", mask=tmp_path / "mask.png")


@pytest.mark.slow
def test_refusals_of_films(tmp_path, films):
    run, told = film_run(FILMS)
    with pytest.raises(ValueError, match="begins a film with a picture; give --image"):
        run.sample(prompt=told["prompt"])
    with pytest.raises(ValueError, match="mask and strength"):
        run.sample(prompt=told["prompt"], image=films["image"], strength=0.5)
    with pytest.raises(ValueError, match="image without prompt"):
        run.sample(image=films["image"])
    run, _ = film_run(film_folder("ti2v", tmp_path / "folder", "WanPipeline"))
    with pytest.raises(ValueError, match="draws films here; allowed: model.first_frame=True"):
        run.sample(prompt=told["prompt"], image=films["image"])


# ---- tiles and chunks ----------------------------------------------------------------------------------------


def temporary(function, *arguments) -> int:
    memory = jax.jit(function).lower(*arguments).compile().memory_analysis()
    assert memory is not None
    return memory.temp_size_in_bytes


def bytes_of(pipeline: Pipeline, what: str, x: np.ndarray) -> int:
    """Memory beside its arguments of one compiled call of a pipeline's autoencoder."""
    autoencoder, params = pipeline._opened("vae")
    return temporary(getattr(autoencoder, what), params, x)


@pytest.mark.slow
def test_tiles_need_the_memory_of_a_tile():
    """And give the whole's picture but for the norms' statistics, which are a tile's."""
    section = {"folder": str(PIXART), "height": 128, "width": 128}
    whole, tiled = Pipeline(section), Pipeline(section | {"tile": 32})
    z = np.random.default_rng(0).standard_normal((1, 64, 64, 4)).astype(np.float32)
    pixels = np.random.default_rng(1).uniform(-1, 1, (1, 128, 128, 3)).astype(np.float32)
    for what, x in (("decode", z), ("encode", pixels)):
        assert bytes_of(tiled, what, x) < bytes_of(whole, what, x) / 3
    difference = np.abs(whole.decode(z) - tiled.decode(z))
    assert tiled.decode(z).shape == (1, 128, 128, 3) and 0 < difference.mean() < 0.1
    small = z[:, :16, :16]  # one tile
    np.testing.assert_allclose(whole.decode(small), tiled.decode(small), atol=1e-5)


@pytest.mark.slow
def test_films_are_decoded_frame_by_frame():
    from difax.models.autoencoders import find_autoencoder
    from difax.weights.published import load_foreign

    pipeline = Pipeline({"folder": str(FILMS), "height": 32, "width": 48, "frames": 33})
    found = find_autoencoder(FILMS / "vae")
    params = load_foreign(FILMS / "vae", found)
    z = np.random.default_rng(0).standard_normal((1, 9, 4, 6, 4)).astype(np.float32)
    pixels = np.random.default_rng(1).uniform(-1, 1, (1, 33, 32, 48, 3)).astype(np.float32)
    np.testing.assert_allclose(pipeline.decode(z), jax.jit(found.model.decode)(params, z), atol=1e-4)
    np.testing.assert_allclose(pipeline._encoded(pixels), jax.jit(found.model.encode)(params, pixels), atol=1e-4)
    for what, x in (("decode", z), ("encode", pixels)):
        once = temporary(getattr(found.model, what), params, x)
        assert bytes_of(pipeline, what, x) < once / 2


def test_tiles_are_whole_quarters():
    with pytest.raises(ValueError, match="pipeline.tile=20; allowed: multiples of 8, such as 16"):
        opened(PIXART, **{"pipeline.tile": 20})
