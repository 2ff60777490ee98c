"""Image data sets from idx files, and a loader whose batch is a pure function of (seed, step)."""

from __future__ import annotations

import gzip
import os
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import grain
import numpy as np

DEBIAN = pathlib.Path("/usr/share/datasets/fashion-mnist")
LABELS = (
    "t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip
SPLITS = {"train": "train", "test": "t10k"}


class Images(NamedTuple):
    """uint8 images [N, H, W, C] and int32 labels [N]."""

    image: np.ndarray
    label: np.ndarray


def fashion_mnist(split: str = "train", data_dir: str | os.PathLike | None = None) -> Images:
    """Fashion-MNIST: 60,000 training or 10,000 test images of 28 x 28 grey pixels in ten balanced classes.

    Args:
      split: "train" or "test".
      data_dir: folder of the four idx files (plain or .gz); None looks where the Debian package puts them.

    Raises:
      ValueError: unknown split, or a file that is no idx file of images or labels.
      FileNotFoundError: the files are not there; the message says the three ways to get them.

    References: Xiao, Rasul & Vollgraf, Fashion-MNIST, 2017, arXiv:1708.07747.
    """
    if split not in SPLITS:
        raise ValueError(f"fashion_mnist: split={split!r}; allowed: {', '.join(SPLITS)}")
    folder = pathlib.Path(data_dir) if data_dir else DEBIAN
    image = read_idx(_find(folder, f"{SPLITS[split]}-images-idx3-ubyte"), 3)
    label = read_idx(_find(folder, f"{SPLITS[split]}-labels-idx1-ubyte"), 1)
    if len(image) != len(label):
        raise ValueError(f"{folder}: {len(image)} {split} images but {len(label)} labels")
    return Images(image[..., None], label.astype(np.int32))


CLASS_NAMES = {"fashion_mnist": LABELS}
DATASETS: dict[str, Callable[..., Images]] = {"fashion_mnist": fashion_mnist}


def read_idx(path: pathlib.Path, dimensions: int) -> np.ndarray:
    """Reads a uint8 idx file, plain or .gz, of the given number of dimensions."""
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
            raw = file.read()
    except (gzip.BadGzipFile, EOFError) as error:
        raise ValueError(f"{path}: not a whole gzip file ({error})") from None
    if len(raw) < 4 + 4 * dimensions or raw[:4] != bytes([0, 0, 8, dimensions]):
        raise ValueError(f"{path}: not an idx file of bytes in {dimensions} dimensions")
    shape = np.frombuffer(raw, ">u4", dimensions, 4)
    body = raw[4 + 4 * dimensions :]
    if len(body) != int(np.prod(shape)):
        raise ValueError(f"{path}: {len(body)} bytes of data, but its header says {tuple(map(int, shape))}")
    return np.frombuffer(body, np.uint8).reshape(shape)


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
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(
        f"Fashion-MNIST file {name}[.gz] not found in {folder}. Three ways to get it: "
        "(1) apt-get install dataset-fashion-mnist; "
        "(2) git clone https://github.com/zalandoresearch/fashion-mnist, then --data fashion-mnist/data/fashion; "
        "(3) torchvision.datasets.FashionMNIST(ROOT, download=True), then --data ROOT/FashionMNIST/raw"
    )
