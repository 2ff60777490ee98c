"""Where the arrays of a run lie: a mesh of devices whose axes have names, as data and not as code of a model.

  data      samples                          fsdp   samples too, and every weight cut along one axis
  cfg       the two halves of guidance       tensor the columns and rows of weights, and the heads
  ring, ulysses    the tokens of a sample, in this order: together they are `seq`

What is computed is the same program on global arrays, and XLA puts the communication in from where a few of them are
held (`rows`, `tokens`, `memory`): the batch, the tokens at the borders of blocks, the weights, what caches remember.
Only attention runs device by device (`difax.accel.parallel`).

Streams that are joined (`join`, `cut`) and products that are fused (`split`, `fuse`) are laid out shard by shard, each
device having its own piece of every part: [txt_0, img_0, txt_1, img_1, ...]. Attention takes tokens in any order, so
joining moves nothing between devices.

Shoeybi et al., Megatron-LM, 2019, arXiv:1909.08053 (columns, then rows); Korthikanti et al., 2022, arXiv:2205.05198
(tokens between them); Xu et al., GSPMD, 2021, arXiv:2105.04663.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from difax.core.contracts import Shard
from difax.core.qtensor import QTensor, is_quantized
from difax.core.target import Target, target_of

NAMES = ("data", "fsdp", "cfg", "ring", "ulysses", "tensor")  # of a mesh, neighbours last
SEQ = ("ring", "ulysses")
SAMPLES = ("data", "fsdp")


class Axes(NamedTuple):
    """Devices along each axis of a run's mesh; their product is the number of devices.

    data: samples. cfg: halves of guidance, 1 or 2. seq: tokens. tensor: columns, rows and heads. fsdp: samples, with
    the weights cut too. pipe: blocks, 1: no pipeline runs here yet. ulysses: of `seq`, those that exchange heads for
    tokens, the rest passing keys and values around a ring; None is the most that the heads allow.
    """

    data: int = 1
    cfg: int = 1
    seq: int = 1
    tensor: int = 1
    fsdp: int = 1
    pipe: int = 1
    ulysses: int | None = None

    @property
    def devices(self) -> int:
        return self.data * self.cfg * self.seq * self.tensor * self.fsdp * self.pipe


@dataclasses.dataclass(frozen=True)
class Placement:
    """A mesh, and which weights of a model are cut along its "tensor" axis.

    mesh: over devices, present or described, with the axes `NAMES`. shards: of the model (`Model.shards`).
    arranges: do the parts of fused weights lie shard by shard (`arranged`). Weights in training do not: their
    checkpoints are those of every mesh.
    """

    mesh: Mesh
    shards: tuple[tuple[str, Shard], ...] = ()
    arranges: bool = True

    def size(self, *names: str) -> int:
        """Devices along the axes together."""
        return math.prod(self.mesh.shape[name] for name in names)

    @property
    def seq(self) -> int:
        return self.size(*SEQ)

    @property
    def tensor(self) -> int:
        return self.size("tensor")

    @property
    def target(self) -> Target:
        """What a program of this mesh is compiled for."""
        return target_of(self.mesh.devices.flat[0])

    def samples(self, halves: int = 1) -> tuple[str, ...]:
        """The axes that a batch is cut along; of both halves of guidance, the conditional one first."""
        return ("cfg", *SAMPLES) if halves == 2 else SAMPLES

    def sharding(self, *spec: Any) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec(*spec))

    def batch(self, n: int | None = None) -> NamedSharding:
        """Of an array whose leading axis is the samples, as far as the axes divide n (None: all of them do)."""
        return self.sharding(SAMPLES if n is None else self.even(n, SAMPLES))

    def params(self, params: Any) -> Any:
        """A `NamedSharding` for every leaf of a tree of parameters, stacked, quantised or neither, or of a state that
        has the like of them (moments, averages).

        A weight that a rule of the model names is cut along "tensor"; every leaf along "fsdp" too, on the longest axis
        behind the first that it divides.
        """

        n = self.size("fsdp")

        def sharding(shape: tuple[int, ...], axis: int | None) -> NamedSharding:
            spec: list[Any] = [None] * len(shape)
            if axis is not None and self.tensor > 1 and shape[axis] % self.tensor == 0 and shape[axis] > 1:
                spec[axis] = "tensor"
            free = [i for i, d in enumerate(shape) if spec[i] is None and d % n == 0 and d >= n]
            free = [i for i in free if i] or free  # the leading axis is mostly the layers, which are read one by one
            if n > 1 and free:
                spec[max(free, key=lambda i: shape[i])] = "fsdp"
            return self.sharding(*spec)

        def leaf(path: tuple[Any, ...], a: Any) -> Any:
            how = self.shard(path)
            if isinstance(a, QTensor):
                last = {"columns": -1, "rows": -2}.get(how.axis) if how else None
                values = None if last is None else (-3 - last if a.layout == "transposed" else last)
                inputs = last if last == -2 and a.scale.shape[-2] > 1 else None
                axes = {"values": values, "scale": -1 if last == -1 else inputs, "down": last if last == -2 else None}
                axes |= {"zero": axes["scale"], "up": -1 if last == -1 else None}
                parts = {k: getattr(a, k) for k in axes if getattr(a, k) is not None}
                return dataclasses.replace(a, **{k: sharding(part.shape, axes[k]) for k, part in parts.items()})
            if how is None or (_name(path[-1]) == "bias" and how.axis == "rows"):
                return sharding(a.shape, None)
            return sharding(a.shape, -1 if how.axis == "columns" else -2)

        return jax.tree_util.tree_map_with_path(leaf, params, is_leaf=is_quantized)

    def shard(self, path: tuple[Any, ...]) -> Shard | None:
        """How a parameter is cut, by the first rule of the model that its path matches."""
        name = "/".join(map(_name, path))
        return next((how for pattern, how in self.shards if re.search(pattern, name)), None)

    def arranged(self, params: Any) -> Any:
        """Parameters with the columns (and rows) of fused products shard by shard, as `split` and `fuse` have them."""
        if self.tensor == 1:
            return params

        def leaf(path: tuple[Any, ...], a: Any) -> Any:
            how, bias = self.shard(path), _name(path[-1]) == "bias"
            if how is None or len(how.parts) == 1 or (bias and how.axis == "rows"):
                return a
            axis = a.ndim - (1 if how.axis == "columns" else 2)
            order = shard_order(a.shape[axis], how.parts, self.tensor)
            return jnp.take(a, order, axis=axis)

        return jax.tree_util.tree_map_with_path(leaf, params)

    def memory(self, memory: Any, axes: Any, tokens: Any, halves: int) -> Any:
        """What is remembered, held like what it remembers: samples along the batch, and tokens behind them.

        Args:
          axes: the batch axis of every leaf, or -1. tokens: the tokens between blocks, or their shapes.
          halves: copies of the batch that it is for.
        """
        lengths = {a.shape[1] for a in jax.tree.leaves(tokens) if a.ndim == 3}

        def leaf(a: jax.Array, axis: int) -> jax.Array:
            spec: list[Any] = [None] * a.ndim
            if axis < 0:
                return self.keep(a, *spec)
            spec[axis] = self.even(a.shape[axis], self.samples(halves))
            if axis + 1 < a.ndim and a.shape[axis + 1] in lengths and a.shape[axis + 1] % self.seq == 0:
                spec[axis + 1] = SEQ
            return self.keep(a, *spec)

        return jax.tree.map(leaf, memory, axes)

    def keep(self, a: jax.Array, *spec: Any) -> jax.Array:
        """An array held so, inside a program."""
        return jax.lax.with_sharding_constraint(a, self.sharding(*spec))

    def even(self, length: int, names: tuple[str, ...]) -> tuple[str, ...] | None:
        """The axes, or of the last of them as many as divide a length."""
        while names and length % self.size(*names):
            names = names[1:]
        return names or None


_current: ContextVar[Placement | None] = ContextVar("difax_placement", default=None)


@contextlib.contextmanager
def placed(placement: Placement | None) -> Iterator[None]:
    """Within it, what is traced is placed so; None: on one device."""
    token = _current.set(placement)
    try:
        yield
    finally:
        _current.reset(token)


def current() -> Placement | None:
    """The placement of what is being traced."""
    return _current.get()


def cuts_tokens() -> bool:
    """Whether the tokens of what is being traced lie on several devices."""
    p = current()
    return p is not None and p.seq > 1


def shapes_at(shapes: Any, where: Any) -> Any:
    """Shapes with where each lies: one sharding for all, or a tree of them."""
    if isinstance(where, jax.sharding.Sharding):
        where = jax.tree.map(lambda _: where, shapes)
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, where)


def rows(tree: Any, halves: int = 1) -> Any:
    """Arrays that lead with the batch, cut along the axes of samples; of both halves along "cfg" too."""
    p = current()
    if p is None:
        return tree
    return jax.tree.map(lambda a: p.keep(a, p.even(a.shape[0], p.samples(halves))), tree)


def tokens(tree: Any, halves: int = 1) -> Any:
    """Tokens [B, N, ...] between blocks, cut along the axes of samples and of tokens."""
    p = current()
    if p is None:
        return tree
    return jax.tree.map(lambda a: p.keep(a, p.even(a.shape[0], p.samples(halves)), SEQ), tree)


def join(*streams: jax.Array, axis: int = 1) -> jax.Array:
    """Streams of tokens as one sequence: [txt, img], or shard by shard where tokens are cut and both divide."""
    n = _pieces([a.shape[axis] for a in streams])
    return _interleaved(streams, n, axis)


def cut(joined: jax.Array, lengths: Sequence[int], axis: int = 1) -> list[jax.Array]:
    """The streams of `join`, of these lengths."""
    return _parted(joined, lengths, _pieces(lengths), axis)


def split(y: jax.Array, widths: Sequence[int]) -> list[jax.Array]:
    """The parts of a fused product's last axis, which lie shard by shard where weights are cut along "tensor"."""
    return _parted(y, widths, _tensor(), -1)


def fuse(*parts: jax.Array) -> jax.Array:
    """What a fused product takes: parts side by side on the last axis, shard by shard as its rows lie."""
    return _interleaved(parts, _tensor(), -1)


def _tensor() -> int:
    p = current()
    return 1 if p is None or not p.arranges else p.tensor


def _pieces(lengths: Sequence[int]) -> int:
    p = current()
    n = 1 if p is None else p.seq
    return n if all(length % n == 0 for length in lengths) else 1


def _interleaved(parts: Sequence[jax.Array], n: int, axis: int) -> jax.Array:
    if n == 1:
        return jnp.concatenate(parts, axis=axis)
    axis = axis % parts[0].ndim
    cut = [a.reshape(*a.shape[:axis], n, a.shape[axis] // n, *a.shape[axis + 1 :]) for a in parts]
    both = jnp.concatenate(cut, axis=axis + 1)
    return both.reshape(*both.shape[:axis], -1, *both.shape[axis + 2 :])


def _parted(whole: jax.Array, lengths: Sequence[int], n: int, axis: int) -> list[jax.Array]:
    axis = axis % whole.ndim
    ends = np.cumsum([length // n for length in lengths])[:-1].tolist()
    if n == 1:
        return jnp.split(whole, ends, axis=axis)
    shape = whole.shape
    pieces = jnp.split(whole.reshape(*shape[:axis], n, shape[axis] // n, *shape[axis + 1 :]), ends, axis=axis + 1)
    return [a.reshape(*shape[:axis], -1, *shape[axis + 1 :]) for a in pieces]


def shard_order(width: int, parts: Sequence[int], n: int) -> np.ndarray:
    """Which column of a fused product stands where, when n shards have a piece of every part each.

    Args:
      width: columns in all. parts: relative widths of what is fused. n: shards.
    """
    unit = width // sum(parts)
    pieces = np.split(np.arange(width), np.cumsum(np.multiply(parts, unit))[:-1])
    return np.concatenate([a.reshape(n, -1) for a in pieces], axis=1).ravel()


def make_placement(
    axes: Axes, devices: Sequence[Any], heads: Sequence[int] = (), shards: Sequence[tuple[str, Shard]] = ()
) -> Placement:
    """A placement over the first devices, `seq` divided into a ring of groups that exchange heads.

    Args:
      axes: devices along each axis. devices: present ones, or those of a described machine.
      heads: of every self-attention of the model. shards: of the model.

    Raises:
      ValueError: an axis below 1, more devices than there are, or heads and halves that do not divide.
    """
    for name, n in axes._asdict().items():
        if n is not None and n < 1:
            raise ValueError(f"mesh.{name}={n}; allowed: 1 or more")
    if axes.pipe > 1:
        raise ValueError(f"mesh.pipe={axes.pipe}; allowed: 1 (no pipeline of blocks runs yet)")
    if axes.cfg > 2:
        raise ValueError(f"mesh.cfg={axes.cfg}; allowed: 1, or 2: guidance has two halves")
    if axes.devices > len(devices):
        there = f"up to {len(devices)} ({devices[0].device_kind})"
        how = "; JAX_NUM_CPU_DEVICES=N makes N of a CPU" if devices[0].platform == "cpu" else ""
        raise ValueError(f"mesh of {axes.devices} devices ({described(axes)}); allowed: {there}{how}")
    common = math.gcd(*heads) if heads else 0
    if common % axes.tensor:
        raise ValueError(f"mesh.tensor={axes.tensor} for {common} heads; allowed: {_divisors(common)}")
    local = common // axes.tensor
    most = math.gcd(axes.seq, local)
    ulysses = most if axes.ulysses is None else axes.ulysses
    if axes.seq % ulysses or local % ulysses:
        per = f" of {local} heads a device" if axes.tensor > 1 else f" of {local} heads"
        raise ValueError(f"mesh.ulysses={ulysses} of mesh.seq={axes.seq}{per}; allowed: {_divisors(most)}")
    sizes = (axes.data, axes.fsdp, axes.cfg, axes.seq // ulysses, ulysses, axes.tensor)
    there = np.asarray(devices[: axes.devices], object).reshape(sizes)
    return Placement(Mesh(there, NAMES, axis_types=(AxisType.Auto,) * len(NAMES)), tuple(shards))


def described(axes: Axes) -> str:
    """Axes as a command line names them: "cfg=2,seq=4"."""
    used = [f"{name}={n}" for name, n in axes._asdict().items() if n not in (1, None)]
    return ",".join(used) or "data=1"


def _divisors(n: int) -> str:
    return ", ".join(str(d) for d in range(1, n + 1) if n % d == 0)


def _name(part: Any) -> str:
    return str(getattr(part, "key", getattr(part, "name", getattr(part, "idx", part))))
