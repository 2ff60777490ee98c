"""What a compiled program moves between devices and multiplies, from XLA's optimised text, loops multiplied out.

XLA's own cost analysis counts a loop's body once, and knows no collectives. Its text says how often most loops run: as
`known_trip_count` (CPU, GPU), or in the constant that the condition compares a counter with (TPU). A loop of which
neither tells is counted once and reported.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

COLLECTIVES = (
    "all-gather", "all-reduce", "all-to-all", "collective-broadcast", "collective-permute", "ragged-all-to-all",
    "reduce-scatter",
)  # fmt: skip


class Instruction(NamedTuple):
    """One line: its name, the text of its result's type, opcode, names of its operands, and the rest of the line."""

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    rest: str
    root: bool


class Module(NamedTuple):
    """The computations of a program {name: {instruction's name: instruction}}, that it starts with, and its devices."""

    computations: dict[str, dict[str, Instruction]]
    entry: str
    devices: int


class Moved(NamedTuple):
    """One kind of collective in a run of a program: times each device takes part, bytes of what it takes part with
    (of an all-gather the whole, of the others its own), and bytes that leave it over its links."""

    times: float
    bytes: float
    sent: float


def parse(text: str) -> Module:
    """Reads the text of a compiled program (`compiled.as_text()`).

    Raises:
      ValueError: no program with an entry.
    """
    computations: dict[str, dict[str, Instruction]] = {}
    entry, into = "", None
    head = re.match(r"HloModule.*", text)
    sizes = [int(n) for n in re.findall(r"(?:num_partitions|replica_count)=(\d+)", head[0] if head else "")]
    for line in text.splitlines():
        if line.startswith((" ", "\t")):
            found = _instruction(line) if into is not None else None
            if found is not None and into is not None:
                into[found.name] = found
        elif line.rstrip().endswith("{") and not line.startswith("HloModule"):
            name = re.match(r"(ENTRY\s+)?%?([\w.\-]+)", line)
            if name:
                into = computations.setdefault(name[2], {})
                entry = name[2] if name[1] else entry
        elif line.startswith("}"):
            into = None
    if entry not in computations:
        raise ValueError("the text of a compiled program has no entry")
    return Module(computations, entry, math.prod(sizes))


def _instruction(line: str) -> Instruction | None:
    named = re.match(r"\s+(ROOT\s+)?%?([\w.\-]+) = ", line)
    if not named:
        return None
    rest = line[named.end() :]
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.find(" ")
    kind, rest = rest[:end], rest[end:].lstrip()
    opcode = re.match(r"([\w\-]+)\(", rest)
    if not opcode:
        return None
    close = _closing(rest, opcode.end() - 1)
    inside = rest[opcode.end() : close]
    operands = re.findall(r"%([\w.\-]+)", inside) or re.findall(r"(?:^|, )([\w.\-]+)(?=,|$)", inside)
    return Instruction(named[2], kind, opcode[1], tuple(operands), rest[opcode.end() - 1 :], bool(named[1]))


def _closing(text: str, start: int) -> int:
    """Where the bracket that opens at `start` is closed."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i
    return len(text)


def size(kind: str) -> float:
    """Bytes of a type as the text states it, a tuple being the sum of its parts; without what a layout pads."""
    total = 0.0
    for name, dims in re.findall(r"([a-z]\w*)\[([\d,<=\s]*)\]", kind):
        bits = 8 if name == "pred" else int((re.findall(r"\d+", name) or ["0"])[0])
        total += bits / 8 * math.prod(int(d.strip(" <=")) for d in dims.split(",") if d.strip(" <="))
    return total


def _dims(kind: str) -> list[int]:
    found = re.search(r"[a-z]\w*\[([\d,]*)\]", kind)
    return [int(d) for d in found[1].split(",") if d] if found else []


# of what each branch of a conditional amounts to -> what the conditional counts as
Branches = Callable[[Sequence[Counter[str]]], Counter[str]]


def most(branches: Sequence[Counter[str]]) -> Counter[str]:
    """A conditional counts, in each figure, as its dearest branch."""
    return Counter({key: max(b[key] for b in branches) for key in set().union(*branches)})


def least(branches: Sequence[Counter[str]]) -> Counter[str]:
    """A conditional counts, in each figure, as its cheapest branch."""
    return Counter({key: min(b[key] for b in branches) for key in set().union(*branches)})


def taken(shares: Sequence[float]) -> Branches:
    """Conditionals of len(shares) branches count as so much of each; others as their dearest branch."""

    def mixed(branches: Sequence[Counter[str]]) -> Counter[str]:
        if len(branches) != len(shares):
            return most(branches)
        keys = set().union(*branches)
        return Counter({k: sum(s * b[k] for s, b in zip(shares, branches, strict=True)) for k in keys})

    return mixed


def conditionals(module: Module, branches: int) -> int:
    """How many conditionals of so many branches a program has."""
    every = [i for c in module.computations.values() for i in c.values() if i.opcode == "conditional"]
    return sum(len(_branches(i)) == branches for i in every)


def total(module: Module, figure: Callable[[Module, str, Instruction], Counter[str]], branches: Branches) -> Counter:
    """The sum of a figure over all that a run of a program executes; "loops of unknown length" counts those."""
    done: dict[str, Counter[str]] = {}

    def of(name: str) -> Counter[str]:
        if name not in done:
            done[name] = Counter()  # a computation that calls itself would be no program
            summed: Counter[str] = Counter()
            for instruction in module.computations.get(name, {}).values():
                _add(summed, figure(module, name, instruction))
                _add(summed, called(name, instruction))
            done[name] = summed
        return done[name]

    def called(name: str, instruction: Instruction) -> Counter[str]:
        if instruction.opcode == "while":
            body = of(_named(instruction, "body"))
            times = trips(module, name, instruction)
            looped = Counter({key: value * (1 if times is None else times) for key, value in body.items()})
            for key, value in of(_named(instruction, "condition")).items():  # which is asked once more than it holds
                looped[key] += value * (1 if times is None else times + 1)
            if times is None:
                looped["loops of unknown length"] += 1
            return looped
        if instruction.opcode == "conditional":
            return branches([of(branch) for branch in _branches(instruction)])
        if instruction.opcode in ("async-update", "async-done"):  # which name again what the start has counted
            return Counter()
        summed: Counter[str] = Counter()
        for inner in _callees(instruction):
            _add(summed, of(inner))
        return summed

    return of(module.entry)


def _add(into: Counter[str], more: Counter[str]) -> None:
    for key, value in more.items():
        into[key] += value


def _named(instruction: Instruction, attribute: str) -> str:
    found = re.search(rf"\b{attribute}=%?([\w.\-]+)", instruction.rest)
    return found[1] if found else ""


def _branches(instruction: Instruction) -> list[str]:
    listed = re.search(r"branch_computations=\{([^}]*)\}", instruction.rest)
    if listed:
        return [name.strip(" %") for name in listed[1].split(",")]
    return [_named(instruction, f"{which}_computation") for which in ("false", "true")]


def _callees(instruction: Instruction) -> list[str]:
    found = re.findall(r"\b(?:calls|to_apply)=%?([\w.\-]+)", instruction.rest)
    for listed in re.findall(r"\b(?:called_computations|calls)=\{([^}]*)\}", instruction.rest):
        found += [name.strip(" %") for name in listed.split(",")]
    return found


def trips(module: Module, name: str, loop: Instruction) -> int | None:
    """How often a loop runs; None where its text does not say.

    A counter that the condition holds below a constant, from the constant that it starts with and by the constant that
    the body adds; a start or a step that the text does not show are 0 and 1, as `lax.scan` has them.
    """
    told = re.search(r'known_trip_count"?\s*[:=]\s*\{"?n"?\s*[:=]\s*"?(\d+)', loop.rest)
    if told:
        return int(told[1])
    condition = module.computations.get(_named(loop, "condition"), {})
    compared = _compared(module, condition)
    if compared is None:
        return None
    index, bound, inclusive = compared
    start, step = 0, 1
    body = module.computations.get(_named(loop, "body"), {})
    if index is not None:
        here = module.computations[name]
        begun = _element(here, loop.operands[0] if loop.operands else "", index)
        start = _constant(here, begun) or 0
        root = next((i for i in body.values() if i.root), None)
        step = _step(module, body, _element(body, root.name, index)) if root else 1
    return max(-(-(bound + inclusive - start) // step), 0)


def _compared(module: Module, condition: dict[str, Instruction]) -> tuple[int | None, int, int] | None:
    """(element of the carry or None, bound, 1 if the bound is passed too) of a condition that compares a counter."""
    root = next((i for i in condition.values() if i.root), None)
    while root is not None and root.opcode in ("copy", "bitcast") and root.operands:
        root = condition.get(root.operands[0])
    outer: list[str] | None = None
    scope = condition
    if root is not None and root.opcode in ("fusion", "call"):
        outer = list(root.operands)
        scope = module.computations.get((_callees(root) or [""])[0], {})
        root = next((i for i in scope.values() if i.root), None)
    direction = re.search(r"direction=(\w+)", root.rest) if root is not None and root.opcode == "compare" else None
    if root is None or direction is None or direction[1] not in ("LT", "LE", "GT", "GE"):
        return None

    def resolved(operand: str) -> Instruction | None:
        found = scope.get(operand)
        if outer is not None and found is not None and found.opcode == "parameter":
            number = int(re.match(r"\((\d+)\)", found.rest)[1])  # type: ignore[index]
            found = condition.get(outer[number])
        while found is not None and found.opcode in ("copy", "bitcast") and found.operands:
            found = (condition if outer is not None else scope).get(found.operands[0])
        return found

    sides = [resolved(operand) for operand in root.operands[:2]]
    if direction[1] in ("GT", "GE"):  # constant > counter
        sides.reverse()
    counter, limit = (sides + [None, None])[:2]
    value = _literal(limit)
    if value is None or counter is None or counter.opcode not in ("get-tuple-element", "parameter"):
        return None
    index = re.search(r"index=(\d+)", counter.rest)
    return (int(index[1]) if index else None, value, int(direction[1] in ("LE", "GE")))


def _literal(instruction: Instruction | None) -> int | None:
    if instruction is None or instruction.opcode != "constant" or not re.match(r"[su]\d+\[\]", instruction.type):
        return None
    found = re.match(r"\((-?\d+)\)", instruction.rest)
    return int(found[1]) if found else None


def _constant(scope: dict[str, Instruction], name: str) -> int | None:
    found = scope.get(name)
    while found is not None and found.opcode in ("copy", "bitcast") and found.operands:
        found = scope.get(found.operands[0])
    return _literal(found)


def _element(scope: dict[str, Instruction], name: str, index: int) -> str:
    """The instruction that is an element of a tuple, where the tuple is put together in the same computation."""
    found = scope.get(name)
    while found is not None and found.opcode in ("copy", "bitcast", "opt-barrier") and found.operands:
        found = scope.get(found.operands[0])
    if found is None or found.opcode != "tuple" or index >= len(found.operands):
        return ""
    return found.operands[index]


def _step(module: Module, body: dict[str, Instruction], name: str) -> int:
    """What a body adds to its counter; 1 where the text does not show it."""
    found = body.get(name)
    while found is not None and found.opcode in ("copy", "bitcast") and found.operands:
        found = body.get(found.operands[0])
    if found is None:
        return 1
    scope = body
    if found.opcode in ("fusion", "call"):
        scope = module.computations.get((_callees(found) or [""])[0], {})
        found = next((i for i in scope.values() if i.root), None)
    if found is None or found.opcode != "add":
        return 1
    steps = [value for operand in found.operands if (value := _constant(scope, operand)) is not None]
    return steps[0] if len(steps) == 1 and steps[0] > 0 else 1


def collectives(module: Module, branches: Branches = most) -> tuple[dict[str, Moved], int]:
    """({kind: what a run moves}, loops of unknown length), of each device.

    Bytes sent are those of the best algorithms on a ring of the n devices of a group: all-gather (n - 1) x its part,
    reduce-scatter and all-to-all (n - 1)/n, all-reduce twice that, permute all of it.

    Args:
      module: `parse`. branches: what a conditional counts as (`most`, `least`, `taken`).
    """
    found = total(module, _moves, branches)
    kinds = [kind for kind in COLLECTIVES if found[f"{kind} count"]]
    moved = {kind: Moved(*(found[f"{kind} {what}"] for what in ("count", "bytes", "sent"))) for kind in kinds}
    return moved, int(found["loops of unknown length"])


def _moves(module: Module, name: str, instruction: Instruction) -> Counter[str]:
    kind = instruction.opcode.removesuffix("-start")
    if kind not in COLLECTIVES:
        return Counter()
    scope = module.computations[name]
    given = sum(size(scope[operand].type) for operand in instruction.operands if operand in scope)
    n = _group(instruction, module.devices)
    payload, sent = {
        "all-gather": (given * n, given * (n - 1)),
        "all-reduce": (given, 2 * given * (n - 1) / n),
        "collective-permute": (given, given),
        "collective-broadcast": (given, given),
    }.get(kind, (given, given * (n - 1) / n))
    return Counter({f"{kind} count": 1, f"{kind} bytes": payload, f"{kind} sent": sent})


def _group(instruction: Instruction, devices: int) -> int:
    """Devices of one group of a collective."""
    tiled = re.search(r"replica_groups=\[([\d,]+)\]<=", instruction.rest)
    if tiled:
        return int(tiled[1].split(",")[-1])
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", instruction.rest)
    return len(listed[1].split(",")) if listed and listed[1] else max(devices, 1)


def products(module: Module, branches: Branches = most) -> float:
    """Operations of the products that a run of the compiled program executes on each device, two a multiply-add.

    Of `dot`, `convolution` (which is what a TPU's compiler makes of products) and cuBLAS calls; not of kernels, which
    the text does not show.
    """
    return total(module, _multiplies, branches)["operations"]


def _multiplies(module: Module, name: str, instruction: Instruction) -> Counter[str]:
    scope = module.computations[name]
    sides = [_dims(scope[operand].type) for operand in instruction.operands[:2] if operand in scope]
    out = math.prod(_dims(instruction.type))
    if instruction.opcode == "dot" and len(sides) == 2:
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.rest)
        inner = [sides[0][int(i)] for i in contracted[1].split(",") if i] if contracted else []
        return Counter({"operations": 2.0 * out * math.prod(inner)})
    if instruction.opcode == "convolution" and len(sides) == 2:
        return Counter({"operations": _convolved(instruction.rest, sides[0], sides[1], _dims(instruction.type))})
    if instruction.opcode == "custom-call" and "__cublas$" in instruction.rest and len(sides) == 2:
        contracted = re.search(r'"lhs_contracting_dimensions":\["?(\d+)', instruction.rest)
        inner = sides[0][int(contracted[1])] if contracted else sides[0][-1]
        first = re.search(r"\[([\d,]*)\]", instruction.type)
        out = math.prod(int(d) for d in first[1].split(",") if d) if first else 0
        return Counter({"operations": 2.0 * out * inner})
    return Counter()


def _convolved(rest: str, image: list[int], kernel: list[int], out: list[int]) -> float:
    """Operations of a convolution: 2 x batch x features in and out x taps that fall on the image, not on padding.

    A TPU's compiler writes the batch axes of a product as axes of the window, diluted so that one tap of each counts.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", rest)
    if labels is None:
        return 0.0
    window = dict(re.findall(r"(\w+)=([\w\-]+)", (re.search(r"window=\{([^}]*)\}", rest) or ["", ""])[1]))
    each = lambda name, default: [v for v in window.get(name, "").split("x") if v] or [default] * len(image)  # noqa: E731
    strides, pads = each("stride", "1"), each("pad", "0_0")
    dilated, spread = each("lhs_dilate", "1"), each("rhs_dilate", "1")
    total = 2.0 * out[labels[3].index("b")] * out[labels[3].index("f")] * kernel[labels[2].index("i")]
    for d in range(sum(label.isdigit() for label in labels[1])):
        size_, taps, places = (
            dims[names.index(str(d))] for dims, names in zip((image, kernel, out), labels.groups(), strict=True)
        )
        at = np.arange(places)[:, None] * int(strides[d]) + np.arange(taps) * int(spread[d])
        at = at - int(pads[d].split("_")[0])
        total *= int(np.sum((at >= 0) & (at % int(dilated[d]) == 0) & (at <= (size_ - 1) * int(dilated[d]))))
    return total


def largest(module: Module, count: int = 8) -> list[tuple[str, float, str]]:
    """(type, bytes, where in the program) of the largest results that are no arguments, one a type and place.

    They are what temporaries are made of; which of them live at once, and share a buffer, only XLA knows.
    """
    found: dict[tuple[str, str], float] = {}
    inner = {callee for c in module.computations.values() for i in c.values() if i.opcode == "fusion"
             for callee in _callees(i)}  # fmt: skip
    skipped = ("parameter", "tuple", "get-tuple-element", "while", "conditional", "bitcast", "constant", "opt-barrier")
    for name, computation in module.computations.items():
        if name in inner:
            continue
        for instruction in computation.values():
            if instruction.opcode in skipped or instruction.type.startswith("("):
                continue
            place = re.search(r'op_name="([^"]*)"', instruction.rest)
            kind = re.sub(r"\{.*", "", instruction.type)
            found[kind, _place(place[1]) if place else instruction.opcode] = size(instruction.type)
    rows = sorted(((kind, bytes_, where) for (kind, where), bytes_ in found.items()), key=lambda r: -r[1])
    return rows[:count]


def _place(path: str) -> str:
    """The end of an operation's path in the program that was traced."""
    return "/".join(part for part in path.split("/")[-3:] if part)
