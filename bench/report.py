"""Tables: for the terminal (rich if installed) and as Markdown."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from . import environment
from .cases import Shape
from .implementations import OURS, PADDED
from .results import DISTURBED, Entry, Results, Row
from .targets import verdicts

GREEN, RED, YELLOW, DIM = "green", "bold red", "yellow", "dim"
Cell = tuple[str, str]  # text and style


@dataclass
class Table:
    title: str
    columns: list[str]
    lines: list[list[Cell]]


def microseconds(us: float | None) -> str:
    if us is None:
        return ""
    unit, value = ("us", us) if us < 1e3 else ("ms", us / 1e3) if us < 1e6 else ("s", us / 1e6)
    return f"{value:.3g} {unit}" if value < 100 else f"{value:.0f} {unit}"


def ratio_cell(ratio: float | None) -> Cell:
    if ratio is None:
        return "", ""
    return f"{ratio:.2f}", GREEN if ratio >= 1.05 else YELLOW if ratio >= 0.95 else RED


def tables(results: Results, with_targets: bool) -> list[Table]:
    made = []
    for name, rows in results.groups():
        made.append(_times(name, rows, results, with_targets))
        if any(entry.peak_mib is not None for row in rows for entry in row.entries.values()):
            made.append(_first_use(name, rows, results))
    return made


def _title(name: tuple[str, str, int], results: Results) -> str:
    group, dtype, threads = name
    where = f"{threads} thread{'s' if threads > 1 else ''}"
    if results.environment["device"] == "cuda":
        where = "GPU"
    return f"{group.replace('-', ' ')}, {dtype}, {where}"


def names_in(rows: list[Row]) -> list[str]:
    """The implementations, without those that do nothing of the kind."""
    entries = [item for row in rows for item in row.entries.items()]
    return list(dict.fromkeys(name for name, entry in entries if entry.status != "n/a"))


def _times(name: tuple[str, str, int], rows: list[Row], results: Results, with_targets: bool) -> Table:
    names = names_in(rows)
    columns = ["N x T x H", "cell", *names]
    ratios = {"vs best": "best", "vs torch": "torch", "vs padded": "padded"}
    if OURS not in names:
        ratios = {}
    elif PADDED not in names:
        del ratios["vs padded"]
    columns += ratios
    if with_targets and ratios:
        columns.append("target")
    columns.append("floor")
    per_step = results.environment["device"] == "cuda"
    if per_step:
        columns.append("us/step")
    lines = []
    for row in rows:
        mark = "*" if row.others > DISTURBED else ""
        line: list[Cell] = [(row.shape + mark, ""), (row.cell, "")]
        line += [_time(row.entries.get(k), k == row.best_peer) for k in names]
        line += [ratio_cell(row.ratio(peer)) for peer in ratios.values()]
        if "target" in columns:
            line.append(_verdict(row, results))
        ours = row.median(OURS if ratios else row.best_peer or "")
        line.append(_floor(row, ours))
        if per_step:
            line.append((f"{ours / Shape.parse(row.shape).t:.2f}" if ours else "", DIM))
        lines.append(line)
    return Table(_title(name, results), columns, lines)


def _first_use(name: tuple[str, str, int], rows: list[Row], results: Results) -> Table:
    names = [k for k in names_in(rows) if k != PADDED]
    columns = ["N x T x H", "cell"]
    columns += [f"{k} {unit}" for unit in ("ms", "MiB") for k in names]
    lines = []
    for row in rows:
        line: list[Cell] = [(row.shape, ""), (row.cell, "")]
        for attribute in ("first_ms", "peak_mib"):
            for k in names:
                value = getattr(row.entries.get(k), attribute, None)
                line.append((f"{value:.3g}" if value is not None else "", ""))
        lines.append(line)
    title = f"{_title(name, results)}: first call in a process, ms, and its peak memory, MiB"
    return Table(title, columns, lines)


def _time(entry: Entry | None, best: bool) -> Cell:
    if entry is None:
        return "", ""
    if entry.median_us is None:
        if entry.status == "wrong":
            return f"WRONG ({entry.error:.1e})", RED
        return entry.status[:40], RED if entry.status.startswith("failed") else DIM
    assert entry.q1_us is not None and entry.q3_us is not None
    spread = (entry.q3_us - entry.q1_us) / 2 / entry.median_us
    return f"{microseconds(entry.median_us)} ±{spread:.0%}", "bold" if best else ""


def _verdict(row: Row, results: Results) -> Cell:
    found = verdicts(row, results)
    text = ", ".join(f"{v.peer} {v}" for v in found)
    missed = any(v.passed is False for v in found)
    return text, RED if missed else GREEN if found else ""


def _floor(row: Row, ours: float | None) -> Cell:
    if not row.floor_us:
        return "", ""
    share = f", {row.floor_us / ours:.0%}" if ours else ""
    return f"{microseconds(row.floor_us)} {row.floor_kind}{share}", DIM


def limits_text(results: Results) -> str:
    lines = []
    for limit in results.limits:
        peaks = ", ".join(f"{k} {v:.0f} GF/s ({limit.source[k]})" for k, v in limit.gflops.items())
        reads = ", ".join(f"{size // 1024} KiB {gbs:.0f}" for size, gbs in list(limit.read_gbs.items())[::2])
        lines.append(f"limits at {limit.threads} threads: {peaks}")
        if reads:
            lines.append(f"  reading, GB/s, by bytes a thread: {reads}")
    return "\n".join(lines)


def header(results: Results) -> str:
    return environment.describe(results.environment) + "\n" + limits_text(results)


NOTES = """\
Times are medians of interleaved rounds, ± half the distance between the quartiles; on a CPU each
implementation has a process of its own, stopped while another one is timed. "vs" is a peer's time
over ours, above 1 is faster; "vs padded" is ours on the padded batch, scaled by its rows.
The floor is max(flops / peak, weight bytes / bandwidth) at the limits above, without any pointwise
work, and the share it is of our time. First call and peak memory (module or session with its
weights, and one call) are of a fresh process. * Other processes used the processors meanwhile."""


def show(results: Results, with_targets: bool = False) -> None:
    print_text(header(results))
    for table in tables(results, with_targets):
        print_table(table)
    print_text(NOTES)


def print_text(text: str) -> None:
    sys.stdout.write(text + "\n")


def print_table(table: Table) -> None:
    if importlib.util.find_spec("rich") is None:
        sys.stdout.write(f"\n{table.title}\n")
        widths = _widths(table)
        for line in [table.columns, *([text for text, _ in cells] for cells in table.lines)]:
            padded = (text.rjust(width) for text, width in zip(line, widths, strict=True))
            sys.stdout.write("  ".join(padded) + "\n")
        return
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    made = RichTable(title=table.title, title_justify="left", header_style="bold")
    for column in table.columns:
        made.add_column(column, justify="left" if column in ("N x T x H", "cell") else "right")
    shape = None
    for cells in table.lines:
        if shape not in (None, cells[0][0]):
            made.add_section()
        shape = cells[0][0]
        made.add_row(*(Text(text, style) for text, style in cells))
    console = Console()
    if not console.is_terminal:
        console = Console(width=sum(_widths(table)) + 3 * len(table.columns) + 4)
    console.print(made)


def markdown(results: Results, with_targets: bool) -> str:
    parts = ["```\n" + header(results) + "\n```\n"]
    for table in tables(results, with_targets):
        rows: Iterable[Sequence[str]] = ([text for text, _ in cells] for cells in table.lines)
        parts.append(
            f"### {table.title}\n\n"
            + _bars(table.columns)
            + _bars(["---"] * 2 + ["---:"] * (len(table.columns) - 2))
            + "".join(map(_bars, rows))
        )
    return "\n".join([*parts, NOTES]) + "\n"


def _bars(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |\n"


def _widths(table: Table) -> list[int]:
    texts = [table.columns, *([text for text, _ in cells] for cells in table.lines)]
    return [max(map(len, column)) for column in zip(*texts, strict=True)]
