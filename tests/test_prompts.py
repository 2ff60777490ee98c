"""Prompts by the rules of each pipeline: ids, and what is made of the encoders' states, as diffusers has them."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from difax.pipelines.prompts import PROMPTS, Part, Rule, finished, joined, prompting, seen, tokenised
from difax.weights.tokenizers import Tokenizer, open_tokenizer
from tests.golden.make_prompts import CASES, DEPTH, NEGATIVE, pooled, projected, state
from tests.golden.make_prompts import PROMPTS as PROMPTS_OF
from tests.test_tokenizers import write

PIPELINES = Path(__file__).parents[2] / "shared" / "pipelines"
RECORDED = sorted(p.parent for p in PIPELINES.glob("*/run.npz") if (p.parent / "tokenizer").is_dir())

library = pytest.mark.skipif(find_spec("tokenizers") is None, reason="needs the text extra (tokenizers)")


def toy(side: str = "right", pad: int | None = 0, ends: bool = True, length: int | None = None) -> Tokenizer:
    """One token a letter, its code point, with 1 in front and 2 behind."""

    def encode(text: str, length: int | None = None) -> list[int]:
        room = None if length is None else max(length - 2 * ends, 0)
        ids = [ord(letter) for letter in text][:room]
        return [1, *ids, 2] if ends else ids

    def kept(text: str, length: int) -> tuple[int, int]:
        return 0, min(len(text), max(length - 2 * ends, 0))

    return Tokenizer(encode, kept, pad, 1, 2, side, length, 0x110000, "toy")


def letters(ids: np.ndarray) -> str:
    return "".join(chr(i) if i > 2 else "_<>"[i] for i in ids)


# ---- tokens ------------------------------------------------------------------------------------------------


def test_padding_and_cutting() -> None:
    rule = Rule("text_encoder", "tokenizer", length=6)
    found = tokenised(rule, toy(), ["ab", "abcdefgh", ""])
    assert [letters(row) for row in found.ids] == ["<ab>__", "<abcd>", "<>____"]
    assert found.mask.tolist() == [[1, 1, 1, 1, 0, 0], [1] * 6, [1, 1, 0, 0, 0, 0]]
    assert found.cut == ["", "efgh", ""]
    assert found.ids.dtype == found.mask.dtype == np.int32
    left = tokenised(rule, toy("left"), ["ab"])
    assert (letters(left.ids[0]), left.mask.tolist()) == ("__<ab>", [[0, 0, 1, 1, 1, 1]])
    right = tokenised(rule._replace(side="right"), toy("left"), ["ab"])  # the pipeline's word goes before the folder's
    assert letters(right.ids[0]) == "<ab>__"
    assert letters(tokenised(rule, toy(), ["abcdefgh"], 4).ids[0]) == "<ab>"
    assert letters(tokenised(rule, toy(), ["abcdefgh"], most=5).ids[0]) == "<abc>"
    assert letters(tokenised(rule._replace(fixed=True), toy(), ["abcdefgh"], 4).ids[0]) == "<abcd>"
    assert tokenised(rule._replace(length=None), toy(length=9), ["a"]).ids.shape == (1, 9)
    assert tokenised(rule._replace(length=None), toy(), ["a"]).ids.shape == (1, 77)


def test_padding_to_the_longest() -> None:
    rule = Rule("text_encoder", "tokenizer", length=6, pad="longest")
    assert [letters(row) for row in tokenised(rule, toy(), ["a", "abc"]).ids] == ["<a>__", "<abc>"]
    assert tokenised(rule, toy(), ["a", "abc"], multiple=4).ids.shape == (2, 8)
    assert tokenised(rule, toy(pad=None), ["abc", "def"]).ids.shape == (2, 5)


def test_templates_and_what_is_cut_of_the_prompt_alone() -> None:
    rule = Rule("text_encoder", "tokenizer", length=4, template="say {}!", crop=4, negative="{}")
    found = tokenised(rule, toy(ends=False), ["{abc}", "ab"])
    assert [letters(row) for row in found.ids] == ["say {abc", "say ab!_"]
    assert found.cut == ["}", ""]
    assert letters(tokenised(rule, toy(ends=False), ["ab"], negative=True).ids[0]) == "ab__"
    more = tokenised(rule._replace(reads=6), toy(ends=False), ["{abc}"])  # the encoder reads more than is kept
    assert (letters(more.ids[0]), more.cut) == ("say {abc}!", ["}"])


def test_a_template_is_as_long_as_the_tokenizer_says() -> None:
    """SANA: beside its length as many tokens as the instruction has, but for two."""
    rule = Rule("text_encoder", "tokenizer", length=5, template="say {}", crop=None, negative="{}", rows="ends")
    found = tokenised(rule, toy(), ["abcdefgh"])
    assert letters(found.ids[0]) == "<say abc>"
    assert found.cut == ["defgh"]
    part = finished(rule, [found.ids[..., None]], found.mask)
    assert part.tokens is not None
    assert letters(part.tokens[0, :, 0]) == "<abc>"
    assert tokenised(rule, toy(), ["ab"], negative=True).ids.shape == (1, 5)


def test_no_tokens_for_an_empty_prompt() -> None:
    rule = prompting("MochiPipeline", {"force_zeros_for_empty_prompt": True}).rules[0]
    found = tokenised(rule, toy(pad=7), ["", "a"], 4)
    assert found.ids.tolist() == [[0, 0, 0, 0], [1, 97, 2, 7]]
    assert found.mask.tolist() == [[0, 0, 0, 0], [1, 1, 1, 0]]
    assert tokenised(prompting("MochiPipeline").rules[0], toy(pad=7), [""], 4).ids.tolist() == [[1, 2, 7, 7]]


CLEANED = [
    ("lower", "  A Photo\n of ÄÖ ", "a photo\n of äö"),
    ("html", " a &amp;amp; b \t\n c&nbsp;", "a & b c"),
    ("none", "  A ", "  A "),
]


@pytest.mark.parametrize("clean, prompt, want", CLEANED)
def test_cleaning(clean: str, prompt: str, want: str) -> None:
    rule = Rule("text_encoder", "tokenizer", length=40, pad="longest", clean=clean)
    assert letters(tokenised(rule, toy(ends=False), [prompt]).ids[0]) == want


def test_refusals() -> None:
    rule = Rule("text_encoder", "tokenizer", length=4, limit=8)
    for length in (0, 9, True, 2.5):
        with pytest.raises(ValueError, match=f"max_sequence_length={length}; allowed: 1 to 8"):
            tokenised(rule, toy(), ["a"], length)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="tokenizer: its folder names no pad_token"):
        tokenised(rule, toy(pad=None), ["a"])
    with pytest.raises(ValueError, match=r"unknown pipeline .*did you mean FluxPipeline"):
        prompting("FluxPipline")
    with pytest.raises(ValueError, match="text_encoder: 1 states and pools .*allowed: states"):
        finished(rule._replace(states=(1, 2)), [np.zeros((1, 2, 3))], np.ones((1, 2)))
    with pytest.raises(ValueError, match="the pool pooled"):
        finished(rule._replace(states=(), pool="pooled"), [], np.ones((1, 2)))


# ---- states ------------------------------------------------------------------------------------------------


def drawn(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def test_rows() -> None:
    """Each kind of rows against the pipeline's own words for it."""
    x, mask = drawn(2, 6, 3), np.array([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]], np.int32)
    rule = Rule("text_encoder", "tokenizer", length=4, crop=2, mask=True)

    def of(rows: str, **more: Any) -> Part:
        return finished(rule._replace(rows=rows, **more), [x], mask)

    np.testing.assert_array_equal(of("all").tokens, x)
    assert of("all", mask=False).mask is None
    zeroed = np.stack([np.concatenate([x[0, :4], np.zeros((2, 3), np.float32)]), x[1]])
    np.testing.assert_array_equal(of("zeroed").tokens, zeroed)
    behind = of("behind")
    np.testing.assert_array_equal(behind.tokens, x[:, 2:])
    np.testing.assert_array_equal(behind.mask, mask[:, 2:])
    real = of("real")
    np.testing.assert_array_equal(real.tokens, np.stack([np.concatenate([x[0, 2:4], 0 * x[0, :2]]), x[1, 2:]]))
    np.testing.assert_array_equal(real.mask, [[1, 1, 0, 0], [1, 1, 1, 1]])
    cut = finished(rule._replace(rows="real"), [x], mask, length=3).tokens
    np.testing.assert_array_equal(cut, np.stack([np.concatenate([x[0, 2:4], 0 * x[0, :1]]), x[1, 2:5]]))
    np.testing.assert_array_equal(of("ends").tokens, x[:, [0, 3, 4, 5]])
    np.testing.assert_array_equal(of("ends").mask, mask[:, [0, 3, 4, 5]])
    left = finished(rule._replace(rows="real"), [x], mask[:, ::-1])
    assert left.tokens is not None
    np.testing.assert_array_equal(left.tokens[0, :2], x[0, 4:])


def test_states_side_by_side() -> None:
    """FLUX.2 klein: stacked on a new axis behind the batch, and that axis into the width."""
    rule = prompting("Flux2KleinPipeline").rules[0]
    states = [drawn(2, 5, 3 + 0 * i) + i for i in rule.states]
    want = np.stack(states, axis=1).transpose(0, 2, 1, 3).reshape(2, 5, 9)
    np.testing.assert_array_equal(finished(rule, states, np.ones((2, 5))).tokens, want)


def test_joining() -> None:
    clip, big, t5 = drawn(2, 4, 3), drawn(2, 4, 5), drawn(2, 6, 10)
    sd3 = prompting("StableDiffusion3Pipeline")
    parts = {"text_encoder": Part(clip, None, drawn(2, 3)), "text_encoder_2": Part(big, None, drawn(2, 5))}
    whole = joined(sd3, parts | {"text_encoder_3": Part(t5, None, None)})
    beside = np.pad(np.concatenate([clip, big], -1), ((0, 0), (0, 0), (0, 2)))
    np.testing.assert_array_equal(whole["tokens"], np.concatenate([beside, t5], 1))
    np.testing.assert_array_equal(whole["pooled"], np.concatenate([drawn(2, 3), drawn(2, 5)], -1))
    without = joined(sd3, parts, width=10, length=6)
    np.testing.assert_array_equal(without["tokens"], np.concatenate([beside, 0 * t5], 1))
    with pytest.raises(ValueError, match="text_encoder_3: 7 wide; allowed: 8 or more"):
        joined(sd3, parts | {"text_encoder_3": Part(drawn(2, 6, 7), None, None)})
    with pytest.raises(ValueError, match="text_encoder_2: nothing of it"):
        joined(sd3, {"text_encoder": parts["text_encoder"]})
    refiner = joined(prompting("StableDiffusionXLPipeline"), {"text_encoder_2": parts["text_encoder_2"]})
    np.testing.assert_array_equal(refiner["tokens"], big)
    bert, mt5 = Part(clip, np.ones((2, 4)), None), Part(t5, np.ones((2, 6)), None)
    apart = joined(prompting("HunyuanDiTPipeline"), {"text_encoder": bert, "text_encoder_2": mt5})
    assert {key: value.shape for key, value in apart.items()} == {
        "tokens": (2, 4, 3), "mask": (2, 4), "tokens_2": (2, 6, 10), "mask_2": (2, 6),
    }  # fmt: skip


def test_settings_of_a_folder() -> None:
    assert prompting("StableDiffusionXLPipeline").zeros
    assert not prompting("StableDiffusionXLPipeline", {"force_zeros_for_empty_prompt": False}).zeros
    assert prompting("Flux2KleinPipeline").negative == ""
    assert prompting("Flux2KleinPipeline", {"is_distilled": True, "vae": ["a", "b"]}).negative is None


def test_tables_are_sound() -> None:
    for found in PROMPTS.values():
        assert found.rules[0].joins == "first"
        for rule in found.rules:
            assert rule.template.count("{}") == 1
            assert rule.rows in ("all", "zeroed", "behind", "real", "ends") and rule.pad in ("length", "longest")
            assert rule.states or rule.pool


# ---- what diffusers makes of a batch -----------------------------------------------------------------------

GOLDEN = Path(__file__).with_name("golden")
# what encode_prompt returns, by place
TWICE = [(0, "tokens"), (0, "mask"), (1, "tokens"), (1, "mask")]
PAIR = [(0, "tokens"), (1, "tokens")]
RETURNS: dict[str, list[Any]] = {
    "FluxPipeline": [(0, "tokens"), (0, "pooled"), None],
    "StableDiffusion3Pipeline": [*PAIR, (0, "pooled"), (1, "pooled")],
    "StableDiffusionXLPipeline": [*PAIR, (0, "pooled"), (1, "pooled")],
    "PixArtAlphaPipeline": TWICE,
    "PixArtSigmaPipeline": TWICE,
    "LTXPipeline": TWICE,
    "MochiPipeline": TWICE,
    "SanaPipeline": TWICE,
    "Lumina2Pipeline": TWICE,
    "WanPipeline": PAIR,
    "WanImageToVideoPipeline": PAIR,
    "CogVideoXPipeline": PAIR,
    "StableDiffusionPipeline": PAIR,
    "ZImagePipeline": PAIR,
    "QwenImagePipeline": TWICE,
    "Flux2KleinPipeline": [(0, "tokens"), None, (1, "tokens"), None],
    "HunyuanVideoPipeline": [(0, "tokens"), (0, "pooled"), (0, "mask")],
    "HunyuanDiTPipeline": [
        *((n, f"{key}{last}") for last in ("", "_2") for key in ("tokens", "mask") for n in (0, 1)),
    ],
}


@library
@pytest.mark.parametrize("name", CASES)
def test_golden(name: str, tmp_path: Path) -> None:
    """Ids, masks and the arrays that encode_prompt returns, of three prompts and their negative ones."""
    stored = np.load(GOLDEN / "prompts.npz")
    files = json.loads((GOLDEN / "tokenizers.json").read_text(encoding="utf-8"))["cases"]
    found = prompting(name)
    tokenizers = [open_tokenizer(write(tmp_path / f"{i}", files[kind]["files"])) for i, kind in enumerate(CASES[name])]
    calls = sum(key.startswith(f"{name}/ids/text_encoder/") for key in stored.files)
    conditions = []
    for n in range(calls):
        parts = {}
        for rule, tokenizer in zip(found.rules, tokenizers, strict=True):
            made = tokenised(rule, tokenizer, (PROMPTS_OF, NEGATIVE)[n], negative=n == 1)
            np.testing.assert_array_equal(made.ids, stored[f"{name}/ids/{rule.encoder}/{n}"])
            given = f"{name}/mask/{rule.encoder}/{n}"
            assert (given in stored.files) == rule.masked
            if rule.masked:
                np.testing.assert_array_equal(made.mask, stored[given])
            assert (made.cut[2] != "") == (n == 0)
            assert made.cut[2].strip() in PROMPTS_OF[2]
            states = [state(made.ids, number % (DEPTH + 1), rule.encoder) for number in rule.states]
            pools = {"pooled": pooled(made.ids), "projected": projected(made.ids)}
            parts[rule.encoder] = finished(rule, states, made.mask, pools)
        conditions.append(joined(found, parts))
    for i, place in enumerate(RETURNS[name]):
        rows = [stored[key] for row in range(3) if (key := f"{name}/out/{i}/{row}") in stored.files]
        if place is None:
            continue
        n, key = place
        have, mask = conditions[n][key], conditions[n].get("mask")
        if rows:  # a list, of which each is as long as its prompt
            for row, of, known in zip(rows, have, mask, strict=True):
                np.testing.assert_array_equal(of[known > 0], row)
        elif f"{name}/out/{i}" in stored.files:
            np.testing.assert_array_equal(have, stored[f"{name}/out/{i}"])
        else:
            assert key == "mask" and have.all()


# ---- recorded runs -----------------------------------------------------------------------------------------

# what encode_prompt returned, by place: (positive or negative, which array)
PLACES = {
    "FluxPipeline": {"0/0": (0, "tokens"), "0/1": (0, "pooled")},
    "StableDiffusion3Pipeline": {
        "0/0": (0, "tokens"),
        "0/1": (1, "tokens"),
        "0/2": (0, "pooled"),
        "0/3": (1, "pooled"),
    },
    "PixArtSigmaPipeline": {"0/0": (0, "tokens"), "0/1": (0, "mask"), "0/2": (1, "tokens"), "0/3": (1, "mask")},
    "LTXPipeline": {"0/0": (0, "tokens"), "0/1": (0, "mask"), "0/2": (1, "tokens"), "0/3": (1, "mask")},
    "WanPipeline": {"0/0": (0, "tokens"), "0/1": (1, "tokens")},
    "CogVideoXPipeline": {"0/0": (0, "tokens"), "0/1": (1, "tokens")},
    "StableDiffusionPipeline": {"0/0": (0, "tokens"), "0/1": (1, "tokens")},
    "QwenImagePipeline": {"0/0": (0, "tokens"), "1/0": (1, "tokens")},
    "ZImagePipeline": {"0/0/0": (0, "tokens"), "0/1/0": (1, "tokens")},
    "HunyuanVideoPipeline": {"0/0": (0, "tokens"), "0/1": (0, "pooled"), "0/2": (0, "mask")},
}
POOLS = {"pooled": "pooler_output", "projected": "text_embeds"}
UNMASKED = ("QwenImagePipeline", "ZImagePipeline")  # a mask that is all ones is none there, or a list's lengths


@library
@pytest.mark.parametrize("folder", RECORDED, ids=lambda p: p.name)
def test_recorded(folder: Path) -> None:
    """Ids and masks of every encoder call, and of its outputs every array that encode_prompt returned."""
    run = json.loads((folder / "run.json").read_text())
    stored = np.load(folder / "run.npz")
    index = json.loads((folder / "model_index.json").read_text())
    found = prompting(run["pipeline"], index)

    def get(name: str) -> np.ndarray | None:
        name = run["same"].get(name, name)
        return stored[name] if name in stored.files else None

    def states(encoder: str, rule: Rule) -> list[np.ndarray]:
        config = json.loads((folder / encoder.split("/")[0] / "config.json").read_text())
        depth = config.get("num_hidden_layers", config.get("text_config", {}).get("num_hidden_layers", 0))
        of = []
        for number in rule.states:
            count = number if number >= 0 else depth + 1 + number
            last = get(f"enc/{encoder}/last_hidden_state") if number == -1 else None
            of.append(get(f"enc/{encoder}/hidden_states/{count}") if last is None else last)
        return of

    conditions, compared = [], 0
    for n, prompt in enumerate((run["call"]["prompt"], run["call"].get("negative_prompt"))):
        if prompt is None:
            continue
        parts = {}
        for rule in found.rules:
            call = f"{rule.encoder}/{n}"
            made = tokenised(rule, open_tokenizer(folder / rule.tokenizer), [prompt], negative=n == 1)
            np.testing.assert_array_equal(made.ids, get(f"enc/{call}/in/input_ids"))
            given = get(f"enc/{call}/in/attention_mask")
            assert (given is not None) == rule.masked
            if given is not None:
                np.testing.assert_array_equal(seen(rule, made.mask), given)
            assert made.cut == [""]
            pools = {key: array for key, name in POOLS.items() if (array := get(f"enc/{call}/{name}")) is not None}
            parts[rule.encoder] = finished(rule, states(call, rule), made.mask, pools)
        conditions.append(joined(found, parts))
    for place, (n, key) in PLACES[run["pipeline"]].items():
        want = get(f"embeds/{place}")
        if n < len(conditions) and want is not None:
            have = conditions[n][key]
            np.testing.assert_array_equal(have, want.reshape(have.shape))
            compared += 1
    assert compared == len(conditions) * (len(conditions[0]) - (run["pipeline"] in UNMASKED)) > 0
