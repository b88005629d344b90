"""Draws the pictures of performance.md and the README from the newest results in bench/results.

python -m docs.draw      (in the repository's root)
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from bench.implementations import OURS
from bench.results import Results, Row, load

ROOT = Path(__file__).resolve().parent.parent
IMAGES = ROOT / "docs" / "images"
COLOURS = {"LSTM": "#1d3557", "GRU": "#457b9d", "RNN": "#a8c5da"}
PEER_COLOURS = {"torch": "#ee4c2c", "onnxruntime": "#2a6fbb", "openvino": "#7b2cbf"}


def newest(device: str, peers: set[str]) -> Results:
    """The newest results on a device with inference and training against these peers, and maybe others: those with
    the most threads."""
    found = []
    for path in ROOT.glob("bench/results/**/results.json"):
        results = load(path)
        plain = [row for row in results.rows if row.group in ("inference", "training")]
        names = {name for row in plain for name in row.entries if not name.startswith(OURS)}
        if results.environment["device"] == device and names >= peers:
            found.append(results)
    if not found:
        raise SystemExit(f"bench/results has no results on {device} against {', '.join(sorted(peers))}")
    results = max(found, key=lambda results: results.environment["date"])
    results.rows = [row for row in results.rows if row.threads == results.most_threads]
    return results


def bars(axes: Any, rows: list[Row], value: Callable[[Row], float | None]) -> None:
    """A group of bars for each shape, a bar for each cell."""
    shapes = list(dict.fromkeys(row.shape for row in rows))
    for k, (cell, colour) in enumerate(COLOURS.items()):
        values = {row.shape: value(row) for row in rows if row.cell == cell}
        heights = [values.get(shape) or np.nan for shape in shapes]
        drawn = axes.bar(np.arange(len(shapes)) + 0.28 * (k - 1), heights, 0.26, color=colour, label=cell)
        axes.bar_label(drawn, fmt="{:.3g}", fontsize=6, padding=1)
    axes.set_xticks(range(len(shapes)), shapes, fontsize=7)
    axes.set_xlabel("N × T × H", fontsize=8)


def ratio_axis(axes: Any, rows: list[Row]) -> None:
    """Logarithmic, with a line at 1, where both are as fast."""
    axes.set_yscale("log", base=2)
    highest = max(row.ratio("torch") or 1 for row in rows)
    axes.set_ylim(0.5, 1.5 * highest)
    ticks = [2.0**k for k in range(-1, 8) if 2**k < 1.5 * highest]
    axes.set_yticks(ticks, [f"{t:g}×" for t in ticks])
    axes.axhline(1, color="black", lw=1)


def figure_with(columns: int, results: Results, title: str, height: float = 3.4) -> tuple[Figure, Any]:
    figure = Figure(figsize=(10, height), layout="constrained")
    FigureCanvasSVG(figure)
    figure.suptitle(f"{title}\n{caption(results)}", fontsize=10)
    return figure, figure.subplots(1, columns, sharey=True, squeeze=False)[0]


def caption(results: Results) -> str:
    where = results.environment
    name = where["gpu"] if where["device"] == "cuda" else f"{where['cpu']}, {results.most_threads} threads"
    return f"{name}, torch {where['versions']['torch']}, {where['date'][:10]}"


def save(figure: Figure, name: str) -> None:
    IMAGES.mkdir(exist_ok=True)
    figure.savefig(IMAGES / name, metadata={"Date": None, "Creator": None})
    print(IMAGES / name)


def speed(results: Results, dtype: str, name: str) -> None:
    """Torch's time over ours."""
    figure, both = figure_with(2, results, f"How many times as fast as torch.nn, {dtype}")
    chosen = [row for row in results.rows if row.dtype == dtype and row.group in ("inference", "training")]
    for axes, group in zip(both, ("inference", "training"), strict=True):
        bars(axes, [row for row in chosen if row.group == group], lambda row: row.ratio("torch"))
        ratio_axis(axes, chosen)
        axes.set_title(group, fontsize=9)
    both[0].legend(fontsize=8, loc="upper right")
    save(figure, name)


def limits(results: Results, name: str) -> None:
    """The least time the machine allows, over ours."""

    def reached(row: Row) -> float | None:
        ours = row.median(OURS)
        return 100 * row.floor_us / ours if ours and row.floor_us else None

    figure, both = figure_with(2, results, "How much of the machine's limit is reached, float32")
    for axes, group in zip(both, ("inference", "training"), strict=True):
        bars(axes, [row for row in results.rows if row.dtype == "float32" and row.group == group], reached)
        axes.set_ylim(0, 110)
        axes.axhline(100, color="black", lw=1)
        axes.set_title(group, fontsize=9)
    both[0].set_ylabel("% of the arithmetic or memory limit", fontsize=8)
    both[0].legend(fontsize=8)
    save(figure, name)


def peers(results: Results, name: str) -> None:
    """Each peer's time over ours, a panel a cell."""
    figure, panels = figure_with(3, results, "How many times as fast as other runtimes, float32 inference")
    rows = [row for row in results.rows if row.group == "inference" and row.dtype == "float32"]
    for axes, cell in zip(panels, COLOURS, strict=True):
        these = [row for row in rows if row.cell == cell]
        for k, (peer, colour) in enumerate(PEER_COLOURS.items()):
            heights = [row.ratio(peer) or np.nan for row in these]
            axes.bar(np.arange(len(these)) + 0.28 * (k - 1), heights, 0.26, color=colour, label=peer)
        axes.set_xticks(range(len(these)), [row.shape for row in these], rotation=60, fontsize=7)
        axes.set_title(cell, fontsize=9)
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter("{x:g}×")
        axes.axhline(1, color="black", lw=1)
    panels[0].legend(fontsize=8)
    save(figure, name)


def main() -> None:
    matplotlib.rcParams["svg.hashsalt"] = "fusedrnn"  # the same file every time
    against_torch = newest("cpu", {"torch"})
    speed(against_torch, "float32", "speed-cpu.svg")
    speed(against_torch, "bfloat16", "speed-cpu-bfloat16.svg")
    limits(against_torch, "limits-cpu.svg")
    peers(newest("cpu", {"torch", "onnxruntime", "openvino"}), "peers-cpu.svg")


if __name__ == "__main__":
    main()
