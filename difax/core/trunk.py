"""The block runner: folds the stages of a model and offers the levels trunk, block and branch to an accelerator."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from difax.core import ops
from difax.core.contracts import Accelerator, Attention, Context, Known, Model, Params, Report, Row, State, Tokens
from difax.core.fold import Fold
from difax.core.hooks import hooked, modulated_input
from difax.core.shapes import first_layer, memory_for, trunk_spec


def neutral() -> Accelerator:
    """The accelerator that changes nothing: every branch of every block is computed, nothing is remembered."""
    return Accelerator()


def stateless(attend: Callable[..., Any]) -> Attention:
    """An `Attention` that remembers nothing, from a function (q, k, v, segments) -> o."""
    return Attention(
        init=lambda spec: (),
        apply=lambda q, k, v, segments, where, row, state: (attend(q, k, v, segments), state),
        lse=lambda q, k, v, segments, where, row, state: (attend(q, k, v, segments, with_lse=True), state),
    )


class Blocks(NamedTuple):
    """The blocks of a model on embedded tokens, as the trunk level of an accelerator gets them.

    run(tokens, memory, first=0, last=None) -> (tokens, memory, report): those from `first` up to `last`.
    skip(tokens, memory) -> the same, with nothing run: zeros in the report.
    first_input(tokens) -> what the first dense layer of the first block is given: the modulated input.
    hidden(tokens) -> the stream [B, N, D] that the head reads.
    told: what the model makes of the time alone (`Model.told`).
    depth: number of blocks, over all stages.
    """

    run: Callable[..., tuple[Tokens, State, Report]]
    skip: Callable[..., tuple[Tokens, State, Report]]
    first_input: Callable[[Tokens], Any]
    hidden: Callable[[Tokens], jax.Array]
    told: Mapping[str, jax.Array]
    depth: int


def run_trunk(
    model: Model,
    params: Params,
    tokens: Tokens,
    context: Context,
    accelerator: Accelerator,
    attention: Attention,
    memory: State,
    row: Row | None,
    unroll: int | bool = 1,
    known: dict[str, Known] | None = None,
) -> tuple[Tokens, State, Report]:
    """Runs all stages of a model on embedded tokens through an accelerator and an attention.

    Args:
      model, params: the network; `params[stage.name]` leads with [depth], or is a tuple of layers (`unstack`), and so
        does `params["accelerator"][stage.name]`, if there, which is handed to the accelerator layer by layer.
      tokens, context: what `model.embed` returned.
      accelerator, attention: what may be filled instead of computed, and how the blocks attend.
      memory: of both, as `memory_for` made it.
      row: the evaluation under way with its chosen plan (None outside of sampling, for the neutral accelerator).
      unroll: of the `lax.scan` over depth; True writes the blocks out (faster gradients on CPU, slower compile).
      known: what is known of the blocks of each stage before this evaluation; None computes all of it here.

    Returns:
      (tokens, memory, report).
    """
    halves = 1 if row is None else row.plan.halves
    emitted: dict[str, list[tuple[int, int, Tokens]]] = {s.takes: [] for s in model.stages if s.takes}
    learned = params.get("accelerator", {})
    depth = sum(stage.depth for stage in model.stages)

    def run(tokens: Tokens, memory: State, first: int = 0, last: int | None = None) -> tuple[Tokens, State, Report]:
        memory, start, reports = dict(memory), 0, {}
        for stage in model.stages:
            n = stage.name
            low, high = max(first - start, 0), min((depth if last is None else last) - start, stage.depth)
            start += stage.depth
            if low == 0 and high > 0:
                tokens = stage.enter(tokens, context)
            fold = Fold(stage, context, accelerator, attention, row, halves, n in emitted, model.hidden)
            state = {level: memory[level][n] for level in ("block", "branch", "attention")}
            skips = _taken(emitted[stage.takes], stage.depth, low, high) if stage.takes and low < high else None
            (own, memory["along"]), state, out, reports[n] = fold(
                (stage.within(tokens), memory["along"]),
                (params[n], learned.get(n, ()), known and known[n]),
                state,
                skips,
                low,
                high,
                unroll,
            )
            tokens = stage.behind(tokens, own)
            if n in emitted and low < high:
                emitted[n].append((low, high, out))
            for level, new in state.items():
                memory[level] = {**memory[level], n: new}
        metric = {level: {n: r.metric[level] for n, r in reports.items()} for level in ("block", "branch")}
        report = Report(
            {n: r.computed for n, r in reports.items()},
            {n: r.entered for n, r in reports.items()},
            {"output": (), "trunk": (), **metric},
        )
        return tokens, memory, report

    def skip(tokens: Tokens, memory: State) -> tuple[Tokens, State, Report]:
        return tokens, memory, run(tokens, memory, 0, 0)[2]

    looked: list[str] = []

    def first_input(tokens: Tokens) -> Any:
        stage = model.stages[0]
        p, tokens = {"params": first_layer(params[stage.name])}, stage.within(stage.enter(tokens, context))
        mods = known and known[stage.name].mods
        if mods is None:
            looked.append(stage.name)
            own = stage.block.apply(p, context, method="mods")
        else:
            own = jax.tree.map(lambda a: a[0], mods)

        def branch(dense: Any) -> Any:
            with hooked(dense):
                return stage.block.apply(p, tokens, own, context, ops.attend, method=stage.branches[0])

        return modulated_input(branch)

    if accelerator.trunk is None:
        return run(tokens, memory)
    blocks = Blocks(run, skip, first_input, model.hidden, model.told(context), depth)
    tokens, state, memory, report = accelerator.trunk(blocks, tokens, context, memory["trunk"], memory, row)
    for name in looked:  # the conditioning of the first block, computed for its input
        report = report._replace(entered={**report.entered, name: report.entered[name].at[0].add(1.0)})
    return tokens, {**memory, "trunk": state}, report


def _taken(emitted: list[tuple[int, int, Tokens]], depth: int, low: int, high: int) -> Tokens:
    """What blocks low to high of a stage take of the one that emitted: block j takes that of block depth - 1 - j."""
    parts = []
    for start, end, values in sorted(emitted, key=lambda part: -part[0]):
        a, b = max(start, depth - high), min(end, depth - low)
        if a < b:
            parts.append(jax.tree.map(lambda v, a=a - start, b=b - start: jnp.flip(v[a:b], 0), values))
    taken = jax.tree.map(lambda *v: jnp.concatenate(v), *parts) if len(parts) > 1 else parts[0]
    return taken


def unstack(model: Model, params: Params) -> Params:
    """The same parameters with each stage as a tuple of layers, for which the runner writes the blocks out.

    A scan over stacked layers reads each layer's weights through a copy, which XLA's CPU backend does not fuse into
    the products: written out, a DiT step took 5 to 12 % fewer seconds there, for a longer compilation
    (experiments/results/bench_step). Slicing once, outside of the compiled program, is what makes the difference.

    Args:
      params: with stages that lead with [depth].
    """

    def layers(tree: Params) -> Params:
        depth = {s.name: s.depth for s in model.stages if s.name in tree}
        return {n: tuple(jax.tree.map(lambda a, i=i: a[i], tree[n]) for i in range(d)) for n, d in depth.items()}

    learned = {"accelerator": layers(params["accelerator"])} if "accelerator" in params else {}
    return {**params, **layers(params), **learned}


def forward(
    model: Model,
    params: Params,
    x: jax.Array,
    model_time: jax.Array,
    cond: Any,
    attention: Attention | None = None,
    unroll: int | bool = 1,
) -> jax.Array:
    """The plain network: embed, every block, head. Used by training and by parity tests.

    Args:
      x: [B, ...] noised input; model_time: [B]; cond: the model's condition (labels [B]).
      attention: how the blocks attend; None is the reference.

    Returns:
      [B, ..., C] (2C with learned variance), in the model's compute dtype.
    """
    accelerator, spec = neutral(), None if attention is None else trunk_spec(model, params, x, cond)
    attention = attention or reference_attention()
    memory = nothing(model) if spec is None else memory_for(spec, accelerator, attention, ((),))
    tokens, context = model.embed(params, x, model_time, cond)
    tokens, _, _ = run_trunk(model, params, tokens, context, accelerator, attention, memory, None, unroll)
    return model.head(params, tokens, context)


def nothing(model: Model) -> State:
    """The runner's memory where neither accelerator nor attention remember: no array."""
    branches = {stage.name: dict.fromkeys(stage.branches, ()) for stage in model.stages}
    blocks = dict.fromkeys(branches, ())
    return {"output": (), "trunk": (), "along": {}, "block": blocks, "branch": branches, "attention": branches}


def reference_attention() -> Attention:
    """The exact attention of `difax.core.ops.attend`."""
    return stateless(ops.attend)
