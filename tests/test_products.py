"""Products of quantised weights by device: the fused kernel in Triton's interpreter and compiled for Hopper, XLA's
routes on the CPU, what libtpu makes of them, and which is chosen."""

import dataclasses
import os
import pathlib
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from difax.accel.kernels import triton_launch
from difax.accel.kernels.triton_products import product, tiles
from difax.accel.quant import QUANTS
from difax.accel.quant.products import FUSED, check_kernels, fitted, fused_dot, product_of, products_of
from difax.build import build_setup
from difax.config import load_config, override
from difax.core.qtensor import (
    FORMATS,
    LAYOUTS,
    QTensor,
    Quantisation,
    cast,
    dequantize,
    quantize,
    quantize_params,
    quantized_dot,
    relaid,
    size_in_bytes,
)
from difax.core.target import Target, lowering_for
from tests.families import some
from tests.oracles import quant as oracle
from tests.toys import network, tiny_dit
from tests.triton_compiler import compiled

CPU, TPU, AMPERE = Target("cpu"), Target("tpu", "TPU v6e"), Target("gpu", "A100", (8, 0))
HOPPER, BLACKWELL = Target("gpu", "H100", (9, 0)), Target("gpu", "B200", (10, 0))
RNG = np.random.default_rng(5)
INT8, W4A8 = Quantisation("int8", "int8"), Quantisation("int4", "int8")
FP8 = Quantisation("float8_e4m3fn", "float8_e4m3fn")


def by_formula(x: np.ndarray, w: QTensor, bias: np.ndarray | None) -> np.ndarray:
    """The product in float64: rows rounded to their format, the weight that the values stand for."""
    rest = np.asarray(dequantize(dataclasses.replace(w, down=None, up=None)), np.float64)
    y = oracle.product(x, rest, w.activation)
    if w.down is not None:
        y = y + x.astype(np.float64) @ np.asarray(w.down, np.float64) @ np.asarray(w.up, np.float64)
    return y if bias is None else y + bias.astype(np.float64)


def relative(got: Any, want: np.ndarray) -> float:
    return float(np.linalg.norm(np.asarray(got, np.float64) - want) / np.linalg.norm(want))


# ---------------------------------------------------------------- the kernel


class Case(NamedTuple):
    """A product: how the weight is quantised, sizes, options of the call."""

    name: str
    how: Quantisation
    sizes: tuple[int, int, int] = (70, 50, 128)  # M, N, K
    bias: bool = False
    packed: bool = False
    dtype: str = "bfloat16"


CASES = [
    Case("int8", INT8),
    Case("tiles that come out even", INT8, (128, 256, 128)),
    Case("ragged, bias", INT8, (131, 261, 100), bias=True),
    Case("odd rows", INT8, (130, 70, 101), bias=True),
    Case("float16", INT8, bias=True, dtype="float16"),
    Case("one row", INT8, (1, 50, 64), bias=True),
    Case("per tensor", INT8._replace(group="tensor"), bias=True),
    Case("fp8", FP8, (70, 50, 100), bias=True),
    Case("e5m2", Quantisation("float8_e5m2", "float8_e5m2")),
    Case("int4", W4A8, (70, 50, 100)),
    Case("int4, odd rows", W4A8, (70, 50, 101)),
    Case("int4 unpacked in the kernel", W4A8, (70, 50, 100), bias=True, packed=True),
    Case("low rank", W4A8._replace(rank=5), (70, 50, 100), bias=True),
    Case("groups of 64, low rank", W4A8._replace(group=64, rank=32), (70, 50, 256), bias=True),
    Case("groups of 128", INT8._replace(group=128), (70, 50, 384)),
    Case("groups of 32, the last not full", W4A8._replace(group=32), (70, 50, 90)),
    Case("groups of 96", W4A8._replace(group=96), (70, 50, 192)),
    Case("groups of 64 unpacked in the kernel", W4A8._replace(group=64), (70, 50, 256), packed=True),
    Case("groups in fp8", FP8._replace(group=64), (70, 50, 128)),
]
cases = pytest.mark.parametrize("case", some(CASES, CASES[2]), ids=[case.name for case in CASES])


def given(case: Case) -> tuple[jax.Array, QTensor, jax.Array | None]:
    m, n, k = case.sizes
    rng = np.random.default_rng([3, m, n, k])
    w = rng.normal(size=(k, n)).astype(np.float32) * rng.uniform(0.1, 3.0, (1, n)).astype(np.float32)
    x = jnp.asarray(rng.normal(size=(m, k)) * rng.uniform(0.1, 10.0, (m, 1)), case.dtype)
    return x, quantize(jnp.asarray(w), case.how), jnp.asarray(rng.normal(size=n), case.dtype) if case.bias else None


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels run in Triton's interpreter."""
    pytest.importorskip("triton", reason="needs triton (the extra triton)")
    from tests import triton_interpreter

    monkeypatch.setitem(triton_interpreter.TYPES, np.dtype(jnp.float8_e5m2), triton_interpreter.tl.float8e5)
    monkeypatch.setitem(triton_interpreter.NUMPY, triton_interpreter.tl.float8e5, np.dtype(jnp.float8_e5m2))
    monkeypatch.setattr(triton_launch, "triton_call", lambda: triton_interpreter.call)


@cases
def test_kernel_by_the_oracle(case: Case, interpreted: None):
    x, w, bias = given(case)
    with lowering_for(HOPPER):
        got = fused_dot(x, relaid(w, "transposed"), bias, case.packed)
        assert got.dtype == x.dtype and np.isfinite(np.asarray(got, np.float32)).all()
    want = by_formula(np.asarray(x, np.float64), w, None if bias is None else np.asarray(bias))
    print(f"{case.name}: relative error {relative(got, want):.1e}")
    # the one rounding of what comes out, 2^-8 at most in bfloat16, and about half of that in the mean
    assert relative(got, want) < float(jnp.finfo(case.dtype).eps) / 2


class Shapes(NamedTuple):
    """A product that is compiled: type of its operands, sizes, groups, rank, int4 unpacked in the kernel; and how."""

    dtype: str = "int8"
    sizes: tuple[int, int, int] = (4608, 12288, 3072)  # M, N, K
    groups: int = 1
    rank: int = 0
    packed: bool = False
    out: str = "bfloat16"
    tuning: dict[str, Any] = {}  # noqa: RUF012


HOPPERS = [
    Shapes(),
    Shapes(out="float16"),
    Shapes("float8_e4m3fn"),
    Shapes("float8_e5m2"),
    Shapes(sizes=(4608, 3072, 12288)),
    Shapes(tuning={"block": (128, 128, 128)}),
    Shapes(rank=32),
    Shapes(groups=48, rank=32),
    Shapes(groups=24),
    Shapes(groups=96),
    Shapes("float8_e4m3fn", groups=24),
    Shapes(packed=True),
    Shapes(packed=True, groups=48, rank=32),
    Shapes(sizes=(1000, 1160, 1160)),
    Shapes(sizes=(1000, 1153, 1153), rank=32),
]


@pytest.mark.parametrize("shapes", some(HOPPERS, HOPPERS[7]), ids=str)
def test_hopper_multiplies_with_warp_groups_and_spills_nothing(
    shapes: Shapes, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    (m, n, k), r = shapes.sizes, shapes.rank
    of = lambda *dims, dtype="float32": jax.ShapeDtypeStruct(dims, dtype)  # noqa: E731
    x, w = of(m, k, dtype=shapes.dtype), of(n, k // 2 if shapes.packed else k, dtype=shapes.dtype)
    low = (of(m, r, dtype=shapes.out), of(r, n, dtype=shapes.out)) if r else (None, None)
    args = (x, w, of(m), of(shapes.groups, n), *low, of(n, dtype=shapes.out))
    made = compiled(
        tmp_path, monkeypatch, HOPPER, lambda *a: product(*a, dtype=jnp.dtype(shapes.out), **shapes.tuning), *args
    )
    print(shapes, f"{made.registers} registers, {made.shared / 1024:.0f} KiB shared")
    kinds = {kind.split("aligned.")[1] for kind in re.findall(r"wgmma\.mma_async\S+", made.ptx)}
    want = {"int8": "s32.s8.s8", "float8_e4m3fn": "f32.e4m3.e4m3", "float8_e5m2": "f32.e5m2.e5m2"}[shapes.dtype]
    assert {kind.partition("k32.")[2] for kind in kinds if "k32" in kind} == {want} and "mma.sync" not in made.ptx
    assert ("IGMMA" if shapes.dtype == "int8" else "QGMMA") in made.sass
    assert made.spilled == 0 and "STL" not in made.sass and made.shared <= 227 * 1024


def test_a_program_for_hopper_carries_its_kernel():
    """Through jax-triton, in a scan over layers; derivatives and batches go around the kernel or into its rows."""
    pytest.importorskip("triton", reason="needs triton (the extra triton)")
    pytest.importorskip("jax_triton", reason="needs jax-triton (the extra triton)")
    w = fitted({"w": quantize(jnp.asarray(RNG.normal(size=(3, 64, 96)), jnp.float32), INT8)}, HOPPER)["w"]
    x = jnp.zeros((256, 64), jnp.bfloat16)
    skip = jax.export.DisabledSafetyCheck.custom_call("triton_kernel_call")

    def calls(function: Any, *args: Any) -> int:
        with lowering_for(HOPPER):
            made = jax.export.export(jax.jit(function), platforms=["cuda"], disabled_checks=[skip])(*args)
        return made.mlir_module().count("@triton_kernel_call")

    layers = lambda x, w: jax.lax.scan(lambda x, w: (quantized_dot(x, w)[:, :64], None), x, w)[0]  # noqa: E731
    assert calls(layers, x, w) == 1
    one = jax.tree.map(lambda a: a[0], w)
    assert calls(jax.vmap(quantized_dot, (0, None)), jnp.zeros((2, 256, 64), jnp.bfloat16), one) == 1
    assert calls(jax.vmap(quantized_dot), jnp.zeros((3, 256, 64), jnp.bfloat16), w) == 1
    assert calls(jax.grad(lambda x: quantized_dot(x, one).astype(jnp.float32).sum()), x) == 0
    assert calls(quantized_dot, x[:127], one) == 0  # less than a tile's rows


# ---------------------------------------------------------------- XLA's routes, run on the CPU

ROUTES = [
    *(Quantisation(f, None, g) for f in ("int8", "int4") for g in ("channel", 8)),
    *(Quantisation(f, "int8", g) for f in ("int8", "int4") for g in ("tensor", "channel", 8)),
    Quantisation("int8", "int8", "channel", True),
    Quantisation("int4", "int8", 8, True),
    FP8,
    Quantisation("float8_e5m2", "float8_e4m3fn", 8),
    Quantisation("int4", "int8", "channel", False, 3),
]
BY_DEFAULT = (INT8, FP8, Quantisation("int4", "int8", 8, True))


@pytest.mark.parametrize("where", [HOPPER, AMPERE, TPU], ids=lambda t: t.kind)
@pytest.mark.parametrize("how", some(ROUTES, *BY_DEFAULT), ids=lambda h: "-".join(map(str, h)))
def test_routes_by_the_oracle(how: Quantisation, where: Target):
    """Whatever the layout and the device, the product is that of the formula, but for roundings that are said."""
    w = quantize(jnp.asarray(RNG.normal(size=(37, 24)), jnp.float32), how)
    bias = np.float32(RNG.normal(size=24))
    for dtype, bound in ((jnp.float32, 1e-5), (jnp.bfloat16, 2**-8)):
        x = jnp.asarray(RNG.normal(size=(11, 37)), dtype)
        want = by_formula(np.asarray(x, np.float64), w, bias.astype(dtype))
        for kernel in ("auto", "xla"):
            placed = fitted({"w": dataclasses.replace(w, kernel=kernel)}, where)["w"]
            with lowering_for(where):
                got = jax.jit(quantized_dot)(x, placed, jnp.asarray(bias, dtype))
            assert got.dtype == dtype
            if "float8" in str(how.activation):  # the CPU's own product of fp8 rounds
                bound = max(bound, 1e-2)
            assert relative(got, want) < bound


@pytest.mark.parametrize("zero", [False, True])
def test_sums_are_rounded_once_and_not_before_a_zero_point_is_taken(zero):
    """On a GPU, bfloat16: up to 2^-8 of the sums and 2^-8 of what comes out, element by element."""
    w = quantize(jnp.asarray(RNG.normal(1.0, 0.1, (512, 24)), jnp.float32), INT8._replace(zero_point=zero))
    x = jnp.asarray(RNG.normal(size=(40, 512)), jnp.bfloat16)
    with lowering_for(HOPPER):
        got = np.asarray(quantized_dot(x, relaid(w, "transposed")), np.float64)
        text = str(jax.make_jaxpr(quantized_dot)(x, relaid(w, "transposed")))
    assert text.count("bf16[40,24] = convert_element_type") == (1 if zero else 2)
    exact = np.asarray(quantized_dot(x.astype(jnp.float32), w), np.float64)
    error = np.abs(got - exact) / np.abs(exact)
    print(f"zero point {zero}: largest relative error {error.max():.1e}, 2^-8 is {2**-8:.1e}")
    assert error.max() < (1.01 if zero else 2.01) * 2**-8


def test_groups_are_one_product_but_on_the_cpu():
    w = quantize(jnp.asarray(RNG.normal(size=(64, 24)), jnp.float32), W4A8._replace(group=8))
    x = jnp.zeros((4, 64), jnp.bfloat16)
    for where, loops in ((CPU, True), (TPU, False), (AMPERE, False)):
        with lowering_for(where):
            text = str(jax.make_jaxpr(lambda x: quantized_dot(x, w))(x))  # a function of its own: jax remembers traces
            assert ("scan[" in text) == loops, where


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("format", FORMATS)
def test_layouts_hold_the_same_weight(format, layout):
    """Stacked over layers, with rows that do not come out even; and back."""
    w = quantize(jnp.asarray(RNG.normal(size=(3, 27, 10)), jnp.float32), Quantisation(format, group=8))
    if layout == "native" and format != "int4":
        return
    other = relaid(w, layout)
    k = 32 // (2 if format == "int4" and layout != "native" else 1)
    assert other.values.shape == ((3, 10, k) if layout == "transposed" else (3, k, 10))
    assert other.shape == w.shape == (3, 27, 10) and other.rows == w.rows == 32
    assert size_in_bytes(other) == size_in_bytes(w)
    np.testing.assert_array_equal(dequantize(other), dequantize(w))
    back = relaid(other, "stored")
    assert jax.tree.structure(back) == jax.tree.structure(w)
    np.testing.assert_array_equal(np.asarray(back.values).view(np.uint8), np.asarray(w.values).view(np.uint8))
    one = jax.tree.map(lambda a: a[1], other)
    np.testing.assert_array_equal(dequantize(one), dequantize(w)[1])


@pytest.mark.parametrize("name, where", [("int8_w8a8", HOPPER), pytest.param("int4_w4a8", TPU, marks=pytest.mark.slow)])
def test_a_model_runs_unchanged(name, where):
    model, params = tiny_dit(width=32)
    q = cast(quantize_params(params, QUANTS[name](model)), "float32")
    x, t, y = jnp.asarray(RNG.normal(size=(2, 4, 4, 3)), jnp.float32), jnp.asarray([10.0, 700.0]), jnp.asarray([1, 4])
    with lowering_for(where):
        got = network(model, fitted(q, where), x, t, y)
    np.testing.assert_allclose(got, network(model, q, x, t, y), rtol=2e-4, atol=2e-4)


# ---------------------------------------------------------------- libtpu, without a TPU


@pytest.fixture(scope="module")
def v6e():
    pytest.importorskip("libtpu", reason="needs libtpu (the extra tpu)")
    from jax.experimental import topologies

    with pytest.MonkeyPatch.context() as patch:
        for key, value in {
            "TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-8", "TPU_WORKER_HOSTNAMES": "localhost",
            "TPU_WORKER_ID": "0", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        }.items():  # fmt: skip
            patch.setitem(os.environ, key, value)
        yield topologies.get_topology_desc(platform="tpu", topology_name="v6e:2x2").devices[0]


@pytest.mark.parametrize("how", some((INT8, W4A8, W4A8._replace(rank=32)), W4A8), ids=lambda h: "-".join(map(str, h)))
def test_tpus_multiply_int8_and_write_no_sums(how, v6e):
    place = jax.sharding.SingleDeviceSharding(v6e)
    abstract = lambda tree: jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), tree)  # noqa: E731
    m, k, n = 512, 1024, 2048
    make = lambda w: fitted({"w": quantize(w, how)}, TPU)["w"]  # noqa: E731
    w = jax.eval_shape(make, jax.ShapeDtypeStruct((k, n), jnp.float32))
    assert w.values.dtype == (jnp.int4 if how.format == "int4" else jnp.int8)
    x, bias = (jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((m, k), (n,)))
    with lowering_for(TPU):
        text = jax.jit(quantized_dot).lower(*abstract((x, w, bias))).compile().as_text() or ""
    types = dict(re.findall(r"(%[\w.-]+) = (\w+)\[", text))
    products = [line for line in text.splitlines() if " convolution(" in line and f"[{m},{n}]" in line.split("(")[0]]
    operands = [[types[a] for a in re.findall(r"%[\w.-]+", line.partition("convolution(")[2])[:2]] for line in products]
    assert ["s8", "s8"] in operands or ["s8", "s4"] in operands, operands
    entry = text[text.index("ENTRY") :]
    written = re.findall(rf"= (\w+)\[{m},{n}\]", entry)
    assert set(written) <= {"bf16"}, written


# ---------------------------------------------------------------- the choice

CHOICES = [
    (INT8, HOPPER, (3072, 12288), 4608, "xla"),
    (W4A8, HOPPER, (3072, 12288), 4608, "xla"),
    (FP8, HOPPER, (3072, 12288), 4608, "xla"),
    (INT8, BLACKWELL, (3072, 12288), 4608, "xla"),
    (INT8, AMPERE, (3072, 12288), 4608, "xla"),
    (INT8, TPU, (3072, 12288), 4608, "xla"),
    (INT8, CPU, (3072, 12288), 4608, "xla"),
    (INT8._replace(kernel="xla"), HOPPER, (3072, 12288), 4608, "xla"),
    (INT8._replace(kernel="triton"), HOPPER, (12288, 3072), 1, "triton"),
    (FP8._replace(kernel="triton"), HOPPER, (3072, 12288), 4608, "triton"),
    (W4A8._replace(rank=32, kernel="triton"), HOPPER, (3072, 12288), 4608, "triton"),
    (Quantisation("int4"), HOPPER, (3072, 12288), 4608, "xla"),
]


@pytest.mark.parametrize("how, where, sizes, rows, want", CHOICES)
def test_what_is_chosen(how, where, sizes, rows, want, monkeypatch):
    monkeypatch.setattr(triton_launch, "triton_call", lambda: None)  # as if it were installed
    w = jax.eval_shape(lambda w: quantize(w, how), jax.ShapeDtypeStruct((5, *sizes), jnp.float32))
    assert product_of(w) == want
    assert products_of({"a": {"kernel": w}, "b": jnp.ones(2)}) == {want: 5}
    placed = jax.eval_shape(lambda w: fitted({"w": w}, where)["w"], w)
    assert product_of(placed) == want
    layout = {"gpu": "stored" if how.activation is None else "transposed", "tpu": "stored", "cpu": "stored"}
    assert placed.layout == layout[where.platform] and placed.shape == w.shape
    assert (placed.product is FUSED) == (want == "triton")
    asked = []

    def call(*_: Any, out: Any, **more: Any) -> jax.Array:
        asked.append(more)
        return jnp.zeros(out.shape, out.dtype)

    monkeypatch.setattr(triton_launch, "triton_call", lambda: call)
    with lowering_for(where):  # what is traced is what was said
        one = jax.eval_shape(lambda w: jax.tree.map(lambda a: a[0], w), placed)
        jax.eval_shape(lambda *a: quantized_dot(*a), jax.ShapeDtypeStruct((rows, sizes[0]), jnp.bfloat16), one)
    assert bool(asked) == (want == "triton")


def test_a_kernel_whose_package_is_missing_is_refused(monkeypatch):
    def missing():
        raise NotImplementedError("a Triton kernel needs triton, of the extra triton")

    monkeypatch.setattr(triton_launch, "triton_call", missing)
    with pytest.raises(ValueError, match="^quant.kernel='triton': a Triton kernel needs triton, .*; allowed: auto"):
        check_kernels([("", INT8._replace(kernel="triton"))], HOPPER, "bfloat16")


def test_weights_on_several_devices_keep_xla():
    mesh = jax.make_mesh((4,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "model"))
    w = quantize(jnp.asarray(RNG.normal(size=(32, 64)), jnp.float32), INT8)
    placed = jax.device_put(w, jax.tree.map(lambda a: place, w))
    over = fitted({"w": placed}, HOPPER)["w"]
    assert over.layout == "transposed" and over.product is None and len(over.values.sharding.device_set) == 4
    asking = dataclasses.replace(w, kernel="triton")
    assert fitted({"w": asking}, HOPPER)["w"].product is FUSED
    with pytest.raises(ValueError, match="w: quant.kernel='triton' is not for weights on several devices"):
        fitted({"w": asking}, HOPPER, devices=4)
    with pytest.raises(ValueError, match="w: quant.kernel='triton' is not for weights on several devices"):
        fitted({"w": dataclasses.replace(placed, kernel="triton")}, HOPPER)


REFUSED = [
    (INT8, CPU, "bfloat16", "the device cpu; it needs an NVIDIA GPU of compute capability 9.0"),
    (INT8, AMPERE, "bfloat16", "the device A100"),
    (INT8, HOPPER, "float32", "a model in float32; it computes in bfloat16 and float16"),
    (INT8._replace(zero_point=True), HOPPER, "bfloat16", "zero points"),
    (INT8._replace(group=48), HOPPER, "bfloat16", "groups of 48 inputs; it takes multiples of 32"),
    (Quantisation("float8_e5m2", "float8_e4m3fn"), HOPPER, "bfloat16", "weights in float8_e5m2 with activations in"),
]


@pytest.mark.parametrize("how, where, dtype, says", REFUSED)
def test_a_kernel_that_cannot_serve_is_refused(how, where, dtype, says):
    with pytest.raises(ValueError, match=rf"^quant.kernel='triton' is not for {says}.*; allowed: auto, xla$"):
        check_kernels([("", how._replace(kernel="triton")), ("", None)], where, dtype)
    check_kernels([("", how), ("", None)], where, dtype)


def test_a_configuration_says_which():
    small = [("model.depth", 2), ("model.width", 16), ("model.size", 8), ("model.patch", 2), ("steps", 2)]
    config = override(load_config("fmnist_smoke"), [*small, ("quant.name", "int8_w8a8")])
    for kernel, says in (("triton", "kernel='triton' is not for the device cpu"), ("tritn", "quant int8_w8a8: kernel")):
        with pytest.raises(ValueError, match=says):
            build_setup(override(config, [("quant.kernel", kernel)]))
    setup = build_setup(override(config, [("quant.kernel", "xla")]))
    params = jax.eval_shape(setup.model.init, jax.random.key(0))
    here = jax.eval_shape(lambda params: setup.prepare(params), params)
    assert all(w.layout == "stored" for w in jax.tree.leaves(here, is_leaf=_is) if _is(w))
    with lowering_for(HOPPER):
        there = jax.eval_shape(lambda params: setup.prepare(params), params)
    assert {w.layout for w in jax.tree.leaves(there, is_leaf=_is) if _is(w)} == {"transposed"}
    blocks = sum(stage.depth for stage in setup.model.stages)
    assert products_of(here) == {"xla": 5 * blocks}


def _is(leaf: Any) -> bool:
    return isinstance(leaf, QTensor)


def test_tiles_fit_a_program_of_hopper():
    for m, n, k in ((4608, 12288, 3072), (4608, 3072, 12288), (1, 7, 5), (300, 200, 1001)):
        for packed in (False, True):
            how = tiles(m, n, k, packed=packed)
            bm, bn, bk = (how.constants[key] for key in ("BM", "BN", "BK"))
            assert how.grid[0] * bm * bn >= m * n and how.stages * (bm * (1 + packed) + bn) * bk <= 227 * 1024
    with pytest.raises(NotImplementedError, match="groups of 48 inputs; it takes multiples of 32"):
        tiles(128, 128, 96, groups=2)
