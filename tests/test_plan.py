"""`difax plan`: programs compiled for devices that are not there, and what is read from them."""

import functools
import importlib.util
import json
import math
import os
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import difax
from difax.build import build_setup
from difax.cli import main
from difax.config import load_config, override
from difax.core import hlo
from difax.core.chips import CHIPS, devices, environment, parse_target, target_config
from difax.program import draw, model_shapes
from difax.study import lowered, planning, roofline
from tests.families import some

N = 8
ROWS, WIDTH = 8, 128  # of each device
BYTES = ROWS * WIDTH * 4


def compiled(function, *more):
    """The program of a function of one array [8 x 8, 128], in pieces of 8 rows on each of eight devices."""
    mesh = Mesh(np.array(jax.devices()[:N]), ("x",), axis_types=(AxisType.Auto,))
    specs = (P("x"), *(P() for _ in more))
    mapped = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=P("x"), check_vma=False)
    whole = jax.ShapeDtypeStruct((N * ROWS, WIDTH), jnp.float32, sharding=NamedSharding(mesh, P("x")))
    others = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, P())) for a in more]
    return hlo.parse(jax.jit(mapped).lower(whole, *others).compile().as_text())


def looped(body, length):
    return lambda x: lax.scan(lambda c, _: (body(c), None), x, None, length=length)[0]


def summed(x):
    return 0.1 * lax.psum(x, "x")


def turned(x):
    return 1 + lax.ppermute(x, "x", [(i, (i + 1) % N) for i in range(N)])


def exchanged(x):
    return 1 + lax.all_to_all(x, "x", 1, 0, tiled=True).reshape(x.shape)


def gathered(x):
    return x * lax.all_gather(x, "x").sum(0)


def scattered(x):
    return 1 + jnp.tile(lax.psum_scatter(x, "x", tiled=True), (N, 1))


def moved(kind, times, bytes_, sent):
    return {kind: hlo.Moved(times, bytes_, sent)}


# function, what it moves by the definition of each collective: times, bytes, bytes sent on a ring
PROGRAMS = {
    "scan of psum": (looped(summed, 5), moved("all-reduce", 5, 5 * BYTES, 5 * BYTES * 2 * 7 / 8)),
    "scan of permute": (looped(turned, 6), moved("collective-permute", 6, 6 * BYTES, 6 * BYTES)),
    "all-to-all": (exchanged, moved("all-to-all", 1, BYTES, BYTES * 7 / 8)),
    "all-gather": (gathered, moved("all-gather", 1, 8 * BYTES, 7 * BYTES)),
    "reduce-scatter": (scattered, moved("reduce-scatter", 1, BYTES, BYTES * 7 / 8)),
    "nested scans": (
        looped(lambda x: summed(looped(turned, 3)(x)), 4),
        moved("collective-permute", 12, 12 * BYTES, 12 * BYTES) | moved("all-reduce", 4, 4 * BYTES, 4 * BYTES * 7 / 4),
    ),
    "no collective": (lambda x: 2 * x, {}),
}


@pytest.mark.parametrize("name", some(PROGRAMS, "nested scans", "all-gather", "all-to-all"))
def test_collectives_are_counted_with_loops_multiplied_out(name):
    function, expected = PROGRAMS[name]
    found, unknown = hlo.collectives(compiled(function))
    assert unknown == 0 and found.keys() == expected.keys()
    for kind, moves in expected.items():
        np.testing.assert_allclose(found[kind], moves, err_msg=kind)


def test_a_conditional_counts_by_what_is_taken():
    """Of six turns of a scan, one of three branches each: as its dearest, its cheapest, or as the plan says."""

    def switched(x, index):
        return lax.scan(lambda c, i: (lax.switch(i, [summed, exchanged, lambda c: 2 * c], c), None), x, index)[0]

    module = compiled(switched, jnp.zeros(6, jnp.int32))
    times = lambda how: {k: m.times for k, m in hlo.collectives(module, how)[0].items()}  # noqa: E731
    assert times(hlo.most) == {"all-reduce": 6, "all-to-all": 6}
    assert times(hlo.least) == {}
    assert times(hlo.taken([1 / 3, 1 / 2, 1 / 6])) == pytest.approx({"all-reduce": 2, "all-to-all": 3})
    assert times(hlo.taken([0.5, 0.5])) == times(hlo.most)  # not its branches
    assert (hlo.conditionals(module, 3), hlo.conditionals(module, 2)) == (1, 0)


def test_a_loop_of_unknown_length_is_reported():
    def until(x):
        return lax.while_loop(lambda c: lax.psum(c.sum(), "x") < 1e9, summed, x)

    found, unknown = hlo.collectives(compiled(until))
    assert unknown == 1
    assert found["all-reduce"].times >= 1


# text of a loop as a TPU's compiler writes it, without known_trip_count -> how often it runs
LOOP = """HloModule m, num_partitions=4

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {{
  %p = (s32[], f32[8]{{0}}) parameter(0)
  %i = s32[]{{:T(128)}} get-tuple-element(%p), index=0
  %x = f32[8]{{0:T(256)}} get-tuple-element(%p), index=1
  %step = s32[] constant({step})
  %next = s32[] add(%i, %step)
  %s = f32[8]{{0}} all-reduce-start(%x), replica_groups=[2,2]<=[4], to_apply=%sum
  %d = f32[8]{{0}} all-reduce-done(%s)
  ROOT %t = (s32[], f32[8]{{0}}) tuple(%next, %d)
}}

%condition (p: (s32[], f32[8])) -> pred[] {{
  %p = (s32[], f32[8]{{0}}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] constant({bound})
  ROOT %c = pred[] compare(%i, %n), direction={direction}
}}

ENTRY %main (x: f32[8]) -> (s32[], f32[8]) {{
  %x = f32[8]{{0}} parameter(0)
  %zero = s32[] constant({start})
  %t = (s32[], f32[8]{{0}}) tuple(%zero, %x)
  ROOT %w = (s32[], f32[8]{{0}}) while(%t), condition=%condition, body=%body
}}
"""


@pytest.mark.parametrize(
    "start,step,bound,direction,times",
    [(0, 1, 28, "LT", 28), (3, 1, 28, "LT", 25), (0, 2, 27, "LT", 14), (1, 1, 28, "LE", 28), (0, 1, 28, "NE", None)],
)
def test_a_loop_without_a_told_length_is_read_from_its_condition(start, step, bound, direction, times):
    text = LOOP.format(start=start, step=step, bound=bound, direction=direction)
    found, unknown = hlo.collectives(hlo.parse(text))
    assert unknown == (times is None)
    assert found == moved("all-reduce", times or 1, 32 * (times or 1), 32 * (times or 1))  # 2 (n - 1)/n of two devices


def test_products_are_counted_by_what_is_compiled():
    """2 M N K of each device, as often as the loop runs."""
    w = jnp.ones((WIDTH, WIDTH))
    module = compiled(lambda x, w: lax.scan(lambda c, _: (c @ w, None), x, None, length=7)[0], w)
    assert hlo.products(module) == 7 * 2 * ROWS * WIDTH * WIDTH


# attributes of a convolution -> the product that it is: operations
CONVOLUTIONS = {
    "window={size=2x6 stride=1x5 lhs_dilate=2x6}, dim_labels=0b1f_0o1i->01bf": (
        "bf16[2,512,6,128]", "bf16[2,512,6,128]", "f32[2,6,512,512]", 2 * 2 * 6 * 512 * 512 * 128,
    ),
    "window={size=1}, dim_labels=0bf_io0->0bf": (
        "bf16[4,512,768]", "bf16[768,1024,1]", "bf16[4,512,1024]", 2 * 4 * 512 * 768 * 1024,
    ),
    "window={size=3 pad=1_1}, dim_labels=b0f_0io->b0f": (
        "f32[1,5,2]", "f32[3,2,7]", "f32[1,5,7]", 2 * 2 * 7 * (3 * 5 - 2),  # two taps fall on padding
    ),
}  # fmt: skip


@pytest.mark.parametrize("how", CONVOLUTIONS)
def test_a_convolution_counts_the_taps_that_are_no_padding(how):
    image, kernel, out, operations = CONVOLUTIONS[how]
    text = f"""HloModule m

ENTRY %main (x: f32[1], w: f32[1]) -> f32[1] {{
  %x = {image}{{0}} parameter(0)
  %w = {kernel}{{0}} parameter(1)
  ROOT %c = {out}{{0}} convolution(%x, %w), {how}
}}
"""
    assert hlo.products(hlo.parse(text)) == operations


@pytest.mark.parametrize("name", CHIPS)
def test_published_figures_are_those_of_a_chip(name):
    """Figures that belong together: a chip computes more than it reads, and reads more than a link carries."""
    chip = CHIPS[name]
    if chip.platform == "cpu":
        assert not chip.rates and not chip.memory
        return
    assert chip.usable <= chip.memory
    assert max(chip.rates.values()) / chip.bandwidth > 100  # operations a byte
    assert chip.rates["int8"] >= chip.rates["bfloat16"]
    assert chip.link * chip.links < chip.bandwidth
    assert chip.links in (4, 6, 18) and chip.on_chip < 2**30
    if chip.platform == "gpu":
        assert f"device_memory_size: {chip.usable}" in target_config(name)


@pytest.mark.parametrize(
    "target,size", [("v5e:4x4", 16), ("v5p:2x2x2", 8), ("v4:2x2x1", 4), ("h200:8", 8), ("cpu:8", 8)]
)
def test_a_target_is_read(target, size):
    assert parse_target(target).size == size
    assert environment(parse_target(target))["JAX_PLATFORMS"] == "cpu"


@pytest.mark.parametrize(
    "flags,said",
    [
        (["--target", "v5x:4x4"], "did you mean v5"),
        (["--target", "v5e"], "such as v5e:4x4"),
        (["--target", "v5e:16"], "2 numbers"),
        (["--target", "cpu:0"], "such as cpu:8"),
        (["--target", "cpu:99999"], "allowed: up to"),
        (["--target", "cpu:8", "--xla", "fast"], "KEY=VALUE"),
        (["--target", "cpu:8", "--batch", "0"], "--batch=0"),
        (["--target", "cpu:8", "--mesh", "rows=8"], "axis of --mesh"),
        (["--target", "cpu:8", "--picture", "plan.jpg"], "--picture"),
        (["--target", "cpu:8", "--platform", "cpu"], "--platform"),
    ],
)
def test_a_mistake_is_one_line(flags, said, capsys):
    assert main(["plan", "--config", "flux_tiny", *flags]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and said in lines[0]


@pytest.mark.parametrize(
    "target,package,extra", [("v5e:4x4", "libtpu", "tpu"), ("h200:8", "jax_cuda13_plugin", "cuda")]
)
def test_a_compiler_that_is_not_there_is_named(target, package, extra, monkeypatch, capsys):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == package else found(name, *a))
    monkeypatch.delitem(sys.modules, package, raising=False)
    assert main(["plan", "--config", "flux_tiny", "--target", target]) == 2
    assert f"difax[{extra}]" in capsys.readouterr().err


FORA_COMPUTES = 2  # of four evaluations, at its default interval of 3
TINY = [("model.double_depth", 1), ("model.single_depth", 1), ("steps", 4)]


@functools.cache
def tiny_plan(mesh="data=2,seq=4", **settings):
    """The plan of a small FLUX for eight CPU devices, in a process of its own."""
    config = override(load_config("flux_tiny"), TINY)
    return difax.plan(config, "cpu:8", mesh, **settings)


def test_a_plan_is_what_the_same_program_says():
    """Memory as XLA has it of the program that this process compiles for its own eight devices."""
    found = tiny_plan().figures
    config = override(load_config("flux_tiny"), TINY)
    made = lowered.lower(config, jax.devices()[:8], {"data": 2, "seq": 4}, 2)
    memory = made.lowered.compile().memory_analysis()
    assert found["memory"]["argument"] == memory.argument_size_in_bytes
    assert found["memory"]["output"] == memory.output_size_in_bytes
    assert found["memory"]["temporary"] == pytest.approx(memory.temp_size_in_bytes, rel=0.05)  # other XLA flags here
    assert found["fits"] is None and found["seconds"] is None  # nobody publishes a processor's figures
    assert sum(found["holds"].values()) == found["memory"]["peak"]
    calls, evaluations = 2, 4  # one attention a block, one evaluation a step
    assert found["collectives"]["all-to-all"]["times"] % (calls * evaluations) == 0
    assert not found["loops_of_unknown_length"]
    json.dumps(found)


def test_operations_of_a_device_are_those_that_are_compiled():
    found = tiny_plan().figures
    assert found["operations_compiled"] == pytest.approx(sum(found["operations"].values()), rel=0.1)


def test_code_that_another_process_cannot_find_is_refused():
    with pytest.raises(ValueError, match="path/to/file.py:factory"):
        difax.plan("flux_tiny", "cpu:8", "data=8", cache=lambda: None)


def test_what_a_planned_cache_does_is_counted_as_often_as_it_is_planned():
    """Of FORA's four evaluations two compute: every third, and the first."""
    found = tiny_plan(cache="fora").figures
    whole = tiny_plan().figures
    assert found["planned"] and found["decided"]
    attending = lambda plan: plan["collectives"]["all-to-all"]["times"]  # noqa: E731
    assert attending(found) == attending(whole) * FORA_COMPUTES / 4
    assert found["holds"]["caches"] > whole["holds"]["caches"] == 0


def test_a_plan_shows_itself(tmp_path):
    found = tiny_plan()
    text = repr(found)
    assert "memory of one device" in text and "all-to-all" in text and "mesh data=2,seq=4" in text
    found.draw(tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "axes,said",
    [({"data": 3}, "allowed: the 8 of cpu:8"), ({"tensor": 8}, "mesh.tensor=8"), ({"row": 8}, "key of mesh")],
)
def test_a_mesh_that_does_not_divide_is_refused(axes, said):
    config = override(load_config("flux_tiny"), TINY)
    with pytest.raises(ValueError, match=said):
        lowered.lower(config, jax.devices()[:8], planning.checked_axes(axes, parse_target("cpu:8")), 8)


def test_a_batch_that_does_not_divide_is_refused():
    config = override(load_config("flux_tiny"), TINY)
    with pytest.raises(ValueError, match="multiples of 8"):
        lowered.lower(config, jax.devices()[:8], {"data": 8}, 3)


# cache -> is what it computes known before the run
CACHES = {"none": True, "fora": True, "taylorseer": True, "toca": True, "teacache": False, "fbcache": False}


@pytest.mark.parametrize("cache", some(CACHES, "fora", "teacache"))
def test_what_a_planned_cache_computes_is_known_without_weights(cache):
    """The trace of a plan equals the trace of a run with weights, and a cache that decides in the run is said to."""
    config = override(load_config("flux_tiny"), [*TINY, ("steps", 8), ("cache.name", cache)])
    setup = build_setup(config)
    trace, known = roofline.planned_trace(setup, jax.eval_shape(setup.prepare, model_shapes(setup.model)))
    assert known == CACHES[cache]
    if known:
        run = difax.load(config, weights="random")
        ran = draw(run.setup, run.prepared, run.conditions(None)).trace
        for stage, computed in ran.computed.items():
            np.testing.assert_allclose(trace.computed[stage], computed, err_msg=stage)
    else:
        assert all(np.all(a == 1) for a in trace.computed.values())


def test_meshes_multiply_to_the_devices_and_divide_batch_and_heads():
    config = override(load_config("flux_tiny"), TINY)
    setup = build_setup(config)
    of = roofline.work(setup, jax.eval_shape(setup.prepare, model_shapes(setup.model)), 4)
    meshes = list(roofline.factorised(8, of))
    assert all(math.prod(axes.values()) == 8 for axes in meshes)
    assert all(4 % (axes.get("data", 1) * axes.get("fsdp", 1)) == 0 for axes in meshes)
    assert {"seq": 8} in meshes and {"data": 4, "seq": 2} in meshes
    assert not any("cfg" in axes for axes in meshes)  # there is no guidance


def test_the_roofline_is_arithmetic():
    """Operations, bytes and bytes sent over the published rates; the bounds are their maximum and their sum."""
    chip = CHIPS["v5e"]
    found: Any = roofline.seconds(chip, {"bfloat16": 197e12, "int8": 394e12}, 819e9 * 3, 4 * 50e9 / 2)
    assert (found.compute, found.memory, found.collectives) == pytest.approx((2.0, 3.0, 0.5))
    assert found.least == pytest.approx(3.0) and found.summed == pytest.approx(5.5)
    assert roofline.seconds(CHIPS["cpu"], {"float32": 1.0}, 1.0, 1.0) is None


REFUSAL = """RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 22.48G of\
 15.75G hbm. Exceeded hbm capacity by 6.73G.

Total hbm usage >= 22.48G:
  Largest program allocations in hbm:

  1. Size: 4.68G
     Operator: op_name="args[0]"
     Shape: bf16[38,3072,21504]{2,1,0:T(8,128)(2,1)}
     Unpadded size: 4.68G
     XLA label: params
     ==========================

  2. Size: 512.0M
     Shape: f32[128]{0}
"""


def test_the_words_of_a_compiler_that_refuses_are_read():
    assert lowered._asked(REFUSAL) == {"peak": int(22.48 * 2**30), "usable": int(15.75 * 2**30)}
    first, second = lowered._allocations(REFUSAL)
    assert first == ("bf16[38,3072,21504]", int(4.68 * 2**30), "args[0]")
    assert second[:2] == ("f32[128]", 2**29)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["v5e:2x4", "h200:8"])
def test_a_small_model_is_planned_for_an_accelerator_that_is_not_there(target):
    package = {"tpu": "libtpu", "gpu": "jax_cuda13_plugin"}[parse_target(target).published.platform]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    found = difax.plan(override(load_config("flux_tiny"), TINY), target, "data=2,seq=4").figures
    assert found["fits"] and found["devices"] == 8
    assert found["seconds"]["least"] <= found["seconds"]["summed"]
    assert sum(m["times"] for m in found["collectives"].values()) >= 8
    assert found["loops_of_unknown_length"] == 0


@pytest.mark.slow
def test_what_does_not_fit_names_what_does():
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed")
    found = difax.plan("flux_dev", "v5e:2x4", "seq=8").figures
    assert found["fits"] is False and found["arguments"][0]["bytes"] > 2**32
    assert found["instead"] and all(row["bytes"] < 15.75 * 2**30 for row in found["instead"])


@pytest.mark.slow
def test_auto_ranks_the_meshes(capsys):
    assert main(["plan", "--config", "flux_tiny", "--target", "cpu:4", "--mesh", "auto", "--batch", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["candidates"]) > 3 and found["compiled"]
    assert found["mesh"] in {row["mesh"] for row in found["candidates"]}


def test_a_process_for_another_target_loads_no_compiler_here():
    """The module of the front has neither jax's topologies nor libtpu in it."""
    code = (
        "import difax.core.chips as c, sys; c.parse_target('v5e:4x4'); print(any('libtpu' in m for m in sys.modules))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=True)
    assert out.stdout.strip() == "False"


def test_devices_of_a_cpu_target_are_this_process_s():
    assert len(devices(parse_target("cpu:4"))) == 4
    with pytest.raises(ValueError, match="a new process"):
        devices(parse_target("cpu:9"))
