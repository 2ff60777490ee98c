"""Quantised weights: `QTensor`, how one is made from an array, and the product of activations with one.

  w ~ (values - zero) scale + down up

A `QTensor` stands where an array stood in a tree of parameters, and `difax.core.ops.dot` dispatches on it; models, the
sampler and every other technique stay as they are. It is a pytree: it is scanned over layers, sharded, donated and
saved leaf by leaf, and what is static (format, activations) is not a leaf.

Shape letters: M rows of activations, K inputs, N outputs, G groups of inputs, R rank; leading axes are layers.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from difax.core.contracts import Params
from difax.core.target import target


class Format(NamedTuple):
    """A way to store numbers: dtype of the leaf, values per byte, largest and (with a zero point) smallest value."""

    dtype: Any
    packed: int
    top: float
    bottom: float


FORMATS = {
    "int8": Format(jnp.int8, 1, 127.0, -128.0),
    "int4": Format(jnp.int8, 2, 7.0, -8.0),  # two per byte: no backend multiplies int4, and devices differ in packing
    "float8_e4m3fn": Format(jnp.float8_e4m3fn, 1, 448.0, -448.0),
    "float8_e5m2": Format(jnp.float8_e5m2, 1, 57344.0, -57344.0),
}
ACTIVATIONS = ("int8", "float8_e4m3fn", "float8_e5m2")
KERNELS = ("auto", "xla", "triton")
LAYOUTS = ("stored", "transposed", "native")


@dataclasses.dataclass(frozen=True)
class Product:
    """A function (x [M, K], w, bias [N] or None) -> [M, N] in the dtype of x, which `quantized_dot` hands over to.

    It is static in a `QTensor`, shown by its name alone.
    """

    name: str
    apply: Callable[[jax.Array, QTensor, jax.Array | None], jax.Array] = dataclasses.field(repr=False)


@flax.struct.dataclass
class QTensor:
    """A quantised weight [..., K, N] and what turns it back.

    values: [..., K', N] in the format's dtype; int4: int8 [..., K'/2, N], row k in the low and row k + K'/2 in the
        high half of a byte. K' is K, or where groups or bytes do not come out even the next number of rows at which
        they do; the rows behind K stand for nothing.
    scale: float32 [..., G, N], G groups of K'/G inputs (1: per channel), or [..., 1, 1] (per tensor).
    zero: as scale, the value that stands for 0; None: symmetric.
    down, up: float32 or bfloat16 [..., K, R] and [..., R, N], added at full precision; or None.
    format: of the values, a key of `FORMATS`. activation: None (weight only), or the format to which the activations
        of each row are rounded for a product in that format.
    kernel: the product that was asked for, one of `KERNELS`; what a device makes of it says `difax.accel.quant`.
    layout: of the values. "stored": as above, which is what is made and saved. Two others are made of it for a device
        (`relaid`): "transposed": [..., N, K'] or packed [..., N, K'/2], as the 8-bit products of GPUs read weights;
        "native": int4 as `jnp.int4` [..., K', N], which a TPU's compiler widens inside a product.
    product: a function that computes x @ w in place of `quantized_dot`, or None.
    """

    values: jax.Array
    scale: jax.Array
    zero: jax.Array | None = None
    down: jax.Array | None = None
    up: jax.Array | None = None
    format: str = flax.struct.field(pytree_node=False, default="int8")
    activation: str | None = flax.struct.field(pytree_node=False, default=None)
    inputs: int | None = flax.struct.field(pytree_node=False, default=None)  # K where it is not K'
    kernel: str = flax.struct.field(pytree_node=False, default="auto")
    layout: str = flax.struct.field(pytree_node=False, default="stored")
    product: Product | None = flax.struct.field(pytree_node=False, default=None)

    @property
    def rows(self) -> int:
        """K': inputs that there are values for."""
        packed = 1 if self.layout == "native" else FORMATS[self.format].packed
        return self.values.shape[-1 if self.layout == "transposed" else -2] * packed

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight that this stands for."""
        *lead, a, b = self.values.shape
        n = a if self.layout == "transposed" else b
        return (*lead, self.rows if self.inputs is None else self.inputs, n)


class Quantisation(NamedTuple):
    """How one weight is quantised: the arguments of `quantize`."""

    format: str = "int8"
    activation: str | None = None
    group: int | str = "channel"
    zero_point: bool = False
    rank: int = 0
    kernel: str = "auto"


def quantize(w: jax.Array, how: Quantisation) -> QTensor:
    """Rounds a weight to the nearest value of a format.

    symmetric: scale = max |w| / top, values = round(w / scale); with a zero point: scale = (max - min) / (top -
    bottom), zero = bottom - round(min / scale), values = round(w / scale) + zero. With a rank R, w loses its best
    approximation of rank R first, which stays at full precision (the low-rank branch of SVDQuant).

    Args:
      w: [..., K, N].
      how: `format`: a key of `FORMATS`; `activation`: None, or one of `ACTIVATIONS` (dynamic, symmetric, one scale
        per row); `group`: "tensor", "channel" (one scale per output) or the number of inputs that share one, of which
        the last group has what is left (all of them, if K is less);
        `zero_point`: asymmetric, for integers; `rank`: 0 for none (32 in SVDQuant); `kernel`: one of `KERNELS`.

    Raises:
      ValueError: an unknown format or group, a product that the formats do not have.

    References: Jacob et al. 2018, arXiv:1712.05877; Li et al. (SVDQuant) 2024, arXiv:2411.05007, without its
    smoothing and its iteration.
    """
    check(how, w.shape)
    f = FORMATS[how.format]
    w = jnp.asarray(w, jnp.float32)
    down = up = None
    if how.rank:
        u, s, vh = jnp.linalg.svd(w, full_matrices=False)
        down = u[..., : how.rank] * s[..., None, : how.rank]
        up = vh[..., : how.rank, :]
        w = w - down @ up
    *lead, k, n = w.shape
    groups = -(-k // how.group) if isinstance(how.group, int) else 1
    rows = _rows(k, groups, how)
    # zeros raise no largest value, and a zero point's range holds 0 anyway
    w = jnp.pad(w, [(0, 0)] * len(lead) + [(0, rows - k), (0, 0)])
    groups = rows // how.group if groups > 1 and isinstance(how.group, int) else 1
    w_GgN = w.reshape(*lead, groups, rows // groups, n)
    axes = (-2, -1) if how.group == "tensor" else (-2,)
    if how.zero_point:
        low = jnp.minimum(w_GgN.min(axes, keepdims=True), 0.0)
        high = jnp.maximum(w_GgN.max(axes, keepdims=True), 0.0)
        scale = _nonzero((high - low) / (f.top - f.bottom))
        zero = f.bottom - jnp.round(low / scale)
        q = jnp.clip(jnp.round(w_GgN / scale) + zero, f.bottom, f.top)
    else:
        scale, zero = _nonzero(jnp.abs(w_GgN).max(axes, keepdims=True) / f.top), None
        q = _round(w_GgN / scale, f)
    q = q.reshape(*lead, rows, n)
    return QTensor(
        values=_pack(q.astype(jnp.int8)) if how.format == "int4" else q.astype(f.dtype),
        scale=scale[..., 0, :],
        zero=None if zero is None else zero[..., 0, :],
        down=down,
        up=up,
        format=how.format,
        activation=how.activation,
        inputs=None if rows == k else k,
        kernel=how.kernel,
    )


def _rows(k: int, groups: int, how: Quantisation) -> int:
    """The least number of rows, k or more, that whole groups and whole bytes hold."""
    unit = FORMATS[how.format].packed
    if groups > 1 and isinstance(how.group, int):
        unit = math.lcm(unit, how.group)
    return -(-k // unit) * unit


def check(how: Quantisation, shape: tuple[int, ...]) -> None:
    """Raises ValueError where a weight of this shape cannot be quantised so."""
    if how.format not in FORMATS:
        raise ValueError(f"format={how.format!r}; allowed: {', '.join(FORMATS)}")
    if how.activation is not None and how.activation not in ACTIVATIONS:
        raise ValueError(f"activation={how.activation!r}; allowed: {', '.join(ACTIVATIONS)}, or None (weight only)")
    integer = how.format.startswith("int")
    if how.activation is not None and integer != how.activation.startswith("int"):
        raise ValueError(f"format={how.format!r} with activation={how.activation!r}; allowed: both integer or both fp8")
    if how.zero_point and not integer:
        raise ValueError(f"zero_point=True with format={how.format!r}; allowed: int8, int4")
    if how.kernel not in KERNELS:
        raise ValueError(f"kernel={how.kernel!r}; allowed: {', '.join(KERNELS)}")
    if len(shape) < 2:
        raise ValueError(f"shape {shape}; allowed: [..., K, N]")
    k, n = shape[-2:]
    if not (how.group in ("tensor", "channel") or (isinstance(how.group, int) and how.group > 0)):
        raise ValueError(f"group={how.group!r}; allowed: 'tensor', 'channel', or a number of inputs")
    if not 0 <= how.rank <= min(k, n):
        raise ValueError(f"rank={how.rank}; allowed: 0 ... {min(k, n)}")


def dequantize(w: QTensor, dtype: Any = jnp.float32) -> jax.Array:
    """The weight [..., K, N] that a `QTensor` stands for."""
    full = _scaled(w, jnp.float32)
    if w.down is not None and w.up is not None:
        full = full + w.down.astype(jnp.float32) @ w.up.astype(jnp.float32)
    return full.astype(dtype)


def relaid(w: QTensor, layout: str) -> QTensor:
    """The same weight with its values in another layout (of `LAYOUTS`; "native" is for int4 alone)."""
    values = jnp.swapaxes(w.values, -1, -2) if w.layout == "transposed" else w.values
    if (w.layout == "native") != (layout == "native"):
        values = _unpack(values).astype(jnp.int4) if layout == "native" else _pack(values.astype(jnp.int8))
    if layout == "transposed":
        values = jnp.swapaxes(values, -1, -2)
    return dataclasses.replace(w, values=values, layout=layout)


def quantized_dot(x_MK: jax.Array, w: QTensor, bias_N: jax.Array | None = None) -> jax.Array:
    """x @ w for a quantised w [K, N], and with a bias x @ w + bias.

    Weight only: the values are widened to the dtype of x. With an activation format: each row of x is rounded to it,
    x ~ s xq, and y = s (xq . (values - zero)) scale, the inner product in int8 with int32 sums, or in fp8 with float32
    sums; int4 values are unpacked to int8 first.

    Where that would write much, two things are rounded to the dtype of x (by `target()`; with bfloat16 each adds up to
    2^-8 of itself, as the rounding of y does, to what the formats already lose). On a GPU the sums of a product without
    groups and zero points, if x is bfloat16: XLA writes them to memory and reads them again for the scales. But on a
    CPU the weights of groups, (values - zero) scale: one product in the dtype of x, where a product for each group
    would read and write [M, N] as often.

    Args:
      x_MK: [M, K]. w: as it was made, or in a layout and with a product for a device. bias_N: [N], in the dtype of x.

    Returns:
      [M, N] in the dtype of x.
    """
    if w.product is not None:
        return w.product.apply(x_MK, w, bias_N)
    if w.activation is None:
        y_MN = _weight_only(x_MK, w)
    else:
        xq_MK, s_M1 = rounded_rows(x_MK, w.activation)
        y_MN = s_M1 * _grouped(xq_MK, w, x_MK.dtype)
    if w.down is not None and w.up is not None:
        y_MN = y_MN + (x_MK @ w.down.astype(x_MK.dtype)) @ w.up.astype(x_MK.dtype)
    y_MN = y_MN.astype(x_MK.dtype)
    return y_MN if bias_N is None else y_MN + bias_N[None]


def rounded_rows(x_MK: jax.Array, activation: str) -> tuple[jax.Array, jax.Array]:
    """Each row as values of a format and its scale [M, 1] float32: x ~ s xq, with max |xq| the format's largest."""
    f = FORMATS[activation]
    top_M1 = jnp.abs(x_MK.astype(jnp.float32)).max(-1, keepdims=True)
    s_M1 = _nonzero(top_M1 / f.top)
    return _round(x_MK.astype(jnp.float32) / s_M1, f).astype(f.dtype), s_M1


def _weight_only(x_MK: jax.Array, w: QTensor) -> jax.Array:
    if w.scale.shape[-2] > 1 or w.zero is not None:
        return x_MK @ _scaled(w, x_MK.dtype)
    # one scale per output leaves the product: the weight is only widened
    codes = values_of(w) if w.inputs is None else values_of(w)[: w.inputs]
    y_MN = jnp.matmul(x_MK, codes.astype(x_MK.dtype), preferred_element_type=jnp.float32)
    return y_MN * w.scale


def _grouped(xq_MK: jax.Array, w: QTensor, dtype: Any) -> jax.Array:
    """sum over groups of (xq . (values - zero)) scale for activations that were of `dtype`."""
    sums = jnp.int32 if w.activation == "int8" else jnp.float32
    groups, k, n, platform = w.scale.shape[-2], w.rows, w.shape[-1], target().platform
    if groups > 1 and platform != "cpu":
        return jnp.matmul(xq_MK.astype(dtype), _scaled(w, dtype), preferred_element_type=jnp.float32)
    xq_MK = jnp.pad(xq_MK, ((0, 0), (0, k - xq_MK.shape[1])))
    # sums that a zero point is taken from may be much larger than what is left of them
    narrow = platform == "gpu" and dtype == jnp.bfloat16 and w.zero is None

    def product(xq_Mk: jax.Array, q_kN: jax.Array, scale: jax.Array, zero: jax.Array | None) -> jax.Array:
        kind = jnp.bfloat16 if narrow and sums == jnp.float32 else sums
        y_MN = jnp.matmul(xq_Mk, q_kN, preferred_element_type=kind)
        y_MN = (y_MN.astype(jnp.bfloat16) if narrow else y_MN).astype(jnp.float32)
        if zero is not None:
            y_MN = y_MN - xq_Mk.astype(jnp.float32).sum(-1, keepdims=True) * zero
        return y_MN * scale

    if groups == 1:
        return product(xq_MK, values_of(w), w.scale, w.zero)
    xq_GMk = jnp.swapaxes(xq_MK.reshape(-1, groups, k // groups), 0, 1)
    leaves = (xq_GMk, values_of(w).reshape(groups, k // groups, n), w.scale[:, None], w.zero)
    leaves = leaves if w.zero is None else (*leaves[:3], w.zero[:, None])

    def add(total_MN: jax.Array, group: Any) -> tuple[jax.Array, None]:
        return total_MN + product(*group), None

    return jax.lax.scan(add, jnp.zeros((xq_MK.shape[0], n), jnp.float32), leaves)[0]


def _scaled(w: QTensor, dtype: Any) -> jax.Array:
    """(values - zero) scale, group by group, without the low-rank part."""
    *lead, inputs, n = w.shape
    k, groups = w.rows, w.scale.shape[-2]
    q = values_of(w).astype(jnp.float32).reshape(*lead, groups, k // groups, n)
    if w.zero is not None:
        q = q - w.zero[..., None, :]
    return (q * w.scale[..., None, :]).reshape(*lead, k, n)[..., :inputs, :].astype(dtype)


def values_of(w: QTensor) -> jax.Array:
    """The values [..., K', N], int4 ones as int8, whatever their layout."""
    if w.layout == "native":
        return w.values.astype(jnp.int8)
    values = jnp.swapaxes(w.values, -1, -2) if w.layout == "transposed" else w.values
    return _unpack(values) if w.format == "int4" else values


def _pack(q: jax.Array) -> jax.Array:
    low, high = jnp.split(q, 2, axis=-2)
    return (high << 4) | (low & 15)


def _unpack(packed: jax.Array) -> jax.Array:
    low = jax.lax.shift_right_arithmetic(packed << 4, jnp.int8(4))
    return jnp.concatenate([low, jax.lax.shift_right_arithmetic(packed, jnp.int8(4))], axis=-2)


def _round(x: jax.Array, f: Format) -> jax.Array:
    """To the format's grid, symmetric and clipped: a cast to fp8 would overflow to NaN, one to int8 truncate."""
    x = jnp.clip(x, -f.top, f.top)
    return jnp.round(x) if f.dtype == jnp.int8 else x


def _nonzero(scale: jax.Array) -> jax.Array:
    return jnp.where(scale == 0, 1.0, scale)


Rules = Sequence[tuple[str, Quantisation | None]]


def quantize_params(params: Params, rules: Rules) -> Params:
    """Quantises the weights whose path a rule matches; the first rule that matches decides.

    Args:
      params: nested dict of arrays; only leaves named "kernel" are weights, named by their path as "blocks/qkv/kernel".
      rules: (regular expression, `Quantisation` or None to leave as it is); matched anywhere in the path
        (`re.search`), so anchor where it matters.

    Returns:
      The tree with `QTensor` leaves. A weight that no rule matches stays as it is.

    Raises:
      ValueError: a rule that matches no weight, names every other matter of `quantize` with the weight's path.
    """
    paths = [_path(path) for path, _ in _kernels(params)]
    for pattern, _ in rules:
        if not any(re.search(pattern, path) for path in paths):
            raise ValueError(f"quantisation rule {pattern!r} matches no weight; the weights: {', '.join(paths)}")

    def leaf(path: tuple[Any, ...], w: Any) -> Any:
        name = _path(path)
        how = next((h for pattern, h in rules if re.search(pattern, name)), None)
        if not name.endswith("/kernel") or how is None:
            return w
        try:
            check(how, w.shape)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        return jax.jit(partial(quantize, how=how))(w)

    return jax.tree_util.tree_map_with_path(leaf, params)


def _kernels(params: Params) -> Iterable[tuple[Any, Any]]:
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    return [(path, leaf) for path, leaf in leaves if _path(path).endswith("/kernel")]


def _path(path: tuple[Any, ...]) -> str:
    return "/".join(str(getattr(part, "key", getattr(part, "idx", part))) for part in path)


def is_quantized(leaf: Any) -> bool:
    """For `is_leaf`: a `QTensor` is one weight."""
    return isinstance(leaf, QTensor)


CAST = ("kernel", "bias", "label")


def cast(params: Params, dtype: Any) -> Params:
    """Casts what takes part in products: kernels, biases and label embeddings; of a `QTensor` the low-rank part.

    Norms' scales and modulation tables are small, are used in float32, and stay as they are.
    """

    def one(path: tuple[Any, ...], leaf: Any) -> Any:
        if not isinstance(leaf, QTensor):
            return jnp.asarray(leaf).astype(dtype) if _path(path).rpartition("/")[2] in CAST else jnp.asarray(leaf)
        if leaf.down is None or leaf.up is None:
            return leaf
        return dataclasses.replace(leaf, down=leaf.down.astype(dtype), up=leaf.up.astype(dtype))

    return jax.tree_util.tree_map_with_path(one, params, is_leaf=is_quantized)


def size_in_bytes(params: Params) -> int:
    """Bytes of all leaves as they are stored, two values of `jnp.int4` in one."""
    leaves = jax.tree.leaves(params)
    return sum(-(-a.size // 2) if a.dtype == jnp.int4 else a.size * jnp.dtype(a.dtype).itemsize for a in leaves)
