"""Quantised weights: codes and products against numpy, rules, and the pytree's ways through scan, mesh and orbax."""

import dataclasses
import itertools
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from difax.accel.quant import QUANTS
from difax.core.ops import dot
from difax.core.qtensor import (
    FORMATS,
    QTensor,
    Quantisation,
    cast,
    check,
    dequantize,
    quantize,
    quantize_params,
    quantized_dot,
    size_in_bytes,
)
from tests.families import some
from tests.oracles import quant as oracle
from tests.toys import network, tiny_dit

RNG = np.random.default_rng(0)
W = RNG.normal(size=(2, 32, 24)).astype(np.float32) * RNG.uniform(0.1, 3.0, (2, 1, 24)).astype(np.float32)
X = RNG.normal(size=(5, 32)).astype(np.float32) * np.float32([[0.01], [1], [100], [1], [0]])

GROUPS = ("tensor", "channel", 8)
CASES = [
    *(Quantisation(f, None, g) for f, g in itertools.product(FORMATS, GROUPS)),
    *(Quantisation(f, "int8", g) for f, g in itertools.product(("int8", "int4"), GROUPS)),
    *(Quantisation(f, a, g, True) for f, a, g in itertools.product(("int8", "int4"), (None, "int8"), ("channel", 8))),
    Quantisation("float8_e4m3fn", "float8_e4m3fn"),
    Quantisation("float8_e5m2", "float8_e4m3fn", 8),
    Quantisation("int4", "int8", 8, True, rank=3),
    Quantisation("int8", None, "channel", rank=2),
]
cases = pytest.mark.parametrize("how", CASES, ids=lambda h: "-".join(map(str, h)))


@cases
def test_codes_and_weight_by_the_oracle(how):
    q = jax.jit(partial(quantize, how=how))(W)
    assert q.shape == W.shape
    for layer in range(len(W)):
        want = oracle.quantize(W[layer], how)
        got = jax.tree.map(lambda a, i=layer: np.asarray(a[i]), q)
        codes = oracle.unpack(got.values) if how.format == "int4" else got.values
        # a value that lies on the border between two codes may round either way
        wrong = np.abs(codes.astype(np.float32) - want.codes.astype(np.float32)) > 0
        assert wrong.mean() <= (0.02 if how.rank else 0.002), wrong.mean()
        np.testing.assert_allclose(np.asarray(dequantize(q))[layer], want.weight, atol=2e-2 * np.abs(W[layer]).max())
        np.testing.assert_allclose(got.scale, want.scale, rtol=1e-4 if how.rank else 1e-6)


@cases
def test_product_by_the_oracle(how):
    q = jax.tree.map(lambda a: a[0], quantize(jnp.asarray(W), how))
    got = np.asarray(jax.jit(quantized_dot)(X, q))
    rest = np.asarray(dequantize(dataclasses.replace(q, down=None, up=None)), np.float64)
    want = oracle.product(X, rest, how.activation)
    if how.rank:  # the low-rank branch sees the activations as they are
        want = want + X.astype(np.float64) @ np.asarray(q.down, np.float64) @ np.asarray(q.up, np.float64)
    scale = np.abs(want).max(1, keepdims=True) + 1e-6
    error = (np.abs(got - want) / scale).max()
    print(f"{'-'.join(map(str, how))}: largest error of the product {error:.1e} of its row's largest value")
    # bfloat16 rounding inside one product of fp8 codes is the backend's; integers are exact
    assert error <= (2e-2 if "float8" in str(how.activation) else 2e-5)
    assert np.all(got[4] == 0)


@pytest.mark.parametrize("inputs", some((27, 30, 5), 27))
@pytest.mark.parametrize(
    "how",
    [
        Quantisation("int4", None, 8),
        Quantisation("int4", "int8", 8, True),
        Quantisation("int4", "int8"),
        Quantisation("int4", None, "tensor"),
        Quantisation("int4", None, 3, True),
        Quantisation("int4", "int8", 64, rank=1),
        Quantisation("int8", "int8", 8),
        Quantisation("int8", None, 64, True),
        Quantisation("float8_e4m3fn", "float8_e4m3fn", 8),
    ],
    ids=lambda h: "-".join(map(str, h)),
)
def test_groups_and_bytes_need_not_come_out_even(how, inputs):
    """The last group has what is left, and the last byte one value: weight, scales and product by the oracle."""
    w, x = W[0, :inputs], X[:, :inputs]
    q = quantize(jnp.asarray(w), how)
    want = oracle.quantize(w, how)
    assert q.shape == w.shape and q.values.size <= (inputs + 8) * 24
    np.testing.assert_allclose(q.scale[: len(want.scale)], want.scale, rtol=1e-3)
    rest = np.asarray(dequantize(dataclasses.replace(q, down=None, up=None)), np.float64)
    codes = np.abs(np.asarray(dequantize(q)) - want.weight) > 1e-3 * np.abs(w).max()
    assert codes.mean() <= 0.02, codes.mean()  # on the border between two codes
    got, product = np.asarray(jax.jit(quantized_dot)(x, q)), oracle.product(x, rest, how.activation)
    if how.rank:
        product = product + x.astype(np.float64) @ np.asarray(q.down, np.float64) @ np.asarray(q.up, np.float64)
    scale = np.abs(product).max(1, keepdims=True) + 1e-6
    assert (np.abs(got - product) / scale).max() <= (2e-2 if "float8" in str(how.activation) else 2e-5)
    assert np.isfinite(got).all() and np.all(got[4] == 0)


def test_error_of_each_format_is_what_its_bits_allow():
    """Relative error of gaussian weights: a quarter of a step for integers, of the mantissa for fp8."""
    w = jnp.asarray(RNG.normal(size=(256, 64)), jnp.float32)
    errors = {}
    for name in FORMATS:
        q = quantize(w, Quantisation(name))
        errors[name] = float(jnp.linalg.norm(dequantize(q) - w) / jnp.linalg.norm(w))
    print(errors)
    assert errors["int8"] < 0.01 < errors["float8_e4m3fn"] < 0.03 < errors["float8_e5m2"] < 0.06
    assert 0.08 < errors["int4"] < 0.16
    assert float(jnp.linalg.norm(dequantize(quantize(w, Quantisation("int4", group=16))) - w)) < 0.8 * errors[
        "int4"
    ] * float(jnp.linalg.norm(w))


def test_integer_products_are_integer_in_the_program():
    q = jax.tree.map(lambda a: a[0], quantize(jnp.asarray(W), Quantisation("int4", "int8")))
    text = str(jax.make_jaxpr(quantized_dot)(X, q))
    assert "preferred_element_type=int32" in text and "i8[5,32]" in text
    q = jax.tree.map(lambda a: a[0], quantize(jnp.asarray(W), Quantisation("int8")))
    text = str(jax.make_jaxpr(quantized_dot)(X, q))
    assert "preferred_element_type=int32" not in text


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_requantising_is_idempotent(format):
    q = quantize(jnp.asarray(W), Quantisation(format))
    again = quantize(dequantize(q), Quantisation(format))
    np.testing.assert_array_equal(again.values, q.values)


def test_every_int4_pair_survives_packing():
    pairs = np.array(list(itertools.product(range(-8, 8), range(-8, 8))), np.int8).T  # [2, 256]
    from difax.core.qtensor import _pack, _unpack

    packed = _pack(jnp.asarray(pairs))
    assert packed.shape == (1, 256) and packed.dtype == jnp.int8
    np.testing.assert_array_equal(_unpack(packed), pairs)


def test_bytes():
    w = {"kernel": jnp.zeros((64, 32))}
    size = lambda how: size_in_bytes(quantize(w["kernel"], how))  # noqa: E731
    assert size(Quantisation("int8")) == 64 * 32 + 32 * 4
    assert size(Quantisation("int4")) == 64 * 32 // 2 + 32 * 4
    assert size(Quantisation("int4", group=16)) == 64 * 32 // 2 + 4 * 32 * 4
    assert size(Quantisation("float8_e4m3fn", group="tensor")) == 64 * 32 + 4


def test_nothing_overflows():
    w = jnp.asarray([[1e30, -1e-30], [3.0, 0.0]], jnp.float32)
    for name in FORMATS:
        assert np.all(np.isfinite(dequantize(quantize(w, Quantisation(name)))))
    x = jnp.asarray([[1e30, 1.0]], jnp.float32)
    q = quantize(jnp.eye(2), Quantisation("float8_e4m3fn", "float8_e4m3fn"))
    assert np.all(np.isfinite(quantized_dot(x, q)))


REFUSALS = [
    (Quantisation("int7"), (8, 8), "format='int7'; allowed: int8, int4, float8_e4m3fn, float8_e5m2"),
    (Quantisation("int8", "int4"), (8, 8), "activation='int4'; allowed: int8"),
    (Quantisation("int8", "float8_e4m3fn"), (8, 8), "allowed: both integer or both fp8"),
    (Quantisation("float8_e4m3fn", zero_point=True), (8, 8), "zero_point=True .*; allowed: int8, int4"),
    (Quantisation("int8", group=0), (8, 8), "group=0; allowed"),
    (Quantisation("int8", group="row"), (8, 8), "group='row'; allowed"),
    (Quantisation("int8", rank=9), (8, 8), r"rank=9; allowed: 0 ... 8"),
    (Quantisation("int8"), (8,), "shape .*allowed: "),
]


@pytest.mark.parametrize("how, shape, message", REFUSALS)
def test_refuses(how, shape, message):
    with pytest.raises(ValueError, match=message):
        check(how, shape)


# ---------------------------------------------------------------- rules


def test_rules_first_match_wins():
    _, params = tiny_dit()
    rules = ((r"/fc1/", None), (r"^blocks/.*fc", Quantisation("int4")), (r"^blocks/", Quantisation("int8")))
    q = quantize_params(params, rules)
    kernels = {name: q["blocks"][name]["kernel"] for name in q["blocks"]}
    kinds = {name: w.format if isinstance(w, QTensor) else None for name, w in kernels.items()}
    assert kinds == {"ada": "int8", "qkv": "int8", "out": "int8", "fc1": None, "fc2": "int4"}
    assert not any(isinstance(a, QTensor) for a in jax.tree.leaves(q["ends"], is_leaf=lambda a: isinstance(a, QTensor)))
    assert q["blocks"]["qkv"]["bias"] is params["blocks"]["qkv"]["bias"]


def test_a_rule_that_matches_nothing_is_refused():
    _, params = tiny_dit()
    with pytest.raises(ValueError, match=r"rule '\^block/' matches no weight; the weights: .*blocks/qkv/kernel"):
        quantize_params(params, (("^block/", Quantisation()),))
    with pytest.raises(ValueError, match="blocks/ada/kernel: rank=17; allowed: 0 ... 16"):
        quantize_params(params, (("^blocks/", Quantisation(rank=17)),))


# ---------------------------------------------------------------- in a model


def _in_a_model(name: str, dtype: str) -> Any:
    """Every recipe in one precision, and one in both; the rest are slow."""
    few = dtype == ("bfloat16" if name in ("int8_weight", "fp8_weight") else "float32") or name == "int8_w8a8"
    return pytest.param(name, dtype, marks=() if few else pytest.mark.slow)


@pytest.mark.parametrize(
    "name, dtype", [_in_a_model(n, d) for n in QUANTS if n != "none" for d in ("float32", "bfloat16")]
)
def test_a_model_runs_unchanged(name, dtype):
    model, params = tiny_dit(width=32, dtype=dtype)
    settings = {"rank": 4} if "svd" in name else {"group": 8} if name == "int4_weight" else {}
    q = cast(quantize_params(params, QUANTS[name](model, **settings)), dtype)
    x, t, y = jnp.asarray(RNG.normal(size=(2, 4, 4, 3)), jnp.float32), jnp.asarray([10.0, 700.0]), jnp.asarray([1, 4])
    plain = np.asarray(network(model, cast(params, dtype), x, t, y), np.float32)
    got = np.asarray(network(model, q, x, t, y), np.float32)
    error = np.linalg.norm(got - plain) / np.linalg.norm(plain)
    print(f"{name} {dtype}: relative error of the network {error:.4f}")
    assert 1e-4 < error < (0.45 if "4" in name.split("_")[0] or "svd" in name else 0.2)
    if dtype == "float32":  # the same network with the weights that the codes stand for
        full = jax.tree.map(
            lambda a: dequantize(a) if isinstance(a, QTensor) else a, q, is_leaf=lambda a: isinstance(a, QTensor)
        )
        nearer = np.linalg.norm(got - np.asarray(network(model, full, x, t, y))) / np.linalg.norm(plain)
        assert nearer < (1e-5 if "weight" in name else error)


def test_dot_adds_the_bias_and_keeps_leading_axes():
    q = quantize(jnp.asarray(W[0]), Quantisation("int8", "int8"))
    x = jnp.asarray(X[:4].reshape(2, 2, 32))
    b = jnp.arange(24.0)
    np.testing.assert_allclose(
        dot(x, q, b), quantized_dot(x.reshape(4, 32), q).reshape(2, 2, 24) + b[None, None], rtol=1e-6
    )


def test_scans_over_layers():
    q = quantize(jnp.asarray(RNG.normal(size=(3, 16, 16)) / 4, jnp.float32), Quantisation("int4", "int8", 8, True, 2))

    def body(x, layer):
        return quantized_dot(x, layer), None

    x = jnp.asarray(X[:, :16])
    want = x
    for i in range(3):
        want = quantized_dot(want, jax.tree.map(lambda a, i=i: a[i], q))
    got = jax.jit(lambda x, q: jax.lax.scan(body, x, q)[0])(x, q)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_shards_and_is_donated():
    mesh = jax.make_mesh((4,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    q = quantize(jnp.asarray(W[0]), Quantisation("int8", "int8"))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "model"))
    placed = jax.device_put(q, jax.tree.map(lambda a: place, q))
    assert len(placed.values.addressable_shards) == 4 and placed.values.addressable_shards[0].data.shape == (32, 6)
    np.testing.assert_allclose(jax.jit(quantized_dot)(X, placed), quantized_dot(X, q), rtol=1e-5, atol=1e-5)
    double = jax.jit(lambda q: jax.tree.map(lambda a: a + a, q), donate_argnums=0)
    out = double(placed)
    assert out.format == "int8" and placed.values.is_deleted()


def test_survives_orbax(tmp_path):
    tree = {
        "a": quantize(jnp.asarray(W), Quantisation("int4", "int8", 8, True, 3)),
        "b": quantize(jnp.asarray(W), Quantisation("float8_e4m3fn")),
        "c": jnp.ones(3),
    }
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "q", tree)
        checkpointer.wait_until_finished()
        back = checkpointer.restore(tmp_path / "q", jax.eval_shape(lambda: tree))
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    for got, want in zip(jax.tree.leaves(back), jax.tree.leaves(tree), strict=True):
        assert got.dtype == want.dtype
        np.testing.assert_array_equal(np.asarray(got).view(np.uint8), np.asarray(want).view(np.uint8))


# ---------------------------------------------------------------- qwix, with the `parity` extra


@pytest.mark.parametrize("qtype, bound", [("int8", 127.5 / 127), ("int4", 7.5 / 7), ("float8_e4m3fn", 1)])
def test_matches_qwix(qtype, bound):
    """qwix scales integers by max |w| / (top + 1/2) and clips; difax, as the papers, by max |w| / top."""
    qwix = pytest.importorskip("qwix", reason="needs the parity extra (qwix)")
    array = qwix.quantize(jnp.asarray(W[0]), qtype, channelwise_axes=[1])
    q = quantize(jnp.asarray(W[0]), Quantisation(qtype))
    np.testing.assert_allclose(q.scale, bound * np.asarray(array.scale).reshape(1, -1), rtol=1e-6)
    codes = oracle.unpack(np.asarray(q.values)) if qtype == "int4" else np.asarray(q.values)
    apart = np.abs(codes.astype(np.float32) - np.asarray(array.qvalue).astype(np.float32))
    assert apart.max() <= (0 if bound == 1 else 1)
    error = [np.linalg.norm(np.asarray(w) - W[0]) for w in (dequantize(q), qwix.dequantize(array))]
    assert 0.8 < error[0] / error[1] < 1.2, error


def test_product_is_as_near_as_qwixs():
    qwix = pytest.importorskip("qwix", reason="needs the parity extra (qwix)")
    x, w = X[:4], W[0]
    theirs = qwix.dot_general(
        qwix.quantize(jnp.asarray(x), "int8", channelwise_axes=[0]),
        qwix.quantize(jnp.asarray(w), "int8", channelwise_axes=[1]),
        (((1,), (0,)), ((), ())),
    )
    ours = quantized_dot(jnp.asarray(x), quantize(jnp.asarray(w), Quantisation("int8", "int8")))
    want = x.astype(np.float64) @ w
    error = [
        np.linalg.norm((np.asarray(y) - want) / np.linalg.norm(want, axis=1, keepdims=True)) for y in (ours, theirs)
    ]
    print(f"W8A8: relative error {error[0]:.4f}, qwix {error[1]:.4f}")
    assert 0.7 < error[0] / error[1] < 1.3
