"""The block runner: folds the stages of a model and offers the levels trunk, block and branch to an accelerator.

The only place where blocks are put together. A model gives the pieces of a block, an accelerator decides what is
computed and what is filled, and this file adds what the branches give to the tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from difax import ops
from difax.contracts import (
    Accelerator,
    Attention,
    AttentionSpec,
    Context,
    Done,
    Model,
    Params,
    Report,
    Row,
    Segments,
    Stage,
    State,
    Tokens,
    TrunkSpec,
    Where,
)


def neutral() -> Accelerator:
    """The accelerator that changes nothing: every branch of every block is computed, nothing is remembered."""
    return Accelerator()


def stateless(attend: Callable[..., Any]) -> Attention:
    """An `Attention` that remembers nothing, from a function (q, k, v, segments) -> o."""
    return Attention(
        init=lambda spec: (),
        apply=lambda q, k, v, segments, where, row, state: (attend(q, k, v, segments), state),
    )


def memory_for(spec: TrunkSpec, accelerator: Accelerator, attention: Attention, modes: tuple[Any, ...]) -> State:
    """What the runner carries from one evaluation to the next: the accelerator's and the attention's memory."""

    def every_layer(stage: str, branch: str) -> State:
        call = spec.attention[stage][branch]
        state = () if call is None else attention.init(call)
        return jax.tree.map(lambda a: jnp.broadcast_to(a, (spec.depth[stage], *a.shape)), state)

    remembered = {s: {b: every_layer(s, b) for b in branches} for s, branches in spec.update.items()}
    return {**accelerator.init(spec, modes), "attention": remembered}


def zeros_of(function: Callable[..., Any], *arguments: Any) -> Any:
    """Zeros in the place of every array that function(*arguments) would return; nothing of it is run."""
    return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(function, *arguments))


class Blocks(NamedTuple):
    """The blocks of a model on embedded tokens, as the trunk level of an accelerator gets them.

    run(tokens, memory, first=0, last=None) -> (tokens, memory, report): those from `first` up to `last`.
    skip(tokens, memory) -> the same, with nothing run: zeros in the report.
    first_input(tokens) -> what the first dense layer of the first block is given: the modulated input.
    hidden(tokens) -> the stream [B, N, D] that the head reads.
    depth: number of blocks, over all stages.
    """

    run: Callable[..., tuple[Tokens, State, Report]]
    skip: Callable[..., tuple[Tokens, State, Report]]
    first_input: Callable[[Tokens], Any]
    hidden: Callable[[Tokens], jax.Array]
    depth: int


class Block(NamedTuple):
    """One block, as the block level of an accelerator gets it.

    It is called: (tokens, inner) -> (tokens, inner, done).
    skip(tokens, inner) -> the same, with nothing run: zeros in what was done.
    hidden(tokens) -> the stream [B, N, D] that the head reads.
    """

    run: Callable[..., tuple[Tokens, State, Report]]
    hidden: Callable[[Tokens], jax.Array]

    def __call__(self, tokens: Tokens, inner: State) -> tuple[Tokens, State, Report]:
        return self.run(tokens, inner)

    def skip(self, tokens: Tokens, inner: State) -> tuple[Tokens, State, Report]:
        return tokens, inner, zeros_of(lambda: self.run(tokens, inner)[2])


class Compute(NamedTuple):
    """One residual branch, as the branch level of an accelerator gets it.

    It is called: (inner, attend=None, dense=None, tokens=None) -> (update before the gate, inner).
    tokens: the whole ones, which it is given unless the call names others.
    """

    run: Callable[..., tuple[Any, State]]
    tokens: Tokens

    def __call__(self, inner: State, attend: Any = None, dense: Any = None, tokens: Tokens = None) -> tuple[Any, State]:
        return self.run(self.tokens if tokens is None else tokens, inner, attend, dense)


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
    mods: dict[str, Any] | None = None,
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
      mods: what the blocks' `mods` give here, {stage: leaves [L, ...]}, if that is known; None computes it.

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
            fold = _Fold(stage, context, accelerator, attention, row, halves, n in emitted, model.hidden)
            state = {level: memory[level][n] for level in ("block", "branch", "attention")}
            skips = _taken(emitted[stage.takes], stage.depth, low, high) if stage.takes and low < high else None
            (tokens, memory["along"]), state, out, reports[n] = fold(
                (tokens, memory["along"]),
                (params[n], learned.get(n, ()), mods and mods[n]),
                state,
                skips,
                low,
                high,
                unroll,
            )
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
        before = dict(emitted)
        emitted.update({name: [] for name in emitted})
        report = zeros_of(lambda: run(tokens, memory)[2])
        emitted.update(before)  # what an abstract run emits is nobody's
        return tokens, memory, report

    looked: list[str] = []

    def first_input(tokens: Tokens) -> Any:
        stage = model.stages[0]
        p, tokens = {"params": first_layer(params[stage.name])}, stage.enter(tokens, context)
        if mods is None:
            looked.append(stage.name)
            own = stage.block.apply(p, context, method="mods")
        else:
            own = jax.tree.map(lambda a: a[0], mods[stage.name])

        def branch(dense: Any) -> Any:
            with _hooked(dense):
                return stage.block.apply(p, tokens, own, context, ops.attend, method=stage.branches[0])

        return modulated_input(branch)

    if accelerator.trunk is None:
        return run(tokens, memory)
    blocks = Blocks(run, skip, first_input, model.hidden, depth)
    tokens, state, memory, report = accelerator.trunk(blocks, tokens, context, memory["trunk"], memory, row)
    for name in looked:  # the conditioning of the first block, computed for its input
        report = report._replace(entered={**report.entered, name: report.entered[name].at[0].add(1.0)})
    return tokens, {**memory, "trunk": state}, report


class _Found(Exception):
    """Carries a value out of the middle of a network."""

    def __init__(self, value: Any):
        super().__init__()
        self.value = value


def modulated_input(compute: Callable[..., Any], *arguments: Any) -> Any:
    """What the first dense layer of a branch is given; nothing behind it is run.

    Args:
      compute: takes the arguments and `dense=...` (that of `Accelerator.branch`, with `inner`).
    """

    def stop(name: str, x: jax.Array, apply: Any) -> Any:
        raise _Found(x)

    try:
        compute(*arguments, dense=stop)
    except _Found as found:
        return found.value
    raise ValueError("the branch has no dense layer")


def _hooked(dense: Callable[..., Any]) -> Any:
    """A context in which every dense layer of a block is called as dense(name, x, apply)."""

    def intercept(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        if context.method_name != "__call__" or not context.module.has_variable("params", "kernel"):
            return call(*args, **kwargs)
        return dense("/".join(context.module.path), args[0], call)

    return nn.intercept_methods(intercept)


class _Fold:
    """The blocks of one stage, folded over the tokens by a `lax.scan`, or written out for a tuple of layers."""

    def __init__(
        self,
        stage: Stage,
        context: Context,
        accelerator: Accelerator,
        attention: Attention,
        row: Row | None,
        halves: int,
        emits: bool,
        hidden: Callable[[Tokens], jax.Array],
    ):
        self.stage, self.context, self.accelerator, self.attention = stage, context, accelerator, attention
        self.row, self.halves, self.emits, self.hidden = row, halves, emits, hidden

    def __call__(
        self, carry: Any, params: Any, state: State, skips: Any, low: int, high: int, unroll: int | bool
    ) -> tuple[Any, State, Tokens, Report]:
        """Blocks low to high: (carry, state, what each block emitted [high - low, ...] or None, report).

        What one block hands to the next is (tokens, the accelerator's "along").
        """
        depth = self.stage.depth
        if low >= high:
            if self.accelerator.block is None and self.accelerator.branch is None:
                metric = {"block": (), "branch": dict.fromkeys(self.stage.branches, ())}
                computed = jnp.zeros((depth, len(self.stage.branches), self.halves), jnp.float32)
                return carry, state, None, Report(computed, jnp.zeros((depth, self.halves), jnp.float32), metric)
            if self.stage.takes:  # of the tokens' shape, as what it takes has
                skips = jax.tree.map(lambda a: jnp.zeros((depth, *a.shape), a.dtype), carry[0])
            return carry, state, None, zeros_of(lambda: self(carry, params, state, skips, 0, depth, unroll)[3])
        leaves, tree = jax.tree.flatten(state)
        at = partial(jax.lax.dynamic_index_in_dim, keepdims=False)

        def layer(carry: Any, leaves: list[Any], index: Any, p: Any, skip: Any) -> Any:
            # each layer writes its own part of the memory where it lies, which holds it once, not twice
            own = [at(a, index) for a in leaves]
            carry, new, done = self._block(carry, p, index, skip, tree.unflatten(own))
            leaves = [
                a if n is o else jax.lax.dynamic_update_index_in_dim(a, n, index, 0)
                for a, o, n in zip(leaves, own, tree.flatten_up_to(new), strict=True)
            ]
            return carry, leaves, carry[0] if self.emits else (), done

        if isinstance(params[0], tuple):
            outs = []
            for index in range(low, high):
                p = (
                    params[0][index],
                    params[1][index] if params[1] else (),
                    jax.tree.map(lambda a, i=index: a[i], params[2]),
                )
                skip = jax.tree.map(lambda a, i=index - low: a[i], skips)
                carry, leaves, out, done = layer(carry, leaves, index, p, skip)
                # a filled block is elementwise: without a border XLA fuses all of them into each consumer of the last
                carry = jax.lax.optimization_barrier(carry)
                outs.append((out, done))
            out, done = jax.tree.map(lambda *a: jnp.stack(a), *outs)
        else:
            whole = (low, high) == (0, depth)

            def body(carry: Any, xs: Any) -> Any:
                index, p, skip = xs
                if not whole:  # by index, since a slice of the stacked parameters would be copied
                    p = jax.tree.map(lambda a: at(a, index), params)
                along, leaves, out, done = layer(carry[0], carry[1], index, p, skip)
                return (along, leaves), (out, done)

            xs = (jnp.arange(low, high), params if whole else (), skips)
            (carry, leaves), (out, done) = jax.lax.scan(body, (carry, leaves), xs, unroll=unroll)
        if (low, high) != (0, depth):
            place = partial(jax.lax.dynamic_update_slice_in_dim, start_index=low, axis=0)
            done = jax.tree.map(lambda a: place(jnp.zeros((depth, *a.shape[1:]), a.dtype), a), done)
        return carry, tree.unflatten(leaves), out if self.emits else None, done

    def _block(self, carry: Any, params: Any, index: Any, skip: Any, state: State) -> Any:
        (tokens, along), (p, learned, mods) = carry, params
        where = Where(self.stage.name, None, index, self.stage.depth, learned)

        def run(tokens: Tokens, inner: Any) -> tuple[Tokens, Any, Report]:
            return self._branches(tokens, p, mods, where, skip, inner)

        inner, own = {"branch": state["branch"], "attention": state["attention"], "along": along}, state["block"]
        if self.accelerator.block is None:
            tokens, inner, done = run(tokens, inner)
        else:
            block = Block(run, self.hidden)
            tokens, own, inner, done = self.accelerator.block(block, where, tokens, own, inner, self.row)
        return (
            (tokens, inner["along"]),
            {"block": own, "branch": inner["branch"], "attention": inner["attention"]},
            done,
        )

    def _branches(self, tokens: Tokens, p: Params, mods: Any, where: Where, skip: Any, state: State) -> Any:
        apply = partial(self.stage.block.apply, {"params": p})
        if self.stage.takes:
            tokens = apply(tokens, skip, method="skip")
        mods = apply(self.context, method="mods") if mods is None else mods
        branch_state, attention_state, along = state["branch"], state["attention"], state["along"]
        computed, metrics = [], {}
        for branch in self.stage.branches:
            at = where._replace(branch=branch)
            compute = Compute(partial(self._compute, apply, mods, branch, at), tokens)

            def gate(update: Any, branch: str = branch, tokens: Tokens = tokens) -> Any:
                factor = apply(mods, branch, method="gate")
                return jax.tree.map(lambda h, g, u: (g * u).astype(h.dtype), tokens, factor, update)

            acts, inner = self.accelerator.branches, {"attention": attention_state[branch], "along": along}
            if self.accelerator.branch is None or (acts is not None and branch not in acts):
                update, inner = compute(inner)
                residual, new, done = gate(update), branch_state[branch], Done(1.0)
            else:
                residual, new, inner, done = self.accelerator.branch(
                    compute, gate, at, branch_state[branch], inner, self.row
                )
            branch_state, along = {**branch_state, branch: new}, inner["along"]
            attention_state = {**attention_state, branch: inner["attention"]}
            tokens = jax.tree.map(jnp.add, tokens, residual)
            computed.append(jnp.broadcast_to(jnp.asarray(done.computed, jnp.float32), (self.halves,)))
            metrics[branch] = done.metric
        entered = jnp.ones((self.halves,), jnp.float32)
        report = Report(jnp.stack(computed), entered, {"block": (), "branch": metrics})
        return tokens, {"branch": branch_state, "attention": attention_state, "along": along}, report

    def _compute(
        self,
        apply: Any,
        mods: Any,
        branch: str,
        where: Where,
        tokens: Tokens,
        inner: State,
        attend: Any,
        dense: Any,
    ) -> tuple[Any, State]:
        cell = [inner["attention"]]

        def plain(q: jax.Array, k: jax.Array, v: jax.Array, segments: Segments | None = None) -> jax.Array:
            o, cell[0] = self.attention.apply(q, k, v, segments, where, self.row, cell[0])
            return o

        def hooked(q: jax.Array, k: jax.Array, v: jax.Array, segments: Segments | None = None) -> jax.Array:
            return attend(q, k, v, segments, plain)

        call = partial(
            apply,
            tokens,
            mods,
            self.context,
            plain if attend is None else hooked,
            method=branch,
        )
        if dense is None:
            update = call()
        else:
            with _hooked(dense):
                update = call()
        return update, {**inner, "attention": cell[0]}


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


def first_layer(stage_params: Params) -> Params:
    """The parameters of a stage's first block, stacked or not."""
    return stage_params[0] if isinstance(stage_params, tuple) else jax.tree.map(lambda a: a[0], stage_params)


def trunk_spec(model: Model, params: Params, x: Any, cond: Any, halves: int = 1, together: bool = True) -> TrunkSpec:
    """Shapes of every branch's update, attention call and dense layers for inputs x [B, ...] and cond, by abstract
    evaluation.

    Args:
      halves: how many copies of the batch x holds; together: do they run in one batch.
    """
    shape = partial(jax.tree.map, lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype))
    calls: dict[str, dict[str, AttentionSpec | None]] = {s.name: dict.fromkeys(s.branches) for s in model.stages}
    layers: dict[str, dict[str, dict[str, Any]]] = {s.name: {b: {} for b in s.branches} for s in model.stages}

    def shapes(params: Params, x: jax.Array, cond: Any) -> Any:
        tokens, context = model.embed(params, x, jnp.zeros(x.shape[:1]), cond)
        first, updates = tokens, {}
        for stage in model.stages:
            tokens = stage.enter(tokens, context)
            p = first_layer(params[stage.name])
            mods = stage.block.apply({"params": p}, context, method="mods")
            updates[stage.name] = {}
            for branch in stage.branches:

                def record(q: Any, k: Any, v: Any, segments: Any = None, s: str = stage.name, b: str = branch) -> Any:
                    if calls[s][b] is not None:
                        raise ValueError(f"{model.name}: the branch {b} of {s} attends more than once; allowed: once")
                    calls[s][b] = AttentionSpec(*shape((q, k, v, segments)))
                    return ops.attend(q, k, v, segments)

                def dense(name: str, x: Any, apply: Any, found: dict[str, Any] = layers[stage.name][branch]) -> Any:
                    y = apply(x)
                    found[name] = shape((x, y))
                    return y

                with _hooked(dense):
                    update = stage.block.apply({"params": p}, tokens, mods, context, record, method=branch)
                updates[stage.name][branch] = update
        return first, updates, model.head(params, tokens, context)

    tokens, updates, output = jax.eval_shape(shapes, params, x, cond)
    first = next(iter(model.stages), None)
    inputs = [] if first is None else [x for x, _ in layers[first.name][first.branches[0]].values()]
    return TrunkSpec(
        depth={s.name: s.depth for s in model.stages},
        update=updates,
        attention=calls,
        dense=layers,
        tokens=tokens,
        hidden=jax.eval_shape(model.hidden, tokens),
        first_input=inputs[0] if inputs else None,
        output=output,
        halves=halves,
        together=together,
    )


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
    attention = attention or reference_attention()
    accelerator = neutral()
    memory = memory_for(trunk_spec(model, params, x, cond), accelerator, attention, ((),))
    tokens, context = model.embed(params, x, model_time, cond)
    tokens, _, _ = run_trunk(model, params, tokens, context, accelerator, attention, memory, None, unroll)
    return model.head(params, tokens, context)


def reference_attention() -> Attention:
    """The exact attention of `difax.ops.attend`."""
    return stateless(ops.attend)
