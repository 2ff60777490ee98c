"""Parts of the suite that measure operations: ceilings of the device, and block-sparse attention."""

from __future__ import annotations

import functools
import importlib
import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from difax.accel.attention.cudnn import cudnn
from difax.core.contracts import BlockList, BlockScales, Segments
from difax.core.ops import attend
from experiments.gpu_rows import Bench, Variant

KERNELS = {"mosaic": "difax.accel.kernels.mosaic_attention", "triton": "difax.accel.kernels.triton_attention"}
# largest relative error of the output against float32 that the plan of the kernels allows
LIMITS = {"bf16": 5e-3, "int8": 2e-2, "int8+fp8": 5e-2}
KEEP_MOSAIC = 1.15  # times Triton's speed on FLUX's dense lists, from which the second kernel is worth its upkeep
BLOCK = 128
# name -> settings of `Call`, type; the first are checked before anything is timed
FIRST_ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "bf16": ({"shape": (2, 1024, 4, 128)}, "bf16"),
    "segments": ({"shape": (2, 1024, 4, 128), "segments": True}, "bf16"),
    "ragged": ({"shape": (1, 1000, 4, 128), "keys": 1090}, "bf16"),
    "int8": ({"shape": (2, 1024, 4, 128)}, "int8"),
    "int8+fp8": ({"shape": (2, 1024, 4, 128)}, "int8+fp8"),
}
MORE_ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "K 64": ({"shape": (2, 1024, 4, 64)}, "bf16"),
    "ragged, segments": ({"shape": (2, 1000, 4, 128), "segments": True}, "bf16"),
    "shared list": ({"shape": (2, 1024, 4, 128), "shared": True}, "bf16"),
    "K 64, ragged, int8+fp8": ({"shape": (1, 1000, 4, 64), "keys": 1090}, "int8+fp8"),
    "block_k 64": ({"shape": (2, 1024, 4, 128), "block_k": 64}, "bf16"),
}


def normal(seed: int, shape: tuple[int, ...], dtype: Any = jnp.bfloat16) -> jax.Array:
    """Random values, made on the device."""
    return jax.jit(lambda: jax.random.normal(jax.random.key(seed), shape).astype(dtype))()


def ceilings(bench: Bench) -> None:
    """Products of matrices in bf16, int8 and fp8, and a copy within the device's memory."""

    def product(m: int, k: int, n: int, dtype: Any, out: Any) -> Variant:
        a = (20 * normal(0, (m, k), jnp.float32)).astype(dtype)
        b = (20 * normal(1, (n, k), jnp.float32)).astype(dtype)  # [N, K]: 8-bit products read K last

        def multiply(a: jax.Array, b: jax.Array) -> jax.Array:
            return jax.lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=out)

        return Variant(multiply, (a, b), operations=2.0 * m * k * n)

    def copied(size: int) -> Variant:
        x = jnp.zeros((size,), jnp.float32)
        return Variant(lambda x: x + 1, (x,), bytes=8.0 * size)

    sizes = {"128^3": (128, 128, 128)} if bench.toy else {"8192^3": (8192,) * 3, "4608x3072x12288": (4608, 3072, 12288)}
    types = {
        "bf16": (jnp.bfloat16, jnp.bfloat16),
        "int8": (jnp.int8, jnp.int32),
        "fp8": (jnp.float8_e4m3fn, jnp.bfloat16),
    }
    bench.group("copy", {"copy 2 GiB": partial(copied, 2**12 if bench.toy else 2**28)})
    for size, (m, k, n) in sizes.items():
        variants = {f"{size} {t}": partial(product, m, k, n, a, out) for t, (a, out) in types.items()}
        bench.group(f"products {size}", variants, baseline=f"{size} bf16")


def lists(
    rng: np.random.Generator, shape: tuple[int, int, int], keys: int, density: float, vary: bool, block_k: int = BLOCK
) -> BlockList:
    """Random lists of `keys` blocks, the block with the query's own tokens first; `vary`: of different lengths."""
    batch, heads, rows = shape
    order = rng.random((batch, heads, rows, keys))
    own = np.minimum(np.arange(rows) * keys // rows, keys - 1)
    np.put_along_axis(order, np.broadcast_to(own[:, None], (batch, heads, rows, 1)), -1.0, -1)
    n = max(1, round(density * keys))
    counts = rng.integers(1, n + 1, shape) if vary else np.full(shape, n)
    indices = np.argsort(order, -1)[..., :n]
    return BlockList(jnp.asarray(indices, jnp.int32), jnp.asarray(counts, jnp.int32), BLOCK, block_k)


def quantised(q: jax.Array, k: jax.Array, v: jax.Array, block_k: int, fp8: bool) -> tuple[Any, ...]:
    """q, k in int8 with a scale of each block, v in fp8 with one of each channel if asked, and the scales."""

    def by_block(x: jax.Array, block: int) -> tuple[jax.Array, jax.Array]:
        b, t, h, width = x.shape
        padded = jnp.pad(x.astype(jnp.float32), ((0, 0), (0, -t % block), (0, 0), (0, 0)))
        cut = padded.reshape(b, -1, block, h, width)
        scale = jnp.maximum(jnp.abs(cut).max((2, 4)), 1e-6) / 127
        values = jnp.round(cut / scale[:, :, None, :, None]).astype(jnp.int8)
        return values.reshape(padded.shape)[:, :t], jnp.swapaxes(scale, 1, 2)

    (q8, sq), (k8, sk) = by_block(q, BLOCK), by_block(k, block_k)
    if not fp8:
        return q8, k8, v, BlockScales(sq, sk, None, BLOCK, block_k)
    sv = jnp.abs(v.astype(jnp.float32)).max(1) / 448
    v8 = jnp.clip(v.astype(jnp.float32) / sv[:, None], -448, 448).astype(jnp.float8_e4m3fn)
    return q8, k8, v8, BlockScales(sq, sk, sv, BLOCK, block_k)


def relative_error(out: jax.Array, expected: jax.Array) -> float:
    """|out - expected| / |expected| in float32."""
    out, expected = out.astype(jnp.float32), expected.astype(jnp.float32)
    return float(jnp.linalg.norm((out - expected).ravel()) / jnp.linalg.norm(expected.ravel()))


class Call:
    """Random q, k, v with lists, as every kernel is called with them; the reference is computed when asked for."""

    def __init__(
        self, seed: int, shape: tuple[int, int, int, int], keys: int, density: float, block_k: int = BLOCK,
        vary: bool = False, shared: bool = False, segments: bool = False,
    ):  # fmt: skip
        b, t, h, width = self.shape = shape
        rng = np.random.default_rng(seed)
        self.q, self.k, self.v = (normal(seed + i, (b, n, h, width)) for i, n in enumerate((t, keys, keys)))
        rows = (1, 1, -(-t // BLOCK)) if shared else (b, h, -(-t // BLOCK))
        self.blocks = lists(rng, rows, -(-keys // block_k), density, vary, block_k)
        ids = jnp.asarray(np.sort(rng.integers(0, 3, (b, t)), -1), jnp.int32)
        self.segments = Segments(ids, ids) if segments else None
        counts = float(self.blocks.counts.sum()) * (b * h if shared else 1)
        self.operations = 4.0 * BLOCK * block_k * width * counts  # two products over the listed blocks
        self._expected: Any = None

    def expected(self) -> Any:
        """o and log-sum-exp of the reference in float32, on the inputs that are not quantised."""
        if self._expected is None:
            f32 = (a.astype(jnp.float32) for a in (self.q, self.k, self.v))
            with jax.default_matmul_precision("highest"):
                reference = jax.jit(lambda q, k, v, s, i, c: attend(q, k, v, s, BlockList(i, c, *sizes), with_lse=True))
                sizes = (self.blocks.block_q, self.blocks.block_k)
                self._expected = reference(*f32, self.segments, self.blocks.indices, self.blocks.counts)
        return self._expected

    def variant(self, kernel: str, mode: str = "bf16", checked: bool = True, **tuning: Any) -> Variant:
        """The call of one of our kernels in one type, with its own tuning."""
        function = importlib.import_module(KERNELS[kernel]).block_sparse
        unknown = [name for name in tuning if name not in inspect.signature(function).parameters]
        if unknown:
            raise NotImplementedError(f"{KERNELS[kernel]}.block_sparse has no {', '.join(unknown)}")
        q, k, v, scales = self.q, self.k, self.v, None
        if mode != "bf16":
            prepare = jax.jit(quantised, static_argnums=(3, 4))
            q, k, v, scales = prepare(q, k, v, self.blocks.block_k, mode == "int8+fp8")
        sizes: dict[str, Any] = {"block_q": BLOCK, "block_k": self.blocks.block_k}

        def run(q: jax.Array, k: jax.Array, v: jax.Array, scales: Any, blocks: Any, segments: Any) -> Any:
            scale = self.shape[-1] ** -0.5
            return function(q, k, v, *blocks, **sizes, softmax_scale=scale, segments=segments, scales=scales, **tuning)

        arguments = (q, k, v, scales, (self.blocks.indices, self.blocks.counts), self.segments)
        return Variant(run, arguments, self.operations, check=partial(self.errors, mode) if checked else None)

    def errors(self, mode: str, out: Any) -> dict[str, Any]:
        """Columns of an output (o, lse) against the reference."""
        expected, lse = self.expected()
        error = relative_error(out[0], expected)
        found = {"error_of_o": error, "limit": LIMITS[mode], "right": error < LIMITS[mode]}
        return found | {"largest_error_of_lse": float(jnp.abs(out[1] - lse).max())}


def kernels(bench: Bench) -> None:
    """The plan of section 7: errors first, FLUX dense and at 25 % against cuDNN, then tuning and other shapes."""
    seed = int.from_bytes(bench.run.encode()[-6:], "big") % 2**31  # fresh lists in every run
    names = list(KERNELS)
    if bench.toy:  # a CPU has neither compiler; the interpreters are slow, and the kernels' own tests use them
        for name in names:
            if bench.missing(f"{name} left out"):
                bench.write(f"{name} left out", group="errors", reason="a CPU has no compiler for it")
    else:
        _errors(bench, seed, names, FIRST_ERRORS)
    shape = (1, 256, 2, 64) if bench.toy else (1, 4608, 24, 128)
    tokens = shape[1]
    calls: dict[float, Call] = {}

    def call(density: float) -> Call:
        if density not in calls:
            calls[density] = Call(seed + 100, shape, tokens, density)
        return calls[density]

    def dense(name: str) -> Variant:
        c = call(1.0)
        work = 4.0 * math.prod(shape) * tokens
        if name == "xla":
            return Variant(attend, (c.q, c.k, c.v), work)
        return Variant(cudnn(), (c.q, c.k, c.v), work)

    of = "toy" if bench.toy else "FLUX 4608"
    ours: dict[float, dict[str, Callable[[], Variant]]] = {
        d: {} if bench.toy else {f"{of} {d:.0%} {k} bf16": lambda k=k, d=d: call(d).variant(k) for k in names}
        for d in (1.0, 0.25)
    }
    base = f"{of} dense {'xla' if bench.toy else 'cudnn'}"
    first = {base: lambda: dense("xla" if bench.toy else "cudnn")}
    seconds = bench.group(f"{of}, bf16", {**first, **ours[1.0], **ours[0.25], **_front(of, call)}, base, repeats=7)
    _decide(bench, of, seconds)
    if bench.toy:
        return
    modes = [(d, k, m) for d in (0.25, 1.0) for m in ("int8", "int8+fp8") for k in names]
    low = {f"{of} {d:.0%} {k} {m}": lambda d=d, k=k, m=m: call(d).variant(k, m) for d, k, m in modes}
    bench.group(f"{of}, 8 bit", {**first, **low}, base)
    _errors(bench, seed, names, MORE_ERRORS)
    blocks64 = {
        f"{of} {d:.0%} {k} block_k 64": lambda d=d, k=k: Call(seed + 100, shape, tokens, d, 64).variant(k)
        for d in (0.25, 1.0)
        for k in names
    }
    bench.group(f"{of}, key blocks of 64", {**first, **blocks64}, base)
    long: dict[str, Any] = {}

    def long_call() -> Call:  # 32,768 tokens: no reference, whose logits would take 48 GiB
        return long.setdefault("call", Call(seed + 300, (1, 32768, 12, 128), 32768, 0.25))

    def long_dense() -> Variant:
        c = long_call()
        return Variant(cudnn(), (c.q, c.k, c.v), 4.0 * 12 * 128 * 32768**2)

    some = [(k, m) for m in ("bf16", "int8", "int8+fp8") for k in names]
    of_wan = {f"32768 25% {k} {m}": lambda k=k, m=m: long_call().variant(k, m, checked=False) for k, m in some}
    bench.group("32768 tokens, 12 heads", {"32768 dense cudnn": long_dense, **of_wan}, "32768 dense cudnn", repeats=3)
    long.clear()
    tuning: list[tuple[str, int, dict[str, Any]]] = [
        ("mosaic", 128, {"turns": False}),
        ("mosaic", 64, {"depth": 3}),
        ("mosaic", 64, {"depth": 3, "turns": False}),
        ("triton", 128, {"stages": 1}),
        ("triton", 64, {"stages": 3}),
        ("triton", 128, {"warps": 4}),
    ]

    def tuned(kernel: str, block_k: int, settings: dict[str, Any]) -> Variant:
        c = call(0.25) if block_k == BLOCK else Call(seed + 100, shape, tokens, 0.25, block_k)
        return c.variant(kernel, **settings)

    variants = {
        f"{of} 25% {k} block_k {b} {' '.join(f'{n}={v}' for n, v in s.items())}": partial(tuned, k, b, s)
        for k, b, s in tuning
    }
    bench.group(f"{of}, tuning", {**first, **variants}, base)
    wide = {
        f"K 64, 25% {k} bf16": lambda k=k: Call(seed + 400, (2, 4608, 16, 64), 4608, 0.25).variant(k) for k in names
    }
    bench.group("4608 tokens, K 64", wide)


def _front(of: str, call: Callable[[float], Call]) -> dict[str, Callable[[], Variant]]:
    """The attention that a configuration names, which chooses the kernel by the device."""

    def front(density: float) -> Variant:
        function = importlib.import_module("difax.accel.attention.block_sparse").block_sparse()
        c = call(density)
        sizes = (c.blocks.block_q, c.blocks.block_k)

        def run(q: jax.Array, k: jax.Array, v: jax.Array, indices: jax.Array, counts: jax.Array) -> Any:
            return function(q, k, v, blocks=BlockList(indices, counts, *sizes), with_lse=True)

        arguments = (c.q, c.k, c.v, c.blocks.indices, c.blocks.counts)
        return Variant(run, arguments, c.operations, check=partial(c.errors, "bf16"))

    return {f"{of} {d:.0%} attend=block_sparse": partial(front, d) for d in (1.0, 0.25)}


def _errors(bench: Bench, seed: int, names: list[str], cases: dict[str, tuple[dict[str, Any], str]]) -> None:
    """Small calls with fresh random lists, every option once; timed too, since that costs nothing."""
    for i, (case, (settings, mode)) in enumerate(cases.items()):
        keys = settings.get("keys", settings["shape"][1])
        made = functools.cache(partial(Call, seed + 10 * i, density=0.6, vary=True, **{**settings, "keys": keys}))
        variants = {f"error {case}: {k}": lambda k=k, m=mode, made=made: made().variant(k, m) for k in names}
        bench.group("errors", variants, repeats=1, window=0.005)


def _decide(bench: Bench, of: str, seconds: dict[str, float]) -> None:
    """The rule between the two kernels, as a row."""
    both = {d: [seconds.get(f"{of} {d} {k} bf16") for k in ("mosaic", "triton")] for d in ("100%", "25%")}
    ratios = {d: t / m for d, (m, t) in both.items() if m and t}
    if "100%" in ratios and bench.missing("decision"):
        keep = ratios["100%"] >= KEEP_MOSAIC
        columns = {f"triton_over_mosaic_{d}": r for d, r in ratios.items()}
        decision = f"{'keep mosaic' if keep else 'triton alone'} ({ratios['100%']:.2f}, rule {KEEP_MOSAIC})"
        bench.write("decision", group=f"{of}, bf16", **columns, keep_mosaic=keep, decision=decision)
