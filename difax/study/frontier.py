"""What a sweep's rows say: which methods are dominated, and a table of all."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

BASELINE, CONTROL = "baseline", "real images"


class Quality(NamedTuple):
    """How a figure is called and written; more: is more of it better."""

    label: str
    unit: str
    digits: int
    more: bool


QUALITIES = {
    "psnr": Quality("PSNR", "dB", 1, True),
    "ssim": Quality("SSIM", "", 3, True),
    "ms_ssim": Quality("MS-SSIM", "", 3, True),
    "relative_l1": Quality("Relative L1 error", "", 3, False),
    "relative_l2": Quality("Relative L2 error", "", 3, False),
    "agreement": Quality("Agreement", "of the judge with the label", 3, True),
    "frechet": Quality("Fréchet distance", "to real images", 2, False),
    "kernel": Quality("Kernel distance", "to real images", 3, False),
    "precision": Quality("Precision", "against real images", 3, True),
    "recall": Quality("Recall", "of real images", 3, True),
    "lite0_frechet": Quality("Fréchet distance", "in EfficientNet-Lite0 features", 2, False),
    "lite0_kernel": Quality("Kernel distance", "in EfficientNet-Lite0 features", 3, False),
    "lite0_precision": Quality("Precision", "in EfficientNet-Lite0 features", 3, True),
    "lite0_recall": Quality("Recall", "in EfficientNet-Lite0 features", 3, True),
    "fid": Quality("FID", "", 2, False),
    "kid": Quality("KID", "", 4, False),
    "inception_precision": Quality("Precision", "in Inception features", 3, True),
    "inception_recall": Quality("Recall", "in Inception features", 3, True),
    "lpips": Quality("LPIPS", "", 3, False),
    "clip_score": Quality("CLIP score", "", 2, True),
    "image_reward": Quality("ImageReward", "", 2, True),
}
# what brings a quality that not every sweep has
BROUGHT = {
    "ms_ssim": "images of 11 pixels or more",
    **dict.fromkeys(("agreement", "frechet", "kernel", "precision", "recall"), "a judge of these images: --judge NAME"),
    **dict.fromkeys((q for q in QUALITIES if q.startswith("lite0_")), "--network efficientnet_lite0"),
    **dict.fromkeys(("fid", "kid", "inception_precision", "inception_recall"), "--network inception=FILE"),
    "lpips": "--network lpips=FILE",
    "clip_score": "--network clip=FOLDER",
    "image_reward": "--network image_reward=FILE",
}
NETWORK_FIGURES = tuple(q for q, how in BROUGHT.items() if how.startswith("--network"))
SHOWN = ("psnr", "ssim", "lpips", "agreement", "frechet", "kernel", "lite0_kernel", "fid", "clip_score", "image_reward")


def frontier(rows: list[dict[str, Any]], quality: str = "psnr", cost: str = "seconds") -> list[dict[str, Any]]:
    """The measured rows, each with `dominated_by`: a method that is at least as good and as fast, and better in one.

    Args:
      quality: one of `QUALITIES`.
      cost: "seconds" or "flops", by ratio to the baseline.
    """
    sign = 1.0 if QUALITIES[quality].more else -1.0
    measured = [r for r in rows if "speed" in r and _finite_figure(r, quality)]
    points = [
        (sign * r["quality"][quality][0], r["speed"]["ratio"] if cost == "seconds" else r["cost"]["ratio"])
        for r in measured
    ]
    found = []
    for row, (good, fast) in zip(measured, points, strict=True):
        better = [
            (other_fast, other["method"])
            for other, (other_good, other_fast) in zip(measured, points, strict=True)
            if other_good >= good and other_fast >= fast and (other_good > good or other_fast > fast)
        ]
        found.append({**row, "dominated_by": max(better)[1] if better else None})
    return found


def _range(turns: list[float]) -> str:
    """The least and the most of the turns, where there are any."""
    return f" ({min(turns):.2f}-{max(turns):.2f})" if turns else ""


def table(rows: list[dict[str, Any]], quality: str = "psnr") -> str:
    """The measured methods as a Markdown table, the fastest first; the frontier's in bold."""
    shown = [q for q in SHOWN if any(_figure(r, q) for r in rows)]
    if quality not in shown:
        shown.append(quality)
    head = [
        "method",
        "FLOPs",
        "seconds (turns)",
        "realised",
        *(_heading(q) for q in shown),
        "dominated by",
    ]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    compared = sorted(frontier(rows, quality), key=lambda r: -r["speed"]["ratio"])
    names = {row["method"] for row in compared}
    beside = [{**r, "dominated_by": lost(r)} for r in rows if "speed" in r and r["method"] not in names]
    for row in [*compared, *beside]:
        best = row["dominated_by"] is None
        cells = [
            f"**{row['method']}**" if best else row["method"],
            f"x{row['cost']['ratio']:.2f}",
            f"x{row['speed']['ratio']:.2f}{_range(row['speed']['turns'])}",
            f"{row['speed']['realised']:.2f}",
            *(_figure(row, q) for q in shown),
            row["dominated_by"] or "",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    for row in rows:
        if row["method"] == CONTROL:
            cells = [f"_{CONTROL}_", "", "", "", *(_figure(row, q) for q in shown), ""]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _heading(quality: str) -> str:
    """A column's name; only distances in features other than the judge's need saying which."""
    label, unit, *_ = QUALITIES[quality]
    return f"{label} {unit}" if "features" in unit else label


def finite(value: Any) -> Any:
    """Without the infinities and nans that JSON does not have."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    if isinstance(value, (float, np.floating)):
        return float(value) if np.isfinite(value) else None
    return value


def _finite_figure(row: dict[str, Any], quality: str) -> list[float] | None:
    """[value, low, high], or None where there is none, such as that of images that are not finite."""
    found = row.get("quality", {}).get(quality)
    return found if found and all(x is not None and math.isfinite(x) for x in found) else None


def _figure(row: dict[str, Any], quality: str) -> str:
    found = _finite_figure(row, quality)
    if found is None:
        return ""
    value, low, high = (f"{x:.{QUALITIES[quality].digits}f}" for x in found)
    return value if row["method"] == BASELINE and quality in ("psnr", "ssim", "ms_ssim") else f"{value} [{low}, {high}]"


def lost(row: dict[str, Any]) -> str:
    """What is said of a method whose images are not all finite; "" for the others."""
    count = row.get("not_finite")
    return f"{count} images are not finite" if count else ""


def line(row: dict[str, Any]) -> str:
    """One measurement for people."""
    if "refused" in row:
        return f"{row['method']}: not for this model ({row['refused'][:90]})"
    found = f"PSNR {_figure(row, 'psnr') or 'not finite'}, SSIM {_figure(row, 'ssim') or 'not finite'}"
    found = lost(row) or found
    return f"{row['method']}: FLOPs x{row['cost']['ratio']:.2f}, seconds x{row['speed']['ratio']:.2f}, {found}"
