"""The components around a denoiser: prompts to its conditions, its latents to pictures, pictures to latents."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from difax.core.contracts import Autoencoder, Model
from difax.models.autoencoders import find_autoencoder
from difax.pipelines.encode import check_prompts, conditions, encoded, warn_of_cuts
from difax.pipelines.image_in import read_masks, read_pictures, resized
from difax.pipelines.prompts import prompting
from difax.pipelines.recipes import open_pipeline
from difax.pipelines.section import COMPONENTS
from difax.weights.published import load_foreign

SMALL = 32  # latents a side of a preview


class Pipeline:
    """A folder as a run uses it; weights are read where they are needed, and dropped.

    section: `pipeline` of the run's configuration, filled up. seconds: of each stage of the last run.
    """

    def __init__(self, section: Mapping[str, Any]):
        given = {name: section[name] for name in COMPONENTS if section.get(name)}
        self.section = dict(section)
        self.folder, self.recipe = open_pipeline(section["folder"], given)
        self.seconds: dict[str, float] = {}
        self._autoencoders: dict[str, tuple[Autoencoder, Any]] = {}
        self._programs: dict[Any, Any] = {}

    def _opened(self, name: str) -> tuple[Autoencoder, Any]:
        if name not in self._autoencoders:
            path = self.section["preview"] if name == "preview" else self.folder.component(name)
            found = find_autoencoder(path)
            self._autoencoders[name] = found.model, load_foreign(path, found, jnp.float32)
        return self._autoencoders[name]

    def conditions(self, model: Model, prompts: Sequence[str], guided: bool) -> dict[str, np.ndarray]:
        """The condition [n] of prompts, warned of where a prompt is cut.

        Args:
          guided: is there an unconditional half, for the negative prompt.
        """
        begun, prompts = time.perf_counter(), check_prompts(prompts)
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
            raise ValueError(f"image: {self.folder.name} draws films; allowed: a pipeline of pictures")
        pixels = read_pictures(image, n)
        size, sides = pixels.shape[1:3], (self.section["height"], self.section["width"])
        free = None if mask is None else read_masks(mask, n, size)
        if size != sides:
            pixels = resized(pixels, sides)
        autoencoder, params = self._opened("vae")
        key = "encode", pixels.shape[1:]
        if key not in self._programs:
            self._programs[key] = jax.jit(autoencoder.encode)
        one = lambda x: np.asarray(self._programs[key](params, jnp.asarray(x[None])), np.float32)[0]  # noqa: E731
        latents = np.stack([one(x / np.float32(127.5) - 1) for x in pixels.astype(np.float32)])
        every = lambda a: np.broadcast_to(a, (n, *a.shape[1:]))  # noqa: E731
        if free is None:
            return every(latents), None
        rows, columns = (np.arange(n) * of // n for n, of in zip(shape[-3:-1], size, strict=True))
        return every(latents), every((free[:, rows][:, :, columns, None] >= 0.5).astype(np.float32))

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


def network_of(section: Mapping[str, Any]) -> str:
    """The path of the denoiser's weights."""
    folder, recipe = open_pipeline(section["folder"])
    return os.fspath(folder.component(recipe.networks[0]))
