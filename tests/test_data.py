"""Data of one's own: folders of images and .npz files, held against the model, and the commands that take them."""

import json

import numpy as np
import pytest
from PIL import Image

import difax
from difax.cli import main
from difax.training.data import check_images, data_section, folder, npz
from difax.training.train import _first_difference, _fixed

CLASSES = ("circle", "dot", "square")
SMALL = ["--config.model.depth=1", "--config.model.width=16", "--config.model.size=8", "--config.model.channels=3"]
SMALL += ["--config.model.classes=3", "--config.train.steps=2", "--config.train.batch=8", "--config.train.warmup=0"]
SMALL += ["--config.train.devices=2"]


def coloured(rng, label: int, size: int = 8) -> np.ndarray:
    """A picture whose colour tells its class."""
    image = rng.integers(0, 60, (size, size, 3), dtype=np.uint8)
    image[2:6, 2:6, label] = 220
    return image


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """200 coloured PNGs in three classes, and their arrays by file."""
    root, rng, arrays = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0), {}
    for i in range(200):
        label = i % 3
        path = root / CLASSES[label] / f"{i:03d}.png"
        path.parent.mkdir(exist_ok=True)
        arrays[path] = coloured(rng, label)
        Image.fromarray(arrays[path]).save(path)
    return root, arrays


def test_sub_folders_are_classes_and_every_tenth_image_is_held_out(pictures):
    root, arrays = pictures
    train, test = folder(root), folder(root, "test")
    assert train.names == test.names == CLASSES
    assert len(train.image) + len(test.image) == 200
    by_class = [sorted(p for p in arrays if p.parent.name == name) for name in CLASSES]
    held = [p for of in by_class for p in of[9::10]]
    np.testing.assert_array_equal(test.image, [arrays[p] for p in held])
    np.testing.assert_array_equal(test.label, [CLASSES.index(p.parent.name) for p in held])
    assert sorted(map(bytes, train.image)) == sorted(bytes(a) for p, a in arrays.items() if p not in held)
    assert train.image.dtype == np.uint8 and train.label.dtype == np.int32


def test_own_splits_and_order_of_classes(tmp_path, pictures):
    _, arrays = pictures
    some = list(arrays.items())[:6]
    for split, items in {"train": some[:4], "test": some[4:]}.items():
        for path, array in items:
            target = tmp_path / split / path.parent.name / path.name
            target.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(target)
    assert len(folder(tmp_path).image) == 4 and len(folder(tmp_path, "test").image) == 2
    turned = folder(tmp_path, names=["square", "dot", "circle"])
    assert sorted(turned.label) == sorted(2 - folder(tmp_path).label)
    with pytest.raises(ValueError, match="square is no class; allowed: dot, circle"):
        folder(tmp_path, names=["dot", "circle"])


def test_formats_modes_and_sizes(tmp_path):
    rng = np.random.default_rng(1)
    grey = rng.integers(0, 255, (8, 8), dtype=np.uint8)
    Image.fromarray(grey).save(tmp_path / "a.png")
    assert folder(tmp_path).image.shape == (1, 8, 8, 1) and folder(tmp_path).names == ()
    np.testing.assert_array_equal(folder(tmp_path).image[0, ..., 0], grey)
    Image.fromarray(coloured(rng, 0)).save(tmp_path / "b.webp", lossless=True)
    Image.fromarray(coloured(rng, 1)).save(tmp_path / "c.JPG")
    found = folder(tmp_path)  # a grey one among coloured ones is repeated over the channels
    assert found.image.shape == (3, 8, 8, 3)
    np.testing.assert_array_equal(found.image[0], np.repeat(grey[..., None], 3, -1))
    assert folder(tmp_path, channels=1).image.shape == (3, 8, 8, 1)
    seen_through = np.zeros((8, 8, 4), np.uint8)
    Image.fromarray(seen_through).save(tmp_path / "d.png")
    assert np.all(folder(tmp_path).image[3] == 255)
    Image.fromarray(np.zeros((20, 12, 3), np.uint8)).save(tmp_path / "e.png")
    with pytest.raises(ValueError, match=r"e.png: 20 x 12 x 3, but .*a.png is 8 x 8 x 3; allowed: .*data.size=SIDE"):
        folder(tmp_path)
    assert folder(tmp_path, size=6).image.shape == (5, 6, 6, 3)
    (tmp_path / "f.png").write_text("no image")
    with pytest.raises(ValueError, match="f.png"):
        folder(tmp_path, size=6)


def test_npz(tmp_path):
    image = np.arange(20 * 4 * 4, dtype=np.uint8).reshape(20, 4, 4)
    np.savez(tmp_path / "a.npz", images=image, labels=np.arange(20) % 2, names=np.asarray(["no", "yes"]))
    train, test = npz(tmp_path / "a.npz"), npz(tmp_path / "a.npz", "test")
    np.testing.assert_array_equal(test.image[..., 0], image[9::10])
    assert train.image.shape == (18, 4, 4, 1) and train.names == ("no", "yes") and test.label.tolist() == [1, 1]
    np.savez(tmp_path / "b.npz", images=image, test_images=image[:3])
    assert len(npz(tmp_path / "b.npz").image) == 20 and len(npz(tmp_path / "b.npz", "test").image) == 3
    for name, arrays in {
        "float": {"images": image.astype(np.float32)},
        "none": {"pictures": image},
        "labels": {"images": image, "labels": np.zeros(3, np.int64)},
        "negative": {"images": image, "labels": np.full(20, -1)},
    }.items():
        np.savez(tmp_path / f"{name}.npz", **arrays)
        with pytest.raises(ValueError, match=f"{name}.npz.*allowed"):
            npz(tmp_path / f"{name}.npz")


def test_the_model_must_fit_the_data():
    images = difax.Images(np.zeros((4, 8, 8, 3), np.uint8), np.asarray([0, 1, 2, 2], np.int32))
    check_images(images, (8, 8, 3), 3)
    wanted = "8 x 8 x 3, the model takes 28 x 28 x 1; allowed: --config.model.size=8 --config.model.channels=3"
    with pytest.raises(ValueError, match=wanted):
        check_images(images, (28, 28, 1), 10)
    with pytest.raises(ValueError, match="3 classes, the model 2; allowed: --config.model.classes=3"):
        check_images(images, (8, 8, 3), 2)


def test_what_data_names(tmp_path, data_dir, pictures):
    root, _ = pictures
    assert data_section(str(data_dir), {}) == {"name": "fashion_mnist", "data_dir": str(data_dir)}
    kept = data_section(str(root), {"name": "folder", "path": "elsewhere", "size": 8})
    assert kept == {"name": "folder", "path": str(root), "size": 8}
    assert data_section(str(root), {"name": "fashion_mnist"}) == {"name": "folder", "path": str(root)}
    np.savez(tmp_path / "a.npz", images=np.zeros((2, 4, 4), np.uint8))
    assert data_section(str(tmp_path / "a.npz"), {})["name"] == "npz"
    (tmp_path / "a.txt").touch()
    with pytest.raises(ValueError, match="a folder of images"):
        data_section(str(tmp_path / "a.txt"), {})


@pytest.mark.slow
def test_a_folder_of_images_from_training_to_pareto(pictures, tmp_path, monkeypatch, capsys):
    """`difax train --data FOLDER`, `difax sample` from the run alone, with its class names, `difax pareto --data`."""
    root, _ = pictures
    monkeypatch.chdir(tmp_path)
    train = ["train", "--config", "fmnist_smoke", "--data", str(root), "--workdir", "run", "--quiet"]
    assert main(train) == 2  # the shipped geometry does not fit, and the line says what does
    err = capsys.readouterr().err
    assert "--config.model.size=8 --config.model.channels=3" in err and not (tmp_path / "run").exists()
    assert main([*train, *SMALL, "--log", "steps.jsonl"]) == 0
    steps = [json.loads(line) for line in (tmp_path / "steps.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps] == [1, 2] and steps[0]["loss"] > 0
    assert json.loads((tmp_path / "run" / "config.json").read_text())["data"]["names"] == list(CLASSES)
    capsys.readouterr()
    sample = ["sample", "--weights", "run", "--labels", "square,dot", "--steps", "2", "--json"]
    assert main([*sample, "--out", "images"]) == 0
    table = json.loads(capsys.readouterr().out)
    assert table["images"] == 2 and table["weights"] == "run (step 2, EMA)" and table["model"] == "dit-1x16/4"
    assert np.asarray(Image.open("images/00000.png")).shape == (8, 8, 3)
    pareto = ["pareto", "--weights", "run", "--data", str(root), "--methods", "fora", "--seeds", "4", "--batch", "4"]
    assert main([*pareto, "--turns", "1", "--config.steps=4", "--out", "sweep", "--json"]) == 0
    out, err = capsys.readouterr()
    rows = {row["method"]: row for row in json.loads(out)}
    assert rows["fora"]["cost"]["ratio"] > 1 and "there is no judge of these images" in err
    assert rows["fora"]["command"].startswith("difax sample --weights run --config.steps=4 --config.cache.name=fora")
    again = difax.load("run", cache="fora", steps=4).sample("circle")
    assert again.cond.tolist() == [0] and again.images.shape == (1, 8, 8, 3)
    # the same folder at another place is the same data set, and any other difference is not
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    for key, value, other in (("path", "moved", False), ("size", 9, True)):
        moved = {**config, "data": {**config["data"], key: value}}
        assert (_first_difference(_fixed(config), _fixed(moved)) is not None) == other


def test_a_judge_of_ones_own(pictures, tmp_path, monkeypatch, capsys):
    """A factory in a file, called with the training and the test images."""
    root, _ = pictures
    monkeypatch.chdir(tmp_path)
    (tmp_path / "judging.py").write_text(
        "import jax.numpy as jnp, difax\n"
        "from difax.study.judge import judge_of\n"
        "def colours(train, test):\n"
        "    assert train.image.shape[1:] == (8, 8, 3) and len(test.image) == 18\n"
        "    mean = lambda params, x: 1 + x.mean((1, 2))\n"
        "    tell = lambda params, features: features\n"
        "    shape = train.image.shape[1:]\n"
        "    return judge_of(difax.Classifier('c', lambda key: {}, mean, tell, shape, 3, 3), {}, train, test)\n"
        "def nothing(train, test):\n"
        "    return 3\n"
    )
    small = {"depth": 1, "width": 16, "size": 8, "channels": 3, "classes": 3}
    run = difax.load("fmnist_smoke", weights="random", model=small)
    from difax.weights.checkpoint import save_safetensors

    config = {**run.config, "weights": None, "steps": 2}
    save_safetensors("w.safetensors", run.params, {"config": config})
    pareto = ["pareto", "--weights", "w.safetensors", "--data", str(root), "--methods", "fora", "--seeds", "4"]
    pareto += ["--batch", "4", "--turns", "1", "--config.steps=2", "--quiet", "--json"]
    assert main([*pareto, "--out", "a", "--judge", "judging.py:colours"]) == 0
    rows = {row["method"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["real images"]["quality"]["agreement"][0] == 1.0  # colours tell the classes apart
    assert "agreement" in rows["fora"]["quality"]
    assert main([*pareto, "--out", "b", "--judge", "judging.py:nothing"]) == 2
    assert "judge judging.py:nothing made a int; allowed: a Judge" in capsys.readouterr().err
    assert main([*pareto, "--out", "b", "--judge", "nowhere"]) == 2
    assert "unknown judge 'nowhere'" in capsys.readouterr().err
