"""What each pipeline gives its text encoders and keeps of them: rules as data, those of diffusers 0.42.1."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from difax.core.annotations import choose
from difax.pipelines import templates


class Rule(NamedTuple):
    """What one encoder of a pipeline is given, and what is kept of its states.

    encoder, tokenizer: folders.
    length: tokens of a prompt, those of its template in front apart: the pipeline's own max_sequence_length; None: the
      tokenizer's length. limit: the greatest that may be asked for, None for any. fixed: it cannot be asked for.
    reads: tokens that the encoder is given at most, if more than are kept of them.
    pad: "length": always to the length; "longest": to the longest prompt of the batch. side: where padding goes, None:
      as the tokenizer's folder says.
    clean: what is done to a prompt, of `CLEAN`. template: with {} for the prompt; negative: that of a negative prompt,
      None for the same. crop: tokens of the template before the prompt, by the pipeline's own count; None: as many as
      the tokenizer makes of it, but for its first and the text's.
    masked: does the encoder see which tokens are padding. empty: is an empty prompt no tokens at all (ids and mask 0).
    states: which of transformers' hidden_states, side by side: 0 is embedded, -1 the last, normed; () for none.
    rows: which of them: "all"; "zeroed" behind the length; "behind": without the template's; "real": those that are
      not padding, without the template's, zeros behind; "ends": the first, and the last length - 1.
    mask: does the denoiser get which rows are padding. pool: "pooled" or "projected" (`TextEncoder.pool`), or None.
    joins: how its rows come to those of the encoders before: "first", "beside" in width, "behind" with the narrower
      ones filled up by zeros, "apart". missing: may the folder be without it: zeros of its length where it goes behind.
    """

    encoder: str
    tokenizer: str
    length: int | None = None
    limit: int | None = None
    fixed: bool = False
    reads: int | None = None
    pad: str = "length"
    side: str | None = None
    clean: str = "none"
    template: str = "{}"
    negative: str | None = None
    crop: int | None = 0
    masked: bool = False
    empty: bool = False
    states: tuple[int, ...] = (-1,)
    rows: str = "all"
    mask: bool = False
    pool: str | None = None
    joins: str = "first"
    missing: bool = False


class Prompting(NamedTuple):
    """How a pipeline makes its condition of a prompt.

    rules: in the order in which encoders are joined. negative: what stands in for a negative prompt that is not given;
    None: then there is no second evaluation. zeros: zeros stand in for the embeddings of one that is not given.
    """

    rules: tuple[Rule, ...]
    negative: str | None = ""
    zeros: bool = False


_FLUX = Prompting(
    (
        Rule("text_encoder", "tokenizer", fixed=True, states=(), pool="pooled"),
        Rule("text_encoder_2", "tokenizer_2", length=512, limit=512),
    ),
    negative=None,
)
_SD3 = Prompting(
    (
        Rule("text_encoder", "tokenizer", fixed=True, states=(-2,), pool="projected"),
        Rule("text_encoder_2", "tokenizer_2", fixed=True, states=(-2,), pool="projected", joins="beside"),
        Rule("text_encoder_3", "tokenizer_3", length=256, limit=512, joins="behind", missing=True),
    )
)
_PIXART = Rule("text_encoder", "tokenizer", length=120, clean="lower", masked=True, mask=True)
_WAN = Prompting((Rule("text_encoder", "tokenizer", length=512, clean="html", masked=True, rows="zeroed"),))
_QWEN = Prompting(
    (
        Rule(
            "text_encoder",
            "tokenizer",
            length=512,
            limit=1024,
            reads=1024,
            pad="longest",
            template=templates.QWEN_IMAGE,
            crop=templates.QWEN_IMAGE_CROP,
            masked=True,
            rows="real",
            mask=True,
        ),
    ),
    negative=None,
)
_Z_IMAGE = Prompting(
    (
        Rule(
            "text_encoder",
            "tokenizer",
            length=512,
            template=templates.QWEN3_THINKING,
            masked=True,
            states=(-2,),
            rows="real",
            mask=True,
        ),
    )
)
_KLEIN = Prompting(
    (
        Rule(
            "text_encoder",
            "tokenizer",
            length=512,
            template=templates.QWEN3_NOT_THINKING,
            masked=True,
            states=(9, 18, 27),
        ),
    )
)
_SD = Prompting((Rule("text_encoder", "tokenizer", fixed=True),))
_SDXL = Prompting(
    (
        Rule("text_encoder", "tokenizer", fixed=True, states=(-2,), missing=True),
        Rule("text_encoder_2", "tokenizer_2", fixed=True, states=(-2,), pool="projected", joins="beside"),
    ),
    zeros=True,
)
_HUNYUAN_VIDEO = Prompting(
    (
        Rule(
            "text_encoder",
            "tokenizer",
            length=256,
            template=templates.HUNYUAN_VIDEO,
            crop=templates.HUNYUAN_VIDEO_CROP,
            masked=True,
            states=(-3,),
            rows="behind",
            mask=True,
        ),
        Rule("text_encoder_2", "tokenizer_2", length=77, fixed=True, states=(), pool="pooled"),
    ),
    negative=None,
)
_T5 = Rule("text_encoder", "tokenizer", length=226)
_GEMMA = Rule("text_encoder", "tokenizer", side="right", masked=True, mask=True)
_SANA = _GEMMA._replace(length=300, clean="lower", template=templates.SANA, negative="{}", crop=None, rows="ends")
_LUMINA2 = _GEMMA._replace(length=256, limit=512, template=templates.LUMINA2, negative="{}", states=(-2,))
_HUNYUAN_DIT = Prompting(
    (
        Rule("text_encoder", "tokenizer", length=77, fixed=True, masked=True, mask=True),
        Rule("text_encoder_2", "tokenizer_2", length=256, fixed=True, masked=True, mask=True, joins="apart"),
    )
)

PROMPTS: dict[str, Prompting] = {
    "FluxPipeline": _FLUX,
    "FluxImg2ImgPipeline": _FLUX,
    "FluxInpaintPipeline": _FLUX,
    "FluxFillPipeline": _FLUX,
    "FluxKontextPipeline": _FLUX,
    "StableDiffusion3Pipeline": _SD3,
    "StableDiffusion3Img2ImgPipeline": _SD3,
    "StableDiffusion3InpaintPipeline": _SD3,
    "PixArtAlphaPipeline": Prompting((_PIXART,)),
    "PixArtSigmaPipeline": Prompting((_PIXART._replace(length=300),)),
    "WanPipeline": _WAN,
    "WanImageToVideoPipeline": _WAN,
    "QwenImagePipeline": _QWEN,
    "QwenImageImg2ImgPipeline": _QWEN,
    "QwenImageInpaintPipeline": _QWEN,
    "ZImagePipeline": _Z_IMAGE,
    "ZImageImg2ImgPipeline": _Z_IMAGE,
    "ZImageInpaintPipeline": _Z_IMAGE,
    "Flux2KleinPipeline": _KLEIN,
    "StableDiffusionPipeline": _SD,
    "StableDiffusionXLPipeline": _SDXL,
    "HunyuanVideoPipeline": _HUNYUAN_VIDEO,
    "CogVideoXPipeline": Prompting((_T5,)),
    "LTXPipeline": Prompting((_T5._replace(length=128, mask=True),)),
    "MochiPipeline": Prompting((_T5._replace(length=256, masked=True, mask=True),)),
    "SanaPipeline": Prompting((_SANA,)),
    "Lumina2Pipeline": Prompting((_LUMINA2,)),
    "HunyuanDiTPipeline": _HUNYUAN_DIT,
}


def prompting(name: str, settings: Mapping[str, Any] | None = None) -> Prompting:
    """The rules of a pipeline.

    Args:
      name: its class, as model_index.json has it.
      settings: the other entries of model_index.json; of account are `force_zeros_for_empty_prompt` (SDXL true, Mochi
        false unless it is said) and `is_distilled` (FLUX.2 klein: then there is no second evaluation).

    Raises:
      ValueError: another class (names the nearest).
    """
    found, settings = PROMPTS[choose("pipeline", name, PROMPTS)], settings or {}
    zeros = settings.get("force_zeros_for_empty_prompt")
    if name == "StableDiffusionXLPipeline":
        return found._replace(zeros=zeros is not False)
    if name == "MochiPipeline":
        return found._replace(rules=(found.rules[0]._replace(empty=zeros is True),))
    if name == "Flux2KleinPipeline" and settings.get("is_distilled") is True:
        return found._replace(negative=None)
    return found
