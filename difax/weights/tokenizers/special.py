"""What a tokenizer folder says of special tokens, as transformers 5.24 reads it."""

from __future__ import annotations

import importlib
import pathlib
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from difax.core.annotations import brief
from difax.core.files import check_object, named, parse_json, place_of, read_json, read_text

# special tokens that have names, in the order in which new ones get ids
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def library() -> Any:
    """The package `tokenizers`, which must be there (`difax.core.extras.needs`)."""
    return importlib.import_module("tokenizers")


class Config(NamedTuple):
    """said: by tokenizer_config.json and special_tokens_map.json. added: {token: id} of added_tokens.json.
    file: the first, as messages name it."""

    said: dict[str, Any]
    added: dict[str, Any]
    file: str

    def names(self, defaults: Mapping[str, str]) -> dict[str, str | None]:
        """The contents of the named special tokens; a key that is null is none, one that is missing the default's."""
        given = {key: self.said[key] if key in self.said else defaults.get(key) for key in NAMED}
        return {key: None if value is None else self.content(value, key) for key, value in given.items()}

    def content(self, value: Any, key: str) -> str:
        """What a token is, written as a text or as an object that has it."""
        found = value.get("content") if isinstance(value, Mapping) else value
        if not isinstance(found, str) or not found:
            raise ValueError(f"{self.file}: {key}={brief(value)}; allowed: a token's text")
        return str(found)

    def token(self, value: Any, key: str, **known: bool) -> Any:
        """An `AddedToken` of a text, or of an object with its content and flags."""
        of = value if isinstance(value, Mapping) else {}
        flags = {name: of[name] for name in FLAGS if name in of}
        if not all(isinstance(flag, bool) for flag in flags.values()):
            raise ValueError(f"{self.file}: {key}: {brief(flags)}; allowed: true or false for each")
        return library().AddedToken(self.content(value, key), **flags | known)

    def one_of(self, key: str, *allowed: str) -> str:
        """A key that has one of these values; the first where it is missing or null."""
        value = self.said.get(key) or allowed[0]
        if value not in allowed:
            raise ValueError(f"{self.file}: {key}={brief(value)}; allowed: {' or '.join(allowed)}")
        return str(value)


def read_config(where: pathlib.Path) -> Config:
    """tokenizer_config.json, and what the older files say where it lists no added tokens; none of them must be there.

    Raises:
      ValueError: a file that is no JSON object.
    """
    path, said = where / "tokenizer_config.json", {}
    if place_of(path) is not None:
        # transformers writes 10^30 for no limit, which is no number of a file of data
        text = re.sub(r'("model_max_length"\s*:\s*)\d{19,}', r"\1null", read_text(path, "a JSON object"))
        said = dict(check_object(parse_json(text, named(path), "a JSON object"), named(path)))
    added: dict[str, Any] = {}
    if "added_tokens_decoder" not in said:
        older, ids = where / "special_tokens_map.json", where / "added_tokens.json"
        if place_of(older) is not None:
            said |= check_object(read_json(older, "a JSON object"), named(older))
        if place_of(ids) is not None:
            added = check_object(read_json(ids, "a JSON object"), named(ids))
            for content, id in added.items():
                if isinstance(id, bool) or not isinstance(id, int) or not content:
                    raise ValueError(f"{named(ids)}: {brief(content)}: {brief(id)}; allowed: a token and its id")
    return Config(said, added, named(path))


def added_tokens(config: Config, names: Mapping[str, str | None]) -> list[Any]:
    """All tokens that are found in a text before it is cut into pieces, in the order in which they get ids.

    Args:
      names: contents of the named special tokens that are added even if the folder does not list them.
    """
    said = config.said
    given = {key: names.get(key) for key in NAMED}
    given |= {k: v for k, v in said.items() if k.endswith("_token") and isinstance(v, (str, Mapping))}
    special = [config.token(value, key, special=True) for key, value in given.items() if value is not None]
    for key in ("additional_special_tokens", "extra_special_tokens"):
        more = said.get(key) or []
        if not isinstance(more, (list, Mapping)):
            raise ValueError(f"{config.file}: {key}={brief(more)}; allowed: a list of tokens")
        values = more.values() if isinstance(more, Mapping) else more
        special += [config.token(value, key, special=True) for value in values]
    by_id: dict[int, Any] = {}
    if "added_tokens_decoder" in said:
        where = f"{config.file}: added_tokens_decoder"
        for key, value in check_object(said["added_tokens_decoder"], where).items():
            if not (key.isascii() and key.isdecimal() and len(key) < 10 and isinstance(value, Mapping)):
                raise ValueError(f"{where}: {brief(key)}: {brief(value)}; allowed: an id and a token")
            by_id[int(key)] = config.token(value, key)
    own = {token.content for token in special}
    for content, id in config.added.items():
        by_id[id] = config.token(content, content, normalized=content not in own, special=content in own)
    tokens = [by_id[id] for id in sorted(by_id)]
    seen = {token.content for token in tokens}
    return tokens + [token for token in special if token.content not in seen]
