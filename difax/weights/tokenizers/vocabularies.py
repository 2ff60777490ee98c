"""The vocabularies of tokenizer folders, and the steps around them that their classes of transformers have."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from difax.core.annotations import brief
from difax.core.files import check_object, named, place_of, read_json, read_text, why
from difax.weights.tokenizers.pieces import BPE, CONTROL, USER, Pieces, merges, read_pieces
from difax.weights.tokenizers.special import library

# named special tokens of each kind, where the folder does not say so
DEFAULTS: dict[str, dict[str, str]] = {
    "clip": {
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
    },
    "t5": {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"},
    "qwen2": {"eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
    "bert": {
        "unk_token": "[UNK]",
        "sep_token": "[SEP]",
        "pad_token": "[PAD]",
        "cls_token": "[CLS]",
        "mask_token": "[MASK]",
    },
    "llama": {},
}

CLIP_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SENTINELS = 100  # of T5, which stand in no vocabulary, where nothing says how many


class Vocabulary(NamedTuple):
    """made: the library's tokenizer. kind: of `DEFAULTS`. names: of its special tokens, where the folder is silent.
    whole: it came with its own special tokens and what is put around a text."""

    made: Any
    kind: str
    names: dict[str, str]
    whole: bool = False


def vocabulary(where: pathlib.Path, said: Mapping[str, Any]) -> Vocabulary:
    """Opens the first of the files that a folder has.

    Args:
      said: tokenizer_config.json.

    Raises:
      ValueError: none of them, or one that is damaged.
    """
    whole = where / "tokenizer.json"
    if place_of(whole) is not None:
        text = read_text(whole, "a tokenizer.json")
        made = of_library(whole, lambda: library().Tokenizer.from_str(text))
        kind = _kind(made.model)
        return Vocabulary(made, kind, DEFAULTS[kind], whole=True)
    for model in (where / "spiece.model", where / "tokenizer.model"):
        if place_of(model) is not None:
            pieces = read_pieces(model)
            return of_library(model, lambda: (_llama if pieces.model == BPE else _t5)(pieces, said))  # noqa: B023
    words, pairs, plain = (where / name for name in ("vocab.json", "merges.txt", "vocab.txt"))
    if place_of(words) and place_of(pairs):
        ids, ranked = _read_ids(words), _read_merges(pairs)
        build = _clip if any(token.endswith("</w>") for token in ids) else _qwen2
        return of_library(pairs, lambda: build(ids, ranked, said))
    if place_of(plain):
        text = read_text(plain, "a list of tokens").replace("\r\n", "\n").replace("\r", "\n")
        lines = text.removesuffix("\n").split("\n")
        return of_library(plain, lambda: _bert({token: id for id, token in enumerate(lines)}, said))
    raise ValueError(
        f"{named(where)}: no tokenizer in it; allowed: tokenizer.json, spiece.model, tokenizer.model, vocab.json with "
        "merges.txt, or vocab.txt"
    )


def _read_ids(path: pathlib.Path) -> dict[str, int]:
    allowed = "a JSON object of tokens and ids"
    ids = check_object(read_json(path, allowed), named(path))
    for token, id in ids.items():
        if type(id) is not int or not 0 <= id < 2**31:
            raise ValueError(f"{named(path)}: {brief(token)}: {brief(id)}; allowed: {allowed}")
    return ids


def _read_merges(path: pathlib.Path) -> list[tuple[str, ...]]:
    lines = [line.removesuffix("\r") for line in read_text(path, "a list of merges").split("\n")]
    ranked = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    for number, pair in enumerate(ranked, 1):
        if len(pair) != 2:
            raise ValueError(f"{named(path)}: merge {number} is no pair; allowed: two pieces and a space between")
    return ranked


def of_library(path: pathlib.Path, make: Callable[[], Any]) -> Any:
    """What the library makes of a file; whatever it raises is a ValueError that names the file."""
    try:
        return make()
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of the library is no Exception
        raise ValueError(f"{named(path)}: no tokenizer can be made of it ({why(error)})") from None


def _kind(model: Any) -> str:
    """The kind that a whole tokenizer is of."""
    name = type(model).__name__
    if name == "BPE":
        return "clip" if model.end_of_word_suffix == "</w>" else "llama" if model.byte_fallback else "qwen2"
    return {"Unigram": "t5", "WordPiece": "bert"}.get(name, "llama")


def _unknown(kind: str, said: Mapping[str, Any]) -> str:
    value = said.get("unk_token")
    return str(value.get("content") if isinstance(value, Mapping) else value or DEFAULTS[kind]["unk_token"])


def _clip(ids: dict[str, int], ranked: list[Any], said: Mapping[str, Any]) -> Vocabulary:
    t = library()
    made = t.Tokenizer(
        t.models.BPE(
            ids, ranked, continuing_subword_prefix="", end_of_word_suffix="</w>", unk_token=_unknown("clip", said)
        )
    )
    spaces = t.normalizers.Replace(t.Regex(r"\s+"), " ")
    made.normalizer = t.normalizers.Sequence([t.normalizers.NFC(), spaces, t.normalizers.Lowercase()])
    words = t.pre_tokenizers.Split(t.Regex(CLIP_WORDS), behavior="removed", invert=True)
    made.pre_tokenizer = t.pre_tokenizers.Sequence([words, t.pre_tokenizers.ByteLevel(add_prefix_space=False)])
    return Vocabulary(made, "clip", DEFAULTS["clip"])


def _qwen2(ids: dict[str, int], ranked: list[Any], said: Mapping[str, Any]) -> Vocabulary:
    t = library()
    made = t.Tokenizer(t.models.BPE(ids, ranked, continuing_subword_prefix="", end_of_word_suffix=""))
    made.normalizer = t.normalizers.NFC()
    words = t.pre_tokenizers.Split(t.Regex(QWEN2_WORDS), behavior="isolated")
    prefix = said.get("add_prefix_space") is True
    letters = t.pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=False)
    made.pre_tokenizer = t.pre_tokenizers.Sequence([words, letters])
    return Vocabulary(made, "qwen2", DEFAULTS["qwen2"])


def _bert(ids: dict[str, int], said: Mapping[str, Any]) -> Vocabulary:
    t = library()
    accents = said.get("strip_accents")
    made = t.Tokenizer(t.models.WordPiece(ids, unk_token=_unknown("bert", said)))
    made.normalizer = t.normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=said.get("tokenize_chinese_chars") is not False,
        strip_accents=accents if isinstance(accents, bool) else None,
        lowercase=said.get("do_lower_case") is not False,
    )
    made.pre_tokenizer = t.pre_tokenizers.BertPreTokenizer()
    return Vocabulary(made, "bert", DEFAULTS["bert"])


def _t5(pieces: Pieces, said: Mapping[str, Any]) -> Vocabulary:
    """Unigram. Byte fallback is off whatever the file says, as in transformers: what is unknown is one <unk>."""
    t = library()
    have = set(pieces.pieces)
    sentinels = [name for name in _sentinels(said) if name not in have]
    scores = list(zip(pieces.pieces, pieces.scores, strict=True)) + [(name, 0.0) for name in sentinels]
    made = t.Tokenizer(t.models.Unigram(scores, unk_id=max(pieces.unknown, 0), byte_fallback=False))
    if pieces.charsmap:
        made.normalizer = t.normalizers.Precompiled(pieces.charsmap)
    spaces = t.pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=True)
    made.pre_tokenizer = t.pre_tokenizers.Sequence([t.pre_tokenizers.WhitespaceSplit(), spaces])
    for names, special in ((pieces.of(CONTROL), True), (pieces.of(USER), False), (sentinels, True)):
        made.add_tokens([t.AddedToken(name, normalized=False, special=special) for name in names])
    return Vocabulary(made, "t5", DEFAULTS["t5"])


def _sentinels(said: Mapping[str, Any]) -> list[str]:
    """<extra_id_99> ... <extra_id_0>: as many as the folder says, 100 where it does not."""
    count = said.get("extra_ids")
    if count is None:
        more = said.get("additional_special_tokens") or said.get("extra_special_tokens") or []
        count = sum("<extra_id_" in str(token) for token in more) or SENTINELS
    if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count <= 10**5:
        raise ValueError(f"extra_ids={brief(count)}; allowed: a whole number, 0 or more")
    return [f"<extra_id_{i}>" for i in range(count - 1, -1, -1)]


def _llama(pieces: Pieces, said: Mapping[str, Any]) -> Vocabulary:
    """Byte pairs of SentencePiece, as its own file says (Llama 1 and 2, Gemma)."""
    t = library()
    user = pieces.of(USER)
    ids = {"unk_token": pieces.unknown, "bos_token": pieces.begin, "eos_token": pieces.end}
    names = {key: pieces.pieces[id] for key, id in ids.items() if id >= 0}
    made = t.Tokenizer(
        t.models.BPE(
            {piece: id for id, piece in enumerate(pieces.pieces)},
            merges(pieces),
            fuse_unk=True,
            byte_fallback=pieces.byte_fallback,
            ignore_merges=bool(user),
            **({"unk_token": names["unk_token"]} if "unk_token" in names else {}),
        )
    )
    steps: list[Any] = [t.normalizers.Precompiled(pieces.charsmap)] if pieces.charsmap else []
    if pieces.tidy:
        steps += [t.normalizers.Replace(t.Regex(r"\A +| +\z"), ""), t.normalizers.Replace(t.Regex(" {2,}"), " ")]
    steps += [t.normalizers.Prepend("▁")] if pieces.prefix else []
    made.normalizer = t.normalizers.Sequence([*steps, t.normalizers.Replace(" ", "▁")])
    if user:
        pattern = "|".join(re.escape(piece) for piece in sorted(user, key=len, reverse=True))
        made.pre_tokenizer = t.pre_tokenizers.Split(t.Regex(pattern), behavior="isolated")
    made.add_tokens([t.AddedToken(piece, normalized=False, special=True) for piece in pieces.of(CONTROL)])
    return Vocabulary(made, "llama", names)


def ends(where: pathlib.Path, found: Vocabulary, said: Mapping[str, Any], names: Mapping[str, str | None]) -> Any:
    """The library's processor that puts the special tokens of a kind around a text.

    Raises:
      ValueError: one of them is not in the vocabulary.
    """
    processors = library().processors

    def special(key: str) -> tuple[str, int]:
        content = names.get(key) or found.names.get(key) or key
        id = found.made.token_to_id(content)
        if id is None:
            raise ValueError(f"{named(where)}: {key}={content!r} is not in its vocabulary; allowed: a token of it")
        return content, id

    if found.kind == "clip":
        return processors.RobertaProcessing(
            special("eos_token"), special("bos_token"), trim_offsets=False, add_prefix_space=False
        )
    if found.kind == "bert":
        before, after = "cls_token", "sep_token"
    elif found.kind == "t5":
        before, after = None, "eos_token"
    else:
        begins = said.get("add_bos_token", found.kind == "llama") is True
        before = "bos_token" if begins and names.get("bos_token") else None
        after = "eos_token" if said.get("add_eos_token") is True else None
    pairs = [special(key) for key in (before, after) if key]
    shown = {key: f"{special(key)[0]}:0" for key in (before, after) if key}
    single = [*([shown[before]] if before else []), "$A:0", *([shown[after]] if after else [])]
    return processors.TemplateProcessing(single=single, pair=[*single, "$B:1"], special_tokens=pairs)
