"""Every solver at equal evaluations: the page and the picture of a sweep of `difax pareto --methods solver`.

  difax pareto --config fmnist_dit --config.solver.name=unipc --config.steps=200 --methods solver --seeds 64 --turns 0 \
    --out experiments/results/solvers
  python -m experiments.solvers [--folder experiments/results/solvers]

The baseline is a run so fine that it stands for the exact solution of the probability flow: PSNR says how near a
solver comes to it from the same noise. Solvers that draw noise of their own go elsewhere, and are judged by what a
classifier says of their images alone (kernel distance, agreement), as all are against real images.
"""

from __future__ import annotations

import argparse
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from difax.core.files import read_rows
from difax.core.writing import replacing
from difax.media.images import drawing
from difax.study.frontier import BASELINE, CONTROL
from difax.study.methods import BUDGETS
from difax.study.pareto_report import INK, LINE, MUTED
from experiments.provenance import RESULTS

Rows = Sequence[Mapping[str, Any]]
NAMED = 6  # solvers that the picture names


def by_solver(rows: Rows) -> dict[str, dict[int, Mapping[str, Any]]]:
    """{solver: {evaluations asked for: row}}, of those that were measured."""
    found: dict[str, dict[int, Mapping[str, Any]]] = {}
    for row in rows:
        name = re.fullmatch(r"(\w+), (\d+) evaluations", row["method"])
        if name and row.get("quality"):
            found.setdefault(name[1], {})[int(name[2])] = row
    return found


def refused(rows: Rows) -> dict[str, str]:
    """{solver: why}, of those that this model and grid cannot have at any number of evaluations."""
    why: dict[str, str] = {}
    for row in rows:
        if "refused" in row and ", " in row["method"]:
            why.setdefault(row["method"].partition(", ")[0], row["refused"])
    return {name: reason for name, reason in why.items() if name not in by_solver(rows)}


def value(row: Mapping[str, Any] | None, figure: str) -> tuple[float, float, float] | None:
    """Mean and interval of a figure; None where it was not measured."""
    found = (row or {}).get("quality", {}).get(figure)
    return tuple(found) if found and found[0] is not None else None


def best_at(solvers: Mapping[str, Mapping[int, Any]], n: int, figure: str = "psnr") -> list[str]:
    """Solvers by a figure's mean at n evaluations, the best first."""
    there = {name: found for name, of in solvers.items() if (found := value(of.get(n), figure))}
    return sorted(there, key=lambda name: -there[name][0])


def level_with_best(solvers: Mapping[str, Mapping[int, Any]], n: int) -> list[str]:
    """Solvers whose interval of PSNR reaches the best one's mean."""
    order = best_at(solvers, n)
    top = value(solvers[order[0]][n], "psnr") if order else None
    return [name for name in order if top and value(solvers[name][n], "psnr")[2] >= top[0]]  # type: ignore[index]


def overlapping(solvers: Mapping[str, Mapping[int, Any]], n: int, base: Mapping[str, Any], figure: str) -> list[str]:
    """Solvers whose interval of a figure overlaps the baseline's."""
    wanted = value(base, figure)
    there = [(name, value(of.get(n), figure)) for name, of in solvers.items()]
    return [name for name, found in there if wanted and found and found[1] <= wanted[2] and found[2] >= wanted[1]]


def draw(rows: Rows, path: pathlib.Path) -> None:
    """Two panels over the evaluations: PSNR to the exact solution, and the kernel distance to real images."""
    solvers, base = by_solver(rows), next(r for r in rows if r["method"] == BASELINE)
    named = [n for n in dict.fromkeys(best_at(solvers, b)[0] for b in BUDGETS if best_at(solvers, b))]
    named += [n for n in ("euler", "ddim", "heun", "dpmpp_2m", "unipc", "ddpm") if n in solvers and n not in named]
    colours = ("#0b5fa5", "#c2410c", "#2e7d32", "#a8327d", "#946800", "#0a8291", "#3f4248", "#7a3ea8", "#555")
    looks = dict(zip(named[: len(colours)], colours, strict=False))
    with drawing(path, (9, 5.0), font=8.5) as drawn:
        drawn.text(0.02, 0.955, "Solvers at equal evaluations", fontsize=11.5, weight="bold", color=INK)
        told = ", ".join(filter(None, (base.get("device"), base.get("jax") and f"jax {base['jax']}", base.get("date"))))
        drawn.text(0.985, 0.015, told, fontsize=7, color=MUTED, ha="right")
        panels = ((0.07, "psnr", "PSNR to the exact solution, dB"), (0.57, "kernel", "kernel distance"))
        for left, figure, label in panels:
            axes = drawn.add_axes((left, 0.14, 0.41, 0.74))
            axes.set_xscale("log")
            axes.set_xticks(BUDGETS, [str(n) for n in BUDGETS])
            axes.minorticks_off()
            axes.set_xlabel("evaluations")
            axes.set_title(label, fontsize=9, loc="left", color=INK)
            axes.grid(color=LINE, linewidth=0.6)
            for name, of in solvers.items():
                at = [(n, v) for n in BUDGETS if (v := value(of.get(n), figure))]
                if not at:
                    continue
                look = {"color": looks[name], "linewidth": 1.4, "zorder": 3} if name in looks else {}
                style = {"color": "#b9bcc2", "linewidth": 0.7, "zorder": 1} | look
                axes.plot([n for n, _ in at], [v[0] for _, v in at], label=name if name in looks else None, **style)
            wanted = value(base, figure)
            if figure == "kernel" and wanted:
                axes.axhspan(wanted[1], wanted[2], color="#0b5fa5", alpha=0.08, zorder=0)
                axes.axhline(wanted[0], color="#0b5fa5", linewidth=0.8, linestyle=":", zorder=0)
            if figure == "psnr":
                axes.legend(fontsize=7, frameon=False, loc="upper left")


def table(rows: Rows) -> list[str]:
    """A line for each solver: PSNR at each number of evaluations, in bold what reaches the best."""
    solvers = by_solver(rows)
    level = {n: set(level_with_best(solvers, n)) for n in BUDGETS}
    order = best_at(solvers, 10) + [name for name in solvers if not value(solvers[name].get(10), "psnr")]
    lines = ["| solver | " + " | ".join(map(str, BUDGETS)) + " |", "|---|" + "---|" * len(BUDGETS)]
    for name in order:
        cells = []
        for n in BUDGETS:
            found, row = value(solvers[name].get(n), "psnr"), solvers[name].get(n)
            if row is None or found is None:
                cells.append("")
                continue
            text = f"{found[0]:.1f} [{found[1]:.1f}, {found[2]:.1f}]"
            text = f"**{text}**" if name in level[n] else text
            cells.append(text if row["evaluations"] == n else f"{text} ({row['evaluations']:g})")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def judged(rows: Rows) -> list[str]:
    """What the classifier says: at each number of evaluations, who is told apart from the exact solution."""
    solvers, base = by_solver(rows), next(r for r in rows if r["method"] == BASELINE)
    lines = ["| evaluations | kernel distance: told apart from the exact solution | agreement: told apart |"]
    lines.append("|---|---|---|")
    for n in BUDGETS:
        cells = []
        for figure in ("kernel", "agreement"):
            near = set(overlapping(solvers, n, base, figure))
            far = [name for name, of in solvers.items() if value(of.get(n), figure) and name not in near]
            cells.append(f"{len(far)} of {len(far) + len(near)}" + (f": {', '.join(far)}" if far else ""))
        lines.append(f"| {n} | {cells[0]} | {cells[1]} |")
    return lines


def page(rows: Rows, words: str) -> str:
    """The page in Markdown.

    Args:
      words: what a person has to say of it, between the picture and the tables.
    """
    base = next(r for r in rows if r["method"] == BASELINE)
    control = next((r for r in rows if r["method"] == CONTROL), None)
    lines = ["# Solvers at equal evaluations", "", words.strip(), "", "![Quality against evaluations](solvers.png)", ""]
    lines += [f"Baseline: `{base['command']}`, {base['device']}, jax {base['jax']}, {base['date']}.", ""]
    for figure in ("kernel", "agreement"):
        exact, real = value(base, figure), value(control, figure)
        if exact and real:
            lines.append(
                f"{figure.capitalize()}: exact solution {exact[0]:.3f} [{exact[1]:.3f}, {exact[2]:.3f}], real images "
                f"{real[0]:.3f} [{real[1]:.3f}, {real[2]:.3f}].  "
            )
    lines += ["", "PSNR in dB to the exact solution from the same noise, with 95 % bootstrap intervals over images; in"]
    lines += ["bold what reaches the best mean; in parentheses the evaluations made where it cannot make as many.", ""]
    lines += [*table(rows), "", *judged(rows), ""]
    reasons = refused(rows)
    if reasons:
        lines += ["Refused here:", "", *(f"- {why}" for why in reasons.values()), ""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=pathlib.Path, default=RESULTS / "solvers", help="of the sweep")
    folder = parser.parse_args().folder
    rows = read_rows(folder / "rows.jsonl")
    draw(rows, folder / "solvers.png")
    words = folder / "words.md"
    with replacing(folder / "README.md") as aside:
        pathlib.Path(aside).write_text(page(rows, words.read_text() if words.exists() else ""))


if __name__ == "__main__":
    main()
