"""A sampler compiled for devices that need not be there, from shapes alone, and what its compiler says of it."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from difax.build import Setup, build_setup, input_shapes
from difax.core import hlo
from difax.core.placement import Axes, described, shapes_at
from difax.core.target import lowering_for, target_of
from difax.program import model_shapes

NAMES = ("params", "x", "keys", "cond", "rows", "scale")  # of the sampler's arguments


class Lowered(NamedTuple):
    """A program lowered for a mesh, and the shapes of its arguments with where each lies; names of these."""

    lowered: Any
    arguments: tuple[Any, ...]
    names: tuple[str, ...] = NAMES


def lower_function(function: Callable[..., Any], arguments: Mapping[str, Any], there: list[Any]) -> Lowered:
    """A function lowered for one device; of several, all do the same.

    Args:
      arguments: shapes by name, in order. there: devices, which need not be there.
    """
    mesh = jax.sharding.Mesh(np.asarray(there), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    shapes = tuple(shapes_at(tree, everywhere) for tree in arguments.values())
    with lowering_for(target_of(there[0])), jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return Lowered(jax.jit(function, keep_unused=True).lower(*shapes), shapes, tuple(arguments))


def lower(config: Mapping[str, Any], there: list[Any], axes: Mapping[str, int], batch: int) -> Lowered:
    """The sampler of a configuration, lowered for a mesh of devices that need not be there.

    Args:
      config: what to sample with. there: devices. axes: the section `mesh`. batch: samples.
    """
    setup = build_setup({**config, "mesh": dict(axes)}, devices=there)
    placement = setup.placement
    assert placement is not None  # it has a mesh
    groups = axes.get("data", 1) * axes.get("fsdp", 1)
    if batch % groups:
        raise ValueError(f"batch={batch} on mesh {described(Axes(**axes))}; allowed: multiples of {groups}")

    params = setup.placed_shapes(jax.eval_shape(setup.prepare, model_shapes(setup.model)))
    inputs = shapes_at(input_shapes(setup.model, batch), placement.batch())
    tables = jax.tree.map(np.asarray, setup.rows), jax.ShapeDtypeStruct((), jnp.float32)
    arguments = (params, *inputs, *shapes_at(tables, placement.sharding()))
    # some lowerings of a kernel look at the devices of the mesh that is set, and would find the host's
    with lowering_for(placement.target), jax.sharding.use_abstract_mesh(placement.mesh.abstract_mesh):
        return Lowered(setup.sampler().lower(*arguments), arguments)


class Compiled(NamedTuple):
    """What the compiler says of a program, per device: memory {what: bytes}, the largest arguments and temporaries
    [(name, bytes)], collectives as a run executes them (`hlo.Moved`; fewest: if every conditional takes its cheapest
    branch), products: operations, loops of unknown length; planned: were a
    cache's modes counted as its plan takes them; and seconds that it took. refused: its own words where the
    program does not fit into the device's memory."""

    memory: dict[str, int]
    arguments: list[tuple[str, int]]
    temporaries: list[tuple[str, int, str]]
    collectives: dict[str, hlo.Moved]
    fewest: dict[str, hlo.Moved]
    products: float
    least_products: float
    unknown: int
    planned: bool
    seconds: float
    refused: str | None = None


def compiled(setup: Setup | None, made: Lowered, options: Mapping[str, Any]) -> Compiled:
    """Compiles a lowered program and reads what it takes.

    Args:
      setup: of a sampler, whose cache's plan says how often its branches are taken; None: of another program.
    """
    start = time.perf_counter()
    arguments = largest_arguments(made)
    nothing = Compiled({}, arguments, [], {}, {}, 0.0, 0.0, 0, False, 0.0)
    try:
        program = made.lowered.compile(compiler_options=dict(options) or None)
    except Exception as error:
        text = str(error)
        if "RESOURCE_EXHAUSTED" not in text and "out of memory" not in text.lower():
            if options and ("option" in text.lower() or "flag" in text.lower()):
                raise ValueError(f"--xla: {' '.join(text.split())[:200]}") from None
            raise
        took = time.perf_counter() - start
        return nothing._replace(memory=_asked(text), temporaries=_allocations(text), refused=_first(text), seconds=took)
    memory, text = program.memory_analysis(), program.as_text()
    module = hlo.parse(text)
    likely = (None if setup is None else branches(setup, module)) or hlo.most
    moved, unknown = hlo.collectives(module, likely)
    sizes = {
        "argument": int(memory.argument_size_in_bytes),
        "output": int(memory.output_size_in_bytes),
        "temporary": int(memory.temp_size_in_bytes),
        "aliased": int(memory.alias_size_in_bytes),
    }
    sizes["peak"] = sizes["argument"] + sizes["output"] + sizes["temporary"] - sizes["aliased"]
    return Compiled(
        memory=sizes,
        arguments=arguments,
        temporaries=[(kind, int(bytes_), where) for kind, bytes_, where in hlo.largest(module)],
        collectives=moved,
        fewest=hlo.collectives(module, hlo.least)[0],
        products=hlo.products(module, likely),
        least_products=hlo.products(module, hlo.least),
        unknown=unknown,
        planned=likely is not hlo.most,
        seconds=time.perf_counter() - start,
    )


def branches(setup: Setup, module: hlo.Module) -> hlo.Branches | None:
    """What a conditional of the compiled sampler counts as where the plan of its cache tells: the one choice among as
    many as there are modes is taken as often as evaluations have each. None where there is no such one choice."""
    modes = len(setup.rows.plan.modes)
    if modes < 2 or setup.accelerator.lookup is not None or hlo.conditionals(module, modes) != 1:
        return None
    index = np.asarray(setup.rows.plan.index)
    return hlo.taken([float(np.mean(index == mode)) for mode in range(modes)])


def largest_arguments(made: Lowered, count: int = 8) -> list[tuple[str, int]]:
    """(name, bytes on each device) of the largest arguments."""
    rows = [
        (f"{name}{jax.tree_util.keystr(path)}", leaf_bytes(leaf))
        for name, tree in zip(made.names, made.arguments, strict=True)
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    ]
    return sorted(rows, key=lambda row: -row[1])[:count]


def leaf_bytes(leaf: Any) -> int:
    """Bytes of an argument on each device, without what a layout pads."""
    shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return 8 * math.prod(shape)
    return math.prod(shape) * jnp.dtype(leaf.dtype).itemsize


_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def _bytes(number: str, unit: str) -> int:
    return int(float(number) * _UNITS[unit])


def _first(text: str) -> str:
    """The first sentence of a compiler's refusal."""
    line = next((line for line in text.splitlines() if line.strip()), text)
    return " ".join(re.sub(r"^\w+: ", "", line).split())[:300]


def _asked(text: str) -> dict[str, int]:
    """{"peak": bytes that were asked for, "usable": that there are} by the words of a refusal."""
    used = re.search(r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?)", text)
    if used is None:
        used = re.search(r"\(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)", text)
    return {"peak": _bytes(used[1], used[2]), "usable": _bytes(used[3], used[4])} if used else {}


def _allocations(text: str) -> list[tuple[str, int, str]]:
    """(type, bytes, where) of the largest allocations, by the words of a refusal."""
    found = []
    for part in re.split(r"\n\s*\d+\. ", text)[1:]:
        much = re.search(r"Size: ([\d.]+)([KMGT]?)", part)
        shape, name = re.search(r"Shape: (\S+)", part), re.search(r'op_name="([^"]*)"', part)
        if much:
            kind = re.sub(r"\{.*", "", shape[1]) if shape else "unknown"
            found.append((kind, _bytes(much[1], much[2]), name[1] if name else ""))
    return found[:8]
