"""From prompts to the condition of a pipeline, by its rules (`difax.pipelines.rules`).

A prompt is cleaned, put into a template and cut into tokens (`tokenised`); the encoder runs on these; what of its
states is kept and in which shape is again the rule's (`finished`); the encoders of a pipeline are then put together
(`joined`). All of it is on the host, in numpy, as diffusers 0.42.1 has it.
"""

from __future__ import annotations

import html
import importlib
import re
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np

from difax.core.annotations import brief
from difax.pipelines.rules import PROMPTS as PROMPTS
from difax.pipelines.rules import Prompting, Rule
from difax.pipelines.rules import prompting as prompting
from difax.weights.tokenizers import Tokenizer

CLIP_LENGTH = 77  # of a tokenizer whose folder names no length


class Tokenised(NamedTuple):
    """ids, mask [B, L] int32, 0 in the mask for padding; cut: what was cut off each prompt, "" for nothing."""

    ids: np.ndarray
    mask: np.ndarray
    cut: list[str]


class Part(NamedTuple):
    """What one encoder gives: tokens [B, L, D], mask [B, L] int32, pooled [B, P]; each may be None."""

    tokens: np.ndarray | None
    mask: np.ndarray | None
    pooled: np.ndarray | None


# ---- from prompts to tokens --------------------------------------------------------------------------------


def _html(text: str) -> str:
    """Entities twice unescaped, runs of white space as one space; ftfy first where it is there, as diffusers does."""
    if find_spec("ftfy") is not None:
        text = importlib.import_module("ftfy").fix_text(text)
    return re.sub(r"\s+", " ", html.unescape(html.unescape(text)).strip()).strip()


# PixArt's longer cleaning (clean_caption, with bs4 and ftfy) is left out: diffusers does without it where these are not
# installed, as here
CLEAN: dict[str, Callable[[str], str]] = {
    "none": lambda text: text,
    "lower": lambda text: text.lower().strip(),
    "html": _html,
}


def tokenised(
    rule: Rule,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    length: int | None = None,
    *,
    negative: bool = False,
    most: int | None = None,
    multiple: int = 1,
) -> Tokenised:
    """Prompts as the ids that a pipeline gives one of its encoders.

    Args:
      prompts: [B] texts. length: max_sequence_length in place of the pipeline's own; of no account where it is fixed.
      negative: they are negative prompts. most: of tokens that the encoder has positions for.
      multiple: a batch that is padded to its longest prompt is padded on to a multiple of this, for fewer shapes.

    Returns:
      `Tokenised`: a prompt that is too long is cut as the pipeline cuts it, and what was cut off is told.

    Raises:
      ValueError: a length that is not allowed, a tokenizer that has no token to pad with, or a prompt that is no text.
    """
    head, tail = _template(rule, negative).split("{}")
    crop, kept = _crop(rule, tokenizer, head), _length(rule, tokenizer, length)
    given = crop + max(kept, rule.reads or 0)
    if most is not None:
        given = min(given, most)
    rows, cut = [], []
    for prompt in prompts:
        clean = CLEAN[rule.clean](prompt)
        text = f"{head}{clean}{tail}"
        rows.append([] if rule.empty and not prompt else tokenizer.encode(text, given))
        first, last = tokenizer.kept(text, min(given, crop + kept))
        begin, end = len(head), len(head) + len(clean)
        cut.append(text[begin : max(min(first, end), begin)] + text[max(last, begin) : end])
    width = given
    if rule.pad == "longest":
        longest = max(map(len, rows), default=0)
        width = -(-longest // multiple) * multiple
    fill = 0 if rule.empty and not any(rows) else tokenizer.pad
    if fill is None:
        if any(len(row) != width for row in rows):
            raise ValueError(f"{rule.tokenizer}: its folder names no pad_token; allowed: one that does")
        fill = 0
    ids = np.full((len(rows), width), fill, np.int32)
    mask = np.zeros((len(rows), width), np.int32)
    for i, row in enumerate(rows):
        place = slice(width - len(row), width) if (rule.side or tokenizer.side) == "left" else slice(0, len(row))
        ids[i, place], mask[i, place] = row, 1
        if rule.empty and not row:
            ids[i] = 0
    return Tokenised(ids, mask, cut)


def seen(rule: Rule, mask: np.ndarray) -> np.ndarray:
    """The mask that the encoder is given: all ones for one that does not see which tokens are padding."""
    return mask if rule.masked else np.ones_like(mask)


def _template(rule: Rule, negative: bool) -> str:
    return rule.negative if negative and rule.negative is not None else rule.template


def _crop(rule: Rule, tokenizer: Tokenizer, head: str) -> int:
    if rule.crop is not None:
        return rule.crop if head else 0
    return max(len(tokenizer.encode(head)) - 2, 0) if head else 0


def _length(rule: Rule, tokenizer: Tokenizer, length: int | None) -> int:
    """Tokens that are kept of a prompt, its template's apart."""
    if length is None or rule.fixed:
        return rule.length or tokenizer.length or CLIP_LENGTH
    if isinstance(length, bool) or not isinstance(length, int) or not 1 <= length <= (rule.limit or length):
        allowed = "1 or more" if rule.limit is None else f"1 to {rule.limit}"
        raise ValueError(f"max_sequence_length={brief(length)}; allowed: {allowed}")
    return length


# ---- from states to a condition ----------------------------------------------------------------------------


def finished(
    rule: Rule,
    states: Sequence[Any],
    mask: Any,
    pools: Mapping[str, Any] | None = None,
    length: int | None = None,
) -> Part:
    """What a pipeline keeps of an encoder's states.

    Args:
      states: [B, L, D] each, in the order of `rule.states`. mask: [B, L] of `tokenised`. pools: of `TextEncoder.pool`,
        for a rule with a pool. length: as in `tokenised`.

    Returns:
      `Part`, in the type of the states: a rule of "real" rows gives as many as the longest prompt has.

    Raises:
      ValueError: another number of states, or no pool that is asked for.
    """
    if len(states) != len(rule.states) or (rule.pool is not None and rule.pool not in (pools or {})):
        raise ValueError(
            f"{rule.encoder}: {len(states)} states and pools {sorted(pools or {})}; allowed: states "
            f"{list(rule.states)} and the pool {rule.pool}"
        )
    pooled = None if rule.pool is None or pools is None else np.asarray(pools[rule.pool])
    if not states:
        return Part(None, None, pooled)
    tokens = np.concatenate([np.asarray(state) for state in states], axis=-1)
    mask = np.asarray(mask, np.int32)
    kept = length if length is not None and not rule.fixed else rule.length
    if rule.rows == "zeroed":
        tokens = np.where(mask[..., None] > 0, tokens, np.zeros((), tokens.dtype))
    elif rule.rows == "behind":
        tokens, mask = tokens[:, rule.crop :], mask[:, rule.crop :]
    elif rule.rows == "ends" and kept is not None:
        index = np.r_[0, np.arange(tokens.shape[1] - kept + 1, tokens.shape[1])]
        tokens, mask = tokens[:, index], mask[:, index]
    elif rule.rows == "real":
        each = [rows[of > 0][rule.crop :][:kept] for rows, of in zip(tokens, mask, strict=True)]
        longest = max(map(len, each), default=0)
        tokens = np.stack([np.pad(rows, ((0, longest - len(rows)), (0, 0))) for rows in each])
        mask = np.stack([np.arange(longest) < len(rows) for rows in each]).astype(np.int32)
    return Part(tokens, mask if rule.mask else None, pooled)


def joined(
    found: Prompting,
    parts: Mapping[str, Part],
    *,
    width: int | None = None,
    length: int | None = None,
) -> dict[str, np.ndarray]:
    """The condition of a pipeline, of what its encoders give.

    Args:
      parts: by the encoder's folder. width: that the denoiser takes, which rows of encoders that are missing have.
      length: as in `tokenised`.

    Returns:
      Of tokens [B, L, D], mask [B, L], pooled [B, P], tokens_2 and mask_2 (of an encoder that goes apart), those that
      the pipeline has.

    Raises:
      ValueError: an encoder that is missing and must not be, or rows that are wider than those that go behind.
    """
    out: dict[str, np.ndarray] = {}
    for rule in found.rules:
        part = parts.get(rule.encoder)
        if part is None and not rule.missing:
            raise ValueError(f"{rule.encoder}: nothing of it; allowed: {', '.join(r.encoder for r in found.rules)}")
        if part is None:
            if rule.joins != "behind":
                continue
            before = out["tokens"]
            size = (len(before), length or rule.length or 0, width or before.shape[-1])
            part = Part(np.zeros(size, before.dtype), None, None)
        if part.tokens is not None:
            last = "_2" if rule.joins == "apart" else ""
            out[f"tokens{last}"] = _with(out.get(f"tokens{last}"), part.tokens, rule)
            if part.mask is not None:
                out[f"mask{last}"] = part.mask
        if part.pooled is not None:
            before = [out["pooled"]] if "pooled" in out else []
            out["pooled"] = np.concatenate([*before, part.pooled], axis=-1)
    return out


def _with(before: np.ndarray | None, tokens: np.ndarray, rule: Rule) -> np.ndarray:
    if before is None or rule.joins in ("first", "apart"):
        return tokens
    if rule.joins == "beside":
        return np.concatenate([before, tokens], axis=-1)
    short = tokens.shape[-1] - before.shape[-1]
    if short < 0:
        raise ValueError(
            f"{rule.encoder}: {tokens.shape[-1]} wide; allowed: {before.shape[-1]} or more, as the encoders before it"
        )
    return np.concatenate([np.pad(before, ((0, 0), (0, 0), (0, short))), tokens], axis=1)
