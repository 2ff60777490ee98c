"""Which product serves a quantised weight on which device, and in which layout its values lie there.

Two products there are: XLA's (`difax.core.qtensor.quantized_dot`), for every device, and the fused kernel for Hopper
(`difax.accel.kernels.triton_products`). `fitted` brings weights into the layout of the device that is compiled for
and hangs the kernel on those that ask for it.

Measured with M 4608, in us, the rounding of activations included (jax 0.11.2, triton 3.6.0, driver 580.159; rows in
experiments/results/gpu):

  K, N                 bfloat16   int8: XLA, Triton   fp8: XLA, Triton
  3072, 12288, H100    513        459, 391            347, 332
  12288, 3072, H100    463        419, 461            368, 390
  3072, 12288, H200    452        444, 481            346, 352

  int4, 3072, 12288, H200: XLA 466, Triton 464 (both unpack in one pass before; inside the kernel: 853 on the H100)

XLA's are the ones with sums rounded to bfloat16 and weights [N, K]; the H100's Triton column is an earlier form of the
kernel. Where one card gains a sixth another loses a tenth, so "auto" is XLA's product everywhere, and the kernel is for
who asks for it.

Not measured: a low-rank branch or a bias in the kernel, groups in it (128 inputs or 64 at a time), other shapes.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from difax.accel.kernels import triton_launch
from difax.core.contracts import Params
from difax.core.qtensor import (
    Product,
    QTensor,
    Quantisation,
    is_quantized,
    quantized_dot,
    relaid,
    rounded_rows,
    values_of,
)
from difax.core.target import Target

DTYPES = ("bfloat16", "float16")
GROUP = 32  # inputs that one matrix instruction takes


def refused(w: QTensor | Quantisation, where: Target, dtype: Any) -> str | None:
    """Why the fused kernel cannot serve a weight with activations of `dtype` on a target; None: it can."""
    if where.platform != "gpu" or where.capability < (9, 0):
        device = where.kind or where.platform
        return f"the device {device}; it needs an NVIDIA GPU of compute capability 9.0 or later"
    if jnp.dtype(dtype).name not in DTYPES:
        return f"a model in {jnp.dtype(dtype).name}; it computes in {' and '.join(DTYPES)}"
    if w.activation is None:
        return "weights alone; it multiplies 8-bit activations"
    if isinstance(w, Quantisation):
        zero, group = w.zero_point, w.group if isinstance(w.group, int) else GROUP
    else:
        groups = w.scale.shape[-2]
        zero, group = w.zero is not None, w.rows // groups if groups > 1 else GROUP
    if w.format != w.activation and not w.format.startswith("int"):
        return f"weights in {w.format} with activations in {w.activation}; it takes one format"
    if zero:
        return "zero points; it has none"
    return None if group % GROUP == 0 else f"groups of {group} inputs; it takes multiples of {GROUP}"


def product_of(w: QTensor) -> str:
    """The product that serves a weight: "triton" where its `kernel` says so, else "xla"."""
    return "triton" if w.kernel == "triton" else "xla"


def _missing() -> str | None:
    """What a kernel of Triton lacks here, or None."""
    try:
        triton_launch.triton_call()
    except NotImplementedError as reason:
        return str(reason)
    return None


def products_of(params: Params) -> dict[str, int]:
    """How many quantised weights each product serves, as {"triton": 4, "xla": 2}; layers count one by one.

    Args:
      params: parameters with `QTensor`s, prepared or not, or their shapes.
    """
    found: Counter[str] = Counter()
    for w in _quantised(params):
        found[product_of(w)] += math.prod(w.shape[:-2])
    return dict(found)


def check_kernels(rules: Iterable[tuple[str, Quantisation | None]], where: Target, dtype: Any) -> None:
    """Refuses kernel="triton" where the kernel cannot serve.

    Raises:
      ValueError: the key, and why; or the package that is missing.
    """
    for _, how in rules:
        if how is not None and how.kernel == "triton":
            reason = refused(how, where, dtype)
            if reason is not None:
                raise ValueError(f"quant.kernel='triton' is not for {reason}; allowed: auto, xla")
            if (lacks := _missing()) is not None:
                raise ValueError(f"quant.kernel='triton': {lacks}; allowed: auto, xla")


def fitted(params: Params, where: Target, devices: int = 1) -> Params:
    """Parameters with quantised weights in the layout of a device and with the product that is chosen there.

    GPUs: weights that take part in 8-bit products lie transposed (XLA would transpose them in every call), and on
    Hopper the fused kernel serves where `product_of` says so. TPUs: int4 values become `jnp.int4`. CPUs: as they are.
    XLA divides its own products among the devices of a mesh and a kernel not, so there it keeps them all.

    Args:
      params: of a model, with `QTensor`s as they were quantised. where: the target.
      devices: of the mesh, where that is not to be seen in the arrays.

    Raises:
      ValueError: kernel="triton" for a weight that it cannot serve.
    """

    def fit(path: tuple[Any, ...], w: Any) -> Any:
        if not isinstance(w, QTensor):
            return w
        several = max(devices, _devices(w.values)) > 1
        if w.kernel == "triton":
            reason = "weights on several devices" if several else refused(w, where, jnp.bfloat16)
            if reason is not None:
                at = jax.tree_util.keystr(path, simple=True, separator="/")
                raise ValueError(f"{at}: quant.kernel='triton' is not for {reason}; allowed: auto, xla")
        if where.platform == "tpu" and w.format == "int4":
            return _relaid(w, "native")
        if where.platform != "gpu" or w.activation is None:
            return w
        return dataclasses.replace(_relaid(w, "transposed"), product=FUSED if product_of(w) == "triton" else None)

    return jax.tree_util.tree_map_with_path(fit, params, is_leaf=is_quantized)


_relaid = jax.jit(relaid, static_argnums=1)


def _devices(values: Any) -> int:
    """On how many devices an array lies; 1 where it is none yet."""
    return 1 if isinstance(values, Tracer) or not isinstance(values, jax.Array) else len(values.devices())


def _by_xla(x_MK: jax.Array, w: QTensor, bias_N: jax.Array | None) -> jax.Array:
    return quantized_dot(x_MK, dataclasses.replace(w, product=None), bias_N)


def fused_dot(x_MK: jax.Array, w: QTensor, bias_N: jax.Array | None = None, packed: bool = False) -> jax.Array:
    """x @ w + bias by the fused kernel; what it cannot do raises NotImplementedError.

    Args:
      x_MK: [M, K] bfloat16 or float16. w: with `activation`, in any layout. bias_N: [N] or None.
      packed: int4 values are unpacked in the kernel, and not in a pass before it.
    """
    from difax.accel.kernels.triton_products import product

    assert w.activation is not None
    xq_MK, s_M1 = rounded_rows(x_MK, w.activation)
    xq_MK = jnp.pad(xq_MK, ((0, 0), (0, w.rows - xq_MK.shape[1])))
    if packed and w.format == "int4":
        w_NK = relaid(w, "transposed").values
    else:
        w_NK = jnp.swapaxes(values_of(w), 0, 1)
    n = w.shape[-1]
    scale_GN = jnp.broadcast_to(w.scale, (w.scale.shape[0], n))
    t_MR = up_RN = None
    if w.down is not None and w.up is not None:
        t_MR, up_RN = x_MK @ w.down.astype(x_MK.dtype), w.up.astype(x_MK.dtype)
    return product(xq_MK, w_NK, s_M1[:, 0], scale_GN, t_MR, up_RN, bias_N, dtype=x_MK.dtype)


@jax.custom_jvp
def _differentiable(x_MK: jax.Array, w: QTensor, bias_N: jax.Array | None) -> jax.Array:
    return _batched(x_MK, w, bias_N)


@_differentiable.defjvp
def _(primals: Any, tangents: Any) -> Any:  # a kernel has no derivative: XLA's product has, in both directions
    return jax.jvp(_by_xla, primals, tangents)


@jax.custom_batching.custom_vmap
def _batched(x_MK: jax.Array, w: QTensor, bias_N: jax.Array | None) -> jax.Array:
    return fused_dot(x_MK, w, bias_N)


@_batched.def_vmap
def _(size: int, batched: Any, x: jax.Array, w: QTensor, bias: jax.Array | None) -> Any:
    """A kernel takes no further axis: examples become rows where they share a weight, else go one by one."""
    if any(jax.tree.leaves(batched[1:])):
        every = jax.tree.map(
            lambda a, b: a if b else jnp.broadcast_to(a, (size, *a.shape)), (x, w, bias), tuple(batched)
        )
        return jax.lax.map(lambda one: fused_dot(*one), every), True
    return fused_dot(x.reshape(-1, x.shape[-1]), w, bias).reshape(size, -1, w.shape[-1]), True


FUSED = Product("triton", _differentiable)


def _quantised(params: Params) -> list[QTensor]:
    return [a for a in jax.tree.leaves(params, is_leaf=is_quantized) if isinstance(a, QTensor)]
