"""The report of `difax pareto`: its data, its pictures, and the page in a browser where there is one."""

import base64
import html
import html.parser
import io
import json
import pathlib
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from difax.core.files import read_rows
from difax.study.frontier import BASELINE, CONTROL, frontier
from difax.study.methods import FAMILIES, METHODS
from difax.study.pareto import PSNR_LIMIT, slug
from difax.study.pareto_report import (
    COLUMNS,
    LOOKS,
    SHOWN_IMAGES,
    figure,
    published,
    read_images,
    report,
    sheet,
    sprites,
    write_report,
)

EVIL = "<script>document.title = 'taken'</script> & \"steps\" 'x' </script>"
EVALUATIONS, BLOCKS = 50, 12


def fake_row(name: str, family: str, settings: dict, rng: np.random.Generator, good: float, fast: float) -> dict:
    """A row of the schema of `difax.study.pareto`; its figures are made up."""
    spread = lambda value, by: [value, value - by, value + by]  # noqa: E731
    blocks = (100 * (rng.random((EVALUATIONS, BLOCKS)) < 1 / fast)).astype(int)
    blocks[:3] = 100
    share = float(blocks.mean() / 100)
    flops = fast * (1 + 0.3 * rng.random())
    return {
        "method": name,
        "family": family,
        "settings": settings,
        "calibrated": None,
        "command": " ".join(["difax sample", *(f"--config.{k}={v}" for k, v in settings.items()), "--seed 0"]),
        "evaluations": EVALUATIONS,
        "cost": {"gflops_per_image": 27.4 / flops, "ratio": flops, "gbytes_per_image": 1.7 / fast, "bytes_ratio": fast},
        "speed": {
            "seconds_per_image": 0.61 / fast,
            "baseline_seconds_per_image": 0.61,
            "ratio": fast,
            "turns": [fast * 0.97, fast, fast * 1.04],
            "realised": fast / flops,
            "compile_seconds": 2 + rng.random(),
            "shared_compilation": bool(rng.random() < 0.3),
            "peak_memory_mib": 180 + 40 * rng.random(),
        },
        "quality": {
            "psnr": spread(good, 0.9),
            "ssim": spread(1 - 2.5 / good, 0.01),
            "ms_ssim": spread(1 - 1.2 / good, 0.008),
            "relative_l1": spread(4 / good, 0.01),
            "relative_l2": spread(6 / good, 0.02),
            "agreement": [0.9 + 0.04 * rng.random(), 0.86, 0.96],
            "frechet": None,
            "kernel": spread(0.4 * rng.random() - 0.02, 0.08),
            "precision": spread(0.6 + 0.2 * rng.random(), 0.05),
            "recall": spread(0.5 + 0.2 * rng.random(), 0.05),
        },
        "decisions": {
            "strips": ["".join("F" if b.mean() > 99 else "." if b.mean() < 1 else "5" for b in blocks)] * 2,
            "blocks": blocks.tolist(),
            "computed_fraction": share,
        },
        "device": "cpu:cpu x2",
        "jax": "0.12.0",
        "date": "2026-11-21 18:00 UTC",
    }


def fake_images(rng: np.random.Generator, shape: tuple[int, ...], noise: float, base: np.ndarray | None) -> np.ndarray:
    if base is None:
        down, across = np.mgrid[0 : shape[-3], 0 : shape[-2]] / shape[-2]
        middle = rng.random((shape[0], 2, 1, 1)) * 0.4 + 0.3
        away = (down - middle[:, 0]) ** 2 + (across - middle[:, 1]) ** 2
        base = np.broadcast_to(255 * np.exp(-8 * away)[..., None], shape)
    return np.clip(base + rng.normal(size=shape) * noise, 0, 255).astype(np.uint8)


def fake_sweep(folder: pathlib.Path, methods: int = 70, images: int = 64) -> list[dict]:
    """A folder as `difax pareto` leaves it, of made-up figures: one refused, a hostile name, one without images."""
    rng = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    config = {"model": {"name": "dit"}, "solver": {"name": "euler"}, "steps": 50, "weights": "fmnist_dit"}
    sweep = {"config": config, "seeds": images, "batch": 16, "seed": 0, "device": "cpu:cpu x2", "jax": "0.12.0"}
    (folder / "sweep.json").write_text(json.dumps(sweep | {"judged": True}))
    rows = [fake_row(BASELINE, "baseline", {}, rng, PSNR_LIMIT, 1.0)]
    judged = {k: v for k, v in rows[0]["quality"].items() if k in ("agreement", "kernel", "precision", "recall")}
    rows.insert(0, {"method": CONTROL, "family": "control", "settings": {}, "quality": judged | {"frechet": None}})
    named = [*METHODS.items()][: methods - 1]
    for name, method in [*named, (EVIL, METHODS["fora 2"]._replace(settings={"cache.name": EVIL}))]:
        fast = float(np.exp(rng.uniform(-0.4, 1.9)))
        good = 42 - 7 * np.log(max(fast, 1.05)) - 14 * rng.random() ** 2
        rows.append(fake_row(name, method.family, method.settings, rng, good, fast))
        if method.family == "attention":
            rows[-1] = {k: rows[-1][k] for k in ("method", "family", "settings")} | {
                "refused": f"no tokens <b>{EVIL}</b>"
            }
    rows[-2]["quality"] = {**rows[-2]["quality"], "psnr": [None, None, None], "ssim": None}
    rows[-2]["not_finite"] = 3
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    base = fake_images(rng, (images, 28, 28, 1), 0, None)
    for row in rows:
        if "speed" not in row or row["method"] == "heun 8":
            continue
        noise = 0 if row["method"] == BASELINE else 12
        made = fake_images(rng, base.shape, noise, base.astype(float))
        np.savez_compressed(folder / "images" / f"{slug(row['method'])}.npz", images=made)
    return rows


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """(folder, its rows, its report)."""
    folder = tmp_path_factory.mktemp("sweep") / "pareto"
    rows = fake_sweep(folder)
    return folder, rows, write_report(folder, command=f"difax pareto {EVIL}").read_text()


class Elements(html.parser.HTMLParser):
    """What a page is made of: nesting, tags with attributes, and the text of its scripts."""

    VOID = ("meta", "input", "br", "img", "link")

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict]] = []
        self.scripts: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts[-1] += data


def embedded(text: str) -> dict:
    return json.loads(Elements(text).scripts[0])


def decoded(about: dict) -> list[np.ndarray]:
    """The images of one method, cut from its sheet."""
    kind, _, content = about["source"].partition(",")
    assert kind == "data:image/png;base64"
    sheet = np.asarray(Image.open(io.BytesIO(base64.b64decode(content))))
    h, w = about["height"], about["width"]
    return [sheet[i // COLUMNS * h :, i % COLUMNS * w :][:h, :w] for i in range(about["count"])]


def test_every_family_has_its_look():
    assert set(FAMILIES) == set(LOOKS)
    assert len({look.marker for look in LOOKS.values()}) == len(LOOKS) == len({look.light for look in LOOKS.values()})


def test_report_is_one_sound_page_that_asks_nothing_of_a_network(sweep):
    _, _, text = sweep
    page = Elements(text)
    assert text.startswith("<!doctype html>") and page.open == []
    assert "@@" not in text and len(text) < 5e6
    print(f"{len(text) / 1e6:.2f} MB")
    assert not re.findall(r"https?:|url\(|@import|import\(|fetch\(|XMLHttpRequest|WebSocket|\bsrc=|<link", text)
    policy = next(a["content"] for t, a in page.found if t == "meta" and "http-equiv" in a)
    assert "default-src 'none'" in policy and "img-src data:;" in policy
    ids = [a["id"] for _, a in page.found if "id" in a]
    assert len(ids) == len(set(ids))


def test_data_of_the_page_are_the_rows(sweep):
    folder, rows, text = sweep
    data = embedded(text)
    assert data["rows"] == rows == read_rows(folder / "rows.jsonl")
    assert data["sweep"] == json.loads((folder / "sweep.json").read_text())
    assert data["title"] == "dit (fmnist_dit), euler, 50 steps"
    assert "64 images each, 16 at a time" in data["facts"] and "2026-11-21 18:00 UTC" in data["facts"]


def test_names_are_never_markup(sweep):
    _, _, text = sweep
    page = Elements(text)
    assert len(page.scripts) == 2 and page.scripts[1].count("<script") == 0
    assert "<" not in page.scripts[0]
    data = embedded(text)
    assert any(r["method"] == EVIL for r in data["rows"]) and data["command"].endswith(EVIL)
    rows = [fake_row(BASELINE, "baseline", {}, np.random.default_rng(0), 50, 1)]
    named = report({"config": {"model": {"name": EVIL + "@@data@@"}}}, rows, {})
    assert len(Elements(named).scripts) == 2 and "&lt;script&gt;" in named.split("</title>")[0]


def test_sheets_hold_the_images(sweep):
    folder, rows, text = sweep
    images = embedded(text)["images"]
    kept = [r["method"] for r in rows if (folder / "images" / f"{slug(r['method'])}.npz").exists()]
    assert sorted(images) == sorted(kept) and "heun 8" not in images and len(kept) > 60
    for name in (BASELINE, "fora 3", EVIL):
        with np.load(folder / "images" / f"{slug(name)}.npz") as file:
            wanted = file["images"][..., 0]
        shown = decoded(images[name])
        assert len(shown) == SHOWN_IMAGES
        for a, b in zip(shown, wanted, strict=False):
            np.testing.assert_array_equal(a, b)


def test_sheets_of_colour_video_latents_and_large_images():
    rng = np.random.default_rng(0)
    colour = rng.integers(0, 256, (5, 6, 8, 3), np.uint8)
    video = rng.integers(0, 256, (3, 5, 6, 6, 3), np.uint8)
    latent = rng.integers(0, 256, (2, 4, 4, 4), np.uint8)
    large = np.repeat(np.repeat(rng.integers(0, 256, (4, 96, 48, 1), np.uint8), 2, 1), 2, 2)
    found = sprites({"colour": colour, "video": video, "latent": latent, "large": large})
    np.testing.assert_array_equal(decoded(found["colour"]), colour)
    np.testing.assert_array_equal(decoded(found["video"]), video[:, 2])
    np.testing.assert_array_equal(decoded(found["latent"]), latent[..., 0])
    np.testing.assert_array_equal(decoded(found["large"]), large[:, ::2, ::2, 0])
    notes = {k: v["note"] for k, v in found.items()}
    assert notes == {
        "colour": "",
        "video": "frame 3 of 5",
        "latent": "channel 1 of 4",
        "large": "shown at 48 of 96 pixels",
    }
    with pytest.raises(ValueError, match="float64"):
        sprites({"a": np.zeros((2, 4, 4, 1))})


def test_many_large_images_are_shown_in_part(monkeypatch):
    monkeypatch.setattr("difax.study.pareto_report.ROOM", 2 * 7 * 32 * 32 * 3)
    batch = np.random.default_rng(0).integers(0, 256, (16, 32, 32, 3), np.uint8)
    found = sprites({"a": batch, "b": batch})
    assert [v["count"] for v in found.values()] == [7, 7]
    monkeypatch.setattr("difax.study.pareto_report.ROOM", 1)
    assert sprites({"a": batch})["a"]["count"] == 5


def test_equal_sweeps_make_equal_bytes(sweep, tmp_path):
    folder, _, text = sweep
    again = write_report(folder, tmp_path / "again.html", command=f"difax pareto {EVIL}")
    assert again.read_text() == text and [p.name for p in tmp_path.iterdir()] == ["again.html"]


def test_what_cannot_be_reported_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no sweep\.json"):
        write_report(tmp_path)
    rows = fake_sweep(tmp_path / "sweep", 3, 2)
    with pytest.raises(ValueError, match="psnrr.*allowed: psnr"):
        write_report(tmp_path / "sweep", quality="psnrr")
    with pytest.raises(ValueError, match="nothing is measured"):
        report({}, [r for r in rows if "speed" not in r], {})
    (tmp_path / "sweep" / "images" / f"{slug('steps 35')}.npz").write_bytes(b"not a zip file")
    with pytest.raises(ValueError, match="no images of difax pareto"):
        write_report(tmp_path / "sweep")
    assert not (tmp_path / "sweep" / "report.html").exists()


def test_a_baseline_alone_has_its_pictures(tmp_path):
    """Where everything else was refused, or nothing was asked for."""
    pytest.importorskip("matplotlib")
    rows = [fake_row(BASELINE, "baseline", {}, np.random.default_rng(0), PSNR_LIMIT, 1.0)]
    rows.append({"method": "fora 2", "family": "cache", "settings": {}, "refused": "why"})
    rows[0]["quality"]["kernel"] = [float("nan"), 0.0, 1.0]  # as other code may write it: JSON has none
    figure(rows, "psnr", tmp_path / "a.png")
    sheet(rows, {BASELINE: np.zeros((2, 8, 8, 1), np.uint8)}, tmp_path / "b.png")
    assert embedded(report({"config": {}}, rows, {}))["rows"][0]["quality"]["kernel"] == [None, 0.0, 1.0]
    assert frontier(rows, "kernel") == []


def test_a_half_written_row_is_left_out(tmp_path):
    rows = fake_sweep(tmp_path / "sweep", 3, 2)
    with open(tmp_path / "sweep" / "rows.jsonl", "a") as file:
        file.write('{"method": "cut o')
    assert embedded(write_report(tmp_path / "sweep").read_text())["rows"] == rows


@pytest.mark.parametrize(("quality", "cost"), [("psnr", "seconds"), ("kernel", "flops")])
def test_figure(sweep, tmp_path, quality, cost):
    pytest.importorskip("matplotlib")
    _, rows, _ = sweep
    for name in ("one.png", "two.png")[: 1 + (quality == "psnr")]:
        figure(rows, quality, tmp_path / name, cost, "dit, euler, 50 steps")
    picture = np.asarray(Image.open(tmp_path / "one.png").convert("RGB"), np.uint32)
    assert picture.shape == (1080, 1800, 3)
    drawn = {f"#{c:06x}" for c in np.unique(picture @ np.asarray([2**16, 2**8, 1], np.uint32))}
    shown = {r["family"] for r in rows if "speed" in r} - {"baseline"}
    assert {LOOKS[f].light for f in shown} <= drawn and "attention" not in shown
    assert LOOKS["attention"].light not in drawn
    if quality == "psnr":
        assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()


def test_figure_refuses(sweep, tmp_path, monkeypatch):
    _, rows, _ = sweep
    with pytest.raises(ValueError, match="allowed: seconds, flops"):
        figure(rows, "psnr", tmp_path / "a.png", "bytes")
    with pytest.raises(ValueError, match="no row has 'frechet'"):
        figure(rows, "frechet", tmp_path / "a.png")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match=r"difax\[plot\]"):
        figure(rows, "psnr", tmp_path / "a.png")
    assert list(tmp_path.iterdir()) == []


def test_sheet(sweep, tmp_path):
    """Equal images differ by nothing, others by something, and both are where they belong."""
    pytest.importorskip("matplotlib")
    folder, rows, _ = sweep
    images = read_images(folder, rows)
    images["fora 2"], images["fora 3"] = images[BASELINE], 255 - images[BASELINE]
    sheet(rows, images, tmp_path / "sheet.png", methods=["fora 2", "fora 3"], heading="dit")
    picture = np.asarray(Image.open(tmp_path / "sheet.png").convert("L"), float)
    down, across = picture.shape
    assert across == 1800
    top, tall = 0.6 / (0.62 * 3 + 0.6), 0.62 / (0.62 * 3 + 0.6)
    for i, dark in enumerate((False, False, True)):  # baseline, equal, inverted
        rows_ = slice(int(down * (top + i * tall)) + 10, int(down * (top + (i + 1) * tall)) - 10)
        assert (picture[rows_, int(0.55 * across) : int(0.85 * across)].min() < 128) == dark
        assert picture[rows_, int(0.23 * across) : int(0.53 * across)].min() < 128
    sheet(rows, images, tmp_path / "frontier.png")
    with pytest.raises(ValueError, match="no images of heun 8"):
        sheet(rows, images, tmp_path / "none.png", methods=["heun 8"])
    assert not (tmp_path / "none.png").exists()


def test_systems_behind_a_method(sweep):
    """What the settings name, as the catalogue has it."""
    _, rows, page = sweep
    found = published(rows)
    assert [s["name"] for s in found["teacache 0.1"]] == ["TeaCache"]
    assert found["teacache 0.1"][0]["paper"] == "Liu et al., 2024, arXiv:2411.19108"
    assert {"DBCache", "FORA"} <= {s["name"] for s in found["dbcache F1 W4 0.12 MC3 + fora 2"]}
    assert "DPM-Solver++" in {s["name"] for s in found["dpmpp_2m 12"]} and "steps 25" not in found
    assert embedded(page)["systems"] == found


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
LISTEN = """<script>
window.told = [];
addEventListener("error", (event) => told.push(event.message));
addEventListener("unhandledrejection", (event) => told.push(String(event.reason)));
addEventListener("securitypolicyviolation", (event) => told.push(event.violatedDirective));
for (const kind of ["error", "warn"]) console[kind] = (...a) => told.push(a.join(" "));
</script>"""
# What a person does, by the events that a browser makes of it; `found` is what there is to see
PERFORM = """<script>
(async () => {
  const found = {told}, wait = (ms) => new Promise((r) => setTimeout(r, ms));
  const all = (selector) => [...document.querySelectorAll(selector)];
  const point = (name) => all(".point").find((p) => p.dataset.method === name);
  const click = (element) => element.dispatchEvent(new MouseEvent("click", {bubbles: true}));
  const press = (key) =>
    document.activeElement.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true, cancelable: true}));
  const figure = (cell) => (cell.firstChild ? cell.firstChild.textContent : ""); // its interval comes second
  const rows = () => all("#table tbody tr").map((tr) => [...tr.children].map(figure));
  const heads = () => all("#table thead th").map((th) => th.textContent);
  const names = () => all(".point").map((p) => p.dataset.method).sort();
  const dominated = () =>
    Object.fromEntries(all("#table tbody tr").map((tr) => [tr.dataset.method, tr.lastChild.textContent]));
  try {
    found.width = innerWidth;
    found.overflow = document.documentElement.scrollWidth - innerWidth;
    found.title = document.title;
    found.points = names();
    found.labels = all("#plot .name").map((t) => t.firstChild.data);
    found.line = all("#plot .control").length;
    found.dominated = dominated();
    found.refused = document.getElementById("refused").innerText;

    point("fora 3").dispatchEvent(new PointerEvent("pointermove", {bubbles: true}));
    found.card = document.getElementById("card").innerText;
    click(point("fora 3"));
    await wait(300);
    found.pinned = all(".point[aria-pressed=true]").map((p) => p.dataset.method);
    found.detail = document.getElementById("detail").innerText;
    found.panels = all("#detail .panels canvas").map((c) => ({
      label: c.getAttribute("aria-label"), painted: c.dataset.painted, shown: c.getBoundingClientRect().width,
      cell: [...c.getContext("2d").getImageData(0, 0, 28, 28).data].filter((_, i) => i % 4 === 0),
    }));
    found.heat = all("#detail canvas.heat").map((c) => {
      const d = c.getContext("2d").getImageData(0, 0, c.width, c.height).data;
      return {size: [c.width, c.height], filled: [...d].filter((v, i) => i % 4 === 3 && v === 255).length};
    });
    found.hash = location.hash;

    point("fora 3").focus();
    press("ArrowRight");
    found.next = document.activeElement.dataset.method;
    press("Enter");
    found.entered = all(".point[aria-pressed=true]").map((p) => p.dataset.method);
    press("Escape");
    found.left = all(".point[aria-pressed=true]").length;

    const sort = () => all("#table thead button").find((b) => b.dataset.key === "seconds");
    const state = () =>
      [sort().parentElement.getAttribute("aria-sort"), rows().map((r) => r[heads().indexOf("Seconds")])];
    found.sorted = [state()];
    click(sort());
    found.sorted.push(state());
    click(all("#table thead button").find((b) => b.dataset.key === "psnr"));
    found.psnr = rows().map((r) => r[heads().indexOf("PSNR")]);

    click(all("#every")[0]);
    found.heads = heads();
    const choose = document.getElementById("quality");
    found.qualities = [...choose.options].map((o) => o.value);
    choose.value = "kernel";
    choose.dispatchEvent(new Event("change"));
    click(all("input[value=flops]")[0]);
    found.kernel = dominated();
    found.line_kernel = all("#plot .control").length;
    found.numbers = all("#plot text, #plot line, #plot path").filter((e) => /NaN|undefined/.test(e.outerHTML)).length;
    click(all("#families input[value=cache]")[0]);
    found.without = names();
    found.scripts = document.scripts.length;
  } catch (error) { told.push(`${error} ${error.stack}`); }
  const pre = document.createElement("pre");
  pre.id = "found";
  pre.textContent = btoa(unescape(encodeURIComponent(JSON.stringify(found))));
  top.document.body.append(pre);
})();
</script>"""


@pytest.fixture(scope="module", params=[1280, 390], ids=["desk", "phone"])
def seen(request, sweep, tmp_path_factory):
    """What is to be seen on the page before and after a person's actions."""
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine")
    folder = tmp_path_factory.mktemp("browser")
    text = sweep[2].replace("<head>", f"<head>{LISTEN}", 1).replace("</body>", f"{PERFORM}</body>")
    if request.param < 500:  # no window is narrower than that
        text = f'<!doctype html><meta charset="utf-8"><body>{framed(text, request.param)}'
    (found,) = in_browser(folder, text)
    assert found["told"] == []
    return found


def framed(text: str, width: int) -> str:
    return f'<iframe style="border: 0; width: {width}px; height: 844px" srcdoc="{html.escape(text)}"></iframe>'


def in_browser(folder: pathlib.Path, text: str) -> list[dict]:
    """What a page and those in its frames found."""
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine")
    page = folder / "page.html"
    page.write_text(text)
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--enable-logging=stderr"]
    flags += [f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=10000", "--dump-dom"]
    command = [CHROMIUM, *flags, "--window-size=1280,900", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    shutil.rmtree(folder / "profile", ignore_errors=True)
    assert "CONSOLE" not in done.stderr, done.stderr[-2000:]
    contents = re.findall(r'<pre id="found">([^<]*)</pre>', done.stdout)
    assert contents, done.stdout[-2000:]
    return [json.loads(base64.b64decode(content)) for content in contents]


# Where names, bars and columns lie, for pages of few methods
MEASURE = """<script>
setTimeout(() => {
  const found = {told, width: innerWidth, struck: [], beyond: [], meeting: []};
  const all = (s) => [...document.querySelectorAll(s)];
  try {
    const plot = document.getElementById("plot"), names = all("#plot .name"), bars = all("#plot .bar");
    const box = (e) => { const b = e.getBBox(); return [b.x, b.y + 2, b.x + b.width, b.y + b.height - 2]; };
    const meet = (a, b) => a[0] < b[2] && b[0] < a[2] && a[1] < b[3] && b[1] < a[3];
    const line = (e) => ["x1", "y1", "x2", "y2"].map((k) => e[k].baseVal.value);
    const { min, max } = Math;
    const lines = bars.map(line).map(([a, b, c, d]) => [min(a, c), min(b, d), max(a, c), max(b, d)]);
    const wider = ([a, b, c, d]) => [a - 0.5, b - 0.5, c + 0.5, d + 0.5];
    const [w, h] = [plot.viewBox.baseVal.width, plot.viewBox.baseVal.height];
    found.names = names.map((t) => t.lastChild.textContent);
    for (const t of names) {
      const by = lines.find((l) => meet(box(t), wider(l)));
      if (by) found.struck.push([t.textContent, box(t), by]);
      if (names.some((o) => o !== t && meet(box(o), box(t)))) found.meeting.push(t.textContent);
    }
    found.beyond = lines.filter((l) => l[0] < 40 || l[2] > w - 12 || l[1] < 32 || l[3] > h - 46);
    found.bars = lines.length;
    found.lengths = lines.map((l) => Math.max(l[2] - l[0], l[3] - l[1]));
    const scroll = document.querySelector(".scroll"), heads = all("#table thead th");
    const edge = scroll.getBoundingClientRect().right;
    found.overflows = scroll.scrollWidth > scroll.clientWidth + 1;
    found.hint = document.getElementById("more").hidden ? "" : document.getElementById("more").textContent;
    found.seen = heads.filter((th) => th.getBoundingClientRect().right <= edge + 1).map((th) => th.textContent);
    scroll.scrollLeft = 150;
    found.first = heads[0].getBoundingClientRect().left - scroll.getBoundingClientRect().left;
    scroll.scrollLeft = 0;
  } catch (error) { told.push(`${error} ${error.stack}`); }
  const pre = document.createElement("pre");
  pre.id = "found";
  pre.textContent = btoa(unescape(encodeURIComponent(JSON.stringify(found))));
  top.document.body.append(pre);
}, 300);
</script>"""
FEW = ["fora 3", "dbcache F1 W4 0.12 MC3 taylor", "steps 12", "int8_w8a8", "taylorseer 3, order 1"]


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """What is to be seen of reports of none to five methods, on a desk and on a phone: {(methods, width): found}."""
    pages, order = [], []
    for count in range(len(FEW) + 1):
        rng = np.random.default_rng(count)
        rows = [fake_row(BASELINE, "baseline", {}, rng, PSNR_LIMIT, 1.0)]
        rows[0]["quality"]["psnr"] = [PSNR_LIMIT] * 3
        for i, name in enumerate(FEW[:count]):
            row = fake_row(name, METHODS[name].family, METHODS[name].settings, rng, 38 - 2.5 * i, 1.3 + 0.7 * i)
            row["quality"]["psnr"] = [38 - 2.5 * i, 35 - 2.5 * i, 42 - 2.5 * i]
            row["speed"]["turns"] = [0.8 * (1.3 + 0.7 * i), 1.2 * (1.3 + 0.7 * i)]
            rows.append(row)
        text = report({"config": {}}, rows, {}).replace("<head>", f"<head>{LISTEN}", 1)
        for width in (390, 1280):
            pages.append(framed(text.replace("</body>", f"{MEASURE}</body>"), width))
            order.append((count, width))
    found = in_browser(tmp_path_factory.mktemp("few"), f'<!doctype html><meta charset="utf-8"><body>{"".join(pages)}')
    assert len(found) == len(order)
    by_size = {(len(f["names"]) - 1, f["width"]): f for f in found}
    assert by_size.keys() == set(order) and all(f["told"] == [] for f in found)
    return by_size


def test_names_of_few_methods_are_struck_by_nothing_and_bars_stay_within(few):
    for (count, width), found in few.items():
        assert found["bars"] == 2 * (count + 1), (count, width)
        assert found["struck"] == found["meeting"] == found["beyond"] == [], (count, width)
        assert (
            count == 0 or sorted(found["lengths"])[2] > 5
        )  # they are there: all but those of the baseline have a length


def test_a_phone_shows_a_quality_and_says_that_the_table_goes_on(few):
    for (count, width), found in few.items():
        assert found["seen"][:2] == ["Method", "PSNR"], (count, width)
        assert found["overflows"] == ("more column" in found["hint"]) and abs(found["first"]) < 1
        assert width == 1280 or found["overflows"]


def judged_by(rows: list[dict], quality: str, cost: str) -> dict[str, str]:
    known = [r for r in rows if "speed" in r and (r["quality"][quality] or [None])[0] is not None]
    return {r["method"]: r["dominated_by"] or "" for r in frontier(known, quality, cost)}


def test_browser_shows_what_was_measured(seen, sweep):
    _, rows, _ = sweep
    wanted = judged_by(rows, "psnr", "seconds")
    assert seen["points"] == sorted(wanted)
    assert {n: d for n, d in seen["dominated"].items() if n in wanted} == wanted
    broken = [r["method"] for r in rows if r.get("not_finite")]
    assert [seen["dominated"][name] for name in broken] == ["3 images are not finite"]
    best = [n for n, d in wanted.items() if not d]
    if seen["width"] > 560:
        assert len(seen["labels"]) == len(best) and all(n[:30] in "\n".join(seen["labels"]) for n in best)
    else:
        assert seen["labels"] == [str(i + 1) for i in range(len(best))]
    assert seen["title"] == "dit (fmnist_dit), euler, 50 steps: quality and cost"
    assert seen["line"] == 0 and seen["line_kernel"] == 1 and seen["numbers"] == 0
    kernel = judged_by(rows, "kernel", "flops")
    told = {n: d for n, d in seen["kernel"].items() if n in kernel and n not in broken}
    assert told == {n: d for n, d in kernel.items() if n not in broken}
    assert "frechet" not in seen["qualities"] and "recall" in seen["qualities"] and "Recall" in seen["heads"]
    caches = [r["method"] for r in rows if r["family"] == "cache"]
    assert set(seen["without"]) == set(kernel) - set(caches) and caches


def test_browser_click_pins_a_method_with_its_images(seen, sweep):
    folder, rows, _ = sweep
    row = next(r for r in rows if r["method"] == "fora 3")
    assert "fora 3" in seen["card"] and ("cache.interval = 3" in seen["card"]) == (seen["width"] > 560)
    assert seen["pinned"] == ["fora 3"] and seen["hash"] in ("#method=fora%203", "")  # a frame has none
    assert seen["hash"] or seen["width"] == 390
    assert row["command"] in seen["detail"] and f"×{row['speed']['ratio']:.2f}" in seen["detail"]
    assert row["decisions"]["strips"][0] in seen["detail"]
    labels = ["16 images of the baseline", "16 images of fora 3", "their difference"]
    assert [p["label"] for p in seen["panels"]] == labels
    cells = [np.reshape(p["cell"], (28, 28)) for p in seen["panels"]]
    assert all(p["painted"] == "yes" and p["shown"] > 100 for p in seen["panels"])
    for cell, name in zip(cells, (BASELINE, "fora 3"), strict=False):
        with np.load(folder / "images" / f"{slug(name)}.npz") as file:
            np.testing.assert_array_equal(cell, file["images"][0, :, :, 0])
    factor = int(re.findall(r"Difference ×(\d+)", seen["detail"])[0])
    np.testing.assert_array_equal(cells[2], np.clip(128 + factor * (cells[1] - cells[0]), 0, 255))
    blocks = np.asarray(row["decisions"]["blocks"])
    assert seen["heat"] == [{"size": list(blocks.shape), "filled": int((blocks == 100).sum())}]


def test_browser_sorts_the_table(seen, sweep):
    _, rows, _ = sweep
    ratios = sorted(r["speed"]["ratio"] for r in rows if "speed" in r)
    wanted = [f"×{r:.2f}" for r in ratios]
    assert seen["sorted"] == [["descending", wanted[::-1]], ["ascending", wanted]]
    figures = [r["quality"]["psnr"][0] for r in rows if "speed" in r]
    known = sorted((f for f in figures if f is not None), reverse=True)
    texts = ["equal" if f == PSNR_LIMIT else f"{f:.1f}" for f in known]
    assert seen["psnr"] == texts + [""] * figures.count(None) and None in figures


def test_browser_obeys_the_keyboard(seen, sweep):
    _, rows, _ = sweep
    known = judged_by(rows, "psnr", "seconds")
    order = sorted((r["speed"]["ratio"], r["method"]) for r in rows if r["method"] in known)
    place = [n for _, n in order].index("fora 3")
    assert (
        seen["next"] == order[(place + 1) % len(order)][1] and seen["entered"] == [seen["next"]] and seen["left"] == 0
    )


def test_browser_fits_and_takes_names_as_text(seen):
    assert seen["width"] in (1280, 390) and seen["overflow"] <= 0
    assert EVIL in seen["dominated"] and EVIL in seen["refused"]
    assert seen["scripts"] == 4  # the page's two, and the test's
