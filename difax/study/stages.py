"""The stages of a pipeline beside its sampler, compiled from shapes for devices that need not be there.

Each stage is planned in the ways that it can run: a text encoder block by block, as a run does it, or whole in memory;
the decoder on a whole picture or film, a latent frame at a time (as a run decodes films), or by tiles, which need less
memory. Parts are not divided by a mesh: every device does the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from difax.core.chips import Chip
from difax.core.contracts import Params
from difax.core.cost import count, moved
from difax.core.qtensor import size_in_bytes
from difax.models.autoencoders.tiles import tiled
from difax.models.encoders import encode
from difax.models.encoders.streamed import TOKENS
from difax.pipelines.parts import Decoding, Parts, Texts
from difax.study import roofline
from difax.study.lowered import compiled, lower_function

TILE = 64  # latents of a tile's side, where none is said
OVERLAP = 4  # a tile shares one part in so many of its side with the next


class Way(NamedTuple):
    """One way to run a stage.

    stage, what: its folder and what is in it. how: in words. chosen: is it what a run does. function, arguments: one
    program, and the shapes of what it is given, by name; params first. times: that it runs. kept: bytes that lie beside
    it. dtype: of its products.
    """

    stage: str
    what: str
    how: str
    chosen: bool
    function: Callable[..., Any]
    arguments: dict[str, Any]
    times: int
    kept: int
    dtype: str


def ways(parts: Parts, latents: tuple[int, ...], batch: int) -> list[Way]:
    """All ways of all stages beside the sampler, in the order in which they run; of each the run's own first.

    Args:
      latents: shape of a sample's. batch: prompts, and samples that are decoded one after another.
    """
    found = [way for texts in parts.encoders for way in _encoding(texts, batch)]
    return [*found, *_decoding(parts.decoder, latents, batch)]


def _encoding(texts: Texts, batch: int) -> list[Way]:
    encoder, params = texts.encoder, texts.params
    ids = jax.ShapeDtypeStruct((batch, texts.tokens), jnp.int32)
    layer = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), params["blocks"])
    x, context = jax.eval_shape(encoder.embed, params["ends"], ids, ids)
    numbers = [n if n >= 0 else encoder.depth + 1 + n for n in texts.wanted]
    blocks = encoder.depth if texts.pooled else max(numbers, default=0)
    table: Any = params["ends"]
    for key in TOKENS.removeprefix("ends/").split("/"):
        table = table[key]
    rows = size_in_bytes(table) // table.shape[0] * batch * texts.tokens  # of the table, those of the texts alone
    kept = size_in_bytes(params["ends"]) - size_in_bytes(table) + rows + len(numbers) * size_in_bytes(x)

    def whole(params: Params, ids: jax.Array, mask: jax.Array) -> Any:
        return encode(encoder, params, ids, mask, wanted=texts.wanted, pooled=texts.pooled)

    about = {"stage": texts.name, "what": f"{encoder.name}, {texts.tokens} tokens", "dtype": str(encoder.dtype)}
    streamed = {"params": layer, "x": x, "context": context}
    return [
        Way(
            **about, how=f"streamed, {blocks} blocks", chosen=True, function=encoder.block, arguments=streamed,
            times=blocks, kept=kept,
        ),
        Way(
            **about, how="whole in memory", chosen=False, function=whole,
            arguments={"params": params, "ids": ids, "mask": ids}, times=1, kept=0,
        ),
    ]  # fmt: skip


def _decoding(decoding: Decoding, latents: tuple[int, ...], batch: int) -> list[Way]:
    autoencoder, tile = decoding.autoencoder, decoding.tile or TILE
    made = {"whole": autoencoder}
    if decoding.chunked is not None and len(latents) == 4 and latents[0] > 1:
        made["a latent frame at a time"] = decoding.chunked
    own = list(made)[-1]
    if max(latents[-3:-1]) > tile and tile // OVERLAP:
        name = f"tiles of {tile} x {tile} latents{', a frame at a time' if len(made) > 1 else ''}"
        made[name] = tiled(made[own], tile, tile // OVERLAP)
        own = name if decoding.tile else own

    def program(decode: Callable[..., Any]) -> Callable[..., Any]:
        return lambda params, x: jnp.clip(decode(params, x), -1.0, 1.0)

    z = jax.ShapeDtypeStruct((1, *latents), jnp.float32)
    return [
        Way(
            decoding.name, autoencoder.name, how, how == own, program(one.decode),
            {"params": decoding.params, "x": z}, batch, 0, str(autoencoder.dtype),
        )
        for how, one in made.items()
    ]  # fmt: skip


def planned(
    way: Way, there: list[Any], chip: Chip, options: Mapping[str, Any], deadline: float | None = None
) -> dict[str, Any]:
    """One way compiled, as plain numbers; memory and seconds of one device.

    Args:
      there: devices. chip: what is published of them. options: of the compiler.
      deadline: by `time.perf_counter`, behind which it is counted and not compiled.
    """
    specs = tuple(way.arguments.values())
    operations = {way.dtype: way.times * count(way.function, *specs)}
    traffic = way.times * moved(way.function, *specs)
    bound = roofline.seconds(chip, operations, traffic, 0.0)
    found: dict[str, Any] = {
        "stage": way.stage,
        "what": way.what,
        "how": way.how,
        "chosen": way.chosen,
        "times": way.times,
        "operations": operations,
        "bytes": traffic,
        "seconds": None if bound is None else {**bound._asdict(), "least": bound.least, "summed": bound.summed},
        "peak": None,
        "holds": {},
        "fits": None,
        "refused": None,
        "compile_seconds": None,
    }
    if deadline is not None and time.perf_counter() > deadline:
        return {**found, "refused": "not compiled, for want of time"}
    try:
        program = compiled(None, lower_function(way.function, way.arguments, there), options)
    except (NotImplementedError, jax.errors.JaxRuntimeError) as error:
        return {**found, "refused": " ".join(str(error).split())[:200]}
    usable = program.memory.get("usable") or chip.usable or None
    peak = program.memory.get("peak")
    peak = None if peak is None else peak + way.kept
    weights = size_in_bytes(way.arguments["params"])
    fits = False if program.refused else (None if usable is None or peak is None else peak <= usable)
    holds = {"weights": weights, "activations": max((peak or 0) - weights, 0)}
    return {
        **found,
        "peak": peak,
        "holds": holds,
        "fits": fits,
        "refused": program.refused,
        "compile_seconds": round(program.seconds, 1),
    }


def whole(sampler: Mapping[str, Any], stages: list[dict[str, Any]]) -> dict[str, Any]:
    """What the pipeline takes as a run does it, from its sampler's plan and `planned` stages.

    Encoders drop their weights before the denoiser is read; a run keeps the denoiser's for the next sample, also while
    it decodes.

    Returns:
      {"peak": bytes of the largest stage by itself, "stage": which it is, "peak_kept": where the denoiser's weights lie
      beside the decoder, "fits": does that, "operations": of one device, "seconds": "least" and "summed" over the
      stages}; None for what is not known.
    """
    own = [row for row in stages if row["chosen"]]
    peaks = {row["stage"]: row["peak"] for row in own} | {"sampler": sampler["memory"].get("peak")}
    known = {name: peak for name, peak in peaks.items() if peak is not None}
    largest = max(known, key=lambda name: known[name], default=None)
    complete = len(known) == len(peaks)
    weights = sampler["holds"].get("weights", 0)
    kept = [peak + (weights if name == own[-1]["stage"] else 0) for name, peak in known.items()]
    usable, refused = sampler["memory"]["usable"], sampler["refused"] or any(row["fits"] is False for row in own)
    fits = False if refused else (max(kept) <= usable if usable and complete else None)
    bounds = [sampler["seconds"], *(row["seconds"] for row in own)]
    seconds = None
    if all(bound is not None for bound in bounds):
        seconds = {key: sum(bound[key] for bound in bounds) for key in ("least", "summed")}
    counted = [sampler["operations"], *(row["operations"] for row in own)]
    return {
        "stage": largest,
        "peak": known[largest] if largest is not None and complete else None,
        "peak_kept": max(kept) if complete else None,
        "fits": fits,
        "operations": sum(sum(each.values()) for each in counted),
        "seconds": seconds,
    }
