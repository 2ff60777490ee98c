"""Parts of the suite that measure whole programs: samplers with caches, training, and FLUX drawn from end to end."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from difax.accel.attention import attention
from difax.build import build_setup
from difax.config import load_config, override
from difax.core.cost import model_cost, run_cost
from difax.core.files import read_rows
from difax.core.process import flow
from difax.models.dit import dit
from difax.training.losses import flow_loss
from difax.training.train import TrainOptions, TrainState, make_step, optimizer
from difax.weights.conditions import random_conditions
from experiments.gpu_models import DTYPE, EXACT, random_params
from experiments.gpu_rows import Bench, Variant, calls
from experiments.realised import METHODS, TOY, Work

CACHES = ("fora 3", "teacache", "toca")
# dense products in bf16, without sparsity, as the vendor's data sheet has them (SXM)
PUBLISHED_TFLOPS = {"H100": 989.0, "H200": 989.0}


def realised(bench: Bench) -> None:
    """Each cache against the plain sampler of the same process: seconds, and the operations that the trace counted."""
    variant, batches, steps = ("toy", (1,), 4) if bench.toy else ("XL/2", (1, 8), 20)
    for batch in batches:
        bench.section(f"DiT-{variant} b{batch}", _cached_runs, bench, variant, batch, steps)


def _cached_runs(bench: Bench, variant: str, batch: int, steps: int) -> None:
    at = f"DiT-{variant} b{batch}"
    base = f"{at} plain"
    labels = [base, *(f"{at} {name}" for name in CACHES)]
    if not any(map(bench.missing, labels)) or not bench.enough(5 if bench.toy else 40, at):
        return
    print(f"> {base}", flush=True)
    # one block is compiled, not 28: a GPU's compiler times every product of a program
    work = Work(variant, batch, DTYPE, steps, "each", layout="stacked", attention=attention(EXACT))
    programs = {base: functools.cache(lambda: work.program(None, {}))}
    programs |= {f"{at} {name}": functools.partial(_cached, work, name) for name in CACHES}
    plain = functools.cache(lambda: programs[base]()["run"]()[1])
    makers = {k: functools.partial(_sampler, work, k == base, make, plain) for k, make in programs.items()}
    bench.group(f"{at}, {steps} steps, guided", makers, base, repeats=5, reserve=0)


def _cached(work: Work, name: str) -> dict[str, Any]:
    method = METHODS[name]
    return work.program(method.cache, work.threshold(method))


def _sampler(work: Work, plain: bool, program: Callable[[], dict[str, Any]], plain_trace: Any) -> Variant:
    found = program()
    traces: list[Any] = []

    def run() -> float:
        seconds, trace = found["run"]()
        traces[:] = [trace]
        return seconds

    def columns(_: Any) -> dict[str, Any]:
        operations = run_cost(work.cost, traces[0])
        ratio = run_cost(work.cost, plain_trace()) / operations
        settings = {} if plain else {"settings": found["settings"], "remembered_mib": found["remembered"] / 2**20}
        known = {"compile_seconds": found["compile_seconds"], "operations": operations, "flops_ratio": ratio}
        return {**known, **settings}

    return Variant(run=run, check=columns)


def training(bench: Bench) -> None:
    """Updates of a patch-2 DiT on latents: seconds, and losses before and after those that were timed."""
    cases = [("toy", 4, 3)] if bench.toy else [("S/2", 256, 40), ("B/2", 256, 30)]
    for variant, batch, steps in cases:
        label = f"train DiT-{variant} b{batch}"
        if bench.missing(label) and bench.enough(2 if bench.toy else 20, label):
            print(f"> {label}", flush=True)
            try:
                columns = _trained(variant, batch, steps, bench)
                bench.write(label, group="training", **columns)
            except Exception as error:  # a row, as of any variant
                bench.failed(label, "training", error)


def _trained(variant: str, batch: int, steps: int, bench: Bench) -> dict[str, Any]:
    size: dict[str, Any] = TOY if variant == "toy" else {"variant": variant}
    model = dit(**size, dtype=DTYPE, learn_sigma=False)
    options = TrainOptions(steps=10**6, batch=batch, learning_rate=3e-4, warmup=10)
    step: Any = make_step(flow_loss(model, flow(1.0)), options)
    params = jax.jit(model.init)(jax.random.key(0))
    copy = jax.tree.map(jnp.copy, params)  # the state is donated, and no buffer twice
    state = TrainState(jnp.int32(0), params, copy, jax.jit(optimizer(options).init)(params))
    rng = np.random.default_rng(0)
    pattern = rng.integers(40, 216, (10, *model.input_shape))  # each label has a picture of its own, plus noise
    label = np.arange(batch) % 10
    image = np.clip(pattern[label] + rng.normal(0, 10, (batch, *model.input_shape)), 0, 255).astype(np.uint8)
    data = {"image": jnp.asarray(image), "label": jnp.asarray(label, jnp.int32)}
    start = time.perf_counter()
    program = step.lower(state, data).compile()
    compile_seconds = time.perf_counter() - start
    losses, metrics = [], {}
    for _ in range(2):
        state, metrics = program(state, data)
        losses.append(float(metrics["loss"]))
    taken = []
    for _ in range(3):
        start = time.perf_counter()
        for _ in range(steps):
            state, metrics = program(state, data)
        losses.append(float(jax.block_until_ready(metrics)["loss"]))
        taken.append((time.perf_counter() - start) / steps)
    seconds = float(np.median(taken))
    cost = model_cost(model, jax.eval_shape(model.init, jax.random.key(0)))
    tflops = 3 * batch * cost.evaluation / seconds / 1e12  # the gradient takes twice the products of the forward pass
    columns: dict[str, Any] = {"compile_seconds": compile_seconds, "us": 1e6 * seconds, "tflops": tflops}
    columns |= {"spread": max(taken) / min(taken), "steps_per_second": 1 / seconds}
    columns |= {"first_loss": losses[0], "last_loss": losses[-1], "loss_falls": losses[-1] < losses[0]}
    columns["steps"], columns["parameters"] = 2 + 3 * steps, sum(a.size for a in jax.tree.leaves(state.params))
    kind = jax.devices()[0].device_kind
    peak = next((top for name, top in PUBLISHED_TFLOPS.items() if name in kind), None)
    if peak:
        columns["share_of_published_peak"] = tflops / peak
    measured = [r["tflops"] for r in read_rows(bench.path) if r["label"] == "8192^3 bf16" and "tflops" in r]
    if measured:
        columns["share_of_measured_ceiling"] = tflops / measured[-1]
    return columns


def whole(bench: Bench) -> None:
    """A FLUX.1-dev image of 1024 x 1024 from random weights, 3 of 19 double and 6 of 38 single blocks."""
    depth, steps = ({"double_depth": 1, "single_depth": 1}, 2) if bench.toy else (
        {"double_depth": 3, "single_depth": 6}, 8
    )  # fmt: skip
    small = {"size": (16, 16), "width": 128, "heads": 2, "axes_dim": (16, 24, 24), "text_tokens": 16}
    settings = [(f"model.{k}", v) for k, v in (depth | (small if bench.toy else {})).items()]
    config = override(load_config("flux_dev"), [*settings, ("steps", steps)])
    at = "flux_dev toy" if bench.toy else "flux_dev 3 + 6 blocks"

    weights = functools.cache(lambda: random_params(build_setup(config).model))

    def made(quant: str, cache: str) -> Variant:
        chosen = [("attend.name", EXACT), ("quant.name", quant), ("cache.name", cache), ("layout", "unstacked")]
        run = build_setup(override(config, chosen))
        params = jax.jit(run.prepare)(weights())
        noise, keys, cond = run.inputs(0, 1, random_conditions(run.model, 1))
        rows, scale = jax.tree.map(jnp.asarray, run.rows), jnp.float32(run.scale)
        compiled = run.sampler().lower(params, noise, keys, cond, rows, scale).compile()

        def drawn() -> float:
            x = jax.block_until_ready(jnp.copy(noise))  # the sampler takes its noise over
            return calls(compiled, (params, x, keys, cond, rows, scale), 1)

        return Variant(run=drawn)

    base = f"{at} bf16"
    cases = {base: ("none", "none"), f"{at} int8": ("int8_w8a8", "none"), f"{at} fp8": ("fp8", "none")}
    cases[f"{at} bf16, fora"] = ("none", "fora")
    makers = {label: functools.partial(made, *case) for label, case in cases.items()}
    bench.group(f"{at}, {steps} steps", makers, base, repeats=3, reserve=15)
