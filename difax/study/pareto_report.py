"""The report of `difax pareto`: one HTML file that needs nothing else, and its scatter as PNG.

The page is `assets/pareto.html` with the sweep's folder in it: rows and sweep as JSON, images as PNG in data: URIs.
What a person or a configuration named is shown as text, never as markup, and the page forbids itself the network.
"""

from __future__ import annotations

import base64
import html
import importlib.resources
import io
import itertools
import json
import math
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from difax.core.files import place_of
from difax.core.writing import replacing
from difax.media.images import drawing, pictured
from difax.study.catalogue import System, systems
from difax.study.folder import read_image_file, read_measured, read_sweep
from difax.study.frontier import BASELINE, CONTROL, QUALITIES, finite, frontier
from difax.study.pareto import PSNR_LIMIT, slug

SHOWN_IMAGES, LEAST_IMAGES = 16, 5
CELL = 96  # pixels of an image's longer side, at most
ROOM = 48 * 2**20  # bytes of all images before compression, at most
COLUMNS = 4


class Look(NamedTuple):
    """How a family is drawn: colours on light and dark ground, that the colour-blind tell apart, and a marker."""

    light: str
    dark: str
    marker: str


LOOKS = {
    "steps": Look("#c2410c", "#f58a5b", "s"),
    "solver": Look("#946800", "#e0b040", "D"),
    "guidance": Look("#a8327d", "#e58cc4", "v"),
    "cache": Look("#0b5fa5", "#5fafef", "o"),
    "attention": Look("#0a8291", "#4cc6d6", "P"),
    "quantisation": Look("#2e7d32", "#7bc77f", "^"),
    "together": Look("#3f4248", "#d5d8dc", "*"),
}
OTHER = Look("#6b6f76", "#a0a5ab", "X")
INK, MUTED, LINE = "#1c1d1f", "#62666d", "#dcdcd7"


def write_report(
    folder: str | os.PathLike,
    path: str | os.PathLike | None = None,
    quality: str = "psnr",
    command: str | None = None,
) -> pathlib.Path:
    """Writes the report of a sweep's folder; the file appears whole or not at all.

    Args:
      folder: of `difax.study.pareto.Sweep`: sweep.json, rows.jsonl, and images/*.npz of the methods that have them.
      path: of the report; None is report.html in the folder. quality: that the page opens with, of
        `difax.study.frontier.QUALITIES`. command: that measured the sweep, for the page to tell.

    Returns:
      The path.

    Raises:
      ValueError: no sweep in the folder, nothing measured, or a file of images that cannot be read.
    """
    folder = pathlib.Path(folder)
    path = folder / "report.html" if path is None else pathlib.Path(path)
    sweep, rows = sweep_of(folder), read_measured(folder)
    text = report(sweep, rows, read_images(folder, rows), quality, command)
    with replacing(path) as aside:
        aside.write_text(text, encoding="utf-8", errors="backslashreplace")  # of a name that is no UTF-8
    return path


def report(
    sweep: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    images: Mapping[str, np.ndarray],
    quality: str = "psnr",
    command: str | None = None,
) -> str:
    """The report as HTML: equal arguments give equal text.

    Args:
      sweep, rows: as `difax.study.pareto` writes them. images: {method: uint8 [n, H, W, C] or [n, F, H, W, C]}, of the
        methods that have them. quality, command: as in `write_report`.

    Raises:
      ValueError: nothing measured, or a quality that is none.
    """
    _measured(rows, quality)
    data = {
        "sweep": sweep,
        "rows": rows,
        "images": sprites(images, {row["method"]: row["shown"] for row in rows if row.get("shown")}),
        "columns": COLUMNS,
        "families": [{"name": n, "marker": look.marker} for n, look in LOOKS.items()],
        "qualities": [
            {"name": n, "label": q.label, "unit": q.unit, "digits": q.digits, "more": q.more}
            for n, q in QUALITIES.items()
        ],
        "quality": quality,
        "baseline": BASELINE,
        "control": CONTROL,
        "limit": PSNR_LIMIT,
        "title": title(sweep),
        "systems": published(rows),
        "catalogue": len(systems()),
        "facts": facts(sweep, rows),
        "command": command,
    }
    filled = {
        "title": html.escape(f"{data['title']}: quality and cost"),
        "light": "".join(f"--{n}: {look.light};" for n, look in LOOKS.items()),
        "dark": "".join(f"--{n}: {look.dark};" for n, look in LOOKS.items()),
        # a script element ends at the first "</", whatever its type
        "data": json.dumps(finite(data), allow_nan=False).replace("<", "\\u003c"),
    }
    template = importlib.resources.files("difax").joinpath("assets/pareto.html").read_text(encoding="utf-8")
    return re.sub(r"@@(\w+)@@", lambda found: filled[found[1]], template)


LISTS = {
    "cache": "caches",
    "solver": "solvers",
    "grid": "grids",
    "guide": "guides",
    "attend": "attends",
    "quant": "quants",
}


def published(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[dict[str, str]]]:
    """{method: the published systems that its settings name, as the catalogue has them}, of the methods with some."""
    by_factory: dict[str, list[System]] = {}
    for system in systems():
        for factory in system.factories:
            by_factory.setdefault(factory, []).append(system)
    found: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        for key, value in row.get("settings", {}).items():
            section, _, last = key.partition(".")
            named = str(value).split("+") if last == "name" and section in LISTS else []
            for system in (s for name in named for s in by_factory.get(f"{LISTS[section]}:{name}", ())):
                paper = ", ".join(filter(None, (system.authors, str(system.year or ""), system.reference)))
                one = {"name": system.name, "paper": paper, "status": system.status}
                found.setdefault(row["method"], []).append(one)
    return found


def sweep_of(folder: str | os.PathLike) -> dict[str, Any]:
    """What a folder is a sweep of, whose names load no code; ValueError for a folder that is none."""
    return read_sweep(folder)


def title(sweep: Mapping[str, Any]) -> str:
    """What was accelerated, in a few words."""
    config = sweep.get("config", {})
    model, solver = (config.get(k, {}).get("name", "") for k in ("model", "solver"))
    weights = sweep.get("weights") or config.get("weights")
    name = pathlib.Path(weights).name.removesuffix(" (embedded)") if isinstance(weights, str) else ""
    named = f"{model} ({name})" if name else model
    return f"{named}, {solver}, {config.get('steps', '?')} steps"


def facts(sweep: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Where and on what it was measured."""
    dates = sorted(d for r in rows if (d := r.get("date")))
    methods = sum("speed" in r and r["method"] != BASELINE for r in rows)
    return [
        f"{methods} method{'s' if methods != 1 else ''}",
        f"{sweep.get('seeds', '?')} images each, {sweep.get('batch', '?')} at a time",
        f"on {sweep.get('device', 'an unknown device')}",
        *(
            f"latents: PSNR and SSIM by the range of the baseline's, {low:.3g} to {high:.3g}"
            for low, high in [r["range"] for r in rows if r["method"] == BASELINE and r.get("range")]
        ),
        f"jax {sweep.get('jax', '?')}",
        *dates[-1:],
    ]


def read_images(folder: pathlib.Path, rows: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """The images of the rows that have some.

    Raises:
      ValueError: a file that is not what `difax.study.pareto` writes.
    """
    found = {}
    for row in rows:
        path = folder / "images" / f"{slug(row['method'])}.npz"
        if place_of(path) is not None:
            found[row["method"]] = images = read_image_file(path)
            first, shape = next((method, list(of.shape[1:])) for method, of in found.items())
            if list(images.shape[1:]) != shape:
                raise ValueError(f"{path}: images {list(images.shape[1:])}; allowed: {shape}, as those of {first}")
    return found


def sprites(images: Mapping[str, np.ndarray], shown: Mapping[str, str] | None = None) -> dict[str, dict[str, Any]]:
    """Images by method as PNG in data: URIs, side by side in rows of `COLUMNS`, as many and as large as there is room.

    Args:
      images: {method: uint8 [n, H, W, C]}; C = 1 (grey), 3 (RGB), else the first channel. A video [n, F, H, W, C] shows
        its middle frame. shown: {method: what its images are of}, where that is not the samples as they are.

    Returns:
      {method: {"source", "count", "width", "height" of one image, "note": what is not shown, or ""}}.
    """
    flat = {name: _still(batch) for name, batch in images.items()}
    whole = sum(math.prod(b.shape[1:]) * SHOWN_IMAGES * _reduced(b.shape[1:3])[2] ** 2 for b, _ in flat.values())
    count = max(LEAST_IMAGES, min(SHOWN_IMAGES, int(SHOWN_IMAGES * ROOM / whole))) if whole else SHOWN_IMAGES
    told = {} if shown is None else shown
    return {
        name: _sprite(batch[:count], ", ".join(filter(None, (told.get(name), note))))
        for name, (batch, note) in flat.items()
    }


def _still(batch: np.ndarray) -> tuple[np.ndarray, str]:
    """[n, H, W, 1 or 3], and what it is of."""
    note = ""
    if batch.ndim == 5:
        note = f"frame {batch.shape[1] // 2 + 1} of {batch.shape[1]}"
        batch = batch[:, batch.shape[1] // 2]
    if batch.ndim != 4 or batch.dtype != np.uint8:
        raise ValueError(f"images {batch.dtype} {batch.shape}; allowed: uint8 [n, H, W, C] or [n, F, H, W, C]")
    part = pictured(batch.shape[-1])
    if part is not None:
        note = ", ".join(filter(None, (note, part)))
        batch = batch[..., :1]
    return batch, note


def _reduced(size: Sequence[int]) -> tuple[int, int, float]:
    """Height, width and factor of an image as it is shown."""
    factor = min(1.0, CELL / max(size))
    return max(1, round(size[0] * factor)), max(1, round(size[1] * factor)), factor


def _sprite(batch: np.ndarray, note: str) -> dict[str, Any]:
    from PIL import Image

    height, width, factor = _reduced(batch.shape[1:3])
    if factor < 1:
        note = ", ".join(filter(None, (note, f"shown at {width} of {batch.shape[2]} pixels")))
    rows = -(-len(batch) // COLUMNS)
    sheet = Image.new("L" if batch.shape[-1] == 1 else "RGB", (COLUMNS * width, rows * height))
    for i, image in enumerate(batch):
        cell = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
        if factor < 1:
            cell = cell.resize((width, height), Image.Resampling.BOX)
        sheet.paste(cell, (i % COLUMNS * width, i // COLUMNS * height))
    file = io.BytesIO()
    sheet.save(file, "PNG", optimize=True)
    source = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    return {"source": source, "count": len(batch), "width": width, "height": height, "note": note}


def _measured(rows: Sequence[Mapping[str, Any]], quality: str) -> list[dict[str, Any]]:
    """The rows that have a figure of this quality."""
    if quality not in QUALITIES:
        raise ValueError(f"quality {quality!r}; allowed: {', '.join(QUALITIES)}")
    if not any("speed" in row for row in rows):
        raise ValueError("difax pareto: nothing is measured yet, there is nothing to report")
    return [dict(r) for r in rows if "speed" in r and (r["quality"].get(quality) or [None])[0] is not None]


def figure(
    rows: Sequence[Mapping[str, Any]],
    quality: str,
    path: str | os.PathLike,
    cost: str = "seconds",
    heading: str = "",
) -> None:
    """Draws the scatter of quality against speed-up as PNG, 1800 pixels wide, to be shown at half of that.

    Args:
      rows: as `difax.core.files.read_rows` gives them. quality: one of `difax.study.frontier.QUALITIES`. cost:
        "seconds" or "flops". heading: over it, such as `title(sweep)`.

    Raises:
      ValueError: no row has this quality, an unknown quality or cost, or matplotlib is missing.
    """
    if cost not in ("seconds", "flops"):
        raise ValueError(f"cost {cost!r}; allowed: seconds, flops")
    points = frontier(_measured(rows, quality), quality, cost)
    if not points:
        raise ValueError(f"no row has {quality!r} (frechet needs more images); allowed: a quality that was measured")
    real = [(r["quality"].get(quality) or [None])[0] for r in rows if r["method"] == CONTROL]
    control = [value for value in real if value is not None]
    with drawing(path, (9, 5.4), font=8.5) as drawn:
        drawn.text(0.02, 0.955, heading, fontsize=11.5, weight="bold", color=INK)
        newest = max(points, key=lambda r: r.get("date", ""))
        told = (newest.get("device"), newest.get("jax") and f"jax {newest['jax']}", newest.get("date"))
        drawn.text(0.985, 0.015, ", ".join(filter(None, told)), fontsize=7, color=MUTED, ha="right")
        _scatter(drawn.add_axes((0.07, 0.165, 0.915, 0.72)), points, control, quality, cost)


SHEET_IMAGES, SHEET_METHODS = 8, 12


def sheet(
    rows: Sequence[Mapping[str, Any]],
    images: Mapping[str, np.ndarray],
    path: str | os.PathLike,
    quality: str = "psnr",
    methods: Sequence[str] | None = None,
    heading: str = "",
) -> None:
    """Draws methods' images, their differences from the baseline's, and what was computed, as PNG 1800 pixels wide.

    Each method is a row: images of the same noise as the baseline's above, |image - baseline| of the same images
    (white is none, black 64 grey levels or more), and a strip, blocks down and evaluations across, dark where computed.

    Args:
      rows: as `difax.core.files.read_rows` gives them. images: `read_images`. quality: whose frontier is shown.
      methods: which, in this order; None is the frontier, the slowest first, at most `SHEET_METHODS`.

    Raises:
      ValueError: none of the methods has images, an unknown quality, or matplotlib is missing.
    """
    points = frontier(_measured(rows, quality), quality)
    if methods is None:
        best = sorted((r for r in points if r["dominated_by"] is None), key=lambda r: r["speed"]["ratio"])
        best = [r["method"] for r in best if r["method"] != BASELINE and r["method"] in images]
        chosen = np.unique(np.linspace(0, len(best) - 1, min(len(best), SHEET_METHODS)).round().astype(int))
        methods, least = [best[i] for i in chosen], 1  # the baseline may be all that there is
    else:
        least = 2
    of = {r["method"]: r for r in points}
    shown = [m for m in (BASELINE, *methods) if m in of and m in images]
    if BASELINE not in shown or len(shown) < least:
        raise ValueError(
            f"no images of {', '.join(methods)} beside the baseline's; allowed: methods that were measured"
        )
    base = _still(images[BASELINE])[0][:SHEET_IMAGES]
    height = 0.62 * len(shown) + 0.7
    with drawing(path, (9, height), font=8) as drawn:
        drawn.text(0.01, 1 - 0.22 / height, heading, fontsize=10.5, weight="bold", color=INK)
        at = 1 - 0.48 / height
        for x, name in ((0.225, "images"), (0.545, "difference from the baseline"), (0.865, "computed")):
            drawn.text(x, at, name, fontsize=7.5, color=MUTED)
        for i, method in enumerate(shown):
            low, tall = 1 - (0.6 + 0.62 * (i + 1)) / height, 0.54 / height
            row, batch = of[method], _still(images[method])[0][: len(base)]
            told = f"×{row['speed']['ratio']:.2f}" if method != BASELINE else ""
            drawn.text(0.01, low + 0.62 * tall, method, fontsize=8, color=INK, wrap=True)
            drawn.text(0.01, low + 0.2 * tall, told, fontsize=8, color=MUTED)
            _plain_image(drawn.add_axes((0.225, low, 0.31, tall)), _beside(batch))
            if method != BASELINE:
                apart = np.abs(batch.astype(int) - base.astype(int)).max(-1, keepdims=True)
                black = np.clip(255 - 4 * apart, 0, 255).astype(np.uint8)
                _plain_image(drawn.add_axes((0.545, low, 0.31, tall)), _beside(black))
            axes = drawn.add_axes((0.865, low, 0.125, tall))
            axes.imshow(np.asarray(row["decisions"]["blocks"]).T, cmap="Blues", vmin=0, vmax=130, aspect="auto")
            axes.set_axis_off()


def _beside(batch: np.ndarray) -> np.ndarray:
    """[n, H, W, C] -> [H, n W, C]."""
    return np.concatenate(list(batch), axis=1)


def _plain_image(axes: Any, image: np.ndarray) -> None:
    axes.imshow(np.broadcast_to(image, (*image.shape[:2], 3)), interpolation="nearest")
    axes.set_anchor("W")
    axes.set_axis_off()


def _scatter(axes: Any, points: list[dict[str, Any]], control: list[float], quality: str, cost: str) -> None:
    label, unit, _, more = QUALITIES[quality]
    x = np.asarray([r["speed" if cost == "seconds" else "cost"]["ratio"] for r in points])
    y = np.asarray([r["quality"][quality][0] for r in points])
    names = [r["method"] if len(r["method"]) <= 34 else r["method"][:32] + "…" for r in points]
    high = float(y.max())
    if quality == "psnr" and high >= PSNR_LIMIT:  # equal images have none: they lie above the others, and say so
        equal, below = y >= PSNR_LIMIT, y[y < PSNR_LIMIT]
        low, high = (float(below.min()), float(below.max())) if below.size else (0.0, 1.0)
        y = np.where(equal, high + 0.1 * (high - low or 1.0), y)
        names = [f"{n} (equal images)" if e else n for n, e in zip(names, equal, strict=True)]
    if x.max() > 4 * x.min():
        axes.set_xscale("log", base=2)
    if not more:
        axes.invert_yaxis()
        if y.min() > 0 and y.max() > 20 * y.min():
            axes.set_yscale("log")
    axes.margins(0.06, 0.08)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(LINE)
    axes.grid(True, axis="y", color=LINE, linewidth=0.7)
    axes.axvline(1, color=LINE, linewidth=0.8, zorder=1)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelcolor=INK)
    axes.xaxis.set_major_formatter(lambda value, _: f"×{value:g}")
    axes.set_xlabel(f"speed-up in {'seconds' if cost == 'seconds' else 'FLOPs'} over the baseline")
    better = "higher is better" if more else "lower is better: upside down"
    axes.set_title(" ".join(filter(None, (label, unit, f"({better})"))), loc="left", fontsize=8.5, color=INK)
    best = sorted((i for i, r in enumerate(points) if r["dominated_by"] is None), key=lambda i: x[i])
    axes.step(x[best], y[best], where="pre", color=MUTED, linewidth=1.0, zorder=2)
    families = [r["family"] if r["family"] in LOOKS else BASELINE for r in points]
    for family in dict.fromkeys([*LOOKS, BASELINE]):
        of, look = [i for i, f in enumerate(families) if f == family], LOOKS.get(family, OTHER)
        if of:
            drawn = {"c": look.light, "marker": look.marker, "linewidths": 0}
            grown = 1.9 if look.marker == "*" else 1.0  # stars have little in them
            size, alpha = [grown * (54 if i in best else 24) for i in of], [1.0 if i in best else 0.4 for i in of]
            axes.scatter(x[of], y[of], size, alpha=alpha, zorder=3, **drawn)
            axes.scatter([], [], 36 * grown, label=family, **drawn)
    if high < y.max():
        axes.set_yticks([t for t in axes.get_yticks() if axes.get_ylim()[0] <= t <= high])
    for value in control[:1]:
        axes.axhline(value, color=INK, linewidth=0.8, linestyle=(0, (5, 4)))
        above = {"xytext": (0, 3), "textcoords": "offset points", "ha": "right", "color": MUTED}
        axes.annotate(CONTROL, (1, value), xycoords=axes.get_yaxis_transform(), **above)
    legend = {"ncols": 8, "frameon": False, "handletextpad": 0.1, "columnspacing": 1.6}
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.115), **legend)
    at = np.stack([x, y], 1)
    others = [i for i in range(len(points)) if i not in best] if len(points) <= FEW else []
    _name(axes, [names[i] for i in [*best, *others]], at[[*best, *others]], at, at[best])


FEW = 8  # methods that all have their names on the picture


def _name(axes: Any, names: list[str], at: np.ndarray, points: np.ndarray, best: np.ndarray) -> None:
    """Writes each name beside its point, where it covers no other name, and the fewest points and bits of the line.

    Args:
      at: [n, 2], the points that have names; points: all of them; best: those of the frontier from left to right, with
        a step between each two.
    """
    axes.figure.draw_without_rendering()
    pixels = axes.transData.transform(at)
    dots = axes.figure.dpi / 72
    stairs = _stairs(axes.transData.transform(best), 14 * dots)
    points = np.concatenate([axes.transData.transform(points), *stairs])
    frame, taken = axes.get_window_extent(), []
    r = 4 * dots
    for name, (px, py) in zip(names, pixels, strict=True):
        text = axes.annotate(name, (0, 0), xycoords="figure pixels", fontsize=8, color=INK, zorder=5)
        box = text.get_window_extent()
        places = []
        for away in (6, 12, 20, 30, 42, 56):
            for right, up in ((1, 0.7), (1, 0), (0, 1), (1, -0.7), (-1, 0.7), (-1, 0), (0, -1), (-1, -0.7)):
                left = px + right * away * dots - box.width * (1 - right) / 2
                if up:
                    left = max(frame.x0, min(frame.x1 - box.width, left))
                low = py + up * away * dots - box.height * (1 - up) / 2
                place = (left, low, left + box.width, low + box.height)
                over = sum(_meet(place, other) for other in taken)
                inside = frame.x0 <= place[0] and place[2] <= frame.x1 and frame.y0 <= place[1] and place[3] <= frame.y1
                covered = sum(_meet(place, (a - r, b - r, a + r, b + r)) for a, b in points)
                places.append((10 * over + 10 * (not inside) + covered + away / 14, place))
        place = min(places, key=lambda p: p[0])[1]
        taken.append(place)
        text.xyann = place[:2]
        near = (min(max(px, place[0]), place[2]), min(max(py, place[1]), place[3]))
        if math.dist(near, (px, py)) > 12 * dots:
            line = {"arrowstyle": "-", "color": MUTED, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 4}
            axes.annotate("", (px, py), near, "figure pixels", "figure pixels", arrowprops=line)


def _stairs(corners: np.ndarray, apart: float) -> list[np.ndarray]:
    """Points on the stairs between corners [n, 2], each first up or down and then across, so far apart at most."""
    found = []
    for (x, y), (x_next, y_next) in itertools.pairwise(corners):
        for start, stop in (((x, y), (x, y_next)), ((x, y_next), (x_next, y_next))):
            number = 2 + int(math.dist(start, stop) / apart)
            found.append(np.linspace(start, stop, number))
    return found


def _meet(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    """Whether two boxes (left, low, right, high) overlap."""
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
