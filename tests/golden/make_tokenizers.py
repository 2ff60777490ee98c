"""Writes tokenizers.json: tiny tokenizer folders of every kind, and what transformers makes of fourteen texts.

Each case is {"files": {name: text, or "base64:..."}, "ids": of each prompt with special tokens, "cut": the same of at
most 9 tokens, null for what is not compared, "pad", "bos", "eos": ids or null, "side", "length"}.
Vocabularies are trained here on the text of this
script. What is not in a folder (a class's own defaults) is found out by leaving files away.

Needs tokenizers 0.23, transformers 5.24, sentencepiece 0.2 and protobuf:

  python -m tests.golden.make_tokenizers
"""

from __future__ import annotations

import base64
import io
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

PROMPTS = [
    "",
    " ",
    "a",
    "A photo of a red fox, jumping over 3 logs at dawn!",
    "blurry, low quality",
    "  two  spaces,\ttab\nand newline \r\n ",
    "UPPER lower MiXeD don't won't it's WE'LL",
    "digits 1234567890 and 3.14159, 50%",
    "naïve café Ünïcödé — “quotes” … ﬁ ½ ² e\u0301",
    "emoji 🦊 and 漢字 かな 한국어 русский العربية",
    "punctuation!!! ??? --- ((())) [x] {y} <z> / \\ | ~ ` @ # $ ^ & * _ + =",
    "<|endoftext|> <pad></s> <extra_id_0> <|im_start|>user [MASK] <unk> <s><bos>hi <think>",
    "supercalifragilisticexpialidocious " * 3,
    "long " + "the quick brown fox jumps over the lazy dog " * 12,
]
LENGTH = 9
MORE = [
    "tiny folders of every kind, and what others make of fourteen texts with them",
    "vocabularies are trained here, on the text of this script and on nothing else",
    "what stands in no folder is found out by leaving files away: the defaults of a class",
]
CORPUS = [*PROMPTS[3:], "a photo of a cat", "the red fox jumps over the lazy dog at dawn", *MORE] * 3


def token(content: str, **flags: bool) -> dict[str, Any]:
    known = dict(lstrip=False, normalized=False, rstrip=False, single_word=False, special=True)
    return {"content": content, **known, **flags}


def byte_pairs(suffix: str, tokens: int, clip: bool) -> tuple[dict[str, int], list[str]]:
    """A trained vocabulary of bytes, and its merges as the lines of merges.txt."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

    end = {"end_of_word_suffix": suffix} if suffix else {}
    made = Tokenizer(models.BPE(**end))
    if clip:
        made.normalizer = normalizers.Lowercase()
        words = pre_tokenizers.Split(Regex(r"\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"), "removed", invert=True)
    else:
        words = pre_tokenizers.Split(Regex(r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+"), "isolated")
    made.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(False, use_regex=False)])
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=tokens, initial_alphabet=letters, show_progress=False, **end)
    made.train_from_iterator(CORPUS, trainer)
    model = json.loads(made.to_str())["model"]
    merges = [" ".join(m) if isinstance(m, list) else m for m in model["merges"]]
    parts = {p for m in merges for p in (*m.split(" "), m.replace(" ", ""))}
    every = letters + [c + suffix for c in letters] * bool(suffix)
    order = every + [p for p in (m.replace(" ", "") for m in merges) if p not in every]
    missing = sorted(parts - set(order))
    return {p: i for i, p in enumerate(dict.fromkeys([*order, *missing]))}, merges


def pieces(kind: str, tokens: int, **settings: Any) -> bytes:
    """A SentencePiece model."""
    import sentencepiece

    with tempfile.TemporaryDirectory() as folder:
        rules = Path(folder) / "rules.tsv"  # a few letters in place of the 240 kB of NFKC
        rules.write_text("FB01\t66 69\nBD\t31 2F 32\n9\t20\nA\t20\nD\t20\n2026\t2E 2E 2E\n", encoding="utf-8")
        out = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(CORPUS),
            model_writer=out,
            model_type=kind,
            vocab_size=tokens,
            hard_vocab_limit=False,
            minloglevel=2,
            **{"normalization_rule_tsv": str(rules), **settings},
        )
    return out.getvalue()


def main() -> None:
    import transformers

    transformers.logging.set_verbosity_error()
    cases: dict[str, Any] = {}

    def case(name: str, files: dict[str, Any], load: Callable[[Path], Any]) -> None:
        shown = {}
        with tempfile.TemporaryDirectory() as folder:
            for file, content in files.items():
                raw = content
                if isinstance(content, dict):
                    raw = json.dumps(content, ensure_ascii=False)
                shown[file] = "base64:" + base64.b64encode(raw).decode() if isinstance(raw, bytes) else raw
                (Path(folder) / file).write_bytes(raw if isinstance(raw, bytes) else raw.encode())
            made = load(Path(folder))
        limit = made.model_max_length
        cases[name] = {
            "files": shown,
            "ids": [made(p).input_ids for p in PROMPTS],
            "cut": [made(p, truncation=True, max_length=LENGTH).input_ids for p in PROMPTS],
            "pad": made.pad_token_id,
            "bos": made.bos_token_id,
            "eos": made.eos_token_id,
            "side": made.padding_side,
            "length": None if limit > 10**9 else limit,
        }

    # ---- CLIP
    ids, merges = byte_pairs("</w>", 620, clip=True)
    ids |= {"<|startoftext|>": len(ids), "<|endoftext|>": len(ids) + 1}
    clip = {"vocab.json": ids, "merges.txt": "\n".join(["#version: 0.2", *merges]) + "\n"}
    names = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    ends = {str(ids[n]): token(n, normalized=True) for n in ("<|startoftext|>", "<|endoftext|>")}
    config = {"model_max_length": 77, "tokenizer_class": "CLIPTokenizer", **names}
    load = transformers.CLIPTokenizer.from_pretrained
    case(
        "clip",
        clip | {"tokenizer_config.json": config | {"added_tokens_decoder": ends, "pad_token": "<|endoftext|>"}},
        load,
    )
    bang = {"added_tokens_decoder": {"0": token("!", normalized=True)} | ends, "pad_token": "!"}
    case("clip, padded by an exclamation mark", clip | {"tokenizer_config.json": config | bang}, load)
    old = {k: {"__type": "AddedToken", **token(v, normalized=True)} for k, v in names.items()}
    for value in old.values():
        del value["special"]
    older = {k: {n: f for n, f in v.items() if n != "__type"} for k, v in old.items()}
    case(
        "clip, older files",
        clip
        | {
            "tokenizer_config.json": {"model_max_length": 77, "pad_token": "<|endoftext|>", **old},
            "special_tokens_map.json": older | {"pad_token": "<|endoftext|>"},
        },
        load,
    )
    case("clip, vocabulary alone", clip, load)

    # ---- Qwen2
    ids, merges = byte_pairs("", 420, clip=False)
    more = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    added = {n: len(ids) + i for i, n in enumerate(more)}
    qwen = {"vocab.json": ids, "merges.txt": "#version: 0.2\n" + "\n".join(merges)}
    config = {
        "add_prefix_space": False, "bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>",
        "unk_token": None, "model_max_length": 131072, "tokenizer_class": "Qwen2Tokenizer", "errors": "replace",
    }  # fmt: skip
    decoder = {str(i): token(n, special="think" not in n) for n, i in added.items()}
    load = transformers.Qwen2Tokenizer.from_pretrained
    case("qwen2", qwen | {"tokenizer_config.json": config | {"added_tokens_decoder": decoder}}, load)
    case(
        "qwen2, older files",
        qwen
        | {
            "tokenizer_config.json": config | {"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]},
            "special_tokens_map.json": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
            "added_tokens.json": added,
        },
        load,
    )

    # ---- T5 and umT5
    ids_of = dict(pad_id=0, eos_id=1, unk_id=2, bos_id=-1)
    spiece = pieces("unigram", 220, **ids_of)
    load = transformers.T5Tokenizer.from_pretrained
    case("t5, vocabulary alone", {"spiece.model": spiece}, load)
    names = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    extra = [f"<extra_id_{i}>" for i in range(100)]
    config = {"extra_ids": 100, "model_max_length": 512, "additional_special_tokens": extra, **names}
    t5 = {"spiece.model": spiece, "tokenizer_config.json": config}
    case("t5", t5, load)
    case("t5, no sentinels", {"spiece.model": spiece, "tokenizer_config.json": names | {"extra_ids": 0}}, load)
    bytes_too = pieces("unigram", 520, byte_fallback=True, **ids_of)
    case("umt5", {"spiece.model": bytes_too, "tokenizer_config.json": config}, load)
    with tempfile.TemporaryDirectory() as folder:
        for name, content in t5.items():
            raw = content if isinstance(content, bytes) else json.dumps(content).encode()
            (Path(folder) / name).write_bytes(raw)
        load(folder).save_pretrained(folder)
        whole = {n: (Path(folder) / n).read_text(encoding="utf-8") for n in ("tokenizer.json", "tokenizer_config.json")}
    case("t5, whole", whole, load)

    # ---- BERT
    words = sorted(
        {w for line in CORPUS for w in line.lower().replace(",", " ").split() if w.isascii() and w.isalpha()}
    )
    letters = sorted({c for line in CORPUS for c in line + line.lower() if not c.isspace()})
    listed = [*"[PAD] [UNK] [CLS] [SEP] [MASK]".split(), *letters, *(f"##{c}" for c in letters), *words[:150]]
    bert = {"vocab.txt": "\n".join(dict.fromkeys(listed)) + "\n"}
    load = transformers.BertTokenizer.from_pretrained
    config = {"do_lower_case": True, "model_max_length": 77, "tokenizer_class": "BertTokenizer"}
    case("bert", bert | {"tokenizer_config.json": config}, load)
    cased = {"do_lower_case": False, "tokenize_chinese_chars": False, "strip_accents": False}
    case("bert, cased", bert | {"tokenizer_config.json": cased}, load)

    # ---- byte pairs of SentencePiece: Llama 2's kind and Gemma's
    common = dict(
        byte_fallback=True,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        normalization_rule_tsv="",
    )
    llama = pieces("bpe", 460, unk_id=0, bos_id=1, eos_id=2, pad_id=-1, **common)
    config = {"add_bos_token": True, "legacy": True, "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}

    # by sentencepiece itself with one token in front, as the older classes had it
    case("llama 2", {"tokenizer.model": llama, "tokenizer_config.json": config}, lambda _: Plain(llama, "<s>", "</s>"))
    names = dict(pad_piece="<pad>", eos_piece="<eos>", bos_piece="<bos>")
    gemma = pieces("bpe", 460, pad_id=0, eos_id=1, bos_id=2, unk_id=3, add_dummy_prefix=False, **names, **common)
    config = {"add_bos_token": True, "bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    case("gemma", {"tokenizer.model": gemma, "tokenizer_config.json": config}, lambda _: Plain(gemma, "<bos>", "<eos>"))

    file = Path(__file__).with_name("tokenizers.json")
    text = json.dumps({"prompts": PROMPTS, "length": LENGTH, "cases": cases}, ensure_ascii=False, separators=(",", ":"))
    file.write_text(text + "\n", encoding="utf-8")
    print(file, len(text))


class Plain:
    """sentencepiece with a first token in front; None for texts with special tokens, which it does not look for."""

    padding_side, model_max_length = "left", 10**30  # as the classes of Llama and Gemma

    def __init__(self, model: bytes, begin: str, end: str):
        import sentencepiece

        self.model = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.bos_token_id, self.eos_token_id = map(self.model.piece_to_id, (begin, end))
        pad = self.model.pad_id()
        self.pad_token_id = None if pad < 0 else pad

    def __call__(self, text: str, truncation: bool = False, max_length: int | None = None) -> Any:
        ids = [self.bos_token_id, *self.model.encode(text)][: max_length if truncation else None]
        self.input_ids = None if "<s>" in text else ids
        return self


if __name__ == "__main__":
    main()
