"""What follows from a size follows from it whichever way it is set: time shifts, and the positions of a trained grid.

The rules are written again here, from the papers and from diffusers' PatchEmbed.
"""

import math
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from difax import run
from difax.build import build_setup
from difax.config import checkpoint_config, load_config, override
from difax.core.process import flow
from difax.models.dit_checkpoint import load_dit
from difax.models.pixart import pixart
from tests.families import some

GOLDEN = Path(__file__).parent / "golden"
NARROW: dict[str, dict[str, Any]] = {
    "flux": {"double_depth": 1, "single_depth": 1, "width": 128, "heads": 1, "variant": None},
    "wan": {"depth": 1, "width": 48, "heads": 4, "ffn": 8, "variant": None},
}


def flux_rule(size: tuple[int, ...]) -> float:
    tokens = (size[0] // 2) * (size[1] // 2)
    return math.exp(0.5 + 0.65 * (tokens - 256) / 3840)


def wan_rule(size: tuple[int, ...]) -> float:
    a_frame = size[1] * size[2]
    slope = (math.log(5) - math.log(3)) / (90 * 160 - 60 * 104)
    return math.exp(math.log(3) + slope * (a_frame - 60 * 104))


# configuration with its argument, size of the latents, shift
ROWS: dict[str, tuple[tuple[int, ...], float]] = {
    "flux_dev:512": ((64, 64), flux_rule((64, 64))),
    "flux_dev:768x1360": ((96, 170), flux_rule((96, 170))),
    "flux_dev:1024": ((128, 128), math.exp(1.15)),
    "flux_dev:256": ((32, 32), math.exp(0.5)),
    "flux_schnell:512": ((64, 64), 1.0),
    "wan2_1:1.3B": ((21, 60, 104), 3.0),
    "wan2_1:14B": ((21, 60, 104), 3.0),
    "wan2_1:14B-720p": ((21, 90, 160), 5.0),
}


def check(setup: Any, size: tuple[int, ...], shift: float) -> None:
    assert setup.model.input_shape[:-1] == size
    assert setup.process.shift == pytest.approx(shift, rel=1e-12)
    t = np.linspace(1, 0, len(setup.times))
    np.testing.assert_allclose(setup.times, shift * t / (1 + (shift - 1) * t), rtol=1e-9, atol=1e-12)


def narrow(config: dict[str, Any], *settings: tuple[str, Any]) -> dict[str, Any]:
    model = NARROW[config["model"]["name"]]
    return override(config, [*((f"model.{key}", value) for key, value in model.items()), *settings])


@pytest.mark.parametrize("name", ROWS)
def test_a_shift_is_that_of_the_size_by_argument_and_by_override(name):
    size, shift = ROWS[name]
    check(build_setup(narrow(load_config(name))), size, shift)
    others = [row for row in ROWS if row.partition("_")[0] == name.partition("_")[0] and row != name]
    for other in others:  # another argument, and then this size
        if "schnell" not in other + name:
            check(build_setup(narrow(load_config(other), ("model.size", size))), size, shift)


@pytest.mark.parametrize("name", some(["flux_dev", "wan2_1"], "wan2_1"))
def test_a_shift_is_that_of_the_reduced_size(name, monkeypatch):
    monkeypatch.setattr(run, "memory_available", lambda: 0)
    monkeypatch.setattr(run, "ahead_of_time", lambda setup: {})
    opened = run.load(narrow(load_config(name)), weights="random")
    size = load_config(name)["reduced"]["model"]["size"]
    size = (size, size) if isinstance(size, int) else tuple(size)
    check(opened.setup, size, {"flux_dev": flux_rule, "wan2_1": wan_rule}[name](size))
    assert opened.config["steps"] == load_config(name)["reduced"]["steps"] > 1
    assert run.load(narrow(load_config(name), ("steps", 1)), weights="random").config["steps"] == 1  # as asked


@pytest.mark.parametrize("size", some([(4, 6), (16, 16), (32, 8)], (32, 8)))
def test_a_shift_is_that_of_the_size_a_checkpoint_is_read_at(size):
    path, told = str(GOLDEN / "flux_diffusers.safetensors"), ("model.axes_dim", (2, 4, 4))
    config = checkpoint_config(path, [("model.size", size), told])
    check(build_setup(config), size, flux_rule(size))
    check(run.load(path, model={"size": size, "axes_dim": (2, 4, 4)}).setup, size, flux_rule(size))
    other = run.load(path, model={"size": (8, 8), "axes_dim": (2, 4, 4)})
    check(other.replace(model={"size": size}).setup, size, flux_rule(size))


@pytest.mark.parametrize("size", some([(1, 4, 6), (2, 8, 8), (5, 16, 24)], (5, 16, 24)))
def test_a_shift_is_that_of_the_size_a_video_checkpoint_is_read_at(size):
    told = [("model.size", size), ("model.heads", 1), ("model.text_tokens", 5)]
    config = checkpoint_config(str(GOLDEN / "wan_diffusers.safetensors"), told)
    check(build_setup(config), size, wan_rule(size))


def test_a_shift_that_is_given_wins():
    for name in ("flux_dev:512", "wan2_1"):
        setup = build_setup(narrow(load_config(name), ("process.shift", 2)))
        assert setup.process.shift == 2.0
    assert (flow().shift, flow(shift=3.0, shift_by="wan").shift) == (1.0, 3.0)


def test_a_size_that_a_checkpoint_tells_is_the_shifts_too():
    """The configuration says nothing of the size, the file's positions do."""
    config = load_config("fmnist_smoke")
    config["model"] = {"name": "dit", "depth": 3, "width": 16, "heads": 4, "patch": 2, "classes": 10}
    config["process"] = {"name": "flow", "shift_by": "flux"}
    opened = run.load(config, weights=GOLDEN / "dit_original.safetensors")
    assert opened.setup.model.input_shape == (8, 8, 4)
    assert opened.setup.process.shift == pytest.approx(flux_rule((8, 8)))


REFUSALS = {
    "a rule of nobody": ({"shift_by": "sd3"}, "shift_by='sd3'; allowed: flux, wan, .*or none"),
    "a rule without a shape": ({"shift_by": "flux"}, "shift_by='flux' needs the shape of a sample"),
    "a shape without a rule": ({"shape": (8, 8, 4)}, "without a rule that reads it"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_flow_refuses(case):
    arguments, words = REFUSALS[case]
    with pytest.raises(ValueError, match=words):
        flow(**arguments)


# ---- positions -------------------------------------------------------------------------------------------------


def positions(width: int, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """get_2d_sincos_pos_embed of facebookresearch/DiT, at given places: the column's half first."""

    def axis(place: np.ndarray) -> np.ndarray:
        angle = np.outer(place, 10_000.0 ** (-np.arange(width // 4) / (width / 4)))
        return np.concatenate([np.sin(angle), np.cos(angle)], axis=1)

    j, i = np.meshgrid(columns, rows)
    return np.concatenate([axis(j.ravel()), axis(i.ravel())], axis=1)


def positions_of(model: Any, params: Any, cond: Any) -> np.ndarray:
    """What `embed` adds to the patches of an empty image."""
    tokens, _ = model.embed(params, jnp.zeros((1, *model.input_shape)), jnp.zeros(1), cond)
    return np.asarray(tokens[0]) - np.asarray(params["ends"]["patch"]["bias"])


@pytest.mark.parametrize("layout", ["original", "diffusers"])
@pytest.mark.parametrize("size", some([(8, 8), (4, 4), (12, 12), (6, 10)], (12, 12)))
def test_a_dit_read_at_another_size_has_its_references_positions(tmp_path, layout, size):
    """The original has those of the grid; diffusers stretches them to the grid that was trained on, of 4 x 4 here."""
    path = GOLDEN / f"dit_{layout}.safetensors"
    if layout == "diffusers":
        (tmp_path / "w.safetensors").symlink_to(path)
        (tmp_path / "config.json").write_text('{"_class_name": "DiTTransformer2DModel", "sample_size": 8}')
        path = tmp_path / "w.safetensors"
    model, params = load_dit(path, heads=4, size=size)
    rows, columns = size[0] // 2, size[1] // 2
    stretch = (4 / rows, 4 / columns) if layout == "diffusers" else (1, 1)
    wanted = positions(16, np.arange(rows) * stretch[0], np.arange(columns) * stretch[1])
    np.testing.assert_allclose(positions_of(model, params, jnp.zeros(1, jnp.int32)), wanted, atol=1e-5)


@pytest.mark.parametrize("size", some([32, 64, 128], 64))
def test_a_pixart_of_a_configuration_is_trained_at_its_size(size):
    """As the published ones are: positions as fine as those of 64 latents, micro-conditions at 128 alone."""
    for name in ("pixart_alpha", "pixart_sigma"):
        by_argument = load_config(f"{name}:{8 * size}")["model"]
        by_override = override(load_config(name), [("model.size", size)])["model"]
        for section in (by_argument, by_override):
            c = pixart(**{k: v for k, v in section.items() if k != "name"}).stages[0].block.config
            assert (c.size, c.base_size, c.interpolation_scale) == ((size, size), size // 2, max(size // 64, 1))
            assert c.micro_conditioning == (name == "pixart_alpha" and size == 128)
