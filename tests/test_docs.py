"""The documentation: its links lead somewhere, its pictures can be drawn, its formulas are the cells'."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
import torch

from fusedrnn import reference

ROOT = Path(__file__).resolve().parent.parent
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/**/*.md")]
N, H = 3, 5


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not link.startswith("http"):
            assert (page.parent / link.split("#")[0]).exists(), link


def test_pictures(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT))
    draw = importlib.import_module("docs.draw")
    monkeypatch.setattr(draw, "IMAGES", tmp_path)
    draw.main()
    drawn = {path.name for path in tmp_path.iterdir()}
    assert drawn == {path.name for path in draw.ROOT.glob("docs/images/*.svg")} - {"design.svg"}
    rows = draw.newest("cpu", {"torch"}).rows
    drawn_once = [(row.group, row.cell, row.dtype, row.shape) for row in rows]
    assert rows and len(set(drawn_once)) == len(rows)


def formulas(cell: str, block: int) -> str:
    """A block of formulas in the cell's chapter of math.md, without shapes, reasons and what isn't a name (dL/dz)."""
    chapter = re.search(rf"^## {cell}$(.*?)^##+ ", (ROOT / "docs" / "math.md").read_text(), re.DOTALL | re.MULTILINE)
    assert chapter
    lines = re.findall(r"```\n(.*?)```", chapter[1], re.DOTALL)[block].splitlines()
    return "\n".join(re.split(r"\s+(?=\[N|from )", line)[0] for line in lines if not line.startswith("dL/"))


class Record:
    """Names with an h and a c, as `prev` and `d` are."""

    def __init__(self, h, c=0.0):
        self.h, self.c = h, c


BLOCKS = {"LSTM": 5, "GRU": 5, "RNN": 2}  # forward and backward, up to the variants
GATES = {"LSTM": "ifgo", "GRU": "rzn", "RNN": [""]}


@pytest.mark.parametrize("cell", ["LSTM", "GRU", "RNN"])
def test_formulas(cell):
    """One step by the text of math.md: the state and the gradients of wx, rh and prev."""
    gates = GATES[cell]
    wx, rh = (torch.randn(N, len(gates) * H, dtype=torch.float64, requires_grad=True) for _ in range(2))
    prev, d = (Record(*torch.randn(2, N, H, dtype=torch.float64)) for _ in range(2))
    prev.h.requires_grad_()
    prev.c.requires_grad_()
    step = {"LSTM": reference.lstm_step, "GRU": reference.gru_step, "RNN": reference.rnn_tanh_step}[cell]
    states = step(wx, rh, (prev.h, prev.c) if cell == "LSTM" else (prev.h,))
    upstream = (d.h, d.c)[: len(states)]
    dwx, drh, *dprev = torch.autograd.grad(states, (wx, rh, prev.h, prev.c), upstream, allow_unused=True)

    names = {"sigmoid": torch.sigmoid, "tanh": torch.tanh, "prev": prev, "d": d, "dprev": Record(0)}
    for name, value in (("wx", wx), ("rh", rh)):
        names |= {
            f"{name}_{gate}" if gate else name: part
            for gate, part in zip(gates, value.chunk(len(gates), -1), strict=True)
        }
    with torch.no_grad():
        for block in range(BLOCKS[cell]):
            exec(formulas(cell, block), names)
        torch.testing.assert_close(names["h"], states[0])
        for name, expected in (("dwx", dwx), ("drh", drh)):
            parts = [names[f"{name}_{gate}" if gate else name] for gate in gates]
            torch.testing.assert_close(torch.cat(parts, -1), expected)
        for name, expected in zip("hc", dprev, strict=True):
            torch.testing.assert_close(
                torch.as_tensor(getattr(names["dprev"], name)).expand(N, H).double(),
                torch.zeros(N, H).double() if expected is None else expected,
            )
