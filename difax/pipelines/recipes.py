"""What a pipeline does around its denoiser, as data: one entry for each class of a model_index.json."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from difax.core.annotations import brief
from difax.core.files import named, place_of
from difax.core.process import flux2_mu
from difax.models.encoders import find_encoder
from difax.pipelines.folder import INDEX, Folder, open_folder
from difax.pipelines.single import open_single


class Recipe(NamedTuple):
    """One pipeline of diffusers 0.42.1 with the values that it takes where none are given.

    model: of `difax.models.MODELS`. side: pixels of a default picture, (height, width), given the folder and the pixels
        of a latent's side. patch: latents on the side of a token. steps, scale: of solver and guidance. guide: how the
        halves are mixed. offset: of difax's scale over the pipeline's, 1 where that writes c + s (c - u). guidance:
        what a network is told that takes its scale as an input; None for those that do not.
    prompts: 0 for labels, else tokens of the longest prompt (`max_sequence_length`).
    frames, fps: of a film, 0 for pictures.
    packed: are latents of diffusers [B, tokens, C patch^2], features in the order (channel, row, column).
    mu: (tokens, steps) -> logarithm of the flow's shift, where the scheduler's file does not say it.
    sigmas: of the flow before its shift, "pipeline" (1 ... 1/n) or "scheduler"; None is what the scheduler's file says.
    networks: folders of denoisers, the second for the lower noise levels.
    strength: share of the steps that is made from a given image, without and with a mask.
    begins: is a film begun by a given picture.
    told: of the network, beside its size.
    text: (tokens of the longest prompt, config.json of the network) -> tokens of its embeddings.
    """

    model: str
    side: Callable[[Folder, int], tuple[int, int]]
    patch: int
    steps: int
    scale: float
    guide: Mapping[str, Any] = {"name": "cfg"}
    offset: float = 0.0
    guidance: float | None = None
    prompts: int = 0
    frames: int = 0
    fps: int = 0
    packed: bool = False
    mu: Callable[[int, int], float] | None = None
    sigmas: str | None = None
    networks: tuple[str, ...] = ("transformer",)
    strength: tuple[float, float] = (0.6, 0.6)
    begins: bool = False
    told: Mapping[str, Any] = {}
    text: Callable[[int, Mapping[str, Any]], int] = lambda tokens, config: tokens

    def geometry(self, folder: Folder, section: Mapping[str, Any]) -> dict[str, Any]:
        """What a section tells of the network beside its size."""
        if not self.prompts:
            return dict(self.told)
        config = folder.config(self.networks[0])
        found = {**self.told, "text_tokens": self.text(section["tokens"], config)}
        if self.begins:
            found["first_frame"] = folder.settings.get("expand_timesteps") is True
            if config.get("image_dim") is not None and "image_encoder" in folder.components:
                found["image_tokens"] = find_encoder(folder.component("image_encoder")).encoder.tokens
        return found


def _of_network(folder: Folder, side: int) -> tuple[int, int]:
    """The size that the network was made for, by its config.json."""
    size = folder.config("transformer").get("sample_size")
    if not isinstance(size, int) or size < 1:
        raise ValueError(f"{named(folder.path)}: transformer/config.json has no sample_size; give --height and --width")
    return size * side, size * side


def _square(latents: int) -> Callable[[Folder, int], tuple[int, int]]:
    return lambda folder, side: (latents * side, latents * side)


def _z_image_text(tokens: int, config: Mapping[str, Any]) -> int:
    """At most as many as there are places for, before that of the picture."""
    places = config.get("axes_lens", [512])
    most = places[0] - 2 if isinstance(places, list) and places and isinstance(places[0], int) else tokens
    return tokens if tokens <= most else max(most // 32 * 32, 1)


RECIPES: dict[str, Recipe] = {
    "DiTPipeline": Recipe("dit", _of_network, patch=2, steps=50, scale=4.0),
    "FluxPipeline": Recipe(
        "flux", _square(128), patch=2, steps=28, scale=1.0, guidance=3.5, prompts=512, packed=True,
        sigmas="pipeline",
    ),
    "PixArtAlphaPipeline": Recipe("pixart", _of_network, patch=2, steps=20, scale=4.5, prompts=120),
    "PixArtSigmaPipeline": Recipe("pixart", _of_network, patch=2, steps=20, scale=4.5, prompts=300),
    "StableDiffusion3Pipeline": Recipe(
        "sd3", _of_network, patch=2, steps=28, scale=7.0, prompts=256, text=lambda tokens, _: 77 + tokens
    ),
    "WanPipeline": Recipe(
        "wan", lambda folder, side: (480, 832), patch=2, steps=50, scale=5.0, prompts=512, frames=81, fps=16,
        networks=("transformer", "transformer_2"),
    ),
    "QwenImagePipeline": Recipe(
        "qwen_image", _square(128), patch=2, steps=50, scale=4.0, guide={"name": "cfg", "norm": "patch"}, prompts=512,
        packed=True, sigmas="pipeline",
    ),
    "ZImagePipeline": Recipe(
        "z_image", _square(128), patch=2, steps=50, scale=5.0, offset=1.0, prompts=512, sigmas="pipeline",
        text=_z_image_text, strength=(0.6, 1.0),
    ),
    "Flux2KleinPipeline": Recipe(
        "flux2", _square(64), patch=1, steps=50, scale=4.0, prompts=512, packed=True, sigmas="pipeline", mu=flux2_mu,
        told={"ignores_guidance": True},  # whatever the weights have
    ),
}  # fmt: skip

_OF_IMAGES = {
    "FluxPipeline": (("FluxImg2ImgPipeline", "FluxInpaintPipeline"), {"guidance": 7.0}),
    "StableDiffusion3Pipeline": (("StableDiffusion3Img2ImgPipeline", "StableDiffusion3InpaintPipeline"), {"steps": 50}),
    "QwenImagePipeline": (("QwenImageImg2ImgPipeline", "QwenImageInpaintPipeline"), {}),
    "ZImagePipeline": (("ZImageImg2ImgPipeline", "ZImageInpaintPipeline"), {}),
    "WanPipeline": (("WanImageToVideoPipeline",), {"begins": True}),
}
RECIPES |= {name: RECIPES[of]._replace(**own) for of, (names, own) in _OF_IMAGES.items() for name in names}


def open_pipeline(path: Any, given: Mapping[str, str] | None = None) -> tuple[Folder, Recipe]:
    """A pipeline's folder, or a network's file with the components that are given, and its recipe.

    Raises:
      ValueError: as `open_folder` and `open_single`, and a boundary between two networks that is none, or without the
        second.
    """
    single = place_of(path) == "file" and os.fspath(path).endswith((".safetensors", ".index.json"))
    folder = open_single(path, given or {}) if single else open_folder(path, RECIPES, given)
    recipe = RECIPES[folder.name]
    _check_boundary(folder, recipe)
    return folder, recipe


def _check_boundary(folder: Folder, recipe: Recipe) -> None:
    boundary, second = folder.settings.get("boundary_ratio"), recipe.networks[1:]
    if boundary is None or not second:
        return
    if isinstance(boundary, bool) or not isinstance(boundary, (int, float)) or not 0 <= boundary <= 1:
        raise ValueError(f"{named(folder.path / INDEX)}: boundary_ratio={brief(boundary)}; allowed: 0 ... 1, or null")
    if second[0] not in folder.components:
        raise ValueError(
            f"{named(folder.path / INDEX)}: boundary_ratio={boundary} without {second[0]}; allowed: both, or none"
        )
