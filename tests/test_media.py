"""Pictures and films: what each format keeps, how they are laid out, and pictures that come in."""

import importlib.util
import resource
import sys

import numpy as np
import pytest
from PIL import Image

from difax.media.films import FILMS, film
from difax.media.images import to_uint8
from difax.media.inputs import read_image, read_mask
from difax.media.samples import SUFFIXES, check_output, save_samples

needs_av = pytest.mark.skipif(importlib.util.find_spec("av") is None, reason="PyAV is missing (the extra video)")
MOVING = [".gif", ".webp", pytest.param(".mp4", marks=needs_av)]


def ramps(frames: int | None = 5, n: int = 2, height: int = 64, width: int = 96) -> np.ndarray:
    """Smooth colours [n, frames, H, W, 3] in [-1, 1] that move from frame to frame; without frames [n, H, W, 3]."""
    i, f, y, x = np.meshgrid(
        np.arange(n), np.arange(frames or 1), np.linspace(0, 1, height), np.linspace(0, 1, width), indexing="ij"
    )
    colours = np.stack([np.sin(2 * x + f + i), np.cos(2 * y - f), np.sin(x + y + i)], -1).astype(np.float32)
    return 0.9 * (colours if frames else colours[:, 0])


def played(path) -> tuple[np.ndarray, list[float]]:
    """The frames of a film, uint8 [F, H, W, 3], and for how many milliseconds each is shown."""
    if path.suffix == ".mp4":
        import av

        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
            return np.stack(frames), [1000 / float(stream.average_rate or 0)] * len(frames)
    with Image.open(path) as moving:
        frames, delays = [], []
        for i in range(getattr(moving, "n_frames", 1)):
            moving.seek(i)
            moving.load()
            frames.append(np.asarray(moving.convert("RGB")))
            delays.append(moving.info.get("duration", 0))
        return np.stack(frames), delays


# mean difference of 255 that a format may make of smooth colours
LOSS = {".png": 0, ".jpg": 2, ".jpeg": 2, ".webp": 3, ".gif": 6, ".mp4": 3}


@pytest.mark.parametrize("suffix", MOVING)
@pytest.mark.parametrize("fps", [16, 24, 7.5])
def test_a_film(suffix, fps, tmp_path):
    """Frames, sides, colours and length; two videos run beside one another."""
    samples = ramps()
    save_samples(tmp_path / f"a{suffix}", samples, 2, {}, fps)
    frames, delays = played(tmp_path / f"a{suffix}")
    expected = np.stack(list(film(samples, 2)))
    assert frames.shape == expected.shape == (5, 68, 198, 3)
    np.testing.assert_array_equal(expected[:, 2:66, 2:98], to_uint8(samples[0]))
    np.testing.assert_array_equal(expected[:, 2:66, 100:196], to_uint8(samples[1]))
    difference = np.abs(frames.astype(float) - expected).mean((1, 2, 3))
    assert difference.max() <= LOSS[suffix] < np.abs(np.diff(expected.astype(float), axis=0)).mean()
    assert sum(delays) == pytest.approx(5000 / fps, abs={".gif": 5, ".webp": 1, ".mp4": 0.1}[suffix])


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".jpeg", ".webp"])
def test_a_picture(suffix, tmp_path):
    samples = ramps(None, height=96, width=100)
    save_samples(tmp_path / f"a{suffix}", samples, 2, {})
    with Image.open(tmp_path / f"a{suffix}") as image:
        assert image.format == {".png": "PNG", ".webp": "WEBP"}.get(suffix, "JPEG")
        found = np.asarray(image.convert("RGB"), float)
    assert found.shape == (100, 206, 3)
    assert np.abs(found[2:98, 2:102] - to_uint8(samples[0])).mean() <= LOSS[suffix]
    assert np.abs(found[2:98, 104:204] - to_uint8(samples[1])).mean() <= LOSS[suffix]


@needs_av
def test_colours_of_a_film(tmp_path):
    """Flat colours come back as they were, so that the matrix that a film is written with is the one that it names."""
    colours = np.asarray([(200, 50, 50), (30, 200, 60), (20, 40, 220), (255, 255, 255), (0, 0, 0)])
    samples = np.broadcast_to((colours / 127.5 - 1)[:, None, None, None].astype(np.float32), (5, 2, 32, 32, 3))
    save_samples(tmp_path / "out", samples, 1, {}, each=".mp4")
    for i, colour in enumerate(colours):
        frames, _ = played(tmp_path / "out" / f"{i:05d}.mp4")
        assert np.abs(frames - colour[None, None, None]).max() <= 4


@needs_av
def test_odd_sides_are_padded(tmp_path):
    """A row and a column stand twice, and nothing is scaled."""
    samples = ramps(3, 1, 31, 45)
    save_samples(tmp_path / "a.mp4", samples, 1, {})
    frames, _ = played(tmp_path / "a.mp4")
    assert frames.shape == (3, 32, 46, 3)
    assert np.abs(frames[:, :31, :45].astype(float) - to_uint8(samples[0])).mean() <= LOSS[".mp4"]


@pytest.mark.parametrize("suffix", MOVING)
def test_grey_and_single_frames(suffix, tmp_path):
    """Videos of one channel, and pictures in a film's format, which are films of one frame."""
    save_samples(tmp_path / f"grey{suffix}", ramps(3, 1)[..., :1], 1, {})
    frames, _ = played(tmp_path / f"grey{suffix}")
    assert frames.shape == (3, 64, 96, 3) and np.ptp(frames.astype(int), -1).max() <= 4
    if suffix != ".webp":  # which has pictures too
        save_samples(tmp_path / f"one{suffix}", ramps(None, 1), 1, {})
        assert played(tmp_path / f"one{suffix}")[0].shape == (1, 64, 96, 3)


@pytest.mark.parametrize(
    ("frames", "each", "names"),
    [
        (None, ".png", ["00000.png", "00001.png"]),
        (None, ".jpg", ["00000.jpg", "00001.jpg"]),
        (3, ".png", ["00000/00000.png", "00000/00001.png", "00000/00002.png", "00001/00000.png"]),
        (3, ".webp", ["00000.webp", "00001.webp"]),
        pytest.param(3, ".mp4", ["00000.mp4", "00001.mp4"], marks=needs_av),
    ],
)
def test_a_folder(frames, each, names, tmp_path):
    samples = ramps(frames)
    save_samples(tmp_path / "out", samples, 2, {}, 8, each)
    found = sorted(str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*.*"))
    assert found[: len(names)] == names and len(found) == 2 * (3 if "/" in names[0] else 1)
    if frames and each in FILMS:
        moving, _ = played(tmp_path / "out" / names[1])
        assert np.abs(moving.astype(float) - to_uint8(samples[1])).mean() <= LOSS[each]


REFUSED = {
    "a rate of 0": ("a.gif", 0, ".png", "fps=0; allowed: 1 to 120 frames a second"),
    "a rate of 121": ("a.webp", 121, ".png", "fps=121; allowed: 1 to 120"),
    "no number": ("a.webp", float("nan"), ".png", "fps=nan; allowed: 1 to 120"),
    "too fast a gif": ("a.gif", 60, ".png", "fps=60 of a .gif; allowed: up to 50"),
    "each": ("out", 16, ".bmp", "unknown suffix of files in a folder '.bmp'.*allowed: .png, .webp"),
    "a suffix": ("a.avi", 16, ".png", "--out a.avi: allowed: a name that ends in .png or .webp"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path, fps, each, message = REFUSED[case]
    with pytest.raises(ValueError, match=message) as raised:
        check_output(path, fps=fps, each=each)
    assert str(raised.value).isprintable() and not list(tmp_path.iterdir())
    assert all(check_output(f"a{suffix}", fps=50) for suffix in SUFFIXES if suffix != ".mp4")


def test_without_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    for path, each in ((tmp_path / "a.mp4", ".png"), (tmp_path / "out", ".mp4")):
        with pytest.raises(
            ValueError, match=r"a film \(\.mp4\) needs av, of the extra video: pip install 'difax\[video\]'"
        ):
            check_output(str(path), each=each)
    assert not list(tmp_path.iterdir())


def test_a_grid_without_room(tmp_path):
    with pytest.raises(ValueError, match=r"17004 x 96 pixels; allowed in \.webp: sides of up to 16383"):
        save_samples(tmp_path / "a.webp", np.zeros((1, 92, 17000, 1), np.float32), 1, {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", MOVING)
def test_a_film_on_a_full_disk_leaves_nothing(suffix, tmp_path):
    samples = np.random.default_rng(0).uniform(-1, 1, (1, 4, 64, 64, 3)).astype(np.float32)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for most in (1000, 8000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
        try:
            with pytest.raises((ValueError, OSError), match="cannot write"):
                save_samples(tmp_path / f"a{suffix}", samples, 1, {})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert list(tmp_path.iterdir()) == []


@needs_av
def test_a_film_that_breaks_leaves_nothing(tmp_path, monkeypatch):
    def broken(samples, columns):
        yield np.zeros((32, 32, 3), np.uint8)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("difax.media.samples.film", broken)
    with pytest.raises((ValueError, OSError), match="cannot write .*No space left"):
        save_samples(tmp_path / "a.mp4", ramps(), 1, {})
    assert not list(tmp_path.iterdir())


# ---- pictures that come in -----------------------------------------------------------------------------------


def test_an_image(tmp_path):
    colours = to_uint8(ramps(None, 1)[0])
    Image.fromarray(colours).save(tmp_path / "a.png")
    np.testing.assert_allclose(read_image(tmp_path / "a.png"), colours / 127.5 - 1, atol=1e-6)
    small = read_image(tmp_path / "a.png", (16, 24))
    theirs = np.asarray(Image.fromarray(colours).resize((24, 16), Image.Resampling.LANCZOS))
    np.testing.assert_allclose(small, theirs / 127.5 - 1, atol=1e-6)
    Image.fromarray(colours[..., 0]).save(tmp_path / "grey.png")
    grey = read_image(tmp_path / "grey.png")
    assert grey.shape == (64, 96, 3) and grey.dtype == np.float32 and not np.ptp(grey, -1).any()
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert (read_image(tmp_path / "clear.png") == 1).all()  # over white


def test_a_mask(tmp_path):
    levels = np.repeat(np.asarray([[0, 127, 128, 255]], np.uint8), 2, 0)
    Image.fromarray(levels).save(tmp_path / "m.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "m.png", like=(2, 4)), [[0, 0, 1, 1]] * 2)
    assert read_mask(tmp_path / "m.png", size=(4, 8)).shape == (4, 8)
    Image.fromarray(np.stack([levels] * 3, -1)).save(tmp_path / "colours.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "colours.png"), [[0, 0, 1, 1]] * 2)
    with pytest.raises(ValueError, match=r"m\.png: a mask of 4 x 2 pixels; allowed: 6 x 3, the size of its picture"):
        read_mask(tmp_path / "m.png", like=(3, 6))


def bad_pictures(folder) -> None:
    (folder / "text.png").write_text("no picture at all")
    (folder / "empty.png").touch()
    (folder / "folder.png").mkdir()
    frames = [Image.fromarray(f) for f in to_uint8(ramps()[0])]
    frames[0].save(folder / "moving.webp", save_all=True, append_images=frames[1:])
    frames[0].save(folder / "whole.png")
    (folder / "cut.png").write_bytes((folder / "whole.png").read_bytes()[:300])
    frames[0].save(folder / "x.bmp")
    Image.new("1", (9000, 9000)).save(folder / "large.png")


BAD = {
    "text.png": "no picture; allowed: a picture",
    "empty.png": "no picture; allowed: a picture",
    "folder.png": "a folder; allowed: a picture",
    "none.png": "no such file; allowed: a picture",
    "moving.webp": "a moving picture; allowed: a picture",
    "cut.png": "truncated.*; allowed: a picture",
    "x.bmp": "no picture; allowed: a picture",
    "large.png": "9000 x 9000 pixels; allowed: a picture .* of at most 67,108,864 pixels",
}


@pytest.mark.parametrize("read", [read_image, read_mask])
def test_what_is_no_picture(read, tmp_path):
    bad_pictures(tmp_path)
    for name, message in BAD.items():
        with pytest.raises(ValueError, match=message) as raised:
            read(tmp_path / name)
        assert name in str(raised.value) and str(raised.value).isprintable()
