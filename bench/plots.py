"""Pictures of a result: heat-maps of ratios, and time against N, T and H."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

from .cases import CELLS, Shape
from .implementations import OURS, PADDED
from .results import Results, Row

COLOURS = {
    OURS: "#c1121f",
    "torch": "#555555",
    "torch, cuDNN off": "#aaaaaa",
    "onnxruntime": "#2a6fbb",
    "openvino": "#7b2cbf",
}


def draw(results: Results, folder: Path) -> list[Path]:
    """Writes the PNG files; none without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        return []
    import matplotlib

    matplotlib.use("Agg")
    made = []
    for threads in sorted({row.threads for row in results.rows}):
        rows = [row for row in results.rows if row.threads == threads]
        plain = [row for row in rows if not row.group.startswith("scaling")]
        if any(OURS in row.entries for row in plain):
            made.append(_heat_map(plain, threads, folder / f"ratios-{threads}t.png"))
        scaling = [row for row in rows if row.group.startswith("scaling")]
        for dtype in sorted({row.dtype for row in scaling}):
            for kind in ("inference", "training"):
                these = [r for r in scaling if r.dtype == dtype and r.group.endswith(kind)]
                if these:
                    path = folder / f"scaling-{kind}-{dtype}-{threads}t.png"
                    made.append(_scaling(these, f"{kind}, {dtype}, {threads} thread(s)", path))
    return made


def _heat_map(rows: list[Row], threads: int, path: Path) -> Path:
    """Lines are shapes, columns are cells; a panel for each mode and dtype."""
    from matplotlib import pyplot as plt

    panels: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        panels.setdefault((row.group, row.dtype), []).append(row)
    heights = [len({row.shape for row in panel}) for panel in panels.values()]
    columns = min(4, len(panels))
    lines = math.ceil(len(panels) / columns)
    tallest = [max(heights[i * columns : (i + 1) * columns]) for i in range(lines)]
    figure, axes = plt.subplots(
        lines,
        columns,
        figsize=(4.0 * columns, 0.42 * sum(tallest) + 1.2 * lines + 0.8),
        gridspec_kw={"height_ratios": tallest},
        squeeze=False,
        layout="constrained",
    )
    image = None
    for axis, (name, panel) in zip(axes.flat, panels.items(), strict=False):
        image = _panel(axis, name, panel)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    if image is not None:
        bar = figure.colorbar(image, ax=axes, fraction=0.02)
        ticks = (0.25, 0.5, 1, 2, 4)
        bar.set_ticks([math.log2(t) for t in ticks], labels=[f"{t:g}" for t in ticks])
    figure.suptitle(f"fastest peer's time / fusedrnn's, {threads} thread(s): above 1 is faster")
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def _panel(axis: Any, name: tuple[str, str], rows: list[Row]) -> Any:
    shapes = list(dict.fromkeys(row.shape for row in rows))
    cells = [cell for cell in CELLS if any(row.cell == cell for row in rows)]
    ratios = {(row.shape, row.cell): row.ratio("best") for row in rows}
    grid = [[math.log2(ratios.get((shape, cell)) or math.nan) for cell in cells] for shape in shapes]
    image = axis.imshow(grid, cmap="RdYlGn", vmin=-2, vmax=2, aspect="auto")
    for y, shape in enumerate(shapes):
        for x, cell in enumerate(cells):
            ratio = ratios.get((shape, cell))
            text = f"{ratio:.2f}" if ratio else "-"
            bold = "bold" if ratio and ratio < 1 else "normal"
            style = {"fontweight": bold, "color": "white" if (ratio or 1) > 2.8 else "black"}
            axis.text(x, y, text, ha="center", va="center", fontsize=8, **style)
    axis.set_xticks(range(len(cells)), cells, fontsize=8)
    axis.set_yticks(range(len(shapes)), shapes, fontsize=8)
    axis.set_title(f"{name[0].replace('-', ' ')}, {name[1]}", fontsize=9)
    return image


def _scaling(rows: list[Row], title: str, path: Path) -> Path:
    """Lines are cells, columns are N, T and H."""
    from matplotlib import pyplot as plt

    names = list(dict.fromkeys(k for row in rows for k in row.entries if k != PADDED))
    cells = [cell for cell in CELLS if any(row.cell == cell for row in rows)]
    figure, axes = plt.subplots(len(cells), 3, figsize=(12, 3.2 * len(cells)), squeeze=False, layout="constrained")
    for line, cell in zip(axes, cells, strict=True):
        for axis, letter in zip(line, "NTH", strict=True):
            points = [r for r in rows if r.cell == cell and f"-{letter}-" in r.group]
            if not points:
                axis.set_axis_off()
                continue
            x = [getattr(Shape.parse(row.shape), letter.lower()) for row in points]
            for name in names:
                y = [row.median(name) or math.nan for row in points]
                if not all(map(math.isnan, y)):
                    axis.plot(x, y, "o-", label=name, color=COLOURS.get(name), ms=3)
            floor = [row.floor_us or math.nan for row in points]
            axis.plot(x, floor, ":", label="floor", color="black", lw=1)
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.set_xticks(x, map(str, x))
            axis.minorticks_off()
            axis.grid(alpha=0.3)
            axis.set_xlabel(f"{letter} (N x T x H = 16 x 64 x 128 otherwise)", fontsize=8)
            axis.set_ylabel("us", fontsize=8)
            axis.set_title(cell, fontsize=9)
    axes[0][0].legend(fontsize=7)
    figure.suptitle(title)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path
