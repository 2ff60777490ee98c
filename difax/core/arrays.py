"""Files of arrays, .npz and .npy: their headers are read first, then as many bytes as those promise."""

from __future__ import annotations

import contextlib
import io
import math
import os
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from difax.core.files import named, opened, why
from difax.core.writing import replacing

ARRAYS = 2**30  # bytes of all arrays of a file
UNPACKED = 4  # times its place on the disk, where a file of arrays may be larger than that
MEMBERS = 10_000  # of an .npz
DIRECTORY = 4 * 2**20  # bytes of the directory of an .npz
PIECE = 2**20  # bytes that are read at a time


def unpacked_limit(file: BinaryIO) -> int:
    """Bytes that the arrays of a data set may take: `ARRAYS`, or `UNPACKED` times what the file has on the disk."""
    return max(ARRAYS, UNPACKED * 512 * os.fstat(file.fileno()).st_blocks)


class Stored(NamedTuple):
    """An array of a file that is open, known by its header: `read` reads it, and refuses what is no whole array of
    numbers or texts of that shape, or too large."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]


@contextlib.contextmanager
def opened_arrays(
    path: str | os.PathLike, allowed: str = "an .npz file", limit: Callable[[BinaryIO], int] | int = ARRAYS
) -> Iterator[dict[str, Stored]]:
    """The arrays of an .npz file by name, or that of an .npy file under the name ""; by the bytes, not the suffix.

    Only headers are read: an array is read by its `Stored.read`, as many bytes as its header promises.

    Args:
      allowed: what the file should be, in words.
      limit: bytes of all arrays that are read, or a function of the open file, such as `unpacked_limit`.

    Raises:
      ValueError: as `opened`; no .npz or .npy file, or one that is damaged (names the array).
    """
    with opened(path, allowed) as file:
        left = [limit if isinstance(limit, int) else limit(file)]
        start = file.read(6)
        file.seek(0)
        fault = lambda text: ValueError(f"{named(path)}: {text}; allowed: {allowed}")  # noqa: E731
        if start == np.lib.format.MAGIC_PREFIX:
            size = os.fstat(file.fileno()).st_size
            yield {"": _stored(lambda: _rewound(file), size, "the array", left, fault)}
            return
        if start[:4] not in (b"PK\x03\x04", b"PK\x05\x06"):
            raise fault("empty" if not start else "neither a zip of arrays nor an .npy file")
        try:
            _check_directory(file)
            with _unzipped(lambda: zipfile.ZipFile(file)) as archive:
                found = {}
                for info in archive.infolist():
                    name, dot, _ = info.filename.rpartition(".npy")
                    if not dot or not name or name in found:
                        what = "twice" if name in found else "which is no name of an array"
                        raise fault(f"it holds {info.filename[:80]!r}, {what}")
                    if info.flag_bits & 1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                        how = "encrypted" if info.flag_bits & 1 else "compressed in another way than .npz files are"
                        raise fault(f"its array {name!r} is {how}")
                    member = lambda info=info: _unzipped(lambda: archive.open(info))  # noqa: E731
                    found[name] = _stored(member, info.file_size, f"its array {name[:80]!r}", left, fault)
                yield found
        except _DAMAGE as error:
            raise fault(f"a damaged zip ({why(error)})") from None


# what zipfile raises where a file is damaged
_DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, struct.error, UnicodeError)


def _unzipped(call: Callable[[], Any]) -> Any:
    """What zipfile gives; whatever it says of a damaged file is a BadZipFile."""
    try:
        return call()
    except (*_DAMAGE, OSError, MemoryError):
        raise
    except Exception as error:
        raise zipfile.BadZipFile(why(error)) from None


@contextlib.contextmanager
def _rewound(file: BinaryIO) -> Iterator[BinaryIO]:
    file.seek(0)
    yield file


def _check_directory(file: BinaryIO) -> None:
    """Refuses a zip whose directory takes more memory than an .npz file has reason to, before it is read."""
    size = file.seek(0, io.SEEK_END)
    file.seek(max(0, size - 2**16 - 22))
    tail = file.read()
    at = len(tail) - 22 if tail[-22:-18] == b"PK\x05\x06" and tail[-2:] == b"\0\0" else tail.rfind(b"PK\x05\x06")
    if at < 0 or len(tail) < at + 22:
        raise zipfile.BadZipFile("it is cut off before its directory")
    members, length = struct.unpack_from("<H", tail, at + 10)[0], struct.unpack_from("<I", tail, at + 12)[0]
    large = at - 20 - 56  # where the directory's record for large files begins, if there is one
    if large >= 0 and tail[large : large + 4] == b"PK\x06\x06":
        members, length = struct.unpack_from("<QQ", tail, large + 32)
    if members > MEMBERS or length > DIRECTORY:
        raise zipfile.BadZipFile(f"a directory of {members:,} entries in {length:,} bytes; allowed: {MEMBERS:,}")
    file.seek(0)


def _stored(
    member: Callable[[], Any], size: int, what: str, left: list[int], fault: Callable[[str], ValueError]
) -> Stored:
    def header(file: Any) -> tuple[tuple[int, ...], bool, np.dtype, int]:
        try:
            version = np.lib.format.read_magic(file)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of files that Python 2 wrote
                if version == (1, 0):
                    shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
                elif version == (2, 0):
                    shape, fortran, dtype = np.lib.format.read_array_header_2_0(file)
                else:
                    raise ValueError(f"version {version} of the format")
        except (*_DAMAGE, OSError):
            raise
        except Exception as error:  # the header is a Python literal, and is read as one
            raise fault(f"the header of {what} is damaged ({why(error)})") from None
        if min(shape, default=0) < 0:
            raise fault(f"{what} has the shape {shape}")
        return shape, fortran, dtype, math.prod(shape) * dtype.itemsize

    with member() as file:
        shape, _, dtype, _ = header(file)

    def read() -> np.ndarray:
        with member() as file:
            shape, fortran, dtype, length = header(file)
            if dtype.kind not in "biufcUS" or dtype.itemsize == 0:
                raise fault(f"{what} is of the type {dtype}, not of numbers or texts")
            if length > left[0]:
                raise fault(f"{what} takes {length:,} bytes, more than {left[0]:,}")
            head = file.tell()
            if head + length != size:
                raise fault(f"{what} has {size - head:,} bytes, but its header says {dtype} {list(shape)}")
            left[0] -= length
            try:
                raw = np.empty(length, np.uint8)
            except MemoryError:
                raise fault(f"{what} takes {length:,} bytes, more than there are") from None
            done, view = 0, raw.data
            while done < length:
                got = file.readinto(view[done : done + PIECE])
                if not got:
                    raise fault(f"{what} is cut off after {done:,} of {length:,} bytes")
                done += got
            file.read(1)  # at its end a zip compares its checksum
        if dtype.kind == "b" and length and raw.max() > 1:
            raise fault(f"{what} has bytes that are neither true nor false")
        array = raw.view(dtype).reshape(shape, order="F" if fortran else "C")
        array = array.astype(dtype.newbyteorder("="), copy=False)
        if dtype.kind == "U" and length and np.ascontiguousarray(array).reshape(-1).view(np.uint32).max() > 0x10FFFF:
            raise fault(f"{what} has letters that are none")
        return array

    return Stored(shape, dtype, read)


def read_arrays(
    path: str | os.PathLike, allowed: str = "an .npz file", limit: Callable[[BinaryIO], int] | int = ARRAYS
) -> dict[str, np.ndarray]:
    """All arrays of an .npz file by name.

    Args:
      allowed, limit: as in `opened_arrays`.

    Raises:
      ValueError: as `opened_arrays`, or an .npy file.
    """
    with opened_arrays(path, allowed, limit) as found:
        if "" in found:
            raise ValueError(f"{named(path)}: one array without a name; allowed: {allowed}")
        return {name: array.read() for name, array in found.items()}


def read_comment(path: str | os.PathLike) -> str:
    """The comment of an .npz file's archive, "" for none.

    Raises:
      ValueError: as `opened_arrays`, or a comment that is no text.
    """
    with opened_arrays(path), opened(path) as file, zipfile.ZipFile(file) as archive:
        try:
            return archive.comment.decode()
        except UnicodeDecodeError:
            raise ValueError(f"{named(path)}: the comment of its archive is no text; allowed: UTF-8") from None


def check_finite(arrays: Mapping[str, np.ndarray], where: str) -> None:
    """Raises ValueError for the first array of floats that has NaN or an infinity."""
    for name, array in arrays.items():
        if array.dtype.kind in "fc" and not np.all(np.isfinite(array)):
            raise ValueError(f"{where}: {name} has values that are not finite; allowed: finite numbers")


def save_arrays(
    path: str | os.PathLike, arrays: Mapping[str, Any], compressed: bool = False, comment: str = ""
) -> None:
    """Writes an .npz file, which appears whole or not at all; equal arrays give equal bytes.

    Args:
      comment: of the archive, up to 64 KiB (`read_comment`).

    Raises:
      ValueError: the file cannot be written.
    """
    how = zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED
    with replacing(path) as aside, zipfile.ZipFile(aside, "w", how) as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, np.asanyarray(array), allow_pickle=False)
        archive.comment = comment.encode()
