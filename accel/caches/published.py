"""Numbers that authors have published for caches of their models: TeaCache's polynomials, MagCache's ratios.

They lie in published.json beside this file, by the name of a fit:

  {"teacache": {name: {"coefficients": highest power first, "input": of the distance, "thresholds", "steps", "source"}},
   "magcache": {name: {"ratios": of each evaluation, "halves": 2 where they are conditional and unconditional in turn,
                       "steps", "threshold", "streak", "retention", "source"}},
   "commits": of the repositories that the sources name}

Sets that nobody says to have fitted are left out (the one of Qwen-Image for TeaCache that is in circulation, which has
round numbers). A fit belongs to one model, to its input and, in MagCache, nearly to one length of run.

References: Liu et al. 2024, arXiv:2411.19108 (ali-vilab/TeaCache); Ma et al. 2025, arXiv:2506.09045
(Zehong-Ma/MagCache); ModelTC/LightX2V. All are under Apache-2.0.
"""

from __future__ import annotations

import functools
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from difax.core.annotations import choose
from difax.core.files import read_json

FILE = pathlib.Path(__file__).with_name("published.json")

# parts of a path that do not say which model it is
UNTELLING = r"(transformer|unet)(_\d)?|snapshots|main|[0-9a-f]{40}|(diffusion_pytorch_)?model.*\.(safetensors|json)|\.+"

# what the first names of difax stand for
ALIASES = {
    "flux": "flux1_dev",
    "hunyuan_video": "hunyuanvideo",
    "ltx_video": "ltx_video_0.9",
    "mochi": "mochi1",
    "open_sora": "opensora1.2",
    "open_sora_plan": "opensora_plan_1.1",
    "wan2_1_1.3b": "wan2.1_t2v_1.3b_ret",
    "wan2_1_14b": "wan2.1_t2v_14b_ret",
}


class Model(NamedTuple):
    """A model that numbers are published for.

    called: a pattern of the names that its folders have, in small letters with "-" for all but letters, digits and
    points. blocks: of each of its stages. geometry: what no other published model has together, () where others do.
    teacache, magcache: the names of its fits.
    """

    called: str
    blocks: tuple[int, ...] | None = None
    geometry: tuple[tuple[str, Any], ...] = ()
    teacache: str | None = None
    magcache: str | None = None


def _alone(pipeline: str, width: int, **more: Any) -> tuple[tuple[str, Any], ...]:
    return (("pipeline", pipeline), ("width", width), *more.items())


# in the order in which names are tried: what is special before what is general
MODELS: dict[str, Model] = {
    "flux1_kontext": Model(r"flux.*kontext", (19, 38), magcache="flux1_kontext"),
    "flux1_dev": Model(
        r"flux-?(\.?1)?-?dev",
        (19, 38),
        _alone("FluxPipeline", 3072, guidance=True),
        "flux1_dev",
        "flux1_dev",
    ),
    **{
        f"hunyuanvideo1.5_{task}_{size}": Model(
            rf"(?=.*hunyuan-?video-?1\.5)(?=.*{task})(?=.*{size})",
            (54,),
            teacache=f"hunyuanvideo1.5_{task}_{size}",
            magcache="hunyuanvideo1.5_i2v_480p" if (task, size) == ("i2v", "480p") else None,
        )
        for task in ("t2v", "i2v")
        for size in ("480p", "720p")
    },
    "framepack_f1": Model(r"framepack.*f1", (20, 40), magcache="framepack_f1"),
    "framepack": Model(r"framepack", (20, 40), magcache="framepack"),
    "hunyuanvideo": Model(
        r"hunyuan-?video(?!.*(1\.5|i2v|avatar|custom|foley))",
        (20, 40),
        _alone("HunyuanVideoPipeline", 3072),
        "hunyuanvideo",
        "hunyuanvideo_720p",
    ),
    "ltx_video_0.9": Model(r"ltx(?!-?v?(ideo)?-?2)", (28,), _alone("LTXPipeline", 2048), "ltx_video_0.9"),
    "mochi1": Model(r"mochi", (48,), _alone("MochiPipeline", 3072), "mochi1"),
    "hidream_i1_full": Model(r"hidream-i1-full", teacache="hidream_i1_full"),
    "lumina_next": Model(r"lumina-next", teacache="lumina_next"),
    "lumina2": Model(r"lumina-?(image-)?2", (26,), _alone("Lumina2Pipeline", 2304), "lumina2"),
    "cosmos1": Model(r"cosmos-?1", teacache="cosmos1"),
    "latte": Model(r"latte", (28, 28), teacache="latte"),
    "opensora_plan_1.1": Model(r"open-?sora-?plan.*1\.1", (28, 28), teacache="opensora_plan_1.1"),
    "opensora1.2": Model(r"open-?sora(?!-?plan).*1\.2|stdit3", (28, 28), teacache="opensora1.2"),
    "cogvideox1.5-5b-i2v": Model(r"cogvideox-?1\.5-5b-i2v", (42,), teacache="cogvideox1.5-5b-i2v"),
    "cogvideox1.5-5b": Model(r"cogvideox-?1\.5-5b", (42,), teacache="cogvideox1.5-5b"),
    "cogvideox_5b-i2v": Model(r"cogvideox-5b-i2v", (42,), teacache="cogvideox_5b-i2v"),
    "cogvideox_5b": Model(r"cogvideox-5b", (42,), teacache="cogvideox_5b"),
    "cogvideox_2b": Model(r"cogvideox-2b", (30,), _alone("CogVideoXPipeline", 1920), "cogvideox_2b"),
    "wan2.1_vace_1.3b": Model(r"(?=.*wan)(?=.*vace)(?=.*1\.3b)", (30,), magcache="wan2.1_vace_1.3b"),
    "wan2.1_vace_14b": Model(r"(?=.*wan)(?=.*vace)(?=.*14b)", (40,), magcache="wan2.1_vace_14b"),
    "wan2.2_ti2v_5b": Model(
        r"(?=.*wan-?2\.2)(?=.*5b)",
        (30,),
        _alone("WanPipeline", 3072),
        "wan2.2_ti2v_5b",
        "wan2.2_ti2v_5b_t2v",
    ),
    "wan2.2_t2v_a14b": Model(r"(?=.*wan-?2\.2)(?=.*t2v)(?=.*14b)", (40,), magcache="wan2.2_t2v_a14b"),
    "wan2.2_i2v_a14b": Model(r"(?=.*wan-?2\.2)(?=.*i2v)(?=.*14b)", (40,), magcache="wan2.2_i2v_a14b"),
    **{
        f"wan2.1_i2v_{size}": Model(
            rf"(?=.*wan-?2\.1)(?=.*i2v)(?=.*{size})",
            (40,),
            teacache=f"wan2.1_i2v_{size}",
            magcache=f"wan2.1_i2v_{size}",
        )
        for size in ("480p", "720p")
    },
    "wan2.1_t2v_1.3b": Model(
        r"(?=.*wan-?2\.1)(?=.*t2v)(?=.*1\.3b)",
        (30,),
        _alone("WanPipeline", 1536),
        "wan2.1_t2v_1.3b",
        "wan2.1_t2v_1.3b",
    ),
    "wan2.1_t2v_14b": Model(
        r"(?=.*wan-?2\.1)(?=.*t2v)(?=.*14b)", (40,), teacache="wan2.1_t2v_14b", magcache="wan2.1_t2v_14b"
    ),
    "omnigen2": Model(r"omnigen-?2", magcache="omnigen2_t2i"),
    "qwen_image_edit": Model(r"qwen-?image-?edit", (60,), magcache="qwen_image_edit"),
    "qwen_image": Model(
        r"qwen-?image(?!.*(layered|2\.1))", (60,), _alone("QwenImagePipeline", 3072), magcache="qwen_image"
    ),
}


class Fit(NamedTuple):
    """Published numbers for one cache of one model.

    technique, name: where they lie. arguments: of the cache's factory, what the user has not given himself.
    steps: of the run that they were measured on, None where that is not said. source: repository, file and line.
    note: what is to be said of them in this run, "" for nothing.
    """

    technique: str
    name: str
    arguments: dict[str, Any]
    steps: int | None
    source: str
    note: str


@functools.cache
def table(technique: str) -> dict[str, dict[str, Any]]:
    """All fits of a technique, "teacache" or "magcache", by name."""
    return read_json(FILE)[technique]


def entry(technique: str, key: str, name: str) -> tuple[str, dict[str, Any]]:
    """A fit by its name or by an alias of it.

    Args:
      key: the argument that names it, which begins the message.

    Raises:
      ValueError: there is none of that name.
    """
    fits = table(technique)
    name = ALIASES.get(name, name)
    if name not in fits:
        raise ValueError(f"{technique}: {key}={name!r}; allowed: numbers, or {', '.join(fits)}")
    return name, fits[name]


def model_of(names: Iterable[str], geometry: Mapping[str, Any] | None = None) -> str | None:
    """Which published model a folder holds, by what it is called or else by its geometry.

    Args:
      names: that it has, the most telling first: the folder's path, _name_or_path of its files. Of a path the last part
        counts that is no component, no snapshot and no file of weights.
      geometry: what is known of it, of "pipeline" (the class in model_index.json), "width", "blocks" (of each stage)
        and "guidance" (has it a guidance embedding).

    Returns:
      A key of `MODELS`; None where no name tells, and the geometry is that of none or of several.
    """
    for name in names:
        parts = [part for part in re.split(r"[/\\]|--", name) if part and not re.fullmatch(UNTELLING, part)]
        text = re.sub(r"[^a-z0-9.]+", "-", parts[-1].lower()) if parts else ""
        for model, known in MODELS.items():
            if re.search(known.called, text):
                return model
    given = dict(geometry or {})
    for model, known in MODELS.items():
        whole = (*known.geometry, ("blocks", known.blocks))
        if known.geometry and all(key in given and given[key] == value for key, value in whole):
            return model
    return None


def published(technique: str, model: str, steps: int | None = None) -> Fit | None:
    """The numbers that are published for a technique and a model.

    Args:
      technique: "teacache" or "magcache"; for any other there are none. model: of `MODELS`. steps: of the run.

    Returns:
      `Fit`, or None where nothing is published.

    Raises:
      ValueError: another model (names the nearest).
    """
    known = MODELS[choose("published model", model, MODELS)]
    name = {"teacache": known.teacache, "magcache": known.magcache}.get(technique)
    if name is None:
        return None
    found = table(technique)[name]
    measured = found.get("steps")
    if technique == "teacache":
        arguments: dict[str, Any] = {"coefficients": name}
        if "thresholds" in found:
            arguments["threshold"] = found["thresholds"][0]
        note = ""
    else:
        arguments = {"ratios": name, **{k: found[k] for k in ("threshold", "streak", "retention") if k in found}}
        other = steps is not None and steps != measured
        note = f"measured over {measured} steps, taken at the nearest of {steps}" if other else ""
    return Fit(technique, name, arguments, measured, found["source"], note)


def says(technique: str, key: str, name: str) -> tuple[Mapping[str, Any], ...]:
    """What a fit says of itself, for `Accelerator.measured`.

    Args:
      key: the argument that names it.
    """
    name, found = entry(technique, key, name)
    model = next((m for m, known in MODELS.items() if name in (known.teacache, known.magcache)), None)
    model = model or next((m for m in MODELS if name.startswith(m)), name)
    blocks = MODELS[model].blocks if model in MODELS else None
    steps = {"evaluations": found["steps"]} if technique == "magcache" else {}
    return ({"technique": technique, "published": f"{key}={name!r}", "of": model, "blocks": blocks, **steps},)
