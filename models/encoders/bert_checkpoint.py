"""The weights of BERT: the layout of transformers' BertModel."""

from __future__ import annotations

from typing import Any

import jax

from difax.models.encoders.bert import bert
from difax.models.encoders.folder import EncoderFolder
from difax.models.encoders.layers import ACTIVATIONS
from difax.weights.checkpoint import Source
from difax.weights.published import Foreign, dense, stored_depth, stored_shape
from difax.weights.settings import check_agrees, number, one_of, rows_of, whole


def _norm(path: str, name: str) -> dict[str, Source]:
    return {f"{path}/scale": Source((f"{name}.weight",)), f"{path}/bias": Source((f"{name}.bias",))}


_LAYER = "encoder.layer.{layer}"
BERT = {
    "ends/tokens/embedding": Source(("embeddings.word_embeddings.weight",)),
    "ends/places": Source(("embeddings.position_embeddings.weight",)),
    "ends/kinds": Source(("embeddings.token_type_embeddings.weight",)),
    **_norm("ends/before", "embeddings.LayerNorm"),
    **dense("ends/pooler", "pooler.dense"),
    **dense("blocks/qkv", *(f"{_LAYER}.attention.self.{p}" for p in ("query", "key", "value"))),
    **dense("blocks/out", f"{_LAYER}.attention.output.dense"),
    **_norm("blocks/norm1", f"{_LAYER}.attention.output.LayerNorm"),
    **dense("blocks/fc1", f"{_LAYER}.intermediate.dense"),
    **dense("blocks/fc2", f"{_LAYER}.output.dense"),
    **_norm("blocks/norm2", f"{_LAYER}.output.LayerNorm"),
}
LAYOUTS = {"transformers": BERT}
IGNORED = r"position_ids$|^cls\."

# what a missing key means, of BertConfig
SETTINGS = {
    "hidden_size": (whole(), None),
    "intermediate_size": (whole(), None),
    "num_hidden_layers": (whole(), None),
    "num_attention_heads": (whole(), 12),
    "vocab_size": (whole(), None),
    "max_position_embeddings": (whole(), None),
    "type_vocab_size": (whole(), None),
    "hidden_act": (one_of(*ACTIVATIONS), "gelu"),
    "layer_norm_eps": (number(), 1e-12),
    "position_embedding_type": (one_of("absolute", None), "absolute"),
    "is_decoder": (one_of(False, but="a decoder sees the past alone"), False),
}


def find_bert(folder: EncoderFolder, **overrides: Any) -> Foreign:
    """The BERT of a folder; geometry from the tensors, the rest from its config.

    Args:
      **overrides: arguments of `difax.models.encoders.bert.bert`, which win over what was found.

    Raises:
      ValueError: as `load_safetensors` and `bert`; a config.json that contradicts the tensors.
    """
    table, shapes = folder.tensors("a BERT", LAYOUTS)
    shape = stored_shape(folder.path, table, shapes)
    vocabulary, width = shape("ends/tokens/embedding")
    config = folder.settled(SETTINGS)
    fields = {
        "depth": stored_depth(table, shapes, "blocks/fc1/kernel"),
        "width": width,
        "heads": config["num_attention_heads"],
        "ffn": shape("blocks/fc1/kernel")[0],
        "vocabulary": vocabulary,
        "length": shape("ends/places")[0],
        "kinds": shape("ends/kinds")[0],
        "activation": config["hidden_act"],
        "pooled": table["ends/pooler/kernel"].keys[0] in shapes,
        "eps": config["layer_norm_eps"],
    }
    keys = {"hidden_size": "width", "intermediate_size": "ffn", "num_hidden_layers": "depth"}
    keys |= {"vocab_size": "vocabulary", "max_position_embeddings": "length", "type_vocab_size": "kinds"}
    check_agrees(folder.file, folder.config, {key: fields[name] for key, name in keys.items()})
    encoder = bert(**fields | overrides)
    spec = jax.eval_shape(encoder.init, jax.random.key(0))
    return Foreign(encoder, rows_of(table, spec), {"layer": fields["depth"]}, geometry=fields, ignored=IGNORED)
