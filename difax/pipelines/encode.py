"""Prompts as the conditions of a denoiser, by a pipeline's tokenizers and text encoders."""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from difax.core.annotations import brief
from difax.core.contracts import Model
from difax.core.files import makeable, named, place_of, read_text
from difax.core.shell import DifaxWarning
from difax.models.encoders import find_encoder, states
from difax.pipelines.folder import Folder
from difax.pipelines.prompts import Part, Prompting, Rule, finished, joined, seen, tokenised
from difax.weights.checkpoint import load_native, save_safetensors, tensor_shapes, tensor_types
from difax.weights.tokenizers import open_tokenizer

AT_ONCE = 32  # prompts that an encoder is given at a time
MULTIPLE = 64  # of tokens, of texts that are as long as the longest prompt: fewer shapes, fewer compilations
NAMES = {"tokens": "text", "mask": "mask", "pooled": "pooled"}  # of `joined` -> leaves of a model's condition
MOST_PROMPTS, MOST_LETTERS = 100_000, 100_000


def read_prompts(path: str | os.PathLike) -> list[str]:
    """The prompts of a text file, one a line; empty lines are left out.

    Raises:
      ValueError: no such file, what is no text, or a file without prompts.
    """
    found = [line.strip() for line in read_text(path, "a text file with a prompt a line").splitlines()]
    found = [line for line in found if line]
    if not found:
        raise ValueError(f"{named(path)}: no prompts in it; allowed: one a line")
    return found


def check_prompts(prompts: Any) -> list[str]:
    """Prompts, each a text; ValueError for none, too many, or what is no text."""
    if isinstance(prompts, str) or not isinstance(prompts, Sequence) or not all(isinstance(p, str) for p in prompts):
        raise ValueError(f"prompts={brief(prompts)}; allowed: texts")
    if not 1 <= len(prompts) <= MOST_PROMPTS:
        raise ValueError(f"{len(prompts)} prompts; allowed: 1 ... {MOST_PROMPTS}")
    longest = max(map(len, prompts))
    if longest > MOST_LETTERS:
        raise ValueError(f"a prompt of {longest} letters; allowed: up to {MOST_LETTERS}")
    return list(prompts)


class Asked(NamedTuple):
    """What `encoded` is asked for beside its prompts; its arguments."""

    tokens: int | None
    width: int | None
    negative: bool
    dtype: str


def encoded(
    folder: Folder,
    prompting: Prompting,
    prompts: Sequence[str],
    *,
    tokens: int | None = None,
    negative: bool = False,
    dtype: str = "float32",
    kept: str | None = None,
    width: int | None = None,
) -> tuple[dict[str, np.ndarray], list[str]]:
    """What a pipeline makes of prompts before its denoiser: tokens [n, L, D], mask [n, L], pooled [n, P].

    One encoder after another is read, layer by layer, and dropped.

    Args:
      tokens: of the longest prompt (`max_sequence_length`). negative: are they negative ones. dtype: of the encoders.
      kept: a folder in which embeddings are kept by their prompts' hashes; those that are there are not made again.
      width: that the denoiser takes, which the rows of an encoder that the folder is without have.

    Returns:
      The arrays in float32, and what of each prompt is cut off since the encoders do not take more, "" for nothing.
    """
    how = Asked(tokens, width, negative, dtype)
    here = None if kept is None else _Kept(makeable(kept, "embeddings"), folder, prompting, how)
    places = [None if here is None else here.place(prompt) for prompt in prompts]
    rows: dict[int, tuple[dict[str, np.ndarray], str]] = {}
    for i, place in enumerate(places):
        if place is not None and place.is_file():
            rows[i] = _Kept.read(place)
    missing = [i for i in range(len(prompts)) if i not in rows]
    for start in range(0, len(missing), AT_ONCE):
        some = missing[start : start + AT_ONCE]
        # a last part of fewer prompts is filled up: another number would be compiled anew
        asked = [prompts[i] for i in some] + [prompts[some[-1]]] * (min(AT_ONCE, len(missing)) - len(some))
        arrays, cut = _encoded(folder, prompting, asked, how)
        for j, i in enumerate(some):
            rows[i] = {name: a[j] for name, a in arrays.items()}, cut[j]
            if (place := places[i]) is not None:
                _Kept.write(place, *rows[i])
    every = [rows[i][0] for i in range(len(prompts))]
    return {name: _stacked([row[name] for row in every]) for name in every[0]}, [
        rows[i][1] for i in range(len(prompts))
    ]


def _encoded(
    folder: Folder, prompting: Prompting, prompts: Sequence[str], how: Asked
) -> tuple[dict[str, np.ndarray], list[str]]:
    parts: dict[str, Part] = {}
    cut = [""] * len(prompts)
    for rule in prompting.rules:
        if rule.encoder not in folder.components and rule.missing:
            continue
        found = find_encoder(folder.component(rule.encoder), how.dtype, folder.components[rule.encoder] or None)
        tokenizer = open_tokenizer(_tokenizer_of(folder, rule))
        told = tokenised(
            rule, tokenizer, prompts, how.tokens, negative=how.negative, most=found.encoder.length, multiple=MULTIPLE
        )
        # an encoder that is cut at fewer tokens than another loses nothing that the other has not
        cut = told.cut if not parts else [min(a, b, key=len) for a, b in zip(told.cut, cut, strict=True)]
        wanted = tuple(dict.fromkeys(rule.states))
        given = states(found, told.ids, seen(rule, told.mask), wanted, rule.pool is not None)
        given = {name: np.asarray(a, np.float32) for name, a in given.items()}
        pools = {name: a for name, a in given.items() if isinstance(name, str)}
        parts[rule.encoder] = finished(rule, [given[n] for n in rule.states], told.mask, pools, how.tokens)
    return joined(prompting, parts, width=how.width, length=how.tokens), cut


def _tokenizer_of(folder: Folder, rule: Rule) -> pathlib.Path:
    """The folder of a tokenizer; of an encoder that lies elsewhere it is the one that lies beside it."""
    if rule.encoder in folder.given:
        place = pathlib.Path(folder.given[rule.encoder])
        place = place if place.is_dir() else place.parent
        for beside in (place / "tokenizer", place.parent / rule.tokenizer, place.parent / "tokenizer", place):
            if any(place_of(beside / name) for name in ("tokenizer.json", "spiece.model", "vocab.json", "vocab.txt")):
                return beside
        if rule.tokenizer not in folder.components:
            raise ValueError(f"{named(place)}: no tokenizer in or beside it; allowed: {rule.tokenizer}/ beside it")
    return folder.component(rule.tokenizer)


def _stacked(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Rows [L_i, ...] of unequal lengths as one array, zeros behind the shorter ones."""
    longest = max((row.shape[0] for row in rows if row.ndim), default=0)
    fill = lambda row: np.pad(row, ((0, longest - len(row)), *[(0, 0)] * (row.ndim - 1)))  # noqa: E731
    return np.stack([fill(row) if row.ndim else row for row in rows])


def conditions(
    model: Model,
    prompt: Mapping[str, np.ndarray],
    negative: Mapping[str, np.ndarray] | None,
    told: Mapping[str, Any],
) -> dict[str, np.ndarray]:
    """A model's condition [n] of what the encoders give.

    Args:
      prompt, negative: of `encoded`; negative [1], or None where there is no unconditional half, whose place the
        prompt's own takes.
      told: other leaves of the condition, each the same number or numbers for every sample.

    Raises:
      ValueError: encoders whose widths the model does not take.
    """
    n = len(next(iter(prompt.values())))
    negative = prompt if negative is None else {k: np.repeat(a, n, 0) for k, a in negative.items()}
    length = 0
    if "mask" in model.cond:  # both halves have one length, which is masked
        length = max(a["tokens"].shape[1] for a in (prompt, negative))
        fixed = model.cond["text"].shape[0]
        length = fixed if length == fixed else -(-length // MULTIPLE) * MULTIPLE
    found: dict[str, np.ndarray] = {}
    spec: Any
    array: Any
    for name, spec in model.cond.items():
        own = name.removeprefix("null_")
        source = next((k for k, leaf in NAMES.items() if leaf == own), None)
        if source is None:
            if name not in told:
                raise ValueError(f"{model.name}: the pipeline does not tell {name}")
            found[name] = np.broadcast_to(np.asarray(told[name], spec.dtype), (n, *spec.shape)).copy()
            continue
        array = (negative if name.startswith("null_") else prompt).get(source)
        if array is None and source == "mask":
            array = np.ones(found[name.replace("mask", "text")].shape[:2], np.int32)
        if array is None:
            raise ValueError(f"{model.name}: the encoders give no {own}; allowed: those of the pipeline's class")
        if array.shape[2:] != spec.shape[1:] or (own == "pooled" and array.shape[1:] != spec.shape):
            raise ValueError(
                f"{model.name}: the text encoders give {own} {list(array.shape[1:])}; allowed: {list(spec.shape)}"
            )
        if length and own in ("text", "mask"):
            array = np.pad(array, ((0, 0), (0, length - array.shape[1]), *[(0, 0)] * (array.ndim - 2)))
        found[name] = array.astype(spec.dtype)
    return found


def warn_of_cuts(prompts: Sequence[str], cut: Sequence[str], tokens: Any) -> None:
    for prompt, text in zip(prompts, cut, strict=True):
        if text.strip():
            warnings.warn(
                f"the prompt {brief(prompt)} is longer than {tokens} tokens; cut off: {brief(text.strip())}",
                DifaxWarning,
                stacklevel=2,
            )


class _Kept:
    """Embeddings in a folder, one file a prompt, by the hash of all that they depend on."""

    def __init__(self, place: pathlib.Path, folder: Folder, prompting: Prompting, how: Asked):
        place.mkdir(parents=True, exist_ok=True)
        self.folder = place
        of = [_identity(folder, rule) for rule in prompting.rules]
        self.key = json.dumps([folder.name, str(prompting), of, *how], sort_keys=True)

    def place(self, prompt: str) -> pathlib.Path:
        return self.folder / f"{hashlib.sha256(f'{self.key}{prompt}'.encode()).hexdigest()[:32]}.safetensors"

    @staticmethod
    def read(place: pathlib.Path) -> tuple[dict[str, np.ndarray], str]:
        shapes, types = tensor_shapes(place), tensor_types(place)
        spec = {name: jax.ShapeDtypeStruct(shape, types[name]) for name, shape in shapes.items()}
        found = {name: np.asarray(a) for name, a in load_native(place, spec).items()}
        return found, ""

    @staticmethod
    def write(place: pathlib.Path, arrays: Mapping[str, np.ndarray], cut: str) -> None:
        if not cut:  # whoever asks again is told again
            save_safetensors(place, dict(arrays))


def _identity(folder: Folder, rule: Rule) -> Any:
    """What tells whether an encoder's files are those of before: names, sizes and times."""
    if rule.encoder not in folder.components:
        return None
    places = [folder.component(rule.encoder), _tokenizer_of(folder, rule)]
    files = sorted(f for p in places for f in ([p] if p.is_file() else p.iterdir()) if f.is_file())
    return [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
