"""README.md of experiments/results/gpu from the rows beside it: python -m experiments.gpu_suite --page"""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

from difax.core.files import read_rows
from experiments.gpu_rows import ROWS

PROTOTYPES = "prototypes.jsonl"
ABOUT = {
    "ceilings": "Ceilings: products of two matrices (sums of int8 in int32, else bf16 out), and a pass over memory.",
    "kernels": "Attention. `error` is the relative error of o against float32 on the values before rounding, TFLOP/s "
    "count the listed blocks alone, `x` is how many times faster than the dense baseline.",
    "products": "Products of x [M, K] in bf16 with quantised weights, y in bf16; rounding x is inside. `x`: the "
    "time of bf16 over it. `quant=NAME`: a dense layer as a configuration with that recipe has it, and what served it.",
    "models": "One evaluation. `x`: the time of `torch.compile` (each block compiled, the whole pass one CUDA graph, "
    "`scaled_dot_product_attention`) over it. Attention is cuDNN's but where `attend=` says otherwise.",
    "realised": "Caches, random weights without zeros, guidance by two halves in one batch. `x`: the plain sampler's "
    "seconds over its; `operations x`: the same of the operations that the trace counted.",
    "training": "Updates in bf16 with float32 weights, AdamW, EMA; TFLOP/s count three forward passes. One batch of "
    "images with a picture for each label, again and again: its loss must fall.",
    "whole": "FLUX.1-dev from noise to latents at 1024 x 1024 with random weights, blocks as named.",
    "prototypes": "Rows of the first prototypes of the kernels (other code than what is in `accel/kernels`), which the "
    "choices were made by.",
}


def milliseconds(us: float) -> str:
    """Microseconds, or milliseconds where there are many."""
    return f"{us:,.0f} us" if us < 1e4 else f"{us / 1e3:,.1f} ms"


# key of a row -> heading, text
COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "us": ("time", milliseconds),
    "spread": ("max/min", lambda v: f"{v:.2f}"),
    "over_baseline": ("x", lambda v: f"{v:.2f}"),
    "flops_ratio": ("operations x", lambda v: f"{v:.2f}"),
    "tflops": ("TFLOP/s", lambda v: f"{v:,.0f}" if v >= 10 else f"{v:.2g}"),
    "gb_per_second": ("GB/s", lambda v: f"{v:,.0f}"),
    "error_of_o": ("error", lambda v: f"{v:.1e}"),
    "error_of_y": ("error", lambda v: f"{v:.1e}"),
    "largest_error_of_lse": ("error of lse", lambda v: f"{v:.1e}"),
    "right": ("within limit", lambda v: "yes" if v else "**NO**"),
    "served": ("served by", str),
    "steps_per_second": ("updates/s", lambda v: f"{v:.1f}"),
    "share_of_published_peak": ("of 989 TFLOP/s", lambda v: f"{v:.0%}"),
    "share_of_measured_ceiling": ("of the ceiling", lambda v: f"{v:.0%}"),
    "first_loss": ("first loss", lambda v: f"{v:.3f}"),
    "last_loss": ("last loss", lambda v: f"{v:.3f}"),
    "remembered_mib": ("remembers, MiB", lambda v: f"{v:.0f}"),
    "decision": ("", str),
    "reason": ("", str),
    "error": ("", lambda v: f"raised: {v[:160]}".replace("|", "/")),
}


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Rows as a Markdown table, with the columns that one of them has."""
    there = [key for key in COLUMNS if any(key in row for row in rows)]
    lines = ["| | " + " | ".join(COLUMNS[k][0] for k in there) + " |", "|---" * (len(there) + 1) + "|"]
    for row in rows:
        cells = (COLUMNS[k][1](row[k]) if k in row else "" for k in there)
        lines.append(f"| {row['label']} | " + " | ".join(cells) + " |")
    return lines


def sources(rows: list[dict[str, Any]]) -> list[str]:
    """Where rows come from, a line for each device, command and day."""
    found: dict[tuple[str, ...], None] = {}
    for row in rows:
        p = row["provenance"]
        if "versions" in p:
            versions = ", ".join(f"{name} {v}" for name, v in p["versions"].items() if v != "not installed")
            driver = p.get("driver", "").rpartition(", ")[2]
            found[p["device"], driver, p["command"], p["date"][:10], versions] = None
    return [f"- {d}, driver {r or 'none'}, {day}: `{command}`; {v}" for d, r, command, day, v in found]


def page(folder: pathlib.Path) -> str:
    """The page of a folder of rows."""
    rows, first = read_rows(folder / ROWS), read_rows(folder / PROTOTYPES)
    last = {(r["part"], r["label"]): r for r in rows}
    lines = ["# What a GPU shows", ""]
    lines += [
        "Made by `python -m experiments.gpu_suite --page` from the rows beside it; medians of turns in one process."
    ]
    lines += ["Left out are variants that a part had no time for.", "", *sources([*rows, *first])]
    for part, about in ABOUT.items():
        own = [r for r in (first if part == "prototypes" else last.values()) if r["part"] == part]
        measured = [r for r in own if r["label"] != "part"]
        if not measured:
            continue
        lines += ["", f"## {part}", "", about]
        lines += [f"Ended by: {r['outcome']}." for r in own if r["label"] == "part" and r["outcome"] != "done"]
        for group in dict.fromkeys(r.get("group", "died") for r in measured):
            lines += ["", f"**{group}**", "", *table([r for r in measured if r.get("group", "died") == group])]
    return "\n".join(lines) + "\n"
