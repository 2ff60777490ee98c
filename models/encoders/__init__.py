"""Text encoders (and the picture's encoder of image-to-video), one file each. Import as `difax.models.encoders`.

found = find_encoder("FOLDER/text_encoder")
states(found, ids, mask, wanted=(-2,))[-2]        layer by layer from the file
encode(found.encoder, load(found), ids, mask)     whole in memory, to be compiled, quantised, cut among devices
"""

from __future__ import annotations

if __name__ != "difax.models.encoders":
    raise ImportError(f"import difax.models.encoders, not {__name__}: one identity per module")

import os
from pathlib import Path
from typing import Any

from difax.core.annotations import choose
from difax.models.encoders import bert_checkpoint, clip_checkpoint, decoder_checkpoint, t5_checkpoint
from difax.models.encoders.bert import bert
from difax.models.encoders.bert_checkpoint import find_bert
from difax.models.encoders.clip import ImageEncoder, clip_text, clip_vision
from difax.models.encoders.clip_checkpoint import find_clip_text, find_clip_vision
from difax.models.encoders.decoder import decoder
from difax.models.encoders.decoder_checkpoint import find_decoder
from difax.models.encoders.folder import EncoderFolder, Find
from difax.models.encoders.streamed import FoundEncoder, encode, image_states, load, states
from difax.models.encoders.t5 import t5
from difax.models.encoders.t5_checkpoint import find_t5
from difax.weights.checkpoint import tensor_shapes
from difax.weights.published import known, naming, published_file, read_description

__all__ = [
    "ENCODERS", "FoundEncoder", "ImageEncoder", "bert", "clip_text", "clip_vision", "decoder", "encode", "find_encoder",
    "image_states", "load", "states", "t5",
]  # fmt: skip

# class in model_index.json, or in an encoder's own config.json -> what finds it
ENCODERS: dict[str, Find] = {
    "CLIPTextModel": find_clip_text,
    "CLIPTextModelWithProjection": find_clip_text,
    "CLIPVisionModel": find_clip_vision,
    "CLIPVisionModelWithProjection": find_clip_vision,
    "T5EncoderModel": find_t5,
    "T5ForConditionalGeneration": find_t5,
    "MT5EncoderModel": find_t5,
    "UMT5EncoderModel": find_t5,
    "UMT5ForConditionalGeneration": find_t5,
    "LlamaModel": find_decoder,
    "LlamaForCausalLM": find_decoder,
    "LlavaForConditionalGeneration": find_decoder,
    "Qwen2Model": find_decoder,
    "Qwen2ForCausalLM": find_decoder,
    "Qwen2VLForConditionalGeneration": find_decoder,
    "Qwen2_5_VLForConditionalGeneration": find_decoder,
    "Qwen2_5_VLTextModel": find_decoder,
    "Qwen3Model": find_decoder,
    "Qwen3ForCausalLM": find_decoder,
    "Qwen3VLForConditionalGeneration": find_decoder,
    "Gemma2Model": find_decoder,
    "Gemma2ForCausalLM": find_decoder,
    "MistralModel": find_decoder,
    "MistralForCausalLM": find_decoder,
    "Mistral3ForConditionalGeneration": find_decoder,
    "BertModel": find_bert,
}
# where no config.json names the class, the layouts whose names are looked for among the tensors
UNNAMED = (
    (t5_checkpoint.LAYOUTS, find_t5),
    (clip_checkpoint.LAYOUTS, find_clip_text),
    (clip_checkpoint.VISION_LAYOUTS, find_clip_vision),
    (decoder_checkpoint.LAYOUTS, find_decoder),
    (bert_checkpoint.LAYOUTS, find_bert),
)


def find_encoder(
    path: str | os.PathLike,
    dtype: str = "float32",
    kind: str | None = None,
    *,
    variant: str | None = None,
    width: int | None = None,
    **overrides: Any,
) -> FoundEncoder:
    """The encoder that is in a folder as transformers saves it, or in a single file; no weights are read.

    Args:
      path: the folder, a .safetensors file, or the .index.json of a sharded one.
      dtype: "float32" or "bfloat16", of activations and products.
      kind: its class, one of `ENCODERS`, as model_index.json names it; None: as its config.json does, or where that
        does not, by the names of its tensors.
      variant: of the files to take, such as "fp16" (`difax.weights.published.published_file`).
      width: of the states that are needed; None: any.
      **overrides: other arguments of the encoder's factory (attend).

    Raises:
      ValueError: no such folder, a class that is not known (the nearest is named), another width, quantised weights of
        other programs, and what the class's own `find_*` refuses.
    """
    weights = published_file(path, variant)
    file, config = read_description(path)
    if not {"architectures", "model_type"} & config.keys():  # of another program, beside a single file
        config = {}
    if config.get("quantization_config"):
        method = dict(config["quantization_config"]).get("quant_method", "unknown")
        raise ValueError(f"{file}: quantization_config of {method}; allowed: none (difax quantises what it has read)")
    named = config.get("architectures")
    if kind is None and isinstance(named, list) and named:
        kind = str(named[0])
    known_kind = kind and choose(f"class of a text encoder in {path}:", kind, ENCODERS)
    find = ENCODERS[known_kind] if known_kind else _by_tensors(weights)
    with naming(file.parent):
        found = find(EncoderFolder(weights, kind or "", file, config), dtype=dtype, **overrides)
    if width is not None and found.model.width != width:
        raise ValueError(f"{path}: an encoder of width {found.model.width}; allowed: {width}, which the model takes")
    return FoundEncoder(Path(weights), kind or "", found)


def _by_tensors(path: Path) -> Find:
    names = tensor_shapes(path)
    count, find = max(((max(known(t, names) for t in tables.values()), f) for tables, f in UNNAMED), key=lambda a: a[0])
    if not count:
        raise ValueError(f"{path}: no tensor of a text encoder; its first: {', '.join(sorted(names)[:3]) or 'none'}")
    return find
