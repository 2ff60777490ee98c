"""Forms of guidance against numpy written from their rule, alone and inside of caches that act on the guide."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from difax.accel.caches import CACHES
from difax.accel.caches.cfg_cache import Table, estimating
from difax.accel.solvers import SOLVERS
from difax.core.drive import check_drive
from difax.core.guidance import GUIDES
from difax.core.process import PROCESSES
from difax.core.sample import make_rows
from difax.core.trunk import neutral

TIMES = np.array([1.0, 0.9, 0.7, 0.4, 0.0])
SCALE = 3.5
RNG = np.random.default_rng(0)
# two halves of two samples: of images with variance channels behind the four that are predicted, and of videos
IMAGES = RNG.normal(size=(2, 2, 4, 6, 8)) + np.array([0, 0.3]).reshape(2, 1, 1, 1, 1)
VIDEOS = RNG.normal(size=(2, 2, 3, 4, 2, 4))


def rows_of(guide: Any, solver: str = "euler") -> Any:
    return make_rows(SOLVERS[solver](), guide, PROCESSES["flow"](), TIMES)


def applied(
    guide: Any, halves: np.ndarray, at: int = 0, scale: float = SCALE, memory: Any = (), predicted: int = 4
) -> Any:
    """(output, halves that were asked for) of one evaluation, whose network gives these halves whatever it is given."""
    on, off = (jnp.asarray(a, jnp.float32) for a in halves)
    row = jax.tree.map(lambda a: a[at], rows_of(guide))
    x, asked = jnp.zeros((*on.shape[:-1], predicted)), []

    def denoise(x: Any, cond: Any, row: Any, memory: Any, half: str) -> Any:
        asked.append(half)
        return {"both": jnp.concatenate([on, off]), "cond": on, "uncond": off}[half], memory, jnp.zeros(())

    state = guide.init(x)
    cond = jnp.zeros(len(x))
    output, *_ = guide.apply(denoise, x, cond, cond, jnp.float32(scale), row, state, memory)
    return np.asarray(output, np.float64), asked


# ---------------------------------------------------------------- one sample [..., C] at a time, as the rules have it


def plain(c: np.ndarray, u: np.ndarray, s: float = SCALE) -> np.ndarray:
    return u + s * (c - u)


def lin(c: np.ndarray, u: np.ndarray, phi: float) -> np.ndarray:
    """Lin et al. 2023, equations 15 and 16."""
    g = plain(c, u)
    return phi * (g * c.std() / g.std()) + (1 - phi) * g


def qwen_image(c: np.ndarray, u: np.ndarray) -> np.ndarray:
    """Of every packed token, which is 2 x 2 places of all channels."""
    g = plain(c, u)
    for i in range(0, c.shape[0], 2):
        for j in range(0, c.shape[1], 2):
            token = g[i : i + 2, j : j + 2]
            token *= np.linalg.norm(c[i : i + 2, j : j + 2]) / np.linalg.norm(token)
    return g


def lumina(c: np.ndarray, u: np.ndarray) -> np.ndarray:
    """The pipeline's own lines, on channels first: over the last axis."""
    c, g = (np.moveaxis(a, -1, 0) for a in (c, plain(c, u)))
    norms = [np.sqrt((a**2).sum(-1, keepdims=True)) for a in (c, g)]
    return np.moveaxis(g * (norms[0] / norms[1]), 0, -1)


def z_image(c: np.ndarray, u: np.ndarray, normalization: float) -> np.ndarray:
    """The pipeline's own lines; its scale is added to the conditional half."""
    pred = c + (SCALE - 1) * (c - u)
    most, norm = normalization * np.linalg.norm(c), np.linalg.norm(pred)
    return pred * (most / norm) if norm > most else pred


def frames(c: np.ndarray, u: np.ndarray, first: float) -> np.ndarray:
    scales = np.linspace(first, SCALE, len(c))
    return np.stack([plain(a, b, s) for a, b, s in zip(c, u, scales, strict=True)])


def three_channels(c: np.ndarray, u: np.ndarray) -> np.ndarray:
    return np.concatenate([plain(c, u)[..., :3], c[..., 3:]], -1)


# settings -> (halves, the rule)
FORMS: dict[str, Any] = {
    "plain": ({}, IMAGES, plain),
    "three channels": ({"channels": 3}, IMAGES, three_channels),
    "rescale": ({"rescale": 0.7}, IMAGES, lambda c, u: lin(c, u, 0.7)),
    "rescale all": ({"rescale": 1.0}, VIDEOS, lambda c, u: lin(c, u, 1.0)),
    "patch": ({"norm": "patch"}, IMAGES, qwen_image),
    "patch of frames": ({"norm": "patch"}, VIDEOS, lambda c, u: np.stack([*map(qwen_image, c, u)])),
    "row": ({"norm": "row"}, IMAGES, lumina),
    "sample": ({"norm": "sample", "norm_limit": 1.0}, IMAGES, lambda c, u: z_image(c, u, 1.0)),
    "sample, half": ({"norm": "sample", "norm_limit": 0.5}, IMAGES, lambda c, u: z_image(c, u, 0.5)),
    "sample, out of reach": ({"norm": "sample", "norm_limit": 50.0}, IMAGES, plain),
    "first frame": ({"first_frame": 1.0}, VIDEOS, lambda c, u: frames(c, u, 1.0)),
    "one after the other": ({"together": False, "norm": "row"}, IMAGES, lumina),
}


def expected(rule: Any, halves: np.ndarray) -> np.ndarray:
    """The rule on the predicted channels of each sample; what stands behind them stays conditional."""
    c, u = halves
    found = np.stack([rule(a[..., :4].copy(), b[..., :4].copy()) for a, b in zip(c, u, strict=True)])
    return np.concatenate([found, c[..., 4:]], -1)


@pytest.mark.parametrize("guide", ["cfg", "interval"])
@pytest.mark.parametrize("form", FORMS)
def test_a_form_is_its_rule(form, guide):
    settings, halves, rule = FORMS[form]
    got, asked = applied(GUIDES[guide](**settings), halves)
    want = expected(rule, halves)
    np.testing.assert_allclose(got, want, rtol=2e-6, atol=2e-6 * np.abs(want).max())
    wanted = ["cond", "uncond"] if settings.get("together") is False else ["both"]
    assert asked == (wanted if guide == "cfg" else [*wanted, "cond"])  # an interval's other branch is traced too
    if form not in ("plain", "sample, out of reach"):
        assert np.abs(want - expected(plain, halves)).max() > 1e-2


@pytest.mark.parametrize("settings", [{"rescale": 0.7}, {"norm": "patch"}, {"norm": "row"}, {"norm": "sample"}])
def test_a_scale_of_one_is_unguided_and_nothing_stays_nothing(settings):
    got, _ = applied(GUIDES["cfg"](**settings), IMAGES, scale=1.0)
    np.testing.assert_allclose(got, IMAGES[0], rtol=1e-5, atol=1e-5)
    got, _ = applied(GUIDES["cfg"](**settings), 0 * IMAGES)
    np.testing.assert_array_equal(got, 0 * IMAGES[0])


def test_the_scale_below_a_boundary():
    """Wan 2.2: guidance_scale_2 where the time is below boundary_ratio."""
    guide = GUIDES["cfg"](boundary=0.7, scale_below=2.0)
    for at, t in enumerate(TIMES[:-1]):
        got, _ = applied(guide, IMAGES, at)
        rule = lambda c, u, t=t: plain(c, u, SCALE if t >= 0.7 else 2.0)  # noqa: E731
        np.testing.assert_allclose(got, expected(rule, IMAGES), rtol=2e-6, atol=1e-5)


@pytest.mark.parametrize("truncation", [0.0, 0.1, 0.35, 1.0])
def test_truncation_is_an_interval(truncation):
    """Z-Image: no guidance where (1000 - timestep)/1000 > cfg_truncation."""
    rows = rows_of(GUIDES["interval"](low=1 - truncation, norm="sample", norm_limit=1.0))
    times = np.float32(1000) * TIMES[:-1].astype(np.float32)
    np.testing.assert_array_equal(rows.guided, ((1000 - times) / 1000).astype(np.float64) <= truncation + 1e-7)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"rescale": 0.7}, {"rescale": 0.2}),
        ({"norm": "sample", "norm_limit": 1.0}, {"norm": "sample", "norm_limit": 2.0}),
        ({"boundary": 0.7, "scale_below": 2.0}, {"boundary": 0.2, "scale_below": 4.0}),
    ],
)
def test_numbers_are_traced(one, other):
    """Other numbers are the same program."""
    x = jnp.zeros((2, 4, 6, 4))

    def program(settings: Any) -> str:
        guide = GUIDES["cfg"](**settings)
        row = jax.tree.map(lambda a: a[0], rows_of(guide))

        def run(x: Any, row: Any) -> Any:
            denoise = lambda x, cond, row, memory, half: (x, memory, ())  # noqa: E731
            return guide.apply(denoise, x, x, x, 2.0, row, guide.init(x), ())[0]

        return str(jax.make_jaxpr(run)(x, row))

    assert program(one) == program(other)


def test_a_guide_without_settings_lays_no_table():
    assert rows_of(GUIDES["cfg"]()).guide == () and rows_of(GUIDES["interval"](0.2, 0.8)).guide == ()


# ---------------------------------------------------------------- inside of what wraps a guide

FORM = {"rescale": 0.6, "boundary": 0.95, "scale_below": SCALE}


def of_form(c: np.ndarray, u: np.ndarray) -> np.ndarray:
    return lin(c, u, 0.6)


def test_a_gate_leaves_the_form_until_guidance_ends():
    guide = CACHES["tgate"](gate=3).guide
    assert guide is not None
    gated = guide(GUIDES["cfg"](**FORM))
    rows = rows_of(gated)
    np.testing.assert_array_equal(rows.guided, [True, True, True, False])
    for at in range(4):
        got, _ = applied(gated, IMAGES, at, memory={"branch": {}})
        want = expected(of_form, IMAGES) if at < 3 else IMAGES[0]
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)


def test_an_estimate_of_a_half_is_mixed_by_the_form():
    """The estimate is the half itself where nothing has changed since it was evaluated."""
    ones = np.ones(len(TIMES) - 1)
    skips = estimating("test", lambda rows: Table(np.array([False, True, False, True]), ones, ones))
    guide = skips(GUIDES["cfg"](**FORM))
    got, _ = applied(guide, IMAGES[..., :4])
    want = expected(of_form, IMAGES[..., :4])
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)
    # behind an evaluation whose bands are remembered: of the whole difference, low and high together
    on, off = (jnp.asarray(a, jnp.float32) for a in IMAGES[..., :4])
    row = jax.tree.map(lambda a: a[1], rows_of(guide))
    inner, bands = guide.init(on)
    bands = bands.at[0].set(off - on)
    cond = jnp.zeros(2)

    def denoise(x: Any, cond: Any, row: Any, memory: Any, half: str) -> Any:
        return jnp.concatenate([on, jnp.zeros_like(off)]) if half == "both" else on, memory, jnp.zeros(())

    output = guide.apply(denoise, on, cond, cond, jnp.float32(SCALE), row, (inner, bands), ())[0]
    np.testing.assert_allclose(output, want, rtol=2e-5, atol=2e-5)


def test_solvers_that_take_many_at_once_take_a_form_that_is_everywhere_the_same():
    solver = SOLVERS["paradigms"](tolerance=0.0, window=2)
    rows = rows_of(GUIDES["cfg"](rescale=0.5, norm=None, first_frame=1.0))
    check_drive(solver, rows, neutral())
    with pytest.raises(ValueError, match="guidance that differs from evaluation to evaluation"):
        check_drive(solver, rows_of(GUIDES["cfg"](boundary=0.7, scale_below=2.0)), neutral())


REFUSALS = {
    "rescale": ({"rescale": 1.5}, r"rescale=1.5; allowed: 0 \.\.\. 1"),
    "no number": ({"rescale": float("nan")}, "rescale=nan"),
    "norm": ({"norm": "token"}, "norm='token'; allowed: patch, row, sample, or none"),
    "both": ({"rescale": 0.5, "norm": "row"}, "rescale=0.5 with norm='row'; allowed: one of the two"),
    "limit of nothing": ({"norm_limit": 1.0}, "norm_limit=1.0, norm=None; allowed: > 0"),
    "limit": ({"norm": "row", "norm_limit": 0.0}, "norm_limit=0.0, norm=row; allowed: > 0"),
    "half a boundary": ({"boundary": 0.5}, "boundary=0.5, scale_below=None; allowed: both, or none"),
    "boundary": ({"boundary": 875.0, "scale_below": 3.0}, r"boundary=875.0; allowed: 0 \.\.\. 1"),
    "scale": ({"boundary": 0.5, "scale_below": 1e9}, "scale_below=1000000000.0; allowed: -10000"),
    "frames": ({"first_frame": float("inf")}, "first_frame=inf; allowed: -10000"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refuses(case):
    settings, words = REFUSALS[case]
    for guide in ("cfg", "interval"):
        with pytest.raises(ValueError, match=words):
            GUIDES[guide](**settings)


def test_refuses_samples_of_another_shape():
    with pytest.raises(ValueError, match=r"first_frame=1.0 for samples \(4, 6, 4\); allowed: of videos"):
        GUIDES["cfg"](first_frame=1.0).init(jnp.zeros((2, 4, 6, 4)))
    with pytest.raises(ValueError, match=r"norm='patch' for samples \(4, 5, 4\); allowed: of even"):
        GUIDES["cfg"](norm="patch").init(jnp.zeros((2, 4, 5, 4)))


QWEN_IMAGE = Path(__file__).parents[2] / "shared" / "pipelines" / "qwen_image" / "run.npz"


@pytest.mark.skipif(not QWEN_IMAGE.is_file(), reason="the tiny pipelines are not there")
def test_recorded_guidance_of_qwen_image():
    """What its pipeline made of the two calls of each step, whose tokens are 2 x 2 places of all channels."""
    recorded = np.load(QWEN_IMAGE)
    height, width = recorded["decode/0/in"].shape[-2:]
    rows, columns = height // 2, width // 2
    steps = sum(name.endswith("/model_output") for name in recorded)

    def unpacked(tokens: np.ndarray) -> np.ndarray:
        cells = tokens.reshape(1, rows, columns, -1, 2, 2).transpose(0, 1, 4, 2, 5, 3)
        return cells.reshape(1, height, width, -1)

    for k in range(steps):
        halves = np.stack([unpacked(recorded[f"call/{2 * k + j}/out"]) for j in range(2)])
        got, _ = applied(GUIDES["cfg"](norm="patch"), halves, scale=4.0, predicted=halves.shape[-1])
        want = unpacked(recorded[f"step/{k}/model_output"])
        np.testing.assert_allclose(got, want, atol=5e-6 * np.abs(want).max())
    assert steps > 0
