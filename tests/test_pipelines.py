"""Published folders from a prompt to a picture or a film, against what diffusers recorded of the same run."""

import json
import pathlib

import jax
import numpy as np
import pytest

import difax
from difax.media.images import to_uint8
from difax.program import draw
from tests.families import some

GOLDEN = pathlib.Path(__file__).resolve().parent / "golden"
SHARED = pathlib.Path(__file__).resolve().parent.parent.parent / "shared" / "pipelines"
PIXART, WAN, FLUX2 = (GOLDEN / f"pipeline_{name}" for name in ("pixart", "wan", "flux2"))

pytest.importorskip("tokenizers")


def opened(folder: pathlib.Path, **more):
    told = json.loads((folder / "run.json").read_text())
    names = {"height": "height", "width": "width", "num_frames": "frames", "max_sequence_length": "tokens"}
    asked = {f"pipeline.{key}": told[name] for name, key in names.items() if name in told}
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


@pytest.mark.parametrize("folder", some([PIXART, WAN, FLUX2], PIXART, WAN), ids=lambda p: p.name)
def test_a_prompt_becomes_the_picture_that_diffusers_makes(folder):
    run, told = opened(folder)
    golden = np.load(folder / "run.npz")
    cond = run.encoded(told["prompts"])
    latents = run.channels_last(golden["latents0"])
    path, samples = path_of(run, cond, latents)
    wanted = run.channels_last(golden["steps"], 2)
    for step in range(told["steps"]):
        assert difference(path[:, step + 1], wanted[:, step]) < 1e-4, step
    assert run.pipeline is not None
    images = run.pipeline.decode(samples)
    np.testing.assert_allclose((images + 1) / 2, golden["output"], atol=2e-4)
    result = run.sample(prompt=told["prompts"], latents=golden["latents0"])
    np.testing.assert_allclose(result.images, images, atol=1e-5)
    assert {"encode_seconds", "decode_seconds"} <= result.table.keys()


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
