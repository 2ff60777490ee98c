"""Two networks of one geometry that take turns by noise (Wan 2.2): which of them runs where, what is remembered across
the switch, and what acts on both."""

import functools
import inspect
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import difax
from difax.accel.caches import CACHES, NETWORKS
from difax.accel.solvers import SOLVERS, euler
from difax.build import build_setup
from difax.checkpoints import second_network, settings_of
from difax.config import load_config, override
from difax.core.contracts import Network
from difax.core.grids import lay_times, make_times, uniform
from difax.core.guidance import cfg
from difax.core.noise import sample_keys
from difax.core.process import flow
from difax.core.qtensor import is_quantized
from difax.core.sample import initial_noise, make_rows, make_sampler
from difax.core.stack import stack, with_learned
from difax.core.trunk import forward
from difax.models.wan_checkpoint import load_wan
from difax.registry import make
from difax.weights.checkpoint import save_safetensors
from difax.weights.scheduler import scheduler_sections
from tests.families import some
from tests.golden.make_wan_more import BOUNDARY, NAMES, SCALES, SIZE, draw_run, draw_tensors
from tests.golden.make_wan_more import STEPS as STEPS_OF_RUN
from tests.toys import randomise, tiny_dit

GOLDEN = Path(__file__).parent / "golden"
STEPS, LABELS, SCALE = 8, jnp.array([1, 4]), 1.5
PROCESS = flow()


@functools.cache
def networks() -> tuple[Any, Any, Any]:
    """A tiny model with two sets of weights."""
    model, strong = tiny_dit(depth=2)
    return model, strong, randomise(jax.eval_shape(model.init, jax.random.key(0)), seed=7)


def made(boundary: float, cache: Any = None, strong: Any = None, weak: Any = None) -> tuple[Any, Any, Any]:
    """(sampler, rows, params) with both networks and perhaps a cache."""
    model, *both = networks()
    strong, weak = (own if given is None else given for own, given in zip(both, (strong, weak), strict=True))
    both = NETWORKS["experts"](boundary, network=Network(model, weak))
    accelerator = both if cache is None else stack(both, cache)
    guide, times = cfg(), make_times(uniform(), PROCESS, STEPS)
    rows = make_rows(euler(), guide, PROCESS, times, accelerator, model.stages)
    sampler = make_sampler(model, PROCESS, "velocity", euler(), guide, accelerator)
    return sampler, rows, with_learned(strong, accelerator)


def noise() -> tuple[Any, Any]:
    keys = sample_keys(0, 2)
    return initial_noise(PROCESS, keys, networks()[0].input_shape), keys


def drawn(sampler: Any, rows: Any, params: Any, x: Any = None) -> tuple[np.ndarray, Any]:
    start, keys = noise()
    samples, trace = sampler(params, start if x is None else jnp.asarray(x), keys, LABELS, rows, SCALE)
    return np.asarray(samples), trace


@pytest.mark.parametrize("boundary", some([0.0, 0.5, 0.875, 1.0]))
def test_the_models_time_says_which_network_runs(boundary):
    """Against the loop of Wan's pipeline, an Euler step at a time: t >= boundary 1000 is the first network's."""
    model, strong, weak = networks()
    x, times = noise()[0], 1000 * np.linspace(1, 0, STEPS + 1)
    network = jax.jit(lambda params, x, t, label: forward(model, params, x, jnp.full(2, t), label))
    for t, s in zip(times[:-1], times[1:], strict=True):
        params = strong if t >= 1000 * boundary else weak
        on, off = (network(params, x, jnp.float32(t), label) for label in (LABELS, model.null(LABELS)))
        x = x + jnp.float32((s - t) / 1000) * (off + SCALE * (on - off))
    samples, trace = drawn(*made(boundary))
    np.testing.assert_allclose(samples, x, atol=2e-5 * float(jnp.abs(x).max()))
    assert list(trace.computed) == ["blocks"] and (np.asarray(trace.computed["blocks"]) == 1).all()


@pytest.mark.slow
def test_the_network_that_does_not_run_is_not_read():
    strong, weak = networks()[1:]
    spoiled = jax.tree.map(lambda a: jnp.full_like(a, jnp.nan), strong)
    for boundary, first, second in ((0.0, strong, spoiled), (1.0, spoiled, weak)):
        sampler, rows, params = made(boundary, strong=first, weak=second)
        if boundary == 1.0:  # pure noise is the first network's, always
            rows = jax.tree.map(lambda a: a[1:], rows)
        assert np.isfinite(drawn(sampler, rows, params)[0]).all()


def test_another_switch_compiles_nothing():
    sampler, rows, params = made(0.5)
    drawn(sampler, rows, params)
    for boundary in (0.3, 0.875):
        drawn(sampler, made(boundary)[1], params)
    assert sampler._cache_size() == 1


# a cache, and by whether it is asked in the run
REMEMBERING = {
    "fora": CACHES["fora"](interval=3),
    "taylorseer": CACHES["taylorseer"](interval=4, order=1),
    "teacache": CACHES["teacache"](threshold=10.0, coefficients=(1.0, 0.0)),
    "dbcache": CACHES["dbcache"](threshold=10.0, first=1, warmup=1),
    "delta_dit": CACHES["delta_dit"](),
    "fastercache": CACHES["fastercache"](start=1, cfg_start=1),
}


@pytest.mark.parametrize("name", some(REMEMBERING, "fora"))
def test_nothing_is_remembered_across_the_switch(name):
    """Cut where the networks change, with all memory lost, the run is the same; cut later, it is another."""
    sampler, rows, params = made(0.5, REMEMBERING[name])
    switch = 5  # t = 1, 7/8, 6/8, 5/8, 4/8 are the first network's
    assert np.flatnonzero(rows.fresh).tolist() == [0, switch]
    whole, trace = drawn(sampler, rows, params)
    computed = np.asarray(trace.computed["blocks"]).mean((1, 2))[:, 0]
    assert computed[switch] == 1 and (computed[:switch] < 1).any() and (computed[switch:] < 1).any()

    def cut(at: int) -> np.ndarray:
        x, _ = drawn(sampler, jax.tree.map(lambda a: a[:at], rows), params)
        return drawn(sampler, jax.tree.map(lambda a: a[at:], rows), params, x)[0]

    scale = np.abs(whole).max()
    assert np.abs(cut(switch) - whole).max() <= 1e-6 * scale
    if name == "taylorseer":
        assert np.abs(cut(STEPS - 1) - whole).max() > 1e-4 * scale


def test_a_cache_counts_on_behind_the_switch():
    """FORA's plan, by hand: every third evaluation, and the first of the second network."""
    rows = made(0.5, REMEMBERING["fora"])[1]
    computed = [1, 0, 0, 1, 0, 1, 1, 0]
    modes = [rows.plan.modes[k] for k in rows.plan.index]
    assert [network for network, _ in modes] == [0, 0, 0, 0, 0, 1, 1, 1]
    assert [int(all(what != "fill" for _, what in cache)) for _, cache in modes] == computed


# ---- Wan 2.2 as the pipeline of diffusers runs it --------------------------------------------------------------------

SECOND = pytest.mark.skipif("scale_below" not in inspect.signature(cfg).parameters, reason="guidance has one scale")


RUNS = [
    (0, True),
    pytest.param(0, False, marks=pytest.mark.slow),
    pytest.param(1, False, marks=(SECOND, pytest.mark.slow)),
]


@pytest.mark.parametrize(("which", "ahead"), RUNS)
def test_a_run_of_wans_pipeline(tmp_path, which, ahead):
    """tests/golden/wan_experts.npz: two networks, UniPC, guidance of one scale, and of one for each network."""
    with np.load(GOLDEN / "wan_experts.npz") as file:
        facts, path, told = json.loads(str(file["facts"])), file[f"path/{which}"], file["told"]
    settings: dict[str, Any] = {"heads": 2, "max_positions": 32, "size": SIZE, "text_tokens": 5}
    loaded = []
    for name in NAMES:
        save_file(draw_tensors(name, facts["shapes"]), tmp_path / f"{name}.safetensors")
        loaded.append(load_wan(tmp_path / f"{name}.safetensors", **settings))
    (model, params), (_, weak) = loaded
    found = scheduler_sections(facts["config"], steps=STEPS_OF_RUN)
    process, times = lay_times(make("grid", found["grid"]), make("process", found["process"]), STEPS_OF_RUN)
    accelerator = NETWORKS["experts"](BOUNDARY, network=Network(model, weak))
    scale, second = SCALES[which]
    guide = cfg() if second is None else cfg(**{"boundary": BOUNDARY, "scale_below": second})
    solver = make("solver", found["solver"])
    rows = make_rows(solver, guide, process, times, accelerator, model.stages)
    assert rows.model_time.tolist() == told.tolist() and rows.plan.index.tolist() == [0, 0, 0, 1, 1, 1]
    sampler = make_sampler(model, process, found["prediction"], solver, guide, accelerator, ahead=ahead)
    run = draw_run()
    x, cond = run.pop("latents"), run
    with jax.default_matmul_precision("highest"):
        samples, _ = sampler(with_learned(params, accelerator), x, sample_keys(0, 1), cond, rows, scale)
    error = np.abs(np.asarray(samples) - path[-1]).max() / np.abs(path[-1]).max()
    print(f"scales {scale}, {second}, ahead {ahead}: error {error:.1e}")
    assert error <= 1e-5


# ---- by a configuration ----------------------------------------------------------------------------------------------

SMALL = override(
    load_config("wan_tiny"), [("model.size", (2, 4, 4)), ("model.width", 24), ("model.depth", 1), ("steps", 4)]
)


@pytest.fixture(scope="module")
def weak(tmp_path_factory) -> str:
    """A file of difax with weights for weak noise."""
    path = tmp_path_factory.mktemp("weak") / "weak.safetensors"
    model = build_setup(SMALL).model
    params = randomise(jax.eval_shape(model.init, jax.random.key(0)), seed=3)
    save_safetensors(path, params, {"config": {"model": dict(SMALL["model"])}})
    return str(path)


def with_both(weak: str) -> Any:
    return difax.load(
        SMALL,
        cache={"name": "experts+fora", "experts.weights": weak, "experts.boundary": 0.95, "fora.interval": 2},
        quant={"name": "int8_w8a8"},
        layout="unstacked",
    )


@pytest.mark.slow
def test_both_networks_are_quantised_and_laid_out_alike(weak):
    run = with_both(weak)
    params = run.setup.prepare(run.params)
    kinds = [
        jax.tree.map(is_quantized, tree, is_leaf=is_quantized)
        for tree in (params["blocks"], params["networks"][0]["blocks"])
    ]
    assert kinds[0] == kinds[1] and any(jax.tree.leaves(kinds[0])) and len(kinds[0]) == 1


@pytest.mark.slow
def test_a_configuration_with_a_cache_and_a_quantiser(weak):
    result = with_both(weak).sample()
    assert result.cost["decisions"][0] == "FFF."
    assert np.isfinite(np.asarray(result.images)).all()


@pytest.mark.slow
def test_a_mesh_draws_what_one_device_draws(weak):
    cache = {"name": "experts", "weights": weak, "boundary": 0.8}
    one = difax.load(SMALL, cache=cache).sample(repeat=2)
    run = difax.load(SMALL, cache=cache, mesh="data=2,tensor=2")
    read = run.setup.accelerator.networks[0].params["blocks"]["qkv"]["kernel"]
    assert len(read.sharding.device_set) == 4  # to where the model's own would lie
    many = run.sample(repeat=2)
    a, b = (np.asarray(result.images) for result in (one, many))
    assert np.abs(a - b).max() <= 1e-5 * np.abs(a).max()


def test_a_published_second_network(tmp_path):
    """Wan 2.2's transformer_2: a folder of its own, whose settings must be the model's."""
    tensors = load_file(GOLDEN / "wan_diffusers.safetensors")
    config = {"_class_name": "WanTransformer3DModel", "num_attention_heads": 2, "attention_head_dim": 10}
    for folder, factor, more in (("transformer", 1, {}), ("transformer_2", 2, {}), ("other", 2, {"eps": 1e-5})):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text(json.dumps(config | more))
        name = tmp_path / folder / "diffusion_pytorch_model.safetensors"
        save_file({key: factor * a for key, a in tensors.items()}, name)
    size: dict[str, Any] = {"size": (3, 6, 10), "text_tokens": 5}
    model, params = load_wan(tmp_path / "transformer", **size)
    section = {**SMALL, "model": {"name": "wan", **config_of(model)}}
    second = second_network(str(tmp_path / "transformer_2"), section, model, shared=True)
    assert second.shared
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(2 * a, b), params, second.params)
    with pytest.raises(ValueError, match="eps"):
        second_network(str(tmp_path / "other"), section, model, shared=True)


def config_of(model: Any) -> dict[str, Any]:
    return {k: str(v) if k == "dtype" else v for k, v in settings_of(model).items()}


def test_refusals(weak):
    model, _, other = networks()
    both = NETWORKS["experts"](0.5, network=Network(model, other))
    with pytest.raises(ValueError, match="experts and duodiff both run another network; allowed: one of them"):
        stack(both, NETWORKS["duodiff"](0.5, network=Network(model, other)))
    with pytest.raises(ValueError, match="cache experts plans what each evaluation computes, and this solver decides"):
        make_rows(SOLVERS["dpm_solver_12"](), cfg(), PROCESS, np.linspace(1, 0, 4), both, model.stages)
    deeper = {**SMALL, "model": {**SMALL["model"], "depth": 2}}
    for config, keys, said in (
        (SMALL, {"weights": None}, "experts: weights=None; allowed: a folder or file with the second network's"),
        (SMALL, {"weights": "nowhere"}, "weights=nowhere: no such file or folder"),
        (SMALL, {"weights": weak, "boundary": 875.0}, r"experts: boundary=875.0; allowed: 0 \.\.\. 1"),
        (deeper, {"weights": weak}, "are of wan-1x24 with depth=1; allowed: 2, as the model itself has"),
    ):
        with pytest.raises(ValueError, match=said):
            difax.load(config, cache={"name": "experts", **keys})
