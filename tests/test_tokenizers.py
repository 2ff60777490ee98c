"""Tokenizer folders: ids as transformers has them, whatever files are there, and one line where they are damaged."""

from __future__ import annotations

import base64
import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from difax.core import extras
from difax.weights.tokenizers import Tokenizer, open_tokenizer
from difax.weights.tokenizers.pieces import BPE, UNIGRAM, merges, read_pieces

GOLDEN = json.loads(Path(__file__).with_name("golden").joinpath("tokenizers.json").read_text(encoding="utf-8"))
CASES: dict[str, Any] = GOLDEN["cases"]
PIPELINES = Path(__file__).parents[2] / "shared" / "pipelines"
FOLDERS = sorted(p for p in PIPELINES.glob("*/tokenizer*") if p.is_dir())

library = pytest.mark.skipif(find_spec("tokenizers") is None, reason="needs the text extra (tokenizers)")


def write(folder: Path, files: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        raw = json.dumps(text) if isinstance(text, dict) else text
        raw = base64.b64decode(raw[7:]) if isinstance(raw, str) and raw.startswith("base64:") else raw
        (folder / name).write_bytes(raw.encode() if isinstance(raw, str) else raw)
    return folder


def differing(made: Tokenizer, prompts: list[str], ids: list[Any], *length: int) -> list[int]:
    """Which prompts have other ids; a prompt whose ids are None is not compared."""
    return [
        i for i, (p, want) in enumerate(zip(prompts, ids, strict=True)) if want not in (None, made.encode(p, *length))
    ]


# ---- golden folders ----------------------------------------------------------------------------------------


@library
@pytest.mark.parametrize("name", CASES)
def test_golden(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    made = open_tokenizer(write(tmp_path, case["files"]))
    assert differing(made, GOLDEN["prompts"], case["ids"]) == []
    assert differing(made, GOLDEN["prompts"], case["cut"], GOLDEN["length"]) == []
    said = {key: getattr(made, key) for key in ("pad", "bos", "eos", "side", "length")}
    assert said == {key: case[key] for key in said}


@library
def test_what_a_folder_is_called_or_says_besides(tmp_path: Path) -> None:
    """Names of classes, unknown keys and 10^30 for no limit change nothing."""
    case = CASES["qwen2"]
    config = json.loads(case["files"]["tokenizer_config.json"])
    config |= {"tokenizer_class": "LlamaTokenizerFast", "some_key": [1, {"a": None}], "chat_template": "{{ x }}"}
    files = case["files"] | {"tokenizer_config.json": config | {"model_max_length": 10**30}, "more.bin": b"\0\1"}
    made = open_tokenizer(write(tmp_path, files))
    assert differing(made, GOLDEN["prompts"], case["ids"]) == []
    assert (made.length, made.side, made.pad) == (None, "right", case["pad"])


@library
def test_a_whole_file_is_taken_first(tmp_path: Path) -> None:
    """tokenizer.json, also beside another vocabulary, with the padding and the length that it brings dropped."""
    whole = json.loads(CASES["t5, whole"]["files"]["tokenizer.json"])
    whole["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    whole["padding"] = {
        "strategy": {"Fixed": 20}, "direction": "Left", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
        "pad_token": "<pad>",
    }  # fmt: skip
    made = open_tokenizer(write(tmp_path, CASES["clip, vocabulary alone"]["files"] | {"tokenizer.json": whole}))
    assert made.kind == "t5"
    assert differing(made, GOLDEN["prompts"], CASES["t5, whole"]["ids"]) == []


@library
def test_which_letters_are_kept(tmp_path: Path) -> None:
    made = open_tokenizer(write(tmp_path, CASES["clip"]["files"]))
    text = "a photo of " * 40
    first, last = made.kept(text, 77)
    assert first == 0
    assert len(made.encode(text)) > 77 == len(made.encode(text, 77))
    assert made.encode(text[:last]) == made.encode(text, 77)
    assert made.kept("a cat", 77) == (0, 5)
    assert made.kept("a cat", 2) == (0, 0)  # both are special


@library
def test_a_prompt_that_is_no_text(tmp_path: Path) -> None:
    made = open_tokenizer(write(tmp_path, CASES["bert"]["files"]))
    with pytest.raises(ValueError, match="letter 2 is no text"):
        made.encode("a \udcff")


# ---- damage ------------------------------------------------------------------------------------------------

T5, CLIP = CASES["t5"]["files"], CASES["clip"]["files"]
SPIECE = base64.b64decode(T5["spiece.model"][7:])

DAMAGED = {
    "empty": ({}, "no tokenizer in it"),
    "half of a vocabulary": ({"vocab.json": CLIP["vocab.json"]}, "no tokenizer in it"),
    "no JSON": ({"tokenizer.json": "{"}, "tokenizer.json: no tokenizer can be made of it"),
    "another JSON": ({"tokenizer.json": '{"version": "1.0"}'}, "tokenizer.json: no tokenizer can be made"),
    "no text": ({"tokenizer.json": b"\xff\xfe"}, "tokenizer.json: byte 0 is no UTF-8 text"),
    "a config that is a list": ({**T5, "tokenizer_config.json": "[]"}, "tokenizer_config.json: a list"),
    "a pad that is a number": (
        {**T5, "tokenizer_config.json": {"pad_token": {"content": 3}}},
        "pad_token=.*a token's text",
    ),
    "a side": ({**T5, "tokenizer_config.json": {"padding_side": "top"}}, "padding_side='top'; allowed: right or left"),
    "a length": ({**T5, "tokenizer_config.json": {"model_max_length": -1}}, "model_max_length=-1; allowed: 1 or more"),
    "sentinels": ({**T5, "tokenizer_config.json": {"extra_ids": -2}}, "extra_ids=-2; allowed: a whole number"),
    "added": ({**T5, "tokenizer_config.json": {"added_tokens_decoder": {"x": {}}}}, "added_tokens_decoder: 'x'"),
    "a flag": (
        {**T5, "tokenizer_config.json": {"added_tokens_decoder": {"0": {"content": "<pad>", "special": 1}}}},
        "allowed: true or false",
    ),
    "no model": ({"spiece.model": b""}, "spiece.model: no vocabulary in it"),
    "half a model": ({"spiece.model": SPIECE[: len(SPIECE) // 2]}, "spiece.model: byte .* are left"),
    "noise": ({"spiece.model": b"\x0f" * 40}, "spiece.model: byte 0: a field of kind 7"),
    "a table that is none": (
        {"spiece.model": SPIECE + b"\x1a\x05\x12\x03abc"},
        "spiece.model: no tokenizer can be made",
    ),
    "merges of three": ({**CLIP, "merges.txt": "#version\na b c\n"}, "merges.txt: merge 1 is no pair"),
    "merges of nothing": ({**CLIP, "merges.txt": "qqq zzz\n"}, "merges.txt: no tokenizer can be made of it"),
    "ids that are none": ({**CLIP, "vocab.json": {"a</w>": "b"}}, "vocab.json: 'a</w>': 'b'"),
    "an end that is unknown": (
        {"vocab.txt": "[UNK]\n", "tokenizer_config.json": {"sep_token": None}},
        r"sep_token='\[SEP\]' is not in its vocabulary",
    ),
}


@library
@pytest.mark.parametrize("name", DAMAGED)
def test_damage_is_one_line(name: str, tmp_path: Path) -> None:
    files, message = DAMAGED[name]
    write(tmp_path, files)
    with pytest.raises(ValueError, match=message) as raised:
        open_tokenizer(tmp_path)
    assert "\n" not in str(raised.value)


@library
def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such folder; allowed: a tokenizer folder"):
        open_tokenizer(tmp_path / "there")


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extras.importlib.util, "find_spec", lambda name: None)
    monkeypatch.delitem(extras.sys.modules, "tokenizers", raising=False)
    with pytest.raises(
        ValueError, match=r"a tokenizer needs tokenizers, of the extra text: pip install 'difax\[text\]'"
    ):
        open_tokenizer(tmp_path)


# ---- the model files of SentencePiece ----------------------------------------------------------------------


def test_what_a_model_file_says(tmp_path: Path) -> None:
    write(tmp_path, {"u": CASES["umt5"]["files"]["spiece.model"], "b": CASES["gemma"]["files"]["tokenizer.model"]})
    unigram, pairs = read_pieces(tmp_path / "u"), read_pieces(tmp_path / "b")
    assert (unigram.model, unigram.unknown, unigram.begin, unigram.end) == (UNIGRAM, 2, -1, 1)
    assert unigram.pieces[:3] == ["<pad>", "</s>", "<unk>"]
    assert unigram.byte_fallback and unigram.prefix and unigram.tidy and unigram.charsmap
    assert (pairs.model, pairs.unknown, pairs.begin, pairs.end, pairs.prefix) == (BPE, 3, 2, 1, False)
    assert not pairs.tidy and not pairs.charsmap
    known = set(pairs.pieces)
    ranked = merges(pairs)
    assert ranked and all({a, b, a + b} <= known for a, b in ranked)


def test_a_model_file_that_ends_early(tmp_path: Path) -> None:
    """At every byte: whole pieces, or a ValueError that names the file."""
    for size in range(0, len(SPIECE), 37):
        (tmp_path / "m").write_bytes(SPIECE[:size])
        try:
            assert len(read_pieces(tmp_path / "m").pieces) <= 220
        except ValueError as error:
            assert str(error).startswith(str(tmp_path / "m")) and "\n" not in str(error)


# ---- folders of published kinds ----------------------------------------------------------------------------


def changed(folder: Path, into: Path, change: str) -> bool:
    """A folder with one of the changes that alter nothing; False where it has not what would be changed."""
    shutil.copytree(folder, into, copy_function=shutil.copyfile)
    into.chmod(0o755)
    path = into / "tokenizer_config.json"
    if change in ("another class", "unknown keys"):
        config = json.loads(path.read_text())
        config |= (
            {"tokenizer_class": "GPT2Tokenizer"} if change == "another class" else {"zzz": {"a": [1]}, "_zz": None}
        )
        path.write_text(json.dumps(config))
        return True
    names = {p.name for p in into.iterdir()}
    if change == "whole file gone" and {"tokenizer.json", "spiece.model"} <= names:
        (into / "tokenizer.json").unlink()
    elif change == "vocabulary gone" and "tokenizer.json" in names and "spiece.model" in names:
        (into / "spiece.model").unlink()
    elif change == "older files" and {"special_tokens_map.json"} <= names and "tokenizer.json" not in names:
        config = json.loads(path.read_text())
        added = config.pop("added_tokens_decoder")
        path.write_text(json.dumps(config))
        (into / "added_tokens.json").write_text(json.dumps({t["content"]: int(i) for i, t in added.items()}))
    else:
        return change == "none"
    return True


@library
@pytest.mark.parametrize("change", ["none", "another class", "unknown keys", "whole file gone", "vocabulary gone"])
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_folders(folder: Path, change: str, tmp_path: Path) -> None:
    said = json.loads((folder.parent / "tokens.json").read_text())
    want, prompts = said[folder.name], said["prompts"]
    if not changed(folder, tmp_path / "t", change):
        pytest.skip("nothing to change")
    made = open_tokenizer(tmp_path / "t")
    assert differing(made, prompts, want["ids"]) == []
    assert (made.pad, made.side, made.length) == (want["pad_id"], want["padding_side"], want["max_length"])
