"""Bounded readers and writers: what is no regular file, what unpacks to too much, and what cannot be written."""

import gzip
import json
import os
import re
import resource
import struct
import tracemalloc
import zipfile
import zlib

import numpy as np
import pytest
from PIL import Image

from difax.cli import main
from difax.core.arrays import ARRAYS, opened_arrays, read_arrays, save_arrays
from difax.core.files import check_object, makeable, named, read_json, read_rows, read_text, writable
from difax.core.writing import drop_cut_line
from difax.media.samples import check_output, read_latents, save_samples
from difax.study.folder import read_image_file, read_measured, read_sweep
from difax.study.networks import read_prompts, real_images
from difax.training.data import folder, npz, read_idx
from difax.training.train import read_run
from tests.families import some
from tests.test_fuzz_files import PARAMS, SPEC, planned, within

READERS = {
    "read_json": ("x.json", read_json),
    "read_rows": ("x.jsonl", read_rows),
    "read_text": ("x.txt", read_text),
    "read_arrays": ("x.npz", read_arrays),
    "latents": ("x.npz", lambda p: read_latents(str(p), 1, (4, 4, 1))),
    "npz": ("x.npz", npz),
    "idx": ("x", lambda p: read_idx(p, 1)),
    "idx.gz": ("x.gz", lambda p: read_idx(p, 1)),
    "a picture": ("x.png", lambda p: folder(p.parent)),
    "smoothcache": ("x.json", planned("smoothcache")),
    "harmonica": ("x.npz", planned("harmonica")),
    "icc": ("x.npz", planned("icc", period=2)),
    "tokencache": ("x.npz", planned("tokencache")),
    "real images": ("x.npz", lambda p: real_images(str(p), 2, None)),
    "prompts": ("x.txt", lambda p: read_prompts(str(p))),
    "sweep.json": ("sweep.json", lambda p: read_sweep(p.parent)),
    "rows.jsonl": ("rows.jsonl", lambda p: read_measured(p.parent)),
    "images of a sweep": ("x.npz", read_image_file),
    "config.json": ("config.json", lambda p: read_run(p.parent)),
}

PLACES = {
    "a pipe": os.mkfifo,
    "a folder": os.mkdir,
    "a link to itself": lambda path: os.symlink(path, path),
    "a device": lambda path: os.symlink("/dev/zero", path),
    "empty": lambda path: path.touch(),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("reader", READERS)
def test_what_is_no_file_is_refused_at_once_and_by_name(reader, place, tmp_path):
    name, read = READERS[reader]
    PLACES[place](tmp_path / name)
    if place == "empty" and reader in ("read_rows", "rows.jsonl", "read_text"):
        assert not read(tmp_path / name)  # nothing is there yet
        return
    with within(20), pytest.raises(ValueError) as raised:
        read(tmp_path / name)
    assert name in str(raised.value) or str(tmp_path) in str(raised.value)


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    (tmp_path / "x.json").write_text("{}")

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(ValueError, match=r"x\.json: cannot be read \(Permission denied\)"):
        read_json(tmp_path / "x.json")


def test_names_of_every_letter(tmp_path):
    long = tmp_path / ("q" * 300)
    with pytest.raises(ValueError, match="qqq.*File name too long"):
        read_json(long)
    for name in ("a\nb.json", os.fsdecode(b"a\xff.json")):
        (tmp_path / name).write_text("[")
        with pytest.raises(ValueError, match="line 1") as raised:
            read_json(tmp_path / name)
        assert str(raised.value).isprintable()
    assert named("a b.json") == "a b.json" and named("") == "''"


JSONS = {
    "empty": (b"", "empty"),
    "binary": (b"\xff\xfe\x00", "byte 0 is no UTF-8 text"),
    "zero": (b'{"a": "\0"}', "byte 7 is zero"),
    "cut": (b'{"a": [1, 2', "line 1"),
    "deep": (b"[" * 100_000, "nested deeper than 64"),
    "deep and whole": (b"[" * 65 + b"]" * 65, "nested deeper than 64"),
    "twice": (b'{"a": {"b": 1, "b": 2}}', "the key 'b' stands twice"),
    "nan": (b'{"a": {"b": [NaN]}}', "a.b is nan"),
    "infinity": (b'{"a": -Infinity}', "a is -inf"),
    "1e999": (b"[1e999]", "is inf"),
    "digits": (b"[" + b"9" * 5000 + b"]", "a whole number of 5000 digits"),
    "64 bits": (b'{"a": 99999999999999999999}', "a is a whole number beyond 64 bits"),
    "more": (b"{} {}", "Extra data"),
}


@pytest.mark.parametrize("case", JSONS)
def test_json(tmp_path, case):
    content, message = JSONS[case]
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(ValueError, match=rf"x\.json: .*{message}.*; allowed: "):
        read_json(tmp_path / "x.json")


def test_json_that_is_allowed(tmp_path):
    (tmp_path / "x.json").write_bytes(b"\xef\xbb\xbf" + b"[" * 64 + b"]" * 64)  # Windows writes a byte order mark
    assert read_json(tmp_path / "x.json") != []
    (tmp_path / "x.json").write_text('{"interval": [0.0, Infinity], "seed": 18446744073709551615}')
    assert read_json(tmp_path / "x.json", finite=False)["interval"][1] == float("inf")


def test_too_many_values(tmp_path):
    (tmp_path / "x.json").write_text("[" + "[]," * 5_000_000 + "[]]")
    with pytest.raises(ValueError, match=r"x\.json: more than 4,194,304 values"):
        read_json(tmp_path / "x.json")


def test_rows_broken_in_the_middle_and_at_the_end(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n{"a": 2, "b": 3}\n{"a": "\u00e4')
    path.write_bytes(path.read_bytes()[:-1])  # within a letter
    assert read_rows(path, a=int) == [{"a": 1}, {"a": 2, "b": 3}]
    drop_cut_line(path)
    assert path.read_text() == '{"a": 1}\n{"a": 2, "b": 3}\n'  # what is appended begins a line
    for broken, message in {
        '{"a": 1, ': r"line 2: line 1, column",
        "": "line 2: empty",
        "[1]": r"line 2: a list; allowed: an object with a",
        "{}": r"line 2: no 'a'; allowed: an object with a",
        '{"a": "1"}': r"line 2: 'a' is '1'; allowed: a whole number",
        '{"a": true}': r"line 2: 'a' is True; allowed: a whole number",
        '{"a": null}': r"line 2: 'a' is null; allowed: a whole number",
    }.items():
        path.write_text('{"a": 1}\n' + broken + '\n{"a": 3}\n')
        with pytest.raises(ValueError, match=rf"rows\.jsonl: {message}"):
            read_rows(path, a=int)


def test_kinds_of_keys():
    assert check_object({"a": 1, "more": []}, "x", a=float, b=(dict, type(None))) == {"a": 1, "more": []}
    for value, message in (([], "a list"), (None, "null"), ("text", "'text'"), (3, "3")):
        with pytest.raises(ValueError, match=f"x: {message}; allowed: an object with a"):
            check_object(value, "x", a=float, b=(dict, type(None)))


def hollow(shape, dtype="|u1") -> bytes:
    """The beginning of an .npy file that promises more than there is."""
    text = str({"descr": dtype, "fortran_order": False, "shape": shape}).encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text) + 1) + text + b"\n"


def npz_bomb(path) -> None:
    """8 GiB of zeros, of which 32 MiB are there."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        with archive.open("images.npy", "w", force_zip64=True) as file:
            file.write(hollow((8 << 30,)) + bytes(1 << 25))


def gzip_bomb(path) -> None:
    path.write_bytes(gzip.compress(bytes([0, 0, 8, 1]) + struct.pack(">I", 2**31) + bytes(1 << 22)))


def gzip_surplus(path) -> None:
    path.write_bytes(gzip.compress(bytes([0, 0, 8, 1]) + struct.pack(">I", 8) + bytes(1 << 26), 1))


def png_bomb(path) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    size = struct.pack(">IIBBBBB", 9000, 9000, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", zlib.compress(bytes(1 << 20))))


def sparse(path) -> None:
    with open(path, "wb") as file:
        file.write(hollow((8 << 30, 1, 1, 1)))
        file.truncate(file.tell() + (8 << 30))


def sparse_text(path) -> None:
    with open(path, "wb") as file:
        file.truncate(8 << 30)


def directory_bomb(path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(20_000):
            archive.writestr(f"{i}.npy", b"")


BOMBS = {
    "npz": ("x.npz", npz_bomb, read_arrays, "takes 8,589,934,592 bytes, more than 1,073,741,824"),
    "data.npz": ("x.npz", npz_bomb, npz, "allowed: images, uint8"),
    "gzip": ("x.gz", gzip_bomb, lambda p: read_idx(p, 1), "its header says .2147483648,.*allowed: 1 to"),
    "gzip with more": ("x.gz", gzip_surplus, lambda p: read_idx(p, 1), "more than 8 bytes"),
    "png": ("x.png", png_bomb, lambda p: folder(p.parent), "9000 x 9000 pixels"),
    "a file of holes": ("x.npy", sparse, lambda p: real_images(str(p), 2, None), "8,589,934,592 bytes, more than"),
    "a text of holes": ("x.json", sparse_text, read_json, "8,589,934,592 bytes; allowed"),
    "rows of holes": ("x.jsonl", sparse_text, read_rows, "8,589,934,592 bytes; allowed"),
    "many members": ("x.npz", directory_bomb, read_arrays, "20,000 entries"),
}


@pytest.mark.parametrize("name", some(BOMBS, *(set(BOMBS) - {"many members"})))
def test_what_unpacks_to_too_much_is_refused_by_its_header(name, tmp_path):
    file, make, read, message = BOMBS[name]
    make(tmp_path / file)
    tracemalloc.start()
    try:
        with within(20), pytest.raises(ValueError, match=message) as raised:
            read(tmp_path / file)
        assert tracemalloc.get_traced_memory()[1] < ARRAYS / 16
    finally:
        tracemalloc.stop()
    assert file in str(raised.value)


def test_arrays_round_trip_as_numpy_writes_them(tmp_path):
    arrays = {
        "a": np.arange(6.0).reshape(2, 3),
        "turned": np.asfortranarray(np.arange(6).reshape(2, 3)),
        "text": np.asarray("x"),
        "names": np.asarray(["a", "bc"]),
        "big": np.arange(4, dtype=">f4"),
        "none": np.zeros((0, 3)),
        "b/c": np.ones(1),
    }
    for compressed, write in ((False, np.savez), (True, np.savez_compressed)):
        save_arrays(tmp_path / "a.npz", arrays, compressed)
        write(tmp_path / "b.npz", **arrays)
        assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
        for name, array in read_arrays(tmp_path / "b.npz").items():
            np.testing.assert_array_equal(array, arrays[name])
            assert array.dtype == arrays[name].dtype.newbyteorder("=")
    np.save(tmp_path / "c.npy", arrays["turned"])
    with opened_arrays(tmp_path / "c.npy") as found:
        assert found[""].shape == (2, 3)
        np.testing.assert_array_equal(found[""].read(), arrays["turned"])
    with pytest.raises(ValueError, match="one array without a name"):
        read_arrays(tmp_path / "c.npy")


OUTPUTS = {
    "nothing": ("", "allowed: a name that ends in"),
    "blanks": ("  ", "allowed: a name that ends in"),
    "another suffix": ("x.bmp", "allowed: a name that ends in"),
    "a suffix alone": (".png", "allowed: a name that ends in"),
    "a file named as a folder": ("x.png/", "allowed: a name that ends in"),
    "a zero byte": ("a\0.png", "allowed: a name that ends in"),
    "under a file": ("file.png/x.png", "file.png is no folder"),
    "a folder": ("folder.png", "that is a folder"),
    "a pipe": ("pipe.png", "no regular file"),
    "nowhere": ("nowhere/x.png", "the folder nowhere does not exist"),
    "300 letters": ("q" * 300 + ".png", "a name of 304 bytes; allowed: up to 255"),
    "a link to nothing": ("link.png", "that is a link to nothing"),
    "where only the system writes": ("/proc/x.png", "the folder /proc is not writable"),
    "a folder of 300 letters": ("q" * 300 + "/x.png", "a name of 300 bytes; allowed: up to 255"),
    "bytes that are no text": ("\udcff.png", "a name that is no UTF-8 text"),
    "letters of three bytes": ("\u20ac" * 100 + ".png", "a name of 304 bytes"),
}


@pytest.mark.parametrize("case", OUTPUTS)
def test_where_nothing_can_be_written(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file.png").touch()
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "link.png").symlink_to("nowhere/x.png")
    path, message = OUTPUTS[case]
    for check in (lambda: writable(path, (".png",)), lambda: check_output(path)):
        with pytest.raises(ValueError, match=f"^--out .*{message}") as raised:
            check()
        assert str(raised.value).isprintable()
    if case != "nothing":  # the process's own flags are held against the same rule
        assert main(["sample", "--config", "fmnist_smoke", "--random-init", "--out", path]) == 2


FOLDERS = {
    "a file": ("file", "file is no folder"),
    "under a file": ("file/x", "file is no folder"),
    "a link to nothing": ("link", "link is no folder"),
    "under a link to nothing": ("link/x", "link is no folder"),
    "under a link to itself": ("loop/x", "cannot be read"),
    "where only the system writes": ("/proc/x", "the folder /proc is not writable"),
    "300 letters": ("q" * 300, "a name of 300 bytes; allowed: up to 255"),
    "bytes that are no text": ("\udcff", "a name that is no UTF-8 text"),
    "a zero byte": ("a\0b", "allowed: a name"),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_where_no_folder_can_be_made(case, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    path, message = FOLDERS[case]
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match=message) as raised:
        makeable(path)
    assert str(raised.value).isprintable()
    assert main(["train", "--config", "fmnist_smoke", "--workdir", path, "--data", "nothing"]) == 2
    assert re.search(message, capsys.readouterr().err) and sorted(tmp_path.iterdir()) == before


def test_folders_for_samples(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    (tmp_path / "file").touch()
    for path in ("full", "file", "."):
        with pytest.raises(ValueError, match="exists and is not an empty folder"):
            check_output(path)
    assert check_output("new").name == "new"
    with pytest.raises(ValueError, match="the name|a name that ends"):
        writable("new", (".png",))


@pytest.mark.parametrize("name", ["a.png", "a.npz", "a", "a.jpg", "a.webp", "a.gif"])
def test_a_full_disk_leaves_nothing(name, tmp_path, capfd):
    samples = np.random.default_rng(0).uniform(-1, 1, (2, 64, 64, 3)).astype(np.float32)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises((ValueError, OSError), match="cannot write"):
            save_samples(tmp_path / name, samples, 2, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--latents", "x.npz"], r"--latents x\.npz: neither a zip of arrays nor an \.npy file"),
        (["--latents", "pipe"], "--latents pipe: no regular file"),
        (["--cache", "smoothcache", "--config.cache.file=deep.json"], r"deep\.json.*nested deeper than 64"),
        (["--cache", "harmonica", "--config.cache.file=x.npz"], r"x\.npz: neither a zip"),
    ],
)
def test_commands_say_it_in_one_line(flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.npz").write_text("hello")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    os.mkfifo(tmp_path / "pipe")
    with within(60):
        assert main(["sample", "--config", "fmnist_smoke", "--config.steps=2", "--random-init", *flags]) == 2
    err = capsys.readouterr().err
    assert err.startswith("difax: error: ") and err.count("\n") == 1
    import re

    assert re.search(message, err), err


def test_a_sweep_of_another_shape(tmp_path):
    for content, message in {
        "[]": "a list; allowed: an object with config",
        "{}": "no 'config'",
        '{"config": null}': "'config' is null; allowed: an object",
        '{"config": {"model": []}}': "config.model: a list",
        '{"config": {"model": {"name": 3}}}': "'name' is 3; allowed: a text or null",
    }.items():
        (tmp_path / "sweep.json").write_text(content)
        with pytest.raises(ValueError, match=rf"sweep\.json: .*{message}"):
            read_sweep(tmp_path)


def test_a_run_of_another_shape(tmp_path):
    for content, message in {
        "[]": "a list; allowed: an object with train",
        '{"model": {"name": "dit"}}': "no 'train'",
        '{"model": {"name": "dit"}, "train": {}}': "train: no 'steps'",
        '{"model": {"name": "dit"}, "train": {"steps": "3"}}': "'steps' is '3'; allowed: a whole number",
        '{"model": {}, "train": {"steps": 3}}': "model: no 'name'",
    }.items():
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(ValueError, match=rf"config\.json: .*{message}"):
            read_run(tmp_path)


def test_pictures_of_other_kinds(tmp_path):
    grey = np.asarray([[0, 255, 256, 65535]], np.uint16)
    Image.fromarray(grey).save(tmp_path / "a.png")
    np.testing.assert_array_equal(folder(tmp_path).image[0, ..., 0], [[0, 0, 1, 255]])  # 16 bits: the upper ones
    Image.new("CMYK", (4, 1)).save(tmp_path / "a.jpg")
    (tmp_path / "a.png").unlink()
    assert folder(tmp_path).image.shape == (1, 1, 4, 3)
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.webp", save_all=True, append_images=frames[1:])
    with pytest.raises(ValueError, match=r"a\.webp: a moving picture; allowed: a picture \(PNG, JPEG, WEBP\)"):
        folder(tmp_path)
    (tmp_path / "a.webp").unlink()
    Image.new("RGB", (4, 1)).save(tmp_path / "a.png", format="GIF")
    with pytest.raises(ValueError, match=r"a\.png: no picture; allowed"):
        folder(tmp_path)


def test_labels_that_are_none(tmp_path):
    images = np.zeros((12, 4, 4), np.uint8)
    for name, arrays, message in (
        ("high", {"labels": np.full(12, 2**40)}, "labels hold 1099511627776; allowed: 0 to"),
        ("names", {"labels": np.arange(12), "names": np.asarray(["a", "b"])}, "labels hold 11; allowed: 0 to 1"),
        ("bytes", {"names": np.asarray([b"a"])}, "names .S1 .1.; allowed: a list of texts"),
    ):
        np.savez(tmp_path / f"{name}.npz", images=images, **arrays)
        with pytest.raises(ValueError, match=rf"{name}\.npz: {message}"):
            npz(tmp_path / f"{name}.npz")
    np.savez(tmp_path / "few.npz", images=images[:9])
    with pytest.raises(ValueError, match=r"few\.npz: no test images"):
        npz(tmp_path / "few.npz", "test")


def test_metadata_names_no_code_but_its_own_text(tmp_path):
    (tmp_path / "x.json").write_text(json.dumps({"name": "a:b"}))
    assert type(read_json(tmp_path / "x.json")["name"]).__name__ == "FromData"
    assert PARAMS.keys() == SPEC.keys()
