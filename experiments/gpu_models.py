"""The part of the suite that measures networks: DiT-XL/2 and blocks of FLUX's size in bf16, int8 and fp8."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from difax.accel.attention import attention
from difax.accel.quant import QUANTS
from difax.accel.quant.products import fitted
from difax.core.contracts import Model
from difax.core.cost import model_cost
from difax.core.qtensor import cast, quantize_params
from difax.core.shapes import memory_for, trunk_spec
from difax.core.target import target
from difax.core.trunk import forward, neutral, run_trunk, unstack
from difax.models.dit import dit
from difax.models.flux import flux
from difax.weights.conditions import random_conditions
from experiments.gpu_rows import Bench, Variant
from experiments.realised import TOY

DTYPE = "bfloat16"
EXACT = "cudnn,xla"  # cuDNN where it takes the call: on a CPU it does not
RECIPES = {"bf16": "none", "int8": "int8_w8a8", "fp8": "fp8"}


def random_params(model: Model, dtype: str = DTYPE) -> Any:
    """Parameters without zeros, so that every gate acts: standard deviation 0.03."""
    leaves, tree = jax.tree.flatten(jax.eval_shape(model.init, jax.random.key(0)))
    draw = jax.jit(lambda k, shape: (0.03 * jax.random.normal(k, shape)).astype(dtype), static_argnums=1)
    return tree.unflatten([draw(jax.random.key(i), a.shape) for i, a in enumerate(leaves)])


def prepared(model: Model, params: Any, recipe: str, **settings: Any) -> Any:
    """Parameters as a run has them that is quantised by a recipe, the blocks written out."""
    rules = QUANTS[recipe](model, **settings)

    def quantised(params: Any) -> Any:
        return unstack(model, fitted(cast(quantize_params(params, rules), DTYPE), target()))

    return jax.jit(quantised if rules else lambda p: unstack(model, p))(params)


class Torch:
    """One model of `experiments.gpu_torch` in a process of its own, which compiles beside this one; a toy does not."""

    def __init__(self, model: str, batch: int, bench: Bench):
        self.bench, toy = bench, bench.toy
        self.request = {"model": model, "batch": batch, "compile": not toy, "toy": toy}
        command = [os.environ.get("TORCH_PYTHON", sys.executable), "-m", "experiments.gpu_torch"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._ask(1)

    def _ask(self, calls: int) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(self.request | {"calls": calls}) + "\n")
        self.process.stdin.flush()

    def _answer(self, most: float) -> dict[str, Any]:
        """Waits `most` seconds, and no longer than leaves the others of the group their turns."""
        assert self.process.stdout is not None
        most = max(1.0, min(most, self.bench.left() - 10))
        if not select.select([self.process.stdout], [], [], most)[0]:
            self.process.kill()
            raise TimeoutError(f"no answer of torch within {most:.0f} s")
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the torch process ended with exit code {self.process.wait()}")
        found = json.loads(line)
        if "error" in found:
            raise RuntimeError(found["error"])
        return found

    def variant(self, operations: float) -> Variant:
        """Calls whose seconds the other process tells; waits until it has compiled."""
        first = self._answer(most=80)
        calls = 1 if self.bench.toy else int(min(100, max(1, 0.05 / first["seconds"])))

        def run() -> float:
            self._ask(calls)
            return self._answer(most=20)["seconds"]

        how = {"torch": first["torch"], "graph": first["graph"], "compiled": self.request["compile"]}
        return Variant(run=run, operations=operations, check=lambda _: how)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def models(bench: Bench) -> None:
    """FLUX blocks first, whose products are large, then DiT-XL/2 at batch 8, 1, 32; torch.compile is the baseline."""
    size: dict[str, Any] = {"size": 128, "text_tokens": 512}
    if bench.toy:
        size = {"size": 16, "text_tokens": 16, "width": 128, "heads": 2, "axes_dim": (16, 24, 24)}
    model = flux("dev", double_depth=1, single_depth=1, dtype=DTYPE, **size)
    dits = [("toy", 1)] if bench.toy else [("XL/2", 8), ("XL/2", 1), ("XL/2", 32)]
    for i, kind in enumerate(("double", "single")):
        bench.section(f"FLUX {kind}", _flux_block, bench, model, i, kind)
    for variant, batch in dits:
        bench.section(f"DiT-{variant} b{batch}", _dit, bench, variant, batch)


def _flux_block(bench: Bench, whole: Model, place: int, kind: str) -> None:
    """One block of one kind on random tokens, everything that an evaluation computes in it."""
    stage, params = whole.stages[place], random_params(whole)
    model = whole._replace(stages=(stage,))
    own = {k: v for k, v in params.items() if k == "ends" or k == stage.name}
    x = jax.random.normal(jax.random.key(1), (1, *model.input_shape))
    cond = jax.tree.map(jnp.asarray, random_conditions(model, 1))
    tokens, context = jax.jit(model.embed)(own, x, jnp.full((1,), 500.0), cond)
    count = sum(a.shape[1] for a in jax.tree.leaves(tokens))
    cost = model_cost(model, own)
    operations = cost.mods[stage.name] + sum(cost.branches[stage.name])

    def ours(recipe: str, attend: str, **settings: Any) -> Variant:
        with_attention, weights = attention(attend), prepared(model, own, recipe, **settings)
        memory = memory_for(trunk_spec(model, own, x, cond), neutral(), with_attention, ((),))

        def run(weights: Any, tokens: Any, context: Any) -> Any:
            return run_trunk(model, weights, tokens, context, neutral(), with_attention, memory, None)[0]

        return Variant(run, (weights, tokens, context), operations, check=_finite)

    at = f"FLUX {kind} {count}"
    base = f"{at} torch.compile bf16"
    variants: dict[str, Callable[[], Variant]]
    variants = {f"{at} {name}": partial(ours, recipe, EXACT) for name, recipe in RECIPES.items()}
    variants |= {
        base: lambda: worker.variant(operations),
        f"{at} bf16 attend=block_sparse": partial(ours, "none", "block_sparse,xla"),
        f"{at} bf16 attend=xla": partial(ours, "none", "xla"),
    }
    if any(map(bench.missing, variants)) and bench.enough(2 if bench.toy else 15, at):
        worker = Torch(kind, 1, bench)
        bench.group(f"{at} tokens, batch 1", variants, base)
        worker.close()


def _dit(bench: Bench, variant: str, batch: int) -> None:
    """One evaluation of a whole DiT, without guidance."""
    size: dict[str, Any] = TOY if variant == "toy" else {"variant": variant}
    model = dit(**size, dtype=DTYPE)
    params = random_params(model)
    x = jax.random.normal(jax.random.key(1), (batch, *model.input_shape))
    times, labels = jnp.full((batch,), 500.0), jnp.arange(batch)
    operations = batch * model_cost(model, params).evaluation

    def ours(recipe: str, attend: str, stacked: bool = False) -> Variant:
        with_attention = attention(attend)
        weights = params if stacked else prepared(model, params, recipe)

        def run(weights: Any, x: jax.Array) -> Any:
            return forward(model, weights, x, times, labels, with_attention)

        return Variant(run, (weights, x), operations, check=_finite)

    at = f"DiT-{variant} b{batch}"
    base = f"{at} torch.compile bf16"
    variants: dict[str, Callable[[], Variant]]
    variants = {f"{at} {name}": partial(ours, recipe, EXACT) for name, recipe in RECIPES.items()}
    variants[base] = lambda: worker.variant(operations)
    if batch != 32:
        variants[f"{at} bf16 attend=xla"] = partial(ours, "none", "xla")
        variants[f"{at} bf16 stacked"] = partial(ours, "none", EXACT, True)
    if batch == 8:
        variants[f"{at} bf16 attend=block_sparse"] = partial(ours, "none", "block_sparse,xla")
    if any(map(bench.missing, variants)) and bench.enough(2 if bench.toy else 25, at):
        worker = Torch(f"dit {variant}", batch, bench)
        bench.group(f"{at}, {model_tokens(model)} tokens", variants, base, reserve=15)
        worker.close()


def model_tokens(model: Model) -> int:
    """Tokens of one sample."""
    tokens = jax.eval_shape(model.embed, *_inputs(model))[0]
    return sum(a.shape[1] for a in jax.tree.leaves(tokens))


def _inputs(model: Model) -> tuple[Any, ...]:
    """Shapes of what `Model.embed` takes, for one sample."""
    one = lambda a: jax.ShapeDtypeStruct((1, *a.shape), a.dtype)  # noqa: E731
    x, time = jax.ShapeDtypeStruct((1, *model.input_shape), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.float32)
    return jax.eval_shape(model.init, jax.random.key(0)), x, time, jax.tree.map(one, model.cond)


def _finite(out: Any) -> dict[str, Any]:
    finite = all(bool(jnp.isfinite(a).all()) for a in jax.tree.leaves(out))
    if not finite:
        raise FloatingPointError("values that are not finite")
    return {}
