"""The model file of SentencePiece (spiece.model, tokenizer.model), read by hand: its vocabulary and how it normalises.

A file is one message of protobuf's wire format: fields, each a key (number and wire type) and a value. Of ModelProto
(google/sentencepiece, sentencepiece_model.proto) are read the pieces (1), the trainer's settings (2) and those of the
normaliser (3); what else is there is skipped.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

from difax.core.files import named, opened

LIMIT = 64 * 2**20  # bytes of a file; the largest that is published has 5 MB
NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # kinds of a piece
UNIGRAM, BPE = 1, 2  # kinds of a model


class Pieces(NamedTuple):
    """What a model file says.

    pieces: the vocabulary in the order of ids. scores: log-probabilities, or minus the rank of a merge. kinds: of each.
    model: UNIGRAM or BPE. unknown, begin, end: ids, -1 for none. byte_fallback: are unknown letters bytes.
    charsmap: the normaliser's precompiled table, or b"". prefix: is a space put in front. tidy: are spaces at the ends,
    and all but one of a run, removed.
    """

    pieces: list[str]
    scores: list[float]
    kinds: list[int]
    model: int
    unknown: int
    begin: int
    end: int
    byte_fallback: bool
    charsmap: bytes
    prefix: bool
    tidy: bool

    def of(self, *kinds: int) -> list[str]:
        """The pieces of some kinds, in the order of ids."""
        return [piece for piece, kind in zip(self.pieces, self.kinds, strict=True) if kind in kinds]


def read_pieces(path: str | os.PathLike) -> Pieces:
    """Reads a model file of SentencePiece.

    Raises:
      ValueError: no such file, one that is damaged (names the byte), or a model that is neither Unigram nor BPE.
    """
    with opened(path, "a SentencePiece model", LIMIT) as file:
        raw = file.read(LIMIT + 1)
    try:
        return _read(raw)
    except ValueError as error:
        raise ValueError(f"{named(path)}: {error}; allowed: a SentencePiece model") from None


def _read(raw: bytes) -> Pieces:
    pieces: list[str] = []
    scores: list[float] = []
    kinds: list[int] = []
    trainer: dict[int, Any] = {}
    normaliser: dict[int, Any] = {}
    for field, value, at in _fields(raw, 0, len(raw)):
        if field == 1:
            piece = {number: of for number, of, _ in _fields(raw, *_span(value, at))}
            pieces.append(_text(raw, piece.get(1, (at, at)), at))
            scores.append(_real(raw, piece.get(2), at))
            kinds.append(_whole(piece.get(3, NORMAL), at))
        elif field in (2, 3):
            into = trainer if field == 2 else normaliser
            into.update((number, of) for number, of, _ in _fields(raw, *_span(value, at)))
    if not pieces:
        raise ValueError("no vocabulary in it")
    model = _whole(trainer.get(3, UNIGRAM), 0)
    if model not in (UNIGRAM, BPE):
        raise ValueError(f"a model of kind {model}, not {UNIGRAM} (Unigram) or {BPE} (BPE)")
    table = normaliser.get(2, (0, 0))
    unknown = [i for i, kind in enumerate(kinds) if kind == UNKNOWN]
    return Pieces(
        pieces,
        scores,
        kinds,
        model,
        unknown[0] if unknown else -1,
        *(_id(trainer.get(field, default), len(pieces)) for field, default in ((41, 1), (42, 2))),
        byte_fallback=bool(trainer.get(35, 0)),
        charsmap=raw[slice(*_span(table, 0))],
        prefix=bool(normaliser.get(3, 1)),
        tidy=bool(normaliser.get(4, 1)),
    )


def _fields(raw: bytes, begin: int, end: int) -> Iterator[tuple[int, Any, int]]:
    """(number, value, where it stands) of each field: a whole number, or (from, to) of bytes."""
    i = begin
    while i < end:
        at = i
        key, i = _varint(raw, i, end)
        wire = key & 7
        if wire == 0:
            value, i = _varint(raw, i, end)
        elif wire == 2:
            size, start = _varint(raw, i, end)
            value, i = (start, start + size), start + size
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
            value, i = (i, i + size), i + size
        else:
            raise ValueError(f"byte {at}: a field of kind {wire}, of which there is none")
        if i > end:
            raise ValueError(f"byte {at}: a field of {i - at} bytes where {end - at} are left")
        yield key >> 3, value, at


def _varint(raw: bytes, i: int, end: int) -> tuple[int, int]:
    value = shift = 0
    begin = i
    while i < end and shift < 70:
        byte = raw[i]
        i += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, i
        shift += 7
    raise ValueError(f"byte {begin}: a number that does not end")


def _span(value: Any, at: int) -> tuple[int, int]:
    if not isinstance(value, tuple):
        raise ValueError(f"byte {at}: a number where a text or a table belongs")
    return value


def _whole(value: Any, at: int) -> int:
    if not isinstance(value, int):
        raise ValueError(f"byte {at}: bytes where a number belongs")
    return value


def _id(value: Any, count: int) -> int:
    """A signed 32-bit number as an id; -1 where there is no such piece."""
    return value if isinstance(value, int) and value < count else -1


def _text(raw: bytes, span: Any, at: int) -> str:
    begin, end = _span(span, at)
    try:
        return raw[begin:end].decode()
    except UnicodeDecodeError:
        raise ValueError(f"byte {begin}: a piece that is no UTF-8 text") from None


def _real(raw: bytes, span: Any, at: int) -> float:
    if span is None:
        return 0.0
    begin, end = _span(span, at)
    value = struct.unpack("<f", raw[begin:end])[0] if end - begin == 4 else math.nan
    if not math.isfinite(value):
        raise ValueError(f"byte {begin}: a score that is no finite number")
    return value


def merges(pieces: Pieces) -> list[tuple[str, str]]:
    """The merges of a BPE model, the first first: every normal piece as two others, by its score and then its id."""
    normal = {p: (-s, i) for i, (p, s, k) in enumerate(zip(*pieces[:3], strict=True)) if k == NORMAL}
    ranked = [
        (rank, piece[:cut], piece[cut:])
        for piece, rank in normal.items()
        for cut in range(1, len(piece))
        if piece[:cut] in normal and piece[cut:] in normal
    ]
    return [(left, right) for _, left, right in sorted(ranked)]
