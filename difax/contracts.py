"""The contracts every part of difax meets at: NamedTuples of pure functions, and the rows they scan over.

A technique is a factory that returns one of these tuples; what it must remember from one denoising step to the
next is a pytree that travels in the carry of the one sampling scan (`difax.sample`). Nothing here knows a
particular model, solver or cache.

Shape letters: B batch, N tokens, D width, H heads, K head width, L depth of a stage, E model evaluations of a run.
Time: t in [0, 1], 1 = pure noise, 0 = data. What a network is told about t is `Process.model_time(t)`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax

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


class Prediction(NamedTuple):
    """A network output, converted once (`difax.process.convert`) into what solvers consume."""

    x0: jax.Array
    eps: jax.Array
    variance: jax.Array | None  # the learned-variance channels in [-1, 1] (DiT), or None


class Solver(NamedTuple):
    """A sampler of the reverse process, as a table made on the host and one step function.

    grid(process, times) -> Row: lays out the evaluations for decreasing times [n+1] and tabulates coefficients in
        float64. Raises ValueError for times that the method cannot use.
    init(x) -> state.
    step(prediction, x, state, row, keys) -> (x, state): `keys` [B] are this evaluation's per-sample keys.
    """

    grid: Callable[..., Row]
    init: Callable[[jax.Array], State]
    step: Callable[..., tuple[jax.Array, State]]


class Guide(NamedTuple):
    """How the conditional and unconditional halves of a step are produced and mixed.

    plan(row) -> Row: fills `guided` and `fresh` on the host.
    halves: how many copies of the batch the accelerator's state is made for (1 or 2).
    init(x) -> state.
    apply(denoise, x, cond, null, scale, row, state, accelerator_state)
        -> (output, state, accelerator_state, computed): `denoise(x, cond, row, accelerator_state, half)` runs the
        network; `half` is "both" (conditional rows first) or "cond".
    """

    plan: Callable[[Row], Row]
    halves: int
    init: Callable[[jax.Array], State]
    apply: Callable[..., tuple[jax.Array, State, State, Any]]


class Stage(NamedTuple):
    """`depth` equal blocks whose parameters are stacked on a leading [depth] axis.

    block: a stateless `flax.linen` module with the methods `mods(context)` -> per-branch modulation,
        one method per name in `branches` `(tokens, mods, context, attend) -> update before the gate`, and
        `gate(mods, branch)` -> what multiplies the update before it is added; update and gate have the structure of
        the tokens. `attend(q, k, v, segments=None) -> o` is called at most once in a branch.
    enter: (tokens, context) -> tokens, run once before the first block of the stage.
    """

    name: str
    depth: int
    block: Any
    branches: tuple[str, ...]
    enter: Callable[[Tokens, Context], Tokens] = lambda tokens, context: tokens


class Model(NamedTuple):
    """A network as data: pure functions over one plain dict of parameters.

    init(key) -> params; embed(params, x, model_time, cond) -> (tokens, context);
    head(params, tokens, context) -> output [B, ..., C] (or 2C with `learn_sigma`);
    null(cond) -> the condition of the unconditional half, of the same structure.
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


class Where(NamedTuple):
    """The place of one branch: static stage and branch names, the (traced) layer index and the stage's depth."""

    stage: str
    branch: str
    layer: Array
    depth: int


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


class AttentionSpec(NamedTuple):
    """Shapes of one branch's attention call: ShapeDtypeStructs of q [B, T, H, K], k and v [B, S, H, K], segments."""

    q: Any
    k: Any
    v: Any
    segments: Segments | None


class Attention(NamedTuple):
    """How the blocks attend, with what is remembered per layer from one evaluation to the next.

    init(spec: AttentionSpec) -> state of one layer's call. Raises NotImplementedError to say "not me".
    apply(q, k, v, segments, where, row, state) -> (o, state): o [B, T, H, K] in the dtype of q; `row` is None outside
        of sampling. Raises NotImplementedError, at trace time, with what it cannot do.
    """

    init: Callable[[AttentionSpec], State]
    apply: Callable[..., tuple[jax.Array, State]]


class TrunkSpec(NamedTuple):
    """What an accelerator may allocate for: per stage its depth, and per branch the update's ShapeDtypeStruct
    and its `AttentionSpec` (None: the branch does not attend)."""

    depth: dict[str, int]
    update: dict[str, dict[str, Any]]
    attention: dict[str, dict[str, AttentionSpec | None]]
    tokens: Any


class Accelerator(NamedTuple):
    """What may be computed or filled in the stack of blocks, and what is remembered for it.

    The runner's memory is {"trunk": pytree, "branch": {stage: {branch: pytree with leading [depth]}}, "attention":
    the same for `Attention`}.

    init(spec) -> the first two.
    trunk(run, tokens, context, memory, row) -> (tokens, memory, computed): wraps the run of all blocks,
        `run(tokens, memory)` -> (tokens, memory, computed).
    branch(compute, where, state, inner, row) -> (update, state, inner, computed): wraps one residual branch of one
        block. `compute(inner)` -> (update before the gate, inner), where `inner` is what the branch's attention
        remembers: handed through, unchanged where nothing is computed. `computed` is a float32 scalar, the
        fraction really computed.
    """

    init: Callable[[TrunkSpec], State]
    trunk: Callable[..., tuple[Tokens, State, Any]]
    branch: Callable[..., tuple[Any, State, State, jax.Array]]


class Trace(NamedTuple):
    """What a run really did, per evaluation: the source of every cost that difax reports.

    computed: {stage: float32 [E, L, branches]} fraction of the branch computed, over the halves that ran.
    halves: float32 [E], copies of the batch that went through the network (1 unguided, 2 with guidance).
    """

    computed: dict[str, jax.Array]
    halves: jax.Array
