"""Images that a pipeline begins from: from image to image, inpainting, the first frame of a film; and autoencoders that
take a picture in tiles and a film frame by frame.

tests/golden/pipeline_wan_i2v and image_in.npz hold what diffusers made (tests/golden/make_image_in.py).
"""

import json
import pathlib
import shutil

import numpy as np
import pytest
from PIL import Image

import difax
from tests.families import some
from tests.test_pipelines import GOLDEN, SHARED, difference, path_of

FILMS, IMAGES = GOLDEN / "pipeline_wan_i2v", GOLDEN / "image_in.npz"

pytest.importorskip("tokenizers")


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


@pytest.mark.parametrize("kind", some(("i2v", "ti2v", "a14b", "ti2v of WanPipeline"), "i2v"))
def test_a_picture_begins_the_film_that_diffusers_makes(kind, tmp_path):
    kind, _, class_ = kind.partition(" of ")
    more = {"pipeline.scale_2": 3.0} if kind == "a14b" else {"model.first_frame": True} if class_ else {}
    run, told = film_run(film_folder(kind, tmp_path / "folder", class_ or None), **more)
    golden = np.load(FILMS / "run.npz")
    cond = run.encoded([told["prompt"]], golden["image"])
    path, _ = path_of(run, cond, run.channels_last(golden[f"{kind}/latents0"]))
    wanted = run.channels_last(golden[f"{kind}/steps"], 2)
    for step in range(told["steps"]):
        assert difference(path[:, step + 1], wanted[:, step]) < 1e-4, step
    Image.fromarray(golden["image"]).save(tmp_path / "first.png")
    result = run.sample(prompt=told["prompt"], image=tmp_path / "first.png", latents=golden[f"{kind}/latents0"])
    if kind == "ti2v":  # the first frame is that of the picture, whatever the sampler made there
        np.testing.assert_allclose(result.samples[:, 0], cond["first_frame"], atol=1e-6)
    if f"{kind}/output" in golden:
        np.testing.assert_allclose((result.images + 1) / 2, golden[f"{kind}/output"], atol=1e-3)  # kept in float16
    assert "image_seconds" in result.table


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
def test_an_image_becomes_what_diffusers_makes_of_it(name, kind, tmp_path):
    """Latents of every step of its pipelines, whose classes open as folders too; the mean in place of a draw."""
    golden = np.load(IMAGES)
    if f"{name}/{kind}/noise" not in golden:
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
    run = difax.load(folder, steps=5, **sides, **negative, **CALLS[name], **SCALES.get(name, {}))
    size = "small" if name == "z_image" else "large"
    mask = golden[f"{size}/mask"] / 255.0 if kind == "mask" else None
    noise = golden[f"{name}/{kind}/noise"]
    noise = run.channels_last(noise.reshape(1, *noise.shape[-3:]))
    assert run.pipeline is not None
    image, free = run.pipeline.known(golden[f"{size}/picture"], mask, 1, run.setup.model.input_shape)
    cond = run.encoded(["a red fox jumps over 3 logs"])
    path, samples = path_of(run, cond, noise, run.setup.started(0.6), image=image, mask=free)
    wanted = run.channels_last(golden[f"{name}/{kind}/steps"], 2)
    assert path.shape[1] - 1 == wanted.shape[1] == 3
    for step in range(3):
        assert difference(path[:, step + 1], wanted[:, step]) < 1e-4, step
    again = run.sample(
        prompt="a red fox jumps over 3 logs", image=golden[f"{size}/picture"], mask=mask, strength=0.6, latents=noise
    )
    np.testing.assert_allclose(again.samples, samples, atol=1e-5)
