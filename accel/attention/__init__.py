"""How the blocks attend, one file each, and the choice among several by what each can do."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from difax.accel.attention.block_sparse import block_sparse_attention
from difax.accel.attention.chunked import chunked
from difax.accel.attention.cudnn import cudnn
from difax.accel.attention.window import windowed
from difax.accel.attention.xla import xla
from difax.core.annotations import check_arguments, check_keys, check_value, choose
from difax.core.contracts import Attention, AttentionSpec, Level, Row, State, Where
from difax.core.target import Target, target
from difax.core.trunk import stateless


def _lifted(factory: Callable[..., Callable[..., Any]]) -> Callable[..., Attention]:
    """A factory of functions as a factory of an `Attention` that remembers nothing."""

    @functools.wraps(factory)
    def make(*args: Any, **settings: Any) -> Attention:
        return stateless(factory(*args, **settings))

    return make


# platform -> what `auto` takes the first of that does not decline
BEST: dict[str, tuple[str, ...]] = {
    "gpu": ("cudnn", "block_sparse", "chunked"),
    "tpu": ("chunked",),
    "cpu": ("chunked",),
}


def auto() -> Attention:
    """The best exact attention for the device that is compiled for, decided for each shape of call.

    GPU: cudnn, block_sparse, chunked. cuDNN's kernel is the fastest dense one (on an H100 at 4,608 tokens, 24 heads of
    128: 449 us, a full list 545 us by the Mosaic kernel and 670 us by Triton's), but takes no segments and no
    log-sum-exp; the list kernels do, in 16 bits and heads up to 128; chunked takes what is left, float32 first.
    TPU: chunked. The list kernel's schedule, as the TPU compiler writes it, promises more (88 bundles for a block that
    costs the v5e's matrix unit 64), but it has not run on a TPU yet. CPU: chunked, in 0.2 to 1.0 of the reference's
    time from 1,024 tokens on (experiments/results/attention); what is as small as one of its blocks is the reference
    itself.

    Returns:
      An `Attention`; its `chosen` names what serves each call.
    """
    names = {name for best in BEST.values() for name in best}
    made = {name: ATTENTIONS[name]() for name in sorted(names)}
    by_platform = {p: first_of({name: made[name] for name in best}) for p, best in BEST.items()}

    def mine() -> Attention:
        return by_platform[choose("platform of attend auto", target().platform, by_platform)]

    return Attention(
        init=lambda spec: mine().init(spec),
        apply=lambda *arguments: mine().apply(*arguments),
        lse=lambda *arguments: mine().lse(*arguments),
        chosen=lambda: mine().chosen(),
    )


ATTENTIONS: dict[str, Callable[..., Attention]] = {
    "xla": _lifted(xla),
    "chunked": _lifted(chunked),
    "cudnn": _lifted(cudnn),
    "window": windowed,
    "block_sparse": block_sparse_attention,
    "auto": auto,
}


def attention(
    names: str | Sequence[str],
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    factories: Mapping[str, Callable[..., Attention]] | None = None,
) -> Attention:
    """Builds the first of the named attentions that takes a call, decided for each shape of call (`first_of`).

    Args:
      names: of `ATTENTIONS`, in order of preference: "chunked", ["cudnn", "chunked"] or "cudnn,chunked".
      settings: per name its factory's arguments, such as {"window": {"radius": 128}}.
      factories: by name; None is `ATTENTIONS`.

    Returns:
      An `Attention`; where a call is declined by all of them it raises ValueError with every reason.

    Raises:
      ValueError: an unknown, missing or repeated name, or settings that a factory does not take.
    """
    check_value("attention names", names, str | Sequence[str])
    check_value("attention settings", settings, Mapping[str, Mapping[str, Any]] | None)
    given = [n.strip() for n in (names.split(",") if isinstance(names, str) else names)]
    settings, factories = settings or {}, factories or ATTENTIONS
    if not given or len(set(given)) < len(given):
        raise ValueError(f"attention names {', '.join(given) or 'none'}; allowed: each once, of {', '.join(factories)}")
    for name in given:
        choose("attention", name, factories)
    for name in settings:
        choose("attention with settings", name, given)

    def make(name: str) -> Attention:
        what, own = f"attention {name}", settings.get(name, {})
        check_keys(what, factories[name], own)
        return factories[name](**check_arguments(what, factories[name], own))

    return first_of({name: make(name) for name in given})


def first_of(choices: Mapping[str, Attention]) -> Attention:
    """The first of several attentions that does not decline, decided anew for every shape of call.

    A choice declines by NotImplementedError, from `init` or at trace time from `apply`, which is tried on shapes
    alone. Self-attention and cross-attention may so fall to different choices; `init` and `apply` agree on one call.

    Args:
      choices: name -> `Attention`, in order of preference. They may decline by shapes and dtypes, not by place.

    Returns:
      An `Attention` with the state of the chosen one, and `chosen`. A call that all decline raises ValueError with
      every reason.

    Raises:
      ValueError: no choices.
    """
    if not choices:
        raise ValueError("first_of: no choices; allowed: one or more")
    decided: dict[Any, str] = {}
    served: dict[tuple[Target, str], str] = {}  # the same by the words of a call

    def taking(spec: AttentionSpec, what: str = "apply") -> Any:
        leaves, structure = jax.tree.flatten(spec)
        key = target(), what, structure, tuple((a.shape, str(a.dtype)) for a in leaves)
        if key not in decided:
            able = {n: c for n, c in choices.items() if getattr(c, what) is not None}
            decided[key] = served[target(), spec.in_words()] = _decide(able, spec, what)
        return choices[decided[key]]

    def apply(q: jax.Array, k: jax.Array, v: jax.Array, segments: Any, where: Where, row: Any, state: State) -> Any:
        spec = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), AttentionSpec(q, k, v, segments))
        return taking(spec).apply(q, k, v, segments, where, row, state)

    def lse(q: jax.Array, k: jax.Array, v: jax.Array, segments: Any, where: Where, row: Any, state: State) -> Any:
        spec = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), AttentionSpec(q, k, v, segments))
        return taking(spec, "lse").lse(q, k, v, segments, where, row, state)

    ordered = any(choice.ordered for choice in choices.values())
    has_lse = any(choice.lse is not None for choice in choices.values())

    def chosen() -> dict[str, str]:
        mine = {call: name for (what, call), name in served.items() if what == target()}
        return {call: choices[name].chosen().get(call, name) for call, name in mine.items()}

    return Attention(lambda spec: taking(spec).init(spec), apply, lse if has_lse else None, ordered, chosen)


def _decide(choices: Mapping[str, Attention], spec: AttentionSpec, what: str) -> str:
    scalar = lambda dtype: jax.ShapeDtypeStruct((), dtype)  # noqa: E731
    f32, i32, flag = scalar(jnp.float32), scalar(jnp.int32), scalar(jnp.bool_)
    row = Row(i32, i32, f32, f32, Level(f32, f32, f32, f32), (), flag, flag)
    reasons = []
    for name, choice in choices.items():

        def call(given: AttentionSpec, layer: Any, row: Row, choice: Attention = choice) -> Any:
            return getattr(choice, what)(*given, Where("", "", layer, 1), row, choice.init(spec))

        try:
            jax.eval_shape(call, spec, i32, row)
            return name
        except NotImplementedError as reason:
            reasons.append(f"{name}: {reason}")
    raise ValueError(f"no attention takes this call ({spec.in_words()}): {'; '.join(reasons)}")
