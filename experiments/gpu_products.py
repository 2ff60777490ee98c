"""The part of the suite that measures quantised products: our Triton kernel, XLA's, and what a configuration picks."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from difax.accel.quant import QUANTS
from difax.accel.quant.products import fitted, product_of
from difax.core.ops import dot
from difax.core.qtensor import cast, quantize_params
from difax.core.target import target
from difax.models.dit import dit
from experiments.gpu_kernels import normal, relative_error
from experiments.gpu_rows import Bench, Variant

TOPS = {"int8": (jnp.int8, 127.0), "fp8": (jnp.float8_e4m3fn, 448.0)}
LIMITS = {"int8": 2e-2, "fp8": 5e-2}  # relative errors of a product against float32, rounding of both sides included


def row_quantised(x: jax.Array, kind: str) -> tuple[jax.Array, jax.Array]:
    """Values and float32 scales [M, 1] of the rows of a matrix."""
    dtype, top = TOPS[kind]
    scale = jnp.abs(x.astype(jnp.float32)).max(-1, keepdims=True) / top
    values = x.astype(jnp.float32) / scale
    return (jnp.round(values) if kind == "int8" else jnp.clip(values, -top, top)).astype(dtype), scale


class Product:
    """x [M, K] and w [N, K] in bf16; every variant takes x in bf16 and gives y [M, N] in bf16, quantising x inside."""

    def __init__(self, m: int, k: int, n: int):
        self.m, self.k, self.n = m, k, n
        self.x, self.w, self.bias = normal(0, (m, k)), normal(1, (n, k)), jnp.zeros((n,), jnp.bfloat16)
        with jax.default_matmul_precision("highest"):
            self.exact = jax.jit(lambda x, w: x.astype(jnp.float32) @ w.astype(jnp.float32).T)(self.x, self.w)

    def variant(
        self, function: Callable[..., Any], *weights: Any, limit: float | None = None, **columns: Any
    ) -> Variant:
        """A function of (x, *weights); `limit`: of its relative error; columns: of its row."""

        def check(y: jax.Array) -> dict[str, Any]:
            error = relative_error(y, self.exact)
            return {"error_of_y": error, "limit": limit, "right": error < (limit or 0), **columns}

        operations = 2.0 * self.m * self.k * self.n
        checked = None if limit is None else check
        return Variant(function, (self.x, *weights), operations, check=checked)

    def bf16(self) -> Variant:
        return self.variant(lambda x, w: x @ w.T, self.w)

    def xla(self, kind: str, sums: Any, out: Any) -> Variant:
        """Row and column scales behind XLA's own product, whose sums are rounded to `out` first."""

        def multiply(x: jax.Array, wq: jax.Array, sw: jax.Array) -> jax.Array:
            xq, sx = row_quantised(x, kind)
            y = jax.lax.dot_general(xq, wq, (((1,), (1,)), ((), ())), preferred_element_type=sums)
            return (y.astype(out) * sx.astype(out) * sw.T.astype(out)).astype(jnp.bfloat16)

        return self.variant(multiply, *jax.jit(partial(row_quantised, kind=kind))(self.w), limit=LIMITS[kind])

    def triton(self, kind: str, **tuning: Any) -> Variant:
        """Our kernel, with the rounding of x as XLA fuses it before."""
        product = importlib.import_module("difax.accel.kernels.triton_products").product

        def multiply(x: jax.Array, wq: jax.Array, sw: jax.Array, bias: jax.Array) -> jax.Array:
            xq, sx = row_quantised(x, kind)
            return product(xq, wq, sx[:, 0], sw.T, bias_N=bias, **tuning)

        weights = jax.jit(partial(row_quantised, kind=kind))(self.w)
        return self.variant(multiply, *weights, self.bias, limit=LIMITS[kind])

    def recipe(self, name: str, **settings: Any) -> Variant:
        """A dense layer as a model has it, whose weight a recipe of `difax.accel.quant` has quantised."""
        tree = {"blocks": {"fc1": {"kernel": self.w.T[None].astype(jnp.float32)}}}
        weights = cast(quantize_params(tree, QUANTS[name](dit("S/2"), **settings)), "bfloat16")
        w = jax.tree.map(lambda a: a[0], fitted(weights, target()))["blocks"]["fc1"]["kernel"]
        served = product_of(w)
        limit = 0.2 if "4" in name else LIMITS["fp8" if "fp8" in name else "int8"]
        return self.variant(dot, w, self.bias, limit=limit, served=served)


def products(bench: Bench) -> None:
    """Both products of FLUX's MLP: what a configuration picks against XLA's bf16 and its quantised ones."""
    for m, k, n in [(64, 128, 256)] if bench.toy else [(4608, 3072, 12288), (4608, 12288, 3072)]:
        bench.section(f"{m}x{k}x{n}", _product, bench, m, k, n)


def _product(bench: Bench, m: int, k: int, n: int) -> None:
    f32, bf16, i32 = jnp.float32, jnp.bfloat16, jnp.int32
    at, made = f"{m}x{k}x{n}", Product(m, k, n)
    base = f"{at} xla bf16"
    variants: dict[str, Callable[[], Variant]] = {
        base: made.bf16,
        f"{at} quant=int8_w8a8": partial(made.recipe, "int8_w8a8"),
        f"{at} quant=fp8": partial(made.recipe, "fp8"),
        f"{at} xla int8, float32 epilogue": partial(made.xla, "int8", i32, f32),
        f"{at} xla int8, bf16 epilogue": partial(made.xla, "int8", i32, bf16),
        f"{at} xla fp8, bf16 sums": partial(made.xla, "fp8", bf16, bf16),
    }
    more: dict[str, Callable[[], Variant]] = {}
    if bench.toy:
        if bench.missing("triton left out"):
            bench.write("triton left out", group=f"products {at}", reason="a CPU has no compiler for it")
    else:
        variants |= {f"{at} triton {kind}": partial(made.triton, kind) for kind in TOPS}
        more = {
            f"{at} triton {kind} {'x'.join(map(str, block))}": partial(made.triton, kind, block=block)
            for kind in TOPS
            for block in ((128, 128, 128), (256, 128, 128), (128, 256, 64))
        }
        more |= {
            f"{at} triton {kind} 4 warps": partial(made.triton, kind, block=(128, 128, 128), warps=4) for kind in TOPS
        }
    bench.group(f"products {at}", variants, base, repeats=7)
    if not bench.toy:
        fours = {
            f"{at} quant=int4_w4a8 kernel={kernel}": partial(made.recipe, "int4_w4a8", kernel=kernel)
            for kernel in ("xla", "triton")
        }
        fours[f"{at} quant=int4_w4a8 group=64"] = partial(made.recipe, "int4_w4a8", group=64)
        bench.group(f"products {at}, int4", {base: made.bf16, **fours}, base)
    recipes = {
        f"{at} quant={name} kernel={kernel}": partial(made.recipe, name, kernel=kernel)
        for name in ("int8_w8a8", "fp8")
        for kernel in (("xla",) if bench.toy else ("xla", "triton"))
    }
    recipes |= {f"{at} quant=int8_weight": partial(made.recipe, "int8_weight")}
    if bench.toy:
        recipes = dict(list(recipes.items())[:1])
    bench.group(f"products {at}, other recipes", {base: made.bf16, **recipes}, base)
    bench.group(f"products {at}, tiles", {base: made.bf16, **more} if more else {}, base)
    if k < n and not bench.toy:  # its decomposition alone takes seconds
        branch = {f"{at} quant=svdquant_w4a8": partial(made.recipe, "svdquant_w4a8")}
        bench.group(f"products {at}, other recipes", {base: made.bf16, **branch}, base, reserve=25)
