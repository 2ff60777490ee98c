"""Published coefficients: whose they are, that caches plan by them, and that those of another model say so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from difax.accel.caches import measured, published
from difax.accel.caches.magcache import RATIOS, magcache, nearest
from difax.accel.caches.teacache import COEFFICIENTS, teacache
from difax.accel.solvers import SOLVERS
from difax.core import process as P
from difax.core.contracts import Stage
from difax.core.grids import GRIDS, make_times
from difax.core.guidance import GUIDES
from difax.core.noise import sample_keys
from difax.core.sample import initial_noise, make_rows, make_sampler
from difax.models.wan import wan
from tests.toys import randomise, tiny_dit

GIVEN = Path(__file__).parents[2] / "shared" / "reference" / "coefficients.json"


# ---- the file ----------------------------------------------------------------------------------------------


def test_every_fit_is_whole() -> None:
    for name, fit in published.table("teacache").items():
        assert len(fit["coefficients"]) in (5, 6) and np.isfinite(fit["coefficients"]).all(), name
        assert fit["input"] in ("input", "time", "modulation", None) and ":" in fit["source"], name
    for name, fit in published.table("magcache").items():
        ratios = np.asarray(fit["ratios"]).reshape(-1, fit["halves"])
        assert len(ratios) == fit["steps"] and (ratios[0] == 1).all() and (ratios > 0.4).all(), name
    assert len(published.table("teacache")) == 30 and len(published.table("magcache")) == 20
    assert "qwen_image" not in "".join(published.table("teacache"))  # which nobody has fitted


def test_every_fit_belongs_to_a_model() -> None:
    named = {name for known in published.MODELS.values() for name in (known.teacache, known.magcache)} - {None}
    assert named <= {*published.table("teacache"), *published.table("magcache")}
    # the rest can be had by name: of other sizes, of steps that are always kept, of a second version
    rest = {*published.table("teacache"), *published.table("magcache")} - named
    assert {n for n in rest if not n.endswith("_ret")} == {"hunyuanvideo_544p", "lumina2_v2", "wan2.2_ti2v_5b_i2v"}
    assert set(published.ALIASES.values()) <= {*published.table("teacache"), *published.table("magcache")}


@pytest.mark.skipif(not GIVEN.is_file(), reason="the collected numbers are not here")
def test_numbers_as_collected() -> None:
    given = json.loads(GIVEN.read_text())
    for name, fit in published.table("teacache").items():
        assert fit["coefficients"] == given["teacache"][name]["coefficients"]
    for name, fit in published.table("magcache").items():
        if name == "omnigen2_t2i":
            halves = [given["magcache"][f"{name}_{half}"]["ratios"] for half in ("cond", "uncond")]
        elif name.startswith("hunyuanvideo1.5"):
            halves = given["magcache"][name]["ratios"]
        else:
            halves = np.reshape(given["magcache"][name]["ratios"], (-1, fit["halves"])).T.tolist()
        assert np.reshape(fit["ratios"], (-1, fit["halves"])).T.tolist() == halves


# ---- which model -------------------------------------------------------------------------------------------

NAMES = [
    ("/models/black-forest-labs/FLUX.1-dev", "flux1_dev"),
    ("FLUX.1-dev/transformer", "flux1_dev"),
    ("flux1-dev.safetensors", "flux1_dev"),
    ("pipelines/flux_dev", "flux1_dev"),
    ("FLUX.1-Kontext-dev", "flux1_kontext"),
    ("FLUX.1-schnell", None),
    ("mochi/FLUX.1-schnell", None),
    ("black-forest-labs/FLUX.2-dev", None),
    ("models--Wan-AI--Wan2.1-T2V-1.3B-Diffusers/snapshots/0f" + 38 * "a" + "/transformer", "wan2.1_t2v_1.3b"),
    ("Wan2.1-T2V-14B-Diffusers", "wan2.1_t2v_14b"),
    ("Wan2.1-I2V-14B-720P", "wan2.1_i2v_720p"),
    ("Wan2.1-VACE-1.3B", "wan2.1_vace_1.3b"),
    ("Wan2.2-T2V-A14B-Diffusers", "wan2.2_t2v_a14b"),
    ("Wan2.2-TI2V-5B", "wan2.2_ti2v_5b"),
    ("wan21", None),
    ("hunyuanvideo-community/HunyuanVideo", "hunyuanvideo"),
    ("HunyuanVideo-I2V", None),
    ("HunyuanVideo-1.5-Diffusers-480p_t2v", "hunyuanvideo1.5_t2v_480p"),
    ("Qwen/Qwen-Image", "qwen_image"),
    ("Qwen/Qwen-Image-Edit-2509", "qwen_image_edit"),
    ("CogVideoX-5b-I2V", "cogvideox_5b-i2v"),
    ("CogVideoX1.5-5B", "cogvideox1.5-5b"),
    ("THUDM/CogVideoX-2b", "cogvideox_2b"),
    ("LTX-Video", "ltx_video_0.9"),
    ("LTX-2", None),
    ("genmo/mochi-1-preview", "mochi1"),
    ("Open-Sora-Plan-v1.1.0", "opensora_plan_1.1"),
    ("hpcai-tech/OpenSora-STDiT-v3", None),
    ("stable-diffusion-3.5-medium", None),
]


@pytest.mark.parametrize("path, model", NAMES)
def test_model_by_its_name(path: str, model: str | None) -> None:
    assert published.model_of([path]) == model


def test_model_by_its_geometry() -> None:
    known = {"pipeline": "WanPipeline", "width": 1536, "blocks": (30,)}
    assert published.model_of(["my-folder"], known) == "wan2.1_t2v_1.3b"
    assert published.model_of([], known | {"width": 3072}) == "wan2.2_ti2v_5b"
    assert published.model_of([], known | {"blocks": (40,), "width": 5120}) is None  # 2.1 and 2.2 both
    flux = {"pipeline": "FluxPipeline", "width": 3072, "blocks": (19, 38)}
    assert published.model_of([], flux) is None
    assert published.model_of([], flux | {"guidance": False}) is None
    assert published.model_of(["a", "FLUX.1-Kontext-dev"], flux | {"guidance": True}) == "flux1_kontext"
    assert published.model_of(["a"], flux | {"guidance": True}) == "flux1_dev"


# ---- settings of a cache -----------------------------------------------------------------------------------


def test_settings() -> None:
    fit = published.published("magcache", "flux1_dev", 28)
    assert fit is not None
    assert fit.arguments == {"ratios": "flux1_dev", "threshold": 0.24, "streak": 5, "retention": 0.1}
    assert (fit.note, fit.steps) == ("", 28)
    other = published.published("magcache", "flux1_dev", 20)
    assert other is not None and other.note == "measured over 28 steps, taken at the nearest of 20"
    tea = published.published("teacache", "flux1_dev", 20)
    assert tea is not None and tea.arguments == {"coefficients": "flux1_dev", "threshold": 0.25} and tea.note == ""
    for made in (teacache(**tea.arguments), magcache(**fit.arguments)):
        assert made.measured[0]["of"] == "flux1_dev"
    assert published.published("teacache", "qwen_image") is None
    assert published.published("fora", "flux1_dev") is None
    with pytest.raises(ValueError, match=r"unknown published model 'flux1_devv' \(did you mean flux1_dev\?\)"):
        published.published("teacache", "flux1_devv")


def test_every_published_setting_makes_a_cache() -> None:
    for model in published.MODELS:
        for technique, factory in (("teacache", teacache), ("magcache", magcache)):
            fit = published.published(technique, model, 30)
            if fit is not None:
                assert factory(**fit.arguments).name == technique


def test_names_as_arguments() -> None:
    assert COEFFICIENTS["flux1_dev"] == (498.651651, -283.781631, 55.8554382, -3.82021401, 0.264230861)
    assert RATIOS["flux"] == RATIOS["flux1_dev"] and len(RATIOS["flux"]) == 28
    with pytest.raises(ValueError, match="teacache: coefficients='flax'; allowed: numbers, or flux1_dev, hunyuanvideo"):
        teacache(coefficients="flax")
    with pytest.raises(ValueError, match="halves=1 with ratios='qwen_image'; allowed: 2, or None: they have two"):
        magcache("qwen_image", halves=1)


def test_ratios_of_both_halves_at_other_lengths() -> None:
    """As the authors take them: each half apart, at the nearest evaluation."""
    ratios = np.asarray(RATIOS["wan2.1_t2v_1.3b"])
    taken = nearest(ratios, 30, 2)
    at = np.round(np.arange(30) * 49 / 29).astype(int)
    np.testing.assert_array_equal(taken, np.stack([ratios[0::2][at], ratios[1::2][at]], 1))


def stages(*depths: int) -> tuple[Stage, ...]:
    return tuple(Stage(f"s{i}", depth, None, ("attn",)) for i, depth in enumerate(depths))  # pyright: ignore


RUN = dict(model="some", solver="euler", guide="cfg", scale=1.0)
SAID = [
    (lambda: teacache(coefficients="flux"), (19, 38), 20, None),
    (
        lambda: teacache(coefficients="flux1_dev"),
        (2, 3),
        28,
        "coefficients='flux1_dev' was fitted to flux1_dev, .*19 . 38",
    ),
    (
        lambda: teacache(coefficients="hidream_i1_full"),
        (4,),
        28,
        "'hidream_i1_full' was fitted to hidream_i1_full; here",
    ),
    (lambda: magcache("flux1_dev"), (19, 38), 28, None),
    (lambda: magcache("flux1_dev"), (30,), 28, "ratios='flux1_dev' was fitted to flux1_dev, .*here: some, with 30"),
    (lambda: magcache("flux1_dev"), (19, 38), 20, "measured over 28 evaluations, and is taken at the nearest of 20"),
    (lambda: magcache([1.0] * 28), (2,), 28, None),
]


@pytest.mark.parametrize("make, depths, steps, said", SAID)
def test_numbers_of_another_model_say_so(
    make: Any, depths: tuple[int, ...], steps: int, said: str | None, recwarn: pytest.WarningsRecorder
) -> None:
    accelerator = make()
    if said is None:
        measured.compare(accelerator.measured, stages=stages(*depths), steps=steps, **RUN)
        assert not recwarn.list
        return
    with pytest.warns(measured.MeasuredElsewhere, match=said):
        measured.compare(accelerator.measured, stages=stages(*depths), steps=steps, **RUN)


# ---- what the distance is of -------------------------------------------------------------------------------


def test_distance_of_the_time_alone() -> None:
    """Wan: decisions of the authors' rule on the time's embedding, which no sample changes."""
    model = wan(depth=2, width=16, heads=2, ffn=16, size=(1, 4, 4), channels=2, text_tokens=2, text_width=4)
    params = randomise(jax.eval_shape(model.init, jax.random.key(0)))
    process, solver, guide = P.flow(3.0), SOLVERS["euler"](), GUIDES["none"]()
    times = make_times(GRIDS["uniform"](), process, 10)
    accelerator = teacache(1.1, coefficients=(0.5, 0.1), probe="time")
    rows = make_rows(solver, guide, process, times, accelerator, model.stages)
    keys = sample_keys(0, 2)
    cond = jax.tree.map(lambda a: jnp.ones((2, *a.shape), a.dtype), model.cond)
    x = initial_noise(process, keys, model.input_shape)
    run = jax.jit(make_sampler(model, process, "velocity", solver, guide, accelerator))
    _, trace = run(params, x, keys, cond, rows, 1.0)

    told = [np.asarray(model.told(model.embed(params, x, jnp.full(2, t), cond)[1])["time"]) for t in rows.model_time]
    want, total = [], 0.0
    for i, now in enumerate(told):
        change = np.abs(now - told[i - 1]).mean() / np.abs(told[i - 1]).mean()
        total += 0.5 * change + 0.1
        if i in (0, 9) or total >= 1.1:
            total = 0.0
        want.append(total == 0.0)
    assert np.diff(np.flatnonzero(want)).tolist() == [2, 2, 2, 3]  # no fixed interval
    assert (np.asarray(trace.computed["blocks"]).reshape(10, -1).max(1) > 0).tolist() == want


def test_a_model_that_tells_no_time() -> None:
    model, params = tiny_dit(depth=1)
    process, solver, guide = P.vp_linear(), SOLVERS["ddim"](), GUIDES["none"]()
    accelerator = teacache(coefficients="wan2.1_t2v_14b")  # fitted to the time's embedding
    rows = make_rows(solver, guide, process, make_times(GRIDS["uniform"](), process, 3), accelerator, model.stages)
    run = make_sampler(model, process, "eps", solver, guide, accelerator)
    keys = sample_keys(0, 1)
    x = initial_noise(process, keys, model.input_shape)
    with pytest.raises(ValueError, match="teacache: probe='time', of which the model tells nothing; allowed: input"):
        jax.eval_shape(run, params, x, keys, jnp.zeros(1, jnp.int32), rows, 1.0)
    with pytest.raises(ValueError, match="teacache: probe='place'; allowed: input, time, modulation"):
        teacache(probe="place")
