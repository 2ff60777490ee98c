"""Runs Triton kernels in Triton's own interpreter, on numpy arrays, without torch and without a GPU.

`call` stands in for `difax.accel.kernels.triton_launch.triton_call`. The interpreter as it comes (3.6 to 3.9) needs
help: it multiplies the bits of bfloat16 in a dot; it cuts where bfloat16 and fp8 are rounded; 3.6 takes int() of an
array of one element, which numpy 2.5 refuses; it wants torch's tensors, of which it asks what `Tensor` has. And it
interprets the language's own functions only where TRITON_INTERPRET was set before Triton was imported, which would keep
a process from compiling: here both live in one, and what it leaves in Triton's modules is put back.
"""
# pyright: reportMissingImports=false

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import ml_dtypes
import numpy as np
import triton.experimental.gluon  # noqa: F401 (loaded at the first call otherwise, and it asks for the language as it is)
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.jit import JITFunction

TYPES: dict[np.dtype, Any] = {
    np.dtype(name): getattr(tl, name) for name in ("float32", "float16", "int32", "int64", "int8", "uint8")
} | {np.dtype(ml_dtypes.bfloat16): tl.bfloat16, np.dtype(ml_dtypes.float8_e4m3fn): tl.float8e4nv}
NUMPY = {kind: dtype for dtype, kind in TYPES.items()}


class Tensor:
    """What the interpreter asks of a tensor, over a numpy array whose memory it reads and writes by address."""

    device = "cpu"

    def __init__(self, array: np.ndarray):
        self.array, self.dtype = array, TYPES[array.dtype]

    def data_ptr(self) -> int:
        return self.array.ctypes.data

    def untyped_storage(self) -> Tensor:
        return self

    def storage_offset(self) -> int:
        return 0

    def size(self) -> tuple[int, ...]:
        return self.array.shape

    def stride(self) -> tuple[int, ...]:
        return tuple(step // self.array.itemsize for step in self.array.strides)

    def cpu(self) -> Tensor:
        return self

    def new_empty(self, *_: Any, **__: Any) -> Tensor:
        return Tensor(self.array[:0])

    def set_(self, storage: Tensor, *_: Any) -> None:
        self.array = storage.array

    def copy_(self, other: Tensor) -> None:
        assert other.data_ptr() == self.data_ptr()


GUARD = 1 << 16  # elements before and after every array


class Guarded:
    """An array in the midst of a larger one: what is read outside of it is NaN or large, and writes there are seen."""

    def __init__(self, array: np.ndarray):
        self.beyond = np.full(GUARD, np.nan if array.dtype.kind in "fV" else 77, array.dtype)
        self.memory = np.concatenate([self.beyond, np.ascontiguousarray(array).ravel(), self.beyond])
        self.array = self.memory[GUARD : GUARD + array.size].reshape(array.shape)

    def check(self) -> None:
        for part in (self.memory[:GUARD], self.memory[-GUARD:]):
            assert part.tobytes() == self.beyond.tobytes(), "a kernel wrote outside of an array"


def call(
    *arrays: Any,
    kernel: Any,
    out: Any,
    grid: tuple[int, ...],
    num_warps: int,
    num_stages: int,
    compute_capability: int,
    **constants: Any,
) -> Any:
    """Runs every program of a grid; arguments and outputs as of `jax_triton.triton_call`."""
    leaves, structure = jax.tree.flatten(out)
    empty = [np.full(leaf.shape, np.nan if leaf.dtype.kind in "fV" else -1, leaf.dtype) for leaf in leaves]
    memory = [Guarded(np.asarray(a)) for a in (*arrays, *empty)]
    with interpreting(kernel):
        interpreter.InterpretedFunction(kernel.fn)[grid](*(Tensor(m.array) for m in memory), **constants)
    for m in memory:
        m.check()
    return jax.tree.unflatten(structure, [m.array for m in memory[len(arrays) :]])


@contextlib.contextmanager
def interpreting(kernel: Any) -> Iterator[None]:
    """Triton's language as its interpreter needs it, and afterwards as it was."""
    places = [tl, tl.core, tl.math, tl.standard, tl.tensor, tl.dtype, tl.core.tensor_descriptor_base, interpreter]
    places += [interpreter.InterpreterBuilder, kernel.fn]
    before = [(place, dict(vars(place))) for place in places]
    names = dict(kernel.fn.__globals__)
    for place in (tl, tl.core, tl.math, tl.standard):
        for name, function in vars(place).copy().items():
            if isinstance(function, JITFunction):
                setattr(place, name, _interpreted(function))
    of_tensor = interpreter._patch_lang_tensor

    def with_index(tensor: Any, scope: Any) -> None:
        of_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(np.asarray(self.handle.data).item()))

    interpreter._patch_lang_tensor = with_index
    interpreter._convert_float = _convert
    interpreter.InterpreterBuilder.create_dot = _dot
    try:
        yield
    finally:
        for place, attributes in before:
            for name in vars(place).keys() - attributes.keys():
                delattr(place, name)
            for name, value in attributes.items():
                if vars(place)[name] is not value:
                    setattr(place, name, value)
        interpreter.InterpretedFunction.rewritten_fn.clear()  # they have names of the interpreter in their modules
        kernel.fn.__globals__.clear()
        kernel.fn.__globals__.update(names)


_FUNCTIONS: dict[JITFunction, Any] = {}


def _interpreted(function: JITFunction) -> Any:
    """The same object wherever a function is found: reductions are known by their function's identity."""
    return _FUNCTIONS.setdefault(function, interpreter.InterpretedFunction(function.fn))


def _wide(handle: Any) -> np.ndarray:
    """An operand's values: types that numpy lacks are kept as bits."""
    dtype = NUMPY[handle.dtype.scalar]
    return handle.data if dtype.kind in "iu" else np.ascontiguousarray(handle.data).view(dtype).astype(np.float32)


def _dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
    product = np.matmul(_wide(a), _wide(b), dtype=d.data.dtype)
    return interpreter.TensorHandle(product + d.data, d.dtype.scalar)


def _convert(data: np.ndarray, source: Any, to: Any, rounding_mode: Any) -> np.ndarray:
    values = np.ascontiguousarray(data).view(NUMPY[source]).astype(np.float32).astype(NUMPY[to])
    return values.view(f"uint{8 * values.itemsize}")
