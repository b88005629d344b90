"""Two results side by side: `python -m bench compare A B`."""

from __future__ import annotations

import statistics

from .implementations import OURS
from .report import DIM, GREEN, RED, Cell, Table, microseconds, names_in, print_table, print_text
from .results import Entry, Results


def show(a: Results, b: Results) -> None:
    """Prints A's time over B's for every case both have: above 1, B is faster.

    Other implementations' ratios show how far the machine itself differed: theirs should be 1.
    """
    for name, results in (("A", a), ("B", b)):
        e = results.environment
        print_text(f"{name}: {e['date']}, commit {e['commit']}, {e['cpu']}, {e['versions']}")
    for key in sorted(set(a.environment) | set(b.environment)):
        left, right = a.environment.get(key), b.environment.get(key)
        if left != right and key not in ("date", "commit"):
            print_text(f"  differs: {key}: {left} | {right}")
    in_b = {(row.key, row.threads): row for row in b.rows}
    ratios: dict[str, list[float]] = {}
    for group, rows in a.groups():
        names = names_in(rows)
        title = f"{group[0].replace('-', ' ')}, {group[1]}, {group[2]} threads: A's time / B's"
        table = Table(title, ["N x T x H", "cell", "A", "B", *names], [])
        for row in rows:
            other = in_b.get((row.key, row.threads))
            if other is None:
                continue
            first = OURS if OURS in row.entries else "torch"
            line: list[Cell] = [(row.shape, ""), (row.cell, "")]
            line += [(microseconds(r.median(first)), "") for r in (row, other)]
            for name in names:
                line.append(_ratio(row.entries.get(name), other.entries.get(name)))
                if line[-1][0]:
                    ratios.setdefault(name, []).append(float(line[-1][0].rstrip("~")))
            table.lines.append(line)
        if table.lines:
            print_table(table)
    for name, values in ratios.items():
        print_text(f"geometric mean, {name}: {statistics.geometric_mean(values):.3f}")
    print_text("~: the quartiles overlap")


def _ratio(a: Entry | None, b: Entry | None) -> Cell:
    if a is None or b is None or a.median_us is None or b.median_us is None:
        return "", ""
    assert a.q1_us and a.q3_us and b.q1_us and b.q3_us
    ratio = a.median_us / b.median_us
    if a.q1_us <= b.q3_us and b.q1_us <= a.q3_us:
        return f"{ratio:.2f}~", DIM
    return f"{ratio:.2f}", GREEN if ratio > 1 else RED
