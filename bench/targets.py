"""The ratios aimed at (targets.json), beside those measured."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from .implementations import OURS
from .results import Results, Row

NEAR_FLOOR = 0.85


@dataclass(frozen=True)
class Verdict:
    peer: str
    target: float
    ratio: float | None
    of_floor: float | None  # the floor over our time

    @property
    def passed(self) -> bool | None:
        if self.ratio is None:
            return None
        return self.ratio >= self.target or (self.of_floor or 0.0) >= NEAR_FLOOR

    def __str__(self) -> str:
        if self.passed is None:
            return f"{self.target:g} ?"
        reached = self.ratio is not None and self.ratio >= self.target
        return f"{self.target:g} " + ("pass" if reached else "floor" if self.passed else "MISS")


def verdicts(row: Row, results: Results) -> list[Verdict]:
    """The targets of a row; none for other devices' or fewer threads' rows."""
    device = results.environment["device"]
    if device == "cpu" and row.threads != results.most_threads:
        return []
    found = []
    for table in _tables(device):
        if (table["group"], table["dtype"]) != (row.group, row.dtype):
            continue
        ratios = dict(zip(table["cells"], table["ratios"].get(row.shape, []), strict=False))
        target = ratios.get(row.cell)
        if target is not None:
            ours = row.median(OURS)
            of_floor = row.floor_us / ours if ours and row.floor_us else None
            found.append(Verdict(table["peer"], target, row.ratio(table["peer"]), of_floor))
    return found


def _tables(device: str, cache: dict[str, list] = {}) -> list[dict]:  # noqa: B006
    if device not in cache:
        text = Path(__file__).with_name("targets.json").read_text()
        cache.update({k: v for k, v in json.loads(text).items() if k != "comment"})
    return cache[device]
