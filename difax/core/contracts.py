"""The contracts every part of difax meets at: NamedTuples of pure functions, and the rows they scan over.

A technique is a factory that returns one of these tuples; what it must remember from one denoising step to the
next is a pytree that travels in the carry of the one sampling scan (`difax.core.sample`). Nothing here knows a
particular model, solver or cache.

Shape letters: B batch, N tokens, D width, H heads, K head width, L depth of a stage, E model evaluations of a run.
Time: t in [0, 1], 1 = pure noise, 0 = data. What a network is told about t is `Process.model_time(t)`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.struct
import jax
import numpy as np

Array = Any  # numpy (float64, on the host) or jax, by context
Params = Any
State = Any
Tokens = Any
Context = Any


class Level(NamedTuple):
    """The noise level of x = alpha x0 + sigma eps at one time, with its slope along the model's own time."""

    alpha: Array
    sigma: Array
    alpha_dot: Array
    sigma_dot: Array


@flax.struct.dataclass
class Plan:
    """What an accelerator decided before the run, on the host.

    index: int32 [E], which of `modes` each evaluation has.
    values: any pytree of numbers that the evaluations look up, leaves lead with [E] (weights, thresholds, decisions
        that differ by layer); traced, so that other numbers need no new compilation.
    modes: the distinct ways in which evaluations are run, hashable and ordered; each is traced once, with what it
        fills left out. Runs with the same modes in another order share a compilation.
    owner: name of the accelerator that made it.
    """

    index: Array
    values: Any = ()
    modes: tuple[Any, ...] = flax.struct.field(pytree_node=False, default=((),))
    owner: str = flax.struct.field(pytree_node=False, default="none")


class Chosen(NamedTuple):
    """A plan as the evaluation under way sees it: its mode (static), its numbers, and how many halves run (static)."""

    mode: Any
    values: Any
    halves: int


class Row(NamedTuple):
    """One model evaluation of a run: the element that the sampling scan consumes. Every leaf leads with [E].

    Rows are made on the host in float64 by `Solver.grid`, then rounded once. They enter the compiled sampler as
    an argument, so another time grid, eta or guidance interval of the same length needs no new compilation.
    """

    i: Array  # index of the evaluation, 0 ... E-1
    step: Array  # index of the solver step it belongs to (Heun: two evaluations a step)
    t: Array  # process time of the evaluation
    model_time: Array  # what the network is told
    level: Level
    coefficients: Any  # the solver's own table
    guided: Array  # bool: is the unconditional half evaluated here
    fresh: Array  # bool: some remembered half is undefined here, so nothing may be reused
    plan: Any = ()  # `Plan` of the accelerator; `Chosen` where an accelerator's functions see the row
    guide: Any = ()  # the guide's own table


class Prediction(NamedTuple):
    """A network output, converted once (`difax.core.process.convert`) into what solvers consume.

    jvp(dx, dt) -> (dx0, deps): how it changes with x and the process time t, [B] or a scalar; vjp(dx0, deps) -> dx: the
    transpose in x. Both are of the network with its guidance, for solvers that ask for `derivatives`, else None.
    extra: what the solver's own `head` says of the conditional half [B, ..., F], or None.
    """

    x0: jax.Array
    eps: jax.Array
    variance: jax.Array | None  # the learned-variance channels in [-1, 1] (DiT), or None
    jvp: Callable[..., tuple[jax.Array, jax.Array]] | None = None
    vjp: Callable[..., jax.Array] | None = None
    extra: jax.Array | None = None


class Solver(NamedTuple):
    """A sampler of the reverse process, as a table made on the host and one step function.

    grid(process, times) -> Row: lays out the evaluations for decreasing times [n+1] and tabulates coefficients in
        float64. Raises ValueError for times that the method cannot use.
    init(x) -> state.
    step(prediction, x, state, row, keys) -> (x, state): `keys` [B] are this evaluation's per-sample keys.
    start(x, row, keys) -> x: what is made of the initial noise, given the first row and keys of its own; None: nothing.
    drive: what decides on the evaluations (`difax.core.drive`).
      "scan": the rows, one after another.
      "while": the solver, in the run. The rows are as many as it may make; of each it reads `i`, `step` and the
        coefficients. ask(x, state, row) -> (t [B], live [B]): at which process time each sample is evaluated next, and
        whether it goes on. Times, levels and model times of the row that `step` gets are those, [B] or [B, 1, ...];
        what it returns for samples that do not go on is dropped. Leaves of the state lead with [B].
      "window": `window` rows of each sample at once (None: all of them), at most as many as there are: W
        (`difax.core.drive.width`). init(x, rows) -> state, whose leaves lead with [B];
        ask(state, rows) -> (x [B, W, ...], index [B, W], live [B]): at which points which rows are evaluated next;
        step(prediction, x, state, row, keys) -> (samples [B, ...], state) gets all of it as [B, W, ...], and the keys
        [B, W] that the scan would give these rows.
    derivatives: is the prediction handed out with `jvp` and `vjp`.
    augmented: does it take processes of position and velocity (`difax.core.langevin`).
    head: (x, model_time [B], hidden [B, N, D], output) -> [B, ..., F], of the shape of x but for its channels: what the
        solver reads off the network's last tokens beside its output, at every evaluation; the step gets it as `extra`.
    """

    grid: Callable[..., Row]
    init: Callable[..., State]
    step: Callable[..., tuple[jax.Array, State]]
    start: Callable[..., jax.Array] | None = None
    drive: str = "scan"
    ask: Callable[..., Any] | None = None
    window: int | None = 1
    derivatives: bool = False
    augmented: bool = False
    head: Callable[..., jax.Array] | None = None


class Guide(NamedTuple):
    """How the conditional and unconditional halves of a step are produced and mixed.

    plan(row) -> Row: fills `guided` and `fresh`, and where it has one its own table `guide`, on the host.
    halves: how many copies of the batch the accelerator's state is made for (1 or 2).
    init(x) -> state.
    apply(denoise, x, cond, null, scale, row, state, memory) -> (output, state, memory, trace):
        `denoise(x, cond, row, memory, half)` -> (output, memory, trace) runs the network; `half` is "both"
        (conditional rows first), "cond" or "uncond".
    together: do the halves run in one batch, and an online gate decides for both at once.
    """

    plan: Callable[[Row], Row]
    halves: int
    init: Callable[[jax.Array], State]
    apply: Callable[..., tuple[jax.Array, State, State, Any]]
    together: bool = True


class Stage(NamedTuple):
    """`depth` equal blocks whose parameters are stacked on a leading [depth] axis.

    block: a stateless `flax.linen` module with the methods `mods(context)` -> per-branch modulation,
        one method per name in `branches` `(tokens, mods, context, attend) -> update before the gate`, and
        `gate(mods, branch)` -> what multiplies the update before it is added; update and gate have the structure of
        the tokens. `attend(q, k, v, segments=None) -> o` is called at most once in a branch. The first dense layer
        that a branch calls is given the modulated hidden stream (`Model.hidden`).
    enter: (tokens, context) -> tokens, run once before the first block of the stage.
    once: does the block also have the method `once(context)` -> dict: what its branches compute of the condition alone,
        and of no time (keys and values of cross-attention). Where the context has it already, they take it from there.
    takes: for long skips, the name of an earlier stage of the same depth: block j is first given the tokens behind
        that stage's block depth - 1 - j, by the block's method `skip(tokens, taken)` -> tokens.
    beside: branches that are given the tokens which the branch before them was given, and not what it made of them:
        two branches in parallel, whose updates are added one after the other.
    streams: where the model's tokens are a dict of streams, the names of those that the blocks are given, update and
        hand around, among them the one that `Model.hidden` reads; the others pass by as they are. None: all.
    """

    name: str
    depth: int
    block: Any
    branches: tuple[str, ...]
    enter: Callable[[Tokens, Context], Tokens] = lambda tokens, context: tokens
    takes: str | None = None
    once: bool = False
    beside: tuple[str, ...] = ()
    streams: tuple[str, ...] | None = None

    def within(self, tokens: Tokens) -> Tokens:
        """The part of the model's tokens that the blocks of this stage have."""
        return tokens if self.streams is None else {name: tokens[name] for name in self.streams}

    def behind(self, tokens: Tokens, own: Tokens) -> Tokens:
        """The model's tokens with that part as the blocks left it."""
        return own if self.streams is None else {**tokens, **own}


class Known(NamedTuple):
    """What is known of the blocks of a stage before an evaluation, leaves lead with [L]: what their `mods` give, or
    None, and what their `once` gives."""

    mods: Any
    once: dict[str, Any]


class Shard(NamedTuple):
    """How a dense layer is cut among devices: by "columns" (outputs) or "rows" (inputs).

    parts: relative widths of what is fused along that axis, queries, keys and values (1, 1, 1): every device has its
    own piece of each.
    """

    axis: str
    parts: tuple[int, ...] = (1,)


class Model(NamedTuple):
    """A network as data: pure functions over one plain dict of parameters.

    init(key) -> params; embed(params, x, model_time, cond) -> (tokens, context);
    head(params, tokens, context) -> output [B, ..., C] (or 2C with `learn_sigma`);
    null(cond) -> the condition of the unconditional half, of the same structure;
    once(params, cond) -> a condition in which what the network makes of it alone, and of no time, is made already (text
    projections): `embed` takes either.
    """

    name: str
    init: Callable[[jax.Array], Params]
    embed: Callable[..., tuple[Tokens, Context]]
    stages: tuple[Stage, ...]
    head: Callable[..., jax.Array]
    null: Callable[[Any], Any]
    input_shape: tuple[int, ...]  # of one sample, without the batch: (H, W, C) or (F, H, W, C)
    learn_sigma: bool
    classes: int  # 0 for a model that is not conditioned on labels
    dtype: Any = "float32"  # of activations and dots; parameters are cast to it before sampling
    cond: Any = jax.ShapeDtypeStruct((), "int32")  # of one sample's condition, without the batch: here a label
    hidden: Callable[[Tokens], jax.Array] = lambda tokens: tokens  # the stream [B, N, D] that the head reads
    once: Callable[[Params, Any], Any] = lambda params, cond: cond
    # (pattern of a path such as "blocks/qkv/", how these weights are cut); weights that no rule names are not
    shards: tuple[tuple[str, Shard], ...] = ()
    # of a context, what is made of the time alone: "time", its embedding, "modulation", what all blocks modulate by
    told: Callable[[Context], Mapping[str, jax.Array]] = lambda context: {}


class Classifier(NamedTuple):
    """An image classifier as data; its features are the space in which sets of images are compared.

    init(key) -> params; features(params, images [B, H, W, C] in [-1, 1]) -> [B, width] float32;
    logits(params, features) -> [B, classes] float32.
    """

    name: str
    init: Callable[[jax.Array], Params]
    features: Callable[[Params, jax.Array], jax.Array]
    logits: Callable[[Params, jax.Array], jax.Array]
    input_shape: tuple[int, ...]  # of one image, without the batch: (H, W, C)
    width: int
    classes: int


class TextEncoder(NamedTuple):
    """A text encoder as data: ids of tokens -> the states [B, L, D] between and behind its blocks.

    init(key) -> {"ends": ..., "blocks": leaves lead with [depth]};
    embed(ends, ids [B, L] int32, mask [B, L] int32, 0 for padding) -> (x [B, L, D], context): the embedded tokens, and
        what all blocks share (positions, who sees whom, biases);
    block(params of one layer, x, context) -> x;
    norm(ends, x) -> x: what the state behind the last block goes through;
    pool(ends, x, ids) -> {"pooled": [B, D], "projected": [B, P]} of the normed state, or None.

    State 0 is what `embed` gives, state i is behind block i, and -1 the last one, normed, as transformers counts its
    hidden_states. normed: is the state of number `depth` the normed one too; in CLIP it is not.
    """

    name: str
    init: Callable[[jax.Array], Params]
    embed: Callable[..., tuple[jax.Array, Context]]
    block: Callable[[Params, jax.Array, Context], jax.Array]
    norm: Callable[[Params, jax.Array], jax.Array]
    depth: int
    width: int
    length: int  # of the longest text that its positions allow
    vocabulary: int
    pool: Callable[..., dict[str, jax.Array]] | None = None
    dtype: Any = "float32"
    shards: tuple[tuple[str, Shard], ...] = ()
    normed: bool = True


class Autoencoder(NamedTuple):
    """Between pixels [B, H, W, 3] in [-1, 1] and latents [B, h, w, C], or videos [B, F, ...], as data.

    Latents are as the denoiser has them: scale, shift, means and deviations by channel are inside of both functions.

    init(key) -> params; decode(params, latents) -> pixels, not clipped; encode(params, pixels) -> latents, the mean.
    side: pixels of a latent's side. time: 0 for images; else frames that a latent adds: f latents are 1 + time (f - 1)
    frames. channels: of the latents.
    """

    name: str
    init: Callable[[jax.Array], Params]
    decode: Callable[[Params, jax.Array], jax.Array]
    encode: Callable[[Params, jax.Array], jax.Array]
    side: int
    time: int
    channels: int
    dtype: Any = "float32"


class Where(NamedTuple):
    """The place of a block or of one of its branches.

    stage, branch (None for the block as a whole), depth (of the stage): static; layer: traced index in the stage.
    learned: what the accelerator's own parameters hold for this layer (`params["accelerator"][stage]`), or ().
    """

    stage: str
    branch: str | None
    layer: Array
    depth: int
    learned: Any = ()


class Segments(NamedTuple):
    """Ids of queries and keys, int32: a pair attends where its ids are equal (padding, packed samples)."""

    q: jax.Array  # [B, T]
    k: jax.Array  # [B, S]


@flax.struct.dataclass
class BlockList:
    """Which blocks of keys each block of queries attends to.

    indices: int32 [B or 1, H or 1, T / block_q, n], of which the first `counts` hold in each row.
    counts: int32 [B or 1, H or 1, T / block_q], 1 or more.
    """

    indices: jax.Array
    counts: jax.Array
    block_q: int = flax.struct.field(pytree_node=False)
    block_k: int = flax.struct.field(pytree_node=False)


class Scales(NamedTuple):
    """What quantised q, k, v are multiplied by; float32, broadcastable to [B, T, H, K] (k, v: [B, S, H, K])."""

    q: jax.Array
    k: jax.Array
    v: jax.Array


@flax.struct.dataclass
class BlockScales:
    """What quantised q, k, v are multiplied by, one number a block: the form that kernels read.

    q: float32 [B, H, ceil(T / block_q)]; k: [B, H, ceil(S / block_k)]; v: [B, H, K], or None: v is not quantised.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array | None
    block_q: int = flax.struct.field(pytree_node=False)
    block_k: int = flax.struct.field(pytree_node=False)


class AttentionSpec(NamedTuple):
    """Shapes of one branch's attention call: ShapeDtypeStructs of q [B, T, H, K], k and v [B, S, H, K], segments."""

    q: Any
    k: Any
    v: Any
    segments: Segments | None

    def in_words(self) -> str:
        """What a message and a table call it: "q [2, 256, 6, 64] bfloat16, S 256, segments"."""
        ids = "" if self.segments is None else ", segments"
        return f"q {list(self.q.shape)} {self.q.dtype}, S {self.k.shape[1]}{ids}"


class Attention(NamedTuple):
    """How the blocks attend, with what is remembered per layer from one evaluation to the next.

    init(spec: AttentionSpec) -> state of one layer's call. Raises NotImplementedError to say "not me".
    apply(q, k, v, segments, where, row, state) -> (o, state): o [B, T, H, K] in the dtype of q; `row` is None outside
        of sampling. Raises NotImplementedError, at trace time, with what it cannot do.
    lse: the same arguments -> ((o, lse [B, H, T] float32), state), what a ring of devices merges by; None: it has none.
    ordered: does it go by the order of the tokens (a window does).
    chosen() -> {call in words (`AttentionSpec.in_words`): name of what serves it}: where there is a choice, what was
        decided for the target so far, which is all calls of a program once it has been traced.
    """

    init: Callable[[AttentionSpec], State]
    apply: Callable[..., tuple[jax.Array, State]]
    lse: Callable[..., tuple[tuple[jax.Array, jax.Array], State]] | None = None
    ordered: bool = False
    chosen: Callable[[], dict[str, str]] = dict


class TrunkSpec(NamedTuple):
    """What an accelerator may allocate for: per stage its depth, and per branch the update's ShapeDtypeStruct,
    its `AttentionSpec` (None: the branch does not attend) and its dense layers {name: (x, y)}; the tokens between
    stages, those that each stage's blocks have (`Stage.within`), the network's output, what `Model.told` gives; halves:
    how many copies of the batch these shapes hold."""

    depth: dict[str, int]
    update: dict[str, dict[str, Any]]
    attention: dict[str, dict[str, AttentionSpec | None]]
    dense: dict[str, dict[str, dict[str, tuple[Any, Any]]]]
    tokens: Any
    within: dict[str, Any]
    hidden: Any
    first_input: Any
    output: Any
    halves: int = 1
    together: bool = True
    told: Mapping[str, Any] = {}


class Done(NamedTuple):
    """What one branch did: computed, float32 scalar or [halves], the fraction really computed; metric: any pytree of
    float32 arrays to be handed out with the trace, whose last axis is the halves (a gate's: `difax.core.decisions`)."""

    computed: Any
    metric: Any = ()


class Report(NamedTuple):
    """What a run of blocks did.

    computed: {stage: float32 [L, branches, halves]}; entered: {stage: float32 [L, halves]}, blocks whose conditioning
    was computed; metric: {"output", "trunk": pytree, "block": {stage: pytree [L]}, "branch": {stage: {branch: [L]}}},
    the last axis of every leaf being the halves. Of one block: the same without stages and layers.
    """

    computed: Any
    entered: Any
    metric: dict[str, Any]


def no_plan(rows: Row, stages: tuple[Stage, ...]) -> Plan:
    """The plan of an accelerator that decides nothing before the run: one mode."""
    return Plan(index=np.zeros(len(rows.i), np.int32))


def no_memory(spec: TrunkSpec, modes: tuple[Any, ...]) -> dict[str, Any]:
    """The memory of an accelerator that remembers nothing."""
    return {
        "output": (),
        "trunk": (),
        "along": {},
        "block": {stage: () for stage in spec.update},
        "branch": {stage: dict.fromkeys(updates, ()) for stage, updates in spec.update.items()},
    }


class Network(NamedTuple):
    """A second network of a run, for the same samples, conditions and prediction as its own.

    shared: is it the run's model with other weights. Then accelerators, attention, quantisation and mesh act on it as
    on the model, and in a report its stages are the model's.
    """

    model: Model
    params: Params
    shared: bool = False


class Accelerator(NamedTuple):
    """What may be computed or filled, and what is remembered for it. Every part has a neutral default.

    A part that an accelerator gives is a level that it acts on; `difax.core.stack.stack` puts accelerators of different
    levels together, and the levels nest in the order of the fields below: guide > output > trunk > block > branch.

    name: for messages. branches: the branches that `branch` acts on; None is all.
    learned: {stage: {name: array [L, ...]}}, fitted parameters, which become `params["accelerator"]`
        (`difax.core.stack.with_learned`) and reach block and branch, layer by layer, as `where.learned`.
    measured: what each file that it plans from says of itself (`difax.accel.caches.measured.record`).
    batchwide: does a decision in the run go by the whole batch, so that other samples beside one change it.
    planned: is what each evaluation computes known before the run, from the numbers of its plan, which has one mode.
    plan(rows, stages) -> Plan, on the host.
    guide(guide) -> guide: how the unconditional half is produced.
    init(spec, modes) -> memory {"output": pytree, "trunk": pytree, "along": {name: pytree}, "block": {stage: pytree
        with leading [depth]}, "branch": {stage: {branch: the same}}} for the modes of a plan. What is "along" goes from
        branch to branch and block to block, and on to the next evaluation: `memory["along"]`, `inner["along"]`.
    lookup(plan, row, along) -> (index, values): which mode the evaluation has and the numbers that go with it, where
        that depends on what is remembered; plan is the whole run's, None takes the row's own.
    networks: others that it may run instead of the model, whose parameters are `params["networks"]`
        (`difax.core.stack.with_learned`); `output` says which, and in a report their stages are "1/blocks", "2/blocks".
    network(row) -> which of `networks` that share the model's blocks gives the weights of an evaluation, by its mode:
        0 the model's own, 1 those of the first.
    fresh(rows) -> rows, on the host and before any plan: marks evaluations at which nothing that was remembered holds.
    output(run, state, memory, row) -> (output, state, memory, report, ran): wraps the whole network,
        `run(memory, network=0)` -> (output, memory, report), 0 the model, 1 the first of `networks`; ran: 1.0, or 0.0
        where no network was run.
    trunk(blocks, tokens, context, state, memory, row) -> (tokens, state, memory, report): wraps the blocks,
        `blocks.run(tokens, memory, first=0, last=None)` -> (tokens, memory, report) runs those from `first` up to
        `last`, counted over all stages; what is left out reports zeros (`difax.core.trunk.Blocks`).
    block(run, where, tokens, state, inner, row) -> (tokens, state, inner, done): wraps one block,
        `run(tokens, inner)` -> (tokens, inner, done) (`difax.core.fold.Block`).
    branch(compute, gate, where, state, inner, row) -> (residual, state, inner, Done): wraps one residual branch.
        `compute(inner, attend=None, dense=None, tokens=None)` -> (update before the gate, inner); `gate(update)` ->
        what is added to the tokens. `inner` holds what the branch's attention remembers: handed through, unchanged
        where nothing is computed. The hooks stand in for every attention call, `attend(q, k, v, segments, apply)`,
        and for every dense layer, `dense(name, x, apply)`; `tokens` are other inputs than the whole ones, which are
        `compute.tokens` (`difax.core.fold.Compute`).

    A state that comes back as the very object that went in is not written again.
    """

    name: str = "none"
    branches: tuple[str, ...] | None = None
    plan: Callable[..., Plan] = no_plan
    init: Callable[[TrunkSpec, tuple[Any, ...]], State] = no_memory
    guide: Callable[[Guide], Guide] | None = None
    lookup: Callable[..., tuple[Any, Any]] | None = None
    output: Callable[..., Any] | None = None
    trunk: Callable[..., Any] | None = None
    block: Callable[..., Any] | None = None
    branch: Callable[..., Any] | None = None
    learned: dict[str, dict[str, Any]] | None = None
    measured: tuple[Mapping[str, Any], ...] = ()
    batchwide: bool = False
    networks: tuple[Network, ...] = ()
    planned: bool = False
    network: Callable[[Row], int] | None = None
    fresh: Callable[[Row], Row] | None = None


class Trace(NamedTuple):
    """What a run really did, per evaluation: the source of every cost that difax reports.

    computed: {stage: float32 [E, L, branches, halves]} fraction of the branch computed in each half, 0 for a half
    that did not run.
    entered: {stage: float32 [E, L, halves]}, blocks whose conditioning was computed.
    halves: float32 [E], copies of the batch that were embedded and went through the head (1 unguided, 2 with guidance).
    metric: of the accelerator, as in `Report`, leaves lead with [E].
    ahead: float32, copies of the batch for which what depends on the condition alone was computed before the first
    evaluation, and in none; 0 where every evaluation computes it.
    live: float32 [E], the share of the samples for which the evaluation was made; less than 1 only where the solver
    decides in the run (`difax.core.drive`). Evaluations that were not made are zero in everything. An evaluation of a
    window counts as often as it is wide in all but `live`, which is 1 for it (`difax.core.drive.evaluations`).
    unfinished: float32, the share of the samples that had not arrived after all E.
    """

    computed: dict[str, jax.Array]
    entered: dict[str, jax.Array]
    halves: jax.Array
    metric: dict[str, Any]
    ahead: Any = 0.0
    live: Any = 1.0
    unfinished: Any = 0.0
