"""The weights of T5, mT5 and umT5 encoders: the layouts of transformers and of Wan's own umT5."""

from __future__ import annotations

from typing import Any

import jax

from difax.models.encoders.folder import EncoderFolder
from difax.models.encoders.layers import ACTIVATIONS
from difax.models.encoders.t5 import t5
from difax.weights.checkpoint import Source
from difax.weights.published import Foreign, dense, stored_depth, stored_shape
from difax.weights.settings import check_agrees, number, one_of, rows_of, whole


def _table(block: str, attn: str, places: str, norms: tuple[str, str], ffn: tuple[str, str, str], **ends: str) -> dict:
    """The rows of one layout. ffn: gate, linear, out. ends: the tensors of tokens, final and first places."""
    gate, linear, out = (f"{block}.{name}" for name in ffn)
    return {
        "ends/tokens/embedding": Source((ends["tokens"],)),
        "ends/final/scale": Source((ends["final"],)),
        "ends/places": Source((f"{block}.{places}".format(layer=0),)),
        "blocks/places": Source((f"{block}.{places}",)),
        "blocks/norm1/scale": Source((f"{block}.{norms[0]}.weight",)),
        "blocks/norm2/scale": Source((f"{block}.{norms[1]}.weight",)),
        **dense("blocks/qkv", *(f"{block}.{attn}.{p}" for p in "qkv")),
        **dense("blocks/out", f"{block}.{attn}.o"),
        **dense("blocks/wi", gate, linear),
        **dense("blocks/wo", out),
    }


def _transformers(tokens: str) -> dict[str, Source]:
    feed = "layer.1.DenseReluDense"
    return _table(
        "encoder.block.{layer}",
        "layer.0.SelfAttention",
        "layer.0.SelfAttention.relative_attention_bias.weight",
        ("layer.0.layer_norm", "layer.1.layer_norm"),
        (f"{feed}.wi_0", f"{feed}.wi_1", f"{feed}.wo"),
        tokens=tokens,
        final="encoder.final_layer_norm.weight",
    )


# the table of tokens has two names, of which files hold one, the other, or both
LAYOUTS = {
    "transformers": _transformers("shared.weight"),
    "transformers, encoder alone": _transformers("encoder.embed_tokens.weight"),
    "wan": _table(
        "blocks.{layer}",
        "attn",
        "pos_embedding.embedding.weight",
        ("norm1", "norm2"),
        ("ffn.gate.0", "ffn.fc1", "ffn.fc2"),
        tokens="token_embedding.weight",
        final="norm.weight",
    ),
}
IGNORED = r"^(decoder\.|lm_head\.|shared\.weight$|encoder\.embed_tokens\.weight$|spiece_model$)"


FEED_FORWARD = one_of(*ACTIVATIONS, *(f"gated-{name}" for name in ACTIVATIONS))
# what a missing key means, of T5Config; umT5 and mT5 have gates
SETTINGS = {
    "d_model": (whole(), None),
    "d_kv": (whole(), None),
    "d_ff": (whole(), None),
    "num_layers": (whole(), None),
    "num_heads": (whole(), None),
    "vocab_size": (whole(), None),
    "relative_attention_num_buckets": (whole(4), None),
    "relative_attention_max_distance": (whole(2), 128),
    "layer_norm_epsilon": (number(), 1e-6),
    "feed_forward_proj": (FEED_FORWARD, "relu"),
    "is_decoder": (one_of(False, but="a decoder sees the past alone"), False),
}
GATED = SETTINGS | {"feed_forward_proj": (FEED_FORWARD, "gated-gelu")}


def find_t5(folder: EncoderFolder, **overrides: Any) -> Foreign:
    """The T5, mT5 or umT5 encoder of a folder, or of a single file; geometry from tensors, the rest from its config.

    Args:
      **overrides: arguments of `difax.models.encoders.t5.t5`, which win over what was found.

    Raises:
      ValueError: as `load_safetensors` and `t5`; a config.json that contradicts the tensors or names another function.
    """
    table, shapes = folder.tensors("a T5 encoder", LAYOUTS)
    stored = lambda path, layer=0: table[path].keys[0].format(layer=layer) in shapes  # noqa: E731
    if not stored("blocks/wi/kernel"):  # the first T5, without gates
        plain = table["blocks/wi/kernel"].keys[0].replace("wi_0", "wi")
        table = {**table, "blocks/wi/kernel": Source((plain,), (1, 0))}
    shape = stored_shape(folder.path, table, shapes)
    vocabulary, width = shape("ends/tokens/embedding")
    buckets, heads = shape("ends/places")
    inner, gated = shape("blocks/qkv/kernel")[0], len(table["blocks/wi/kernel"].keys) == 2
    umt5 = folder.kind.startswith("UMT5") if folder.kind else stored("blocks/places", 1)
    config = folder.settled(GATED if folder.kind[:1] in ("U", "M") or not folder.kind else SETTINGS)
    activation = config["feed_forward_proj"]
    fields = {
        "depth": stored_depth(table, shapes, "blocks/qkv/kernel"),
        "width": width,
        "heads": heads,
        "head_width": inner // heads,
        "ffn": shape("blocks/wi/kernel")[0],
        "vocabulary": vocabulary,
        "gated": gated,
        "activation": "gelu_new" if activation == "gated-gelu" else activation.removeprefix("gated-"),
        "buckets": buckets,
        "distance": config["relative_attention_max_distance"],
        "bias_each_layer": umt5,
        "eps": config["layer_norm_epsilon"],
    }
    keys = {"d_model": "width", "d_ff": "ffn", "num_layers": "depth", "num_heads": "heads", "d_kv": "head_width"}
    keys |= {"vocab_size": "vocabulary", "relative_attention_num_buckets": "buckets"}
    check_agrees(folder.file, folder.config, {key: fields[name] for key, name in keys.items()})
    if activation.startswith("gated-") != gated:
        has = "gates" if gated else "no gates"
        raise ValueError(f"{folder.file}: feed_forward_proj={activation!r}, and the checkpoint's tensors have {has}")
    encoder = t5(**fields | overrides)
    spec = jax.eval_shape(encoder.init, jax.random.key(0))
    return Foreign(encoder, rows_of(table, spec), {"layer": fields["depth"]}, geometry=fields, ignored=IGNORED)
