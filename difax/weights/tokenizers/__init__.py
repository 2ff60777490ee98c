"""Tokenizer folders of published checkpoints, opened by what is in them, with the library `tokenizers` (extra text).

tokenizer.json is taken as it is, whatever class the folder names; else spiece.model or tokenizer.model (SentencePiece:
T5's kind, Llama's kind), else vocab.json with merges.txt (CLIP's kind, whose words end in "</w>", or Qwen2's), else
vocab.txt (BERT's kind). Which tokens are special is said by tokenizer_config.json, and where that has no
added_tokens_decoder by special_tokens_map.json and added_tokens.json, as transformers 5.24 reads them.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

from difax.core.annotations import brief
from difax.core.extras import needs
from difax.core.files import named, place_of
from difax.weights.tokenizers.special import Config, added_tokens, library, read_config
from difax.weights.tokenizers.vocabularies import ends, of_library, vocabulary


class Tokenizer(NamedTuple):
    """A text as ids of tokens, and what its folder says of them.

    encode(text, length=None) -> ids, special tokens among them, of `length` at most;
    kept(text, length) -> (from, to): the letters of the text that those ids are of.
    pad, bos, eos: ids, None for none. side: "right" or "left", where padding goes. length: of the longest text, None
    where the folder names no limit. size: of the vocabulary. kind: "clip", "t5", "qwen2", "bert" or "llama".
    """

    encode: Callable[..., list[int]]
    kept: Callable[[str, int], tuple[int, int]]
    pad: int | None
    bos: int | None
    eos: int | None
    side: str
    length: int | None
    size: int
    kind: str


def open_tokenizer(folder: str | os.PathLike) -> Tokenizer:
    """Opens a tokenizer folder of a published checkpoint.

    Args:
      folder: with tokenizer.json, or a vocabulary (module text), and the files that name its special tokens.

    Returns:
      A `Tokenizer` whose ids are those of transformers 5.24. Where the folder does not say so, padding goes left of
      byte pairs with byte fallback, as the classes of Llama and Gemma have it, and right of all else: by what is in the
      folder, since names of classes are not reliable (transformers takes a folder of Llama 3's kind that calls
      itself LlamaTokenizer for another).

    Raises:
      ValueError: the package `tokenizers` is missing (names the extra); no such folder or no vocabulary in it; a file
        that is damaged or too large.
    """
    needs("a tokenizer", "tokenizers")
    where = pathlib.Path(folder)
    if place_of(where) != "folder":
        raise ValueError(f"{named(where)}: no such folder; allowed: a tokenizer folder")
    config = read_config(where)
    found = vocabulary(where, config.said)
    made, names = found.made, config.names(found.names)
    for token in added_tokens(config, {} if found.whole else names):
        made.add_tokens([token])
    if not found.whole:
        if found.kind == "qwen2":  # its class adds its special tokens once more, as such
            again = [library().AddedToken(content, special=True) for content in names.values() if content]
            made.add_tokens(again)
        made.post_processor = ends(where, found, config.said, names)
    made.no_truncation()
    made.no_padding()
    made.encode_special_tokens = config.said.get("split_special_tokens") is True
    ids = {key: made.token_to_id(content) for key, content in names.items() if content}
    encode, kept = _functions(where, made, config.one_of("truncation_side", "right", "left"))
    return Tokenizer(
        encode,
        kept,
        pad=ids.get("pad_token"),
        bos=ids.get("bos_token"),
        eos=ids.get("eos_token"),
        side=config.one_of("padding_side", *(("left", "right") if found.kind == "llama" else ("right", "left"))),
        length=_length(config),
        size=made.get_vocab_size(),
        kind=found.kind,
    )


def _functions(
    where: pathlib.Path, made: Any, direction: str
) -> tuple[Callable[..., list[int]], Callable[[str, int], tuple[int, int]]]:
    special = made.num_special_tokens_to_add(False)

    def content(text: str, length: int | None) -> Any:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"a prompt whose letter {error.start} is no text; allowed: UTF-8") from None
        found = of_library(where, lambda: made.encode(text, add_special_tokens=False))
        if length is not None:
            found.truncate(max(length - special, 0), direction=direction)
        return found

    def encode(text: str, length: int | None = None) -> list[int]:
        found = content(text, length)
        # a token around the text that the vocabulary does not have is found here alone
        return of_library(where, lambda: made.post_process(found).ids)

    def kept(text: str, length: int) -> tuple[int, int]:
        places = content(text, length).offsets
        if len(places) == len(content(text, None).offsets):
            return 0, len(text)
        return (min(a for a, _ in places), max(b for _, b in places)) if places else (0, 0)

    return encode, kept


def _length(config: Config) -> int | None:
    limit = config.said.get("model_max_length")
    if limit is None:
        return None
    if isinstance(limit, bool) or not isinstance(limit, (int, float)) or limit < 1:
        raise ValueError(f"{config.file}: model_max_length={brief(limit)}; allowed: 1 or more, or null")
    return None if limit > 10**9 else int(limit)
