"""What a pipeline runs before and behind its sampler, as shapes alone: text encoders and the autoencoder.

Of a folder they are read from its files without a weight; of a denoiser alone they are the published ones around it.
Published geometries: FLUX.1 (Black Forest Labs 2024), Stable Diffusion 3 (Esser et al. 2024, arXiv:2403.03206), PixArt
(Chen et al. 2023, arXiv:2310.00426), Wan 2.1 (arXiv:2503.20314), Qwen-Image (arXiv:2508.02324), Z-Image
(arXiv:2511.22699), FLUX.2, each by the config.json of its text encoders (T5 v1.1 XXL, CLIP L and G, umT5 XXL,
Qwen2.5-VL 7B, Qwen3 4B and 8B, Mistral Small 3).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from difax.core.contracts import Autoencoder, Model, Params, TextEncoder
from difax.models.autoencoders import find_autoencoder
from difax.models.autoencoders.kl import autoencoder_kl, autoencoder_kl_flux2
from difax.models.autoencoders.wan import wan_autoencoder
from difax.models.encoders import clip_text, decoder, find_encoder, t5
from difax.pipelines.prompts import Rule, prompting
from difax.pipelines.recipes import RECIPES, open_pipeline
from difax.pipelines.section import COMPONENTS
from difax.weights.published import opened_parameters

STORED = "bfloat16"  # what published text encoders are kept in


class Texts(NamedTuple):
    """A text encoder of a pipeline.

    name: of its folder. encoder, params: and the shapes of its weights as they are kept. tokens: of a text, the most.
    wanted, pooled: as `difax.models.encoders.encode` takes them.
    """

    name: str
    encoder: TextEncoder
    params: Params
    tokens: int
    wanted: tuple[int, ...]
    pooled: bool


class Decoding(NamedTuple):
    """The autoencoder of a pipeline. params: shapes of its weights. chunked: the same, a latent frame at a time, of one
    that carries its past from part to part; None of others. tile: latents of a tile's side that a run decodes by; None:
    it takes a whole picture, and of a film a latent frame at a time."""

    name: str
    autoencoder: Autoencoder
    params: Params
    chunked: Autoencoder | None
    tile: int | None = None


class Parts(NamedTuple):
    """encoders: in the order in which they run; () of a network of labels."""

    pipeline: str
    encoders: tuple[Texts, ...]
    decoder: Decoding


def parts_of(section: Mapping[str, Any]) -> Parts:
    """The parts of a pipeline's folder, by the section `pipeline` of a run; no weight is read."""
    given = {name: section[name] for name in COMPONENTS if section.get(name)}
    folder, recipe = open_pipeline(section["folder"], given)
    encoders = []
    for rule in prompting(folder.name, folder.settings).rules if recipe.prompts else ():
        if rule.encoder not in folder.components and rule.missing:
            continue
        found = find_encoder(folder.component(rule.encoder), kind=folder.components[rule.encoder] or None)
        shapes = _stored(found.foreign.spec, found.path, found.foreign)
        encoders.append(_texts(rule, found.encoder, shapes, section.get("tokens")))
    place = folder.component("vae")
    found = find_autoencoder(place)
    chunked = find_autoencoder(place, chunk=1).model if found.model.time else None
    tile = section.get("tile")
    tile = None if tile is None else max(tile // found.model.side, 1)
    decoding = Decoding("vae", found.model, _shapes(found.model, "float32"), chunked, tile)
    return Parts(folder.name, tuple(encoders), decoding)


def published_parts(model: Model, kind: str) -> Parts:
    """The published parts around a denoiser.

    Args:
      model: the denoiser. kind: its name in `difax.models.MODELS`.

    Raises:
      ValueError: a denoiser that is published without them.
    """
    names = [name for name, recipe in RECIPES.items() if recipe.model == kind]
    if not names or kind not in DECODERS:
        raise ValueError(f"{kind}: no published pipeline is known of it; allowed: {', '.join(DECODERS)}")
    text: Any = model.cond["text"] if RECIPES[names[0]].prompts else None
    name = next((name for name in names if text is not None and RECIPES[name].prompts == text.shape[0]), names[0])
    encoders = []
    for rule in () if text is None else prompting(name).rules:
        encoder = _published(kind, rule, text.shape[1], len(rule.states))
        encoders.append(_texts(rule, encoder, _shapes(encoder, STORED), min(RECIPES[name].prompts, text.shape[0])))
    channels = model.input_shape[-1]
    variant = "2.2" if channels == 48 else "2.1"
    autoencoder = wan_autoencoder(variant) if kind == "wan" else DECODERS[kind]()
    if autoencoder.channels != channels:
        raise ValueError(
            f"{kind}: latents of {channels} channels, of {autoencoder.channels} the published {autoencoder.name}"
        )
    chunked = wan_autoencoder(variant, chunk=1) if autoencoder.time else None
    return Parts(name, tuple(encoders), Decoding("vae", autoencoder, _shapes(autoencoder, "float32"), chunked))


def _texts(rule: Rule, encoder: TextEncoder, params: Params, tokens: int | None) -> Texts:
    asked = rule.length if rule.fixed else tokens
    kept = max(encoder.length if asked is None else asked, rule.reads or 0)
    most = min((rule.crop or 0) + kept, encoder.length)
    return Texts(rule.encoder, encoder, params, most, tuple(dict.fromkeys(rule.states)), rule.pool is not None)


def _shapes(made: Any, dtype: str) -> Params:
    """Shapes of parameters that are kept in a type."""
    spec = jax.eval_shape(made.init, jax.random.key(0))
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, jnp.dtype(dtype)), spec)


def _stored(spec: Params, path: Any, foreign: Any) -> Params:
    """Shapes of parameters in the types that a file keeps them in."""
    with opened_parameters(path, foreign, each=True) as parameters:
        types: dict[str, np.dtype] = {name: p.dtype for name, p in parameters.items()}

    def leaf(place: Any, a: Any) -> Any:
        return jax.ShapeDtypeStruct(a.shape, types[jax.tree_util.keystr(place, simple=True, separator="/")])

    return jax.tree_util.tree_map_with_path(leaf, spec)


def _clip_l(**more: Any) -> TextEncoder:
    return clip_text(depth=12, width=768, heads=12, ffn=3072, **more)


def _clip_g() -> TextEncoder:
    return clip_text(depth=32, width=1280, heads=20, ffn=5120, activation="gelu", projection=1280)


def _t5_xxl() -> TextEncoder:
    return t5(depth=24, width=4096, heads=64, ffn=10240)


def _umt5_xxl() -> TextEncoder:
    return t5(depth=24, width=4096, heads=64, ffn=10240, vocabulary=256384, bias_each_layer=True)


def _qwen2_5_vl_7b() -> TextEncoder:
    return decoder(
        depth=28, width=3584, heads=28, groups=4, ffn=18944, vocabulary=152064, theta=1e6, qkv_bias=True
    )  # fmt: skip


def _qwen3(depth: int, width: int, ffn: int) -> TextEncoder:
    return decoder(
        depth=depth, width=width, heads=32, groups=8, head_width=128, ffn=ffn, vocabulary=151936, theta=1e6,
        qk_norm=True,
    )  # fmt: skip


def _mistral_small() -> TextEncoder:
    return decoder(
        depth=40, width=5120, heads=32, groups=8, head_width=128, ffn=32768, vocabulary=131072, theta=1e9, eps=1e-5
    )


# by the width of the states
_WIDE: dict[int, Callable[[], TextEncoder]] = {
    2560: lambda: _qwen3(36, 2560, 9728),
    4096: lambda: _qwen3(36, 4096, 12288),
    5120: _mistral_small,
}
# denoiser -> text encoders by their folders
ENCODERS: dict[str, dict[str, Callable[[], TextEncoder]]] = {
    "flux": {"text_encoder": _clip_l, "text_encoder_2": _t5_xxl},
    "sd3": {"text_encoder": lambda: _clip_l(projection=768), "text_encoder_2": _clip_g, "text_encoder_3": _t5_xxl},
    "pixart": {"text_encoder": _t5_xxl},
    "wan": {"text_encoder": _umt5_xxl},
    "qwen_image": {"text_encoder": _qwen2_5_vl_7b},
    "z_image": {"text_encoder": lambda: _qwen3(36, 2560, 9728)},
}


def _published(kind: str, rule: Rule, width: int, states: int) -> TextEncoder:
    """The published text encoder of a denoiser; FLUX.2's is the one as wide as a state of its condition."""
    if kind in ENCODERS:
        return ENCODERS[kind][rule.encoder]()
    if width // states not in _WIDE:
        raise ValueError(f"{kind}: text of width {width}; allowed: {states} times {', '.join(map(str, _WIDE))}")
    return _WIDE[width // states]()


def _kl(scaling: float, shift: float = 0.0, **more: Any) -> Callable[[], Autoencoder]:
    return lambda: autoencoder_kl(scaling_factor=scaling, shift_factor=shift, **more)


_WITHOUT_QUANT = {"latents": 16, "quant": False, "post_quant": False}
DECODERS: dict[str, Callable[[], Autoencoder]] = {
    "dit": _kl(0.18215),
    "pixart": _kl(0.13025),
    "flux": _kl(0.3611, 0.1159, **_WITHOUT_QUANT),
    "z_image": _kl(0.3611, 0.1159, **_WITHOUT_QUANT),
    "sd3": _kl(1.5305, 0.0609, **_WITHOUT_QUANT),
    "wan": lambda: wan_autoencoder("2.1"),
    "qwen_image": lambda: wan_autoencoder("2.1", images=True),
    "flux2": autoencoder_kl_flux2,
}
