"""The shared operations: values, gradients, dtypes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from difax.core.ops import (
    Trainable,
    attend,
    dot,
    layer_norm,
    trainable,
    weight_gradients,
    weight_gradients_padded,
)


def arrays(k, n, lead=(4, 5), dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(k + n), 3)
    return (
        jax.random.normal(keys[0], (*lead, k)).astype(dtype),
        jax.random.normal(keys[1], (k, n)).astype(dtype),
        jax.random.normal(keys[2], (n,)).astype(dtype),
    )


@pytest.mark.parametrize("k, n", [(6, 9), (9, 6), (7, 7)])
@pytest.mark.parametrize("lead", [(4, 5), (20,), (2, 3, 4)])
def test_trainable_is_the_same_product_with_the_same_gradients(k, n, lead):
    x, w, b = arrays(k, n, lead)

    def value(wrap):
        return lambda x, w, b: jnp.sum(jnp.sin(dot(x, wrap(w), b)))

    np.testing.assert_array_equal(dot(x, Trainable(w), b), dot(x, w, b))
    ours = jax.jit(jax.grad(value(Trainable), (0, 1, 2)))(x, w, b)
    plain = jax.jit(jax.grad(value(lambda w: w), (0, 1, 2)))(x, w, b)
    for a, c in zip(ours, plain, strict=True):
        np.testing.assert_allclose(a, c, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("k, n", [(6, 9), (9, 6)])
@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 1e-5), (jnp.bfloat16, 0.1)])
def test_padded_weight_gradients(k, n, dtype, tolerance):
    x, _, _ = arrays(k, n, (20,), dtype)
    dy = jax.random.normal(jax.random.key(1), (20, n)).astype(dtype)
    for ours, plain in zip(weight_gradients_padded(x, dy), weight_gradients(x, dy), strict=True):
        assert ours.dtype == dtype and ours.shape == plain.shape
        np.testing.assert_allclose(
            np.asarray(ours, np.float32), np.asarray(plain, np.float32), rtol=tolerance, atol=tolerance
        )


def test_trainable_takes_the_padded_rule_in_bfloat16():
    x, w, b = arrays(6, 9, dtype=jnp.bfloat16)

    def gradient(w):
        return jax.grad(lambda w: jnp.sum(dot(x, w, b).astype(jnp.float32)))(w)

    jaxpr = str(jax.make_jaxpr(lambda w: gradient(Trainable(w)))(w))
    assert "pad[" in jaxpr
    plain = np.asarray(gradient(w), np.float32)
    np.testing.assert_allclose(np.asarray(gradient(Trainable(w)).array, np.float32), plain, rtol=0.02, atol=0.1)


def test_plain_weights_keep_forward_mode():
    x, w, b = arrays(6, 9)
    _, tangent = jax.jvp(lambda w: dot(x, w, b), (w,), (jnp.ones_like(w),))
    np.testing.assert_allclose(tangent, np.asarray(x) @ np.ones((6, 9)), rtol=1e-5)


def test_trainable_wraps_kernels_alone():
    wrapped = trainable({"a": {"kernel": jnp.ones(2), "bias": jnp.ones(2)}, "label": jnp.ones(2)})
    assert isinstance(wrapped["a"]["kernel"], Trainable)
    assert not isinstance(wrapped["a"]["bias"], Trainable) and not isinstance(wrapped["label"], Trainable)


def test_dot_keeps_the_activations_dtype():
    x, w, b = arrays(6, 9)
    assert dot(x.astype(jnp.bfloat16), w, b).dtype == jnp.bfloat16
    np.testing.assert_allclose(dot(x, w, b), np.asarray(x) @ np.asarray(w) + np.asarray(b), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 2e-6), (jnp.bfloat16, 2e-2)])
def test_attention(dtype, tolerance):
    q, k, v = (jax.random.normal(jax.random.key(i), (2, n, 3, 4)).astype(dtype) for i, n in enumerate((5, 7, 7)))
    out = attend(q, k, v)
    assert out.shape == q.shape and out.dtype == dtype
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    logits = np.einsum("bthk,bshk->bhts", q, k) / 2.0
    p = np.exp(logits - logits.max(-1, keepdims=True))
    expected = np.einsum("bhts,bshk->bthk", p / p.sum(-1, keepdims=True), v)
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, atol=tolerance)


def test_layer_norm():
    x = 3 + 2 * jax.random.normal(jax.random.key(0), (5, 64))
    a = np.asarray(x, np.float64)
    expected = (a - a.mean(-1, keepdims=True)) / np.sqrt(a.var(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(layer_norm(x), expected, atol=2e-6)
    assert layer_norm(x.astype(jnp.bfloat16)).dtype == jnp.float32
