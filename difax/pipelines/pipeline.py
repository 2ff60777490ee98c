"""The components around a denoiser: prompts to its conditions, its latents to pictures, pictures to latents."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from difax.core.contracts import Autoencoder, Model
from difax.core.files import read_object
from difax.media.inputs import resized
from difax.models.autoencoders import find_autoencoder
from difax.models.autoencoders.tiles import tiled
from difax.models.encoders import find_encoder, image_states
from difax.pipelines.encode import check_prompts, conditions, encoded, warn_of_cuts
from difax.pipelines.image_in import PROCESSOR, preprocessed, read_masks, read_pictures
from difax.pipelines.prompts import prompting
from difax.pipelines.recipes import open_pipeline
from difax.pipelines.section import OVERLAP, given_components
from difax.weights.published import load_foreign

SMALL = 32  # latents a side of a preview
BEGUN = ("condition", "image", "first_frame")  # leaves of a condition that say what a film begins with


class Pipeline:
    """A folder as a run uses it; weights are read where they are needed, and dropped.

    section: `pipeline` of the run's configuration, filled up. seconds: of each stage of the last run. tell: is called
    with a line where a stage begins.
    """

    def __init__(self, section: Mapping[str, Any]):
        self.section = dict(section)
        self.folder, self.recipe = open_pipeline(section["folder"], given_components(section))
        self.seconds: dict[str, float] = {}
        self.tell: Callable[[str], None] = lambda text: None
        self._autoencoders: dict[str, tuple[Autoencoder, Any]] = {}
        self._programs: dict[Any, Any] = {}

    def _opened(self, name: str) -> tuple[Autoencoder, Any]:
        if name not in self._autoencoders:
            path = self.section["preview"] if name == "preview" else self.folder.component(name)
            found = find_autoencoder(path)
            if found.model.time:  # a film, whose frames are not in memory together
                found = find_autoencoder(path, chunk=1)
            model, tile = found.model, self.section.get("tile")
            if tile is not None and name == "vae":
                side = tile // model.side
                model = tiled(model, side, side // OVERLAP)
            self._autoencoders[name] = model, load_foreign(path, found, jnp.float32)
        return self._autoencoders[name]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of a picture [H, W, 3] or a film [F, H, W, 3]."""
        section = self.section
        frames = (section["frames"],) if self.recipe.frames else ()
        return *frames, section["height"], section["width"], 3

    def conditions(
        self, model: Model, prompts: Sequence[str], guided: bool, image: Any = None
    ) -> dict[str, np.ndarray]:
        """The condition [n] of prompts, warned of where a prompt is cut.

        Args:
          guided: is there an unconditional half, for the negative prompt.
          image: of a network of image-to-video, what its film begins with.
        """
        prompts = check_prompts(prompts)
        first = self.begins(model, image, len(prompts)) if begun_by_image(model) else {}
        begun = time.perf_counter()
        self.tell(f"encoding {len(prompts)} prompt{'s' * (len(prompts) > 1)}")
        rules, section = prompting(self.folder.name, self.folder.settings), self.section
        more = {"tokens": section["tokens"], "kept": section.get("embeddings"), "width": model.cond["text"].shape[-1]}
        found, cut = encoded(self.folder, rules, prompts, **more)
        warn_of_cuts(prompts, cut, section["tokens"])
        negative = None
        if guided:
            told = section.get("negative", rules.negative) or ""
            negative, _ = encoded(self.folder, rules, [told], negative=True, **more)
        sides = float(section["height"]), float(section["width"])
        told = {"guidance": section.get("guidance"), "resolution": sides, "aspect_ratio": sides[0] / sides[1]}
        told |= first
        cond = conditions(model, found, negative, told)
        self.seconds["encode"] = time.perf_counter() - begun
        return cond

    def known(self, image: Any, mask: Any, n: int, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray | None]:
        """The latents [n, ...] of an image, and where a mask lets them become others, [n, ..., 1].

        Args:
          image, mask: as `difax.run.Run.sample` takes them. n: samples. shape: of one's latents.

        Raises:
          ValueError: what is no image or mask, other numbers of them, a mask of another size than the image, a film's
            pipeline.
        """
        if self.recipe.frames:
            more = self.folder.settings.get("expand_timesteps") is True
            films = "model.first_frame=True, where it is the first frame" if more else "a pipeline of pictures"
            raise ValueError(f"image: {self.folder.name} draws films here; allowed: {films}")
        begun, pixels = time.perf_counter(), read_pictures(image, n)
        self.tell("encoding the image")
        free = None if mask is None else read_masks(mask, n, pixels.shape[1:3], self.sides)
        latents = self._encoded(self._resized(pixels))
        self.seconds["image"] = time.perf_counter() - begun
        every = lambda a: np.broadcast_to(a, (n, *a.shape[1:]))  # noqa: E731
        if free is None:
            return every(latents), None
        rows, columns = (np.arange(n) * of // n for n, of in zip(shape[-3:-1], self.sides, strict=True))
        return every(latents), every(free[:, rows][:, :, columns, None])

    def strength(self, mask: Any) -> float:
        """Share of the steps that is made from an image where none is given."""
        return self.recipe.strength[mask is not None]

    def begins(self, model: Model, image: Any, n: int) -> dict[str, np.ndarray]:
        """What a network of image-to-video is told of the picture that its film begins with: of `BEGUN` the leaves
        [1 or n, ...] that its condition has.

        condition: latents of the film of that picture and of grey frames, behind channels of a mask, 1 in the first;
        image: its states before the last layer of the image encoder; first_frame: its own latents.

        Raises:
          ValueError: no image, what is none, or a network whose condition has other channels.
        """
        if image is None:
            raise ValueError(f"{self.folder.name} begins a film with a picture; give --image FILE (image=...)")
        begun, pixels = time.perf_counter(), read_pictures(image, n)
        self.tell("encoding the image")
        film, found = self._resized(pixels)[:, None], {}
        if "condition" in model.cond:
            later = ((0, 0), (0, self.section["frames"] - 1), (0, 0), (0, 0), (0, 0))
            latents = self._encoded(film, later)
            told = np.zeros((*latents.shape[:-1], self._opened("vae")[0].time), np.float32)
            told[:, 0] = 1.0
            found["condition"] = np.concatenate([told, latents], -1)
        if "first_frame" in model.cond:
            found["first_frame"] = self._encoded(film)[:, 0]
        if "image" in model.cond:
            found["image"] = self._seen(pixels)
        for name, array in found.items():
            if array.shape[1:] != model.cond[name].shape:
                raise ValueError(
                    f"{self.folder.name}: {name} of {list(array.shape[1:])} by its autoencoder and image encoder; "
                    f"allowed: {list(model.cond[name].shape)}, as {model.name} takes it"
                )
        self.seconds["image"] = time.perf_counter() - begun
        return found

    def _seen(self, pixels: np.ndarray) -> np.ndarray:
        """States [m, tokens, D] of the image encoder."""
        kind = self.folder.components["image_encoder"]
        encoder, said = find_encoder(self.folder.component("image_encoder"), kind=kind), {}
        if "image_processor" in self.folder.components:
            place = self.folder.component("image_processor") / PROCESSOR
            said = read_object(place, "what prepares pictures for the image encoder")
        given = preprocessed(pixels, said)
        return np.asarray(image_states(encoder, given, (-2,))[-2], np.float32)

    @property
    def sides(self) -> tuple[int, int]:
        """(height, width) of the pictures in pixels."""
        return self.section["height"], self.section["width"]

    def _resized(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 [m, ...] of any size as float32 [m, *sides, 3] in [-1, 1]."""
        return np.stack([resized(a, self.sides) for a in pixels]).astype(np.float32) / np.float32(127.5) - 1

    def _encoded(self, pixels: np.ndarray, later: Any = None) -> np.ndarray:
        """Latents of pixels [m, (F,) H, W, 3], one after another. later: zeros around each, as `jax.numpy.pad` has it,
        with the axis of pictures."""
        autoencoder, params = self._opened("vae")
        key = "encode", pixels.shape[1:], later
        if key not in self._programs:
            zeros = (lambda x: x) if later is None else (lambda x: jnp.pad(x, later))
            self._programs[key] = jax.jit(lambda params, x: autoencoder.encode(params, zeros(x)))
        one = lambda x: np.asarray(self._programs[key](params, jnp.asarray(x[None])), np.float32)[0]  # noqa: E731
        return np.stack([one(x) for x in pixels])

    def channels_last(self, latents: np.ndarray, shape: tuple[int, ...], lead: int = 1) -> np.ndarray:
        """Latents in the layout of difax, from diffusers' [..., C, (F,) H, W] or packed tokens; others are as they are.

        Args:
          shape: of one sample's latents. lead: axes in front of them.
        """
        own = latents.shape[lead:]
        if own == shape or latents.ndim <= lead:
            return latents
        if own == (shape[-1], *shape[:-1]):
            return np.moveaxis(latents, lead, -1)
        p = self.recipe.patch
        *_, h, w, c = shape
        if self.recipe.packed and own == (h // p * (w // p), c * p * p):
            found = latents.reshape(*latents.shape[:lead], h // p, w // p, c, p, p)
            k = lead
            order = (*range(k), k, k + 3, k + 1, k + 4, k + 2)
            return found.transpose(order).reshape(*latents.shape[:lead], *shape)
        return latents

    def spent(self) -> dict[str, float]:
        """Seconds of the stages, for a run's table."""
        return {f"{stage}_seconds": round(seconds, 3) for stage, seconds in self.seconds.items()}

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """Latents [n, (F,) h, w, C] of the network as pictures [n, (F',) H, W, 3] in [-1, 1], one after another."""
        begun = time.perf_counter()
        self.tell(f"decoding {len(latents)} {'film' if self.recipe.frames else 'picture'}{'s' * (len(latents) > 1)}")
        found = self._decoded(latents, *self._opened("vae"))
        self.seconds["decode"] = time.perf_counter() - begun
        return found

    def preview(self, latents: np.ndarray) -> np.ndarray:
        """Small pictures of latents, at most `SMALL` latents a side: every k-th of them, and of a film its first frame,
        by the small autoencoder that the section names, else by the pipeline's own."""
        stride = -(-max(latents.shape[-3:-1]) // SMALL)
        some = latents[..., ::stride, ::stride, :]
        some = some[:, :1] if self.recipe.frames else some
        found = self._decoded(some, *self._opened("preview" if self.section.get("preview") else "vae"))
        return found[:, 0] if found.ndim == 5 else found

    def _decoded(self, latents: np.ndarray, autoencoder: Autoencoder, params: Any) -> np.ndarray:
        key = "decode", autoencoder.name, latents.shape[1:]
        if key not in self._programs:
            self._programs[key] = jax.jit(lambda params, z: jnp.clip(autoencoder.decode(params, z), -1.0, 1.0))
        one = lambda z: np.asarray(self._programs[key](params, jnp.asarray(z[None])), np.float32)[0]  # noqa: E731
        return np.stack([one(z) for z in latents])


def begun_by_image(model: Model) -> bool:
    """Whether a network takes the picture that its film begins with."""
    return isinstance(model.cond, Mapping) and any(name in model.cond for name in BEGUN)


def network_of(section: Mapping[str, Any]) -> str:
    """The path of the denoiser's weights."""
    folder, recipe = open_pipeline(section["folder"], given_components(section))
    return os.fspath(folder.component(recipe.networks[0]))
