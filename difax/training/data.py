"""Image data sets from files of one's own or published ones, and a loader whose batch is a function of (seed, step)."""

from __future__ import annotations

import contextlib
import gzip
import math
import os
import pathlib
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np

from difax.core.arrays import PIECE, opened_arrays, unpacked_limit
from difax.core.files import listed, named, opened, place_of, why
from difax.media.inputs import read_picture

DEBIAN = pathlib.Path("/usr/share/datasets/fashion-mnist")
LABELS = (
    "t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip
SPLITS = {"train": "train", "test": "t10k"}


class Images(NamedTuple):
    """uint8 images [N, H, W, C], int32 labels [N], and the names of the classes, or () where they have none."""

    image: np.ndarray
    label: np.ndarray
    names: tuple[str, ...] = ()


def fashion_mnist(split: str = "train", data_dir: str | os.PathLike | None = None) -> Images:
    """Fashion-MNIST: 60,000 training or 10,000 test images of 28 x 28 grey pixels in ten balanced classes.

    Args:
      split: "train" or "test".
      data_dir: folder of the four idx files (plain or .gz); None looks where the Debian package puts them.

    Raises:
      ValueError: unknown split, a file that is no idx file of images or labels, or labels of no class.
      FileNotFoundError: the files are not there; the message says the three ways to get them.

    References: Xiao, Rasul & Vollgraf, Fashion-MNIST, 2017, arXiv:1708.07747.
    """
    _check_split("fashion_mnist", split)
    where = pathlib.Path(data_dir) if data_dir else DEBIAN
    image = read_idx(_find(where, f"{SPLITS[split]}-images-idx3-ubyte"), 3)
    labels = _find(where, f"{SPLITS[split]}-labels-idx1-ubyte")
    label = read_idx(labels, 1)
    if len(image) != len(label):
        raise ValueError(f"{named(labels)}: {len(label)} labels of {len(image)} {split} images; allowed: one of each")
    if label.max() >= len(LABELS):
        first = int(np.argmax(label >= len(LABELS)))
        raise ValueError(f"{named(labels)}: label {label[first]} of image {first}; allowed: 0 to {len(LABELS) - 1}")
    return Images(image[..., None], label.astype(np.int32))


SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
TEST_SHARE = 10  # every tenth image is a test image where a data set says nothing itself


def folder(
    path: str | os.PathLike,
    split: str = "train",
    *,
    size: int | None = None,
    channels: int | None = None,
    names: Sequence[str] | None = None,
) -> Images:
    """A folder of .png, .jpg and .webp images; its sub-folders, in alphabetical order, are the classes.

    Where the folder has the sub-folders train and test, they are the splits; else every tenth image of each class, by
    name, is a test image.

    Args:
      path: of the folder. Images beside no sub-folder are one class.
      split: "train" or "test".
      size: cut images to their middle square and resize them to this side; None takes images of one size as they are.
      channels: 1 (grey) or 3; None is 1 where all images are grey, else 3.
      names: of the classes, in the order of their labels; None is that of the sub-folders.

    Raises:
      ValueError: no images, images of several sizes, a file that is no image, or sub-folders that are no classes.
      FileNotFoundError: no such folder.
    """
    _check_split("folder", split)
    root = pathlib.Path(path)
    if place_of(root) != "folder":
        raise FileNotFoundError(f"data folder {named(path)}: no such folder")
    if channels not in (None, 1, 3) or (size is not None and size < 1):
        raise ValueError(f"data folder: channels={channels}, size={size}; allowed: channels 1 or 3, size 1 or more")
    own_splits = all((root / name).is_dir() for name in ("train", "test"))
    root = root / split if own_splits else root
    classes = [p for p in listed(root) if p.is_dir() and not p.name.startswith(".")]
    found = tuple(p.name for p in classes) if names is None else tuple(map(str, names))
    unknown = [p.name for p in classes if p.name not in found]
    if unknown:
        raise ValueError(f"data folder {root}: {unknown[0]} is no class; allowed: {', '.join(found)}")
    files = [(f, found.index(c.name)) for c in classes for f in _pictures(c)] or [(f, 0) for f in _pictures(root)]
    if not own_splits:
        by_class = [[f for f in files if f[1] == label] for label in range(max(len(found), 1))]
        held = {f for of in by_class for f in of[TEST_SHARE - 1 :: TEST_SHARE]}
        files = [f for f in files if (f in held) == (split == "test")]
    if not files:
        raise ValueError(f"data folder {root}: no {split} images in it; allowed: {', '.join(SUFFIXES)}")
    read = [read_picture(f, size) for f, _ in files]
    wanted = channels or max(image.shape[-1] for image in read)
    same = [_with_channels(image, wanted) for image in read]
    for (file, _), image in zip(files, same, strict=True):
        if image.shape != same[0].shape:
            raise ValueError(
                f"{file}: {_shape(image)}, but {files[0][0]} is {_shape(same[0])}; allowed: images of one size, or "
                "data.size=SIDE, which resizes them"
            )
    return Images(np.stack(same), np.asarray([label for _, label in files], np.int32), found)


def npz(path: str | os.PathLike, split: str = "train", *, names: Sequence[str] | None = None) -> Images:
    """An .npz file: `images` uint8 [N, H, W, C] or [N, H, W], `labels` int [N] (all 0 without them).

    Every tenth image is a test image, or those under `test_images` and `test_labels`, if there; `names` are the
    classes', if there.

    Args:
      path: of the file. split: "train" or "test". names: of the classes, in the order of their labels.

    Raises:
      ValueError: a file that is no .npz, or arrays that are missing, of another type or shape.
      FileNotFoundError: no such file.
    """
    _check_split("npz", split)
    if place_of(path) is None:
        raise FileNotFoundError(f"data file {named(path)}: no such file")
    with opened_arrays(path, "an .npz file with an array named images", unpacked_limit) as stored:
        own_test = "test_images" in stored
        which = "test_images" if own_test and split == "test" else "images"
        wanted = (which, which.replace("images", "labels"), "names")
        image, label, own = (stored.get(name) for name in wanted)
        if image is None or image.dtype != np.uint8 or len(image.shape) not in (3, 4) or 0 in image.shape:
            has = ", ".join(f"{k} {a.dtype} {list(a.shape)}" for k, a in stored.items())
            raise ValueError(f"{named(path)} has {has[:400] or 'nothing'}; allowed: {which}, uint8 [N, H, W, C]")
        if label is not None and (label.shape != image.shape[:1] or label.dtype.kind not in "iu"):
            raise ValueError(
                f"{named(path)}: {wanted[1]} {label.dtype} {list(label.shape)}; allowed: int {list(image.shape[:1])}"
            )
        if own is not None and (len(own.shape) != 1 or own.dtype.kind != "U"):
            raise ValueError(f"{named(path)}: names {own.dtype} {list(own.shape)}; allowed: a list of texts")
        image, label, own = (None if a is None else a.read() for a in (image, label, own))
    assert image is not None
    image = image if image.ndim == 4 else image[..., None]
    label = np.zeros(len(image), np.int32) if label is None else label
    found = tuple(map(str, names)) if names is not None else () if own is None else tuple(map(str, own))
    most = len(found) - 1 if found else 2**31 - 2
    if label.min() < 0 or label.max() > most:
        wrong = label.min() if label.min() < 0 else label.max()
        raise ValueError(f"{named(path)}: {wanted[1]} hold {wrong}; allowed: 0 to {most}")
    if not own_test:
        held = np.arange(len(image)) % TEST_SHARE == TEST_SHARE - 1
        image, label = image[held == (split == "test")], label[held == (split == "test")]
    if not len(image):
        raise ValueError(f"{named(path)}: no {split} images; allowed: {TEST_SHARE} images or more, or test_images")
    return Images(image, label.astype(np.int32), found)


CLASS_NAMES = {"fashion_mnist": LABELS}
DATASETS: dict[str, Callable[..., Images]] = {"fashion_mnist": fashion_mnist, "folder": folder, "npz": npz}


def data_section(where: str, before: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration's section of the data set that lies somewhere.

    Args:
      where: a folder of Fashion-MNIST's four files, a folder of images, or an .npz.
      before: the section so far, whose other keys are kept where the data set is of the same kind.

    Raises:
      FileNotFoundError: nothing there. ValueError: something else.
    """
    path, place = pathlib.Path(where), place_of(where)
    published = before.get("name", "fashion_mnist") == "fashion_mnist"
    if place is None and not published:
        raise FileNotFoundError(f"--data {named(where)}: no such file or folder; allowed: {_DATA}")
    if place == "file" and path.suffix == ".npz":
        found = {"name": "npz", "path": where}
    elif place is None or place == "folder" and any("-ubyte" in p.name for p in listed(path)):
        found = {"name": "fashion_mnist", "data_dir": where}  # which says how to get it
    elif place == "folder":
        found = {"name": "folder", "path": where}
    else:
        raise ValueError(f"--data {named(where)}: allowed: {_DATA}")
    return {**(before if before.get("name") == found["name"] else {}), **found}


_DATA = "a folder of images (sub-folders are classes), an .npz, or the folder of Fashion-MNIST's files"


def check_images(images: Images, shape: tuple[int, ...], classes: int) -> None:
    """Refuses images of another size or channels than a model takes, and labels that it does not have.

    Args:
      shape: (H, W, C) of the model's input. classes: number of its labels.

    Raises:
      ValueError: with the settings that fit the model to the data.
    """
    there = images.image.shape[1:]
    if there != tuple(shape):
        side = there[0] if there[0] == there[1] else there[:2]
        raise ValueError(
            f"the data are {_shape(images.image[0])}, the model takes {' x '.join(map(str, shape))}; allowed: "
            f"--config.model.size={str(side).replace(' ', '')} --config.model.channels={there[2]}, or data.size and "
            "data.channels of a folder"
        )
    count = max(len(images.names), int(images.label.max()) + 1)
    if count > classes:
        raise ValueError(f"the data have {count} classes, the model {classes}; allowed: --config.model.classes={count}")


def _check_split(name: str, split: str) -> None:
    if split not in SPLITS:
        raise ValueError(f"{name}: split={split!r}; allowed: {', '.join(SPLITS)}")


def _pictures(folder: pathlib.Path) -> list[pathlib.Path]:
    return [p for p in listed(folder) if p.suffix.lower() in SUFFIXES and not p.name.startswith(".")]


def _with_channels(image: np.ndarray, channels: int) -> np.ndarray:
    if image.shape[-1] == channels:
        return image
    if channels == 3:
        return np.repeat(image, 3, axis=-1)
    from PIL import Image

    return np.asarray(Image.fromarray(image).convert("L"), np.uint8)[..., None]


def _shape(image: np.ndarray) -> str:
    return " x ".join(map(str, image.shape))


def read_idx(path: pathlib.Path, dimensions: int) -> np.ndarray:
    """Reads a uint8 idx file, plain or .gz, of the given number of dimensions; as many bytes as its header promises.

    Raises:
      ValueError: another file, one that is cut off or has more, or one that takes too much memory.
    """
    allowed = f"an idx file of bytes in {dimensions} dimensions"
    with opened(path, allowed) as raw:
        limit = unpacked_limit(raw)
        try:
            with gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else contextlib.nullcontext(raw) as file:
                head = file.read(4 + 4 * dimensions)
                if len(head) < 4 + 4 * dimensions or head[:4] != bytes([0, 0, 8, dimensions]):
                    file.read(PIECE)  # of a .gz that is cut off, that is the fault
                    raise ValueError(f"{named(path)}: {'not an idx file' if head else 'empty'}; allowed: {allowed}")
                shape = tuple(map(int, np.frombuffer(head, ">u4", dimensions, 4)))
                size = math.prod(shape)
                if not 0 < size <= limit:
                    raise ValueError(f"{named(path)}: its header says {shape}; allowed: 1 to {limit:,} bytes")
                body, piece = bytearray(), b" "
                while piece and len(body) <= size:  # a byte beyond the last, too: there a .gz compares its checksum
                    piece = file.read(min(PIECE, size + 1 - len(body)))
                    body += piece
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(f"{named(path)}: not a whole gzip file ({why(error)}); allowed: {allowed}") from None
    if len(body) != size:
        there = f"more than {size}" if len(body) > size else len(body)
        raise ValueError(f"{named(path)}: {there} bytes of data, but its header says {shape}; allowed: {allowed}")
    return np.frombuffer(bytes(body), np.uint8).reshape(shape)


def batches(size: int, batch: int, seed: int) -> Callable[[int], np.ndarray]:
    """Indices of batch number `step` of an endless, per-epoch reshuffled pass over `size` examples.

    The result depends on (seed, step) alone, so a resumed run sees what the uninterrupted one would have.

    Args:
      size: examples in the data set; batch: examples a batch, at most size; seed: of the shuffles.
    """
    if not 1 <= batch <= size:
        raise ValueError(f"batch={batch}; allowed: 1 ... {size}, the size of the data set")
    order = grain.MapDataset.range(size).seed(seed).shuffle().repeat().batch(batch)

    def at(step: int) -> np.ndarray:
        return np.asarray(order[step])

    return at


def _find(folder: pathlib.Path, name: str) -> pathlib.Path:
    for candidate in (folder / name, folder / f"{name}.gz"):
        if place_of(candidate) == "file":
            return candidate
    raise FileNotFoundError(
        f"Fashion-MNIST file {name}[.gz] not found in {folder}. Three ways to get it: "
        "(1) apt-get install dataset-fashion-mnist; "
        "(2) git clone https://github.com/zalandoresearch/fashion-mnist, then --data fashion-mnist/data/fashion; "
        "(3) torchvision.datasets.FashionMNIST(ROOT, download=True), then --data ROOT/FashionMNIST/raw"
    )
