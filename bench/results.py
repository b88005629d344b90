"""Results as they are kept: rows of plain values, JSON and CSV."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .implementations import OURS, OWN, PADDED
from .limits import Limits

DISTURBED = 0.05  # a share of the processors above this used by others spoils a timing


@dataclass
class Entry:
    """One implementation in one case."""

    status: str = "ok"  # or "not installed", "n/a", "wrong", "failed: ..."
    error: float | None = None  # against torch.nn in float32
    median_us: float | None = None
    q1_us: float | None = None
    q3_us: float | None = None
    rounds: int | None = None
    inner: int | None = None
    first_ms: float | None = None
    setup_ms: float | None = None
    peak_mib: float | None = None
    plans: str | None = None  # of the two passes, on a GPU


@dataclass
class Row:
    """One case at one number of threads."""

    key: str
    group: str  # the table: inference, training, step, cells, packed-training, scaling-N-...
    cell: str
    dtype: str
    shape: str
    threads: int
    rows: int  # sequence steps computed; less than N * T if packed
    padded_rows: int
    floor_us: float | None = None
    floor_kind: str = ""
    others: float = 0.0  # share of the processors that other processes used meanwhile
    entries: dict[str, Entry] = field(default_factory=dict)

    def median(self, name: str) -> float | None:
        return self.entries[name].median_us if name in self.entries else None

    @property
    def best_peer(self) -> str | None:
        timed = {
            name: entry.median_us
            for name, entry in self.entries.items()
            if entry.median_us is not None and name not in OWN
        }
        return min(timed, key=lambda name: timed[name]) if timed else None

    def ratio(self, peer: str | None) -> float | None:
        """Peer's time over ours; "padded" is the time of the padded batch scaled by its rows."""
        ours = self.median(OURS)
        name = {"best": self.best_peer, "padded": PADDED}.get(peer or "", peer)
        theirs = self.median(name) if name else None
        if not ours or not theirs:
            return None
        return theirs / ours * (self.rows / self.padded_rows if peer == "padded" else 1.0)


@dataclass
class Results:
    environment: dict[str, Any]
    limits: list[Limits] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)

    @property
    def most_threads(self) -> int:
        return max(self.environment["threads"])

    def groups(self) -> Iterator[tuple[tuple[str, str, int], list[Row]]]:
        """(group, dtype, threads) and its rows, in the order measured."""
        found: dict[tuple[str, str, int], list[Row]] = {}
        for row in self.rows:
            found.setdefault((row.group, row.dtype, row.threads), []).append(row)
        yield from found.items()

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(_rounded(asdict(self)), indent=1)
        (folder / "results.json").write_text(text + "\n")
        columns = ["group", "cell", "dtype", "shape", "threads", "implementation"]
        extra = ["ratio", "floor_us", "floor_kind"]
        with open(folder / "results.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, [*columns, *asdict(Entry()), *extra])
            writer.writeheader()
            for row in self.rows:
                for name, entry in row.entries.items():
                    line = {k: getattr(row, k) for k in columns[:-1]} | asdict(entry)
                    line |= {"implementation": name, "ratio": row.ratio(name)}
                    line |= {"floor_us": row.floor_us, "floor_kind": row.floor_kind}
                    writer.writerow(_rounded(line))


def load(path: Path) -> Results:
    data = json.loads((path / "results.json" if path.is_dir() else path).read_text())
    limits = [
        Limits(**(item | {"read_gbs": {int(k): v for k, v in item["read_gbs"].items()}})) for item in data["limits"]
    ]
    rows = [Row(**(item | {"entries": {k: Entry(**v) for k, v in item["entries"].items()}})) for item in data["rows"]]
    return Results(data["environment"], limits, rows)


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_rounded(v) for v in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value
